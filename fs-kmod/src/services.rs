//! Time, randomness and reports.

use fs_core::error::Incident;
use fs_core::platform::{Clock, Entropy, Report, Timestamp};
use kernel::bindings as b;
use kernel::prelude::*;

/// The kernel's clocks.
pub(crate) struct KernelClock;

impl Clock for KernelClock {
    fn now(&self) -> Timestamp {
        let mut now = b::timespec64::default();
        // SAFETY: fills the structure it is given.
        unsafe { b::ktime_get_real_ts64(&mut now) };
        Timestamp { secs: now.tv_sec, nanos: now.tv_nsec as u32 }
    }

    fn uptime_ns(&self) -> u64 {
        // SAFETY: has no preconditions.
        unsafe { b::ktime_get() as u64 }
    }
}

/// The kernel's random number generator.
pub(crate) struct KernelEntropy;

impl Entropy for KernelEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        // SAFETY: writes exactly the bytes of the slice.
        unsafe { b::get_random_bytes(bytes.as_mut_ptr().cast(), bytes.len()) }
    }
}

/// Incidents go to the kernel log.
pub(crate) struct LogReport;

impl Report for LogReport {
    fn incident(&self, incident: &Incident) {
        match incident {
            Incident::Replayed { .. } | Incident::Scrubbed { lost: 0, .. } => {
                pr_info!("{}\n", format_args!("{incident}"));
            }
            _ => pr_err!("{}\n", format_args!("{incident}")),
        }
    }
}
