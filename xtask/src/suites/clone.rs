//! `cairn clone` on a mount.

use super::Suite;
use crate::checkout;
use crate::random::Random;
use crate::run::{Cmd, Output};
use crate::steps::Outcome;
use anyhow::{ensure, Context, Result};
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

const FILE_BYTES: usize = (8 << 20) + 1234;
/// What the metadata of a clone may take.
const METADATA_BYTES: u64 = 1 << 20;

/// Runs it.
///
/// # Errors
/// When a clone is no clone, or something is made of what cannot be shared.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let volume = suite.volume()?;
    let dir = volume.dir();
    let mut content = vec![0; FILE_BYTES];
    Random(11).fill(&mut content);
    let (source, target) = (dir.join("source"), dir.join("target"));
    fs::write(&source, &content)?;
    fs::set_permissions(&source, fs::Permissions::from_mode(0o700))?;
    let before = available(dir)?;
    works(&[], &source, &target)?;
    let taken = before.saturating_sub(available(dir)?);
    ensure!(taken < METADATA_BYTES, "a clone took {taken} bytes");
    ensure!(fs::read(&target)? == content, "the clone holds something else");
    ensure!(fs::metadata(&target)?.permissions().mode() & 0o777 == 0o700, "another mode");
    OpenOptions::new().write(true).open(&target)?.write_all_at(b"other", 5000)?;
    ensure!(fs::read(&source)? == content, "a write to the clone shows in its source");
    parts(&source, &target, &content).context("parts of a file")?;
    refusals(dir, &source, &target).context("what cannot be shared")?;
    volume.finish()?;
    Ok(Outcome::Passed("shared, apart, in parts".into()))
}

/// Shares parts of the source with a file that is there.
fn parts(source: &Path, target: &Path, content: &[u8]) -> Result<()> {
    let mut expected = fs::read(target)?;
    works(&["--offset", "1M", "--length", "64K", "--to", "3M"], source, target)?;
    let (from, to, bytes) = (1 << 20, 3 << 20, 64 << 10);
    expected[to..to + bytes].copy_from_slice(&content[from..from + bytes]);
    ensure!(fs::read(target)? == expected, "a part in the middle");
    works(&["--offset", "8M", "--to", "12M"], source, target)?;
    expected.resize(12 << 20, 0);
    expected.extend_from_slice(&content[8 << 20..]);
    ensure!(fs::read(target)? == expected, "the end, behind the end");
    works(&["-f"], source, target)?;
    ensure!(fs::read(target)? == content, "-f");
    works(&["--length", "4K", "--to", "8K"], source, source)?;
    let mut expected = content.to_vec();
    expected.copy_within(..4096, 8192);
    ensure!(fs::read(source)? == expected, "a part of the file itself");
    fs::write(source, content).map_err(Into::into)
}

fn refusals(dir: &Path, source: &Path, target: &Path) -> Result<()> {
    let below = dir.join("below");
    Cmd::new(checkout::binary("cairn")).args(["subvolume", "create"]).arg(&below).quiet()?;
    let elsewhere = std::env::temp_dir();
    let pipe = dir.join("pipe");
    Cmd::new("mkfifo").arg(&pipe).quiet()?;
    let new = dir.join("new");
    for (options, from, to, said) in [
        (&[][..], source, target, "exists"),
        (&[], source, &*below, "different subvolumes"),
        (&[], source, &*elsewhere, "not on a mounted cairn pool"),
        (&[], dir, &*new, "not a regular file"),
        (&["-f"], source, source, "the file itself"),
        (&["--length", "8K", "--to", "4K"], source, source, "with itself"),
        (&["--offset", "1000"], source, &*new, "sectors"),
        (&["--length", "1G"], source, &*new, "the file ends"),
        (&["--offset", "1G"], source, &*new, "the file ends"),
        (&[], &*pipe, &*new, "not a regular file"),
    ] {
        let out = clone(options, from, to)?;
        ensure!(out.code == Some(1) && out.stderr.contains(said), "{said}: {}", out.both());
    }
    ensure!(!new.exists(), "something was made");
    Ok(())
}

fn clone(options: &[&str], source: &Path, target: &Path) -> Result<Output> {
    let command = Cmd::new(checkout::binary("cairn")).arg("clone").args(options);
    command.arg(source).arg(target).output()
}

fn works(options: &[&str], source: &Path, target: &Path) -> Result<()> {
    let out = clone(options, source, target)?;
    ensure!(out.code == Some(0), "cairn clone {options:?}: {}", out.both());
    Ok(())
}

/// What may still be written, once all is stored.
fn available(dir: &Path) -> Result<u64> {
    Cmd::new(checkout::binary("cairn")).arg("sync").arg(dir).quiet()?;
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail * stat.f_frsize)
}
