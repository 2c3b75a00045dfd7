//! Opening, and keeping others away.
//!
//! Two locks, because they keep different users away:
//!
//! - a block device is *claimed* (`O_EXCL`), as the kernel does for everything mounted, for swap,
//!   and for members of volume groups and arrays: whoever comes second gets EBUSY;
//! - block devices and images are locked with `flock`, which other cairn processes and udev honour.
//!   The lock belongs to the open file, so a process that goes into the background keeps it.
//!
//! An image that a claimed loop device stands on counts as busy too.
//!
//! `umount` may return before the daemon has let go of the device, so that a command run directly
//! after finds the device busy for a moment. Opening therefore waits, up to a bound, unless the
//! device is still mounted: that will not pass by itself.

use super::uring::Rings;
use super::{FileDevice, IoMethod};
use crate::mounts;
use fs_core::buf::Buf;
use fs_core::platform::Geometry;
use fs_core::units::SECTOR_BYTES;
use parking_lot::Mutex;
use rustix::fs::{flock, FlockOperation, OFlags};
use rustix::io::Errno;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing; nobody else may use it.
    ReadWrite,
    /// Reading; others may read too.
    ReadOnly,
    /// Reading whatever others do: what is read may change meanwhile.
    Unlocked,
}

/// How to open a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// What for.
    pub access: Access,
    /// How batches reach the kernel.
    pub method: IoMethod,
    /// Bypass the page cache where possible.
    pub direct: bool,
}

impl OpenOptions {
    /// The usual way to open for `access`.
    pub fn new(access: Access) -> OpenOptions {
        OpenOptions { access, method: IoMethod::default(), direct: true }
    }
}

/// How long to wait for a busy device, and whom to tell.
pub struct Wait<'a> {
    /// Longest wait.
    pub bound: Duration,
    /// Called with a sentence once the wait has become noticeable.
    pub announce: &'a dyn Fn(&str),
}

impl Wait<'_> {
    /// The usual bound.
    pub const DEFAULT_BOUND: Duration = Duration::from_secs(30);

    /// Waits the usual time and says so on standard error.
    pub fn usual() -> Wait<'static> {
        Wait { bound: Wait::DEFAULT_BOUND, announce: &|message| eprintln!("{message}") }
    }

    /// Does not wait.
    pub fn none() -> Wait<'static> {
        Wait { bound: Duration::ZERO, announce: &|_| {} }
    }
}

/// A wait shorter than this is not announced.
const UNNOTICED: Duration = Duration::from_millis(500);
/// Time between two attempts.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Why a device could not be opened. Displays as one sentence that names it.
#[derive(Debug)]
pub enum OpenError {
    /// The system refused.
    System {
        /// The device.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Neither a block device nor a regular file.
    NotADevice {
        /// The device.
        path: PathBuf,
    },
    /// It is mounted.
    Mounted {
        /// The device.
        path: PathBuf,
        /// Where.
        mount_point: PathBuf,
    },
    /// Another user did not let go of it in time.
    Busy {
        /// The device.
        path: PathBuf,
        /// Who that may be.
        holder: Option<String>,
        /// How long the wait was.
        waited: Duration,
    },
    /// Writing is wanted, and only reading would be possible.
    WriteProtected {
        /// The device.
        path: PathBuf,
        /// What the system says; nothing when it is the device that refuses all writes.
        cause: Option<io::Error>,
    },
    /// Its blocks are larger than cairn's sectors.
    BlockSize {
        /// The device.
        path: PathBuf,
        /// Bytes of its blocks.
        block_bytes: u32,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::System { path, cause } => write!(f, "{}: {}", path.display(), plain(cause)),
            OpenError::NotADevice { path } => {
                write!(f, "{}: neither a block device nor an image file", path.display())
            }
            OpenError::Mounted { path, mount_point } => write!(
                f,
                "{} is mounted on {}; unmount it first",
                path.display(),
                mount_point.display()
            ),
            OpenError::Busy { path, holder, waited } => {
                write!(f, "{} is in use", path.display())?;
                if let Some(holder) = holder {
                    write!(f, " by {holder}")?;
                }
                if waited.as_secs() > 0 {
                    write!(f, " and was not released within {} s", waited.as_secs())?;
                }
                Ok(())
            }
            OpenError::WriteProtected { path, cause: None } => {
                write!(f, "{} is write-protected", path.display())
            }
            OpenError::WriteProtected { path, cause: Some(cause) } => {
                write!(f, "{} cannot be written to: {}", path.display(), plain(cause))
            }
            OpenError::BlockSize { path, block_bytes } => write!(
                f,
                "{} has blocks of {block_bytes} bytes; cairn needs at most {SECTOR_BYTES}",
                path.display()
            ),
        }
    }
}

