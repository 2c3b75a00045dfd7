//! Reservations: whether what was promised can be kept.
//!
//! Data and metadata live in chunks of their own, and both kinds of chunks come from one supply of
//! unallocated device bytes. With
//!
//! - `D`, `M`: data and metadata bytes promised and not yet given back,
//! - `Fd`, `Fm`: bytes of data and metadata chunks that can be handed out now,
//! - `cd`, `cm`: device bytes a byte of each kind takes (its copies),
//! - `C`: bytes of a new chunk, `U`: unallocated device bytes,
//!
//! the promises can be kept, in whatever order they are called in, when
//!
//! ```text
//! ceil(max(0, D - Fd) / C) * C * cd  +  ceil(max(0, M - Fm) / C) * C * cm  <=  U      (1)
//! ```
//!
//! Whole chunks are counted because a chunk serves one kind only. Each step keeps (1): handing out
//! promised space lowers `D` and `Fd` alike (for a moment only `Fd` is lowered, which makes (1)
//! stricter than the truth, never laxer); creating a chunk that is needed takes one term down by
//! what it takes from `U`; space that is released raises `Fd` or `Fm`. The allocator creates a
//! chunk that is *not* needed (to find a longer run) only when (1) still holds afterwards, and
//! drops an empty one only when no promise counts on it.
//!
//! The *reserve* is what deletes, commits and administration need on a full pool: room for new tree
//! nodes, and some sectors of data, because what is cut in the middle of a sector leaves a part of
//! it that goes to a new place. A normal reservation must leave it alone, so for it (1) is asked
//! with the reserve added to `M` and `D`. It lives in chunks of its kind or in `U`, wherever there
//! is room. The log takes data without a promise: what (1), asked like that, leaves over.
//!
//! A delete that only needs nodes for which metadata chunks have room touches nothing that another
//! promise counts on. It is let in even if (1) does not hold.
//!
//! `M` of normal operations is an overestimate when there are many: each promises itself a path of
//! new nodes to every tree, and a group writes each node once. So it counts at most up to a cap,
//! the bound of what all groups that are not published can write together; the engine knows the
//! trees and sets it. It knows nothing of operations under way: what they add is dirty memory only
//! when they are done. So the cap is higher by what each of them may add, its metadata and three
//! times its data, from when it is let in until its promise is [kept](Reservation::keep) by its
//! group. What deletes and administration reserve counts on top, so that normal
//! operations leave room for it, but also at most up to the cap: or thousands of deletes in one
//! group would leave that group's own commit no room for data.
//!
//! (1) counts sectors. Data can be handed out sector by sector. Metadata blocks must be contiguous:
//! as long as they come in multiples of the node size, so do the holes between them, and every free
//! byte counted in `Fm` is usable; hence metadata reservations are rounded up to that unit, and
//! other sizes should be left to what is allocated once a group.

use super::Space;
use crate::error::Error;
use crate::units::SECTOR_BYTES;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

/// Who reserves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Whatever may grow the pool's content: leaves the reserve alone.
    Normal,
    /// What makes room in the end: unlink, truncate, punching holes.
    Delete,
    /// Commits, replay and administration.
    Admin,
}

/// Least reserve of a pool that is not tiny, in device bytes.
const RESERVE_BYTES_MIN: u64 = 2 << 20;
/// Greatest reserve, in device bytes.
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// Tree nodes that the reserve holds at least, whatever their size: what removing a file needs, and
/// a commit besides.
const RESERVE_NODES_MIN: u64 = 12;
/// Data that the reserve holds: what some deletes that cut sectors need at a time.
const RESERVE_DATA_BYTES: u64 = 16 * SECTOR_BYTES;

/// What only deletes, commits and administration may promise themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Reserve {
    pub data: u64,
    pub metadata: u64,
}

impl Reserve {
    /// That of a pool with so many device bytes: 1/32, at least 2 MiB (but never more than 1/16, so
    /// that a pool of 8 MiB is of use), at most 1 GiB; in any case some nodes.
    pub fn of(device_bytes: u64, metadata_copies: u64, node_bytes: u64) -> Reserve {
        let least = RESERVE_BYTES_MIN.min(device_bytes / 16);
        let bytes = (device_bytes / 32).clamp(least, RESERVE_BYTES_MAX) / metadata_copies;
        let metadata = bytes.next_multiple_of(node_bytes).max(RESERVE_NODES_MIN * node_bytes);
        Reserve { data: RESERVE_DATA_BYTES, metadata }
    }
}

/// One kind's side of formula (1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Side {
    /// Bytes that can be handed out now.
    pub free: u64,
    /// Device bytes a byte takes.
    pub copies: u64,
}

/// What formula (1) needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub chunk_bytes: u64,
    pub unallocated: u64,
    pub data: Side,
    pub metadata: Side,
}

