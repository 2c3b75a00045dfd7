//! A full filesystem: whoever writes learns of it, and what was acknowledged is there.
//!
//! A driver behind the kernel's page cache accepts more than there is room for. Here programs do
//! what they do on a small image until it is full: each has to end with "no space left", whatever
//! tells it (a write, a sync or a close), and what succeeded is compared after mounting again.

use super::Suite;
use crate::checkout;
use crate::random::{Aligned, Random};
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::volume::{Backing, Volume};
use anyhow::{bail, ensure, Context, Result};
use rustix::fs::{fallocate, FallocateFlags, OFlags};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const POOL_BYTES: u64 = 64 << 20;
const PIECE: usize = 1 << 20;
/// How much more than there is room for a writer may be rid of before it is told.
const TAKEN_MAX: u64 = 4 * POOL_BYTES;
/// Longer than a program writes that is told in time.
const LIMIT: Duration = Duration::from_secs(120);

/// Fills a filesystem in each way.
///
/// # Errors
/// When something is lost that nobody was told of.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let mut volume = Volume::create(suite.subject, Backing::Loop, POOL_BYTES)?;
    volume.mount()?;
    let source = volume.image().with_file_name("source");
    fs::write(&source, noise(1, 2 * POOL_BYTES as usize))?;
    for command in COMMANDS {
        program(volume.dir(), &source, command).with_context(|| command.join(" "))?;
    }
    endless(&mut volume).context("a writer that does not stop by itself")?;
    copies(&mut volume, &source).context("copies of small files")?;
    for (what, flag) in [("O_DIRECT", OFlags::DIRECT), ("O_DSYNC", OFlags::DSYNC)] {
        acknowledged(&mut volume, Some(flag)).context(what)?;
    }
    acknowledged(&mut volume, None).context("fsync after each write")?;
    promised(&mut volume).context("fallocate")?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{} programs, 5 ways to be sure", COMMANDS.len())))
}

/// What people copy with: `SOURCE` is twice as long as there is room, `FILE` on the filesystem.
const COMMANDS: [&[&str]; 7] = [
    &["cp", "SOURCE", "FILE"],
    &["dd", "if=SOURCE", "of=FILE", "bs=64k"],
    &["dd", "if=SOURCE", "of=FILE", "bs=64k", "conv=fsync"],
    &["dd", "if=SOURCE", "of=FILE", "bs=64k", "oflag=direct"],
    &["sh", "-c", "exec cat SOURCE > FILE"],
    &["sh", "-c", "while cat SOURCE; do :; done 2> /dev/null | dd of=FILE bs=1M"],
    &["tar", "-cf", "FILE", "SOURCE"],
];

fn program(dir: &Path, source: &Path, command: &[&str]) -> Result<()> {
    let said = refused(dir, source, command)?;
    ensure!(said.contains("No space left on device"), "it says: {said}");
    Ok(())
}

/// What a command says that copies more than fits.
fn refused(dir: &Path, source: &Path, command: &[&str]) -> Result<String> {
    let target = dir.join("file");
    let (source, name) = (source.display().to_string(), target.display().to_string());
    let words: Vec<String> =
        command.iter().map(|word| word.replace("SOURCE", &source).replace("FILE", &name)).collect();
    let out = Cmd::new(&words[0]).args(&words[1..]).limit(LIMIT).output()?;
    ensure!(out.code != Some(0), "it says that everything fitted");
    fs::remove_file(&target)?;
    Ok(out.stderr)
}

/// At the limit of a subvolume a writer is told the truth, too: nothing says that a device fails,
/// and the rest of the pool takes what does not fit there.
///
/// # Errors
/// When somebody is told something else, or nothing.
pub fn limits(suite: &Suite<'_>) -> Result<Outcome> {
    let mut volume = Volume::create(suite.subject, Backing::Loop, POOL_BYTES)?;
    volume.mount()?;
    let source = volume.image().with_file_name("source");
    fs::write(&source, noise(1, POOL_BYTES as usize / 2))?;
    let dir = volume.dir().join("limited");
    for words in [&["create"][..], &["limit", "--referenced", "8M"]] {
        let command = Cmd::new(checkout::binary("cairn"));
        command.arg("subvolume").args(words).arg(&dir).quiet()?;
    }
    for command in COMMANDS {
        let said = refused(&dir, &source, command).with_context(|| command.join(" "))?;
        let is_told = ["No space left on device", "Disk quota exceeded"];
        ensure!(is_told.iter().any(|told| said.contains(told)), "it says: {said}");
        ensure!(!said.contains("Input/output error"), "it says: {said}");
    }
    let beside = volume.dir().join("beside");
    fs::copy(&source, &beside)?;
    File::open(&beside)?.sync_all().context("beside the subvolume")?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{} programs", COMMANDS.len())))
}

