//! Things that must be undone, whatever happens.
//!
//! A guard undoes its effect when it is dropped: on success, on an error, on a panic. Guards are
//! also in a registry, from which a signal handler undoes them, newest first, so that an
//! interrupted run leaves no mount, loop device or process behind either.

use crate::run::Cmd;
use anyhow::{Context, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

/// What there is to undo.
#[derive(Clone, Debug)]
enum Undo {
    Unmount { dir: PathBuf, connection: Option<u64> },
    Detach { device: PathBuf },
    KillGroup { leader: u32 },
    RemoveDir { dir: PathBuf },
    RemoveMountPoint { dir: PathBuf },
    RemoveLink { link: PathBuf },
    RestoreMode { path: PathBuf, mode: u32 },
    RestoreSetting { path: PathBuf, value: String },
}

struct Registry {
    next: u64,
    entries: Vec<(u64, Undo)>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { next: 0, entries: Vec::new() });

/// Undoes its effect when dropped.
#[must_use = "dropping a guard undoes at once"]
#[derive(Debug)]
pub struct Guard {
    id: u64,
}

impl Guard {
    fn register(undo: Undo) -> Guard {
        let mut registry = lock();
        registry.next += 1;
        let id = registry.next;
        registry.entries.push((id, undo));
        Guard { id }
    }

    /// Forgets what there was to undo: it has been undone in the ordinary way.
    pub fn disarm(self) {
        take(self.id);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(undo) = take(self.id) {
            undo.carry_out();
        }
    }
}

fn lock() -> std::sync::MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn take(id: u64) -> Option<Undo> {
    let mut registry = lock();
    let at = registry.entries.iter().position(|entry| entry.0 == id)?;
    Some(registry.entries.remove(at).1)
}

/// Makes SIGINT, SIGTERM and SIGHUP undo everything before the process ends.
pub fn clean_up_on_signals() {
    let handler = || {
        eprintln!("xtask: interrupted, cleaning up");
        loop {
            let Some((_, undo)) = lock().entries.pop() else { break };
            undo.carry_out();
        }
        std::process::exit(130);
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("xtask: signals will not clean up: {error}");
    }
}

impl Undo {
    fn carry_out(self) {
        match self {
            Undo::Unmount { dir, connection } => force_unmount(&dir, connection),
            Undo::Detach { device } => detach(&device),
            Undo::KillGroup { leader } => kill_group(leader),
            Undo::RemoveMountPoint { dir } => {
                // Never what is in it: something may still be mounted there.
                if let Err(error) = fs::remove_dir(&dir) {
                    eprintln!("xtask: cannot remove {}: {error}", dir.display());
                }
            }
            Undo::RestoreMode { path, mode } => {
                if let Err(error) = fs::set_permissions(&path, Permissions::from_mode(mode)) {
                    eprintln!("xtask: cannot restore the mode of {}: {error}", path.display());
                }
            }
            Undo::RestoreSetting { path, value } => {
                if let Err(error) = fs::write(&path, value) {
                    eprintln!("xtask: cannot restore {}: {error}", path.display());
                }
            }
            Undo::RemoveLink { link } => {
                if let Err(error) = fs::remove_file(&link) {
                    eprintln!("xtask: cannot remove {}: {error}", link.display());
                }
            }
            Undo::RemoveDir { dir } => {
                if let Err(error) = fs::remove_dir_all(&dir) {
                    eprintln!("xtask: cannot remove {}: {error}", dir.display());
                }
            }
        }
    }
}

/// Unmounts `dir` when dropped, by force if it must.
pub fn mounted(dir: &Path) -> Guard {
    Guard::register(Undo::Unmount { dir: dir.to_owned(), connection: fuse_connection(dir) })
}

/// Kills the process group of `leader` when dropped.
pub fn process_group(leader: u32) -> Guard {
    Guard::register(Undo::KillGroup { leader })
}

/// A symbolic link, removed when the guard is dropped.
///
/// # Errors
/// When it cannot be made.
pub fn symlink(target: &Path, link: &Path) -> Result<Guard> {
    std::os::unix::fs::symlink(target, link)
        .with_context(|| format!("cannot make {}", link.display()))?;
    Ok(Guard::register(Undo::RemoveLink { link: link.to_owned() }))
}

/// Another value for a setting of the machine, a file below /sys, until the guard is dropped.
///
/// # Errors
/// When it cannot be changed.
pub fn setting(path: &Path, value: &str) -> Result<Guard> {
    let old = fs::read_to_string(path)?.trim().to_owned();
    fs::write(path, value).with_context(|| format!("cannot change {}", path.display()))?;
    Ok(Guard::register(Undo::RestoreSetting { path: path.to_owned(), value: old }))
}

/// Other permissions for `path` until the guard is dropped.
///
/// # Errors
/// When they cannot be changed.
pub fn permissions(path: &Path, mode: u32) -> Result<Guard> {
    let old = fs::metadata(path)?.permissions().mode() & 0o7777;
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("cannot change the mode of {}", path.display()))?;
    Ok(Guard::register(Undo::RestoreMode { path: path.to_owned(), mode: old }))
}

