//! How many nodes a batch may write, known before it is applied.

use super::{NodeSource, Tree, Walk};
use crate::format::node::{capacity, footprint, ENTRY_BYTES};
use crate::format::ptr::LEVELS_MAX;
use crate::platform::Result;
use core::cmp::Ordering;

/// How large a tree is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Leaves at most.
    pub leaves: u64,
    /// Level of the root.
    pub height: u8,
}

impl Shape {
    /// As [`Tree::apply_bound`], for a tree of that shape: for edits and the bytes of their values.
    pub fn apply_bound(&self, edits: u64, value_bytes: u64, node_bytes: usize) -> u64 {
        let existing = |level: u8| match self.height.cmp(&level) {
            Ordering::Greater => self.leaves,
            Ordering::Equal if level > 0 => 1,
            Ordering::Equal => self.leaves,
            Ordering::Less => 0,
        };
        bound(self.height, (edits, value_bytes), node_bytes, &existing)
    }
}

fn bound(
    height: u8,
    (edits, value_bytes): (u64, u64),
    node_bytes: usize,
    existing: &dyn Fn(u8) -> u64,
) -> u64 {
    if edits == 0 {
        return 0;
    }
    let capacity = capacity(node_bytes) as u64;
    let nodes_for = |bytes: u64| bytes.saturating_mul(2).div_ceil(capacity);

    let mut new_bytes = edits.saturating_mul(footprint(0, 0) as u64).saturating_add(value_bytes);
    let mut total: u64 = 0;
    for level in 0..LEVELS_MAX {
        let touched = existing(level).min(edits).saturating_mul(2);
        let written = touched.saturating_add(nodes_for(new_bytes));
        total = total.saturating_add(written);
        if level >= height && written <= 1 {
            break;
        }
        new_bytes = written.saturating_mul(ENTRY_BYTES as u64);
    }
    total
}

impl Tree {
    /// How large the tree is. Reads the root only: of a tree of more than two levels it says that
    /// it has more leaves than are ever touched.
    ///
    /// # Errors
    /// What loading a node gives.
    pub fn shape(&self, source: &dyn NodeSource) -> Result<Shape> {
        let Some(root) = self.root else { return Ok(Shape::default()) };
        let leaves = match root.level {
            0 => 1,
            1 => source.load(self.id, &root)?.count() as u64,
            _ => u64::MAX,
        };
        Ok(Shape { leaves, height: root.level })
    }

    /// An upper bound on the nodes that [`apply`](Tree::apply) allocates for `edits` edits that put
    /// `value_bytes` bytes of values in all.
    ///
    /// On each level, at most one node is touched for each edit, and not more than a full tree has
    /// there. Touched nodes become at most twice as many, and new items fill at most twice the
    /// nodes that they need (see `pack`); a neighbour that is taken in comes
    /// with a node that has shrunk, and the two become at most two.
    pub fn apply_bound(&self, edits: usize, value_bytes: usize, node_bytes: usize) -> u64 {
        let fanout = (capacity(node_bytes) / ENTRY_BYTES) as u64;
        let height = self.root.map_or(0, |root| root.level);
        let existing = |level: u8| match height.checked_sub(level) {
            Some(above) => fanout.saturating_pow(u32::from(above)),
            None => 0,
        };
        bound(height, (edits as u64, value_bytes as u64), node_bytes, &existing)
    }

    /// As [`apply_bound`](Tree::apply_bound), with the nodes there really are: reads the interior
    /// ones. For a tree of few nodes the difference is large.
    ///
    /// # Errors
    /// What loading a node gives.
    pub fn apply_bound_exact(
        &self,
        source: &dyn NodeSource,
        edits: usize,
        value_bytes: usize,
    ) -> Result<u64> {
        let mut counts = [0u64; LEVELS_MAX as usize];
        if self.root.is_some_and(|root| root.level == 0) {
            counts[0] = 1;
        } else {
            self.walk(source, &mut |visit| {
                let node = visit.node.map_err(Clone::clone)?;
                counts[usize::from(node.level())] += 1;
                if node.level() > 1 {
                    return Ok(Walk::Down);
                }
                counts[0] += node.count() as u64;
                Ok(Walk::Over)
            })?;
        }
        let existing = |level: u8| counts.get(usize::from(level)).copied().unwrap_or(0);
        let height = self.root.map_or(0, |root| root.level);
        Ok(bound(height, (edits as u64, value_bytes as u64), source.node_bytes(), &existing))
    }
}
