//! The next command right after an unmount: nothing is raced, nothing is lost.
//!
//! Through plain FUSE umount(8) returns before the server has finished; the device lock is what the
//! next command waits for. Each round writes something, unmounts, and goes on at once with a mount,
//! a check, or a new filesystem.

use super::Suite;
use crate::random::Random;
use crate::steps::Outcome;
use crate::volume::{Backing, Volume};
use anyhow::{ensure, Context, Result};
use std::fs;

/// Runs the rounds on an image file and on a loop device.
///
/// # Errors
/// When a command fails or finds something else than was written.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let rounds = if suite.long { 300 } else { 12 };
    for backing in [Backing::File, Backing::Loop] {
        let mut volume = Volume::create(suite.subject, backing, 1 << 30)?;
        let mut random = Random(7);
        let mut bytes = vec![0; 3 << 20];
        for round in 0..rounds {
            random.fill(&mut bytes);
            step(&mut volume, round, &bytes)
                .with_context(|| format!("{backing:?}, round {round}"))?;
        }
        volume.check()?;
    }
    Ok(Outcome::Passed(format!("{rounds} rounds on a file and on a device")))
}

fn step(volume: &mut Volume<'_>, round: u32, bytes: &[u8]) -> Result<()> {
    volume.mount()?;
    // Not synced: the unmount has to do that.
    for n in 0..20 {
        fs::write(volume.dir().join(format!("{round}-{n}")), &bytes[n * 1000..])?;
    }
    volume.unmount()?;
    if round % 3 == 1 {
        volume.check()?;
    }
    volume.mount()?;
    for n in 0..20 {
        let path = volume.dir().join(format!("{round}-{n}"));
        ensure!(fs::read(&path)? == bytes[n * 1000..], "{} differs", path.display());
        fs::remove_file(&path)?;
    }
    volume.unmount()?;
    if round % 3 == 2 {
        volume.format()?;
        volume.mount()?;
        let left = fs::read_dir(volume.dir())?.count();
        ensure!(left == 0, "a new filesystem has {left} entries");
        volume.unmount()?;
    }
    Ok(())
}
