//! Items of the pool tree: subvolumes, snapshots, bookmarks, properties.
//!
//! Subvolumes and snapshots are *versions*: each has an id, a SUBVOL item, and all but the root
//! subvolume a NAME item. A version's `parent` is the snapshot it goes on from; so versions form
//! trees, with snapshots inside and what can be written at the ends. `engine::versions` tells how
//! they live and die.

use super::ptr::{encode_optional, BlockPtr};
use super::{rule, BadBytes, DiskField, Skipped};
use crate::disk_struct;
use crate::units::{TreeId, Txg};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::RangeInclusive;

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
        /// Compression of new data: 0 as the subvolume above, 1 none, 2 zstd.
        0x90 compression: u8,
        /// Level for it; 0 is the default.
        0x91 compression_level: i8,
        /// Checksum of new data: 0 as the subvolume above, 1 none, 2 CRC32C, 3 BLAKE3.
        0x92 checksum: u8,
        /// Whether it refuses changes: 0 as the subvolume above, 1 no, 2 yes.
        0x93 read_only: u8,
        /// When reading changes access times: 0 as the subvolume above says, 1 never, 2 when they
        /// are older than the last change or than a day, 3 always.
        0x94 access_time: u8,
        /// Reserved.
        0x95 reserved0: [u8; 3],
        /// Flags: bit 0 a snapshot, bit 1 deleted, bit 2 its deletion has begun, bit 3 being
        /// received.
        0x98 flags: u64,
        /// Group of the parent: what was born later is the version's own. 0 without a parent.
        0xa0 snapshot_txg: u64,
        /// Tree id that its nodes carry; 0 when that is its own id.
        0xa8 lineage: u64,
        /// Id of the snapshot it goes on from; 0 when there is none.
        0xb0 parent: u64,
        /// Id of the subvolume that a snapshot was taken of; 0 for subvolumes.
        0xb8 owner: u64,
        /// Group as of which a snapshot shows the subvolume; 0 for subvolumes.
        0xc0 txg: u64,
        /// When it was made, seconds since 1970.
        0xc8 created: i64,
        /// Id of its dead list; 0 when that is its own id.
        0xd0 dead_list: u64,
        /// Entries of its dead list.
        0xd8 dead_entries: u64,
        /// Bytes of those entries that were born after the parent's parent.
        0xe0 dead_own_bytes: u64,
        /// Bytes of extents and nodes that were born after the parent.
        0xe8 own_bytes: u64,
        /// Bytes of tree nodes.
        0xf0 tree_bytes: u64,
        /// Where the deletion of a version without children goes on: a key, or all bytes 0xff when
        /// the tree is gone.
        0xf8 cursor: [u8; 24],
        /// First birth that `dead_own_bytes` counts while that is being changed; 0 when it is the
        /// one after the parent's parent.
        0x110 dead_own_from: u64,
        /// Bytes that it may refer to, data and tree; 0 for any number.
        0x118 limit_referenced: u64,
        /// Bytes of its own that it may have, born after the parent; 0 for any number.
        0x120 limit_own: u64,
        /// Identity of a snapshot's content; zeros while it is not known. See the CONTENT item.
        0x128 content: [u8; 32],
        /// Reserved for reservations.
        0x148 reserved: Skipped<184>,
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
            item.reserved0 == [0; 3] && item.reserved.is_zero(),
            "reserved field of a subvolume is not zero",
        )?;
        rule(item.flags & !version::ALL == 0, "unknown flag of a subvolume")?;
        rule(item.is_snapshot() == (item.txg != 0), "a snapshot without its group")?;
        rule(item.is_snapshot() == (item.owner != 0), "a snapshot without its subvolume")?;
        rule((item.parent == 0) == (item.snapshot_txg == 0), "a parent without its group")?;
        rule(
            !item.is_snapshot() || item.snapshot_txg <= item.txg,
            "a snapshot that is older than its parent",
        )?;
        rule(item.compression <= 2 && item.checksum <= 3, "unknown data settings")?;
        rule(LEVELS.contains(&item.compression_level), "compression level out of range")?;
        rule(
            item.compression == 2 || item.compression_level == 0,
            "a compression level without compression",
        )?;
        rule(item.read_only <= 2 && item.access_time <= 3, "unknown settings of a subvolume")?;
        rule(!item.is_snapshot() || !item.has_limits(), "a snapshot with limits")?;
        rule(!item.is_snapshot() || !item.is_receiving(), "a snapshot that is being received")?;
        rule(item.is_snapshot() || item.content == [0; 32], "a content of what changes")?;
        rule((FIRST_INO..=INO_MAX + 1).contains(&item.next_ino), "next inode number out of range")?;
        Ok(item)
    }

    /// The root pointer.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn root(&self, newest: Txg) -> Result<Option<BlockPtr>, BadBytes> {
        BlockPtr::decode(&self.root, newest)
    }

    /// Whether it is a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.flags & version::SNAPSHOT != 0
    }

    /// Whether it was deleted, and is there only as long as others need it or it is being taken
    /// apart.
    pub fn is_deleted(&self) -> bool {
        self.flags & version::DELETED != 0
    }

    /// Whether it is a subvolume that is being received: nobody can look into it yet.
    pub fn is_receiving(&self) -> bool {
        self.flags & version::RECEIVING != 0
    }

    /// Whether there is a limit to how much it may refer to.
    pub fn has_limits(&self) -> bool {
        (self.limit_referenced, self.limit_own) != (0, 0)
    }

    /// What it has chosen itself.
    pub fn settings(&self) -> Settings {
        Settings {
            compression: self.compression,
            level: self.compression_level,
            checksum: self.checksum,
            read_only: self.read_only,
            access_time: self.access_time,
        }
    }

    /// Chooses anew.
    pub fn set_settings(&mut self, settings: Settings) {
        (self.compression, self.compression_level) = (settings.compression, settings.level);
        self.checksum = settings.checksum;
        (self.read_only, self.access_time) = (settings.read_only, settings.access_time);
    }

    /// How many bytes more its limits let it have; `None` without limits.
    pub fn left(&self) -> Option<u64> {
        let left = |limit: u64, used: u64| (limit != 0).then(|| limit.saturating_sub(used));
        let referenced = left(self.limit_referenced, self.referenced_bytes());
        let own = left(self.limit_own, self.own_bytes);
        match (referenced, own) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        }
    }

    /// Tree id of the nodes of the version with that id.
    pub fn lineage(&self, id: TreeId) -> TreeId {
        if self.lineage == 0 {
            return id;
        }
        TreeId(self.lineage)
    }

    /// Id of the dead list of the version with that id.
    pub fn dead_list(&self, id: u64) -> u64 {
        if self.dead_list == 0 {
            return id;
        }
        self.dead_list
    }

    /// Bytes it refers to on the devices, one copy counted: data and tree.
    pub fn referenced_bytes(&self) -> u64 {
        self.stored_bytes.saturating_add(self.tree_bytes)
    }

    /// Sets the root pointer.
    pub fn set_root(&mut self, root: Option<&BlockPtr>) {
        self.root = encode_optional(root);
    }
}

