//! Snapshots and streams, next to Btrfs, the other filesystem here that has them.
//!
//! Commands are started for each step, so nothing takes less than that. Both work on a subvolume of
//! small files, a hundred a directory. Rows about growth compare a filesystem with itself: with
//! more snapshots than before, or ten times the files.

use super::report::{Better, Metric};
use super::workloads::{self, Scale};
use super::{drop_caches, Contender, Disk};
use crate::checkout;
use crate::guard;
use crate::run::Cmd;
use crate::volume::Volume;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Files of a directory.
const TOGETHER: u32 = 100;
/// Snapshots that are made and deleted one by one.
const TIMED: u32 = 40;
/// Calls of which the median counts.
const CALLS: usize = 5;
/// How many commands make snapshots at a time where that is not measured.
const MAKERS: u32 = 8;

/// A row of the report, or several that come from one run.
pub struct Row {
    /// Its name, for filters.
    pub name: &'static str,
    measure: fn(&Trees, &mut Volume<'_>, &Scale) -> Result<Vec<Metric>>,
}

/// All rows.
pub const ROWS: &[Row] = &[
    Row { name: "versions: snapshots", measure: snapshots },
    Row { name: "versions: streams", measure: streams },
    Row { name: "versions: ten times the files", measure: ten_times },
    Row { name: "versions: many snapshots", measure: many },
];

/// Measures a row of a contender; nothing for one that has no snapshots.
///
/// # Errors
/// When it fails.
pub fn measure(
    row: &Row,
    (name, contender): (&str, &Contender),
    scale: &Scale,
    disk: &Disk,
) -> Result<Vec<Metric>> {
    let Contender::Mounted(subject) = contender else { return Ok(Vec::new()) };
    let kind = match name {
        "cairn" => Kind::Cairn,
        "btrfs" => Kind::Btrfs,
        _ => return Ok(Vec::new()),
    };
    let mut volume = Volume::on_device(&**subject, &disk.device)?;
    volume.mount()?;
    let measured = (row.measure)(&Trees::new(kind, volume.dir())?, &mut volume, scale)?;
    volume.unmount()?;
    Ok(measured)
}

#[derive(Clone, Copy)]
enum Kind {
    Cairn,
    Btrfs,
}

/// The subvolumes of a filesystem, and what it is told about them.
struct Trees {
    kind: Kind,
    root: PathBuf,
    text: Vec<u8>,
}

impl Trees {
    fn new(kind: Kind, root: &Path) -> Result<Trees> {
        if let Kind::Btrfs = kind {
            // It shows snapshots and what it receives in directories.
            for name in ["snapshots", "received"] {
                fs::create_dir(root.join(name))?;
            }
        }
        Ok(Trees { kind, root: root.to_owned(), text: workloads::text()?.bytes().to_vec() })
    }

    fn path(&self, tree: &str) -> PathBuf {
        self.root.join(tree)
    }

    fn create(&self, tree: &str) -> Result<()> {
        let cmd = match self.kind {
            Kind::Cairn => Cmd::new(checkout::binary("cairn")).args(["subvolume", "create"]),
            Kind::Btrfs => Cmd::new("btrfs").args(["-q", "subvolume", "create"]),
        };
        cmd.arg(self.path(tree)).quiet()
    }

    /// What a snapshot is called.
    fn name(&self, tree: &str, snapshot: &str) -> PathBuf {
        match self.kind {
            Kind::Cairn => self.root.join(format!("{tree}@{snapshot}")),
            Kind::Btrfs => self.root.join(format!("snapshots/{tree}-{snapshot}")),
        }
    }

    fn snapshot(&self, tree: &str, snapshot: &str) -> Result<()> {
        let name = self.name(tree, snapshot);
        let cmd = match self.kind {
            Kind::Cairn => Cmd::new(checkout::binary("cairn")).args(["snapshot", "create"]),
            Kind::Btrfs => {
                let cmd = Cmd::new("btrfs").args(["-q", "subvolume", "snapshot", "-r"]);
                cmd.arg(self.path(tree))
            }
        };
        cmd.arg(name).quiet()
    }

    fn delete(&self, tree: &str, snapshot: &str) -> Result<()> {
        let name = self.name(tree, snapshot);
        let cmd = match self.kind {
            Kind::Cairn => Cmd::new(checkout::binary("cairn")).args(["snapshot", "delete"]),
            // Durable when the command ends, as with the other.
            Kind::Btrfs => Cmd::new("btrfs").args(["-q", "subvolume", "delete", "-c"]),
        };
        cmd.arg(name).quiet()
    }

    /// Sends a snapshot into a file, all of it or what came after another.
    fn send(&self, tree: &str, after: Option<&str>, snapshot: &str, to: &Path) -> Result<()> {
        let name = self.name(tree, snapshot);
        let cmd = Cmd::shell("exec > \"$0\"; \"$@\"").arg(to);
        let cmd = match self.kind {
            Kind::Cairn => {
                let cmd = cmd.arg(checkout::binary("cairn")).args(["send", "-q"]);
                after.into_iter().fold(cmd, |cmd, after| cmd.args(["-i", after]))
            }
            Kind::Btrfs => {
                let cmd = cmd.args(["btrfs", "-q", "send"]);
                after.into_iter().fold(cmd, |cmd, after| cmd.arg("-p").arg(self.name(tree, after)))
            }
        };
        cmd.arg(name).quiet()
    }

