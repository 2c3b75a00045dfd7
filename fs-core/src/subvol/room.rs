//! Room in trees for what a group makes of extents: bounds that operations reserve by.
//!
//! What counts is how many pieces and references an operation touches, not how long they are:
//!
//! - a piece that is put becomes an item of the subvolume's tree;
//! - a run that gains or loses a reference may change items of the tree of references, and cut
//!   those in which it begins and ends;
//! - a reference that a snapshot has goes to the dead list when it is dropped.
//!
//! Who counts pieces does it before room is reserved, which may wait, and counts again when nothing
//! can change any more.

use crate::btree::{NodeSource, Shape, Tree};
use crate::format::extent::{Extent, ExtentHeader};
use crate::format::node::{capacity, footprint};
use crate::format::space::RefItem;
use crate::subvol::extents::{self, Place, Segment};
use crate::subvol::inode::Inode;
use crate::subvol::store::{Result, Store};
use crate::subvol::Subvol;
use crate::units::SECTOR_BYTES;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, Ordering};

/// Bytes of the largest checksum.
const CHECKSUM_BYTES_MAX: usize = 32;
/// Reference items that come where a run gains or loses a reference: those in which it begins and
/// ends are cut. They are neighbours, so not more leaves change than that either.
const REF_EDITS: u64 = 2;

/// Bytes of an item of a dead list with one entry, at most.
const DEAD_ITEM_BYTES: u64 = 96;
/// Nodes above the leaves of dead lists that a change touches.
const DEAD_PATH_NODES: u64 = 3;
/// So few extents need not be counted.
const COUNTED_EXTENTS: u64 = 64;

/// What pieces of a file come to when a group writes items for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Those that have a place on the device.
    pub extents: u64,
    /// Bytes in memory.
    pub unwritten: u64,
    /// Bytes of all their items.
    item_bytes: u64,
}

impl Pieces {
    /// Counts parts of a file.
    pub fn of(segments: &[Segment]) -> Pieces {
        let mut pieces = Pieces::default();
        for segment in segments {
            let (count, value) = match &segment.place {
                // At worst free space is in sectors.
                Place::Memory(_) => {
                    pieces.unwritten += segment.len;
                    (segment.len / SECTOR_BYTES, ExtentHeader::BYTES + CHECKSUM_BYTES_MAX)
                }
                Place::Extent(extent) => {
                    pieces.extents += 1;
                    (1, value_bytes(extent))
                }
                Place::Zeros { .. } => (1, ExtentHeader::BYTES),
            };
            pieces.item_bytes += count * footprint(0, value) as u64;
        }
        pieces
    }

    /// Whether room for `other` is enough.
    pub fn is_within(&self, other: &Pieces) -> bool {
        self.extents <= other.extents
            && self.unwritten <= other.unwritten
            && self.item_bytes <= other.item_bytes
    }
}

/// Bytes of an extent's value in its item, at most.
fn value_bytes(extent: &Extent) -> usize {
    let tail = match extent {
        Extent::Inline { bytes, .. } => bytes.len(),
        Extent::Plain { checksums, .. } => checksums.len(),
        Extent::Packed { .. } => CHECKSUM_BYTES_MAX,
        Extent::Promised { .. } => 0,
    };
    ExtentHeader::BYTES + tail
}

/// How large a published tree is, for who reserves room in it.
#[derive(Default)]
pub struct KnownShape {
    leaves: AtomicU64,
    height: AtomicU8,
}

impl KnownShape {
    /// What it is from now on.
    pub fn set(&self, shape: Shape) {
        self.leaves.store(shape.leaves, Ordering::Relaxed);
        self.height.store(shape.height, Ordering::Relaxed);
    }

    /// What it is.
    pub fn get(&self) -> Shape {
        let (leaves, height) = (&self.leaves, &self.height);
        Shape { leaves: leaves.load(Ordering::Relaxed), height: height.load(Ordering::Relaxed) }
    }
}

