//! Subvolumes, snapshots, clones and rollback: what is asked for, and how a group carries it out.
//!
//! A snapshot is the root of a subvolume's tree as a group leaves it. Whoever asks hands a request
//! to the writer of groups and waits; operations go on in the next group. The writer carries it out
//! when the subvolumes' trees of its group are written and before the pool tree is: so a snapshot
//! holds all that happened before it was asked for, all snapshots of one request show one moment,
//! and after a crash there is all of a request or nothing. The intent log needs to know nothing of
//! it: its records are for the subvolume, and those of published groups are not replayed.
//!
//! # Versions
//!
//! Subvolumes and snapshots are *versions*. A version goes on from its `parent`, a snapshot; a
//! subvolume's parent is its newest snapshot, or the one that it was cloned from or rolled back to.
//!
//! ```text
//! s1 <- s2 <- s3 <- home             snapshots of home, and home itself
//!         \-- work                   a clone of s2
//!
//! s1 <- s2 <- s3 <- before           after "rollback home to s2": what home was is kept
//!        |\-- work
//!         \-- home
//! ```
//!
//! # What belongs to whom
//!
//! Extents and nodes are *references* with a birth. Along a path of versions groups grow. With P
//! the parent of X:
//!
//! 1. A reference in X that was born not after P's group is in P too. What was born later is X's
//!    own: neither P nor what is before P has it.
//! 2. `dead(X)`, the dead list of X, holds exactly the references that P has and X has not.
//! 3. The reference tree counts each reference once, however many versions have it: for a run it
//!    holds the number of references in all versions together beyond the first.
//!
//! So a subvolume X that drops a reference looks at its birth. Its own is given up: one reference
//! less in the tree of references, or the space is free. Any other goes to `dead(X)`, and is
//! counted on. A new snapshot takes over the subvolume's place and its dead list, and the
//! subvolume, now without anything of its own, begins an empty one. That is all a snapshot costs.
//!
//! A reference is counted when it enters a tree, and taken from the count when the last version
//! lets go of it. Both add up in any order, so it makes no difference whether an extent was shared
//! before a snapshot or after it, and who lets go first. Within a group references are added before
//! any is taken away.
//!
//! Deleting is told in `destroy`.

#[cfg(test)]
mod tests;

use crate::btree::{Edit, Tree, Walk};
use crate::engine::commit::Committer;
use crate::engine::nodes::GroupSink;
use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::features;
use crate::format::inode::{mode, InodeItem};
use crate::format::key::{kind, Key};
use crate::format::pool::{
    check_name, check_user_name, check_user_value, encode_user, version, BookmarkItem, Settings,
    SubvolItem, UserProperties, FIRST_INO, NAME_BYTES_MAX, ROOT_INO, USER_BYTES_MAX,
};
use crate::format::space::Run;
use crate::space::{Class, Reservation};
use crate::subvol::store::Result;
use crate::subvol::versions::{Bookmark, Version, Versions};
use crate::subvol::Subvol;
use crate::sync::Mutex;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// Something to do with versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VersionOp {
    /// Makes an empty subvolume.
    CreateSubvolume {
        /// Its name.
        name: Vec<u8>,
        /// Permission bits of its root directory.
        mode: u32,
        /// Owner of its root directory.
        uid: u32,
        /// Group of its root directory.
        gid: u32,
    },
    /// Makes a snapshot of a subvolume.
    Snapshot {
        /// The subvolume.
        subvolume: u64,
        /// Name of the snapshot.
        name: Vec<u8>,
    },
    /// Makes a subvolume that begins as a snapshot.
    Clone {
        /// The snapshot.
        snapshot: u64,
        /// Name of the subvolume.
        name: Vec<u8>,
    },
    /// Makes a subvolume what a snapshot of it is. What it was is kept as another snapshot.
    Rollback {
        /// The snapshot.
        snapshot: u64,
        /// Name of the snapshot that keeps what the subvolume was.
        keep: Vec<u8>,
    },
    /// Makes a subvolume what a snapshot of it is, which came from elsewhere, unless its tree has
    /// another root by now. What it was goes.
    Follow {
        /// The snapshot.
        snapshot: u64,
        /// The root of the tree that the snapshot is to replace.
        root: [u8; 64],
    },
    /// Gives a subvolume or snapshot another name; subvolumes below it are renamed with it.
    Rename {
        /// Which.
        id: u64,
        /// Its new name.
        name: Vec<u8>,
    },
    /// Deletes a subvolume or snapshot.
    Delete {
        /// Which.
        id: u64,
    },
    /// Keeps a snapshot from being deleted.
    Hold {
        /// Which.
        snapshot: u64,
        /// Tells holds apart.
        tag: Vec<u8>,
    },
    /// Takes a hold back.
    Release {
        /// Which.
        snapshot: u64,
        /// Which hold.
        tag: Vec<u8>,
    },
    /// Keeps of a snapshot what is needed to send what came after it.
    Bookmark {
        /// The snapshot.
        snapshot: u64,
        /// Name of the bookmark.
        name: Vec<u8>,
    },
    /// Deletes a bookmark.
    DeleteBookmark {
        /// Which.
        id: u64,
    },
    /// Limits what a subvolume may refer to; 0 for any number of bytes. Nothing is lost when it has
    /// more already, but nothing can be added then. What operations under way at one time add, and
    /// the tree nodes of a group, may go beyond a limit.
    SetLimits {
        /// Which.
        subvolume: u64,
        /// Bytes of data and tree, one copy counted, shared with others or not.
        referenced: u64,
        /// Bytes of those that were born after its newest snapshot, or the one that it was cloned
        /// from or rolled back to.
        own: u64,
    },
    /// Begins to receive a snapshot, in a subvolume that nobody can look into until
    /// [`VersionOp::Publish`].
    Receive {
        /// Its name.
        name: Vec<u8>,
        /// The snapshot that it begins as; none for an empty one.
        base: Option<u64>,
        /// Identity of the snapshot that is received.
        origin: [u8; 16],
    },
    /// Makes what was received a snapshot.
    Publish(Arrival),
    /// Notes the content of a snapshot, so that it need not be read again to find that of a later
    /// one.
    KeepContent {
        /// The snapshot.
        snapshot: u64,
        /// Identity of its content.
        identity: [u8; 32],
        /// The sum that it follows from.
        sum: Vec<u8>,
    },
    /// Chooses settings of a subvolume, or gives a subvolume or snapshot properties of users. A
    /// snapshot keeps the choices that its subvolume had made, and a clone begins with them, but
    /// for being read-only; a rollback leaves a subvolume its own.
    SetProperties {
        /// Which.
        id: u64,
        /// What to change, one after the other.
        changes: Vec<PropertyChange>,
    },
    /// Makes a subvolume the one that is mounted unless another is asked for.
    SetDefault {
        /// Which.
        subvolume: u64,
    },
}

