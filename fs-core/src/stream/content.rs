//! A subvolume's content as a set, and its hash: the identity.
//!
//! What a user can see of a subvolume is written as a set of *elements*, each a string of bytes
//! that says one thing:
//!
//! | tag | element | says |
//! | ---: | --- | --- |
//! | 1 | inode, fields | an inode that has a name, with mode, owner, times and so on |
//! | 2 | directory, inode, name | a name |
//! | 3 | inode, target | where a symbolic link leads |
//! | 4 | inode, name, value | an extended attribute |
//! | 5 | inode, index, hash | 128 KiB of a file's data that are not all zeros |
//!
//! How anything is stored does not occur in it: neither addresses, checksums and compression, nor
//! extents, holes and promised room, nor the order of entries. The identity is a hash of the set
//! that elements can be added to and taken from (`sum`), so the content of a later state follows
//! from that of an earlier one and from what differs between the two.
//!
//! `docs/decisions/0002-content-identity.md` says what is left out and why, and why two contents
//! with one identity cannot be found.

use super::compare::{Comparison, Event};
use super::read::{Batch, File};
use super::sum::Sum;
use super::Source;
use crate::btree::{Tree, Value};
use crate::error::Error;
use crate::format::dir::Entry;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::xattr::{self, Xattr, XattrValue};
use crate::platform::Result;
use crate::units::Ino;
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a file that are one element.
pub const RECORD_BYTES: u64 = 128 << 10;
/// Records that are read at once.
const RECORDS_AT_ONCE: u64 = 16;

/// Names the content of a subvolume: equal for equal content, however it is stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(pub [u8; 32]);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self})")
    }
}

/// The hash of a subvolume's content, open to change.
#[derive(Clone)]
pub struct Content {
    sum: Sum,
    /// Where elements are put together.
    element: Vec<u8>,
}

/// Whether an element is added or taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Taken away.
    Old,
    /// Added.
    New,
}

/// How far a content has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Inodes that differ and have been looked at.
    pub inodes: u64,
    /// Bytes of data that have been read and hashed.
    pub bytes: u64,
}

/// The inode whose events are under way.
struct Current {
    ino: Ino,
    old_size: u64,
    new_size: u64,
    /// Records below this have been dealt with.
    done_to: u64,
}

impl Content {
    /// Bytes of an encoded content.
    pub const BYTES: usize = Sum::BYTES;

    /// The content of nothing.
    pub fn empty() -> Content {
        Content { sum: Sum::empty(), element: Vec::new() }
    }

