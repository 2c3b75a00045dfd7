//! Inodes and the names of files with more than one.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use crate::platform::Timestamp;
use crate::units::Ino;

disk_struct! {
    /// Value of an INODE item.
    pub struct InodeItem [256] {
        /// File type and permission bits, as in stat(2).
        0x00 mode: u32,
        /// Owner.
        0x04 uid: u32,
        /// Group.
        0x08 gid: u32,
        /// Number of names; a directory has 2 plus its subdirectories.
        0x0c nlink: u32,
        /// Bytes of the file, of a symlink's target; for a directory the sum of its names' lengths.
        0x10 size: u64,
        /// Bytes allocated on disk for data, each blob counted once; 0 for inline data.
        0x18 stored_bytes: u64,
        /// Group that created the inode; with the number it names the file for good. 0 while it is
        /// being received and only names of it are known.
        0x20 generation: u64,
        /// Directory that holds the first name; 0 when there is none.
        0x28 parent: u64,
        /// Cookie of the first name in that directory; 0 when there is none.
        0x30 parent_cookie: u64,
        /// Directories: number of entries.
        0x38 entries: u64,
        /// Directories: cookie of the next entry; cookies are never reused. Others: id of the next
        /// large attribute value.
        0x40 next_cookie: u64,
        /// Counts changes, as the NFS change attribute wants.
        0x48 version: u64,
        /// Device number of a device node: major << 32 | minor.
        0x50 rdev: u64,
        /// Access time, seconds.
        0x58 atime: i64,
        /// Modification time, seconds.
        0x60 mtime: i64,
        /// Change time, seconds.
        0x68 ctime: i64,
        /// Birth time, seconds.
        0x70 btime: i64,
        /// Access time, nanoseconds.
        0x78 atime_nanos: u32,
        /// Modification time, nanoseconds.
        0x7c mtime_nanos: u32,
        /// Change time, nanoseconds.
        0x80 ctime_nanos: u32,
        /// Birth time, nanoseconds.
        0x84 btime_nanos: u32,
        /// Attribute flags with the numbers of FS_IOC_GETFLAGS that cairn keeps.
        0x88 flags: u32,
        /// Project id, for quotas.
        0x8c project: u32,
        /// Compression of new data: 0 as the subvolume says, 1 none, 2 zstd.
        0x90 compression: u8,
        /// Level for it; 0 is the default.
        0x91 compression_level: i8,
        /// Checksum of new data: 0 as the subvolume says, 1 none, 2 CRC32C, 3 BLAKE3.
        0x92 checksum: u8,
        /// Which attributes exist: bit 0 access ACL, bit 1 default ACL, bit 2 any other.
        0x93 xattr_hint: u8,
        /// Number of further names (LINK items).
        0x94 links: u32,
        /// Bytes promised by fallocate and not yet written.
        0x98 promised_bytes: u64,
        /// Reserved for the root of a verity tree.
        0xa0 verity: [u8; 32],
        /// Reserved for the numbers of encryption keys.
        0xc0 key_id: u64,
        /// Reserved.
        0xc8 reserved: [u8; 56],
    }
}

impl DiskField for i8 {
    const BYTES: usize = 1;
    const NAME: &'static str = "i8";
    fn get(bytes: &[u8]) -> i8 {
        i8::from_le_bytes([bytes[0]])
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes[0] = self.to_le_bytes()[0];
    }
}

/// File types and bits of `mode`, as in stat(2).
#[expect(missing_docs, reason = "named and documented by stat(2)")]
pub mod mode {
    pub const TYPE: u32 = 0o170000;
    pub const FIFO: u32 = 0o010000;
    pub const CHAR: u32 = 0o020000;
    pub const DIRECTORY: u32 = 0o040000;
    pub const BLOCK: u32 = 0o060000;
    pub const REGULAR: u32 = 0o100000;
    pub const SYMLINK: u32 = 0o120000;
    pub const SOCKET: u32 = 0o140000;
    pub const SET_UID: u32 = 0o4000;
    pub const SET_GID: u32 = 0o2000;
    pub const STICKY: u32 = 0o1000;
    pub const PERMISSIONS: u32 = 0o7777;

    /// Whether type bits are those of a type that there is.
    pub fn is_type(file_type: u32) -> bool {
        let types = [FIFO, CHAR, DIRECTORY, BLOCK, REGULAR, SYMLINK, SOCKET];
        types.contains(&file_type)
    }
}

/// Attribute flags, with the numbers of FS_IOC_GETFLAGS.
#[expect(missing_docs, reason = "named and documented by ioctl_iflags(2)")]
pub mod flag {
    pub const SYNC: u32 = 0x8;
    pub const IMMUTABLE: u32 = 0x10;
    pub const APPEND: u32 = 0x20;
    pub const NODUMP: u32 = 0x40;
    pub const NOATIME: u32 = 0x80;
    /// Compress (chattr +c).
    pub const COMPRESS: u32 = 0x4;
    /// Do not compress (chattr +m).
    pub const NOCOMPRESS: u32 = 0x400;
    pub const DIRSYNC: u32 = 0x10000;
    pub const TOPDIR: u32 = 0x20000;
    /// The project id is inherited by what is created in the directory.
    pub const PROJINHERIT: u32 = 0x2000_0000;
    /// Reserved: names are compared without case.
    pub const CASEFOLD: u32 = 0x4000_0000;
    /// What cairn stores.
    pub const KNOWN: u32 = SYNC
        | IMMUTABLE
        | APPEND
        | NODUMP
        | NOATIME
        | COMPRESS
        | NOCOMPRESS
        | DIRSYNC
        | TOPDIR
        | PROJINHERIT;
}

