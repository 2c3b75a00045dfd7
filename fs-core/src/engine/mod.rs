//! The conductor: opening, the steps of a commit, log replay, closing. The only module that knows
//! all below it.
//!
//! | file | idea |
//! | --- | --- |
//! | `open`, `format` | from devices to an engine, and making a pool |
//! | `commit` | writing and publishing a group |
//! | `data` | bytes become extents |
//! | `nodes` | tree nodes of the group being written |
//! | `versions` | subvolumes, snapshots, clones, rollback |
//! | `destroy` | taking apart what was deleted |
//! | `dead` | dead lists |
//! | `references` | extra references of shared runs |
//! | `log`, `replay` | fsync, and what it is for |
//! | `reclaim` | removing files without names |
//! | `survey` | walking all that a pool names, in steps |
//! | `resilver` | bringing devices up to date |
//! | `devices` | changing the set of devices |
//! | `scrub` | verifying every copy of everything, and repairing |
//! | `past` | the groups before the newest: opening them, and what of them is left |
//!
//! Whoever waits for a group to be published does the work if nobody else is at it
//! ([`Engine::commit`]): there is no thread without which nothing moves, so a simulator without
//! threads runs the same code. In user space and in the kernel a timer calls [`Engine::tick`].

pub mod data;

mod commit;
mod dead;
mod destroy;
mod devices;
mod format;
mod log;
mod nodes;
mod open;
pub mod past;
mod reclaim;
pub mod references;
mod replay;
mod resilver;
mod scrub;
mod survey;
pub mod versions;

#[cfg(test)]
mod tests;

pub use devices::{ChangeWait, DeviceChangeStatus};
pub use format::{format, FormatOptions, FormatSummary};
pub use open::{open, OpenOptions};
pub use resilver::ResilverProgress;
pub use scrub::{ScrubEnd, ScrubStatus};

use crate::btree::Tree;
use crate::error::{Errno, Error, Incident};
use crate::format::chunk::ChunkKind;
use crate::format::ptr::BlockPtr;
use crate::format::superblock::Superblock;
use crate::space::{Class, Reservation, Trim};
use crate::subvol::room::KnownShape;
use crate::subvol::store::{DataSettings, Result, Store};
use crate::subvol::versions::Versions;
use crate::subvol::Subvol;
use crate::sync::rank::{self, Rank};
use crate::sync::{Mutex, RwLock};
use crate::units::{Ino, TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Roots of the pool's own trees as a group published them; the space tree's is in the store.
#[derive(Clone, Debug)]
pub struct Roots {
    /// Subvolumes and properties.
    pub pool: Tree,
    /// Chunk map.
    pub chunk: Tree,
    /// Shared references.
    pub refs: Tree,
    /// Dead lists.
    pub dead: Tree,
    /// The residue block.
    pub residue: Option<BlockPtr>,
}

/// Room in a pool, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// All there is.
    pub total: u64,
    /// What is free, including what only deletes may use.
    pub free: u64,
    /// What a writer can still store, before compression.
    pub available: u64,
}

/// A file of which something could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedFile {
    /// The subvolume or snapshot.
    pub tree: TreeId,
    /// The file.
    pub ino: Ino,
    /// Where it was then, with the subvolume or snapshot: `home/a`, `home@monday: a`.
    pub path: Vec<u8>,
}

/// Damaged files that are remembered at most.
const DAMAGED_FILES_MAX: usize = 1000;

