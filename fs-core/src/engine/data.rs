//! Writing file data: bytes in range maps become extents.
//!
//! ```text
//! byte runs --cut into windows--> prepared (compressed or not, checksummed; in parallel)
//!           --given addresses, in order--> written in large pieces --> put in the range maps
//! ```
//!
//! Used early, for files that have gathered much in the open group, and by the writer of a group
//! for the rest. No inode lock is held while bytes are compressed or written: a range that changed
//! meanwhile keeps its new bytes, and what was written for it becomes garbage.

use crate::buf::{Buf, Slice};
use crate::codec;
use crate::error::Error;
use crate::format::chunk::ChunkKind;
use crate::format::extent::{plain_bytes_max, Blob, Extent};
use crate::format::inode::{flag, InodeItem};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::format::space::Run;
use crate::pool::{Pool, RunWrite};
use crate::subvol::extents::is_inline;
use crate::subvol::inode::{Inode, State};
use crate::subvol::ranges::ByteRun;
use crate::subvol::store::{DataSettings, Result, Store};
use crate::subvol::Subvol;
use crate::sync::Mutex;
use crate::units::{sector_round, Txg, SECTOR_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Bytes compressed as one blob.
pub const PACK_BYTES: u64 = 128 << 10;
/// Bytes written at once by the writer of a group.
const BATCH_BYTES: u64 = 32 << 20;
/// Compression level when none is chosen. Level 1 gives most of the saving for a third of the time.
const DEFAULT_LEVEL: i32 = 1;

/// Bytes of one file that are to be written. Whoever holds one keeps the bytes in memory.
pub struct Task {
    /// The file's subvolume.
    pub subvol: Arc<Subvol>,
    /// The file.
    pub inode: Arc<Inode>,
    /// Group of the bytes.
    pub txg: Txg,
    /// How to store them.
    pub settings: DataSettings,
    /// The bytes.
    pub run: ByteRun,
}

/// How new data of an inode is stored.
pub fn settings_for(subvol: &Subvol, item: &InodeItem) -> DataSettings {
    let mut settings = subvol.store.settings();
    let above = subvol.settings();
    for (compression, level, checksum) in [
        (above.compression, above.level, above.checksum),
        (item.compression, item.compression_level, item.checksum),
    ] {
        if let Some(kind) = compression.checked_sub(1).and_then(CompressionKind::from_raw) {
            settings.compression = kind;
            settings.level = i32::from(level);
        }
        if let Some(kind) = checksum.checked_sub(1).and_then(ChecksumKind::from_raw) {
            settings.checksum = kind;
        }
    }
    if item.flags & flag::NOCOMPRESS != 0 {
        settings.compression = CompressionKind::None;
    } else if item.flags & flag::COMPRESS != 0 && settings.compression == CompressionKind::None {
        settings.compression = CompressionKind::Zstd;
    }
    if settings.level == 0 {
        settings.level = DEFAULT_LEVEL;
    }
    settings
}

/// The bytes of `state`'s group `txg` that are still in memory and do not stay in the tree.
pub fn tasks(
    subvol: &Arc<Subvol>,
    inode: &Arc<Inode>,
    state: &State,
    txg: Txg,
    whole_windows_only: bool,
) -> Vec<Task> {
    let (item, ranges) = if state.txg == txg {
        (&state.item, &state.ranges)
    } else {
        match state.aside.as_ref().filter(|aside| aside.txg == txg) {
            Some(aside) => (&aside.item, &aside.ranges),
            None => return Vec::new(),
        }
    };
    let settings = settings_for(subvol, item);
    let runs = ranges.byte_runs().into_iter().filter(|run| !is_inline(run.at, run.len, item.size));
    runs.filter(|run| !whole_windows_only || run.len >= PACK_BYTES)
        .map(|run| Task { subvol: subvol.clone(), inode: inode.clone(), txg, settings, run })
        .collect()
}

/// A part of a task that is prepared by itself.
struct Window {
    task: usize,
    at: u64,
    len: u64,
    slices: Vec<Slice>,
    ids: Vec<u64>,
}

/// A window ready to be written.
enum Prepared {
    Plain { checksums: Vec<u8> },
    Packed { data: Slice, stored: u32, checksum: [u8; 32] },
}

/// Writes the bytes of `tasks` and puts the extents in the range maps.
///
/// # Errors
/// [`Error::NoSpace`], [`Error::Memory`], errors of the device. Ranges that were not put keep their
/// bytes.
pub fn write_tasks(store: &Store, mut tasks: Vec<Task>) -> Result<()> {
    let mut batch: Vec<Window> = Vec::new();
    let mut bytes = 0;
    for index in 0..tasks.len() {
        // What a batch has written must not stay in memory for the sake of later ones: writers
        // are let in as soon as it is no longer dirty.
        let cut = windows(index, &mut tasks[index]);
        for window in cut {
            bytes += window.len;
            batch.push(window);
            if bytes >= BATCH_BYTES {
                write_batch(store, &tasks, core::mem::take(&mut batch))?;
                bytes = 0;
            }
        }
    }
    write_batch(store, &tasks, batch)
}

/// Cuts a task's bytes, which leave it, at multiples of the window size in the file, so that
/// rewriting a file in order replaces whole blobs.
fn windows(index: usize, task: &mut Task) -> Vec<Window> {
    let unit = match task.settings.compression {
        CompressionKind::None => plain_bytes_max(task.settings.checksum).min(1 << 20),
        _ => PACK_BYTES,
    };
    let mut out: Vec<Window> = Vec::new();
    let mut at = task.run.at;
    let slices = core::mem::take(&mut task.run.slices);
    for (slice, id) in slices.iter().zip(&task.run.ids) {
        let mut from = 0;
        while from < slice.len() {
            let window_end = (at / unit + 1) * unit;
            let len = (window_end - at).min((slice.len() - from) as u64) as usize;
            let part = slice.part(from, len);
            match out.last_mut() {
                Some(last) if last.at / unit == at / unit => {
                    last.len += len as u64;
                    last.slices.push(part);
                    last.ids.push(*id);
                }
                _ => out.push(Window {
                    task: index,
                    at,
                    len: len as u64,
                    slices: alloc::vec![part],
                    ids: alloc::vec![*id],
                }),
            }
            from += len;
            at += len as u64;
        }
    }
    out
}

fn write_batch(store: &Store, tasks: &[Task], windows: Vec<Window>) -> Result<()> {
    if windows.is_empty() {
        return Ok(());
    }
    // What is compressed stands beside what it was made of until it is written.
    let _buffers = store.dirty.buffer(windows.iter().map(|window| window.len).sum());
    let prepared = prepare_all(store, tasks, &windows)?;
    let txg = tasks[windows[0].task].txg;
    let mut taker = Taker::new(store, txg, total_bytes(&windows, &prepared));
    let mut writes = Vec::new();
    let mut extents: Vec<(usize, u64, Extent)> = Vec::new();
    let mut placed = Ok(());
    for (index, (window, ready)) in windows.iter().zip(&prepared).enumerate() {
        placed = place(&mut taker, tasks, index, window, ready, &mut writes, &mut extents);
        if placed.is_err() {
            break;
        }
    }
    drop(taker);
    let runs: Vec<Run> = writes.iter().map(RunWrite::run).collect();
    if let Err(error) = placed.and_then(|()| store.pool.write(writes)) {
        // The bytes stay where they were; nothing else names what was taken for them.
        store.add_garbage(txg, runs);
        return Err(error);
    }
    for (index, at, extent) in extents {
        put(store, &tasks[windows[index].task], &windows[index], at, &extent);
    }
    Ok(())
}

fn prepare_all(store: &Store, tasks: &[Task], windows: &[Window]) -> Result<Vec<Prepared>> {
    let results: Vec<Mutex<Option<Result<Prepared>>>> =
        windows.iter().map(|_| Mutex::new(None)).collect();
    store.platform.workers.parallel_for(windows.len(), &|index| {
        let settings = tasks[windows[index].task].settings;
        *results[index].lock() = Some(prepare(store, &settings, &windows[index]));
    });
    results
        .into_iter()
        .map(|slot| slot.into_inner().expect("parallel_for calls for every index"))
        .collect()
}

fn prepare(store: &Store, settings: &DataSettings, window: &Window) -> Result<Prepared> {
    let codecs = &*store.platform.codecs;
    if settings.compression != CompressionKind::None && window.len > SECTOR_BYTES {
        let gathered;
        let src: &[u8] = match window.slices.as_slice() {
            [one] => one,
            many => {
                gathered = gather(&store.pool, many, window.len as usize)?;
                &gathered
            }
        };
        let take = |bytes| store.pool.buffer(bytes);
        let packed = codec::compress(codecs, settings.compression, settings.level, src, take);
        if let Some(codec::Compressed { buf, stored }) = packed {
            let checksum = codec::checksum(codecs, settings.checksum, &buf[..stored as usize]);
            return Ok(Prepared::Packed { data: buf.into_slice(), stored, checksum });
        }
    }
    Ok(prepare_plain(store, settings, window))
}

fn prepare_plain(store: &Store, settings: &DataSettings, window: &Window) -> Prepared {
    let codecs = &*store.platform.codecs;
    let width = settings.checksum.bytes();
    let mut checksums = Vec::with_capacity((window.len / SECTOR_BYTES) as usize * width);
    for slice in &window.slices {
        for sector in slice.chunks_exact(SECTOR_BYTES as usize) {
            let sum = codec::checksum(codecs, settings.checksum, sector);
            checksums.extend_from_slice(&sum[..width]);
        }
    }
    Prepared::Plain { checksums }
}

fn gather(pool: &Pool, slices: &[Slice], len: usize) -> Result<Buf> {
    let mut buf = pool.buffer(len)?;
    let mut at = 0;
    for slice in slices {
        buf[at..at + slice.len()].copy_from_slice(slice);
        at += slice.len();
    }
    buf[at..].fill(0);
    Ok(buf)
}

fn total_bytes(windows: &[Window], prepared: &[Prepared]) -> u64 {
    windows
        .iter()
        .zip(prepared)
        .map(|(window, ready)| match ready {
            Prepared::Plain { .. } => window.len,
            Prepared::Packed { stored, .. } => sector_round(u64::from(*stored)),
        })
        .sum()
}

/// Hands out addresses for a batch, following each other as far as free space allows. What is left
/// of a run that was too short for a blob is kept for the rest of the group.
struct Taker<'a> {
    store: &'a Store,
    txg: Txg,
    spare: Vec<Run>,
    /// Bytes of the batch that have no address yet.
    wanted: u64,
}

