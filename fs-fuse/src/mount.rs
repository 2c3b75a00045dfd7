//! Putting a session under a directory, and taking it away.
//!
//! Three ways, in the order in which they are tried:
//!
//! | who | source | type | how |
//! | --- | --- | --- | --- |
//! | root | a block device | `fuseblk.cairn` | the new mount API |
//! | root | an image file | `fuseblk.cairn` | a loop device over it as anchor, see below |
//! | root | where the above fails | `fuse.cairn` | the new mount API |
//! | anyone else | | `fuse.cairn` | fusermount3, see `fusermount.rs` |
//!
//! `fuseblk` is wanted because only with it the kernel passes on sync(2) and syncfs(2), and makes
//! umount(2) wait until the daemon has committed and closed. It needs a block device that the
//! kernel can claim for itself.
//!
//! For an image file the loop device is that and nothing more: the daemon reads and writes the file
//! itself, which saves a layer on each transfer, and the loop device, set to vanish with its last
//! user, never carries a byte. So that the mount table still shows the path that was given, the
//! filesystem is created in a private mount namespace in which the loop device stands in
//! the place of the image (a bind mount); the finished mount is then attached in the real one.

use crate::options::Options;
use crate::sys::{self, LoopFlags};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, CWD};
use rustix::io::Errno;
use rustix::mount::{
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind,
    mount_change, move_mount, unmount, FsMountFlags, FsOpenFlags, MountPropagationFlags,
    MoveMountFlags, UnmountFlags,
};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Largest transfer, in bytes of a page each, that fits the kernel's block size checks.
const BLOCK_BYTES: u32 = 4096;

/// Memory for unwritten data that even the smallest pool has.
const UNWRITTEN_BYTES_MIN: u64 = 32 << 20;

/// A filesystem to attach.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// What to show as source, as given by the caller.
    pub source: &'a Path,
    /// Where to attach it; an existing directory.
    pub target: &'a Path,
    /// Flags and options.
    pub options: &'a Options,
}

/// How a filesystem came to be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// On a block device: sync(2) arrives, umount(2) waits.
    BlockDevice,
    /// Without one.
    Plain,
}

/// Mounts as root: `device` must not have been mounted before.
///
/// # Errors
/// What the kernel says to the last way that was tried.
pub fn mount_as_root(plan: &Plan<'_>, device: &OwnedFd) -> Result<Kind, Errno> {
    match mount_on_block_device(plan, device) {
        Ok(()) => Ok(Kind::BlockDevice),
        // The place or the privilege is what is wrong: another type would fare no better.
        Err(errno @ (Errno::PERM | Errno::NOTDIR)) => Err(errno),
        Err(_) => {
            let fs = Context::new("fuse", plan, device)?.create()?;
            attach(&fs, plan.target)?;
            Ok(Kind::Plain)
        }
    }
}

fn mount_on_block_device(plan: &Plan<'_>, device: &OwnedFd) -> Result<(), Errno> {
    let kind = std::fs::metadata(plan.source).map_err(|_| Errno::NODEV)?.file_type();
    if kind.is_block_device() {
        return attach(&Context::new("fuseblk", plan, device)?.create()?, plan.target);
    }
    if !kind.is_file() {
        return Err(Errno::NOTBLK);
    }
    let anchor = LoopDevice::over(plan.source, plan.options.read_only)?;
    let filesystem = create_in_disguise(plan, device, &anchor)
        // Then the loop device is what the mount table shows.
        .or_else(|_| {
            Context::new("fuseblk", &Plan { source: &anchor.path, ..*plan }, device)?.create()
        })?;
    attach(&filesystem, plan.target)
    // The mount holds the loop device now; when it goes, so does the loop device.
}

/// Creates the filesystem in a namespace where `anchor` stands in the place of the image, and
/// returns it not yet attached.
fn create_in_disguise(
    plan: &Plan<'_>,
    device: &OwnedFd,
    anchor: &LoopDevice,
) -> Result<OwnedFd, Errno> {
    // A namespace belongs to a thread; this one takes it with it when it ends.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            sys::unshare_mounts()?;
            // What is mounted here stays here; what is unmounted elsewhere does not linger.
            mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
            mount_bind(&anchor.path, plan.source)?;
            Context::new("fuseblk", plan, device)?.create()
        });
        thread.join().unwrap_or(Err(Errno::IO))
    })
}

/// A filesystem being configured.
struct Context<'a> {
    fs: OwnedFd,
    options: &'a Options,
}