/// Compression levels that zstd has; those beyond need memory out of proportion.
pub const LEVELS: RangeInclusive<i8> = -7..=19;

/// What a subvolume chooses, each zero where it takes what the subvolume above has; the numbers are
/// those of [`SubvolItem`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Compression of new data.
    pub compression: u8,
    /// Level for it.
    pub level: i8,
    /// Checksum of new data.
    pub checksum: u8,
    /// Whether it refuses changes.
    pub read_only: u8,
    /// When reading changes access times.
    pub access_time: u8,
}

impl Settings {
    /// What these come to below others.
    pub fn below(self, above: Settings) -> Settings {
        let or = |own: u8, above: u8| if own == 0 { above } else { own };
        let data = if self.compression == 0 { above } else { self };
        Settings {
            compression: data.compression,
            level: data.level,
            checksum: or(self.checksum, above.checksum),
            read_only: or(self.read_only, above.read_only),
            access_time: or(self.access_time, above.access_time),
        }
    }

    /// Whether changes are refused.
    pub fn refuses_changes(self) -> bool {
        self.read_only == 2
    }

    /// All in one number, to be kept where many look.
    pub fn pack(self) -> u64 {
        let level = self.level as u8;
        let all = [self.compression, level, self.checksum, self.read_only, self.access_time];
        all.iter().rev().fold(0, |packed, byte| packed << 8 | u64::from(*byte))
    }

    /// What was packed.
    pub fn unpack(packed: u64) -> Settings {
        let [compression, level, checksum, read_only, access_time, ..] = packed.to_le_bytes();
        Settings { compression, level: level as i8, checksum, read_only, access_time }
    }
}

/// Properties that users gave a version, by name.
pub type UserProperties = BTreeMap<Vec<u8>, Vec<u8>>;

/// Bytes of the user properties of a version, as they are stored.
pub const USER_BYTES_MAX: usize = 4096;
/// Longest name of a user property, in bytes.
pub const USER_NAME_BYTES_MAX: usize = 255;

/// Checks the name of a user property: letters that are small, digits and `:+._-`, with a `:`.
///
/// # Errors
/// The rule that is broken.
pub fn check_user_name(name: &[u8]) -> Result<(), BadBytes> {
    let fits = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b':' | b'+' | b'.' | b'_' | b'-');
    rule((1..=USER_NAME_BYTES_MAX).contains(&name.len()), "user property's name of a bad length")?;
    rule(name.contains(&b':'), "user property's name without a colon")?;
    rule(name.iter().all(fits), "user property's name with a character that it may not have")
}

/// Checks the value of a user property.
///
/// # Errors
/// The rule that is broken.
pub fn check_user_value(value: &[u8]) -> Result<(), BadBytes> {
    let text = core::str::from_utf8(value);
    rule(text.is_ok(), "user property's value that is not UTF-8")?;
    let is_bad = |c: char| c.is_control();
    rule(!text.is_ok_and(|text| text.contains(is_bad)), "user property's value with a control code")
}