impl<'a> Taker<'a> {
    fn new(store: &'a Store, txg: Txg, wanted: u64) -> Taker<'a> {
        Taker { store, txg, spare: store.take_spare(txg), wanted }
    }

    /// Up to `bytes`, at least one sector; all of them when `whole`.
    fn take(&mut self, bytes: u64, whole: bool) -> Result<Run> {
        let fits = |run: &Run| !whole || run.bytes >= bytes;
        let run = match self.spare.iter().position(fits) {
            Some(index) => self.spare.swap_remove(index),
            None => self.allocate(bytes, whole)?,
        };
        let used = Run { addr: run.addr, bytes: bytes.min(run.bytes) };
        if used.bytes < run.bytes {
            self.spare.push(Run { addr: used.end(), bytes: run.bytes - used.bytes });
        }
        self.wanted = self.wanted.saturating_sub(used.bytes);
        Ok(used)
    }

    fn allocate(&self, bytes: u64, whole: bool) -> Result<Run> {
        let store = self.store;
        let want = self.wanted.max(bytes);
        let good = if whole { bytes } else { want.min(256 << 10) };
        let least = if whole { bytes } else { SECTOR_BYTES };
        let take = |least| store.space.allocate(ChunkKind::Data, want, least, self.txg, store);
        let run = match take(good) {
            Err(Error::NoSpace) if least < good => take(least),
            other => other,
        }?;
        // At once: whether a further chunk may be made depends on what is still reserved.
        store.spend(self.txg, run.bytes, 0);
        Ok(run)
    }
}

impl Drop for Taker<'_> {
    fn drop(&mut self) {
        self.store.keep_spare(self.txg, core::mem::take(&mut self.spare));
    }
}

