//! The cut: a group's edits to the space tree.
//!
//! The edits are computed from the published tree, not from the bitmaps in memory: what is written
//! is then right by itself, and every disagreement between the two (a block freed twice, a free of
//! what was free) shows as an error before anything is published.

use super::bits::Bits;
use super::chunk::ChunkSpace;
use super::group::Deltas;
use super::state::{apply_exact, State};
use super::{corrupt, BitmapSource, Space};
use crate::error::Error;
use crate::format::key::{kind, Key};
use crate::format::space::{SummaryItem, REGION_BYTES};
use crate::platform::Result;
use crate::units::{Logical, Txg, SECTOR_SHIFT};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

/// An edit of the space tree: `None` deletes the item.
pub type Edit = (Key, Option<Vec<u8>>);

/// Key of a region's bitmap.
pub(super) fn bitmap_key(region: Logical) -> Key {
    Key::new(region.0, kind::SPACE_BITMAP, 0)
}

/// Key of a chunk's summary.
pub(super) fn summary_key(chunk: Logical) -> Key {
    Key::new(0, kind::SPACE_SUMMARY, chunk.0)
}

fn summary(used: u32) -> Vec<u8> {
    SummaryItem { used_sectors: u64::from(used), reserved: 0 }.to_bytes().to_vec()
}

/// A chunk as the cut sees it; a copy, so that the tree can be read without the lock.
struct CutChunk {
    start: Logical,
    span: Range<u64>,
    regions: Vec<Range<u64>>,
    tree_used: u32,
    in_tree: bool,
    dropped: bool,
}

impl CutChunk {
    fn of(chunk: &ChunkSpace, touched: impl Fn(&Range<u64>) -> bool, dropped: bool) -> CutChunk {
        let all = (0..chunk.region_count()).map(|region| chunk.region_span(region));
        CutChunk {
            start: chunk.start,
            span: chunk.span(),
            regions: all.filter(|window| dropped || touched(window)).collect(),
            tree_used: chunk.tree_used,
            in_tree: chunk.in_tree,
            dropped,
        }
    }

    fn is_idle(&self) -> bool {
        self.regions.is_empty() && self.in_tree
    }
}

/// What a cut works on.
struct Plan {
    chunks: Vec<CutChunk>,
    /// What the published tree does not know.
    residue: Arc<Deltas>,
    /// What the group took and freed.
    group: Arc<Deltas>,
}

/// What a cut makes.
#[derive(Default)]
struct Outcome {
    edits: BTreeMap<Key, Option<Vec<u8>>>,
    summaries: Vec<(Logical, u32)>,
    /// Bytes of the plan's lists that were found in chunks.
    residue_bytes: u64,
    group_bytes: u64,
}

fn bytes_within(deltas: &Deltas, window: &Range<u64>) -> u64 {
    let sets = [&deltas.taken, &deltas.freed];
    let parts = sets.into_iter().flat_map(|set| set.within(window.clone()));
    parts.map(|part| part.end - part.start).sum()
}

impl State {
    fn plan(&mut self, txg: Txg) -> Result<Plan> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        let first = self.groups.keys().next().is_none_or(|first| *first >= txg);
        if txg <= self.published || !first {
            return Err(Error::Argument { what: "cut of a group out of turn" });
        }
        let group = self.groups.entry(txg).or_default();
        if group.cut.is_some() {
            return Err(Error::Argument { what: "second cut of a group" });
        }
        let deltas = Arc::new(core::mem::take(&mut group.now));
        group.cut = Some(deltas.clone());
        let residue = self.residue.clone();
        let touched = |window: &Range<u64>| {
            let mut sets = [&residue, &deltas].into_iter().flat_map(|d| [&d.taken, &d.freed]);
            sets.any(|set| set.touches(window.clone()))
        };
        let living = self.chunks.values().filter(|chunk| chunk.birth <= txg);
        let living = living.map(|chunk| CutChunk::of(chunk, touched, false));
        let dead = self.dropped.values().filter(|dropped| dropped.txg == txg);
        let dead = dead.map(|dropped| CutChunk::of(&dropped.space, touched, true));
        let chunks = living.chain(dead).filter(|chunk| !chunk.is_idle()).collect();
        Ok(Plan { chunks, residue: residue.clone(), group: deltas.clone() })
    }
}

