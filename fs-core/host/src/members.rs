//! Finding the devices of a pool.
//!
//! Each label names all devices of its pool. So whoever is given one can look for the others: those
//! of a block device among the block devices, those of an image file beside it.

use crate::report::NoReport;
use crate::{host_platform, FileDevice, Wait};
use fs_core::error::Error;
use fs_core::format::label::{decode_members, label_areas, Label, LabelMember};
use fs_core::platform::{DeviceRef, Platform};
use fs_core::pool::{Pool, PoolOptions};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A label, and the devices that it names.
#[derive(Clone, Debug)]
pub struct Found {
    /// The label.
    pub label: Label,
    /// The devices of the pool, by index; empty in a pool that always had one.
    pub members: Vec<LabelMember>,
}

/// Files beside an image that are looked at.
const NEIGHBOURS_MAX: usize = 4096;

/// The valid label of a device, if it has one; of two, the one rewritten last. Takes no lock: what
/// is found must be looked at again once the device is opened.
pub fn read_label(path: &Path) -> Option<Found> {
    // Opening a pipe would wait for who writes to it.
    let kind = fs::metadata(path).ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let bytes = file.seek(SeekFrom::End(0)).ok()?;
    let areas = label_areas(bytes)?;
    let sector = |at: u64| {
        let mut bytes = vec![0; Label::BYTES];
        file.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
    };
    let read = |at: u64| {
        let bytes = sector(at)?;
        let label = Label::decode(&bytes).ok()?;
        let members = decode_members(&label, &bytes).ok()?;
        Some(Found { label, members })
    };
    let found = areas.iter().filter_map(|area| read(area.0));
    found.max_by_key(|found| found.label.sequence).or_else(|| {
        // The first is torn, and the pool takes the device for smaller than it is.
        let hint = Label::device_bytes_of(&sector(areas[0].0)?).filter(|hint| *hint < bytes)?;
        let [_, second] = label_areas(hint)?;
        read(second.0).filter(|found| found.label.device_bytes == hint)
    })
}

/// All block devices of the system.
pub fn block_devices() -> Vec<PathBuf> {
    let Ok(devices) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut paths: Vec<PathBuf> = devices
        .filter_map(Result::ok)
        // A slash in a device's name is written as an exclamation mark.
        .filter_map(|d| d.file_name().into_string().ok())
        .map(|name| Path::new("/dev").join(name.replace('!', "/")))
        .collect();
    paths.sort();
    paths
}

/// The same devices, each once, by the first of the names that were given for it.
pub fn distinct(given: &[PathBuf]) -> Vec<PathBuf> {
    let identity = |path: &Path| {
        let data = fs::metadata(path).ok()?;
        let is_block = data.file_type().is_block_device();
        Some(if is_block { (data.rdev(), None) } else { (data.dev(), Some(data.ino())) })
    };
    let mut met = BTreeSet::new();
    // Whoever opens what is not there says so.
    let is_new = |path: &&PathBuf| identity(path).is_none_or(|identity| met.insert(identity));
    given.iter().filter(is_new).cloned().collect()
}

/// Adds to the devices that were given those of the same pool that can be found. What was given
/// comes first and is kept, each once, whatever it is; who opens it says what is wrong with it.
/// Image files are looked for beside the given ones, and only among those of the same owner; of two
/// copies of one device none is taken.
pub fn complete(given: &[PathBuf]) -> Vec<PathBuf> {
    let mut all = distinct(given);
    let mut found: Vec<Found> = given.iter().filter_map(|path| read_label(path)).collect();
    let Some(newest) = newest(&found) else { return all };
    if missing(newest, &found).next().is_none() {
        return all;
    }
    let pool = newest.label.pool_id;
    let mut others: BTreeMap<[u8; 16], Vec<(PathBuf, Found)>> = BTreeMap::new();
    for path in candidates(given) {
        if let Some(other) = read_label(&path).filter(|other| other.label.pool_id == pool) {
            others.entry(other.label.device_id).or_default().push((path, other));
        }
    }
    // A device that was left behind names those it knew; one of them knows who came after it.
    loop {
        let before = found.len();
        for id in newest_missing(&found) {
            let Some(mut paths) = others.remove(&id) else { continue };
            let files = paths.iter().filter(|(path, _)| path.is_file()).count();
            // Of block devices the first is taken: others are other ways to it. Of image files one
            // is a copy of the other, perhaps an old one, and nobody but the user knows which.
            if files <= 1 {
                let (path, other) = paths.swap_remove(0);
                all.push(path);
                found.push(other);
            }
        }
        if found.len() == before {
            return all;
        }
    }
}

