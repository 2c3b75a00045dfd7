//! User space's half of the platform boundary.
//!
//! The core asks six things of its surroundings; here they are for a Linux process:
//!
//! | trait | here |
//! | --- | --- |
//! | `Device` | [`FileDevice`]: a block device or image file, by `io_uring` or `preadv`/`pwritev` |
//! | `Clock` | [`HostClock`] |
//! | `Entropy` | [`HostEntropy`] |
//! | `Workers` | [`HostWorkers`]: a thread pool that grows while its jobs wait |
//! | `Codecs` | [`HostCodecs`]: libzstd, CRC32C and BLAKE3 by vector instructions |
//! | `Report` | [`LogReport`]: standard error or the system log |
//!
//! [`open_devices`] and [`host_platform`] put them together. The rest is what every command needs
//! besides: who else uses a device ([`mounts`]), what is on it already ([`probe`], [`stored`]),
//! where the other devices of its pool are ([`members`]), what `LABEL=` and `UUID=` name
//! ([`source`]), how sizes and ids are written ([`parse`]), how a command talks to the daemon of a
//! mounted pool ([`admin`]), what it may ask about subvolumes and snapshots ([`versions`],
//! [`properties`]), how they are sent and received ([`streams`]), how files come to share what is
//! equal ([`dedupe`]), and how it asks for free space to be discarded ([`trim`](trim())).
//!
//! A process that goes into the background forks first and calls these functions after: threads and
//! rings do not survive a fork, the device lock does.

pub mod admin;
pub mod changes;
mod codecs;
pub mod dedupe;
mod device;
pub mod members;
pub mod mounts;
pub mod output;
pub mod parse;
pub mod probe;
pub mod properties;
mod report;
pub mod source;
pub mod stored;
pub mod streams;
mod surroundings;
mod trim;
pub mod versions;
mod workers;

pub use codecs::HostCodecs;
pub use device::{
    create_image, open_devices, Access, FileDevice, IoMethod, OpenError, OpenOptions, Wait,
};
pub use report::{without_codes, LogReport, LogTarget, NoReport};
pub use surroundings::{FixedClock, HostClock, HostEntropy, SeededEntropy};
pub use trim::trim;
pub use workers::{at_start, HostWorkers};

use fs_core::platform::Platform;
use std::sync::Arc;

/// The surroundings of a pool in this process; incidents go to standard error. A caller that wants
/// another sink replaces `report`.
pub fn host_platform() -> Platform {
    Platform {
        clock: Arc::new(HostClock),
        entropy: Arc::new(HostEntropy),
        workers: Arc::new(HostWorkers::new()),
        codecs: Arc::new(HostCodecs::new()),
        report: Arc::new(LogReport::new("cairn", LogTarget::Stderr)),
    }
}
