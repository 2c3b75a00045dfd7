//! Receiving a stream: the other end of [`stream::send`](crate::stream::send).
//!
//! A snapshot is received in a subvolume of its own, the *working* one, which is hidden until all
//! is there:
//!
//! ```text
//! full          nothing --Receive--> DEST (hidden) --records--> DEST --Publish--> DEST@NAME
//! incremental   base ----Receive--> DEST/%receiving --records--> ... --Publish--> DEST@NAME
//! ```
//!
//! Records are carried out by inode number through the ordinary operations, in ordinary groups, so
//! what is received obeys the rules of everything else whatever the stream says. In the end the
//! content is computed from what was stored, and compared with the identity that the stream ends
//! with; only then one group makes it a snapshot. What is there before is a subvolume that nobody
//! can look into, and that gives all its space back when it is deleted.
//!
//! # Inodes between two names
//!
//! A stream takes names away before it gives others, and names inodes before it says what they are.
//! So while a subvolume is received
//!
//! - an inode without names is listed as one (ORPHAN), and keeps one link, or those of a directory,
//!   until the end: it may get a name again. At the end those that have none are removed; a
//!   directory must be empty then.
//! - an inode that has been named and not described has generation zero, which no other has. At the
//!   end there must be none.
//! - no directory has two names or comes to be below itself: each name of one is looked at.
//!
//! # Going on
//!
//! A RECEIVED item in the working subvolume says how far it has come: before the first inode is
//! described nothing, then the inode that is being described, and in a large one how much of its
//! data there is. It is written with or after what it speaks of, so it holds of every group that
//! all before it has been received. When a stream breaks off the working subvolume stays, and
//! another stream of the same snapshot goes on from there, beginning with that inode. To receive an
//! inode twice is to receive it once; names that go twice went the first time. The content is
//! computed from what is stored, so whatever went wrong on the way cannot become a snapshot that is
//! not what was sent.
//!
//! Memory: one record, whatever the stream says.

mod base;
mod names;

#[cfg(test)]
mod tests;

use crate::btree::Tree;
use crate::engine::versions::{Arrival, VersionOp};
use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::dir::FIRST_COOKIE;
use crate::format::inode::{mode, InodeItem};
use crate::format::key::{kind, Key};
use crate::format::pool::{NAME_BYTES_MAX, ROOT_INO};
use crate::format::{rule, BadBytes};
use crate::platform::{Result, Timestamp};
use crate::space::{Class, Reservation};
use crate::stream::content::Progress;
use crate::stream::record::{Begin, Mark, Record};
use crate::stream::verify::{Summary, Verifier};
use crate::stream::{Content, Identity, Source};
use crate::subvol::change::Change;
use crate::subvol::Subvol;
use crate::units::{Ino, TreeId};
use crate::vfs::{check_attribute, Caller, Fallocate, Filesystem, SetAttr, Volume, WriteFlags};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use base::Base;
pub use base::{content_after, content_of, is_untouched};

/// What the last part of a working subvolume's name is while an incremental stream is received.
pub const WORKING_NAME: &[u8] = b"%receiving";
/// Inodes without names that are looked at together.
const ORPHANS_AT_ONCE: usize = 512;
/// After so many bytes of one file it is noted how far that came.
const NOTE_EVERY: u64 = 16 << 20;
/// Where it says how far a subvolume has been received.
const POSITION: Key = Key { object: 0, kind: kind::RECEIVED, offset: 0 };
/// Who changes what is received. Nobody asks.
const NOBODY: Caller = Caller { uid: 0, gid: 0, umask: 0 };

/// Where a snapshot shall be received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// In a subvolume of that name, which does not exist. For full streams.
    New(Vec<u8>),
    /// In a subvolume that has the snapshot which the stream goes on from.
    Existing(u64),
    /// In a subvolume of that name, which does not exist and begins as a snapshot of another. For
    /// streams that go on from that.
    Clone {
        /// Its name.
        name: Vec<u8>,
        /// The subvolume that has the snapshot.
        of: u64,
    },
}