/// A snapshot that was received whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The subvolume in which it was received, which nobody uses unless it stays.
    pub working: u64,
    /// The subvolume of which it becomes a snapshot. When that is another, `working` is deleted.
    pub into: u64,
    /// Name of the snapshot.
    pub name: Vec<u8>,
    /// Identity of the snapshot that was sent.
    pub origin: [u8; 16],
    /// When that was taken, seconds since 1970.
    pub created: i64,
    /// The root of the tree of which content and identity are known.
    pub root: [u8; 64],
    /// Identity of its content.
    pub identity: [u8; 32],
    /// The sum that it follows from.
    pub sum: Vec<u8>,
    /// All that is chosen for the snapshot, and for the subvolume, if that is known.
    pub choices: Option<Vec<PropertyChange>>,
}

/// A change of a property. Numbers are those of [`SubvolItem`]; zero takes the choice away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PropertyChange {
    /// Compression of new data, and the level for it.
    Compression(u8, i8),
    /// Checksum of new data.
    Checksum(u8),
    /// Whether changes are refused. Operations that are under way are not.
    ReadOnly(u8),
    /// When reading changes access times.
    AccessTime(u8),
    /// A property of users with that name, or none any more.
    User(Vec<u8>, Option<Vec<u8>>),
}

impl PropertyChange {
    /// Makes the change.
    fn apply(&self, settings: &mut Settings, user: &mut UserProperties) -> Result<()> {
        match self {
            PropertyChange::Compression(kind, level) => {
                (settings.compression, settings.level) = (*kind, *level);
            }
            PropertyChange::Checksum(kind) => settings.checksum = *kind,
            PropertyChange::ReadOnly(number) => settings.read_only = *number,
            PropertyChange::AccessTime(number) => settings.access_time = *number,
            PropertyChange::User(name, None) => {
                user.remove(name);
            }
            PropertyChange::User(name, Some(value)) => {
                check_user_name(name).map_err(|bad| Error::Argument { what: bad.0 })?;
                check_user_value(value).map_err(|bad| Error::Argument { what: bad.0 })?;
                if value.len() > USER_BYTES_MAX {
                    return Err(Error::Argument { what: TOO_MUCH });
                }
                user.insert(name.clone(), value.clone());
            }
        }
        Ok(())
    }
}

const TOO_MUCH: &str = "names and values of the properties of users are 4096 bytes in all at most";

/// Operations that wait for the writer of a group.
pub(super) struct Request {
    /// Changes up to this group belong before it.
    after: Txg,
    ops: Vec<VersionOp>,
    /// Identities for what is made.
    ids: Vec<[u8; 16]>,
    /// Subvolumes that nobody uses any more.
    shut: Vec<u64>,
    /// Room for what files of new subvolumes were promised.
    promise: Option<Reservation>,
    done: Arc<Mutex<Option<Result<Vec<u64>>>>>,
}

/// A request whose outcome is awaited.
pub(super) struct Asked {
    after: Txg,
    shut: Vec<Arc<Subvol>>,
    /// Subvolumes of which snapshots are taken.
    awaited: Vec<Arc<Subvol>>,
    done: Arc<Mutex<Option<Result<Vec<u64>>>>>,
}

/// What a subvolume was before it followed a snapshot has this name, or one that begins so, until
/// the group is complete.
const FOLLOWED_NAME: &[u8] = b"%followed";
/// Holds of one snapshot at most.
const HOLDS_MAX: usize = 16;
/// Nodes that an operation may write beyond those of the group anyway.
const NODES_PER_OP: u64 = 4;

/// What a request comes to, besides what it makes of the versions.
struct Draft<'r> {
    request: &'r Request,
    txg: Txg,
    now: i64,
    /// The first id that it gives, and the next.
    first: u64,
    next: u64,
    default_subvol: u64,
    /// It sets limits.
    has_limits: bool,
    /// It receives something, or keeps a content.
    has_streams: bool,
    /// It sets properties.
    has_properties: bool,
    /// Settings of subvolumes come to something else.
    settles: bool,
    /// Subvolumes that begin, or begin anew, with their root directories if they have none yet.
    fresh: Vec<(u64, Option<InodeItem>)>,
    gone: Vec<u64>,
}

/// What becomes of subvolumes in memory when a group is published.
#[derive(Default)]
pub(super) struct Comings {
    /// They are there, instead of any that was there.
    pub fresh: BTreeSet<u64>,
    /// They are not any more.
    pub gone: BTreeSet<u64>,
    /// Room for what their files were promised.
    pub promises: Vec<Reservation>,
    /// What the settings of others come to has changed.
    pub settles: bool,
}

