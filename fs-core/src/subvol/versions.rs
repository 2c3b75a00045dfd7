//! All subvolumes, snapshots and bookmarks of a pool, in memory, as the pool tree has them.
//!
//! Changed by the writer of a group only, which takes the edits of the pool tree from here. What
//! looks at it may so see a version a moment before the group that makes it is published; nobody is
//! told of it before.

use crate::btree::Edit;
use crate::error::{Errno, Error};
use crate::format::key::{kind, Key};
use crate::format::pool::{
    check_name, decode_tags, decode_user, encode_tags, encode_user, property, version,
    BookmarkItem, Settings, SubvolItem, UserProperties, CONTENT_BYTES,
};
use crate::subvol::store::Result;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// Name in the root directory of each subvolume under which its snapshots are found.
pub const CONTROL_NAME: &[u8] = b".cairn";

/// A subvolume or a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Its item.
    pub item: SubvolItem,
    /// Its name; empty for the root subvolume and for what is deleted.
    pub name: Vec<u8>,
    /// Tags that keep it from being deleted.
    pub holds: Vec<Vec<u8>>,
    /// Properties that users gave it.
    pub user: UserProperties,
}

impl Version {
    /// One without holds and properties.
    pub fn new(item: SubvolItem, name: &[u8]) -> Version {
        Version { item, name: name.to_vec(), holds: Vec::new(), user: UserProperties::new() }
    }
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

/// What there was before a change.
enum Before {
    Version(u64, Option<Box<Version>>),
    Bookmark(u64, Option<Bookmark>),
    /// Nothing was to be written of the content of that version.
    Content(u64),
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
    /// Dead list and the version that has it.
    lists: BTreeSet<(u64, u64)>,
    deleted: BTreeSet<u64>,
    /// Those whose deletion has begun.
    started: BTreeSet<u64>,
    /// What changed since the edits were taken.
    touched: BTreeSet<u64>,
    /// Those of them whose properties of users changed.
    touched_users: BTreeSet<u64>,
    touched_bookmarks: BTreeSet<u64>,
    /// Sums of contents that are yet to be written; what is written is read when it is wanted.
    contents: BTreeMap<u64, Vec<u8>>,
    /// What to go back to, the newest last, while a step is under way.
    before: Option<Vec<Before>>,
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

fn broken(id: u64, what: &'static str) -> Error {
    Error::BadItem { what, tree: TreeId::POOL, object: id }
}

fn missing(id: u64) -> Error {
    broken(id, "version is missing")
}

/// What is stored twice under one name is damage; only a user is told that it exists.
fn damage(id: u64) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Posix(Errno::Exist) => broken(id, "two versions or bookmarks have one name"),
        error => error,
    }
}

impl Versions {
    /// A version as people name it: `/` for the root subvolume, `home`, or `home@monday`.
    pub fn shown(&self, id: u64) -> Vec<u8> {
        let Some(version) = self.get(id).filter(|version| !version.item.is_deleted()) else {
            return alloc::format!("(deleted {id})").into_bytes();
        };
        let name = &version.name[..];
        if version.item.is_snapshot() {
            let of = self.get(version.item.owner).map_or(&[][..], |owner| &owner.name);
            [of, b"@", name].concat()
        } else if name.is_empty() {
            b"/".to_vec()
        } else {
            name.to_vec()
        }
    }

    /// A file as people name it, by its path from the root of a version: `/docs/a` in the root
    /// subvolume, `home/docs/a` in another, `home@monday: docs/a` in a snapshot.
    pub fn shown_file(&self, id: u64, path: &[u8]) -> Vec<u8> {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let name = self.shown(id);
        let between = match self.get(id) {
            Some(version) if version.item.is_snapshot() || version.item.is_deleted() => &b": "[..],
            None => b": ",
            Some(version) if version.name.is_empty() => b"",
            Some(_) => b"/",
        };
        [&name, between, path].concat()
    }