/// An error's text without the number that `io::Error` appends.
fn plain(cause: &io::Error) -> String {
    let text = cause.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

impl std::error::Error for OpenError {}

/// Opens every device of a pool. All or none: on an error those opened before are closed.
///
/// # Errors
/// The first device that could not be opened, and why.
pub fn open_devices<P: AsRef<Path>>(
    paths: &[P],
    options: OpenOptions,
    wait: &Wait<'_>,
) -> Result<Vec<Arc<FileDevice>>, OpenError> {
    paths.iter().map(|path| FileDevice::open(path.as_ref(), options, wait).map(Arc::new)).collect()
}

/// Makes a sparse image file of `bytes` bytes that must not exist yet.
///
/// # Errors
/// What the system says.
pub fn create_image(path: &Path, bytes: u64) -> io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o644).open(path)?;
    file.set_len(bytes).and_then(|()| file.sync_all()).inspect_err(|_| {
        // A half-made image would only be in the way of the next attempt.
        let _ = std::fs::remove_file(path);
    })
}

impl FileDevice {
    /// Opens a block device or image file and locks it as `options` say. May wait as long as
    /// `wait` allows.
    ///
    /// # Errors
    /// Why not.
    pub fn open(
        path: &Path,
        options: OpenOptions,
        wait: &Wait<'_>,
    ) -> Result<FileDevice, OpenError> {
        let system = |cause| OpenError::System { path: path.to_path_buf(), cause };
        let kind = std::fs::metadata(path).map_err(system)?;
        let block_device = kind.file_type().is_block_device();
        if !block_device && !kind.is_file() {
            return Err(OpenError::NotADevice { path: path.to_path_buf() });
        }
        if block_device && options.access == Access::ReadWrite && is_write_protected(&kind) {
            return Err(OpenError::WriteProtected { path: path.to_path_buf(), cause: None });
        }
        let (mut file, direct) = open_file(path, options).map_err(|cause| {
            let only_to_read = options.access == Access::ReadWrite
                && refuses_writing(&cause)
                && File::open(path).is_ok();
            match only_to_read {
                true => OpenError::WriteProtected { path: path.to_path_buf(), cause: Some(cause) },
                false => system(cause),
            }
        })?;
        let claim = lock(path, &file, block_device, options.access, wait)?;
        let geometry = geometry(&mut file, options.access).map_err(system)?;
        if u64::from(geometry.block_bytes) > SECTOR_BYTES {
            let block_bytes = geometry.block_bytes;
            return Err(OpenError::BlockSize { path: path.to_path_buf(), block_bytes });
        }
        // A buffered io_uring transfer is handed to kernel threads one by one, which costs more
        // than it gives.
        let rings = (direct && options.method == IoMethod::Uring).then(Rings::new);
        Ok(FileDevice {
            file,
            claim: Mutex::new(claim),
            path: path.to_path_buf(),
            name: path.display().to_string(),
            geometry,
            block_device,
            direct,
            rings,
        })
    }
}

/// Whether the system refused to open for writing because of a permission or a read-only
/// filesystem.
fn refuses_writing(cause: &io::Error) -> bool {
    let refusals = [Errno::ACCESS, Errno::PERM, Errno::ROFS].map(Errno::raw_os_error);
    cause.raw_os_error().is_some_and(|code| refusals.contains(&code))
}

