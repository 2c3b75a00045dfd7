//! A subvolume's tree, one object after the other.
//!
//! Items sort by object, so everything about an inode but its names is together: it is compared
//! when the next object begins. Names are gathered, and compared at the end by `links`.

use super::dirs::Dir;
use super::extents::Extents;
use super::findings::rules;
use super::links::{self, Backlink, InodeFact, NameFact};
use super::versions::Found;
use super::xattrs::Xattrs;
use super::{data, push, tree, Checker, Spot};
use crate::format::dir::{decode_cookies, Entry};
use crate::format::inode::{mode, InodeItem, LinkItem};
use crate::format::key::{kind, Key};
use crate::format::pool::{INO_MAX, ROOT_INO};
use crate::format::received::Mark;
use crate::platform::Result;
use crate::units::{Ino, TreeId, Txg};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;

/// What was met of a subvolume.
pub(super) struct Scan {
    pub tree: TreeId,
    next_ino: u64,
    object: Option<Object>,
    pub names: Vec<NameFact>,
    pub backlinks: Vec<Backlink>,
    pub inodes: Vec<InodeFact>,
    /// Directories with the directory each says it is in.
    pub dirs: Vec<(u64, u64)>,
    /// Inodes that are listed as nameless, ascending.
    pub orphans: Vec<u64>,
    /// It is being received: directories without names may hold something, and a symbolic link may
    /// have no target yet.
    pub is_receiving: bool,
    stored: u64,
    promised: u64,
    logical: u64,
}

/// An inode number with all its items but names.
struct Object {
    ino: u64,
    inode: Option<InodeItem>,
    /// There is an inode, but it breaks a rule, which was reported.
    is_broken: bool,
    further_names: u32,
    xattrs: Xattrs,
    dir: Dir,
    symlink_bytes: Option<usize>,
    extents: Extents,
}

impl Object {
    fn new(ino: u64) -> Object {
        Object {
            ino,
            inode: None,
            is_broken: false,
            further_names: 0,
            xattrs: Xattrs::default(),
            dir: Dir::default(),
            symlink_bytes: None,
            extents: Extents::default(),
        }
    }
}

/// Checks a subvolume.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
pub(super) fn check(checker: &mut Checker<'_>, subvol: &Found) -> Result<()> {
    let was_incomplete = core::mem::take(&mut checker.incomplete);
    let mut scan = Scan::new(subvol);
    checker.each_item(
        &tree(subvol.item.lineage(subvol.id), subvol.root),
        &mut |checker, key, value, birth| scan.item(checker, key, value, birth),
    )?;
    scan.finish_object(checker)?;
    data::flush(checker)?;
    checker.stats.inodes += scan.inodes.len() as u64;
    checker.stats.names += scan.names.len() as u64;
    if !checker.incomplete {
        scan.check_sums(checker, subvol);
        links::check(checker, &mut scan)?;
    }
    checker.incomplete |= was_incomplete;
    Ok(())
}

impl Scan {
    // Not inlined, and on the heap: it is large, and walking a tree goes deep.
    #[inline(never)]
    fn new(subvol: &Found) -> Box<Scan> {
        Box::new(Scan {
            tree: subvol.id,
            next_ino: subvol.item.next_ino,
            object: None,
            names: Vec::new(),
            backlinks: Vec::new(),
            inodes: Vec::new(),
            dirs: Vec::new(),
            orphans: Vec::new(),
            is_receiving: subvol.item.is_receiving(),
            stored: 0,
            promised: 0,
            logical: 0,
        })
    }

    /// The place of an inode, for findings.
    pub fn spot(&self, ino: u64) -> Spot {
        Spot::object(self.tree, ino)
    }

    fn item(
        &mut self,
        checker: &mut Checker<'_>,
        key: Key,
        value: &[u8],
        birth: Txg,
    ) -> Result<()> {
        if key.object == 0 {
            return self.orphan(checker, key, value);
        }
        let mut object = match self.object.take() {
            Some(object) if object.ino == key.object => object,
            other => {
                self.object = other;
                self.finish_object(checker)?;
                Object::new(key.object)
            }
        };
        let result = self.object_item(checker, &mut object, key, value, birth);
        self.object = Some(object);
        result
    }

