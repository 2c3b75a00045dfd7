//! Which sectors of the logical space are free, and promises of free space.
//!
//! # Life of a sector
//!
//! ```text
//!        allocate(n), take(n)                free(m)                  m published
//! free ----------------------> taken by n ----------> freed by m ----------------> pending
//!   ^                      (used, once n is published)   (m >= n)                     |
//!   +------ discarded, if asked for ------ releasing <------------ release(>= m) -----+
//! ```
//!
//! With plenty of room, what could be released is kept for some groups more, so that older groups
//! stay readable: see `late`. A trim takes free sectors back to `releasing` while it discards them:
//! see `trim`.
//!
//! - Only [`Space::release`] makes a sector reusable: its group is published and no reader holds an
//!   older root. No exception for what was taken and freed by one group: the intent log may name
//!   it.
//! - So within a group a sector is taken at most once and freed at most once, in this order, and
//!
//! ```text
//! used(n) = used(n - 1) + taken(n) - freed(n)                                             (2)
//! ```
//!
//!   whatever the order of events. What breaks (2), such as freeing what is free, can come from a
//!   crafted pool; it is remembered, or found by the cut, and fails the cut: nothing is published.
//!
//! # The cut
//!
//! The space tree is written by the group whose space it describes. [`Space::cut`] draws a line:
//! *tree(n)*, the tree of group *n*, holds what was taken and freed before it; what comes after
//! (the nodes of the space tree itself) is the *residue(n)*. With "+" as in (2):
//!
//! ```text
//! used(n) = tree(n) + residue(n)        tree(n) = tree(n - 1) + residue(n - 1) + before_cut(n)
//! ```
//!
//! Space taken before the cut and freed after it is in the tree and, as freed, in the residue.
//! Space taken and freed after the cut is in neither; it is pending all the same.
//!
//! # Bitmaps in memory
//!
//! Groups' lists, pending frees and the published residue are kept as sets of ranges. They and the
//! published tree are the truth; a region's bitmap in memory is a cache of
//!
//! ```text
//! busy = used(p) + taken by unpublished groups + freed by published, unreleased groups    (3)
//! ```
//!
//! where *p* is the published group; "unreleased" includes what is being discarded. All three are
//! unions, so it does not matter in which order they are built up. (What unpublished groups freed
//! is in the first or the second part.) So a bitmap may be evicted at any time, and rebuilt
//! whenever the lists are seen together with the tree they belong to. Every event keeps (3) for the
//! bitmaps that are in memory:
//!
//! - *allocate, take*: the sectors enter a group's list and the bitmap in one step under the lock.
//! - *free*: what is freed is in (3) already, through its first or second part; the bitmap stays.
//! - *cut*: the group's list is divided in two; both halves count. Nothing changes.
//! - *published*: the first part changes from *used(n - 1)* to *used(n)*, so it gains *taken(n)*
//!   and loses *freed(n)*; *taken(n)* leaves the second part, *freed(n)* enters the third. By (2)
//!   the union is the same: nothing changes.
//! - *release*: the ranges leave `pending` for `releasing`, both in the third part. After the
//!   discard each batch leaves `releasing` and is cleared in the bitmaps in one step under the
//!   lock. It is in no other part: nobody used it since it was freed, and it could not be taken
//!   again.
//! - *trim*: what is in no part enters `releasing` and the bitmaps in one step, and leaves as
//!   above.
//! - *chunk dropped*: none of its sectors is in (3); it leaves with its bitmaps.
//!
//! A load reads the published tree *without* the lock, because that is I/O. It notes the number of
//! publications before it reads and compares under the lock after: if it is the same, no swap of
//! roots lies between, so the bitmap read is of the tree to which the lists, now, belong; they are
//! joined to (3) in that same step. If not, the load is thrown away and repeated.
//! [`Space::published`] swaps roots and lists in one step under the lock.
//!
//! # Searching
//!
//! Next fit with one cursor per kind, so that allocations in a row are contiguous; in chunks that
//! are nearly full rather than empty, so that empty ones can be dropped. A run never crosses a
//! region boundary, so the largest is [`REGION_BYTES`]. When no chunk in sight has a run as long as
//! wanted, a chunk is created if promises allow; else the longest run there is will do. See
//! `chunk`.
//!
//! # Chunks
//!
//! A group may only use chunks that are in its chunk tree. The chunk tree of group *n* is closed by
//! [`Space::seal_chunks`], after [`Space::drop_empty`] and [`Space::ensure_free`] saw to it that
//! the rest of its commit needs no further chunk. Chunks are created in the name of the oldest
//! group that is not sealed, whoever asks.
//!
//! # Locking
//!
//! One lock, held for a few hundred instructions by most calls and for a batch by `release`. Under
//! it the [`ChunkSource`] is asked to create and drop chunks and for its unallocated bytes, and the
//! closures of [`Space::published`] and [`Space::seal_chunks`] run; none may call back. No I/O is
//! done under it: bitmaps are read and discards sent without it. A second lock makes releases and
//! trims wait for each other, discards included; no other operation takes it.

