//! Rust's global allocator over `kvmalloc`, and the symbols rustc's allocator shim would add.
//!
//! Every allocation may sleep and must not enter a filesystem (`GFP_NOFS`). Small ones do not fail:
//! `Vec::push` and `Box::new` cannot report it, so the kernel is asked to wait for memory instead.
//! Large ones do fail: the core makes them with `try_reserve`, because their sizes come from disks
//! and users. A large allocation that is made the infallible way ends in `out_of_memory`.

use core::alloc::{GlobalAlloc, Layout};
use kernel::bindings as b;
use kernel::ffi::c_void;

/// Up to this size the kernel waits for memory rather than refuse.
const NOFAIL_BYTES: usize = 64 << 10;

/// `kvmalloc` refuses more with a warning in the log, so it is not asked.
const BYTES_MAX: usize = i32::MAX as usize;

const ZERO: b::gfp_t = 1 << b::___GFP_ZERO_BIT;
const NOFS: b::gfp_t =
    1 << b::___GFP_DIRECT_RECLAIM_BIT | 1 << b::___GFP_KSWAPD_RECLAIM_BIT | 1 << b::___GFP_IO_BIT;
const NOFAIL: b::gfp_t = 1 << b::___GFP_NOFAIL_BIT;
const NOWARN: b::gfp_t = 1 << b::___GFP_NOWARN_BIT;

struct KernelAllocator;

#[global_allocator]
static ALLOCATOR: KernelAllocator = KernelAllocator;

/// Grows, shrinks or, when `old` is null, makes an allocation. Null when there is no memory.
///
/// # Safety
/// `old` must be null or come from this allocator.
unsafe fn reallocate(old: *mut u8, bytes: usize, align: usize, extra: b::gfp_t) -> *mut u8 {
    // The kernel aligns an allocation only if its size is a multiple of the alignment.
    let Some(size) = bytes.checked_next_multiple_of(align) else {
        return core::ptr::null_mut();
    };
    if size > BYTES_MAX {
        return core::ptr::null_mut();
    }
    let patience = if size <= NOFAIL_BYTES { NOFAIL } else { NOWARN };
    // SAFETY: `old` is null or from this very function, by the caller's promise.
    unsafe {
        b::kvrealloc_node_align(
            old.cast_const().cast(),
            size,
            align as _,
            NOFS | patience | extra,
            b::NUMA_NO_NODE,
        )
        .cast()
    }
}

// SAFETY: `kvrealloc` gives memory of the wanted size and alignment that nobody else has, or null.
unsafe impl GlobalAlloc for KernelAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: null is allowed.
        unsafe { reallocate(core::ptr::null_mut(), layout.size(), layout.align(), 0) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: null is allowed.
        unsafe { reallocate(core::ptr::null_mut(), layout.size(), layout.align(), ZERO) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: `old` comes from this allocator, by the trait's contract.
        unsafe { reallocate(old, size, layout.align(), 0) }
    }

    unsafe fn dealloc(&self, old: *mut u8, _layout: Layout) {
        // SAFETY: `old` comes from this allocator, by the trait's contract.
        unsafe { b::kvfree(old.cast::<c_void>().cast_const()) }
    }
}

// What rustc generates when it links a program; a module is linked without it.
#[no_mangle]
static __rust_no_alloc_shim_is_unstable: u8 = 0;
#[no_mangle]
static __rust_alloc_error_handler_should_panic: u8 = 0;

#[export_name = "__rust_alloc_error_handler"]
fn out_of_memory(size: usize, align: usize) -> ! {
    panic!("no memory for {size} bytes aligned to {align}");
}
