//! `cargo xtask bench`: cairn next to other filesystems, in one run on one machine.
//!
//! Every measurement starts from a new filesystem on the same loop device with direct I/O. Its
//! image is written whole before the first, and nothing is discarded: the first write to a hole of
//! a file costs the filesystem below an allocation, which no disk asks for, and which a filesystem
//! that never overwrites would pay again and again. Within a round each workload goes through all
//! subjects in turn, so that what drifts on the machine drifts for all; the median of the rounds is
//! reported, and the ratio to Btrfs with zstd, the filesystem that promises the same. Caches are
//! dropped before each workload, and the filesystem is mounted anew where reads are to be cold.
//!
//! Two floors stand beside them: the bare device, and a FUSE filesystem without storage, whose cost
//! is that of the round trips alone. The workloads are this program's own, so that they are the
//! same for all.
//!
//! Two settings of the machine are made for the run and put back after it ([`SETTINGS`]); `--as-is`
//! leaves them alone.

mod mirror;
mod plot;
mod report;
mod scrub;
mod versions;
mod workloads;

use crate::guard;
use crate::need;
use crate::run::Cmd;
use crate::subject::{self, Subject};
use crate::volume::Volume;
use crate::{checkout, run};
use anyhow::{bail, Context, Result};
use report::{Metric, Results};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use workloads::{Place, Scale, Workload, WORKLOADS};

/// The subject that others are compared with.
pub const REFERENCE: &str = "btrfs";

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Options {
    /// Small sizes and one round: a few minutes, to see that everything runs.
    #[arg(long)]
    quick: bool,
    /// Rounds; the median is reported.
    #[arg(long)]
    rounds: Option<usize>,
    /// Leave the machine's settings as they are.
    #[arg(long)]
    as_is: bool,
    /// Filesystems to measure.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "cairn,btrfs,ext4,fuse2fs,ntfs-3g,noop,device"
    )]
    subjects: Vec<String>,
    /// Only the workloads whose names contain one of these words.
    filter: Vec<String>,
}

/// What is measured: a filesystem, or one of the floors.
enum Contender {
    /// A filesystem.
    Mounted(Box<dyn Subject>),
    /// A FUSE filesystem without storage.
    NoOp,
    /// The bare device.
    Device,
}

/// Measures, prints, and writes JSON and a plot.
///
/// # Errors
/// When a subject or workload fails.
pub fn run(options: &Options) -> Result<()> {
    need::can_mount()?;
    need::tools(need::MOUNT)?;
    need::tools(&[("sqlite3", "sqlite3"), ("tar", "tar")])?;
    let contenders = contenders(&options.subjects)?;
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 3 });
    let scale = if options.quick { Scale::QUICK } else { Scale::FULL };
    let mut results = Results::new(contenders.iter().map(|(name, _)| name.clone()).collect());
    let disk = Disk::new(scale.image_bytes)?;
    let _settings = if options.as_is { Vec::new() } else { settings()? };
    let start = Instant::now();
    let is_wanted = |name: &str| {
        let mut words = options.filter.iter();
        options.filter.is_empty() || words.any(|word| name.contains(word.as_str()))
    };
    let rows: Vec<&mirror::Row> = mirror::ROWS.iter().filter(|row| is_wanted(row.name)).collect();
    let scrubs = is_wanted(scrub::NAME);
    let pair = match scrubs || !rows.is_empty() {
        true => Some(mirror::Pair::new(&scale)?),
        false => None,
    };
    for round in 1..=rounds {
        if let Some(pair) = &pair {
            for row in &rows {
                one_row(row.name, &contenders, round, &mut results, &|name, contender| {
                    mirror::measure(row, (name, contender), &scale, pair)
                });
            }
            if scrubs {
                one_row(scrub::NAME, &contenders, round, &mut results, &|name, contender| {
                    scrub::measure(name, contender, &scale, pair)
                });
            }
        }
        for workload in WORKLOADS {
            if is_wanted(workload.name) {
                one_workload(workload, (&scale, &disk), &contenders, round, &mut results);
            }
        }
        for row in versions::ROWS.iter().filter(|row| is_wanted(row.name)) {
            one_row(row.name, &contenders, round, &mut results, &|name, contender| {
                versions::measure(row, (name, contender), &scale, &disk)
            });
        }
    }
    println!("\n{rounds} rounds in {:.0} s\n", start.elapsed().as_secs_f64());
    print!("{}", report::table(&results, REFERENCE));
    let dir = checkout::target().join("bench");
    fs::create_dir_all(&dir)?;
    let json = dir.join("results.json");
    fs::write(&json, report::json(&results, rounds, options.quick))?;
    let svg = dir.join("results.svg");
    fs::write(&svg, plot::svg(&results, REFERENCE))?;
    println!("\nwritten: {} and {}", json.display(), svg.display());
    if results.failures.is_empty() {
        return Ok(());
    }
    bail!("{} measurements failed:\n{}", results.failures.len(), results.failures.join("\n"))
}

/// Settings of the machine that a measurement depends on, for all contenders alike: what the guide
/// recommends for FUSE, and what Linux does on a virtual machine unless told otherwise.
const SETTINGS: &[(&str, &str, &str)] = &[
    ("/sys/module/fuse/parameters/enable_uring", "Y", "FUSE over io_uring"),
    // The default of the kernel's `haltpoll` governor. With zero, which some providers set, each
    // wake-up of an idle CPU leaves the virtual machine.
    ("/sys/module/haltpoll/parameters/guest_halt_poll_ns", "200000", "polling before halting"),
];

