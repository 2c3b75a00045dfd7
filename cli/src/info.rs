//! `cairn info`.

use crate::arguments::Info;
use crate::target::{ask, ask_failed, daemon_gone, open_to_look, Target};
use crate::view::View;
use crate::{output, Done, Failure};
use cairn_host::admin::{
    AdminError, DeviceChangeInfo, DeviceInfo, DeviceState, PoolInfo, Reply, Request, ScrubInfo,
};
use cairn_host::parse::{format_size, format_uuid};
use cairn_host::{members, open_devices, probe, stored, Access, FileDevice, OpenOptions, Wait};
use fs_core::engine::{DeviceChangeStatus, ScrubStatus};
use fs_core::format::key::{kind, Key};
use fs_core::format::pool::property;
use fs_core::format::scrub::ScrubRecord;
use fs_core::format::superblock::Superblock;
use fs_core::format::FORMAT_VERSION;
use fs_core::platform::Device;
use fs_core::units::{TreeId, Txg};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What a pool says of itself, mounted or not.
pub(crate) fn of_target(target: Target) -> Result<(PoolInfo, Done), Failure> {
    match target {
        Target::Mounted(mount) => match ask(&mount, Request::Info) {
            Ok(Reply::Info(mut info)) => {
                info.is_split = is_half(&info);
                // Names of files are not for everybody.
                if info.damaged_count > 0 {
                    if let Ok(Reply::Damaged(files)) = ask(&mount, Request::Damaged) {
                        info.damaged = files;
                    }
                }
                Ok((info, Done::Whole))
            }
            Ok(_) => Err(Failure::new("the daemon answered another question")),
            Err(AdminError::NoDaemon) => {
                let gone = std::fs::metadata(&mount.mount_point).err();
                match gone.and_then(|error| daemon_gone(&mount.mount_point, &error)) {
                    Some(failure) => Err(failure),
                    // The kernel module has none; what it published last is on the device.
                    None => of_devices(&open_to_look(&[mount.source])?, None),
                }
            }
            Err(error) => Err(ask_failed(&mount, &error)),
        },
        Target::Devices(paths) => of_devices(&open_to_look(&paths)?, None),
    }
}

pub(crate) fn run(arguments: &Info) -> Result<Done, Failure> {
    let (info, done) = match (Target::find(&arguments.of.pool)?, arguments.txg) {
        (target, None) => of_target(target)?,
        (Target::Devices(paths), Some(txg)) => of_devices(&open_to_look(&paths)?, Some(Txg(txg)))?,
        (Target::Mounted(mount), Some(_)) => {
            return Err(Failure::new(format_args!(
                "{} is in use: of a pool that is mounted, cairn history shows older groups",
                mount.mount_point.display()
            )));
        }
    };
    if arguments.of.json {
        output::json(&info);
    } else {
        cairn_host::output::text(&table(&info));
    }
    Ok(done)
}

/// Whether a pool that is mounted without some of its devices goes its own way: they can be found,
/// and were written without those that are there. Only who may read devices finds that out.
fn is_half(info: &PoolInfo) -> bool {
    let is_there = |device: &&DeviceInfo| device.state != DeviceState::Missing;
    let there: Vec<PathBuf> =
        info.devices.iter().filter(is_there).map(|device| PathBuf::from(&device.name)).collect();
    if there.len() == info.devices.len() {
        return false;
    }
    let all = members::complete(&there);
    let wait = Wait { bound: Duration::ZERO, announce: &|_| {} };
    // Others write to them meanwhile; labels and superblocks are whole or not believed.
    let opened = open_devices(&all, OpenOptions::new(Access::Unlocked), &wait);
    all.len() > there.len() && opened.is_ok_and(|all| members::split(&all).is_some())
}

