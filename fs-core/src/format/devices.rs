//! What is being done to the set of devices: value of the DEVICES property of the pool tree.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;

disk_struct! {
    /// Value of the DEVICES property.
    pub struct DeviceChangeItem [64] {
        /// 1 running, 2 finished, 3 cancelled.
        0x00 state: u8,
        /// 1 a device is removed, 2 it is replaced, 3 it is made smaller.
        0x01 kind: u8,
        /// Index of the device.
        0x02 device: u16,
        /// Replaced: index of the device in its place. Otherwise zero.
        0x04 target: u16,
        /// Reserved.
        0x06 reserved0: [u8; 2],
        /// Made smaller: its new size. Otherwise zero.
        0x08 bytes: u64,
        /// When it began, seconds since 1970.
        0x10 began: i64,
        /// When it ended; zero while it has not.
        0x18 ended: i64,
        /// Bytes of the device that chunks had in the way when it began.
        0x20 total_bytes: u64,
        /// Id of the device.
        0x28 id: [u8; 16],
        /// Reserved.
        0x38 reserved1: u64,
    }
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChangeKind {
    /// A device is removed.
    Remove,
    /// A device is replaced by another.
    Replace,
    /// A device is made smaller.
    Shrink,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChangeState {
    /// It is under way.
    Running,
    /// It is done.
    Finished,
    /// It was ended before it was done.
    Cancelled,
}

impl DeviceChangeItem {
    /// Reads the value.
    ///
    /// # Errors
    /// The rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<DeviceChangeItem, BadBytes> {
        rule(bytes.len() == DeviceChangeItem::BYTES, "device change of the wrong length")?;
        let item = <DeviceChangeItem as DiskField>::get(bytes);
        rule(
            item.reserved0 == [0; 2] && item.reserved1 == 0,
            "reserved field of a device change is not zero",
        )?;
        rule((1..=3).contains(&item.state), "device change in an unknown state")?;
        rule((1..=3).contains(&item.kind), "device change of an unknown kind")?;
        rule(item.kind == 2 || item.target == 0, "device change with a device too many")?;
        rule(item.kind == 3 || item.bytes == 0, "device change with a size")?;
        Ok(item)
    }

    /// What is done.
    pub fn kind(&self) -> DeviceChangeKind {
        match self.kind {
            1 => DeviceChangeKind::Remove,
            2 => DeviceChangeKind::Replace,
            _ => DeviceChangeKind::Shrink,
        }
    }

    /// How it stands.
    pub fn state(&self) -> DeviceChangeState {
        match self.state {
            1 => DeviceChangeState::Running,
            2 => DeviceChangeState::Finished,
            _ => DeviceChangeState::Cancelled,
        }
    }
}
