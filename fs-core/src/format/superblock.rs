//! The superblock: the root of everything, one for each commit.
//!
//! Group *n* writes slot *n* mod 16 of the ring in both label areas of every device, after a flush
//! that made all it refers to durable, and before the flush that publishes it. The valid superblock
//! with the greatest group wins. A torn write fails the checksum, and the one before it wins.

use super::chunk::{Chunk, ChunkHeader, StripeItem};
use super::ptr::{encode_optional, BlockPtr};
use super::{features, place_of, rule, BadBytes, DiskField, Skipped, FORMAT_VERSION};
use crate::disk_struct;
use crate::error::{Error, FeatureClass};
use crate::units::{Logical, Txg, SECTOR_BYTES};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Magic of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"cairn\xf5\x0fS";

disk_struct! {
    /// The superblock's fixed fields.
    pub struct SuperblockRaw [4096] {
        /// Magic.
        0x000 magic: [u8; 8],
        /// Format version.
        0x008 version: u32,
        /// Bytes of a tree node: 16384, 32768 or 65536.
        0x00c node_bytes: u32,
        /// Feature bits that an older reader may ignore.
        0x010 compat: u64,
        /// Feature bits that forbid writing when unknown.
        0x018 ro_compat: u64,
        /// Feature bits that forbid opening when unknown.
        0x020 incompat: u64,
        /// Transaction group this superblock publishes.
        0x028 txg: u64,
        /// When it was written, seconds since 1970.
        0x030 written: i64,
        /// Id of the pool.
        0x038 pool_id: [u8; 16],
        /// Secret key of name hashes.
        0x048 hash_secret: [u8; 16],
        /// Number of devices in the pool.
        0x058 device_count: u16,
        /// Data profile of new chunks.
        0x05a data_profile: u8,
        /// Metadata profile of new chunks.
        0x05b metadata_profile: u8,
        /// 1 when the pool was closed with nothing left to do, so that a reader may skip orphans
        /// and the log.
        0x05c clean: u8,
        /// Number of embedded system chunks.
        0x05d system_chunks: u8,
        /// Copies of the data profile, for mirrors of more than two; else zero.
        0x05e data_copies: u8,
        /// Copies of the metadata profile, likewise.
        0x05f metadata_copies: u8,
        /// Logical address of the next new chunk.
        0x060 next_chunk: u64,
        /// Bytes of a new chunk that promises of space count on; in a pool that has grown, new
        /// chunks may be larger.
        0x068 chunk_bytes: u64,
        /// Id of the next new subvolume.
        0x070 next_subvol: u64,
        /// Id of the subvolume that is mounted by default.
        0x078 default_subvol: u64,
        /// Root of the pool tree.
        0x080 pool_root: [u8; 64],
        /// Root of the chunk tree.
        0x0c0 chunk_root: [u8; 64],
        /// Root of the space tree.
        0x100 space_root: [u8; 64],
        /// Root of the shared-reference tree.
        0x140 refs_root: [u8; 64],
        /// Root of the tree of dead lists.
        0x180 dead_root: [u8; 64],
        /// The residue block.
        0x1c0 residue: [u8; 64],
        /// First logical address of the log segment where replay begins; zero when there is no log.
        0x200 log_segment: u64,
        /// Bytes of that segment.
        0x208 log_segment_bytes: u64,
        /// Offset in it of the first frame to replay.
        0x210 log_offset: u64,
        /// Sequence number that frame has, if it was ever written.
        0x218 log_sequence: u64,
        /// Chain value that frame has.
        0x220 log_chain: [u8; 32],
        /// Bytes in use by data chunks, for information.
        0x240 data_used: u64,
        /// Bytes in use by metadata and system chunks, one copy counted, for information.
        0x248 metadata_used: u64,
        /// Reserved.
        0x250 reserved1: Skipped<432>,
        /// Embedded system chunks: for each its logical address and its CHUNK value.
        0x400 system: Skipped<2048>,
        /// Reserved.
        0xc00 reserved2: Skipped<992>,
        /// BLAKE3-256 of all bytes before this field.
        0xfe0 checksum: [u8; 32],
    }
}

/// Where the embedded system chunks are.
const SYSTEM: Range<usize> = place_of(SuperblockRaw::FIELDS, "system");

/// Where the intent log goes on after the published group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogStart {
    /// The segment.
    pub segment: super::space::Run,
    /// Offset of the next frame in it, a multiple of the sector size.
    pub offset: u64,
    /// Sequence number the next frame must have.
    pub sequence: u64,
    /// Chain value the next frame must have.
    pub chain: [u8; 32],
}

