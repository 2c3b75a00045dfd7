//! Verified reads, and healing of bad copies.
//!
//! A read tries copies in order until one has the content that the pointer's checksum vouches for.
//! When a later copy had to serve, the bad ones before it are *healed*: the good content is written
//! over them, an incident is reported, and the device's error counter goes up. When no copy is
//! good, the read fails, and the loss is reported once.
//!
//! Metadata blocks and packed blobs are verified as a whole. Plain data has a checksum for each
//! sector and is healed by the sector, so that two copies with damage in different places are still
//! one good one.
//!
//! Healing is the only write to a place that is in use. It is safe because
//!
//! - what it writes has just been verified against the same checksum;
//! - what it writes over was found bad, and is read again under the `heal` lock, so that two
//!   readers of one bad block repair and report it once;
//! - whoever reads holds a view of the tree that names the block, and blocks are not used for
//!   something else while a view names them.
//!
//! A batch ([`Pool::read_data`]) first hands all transfers to the devices, then verifies and
//! expands on all workers; only what failed goes the slow way, one by one.

use super::map::{ChunkMap, Place};
use super::Pool;
use crate::buf::Buf;
use crate::codec;
use crate::error::{Error, Incident};
use crate::format::extent::Blob;
use crate::format::ptr::{BlockPtr, ChecksumKind, CompressionKind};
use crate::format::space::Run;
use crate::platform::{ReadOp, Result};
use crate::sync::Mutex;
use crate::units::{sector_round, Logical, SECTOR_BYTES};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

const SECTOR: usize = SECTOR_BYTES as usize;

/// One verified read of file data.
#[derive(Debug)]
pub struct DataRead {
    /// What to read.
    pub source: DataSource,
    /// The bytes, expanded, when `result` is `Ok`.
    pub buf: Buf,
    /// How it went.
    pub result: Result<()>,
}

/// What a [`DataRead`] reads.
#[derive(Clone, Debug)]
pub enum DataSource {
    /// Sectors that are stored as they are.
    Plain {
        /// Where they are.
        addr: Logical,
        /// How many bytes; a multiple of the sector size.
        len: u64,
        /// Kind of the checksums.
        checksum_kind: ChecksumKind,
        /// A checksum for each sector.
        checksums: Vec<u8>,
    },
    /// A whole blob.
    Packed {
        /// The blob.
        blob: Blob,
    },
}

impl DataRead {
    /// A read that has not been carried out.
    pub fn new(source: DataSource) -> DataRead {
        DataRead { source, buf: Buf::default(), result: Ok(()) }
    }
}

impl DataSource {
    /// The run that is read.
    pub fn run(&self) -> Run {
        match self {
            DataSource::Plain { addr, len, .. } => Run { addr: *addr, bytes: *len },
            DataSource::Packed { blob } => Run { addr: blob.addr, bytes: blob.allocated() },
        }
    }

    /// Bytes that verifying and expanding costs about as much as hashing.
    fn work(&self) -> u64 {
        match self {
            DataSource::Plain { len, checksum_kind, .. } => match checksum_kind {
                ChecksumKind::None => 0,
                // About an order of magnitude faster than BLAKE3 and zstd.
                ChecksumKind::Crc32c => len / 8,
                ChecksumKind::Blake3 => *len,
            },
            DataSource::Packed { blob } => u64::from(blob.logical),
        }
    }
}

/// From this much work on, waking other threads costs less than it saves.
const PARALLEL_WORK_MIN: u64 = 256 << 10;
/// Sectors read in one batch while sectors are rescued one by one: bounds memory.
const RESCUE_BATCH: usize = 256;

/// What vouches for a block that is verified as a whole.
struct Seal<'a> {
    kind: ChecksumKind,
    sum: &'a [u8; 32],
    stored: usize,
}

/// Places that were reported, so that an administrator reads of each once.
#[derive(Default)]
pub(super) struct Reported {
    /// Address and copy (`u16::MAX` for a loss), with the start of the checksum: another block at
    /// the same address is another place.
    places: BTreeSet<(Logical, u16, u64)>,
}

/// Beyond this, places are forgotten, and may be reported again.
const REPORTED_MAX: usize = 4096;

