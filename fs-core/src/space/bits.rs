//! One region's bitmap: a bit a sector, set when used.

use crate::error::Error;
use crate::format::space::REGION_BYTES;
use crate::format::{rule, BadBytes};
use crate::units::{Logical, SECTOR_SHIFT};
use alloc::vec::Vec;
use core::ops::Range;

/// Sectors of a full region.
pub(super) const REGION_SECTORS: u32 = (REGION_BYTES >> SECTOR_SHIFT) as u32;

const WORD: u32 = u64::BITS;

/// A bitmap in memory. Its sectors are a multiple of 64, because chunks are multiples of 1 MiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
}

/// A run of free sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreeRun {
    pub start: u32,
    pub len: u32,
}

impl Bits {
    /// All free.
    pub fn free(sectors: u32) -> Result<Bits, Error> {
        debug_assert!(sectors % WORD == 0, "{sectors} sectors are no whole words");
        let count = (sectors / WORD) as usize;
        let mut words = Vec::new();
        words.try_reserve_exact(count).map_err(|_| Error::Memory)?;
        words.resize(count, 0);
        Ok(Bits { words })
    }

    /// The bitmap of the region at `at` as the space tree holds it; no item means free.
    pub fn decode(at: Logical, sectors: u32, item: Option<&[u8]>) -> Result<Bits, Error> {
        let mut bits = Bits::free(sectors)?;
        let Some(bytes) = item else { return Ok(bits) };
        rule(bytes.len() == sectors as usize / 8, "space bitmap of the wrong length")
            .map_err(|bad: BadBytes| bad.at(at))?;
        for (word, bytes) in bits.words.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut raw = [0; 8];
            raw.copy_from_slice(bytes);
            *word = u64::from_le_bytes(raw);
        }
        Ok(bits)
    }

    /// The bitmap as an item's value.
    pub fn encode(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    pub fn sectors(&self) -> u32 {
        self.words.len() as u32 * WORD
    }

    /// Number of used sectors.
    pub fn used(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Marks as used; returns how many were free before.
    pub fn set(&mut self, range: Range<u32>) -> u32 {
        let mut changed = 0;
        for (index, mask) in masks(range) {
            changed += (mask & !self.words[index]).count_ones();
            self.words[index] |= mask;
        }
        changed
    }

    /// Marks as free; returns how many were used before.
    pub fn clear(&mut self, range: Range<u32>) -> u32 {
        let mut changed = 0;
        for (index, mask) in masks(range) {
            changed += (mask & self.words[index]).count_ones();
            self.words[index] &= !mask;
        }
        changed
    }

    /// Whether all of a range is free.
    pub fn is_free(&self, range: Range<u32>) -> bool {
        masks(range).all(|(index, mask)| self.words[index] & mask == 0)
    }

    /// The first free sector from `at` on, or the number of sectors.
    pub fn next_free(&self, at: u32) -> u32 {
        self.next(at, |word| !word)
    }

    /// The first used sector from `at` on, or the number of sectors.
    pub fn next_used(&self, at: u32) -> u32 {
        self.next(at, |word| word)
    }

    fn next(&self, at: u32, wanted: impl Fn(u64) -> u64) -> u32 {
        if at >= self.sectors() {
            return self.sectors();
        }
        let mut index = (at / WORD) as usize;
        let mut word = wanted(self.words[index]) & (u64::MAX << (at % WORD));
        while word == 0 {
            index += 1;
            match self.words.get(index) {
                Some(next) => word = wanted(*next),
                None => return self.sectors(),
            }
        }
        index as u32 * WORD + word.trailing_zeros()
    }

    /// The end of the last used sector before `at`, or zero.
    fn used_end_before(&self, at: u32) -> u32 {
        if at == 0 {
            return 0;
        }
        let mut index = ((at - 1) / WORD) as usize;
        let mut word = self.words[index] & (u64::MAX >> (WORD - 1 - (at - 1) % WORD));
        while word == 0 {
            if index == 0 {
                return 0;
            }
            index -= 1;
            word = self.words[index];
        }
        (index as u32 + 1) * WORD - word.leading_zeros()
    }

    /// Free runs from `at` on.
    pub fn free_runs(&self, at: u32) -> impl Iterator<Item = FreeRun> + '_ {
        let mut at = at;
        core::iter::from_fn(move || {
            let start = self.next_free(at);
            if start == self.sectors() {
                return None;
            }
            at = self.next_used(start);
            Some(FreeRun { start, len: at - start })
        })
    }

    /// The first free run from `from` on of at least `want` sectors; else the length of the
    /// longest that was seen.
    pub fn first_fit(&self, from: u32, want: u32) -> Result<FreeRun, u32> {
        let mut longest = 0;
        for run in self.free_runs(from) {
            if run.len >= want {
                return Ok(run);
            }
            longest = longest.max(run.len);
        }
        Err(longest)
    }

    /// Length of the free run that contains `range`, which is free.
    pub fn free_around(&self, range: Range<u32>) -> u32 {
        self.next_used(range.end) - self.used_end_before(range.start)
    }
}

/// The words a range touches, each with the bits of the range in it.
fn masks(range: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = range.start;
    core::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let first = at % WORD;
        let count = (WORD - first).min(range.end - at);
        let index = (at / WORD) as usize;
        at += count;
        Some((index, (u64::MAX >> (WORD - count)) << first))
    })
}
