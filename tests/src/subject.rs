//! The filesystem under test, as tests see it.
//!
//! Tests are written against these traits, so that what they show of the real filesystem they can
//! first show of the model itself: a test that finds nothing wrong with a wrong subject is no test.

use crate::model::Model;
use fs_core::error::Error;
use fs_core::platform::{DeviceRef, Platform};
use fs_core::vfs::Filesystem;
use std::sync::{Arc, Mutex};

/// A kind of filesystem that can be made and opened.
pub trait Subject {
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