impl Reported {
    fn is_new(&mut self, addr: Logical, copy: u16, sum: &[u8]) -> bool {
        if self.places.len() >= REPORTED_MAX {
            self.places.clear();
        }
        let mut start = [0; 8];
        let len = sum.len().min(8);
        start[..len].copy_from_slice(&sum[..len]);
        self.places.insert((addr, copy, u64::from_le_bytes(start)))
    }
}

impl Pool {
    /// Reads a metadata block, verified and expanded to `ptr.logical` bytes, zero-padded to whole
    /// sectors. Bad copies are healed from a good one.
    ///
    /// # Errors
    /// [`Error::Checksum`] or [`Error::Device`] when no copy is good; [`Error::Unmapped`];
    /// [`Error::Corrupt`] when the content is what was written but does not expand;
    /// [`Error::Memory`].
    pub fn read_block(&self, ptr: &BlockPtr) -> Result<Buf> {
        let place = self.locate(Run { addr: ptr.addr, bytes: ptr.allocated() })?;
        let first = self.read_copy(&place, 0);
        self.open_block(ptr, (place, first))
    }

    /// Reads metadata blocks together: each as [`Pool::read_block`] does.
    pub fn read_blocks(&self, ptrs: &[BlockPtr]) -> Vec<Result<Buf>> {
        let run = |ptr: &BlockPtr| Run { addr: ptr.addr, bytes: ptr.allocated() };
        let raw = self.read_first_copies(&self.chunk_map(), ptrs.iter().map(run));
        ptrs.iter()
            .zip(raw)
            .map(|(ptr, raw)| raw.and_then(|raw| self.open_block(ptr, raw)))
            .collect()
    }

    /// The content of a block, of which the first copy has been read.
    fn open_block(&self, ptr: &BlockPtr, (place, first): (Place, Result<Buf>)) -> Result<Buf> {
        let seal =
            Seal { kind: ChecksumKind::Blake3, sum: &ptr.checksum, stored: ptr.stored as usize };
        let buf = self.read_whole(&place, &seal, first)?;
        self.unpack(buf, ptr.compression, ptr.stored, ptr.logical, ptr.addr)
    }

