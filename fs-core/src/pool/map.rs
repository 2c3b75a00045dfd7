//! The chunk map: from logical addresses to chunks.
//!
//! The map is a sorted array that never changes. A change makes a new one; whoever looks something
//! up holds the one that was there, so no lock is held while a device works.

use super::layout::{self, Segment};
use crate::error::Error;
use crate::format::chunk::{Chunk, Profile};
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, SECTOR_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A chunk that is mapped.
#[derive(Clone)]
pub struct Mapped {
    /// The chunk; of a profile that this version has, since others do not decode.
    pub chunk: Chunk,
}

impl Mapped {
    /// The runs of device bytes the chunk takes.
    pub fn stripes(&self) -> impl Iterator<Item = Segment> + '_ {
        let bytes = self.chunk.stripe_bytes();
        self.chunk.stripes.iter().map(move |stripe| Segment {
            device: stripe.device,
            at: stripe.physical,
            bytes,
        })
    }

    fn end(&self) -> u64 {
        self.chunk.logical.0 + self.chunk.length
    }
}

/// Chunks by logical address; they do not overlap.
#[derive(Clone, Default)]
pub struct ChunkMap {
    chunks: Vec<Arc<Mapped>>,
}

impl ChunkMap {
    /// The chunk that covers an address.
    pub fn get(&self, addr: Logical) -> Option<&Arc<Mapped>> {
        let after = self.chunks.partition_point(|mapped| mapped.chunk.logical <= addr);
        let mapped = self.chunks.get(after.checked_sub(1)?)?;
        (addr.0 < mapped.end()).then_some(mapped)
    }

    /// Every chunk, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Mapped>> {
        self.chunks.iter()
    }

    /// The map with further chunks.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when two chunks overlap, [`Error::Memory`].
    pub fn with(&self, more: Vec<Arc<Mapped>>) -> Result<ChunkMap> {
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(self.chunks.len() + more.len()).map_err(|_| Error::Memory)?;
        chunks.extend_from_slice(&self.chunks);
        chunks.extend(more);
        // Sorts are unstable in the whole core: a stable one takes 4 KiB of a kernel's stack.
        chunks.sort_unstable_by_key(|mapped| mapped.chunk.logical);
        for pair in chunks.windows(2) {
            if pair[0].end() > pair[1].chunk.logical.0 {
                let what = "chunk overlaps another in logical space";
                return Err(Error::Corrupt { what, addr: pair[1].chunk.logical });
            }
        }
        Ok(ChunkMap { chunks })
    }

    /// The map without the chunks for which `gone` holds.
    pub fn without(&self, gone: impl Fn(&Chunk) -> bool) -> ChunkMap {
        let kept = self.chunks.iter().filter(|mapped| !gone(&mapped.chunk));
        ChunkMap { chunks: kept.cloned().collect() }
    }

    /// Where a run is.
    ///
    /// # Errors
    /// [`Error::Unmapped`] unless it lies in one chunk: allocation never crosses chunks.
    pub fn locate(&self, run: Run) -> Result<Place> {
        let unmapped = Error::Unmapped { addr: run.addr };
        let Some(mapped) = self.get(run.addr) else { return Err(unmapped) };
        let offset = run.addr.0 - mapped.chunk.logical.0;
        let aligned = run.addr.0 % SECTOR_BYTES == 0 && run.bytes % SECTOR_BYTES == 0;
        if !aligned || run.bytes == 0 || run.bytes > mapped.chunk.length - offset {
            return Err(unmapped);
        }
        Ok(Place { mapped: mapped.clone(), offset, bytes: run.bytes })
    }
}

/// A run within a chunk.
#[derive(Clone)]
pub struct Place {
    mapped: Arc<Mapped>,
    offset: u64,
    /// Length; a multiple of the sector size.
    pub bytes: u64,
}

impl Place {
    /// First logical address.
    pub fn addr(&self) -> Logical {
        Logical(self.mapped.chunk.logical.0 + self.offset)
    }

    /// How many copies there are.
    pub fn copies(&self) -> usize {
        self.mapped.chunk.profile.copies() as usize
    }

    /// The profile of its chunk.
    pub fn profile(&self) -> Profile {
        self.mapped.chunk.profile
    }

    /// The run cut into pieces each copy of which is on one device, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Place> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let left = self.bytes - from;
            if left == 0 {
                return None;
            }
            let bytes = layout::piece_bytes(&self.mapped.chunk, self.offset + from).min(left);
            let piece = self.part(from, bytes);
            from += bytes;
            Some(piece)
        })
    }

    /// Where a copy of a piece is. Of a run of several pieces, the first one, which stands for it
    /// in messages.
    pub fn segment(&self, copy: usize) -> Segment {
        layout::segment(&self.mapped.chunk, copy, self.offset, self.bytes)
    }

    /// The part `from..from + bytes` of the run.
    pub fn part(&self, from: u64, bytes: u64) -> Place {
        assert!(from <= self.bytes && bytes <= self.bytes - from, "part {from}+{bytes} of a run");
        Place { mapped: self.mapped.clone(), offset: self.offset + from, bytes }
    }
}
