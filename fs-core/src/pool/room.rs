//! Which bytes of a device belong to chunks.

use crate::error::Error;
use crate::format::chunk::CHUNK_BYTES_MIN;
use crate::format::label::{data_end, DATA_START};
use crate::platform::Result;
use crate::units::{align_down, align_up, Logical, Physical, SECTOR_BYTES};
use alloc::collections::BTreeMap;
use core::ops::Range;

/// The space for chunks on one device.
#[derive(Clone, Debug)]
pub struct Room {
    /// End of the space for chunks.
    end: u64,
    /// Taken runs: start to end. They do not overlap and lie in `DATA_START..end`.
    taken: BTreeMap<u64, u64>,
    /// No new chunk gets anything at or behind this byte.
    limit: u64,
}

impl Room {
    /// The room of a device of `bytes` bytes, all of it free.
    pub fn new(bytes: u64) -> Room {
        Room { end: data_end(bytes), taken: BTreeMap::new(), limit: u64::MAX }
    }

    /// Keeps new chunks from everything at or behind a byte.
    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Whether nothing at or behind a byte is taken.
    pub fn is_free_from(&self, from: u64) -> bool {
        self.taken_end() <= from
    }

    /// The end of the last run that is taken.
    pub fn taken_end(&self) -> u64 {
        self.taken.values().next_back().copied().unwrap_or(0)
    }

    /// Makes it the room of a device of `bytes` bytes, with what is taken.
    pub fn set_bytes(&mut self, bytes: u64) {
        self.end = data_end(bytes);
        self.limit = u64::MAX;
        assert!(self.is_free_from(self.end), "chunks end beyond {}", self.end);
    }

    /// Takes a run for the chunk at `owner`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the run is outside the space for chunks or overlaps another.
    pub fn take(&mut self, at: Physical, bytes: u64, owner: Logical) -> Result<()> {
        let corrupt = |what| Err(Error::Corrupt { what, addr: owner });
        let Some(end) = at.0.checked_add(bytes) else {
            return corrupt("chunk beyond the end of its device");
        };
        if at.0 < DATA_START || end > self.end || bytes == 0 {
            return corrupt("chunk outside the device's space for chunks");
        }
        let before = self.taken.range(..end).next_back();
        if before.is_some_and(|(_, taken_end)| *taken_end > at.0) {
            return corrupt("chunk overlaps another on its device");
        }
        self.taken.insert(at.0, end);
        Ok(())
    }

    /// Gives back a run that was taken with the same bounds.
    pub fn give_back(&mut self, at: Physical, bytes: u64) {
        let end = self.taken.remove(&at.0);
        assert!(end == Some(at.0 + bytes), "gave back {at:?}+{bytes}, taken until {end:?}");
    }

    /// Free runs, `(start, end)`, ascending.
    fn gaps(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let starts = core::iter::once(DATA_START).chain(self.taken.values().copied());
        let ends = self.taken.keys().copied().chain(core::iter::once(self.end));
        starts.zip(ends).filter(|(start, end)| start < end)
    }

    /// What is free at or behind `from`, of the first free run that has at least `min_bytes` in
    /// `window`: up to the first multiple of the smallest chunk that is at least `bytes` away from
    /// such a multiple. Nothing but what is left of a free run's ends is lost for chunks then.
    pub fn piece(
        &self,
        from: u64,
        window: &Range<u64>,
        min_bytes: u64,
        bytes: u64,
    ) -> Option<Range<u64>> {
        self.gaps().find_map(|(start, end)| {
            let start = align_up(start.max(window.start), SECTOR_BYTES)?;
            let end = align_down(end.min(window.end), SECTOR_BYTES);
            if start >= end || end - start < min_bytes || end <= from {
                return None;
            }
            let start = align_up(start.max(from), SECTOR_BYTES)?;
            let aligned = align_up(start, CHUNK_BYTES_MIN)?;
            let end = end.min(aligned.saturating_add(bytes));
            (start < end).then_some(start..end)
        })
    }

    /// Free runs that a chunk may use, `(start, end)`, cut to whole granules of the smallest chunk
    /// so that what chunks leave between them stays usable.
    fn holes(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.gaps().filter_map(|(start, end)| {
            let start = align_up(start, CHUNK_BYTES_MIN)?;
            let end = align_down(end.min(self.limit), CHUNK_BYTES_MIN);
            (start < end).then_some((start, end))
        })
    }

    /// Bytes that chunks have.
    pub fn taken_bytes(&self) -> u64 {
        self.taken.iter().map(|(start, end)| end - start).sum()
    }

    /// Bytes that new chunks could take.
    pub fn usable(&self) -> u64 {
        self.holes().map(|(start, end)| end - start).sum()
    }

    /// The lowest place for `bytes`.
    pub fn lowest(&self, bytes: u64) -> Option<Physical> {
        self.holes().find(|(start, end)| end - start >= bytes).map(|(start, _)| Physical(start))
    }

    /// The highest place for `bytes`, a multiple of the granule.
    pub fn highest(&self, bytes: u64) -> Option<Physical> {
        self.holes()
            .filter(|(start, end)| end - start >= bytes)
            .last()
            .map(|(_, end)| Physical(end - bytes))
    }
}
