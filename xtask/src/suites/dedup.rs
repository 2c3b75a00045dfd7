//! `cairn dedup` on a mount, by itself and while programs write.

use super::Suite;
use crate::random::Random;
use crate::run::{Cmd, Output};
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const BLOCK: usize = 128 << 10;
/// What the metadata of sharing may take.
const METADATA_BYTES: u64 = 4 << 20;
/// Files of each writer.
const FILES: usize = 8;
/// Blocks of a file.
const BLOCKS: usize = 24;
/// Kinds of blocks: of the few there are, many are equal.
const KINDS: u64 = 6;

/// Runs it.
///
/// # Errors
/// When sharing changes what a file holds, room is not given back, or the checker is not content.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut volume = suite.volume()?;
    let dir = volume.dir().to_path_buf();
    alone(&dir).context("nobody writes")?;
    refusals(&dir).context("what cannot be shared")?;
    let work = dir.join("work");
    fs::create_dir(&work)?;
    let rounds = if suite.long { 2000 } else { 120 };
    let (files, shared) = while_written(&work, rounds).context("while programs write")?;
    compare(&files).context("after that")?;
    volume.remount()?;
    compare(&files).context("after a remount")?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{} MiB shared under load", shared >> 20)))
}

fn command(options: &[&str], paths: &[&Path]) -> Cmd {
    Cmd::new(checkout::binary("cairn")).arg("dedup").args(options).args(paths)
}

/// What it says of a run in which nothing goes wrong.
fn dedup(options: &[&str], path: &Path) -> Result<Value> {
    let out = command(&["--json"], &[]).args(options).arg(path).output()?;
    ensure!(out.code == Some(0), "cairn dedup {options:?}: {}", out.both());
    Ok(serde_json::from_str(&out.stdout)?)
}

fn number(of: &Value, name: &str) -> u64 {
    of[name].as_u64().unwrap_or(u64::MAX)
}

/// A block of a kind: every other kind compresses.
fn block(kind: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    Random(kind + 1).fill(&mut bytes);
    if kind % 2 == 1 {
        bytes.iter_mut().for_each(|byte| *byte = b'a' + *byte % 4);
    }
    bytes
}

/// What may still be written, once all is stored.
fn available(dir: &Path) -> Result<u64> {
    let sync = || Cmd::new(checkout::binary("cairn")).arg("sync").arg(dir).quiet();
    // What one group gives up comes free with the next.
    sync().and_then(|()| sync())?;
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail * stat.f_frsize)
}

fn alone(dir: &Path) -> Result<()> {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("below"))?;
    let mut content: Vec<u8> = (100..132).flat_map(|kind| block(kind * 2)).collect();
    content.extend_from_slice(b"a tail that is no whole sector");
    let bytes = content.len() as u64;
    let names = ["one", "two", "below/three"].map(|name| tree.join(name));
    for name in &names {
        fs::write(name, &content)?;
    }
    fs::hard_link(&names[0], tree.join("link"))?;
    std::os::unix::fs::symlink(dir.join("elsewhere"), tree.join("symlink"))?;
    fs::write(dir.join("elsewhere"), &content)?;
    fs::write(tree.join("small"), "small")?;
    let sparse = File::create(tree.join("sparse"))?;
    sparse.set_len(1 << 40)?;
    sparse.write_all_at(&content[..BLOCK], (1 << 40) - BLOCK as u64)?;
    let before = available(dir)?;
    let times = |name: &PathBuf| -> Result<[i64; 6]> {
        let data = fs::metadata(name)?;
        Ok([
            data.atime(),
            data.atime_nsec(),
            data.mtime(),
            data.mtime_nsec(),
            data.ctime(),
            data.ctime_nsec(),
        ])
    };
    let old: Vec<_> = names.iter().map(times).collect::<Result<_>>()?;
    let expected = 2 * bytes + BLOCK as u64;
    let dry = dedup(&["-n"], &tree)?;
    ensure!(number(&dry, "shared") == expected && number(&dry, "shared_files") == 3, "-n: {dry}");
    ensure!(number(&dry, "files") == 4, "of five names two are one file, and one is small: {dry}");
    ensure!(available(dir)?.abs_diff(before) < METADATA_BYTES, "-n changed something");
    let done = dedup(&[], &tree)?;
    ensure!(number(&done, "shared") == expected && number(&done, "errors") == 0, "{done}");
    let freed = available(dir)?.saturating_sub(before);
    ensure!(freed + METADATA_BYTES > expected, "{freed} bytes of {expected} came free");
    let again = dedup(&[], &tree)?;
    ensure!(number(&again, "shared") == 0, "again: {again}");
    ensure!(number(&again, "shared_before") == expected, "again: {again}");
    ensure!(number(&again, "read") == bytes, "what is shared was read again: {again}");
    ensure!(names.iter().map(times).collect::<Result<Vec<_>>>()? == old, "times have moved");
    for name in names.iter().chain([&tree.join("link"), &dir.join("elsewhere")]) {
        ensure!(fs::read(name)? == content, "{} holds something else", name.display());
    }
    let mut end = vec![0; BLOCK];
    File::open(tree.join("sparse"))?.read_exact_at(&mut end, (1 << 40) - BLOCK as u64)?;
    ensure!(end == content[..BLOCK], "the sparse file holds something else");
    // Apart again.
    OpenOptions::new().write(true).open(&names[1])?.write_all_at(b"other", 5000)?;
    ensure!(fs::read(&names[0])? == content, "a write to one shows in the other");
    small_blocks(dir)
}

