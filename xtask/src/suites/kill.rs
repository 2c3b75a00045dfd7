//! The server is killed in the middle of work: what was synced must be there.
//!
//! Writers record, outside the filesystem, what a successful `fsync` has promised. Then the server
//! gets SIGKILL, the dead mount is taken away, the image is mounted again, and every promise is
//! compared with what is there. Power loss is the simulator's business; this is the way a whole
//! process dies, with the kernel's side of FUSE in it.

use super::Suite;
use crate::random::Random;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::volume::{Backing, Volume};
use crate::{checkout, guard};
use anyhow::{bail, ensure, Context, Result};
use rustix::process::{kill_process, Pid, Signal};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Kills the server again and again.
///
/// # Errors
/// When a promise is broken or the checker is not content.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let rounds = if suite.long { 200 } else { 8 };
    let mut promises = 0;
    for backing in [Backing::Loop, Backing::File] {
        let mut volume = Volume::create(suite.subject, backing, 1 << 30)?;
        let mut random = Random(11);
        for round in 0..rounds / 2 {
            promises += one_death(&mut volume, round, &mut random)
                .with_context(|| format!("{backing:?}, round {round}"))?;
        }
    }
    Ok(Outcome::Passed(format!("{rounds} deaths, {promises} promises kept")))
}

/// What a writer was promised: content by name, and the lowest generation of a replaced file.
#[derive(Default)]
struct Promises {
    files: BTreeMap<String, Vec<u8>>,
    gone: Vec<String>,
    generation: u64,
}

fn one_death(volume: &mut Volume<'_>, round: u32, random: &mut Random) -> Result<usize> {
    volume.mount()?;
    let dir = volume.dir().join(format!("round-{round}"));
    fs::create_dir(&dir)?;
    File::open(&dir)?.sync_all()?;
    let stop = AtomicBool::new(false);
    let life = Duration::from_millis(200 + random.below(1500) as u64);
    let seeds = [random.word() | 1, random.word() | 1];
    let kept = std::thread::scope(|scope| -> Result<Vec<Promises>> {
        let writers: Vec<_> = seeds
            .iter()
            .enumerate()
            .map(|(number, seed)| {
                let (dir, stop) = (&dir, &stop);
                scope.spawn(move || write_until_it_dies(dir, number, *seed, stop))
            })
            .collect();
        std::thread::sleep(life);
        let killed = volume.server().and_then(|pid| signal(pid, Signal::KILL));
        stop.store(true, Ordering::Relaxed);
        let kept = writers.into_iter().map(|writer| writer.join().expect("writers do not panic"));
        let kept = kept.collect();
        killed.map(|()| kept)
    })?;
    // Nobody answers any more, which nobody is to take for a pool that is well.
    for arguments in [&["status"][..], &["status", "-x"]] {
        let told = Cmd::new(checkout::binary("cairn")).args(arguments).output()?;
        let is_told = told.code != Some(0) && told.stderr.contains("daemon of this mount is gone");
        ensure!(is_told, "cairn {arguments:?} does not tell:\n{}", told.both());
    }
    let again = Cmd::new(checkout::binary("mount.cairn")).arg(volume.target()).arg(volume.dir());
    let again = again.limit(Duration::from_secs(60)).output()?;
    let is_told = again.code == Some(32) && again.stderr.contains("is gone; run umount");
    ensure!(is_told, "a mount over the dead one does not tell:\n{}", again.both());
    // The mount has to go by force.
    volume.mount_is_gone();
    volume.mount().context("after the server was killed")?;
    for (number, promises) in kept.iter().enumerate() {
        compare(&dir, number, promises)?;
    }
    volume.unmount()?;
    volume.check()?;
    Ok(kept.iter().map(|promises| promises.files.len() + promises.gone.len()).sum())
}

/// Works until the first error, which is the server's death. Returns what was promised until then.
fn write_until_it_dies(dir: &Path, writer: usize, seed: u64, stop: &AtomicBool) -> Promises {
    let mut promises = Promises::default();
    let mut random = Random(seed);
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) && n < 100_000 {
        n += 1;
        if one_change(dir, writer, n, &mut random, &mut promises).is_err() {
            break;
        }
    }
    promises
}

