//! Content of a device, cheap to clone.

use crate::rng::Rng;
use std::sync::Arc;

/// Bytes that are copied together when a clone is changed: small enough that a write of a sector
/// stays cheap, large enough that cloning an image does.
const PAGE_BYTES: usize = 16 << 10;

type Page = [u8; PAGE_BYTES];

/// Content of a device. Clones share what they do not change.
#[derive(Clone)]
pub struct Image {
    /// `None` is a page of zeros.
    pages: Vec<Option<Arc<Page>>>,
    bytes: u64,
}

impl Image {
    /// An image of zeros.
    pub fn zeroed(bytes: u64) -> Image {
        let count = bytes.div_ceil(PAGE_BYTES as u64) as usize;
        Image { pages: vec![None; count], bytes }
    }

    /// An image that holds `content`.
    pub fn of(content: &[u8]) -> Image {
        let mut image = Image::zeroed(content.len() as u64);
        for (index, chunk) in content.chunks(PAGE_BYTES).enumerate() {
            if chunk.iter().any(|b| *b != 0) {
                image.write((index * PAGE_BYTES) as u64, chunk);
            }
        }
        image
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies `out.len()` bytes from `at`, which lie within.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        self.check(at, out.len());
        let mut done = 0;
        while done < out.len() {
            let (page, start, len) = locate(at + done as u64, out.len() - done);
            match &self.pages[page] {
                Some(bytes) => out[done..done + len].copy_from_slice(&bytes[start..start + len]),
                None => out[done..done + len].fill(0),
            }
            done += len;
        }
    }

    /// Overwrites `bytes.len()` bytes from `at`, which lie within.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.check(at, bytes.len());
        let mut done = 0;
        while done < bytes.len() {
            let (page, start, len) = locate(at + done as u64, bytes.len() - done);
            let page = self.pages[page].get_or_insert_with(|| Arc::new([0; PAGE_BYTES]));
            Arc::make_mut(page)[start..start + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
    }

    /// Makes a range undefined: it reads as garbage that depends on nothing but the place.
    pub fn discard(&mut self, at: u64, bytes: u64) {
        for sector in (at..at + bytes).step_by(512) {
            self.write(sector, &garbage_at(sector));
        }
    }

    /// All of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.bytes as usize];
        self.read(0, &mut out);
        out
    }

    /// Offsets of the 4 KiB sectors that are not all zero.
    pub fn used_sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().enumerate().flat_map(|(index, page)| {
            let sectors = page.iter().flat_map(|page| page.chunks(4096).enumerate());
            let used = sectors.filter(|(_, sector)| sector.iter().any(|b| *b != 0));
            used.map(move |(sector, _)| (index * PAGE_BYTES + sector * 4096) as u64)
        })
    }

    fn check(&self, at: u64, len: usize) {
        assert!(
            at <= self.bytes && len as u64 <= self.bytes - at,
            "{len} bytes at {at} of an image of {}",
            self.bytes
        );
    }
}

/// Page, offset in it, and how many of `want` bytes from `at` are in it.
fn locate(at: u64, want: usize) -> (usize, usize, usize) {
    let start = (at % PAGE_BYTES as u64) as usize;
    ((at / PAGE_BYTES as u64) as usize, start, want.min(PAGE_BYTES - start))
}

/// What 512 bytes at `at` hold after a discard.
pub fn garbage_at(at: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    Rng::derived(at, 0x6761_7262).fill(&mut bytes);
    bytes
}