    fn orphan(&mut self, checker: &mut Checker<'_>, key: Key, value: &[u8]) -> Result<()> {
        if key == Key::new(0, kind::RECEIVED, 0) && self.is_receiving {
            Mark::decode(value).map_err(|bad| bad.in_item(self.tree, 0))?;
            return Ok(());
        }
        if key.kind != kind::ORPHAN || !value.is_empty() {
            checker.findings.add(&rules::ITEM_KIND, self.spot(0), format!("{key:?}"));
            return Ok(());
        }
        push(&mut self.orphans, key.offset)
    }

    fn object_item(
        &mut self,
        checker: &mut Checker<'_>,
        object: &mut Object,
        key: Key,
        value: &[u8],
        birth: Txg,
    ) -> Result<()> {
        let ino = object.ino;
        let spot = self.spot(ino);
        let bad = |bad: crate::format::BadBytes| bad.in_item(self.tree, ino);
        match (key.kind, key.offset) {
            (kind::INODE, 0) => {
                object.is_broken = true;
                object.inode = Some(InodeItem::decode(value).map_err(bad)?);
            }
            (kind::LINK, offset) => {
                object.further_names += 1;
                let link = LinkItem::decode(value).map_err(bad)?;
                if offset != LinkItem::offset(Ino(link.parent), link.cookie) {
                    checker.findings.add(&rules::LINK_KEY, spot, "");
                }
                push(&mut self.backlinks, Backlink::new(ino, link.parent, link.cookie))?;
            }
            (kind::XATTR, hash) => {
                let secret = &checker.superblock.hash_secret;
                let list = crate::format::xattr::decode(value).map_err(bad)?;
                object.xattrs.item(secret, hash, &list, &spot, &mut checker.findings)?;
            }
            (kind::XATTR_PART, offset) => {
                object.xattrs.part(offset, value.len(), &spot, &mut checker.findings)?;
            }
            (kind::DIR_HASH, hash) => {
                let cookies = decode_cookies(value).map_err(bad)?;
                object.dir.hash(hash, &cookies)?;
            }
            (kind::DIR_ENTRY, cookie) => {
                let entry = Entry::decode(value).map_err(bad)?;
                let secret = &checker.superblock.hash_secret;
                object.dir.entry(secret, cookie, &entry, &spot, &mut checker.findings)?;
                match NameFact::new(&entry, ino, cookie) {
                    Some(name) => push(&mut self.names, name)?,
                    None => {
                        let detail = format!("inode {}", entry.ino);
                        checker.findings.add(&rules::NAME_NO_INODE, spot, detail);
                    }
                }
            }
            (kind::SYMLINK, 0) => object.symlink_bytes = Some(value.len()),
            (kind::EXTENT, at) => object.extents.item(checker, &spot, at, value, birth)?,
            _ => checker.findings.add(&rules::ITEM_KIND, spot, format!("{key:?}")),
        }
        Ok(())
    }

    fn finish_object(&mut self, checker: &mut Checker<'_>) -> Result<()> {
        let Some(object) = self.object.take() else { return Ok(()) };
        let spot = self.spot(object.ino);
        let Some(inode) = object.inode else {
            if object.is_broken {
                // That it is there is right; what it says is not known.
                return push(&mut self.inodes, InodeFact::unknown(object.ino));
            }
            // What is below an unreadable node may be missing without being lost.
            if !checker.incomplete {
                checker.findings.add(&rules::INODE_MISSING, spot, "");
            }
            return Ok(());
        };
        self.check_numbers(checker, &object, &inode);
        self.check_content(checker, object, &inode, &spot)?;
        if inode.parent != 0 {
            let ino = spot.object.unwrap_or_default();
            push(&mut self.backlinks, Backlink::new(ino, inode.parent, inode.parent_cookie))?;
        }
        let ino = spot.object.unwrap_or_default();
        if inode.is_dir() {
            push(&mut self.dirs, (ino, inode.parent))?;
        }
        push(&mut self.inodes, InodeFact::new(ino, &inode))
    }