    /// Receives a file, durably.
    fn receive(&self, from: &Path) -> Result<()> {
        let cmd = match self.kind {
            Kind::Cairn => Cmd::new(checkout::binary("cairn")).args(["receive", "-q", "-i"]),
            Kind::Btrfs => Cmd::new("btrfs").args(["-q", "receive", "-f"]),
        };
        cmd.arg(from).arg(self.root.join("received")).quiet()?;
        self.sync()
    }

    /// Lists what changed from one snapshot to the next. Btrfs has no command for that; a stream
    /// without data is what its users take.
    fn diff(&self, tree: &str, before: &str, after: &str) -> Result<()> {
        match self.kind {
            Kind::Cairn => {
                let cmd = Cmd::new(checkout::binary("cairn")).args(["snapshot", "diff"]);
                cmd.arg(self.name(tree, before)).arg(after).quiet()
            }
            Kind::Btrfs => {
                let cmd = Cmd::shell("exec > /dev/null; btrfs -q send --no-data -p \"$0\" \"$1\"");
                cmd.args([self.name(tree, before), self.name(tree, after)]).quiet()
            }
        }
    }

    fn sync(&self) -> Result<()> {
        Ok(rustix::fs::syncfs(File::open(&self.root)?)?)
    }

    /// The path of a file.
    fn file(&self, tree: &str, number: u32) -> PathBuf {
        let (group, part) = (number / TOGETHER / TOGETHER, number / TOGETHER);
        self.path(tree).join(format!("group-{group}/part-{part}/source-{number}"))
    }

    /// Makes a subvolume with so many small files.
    fn fill(&self, tree: &str, files: u32) -> Result<()> {
        self.create(tree)?;
        for number in 0..files {
            let path = self.file(tree, number);
            if number % TOGETHER == 0 {
                fs::create_dir_all(path.parent().context("files are in directories")?)?;
            }
            fs::write(path, workloads::small_content(&self.text, number))?;
        }
        self.sync()
    }

    /// Writes one file of a hundred anew, or of as many as it takes for `changes` of them. Which,
    /// is told by `round`.
    fn change(&self, tree: &str, files: u32, changes: u32, round: u32) -> Result<()> {
        let step = files / changes;
        for number in 0..changes {
            let number = number * step + round % step;
            let content = workloads::small_content(&self.text, number + 1 + round);
            fs::write(self.file(tree, number), content)?;
        }
        self.sync()
    }
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64() * 1000.0)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn rate(name: &str, count: u32, milliseconds: f64) -> Metric {
    Metric::rate(name, "/s", f64::from(count), milliseconds / 1000.0)
}

/// How long making and deleting one takes, and what a writer sees of it.
fn snapshots(trees: &Trees, volume: &mut Volume<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    trees.fill("tree", scale.small_files())?;
    volume.remount()?;
    drop_caches()?;
    let make = |kind: &str, number: u32| {
        trees.change("tree", scale.small_files(), 1, number)?;
        timed(|| trees.snapshot("tree", &format!("{kind}-{number}")))
    };
    let quiet = (0..TIMED).map(|number| make("quiet", number)).collect::<Result<_>>()?;
    let stop = AtomicBool::new(false);
    let (busy, longest) = std::thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| append(&trees.path("tree/appended"), &stop));
        let busy = (0..TIMED)
            .map(|number| timed(|| trees.snapshot("tree", &format!("busy-{number}"))))
            .collect::<Result<_>>();
        stop.store(true, Ordering::Relaxed);
        let longest = writer.join().expect("writers do not panic")?;
        Ok((busy?, longest))
    })?;
    let delete = |number| timed(|| trees.delete("tree", &format!("quiet-{number}")));
    let deleted = (0..TIMED).map(delete).collect::<Result<_>>()?;
    Ok(vec![
        Metric::time("make a snapshot, median", "ms", median(quiet)),
        Metric::time("the same while one appends", "ms", median(busy)),
        Metric::time("longest append meanwhile", "ms", longest),
        Metric::time("delete a snapshot, median", "ms", median(deleted)),
    ])
}

