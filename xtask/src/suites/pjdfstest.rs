//! The `pjdfstest` suite: some 400 cases of what POSIX says about each call.
//!
//! A second filesystem is needed to provoke EXDEV, and two users who are not root. Cases that are
//! known to fail are in `pjdfstest.known`, a reason for each; one that passes unexpectedly fails
//! the run. The cases about read-only filesystems remount the one under test while they run, which
//! takes a mount helper where mount(8) looks for it; they are a run of their own.

use super::Suite;
use crate::guard;
use crate::need;
use crate::run::{tail, Cmd, Output};
use crate::steps::Outcome;
use crate::volume::Volume;
use anyhow::{bail, Context, Result};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

const VERSION: &str = "0.2.2";

/// `name of the case: reason`, a line for each.
const KNOWN: &str = include_str!("pjdfstest.known");

/// How many cases must have run for a run to mean anything.
const CASES_MIN: u32 = 350;

/// Every case but those about read-only filesystems.
///
/// # Errors
/// When cases fail.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let volume = suite.volume()?;
    let out = exercise(suite, &volume, "pjdfstest", false)?;
    volume.finish()?;
    report(&out, CASES_MIN)
}

/// The cases about read-only filesystems.
///
/// # Errors
/// When cases fail.
pub fn run_read_only(suite: &Suite<'_>) -> Result<Outcome> {
    let volume = suite.volume()?;
    let _helpers = if suite.subject.is_fuse() { helper_links()? } else { Vec::new() };
    let out = exercise(suite, &volume, "pjdfstest-readonly", true)?;
    volume.finish()?;
    report(&out, 10)
}

fn exercise(suite: &Suite<'_>, volume: &Volume<'_>, log: &str, remount: bool) -> Result<Output> {
    need::tools(&[("setfacl", "acl")])?;
    let program = need::crate_program("pjdfstest", VERSION)?;
    let users = two_users()?;
    let (second, _second) = second_filesystem()?;
    let config = second.parent().context("a directory of its own")?.join("pjdfstest.toml");
    fs::write(&config, configuration(remount, &users))?;
    // The test users must be able to reach the mount.
    let dir = volume.dir().join("pjdfstest");
    fs::create_dir(&dir)?;
    let mut cmd = Cmd::new(program).arg("-c").arg(&config).arg("-s").arg(&second);
    cmd = cmd.arg("-p").arg(&dir).limit(Duration::from_secs(1200));
    if remount {
        cmd = cmd.arg("erofs");
    }
    cmd.log_to(&suite.log(log))
}

fn configuration(remount: bool, users: &[String; 2]) -> String {
    let mut text = String::from(
        "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutime_now = {}\nutimensat = {}\n",
    );
    let entries = users.each_ref().map(|user| {
        let (name, group) = user.split_once(':').unwrap_or((user, user));
        format!("[\"{name}\", \"{group}\"]")
    });
    let known: Vec<String> = known().map(|(name, _)| format!("\"{name}\"")).collect();
    // A case that is not run cannot fail as expected, so the list goes with the first run only.
    let known = if remount { Vec::new() } else { known };
    let _ = write!(
        text,
        "[settings]\nnaptime = 0.02\nallow_remount = {remount}\nexpected_failures = [{}]\n\
         [dummy_auth]\nentries = [{}]\n",
        known.join(", "),
        entries.join(", ")
    );
    text
}

fn known() -> impl Iterator<Item = (&'static str, &'static str)> {
    KNOWN
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .filter_map(|line| line.split_once(": "))
}

/// Two users with their groups, made if they are missing.
fn two_users() -> Result<[String; 2]> {
    let group = Cmd::new("id").args(["-gn", "nobody"]).text()?.trim().to_owned();
    if Cmd::new("id").args(["-u", "cairn-test"]).output()?.code != Some(0) {
        let cmd = Cmd::new("useradd").args(["--system", "--user-group", "--no-create-home"]);
        cmd.args(["--shell", "/usr/sbin/nologin", "cairn-test"]).quiet()?;
    }
    Ok([format!("nobody:{group}"), "cairn-test:cairn-test".to_owned()])
}

/// Another filesystem, for links and renames across two of them.
fn second_filesystem() -> Result<(std::path::PathBuf, [guard::Guard; 2])> {
    let (scratch, removal) = guard::temp_dir(&crate::checkout::artefacts("scratch")?, "second")?;
    let dir = scratch.join("mnt");
    fs::create_dir(&dir)?;
    let cmd = Cmd::new("mount").args(["-t", "tmpfs", "-o", "mode=0755", "tmpfs"]);
    cmd.arg(&dir).quiet()?;
    let mounted = guard::mounted(&dir);
    Ok((dir, [mounted, removal]))
}

/// Links to the mount helper where mount(8) finds them, for as long as the guards live. A helper
/// that is installed already is left alone.
fn helper_links() -> Result<Vec<guard::Guard>> {
    let helper = crate::checkout::binary("mount.cairn");
    let mut links = Vec::new();
    for name in ["mount.cairn", "mount.fuse.cairn", "mount.fuseblk.cairn"] {
        let link = Path::new("/sbin").join(name);
        if fs::symlink_metadata(&link).is_err() {
            links.push(guard::symlink(&helper, &link)?);
        }
    }
    Ok(links)
}

fn report(out: &Output, cases_min: u32) -> Result<Outcome> {
    let text = plain(&out.stdout);
    let summary = text
        .lines()
        .find(|line| line.starts_with("Summary: "))
        .with_context(|| format!("it did not finish:\n{}", tail(&text, 20)))?;
    let bad: Vec<&str> = text
        .lines()
        .filter(|line| line.ends_with("FAILED") || line.ends_with("PASSED UNEXPECTEDLY"))
        .collect();
    if !bad.is_empty() || out.code != Some(0) {
        bail!("{summary}\n{}", bad.join("\n"));
    }
    let passed = count(summary, "passed").unwrap_or(0);
    if passed < cases_min {
        bail!("only {passed} cases ran: {summary}");
    }
    Ok(Outcome::Passed(summary.trim_start_matches("Summary: ").to_owned()))
}

/// The number before a word of the summary.
fn count(summary: &str, word: &str) -> Option<u32> {
    let end = summary.find(word)?;
    summary[..end].split_whitespace().last()?.parse().ok()
}

/// The text without the colours of a terminal.
fn plain(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |mut out, part| {
        out.push_str(part.split_once('m').map_or(part, |(_, rest)| rest));
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_failure_has_a_reason() {
        for line in KNOWN.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let reason = line.split_once(": ").map(|(_, reason)| reason.trim());
            assert!(reason.is_some_and(|reason| reason.len() > 10), "no reason: {line}");
        }
    }

    #[test]
    fn colours_are_taken_off_and_numbers_found() {
        let text = plain("\u{1b}[1;31mSummary\u{1b}[0m: 2 \u{1b}[31mfailed\u{1b}[0m, 31 passed");
        assert_eq!(text, "Summary: 2 failed, 31 passed");
        assert_eq!(count(&text, "passed"), Some(31));
    }
}