/// Makes the settings where this kernel has them, and says so.
fn settings() -> Result<Vec<guard::Guard>> {
    let mut changed = Vec::new();
    for (path, value, what) in SETTINGS {
        let path = Path::new(path);
        let Ok(before) = fs::read_to_string(path) else { continue };
        let before = before.trim();
        if before != *value {
            println!("{what}: {} = {value} (was {before}) for this run", path.display());
            changed.push(guard::setting(path, value)?);
        }
    }
    Ok(changed)
}

fn contenders(names: &[String]) -> Result<Vec<(String, Contender)>> {
    if names.iter().any(|name| name == "cairn" || name == "noop") {
        need::release_build()?;
    }
    let mut found = Vec::new();
    for name in names {
        let contender = match name.as_str() {
            "noop" => Contender::NoOp,
            "device" => Contender::Device,
            _ => Contender::Mounted(subject::by_name(name)?),
        };
        if let Contender::Mounted(subject) = &contender {
            if let Err(why) = subject.prepare() {
                println!("{name} is left out: {why:#}");
                continue;
            }
        }
        found.push((name.clone(), contender));
    }
    Ok(found)
}

/// One workload on every contender it makes sense for. A contender that fails is noted, and the
/// rest goes on.
fn one_workload(
    workload: &Workload,
    (scale, disk): (&Scale, &Disk),
    contenders: &[(String, Contender)],
    round: usize,
    results: &mut Results,
) {
    for (name, contender) in contenders {
        let measured = match contender {
            Contender::Mounted(subject) => on_a_mount(workload, scale, &**subject, disk),
            Contender::NoOp if workload.floor_is_fuse => on_no_op(workload, scale),
            Contender::Device if workload.floor_is_device => on_the_device(workload, scale, disk),
            Contender::NoOp | Contender::Device => continue,
        };
        match measured {
            Ok(metrics) => {
                metrics.into_iter().for_each(|metric| note(name, metric, round, results));
            }
            Err(why) => note_failure(workload.name, name, &why, round, results),
        }
    }
}

/// A row that only some contenders can do, or that comes with several metrics.
fn one_row<M: IntoIterator<Item = Metric>>(
    row: &str,
    contenders: &[(String, Contender)],
    round: usize,
    results: &mut Results,
    measure: &dyn Fn(&str, &Contender) -> Result<M>,
) {
    for (name, contender) in contenders {
        match measure(name, contender) {
            Ok(metrics) => {
                metrics.into_iter().for_each(|metric| note(name, metric, round, results));
            }
            Err(why) => note_failure(row, name, &why, round, results),
        }
    }
}

fn note(name: &str, metric: Metric, round: usize, results: &mut Results) {
    let Metric { name: what, unit, .. } = &metric;
    println!("{round} {what:<28} {name:<8} {:>12.1} {unit}", metric.value);
    results.add(name, metric);
}

fn note_failure(what: &str, name: &str, why: &anyhow::Error, round: usize, results: &mut Results) {
    let line = format!("{what} on {name}: {why:#}");
    println!("{round} {line}");
    results.failures.push(run::tail(&line, 3));
}

fn on_a_mount(
    workload: &Workload,
    scale: &Scale,
    subject: &dyn Subject,
    disk: &Disk,
) -> Result<Vec<Metric>> {
    let mut volume = Volume::on_device(subject, &disk.device)?;
    volume.mount()?;
    let place = Place { path: volume.dir().to_owned(), is_device: false, keeps: true };
    (workload.prepare)(&place, scale).context("preparation")?;
    if workload.is_cold {
        volume.remount()?;
    }
    drop_caches()?;
    let mut metrics = (workload.measure)(&place, scale)?;
    if subject.is_fuse() {
        let peak = volume.server().ok().and_then(subject::memory_peak);
        if let Some(bytes) = peak {
            let name = format!("memory after {}", workload.name);
            metrics.push(Metric::memory(name, bytes));
        }
    }
    volume.unmount()?;
    Ok(metrics)
}

fn on_no_op(workload: &Workload, scale: &Scale) -> Result<Vec<Metric>> {
    let (dir, _dir) = guard::mount_point()?;
    let mount = Cmd::new(checkout::binary("mount.cairn")).args(["--noop", "none"]).arg(&dir);
    mount.quiet()?;
    let _mounted = guard::mounted(&dir);
    let place = Place { path: dir, is_device: false, keeps: false };
    (workload.prepare)(&place, scale).context("preparation")?;
    drop_caches()?;
    (workload.measure)(&place, scale)
}

fn on_the_device(workload: &Workload, scale: &Scale, disk: &Disk) -> Result<Vec<Metric>> {
    let place = Place { path: disk.device.clone(), is_device: true, keeps: true };
    (workload.prepare)(&place, scale).context("preparation")?;
    drop_caches()?;
    (workload.measure)(&place, scale)
}

/// The loop device that all are measured on.
struct Disk {
    // Dropped in this order.
    _attached: guard::Guard,
    _scratch: guard::Guard,
    device: PathBuf,
}

impl Disk {
    /// A disk that has been in use: no byte of it is a hole.
    fn new(bytes: u64) -> Result<Disk> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "device")?;
        let image = scratch.join("image");
        let mut file = fs::File::create(&image)?;
        let part = vec![0xa5; 4 << 20];
        for _ in 0..bytes / part.len() as u64 {
            file.write_all(&part)?;
        }
        file.sync_all()?;
        let (device, attached) = guard::loop_device(&image, false)?;
        let name = device.file_name().context("a loop device has a name")?;
        let limit = Path::new("/sys/block").join(name).join("queue/discard_max_bytes");
        fs::write(&limit, "0").with_context(|| format!("cannot write {}", limit.display()))?;
        Ok(Disk { _attached: attached, _scratch: removal, device })
    }
}

/// Empties the kernel's caches.
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write(Path::new("/proc/sys/vm/drop_caches"), "3").context("cannot drop caches")
}
