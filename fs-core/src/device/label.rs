//! Reading and writing the labels of a device.

use super::Member;
use crate::buf::{Buf, Slice};
use crate::error::Error;
use crate::format::label::{
    decode_members, label_areas, Label, LabelMember, DATA_START, LABEL_AREA_0, LABEL_AREA_BYTES,
    LABEL_MAGIC, RING_OFFSET, VACANT_BYTES,
};
use crate::format::{DiskField, FORMAT_VERSION};
use crate::platform::{Device, DeviceRef, ReadOp, Result};
use crate::units::{align_down, Logical, Physical, Txg, SECTOR_BYTES};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// What a label says, without its padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Id of the pool.
    pub pool_id: [u8; 16],
    /// Id of the device.
    pub device_id: [u8; 16],
    /// Index of the device in the pool.
    pub index: u16,
    /// Usable bytes of the device.
    pub bytes: u64,
    /// Name of the pool, padded with zeros.
    pub name: [u8; 64],
    /// When the label was written, seconds since 1970.
    pub written: i64,
    /// Counts rewrites.
    pub sequence: u64,
    /// Counts changes of which devices are complete.
    pub epoch: u64,
    /// The devices of the pool, by index; empty in a pool that always had one.
    pub table: Vec<TableEntry>,
}

/// What a label says of one device of the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Id of the device.
    pub id: [u8; 16],
    /// Usable bytes of the device.
    pub bytes: u64,
    /// The group that was published when the device missed something first, if it is not complete.
    pub behind: Option<Txg>,
}

impl TableEntry {
    /// The entry of a place without a device.
    pub const VACANT: TableEntry = TableEntry { id: [0; 16], bytes: VACANT_BYTES, behind: None };

    /// Whether it is the place of a device that was removed.
    pub fn is_vacant(&self) -> bool {
        self.id == [0; 16]
    }

    fn from_raw(raw: &LabelMember) -> TableEntry {
        let behind = (raw.behind != 0).then_some(Txg(raw.behind));
        TableEntry { id: raw.id, bytes: raw.bytes, behind }
    }

    fn to_raw(self) -> LabelMember {
        let behind = self.behind.map_or(0, |txg| txg.0.max(1));
        LabelMember { id: self.id, bytes: self.bytes, behind, reserved: [0; 8] }
    }
}

impl Identity {
    fn from_label(label: &Label, members: &[LabelMember]) -> Identity {
        Identity {
            pool_id: label.pool_id,
            device_id: label.device_id,
            index: label.device_index,
            bytes: label.device_bytes,
            name: label.name,
            written: label.written,
            sequence: label.sequence,
            epoch: label.epoch,
            table: members.iter().map(TableEntry::from_raw).collect(),
        }
    }

    fn to_buf(&self) -> Result<Buf> {
        let mut buf = Buf::zeroed(Label::BYTES)?;
        let mut label = <Label as DiskField>::get(&buf);
        label.magic = LABEL_MAGIC;
        label.version = FORMAT_VERSION;
        label.sector_bytes = SECTOR_BYTES as u32;
        label.pool_id = self.pool_id;
        label.device_id = self.device_id;
        label.device_index = self.index;
        label.device_bytes = self.bytes;
        label.name = self.name;
        label.written = self.written;
        label.sequence = self.sequence;
        label.epoch = self.epoch;
        label.device_count = self.table.len() as u16;
        let members: Vec<LabelMember> = self.table.iter().map(|entry| entry.to_raw()).collect();
        buf.copy_from_slice(&label.encode(&members));
        Ok(buf)
    }

    fn same_device(&self, other: &Identity) -> bool {
        (self.pool_id, self.device_id, self.index) == (other.pool_id, other.device_id, other.index)
    }
}

/// What the labels of a device say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The newer of the valid labels.
    pub identity: Identity,
    /// Where the label areas are.
    pub areas: [Physical; 2],
    /// For each area, why its label is not the one above: damaged, unreadable or out of date. A
    /// writer should rewrite it.
    pub damaged: [Option<Error>; 2],
}

fn read_label(device: &dyn Device, position: u16, at: Physical) -> Result<Identity> {
    if at.0 + SECTOR_BYTES > device.geometry().bytes {
        return Err(Error::NotCairn);
    }
    let buf = Buf::zeroed(SECTOR_BYTES as usize)?;
    let mut batch = [ReadOp { at, buf, result: Ok(()) }];
    device.read(&mut batch);
    batch[0].result.map_err(|cause| Error::Device { device: position, at, cause })?;
    let label = Label::decode(&batch[0].buf)?;
    let members = decode_members(&label, &batch[0].buf).map_err(|bad| bad.at(Logical(0)))?;
    Ok(Identity::from_label(&label, &members))
}

/// Of two reasons not to open, the one that helps more.
fn better_reason(first: Error, second: Error) -> Error {
    let rank = |error: &Error| match error {
        Error::Version { .. } => 3,
        Error::Corrupt { .. } => 2,
        Error::Device { .. } | Error::Memory => 1,
        _ => 0,
    };
    if rank(&second) > rank(&first) {
        second
    } else {
        first
    }
}

