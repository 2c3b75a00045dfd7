//! `cairn status`: whether pools are well.

use crate::arguments::Status;
use crate::device;
use crate::info::of_target;
use crate::scrub;
use crate::target::Target;
use crate::{output, Done, Failure};
use cairn_host::admin::{DeviceState, PoolInfo};
use cairn_host::mounts;
use cairn_host::parse::format_size;
use serde::Serialize;

/// A pool and whether it is well.
#[derive(Serialize)]
struct Row {
    state: &'static str,
    #[serde(flatten)]
    info: PoolInfo,
}

pub(crate) fn run(arguments: &Status) -> Result<Done, Failure> {
    let targets = match arguments.pool[..] {
        [] => {
            let mounts = mounts::mounts().map_err(Failure::new)?.into_iter();
            mounts.filter(mounts::Mount::is_cairn).map(Target::Mounted).collect()
        }
        _ => vec![Target::find(&arguments.pool)?],
    };
    let mut done = Done::Whole;
    let mut rows = Vec::new();
    let is_one = targets.len() == 1;
    for target in targets {
        let (info, whole) = match of_target(target) {
            Ok(found) => found,
            Err(failure) if is_one => return Err(failure),
            // The others are told of all the same.
            Err(failure) => {
                eprintln!("cairn: {failure}");
                done = Done::Attention;
                continue;
            }
        };
        if whole == Done::Partly {
            done = Done::Partly;
        }
        rows.push(Row { state: state_of(&info), info });
    }
    if done == Done::Whole && rows.iter().any(|row| !is_well(&row.info)) {
        done = Done::Attention;
    }
    rows.retain(|row| !arguments.unwell || !is_well(&row.info));
    if arguments.json {
        output::json(&rows);
    } else {
        let tables: Vec<String> = rows.iter().map(table).collect();
        cairn_host::output::text(&tables.join("\n"));
    }
    Ok(done)
}

fn errors(info: &PoolInfo) -> u64 {
    let devices = info.devices.iter();
    devices.map(|d| d.read_errors + d.write_errors + d.checksum_errors).sum()
}

fn is_well(info: &PoolInfo) -> bool {
    let has_lost = info.scrub.as_ref().is_some_and(|scrub| scrub.lost_count > 0);
    state_of(info) == "online" && errors(info) == 0 && info.damaged_count == 0 && !has_lost
}

fn state_of(info: &PoolInfo) -> &'static str {
    let has = |state| info.devices.iter().any(|device| device.state == state);
    if info.is_split {
        "split"
    } else if info.has_stopped {
        "stopped"
    } else if has(DeviceState::Missing) {
        "degraded"
    } else if has(DeviceState::Behind) {
        "resilvering"
    } else {
        "online"
    }
}

fn advice(info: &PoolInfo) -> Option<&'static str> {
    match state_of(info) {
        "split" => Some(
            "the pool was written in two halves that no longer belong together; disconnect the \
             half to give up, and mount the other with the option degraded",
        ),
        "stopped" => Some(
            "an error ended writing, which the log names; what was not synced before is lost, and \
             everything else can be read: unmount the pool, see to its devices, and mount it again",
        ),
        "degraded" => Some(
            "devices are missing or have failed; connect them, unmount the pool and mount it \
             again, or put others in their place with cairn device replace",
        ),
        "resilvering" if info.resilver.is_some_and(|resilver| resilver.waits) => Some(
            "something that a device lacks cannot be read, which is tried again; delete the files \
             that the log names, or connect the device that has them",
        ),
        "resilvering" => Some("a device that was away is brought up to date while mounted"),
        _ if info.damaged_count > 0 => Some(
            "files are damaged; restore them from a backup, delete snapshots that have the \
                 damage, and clear this with cairn clear",
        ),
        _ if info.scrub.as_ref().is_some_and(|scrub| scrub.lost_count > 0) => Some(
            "the scrub came upon damage without a good copy, and named the files in the log; \
             restore them from a backup, and begin another with cairn scrub start",
        ),
        _ if errors(info) > 0 => Some(
            "devices made errors; no file is known to be damaged, but a directory that cannot be \
             read hides what is in it: the log tells what was repaired and what was lost; look for \
             more with cairn scrub start, and clear the counts with cairn clear; a device whose \
             counts go on growing is failing",
        ),
        _ => None,
    }
}

