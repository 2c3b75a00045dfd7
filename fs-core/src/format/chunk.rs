//! Chunks and devices: the map from logical addresses to places on devices.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::units::{Logical, Physical, Txg, SECTOR_BYTES};
use alloc::vec::Vec;

/// What a chunk holds. The numbers are permanent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ChunkKind {
    /// File data and intent-log segments.
    Data = 1,
    /// Tree nodes and other metadata.
    Metadata = 2,
    /// Nodes of the chunk tree; mapped by the superblock itself.
    System = 3,
}

/// How a chunk lies on its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Profile {
    /// One copy on one device.
    Single,
    /// Two copies on one device.
    Dup,
    /// One copy, striped over devices.
    Stripe,
    /// Two copies on two devices.
    Mirror,
    /// Three copies on three devices.
    Mirror3,
    /// Four copies on four devices.
    Mirror4,
    /// Mirrors of two devices, striped.
    StripeMirror,
    /// Reserved: one parity.
    Parity1,
    /// Reserved: two parities.
    Parity2,
    /// Reserved: three parities.
    Parity3,
}

impl Profile {
    /// Every profile.
    pub const ALL: [Profile; 10] = {
        use Profile::*;
        [Single, Dup, Stripe, Mirror, Mirror3, Mirror4, StripeMirror, Parity1, Parity2, Parity3]
    };

    /// The profile with those permanent numbers: its own, and how many copies if more than two.
    pub fn from_raw(number: u8, copies: u8) -> Option<Profile> {
        Profile::ALL.into_iter().find(|profile| profile.raw() == (number, copies))
    }

    /// Its permanent numbers.
    pub fn raw(self) -> (u8, u8) {
        match self {
            Profile::Single => (1, 0),
            Profile::Dup => (2, 0),
            Profile::Stripe => (3, 0),
            Profile::Mirror => (4, 0),
            Profile::Mirror3 => (4, 3),
            Profile::Mirror4 => (4, 4),
            Profile::StripeMirror => (5, 0),
            Profile::Parity1 => (6, 0),
            Profile::Parity2 => (7, 0),
            Profile::Parity3 => (8, 0),
        }
    }

    /// How many full copies of the data the profile keeps, for those that keep copies.
    pub fn copies(self) -> u64 {
        match self {
            Profile::Dup | Profile::Mirror | Profile::StripeMirror => 2,
            Profile::Mirror3 => 3,
            Profile::Mirror4 => 4,
            _ => 1,
        }
    }

    /// On how many devices the copies of a byte are: the fewest the profile can do with.
    pub fn devices_min(self) -> u64 {
        match self {
            Profile::Dup => 1,
            other => other.copies(),
        }
    }

    /// Whether a chunk is cut over several devices in units of [`STRIPE_UNIT`].
    pub fn is_striped(self) -> bool {
        matches!(self, Profile::Stripe | Profile::StripeMirror)
    }

    /// Whether this version can make and read it.
    pub fn is_known(self) -> bool {
        !matches!(self, Profile::Parity1 | Profile::Parity2 | Profile::Parity3)
    }

    /// The profile of the chunk tree's own chunks in a pool with this profile for metadata: as many
    /// copies, but not striped, since they are small and the superblock has little room for them.
    pub fn of_system(self) -> Profile {
        match self {
            Profile::Stripe => Profile::Single,
            Profile::StripeMirror => Profile::Mirror,
            other => other,
        }
    }

    /// The name users write.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Single => "single",
            Profile::Dup => "dup",
            Profile::Stripe => "stripe",
            Profile::Mirror => "mirror",
            Profile::Mirror3 => "mirror3",
            Profile::Mirror4 => "mirror4",
            Profile::StripeMirror => "stripe+mirror",
            Profile::Parity1 => "parity1",
            Profile::Parity2 => "parity2",
            Profile::Parity3 => "parity3",
        }
    }
}

