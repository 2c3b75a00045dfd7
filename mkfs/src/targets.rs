//! The devices: whether they may be overwritten, and their making.

use crate::{Arguments, Failure};
use cairn_host::{
    create_image, mounts, open_devices, parse, probe, Access, FileDevice, OpenOptions, Wait,
};
use fs_core::platform::{Device, DeviceError, DeviceRef};
use fs_core::units::{align_down, Physical, SECTOR_BYTES};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// One device of the pool to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    /// Bytes it will have.
    pub(crate) bytes: u64,
    origin: Origin,
}

#[derive(Debug, PartialEq, Eq)]
enum Origin {
    /// It is there and stays as large as it is.
    AsIs,
    /// It is an image file that gets another size.
    Resize,
    /// It is not there yet.
    Create,
}

/// All devices, examined.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) targets: Vec<Target>,
}

/// Looks at every target without changing any.
pub(crate) fn examine(arguments: &Arguments) -> Result<Plan, Failure> {
    let mut targets: Vec<Target> = Vec::new();
    for path in &arguments.targets {
        let target = examine_one(path, arguments)?;
        let same = |other: &Target| path.canonicalize().ok() == other.path.canonicalize().ok();
        if targets.iter().any(|other| other.path == *path || path.exists() && same(other)) {
            return Err(Failure::new(format_args!("{} is given twice", path.display())));
        }
        targets.push(target);
    }
    Ok(Plan { targets })
}

fn examine_one(path: &Path, arguments: &Arguments) -> Result<Target, Failure> {
    let name = path.display();
    let kind = match fs::metadata(path) {
        Ok(kind) => kind,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let bytes = arguments.size.ok_or_else(|| {
                let hint = "give --size to make an image file";
                Failure::new(format_args!("{name} does not exist; {hint}"))
            })?;
            return Ok(Target { path: path.into(), bytes, origin: Origin::Create });
        }
        Err(error) => return Err(Failure::new(format_args!("{name}: {error}"))),
    };
    if kind.file_type().is_block_device() && arguments.size.is_some() {
        let hint = "--size is for image files";
        return Err(Failure::new(format_args!("{name} is a block device; {hint}")));
    }
    if let Some(mount) = mounts::mount_of_device(path) {
        let place = mount.mount_point.display();
        return Err(Failure::new(format_args!("{name} is mounted on {place}; unmount it first")));
    }
    // Reading is enough to look; whoever writes to it at the same time is found when it is opened
    // for writing.
    let devices = open(&[path.to_path_buf()], Access::ReadOnly, arguments)?;
    let found = probe::probe(&*devices[0], path).map_err(Failure::new)?;
    if let Some(found) = found.filter(|_| !arguments.force) {
        let hint = "use --force to overwrite it";
        return Err(Failure::new(format_args!("{name} holds {found}; {hint}")));
    }
    let bytes = devices[0].geometry().bytes;
    match arguments.size {
        Some(size) if size != bytes => {
            if bytes > 0 && !arguments.force {
                return Err(Failure::new(format_args!(
                    "{name} exists with {}; use --force to give it another size",
                    parse::format_size(bytes)
                )));
            }
            Ok(Target { path: path.into(), bytes: size, origin: Origin::Resize })
        }
        _ => Ok(Target { path: path.into(), bytes, origin: Origin::AsIs }),
    }
}

fn open(
    paths: &[PathBuf],
    access: Access,
    arguments: &Arguments,
) -> Result<Vec<Arc<FileDevice>>, Failure> {
    let announce = |message: &str| {
        if !arguments.quiet {
            eprintln!("mkfs.cairn: {message}");
        }
    };
    let wait = Wait { bound: Duration::from_secs(arguments.wait), announce: &announce };
    open_devices(paths, OpenOptions::new(access), &wait).map_err(Failure::new)
}

impl Plan {
    /// Makes and sizes image files, opens all devices for writing, and discards what is on them.
    /// After an error the image files made are gone again.
    pub(crate) fn carry_out(&self, arguments: &Arguments) -> Result<Vec<DeviceRef>, Failure> {
        self.create_files()?;
        let opened = self.open_all(arguments);
        if opened.is_err() {
            self.remove_created();
        }
        opened
    }

    fn create_files(&self) -> Result<(), Failure> {
        let new = || self.targets.iter().filter(|t| t.origin == Origin::Create);
        for (made, target) in new().enumerate() {
            create_image(&target.path, target.bytes).map_err(|cause| {
                new().take(made).for_each(Target::remove);
                Failure::new(format_args!("{}: {cause}", target.path.display()))
            })?;
        }
        Ok(())
    }

    fn open_all(&self, arguments: &Arguments) -> Result<Vec<DeviceRef>, Failure> {
        for target in self.targets.iter().filter(|t| t.origin == Origin::Resize) {
            resize(&target.path, target.bytes, arguments)?;
        }
        let paths: Vec<PathBuf> = self.targets.iter().map(|t| t.path.clone()).collect();
        let devices = open(&paths, Access::ReadWrite, arguments)?;
        if !arguments.no_discard {
            devices.iter().for_each(|device| discard(device, arguments));
        }
        Ok(devices.into_iter().map(|device| device as DeviceRef).collect())
    }

    /// Removes the image files that this run has made.
    pub(crate) fn remove_created(&self) {
        self.targets.iter().filter(|t| t.origin == Origin::Create).for_each(Target::remove);
    }
}

impl Target {
    fn remove(&self) {
        // Best effort: the failure itself is what the user must hear of.
        let _ = fs::remove_file(&self.path);
    }
}

/// Tells a device that it holds nothing. A hint: one that refuses it is formatted all the same.
fn discard(device: &FileDevice, arguments: &Arguments) {
    let geometry = device.geometry();
    if !geometry.discards {
        return;
    }
    if arguments.verbose > 0 {
        eprintln!("mkfs.cairn: discarding {}", device.name());
    }
    let bytes = align_down(geometry.bytes, SECTOR_BYTES);
    // A hint that cannot be followed is no failure.
    let refused = device.discard(Physical(0), bytes).err();
    if let Some(cause) = refused.filter(|cause| *cause != DeviceError::Unsupported) {
        eprintln!("mkfs.cairn: {}: discard failed: {cause:?}", device.name());
    }
}

/// Gives an image file another size, unless someone uses it.
fn resize(path: &Path, bytes: u64, arguments: &Arguments) -> Result<(), Failure> {
    let _locked = open(&[path.to_path_buf()], Access::ReadWrite, arguments)?;
    let resized = fs::File::options().write(true).open(path).and_then(|file| file.set_len(bytes));
    resized.map_err(|cause| Failure::new(format_args!("{}: {cause}", path.display())))
}
