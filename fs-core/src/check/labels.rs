//! Labels, and the copies of the superblock.

use super::findings::{rules, Findings};
use super::Spot;
use crate::device::{Member, Standing};
use crate::error::Error;
use crate::format::label::{label_areas, ring_slot};
use crate::format::superblock::Superblock;
use crate::platform::Result;
use crate::pool::Pool;
use crate::units::{Physical, SECTOR_BYTES};
use alloc::format;
use alloc::string::String;

/// Reports damaged labels, and copies of the superblock that are not what the chosen one is.
// Called once, and large when inlined: its frame is to be gone when the next part begins.
#[inline(never)]
pub(super) fn check(pool: &Pool, superblock: &Superblock, findings: &mut Findings) {
    for label in pool.damaged_labels() {
        let end = if label.area == 0 { "start" } else { "end" };
        let detail = detail(end, &label.error);
        let areas = pool.members().get(usize::from(label.device));
        let areas = areas.and_then(|member| label_areas(member.bytes()));
        let spot = match areas.and_then(|areas| areas.get(label.area).copied()) {
            Some(at) => Spot::NONE.copy(label.device, at),
            None => Spot::NONE,
        };
        findings.add(&rules::LABEL, spot, detail);
    }
    for member in pool.members() {
        let index = member.index();
        match member.standing() {
            Standing::Complete => {}
            Standing::Vacant => continue,
            Standing::Behind => {
                findings.add(&rules::DEVICE_BEHIND, Spot::NONE, format!("device {index}"));
                continue;
            }
            Standing::Absent | Standing::Leaving => {
                findings.add(&rules::DEVICE_MISSING, Spot::NONE, format!("device {index}"));
                continue;
            }
        }
        if pool.is_past() {
            // Its slot is the next to be written, and copies of it need not be all.
            continue;
        }
        let Some(areas) = label_areas(member.identity().bytes) else { continue };
        for (area, end) in areas.into_iter().zip(["start", "end"]) {
            let at = ring_slot(area, superblock.txg.0);
            if let Err(error) = check_copy(member, at, superblock) {
                let spot = Spot::NONE.copy(index, at);
                findings.add(&rules::SUPERBLOCK_COPY, spot, detail(end, &error));
            }
        }
    }
}

/// What is wrong with the one at an end of a device, and how that is mended.
fn detail(end: &str, error: &Error) -> String {
    let what = match error {
        Error::NotCairn => "is missing".into(),
        Error::NoSuperblock => "is out of date".into(),
        error => format!("cannot be used ({error})"),
    };
    format!("the one at the {end} {what}; mounting the pool for writing writes it anew")
}

// Decoding takes sectors on the stack: keep them out of the caller's frame.
#[inline(never)]
fn check_copy(member: &Member, at: Physical, superblock: &Superblock) -> Result<()> {
    let buf = member.read_at(at, SECTOR_BYTES as usize)?;
    match Superblock::decode(&buf)? == *superblock {
        true => Ok(()),
        false => Err(Error::NoSuperblock),
    }
}
