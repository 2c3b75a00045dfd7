//! Names against inodes, both ways, and directories against the root.
//!
//! Three sorted lists are merged: names (inode, directory, cookie), what inodes say of their names
//! (the same), and inodes.

use super::files::Scan;
use super::findings::{rules, Findings};
use super::{Checker, Pass, Spot};
use crate::format::dir::Entry;
use crate::format::inode::{mode, InodeItem};
use crate::format::pool::{INO_MAX, ROOT_INO};
use crate::platform::Result;
use crate::units::TreeId;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// A name: inode with its type, directory, cookie. An inode number takes 48 bits, so that the type
/// fits beside it, and 24 bytes do for each of what may be hundreds of millions of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NameFact {
    ino_and_type: u64,
    dir: u64,
    cookie: u64,
}

const TYPE_BITS: u32 = 4;

fn packed(ino: u64, mode: u32) -> u64 {
    ino << TYPE_BITS | u64::from((mode & mode::TYPE) >> 12)
}

impl NameFact {
    /// `None` when no inode can have the number.
    pub fn new(entry: &Entry, dir: u64, cookie: u64) -> Option<NameFact> {
        let ino_and_type = packed(entry.ino, entry.file_type);
        (entry.ino <= INO_MAX).then_some(NameFact { ino_and_type, dir, cookie })
    }

    fn ino(&self) -> u64 {
        self.ino_and_type >> TYPE_BITS
    }
}

/// A name that an inode says it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Backlink {
    ino: u64,
    dir: u64,
    cookie: u64,
}

impl Backlink {
    pub fn new(ino: u64, dir: u64, cookie: u64) -> Backlink {
        Backlink { ino, dir, cookie }
    }
}

/// What matters of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InodeFact {
    ino: u64,
    /// File type bits; zero when the inode is there but broken.
    file_type: u32,
    nlink: u32,
}

impl InodeFact {
    pub fn new(ino: u64, inode: &InodeItem) -> InodeFact {
        InodeFact { ino, file_type: inode.file_type(), nlink: inode.nlink }
    }

    pub fn unknown(ino: u64) -> InodeFact {
        InodeFact { ino, file_type: 0, nlink: 0 }
    }
}

/// Compares what was met of a subvolume.
///
/// # Errors
/// When the check is stopped.
pub(super) fn check(checker: &mut Checker<'_>, scan: &mut Scan) -> Result<()> {
    checker.step(Pass::Names, 0)?;
    scan.names.sort_unstable();
    scan.backlinks.sort_unstable();
    let findings = &mut checker.findings;
    if scan.inodes.first().is_none_or(|inode| inode.ino != ROOT_INO) {
        findings.add(&rules::ROOT_MISSING, scan.spot(ROOT_INO), "");
    }
    let mut merge = Merge {
        tree: scan.tree,
        names: &scan.names,
        backlinks: &scan.backlinks,
        orphans: &scan.orphans,
        is_receiving: scan.is_receiving,
        findings,
    };
    for inode in &scan.inodes {
        merge.inode(inode);
    }
    merge.rest(u64::MAX);
    for orphan in &scan.orphans {
        if scan.inodes.binary_search_by_key(orphan, |inode| inode.ino).is_err() {
            findings.add(&rules::ORPHAN_LISTED, scan.spot(*orphan), "it does not exist");
        }
    }
    check_loops(scan, findings);
    checker.step(Pass::Names, 0)
}

/// What is left of the sorted lists.
struct Merge<'a> {
    tree: TreeId,
    names: &'a [NameFact],
    backlinks: &'a [Backlink],
    orphans: &'a [u64],
    is_receiving: bool,
    findings: &'a mut Findings,
}

/// Takes the first elements of a list for which `holds`.
fn take<'a, T>(list: &mut &'a [T], holds: impl Fn(&T) -> bool) -> &'a [T] {
    let (taken, rest) = list.split_at(list.iter().take_while(|x| holds(x)).count());
    *list = rest;
    taken
}

