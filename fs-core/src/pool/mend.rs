//! Mending: comparing all copies of something with what they should be, and repairing those that
//! are bad.
//!
//! Where `read` stops at the first good copy, this looks at all of them. Plain data is mended by
//! the sector: what of it is lost does not keep the rest from being repaired.

use super::map::Place;
use super::read::{sector_of, DataSource, Got, Seal, Transfer};
use super::{Content, Pool};
use crate::buf::Buf;
use crate::codec;
use crate::device::Standing;
use crate::error::Error;
use crate::format::ptr::ChecksumKind;
use crate::platform::Result;
use crate::units::SECTOR_BYTES;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

const SECTOR: usize = SECTOR_BYTES as usize;

/// A part of something of which no copy is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Which bytes of it.
    pub range: Range<u64>,
    /// Why; [`Error::Device`] if a copy could not be read, since that may be the good one.
    pub error: Error,
}

impl Pool {
    /// Reads all copies and writes over those that are bad. Returns what has no good copy. Where
    /// nothing vouches for data, what a complete device has is copied to those that are behind.
    ///
    /// # Errors
    /// [`Error::Memory`]; those of leaving a device that was behind, and refuses what it lacks.
    pub fn mend(&self, content: &Content) -> Result<Vec<Lost>> {
        let run = content.run();
        let outcome = self.locate(run).and_then(|place| match content {
            Content::Block(ptr) => {
                let (kind, stored) = (ChecksumKind::Blake3, ptr.stored as usize);
                self.mend_sealed(&place, &Seal { kind, sum: &ptr.checksum, stored })
            }
            Content::Data(DataSource::Packed { blob }) => {
                let (kind, stored) = (blob.checksum_kind, blob.stored as usize);
                self.mend_sealed(&place, &Seal { kind, sum: &blob.checksum, stored })
            }
            Content::Data(source @ DataSource::Plain { checksum_kind, checksums, .. }) => {
                if source.is_verified() {
                    return self.mend_sectors(&place, *checksum_kind, checksums);
                }
                let got = self.read_first(&place, false)?;
                let content = self.read_sectors(&place, *checksum_kind, checksums, got)?;
                self.mend_to(&place, &content, place.bytes as usize, false, checksums)?;
                Ok(Vec::new())
            }
        });
        match outcome {
            Err(error) if error.is_damage() => Ok(vec![Lost { range: 0..run.bytes, error }]),
            other => other,
        }
    }

    fn mend_sealed(&self, place: &Place, seal: &Seal<'_>) -> Result<Vec<Lost>> {
        let is_vouched = seal.kind != ChecksumKind::None;
        let got = self.read_first(place, is_vouched)?;
        let content = self.read_whole(place, seal, got)?;
        self.mend_to(place, &content, seal.stored, is_vouched, seal.sum)?;
        Ok(Vec::new())
    }

    /// Compares the first `covered` bytes of all copies of a run with what they should be.
    fn mend_to(
        &self,
        place: &Place,
        content: &[u8],
        covered: usize,
        is_vouched: bool,
        sum: &[u8],
    ) -> Result<()> {
        let mut transfer = Transfer::new(self);
        let mut plan = Vec::new();
        let mut start = 0;
        for piece in place.pieces() {
            let range = start..start + piece.bytes as usize;
            start = range.end;
            for copy in 0..piece.copies() {
                let member = self.member(piece.segment(copy).device);
                // Of two copies that nothing vouches for nobody knows which is right.
                if member.is_there() && (is_vouched || !member.is_complete()) {
                    plan.push((range.clone(), transfer.add(piece.clone(), copy)?));
                }
            }
        }
        transfer.run();
        let mut failed = Vec::new();
        for (range, planned) in plan {
            let got = transfer.take_one(planned);
            let covered = covered.saturating_sub(range.start).min(range.len());
            let content = &content[range];
            let good = |bytes: &[u8]| bytes.get(..covered) == Some(&content[..covered]);
            match &got.result {
                Ok(bytes) if good(bytes) => continue,
                Ok(_) => self.count_checksum_error(&got.piece, got.copy),
                Err(Error::Memory) => return Err(Error::Memory),
                Err(_) => {}
            }
            let device = got.piece.segment(got.copy).device;
            let is_behind = self.member(device).standing() == Standing::Behind;
            match self.heal(&got.piece, got.copy, content, sum, &good) {
                // What is written counts on what it was to get here.
                Err(error) if is_behind => failed.push((device, error)),
                // Elsewhere a bad copy stays one, which was told.
                _ => {}
            }
        }
        self.leave_behind(failed)
    }

    /// Mends plain data that is verified.
    fn mend_sectors(&self, place: &Place, kind: ChecksumKind, sums: &[u8]) -> Result<Vec<Lost>> {
        let mut mending = Mending {
            pool: self,
            place,
            kind,
            sums,
            buf: Buf::zeroed(place.bytes as usize)?,
            is_good: vec![false; place.bytes as usize / SECTOR],
            bad: Vec::new(),
            unread: None,
        };
        mending.read()?;
        mending.ask_others()?;
        mending.heal()?;
        Ok(mending.losses())
    }
}

