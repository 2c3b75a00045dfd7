//! Properties of subvolumes on a mount: what is set, what is inherited, and that both hold.

use super::Suite;
use crate::random::Random;
use crate::run::{Cmd, Output};
use crate::steps::Outcome;
use crate::volume::Volume;
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use rustix::fs::{fadvise, statx, Advice, AtFlags, StatxFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

const FILE_BYTES: usize = 4 << 20;
/// More than any file of that size takes when it is packed.
const PACKED_BYTES_MAX: u64 = 1 << 20;

/// Runs it.
///
/// # Errors
/// When a property does not do, or is not, what it is set to.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut volume = suite.volume()?;
    let (above, below) = (volume.dir().join("above"), volume.dir().join("above/below"));
    for dir in [&above, &below] {
        works("subvolume", &["create"], dir)?;
    }
    compression(&above, &below).context("compression")?;
    read_only(&above, &below).context("readonly")?;
    access_times(&above).context("atime")?;
    works("set", &["org:note=kept \u{e9}", "checksum=blake3"], &above)?;
    let look = |above: &str, below: &str| -> Result<()> {
        is_shown(above, "compression", "none", "local")?;
        is_shown(below, "compression", "none", "inherited from above")?;
        is_shown(below, "checksum", "blake3", "inherited from above")?;
        is_shown(below, "atime", "off", "inherited from above")?;
        is_shown(below, "org:note", "kept \u{e9}", "inherited from above")?;
        is_shown(below, "readonly", "off", "default")?;
        is_shown(below, "own-limit", "none", "default")?;
        is_shown(below, "type", "subvolume", "-")
    };
    let (above_name, below_name) = (above.display().to_string(), below.display().to_string());
    look(&above_name, &below_name)?;
    volume.remount()?;
    look(&above_name, &below_name).context("after a remount")?;
    refusals(&above)?;
    stranger(&above).context("somebody else")?;
    offline(&mut volume, look).context("not mounted")?;
    volume.finish()?;
    Ok(Outcome::Passed("inherited, at once, after a remount, offline".into()))
}

/// New data is stored as the subvolume says, or the one that it is in, and files before both.
fn compression(above: &Path, below: &Path) -> Result<()> {
    let packs = |path: &Path| -> Result<bool> { Ok(stored(path)? < PACKED_BYTES_MAX) };
    works("set", &["compression=zstd:3"], above)?;
    ensure!(packs(&below.join("packed"))?, "below one that is compressed nothing is");
    works("set", &["compression=none"], above)?;
    ensure!(!packs(&below.join("plain"))?, "what is not to be compressed is");
    works("set", &["compression=zstd"], below)?;
    ensure!(packs(&below.join("own"))?, "its own choice does not count");
    works("inherit", &["compression"], below)?;
    ensure!(!packs(&below.join("again"))?, "its choice counts when it has none");
    // Properties of files go on.
    let file = below.join("file");
    File::create(&file)?;
    works("set", &["compression=zstd"], &file)?;
    ensure!(packs(&file)?, "the choice for a file does not count");
    is_shown(&file.display().to_string(), "compression", "zstd", "local")
}

/// Writes what packs well; returns what is stored of it.
fn stored(path: &Path) -> Result<u64> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(path)?;
    file.write_all(&vec![b'.'; FILE_BYTES])?;
    // With the group published; fsync would do with less.
    rustix::fs::syncfs(&file)?;
    // Not what the kernel remembers.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    Ok(statx(&file, "", flags, StatxFlags::BLOCKS)?.stx_blocks * 512)
}

/// Changes are refused where a file is open, too, and taken again.
fn read_only(above: &Path, below: &Path) -> Result<()> {
    let path = below.join("open");
    let mut content = vec![0; 1 << 20];
    Random(3).fill(&mut content);
    fs::write(&path, &content)?;
    let held = OpenOptions::new().read(true).write(true).open(&path)?;
    held.write_all_at(b"written before", 4096)?;
    content[4096..4110].copy_from_slice(b"written before");
    let gone = File::create(below.join("gone"))?;
    gone.set_len(1 << 20)?;
    fs::remove_file(below.join("gone"))?;
    works("set", &["readonly=on"], above)?;
    is_refused(held.write_all_at(b"after", 0)).context("a file that is open")?;
    is_refused(held.set_len(0)).context("cutting off a file that is open")?;
    is_refused(OpenOptions::new().write(true).open(&path)).context("opening")?;
    is_refused(File::create(below.join("new"))).context("a new file")?;
    is_refused(fs::rename(&path, below.join("other"))).context("renaming")?;
    is_refused(fs::remove_file(&path)).context("removing")?;
    is_refused(fs::create_dir(above.join("dir"))).context("above")?;
    drop(gone);
    held.sync_all().context("what was written before")?;
    ensure!(fs::read(&path)? == content, "a file is not what it was");
    // Beside it, and where it is chosen otherwise, all goes on.
    fs::write(above.with_file_name("beside"), "beside")?;
    works("set", &["readonly=off"], below)?;
    held.write_all_at(b"after", 0).context("chosen otherwise")?;
    works("inherit", &["readonly"], below)?;
    is_refused(held.write_all_at(b"again", 0)).context("chosen no more")?;
    works("inherit", &["readonly"], above)?;
    held.write_all_at(b"again", 0).context("taken again")?;
    held.sync_all()?;
    content[..5].copy_from_slice(b"again");
    ensure!(fs::read(&path)? == content, "a file is not what was written");
    Ok(())
}