impl Engine {
    /// Carries operations out, all at one moment, and returns when they are durable: the ids of
    /// what was made, zero for an operation that makes nothing. Each is judged by what those before
    /// it have done; but none may name what another of them makes.
    ///
    /// # Errors
    /// ENOENT, EEXIST, EBUSY for what is mounted, held or has something below it;
    /// [`Error::Argument`] for a name; [`Error::NoSpace`]; [`Error::Failed`]. Nothing is done then.
    pub fn change_versions(&self, ops: Vec<VersionOp>) -> Result<Vec<u64>> {
        let asked = self.ask(ops)?;
        self.answer(asked)
    }

    /// Asks for operations to be carried out with the open group.
    pub(super) fn ask(&self, ops: Vec<VersionOp>) -> Result<Asked> {
        self.store.writable()?;
        let shut = self.shut_for(&ops)?;
        let (reservation, promise) = match self.room_for(&ops, &shut) {
            Ok(room) => room,
            Err(error) => {
                self.reopen(&shut);
                return Err(error);
            }
        };
        // Before any operation can be of a group that comes after: what those drop is counted.
        self.awaits_versions.store(true, Ordering::Relaxed);
        let awaited = self.taken_of(&ops);
        awaited.iter().for_each(|subvol| subvol.await_snapshot());
        let done = Arc::new(Mutex::new(None));
        let ids = ops.iter().map(|_| {
            let mut id = [0; 16];
            self.store.platform.entropy.fill(&mut id);
            id
        });
        let ids = ids.collect();
        let after = {
            let handle = self.store.groups.enter();
            self.store.keep(handle.txg(), reservation);
            let request = Request {
                after: handle.txg(),
                ops,
                ids,
                shut: shut.iter().map(|subvol| subvol.id.0).collect(),
                promise,
                done: done.clone(),
            };
            self.requests.lock().push(request);
            handle.txg()
        };
        Ok(Asked { after, shut, awaited, done })
    }

    /// Room for what operations write, and for what they promise. Nobody uses what is in `shut`.
    #[inline(never)]
    fn room_for(
        &self,
        ops: &[VersionOp],
        shut: &[Arc<Subvol>],
    ) -> Result<(Reservation, Option<Reservation>)> {
        let items = self.touched_by(ops);
        let value = SubvolItem::BYTES + NAME_BYTES_MAX + USER_BYTES_MAX;
        let values = items.saturating_mul(value as u64);
        let nodes = NODES_PER_OP * (ops.len() as u64 + 1)
            + self.pool_shape.get().apply_bound(items, values, self.store.node_bytes);
        let reservation = self.reserve(0, nodes * self.store.node_bytes as u64, Class::Admin)?;
        // What is promised by groups that are not published is not in the items yet.
        let is_changed = |subvol: &Arc<Subvol>| {
            let (first, last) = (self.store.groups.published().next(), self.store.groups.open());
            (first.0..=last.0).any(|txg| subvol.changed_in(Txg(txg)))
        };
        if shut.iter().any(is_changed) {
            self.commit_upto(self.store.groups.open())?;
        }
        let promise = match self.promised_by(ops) {
            0 => None,
            promised => Some(self.reserve(promised, 0, Class::Normal)?),
        };
        Ok((reservation, promise))
    }

    /// The subvolumes that snapshots are taken of.
    fn taken_of(&self, ops: &[VersionOp]) -> Vec<Arc<Subvol>> {
        let subvol = |op: &VersionOp| match op {
            VersionOp::Snapshot { subvolume, .. } => self.subvol(TreeId(*subvolume)),
            VersionOp::Publish(arrival) => self.subvol(TreeId(arrival.working)),
            _ => None,
        };
        ops.iter().filter_map(subvol).collect()
    }

    /// Waits for what was asked for.
    pub(super) fn answer(&self, asked: Asked) -> Result<Vec<u64>> {
        let Asked { after, shut, awaited, done } = asked;
        let published = self.commit_upto(after);
        awaited.iter().for_each(|subvol| subvol.end_await());
        let outcome = done.lock().take();
        if published.is_err() || !matches!(outcome, Some(Ok(_))) {
            self.reopen(&shut);
        }
        published?;
        outcome.unwrap_or(Err(Error::Failed))
    }

    /// How many versions and bookmarks are renamed or go with those that operations name.
    fn touched_by(&self, ops: &[VersionOp]) -> u64 {
        let versions = self.versions.read();
        let count = |op: &VersionOp| match op {
            VersionOp::Rename { id, .. } => versions.nested(*id).len() as u64,
            VersionOp::Delete { id } => versions.bookmarks_of(*id).len() as u64,
            _ => 0,
        };
        ops.iter().map(count).sum()
    }

    /// Bytes promised to files of what operations make, beyond what is promised already.
    fn promised_by(&self, ops: &[VersionOp]) -> u64 {
        let versions = self.versions.read();
        let promised = |id| versions.get(id).map_or(0, |version| version.item.promised_bytes);
        let more = |op: &VersionOp| match op {
            VersionOp::Clone { snapshot, .. } => promised(*snapshot),
            VersionOp::Receive { base: Some(base), .. } => promised(*base),
            VersionOp::Rollback { snapshot, .. } | VersionOp::Follow { snapshot, .. } => {
                let owner = versions.get(*snapshot).map_or(0, |version| version.item.owner);
                promised(*snapshot).saturating_sub(promised(owner))
            }
            _ => 0,
        };
        ops.iter().fold(0, |sum: u64, op| sum.saturating_add(more(op)))
    }

