//! `cairn device`: devices are added, removed, replaced and resized.

use crate::arguments::{DeviceOf, DeviceVerb, OfPool};
use crate::info::of_target;
use crate::scrub::{clock, percent_bar};
use crate::target::{ask, ask_failed, Target};
use crate::versions::{open_degraded, utc};
use crate::{output, Done, Failure};
use cairn_host::admin::{DeviceChangeInfo, DeviceInfo, DeviceRequest, PoolInfo, Reply, Request};
use cairn_host::changes;
use cairn_host::mounts::Mount;
use cairn_host::parse::{format_size, parse_size};
use cairn_host::say;
use fs_core::engine::Engine;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn run(verb: &DeviceVerb) -> Result<Done, Failure> {
    match verb {
        DeviceVerb::Add { pool, devices, force } => {
            for device in devices {
                let path = absolute(device)?;
                change(pool, true, |_| {
                    Ok(DeviceRequest::Add { path: path.clone(), force: *force })
                })?;
            }
            Ok(Done::Whole)
        }
        DeviceVerb::Remove { of } => change(&of.pool, of.wait, |info| {
            Ok(DeviceRequest::Remove { index: find(info, &of.device)? })
        }),
        DeviceVerb::Replace { of, new, force } => {
            let path = absolute(new)?;
            change(&of.pool, of.wait, |info| {
                let index = find(info, &of.device)?;
                Ok(DeviceRequest::Replace { index, path: path.clone(), force: *force })
            })
        }
        DeviceVerb::Resize { of, size } => resize(of, size),
        DeviceVerb::Cancel { pool } => change(pool, false, |_| Ok(DeviceRequest::Cancel)),
        DeviceVerb::Status { of, wait } => status(of, *wait),
    }
}

fn resize(of: &DeviceOf, size: &str) -> Result<Done, Failure> {
    let bytes = match size {
        "max" => None,
        text => Some(parse_size(text).map_err(Failure::new)?),
    };
    change(&of.pool, of.wait, |info| {
        Ok(DeviceRequest::Resize { index: find(info, &of.device)?, bytes })
    })
}

/// The daemon may be in another directory.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    let canonical = path.canonicalize();
    canonical.map_err(|error| Failure::new(format_args!("{}: {error}", path.display())))
}

/// The device that a user names by its path, its index or its id.
fn find(info: &PoolInfo, name: &str) -> Result<u16, Failure> {
    let path = Path::new(name).canonicalize().ok();
    let is_meant = |device: &&DeviceInfo| {
        let own = Path::new(&device.name);
        device.name == name
            || device.id == name
            || name.parse() == Ok(device.index)
            || path.is_some() && own.canonicalize().ok() == path
    };
    let found = info.devices.iter().find(is_meant).map(|device| device.index);
    found.ok_or_else(|| {
        Failure::new(format_args!(
            "{name} is no device of the pool; cairn device status shows which there are"
        ))
    })
}

/// Has a change made, by the daemon of the mount, or here when the pool is not mounted.
fn change(
    pool: &Path,
    wait: bool,
    request: impl Fn(&PoolInfo) -> Result<DeviceRequest, Failure>,
) -> Result<Done, Failure> {
    let paths = [pool.to_path_buf()];
    let target = Target::find(&paths)?;
    match target {
        Target::Mounted(mount) => {
            let (info, _) = of_target(Target::Mounted(mount.clone()))?;
            let asked = Request::Device(request(&info)?);
            match ask(&mount, asked) {
                Ok(Reply::Changed) if wait => wait_for(&mount),
                Ok(Reply::Changed) => {
                    tell_running(&mount);
                    Ok(Done::Whole)
                }
                Ok(_) => Err(Failure::new("the daemon answered another question")),
                Err(error) => Err(ask_failed(&mount, &error)),
            }
        }
        Target::Devices(_) => {
            let (info, _) = of_target(Target::Devices(paths.to_vec()))?;
            let request = request(&info)?;
            let engine = open_degraded(&paths, changes::may_lack(&info, &request))?;
            let outcome = changes::carry_out(&engine, &request)
                .map_err(Failure::new)
                .and_then(|()| run_to_end(&engine));
            let closed = engine.close().map_err(Failure::new);
            outcome.and_then(|done| closed.map(|()| done))
        }
    }
}

fn tell_running(mount: &Mount) {
    let Ok((info, _)) = of_target(Target::Mounted(mount.clone())) else { return };
    if info.device_change.is_some_and(|change| change.state == "running") {
        say!("it goes on in the background; cairn device status shows how far it is");
    }
}

