//! The intent log: what was promised to be durable before its group is published.
//!
//! ```text
//! superblock --> segment 1: [frame 7][frame 8][frame 9, names segment 2]
//!                segment 2: [frame 10][frame 11]   end: what follows does not chain
//! ```
//!
//! [`LogWriter`] appends frames of records, [`scan`] reads them back after a crash. Both know
//! nothing of what the records mean, when to flush, or where segments come from: that is the
//! engine's part, which it plays through [`LogStore`].
//!
//! A frame is the next one if its sequence number is one more, its chain is the checksum of the
//! frame before, and its own checksum is right. So replay ends at the first frame that did not
//! reach the device whole, in any copy, whatever was in the space before. The first frame of a log
//! has no frame before it; its chain is made from the pool and the group that first publishes the
//! log's place ([`LogWriter::begin`]), so that not even the first frame of an earlier log fits.
//!
//! A segment always has a sector left, so that a frame too long for the rest of it can be preceded
//! by an empty one that names the next segment.
//!
//! Bounds, kept by the writer and insisted on by the reader: [`SEGMENTS_MAX`] segments and
//! [`LIVE_BYTES_MAX`] bytes between the published start and the end. When they are reached,
//! appending says so and the engine commits a group instead, which lets old segments go.

mod scan;
mod writer;

#[cfg(test)]
mod tests;

pub use scan::{compare_copies, scan, ScanEnd};
pub use writer::LogWriter;

use crate::buf::{Buf, Slice};
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, Txg};

/// Most segments a log may span.
pub const SEGMENTS_MAX: usize = 1024;
/// Most bytes that the segments of a log may have together.
pub const LIVE_BYTES_MAX: u64 = 1 << 30;
/// What every segment has at least, unless the store says otherwise.
pub const SEGMENT_BYTES_MIN: u64 = 1 << 20;

/// Where frames go.
pub trait LogStore {
    /// How many copies there are of what is at an address.
    fn copies(&self, _addr: Logical) -> usize {
        1
    }

    /// The bytes of a copy of `run` as they are on the device, not verified.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&self, run: Run, copy: usize) -> Result<Buf>;

    /// Writes whole sectors. They are durable only after a flush, which is the caller's.
    ///
    /// # Errors
    /// When they cannot be written.
    fn write(&self, at: Logical, buf: Slice) -> Result<()>;

    /// A run for a segment: at least [`segment_bytes_min`](LogStore::segment_bytes_min) and at most
    /// [`SEGMENT_BYTES_MAX`](crate::format::log::SEGMENT_BYTES_MAX) long, not at address zero; and
    /// the group it was taken for, which is never older than that of the segment before.
    ///
    /// # Errors
    /// When there is no room.
    fn allocate_segment(&self) -> Result<(Run, Txg)>;

    /// What every segment has at least; bounds the payload of a frame. At least four sectors.
    fn segment_bytes_min(&self) -> u64 {
        SEGMENT_BYTES_MIN
    }

    /// BLAKE3-256, for platforms that have a faster one.
    fn blake3(&self, bytes: &[u8]) -> [u8; 32] {
        crate::platform::blake3(bytes)
    }
}