/// What labels and superblocks say, and the trees where they can be read; as group `txg` has it if
/// one is given.
fn of_devices(devices: &[Arc<FileDevice>], txg: Option<Txg>) -> Result<(PoolInfo, Done), Failure> {
    let mut info = PoolInfo { format_version: FORMAT_VERSION, ..PoolInfo::default() };
    let mut newest: Option<Superblock> = None;
    for device in devices {
        let areas = stored::read_areas(&**device);
        let label = stored::best_label(&areas)
            .ok_or_else(|| Failure::new(format_args!("{}: not a cairn pool", device.name())))?;
        info.name = probe::label_name(label).unwrap_or_default();
        info.id = format_uuid(&label.pool_id);
        info.devices.push(DeviceInfo {
            index: label.device_index,
            name: device.name().to_string(),
            id: format_uuid(&label.device_id),
            bytes: label.device_bytes,
            ..DeviceInfo::default()
        });
        let found = stored::newest_superblock(&areas).cloned();
        newest = newest.into_iter().chain(found).max_by_key(|superblock| superblock.txg);
    }
    let superblock =
        newest.ok_or_else(|| Failure::new("the label is there, but no superblock is valid"))?;
    fill_from_superblock(&mut info, &superblock);
    info.is_split = members::split(devices).is_some();
    if info.is_split {
        // There is no saying which trees are the pool's.
        info.devices.sort_by_key(|device| device.index);
        return Ok((info, Done::Whole));
    }
    let read = View::open(devices.to_vec(), txg).and_then(|view| {
        if txg.is_some() {
            fill_from_superblock(&mut info, &view.superblock);
        }
        fill_from_trees(&mut info, &view)
    });
    match read {
        Ok(()) => Ok((info, Done::Whole)),
        Err(error) if txg.is_some() => Err(Failure::new(error)),
        Err(error) => {
            eprintln!("cairn: the trees of the pool cannot be read: {error}");
            Ok((info, Done::Partly))
        }
    }
}

fn fill_from_superblock(info: &mut PoolInfo, superblock: &Superblock) {
    info.features = superblock.features;
    info.txg = superblock.txg.0;
    info.written = superblock.written;
    info.clean = superblock.clean;
    info.read_only = superblock.unknown_ro_compat() != 0;
    info.node_bytes = superblock.node_bytes;
    info.chunk_bytes = superblock.chunk_bytes;
    info.data_profile = superblock.data_profile.name().into();
    info.metadata_profile = superblock.metadata_profile.name().into();
    info.device_count = superblock.device_count;
}

fn fill_from_trees(info: &mut PoolInfo, view: &View) -> fs_core::platform::Result<()> {
    let chunks = view.pool.chunks();
    let members = view.pool.members();
    // One that was replaced has a label that says otherwise.
    info.devices.retain(|device| {
        members.get(usize::from(device.index)).is_some_and(|member| {
            !member.is_vacant() && format_uuid(&member.identity().device_id) == device.id
        })
    });
    for member in members.iter().filter(|member| !member.is_vacant()) {
        if info.devices.iter().all(|device| device.index != member.index()) {
            let identity = member.identity();
            info.devices.push(DeviceInfo {
                index: member.index(),
                name: member.name(),
                id: format_uuid(&identity.device_id),
                bytes: identity.bytes,
                ..DeviceInfo::default()
            });
        }
    }
    info.devices.sort_by_key(|device| device.index);
    info.device_count = info.devices.len() as u16;
    for device in &mut info.devices {
        let of_device = |stripe: &&fs_core::format::chunk::Stripe| stripe.device == device.index;
        let allocated = chunks
            .iter()
            .map(|chunk| {
                chunk.stripe_bytes() * chunk.stripes.iter().filter(of_device).count() as u64
            })
            .sum();
        device.allocated = Some(allocated);
        if let Some(member) = members.get(usize::from(device.index)) {
            let errors = member.errors();
            device.state = DeviceState::of(member.standing());
            device.read_errors = errors.read;
            device.write_errors = errors.write;
            device.checksum_errors = errors.checksum;
        }
    }
    let tree = view.tree(TreeId::POOL)?;
    let setting = |number| tree.lookup(view, &Key::new(0, kind::PROPERTY, number));
    if let Some(value) = setting(property::COMPRESSION)? {
        info.compression = compression_name(&value);
    }
    if let Some(value) = setting(property::CHECKSUM)? {
        let names = ["", "none", "crc32c", "blake3"];
        let name = value.first().and_then(|kind| names.get(usize::from(*kind)));
        info.checksum = (*name.unwrap_or(&"")).into();
    }
    if let Some(value) = setting(property::SCRUB)? {
        let record = ScrubRecord::decode(&value);
        info.scrub = record.ok().map(|record| Box::new(ScrubInfo::of(&ScrubStatus::of(&record))));
    }
    if let Some(value) = setting(property::DEVICES)? {
        let status = DeviceChangeStatus::stored(&view.pool, &value);
        info.device_change = status.map(|status| Box::new(DeviceChangeInfo::of(&status)));
    }
    Ok(())
}