mod bits;
mod check;
mod chunk;
mod cut;
mod group;
mod late;
mod reserve;
mod runs;
mod state;
mod supply;
#[cfg(test)]
mod tests;
mod trim;

pub use check::Violation;
pub use cut::Edit;
pub use reserve::{Class, Reservation};
pub use trim::Trim;

use crate::error::Error;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::format::space::{Residue, Run, REGION_BYTES};
use crate::platform::Result;
use crate::sync::{Mutex, Rank};
use crate::units::{Logical, Txg, SECTOR_BYTES, SECTOR_SHIFT};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};
use group::Deltas;
use reserve::{Arriving, Reserve};
use runs::{span, RunSet};
use state::{Dropped, Request, State, Step, Wanted};

/// Bitmaps an allocation loads in search of a run as long as wanted, before it takes what it has.
const LOADS_MAX: u32 = 8;
/// Runs made free in one go under the lock.
const RELEASE_BATCH: usize = 256;

/// What the allocator needs of the pool.
///
/// Called with the allocator's lock held, except for `discard` and `discard_held`: nothing here may
/// call back, and only those two may do I/O. Any mix of new chunks of `chunk_bytes` whose bytes
/// times copies sum up to `unallocated_bytes` can be created: promises are made on that.
///
/// A "byte of the devices" counts the bytes of all devices, one after the other.
pub trait ChunkSource: Send + Sync {
    /// Makes a chunk whose item group `txg` writes: of `chunk_bytes`, or smaller when that is all
    /// there is.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when the devices have no room for it.
    /// `owed` device bytes are promised besides.
    fn create_chunk(&self, kind: ChunkKind, txg: Txg, owed: u64) -> Result<Chunk>;
    /// Gives a chunk up; group `txg` deletes its item. Nothing in it is in use by any group that a
    /// crash may fall back to.
    fn drop_chunk(&self, logical: Logical, txg: Txg);
    /// Device bytes that no chunk holds and that chunks of `chunk_bytes` can be made of: of each
    /// hole as many whole ones as fit.
    fn unallocated_bytes(&self) -> u64;
    /// The same with what was lost since promises were made on it, and is made up for: only for
    /// what has been promised.
    fn promised_bytes(&self) -> u64 {
        self.unallocated_bytes()
    }
    /// Bytes of a new chunk.
    fn chunk_bytes(&self) -> u64;
    /// Device bytes a logical byte of a new chunk takes.
    fn copies(&self, kind: ChunkKind) -> u64;
    /// Whether a run, within one chunk, has bytes in a range of the devices.
    fn is_within(&self, run: Run, range: &Range<u64>) -> bool;
    /// Tells the devices that a run, within one chunk, holds nothing, as far as it lies in a range
    /// of the devices. Returns how many bytes they took notice of.
    ///
    /// # Errors
    /// When a device failed.
    fn discard(&self, run: Run, range: &Range<u64>) -> Result<u64>;
    /// Takes out what no chunk has at or behind byte `from` of the devices, within a range of them:
    /// at most `chunk_bytes`, of a run that has at least `min_bytes` in the range. It counts as
    /// allocated until [`discard_held`](Self::discard_held).
    fn hold(&self, from: u64, range: &Range<u64>, min_bytes: u64) -> Option<Range<u64>>;
    /// Tells the device that what was taken out holds nothing, and gives it back, whatever the
    /// device says. Returns how many bytes it took notice of.
    ///
    /// # Errors
    /// When the device failed.
    fn discard_held(&self, held: Range<u64>) -> Result<u64>;
}

