//! What a transaction group took and freed.

use super::runs::RunSet;
use crate::format::space::Residue;
use crate::units::Logical;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Space taken and freed, coalesced. A range may be in both: it was taken first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Deltas {
    pub taken: RunSet,
    pub freed: RunSet,
}

/// A group that is not published.
#[derive(Default)]
pub(super) struct Group {
    /// What the cut put into the space tree; `None` before the cut.
    pub cut: Option<Arc<Deltas>>,
    /// What happened since the cut, or since the group began.
    pub now: Deltas,
    /// Used sectors of the chunks that the cut changed, as the new summaries say.
    pub summaries: Vec<(Logical, u32)>,
}

impl Group {
    /// Both halves, the one before the cut first.
    pub fn deltas(&self) -> impl Iterator<Item = &Deltas> {
        self.cut.as_deref().into_iter().chain([&self.now])
    }

    /// What the space tree of the group does not know. Space that was both taken and freed since
    /// the cut was free in that tree and is free now, so it is in neither list.
    pub fn residue(&self, chunk_end: impl Fn(u64) -> u64) -> Residue {
        let Deltas { taken, freed } = &self.now;
        Residue {
            taken: taken.without(freed).to_runs(&chunk_end),
            freed: freed.without(taken).to_runs(&chunk_end),
        }
    }
}
