//! Telling the devices what they need not keep.
//!
//! What is discarded here, the caller has made sure, nobody can be given or reach meanwhile: space
//! in chunks is kept back by the allocator, space outside of chunks by [`Pool::hold_unallocated`].
//! Ranges count the bytes of all devices, one after the other.

use super::Pool;
use crate::device::Member;
use crate::error::Error;
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, Physical};
use core::ops::Range;

/// What two ranges share.
fn common(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (both.start < both.end).then_some(both)
}

impl Pool {
    /// Whether any device wants to know what holds nothing of value.
    pub fn discards(&self) -> bool {
        self.members().iter().any(Member::discards)
    }

    /// Whether a run within one chunk has bytes in a range of the devices.
    pub fn is_within(&self, run: Run, range: &Range<u64>) -> bool {
        let mut within = false;
        let found = self.each_part(run, range, &mut |_, _| within = true);
        found.is_ok() && within
    }

    /// Tells the devices that a run holds nothing of value, in no copy, as far as it lies in a
    /// range of the devices. Returns how many bytes they took notice of.
    ///
    /// # Errors
    /// [`Error::Unmapped`], [`Error::ReadOnly`], or [`Error::Device`], which does no harm.
    pub fn discard(&self, run: Run, range: &Range<u64>) -> Result<u64> {
        self.check_writable()?;
        let mut outcome: Result<u64, Error> = Ok(0);
        self.each_part(run, range, &mut |member, part| {
            let done = member.discard(Physical(part.start), part.end - part.start);
            // Every copy is tried, even after one has failed.
            outcome = match (core::mem::replace(&mut outcome, Ok(0)), done) {
                (Ok(before), Ok(bytes)) => Ok(before + bytes),
                (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            };
        })?;
        outcome
    }

    /// Calls `each` with the parts of all copies of a run that lie in a range, and whose they are.
    fn each_part(
        &self,
        run: Run,
        range: &Range<u64>,
        each: &mut dyn FnMut(&Member, Range<u64>),
    ) -> Result<()> {
        let place = self.locate(run)?;
        for piece in place.pieces() {
            for segment in (0..piece.copies()).map(|copy| piece.segment(copy)) {
                let base = self.first_byte(segment.device);
                let window = range.start.saturating_sub(base)..range.end.saturating_sub(base);
                let at = segment.at.0;
                if let Some(part) = common(&(at..at + segment.bytes), &window) {
                    each(self.member(segment.device), part);
                }
            }
        }
        Ok(())
    }

    /// Takes out what no chunk has at or behind byte `from` of the devices, within `range`: about
    /// the bytes of a chunk, of a free run that has at least `min_bytes` in the range. No chunk is
    /// made of it before [`Pool::discard_held`].
    pub fn hold_unallocated(
        &self,
        from: u64,
        range: &Range<u64>,
        min_bytes: u64,
    ) -> Option<Range<u64>> {
        let mut ledger = self.ledger.lock();
        self.members().iter().find_map(|member| {
            let base = self.first_byte(member.index());
            let window = range.start.saturating_sub(base)..range.end.saturating_sub(base);
            let room = &mut ledger.rooms[usize::from(member.index())];
            let from = from.saturating_sub(base);
            let piece = room.piece(from, &window, min_bytes, self.chunk_bytes())?;
            room.take(Physical(piece.start), piece.end - piece.start, Logical(0))
                .expect("a free piece of a room can be taken");
            Some(base + piece.start..base + piece.end)
        })
    }

    /// Tells the device that what [`Pool::hold_unallocated`] took out holds nothing of value, and
    /// gives it back. Returns how many bytes it took notice of.
    ///
    /// # Errors
    /// [`Error::Device`], which does no harm: it is given back all the same.
    ///
    /// # Panics
    /// When that range was not taken out.
    pub fn discard_held(&self, held: Range<u64>) -> Result<u64> {
        let index = self.device_of(held.start);
        let (at, bytes) = (Physical(held.start - self.first_byte(index)), held.end - held.start);
        let done = self.check_writable().and_then(|()| self.member(index).discard(at, bytes));
        self.ledger.lock().rooms[usize::from(index)].give_back(at, bytes);
        done
    }

    /// Where a device begins in the bytes of all devices.
    fn first_byte(&self, index: u16) -> u64 {
        let before = &self.members()[..usize::from(index)];
        before.iter().map(Member::bytes).sum()
    }

    /// The device that has a byte.
    fn device_of(&self, byte: u64) -> u16 {
        let mut indices = self.members().iter().map(Member::index).rev();
        indices.find(|index| self.first_byte(*index) <= byte).unwrap_or(0)
    }
}
