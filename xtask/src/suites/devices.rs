//! Devices come and go under a pool that is in use.
//!
//! On loop devices, through FUSE: while files are written to a mirror, a device is added, one is
//! removed, one is replaced, one is made smaller and larger again, and the server is killed in the
//! middle of a removal, which goes on after the next mount. Every file that was synced must be what
//! was written, and the checker content. Then the same verbs on the pool while it is not mounted.

use super::loops::{Loops, Shape, LIMIT};
use super::Suite;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::ops::{Deref, DerefMut};
use std::path::Path;

const FILES: u64 = 40;
const FILES_MAX: u64 = 110;

const SHAPE: Shape =
    Shape { name: "devices", devices: 4, device_bytes: 384 << 20, file_bytes: 1 << 20 };

/// Loop devices, of which some are a pool.
struct Bench<'a>(Loops<'a>);

impl<'a> Deref for Bench<'a> {
    type Target = Loops<'a>;

    fn deref(&self) -> &Loops<'a> {
        &self.0
    }
}

impl DerefMut for Bench<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// Runs it.
///
/// # Errors
/// When something is lost, or a change does not come about.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut bench = Bench(Loops::create(suite.subject, &SHAPE)?);
    bench.mount()?;
    (0..FILES).try_for_each(|number| bench.write(number))?;
    let ((), written) = bench.while_writing(FILES..FILES_MAX, || {
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

impl Bench<'_> {
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

    /// A removal goes on after the server was killed in the middle of it.
    fn survives_kill(&mut self) -> Result<()> {
        self.cairn(&["sync"], &[])?;
        self.cairn(&["device", "remove"], &[0])?;
        super::kill::kill_server(&self.devices[0], &self.dir)?;
        self.unmount()?;
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
