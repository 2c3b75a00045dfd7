//! `mount.cairn`: mounts a cairn pool through FUSE. See `fs_fuse::command`.

use std::process::ExitCode;

/// An allocator that takes each buffer of 16 KiB and more in pages of its own, and so can give it
/// back to the system when it is freed. One that cuts pages of some MiB into such buffers keeps
/// as much again as is in use.
#[global_allocator]
static GLOBAL: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What the allocator asks for how to behave, under the name under which it looks for that. The
/// limits of cache and dirty data bound what is in use, so what is free must go back to the system
/// soon: when it has been for 10 ms, which spares the next request most faults. A thread looks
/// which pages of its arena have been about every thousandth time that it allocates or frees; with
/// two arenas for all of them, none is left with free pages while others are busy. When all rest,
/// some of what is free may stay, within what was in use before. Threads keep no freed buffers for
/// themselves; and there are no huge pages, of which a part cannot be given back.
#[allow(unsafe_code, reason = "the allocator finds it by its name")]
// SAFETY: the allocator defines the symbol weakly, for programs to replace it, as a pointer to a C
// string; this one lives forever.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static CONFIGURATION: &std::ffi::c_char = {
    let text = c"narenas:2,dirty_decay_ms:10,muzzy_decay_ms:0,tcache_max:4096,thp:never";
    // SAFETY: it is not empty: at least the zero at its end is there.
    unsafe { &*text.as_ptr() }
};

fn main() -> ExitCode {
    ExitCode::from(fs_fuse::command::run(std::env::args_os().skip(1), &fs_fuse::backend::open))
}