/// A superblock whose fields can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Group it publishes.
    pub txg: Txg,
    /// When it was written, seconds since 1970.
    pub written: i64,
    /// Id of the pool.
    pub pool_id: [u8; 16],
    /// Feature bits: compat, ro-compat, incompat.
    pub features: [u64; 3],
    /// Secret key of name hashes.
    pub hash_secret: [u8; 16],
    /// Bytes of a tree node.
    pub node_bytes: u32,
    /// Number of devices.
    pub device_count: u16,
    /// Profile of new data chunks.
    pub data_profile: super::chunk::Profile,
    /// Profile of new metadata chunks.
    pub metadata_profile: super::chunk::Profile,
    /// Whether the pool was closed with nothing left to do.
    pub clean: bool,
    /// Logical address of the next new chunk.
    pub next_chunk: Logical,
    /// Bytes of a new chunk.
    pub chunk_bytes: u64,
    /// Id of the next new subvolume.
    pub next_subvol: u64,
    /// Id of the subvolume that is mounted by default.
    pub default_subvol: u64,
    /// Root of the pool tree.
    pub pool_root: Option<BlockPtr>,
    /// Root of the chunk tree.
    pub chunk_root: Option<BlockPtr>,
    /// Root of the space tree.
    pub space_root: Option<BlockPtr>,
    /// Root of the shared-reference tree.
    pub refs_root: Option<BlockPtr>,
    /// Root of the tree of dead lists.
    pub dead_root: Option<BlockPtr>,
    /// The residue block.
    pub residue: Option<BlockPtr>,
    /// Where the log goes on.
    pub log: Option<LogStart>,
    /// Bytes in use by data chunks, for information.
    pub data_used: u64,
    /// Bytes in use by metadata and system chunks, one copy counted, for information.
    pub metadata_used: u64,
    /// Chunks that hold the chunk tree.
    pub system_chunks: Vec<Chunk>,
}

/// How many system chunks a superblock can embed.
pub const SYSTEM_CHUNKS_MAX: usize = 16;

