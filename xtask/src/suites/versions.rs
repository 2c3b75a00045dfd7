//! Subvolumes and snapshots of a mounted pool, while programs write and when its server is killed.
//!
//! Each of three subvolumes has a writer that keeps a copy of its files in memory. A snapshot is
//! taken between two of its calls, while the others go on, and must show that copy for ever: while
//! snapshots are renamed, held, cloned, rolled back to and deleted, after the server was killed
//! with deletions under way, and when it is mounted by itself. The checker, which recomputes every
//! dead list and count, finds nothing.
//!
//! One more writer counts in two others in turn, which shows whether a snapshot of several is of
//! one moment.

use super::Suite;
use crate::random::Random;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::subject::MountOptions;
use crate::volume::{Backing, Volume};
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use rustix::fs::FallocateFlags;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Subvolumes with a writer each; the second is in the first.
const NAMES: [&str; 3] = ["docs", "docs/inner", "work"];
/// The file that its writer keeps open.
const OPEN: &str = "open";
/// Two more in which one writer counts.
const PAIR: [&str; 2] = ["pair", "pair/inner"];
/// Files that a writer has at most.
const FILES: usize = 24;
/// Beginning of the names by which it counts.
const COUNT: &str = "at-";
/// How long deleted things may take to give their room back.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs it.
///
/// # Errors
/// When a snapshot shows what it must not, or the checker is not content.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    names(suite).context("names and numbers")?;
    let mut volume = Volume::create(suite.subject, Backing::Loop, 1 << 30)?;
    volume.mount()?;
    let empty = used(volume.dir())?;
    for name in NAMES.iter().chain(&PAIR) {
        cairn(&["subvolume", "create"], &volume.dir().join(name))?;
    }
    for name in PAIR {
        fs::write(volume.dir().join(name).join(format!("{COUNT}0")), "")?;
    }
    let mut story = Story { kept: BTreeMap::new(), gone: BTreeSet::new(), made: 0 };
    let (rounds, acts) = if suite.long { (100, 60) } else { (3, 36) };
    for round in 0..rounds {
        story.round(&mut volume, round, acts).with_context(|| format!("round {round}"))?;
    }
    volume.unmount()?;
    story.mounted_by_themselves(&mut volume)?;
    volume.mount()?;
    delete_all(volume.dir(), empty)?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{rounds} deaths, {} snapshots under load", story.made)))
}

fn command(verbs: &[&str], name: &Path) -> Cmd {
    Cmd::new(checkout::binary("cairn")).args(verbs).arg(name)
}

fn cairn(verbs: &[&str], name: &Path) -> Result<()> {
    command(verbs, name).quiet()
}

/// It fails with exit code 1, and says why.
fn refused(command: Cmd, why: &str) -> Result<()> {
    let shown = command.shown().to_owned();
    let out = command.output()?;
    let is_refused = out.code == Some(1) && out.stderr.contains(why);
    ensure!(is_refused, "`{shown}` was not refused because of {why:?}:\n{}", out.both());
    Ok(())
}

/// A path with a part behind it: `home` and `@one` make `home@one`.
fn at(path: &Path, part: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(part);
    name.into()
}

/// Bytes in use.
fn used(dir: &Path) -> Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok((found.f_blocks - found.f_bfree) * found.f_frsize)
}

