//! File data against its checksums, every copy.
//!
//! Runs are gathered and read together, in order of their place on the device; what was read is
//! verified by all workers. A transfer that fails is repeated sector by sector, so that one bad
//! sector costs one sector.

use super::blocks::{is_complete, places, read_copy, read_place};
use super::findings::rules;
use super::{push, Checker, Pass, Spot};
use crate::buf::Buf;
use crate::codec;
use crate::error::Error;
use crate::format::extent::Blob;
use crate::format::ptr::ChecksumKind;
use crate::format::space::Run;
use crate::platform::{ReadOp, Result};
use crate::pool::{DataRead, DataSource, Piece, Pool};
use crate::sync::Mutex;
use crate::units::{Logical, Physical, SECTOR_BYTES};
use alloc::format;
use alloc::vec::Vec;

const SECTOR: usize = SECTOR_BYTES as usize;
/// Bytes gathered before they are read.
const BATCH_BYTES: u64 = 8 << 20;

/// What vouches for data.
pub(super) enum Proof {
    /// A checksum for each sector.
    Sectors { kind: ChecksumKind, sums: Vec<u8> },
    /// One for the blob, which must expand.
    Blob(Blob),
}

/// Data to verify.
pub(super) struct Job {
    /// The file.
    pub spot: Spot,
    /// Where in the file.
    pub at: u64,
    pub run: Run,
    pub proof: Proof,
}

/// Data that waits to be verified.
#[derive(Default)]
pub(super) struct DataQueue {
    jobs: Vec<Job>,
    bytes: u64,
}

/// A piece of one copy of one job's data.
struct Copy {
    job: usize,
    /// Which copy.
    copy: usize,
    /// First sector of the piece in the run.
    from: usize,
    bytes: u64,
    device: u16,
    at: Physical,
    /// Nothing can be said of it: its device need not have it.
    is_unknown: bool,
    /// Bad sectors, or all of them (one number) for a bad blob.
    bad: Vec<usize>,
}

/// Adds data to verify; verifies what has gathered when it is much.
///
/// # Errors
/// [`Error::Memory`] and the like.
pub(super) fn queue(checker: &mut Checker<'_>, job: Job) -> Result<()> {
    checker.queue.bytes += job.run.bytes;
    push(&mut checker.queue.jobs, job)?;
    if checker.queue.bytes >= BATCH_BYTES {
        flush(checker)?;
    }
    Ok(())
}

/// Verifies everything that waits.
///
/// # Errors
/// [`Error::Memory`] and the like.
#[inline(never)]
pub(super) fn flush(checker: &mut Checker<'_>) -> Result<()> {
    let DataQueue { jobs, bytes } = core::mem::take(&mut checker.queue);
    if jobs.is_empty() {
        return Ok(());
    }
    let copies = verify(checker.pool, &jobs)?;
    let mut rest = copies.as_slice();
    while let Some(first) = rest.first() {
        let count = rest.iter().take_while(|copy| copy.job == first.job).count();
        let (of_job, others) = rest.split_at(count);
        report(checker, &jobs[first.job], of_job)?;
        rest = others;
    }
    checker.stats.data_bytes += bytes;
    checker.step(Pass::Trees, bytes)
}

/// Reads and verifies all copies; they come back by job.
fn verify(pool: &Pool, jobs: &[Job]) -> Result<Vec<Copy>> {
    let mut all: Vec<Copy> = Vec::new();
    let mut done: Vec<Copy> = Vec::new();
    for (job, what) in jobs.iter().enumerate() {
        let pieces = pool.pieces(what.run)?;
        if let (Proof::Blob(blob), true) = (&what.proof, pieces.len() > 1) {
            verify_in_pieces(pool, job, blob, &pieces, &mut done)?;
            continue;
        }
        let mut from = 0;
        for piece in pieces {
            let sectors = piece.bytes as usize / SECTOR;
            for (copy, (device, at)) in piece.copies.into_iter().enumerate() {
                let bytes = piece.bytes;
                let is_unknown = !is_complete(pool, device);
                let mut piece =
                    Copy { job, copy, from, bytes, device, at, is_unknown, bad: Vec::new() };
                if is_unknown {
                    piece.bad = match what.proof {
                        Proof::Sectors { .. } => (from..from + sectors).collect(),
                        Proof::Blob(_) => alloc::vec![0],
                    };
                    push(&mut done, piece)?;
                } else {
                    push(&mut all, piece)?;
                }
            }
            from += sectors;
        }
    }
    // By cached keys, because sorting what is as large takes more stack than a kernel has.
    all.sort_by_cached_key(|copy| (copy.device, copy.at));
    while !all.is_empty() {
        let device = all[0].device;
        let count = all.iter().take_while(|copy| copy.device == device).count();
        let rest = all.split_off(count);
        done.extend(verify_on(pool, jobs, device, all)?);
        all = rest;
    }
    done.sort_by_cached_key(|copy| (copy.job, copy.copy, copy.from));
    Ok(done)
}

