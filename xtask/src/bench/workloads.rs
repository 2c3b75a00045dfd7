//! What is measured.
//!
//! A workload prepares its place untimed, then measures. All writing ends with a sync inside the
//! measurement: what is not durable is not done.

use super::report::Metric;
use crate::guard;
use crate::random::{Aligned, Random};
use crate::run::Cmd;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// How much of everything.
pub struct Scale {
    /// Size of the image.
    pub image_bytes: u64,
    stream_bytes: u64,
    random_file_bytes: u64,
    random_calls: u32,
    synced_calls: u32,
    transactions: u32,
    small_files: u32,
    archive_files: u32,
    directory_entries: u32,
    snapshots: u32,
}

impl Scale {
    /// Bytes of a stream.
    pub fn stream_bytes(&self) -> u64 {
        self.stream_bytes
    }

    /// How many calls at random places.
    pub fn random_calls(&self) -> u32 {
        self.random_calls
    }

    /// How many small files.
    pub fn small_files(&self) -> u32 {
        self.small_files
    }

    /// How many snapshots at most.
    pub fn snapshots(&self) -> u32 {
        self.snapshots
    }

    /// For numbers to be quoted.
    pub const FULL: Scale = Scale {
        image_bytes: 8 << 30,
        stream_bytes: 1 << 30,
        random_file_bytes: 1 << 30,
        random_calls: 50_000,
        synced_calls: 2000,
        transactions: 1000,
        small_files: 20_000,
        archive_files: 20_000,
        directory_entries: 1_000_000,
        snapshots: 10_000,
    };
    /// To see that everything runs.
    pub const QUICK: Scale = Scale {
        image_bytes: 4 << 30,
        stream_bytes: 256 << 20,
        random_file_bytes: 128 << 20,
        random_calls: 5000,
        synced_calls: 200,
        transactions: 100,
        small_files: 4000,
        archive_files: 3000,
        directory_entries: 100_000,
        snapshots: 1000,
    };
}

/// Where a workload runs.
pub struct Place {
    /// A directory, or the bare device.
    pub path: PathBuf,
    /// Whether it is the bare device.
    pub is_device: bool,
    /// Whether what is made there is there afterwards.
    pub keeps: bool,
}

impl Place {
    /// The file that a workload on one file works on. The FUSE filesystem without storage has one
    /// of that name.
    fn file(&self) -> PathBuf {
        if self.is_device {
            self.path.clone()
        } else {
            self.path.join("file")
        }
    }

    fn open(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(!self.is_device);
        if self.is_device {
            // The floor is the device, not the page cache over it.
            options.custom_flags(i32::try_from(OFlags::DIRECT.bits())?);
        }
        Ok(options.open(self.file())?)
    }
}

/// Something to measure.
pub struct Workload {
    /// Its name, for filters.
    pub name: &'static str,
    /// Whether the filesystem is mounted anew between preparation and measurement.
    pub is_cold: bool,
    /// Whether the bare device can do it.
    pub floor_is_device: bool,
    /// Whether a FUSE filesystem without storage can do it.
    pub floor_is_fuse: bool,
    /// Makes what the measurement needs.
    pub prepare: fn(&Place, &Scale) -> Result<()>,
    /// Measures.
    pub measure: fn(&Place, &Scale) -> Result<Vec<Metric>>,
}

const NOTHING: fn(&Place, &Scale) -> Result<()> = |_, _| Ok(());

const fn hot(
    name: &'static str,
    prepare: fn(&Place, &Scale) -> Result<()>,
    measure: fn(&Place, &Scale) -> Result<Vec<Metric>>,
) -> Workload {
    Workload {
        name,
        is_cold: false,
        floor_is_device: false,
        floor_is_fuse: false,
        prepare,
        measure,
    }
}

const fn cold(workload: Workload) -> Workload {
    Workload { is_cold: true, ..workload }
}

/// With both floors: the bare device, and FUSE without storage.
const fn with_floors(workload: Workload) -> Workload {
    Workload { floor_is_device: true, floor_is_fuse: true, ..workload }
}

const fn over_fuse(workload: Workload) -> Workload {
    Workload { floor_is_fuse: true, ..workload }
}

