//! Labels and superblocks as they stand on a device, good or bad.
//!
//! Opening a pool takes the newest superblock and asks no more; commands that look at a device show
//! everything that is there.

use fs_core::buf::Buf;
use fs_core::error::Error;
use fs_core::format::label::{label_areas, ring_slot, Label, LABEL_AREA_0, RING_SLOTS};
use fs_core::format::superblock::Superblock;
use fs_core::platform::{Device, ReadOp};
use fs_core::units::{Physical, SECTOR_BYTES};

/// One label area of a device.
pub struct Area {
    /// Where it begins.
    pub at: Physical,
    /// Its label.
    pub label: Result<Box<Label>, Error>,
    /// Its ring of superblocks, by slot; `None` for a slot that was never written.
    pub ring: Vec<Option<Result<Superblock, Error>>>,
}

/// Reads both label areas. The second is where the first label says the device ends, or without it
/// where the device ends now; or where what is left of the first says, if one is there.
pub fn read_areas(device: &dyn Device) -> Vec<Area> {
    let first = read_area(device, Physical(LABEL_AREA_0));
    let bytes = first.label.as_ref().map_or(device.geometry().bytes, |label| label.device_bytes);
    let mut second = label_areas(bytes).map(|[_, second]| read_area(device, second));
    if first.label.is_err() && second.as_ref().is_none_or(|area| area.label.is_err()) {
        second = area_by_hint(device).or(second);
    }
    std::iter::once(first).chain(second).collect()
}

fn area_by_hint(device: &dyn Device) -> Option<Area> {
    let torn = read_sector(device, Physical(LABEL_AREA_0)).ok()?;
    let hint = Label::device_bytes_of(&torn).filter(|hint| *hint < device.geometry().bytes)?;
    let [_, second] = label_areas(hint)?;
    let area = read_area(device, second);
    let is_right = area.label.as_ref().is_ok_and(|label| label.device_bytes == hint);
    is_right.then_some(area)
}

/// The valid label of a device; of two, the one rewritten last.
pub fn best_label(areas: &[Area]) -> Option<&Label> {
    areas.iter().filter_map(|area| area.label.as_deref().ok()).max_by_key(|label| label.sequence)
}

/// The newest valid superblock of the pool whose label the device bears.
pub fn newest_superblock(areas: &[Area]) -> Option<&Superblock> {
    let pool = best_label(areas)?.pool_id;
    let valid = areas.iter().flat_map(|area| area.ring.iter().flatten().flatten());
    valid.filter(|superblock| superblock.pool_id == pool).max_by_key(|superblock| superblock.txg)
}

fn read_area(device: &dyn Device, at: Physical) -> Area {
    let label = read_sector(device, at).and_then(|bytes| Label::decode(&bytes).map(Box::new));
    let ring = (0..RING_SLOTS)
        .map(|slot| match read_sector(device, ring_slot(at, slot)) {
            Ok(bytes) if bytes.iter().all(|b| *b == 0) => None,
            Ok(bytes) => Some(Superblock::decode(&bytes)),
            Err(error) => Some(Err(error)),
        })
        .collect();
    Area { at, label, ring }
}

fn read_sector(device: &dyn Device, at: Physical) -> Result<Buf, Error> {
    let mut batch = [ReadOp { at, buf: Buf::zeroed(SECTOR_BYTES as usize)?, result: Ok(()) }];
    device.read(&mut batch);
    let [op] = batch;
    op.result.map(|()| op.buf).map_err(|cause| Error::Device { device: 0, at, cause })
}