    /// Keeps everybody out of what is to be deleted or rolled back.
    fn shut_for(&self, ops: &[VersionOp]) -> Result<Vec<Arc<Subvol>>> {
        let mut shut: Vec<Arc<Subvol>> = Vec::new();
        for op in ops {
            let id = match op {
                VersionOp::Delete { id } => Some(*id),
                VersionOp::Rollback { snapshot, .. } | VersionOp::Follow { snapshot, .. } => {
                    self.versions.read().get(*snapshot).map(|version| version.item.owner)
                }
                VersionOp::Publish(arrival) => arrival.ends(),
                _ => None,
            };
            let Some(subvol) = id.and_then(|id| self.subvol(TreeId(id))) else { continue };
            if shut.iter().any(|other| other.id == subvol.id) {
                continue;
            }
            if !subvol.shut() {
                self.reopen(&shut);
                return Err(Errno::Busy.into());
            }
            shut.push(subvol);
        }
        Ok(shut)
    }

    /// Nothing comes of it: they can be used again. Who was told to wait comes back.
    fn reopen(&self, shut: &[Arc<Subvol>]) {
        for subvol in shut {
            subvol.reopen();
            // If that fails they stay until the pool is opened again.
            let _ = self.queue_orphans_of(subvol);
        }
    }

    /// The sum of a snapshot's content, if it is kept.
    ///
    /// # Errors
    /// Errors of the device or the pool tree.
    pub fn kept_content(&self, id: u64) -> Result<Option<Vec<u8>>> {
        // Under it, so that what is read is not reused.
        let committer = self.committer();
        let (is_kept, unwritten) = self.with_versions(|versions| {
            let is_kept = versions.get(id).is_some_and(|v| v.item.content != [0; 32]);
            (is_kept, versions.unwritten_content(id).cloned())
        });
        if !is_kept || unwritten.is_some() {
            return Ok(unwritten);
        }
        let key = Key::new(id, kind::CONTENT, 0);
        let value = committer.roots.pool.lookup(&*self.store, &key)?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// Looks at the versions there are.
    pub fn with_versions<T>(&self, look: impl FnOnce(&Versions) -> T) -> T {
        look(&self.versions.read())
    }

    /// A snapshot or subvolume to read or mount: a snapshot never changes. As long as it is held,
    /// a snapshot that is deleted is kept.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn open_version(&self, id: u64) -> Result<Arc<Subvol>> {
        if let Some(subvol) = self.subvol(TreeId(id)) {
            return Ok(subvol);
        }
        // Under both, so that a deletion that begins sees it held or keeps it from being opened.
        let mut open = self.snapshots.write();
        let published = self.store.groups.published();
        let item = {
            let versions = self.versions.read();
            let is_there = |version: &&Version| {
                let item = &version.item;
                item.is_snapshot() && !item.is_deleted() && Txg(item.txg) <= published
            };
            versions.get(id).filter(is_there).ok_or(Error::Posix(Errno::NoEnt))?.item
        };
        if let Some(subvol) = open.get(&id).and_then(Weak::upgrade) {
            return Ok(subvol);
        }
        let subvol = self.load_version(id, &item, published)?;
        open.retain(|_, weak| weak.strong_count() > 0);
        open.insert(id, Arc::downgrade(&subvol));
        Ok(subvol)
    }

    /// Apart from its caller, so that both fit on a kernel's stack.
    #[inline(never)]
    fn load_version(&self, id: u64, item: &SubvolItem, published: Txg) -> Result<Arc<Subvol>> {
        Ok(Arc::new(Subvol::new(TreeId(id), *item, published, self.store.clone())?))
    }

    /// The snapshots that somebody looks into.
    pub(super) fn open_snapshots(&self) -> BTreeSet<u64> {
        let open = self.snapshots.read();
        let held = open.iter().filter(|(_, weak)| weak.strong_count() > 0);
        // One by one: collecting into a set sorts, with much of it on the stack.
        let mut ids = BTreeSet::new();
        for (id, _) in held {
            ids.insert(*id);
        }
        ids
    }

    /// Carries out the requests that belong to group `txg`, whose subvolumes are written. `sink` is
    /// the group's.
    #[inline(never)]
    pub(super) fn carry_out(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
    ) -> Result<()> {
        let mut ready = Vec::new();
        {
            let mut waiting = self.requests.lock();
            let mut later = Vec::new();
            for request in waiting.drain(..) {
                match request.after <= txg {
                    true => ready.push(request),
                    false => later.push(request),
                }
            }
            *waiting = later;
        }
        for request in ready {
            let outcome = self.carry_out_request(committer, sink, txg, &request);
            let Request { promise, done, .. } = request;
            if outcome.is_ok() {
                committer.comings.promises.extend(promise);
            }
            *done.lock() = Some(outcome);
        }
        Ok(())
    }

    /// All of a request, or nothing.
    fn carry_out_request(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
        request: &Request,
    ) -> Result<Vec<u64>> {
        self.activate(committer)?;
        let mut draft = Draft {
            request,
            txg,
            now: self.store.now().secs,
            first: committer.superblock.next_subvol,
            next: committer.superblock.next_subvol,
            default_subvol: committer.superblock.default_subvol,
            has_limits: false,
            has_streams: false,
            has_properties: false,
            settles: false,
            fresh: Vec::new(),
            gone: Vec::new(),
        };
        self.versions.write().begin();
        let mut roots = Vec::new();
        let outcome = self.do_ops(&mut draft).and_then(|made| {
            self.write_roots(&draft, sink, &mut roots)?;
            self.versions.read().check_touched()?;
            Ok(made)
        });
        if outcome.is_err() {
            self.versions.write().undo();
            roots.into_iter().for_each(|run| self.store.space.free(run, txg));
            return outcome;
        }
        self.versions.write().keep();
        committer.superblock.next_subvol = draft.next;
        committer.superblock.default_subvol = draft.default_subvol;
        if draft.has_limits {
            committer.superblock.features[2] |= features::LIMITS;
        }
        if draft.has_streams {
            committer.superblock.features[2] |= features::STREAMS;
        }
        if draft.has_properties {
            committer.superblock.features[2] |= features::PROPERTIES;
        }
        let comings = &mut committer.comings;
        comings.settles |= draft.settles;
        for (id, _) in draft.fresh {
            comings.fresh.insert(id);
        }
        for id in draft.gone {
            comings.fresh.remove(&id);
            comings.gone.insert(id);
        }
        outcome
    }

