//! Scrub of a mirror, next to Btrfs raid1 and to the devices themselves.
//!
//! Each gets the same two loop devices, which are written whole before, and the same stream of
//! noise. What counts is bytes read from both devices: of a mirror, twice what is stored. The floor
//! reads as much of both at once, one after the other on each, in calls of one MiB, several at a
//! time.

use super::report::Metric;
use super::workloads::Scale;
use super::{drop_caches, Contender};
use crate::guard::{self, Guard};
use crate::random::{Aligned, Random};
use crate::run::Cmd;
use crate::subject::{MountOptions, Subject};
use crate::{checkout, need};
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The name of the row, for filters.
pub const NAME: &str = "scrub of a mirror";
/// Transfers that the floor has under way on each device.
const IN_FLIGHT: usize = 4;
const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(600);

/// Two loop devices that have been in use.
pub struct Pair {
    // Dropped in this order.
    _attached: Vec<Guard>,
    _scratch: Guard,
    devices: Vec<PathBuf>,
}

impl Pair {
    /// Makes them large enough for the stream.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(scale: &Scale) -> Result<Pair> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "pair")?;
        let (mut devices, mut attached) = (Vec::new(), Vec::new());
        let part = vec![0xa5; 4 << 20];
        for name in ["left", "right"] {
            let image = scratch.join(name);
            let mut file = File::create(&image)?;
            for _ in 0..device_bytes(scale) / part.len() as u64 {
                file.write_all(&part)?;
            }
            file.sync_all()?;
            let (device, guard) = guard::loop_device(&image, false)?;
            devices.push(device);
            attached.push(guard);
        }
        Ok(Pair { _attached: attached, _scratch: removal, devices })
    }
}

fn device_bytes(scale: &Scale) -> u64 {
    2 * scale.stream_bytes()
}

/// Measures a contender; `None` for one that has no scrub.
///
/// # Errors
/// When it fails.
pub fn measure(
    name: &str,
    contender: &Contender,
    scale: &Scale,
    pair: &Pair,
) -> Result<Option<Metric>> {
    let seconds = match (name, contender) {
        (_, Contender::Device) => read_both(scale, pair)?,
        ("cairn", Contender::Mounted(subject)) => {
            need::release_build()?;
            let format = Cmd::new(checkout::binary("mkfs.cairn")).args(["-q", "-f"]);
            let scrub = Cmd::new(checkout::binary("cairn")).args(["scrub", "start", "--wait"]);
            filled(scale, pair, &**subject, format.args(["--profile", "mirror"]), scrub)?
        }
        ("btrfs", Contender::Mounted(subject)) => {
            let format = Cmd::new("mkfs.btrfs").args(["-q", "-f", "-d", "raid1", "-m", "raid1"]);
            let scrub = Cmd::new("btrfs").args(["scrub", "start", "-B"]);
            filled(scale, pair, &**subject, format, scrub)?
        }
        _ => return Ok(None),
    };
    let mib = (2 * scale.stream_bytes() / MIB) as f64;
    Ok(Some(Metric::rate(NAME, "MiB/s", mib, seconds)))
}

/// Formats, mounts, writes the stream, mounts anew and scrubs; how long the scrub took, in seconds.
fn filled(
    scale: &Scale,
    pair: &Pair,
    subject: &dyn Subject,
    format: Cmd,
    scrub: Cmd,
) -> Result<f64> {
    format.args(&pair.devices).limit(LIMIT).quiet()?;
    let (dir, _mount_point) = guard::mount_point()?;
    let mounted = || -> Result<Guard> {
        subject.mount(&pair.devices[0], &dir, MountOptions::default())?;
        Ok(guard::mounted(&dir))
    };
    let unmount = |guard: Guard| -> Result<()> {
        guard::unmount_command(&dir).limit(LIMIT).quiet()?;
        guard.disarm();
        Ok(())
    };
    let guard = mounted()?;
    let mut memory = Aligned::new(MIB as usize)?;
    Random(0x5eed).fill(memory.bytes());
    let file = File::create(dir.join("file"))?;
    for index in 0..scale.stream_bytes() / MIB {
        memory.bytes()[..8].copy_from_slice(&index.to_le_bytes());
        file.write_all_at(memory.bytes(), index * MIB)?;
    }
    file.sync_all()?;
    drop(file);
    unmount(guard)?;
    let guard = mounted()?;
    drop_caches()?;
    let start = Instant::now();
    scrub.arg(&dir).limit(LIMIT).quiet().context("the scrub")?;
    let seconds = start.elapsed().as_secs_f64();
    unmount(guard)?;
    Ok(seconds)
}

/// Reads as much of both devices as a scrub has to; how long that took, in seconds.
fn read_both(scale: &Scale, pair: &Pair) -> Result<f64> {
    drop_caches()?;
    let start = Instant::now();
    let nexts = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| -> Result<()> {
        let mut readers = Vec::new();
        for (device, next) in pair.devices.iter().zip(&nexts) {
            for _ in 0..IN_FLIGHT {
                readers.push(scope.spawn(move || read_share(device, next, scale.stream_bytes())));
            }
        }
        readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
    })?;
    Ok(start.elapsed().as_secs_f64())
}

fn read_share(device: &Path, next: &AtomicU64, bytes: u64) -> Result<()> {
    let flags = i32::try_from(OFlags::DIRECT.bits())?;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(device)?;
    let mut memory = Aligned::new(MIB as usize)?;
    loop {
        let at = next.fetch_add(MIB, Ordering::Relaxed);
        if at >= bytes {
            return Ok(());
        }
        file.read_exact_at(memory.bytes(), at)?;
    }
}