/// Blocks of a sector, in files that are shifted against each other.
fn small_blocks(dir: &Path) -> Result<()> {
    let shifted = dir.join("shifted");
    fs::create_dir(&shifted)?;
    let content: Vec<u8> = (40..48).flat_map(|kind| block(kind * 2)).collect();
    fs::write(shifted.join("one"), &content)?;
    fs::write(shifted.join("two"), [&[7; 4096][..], &content].concat())?;
    let large = dedup(&["-n"], &shifted)?;
    ensure!(number(&large, "shared") == 0, "{large}");
    let small = dedup(&["-b", "4K", "--memory", "1"], &shifted)?;
    ensure!(number(&small, "shared") == content.len() as u64, "{small}");
    ensure!(fs::read(shifted.join("one"))? == content, "another content");
    ensure!(fs::read(shifted.join("two"))?[4096..] == content, "another content");
    Ok(())
}

fn refusals(dir: &Path) -> Result<()> {
    let cairn = |words: &[&str], path: &Path| {
        Cmd::new(checkout::binary("cairn")).args(words).arg(path).quiet()
    };
    let below = dir.join("below");
    cairn(&["subvolume", "create"], &below)?;
    let content: Vec<u8> = (60..64).flat_map(block).collect();
    fs::write(dir.join("original"), &content)?;
    fs::write(below.join("equal"), &content)?;
    fs::write(below.join("frozen"), &content)?;
    // In another subvolume: nothing is tried.
    let pair = [dir.join("original"), below.join("equal")];
    let out = command(&["--json"], &[&pair[0], &pair[1]]).output()?;
    let said: Value = serde_json::from_str(&out.stdout)?;
    ensure!(out.code == Some(0) && number(&said, "shared") == 0, "{}", out.both());
    // An immutable file is named; the others are shared.
    fs::write(below.join("a third"), &content)?;
    Cmd::new("chattr").arg("+i").arg(below.join("frozen")).quiet()?;
    let out = command(&["--json"], &[&below]).output()?;
    Cmd::new("chattr").arg("-i").arg(below.join("frozen")).quiet()?;
    let said: Value = serde_json::from_str(&out.stdout)?;
    let shared = number(&said, "shared");
    // Unless it is the first of them, and the others share with it.
    let is_told = out.code == Some(4) && out.stderr.contains("frozen: is immutable");
    let bytes = content.len() as u64;
    ensure!(
        is_told && shared == bytes || out.code == Some(0) && shared == 2 * bytes,
        "{}",
        out.both()
    );
    let mut at = below.as_os_str().to_owned();
    at.push("@then");
    cairn(&["snapshot", "create"], Path::new(&at))?;
    let snapshot = below.join(".cairn/snapshot/then");
    let (elsewhere, link) = (std::env::temp_dir(), dir.join("tree/symlink"));
    for (path, code, said) in [
        (&*snapshot, 4, "stays as it is"),
        (&*elsewhere, 1, "not on a mounted cairn pool"),
        (&*dir.join("no such file"), 1, "No such file"),
        (&*link, 1, "symbolic link"),
    ] {
        let out = command(&[], &[path]).output()?;
        ensure!(out.code == Some(code) && out.stderr.contains(said), "{said}: {}", out.both());
    }
    for options in [["-b", "3K"], ["-b", "2M"]] {
        let out: Output = command(&options, &[dir]).output()?;
        ensure!(out.code == Some(2), "{options:?}: {}", out.both());
    }
    let guest = Cmd::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let out = guest.arg(checkout::binary("cairn")).arg("dedup").arg(dir).output()?;
    ensure!(out.code == Some(1) && out.stderr.contains("only root"), "a guest: {}", out.both());
    Ok(())
}