    /// The content of a subvolume, from nothing but itself. `progress` is called now and then; an
    /// error of it ends the work.
    ///
    /// # Errors
    /// Errors of the device or the tree, damaged data; those of `progress`.
    pub fn of(
        source: Source<'_>,
        tree: &Tree,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Content> {
        let mut content = Content::empty();
        content.update(source, &Tree::empty(tree.id), tree, progress)?;
        Ok(content)
    }

    /// From the content of `old` to that of `new`. After an error the content is neither.
    ///
    /// # Errors
    /// As [`Content::of`].
    pub fn update(
        &mut self,
        source: Source<'_>,
        old: &Tree,
        new: &Tree,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<()> {
        let mut comparison = Comparison::new(old, new);
        let mut reading = Reading { batch: Batch::new(source), wanted: Vec::new() };
        let mut current = Current { ino: Ino(0), old_size: 0, new_size: 0, done_to: 0 };
        let mut told = Told { done: Progress::default(), progress };
        while let Some(event) = comparison.next(source.nodes)? {
            match event {
                Event::Inode { ino, old, new } => {
                    let (old, new) = (old.as_deref(), new.as_deref());
                    let size = |item: Option<&InodeItem>| item.map_or(0, |item| item.size);
                    let (old_size, new_size) = (size(old), size(new));
                    current = Current { ino, old_size, new_size, done_to: 0 };
                    self.inode(ino, old, new);
                    told.done.inodes += 1;
                }
                Event::Item { key, old: a, new: b } => {
                    self.item(source, (old, a), (new, b), key)?;
                }
                Event::Data { start, end } => {
                    let first = (start / RECORD_BYTES).max(current.done_to);
                    let last = end.div_ceil(RECORD_BYTES).max(first);
                    current.done_to = last;
                    let (ino, range) = (current.ino, (first, last));
                    let file = File { source, tree: old, ino, size: current.old_size };
                    self.records(Side::Old, &file, range, &mut reading, &mut told)?;
                    let file = File { source, tree: new, ino, size: current.new_size };
                    self.records(Side::New, &file, range, &mut reading, &mut told)?;
                }
            }
            told.tell()?;
        }
        self.hash(&mut reading, &mut told.done)?;
        told.tell()
    }

    /// The identity.
    pub fn identity(&self) -> Identity {
        Identity(self.sum.digest())
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.sum.count()
    }

    /// The content as bytes, from which it can be gone on with.
    pub fn encode(&self) -> Vec<u8> {
        self.sum.encode()
    }

    /// The content of those bytes; `None` when they are of another length.
    pub fn decode(bytes: &[u8]) -> Option<Content> {
        Some(Content { sum: Sum::decode(bytes)?, element: Vec::new() })
    }

    /// Adds or takes an element: its tag, its numbers, and what is as long as it is, at the end.
    pub(super) fn put(&mut self, side: Side, tag: u8, numbers: &[u64], parts: &[&[u8]]) {
        let element = &mut self.element;
        element.clear();
        element.push(tag);
        numbers.iter().for_each(|number| element.extend_from_slice(&number.to_le_bytes()));
        for part in parts {
            element.extend_from_slice(&(part.len() as u64).to_le_bytes());
            element.extend_from_slice(part);
        }
        match side {
            Side::Old => self.sum.take(&self.element),
            Side::New => self.sum.add(&self.element),
        }
    }

    fn inode(&mut self, ino: Ino, old: Option<&InodeItem>, new: Option<&InodeItem>) {
        let (old, new) = (old.map(fields), new.map(fields));
        if old == new {
            return;
        }
        for (side, fields) in [(Side::Old, old), (Side::New, new)] {
            if let Some(fields) = fields {
                self.put(side, 1, &[ino.0], &[&fields]);
            }
        }
    }

    fn item(
        &mut self,
        source: Source<'_>,
        old: (&Tree, Option<Value>),
        new: (&Tree, Option<Value>),
        key: Key,
    ) -> Result<()> {
        let sides = [(Side::Old, &old), (Side::New, &new)];
        match key.kind {
            kind::DIR_ENTRY => {
                for (side, (tree, value)) in sides {
                    let Some(value) = value else { continue };
                    let entry = Entry::decode(value).map_err(|b| b.in_item(tree.id, key.object))?;
                    self.put(side, 2, &[key.object, entry.ino], &[&entry.name]);
                }
            }
            kind::SYMLINK => {
                for (side, (_, value)) in sides {
                    if let Some(value) = value {
                        self.put(side, 3, &[key.object], &[value]);
                    }
                }
            }
            kind::XATTR => {
                let (a, b) = (attributes((old.0, &old.1), key)?, attributes((new.0, &new.1), key)?);
                let gone = a.iter().filter(|x| !b.contains(x)).map(|x| (Side::Old, old.0, x));
                let came = b.iter().filter(|x| !a.contains(x)).map(|x| (Side::New, new.0, x));
                for (side, tree, attribute) in gone.chain(came) {
                    let value = value_of(source, tree, key.object, attribute)?;
                    self.put(side, 4, &[key.object], &[&attribute.name, &value]);
                }
            }
            // A further name is told by its entry.
            _ => {}
        }
        Ok(())
    }

    /// Adds or takes the records `range` of a file, when they have been read.
    fn records(
        &mut self,
        side: Side,
        file: &File<'_>,
        range: (u64, u64),
        reading: &mut Reading<'_>,
        told: &mut Told<'_>,
    ) -> Result<()> {
        let (mut next, last) = range;
        let stop = last.saturating_mul(RECORD_BYTES);
        while let Some(at) = file.next_data(next.saturating_mul(RECORD_BYTES), stop)? {
            let first = at / RECORD_BYTES;
            let start = first * RECORD_BYTES;
            next = first + RECORDS_AT_ONCE.min(last - first);
            let bytes = (next.saturating_mul(RECORD_BYTES).min(file.size) - start) as usize;
            reading.batch.add(file, start, bytes)?;
            reading.wanted.push(Wanted { side, ino: file.ino, first, bytes });
            if reading.batch.is_full() {
                self.hash(reading, &mut told.done)?;
                told.tell()?;
            }
        }
        Ok(())
    }

    /// Adds and takes what is being read.
    fn hash(&mut self, reading: &mut Reading<'_>, done: &mut Progress) -> Result<()> {
        let codecs = &*reading.batch.source().pool.platform().codecs;
        let parts = reading.batch.finish()?;
        for (Wanted { side, ino, first, bytes }, part) in reading.wanted.drain(..).zip(parts) {
            let records = part[..bytes].chunks(RECORD_BYTES as usize);
            for (index, record) in (first..).zip(records) {
                // Without the zeros at its end, so that a file that grows by a hole keeps its last
                // record.
                let record = without_zeros(record);
                if !record.is_empty() {
                    self.put(side, 5, &[ino.0, index], &[&codecs.blake3(record)]);
                }
            }
            done.bytes += bytes as u64;
        }
        Ok(())
    }
}

/// How far it is, and whom to tell.
struct Told<'a> {
    done: Progress,
    progress: &'a mut dyn FnMut(&Progress) -> Result<()>,
}

impl Told<'_> {
    fn tell(&mut self) -> Result<()> {
        (self.progress)(&self.done)
    }
}

