//! Keys of tree items.

use super::{rule, BadBytes, DiskField};
use core::fmt;

/// Kinds of items. The numbers are permanent. Within one object, items sort by kind.
#[expect(missing_docs, reason = "the table below is the documentation")]
pub mod kind {
    // Subvolume trees: object is an inode number.
    pub const INODE: u8 = 0x01;
    pub const LINK: u8 = 0x02;
    pub const XATTR: u8 = 0x08;
    pub const XATTR_PART: u8 = 0x09;
    pub const DIR_HASH: u8 = 0x10;
    pub const DIR_ENTRY: u8 = 0x11;
    pub const SYMLINK: u8 = 0x18;
    pub const EXTENT: u8 = 0x20;
    /// Object zero; offset is the inode number of a file without a name.
    pub const ORPHAN: u8 = 0x30;
    /// Object zero, offset zero: how far the subvolume has been received.
    pub const RECEIVED: u8 = 0x31;
    // Pool tree.
    pub const SUBVOL: u8 = 0x40;
    pub const NAME: u8 = 0x41;
    pub const HOLDS: u8 = 0x42;
    pub const BOOKMARK: u8 = 0x43;
    pub const CONTENT: u8 = 0x44;
    pub const PROPERTY: u8 = 0x48;
    // Shared-reference tree: object is a logical address.
    pub const REF: u8 = 0x50;
    // Dead lists.
    pub const DEAD: u8 = 0x58;
    // Chunk tree.
    pub const CHUNK: u8 = 0x60;
    pub const DEVICE: u8 = 0x61;
    // Space tree.
    pub const SPACE_SUMMARY: u8 = 0x70;
    pub const SPACE_BITMAP: u8 = 0x71;

    /// `(kind, tree, object, offset, value)`, for the specification and `cairn inspect`.
    pub const TABLE: &[(u8, &str, &str, &str, &str, &str)] = &[
        (INODE, "INODE", "subvolume", "inode", "0", "`InodeItem`"),
        (
            LINK,
            "LINK",
            "subvolume",
            "inode",
            "hash of directory and cookie",
            "`LinkItem`: a further name",
        ),
        (
            XATTR,
            "XATTR",
            "subvolume",
            "inode",
            "hash of the name",
            "list of attributes with that hash",
        ),
        (
            XATTR_PART,
            "XATTR_PART",
            "subvolume",
            "inode",
            "value id * 256 + part",
            "a part of a large attribute value",
        ),
        (
            DIR_HASH,
            "DIR_HASH",
            "subvolume",
            "directory",
            "hash of the name",
            "cookies of the entries with that hash",
        ),
        (DIR_ENTRY, "DIR_ENTRY", "subvolume", "directory", "cookie", "`EntryHeader` and the name"),
        (SYMLINK, "SYMLINK", "subvolume", "inode", "0", "the target"),
        (
            EXTENT,
            "EXTENT",
            "subvolume",
            "inode",
            "file offset",
            "`ExtentHeader` and checksums or inline data",
        ),
        (ORPHAN, "ORPHAN", "subvolume", "0", "inode", "empty: the inode has no name left"),
        (
            RECEIVED,
            "RECEIVED",
            "subvolume",
            "0",
            "0",
            "inode and offset in it, 8 bytes each: all before has been received",
        ),
        (SUBVOL, "SUBVOL", "pool", "subvolume id", "0", "`SubvolItem`"),
        (NAME, "NAME", "pool", "subvolume or snapshot id", "0", "its name"),
        (HOLDS, "HOLDS", "pool", "snapshot id", "0", "tags that keep it from being deleted"),
        (BOOKMARK, "BOOKMARK", "pool", "bookmark id", "0", "`BookmarkItem` and the name"),
        (CONTENT, "CONTENT", "pool", "snapshot id", "0", "the sum of its content"),
        (PROPERTY, "PROPERTY", "pool", "subvolume id or 0", "property number", "value"),
        (REF, "REF", "references", "logical address", "0", "`RefItem`"),
        (DEAD, "DEAD", "dead lists", "list id", "birth * 2^20 + part", "a part of a dead list"),
        (CHUNK, "CHUNK", "chunk", "logical address", "0", "`ChunkHeader` and stripes"),
        (DEVICE, "DEVICE", "chunk", "device index", "0", "`DeviceItem`"),
        (
            SPACE_SUMMARY,
            "SPACE_SUMMARY",
            "space",
            "0",
            "logical address of the chunk",
            "`SummaryItem`",
        ),
        (
            SPACE_BITMAP,
            "SPACE_BITMAP",
            "space",
            "logical address of the region",
            "0",
            "one bit a sector, set when used",
        ),
    ];
}

/// Where an item stands in its tree: ordered by object, then kind, then offset.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Key {
    /// Inode number, address or id, by kind.
    pub object: u64,
    /// One of [`kind`].
    pub kind: u8,
    /// Position within the object and kind.
    pub offset: u64,
}

impl Key {
    /// Bytes of an encoded key: object, offset, kind, seven bytes of zero.
    pub const BYTES: usize = 24;
    /// The smallest key.
    pub const MIN: Key = Key { object: 0, kind: 0, offset: 0 };
    /// The largest key.
    pub const MAX: Key = Key { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    /// The key of those parts.
    pub const fn new(object: u64, kind: u8, offset: u64) -> Key {
        Key { object, kind, offset }
    }

    /// The key that follows this one directly; `None` after [`Key::MAX`].
    pub fn successor(self) -> Option<Key> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Key { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Key { kind, offset: 0, ..self });
        }
        let object = self.object.checked_add(1)?;
        Some(Key { object, kind: 0, offset: 0 })
    }

    /// Writes the key to 24 bytes.
    pub fn encode(&self, bytes: &mut [u8]) {
        self.object.put(&mut bytes[0..8]);
        self.offset.put(&mut bytes[8..16]);
        bytes[16] = self.kind;
        bytes[17..24].fill(0);
    }

    /// Reads a key from 24 bytes, refusing set reserved bytes.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<Key, BadBytes> {
        rule(bytes[17..24].iter().all(|b| *b == 0), "reserved bytes of a key are not zero")?;
        Ok(Key::peek(bytes))
    }

    /// Reads a key from at least 17 bytes without looking at reserved ones.
    #[inline]
    pub fn peek(bytes: &[u8]) -> Key {
        Key { object: u64::get(&bytes[0..8]), kind: bytes[16], offset: u64::get(&bytes[8..16]) }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = kind::TABLE.iter().find(|row| row.0 == self.kind).map(|row| row.1);
        match name {
            Some(name) => write!(f, "({:#x} {name} {:#x})", self.object, self.offset),
            None => write!(f, "({:#x} kind {:#x} {:#x})", self.object, self.kind, self.offset),
        }
    }
}
