//! Half of a mirror is spoilt while it is in use, and a scrub makes it good.
//!
//! On loop devices, through FUSE: random sectors of the file below one device are written over
//! while files are written to the pool. `cairn scrub` must find that, repair it, and say so; every
//! file must be what it was, and the checker content. Then the same for a pool that is not mounted.

use super::loops::{Loops, Shape, LIMIT};
use super::Suite;
use crate::random::Random;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const DEVICE_BYTES: u64 = 512 << 20;
/// Where chunks begin.
const DATA_START: u64 = 1 << 20;
const FILES: u64 = 48;
/// Of so many sectors one is spoilt.
const SPOILT: usize = 12;

const SHAPE: Shape =
    Shape { name: "scrub", devices: 2, device_bytes: DEVICE_BYTES, file_bytes: 2 << 20 };

/// Runs it.
///
/// # Errors
/// When damage is missed, repaired wrongly or not told.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut mirror = Loops::create(suite.subject, &SHAPE)?;
    mirror.mount()?;
    (0..FILES).try_for_each(|number| mirror.write(number))?;
    cairn(&["sync"], &mirror.dir)?;
    let (spoilt, more) = mirror.while_writing(FILES..2 * FILES, || {
        let spoilt = spoil(&mirror.images[1])?;
        let waited = cairn(&["scrub", "start", "--wait"], &mirror.dir)?;
        ensure!(waited.contains("scrub repaired"), "nothing was repaired: {waited}");
        Ok(spoilt)
    })?;
    let scrub = scrub_of(&mirror)?;
    let number = |name: &str| scrub[name].as_u64().unwrap_or(0);
    ensure!(scrub["state"] == "finished" && number("lost_count") == 0, "{scrub}");
    ensure!(number("found") > 0 && number("repaired_bytes") > 0, "{scrub}");
    ensure!(scrub["devices"][0]["found"] == 0, "the good half was called bad: {scrub}");
    let status = Cmd::new(checkout::binary("cairn")).arg("status").arg(&mirror.dir).output()?;
    ensure!(status.code == Some(3), "errors of a device need attention: {}", status.both());
    ensure!(status.stdout.contains("  scan: scrub repaired"), "{}", status.stdout);
    cairn(&["clear"], &mirror.dir)?;
    // What is written while a scrub runs may be spoilt behind it; a second one finds that.
    cairn(&["scrub", "start", "--wait"], &mirror.dir)?;
    cairn(&["scrub", "start", "--wait"], &mirror.dir)?;
    let again = scrub_of(&mirror)?;
    ensure!(again["found"] == 0, "a scrub after a scrub found something: {again}");
    survives_remounts(&mut mirror)?;
    mirror.remount()?;
    (0..more).try_for_each(|number| mirror.compare(number))?;
    mirror.unmount()?;
    mirror.check()?;
    spoil(&mirror.images[1])?;
    let offline = cairn(&["scrub", "--offline"], &mirror.devices[0])?;
    ensure!(offline.contains("scrub repaired"), "{offline}");
    mirror.check()?;
    Ok(Outcome::Passed(format!("{spoilt} sectors spoilt, {more} files as they were")))
}

fn cairn(words: &[&str], target: &Path) -> Result<String> {
    Cmd::new(checkout::binary("cairn")).args(words).arg(target).limit(LIMIT).text()
}

/// Writes over sectors of a device behind its back.
fn spoil(image: &Path) -> Result<usize> {
    let file = File::options().write(true).open(image)?;
    let mut random = Random(0x5c2b);
    let mut garbage = vec![0; 4096];
    let mut count = 0;
    // The second label area is at the end.
    let end = DEVICE_BYTES - DATA_START;
    for at in (DATA_START..end).step_by(garbage.len()) {
        if random.below(SPOILT) == 0 {
            random.fill(&mut garbage);
            file.write_all_at(&garbage, at)?;
            count += 1;
        }
    }
    file.sync_all()?;
    Ok(count)
}

/// How the scrub stands.
fn scrub_of(mirror: &Loops<'_>) -> Result<Value> {
    let text = Cmd::new(checkout::binary("cairn"))
        .args(["scrub", "status", "--json"])
        .arg(&mirror.dir)
        .text()?;
    serde_json::from_str(&text).context("cairn scrub status --json prints JSON")
}

/// One that is paused stays so, and one that runs goes on.
fn survives_remounts(mirror: &mut Loops<'_>) -> Result<()> {
    let dir = mirror.dir.clone();
    cairn(&["scrub", "start", "--rate", "1M"], &dir)?;
    cairn(&["scrub", "pause"], &dir)?;
    let before = scrub_of(mirror)?;
    mirror.remount()?;
    let paused = scrub_of(mirror)?;
    ensure!(paused["state"] == "paused", "{paused}");
    ensure!(paused["done_bytes"] == before["done_bytes"], "{before} became {paused}");
    cairn(&["scrub", "resume"], &dir)?;
    mirror.remount()?;
    let running = scrub_of(mirror)?;
    ensure!(running["state"] == "running", "{running}");
    cairn(&["scrub", "pause"], &dir)?;
    cairn(&["scrub", "resume", "--rate", "0", "--wait"], &dir)?;
    let done = scrub_of(mirror)?;
    ensure!(done["state"] == "finished" && done["found"] == 0, "{done}");
    Ok(())
}