/// All workloads, in the order of the report.
pub const WORKLOADS: &[Workload] = &[
    with_floors(hot("stream-write-text", NOTHING, |place, scale| {
        stream_write(place, scale, Kind::Text, "write, compressible")
    })),
    with_floors(hot("stream-write-noise", NOTHING, |place, scale| {
        stream_write(place, scale, Kind::Noise, "write, incompressible")
    })),
    cold(with_floors(hot(
        "stream-read-text",
        |place, scale| fill(place, scale.stream_bytes, Kind::Text),
        |place, scale| stream_read(place, scale, "read, compressible"),
    ))),
    cold(with_floors(hot(
        "stream-read-noise",
        |place, scale| fill(place, scale.stream_bytes, Kind::Noise),
        |place, scale| stream_read(place, scale, "read, incompressible"),
    ))),
    cold(with_floors(hot("random-read", fill_for_random, random_read))),
    with_floors(hot("random-write", fill_for_random, random_write)),
    with_floors(hot("random-overwrite-synced", fill_for_random, random_overwrite_synced)),
    with_floors(hot("append-fsync", NOTHING, append_fsync)),
    hot("sqlite-wal", NOTHING, |place, scale| sqlite(place, scale, "WAL")),
    hot("sqlite-delete", NOTHING, |place, scale| sqlite(place, scale, "DELETE")),
    over_fuse(hot("small-files-1", NOTHING, |place, scale| small_files(place, scale, 1))),
    over_fuse(hot("small-files-2", NOTHING, |place, scale| small_files(place, scale, 2))),
    cold(hot("small-read", make_small_files, small_read)),
    cold(hot("walk", make_small_files, walk)),
    over_fuse(hot("stat-missing", NOTHING, stat_missing)),
    hot("untar", NOTHING, untar),
    over_fuse(hot("directory", NOTHING, directory)),
];

/// What file content is like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Shrinks to about a third.
    Text,
    /// Does not shrink.
    Noise,
}

/// Four MiB of content, to be used again and again at shifting places.
fn content(kind: Kind) -> Result<Aligned> {
    let mut memory = Aligned::new(4 * MIB)?;
    let mut random = Random(0x5eed);
    match kind {
        Kind::Noise => random.fill(memory.bytes()),
        Kind::Text => {
            let words = ["stone", "path", "summit", "valley", "weather", "north", "marker", "and"];
            let mut out = memory.bytes();
            while out.len() > 24 {
                let word = words[random.below(words.len())];
                let line = format!("{word} {:05} ", random.below(100_000));
                out.write_all(line.as_bytes())?;
            }
        }
    }
    Ok(memory)
}

/// Content for small files.
///
/// # Errors
/// When there is no memory.
pub fn text() -> Result<Aligned> {
    content(Kind::Text)
}

/// Writes `bytes` in calls of one MiB and syncs.
fn write_stream(file: &File, bytes: u64, memory: &mut Aligned) -> Result<()> {
    for index in 0..bytes / MIB as u64 {
        // Distinct content in each MiB, so that nothing is gained by finding it again.
        let start = (index as usize % 3) * MIB;
        let part = &mut memory.bytes()[start..start + MIB];
        part[..8].copy_from_slice(&index.to_le_bytes());
        file.write_all_at(part, index * MIB as u64)?;
    }
    Ok(file.sync_all()?)
}

fn fill(place: &Place, bytes: u64, kind: Kind) -> Result<()> {
    write_stream(&place.open()?, bytes, &mut content(kind)?)
}

/// Writes a file of noise.
///
/// # Errors
/// When that fails.
pub fn fill_with_noise(place: &Place, bytes: u64) -> Result<()> {
    fill(place, bytes, Kind::Noise)
}

/// Reads the file from its beginning in calls of one MiB.
///
/// # Errors
/// When that fails.
pub fn read_whole(place: &Place, bytes: u64) -> Result<()> {
    let mut memory = Aligned::new(MIB)?;
    let file = place.open()?;
    for index in 0..bytes / MIB as u64 {
        file.read_exact_at(memory.bytes(), index * MIB as u64)?;
    }
    Ok(())
}

