//! How many nodes a batch may write, known before it is applied.

use super::Tree;
use crate::format::node::{capacity, footprint, ENTRY_BYTES};
use crate::format::ptr::LEVELS_MAX;

impl Tree {
    /// An upper bound on the nodes that [`apply`](Tree::apply) allocates for `edits` edits that put
    /// `value_bytes` bytes of values in all.
    ///
    /// On each level, at most one node is touched for each edit, and not more than a full tree has
    /// there. Touched nodes become at most twice as many, and new items fill at most twice the
    /// nodes that they need (see `pack`); a neighbour that is taken in comes
    /// with a node that has shrunk, and the two become at most two.
    pub fn apply_bound(&self, edits: usize, value_bytes: usize, node_bytes: usize) -> u64 {
        if edits == 0 {
            return 0;
        }
        let capacity = capacity(node_bytes) as u64;
        let fanout = capacity / ENTRY_BYTES as u64;
        let height = self.root.map_or(0, |root| root.level);
        let nodes_for = |bytes: u64| (2 * bytes).div_ceil(capacity);

        let mut new_bytes = edits as u64 * footprint(0, 0) as u64 + value_bytes as u64;
        let mut total = 0;
        for level in 0..LEVELS_MAX {
            let existing = match height.checked_sub(level) {
                Some(above) => fanout.saturating_pow(u32::from(above)),
                None => 0,
            };
            let written = 2 * existing.min(edits as u64) + nodes_for(new_bytes);
            total += written;
            if level >= height && written <= 1 {
                break;
            }
            new_bytes = written * ENTRY_BYTES as u64;
        }
        total
    }
}
