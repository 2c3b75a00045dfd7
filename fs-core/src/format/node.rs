//! Tree nodes: layout and validation.
//!
//! ```text
//! leaf:      header | item heads, ascending keys ->   free   <- values, in item order
//! interior:  header | entries: key, block pointer, ascending ->  zeros
//! ```
//!
//! The layout is canonical: the value of item *i* ends where that of item *i - 1* starts, the first
//! ends at the end of the node, and the bytes between heads and values are zero. So one set of items has
//! one image. An entry's key is at most the first key of its child and greater than every key of the
//! child before it; the first entry's key is the least key its subtree may hold.

use crate::disk_struct;

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
        /// Where the value starts, in bytes from the start of the node. 65536 cannot occur: a value
        /// that starts at the very end is empty and stored as the end of the one before it, modulo 65536.
        0x12 value_start: u16,
        /// Bytes of the value.
        0x14 value_bytes: u16,
        /// Reserved.
        0x16 reserved1: u16,
    }
}

/// Magic of a tree node.
pub const NODE_MAGIC: [u8; 4] = *b"CrnN";
/// Bytes of an interior entry: key and pointer.
pub const ENTRY_BYTES: usize = super::key::Key::BYTES + super::ptr::BlockPtr::BYTES;
/// Node sizes the format allows.
pub const NODE_BYTES_ALLOWED: [u32; 3] = [16384, 32768, 65536];
/// Largest value of an item, in bytes, for every node size: three such items fit in the smallest node.
pub const VALUE_BYTES_MAX: usize = 4200;