/// Reads blocks of the file at random places, from several threads at once.
///
/// # Errors
/// When that fails.
pub fn read_at_random(place: &Place, bytes: u64, threads: u64, calls: u64) -> Result<()> {
    let file = place.open()?;
    let read = |seed: u64| -> Result<()> {
        let (mut memory, mut random) = (Aligned::new(BLOCK)?, Random(seed));
        for _ in 0..calls {
            let block = random.below(bytes as usize / BLOCK);
            file.read_exact_at(memory.bytes(), (block * BLOCK) as u64)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..=threads).map(|seed| scope.spawn(move || read(seed))).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("readers do not panic"))
    })
}

fn fill_for_random(place: &Place, scale: &Scale) -> Result<()> {
    fill(place, scale.random_file_bytes, Kind::Noise)
}

fn stream_write(place: &Place, scale: &Scale, kind: Kind, name: &str) -> Result<Vec<Metric>> {
    let mut memory = content(kind)?;
    let file = place.open()?;
    let start = Instant::now();
    write_stream(&file, scale.stream_bytes, &mut memory)?;
    Ok(vec![throughput(name, scale.stream_bytes, start.elapsed())])
}

fn stream_read(place: &Place, scale: &Scale, name: &str) -> Result<Vec<Metric>> {
    let start = Instant::now();
    read_whole(place, scale.stream_bytes)?;
    Ok(vec![throughput(name, scale.stream_bytes, start.elapsed())])
}

fn throughput(name: &str, bytes: u64, took: Duration) -> Metric {
    Metric::rate(name, "MiB/s", bytes as f64 / MIB as f64, took.as_secs_f64())
}

fn random_block(random: &mut Random, scale: &Scale) -> u64 {
    (random.below(scale.random_file_bytes as usize / BLOCK) * BLOCK) as u64
}

fn random_read(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let mut memory = Aligned::new(BLOCK)?;
    let mut random = Random(21);
    let file = place.open()?;
    let start = Instant::now();
    for _ in 0..scale.random_calls {
        file.read_exact_at(memory.bytes(), random_block(&mut random, scale))?;
    }
    Ok(vec![calls("read 4 KiB at random", scale.random_calls, start.elapsed())])
}

fn random_write(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let mut memory = content(Kind::Noise)?;
    let mut random = Random(22);
    let file = place.open()?;
    let start = Instant::now();
    for call in 0..scale.random_calls {
        let from = (call as usize % 1000) * BLOCK;
        let part = &memory.bytes()[from..from + BLOCK];
        file.write_all_at(part, random_block(&mut random, scale))?;
    }
    file.sync_all()?;
    Ok(vec![calls("write 4 KiB at random", scale.random_calls, start.elapsed())])
}

fn random_overwrite_synced(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let mut memory = content(Kind::Noise)?;
    let mut random = Random(23);
    let file = place.open()?;
    let start = Instant::now();
    for call in 0..scale.synced_calls {
        let from = (call as usize % 1000) * BLOCK;
        let part = &memory.bytes()[from..from + BLOCK];
        file.write_all_at(part, random_block(&mut random, scale))?;
        file.sync_data()?;
    }
    Ok(vec![calls("write 4 KiB, fdatasync", scale.synced_calls, start.elapsed())])
}

