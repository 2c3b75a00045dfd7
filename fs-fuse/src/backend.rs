//! What the driver needs of a mounted volume beyond its operations, and how one is opened.

use crate::admin;
use crate::device::Threads;
use crate::log;
use crate::notify::Kernel;
use crate::options::{Compression, Options};
use cairn_host::admin::Handler;
use cairn_host::versions::{self, VersionName};
use cairn_host::{members, Access, FileDevice, LogReport, LogTarget, OpenError, OpenOptions, Wait};
use fs_core::engine::{self, Engine};
use fs_core::error::Error;
use fs_core::format::ptr::CompressionKind;
use fs_core::platform::{DeviceRef, Platform};
use fs_core::units::Txg;
use fs_core::vfs::{AccessTime, Filesystem, Forest, Volume};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A volume as the driver holds it.
pub trait Mounted: Filesystem {
    /// Makes everything durable and refuses changes from now on, or allows them again.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] when changes cannot be allowed, because the devices were opened for
    /// reading; otherwise what made the commit fail.
    fn set_read_only(&self, read_only: bool) -> Result<(), Error>;

    /// Commits, stops background work and lets go of the devices. Nothing else is called after.
    ///
    /// # Errors
    /// What made the commit fail; the devices are released all the same.
    fn close(&self) -> Result<(), Error>;
}

/// A pool that has been opened to be mounted.
pub struct Opened {
    /// The volume.
    pub volume: Arc<dyn Mounted>,
    /// Gives up the exclusive claim on block devices, so that the kernel can claim the one the
    /// filesystem is mounted on. The lock against other cairn processes stays.
    pub release_claim: Box<dyn FnOnce() + Send>,
    /// Nothing can be written, whatever the options say.
    pub read_only: bool,
    /// Answers the `cairn` command while the pool is mounted.
    pub admin: Option<Arc<Handler>>,
    /// The kernel, to be told what changes behind its back; the driver connects it.
    pub kernel: Arc<Kernel>,
}

impl Mounted for Forest {
    fn set_read_only(&self, read_only: bool) -> Result<(), Error> {
        self.base().set_read_only(read_only)
    }

    fn close(&self) -> Result<(), Error> {
        self.base().close()
    }
}

/// Opens the pool on `source`, replaying its log if need be; `background` says that messages belong
/// in the system's log. Must be called after the process has gone to the background: threads and
/// rings made here do not survive a fork.
///
/// # Errors
/// One sentence that names the device.
pub fn open(source: &Path, options: &Options, background: bool) -> Result<Opened, String> {
    let mut paths = vec![source.to_path_buf()];
    paths.extend(options.devices.iter().map(PathBuf::from));
    if options.degraded {
        leave_out_missing(&mut paths);
    }
    // Image files do not appear by themselves.
    let bound = match paths.iter().any(|path| members::is_block_device(path)) {
        true => LATE_DEVICES_BOUND,
        false => Duration::ZERO,
    };
    let wait = Wait { bound, ..Wait::usual() };
    let paths = members::complete_in_time(&paths, &wait);
    let (devices, read_only) = open_devices(&paths, options).map_err(|error| error.to_string())?;
    let options = &Options { read_only, ..options.clone() };
    let target = if background { LogTarget::System } else { LogTarget::Stderr };
    let platform = Platform {
        report: Arc::new(LogReport::new(source.display().to_string(), target)),
        ..cairn_host::host_platform()
    };
    let members = devices.iter().map(|device| Arc::clone(device) as DeviceRef).collect();
    let wanted = engine_options(options);
    let opened = match options.rewind {
        true => engine::past::rewind(members, platform, &wanted),
        false => engine::open(members, platform, &wanted),
    };
    let engine = opened.map_err(|error| {
        let hint = match error {
            Error::MissingDevices { needed: false, .. } => " (mount option degraded)",
            Error::NoGroup { .. } => " (cairn history)",
            _ => "",
        };
        format!("{}: {error}{hint}", source.display())
    })?;
    if options.rewind {
        let superblock = engine.published().1;
        log::info(&format!("{}: going back to group {}", source.display(), superblock.txg));
    }
    let volume = match volume_of(&engine, options) {
        Ok(volume) => Forest::new(volume),
        Err(sentence) => {
            // Nothing was changed but what opening replayed.
            let _ = engine.close();
            return Err(format!("{}: {sentence}", source.display()));
        }
    };
    // The kernel claims the one that the mount shows; the others stay claimed.
    // Not kept alive: a device that is removed is free for other uses.
    let first = devices.first().map(Arc::downgrade);
    drop(devices);
    let release_claim = move || {
        if let Some(device) = first.as_ref().and_then(Weak::upgrade) {
            device.release_claim();
        }
    };
    let kernel = Arc::new(Kernel::default());
    let in_force = in_force(options, &volume);
    let admin = Some(admin::handler(Arc::clone(&volume), Arc::clone(&kernel), in_force));
    Ok(Opened { volume, release_claim: Box::new(release_claim), read_only, admin, kernel })
}