fn is_refused<T>(outcome: std::io::Result<T>) -> Result<()> {
    match outcome {
        Ok(_) => anyhow::bail!("it was not refused"),
        Err(error) => {
            ensure!(error.kind() == ErrorKind::ReadOnlyFilesystem, "{error}");
            Ok(())
        }
    }
}

/// Reading changes access times when it is to.
fn access_times(above: &Path) -> Result<()> {
    let path = above.join("read");
    let long_ago = SystemTime::now() - Duration::from_secs(30 * 86400);
    let read_moves = |value: &str, name: &str| -> Result<bool> {
        works("set", &[&format!("atime={value}")], above)?;
        let path = path.with_extension(name);
        fs::write(&path, "content")?;
        let file = File::options().write(true).open(&path)?;
        let times = fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago);
        file.set_times(times)?;
        // Else the kernel would not ask for what it has.
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
        fs::read(&path)?;
        // The kernel asks again for what reading changes.
        Ok(fs::metadata(&path)?.accessed()? > long_ago + Duration::from_secs(86400))
    };
    ensure!(read_moves("on", "a")?, "reading does not show");
    ensure!(read_moves("relative", "b")?, "reading does not show after a day");
    ensure!(!read_moves("off", "c")?, "reading shows");
    Ok(())
}

fn refusals(above: &Path) -> Result<()> {
    let file = above.join("a-file");
    File::create(&file)?;
    for (word, name, said) in [
        ("compression=lzma", above, "cannot be"),
        ("atime=never", above, "off or relative or on"),
        ("colour=red", above, "no property"),
        ("created=1", above, "no property"),
        ("Org:x=1", above, "no property"),
        ("readonly=on", &*file, "is a file or directory"),
        ("org:x=1", &*file, "is a file or directory"),
        ("own-limit=0", above, "size"),
    ] {
        let out = cairn("set", &[word], name)?;
        let is_told = out.code != Some(0) && out.stderr.contains(said);
        ensure!(is_told && out.stderr.trim().lines().count() <= 3, "{word}: {}", out.both());
    }
    Ok(())
}

/// An ordinary user sets nothing of a subvolume, and what there is to set of files of his own.
fn stranger(above: &Path) -> Result<()> {
    let dir = above.join("of-nobody");
    fs::create_dir(&dir)?;
    std::os::unix::fs::chown(&dir, Some(65534), Some(65534))?;
    let binary = checkout::binary("cairn");
    let run = |words: &[&str], name: &Path| {
        let ids = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        Cmd::new("setpriv").args(ids).arg(&binary).args(words).arg(name).output()
    };
    if run(&["--version"], Path::new(""))?.code == Some(126) {
        return Ok(());
    }
    for words in [&["set", "readonly=on"][..], &["set", "org:note=x"], &["inherit", "org:note"]] {
        let out = run(words, above)?;
        ensure!(out.code == Some(1), "{words:?}: {}", out.both());
    }
    is_shown(&above.display().to_string(), "org:note", "kept \u{e9}", "local")?;
    is_shown(&above.display().to_string(), "readonly", "off", "default")?;
    let out = run(&["set", "compression=zstd:9"], &dir)?;
    ensure!(out.code == Some(0), "of his own: {}", out.both());
    Ok(())
}

/// The same commands on the pool when it is not mounted.
fn offline(volume: &mut Volume<'_>, look: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
    volume.unmount()?;
    let pool = volume.target().display().to_string();
    look(&format!("{pool}/above"), &format!("{pool}/above/below"))?;
    works("set", &["readonly=on", "org:note=changed"], Path::new(&format!("{pool}/above/below")))?;
    volume.mount()?;
    let below = volume.dir().join("above/below");
    is_shown(&below.display().to_string(), "org:note", "changed", "local")?;
    is_refused(File::create(below.join("new")))
}

/// A property and where it comes from, as `cairn get` shows them, alone and among all.
fn is_shown(name: &str, property: &str, value: &str, source: &str) -> Result<()> {
    let expected = format!("{name}\t{property}\t{value}\t{source}");
    for which in [property, "all"] {
        let out = Cmd::new(checkout::binary("cairn")).args(["get", "-H", which, name]).text()?;
        ensure!(out.lines().any(|line| line == expected), "{expected:?} is not in {out}");
    }
    Ok(())
}

fn cairn(command: &str, words: &[&str], name: &Path) -> Result<Output> {
    Cmd::new(checkout::binary("cairn")).arg(command).args(words).arg(name).output()
}

fn works(command: &str, words: &[&str], name: &Path) -> Result<()> {
    let out = cairn(command, words, name)?;
    ensure!(out.code == Some(0), "cairn {command} {words:?}: {}", out.both());
    Ok(())
}
