//! `mount.cairn`: mounts a cairn pool through FUSE. See `fs_fuse::command`.

use std::process::ExitCode;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc's `mi_option_e`: for how many milliseconds freed pages are
/// kept before the system gets them back.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

fn main() -> ExitCode {
    // The limits of cache and dirty data bound what is in use. Some milliseconds would spare
    // faulting in the buffers of each read anew, and on a busy machine break that bound.
    #[allow(unsafe_code, reason = "the allocator is set up through a C function")]
    // SAFETY: the function only needs that no other thread runs, and main starts with one.
    unsafe {
        libmimalloc_sys::mi_option_set_default(PURGE_DELAY, 0);
    }
    ExitCode::from(fs_fuse::command::run(std::env::args_os().skip(1), &fs_fuse::backend::open))
}