/// Where the second label must be: the first knows how large the device was; without it, the
/// device's size is what there is to go by.
fn second_area(first: &Result<Identity>, device_bytes: u64) -> Result<Physical> {
    let bytes = match first {
        Ok(label) => fits(label, device_bytes)?.bytes,
        Err(_) => device_bytes,
    };
    label_areas(bytes).map(|areas| areas[1]).ok_or(Error::NotCairn)
}

/// The second label of a device that is larger than the pool takes it for, when the first is torn:
/// what is left of that may say where the second is, which then vouches for itself.
#[inline(never)]
fn second_by_hint(device: &dyn Device, position: u16) -> Option<(Identity, Physical)> {
    let buf = Buf::zeroed(SECTOR_BYTES as usize).ok()?;
    let mut batch = [ReadOp { at: Physical(LABEL_AREA_0), buf, result: Ok(()) }];
    device.read(&mut batch);
    batch[0].result.ok()?;
    let hint = Label::device_bytes_of(&batch[0].buf)?;
    let at = label_areas(hint).filter(|_| hint < device.geometry().bytes)?[1];
    let label = read_label(device, position, at).ok().filter(|label| label.bytes == hint)?;
    Some((label, at))
}

fn fits(label: &Identity, device_bytes: u64) -> Result<&Identity> {
    if label.bytes > device_bytes {
        return Err(Error::Truncated { expected: label.bytes, found: device_bytes });
    }
    Ok(label)
}

/// Reads both labels of a device. `position` names the device in errors while its index is not
/// known.
///
/// # Errors
/// [`Error::NotCairn`] when there is no valid label, [`Error::Truncated`] when the device is
/// smaller than it was, [`Error::Version`] when either label is of another version, and what the
/// device says when it cannot be read at all.
pub fn probe(device: &dyn Device, position: u16) -> Result<Probe> {
    let device_bytes = device.geometry().bytes;
    let first = read_label(device, position, Physical(LABEL_AREA_0));
    let second_at = second_area(&first, device_bytes)?;
    let second = read_label(device, position, second_at).and_then(|label| {
        let own = label_areas(label.bytes).map(|areas| areas[1]);
        fits(&label, device_bytes)?;
        // Found at the end of a device of another size: a copy of a part of some other device.
        (own == Some(second_at)).then_some(label).ok_or(Error::NotCairn)
    });
    let (second, second_at) = match (&first, second) {
        (Err(_), Err(error)) => match second_by_hint(device, position) {
            Some((label, at)) => (Ok(label), at),
            None => (Err(error), second_at),
        },
        (_, second) => (second, second_at),
    };
    // A label of another version is no damage, even if the other end is of ours: half an upgrade.
    for label in [&first, &second] {
        if let Err(Error::Version { found }) = label {
            return Err(Error::Version { found: *found });
        }
    }
    let out_of_date = Error::Corrupt { what: "label is out of date", addr: Logical(0) };
    let (identity, damaged) = match (first, second) {
        (Err(first), Err(second)) => return Err(better_reason(first, second)),
        (Ok(first), Err(second)) => (first, [None, Some(second)]),
        (Err(first), Ok(second)) => (second, [Some(first), None]),
        (Ok(first), Ok(second)) if first == second => (first, [None, None]),
        (Ok(first), Ok(second)) => {
            if first.same_device(&second) && second.sequence > first.sequence {
                (second, [Some(out_of_date), None])
            } else {
                (first, [None, Some(out_of_date)])
            }
        }
    };
    Ok(Probe { identity, areas: [Physical(LABEL_AREA_0), second_at], damaged })
}

/// Bytes zeroed in one write while wiping.
const WIPE_BYTES: u64 = 1 << 20;

impl Member {
    /// A device that is about to get its first label.
    ///
    /// # Errors
    /// [`Error::NotCairn`] when the device is too small to have two label areas.
    pub fn fresh(device: DeviceRef, identity: Identity) -> Result<Member> {
        let areas = label_areas(identity.bytes).ok_or(Error::NotCairn)?;
        Ok(Member::new(device, &Probe { identity, areas, damaged: [None, None] }))
    }

    /// Zeroes everything before the chunks and a megabyte at the end, and flushes: old labels and
    /// superblocks of cairn, and what other filesystems and volume managers would recognise.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`].
    pub fn wipe(&self) -> Result<()> {
        let end = self.areas()[1].0 + LABEL_AREA_BYTES;
        let tail = align_down(end.saturating_sub(WIPE_BYTES).max(DATA_START), SECTOR_BYTES);
        let zeros = Buf::zeroed(WIPE_BYTES as usize)?.into_slice();
        self.write_at(Physical(0), zeros.part(0, DATA_START as usize))?;
        self.write_at(Physical(tail), zeros.part(0, (end - tail) as usize))?;
        self.flush()
    }

