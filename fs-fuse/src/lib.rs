//! cairn's FUSE driver: a request of the kernel becomes a call of the core, its result a reply.
//!
//! ```text
//! kernel  --/dev/fuse-->  device  --bytes-->  request  --typed-->  ops  -->  dyn Filesystem
//!         <-------------          <--bytes--  reply    <--typed--       <--
//! ```
//!
//! | module | owns |
//! | --- | --- |
//! | [`wire`] | numbers and structures of the protocol |
//! | [`request`], [`reply`] | bytes to typed values, and back |
//! | [`ops`], `ioctl` | what each request means |
//! | `syncs` | changes that are carried out by a sync |
//! | `refused`, `asker` | how write(2) learns what WRITE was answered |
//! | [`device`] | threads, buffers, reading and writing /dev/fuse |
//! | `rings`, `ring` | the same over io_uring, where the kernel offers it |
//! | [`backend`], `admin` | the volume behind it; what it tells the `cairn` command |
//! | [`mount`], [`options`], [`command`] | mounting, and the program `mount.cairn` |
//! | [`noop`] | a filesystem without storage, for measurements |
//!
//! Only [`device`] and `rings` know how requests travel. Why the protocol is spoken directly and
//! not through a library, and what was observed of the kernel:
//! `docs/decisions/0001-fuse-transport.md`.
#![deny(unsafe_code)]

mod admin;
mod ahead;
mod asker;
pub mod backend;
pub mod command;
mod deference;
pub mod device;
mod fusermount;
mod ioctl;
pub mod log;
pub mod mount;
pub mod noop;
mod notify;
pub mod ops;
pub mod options;
mod refused;
pub mod reply;
pub mod request;
#[allow(unsafe_code, reason = "submissions name memory by address")]
mod ring;
mod rings;
mod syncs;
#[allow(unsafe_code, reason = "system calls without a safe wrapper")]
mod sys;
pub mod wire;
