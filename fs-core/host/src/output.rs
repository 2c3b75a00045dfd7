//! Standard output of commands.
//!
//! Whoever reads it may go away, as `head` does: then nobody wants the rest, and the command ends
//! as it would have, with its own exit code. That it cannot be written otherwise, as on a full
//! disk, is said once, and [`failed`] tells the command.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static FAILED: AtomicBool = AtomicBool::new(false);

/// Writes to standard output; `say!` calls it.
pub fn print(text: Arguments<'_>) {
    note(io::stdout().lock().write_fmt(text));
}

fn note(written: io::Result<()>) {
    let Err(error) = written else { return };
    if error.kind() != ErrorKind::BrokenPipe && !FAILED.swap(true, Ordering::Relaxed) {
        eprintln!("standard output cannot be written: {error}");
    }
}

/// Writes text that has its line ends.
pub fn text(text: &str) {
    print(format_args!("{text}"));
}

/// Whether something could not be written that somebody may wait for.
pub fn failed() -> bool {
    note(io::stdout().lock().flush());
    FAILED.load(Ordering::Relaxed)
}

/// As `println!`, for output whose reader may go away.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::print(format_args!("{}\n", format_args!($($text)*)))
    };
}
