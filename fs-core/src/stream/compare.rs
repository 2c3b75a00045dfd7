//! Differing items become events that mean something, inode by inode.
//!
//! For each inode of which any item differs, a [`Comparison`] gives [`Event::Inode`], then what
//! differs of it, ascending by key, then the ranges in which its data may differ.
//!
//! - An inode without names is nobody's content: it counts as absent. One that got its first name,
//!   or lost its last and is still open, differs in all its items although the trees agree about
//!   them; they are then walked in one tree alone.
//! - Extents are compared as mappings, not as items: an item that was split because a sector in its
//!   middle was overwritten differs in that sector. One address is one content, because whoever
//!   compares two trees keeps what either reaches from being reused.
//! - Where the two sizes differ the range between them is named too: what items hold beyond the
//!   size reads as zeros, until the file grows over it.

use crate::btree::{Difference, Differences, NodeSource, Tree, Value};
use crate::error::Error;
use crate::format::extent::Extent;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::platform::Result;
use crate::subvol::ranges::anchor;
use crate::units::{align_down, sector_round, Ino, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::collections::VecDeque;

/// Something that differs.
#[derive(Clone, Debug)]
pub enum Event {
    /// An inode, before all else of it. Its fields may be equal.
    Inode {
        /// Its number.
        ino: Ino,
        /// Its fields in the old tree, if it has a name there.
        old: Option<Box<InodeItem>>,
        /// Its fields in the new tree, if it has a name there.
        new: Option<Box<InodeItem>>,
    },
    /// An item of the inode: a further name, an entry, a target, attributes with one hash.
    Item {
        /// Its key.
        key: Key,
        /// Its value in the old tree.
        old: Option<Value>,
        /// Its value in the new tree.
        new: Option<Value>,
    },
    /// A range of a file in which its data may differ: whole sectors, not joined to the range
    /// before.
    Data {
        /// Its first byte.
        start: u64,
        /// The byte after its last.
        end: u64,
    },
}

/// The differences between two states of a subvolume. After an error it must not be used.
pub struct Comparison {
    old: Tree,
    new: Tree,
    main: Differences,
    /// All items of an inode that counts as absent in one of the trees.
    alone: Option<Differences>,
    object: Option<Object>,
    ready: VecDeque<Event>,
}

/// The inode under way.
struct Object {
    ino: u64,
    in_old: bool,
    in_new: bool,
    sweep: Sweep,
}

impl Comparison {
    /// Compares two states.
    pub fn new(old: &Tree, new: &Tree) -> Comparison {
        Comparison::from(old, new, Ino(0))
    }

    /// Compares two states in their inodes from a number on.
    pub fn from(old: &Tree, new: &Tree, first: Ino) -> Comparison {
        Comparison {
            old: *old,
            new: *new,
            // Object zero lists the inodes without names.
            main: old.differences(new, Key::new(first.0.max(1), 0, 0)),
            alone: None,
            object: None,
            ready: VecDeque::new(),
        }
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// Errors of the device or the trees.
    pub fn next(&mut self, nodes: &dyn NodeSource) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(found) = self.pull(nodes)? else {
                self.finish_object();
                return Ok(self.ready.pop_front());
            };
            if self.object.as_ref().is_none_or(|object| object.ino != found.key.object) {
                self.finish_object();
                self.start_object(nodes, found)?;
            } else {
                self.take(found)?;
            }
        }
    }

    /// The next differing item. What the trees agree or disagree about in an inode that is walked
    /// alone is passed over.
    fn pull(&mut self, nodes: &dyn NodeSource) -> Result<Option<Difference>> {
        let current = self.object.as_ref().map(|object| object.ino);
        if let Some(alone) = &mut self.alone {
            match alone.next(nodes)? {
                Some(found) if Some(found.key.object) == current => return Ok(Some(found)),
                _ => self.alone = None,
            }
            while let Some(found) = self.main.next(nodes)? {
                if Some(found.key.object) != current {
                    return Ok(Some(found));
                }
            }
            return Ok(None);
        }
        self.main.next(nodes)
    }

    fn start_object(&mut self, nodes: &dyn NodeSource, first: Difference) -> Result<()> {
        let ino = first.key.object;
        let key = Key::new(ino, kind::INODE, 0);
        let fields = |tree: &Tree| -> Result<Option<Box<InodeItem>>> {
            let Some(value) = tree.lookup(nodes, &key)? else { return Ok(None) };
            let item = InodeItem::decode(&value).map_err(|bad| bad.in_item(tree.id, ino))?;
            Ok(Some(Box::new(item)))
        };
        let (old, new) = (fields(&self.old)?, fields(&self.new)?);
        let nameless = |item: &Option<Box<InodeItem>>| matches!(item, Some(i) if i.nlink == 0);
        let is_alone = nameless(&old) || nameless(&new);
        let (old, new) = (old.filter(|i| i.nlink > 0), new.filter(|i| i.nlink > 0));
        let mut object =
            Object { ino, in_old: old.is_some(), in_new: new.is_some(), sweep: Sweep::default() };
        // Sizes of directories and targets follow from something else.
        if let (Some(old), Some(new)) = (&old, &new) {
            if old.is_file() && new.is_file() {
                object.sweep.sizes_differ(old.size, new.size);
            }
        }
        self.object = Some(object);
        if is_alone {
            let (none, from) = (Tree::empty(self.new.id), Key::new(ino, 0, 0));
            self.alone = Some(match (&old, &new) {
                (Some(_), _) => self.old.differences(&none, from),
                (None, Some(_)) => none.differences(&self.new, from),
                // Without a name in either, it is of no interest.
                (None, None) => none.differences(&none, from),
            });
        }
        if old.is_some() || new.is_some() {
            self.ready.push_back(Event::Inode { ino: Ino(ino), old, new });
        }
        match is_alone {
            true => Ok(()),
            false => self.take(first),
        }
    }

    /// A differing item of the object under way.
    fn take(&mut self, found: Difference) -> Result<()> {
        let Some(object) = &mut self.object else { return Ok(()) };
        let Difference { key, old, new } = found;
        let (old, new) = (old.filter(|_| object.in_old), new.filter(|_| object.in_new));
        if old.is_none() && new.is_none() {
            return Ok(());
        }
        match key.kind {
            kind::LINK | kind::XATTR | kind::DIR_ENTRY | kind::SYMLINK => {
                self.ready.push_back(Event::Item { key, old, new });
            }
            kind::EXTENT => {
                let (old, new) = (piece(&self.old, key, old)?, piece(&self.new, key, new)?);
                object.sweep.advance(key.offset, &mut self.ready);
                object.sweep.begin(old, new);
            }
            // INODE was looked at first; DIR_HASH follows from the entries; a value in parts has
            // another id when it is another value.
            _ => {}
        }
        Ok(())
    }

    fn finish_object(&mut self) {
        if let Some(mut object) = self.object.take() {
            object.sweep.finish(&mut self.ready);
        }
    }
}

