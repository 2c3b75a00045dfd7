//! The tree: sorted items, immutable nodes, batches.
//!
//! One B+tree serves everything that is looked up. A [`Tree`] is a root pointer; it never changes.
//! There are four things to do with it:
//!
//! - *look up* one item, or move a [`Cursor`] over a range;
//! - *apply* a sorted batch of edits, which gives another tree that shares every node the batch
//!   did not touch (`apply.rs` tells how);
//! - *compare* it with another state of itself, at the cost of what differs (`diff.rs`);
//! - *walk* all its nodes, for the checker.
//!
//! ```text
//! root  -> [ a  -> [ 1, 2  ],  b -> [ 3, 4 ] ]
//! root' -> [ a' -> [ 1, 2' ],  b -> [ 3, 4 ] ]     after an edit of an item in leaf 2
//! ```
//!
//! Nobody edits a node, in memory or on disk: here 2', a' and root' are written elsewhere, and 2, a
//! and root become free once the group that wrote root' is published. So a reader needs a root and
//! no lock, a node in the cache is right for as long as its address is not reused, and a batch that
//! fails half-way has changed nothing: the group it belongs to is dropped.
//!
//! What the tree guarantees, and [`check`](check::check) verifies: keys ascend over the whole tree;
//! an entry's key is the first key of its child; all leaves have level zero, and a child's level is
//! one less than its parent's; no node is empty; an interior root has two children at least.
//!
//! Whatever comes from a device is checked before it is believed: a node by `Node::decode` (which
//! the pool calls when it loads one), its place under its parent by `load_child`. A tree whose
//! nodes were forged makes operations return [`Error::Corrupt`]; none loops, since every step down
//! decreases the level.

mod apply;
mod bound;
pub mod cache;
pub mod check;
mod cursor;
mod diff;
mod fresh;
mod node;
mod pack;
mod patrol;
mod walk;

#[cfg(test)]
mod tests;

pub use bound::Shape;
pub use cache::NodeCache;
pub use cursor::Cursor;
pub use diff::{Difference, Differences};
pub use fresh::FreshVisitor;
pub use node::{Node, Value};
pub use walk::{Visit, Walk};

use crate::buf::Buf;
use crate::error::Error;
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use crate::units::{Logical, TreeId, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// How trees reach stored nodes.
pub trait NodeSource: Send + Sync {
    /// Bytes of a node: one of [`crate::format::node::NODE_BYTES_ALLOWED`].
    fn node_bytes(&self) -> usize;

    /// Id of the pool.
    fn pool_id(&self) -> [u8; 16];

    /// The node `ptr` names: its checksum verified by the pool, its content by [`Node::decode`];
    /// from the cache when it is there. May block.
    ///
    /// # Errors
    /// Whatever keeps the node from being had.
    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>>;

    /// These nodes are about to be loaded one after another: a hint to read them together. Errors
    /// are left to the loads.
    fn prefetch(&self, tree: TreeId, ptrs: &[BlockPtr]) {
        let _ = (tree, ptrs);
    }
}

/// How a batch writes the nodes of one transaction group.
pub trait NodeSink: NodeSource {
    /// The sink as what it reads from. Rust 1.85 does not do this conversion by itself.
    fn as_source(&self) -> &dyn NodeSource;

    /// The group.
    fn txg(&self) -> Txg;

    /// Addresses for `count` nodes of `tree`, contiguous where possible, already accounted.
    ///
    /// # Errors
    /// Whatever keeps the space from being had.
    fn allocate(&self, tree: TreeId, count: usize) -> Result<Vec<Logical>>;

    /// Checksums (in parallel where it pays), writes and caches the nodes; returns a pointer for
    /// each, in order.
    ///
    /// # Errors
    /// Whatever keeps the nodes from being written.
    fn write(&self, tree: TreeId, level: u8, nodes: Vec<(Logical, Buf)>) -> Result<Vec<BlockPtr>>;

    /// The block is no longer part of the tree once this group is published.
    fn free(&self, tree: TreeId, ptr: &BlockPtr);
}

/// What happens to an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// It has this value, whether or not it was there.
    Put(Vec<u8>),
    /// It is gone; deleting what is not there is fine.
    Delete,
}

