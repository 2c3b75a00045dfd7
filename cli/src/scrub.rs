//! `cairn scrub`: every copy of everything is read, and repaired.

use crate::arguments::{Scrub, ScrubOffline, ScrubVerb};
use crate::info::of_target;
use crate::target::{ask, ask_failed, Target};
use crate::versions::{open, utc};
use crate::{output, Done, Failure};
use cairn_host::admin::{
    DeviceState, PoolInfo, Reply, Request, ScrubChange, ScrubDeviceInfo, ScrubEndInfo, ScrubInfo,
};
use cairn_host::mounts::Mount;
use cairn_host::parse::format_size;
use cairn_host::say;
use fs_core::engine::Engine;
use fs_core::format::scrub::ScrubState;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn run(arguments: &Scrub) -> Result<Done, Failure> {
    match (&arguments.verb, &arguments.how) {
        (Some(verb), _) => online(verb),
        (None, Some(how)) => offline(how),
        (None, None) => Err(Failure::new("name the devices of the pool")),
    }
}

fn online(verb: &ScrubVerb) -> Result<Done, Failure> {
    match verb {
        ScrubVerb::Start { pool, wait, rate } => {
            let mount = change(pool, ScrubChange::Start { rate: rate.unwrap_or(0) })?;
            wait_if(*wait, &mount)
        }
        ScrubVerb::Pause { pool } => change(pool, ScrubChange::Pause).map(|_| Done::Whole),
        ScrubVerb::Resume { pool, wait, rate } => {
            let mount = change(pool, ScrubChange::Resume { rate: *rate })?;
            wait_if(*wait, &mount)
        }
        ScrubVerb::Cancel { pool } => change(pool, ScrubChange::Cancel).map(|_| Done::Whole),
        ScrubVerb::Status { of, wait } => status(&of.pool, *wait, of.json),
    }
}

fn change(pool: &[PathBuf], change: ScrubChange) -> Result<Mount, Failure> {
    let mount = match Target::find(pool)? {
        Target::Mounted(mount) => mount,
        Target::Devices(_) => {
            return Err(Failure::new(format_args!(
                "{} is not mounted; scrub it with cairn scrub --offline",
                pool[0].display()
            )))
        }
    };
    match ask(&mount, Request::Scrub(change)) {
        Ok(Reply::Changed) => Ok(mount),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(&mount, &error)),
    }
}

fn wait_if(wait: bool, mount: &Mount) -> Result<Done, Failure> {
    if !wait {
        return Ok(Done::Whole);
    }
    let (scrub, info) = wait_for(mount)?;
    lines(&scrub, &info).iter().for_each(|line| say!("{line}"));
    Ok(done_of(&scrub))
}

/// Waits until the scrub of a mounted pool does not run any more.
fn wait_for(mount: &Mount) -> Result<(ScrubInfo, Box<PoolInfo>), Failure> {
    let bar = Bar::new(false);
    loop {
        let info = match ask(mount, Request::Info) {
            Ok(Reply::Info(info)) => info,
            Ok(_) => return Err(Failure::new("the daemon answered another question")),
            Err(error) => return Err(ask_failed(mount, &error)),
        };
        let scrub = info.scrub.as_deref().cloned();
        let scrub = scrub.ok_or_else(|| Failure::new("the pool was never scrubbed"))?;
        if scrub.state != "running" {
            bar.finish();
            return Ok((scrub, Box::new(info)));
        }
        if info.read_only {
            return Err(Failure::new("the pool is read-only: the scrub does not go on"));
        }
        bar.show(&scrub);
        std::thread::sleep(LOOK_EVERY);
    }
}

fn status(pool: &[PathBuf], wait: bool, json: bool) -> Result<Done, Failure> {
    let target = Target::find(pool)?;
    if let (true, Target::Mounted(mount)) = (wait, &target) {
        wait_for(mount)?;
    }
    let (info, done) = of_target(target)?;
    match &info.scrub {
        _ if json => output::json(&info.scrub),
        None => say!("never scrubbed"),
        Some(scrub) => {
            lines(scrub, &info).iter().for_each(|line| say!("{line}"));
            for (index, device) in scrub.devices.iter().enumerate() {
                let named = info.devices.iter().find(|named| usize::from(named.index) == index);
                let name = named.map_or(format!("device {index}"), |d| output::printable(&d.name));
                say!("{name}: {}", device_line(device));
            }
        }
    }
    match (&info.scrub, done) {
        (Some(scrub), Done::Whole) if scrub.lost_count > 0 => Ok(Done::Attention),
        (_, done) => Ok(done),
    }
}

