//! Extents: where a range of a file is.
//!
//! An item of kind EXTENT covers `len` bytes of the file from its key's offset. Items of one file
//! never overlap; what no item covers is a hole.
//!
//! | kind | meaning |
//! | --- | --- |
//! | inline | the whole file, at offset zero, its bytes in the item |
//! | plain | uncompressed sectors at `addr`, a checksum for each sector |
//! | packed | part of a compressed blob: `offset..offset + len` of its expanded bytes |
//! | promised | no data yet: room promised by fallocate, reads as zeros |
//!
//! A plain extent may be split at any sector: each part names just its own sectors and keeps their
//! checksums, and what is overwritten is freed at once. A packed extent's blob lives until the last
//! item that names it goes. Within one file, items that name one blob with the same *anchor* (file
//! offset minus `offset`) hold one reference together, and all lie in the window
//! `anchor..anchor + logical`; so whether a blob is dead is decided by looking at its window alone.
//! Further references (another anchor, another file) are counted in the shared-reference tree.

use super::ptr::{ChecksumKind, CompressionKind};
use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{sector_round, Logical, Txg, SECTOR_BYTES};
use alloc::vec::Vec;

disk_struct! {
    /// Head of an EXTENT item's value.
    pub struct ExtentHeader [48] {
        /// 1 inline, 2 plain, 3 packed, 4 promised.
        0x00 kind: u8,
        /// Compression kind; of the blob, or of inline data.
        0x01 compression: u8,
        /// Checksum kind.
        0x02 checksum_kind: u8,
        /// Reserved.
        0x03 reserved0: u8,
        /// Reserved for flags.
        0x04 flags: u32,
        /// Transaction group in which this reference entered the tree.
        0x08 birth: u64,
        /// Logical address of the first stored byte; zero for inline and promised.
        0x10 addr: u64,
        /// Packed: bytes of the blob before rounding up to sectors. Inline: bytes that follow.
        /// Otherwise zero.
        0x18 stored: u32,
        /// Packed: bytes of the blob after expanding. Inline: bytes after expanding. Otherwise
        /// zero.
        0x1c logical: u32,
        /// Packed: where in the expanded blob this item starts. Otherwise zero.
        0x20 offset: u32,
        /// Reserved for the number of an encryption key.
        0x24 key_id: u32,
        /// Bytes of the file that the item covers: a multiple of the sector size, except inline.
        0x28 len: u64,
    }
}

/// Largest compressed blob, in bytes before compression.
pub const PACKED_BYTES_MAX: u32 = 1 << 20;
/// Largest number of inline bytes, stored or expanded.
pub const INLINE_BYTES_MAX: u32 = 3072;
/// Largest file size and file offset, in bytes: 2^63 - 1.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// Longest plain extent one item may name, in bytes, by checksum kind: bounded by the checksums
/// that must fit in an item.
pub fn plain_bytes_max(kind: ChecksumKind) -> u64 {
    match kind {
        ChecksumKind::None => 256 << 20,
        ChecksumKind::Crc32c => 1 << 20,
        ChecksumKind::Blake3 => 256 << 10,
    }
}

/// A compressed blob on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Where it is.
    pub addr: Logical,
    /// Bytes stored, before rounding up to sectors.
    pub stored: u32,
    /// Bytes after expanding; a multiple of the sector size.
    pub logical: u32,
    /// How it is compressed; never `None`.
    pub compression: CompressionKind,
    /// How it is checksummed.
    pub checksum_kind: ChecksumKind,
    /// Checksum of the stored bytes, padded with zeros.
    pub checksum: [u8; 32],
}

impl Blob {
    /// Bytes it takes on disk.
    pub fn allocated(&self) -> u64 {
        sector_round(u64::from(self.stored))
    }
}

/// What a range of a file is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The whole content of a small file.
    Inline {
        /// How `bytes` is compressed.
        compression: CompressionKind,
        /// Bytes after expanding: the file's size.
        logical: u32,
        /// The stored bytes.
        bytes: Vec<u8>,
    },
    /// Uncompressed sectors.
    Plain {
        /// Where they are.
        addr: Logical,
        /// How many bytes; a multiple of the sector size.
        len: u64,
        /// Kind of the checksums.
        checksum_kind: ChecksumKind,
        /// One checksum a sector, one after another.
        checksums: Vec<u8>,
    },
    /// Part of a compressed blob.
    Packed {
        /// The blob.
        blob: Blob,
        /// Where this part starts in the expanded bytes.
        offset: u32,
        /// How many bytes; a multiple of the sector size.
        len: u64,
    },
    /// Promised room without data.
    Promised {
        /// How many bytes; a multiple of the sector size.
        len: u64,
    },
}