/// What users see, one step after the other.
fn names(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::Loop, 1 << 30)?;
    volume.mount()?;
    let dir = volume.dir().to_path_buf();
    let home = dir.join("home");
    ensure!(!home.exists(), "an empty pool has a home");
    cairn(&["subvolume", "create"], &home)?;
    // The kernel remembered that there was none.
    ensure!(home.is_dir(), "a subvolume that was made does not appear");
    ensure!(fs::create_dir(&home).is_err(), "a directory was made where a subvolume is");
    ensure!(fs::rename(&home, dir.join("x")).is_err(), "a subvolume was moved as a directory");
    ensure!(fs::remove_dir(&home).is_err(), "a subvolume was removed as a directory");
    ensure!(fs::read_dir(&dir)?.count() == 1, "a subvolume is not listed once");
    let file = home.join("file");
    fs::write(&file, b"old")?;
    cairn(&["snapshot", "create", "-r"], &at(&dir, "@one"))?;
    fs::write(&file, b"new, and longer")?;
    fs::write(home.join("later"), b"later")?;
    let kept = home.join(".cairn/snapshot/one");
    ensure!(fs::read(kept.join("file"))? == b"old", "a snapshot shows what came after it");
    ensure!(!kept.join("later").exists(), "a snapshot shows a file that came after it");
    ensure!(dir.join(".cairn/snapshot/one").is_dir(), "-r left the subvolume itself out");
    let (live, old) = (fs::metadata(&file)?, fs::metadata(kept.join("file"))?);
    ensure!(live.dev() == old.dev(), "a snapshot is on another device than what it is of");
    ensure!(live.ino() != old.ino(), "a file and what it was have one inode number");
    ensure!(fs::write(kept.join("x"), b"").is_err(), "a file was made in a snapshot");
    let overwritten = OpenOptions::new().write(true).open(kept.join("file"));
    if let Ok(open) = overwritten {
        // Through an open file the kernel takes what is written, and finds out later.
        let refused = open.write_all_at(b"bad", 0).and_then(|()| open.sync_all());
        ensure!(refused.is_err(), "a snapshot took what was written");
    }
    ensure!(fs::read(kept.join("file"))? == b"old", "a snapshot shows what was refused");

    cairn(&["snapshot", "rollback"], &at(&home, "@one"))?;
    ensure!(fs::read(&file)? == b"old", "rolling back left the file as it was");
    ensure!(!home.join("later").exists(), "rolling back left a later file");
    command(&["snapshot", "clone"], &at(&home, "@one")).arg("work").quiet()?;
    fs::write(dir.join("work/file"), b"other")?;
    ensure!(fs::read(&file)? == b"old", "a clone and its source are one");
    command(&["subvolume", "rename"], &dir.join("work")).arg("play").quiet()?;
    ensure!(!dir.join("work").exists(), "a renamed subvolume is still there");
    ensure!(fs::read(dir.join("play/file"))? == b"other", "a renamed subvolume is empty");
    command(&["snapshot", "create", "-w", "copy"], &at(&dir.join("play"), "@two")).quiet()?;
    ensure!(fs::read(dir.join("copy/file"))? == b"other", "--writable made something else");
    cairn(&["subvolume", "delete", "-r"], &dir.join("play"))?;
    ensure!(!dir.join("play").exists(), "a deleted subvolume is still there");
    ensure!(fs::read(dir.join("copy/file"))? == b"other", "a clone went with its source");
    refused(command(&["subvolume", "delete"], &home), "snapshot")?;
    ensure!(fs::read(&file)? == b"old", "a refused deletion did something");

    cairn(&["subvolume", "set-default"], &home)?;
    volume.remount()?;
    ensure!(fs::read(dir.join("file"))? == b"old", "the default is not what is mounted");
    let shown = command(&["subvolume", "show", "-j"], &dir).text()?;
    let shown: Value = serde_json::from_str(&shown)?;
    ensure!(shown["name"]["subvolume"] == "home" && shown["is_default"] == true, "{shown}");
    // Names begin at what is mounted, and lead no further up.
    refused(command(&["subvolume", "create"], &volume.target().join("up")), "home")?;
    volume.unmount()?;
    volume.check()?;
    cairn(&["subvolume", "set-default"], volume.target())?;

    let mut mount = |extra| {
        volume.mount_with(MountOptions { read_only: false, extra })?;
        let found = fs::read(dir.join("file"))?;
        let is_writable = fs::write(dir.join("new"), b"x").is_ok();
        volume.unmount()?;
        anyhow::Ok((found, is_writable))
    };
    ensure!(mount("subvol=home,snapshot=one")? == (b"old".to_vec(), false), "a snapshot");
    ensure!(mount("subvol=copy")? == (b"other".to_vec(), true), "a clone");
    volume.finish()
}

/// What the files of a subvolume hold, by path.
type Content = BTreeMap<String, Arc<Vec<u8>>>;

