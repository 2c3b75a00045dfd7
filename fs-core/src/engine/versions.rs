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

use crate::btree::{Edit, Tree, Walk};
use crate::engine::commit::Committer;
use crate::engine::nodes::GroupSink;
use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::features;
use crate::format::inode::{mode, InodeItem};
use crate::format::key::{kind, Key};
use crate::format::pool::{
    check_name, version, BookmarkItem, SubvolItem, FIRST_INO, NAME_BYTES_MAX, ROOT_INO,
};
use crate::space::Class;
use crate::subvol::store::Result;
use crate::subvol::versions::{Bookmark, Version, Versions};
use crate::subvol::Subvol;
use crate::sync::Mutex;
use crate::units::{TreeId, Txg};
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
    /// Makes a subvolume the one that is mounted unless another is asked for.
    SetDefault {
        /// Which.
        subvolume: u64,
    },
}

/// Operations that wait for the writer of a group.
pub(super) struct Request {
    /// Changes up to this group belong before it.
    after: Txg,
    ops: Vec<VersionOp>,
    /// Identities for what is made.
    ids: Vec<[u8; 16]>,
    done: Arc<Mutex<Option<Result<Vec<u64>>>>>,
}

/// Holds of one snapshot at most.
const HOLDS_MAX: usize = 16;
/// Nodes that an operation may write beyond those of the group anyway.
const NODES_PER_OP: u64 = 4;

