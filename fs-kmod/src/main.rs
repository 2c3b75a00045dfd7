//! cairn's kernel module.
//!
//! It links `fs-core` as it is and gives it its surroundings: a global allocator, locks and waiting
//! behind the symbols that `fs_core::sync` leaves to the module, and the platform traits over
//! kernel services. Nothing here knows the format.
//!
//! | module | gives |
//! | --- | --- |
//! | `kalloc` | Rust's global allocator |
//! | `klock` | the symbols of `fs_core::sync`, and waiting with a time limit |
//! | `kthread` | threads that can be joined, and `Workers` |
//! | `services` | `Clock`, `Entropy`, `Report` |
//! | `codecs` | the kernel's crc32c and zstd |
//! | `ram` | a device in memory |
//! | `stack` | how deep a stack got |
//! | `selftest` | what runs at load time with `selftest=1` |
//!
//! The module does not mount anything yet: there is no VFS glue. With `selftest=1` it tries all of
//! the above and the filesystem on a RAM device, and refuses to load when something is wrong.

extern crate alloc;

mod codecs;
mod kalloc;
mod klock;
mod kthread;
mod ram;
mod selftest;
mod services;
mod stack;
mod sys;

use kernel::prelude::*;

module! {
    type: Cairn,
    name: "cairn",
    authors: ["The cairn developers"],
    description: "The cairn filesystem",
    license: "Dual MIT/GPL",
    params: {
        selftest: bool {
            default: false,
            description: "Run the self-test while loading; fail to load when it fails",
        },
    },
}

struct Cairn;

impl kernel::Module for Cairn {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        if module_parameters::selftest.value() {
            selftest::run()?;
        }
        Ok(Cairn)
    }
}