/// Bitmaps as the published group's space tree has them.
pub trait BitmapSource: Send + Sync {
    /// The value of the region's SPACE_BITMAP item, `None` when there is none. Must read one root
    /// that was the published one at some time during the call, and keep what it reads from being
    /// released meanwhile. Called without locks of the allocator.
    ///
    /// # Errors
    /// When the tree cannot be read.
    fn bitmap(&self, region: Logical) -> Result<Option<Vec<u8>>>;
}

/// How a [`Space`] works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The published group; zero for a new pool.
    pub published: Txg,
    /// Bytes of a tree node: what metadata is allocated in.
    pub metadata_unit: u64,
    /// Bitmaps kept in memory, 1 KiB each.
    pub bitmaps_max: usize,
    /// Whether freed space is discarded before it is reused.
    pub discard: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { published: Txg(0), metadata_unit: 16384, bitmaps_max: 8192, discard: false }
    }
}

/// Space of one kind of chunks, in logical bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KindUsage {
    /// Number of chunks.
    pub chunks: u64,
    /// Bytes of the chunks.
    pub chunk_bytes: u64,
    /// Bytes in use, by published or younger groups.
    pub used_bytes: u64,
    /// Bytes freed and not yet reusable; on top of `used_bytes`.
    pub pending_bytes: u64,
}

/// Where the pool's space is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// File data and the log.
    pub data: KindUsage,
    /// Tree nodes.
    pub metadata: KindUsage,
    /// The chunk tree.
    pub system: KindUsage,
    /// Device bytes no chunk holds.
    pub unallocated_bytes: u64,
    /// Device bytes only deletes, commits and administration may use.
    pub reserve_bytes: u64,
    /// Bytes of data promised to operations.
    pub reserved_data: u64,
    /// Bytes of metadata promised to operations, as counted.
    pub reserved_metadata: u64,
}

/// What [`Space::release`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Bytes that became free.
    pub bytes: u64,
    /// The first discard that failed. The space is free all the same.
    pub discard_error: Option<Error>,
}

/// The allocator of one pool.
pub struct Space {
    chunks: Arc<dyn ChunkSource>,
    options: Options,
    discard: AtomicBool,
    /// Everything that changes. See "Locking".
    state: Mutex<State>,
    /// Held by the one `release` or `trim_piece` that is at work.
    releasing: Mutex<()>,
    arriving: Arriving,
}

/// An error about space that breaks a rule.
fn corrupt(what: &'static str, addr: Logical) -> Error {
    Error::Corrupt { what, addr }
}

impl Space {
    /// An allocator without chunks. A pool that exists is loaded with
    /// [`add_chunk`](Self::add_chunk) for each chunk, then [`load_residue`](Self::load_residue).
    ///
    /// # Panics
    /// When the source's chunks or the metadata unit are not whole sectors.
    pub fn new(chunks: Arc<dyn ChunkSource>, options: Options) -> Space {
        let unit = options.metadata_unit;
        assert!(unit > 0 && unit % SECTOR_BYTES == 0, "metadata unit of {unit} bytes");
        assert!(unit <= REGION_BYTES, "metadata unit of {unit} bytes");
        assert!(chunks.chunk_bytes() >= SECTOR_BYTES, "chunks of no size");
        // A run to be taken must fit in memory with all its regions: at most 32 a chunk.
        let resident_max = options.bitmaps_max.max(64);
        Space {
            chunks,
            options,
            discard: AtomicBool::new(options.discard),
            state: Mutex::ranked(Rank::Space, State::new(options.published, resident_max, unit)),
            releasing: Mutex::ranked(Rank::Releasing, ()),
            arriving: Arriving::default(),
        }
    }

    /// A chunk of the published chunk tree, with its used sectors from the published space tree's
    /// summary. A chunk without a summary counts as free, and gets one at the next cut.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the summary counts more than there is, or chunks overlap.
    pub fn add_chunk(&self, chunk: &Chunk, used_sectors: impl Into<Option<u64>>) -> Result<()> {
        self.state.lock().add_chunk(chunk, used_sectors.into())
    }