/// Reads a USER property: for each, ascending by name, the length of its name, one byte, its name,
/// the length of its value, two bytes, and its value.
///
/// # Errors
/// The rule that is broken.
pub fn decode_user(mut bytes: &[u8]) -> Result<UserProperties, BadBytes> {
    rule((1..=USER_BYTES_MAX).contains(&bytes.len()), "user properties of a bad length")?;
    let mut all = UserProperties::new();
    while let Some((len, rest)) = bytes.split_first() {
        let len = usize::from(*len);
        rule(len + 2 <= rest.len(), "user property cut off")?;
        let (name, rest) = rest.split_at(len);
        check_user_name(name)?;
        let (len, rest) = rest.split_at(2);
        let len = usize::from(u16::get(len));
        rule(len <= rest.len(), "user property cut off")?;
        let (value, rest) = rest.split_at(len);
        check_user_value(value)?;
        let is_next = all.keys().next_back().is_none_or(|last| last.as_slice() < name);
        rule(is_next, "user properties out of order")?;
        all.insert(name.to_vec(), value.to_vec());
        bytes = rest;
    }
    Ok(all)
}

/// The value of a USER property; empty when there are none.
pub fn encode_user(all: &UserProperties) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in all {
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(&(value.len() as u16).to_le_bytes());
        bytes.extend_from_slice(value);
    }
    bytes
}

/// Bits of [`SubvolItem::flags`].
pub mod version {
    /// A snapshot: it never changes.
    pub const SNAPSHOT: u64 = 1;
    /// Deleted by the user.
    pub const DELETED: u64 = 2;
    /// Its deletion has begun: nobody can look into it any more.
    pub const STARTED: u64 = 4;
    /// Being received from a stream: nobody can look into it yet.
    pub const RECEIVING: u64 = 8;
    /// All there are.
    pub(super) const ALL: u64 = SNAPSHOT | DELETED | STARTED | RECEIVING;
}

disk_struct! {
    /// Value of a BOOKMARK item: what is kept of a snapshot to send what came after it. The name
    /// follows.
    pub struct BookmarkItem [64] {
        /// Subvolume that the snapshot was taken of.
        0x00 owner: u64,
        /// Group as of which the snapshot showed it.
        0x08 txg: u64,
        /// When the snapshot was made, seconds since 1970.
        0x10 created: i64,
        /// Identity of the snapshot.
        0x18 id: [u8; 16],
        /// Reserved for the content hash.
        0x28 reserved: [u8; 24],
    }
}

impl BookmarkItem {
    /// Reads a bookmark and its name.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<(BookmarkItem, &[u8]), BadBytes> {
        rule(bytes.len() > BookmarkItem::BYTES, "bookmark too short")?;
        let (head, name) = bytes.split_at(BookmarkItem::BYTES);
        let item = <BookmarkItem as DiskField>::get(head);
        rule(item.reserved == [0; 24], "reserved field of a bookmark is not zero")?;
        check_name(name)?;
        Ok((item, name))
    }
}

/// Bytes of a CONTENT item: the sum of a snapshot's content, from which that of a later one comes.
pub const CONTENT_BYTES: usize = 2056;

/// Longest name of a subvolume, snapshot or bookmark, and longest tag of a hold, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Checks a stored name. A subvolume's may have parts with `/` between them.
///
/// # Errors
/// The rule that is broken.
pub fn check_name(name: &[u8]) -> Result<(), BadBytes> {
    rule((1..=NAME_BYTES_MAX).contains(&name.len()), "name of a bad length")?;
    rule(core::str::from_utf8(name).is_ok(), "name that is not UTF-8")?;
    let is_bad = |b: &u8| matches!(b, 0..=0x1f | 0x7f | b'@' | b'#');
    rule(!name.iter().any(is_bad), "name with a character that names may not have")?;
    let mut parts = name.split(|b| *b == b'/');
    rule(parts.all(|part| !matches!(part, b"" | b"." | b"..")), "name with an empty part")
}

/// Reads the tags of a HOLDS item: each its length, one byte, and its bytes.
///
/// # Errors
/// The rule that is broken.
pub fn decode_tags(mut bytes: &[u8]) -> Result<Vec<Vec<u8>>, BadBytes> {
    let mut tags = Vec::new();
    while let Some((len, rest)) = bytes.split_first() {
        let len = usize::from(*len);
        rule(len > 0 && len <= rest.len(), "tag of a hold cut off")?;
        let (tag, rest) = rest.split_at(len);
        check_name(tag)?;
        tags.push(tag.to_vec());
        bytes = rest;
    }
    rule(!tags.is_empty(), "holds without a tag")?;
    Ok(tags)
}

/// The value of a HOLDS item.
pub fn encode_tags(tags: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for tag in tags {
        bytes.push(tag.len() as u8);
        bytes.extend_from_slice(tag);
    }
    bytes
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
    /// How far a scrub is, and how the last one ended: `ScrubItem` and what follows it.
    pub const SCRUB: u64 = 3;
    /// What is being done to the set of devices: `DeviceChangeItem`.
    pub const DEVICES: u64 = 4;
    /// Of a subvolume or snapshot: the properties that users gave it.
    pub const USER: u64 = 5;
}