impl Room {
    /// Device bytes of the chunks that must be made before `bytes` fit; `None` when absurd.
    fn shortage(&self, side: Side, bytes: u64) -> Option<u64> {
        let chunks = bytes.saturating_sub(side.free).div_ceil(self.chunk_bytes);
        chunks.checked_mul(self.chunk_bytes)?.checked_mul(side.copies)
    }

    /// Formula (1), with `reserve` left alone.
    pub fn fits(&self, promised: &Promised, reserve: Reserve) -> bool {
        let data = promised.data.saturating_add(reserve.data);
        let metadata = promised.metadata().saturating_add(reserve.metadata);
        let shortages = (self.shortage(self.data, data), self.shortage(self.metadata, metadata));
        let (Some(data), Some(metadata)) = shortages else { return false };
        data.checked_add(metadata).is_some_and(|sum| sum <= self.unallocated)
    }

    /// Device bytes of the chunks that promises still need.
    pub fn owed(&self, promised: &Promised) -> u64 {
        let data = self.shortage(self.data, promised.data).unwrap_or(u64::MAX);
        let metadata = self.shortage(self.metadata, promised.metadata()).unwrap_or(u64::MAX);
        data.saturating_add(metadata)
    }

    /// The most data on top of what is promised for which formula (1) holds. Nothing when the
    /// metadata alone does not fit: an operation that needs none does not exist.
    pub fn data_left(&self, promised: &Promised, reserve: Reserve) -> u64 {
        let metadata = promised.metadata().saturating_add(reserve.metadata);
        let taken = self.shortage(self.metadata, metadata);
        let Some(left) = taken.and_then(|taken| self.unallocated.checked_sub(taken)) else {
            return 0;
        };
        let chunks = left / self.chunk_bytes / self.data.copies;
        let fits = self.data.free.saturating_add(chunks.saturating_mul(self.chunk_bytes));
        fits.saturating_sub(promised.data.saturating_add(reserve.data))
    }
}

/// Promises that are out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Promised {
    pub data: u64,
    /// By class Normal, before the cap.
    pub metadata_normal: u64,
    /// By the other classes, before the cap.
    pub metadata_other: u64,
    pub metadata_cap: u64,
}

impl Default for Promised {
    fn default() -> Promised {
        Promised { data: 0, metadata_normal: 0, metadata_other: 0, metadata_cap: u64::MAX }
    }
}

impl Promised {
    /// `M` of formula (1).
    pub fn metadata(&self) -> u64 {
        let capped = |bytes: u64| bytes.min(self.metadata_cap);
        capped(self.metadata_normal).saturating_add(capped(self.metadata_other))
    }

    /// With so much more promised; `None` when the sums overflow.
    pub fn plus(&self, data: u64, metadata: u64, class: Class) -> Option<Promised> {
        let mut sum = Promised { data: self.data.checked_add(data)?, ..*self };
        let slot = sum.metadata_of(class);
        *slot = slot.checked_add(metadata)?;
        Some(sum)
    }

    pub fn give_back(&mut self, data: u64, metadata: u64, class: Class) {
        self.data -= data;
        *self.metadata_of(class) -= metadata;
    }

    fn metadata_of(&mut self, class: Class) -> &mut u64 {
        match class {
            Class::Normal => &mut self.metadata_normal,
            Class::Delete | Class::Admin => &mut self.metadata_other,
        }
    }
}

/// More than any pool has.
const ABSURD_BYTES: u64 = 1 << 56;

/// What an operation that was promised so much may add to what its group writes of metadata: its
/// data becomes dirty memory, of which a byte counts three times.
fn added(data: u64, metadata: u64) -> u64 {
    data.saturating_mul(3).saturating_add(metadata)
}

/// What operations under way may add together. They come and go without the lock; see
/// [`Arriving::then`].
#[derive(Default)]
pub(super) struct Arriving(AtomicU64);

impl Arriving {
    fn add(&self, data: u64, metadata: u64) {
        self.0.fetch_add(added(data, metadata), Ordering::SeqCst);
    }

    /// It is dirty memory now, or will not come.
    fn subtract(&self, data: u64, metadata: u64) {
        self.0.fetch_sub(added(data, metadata), Ordering::SeqCst);
    }

    /// The cap: what is under way, and then what groups can write with what is dirty. In this
    /// order, so that what becomes dirty in between counts twice and not never.
    pub fn then(&self, cap: &dyn Fn() -> u64) -> u64 {
        self.0.load(Ordering::SeqCst).saturating_add(cap())
    }
}

/// A promise of space. What is held returns to the pool on drop.
#[must_use = "dropping a reservation gives the space back"]
pub struct Reservation {
    space: Arc<Space>,
    data: u64,
    metadata: u64,
    class: Class,
    /// The operation is done; its group holds the promise.
    is_kept: bool,
}

impl core::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Reservation({:?}: {} data, {} metadata)", self.class, self.data, self.metadata)
    }
}

