//! The look at boot: can the pool be opened?
//!
//! Labels and superblocks of each device are looked at by themselves. Then the pool is opened for
//! reading, without the log, as far as mounting it would: its tree, and the root directory of the
//! subvolume that is mounted. Everything else is for a check.

use crate::once::Turn;
use crate::{Arguments, ERRORS_LEFT, OPERATIONAL};
use cairn_host::say;
use cairn_host::{host_platform, members, probe, stored, FileDevice, NoReport};
use fs_core::engine;
use fs_core::error::Error;
use fs_core::format::pool::ROOT_INO;
use fs_core::format::superblock::Superblock;
use fs_core::platform::{Device, DeviceRef, Platform};
use fs_core::units::Ino;
use serde_json::json;
use std::fmt::Write as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

/// Memory for nodes while the pool is opened, in bytes.
const CACHE_BYTES: usize = 8 << 20;

/// What was seen.
#[derive(Default)]
struct Look {
    code: u8,
    /// What is to be told, in sentences.
    notes: Vec<String>,
    /// Name of the pool.
    pool: Option<String>,
    /// Its newest superblock.
    newest: Option<Superblock>,
}

impl Look {
    fn note(&mut self, code: u8, sentence: String) {
        self.code |= code;
        self.notes.push(sentence);
    }
}

/// Looks at labels and superblocks of each device; the exit code.
pub(crate) fn preen(devices: &[Arc<FileDevice>], arguments: &Arguments) -> u8 {
    let mut turn = turn(devices);
    if !arguments.json && turn.as_mut().is_some_and(Turn::was_taken) {
        say!("{}: was looked at a moment ago, and is as it was", arguments.device_names());
        return 0;
    }
    let mut look = Look::default();
    if let Some(error) = members::split(devices) {
        // It cannot be mounted before somebody chooses, which the boot had better wait for.
        look.note(ERRORS_LEFT, format!("{}: {error}", arguments.device_names()));
    } else {
        tell_missing(devices, &mut look);
        devices.iter().for_each(|device| preen_one(device, &mut look));
        if look.code == 0 {
            try_open(devices, arguments, &mut look);
        }
    }
    print(&look, arguments);
    if let Some(turn) = turn.filter(|_| look.code == 0) {
        turn.found_well();
    }
    look.code
}

/// Opens the pool as mounting it would, and tells why that cannot be.
fn try_open(devices: &[Arc<FileDevice>], arguments: &Arguments, look: &mut Look) {
    match open(devices) {
        // What is missing was told, and mounting says what to do.
        Ok(()) | Err(Error::MissingDevices { .. } | Error::OnlyBehind { .. }) => {}
        Err(error) => {
            let name = look.pool.clone().unwrap_or_else(|| arguments.device_names());
            let advice = match error.is_damage() {
                true => "; fsck.cairn -f tells what is damaged, cairn history what can be opened",
                false => "",
            };
            look.note(ERRORS_LEFT, format!("{name}: cannot be mounted: {error}{advice}"));
        }
    }
}

fn open(devices: &[Arc<FileDevice>]) -> Result<(), Error> {
    let options = engine::OpenOptions {
        read_only: true,
        ignore_log: true,
        degraded: true,
        cache_bytes: CACHE_BYTES,
        ..engine::OpenOptions::default()
    };
    let devices = devices.iter().map(|device| device.clone() as DeviceRef).collect();
    // What it meets on the way is in the outcome.
    let platform = Platform { report: Arc::new(NoReport), ..host_platform() };
    let engine = engine::open(devices, platform, &options)?;
    let outcome = match engine.default_subvol() {
        Some(subvol) => subvol.inode(Ino(ROOT_INO)).map(drop),
        None => Ok(()),
    };
    engine.close().and(outcome)
}

/// The right to look at the pool, if it is one.
fn turn(devices: &[Arc<FileDevice>]) -> Option<Turn> {
    let mut pool = None;
    let mut states: Vec<String> = Vec::new();
    for device in devices {
        let areas = stored::read_areas(&**device);
        let label = stored::best_label(&areas)?;
        pool = Some(label.pool_id);
        let superblock = stored::newest_superblock(&areas);
        let superblock = superblock.map(|superblock| (superblock.txg, superblock.clean));
        let areas = areas.iter().filter(|area| area.label.is_ok()).count();
        let mut state = format!("{:?} {} {areas}", label.device_id, label.sequence);
        let _ = write!(state, " {superblock:?} {}", device.geometry().bytes);
        let _ = write!(state, " {:?}", version_of(device.path()));
        states.push(state);
    }
    states.sort();
    Some(Turn::take(&pool?, states.join("\n")))
}

/// Tells one file or block device from another, and a file from what it was before it was written.
fn version_of(path: &Path) -> Option<String> {
    let data = path.metadata().ok()?;
    Some(match data.file_type().is_block_device() {
        true => format!("device {}", data.rdev()),
        false => {
            format!("file {} {} {}.{}", data.dev(), data.ino(), data.mtime(), data.mtime_nsec())
        }
    })
}

fn print(look: &Look, arguments: &Arguments) {
    look.notes.iter().for_each(|note| eprintln!("fsck.cairn: {note}"));
    let name = look.pool.clone().unwrap_or_else(|| arguments.device_names());
    let newest = look.newest.as_ref().filter(|_| look.code == 0);
    if arguments.json {
        say!(
            "{:#}",
            json!({
                "devices": arguments.device_names(),
                "pool": look.pool,
                "clean": look.code == 0,
                "closed": newest.map(|superblock| superblock.clean),
                "group": newest.map(|superblock| superblock.txg.0),
                "notes": look.notes,
            })
        );
        return;
    }
    let Some(superblock) = newest else { return };
    let state = match superblock.clean {
        true => "clean",
        false => "was not unmounted; mounting it will bring it up to date",
    };
    if arguments.verbose > 0 || !superblock.clean {
        say!("{name}: {state} (group {})", superblock.txg);
    } else {
        say!("{name}: {state}");
    }
}

/// Says which devices are missing or lack something. That is no error that a check could correct
/// or has to leave: mounting mends the one, and says what to do about the other. With an exit code
/// for it the system would not even try to mount at boot.
fn tell_missing(devices: &[Arc<FileDevice>], look: &mut Look) {
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
        look.note(0, format!("{pool}: device {index} {what}"));
    }
}

fn preen_one(device: &FileDevice, look: &mut Look) {
    let name = device.name();
    let areas = stored::read_areas(device);
    let Some(label) = stored::best_label(&areas) else {
        let reasons = areas.iter().filter_map(|area| area.label.as_ref().err());
        let worth_telling = reasons.into_iter().find(|e| **e != Error::NotCairn);
        let reason = worth_telling.unwrap_or(&Error::NotCairn);
        return look.note(OPERATIONAL, format!("{name}: {reason}"));
    };
    let (expected, found) = (label.device_bytes, device.geometry().bytes);
    if found < expected {
        let error = Error::Truncated { expected, found };
        return look.note(ERRORS_LEFT, format!("{name}: {error}"));
    }
    let Some(superblock) = stored::newest_superblock(&areas) else {
        return look.note(ERRORS_LEFT, format!("{name}: {}", Error::NoSuperblock));
    };
    if areas.iter().any(|area| area.label.is_err()) || areas.len() < 2 {
        look.note(0, format!("{name}: one of the two labels is damaged; the other serves"));
    }
    look.pool = look.pool.take().or_else(|| probe::label_name(label));
    if look.newest.as_ref().is_none_or(|newest| newest.txg < superblock.txg) {
        look.newest = Some(superblock.clone());
    }
}