disk_struct! {
    /// Head of a CHUNK item's value; the stripes follow.
    pub struct ChunkHeader [48] {
        /// Logical bytes the chunk maps.
        0x00 length: u64,
        /// Group that made the chunk.
        0x08 birth: u64,
        /// Chunk kind: 1 data, 2 metadata, 3 system.
        0x10 kind: u8,
        /// Profile.
        0x11 profile: u8,
        /// Number of stripes that follow.
        0x12 stripe_count: u16,
        /// Bytes of a stripe unit, for striped profiles; else zero.
        0x14 stripe_unit: u32,
        /// Copies, for mirrors of more than two; else zero.
        0x18 copies: u8,
        /// Reserved.
        0x19 reserved0: [u8; 7],
        /// Reserved for flags, such as the write pointer of a zone.
        0x20 flags: u64,
        /// Reserved.
        0x28 reserved1: u64,
    }
}

disk_struct! {
    /// One stripe of a chunk: a run of bytes on a device.
    pub struct StripeItem [16] {
        /// Index of the device in the pool.
        0x00 device: u16,
        /// Reserved.
        0x02 reserved: [u8; 6],
        /// First byte on the device.
        0x08 physical: u64,
    }
}

/// A run of bytes on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// Index of the device in the pool.
    pub device: u16,
    /// First byte.
    pub physical: Physical,
}

/// Largest chunk, in bytes.
pub const CHUNK_BYTES_MAX: u64 = 1 << 30;
/// Smallest chunk, in bytes.
pub const CHUNK_BYTES_MIN: u64 = 1 << 20;
/// Largest number of stripes in a chunk.
pub const STRIPES_MAX: usize = 64;
/// Bytes that a striped chunk has on one device before it goes on with the next.
pub const STRIPE_UNIT: u64 = 64 << 10;

/// A chunk: a run of logical addresses and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// First logical address: the key's object. Never reused.
    pub logical: Logical,
    /// Logical bytes.
    pub length: u64,
    /// Group that made it.
    pub birth: Txg,
    /// What it holds.
    pub kind: ChunkKind,
    /// How it lies on the devices.
    pub profile: Profile,
    /// Where it lies.
    pub stripes: Vec<Stripe>,
}

impl Chunk {
    /// Bytes of the encoded value.
    pub fn encoded_bytes(&self) -> usize {
        ChunkHeader::BYTES + self.stripes.len() * StripeItem::BYTES
    }

