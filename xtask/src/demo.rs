//! `cargo xtask demo`: from nothing to a checked filesystem, each step shown with what it did.

use crate::checkout;
use crate::need;
use crate::run::Cmd;
use crate::subject;
use crate::suites::copy_sources;
use crate::volume::{Backing, Volume};
use anyhow::{ensure, Context, Result};
use rustix::fs::{setxattr, statvfs, XattrFlags};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{symlink, MetadataExt};
use std::path::Path;
use std::time::Instant;

const IMAGE_BYTES: u64 = 2 << 30;
const MIB: u64 = 1 << 20;

/// Runs the demonstration.
///
/// # Errors
/// When a step fails or shows something else than it should.
pub fn run(name: &str) -> Result<()> {
    let subject = subject::by_name(name)?;
    title("Set-up");
    need::tools(need::MOUNT)?;
    if name == "cairn" {
        need::release_build()?;
    }
    done("programs are built and tools are there");

    title("A filesystem in an image file");
    let backing = if name == "cairn" { Backing::File } else { Backing::Loop };
    let mut volume = Volume::blank(&*subject, backing, IMAGE_BYTES)?;
    say(&format!("image: {} ({} GiB, sparse)", volume.image().display(), IMAGE_BYTES >> 30));
    volume.format()?;
    let taken = fs::metadata(volume.image())?.blocks() * 512;
    done(&format!("mkfs wrote {}", size(taken)));

    title("Mounted");
    volume.mount()?;
    let dir = volume.dir().to_owned();
    let table = fs::read_to_string("/proc/self/mounts")?;
    let row = table.lines().find(|row| row.split(' ').nth(1) == dir.to_str());
    say(row.context("the mount table does not show the mount")?);
    show_space(&dir)?;

    title("Files");
    files(&dir)?;
    title("Names, links, attributes");
    names(&dir)?;
    title("Compression");
    compression(&dir)?;
    title("A copy that shares its data");
    shared_copy(&dir)?;
    title("A sparse file");
    sparse(&dir)?;
    show_space(&dir)?;

    title("Unmounted and checked");
    let before = hashes(&dir)?;
    let start = Instant::now();
    volume.unmount()?;
    say(&format!("unmounted in {:.2} s", start.elapsed().as_secs_f64()));
    let start = Instant::now();
    volume.check()?;
    done(&format!("the checker found nothing wrong in {:.2} s", start.elapsed().as_secs_f64()));

    title("Mounted again");
    volume.mount()?;
    let after = hashes(&dir)?;
    ensure!(before == after, "content differs after mounting again");
    done(&format!("{} files have the hashes they had", after.len()));
    volume.finish()?;
    done("unmounted; the checker is content");
    Ok(())
}

fn files(dir: &Path) -> Result<()> {
    let start = Instant::now();
    let sources = dir.join("sources");
    copy_sources(&sources)?;
    let before = hashes(checkout::root().join("fs-core").as_path())?;
    let after = hashes(&sources.join("fs-core"))?;
    for (name, hash) in &after {
        ensure!(before.get(name) == Some(hash), "{name} was copied wrongly");
    }
    done(&format!(
        "copied cairn's own sources in {:.2} s, {} files compared by SHA-256",
        start.elapsed().as_secs_f64(),
        after.len()
    ));
    let text = fs::read_to_string(sources.join("README.md"))?;
    let path = sources.join("README.md");
    let mut file = fs::OpenOptions::new().append(true).open(&path)?;
    file.write_all(b"One line more.\n")?;
    file.sync_all()?;
    ensure!(fs::read_to_string(&path)? == text + "One line more.\n", "the line is not there");
    done("appended a line and synced it");
    Ok(())
}

fn names(dir: &Path) -> Result<()> {
    fs::rename(dir.join("sources"), dir.join("cairn"))?;
    ensure!(!dir.join("sources").exists(), "the old name is still there");
    done("renamed a directory with all that is in it");
    let file = dir.join("cairn/README.md");
    fs::hard_link(&file, dir.join("second-name"))?;
    let (one, two) = (fs::metadata(&file)?, fs::metadata(dir.join("second-name"))?);
    ensure!(one.ino() == two.ino() && one.nlink() == 2, "the names are not of one file");
    done(&format!("hard link: inode {} has {} names", one.ino(), one.nlink()));
    symlink("cairn/README.md", dir.join("link"))?;
    ensure!(fs::metadata(dir.join("link"))?.ino() == one.ino(), "the link leads elsewhere");
    done("symbolic link leads to it");
    setxattr(&file, "user.colour", b"green", XattrFlags::CREATE)?;
    let mut value = [0; 16];
    let bytes = rustix::fs::getxattr(dir.join("second-name"), "user.colour", &mut value)?;
    ensure!(value[..bytes] == *b"green", "the attribute has another value");
    done("extended attribute user.colour=green, read through the other name");
    Ok(())
}

