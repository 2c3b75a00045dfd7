//! The intent log: frames in segments.
//!
//! A segment is a run of logical space in a data chunk. Frames follow each other in it, each a
//! multiple of the sector size. A frame carries a sequence number one greater than the frame before
//! it, and the checksum of that frame as its *chain*, so that a frame left over from an earlier use
//! of the space cannot be taken for the next one, and replay ends at the first frame that is not
//! there whole. The superblock names the place, the sequence and the chain of the first frame to
//! replay. The last frame of a segment names the next segment.
//!
//! A frame's payload is a list of records, each with the group it belongs to. Records are redo
//! records of state: "this item now has this value", "this range of this file is now this".
//! Replaying a record twice is the same as once. Records of published groups are skipped.

use super::extent::Extent;
use super::key::Key;
use super::space::Run;
use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{sector_round, Ino, Logical, TreeId, Txg, SECTOR_BYTES};
use alloc::vec::Vec;

disk_struct! {
    /// Head of a log frame; the payload follows, then zeros up to a whole sector.
    pub struct FrameHeader [128] {
        /// "CrnLogFr".
        0x00 magic: [u8; 8],
        /// BLAKE3-256 of the rest of the header and the payload.
        0x08 checksum: [u8; 32],
        /// Id of the pool.
        0x28 pool_id: [u8; 16],
        /// Sequence number.
        0x38 sequence: u64,
        /// Bytes of the payload.
        0x40 payload_bytes: u32,
        /// Number of records in it.
        0x44 record_count: u32,
        /// First address of the next segment; zero while this one goes on.
        0x48 next_segment: u64,
        /// Bytes of the next segment; zero while this one goes on.
        0x50 next_segment_bytes: u64,
        /// Checksum of the frame before.
        0x58 chain: [u8; 32],
        /// Reserved.
        0x78 reserved: [u8; 8],
    }
}

disk_struct! {
    /// Head of a log record; its body follows.
    pub struct RecordHeader [32] {
        /// Group the record belongs to.
        0x00 txg: u64,
        /// Subvolume.
        0x08 tree: u64,
        /// 1 item, 2 file range, 3 file attributes.
        0x10 kind: u8,
        /// Flags by kind: item: bit 0 the item is deleted, bit 1 keep size and space of the inode
        /// that is there.
        0x11 flags: u8,
        /// Reserved.
        0x12 reserved: u16,
        /// Bytes of the body.
        0x14 body_bytes: u32,
        /// Reserved.
        0x18 reserved1: u64,
    }
}

/// Magic of a frame.
pub const FRAME_MAGIC: [u8; 8] = *b"CrnLogFr";
/// Longest segment, in bytes.
pub const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// Longest payload of a frame, in bytes.
pub const PAYLOAD_BYTES_MAX: u32 = 8 << 20;

/// Where the checksummed part of a frame starts.
const CHECKED_FROM: usize = 0x28;

/// Bytes of a frame with that payload, which is at most [`PAYLOAD_BYTES_MAX`] long.
pub const fn frame_bytes(payload_bytes: u32) -> u64 {
    sector_round(FrameHeader::BYTES as u64 + payload_bytes as u64)
}

/// The part of a frame that its checksum covers.
pub fn checked_part(frame: &[u8], payload_bytes: u32) -> &[u8] {
    &frame[CHECKED_FROM..FrameHeader::BYTES + payload_bytes as usize]
}

impl FrameHeader {
    /// Reads the head of a frame. Whether the frame is whole and the right one is not known yet.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<FrameHeader, BadBytes> {
        let head = <FrameHeader as DiskField>::get(&bytes[..FrameHeader::BYTES]);
        rule(head.magic == FRAME_MAGIC, "frame without its magic")?;
        rule(head.reserved == [0; 8], "reserved field of a frame is not zero")?;
        rule(head.payload_bytes <= PAYLOAD_BYTES_MAX, "frame too long")?;
        let least = u64::from(head.record_count) * RecordHeader::BYTES as u64;
        rule(least <= u64::from(head.payload_bytes), "more records than fit in a frame")?;
        let (next, bytes) = (head.next_segment, head.next_segment_bytes);
        rule((next == 0) == (bytes == 0), "next segment without address or length")?;
        rule(next % SECTOR_BYTES == 0 && bytes % SECTOR_BYTES == 0, "next segment unaligned")?;
        rule(bytes <= SEGMENT_BYTES_MAX, "next segment too long")?;
        rule(next.checked_add(bytes).is_some(), "next segment out of range")?;
        Ok(head)
    }

    /// The segment that the next frame is in, when it is not this one.
    pub fn next(&self) -> Option<Run> {
        let run = Run { addr: Logical(self.next_segment), bytes: self.next_segment_bytes };
        (run.bytes > 0).then_some(run)
    }
}

/// What a range of a file has become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RangeContent {
    /// These bytes; as many as the range is long.
    Bytes(Vec<u8>),
    /// This extent, already on the device. The group that wrote the record took its space.
    Written(Extent),
    /// This extent, which others refer to already: one more reference.
    Shared(Extent),
    /// Nothing: reads as zeros.
    Hole,
    /// Promised room.
    Promised,
}

/// A redo record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An item has this value now, or is gone.
    Item {
        /// The item.
        key: Key,
        /// Its value.
        value: Option<Vec<u8>>,
        /// For INODE items of regular files: size, space and change of data are not part of this
        /// record; keep what is there, or zero.
        keep_size: bool,
    },
    /// A range of a file has this content now.
    Range {
        /// The file.
        ino: Ino,
        /// First byte; a multiple of the sector size.
        offset: u64,
        /// Bytes; a multiple of the sector size, except that a hole may reach to 2^64 - 1.
        len: u64,
        /// The content.
        content: RangeContent,
    },
}

