//! The allocator's invariants.

use super::bits::Bits;
use super::chunk::ChunkSpace;
use super::state::State;
use super::{BitmapSource, Space};
use crate::error::Error;
use crate::format::chunk::ChunkKind;
use crate::units::{Logical, SECTOR_SHIFT};

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A bitmap could not be had.
    Unreadable(Error),
    /// A number is not what it must be.
    Wrong {
        /// Which.
        what: &'static str,
        /// The chunk or region.
        addr: Logical,
        /// What it must be.
        expected: u64,
        /// What it is.
        found: u64,
    },
}

impl From<Error> for Violation {
    fn from(error: Error) -> Violation {
        Violation::Unreadable(error)
    }
}

fn equal(what: &'static str, addr: Logical, expected: u64, found: u64) -> Result<(), Violation> {
    if expected == found {
        return Ok(());
    }
    Err(Violation::Wrong { what, addr, expected, found })
}

impl Space {
    /// Compares everything in memory with what it can be rebuilt from. Reads the whole space tree
    /// with the lock held: for tests and the checker.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn check(&self, bitmaps: &dyn BitmapSource) -> Result<(), Violation> {
        let state = self.state.lock();
        for chunk in state.chunks.values() {
            check_chunk(&state, chunk, bitmaps)?;
        }
        for kind in [ChunkKind::Data, ChunkKind::Metadata, ChunkKind::System] {
            check_totals(&state, kind)?;
        }
        check_pending(&state)
    }
}

fn check_chunk(
    state: &State,
    chunk: &ChunkSpace,
    bitmaps: &dyn BitmapSource,
) -> Result<(), Violation> {
    let (mut busy, mut tree_used) = (0, 0);
    for region in 0..chunk.region_count() {
        let start = chunk.region_start(region);
        let item = bitmaps.bitmap(start)?;
        let published = Bits::decode(start, chunk.region_sectors(region), item.as_deref())?;
        tree_used += published.used();
        let truth = state.rebuild(chunk, region, item.as_deref())?;
        busy += truth.used();
        if let Some(bits) = chunk.bits(region) {
            let same = u64::from(*bits == truth);
            equal("bitmap in memory is the rebuilt one", start, 1, same)?;
        }
    }
    equal("busy sectors of a chunk", chunk.start, busy.into(), chunk.busy.into())?;
    equal("used sectors in a summary", chunk.start, tree_used.into(), chunk.tree_used.into())?;
    match chunk.wrong_bound() {
        Some((region, bound, truth)) => {
            let addr = chunk.region_start(region);
            equal("bound of the longest free run", addr, truth.into(), bound.into())
        }
        None => Ok(()),
    }
}

fn check_totals(state: &State, kind: ChunkKind) -> Result<(), Violation> {
    let totals = state.totals(kind);
    let mine = || state.chunks.values().filter(|chunk| chunk.kind == kind);
    let busy: u64 = mine().map(|chunk| u64::from(chunk.busy) << SECTOR_SHIFT).sum();
    let bytes: u64 = mine().map(ChunkSpace::bytes).sum();
    equal("chunks of a kind", Logical(0), mine().count() as u64, totals.chunks)?;
    equal("bytes of a kind's chunks", Logical(0), bytes, totals.bytes)?;
    equal("busy bytes of a kind", Logical(0), busy, totals.busy)
}

fn check_pending(state: &State) -> Result<(), Violation> {
    let groups = state.groups.values().flat_map(super::group::Group::deltas);
    let unpublished: u64 = groups.map(|deltas| deltas.freed.bytes()).sum();
    let published: u64 = state.pending.values().map(|freed| freed.set.bytes()).sum();
    let kinds = [ChunkKind::Data, ChunkKind::Metadata, ChunkKind::System];
    let counted = kinds.iter().map(|kind| state.totals(*kind).pending).sum();
    let listed = unpublished + published + state.releasing.bytes();
    equal("bytes freed and not yet reusable", Logical(0), listed, counted)
}