/// The inode that records are about.
struct Current {
    ino: Ino,
    fields: Box<InodeItem>,
    is_new: bool,
}

/// Receives a stream. After an error only [`Receiver::abort`] makes sense.
pub struct Receiver {
    engine: Arc<Engine>,
    volume: Arc<Volume>,
    /// The subvolume that the snapshot will be one of.
    into: u64,
    begin: Box<Begin>,
    base: Option<Base>,
    order: Verifier,
    current: Option<Current>,
    /// Inodes that were named and are yet to be described, and links without a target.
    unfinished: u64,
    /// What went may have gone already.
    went_before: bool,
    end: Option<(Identity, u64)>,
    /// Where the record under way begins.
    at: u64,
    /// How far the data of the inode under way has come.
    data_to: u64,
    /// And how far it had when that was noted.
    noted: u64,
}

impl Receiver {
    /// Begins to receive, or goes on. Unless the stream goes on, what is left of an earlier attempt
    /// at the same place is deleted. `progress` is called now and then if the content of the base
    /// is not known and has to be read; an error of it ends that.
    ///
    /// # Errors
    /// EEXIST when there is a subvolume at a new place, or a snapshot of that name;
    /// [`Error::Argument`] when the base is missing, or holds something else, or there is nothing
    /// to go on with; EBUSY when somebody receives at that place; those of
    /// [`Engine::change_versions`].
    pub fn begin(
        engine: &Arc<Engine>,
        destination: &Destination,
        begin: &Begin,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Receiver> {
        engine.store.writable()?;
        let (name, base) = match (destination, &begin.base) {
            (Destination::New(name), None) => (name.clone(), None),
            (Destination::Existing(id), Some(wanted)) => {
                let name = base::working_name(engine, *id)?;
                let taken = engine.with_versions(|versions| versions.snapshot(*id, &begin.name));
                if taken.is_some() {
                    return Err(Errno::Exist.into());
                }
                (name, Some(base::find(engine, *id, wanted, progress)?))
            }
            (Destination::Clone { name, of }, Some(wanted)) => {
                (name.clone(), Some(base::find(engine, *of, wanted, progress)?))
            }
            (Destination::New(_), Some(_)) => {
                let what = "the stream goes on from a snapshot: receive it where that is";
                return Err(Error::Argument { what });
            }
            (Destination::Existing(_) | Destination::Clone { .. }, None) => {
                return Err(Error::Argument { what: "a full stream makes a new subvolume" })
            }
        };
        let volume = match begin.resumes {
            Some(next) => {
                // What is left is looked at as it is stored.
                engine.commit()?;
                left(engine, &name, begin.id, next)?
            }
            None => {
                discard(engine, &name)?;
                let from = base.as_ref().map(|base| base.snapshot.id.0);
                let op = VersionOp::Receive { name, base: from, origin: begin.id };
                let made = engine.change_versions(alloc::vec![op])?;
                Volume::of_receiving(engine.clone(), made.first().copied().unwrap_or(0))?
            }
        };
        let working = volume.version();
        let unfinished = match begin.resumes {
            Some(_) => unfinished_in(volume.subvol(), base.as_ref())?,
            None => 0,
        };
        let into = match destination {
            Destination::New(_) | Destination::Clone { .. } => working,
            Destination::Existing(id) => *id,
        };
        let mut order = Verifier::of_order();
        order.take(&*engine.store.platform.codecs, &Record::Begin(Box::new(begin.clone())), 0)?;
        Ok(Receiver {
            engine: engine.clone(),
            volume,
            into,
            begin: Box::new(begin.clone()),
            base,
            order,
            current: None,
            unfinished,
            went_before: begin.resumes.is_some(),
            end: None,
            at: 0,
            data_to: 0,
            noted: 0,
        })
    }

    /// Takes the next record after *begin*, which is at byte `at` of the stream.
    ///
    /// # Errors
    /// [`Error::Stream`] when it cannot follow those before, or does not fit what is there; no
    /// room; errors of devices and trees.
    pub fn take(&mut self, record: Record, at: u64) -> Result<()> {
        self.at = at;
        self.order.take(&*self.engine.store.platform.codecs, &record, at)?;
        match record {
            // Of no interest to what is stored: whoever asked for it knows what to make of them.
            Record::Begin(_) | Record::Property { .. } => Ok(()),
            Record::Gone { ino } => self.gone(ino),
            Record::Unname { dir, ino, name } => self.unname(dir, ino, &name),
            Record::Inode { ino, fields } => self.inode(ino, fields),
            Record::Name { ino, file_type, name } => {
                let dir = self.current()?;
                self.name(dir, ino, file_type, &name)
            }
            Record::Target { target } => self.target(target),
            Record::Attribute { name, value } => self.attribute(&name, Some(&value)),
            Record::Unattribute { name } => self.attribute(&name, None),
            Record::Data { offset, bytes } => {
                let ino = self.current()?;
                self.volume.write(ino, offset, &bytes, WriteFlags::default())?;
                self.came_to(ino, offset + bytes.len() as u64)
            }
            Record::Hole { offset, bytes } => {
                let ino = self.current()?;
                self.volume.fallocate(ino, Fallocate::PunchHole, offset, bytes)?;
                self.came_to(ino, offset + bytes)
            }
            Record::Clone { offset, bytes, source, from } => {
                let ino = self.current()?;
                self.clone_range((source, from), (ino, offset), bytes)?;
                self.came_to(ino, offset + bytes)
            }
            Record::End { identity, elements } => {
                self.finish_inode()?;
                self.end = Some((identity, elements));
                self.holds(self.unfinished == 0, "a name of an inode that does not come")
            }
        }
    }

    /// The subvolume in which it is received.
    pub fn working(&self) -> u64 {
        self.volume.version()
    }

    /// What was received so far.
    pub fn summary(&self) -> &Summary {
        self.order.summary()
    }

    /// All records were taken: computes the content from what was stored. What comes of it is
    /// carried out by [`VersionOp::Publish`]. After an error nothing is left but what is being
    /// deleted.
    ///
    /// # Errors
    /// [`Error::Stream`] when the stream has not ended, or the content is not what it says; errors
    /// of devices and trees; those of `progress`.
    pub fn finish(
        mut self,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Box<Arrival>> {
        match self.verify(progress) {
            Ok(arrival) => Ok(arrival),
            Err(error) => {
                // That it could not be received is what has to be told.
                let _ = self.abort();
                Err(error)
            }
        }
    }

    /// Deletes what was received; its space comes free in the background.
    ///
    /// # Errors
    /// Those of [`Engine::change_versions`].
    pub fn abort(self) -> Result<()> {
        let id = self.volume.version();
        let Receiver { engine, volume, base, .. } = self;
        drop((volume, base));
        engine.change_versions(alloc::vec![VersionOp::Delete { id }]).map(|_| ())
    }

    #[inline(never)]
    fn verify(
        &mut self,
        progress: &mut dyn FnMut(&Progress) -> Result<()>,
    ) -> Result<Box<Arrival>> {
        let Some((identity, elements)) = self.end else {
            return Err(self.wrong("the stream is cut off"));
        };
        self.remove_nameless()?;
        self.forget_position()?;
        self.engine.commit()?;
        let content = self.stored(progress)?;
        let found = (content.identity(), content.elements());
        self.holds(found == (identity, elements), "what was received is not what was sent")?;
        Ok(self.arrival(identity, content.encode()))
    }

    /// The content of what was stored.
    #[inline(never)]
    fn stored(&self, progress: &mut dyn FnMut(&Progress) -> Result<()>) -> Result<Box<Content>> {
        let (view, source) = (self.subvol().view(), Source::of(&self.engine.store));
        let mut content = Box::new(match &self.base {
            Some(base) => base.content.clone(),
            None => Content::empty(),
        });
        let old = self.base.as_ref().map(|base| base.snapshot.view());
        let old = old.map_or(Tree::empty(view.tree.id), |old| old.tree);
        content.update(source, &old, &view.tree, progress)?;
        Ok(content)
    }

    #[inline(never)]
    fn arrival(&self, identity: Identity, sum: Vec<u8>) -> Box<Arrival> {
        Box::new(Arrival {
            working: self.volume.version(),
            into: self.into,
            name: self.begin.name.clone(),
            origin: self.begin.id,
            created: self.begin.created.secs,
            root: self.subvol().item().root,
            identity: identity.0,
            sum,
            choices: None,
        })
    }

    fn subvol(&self) -> &Arc<Subvol> {
        self.volume.subvol()
    }

    fn wrong(&self, what: &'static str) -> Error {
        Error::Stream { what, at: self.at }
    }

    fn holds(&self, holds: bool, what: &'static str) -> Result<()> {
        rule(holds, what).map_err(|BadBytes(what)| self.wrong(what))
    }

    fn current(&self) -> Result<Ino> {
        let current = self.current.as_ref().map(|current| current.ino);
        current.ok_or_else(|| self.wrong("a record without an inode"))
    }

    fn reserve(&self, items: u64) -> Result<Reservation> {
        self.volume.reserve(0, items, Class::Normal)
    }

    /// Shares what a file has with another.
    fn clone_range(&self, from: (Ino, u64), to: (Ino, u64), bytes: u64) -> Result<()> {
        let what = "a clone of what is not there";
        let mut done = 0;
        while done < bytes {
            let (at, left) = ((to.0, to.1 + done), bytes - done);
            let copied = match self.volume.copy_range(from.0, from.1 + done, at.0, at.1, left) {
                Err(Error::Posix(Errno::NoEnt | Errno::Inval | Errno::IsDir)) => 0,
                other => other?,
            };
            self.holds(copied > 0, what)?;
            done += copied;
        }
        Ok(())
    }

    /// Data of an inode is there up to an offset.
    fn came_to(&mut self, ino: Ino, offset: u64) -> Result<()> {
        self.data_to = offset;
        match offset - self.noted >= NOTE_EVERY {
            true => self.note(ino),
            false => Ok(()),
        }
    }

    #[inline(never)]
    fn note(&mut self, ino: Ino) -> Result<()> {
        let reservation = self.reserve(1)?;
        let mut change = Change::begin(self.subvol());
        let mark = Mark { ino: ino.0, offset: self.data_to };
        change.put(POSITION, mark.encode().to_vec());
        self.engine.keep(change.txg(), reservation);
        change.finish();
        self.noted = self.data_to;
        Ok(())
    }

    /// The stream broke off: what came of it stays, durable, for another that goes on.
    ///
    /// # Errors
    /// No room; errors of devices and trees.
    pub fn pause(mut self) -> Result<()> {
        if let Some(ino) = self.current.as_ref().map(|current| current.ino) {
            // Without room for it an earlier place is as good.
            let _ = self.note(ino);
        }
        self.engine.commit()
    }

    /// What was received is complete: how far it came is of no interest any more.
    #[inline(never)]
    fn forget_position(&self) -> Result<()> {
        let reservation = self.reserve(1)?;
        let mut change = Change::begin(self.subvol());
        change.delete(POSITION);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    /// An inode has these fields. Its flags come last: one may keep it from being changed.
    fn inode(&mut self, ino: Ino, fields: Box<InodeItem>) -> Result<()> {
        self.finish_inode()?;
        let there = self.there(ino, fields.file_type())?;
        let mut is_new = there.is_none();
        let reservation = self.reserve(7)?;
        let subvol = self.subvol().clone();
        let offset =
            self.begin.resumes.filter(|mark| mark.ino == ino.0).map_or(0, |mark| mark.offset);
        (self.data_to, self.noted) = (offset, offset);
        let position = Mark { ino: ino.0, offset }.encode().to_vec();
        match there {
            None => {
                self.holds(ino.0 != ROOT_INO, "the root is something else than a directory")?;
                let mut change = Change::begin(&subvol);
                let mut item = Box::new(first_item(fields.mode));
                item.generation = change.txg().0;
                self.set_fields(&mut item, &fields);
                change.put(Key::new(0, kind::ORPHAN, ino.0), Vec::new());
                change.put(POSITION, position);
                subvol.saw_ino(ino);
                self.unfinished += u64::from(is_unfinished(&item));
                subvol.new_inode(&mut change, ino, *item);
                self.engine.keep(change.txg(), reservation);
                change.finish();
            }
            Some(inode) => {
                let mut state = inode.state.write();
                let mut change = Change::begin(&subvol);
                let mut item = Box::new(state.item);
                change.put(POSITION, position);
                // One that has been described before, and was not finished, has no time yet.
                is_new = item.atime() == Timestamp::default();
                let was_unfinished = is_unfinished(&item);
                if item.generation == 0 {
                    item.generation = change.txg().0;
                }
                self.set_fields(&mut item, &fields);
                self.settle(was_unfinished, &item);
                change.log_inode(&inode, &mut state, *item);
                self.engine.keep(change.txg(), reservation);
                change.finish();
            }
        }
        let has_size = fields.is_file().then_some(fields.size);
        self.current = Some(Current { ino, fields, is_new });
        let Some(size) = has_size else { return Ok(()) };
        if subvol.inode(ino)?.state.read().item.size != size {
            let set = SetAttr { size: Some(size), ..SetAttr::default() };
            self.volume.setattr(ino, &set, &NOBODY)?;
        }
        Ok(())
    }

    /// Counts an inode that may be finished now.
    fn settle(&mut self, was_unfinished: bool, item: &InodeItem) {
        let now = self.unfinished + u64::from(is_unfinished(item));
        self.unfinished = now.saturating_sub(u64::from(was_unfinished));
    }

    /// The fields that do not stand in the way of what is yet to come.
    fn set_fields(&self, item: &mut InodeItem, fields: &InodeItem) {
        (item.mode, item.uid, item.gid) = (fields.mode, fields.uid, fields.gid);
        (item.flags, item.project, item.rdev) = (0, fields.project, fields.rdev);
    }

    /// All is said of the inode: its flags, and its times, which what was done to it has changed.
    fn finish_inode(&mut self) -> Result<()> {
        let Some(Current { ino, fields, is_new }) = self.current.take() else { return Ok(()) };
        let reservation = self.reserve(2)?;
        let subvol = self.subvol();
        if fields.file_type() == mode::SYMLINK {
            let target = subvol.get_item(&Key::new(ino.0, kind::SYMLINK, 0))?;
            self.holds(target.is_some(), "a symbolic link without a target")?;
        }
        let inode = subvol.inode(ino)?;
        let mut state = inode.state.write();
        let mut change = Change::begin(subvol);
        let mut item = Box::new(state.item);
        (item.mode, item.flags) = (fields.mode, fields.flags);
        item.set_mtime(fields.mtime());
        item.set_ctime(fields.ctime());
        item.set_btime(fields.btime());
        if is_new {
            item.set_atime(fields.mtime());
        }
        item.version = item.version.wrapping_add(1);
        change.log_inode(&inode, &mut state, *item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    fn target(&mut self, target: Vec<u8>) -> Result<()> {
        let ino = self.current()?;
        let reservation = self.reserve(4)?;
        let inode = self.subvol().inode(ino)?;
        let mut state = inode.state.write();
        let mut change = Change::begin(self.subvol());
        let mut item = Box::new(state.item);
        let was_unfinished = is_unfinished(&item);
        item.size = target.len() as u64;
        change.put(Key::new(ino.0, kind::SYMLINK, 0), target);
        change.log_inode(&inode, &mut state, *item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        drop(state);
        self.settle(was_unfinished, &item);
        Ok(())
    }

    fn attribute(&mut self, name: &[u8], value: Option<&[u8]>) -> Result<()> {
        let ino = self.current()?;
        let len = value.map_or(0, <[u8]>::len) as u64;
        let reservation = self.reserve(6 + len.div_ceil(8192))?;
        let inode = self.subvol().inode(ino)?;
        let mut state = inode.state.write();
        let mut item = Box::new(state.item);
        let fits = check_attribute(name, value, &item);
        self.holds(fits, "an attribute that the inode cannot have")?;
        let mut change = Change::begin(self.subvol());
        self.subvol().set_xattr(&mut change, ino, &mut item, name, value)?;
        change.log_inode(&inode, &mut state, *item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }
}

/// How far a subvolume has been received: all that comes before in a stream.
///
/// # Errors
/// ENOENT when it is not being received; errors of devices and trees.
pub fn position(engine: &Engine, id: u64) -> Result<Mark> {
    let subvol = engine.subvol(TreeId(id)).filter(|subvol| subvol.is_receiving());
    position_of(&*subvol.ok_or(Error::Posix(Errno::NoEnt))?)
}

fn position_of(subvol: &Subvol) -> Result<Mark> {
    match subvol.get_item(&POSITION)? {
        None => Ok(Mark::default()),
        Some(value) => Mark::decode(&value).map_err(|bad| bad.in_item(subvol.id, 0)),
    }
}

/// What is left of an earlier attempt to receive a snapshot, if that came as far as `next`.
fn left(engine: &Arc<Engine>, name: &[u8], origin: [u8; 16], next: Mark) -> Result<Arc<Volume>> {
    let id = engine.with_versions(|versions| {
        let is_it = |id: &u64| {
            versions.is_receiving(*id)
                && versions.get(*id).is_some_and(|version| version.item.origin == origin)
        };
        versions.subvolume(name).filter(is_it)
    });
    let what = "nothing was begun here that the stream could go on with: send all of it";
    let volume = Volume::of_receiving(engine.clone(), id.ok_or(Error::Argument { what })?)?;
    let position = position_of(volume.subvol())?;
    // What went before the first inode has not gone in a stream that begins behind.
    if next > position || (next.ino == 0) != (position.ino == 0) {
        let what = "the stream does not go on where receiving stopped: ask for the token again";
        return Err(Error::Argument { what });
    }
    Ok(volume)
}

/// Whether more has to come of an inode before the end: only names of it are known, or it is a
/// symbolic link that leads nowhere yet. Counted in what is stored, because the stream that began
/// an inode need not be the one that ends.
fn is_unfinished(item: &InodeItem) -> bool {
    item.generation == 0 || (item.file_type() == mode::SYMLINK && item.size == 0)
}

/// How many inodes of what is left are not finished.
fn unfinished_in(subvol: &Subvol, base: Option<&Base>) -> Result<u64> {
    let view = subvol.view();
    let old = base.map_or(Tree::empty(view.tree.id), |base| base.snapshot.view().tree);
    let mut differences = old.differences(&view.tree, Key::MIN);
    let mut count = 0;
    while let Some(found) = differences.next(&*subvol.store)? {
        let (Some(value), kind::INODE) = (found.new, found.key.kind) else { continue };
        let item = InodeItem::decode(&value);
        let item = item.map_err(|bad| bad.in_item(subvol.id, found.key.object))?;
        count += u64::from(is_unfinished(&item));
    }
    Ok(count)
}

/// Deletes what is left of an earlier attempt.
fn discard(engine: &Engine, name: &[u8]) -> Result<()> {
    let left = engine
        .with_versions(|versions| versions.subvolume(name).filter(|id| versions.is_receiving(*id)));
    let Some(id) = left else { return Ok(()) };
    engine.change_versions(alloc::vec![VersionOp::Delete { id }]).map(|_| ())
}

/// An inode of which only its type is known.
fn first_item(bits: u32) -> InodeItem {
    let mut item = InodeItem::zeroed();
    item.mode = bits & mode::TYPE;
    item.nlink = 1 + u32::from(item.is_dir());
    item.next_cookie = if item.is_dir() { FIRST_COOKIE } else { 1 };
    item
}
