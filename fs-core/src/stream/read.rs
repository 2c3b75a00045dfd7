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
/// Bytes that are wanted together, but for the last part.
const PARTS_BYTES: usize = 2 << 20;
/// Parts that are wanted together.
const PARTS: usize = 256;

/// A file in a tree.
#[derive(Clone, Copy)]
pub(super) struct File<'a> {
    pub source: Source<'a>,
    pub tree: &'a Tree,
    pub ino: Ino,
    pub size: u64,
}

/// Reads of files that are carried out together, so that devices are not waited for one by one.
pub(super) struct Batch<'a> {
    source: Source<'a>,
    reads: Vec<DataRead<'static>>,
    /// Where the bytes of reads go.
    places: Vec<Place>,
    /// Bytes that the reads expand to.
    bytes: u64,
    /// What was asked for, in that order.
    parts: Vec<Buf>,
    parts_bytes: usize,
}

/// Bytes of a read that belong in a part.
struct Place {
    read: usize,
    from: usize,
    part: usize,
    at: usize,
    len: usize,
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
}

impl<'a> Batch<'a> {
    /// Nothing to read yet.
    pub fn new(source: Source<'a>) -> Batch<'a> {
        let (reads, places, parts) = (Vec::new(), Vec::new(), Vec::new());
        Batch { source, reads, places, bytes: 0, parts, parts_bytes: 0 }
    }

    /// Where it reads.
    pub fn source(&self) -> Source<'a> {
        self.source
    }

    /// Whether it is as much as should be read together.
    pub fn is_full(&self) -> bool {
        self.parts_bytes >= PARTS_BYTES || self.parts.len() >= PARTS
    }

    /// Wants `len` bytes of a file from `start` on, which is a multiple of the sector size; what
    /// the file does not have there is zeros.
    ///
    /// # Errors
    /// Errors of the device or the tree; damaged data.
    pub fn add(&mut self, file: &File<'_>, start: u64, len: usize) -> Result<()> {
        self.parts.push(Buf::zeroed(len)?);
        self.parts_bytes += len;
        let end = start.saturating_add(len as u64).min(file.size);
        if start >= end {
            return Ok(());
        }
        let nodes = self.source.nodes;
        each_extent(nodes, file.tree, file.ino, start, end, &mut |at, extent, _| {
            self.extent(at, &extent, start, end)?;
            Ok(true)
        })
    }

    /// What was wanted, in that order. A buffer is whole sectors; what was wanted is at its
    /// beginning.
    ///
    /// # Errors
    /// Errors of the device; damaged data.
    pub fn finish(&mut self) -> Result<Vec<Buf>> {
        self.read()?;
        self.parts_bytes = 0;
        Ok(core::mem::take(&mut self.parts))
    }

    /// The part of an extent at `at` that lies in `start..end`.
    fn extent(&mut self, at: u64, extent: &Extent, start: u64, end: u64) -> Result<()> {
        let from = at.max(start);
        let to = end.min(at + extent.len());
        if from >= to {
            return Ok(());
        }
        let (skip, len) = (from - at, (to - from) as usize);
        let part = self.parts.len() - 1;
        let place =
            Place { read: self.reads.len(), from: 0, part, at: (from - start) as usize, len };
        match extent {
            Extent::Inline { compression, logical, bytes } => {
                let codecs = &*self.source.pool.platform().codecs;
                let expanded =
                    codec::expand(codecs, *compression, bytes, *logical, Logical(0), Buf::zeroed)?;
                let from = skip as usize;
                let out = &mut self.parts[part][place.at..place.at + len];
                out.copy_from_slice(&expanded[from..from + len]);
            }
            Extent::Plain { .. } => {
                let whole = crate::units::sector_round(len as u64);
                let part = extent.part(skip, whole);
                let Extent::Plain { addr, len: bytes, checksum_kind, checksums } = part else {
                    return Ok(());
                };
                let source = DataSource::Plain { addr, len: bytes, checksum_kind, checksums };
                self.want(source, bytes, place)?;
            }
            Extent::Packed { blob, offset, .. } => {
                let from = *offset as usize + skip as usize;
                // Neighbouring items may name one blob: it is read once.
                let same = |read: &DataRead<'_>| match &read.source {
                    DataSource::Packed { blob: other } => other == blob,
                    DataSource::Plain { .. } => false,
                };
                if self.reads.last().is_some_and(same) {
                    self.places.push(Place { read: self.reads.len() - 1, from, ..place });
                    return Ok(());
                }
                let source = DataSource::Packed { blob: *blob };
                self.want(source, u64::from(blob.logical), Place { from, ..place })?;
            }
            Extent::Promised { .. } => {}
        }
        Ok(())
    }

    fn want(&mut self, source: DataSource, bytes: u64, place: Place) -> Result<()> {
        if self.bytes + bytes > BYTES_AT_ONCE {
            self.read()?;
        }
        self.places.push(Place { read: self.reads.len(), ..place });
        self.reads.push(DataRead::new(source));
        self.bytes += bytes;
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        self.source.pool.read_data(&mut self.reads);
        for Place { read, from, part, at, len } in self.places.drain(..) {
            let read = &self.reads[read];
            read.result.clone()?;
            self.parts[part][at..at + len].copy_from_slice(&read.buf[from..from + len]);
        }
        self.reads.clear();
        self.bytes = 0;
        Ok(())
    }
}
