//! One member of a pool: its identity, its superblock ring, its error counters.
//!
//! A device carries two *label areas* (`format::label`), each with a label that says whose the
//! device is and a ring of superblocks. Both areas hold the same, so that one damaged end of a
//! device loses nothing.
//!
//! - [`probe`] reads the labels of a device that is not a member of anything yet.
//! - [`Member`] is a device after that: transfers through it are counted when they fail.
//! - `ring` reads and writes superblocks.
//!
//! What must never happen: both labels of a device being in an unfinished state at one moment, so
//! the second is written only after the first is durable. Superblocks need no such order: a group
//! writes its own slot, and the slot of the group before is whole.
//!
//! Retries of interrupted transfers are the platform device's business. A transfer that fails here
//! has failed.

mod label;
mod ring;
#[cfg(test)]
mod tests;

pub use label::{probe, Identity, Probe, TableEntry};
pub use ring::{choose, Refused, Ring};

use crate::buf::{Buf, Slice};
use crate::error::Error;
use crate::format::label::{label_areas, VACANT_BYTES};
use crate::platform::{Device, DeviceError, DeviceRef, Geometry, ReadOp, Result, WriteOp};
use crate::sync::{Mutex, Rank, RwLock};
use crate::units::Physical;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicU8, AtomicUsize, Ordering};

/// Errors of a device since they were last cleared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorCounts {
    /// Reads that failed.
    pub read: u64,
    /// Writes and flushes that failed.
    pub write: u64,
    /// Reads whose content was not what its parent vouches for.
    pub checksum: u64,
}

/// Whether a device has what the pool wrote to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// It has everything.
    Complete,
    /// It has just failed, and the other devices are about to learn that. It is not written to, and
    /// only read where no other can serve.
    Leaving,
    /// It has missed something. It is written to, but what it says is only believed when a checksum
    /// vouches for it, and nothing relies on it.
    Behind,
    /// It is missing, or has failed. It is not written to. What it still gives out is asked for
    /// only when no other device can serve, and only believed when a checksum vouches for it.
    Absent,
    /// The place of a device that was removed, or of one that may be added.
    Vacant,
}

/// The device in place of one that is missing.
struct Missing {
    name: String,
    bytes: u64,
}

impl Device for Missing {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.bytes, block_bytes: 512, discards: false, read_only: true }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        batch.iter_mut().for_each(|op| op.result = Err(DeviceError::Gone));
    }

    fn write(&self, batch: &mut [WriteOp]) {
        batch.iter_mut().for_each(|op| op.result = Err(DeviceError::Gone));
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Err(DeviceError::Gone)
    }

    fn discard(&self, _at: Physical, _bytes: u64) -> Result<(), DeviceError> {
        Err(DeviceError::Gone)
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// What became of bad copies on a device since the pool was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MendCounts {
    /// Copies that were written over with what they should be.
    pub mended: u64,
    /// Their bytes.
    pub mended_bytes: u64,
    /// Copies for which that failed.
    pub failed: u64,
}

#[derive(Default)]
struct Counters {
    read: AtomicU64,
    write: AtomicU64,
    checksum: AtomicU64,
}

#[derive(Default)]
struct MendCounters {
    mended: AtomicU64,
    mended_bytes: AtomicU64,
    failed: AtomicU64,
}

/// A device of an open pool, or the place of one.
pub struct Member {
    /// Changes only while the place is vacant. Leaf lock.
    device: RwLock<DeviceRef>,
    index: u16,
    /// What the labels say. Leaf lock.
    identity: Mutex<Identity>,
    /// The greatest sequence that a label on the device may have.
    sequence: AtomicU64,
    /// A label was being written, and nobody knows whether it was.
    in_doubt: AtomicBool,
    /// The area to write first when labels are rewritten: one whose label is not the only good one.
    first_area: AtomicUsize,
    errors: Counters,
    /// A [`Standing`].
    standing: AtomicU8,
    /// A transfer found the device gone: others are asked first.
    seems_gone: AtomicBool,
    /// How a flush failed. What was written before it may be lost, and the system need not say so
    /// again: the next flush may well succeed. Leaf lock.
    flush_failed: Mutex<Option<DeviceError>>,
    /// Writes and flushes that failed since the pool was opened.
    failures: AtomicU64,
    /// Bytes of reads under way.
    reading: AtomicU64,
    /// Transfers under way that somebody may wait for.
    awaited: AtomicU64,
    mends: MendCounters,
    /// There is no device.
    is_missing: AtomicBool,
}

