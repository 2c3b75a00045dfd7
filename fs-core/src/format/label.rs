//! Where things are on a device, and the label that says whose it is.
//!
//! ```text
//! 0        64 KiB        192 KiB        1 MiB                      end-128 KiB      end
//! | zeros   | label area 0 | zeros        | chunks ...              | label area 1   |
//! ```
//!
//! `end` is the device's size rounded down to 4 KiB. A label area is 128 KiB: the label in its
//! first 4 KiB, and from 64 KiB on the ring of superblocks (`superblock`). Both areas hold the
//! same. The first 4 KiB of the device are zero, so that nothing else is recognised there.

use super::{place_of, rule, BadBytes, DiskField, Skipped, FORMAT_VERSION};
use crate::disk_struct;
use crate::units::{align_down, Physical, SECTOR_BYTES};
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Offset of the first label area.
pub const LABEL_AREA_0: u64 = 64 << 10;
/// Bytes of a label area.
pub const LABEL_AREA_BYTES: u64 = 128 << 10;
/// Offset of the superblock ring in a label area.
pub const RING_OFFSET: u64 = 64 << 10;
/// Slots of the ring, one sector each. Group *n* writes slot *n* mod 16.
pub const RING_SLOTS: u64 = 16;
/// Where chunks may begin.
pub const DATA_START: u64 = 1 << 20;
/// Bytes of the name of a pool, at most: a zero follows.
const NAME_BYTES_MAX: usize = 63;
/// Magic of a label: at byte 65536 of every cairn device.
pub const LABEL_MAGIC: [u8; 8] = *b"cairn\xf5\x0fL";

/// Offsets of both label areas on a device of `bytes` bytes, or `None` if it is too small.
pub fn label_areas(bytes: u64) -> Option<[Physical; 2]> {
    let end = align_down(bytes, SECTOR_BYTES);
    let second = end.checked_sub(LABEL_AREA_BYTES)?;
    (second >= DATA_START).then_some([Physical(LABEL_AREA_0), Physical(second)])
}

/// The end of the space for chunks on a device of `bytes` bytes.
pub fn data_end(bytes: u64) -> u64 {
    align_down(bytes, SECTOR_BYTES).saturating_sub(LABEL_AREA_BYTES)
}

/// Offset of ring slot for group `txg` in the label area at `area`.
pub fn ring_slot(area: Physical, slot: u64) -> Physical {
    Physical(area.0 + RING_OFFSET + (slot % RING_SLOTS) * SECTOR_BYTES)
}

/// What keeps text from being the name of a pool, if anything does. A pool that has such a name all
/// the same, from before there was the rule, opens like any other.
///
/// `/`, `@` and `#` end a pool's name where something in it is named: `tank/home@monday`.
pub fn name_fault(name: &[u8]) -> Option<&'static str> {
    let Ok(text) = core::str::from_utf8(name) else { return Some("the name of a pool is UTF-8") };
    if name.len() > NAME_BYTES_MAX {
        Some("the name of a pool has at most 63 bytes")
    } else if text.contains(char::is_control) {
        Some("the name of a pool has no control characters")
    } else if text.contains(['/', '@', '#']) {
        Some("the name of a pool has no '/', '@' or '#', which end it: tank/home@monday")
    } else if text.starts_with('-') {
        Some("the name of a pool does not begin with '-', like an option")
    } else {
        None
    }
}

disk_struct! {
    /// Says that a device belongs to a pool. Written by mkfs, when the pool gets another name, and
    /// when a device falls behind or has everything again; not by a commit in which none fails.
    pub struct Label [4096] {
        /// Magic.
        0x000 magic: [u8; 8],
        /// Format version.
        0x008 version: u32,
        /// Bytes of a sector: 4096.
        0x00c sector_bytes: u32,
        /// Id of the pool; the UUID of the filesystem.
        0x010 pool_id: [u8; 16],
        /// Id of the device.
        0x020 device_id: [u8; 16],
        /// Index of the device in the pool.
        0x030 device_index: u16,
        /// Reserved.
        0x032 reserved0: [u8; 6],
        /// Usable bytes of the device.
        0x038 device_bytes: u64,
        /// Name of the pool, UTF-8, padded with zeros.
        0x040 name: [u8; 64],
        /// When the label was written, seconds since 1970.
        0x080 written: i64,
        /// Counts rewrites; of two valid labels the greater is right.
        0x088 sequence: u64,
        /// Counts changes of which devices are complete; zero in a pool that always had one device.
        0x090 epoch: u64,
        /// Number of entries in `members`; zero in a pool that always had one device.
        0x098 device_count: u16,
        /// Reserved.
        0x09a reserved1: [u8; 6],
        /// The devices of the pool, by index; what follows `device_count` entries is zero.
        0x0a0 members: Skipped<2560>,
        /// Reserved.
        0xaa0 reserved: Skipped<1344>,
        /// BLAKE3-256 of all bytes before this field.
        0xfe0 checksum: [u8; 32],
    }
}