    /// Reads a chunk whose fields can be trusted, except that its devices may not exist.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(logical: Logical, bytes: &[u8]) -> Result<Chunk, BadBytes> {
        rule(bytes.len() >= ChunkHeader::BYTES, "chunk item too short")?;
        let (head, tail) = bytes.split_at(ChunkHeader::BYTES);
        let raw = <ChunkHeader as DiskField>::get(head);
        rule(
            raw.reserved0 == [0; 7] && raw.reserved1 == 0 && raw.flags == 0,
            "reserved field of a chunk is not zero",
        )?;
        rule(logical.0 % CHUNK_BYTES_MIN == 0, "chunk at an unaligned address")?;
        rule(
            raw.length % CHUNK_BYTES_MIN == 0
                && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&raw.length),
            "chunk length out of range",
        )?;
        rule(logical.checked_add(raw.length).is_some(), "chunk beyond the address space")?;
        let kind = match raw.kind {
            1 => ChunkKind::Data,
            2 => ChunkKind::Metadata,
            3 => ChunkKind::System,
            _ => return Err(BadBytes("unknown chunk kind")),
        };
        let profile =
            Profile::from_raw(raw.profile, raw.copies).ok_or(BadBytes("unknown profile"))?;
        rule(profile.is_known(), "profile of a newer version")?;
        let count = raw.stripe_count as usize;
        rule(tail.len() == count * StripeItem::BYTES, "wrong number of stripes")?;
        let copies = profile.copies() as usize;
        let unit = if profile.is_striped() { STRIPE_UNIT } else { 0 };
        rule(u64::from(raw.stripe_unit) == unit, "stripe unit that the profile does not have")?;
        rule(
            count <= STRIPES_MAX
                && count >= copies
                && (count == copies || profile.is_striped() && count % copies == 0),
            "wrong number of stripes for the profile",
        )?;
        let columns = (count / copies) as u64;
        rule(
            unit == 0 || raw.length % (columns * CHUNK_BYTES_MIN) == 0,
            "chunk that its devices do not share evenly",
        )?;
        let mut stripes = Vec::with_capacity(count);
        for bytes in tail.chunks_exact(StripeItem::BYTES) {
            let raw_stripe = <StripeItem as DiskField>::get(bytes);
            rule(raw_stripe.reserved == [0; 6], "reserved field of a stripe is not zero")?;
            rule(raw_stripe.physical % SECTOR_BYTES == 0, "stripe at an unaligned offset")?;
            rule(raw_stripe.physical.checked_add(raw.length).is_some(), "stripe out of range")?;
            stripes.push(Stripe {
                device: raw_stripe.device,
                physical: Physical(raw_stripe.physical),
            });
        }
        let chunk =
            Chunk { logical, length: raw.length, birth: Txg(raw.birth), kind, profile, stripes };
        rule(chunk.has_distinct_devices(), "copies on the wrong devices for the profile")?;
        Ok(chunk)
    }

    /// Over how many devices each copy is cut.
    pub fn columns(&self) -> u64 {
        (self.stripes.len() as u64 / self.profile.copies()).max(1)
    }

    /// Bytes that each stripe takes on its device.
    pub fn stripe_bytes(&self) -> u64 {
        self.length / self.columns()
    }

    /// Whether the stripes are on as many devices as the profile promises.
    fn has_distinct_devices(&self) -> bool {
        let mut devices: Vec<u16> = self.stripes.iter().map(|stripe| stripe.device).collect();
        devices.sort_unstable();
        devices.dedup();
        match self.profile {
            Profile::Single | Profile::Dup => devices.len() == 1,
            _ => devices.len() == self.stripes.len(),
        }
    }

    /// The chunk as an item's value.
    pub fn encode(&self) -> Vec<u8> {
        let (profile, copies) = self.profile.raw();
        let raw = ChunkHeader {
            length: self.length,
            birth: self.birth.0,
            kind: self.kind as u8,
            profile,
            stripe_count: self.stripes.len() as u16,
            stripe_unit: if self.profile.is_striped() { STRIPE_UNIT as u32 } else { 0 },
            copies,
            reserved0: [0; 7],
            flags: 0,
            reserved1: 0,
        };
        let mut bytes = Vec::with_capacity(self.encoded_bytes());
        bytes.extend_from_slice(&raw.to_bytes());
        for stripe in &self.stripes {
            let raw =
                StripeItem { device: stripe.device, reserved: [0; 6], physical: stripe.physical.0 };
            bytes.extend_from_slice(&raw.to_bytes());
        }
        bytes
    }
}

disk_struct! {
    /// Value of a DEVICE item.
    pub struct DeviceItem [128] {
        /// Id of the device.
        0x00 id: [u8; 16],
        /// Usable bytes, as in the label.
        0x10 bytes: u64,
        /// Bytes taken by chunks.
        0x18 allocated: u64,
        /// 0 member. Others are reserved.
        0x20 state: u8,
        /// 0 any. Others are reserved for metadata and log devices.
        0x21 role: u8,
        /// Reserved.
        0x22 reserved0: [u8; 6],
        /// Read errors since they were last cleared.
        0x28 read_errors: u64,
        /// Write errors since they were last cleared.
        0x30 write_errors: u64,
        /// Checksum errors since they were last cleared.
        0x38 checksum_errors: u64,
        /// Reserved.
        0x40 reserved: [u8; 64],
    }
}

impl DeviceItem {
    /// Reads a device.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<DeviceItem, BadBytes> {
        rule(bytes.len() == DeviceItem::BYTES, "device item of the wrong length")?;
        let item = <DeviceItem as DiskField>::get(bytes);
        rule(
            item.reserved0 == [0; 6] && item.reserved == [0; 64],
            "reserved field of a device is not zero",
        )?;
        rule(item.state == 0 && item.role == 0, "unknown state or role of a device")?;
        rule(item.allocated <= item.bytes, "more allocated than there is")?;
        Ok(item)
    }
}
