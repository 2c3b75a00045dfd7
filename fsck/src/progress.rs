//! Progress: a bar on a terminal, or lines for the program that called.

use crate::Arguments;
use fs_core::check::{CheckProgress, Pass};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two lines.
const LINES_EVERY: Duration = Duration::from_millis(100);

pub(crate) struct Progress {
    bar: ProgressBar,
    lines: Option<Lines>,
}

struct Lines {
    device: String,
    to: Mutex<(File, Option<Instant>)>,
}

impl Progress {
    pub(crate) fn new(arguments: &Arguments, device: &str) -> Progress {
        let lines = arguments.progress.filter(|fd| *fd > 0).and_then(|fd| Lines::to(fd, device));
        let bar = if lines.is_some() || arguments.json {
            ProgressBar::hidden()
        } else {
            // Hidden unless standard error is a terminal.
            ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr())
        };
        if let Ok(style) = ProgressStyle::with_template("pass {prefix} {wide_bar} {percent}% {eta}")
        {
            bar.set_style(style);
        }
        Progress { bar, lines }
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Lines {
    fn to(fd: i32, device: &str) -> Option<Lines> {
        let file = match fd {
            1 => std::io::stdout().as_fd().try_clone_to_owned().map(File::from),
            2 => std::io::stderr().as_fd().try_clone_to_owned().map(File::from),
            // By its name in /proc, so that a wrong number is an error and not somebody else's
            // file. That opens it anew, so what a file has already must not be written over.
            _ => File::options().append(true).open(format!("/proc/self/fd/{fd}")),
        };
        match file {
            Ok(file) => Some(Lines { device: device.into(), to: Mutex::new((file, None)) }),
            Err(error) => {
                eprintln!("fsck.cairn: no progress on descriptor {fd}: {error}");
                None
            }
        }
    }

    fn line(&self, pass: u32, done: u64, total: u64) {
        let Ok(mut to) = self.to.lock() else { return };
        let (file, last) = &mut *to;
        if done < total && last.is_some_and(|last| last.elapsed() < LINES_EVERY) {
            return;
        }
        *last = Some(Instant::now());
        // Nobody may be reading any more; the check goes on.
        let _ = writeln!(file, "{pass} {done} {total} {}", self.device);
    }
}

impl CheckProgress for Progress {
    fn progress(&self, pass: Pass, done: u64, total: u64) -> bool {
        let number = match pass {
            Pass::Trees => 1,
            Pass::Names => 2,
            Pass::Space => 3,
        };
        // The total is an estimate.
        let total = total.max(done);
        if let Some(lines) = &self.lines {
            lines.line(number, done, total);
        }
        self.bar.set_prefix(number.to_string());
        self.bar.set_length(total);
        self.bar.set_position(done);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn lines_carry_pass_done_total_and_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "before\n").unwrap();
        let fd = file.as_file().as_raw_fd();
        let arguments = Arguments { progress: Some(fd), ..Arguments::default() };
        let progress = Progress::new(&arguments, "/dev/x");
        progress.progress(Pass::Trees, 0, 10);
        progress.progress(Pass::Trees, 5, 10);
        progress.progress(Pass::Names, 11, 10);
        // The line in the middle came too soon after the first.
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "before\n1 0 10 /dev/x\n2 11 11 /dev/x\n"
        );
    }
}