disk_struct! {
    /// One device in the table of a label.
    pub struct LabelMember [40] {
        /// Id of the device; zero when it was removed, and its place is vacant.
        0x00 id: [u8; 16],
        /// Usable bytes of the device.
        0x10 bytes: u64,
        /// Zero when the device is complete: it has everything that was written to it. Else the
        /// group that was published when it missed something first.
        0x18 behind: u64,
        /// Reserved.
        0x20 reserved: [u8; 8],
    }
}

impl LabelMember {
    /// Whether it is the place of a device that was removed.
    pub fn is_vacant(&self) -> bool {
        self.id == [0; 16]
    }
}

/// Most devices of a pool: what a label can name.
pub const DEVICES_MAX: usize = 64;

/// Bytes that a table of devices gives for a vacant place: the fewest that a device can have.
pub const VACANT_BYTES: u64 = DATA_START + LABEL_AREA_BYTES;

/// Most bytes of a device: so many that those of all devices, and of a mirror's copies, can be
/// added up.
pub const DEVICE_BYTES_MAX: u64 = 1 << 56;

/// Where the table of devices is in a label.
const MEMBERS: Range<usize> = place_of(Label::FIELDS, "members");

/// Reads the table of devices from the bytes of a label that was decoded.
///
/// # Errors
/// The rule that is broken.
pub fn decode_members(label: &Label, bytes: &[u8]) -> Result<Vec<LabelMember>, BadBytes> {
    let count = usize::from(label.device_count);
    rule(count <= DEVICES_MAX, "label with too many devices")?;
    rule(
        count == 0 || count > usize::from(label.device_index),
        "label of a device beyond the last",
    )?;
    let table = bytes.get(MEMBERS).ok_or(BadBytes("label of the wrong length"))?;
    let (used, rest) = table.split_at(count * LabelMember::BYTES);
    rule(rest.iter().all(|byte| *byte == 0), "bytes after the last device of a label")?;
    let mut members = Vec::with_capacity(count);
    for (index, entry) in used.chunks_exact(LabelMember::BYTES).enumerate() {
        let member = <LabelMember as DiskField>::get(entry);
        rule(member.reserved == [0; 8], "reserved field of a label's device is not zero")?;
        rule(label_areas(member.bytes).is_some(), "label names an impossibly small device")?;
        rule(member.bytes <= DEVICE_BYTES_MAX, "label names an impossibly large device")?;
        let is_own = index == usize::from(label.device_index);
        rule(
            !member.is_vacant() || (member.bytes == VACANT_BYTES && member.behind == 0),
            "label with a device in a vacant place",
        )?;
        rule(
            !is_own || (member.id == label.device_id && member.bytes == label.device_bytes),
            "label contradicts its own table",
        )?;
        members.push(member);
    }
    Ok(members)
}

impl Label {
    /// What a label that cannot be used, torn perhaps, says about the size of its device. Only a
    /// hint where the other label may be.
    pub fn device_bytes_of(bytes: &[u8]) -> Option<u64> {
        let has_magic = bytes.len() == Label::BYTES && bytes[..8] == LABEL_MAGIC;
        has_magic.then(|| <Label as DiskField>::get(bytes).device_bytes)
    }

    /// Reads a label, checking magic, checksum and version in this order.
    ///
    /// # Errors
    /// [`crate::error::Error::NotCairn`] without magic or with a wrong checksum, and errors for
    /// unknown versions or broken rules.
    pub fn decode(bytes: &[u8]) -> Result<Label, crate::error::Error> {
        use crate::error::Error;
        if bytes.len() != Label::BYTES || bytes[..8] != LABEL_MAGIC {
            return Err(Error::NotCairn);
        }
        let label = <Label as DiskField>::get(bytes);
        if crate::platform::blake3(&bytes[..0xfe0]) != label.checksum {
            return Err(Error::NotCairn);
        }
        if label.version != FORMAT_VERSION {
            return Err(Error::Version { found: label.version });
        }
        label.check().map_err(|bad| bad.at(crate::units::Logical(0)))?;
        Ok(label)
    }

    fn check(&self) -> Result<(), BadBytes> {
        rule(u64::from(self.sector_bytes) == SECTOR_BYTES, "label with another sector size")?;
        rule(
            self.reserved0 == [0; 6] && self.reserved1 == [0; 6] && self.reserved.is_zero(),
            "reserved field of a label is not zero",
        )?;
        // It counts failures and changes of devices.
        rule(self.epoch < u64::MAX / 2, "label of an impossible epoch")?;
        rule(label_areas(self.device_bytes).is_some(), "label of an impossibly small device")?;
        rule(self.device_bytes <= DEVICE_BYTES_MAX, "label of an impossibly large device")
    }

    /// The label as bytes, its checksum computed.
    ///
    /// # Panics
    /// When there are more members than a label can name.
    pub fn encode(&self, members: &[LabelMember]) -> Vec<u8> {
        let mut bytes = vec![0; Label::BYTES];
        self.put(&mut bytes);
        for (member, entry) in
            members.iter().zip(bytes[MEMBERS].chunks_exact_mut(LabelMember::BYTES))
        {
            member.put(entry);
        }
        assert!(members.len() <= DEVICES_MAX, "{} devices in a label", members.len());
        let checksum = crate::platform::blake3(&bytes[..0xfe0]);
        bytes[0xfe0..].copy_from_slice(&checksum);
        bytes
    }
}