/// Records that are being read.
struct Reading<'a> {
    batch: Batch<'a>,
    wanted: Vec<Wanted>,
}

/// A part of a file: whole records, but for the last.
struct Wanted {
    side: Side,
    ino: Ino,
    first: u64,
    bytes: usize,
}

/// Bytes up to the last that is not zero.
fn without_zeros(mut bytes: &[u8]) -> &[u8] {
    while let Some((before, last)) = bytes.split_last_chunk::<256>() {
        if *last != [0; 256] {
            break;
        }
        bytes = before;
    }
    let last = bytes.iter().rposition(|byte| *byte != 0);
    &bytes[..last.map_or(0, |last| last + 1)]
}

/// What of an inode's fields is content. Left out are what follows from other elements (number of
/// names, size of a directory or target), how data is stored, and when it was last read.
pub(super) fn fields(item: &InodeItem) -> Vec<u8> {
    let size = if item.is_file() { item.size } else { 0 };
    let mut bytes = Vec::with_capacity(80);
    for number in [item.mode, item.uid, item.gid, item.flags, item.project] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for number in [item.rdev, size] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for time in [item.mtime(), item.ctime(), item.btime()] {
        bytes.extend_from_slice(&time.secs.to_le_bytes());
        bytes.extend_from_slice(&time.nanos.to_le_bytes());
    }
    bytes
}

/// The attributes of an item of a tree; none of no item.
pub(super) fn attributes(side: (&Tree, &Option<Value>), key: Key) -> Result<Vec<Xattr>> {
    match side.1 {
        Some(value) => xattr::decode(value).map_err(|bad| bad.in_item(side.0.id, key.object)),
        None => Ok(Vec::new()),
    }
}

/// The value of an attribute.
pub(super) fn value_of(
    source: Source<'_>,
    tree: &Tree,
    object: u64,
    attribute: &Xattr,
) -> Result<Vec<u8>> {
    let (id, len) = match &attribute.value {
        XattrValue::Inline(value) => return Ok(value.clone()),
        XattrValue::Parts { id, bytes } => (*id, *bytes as usize),
    };
    let bad = |what| Error::BadItem { what, tree: tree.id, object };
    let mut value = Vec::new();
    value.try_reserve_exact(len).map_err(|_| Error::Memory)?;
    let mut cursor = tree.cursor();
    cursor.seek(source.nodes, &Key::new(object, kind::XATTR_PART, id << 8))?;
    while value.len() < len {
        let part = cursor.next(source.nodes)?;
        let part = part.filter(|(key, part)| {
            let own = (object, kind::XATTR_PART, id);
            (key.object, key.kind, key.offset >> 8) == own && !part.is_empty()
        });
        let (_, part) = part.ok_or_else(|| bad("attribute value shorter than it says"))?;
        if part.len() > len - value.len() {
            return Err(bad("attribute value longer than it says"));
        }
        value.extend_from_slice(&part);
    }
    Ok(value)
}
