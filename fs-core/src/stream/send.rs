//! What differs between two states of a subvolume, as records.
//!
//! ```text
//! Begin | names and inodes that went | inodes: fields, names, attributes, data | End
//! ```
//!
//! An incremental stream compares the trees twice. What went comes first, so that whoever receives
//! never has a name twice, and need not keep what takes another's place until that is gone. Both
//! comparisons cost what differs. A full stream is the difference to nothing, from which nothing
//! can go.
//!
//! Data is read where it may differ, a part within one record of content at a time; sectors of
//! zeros travel as holes, and in a file that is new not at all. Data that files share travels once
//! (`shared`). What comes is looked at a bit ahead, so that the data of many files is read
//! together.

#[cfg(test)]
mod tests;

use super::compare::{Comparison, Event};
use super::content::{attributes, value_of, Content, Identity, RECORD_BYTES};
use super::read::{Batch, File};
use super::record::{
    Base, Begin, Mark, Record, CLONE_BYTES_MAX, FOLLOWED, PROPERTIES, TARGET_BYTES_MAX,
};
use super::shared::{Next, Place, Shared};
use super::Source;
use crate::btree::{Tree, Value};
use crate::buf::Buf;
use crate::error::Error;
use crate::format::dir::Entry;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::platform::{Result, Timestamp};
use crate::subvol::store::Store;
use crate::units::{align_down, Ino, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::{IntoIter, Vec};

/// What is sent.
pub struct Shipment<'a> {
    /// Id of the snapshot.
    pub id: [u8; 16],
    /// When it was taken.
    pub created: Timestamp,
    /// Its name.
    pub name: &'a [u8],
    /// Its subvolume, as [`Begin::below`].
    pub below: &'a [u8],
    /// Names and values of the properties that were chosen for it, if they are to be told.
    pub properties: Option<&'a [(String, String)]>,
    /// Its tree.
    pub tree: Tree,
    /// Bytes of the nodes of that; zero if they are not counted.
    pub tree_bytes: u64,
    /// Its content.
    pub content: &'a Content,
    /// The state that the receiver has.
    pub base: Option<Parent>,
    /// Another stream will follow this one.
    pub is_followed: bool,
    /// Where to go on, as [`Begin::resumes`].
    pub resumes: Option<Mark>,
}

/// A state that the receiver has.
#[derive(Clone, Copy)]
pub struct Parent {
    /// Id of the snapshot.
    pub id: [u8; 16],
    /// Identity of its content.
    pub identity: Identity,
    /// Its tree.
    pub tree: Tree,
}

/// What comes next in a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begin,
    Went,
    Came,
    End,
    Done,
}

/// What has been looked at, and is to become records.
enum Step {
    /// An inode, or something of it.
    Event(Event),
    /// The next of what was read: so many bytes from here on.
    Data { at: u64, bytes: usize },
    /// A range of the file that reads as zeros.
    Zeros { start: u64, end: u64 },
    /// What is in a place, from here on.
    Clone { at: u64, place: Place },
    /// The end of a range that may differ.
    RangeEnd,
}

/// How far to look ahead.
const STEPS_MAX: usize = 1024;
/// And for how many items, each of which may keep two leaves in memory.
const ITEMS_MAX: usize = 128;

/// Makes the records of a stream. After an error it must not be used.
pub struct Sender<'a> {
    source: Source<'a>,
    store: &'a Store,
    old: Tree,
    new: Tree,
    tree_bytes: u64,
    stage: Stage,
    begin: Option<Box<Begin>>,
    properties: Vec<Record>,
    end: (Identity, u64),
    /// What is sent begins here.
    first: Mark,
    comparison: Comparison,
    ino: Ino,
    /// Whether the inode is in the new state.
    is_there: bool,
    /// Size of the file; 0 for all else.
    size: u64,
    /// The range of the file that is yet to be looked at.
    range: Option<(u64, u64)>,
    /// What comes next.
    steps: VecDeque<Step>,
    shared: Shared,
    /// The data of steps.
    parts: IntoIter<Buf>,
    /// Whether the file of the step held nothing before.
    is_fresh: bool,
    /// Zeros that were found and may go on.
    hole: Option<(u64, u64)>,
    ready: VecDeque<Record>,
}

