//! Directory entries.
//!
//! A name is stored once, in a DIR_ENTRY item keyed by its *cookie*: a number that grows with each
//! entry added to the directory and is never reused, so that reading a directory goes on at the
//! right place whatever came and went meanwhile, and yields entries in the order of creation, which
//! is the order of inode items too. A DIR_HASH item maps the hash of a name to the cookies of the
//! entries that have it; the hash is SipHash-2-4 keyed by the pool's secret, so nobody who cannot
//! read the device can make names collide. Names are compared, never trusted by their hash.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use alloc::vec::Vec;
use core::hash::Hasher;

disk_struct! {
    /// Head of a DIR_ENTRY item's value; the name follows.
    pub struct EntryHeader [16] {
        /// Inode the name stands for.
        0x00 ino: u64,
        /// File type: the four type bits of its mode.
        0x08 file_type: u8,
        /// Bytes of the name.
        0x09 name_bytes: u8,
        /// Reserved.
        0x0a reserved: [u8; 6],
    }
}

/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The first cookie of a directory: 1 and 2 stand for `.` and `..`.
pub const FIRST_COOKIE: u64 = 3;
/// How many names of one directory may share a hash.
pub const HASH_COOKIES_MAX: usize = 256;

/// A directory entry in the bytes of its item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryRef<'a> {
    /// As [`Entry::ino`].
    pub ino: u64,
    /// As [`Entry::file_type`].
    pub file_type: u32,
    /// As [`Entry::name`].
    pub name: &'a [u8],
}

/// A directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Inode the name stands for.
    pub ino: u64,
    /// Type bits of its mode, in place (`mode & mode::TYPE`).
    pub file_type: u32,
    /// The name: 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
    pub name: Vec<u8>,
}

/// Whether a name may stand in a directory.
pub fn name_is_valid(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|b| *b == b'/' || *b == 0)
}

impl EntryRef<'_> {
    /// Reads an entry whose fields can be trusted.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<EntryRef<'_>, BadBytes> {
        rule(bytes.len() > EntryHeader::BYTES, "directory entry too short")?;
        let (head, name) = bytes.split_at(EntryHeader::BYTES);
        let raw = <EntryHeader as DiskField>::get(head);
        rule(raw.reserved == [0; 6], "reserved field of a directory entry is not zero")?;
        rule(raw.ino != 0, "directory entry without an inode")?;
        rule(
            matches!(raw.file_type, 1 | 2 | 4 | 6 | 8 | 10 | 12),
            "unknown file type in an entry",
        )?;
        rule(raw.name_bytes as usize == name.len(), "name of the wrong length")?;
        rule(name_is_valid(name), "name not allowed in a directory")?;
        Ok(EntryRef { ino: raw.ino, file_type: u32::from(raw.file_type) << 12, name })
    }
}

impl Entry {
    /// As [`EntryRef::decode`], with a name of its own.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<Entry, BadBytes> {
        let EntryRef { ino, file_type, name } = EntryRef::decode(bytes)?;
        Ok(Entry { ino, file_type, name: name.to_vec() })
    }

    /// The entry as an item's value.
    pub fn encode(&self) -> Vec<u8> {
        let raw = EntryHeader {
            ino: self.ino,
            file_type: (self.file_type >> 12) as u8,
            name_bytes: self.name.len() as u8,
            reserved: [0; 6],
        };
        let mut bytes = Vec::with_capacity(EntryHeader::BYTES + self.name.len());
        bytes.extend_from_slice(&raw.to_bytes());
        bytes.extend_from_slice(&self.name);
        bytes
    }
}

/// Reads the cookies of a DIR_HASH item: at least one, ascending.
///
/// # Errors
/// The rule that is broken.
pub fn decode_cookies(bytes: &[u8]) -> Result<Vec<u64>, BadBytes> {
    rule(!bytes.is_empty() && bytes.len() % 8 == 0, "cookie list of the wrong length")?;
    rule(bytes.len() <= HASH_COOKIES_MAX * 8, "cookie list too long")?;
    let cookies: Vec<u64> = bytes.chunks_exact(8).map(u64::get).collect();
    rule(cookies.windows(2).all(|w| w[0] < w[1]), "cookie list not ascending")?;
    rule(cookies[0] >= FIRST_COOKIE, "cookie out of range")?;
    Ok(cookies)
}

/// The cookies as an item's value.
pub fn encode_cookies(cookies: &[u64]) -> Vec<u8> {
    cookies.iter().flat_map(|c| c.to_le_bytes()).collect()
}

/// The hash of a name, or of the name of an extended attribute, under the pool's secret.
pub fn name_hash(secret: &[u8; 16], name: &[u8]) -> u64 {
    let mut hasher = siphasher::sip::SipHasher24::new_with_key(secret);
    hasher.write(name);
    hasher.finish()
}
