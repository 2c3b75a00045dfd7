//! What the driver needs of a mounted volume beyond its operations, and how one is opened.

use crate::options::Options;
use fs_core::error::Error;
use fs_core::vfs::Filesystem;
use std::path::Path;
use std::sync::Arc;

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
}

/// Opens the pool on `source`, replaying its log if need be. Must be called after the process has
/// gone to the background: locks and threads are made here.
///
/// # Errors
/// One sentence that names the device.
pub fn open(source: &Path, options: &Options) -> Result<Opened, String> {
    let _ = options;
    Err(format!("{}: this build has no storage engine", source.display()))
}
