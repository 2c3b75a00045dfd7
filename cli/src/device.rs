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
            let request = request(&info)?;
            let asked = Asked::new(&request, &info);
            match ask(&mount, Request::Device(request)) {
                Ok(Reply::Changed) => {}
                Ok(_) => return Err(Failure::new("the daemon answered another question")),
                Err(error) => return Err(ask_failed(&mount, &error)),
            }
            let (info, _) = of_target(Target::Mounted(mount.clone()))?;
            let begun = info.device_change.as_deref().filter(|change| asked.is_begun_as(change));
            match begun {
                Some(change) if wait => wait_for(&mount, change, Some(&asked)),
                Some(change) if change.state == "running" => {
                    say!("it goes on in the background; cairn device status shows how far it is");
                    Ok(Done::Whole)
                }
                _ => Ok(Done::Whole),
            }
        }
        Target::Devices(_) => {
            let (info, _) = of_target(Target::Devices(paths.to_vec()))?;
            let request = request(&info)?;
            let asked = Asked::new(&request, &info);
            let engine = open_degraded(&paths, changes::may_lack(&info, &request))?;
            let outcome = changes::carry_out(&engine, &request)
                .map_err(Failure::new)
                .and_then(|()| run_to_end(&engine, &asked));
            let closed = engine.close().map_err(Failure::new);
            outcome.and_then(|done| closed.map(|()| done))
        }
    }
}

/// A change that was asked for, and how things were before.
struct Asked {
    kind: &'static str,
    index: u16,
    /// The id of the device, if it is to go.
    leaves: Option<String>,
    before: Option<DeviceChangeInfo>,
}

impl Asked {
    fn new(request: &DeviceRequest, info: &PoolInfo) -> Asked {
        let (kind, index) = match request {
            DeviceRequest::Remove { index } => ("remove", *index),
            DeviceRequest::Replace { index, .. } => ("replace", *index),
            DeviceRequest::Resize { index, .. } => ("shrink", *index),
            // These are done when they are answered.
            DeviceRequest::Add { .. } | DeviceRequest::Cancel => ("", 0),
        };
        let device = info.devices.iter().find(|device| device.index == index && kind != "shrink");
        let leaves = device.filter(|_| !kind.is_empty()).map(|device| device.id.clone());
        Asked { kind, index, leaves, before: info.device_change.as_deref().cloned() }
    }

    /// Whether this is the change that was asked for, and not one that the pool had before. One of
    /// the same device that is under way can be no other.
    fn is_begun_as(&self, change: &DeviceChangeInfo) -> bool {
        let is_kind = change.kind == self.kind && change.device == self.index;
        is_kind && (change.state == "running" || self.before.as_ref() != Some(change))
    }

    /// What is known of it when another has begun since.
    fn done_since(&self, info: &PoolInfo) -> Done {
        let is_there = |id: &String| info.devices.iter().any(|device| device.id == *id);
        match self.leaves.as_ref().is_some_and(is_there) {
            true => Done::Partly,
            false => Done::Whole,
        }
    }
}

/// Whether two reports are about one change.
fn is_one(a: &DeviceChangeInfo, b: &DeviceChangeInfo) -> bool {
    (&a.kind, a.device, a.target, a.began) == (&b.kind, b.device, b.target, b.began)
}

/// Waits until a change of a mounted pool has ended.
fn wait_for(
    mount: &Mount,
    which: &DeviceChangeInfo,
    asked: Option<&Asked>,
) -> Result<Done, Failure> {
    let bar = percent_bar(false);
    loop {
        let (info, _) = of_target(Target::Mounted(mount.clone()))?;
        let Some(change) = info.device_change.as_deref().filter(|change| is_one(change, which))
        else {
            bar.finish_and_clear();
            return Ok(asked.map_or(Done::Whole, |asked| asked.done_since(&info)));
        };
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

/// Waits until the change that was asked for of a pool that is open here has ended.
fn run_to_end(engine: &Arc<Engine>, asked: &Asked) -> Result<Done, Failure> {
    let bar = percent_bar(false);
    loop {
        let Some(status) = engine.device_change() else { return Ok(Done::Whole) };
        let change = DeviceChangeInfo::of(&status);
        if !asked.is_begun_as(&change) {
            return Ok(Done::Whole);
        }
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
        Target::Mounted(mount) if wait => wait_for_any(mount)?,
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

/// Waits for what is under way, if anything is. What ended before says nothing about now.
fn wait_for_any(mount: &Mount) -> Result<Done, Failure> {
    let (info, _) = of_target(Target::Mounted(mount.clone()))?;
    match info.device_change.as_deref().filter(|change| change.state == "running") {
        Some(change) => wait_for(mount, change, None),
        None => Ok(Done::Whole),
    }
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
    fn a_change_is_told_from_those_that_the_pool_had_before() {
        let former = DeviceChangeInfo {
            kind: "shrink".into(),
            state: "cancelled".into(),
            device: 1,
            began: 100,
            ended: 200,
            ..DeviceChangeInfo::default()
        };
        let device = |index, id: &str| DeviceInfo { index, id: id.into(), ..DeviceInfo::default() };
        let info = PoolInfo {
            device_change: Some(Box::new(former.clone())),
            devices: vec![device(0, "a"), device(1, "b")],
            ..PoolInfo::default()
        };
        // It has become larger, at once.
        let asked = Asked::new(&DeviceRequest::Resize { index: 1, bytes: None }, &info);
        assert!(!asked.is_begun_as(&former));
        let begun = DeviceChangeInfo { state: "running".into(), began: 300, ..former.clone() };
        assert!(asked.is_begun_as(&begun) && !is_one(&begun, &former));
        for request in [DeviceRequest::Cancel, DeviceRequest::Remove { index: 1 }] {
            assert!(!Asked::new(&request, &info).is_begun_as(&begun));
        }
        // It went, before anybody looked, and another began.
        let asked = Asked::new(&DeviceRequest::Remove { index: 0 }, &info);
        assert_eq!(asked.done_since(&info), Done::Partly);
        let after = PoolInfo { devices: vec![device(0, "c")], ..PoolInfo::default() };
        assert_eq!(asked.done_since(&after), Done::Whole);
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
