//! How far a subvolume has been received.

use super::extent::FILE_BYTES_MAX;
use super::pool::INO_MAX;
use super::{rule, BadBytes, DiskField};

/// A place in a stream that does not depend on how it is made: the stream that begins there has no
/// inode below, of that one no data below the offset, and unless the inode is zero nothing of what
/// went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// The inode; zero for the beginning.
    pub ino: u64,
    /// Where in its data.
    pub offset: u64,
}

impl Mark {
    /// Bytes that it takes.
    pub const BYTES: usize = 16;

    /// As it is stored.
    pub fn encode(&self) -> [u8; Mark::BYTES] {
        let mut out = [0; Mark::BYTES];
        out[..8].copy_from_slice(&self.ino.to_le_bytes());
        out[8..].copy_from_slice(&self.offset.to_le_bytes());
        out
    }

    /// Reads one.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<Mark, BadBytes> {
        rule(bytes.len() == Mark::BYTES, "place in a stream of the wrong length")?;
        let mark = Mark { ino: DiskField::get(&bytes[..8]), offset: DiskField::get(&bytes[8..]) };
        rule(mark.ino <= INO_MAX, "inode number out of range")?;
        let is_there = mark.offset <= FILE_BYTES_MAX && (mark.ino > 0 || mark.offset == 0);
        rule(is_there, "offset out of range")?;
        Ok(mark)
    }
}
