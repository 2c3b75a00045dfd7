//! The data of a file in a tree.

use super::Source;
use crate::btree::Tree;
use crate::buf::Buf;
use crate::codec;
use crate::format::extent::Extent;
use crate::platform::Result;
use crate::pool::{DataRead, DataSource};
use crate::subvol::extents::each_extent;
use crate::units::{Ino, Logical};
use alloc::vec::Vec;

/// Bytes that are expanded at once: a range of a file may name many blobs that are longer than what
/// it uses of them.
const BYTES_AT_ONCE: u64 = 8 << 20;

/// A file in a tree.
#[derive(Clone, Copy)]
pub(super) struct File<'a> {
    pub source: Source<'a>,
    pub tree: &'a Tree,
    pub ino: Ino,
    pub size: u64,
}

/// Reads under way, and where their bytes go.
struct Gather<'a> {
    source: Source<'a>,
    reads: Vec<DataRead<'static>>,
    /// Read, first byte of it, first byte of the buffer, bytes.
    places: Vec<(usize, usize, usize, usize)>,
    bytes: u64,
}

impl File<'_> {
    /// Offset of the first byte at or after `start`, and below `end` and the size, that an extent
    /// with data has.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn next_data(&self, start: u64, end: u64) -> Result<Option<u64>> {
        let end = end.min(self.size);
        let mut found = None;
        if start < end {
            let nodes = self.source.nodes;
            each_extent(nodes, self.tree, self.ino, start, end, &mut |at, extent, _| {
                if !matches!(extent, Extent::Promised { .. }) {
                    found = Some(at.max(start));
                }
                Ok(found.is_none())
            })?;
        }
        Ok(found)
    }

    /// Reads `start..start + out.len()`; what the file does not have there is zeros. `out` holds
    /// zeros, and `start` is a multiple of the sector size.
    ///
    /// # Errors
    /// Errors of the device or the tree; damaged data.
    pub fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let end = start.saturating_add(out.len() as u64).min(self.size);
        if start >= end {
            return Ok(());
        }
        let mut gather =
            Gather { source: self.source, reads: Vec::new(), places: Vec::new(), bytes: 0 };
        let nodes = self.source.nodes;
        each_extent(nodes, self.tree, self.ino, start, end, &mut |at, extent, _| {
            gather.extent(at, &extent, start, end, out)?;
            Ok(true)
        })?;
        gather.finish(out)
    }
}

impl Gather<'_> {
    /// The part of an extent at `at` that lies in `start..end`.
    fn extent(
        &mut self,
        at: u64,
        extent: &Extent,
        start: u64,
        end: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let from = at.max(start);
        let to = end.min(at + extent.len());
        if from >= to {
            return Ok(());
        }
        let (skip, place, len) = (from - at, (from - start) as usize, (to - from) as usize);
        match extent {
            Extent::Inline { compression, logical, bytes } => {
                let codecs = &*self.source.pool.platform().codecs;
                let expanded =
                    codec::expand(codecs, *compression, bytes, *logical, Logical(0), Buf::zeroed)?;
                let from = skip as usize;
                out[place..place + len].copy_from_slice(&expanded[from..from + len]);
            }
            Extent::Plain { .. } => {
                let whole = crate::units::sector_round(len as u64);
                let part = extent.part(skip, whole);
                let Extent::Plain { addr, len: bytes, checksum_kind, checksums } = part else {
                    return Ok(());
                };
                let source = DataSource::Plain { addr, len: bytes, checksum_kind, checksums };
                self.want(source, bytes, 0, place, len, out)?;
            }
            Extent::Packed { blob, offset, .. } => {
                let from = *offset as usize + skip as usize;
                // Neighbouring items may name one blob: it is read once.
                let same = |read: &DataRead<'_>| match &read.source {
                    DataSource::Packed { blob: other } => other == blob,
                    DataSource::Plain { .. } => false,
                };
                if self.reads.last().is_some_and(same) {
                    self.places.push((self.reads.len() - 1, from, place, len));
                    return Ok(());
                }
                let source = DataSource::Packed { blob: *blob };
                self.want(source, u64::from(blob.logical), from, place, len, out)?;
            }
            Extent::Promised { .. } => {}
        }
        Ok(())
    }

    fn want(
        &mut self,
        source: DataSource,
        bytes: u64,
        from: usize,
        place: usize,
        len: usize,
        out: &mut [u8],
    ) -> Result<()> {
        if self.bytes + bytes > BYTES_AT_ONCE {
            self.finish(out)?;
        }
        self.places.push((self.reads.len(), from, place, len));
        self.reads.push(DataRead::new(source));
        self.bytes += bytes;
        Ok(())
    }

    fn finish(&mut self, out: &mut [u8]) -> Result<()> {
        self.source.pool.read_data(&mut self.reads);
        for (read, from, place, len) in self.places.drain(..) {
            let read = &self.reads[read];
            read.result.clone()?;
            out[place..place + len].copy_from_slice(&read.buf[from..from + len]);
        }
        self.reads.clear();
        self.bytes = 0;
        Ok(())
    }
}

/// A buffer of zeros.
pub(super) fn zeros(bytes: u64) -> Result<Buf> {
    Buf::zeroed(bytes as usize)
}