impl<'a> Sender<'a> {
    /// Sends a state. Whoever calls keeps both trees from being reused.
    pub fn new(store: &'a Store, what: &Shipment<'_>) -> Sender<'a> {
        let base = what.base.map(|parent| Base { id: parent.id, identity: parent.identity });
        let old = what.base.map_or(Tree::empty(what.tree.id), |parent| parent.tree);
        let followed = if what.is_followed { FOLLOWED } else { 0 };
        let compat = followed | if what.properties.is_some() { PROPERTIES } else { 0 };
        let property = |(name, value): &(String, String)| Record::Property {
            name: name.clone().into_bytes(),
            value: value.clone().into_bytes(),
        };
        let properties = what.properties.unwrap_or_default().iter().map(property).collect();
        let resumes = what.resumes;
        let (id, created) = (what.id, what.created);
        let (below, name) = (what.below.to_vec(), what.name.to_vec());
        // Only then can there be any; who does not know them may read the rest.
        let clones = store.refs_view().tree.root.is_some();
        Sender {
            source: Source::of(store),
            store,
            old,
            new: what.tree,
            tree_bytes: what.tree_bytes,
            stage: Stage::Begin,
            begin: Some(Box::new(Begin {
                compat,
                id,
                created,
                base,
                resumes,
                clones,
                below,
                name,
            })),
            properties,
            end: (what.content.identity(), what.content.elements()),
            first: resumes.unwrap_or_default(),
            comparison: Comparison::new(&old, &what.tree),
            ino: Ino(0),
            is_there: false,
            size: 0,
            range: None,
            steps: VecDeque::new(),
            shared: Shared::default(),
            parts: Vec::new().into_iter(),
            is_fresh: false,
            hole: None,
            ready: VecDeque::new(),
        }
    }

    /// The next record; `None` after the last.
    ///
    /// # Errors
    /// Errors of the device or the trees; damaged data.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        loop {
            if let Some(record) = self.ready.pop_front() {
                return Ok(Some(record));
            }
            if let Some(step) = self.steps.pop_front() {
                self.carry_out(step)?;
                continue;
            }
            match self.stage {
                Stage::Begin => {
                    let begin = self.begin.take();
                    let has_base = begin.as_ref().is_some_and(|begin| begin.base.is_some());
                    if begin.as_ref().is_some_and(|begin| begin.clones) {
                        self.look_for_shared(has_base)?;
                    }
                    self.stage = match has_base && self.first.ino == 0 {
                        true => Stage::Went,
                        false => self.came_from(Ino(self.first.ino)),
                    };
                    self.ready.extend(begin.map(Record::Begin));
                    self.ready.extend(core::mem::take(&mut self.properties));
                }
                Stage::Went => match self.comparison.next(self.source.nodes)? {
                    Some(event) => self.went(event)?,
                    None => self.stage = self.came_from(Ino(0)),
                },
                Stage::Came => {
                    self.look_ahead()?;
                    if self.steps.is_empty() {
                        self.stage = Stage::End;
                    }
                }
                Stage::End => {
                    self.stage = Stage::Done;
                    let (identity, elements) = self.end;
                    return Ok(Some(Record::End { identity, elements }));
                }
                Stage::Done => return Ok(None),
            }
        }
    }

    /// Finds where the receiver has data that is shared before anything comes.
    fn look_for_shared(&mut self, has_base: bool) -> Result<()> {
        let trees = (&self.old, &self.new);
        if has_base {
            self.shared.look_at_kept(self.store, trees, self.tree_bytes)?;
        }
        match self.first.ino {
            0 => Ok(()),
            _ => self.shared.look_at_sent(self.store, trees, self.first),
        }
    }

    /// Tells of what is in the new state, from an inode on.
    fn came_from(&mut self, first: Ino) -> Stage {
        self.comparison = Comparison::from(&self.old, &self.new, first);
        Stage::Came
    }

    fn went(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Inode { ino, old, new } => {
                self.is_there = new.is_some();
                if old.is_some() && new.is_none() {
                    self.ready.push_back(Record::Gone { ino });
                }
            }
            Event::Item { key, old, new } if key.kind == kind::DIR_ENTRY && self.is_there => {
                let (old, new) = (entry(&self.old, key, old)?, entry(&self.new, key, new)?);
                if let Some(gone) = old.filter(|old| new.as_ref() != Some(old)) {
                    let (dir, ino) = (Ino(key.object), Ino(gone.ino));
                    self.ready.push_back(Record::Unname { dir, ino, name: gone.name });
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Looks at what comes next, and reads the data of it.
    fn look_ahead(&mut self) -> Result<()> {
        let mut batch = Batch::new(self.source);
        let mut items = 0;
        while !batch.is_full() && self.steps.len() < STEPS_MAX && items < ITEMS_MAX {
            if let Some((at, end)) = self.range {
                self.part(&mut batch, at, end)?;
                continue;
            }
            match self.comparison.next(self.source.nodes)? {
                Some(event) => {
                    self.came(event);
                    let last = self.steps.back();
                    items += usize::from(matches!(last, Some(Step::Event(Event::Item { .. }))));
                }
                None => break,
            }
        }
        self.parts = batch.finish()?.into_iter();
        Ok(())
    }

    fn came(&mut self, event: Event) {
        match event {
            Event::Inode { ino, ref new, .. } => {
                let size = |item: &InodeItem| if item.is_file() { item.size } else { 0 };
                self.size = new.as_deref().map_or(0, size);
                (self.ino, self.is_there) = (ino, new.is_some());
                self.steps.push_back(Step::Event(event));
            }
            Event::Item { .. } if self.is_there => self.steps.push_back(Step::Event(event)),
            Event::Data { start, end } if self.is_there && start < self.size => {
                let is_first = self.ino.0 == self.first.ino;
                // A receiver that came to the end of the file needs no more of it; else it came to
                // the beginning of a sector, whatever it says.
                let from = match self.first.offset {
                    offset if offset >= self.size => self.size,
                    offset => align_down(offset, SECTOR_BYTES),
                };
                let start = if is_first { start.max(from) } else { start };
                self.range = Some((start, end.min(self.size))).filter(|(start, end)| start < end);
            }
            _ => {}
        }
    }

    /// Looks at the beginning of a range.
    fn part(&mut self, batch: &mut Batch<'a>, at: u64, end: u64) -> Result<()> {
        let new = self.new;
        let file = File { source: self.source, tree: &new, ino: self.ino, size: self.size };
        let found = file.next_data(at, end)?.unwrap_or(end);
        if found > at {
            self.steps.push_back(Step::Zeros { start: at, end: found });
        }
        let mut stop = end.min((found / RECORD_BYTES + 1) * RECORD_BYTES);
        if found < stop {
            match self.shared.next(self.store, &file, found, stop)? {
                Next::Clone(place) => {
                    stop = found + place.bytes;
                    self.clone_of(found, place);
                }
                Next::Data(to) => {
                    stop = to;
                    let bytes = (to - found) as usize;
                    batch.add(&file, found, bytes)?;
                    self.steps.push_back(Step::Data { at: found, bytes });
                }
            }
        }
        self.range = Some((stop, end)).filter(|_| stop < end);
        if self.range.is_none() {
            self.steps.push_back(Step::RangeEnd);
        }
        Ok(())
    }

    /// What is in a place comes next, maybe as more of what came last.
    fn clone_of(&mut self, at: u64, place: Place) {
        if let Some(Step::Clone { at: start, place: last }) = self.steps.back_mut() {
            let follows = last.ino == place.ino
                && last.at + last.bytes == place.at
                && *start + last.bytes == at
                && last.bytes + place.bytes <= CLONE_BYTES_MAX;
            if follows {
                last.bytes += place.bytes;
                return;
            }
        }
        self.steps.push_back(Step::Clone { at, place });
    }

    fn carry_out(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Event(Event::Inode { ino, old, new }) => self.inode(ino, old.as_deref(), new),
            Step::Event(Event::Item { key, old, new }) => self.item(key, old, new)?,
            Step::Event(Event::Data { .. }) => {}
            Step::Data { at, bytes } => {
                let part = self.parts.next().expect("each step with data has its part");
                self.pieces(at, &part[..bytes])?;
            }
            Step::Zeros { start, end } => self.zeros(start, end),
            Step::Clone { at: offset, place: Place { ino: source, at: from, bytes } } => {
                self.finish_hole();
                self.ready.push_back(Record::Clone { offset, bytes, source, from });
            }
            Step::RangeEnd => self.finish_hole(),
        }
        Ok(())
    }

    fn inode(&mut self, ino: Ino, old: Option<&InodeItem>, new: Option<Box<InodeItem>>) {
        let Some(fields) = new else { return };
        self.is_fresh = old.is_none_or(|old| old.file_type() != fields.file_type());
        self.ready.push_back(Record::Inode { ino, fields });
    }

    fn item(&mut self, key: Key, old: Option<Value>, new: Option<Value>) -> Result<()> {
        match key.kind {
            kind::DIR_ENTRY => {
                let (old, new) = (entry(&self.old, key, old)?, entry(&self.new, key, new)?);
                if let Some(Entry { ino, file_type, name }) =
                    new.filter(|new| old.as_ref() != Some(new))
                {
                    self.ready.push_back(Record::Name { ino: Ino(ino), file_type, name });
                }
            }
            kind::SYMLINK => {
                if let Some(target) = new {
                    if target.len() > TARGET_BYTES_MAX {
                        let what = "target of a symbolic link too long";
                        return Err(Error::BadItem { what, tree: self.new.id, object: key.object });
                    }
                    self.ready.push_back(Record::Target { target: target.to_vec() });
                }
            }
            kind::XATTR => {
                let (a, b) =
                    (attributes((&self.old, &old), key)?, attributes((&self.new, &new), key)?);
                for gone in a.iter().filter(|a| b.iter().all(|b| b.name != a.name)) {
                    self.ready.push_back(Record::Unattribute { name: gone.name.clone() });
                }
                for came in b.into_iter().filter(|b| !a.contains(b)) {
                    let value = value_of(self.source, &self.new, key.object, &came)?;
                    self.ready.push_back(Record::Attribute { name: came.name, value });
                }
            }
            // A further name is told by its entry.
            _ => {}
        }
        Ok(())
    }

    /// Splits what was read into data and zeros.
    fn pieces(&mut self, at: u64, buf: &[u8]) -> Result<()> {
        let is_zero = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
        let sectors = buf.chunks(SECTOR_BYTES as usize);
        let (mut from, mut to) = (0, 0);
        for sector in sectors {
            if is_zero(sector) {
                self.data(at, buf, from, to)?;
                let start = at + to as u64;
                self.zeros(start, start + sector.len() as u64);
                from = to + sector.len();
            }
            to += sector.len();
        }
        self.data(at, buf, from, to)
    }

    fn data(&mut self, at: u64, buf: &[u8], from: usize, to: usize) -> Result<()> {
        if from < to {
            self.finish_hole();
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(to - from).map_err(|_| Error::Memory)?;
            bytes.extend_from_slice(&buf[from..to]);
            self.ready.push_back(Record::Data { offset: at + from as u64, bytes });
        }
        Ok(())
    }

    fn zeros(&mut self, start: u64, end: u64) {
        match &mut self.hole {
            Some(hole) if hole.1 == start => hole.1 = end,
            _ => {
                self.finish_hole();
                self.hole = Some((start, end));
            }
        }
    }

    fn finish_hole(&mut self) {
        if let Some((start, end)) = self.hole.take().filter(|_| !self.is_fresh) {
            self.ready.push_back(Record::Hole { offset: start, bytes: end - start });
        }
    }
}

fn entry(tree: &Tree, key: Key, value: Option<Value>) -> Result<Option<Entry>> {
    let decode = |value: Value| Entry::decode(&value).map_err(|b| b.in_item(tree.id, key.object));
    value.map(decode).transpose()
}