/// A subvolume with a copy of what is in it.
struct Copied {
    state: Mutex<State>,
}

struct State {
    content: Content,
    open: Option<Appender>,
}

/// A program that keeps a file open. Nothing but the command makes the kernel hand on what it
/// writes: a file that this program held would be closed by each child that it starts, which makes
/// the kernel do so as well.
struct Appender {
    program: Child,
    path: PathBuf,
}

impl Appender {
    fn start(path: PathBuf) -> Result<Appender> {
        let file = OpenOptions::new().append(true).create(true).open(&path)?;
        let mut command = Command::new("cat");
        let program = command.stdin(Stdio::piped()).stdout(file).stderr(Stdio::null()).spawn()?;
        Ok(Appender { program, path })
    }

    fn append(&mut self, bytes: &[u8], len: u64) -> Result<()> {
        self.program.stdin.as_mut().context("a pipe")?.write_all(bytes)?;
        let begun = Instant::now();
        while fs::metadata(&self.path)?.len() != len {
            ensure!(begun.elapsed() < PATIENCE, "{} does not grow", self.path.display());
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        drop(self.program.stdin.take());
        // It fails when it could not write, which whoever waited for that was told.
        let _ = self.program.wait();
    }
}

impl Copied {
    /// Nobody writes as long as this is held.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A snapshot, and what it has to show.
#[derive(Clone)]
struct Kept {
    content: Content,
    /// Inode numbers by path, which stay.
    numbers: BTreeMap<String, u64>,
}

/// What there is, from one death to the next.
struct Story {
    /// Snapshots that were acknowledged, by subvolume and name.
    kept: BTreeMap<(String, String), Kept>,
    /// Those whose deletion was.
    gone: BTreeSet<(String, String)>,
    made: usize,
}

impl Story {
    /// Writers and commands until the server is killed.
    fn round(&mut self, volume: &mut Volume<'_>, round: u32, acts: u32) -> Result<()> {
        let dir = volume.dir().to_path_buf();
        let mut copies = Vec::new();
        for name in NAMES {
            let content = read(&dir.join(name))?;
            copies.push(Copied { state: Mutex::new(State { content, open: None }) });
        }
        let (stop, killed) = (AtomicBool::new(false), AtomicBool::new(false));
        let until = Until { stop: &stop, killed: &killed };
        std::thread::scope(|scope| -> Result<()> {
            let mut writers = Vec::new();
            for (number, (name, copied)) in NAMES.iter().zip(&copies).enumerate() {
                let seed = u64::from(round * 16) + number as u64 + 1;
                let place = dir.join(name);
                writers.push(scope.spawn(move || write(&place, copied, seed, until)));
            }
            let both = PAIR.map(|name| dir.join(name));
            writers.push(scope.spawn(move || count_in_pairs(&both, until)));
            let mut random = Random(u64::from(round) * 2 + 77);
            let acted = (0..acts).try_for_each(|act| {
                let name = format!("r{round}-{act}");
                self.act(&dir, &copies, &name, &mut random).with_context(|| name)
            });
            let acted = acted.and_then(|()| self.delete_some(&dir, &mut random));
            killed.store(true, Ordering::SeqCst);
            let died = super::kill::kill_server(volume.target(), &dir);
            stop.store(true, Ordering::SeqCst);
            for writer in writers {
                writer.join().expect("writers do not panic").context("a writer")?;
            }
            acted.and(died)
        })?;
        // Open files would keep the dead mount.
        drop(copies);
        volume.mount_is_gone();
        volume.check().context("after the server was killed")?;
        volume.mount().context("after the server was killed")?;
        self.compare_all(&dir)
    }

