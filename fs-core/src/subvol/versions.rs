//! All subvolumes, snapshots and bookmarks of a pool, in memory, as the pool tree has them.
//!
//! Changed by the writer of a group only, which takes the edits of the pool tree from here. What
//! looks at it may so see a version a moment before the group that makes it is published; nobody is
//! told of it before.

use crate::btree::Edit;
use crate::error::{Errno, Error};
use crate::format::key::{kind, Key};
use crate::format::pool::{
    check_name, decode_tags, encode_tags, version, BookmarkItem, SubvolItem,
};
use crate::subvol::store::Result;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// A subvolume or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Its item.
    pub item: SubvolItem,
    /// Its name; empty for the root subvolume and for what is deleted.
    pub name: Vec<u8>,
    /// Tags that keep it from being deleted.
    pub holds: Vec<Vec<u8>>,
}

/// A bookmark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// Its item.
    pub item: BookmarkItem,
    /// Its name.
    pub name: Vec<u8>,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Space {
    Subvolume,
    Snapshot(u64),
    Bookmark(u64),
}

/// What changed.
pub struct Edits {
    /// Edits of the pool tree, ascending.
    pub tree: Vec<(Key, Edit)>,
    /// Versions whose items they change.
    pub items: Vec<(u64, SubvolItem)>,
}

/// The versions of a pool.
#[derive(Default)]
pub struct Versions {
    /// Boxed, so that what moves them in the map stays off the stack.
    all: BTreeMap<u64, Box<Version>>,
    bookmarks: BTreeMap<u64, Bookmark>,
    names: BTreeMap<(Space, Vec<u8>), u64>,
    /// Parent and child.
    children: BTreeSet<(u64, u64)>,
    deleted: BTreeSet<u64>,
    /// Items that changed since the edits were taken.
    touched: BTreeSet<u64>,
    edits: BTreeMap<Key, Edit>,
}

fn space_of(item: &SubvolItem) -> Space {
    match item.is_snapshot() {
        true => Space::Snapshot(item.owner),
        false => Space::Subvolume,
    }
}

fn bad(object: u64) -> impl Fn(crate::format::BadBytes) -> Error {
    move |bad| bad.in_item(TreeId::POOL, object)
}

fn missing(id: u64) -> Error {
    Error::BadItem { what: "version is missing", tree: TreeId::POOL, object: id }
}

