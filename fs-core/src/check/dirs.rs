//! One directory: entries against hashes, both ways, and counts.
//!
//! Hash items come before entries. They are gathered as (cookie, hash) and sorted, and the entries,
//! which ascend by cookie, are merged with them.

use super::findings::{rules, Findings};
use super::{push, Spot};
use crate::format::dir::{name_hash, Entry, FIRST_COOKIE};
use crate::format::inode::{mode, InodeItem};
use crate::platform::Result;
use alloc::format;
use alloc::vec::Vec;

/// What was met of a directory.
#[derive(Default)]
pub(super) struct Dir {
    /// Cookie and the hash under which it is found; sorted once entries begin.
    hashes: Vec<(u64, u64)>,
    is_sorted: bool,
    /// Those before this have been merged.
    merged: usize,
    /// Hashes that several entries share, ascending.
    crowded: Vec<u64>,
    /// Names of entries with such a hash.
    crowd: Vec<Vec<u8>>,
    count: u64,
    name_bytes: u64,
    subdirs: u64,
    last_cookie: u64,
}

impl Dir {
    /// Whether anything was met.
    pub fn has_items(&self) -> bool {
        self.count > 0 || !self.hashes.is_empty()
    }

    /// Takes note of a hash item.
    pub fn hash(&mut self, hash: u64, cookies: &[u64]) -> Result<()> {
        if cookies.len() > 1 {
            push(&mut self.crowded, hash)?;
        }
        cookies.iter().try_for_each(|cookie| push(&mut self.hashes, (*cookie, hash)))
    }

    /// Compares an entry with its hash.
    pub fn entry(
        &mut self,
        secret: &[u8; 16],
        cookie: u64,
        entry: &Entry,
        spot: &Spot,
        findings: &mut Findings,
    ) -> Result<()> {
        self.sort();
        self.count += 1;
        self.name_bytes += entry.name.len() as u64;
        self.subdirs += u64::from(entry.file_type == mode::DIRECTORY);
        self.last_cookie = cookie;
        if cookie < FIRST_COOKIE {
            findings.add(&rules::NAME_COOKIE, spot.clone(), format!("cookie {cookie}"));
        }
        self.skip_to(cookie, spot, findings);
        let hash = name_hash(secret, &entry.name);
        let found = self.hashes.get(self.merged).filter(|(at, _)| *at == cookie);
        match found {
            Some((_, stored)) if *stored == hash => {}
            Some((_, stored)) => {
                let detail = format!("entry {cookie} is found under {stored:#x}, not {hash:#x}");
                findings.add(&rules::NAME_HASH, spot.clone(), detail);
            }
            None => {
                let detail = format!("entry {cookie} is not found under {hash:#x}");
                findings.add(&rules::NAME_HASH, spot.clone(), detail);
            }
        }
        if found.is_some() {
            self.merged += 1;
        }
        if self.crowded.binary_search(&hash).is_ok() {
            push(&mut self.crowd, entry.name.clone())?;
        }
        Ok(())
    }

    fn sort(&mut self) {
        if !self.is_sorted {
            self.hashes.sort_unstable();
            self.is_sorted = true;
        }
    }

    /// Reports hashes of cookies before `cookie`: no entry has them.
    fn skip_to(&mut self, cookie: u64, spot: &Spot, findings: &mut Findings) {
        while let Some((dangling, hash)) = self.hashes.get(self.merged) {
            if *dangling >= cookie {
                return;
            }
            let detail = format!("hash {hash:#x} names entry {dangling}");
            findings.add(&rules::HASH_NAME, spot.clone(), detail);
            self.merged += 1;
        }
    }

    /// Compares the directory's fields with what was met.
    pub fn finish(
        &mut self,
        inode: &InodeItem,
        spot: &Spot,
        findings: &mut Findings,
    ) -> Result<()> {
        self.sort();
        self.skip_to(u64::MAX, spot, findings);
        self.crowd.sort_unstable();
        for pair in self.crowd.windows(2).filter(|pair| pair[0] == pair[1]) {
            let name = alloc::string::String::from_utf8_lossy(&pair[0]).into_owned();
            findings.add(&rules::NAME_TWICE, spot.clone(), format!("{name:?}"));
        }
        if inode.entries != self.count || inode.size != self.name_bytes {
            let detail = format!(
                "{} entries of {} bytes instead of {} of {}",
                inode.entries, inode.size, self.count, self.name_bytes
            );
            findings.add(&rules::DIR_COUNT, spot.clone(), detail);
        }
        let links = 2 + self.subdirs;
        let is_removed = inode.nlink == 0 && self.count == 0;
        if u64::from(inode.nlink) != links && !is_removed {
            let detail = format!("{} instead of {links}", inode.nlink);
            findings.add(&rules::LINK_COUNT, spot.clone(), detail);
        }
        if inode.next_cookie <= self.last_cookie || inode.next_cookie < FIRST_COOKIE {
            let detail = format!("next is {}, last is {}", inode.next_cookie, self.last_cookie);
            findings.add(&rules::NAME_COOKIE, spot.clone(), detail);
        }
        Ok(())
    }
}
