//! The chunk map: from logical addresses to chunks.
//!
//! The map is a sorted array that never changes. A change makes a new one; whoever looks something
//! up holds the one that was there, so no lock is held while a device works.

use super::layout::{self, Layout, Segment};
use crate::error::Error;
use crate::format::chunk::Chunk;
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, SECTOR_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A chunk whose profile this version has.
#[derive(Clone)]
pub struct Mapped {
    /// The chunk.
    pub chunk: Chunk,
    /// How it lies on its devices.
    pub layout: &'static dyn Layout,
}

impl Mapped {
    /// Looks up the layout of a chunk.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a profile of a newer version.
    pub fn new(chunk: Chunk) -> Result<Mapped> {
        let layout = layout::of(chunk.profile)
            .ok_or(Error::Corrupt { what: "profile of a newer version", addr: chunk.logical })?;
        Ok(Mapped { chunk, layout })
    }

    /// The runs of device bytes the chunk takes.
    pub fn stripes(&self) -> impl Iterator<Item = Segment> + '_ {
        let bytes = self.layout.stripe_bytes(self.chunk.length);
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
        self.mapped.layout.copies()
    }

    /// Calls `each` with the pieces of a copy, in order.
    pub fn segments(&self, copy: usize, each: &mut dyn FnMut(Segment)) {
        self.mapped.layout.segments(&self.mapped.chunk, copy, self.offset, self.bytes, each);
    }

    /// The first piece of a copy, which stands for all of it in messages and counters.
    pub fn first_segment(&self, copy: usize) -> Segment {
        let mut first = None;
        self.segments(copy, &mut |segment| {
            first.get_or_insert(segment);
        });
        first.expect("a run is not empty")
    }

    /// The part `from..from + bytes` of the run.
    pub fn part(&self, from: u64, bytes: u64) -> Place {
        assert!(from <= self.bytes && bytes <= self.bytes - from, "part {from}+{bytes} of a run");
        Place { mapped: self.mapped.clone(), offset: self.offset + from, bytes }
    }
}