/// Gives a window its addresses.
fn place(
    taker: &mut Taker<'_>,
    tasks: &[Task],
    index: usize,
    window: &Window,
    ready: &Prepared,
    writes: &mut Vec<RunWrite>,
    extents: &mut Vec<(usize, u64, Extent)>,
) -> Result<()> {
    let settings = tasks[window.task].settings;
    match ready {
        Prepared::Packed { data, stored, checksum } => {
            let run = match taker.take(data.len() as u64, true) {
                // Room is there, but in pieces: sectors fit anywhere.
                Err(Error::NoSpace) => {
                    let plain = prepare_plain(taker.store, &settings, window);
                    return place(taker, tasks, index, window, &plain, writes, extents);
                }
                run => run?,
            };
            writes.push(RunWrite { addr: run.addr, bufs: alloc::vec![data.clone()] });
            let blob = Blob {
                addr: run.addr,
                stored: *stored,
                logical: window.len as u32,
                compression: settings.compression,
                checksum_kind: settings.checksum,
                checksum: *checksum,
            };
            let extent = Extent::Packed { blob, offset: 0, len: window.len };
            extents.push((index, window.at, extent));
        }
        Prepared::Plain { checksums } => {
            let width = settings.checksum.bytes();
            let mut from = 0;
            while from < window.len {
                let run = taker.take(window.len - from, false)?;
                writes
                    .push(RunWrite { addr: run.addr, bufs: cut(&window.slices, from, run.bytes) });
                let first = (from / SECTOR_BYTES) as usize * width;
                let count = (run.bytes / SECTOR_BYTES) as usize * width;
                let extent = Extent::Plain {
                    addr: run.addr,
                    len: run.bytes,
                    checksum_kind: settings.checksum,
                    checksums: checksums[first..first + count].to_vec(),
                };
                extents.push((index, window.at + from, extent));
                from += run.bytes;
            }
        }
    }
    Ok(())
}

