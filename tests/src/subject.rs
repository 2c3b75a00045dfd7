//! The filesystem under test, as tests see it.
//!
//! Tests are written against these traits, so that what they show of the real filesystem they can
//! first show of the model itself: a test that finds nothing wrong with a wrong subject is no test.

use crate::model::Model;
use fs_core::check::{check, CheckOptions, Quiet};
use fs_core::engine::{format, FormatOptions, OpenOptions};
use fs_core::error::Error;
use fs_core::format::chunk::Profile;
use fs_core::platform::{DeviceRef, Platform};
use fs_core::vfs::{AccessTime, Filesystem, Volume};
use std::sync::{Arc, Mutex};

/// A kind of filesystem that can be made and opened.
pub trait Subject {
    /// On how many devices it is made.
    fn devices(&self) -> usize {
        1
    }

    /// How many of them may be lost.
    fn spare(&self) -> usize {
        0
    }

    /// Makes an empty one on the devices.
    ///
    /// # Errors
    /// As the subject says.
    fn format(&self, devices: &[DeviceRef], platform: &Platform) -> Result<(), Error>;

    /// Opens what is on the devices, replaying what must be.
    ///
    /// # Errors
    /// As the subject says.
    fn open(&self, devices: &[DeviceRef], platform: &Platform) -> Result<Box<dyn Mounted>, Error>;

    /// What is wrong with what is on the devices, one line for each finding. Writes nothing.
    ///
    /// # Errors
    /// When the check could not be carried out.
    fn check(&self, devices: &[DeviceRef], platform: &Platform) -> Result<Vec<String>, Error>;
}

/// One that is open. Dropping it without `close` is a crash.
pub trait Mounted {
    /// Its operations.
    fn fs(&self) -> Arc<dyn Filesystem>;

    /// Forgets what can be read again from the devices.
    fn drop_caches(&self);

    /// Lets it do what it would do when time passes, such as commit.
    fn tick(&self);

    /// Closes it in an orderly way.
    ///
    /// # Errors
    /// When not everything could be made durable.
    fn close(self: Box<Self>) -> Result<(), Error>;
}

/// The model as its own subject. It ignores the devices and remembers.
#[derive(Default)]
pub struct ModelSubject {
    model: Mutex<Option<Arc<Model>>>,
}

impl ModelSubject {
    /// The model, once there is one.
    pub fn model(&self) -> Option<Arc<Model>> {
        self.model.lock().unwrap().clone()
    }

    /// Puts another model in its place.
    pub fn set_model(&self, model: Arc<Model>) {
        *self.model.lock().unwrap() = Some(model);
    }
}

struct MountedModel(Arc<Model>);

impl Subject for ModelSubject {
    fn format(&self, _devices: &[DeviceRef], platform: &Platform) -> Result<(), Error> {
        *self.model.lock().unwrap() = Some(Arc::new(Model::new(platform.clock.clone())));
        Ok(())
    }

    fn open(
        &self,
        _devices: &[DeviceRef],
        _platform: &Platform,
    ) -> Result<Box<dyn Mounted>, Error> {
        let model = self.model().ok_or(Error::NotCairn)?;
        model.remount();
        Ok(Box::new(MountedModel(model)))
    }

    fn check(&self, _devices: &[DeviceRef], _platform: &Platform) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }
}

impl Mounted for MountedModel {
    fn fs(&self) -> Arc<dyn Filesystem> {
        self.0.clone()
    }

    fn drop_caches(&self) {}

    fn tick(&self) {}

    fn close(self: Box<Self>) -> Result<(), Error> {
        Ok(())
    }
}

/// A cairn pool.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// On how many devices; zero is one.
    pub devices: usize,
    /// How it is made.
    pub format: FormatOptions,
    /// How it is opened.
    pub open: OpenOptions,
}

impl Pool {
    /// A pool that keeps little in memory: caches and dirty data overflow all the time.
    pub fn cramped() -> Pool {
        let open = OpenOptions { cache_bytes: 1 << 20, dirty_bytes: 1 << 20, ..Default::default() };
        Pool { open, ..Pool::default() }
    }
}

struct MountedPool(Arc<Volume>);

impl Pool {
    /// A pool on several devices that opens degraded.
    pub fn on(devices: usize, data: Profile, metadata: Profile) -> Pool {
        let mut pool = Pool { devices, ..Pool::default() };
        (pool.format.data_profile, pool.format.metadata_profile) = (data, metadata);
        pool.open.degraded = true;
        pool
    }
}

impl Subject for Pool {
    fn devices(&self) -> usize {
        self.devices.max(1)
    }

    fn spare(&self) -> usize {
        let FormatOptions { data_profile, metadata_profile, .. } = self.format;
        data_profile.devices_min().min(metadata_profile.devices_min()) as usize - 1
    }

    fn format(&self, devices: &[DeviceRef], platform: &Platform) -> Result<(), Error> {
        format(devices.to_vec(), platform.clone(), &self.format).map(|_| ())
    }

    fn open(&self, devices: &[DeviceRef], platform: &Platform) -> Result<Box<dyn Mounted>, Error> {
        let access_time = AccessTime::Relative;
        let volume = Volume::open(devices.to_vec(), platform.clone(), &self.open, access_time)?;
        Ok(Box::new(MountedPool(volume)))
    }

    fn check(&self, devices: &[DeviceRef], platform: &Platform) -> Result<Vec<String>, Error> {
        let options = CheckOptions::default();
        let report = check(devices.to_vec(), platform.clone(), &options, &Quiet)?;
        Ok(report.findings.iter().map(ToString::to_string).collect())
    }
}

impl Mounted for MountedPool {
    fn fs(&self) -> Arc<dyn Filesystem> {
        self.0.clone()
    }

    fn drop_caches(&self) {
        self.0.engine().drop_caches();
    }

    fn tick(&self) {
        self.0.engine().tick();
    }

    fn close(self: Box<Self>) -> Result<(), Error> {
        self.0.close()
    }
}
