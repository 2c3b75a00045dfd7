//! Devices that come, go, and change their size, while the pool is in use.
//!
//! The table in the labels says which devices there are, and the one of the greatest epoch counts.
//! So each change here is one change of the table, made durable label by label:
//!
//! ```text
//! add:    wiped -> its superblock -> its label, with the new table -> the labels of all others
//! resize: second area at the new end -> the first leads to it -> the labels of all others
//! drop:   nothing on it any more -> the labels of all others, without it -> its labels wiped
//! ```
//!
//! - Power may fail between any two of these. A device that was about to be added belongs to the
//!   pool from when its own label is whole: it is empty, and if the pool is opened without it, the
//!   others do not know of it and it is passed over later.
//! - How large a device is, its own label says; what the others say of that is only for when it is
//!   missing.
//! - One that is dropped is no longer in the table before its labels are wiped. Should they
//!   survive, it is found to be unknown to a newer table, and passed over.
//! - The place of a device that was dropped stays, *vacant*, since chunks name devices by index.
//!   The next device that is added gets it.

use super::{random_id, Pool};
use crate::device::{Identity, Standing, TableEntry};
use crate::error::Error;
use crate::format::chunk::CHUNK_BYTES_MIN;
use crate::format::label::{data_end, DATA_START, DEVICES_MAX, DEVICE_BYTES_MAX, LABEL_AREA_BYTES};
use crate::format::superblock::Superblock;
use crate::platform::{DeviceRef, Result};
use crate::units::{align_down, SECTOR_BYTES};
use alloc::boxed::Box;
use core::sync::atomic::Ordering;

/// The smallest device that can be added: one with room for a chunk.
pub const ADDED_BYTES_MIN: u64 =
    (DATA_START + CHUNK_BYTES_MIN + LABEL_AREA_BYTES).next_multiple_of(CHUNK_BYTES_MIN);

impl Pool {
    /// Adds a device; whatever it holds is gone. Returns its index. Nobody may write superblocks
    /// meanwhile; `superblock` is the one that is published. If it is `closed`, it gets no chunk
    /// before an eviction that has it for its target begins.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::TooSmall`]; [`Error::Argument`] when the pool has as many as
    /// it can have; those of the device, of which the pool is as before. When labels of others
    /// cannot be written, those of devices that cannot be done without.
    pub fn add_device(
        &self,
        device: DeviceRef,
        superblock: &Superblock,
        closed: bool,
    ) -> Result<u16> {
        self.check_writable()?;
        let geometry = device.geometry();
        if geometry.read_only {
            return Err(Error::ReadOnly);
        }
        if geometry.bytes < ADDED_BYTES_MIN {
            return Err(Error::TooSmall { minimum: ADDED_BYTES_MIN });
        }
        let bytes = align_down(geometry.bytes, SECTOR_BYTES).min(DEVICE_BYTES_MAX);
        // Nobody leaves a device behind meanwhile: its own label is to say what the others do.
        let mut place = Err(Error::Failed);
        self.change_after(|_| {
            place = self.label_added(device, bytes, superblock);
            place.clone().map(|_| ())
        })?;
        let index = place?;
        let mut ledger = self.ledger.lock();
        ledger.set_room(index, bytes);
        let bit = 1 << index;
        match closed {
            true => self.closed.fetch_or(bit, Ordering::AcqRel),
            false => self.closed.fetch_and(!bit, Ordering::AcqRel),
        };
        self.lost.fetch_and(!(1 << index), Ordering::AcqRel);
        self.place_of(index).set_standing(Standing::Complete);
        self.places.fetch_max(usize::from(index) + 1, Ordering::AcqRel);
        Ok(index)
    }

    /// Makes a device one of the pool, which the labels of the others do not say yet.
    #[inline(never)]
    fn label_added(&self, device: DeviceRef, bytes: u64, superblock: &Superblock) -> Result<u16> {
        let index = self.vacant_place()?;
        let entry = TableEntry { id: random_id(self.platform()), bytes, behind: None };
        let roll = self.roll_with(index, entry);
        let member = self.place_of(index);
        let written = self.platform().clock.now().secs;
        let identity = Identity {
            device_id: entry.id,
            index,
            bytes,
            written,
            sequence: 1,
            ..Identity::clone(&roll)
        };
        member.fill(device, identity)?;
        let labelled = member
            .wipe()
            .and_then(|()| member.complete_superblock(superblock))
            .and_then(|()| member.write_labels());
        if let Err(error) = labelled {
            // What it may have of a label would lead to nothing. Should that survive, it must not
            // count for more than what the others say next, nor for as much.
            let _ = member.wipe_labels();
            member.vacate();
            self.pass_over_epoch(&roll);
            return Err(error);
        }
        *self.roll.lock() = *roll;
        Ok(index)
    }

