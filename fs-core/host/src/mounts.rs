//! Who uses a device: the mount table, loop devices, open files.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device number that files on it show.
    pub device: u64,
    /// What of the filesystem is mounted: a directory of it, from its root.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Type, such as `fuse.cairn`.
    pub fs_type: String,
    /// What was mounted, as it was named then.
    pub source: PathBuf,
    /// Whether it is mounted read-only.
    pub read_only: bool,
    /// Whether the filesystem is, at every place where it is mounted.
    pub read_only_everywhere: bool,
}

impl Mount {
    /// Whether this is a cairn mount of any driver.
    pub fn is_cairn(&self) -> bool {
        matches!(self.fs_type.as_str(), "cairn" | "fuse.cairn" | "fuseblk.cairn")
    }
}

/// The mounts this process sees, in the order in which they were made.
///
/// # Errors
/// What the system says when the table cannot be read.
pub fn mounts() -> io::Result<Vec<Mount>> {
    table_of(Path::new("/proc/self"))
}

/// The mounts that a process sees.
fn table_of(process: &Path) -> io::Result<Vec<Mount>> {
    let table = std::fs::read(process.join("mountinfo"))?;
    Ok(table.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// The mount whose mount point is `path`. Does not touch the mounted filesystem more than finding
/// the path's canonical name does.
///
/// # Errors
/// What the system says about the path or the mount table.
pub fn mount_at(path: &Path) -> io::Result<Option<Mount>> {
    let path = path.canonicalize()?;
    // Of mounts one over another the last is the one that is seen.
    Ok(mounts()?.into_iter().rev().find(|m| m.mount_point == path))
}

/// The mount that a file or directory is on, and its place from the root of the filesystem on. A
/// cairn mount that another mount hides is not taken for it.
///
/// # Errors
/// As [`mount_at`].
pub fn mount_of(path: &Path) -> io::Result<Option<(Mount, PathBuf)>> {
    let path = path.canonicalize()?;
    let device = std::fs::metadata(&path)?.dev();
    let is_on =
        |m: &Mount| path.starts_with(&m.mount_point) && (m.device == device || !m.is_cairn());
    let on = mounts()?.into_iter().rev().filter(is_on);
    // Of those the innermost; `max_by_key` takes the last of several, so the order is turned back.
    let innermost = on.collect::<Vec<_>>().into_iter().rev();
    Ok(innermost.max_by_key(|m| m.mount_point.components().count()).map(|mount| {
        let below = path.strip_prefix(&mount.mount_point).unwrap_or(Path::new(""));
        let place = mount.root.join(below);
        (mount, place)
    }))
}

/// One sentence, where a path cannot be looked at because the daemon of its mount has died.
pub fn daemon_gone(path: &Path, error: &io::Error) -> Option<String> {
    let not_connected =
        |error: &io::Error| error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error());
    if !not_connected(error) {
        return None;
    }
    // The mount point is as far up as the error is.
    let is_gone = |path: &&Path| std::fs::symlink_metadata(path).is_err_and(|e| not_connected(&e));
    let mount_point = path.ancestors().take_while(is_gone).last().unwrap_or(path).display();
    Some(format!(
        "{mount_point}: the daemon of this mount is gone; run umount {mount_point}, then mount"
    ))
}

/// A mount of this block device or image file, by whatever name, also through a loop device.
pub fn mount_of_device(path: &Path) -> Option<Mount> {
    let used = Used::of(path)?;
    mounts().ok()?.into_iter().rev().find(|mount| used.is_source_of(mount))
}

/// What a mount table may call a device.
struct Used {
    names: Vec<PathBuf>,
    number: Option<u64>,
}

impl Used {
    fn of(path: &Path) -> Option<Used> {
        let canonical = path.canonicalize().ok()?;
        let kind = std::fs::metadata(&canonical).ok()?;
        let mut names = loop_devices_on(&canonical);
        names.push(canonical);
        let number = kind.file_type().is_block_device().then(|| kind.rdev());
        Some(Used { names, number })
    }

    fn is_source_of(&self, mount: &Mount) -> bool {
        Some(mount.device) == self.number
            || mount.source.canonicalize().is_ok_and(|source| self.names.contains(&source))
    }
}

/// A process that sees a mount of a device which this one does not: in a mount namespace of its
/// own, as containers and services have, what is unmounted elsewhere may live on.
fn seen_elsewhere(path: &Path) -> Option<String> {
    let used = Used::of(path)?;
    elsewhere().ok()?.find_map(|(process, table)| {
        table.ok()?.iter().find(|mount| used.is_source_of(mount))?;
        let pid = process.file_name()?.to_str()?;
        let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
        let name = name.trim_end();
        Some(format!("a mount in the mount namespace of process {pid} ({name})"))
    })
}

/// A process of each mount namespace but this one, as far as this user may look into them, with the
/// mounts that it sees. Those that end meanwhile are left out.
fn elsewhere() -> io::Result<impl Iterator<Item = (PathBuf, io::Result<Vec<Mount>>)>> {
    let mut known = vec![std::fs::read_link("/proc/self/ns/mnt")?];
    let processes = std::fs::read_dir("/proc")?.filter_map(Result::ok);
    Ok(processes.filter_map(move |process| {
        let process = process.path();
        let namespace = std::fs::read_link(process.join("ns/mnt")).ok()?;
        if known.contains(&namespace) {
            return None;
        }
        let table = table_of(&process);
        if table.is_err() && !process.exists() {
            return None;
        }
        known.push(namespace);
        Some((process, table))
    }))
}

/// The mount tables of all mount namespaces, of those of others as far as this user may know.
///
/// # Errors
/// What the system says when a table cannot be read that this user may read.
pub fn tables() -> io::Result<Vec<Vec<Mount>>> {
    let others = elsewhere()?.map(|(_, table)| table);
    std::iter::once(mounts()).chain(others).collect()
}

/// The loop devices that stand on an image file.
pub fn loop_devices_on(image: &Path) -> Vec<PathBuf> {
    let Ok(image) = image.canonicalize() else { return Vec::new() };
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return Vec::new() };
    devices
        .filter_map(Result::ok)
        .filter(|d| d.file_name().as_encoded_bytes().starts_with(b"loop"))
        .filter(|d| {
            std::fs::read(d.path().join("loop/backing_file"))
                .is_ok_and(|name| name.trim_ascii_end() == image.as_os_str().as_encoded_bytes())
        })
        .map(|d| Path::new("/dev").join(d.file_name()))
        .collect()
}