impl Versions {
    /// Takes in an item of the pool tree; those of one object in the order of their keys. Returns
    /// whether it was of a kind kept here.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn load(&mut self, key: Key, value: &[u8]) -> Result<bool> {
        let id = key.object;
        match (key.kind, key.offset) {
            (kind::SUBVOL, 0) => {
                let item = SubvolItem::decode(value).map_err(bad(id))?;
                self.insert(id, Version { item, name: Vec::new(), holds: Vec::new() });
            }
            (kind::NAME, 0) => {
                check_name(value).map_err(bad(id))?;
                let version = self.all.get_mut(&id).ok_or(missing(id))?;
                version.name = value.to_vec();
                let at = (space_of(&version.item), value.to_vec());
                if !version.item.is_deleted() && self.names.insert(at, id).is_some() {
                    let what = "two versions have one name";
                    return Err(Error::BadItem { what, tree: TreeId::POOL, object: id });
                }
            }
            (kind::HOLDS, 0) => {
                let version = self.all.get_mut(&id).ok_or(missing(id))?;
                version.holds = decode_tags(value).map_err(bad(id))?;
            }
            (kind::BOOKMARK, 0) => {
                let (item, name) = BookmarkItem::decode(value).map_err(bad(id))?;
                self.insert_bookmark(id, Bookmark { item, name: name.to_vec() });
            }
            _ => return Ok(false),
        }
        self.touched.clear();
        self.edits.clear();
        Ok(true)
    }

    /// After all items were taken in: every parent is a snapshot that is older, and there.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check(&self) -> Result<()> {
        for (id, version) in &self.all {
            let item = &version.item;
            let fits = item.parent == 0
                || self.all.get(&item.parent).is_some_and(|parent| {
                    parent.item.is_snapshot()
                        && parent.item.txg == item.snapshot_txg
                        && parent.item.lineage(TreeId(item.parent)) == item.lineage(TreeId(*id))
                });
            if !fits {
                let what = "a version's parent is missing or another";
                return Err(Error::BadItem { what, tree: TreeId::POOL, object: *id });
            }
        }
        Ok(())
    }

    /// A version.
    pub fn get(&self, id: u64) -> Option<&Version> {
        self.all.get(&id).map(|version| &**version)
    }

    /// A version that must be there.
    ///
    /// # Errors
    /// [`Error::BadItem`], when a crafted pool lacks it.
    pub fn need(&self, id: u64) -> Result<&Version> {
        self.get(id).ok_or(missing(id))
    }

    /// All versions by id.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Version)> {
        self.all.iter().map(|(id, version)| (*id, &**version))
    }

    /// All bookmarks by id.
    pub fn bookmarks(&self) -> impl Iterator<Item = (u64, &Bookmark)> {
        self.bookmarks.iter().map(|(id, bookmark)| (*id, bookmark))
    }

    /// A bookmark.
    pub fn bookmark(&self, id: u64) -> Option<&Bookmark> {
        self.bookmarks.get(&id)
    }

    /// The subvolume of that name. The root subvolume's is empty.
    pub fn subvolume(&self, name: &[u8]) -> Option<u64> {
        if name.is_empty() {
            let root = TreeId::FIRST_SUBVOL.0;
            return self.all.get(&root).filter(|root| !root.item.is_deleted()).map(|_| root);
        }
        self.names.get(&(Space::Subvolume, name.to_vec())).copied()
    }

    /// The snapshot of a subvolume with that name.
    pub fn snapshot(&self, subvolume: u64, name: &[u8]) -> Option<u64> {
        self.names.get(&(Space::Snapshot(subvolume), name.to_vec())).copied()
    }

    /// The bookmark of a subvolume with that name.
    pub fn bookmark_named(&self, subvolume: u64, name: &[u8]) -> Option<u64> {
        self.names.get(&(Space::Bookmark(subvolume), name.to_vec())).copied()
    }

    /// The snapshots of a subvolume that are not deleted, the oldest first.
    pub fn snapshots(&self, subvolume: u64) -> Vec<u64> {
        let from = (Space::Snapshot(subvolume), Vec::new());
        let named = self.names.range(from..).take_while(
            |((space, _), _)| matches!(space, Space::Snapshot(owner) if *owner == subvolume),
        );
        let mut ids: Vec<u64> = named.map(|(_, id)| *id).collect();
        ids.sort_unstable_by_key(|id| (self.all[id].item.txg, *id));
        ids
    }

    /// Subvolumes whose names begin with that of `id` and `/`.
    pub fn nested(&self, id: u64) -> Vec<u64> {
        let Some(version) = self.all.get(&id) else { return Vec::new() };
        let mut prefix = version.name.clone();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        let from = (Space::Subvolume, prefix.clone());
        let named = self.names.range(from..).take_while(|((space, name), _)| {
            *space == Space::Subvolume && name.starts_with(&prefix)
        });
        named.map(|(_, other)| *other).filter(|other| *other != id).collect()
    }

    /// The versions that go on from a snapshot.
    pub fn children(&self, id: u64) -> Vec<u64> {
        self.children.range((id, 0)..=(id, u64::MAX)).map(|(_, child)| *child).collect()
    }

    /// How many go on from a snapshot.
    pub fn child_count(&self, id: u64) -> usize {
        self.children.range((id, 0)..=(id, u64::MAX)).count()
    }

    /// Versions that are deleted and not gone yet.
    pub fn deleted(&self) -> &BTreeSet<u64> {
        &self.deleted
    }

    /// Bytes that would come free if a version alone were deleted.
    pub fn unique_bytes(&self, id: u64) -> u64 {
        let mut children = self.children.range((id, 0)..=(id, u64::MAX));
        let Some(version) = self.all.get(&id) else { return 0 };
        match (children.next(), children.next()) {
            (None, _) => version.item.own_bytes,
            (Some((_, child)), None) => {
                self.all.get(child).map_or(0, |child| child.item.dead_own_bytes)
            }
            // What is deleted stays as long as two go on from it.
            _ => 0,
        }
    }

    /// Adds a version.
    pub fn insert(&mut self, id: u64, version: Version) {
        self.touched.insert(id);
        if version.item.parent != 0 {
            self.children.insert((version.item.parent, id));
        }
        if version.item.is_deleted() {
            self.deleted.insert(id);
        } else if !version.name.is_empty() {
            self.names.insert((space_of(&version.item), version.name.clone()), id);
        }
        if !version.name.is_empty() {
            self.edits.insert(Key::new(id, kind::NAME, 0), Edit::Put(version.name.clone()));
        }
        self.all.insert(id, Box::new(version));
    }

    /// Changes the item of a version; name and holds stay.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn change(&mut self, id: u64, change: impl FnOnce(&mut SubvolItem)) -> Result<()> {
        let version = self.all.get_mut(&id).ok_or(missing(id))?;
        let before = version.item.parent;
        change(&mut version.item);
        let after = version.item.parent;
        self.touched.insert(id);
        if before != after {
            self.children.remove(&(before, id));
            if after != 0 {
                self.children.insert((after, id));
            }
        }
        Ok(())
    }

    /// Gives a version another name.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn rename(&mut self, id: u64, name: &[u8]) -> Result<()> {
        let version = self.all.get_mut(&id).ok_or(Error::Posix(Errno::NoEnt))?;
        let old = core::mem::replace(&mut version.name, name.to_vec());
        let space = space_of(&version.item);
        self.names.remove(&(space, old));
        self.names.insert((space, name.to_vec()), id);
        self.edits.insert(Key::new(id, kind::NAME, 0), Edit::Put(name.to_vec()));
        Ok(())
    }

    /// Sets the tags that hold a snapshot.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn set_holds(&mut self, id: u64, holds: Vec<Vec<u8>>) -> Result<()> {
        let version = self.all.get_mut(&id).ok_or(Error::Posix(Errno::NoEnt))?;
        let edit = match holds.is_empty() {
            true => Edit::Delete,
            false => Edit::Put(encode_tags(&holds)),
        };
        version.holds = holds;
        self.edits.insert(Key::new(id, kind::HOLDS, 0), edit);
        Ok(())
    }

    /// Marks a version deleted: its name is free, and it is taken apart in the background.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn mark_deleted(&mut self, id: u64) -> Result<()> {
        let version = self.all.get_mut(&id).ok_or(Error::Posix(Errno::NoEnt))?;
        version.item.flags |= version::DELETED;
        let name = core::mem::take(&mut version.name);
        self.names.remove(&(space_of(&version.item), name));
        self.deleted.insert(id);
        self.touched.insert(id);
        self.edits.insert(Key::new(id, kind::NAME, 0), Edit::Delete);
        Ok(())
    }

    /// Nothing is left of a deleted version.
    pub fn remove(&mut self, id: u64) {
        let Some(version) = self.all.remove(&id) else { return };
        self.children.remove(&(version.item.parent, id));
        self.deleted.remove(&id);
        self.touched.remove(&id);
        for kind in [kind::SUBVOL, kind::NAME, kind::HOLDS] {
            self.edits.insert(Key::new(id, kind, 0), Edit::Delete);
        }
    }

    /// Adds a bookmark.
    pub fn insert_bookmark(&mut self, id: u64, bookmark: Bookmark) {
        let at = (Space::Bookmark(bookmark.item.owner), bookmark.name.clone());
        self.names.insert(at, id);
        let mut value = bookmark.item.to_bytes().to_vec();
        value.extend_from_slice(&bookmark.name);
        self.edits.insert(Key::new(id, kind::BOOKMARK, 0), Edit::Put(value));
        self.bookmarks.insert(id, bookmark);
    }

    /// Removes a bookmark.
    pub fn remove_bookmark(&mut self, id: u64) {
        let Some(bookmark) = self.bookmarks.remove(&id) else { return };
        self.names.remove(&(Space::Bookmark(bookmark.item.owner), bookmark.name));
        self.edits.insert(Key::new(id, kind::BOOKMARK, 0), Edit::Delete);
    }

    /// What changed since this was last called.
    pub fn take_edits(&mut self) -> Edits {
        let mut edits = core::mem::take(&mut self.edits);
        let mut items = Vec::new();
        for id in core::mem::take(&mut self.touched) {
            let Some(version) = self.all.get(&id) else { continue };
            let value = version.item.to_bytes().to_vec();
            edits.insert(Key::new(id, kind::SUBVOL, 0), Edit::Put(value));
            items.push((id, version.item));
        }
        Edits { tree: edits.into_iter().collect(), items }
    }

    /// Group of which a version's parent is the state; zero without a parent.
    pub fn parent_txg(&self, id: u64) -> Txg {
        self.all.get(&id).map_or(Txg(0), |version| Txg(version.item.snapshot_txg))
    }
}