    /// No label of this opening gets the epoch of `tried`, and those there are get a greater one.
    #[inline(never)]
    fn pass_over_epoch(&self, tried: &Identity) {
        let mut roll = self.roll.lock();
        if roll.table.is_empty() {
            roll.table.extend(tried.table.first());
        }
        roll.epoch = roll.epoch.max(tried.epoch.saturating_add(1));
    }

    /// The first place without a device.
    fn vacant_place(&self) -> Result<u16> {
        let mut places = self.members.iter().take(DEVICES_MAX);
        let vacant = places.find(|member| member.is_vacant());
        let full = Error::Argument { what: "a pool has at most 64 devices" };
        vacant.map(crate::device::Member::index).ok_or(full)
    }

    /// What the labels say next: that a device, or none, is in a place.
    fn roll_with(&self, index: u16, entry: TableEntry) -> Box<Identity> {
        let mut roll = Box::new(self.roll.lock().clone());
        if roll.table.is_empty() {
            let Identity { device_id, bytes, .. } = self.members[0].identity();
            roll.table.push(TableEntry { id: device_id, bytes, behind: None });
        }
        let places = roll.table.len().max(usize::from(index) + 1);
        roll.table.resize(places, TableEntry::VACANT);
        roll.table[usize::from(index)] = entry;
        roll.epoch += 1;
        roll
    }

    /// Makes the pool use `bytes` of a device, which has as many, and nothing beyond them. Nobody
    /// may write superblocks meanwhile.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::TooSmall`]; [`Error::Truncated`] when the device is not so
    /// large; [`Error::Argument`] when it is not there or has chunks beyond; those of the device.
    pub fn resize_device(&self, index: u16, bytes: u64) -> Result<()> {
        self.check_writable()?;
        let member = self.place_of(index);
        let found = member.device().geometry().bytes;
        let bytes = align_down(bytes, SECTOR_BYTES);
        if !member.is_complete() {
            return Err(Error::Argument { what: "the device is missing, or lacks something" });
        }
        if bytes < ADDED_BYTES_MIN {
            return Err(Error::TooSmall { minimum: ADDED_BYTES_MIN });
        }
        if bytes > found {
            return Err(Error::Truncated { expected: bytes, found });
        }
        if bytes == member.bytes() {
            return Ok(());
        }
        {
            let room = &mut self.ledger.lock().rooms[usize::from(index)];
            if !room.is_free_from(data_end(bytes)) {
                return Err(Error::Argument { what: "the device has chunks beyond that size" });
            }
            room.set_limit(data_end(bytes));
        }
        let outcome = self.relabel_resized(index, bytes);
        // What the labels say now, whatever became of it.
        self.ledger.lock().rooms[usize::from(index)].set_bytes(member.bytes());
        outcome
    }

    #[inline(never)]
    fn relabel_resized(&self, index: u16, bytes: u64) -> Result<()> {
        let member = self.place_of(index);
        let written = self.platform().clock.now().secs;
        self.change_after(|_| {
            let mut roll = Box::new(self.roll.lock().clone());
            if roll.table.is_empty() {
                return member.resize(bytes, written, |_| {});
            }
            roll.table[usize::from(index)].bytes = bytes;
            roll.epoch += 1;
            member.resize(bytes, written, |identity| {
                identity.epoch = roll.epoch;
                identity.table.clone_from(&roll.table);
            })?;
            *self.roll.lock() = *roll;
            Ok(())
        })
    }

    /// Gives up a device that has no chunk, and wipes its labels. Nobody may write superblocks
    /// meanwhile, and that places may be vacant must be published.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::Argument`] when it has chunks; those of devices that cannot be
    /// done without.
    pub fn drop_device(&self, index: u16) -> Result<()> {
        self.check_writable()?;
        let member = self.place_of(index);
        {
            // No chunk comes to be on it from here on: nobody else looks at its room in between.
            let mut ledger = self.ledger.lock();
            let room = &mut ledger.rooms[usize::from(index)];
            if room.taken_bytes() > 0 {
                return Err(Error::Argument { what: "the device has chunks" });
            }
            room.set_limit(0);
            self.closed.fetch_or(1 << index, Ordering::AcqRel);
        }
        let is_there = member.is_there();
        self.change_after(|_| {
            // No label is written to it from here on.
            member.set_standing(Standing::Vacant);
            let roll = self.roll_with(index, TableEntry::VACANT);
            *self.roll.lock() = *roll;
            Ok(())
        })?;
        if is_there {
            // If that fails, the table of the others says that it is none of theirs.
            let _ = member.wipe_labels();
        }
        self.ledger.lock().set_room(index, 0);
        member.vacate();
        Ok(())
    }

    /// Whether a place has a device.
    pub fn has_device(&self, index: u16) -> bool {
        self.members().get(usize::from(index)).is_some_and(|member| !member.is_vacant())
    }

    /// How many places the table has.
    pub fn place_count(&self) -> u16 {
        u16::try_from(self.roll.lock().table.len().max(1)).unwrap_or(u16::MAX)
    }

    fn place_of(&self, index: u16) -> &crate::device::Member {
        &self.members[usize::from(index)]
    }
}
