//! `mount.cairn`: mounts a cairn pool through FUSE. See `fs_fuse::command`.

use std::process::ExitCode;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ExitCode::from(fs_fuse::command::run(std::env::args_os().skip(1), &fs_fuse::backend::open))
}