/// Of labels the one that knows most about the pool.
fn newest(found: &[Found]) -> Option<&Found> {
    found.iter().max_by_key(|found| found.label.epoch)
}

/// Devices of the pool, as a label knows it, that were not found.
fn missing<'a>(newest: &'a Found, found: &'a [Found]) -> impl Iterator<Item = &'a LabelMember> {
    let is_there = |id| found.iter().any(|found| found.label.device_id == id);
    newest.members.iter().filter(move |member| !member.is_vacant() && !is_there(member.id))
}

fn newest_missing(found: &[Found]) -> Vec<[u8; 16]> {
    let newest = newest(found).into_iter();
    newest.flat_map(|newest| missing(newest, found)).map(|member| member.id).collect()
}

/// Why devices cannot be opened together, if that is because they were written in two halves that
/// do not know of each other. Only labels and superblocks are read.
pub fn split(devices: &[Arc<FileDevice>]) -> Option<Error> {
    let devices = devices.iter().map(|device| device.clone() as DeviceRef).collect();
    let options = PoolOptions { read_only: true, degraded: true, ..PoolOptions::default() };
    let platform = Platform { report: Arc::new(NoReport), ..host_platform() };
    let opened = Pool::open(devices, platform, &options);
    opened.err().filter(|error| matches!(error, Error::Split { .. }))
}

/// As [`complete`]; when devices are missing that have everything as far as the others know, waits
/// for them as long as `wait` says: block devices appear one after the other. What is missing in
/// spite of that is for whoever opens the pool to judge.
pub fn complete_in_time(given: &[PathBuf], wait: &Wait<'_>) -> Vec<PathBuf> {
    let begin = Instant::now();
    let mut is_announced = false;
    loop {
        let all = complete(given);
        let late = late(&all);
        if late.is_empty() || begin.elapsed() >= wait.bound {
            return all;
        }
        if !is_announced && begin.elapsed() >= UNNOTICED {
            is_announced = true;
            let late: Vec<String> = late.iter().map(ToString::to_string).collect();
            let many = if late.len() == 1 { "" } else { "s" };
            (wait.announce)(&format!("waiting for device{many} {} of the pool", late.join(", ")));
        }
        std::thread::sleep(RETRY_EVERY);
    }
}

/// A wait shorter than this is not announced.
const UNNOTICED: Duration = Duration::from_millis(500);
/// Time between two looks.
const RETRY_EVERY: Duration = Duration::from_millis(200);

/// Indices of the devices of the pool that are not among `paths`, and were not left behind.
fn late(paths: &[PathBuf]) -> Vec<usize> {
    let found: Vec<Found> = paths.iter().filter_map(|path| read_label(path)).collect();
    let Some(newest) = newest(&found) else { return Vec::new() };
    let is_there =
        |member: &LabelMember| found.iter().any(|found| found.label.device_id == member.id);
    let members = newest.members.iter().enumerate();
    let late = members.filter(|(_, m)| !m.is_vacant() && m.behind == 0 && !is_there(m));
    late.map(|(index, _)| index).collect()
}

/// Whether a path names a block device.
pub fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.file_type().is_block_device())
}

