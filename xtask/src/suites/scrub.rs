//! Half of a mirror is spoilt while it is in use, and a scrub makes it good.
//!
//! On loop devices, through FUSE: random sectors of the file below one device are written over
//! while files are written to the pool. `cairn scrub` must find that, repair it, and say so; every
//! file must be what it was, and the checker content. Then the same for a pool that is not mounted.

use super::Suite;
use crate::guard::{self, Guard};
use crate::random::Random;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::subject::{MountOptions, Subject};
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const DEVICE_BYTES: u64 = 512 << 20;
/// Where chunks begin.
const DATA_START: u64 = 1 << 20;
const FILES: u64 = 48;
const FILE_BYTES: usize = 2 << 20;
/// Of so many sectors one is spoilt.
const SPOILT: usize = 12;
const LIMIT: Duration = Duration::from_secs(300);

/// A mirror on two loop devices.
struct Mirror<'a> {
    // Dropped in this order.
    mounted: Option<Guard>,
    _attached: Vec<Guard>,
    _mount_point: Guard,
    _scratch: Guard,
    subject: &'a dyn Subject,
    images: Vec<PathBuf>,
    devices: Vec<PathBuf>,
    dir: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When damage is missed, repaired wrongly or not told.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut mirror = Mirror::create(suite.subject)?;
    mirror.mount()?;
    (0..FILES).try_for_each(|number| mirror.write(number))?;
    cairn(&["sync"], &mirror.dir)?;
    let stop = AtomicBool::new(false);
    let (spoilt, more) = std::thread::scope(|scope| -> Result<(usize, u64)> {
        let writer = scope.spawn(|| -> Result<u64> {
            let mut next = FILES;
            while !stop.load(Ordering::Relaxed) && next < 2 * FILES {
                mirror.write(next)?;
                next += 1;
            }
            Ok(next)
        });
        let outcome = spoil(&mirror.images[1]).and_then(|spoilt| {
            let waited = cairn(&["scrub", "start", "--wait"], &mirror.dir)?;
            ensure!(waited.contains("scrub repaired"), "nothing was repaired: {waited}");
            Ok(spoilt)
        });
        stop.store(true, Ordering::Relaxed);
        let more = writer.join().expect("the writer does not panic")?;
        Ok((outcome?, more))
    })?;
    let scrub = mirror.scrub()?;
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
    let again = mirror.scrub()?;
    ensure!(again["found"] == 0, "a scrub after a scrub found something: {again}");
    mirror.survives_remounts()?;
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

impl<'a> Mirror<'a> {
    fn create(subject: &'a dyn Subject) -> Result<Mirror<'a>> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "scrub")?;
        let (dir, mount_point) = guard::mount_point()?;
        let (mut images, mut devices, mut attached) = (Vec::new(), Vec::new(), Vec::new());
        for name in ["left", "right"] {
            let image = scratch.join(name);
            File::create(&image)?.set_len(DEVICE_BYTES)?;
            let (device, guard) = guard::loop_device(&image, false)?;
            images.push(image);
            devices.push(device);
            attached.push(guard);
        }
        Cmd::new(checkout::binary("mkfs.cairn"))
            .args(["-q", "-f", "--profile", "mirror"])
            .args(&devices)
            .quiet()?;
        Ok(Mirror {
            mounted: None,
            _attached: attached,
            _mount_point: mount_point,
            _scratch: removal,
            subject,
            images,
            devices,
            dir,
        })
    }

    fn mount(&mut self) -> Result<()> {
        self.subject.mount(&self.devices[0], &self.dir, MountOptions::default())?;
        self.mounted = Some(guard::mounted(&self.dir));
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        guard::unmount_command(&self.dir).limit(LIMIT).quiet()?;
        if let Some(guard) = self.mounted.take() {
            guard.disarm();
        }
        Ok(())
    }

    fn remount(&mut self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    fn check(&self) -> Result<()> {
        Cmd::new(checkout::binary("fsck.cairn")).args(["-f", "-n"]).args(&self.devices).quiet()
    }

    fn scrub(&self) -> Result<Value> {
        let text = Cmd::new(checkout::binary("cairn"))
            .args(["scrub", "status", "--json"])
            .arg(&self.dir)
            .text()?;
        serde_json::from_str(&text).context("cairn scrub status --json prints JSON")
    }

    fn content(number: u64) -> Vec<u8> {
        let mut content = vec![0; FILE_BYTES];
        Random(0xf11e + number).fill(&mut content);
        content
    }

    fn write(&self, number: u64) -> Result<()> {
        Ok(fs::write(self.dir.join(format!("file {number}")), Mirror::content(number))?)
    }

    fn compare(&self, number: u64) -> Result<()> {
        let found = fs::read(self.dir.join(format!("file {number}")))?;
        ensure!(found == Mirror::content(number), "file {number} is not what was written");
        Ok(())
    }

    /// One that is paused stays so, and one that runs goes on.
    fn survives_remounts(&mut self) -> Result<()> {
        let dir = self.dir.clone();
        cairn(&["scrub", "start", "--rate", "1M"], &dir)?;
        cairn(&["scrub", "pause"], &dir)?;
        let before = self.scrub()?;
        self.remount()?;
        let paused = self.scrub()?;
        ensure!(paused["state"] == "paused", "{paused}");
        ensure!(paused["done_bytes"] == before["done_bytes"], "{before} became {paused}");
        cairn(&["scrub", "resume"], &dir)?;
        self.remount()?;
        let running = self.scrub()?;
        ensure!(running["state"] == "running", "{running}");
        cairn(&["scrub", "pause"], &dir)?;
        cairn(&["scrub", "resume", "--rate", "0", "--wait"], &dir)?;
        let done = self.scrub()?;
        ensure!(done["state"] == "finished" && done["found"] == 0, "{done}");
        Ok(())
    }
}
