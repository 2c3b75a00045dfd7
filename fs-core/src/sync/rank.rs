//! The order in which locks are taken, asserted while tests run.
//!
//! Every lock that may be held while another is taken has a [`Rank`]; `docs/locking.md` says what
//! each protects. A thread may take a lock whose place (its rank, then its number among those of
//! its rank) comes after the places of all that it holds. A lock that is only tried is not asked:
//! trying cannot wait; but what is taken after it is. So a test that takes two locks the wrong way
//! round fails at once, not only when another thread takes them the right way at the same moment.
//!
//! It costs a list per thread, so it is there in debug builds for tests of this and other crates.
//! Elsewhere everything here is nothing.

/// The order of locks. One that comes later here is never held when one that comes earlier is
/// taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// The tree of directories.
    Moving,
    /// Being the one who writes groups.
    Committer,
    /// Writing an inode's bytes early.
    Flushing,
    /// One inode; its number is the order among them.
    Inode,
    /// Membership in the open group: no lock, but the committer waits for it.
    Group,
    /// The log's position.
    Log,
    /// The list of subvolumes, and that of open snapshots.
    Subvols,
    /// What subvolumes and snapshots there are.
    Versions,
    /// Lists and maps that are held for a moment, one at a time.
    Short,
    /// Being the one who releases or trims.
    Releasing,
    /// Free space.
    Space,
    /// One repair at a time.
    Heal,
    /// Changing which devices are complete.
    Standing,
    /// Room on devices.
    Ledger,
    /// What is replaced or copied whole, and nothing is taken under.
    Leaf,
}

#[cfg(all(debug_assertions, any(test, feature = "lock-ranks")))]
mod place {
    use super::Rank;
    use std::cell::RefCell;
    use std::vec::Vec;

    std::thread_local! {
        static HELD: RefCell<Vec<(Rank, u64)>> = const { RefCell::new(Vec::new()) };
    }

    /// Where a lock stands in the order, if anywhere.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Place(Option<(Rank, u64)>);

    /// A place that this thread holds until this is dropped.
    #[must_use = "a place is held for as long as its lock"]
    #[derive(Debug)]
    pub struct Held(Option<(Rank, u64)>);

    impl Place {
        /// A lock under which none with a rank is taken, and so without one.
        pub const fn none() -> Place {
            Place(None)
        }

        /// With a rank, and a number among those of that rank.
        pub const fn of(rank: Rank, number: u64) -> Place {
            Place(Some((rank, number)))
        }

        /// Asserts that the thread may wait for the lock.
        #[track_caller]
        pub fn check(self) {
            let Some(wanted) = self.0 else { return };
            let last = HELD.with_borrow(|held| held.iter().max().copied());
            assert!(
                last.is_none_or(|last| last < wanted),
                "{wanted:?} is taken while {last:?} is held: see docs/locking.md"
            );
        }

        /// Holds the place.
        pub fn hold(self) -> Held {
            if let Some(place) = self.0 {
                HELD.with_borrow_mut(|held| held.push(place));
            }
            Held(self.0)
        }
    }

    impl Held {
        /// No place at all.
        pub const fn nothing() -> Held {
            Held(None)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let Some(place) = self.0 else { return };
            // While a thread ends its list may be gone.
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(last) = held.iter().rposition(|other| *other == place) {
                    held.swap_remove(last);
                }
            });
        }
    }
}

#[cfg(not(all(debug_assertions, any(test, feature = "lock-ranks"))))]
mod place {
    use super::Rank;

    /// Where a lock stands in the order: not kept in this build.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Place;

    /// Nothing, in this build.
    #[must_use = "a place is held for as long as its lock"]
    #[derive(Debug)]
    pub struct Held;

    impl Held {
        /// Nothing, in this build.
        pub const fn nothing() -> Held {
            Held
        }
    }

    impl Place {
        /// Nothing, in this build.
        pub const fn none() -> Place {
            Place
        }

        /// Nothing, in this build.
        pub const fn of(_: Rank, _: u64) -> Place {
            Place
        }

        /// Nothing, in this build.
        #[inline(always)]
        pub fn check(self) {}

        /// Nothing, in this build.
        #[inline(always)]
        pub fn hold(self) -> Held {
            Held
        }
    }
}

pub use place::{Held, Place};

/// Asserts that the thread may wait for what has this rank, whether or not it is about to.
#[cfg_attr(debug_assertions, track_caller)]
pub fn may_wait_for(rank: Rank) {
    Place::of(rank, 0).check();
}

/// Holds a rank without a lock.
pub fn hold(rank: Rank) -> Held {
    Place::of(rank, 0).hold()
}

#[cfg(test)]
mod tests {
    use super::Rank;
    use crate::sync::{Mutex, RwLock};
    use std::panic::{catch_unwind, AssertUnwindSafe};

    fn panics(step: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(step)).is_err()
    }

    #[test]
    fn locks_are_taken_in_their_order_and_in_no_other() {
        let space = Mutex::ranked(Rank::Space, ());
        let ledger = Mutex::ranked(Rank::Ledger, ());
        {
            let _space = space.lock();
            let _ledger = ledger.lock();
        }
        let held = ledger.lock();
        assert!(panics(|| drop(space.lock())));
        // Trying cannot wait.
        assert!(space.try_lock().is_some());
        drop(held);
        drop(space.lock());
    }

    #[test]
    fn locks_of_one_rank_are_taken_by_their_numbers_and_once() {
        let inodes = [7, 8, 9].map(|ino| RwLock::numbered(Rank::Inode, ino, ()));
        let first = inodes[0].read();
        let third = inodes[2].write();
        assert!(panics(|| drop(inodes[1].read())));
        drop(third);
        let second = inodes[1].read();
        assert!(
            panics(|| drop(inodes[1].read())),
            "read twice, which a waiting writer would block"
        );
        // Given back in any order.
        drop(first);
        assert!(panics(|| drop(inodes[0].read())));
        drop(second);
        drop(inodes[0].write());
    }

    #[test]
    fn what_was_only_tried_counts_for_what_is_taken_after_it() {
        let (space, ledger) = (Mutex::ranked(Rank::Space, ()), RwLock::ranked(Rank::Ledger, ()));
        let tried = ledger.try_write().unwrap();
        assert!(panics(|| drop(space.lock())));
        drop(tried);
        drop(space.lock());
    }

    #[test]
    fn other_threads_and_locks_without_a_rank_do_not_matter() {
        let (space, plain) = (Mutex::ranked(Rank::Space, ()), Mutex::new(()));
        let _plain = plain.lock();
        let ledger = Mutex::ranked(Rank::Ledger, ());
        let _ledger = ledger.lock();
        std::thread::scope(|scope| scope.spawn(|| drop(space.lock())).join()).unwrap();
    }
}