/// Plain data that is being mended.
struct Mending<'a> {
    pool: &'a Pool,
    place: &'a Place,
    kind: ChecksumKind,
    sums: &'a [u8],
    /// The sectors of which a good copy was found.
    buf: Buf,
    is_good: Vec<bool>,
    /// Copies of sectors that are bad.
    bad: Vec<(usize, usize)>,
    /// How a copy failed to be read.
    unread: Option<Error>,
}

impl Mending<'_> {
    /// Reads all copies on devices that are there.
    fn read(&mut self) -> Result<()> {
        let mut transfer = Transfer::new(self.pool);
        let mut plan = Vec::new();
        let mut first = 0;
        for piece in self.place.pieces() {
            for copy in 0..piece.copies() {
                if self.pool.member(piece.segment(copy).device).is_there() {
                    plan.push((first, transfer.add(piece.clone(), copy)?));
                }
            }
            first += piece.bytes as usize / SECTOR;
        }
        transfer.run();
        for (first, planned) in plan {
            let got = transfer.take_one(planned);
            self.look(first, got)?;
        }
        Ok(())
    }

    /// Looks which sectors of a copy are good, from the `first` of the whole on.
    fn look(&mut self, first: usize, got: Got) -> Result<()> {
        let Got { piece, copy, result } = got;
        match result {
            Ok(bytes) => {
                for (sector, index) in bytes.chunks_exact(SECTOR).zip(first..) {
                    self.look_at(sector, index, copy);
                }
                Ok(())
            }
            Err(Error::Memory) => Err(Error::Memory),
            Err(error) if piece.bytes as usize == SECTOR => {
                self.unread = Some(error);
                self.bad.push((copy, first));
                Ok(())
            }
            // One sector that cannot be read fails all of it.
            Err(_) => {
                for index in first..first + piece.bytes as usize / SECTOR {
                    let piece = sector_of(self.place, index);
                    let result = self.pool.read_copy(&piece, copy);
                    self.look_one(index, Got { piece, copy, result })?;
                }
                Ok(())
            }
        }
    }

    /// As [`Mending::look`], for one sector.
    fn look_one(&mut self, index: usize, got: Got) -> Result<()> {
        match got.result {
            Ok(bytes) => self.look_at(&bytes, index, got.copy),
            Err(Error::Memory) => return Err(Error::Memory),
            Err(error) => {
                self.unread = Some(error);
                self.bad.push((got.copy, index));
            }
        }
        Ok(())
    }

    fn look_at(&mut self, sector: &[u8], index: usize, copy: usize) {
        let codecs = &*self.pool.platform().codecs;
        let sum = codec::sector_sum(self.kind, self.sums, index);
        if !codec::matches(codecs, self.kind, sector, sum) {
            self.pool.count_checksum_error(&sector_of(self.place, index), copy);
            self.bad.push((copy, index));
        } else if !self.is_good[index] {
            self.is_good[index] = true;
            self.buf[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(sector);
        }
    }

    /// Asks devices that have failed for what no other has.
    fn ask_others(&mut self) -> Result<()> {
        for index in 0..self.is_good.len() {
            if self.is_good[index] {
                continue;
            }
            let piece = sector_of(self.place, index);
            let order = self.pool.order(&piece, true);
            for copy in order.iter() {
                if self.pool.member(piece.segment(copy).device).is_there() {
                    continue;
                }
                let result = self.pool.read_copy(&piece, copy);
                self.look_one(index, Got { piece: piece.clone(), copy, result })?;
            }
        }
        Ok(())
    }

    /// Writes good sectors over bad ones, run by run.
    fn heal(&mut self) -> Result<()> {
        let is_good = &self.is_good;
        self.bad.retain(|(_, index)| is_good[*index]);
        self.bad.sort_unstable();
        let mut failed = Vec::new();
        for run in self.bad.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let (copy, mut first) = run[0];
            let part = self.place.part((first * SECTOR) as u64, (run.len() * SECTOR) as u64);
            for piece in part.pieces() {
                let count = piece.bytes as usize / SECTOR;
                let content = &self.buf[first * SECTOR..(first + count) * SECTOR];
                let good = |bytes: &[u8]| bytes == content;
                let sum = codec::sector_sum(self.kind, self.sums, first);
                let device = piece.segment(copy).device;
                let is_behind = self.pool.member(device).standing() == Standing::Behind;
                match self.pool.heal(&piece, copy, content, sum, &good) {
                    // What is written counts on what it was to get here.
                    Err(error) if is_behind => failed.push((device, error)),
                    // Elsewhere a bad copy stays one, which was told.
                    _ => {}
                }
                first += count;
            }
        }
        self.pool.leave_behind(failed)
    }

    /// The sectors without a good copy, run by run.
    fn losses(self) -> Vec<Lost> {
        let lost: Vec<usize> = (0..self.is_good.len()).filter(|i| !self.is_good[*i]).collect();
        let told = |run: &[usize]| {
            let first = sector_of(self.place, run[0]);
            let bad = Error::Checksum { addr: first.addr(), bytes: SECTOR_BYTES };
            let sum = codec::sector_sum(self.kind, self.sums, run[0]);
            let error = self.pool.lost(&first, sum, self.unread.clone().unwrap_or(bad));
            let start = (run[0] * SECTOR) as u64;
            Lost { range: start..start + (run.len() * SECTOR) as u64, error }
        };
        lost.chunk_by(|a, b| a + 1 == *b).map(told).collect()
    }
}