    /// What the published space tree does not know yet. Call once, after all chunks.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a run is named twice or contradicts a summary; [`Error::Unmapped`]
    /// when it is in no chunk.
    pub fn load_residue(&self, residue: Residue) -> Result<()> {
        let deltas = deltas_of(&residue)?;
        self.state.lock().load_residue(deltas)
    }

    /// Whether freed space is discarded from now on.
    pub fn set_discard(&self, discard: bool) {
        self.discard.store(discard, Ordering::Relaxed);
    }

    /// Takes at least `min` and at most `want` bytes, contiguous, within one chunk, for group
    /// `txg`. For metadata the length is a multiple of `min`. Creates a chunk when none has room.
    /// May read bitmaps, without a lock.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when no run of `min` bytes can be had; what the tree or the pool report.
    pub fn allocate(
        &self,
        kind: ChunkKind,
        want: u64,
        min: u64,
        txg: Txg,
        bitmaps: &dyn BitmapSource,
    ) -> Result<Run> {
        let request = request(kind, want, min, txg)?;
        self.allocate_request(&request, bitmaps)
    }

    /// Like [`allocate`](Self::allocate) for data, but only in chunks that the published chunk tree
    /// has: for what must be found again by log replay, before group `txg` is published.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when no such chunk has a run of `min` bytes that is not promised; a
    /// commit may change that.
    pub fn allocate_published(
        &self,
        want: u64,
        min: u64,
        txg: Txg,
        bitmaps: &dyn BitmapSource,
    ) -> Result<Run> {
        let mut request = request(ChunkKind::Data, want, min, txg)?;
        request.newest_chunk = self.state.lock().published;
        request.may_grow = false;
        self.repeat(bitmaps, |state, loads| {
            // Nobody promised room for this: it must not be what was promised to others.
            let left = state.data_left(&*self.chunks) >> SECTOR_SHIFT;
            if left < u64::from(request.min) {
                return Err(Error::NoSpace);
            }
            let want = u64::from(request.want).min(left) as u32;
            state.try_allocate(&Request { want, ..request }, loads, &*self.chunks)
        })
    }

    /// Whether the published chunk tree has the run's chunk: after a crash, a log record that names
    /// the run can be replayed.
    pub fn is_published(&self, run: Run) -> bool {
        let state = self.state.lock();
        let Some(end) = run.addr.checked_add(run.bytes) else { return false };
        let chunk = state.chunk_of(&(run.addr.0..end.0));
        chunk.is_some_and(|chunk| chunk.birth <= state.published)
    }

    /// Whether no unpublished group took any of the run: after a crash it belongs to whom it
    /// belongs to now.
    pub fn is_of_published_groups(&self, run: Run) -> bool {
        if !self.is_published(run) {
            return false;
        }
        let state = self.state.lock();
        let range = span(run);
        let taken = |deltas: &Deltas| deltas.taken.touches(range.clone());
        let is_new = state.groups.values().any(|group| group.deltas().any(taken));
        !is_new
    }

    /// Whether all of the run is in use.
    ///
    /// # Errors
    /// [`Error::Unmapped`] when it is in no chunk; errors of reading bitmaps.
    pub fn is_used(&self, run: Run, bitmaps: &dyn BitmapSource) -> Result<bool> {
        if run.addr.checked_add(run.bytes).is_none() {
            return Err(Error::Unmapped { addr: run.addr });
        }
        self.repeat(bitmaps, |state, _| state.try_used(run))
    }

    /// As [`is_used`](Self::is_used), and in a chunk of that kind.
    ///
    /// # Errors
    /// As those.
    pub fn is_used_as(
        &self,
        run: Run,
        kind: ChunkKind,
        bitmaps: &dyn BitmapSource,
    ) -> Result<bool> {
        if !self.is_used(run, bitmaps)? {
            return Ok(false);
        }
        let state = self.state.lock();
        let chunk = state.chunk_of(&span(run));
        Ok(chunk.is_some_and(|chunk| chunk.kind == kind))
    }

