//! Tree nodes: layout, building and validation.
//!
//! ```text
//! leaf:      header | item heads, ascending keys ->   zeros   <- values, the first item's last
//! interior:  header | entries: key, block pointer, ascending ->  zeros
//! ```
//!
//! The layout is canonical: the first item's value ends at the end of the node, the value of item
//! *i* ends where that of item *i - 1* starts, and the bytes between heads and values are zero. So
//! one set of items has one image. Places are counted from the end of the node, so that every
//! value, also an empty one at the very end of a 64 KiB node, has a place that fits in 16 bits.
//!
//! An entry's key is the first key of its child, and so the least key of the subtree: a parent
//! names the keys a child may hold on both sides, and a valid node in the wrong place is refused.

use super::key::Key;
use super::ptr::{BlockPtr, LEVELS_MAX};
use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{Logical, TreeId, Txg};

disk_struct! {
    /// Head of a tree node.
    pub struct NodeHeader [96] {
        /// "CrnN".
        0x00 magic: [u8; 4],
        /// Zero for a leaf, else the height above the leaves.
        0x04 level: u8,
        /// Reserved.
        0x05 reserved0: u8,
        /// Number of items or entries; at least one.
        0x06 count: u16,
        /// Tree the node belongs to.
        0x08 tree: u64,
        /// Group that wrote the node.
        0x10 birth: u64,
        /// Logical address of the node itself.
        0x18 addr: u64,
        /// Id of the pool.
        0x20 pool_id: [u8; 16],
        /// First key of the node, encoded.
        0x30 first_key: [u8; 24],
        /// Bytes of values (leaf), else zero.
        0x48 value_bytes: u32,
        /// Reserved.
        0x4c reserved1: [u8; 20],
    }
}

disk_struct! {
    /// Head of a leaf item.
    pub struct ItemHead [24] {
        /// The key's object.
        0x00 object: u64,
        /// The key's offset.
        0x08 offset: u64,
        /// The key's kind.
        0x10 kind: u8,
        /// Reserved.
        0x11 reserved0: u8,
        /// Bytes from the start of the value to the end of the node: the lengths of the values of
        /// this item and of all before it.
        0x12 value_tail: u16,
        /// Bytes of the value.
        0x14 value_bytes: u16,
        /// Reserved.
        0x16 reserved1: u16,
    }
}

/// Magic of a tree node.
pub const NODE_MAGIC: [u8; 4] = *b"CrnN";
/// Bytes of an interior entry: key and pointer.
pub const ENTRY_BYTES: usize = Key::BYTES + BlockPtr::BYTES;
/// Node sizes the format allows.
pub const NODE_BYTES_ALLOWED: [u32; 3] = [16384, 32768, 65536];
/// Largest value of an item, in bytes, for every node size: three such items fit in the smallest
/// node.
pub const VALUE_BYTES_MAX: usize = 4200;

/// Bytes of a node of `node_bytes` that items or entries can use.
pub const fn capacity(node_bytes: usize) -> usize {
    node_bytes - NodeHeader::BYTES
}

/// Who a node is: what its parent says of it, and what its header must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// Tree it belongs to.
    pub tree: TreeId,
    /// Zero for a leaf, else the height above the leaves.
    pub level: u8,
    /// Group that wrote it.
    pub birth: Txg,
    /// Where it is.
    pub addr: Logical,
    /// Pool it belongs to.
    pub pool_id: [u8; 16],
}

/// Checks that `bytes` are the whole, canonical image of the node `identity` names; returns the
/// number of its items or entries. Afterwards the functions of this module that read a node by
/// index cannot fail for an index below that number.
///
/// # Errors
/// The rule that is broken.
pub fn validate(bytes: &[u8], identity: &NodeIdentity) -> Result<usize, BadBytes> {
    rule(NODE_BYTES_ALLOWED.iter().any(|n| *n as usize == bytes.len()), "node of a bad length")?;
    let header = <NodeHeader as DiskField>::get(&bytes[..NodeHeader::BYTES]);
    rule(header.magic == NODE_MAGIC, "node without its magic")?;
    rule(header.pool_id == identity.pool_id, "node of another pool")?;
    rule(header.tree == identity.tree.0, "node of another tree")?;
    rule(header.addr == identity.addr.0, "node of another place")?;
    rule(header.birth == identity.birth.0, "node of another group")?;
    rule(header.level == identity.level, "node of another level")?;
    rule(header.level < LEVELS_MAX, "node above the highest level")?;
    rule(
        header.reserved0 == 0 && header.reserved1 == [0; 20],
        "reserved field of a node is not zero",
    )?;
    let count = header.count as usize;
    rule(count > 0, "node without items")?;
    if header.level == 0 {
        validate_items(bytes, count, header.value_bytes as usize)?;
    } else {
        rule(header.value_bytes == 0, "interior node with values")?;
        validate_entries(bytes, count, identity)?;
    }
    rule(Key::decode(&header.first_key)? == key(bytes, header.level, 0), "wrong first key")?;
    Ok(count)
}

fn validate_items(bytes: &[u8], count: usize, value_bytes: usize) -> Result<(), BadBytes> {
    let room = capacity(bytes.len());
    rule(count * ItemHead::BYTES <= room, "more items than fit in a node")?;
    let (heads, rest) = bytes[NodeHeader::BYTES..].split_at(count * ItemHead::BYTES);
    rule(value_bytes <= rest.len(), "more values than fit in a node")?;
    let mut tail = 0;
    let mut before = None;
    for head in heads.chunks_exact(ItemHead::BYTES) {
        let head = <ItemHead as DiskField>::get(head);
        rule(head.reserved0 == 0 && head.reserved1 == 0, "reserved field of an item is not zero")?;
        rule(head.value_bytes as usize <= VALUE_BYTES_MAX, "value too long")?;
        tail += head.value_bytes as usize;
        rule(tail <= value_bytes, "value out of place")?;
        rule(head.value_tail as usize == tail, "value out of place")?;
        let key = Some(Key::new(head.object, head.kind, head.offset));
        rule(before < key, "keys of a node not ascending")?;
        before = key;
    }
    rule(tail == value_bytes, "wrong length of all values")?;
    rule(is_zero(&rest[..rest.len() - tail]), "unused bytes of a node are not zero")
}