    /// One command, or a few that belong together.
    fn act(
        &mut self,
        dir: &Path,
        copies: &[Copied],
        name: &str,
        random: &mut Random,
    ) -> Result<()> {
        let of = random.below(NAMES.len());
        let subvolume = dir.join(NAMES[of]);
        let snapshot = at(&subvolume, &format!("@{name}"));
        match random.below(10) {
            0..=2 => {
                let state = copies[of].lock();
                cairn(&["snapshot", "create"], &snapshot)?;
                self.keep(dir, NAMES[of], name, &state.content)
            }
            3 => self.snapshot_both(dir, copies, name),
            4 => self.snapshot_pair(dir, name),
            5 => self.rename(dir, name, random),
            6 => self.clone_and_write(dir, name, random),
            7 => self.hold(dir, random),
            8 => self.roll_back(dir, (NAMES[of], &copies[of]), name, random),
            _ => self.delete_one(dir, random),
        }
    }

    /// Notes a snapshot of what has `content`, and looks at it.
    fn keep(&mut self, dir: &Path, of: &str, name: &str, content: &Content) -> Result<()> {
        let place = shown(dir, of, name);
        let mut numbers = BTreeMap::new();
        for path in content.keys() {
            let found = fs::symlink_metadata(place.join(path));
            let found = found.with_context(|| format!("{of}@{name}: {path}"))?;
            numbers.insert(path.clone(), found.ino());
        }
        let kept = Kept { content: content.clone(), numbers };
        kept.compare(&place)?;
        self.made += 1;
        self.kept.insert((of.into(), name.into()), kept);
        Ok(())
    }

    /// Of a subvolume and the one in it.
    fn snapshot_both(&mut self, dir: &Path, copies: &[Copied], name: &str) -> Result<()> {
        let states = [copies[0].lock(), copies[1].lock()];
        cairn(&["snapshot", "create", "-r"], &at(&dir.join(NAMES[0]), &format!("@{name}")))?;
        let mut both = NAMES.iter().zip(&states);
        both.try_for_each(|(of, state)| self.keep(dir, of, name, &state.content))
    }

    /// Of the two that are counted in, while that goes on.
    fn snapshot_pair(&mut self, dir: &Path, name: &str) -> Result<()> {
        cairn(&["snapshot", "create", "-r"], &at(&dir.join(PAIR[0]), &format!("@{name}")))?;
        PAIR.iter().try_for_each(|of| self.keep(dir, of, name, &Content::new()))?;
        let [outer, inner] = PAIR.map(|of| counted(&shown(dir, of, name)));
        let (outer, inner) = (outer?, inner?);
        let is_one_moment = outer == inner || outer == inner + 1;
        ensure!(is_one_moment, "{name} shows {outer} and {inner}, which never was");
        Ok(())
    }

    fn any(&self, random: &mut Random) -> Option<(String, String)> {
        let count = self.kept.len();
        (count > 0).then(|| self.kept.keys().nth(random.below(count)).cloned()).flatten()
    }

    fn rename(&mut self, dir: &Path, name: &str, random: &mut Random) -> Result<()> {
        let Some((of, old)) = self.any(random) else { return Ok(()) };
        command(&["snapshot", "rename"], &at(&dir.join(&of), &format!("@{old}")))
            .arg(name)
            .quiet()?;
        ensure!(!shown(dir, &of, &old).exists(), "{of}@{old} is there after it was renamed");
        let kept = self.kept.remove(&(of.clone(), old.clone())).context("it was kept")?;
        kept.compare(&shown(dir, &of, name))?;
        self.gone.insert((of.clone(), old));
        self.kept.insert((of, name.into()), kept);
        Ok(())
    }

    /// What is written to a clone is not in what it was made from, which may go before it.
    fn clone_and_write(&mut self, dir: &Path, name: &str, random: &mut Random) -> Result<()> {
        let Some((of, old)) = self.any(random) else { return Ok(()) };
        let from = at(&dir.join(&of), &format!("@{old}"));
        command(&["snapshot", "clone"], &from).arg(name).quiet()?;
        let clone = dir.join(name);
        let kept = &self.kept[&(of.clone(), old.clone())];
        kept.compare_content(&clone)?;
        for path in kept.content.keys().take(3) {
            fs::write(clone.join(path), "written to the clone")?;
        }
        kept.compare(&shown(dir, &of, &old))?;
        if random.below(2) == 0 {
            let content = read(&clone)?;
            self.delete(dir, &of, &old)?;
            let found = differing(&content, &read(&clone)?);
            ensure!(found.is_none(), "{name} lost {found:?} with the snapshot it came from");
        }
        cairn(&["subvolume", "delete"], &clone)?;
        ensure!(!clone.exists(), "the clone {name} is there after it was deleted");
        Ok(())
    }

