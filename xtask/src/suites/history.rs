//! A pool is mounted as it was some commits ago.
//!
//! Through FUSE, on a loop device: files are written, changed and removed, and after each sync it
//! is noted what there is and which group that is. Then each group that `cairn history` lists is
//! mounted, and must show what was noted, for as long as there is room for what was given up. When
//! there is none, a mount is refused with a sentence, or a read fails with EIO; what is read is
//! never anything else. No mount of an older group changes a byte of the image. In the end the
//! newest group is spoilt on the device, and `rewind` shows the one before.

use super::Suite;
use crate::random::Random;
use crate::run::{Cmd, Output};
use crate::steps::Outcome;
use crate::subject::MountOptions;
use crate::volume::{Backing, Volume};
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use serde_json::Value;
use std::collections::hash_map::DefaultHasher;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const IMAGE_BYTES: u64 = 512 << 20;
/// Files that there are at most.
const FILES: usize = 24;
/// Groups of which what they gave up is kept while there is room.
const KEPT: usize = 15;
const LIMIT: Duration = Duration::from_secs(300);
/// What read(2) says of what is gone.
const EIO: i32 = 5;

/// What files hold, by name.
type Content = BTreeMap<String, Vec<u8>>;

/// What there was, by group.
type Past = BTreeMap<u64, Content>;

/// Runs it.
///
/// # Errors
/// When an older group shows what it must not, or something is written.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let mut volume = Volume::create(suite.subject, Backing::Loop, IMAGE_BYTES)?;
    volume.mount()?;
    let (mut past, mut now, mut random) = (Past::new(), Content::new(), Random(0x9157));
    for _ in 0..2 * KEPT {
        work(volume.dir(), &mut now, &mut random)?;
        past.insert(synced(volume.dir())?, now.clone());
    }
    // As long as it is mounted, the daemon tells.
    let groups = history(volume.dir())?;
    ensure!(groups[0]["state"] == "newest", "{groups:?}");
    let whole = groups.iter().filter(|group| group["state"] == "whole").count();
    ensure!(whole >= KEPT, "of the last groups {whole} are whole: {groups:?}");
    volume.unmount()?;

    let whole = all_whole(&mut volume, &past).context("with plenty of room")?;
    refusals(&volume)?;
    let gone = overwritten(&mut volume, &mut past, &mut now, &mut random)
        .context("with what was given up overwritten")?;
    rewound(&mut volume, &mut past, &mut now, &mut random).context("with a spoilt newest group")?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{whole} groups as they were, {gone} gone and told")))
}

fn cairn(words: &[&str], name: &Path) -> Cmd {
    Cmd::new(checkout::binary("cairn")).args(words).arg(name).limit(LIMIT)
}

/// Tries to mount with those options.
fn mount(volume: &Volume<'_>, words: &[&str]) -> Result<Output> {
    let mount = Cmd::new(checkout::binary("mount.cairn")).args([volume.target(), volume.dir()]);
    mount.args(words).limit(LIMIT).output()
}

/// What `cairn history` lists, the newest first.
fn history(name: &Path) -> Result<Vec<Value>> {
    let shown = cairn(&["history", "-j"], name).text()?;
    let shown: Value = serde_json::from_str(&shown)?;
    Ok(shown["groups"].as_array().context("there are no groups")?.clone())
}

fn number(group: &Value) -> Result<u64> {
    group["txg"].as_u64().context("a group without a number")
}

/// Makes everything durable; the group that it is in.
fn synced(dir: &Path) -> Result<u64> {
    cairn(&["sync"], dir).quiet()?;
    let info: Value = serde_json::from_str(&cairn(&["info", "-j"], dir).text()?)?;
    info["txg"].as_u64().context("the pool has no group")
}

/// Writes, changes and removes some files.
fn work(dir: &Path, now: &mut Content, random: &mut Random) -> Result<()> {
    for _ in 0..6 {
        let name = format!("file-{}", random.below(FILES));
        let path = dir.join(&name);
        if random.below(4) == 0 {
            if now.remove(&name).is_some() {
                fs::remove_file(&path)?;
            }
            continue;
        }
        let mut bytes = vec![0; random.below(200_000) + 1];
        random.fill(&mut bytes);
        match now.get_mut(&name).filter(|_| random.below(2) == 0) {
            Some(content) => {
                let at = random.below(content.len());
                bytes.truncate(content.len() - at);
                File::options().write(true).open(&path)?.write_all_at(&bytes, at as u64)?;
                content[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            None => {
                fs::write(&path, &bytes)?;
                now.insert(name, bytes);
            }
        }
    }
    Ok(())
}

/// What distinguishes an image from another.
fn digest(image: &Path) -> Result<u64> {
    let (mut file, mut hasher) = (File::open(image)?, DefaultHasher::new());
    let mut part = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut part)?;
        if len == 0 {
            return Ok(hasher.finish());
        }
        hasher.write(&part[..len]);
    }
}