impl Member {
    /// The device as a member of its pool.
    pub fn new(device: DeviceRef, probe: &Probe) -> Member {
        Member {
            device: RwLock::ranked(Rank::Leaf, device),
            index: probe.identity.index,
            first_area: AtomicUsize::new(usize::from(probe.damaged[1].is_some())),
            identity: Mutex::new(probe.identity.clone()),
            sequence: AtomicU64::new(probe.identity.sequence),
            in_doubt: AtomicBool::new(false),
            errors: Counters::default(),
            standing: AtomicU8::new(Standing::Complete as u8),
            seems_gone: AtomicBool::new(false),
            flush_failed: Mutex::new(None),
            failures: AtomicU64::new(0),
            reading: AtomicU64::new(0),
            awaited: AtomicU64::new(0),
            mends: MendCounters::default(),
            is_missing: AtomicBool::new(false),
        }
    }

    /// What stands for a device that is missing.
    ///
    /// # Errors
    /// [`Error::NotCairn`] for an identity that no device can have.
    pub fn missing(identity: Identity) -> Result<Member> {
        let name = format!("device {} (missing)", identity.index);
        let device = Arc::new(Missing { name, bytes: identity.bytes });
        let member = Member::fresh(device, identity)?;
        member.is_missing.store(true, Ordering::Relaxed);
        member.set_standing(Standing::Absent);
        Ok(member)
    }

    /// A place without a device, in the pool that `identity` is of.
    pub fn vacant(index: u16, identity: &Identity) -> Member {
        let device = Arc::new(Missing { name: format!("device {index} (none)"), bytes: 0 });
        let table = Vec::new();
        let identity =
            Identity { index, device_id: [0; 16], bytes: VACANT_BYTES, table, ..*identity };
        let areas = [Physical(0); 2];
        let member = Member::new(device, &Probe { identity, areas, damaged: [None, None] });
        member.is_missing.store(true, Ordering::Relaxed);
        member.set_standing(Standing::Vacant);
        member
    }