    fn do_ops(&self, draft: &mut Draft<'_>) -> Result<Vec<u64>> {
        let request = draft.request;
        let mut made = Vec::with_capacity(request.ops.len());
        for (op, identity) in request.ops.iter().zip(&request.ids) {
            made.push(self.do_op(draft, op, *identity)?);
        }
        Ok(made)
    }

    #[inline(never)]
    fn do_op(&self, draft: &mut Draft<'_>, op: &VersionOp, identity: [u8; 16]) -> Result<u64> {
        self.check_shut(draft, op)?;
        let mut versions = self.versions.write();
        let versions = &mut *versions;
        match op {
            VersionOp::CreateSubvolume { name, mode, uid, gid } => {
                check_new_name(versions, name)?;
                let id = draft.new_id()?;
                let item = draft.first_item(identity);
                add(versions, id, item, name)?;
                let root = self.root_item(draft.txg, (*mode, *uid, *gid));
                draft.fresh.push((id, Some(root)));
                Ok(id)
            }
            VersionOp::Snapshot { subvolume: id, name } => {
                draft.subvolume(versions, *id)?;
                draft.snapshot(versions, (*id, *id), name, identity)
            }
            VersionOp::Clone { snapshot, name } => {
                check_new_name(versions, name)?;
                draft.clone(versions, *snapshot, name, identity)
            }
            VersionOp::Rollback { snapshot, keep } => {
                let owner = draft.snapshot_of(versions, *snapshot)?.item.owner;
                draft.roll_back(versions, (*snapshot, owner), keep, identity)
            }
            VersionOp::Follow { snapshot, root } => {
                let owner = draft.snapshot_of(versions, *snapshot)?.item.owner;
                if versions.need(owner)?.item.root != *root {
                    return Err(Errno::Busy.into());
                }
                let followed = (*snapshot, owner);
                let mut name = FOLLOWED_NAME.to_vec();
                while versions.snapshot(owner, &name).is_some() {
                    // Somebody calls a snapshot so.
                    name.push(b'%');
                }
                let kept = draft.roll_back(versions, followed, &name, identity)?;
                versions.mark_deleted(kept).map(|()| 0)
            }
            VersionOp::Rename { id, name } => {
                draft.settles = true;
                draft.rename(versions, *id, name).map(|()| 0)
            }
            VersionOp::Delete { id } => draft.delete(versions, *id).map(|()| 0),
            VersionOp::Hold { snapshot: id, tag } => {
                check_part(tag)?;
                let mut holds = draft.snapshot_of(versions, *id)?.holds.clone();
                if holds.contains(tag) {
                    return Err(Errno::Exist.into());
                }
                if holds.len() >= HOLDS_MAX {
                    return Err(Error::Argument { what: "a snapshot has at most 16 holds" });
                }
                holds.push(tag.clone());
                versions.set_holds(*id, holds).map(|()| 0)
            }
            VersionOp::Release { snapshot: id, tag } => {
                let mut holds = draft.snapshot_of(versions, *id)?.holds.clone();
                let at = holds.iter().position(|other| other == tag);
                holds.remove(at.ok_or(Error::Posix(Errno::NoEnt))?);
                versions.set_holds(*id, holds).map(|()| 0)
            }
            VersionOp::Bookmark { snapshot: id, name } => {
                check_part(name)?;
                let from = draft.snapshot_of(versions, *id)?.item;
                let item = BookmarkItem {
                    owner: from.owner,
                    txg: from.txg,
                    created: from.created,
                    id: from.id,
                    reserved: [0; 24],
                };
                let id = draft.new_id()?;
                versions.insert_bookmark(id, Bookmark { item, name: name.clone() })?;
                Ok(id)
            }
            VersionOp::DeleteBookmark { id } => {
                let is_older = *id < draft.first;
                let there = versions.bookmark(*id).filter(|_| is_older);
                there.ok_or(Error::Posix(Errno::NoEnt))?;
                versions.remove_bookmark(*id);
                Ok(0)
            }
            VersionOp::SetLimits { subvolume: id, referenced, own } => {
                draft.subvolume(versions, *id)?;
                draft.has_limits |= (*referenced, *own) != (0, 0);
                let limit = |item: &mut SubvolItem| {
                    (item.limit_referenced, item.limit_own) = (*referenced, *own);
                };
                versions.change(*id, limit).map(|()| 0)
            }
            VersionOp::Receive { name, base, origin } => {
                check_new_name(versions, name)?;
                draft.has_streams = true;
                let id = match base {
                    Some(base) => draft.clone(versions, *base, name, identity)?,
                    None => {
                        let id = draft.new_id()?;
                        add(versions, id, draft.first_item(identity), name)?;
                        let root = self.root_item(draft.txg, (0o755, 0, 0));
                        draft.fresh.push((id, Some(root)));
                        id
                    }
                };
                versions.change(id, |item| {
                    item.flags |= version::RECEIVING;
                    item.origin = *origin;
                })?;
                Ok(id)
            }
            VersionOp::Publish(arrival) => draft.publish(versions, arrival, identity),
            VersionOp::KeepContent { snapshot: id, identity, sum } => {
                draft.snapshot_of(versions, *id)?;
                draft.has_streams = true;
                versions.set_content(*id, *identity, sum.clone()).map(|()| 0)
            }
            VersionOp::SetProperties { id, changes } => {
                draft.set_properties(versions, *id, changes).map(|()| 0)
            }
            VersionOp::SetDefault { subvolume: id } => {
                draft.subvolume(versions, *id)?;
                draft.default_subvol = *id;
                Ok(0)
            }
        }
    }

