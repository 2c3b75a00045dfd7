//! What is kept of a scrub: how far it is, what it found, and how the last one ended.
//!
//! The value of the SCRUB property of the pool:
//!
//! ```text
//! ScrubItem | ScrubDevice of each device | ScrubSpan of each run of trees that were looked at
//! ```
//!
//! `engine::scrub` says what it is for.

use super::key::Key;
use super::label::DEVICES_MAX;
use super::{rule, BadBytes, DiskField, Skipped};
use crate::disk_struct;
use alloc::vec::Vec;

disk_struct! {
    /// Head of the SCRUB property.
    pub struct ScrubItem [256] {
        /// State: 1 running, 2 paused, 3 finished, 4 cancelled.
        0x00 state: u8,
        /// Number of `ScrubDevice` that follow.
        0x01 device_count: u8,
        /// Number of `ScrubSpan` that follow them.
        0x02 span_count: u16,
        /// Reserved.
        0x04 reserved0: [u8; 4],
        /// Bytes that it may look at in a second, one copy counted; 0 for any number.
        0x08 rate: u64,
        /// When it began, seconds since 1970.
        0x10 began: i64,
        /// When it ended, seconds since 1970; 0 while it has not.
        0x18 ended: i64,
        /// For how long it ran, in milliseconds.
        0x20 run_ms: u64,
        /// Group that was published when it began: blocks that are younger are passed over.
        0x28 first: u64,
        /// Bytes that were in use when it began, one copy counted.
        0x30 total_bytes: u64,
        /// Bytes that were looked at, one copy counted.
        0x38 done_bytes: u64,
        /// Blocks and extents of which no copy is good.
        0x40 lost_count: u64,
        /// Bytes of them, one copy counted.
        0x48 lost_bytes: u64,
        /// Tree in the middle of which it is; 0 between two.
        0x50 at_tree: u64,
        /// Group up to which that tree's content is that of another.
        0x58 at_since: u64,
        /// Key in it at which it goes on.
        0x60 at_key: [u8; 24],
        /// Of the last scrub that finished: when it began, seconds since 1970.
        0x78 last_began: i64,
        /// When it finished; 0 when none has.
        0x80 last_ended: i64,
        /// For how long it ran, in milliseconds.
        0x88 last_run_ms: u64,
        /// Bytes that it looked at, one copy counted.
        0x90 last_bytes: u64,
        /// Bad copies that it found.
        0x98 last_found: u64,
        /// Bytes of copies that it repaired.
        0xa0 last_repaired_bytes: u64,
        /// Blocks and extents of which no copy was good.
        0xa8 last_lost_count: u64,
        /// Bytes of them, one copy counted.
        0xb0 last_lost_bytes: u64,
        /// Nodes that are not younger are passed over: what they name was looked at.
        0xb8 since: u64,
        /// Group that was published when the pass began.
        0xc0 pass_txg: u64,
        /// Newest group that shared or moved file data.
        0xc8 shared_txg: u64,
        /// Reserved.
        0xd0 reserved: Skipped<48>,
    }
}

disk_struct! {
    /// What a scrub found on a device.
    pub struct ScrubDevice [32] {
        /// Copies that were bad or could not be read.
        0x00 found: u64,
        /// Bytes of copies that were repaired.
        0x08 repaired_bytes: u64,
        /// Bytes of copies of which no other was good either.
        0x10 lost_bytes: u64,
        /// Reserved.
        0x18 reserved: [u8; 8],
    }
}

disk_struct! {
    /// Trees that a scrub has looked at: all that there were with ids in a range.
    pub struct ScrubSpan [16] {
        /// The first id.
        0x00 first: u64,
        /// The last id.
        0x08 last: u64,
    }
}

impl Default for ScrubDevice {
    fn default() -> ScrubDevice {
        DiskField::get(&[0; ScrubDevice::BYTES])
    }
}

/// How a scrub stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubState {
    /// It goes on whenever the pool is open for writing.
    Running = 1,
    /// It waits until somebody lets it go on.
    Paused = 2,
    /// It has looked at everything.
    Finished = 3,
    /// Somebody ended it.
    Cancelled = 4,
}

impl ScrubState {
    fn from_raw(raw: u8) -> Option<ScrubState> {
        use ScrubState::{Cancelled, Finished, Paused, Running};
        [Running, Paused, Finished, Cancelled].into_iter().find(|state| *state as u8 == raw)
    }
}

/// Spans that are kept at most. What does not fit is looked at again.
pub const SPANS_MAX: usize = 96;

/// The SCRUB property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubRecord {
    /// Its head; the counts in it are those of the lists.
    pub item: ScrubItem,
    /// What was found on each device, by index.
    pub devices: Vec<ScrubDevice>,
    /// Trees that were looked at, ascending.
    pub spans: Vec<ScrubSpan>,
}

