//! Free space and shared references.
//!
//! A chunk is cut into regions of [`REGION_BYTES`] (its last region may be shorter). A region with
//! any used sector has a SPACE_BITMAP item: one bit a sector, least significant bit first, set when
//! used. A region without one is free. Each chunk has a SPACE_SUMMARY item with its number of used
//! sectors, so that opening reads a few bytes a chunk and bitmaps are read when first needed.
//!
//! The space tree says what was in use when the cut of the group was made. What the writing of the
//! space tree itself used and freed is in the *residue*, a list of [`ResidueItem`]s in a block
//! named by the superblock; the next group folds it into the tree.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{Logical, SECTOR_BYTES};
use alloc::vec::Vec;

/// Bytes of logical space one bitmap describes.
pub const REGION_BYTES: u64 = 32 << 20;

disk_struct! {
    /// Value of a SPACE_SUMMARY item.
    pub struct SummaryItem [16] {
        /// Sectors of the chunk that are in use.
        0x00 used_sectors: u64,
        /// Reserved.
        0x08 reserved: u64,
    }
}

disk_struct! {
    /// Value of a REF item: a run of sectors with further references.
    pub struct RefItem [16] {
        /// Bytes of the run.
        0x00 bytes: u64,
        /// References beyond the first; at least one.
        0x08 extra: u64,
    }
}

disk_struct! {
    /// Head of the residue block; the items follow.
    pub struct ResidueHeader [32] {
        /// "CrnResid".
        0x00 magic: [u8; 8],
        /// Group that wrote it.
        0x08 txg: u64,
        /// Number of items.
        0x10 count: u32,
        /// Reserved.
        0x14 reserved: [u8; 12],
    }
}

disk_struct! {
    /// One run of the residue.
    pub struct ResidueItem [16] {
        /// First logical address.
        0x00 addr: u64,
        /// Bytes of the run; the lowest bit is set when the run was freed, clear when it was taken.
        0x08 bytes_and_freed: u64,
    }
}

/// Magic of the residue block.
pub const RESIDUE_MAGIC: [u8; 8] = *b"CrnResid";

/// A run of logical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First address, a multiple of the sector size.
    pub addr: Logical,
    /// Length, a positive multiple of the sector size.
    pub bytes: u64,
}

impl Run {
    /// The address after the run.
    pub fn end(&self) -> Logical {
        Logical(self.addr.0 + self.bytes)
    }
}

/// What the space tree does not know yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Residue {
    /// Runs that are in use.
    pub taken: Vec<Run>,
    /// Runs that are free.
    pub freed: Vec<Run>,
}

impl Residue {
    /// Bytes of the encoded residue.
    pub fn encoded_bytes(&self) -> usize {
        ResidueHeader::BYTES + (self.taken.len() + self.freed.len()) * ResidueItem::BYTES
    }

    /// Reads a residue written by group `txg`.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8], txg: u64) -> Result<Residue, BadBytes> {
        rule(bytes.len() >= ResidueHeader::BYTES, "residue too short")?;
        let (head, tail) = bytes.split_at(ResidueHeader::BYTES);
        let raw = <ResidueHeader as DiskField>::get(head);
        rule(raw.magic == RESIDUE_MAGIC, "residue without its magic")?;
        rule(raw.txg == txg && raw.reserved == [0; 12], "residue of another group")?;
        let want = (raw.count as usize).checked_mul(ResidueItem::BYTES);
        rule(want == Some(tail.len()), "residue of the wrong length")?;
        let mut residue = Residue::default();
        for bytes in tail.chunks_exact(ResidueItem::BYTES) {
            let item = <ResidueItem as DiskField>::get(bytes);
            let run = Run { addr: Logical(item.addr), bytes: item.bytes_and_freed & !1 };
            rule(run.addr.0 % SECTOR_BYTES == 0, "residue run at an unaligned address")?;
            rule(run.bytes > 0 && run.bytes % SECTOR_BYTES == 0, "residue run of a bad length")?;
            rule(run.addr.checked_add(run.bytes).is_some(), "residue run out of range")?;
            if item.bytes_and_freed & 1 == 1 {
                residue.freed.push(run);
            } else {
                residue.taken.push(run);
            }
        }
        Ok(residue)
    }

    /// The residue as bytes.
    pub fn encode(&self, txg: u64) -> Vec<u8> {
        let raw = ResidueHeader {
            magic: RESIDUE_MAGIC,
            txg,
            count: (self.taken.len() + self.freed.len()) as u32,
            reserved: [0; 12],
        };
        let mut bytes = Vec::with_capacity(self.encoded_bytes());
        bytes.extend_from_slice(&raw.to_bytes());
        let taken = self.taken.iter().map(|run| (run, 0));
        let freed = self.freed.iter().map(|run| (run, 1));
        for (run, bit) in taken.chain(freed) {
            let item = ResidueItem { addr: run.addr.0, bytes_and_freed: run.bytes | bit };
            bytes.extend_from_slice(&item.to_bytes());
        }
        bytes
    }
}

impl RefItem {
    /// Reads a reference count for the run that starts at `addr`.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(addr: Logical, bytes: &[u8]) -> Result<RefItem, BadBytes> {
        rule(bytes.len() == RefItem::BYTES, "reference item of the wrong length")?;
        let item = <RefItem as DiskField>::get(bytes);
        rule(addr.0 % SECTOR_BYTES == 0, "reference item at an unaligned address")?;
        rule(item.bytes > 0 && item.bytes % SECTOR_BYTES == 0, "reference item of a bad length")?;
        rule(addr.checked_add(item.bytes).is_some(), "reference item out of range")?;
        rule(item.extra > 0, "reference item without a reference")?;
        Ok(item)
    }
}

impl SummaryItem {
    /// Reads a summary.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<SummaryItem, BadBytes> {
        rule(bytes.len() == SummaryItem::BYTES, "summary of the wrong length")?;
        let item = <SummaryItem as DiskField>::get(bytes);
        rule(item.reserved == 0, "reserved field of a summary is not zero")?;
        Ok(item)
    }
}