impl Merge<'_> {
    /// Reports names of inodes below `ino` that have not been taken: there are no such inodes.
    fn rest(&mut self, ino: u64) {
        for name in take(&mut self.names, |name| name.ino() < ino) {
            let detail = format!("entry {} names inode {}", name.cookie, name.ino());
            let spot = Spot::object(self.tree, name.dir);
            self.findings.add(&rules::NAME_NO_INODE, spot, detail);
        }
        // Their inodes are missing, which was reported.
        take(&mut self.backlinks, |link| link.ino < ino);
    }

    fn inode(&mut self, inode: &InodeFact) {
        self.rest(inode.ino);
        let names = take(&mut self.names, |name| name.ino() == inode.ino);
        let backlinks = take(&mut self.backlinks, |link| link.ino == inode.ino);
        if inode.file_type == 0 {
            return;
        }
        let spot = Spot::object(self.tree, inode.ino);
        self.compare_links(names, backlinks);
        for name in names {
            if name.ino_and_type != packed(inode.ino, inode.file_type) {
                let spot = Spot::object(self.tree, name.dir);
                let detail = format!("entry {}, inode {}", name.cookie, inode.ino);
                self.findings.add(&rules::NAME_TYPE, spot, detail);
            }
        }
        let is_listed = self.orphans.binary_search(&inode.ino).is_ok();
        let is_dir = inode.file_type == mode::DIRECTORY;
        // It keeps a link, or all that it holds, until it gets another name or goes.
        let is_between = self.is_receiving && is_listed && (is_dir || inode.nlink <= 1);
        let wanted = match (inode.file_type, inode.nlink) {
            _ if is_between => 0,
            (mode::DIRECTORY, 0) => 0,
            (mode::DIRECTORY, _) => u32::from(inode.ino != ROOT_INO),
            (_, nlink) => nlink,
        };
        if names.len() as u64 != u64::from(wanted) {
            let detail = format!("{} links, {} names", inode.nlink, names.len());
            self.findings.add(&rules::LINK_COUNT, spot.clone(), detail);
        }
        match (inode.nlink == 0 || is_between, is_listed) {
            (true, false) => self.findings.add(&rules::ORPHAN_UNLISTED, spot, ""),
            (false, true) => {
                let detail = format!("it has {} links", inode.nlink);
                self.findings.add(&rules::ORPHAN_LISTED, spot, detail);
            }
            _ => {}
        }
    }

    /// Both are sorted by directory and cookie, unless a name is there under two types.
    fn compare_links(&mut self, names: &[NameFact], backlinks: &[Backlink]) {
        let key = |name: &NameFact| (name.dir, name.cookie);
        let mut sorted: Vec<(u64, u64)> = names.iter().map(key).collect();
        sorted.sort_unstable();
        let (mut a, mut b) = (sorted.as_slice(), backlinks);
        loop {
            match (a.first(), b.first()) {
                (None, None) => return,
                (Some(name), Some(link)) if *name == (link.dir, link.cookie) => {
                    (a, b) = (&a[1..], &b[1..]);
                }
                (Some(name), link) if link.is_none_or(|l| *name < (l.dir, l.cookie)) => {
                    let detail = format!("entry {}", name.1);
                    let spot = Spot::object(self.tree, name.0);
                    self.findings.add(&rules::NAME_BACKLINK, spot, detail);
                    a = &a[1..];
                }
                (_, Some(link)) => {
                    let detail = format!("entry {} of directory {}", link.cookie, link.dir);
                    let spot = Spot::object(self.tree, link.ino);
                    self.findings.add(&rules::BACKLINK_NAME, spot, detail);
                    b = &b[1..];
                }
                (Some(_), None) => unreachable!("the guard above holds without a backlink"),
            }
        }
    }
}

/// What is known of a directory while parents are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Unknown,
    /// On the way that is being followed.
    Here,
    /// Leads to the root, or to something that was reported elsewhere.
    Ends,
}

/// Follows every directory to the root. Each is passed once.
fn check_loops(scan: &Scan, findings: &mut Findings) {
    let dirs = &scan.dirs;
    let find = |ino: u64| dirs.binary_search_by_key(&ino, |dir| dir.0).ok();
    let mut ways = vec![Way::Unknown; dirs.len()];
    let mut path: Vec<usize> = Vec::new();
    for start in 0..dirs.len() {
        let mut at = Some(start);
        while let Some(index) = at.filter(|index| ways[*index] == Way::Unknown) {
            ways[index] = Way::Here;
            path.push(index);
            at = find(dirs[index].1);
        }
        if let Some(index) = at.filter(|index| ways[*index] == Way::Here) {
            let ino = dirs[index].0;
            findings.add(&rules::DIR_LOOP, scan.spot(ino), "it is above itself");
        }
        path.drain(..).for_each(|index| ways[index] = Way::Ends);
    }
}