/// Waits until no change of a mounted pool is under way.
fn wait_for(mount: &Mount) -> Result<Done, Failure> {
    let bar = percent_bar(false);
    loop {
        let (info, _) = of_target(Target::Mounted(mount.clone()))?;
        let Some(change) = &info.device_change else { return Ok(Done::Whole) };
        if change.state != "running" {
            bar.finish_and_clear();
            return Ok(done_of(change));
        }
        if info.read_only {
            return Err(Failure::new("the pool is read-only: the change does not go on"));
        }
        show(&bar, change);
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until the change of a pool that is open here has ended.
fn run_to_end(engine: &Arc<Engine>) -> Result<Done, Failure> {
    let bar = percent_bar(false);
    loop {
        let Some(status) = engine.device_change() else { return Ok(Done::Whole) };
        let change = DeviceChangeInfo::of(&status);
        if change.state != "running" {
            bar.finish_and_clear();
            return Ok(done_of(&change));
        }
        engine.store.writable().map_err(Failure::new)?;
        show(&bar, &change);
        std::thread::sleep(LOOK_EVERY);
    }
}

fn show(bar: &indicatif::ProgressBar, change: &DeviceChangeInfo) {
    bar.set_length(change.total_bytes);
    bar.set_position(change.total_bytes - change.left_bytes.min(change.total_bytes));
    bar.set_message(change.waits_for.clone());
}

fn done_of(change: &DeviceChangeInfo) -> Done {
    match change.state.as_str() {
        "cancelled" => Done::Partly,
        _ => Done::Whole,
    }
}

fn status(of: &OfPool, wait: bool) -> Result<Done, Failure> {
    let target = Target::find(&of.pool)?;
    let done = match &target {
        Target::Mounted(mount) if wait => wait_for(mount)?,
        _ => Done::Whole,
    };
    let (info, whole) = of_target(target)?;
    if of.json {
        output::json(&(&info.devices, &info.device_change));
    } else {
        cairn_host::output::text(&table(&info));
    }
    Ok(if whole == Done::Whole { done } else { whole })
}

fn table(info: &PoolInfo) -> String {
    let mut text = String::new();
    let width = info.devices.iter().map(|d| d.name.chars().count()).max().unwrap_or(0).max(6);
    text.push_str(&format!(
        "{:>5}  {:<width$}  {:<8}  {:>9}  {:>9}\n",
        "index", "device", "state", "size", "allocated"
    ));
    for device in &info.devices {
        let allocated = device.allocated.map_or_else(|| "-".into(), format_size);
        text.push_str(&format!(
            "{:>5}  {:<width$}  {:<8}  {:>9}  {allocated:>9}\n",
            device.index,
            output::printable(&device.name),
            device.state.name(),
            format_size(device.bytes),
        ));
    }
    if let Some(change) = &info.device_change {
        text.push_str(&format!("{}\n", line(info, change)));
    }
    text
}

/// How a change stands, or how the last one ended.
pub(crate) fn line(info: &PoolInfo, change: &DeviceChangeInfo) -> String {
    let name = |index: u16| {
        let named = info.devices.iter().find(|device| device.index == index);
        named.map_or_else(|| format!("device {index}"), |device| output::printable(&device.name))
    };
    let device = name(change.device);
    let what = match change.kind.as_str() {
        "replace" => format!("replacement of {device} by {}", name(change.target.unwrap_or(0))),
        "shrink" => format!("shrinking of {device}"),
        _ => format!("removal of {device}"),
    };
    let seconds = change.ended.saturating_sub(change.began).max(0).unsigned_abs();
    match change.state.as_str() {
        "running" => {
            let [done, total] =
                [change.total_bytes.saturating_sub(change.left_bytes), change.total_bytes]
                    .map(format_size);
            let mut line =
                format!("{what} in progress since {}, {done} of {total} moved", utc(change.began));
            if info.read_only {
                line += "; it goes on when the pool is mounted for writing";
            } else if !change.waits_for.is_empty() {
                line += &format!("; it waits: {}", change.waits_for);
            }
            line
        }
        "cancelled" => format!("{what} cancelled on {}", utc(change.ended)),
        _ => format!("{what} finished in {} on {}", clock(seconds), utc(change.ended)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_path_index_or_id() {
        let mut info = PoolInfo::default();
        for (index, name) in [(0, "/dev/null"), (3, "/x/gone")] {
            let (name, id) = (name.to_string(), format!("id-{index}"));
            info.devices.push(DeviceInfo { index, name, id, ..DeviceInfo::default() });
        }
        for (name, want) in
            [("/dev/../dev/null", 0), ("0", 0), ("3", 3), ("id-3", 3), ("/x/gone", 3)]
        {
            assert_eq!(find(&info, name).ok(), Some(want), "{name}");
        }
        for name in ["1", "/dev/zero", ""] {
            assert!(find(&info, name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_line_says_how_a_change_stands() {
        let mut change = DeviceChangeInfo {
            kind: "replace".into(),
            state: "running".into(),
            device: 1,
            target: Some(2),
            began: 1_709_251_199,
            ended: 0,
            total_bytes: 40 << 30,
            left_bytes: 10 << 30,
            waits_for: String::new(),
        };
        let info = PoolInfo::default();
        assert_eq!(
            line(&info, &change),
            "replacement of device 1 by device 2 in progress since 2024-02-29 23:59:59, \
             30.0 GiB of 40.0 GiB moved"
        );
        (change.state, change.ended) = ("finished".into(), change.began + 61);
        assert!(line(&info, &change).contains("finished in 00:01:01"));
    }
}
