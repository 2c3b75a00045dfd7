//! cairn's core: the whole filesystem behind a small platform boundary.
//!
//! The same code runs in the FUSE daemon, the kernel module, `mkfs`, `fsck`, the command line, the
//! simulator and the fuzzers. `docs/design.md` tells how it works; the module table below is the
//! way down. A module uses what is below it, never what is above.
//!
//! | module | owns |
//! | --- | --- |
//! | `vfs` | one method per operation |
//! | `receive` | subvolumes from streams |
//! | `check` | the checker |
//! | `stream` | comparing states of a subvolume; the identity of its content; streams |
//! | `engine` | open, commit, replay, close |
//! | `subvol` | inodes, directories, extents, attributes |
//! | `btree`, `intent` | the tree; the intent log |
//! | `txg` | transaction groups, dirty data, waiting |
//! | [`space`] | free space and reservations |
//! | [`pool`] | chunk map, verified reads, superblock ring |
//! | [`device`] | one member |
//! | [`codec`] | checksums and compression by kind |
//! | [`format`] | bytes on disk |
//! | [`platform`], [`sync`], [`error`], [`units`], [`buf`] | surroundings |
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "lock-ranks"))]
extern crate std;

/// Re-exported so that a kernel module links one `lock_api`.
pub use lock_api;

pub mod btree;
pub mod buf;
pub mod check;
pub mod codec;
pub mod device;
pub mod engine;
pub mod error;
pub mod format;
pub mod intent;
pub mod platform;
pub mod pool;
pub mod receive;
pub mod space;
pub mod stream;
pub mod subvol;
pub mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod txg;
pub mod units;
pub mod vfs;