/// The part `from..from + len` of slices that follow each other.
fn cut(slices: &[Slice], from: u64, len: u64) -> Vec<Slice> {
    let (mut skip, mut left) = (from as usize, len as usize);
    let mut out = Vec::new();
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
            continue;
        }
        let take = left.min(slice.len() - skip);
        if take == 0 {
            break;
        }
        out.push(slice.part(skip, take));
        left -= take;
        skip = 0;
    }
    out
}

/// Puts an extent where its bytes still are.
fn put(store: &Store, task: &Task, window: &Window, at: u64, extent: &Extent) {
    let mut garbage = Vec::new();
    {
        let mut state = task.inode.state.write();
        match state.ranges_of(task.txg) {
            Some(ranges) => {
                let before = ranges.memory();
                ranges.written(at, extent, &window.ids, &mut garbage);
                store.dirty.adjust(before, ranges.memory());
            }
            None => garbage.extend(run_of(extent)),
        }
    }
    store.add_garbage(task.txg, garbage);
}

/// The run an extent names.
pub fn run_of(extent: &Extent) -> Option<Run> {
    match extent {
        Extent::Plain { addr, len, .. } => Some(Run { addr: *addr, bytes: *len }),
        Extent::Packed { blob, .. } => Some(Run { addr: blob.addr, bytes: blob.allocated() }),
        _ => None,
    }
}