/// A new, empty directory below `parent`, removed with its content when the guard is dropped.
///
/// # Errors
/// When it cannot be made.
pub fn temp_dir(parent: &Path, prefix: &str) -> Result<(PathBuf, Guard)> {
    let dir = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(parent)
        .with_context(|| format!("cannot make a directory in {}", parent.display()))?
        .keep();
    let guard = Guard::register(Undo::RemoveDir { dir: dir.clone() });
    Ok((dir, guard))
}

/// A new directory to mount on, removed when the guard is dropped. Its path is short: the address
/// of a socket has room for 107 bytes of path.
///
/// # Errors
/// When it cannot be made.
pub fn mount_point() -> Result<(PathBuf, Guard)> {
    let parent = std::env::temp_dir();
    let dir = tempfile::Builder::new()
        .prefix("cairn-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot make a directory in {}", parent.display()))?
        .keep();
    let guard = Guard::register(Undo::RemoveMountPoint { dir: dir.clone() });
    Ok((dir, guard))
}

/// Attaches a loop device with direct I/O to `image`; it is detached when the guard is dropped.
///
/// # Errors
/// When there is no loop device to be had.
pub fn loop_device(image: &Path, read_only: bool) -> Result<(PathBuf, Guard)> {
    let mut cmd = Cmd::new("losetup").args(["--find", "--show", "--direct-io=on"]);
    if read_only {
        cmd = cmd.arg("--read-only");
    }
    let device = PathBuf::from(cmd.arg(image).text()?.trim());
    let guard = Guard::register(Undo::Detach { device: device.clone() });
    Ok((device, guard))
}

fn detach(device: &Path) {
    // The kernel may hold the device for a moment after the unmount.
    for _ in 0..50 {
        let done = Cmd::new("losetup").arg("--detach").arg(device).output();
        if done.is_ok_and(|out| out.code == Some(0)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("xtask: {} stays attached", device.display());
}

fn kill_group(leader: u32) {
    let pid = i32::try_from(leader).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // An error means that the group is gone already.
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
}

/// The row of `dir` in the mount table: device number and type.
fn mount_row(dir: &Path) -> Option<(u32, u32, String)> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().rev().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ');
        let numbers = fields.nth(2)?;
        (Path::new(fields.nth(1)?) == dir).then_some(())?;
        let (major, minor) = numbers.split_once(':')?;
        let kind = right.split(' ').next()?.to_owned();
        Some((major.parse().ok()?, minor.parse().ok()?, kind))
    })
}

/// The command that unmounts `dir`, for root and for others.
pub fn unmount_command(dir: &Path) -> Cmd {
    if rustix::process::geteuid().is_root() {
        Cmd::new("umount").arg(dir)
    } else {
        Cmd::new("fusermount3").arg("-u").arg(dir)
    }
}

/// Whether something is mounted on `dir`.
pub fn is_mounted(dir: &Path) -> bool {
    mount_row(dir).is_some()
}

/// The number under which the FUSE connection of the mount at `dir` can be aborted.
fn fuse_connection(dir: &Path) -> Option<u64> {
    let (major, minor, kind) = mount_row(dir)?;
    // The kernel names a connection by the raw device number of its superblock.
    kind.starts_with("fuse").then(|| u64::from(major) << 20 | u64::from(minor))
}

fn force_unmount(dir: &Path, connection: Option<u64>) {
    for attempt in 0..3 {
        if !is_mounted(dir) {
            return;
        }
        let limit = Duration::from_secs(if attempt == 0 { 60 } else { 10 });
        let done = unmount_command(dir).limit(limit).output();
        if done.is_ok_and(|out| out.code == Some(0)) {
            return;
        }
        // A server that hangs is cut off: its requests fail, and the mount can go.
        if let Some(number) = connection {
            let _ = fs::write(format!("/sys/fs/fuse/connections/{number}/abort"), "1");
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    let _ = Cmd::new("umount").arg("--lazy").arg(dir).limit(Duration::from_secs(10)).output();
    eprintln!("xtask: {} had to be unmounted by force", dir.display());
}