fn offline(arguments: &ScrubOffline) -> Result<Done, Failure> {
    let engine = open(&arguments.devices, false)?;
    let outcome = run_offline(&engine, arguments);
    let damaged = engine.damaged_files();
    let closed = engine.close().map_err(Failure::new);
    let scrub = outcome?;
    closed?;
    if arguments.json {
        output::json(&scrub);
    } else {
        lines(&scrub, &PoolInfo::default()).iter().for_each(|line| say!("{line}"));
        for file in damaged {
            let path = String::from_utf8_lossy(&file.path).into_owned();
            say!("damaged: {} (subvolume {})", output::printable(&path), file.tree);
        }
    }
    Ok(done_of(&scrub))
}

/// Scrubs an open pool: goes on with a scrub that was begun.
fn run_offline(engine: &Arc<Engine>, arguments: &ScrubOffline) -> Result<ScrubInfo, Failure> {
    let state = engine.scrub_status().map(|status| status.state);
    let begun = match state {
        Some(ScrubState::Running) => Ok(()),
        Some(ScrubState::Paused) => engine.resume_scrub(arguments.rate),
        _ => engine.start_scrub(arguments.rate.unwrap_or(0)),
    };
    begun.map_err(Failure::new)?;
    let bar = Bar::new(arguments.json);
    loop {
        let status = engine.scrub_status();
        let status = status.ok_or_else(|| Failure::new("the scrub is gone"))?;
        let scrub = ScrubInfo::of(&status);
        if status.state != ScrubState::Running {
            bar.finish();
            return Ok(scrub);
        }
        engine.store.writable().map_err(Failure::new)?;
        bar.show(&scrub);
        std::thread::sleep(LOOK_EVERY);
    }
}

fn done_of(scrub: &ScrubInfo) -> Done {
    match scrub.state.as_str() {
        "finished" if scrub.lost_count == 0 => Done::Whole,
        "finished" => Done::Attention,
        _ => Done::Partly,
    }
}

/// A bar, if standard error is a terminal.
struct Bar(ProgressBar);

/// A bar that shows how far something is, if standard error is a terminal.
pub(crate) fn percent_bar(is_hidden: bool) -> ProgressBar {
    Bar::new(is_hidden).0
}

