//! What changed between two states of a subvolume, by path.
//!
//! Changes come inode by inode: its names, its data, its attributes. What a directory holds is told
//! by the names of that, so a directory whose times changed with its entries is not told of; one
//! that was renamed is, and what is in it is not.
//!
//! Memory: the names that one inode got and lost, and the paths of some directories.

use super::compare::{Comparison, Event};
use crate::btree::{NodeSource, Tree};
use crate::format::dir::Entry;
use crate::format::inode::{InodeItem, LinkItem};
use crate::format::key::{kind, Key};
use crate::format::pool::ROOT_INO;
use crate::platform::Result;
use crate::units::Ino;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

/// Paths of directories that are kept.
const PATHS_KEPT: usize = 1024;
/// How deep a path may be: a crafted tree may have a cycle of parents.
const DEPTH_MAX: usize = 4096;

/// Something that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The inode.
    pub ino: Ino,
    /// Type bits of its mode.
    pub file_type: u32,
    /// Its path from the root of the subvolume: the new one, unless it was removed.
    pub path: Vec<u8>,
    /// What happened.
    pub what: What,
}

/// What happened to a name or an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The name came: a new file, or a further name of one that was there.
    Created,
    /// The name went.
    Removed,
    /// The name was another.
    Renamed {
        /// The path in the old state.
        from: Vec<u8>,
    },
    /// The file was written from `start` to `end`, or ended in between. What was written may be
    /// what was there: data is not read to find out.
    Data {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// Mode, owner, flags or project differ, or extended attributes were set; or the time of
    /// modification of what has no other change differs.
    Attributes,
}

/// Where a name is: directory and cookie.
type Place = (u64, u64);
/// What a name is: directory and bytes.
type Name = (u64, Vec<u8>);

/// The inode under way.
struct Current {
    ino: Ino,
    old: Option<Box<InodeItem>>,
    new: Option<Box<InodeItem>>,
    lost: BTreeSet<Place>,
    gained: BTreeSet<Place>,
    /// A path it has, for what is told of it after its names.
    path: Vec<u8>,
    names_told: bool,
    attributes: bool,
    data: bool,
}

/// The changes between two states. After an error it must not be used.
pub struct Changes {
    comparison: Comparison,
    old: Paths,
    new: Paths,
    current: Option<Current>,
    ready: VecDeque<Change>,
}

impl Changes {
    /// What changed from `old` to `new`.
    pub fn new(old: &Tree, new: &Tree) -> Changes {
        Changes::from(old, new, Ino(0))
    }

    /// What changed of the inodes from a number on: to go on where another comparison stopped.
    pub fn from(old: &Tree, new: &Tree, first: Ino) -> Changes {
        Changes {
            comparison: Comparison::from(old, new, first),
            old: Paths { tree: *old, known: BTreeMap::new() },
            new: Paths { tree: *new, known: BTreeMap::new() },
            current: None,
            ready: VecDeque::new(),
        }
    }

    /// The next change; `None` at the end.
    ///
    /// # Errors
    /// Errors of the device or the trees.
    pub fn next(&mut self, nodes: &dyn NodeSource) -> Result<Option<Change>> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(Some(change));
            }
            let Some(event) = self.comparison.next(nodes)? else {
                self.finish(nodes)?;
                return Ok(self.ready.pop_front());
            };
            match event {
                Event::Inode { ino, old, new } => {
                    self.finish(nodes)?;
                    self.current = Some(Current::new(ino, old, new));
                }
                Event::Item { key, old, new } => {
                    let Some(current) = &mut self.current else { continue };
                    match key.kind {
                        kind::LINK => {
                            for (value, gained) in [(old, false), (new, true)] {
                                let Some(value) = value else { continue };
                                let link = LinkItem::decode(&value)
                                    .map_err(|bad| bad.in_item(self.new.tree.id, key.object))?;
                                current.name((link.parent, link.cookie), gained);
                            }
                        }
                        kind::XATTR | kind::SYMLINK => current.attributes = true,
                        _ => {}
                    }
                }
                Event::Data { start, end } => self.data(nodes, start, end)?,
            }
        }
    }

    fn data(&mut self, nodes: &dyn NodeSource, start: u64, end: u64) -> Result<()> {
        self.tell_names(nodes)?;
        let Some(current) = &mut self.current else { return Ok(()) };
        let (Some(old), Some(new)) = (&current.old, &current.new) else { return Ok(()) };
        let end = end.min(old.size.max(new.size));
        if start < end {
            current.data = true;
            let change = current.change(What::Data { start, end });
            self.ready.push_back(change);
        }
        Ok(())
    }

    /// Tells of names that came and went, once all are known.
    fn tell_names(&mut self, nodes: &dyn NodeSource) -> Result<()> {
        let Some(current) = &mut self.current else { return Ok(()) };
        if core::mem::replace(&mut current.names_told, true) {
            return Ok(());
        }
        let first = |item: &InodeItem| (item.parent, item.parent_cookie);
        let shown = match (&current.new, &current.old) {
            (Some(new), _) => self.new.path(nodes, current.ino, first(new))?,
            (None, Some(old)) => self.old.path(nodes, current.ino, first(old))?,
            (None, None) => Vec::new(),
        };
        current.path = shown;
        let ino = current.ino.0;
        let named = |paths: &Paths, places: BTreeSet<Place>| -> Result<BTreeMap<Name, Place>> {
            // Collecting would sort them all at once, with more of the stack than a kernel has.
            let mut named = BTreeMap::new();
            for place in places {
                named.insert((place.0, paths.name(nodes, ino, place)?), place);
            }
            Ok(named)
        };
        let mut lost = named(&self.old, core::mem::take(&mut current.lost))?;
        let mut gained = named(&self.new, core::mem::take(&mut current.gained))?;
        // A name that went and came back has another cookie, and is the same name.
        lost.retain(|name, _| gained.remove(name).is_none());
        let (mut lost, mut gained) = (lost.into_values(), gained.into_values());
        loop {
            let (from, to) = (lost.next(), gained.next());
            let from = from.map(|place| self.old.path(nodes, current.ino, place)).transpose()?;
            let to = to.map(|place| self.new.path(nodes, current.ino, place)).transpose()?;
            let (path, what) = match (from, to) {
                (None, None) => return Ok(()),
                (Some(from), Some(to)) => (to, What::Renamed { from }),
                (Some(from), None) => (from, What::Removed),
                (None, Some(to)) => (to, What::Created),
            };
            self.ready.push_back(Change { path, ..current.change(what) });
        }
    }

    fn finish(&mut self, nodes: &dyn NodeSource) -> Result<()> {
        self.tell_names(nodes)?;
        if let Some(current) = self.current.take() {
            if current.attributes_differ() {
                self.ready.push_back(current.change(What::Attributes));
            }
        }
        Ok(())
    }
}