impl Reservation {
    /// Bytes of file data it promises.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// Bytes of metadata it promises, before copies.
    pub fn metadata(&self) -> u64 {
        self.metadata
    }

    /// Who made it.
    pub fn class(&self) -> Class {
        self.class
    }

    /// The operation has changed memory, which counts from now on. Does nothing when it was called
    /// before.
    pub fn keep(&mut self) {
        if !core::mem::replace(&mut self.is_kept, true) {
            self.space.arriving.subtract(self.data, self.metadata);
        }
    }

    /// Gives part of the promise back: it was spent, or turned out not to be needed.
    ///
    /// # Panics
    /// When there is less: the caller's estimate was wrong.
    pub fn shrink(&mut self, data: u64, metadata: u64) {
        self.take_out(data, metadata);
        self.give_back(data, metadata);
    }

    /// Makes two promises of one.
    ///
    /// # Panics
    /// When there is less: the caller's estimate was wrong.
    pub fn split(&mut self, data: u64, metadata: u64) -> Reservation {
        self.take_out(data, metadata);
        let (space, class, is_kept) = (self.space.clone(), self.class, self.is_kept);
        Reservation { space, data, metadata, class, is_kept }
    }

    /// Makes two promises of one, the second of `data` bytes for another class: data counts alike
    /// whoever was promised it.
    ///
    /// # Panics
    /// When there is less: the caller's estimate was wrong.
    pub fn split_data(&mut self, data: u64, class: Class) -> Reservation {
        self.take_out(data, 0);
        let (space, is_kept) = (self.space.clone(), self.is_kept);
        Reservation { space, data, metadata: 0, class, is_kept }
    }

    /// The same promise of data, made by administration.
    ///
    /// # Panics
    /// When it promises metadata, which is counted by who promised it.
    pub fn as_admin(mut self) -> Reservation {
        assert!(self.metadata == 0, "{self:?} changes its class");
        self.class = Class::Admin;
        self
    }

    /// Makes one promise of two: one that is kept if both are.
    ///
    /// # Panics
    /// When they are of different classes or pools.
    pub fn join(&mut self, mut other: Reservation) {
        assert!(self.class == other.class, "{:?} joined with {:?}", self.class, other.class);
        assert!(Arc::ptr_eq(&self.space, &other.space), "reservations of two pools joined");
        if self.is_kept != other.is_kept {
            let kept = if self.is_kept { &mut *self } else { &mut other };
            kept.is_kept = false;
            kept.space.arriving.add(kept.data, kept.metadata);
        }
        self.data += core::mem::take(&mut other.data);
        self.metadata += core::mem::take(&mut other.metadata);
    }

    fn give_back(&self, data: u64, metadata: u64) {
        self.space.give_back(data, metadata, self.class);
        if !self.is_kept {
            self.space.arriving.subtract(data, metadata);
        }
    }

    fn take_out(&mut self, data: u64, metadata: u64) {
        assert!(data <= self.data, "reservation of {} data overdrawn by {data}", self.data);
        assert!(
            metadata <= self.metadata,
            "reservation of {} metadata overdrawn by {metadata}",
            self.metadata
        );
        self.data -= data;
        self.metadata -= metadata;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.data > 0 || self.metadata > 0 {
            self.give_back(self.data, self.metadata);
        }
    }
}

impl Space {
    /// Promises `data` bytes of file data and `metadata` bytes of tree nodes (before copies), each
    /// rounded up to what is allocated of its kind. Never waits.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when it does not fit now; a commit may change that.
    pub fn reserve(
        self: &Arc<Self>,
        data: u64,
        metadata: u64,
        class: Class,
    ) -> Result<Reservation, Error> {
        self.reserve_within(data, metadata, class, None)
    }

    /// As [`Space::reserve`], with a new cap: what all groups that are not published can write of
    /// metadata, but for what operations under way will add.
    ///
    /// # Errors
    /// Those of [`Space::reserve`].
    pub fn reserve_within(
        self: &Arc<Self>,
        data: u64,
        metadata: u64,
        class: Class,
        cap: Option<&dyn Fn() -> u64>,
    ) -> Result<Reservation, Error> {
        let data = data.checked_next_multiple_of(SECTOR_BYTES).ok_or(Error::NoSpace)?;
        let metadata =
            metadata.checked_next_multiple_of(self.metadata_unit()).ok_or(Error::NoSpace)?;
        if data.max(metadata) >= ABSURD_BYTES {
            return Err(Error::NoSpace);
        }
        // With the operation's own: a cap that rises when its bytes have become dirty memory would
        // make more of promises that were let in under a lower one.
        self.arriving.add(data, metadata);
        if let Err(error) = self.promise(data, metadata, class, cap) {
            self.arriving.subtract(data, metadata);
            return Err(error);
        }
        Ok(Reservation { space: self.clone(), data, metadata, class, is_kept: false })
    }
}