/// Options of a mount as people read them: sizes with units.
fn mount_options(options: &[String]) -> String {
    let shown = |option: &String| {
        let size = option.split_once('=').filter(|(name, _)| matches!(*name, "cache" | "dirty"));
        let bytes = size.and_then(|(name, value)| Some((name, value.parse::<u64>().ok()?)));
        match bytes.filter(|(_, bytes)| bytes % (1 << 20) == 0) {
            Some((name, bytes)) => format!("{name}={}M", bytes >> 20),
            None => option.clone(),
        }
    };
    options.iter().map(shown).collect::<Vec<_>>().join(",")
}

/// A COMPRESSION property in words; empty when it is none that this build knows.
fn compression_name(value: &[u8]) -> String {
    match value {
        [1, ..] => "none".into(),
        [2, 0] | [2] => "zstd".into(),
        [2, level] => format!("zstd:{}", i8::from_le_bytes([*level])),
        _ => String::new(),
    }
}

fn table(info: &PoolInfo) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        if !value.is_empty() {
            text.push_str(&format!("{:<14}{}\n", format!("{name}:"), output::printable(value)));
        }
    };
    row("Pool", if info.name.is_empty() { "(no name)" } else { &info.name });
    row("UUID", &info.id);
    row("Format", &info.format_version.to_string());
    row("Group", &info.txg.to_string());
    let state = match (info.clean, info.read_only) {
        _ if info.has_stopped => "stopped by an error, read-only",
        (_, true) => "read-only",
        (true, _) => "clean",
        (false, _) => "in use, or not unmounted",
    };
    row("State", state);
    row("Mounted with", &mount_options(&info.mount_options));
    row("Profiles", &format!("data {}, metadata {}", info.data_profile, info.metadata_profile));
    row("Node size", &format_size(info.node_bytes.into()));
    row("Chunk size", &format_size(info.chunk_bytes));
    row("Checksum", &info.checksum);
    row("Compression", &info.compression);
    for device in &info.devices {
        let mut value = format!("{}, {}", device.name, format_size(device.bytes));
        if device.state != DeviceState::Online {
            value.push_str(&format!(", {}", device.state.name()));
        }
        if let Some(allocated) = device.allocated {
            value.push_str(&format!(", {} allocated", format_size(allocated)));
        }
        let counters = [
            (device.read_errors, "read"),
            (device.write_errors, "write"),
            (device.checksum_errors, "checksum"),
        ];
        for (count, what) in counters.into_iter().filter(|(count, _)| *count > 0) {
            value.push_str(&format!(", {count} {what} errors"));
        }
        row("Device", &value);
    }
    let missing = usize::from(info.device_count).saturating_sub(info.devices.len());
    if missing > 0 {
        row("Missing", &format!("{missing} of {} devices", info.device_count));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_named_by_kind_and_level() {
        assert_eq!(compression_name(&[1, 0]), "none");
        assert_eq!(compression_name(&[2, 0]), "zstd");
        assert_eq!(compression_name(&[2, 0xfb]), "zstd:-5");
        assert_eq!(compression_name(&[9, 0]), "");
        assert_eq!(compression_name(&[]), "");
    }

    #[test]
    fn options_of_a_mount_are_shown_as_they_are_given() {
        let options = ["subvol=/", "cache=134217728", "dirty=16777217", "commit=5"];
        let options = options.map(String::from);
        assert_eq!(mount_options(&options), "subvol=/,cache=128M,dirty=16777217,commit=5");
        let mut info = PoolInfo::default();
        assert!(!table(&info).contains("Mounted"));
        info.mount_options = vec!["subvol=home".into()];
        assert!(table(&info).contains("Mounted with: subvol=home\n"), "{}", table(&info));
    }

    #[test]
    fn the_table_shows_errors_and_missing_devices_only_when_there_are_any() {
        let mut info = PoolInfo { device_count: 1, ..PoolInfo::default() };
        info.devices.push(DeviceInfo { name: "/dev/x".into(), ..DeviceInfo::default() });
        assert!(!table(&info).contains("errors") && !table(&info).contains("Missing"));
        (info.devices[0].checksum_errors, info.device_count) = (3, 2);
        assert!(table(&info).contains("/dev/x, 0 B, 3 checksum errors\n"));
        assert!(table(&info).contains("Missing:      1 of 2 devices\n"));
    }
}
