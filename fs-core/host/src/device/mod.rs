//! Block devices and image files.
//!
//! Transfers bypass the page cache (`O_DIRECT`) where the file allows it: the core has its own
//! cache, and a direct write that fails says so at once instead of at some later `fsync`. A batch
//! of several transfers goes through `io_uring`, so that the device sees all of it (on a virtual
//! disk, 128 reads of 4 KiB are ten times as fast as one after another); a single transfer, and all
//! of them where there is no ring, through `preadv` and `pwritev`. `FileDevice` never changes the
//! size of what it was opened on, so `fdatasync` makes writes durable.
//!
//! How a device is opened and kept from others is in `open`.

mod open;
#[cfg(test)]
mod tests;
mod uring;

pub use open::{create_image, open_devices, Access, OpenError, OpenOptions, Wait};

use fs_core::platform::{Device, DeviceError, Geometry, ReadOp, WriteOp};
use fs_core::units::Physical;
use parking_lot::Mutex;
use rustix::fd::AsFd;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use uring::{Rings, Transfer};

/// Most pieces of memory that one system call takes.
const IOV_MAX: usize = 1024;

/// How batches reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IoMethod {
    /// `io_uring` for batches of several transfers where the kernel has it.
    #[default]
    Uring,
    /// `preadv` and `pwritev`, one transfer after another.
    Vectored,
}

/// An open block device or image file.
///
/// Holds the locks that keep others away until it is dropped.
pub struct FileDevice {
    /// Carries the `flock`.
    file: File,
    /// The exclusive claim on a block device.
    claim: Mutex<Option<File>>,
    path: PathBuf,
    name: String,
    geometry: Geometry,
    block_device: bool,
    direct: bool,
    rings: Option<Rings>,
}

impl FileDevice {
    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device, as opposed to an image file.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether transfers bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Gives up the exclusive claim on a block device, keeping the lock: for the moment when the
    /// kernel itself is to claim the device, because a filesystem of type `fuseblk` is mounted on
    /// it.
    pub fn release_claim(&self) {
        self.claim.lock().take();
    }

    /// How large it is now.
    fn end(&self) -> u64 {
        // Nothing reads or writes at the position that this moves.
        let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0));
        end.unwrap_or(self.geometry.bytes)
    }

    fn in_range(&self, at: Physical, len: u64) -> Result<(), DeviceError> {
        match at.0.checked_add(len) {
            Some(end) if end <= self.geometry.bytes => Ok(()),
            // It may have become larger since it was opened.
            Some(end) if end <= self.end() => Ok(()),
            _ => Err(DeviceError::OutOfRange),
        }
    }

    /// Runs a batch through a ring if that pays and there is one; how far each transfer got.
    fn start(&self, batch: &mut [Transfer<'_>]) -> Vec<Result<usize, Errno>> {
        let rings = self.rings.as_ref().filter(|_| batch.len() > 1);
        rings
            .and_then(|rings| rings.run(self.file.as_fd(), batch))
            .unwrap_or_else(|| vec![Ok(0); batch.len()])
    }

    fn finish_read(&self, at: Physical, into: &mut [u8], mut done: usize) -> Result<(), Errno> {
        while done < into.len() {
            let from = at.0 + done as u64;
            match rustix::io::preadv(&self.file, &mut uring::rest_of(into, done), from) {
                // The file has become shorter than it was when it was opened.
                Ok(0) => return Err(Errno::NXIO),
                Ok(bytes) => done += bytes,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn finish_write(
        &self,
        at: Physical,
        from: &mut [IoSlice<'_>],
        mut done: usize,
    ) -> Result<(), Errno> {
        let mut rest = from;
        IoSlice::advance_slices(&mut rest, done);
        while !rest.is_empty() {
            let count = rest.len().min(IOV_MAX);
            match rustix::io::pwritev(&self.file, &rest[..count], at.0 + done as u64) {
                Ok(0) => return Err(Errno::IO),
                Ok(bytes) => {
                    done += bytes;
                    IoSlice::advance_slices(&mut rest, bytes);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells a block device that a range is unused.
    fn block_discard(&self, at: Physical, bytes: u64) -> Result<(), Errno> {
        use rustix::ioctl;
        const BLKDISCARD: ioctl::Opcode = ioctl::opcode::none(0x12, 119);
        // SAFETY: BLKDISCARD reads two u64, start and length, and keeps no pointer to them.
        unsafe {
            let range = ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([at.0, bytes]);
            ioctl::ioctl(&self.file, range)
        }
    }
}

/// What an errno means for the core.
fn device_error(error: Errno) -> DeviceError {
    match error {
        Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM => DeviceError::Gone,
        Errno::ROFS => DeviceError::ReadOnly,
        Errno::NOMEM => DeviceError::Memory,
        other => DeviceError::Io(other.raw_os_error()),
    }
}

impl Device for FileDevice {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.end(), ..self.geometry.clone() }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        for op in batch.iter_mut() {
            op.result = self.in_range(op.at, op.buf.len() as u64);
        }
        let mut live: Vec<&mut ReadOp> =
            batch.iter_mut().filter(|op| op.result.is_ok() && !op.buf.is_empty()).collect();
        let mut transfers: Vec<Transfer<'_>> =
            live.iter_mut().map(|op| Transfer::Read { at: op.at.0, into: &mut op.buf }).collect();
        let outcomes = self.start(&mut transfers);
        for (op, outcome) in live.into_iter().zip(outcomes) {
            op.result = outcome
                .and_then(|done| self.finish_read(op.at, &mut op.buf, done))
                .map_err(device_error);
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        for op in batch.iter_mut() {
            op.result = match self.geometry.read_only {
                true => Err(DeviceError::ReadOnly),
                false => self.in_range(op.at, op.len()),
            };
        }
        let live: Vec<&mut WriteOp> =
            batch.iter_mut().filter(|op| op.result.is_ok() && !op.is_empty()).collect();
        let mut pieces: Vec<Vec<IoSlice<'_>>> =
            live.iter().map(|op| op.bufs.iter().map(|b| IoSlice::new(b)).collect()).collect();
        let mut transfers: Vec<Transfer<'_>> = live
            .iter()
            .zip(&pieces)
            .map(|(op, from)| Transfer::Write { at: op.at.0, from })
            .collect();
        let outcomes = self.start(&mut transfers);
        let results: Vec<Result<(), DeviceError>> = live
            .iter()
            .zip(&mut pieces)
            .zip(outcomes)
            .map(|((op, from), outcome)| {
                outcome.and_then(|done| self.finish_write(op.at, from, done)).map_err(device_error)
            })
            .collect();
        for (op, result) in live.into_iter().zip(results) {
            op.result = result;
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        if self.geometry.read_only {
            return Ok(());
        }
        loop {
            match rustix::fs::fdatasync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(device_error(error)),
            }
        }
    }

    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        self.in_range(at, bytes)?;
        if self.geometry.read_only {
            return Err(DeviceError::ReadOnly);
        }
        if bytes == 0 || !self.geometry.discards {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            let done = match self.block_device {
                true => self.block_discard(at, bytes),
                false => rustix::fs::fallocate(&self.file, flags, at.0, bytes),
            };
            match done {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Err(DeviceError::Unsupported),
                Err(error) => return Err(device_error(error)),
            }
        }
    }

    fn name(&self) -> &str {
        &self.name
    }
}
