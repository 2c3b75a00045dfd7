//! I/O buffers.
//!
//! A [`Buf`] is sector-aligned memory whose length is a multiple of the sector size, so that a
//! device may transfer it directly. A [`Slice`] shares a part of one without copying. Both are made
//! fallibly: their sizes come from disks and users.
//!
//! A large buffer lives for one request, and the next wants one of the same length. Memory that is
//! new each time costs a fault for every page of it, or in a kernel a new mapping: as much as the
//! transfer itself. So a [`Shelf`] keeps a few that were given back. What it keeps is bounded by
//! its limit, whatever the load was; a length that nobody asks for any more makes way. It
//! is never waited for: whoever finds it busy goes to the allocator.

use crate::error::Error;
use crate::sync::Mutex;
use crate::units::SECTOR_BYTES;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; SECTOR_BYTES as usize]);

/// Sector-aligned memory, zero unless it is from a [`Shelf`].
#[derive(Default)]
pub struct Buf {
    pages: Vec<Page>,
    /// Where it goes when it is dropped.
    home: Option<Arc<Shelf>>,
}

impl Buf {
    /// A buffer of at least `bytes`, rounded up to whole sectors, all zero.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough of it.
    pub fn zeroed(bytes: usize) -> Result<Buf, Error> {
        let count = bytes.div_ceil(SECTOR_BYTES as usize);
        let pages = Page::new_vec_zeroed(count).map_err(|_| Error::Memory)?;
        Ok(Buf { pages, home: None })
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

impl Drop for Buf {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.put(core::mem::take(&mut self.pages));
        }
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

/// As much as a shelf should keep where memory is not short: about what the requests of one stream
/// have under way.
pub const SHELF_BYTES: usize = 16 << 20;
/// Shorter buffers come from pages that an allocator cuts into several; one that is kept keeps
/// such a page from being given back, which is many times its size.
const SHELVED_MIN: usize = 256 << 10;

/// Buffers that were given back. See the module.
#[derive(Default)]
pub struct Shelf {
    kept: Mutex<Kept>,
    limit: usize,
}

#[derive(Default)]
struct Kept {
    /// Those that came back last are at the end.
    bufs: VecDeque<Vec<Page>>,
    bytes: usize,
}

impl Shelf {
    /// One that keeps `limit` bytes at most.
    pub fn new(limit: usize) -> Shelf {
        Shelf { kept: Mutex::default(), limit }
    }

    /// A buffer of at least `bytes`, rounded up to whole sectors, that holds *anything*, such as
    /// what was read before. For what is filled whole before it is looked at.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough of it.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Buf, Error> {
        if bytes < SHELVED_MIN {
            return Buf::zeroed(bytes);
        }
        let count = bytes.div_ceil(SECTOR_BYTES as usize);
        let mut buf = match self.find(count) {
            Some(pages) => Buf { pages, home: None },
            None => Buf::zeroed(bytes)?,
        };
        if cfg!(debug_assertions) {
            // Whoever counts on zeros should not be lucky.
            buf.fill(0xA5);
        }
        buf.home = Some(self.clone());
        Ok(buf)
    }

    fn find(&self, count: usize) -> Option<Vec<Page>> {
        let mut kept = self.kept.try_lock()?;
        // The newest is the likeliest to be in a CPU's cache.
        if let Some(index) = kept.bufs.iter().rposition(|pages| pages.len() == count) {
            let pages = kept.bufs.remove(index)?;
            kept.bytes -= memory(&pages);
            return Some(pages);
        }
        // The new one will want the place of what is not asked for.
        let oldest = kept.bufs.pop_front()?;
        kept.bytes -= memory(&oldest);
        None
    }

    fn put(&self, pages: Vec<Page>) {
        // One that was cut short would keep memory that nobody asks for.
        if pages.capacity() != pages.len() {
            return;
        }
        let Some(mut kept) = self.kept.try_lock() else { return };
        let bytes = kept.bytes + memory(&pages);
        if bytes <= self.limit && kept.bufs.try_reserve(1).is_ok() {
            kept.bufs.push_back(pages);
            kept.bytes = bytes;
        }
    }
}

fn memory(pages: &Vec<Page>) -> usize {
    pages.capacity() * SECTOR_BYTES as usize
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

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 4 << 20;

    #[test]
    fn a_buffer_comes_back_for_its_own_length_only() {
        let shelf = Arc::new(Shelf::new(LIMIT));
        let mut first = shelf.take(1 << 20).unwrap();
        first.fill(1);
        let at = first.as_ptr();
        drop(first);
        let again = shelf.take((1 << 20) - 5).unwrap();
        assert_eq!((again.as_ptr(), again.len()), (at, 1 << 20));
        drop(again);
        assert_eq!(shelf.take(512 << 10).unwrap().len(), 512 << 10);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_makes_way() {
        let shelf = Arc::new(Shelf::new(LIMIT));
        let count = LIMIT / (1 << 20);
        let many =
            |bytes| -> Vec<Buf> { (0..3 * count).map(|_| shelf.take(bytes).unwrap()).collect() };
        drop(many(512 << 10));
        assert_eq!(shelf.kept.lock().bytes, LIMIT);
        let first = many(1 << 20);
        assert_eq!(shelf.kept.lock().bytes, 0);
        drop(first);
        let kept = shelf.kept.lock();
        assert_eq!((kept.bufs.len(), kept.bytes), (count, LIMIT));
        assert!(kept.bufs.iter().all(|pages| memory(pages) == 1 << 20));
        drop(kept);
        drop(shelf.take(2 * LIMIT).unwrap());
        assert!(shelf.kept.lock().bytes < LIMIT);
    }

    #[test]
    fn what_was_cut_short_or_is_short_is_not_kept() {
        let shelf = Arc::new(Shelf::new(LIMIT));
        let mut cut = shelf.take(1 << 20).unwrap();
        cut.truncate(8 << 10);
        drop(cut);
        drop(shelf.take(4096).unwrap());
        assert_eq!(shelf.kept.lock().bytes, 0);
    }
}
