//! I/O buffers.
//!
//! A [`Buf`] is sector-aligned memory whose length is a multiple of the sector size, so that a
//! device may transfer it directly. A [`Slice`] shares a part of one without copying. Both are made
//! fallibly: their sizes come from disks and users.

use crate::error::Error;
use crate::units::SECTOR_BYTES;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; SECTOR_BYTES as usize]);

/// Zero-initialised, sector-aligned memory.
#[derive(Default)]
pub struct Buf {
    pages: Vec<Page>,
}

impl Buf {
    /// A buffer of at least `bytes`, rounded up to whole sectors, all zero.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough of it.
    pub fn zeroed(bytes: usize) -> Result<Buf, Error> {
        let count = bytes.div_ceil(SECTOR_BYTES as usize);
        let pages = Page::new_vec_zeroed(count).map_err(|_| Error::Memory)?;
        Ok(Buf { pages })
    }

    /// A buffer that holds a copy of `bytes`, padded with zeros to whole sectors.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough of it.
    pub fn copy_of(bytes: &[u8]) -> Result<Buf, Error> {
        let mut buf = Buf::zeroed(bytes.len())?;
        buf[..bytes.len()].copy_from_slice(bytes);
        Ok(buf)
    }

    /// Gives up the tail, keeping `bytes` rounded up to whole sectors.
    pub fn truncate(&mut self, bytes: usize) {
        self.pages.truncate(bytes.div_ceil(SECTOR_BYTES as usize));
    }

    /// Turns the buffer into a shared slice of all of it.
    pub fn into_slice(self) -> Slice {
        let len = self.len();
        Slice { buf: Arc::new(self), start: 0, len }
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.pages.as_slice().as_bytes()
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.pages.as_mut_slice().as_mut_bytes()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len())
    }
}

/// A shared, immutable part of a [`Buf`].
#[derive(Clone)]
pub struct Slice {
    buf: Arc<Buf>,
    start: usize,
    len: usize,
}

impl Slice {
    /// The part `start..start + len` of this slice, sharing its memory.
    pub fn part(&self, start: usize, len: usize) -> Slice {
        assert!(
            start <= self.len && len <= self.len - start,
            "part {start}+{len} of a slice of {}",
            self.len
        );
        Slice { buf: self.buf.clone(), start: self.start + start, len }
    }

    /// Bytes of memory that the slice keeps alive.
    #[cfg(test)]
    pub fn held(&self) -> usize {
        self.buf.len()
    }

    /// As [`Slice::part`], but copied when it would keep more than twice its size alive, so that
    /// what is cut again and again takes as much memory as it is long. Without memory for a copy
    /// the part shares.
    pub fn compact_part(&self, start: usize, len: usize) -> Slice {
        let part = self.part(start, len);
        if len.saturating_mul(2) > self.buf.len() {
            return part;
        }
        Buf::copy_of(&part).map_or(part, Buf::into_slice)
    }
}

impl Deref for Slice {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.buf[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({} bytes)", self.len)
    }
}