    /// Writes the label as it is into both areas, durably.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`].
    pub fn write_labels(&self) -> Result<()> {
        let label = self.identity().to_buf()?.into_slice();
        match self.write_areas(&label)? {
            None => Ok(()),
            Some((_, error)) => Err(error),
        }
    }

    /// Changes what the label says and writes it, durably. The caller sees to it that nobody else
    /// does at the same time.
    ///
    /// An area that cannot be written is told, and the other serves. After an error nobody knows
    /// which of the two labels the device has, and the change is not known to the member: see
    /// [`Member::is_labelled`].
    ///
    /// # Errors
    /// [`Error::Device`] when neither area could be written, or not made durable;
    /// [`Error::Memory`].
    pub fn relabel(
        &self,
        written: i64,
        change: impl FnOnce(&mut Identity),
    ) -> Result<Option<(usize, Error)>> {
        let mut next = self.identity();
        change(&mut next);
        next.written = written;
        // Greater than what an attempt that failed may have left on the device.
        let more = |sequence: u64| Some(sequence.saturating_add(1));
        let before = self.sequence.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        next.sequence = before.unwrap_or_else(|same| same).saturating_add(1);
        let label = next.to_buf()?.into_slice();
        self.in_doubt.store(true, Ordering::Relaxed);
        let bad = self.write_areas(&label)?;
        *self.identity.lock() = next;
        self.in_doubt.store(false, Ordering::Relaxed);
        Ok(bad)
    }

    /// Moves the second area to where it is on a device of `bytes` bytes, durably, and changes what
    /// the label says. Nobody writes labels or superblocks meanwhile, and what comes between the
    /// place and the old one belongs to no chunk.
    ///
    /// The first label leads to the second; so until it is written, what it says holds.
    ///
    /// # Errors
    /// [`Error::Device`]; the device is as it was then, as far as the member knows.
    /// [`Error::Memory`].
    pub(crate) fn resize(
        &self,
        bytes: u64,
        written: i64,
        change: impl FnOnce(&mut Identity),
    ) -> Result<()> {
        let [first, second] = label_areas(bytes).ok_or(Error::NotCairn)?;
        let [_, old] = self.areas();
        let mut next = self.identity();
        change(&mut next);
        (next.bytes, next.written) = (bytes, written);
        next.sequence = self.sequence.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let label = next.to_buf()?.into_slice();
        let ring = self.ring_to_copy()?;
        self.write_at(Physical(second.0 + RING_OFFSET), ring.clone())?;
        self.write_at(second, label.clone())?;
        self.flush()?;
        self.in_doubt.store(true, Ordering::Relaxed);
        self.write_at(first, label)?;
        self.write_at(Physical(first.0 + RING_OFFSET), ring)?;
        self.flush()?;
        *self.identity.lock() = next;
        self.in_doubt.store(false, Ordering::Relaxed);
        // What the old area has left would be found at the end of the device, and for longer than
        // that belongs to the pool. If this fails, it is passed over as out of date.
        let old = old.0..old.0 + LABEL_AREA_BYTES;
        let stale = match second.0 < old.start {
            true => old.start.max(second.0 + LABEL_AREA_BYTES)..old.end,
            false => old.start..old.end.min(second.0),
        };
        if let Ok(zeros) = Buf::zeroed((stale.end - stale.start) as usize) {
            let at = Physical(stale.start);
            let _ = self.write_at(at, zeros.into_slice()).and_then(|()| self.flush());
        }
        Ok(())
    }

    /// Writes zeros over the labels and superblocks, durably.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`].
    pub(crate) fn wipe_labels(&self) -> Result<()> {
        let zeros = Buf::zeroed(LABEL_AREA_BYTES as usize)?.into_slice();
        let written = self.areas().map(|area| self.write_at(area, zeros.clone()));
        written.into_iter().collect::<Result<()>>()?;
        self.flush()
    }

    /// Whether the label on the device is known to have this epoch, table and name.
    pub fn is_labelled(&self, roll: &Identity) -> bool {
        let identity = self.identity.lock();
        !self.in_doubt.load(Ordering::Relaxed)
            && (identity.epoch, &identity.name) == (roll.epoch, &roll.name)
            && identity.table == roll.table
    }

    /// Whether a label that was read is the one that was written last.
    pub fn has_label(&self, found: &Identity) -> bool {
        *self.identity.lock() == *found
    }

    /// Writes a label into both areas, one after the other and a damaged one first: after a crash
    /// at any moment at least one is whole. Returns the area that could not be written, if the
    /// other could.
    fn write_areas(&self, label: &Slice) -> Result<Option<(usize, Error)>> {
        let areas = self.areas();
        let mut bad: Option<(usize, Error)> = None;
        let first = self.first_area.load(Ordering::Relaxed);
        for area in [first, 1 - first] {
            match self.write_at(areas[area], label.clone()) {
                Ok(()) => self.flush()?,
                Err(error) if bad.is_some() || error == Error::Memory => return Err(error),
                Err(error) => bad = Some((area, error)),
            }
        }
        if let Some((area, _)) = &bad {
            self.first_area.store(*area, Ordering::Relaxed);
        }
        Ok(bad)
    }
}