/// What is known of the tree of references.
#[derive(Default)]
pub(super) struct References {
    shape: KnownShape,
    /// Runs that operations may have given further references since the newest group was
    /// published, and before that since the one before it.
    coming: [AtomicU64; 2],
    /// There are, or may soon be, some.
    are_used: AtomicBool,
}

impl Store {
    /// Takes note of the tree of references that a group has.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn note_references(&self, source: &dyn NodeSource, tree: &Tree) -> Result<()> {
        let [newer, older] = &self.references.coming;
        older.store(newer.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.references.shape.set(tree.shape(source)?);
        if tree.root.is_some() {
            self.references.are_used.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether runs may have further references.
    pub fn has_references(&self) -> bool {
        self.references.are_used.load(Ordering::Relaxed)
    }

    /// Bytes of nodes that the tree of references may take when so many runs gain a reference, and
    /// so many lose one.
    pub fn references_room(&self, gained: u64, lost: u64) -> u64 {
        if gained > 0 {
            self.references.are_used.store(true, Ordering::Relaxed);
        } else if !self.has_references() {
            return 0;
        }
        let node = self.node_bytes as u64;
        let mut shape = self.references.shape.get();
        // What groups that are not published add to it.
        let coming = self.references.coming.iter().map(|runs| runs.load(Ordering::Relaxed));
        let items = coming.fold(0, u64::saturating_add).saturating_mul(REF_EDITS);
        // Its own come on top, as new items.
        self.references.coming[0].fetch_add(gained, Ordering::Relaxed);
        let bytes = items.saturating_mul(2 * footprint(0, RefItem::BYTES) as u64);
        shape.leaves = shape.leaves.saturating_add(bytes / node);
        let edits = gained.saturating_add(lost).saturating_mul(REF_EDITS);
        let values = edits.saturating_mul(RefItem::BYTES as u64);
        shape.apply_bound(edits, values, self.node_bytes).saturating_mul(node)
    }
}

impl Subvol {
    /// Bytes of nodes that items for pieces take, beyond those at both ends of their range.
    pub fn pieces_room(&self, pieces: &Pieces) -> u64 {
        let node = self.store.node_bytes;
        // Nodes that have just been split are half full.
        let nodes = (2 * pieces.item_bytes).div_ceil(capacity(node) as u64);
        nodes * node as u64
    }

    /// Bytes of nodes that dropping so many references may take.
    pub fn drop_room(&self, references: u64) -> u64 {
        self.dead_room(references).saturating_add(self.store.references_room(0, references))
    }

    /// Bytes of nodes that the dead list may take when so many references are dropped: what a
    /// snapshot has becomes an entry, each maybe of another birth and so in another place.
    pub fn dead_room(&self, references: u64) -> u64 {
        if !self.has_parent() {
            return 0;
        }
        let node = self.store.node_bytes as u64;
        let nodes = |entries: u64| entries.saturating_mul(2 * DEAD_ITEM_BYTES).div_ceil(node);
        let listed = nodes(self.dead_entries.load(Ordering::Relaxed));
        let touched = references.min(listed).saturating_add(DEAD_PATH_NODES);
        touched.saturating_add(nodes(references)).saturating_mul(node)
    }

    /// Whether others may have what is dropped here, so that dropping it takes room.
    pub fn shares(&self) -> bool {
        self.has_parent() || self.store.has_references()
    }

    /// How many extents of a file lie behind an offset at most; counted only if that matters.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn extents_behind(&self, inode: &Inode, from: u64) -> Result<u64> {
        let stored = inode.state.read().item.stored_bytes;
        let most = stored / SECTOR_BYTES;
        if !self.shares() || most <= COUNTED_EXTENTS {
            return Ok(most);
        }
        let mut count = 0;
        let (view, ino) = (self.view(), inode.ino);
        extents::each_extent(&*self.store, &view.tree, ino, from, u64::MAX, &mut |_, _, _| {
            count += 1;
            Ok(true)
        })?;
        Ok(count)
    }
}
