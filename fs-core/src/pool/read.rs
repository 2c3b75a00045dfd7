//! Verified reads, and healing of bad copies.
//!
//! A range is read in *pieces*, each of which lies on one device in each copy. A piece is first
//! read from the copy whose device has least to do, equal ones in turn by address, so that mirrors
//! share the work; then from the others, until the checksum in the pointer vouches for what is
//! there. When another copy had to serve, the bad ones are *healed*: the good content is written
//! over them, an incident is reported, and the device's error counter goes up. When no copy is
//! good, the read fails, and the loss is reported once. The error is [`Error::Device`] if any copy
//! could not be read, because that may be the good one; [`Error::Checksum`] says that all were.
//!
//! Metadata blocks and packed blobs are verified as a whole, so when a block is in several pieces a
//! checksum does not say which of them is bad: combinations of copies are tried, as if one device
//! or two could not be trusted. Plain data has a checksum for each sector and is healed by the
//! sector, so that two copies with damage in different places are still one good one.
//!
//! A pool that was opened as of an older group gives out nothing that no checksum vouches for, and
//! tells nobody of what it does not find: it was given up since, and its place used again.
//!
//! A device that has missed writes is asked last, only for what a checksum vouches for, and healed
//! without a word. One that has failed is asked after it, likewise, and not healed.
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
use crate::device::Standing;
use crate::error::{Error, Incident};
use crate::format::chunk::Profile;
use crate::format::extent::Blob;
use crate::format::ptr::{BlockPtr, ChecksumKind, CompressionKind};
use crate::format::space::Run;
use crate::platform::{DeviceError, ReadOp, Result};
use crate::sync::Mutex;
use crate::units::{sector_round, Logical, SECTOR_BYTES};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

const SECTOR: usize = SECTOR_BYTES as usize;

/// One verified read of file data.
#[derive(Debug)]
pub struct DataRead<'out> {
    /// What to read.
    pub source: DataSource,
    /// Where all bytes of a packed blob are expanded to, instead of `buf`; as long as they are.
    pub out: Option<&'out mut [u8]>,
    /// The bytes, expanded, when `result` is `Ok` and there is no `out`.
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

