//! `mount.cairn`: mounts a cairn pool through FUSE. See `fs_fuse::command`.

use std::process::ExitCode;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's `mi_option_e`: for how many milliseconds freed pages are
/// kept before the system gets them back.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Long enough for a buffer to be used again by the next request of a stream.
const PURGE_DELAY_MS: core::ffi::c_long = 10;

fn main() -> ExitCode {
    // Buffers of data come and go: were each given back at once, every block read or written would
    // be faulted in anew (reading is half as fast then). What is kept longer counts as memory of
    // the driver beside its cache and dirty data.
    #[allow(unsafe_code, reason = "the allocator is set up through a C function")]
    // SAFETY: the function only needs that no other thread runs, and main starts with one.
    unsafe {
        libmimalloc_sys::mi_option_set_default(PURGE_DELAY, PURGE_DELAY_MS);
    }
    ExitCode::from(fs_fuse::command::run(std::env::args_os().skip(1), &fs_fuse::backend::open))
}
