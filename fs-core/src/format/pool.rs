//! Items of the pool tree.

use super::ptr::{encode_optional, BlockPtr};
use super::{rule, BadBytes, DiskField, Skipped};
use crate::disk_struct;
use crate::units::Txg;

disk_struct! {
    /// Value of a SUBVOL item.
    pub struct SubvolItem [512] {
        /// Root node of the subvolume's tree; zeros when it is empty.
        0x00 root: [u8; 64],
        /// Next inode number to hand out.
        0x40 next_ino: u64,
        /// Number of inodes.
        0x48 inodes: u64,
        /// Bytes of data allocated on disk.
        0x50 stored_bytes: u64,
        /// Bytes promised by fallocate and not yet written.
        0x58 promised_bytes: u64,
        /// Bytes of data before compression.
        0x60 logical_bytes: u64,
        /// Group that made the subvolume.
        0x68 birth: u64,
        /// Identity of the subvolume.
        0x70 id: [u8; 16],
        /// Identity of the subvolume or snapshot it was received or cloned from.
        0x80 origin: [u8; 16],
        /// Compression of new data: 0 as the pool says, 1 none, 2 zstd.
        0x90 compression: u8,
        /// Level for it; 0 is the default.
        0x91 compression_level: i8,
        /// Checksum of new data: 0 as the pool says, 1 none, 2 CRC32C, 3 BLAKE3.
        0x92 checksum: u8,
        /// Reserved.
        0x93 reserved0: [u8; 5],
        /// Reserved for flags (read-only, snapshot).
        0x98 flags: u64,
        /// Group of the newest snapshot; 0 when there is none.
        0xa0 snapshot_txg: u64,
        /// Reserved for names, times, quotas and the content hash.
        0xa8 reserved: Skipped<344>,
    }
}

impl SubvolItem {
    /// An item whose fields are all zero.
    pub fn zeroed() -> SubvolItem {
        <SubvolItem as DiskField>::get(&[0; SubvolItem::BYTES])
    }

    /// Reads a subvolume. The root pointer is decoded by [`SubvolItem::root`].
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<SubvolItem, BadBytes> {
        rule(bytes.len() == SubvolItem::BYTES, "subvolume item of the wrong length")?;
        let item = <SubvolItem as DiskField>::get(bytes);
        rule(
            item.reserved0 == [0; 5] && item.flags == 0 && item.reserved.is_zero(),
            "reserved field of a subvolume is not zero",
        )?;
        rule(item.compression <= 2 && item.checksum <= 3, "unknown data settings")?;
        rule(item.next_ino >= super::pool::FIRST_INO, "next inode number out of range")?;
        Ok(item)
    }

    /// The root pointer.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn root(&self, newest: Txg) -> Result<Option<BlockPtr>, BadBytes> {
        BlockPtr::decode(&self.root, newest)
    }

    /// Sets the root pointer.
    pub fn set_root(&mut self, root: Option<&BlockPtr>) {
        self.root = encode_optional(root);
    }
}

/// Inode number of a subvolume's root directory.
pub const ROOT_INO: u64 = 1;
/// First inode number handed out after the root directory's.
pub const FIRST_INO: u64 = 2;
/// Largest inode number: the bits above tell subvolumes apart in what a mount shows.
pub const INO_MAX: u64 = (1 << 48) - 1;

/// Numbers of PROPERTY items. Permanent.
pub mod property {
    /// Compression of new data in the pool: one byte kind (1 none, 2 zstd), one byte level.
    pub const COMPRESSION: u64 = 1;
    /// Checksum of new data in the pool: one byte (1 none, 2 CRC32C, 3 BLAKE3).
    pub const CHECKSUM: u64 = 2;
}