impl Extent {
    /// Bytes of the file that the extent covers. Inline data covers its expanded length.
    pub fn len(&self) -> u64 {
        match self {
            Extent::Inline { logical, .. } => u64::from(*logical),
            Extent::Plain { len, .. } | Extent::Packed { len, .. } | Extent::Promised { len } => {
                *len
            }
        }
    }

    /// Never true: an extent covers at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part `from..from + len` of the extent. Both are multiples of the sector size, and the
    /// part lies within. Inline extents cannot be split.
    pub fn part(&self, from: u64, len: u64) -> Extent {
        assert!(
            from % SECTOR_BYTES == 0 && len % SECTOR_BYTES == 0 && len > 0,
            "part {from}+{len}"
        );
        assert!(from + len <= self.len(), "part {from}+{len} of {}", self.len());
        match self {
            Extent::Inline { .. } => panic!("an inline extent cannot be split"),
            Extent::Plain { addr, checksum_kind, checksums, .. } => {
                let width = checksum_kind.bytes();
                let first = (from / SECTOR_BYTES) as usize * width;
                let count = (len / SECTOR_BYTES) as usize * width;
                Extent::Plain {
                    addr: Logical(addr.0 + from),
                    len,
                    checksum_kind: *checksum_kind,
                    checksums: checksums[first..first + count].to_vec(),
                }
            }
            Extent::Packed { blob, offset, .. } => {
                Extent::Packed { blob: *blob, offset: offset + from as u32, len }
            }
            Extent::Promised { .. } => Extent::Promised { len },
        }
    }

