//! Everything at once must not take more memory than was allowed.
//!
//! The peak is the kernel's count for the whole process, so it holds what the allocator lost to
//! gaps as well as what the driver asked for.

use super::Suite;
use crate::random::Random;
use crate::steps::Outcome;
use crate::subject::MountOptions;
use crate::volume::{Backing, Volume};
use anyhow::{ensure, Context, Result};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Options of the mount and the most memory that the driver may take then, in MiB. The usual limits
/// hold for all of it. Small ones leave out the program itself: code, stacks, contexts of codecs.
const MOUNTS: [(&str, u64); 2] = [("", 128 + 256), ("cache=32M,dirty=64M", 32 + 64 + 32)];
/// Files of a few hundred bytes to some KiB, made by each thread.
const SMALL_FILES: usize = 10_000;
/// Blocks of one MiB that each thread writes one after the other.
const STREAM_BLOCKS: u64 = 160;
/// Blocks of 4 KiB that each thread overwrites anywhere.
const SCATTERED_BLOCKS: usize = 10_000;
const THREADS: u64 = 4;

/// Works with little memory and with the usual.
///
/// # Errors
/// When the driver took more than it was allowed, or the checker is not content.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let mut peaks = Vec::new();
    for (extra, allowed) in MOUNTS {
        let mut volume = Volume::create(suite.subject, Backing::Loop, 4 << 30)?;
        volume.mount_with(MountOptions { extra, ..MountOptions::default() })?;
        work(volume.dir())?;
        let peak = peak_bytes(volume.server()?)?.div_ceil(MIB);
        volume.unmount()?;
        volume.check()?;
        ensure!(
            peak <= allowed,
            "mounted with '{extra}' the driver took {peak} MiB where {allowed} are allowed"
        );
        peaks.push(format!("{peak} of {allowed} MiB"));
    }
    Ok(Outcome::Passed(peaks.join(", ")))
}

/// The most memory that a process ever had, in bytes.
fn peak_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmHWM")?;
    Ok(kib.parse::<u64>()? * 1024)
}

fn work(dir: &Path) -> Result<()> {
    on_threads(|thread| small_files(dir, thread))?;
    on_threads(|_| walk(dir))?;
    on_threads(|thread| stream(dir, thread))?;
    on_threads(|thread| scatter(dir, thread))?;
    File::open(dir)?.sync_all()?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    on_threads(|thread| read(dir, thread))?;
    // Two remove while two write.
    on_threads(|thread| match thread % 2 {
        0 => Ok(fs::remove_dir_all(dir.join(format!("small-{thread}")))?),
        _ => stream(dir, thread),
    })
}

fn on_threads(work: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || work(thread))).collect();
        all.into_iter().try_for_each(|one| one.join().expect("workers do not panic"))
    })
}

fn small_files(dir: &Path, thread: u64) -> Result<()> {
    let top = dir.join(format!("small-{thread}"));
    let mut bytes = vec![0; 3000];
    let mut random = Random(thread + 1);
    for n in 0..SMALL_FILES {
        let place = top.join(format!("{}", n / 500));
        if n % 500 == 0 {
            fs::create_dir_all(&place)?;
        }
        random.fill(&mut bytes[..64]);
        fs::write(place.join(format!("file-{n}")), &bytes[..random.below(3000)])?;
    }
    Ok(())
}

fn walk(dir: &Path) -> Result<()> {
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            ensure!(entry.metadata()?.size() < u64::MAX, "a file without a size");
            if entry.file_type()?.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok(())
}

/// Writes a file in order; every other one can be compressed.
fn stream(dir: &Path, thread: u64) -> Result<()> {
    let mut block = vec![0; MIB as usize];
    let mut random = Random(thread + 11);
    let file = File::create(dir.join(format!("stream-{thread}")))?;
    for n in 0..STREAM_BLOCKS {
        let filled = if (thread / 2) % 2 == 0 { block.len() } else { block.len() / 4 };
        random.fill(&mut block[..filled]);
        file.write_all_at(&block, n * MIB)?;
    }
    Ok(())
}

fn scatter(dir: &Path, thread: u64) -> Result<()> {
    let mut block = vec![0; 4096];
    let mut random = Random(thread + 21);
    let file = File::options().write(true).open(dir.join(format!("stream-{thread}")))?;
    for _ in 0..SCATTERED_BLOCKS {
        random.fill(&mut block);
        let at = random.below((STREAM_BLOCKS * MIB / 4096) as usize) as u64;
        file.write_all_at(&block, at * 4096)?;
    }
    Ok(())
}

fn read(dir: &Path, thread: u64) -> Result<()> {
    let mut file = File::open(dir.join(format!("stream-{thread}")))?;
    let bytes = std::io::copy(&mut file, &mut std::io::sink())?;
    ensure!(bytes == STREAM_BLOCKS * MIB, "{bytes} bytes of a stream");
    Ok(())
}