    fn check_numbers(&self, checker: &mut Checker<'_>, object: &Object, inode: &InodeItem) {
        let spot = self.spot(object.ino);
        let findings = &mut checker.findings;
        if object.ino > INO_MAX || object.ino >= self.next_ino {
            let detail = format!("next is {}", self.next_ino);
            findings.add(&rules::SUBVOL_NEXT_INO, spot.clone(), detail);
        }
        if object.further_names != inode.links {
            let detail = format!("{} instead of {}", inode.links, object.further_names);
            findings.add(&rules::LINK_ITEMS, spot.clone(), detail);
        }
        let is_device = matches!(inode.file_type(), mode::CHAR | mode::BLOCK);
        let wrong = [
            (inode.rdev != 0 && !is_device, "device number of what is no device"),
            (inode.generation == 0 && !self.is_receiving, "generation zero"),
            (inode.generation > checker.superblock.txg.0, "created by a group to come"),
            ((inode.parent == 0) != (inode.parent_cookie == 0), "half of a first name"),
            (object.ino == ROOT_INO && !inode.is_dir(), "the root is no directory"),
            (object.ino == ROOT_INO && inode.parent != 0, "the root has a name"),
        ];
        for (is_wrong, what) in wrong {
            if is_wrong {
                findings.add(&rules::INODE_FIELD, spot.clone(), what);
            }
        }
    }

    fn check_content(
        &mut self,
        checker: &mut Checker<'_>,
        mut object: Object,
        inode: &InodeItem,
        spot: &Spot,
    ) -> Result<()> {
        let findings = &mut checker.findings;
        object.xattrs.finish(inode, spot, findings);
        if inode.is_dir() {
            object.dir.finish(inode, spot, findings)?;
        } else if object.dir.has_items() {
            findings.add(&rules::INODE_FIELD, spot.clone(), "entries of what is no directory");
        }
        let is_symlink = inode.file_type() == mode::SYMLINK;
        let symlink_bytes = object.symlink_bytes.map(|bytes| bytes as u64);
        let is_made = symlink_bytes.filter(|bytes| *bytes > 0) == Some(inode.size);
        let is_to_come = self.is_receiving && symlink_bytes.is_none() && inode.size == 0;
        if is_symlink && !is_made && !is_to_come {
            let detail = format!("{symlink_bytes:?} bytes, its size is {}", inode.size);
            findings.add(&rules::SYMLINK, spot.clone(), detail);
        }
        if !is_symlink && symlink_bytes.is_some() {
            findings.add(&rules::INODE_FIELD, spot.clone(), "target of what is no symlink");
        }
        let sums = object.extents.sums();
        if inode.is_file() {
            object.extents.finish(inode, spot, findings);
        } else if !object.extents.is_empty() {
            findings.add(&rules::INODE_FIELD, spot.clone(), "extents of what is no file");
        }
        self.stored = self.stored.saturating_add(sums.stored);
        self.promised = self.promised.saturating_add(sums.promised);
        self.logical = self.logical.saturating_add(sums.logical);
        Ok(())
    }

    fn check_sums(&self, checker: &mut Checker<'_>, subvol: &Found) {
        let item = &subvol.item;
        let sums = [
            ("inodes", item.inodes, self.inodes.len() as u64),
            ("bytes stored", item.stored_bytes, self.stored),
            ("bytes promised", item.promised_bytes, self.promised),
            ("bytes before compression", item.logical_bytes, self.logical),
        ];
        for (what, counted, met) in sums {
            if counted != met {
                let detail = format!("{counted} {what} instead of {met}");
                let spot = Spot::object(TreeId::POOL, subvol.id.0);
                checker.findings.add(&rules::SUBVOL_SUMS, spot, detail);
            }
        }
    }
}
