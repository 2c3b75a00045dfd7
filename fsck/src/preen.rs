//! The look at boot: can the pool be opened?

use crate::{Arguments, ERRORS_LEFT, OPERATIONAL};
use cairn_host::say;
use cairn_host::{members, probe, stored, FileDevice};
use fs_core::platform::Device;
use std::sync::Arc;

/// Looks at labels and superblocks of each device; the exit code.
pub(crate) fn preen(devices: &[Arc<FileDevice>], arguments: &Arguments) -> u8 {
    if let Some(error) = members::split(devices) {
        // It cannot be mounted before somebody chooses, which the boot had better wait for.
        eprintln!("fsck.cairn: {}: {error}", arguments.device_names());
        return ERRORS_LEFT;
    }
    tell_missing(devices);
    devices.iter().fold(0, |code, device| code | preen_one(device, arguments))
}

/// Says which devices are missing or lack something. That is no error that a check could correct
/// or has to leave: mounting mends the one, and says what to do about the other. With an exit code
/// for it the system would not even try to mount at boot.
fn tell_missing(devices: &[Arc<FileDevice>]) {
    let labels: Vec<_> =
        devices.iter().filter_map(|device| members::read_label(device.path())).collect();
    let Some(newest) = labels.iter().max_by_key(|found| found.label.epoch) else { return };
    for (index, member) in newest.members.iter().enumerate().filter(|(_, m)| !m.is_vacant()) {
        let is_there = labels.iter().any(|found| found.label.device_id == member.id);
        let what = match (is_there, member.behind) {
            (false, _) => {
                "is missing; if it cannot be connected, mount the pool with the option degraded"
            }
            (true, 0) => continue,
            (true, _) => {
                "lacks something that was written without it; it is brought up to date while the \
                 pool is mounted"
            }
        };
        let pool = probe::label_name(&newest.label);
        let pool = pool.unwrap_or_else(|| devices[0].name().to_string());
        eprintln!("fsck.cairn: {pool}: device {index} {what}");
    }
}

fn preen_one(device: &FileDevice, arguments: &Arguments) -> u8 {
    let name = device.name();
    let areas = stored::read_areas(device);
    let Some(label) = stored::best_label(&areas) else {
        let reasons = areas.iter().filter_map(|area| area.label.as_ref().err());
        let worth_telling = reasons.into_iter().find(|e| **e != fs_core::error::Error::NotCairn);
        let reason = worth_telling.unwrap_or(&fs_core::error::Error::NotCairn);
        eprintln!("fsck.cairn: {name}: {reason}");
        return OPERATIONAL;
    };
    let (expected, found) = (label.device_bytes, device.geometry().bytes);
    if found < expected {
        eprintln!("fsck.cairn: {name}: {}", fs_core::error::Error::Truncated { expected, found });
        return ERRORS_LEFT;
    }
    let Some(superblock) = stored::newest_superblock(&areas) else {
        eprintln!("fsck.cairn: {name}: {}", fs_core::error::Error::NoSuperblock);
        return ERRORS_LEFT;
    };
    if areas.iter().any(|area| area.label.is_err()) || areas.len() < 2 {
        eprintln!("fsck.cairn: {name}: one of the two labels is damaged; the other serves");
    }
    let pool = probe::label_name(label).unwrap_or_else(|| name.to_string());
    let state = match superblock.clean {
        true => "clean",
        false => "was not unmounted; mounting it will bring it up to date",
    };
    if arguments.verbose > 0 || !superblock.clean {
        say!("{pool}: {state} (group {})", superblock.txg);
    } else {
        say!("{pool}: {state}");
    }
    0
}
