//! Scrub of a mirror, next to Btrfs raid1 and to the devices themselves.
//!
//! What counts is bytes read from both devices: of a mirror, twice what is stored. The floor
//! reads as much of both at once, one after the other on each, in calls of one MiB, several at a
//! time.

use super::mirror::{Mirror, Pair, LIMIT};
use super::report::Metric;
use super::workloads::Scale;
use super::{drop_caches, Contender};
use crate::checkout;
use crate::random::Aligned;
use crate::run::Cmd;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The name of the row, for filters.
pub const NAME: &str = "scrub of a mirror";
/// Transfers that the floor has under way on each device.
const IN_FLIGHT: usize = 4;
const MIB: u64 = 1 << 20;

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
    let seconds = match contender {
        Contender::Device => read_both(scale, pair)?,
        _ => match Mirror::of(name, contender, pair)? {
            Some(mirror) => scrub(scale, &mirror)?,
            None => return Ok(None),
        },
    };
    let mib = (2 * scale.stream_bytes() / MIB) as f64;
    Ok(Some(Metric::rate(NAME, "MiB/s", mib, seconds)))
}

/// How long a scrub of the stream takes, in seconds.
fn scrub(scale: &Scale, mirror: &Mirror<'_>) -> Result<f64> {
    mirror.filled(2, scale.stream_bytes())?;
    let scrub = match mirror.is_cairn() {
        true => Cmd::new(checkout::binary("cairn")).args(["scrub", "start", "--wait"]),
        false => Cmd::new("btrfs").args(["scrub", "start", "-B"]),
    };
    mirror.mounted(|place| {
        drop_caches()?;
        let start = Instant::now();
        scrub.arg(&place.path).limit(LIMIT).quiet().context("the scrub")?;
        Ok(start.elapsed().as_secs_f64())
    })
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