/// Verifies a blob that is cut over several devices.
fn verify_in_pieces(
    pool: &Pool,
    job: usize,
    blob: &Blob,
    pieces: &[Piece],
    done: &mut Vec<Copy>,
) -> Result<()> {
    let bytes = blob.allocated();
    let mut is_anywhere = false;
    for (copy, (device, at)) in places(pool, pieces) {
        let good = match read_copy(pool, pieces, copy) {
            Ok(buf) => is_good(pool, blob, &buf)?,
            Err(Error::Memory) => return Err(Error::Memory),
            Err(_) => false,
        };
        is_anywhere |= good;
        let bad = if good { Vec::new() } else { alloc::vec![0] };
        push(done, Copy { job, copy, from: 0, bytes, device, at, is_unknown: false, bad })?;
    }
    if !is_anywhere {
        // Pieces of different copies may make a whole one.
        let mut reads = [DataRead::new(DataSource::Packed { blob: *blob })];
        pool.read_data(&mut reads);
        let (device, at) = (0, Physical(0));
        let (copy, is_unknown) = (usize::MAX, true);
        match reads[0].result {
            Err(Error::Memory) => return Err(Error::Memory),
            Err(_) => {}
            Ok(()) => {
                let bad = Vec::new();
                push(done, Copy { job, copy, from: 0, bytes, device, at, is_unknown, bad })?;
            }
        }
    }
    Ok(())
}

/// Reads copies that are on one device together, then verifies them.
fn verify_on(pool: &Pool, jobs: &[Job], device: u16, copies: Vec<Copy>) -> Result<Vec<Copy>> {
    let mut batch = Vec::new();
    for copy in &copies {
        let buf = pool.buffer(copy.bytes as usize)?;
        push(&mut batch, ReadOp { at: copy.at, buf, result: Ok(()) })?;
    }
    if let Some(member) = pool.members().get(usize::from(device)) {
        member.read(&mut batch);
    }
    // Each slot is taken by one worker; the lock only makes that visible to the compiler.
    let slots: Vec<Mutex<(Copy, ReadOp, Result<()>)>> =
        copies.into_iter().zip(batch).map(|(c, op)| Mutex::new((c, op, Ok(())))).collect();
    pool.platform().workers.parallel_for(slots.len(), &|index| {
        let (copy, op, result) = &mut *slots[index].lock();
        *result = judge(pool, &jobs[copy.job], copy, op);
    });
    let finished = slots.into_iter().map(|slot| {
        let (copy, _, result) = slot.into_inner();
        result.map(|()| copy)
    });
    finished.collect()
}

/// Notes which sectors of a copy are bad.
fn judge(pool: &Pool, job: &Job, copy: &mut Copy, op: &mut ReadOp) -> Result<()> {
    let codecs = &*pool.platform().codecs;
    let unreadable = match op.result {
        Ok(()) => Vec::new(),
        Err(_) => read_singly(pool, copy, &mut op.buf)?,
    };
    copy.bad = match &job.proof {
        Proof::Sectors { kind, sums } => {
            let each = kind.bytes();
            let count = op.buf.len() / SECTOR;
            let sums = &sums[copy.from * each..(copy.from + count) * each];
            codec::bad_sectors(codecs, *kind, &op.buf, sums).collect()
        }
        Proof::Blob(_) if !unreadable.is_empty() => alloc::vec![0],
        Proof::Blob(blob) if is_good(pool, blob, &op.buf)? => Vec::new(),
        Proof::Blob(_) => alloc::vec![0],
    };
    if matches!(job.proof, Proof::Sectors { .. }) {
        copy.bad.extend(unreadable);
        copy.bad.sort_unstable();
        copy.bad.dedup();
        copy.bad.iter_mut().for_each(|sector| *sector += copy.from);
    }
    Ok(())
}

