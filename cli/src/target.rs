//! What a user names: a mounted pool, or devices.

use crate::view::View;
use crate::Failure;
use cairn_host::admin::{self, AdminError, Reply, Request};
use cairn_host::mounts::{self, Mount};
use cairn_host::{members, open_devices, source, Access, FileDevice, OpenError, OpenOptions, Wait};
use fs_core::units::Txg;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a command that only looks waits for a device.
const PATIENCE: Duration = Duration::from_secs(10);

/// A pool as the user named it.
pub(crate) enum Target {
    /// A mount of it.
    Mounted(Mount),
    /// Its devices, not mounted.
    Devices(Vec<PathBuf>),
}

impl Target {
    /// Finds out what the paths name.
    pub(crate) fn find(sources: &[PathBuf]) -> Result<Target, Failure> {
        let paths = &source::resolve_all(sources).map_err(Failure::new)?[..];
        for path in paths {
            // A symlink or a name that is gone is the business of whoever opens it.
            let kind = match std::fs::metadata(path) {
                Ok(kind) => kind,
                Err(error) => match daemon_gone(path, &error) {
                    Some(failure) => return Err(failure),
                    None => continue,
                },
            };
            if kind.is_dir() {
                return mount_point(path).map(Target::Mounted);
            }
            if let Some(mount) = mounts::mount_of_device(path).filter(Mount::is_cairn) {
                return Ok(Target::Mounted(mount));
            }
        }
        // The mount shows one device of a pool; another may have been given.
        let others = members::complete(paths).into_iter().skip(paths.len());
        let mount = others.filter_map(|path| mounts::mount_of_device(&path)).find(Mount::is_cairn);
        Ok(mount.map_or_else(|| Target::Devices(paths.to_vec()), Target::Mounted))
    }
}

/// The failure, where a path cannot be looked at because the daemon of its mount has died.
pub(crate) fn daemon_gone(path: &Path, error: &std::io::Error) -> Option<Failure> {
    mounts::daemon_gone(path, error).map(Failure::new)
}

/// The cairn mount at a directory.
pub(crate) fn mount_point(path: &Path) -> Result<Mount, Failure> {
    let name = path.display();
    match mounts::mount_at(path) {
        Ok(Some(mount)) if mount.is_cairn() => Ok(mount),
        Ok(Some(mount)) => Err(Failure::new(format_args!(
            "{name} is a mount of type {}, not cairn",
            mount.fs_type
        ))),
        Ok(None) => Err(Failure::new(format_args!("{name} is not a mount point"))),
        Err(error) => Err(Failure::new(format_args!("{name}: {error}"))),
    }
}

/// Asks the daemon of a mount.
pub(crate) fn ask(mount: &Mount, request: Request) -> Result<Reply, AdminError> {
    admin::ask(mount.device, request)
}

/// The failure of an exchange with the daemon of a mount.
pub(crate) fn ask_failed(mount: &Mount, error: &AdminError) -> Failure {
    Failure::new(format_args!("{}: {error}", mount.mount_point.display()))
}

/// Opens devices to look at them, with those of the same pool that can be found. Those of a mounted
/// pool are opened too, with a warning: what they hold may change while it is read.
pub(crate) fn open_to_look(paths: &[PathBuf]) -> Result<Vec<Arc<FileDevice>>, Failure> {
    let paths = &members::complete(paths)[..];
    let wait = Wait { bound: PATIENCE, announce: &|message| eprintln!("cairn: {message}") };
    match open_devices(paths, OpenOptions::new(Access::ReadOnly), &wait) {
        Err(OpenError::Mounted { path, mount_point }) => {
            eprintln!(
                "cairn: {} is mounted on {}: what is shown may be out of date or contradict itself",
                path.display(),
                mount_point.display()
            );
            open_devices(paths, OpenOptions::new(Access::Unlocked), &wait).map_err(Failure::new)
        }
        other => other.map_err(Failure::new),
    }
}

/// Opens the pool on devices that are not mounted, as of group `txg` if one is given.
pub(crate) fn view(paths: &[PathBuf], txg: Option<u64>) -> Result<View, Failure> {
    let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    View::open(open_to_look(paths)?, txg.map(Txg))
        .map_err(|error| Failure::new(format_args!("{}: {error}", names.join(" "))))
}