    /// Takes in an item of the pool tree; those of one object in the order of their keys. Returns
    /// whether it was of a kind kept here.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn load(&mut self, key: Key, value: &[u8]) -> Result<bool> {
        let id = key.object;
        match (key.kind, key.offset) {
            (kind::SUBVOL, 0) => {
                self.load_item(id, value)?;
            }
            (kind::NAME, 0) => {
                check_name(value).map_err(bad(id))?;
                let mut version = self.copy(id)?;
                if !version.item.is_deleted() {
                    version.name = value.to_vec();
                }
                self.replace(id, Some(version)).map_err(damage(id))?;
            }
            (kind::HOLDS, 0) => {
                let mut version = self.copy(id)?;
                version.holds = decode_tags(value).map_err(bad(id))?;
                self.replace(id, Some(version))?;
            }
            (kind::PROPERTY, property::USER) if id != 0 => {
                let mut version = self.copy(id)?;
                version.user = decode_user(value).map_err(bad(id))?;
                self.replace(id, Some(version))?;
            }
            (kind::BOOKMARK, 0) => {
                let (item, name) = BookmarkItem::decode(value).map_err(bad(id))?;
                let bookmark = Bookmark { item, name: name.to_vec() };
                self.insert_bookmark(id, bookmark).map_err(damage(id))?;
            }
            (kind::CONTENT, 0) => {
                let is_kept = self.get(id).is_some_and(|version| version.item.content != [0; 32]);
                if !is_kept || value.len() != CONTENT_BYTES {
                    return Err(broken(id, "the content of a snapshot is not as it must be"));
                }
            }
            _ => return Ok(false),
        }
        self.touched.clear();
        self.touched_users.clear();
        self.touched_bookmarks.clear();
        Ok(true)
    }

    /// Apart from its caller, for the stack's sake.
    #[inline(never)]
    fn load_item(&mut self, id: u64, value: &[u8]) -> Result<()> {
        let item = SubvolItem::decode(value).map_err(bad(id))?;
        self.insert(id, Version::new(item, b""))
    }

    /// After all items were taken in: what everything else relies on holds. `next` is the next id.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check(&self, next: u64) -> Result<()> {
        let ids = self.all.keys().next_back().max(self.bookmarks.keys().next_back());
        let lists = self.lists.iter().next_back().map(|(list, _)| list);
        if let Some(id) = ids.max(lists).filter(|id| **id >= next) {
            return Err(broken(*id, "an id that is yet to be given"));
        }
        self.all.keys().try_for_each(|id| self.check_one(*id))
    }

    /// After [`Versions::check`]: what users rely on holds of all versions and bookmarks.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check_all_rules(&self) -> Result<()> {
        self.all.keys().try_for_each(|id| self.check_rules(*id))?;
        self.bookmarks.keys().try_for_each(|id| self.check_bookmark(*id))
    }

    /// How many versions changed since the edits were taken.
    pub fn touched_count(&self) -> usize {
        self.touched.len()
    }

    /// What changed since the edits were taken is as it must be, and what it says can be read back.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check_touched(&self) -> Result<()> {
        for id in &self.touched {
            let Some(version) = self.get(*id) else {
                if self.child_count(*id) > 0 {
                    return Err(broken(*id, "a version from which others go on is gone"));
                }
                continue;
            };
            SubvolItem::decode(&version.item.to_bytes()).map_err(bad(*id))?;
            if !version.user.is_empty() {
                decode_user(&encode_user(&version.user)).map_err(bad(*id))?;
            }
            self.check_one(*id)?;
            self.check_rules(*id)?;
        }
        for id in &self.touched_bookmarks {
            self.check_bookmark(*id)?;
        }
        Ok(())
    }

    /// What walks along versions relies on: a parent is a snapshot that is there and comes before,
    /// so no walk goes round in a circle; and no two have one dead list.
    fn check_one(&self, id: u64) -> Result<()> {
        let item = &self.need(id)?.item;
        let fits = |parent: &Version| {
            parent.item.is_snapshot()
                && parent.item.txg == item.snapshot_txg
                && parent.item.lineage(TreeId(item.parent)) == item.lineage(TreeId(id))
                && (!item.is_snapshot() || item.parent < id)
        };
        if item.parent != 0 && !self.get(item.parent).is_some_and(fits) {
            return Err(broken(id, "a version's parent is missing or another"));
        }
        let list = item.dead_list(id);
        if self.lists.range((list, 0)..=(list, u64::MAX)).count() != 1 {
            return Err(broken(id, "two versions have one dead list"));
        }
        Ok(())
    }

    /// What users rely on: names, and that whom a snapshot is of is there.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check_rules(&self, id: u64) -> Result<()> {
        let version = self.need(id)?;
        let item = &version.item;
        if item.is_deleted() {
            let is_bare =
                version.name.is_empty() && version.holds.is_empty() && version.user.is_empty();
            return match is_bare {
                true => Ok(()),
                false => Err(broken(id, "what is deleted has a name, a hold or a property")),
            };
        }
        if item.flags & version::STARTED != 0 {
            return Err(broken(id, "deletion of what is not deleted has begun"));
        }
        if version.name.is_empty() != (id == TreeId::FIRST_SUBVOL.0) {
            return Err(broken(id, "a version without a name, or the root with one"));
        }
        if !item.is_snapshot() {
            return match version.holds.is_empty() {
                true => Ok(()),
                false => Err(broken(id, "a subvolume with a hold")),
            };
        }
        if version.name.contains(&b'/') {
            return Err(broken(id, "name of a snapshot with a /"));
        }
        match self.is_subvolume(item.owner) {
            true => Ok(()),
            false => Err(broken(id, "the subvolume of a snapshot is missing")),
        }
    }

    /// What users rely on of a bookmark.
    ///
    /// # Errors
    /// [`Error::BadItem`].
    pub fn check_bookmark(&self, id: u64) -> Result<()> {
        let Some(bookmark) = self.bookmarks.get(&id) else { return Ok(()) };
        if bookmark.name.contains(&b'/') {
            return Err(broken(id, "name of a bookmark with a /"));
        }
        match self.is_subvolume(bookmark.item.owner) {
            true => Ok(()),
            false => Err(broken(id, "the subvolume of a bookmark is missing")),
        }
    }

    fn is_subvolume(&self, id: u64) -> bool {
        let item = self.get(id).map(|version| &version.item);
        item.is_some_and(|item| !item.is_snapshot() && !item.is_deleted())
    }

    /// Begins a step that can be taken back.
    pub fn begin(&mut self) {
        self.before = Some(Vec::new());
    }

    /// The step is done.
    pub fn keep(&mut self) {
        self.before = None;
    }

    /// Takes back what was done since [`Versions::begin`].
    pub fn undo(&mut self) {
        for before in self.before.take().into_iter().flatten().rev() {
            match before {
                Before::Version(id, version) => {
                    self.unlist(id);
                    self.list(id, version);
                }
                Before::Bookmark(id, bookmark) => {
                    self.unlist_bookmark(id);
                    self.list_bookmark(id, bookmark);
                }
                Before::Content(id) => drop(self.contents.remove(&id)),
            }
        }
    }

    /// Puts a version in the place of what has that id. The only way anything changes.
    ///
    /// # Errors
    /// EEXIST when another has the name; nothing is changed then.
    fn replace(&mut self, id: u64, version: Option<Box<Version>>) -> Result<()> {
        if let Some(version) = version.as_ref().filter(|version| !version.name.is_empty()) {
            let at = (space_of(&version.item), version.name.clone());
            if self.names.get(&at).is_some_and(|other| *other != id) {
                return Err(Errno::Exist.into());
            }
        }
        let is_other = |old: &Version| match &version {
            Some(version) => old.user != version.user,
            None => !old.user.is_empty(),
        };
        let has_none = version.as_ref().is_none_or(|version| version.user.is_empty());
        if self.get(id).map_or(!has_none, is_other) {
            self.touched_users.insert(id);
        }
        let old = self.unlist(id);
        self.list(id, version);
        self.touched.insert(id);
        if let Some(before) = &mut self.before {
            before.push(Before::Version(id, old));
        }
        Ok(())
    }

    fn unlist(&mut self, id: u64) -> Option<Box<Version>> {
        let version = self.all.remove(&id)?;
        let item = &version.item;
        self.children.remove(&(item.parent, id));
        self.lists.remove(&(item.dead_list(id), id));
        self.deleted.remove(&id);
        self.started.remove(&id);
        if !version.name.is_empty() {
            self.names.remove(&(space_of(item), version.name.clone()));
        }
        Some(version)
    }

    fn list(&mut self, id: u64, version: Option<Box<Version>>) {
        let Some(version) = version else { return };
        let item = &version.item;
        if item.parent != 0 {
            self.children.insert((item.parent, id));
        }
        self.lists.insert((item.dead_list(id), id));
        if item.is_deleted() {
            self.deleted.insert(id);
        }
        if item.flags & version::STARTED != 0 {
            self.started.insert(id);
        }
        if !version.name.is_empty() {
            self.names.insert((space_of(item), version.name.clone()), id);
        }
        self.all.insert(id, version);
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
            return self.is_subvolume(root).then_some(root);
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

    fn all_in(&self, space: Space) -> impl Iterator<Item = u64> + '_ {
        let named = self.names.range((space, Vec::new())..);
        named.take_while(move |((other, _), _)| *other == space).map(|(_, id)| *id)
    }

    /// The snapshots of a subvolume that are not deleted, the oldest first.
    pub fn snapshots(&self, subvolume: u64) -> Vec<u64> {
        let mut ids: Vec<u64> = self.all_in(Space::Snapshot(subvolume)).collect();
        ids.sort_unstable_by_key(|id| (self.get(*id).map(|version| version.item.txg), *id));
        ids
    }

    /// The bookmarks of a subvolume.
    pub fn bookmarks_of(&self, subvolume: u64) -> Vec<u64> {
        self.all_in(Space::Bookmark(subvolume)).collect()
    }

    /// Whether it is a subvolume that is being received.
    pub fn is_receiving(&self, id: u64) -> bool {
        self.get(id).is_some_and(|version| version.item.is_receiving())
    }

    /// Subvolumes whose names begin with that of `id` and `/`.
    pub fn nested(&self, id: u64) -> Vec<u64> {
        let Some(version) = self.get(id) else { return Vec::new() };
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

    /// The subvolume whose settings hold where a version chooses nothing: that which it, or the
    /// subvolume that a snapshot was taken of, is in. `None` for the root subvolume.
    pub fn above(&self, id: u64) -> Option<u64> {
        // Whatever a crafted pool calls it: nothing may be above itself.
        if id == TreeId::FIRST_SUBVOL.0 {
            return None;
        }
        let mut version = self.get(id)?;
        if version.item.is_snapshot() {
            version = self.get(version.item.owner)?;
        }
        let mut name = version.name.as_slice();
        while !name.is_empty() {
            let cut = name.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            name = &name[..cut];
            if let Some(above) = self.subvolume(name) {
                return Some(above);
            }
        }
        None
    }

    /// A version and those above it, the root subvolume last.
    pub fn upwards(&self, id: u64) -> impl Iterator<Item = (u64, &Version)> {
        let ids = core::iter::successors(Some(id), |id| self.above(*id));
        ids.filter_map(|id| Some((id, self.get(id)?)))
    }

    /// What the settings of a version come to, with those above it.
    pub fn settings(&self, id: u64) -> Settings {
        let own = self.upwards(id).map(|(_, version)| version.item.settings());
        own.fold(Settings::default(), |below, above| below.below(above))
    }

    /// The versions that go on from a snapshot.
    pub fn children(&self, id: u64) -> impl Iterator<Item = u64> + '_ {
        self.children.range((id, 0)..=(id, u64::MAX)).map(|(_, child)| *child)
    }

    /// How many go on from a snapshot.
    pub fn child_count(&self, id: u64) -> usize {
        self.children(id).count()
    }

    /// The only version that goes on from a snapshot, if it is the only one.
    pub fn only_child(&self, id: u64) -> Option<u64> {
        let mut children = self.children(id);
        children.next().filter(|_| children.next().is_none())
    }

    /// Versions that are deleted and not gone yet.
    pub fn deleted(&self) -> &BTreeSet<u64> {
        &self.deleted
    }

    /// Those of them whose deletion has begun.
    pub fn started(&self) -> &BTreeSet<u64> {
        &self.started
    }

    /// Bytes that would come free if a version alone were deleted: those that no other has, data
    /// once for each reference.
    pub fn unique_bytes(&self, id: u64) -> u64 {
        let Some(version) = self.get(id) else { return 0 };
        let mut children = self.children(id);
        match (children.next(), children.next()) {
            (None, _) => version.item.own_bytes.saturating_add(self.hidden_bytes(id)),
            (Some(child), None) => self.get(child).map_or(0, |child| child.item.dead_own_bytes),
            // What is deleted stays as long as two go on from it.
            _ => 0,
        }
    }

    /// Bytes that a deleted snapshot holds until a version without successors goes that goes on
    /// from it.
    fn hidden_bytes(&self, id: u64) -> u64 {
        let parent = self.get(id).map_or(0, |version| version.item.parent);
        if !self.deleted.contains(&parent) {
            return 0;
        }
        let mut others = self.children(parent).filter(|other| *other != id);
        match (others.next(), others.next()) {
            (Some(other), None) => self.get(other).map_or(0, |other| other.item.dead_own_bytes),
            _ => 0,
        }
    }

    /// The group after which entries of a version's dead list were born that its `dead_own_bytes`
    /// sums up.
    pub fn dead_own_since(&self, item: &SubvolItem) -> Txg {
        match item.dead_own_from {
            0 => self.parent_txg(item.parent),
            from => Txg(from - 1),
        }
    }

    /// A copy to be changed. Not inlined: it is made on the stack.
    #[inline(never)]
    fn copy(&self, id: u64) -> Result<Box<Version>> {
        Ok(Box::new(self.need(id)?.clone()))
    }

    /// Adds a version.
    ///
    /// # Errors
    /// EEXIST when there is one of that id or name.
    pub fn insert(&mut self, id: u64, version: Version) -> Result<()> {
        if self.all.contains_key(&id) {
            return Err(Errno::Exist.into());
        }
        self.replace(id, Some(Box::new(version)))
    }

    /// Changes the item of a version; name and holds stay.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn change(&mut self, id: u64, change: impl FnOnce(&mut SubvolItem)) -> Result<()> {
        let mut version = self.copy(id)?;
        change(&mut version.item);
        self.replace(id, Some(version))
    }

    /// Notes what a snapshot holds: the identity of its content, and the sum that it follows from.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn set_content(&mut self, id: u64, identity: [u8; 32], sum: Vec<u8>) -> Result<()> {
        self.change(id, |item| item.content = identity)?;
        self.contents.insert(id, sum);
        if let Some(before) = &mut self.before {
            before.push(Before::Content(id));
        }
        Ok(())
    }

    /// The sum of a snapshot's content, when that is not written yet.
    pub fn unwritten_content(&self, id: u64) -> Option<&Vec<u8>> {
        self.contents.get(&id)
    }

    /// Gives a version another name.
    ///
    /// # Errors
    /// EEXIST when another has it.
    pub fn rename(&mut self, id: u64, name: &[u8]) -> Result<()> {
        let mut version = self.copy(id)?;
        version.name = name.to_vec();
        self.replace(id, Some(version))
    }

    /// Sets the tags that hold a snapshot.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn set_holds(&mut self, id: u64, holds: Vec<Vec<u8>>) -> Result<()> {
        let mut version = self.copy(id)?;
        version.holds = holds;
        self.replace(id, Some(version))
    }

    /// Sets the properties that users gave a version.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn set_user(&mut self, id: u64, user: UserProperties) -> Result<()> {
        let mut version = self.copy(id)?;
        version.user = user;
        self.replace(id, Some(version))
    }

    /// Marks a version deleted: its name is free, and it is taken apart in the background.
    ///
    /// # Errors
    /// [`Error::BadItem`] when there is none.
    pub fn mark_deleted(&mut self, id: u64) -> Result<()> {
        let mut version = self.copy(id)?;
        version.item.flags |= version::DELETED;
        version.name.clear();
        version.user.clear();
        self.replace(id, Some(version))
    }

    /// Nothing is left of a deleted version.
    ///
    /// # Errors
    /// None.
    pub fn remove(&mut self, id: u64) -> Result<()> {
        self.replace(id, None)
    }

    /// Adds a bookmark.
    ///
    /// # Errors
    /// EEXIST when the subvolume has one of that name.
    pub fn insert_bookmark(&mut self, id: u64, bookmark: Bookmark) -> Result<()> {
        let at = (Space::Bookmark(bookmark.item.owner), bookmark.name.clone());
        if self.names.contains_key(&at) || self.bookmarks.contains_key(&id) {
            return Err(Errno::Exist.into());
        }
        self.replace_bookmark(id, Some(bookmark));
        Ok(())
    }

    /// Removes a bookmark.
    pub fn remove_bookmark(&mut self, id: u64) {
        self.replace_bookmark(id, None);
    }

    fn replace_bookmark(&mut self, id: u64, bookmark: Option<Bookmark>) {
        let old = self.unlist_bookmark(id);
        self.list_bookmark(id, bookmark);
        self.touched_bookmarks.insert(id);
        if let Some(before) = &mut self.before {
            before.push(Before::Bookmark(id, old));
        }
    }

    fn unlist_bookmark(&mut self, id: u64) -> Option<Bookmark> {
        let bookmark = self.bookmarks.remove(&id)?;
        self.names.remove(&(Space::Bookmark(bookmark.item.owner), bookmark.name.clone()));
        Some(bookmark)
    }

    fn list_bookmark(&mut self, id: u64, bookmark: Option<Bookmark>) {
        let Some(bookmark) = bookmark else { return };
        self.names.insert((Space::Bookmark(bookmark.item.owner), bookmark.name.clone()), id);
        self.bookmarks.insert(id, bookmark);
    }

    /// What changed since this was last called. Edits that change nothing may be among them.
    pub fn take_edits(&mut self) -> Edits {
        // A map, because sorting items as large takes more stack than a kernel has.
        let (mut sorted, mut items) = (BTreeMap::new(), Vec::new());
        let put = |value: Vec<u8>| match value.is_empty() {
            true => Edit::Delete,
            false => Edit::Put(value),
        };
        for id in core::mem::take(&mut self.touched) {
            let (mut item, mut name, mut holds) = (Vec::new(), Vec::new(), Vec::new());
            if let Some(version) = self.get(id) {
                item = version.item.to_bytes().to_vec();
                (name, holds) = (version.name.clone(), encode_tags(&version.holds));
                items.push((id, version.item));
            }
            sorted.insert(Key::new(id, kind::SUBVOL, 0), put(item));
            sorted.insert(Key::new(id, kind::NAME, 0), put(name));
            sorted.insert(Key::new(id, kind::HOLDS, 0), put(holds));
            let content = self.contents.remove(&id);
            match self.get(id).map(|version| version.item.content != [0; 32]) {
                Some(true) => {
                    if let Some(sum) = content {
                        sorted.insert(Key::new(id, kind::CONTENT, 0), Edit::Put(sum));
                    }
                }
                _ => drop(sorted.insert(Key::new(id, kind::CONTENT, 0), Edit::Delete)),
            }
        }
        // Apart, so that what is large is not written again with every group.
        for id in core::mem::take(&mut self.touched_users) {
            let user = self.get(id).map_or(Vec::new(), |version| encode_user(&version.user));
            sorted.insert(Key::new(id, kind::PROPERTY, property::USER), put(user));
        }
        for id in core::mem::take(&mut self.touched_bookmarks) {
            let mut value = Vec::new();
            if let Some(bookmark) = self.bookmarks.get(&id) {
                value = bookmark.item.to_bytes().to_vec();
                value.extend_from_slice(&bookmark.name);
            }
            sorted.insert(Key::new(id, kind::BOOKMARK, 0), put(value));
        }
        let mut tree = Vec::with_capacity(sorted.len());
        for edit in sorted {
            tree.push(edit);
        }
        Edits { tree, items }
    }

    /// Group of which a version's parent is the state; zero without a parent.
    pub fn parent_txg(&self, id: u64) -> Txg {
        self.all.get(&id).map_or(Txg(0), |version| Txg(version.item.snapshot_txg))
    }
}