fn append_fsync(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let mut memory = content(Kind::Noise)?;
    let file = place.open()?;
    let mut times = Vec::new();
    for call in 0..scale.synced_calls {
        let part = &memory.bytes()[..BLOCK];
        let start = Instant::now();
        file.write_all_at(part, u64::from(call) * BLOCK as u64)?;
        file.sync_all()?;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    Ok(vec![
        Metric::time("append + fsync, median", "ms", at(0.5)),
        Metric::time("append + fsync, 99 %", "ms", at(0.99)),
    ])
}

fn calls(name: &str, count: u32, took: Duration) -> Metric {
    Metric::rate(name, "/s", f64::from(count), took.as_secs_f64())
}

fn sqlite(place: &Place, scale: &Scale, mode: &str) -> Result<Vec<Metric>> {
    let mut script = format!(
        "pragma journal_mode={mode}; pragma synchronous=full;\n\
         create table t(a integer primary key, b blob); create index i on t(b);\n"
    );
    let setup = script.clone();
    for n in 0..scale.transactions {
        script.push_str(&format!(
            "begin; insert into t(b) values(randomblob(300)); \
             update t set b = randomblob(300) where a = {}; commit;\n",
            n / 2
        ));
    }
    let file = place.path.join("script.sql");
    fs::write(&file, script.strip_prefix(&setup).unwrap_or(&script))?;
    Cmd::new("sqlite3").args(["test.db", &setup]).dir(&place.path).quiet()?;
    let read = ".read script.sql";
    let start = Instant::now();
    // The mode of the journal stays with the database; the mode of syncing is the connection's.
    let cmd = Cmd::new("sqlite3").args(["-cmd", "pragma synchronous=full", "test.db", read]);
    cmd.dir(&place.path).quiet()?;
    let name = format!("SQLite, {mode} journal");
    Ok(vec![calls(&name, scale.transactions, start.elapsed())])
}

/// The directories that small files are spread over, for one thread.
fn small_directories(root: &Path, thread: u32) -> Vec<PathBuf> {
    (0..20).map(|n| root.join(format!("t{thread}-d{n}"))).collect()
}

// The filesystem without storage has files of its own under names that begin with f or d.
fn small_path(directories: &[PathBuf], n: u32) -> PathBuf {
    directories[n as usize % directories.len()].join(format!("s{n}"))
}

/// Runs `work` with each thread's number and its share of the files.
fn in_threads(
    threads: u32,
    files: u32,
    work: impl Fn(u32, std::ops::Range<u32>) -> Result<()> + Sync,
) -> Result<Duration> {
    let share = files / threads;
    let start = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let work = &work;
        let handles: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || work(thread, thread * share..(thread + 1) * share)))
            .collect();
        handles.into_iter().try_for_each(|handle| handle.join().expect("workloads do not panic"))
    })?;
    Ok(start.elapsed())
}

/// Content of a small file: its size varies from a few bytes to two blocks.
pub fn small_content(memory: &[u8], n: u32) -> &[u8] {
    let bytes = [120, 900, 2500, 4096, 7800][n as usize % 5];
    &memory[n as usize % 4096..][..bytes]
}

fn small_files(place: &Place, scale: &Scale, threads: u32) -> Result<Vec<Metric>> {
    let count = scale.small_files;
    let mut memory = content(Kind::Text)?;
    let memory: &[u8] = memory.bytes();
    let root = &place.path;
    let mut metrics = Vec::new();
    let mut phase = |what: &str, work: &(dyn Fn(&Path, u32) -> Result<()> + Sync)| {
        let took = in_threads(threads, count, |thread, range| {
            let directories = small_directories(root, thread);
            range.into_iter().try_for_each(|n| work(&small_path(&directories, n), n))
        })?;
        let threads_word = if threads == 1 { "thread" } else { "threads" };
        let name = format!("{what}, {threads} {threads_word}");
        metrics.push(calls(&name, count, took));
        anyhow::Ok(())
    };
    for thread in 0..threads {
        for directory in small_directories(root, thread) {
            fs::create_dir(directory)?;
        }
    }
    phase("create", &|path, n| Ok(fs::write(path, small_content(memory, n))?))?;
    phase("stat", &|path, _| Ok(fs::metadata(path).map(drop)?))?;
    phase("read", &|path, _| Ok(fs::read(path).map(drop)?))?;
    phase("unlink", &|path, _| Ok(fs::remove_file(path)?))?;
    Ok(metrics)
}

fn make_small_files(place: &Place, scale: &Scale) -> Result<()> {
    let mut memory = content(Kind::Text)?;
    let memory: &[u8] = memory.bytes();
    let directories = small_directories(&place.path, 0);
    for directory in &directories {
        fs::create_dir(directory)?;
    }
    for n in 0..scale.small_files {
        fs::write(small_path(&directories, n), small_content(memory, n))?;
    }
    Ok(())
}

fn small_read(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let directories = small_directories(&place.path, 0);
    let start = Instant::now();
    for directory in &directories {
        for entry in fs::read_dir(directory)? {
            fs::read(entry?.path())?;
        }
    }
    Ok(vec![calls("read small files, cold", scale.small_files, start.elapsed())])
}

