//! Transaction groups: who may change what when, and how much may be dirty.
//!
//! ```text
//! open(n+1)      operations enter, change memory, leave
//! closing(n)     n+1 is open; operations that entered n are leaving
//! writing(n)     nobody changes n any more; the engine writes it
//! published(n)   a superblock names it; opening the pool finds it
//! ```
//!
//! - [`Groups::enter`] never waits. It is called with the locks of all objects of the operation
//!   held, so the groups of one object's changes never go backwards: an operation that finds a
//!   change of group *n* on its object entered *n* or later, because the open group only grows.
//! - At most two groups are unpublished. [`Groups::close`] is called by the one committer, and only
//!   when the group before is published.
//! - [`Dirty`] bounds the memory of changes: above the soft limit the committer is wanted, above
//!   the hard limit those who are about to add wait, before they take any lock.
//!
//! Never: hold a [`Handle`] while waiting for a commit, a reservation or dirty memory. The
//! committer waits for handles.

use crate::sync::rank::{self, Held};
use crate::sync::{Rank, Signal};
use crate::units::Txg;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

#[cfg(test)]
mod tests;

/// How many groups can be told apart by [`slot`].
pub const SLOTS: usize = 4;

/// The place of a group in arrays of per-group state. Unpublished groups never share one.
pub fn slot(txg: Txg) -> usize {
    (txg.0 % SLOTS as u64) as usize
}

/// The life of transaction groups.
pub struct Groups {
    open: AtomicU64,
    published: AtomicU64,
    active: [AtomicUsize; SLOTS],
    changed: Signal,
}

/// Membership of an operation in a group, for as long as it changes memory.
#[must_use = "an operation changes memory only while it holds its group"]
pub struct Handle<'a> {
    groups: &'a Groups,
    txg: Txg,
    _held: Held,
}

impl Handle<'_> {
    /// The group.
    pub fn txg(&self) -> Txg {
        self.txg
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        self.groups.leave(self.txg);
    }
}

impl Groups {
    /// Groups of a pool whose newest published group is `published`.
    pub fn new(published: Txg) -> Groups {
        Groups {
            open: AtomicU64::new(published.0 + 1),
            published: AtomicU64::new(published.0),
            active: [const { AtomicUsize::new(0) }; SLOTS],
            changed: Signal::new(),
        }
    }

    /// The group that operations enter now.
    pub fn open(&self) -> Txg {
        Txg(self.open.load(Ordering::SeqCst))
    }

    /// The newest group that opening the pool would find.
    pub fn published(&self) -> Txg {
        Txg(self.published.load(Ordering::SeqCst))
    }

    /// Enters the open group. Never waits; the caller holds the locks of what it will change.
    pub fn enter(&self) -> Handle<'_> {
        self.enter_holding(rank::hold(Rank::Group))
    }

    /// Enters the open group for replay, while nobody else can change anything: locks may be taken
    /// in it.
    pub fn enter_alone(&self) -> Handle<'_> {
        self.enter_holding(Held::nothing())
    }

    fn enter_holding(&self, held: Held) -> Handle<'_> {
        loop {
            let txg = self.open();
            self.active[slot(txg)].fetch_add(1, Ordering::SeqCst);
            // If the group closed in between, the committer may have missed this entry.
            if self.open() == txg {
                return Handle { groups: self, txg, _held: held };
            }
            self.leave(txg);
        }
    }

    fn leave(&self, txg: Txg) {
        let last = self.active[slot(txg)].fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.open() != txg {
            self.changed.notify_all();
        }
    }

    /// Closes the open group and waits until every operation has left it. Returns the group, which
    /// nobody changes any more. Called by the one committer.
    pub fn close(&self) -> Txg {
        let txg = self.open();
        assert_eq!(self.published().next(), txg, "the group before {txg} is not published");
        self.open.store(txg.0 + 1, Ordering::SeqCst);
        self.changed.wait_until(|| self.active[slot(txg)].load(Ordering::SeqCst) == 0);
        txg
    }

    /// Marks a group published and wakes who waits for it.
    pub fn publish(&self, txg: Txg) {
        assert_eq!(self.published().next(), txg, "groups are published in order");
        self.published.store(txg.0, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Wakes everyone in [`Groups::wait_until`], to look again.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    /// Blocks until `ready`; looked at whenever a group is published and on [`Groups::notify`].
    pub fn wait_until(&self, ready: impl FnMut() -> bool) {
        self.changed.wait_until(ready);
    }
}

/// Bytes of memory that hold changes not yet written, and of buffers that are needed to write them.
pub struct Dirty {
    bytes: AtomicU64,
    buffers: AtomicU64,
    soft: AtomicU64,
    hard: AtomicU64,
}

impl Dirty {
    /// For at most `limit` bytes. The soft limit is half of it. The hard one leaves a quarter to
    /// those who were let in at the same time, and to what they add beside a file's bytes.
    pub fn new(limit: u64) -> Dirty {
        Dirty {
            bytes: AtomicU64::new(0),
            buffers: AtomicU64::new(0),
            soft: AtomicU64::new(limit / 2),
            hard: AtomicU64::new(limit - limit / 4),
        }
    }

    /// Counts a buffer of so many bytes until the guard is dropped.
    pub fn buffer(&self, bytes: u64) -> Buffered<'_> {
        self.buffers.fetch_add(bytes, Ordering::Relaxed);
        Buffered { dirty: self, bytes }
    }

    /// Bytes of changes that are dirty now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Notes that what was `before` dirty bytes is now `after`.
    pub fn adjust(&self, before: u64, after: u64) {
        if after >= before {
            self.bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            let less = before - after;
            let old = self.bytes.fetch_sub(less, Ordering::Relaxed);
            debug_assert!(old >= less, "{less} of {old} dirty bytes taken away");
        }
    }

    /// Whether a commit is wanted to make room.
    pub fn over_soft(&self) -> bool {
        self.taken() > self.soft.load(Ordering::Relaxed)
    }

    /// Whether nobody may add more before something was written.
    pub fn over_hard(&self) -> bool {
        self.taken() > self.hard.load(Ordering::Relaxed)
    }

    fn taken(&self) -> u64 {
        self.bytes().saturating_add(self.buffers.load(Ordering::Relaxed))
    }
}

/// A buffer that is counted while a group is written.
#[must_use = "a buffer is counted for as long as this lives"]
pub struct Buffered<'a> {
    dirty: &'a Dirty,
    bytes: u64,
}

impl Drop for Buffered<'_> {
    fn drop(&mut self) {
        self.dirty.buffers.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