/// A tree at one point of its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Which tree it is; every node repeats it.
    pub id: TreeId,
    /// Its root node; `None` when it holds nothing.
    pub root: Option<BlockPtr>,
}

impl Tree {
    /// A tree that holds nothing.
    pub const fn empty(id: TreeId) -> Tree {
        Tree { id, root: None }
    }

    /// The value of the item `key`.
    ///
    /// # Errors
    /// What loading a node gives, and [`Error::Corrupt`].
    pub fn lookup(&self, source: &dyn NodeSource, key: &Key) -> Result<Option<Value>> {
        let Some(mut place) = self.load_root(source)? else { return Ok(None) };
        while place.node.level() > 0 {
            let slot = place.node.slot_of(key);
            if *key < place.node.key(slot) {
                return Ok(None);
            }
            place = place.load_child(source, slot)?;
        }
        Ok(place.node.search(key).ok().map(|index| Value::of(&place.node, index)))
    }

    /// The first item whose key is at least `key`.
    ///
    /// # Errors
    /// What loading a node gives, and [`Error::Corrupt`].
    pub fn first_from(&self, source: &dyn NodeSource, key: &Key) -> Result<Option<(Key, Value)>> {
        let mut cursor = self.cursor();
        cursor.seek(source, key)?;
        cursor.next(source)
    }

    /// The last item whose key is at most `key`.
    ///
    /// # Errors
    /// What loading a node gives, and [`Error::Corrupt`].
    pub fn last_upto(&self, source: &dyn NodeSource, key: &Key) -> Result<Option<(Key, Value)>> {
        let mut cursor = self.cursor();
        cursor.seek_last(source, key)
    }

    /// A reader that goes from item to item has come to `key`: has the leaves that it comes to next
    /// read together, as far as they are not in memory. The caller waits, not the reader.
    ///
    /// # Errors
    /// What loading an interior node gives. Those of leaves are left to the reader.
    pub fn read_ahead(&self, source: &dyn NodeSource, key: &Key) -> Result<()> {
        cursor::read_on(self, source, key)
    }

    /// A cursor before the first item.
    pub fn cursor(&self) -> Cursor {
        Cursor::new(*self)
    }

    fn load_root(&self, source: &dyn NodeSource) -> Result<Option<Place>> {
        let Some(ptr) = &self.root else { return Ok(None) };
        let node = source.load(self.id, ptr)?;
        if node.level() != ptr.level {
            return Err(Error::Corrupt { what: "node of another level", addr: ptr.addr });
        }
        Ok(Some(Place { node, upper: None }))
    }
}

/// A node with the keys its place in the tree allows it: from its first key, which its parent
/// repeats, to below `upper`. Only nodes on the right edge of the tree have no upper bound.
#[derive(Clone)]
struct Place {
    node: Arc<Node>,
    upper: Option<Key>,
}

impl Place {
    /// The keys of the child in `slot` end below this.
    fn upper_of(&self, slot: usize) -> Option<Key> {
        match slot + 1 < self.node.count() {
            true => Some(self.node.key(slot + 1)),
            false => self.upper,
        }
    }

    /// Loads the child in `slot` and checks that it belongs there.
    fn load_child(&self, source: &dyn NodeSource, slot: usize) -> Result<Place> {
        let ptr = self.node.child(slot);
        let node = source.load(self.node.tree(), &ptr)?;
        let upper = self.upper_of(slot);
        let broken = if node.level() != ptr.level {
            "node of another level"
        } else if node.first_key() != self.node.key(slot) {
            "first key of a node is not that of its parent's entry"
        } else if upper.is_some_and(|upper| node.last_key() >= upper) {
            "last key of a node reaches into its neighbour"
        } else {
            return Ok(Place { node, upper });
        };
        Err(Error::Corrupt { what: broken, addr: ptr.addr })
    }
}