fn walk(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let start = Instant::now();
    let mut found = 0;
    for directory in fs::read_dir(&place.path)? {
        let directory = directory?;
        if directory.file_type()?.is_dir() && directory.file_name() != "lost+found" {
            for entry in fs::read_dir(directory.path())? {
                found += u32::from(entry?.metadata()?.is_file());
            }
        }
    }
    anyhow::ensure!(found == scale.small_files, "{found} files of {}", scale.small_files);
    Ok(vec![calls("walk and stat, cold", found, start.elapsed())])
}

/// A name that is never there, and never the same: a round trip each, answered from memory.
fn stat_missing(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let start = Instant::now();
    for n in 0..scale.small_files {
        let missing = fs::symlink_metadata(place.path.join(format!("no-{n}"))).is_err();
        anyhow::ensure!(missing, "a file is there that was never made");
    }
    Ok(vec![calls("look up a missing name", scale.small_files, start.elapsed())])
}

fn untar(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let (scratch, _scratch) = guard::temp_dir(&std::env::temp_dir(), "cairn-tar")?;
    let archive = scratch.join("tree.tar");
    make_archive(&scratch, &archive, scale.archive_files)?;
    // Into the page cache, so that unpacking does not measure the disk it lies on.
    fs::read(&archive)?;
    let start = Instant::now();
    Cmd::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&place.path).quiet()?;
    Cmd::new("sync").arg("-f").arg(&place.path).quiet()?;
    let unpacked = start.elapsed().as_secs_f64();
    let start = Instant::now();
    Cmd::new("rm").arg("-rf").arg(place.path.join("tree")).quiet()?;
    Cmd::new("sync").arg("-f").arg(&place.path).quiet()?;
    let removed = start.elapsed().as_secs_f64();
    Ok(vec![
        Metric::time("untar + sync", "s", unpacked),
        Metric::time("rm -rf + sync", "s", removed),
    ])
}

/// A tree like that of a large program: most files small, some not, a few directories deep.
fn make_archive(scratch: &Path, archive: &Path, files: u32) -> Result<()> {
    let tree = scratch.join("tree");
    let mut memory = content(Kind::Text)?;
    let mut random = Random(31);
    for n in 0..files {
        let dir = tree.join(format!("part-{}", n % 40)).join(format!("module-{}", n % 7));
        fs::create_dir_all(&dir)?;
        let bytes = match random.below(20) {
            0 => random.below(200_000),
            1..=5 => random.below(30_000),
            _ => random.below(6000),
        };
        let start = random.below(MIB);
        fs::write(dir.join(format!("source-{n}.c")), &memory.bytes()[start..start + bytes])?;
    }
    Cmd::new("tar").arg("-cf").arg(archive).arg("-C").arg(scratch).arg("tree").quiet()?;
    fs::remove_dir_all(&tree).context("cannot remove the tree")
}

/// After this long a directory is large enough for a filesystem that looks at every name.
const DIRECTORY_LIMIT: Duration = Duration::from_secs(180);

/// How the rate of adding names holds up as a directory grows.
fn directory(place: &Place, scale: &Scale) -> Result<Vec<Metric>> {
    let dir = place.path.join("big");
    fs::create_dir(&dir)?;
    let mut metrics = Vec::new();
    let mut made = 0;
    let whole = Instant::now();
    for (end, name) in
        [(10_000, "10 thousand"), (100_000, "100 thousand"), (1_000_000, "1 million")]
    {
        if end > scale.directory_entries {
            break;
        }
        let start = Instant::now();
        for n in made..end {
            File::create(dir.join(format!("entry-{n:07}")))?;
            if whole.elapsed() > DIRECTORY_LIMIT {
                return Ok(metrics);
            }
        }
        let name = format!("create in a directory to {name}");
        metrics.push(calls(&name, end - made, start.elapsed()));
        made = end;
    }
    if !place.keeps {
        return Ok(metrics);
    }
    let start = Instant::now();
    let found = fs::read_dir(&dir)?.count();
    anyhow::ensure!(found == made as usize, "{found} entries of {made}");
    metrics.push(calls("list that directory", made, start.elapsed()));
    Ok(metrics)
}