impl ScrubRecord {
    /// Reads the property.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<ScrubRecord, BadBytes> {
        rule(bytes.len() >= ScrubItem::BYTES, "scrub item too short")?;
        let (head, rest) = bytes.split_at(ScrubItem::BYTES);
        let item = <ScrubItem as DiskField>::get(head);
        rule(ScrubState::from_raw(item.state).is_some(), "scrub in no known state")?;
        rule(
            item.reserved0 == [0; 4] && item.reserved.is_zero(),
            "reserved field of a scrub is not zero",
        )?;
        rule((item.at_tree == 0) == (item.at_key == [0; 24]), "place of a scrub in no tree")?;
        rule(item.at_tree != 0 || item.at_since == 0, "place of a scrub in no tree")?;
        Key::decode(&item.at_key)?;
        let (devices, spans) = (usize::from(item.device_count), usize::from(item.span_count));
        rule(devices <= DEVICES_MAX && spans <= SPANS_MAX, "scrub with too many entries")?;
        let device_bytes = devices * ScrubDevice::BYTES;
        rule(rest.len() == device_bytes + spans * ScrubSpan::BYTES, "scrub of the wrong length")?;
        let (of_devices, of_spans) = rest.split_at(device_bytes);
        let mut record =
            ScrubRecord { item, devices: Vec::with_capacity(devices), spans: Vec::new() };
        for bytes in of_devices.chunks_exact(ScrubDevice::BYTES) {
            let device = <ScrubDevice as DiskField>::get(bytes);
            rule(device.reserved == [0; 8], "reserved field of a scrub is not zero")?;
            record.devices.push(device);
        }
        for bytes in of_spans.chunks_exact(ScrubSpan::BYTES) {
            let span = <ScrubSpan as DiskField>::get(bytes);
            let is_after = record.spans.last().is_none_or(|before| before.last < span.first);
            rule(is_after && span.first <= span.last, "spans of a scrub out of order")?;
            record.spans.push(span);
        }
        Ok(record)
    }

    /// The property as bytes.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.devices.len() <= DEVICES_MAX && self.spans.len() <= SPANS_MAX);
        let mut item = self.item;
        item.device_count = self.devices.len() as u8;
        item.span_count = self.spans.len() as u16;
        let mut bytes = item.to_bytes().to_vec();
        self.devices.iter().for_each(|device| bytes.extend_from_slice(&device.to_bytes()));
        self.spans.iter().for_each(|span| bytes.extend_from_slice(&span.to_bytes()));
        bytes
    }

    /// How it stands.
    pub fn state(&self) -> ScrubState {
        ScrubState::from_raw(self.item.state).unwrap_or(ScrubState::Cancelled)
    }

    /// Bad copies that were found on all devices.
    pub fn found(&self) -> u64 {
        self.devices.iter().fold(0, |sum, device| sum.saturating_add(device.found))
    }

    /// Bytes that were repaired on all devices.
    pub fn repaired_bytes(&self) -> u64 {
        self.devices.iter().fold(0, |sum, device| sum.saturating_add(device.repaired_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::node::VALUE_BYTES_MAX;
    use proptest::prelude::*;

    fn record(devices: usize, spans: &[(u64, u64)]) -> ScrubRecord {
        let mut item = <ScrubItem as DiskField>::get(&[0; ScrubItem::BYTES]);
        (item.state, item.device_count, item.span_count) = (2, devices as u8, spans.len() as u16);
        (item.at_tree, item.at_since) = (300, 7);
        Key::new(5, 0x20, 4096).encode(&mut item.at_key);
        let device =
            ScrubDevice { found: 3, repaired_bytes: 8192, lost_bytes: 0, reserved: [0; 8] };
        let spans = spans.iter().map(|(first, last)| ScrubSpan { first: *first, last: *last });
        ScrubRecord { item, devices: alloc::vec![device; devices], spans: spans.collect() }
    }

    #[test]
    fn a_scrub_of_the_largest_pool_fits_an_item_and_is_read_as_it_was_written() {
        let spans: Vec<(u64, u64)> = (0..SPANS_MAX as u64).map(|i| (i * 3, i * 3 + 1)).collect();
        let most = record(DEVICES_MAX, &spans);
        let bytes = most.encode();
        assert!(bytes.len() <= VALUE_BYTES_MAX);
        assert_eq!(ScrubRecord::decode(&bytes), Ok(most));
        let bad = record(1, &[(5, 9), (9, 12)]).encode();
        assert!(ScrubRecord::decode(&bad).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_written_again_as_they_were(
            at in 0usize..300, byte in any::<u8>(), cut in 0usize..340,
        ) {
            let mut bytes = record(2, &[(1, 5), (256, 256)]).encode();
            let len = bytes.len();
            bytes[at % len] = byte;
            if let Ok(record) = ScrubRecord::decode(&bytes) {
                prop_assert_eq!(record.encode(), bytes.clone());
            }
            if cut != len {
                bytes.resize(cut, 0);
                prop_assert!(ScrubRecord::decode(&bytes).is_err());
            }
        }
    }
}