    /// What is deleted or rolled back is not in use, nor can be before the group is published.
    fn check_shut(&self, draft: &Draft<'_>, op: &VersionOp) -> Result<()> {
        let id = match op {
            VersionOp::Delete { id } => *id,
            VersionOp::Rollback { snapshot, .. } | VersionOp::Follow { snapshot, .. } => {
                let versions = self.versions.read();
                versions.get(*snapshot).map_or(0, |version| version.item.owner)
            }
            VersionOp::Publish(arrival) => match arrival.ends() {
                Some(id) => id,
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        if self.subvol(TreeId(id)).is_some() && !draft.request.shut.contains(&id) {
            return Err(Errno::Busy.into());
        }
        Ok(())
    }

    /// Writes the trees of new subvolumes. Notes what they took in `runs`.
    #[inline(never)]
    fn write_roots(
        &self,
        draft: &Draft<'_>,
        sink: &GroupSink<'_>,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        for (id, root) in &draft.fresh {
            let Some(root) = root else { continue };
            let key = Key::new(ROOT_INO, kind::INODE, 0);
            let edit = Edit::Put(root.to_bytes().to_vec());
            sink.take_written_bytes();
            let tree = Tree::empty(TreeId(*id)).apply(sink, &[(key, edit)])?;
            let bytes = sink.take_written_bytes();
            runs.extend(tree.root.map(|ptr| Run { addr: ptr.addr, bytes: ptr.allocated() }));
            self.versions.write().change(*id, |item| {
                (item.tree_bytes, item.own_bytes) = (bytes, bytes);
                item.set_root(tree.root.as_ref());
            })?;
        }
        Ok(())
    }

    /// The first request of a pool: from now on bytes are counted. It reads the interior nodes of
    /// the trees there are.
    fn activate(&self, committer: &mut Committer) -> Result<()> {
        if committer.superblock.features[2] & features::VERSIONS != 0 {
            return Ok(());
        }
        for subvol in self.subvols() {
            let mut item = Box::new(self.versions.read().need(subvol.id.0)?.item);
            let root =
                item.root(Txg(u64::MAX)).map_err(|bad| bad.in_item(TreeId::POOL, subvol.id.0))?;
            item.tree_bytes = self.tree_bytes(&Tree { id: item.lineage(subvol.id), root })?;
            item.own_bytes = item.referenced_bytes();
            self.versions.write().change(subvol.id.0, |there| *there = *item)?;
        }
        committer.superblock.features[2] |= features::VERSIONS;
        self.has_versions.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn tree_bytes(&self, tree: &Tree) -> Result<u64> {
        let node_bytes = self.store.node_bytes as u64;
        let mut nodes = u64::from(tree.root.is_some());
        if tree.root.is_some_and(|root| root.level > 0) {
            tree.walk(&*self.store, &mut |visit| {
                let node = visit.node.map_err(Clone::clone)?;
                nodes += node.count() as u64;
                Ok(if node.level() > 1 { Walk::Down } else { Walk::Over })
            })?;
        }
        Ok(nodes * node_bytes)
    }

    fn root_item(&self, txg: Txg, (mode, uid, gid): (u32, u32, u32)) -> InodeItem {
        let now = self.store.now();
        let mut item = InodeItem::zeroed();
        item.mode = mode::DIRECTORY | (mode & mode::PERMISSIONS);
        (item.uid, item.gid) = (uid, gid);
        (item.nlink, item.generation) = (2, txg.0);
        item.next_cookie = crate::format::dir::FIRST_COOKIE;
        item.set_atime(now);
        item.set_mtime(now);
        item.set_ctime(now);
        item.set_btime(now);
        item
    }

    /// The subvolumes that a group brings, ready to be used when it is published.
    #[inline(never)]
    pub(super) fn fresh_subvolumes(&self, comings: &Comings, txg: Txg) -> Result<Vec<Arc<Subvol>>> {
        let mut fresh = Vec::with_capacity(comings.fresh.len());
        for id in &comings.fresh {
            let item = Box::new(self.versions.read().need(*id)?.item);
            fresh.push(self.load_version(*id, &item, txg)?);
        }
        Ok(fresh)
    }

    /// Tells all subvolumes, or only some, what their settings come to.
    fn settle_some(&self, subvols: &[Arc<Subvol>]) {
        let versions = self.versions.read();
        for subvol in subvols {
            subvol.set_settings(versions.settings(subvol.id.0));
        }
    }

    /// Tells all subvolumes what their settings come to.
    pub(super) fn settle_settings(&self) {
        self.settle_some(&self.subvols());
    }

    /// The group is published: its subvolumes can be used, and those that it deleted cannot.
    pub(super) fn swap_subvolumes(&self, comings: Comings, fresh: Vec<Arc<Subvol>>) {
        self.settle_some(&fresh);
        {
            let mut subvols = self.subvols.write();
            for id in comings.gone {
                subvols.remove(&TreeId(id));
            }
            for subvol in &fresh {
                if subvols.insert(subvol.id, subvol.clone()).is_some() {
                    // Rolled back.
                    self.turns.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        if comings.settles {
            self.settle_settings();
        }
        let mut promised = self.promised.lock();
        for promise in comings.promises {
            let mut promise = promise.as_admin();
            promise.keep();
            super::hold(&mut promised, promise);
        }
        drop(promised);
        for subvol in fresh {
            // If that fails they stay until the pool is opened again.
            let _ = self.queue_orphans_of(&subvol);
        }
    }
}

impl Draft<'_> {
    /// # Errors
    /// ENOSPC when all ids have been given.
    fn new_id(&mut self) -> Result<u64> {
        let id = self.next;
        self.next = id.checked_add(1).ok_or(Error::Posix(Errno::NoSpc))?;
        Ok(id)
    }

    /// What is there and was there before the request.
    fn there<'v>(&self, versions: &'v Versions, id: u64) -> Result<&'v Version> {
        let version = versions.get(id).filter(|version| !version.item.is_deleted());
        version.filter(|_| id < self.first).ok_or(Error::Posix(Errno::NoEnt))
    }

    fn snapshot_of<'v>(&self, versions: &'v Versions, id: u64) -> Result<&'v Version> {
        match self.there(versions, id)? {
            version if version.item.is_snapshot() => Ok(version),
            _ => Err(Error::Argument { what: "this is a subvolume, not a snapshot" }),
        }
    }

