//! What the allocator knows of one chunk.
//!
//! Bitmaps of regions come and go (they can be rebuilt at any time); what stays are the counter of
//! busy sectors and, per region and for the chunk, an *upper bound* of the longest free run. The
//! bound makes a failed search pay for the next one: a region that was scanned in vain is not
//! scanned again until space in it is released.

use super::bits::{Bits, FreeRun, REGION_SECTORS};
use crate::error::Error;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::units::{Logical, Txg, SECTOR_SHIFT};
use alloc::vec::Vec;
use core::ops::Range;

/// A region: at most [`REGION_SECTORS`] of a chunk.
#[derive(Default)]
struct Region {
    /// Used, taken, or not yet reusable. `None` when not in memory.
    bits: Option<Bits>,
    /// No free run is longer.
    longest: u32,
    /// Looked at since the eviction hand last passed.
    touched: bool,
}

/// A chunk.
pub(super) struct ChunkSpace {
    pub start: Logical,
    pub sectors: u32,
    pub kind: ChunkKind,
    pub birth: Txg,
    /// Device bytes a logical byte takes.
    pub copies: u64,
    /// Sectors that cannot be handed out, whether or not their bitmaps are in memory.
    pub busy: u32,
    /// Used sectors according to the published space tree.
    pub tree_used: u32,
    /// Whether the published space tree has a summary of the chunk.
    pub in_tree: bool,
    /// No free run of any region is longer.
    longest: u32,
    /// Empty until first looked at.
    regions: Vec<Region>,
}

/// What a search in a chunk came to.
pub(super) enum Find {
    /// This run, in sectors from the start of the chunk.
    At(FreeRun),
    /// This region's bitmap is needed first.
    Load(u32),
    /// There is none.
    Nothing,
}

impl ChunkSpace {
    pub fn new(chunk: &Chunk, used: u32, in_tree: bool) -> ChunkSpace {
        let sectors = (chunk.length >> SECTOR_SHIFT) as u32;
        ChunkSpace {
            start: chunk.logical,
            sectors,
            kind: chunk.kind,
            birth: chunk.birth,
            copies: chunk.profile.copies(),
            busy: used,
            tree_used: used,
            in_tree,
            longest: sectors.min(REGION_SECTORS),
            regions: Vec::new(),
        }
    }

    pub fn bytes(&self) -> u64 {
        u64::from(self.sectors) << SECTOR_SHIFT
    }

    pub fn span(&self) -> Range<u64> {
        self.start.0..self.start.0 + self.bytes()
    }

    pub fn free(&self) -> u32 {
        self.sectors - self.busy
    }

    pub fn region_count(&self) -> u32 {
        self.sectors.div_ceil(REGION_SECTORS)
    }

    pub fn region_sectors(&self, region: u32) -> u32 {
        (self.sectors - region * REGION_SECTORS).min(REGION_SECTORS)
    }

    pub fn region_start(&self, region: u32) -> Logical {
        Logical(self.start.0 + (u64::from(region * REGION_SECTORS) << SECTOR_SHIFT))
    }

    pub fn region_span(&self, region: u32) -> Range<u64> {
        let start = self.region_start(region).0;
        start..start + (u64::from(self.region_sectors(region)) << SECTOR_SHIFT)
    }

    /// The sectors of a byte range that lies in the chunk.
    pub fn sectors_of(&self, range: Range<u64>) -> Range<u32> {
        let sector = |at: u64| ((at - self.start.0) >> SECTOR_SHIFT) as u32;
        sector(range.start)..sector(range.end)
    }

    pub fn bits(&self, region: u32) -> Option<&Bits> {
        self.regions.get(region as usize)?.bits.as_ref()
    }

    /// No free run of the region is longer.
    pub fn region_bound(&self, region: u32) -> u32 {
        let known = self.regions.get(region as usize).map(|region| region.longest);
        known.unwrap_or(self.region_sectors(region))
    }

    pub fn insert_bits(&mut self, region: u32, bits: Bits) -> Result<(), Error> {
        self.open_regions()?;
        let region = &mut self.regions[region as usize];
        region.bits = Some(bits);
        region.touched = true;
        Ok(())
    }

    /// Forgets a region's bitmap unless it was looked at since the last call. True when it is gone.
    pub fn evict(&mut self, region: u32, even_touched: bool) -> bool {
        let Some(region) = self.regions.get_mut(region as usize) else { return true };
        if core::mem::take(&mut region.touched) && !even_touched {
            return false;
        }
        region.bits = None;
        true
    }