impl Plan {
    fn carry_out(&self, bitmaps: &dyn BitmapSource) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        for chunk in &self.chunks {
            outcome.residue_bytes += bytes_within(&self.residue, &chunk.span);
            outcome.group_bytes += bytes_within(&self.group, &chunk.span);
            if chunk.dropped {
                delete_chunk(chunk, bitmaps, &mut outcome)?;
            } else {
                self.update_chunk(chunk, bitmaps, &mut outcome)?;
            }
        }
        let total = |deltas: &Deltas| deltas.taken.bytes() + deltas.freed.bytes();
        if outcome.residue_bytes != total(&self.residue)
            || outcome.group_bytes != total(&self.group)
        {
            return Err(corrupt("space taken or freed in no chunk of the group", Logical(0)));
        }
        Ok(outcome)
    }

    fn update_chunk(
        &self,
        chunk: &CutChunk,
        bitmaps: &dyn BitmapSource,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let (mut more, mut fewer) = (0, 0);
        for window in &chunk.regions {
            let start = Logical(window.start);
            let sectors = ((window.end - window.start) >> SECTOR_SHIFT) as u32;
            let item = bitmaps.bitmap(start)?;
            let before = Bits::decode(start, sectors, item.as_deref())?;
            let mut bits = before.clone();
            for deltas in [&self.residue, &self.group] {
                let change = apply_exact(&mut bits, window, deltas)?;
                more += change.0;
                fewer += change.1;
            }
            if bits != before {
                let value = (bits.used() > 0).then(|| bits.encode());
                outcome.edits.insert(bitmap_key(start), value);
            }
        }
        let sectors = ((chunk.span.end - chunk.span.start) >> SECTOR_SHIFT) as u32;
        // At most 2^18 sectors a chunk, each counted at most twice: the sum cannot overflow.
        let used = (chunk.tree_used + more).checked_sub(fewer).filter(|used| *used <= sectors);
        let used = used.ok_or(corrupt("chunk summary disagrees with its bitmaps", chunk.start))?;
        if used != chunk.tree_used || !chunk.in_tree {
            outcome.edits.insert(summary_key(chunk.start), Some(summary(used)));
            outcome.summaries.push((chunk.start, used));
        }
        Ok(())
    }
}

fn delete_chunk(chunk: &CutChunk, bitmaps: &dyn BitmapSource, outcome: &mut Outcome) -> Result<()> {
    for window in &chunk.regions {
        let start = Logical(window.start);
        if bitmaps.bitmap(start)?.is_some() {
            outcome.edits.insert(bitmap_key(start), None);
        }
    }
    if chunk.in_tree {
        outcome.edits.insert(summary_key(chunk.start), None);
    }
    Ok(())
}

impl Space {
    /// At most how many edits the cut of group `txg` would have now.
    pub fn cut_bound(&self, txg: Txg) -> usize {
        let state = self.state.lock();
        let group = state.groups.get(&txg);
        let deltas = group.into_iter().flat_map(|group| group.deltas()).chain([&*state.residue]);
        let regions: u64 = deltas
            .flat_map(|deltas| deltas.taken.iter().chain(deltas.freed.iter()))
            // A bitmap for each region the run is in, and a summary.
            .map(|run| (run.end - run.start) / REGION_BYTES + 3)
            .sum();
        // Every region and every chunk once, however many runs there are.
        let most: u64 = state.chunks.values().map(|c| u64::from(c.region_count()) + 1).sum();
        let gone = state.dropped.values().map(|dropped| &dropped.space);
        let dropped: u64 = gone.map(|c| u64::from(c.region_count()) + 1).sum();
        usize::try_from(regions.min(most) + dropped).unwrap_or(usize::MAX)
    }

    /// The edits that bring the published space tree to: the residue folded in, what group `txg`
    /// took so far set, what it freed so far clear. Ascending by key. What the group takes and
    /// frees from now on goes to its residue. Reads the space tree, without the lock.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the group freed what was not in use or freed it twice, or when the
    /// stored space tree contradicts itself. Nothing may be published then.
    pub fn cut(&self, txg: Txg, bitmaps: &dyn BitmapSource) -> Result<Vec<Edit>> {
        let plan = self.state.lock().plan(txg)?;
        let outcome = plan.carry_out(bitmaps)?;
        let mut state = self.state.lock();
        state.groups.entry(txg).or_default().summaries = outcome.summaries;
        Ok(outcome.edits.into_iter().collect())
    }
}