/// Opens bypassing the page cache if that is wanted and works.
fn open_file(path: &Path, options: OpenOptions) -> io::Result<(File, bool)> {
    let open = |flags: OFlags| {
        File::options()
            .read(true)
            .write(options.access == Access::ReadWrite)
            .custom_flags(flags.bits() as i32)
            .open(path)
    };
    if options.direct {
        match open(OFlags::DIRECT) {
            Ok(file) if direct_works(&file) => return Ok((file, true)),
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    open(OFlags::empty()).map(|file| (file, false))
}

/// Some filesystems accept the flag and refuse the first transfer.
fn direct_works(file: &File) -> bool {
    let Ok(mut sector) = Buf::zeroed(SECTOR_BYTES as usize) else { return false };
    rustix::io::pread(file, &mut *sector, 0) != Err(Errno::INVAL)
}

/// Locks the device, waiting if need be. Returns the claim on a block device.
fn lock(
    path: &Path,
    file: &File,
    block_device: bool,
    access: Access,
    wait: &Wait<'_>,
) -> Result<Option<File>, OpenError> {
    if access == Access::Unlocked {
        return Ok(None);
    }
    let start = Instant::now();
    let mut announced = false;
    loop {
        let attempt = try_lock(path, file, block_device, access)
            .map_err(|cause| OpenError::System { path: path.to_path_buf(), cause })?;
        if let Attempt::Locked(claim) = attempt {
            return Ok(claim);
        }
        if let Some(mount) = mounts::mount_of_device(path) {
            let mount_point = mount.mount_point;
            return Err(OpenError::Mounted { path: path.to_path_buf(), mount_point });
        }
        let waited = start.elapsed();
        if waited >= wait.bound {
            let holder = mounts::holder_of(path);
            return Err(OpenError::Busy { path: path.to_path_buf(), holder, waited });
        }
        if waited >= UNNOTICED && !announced {
            (wait.announce)(&format!("waiting for {} to be released ...", path.display()));
            announced = true;
        }
        std::thread::sleep(RETRY_EVERY.min(wait.bound));
    }
}

enum Attempt {
    Locked(Option<File>),
    Busy,
}

fn try_lock(path: &Path, file: &File, block_device: bool, access: Access) -> io::Result<Attempt> {
    let claim = if block_device {
        match claim_block_device(path)? {
            // Readers share: to have seen that nobody holds the claim is enough.
            Some(claim) => (access == Access::ReadWrite).then_some(claim),
            None => return Ok(Attempt::Busy),
        }
    } else {
        for device in mounts::loop_devices_on(path) {
            // A loop device that cannot be opened (no permission, gone) is not known to be in use.
            if matches!(claim_block_device(&device), Ok(None)) {
                return Ok(Attempt::Busy);
            }
        }
        None
    };
    let operation = match access {
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        Access::ReadOnly | Access::Unlocked => FlockOperation::NonBlockingLockShared,
    };
    match flock(file, operation) {
        Ok(()) => Ok(Attempt::Locked(claim)),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(Attempt::Busy),
        Err(error) => Err(error.into()),
    }
}

/// The claim on a block device, or `None` when someone else has it.
fn claim_block_device(path: &Path) -> io::Result<Option<File>> {
    match File::options().read(true).custom_flags(OFlags::EXCL.bits() as i32).open(path) {
        Ok(claim) => Ok(Some(claim)),
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn geometry(file: &mut File, access: Access) -> io::Result<Geometry> {
    let kind = file.metadata()?;
    let block_device = kind.file_type().is_block_device();
    // For block devices the end is where their size is; their metadata says zero.
    let bytes = file.seek(SeekFrom::End(0))?;
    let block_bytes = match block_device {
        true => rustix::fs::ioctl_blksszget(&*file)?,
        false => 512,
    };
    Ok(Geometry {
        bytes,
        block_bytes,
        discards: !block_device || block_device_discards(&kind),
        read_only: access != Access::ReadWrite,
    })
}

/// Whether the kernel refuses writes to the device. It opens such a device for writing all the
/// same, and only the first write fails: too late to say so to whoever mounts.
fn is_write_protected(kind: &Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(kind.rdev()), rustix::fs::minor(kind.rdev()));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro"))
        .is_ok_and(|text| text.trim() != "0")
}

/// Whether the kernel passes discards on to the device; a partition has the queue of its disk.
fn block_device_discards(kind: &Metadata) -> bool {
    let (major, minor) = (rustix::fs::major(kind.rdev()), rustix::fs::minor(kind.rdev()));
    let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    ["queue/discard_max_bytes", "../queue/discard_max_bytes"]
        .iter()
        .find_map(|name| std::fs::read_to_string(base.join(name)).ok())
        .is_some_and(|text| text.trim() != "0")
}
