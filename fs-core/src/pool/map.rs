//! The chunk map: from logical addresses to chunks.
//!
//! The map is a sorted array that never changes. A change makes a new one; whoever looks something
//! up holds the one that was there, so no lock is held while a device works.

use super::layout::{self, Segment};
use crate::error::Error;
use crate::format::chunk::{Chunk, Profile, Stripe};
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
    /// While it gets another place: that. See `moves`.
    pub next: Option<Arc<Chunk>>,
    /// The chunk tree of the group being written has the other place.
    pub is_sealed: bool,
}

impl Mapped {
    /// A chunk that stays where it is.
    pub fn new(chunk: Chunk) -> Mapped {
        Mapped { chunk, next: None, is_sealed: false }
    }

    /// The chunk as the chunk tree of the group that is written next has it.
    pub fn recorded(&self) -> &Chunk {
        match &self.next {
            Some(next) if self.is_sealed => next,
            _ => &self.chunk,
        }
    }

    /// What it takes besides its own stripes while it gets another place.
    pub fn further_stripes(&self) -> impl Iterator<Item = Segment> + '_ {
        let stripes = self.next.iter().flat_map(|next| segments(next));
        stripes.filter(|segment| self.stripes().all(|own| own != *segment))
    }

    /// The runs of device bytes the chunk takes.
    pub fn stripes(&self) -> impl Iterator<Item = Segment> + '_ {
        segments(&self.chunk)
    }

    fn end(&self) -> u64 {
        self.chunk.logical.0 + self.chunk.length
    }
}

/// The runs of device bytes that a chunk takes.
pub fn segments(chunk: &Chunk) -> impl Iterator<Item = Segment> + '_ {
    let bytes = chunk.stripe_bytes();
    let segment =
        move |stripe: &Stripe| Segment { device: stripe.device, at: stripe.physical, bytes };
    chunk.stripes.iter().map(segment)
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

    /// The map with other entries for chunks that it has, sorted by address.
    pub fn replace(&self, others: &[Arc<Mapped>]) -> ChunkMap {
        let mut chunks = self.chunks.clone();
        for other in others {
            let at = chunks.partition_point(|mapped| mapped.chunk.logical < other.chunk.logical);
            assert!(chunks[at].chunk.logical == other.chunk.logical, "no such chunk to replace");
            chunks[at] = other.clone();
        }
        ChunkMap { chunks }
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
        Ok(Place { mapped: mapped.clone(), is_next: false, offset, bytes: run.bytes })
    }
}

/// A run within a chunk.
#[derive(Clone)]
pub struct Place {
    mapped: Arc<Mapped>,
    /// Where the chunk is about to be, not where it is.
    is_next: bool,
    offset: u64,
    /// Length; a multiple of the sector size.
    pub bytes: u64,
}

impl Place {
    /// The chunk, with the stripes that the run is in.
    fn chunk(&self) -> &Chunk {
        match &self.mapped.next {
            Some(next) if self.is_next => next,
            _ => &self.mapped.chunk,
        }
    }

    /// First logical address.
    pub fn addr(&self) -> Logical {
        Logical(self.mapped.chunk.logical.0 + self.offset)
    }

    /// How many copies there are.
    pub fn copies(&self) -> usize {
        self.chunk().profile.copies() as usize
    }

    /// The same run where its chunk is about to be, if it gets another place.
    pub fn next(&self) -> Option<Place> {
        self.mapped.next.as_ref()?;
        Some(Place { is_next: true, ..self.clone() })
    }

    /// Whether its chunk will be there, whatever else happens.
    pub fn is_sealed(&self) -> bool {
        self.mapped.is_sealed
    }

    /// Whether a copy of a piece is in one of the stripes of another place of the chunk, and so the
    /// same.
    pub fn is_in(&self, segment: &Segment) -> bool {
        let mut own = self.mapped.stripes();
        own.any(|own| {
            let end = own.at.0 + own.bytes;
            own.device == segment.device && (own.at.0..end).contains(&segment.at.0)
        })
    }

    /// The profile of its chunk.
    pub fn profile(&self) -> Profile {
        self.chunk().profile
    }

    /// The run cut into pieces each copy of which is on one device, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Place> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let left = self.bytes - from;
            if left == 0 {
                return None;
            }
            let bytes = layout::piece_bytes(self.chunk(), self.offset + from).min(left);
            let piece = self.part(from, bytes);
            from += bytes;
            Some(piece)
        })
    }

    /// Where a copy of a piece is. Of a run of several pieces, the first one, which stands for it
    /// in messages.
    pub fn segment(&self, copy: usize) -> Segment {
        layout::segment(self.chunk(), copy, self.offset, self.bytes)
    }

    /// The part `from..from + bytes` of the run.
    pub fn part(&self, from: u64, bytes: u64) -> Place {
        assert!(from <= self.bytes && bytes <= self.bytes - from, "part {from}+{bytes} of a run");
        Place { offset: self.offset + from, bytes, ..self.clone() }
    }
}