    fn hold(&self, dir: &Path, random: &mut Random) -> Result<()> {
        let Some((of, name)) = self.any(random) else { return Ok(()) };
        let place = at(&dir.join(&of), &format!("@{name}"));
        command(&["snapshot", "hold"], &place).arg("backup").quiet()?;
        refused(command(&["snapshot", "delete"], &place), "held")?;
        command(&["snapshot", "release"], &place).arg("backup").quiet()?;
        command(&["snapshot", "bookmark"], &place).arg(format!("of-{name}")).quiet()?;
        cairn(&["snapshot", "delete"], &at(&dir.join(&of), &format!("#of-{name}")))?;
        self.kept[&(of.clone(), name.clone())].compare(&shown(dir, &of, &name))
    }

    /// A subvolume becomes what it was, and what it was until then is kept.
    fn roll_back(
        &mut self,
        dir: &Path,
        (of, copied): (&str, &Copied),
        name: &str,
        random: &mut Random,
    ) -> Result<()> {
        let olds: Vec<_> = self.kept.keys().filter(|(from, _)| from == of).collect();
        let Some((_, old)) = olds.get(random.below(olds.len().max(1))) else { return Ok(()) };
        let (old, place) = (old.clone(), dir.join(of));
        let mut state = copied.lock();
        let before = format!("{name}-before");
        command(&["snapshot", "rollback", "--keep", &before], &at(&place, &format!("@{old}")))
            .quiet()?;
        self.keep(dir, of, &before, &state.content)?;
        let content = self.kept[&(of.to_string(), old)].content.clone();
        let found = differing(&content, &read(&place)?);
        *state = State { content, open: None };
        ensure!(found.is_none(), "{of} was rolled back, but for {found:?}");
        Ok(())
    }

    fn delete(&mut self, dir: &Path, of: &str, name: &str) -> Result<()> {
        cairn(&["snapshot", "delete"], &at(&dir.join(of), &format!("@{name}")))?;
        ensure!(!shown(dir, of, name).exists(), "{of}@{name} is there after it was deleted");
        let key = (of.to_string(), name.to_string());
        self.kept.remove(&key);
        self.gone.insert(key);
        Ok(())
    }

    fn delete_one(&mut self, dir: &Path, random: &mut Random) -> Result<()> {
        match self.any(random) {
            Some((of, name)) => self.delete(dir, &of, &name),
            None => Ok(()),
        }
    }

    /// Deletes a third, and leaves it to the background to take them apart.
    fn delete_some(&mut self, dir: &Path, random: &mut Random) -> Result<()> {
        (0..self.kept.len() / 3).try_for_each(|_| self.delete_one(dir, random))
    }

    fn compare_all(&self, dir: &Path) -> Result<()> {
        for ((of, name), kept) in &self.kept {
            kept.compare(&shown(dir, of, name)).with_context(|| format!("{of}@{name}"))?;
        }
        let listed = command(&["snapshot", "list", "-j"], dir).text()?;
        let listed: Value = serde_json::from_str(&listed)?;
        let part = |version: &Value, key: &str| version["name"][key].as_str().map(String::from);
        let listed: BTreeSet<(String, String)> = (listed.as_array().into_iter().flatten())
            .filter_map(|version| Some((part(version, "subvolume")?, part(version, "snapshot")?)))
            .collect();
        let kept: BTreeSet<(String, String)> = self.kept.keys().cloned().collect();
        let back: Vec<_> = listed.intersection(&self.gone).collect();
        ensure!(back.is_empty(), "{back:?} are listed although they were deleted");
        let odd: Vec<_> = listed.symmetric_difference(&kept).collect();
        ensure!(odd.is_empty(), "{odd:?} are listed and should not be, or are not");
        self.compare_differences(dir)
    }

