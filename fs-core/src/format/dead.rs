//! Dead lists: what a version no longer refers to but its parent still does.
//!
//! A list is sorted by birth. All entries of one birth are in DEAD items with the keys
//! `(list, DEAD, birth << 20 | part)`; part 0 begins with a [`DeadHeader`] that sums them up, so
//! that a range of births is summed up by reading one item for each.

use super::chunk::CHUNK_BYTES_MAX;
use super::key::{kind, Key};
use super::space::Run;
use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{Logical, Txg, SECTOR_BYTES};
use alloc::vec::Vec;

disk_struct! {
    /// Head of part 0 of a DEAD item: all entries of one list with one birth.
    pub struct DeadHeader [32] {
        /// Number of entries.
        0x00 entries: u64,
        /// Bytes of their runs.
        0x08 bytes: u64,
        /// Number of the last part.
        0x10 last_part: u64,
        /// Reserved.
        0x18 reserved: u64,
    }
}

disk_struct! {
    /// An entry of a dead list.
    pub struct DeadEntry [16] {
        /// First logical address.
        0x00 addr: u64,
        /// Bytes of the run; the lowest bit is set for a tree node, clear for file data.
        0x08 bytes_and_node: u64,
    }
}

/// Entries in one part.
pub const PART_ENTRIES: usize = 250;
/// Parts of one birth.
const PARTS: u64 = 1 << 20;

/// A reference that a version dropped and its parent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeadRef {
    /// Group in which the reference entered the tree, or that wrote the node.
    pub birth: Txg,
    /// What it refers to.
    pub run: Run,
    /// Whether that is a tree node.
    pub is_node: bool,
}

/// The key of a part; `None` when birth or part are out of range.
pub fn key(list: u64, birth: Txg, part: u64) -> Option<Key> {
    let high = birth.0.checked_mul(PARTS)?;
    (part < PARTS).then(|| Key::new(list, kind::DEAD, high | part))
}

/// Birth and part of a key.
pub fn birth_and_part(key: Key) -> (Txg, u64) {
    (Txg(key.offset / PARTS), key.offset % PARTS)
}

/// A part of a dead list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Part 0 has it.
    pub header: Option<DeadHeader>,
    /// The entries.
    pub refs: Vec<DeadRef>,
}

impl Part {
    /// Reads a part.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(key: Key, bytes: &[u8]) -> Result<Part, BadBytes> {
        rule(key.kind == kind::DEAD, "item of another kind in a dead list")?;
        let (birth, part) = birth_and_part(key);
        rule(birth.0 != 0, "dead list entry without a birth")?;
        let mut rest = bytes;
        let mut header = None;
        if part == 0 {
            rule(bytes.len() >= DeadHeader::BYTES, "dead list part too short")?;
            let (head, tail) = bytes.split_at(DeadHeader::BYTES);
            let raw = <DeadHeader as DiskField>::get(head);
            rule(raw.reserved == 0, "reserved field of a dead list is not zero")?;
            rule(raw.last_part < PARTS, "dead list part out of range")?;
            rule(raw.entries >= 1, "dead list part without entries")?;
            (header, rest) = (Some(raw), tail);
        }
        rule(rest.len() % DeadEntry::BYTES == 0, "dead list part of a bad length")?;
        let count = rest.len() / DeadEntry::BYTES;
        rule((1..=PART_ENTRIES).contains(&count), "dead list part of a bad length")?;
        let mut refs = Vec::with_capacity(count);
        for bytes in rest.chunks_exact(DeadEntry::BYTES) {
            let raw = <DeadEntry as DiskField>::get(bytes);
            let is_node = raw.bytes_and_node & 1 == 1;
            let run = Run { addr: Logical(raw.addr), bytes: raw.bytes_and_node & !1 };
            rule(raw.addr % SECTOR_BYTES == 0, "dead list entry at an unaligned address")?;
            rule(
                (SECTOR_BYTES..=CHUNK_BYTES_MAX).contains(&run.bytes)
                    && run.bytes % SECTOR_BYTES == 0,
                "dead list entry of a bad length",
            )?;
            rule(run.addr.checked_add(run.bytes).is_some(), "dead list entry out of range")?;
            refs.push(DeadRef { birth, run, is_node });
        }
        Ok(Part { header, refs })
    }

    /// The part as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(DeadHeader::BYTES + self.refs.len() * DeadEntry::BYTES);
        if let Some(header) = &self.header {
            bytes.extend_from_slice(&header.to_bytes());
        }
        for entry in &self.refs {
            let bytes_and_node = entry.run.bytes | u64::from(entry.is_node);
            let raw = DeadEntry { addr: entry.run.addr.0, bytes_and_node };
            bytes.extend_from_slice(&raw.to_bytes());
        }
        bytes
    }
}
