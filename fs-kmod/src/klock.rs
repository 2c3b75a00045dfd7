//! Locks and waiting for `fs_core::sync`.
//!
//! The core, built by cargo, cannot name kernel types: its locks are storage, and these are the
//! operations. The storage is all zeros when unlocked, which is what the kernel's `mutex` and
//! `rw_semaphore` are too, as long as no debugging option adds to them.
//!
//! Waiting uses the kernel's hashed wait queues with an address as the key. A waiter evaluates its
//! condition in the state "running" (`wait_woken` remembers a wake-up that comes meanwhile), so
//! that the condition may take a mutex.

use core::mem::MaybeUninit;
use core::sync::atomic::{fence, Ordering};
use kernel::bindings as b;
use kernel::ffi::{c_long, c_void};

#[cfg(any(
    CONFIG_DEBUG_LOCK_ALLOC,
    CONFIG_PREEMPT_RT,
    CONFIG_DEBUG_MUTEXES,
    CONFIG_DEBUG_RWSEMS,
    CONFIG_DEBUG_SPINLOCK
))]
compile_error!("an unlocked mutex or rw_semaphore is not all zeros in this kernel");

const _: () = assert!(size_of::<b::mutex>() <= 24 && align_of::<b::mutex>() <= 8);
const _: () = assert!(size_of::<b::rw_semaphore>() <= 32 && align_of::<b::rw_semaphore>() <= 8);

// SAFETY, for all of the functions below that take a lock: the core passes the storage of a live
// lock, which only these functions touch, and unlocks only what it has locked.

#[no_mangle]
unsafe extern "C" fn cairn_mutex_lock(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::mutex_lock(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_mutex_trylock(lock: *mut u64) -> bool {
    // SAFETY: see above.
    unsafe { b::mutex_trylock(lock.cast()) != 0 }
}

#[no_mangle]
unsafe extern "C" fn cairn_mutex_unlock(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::mutex_unlock(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_read(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::down_read(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_try_read(lock: *mut u64) -> bool {
    // SAFETY: see above.
    unsafe { b::down_read_trylock(lock.cast()) != 0 }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_read_unlock(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::up_read(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_write(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::down_write(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_try_write(lock: *mut u64) -> bool {
    // SAFETY: see above.
    unsafe { b::down_write_trylock(lock.cast()) != 0 }
}

#[no_mangle]
unsafe extern "C" fn cairn_rwlock_write_unlock(lock: *mut u64) {
    // SAFETY: see above.
    unsafe { b::up_write(lock.cast()) }
}

#[no_mangle]
unsafe extern "C" fn cairn_wait_until(
    key: *mut u64,
    ready: extern "C" fn(*mut c_void) -> bool,
    context: *mut c_void,
) {
    wait(key.cast(), Mood::Needed, None, || ready(context));
}

#[no_mangle]
unsafe extern "C" fn cairn_wake_all(key: *mut u64) {
    wake(key.cast());
}

/// How a sleeping thread is seen by the rest of the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Mood {
    /// Somebody needs the result: counts as load, and the kernel reports a wait of minutes.
    Needed,
    /// Nothing to do.
    Idle,
}

/// Sleeps until `ready` returns true or `ticks` have passed; tells whether it is ready.
///
/// `key` is only an address that waiters and wakers agree on; it is never followed.
pub(crate) fn wait(
    key: *mut c_void,
    mood: Mood,
    ticks: Option<c_long>,
    mut ready: impl FnMut() -> bool,
) -> bool {
    if ready() {
        return true;
    }
    let state = match mood {
        Mood::Needed => b::TASK_UNINTERRUPTIBLE,
        Mood::Idle => b::TASK_IDLE,
    };
    let mut left = ticks.unwrap_or(c_long::MAX);
    let mut entry = MaybeUninit::<b::wait_bit_queue_entry>::uninit();
    // SAFETY: the call initialises the entry; the function is the one for waits of this shape.
    let (queue, entry) = unsafe {
        b::init_wait_var_entry(entry.as_mut_ptr(), key, 0);
        let entry = &raw mut (*entry.as_mut_ptr()).wq_entry;
        (*entry).func = Some(b::woken_wake_bit_function);
        (b::__var_waitqueue(key), entry)
    };
    // SAFETY: the entry stays where it is until it is removed below.
    unsafe { b::add_wait_queue(queue, entry) };
    // A waker looks for waiters without a lock; pairs with the fence in `wake`.
    fence(Ordering::SeqCst);
    let is_ready = loop {
        if ready() {
            break true;
        }
        if left == 0 {
            break false;
        }
        // SAFETY: the entry is queued and belongs to this thread.
        left = unsafe { b::wait_woken(entry, state, left) };
    };
    // SAFETY: the entry was added to this queue.
    unsafe { b::remove_wait_queue(queue, entry) };
    is_ready
}

/// Makes every waiter for `key` look at its condition again.
pub(crate) fn wake(key: *mut c_void) {
    // The change that waiters look for comes before the look at who waits.
    fence(Ordering::SeqCst);
    // SAFETY: the address is only a key.
    unsafe { b::wake_up_var(key) }
}

/// Milliseconds in scheduler ticks, at least one.
pub(crate) fn ticks_of_ms(ms: u64) -> c_long {
    let ticks = ms.saturating_mul(u64::from(b::CONFIG_HZ)).div_ceil(1000);
    c_long::try_from(ticks).unwrap_or(c_long::MAX - 1).max(1)
}
