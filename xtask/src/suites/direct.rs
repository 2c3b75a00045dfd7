//! One file, three ways in: ordinary calls, O_DIRECT and a shared mapping.
//!
//! Linux promises that the three agree when they do not overlap in time. A driver that caches where
//! it should not, or not where it should, breaks it; `fsx` does not use O_DIRECT.

use super::Suite;
use crate::random::{Aligned, Random};
use crate::steps::Outcome;
use anyhow::{bail, Context, Result};
use rustix::fs::OFlags;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const SECTOR: usize = 4096;
const SECTORS: usize = 512;

/// Runs random calls and compares after each read.
///
/// # Errors
/// When a read differs; the seed is in the error.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let mut volume = suite.volume()?;
    let (calls, seeds) = if suite.long { (300_000, 10) } else { (4_000, 3) };
    for seed in 1..=seeds {
        let path = volume.dir().join(format!("direct-{seed}"));
        let model = exercise(&path, seed, calls).with_context(|| format!("seed {seed}"))?;
        volume.remount()?;
        if std::fs::read(&path)? != model {
            bail!("seed {seed}: other content after unmounting and mounting");
        }
    }
    volume.finish()?;
    Ok(Outcome::Passed(format!("{seeds} runs of {calls} calls")))
}

fn exercise(path: &Path, seed: u64, calls: u32) -> Result<Vec<u8>> {
    let plain = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    plain.set_len((SECTORS * SECTOR) as u64)?;
    let flag = i32::try_from(OFlags::DIRECT.bits()).context("O_DIRECT fits")?;
    let direct = OpenOptions::new().read(true).write(true).custom_flags(flag).open(path)?;
    let map = Map::of(&plain, SECTORS * SECTOR)?;
    let mut model = vec![0; SECTORS * SECTOR];
    let mut random = Random(seed);
    let mut buffer = Aligned::new(16 * SECTOR)?;
    for call in 0..calls {
        let count = 1 + random.below(16);
        let first = random.below(SECTORS - count + 1);
        let range = first * SECTOR..(first + count) * SECTOR;
        let bytes = &mut buffer.bytes()[..count * SECTOR];
        let at = range.start as u64;
        let way = random.below(8);
        if way < 3 {
            random.fill(bytes);
            model[range].copy_from_slice(bytes);
            match way {
                0 => plain.write_all_at(bytes, at)?,
                1 => direct.write_all_at(bytes, at)?,
                _ => map.write(first * SECTOR, bytes),
            }
            continue;
        }
        let how = match way {
            3 | 4 => {
                plain.read_exact_at(bytes, at)?;
                "read"
            }
            5 | 6 => {
                direct.read_exact_at(bytes, at)?;
                "O_DIRECT read"
            }
            _ => {
                map.read(first * SECTOR, bytes);
                "mapped read"
            }
        };
        if let Some(bad) = bytes.iter().zip(&model[range]).position(|(a, b)| a != b) {
            bail!("call {call}: a {how} of {count} sectors at {at} differs at byte {bad}");
        }
        if random.below(50) == 0 {
            plain.sync_data()?;
        }
    }
    Ok(model)
}

/// A shared mapping of a whole file.
struct Map {
    start: *mut u8,
    bytes: usize,
}

impl Map {
    fn of(file: &File, bytes: usize) -> Result<Map> {
        use rustix::mm::{mmap, MapFlags, ProtFlags};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel picks the address, so no memory in use is replaced.
        let start =
            unsafe { mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        Ok(Map { start: start.cast(), bytes })
    }

    fn write(&self, at: usize, from: &[u8]) {
        assert!(at + from.len() <= self.bytes, "{at}+{} of {}", from.len(), self.bytes);
        // SAFETY: within the mapping, which lives as long as `self`; nothing else of this process
        // touches the file while the copy runs, and `from` is memory of its own.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.start.add(at), from.len()) }
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        assert!(at + into.len() <= self.bytes, "{at}+{} of {}", into.len(), self.bytes);
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.start.add(at), into.as_mut_ptr(), into.len());
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `of` and no reference into it is left.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.cast(), self.bytes) } {
            eprintln!("xtask: cannot unmap: {error}");
        }
    }
}