    /// Log replay: group `txg` has these sectors.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when they are not free, [`Error::Unmapped`] when they are in no chunk.
    pub fn take(&self, run: Run, txg: Txg, bitmaps: &dyn BitmapSource) -> Result<()> {
        let aligned = run.addr.0 % SECTOR_BYTES == 0 && run.bytes % SECTOR_BYTES == 0;
        if !aligned || run.bytes == 0 || run.addr.checked_add(run.bytes).is_none() {
            return Err(corrupt("run is not made of sectors", run.addr));
        }
        self.repeat(bitmaps, |state, _| state.try_take(run, txg))
    }

    /// The run is garbage once group `txg` is published. Never fails: what cannot be (space that is
    /// not in use, twice, in no chunk) fails the cut.
    pub fn free(&self, run: Run, txg: Txg) {
        self.state.lock().free(run, txg);
    }

    /// As [`free`](Self::free), for what may be wrong: then nothing is freed.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unmapped`].
    pub fn try_free(&self, run: Run, txg: Txg) -> Result<()> {
        self.state.lock().note_freed(run, txg)
    }

    /// Sees to it that group `txg` can be handed out `bytes` of a kind, in blocks of the metadata
    /// unit or of a sector of data, without a further chunk. Holds as long as no other group
    /// allocates of that kind.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when it cannot.
    pub fn ensure_free(
        &self,
        kind: ChunkKind,
        bytes: u64,
        txg: Txg,
        bitmaps: &dyn BitmapSource,
    ) -> Result<()> {
        let unit = match kind {
            ChunkKind::Data => SECTOR_BYTES,
            ChunkKind::Metadata | ChunkKind::System => self.options.metadata_unit,
        };
        let request = request(kind, unit, unit, txg)?;
        self.repeat(bitmaps, |state, loads| loop {
            let handy = state.handy(&request, request.min, bytes, loads < LOADS_MAX);
            match handy {
                Step::Load(wanted) => return Ok(Step::Load(wanted)),
                Step::Done(found) if found >= bytes => return Ok(Step::Done(())),
                Step::Done(_) => {}
            }
            if !state.grow(&request, true, &*self.chunks)? {
                return Err(Error::NoSpace);
            }
        })
    }

    /// Gives chunks back to the pool that are empty in the published group and every later one, in
    /// the name of group `txg`, which must not be sealed. Keeps some room of each kind, less when
    /// the pool has nothing unallocated. Reads bitmaps: a summary alone is not believed.
    ///
    /// # Errors
    /// When the space tree cannot be read, or the group is sealed.
    pub fn drop_empty(&self, txg: Txg, bitmaps: &dyn BitmapSource) -> Result<Vec<Logical>> {
        let mut gone = Vec::new();
        let candidates = {
            let state = self.state.lock();
            if txg <= state.sealed {
                return Err(Error::Argument { what: "chunks dropped by a group that is sealed" });
            }
            state.empty_chunks()
        };
        for start in candidates {
            if !self.is_droppable(start) || !self.is_empty_on_disk(start, bitmaps)? {
                continue;
            }
            let mut state = self.state.lock();
            if state.may_drop(start, &*self.chunks) {
                let space = state.remove_chunk(start).expect("a chunk that may be dropped exists");
                state.dropped.insert(start, Dropped { txg, space });
                self.chunks.drop_chunk(start, txg);
                gone.push(start);
            }
        }
        Ok(gone)
    }

    /// Closes the chunk tree of group `txg`: from now on the group makes do with the chunks there
    /// are, and new ones are of the next group. `collect` takes the edits of the chunk tree from
    /// the pool; no chunk is created between the two, so a chunk is in the tree of exactly the
    /// groups that may use it.
    pub fn seal_chunks<T>(&self, txg: Txg, collect: impl FnOnce() -> T) -> T {
        let mut state = self.state.lock();
        state.sealed = state.sealed.max(txg);
        collect()
    }

    /// What group `txg` took and freed since its cut, coalesced, each run within one chunk.
    pub fn residue(&self, txg: Txg) -> Residue {
        let state = self.state.lock();
        let group = state.groups.get(&txg);
        group.map(|group| group.residue(|at| state.chunk_end(at))).unwrap_or_default()
    }

