//! Discarding what is free.
//!
//! A trim goes over the pool in pieces: the free space of each chunk, a region at a time, then what
//! no chunk has. A piece is taken out under the lock, discarded without it, and given back:
//!
//! ```text
//! free --> releasing --> discarded --> free
//! ```
//!
//! What is discarded is what could have been handed out and overwritten at that moment, and nothing
//! else: the rules that protect the published group, the log, and readers of older roots are those
//! of allocation, and need no second wording here. What is freed but not yet reusable is busy, and
//! so left alone. Once in `releasing` the piece is busy itself: neither an allocation nor a bitmap
//! that is loaded meanwhile can take it for free.
//!
//! A piece that is out could be missed:
//!
//! - by promises: a piece is so small that all that is promised, the reserve, and as much again as
//!   the piece still fit without it (formula (1) of `reserve`). What a nearly full pool has left is
//!   not trimmed.
//! - by a commit that counts on what `ensure_free` found: whoever trims sees to it that no commit
//!   is under way.
//!
//! The range to trim is given in bytes of the pool's devices, one after the other, since that is
//! what a person can know; logical addresses grow for ever and say nothing to anyone.

use super::bits::FreeRun;
use super::chunk::ChunkSpace;
use super::runs::span;
use super::state::{bytes_of, State, Step};
use super::{corrupt, BitmapSource, ChunkSource, Space, RELEASE_BATCH};
use crate::error::Error;
use crate::format::chunk::ChunkKind;
use crate::format::space::{Run, REGION_BYTES};
use crate::platform::Result;
use crate::units::{Logical, SECTOR_SHIFT};
use alloc::vec::Vec;
use core::ops::Range;

/// A piece of a region that would be smaller is not worth a discard.
const PIECE_BYTES_MIN: u64 = 64 << 10;

/// A trim and how far it has come.
#[derive(Clone, Debug)]
pub struct Trim {
    /// Bytes of the devices, one after the other.
    range: Range<u64>,
    /// Shorter free runs are left alone.
    min_bytes: u64,
    next: Next,
    discarded: u64,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// Free space of chunks, from this address on.
    Chunks(u64),
    /// What no chunk has, from this byte of the devices on.
    Unallocated(u64),
    Nothing,
}

impl Trim {
    /// Will discard what is free in a range of the devices' bytes, in runs of at least `min_bytes`.
    /// In chunks one region is looked at at a time, so no more than a region is asked for there.
    pub fn new(range: Range<u64>, min_bytes: u64) -> Trim {
        Trim { range, min_bytes, next: Next::Chunks(0), discarded: 0 }
    }

    /// Device bytes discarded so far.
    pub fn discarded(&self) -> u64 {
        self.discarded
    }
}

/// Where a piece comes from.
#[derive(Clone, Copy)]
enum Supply {
    Chunks(ChunkKind),
    Unallocated,
}

/// What was taken out.
enum Piece {
    /// Free runs, now in `releasing`; none if there was nothing to take out.
    Runs(Vec<Run>),
    /// Bytes of the devices that no chunk has.
    Unallocated(Range<u64>),
    /// Everything was looked at.
    Nothing,
}

impl Space {
    /// Discards one more piece of what is free; false when there is none left. No commit may be
    /// under way.
    ///
    /// # Errors
    /// When a device or the space tree fails. What was taken out is free again all the same.
    pub fn trim_piece(&self, trim: &mut Trim, bitmaps: &dyn BitmapSource) -> Result<bool> {
        let _alone = self.releasing.lock();
        let piece = self.repeat(bitmaps, |state, _| state.take_out(trim, &*self.chunks))?;
        match piece {
            Piece::Nothing => return Ok(false),
            Piece::Runs(runs) => {
                let mut outcome = Ok(());
                for run in runs {
                    match self.chunks.discard(run, &trim.range) {
                        Ok(bytes) => trim.discarded += bytes,
                        Err(error) => {
                            outcome = Err(error);
                            break;
                        }
                    }
                }
                while self.state.lock().release_some(RELEASE_BATCH) {}
                outcome?;
            }
            Piece::Unallocated(held) => trim.discarded += self.chunks.discard_held(held)?,
        }
        Ok(true)
    }
}

impl State {
    /// Takes the next piece out, which may turn out to be empty, and moves the trim behind it.
    fn take_out(&mut self, trim: &mut Trim, source: &dyn ChunkSource) -> Result<Step<Piece>> {
        match trim.next {
            Next::Chunks(at) => self.take_out_of_chunk(trim, at, source),
            Next::Unallocated(at) => {
                let held = self.take_out_of_rest(trim, at, source);
                trim.next = held.as_ref().map_or(Next::Nothing, |held| Next::Unallocated(held.end));
                Ok(Step::Done(held.map_or(Piece::Nothing, Piece::Unallocated)))
            }
            Next::Nothing => Ok(Step::Done(Piece::Nothing)),
        }
    }