/// The devices, and whether they can only be read. What is write-protected is mounted read-only, as
/// mount(8) does it with any filesystem, unless the caller insists on writing.
fn open_devices(
    paths: &[PathBuf],
    options: &Options,
) -> Result<(Vec<Arc<FileDevice>>, bool), OpenError> {
    let open = |access| {
        cairn_host::open_devices(paths, OpenOptions::new(access), &Wait::usual())
            .map(|devices| (devices, access == Access::ReadOnly))
    };
    if options.read_only {
        return open(Access::ReadOnly);
    }
    open(Access::ReadWrite).or_else(|error| match error {
        OpenError::WriteProtected { .. } if !options.insist_on_writing => {
            log::warning(&format!("{error}: mounting the pool read-only"));
            open(Access::ReadOnly)
        }
        error => Err(error),
    })
}

/// cairn's own options as they are in force, with what is so when they are not given.
fn in_force(options: &Options, forest: &Forest) -> Vec<String> {
    let engine = forest.base().engine();
    let name = engine.with_versions(|all| all.shown(forest.base().version()));
    let dirty = dirty_bytes(options);
    let chosen = engine_options(options);
    let settings = engine.settings();
    let compression = match (settings.compression, settings.level) {
        (CompressionKind::None, _) => Compression::None,
        (CompressionKind::Zstd, level) => Compression::Zstd(level as i8),
    };
    Options {
        subvolume: Some(String::from_utf8_lossy(&name).into_owned()),
        snapshot: None,
        compression: Some(compression),
        commit_seconds: Some(chosen.commit_seconds as u32),
        cache_bytes: Some(chosen.cache_bytes as u64),
        dirty_bytes: Some(dirty),
        threads: Some(Threads::new(options.threads, dirty, options.transport).max),
        txg: options.names_group().then(|| engine.published().1.txg.0),
        ..options.clone()
    }
    .own()
}

/// The subvolume or snapshot that is to be mounted.
fn volume_of(engine: &Arc<Engine>, options: &Options) -> Result<Arc<Volume>, String> {
    let id = match (&options.subvolume, &options.snapshot) {
        (None, None) => engine.default_subvol().ok_or("nothing to mount")?.id.0,
        (subvolume, snapshot) => {
            let mut name = VersionName::parse(subvolume.as_deref().unwrap_or_default());
            name.snapshot = snapshot.clone().or(name.snapshot);
            versions::find(engine, &name)?
        }
    };
    Volume::of_version(Arc::clone(engine), id, access_time(options))
        .map_err(|error| error.to_string())
}

/// How long a mount waits for devices that are slow to appear.
const LATE_DEVICES_BOUND: Duration = Duration::from_secs(15);

/// Leaves out devices besides the first that were named and are not there.
fn leave_out_missing(paths: &mut Vec<PathBuf>) {
    let mut is_first = true;
    paths.retain(|path| {
        let keeps = core::mem::take(&mut is_first) || path.exists();
        if !keeps {
            eprintln!("{}: there is no such device; going on without it", path.display());
        }
        keeps
    });
}

/// Memory for changes and requests, in bytes.
pub fn dirty_bytes(options: &Options) -> u64 {
    options.dirty_bytes.unwrap_or(engine::OpenOptions::default().dirty_bytes)
}

fn engine_options(options: &Options) -> engine::OpenOptions {
    let defaults = engine::OpenOptions::default();
    let dirty = dirty_bytes(options);
    let requests = Threads::new(options.threads, dirty, options.transport).memory();
    engine::OpenOptions {
        read_only: options.read_only,
        txg: options.txg.map(Txg),
        degraded: options.degraded,
        cache_bytes: options
            .cache_bytes
            .map_or(defaults.cache_bytes, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
        // Requests on their way to the core are changes too.
        dirty_bytes: dirty - requests.min(dirty / 2),
        commit_seconds: options.commit_seconds.map_or(defaults.commit_seconds, u64::from),
        compression: options.compression.map(|compression| match compression {
            Compression::None => (CompressionKind::None, 0),
            Compression::Zstd(level) => (CompressionKind::Zstd, level.into()),
        }),
        ..defaults
    }
}

fn access_time(options: &Options) -> AccessTime {
    match (options.flags.noatime, options.flags.strictatime) {
        (true, _) => AccessTime::Never,
        (false, true) => AccessTime::Strict,
        (false, false) => AccessTime::Relative,
    }
}
