//! Mirrors on two devices, next to Btrfs raid1 on the same.
//!
//! Each gets the same two loop devices, which are written whole before. A row is measured on a new
//! filesystem; what is read was written before, and the filesystem mounted anew.
//!
//! Whether reads are spread over the copies shows only where the devices are the limit: the last
//! row holds both down to [`THROTTLED_BYTES`] a second, by the control group that this process
//! moves to, and compares a mirror with one device.

use super::report::Metric;
use super::workloads::{self, Place, Scale};
use super::{drop_caches, Contender};
use crate::guard::{self, Guard};
use crate::run::Cmd;
use crate::subject::{MountOptions, Subject};
use crate::{checkout, need};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
pub(super) const LIMIT: Duration = Duration::from_secs(600);
/// Bytes that a throttled device gives out in a second.
const THROTTLED_BYTES: u64 = 60 << 20;

/// Two loop devices that have been in use.
pub struct Pair {
    // Dropped in this order.
    _attached: Vec<Guard>,
    _scratch: Guard,
    pub(super) devices: Vec<PathBuf>,
}

impl Pair {
    /// Makes them large enough for the stream.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn new(scale: &Scale) -> Result<Pair> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "pair")?;
        let (mut devices, mut attached) = (Vec::new(), Vec::new());
        let part = vec![0xa5; 4 << 20];
        for name in ["left", "right"] {
            let image = scratch.join(name);
            let mut file = File::create(&image)?;
            for _ in 0..device_bytes(scale) / part.len() as u64 {
                file.write_all(&part)?;
            }
            file.sync_all()?;
            let (device, guard) = guard::loop_device(&image, false)?;
            devices.push(device);
            attached.push(guard);
        }
        Ok(Pair { _attached: attached, _scratch: removal, devices })
    }
}

fn device_bytes(scale: &Scale) -> u64 {
    2 * scale.stream_bytes()
}

/// A row of the report.
#[derive(Clone, Copy)]
pub struct Row {
    /// Its name, for filters.
    pub name: &'static str,
    measure: fn(&Row, &Mirror<'_>, &Scale) -> Result<Metric>,
}

/// All rows.
pub const ROWS: &[Row] = &[
    Row { name: "mirror: write, incompressible", measure: write },
    Row { name: "mirror: read, incompressible", measure: read },
    Row { name: "mirror: read 4 KiB at random", measure: read_at_random },
    Row { name: "mirror: reads, of one device's", measure: spread },
];

/// A filesystem on the pair.
pub(super) struct Mirror<'a> {
    pub subject: &'a dyn Subject,
    pub pair: &'a Pair,
    is_cairn: bool,
}

impl<'a> Mirror<'a> {
    /// `None` for a contender that makes no mirrors.
    pub(super) fn of(
        name: &str,
        contender: &'a Contender,
        pair: &'a Pair,
    ) -> Result<Option<Mirror<'a>>> {
        let is_cairn = name == "cairn";
        let Contender::Mounted(subject) = contender else { return Ok(None) };
        if is_cairn {
            need::release_build()?;
        }
        let mirror = Mirror { subject: &**subject, pair, is_cairn };
        Ok((is_cairn || name == "btrfs").then_some(mirror))
    }

    pub(super) fn is_cairn(&self) -> bool {
        self.is_cairn
    }

    /// Formats both devices, or only the first.
    pub(super) fn format(&self, devices: usize) -> Result<()> {
        let cmd = match (self.is_cairn, devices) {
            (true, 1) => Cmd::new(checkout::binary("mkfs.cairn")).args(["-q", "-f"]),
            (true, _) => {
                let cmd = Cmd::new(checkout::binary("mkfs.cairn"));
                cmd.args(["-q", "-f", "--profile", "mirror"])
            }
            (false, 1) => Cmd::new("mkfs.btrfs").args(["-q", "-f"]),
            (false, _) => Cmd::new("mkfs.btrfs").args(["-q", "-f", "-d", "raid1", "-m", "raid1"]),
        };
        cmd.args(&self.pair.devices[..devices]).limit(LIMIT).quiet()
    }

    /// Mounts it, and does something with it.
    pub(super) fn mounted<T>(&self, work: impl FnOnce(&Place) -> Result<T>) -> Result<T> {
        let (dir, _mount_point) = guard::mount_point()?;
        self.subject.mount(&self.pair.devices[0], &dir, MountOptions::default())?;
        let mounted = guard::mounted(&dir);
        let done = work(&Place { path: dir.clone(), is_device: false, keeps: true })?;
        guard::unmount_command(&dir).limit(LIMIT).quiet()?;
        mounted.disarm();
        // The other device is let go of when the server has ended, a moment after the unmount.
        self.pair.devices.iter().try_for_each(|device| wait_unused(device))?;
        Ok(done)
    }

    /// Makes a new one with a stream of noise on it.
    pub(super) fn filled(&self, devices: usize, bytes: u64) -> Result<()> {
        self.format(devices)?;
        self.mounted(|place| workloads::fill_with_noise(place, bytes))
    }
}