/// What a tree has for a range of a file.
struct Piece {
    at: u64,
    end: u64,
    extent: Extent,
}

/// The piece of an EXTENT item; `None` when it reads as zeros anyway.
fn piece(tree: &Tree, key: Key, value: Option<Value>) -> Result<Option<Piece>> {
    let Some(value) = value else { return Ok(None) };
    let (extent, _) = Extent::decode(&value, key.offset, value.birth())
        .map_err(|bad| bad.in_item(tree.id, key.object))?;
    let len = match &extent {
        Extent::Promised { .. } => return Ok(None),
        Extent::Inline { .. } => SECTOR_BYTES,
        other => other.len(),
    };
    let what = "extent beyond the largest file";
    let end = key.offset.checked_add(len);
    let end = end.ok_or(Error::BadItem { what, tree: tree.id, object: key.object })?;
    Ok(Some(Piece { at: key.offset, end, extent }))
}

/// Whether both read the same where they overlap.
fn is_same(old: Option<&Piece>, new: Option<&Piece>) -> bool {
    let (Some(old), Some(new)) = (old, new) else { return old.is_none() && new.is_none() };
    match (&old.extent, &new.extent) {
        (Extent::Plain { addr: a, .. }, Extent::Plain { addr: b, .. }) => {
            a.0.wrapping_sub(old.at) == b.0.wrapping_sub(new.at)
        }
        (
            Extent::Packed { blob: a, offset: from_a, .. },
            Extent::Packed { blob: b, offset: from_b, .. },
        ) => a == b && anchor(old.at, *from_a) == anchor(new.at, *from_b),
        (a @ Extent::Inline { .. }, b @ Extent::Inline { .. }) => a == b,
        _ => false,
    }
}

/// Moves over a file, from differing item to differing item, with what either tree has there.
#[derive(Default)]
struct Sweep {
    at: u64,
    old: Option<Piece>,
    new: Option<Piece>,
    /// The range between the two sizes.
    between: (u64, u64),
    /// A range that differs and may yet become longer.
    run: Option<(u64, u64)>,
}

impl Sweep {
    fn sizes_differ(&mut self, old: u64, new: u64) {
        if old != new {
            let (start, end) = (old.min(new), old.max(new));
            self.between = (align_down(start, SECTOR_BYTES), sector_round(end));
        }
    }

    /// The item at the position begins.
    fn begin(&mut self, old: Option<Piece>, new: Option<Piece>) {
        self.old = old.or_else(|| self.old.take());
        self.new = new.or_else(|| self.new.take());
    }

    /// Moves to `to`, giving the ranges before it that differ.
    fn advance(&mut self, to: u64, out: &mut VecDeque<Event>) {
        while self.at < to {
            let (start, end) = self.between;
            let ends = [
                self.old.as_ref().map_or(to, |piece| piece.end),
                self.new.as_ref().map_or(to, |piece| piece.end),
                start,
                end,
            ];
            let ahead = ends.into_iter().filter(|end| *end > self.at);
            let next = ahead.min().unwrap_or(to).min(to);
            let is_between = start <= self.at && self.at < end;
            if is_between || !is_same(self.old.as_ref(), self.new.as_ref()) {
                self.differs(self.at, next, out);
            }
            self.at = next;
            self.old.take_if(|piece| piece.end <= next);
            self.new.take_if(|piece| piece.end <= next);
        }
    }

    fn differs(&mut self, start: u64, end: u64, out: &mut VecDeque<Event>) {
        match &mut self.run {
            Some(run) if run.1 == start => run.1 = end,
            run => {
                if let Some((start, end)) = run.replace((start, end)) {
                    out.push_back(Event::Data { start, end });
                }
            }
        }
    }

    fn finish(&mut self, out: &mut VecDeque<Event>) {
        let end = |piece: &Option<Piece>| piece.as_ref().map_or(0, |piece| piece.end);
        let end = end(&self.old).max(end(&self.new)).max(self.between.1);
        self.advance(end, out);
        if let Some((start, end)) = self.run.take() {
            out.push_back(Event::Data { start, end });
        }
    }
}
