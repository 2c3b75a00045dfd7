//! Dividing a row of items among nodes.

use alloc::vec::Vec;

/// How full to make nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// The items go on growing at their right end: fill each node before starting the next, so that
    /// what is left behind is dense.
    Append,
    /// Changes may come anywhere: divide evenly, over as many nodes as there were if that gives a
    /// reasonable fill.
    Even {
        /// Nodes the items came from.
        nodes: usize,
    },
}

/// A node emptier than this is joined with a neighbour when it shrinks.
pub(super) const fn sparse_bytes(capacity: usize) -> usize {
    capacity / 3
}

/// Divides items of those `sizes` into nodes of `capacity`; returns for each node the index after
/// its last item. No item is larger than a third of `capacity`.
///
/// [`apply_bound`](super::Tree::apply_bound) relies on there being at most `2 * nodes` pieces when
/// the items came from `nodes` full nodes and as many more items.
pub(super) fn pack(
    sizes: impl ExactSizeIterator<Item = usize> + Clone,
    capacity: usize,
    packing: Packing,
) -> Vec<usize> {
    let count = sizes.len();
    let total: usize = sizes.clone().sum();
    if count == 0 {
        return Vec::new();
    }
    if total <= capacity {
        return Vec::from([count]);
    }
    match packing {
        Packing::Append => pack_append(sizes, capacity - capacity / 20),
        Packing::Even { nodes } => {
            let largest = sizes.clone().max().unwrap_or(0);
            // A piece exceeds its share by less than the largest item, so this many suffice...
            let dense = total.div_ceil(capacity - largest);
            // ...and this many leave room for what comes next.
            let loose = total.div_ceil(capacity - largest.max(capacity / 7));
            pack_even(sizes, total, nodes.clamp(dense, loose))
        }
    }
}

fn pack_append(sizes: impl ExactSizeIterator<Item = usize>, limit: usize) -> Vec<usize> {
    let count = sizes.len();
    let mut ends = Vec::new();
    let mut filled = 0;
    for (index, size) in sizes.enumerate() {
        if filled + size > limit {
            ends.push(index);
            filled = 0;
        }
        filled += size;
    }
    ends.push(count);
    ends
}

/// Cuts at the item boundaries nearest to each multiple of `total / pieces`. Cutting at multiples
/// of the whole, not by what is left, keeps rounding from adding up.
fn pack_even(
    sizes: impl ExactSizeIterator<Item = usize>,
    total: usize,
    pieces: usize,
) -> Vec<usize> {
    let count = sizes.len();
    let mut ends = Vec::with_capacity(pieces);
    let mut before = 0;
    for (index, size) in sizes.enumerate() {
        // Doubled, to compare with the middle of the item.
        let middle = 2 * before + size;
        let cut = 2 * total * (ends.len() + 1) / pieces;
        if middle > cut && ends.len() + 1 < pieces && ends.last() != Some(&index) {
            ends.push(index);
        }
        before += size;
    }
    ends.push(count);
    ends
}