    /// Group `txg` is published, with this residue. `swap` makes [`BitmapSource`] read its tree.
    pub fn published(&self, txg: Txg, residue: Residue, swap: impl FnOnce()) {
        let mut state = self.state.lock();
        swap();
        state.publish(txg, &residue);
    }

    /// No reader holds a root older than that of group `txg`: what published groups up to `txg`
    /// freed is discarded, if asked for, and can be allocated again. Waits for the discards.
    pub fn release(&self, txg: Txg) -> Released {
        let _alone = self.releasing.lock();
        self.release_alone(txg)
    }

    /// As [`release`](Self::release), but keeps what older groups need as long as there is plenty
    /// of room: see the module `late`.
    pub fn release_late(&self, txg: Txg) -> Released {
        let _alone = self.releasing.lock();
        let upto = self.state.lock().keep(txg, &*self.chunks);
        self.release_alone(upto)
    }

    fn release_alone(&self, txg: Txg) -> Released {
        let bytes = self.state.lock().begin_release(txg);
        let discard_error = match self.discard.load(Ordering::Relaxed) {
            true => self.discard_releasing(),
            false => None,
        };
        while self.state.lock().release_some(RELEASE_BATCH) {}
        Released { bytes, discard_error }
    }

    /// Where the space is.
    pub fn usage(&self) -> Usage {
        let state = self.state.lock();
        let room = state.room(&*self.chunks);
        let of = |kind| {
            let totals = state.totals(kind);
            KindUsage {
                chunks: totals.chunks,
                chunk_bytes: totals.bytes,
                used_bytes: totals.busy.saturating_sub(totals.pending),
                pending_bytes: totals.pending.min(totals.busy),
            }
        };
        Usage {
            data: of(ChunkKind::Data),
            metadata: of(ChunkKind::Metadata),
            system: of(ChunkKind::System),
            unallocated_bytes: room.unallocated,
            reserve_bytes: state.reserve_device_bytes(&room),
            reserved_data: state.promised.data,
            reserved_metadata: state.promised.metadata(),
        }
    }

    /// Bytes of data that operations of class Normal could still reserve, if they needed no
    /// metadata and had what is kept given free: what statfs shows as available.
    pub fn available_data(&self) -> u64 {
        let state = self.state.lock();
        state.data_to_be_had(&*self.chunks)
    }

    /// Tells how many device bytes to make chunks of promises and the reserve need. Nothing is
    /// promised before that returns, so it may take away what is not needed. It may not call back.
    pub fn with_owed<T>(&self, take: impl FnOnce(u64) -> T) -> T {
        let state = self.state.lock();
        let room = state.room(&*self.chunks);
        take(room.owed(&state.promised).saturating_add(state.reserve_device_bytes(&room)))
    }

    /// Forgets every bitmap: memory is short. They are read again when needed.
    pub fn forget_bitmaps(&self) {
        self.state.lock().forget_bitmaps();
    }

    // What `reserve` needs.

    fn metadata_unit(&self) -> u64 {
        self.options.metadata_unit
    }

    fn promise(
        &self,
        data: u64,
        metadata: u64,
        class: Class,
        cap: Option<&dyn Fn() -> u64>,
    ) -> Result<()> {
        let mut state = self.state.lock();
        let mut sum = state.promised.plus(data, metadata, class).ok_or(Error::NoSpace)?;
        if let Some(cap) = cap {
            sum.metadata_cap = self.arriving.then(cap);
        }
        let room = state.room(&*self.chunks);
        let reserve = match class {
            Class::Normal => state.reserve(&room),
            Class::Delete | Class::Admin => Reserve::default(),
        };
        let harmless = class == Class::Delete && data == 0 && sum.metadata() <= room.metadata.free;
        if data + metadata > 0 && !harmless && !room.fits(&sum, reserve) {
            // Not higher: (1) would not hold any more for what others have been promised.
            let cap = &mut state.promised.metadata_cap;
            *cap = sum.metadata_cap.min(*cap);
            state.is_short = true;
            return Err(Error::NoSpace);
        }
        state.promised = sum;
        Ok(())
    }

