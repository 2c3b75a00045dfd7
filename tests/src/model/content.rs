//! Bytes of a file.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that are kept together; also what fallocate's collapse and insert must be aligned to.
pub const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// Bytes of a file: a size, and pages of which absent ones are zeros. Clones share pages.
#[derive(Clone, Debug, Default)]
pub struct Content {
    size: u64,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Content {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies bytes from `offset`; returns how many there were before the end.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let count = self.size.saturating_sub(offset).min(out.len() as u64) as usize;
        let out = &mut out[..count];
        out.fill(0);
        for_each_page(offset, count as u64, |page, start, at, len| {
            if let Some(bytes) = self.pages.get(&page) {
                out[at..at + len].copy_from_slice(&bytes[start..start + len]);
            }
        });
        count
    }

    /// Overwrites bytes at `offset`, growing the file.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for_each_page(offset, data.len() as u64, |page, start, at, len| {
            let page = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            Arc::make_mut(page)[start..start + len].copy_from_slice(&data[at..at + len]);
        });
        if !data.is_empty() {
            self.size = self.size.max(offset + data.len() as u64);
        }
    }

    /// Sets the size; what is cut off is gone for good.
    pub fn truncate(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    /// Makes a range read as zeros, whole pages of it holes; the size stays.
    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let inside = offset.div_ceil(PAGE)..end / PAGE;
        if !inside.is_empty() {
            let gone: Vec<u64> = self.pages.range(inside).map(|(page, _)| *page).collect();
            gone.iter().for_each(|page| drop(self.pages.remove(page)));
        }
        for edge in [offset / PAGE, end.saturating_sub(1) / PAGE] {
            let (start, stop) = (offset.max(edge * PAGE), end.min((edge + 1) * PAGE));
            if let (Some(page), true) = (self.pages.get_mut(&edge), start < stop) {
                let page = Arc::make_mut(page);
                page[(start - edge * PAGE) as usize..(stop - edge * PAGE) as usize].fill(0);
            }
        }
    }

    /// Removes whole pages, moving what follows down.
    pub fn collapse(&mut self, offset: u64, len: u64) {
        self.zero(offset, len);
        let moved = self.pages.split_off(&((offset + len) / PAGE));
        self.pages.extend(moved.into_iter().map(|(page, bytes)| (page - len / PAGE, bytes)));
        self.size -= len;
    }

    /// Inserts whole pages of hole, moving what follows up.
    pub fn insert(&mut self, offset: u64, len: u64) {
        let moved = self.pages.split_off(&(offset / PAGE));
        self.pages.extend(moved.into_iter().map(|(page, bytes)| (page + len / PAGE, bytes)));
        self.size += len;
    }

    /// The content of page `page`, zeros beyond the end.
    pub fn page(&self, page: u64) -> &[u8] {
        static ZEROS: Page = [0; PAGE as usize];
        self.pages.get(&page).map_or(&ZEROS[..], |bytes| &bytes[..])
    }

    /// Numbers of the pages that were written, ascending.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }

    /// The first byte at or after `offset` that is not zero.
    pub fn next_nonzero(&self, offset: u64) -> Option<u64> {
        self.pages.range(offset / PAGE..).find_map(|(page, bytes)| {
            let from = offset.saturating_sub(page * PAGE) as usize;
            let at = bytes[from..].iter().position(|b| *b != 0)?;
            Some(page * PAGE + (from + at) as u64)
        })
    }

    /// Whether both read the same.
    pub fn same(&self, other: &Content) -> bool {
        self.size == other.size && self.first_difference(other).is_none()
    }

    /// The first page that reads differently, beyond either's end as zeros.
    pub fn first_difference(&self, other: &Content) -> Option<u64> {
        let mut pages: Vec<u64> = self.pages().chain(other.pages()).collect();
        pages.sort_unstable();
        pages.into_iter().find(|page| {
            let (a, b) = (self.pages.get(page), other.pages.get(page));
            let shared = matches!((a, b), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
            !shared && self.page(*page) != other.page(*page)
        })
    }
}

/// Calls `each` with page number, offset in the page, offset in the range, and length, for the part
/// of the range in each page.
fn for_each_page(offset: u64, len: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
    let mut at = 0;
    while at < len {
        let start = (offset + at) % PAGE;
        let part = (PAGE - start).min(len - at);
        each((offset + at) / PAGE, start as usize, at as usize, part as usize);
        at += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// The same operations on a plain vector.
    #[test]
    fn pages_behave_like_a_vector_of_bytes() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (mut content, mut plain) = (Content::default(), Vec::<u8>::new());
            for _ in 0..30 {
                let offset = rng.below(5 * PAGE);
                let len = rng.between(1, 3 * PAGE);
                let size = plain.len() as u64;
                let aligned = (offset / PAGE * PAGE, len.div_ceil(PAGE) * PAGE);
                match rng.below(5) {
                    0 => {
                        let mut data = vec![0; len as usize];
                        rng.fill(&mut data);
                        content.write(offset, &data);
                        plain.resize(plain.len().max((offset + len) as usize), 0);
                        plain[offset as usize..(offset + len) as usize].copy_from_slice(&data);
                    }
                    1 => {
                        content.truncate(offset);
                        plain.resize(offset as usize, 0);
                    }
                    2 => {
                        content.zero(offset, len);
                        let end = (offset + len).min(size);
                        plain[offset.min(end) as usize..end as usize].fill(0);
                    }
                    3 if aligned.0 + aligned.1 < size => {
                        content.collapse(aligned.0, aligned.1);
                        plain.drain(aligned.0 as usize..(aligned.0 + aligned.1) as usize);
                    }
                    4 if aligned.0 < size => {
                        content.insert(aligned.0, aligned.1);
                        let at = aligned.0 as usize;
                        plain.splice(at..at, vec![0; aligned.1 as usize]);
                    }
                    _ => {}
                }
                let mut out = vec![9; plain.len() + 10];
                assert_eq!(content.read(0, &mut out), plain.len(), "seed {seed}");
                assert_eq!(out[..plain.len()], plain, "seed {seed}");
                let from = rng.below(6 * PAGE);
                let expected = plain
                    .iter()
                    .enumerate()
                    .skip(from as usize)
                    .find(|(_, b)| **b != 0)
                    .map(|(at, _)| at as u64);
                assert_eq!(content.next_nonzero(from), expected, "seed {seed}");
            }
        }
    }
}
