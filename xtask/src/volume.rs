//! One image of a subject: made, mounted, unmounted, checked; gone when dropped.

use crate::guard::{self, Guard};
use crate::subject::{self, MountOptions, Subject};
use anyhow::{bail, Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a volume lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// An image file, handed to the subject as it is.
    File,
    /// A loop device over an image file, with direct I/O.
    Loop,
}

/// An image with a place to mount it.
pub struct Volume<'a> {
    // Dropped in this order: the mount before the device, the device before the file.
    mounted: Option<Guard>,
    device: Option<(PathBuf, Guard)>,
    _mount_point: Guard,
    _scratch: Option<Guard>,
    subject: &'a dyn Subject,
    image: PathBuf,
    dir: PathBuf,
}

impl<'a> Volume<'a> {
    /// A sparse image of `bytes` with an empty filesystem on it, not mounted.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(subject: &'a dyn Subject, backing: Backing, bytes: u64) -> Result<Volume<'a>> {
        let volume = Volume::blank(subject, backing, bytes)?;
        volume.format()?;
        Ok(volume)
    }

    /// A sparse image of `bytes` without anything on it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn blank(subject: &'a dyn Subject, backing: Backing, bytes: u64) -> Result<Volume<'a>> {
        subject.prepare().with_context(|| format!("{} cannot be used here", subject.name()))?;
        let parent = crate::checkout::artefacts("scratch")?;
        let (scratch, guard) = guard::temp_dir(&parent, subject.name())?;
        let image = scratch.join("image");
        let (dir, mount_point) = guard::mount_point()?;
        File::create(&image)?.set_len(bytes)?;
        let device = match backing {
            Backing::File => None,
            Backing::Loop => Some(guard::loop_device(&image, false)?),
        };
        Ok(Volume {
            mounted: None,
            device,
            _mount_point: mount_point,
            _scratch: Some(guard),
            subject,
            image,
            dir,
        })
    }

    /// A device that stays when the volume goes, with an empty filesystem on it, not mounted.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn on_device(subject: &'a dyn Subject, device: &Path) -> Result<Volume<'a>> {
        let (dir, mount_point) = guard::mount_point()?;
        let volume = Volume {
            mounted: None,
            device: None,
            _mount_point: mount_point,
            _scratch: None,
            subject,
            image: device.to_owned(),
            dir,
        };
        volume.format()?;
        Ok(volume)
    }

    /// The image file.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// What the subject's commands are given: the device, or the image.
    pub fn target(&self) -> &Path {
        self.device.as_ref().map_or(&self.image, |device| &device.0)
    }

    /// Where it is, or will be, mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes an empty filesystem on the image.
    ///
    /// # Errors
    /// What the subject's mkfs says.
    pub fn format(&self) -> Result<()> {
        self.subject.mkfs(self.target())
    }

    /// Mounts it for reading and writing.
    ///
    /// # Errors
    /// What the subject's mount says.
    pub fn mount(&mut self) -> Result<()> {
        self.mount_with(MountOptions::default())
    }

    /// Mounts it.
    ///
    /// # Errors
    /// What the subject's mount says, or that nothing is mounted although it said nothing.
    pub fn mount_with(&mut self, options: MountOptions<'_>) -> Result<()> {
        self.subject.mount(self.target(), &self.dir, options)?;
        if !guard::is_mounted(&self.dir) {
            bail!("{} says it has mounted the image, but has not", self.subject.name());
        }
        self.mounted = Some(guard::mounted(&self.dir));
        Ok(())
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// What umount(8) says.
    pub fn unmount(&mut self) -> Result<()> {
        let guard = self.mounted.take().context("not mounted")?;
        guard::unmount_command(&self.dir).limit(Duration::from_secs(300)).quiet()?;
        guard.disarm();
        Ok(())
    }

    /// Forgets the mount, which something else has ended.
    pub fn mount_is_gone(&mut self) {
        if let Some(guard) = self.mounted.take() {
            drop(guard);
        }
    }

    /// Unmounts and mounts it again.
    ///
    /// # Errors
    /// As [`Volume::unmount`] and [`Volume::mount`].
    pub fn remount(&mut self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    /// Checks the unmounted image.
    ///
    /// # Errors
    /// What the subject's checker says.
    pub fn check(&self) -> Result<()> {
        self.subject.check(self.target()).context("the checker is not content")
    }

    /// Unmounts it if need be, and checks it.
    ///
    /// # Errors
    /// As [`Volume::unmount`] and [`Volume::check`].
    pub fn finish(mut self) -> Result<()> {
        if self.mounted.is_some() {
            self.unmount()?;
        }
        self.check()
    }

    /// The process that serves the mount.
    ///
    /// # Errors
    /// When there is none.
    pub fn server(&self) -> Result<u32> {
        subject::server_of(self.target(), &self.dir)
    }
}
