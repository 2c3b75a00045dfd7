//! A device in memory, for the self-test.

use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use fs_core::buf::Buf;
use fs_core::error::Error;
use fs_core::platform::{Device, DeviceError, Geometry, ReadOp, WriteOp};
use fs_core::sync::RwLock;
use fs_core::units::{Physical, SECTOR_BYTES};

/// Memory is had, and locked, in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;

/// A device in memory. What it holds is gone with it.
pub(crate) struct RamDevice {
    pieces: Vec<RwLock<Buf>>,
    flushes: AtomicU64,
    name: String,
}

impl RamDevice {
    /// A device of zeros, of `bytes` bytes rounded up.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough of it.
    pub(crate) fn new(name: &str, bytes: usize) -> Result<RamDevice, Error> {
        let count = bytes.div_ceil(PIECE_BYTES);
        let mut pieces = Vec::new();
        pieces.try_reserve_exact(count).map_err(|_| Error::Memory)?;
        for _ in 0..count {
            pieces.push(RwLock::new(Buf::zeroed(PIECE_BYTES)?));
        }
        Ok(RamDevice { pieces, flushes: AtomicU64::new(0), name: String::from(name) })
    }

    /// How often the device was flushed.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    fn bytes(&self) -> u64 {
        (self.pieces.len() * PIECE_BYTES) as u64
    }

    /// Calls `each` for the pieces of a range: piece, offset in it, part of the caller's buffer.
    fn walk(
        &self,
        at: Physical,
        len: usize,
        mut each: impl FnMut(&RwLock<Buf>, usize, core::ops::Range<usize>),
    ) -> Result<(), DeviceError> {
        if at.0 % SECTOR_BYTES != 0 || len as u64 % SECTOR_BYTES != 0 {
            return Err(DeviceError::Io(0));
        }
        let end = at.0.checked_add(len as u64).ok_or(DeviceError::OutOfRange)?;
        if end > self.bytes() {
            return Err(DeviceError::OutOfRange);
        }
        let mut done = 0;
        while done < len {
            let place = at.0 as usize + done;
            let offset = place % PIECE_BYTES;
            let part = (PIECE_BYTES - offset).min(len - done);
            each(&self.pieces[place / PIECE_BYTES], offset, done..done + part);
            done += part;
        }
        Ok(())
    }

    fn read_one(&self, at: Physical, out: &mut [u8]) -> Result<(), DeviceError> {
        self.walk(at, out.len(), |piece, offset, part| {
            let len = part.len();
            out[part].copy_from_slice(&piece.read()[offset..offset + len]);
        })
    }

    fn write_one(&self, at: Physical, bytes: &[u8]) -> Result<(), DeviceError> {
        self.walk(at, bytes.len(), |piece, offset, part| {
            let len = part.len();
            piece.write()[offset..offset + len].copy_from_slice(&bytes[part]);
        })
    }
}

impl Device for RamDevice {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.bytes(), block_bytes: 512, discards: true, read_only: false }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        for op in batch {
            op.result = self.read_one(op.at, &mut op.buf);
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        for op in batch {
            let mut at = op.at;
            op.result = op.bufs.iter().try_for_each(|slice| {
                let here = at;
                at = Physical(at.0.checked_add(slice.len() as u64).ok_or(DeviceError::OutOfRange)?);
                self.write_one(here, slice)
            });
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Fills the range with a pattern, so that whoever reads what was discarded notices.
    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        let len = usize::try_from(bytes).map_err(|_| DeviceError::OutOfRange)?;
        self.walk(at, len, |piece, offset, part| {
            piece.write()[offset..offset + part.len()].fill(0xdc);
        })
    }

    fn name(&self) -> &str {
        &self.name
    }
}
