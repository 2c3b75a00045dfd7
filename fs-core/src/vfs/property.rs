//! How new data of a file is stored, as extended attributes.
//!
//! | name | values |
//! | --- | --- |
//! | `cairn.compression`, also `btrfs.compression` | `none`, `zstd`, `zstd:LEVEL` |
//! | `cairn.checksum` | `none`, `crc32c`, `blake3` |
//!
//! They are not stored as attributes but in fields of the inode. What is made in a directory takes
//! over the directory's. Without a value of its own a file follows its subvolume, and that the
//! pool. Data that is stored already stays as it is.
//!
//! listxattr(2) does not name them: a copy to another filesystem, which knows no such names, would
//! fail for them.

use crate::error::{Errno, Error};
use crate::format::inode::InodeItem;
use crate::format::pool::LEVELS;
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::vfs::Result;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// A property of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Property {
    /// Compression of new data.
    Compression,
    /// Checksum of new data.
    Checksum,
}

impl Property {
    /// The property that an attribute's name stands for.
    pub(super) fn of(name: &[u8]) -> Option<Property> {
        match name {
            b"cairn.compression" | b"btrfs.compression" => Some(Property::Compression),
            b"cairn.checksum" => Some(Property::Checksum),
            _ => None,
        }
    }

    /// Its value; `None` when the inode has none of its own.
    pub(super) fn get(self, item: &InodeItem) -> Option<Vec<u8>> {
        match self {
            Property::Compression => {
                let kind = CompressionKind::from_raw(item.compression.checked_sub(1)?)?;
                Some(compression_name(kind, i32::from(item.compression_level)).into_bytes())
            }
            Property::Checksum => {
                let kind = ChecksumKind::from_raw(item.checksum.checked_sub(1)?)?;
                Some(checksum_name(kind).as_bytes().to_vec())
            }
        }
    }

    /// Gives it a value, or takes it away; an empty value does that too.
    ///
    /// # Errors
    /// EINVAL for a value it cannot have, and for inodes that have no data of their own.
    pub(super) fn set(self, item: &mut InodeItem, value: Option<&[u8]>) -> Result<()> {
        if !item.is_file() && !item.is_dir() {
            return Err(Errno::Inval.into());
        }
        let value = value.filter(|value| !value.is_empty());
        match self {
            Property::Compression => {
                let (kind, level) = match value {
                    None => (0, 0),
                    Some(value) => {
                        let (kind, level) = parse_compression(value)?;
                        (kind as u8 + 1, level)
                    }
                };
                (item.compression, item.compression_level) = (kind, level);
            }
            Property::Checksum => {
                item.checksum = match value {
                    None => 0,
                    Some(value) => parse_checksum(value)? as u8 + 1,
                };
            }
        }
        Ok(())
    }
}

/// How users write a kind of compression and its level; 0 is the usual level.
pub fn compression_name(kind: CompressionKind, level: i32) -> String {
    match (kind, level) {
        (CompressionKind::None, _) => "none".into(),
        (CompressionKind::Zstd, 0) => "zstd".into(),
        (CompressionKind::Zstd, level) => format!("zstd:{level}"),
    }
}

/// How users write a kind of checksum.
pub fn checksum_name(kind: ChecksumKind) -> &'static str {
    match kind {
        ChecksumKind::None => "none",
        ChecksumKind::Crc32c => "crc32c",
        ChecksumKind::Blake3 => "blake3",
    }
}

/// Reads what [`compression_name`] writes.
///
/// # Errors
/// EINVAL for anything else.
pub fn parse_compression(value: &[u8]) -> Result<(CompressionKind, i8)> {
    if matches!(value, b"none" | b"no") {
        return Ok((CompressionKind::None, 0));
    }
    if value == b"zstd" {
        return Ok((CompressionKind::Zstd, 0));
    }
    let level = value.strip_prefix(b"zstd:").and_then(|text| core::str::from_utf8(text).ok());
    let level = level.and_then(|text| text.parse().ok()).filter(|level| LEVELS.contains(level));
    let level = level.ok_or(Error::Posix(Errno::Inval))?;
    Ok((CompressionKind::Zstd, level))
}

fn parse_checksum(value: &[u8]) -> Result<ChecksumKind> {
    match value {
        b"none" => Ok(ChecksumKind::None),
        b"crc32c" => Ok(ChecksumKind::Crc32c),
        b"blake3" => Ok(ChecksumKind::Blake3),
        _ => Err(Errno::Inval.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::inode::mode;

    fn file() -> InodeItem {
        InodeItem { mode: mode::REGULAR | 0o644, ..InodeItem::zeroed() }
    }

    #[test]
    fn what_was_set_is_what_is_got() {
        for (property, values) in [
            (Property::Compression, &["none", "zstd", "zstd:3", "zstd:-7", "zstd:19"][..]),
            (Property::Checksum, &["none", "crc32c", "blake3"]),
        ] {
            let mut item = file();
            assert_eq!(property.get(&item), None);
            for value in values {
                property.set(&mut item, Some(value.as_bytes())).unwrap();
                assert_eq!(property.get(&item).unwrap(), value.as_bytes());
            }
            property.set(&mut item, None).unwrap();
            assert_eq!(property.get(&item), None);
        }
    }

    #[test]
    fn a_value_that_makes_no_sense_changes_nothing() {
        let mut item = file();
        Property::Compression.set(&mut item, Some(b"zstd:5")).unwrap();
        for bad in ["lzo", "zstd:", "zstd:20", "zstd:-8", "zstd:x", "ZSTD", "none "] {
            assert!(Property::Compression.set(&mut item, Some(bad.as_bytes())).is_err(), "{bad}");
        }
        assert!(Property::Checksum.set(&mut item, Some(b"md5")).is_err());
        assert_eq!(Property::Compression.get(&item).unwrap(), b"zstd:5");
        let mut fifo = InodeItem { mode: mode::FIFO | 0o644, ..InodeItem::zeroed() };
        assert!(Property::Compression.set(&mut fifo, Some(b"none")).is_err());
    }
}