    /// Reads a run without verifying it: the bytes of the first copy from `copy` on that can be
    /// read. For content that verifies itself, as log frames do; when they do not, try the next
    /// copy, up to [`Pool::copies_at`].
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::Unmapped`], [`Error::Memory`]; [`Error::Checksum`] when there is
    /// no such copy.
    pub fn read_run(&self, run: Run, copy: usize) -> Result<Buf> {
        let place = self.locate(run)?;
        let mut outcome = Err(Error::Checksum { addr: run.addr, bytes: run.bytes });
        for copy in copy..place.copies() {
            outcome = self.read_copy(&place, copy);
            if matches!(outcome, Ok(_) | Err(Error::Memory)) {
                break;
            }
        }
        outcome
    }

    /// Carries out a batch of data reads together. Each has its own result.
    pub fn read_data(&self, reads: &mut [DataRead]) {
        let map = self.chunk_map();
        let raw = self.read_first_copies(&map, reads.iter().map(|read| read.source.run()));
        let work: u64 = reads.iter().map(|read| read.source.work()).sum();
        let workers = &self.platform().workers;
        if reads.len() < 2 || work < PARALLEL_WORK_MIN || workers.parallelism() < 2 {
            for (read, raw) in reads.iter_mut().zip(raw) {
                self.finish(read, raw);
            }
            return;
        }
        // Each slot is taken by exactly one worker; the lock only makes that visible to the
        // compiler.
        let slots: Vec<Mutex<Option<(&mut DataRead, Raw)>>> =
            reads.iter_mut().zip(raw).map(|pair| Mutex::new(Some(pair))).collect();
        workers.parallel_for(slots.len(), &|index| {
            let taken = slots[index].lock().take();
            if let Some((read, raw)) = taken {
                self.finish(read, raw);
            }
        });
    }

    /// Reads the first copy of every run, all of them together.
    fn read_first_copies(&self, map: &ChunkMap, runs: impl Iterator<Item = Run>) -> Vec<Raw> {
        let mut transfer = Transfer::new(self.members().len());
        let mut planned = Vec::new();
        for run in runs {
            let place = map.locate(run);
            planned.push(place.and_then(|place| {
                let parts = transfer.add(&place, 0)?;
                Ok((place, parts))
            }));
        }
        transfer.run(self);
        let finish = |plan: Result<(Place, Parts)>| {
            plan.map(|(place, parts)| {
                let bytes = transfer.assemble(self, &place, parts);
                (place, bytes)
            })
        };
        planned.into_iter().map(finish).collect()
    }

    /// Verifies and expands what was read, falling back to other copies.
    fn finish(&self, read: &mut DataRead, raw: Raw) {
        let outcome = raw.and_then(|(place, first)| match &read.source {
            DataSource::Plain { checksum_kind, checksums, .. } => {
                self.read_sectors(&place, *checksum_kind, checksums, first)
            }
            DataSource::Packed { blob } => {
                let stored = blob.stored as usize;
                let seal = Seal { kind: blob.checksum_kind, sum: &blob.checksum, stored };
                let buf = self.read_whole(&place, &seal, first)?;
                self.unpack(buf, blob.compression, blob.stored, blob.logical, blob.addr)
            }
        });
        match outcome {
            Ok(buf) => (read.buf, read.result) = (buf, Ok(())),
            Err(error) => (read.buf, read.result) = (Buf::default(), Err(error)),
        }
    }

    /// Reads one copy as it is.
    fn read_copy(&self, place: &Place, copy: usize) -> Result<Buf> {
        let mut transfer = Transfer::new(self.members().len());
        let parts = transfer.add(place, copy)?;
        transfer.run(self);
        transfer.assemble(self, place, parts)
    }

    /// The content of a block that is verified as a whole; `first` is what copy 0 gave.
    fn read_whole(&self, place: &Place, seal: &Seal<'_>, first: Result<Buf>) -> Result<Buf> {
        let codecs = &*self.platform().codecs;
        let good = |bytes: &[u8]| {
            bytes.len() >= seal.stored
                && codec::matches(codecs, seal.kind, &bytes[..seal.stored], seal.sum)
        };
        let mut attempt = first;
        let mut last = Error::Checksum { addr: place.addr(), bytes: place.bytes };
        for copy in 0..place.copies() {
            if copy > 0 {
                attempt = self.read_copy(place, copy);
            }
            match attempt {
                Err(Error::Memory) => return Err(Error::Memory),
                Ok(buf) if good(&buf) => {
                    for bad in 0..copy {
                        self.heal(place, bad, &buf, &seal.sum[..], &good);
                    }
                    return Ok(buf);
                }
                Ok(_) => {
                    self.count_checksum_error(place, copy);
                    last = Error::Checksum { addr: place.addr(), bytes: place.bytes };
                }
                Err(error) => last = error,
            }
            attempt = Err(Error::Failed);
        }
        Err(self.lost(place, seal.sum, last))
    }

    /// The content of plain sectors; `first` is what copy 0 gave.
    fn read_sectors(
        &self,
        place: &Place,
        kind: ChecksumKind,
        sums: &[u8],
        first: Result<Buf>,
    ) -> Result<Buf> {
        let codecs = &*self.platform().codecs;
        match first {
            Ok(buf) => {
                let bad: Vec<usize> = codec::bad_sectors(codecs, kind, &buf, sums).collect();
                if bad.is_empty() {
                    return Ok(buf);
                }
                for sector in &bad {
                    self.count_checksum_error(&sector_of(place, *sector), 0);
                }
                let last = Error::Checksum { addr: place.addr(), bytes: SECTOR_BYTES };
                Rescue { pool: self, place, kind, sums, buf, last }.run(bad, 1)
            }
            Err(Error::Memory) => Err(Error::Memory),
            // One unreadable sector fails the whole transfer: begin with the same copy again,
            // sector by sector.
            Err(last) => {
                let buf = Buf::zeroed(place.bytes as usize)?;
                let all = (0..place.bytes as usize / SECTOR).collect();
                Rescue { pool: self, place, kind, sums, buf, last }.run(all, 0)
            }
        }
    }

    /// Expands verified bytes.
    fn unpack(
        &self,
        mut buf: Buf,
        kind: CompressionKind,
        stored: u32,
        logical: u32,
        addr: Logical,
    ) -> Result<Buf> {
        let stored = stored as usize;
        if kind == CompressionKind::None && stored == logical as usize {
            // What follows the content on disk is not vouched for.
            buf[stored..].fill(0);
            return Ok(buf);
        }
        codec::expand(&*self.platform().codecs, kind, &buf[..stored], logical, addr)
    }

    /// Writes `content` over a bad copy, unless someone else has healed it since it was read.
    pub(super) fn heal(
        &self,
        place: &Place,
        copy: usize,
        content: &[u8],
        sum: &[u8],
        good: &dyn Fn(&[u8]) -> bool,
    ) {
        let _one_at_a_time = self.heal.lock();
        if self.read_copy(place, copy).is_ok_and(|buf| good(&buf)) {
            return;
        }
        let rewritten = !self.read_only() && self.rewrite(place, copy, content).is_ok();
        let number = u16::try_from(copy).unwrap_or(u16::MAX);
        // What was repaired and breaks again is news; what cannot be repaired is not.
        if rewritten || self.reported.lock().is_new(place.addr(), number, sum) {
            let segment = place.first_segment(copy);
            self.platform().report.incident(&Incident::Healed {
                addr: place.addr(),
                device: segment.device,
                at: segment.at,
                rewritten,
            });
        }
    }

    fn rewrite(&self, place: &Place, copy: usize, content: &[u8]) -> Result<()> {
        let slice = Buf::copy_of(content)?.into_slice();
        self.write_copy(place, copy, slice)
    }

    /// Reports that no copy is good, and passes the error on.
    fn lost(&self, place: &Place, sum: &[u8], error: Error) -> Error {
        let is_new = self.reported.lock().is_new(place.addr(), u16::MAX, sum);
        if is_new {
            self.platform().report.incident(&Incident::Lost {
                addr: place.addr(),
                bytes: place.bytes,
                error: error.clone(),
            });
        }
        error
    }

    fn count_checksum_error(&self, place: &Place, copy: usize) {
        self.member(place.first_segment(copy).device).count_checksum_error();
    }
}

/// A place and what its first copy gave, or why there is no place.
type Raw = Result<(Place, Result<Buf>)>;

fn sector_of(place: &Place, index: usize) -> Place {
    place.part((index * SECTOR) as u64, SECTOR_BYTES)
}

/// Gets the sectors of one plain read that its first transfer did not give.
struct Rescue<'a> {
    pool: &'a Pool,
    place: &'a Place,
    kind: ChecksumKind,
    sums: &'a [u8],
    /// What is good so far.
    buf: Buf,
    /// Why the last sector that failed did.
    last: Error,
}

impl Rescue<'_> {
    /// Looks for `missing` in the copies from `copy` on, then heals the copies that lacked them.
    fn run(mut self, mut missing: Vec<usize>, copy: usize) -> Result<Buf> {
        // Sectors that each copy lacked, beginning with copy 0.
        let mut lacking = Vec::new();
        if copy > 0 {
            lacking.push(missing.clone());
        }
        for copy in copy..self.place.copies() {
            if missing.is_empty() {
                break;
            }
            missing = self.try_copy(&missing, copy)?;
            lacking.push(missing.clone());
        }
        for (copy, sectors) in lacking.iter().enumerate() {
            self.heal_runs(copy, sectors, &missing);
        }
        match missing.first() {
            None => Ok(self.buf),
            Some(first) => {
                let sum = codec::sector_sum(self.kind, self.sums, *first);
                let lost = sector_of(self.place, *first);
                let error = match self.last {
                    Error::Checksum { bytes, .. } => Error::Checksum { addr: lost.addr(), bytes },
                    other => other,
                };
                Err(self.pool.lost(&lost, sum, error))
            }
        }
    }

    /// Reads sectors of a copy singly; returns those it does not have.
    fn try_copy(&mut self, wanted: &[usize], copy: usize) -> Result<Vec<usize>> {
        let mut lacking = Vec::new();
        for batch in wanted.chunks(RESCUE_BATCH) {
            let mut transfer = Transfer::new(self.pool.members().len());
            let mut plan = Vec::with_capacity(batch.len());
            for index in batch {
                let place = sector_of(self.place, *index);
                let parts = transfer.add(&place, copy)?;
                plan.push((*index, place, parts));
            }
            transfer.run(self.pool);
            for (index, place, parts) in plan {
                match transfer.assemble(self.pool, &place, parts) {
                    Ok(bytes) if self.is_good(&bytes, index) => {
                        self.buf[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(&bytes);
                        continue;
                    }
                    Ok(_) => {
                        self.pool.count_checksum_error(&place, copy);
                        self.last = Error::Checksum { addr: place.addr(), bytes: SECTOR_BYTES };
                    }
                    Err(Error::Memory) => return Err(Error::Memory),
                    Err(error) => self.last = error,
                }
                lacking.push(index);
            }
        }
        Ok(lacking)
    }

    fn is_good(&self, bytes: &[u8], index: usize) -> bool {
        let codecs = &*self.pool.platform().codecs;
        codec::matches(codecs, self.kind, bytes, codec::sector_sum(self.kind, self.sums, index))
    }

    /// Heals `sectors` of a copy, except those that no copy had, run by run. Both are ascending.
    fn heal_runs(&self, copy: usize, sectors: &[usize], lost: &[usize]) {
        let had: Vec<usize> =
            sectors.iter().filter(|index| lost.binary_search(index).is_err()).copied().collect();
        for run in had.chunk_by(|a, b| a + 1 == *b) {
            let (first, count) = (run[0], run.len());
            let place = self.place.part((first * SECTOR) as u64, (count * SECTOR) as u64);
            let content = &self.buf[first * SECTOR..(first + count) * SECTOR];
            let good = |bytes: &[u8]| {
                bytes.chunks(SECTOR).zip(first..).all(|(sector, i)| self.is_good(sector, i))
            };
            let sum = codec::sector_sum(self.kind, self.sums, first);
            self.pool.heal(&place, copy, content, sum, &good);
        }
    }
}

/// Where the pieces of one copy of one run are in a [`Transfer`].
type Parts = Vec<(usize, usize)>;

/// Reads of several runs, gathered so that each device gets one batch.
struct Transfer {
    /// By device.
    batches: Vec<Vec<ReadOp>>,
}

impl Transfer {
    fn new(devices: usize) -> Transfer {
        Transfer { batches: (0..devices).map(|_| Vec::new()).collect() }
    }

    /// Plans to read a copy of a run.
    fn add(&mut self, place: &Place, copy: usize) -> Result<Parts> {
        let mut parts = Vec::new();
        let mut outcome = Ok(());
        place.segments(copy, &mut |segment| match Buf::zeroed(segment.bytes as usize) {
            Ok(buf) => {
                let device = usize::from(segment.device);
                parts.push((device, self.batches[device].len()));
                self.batches[device].push(ReadOp { at: segment.at, buf, result: Ok(()) });
            }
            Err(error) => outcome = Err(error),
        });
        outcome.map(|()| parts)
    }

    fn run(&mut self, pool: &Pool) {
        for (member, batch) in pool.members().iter().zip(&mut self.batches) {
            if !batch.is_empty() {
                member.read(batch);
            }
        }
    }

    /// The bytes of a run that was added, after `run`.
    fn assemble(&mut self, pool: &Pool, place: &Place, parts: Parts) -> Result<Buf> {
        for (device, op) in &parts {
            let op = &self.batches[*device][*op];
            op.result.map_err(|cause| pool.members()[*device].error(op.at, cause))?;
        }
        if let [(device, op)] = parts[..] {
            return Ok(core::mem::take(&mut self.batches[device][op].buf));
        }
        let mut whole = Buf::zeroed(sector_round(place.bytes) as usize)?;
        let mut at = 0;
        for (device, op) in parts {
            let piece = core::mem::take(&mut self.batches[device][op].buf);
            whole[at..at + piece.len()].copy_from_slice(&piece);
            at += piece.len();
        }
        Ok(whole)
    }
}
