//! Block pointers.

use super::{rule, BadBytes};
use crate::disk_struct;
use crate::units::{Logical, Txg, SECTOR_BYTES};

/// Kinds of checksums. The numbers are permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ChecksumKind {
    /// Not checksummed: file data only, by the user's choice.
    None = 0,
    /// CRC32C, four bytes.
    Crc32c = 1,
    /// BLAKE3-256, thirty-two bytes. The only kind for metadata.
    Blake3 = 2,
}

impl ChecksumKind {
    /// The kind with that number.
    pub fn from_raw(raw: u8) -> Option<ChecksumKind> {
        match raw {
            0 => Some(ChecksumKind::None),
            1 => Some(ChecksumKind::Crc32c),
            2 => Some(ChecksumKind::Blake3),
            _ => None,
        }
    }

    /// Bytes of one checksum.
    pub fn bytes(self) -> usize {
        match self {
            ChecksumKind::None => 0,
            ChecksumKind::Crc32c => 4,
            ChecksumKind::Blake3 => 32,
        }
    }
}

/// Kinds of compression. The numbers are permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum CompressionKind {
    /// Stored as is.
    None = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl CompressionKind {
    /// The kind with that number.
    pub fn from_raw(raw: u8) -> Option<CompressionKind> {
        match raw {
            0 => Some(CompressionKind::None),
            1 => Some(CompressionKind::Zstd),
            _ => None,
        }
    }
}

disk_struct! {
    /// Names a metadata block and vouches for its content; always stored in the parent.
    pub struct BlockPtrRaw [64] {
        /// Logical address of the first byte, a multiple of the sector size.
        0x00 addr: u64,
        /// Transaction group that wrote the block.
        0x08 birth: u64,
        /// Bytes stored, before rounding up to sectors.
        0x10 stored: u32,
        /// Bytes after expanding.
        0x14 logical: u32,
        /// Checksum kind; BLAKE3 for all metadata.
        0x18 checksum_kind: u8,
        /// Compression kind.
        0x19 compression: u8,
        /// Level of the tree node pointed to, zero for a leaf or another block.
        0x1a level: u8,
        /// Reserved for flags.
        0x1b flags: u8,
        /// Reserved for the number of an encryption key.
        0x1c key_id: u32,
        /// Checksum of the stored bytes, padded with zeros. With encryption the second half will
        /// hold a MAC.
        0x20 checksum: [u8; 32],
    }
}

/// Largest block a pointer may name, in bytes.
pub const BLOCK_BYTES_MAX: u32 = 4 << 20;

/// Deepest tree the format allows: levels 0 to 11.
pub const LEVELS_MAX: u8 = 12;

/// A pointer that may be followed: its fields have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPtr {
    /// Where the block is.
    pub addr: Logical,
    /// The group that wrote it.
    pub birth: Txg,
    /// Bytes stored; at least one.
    pub stored: u32,
    /// Bytes after expanding; at least `stored`.
    pub logical: u32,
    /// How it is compressed.
    pub compression: CompressionKind,
    /// Level of the node it names.
    pub level: u8,
    /// BLAKE3-256 of the stored bytes.
    pub checksum: [u8; 32],
}

impl BlockPtr {
    /// Bytes of an encoded pointer.
    pub const BYTES: usize = BlockPtrRaw::BYTES;

    /// Turns untrusted bytes into a pointer that may be followed. All zeros is "no block".
    ///
    /// `newest` is the group of the structure the pointer stands in: a child cannot be younger than
    /// its parent.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8], newest: Txg) -> Result<Option<BlockPtr>, BadBytes> {
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let raw = <BlockPtrRaw as super::DiskField>::get(bytes);
        rule(raw.flags == 0 && raw.key_id == 0, "reserved field of a pointer is not zero")?;
        rule(raw.addr % SECTOR_BYTES == 0, "pointer to an unaligned address")?;
        rule(raw.birth != 0 && raw.birth <= newest.0, "block born after its parent")?;
        rule((1..=BLOCK_BYTES_MAX).contains(&raw.logical), "logical length out of range")?;
        rule((1..=raw.logical).contains(&raw.stored), "stored length out of range")?;
        rule(raw.addr.checked_add(u64::from(BLOCK_BYTES_MAX)).is_some(), "address out of range")?;
        rule(raw.level < LEVELS_MAX, "level out of range")?;
        rule(raw.checksum_kind == ChecksumKind::Blake3 as u8, "metadata checksum is not BLAKE3")?;
        let compression = CompressionKind::from_raw(raw.compression)
            .ok_or(BadBytes("unknown compression kind"))?;
        rule(
            compression != CompressionKind::None || raw.stored == raw.logical,
            "uncompressed lengths differ",
        )?;
        Ok(Some(BlockPtr {
            addr: Logical(raw.addr),
            birth: Txg(raw.birth),
            stored: raw.stored,
            logical: raw.logical,
            compression,
            level: raw.level,
            checksum: raw.checksum,
        }))
    }

    /// The pointer as 64 bytes.
    pub fn encode(&self) -> [u8; BlockPtrRaw::BYTES] {
        BlockPtrRaw {
            addr: self.addr.0,
            birth: self.birth.0,
            stored: self.stored,
            logical: self.logical,
            checksum_kind: ChecksumKind::Blake3 as u8,
            compression: self.compression as u8,
            level: self.level,
            flags: 0,
            key_id: 0,
            checksum: self.checksum,
        }
        .to_bytes()
    }

    /// Sectors the block takes on disk, in bytes.
    pub fn allocated(&self) -> u64 {
        crate::units::sector_round(u64::from(self.stored))
    }
}

/// Encodes "no block" or a pointer.
pub fn encode_optional(ptr: Option<&BlockPtr>) -> [u8; BlockPtr::BYTES] {
    ptr.map_or([0; BlockPtr::BYTES], BlockPtr::encode)
}
