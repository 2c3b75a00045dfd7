//! The lock types: those of `lock_api`, each with its place in the order.

use super::rank::{Held, Place, Rank};
use super::raw;
use core::ops::{Deref, DerefMut};

/// Mutual exclusion.
#[derive(Default)]
pub struct Mutex<T> {
    place: Place,
    lock: lock_api::Mutex<raw::RawMutex, T>,
}

/// Guard of a [`Mutex`].
#[must_use = "a lock is given back when its guard is dropped"]
pub struct MutexGuard<'a, T> {
    guard: lock_api::MutexGuard<'a, raw::RawMutex, T>,
    _held: Held,
}

impl<T> Mutex<T> {
    /// A lock under which no other with a rank is taken.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex { place: Place::none(), lock: lock_api::Mutex::new(value) }
    }

    /// A lock with a place in the order.
    pub const fn ranked(rank: Rank, value: T) -> Mutex<T> {
        Mutex { place: Place::of(rank, 0), lock: lock_api::Mutex::new(value) }
    }

    /// Waits until nobody else has the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.place.check();
        MutexGuard { guard: self.lock.lock(), _held: self.place.hold() }
    }

    /// Takes the lock unless somebody has it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let guard = self.lock.try_lock()?;
        Some(MutexGuard { guard, _held: self.place.hold() })
    }

    /// Whether somebody has the lock.
    pub fn is_locked(&self) -> bool {
        self.lock.is_locked()
    }

    /// The value, of a lock that is not needed any more.
    pub fn into_inner(self) -> T {
        self.lock.into_inner()
    }

    /// The value, of a lock that nobody else can have.
    pub fn get_mut(&mut self) -> &mut T {
        self.lock.get_mut()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// Many readers or one writer.
#[derive(Default)]
pub struct RwLock<T> {
    place: Place,
    lock: lock_api::RwLock<raw::RawRwLock, T>,
}

/// Shared guard of a [`RwLock`].
#[must_use = "a lock is given back when its guard is dropped"]
pub struct ReadGuard<'a, T> {
    guard: lock_api::RwLockReadGuard<'a, raw::RawRwLock, T>,
    _held: Held,
}

/// Exclusive guard of a [`RwLock`].
#[must_use = "a lock is given back when its guard is dropped"]
pub struct WriteGuard<'a, T> {
    guard: lock_api::RwLockWriteGuard<'a, raw::RawRwLock, T>,
    _held: Held,
}

impl<T> RwLock<T> {
    /// A lock under which no other with a rank is taken.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock { place: Place::none(), lock: lock_api::RwLock::new(value) }
    }

    /// A lock with a place in the order.
    pub const fn ranked(rank: Rank, value: T) -> RwLock<T> {
        RwLock::numbered(rank, 0, value)
    }

    /// A lock with a place in the order, of which those of its rank are taken by their numbers.
    pub const fn numbered(rank: Rank, number: u64, value: T) -> RwLock<T> {
        RwLock { place: Place::of(rank, number), lock: lock_api::RwLock::new(value) }
    }

    /// Waits until nobody has the lock exclusively.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read(&self) -> ReadGuard<'_, T> {
        self.place.check();
        ReadGuard { guard: self.lock.read(), _held: self.place.hold() }
    }

    /// Waits until nobody else has the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn write(&self) -> WriteGuard<'_, T> {
        self.place.check();
        WriteGuard { guard: self.lock.write(), _held: self.place.hold() }
    }

    /// Takes the lock shared unless somebody has it exclusively.
    pub fn try_read(&self) -> Option<ReadGuard<'_, T>> {
        let guard = self.lock.try_read()?;
        Some(ReadGuard { guard, _held: self.place.hold() })
    }

    /// Takes the lock unless somebody has it.
    pub fn try_write(&self) -> Option<WriteGuard<'_, T>> {
        let guard = self.lock.try_write()?;
        Some(WriteGuard { guard, _held: self.place.hold() })
    }

    /// The value, of a lock that is not needed any more.
    pub fn into_inner(self) -> T {
        self.lock.into_inner()
    }

    /// The value, of a lock that nobody else can have.
    pub fn get_mut(&mut self) -> &mut T {
        self.lock.get_mut()
    }
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}