impl<'out> DataRead<'out> {
    /// A read that has not been carried out.
    pub fn new(source: DataSource) -> DataRead<'out> {
        DataRead { source, out: None, buf: Buf::default(), result: Ok(()) }
    }

    /// A read of a whole blob to where its bytes are wanted.
    pub fn whole(blob: Blob, out: &'out mut [u8]) -> DataRead<'out> {
        DataRead { out: Some(out), ..DataRead::new(DataSource::Packed { blob }) }
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

    /// Whether a checksum vouches for the content.
    pub(super) fn is_verified(&self) -> bool {
        match self {
            DataSource::Plain { checksum_kind, .. } => *checksum_kind != ChecksumKind::None,
            DataSource::Packed { blob } => blob.checksum_kind != ChecksumKind::None,
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
/// Most copies of any profile.
const COPIES_MAX: usize = 4;
/// Neighbouring addresses of so many bits are read from one copy, when all devices are idle.
const TURN_SHIFT: u32 = 18;
/// Devices whose reads under way differ by less than so many bits have equally much to do.
const LOAD_SHIFT: u32 = 18;
/// Pairs of devices that are distrusted together: of so many with so many.
const PAIRS_MAX: usize = 8;
/// Mixtures of copies that are tried at most.
const MIXTURES_MAX: usize = 64;
/// Sectors read in one batch while sectors are rescued one by one: bounds memory.
const RESCUE_BATCH: usize = 256;

/// What vouches for a block that is verified as a whole.
pub(super) struct Seal<'a> {
    pub kind: ChecksumKind,
    pub sum: &'a [u8; 32],
    pub stored: usize,
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
        let got = self.read_first(&place, true)?;
        self.open_block(ptr, (place, got))
    }

    /// Reads metadata blocks together: each as [`Pool::read_block`] does.
    pub fn read_blocks(&self, ptrs: &[BlockPtr]) -> Vec<Result<Buf>> {
        let run = |ptr: &BlockPtr| (Run { addr: ptr.addr, bytes: ptr.allocated() }, true);
        let raw = self.read_first_copies(&self.chunk_map(), ptrs.iter().map(run));
        ptrs.iter()
            .zip(raw)
            .map(|(ptr, raw)| raw.and_then(|raw| self.open_block(ptr, raw)))
            .collect()
    }

    /// The content of a block, of which copies have been read.
    fn open_block(&self, ptr: &BlockPtr, (place, got): (Place, Vec<Got>)) -> Result<Buf> {
        let seal =
            Seal { kind: ChecksumKind::Blake3, sum: &ptr.checksum, stored: ptr.stored as usize };
        let buf = self.read_whole(&place, &seal, got)?;
        self.unpack(buf, ptr.compression, ptr.stored, ptr.logical, ptr.addr)
    }

    /// Reads the `nth` copy of a run without verifying it. For content that verifies itself, as log
    /// frames do: when one does not, try the next, up to [`Pool::copies_at`].
    ///
    /// Only devices that are complete count, and always in the same order. What one that is behind
    /// has may verify and be out of date.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::Unmapped`], [`Error::Memory`]; [`Error::Checksum`] when there
    /// are not so many copies.
    pub fn read_run(&self, run: Run, nth: usize) -> Result<Buf> {
        let place = self.locate(run)?;
        if nth >= place.copies() {
            return Err(Error::Checksum { addr: run.addr, bytes: run.bytes });
        }
        let mut transfer = Transfer::new(self);
        let mut plan = Vec::new();
        for piece in place.pieces() {
            let is_complete = |copy: &usize| {
                let member = self.member(piece.segment(*copy).device);
                matches!(member.standing(), Standing::Complete | Standing::Leaving)
            };
            let complete = || (0..piece.copies()).filter(is_complete);
            let count = complete().count().max(1);
            let copy = complete().nth(nth % count).ok_or_else(|| self.not_there(&piece))?;
            plan.push(transfer.add(piece.clone(), copy)?);
        }
        transfer.run();
        join(&mut transfer.take(plan))
    }

    /// Whether data is there that a crash may have kept from the devices. All copies hold it then,
    /// unless the pool is read-only. When it is not, that is no loss, and nobody is told.
    ///
    /// # Errors
    /// [`Error::Device`] when it may be there, and cannot be read; [`Error::Unmapped`],
    /// [`Error::Memory`].
    pub fn prove(&self, source: &DataSource) -> Result<bool> {
        let run = source.run();
        let place = self.locate(run)?;
        let content = match source {
            // Nothing says what it should be.
            _ if !source.is_verified() => return Ok(true),
            DataSource::Plain { checksum_kind, checksums, .. } => {
                self.find_sectors(&place, *checksum_kind, checksums)?
            }
            DataSource::Packed { blob } => {
                let stored = blob.stored as usize;
                let seal = Seal { kind: blob.checksum_kind, sum: &blob.checksum, stored };
                Mosaic::new(self, &place, &seal, self.read_first(&place, true)?)?.find()?
            }
        };
        let Some(content) = content else { return Ok(false) };
        if place.copies() > 1 && !self.read_only() {
            // The power may have failed before it had reached every copy.
            self.complete_copies(run, &content)?;
        }
        Ok(true)
    }

    /// Plain sectors, each from any copy that has it.
    fn find_sectors(&self, place: &Place, kind: ChecksumKind, sums: &[u8]) -> Result<Option<Buf>> {
        let codecs = &*self.platform().codecs;
        let mut buf = Buf::zeroed(place.bytes as usize)?;
        let mut is_missing = alloc::vec![true; place.bytes as usize / SECTOR];
        let mut unreadable = None;
        for copy in 0..place.copies() {
            let mut first = 0;
            for piece in place.pieces() {
                let sectors = first..first + piece.bytes as usize / SECTOR;
                first = sectors.end;
                let is_there = self.member(piece.segment(copy).device).is_there();
                if !is_there || !is_missing[sectors.clone()].contains(&true) {
                    continue;
                }
                let bytes = match self.read_copy(&piece, copy) {
                    Ok(bytes) => bytes,
                    Err(Error::Memory) => return Err(Error::Memory),
                    Err(error) => {
                        unreadable = Some(error);
                        continue;
                    }
                };
                for (sector, index) in bytes.chunks_exact(SECTOR).zip(sectors) {
                    if codec::matches(codecs, kind, sector, codec::sector_sum(kind, sums, index))
                        && is_missing[index]
                    {
                        is_missing[index] = false;
                        buf[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(sector);
                    }
                }
            }
        }
        match (!is_missing.contains(&true), unreadable) {
            (true, _) => Ok(Some(buf)),
            (false, Some(error)) => Err(error),
            (false, None) => Ok(None),
        }
    }

    /// The copies of a piece in the order in which they are tried. `verified` says that a checksum
    /// vouches for the content.
    pub(super) fn order(&self, piece: &Place, verified: bool) -> Order {
        let copies = piece.copies().min(COPIES_MAX);
        let turn = match piece.profile() {
            Profile::Dup => 0,
            _ => (piece.addr().0 >> TURN_SHIFT) as usize % copies,
        };
        let mut ranked = [(0u64, 0u8); COPIES_MAX];
        let mut count = 0;
        for step in 0..copies {
            let copy = (turn + step) % copies;
            let member = self.member(piece.segment(copy).device);
            let rank = match member.standing() {
                // One device has both copies; they go in turn, whatever it has to do meanwhile.
                Standing::Complete if piece.profile() == Profile::Dup => 0,
                // What is to be removed may be failing.
                Standing::Complete if self.is_closed(member) => u64::MAX - 4,
                Standing::Complete if member.seems_gone() => u64::MAX - 3,
                Standing::Leaving => u64::MAX - 2,
                Standing::Complete => member.reading_bytes() >> LOAD_SHIFT,
                Standing::Behind if verified => u64::MAX - 1,
                // It failed a write, and may have most of what was written before.
                Standing::Absent if verified && member.may_be_asked() => u64::MAX,
                Standing::Behind | Standing::Absent | Standing::Vacant => continue,
            };
            ranked[count] = (rank, copy as u8);
            count += 1;
        }
        // Insertion keeps those of one rank in turn.
        for end in 1..count {
            let mut at = end;
            while at > 0 && ranked[at].0 < ranked[at - 1].0 {
                ranked.swap(at, at - 1);
                at -= 1;
            }
        }
        Order { copies: ranked.map(|(_, copy)| copy), count }
    }

    /// The error for a piece no copy of which can be asked for.
    fn not_there(&self, piece: &Place) -> Error {
        let segment = piece.segment(0);
        Error::Device { device: segment.device, at: segment.at, cause: DeviceError::Gone }
    }

    /// Carries out a batch of data reads together. Each has its own result.
    pub fn read_data(&self, reads: &mut [DataRead<'_>]) {
        let map = self.chunk_map();
        let runs = reads.iter().map(|read| (read.source.run(), read.source.is_verified()));
        let raw = self.read_first_copies(&map, runs);
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
        let slots: Vec<Mutex<Option<(&mut DataRead<'_>, Raw)>>> =
            reads.iter_mut().zip(raw).map(|pair| Mutex::new(Some(pair))).collect();
        workers.parallel_for(slots.len(), &|index| {
            let taken = slots[index].lock().take();
            if let Some((read, raw)) = taken {
                self.finish(read, raw);
            }
        });
    }

    /// Reads a copy of every run, all of them together; with each goes whether a checksum vouches
    /// for it.
    fn read_first_copies(
        &self,
        map: &ChunkMap,
        runs: impl Iterator<Item = (Run, bool)>,
    ) -> Vec<Raw> {
        let mut transfer = Transfer::new(self);
        let mut planned = Vec::new();
        for (run, is_verified) in runs {
            let place = map.locate(run);
            planned.push(place.and_then(|place| {
                let plan = transfer.add_first(&place, is_verified)?;
                Ok((place, plan))
            }));
        }
        transfer.run();
        let finish = |planned: Result<(Place, Vec<Planned>)>| {
            planned.map(|(place, plan)| {
                let got = transfer.take(plan);
                (place, got)
            })
        };
        planned.into_iter().map(finish).collect()
    }

    /// Verifies and expands what was read, falling back to other copies.
    fn finish(&self, read: &mut DataRead<'_>, raw: Raw) {
        if self.is_past() && !read.source.is_verified() {
            let error = Error::Unverified { addr: read.source.run().addr };
            (read.buf, read.result) = (Buf::default(), Err(error));
            return;
        }
        let outcome = raw.and_then(|(place, got)| match &read.source {
            DataSource::Plain { checksum_kind, checksums, .. } => {
                self.read_sectors(&place, *checksum_kind, checksums, got)
            }
            DataSource::Packed { blob } => {
                let stored = blob.stored as usize;
                let seal = Seal { kind: blob.checksum_kind, sum: &blob.checksum, stored };
                let buf = self.read_whole(&place, &seal, got)?;
                let kind = blob.compression;
                match &mut read.out {
                    Some(out) if out.len() == blob.logical as usize => {
                        let codecs = &*self.platform().codecs;
                        codec::expand_to(codecs, kind, &buf[..stored], out, blob.addr)?;
                        Ok(Buf::default())
                    }
                    _ => self.unpack(buf, kind, blob.stored, blob.logical, blob.addr),
                }
            }
        });
        match outcome {
            Ok(buf) => (read.buf, read.result) = (buf, Ok(())),
            Err(error) => (read.buf, read.result) = (Buf::default(), Err(error)),
        }
    }

    /// Reads one copy of a piece as it is.
    pub(super) fn read_copy(&self, piece: &Place, copy: usize) -> Result<Buf> {
        let segment = piece.segment(copy);
        self.member(segment.device).read_at(segment.at, segment.bytes as usize)
    }

    /// The content of a block that is verified as a whole; `got` is what was read first.
    pub(super) fn read_whole(
        &self,
        place: &Place,
        seal: &Seal<'_>,
        mut got: Vec<Got>,
    ) -> Result<Buf> {
        if got.iter().any(Got::lacks_memory) {
            return Err(Error::Memory);
        }
        if let [only] = &mut got[..] {
            if only.result.as_ref().is_ok_and(|buf| self.is_sealed(seal, buf)) {
                return core::mem::replace(&mut only.result, Err(Error::Memory));
            }
        } else if got.iter().all(|got| got.result.is_ok()) {
            let buf = join_copies(place, &got)?;
            if self.is_sealed(seal, &buf) {
                return Ok(buf);
            }
        }
        Mosaic::new(self, place, seal, got)?.solve()
    }

    fn is_sealed(&self, seal: &Seal<'_>, bytes: &[u8]) -> bool {
        let codecs = &*self.platform().codecs;
        bytes.len() >= seal.stored
            && codec::matches(codecs, seal.kind, &bytes[..seal.stored], seal.sum)
    }

    /// The content of plain sectors; `got` is what was read first.
    pub(super) fn read_sectors(
        &self,
        place: &Place,
        kind: ChecksumKind,
        sums: &[u8],
        mut got: Vec<Got>,
    ) -> Result<Buf> {
        let codecs = &*self.platform().codecs;
        if got.iter().any(Got::lacks_memory) {
            return Err(Error::Memory);
        }
        let is_whole = got.iter().all(|got| got.result.is_ok());
        let first =
            |got: &Got| (got.result.is_ok().then_some(got.copy), got.piece.bytes as usize / SECTOR);
        let first: Vec<(Option<usize>, usize)> = got.iter().map(first).collect();
        let buf = if is_whole { join(&mut got)? } else { join_copies(place, &got)? };
        let bad: Vec<usize> = codec::bad_sectors(codecs, kind, &buf, sums).collect();
        if is_whole && bad.is_empty() {
            return Ok(buf);
        }
        // What each missing sector was found bad in, if one unreadable sector did not fail the
        // whole transfer: then it begins with the same copy again, sector by sector.
        let mut missing = Vec::new();
        let mut is_bad = bad.into_iter().peekable();
        let mut sector = 0;
        for (copy, count) in first {
            for index in sector..sector + count {
                let bad = is_bad.next_if_eq(&index).is_some();
                if let (Some(copy), true) = (copy, bad) {
                    self.count_checksum_error(&sector_of(place, index), copy);
                }
                if bad || copy.is_none() {
                    missing.push((index, copy.map_or(0, |copy| 1 << copy)));
                }
            }
            sector += count;
        }
        Rescue { pool: self, place, kind, sums, buf, unread: Vec::new() }.run(missing)
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
        let take = |bytes| self.buffer(bytes);
        codec::expand(&*self.platform().codecs, kind, &buf[..stored], logical, addr, take)
    }

    /// Writes `content` over a bad copy of a piece, unless someone else has healed it since it was
    /// read.
    ///
    /// # Errors
    /// When it could not be written. Whoever only reads has what was asked for all the same.
    pub(super) fn heal(
        &self,
        piece: &Place,
        copy: usize,
        content: &[u8],
        sum: &[u8],
        good: &dyn Fn(&[u8]) -> bool,
    ) -> Result<()> {
        let segment = piece.segment(copy);
        let standing = self.member(segment.device).standing();
        if !self.member(segment.device).is_there() {
            return Ok(());
        }
        let _one_at_a_time = self.heal.lock();
        if self.read_copy(piece, copy).is_ok_and(|buf| good(&buf)) {
            return Ok(());
        }
        let outcome = match self.read_only() {
            true => Ok(()),
            false => self.rewrite(piece, copy, content),
        };
        let rewritten = !self.read_only() && outcome.is_ok();
        if standing == Standing::Behind {
            // That it lacks something is known.
            return outcome;
        }
        if !self.read_only() {
            self.member(segment.device).count_mend(segment.bytes, rewritten);
        }
        let number = u16::try_from(copy).unwrap_or(u16::MAX);
        // What was repaired and breaks again is news; what cannot be repaired is not.
        if rewritten || self.reported.lock().is_new(piece.addr(), number, sum) {
            self.platform().report.incident(&Incident::Healed {
                addr: piece.addr(),
                device: segment.device,
                at: segment.at,
                rewritten,
            });
        }
        outcome
    }

    /// The copies of a run that are tried first.
    pub(super) fn read_first(&self, place: &Place, is_verified: bool) -> Result<Vec<Got>> {
        let mut transfer = Transfer::new(self);
        let plan = transfer.add_first(place, is_verified)?;
        transfer.run();
        Ok(transfer.take(plan))
    }

    /// Makes every copy of a run hold `content`, which one of them is known to hold. Writes over
    /// the others alone, so that power may fail meanwhile. A second copy on one device that cannot
    /// be written is left as it is.
    ///
    /// # Errors
    /// [`Error::Unmapped`], [`Error::Memory`], [`Error::ReadOnly`]; [`Error::Device`] when a device
    /// refuses and the pool cannot go on without it.
    pub fn complete_copies(&self, run: Run, content: &[u8]) -> Result<()> {
        self.check_writable()?;
        let place = self.locate(run)?;
        let (mut failed, mut start) = (Vec::new(), 0);
        for piece in place.pieces() {
            let part = &content[start..start + piece.bytes as usize];
            start += part.len();
            for copy in 0..piece.copies() {
                let device = piece.segment(copy).device;
                if !self.member(device).is_there() {
                    continue;
                }
                match self.read_copy(&piece, copy) {
                    Ok(found) if found.get(..part.len()) == Some(part) => continue,
                    Err(Error::Memory) => return Err(Error::Memory),
                    _ => {}
                }
                let outcome = self.rewrite(&piece, copy, part);
                self.member(device).count_mend(piece.bytes, outcome.is_ok());
                match outcome {
                    Err(error) if piece.profile() != Profile::Dup => failed.push((device, error)),
                    _ => {}
                }
            }
        }
        self.leave_behind(failed)
    }

    fn rewrite(&self, piece: &Place, copy: usize, content: &[u8]) -> Result<()> {
        let segment = piece.segment(copy);
        let slice = Buf::copy_of(content)?.into_slice();
        self.member(segment.device).write_at(segment.at, slice)
    }

    /// Reports that no copy is good, and passes the error on.
    pub(super) fn lost(&self, place: &Place, sum: &[u8], error: Error) -> Error {
        if self.is_past() {
            // It may have been given up since, and something else be there.
            return error;
        }
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

    /// Counts a copy that is not what it should be, unless that is no wonder.
    pub(super) fn count_checksum_error(&self, piece: &Place, copy: usize) {
        let member = self.member(piece.segment(copy).device);
        if member.is_complete() && !self.is_past() {
            member.count_checksum_error();
        }
    }
}

/// A place and what was read of it first, or why there is no place.
type Raw = Result<(Place, Vec<Got>)>;

/// The copies of a piece in the order in which they are tried.
pub(super) struct Order {
    copies: [u8; COPIES_MAX],
    count: usize,
}

impl Order {
    fn nth(&self, nth: usize) -> Option<usize> {
        (nth < self.count).then(|| usize::from(self.copies[nth]))
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.copies[..self.count].iter().map(|copy| usize::from(*copy))
    }
}

/// One copy of one piece, as it was read.
pub(super) struct Got {
    pub piece: Place,
    pub copy: usize,
    pub result: Result<Buf>,
}

impl Got {
    fn lacks_memory(&self) -> bool {
        matches!(self.result, Err(Error::Memory))
    }
}

/// The bytes of pieces that were read, one after the other.
fn join(got: &mut [Got]) -> Result<Buf> {
    if let [only] = got {
        return core::mem::replace(&mut only.result, Err(Error::Memory));
    }
    if let Some(bad) = got.iter().find_map(|got| got.result.as_ref().err()) {
        return Err(bad.clone());
    }
    let bytes: u64 = got.iter().map(|got| got.piece.bytes).sum();
    collect(bytes, got.iter().map(|got| (got.piece.bytes, got.result.as_ref().ok())))
}

/// As [`join`], and what was read is kept; zeros for what could not be read.
fn join_copies(place: &Place, got: &[Got]) -> Result<Buf> {
    collect(place.bytes, got.iter().map(|got| (got.piece.bytes, got.result.as_ref().ok())))
}

fn collect<'a>(bytes: u64, parts: impl Iterator<Item = (u64, Option<&'a Buf>)>) -> Result<Buf> {
    let mut whole = Buf::zeroed(sector_round(bytes) as usize)?;
    let mut at = 0;
    for (bytes, part) in parts {
        if let Some(part) = part {
            whole[at..at + part.len()].copy_from_slice(part);
        }
        at += bytes as usize;
    }
    Ok(whole)
}

pub(super) fn sector_of(place: &Place, index: usize) -> Place {
    place.part((index * SECTOR) as u64, SECTOR_BYTES)
}

/// A block that is verified as a whole, put together from copies of its pieces.
struct Mosaic<'a> {
    pool: &'a Pool,
    place: &'a Place,
    seal: &'a Seal<'a>,
    /// For each piece, what its copies gave: never empty.
    pieces: Vec<Vec<Got>>,
    /// Why there is no good copy: one that cannot be read now may be good.
    reason: Error,
}

impl<'a> Mosaic<'a> {
    /// Begins with what was read first.
    fn new(
        pool: &'a Pool,
        place: &'a Place,
        seal: &'a Seal<'a>,
        got: Vec<Got>,
    ) -> Result<Mosaic<'a>> {
        let reason = Error::Checksum { addr: place.addr(), bytes: place.bytes };
        let mut mosaic = Mosaic { pool, place, seal, pieces: Vec::new(), reason };
        for got in got {
            if let Err(error) = &got.result {
                mosaic.reason = error.clone();
            }
            mosaic.pieces.push(alloc::vec![got]);
        }
        Ok(mosaic)
    }

    /// Finds copies that make the block, and heals the others.
    fn solve(mut self) -> Result<Buf> {
        // The usual case first, without reading more than it takes.
        let mut nth = 1;
        while self.read_another()? {
            let choice: Option<Vec<usize>> =
                self.pieces.iter().map(|copies| last_readable(copies, nth)).collect();
            if let Some(found) = choice.and_then(|choice| self.attempt(&choice).transpose()) {
                return found;
            }
            nth += 1;
        }
        for choice in self.choices() {
            if let Some(found) = self.attempt(&choice).transpose() {
                return found;
            }
        }
        for got in self.pieces.iter().flatten().filter(|got| got.result.is_ok()) {
            self.pool.count_checksum_error(&got.piece, got.copy);
        }
        Err(self.pool.lost(self.place, self.seal.sum, self.reason))
    }

    /// Finds copies that make the block, and tells nobody of those that do not.
    fn find(mut self) -> Result<Option<Buf>> {
        while self.read_another()? {}
        let first: Vec<usize> = self.pieces.iter().map(|_| 0).collect();
        for choice in core::iter::once(first).chain(self.choices()) {
            if let Some(buf) = self.assemble(&choice)? {
                return Ok(Some(buf));
            }
        }
        if self.pieces.len() == 1 {
            for nth in 1..self.pieces[0].len() {
                if let Some(buf) = self.assemble(&[nth])? {
                    return Ok(Some(buf));
                }
            }
        }
        // One that cannot be read may be the right one.
        match self.pieces.into_iter().flatten().find_map(|got| got.result.err()) {
            Some(error) => Err(error),
            None => Ok(None),
        }
    }

    /// Reads one more copy of each piece. False when there are no more of any.
    fn read_another(&mut self) -> Result<bool> {
        let mut more = false;
        for copies in &mut self.pieces {
            let piece = &copies[0].piece;
            let order = self.pool.order(piece, self.seal.kind != ChecksumKind::None);
            let next = order.iter().find(|copy| copies.iter().all(|got| got.copy != *copy));
            let Some(copy) = next else { continue };
            more = true;
            let result = self.pool.read_copy(piece, copy);
            match &result {
                Err(Error::Memory) => return Err(Error::Memory),
                Err(error) => self.reason = error.clone(),
                Ok(_) => {}
            }
            let piece = piece.clone();
            copies.push(Got { piece, copy, result });
        }
        Ok(more)
    }

    /// What else to try when every copy has been read: for each piece, which of its copies.
    fn choices(&self) -> Vec<Vec<usize>> {
        if self.pieces.len() == 1 {
            return Vec::new();
        }
        let mut devices: Vec<u16> =
            self.pieces.iter().flatten().map(|got| got.piece.segment(got.copy).device).collect();
        devices.sort_unstable();
        devices.dedup();
        let mut choices = Vec::new();
        let mut distrust = |suspects: &[u16]| {
            let pick = |copies: &Vec<Got>| {
                let is_trusted = |got: &Got| {
                    got.result.is_ok() && !suspects.contains(&got.piece.segment(got.copy).device)
                };
                copies.iter().position(is_trusted)
            };
            choices.extend(self.pieces.iter().map(pick).collect::<Option<Vec<usize>>>());
        };
        distrust(&[]);
        devices.iter().for_each(|device| distrust(&[*device]));
        for (index, first) in devices.iter().enumerate().take(PAIRS_MAX) {
            devices[index + 1..]
                .iter()
                .take(PAIRS_MAX)
                .for_each(|second| distrust(&[*first, *second]));
        }
        // And any mixture, as long as there are few.
        let combinations = self.pieces.iter().try_fold(1usize, |all, copies| {
            all.checked_mul(copies.len()).filter(|all| *all <= MIXTURES_MAX)
        });
        for number in 0..combinations.unwrap_or(0) {
            let mut rest = number;
            let choice = self.pieces.iter().map(|copies| {
                let index = rest % copies.len();
                rest /= copies.len();
                index
            });
            choices.push(choice.collect());
        }
        choices
    }

    /// The block, if the chosen copies make it.
    fn assemble(&self, choice: &[usize]) -> Result<Option<Buf>> {
        let chosen = || self.pieces.iter().zip(choice).map(|(copies, index)| &copies[*index]);
        if chosen().any(|got| got.result.is_err()) {
            return Ok(None);
        }
        let parts = chosen().map(|got| (got.piece.bytes, got.result.as_ref().ok()));
        let buf = collect(self.place.bytes, parts)?;
        Ok(self.pool.is_sealed(self.seal, &buf).then_some(buf))
    }

    /// The block, if the chosen copies make it; heals the others then.
    fn attempt(&self, choice: &[usize]) -> Result<Option<Buf>> {
        let Some(buf) = self.assemble(choice)? else { return Ok(None) };
        let mut start = 0;
        for (copies, index) in self.pieces.iter().zip(choice) {
            let content = &buf[start..start + copies[*index].piece.bytes as usize];
            // What follows the content on disk is not vouched for.
            let covered = self.seal.stored.saturating_sub(start).min(content.len());
            // Without a checksum nobody knows which of two readable copies is right.
            let is_vouched = self.seal.kind != ChecksumKind::None;
            let good =
                |bytes: &[u8]| !is_vouched || bytes.get(..covered) == Some(&content[..covered]);
            for got in copies {
                match &got.result {
                    Ok(bytes) if good(bytes) => continue,
                    Ok(_) => self.pool.count_checksum_error(&got.piece, got.copy),
                    Err(_) => {}
                }
                // What could not be written is told, and read from another copy again.
                let _ = self.pool.heal(&got.piece, got.copy, content, &self.seal.sum[..], &good);
            }
            start += content.len();
        }
        Ok(Some(buf))
    }
}

/// The `nth` copy that was read, or the last before it that could be.
fn last_readable(copies: &[Got], nth: usize) -> Option<usize> {
    let upto = copies.len().min(nth + 1);
    copies[..upto].iter().rposition(|got| got.result.is_ok())
}

/// Gets the sectors of one plain read that its first transfer did not give.
struct Rescue<'a> {
    pool: &'a Pool,
    place: &'a Place,
    kind: ChecksumKind,
    sums: &'a [u8],
    /// What is good so far.
    buf: Buf,
    /// Sectors that some copy did not give out, and how it failed: it may be the good one.
    unread: Vec<(usize, Error)>,
}

/// A sector that is missing, and the copies that were tried: a bit for each.
type MissingSector = (usize, u8);

impl Rescue<'_> {
    /// Looks for `missing`, ascending, in their other copies, then heals those that lacked them.
    fn run(mut self, missing: Vec<MissingSector>) -> Result<Buf> {
        // Copies that lacked a sector.
        let mut lacking: Vec<(usize, usize)> = Vec::new();
        for (index, tried) in &missing {
            let copies = (0..COPIES_MAX).filter(|copy| tried >> copy & 1 == 1);
            lacking.extend(copies.map(|copy| (copy, *index)));
        }
        let mut wanted = missing;
        for _ in 0..self.place.copies() {
            if wanted.is_empty() {
                break;
            }
            wanted = self.try_another(&wanted, &mut lacking)?;
        }
        let lost: Vec<usize> = wanted.iter().map(|(index, _)| *index).collect();
        lacking.sort_unstable();
        lacking.dedup();
        for of_copy in lacking.chunk_by(|a, b| a.0 == b.0) {
            let sectors: Vec<usize> = of_copy.iter().map(|(_, index)| *index).collect();
            self.heal_runs(of_copy[0].0, &sectors, &lost);
        }
        match lost.first() {
            None => Ok(self.buf),
            Some(first) => {
                let unread = self.unread.into_iter().find(|(at, _)| lost.binary_search(at).is_ok());
                let first = unread.as_ref().map_or(*first, |(at, _)| *at);
                let sum = codec::sector_sum(self.kind, self.sums, first);
                let lost = sector_of(self.place, first);
                let bad = Error::Checksum { addr: lost.addr(), bytes: SECTOR_BYTES };
                Err(self.pool.lost(&lost, sum, unread.map_or(bad, |(_, error)| error)))
            }
        }
    }

    /// Reads a copy that was not tried of each sector; returns those that are still wanted.
    fn try_another(
        &mut self,
        wanted: &[MissingSector],
        lacking: &mut Vec<(usize, usize)>,
    ) -> Result<Vec<MissingSector>> {
        let is_verified = self.kind != ChecksumKind::None;
        let mut still = Vec::new();
        for batch in wanted.chunks(RESCUE_BATCH) {
            let mut transfer = Transfer::new(self.pool);
            let mut plan = Vec::with_capacity(batch.len());
            for (index, tried) in batch {
                let piece = sector_of(self.place, *index);
                // The order may be another each time: what counts is what was tried.
                let order = self.pool.order(&piece, is_verified);
                let next = order.iter().find(|copy| tried >> copy & 1 == 0);
                match next {
                    Some(copy) => {
                        plan.push((*index, tried | 1 << copy, transfer.add(piece, copy)?));
                    }
                    None => still.push((*index, *tried)),
                }
            }
            transfer.run();
            for (index, tried, planned) in plan {
                let got = transfer.take_one(planned);
                match got.result {
                    Ok(bytes) if self.is_good(&bytes, index) => {
                        self.buf[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(&bytes);
                        continue;
                    }
                    Ok(_) => self.pool.count_checksum_error(&got.piece, got.copy),
                    Err(Error::Memory) => return Err(Error::Memory),
                    Err(error) => self.unread.push((index, error)),
                }
                lacking.push((got.copy, index));
                still.push((index, tried));
            }
        }
        still.sort_unstable();
        Ok(still)
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
            let place = self.place.part((run[0] * SECTOR) as u64, (run.len() * SECTOR) as u64);
            let mut first = run[0];
            for piece in place.pieces() {
                let count = piece.bytes as usize / SECTOR;
                let content = &self.buf[first * SECTOR..(first + count) * SECTOR];
                let good = |bytes: &[u8]| {
                    bytes.chunks(SECTOR).zip(first..).all(|(sector, i)| self.is_good(sector, i))
                };
                let sum = codec::sector_sum(self.kind, self.sums, first);
                // What could not be written is told, and read from another copy again.
                let _ = self.pool.heal(&piece, copy, content, sum, &good);
                first += count;
            }
        }
    }
}