impl Current {
    fn new(ino: Ino, old: Option<Box<InodeItem>>, new: Option<Box<InodeItem>>) -> Current {
        let place = |item: &Option<Box<InodeItem>>| {
            let item = item.as_deref().filter(|item| item.parent != 0);
            item.map(|item| (item.parent, item.parent_cookie))
        };
        let firsts = [(place(&old), false), (place(&new), true)];
        let mut current = Current {
            ino,
            old,
            new,
            lost: BTreeSet::new(),
            gained: BTreeSet::new(),
            path: Vec::new(),
            names_told: false,
            attributes: false,
            data: false,
        };
        for (place, gained) in firsts {
            if let Some(place) = place {
                current.name(place, gained);
            }
        }
        current
    }

    /// Notes a name; one that is lost and gained stayed.
    fn name(&mut self, place: Place, gained: bool) {
        let (own, other) = match gained {
            true => (&mut self.gained, &mut self.lost),
            false => (&mut self.lost, &mut self.gained),
        };
        if !other.remove(&place) {
            own.insert(place);
        }
    }

    fn change(&self, what: What) -> Change {
        let item = self.new.as_deref().or(self.old.as_deref());
        let file_type = item.map_or(0, InodeItem::file_type);
        Change { ino: self.ino, file_type, path: self.path.clone(), what }
    }

    fn attributes_differ(&self) -> bool {
        let (Some(old), Some(new)) = (self.old.as_deref(), self.new.as_deref()) else {
            return false;
        };
        let fields = |i: &InodeItem| (i.mode, i.uid, i.gid, i.flags, i.project, i.rdev);
        let touched = !new.is_dir() && !self.data && old.mtime() != new.mtime();
        self.attributes || fields(old) != fields(new) || touched
    }
}

/// Finds paths in a tree.
struct Paths {
    tree: Tree,
    /// Of directories.
    known: BTreeMap<u64, Vec<u8>>,
}

impl Paths {
    /// The path of the name at a place; a name that cannot be found is shown as its inode's number.
    fn path(&mut self, nodes: &dyn NodeSource, ino: Ino, place: Place) -> Result<Vec<u8>> {
        if ino.0 == ROOT_INO {
            return Ok(b"/".to_vec());
        }
        // From the name up to a directory whose path is known.
        let mut way: Vec<(u64, Vec<u8>)> = Vec::new();
        let (mut ino, mut place) = (ino.0, place);
        let mut path = loop {
            way.push((ino, self.name(nodes, ino, place)?));
            if place.0 == ROOT_INO || place.0 == 0 || way.len() == DEPTH_MAX {
                break Vec::new();
            }
            if let Some(known) = self.known.get(&place.0) {
                break known.clone();
            }
            ino = place.0;
            let item = self.tree.lookup(nodes, &Key::new(ino, kind::INODE, 0))?;
            let item = item.map(|value| InodeItem::decode(&value)).transpose();
            let item = item.map_err(|bad| bad.in_item(self.tree.id, ino))?;
            place = item.map_or((0, 0), |item| (item.parent, item.parent_cookie));
        };
        let last = way.len() - 1;
        for (index, (ino, name)) in way.into_iter().rev().enumerate() {
            path.push(b'/');
            path.extend_from_slice(&name);
            if index < last {
                if self.known.len() >= PATHS_KEPT {
                    self.known.clear();
                }
                self.known.insert(ino, path.clone());
            }
        }
        Ok(path)
    }

    fn name(&self, nodes: &dyn NodeSource, ino: u64, place: Place) -> Result<Vec<u8>> {
        let value = self.tree.lookup(nodes, &Key::new(place.0, kind::DIR_ENTRY, place.1))?;
        let entry = value.map(|value| Entry::decode(&value)).transpose();
        let entry = entry.map_err(|bad| bad.in_item(self.tree.id, place.0))?;
        Ok(match entry.filter(|entry| entry.ino == ino) {
            Some(entry) => entry.name,
            None => alloc::format!("#{ino}").into_bytes(),
        })
    }
}