/// Compares what is mounted with what there was. Returns what could not be read.
fn compare(dir: &Path, then: &Content) -> Result<usize> {
    let mut lost = 0;
    let names = match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>(),
        Err(error) if error.raw_os_error() == Some(EIO) => return Ok(1),
        Err(error) => Err(error.into()),
    };
    if let Ok(names) = &names {
        ensure!(names.len() == then.len(), "{} files, and not {}", names.len(), then.len());
    }
    for (name, expected) in then {
        match fs::read(dir.join(name)) {
            Ok(found) => ensure!(found == *expected, "{name} is not what it was"),
            Err(error) if error.raw_os_error() == Some(EIO) => lost += 1,
            Err(error) => return Err(error).context(name.clone()),
        }
    }
    Ok(lost + usize::from(names.is_err()))
}

/// Reads all files.
fn readable(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        ensure!(name.as_encoded_bytes().starts_with(b"file-"), "{name:?} was never made");
        fs::read(entry.path())?;
    }
    Ok(())
}

/// Mounts each group that is whole, and looks. Returns how many.
fn all_whole(volume: &mut Volume<'_>, past: &Past) -> Result<usize> {
    let before = digest(volume.image())?;
    let (mut seen, mut compared) = (0, 0);
    for group in history(volume.target())? {
        let txg = number(&group)?;
        ensure!(group["state"] != "partly" && group["state"] != "gone", "{group}");
        let option = format!("txg={txg}");
        // Without ro: that goes without saying.
        volume.mount_with(MountOptions { read_only: false, extra: &option })?;
        let dir = volume.dir().to_path_buf();
        match past.get(&txg) {
            Some(then) => {
                let lost = compare(&dir, then).with_context(|| format!("group {txg}"))?;
                ensure!(lost == 0, "{lost} files of group {txg} cannot be read");
                compared += 1;
            }
            // Published by the clock or by unmounting, with what there was just then.
            None => readable(&dir).with_context(|| format!("group {txg}, which is not noted"))?,
        }
        let refused = fs::write(dir.join("new"), b"x").map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::ReadOnlyFilesystem), "it can be written: {refused:?}");
        let info: Value = serde_json::from_str(&cairn(&["info", "-j"], &dir).text()?)?;
        let options = info["mount_options"].as_array().cloned().unwrap_or_default();
        ensure!(info["txg"] == txg && options.contains(&Value::from(option)), "{info}");
        let again = Cmd::new(checkout::binary("mount.cairn")).args([volume.target(), &dir]);
        let again = again.args(["-o", "remount,rw"]).output()?;
        ensure!(again.code == Some(32), "an older group became writable: {}", again.both());
        let listed = history(&dir)?;
        ensure!(listed.iter().any(|listed| listed["txg"] == txg), "it does not list itself");
        volume.unmount()?;
        let words = ["-f", "-n", "--txg", &txg.to_string()];
        let fsck = Cmd::new(checkout::binary("fsck.cairn")).args(words).arg(volume.target());
        fsck.limit(LIMIT).quiet()?;
        seen += 1;
    }
    ensure!(seen >= KEPT, "only {seen} groups were looked at");
    ensure!(compared > KEPT / 2, "of {seen} groups only {compared} were noted");
    ensure!(digest(volume.image())? == before, "something was written to the device");
    Ok(seen)
}

/// What is refused is refused with a sentence.
fn refusals(volume: &Volume<'_>) -> Result<()> {
    for (words, code, why) in [
        (&["-o", "txg=1"][..], 32, "does not have its group 1 any more; those that can be opened"),
        (&["-o", "txg=0"], 1, "cairn history"),
        (&["-o", "txg=5,rewind"], 1, "give one of them"),
        (&["-w", "-o", "rewind"], 1, "can only be read"),
    ] {
        let told = mount(volume, words)?;
        let is_told = told.code == Some(code) && told.stderr.contains(why);
        ensure!(is_told, "mount {words:?} does not say {why:?}:\n{}", told.both());
    }
    let words = ["-n", "--txg", "1"];
    let fsck =
        Cmd::new(checkout::binary("fsck.cairn")).args(words).arg(volume.target()).output()?;
    ensure!(fsck.code == Some(8), "fsck of a group that is not there: {}", fsck.both());
    Ok(())
}

