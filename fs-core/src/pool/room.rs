//! Which bytes of a device belong to chunks.

use crate::error::Error;
use crate::format::chunk::CHUNK_BYTES_MIN;
use crate::format::label::{data_end, DATA_START};
use crate::platform::Result;
use crate::units::{align_down, align_up, Logical, Physical, SECTOR_BYTES};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

/// The space for chunks on one device.
#[derive(Clone, Debug)]
pub struct Room {
    /// End of the space for chunks.
    end: u64,
    /// Taken runs: start to end. They do not overlap and lie in `DATA_START..end`.
    taken: BTreeMap<u64, u64>,
    /// What lies between them, start to end, each as long as it goes: there are far fewer of these.
    gaps: BTreeMap<u64, u64>,
    /// No new chunk gets anything at or behind this byte.
    limit: u64,
}

impl Room {
    /// The room of a device of `bytes` bytes, all of it free.
    pub fn new(bytes: u64) -> Room {
        let end = data_end(bytes);
        let mut gaps = BTreeMap::new();
        if DATA_START < end {
            gaps.insert(DATA_START, end);
        }
        Room { end, taken: BTreeMap::new(), gaps, limit: u64::MAX }
    }

    /// The same room, to try things out in: what is taken cannot be given back there, and what is
    /// tried costs as much as there are gaps.
    pub fn outline(&self) -> Room {
        Room { taken: BTreeMap::new(), gaps: self.gaps.clone(), ..*self }
    }

    /// The first byte that new chunks are kept from.
    pub fn limit(&self) -> u64 {
        self.limit
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
        let last = self.taken_end().max(DATA_START);
        assert!(last <= self.end.max(DATA_START), "chunks end beyond {}", self.end);
        self.gaps.split_off(&last);
        if last < self.end {
            self.gaps.insert(last, self.end);
        }
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
        let around = self.gaps.range(..=at.0).next_back().map(|(start, end)| (*start, *end));
        let Some((start, gap_end)) = around.filter(|(_, gap_end)| end <= *gap_end) else {
            return corrupt("chunk overlaps another on its device");
        };
        self.gaps.remove(&start);
        if start < at.0 {
            self.gaps.insert(start, at.0);
        }
        if end < gap_end {
            self.gaps.insert(end, gap_end);
        }
        self.taken.insert(at.0, end);
        Ok(())
    }

    /// Gives back a run that was taken with the same bounds.
    pub fn give_back(&mut self, at: Physical, bytes: u64) {
        let end = self.taken.remove(&at.0);
        assert!(end == Some(at.0 + bytes), "gave back {at:?}+{bytes}, taken until {end:?}");
        let (mut start, mut end) = (at.0, at.0 + bytes);
        if let Some(after) = self.gaps.remove(&end) {
            end = after;
        }
        let before = self.gaps.range(..start).next_back().map(|(start, end)| (*start, *end));
        if let Some((first, _)) = before.filter(|(_, gap_end)| *gap_end == start) {
            start = first;
        }
        self.gaps.insert(start, end);
    }

    /// Free runs, `(start, end)`, ascending.
    fn gaps(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.gaps.iter().map(|(start, end)| (*start, *end))
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

    /// Every byte is either taken or in a gap, and gaps are as long as they go.
    ///
    /// # Errors
    /// One sentence on the first contradiction.
    pub fn check(&self) -> core::result::Result<(), String> {
        let mut runs: Vec<(u64, u64, bool)> =
            self.taken.iter().map(|(start, end)| (*start, *end, true)).collect();
        runs.extend(self.gaps().map(|(start, end)| (start, end, false)));
        runs.sort_unstable();
        let (mut at, mut was_gap) = (DATA_START, false);
        for (start, end, is_taken) in runs {
            if start != at || end <= start || (was_gap && !is_taken) {
                return Err(format!("the run {start}..{end} of a device follows {at}"));
            }
            (at, was_gap) = (end, !is_taken);
        }
        match at == self.end.max(DATA_START) {
            true => Ok(()),
            false => Err(format!("runs of a device end at {at} instead of {}", self.end)),
        }
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