/// Appends until it is told to stop; returns the longest time that a call took, in milliseconds.
fn append(path: &Path, stop: &AtomicBool) -> Result<f64> {
    let mut file = File::create(path)?;
    let (mut longest, block) = (0.0, [7; 16 << 10]);
    while !stop.load(Ordering::Relaxed) {
        longest = timed(|| Ok(file.write_all(&block)?))?.max(longest);
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(longest)
}

/// A whole tree, and one changed file of a hundred, into a file and out of it.
fn streams(trees: &Trees, volume: &mut Volume<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let files = scale.small_files();
    let (scratch, _scratch) = guard::temp_dir(&std::env::temp_dir(), "cairn-streams")?;
    let (whole, part) = (scratch.join("whole"), scratch.join("part"));
    trees.fill("tree", files)?;
    trees.snapshot("tree", "one")?;
    let mut cold = || volume.remount().and_then(|()| drop_caches());
    cold()?;
    let sent = timed(|| trees.send("tree", None, "one", &whole))?;
    let received = timed(|| trees.receive(&whole))?;
    trees.change("tree", files, files / 100, 7)?;
    trees.snapshot("tree", "two")?;
    cold()?;
    let listed = timed(|| trees.diff("tree", "one", "two"))?;
    cold()?;
    let sent_part = timed(|| trees.send("tree", Some("one"), "two", &part))?;
    let received_part = timed(|| trees.receive(&part))?;
    Ok(vec![
        rate("send a tree, cold", files, sent),
        rate("receive a tree", files, received),
        Metric::time("list 1 % changed, cold", "ms", listed),
        Metric::time("send 1 % changed, cold", "ms", sent_part),
        Metric::time("receive 1 % changed", "ms", received_part),
    ])
}

/// As many changes take as long to send in a tree ten times as large.
fn ten_times(trees: &Trees, volume: &mut Volume<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let both = [("small", scale.small_files()), ("large", 10 * scale.small_files())];
    let changes = scale.small_files() / 100;
    for (tree, files) in both {
        trees.fill(tree, files)?;
        trees.snapshot(tree, "0")?;
        if let Kind::Cairn = trees.kind {
            // As somebody has who sends what came after it.
            trees.send(tree, None, "0", Path::new("/dev/null"))?;
        }
    }
    volume.remount()?;
    drop_caches()?;
    let mut times = [Vec::new(), Vec::new()];
    for round in 1..=CALLS as u32 {
        let (before, after) = (format!("{}", round - 1), format!("{round}"));
        for ((tree, files), times) in both.iter().zip(&mut times) {
            trees.change(tree, *files, changes, round)?;
            trees.snapshot(tree, &after)?;
            let send = || trees.send(tree, Some(&before), &after, Path::new("/dev/null"));
            times.push(timed(send)?);
        }
    }
    let [small, large] = times.map(median);
    Ok(vec![
        Metric::time(&format!("send {changes} changes of {} files", both[0].1), "ms", small),
        Metric::time(&format!("send {changes} changes of {} files", both[1].1), "ms", large),
        ratio("ten times the files take, to send", Better::Less, large / small),
    ])
}

/// A comparison of a contender with itself.
fn ratio(name: &str, better: Better, value: f64) -> Metric {
    Metric { name: name.to_owned(), unit: "x", better, value, is_speed: false }
}

/// Files are made as quickly however many snapshots there are.
fn many(trees: &Trees, _volume: &mut Volume<'_>, scale: &Scale) -> Result<Vec<Metric>> {
    let files = scale.small_files();
    trees.fill("tree", files)?;
    let mut made = 0;
    let mut rates = Vec::new();
    let mut metrics = Vec::new();
    for count in [0, 100, 1000, 10_000] {
        if count > scale.snapshots() {
            break;
        }
        make_snapshots(trees, files, made..count)?;
        made = count;
        let round = |round: usize| -> Result<f64> {
            let dir = trees.path("tree").join(format!("new-{count}-{round}"));
            let took =
                timed(|| create_files(&dir, files / 4, &trees.text).and_then(|()| trees.sync()))?;
            Ok(took)
        };
        let took = median((0..CALLS).map(round).collect::<Result<_>>()?);
        rates.push(1.0 / took);
        metrics.push(rate(&format!("create files, {count} snapshots"), files / 4, took));
    }
    let (first, last) = (rates[0], rates[rates.len() - 1]);
    metrics.push(ratio(&format!("with {made} snapshots, of none"), Better::More, last / first));
    Ok(metrics)
}

/// Snapshots, each after a change.
fn make_snapshots(trees: &Trees, files: u32, numbers: std::ops::Range<u32>) -> Result<()> {
    let next = AtomicU32::new(numbers.start);
    std::thread::scope(|scope| {
        let make = || loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                return Ok(());
            }
            fs::write(trees.file("tree", number * 37 % files), number.to_string())?;
            trees.snapshot("tree", &format!("{number:05}"))?;
        };
        let makers: Vec<_> = (0..MAKERS).map(|_| scope.spawn(make)).collect();
        makers.into_iter().try_for_each(|maker| maker.join().expect("makers do not panic"))
    })
}

fn create_files(dir: &Path, count: u32, text: &[u8]) -> Result<()> {
    for number in 0..count {
        let dir = dir.join(format!("part-{}", number / TOGETHER));
        if number % TOGETHER == 0 {
            fs::create_dir_all(&dir)?;
        }
        let content = workloads::small_content(text, number);
        fs::write(dir.join(format!("source-{number}")), content)?;
    }
    Ok(())
}
