//! Devices come and go under a pool that is in use.
//!
//! On loop devices, through FUSE: while files are written to a mirror, a device is added, one is
//! removed, one is replaced, one is made smaller and larger again, and the server is killed in the
//! middle of a removal, which goes on after the next mount. Every file that was synced must be what
//! was written, and the checker content. Then the same verbs on the pool while it is not mounted.

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
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const DEVICE_BYTES: u64 = 384 << 20;
const FILES: u64 = 40;
const FILES_MAX: u64 = 110;
const FILE_BYTES: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(300);

/// Loop devices, of which some are a pool.
struct Bench<'a> {
    // Dropped in this order.
    mounted: Option<Guard>,
    _attached: Vec<Guard>,
    _mount_point: Guard,
    _scratch: Guard,
    subject: &'a dyn Subject,
    devices: Vec<PathBuf>,
    /// The one that is named to mount the pool.
    source: usize,
    dir: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When something is lost, or a change does not come about.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut bench = Bench::create(suite.subject)?;
    bench.mount()?;
    (0..FILES).try_for_each(|number| bench.write(number))?;
    let written = bench.while_writing(FILES, |bench| {
        bench.cairn(&["device", "add"], &[2])?;
        bench.cairn(&["device", "remove", "--wait"], &[1])?;
        bench.cairn(&["device", "replace", "--wait"], &[2, 3])?;
        bench.cairn(&["device", "add"], &[1])?;
        bench.resize(3, "128M")?;
        bench.resize(3, "max")
    })?;
    ensure!(bench.pool_devices()? == 3, "{} devices instead of 3", bench.pool_devices()?);
    bench.remount()?;
    (0..written).try_for_each(|number| bench.compare(number))?;
    bench.is_refused(&["device", "remove"], 2)?;
    bench.survives_kill()?;
    (0..written).try_for_each(|number| bench.compare(number))?;
    bench.unmount()?;
    bench.check()?;
    // Not mounted: the first is named, whatever it is.
    bench.offline(&["device", "add"], &[2])?;
    bench.offline(&["device", "replace"], &[2, 0])?;
    bench.check()?;
    bench.mount()?;
    (0..written).try_for_each(|number| bench.compare(number))?;
    bench.unmount()?;
    Ok(Outcome::Passed(format!("{written} files as they were")))
}

impl<'a> Bench<'a> {
    fn create(subject: &'a dyn Subject) -> Result<Bench<'a>> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "devices")?;
        let (dir, mount_point) = guard::mount_point()?;
        let (mut devices, mut attached) = (Vec::new(), Vec::new());
        for name in ["a", "b", "c", "d"] {
            let image = scratch.join(name);
            File::create(&image)?.set_len(DEVICE_BYTES)?;
            let (device, guard) = guard::loop_device(&image, false)?;
            devices.push(device);
            attached.push(guard);
        }
        Cmd::new(checkout::binary("mkfs.cairn"))
            .args(["-q", "-f", "--profile", "mirror"])
            .args(&devices[..2])
            .quiet()?;
        Ok(Bench {
            mounted: None,
            _attached: attached,
            _mount_point: mount_point,
            _scratch: removal,
            subject,
            devices,
            source: 0,
            dir,
        })
    }

    fn mount(&mut self) -> Result<()> {
        self.subject.mount(&self.devices[self.source], &self.dir, MountOptions::default())?;
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
        let source = &self.devices[self.source];
        Cmd::new(checkout::binary("fsck.cairn")).args(["-f", "-n"]).arg(source).quiet()
    }

    /// Runs a verb on the pool, with devices after it.
    fn cairn(&self, words: &[&str], devices: &[usize]) -> Result<String> {
        self.verb(words, &self.dir, devices)
    }

    fn offline(&self, words: &[&str], devices: &[usize]) -> Result<String> {
        self.verb(words, &self.devices[self.source], devices)
    }

    fn verb(&self, words: &[&str], pool: &Path, devices: &[usize]) -> Result<String> {
        let devices = devices.iter().map(|index| &self.devices[*index]);
        let command = Cmd::new(checkout::binary("cairn"));
        command.args(words).arg(pool).args(devices).limit(LIMIT).text()
    }

    fn is_refused(&self, words: &[&str], device: usize) -> Result<()> {
        let command = Cmd::new(checkout::binary("cairn")).args(words).arg(&self.dir);
        let output = command.arg(&self.devices[device]).output()?;
        ensure!(output.code == Some(1), "{words:?} was not refused: {}", output.both());
        Ok(())
    }

    fn resize(&self, device: usize, size: &str) -> Result<()> {
        let command = Cmd::new(checkout::binary("cairn")).args(["device", "resize", "--wait"]);
        command.arg(&self.dir).arg(&self.devices[device]).arg(size).limit(LIMIT).quiet()
    }

    fn status(&self) -> Result<Value> {
        let command = Cmd::new(checkout::binary("cairn")).args(["status", "--json"]);
        let text = command.arg(&self.dir).output()?.stdout;
        serde_json::from_str(&text).context("cairn status --json prints JSON")
    }

    fn pool_devices(&self) -> Result<usize> {
        let status = self.status()?;
        Ok(status[0]["devices"].as_array().map_or(0, Vec::len))
    }

    fn content(number: u64) -> Vec<u8> {
        let mut content = vec![0; FILE_BYTES];
        Random(0xdef1 + number).fill(&mut content);
        content
    }

    fn write(&self, number: u64) -> Result<()> {
        Ok(fs::write(self.dir.join(format!("file {number}")), Bench::content(number))?)
    }

    fn compare(&self, number: u64) -> Result<()> {
        let found = fs::read(self.dir.join(format!("file {number}")))?;
        ensure!(found == Bench::content(number), "file {number} is not what was written");
        Ok(())
    }

    /// Carries out `work` while files are written, from a number on; returns the next number.
    fn while_writing<T>(
        &mut self,
        first: u64,
        work: impl FnOnce(&Bench<'_>) -> Result<T> + Send,
    ) -> Result<u64> {
        let stop = AtomicBool::new(false);
        let next = AtomicU64::new(first);
        let bench = &*self;
        std::thread::scope(|scope| -> Result<()> {
            let writer = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::Relaxed) && next.load(Ordering::Relaxed) < FILES_MAX {
                    bench.write(next.load(Ordering::Relaxed))?;
                    next.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            let outcome = work(bench);
            stop.store(true, Ordering::Relaxed);
            let written = writer.join().expect("the writer does not panic");
            outcome.and(written)
        })?;
        Ok(next.into_inner())
    }

    /// A removal goes on after the server was killed in the middle of it.
    fn survives_kill(&mut self) -> Result<()> {
        self.cairn(&["sync"], &[])?;
        self.cairn(&["device", "remove"], &[0])?;
        super::kill::kill_server(&self.devices[0], &self.dir)?;
        guard::unmount_command(&self.dir).limit(LIMIT).quiet()?;
        if let Some(guard) = self.mounted.take() {
            guard.disarm();
        }
        // The first may be gone already.
        self.source = 1;
        self.mount()?;
        self.cairn(&["device", "status", "--wait"], &[])?;
        let status = self.status()?;
        let change = &status[0]["device_change"];
        ensure!(change["state"] == "finished" && change["kind"] == "remove", "{change}");
        ensure!(self.pool_devices()? == 2, "{status}");
        Ok(())
    }
}