    fn give_back(&self, data: u64, metadata: u64, class: Class) {
        self.state.lock().promised.give_back(data, metadata, class);
    }

    // Loading.

    fn allocate_request(&self, request: &Request, bitmaps: &dyn BitmapSource) -> Result<Run> {
        self.repeat(bitmaps, |state, loads| state.try_allocate(request, loads, &*self.chunks))
    }

    /// Tries a step until it needs no further bitmap. The step is told how many were loaded.
    fn repeat<T>(
        &self,
        bitmaps: &dyn BitmapSource,
        mut attempt: impl FnMut(&mut State, u32) -> Result<Step<T>>,
    ) -> Result<T> {
        let mut loads = 0;
        loop {
            let step = attempt(&mut self.state.lock(), loads)?;
            match step {
                Step::Done(value) => return Ok(value),
                Step::Load(wanted) => self.load(&wanted, bitmaps)?,
            }
            loads = loads.saturating_add(1);
        }
    }

    fn load(&self, wanted: &Wanted, bitmaps: &dyn BitmapSource) -> Result<()> {
        let item = bitmaps.bitmap(wanted.start);
        let mut state = self.state.lock();
        if state.generation != wanted.generation {
            // Of an older root, and an error may come from that as well: the caller tries again.
            return Ok(());
        }
        state.install(wanted, item?.as_deref())
    }

    // Dropping.

    fn is_droppable(&self, start: Logical) -> bool {
        self.state.lock().may_drop(start, &*self.chunks)
    }

    /// Whether nothing in the chunk is in use by the published group, according to the bitmaps.
    fn is_empty_on_disk(&self, start: Logical, bitmaps: &dyn BitmapSource) -> Result<bool> {
        let Some(count) = self.state.lock().chunks.get(&start).map(|c| c.region_count()) else {
            return Ok(false);
        };
        for region in 0..count {
            let empty = self.repeat(bitmaps, |state, _| {
                let bits = state.chunks.get(&start).map(|chunk| chunk.bits(region));
                Ok(match bits {
                    None => Step::Done(false),
                    Some(None) => Step::Load(state.wanted(start, region)),
                    Some(Some(bits)) => Step::Done(bits.used() == 0),
                })
            })?;
            if !empty {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn discard_releasing(&self) -> Option<Error> {
        let runs = {
            let state = self.state.lock();
            state.releasing.to_runs(|at| state.chunk_end(at))
        };
        let mut first = None;
        for run in runs {
            if let Err(error) = self.chunks.discard(run, &(0..u64::MAX)) {
                first.get_or_insert(error);
            }
        }
        first
    }
}

/// A request in sectors. Both lengths are whole sectors; `want` is cut to what a region has.
fn request(kind: ChunkKind, want: u64, min: u64, txg: Txg) -> Result<Request> {
    let whole = want % SECTOR_BYTES == 0 && min % SECTOR_BYTES == 0;
    if !whole || min == 0 || want < min {
        return Err(Error::Argument { what: "allocation of no whole sectors" });
    }
    if min > REGION_BYTES {
        return Err(Error::NoSpace);
    }
    let sectors = |bytes: u64| (bytes.min(REGION_BYTES) >> SECTOR_SHIFT) as u32;
    let (want, min) = (sectors(want), sectors(min));
    Ok(Request { kind, want, min, txg, newest_chunk: txg, may_grow: true })
}

fn deltas_of(residue: &Residue) -> Result<Deltas> {
    let set_of = |runs: &[Run]| {
        let mut set = RunSet::default();
        for run in runs {
            let valid = run.bytes > 0 && run.addr.checked_add(run.bytes).is_some();
            let fresh = valid && set.insert(span(*run)).is_ok();
            if !fresh {
                return Err(corrupt("residue names a run twice", run.addr));
            }
        }
        Ok(set)
    };
    let deltas = Deltas { taken: set_of(&residue.taken)?, freed: set_of(&residue.freed)? };
    let both = deltas.taken.iter().find(|range| deltas.freed.touches(range.clone()));
    if let Some(both) = both {
        return Err(corrupt("residue has a run both taken and freed", Logical(both.start)));
    }
    Ok(deltas)
}