/// Waits until nobody claims a block device.
fn wait_unused(device: &Path) -> Result<()> {
    use rustix::fs::{Mode, OFlags};
    let begun = Instant::now();
    loop {
        match rustix::fs::open(device, OFlags::RDONLY | OFlags::EXCL, Mode::empty()) {
            Ok(_) => return Ok(()),
            Err(error) if begun.elapsed() > LIMIT => {
                return Err(error).with_context(|| format!("{} stays in use", device.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Measures a row of a contender; `None` for one that makes no mirrors.
///
/// # Errors
/// When it fails.
pub fn measure(
    row: &Row,
    (name, contender): (&str, &Contender),
    scale: &Scale,
    pair: &Pair,
) -> Result<Option<Metric>> {
    match Mirror::of(name, contender, pair)? {
        Some(mirror) => (row.measure)(row, &mirror, scale).map(Some),
        None => Ok(None),
    }
}

fn rate(name: &str, bytes: u64, seconds: f64) -> Metric {
    Metric::rate(name, "MiB/s", bytes as f64 / MIB as f64, seconds)
}

fn write(row: &Row, mirror: &Mirror<'_>, scale: &Scale) -> Result<Metric> {
    mirror.format(2)?;
    let bytes = scale.stream_bytes();
    let seconds = mirror.mounted(|place| {
        drop_caches()?;
        let start = Instant::now();
        workloads::fill_with_noise(place, bytes)?;
        Ok(start.elapsed().as_secs_f64())
    })?;
    Ok(rate(row.name, bytes, seconds))
}

fn read(row: &Row, mirror: &Mirror<'_>, scale: &Scale) -> Result<Metric> {
    let bytes = scale.stream_bytes();
    mirror.filled(2, bytes)?;
    Ok(rate(row.name, bytes, read_whole(mirror, bytes)?))
}

fn read_at_random(row: &Row, mirror: &Mirror<'_>, scale: &Scale) -> Result<Metric> {
    const THREADS: u64 = 8;
    mirror.filled(2, scale.stream_bytes())?;
    let calls = u64::from(scale.random_calls()) / THREADS;
    let seconds = mirror.mounted(|place| {
        drop_caches()?;
        let start = Instant::now();
        workloads::read_at_random(place, scale.stream_bytes(), THREADS, calls)?;
        Ok(start.elapsed().as_secs_f64())
    })?;
    Ok(Metric::rate(row.name, "/s", (calls * THREADS) as f64, seconds))
}

/// How long it takes to read what [`Mirror::filled`] wrote, in seconds.
fn read_whole(mirror: &Mirror<'_>, bytes: u64) -> Result<f64> {
    mirror.mounted(|place| {
        drop_caches()?;
        let start = Instant::now();
        workloads::read_whole(place, bytes)?;
        Ok(start.elapsed().as_secs_f64())
    })
}

/// How many times faster two devices are read than one, where they are the limit.
fn spread(row: &Row, mirror: &Mirror<'_>, scale: &Scale) -> Result<Metric> {
    let bytes = scale.stream_bytes() / 4;
    let mut seconds = [0.0; 2];
    for (devices, seconds) in (1..=2).zip(&mut seconds) {
        mirror.filled(devices, bytes)?;
        let _throttled = Throttled::new(&mirror.pair.devices, THROTTLED_BYTES)?;
        *seconds = read_whole(mirror, bytes)?;
    }
    Ok(Metric::rate(row.name, "x", seconds[0], seconds[1]))
}

/// This process, and what it starts, in a control group whose reads of devices are held down. When
/// it is dropped the process goes back to where it was.
struct Throttled {
    group: PathBuf,
    before: PathBuf,
}

impl Throttled {
    fn new(devices: &[PathBuf], bytes_per_second: u64) -> Result<Throttled> {
        let old = Path::new("/sys/fs/cgroup/blkio");
        let is_old = old.is_dir();
        let (root, controller) = match is_old {
            true => (old, "blkio"),
            false => (Path::new("/sys/fs/cgroup"), ""),
        };
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let own = groups.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|name| name == controller).then_some(path)
        });
        let own = own.context("no control group")?.trim_start_matches('/');
        if !is_old {
            // Without effect where it is on already; the limit below tells what is wrong if not.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+io");
        }
        let throttled = Throttled {
            group: root.join(format!("cairn-bench-{}", std::process::id())),
            before: root.join(own),
        };
        fs::create_dir_all(&throttled.group)?;
        for device in devices {
            let number = fs::metadata(device)?.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            let (file, limit) = match is_old {
                true => ("blkio.throttle.read_bps_device", format!("{bytes_per_second}")),
                false => ("io.max", format!("rbps={bytes_per_second}")),
            };
            fs::write(throttled.group.join(file), format!("{major}:{minor} {limit}"))
                .context("this kernel does not hold devices down")?;
        }
        throttled.enter(&throttled.group)?;
        Ok(throttled)
    }

    fn enter(&self, group: &Path) -> Result<()> {
        Ok(fs::write(group.join("cgroup.procs"), std::process::id().to_string())?)
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        let left = self.enter(&self.before).and_then(|()| Ok(fs::remove_dir(&self.group)?));
        if let Err(why) = left {
            eprintln!("xtask: {} stays: {why:#}", self.group.display());
        }
    }
}