    /// What two snapshots of a subvolume differ in, `diff` names.
    fn compare_differences(&self, dir: &Path) -> Result<()> {
        let of: Vec<_> = self.kept.iter().filter(|((of, _), _)| of == NAMES[2]).collect();
        for pair in of.windows(2) {
            let [((_, old), before), ((_, new), after)] = pair else { continue };
            let place = at(&dir.join(NAMES[2]), &format!("@{old}"));
            let told = command(&["snapshot", "diff", "-j"], &place).arg(new).text()?;
            let told: Value = serde_json::from_str(&told)?;
            let words = |key: &'static str| {
                let all = told.as_array().into_iter().flatten();
                all.filter_map(move |change| change[key].as_str())
            };
            let named: BTreeSet<&str> = words("path").chain(words("from")).collect();
            let both = before.content.keys().chain(after.content.keys());
            for path in both.filter(|path| before.content.get(*path) != after.content.get(*path)) {
                let is_named = named.contains(format!("/{path}").as_str());
                ensure!(is_named, "diff of {old} and {new} does not name {path}: {told}");
            }
        }
        Ok(())
    }

    /// Snapshots that are mounted in place of the default subvolume.
    fn mounted_by_themselves(&self, volume: &mut Volume<'_>) -> Result<()> {
        for ((of, name), kept) in self.kept.iter().take(3) {
            let extra = format!("subvol={of},snapshot={name}");
            volume.mount_with(MountOptions { read_only: false, extra: &extra })?;
            kept.compare_content(volume.dir()).with_context(|| extra)?;
            volume.unmount()?;
        }
        Ok(())
    }
}

impl Kept {
    fn compare(&self, place: &Path) -> Result<()> {
        self.compare_content(place)?;
        for (path, number) in &self.numbers {
            let found = fs::symlink_metadata(place.join(path))?.ino();
            ensure!(found == *number, "{path} has inode number {found} and had {number}");
        }
        Ok(())
    }

    fn compare_content(&self, place: &Path) -> Result<()> {
        let differs = differing(&self.content, &read(place)?);
        ensure!(differs.is_none(), "{} differs: {differs:?}", place.display());
        Ok(())
    }
}

/// Where a snapshot is shown.
fn shown(dir: &Path, of: &str, name: &str) -> PathBuf {
    dir.join(of).join(".cairn/snapshot").join(name)
}

/// The first path that two do not agree on.
fn differing(one: &Content, other: &Content) -> Option<String> {
    let paths: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
    let differs = |path: &&&String| one.get(**path) != other.get(**path);
    paths.iter().find(differs).map(|path| {
        let bytes = |content: &Content| content.get(*path).map(|bytes| bytes.len());
        format!("{path}, of {:?} bytes and not {:?}", bytes(other), bytes(one))
    })
}

/// What is in a subvolume or snapshot, without those below and what counts pairs.
fn read(place: &Path) -> Result<Content> {
    let mut found = Content::new();
    for entry in fs::read_dir(place).with_context(|| place.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() && !name.starts_with(COUNT) {
            let bytes = fs::read(entry.path()).with_context(|| name.clone())?;
            found.insert(name, Arc::new(bytes));
        }
    }
    Ok(found)
}

/// The number up to which a subvolume was counted.
fn counted(place: &Path) -> Result<u64> {
    let mut found = Vec::new();
    for entry in fs::read_dir(place)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        found.extend(name.strip_prefix(COUNT).map(str::parse::<u64>).transpose()?);
    }
    ensure!(found.len() == 1, "{} shows {found:?}", place.display());
    Ok(found[0])
}

/// How long writers go on.
#[derive(Clone, Copy)]
struct Until<'a> {
    stop: &'a AtomicBool,
    killed: &'a AtomicBool,
}

impl Until<'_> {
    /// Works until it is told to stop, or the server is killed.
    fn repeat(self, mut work: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.stop.load(Ordering::SeqCst) {
            let done = work();
            if self.killed.load(Ordering::SeqCst) {
                break;
            }
            done?;
        }
        Ok(())
    }
}