    /// Puts a device into a vacant place, which stays so until the pool relies on it.
    ///
    /// # Errors
    /// [`Error::NotCairn`] when the device is too small to have two label areas.
    ///
    /// # Panics
    /// When the place is not vacant.
    pub(crate) fn fill(&self, device: DeviceRef, identity: Identity) -> Result<()> {
        assert!(self.is_vacant(), "device {} has a place already", self.index);
        label_areas(identity.bytes).ok_or(Error::NotCairn)?;
        self.clear_errors();
        self.sequence.store(identity.sequence, Ordering::Relaxed);
        self.in_doubt.store(false, Ordering::Relaxed);
        self.first_area.store(0, Ordering::Relaxed);
        self.seems_gone.store(false, Ordering::Relaxed);
        *self.flush_failed.lock() = None;
        *self.identity.lock() = identity;
        *self.device.write() = device;
        self.is_missing.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Lets go of the device. Nobody reads or writes it any more.
    pub(crate) fn vacate(&self) {
        self.set_standing(Standing::Vacant);
        let mut identity = self.identity.lock();
        let none = Member::vacant(self.index, &identity);
        identity.clone_from(&none.identity.lock());
        *self.device.write() = none.device();
        self.is_missing.store(true, Ordering::Relaxed);
    }

    /// Whether there is no device, and none is missed.
    pub fn is_vacant(&self) -> bool {
        self.standing() == Standing::Vacant
    }

    /// Whether it has what the pool wrote to it.
    pub fn standing(&self) -> Standing {
        match self.standing.load(Ordering::Acquire) {
            0 => Standing::Complete,
            1 => Standing::Leaving,
            2 => Standing::Behind,
            3 => Standing::Absent,
            _ => Standing::Vacant,
        }
    }

    /// Changes the standing. Only the pool knows when.
    pub(crate) fn set_standing(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
    }

    /// Whether it has everything.
    pub fn is_complete(&self) -> bool {
        self.standing() == Standing::Complete
    }

    /// Whether it is read and written.
    pub fn is_there(&self) -> bool {
        matches!(self.standing(), Standing::Complete | Standing::Behind)
    }

    /// Whether it may be asked for something that no other device gives out.
    pub fn may_be_asked(&self) -> bool {
        !self.is_missing.load(Ordering::Relaxed) && !self.seems_gone()
    }

    /// Whether a transfer found that the device is gone.
    pub fn seems_gone(&self) -> bool {
        self.seems_gone.load(Ordering::Relaxed)
    }

    /// Bytes of reads under way.
    pub fn reading_bytes(&self) -> u64 {
        self.reading.load(Ordering::Relaxed)
    }

    /// Whether transfers are under way that somebody may wait for.
    pub fn is_busy(&self) -> bool {
        self.awaited.load(Ordering::Relaxed) > 0
    }

    /// What became of bad copies.
    pub fn mends(&self) -> MendCounts {
        MendCounts {
            mended: self.mends.mended.load(Ordering::Relaxed),
            mended_bytes: self.mends.mended_bytes.load(Ordering::Relaxed),
            failed: self.mends.failed.load(Ordering::Relaxed),
        }
    }

    /// Takes note that a bad copy of so many bytes was written over, or could not be.
    pub(crate) fn count_mend(&self, bytes: u64, is_done: bool) {
        let counters = &self.mends;
        if is_done {
            counters.mended.fetch_add(1, Ordering::Relaxed);
            counters.mended_bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            counters.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Index of the device in the pool.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// What the device's labels say.
    pub fn identity(&self) -> Identity {
        self.identity.lock().clone()
    }

    /// Usable bytes of the device; zero when there is none in this place.
    pub fn bytes(&self) -> u64 {
        match self.is_vacant() {
            true => 0,
            false => self.identity.lock().bytes,
        }
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        self.device.read().name().into()
    }

    /// The device itself.
    pub fn device(&self) -> DeviceRef {
        self.device.read().clone()
    }

    /// Where the label areas are.
    fn areas(&self) -> [Physical; 2] {
        label_areas(self.identity.lock().bytes).expect("a member is large enough for its labels")
    }

    /// Errors since they were last cleared.
    pub fn errors(&self) -> ErrorCounts {
        ErrorCounts {
            read: self.errors.read.load(Ordering::Relaxed),
            write: self.errors.write.load(Ordering::Relaxed),
            checksum: self.errors.checksum.load(Ordering::Relaxed),
        }
    }

    /// Writes and flushes that failed since the pool was opened, whatever was cleared meanwhile.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Counts errors anew from zero.
    pub fn clear_errors(&self) {
        for counter in [&self.errors.read, &self.errors.write, &self.errors.checksum] {
            counter.store(0, Ordering::Relaxed);
        }
    }

    fn count_failures(&self, count: u64) {
        self.failures.fetch_add(count, Ordering::Relaxed);
        self.add_errors(ErrorCounts { write: count, ..ErrorCounts::default() });
    }

    /// Adds errors counted in an earlier life of the pool.
    pub fn add_errors(&self, counts: ErrorCounts) {
        let add = |counter: &AtomicU64, count: u64| {
            // The stored count is untrusted: saturate.
            let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                Some(old.saturating_add(count))
            });
        };
        add(&self.errors.read, counts.read);
        add(&self.errors.write, counts.write);
        add(&self.errors.checksum, counts.checksum);
    }

    /// Counts a read whose content was wrong.
    pub fn count_checksum_error(&self) {
        self.add_errors(ErrorCounts { checksum: 1, ..ErrorCounts::default() });
    }

    /// The error for a transfer at `at` that failed. A refusal of memory says nothing about the
    /// device.
    pub fn error(&self, at: Physical, cause: DeviceError) -> Error {
        match cause {
            DeviceError::Memory => Error::Memory,
            cause => Error::Device { device: self.index, at, cause },
        }
    }

    /// Carries out a batch of reads and counts those that fail.
    pub fn read(&self, batch: &mut [ReadOp]) {
        self.awaited.fetch_add(1, Ordering::Relaxed);
        self.read_aside(batch);
        self.awaited.fetch_sub(1, Ordering::Relaxed);
    }

    /// As [`Member::read`], when nobody waits for it.
    pub fn read_aside(&self, batch: &mut [ReadOp]) {
        let bytes = batch.iter().map(|op| op.buf.len() as u64).sum();
        self.reading.fetch_add(bytes, Ordering::Relaxed);
        self.device().read(batch);
        self.reading.fetch_sub(bytes, Ordering::Relaxed);
        if batch.iter().any(|op| op.result == Err(DeviceError::Gone)) {
            self.seems_gone.store(true, Ordering::Relaxed);
        }
        let failed = batch.iter().filter(|op| counts_as_error(&op.result)).count() as u64;
        if failed > 0 {
            self.add_errors(ErrorCounts { read: failed, ..ErrorCounts::default() });
        }
    }

    /// Carries out a batch of writes and counts those that fail.
    ///
    /// # Errors
    /// The first failure; every write of the batch was tried.
    pub fn write(&self, batch: &mut [WriteOp]) -> Result<()> {
        self.awaited.fetch_add(1, Ordering::Relaxed);
        self.device().write(batch);
        self.awaited.fetch_sub(1, Ordering::Relaxed);
        let failed = batch.iter().filter(|op| counts_as_error(&op.result)).count() as u64;
        if failed > 0 {
            self.count_failures(failed);
        }
        batch.iter().try_for_each(|op| op.result.map_err(|cause| self.error(op.at, cause)))
    }

    /// Reads `bytes`, a multiple of the sector size, at `at`.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`].
    pub fn read_at(&self, at: Physical, bytes: usize) -> Result<Buf> {
        let mut batch = [ReadOp { at, buf: Buf::zeroed(bytes)?, result: Ok(()) }];
        self.read(&mut batch);
        let [op] = batch;
        op.result.map_err(|cause| self.error(at, cause))?;
        Ok(op.buf)
    }

    /// Writes `slice` at `at`.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`].
    pub fn write_at(&self, at: Physical, slice: Slice) -> Result<()> {
        self.write(&mut [WriteOp { at, bufs: vec![slice], result: Ok(()) }])
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// After an error nothing may be assumed about writes since the last flush that succeeded, and
    /// every later flush fails as well.
    pub fn flush(&self) -> Result<()> {
        if let Some(cause) = *self.flush_failed.lock() {
            return Err(self.error(Physical(0), cause));
        }
        self.device().flush().map_err(|cause| {
            if cause != DeviceError::Memory {
                self.flush_failed.lock().get_or_insert(cause);
                self.count_failures(1);
            }
            self.error(Physical(0), cause)
        })
    }

    /// Whether the device wants to know what holds nothing of value.
    pub fn discards(&self) -> bool {
        self.is_there() && self.device.read().geometry().discards
    }

    /// Tells the device that a range holds nothing of value, if it wants to know. Returns how many
    /// bytes it took notice of.
    ///
    /// # Errors
    /// [`Error::Device`]; nothing depends on a discard.
    pub fn discard(&self, at: Physical, bytes: u64) -> Result<u64> {
        if !self.discards() {
            return Ok(0);
        }
        self.device().discard(at, bytes).map_err(|cause| self.error(at, cause))?;
        Ok(bytes)
    }
}

fn counts_as_error(result: &Result<(), DeviceError>) -> bool {
    matches!(result, Err(cause) if *cause != DeviceError::Memory)
}