/// Files with what they must hold.
type Expected = Vec<(PathBuf, Vec<u8>)>;

/// Three programs write blocks of few kinds to files of their own, while others are shared, and
/// read back what they wrote.
fn while_written(dir: &Path, rounds: usize) -> Result<(Expected, u64)> {
    let has_ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let write = |number: usize| {
            let written = writer(&dir.join(format!("writer-{number}")), number as u64, rounds);
            written.with_context(|| format!("writer {number}"))
        };
        let writers: Vec<_> = (0..3).map(|number| scope.spawn(move || write(number))).collect();
        let sharing = scope.spawn(|| {
            let mut shared = 0;
            loop {
                let was_last = has_ended.load(Ordering::SeqCst);
                let done = dedup(&["-b", "64K"], dir)?;
                shared += number(&done, "shared");
                if was_last {
                    return anyhow::Ok(shared);
                }
            }
        });
        let written: Result<Vec<Expected>> =
            writers.into_iter().map(|writer| writer.join().expect("a writer panicked")).collect();
        has_ended.store(true, Ordering::SeqCst);
        let shared = sharing.join().expect("whoever shares panicked")?;
        ensure!(shared > 0, "nothing was shared");
        Ok((written?.concat(), shared))
    })
}

fn writer(dir: &Path, seed: u64, rounds: usize) -> Result<Expected> {
    fs::create_dir(dir)?;
    let mut random = Random(seed + 5);
    let mut all: Expected = Vec::new();
    for number in 0..FILES {
        let path = dir.join(number.to_string());
        let content: Vec<u8> =
            (0..BLOCKS).flat_map(|_| block(random.below(KINDS as usize) as u64)).collect();
        fs::write(&path, &content)?;
        all.push((path, content));
    }
    for round in 0..rounds {
        let (path, content) = &mut all[random.below(FILES)];
        let file = OpenOptions::new().read(true).write(true).open(&*path)?;
        let at = random.below(BLOCKS) * BLOCK;
        // A whole block, or what is not aligned to anything.
        let (at, bytes) = match random.below(3) {
            0 => (at + random.below(BLOCK / 2), block(seed + 50)[..random.below(9000) + 1].into()),
            _ => (at, block(random.below(KINDS as usize) as u64)),
        };
        file.write_all_at(&bytes, at as u64)?;
        content[at..at + bytes.len()].copy_from_slice(&bytes);
        match random.below(8) {
            0 => file.sync_data()?,
            1 => {
                let size = random.below(BLOCKS * BLOCK);
                file.set_len(size as u64)?;
                file.set_len((BLOCKS * BLOCK) as u64)?;
                content[size..].fill(0);
            }
            _ => {}
        }
        let mut found = vec![0; content.len()];
        if round % 8 == 0 {
            file.sync_all()?;
            // From the server, not from the kernel's cache.
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        file.read_exact_at(&mut found, 0)?;
        ensure!(found == *content, "{} holds something else in round {round}", path.display());
    }
    Ok(all)
}

fn compare(files: &Expected) -> Result<()> {
    for (path, content) in files {
        ensure!(fs::read(path)? == *content, "{} holds something else", path.display());
    }
    Ok(())
}
