//! What is shown of a scrub.

use crate::format::scrub::{ScrubDevice, ScrubRecord, ScrubState};
use alloc::vec::Vec;

/// How a scrub stands, or how it ended. Bytes count one copy, unless they are of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Whether it runs.
    pub state: ScrubState,
    /// Bytes it may look at in a second; 0 for any number.
    pub rate: u64,
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended; 0 while it has not.
    pub ended: i64,
    /// For how long it ran, in milliseconds.
    pub run_ms: u64,
    /// Bytes that were in use when it began.
    pub total_bytes: u64,
    /// Bytes that were looked at.
    pub done_bytes: u64,
    /// Copies that were bad or could not be read.
    pub found: u64,
    /// Bytes of copies that were repaired.
    pub repaired_bytes: u64,
    /// Blocks and extents without a good copy.
    pub lost_count: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// What was found on each device, by index.
    pub devices: Vec<ScrubDevice>,
    /// Bytes it looked at in a second lately; 0 when that is not known.
    pub bytes_per_second: u64,
    /// Seconds until it ends, if it goes on like that.
    pub seconds_left: Option<u64>,
    /// How the last one ended that looked at everything.
    pub last: Option<ScrubEnd>,
}

/// How a scrub ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubEnd {
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended.
    pub ended: i64,
    /// For how long it ran, in milliseconds.
    pub run_ms: u64,
    /// Bytes that it looked at.
    pub bytes: u64,
    /// Copies that were bad or could not be read.
    pub found: u64,
    /// Bytes of copies that were repaired.
    pub repaired_bytes: u64,
    /// Blocks and extents without a good copy.
    pub lost_count: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
}

/// Less than this says nothing about the speed, in nanoseconds.
const SPEED_NS_MIN: u64 = 500_000_000;

impl ScrubStatus {
    /// What is stored of it.
    pub fn of(record: &ScrubRecord) -> ScrubStatus {
        let item = &record.item;
        let last = ScrubEnd {
            began: item.last_began,
            ended: item.last_ended,
            run_ms: item.last_run_ms,
            bytes: item.last_bytes,
            found: item.last_found,
            repaired_bytes: item.last_repaired_bytes,
            lost_count: item.last_lost_count,
            lost_bytes: item.last_lost_bytes,
        };
        ScrubStatus {
            state: record.state(),
            rate: item.rate,
            began: item.began,
            ended: item.ended,
            run_ms: item.run_ms,
            total_bytes: item.total_bytes.max(item.done_bytes),
            done_bytes: item.done_bytes,
            found: record.found(),
            repaired_bytes: record.repaired_bytes(),
            lost_count: item.lost_count,
            lost_bytes: item.lost_bytes,
            devices: record.devices.clone(),
            bytes_per_second: 0,
            seconds_left: None,
            last: (item.last_ended != 0).then_some(last),
        }
    }

    /// Finds out the speed since a moment, or if that was just now, all the time that it ran.
    pub(super) fn set_speed(&mut self, (mark_ns, mark_bytes): (u64, u64), now_ns: u64) {
        let ns = now_ns.saturating_sub(mark_ns);
        let bytes = self.done_bytes.saturating_sub(mark_bytes);
        let (bytes, ms) = match ns >= SPEED_NS_MIN {
            true => (bytes, ns / 1_000_000),
            false => (self.done_bytes, self.run_ms),
        };
        self.bytes_per_second = per_second(bytes, ms);
        let left = self.total_bytes - self.done_bytes;
        self.seconds_left = left.checked_div(self.bytes_per_second);
    }
}

/// Without overflow, however many.
fn per_second(bytes: u64, ms: u64) -> u64 {
    match bytes.checked_mul(1000) {
        Some(scaled) => scaled.checked_div(ms).unwrap_or(0),
        None => bytes.checked_div(ms / 1000).unwrap_or(0),
    }
}