fn table(row: &Row) -> String {
    let info = &row.info;
    let name = if info.name.is_empty() { &info.id } else { &info.name };
    let mut text = format!("  pool: {}\n state: {}\n", output::printable(name), row.state);
    if let Some(advice) = advice(info) {
        text.push_str(&format!("  note: {advice}\n"));
    }
    if let Some(resilver) = &info.resilver {
        let sizes = [resilver.done_bytes, resilver.total_bytes].map(format_size);
        let percent = resilver.done_bytes.saturating_mul(100) / resilver.total_bytes.max(1);
        text.push_str(&format!("  done: {} of {} compared ({percent}%)\n", sizes[0], sizes[1]));
    }
    if let Some(change) = &info.device_change {
        text.push_str(&format!("  move: {}\n", device::line(info, change)));
    }
    if let Some(scrub) = &info.scrub {
        scrub::lines(scrub, info).iter().for_each(|line| {
            text.push_str(&format!("  scan: {line}\n"));
        });
    }
    let width = info.devices.iter().map(|d| d.name.chars().count()).max().unwrap_or(0).max(6);
    let mut line = |name: &str, state: &str, counts: [&str; 3]| {
        let [read, write, sum] = counts;
        text.push_str(&format!("  {name:<width$}  {state:<8} {read:>6} {write:>6} {sum:>9}\n"));
    };
    line("device", "state", ["read", "write", "checksum"]);
    for device in &info.devices {
        let counts = [device.read_errors, device.write_errors, device.checksum_errors];
        let counts = counts.map(|count| count.to_string());
        let [read, write, sum] = &counts;
        line(&output::printable(&device.name), device.state.name(), [read, write, sum]);
    }
    if info.damaged_count > 0 {
        text.push_str(&format!("  damaged files: {}\n", info.damaged_count));
    }
    for file in &info.damaged {
        let path = output::printable(&file.path);
        // Damage of a tree says not which files it is.
        let text_of_inode = match file.ino {
            0 => String::new(),
            ino => format!(", inode {ino}"),
        };
        text.push_str(&format!("  {path} (subvolume {}{text_of_inode})\n", file.subvol));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_host::admin::{DamagedInfo, DeviceInfo, ResilverInfo};

    fn device(name: &str, state: DeviceState) -> DeviceInfo {
        DeviceInfo { name: name.into(), state, ..DeviceInfo::default() }
    }

    #[test]
    fn a_pool_is_well_when_all_devices_are_and_none_made_errors() {
        let mut info = PoolInfo { name: "tank".into(), ..PoolInfo::default() };
        info.devices = vec![device("/dev/a", DeviceState::Online)];
        assert!(is_well(&info));
        info.devices[0].checksum_errors = 2;
        assert!(!is_well(&info));
        info.devices[0].checksum_errors = 0;
        info.devices.push(device("/dev/bcd", DeviceState::Missing));
        let text = table(&Row { state: state_of(&info), info });
        let want = "  pool: tank\n state: degraded\n  note: devices are missing or have failed; \
                    connect them, unmount the pool and mount it again, or put others in their \
                    place with cairn device replace\n  \
                    device    state      read  write  checksum\n  \
                    /dev/a    online        0      0         0\n  \
                    /dev/bcd  missing       0      0         0\n";
        assert_eq!(text, want);
        let mut info = PoolInfo { name: "tank".into(), ..PoolInfo::default() };
        info.devices = vec![device("/dev/a", DeviceState::Behind)];
        let (done_bytes, total_bytes) = (3 << 20, 4 << 20);
        info.resilver = Some(ResilverInfo { done_bytes, total_bytes, waits: false });
        let text = table(&Row { state: state_of(&info), info });
        let file = DamagedInfo { subvol: 256, ino: 7, path: "/a/b".into() };
        let info = PoolInfo { damaged_count: 1, damaged: vec![file], ..PoolInfo::default() };
        assert!(!is_well(&info));
        let damaged = table(&Row { state: state_of(&info), info });
        assert!(damaged.contains("  damaged files: 1\n  /a/b (subvolume 256, inode 7)\n"));
        assert!(text.contains("  done: 3.00 MiB of 4.00 MiB compared (75%)\n"), "{text}");
    }
}