/// Uses all room again and again, and looks at what is left of older groups. Returns how many
/// cannot be read in full.
fn overwritten(
    volume: &mut Volume<'_>,
    past: &mut Past,
    now: &mut Content,
    random: &mut Random,
) -> Result<usize> {
    volume.mount()?;
    for _ in 0..4 {
        work(volume.dir(), now, random)?;
        past.insert(synced(volume.dir())?, now.clone());
        let path = volume.dir().join("large");
        let room = rustix::fs::statvfs(volume.dir())?;
        let mut bytes = vec![0; (room.f_bavail * room.f_frsize) as usize * 9 / 10];
        random.fill(&mut bytes);
        fs::write(&path, &bytes)?;
        cairn(&["sync"], volume.dir()).quiet()?;
        fs::remove_file(&path)?;
        past.insert(synced(volume.dir())?, now.clone());
    }
    volume.unmount()?;
    let before = digest(volume.image())?;
    let mut gone = 0;
    for group in history(volume.target())? {
        let (txg, state) = (number(&group)?, group["state"].as_str().unwrap_or_default());
        let option = format!("txg={txg}");
        if state == "gone" {
            let told = mount(volume, &["-o", &option])?;
            let is_told = told.code == Some(32)
                && told.stderr.contains("cannot be opened any more")
                && told.stderr.contains("can be opened");
            ensure!(is_told, "what is gone is not told: {}", told.both());
            gone += 1;
            continue;
        }
        let Some(then) = past.get(&txg) else { continue };
        volume.mount_with(MountOptions { read_only: true, extra: &option })?;
        let lost = compare(volume.dir(), then).with_context(|| format!("group {txg}"))?;
        ensure!(lost == 0 || state == "partly", "group {txg} is called {state}");
        volume.unmount()?;
        gone += usize::from(lost > 0);
        // The check calls none of it damage.
        let words = ["-f", "-n", "--json", "--txg", &txg.to_string()];
        let fsck = Cmd::new(checkout::binary("fsck.cairn")).args(words).arg(volume.target());
        let fsck = fsck.limit(LIMIT).output()?;
        let found: Value = serde_json::from_str(&fsck.stdout)?;
        let findings = found["findings"].as_array().context("no findings")?;
        let is_expected = |id: &Value| id == "W-OVERWRITTEN" || id == "W-INCOMPLETE";
        let other = findings.iter().find(|finding| !is_expected(&finding["id"]));
        ensure!(other.is_none(), "group {txg}, {state}: {other:?}");
        ensure!(state != "partly" || fsck.code == Some(4), "{}", fsck.both());
    }
    ensure!(gone > 0, "nothing was overwritten");
    ensure!(digest(volume.image())? == before, "something was written to the device");
    volume.check()?;
    Ok(gone)
}

/// Spoils a node that only the newest group has, and goes back behind it.
fn rewound(
    volume: &mut Volume<'_>,
    past: &mut Past,
    now: &mut Content,
    random: &mut Random,
) -> Result<()> {
    volume.mount()?;
    for _ in 0..4 {
        work(volume.dir(), now, random)?;
        past.insert(synced(volume.dir())?, now.clone());
    }
    volume.unmount()?;
    let nodes = cairn(&["inspect", "tree", "--tree", "pool", "--nodes", "-j"], volume.target());
    let nodes: Value = serde_json::from_str(&nodes.text()?)?;
    let root = nodes["list"].as_array().and_then(|nodes| nodes.first()).context("no node")?;
    let places = root["places"].as_array().context("a node without places")?;
    let image = File::options().read(true).write(true).open(volume.image())?;
    let mut saved = Vec::new();
    for place in places {
        let at = place.as_str().and_then(|place| place.rsplit_once('@')).context("a place")?.1;
        let (at, mut sector) = (at.parse::<u64>()?, vec![0; 4096]);
        image.read_exact_at(&mut sector, at)?;
        image.write_all_at(&vec![0x5a; sector.len()], at)?;
        saved.push((at, sector));
    }
    image.sync_all()?;
    let before = digest(volume.image())?;
    let plain = mount(volume, &[])?;
    ensure!(plain.code == Some(32), "a spoilt pool was mounted: {}", plain.both());
    let shown = cairn(&["history", "-j"], volume.target()).output()?;
    ensure!(shown.code == Some(3), "that needs attention: {}", shown.both());
    let shown: Value = serde_json::from_str(&shown.stdout)?;
    ensure!(shown["groups"][0]["state"] == "gone", "{shown}");
    volume.mount_with(MountOptions { read_only: true, extra: "rewind" })?;
    let info: Value = serde_json::from_str(&cairn(&["info", "-j"], volume.dir()).text()?)?;
    let txg = info["txg"].as_u64().context("no group")?;
    // What unmounting published, if anything, has nothing new in it.
    let (_, then) = past.range(..=txg).next_back().context("nothing was noted")?;
    let lost = compare(volume.dir(), then).context("after a rewind")?;
    ensure!(lost == 0, "{lost} files cannot be read after a rewind");
    volume.unmount()?;
    ensure!(digest(volume.image())? == before, "something was written to the device");
    for (at, sector) in saved {
        image.write_all_at(&sector, at)?;
    }
    image.sync_all()?;
    Ok(())
}