/// Where the others may be: among the block devices, and beside image files.
fn candidates(given: &[PathBuf]) -> Vec<PathBuf> {
    let mut places = Vec::new();
    let mut directories: Vec<(PathBuf, u32)> = Vec::new();
    let mut is_block = false;
    for path in given {
        let Ok(kind) = fs::metadata(path) else { continue };
        if kind.file_type().is_block_device() {
            is_block = true;
        } else if let Some(parent) = path.canonicalize().ok().and_then(|p| Some(p.parent()?.into()))
        {
            directories.push((parent, kind.uid()));
        }
    }
    if is_block {
        places.extend(block_devices());
    }
    directories.sort();
    directories.dedup();
    for (directory, owner) in directories {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let mut files: Vec<PathBuf> = entries
            .filter_map(Result::ok)
            .take(NEIGHBOURS_MAX)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .filter(|entry| entry.metadata().is_ok_and(|data| data.uid() == owner))
            .map(|entry| entry.path())
            .collect();
        files.sort();
        places.extend(files);
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{create_image, host_platform, open_devices, Access, OpenOptions};
    use fs_core::engine::{format, FormatOptions};
    use fs_core::format::chunk::Profile;
    use fs_core::format::label::LABEL_AREA_0;
    use fs_core::platform::DeviceRef;

    fn pool(directory: &Path, names: &[&str]) -> Vec<PathBuf> {
        let paths: Vec<PathBuf> = names.iter().map(|name| directory.join(name)).collect();
        paths.iter().for_each(|path| create_image(path, 16 << 20).unwrap());
        let options = OpenOptions::new(Access::ReadWrite);
        let devices = open_devices(&paths, options, &Wait::none()).unwrap();
        let devices = devices.into_iter().map(|device| device as DeviceRef).collect();
        let options = FormatOptions {
            data_profile: Profile::Mirror,
            metadata_profile: Profile::Mirror,
            ..FormatOptions::default()
        };
        format(devices, host_platform(), &options).unwrap();
        paths
    }

    #[test]
    fn of_two_copies_of_a_device_none_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let ours = pool(dir.path(), &["a", "b"]);
        assert_eq!(complete(&ours[..1]).len(), 2);
        std::fs::copy(&ours[1], dir.path().join("b-backup")).unwrap();
        assert_eq!(complete(&ours[..1]), ours[..1]);
        assert_eq!(complete(&ours), ours);
    }

    #[test]
    fn a_torn_label_leads_to_the_other_on_a_device_that_has_grown() {
        let dir = tempfile::tempdir().unwrap();
        let ours = pool(dir.path(), &["a", "b"]);
        let file = fs::OpenOptions::new().write(true).open(&ours[1]).unwrap();
        let label = read_label(&ours[1]).unwrap().label;
        file.set_len(32 << 20).unwrap();
        // As a torn write leaves it: the beginning is whole.
        file.write_all_at(&[0xff; 64], LABEL_AREA_0 + 600).unwrap();
        assert_eq!(read_label(&ours[1]).unwrap().label.device_id, label.device_id);
        assert_eq!(complete(&ours[..1]), ours);
        let device = open_devices(&ours[1..], OpenOptions::new(Access::ReadOnly), &Wait::none());
        let areas = crate::stored::read_areas(&*device.unwrap()[0]);
        let found = crate::stored::best_label(&areas).unwrap();
        assert_eq!(found.device_id, label.device_id);
        assert!(crate::stored::newest_superblock(&areas).is_some());
    }

    #[test]
    fn a_device_that_was_given_twice_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let ours = pool(dir.path(), &["a", "b"]);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&ours[0], &link).unwrap();
        let gone = dir.path().join("gone");
        let given = [&ours[1], &ours[0], &link, &ours[1], &gone, &gone].map(Clone::clone);
        let once = [&ours[1], &ours[0], &gone, &gone].map(Clone::clone);
        assert_eq!(distinct(&given), once);
        assert_eq!(complete(&given), once);
    }

    #[test]
    fn a_device_that_comes_late_is_waited_for_and_no_longer_than_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let ours = pool(dir.path(), &["a", "b"]);
        let away = dir.path().join("sub");
        fs::create_dir(&away).unwrap();
        fs::rename(&ours[1], away.join("b")).unwrap();
        let wait = |ms| Wait { bound: Duration::from_millis(ms), announce: &|_| {} };
        let begin = Instant::now();
        assert_eq!(complete_in_time(&ours[..1], &wait(300)).len(), 1);
        assert!(begin.elapsed() >= Duration::from_millis(300));
        let (from, to) = (away.join("b"), ours[1].clone());
        let comes = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(400));
            fs::rename(from, to).unwrap();
        });
        assert_eq!(complete_in_time(&ours[..1], &wait(60_000)), ours);
        comes.join().unwrap();
    }

    #[test]
    fn the_other_devices_of_a_pool_are_found_beside_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let ours = pool(dir.path(), &["b", "d", "a"]);
        pool(dir.path(), &["c", "e"]);
        std::fs::write(dir.path().join("f"), "no pool").unwrap();
        let found = complete(&ours[..1]);
        assert_eq!(found[0], ours[0]);
        let mut names: Vec<_> = found.iter().map(|path| path.file_name().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["a", "b", "d"]);
        // What was given stays, also what is no device of the pool.
        let odd = vec![ours[2].clone(), dir.path().join("f")];
        assert_eq!(complete(&odd).len(), 4);
        for no_pool in [dir.path().join("gone"), dir.path().to_path_buf(), "/dev/null".into()] {
            assert_eq!(complete(std::slice::from_ref(&no_pool)), [no_pool]);
        }
    }
}