fn is_good(pool: &Pool, blob: &Blob, bytes: &[u8]) -> Result<bool> {
    let codecs = &*pool.platform().codecs;
    let stored = &bytes[..blob.stored as usize];
    if !codec::matches(codecs, blob.checksum_kind, stored, &blob.checksum) {
        return Ok(false);
    }
    let take = |bytes| pool.buffer(bytes);
    match codec::expand(codecs, blob.compression, stored, blob.logical, blob.addr, take) {
        Ok(_) => Ok(true),
        Err(Error::Memory) => Err(Error::Memory),
        Err(_) => Ok(false),
    }
}

/// Reads a copy sector by sector; returns the sectors that cannot be read.
fn read_singly(pool: &Pool, copy: &Copy, buf: &mut Buf) -> Result<Vec<usize>> {
    let mut unreadable = Vec::new();
    for index in 0..copy.bytes as usize / SECTOR {
        let at = Physical(copy.at.0 + (index * SECTOR) as u64);
        match read_place(pool, copy.device, at, SECTOR_BYTES) {
            Ok(sector) => buf[index * SECTOR..][..SECTOR].copy_from_slice(&sector),
            Err(Error::Memory) => return Err(Error::Memory),
            Err(_) => push(&mut unreadable, index)?,
        }
    }
    Ok(unreadable)
}

/// Reports what is lost in all copies of a job, or else copies that are bad.
fn report(checker: &mut Checker<'_>, job: &Job, copies: &[Copy]) -> Result<()> {
    let whole: Vec<&[Copy]> = copies.chunk_by(|a, b| a.copy == b.copy).collect();
    let Some(first) = whole.first() else { return Ok(()) };
    let is_bad = |pieces: &[Copy], sector: &usize| {
        pieces.iter().any(|piece| piece.bad.binary_search(sector).is_ok())
    };
    let suspects = first.iter().flat_map(|piece| &piece.bad);
    let lost: Vec<usize> = suspects
        .filter(|sector| whole.iter().all(|pieces| is_bad(pieces, sector)))
        .copied()
        .collect();
    let skipped = |sector: usize| (sector * SECTOR) as u64;
    if let Some(sector) = lost.first().copied() {
        let (count, what) = match job.proof {
            Proof::Sectors { .. } => (lost.len() * SECTOR, "bytes"),
            Proof::Blob(blob) => (blob.logical as usize, "compressed bytes"),
        };
        let offset = job.at.saturating_add(skipped(sector));
        let detail = format!("{count} {what} from byte {offset} on");
        let spot = job.spot.clone().at(Logical(job.run.addr.0 + skipped(sector)));
        let sum_of = |sector: usize| match &job.proof {
            Proof::Sectors { kind, sums } => codec::sector_sum(*kind, sums, sector),
            Proof::Blob(blob) => &blob.checksum[..],
        };
        let at = |sector: usize| Logical(job.run.addr.0 + skipped(sector));
        let places = &mut lost.iter().map(|sector| (at(*sector), sum_of(*sector)));
        return checker.report_missing(&rules::DATA, spot, detail, places);
    }
    for copy in copies.iter().filter(|copy| !copy.is_unknown) {
        let Some(sector) = copy.bad.first().copied() else { continue };
        let bytes = match job.proof {
            Proof::Sectors { .. } => skipped(copy.bad.len()),
            Proof::Blob(_) => job.run.bytes,
        };
        let at = Physical(copy.at.0 + skipped(sector - copy.from));
        let addr = Logical(job.run.addr.0 + skipped(sector));
        let spot = job.spot.clone().at(addr).copy(copy.device, at);
        checker.findings.add(&rules::DATA_COPY, spot, format!("{bytes} bytes of it"));
    }
    Ok(())
}
