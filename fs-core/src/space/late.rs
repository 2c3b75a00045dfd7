//! Giving space free late, so that older groups stay readable.
//!
//! What a group freed nobody needs any more once it is published and no reader holds an older root.
//! But the ring still has superblocks of older groups, which name it; and as long as nothing is
//! written there, these groups can be opened. So with plenty of room it is *kept*: it stays pending
//! until the ring has no group that names it.
//!
//! ```text
//! freed by m --m published--> pending --no reader left--> kept --m + 15 published, or--> releasing
//!                                                               room is wanted
//! ```
//!
//! Keeping takes nothing from anybody. What is kept counts as not free for promises, so that all of
//! them hold without it; whoever is refused room has all of it given free before the refusal
//! counts ([`State::is_short`]); and statfs counts it as free. It is given free at once
//!
//! - when the unallocated part of the pool is no more than an eighth: then chunks of one kind may
//!   run out of room while those of the other have plenty;
//! - from the oldest group on, as far as it is more than a quarter of what is still to be had;
//! - or as it is in so many runs that they take memory;
//! - and always where it is in system chunks, of which there are few and small ones: there, next
//!   fit lets it rest long enough.
//!
//! Nothing of this is stored. When a pool is opened, what was kept before is free.

use super::runs::RunSet;
use super::state::{slot, State};
use super::{corrupt, span, ChunkSource};
use crate::format::chunk::ChunkKind;
use crate::format::label::RING_SLOTS;
use crate::units::{Logical, Txg};
use alloc::vec::Vec;

/// What so many groups before the published one need is kept: as many as the ring has besides it.
const GROUPS_KEPT: u64 = RING_SLOTS - 1;
/// Runs that are kept at most: about a megabyte of memory.
const RUNS_MAX: usize = 16384;
/// Only as long as more than this part of the devices is unallocated.
const UNALLOCATED_PART: u64 = 8;
/// No more than this part of what is still to be had.
const KEPT_PART: u64 = 4;

/// What a published group freed.
#[derive(Default)]
pub(super) struct Freed {
    pub set: RunSet,
    /// Bytes of it by kind, once no reader needs it and it is only kept.
    kept: Option<[u64; 3]>,
}

impl Freed {
    pub fn new(set: RunSet) -> Freed {
        Freed { set, kept: None }
    }
}

impl State {
    /// Decides what of that which groups up to `safe` freed is kept. Returns the group up to which
    /// it is given free.
    pub fn keep(&mut self, safe: Txg, source: &dyn ChunkSource) -> Txg {
        let too_old = Txg(self.published.0.saturating_sub(GROUPS_KEPT)).min(safe);
        if core::mem::take(&mut self.is_short) || !self.has_plenty(source) {
            return safe;
        }
        let new: Vec<Txg> = self.pending.range(..=safe).map(|(txg, _)| *txg).collect();
        for txg in new.into_iter().filter(|txg| *txg > too_old) {
            self.look_at(txg);
        }
        let copies = [ChunkKind::Data, ChunkKind::Metadata].map(|kind| source.copies(kind));
        let device_bytes = |freed: &Freed| {
            let [data, metadata, _] = freed.kept.unwrap_or_default();
            data.saturating_mul(copies[0]).saturating_add(metadata.saturating_mul(copies[1]))
        };
        let bytes_max = self.data_left(source).saturating_mul(copies[0]) / KEPT_PART;
        let (mut bytes, mut runs, mut upto) = (0u64, 0usize, too_old);
        // From the youngest to the oldest: what is kept of an older group is of no use when the
        // groups in between cannot be read.
        for (txg, freed) in self.pending.range(..=safe).rev() {
            if *txg <= too_old {
                break;
            }
            bytes = bytes.saturating_add(device_bytes(freed));
            runs = runs.saturating_add(freed.set.count());
            if bytes > bytes_max || runs > RUNS_MAX || freed.kept.is_none() {
                upto = *txg;
                break;
            }
        }
        upto
    }

    /// Whether enough is unallocated that chunks of any kind can be made.
    fn has_plenty(&self, source: &dyn ChunkSource) -> bool {
        let room = self.room(source);
        let owed = room.owed(&self.promised);
        room.unallocated.saturating_sub(owed) > self.device_bytes(&room) / UNALLOCATED_PART
    }

    /// Takes what a group freed of system chunks out, to be given free, and counts the rest.
    fn look_at(&mut self, txg: Txg) {
        let Some(freed) = self.pending.get(&txg) else { return };
        if freed.kept.is_some() || freed.set.count() > RUNS_MAX {
            return;
        }
        let (mut kept, mut system) = ([0; 3], RunSet::default());
        for run in freed.set.to_runs(|at| self.chunk_end(at)) {
            let range = span(run);
            match self.chunk_of(&range).map(|chunk| chunk.kind) {
                Some(ChunkKind::System) => {
                    system.insert(range).expect("runs of one set are disjoint");
                }
                Some(kind) => kept[slot(kind)] += run.bytes,
                None => {}
            }
        }
        let rest = (!system.is_empty()).then(|| freed.set.without(&system));
        if let Some(freed) = self.pending.get_mut(&txg) {
            freed.kept = Some(kept);
            if let Some(rest) = rest {
                freed.set = rest;
            }
        }
        for range in system.iter() {
            if self.releasing.insert(range).is_err() {
                let fault = corrupt("space freed by two groups", Logical(0));
                self.fault.get_or_insert(fault);
            }
        }
    }

    /// Bytes of a kind that are kept, and given free as soon as room is wanted.
    pub fn kept(&self, kind: ChunkKind) -> u64 {
        let kept = self.pending.values().filter_map(|freed| freed.kept);
        kept.map(|bytes| bytes[slot(kind)]).sum()
    }
}