/// A record with its place in history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Group it belongs to.
    pub txg: Txg,
    /// Subvolume.
    pub tree: TreeId,
    /// What it says.
    pub record: Record,
}

const ITEM: u8 = 1;
const RANGE: u8 = 2;
const DELETED: u8 = 1;
const KEEP_SIZE: u8 = 2;

impl LogRecord {
    /// Appends the record to `out`.
    pub fn encode_to(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + RecordHeader::BYTES, 0);
        let (kind, flags) = match &self.record {
            Record::Item { key, value, keep_size } => {
                out.reserve(Key::BYTES + value.as_ref().map_or(0, Vec::len));
                let mut bytes = [0; Key::BYTES];
                key.encode(&mut bytes);
                out.extend_from_slice(&bytes);
                out.extend_from_slice(value.as_deref().unwrap_or(&[]));
                let deleted = if value.is_none() { DELETED } else { 0 };
                (ITEM, deleted | if *keep_size { KEEP_SIZE } else { 0 })
            }
            Record::Range { ino, offset, len, content } => {
                out.extend_from_slice(&ino.0.to_le_bytes());
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
                let flag = match content {
                    RangeContent::Bytes(bytes) => {
                        out.extend_from_slice(bytes);
                        1
                    }
                    RangeContent::Written(extent) => {
                        out.extend_from_slice(&extent.encode(self.txg));
                        2
                    }
                    RangeContent::Shared(extent) => {
                        out.extend_from_slice(&extent.encode(self.txg));
                        3
                    }
                    RangeContent::Hole => 4,
                    RangeContent::Promised => 5,
                };
                (RANGE, flag)
            }
        };
        let body = out.len() - start - RecordHeader::BYTES;
        let raw = RecordHeader {
            txg: self.txg.0,
            tree: self.tree.0,
            kind,
            flags,
            reserved: 0,
            body_bytes: body as u32,
            reserved1: 0,
        };
        raw.put(&mut out[start..start + RecordHeader::BYTES]);
    }

    /// Reads the record at the start of `bytes`; returns it with the bytes it took.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<(LogRecord, usize), BadBytes> {
        rule(bytes.len() >= RecordHeader::BYTES, "log record cut off")?;
        let raw = <RecordHeader as DiskField>::get(&bytes[..RecordHeader::BYTES]);
        rule(raw.reserved == 0 && raw.reserved1 == 0, "reserved field of a log record")?;
        let tail = &bytes[RecordHeader::BYTES..];
        rule(tail.len() >= raw.body_bytes as usize, "log record cut off")?;
        let body = &tail[..raw.body_bytes as usize];
        let txg = Txg(raw.txg);
        rule(raw.txg != 0 && TreeId(raw.tree).is_subvol(), "log record of no subvolume")?;
        let record = match raw.kind {
            ITEM => decode_item(body, raw.flags)?,
            RANGE => decode_range(body, raw.flags, txg)?,
            _ => return Err(BadBytes("unknown kind of log record")),
        };
        let used = RecordHeader::BYTES + body.len();
        Ok((LogRecord { txg, tree: TreeId(raw.tree), record }, used))
    }
}

fn decode_item(body: &[u8], flags: u8) -> Result<Record, BadBytes> {
    rule(flags & !(DELETED | KEEP_SIZE) == 0, "unknown flags of a log record")?;
    rule(body.len() >= Key::BYTES, "log record without a key")?;
    let (key, value) = body.split_at(Key::BYTES);
    let deleted = flags & DELETED != 0;
    rule(!deleted || value.is_empty(), "deleted item with a value")?;
    rule(value.len() <= super::node::VALUE_BYTES_MAX, "value too long")?;
    Ok(Record::Item {
        key: Key::decode(key)?,
        value: (!deleted).then(|| value.to_vec()),
        keep_size: flags & KEEP_SIZE != 0,
    })
}

fn decode_range(body: &[u8], flags: u8, txg: Txg) -> Result<Record, BadBytes> {
    rule(body.len() >= 24, "log record without a range")?;
    let (head, rest) = body.split_at(24);
    let (ino, offset, len) =
        (Ino(u64::get(&head[..8])), u64::get(&head[8..16]), u64::get(&head[16..]));
    rule(offset % SECTOR_BYTES == 0 && len > 0, "log range unaligned")?;
    let end = offset.checked_add(len).ok_or(BadBytes("log range beyond the largest file"))?;
    rule(flags == 4 || len % SECTOR_BYTES == 0, "log range unaligned")?;
    rule(flags == 4 || end <= super::extent::FILE_BYTES_MAX + 1, "log range too far out")?;
    let content = match flags {
        1 => {
            rule(rest.len() as u64 == len, "log range of the wrong length")?;
            RangeContent::Bytes(rest.to_vec())
        }
        2 | 3 => {
            let (extent, birth) = Extent::decode(rest, offset, txg)?;
            rule(extent.len() == len, "log range of the wrong length")?;
            rule(birth == txg, "log range born in another group than its record's")?;
            rule(
                matches!(extent, Extent::Plain { .. } | Extent::Packed { .. }),
                "log range names no data",
            )?;
            if flags == 2 {
                RangeContent::Written(extent)
            } else {
                RangeContent::Shared(extent)
            }
        }
        4 | 5 => {
            rule(rest.is_empty(), "log range with a body")?;
            if flags == 4 {
                RangeContent::Hole
            } else {
                RangeContent::Promised
            }
        }
        _ => return Err(BadBytes("unknown content of a log range")),
    };
    Ok(Record::Range { ino, offset, len, content })
}
