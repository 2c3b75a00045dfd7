//! The command line, as fsck(8) defines it for its helpers.

use clap::{ArgAction, Parser};
use std::ffi::OsString;
use std::path::PathBuf;

/// Check a cairn pool. Nothing is ever written.
///
/// Exit codes: 0 no errors, 4 errors left, 8 the check could not be carried out, 16 wrong
/// arguments, 32 cancelled.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "fsck.cairn", version, max_term_width = 100)]
pub struct Arguments {
    /// Devices or image files of one pool; others of it are looked for. Or its label, LABEL= or
    /// UUID=
    #[arg(value_name = "DEVICE", required = true)]
    pub devices: Vec<PathBuf>,

    /// As at boot: see whether the pool can be opened, ask nothing
    #[arg(short = 'a', conflicts_with_all = ["assume_yes", "no_change"])]
    pub auto: bool,

    /// The same as -a
    #[arg(short = 'p', conflicts_with_all = ["assume_yes", "no_change"])]
    pub preen: bool,

    /// Answer yes to every question (there are none yet)
    #[arg(short = 'y', conflicts_with = "no_change")]
    pub assume_yes: bool,

    /// Change nothing (the default)
    #[arg(short = 'n')]
    pub no_change: bool,

    /// Check everything, also where -a or -p would not
    #[arg(short = 'f', long)]
    pub force: bool,

    /// Write progress to this descriptor, as lines of pass, done, total and device; 0 shows a bar
    #[arg(short = 'C', value_name = "FD", allow_negative_numbers = true)]
    pub progress: Option<i32>,

    /// Do not check mounted devices, and do not call that an error
    #[arg(short = 'M')]
    pub skip_mounted: bool,

    /// Print how long it took
    #[arg(short = 't', action = ArgAction::Count)]
    pub timing: u8,

    /// Print how much was checked
    #[arg(short = 'v', long, action = ArgAction::Count)]
    pub verbose: u8,

    /// Check metadata and references, but do not read file data
    #[arg(long)]
    pub metadata_only: bool,

    /// Check an older group, as far as it is still there; cairn history shows which there are
    #[arg(long, value_name = "GROUP", conflicts_with_all = ["auto", "preen"])]
    pub txg: Option<u64>,

    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,

    /// Seconds to wait for a device that is being released
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub wait: u64,
}

impl Arguments {
    /// Whether only the quick look at boot is wanted.
    pub(crate) fn is_preen(&self) -> bool {
        (self.auto || self.preen) && !self.force
    }

    /// Whether the caller asked for repairs.
    pub(crate) fn wants_repair(&self) -> bool {
        self.auto || self.preen || self.assume_yes
    }

    /// The devices for messages.
    pub(crate) fn device_names(&self) -> String {
        let names: Vec<String> = self.devices.iter().map(|d| d.display().to_string()).collect();
        names.join(" ")
    }
}

/// Letters this command knows.
const KNOWN: &str = "apynfCMtvVh";

/// At boot a letter of a newer fsck(8) must not keep the system from starting: with `-a` or `-p`,
/// unknown letters are dropped.
pub(crate) fn tolerate(given: Vec<OsString>) -> Vec<OsString> {
    let letters = |argument: &OsString| -> Option<String> {
        let text = argument.to_str()?.strip_prefix('-')?;
        (!text.is_empty() && !text.starts_with('-')).then(|| text.to_string())
    };
    let unattended = |cluster: String| {
        // What follows C is its value.
        cluster.split('C').next().unwrap_or("").contains(['a', 'p'])
    };
    if !given.iter().skip(1).filter_map(letters).any(unattended) {
        return given;
    }
    let mut kept = Vec::with_capacity(given.len());
    for (position, argument) in given.into_iter().enumerate() {
        let Some(cluster) = letters(&argument).filter(|_| position > 0) else {
            kept.push(argument);
            continue;
        };
        let (flags, value) = match cluster.find('C') {
            Some(at) => cluster.split_at(at),
            None => (cluster.as_str(), ""),
        };
        let known: String = flags.chars().filter(|letter| KNOWN.contains(*letter)).collect();
        if !known.is_empty() || !value.is_empty() {
            kept.push(format!("-{known}{value}").into());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn tolerated(arguments: &[&str]) -> Vec<String> {
        let given = arguments.iter().map(OsString::from).collect();
        tolerate(given).into_iter().map(|a| a.into_string().unwrap()).collect()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn unknown_letters_are_dropped_when_nobody_is_there_to_ask() {
        let fsck = |rest: &[&str]| tolerated(&[&["fsck.cairn"], rest].concat())[1..].to_vec();
        assert_eq!(fsck(&["-a", "-T", "-l", "/dev/x"]), ["-a", "/dev/x"]);
        assert_eq!(fsck(&["-aTf", "-C3", "/dev/x"]), ["-af", "-C3", "/dev/x"]);
        assert_eq!(fsck(&["-p", "-QC", "0", "d"]), ["-p", "-C", "0", "d"]);
        assert_eq!(fsck(&["-n", "-T", "d"]), ["-n", "-T", "d"]);
        assert_eq!(fsck(&["--json", "-Cap", "d"]), ["--json", "-Cap", "d"]);
    }
}