impl Bar {
    fn new(is_hidden: bool) -> Bar {
        let bar = match is_hidden {
            true => ProgressBar::hidden(),
            false => ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()),
        };
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {percent}% {msg}") {
            bar.set_style(style);
        }
        Bar(bar)
    }

    fn show(&self, scrub: &ScrubInfo) {
        self.0.set_length(scrub.total_bytes);
        self.0.set_position(scrub.done_bytes);
        self.0.set_message(match scrub.seconds_left {
            Some(left) => {
                format!("{}/s, {} to go", format_size(scrub.bytes_per_second), clock(left))
            }
            None => String::new(),
        });
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// Hours, minutes and seconds.
pub(crate) fn clock(seconds: u64) -> String {
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    let (hours, minutes) = (minutes / 60, minutes % 60);
    match hours / 24 {
        0 => format!("{hours:02}:{minutes:02}:{seconds:02}"),
        days => format!("{days} days {:02}:{minutes:02}:{seconds:02}", hours % 24),
    }
}

/// How it stands, and if it has not ended, how the one before did; and what it has no look at.
pub(crate) fn lines(scrub: &ScrubInfo, info: &PoolInfo) -> Vec<String> {
    let [done, total, repaired] =
        [scrub.done_bytes, scrub.total_bytes, scrub.repaired_bytes].map(format_size);
    let errors = errors(scrub.lost_count);
    let mut lines = Vec::new();
    match scrub.state.as_str() {
        "running" => {
            let began = utc(scrub.began);
            let mut line = format!("scrub in progress since {began}, {done} of {total} scanned");
            if scrub.bytes_per_second > 0 {
                line += &format!(" at {}/s", format_size(scrub.bytes_per_second));
            }
            line += &format!(", {repaired} repaired, {errors}");
            match scrub.seconds_left {
                _ if info.read_only => line += "; it goes on when the pool is mounted for writing",
                Some(left) => line += &format!(", {} to go", clock(left)),
                None => {}
            }
            lines.push(line);
        }
        "paused" => lines.push(format!(
            "scrub paused, begun {}, {done} of {total} scanned, {repaired} repaired, {errors}; \
             cairn scrub resume lets it go on",
            utc(scrub.began)
        )),
        "cancelled" => lines.push(format!(
            "scrub cancelled on {}, {done} of {total} scanned, {repaired} repaired, {errors}",
            utc(scrub.ended)
        )),
        _ => {}
    }
    if let Some(last) = &scrub.last {
        lines.push(end_line(last));
    }
    lines.extend(not_looked_at(info));
    lines
}

/// Which devices a scrub cannot look at now.
fn not_looked_at(info: &PoolInfo) -> Option<String> {
    let missing = info.devices.iter().filter(|device| device.state == DeviceState::Missing);
    let names: Vec<String> = missing.map(|device| output::printable(&device.name)).collect();
    let is_any = !names.is_empty();
    is_any.then(|| format!("not looked at, since it is not there: {}", names.join(", ")))
}

fn end_line(end: &ScrubEndInfo) -> String {
    format!(
        "scrub repaired {} in {} with {} on {}",
        format_size(end.repaired_bytes),
        clock(end.run_ms.div_ceil(1000)),
        errors(end.lost_count),
        utc(end.ended)
    )
}

fn errors(count: u64) -> String {
    format!("{count} error{}", if count == 1 { "" } else { "s" })
}

fn device_line(device: &ScrubDeviceInfo) -> String {
    format!(
        "{} bad copies found, {} repaired, {} lost",
        device.found,
        format_size(device.repaired_bytes),
        format_size(device.lost_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_host::admin::DeviceInfo;

    fn info() -> ScrubInfo {
        ScrubInfo {
            state: "running".into(),
            rate: 0,
            began: 1_709_251_199,
            ended: 0,
            run_ms: 60_000,
            total_bytes: 40 << 30,
            done_bytes: 12 << 30,
            bytes_per_second: 210 << 20,
            seconds_left: Some(131),
            found: 0,
            repaired_bytes: 0,
            lost_count: 0,
            lost_bytes: 0,
            devices: Vec::new(),
            last: None,
        }
    }

    #[test]
    fn lines_say_how_it_stands_and_how_the_last_one_ended() {
        let mut scrub = info();
        let want = "scrub in progress since 2024-02-29 23:59:59, 12.0 GiB of 40.0 GiB scanned at \
                    210 MiB/s, 0 B repaired, 0 errors, 00:02:11 to go";
        let mut pool = PoolInfo::default();
        assert_eq!(lines(&scrub, &pool), [want]);
        scrub.state = "paused".into();
        let end = ScrubEndInfo { run_ms: 9_100, lost_count: 1, ..ScrubEndInfo::default() };
        scrub.last = Some(end);
        let shown = lines(&scrub, &pool);
        assert!(shown[0].starts_with("scrub paused"), "{shown:?}");
        assert_eq!(shown[1], "scrub repaired 0 B in 00:00:10 with 1 error on 1970-01-01 00:00:00");
        assert_eq!(done_of(&scrub), Done::Partly);
        let gone = DeviceInfo {
            name: "device 1 (missing)".into(),
            state: DeviceState::Missing,
            ..DeviceInfo::default()
        };
        pool.devices = vec![DeviceInfo::default(), gone];
        let shown = lines(&scrub, &pool);
        assert_eq!(shown[2], "not looked at, since it is not there: device 1 (missing)");
        assert_eq!(clock(200_000), "2 days 07:33:20");
    }
}
