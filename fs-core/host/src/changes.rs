//! Changing the devices of a pool that is open here: for the daemon of a mount, and for the command
//! when there is none.

use crate::admin::{DeviceRequest, DeviceState, PoolInfo};
use crate::parse::format_size;
use crate::{mounts, probe, Access, FileDevice, OpenOptions, Wait};
use fs_core::engine::Engine;
use fs_core::error::Error;
use fs_core::platform::DeviceRef;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long a device that is busy is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Does what was asked for. Moving goes on in the background.
///
/// # Errors
/// One sentence.
pub fn carry_out(engine: &Arc<Engine>, request: &DeviceRequest) -> Result<(), String> {
    match request {
        DeviceRequest::Add { path, force } => {
            refuse_own(engine, path)?;
            let device = open_new(path, *force)?;
            engine.add_device(device).map(|_| ()).map_err(|error| on(path, &error))
        }
        DeviceRequest::Replace { index, path, force } => {
            refuse_own(engine, path)?;
            let device = open_new(path, *force)?;
            let begun = engine.replace_device(*index, device).map(|_| ());
            begun.map_err(|error| on(path, &error))
        }
        DeviceRequest::Remove { index } => {
            engine.remove_device(*index).map_err(|error| sentence(&error))
        }
        DeviceRequest::Resize { index, bytes } => {
            engine.resize_device(*index, *bytes).map_err(|error| match error {
                Error::Truncated { found, .. } => {
                    format!("the device itself has only {}", format_size(found))
                }
                error => sentence(&error),
            })
        }
        DeviceRequest::Cancel => engine.cancel_device_change().map_err(|error| sentence(&error)),
    }
}

/// Whether a change is meant for a pool that lacks a device: what is missing is to go.
pub fn may_lack(info: &PoolInfo, request: &DeviceRequest) -> bool {
    let index = match request {
        DeviceRequest::Remove { index } | DeviceRequest::Replace { index, .. } => *index,
        _ => return false,
    };
    let is_missing = |state| state == DeviceState::Missing;
    info.devices.iter().any(|device| device.index == index && is_missing(device.state))
}

fn on(path: &Path, error: &Error) -> String {
    format!("{}: {}", path.display(), sentence(error))
}

fn sentence(error: &Error) -> String {
    match error {
        Error::NoSpace => "the other devices have not enough room for what is on it and what was \
             promised to files"
            .into(),
        other => other.to_string(),
    }
}

/// Refuses a device that the pool has.
fn refuse_own(engine: &Engine, path: &Path) -> Result<(), String> {
    let canonical = |path: &Path| path.canonicalize().ok();
    let is_same =
        |name: String| canonical(Path::new(&name)).is_some_and(|p| Some(p) == canonical(path));
    match engine.store.pool.members().iter().any(|member| is_same(member.name())) {
        true => Err(format!("{} is a device of this pool already", path.display())),
        false => Ok(()),
    }
}

/// Opens a device that is to be added, if it holds nothing or that does not matter.
fn open_new(path: &Path, force: bool) -> Result<DeviceRef, String> {
    if let Some(mount) = mounts::mount_of_device(path) {
        let place = mount.mount_point.display();
        return Err(format!("{} is mounted on {place}; unmount it first", path.display()));
    }
    let wait = Wait { bound: PATIENCE, announce: &|_| {} };
    let device = FileDevice::open(path, OpenOptions::new(Access::ReadWrite), &wait);
    let device = device.map_err(|error| error.to_string())?;
    if !force {
        if let Some(found) = probe::probe(&device, path)? {
            let name = path.display();
            return Err(format!("{name} holds {found}; use --force to overwrite it"));
        }
    }
    Ok(Arc::new(device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{create_image, host_platform, open_devices};
    use fs_core::engine::{self, format, FormatOptions};

    #[test]
    fn a_size_beyond_the_end_of_a_device_is_refused_by_its_own_size() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("a")];
        create_image(&paths[0], 16 << 20).unwrap();
        let options = OpenOptions::new(Access::ReadWrite);
        let devices = open_devices(&paths, options, &Wait::none()).unwrap();
        let devices: Vec<DeviceRef> = devices.into_iter().map(|d| d as DeviceRef).collect();
        format(devices.clone(), host_platform(), &FormatOptions::default()).unwrap();
        let options = engine::OpenOptions::default();
        let engine = engine::open(devices, host_platform(), &options).unwrap();
        let request = DeviceRequest::Resize { index: 0, bytes: Some(1 << 30) };
        let refused = carry_out(&engine, &request).unwrap_err();
        assert_eq!(refused, "the device itself has only 16.0 MiB");
        engine.close().unwrap();
    }
}