fn compression(dir: &Path) -> Result<()> {
    let before = free(dir)?;
    let path = dir.join("log.txt");
    let mut file = std::io::BufWriter::new(File::create(&path)?);
    for n in 0..1_600_000 {
        writeln!(file, "2031-05-17T08:{:02}:{:02} unit {} answered", n / 60 % 60, n % 60, n % 977)?;
    }
    file.into_inner()?.sync_all()?;
    sync(dir)?;
    let metadata = fs::metadata(&path)?;
    let took = before.saturating_sub(free(dir)?);
    let stored = size(metadata.blocks() * 512);
    done(&format!("a text of {} is stored in {stored}; df: {}", size(metadata.len()), size(took)));
    Ok(())
}

fn shared_copy(dir: &Path) -> Result<()> {
    let original = dir.join("random");
    let mut noise = File::open("/dev/urandom")?.take(64 * MIB);
    let mut file = File::create(&original)?;
    std::io::copy(&mut noise, &mut file)?;
    file.sync_all()?;
    sync(dir)?;
    let before = free(dir)?;
    let start = Instant::now();
    let copy = dir.join("copy");
    Cmd::new("cp").arg("--reflink=auto").args([&original, &copy]).quiet()?;
    let took = start.elapsed();
    sync(dir)?;
    let used = before.saturating_sub(free(dir)?);
    let (one, two) = (hash(&original)?, hash(&copy)?);
    ensure!(one == two, "the copy differs");
    let seconds = took.as_secs_f64();
    done(&format!("cp --reflink=auto of 64 MiB took {seconds:.2} s and {}", size(used)));
    let mut file = fs::OpenOptions::new().write(true).open(&copy)?;
    file.seek(SeekFrom::Start(10 * MIB))?;
    file.write_all(b"changed")?;
    file.sync_all()?;
    ensure!(hash(&original)? == one, "writing to the copy has changed the original");
    ensure!(hash(&copy)? != two, "the copy has not changed");
    done("writing to the copy left the original alone");
    Ok(())
}

fn sparse(dir: &Path) -> Result<()> {
    let mut file = File::create(dir.join("sparse"))?;
    file.seek(SeekFrom::Start(1 << 40))?;
    file.write_all(b"the end")?;
    file.sync_all()?;
    let metadata = file.metadata()?;
    let stored = metadata.blocks() * 512;
    ensure!(stored < MIB, "a hole takes {stored} bytes");
    done(&format!(
        "a file of {} with seven bytes of content at its end takes {}",
        size(metadata.len()),
        size(stored)
    ));
    Ok(())
}

/// SHA-256 of every regular file below `dir`, by path. Sparse ones are left out: reading a hole of
/// a TiB takes long on any filesystem.
fn hashes(dir: &Path) -> Result<BTreeMap<String, String>> {
    let script = "find . -type f ! -name sparse ! -path './target/*' -print0 \
                  | sort -z | xargs -0 -r sha256sum";
    let text = Cmd::shell(script).dir(dir).text()?;
    let rows = text.lines().filter_map(|line| line.split_once("  "));
    Ok(rows.map(|(hash, name)| (name.to_owned(), hash.to_owned())).collect())
}

fn hash(path: &Path) -> Result<String> {
    let text = Cmd::new("sha256sum").arg(path).text()?;
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

fn free(dir: &Path) -> Result<u64> {
    let stat = statvfs(dir)?;
    Ok(stat.f_bfree * stat.f_frsize)
}

/// Makes `df` current: what is written later counts later.
fn sync(dir: &Path) -> Result<()> {
    Cmd::new("sync").arg("-f").arg(dir).quiet()
}

fn show_space(dir: &Path) -> Result<()> {
    sync(dir)?;
    let stat = statvfs(dir)?;
    let total = stat.f_blocks * stat.f_frsize;
    let free = stat.f_bfree * stat.f_frsize;
    let available = stat.f_bavail * stat.f_frsize;
    say(&format!(
        "df: {} in all, {} used, {} available",
        size(total),
        size(total - free),
        size(available)
    ));
    Ok(())
}

/// A size for people.
fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0);
    format!("{value:.digits$} {}", units[unit])
}

fn title(text: &str) {
    println!("\n{text}");
}

fn say(text: &str) {
    println!("    {text}");
}

fn done(text: &str) {
    println!("  + {text}");
}