    /// Takes out what no chunk has, as much as a chunk.
    fn take_out_of_rest(
        &self,
        trim: &Trim,
        at: u64,
        source: &dyn ChunkSource,
    ) -> Option<Range<u64>> {
        // One more: a range that does not begin where chunks do cuts the place of one in two.
        let price = source.chunk_bytes().saturating_mul(2);
        if !self.can_spare(Supply::Unallocated, price, source) {
            return None;
        }
        source.hold(at, &trim.range, trim.min_bytes)
    }

    /// The chunk that has address `at`, or the first behind it.
    fn chunk_from(&self, at: u64) -> Option<&ChunkSpace> {
        let here = self.chunks.range(..=Logical(at)).next_back().map(|(_, chunk)| chunk);
        let here = here.filter(|chunk| at < chunk.span().end);
        here.or_else(|| self.chunks.range(Logical(at)..).next().map(|(_, chunk)| chunk))
    }

    /// Takes out what the region at or behind `at` has free.
    fn take_out_of_chunk(
        &mut self,
        trim: &mut Trim,
        at: u64,
        source: &dyn ChunkSource,
    ) -> Result<Step<Piece>> {
        let nothing = Ok(Step::Done(Piece::Runs(Vec::new())));
        let Some(chunk) = self.chunk_from(at) else {
            trim.next = Next::Unallocated(trim.range.start);
            return nothing;
        };
        let at = at.max(chunk.start.0);
        let (start, region) = (chunk.start, ((at - chunk.start.0) / REGION_BYTES) as u32);
        let window = chunk.region_span(region);
        let place = Run { addr: Logical(window.start), bytes: window.end - window.start };
        let budget = self.budget(chunk.kind, source);
        if chunk.free() == 0 || budget == 0 || !source.is_within(place, &trim.range) {
            trim.next = Next::Chunks(window.end);
            return nothing;
        }
        let Some(bits) = chunk.bits(region) else {
            return Ok(Step::Load(self.wanted(start, region)));
        };
        // What is left of a run of which a piece was discarded counts as the whole.
        let min_bytes = trim.min_bytes.min(REGION_BYTES);
        let worth = |run: &FreeRun| {
            let whole = bits.free_around(run.start..run.start + run.len);
            bytes_of(whole) >= min_bytes
        };
        let from = ((at - window.start) >> SECTOR_SHIFT) as u32;
        let (mut runs, mut left) = (Vec::new(), budget);
        trim.next = Next::Chunks(window.end);
        for free in bits.free_runs(from).filter(worth) {
            let addr = Logical(window.start + bytes_of(free.start));
            let run = Run { addr, bytes: bytes_of(free.len).min(left) };
            left -= run.bytes;
            runs.try_reserve(1).map_err(|_| Error::Memory)?;
            runs.push(run);
            if left == 0 {
                trim.next = Next::Chunks(run.end().0);
                break;
            }
        }
        if budget - left > bytes_of(chunk.free()) {
            return Err(corrupt("chunk summary counts more than is used", start));
        }
        runs.iter().for_each(|run| self.detain(start, *run));
        Ok(Step::Done(Piece::Runs(runs)))
    }

    /// Makes a free run of a chunk one that is being released.
    fn detain(&mut self, start: Logical, run: Run) {
        let chunk = self.chunks.get_mut(&start).expect("the run was found in the chunk");
        let (kind, sectors) = (chunk.kind, chunk.sectors_of(span(run)));
        let count = sectors.end - sectors.start;
        chunk.occupy(sectors);
        self.count(start, count, true);
        self.add_pending(kind, run.bytes);
        self.releasing.insert(span(run)).expect("what is being released is not free");
    }

    /// How much of a region may be out at a time.
    fn budget(&self, kind: ChunkKind, source: &dyn ChunkSource) -> u64 {
        let sizes = core::iter::successors(Some(REGION_BYTES), |bytes| Some(bytes / 2));
        let mut sizes = sizes.take_while(|bytes| *bytes >= PIECE_BYTES_MIN);
        sizes.find(|bytes| self.can_spare(Supply::Chunks(kind), *bytes, source)).unwrap_or(0)
    }

    /// Whether, without so much, everything promised still fits, the reserve, and as much again.
    fn can_spare(&self, supply: Supply, bytes: u64, source: &dyn ChunkSource) -> bool {
        let mut room = self.room(source);
        let reserve = self.reserve(&room);
        let stock = match supply {
            Supply::Chunks(ChunkKind::Data) => Some(&mut room.data.free),
            Supply::Chunks(ChunkKind::Metadata) => Some(&mut room.metadata.free),
            // Nothing is promised of it.
            Supply::Chunks(ChunkKind::System) => None,
            Supply::Unallocated => Some(&mut room.unallocated),
        };
        if let Some(stock) = stock {
            *stock = stock.saturating_sub(bytes);
        }
        room.data_left(&self.promised, reserve) >= bytes
    }
}
