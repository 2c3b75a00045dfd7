//! `cairn`: looks at pools and administers them.
//!
//! A pool is named by its mount point, or by its device or image file. Of a mounted pool the daemon
//! is asked; of one that is not mounted the device is read, and written only by `clear`, `scrub`,
//! `send`, `receive` and what changes subvolumes and snapshots. Standard output carries data only,
//! as text for people, as JSON, or as a stream.
//!
//! | exit code | meaning |
//! | --- | --- |
//! | 0 | done |
//! | 1 | failed |
//! | 2 | wrong arguments |
//! | 3 | done, and something needs attention |
//! | 4 | part of the answer could not be had |

mod arguments;
mod clear;
mod clone;
mod dedup;
mod device;
mod df;
mod documents;
mod history;
mod id;
mod info;
mod inspect;
mod output;
mod property;
mod scrub;
mod status;
mod streams;
mod sync;
mod target;
mod trim;
mod udev;
mod versions;
mod view;

pub use arguments::Arguments;
pub use documents::{write_completions, write_manual};

use arguments::Command;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use std::fmt;
use std::process::ExitCode;

/// The command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Why a command failed, as a sentence.
#[derive(Debug)]
pub struct Failure(String);

impl Failure {
    fn new(sentence: impl fmt::Display) -> Failure {
        Failure(cairn_host::without_codes(&sentence.to_string()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a command that did not fail ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// With all that was asked for.
    Whole,
    /// With something missing; what, was said on standard error.
    Partly,
    /// With all, and something needs attention.
    Attention,
}

/// Runs the command with the arguments of the process.
pub fn main() -> ExitCode {
    let given: Vec<_> = std::env::args_os().collect();
    if arguments::looks_like_mount(&given) {
        eprintln!("cairn: to mount a pool, use mount.cairn, or mount -t cairn SOURCE DIRECTORY");
        return ExitCode::FAILURE;
    }
    let matches = Arguments::command().get_matches_from(given);
    let arguments = match Arguments::from_arg_matches(&matches) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    match run(arguments.command) {
        // What was asked for was to be shown.
        Ok(Done::Whole) if cairn_host::output::failed() => ExitCode::FAILURE,
        Ok(Done::Whole) => ExitCode::SUCCESS,
        Ok(Done::Attention) => ExitCode::from(3),
        Ok(Done::Partly) => ExitCode::from(4),
        Err(failure) => {
            eprintln!("cairn: {failure}");
            if wants_json(&matches) {
                output::json_error(&failure.0);
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether a command was told to print JSON: then programs read what it prints, also when it fails.
fn wants_json(matches: &ArgMatches) -> bool {
    let is_set = |name| matches.try_get_one::<bool>(name).ok().flatten() == Some(&true);
    is_set("json") || matches.subcommand().is_some_and(|(_, matches)| wants_json(matches))
}

fn run(command: Command) -> Result<Done, Failure> {
    match command {
        Command::Info(arguments) => info::run(&arguments),
        Command::Df(arguments) => df::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::History(arguments) => history::run(&arguments),
        Command::Device(verb) => device::run(&verb),
        Command::Scrub(arguments) => scrub::run(&arguments),
        Command::Clear(arguments) => clear::run(&arguments),
        Command::Sync(arguments) => sync::run(&arguments),
        Command::Get(arguments) => property::get(&arguments),
        Command::Set(arguments) => property::set(&arguments),
        Command::Inherit(arguments) => property::inherit(&arguments),
        Command::Trim(arguments) => trim::run(&arguments),
        Command::Clone(arguments) => clone::run(&arguments),
        Command::Dedup(arguments) => dedup::run(&arguments),
        Command::Subvolume(command) => versions::subvolume(&command),
        Command::Snapshot(command) => versions::snapshot(&command),
        Command::Udev { device } => udev::run(&device),
        Command::Id(of) => id::run(&of),
        Command::Send(arguments) => streams::send(&arguments),
        Command::Receive(arguments) => streams::receive(&arguments),
        Command::Stream(command) => streams::stream(&command),
        Command::Inspect(command) => inspect::run(&command),
        Command::Completions { shell } => documents::print_completions(shell),
        Command::Man { directory } => documents::run_manual(&directory),
    }
}
