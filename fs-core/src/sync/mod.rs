//! Locks and waiting, chosen at compile time.
//!
//! | feature | locks | waiting |
//! | --- | --- | --- |
//! | `host` | `parking_lot` | its condition variable |
//! | `kernel` | storage here, operations are link-time symbols of the module | `wait_var` behind symbols |
//! | neither | spinning | spinning: for bare builds and single-threaded use only |
//!
//! No other module names a lock implementation. [`Signal`] is the only way to wait for progress.
//! The order of locks is in `docs/locking.md`; tests assert it: see [`rank`].
#![cfg_attr(not(feature = "host"), allow(unsafe_code, reason = "raw locks are made here"))]

mod locks;
pub mod rank;

pub use locks::{Mutex, MutexGuard, ReadGuard, RwLock, WriteGuard};
pub use rank::Rank;
pub use raw::Signal;

#[cfg(all(feature = "host", not(feature = "kernel")))]
mod raw {
    pub use parking_lot::{RawMutex, RawRwLock};

    /// Wakes threads that wait for a condition to become true.
    #[derive(Default)]
    pub struct Signal {
        lock: parking_lot::Mutex<()>,
        changed: parking_lot::Condvar,
    }

    impl Signal {
        /// A signal nobody waits for.
        pub const fn new() -> Signal {
            Signal { lock: parking_lot::Mutex::new(()), changed: parking_lot::Condvar::new() }
        }

        /// Blocks until `ready` returns true. `ready` is called with an internal lock held: it may
        /// read atomics and take leaf locks, and must not wait or notify.
        pub fn wait_until(&self, mut ready: impl FnMut() -> bool) {
            let mut guard = self.lock.lock();
            while !ready() {
                self.changed.wait(&mut guard);
            }
        }

        /// Makes every waiter look at its condition again. Call after changing what it reads.
        pub fn notify_all(&self) {
            // Taking the lock orders the change before the look of a waiter about to sleep.
            drop(self.lock.lock());
            self.changed.notify_all();
        }
    }
}

#[cfg(feature = "kernel")]
mod raw {
    use core::cell::UnsafeCell;
    use core::ffi::c_void;
    use lock_api::GuardNoSend;

    extern "C" {
        fn cairn_mutex_lock(lock: *mut u64);
        fn cairn_mutex_trylock(lock: *mut u64) -> bool;
        fn cairn_mutex_unlock(lock: *mut u64);
        fn cairn_rwlock_read(lock: *mut u64);
        fn cairn_rwlock_try_read(lock: *mut u64) -> bool;
        fn cairn_rwlock_read_unlock(lock: *mut u64);
        fn cairn_rwlock_write(lock: *mut u64);
        fn cairn_rwlock_try_write(lock: *mut u64) -> bool;
        fn cairn_rwlock_write_unlock(lock: *mut u64);
        fn cairn_wait_until(
            key: *mut u64,
            ready: extern "C" fn(*mut c_void) -> bool,
            context: *mut c_void,
        );
        fn cairn_wake_all(key: *mut u64);
    }

    /// Storage of a kernel mutex; all zeros is the unlocked state.
    #[repr(C, align(8))]
    pub struct RawMutex(UnsafeCell<[u64; 3]>);

    // SAFETY: the symbols implement a kernel mutex, which any thread may contend for.
    unsafe impl Sync for RawMutex {}
    // SAFETY: an unlocked kernel mutex holds no pointer to itself (all zeros), so it may move.
    unsafe impl Send for RawMutex {}

    // SAFETY: the module's symbols give mutual exclusion between lock and unlock.
    unsafe impl lock_api::RawMutex for RawMutex {
        #[expect(clippy::declare_interior_mutable_const, reason = "lock_api's initialiser pattern")]
        const INIT: RawMutex = RawMutex(UnsafeCell::new([0; 3]));
        type GuardMarker = GuardNoSend;

        fn lock(&self) {
            // SAFETY: the storage is valid for as long as `self`, and only the symbols touch it.
            unsafe { cairn_mutex_lock(self.0.get().cast()) }
        }
        fn try_lock(&self) -> bool {
            // SAFETY: as in `lock`.
            unsafe { cairn_mutex_trylock(self.0.get().cast()) }
        }
        unsafe fn unlock(&self) {
            // SAFETY: as in `lock`; the caller holds the lock.
            unsafe { cairn_mutex_unlock(self.0.get().cast()) }
        }
    }

    /// Storage of a kernel read-write semaphore; all zeros is the unlocked state.
    #[repr(C, align(8))]
    pub struct RawRwLock(UnsafeCell<[u64; 4]>);

    // SAFETY: the symbols implement an rw_semaphore, which any thread may contend for.
    unsafe impl Sync for RawRwLock {}
    // SAFETY: an unlocked rw_semaphore holds no pointer to itself (all zeros), so it may move.
    unsafe impl Send for RawRwLock {}

    // SAFETY: the module's symbols give shared and exclusive ownership as lock_api asks.
    unsafe impl lock_api::RawRwLock for RawRwLock {
        #[expect(clippy::declare_interior_mutable_const, reason = "lock_api's initialiser pattern")]
        const INIT: RawRwLock = RawRwLock(UnsafeCell::new([0; 4]));
        type GuardMarker = GuardNoSend;

