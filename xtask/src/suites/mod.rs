//! Suites that run on a mounted image, as root.
//!
//! | suite | asks |
//! | --- | --- |
//! | `pjdfstest` | does each call do what POSIX says? |
//! | `fsx` | does a file hold what was written, whatever the calls? |
//! | `direct` | the same when O_DIRECT, mmap and ordinary calls meet on one file |
//! | `full` | does whoever writes learn that there is no room? |
//! | `programs` | do programs that people use work? |
//! | `python` | do Python's own tests of the filesystem fail where they do not elsewhere? |
//! | `badinput` | what happens with images and devices that are broken, full or busy? |
//! | `cycles` | may the next command follow an unmount at once? |
//! | `kill` | is everything that was synced still there when the server is killed? |
//! | `devices` | does a pool in use survive that devices come and go? |
//! | `versions` | does a snapshot stay what it was, whatever goes on around it? |
//! | `history` | does an older group show what was there, and nothing else? |
//! | `scrub` | is a spoilt half of a mirror found and repaired while it is in use? |
//! | `dedup` | does sharing what is equal leave what files hold as it is, while they are written? |
//! | `memory` | does the driver keep to the memory it is allowed? |
//! | `replicate` | does a whole tree arrive elsewhere as it was, in increments and in pieces? |
//! | `properties` | does what is set for a subvolume hold, below it too? |
//! | `user` | does an ordinary user get by without root? |
//!
//! Each ends with the image unmounted and checked. The first six also run on other filesystems
//! (`--subject ext4`), which shows whether a failure is the suite's own.

mod badinput;
mod clone;
mod cycles;
mod dedup;
mod devices;
mod direct;
mod fsx;
mod full;
mod history;
mod kill;
mod loops;
mod memory;
mod pjdfstest;
mod programs;
mod properties;
mod python;
mod replicate;
mod scrub;
mod send;
mod user;
mod versions;

pub use programs::copy_sources;

use crate::steps::{passed, Outcome, Steps};
use crate::subject::{self, Subject};
use crate::volume::{Backing, Volume};
use crate::{checkout, demo, need};
use anyhow::Result;
use std::path::PathBuf;

/// What every suite is given.
pub struct Suite<'a> {
    /// The filesystem to try.
    pub subject: &'a dyn Subject,
    /// Whether hours may be spent.
    pub long: bool,
    /// Where logs of what was run are kept.
    pub logs: PathBuf,
}

impl Suite<'_> {
    /// A fresh image of a size that fits every suite, mounted.
    ///
    /// # Errors
    /// When it cannot be made or mounted.
    pub fn volume(&self) -> Result<Volume<'_>> {
        let mut volume = Volume::create(self.subject, Backing::Loop, 4 << 30)?;
        volume.mount()?;
        Ok(volume)
    }

    /// The log file of that name.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }
}

type Run = fn(&Suite<'_>) -> Result<Outcome>;

/// Suites for any filesystem.
const GENERAL: &[(&str, Run)] = &[
    ("pjdfstest", pjdfstest::run),
    ("pjdfstest-readonly", pjdfstest::run_read_only),
    ("fsx", fsx::run),
    ("direct", direct::run),
    ("full", full::run),
    ("programs-build", programs::build),
    ("programs-git", programs::git),
    ("programs-sqlite", programs::sqlite),
    ("programs-rsync", programs::rsync),
    ("programs-tar", programs::tar),
    ("python", python::run),
];

/// Suites that know cairn's commands and format.
const OWN: &[(&str, Run)] = &[
    ("badinput-images", badinput::images),
    ("badinput-devices", badinput::devices),
    ("cycles", cycles::run),
    ("kill", kill::run),
    ("sigterm", kill::terminate),
    ("scrub", scrub::run),
    ("versions", versions::run),
    ("history", history::run),
    ("send", send::run),
    ("replicate", replicate::run),
    ("devices", devices::run),
    ("limits", full::limits),
    ("clone", clone::run),
    ("dedup", dedup::run),
    ("properties", properties::run),
    ("memory", memory::run),
    ("user", user::run),
];

/// Adds the suites to a run.
///
/// # Errors
/// When the subject is unknown.
pub fn steps(steps: &mut Steps, subject: &str, long: bool) -> Result<()> {
    let is_cairn = subject == "cairn";
    let subject = subject::by_name(subject)?;
    let logs = checkout::artefacts("logs")?;
    let suite = Suite { subject: &*subject, long, logs };
    let own: &[(&str, Run)] = if is_cairn { OWN } else { &[] };
    let suites = GENERAL.iter().chain(own);
    if is_cairn {
        let any = steps.wants("demo") || suites.clone().any(|(name, _)| steps.wants(name));
        if any {
            steps.always("build-release", || {
                need::release_build()?;
                passed()
            });
        }
        steps.step("demo", || on_a_mount(&suite, |_| demo::run("cairn").and_then(|()| passed())));
    }
    for (name, run) in suites {
        steps.step(name, || on_a_mount(&suite, *run));
    }
    Ok(())
}

fn on_a_mount(
    suite: &Suite<'_>,
    run: impl FnOnce(&Suite<'_>) -> Result<Outcome>,
) -> Result<Outcome> {
    match need::can_mount() {
        Ok(()) => {
            need::tools(need::MOUNT)?;
            run(suite)
        }
        Err(why) => Ok(Outcome::Skipped(format!("{why:#}"))),
    }
}
