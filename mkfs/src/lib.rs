//! `mkfs.cairn`: makes a pool on block devices or image files.
//!
//! Nothing is written before everything has been checked: the arguments, that the devices are free,
//! that there is nothing on them that would be missed, and, by formatting a device in memory of the
//! same size, that the pool fits and the core agrees with every option. The same rehearsal is all
//! that `--dry-run` does.

mod arguments;
mod rehearsal;
mod summary;
mod targets;

pub use arguments::Arguments;

use cairn_host::say;
use cairn_host::{
    host_platform, parse, without_codes, FixedClock, LogReport, LogTarget, SeededEntropy,
};
use clap::{CommandFactory, Parser};
use fs_core::engine::{format, FormatOptions};
use fs_core::format::FORMAT_VERSION;
use fs_core::platform::{DeviceRef, Platform, Timestamp};
use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use summary::Summary;

/// The command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Runs the command with the arguments of the process.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.features.contains(&arguments::Feature::List) {
        say!(
            "Format version {FORMAT_VERSION} has no optional features: what a pool needs is \
             turned on when it is first used, or follows from the profile."
        );
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(summary) => {
            summary.print(&arguments);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("mkfs.cairn: {failure}");
            if arguments.json {
                say!("{:#}", serde_json::json!({ "error": failure.0 }));
            }
            ExitCode::FAILURE
        }
    }
}

/// Why no pool was made, as a sentence.
#[derive(Debug)]
pub struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Failure {
    fn new(sentence: impl fmt::Display) -> Failure {
        Failure(without_codes(&sentence.to_string()))
    }
}

/// Makes the pool that the arguments ask for.
///
/// # Errors
/// Why not; then nothing has been written, except when a device failed in the middle.
pub fn run(arguments: &Arguments) -> Result<Summary, Failure> {
    let epoch = source_date_epoch()?;
    if let Some((profile, needed)) = arguments.lacks_devices() {
        return Err(Failure::new(format_args!(
            "the profile {} needs {needed} devices, and {} given",
            profile.name(),
            match arguments.targets.len() {
                1 => "one is".to_string(),
                count => format!("{count} are"),
            }
        )));
    }
    let mut options = arguments.format_options();
    if options.pool_id.is_none() {
        // Drawn here, so that the rehearsal and the pool agree.
        let mut id = [0; 16];
        platform(arguments, epoch).entropy.fill(&mut id);
        options.pool_id = Some(random_uuid(id));
    }
    let plan = targets::examine(arguments)?;
    let rehearsed = rehearse(arguments, epoch, &plan, &options)?;
    if arguments.dry_run {
        return Ok(rehearsed);
    }
    let devices = plan.carry_out(arguments)?;
    let formatted = write_pool(&devices, platform(arguments, epoch), &options);
    if formatted.is_err() {
        plan.remove_created();
    }
    formatted
}

/// Formats devices in memory.
fn rehearse(
    arguments: &Arguments,
    epoch: Option<i64>,
    plan: &targets::Plan,
    options: &FormatOptions,
) -> Result<Summary, Failure> {
    let devices: Vec<DeviceRef> =
        plan.targets.iter().map(|t| rehearsal::Memory::shared(&t.path, t.bytes)).collect();
    write_pool(&devices, platform(arguments, epoch), options)
}

fn write_pool(
    devices: &[DeviceRef],
    platform: Platform,
    options: &FormatOptions,
) -> Result<Summary, Failure> {
    format(devices.to_vec(), platform, options).map_err(|error| describe(devices, &error))?;
    Summary::read_back(devices, options)
}

/// The core's error with the name of the device it is about.
fn describe(devices: &[DeviceRef], error: &fs_core::error::Error) -> Failure {
    use fs_core::error::Error;
    match error {
        Error::TooSmall { minimum } => {
            let small = devices.iter().min_by_key(|device| device.geometry().bytes);
            let (name, bytes) = small.map_or(("", 0), |d| (d.name(), d.geometry().bytes));
            Failure::new(format_args!(
                "{name} is too small: it has {}, a pool needs at least {} ({minimum} bytes)",
                parse::format_size(bytes),
                parse::format_size(*minimum)
            ))
        }
        Error::Device { device, at, cause } => {
            let name = devices.get(usize::from(*device)).map_or("a device", |d| d.name());
            Failure::new(format_args!("{name} failed at byte {at}: {cause:?}"))
        }
        other => Failure::new(other),
    }
}

/// The surroundings of a run. With a seed nothing in them changes from run to run.
fn platform(arguments: &Arguments, epoch: Option<i64>) -> Platform {
    let mut platform = host_platform();
    platform.report = Arc::new(LogReport::new("mkfs.cairn", LogTarget::Stderr));
    if let Some(seed) = &arguments.seed {
        platform.entropy = Arc::new(SeededEntropy::new(seed.as_bytes()));
    }
    if let Some(secs) = epoch.or(arguments.seed.is_some().then_some(0)) {
        platform.clock = Arc::new(FixedClock(Timestamp { secs, nanos: 0 }));
    }
    platform
}

/// The time that reproducible builds want to see in what they make.
fn source_date_epoch() -> Result<Option<i64>, Failure> {
    let Some(text) = std::env::var_os("SOURCE_DATE_EPOCH") else { return Ok(None) };
    let seconds = text.to_str().and_then(|t| t.parse().ok()).filter(|s| *s >= 0);
    seconds
        .map(Some)
        .ok_or_else(|| Failure::new("SOURCE_DATE_EPOCH is not a number of seconds since 1970"))
}

/// The bits that make sixteen random bytes a UUID of version 4.
fn random_uuid(mut id: [u8; 16]) -> [u8; 16] {
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}