fn validate_entries(bytes: &[u8], count: usize, node: &NodeIdentity) -> Result<(), BadBytes> {
    rule(count * ENTRY_BYTES <= capacity(bytes.len()), "more entries than fit in a node")?;
    let (entries, rest) = bytes[NodeHeader::BYTES..].split_at(count * ENTRY_BYTES);
    let mut before = None;
    for entry in entries.chunks_exact(ENTRY_BYTES) {
        let key = Some(Key::decode(&entry[..Key::BYTES])?);
        rule(before < key, "keys of a node not ascending")?;
        before = key;
        let child = BlockPtr::decode(&entry[Key::BYTES..], node.birth)?
            .ok_or(BadBytes("entry without a pointer"))?;
        rule(child.level + 1 == node.level, "child of a wrong level")?;
        rule(child.logical as usize == bytes.len(), "child of another length")?;
    }
    rule(is_zero(rest), "unused bytes of a node are not zero")
}

/// Looks at all bytes rather than stopping early, which compiles to wide instructions.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0, |seen, byte| seen | byte) == 0
}

/// Bytes from one head or entry to the next.
const fn stride(level: u8) -> usize {
    if level == 0 {
        ItemHead::BYTES
    } else {
        ENTRY_BYTES
    }
}

/// Bytes an item or entry with a value of `value_bytes` takes from a node's capacity.
pub const fn footprint(level: u8, value_bytes: usize) -> usize {
    if level == 0 {
        ItemHead::BYTES + value_bytes
    } else {
        ENTRY_BYTES
    }
}

/// The key at `index` of a valid node.
#[inline]
pub fn key(bytes: &[u8], level: u8, index: usize) -> Key {
    Key::peek(&bytes[NodeHeader::BYTES + index * stride(level)..])
}

/// The value at `index` of a valid leaf, as a range of its bytes.
#[inline]
pub fn value_range(bytes: &[u8], index: usize) -> core::ops::Range<usize> {
    let head = &bytes[NodeHeader::BYTES + index * ItemHead::BYTES..][..ItemHead::BYTES];
    let start = bytes.len() - u16::get(&head[0x12..0x14]) as usize;
    start..start + u16::get(&head[0x14..0x16]) as usize
}

/// The encoded pointer at `index` of a valid interior node, as a range of its bytes.
#[inline]
pub fn pointer_range(index: usize) -> core::ops::Range<usize> {
    let start = NodeHeader::BYTES + index * ENTRY_BYTES + Key::BYTES;
    start..start + BlockPtr::BYTES
}

/// Builds the image of a node in place.
///
/// Whoever builds decides beforehand what fits, by [`capacity`] and [`footprint`]; overfilling is a
/// bug, not a condition.
pub struct NodeBuilder<'a> {
    bytes: &'a mut [u8],
    level: u8,
    count: usize,
    tail: usize,
}

impl<'a> NodeBuilder<'a> {
    /// Starts a node in `bytes`, which must be zero and as long as a node.
    pub fn new(bytes: &'a mut [u8], level: u8) -> NodeBuilder<'a> {
        NodeBuilder { bytes, level, count: 0, tail: 0 }
    }

    /// Adds an item with its value, or an entry with its encoded pointer. Keys must ascend.
    pub fn push(&mut self, key: &Key, value: &[u8]) {
        let start = NodeHeader::BYTES + self.count * stride(self.level);
        if self.level == 0 {
            self.tail += value.len();
            let head = ItemHead {
                object: key.object,
                offset: key.offset,
                kind: key.kind,
                reserved0: 0,
                value_tail: self.tail as u16,
                value_bytes: value.len() as u16,
                reserved1: 0,
            };
            let end = start + ItemHead::BYTES;
            let value_start = self.bytes.len() - self.tail;
            assert!(end <= value_start, "item {} overfills a leaf", self.count);
            head.put(&mut self.bytes[start..end]);
            self.bytes[value_start..value_start + value.len()].copy_from_slice(value);
        } else {
            key.encode(&mut self.bytes[start..start + Key::BYTES]);
            self.bytes[start + Key::BYTES..start + ENTRY_BYTES].copy_from_slice(value);
        }
        self.count += 1;
    }

    /// Writes the header. The address is left zero: [`set_addr`] puts it in when it is known.
    pub fn finish(self, tree: TreeId, birth: Txg, pool_id: [u8; 16]) {
        assert!(self.count > 0, "a node without items is never built");
        let mut first_key = [0; Key::BYTES];
        key(self.bytes, self.level, 0).encode(&mut first_key);
        let header = NodeHeader {
            magic: NODE_MAGIC,
            level: self.level,
            reserved0: 0,
            count: self.count as u16,
            tree: tree.0,
            birth: birth.0,
            addr: 0,
            pool_id,
            first_key,
            value_bytes: self.tail as u32,
            reserved1: [0; 20],
        };
        header.put(&mut self.bytes[..NodeHeader::BYTES]);
    }
}

/// Puts its own address into the image of a node.
pub fn set_addr(bytes: &mut [u8], addr: Logical) {
    addr.0.put(&mut bytes[0x18..0x20]);
}