impl Engine {
    /// Carries operations out, all at one moment, and returns when they are durable: the ids of
    /// what was made, zero for an operation that makes nothing. Each is judged by what there was
    /// before all of them.
    ///
    /// # Errors
    /// ENOENT, EEXIST, EBUSY for what is mounted, held or has something below it;
    /// [`Error::Argument`] for a name; [`Error::NoSpace`]; [`Error::Failed`]. Nothing is done then.
    pub fn change_versions(&self, ops: Vec<VersionOp>) -> Result<Vec<u64>> {
        self.store.writable()?;
        let nodes = NODES_PER_OP * (ops.len() as u64 + 1);
        let reservation = self.reserve(0, nodes * self.store.node_bytes as u64, Class::Admin)?;
        let shut = self.shut_for(&ops)?;
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
            let request = Request { after: handle.txg(), ops, ids, done: done.clone() };
            self.requests.lock().push(request);
            handle.txg()
        };
        let published = self.commit_upto(after);
        let outcome = done.lock().take();
        shut.iter().for_each(|subvol| subvol.reopen());
        published?;
        outcome.unwrap_or(Err(Error::Failed))
    }

    /// Keeps everybody out of what is to be deleted or rolled back.
    fn shut_for(&self, ops: &[VersionOp]) -> Result<Vec<Arc<Subvol>>> {
        let mut shut: Vec<Arc<Subvol>> = Vec::new();
        for op in ops {
            let id = match op {
                VersionOp::Delete { id } => Some(*id),
                VersionOp::Rollback { snapshot, .. } => {
                    self.versions.read().get(*snapshot).map(|version| version.item.owner)
                }
                _ => None,
            };
            let Some(subvol) = id.and_then(|id| self.subvol(TreeId(id))) else { continue };
            if !subvol.shut() {
                shut.iter().for_each(|subvol| subvol.reopen());
                return Err(Errno::Busy.into());
            }
            shut.push(subvol);
        }
        Ok(shut)
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
        let item = {
            let versions = self.versions.read();
            let version = versions.get(id).filter(|version| !version.item.is_deleted());
            version.ok_or(Error::Posix(Errno::NoEnt))?.item
        };
        if let Some(subvol) = open.get(&id).and_then(Weak::upgrade) {
            return Ok(subvol);
        }
        let txg = self.store.groups.published().max(Txg(item.txg));
        let subvol = Arc::new(Subvol::new(TreeId(id), item, txg, self.store.clone())?);
        open.retain(|_, weak| weak.strong_count() > 0);
        open.insert(id, Arc::downgrade(&subvol));
        Ok(subvol)
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
        let ready: Vec<Request> = {
            let mut waiting = self.requests.lock();
            let (ready, later) =
                core::mem::take(&mut *waiting).into_iter().partition(|r| r.after <= txg);
            *waiting = later;
            ready
        };
        for request in ready {
            let judged = self.judge(&request.ops).and_then(|()| self.activate(committer));
            let outcome = match judged {
                Ok(()) => Ok(self.carry_out_one(committer, sink, txg, &request)?),
                Err(error) => Err(error),
            };
            *request.done.lock() = Some(outcome);
        }
        Ok(())
    }

    /// Whether all of the operations can be carried out.
    fn judge(&self, ops: &[VersionOp]) -> Result<()> {
        let versions = self.versions.read();
        let mut going: BTreeSet<u64> = BTreeSet::new();
        for op in ops {
            if let VersionOp::Delete { id } = op {
                going.insert(*id);
            }
        }
        let mut names: BTreeSet<(u8, u64, &[u8])> = BTreeSet::new();
        for op in ops {
            let Some((sort, owner, name)) = self.judge_one(&versions, &going, op)? else {
                continue;
            };
            let taken = match sort {
                0 => versions.subvolume(name),
                1 => versions.snapshot(owner, name),
                _ => versions.bookmark_named(owner, name),
            };
            if taken.is_some() || !names.insert((sort, owner, name)) {
                return Err(Errno::Exist.into());
            }
        }
        Ok(())
    }

    /// Whether an operation can be carried out; the name that must not exist yet: of a subvolume
    /// (0), of a snapshot (1) or bookmark (2) of a subvolume.
    fn judge_one<'o>(
        &self,
        versions: &Versions,
        going: &BTreeSet<u64>,
        op: &'o VersionOp,
    ) -> Result<Option<(u8, u64, &'o [u8])>> {
        let there = |id: u64| {
            let version = versions.get(id).filter(|version| !version.item.is_deleted());
            version.ok_or(Error::Posix(Errno::NoEnt))
        };
        let snapshot = |id| match there(id)? {
            version if version.item.is_snapshot() => Ok(version),
            _ => Err(Error::Argument { what: "this is a subvolume, not a snapshot" }),
        };
        let subvolume = |id| match there(id)? {
            version if !version.item.is_snapshot() => Ok(version),
            _ => Err(Error::Argument { what: "this is a snapshot, not a subvolume" }),
        };
        Ok(match op {
            VersionOp::CreateSubvolume { name, .. } => {
                check_subvolume_name(name)?;
                Some((0, 0, name))
            }
            VersionOp::Snapshot { subvolume: id, name } => {
                check_part(name)?;
                subvolume(*id)?;
                Some((1, *id, name))
            }
            VersionOp::Clone { snapshot: id, name } => {
                check_subvolume_name(name)?;
                snapshot(*id)?;
                Some((0, 0, name))
            }
            VersionOp::Rollback { snapshot: id, keep } => {
                check_part(keep)?;
                let owner = snapshot(*id)?.item.owner;
                subvolume(owner)?;
                Some((1, owner, keep))
            }
            VersionOp::Rename { id, name } => {
                let version = there(*id)?;
                if version.item.is_snapshot() {
                    check_part(name)?;
                    return Ok(Some((1, version.item.owner, name)));
                }
                if version.name.is_empty() {
                    return Err(Error::Argument { what: "the root subvolume cannot be renamed" });
                }
                check_subvolume_name(name)?;
                let below = name.strip_prefix(version.name.as_slice());
                if below.is_some_and(|rest| rest.first() == Some(&b'/')) {
                    return Err(Error::Argument { what: "a subvolume cannot go below itself" });
                }
                for nested in versions.nested(*id) {
                    let more = versions.need(nested)?.name.len() - version.name.len();
                    if name.len() + more > NAME_BYTES_MAX {
                        return Err(Errno::NameTooLong.into());
                    }
                }
                Some((0, 0, name))
            }
            VersionOp::Delete { id } => {
                let version = there(*id)?;
                let is_needed = match version.item.is_snapshot() {
                    true => !version.holds.is_empty(),
                    false => {
                        *id == self.default_subvol.load(Ordering::Relaxed)
                            || *id == TreeId::FIRST_SUBVOL.0
                            || versions.snapshots(*id).iter().any(|id| !going.contains(id))
                            || versions.nested(*id).iter().any(|id| !going.contains(id))
                    }
                };
                if is_needed {
                    return Err(Errno::Busy.into());
                }
                None
            }
            VersionOp::Hold { snapshot: id, tag } => {
                check_part(tag)?;
                let version = snapshot(*id)?;
                if version.holds.contains(tag) {
                    return Err(Errno::Exist.into());
                }
                if version.holds.len() >= HOLDS_MAX {
                    return Err(Error::Argument { what: "a snapshot has at most 16 holds" });
                }
                None
            }
            VersionOp::Release { snapshot: id, tag } => {
                if !snapshot(*id)?.holds.contains(tag) {
                    return Err(Errno::NoEnt.into());
                }
                None
            }
            VersionOp::Bookmark { snapshot: id, name } => {
                check_part(name)?;
                Some((2, snapshot(*id)?.item.owner, name))
            }
            VersionOp::DeleteBookmark { id } => {
                versions.bookmark(*id).ok_or(Error::Posix(Errno::NoEnt))?;
                None
            }
            VersionOp::SetDefault { subvolume: id } => {
                subvolume(*id)?;
                None
            }
        })
    }

    fn carry_out_one(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
        request: &Request,
    ) -> Result<Vec<u64>> {
        let mut made = Vec::new();
        for (op, identity) in request.ops.iter().zip(&request.ids) {
            made.push(self.carry_out_op(committer, sink, txg, op, *identity)?);
        }
        Ok(made)
    }

    /// The first request of a pool: from now on bytes are counted. It reads the interior nodes of
    /// the trees there are.
    fn activate(&self, committer: &mut Committer) -> Result<()> {
        if committer.superblock.features[2] & features::VERSIONS != 0 {
            return Ok(());
        }
        for subvol in self.subvols() {
            let mut item = self.versions.read().need(subvol.id.0)?.item;
            let root =
                item.root(Txg(u64::MAX)).map_err(|bad| bad.in_item(TreeId::POOL, subvol.id.0))?;
            item.tree_bytes = self.tree_bytes(&Tree { id: item.lineage(subvol.id), root })?;
            item.own_bytes = item.referenced_bytes();
            self.versions.write().change(subvol.id.0, |there| *there = item)?;
        }
        committer.superblock.features[2] |= features::VERSIONS;
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

    fn carry_out_op(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
        op: &VersionOp,
        identity: [u8; 16],
    ) -> Result<u64> {
        let now = self.store.now().secs;
        match op {
            VersionOp::CreateSubvolume { name, mode, uid, gid } => {
                let id = new_id(committer);
                let root = self.root_item(txg, (*mode, *uid, *gid));
                let key = Key::new(ROOT_INO, kind::INODE, 0);
                let edit = Edit::Put(root.to_bytes().to_vec());
                sink.take_written_bytes();
                let tree = Tree::empty(TreeId(id)).apply(sink, &[(key, edit)])?;
                let bytes = sink.take_written_bytes();
                let mut item = SubvolItem::zeroed();
                (item.next_ino, item.inodes) = (FIRST_INO, 1);
                (item.birth, item.created, item.id) = (txg.0, now, identity);
                (item.tree_bytes, item.own_bytes) = (bytes, bytes);
                item.set_root(tree.root.as_ref());
                self.add_subvolume(id, item, name, txg)?;
                Ok(id)
            }
            VersionOp::Snapshot { subvolume, name } => {
                self.snapshot(committer, *subvolume, name, txg, identity)
            }
            VersionOp::Clone { snapshot, name } => {
                let id = new_id(committer);
                let from = self.versions.read().need(*snapshot)?.item;
                let mut item = going_on_from(&from, *snapshot, id);
                (item.birth, item.created, item.id) = (txg.0, now, identity);
                item.origin = from.id;
                self.add_subvolume(id, item, name, txg)?;
                Ok(id)
            }
            VersionOp::Rollback { snapshot, keep } => {
                let from = self.versions.read().need(*snapshot)?.item;
                let owner = from.owner;
                let kept = self.snapshot(committer, owner, keep, txg, identity)?;
                let old = self.versions.read().need(owner)?.item;
                let mut item = going_on_from(&from, *snapshot, kept);
                (item.birth, item.created, item.id) = (old.birth, old.created, old.id);
                item.origin = old.origin;
                // A number is never used again, so that a file handle never names another file.
                item.next_ino = item.next_ino.max(old.next_ino);
                self.versions.write().change(owner, |there| *there = item)?;
                self.turns.fetch_add(1, Ordering::AcqRel);
                self.load_subvolume(TreeId(owner), item, txg)?;
                Ok(kept)
            }
            VersionOp::Rename { id, name } => {
                let mut versions = self.versions.write();
                let version = versions.need(*id)?;
                let (old, is_snapshot) = (version.name.clone(), version.item.is_snapshot());
                let nested = if is_snapshot { Vec::new() } else { versions.nested(*id) };
                for nested in nested {
                    let mut full = name.clone();
                    full.extend_from_slice(&versions.need(nested)?.name[old.len()..]);
                    versions.rename(nested, &full)?;
                }
                versions.rename(*id, name)?;
                Ok(0)
            }
            VersionOp::Delete { id } => {
                self.versions.write().mark_deleted(*id)?;
                self.subvols.write().remove(&TreeId(*id));
                Ok(0)
            }
            VersionOp::Hold { snapshot, tag } => {
                let mut holds = self.versions.read().need(*snapshot)?.holds.clone();
                holds.push(tag.clone());
                self.versions.write().set_holds(*snapshot, holds)?;
                Ok(0)
            }
            VersionOp::Release { snapshot, tag } => {
                let mut holds = self.versions.read().need(*snapshot)?.holds.clone();
                holds.retain(|other| other != tag);
                self.versions.write().set_holds(*snapshot, holds)?;
                Ok(0)
            }
            VersionOp::Bookmark { snapshot, name } => {
                let id = new_id(committer);
                let from = self.versions.read().need(*snapshot)?.item;
                let item = BookmarkItem {
                    owner: from.owner,
                    txg: from.txg,
                    created: from.created,
                    id: from.id,
                    reserved: [0; 24],
                };
                self.versions.write().insert_bookmark(id, Bookmark { item, name: name.clone() });
                Ok(id)
            }
            VersionOp::DeleteBookmark { id } => {
                self.versions.write().remove_bookmark(*id);
                Ok(0)
            }
            VersionOp::SetDefault { subvolume } => {
                committer.superblock.default_subvol = *subvolume;
                self.default_subvol.store(*subvolume, Ordering::Relaxed);
                Ok(0)
            }
        }
    }

    /// The snapshot takes the subvolume's place between its parent and itself.
    fn snapshot(
        &self,
        committer: &mut Committer,
        subvolume: u64,
        name: &[u8],
        txg: Txg,
        identity: [u8; 16],
    ) -> Result<u64> {
        let id = new_id(committer);
        let mut versions = self.versions.write();
        let head = versions.need(subvolume)?.item;
        let mut item = head;
        item.flags |= version::SNAPSHOT;
        item.lineage = head.lineage(TreeId(subvolume)).0;
        item.dead_list = head.dead_list(subvolume);
        (item.owner, item.txg) = (subvolume, txg.0);
        (item.created, item.id) = (self.store.now().secs, identity);
        item.origin = head.id;
        versions.insert(id, Version { item, name: name.to_vec(), holds: Vec::new() });
        versions.change(subvolume, |head| {
            (head.parent, head.snapshot_txg, head.dead_list) = (id, txg.0, id);
            (head.own_bytes, head.dead_entries, head.dead_own_bytes) = (0, 0, 0);
        })?;
        Ok(id)
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

    fn add_subvolume(&self, id: u64, item: SubvolItem, name: &[u8], txg: Txg) -> Result<()> {
        let version = Version { item, name: name.to_vec(), holds: Vec::new() };
        self.versions.write().insert(id, version);
        self.load_subvolume(TreeId(id), item, txg)
    }

    /// A subvolume in memory, instead of any that was there.
    fn load_subvolume(&self, id: TreeId, item: SubvolItem, txg: Txg) -> Result<()> {
        let subvol = Arc::new(Subvol::new(id, item, txg, self.store.clone())?);
        self.subvols.write().insert(id, subvol.clone());
        // If that fails they stay until the pool is opened again.
        let _ = self.queue_orphans_of(&subvol);
        Ok(())
    }
}

/// A subvolume that goes on from a snapshot, with an empty dead list of that id.
fn going_on_from(from: &SubvolItem, snapshot: u64, dead_list: u64) -> SubvolItem {
    let mut item = *from;
    item.flags = 0;
    (item.owner, item.txg) = (0, 0);
    (item.parent, item.snapshot_txg) = (snapshot, from.txg);
    (item.dead_list, item.dead_entries, item.dead_own_bytes) = (dead_list, 0, 0);
    item.own_bytes = 0;
    item
}

fn new_id(committer: &mut Committer) -> u64 {
    let id = committer.superblock.next_subvol;
    committer.superblock.next_subvol += 1;
    id
}

fn check_subvolume_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NameTooLong.into());
    }
    check_name(name).map_err(|bad| Error::Argument { what: bad.0 })
}

/// Names of snapshots and bookmarks, and tags, have one part.
fn check_part(name: &[u8]) -> Result<()> {
    check_subvolume_name(name)?;
    if name.contains(&b'/') {
        return Err(Error::Argument { what: "the name of a snapshot has no / in it" });
    }
    Ok(())
}
