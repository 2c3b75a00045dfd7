//! How much of its stack a thread really uses.
//!
//! A kernel stack has 16 KiB. The sizes of frames are checked when the module is built, but not the
//! calls through trait objects that stack them up. So the self-test paints the unused part of a
//! thread's stack before it does something, and looks afterwards how far the paint is gone.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use kernel::bindings as b;

/// Bytes of a stack on x86-64 without KASAN.
const STACK_BYTES: usize = 16 << 10;
/// The lowest bytes hold the kernel's mark against overflows.
const KEPT_BYTES: usize = 64;
/// Room for the frames of the painting function and what it calls.
const SLACK_BYTES: usize = 1024;
const PAINT: u64 = 0x7ca1_7ca1_7ca1_7ca1;

static IS_ON: AtomicBool = AtomicBool::new(false);
static DEEPEST: AtomicUsize = AtomicUsize::new(0);

/// Starts or ends watching the threads that are started from now on.
pub(crate) fn watch(is_on: bool) {
    IS_ON.store(is_on, Ordering::Relaxed);
}

/// The deepest use that was seen since the last call, in bytes.
pub(crate) fn take_deepest() -> usize {
    DEEPEST.swap(0, Ordering::Relaxed)
}

/// Runs a thread's closure, watched or not.
pub(crate) fn watched(main: impl FnOnce()) {
    if !IS_ON.load(Ordering::Relaxed) {
        return main();
    }
    let bottom = bottom();
    let here = (&raw const bottom).addr();
    // SAFETY: everything below this frame and the slack is unused stack of this thread. What an
    // interrupt puts there meanwhile is gone when it returns.
    unsafe { paint(bottom, here - SLACK_BYTES) };
    main();
    DEEPEST.fetch_max(used(bottom), Ordering::Relaxed);
}

/// The lowest usable address of this thread's stack.
fn bottom() -> usize {
    // SAFETY: the current task is alive, and its stack does not move.
    let stack = unsafe { (*b::get_current()).stack };
    stack.addr() + KEPT_BYTES
}

/// # Safety
/// Nothing between the two addresses may be in use.
#[inline(never)]
unsafe fn paint(from: usize, to: usize) {
    for at in (from..to).step_by(size_of::<u64>()) {
        // SAFETY: by the caller's promise.
        unsafe { core::ptr::with_exposed_provenance_mut::<u64>(at).write_volatile(PAINT) };
    }
}

#[inline(never)]
fn used(bottom: usize) -> usize {
    let top = bottom - KEPT_BYTES + STACK_BYTES;
    let mut at = bottom;
    // SAFETY: reads this thread's own stack.
    while at < top
        && unsafe { core::ptr::with_exposed_provenance::<u64>(at).read_volatile() } == PAINT
    {
        at += size_of::<u64>();
    }
    top - at
}