fn write(place: &Path, copied: &Copied, seed: u64, until: Until<'_>) -> Result<()> {
    let mut random = Random(seed * 0x9e37_79b9);
    until.repeat(|| {
        one_change(place, &mut copied.lock(), &mut random)?;
        std::thread::sleep(Duration::from_micros(random.below(600) as u64));
        Ok(())
    })
}

/// Writes to the file that stays open.
fn append(place: &Path, state: &mut State, random: &mut Random) -> Result<()> {
    if state.open.is_none() {
        state.open = Some(Appender::start(place.join(OPEN))?);
    }
    let mut bytes = vec![0; 1 + random.below(2000)];
    random.fill(&mut bytes);
    let copy = Arc::make_mut(state.content.entry(OPEN.into()).or_default());
    copy.extend_from_slice(&bytes);
    let program = state.open.as_mut().context("it was started")?;
    program.append(&bytes, copy.len() as u64)
}

/// One call on a file, and the same on the copy.
fn one_change(place: &Path, state: &mut State, random: &mut Random) -> Result<()> {
    if random.below(4) == 0 {
        return append(place, state, random);
    }
    let content = &mut state.content;
    let name = format!("file-{}", random.below(FILES));
    let path = place.join(&name);
    let mut bytes = vec![0; random.below(40_000)];
    // Some of it can be compressed.
    let noise = random.below(bytes.len() + 1);
    random.fill(&mut bytes[noise..]);
    let Some(old) = content.get_mut(&name) else {
        fs::write(&path, &bytes)?;
        content.insert(name, Arc::new(bytes));
        return Ok(());
    };
    let len = old.len();
    match random.below(7) {
        0 => {
            fs::write(&path, &bytes)?;
            *old = Arc::new(bytes);
        }
        1 | 2 => {
            let from = random.below(len + 1);
            let file = OpenOptions::new().write(true).open(&path)?;
            file.write_all_at(&bytes, from as u64)?;
            let old = Arc::make_mut(old);
            old.resize(len.max(from + bytes.len()), 0);
            old[from..from + bytes.len()].copy_from_slice(&bytes);
            if random.below(8) == 0 {
                file.sync_data()?;
            }
        }
        3 => {
            let len = random.below(60_000);
            OpenOptions::new().write(true).open(&path)?.set_len(len as u64)?;
            Arc::make_mut(old).resize(len, 0);
        }
        4 if len > 0 => {
            let from = random.below(len);
            let file = OpenOptions::new().write(true).open(&path)?;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, from as u64, (len - from) as u64)?;
            Arc::make_mut(old)[from..].fill(0);
        }
        5 => {
            let new = format!("file-{}", random.below(FILES));
            fs::rename(&path, place.join(&new))?;
            let moved = content.remove(&name).context("it is there")?;
            content.insert(new, moved);
        }
        _ => {
            fs::remove_file(&path)?;
            content.remove(&name);
        }
    }
    Ok(())
}

/// Counts in both, always first in the first.
fn count_in_pairs(places: &[PathBuf; 2], until: Until<'_>) -> Result<()> {
    // The server may have been killed in between.
    let mut now = counted(&places[1])?;
    let outer = counted(&places[0])?;
    ensure!(outer == now || outer == now + 1, "the pair is {outer} and {now}, which never was");
    until.repeat(|| {
        for place in places {
            let [old, new] = [now, now + 1].map(|count| place.join(format!("{COUNT}{count}")));
            match fs::rename(&old, &new) {
                Err(_) if new.exists() => {}
                renamed => renamed?,
            }
        }
        now += 1;
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    })
}

/// Deletes everything; the room comes back.
fn delete_all(dir: &Path, empty: u64) -> Result<()> {
    for name in ["docs", "work", "pair"] {
        cairn(&["subvolume", "delete", "-r"], &dir.join(name))?;
    }
    let begun = Instant::now();
    loop {
        Cmd::new("sync").arg("-f").arg(dir).quiet()?;
        let left = used(dir)?;
        if left <= empty + (4 << 20) {
            return Ok(());
        }
        let is_late = begun.elapsed() > PATIENCE;
        ensure!(!is_late, "{left} bytes are in use after all was deleted, and {empty} before");
        std::thread::sleep(Duration::from_millis(100));
    }
}