/// Who goes on writing, and never syncs or closes, is told; what is written when there is room
/// again is stored.
fn endless(volume: &mut Volume<'_>) -> Result<()> {
    let other = volume.dir().join("other");
    fs::write(&other, noise(6, POOL_BYTES as usize / 4))?;
    File::open(&other)?.sync_all()?;
    let path = volume.dir().join("file");
    let mut file = OpenOptions::new().read(true).append(true).create_new(true).open(&path)?;
    let piece = noise(7, PIECE);
    let mut taken = 0;
    let error = loop {
        match file.write_all(&piece) {
            Ok(()) => taken += PIECE as u64,
            Err(error) => break error,
        }
        ensure!(taken < TAKEN_MAX, "{taken} bytes were taken, and it goes on");
    };
    no_space(&error)?;
    let size = file.metadata()?.len();
    ensure!(file.read_at(&mut [0; PIECE], size - 100)? == 100, "it cannot be read any more");
    // It may have been told of everything.
    let _ = file.sync_data();
    std::thread::sleep(Duration::from_secs(2));
    fs::remove_file(&other)?;
    file.write_all(&piece).context("there is room again")?;
    file.sync_data().context("there is room again")?;
    let end = file.metadata()?.len() - PIECE as u64;
    drop(file);
    volume.remount()?;
    let found = fs::read(&path)?;
    ensure!(found.get(end as usize..) == Some(&piece[..]), "what was synced at last is lost");
    empty(volume.dir())
}

/// Files that `cp` says it has copied have their content, the last before the first refusal too.
fn copies(volume: &mut Volume<'_>, source: &Path) -> Result<()> {
    let small = source.with_file_name("small");
    let content = noise(2, 300_000);
    fs::write(&small, &content)?;
    let mut copied: Vec<PathBuf> = Vec::new();
    let mut refused = 0;
    while refused < 20 {
        let target = volume.dir().join(format!("copy-{}", copied.len() + refused));
        let out = Cmd::new("cp").args([&small, &target]).output()?;
        match out.code == Some(0) {
            true => copied.push(target),
            false => refused += 1,
        }
        ensure!(copied.len() as u64 * 300_000 < POOL_BYTES, "more fitted than there is room for");
    }
    volume.remount()?;
    for path in &copied {
        ensure!(fs::read(path)? == content, "{} differs", path.display());
    }
    empty(volume.dir())
}

/// Writes until there is no room, making each piece durable; what was acknowledged is there.
fn acknowledged(volume: &mut Volume<'_>, flag: Option<OFlags>) -> Result<()> {
    let path = volume.dir().join("file");
    let flags = i32::try_from(flag.unwrap_or(OFlags::empty()).bits()).context("flags fit")?;
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&path)?;
    let mut piece = Aligned::new(PIECE)?;
    let mut random = Random(3);
    let mut expected = Vec::new();
    let error = loop {
        random.fill(piece.bytes());
        let written = file.write_all_at(piece.bytes(), expected.len() as u64);
        let synced = written.and_then(|()| if flag.is_none() { file.sync_data() } else { Ok(()) });
        match synced {
            Ok(()) => expected.extend_from_slice(piece.bytes()),
            Err(error) => break error,
        }
        ensure!((expected.len() as u64) < POOL_BYTES, "more fitted than there is room for");
    };
    no_space(&error)?;
    ensure!(expected.len() as u64 > POOL_BYTES / 2, "only {} bytes fitted", expected.len());
    drop(file);
    volume.remount()?;
    let found = fs::read(&path)?;
    ensure!(found.get(..expected.len()) == Some(&expected[..]), "what was acknowledged is lost");
    empty(volume.dir())
}

/// Room that was promised is there when the rest is full.
fn promised(volume: &mut Volume<'_>) -> Result<()> {
    let path = volume.dir().join("promised");
    let mut file = File::create_new(&path)?;
    let content = noise(4, 10 * PIECE);
    fallocate(&file, FallocateFlags::empty(), 0, content.len() as u64)?;
    let other = File::create_new(volume.dir().join("file"))?;
    let fill = noise(5, PIECE);
    let error = loop {
        let filled = (&other).write_all(&fill).and_then(|()| other.sync_data());
        if let Err(error) = filled {
            break error;
        }
    };
    no_space(&error)?;
    file.write_all(&content)?;
    file.sync_data()?;
    drop((file, other));
    volume.remount()?;
    ensure!(fs::read(&path)? == content, "the file differs");
    empty(volume.dir())
}

fn no_space(error: &io::Error) -> Result<()> {
    if error.raw_os_error() != Some(Errno::NOSPC.raw_os_error()) {
        bail!("it ended with: {error}");
    }
    Ok(())
}

/// Removes what a full filesystem holds, which always succeeds.
fn empty(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::remove_file(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    Ok(())
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random(seed).fill(&mut bytes);
    bytes
}