/// Says who may hold a device: where it is mounted, or a process that has it open, as far as this
/// user may know.
pub fn holder_of(path: &Path) -> Option<String> {
    if let Some(mount) = mount_of_device(path) {
        return Some(format!("the mount on {}", mount.mount_point.display()));
    }
    if let Some(elsewhere) = seen_elsewhere(path) {
        return Some(elsewhere);
    }
    let path = path.canonicalize().ok()?;
    let own = std::process::id().to_string();
    std::fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|process| {
        let pid = process.file_name().into_string().ok()?;
        if pid == own || !pid.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let files = std::fs::read_dir(process.path().join("fd")).ok()?;
        let holds = files
            .filter_map(Result::ok)
            .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == path));
        if !holds {
            return None;
        }
        let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        Some(format!("process {pid} ({})", name.trim_end()))
    })
}

/// Fields up to the optional ones, then ` - ` and three more.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let root = unescape(fields.next()?);
    let mount_point = unescape(fields.next()?);
    let options = fields.next()?;
    let mut after = fields.skip_while(|field| *field != b"-").skip(1);
    let has_ro = |options: &[u8]| options.split(|b| *b == b',').any(|option| option == b"ro");
    Some(Mount {
        device: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
        root,
        mount_point,
        fs_type: String::from_utf8_lossy(after.next()?).into_owned(),
        source: unescape(after.next()?),
        read_only: has_ro(options),
        read_only_everywhere: after.next().is_some_and(has_ro),
    })
}

/// Undoes the kernel's `\ooo` for blanks and backslashes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_optional_fields_and_blanks_is_understood() {
        let line =
            br"36 35 98:5 / /mnt/a\040b ro,noatime master:1 shared:2 - fuse.cairn /img\134x rw";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.mount_point, Path::new("/mnt/a b"));
        assert_eq!(mount.root, Path::new("/"));
        assert_eq!(mount.source, Path::new(r"/img\x"));
        assert_eq!(mount.device, rustix::fs::makedev(98, 5));
        assert!(mount.is_cairn() && mount.read_only && !mount.read_only_everywhere);
        let line = br"36 35 98:5 / /mnt rw - fuse.cairn x ro,user_id=0";
        assert!(parse_line(line).unwrap().read_only_everywhere);
    }

    #[test]
    fn lines_cut_off_anywhere_are_skipped_without_a_panic() {
        let line = br"36 35 98:5 / /mnt rw shared:2 - ext4 /dev/vda rw\0";
        for end in 0..line.len() {
            let _ = parse_line(&line[..end]);
        }
        assert_eq!(unescape(br"a\"), Path::new(r"a\"));
        assert_eq!(unescape(br"a\999"), Path::new(r"a\999"));
    }

    #[test]
    fn proc_is_found_where_it_is_mounted() {
        let mount = mount_at(Path::new("/proc/self/..")).unwrap().unwrap();
        assert_eq!(mount.fs_type, "proc");
        assert!(!mount.is_cairn());
        let (mount, place) = mount_of(Path::new("/proc/sys/kernel")).unwrap().unwrap();
        assert_eq!((mount.fs_type.as_str(), place.as_path()), ("proc", Path::new("/sys/kernel")));
    }

    #[test]
    fn an_open_file_of_another_process_is_found_as_its_holder() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(holder_of(file.path()), None);
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .stdin(file.reopen().unwrap())
            .spawn()
            .unwrap();
        let holder = holder_of(file.path());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(holder, Some(format!("process {} (sleep)", child.id())));
    }
}
