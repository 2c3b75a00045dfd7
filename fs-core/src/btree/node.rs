//! A node in memory: the bytes as they are on disk, checked once.

use crate::buf::Slice;
use crate::error::Error;
use crate::format::key::Key;
use crate::format::node as layout;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use crate::units::{Logical, TreeId, Txg};
use alloc::sync::Arc;
use core::fmt;
use core::ops::{Deref, Range};

/// A valid node. Nothing is unpacked: searching looks at keys in place.
pub struct Node {
    bytes: Slice,
    ptr: BlockPtr,
    tree: TreeId,
    count: usize,
}

impl Node {
    /// Turns the block that `ptr` names into a node whose items can be read without further checks.
    ///
    /// # Errors
    /// [`Error::Corrupt`] with the rule that is broken.
    pub fn decode(
        bytes: Slice,
        ptr: &BlockPtr,
        tree: TreeId,
        pool_id: &[u8; 16],
        node_bytes: usize,
    ) -> Result<Node> {
        let corrupt = |what| Error::Corrupt { what, addr: ptr.addr };
        if bytes.len() != node_bytes || ptr.logical as usize != node_bytes {
            return Err(corrupt("node of another length than the pool's"));
        }
        let identity = layout::NodeIdentity {
            tree,
            level: ptr.level,
            birth: ptr.birth,
            addr: ptr.addr,
            pool_id: *pool_id,
        };
        let count = layout::validate(&bytes, &identity).map_err(|bad| bad.at(ptr.addr))?;
        Ok(Node { bytes, ptr: *ptr, tree, count })
    }

    /// The pointer that names this node.
    pub fn ptr(&self) -> &BlockPtr {
        &self.ptr
    }

    /// Where the node is.
    pub fn addr(&self) -> Logical {
        self.ptr.addr
    }

    /// Group that wrote the node.
    pub fn birth(&self) -> Txg {
        self.ptr.birth
    }

    /// Zero for a leaf, else the height above the leaves.
    pub fn level(&self) -> u8 {
        self.ptr.level
    }

    /// Tree the node belongs to.
    pub fn tree(&self) -> TreeId {
        self.tree
    }

    /// The node as it is on disk.
    pub fn bytes(&self) -> &Slice {
        &self.bytes
    }

    /// Number of items (leaf) or entries (interior); at least one.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of its capacity that items or entries use.
    pub fn used_bytes(&self) -> usize {
        let values = match self.level() {
            0 => self.bytes.len() - self.value_range(self.count - 1).start,
            _ => 0,
        };
        self.count * layout::footprint(self.level(), 0) + values
    }

    /// The key at `index`.
    #[inline]
    pub fn key(&self, index: usize) -> Key {
        layout::key(&self.bytes, self.level(), index)
    }

    /// The least key.
    pub fn first_key(&self) -> Key {
        self.key(0)
    }

    /// The greatest key; of an interior node, the least key of its last child.
    pub fn last_key(&self) -> Key {
        self.key(self.count - 1)
    }

    /// Where `key` is, or where it would be inserted.
    pub fn search(&self, key: &Key) -> core::result::Result<usize, usize> {
        let bytes: &[u8] = &self.bytes;
        let level = self.level();
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match layout::key(bytes, level, middle).cmp(key) {
                core::cmp::Ordering::Less => low = middle + 1,
                core::cmp::Ordering::Equal => return Ok(middle),
                core::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }

    /// The child whose subtree would hold `key`. A key below the first entry's belongs to the
    /// first.
    pub fn slot_of(&self, key: &Key) -> usize {
        match self.search(key) {
            Ok(slot) => slot,
            Err(after) => after.saturating_sub(1),
        }
    }

    fn value_range(&self, index: usize) -> Range<usize> {
        layout::value_range(&self.bytes, index)
    }

    /// The value of the leaf item at `index`.
    pub fn value(&self, index: usize) -> &[u8] {
        debug_assert!(self.level() == 0 && index < self.count);
        &self.bytes[self.value_range(index)]
    }

    /// The child that the entry at `index` of an interior node names.
    pub fn child(&self, index: usize) -> BlockPtr {
        BlockPtr::decode(self.child_bytes(index), self.birth())
            .ok()
            .flatten()
            .expect("decode has checked every pointer of the node")
    }

    /// The encoded pointer at `index` of an interior node.
    pub(super) fn child_bytes(&self, index: usize) -> &[u8] {
        debug_assert!(self.level() > 0 && index < self.count);
        &self.bytes[layout::pointer_range(index)]
    }

    /// What an item's value, or an entry's pointer, is on disk.
    pub(super) fn content(&self, index: usize) -> &[u8] {
        match self.level() {
            0 => self.value(index),
            _ => self.child_bytes(index),
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("tree", &self.tree)
            .field("addr", &self.addr())
            .field("level", &self.level())
            .field("birth", &self.birth())
            .field("count", &self.count)
            .finish()
    }
}

/// The value of an item. It shares the leaf it stands in, so it costs no copy, and keeps the leaf
/// in memory while it lives.
#[derive(Clone)]
pub struct Value {
    node: Arc<Node>,
    range: Range<usize>,
}

impl Value {
    pub(super) fn of(node: &Arc<Node>, index: usize) -> Value {
        Value { node: node.clone(), range: node.value_range(index) }
    }

    /// Group that wrote the leaf: the item has not changed since.
    pub fn birth(&self) -> Txg {
        self.node.birth()
    }
}

impl Deref for Value {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.node.bytes[self.range.clone()]
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({:02x?})", &**self)
    }
}
