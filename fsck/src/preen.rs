//! The look at boot: can the pool be opened?

use crate::{Arguments, ERRORS_LEFT, OPERATIONAL};
use cairn_host::{probe, stored, FileDevice};
use fs_core::platform::Device;
use std::sync::Arc;

/// Looks at labels and superblocks of each device; the exit code.
pub(crate) fn preen(devices: &[Arc<FileDevice>], arguments: &Arguments) -> u8 {
    devices.iter().fold(0, |code, device| code | preen_one(device, arguments))
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
        println!("{pool}: {state} (group {})", superblock.txg);
    } else {
        println!("{pool}: {state}");
    }
    0
}