    /// Turns an item's value into an extent whose fields can be trusted. `at` is the key's offset
    /// and `newest` the group of the node it stands in.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8], at: u64, newest: Txg) -> Result<(Extent, Txg), BadBytes> {
        rule(bytes.len() >= ExtentHeader::BYTES, "extent item too short")?;
        let (head, tail) = bytes.split_at(ExtentHeader::BYTES);
        let raw = ExtentHeader::get(head);
        rule(
            raw.reserved0 == 0 && raw.flags == 0 && raw.key_id == 0,
            "reserved field of an extent is not zero",
        )?;
        rule(raw.birth != 0 && raw.birth <= newest.0, "extent born after its node")?;
        let compression = CompressionKind::from_raw(raw.compression)
            .ok_or(BadBytes("unknown compression kind"))?;
        let checksum_kind =
            ChecksumKind::from_raw(raw.checksum_kind).ok_or(BadBytes("unknown checksum kind"))?;
        let end = at.checked_add(raw.len).ok_or(BadBytes("extent beyond the largest file"))?;
        rule(raw.len > 0, "empty extent")?;
        let extent = if raw.kind == 1 {
            rule(at == 0 && raw.len == u64::from(raw.logical), "inline extent not at zero")?;
            rule(raw.addr == 0 && raw.offset == 0, "inline extent with an address")?;
            rule(checksum_kind == ChecksumKind::None, "inline extent with a checksum")?;
            rule(raw.logical <= INLINE_BYTES_MAX, "inline extent too long")?;
            rule(tail.len() == raw.stored as usize, "inline extent length differs")?;
            rule(
                compression != CompressionKind::None || raw.stored == raw.logical,
                "uncompressed inline lengths differ",
            )?;
            Extent::Inline { compression, logical: raw.logical, bytes: tail.to_vec() }
        } else {
            rule(at % SECTOR_BYTES == 0 && raw.len % SECTOR_BYTES == 0, "extent is not aligned")?;
            rule(end <= FILE_BYTES_MAX + 1, "extent beyond the largest file")?;
            rule(raw.addr % SECTOR_BYTES == 0, "extent at an unaligned address")?;
            match raw.kind {
                2 => Extent::decode_plain(&raw, compression, checksum_kind, tail)?,
                3 => Extent::decode_packed(&raw, compression, checksum_kind, tail)?,
                4 => {
                    rule(raw.addr == 0 && tail.is_empty(), "promised extent with data")?;
                    rule(raw.stored == 0 && raw.logical == 0, "promised extent with lengths")?;
                    rule(raw.offset == 0 && raw.compression == 0, "promised extent with data")?;
                    rule(checksum_kind == ChecksumKind::None, "promised extent with data")?;
                    Extent::Promised { len: raw.len }
                }
                _ => return Err(BadBytes("unknown extent kind")),
            }
        };
        Ok((extent, Txg(raw.birth)))
    }

    fn decode_plain(
        raw: &ExtentHeader,
        compression: CompressionKind,
        checksum_kind: ChecksumKind,
        tail: &[u8],
    ) -> Result<Extent, BadBytes> {
        rule(compression == CompressionKind::None, "plain extent is compressed")?;
        rule(raw.stored == 0 && raw.logical == 0 && raw.offset == 0, "plain extent with lengths")?;
        rule(raw.len <= plain_bytes_max(checksum_kind), "plain extent too long")?;
        rule(raw.addr.checked_add(raw.len).is_some(), "extent beyond the address space")?;
        let want = (raw.len / SECTOR_BYTES) as usize * checksum_kind.bytes();
        rule(tail.len() == want, "wrong number of checksums")?;
        Ok(Extent::Plain {
            addr: Logical(raw.addr),
            len: raw.len,
            checksum_kind,
            checksums: tail.to_vec(),
        })
    }

    fn decode_packed(
        raw: &ExtentHeader,
        compression: CompressionKind,
        checksum_kind: ChecksumKind,
        tail: &[u8],
    ) -> Result<Extent, BadBytes> {
        rule(compression != CompressionKind::None, "packed extent is not compressed")?;
        rule(raw.logical <= PACKED_BYTES_MAX, "blob too long")?;
        rule(u64::from(raw.logical) % SECTOR_BYTES == 0, "blob length is not aligned")?;
        rule(raw.stored > 0 && raw.stored < raw.logical, "blob does not save space")?;
        rule(u64::from(raw.offset) % SECTOR_BYTES == 0, "blob offset is not aligned")?;
        rule(
            u64::from(raw.offset).checked_add(raw.len).is_some_and(|e| e <= u64::from(raw.logical)),
            "extent beyond its blob",
        )?;
        rule(
            raw.addr.checked_add(u64::from(raw.logical)).is_some(),
            "extent beyond the address space",
        )?;
        rule(tail.len() == checksum_kind.bytes(), "wrong number of checksums")?;
        let mut checksum = [0; 32];
        checksum[..tail.len()].copy_from_slice(tail);
        let blob = Blob {
            addr: Logical(raw.addr),
            stored: raw.stored,
            logical: raw.logical,
            compression,
            checksum_kind,
            checksum,
        };
        Ok(Extent::Packed { blob, offset: raw.offset, len: raw.len })
    }

    /// The extent as an item's value.
    pub fn encode(&self, birth: Txg) -> Vec<u8> {
        let mut raw = ExtentHeader {
            kind: 0,
            compression: 0,
            checksum_kind: 0,
            reserved0: 0,
            flags: 0,
            birth: birth.0,
            addr: 0,
            stored: 0,
            logical: 0,
            offset: 0,
            key_id: 0,
            len: self.len(),
        };
        let checksum_buf;
        let tail: &[u8] = match self {
            Extent::Inline { compression, logical, bytes } => {
                raw.kind = 1;
                raw.compression = *compression as u8;
                raw.stored = bytes.len() as u32;
                raw.logical = *logical;
                bytes
            }
            Extent::Plain { addr, checksum_kind, checksums, .. } => {
                raw.kind = 2;
                raw.addr = addr.0;
                raw.checksum_kind = *checksum_kind as u8;
                checksums
            }
            Extent::Packed { blob, offset, .. } => {
                raw.kind = 3;
                raw.compression = blob.compression as u8;
                raw.checksum_kind = blob.checksum_kind as u8;
                raw.addr = blob.addr.0;
                raw.stored = blob.stored;
                raw.logical = blob.logical;
                raw.offset = *offset;
                checksum_buf = blob.checksum;
                &checksum_buf[..blob.checksum_kind.bytes()]
            }
            Extent::Promised { .. } => {
                raw.kind = 4;
                &[]
            }
        };
        let mut bytes = Vec::with_capacity(ExtentHeader::BYTES + tail.len());
        bytes.extend_from_slice(&raw.to_bytes());
        bytes.extend_from_slice(tail);
        bytes
    }
}