impl Superblock {
    /// Reads a superblock of any pool.
    ///
    /// # Errors
    /// [`Error::NotCairn`] when magic or checksum are wrong; [`Error::Version`] and
    /// [`Error::Features`] (incompat only) for what a newer version wrote; [`Error::Corrupt`] for a
    /// broken rule. Unknown ro-compat bits are left to the caller, who knows whether it will write.
    pub fn decode(bytes: &[u8]) -> Result<Superblock, Error> {
        if bytes.len() != SuperblockRaw::BYTES || bytes[..8] != SUPERBLOCK_MAGIC {
            return Err(Error::NotCairn);
        }
        let raw = <SuperblockRaw as DiskField>::get(bytes);
        if crate::platform::blake3(&bytes[..0xfe0]) != raw.checksum {
            return Err(Error::NotCairn);
        }
        if raw.version != FORMAT_VERSION {
            return Err(Error::Version { found: raw.version });
        }
        let unknown = raw.incompat & !features::INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::Features { class: FeatureClass::Incompat, unknown });
        }
        Superblock::from_raw(&raw, &bytes[SYSTEM]).map_err(|bad| bad.at(Logical(0)))
    }

    /// Unknown ro-compat bits: writing is forbidden when there are any.
    pub fn unknown_ro_compat(&self) -> u64 {
        self.features[1] & !features::RO_COMPAT_KNOWN
    }

    fn from_raw(raw: &SuperblockRaw, system: &[u8]) -> Result<Superblock, BadBytes> {
        let txg = Txg(raw.txg);
        rule(raw.txg != 0, "superblock of group zero")?;
        rule(
            raw.reserved1.is_zero() && raw.reserved2.is_zero(),
            "reserved field of a superblock is not zero",
        )?;
        rule(matches!(raw.node_bytes, 16384 | 32768 | 65536), "node size out of range")?;
        rule(
            (1..=super::label::DEVICES_MAX).contains(&usize::from(raw.device_count)),
            "number of devices out of range",
        )?;
        rule(raw.clean <= 1, "clean flag out of range")?;
        rule(
            raw.chunk_bytes.is_power_of_two()
                && (super::chunk::CHUNK_BYTES_MIN..=super::chunk::CHUNK_BYTES_MAX)
                    .contains(&raw.chunk_bytes),
            "chunk size out of range",
        )?;
        rule(raw.next_chunk % super::chunk::CHUNK_BYTES_MIN == 0, "next chunk unaligned")?;
        let profile = |number, copies| {
            super::chunk::Profile::from_raw(number, copies).ok_or(BadBytes("unknown profile"))
        };
        let root = |bytes: &[u8; 64]| BlockPtr::decode(bytes, txg);
        let log = if raw.log_segment == 0 {
            rule(raw.log_segment_bytes == 0 && raw.log_offset == 0, "log without a segment")?;
            None
        } else {
            rule(
                raw.log_segment % SECTOR_BYTES == 0
                    && raw.log_segment_bytes % SECTOR_BYTES == 0
                    && raw.log_offset % SECTOR_BYTES == 0,
                "log segment unaligned",
            )?;
            rule(
                raw.log_segment_bytes <= super::log::SEGMENT_BYTES_MAX
                    && raw.log_offset <= raw.log_segment_bytes
                    && raw.log_segment.checked_add(raw.log_segment_bytes).is_some(),
                "log segment out of range",
            )?;
            Some(LogStart {
                segment: super::space::Run {
                    addr: Logical(raw.log_segment),
                    bytes: raw.log_segment_bytes,
                },
                offset: raw.log_offset,
                sequence: raw.log_sequence,
                chain: raw.log_chain,
            })
        };
        Ok(Superblock {
            txg,
            written: raw.written,
            pool_id: raw.pool_id,
            features: [raw.compat, raw.ro_compat, raw.incompat],
            hash_secret: raw.hash_secret,
            node_bytes: raw.node_bytes,
            device_count: raw.device_count,
            data_profile: profile(raw.data_profile, raw.data_copies)?,
            metadata_profile: profile(raw.metadata_profile, raw.metadata_copies)?,
            clean: raw.clean == 1,
            next_chunk: Logical(raw.next_chunk),
            chunk_bytes: raw.chunk_bytes,
            next_subvol: raw.next_subvol,
            default_subvol: raw.default_subvol,
            pool_root: root(&raw.pool_root)?,
            chunk_root: root(&raw.chunk_root)?,
            space_root: root(&raw.space_root)?,
            refs_root: root(&raw.refs_root)?,
            dead_root: root(&raw.dead_root)?,
            residue: root(&raw.residue)?,
            log,
            data_used: raw.data_used,
            metadata_used: raw.metadata_used,
            system_chunks: decode_system(system, raw.system_chunks)?,
        })
    }

    /// The superblock as bytes, its checksum computed.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; SuperblockRaw::BYTES];
        let mut raw = <SuperblockRaw as DiskField>::get(&bytes);
        raw.magic = SUPERBLOCK_MAGIC;
        raw.version = FORMAT_VERSION;
        raw.node_bytes = self.node_bytes;
        [raw.compat, raw.ro_compat, raw.incompat] = self.features;
        raw.txg = self.txg.0;
        raw.written = self.written;
        raw.pool_id = self.pool_id;
        raw.hash_secret = self.hash_secret;
        raw.device_count = self.device_count;
        (raw.data_profile, raw.data_copies) = self.data_profile.raw();
        (raw.metadata_profile, raw.metadata_copies) = self.metadata_profile.raw();
        raw.clean = u8::from(self.clean);
        raw.next_chunk = self.next_chunk.0;
        raw.chunk_bytes = self.chunk_bytes;
        raw.next_subvol = self.next_subvol;
        raw.default_subvol = self.default_subvol;
        raw.pool_root = encode_optional(self.pool_root.as_ref());
        raw.chunk_root = encode_optional(self.chunk_root.as_ref());
        raw.space_root = encode_optional(self.space_root.as_ref());
        raw.refs_root = encode_optional(self.refs_root.as_ref());
        raw.dead_root = encode_optional(self.dead_root.as_ref());
        raw.residue = encode_optional(self.residue.as_ref());
        if let Some(log) = &self.log {
            raw.log_segment = log.segment.addr.0;
            raw.log_segment_bytes = log.segment.bytes;
            raw.log_offset = log.offset;
            raw.log_sequence = log.sequence;
            raw.log_chain = log.chain;
        }
        raw.data_used = self.data_used;
        raw.metadata_used = self.metadata_used;
        assert!(
            self.system_chunks.len() <= SYSTEM_CHUNKS_MAX,
            "{} system chunks do not fit in a superblock",
            self.system_chunks.len()
        );
        raw.system_chunks = self.system_chunks.len() as u8;
        raw.put(&mut bytes);
        encode_system(&self.system_chunks, &mut bytes[SYSTEM]);
        let checksum = crate::platform::blake3(&bytes[..0xfe0]);
        bytes[0xfe0..].copy_from_slice(&checksum);
        bytes
    }
}

fn encode_system(chunks: &[Chunk], bytes: &mut [u8]) {
    let mut at = 0;
    for chunk in chunks {
        bytes[at..at + 8].copy_from_slice(&chunk.logical.0.to_le_bytes());
        let value = chunk.encode();
        bytes[at + 8..at + 8 + value.len()].copy_from_slice(&value);
        at += 8 + value.len();
    }
}

fn decode_system(bytes: &[u8], count: u8) -> Result<Vec<Chunk>, BadBytes> {
    rule(count as usize <= SYSTEM_CHUNKS_MAX, "too many system chunks")?;
    let mut chunks = Vec::with_capacity(count as usize);
    let mut rest = bytes;
    for _ in 0..count {
        rule(rest.len() >= 8 + ChunkHeader::BYTES, "system chunk cut off")?;
        let (addr, tail) = rest.split_at(8);
        let stripes = <ChunkHeader as DiskField>::get(&tail[..ChunkHeader::BYTES]).stripe_count;
        let len = ChunkHeader::BYTES + stripes as usize * StripeItem::BYTES;
        rule(tail.len() >= len, "system chunk cut off")?;
        chunks.push(Chunk::decode(Logical(u64::get(addr)), &tail[..len])?);
        rest = &tail[len..];
    }
    rule(rest.iter().all(|b| *b == 0), "bytes after the system chunks are not zero")?;
    Ok(chunks)
}