/// A read in a [`Transfer`].
pub(super) struct Planned {
    piece: Place,
    copy: usize,
    /// Its number in the batch of its device.
    op: usize,
}

/// Reads of several pieces, gathered so that each device gets one batch.
pub(super) struct Transfer<'a> {
    pool: &'a Pool,
    /// By device.
    batches: Vec<Vec<ReadOp>>,
}

impl<'a> Transfer<'a> {
    pub fn new(pool: &'a Pool) -> Transfer<'a> {
        Transfer { pool, batches: pool.members().iter().map(|_| Vec::new()).collect() }
    }

    /// Plans to read a copy of a piece.
    pub fn add(&mut self, piece: Place, copy: usize) -> Result<Planned> {
        let segment = piece.segment(copy);
        let buf = self.pool.buffer(segment.bytes as usize)?;
        let batch = &mut self.batches[usize::from(segment.device)];
        batch.push(ReadOp { at: segment.at, buf, result: Ok(()) });
        Ok(Planned { piece, copy, op: batch.len() - 1 })
    }

    /// Plans to read the copies of a run that are tried first.
    pub(super) fn add_first(&mut self, place: &Place, verified: bool) -> Result<Vec<Planned>> {
        let mut plan = Vec::new();
        for piece in place.pieces() {
            let order = self.pool.order(&piece, verified);
            let copy = order.nth(0).ok_or_else(|| self.pool.not_there(&piece))?;
            plan.push(self.add(piece, copy)?);
        }
        Ok(plan)
    }

    /// Reads, from all devices at once.
    pub fn run(&mut self) {
        let pool = self.pool;
        let busy = self.batches.iter_mut().enumerate().filter(|(_, batch)| !batch.is_empty());
        pool.on_devices(busy.collect(), &|index, batch| {
            pool.member(index).read(batch);
        });
    }

    pub(super) fn take(&mut self, plan: Vec<Planned>) -> Vec<Got> {
        plan.into_iter().map(|planned| self.take_one(planned)).collect()
    }

    /// What a read that was added gave, after `run`.
    pub fn take_one(&mut self, planned: Planned) -> Got {
        let Planned { piece, copy, op } = planned;
        let device = piece.segment(copy).device;
        let op = &mut self.batches[usize::from(device)][op];
        let result = match op.result {
            Ok(()) => Ok(core::mem::take(&mut op.buf)),
            Err(cause) => Err(self.pool.member(device).error(op.at, cause)),
        };
        Got { piece, copy, result }
    }
}
