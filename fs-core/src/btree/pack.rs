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
/// [`apply_bound`](super::Tree::apply_bound) relies on this: there are at most two pieces for each
/// full node that the items came from, and two for each node that the new items alone would fill.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::node::{capacity, footprint, VALUE_BYTES_MAX};
    use proptest::prelude::*;

    fn any_packing() -> impl Strategy<Value = Packing> {
        prop_oneof![Just(Packing::Append), (0..200usize).prop_map(|nodes| Packing::Even { nodes }),]
    }

    proptest! {
        #[test]
        fn pieces_fit_are_not_empty_and_are_not_too_many(
            values in prop_oneof![
                proptest::collection::vec(0..=VALUE_BYTES_MAX, 0..300),
                proptest::collection::vec(0..64usize, 0..3000),
                proptest::collection::vec(
                    prop_oneof![Just(0), Just(VALUE_BYTES_MAX)], 0..300),
            ],
            node_bytes in prop_oneof![Just(16384usize), Just(32768), Just(65536)],
            packing in any_packing(),
        ) {
            let capacity = capacity(node_bytes);
            let sizes: Vec<usize> = values.iter().map(|value| footprint(0, *value)).collect();
            let ends = pack(sizes.iter().copied(), capacity, packing);
            prop_assert_eq!(ends.last().copied().unwrap_or(0), sizes.len());
            let mut start = 0;
            for end in &ends {
                prop_assert!(start < *end);
                let piece: usize = sizes[start..*end].iter().sum();
                prop_assert!(piece <= capacity, "a piece of {} bytes", piece);
                start = *end;
            }
            // What the bound of a batch relies on, whichever part of the items was there before.
            let total: usize = sizes.iter().sum();
            for old in 0..=total / capacity {
                let new = total - old * capacity;
                let most = 2 * old + (2 * new).div_ceil(capacity);
                prop_assert!(ends.len() <= most, "{} pieces of {total} bytes", ends.len());
            }
        }

        #[test]
        fn an_even_division_leaves_no_piece_sparse_by_more_than_an_item(
            values in proptest::collection::vec(0..=VALUE_BYTES_MAX, 10..300),
            nodes in 0..200usize,
        ) {
            let capacity = capacity(16384);
            let sizes: Vec<usize> = values.iter().map(|value| footprint(0, *value)).collect();
            let largest = sizes.iter().max().copied().unwrap_or(0);
            let ends = pack(sizes.iter().copied(), capacity, Packing::Even { nodes });
            prop_assume!(ends.len() > 1);
            let mut start = 0;
            for end in ends {
                let piece: usize = sizes[start..end].iter().sum();
                prop_assert!(piece + largest >= capacity / 2, "a piece of {} bytes", piece);
                start = end;
            }
        }
    }
}