/// Bits of [`InodeItem::xattr_hint`].
pub mod xattr_hint {
    /// There is an access ACL.
    pub const ACCESS_ACL: u8 = 1;
    /// There is a default ACL.
    pub const DEFAULT_ACL: u8 = 2;
    /// There is some other attribute.
    pub const OTHER: u8 = 4;
}

/// Most links of an inode, and most subdirectories of a directory.
pub const NLINK_MAX: u32 = u32::MAX - 1;

/// What counters of an inode stay below, so that adding to them and adding them up is safe.
const COUNT_MAX: u64 = 1 << 61;

impl InodeItem {
    /// An inode whose fields are all zero.
    pub fn zeroed() -> InodeItem {
        <InodeItem as DiskField>::get(&[0; InodeItem::BYTES])
    }

    /// The file type bits.
    pub fn file_type(&self) -> u32 {
        self.mode & mode::TYPE
    }

    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == mode::DIRECTORY
    }

    /// Whether this is a regular file.
    pub fn is_file(&self) -> bool {
        self.file_type() == mode::REGULAR
    }

    /// Access time.
    pub fn atime(&self) -> Timestamp {
        Timestamp { secs: self.atime, nanos: self.atime_nanos }
    }

    /// Modification time.
    pub fn mtime(&self) -> Timestamp {
        Timestamp { secs: self.mtime, nanos: self.mtime_nanos }
    }

    /// Change time.
    pub fn ctime(&self) -> Timestamp {
        Timestamp { secs: self.ctime, nanos: self.ctime_nanos }
    }

    /// Birth time.
    pub fn btime(&self) -> Timestamp {
        Timestamp { secs: self.btime, nanos: self.btime_nanos }
    }

    /// Sets the access time.
    pub fn set_atime(&mut self, t: Timestamp) {
        (self.atime, self.atime_nanos) = (t.secs, t.nanos);
    }

    /// Sets the modification time.
    pub fn set_mtime(&mut self, t: Timestamp) {
        (self.mtime, self.mtime_nanos) = (t.secs, t.nanos);
    }

    /// Sets the change time.
    pub fn set_ctime(&mut self, t: Timestamp) {
        (self.ctime, self.ctime_nanos) = (t.secs, t.nanos);
    }

    /// Sets the birth time.
    pub fn set_btime(&mut self, t: Timestamp) {
        (self.btime, self.btime_nanos) = (t.secs, t.nanos);
    }

    /// Reads an inode whose fields can be trusted.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<InodeItem, BadBytes> {
        rule(bytes.len() == InodeItem::BYTES, "inode item of the wrong length")?;
        let item = <InodeItem as DiskField>::get(bytes);
        rule(mode::is_type(item.file_type()), "unknown file type")?;
        rule(item.mode & !(mode::TYPE | mode::PERMISSIONS) == 0, "unknown mode bits")?;
        rule(item.size <= super::extent::FILE_BYTES_MAX, "size out of range")?;
        for count in [item.stored_bytes, item.promised_bytes, item.entries, item.next_cookie] {
            rule(count <= COUNT_MAX, "count out of range")?;
        }
        rule(item.nlink <= NLINK_MAX && item.links < NLINK_MAX, "too many links")?;
        for nanos in [item.atime_nanos, item.mtime_nanos, item.ctime_nanos, item.btime_nanos] {
            rule(nanos < 1_000_000_000, "nanoseconds out of range")?;
        }
        rule(item.flags & !flag::KNOWN == 0, "unknown attribute flags")?;
        rule(item.compression <= 2 && item.checksum <= 3, "unknown data settings")?;
        rule(item.xattr_hint <= 7, "unknown attribute hint")?;
        rule(
            item.verity == [0; 32] && item.key_id == 0 && item.reserved == [0; 56],
            "reserved field of an inode is not zero",
        )?;
        Ok(item)
    }
}

disk_struct! {
    /// Value of a LINK item: one further name of a file.
    pub struct LinkItem [16] {
        /// Directory that holds the name.
        0x00 parent: u64,
        /// Cookie of the name in that directory.
        0x08 cookie: u64,
    }
}

impl LinkItem {
    /// Reads a further name.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<LinkItem, BadBytes> {
        rule(bytes.len() == LinkItem::BYTES, "link item of the wrong length")?;
        let item = <LinkItem as DiskField>::get(bytes);
        rule(item.parent != 0 && item.cookie != 0, "link item without a directory")?;
        Ok(item)
    }

    /// Offset of the item's key: an injective-enough mix of directory and cookie. Two names of one
    /// inode whose mixes are equal cannot both be stored; `link` then takes another cookie.
    pub fn offset(parent: Ino, cookie: u64) -> u64 {
        // The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits.
        let mut z = parent.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ cookie;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