    fn subvolume<'v>(&self, versions: &'v Versions, id: u64) -> Result<&'v Version> {
        match self.there(versions, id)? {
            version if version.item.is_receiving() => Err(being_received()),
            version if !version.item.is_snapshot() => Ok(version),
            _ => Err(Error::Argument { what: "this is a snapshot, not a subvolume" }),
        }
    }

    fn first_item(&self, identity: [u8; 16]) -> Box<SubvolItem> {
        let mut item = Box::new(SubvolItem::zeroed());
        (item.next_ino, item.inodes) = (FIRST_INO, 1);
        (item.birth, item.created, item.id) = (self.txg.0, self.now, identity);
        item
    }

    #[inline(never)]
    fn set_properties(
        &mut self,
        versions: &mut Versions,
        id: u64,
        changes: &[PropertyChange],
    ) -> Result<()> {
        let version = self.there(versions, id)?;
        if version.item.is_receiving() {
            return Err(being_received());
        }
        let is_of_users = |change: &PropertyChange| matches!(change, PropertyChange::User(..));
        if version.item.is_snapshot() && !changes.iter().all(is_of_users) {
            let what = "of a snapshot, only properties of users can be set: MODULE:NAME";
            return Err(Error::Argument { what });
        }
        let chosen = (version.item.settings(), version.user.clone());
        self.choose(versions, id, chosen, changes)
    }

    /// Gives a version other choices than it has: those, with changes.
    #[inline(never)]
    fn choose(
        &mut self,
        versions: &mut Versions,
        id: u64,
        (mut settings, mut user): (Settings, UserProperties),
        changes: &[PropertyChange],
    ) -> Result<()> {
        changes.iter().try_for_each(|change| change.apply(&mut settings, &mut user))?;
        if encode_user(&user).len() > USER_BYTES_MAX {
            return Err(Error::Argument { what: TOO_MUCH });
        }
        self.has_properties |= settings != Settings::default() || !user.is_empty();
        self.settles |= settings != versions.need(id)?.item.settings();
        versions.change(id, |item| item.set_settings(settings))?;
        versions.set_user(id, user)
    }

    /// The snapshot takes the subvolume's place between its parent and itself. It becomes one of
    /// `owner`, as a rule the same subvolume.
    #[inline(never)]
    fn snapshot(
        &mut self,
        versions: &mut Versions,
        (subvolume, owner): (u64, u64),
        name: &[u8],
        identity: [u8; 16],
    ) -> Result<u64> {
        check_part(name)?;
        let id = self.new_id()?;
        let head = Box::new(versions.need(subvolume)?.item);
        let mut item = head.clone();
        item.flags = version::SNAPSHOT;
        (item.limit_referenced, item.limit_own) = (0, 0);
        item.lineage = head.lineage(TreeId(subvolume)).0;
        item.dead_list = head.dead_list(subvolume);
        (item.owner, item.txg) = (owner, self.txg.0);
        (item.created, item.id) = (self.now, identity);
        item.origin = head.id;
        let txg = self.txg.0;
        versions.change(subvolume, |head| {
            (head.parent, head.snapshot_txg, head.dead_list) = (id, txg, id);
            (head.own_bytes, head.dead_entries) = (0, 0);
            (head.dead_own_bytes, head.dead_own_from) = (0, 0);
        })?;
        add(versions, id, item, name)?;
        let user = versions.need(subvolume)?.user.clone();
        if !user.is_empty() {
            versions.set_user(id, user)?;
        }
        Ok(id)
    }

    #[inline(never)]
    fn clone(
        &mut self,
        versions: &mut Versions,
        snapshot: u64,
        name: &[u8],
        identity: [u8; 16],
    ) -> Result<u64> {
        let id = self.new_id()?;
        let version = self.snapshot_of(versions, snapshot)?;
        let (from, user) = (&version.item, version.user.clone());
        let mut item = going_on_from(from, snapshot, id);
        item.read_only = 0;
        (item.birth, item.created, item.id) = (self.txg.0, self.now, identity);
        item.origin = from.id;
        add(versions, id, item, name)?;
        if !user.is_empty() {
            versions.set_user(id, user)?;
        }
        self.fresh.push((id, None));
        // There may be some below it already.
        self.settles = true;
        Ok(id)
    }

    /// What was received is there from now on.
    #[inline(never)]
    fn publish(
        &mut self,
        versions: &mut Versions,
        arrival: &Arrival,
        identity: [u8; 16],
    ) -> Result<u64> {
        let Arrival { working, into, .. } = *arrival;
        let head = &self.there(versions, working)?.item;
        if !head.is_receiving() || head.root != arrival.root {
            // Not what was looked at.
            return Err(Errno::Busy.into());
        }
        if into != working {
            self.subvolume(versions, into)?;
        }
        versions.change(working, |item| item.flags &= !version::RECEIVING)?;
        if let Some(choices) = &arrival.choices {
            for id in [working, into] {
                self.choose(versions, id, Default::default(), choices)?;
            }
        }
        let id = self.snapshot(versions, (working, into), &arrival.name, identity)?;
        versions.change(id, |item| {
            (item.origin, item.created) = (arrival.origin, arrival.created);
        })?;
        versions.set_content(id, arrival.identity, arrival.sum.clone())?;
        self.has_streams = true;
        if into != working {
            self.gone.push(working);
            versions.mark_deleted(working)?;
        }
        Ok(id)
    }

    #[inline(never)]
    fn roll_back(
        &mut self,
        versions: &mut Versions,
        (snapshot, owner): (u64, u64),
        keep: &[u8],
        identity: [u8; 16],
    ) -> Result<u64> {
        self.subvolume(versions, owner)?;
        let kept = self.snapshot(versions, (owner, owner), keep, identity)?;
        let old = &versions.need(owner)?.item;
        let mut item = going_on_from(&versions.need(snapshot)?.item, snapshot, kept);
        (item.birth, item.created, item.id) = (old.birth, old.created, old.id);
        item.origin = old.origin;
        // A number is never used again, so that a file handle never names another file.
        item.next_ino = item.next_ino.max(old.next_ino);
        (item.limit_referenced, item.limit_own) = (old.limit_referenced, old.limit_own);
        item.set_settings(old.settings());
        versions.change(owner, |there| *there = *item)?;
        self.fresh.push((owner, None));
        Ok(kept)
    }

    fn rename(&mut self, versions: &mut Versions, id: u64, name: &[u8]) -> Result<()> {
        let version = self.there(versions, id)?;
        if version.item.is_snapshot() {
            check_part(name)?;
            return versions.rename(id, name);
        }
        if version.item.is_receiving() {
            return Err(being_received());
        }
        if version.name.is_empty() {
            return Err(Error::Argument { what: "the root subvolume cannot be renamed" });
        }
        check_new_name(versions, name)?;
        let old = version.name.clone();
        let below = name.strip_prefix(old.as_slice());
        if below.is_some_and(|rest| rest.first() == Some(&b'/')) {
            return Err(Error::Argument { what: "a subvolume cannot go below itself" });
        }
        for nested in versions.nested(id) {
            let mut full = name.to_vec();
            full.extend_from_slice(&versions.need(nested)?.name[old.len()..]);
            if full.len() > NAME_BYTES_MAX {
                return Err(Errno::NameTooLong.into());
            }
            versions.rename(nested, &full)?;
        }
        versions.rename(id, name)
    }

    fn delete(&mut self, versions: &mut Versions, id: u64) -> Result<()> {
        let version = self.there(versions, id)?;
        if version.item.is_snapshot() {
            return match version.holds.is_empty() {
                true => versions.mark_deleted(id),
                false => Err(Errno::Busy.into()),
            };
        }
        if id == self.default_subvol
            || id == TreeId::FIRST_SUBVOL.0
            || !versions.snapshots(id).is_empty()
            || !versions.nested(id).is_empty()
        {
            return Err(Errno::Busy.into());
        }
        for bookmark in versions.bookmarks_of(id) {
            versions.remove_bookmark(bookmark);
        }
        self.gone.push(id);
        versions.mark_deleted(id)
    }
}