    fn open_regions(&mut self) -> Result<(), Error> {
        if !self.regions.is_empty() {
            return Ok(());
        }
        let count = self.region_count();
        self.regions.try_reserve_exact(count as usize).map_err(|_| Error::Memory)?;
        for index in 0..count {
            let longest = self.region_sectors(index);
            self.regions.push(Region { longest, ..Region::default() });
        }
        Ok(())
    }

    /// No run longer than this can be found; with `loads` unset, in the regions in memory.
    pub fn reach(&self, loads: bool) -> u32 {
        let longest = if loads {
            self.longest
        } else {
            let known = self.regions.iter().filter(|r| r.bits.is_some());
            known.map(|r| r.longest).max().unwrap_or(0)
        };
        longest.min(self.free())
    }

    /// Looks for a free run of `want` sectors, first from the sector `from` on. After `Nothing`,
    /// [`reach`](Self::reach) is less than `want`.
    pub fn find(&mut self, from: u32, want: u32, loads: bool) -> Result<Find, Error> {
        self.open_regions()?;
        let from = if from < self.sectors { from } else { 0 };
        let first = from / REGION_SECTORS;
        let tail =
            (first..self.region_count()).map(|r| (r, from.saturating_sub(r * REGION_SECTORS)));
        // The region of the cursor is looked at again, whole: only that makes its bound exact.
        let again = (0..=first).map(|r| (r, 0));
        for (region, skip) in tail.chain(again) {
            match self.find_in(region, skip, want, loads) {
                Find::Nothing => {}
                found => return Ok(found),
            }
        }
        self.longest = self.regions.iter().map(|r| r.longest).max().unwrap_or(0);
        Ok(Find::Nothing)
    }

    fn find_in(&mut self, index: u32, skip: u32, want: u32, loads: bool) -> Find {
        let region = &mut self.regions[index as usize];
        if region.longest < want {
            return Find::Nothing;
        }
        let Some(bits) = &region.bits else {
            return if loads { Find::Load(index) } else { Find::Nothing };
        };
        region.touched = true;
        match bits.first_fit(skip, want) {
            Ok(run) => Find::At(FreeRun { start: run.start + index * REGION_SECTORS, ..run }),
            Err(longest) => {
                if skip == 0 {
                    region.longest = longest;
                }
                Find::Nothing
            }
        }
    }

    /// Cuts a range of sectors at region boundaries: region, sectors within it.
    pub fn parts(range: Range<u32>) -> impl Iterator<Item = (u32, Range<u32>)> {
        let mut at = range.start;
        core::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let (region, first) = (at / REGION_SECTORS, at % REGION_SECTORS);
            let count = (REGION_SECTORS - first).min(range.end - at);
            at += count;
            Some((region, first..first + count))
        })
    }

    /// Marks sectors whose regions are in memory and which are free there.
    pub fn occupy(&mut self, range: Range<u32>) {
        for (region, part) in ChunkSpace::parts(range) {
            let bits = self.regions[region as usize].bits.as_mut();
            let bits = bits.expect("a region is in memory while space in it is handed out");
            let count = part.end - part.start;
            let changed = bits.set(part);
            assert!(changed == count, "{count} sectors handed out of which {changed} were free");
        }
    }

    /// Makes sectors free, in those regions that are in memory, and raises the bounds.
    pub fn vacate(&mut self, range: Range<u32>) {
        for (index, part) in ChunkSpace::parts(range) {
            let whole = self.region_sectors(index);
            let Some(region) = self.regions.get_mut(index as usize) else {
                self.longest = self.longest.max(whole);
                continue;
            };
            let longest = match &mut region.bits {
                Some(bits) => {
                    bits.clear(part.clone());
                    bits.free_around(part)
                }
                None => whole,
            };
            region.longest = region.longest.max(longest);
            self.longest = self.longest.max(region.longest);
        }
    }

    /// Upper bounds that are too low: region, bound, truth. For [`super::Space::check`].
    pub fn wrong_bound(&self) -> Option<(u32, u32, u32)> {
        self.regions.iter().zip(0..).find_map(|(region, index)| {
            let truth = match &region.bits {
                Some(bits) => bits.free_runs(0).map(|run| run.len).max().unwrap_or(0),
                None => 0,
            };
            let bound = region.longest.min(self.longest);
            (bound < truth).then_some((index, bound, truth))
        })
    }
}