/// An open pool.
pub struct Engine {
    /// What all subvolumes share.
    pub store: Arc<Store>,
    subvols: RwLock<BTreeMap<TreeId, Arc<Subvol>>>,
    /// Snapshots that somebody looks into.
    snapshots: RwLock<BTreeMap<u64, Weak<Subvol>>>,
    versions: RwLock<Versions>,
    default_subvol: AtomicU64,
    /// What waits to be carried out by the writer of a group.
    requests: Mutex<Vec<versions::Request>>,
    /// What was deleted and is damaged: not before the pool is opened again.
    stopped: Mutex<BTreeSet<u64>>,
    /// Uptime before which nothing is taken apart, because there was no room.
    destroy_after_ns: AtomicU64,
    /// References given up or moved by one group.
    deletion_refs: usize,
    /// Bytes given up by deletions.
    given_up: AtomicU64,
    committer: Mutex<commit::Committer>,
    log: log::Log,
    reclaim: Mutex<VecDeque<(TreeId, Ino)>>,
    /// Room that fallocate promised.
    promised: Mutex<Option<Reservation>>,
    /// Uptime at which the open group gets old.
    commit_due_ns: AtomicU64,
    commit_ns: u64,
    wanted: AtomicBool,
    closed: AtomicBool,
    /// Bytes of tree nodes in use by the published group.
    metadata_used: AtomicU64,
    /// Where it is, between two turns of whoever goes on with it.
    resilver: Mutex<Option<Box<resilver::Resilver>>>,
    /// Somebody goes on with it.
    resilvering: AtomicBool,
    /// How far it is.
    resilver_shown: Mutex<Option<ResilverProgress>>,
    /// The scrub that is under way, or how the last one ended.
    scrub: scrub::Scrub,
    /// What is being done to the set of devices.
    device_changes: devices::DeviceChanges,
    /// Files that were found damaged since the pool was opened.
    damaged: Mutex<BTreeMap<(TreeId, Ino), Vec<u8>>>,
    /// Counts rollbacks: each puts an older tree in a younger one's place.
    turns: AtomicU64,
    /// Whether there are, or were, snapshots.
    has_versions: AtomicBool,
    /// Whether somebody asked for some.
    awaits_versions: AtomicBool,
    /// How large the published pool tree is.
    pool_shape: KnownShape,
    /// The next commit takes a part of what was deleted along.
    destroys: AtomicBool,
}

/// Adds to what is held.
fn hold(held: &mut Option<Reservation>, more: Reservation) {
    match held.as_mut() {
        Some(all) => all.join(more),
        None => *held = Some(more),
    }
}

/// Nodes that two groups may add to small trees: a path each of every tree.
const ROOT_NODES: u64 = 32;

impl Engine {
    /// The subvolume that is mounted unless another is asked for.
    pub fn default_subvol(&self) -> Option<Arc<Subvol>> {
        self.subvol(TreeId(self.default_subvol.load(Ordering::Relaxed)))
    }

    /// A subvolume.
    pub fn subvol(&self, id: TreeId) -> Option<Arc<Subvol>> {
        self.subvols.read().get(&id).cloned()
    }

    /// All subvolumes.
    pub fn subvols(&self) -> Vec<Arc<Subvol>> {
        self.subvols.read().values().cloned().collect()
    }

    /// The roots of the pool's trees and the superblock that names them.
    pub fn published(&self) -> (Roots, Superblock) {
        let committer = self.committer();
        (committer.roots.clone(), Superblock::clone(&committer.superblock))
    }

    /// How new data is stored by default.
    pub fn settings(&self) -> DataSettings {
        self.store.settings()
    }

    /// Makes everything durable that happened before the call: waits for the commit of the open
    /// group, doing it if nobody else is.
    ///
    /// # Errors
    /// [`Error::Failed`] when the pool stopped publishing.
    pub fn commit(&self) -> Result<()> {
        let txg = self.store.groups.open();
        if !self.has_changes() && self.store.groups.published().next() == txg {
            return if self.store.has_failed() { Err(Error::Failed) } else { Ok(()) };
        }
        self.commit_upto(txg)
    }

    /// Returns when group `txg` is published.
    pub(crate) fn commit_upto(&self, txg: Txg) -> Result<()> {
        rank::may_wait_for(Rank::Committer);
        while self.store.groups.published() < txg {
            if self.store.has_failed() {
                return Err(Error::Failed);
            }
            match self.try_committer() {
                Some(mut committer) => {
                    if self.store.groups.published() < txg {
                        self.commit_group(&mut committer, false)?;
                    }
                }
                None => self.store.groups.wait_until(|| {
                    self.store.groups.published() >= txg
                        || self.store.has_failed()
                        || !self.committer.is_locked()
                }),
            }
        }
        Ok(())
    }