fn add(versions: &mut Versions, id: u64, item: Box<SubvolItem>, name: &[u8]) -> Result<()> {
    versions.insert(id, Version::new(*item, name))
}

/// A subvolume that goes on from a snapshot, with an empty dead list of that id.
fn going_on_from(from: &SubvolItem, snapshot: u64, dead_list: u64) -> Box<SubvolItem> {
    let mut item = Box::new(*from);
    (item.flags, item.content) = (0, [0; 32]);
    (item.owner, item.txg) = (0, 0);
    (item.parent, item.snapshot_txg) = (snapshot, from.txg);
    (item.dead_list, item.dead_entries) = (dead_list, 0);
    (item.dead_own_bytes, item.dead_own_from) = (0, 0);
    item.own_bytes = 0;
    item
}

fn being_received() -> Error {
    Error::Argument { what: "this subvolume is being received" }
}

impl Arrival {
    /// The subvolume that is not there any more afterwards.
    fn ends(&self) -> Option<u64> {
        (self.working != self.into).then_some(self.working)
    }
}

fn check_subvolume_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NameTooLong.into());
    }
    check_name(name).map_err(|bad| Error::Argument { what: bad.0 })
}

/// The name of a subvolume that comes there. It is below none that is being received, which could
/// not be deleted then.
fn check_new_name(versions: &Versions, name: &[u8]) -> Result<()> {
    check_subvolume_name(name)?;
    let cuts = name.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let is_receiving =
        |above: &[u8]| versions.subvolume(above).is_some_and(|id| versions.is_receiving(id));
    match cuts.into_iter().any(|at| is_receiving(&name[..at])) {
        true => Err(being_received()),
        false => Ok(()),
    }
}

/// Names of snapshots and bookmarks, and tags, have one part.
fn check_part(name: &[u8]) -> Result<()> {
    check_subvolume_name(name)?;
    if name.contains(&b'/') {
        return Err(Error::Argument { what: "the name of a snapshot has no / in it" });
    }
    Ok(())
}