impl<'a> Context<'a> {
    fn new(kind: &str, plan: &Plan<'a>, device: &OwnedFd) -> Result<Context<'a>, Errno> {
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        let set = |key: &str, value: &str| fsconfig_set_string(fs.as_fd(), key, value);
        fsconfig_set_string(fs.as_fd(), "source", plan.source)?;
        set("fd", &device.as_raw_fd().to_string())?;
        set("rootmode", "40000")?;
        set("user_id", "0")?;
        set("group_id", "0")?;
        set("subtype", "cairn")?;
        if kind == "fuseblk" {
            set("blksize", &BLOCK_BYTES.to_string())?;
        }
        fsconfig_set_flag(fs.as_fd(), "default_permissions")?;
        fsconfig_set_flag(fs.as_fd(), "allow_other")?;
        for name in plan.options.superblock_flags() {
            fsconfig_set_flag(fs.as_fd(), name)?;
        }
        for (key, value) in &plan.options.security {
            set(key, value)?;
        }
        Ok(Context { fs, options: plan.options })
    }

    /// Creates the filesystem; the result is a mount that is attached nowhere yet.
    fn create(self) -> Result<OwnedFd, Errno> {
        fsconfig_create(self.fs.as_fd())?;
        let attributes = self.options.mount_attributes();
        fsmount(self.fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    }
}

fn attach(filesystem: &OwnedFd, target: &Path) -> Result<(), Errno> {
    move_mount(filesystem, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// A loop device that this process has set up.
struct LoopDevice {
    path: PathBuf,
    /// Keeps it until the mount does.
    _device: File,
}

impl LoopDevice {
    /// Somebody else may take a free device before this process does; so often it tries again.
    const ATTEMPTS: usize = 16;

    fn over(image: &Path, read_only: bool) -> Result<LoopDevice, Errno> {
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let open = |path: &Path, flags: OFlags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        let image_fd = open(image, access)?;
        let control = open(Path::new("/dev/loop-control"), OFlags::RDWR)?;
        let name = image.as_os_str().as_bytes();
        for _ in 0..LoopDevice::ATTEMPTS {
            let number = sys::free_loop_device(&control)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path, access)?;
            let configure = |direct_io| {
                let flags = LoopFlags { read_only, direct_io };
                sys::configure_loop(&device, image_fd.as_raw_fd(), name, flags)
            };
            // Direct, so that whoever reads the loop device leaves no pages of the image behind.
            match configure(true).or_else(|errno| match errno {
                Errno::INVAL => configure(false),
                other => Err(other),
            }) {
                Ok(()) => return Ok(LoopDevice { path, _device: File::from(device) }),
                Err(Errno::BUSY) => (),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::BUSY)
    }
}

/// Detaches a mount made by this process as root. When it is busy it disappears from the tree at
/// once and ends when its last user does.
///
/// # Errors
/// What the kernel says.
pub fn unmount_as_root(target: &Path) -> Result<(), Errno> {
    match unmount(target, UnmountFlags::NOFOLLOW) {
        Err(Errno::BUSY) => unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
        result => result,
    }
}

/// Raises what the kernel grants a FUSE filesystem of read-ahead (128 KiB) and of memory for
/// unwritten data (1 % of what the system allows). Both are guards against servers that are not
/// trusted; root started this one. Best effort.
///
/// Of a small pool, of `total_bytes`, unwritten data must not be many times what there is room for:
/// the kernel takes it without asking, and a writer would learn late that the pool is full.
pub fn raise_limits(target: &Path, read_ahead_bytes: u32, total_bytes: u64) {
    let Ok(device) = device_of(target) else { return };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    for suffix in ["", "-fuseblk"] {
        let bdi = PathBuf::from(format!("/sys/class/bdi/{major}:{minor}{suffix}"));
        let _ = std::fs::write(bdi.join("read_ahead_kb"), (read_ahead_bytes >> 10).to_string());
        let _ = std::fs::write(bdi.join("max_ratio"), "40");
        let granted = std::fs::read_to_string(bdi.join("max_bytes"));
        let granted = granted.ok().and_then(|bytes| bytes.trim().parse::<u64>().ok());
        let suitable = (total_bytes / 2).max(UNWRITTEN_BYTES_MIN);
        if granted.is_some_and(|granted| granted > suitable) {
            let _ = std::fs::write(bdi.join("max_bytes"), suitable.to_string());
        }
    }
}

/// The device number of a mount, without a request to its server.
///
/// A server must not ask itself: were it killed meanwhile, its waiting thread would keep the
/// connection open that it waits for, for good.
pub(crate) fn device_of(target: &Path) -> Result<rustix::fs::Dev, Errno> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, target, flags, StatxFlags::empty())?;
    Ok(rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor))
}