        fn lock_shared(&self) {
            // SAFETY: the storage is valid for as long as `self`, and only the symbols touch it.
            unsafe { cairn_rwlock_read(self.0.get().cast()) }
        }
        fn try_lock_shared(&self) -> bool {
            // SAFETY: as in `lock_shared`.
            unsafe { cairn_rwlock_try_read(self.0.get().cast()) }
        }
        unsafe fn unlock_shared(&self) {
            // SAFETY: as in `lock_shared`; the caller holds a shared lock.
            unsafe { cairn_rwlock_read_unlock(self.0.get().cast()) }
        }
        fn lock_exclusive(&self) {
            // SAFETY: as in `lock_shared`.
            unsafe { cairn_rwlock_write(self.0.get().cast()) }
        }
        fn try_lock_exclusive(&self) -> bool {
            // SAFETY: as in `lock_shared`.
            unsafe { cairn_rwlock_try_write(self.0.get().cast()) }
        }
        unsafe fn unlock_exclusive(&self) {
            // SAFETY: as in `lock_shared`; the caller holds the exclusive lock.
            unsafe { cairn_rwlock_write_unlock(self.0.get().cast()) }
        }
    }

    /// Wakes threads that wait for a condition to become true.
    #[derive(Default)]
    pub struct Signal {
        // The address is the wait key; the word itself is never read.
        key: UnsafeCell<u64>,
    }

    // SAFETY: only the address of `key` is used, as a key of the kernel's hashed wait queues.
    unsafe impl Sync for Signal {}

    extern "C" fn call<F: FnMut() -> bool>(context: *mut c_void) -> bool {
        // SAFETY: `wait_until` passes a pointer to its own `F`, which outlives the wait.
        let ready = unsafe { &mut *context.cast::<F>() };
        ready()
    }

    impl Signal {
        /// A signal nobody waits for.
        pub const fn new() -> Signal {
            Signal { key: UnsafeCell::new(0) }
        }

        /// Blocks until `ready` returns true. `ready` may read atomics and take leaf locks, and
        /// must not wait or notify.
        pub fn wait_until<F: FnMut() -> bool>(&self, mut ready: F) {
            // SAFETY: `ready` lives until the call returns; `call::<F>` matches its type.
            unsafe { cairn_wait_until(self.key.get(), call::<F>, (&raw mut ready).cast()) }
        }

        /// Makes every waiter look at its condition again. Call after changing what it reads.
        pub fn notify_all(&self) {
            // SAFETY: the address is only a key.
            unsafe { cairn_wake_all(self.key.get()) }
        }
    }
}

#[cfg(not(any(feature = "host", feature = "kernel")))]
mod raw {
    use core::sync::atomic::{AtomicU32, Ordering};
    use lock_api::GuardSend;

    const WRITER: u32 = u32::MAX;

    /// A lock that spins.
    pub struct RawMutex(AtomicU32);

    // SAFETY: one compare-and-swap winner at a time between lock and unlock.
    unsafe impl lock_api::RawMutex for RawMutex {
        #[expect(clippy::declare_interior_mutable_const, reason = "lock_api's initialiser pattern")]
        const INIT: RawMutex = RawMutex(AtomicU32::new(0));
        type GuardMarker = GuardSend;
        fn lock(&self) {
            while !self.try_lock() {
                core::hint::spin_loop();
            }
        }
        fn try_lock(&self) -> bool {
            self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        }
        unsafe fn unlock(&self) {
            self.0.store(0, Ordering::Release);
        }
    }

    /// A read-write lock that spins: the count of readers, or `WRITER`.
    pub struct RawRwLock(AtomicU32);

    // SAFETY: readers count up from zero and a writer moves zero to `WRITER`, each by one
    // compare-and-swap, so they exclude each other.
    unsafe impl lock_api::RawRwLock for RawRwLock {
        #[expect(clippy::declare_interior_mutable_const, reason = "lock_api's initialiser pattern")]
        const INIT: RawRwLock = RawRwLock(AtomicU32::new(0));
        type GuardMarker = GuardSend;
        fn lock_shared(&self) {
            while !self.try_lock_shared() {
                core::hint::spin_loop();
            }
        }
        fn try_lock_shared(&self) -> bool {
            let readers = self.0.load(Ordering::Relaxed);
            readers < WRITER - 1
                && self
                    .0
                    .compare_exchange(readers, readers + 1, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
        }
        unsafe fn unlock_shared(&self) {
            self.0.fetch_sub(1, Ordering::Release);
        }
        fn lock_exclusive(&self) {
            while !self.try_lock_exclusive() {
                core::hint::spin_loop();
            }
        }
        fn try_lock_exclusive(&self) -> bool {
            self.0.compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok()
        }
        unsafe fn unlock_exclusive(&self) {
            self.0.store(0, Ordering::Release);
        }
    }

    /// Wakes threads that wait for a condition to become true.
    #[derive(Default)]
    pub struct Signal;

    impl Signal {
        /// A signal nobody waits for.
        pub const fn new() -> Signal {
            Signal
        }

        /// Spins until `ready` returns true.
        pub fn wait_until(&self, mut ready: impl FnMut() -> bool) {
            while !ready() {
                core::hint::spin_loop();
            }
        }

        /// Nothing to do: waiters spin.
        pub fn notify_all(&self) {}
    }
}
