//! A mirror on loop devices, with numbered files in it whose content follows from their numbers.

use crate::checkout;
use crate::guard::{self, Guard};
use crate::random::Random;
use crate::run::Cmd;
use crate::subject::{MountOptions, Subject};
use anyhow::{ensure, Result};
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How long a command on it may take.
pub const LIMIT: Duration = Duration::from_secs(300);

/// What is made.
pub struct Shape {
    /// For the name of the directory that the images are in.
    pub name: &'static str,
    /// How many devices there are; the first two are the pool.
    pub devices: usize,
    /// Size of each.
    pub device_bytes: u64,
    /// Size of a file.
    pub file_bytes: usize,
}

/// See the module.
pub struct Loops<'a> {
    // Dropped in this order.
    mounted: Option<Guard>,
    _attached: Vec<Guard>,
    _mount_point: Guard,
    _scratch: Guard,
    subject: &'a dyn Subject,
    /// The files below the devices.
    pub images: Vec<PathBuf>,
    /// The devices.
    pub devices: Vec<PathBuf>,
    /// Which of them is named to mount or check the pool.
    pub source: usize,
    /// Where it is mounted.
    pub dir: PathBuf,
    file_bytes: usize,
}

impl<'a> Loops<'a> {
    /// Makes the devices, and a mirror on the first two.
    ///
    /// # Errors
    /// When that fails.
    pub fn create(subject: &'a dyn Subject, shape: &Shape) -> Result<Loops<'a>> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, shape.name)?;
        let (dir, mount_point) = guard::mount_point()?;
        let (mut images, mut devices, mut attached) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..shape.devices {
            let image = scratch.join(index.to_string());
            File::create(&image)?.set_len(shape.device_bytes)?;
            let (device, guard) = guard::loop_device(&image, false)?;
            images.push(image);
            devices.push(device);
            attached.push(guard);
        }
        Cmd::new(checkout::binary("mkfs.cairn"))
            .args(["-q", "-f", "--profile", "mirror"])
            .args(&devices[..2])
            .quiet()?;
        Ok(Loops {
            mounted: None,
            _attached: attached,
            _mount_point: mount_point,
            _scratch: removal,
            subject,
            images,
            devices,
            source: 0,
            dir,
            file_bytes: shape.file_bytes,
        })
    }

    /// Mounts it.
    ///
    /// # Errors
    /// What the mount says.
    pub fn mount(&mut self) -> Result<()> {
        self.subject.mount(&self.devices[self.source], &self.dir, MountOptions::default())?;
        self.mounted = Some(guard::mounted(&self.dir));
        Ok(())
    }

    /// Unmounts it, also when its server is gone.
    ///
    /// # Errors
    /// What the unmount says.
    pub fn unmount(&mut self) -> Result<()> {
        guard::unmount_command(&self.dir).limit(LIMIT).quiet()?;
        if let Some(guard) = self.mounted.take() {
            guard.disarm();
        }
        Ok(())
    }

    /// Unmounts it and mounts it again.
    ///
    /// # Errors
    /// As [`Loops::unmount`] and [`Loops::mount`].
    pub fn remount(&mut self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    /// Checks it, unmounted.
    ///
    /// # Errors
    /// What the checker finds.
    pub fn check(&self) -> Result<()> {
        let source = &self.devices[self.source];
        Cmd::new(checkout::binary("fsck.cairn")).args(["-f", "-n"]).arg(source).quiet()
    }

    fn content(&self, number: u64) -> Vec<u8> {
        let mut content = vec![0; self.file_bytes];
        Random(0xf11e + number).fill(&mut content);
        content
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When that fails.
    pub fn write(&self, number: u64) -> Result<()> {
        Ok(fs::write(self.dir.join(format!("file {number}")), self.content(number))?)
    }

    /// That a file is what was written.
    ///
    /// # Errors
    /// When it is not.
    pub fn compare(&self, number: u64) -> Result<()> {
        let found = fs::read(self.dir.join(format!("file {number}")))?;
        ensure!(found == self.content(number), "file {number} is not what was written");
        Ok(())
    }

    /// Carries out `work` while the files `numbers` are written, as far as that comes. Returns the
    /// number of the first that was not.
    ///
    /// # Errors
    /// Those of `work`; when a file cannot be written.
    pub fn while_writing<T>(
        &self,
        numbers: std::ops::Range<u64>,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, u64)> {
        let stop = AtomicBool::new(false);
        let next = AtomicU64::new(numbers.start);
        let outcome = std::thread::scope(|scope| -> Result<T> {
            let writer = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::Relaxed) && next.load(Ordering::Relaxed) < numbers.end {
                    self.write(next.load(Ordering::Relaxed))?;
                    next.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            let outcome = work();
            stop.store(true, Ordering::Relaxed);
            writer.join().expect("the writer does not panic")?;
            outcome
        })?;
        Ok((outcome, next.into_inner()))
    }
}
