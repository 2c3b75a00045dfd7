//! `fsck.cairn`: checks a pool, and changes nothing.
//!
//! Called as fsck(8) calls its helpers. A pool needs no repair after a crash: opening it finds the
//! last published state and replays the log. So the *preen* at boot (`-a`, `-p`) only looks whether
//! the pool can be opened, in well below a second; everything else, and `-f` always, is the full
//! check: every checksum, reference count, allocation, link count and directory is computed anew
//! from the trees and compared with what is stored. Devices are opened read-only, whatever the
//! arguments say.
//!
//! | exit code | meaning |
//! | --- | --- |
//! | 0 | no errors |
//! | 4 | errors, left as they are |
//! | 8 | the check could not be carried out |
//! | 16 | wrong arguments |
//! | 32 | cancelled |

mod arguments;
mod once;
mod preen;
mod progress;
mod report;

pub use arguments::Arguments;

use cairn_host::{
    host_platform, members, mounts, open_devices, source, Access, FileDevice, OpenOptions, Wait,
};
use clap::{CommandFactory, Parser};
use fs_core::check::{check, CheckOptions};
use fs_core::platform::DeviceRef;
use fs_core::units::Txg;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ERRORS_LEFT: u8 = 4;
const OPERATIONAL: u8 = 8;
const USAGE: u8 = 16;
const CANCELLED: i32 = 32;

/// The command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Runs the command with the arguments of the process.
pub fn main() -> ExitCode {
    let given: Vec<OsString> = std::env::args_os().collect();
    match Arguments::try_parse_from(arguments::tolerate(given)) {
        Ok(mut arguments) => match source::resolve_all(&arguments.devices) {
            Ok(devices) => {
                arguments.devices = members::distinct(&devices);
                ExitCode::from(run(&arguments))
            }
            Err(sentence) => ExitCode::from(fail(&arguments, &sentence)),
        },
        Err(error) => {
            // A broken pipe to whoever asked for help is nobody's loss.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { USAGE } else { 0 })
        }
    }
}

/// Checks as the arguments ask; the exit code.
fn run(arguments: &Arguments) -> u8 {
    let mounted = arguments.devices.iter().find_map(|path| {
        mounts::mount_of_device(path).map(|mount| (path.display(), mount.mount_point))
    });
    if let Some((device, mount_point)) = mounted {
        if arguments.skip_mounted {
            return 0;
        }
        let place = mount_point.display();
        return fail(arguments, &format!("{device} is mounted on {place}; unmount it first"));
    }
    cancel_on_signals();
    let wait = Wait {
        bound: Duration::from_secs(arguments.wait),
        announce: &|message| eprintln!("fsck.cairn: {message}"),
    };
    let devices = members::complete(&arguments.devices);
    match open_devices(&devices, OpenOptions::new(Access::ReadOnly), &wait) {
        Ok(devices) if arguments.is_preen() => preen::preen(&devices, arguments),
        Ok(devices) => full_check(devices, arguments),
        Err(error) => fail(arguments, &error.to_string()),
    }
}

fn full_check(devices: Vec<Arc<FileDevice>>, arguments: &Arguments) -> u8 {
    let name = arguments.device_names();
    let progress = progress::Progress::new(arguments, &name);
    let devices: Vec<DeviceRef> = devices.into_iter().map(|device| device as DeviceRef).collect();
    let options = CheckOptions { data: !arguments.metadata_only, txg: arguments.txg.map(Txg) };
    let start = Instant::now();
    let outcome = check(devices, host_platform(), &options, &progress);
    progress.finish();
    match outcome {
        Ok(checked) => {
            let seconds = start.elapsed().as_secs_f64();
            report::print(&checked, arguments, &name, seconds);
            if checked.is_clean() {
                return 0;
            }
            if arguments.wants_repair() {
                eprintln!(
                    "fsck.cairn: repair is not part of this version; nothing on {name} was changed"
                );
            }
            ERRORS_LEFT
        }
        // The pool is beyond opening, which is a finding of its own.
        Err(error) if error.is_damage() || cannot_open(&error) => {
            report::print_unopenable(&error, arguments, &name);
            ERRORS_LEFT
        }
        Err(error) => fail(arguments, &format!("{name}: {error}")),
    }
}

fn cannot_open(error: &fs_core::error::Error) -> bool {
    use fs_core::error::Error;
    matches!(
        error,
        Error::NoSuperblock
            | Error::NoGroup { cause: Some(_), .. }
            | Error::Truncated { .. }
            | Error::MissingDevices { .. }
            | Error::OnlyBehind { .. }
            | Error::Split { .. }
    )
}

/// Says why there was no check.
fn fail(arguments: &Arguments, sentence: &str) -> u8 {
    eprintln!("fsck.cairn: {sentence}");
    if arguments.json {
        report::print_failed(sentence, arguments);
    }
    OPERATIONAL
}

/// A check holds nothing that must be put in order, so it may end at any moment.
fn cancel_on_signals() {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            eprintln!("fsck.cairn: cancelled");
            std::process::exit(CANCELLED);
        }
    });
}