fn one_change(
    dir: &Path,
    writer: usize,
    n: u64,
    random: &mut Random,
    promises: &mut Promises,
) -> std::io::Result<()> {
    let name = format!("w{writer}-{n}");
    let mut bytes = vec![0; random.below(60_000)];
    random.fill(&mut bytes);
    match random.below(4) {
        // A new file under a name it was not created with.
        0 => {
            let first = dir.join(format!("{name}.new"));
            let mut file = File::create(&first)?;
            file.write_all(&bytes)?;
            fs::rename(&first, dir.join(&name))?;
            file.sync_all()?;
            promises.files.insert(name, bytes);
        }
        // A file that is always replaced and never missing.
        1 => {
            let new = dir.join(format!("{name}.tmp"));
            let mut file = File::create(&new)?;
            file.write_all(&generation(n))?;
            file.sync_all()?;
            fs::rename(&new, dir.join(format!("w{writer}-current")))?;
            File::open(dir)?.sync_all()?;
            promises.generation = n;
        }
        // A removal, made durable by the directory. The promise to keep the file ends before it.
        2 => {
            let Some(victim) = promises.files.keys().next().cloned() else { return Ok(()) };
            promises.files.remove(&victim);
            fs::remove_file(dir.join(&victim))?;
            File::open(dir)?.sync_all()?;
            promises.gone.push(victim);
        }
        _ => {
            let mut file = File::create(dir.join(&name))?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            promises.files.insert(name, bytes);
        }
    }
    Ok(())
}

/// The content of the file that is always replaced: its number, and bytes that follow from it.
fn generation(n: u64) -> Vec<u8> {
    let mut bytes = vec![0; 8 + (n as usize * 977) % 60_000];
    Random(2 * n + 1).fill(&mut bytes);
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes
}

fn compare(dir: &Path, writer: usize, promises: &Promises) -> Result<()> {
    for (name, bytes) in &promises.files {
        let found = fs::read(dir.join(name)).with_context(|| format!("synced file {name}"))?;
        ensure!(found == *bytes, "synced file {name} has other content");
    }
    for name in &promises.gone {
        ensure!(!dir.join(name).exists(), "{name} was removed and synced, and is back");
    }
    if promises.generation > 0 {
        let current = fs::read(dir.join(format!("w{writer}-current")))?;
        let found = current.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let promised = promises.generation;
        ensure!(found >= promised, "generation {found} after {promised} was synced");
        ensure!(current == generation(found), "generation {found} is not whole");
    }
    Ok(())
}

/// Kills the server of a mount.
pub(super) fn kill_server(target: &Path, dir: &Path) -> Result<()> {
    signal(crate::subject::server_of(target, dir)?, Signal::KILL)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process number")?;
    kill_process(pid, signal).context("cannot signal the server")
}

/// SIGTERM unmounts cleanly: nothing is lost, nothing is left to replay.
///
/// # Errors
/// When the mount stays, or something is missing.
pub fn terminate(suite: &Suite<'_>) -> Result<Outcome> {
    for backing in [Backing::File, Backing::Loop] {
        let mut volume = Volume::create(suite.subject, backing, 1 << 30)?;
        volume.mount()?;
        let path = volume.dir().join("not-synced");
        fs::write(&path, vec![7; 5_000_000])?;
        // Writeback belongs to the kernel and ends with the mount; the server must wait for it.
        Cmd::new("sync").quiet()?;
        fs::write(volume.dir().join("small"), b"just now")?;
        Cmd::new("sync").quiet()?;
        let pid = volume.server()?;
        signal(pid, Signal::TERM)?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while guard::is_mounted(volume.dir()) {
            if Instant::now() > deadline {
                bail!("{backing:?}: still mounted 20 s after SIGTERM");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        volume.mount_is_gone();
        volume.check()?;
        volume.mount()?;
        ensure!(fs::read(&path)? == vec![7; 5_000_000], "{backing:?}: content differs");
        let small = fs::read(volume.dir().join("small"))?;
        ensure!(small == b"just now", "{backing:?}: the newest file differs");
        volume.finish()?;
    }
    Ok(Outcome::Passed("unmounted, nothing lost".into()))
}