    /// Whether the open group, or the one being written, changed anything.
    pub fn has_changes(&self) -> bool {
        let groups = &self.store.groups;
        let (first, last) = (groups.published().next(), groups.open());
        let changed =
            |subvol: &Arc<Subvol>| (first.0..=last.0).any(|txg| subvol.changed_in(Txg(txg)));
        self.wanted.load(Ordering::Relaxed)
            || !self.requests.lock().is_empty()
            || self.subvols.read().values().any(changed)
    }

    /// Whether bytes of subvolumes and snapshots are counted: from the first change of them on.
    pub fn counts_versions(&self) -> bool {
        self.has_versions.load(Ordering::Relaxed)
    }

    /// Asks for a commit even if nothing seems to have changed, such as after a new name of the
    /// pool.
    pub fn want_commit(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Called every now and then: commits when the open group is old or much is dirty, removes
    /// files without names.
    pub fn tick(&self) {
        if self.store.writable().is_err() && (self.store.has_failed() || !self.has_changes()) {
            return;
        }
        self.reclaim_some();
        // What was deleted goes a part a group, as a large file does: the next waits for this one.
        let destroys = self.store.writable().is_ok() && self.has_to_destroy();
        if destroys {
            self.want_destroying();
            self.want_commit();
        }
        let waits =
            destroys || self.wanted.load(Ordering::Relaxed) && !self.reclaim.lock().is_empty();
        let now = self.store.platform.clock.uptime_ns();
        let due = self.commit_due_ns.load(Ordering::Relaxed);
        if now >= due || waits || self.store.dirty.over_soft() {
            self.commit_due_ns.store(now.saturating_add(self.commit_ns), Ordering::Relaxed);
            // An error was reported, and every later operation says so.
            let _ = self.commit();
        }
        self.release_late();
        // Chunks moved, or were not to after all, and somebody still looked there.
        self.store.pool.give_back_left();
    }

    /// Reserves room for an operation; commits, which makes freed space usable and turns estimates
    /// into facts, and removes files without names, before it gives up. Waits while too much is
    /// dirty. No lock may be held.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; those of [`Store::writable`]: nothing was accepted yet, so nothing of
    /// the operation is lost when the commit fails that would have made room.
    pub fn reserve(&self, data: u64, metadata: u64, class: Class) -> Result<Reservation> {
        match self.reserve_committing(data, metadata, class) {
            Err(Error::NoSpace) => {}
            other => return other,
        }
        self.reclaim_some();
        self.reserve_committing(data, metadata, class)
    }

    /// As [`Engine::reserve`], for the removal of files itself.
    fn reserve_committing(&self, data: u64, metadata: u64, class: Class) -> Result<Reservation> {
        rank::may_wait_for(Rank::Committer);
        self.store.writable()?;
        if self.store.dirty.over_hard() {
            self.commit().or_else(|error| self.store.writable().and(Err(error)))?;
        }
        let cap = || self.metadata_bound();
        match self.store.space.reserve_within(data, metadata, class, Some(&cap)) {
            Err(Error::NoSpace) => {}
            other => return other,
        }
        // What is kept for older groups goes first.
        self.release();
        for _ in 0..3 {
            match self.store.space.reserve_within(data, metadata, class, Some(&cap)) {
                Err(Error::NoSpace) => {}
                other => return other,
            }
            self.want_destroying();
            self.commit_upto(self.store.groups.open())
                .or_else(|error| self.store.writable().and(Err(error)))?;
            self.release();
        }
        self.store.space.reserve_within(data, metadata, class, Some(&cap))
    }

    /// What all unpublished groups can write of metadata at most, in bytes, but for what operations
    /// under way will add. There are two such groups. Each writes a node that exists at most once,
    /// and new nodes for what it adds; an item takes at most three times its bytes in nodes that
    /// have just been split, and what is added is dirty memory.
    fn metadata_bound(&self) -> u64 {
        let mut existing = self.metadata_used.load(Ordering::Relaxed);
        if self.counts_versions() || self.awaits_versions.load(Ordering::Relaxed) {
            // What is dropped and goes to a dead list had an item, which took more.
            existing = existing.saturating_mul(2);
        }
        let added = self.store.dirty.bytes().saturating_mul(3);
        let roots = ROOT_NODES * self.store.node_bytes as u64;
        existing.saturating_mul(2).saturating_add(added).saturating_add(roots)
    }

    /// Keeps an operation's reservation until the group it entered is published.
    pub fn keep(&self, txg: Txg, reservation: Reservation) {
        self.store.keep(txg, reservation);
    }

    /// Bytes that files have been promised, by the newest group that was written.
    fn promised_bytes(&self) -> u64 {
        let promised =
            |all: u64, subvol: &Arc<Subvol>| all.saturating_add(subvol.item().promised_bytes);
        self.subvols.read().values().fold(0, promised)
    }

    /// Takes over, of what the operations of a group reserved and did not spend, what that group
    /// promises to files. The rest is given back. Room that was promised is reserved at any moment:
    /// by the operation, then by its group, then here.
    fn take_over_promises(&self, reserved: Vec<Reservation>) {
        let total = self.promised_bytes();
        let mut promised = self.promised.lock();
        for mut part in reserved {
            let held = promised.as_ref().map_or(0, Reservation::data);
            let data = part.data().min(total.saturating_sub(held));
            if data > 0 {
                hold(&mut promised, part.split_data(data, Class::Admin));
            }
        }
    }

    /// Keeps as much room reserved as files have been promised by the published group, and no more.
    fn settle_promises(&self) {
        let total = self.promised_bytes();
        let mut promised = self.promised.lock();
        let held = promised.as_ref().map_or(0, Reservation::data);
        if held > total {
            if let Some(all) = promised.as_mut() {
                all.shrink(held - total, 0);
            }
        } else if let Ok(mut more) = self.store.space.reserve(total - held, 0, Class::Admin) {
            // When the pool was opened, or when a promise is being spent. Room that is kept for
            // older groups is not counted on, and there is plenty besides as long as any is.
            more.keep();
            hold(&mut promised, more);
        }
    }

    /// Takes `data` bytes out of what is reserved for promises, for a write into promised room.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when not so much is promised.
    pub fn spend_promise(&self, data: u64) -> Result<Reservation> {
        let mut promised = self.promised.lock();
        match promised.as_mut() {
            Some(all) if all.data() >= data => Ok(all.split(data, 0)),
            _ => Err(Error::NoSpace),
        }
    }

    /// What statfs shows: all room, what is free, and what a writer can still store, in bytes of
    /// file data, however many copies it has.
    pub fn room(&self) -> Room {
        let space = &self.store.space;
        let (usage, pool) = (space.usage(), &self.store.pool);
        let copies = |kind| pool.profile(kind).copies();
        let metadata = usage.metadata.chunk_bytes + usage.system.chunk_bytes;
        let others = metadata * copies(ChunkKind::Metadata) + usage.unallocated_bytes;
        let available = space.available_data();
        Room {
            total: usage.data.chunk_bytes + others / copies(ChunkKind::Data),
            free: available + usage.reserve_bytes / copies(ChunkKind::Data),
            available,
        }
    }

    /// Changes the name of the pool.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is too long, errors of the devices.
    pub fn set_name(&self, name: &[u8]) -> Result<()> {
        self.store.writable()?;
        self.store.pool.set_name(format::name_field(name)?)
    }

    /// Remembers a damaged file, unless too many are. Returns whether it is remembered only now.
    pub fn note_damaged(&self, file: DamagedFile) -> bool {
        let mut damaged = self.damaged.lock();
        let DamagedFile { tree, ino, path } = file;
        let has_room = damaged.len() < DAMAGED_FILES_MAX;
        if !has_room && !damaged.contains_key(&(tree, ino)) {
            return false;
        }
        damaged.insert((tree, ino), path).is_none()
    }

    /// Files that were found damaged since the pool was opened, or errors were cleared. There may
    /// be more, which nobody has read.
    pub fn damaged_files(&self) -> Vec<DamagedFile> {
        let damaged = self.damaged.lock();
        let file = |(&(tree, ino), path): (&(TreeId, Ino), &Vec<u8>)| DamagedFile {
            tree,
            ino,
            path: path.clone(),
        };
        damaged.iter().map(file).collect()
    }

    /// Counts errors of devices anew from zero, durably, and forgets which files were damaged.
    ///
    /// # Errors
    /// Those of [`Store::writable`]; [`Error::Failed`] when the commit fails.
    pub fn clear_errors(&self) -> Result<()> {
        self.store.writable()?;
        self.store.pool.clear_errors()?;
        self.damaged.lock().clear();
        self.want_commit();
        self.commit()
    }

    /// Tells the devices what they need not keep: what is free of their bytes `offset` to
    /// `offset + len`, counted one device after the other, in runs of at least `min_len` bytes.
    /// Returns how many bytes that were. What a nearly full pool has left is not looked at.
    ///
    /// # Errors
    /// EOPNOTSUPP when no device discards, EINVAL for an offset behind the last device; errors of
    /// the devices or the space tree; those of [`Store::writable`]; [`Error::Failed`] when the
    /// commit fails that it begins with.
    pub fn trim(&self, offset: u64, len: u64, min_len: u64) -> Result<u64> {
        self.store.writable()?;
        if !self.store.pool.discards() {
            return Err(Errno::OpNotSupp.into());
        }
        if offset >= self.store.pool.device_bytes() {
            return Err(Errno::Inval.into());
        }
        // What was deleted before the call is free after it, unless somebody still reads it.
        self.commit()?;
        self.release();
        let mut trim = Trim::new(offset..offset.saturating_add(len), min_len);
        loop {
            // A commit relies on the free space that it found; so none goes on meanwhile. Between
            // two pieces one may.
            let _no_commit = self.committer();
            self.store.writable()?;
            if !self.store.space.trim_piece(&mut trim, &*self.store)? {
                return Ok(trim.discarded());
            }
        }
    }

    /// Stops publishing for good and tells the administrator why.
    pub(crate) fn fail(&self, txg: Txg, error: &Error) {
        if self.store.fail() {
            let incident = Incident::WentReadOnly { txg, error: error.clone() };
            self.store.platform.report.incident(&incident);
        }
    }

    /// Calls `tick` about every `ms` milliseconds until it returns false. That does not keep the
    /// engine.
    fn every(self: &Arc<Engine>, ms: u64, tick: impl Fn(&Arc<Engine>) -> bool + Send + 'static) {
        let weak = Arc::downgrade(self);
        let tick = move || weak.upgrade().is_some_and(|engine| tick(&engine));
        self.store.platform.workers.every(ms, Box::new(tick));
    }

    /// Acts as if power had failed: nothing is written any more.
    pub fn shutdown(&self) {
        self.store.shut_down();
    }

    /// Drops what is cached and clean.
    pub fn drop_caches(&self) {
        for subvol in self.subvols() {
            subvol.table.drop_clean();
        }
        self.store.cache.clear();
    }

    /// Commits for the last time and marks the pool clean. Operations after it fail.
    ///
    /// # Errors
    /// [`Error::Failed`] when not everything could be made durable.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.scrub.wait_idle();
        self.device_changes.wait_idle();
        if self.scrub.is_unsaved() {
            self.want_commit();
        }
        if self.store.is_read_only() && !self.has_changes() {
            return Ok(());
        }
        for subvol in self.subvols() {
            for ino in subvol.table.let_all_go() {
                self.queue_reclaim(&subvol, ino);
            }
        }
        self.reclaim_all();
        self.commit()?;
        let result = self.commit_clean();
        self.store.set_read_only(true);
        result
    }
}
