//! Subvolumes: inodes, directories, extents, attributes, orphans, and what each group changed.
//!
//! What a reader sees is layered:
//!
//! ```text
//! overlay of the open group      overlays[open]
//! overlay of the group written   overlays[open - 1]
//! published tree                 view
//! ```
//!
//! and for inodes and ranges of files likewise ([`inode`], [`ranges`]). When a group is published
//! the view is swapped first and its overlay cleared after, so a reader that looks at overlays
//! first and takes the view last sees every change exactly once or twice with the same value, never
//! not at all.
//!
//! - Items of an inode (names in a directory, attributes) change under the inode's state lock.
//! - A [`View`] pins what it can reach: the space of replaced nodes and extents is reused only when
//!   no older view is held.
//!
//! | file | idea |
//! | --- | --- |
//! | `store` | what all subvolumes share |
//! | `overlay`, `scan` | changed items, and reading through the layers |
//! | `inode`, `table` | inodes in memory |
//! | `ranges`, `extents` | what files are made of; resolving a group's ranges into items |
//! | `room` | room in trees for what happens to extents |
//! | `names`, `xattrs` | directories and attributes |
//! | `intents` | the list the intent log is written from |
//! | `versions` | the subvolumes and snapshots there are |
//! | `change` | one operation's changes: overlay, inode lists, intents together |

pub mod change;
pub mod extents;
pub mod inode;
pub mod intents;
pub mod names;
pub mod overlay;
pub mod ranges;
pub mod room;
pub mod scan;
pub mod store;
pub mod table;
pub mod versions;
pub mod xattrs;

#[cfg(test)]
mod tests;

use crate::btree::Tree;
use crate::error::{Errno, Error};
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::pool::{Settings, SubvolItem, INO_MAX};
use crate::subvol::inode::{Inode, State, INODE_BYTES};
use crate::subvol::overlay::Overlay;
pub use crate::subvol::store::View;
use crate::subvol::store::{Result, Store};
use crate::subvol::table::Table;
use crate::sync::{Mutex, Rank, RwLock};
use crate::txg::{slot, SLOTS};
use crate::units::{Ino, TreeId, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

/// A subvolume in memory.
pub struct Subvol {
    /// Its id, which is its tree's.
    pub id: TreeId,
    /// What all subvolumes share.
    pub store: Arc<Store>,
    /// Inodes in memory.
    pub table: Table,
    overlays: [Overlay; SLOTS],
    overlay_bytes: [AtomicU64; SLOTS],
    dirty: [Mutex<Vec<Arc<Inode>>>; SLOTS],
    view: RwLock<Arc<View>>,
    /// The item as of the published group; root and counts are brought up to date by the writer.
    item: Mutex<SubvolItem>,
    next_ino: AtomicU64,
    /// Inodes made minus inodes removed since the item was written, per group.
    inode_delta: [AtomicI64; SLOTS],
    /// Whether it goes on from a snapshot, and entries of its dead list.
    has_parent: AtomicBool,
    dead_entries: AtomicU64,
    /// What its settings come to, with those above it.
    settings: AtomicU64,
    /// Whether it has limits.
    is_limited: AtomicBool,
    /// Whether it is being received.
    is_receiving: AtomicBool,
    /// Bytes that each unpublished group adds to what counts against the limits, at most.
    coming: [AtomicU64; SLOTS],
    /// Snapshots of it that were asked for: what is dropped after them is theirs.
    awaited: AtomicUsize,
    /// Held by renames between directories: the tree of directories changes only under it.
    pub moving: Mutex<()>,
    /// How many use it; [`SHUT`] when nobody may begin to.
    users: AtomicUsize,
    /// How many work in it for a moment, in the background.
    workers: AtomicUsize,
}

/// Value of `Subvol::users` when the subvolume is about to be deleted or rolled back.
const SHUT: usize = usize::MAX;

/// Being a user of a subvolume: as long as it lasts the subvolume is neither deleted nor rolled
/// back.
pub struct InUse(Arc<Subvol>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Working in a subvolume for a moment: who is to delete it or roll it back waits for the end.
pub struct AtWork(Arc<Subvol>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.workers.fetch_sub(1, Ordering::SeqCst);
        self.0.store.groups.notify();
    }
}

impl Subvol {
    /// A subvolume as published by group `txg`.
    ///
    /// # Errors
    /// [`Error::BadItem`] when the item's root is not a valid pointer.
    #[inline(never)]
    pub fn new(id: TreeId, item: SubvolItem, txg: Txg, store: Arc<Store>) -> Result<Subvol> {
        let root = item.root(txg).map_err(|bad| bad.in_item(TreeId::POOL, id.0))?;
        let tree = Tree { id: item.lineage(id), root };
        let is_receiving = item.is_receiving();
        Ok(Subvol {
            id,
            table: Table::new(store.inode_bytes),
            store,
            overlays: core::array::from_fn(|_| Overlay::default()),
            overlay_bytes: [const { AtomicU64::new(0) }; SLOTS],
            dirty: core::array::from_fn(|_| Mutex::ranked(Rank::Short, Vec::new())),
            view: RwLock::ranked(Rank::Leaf, Arc::new(View { txg, tree })),
            next_ino: AtomicU64::new(item.next_ino),
            has_parent: AtomicBool::new(item.parent != 0),
            dead_entries: AtomicU64::new(item.dead_entries),
            item: Mutex::ranked(Rank::Short, item),
            inode_delta: [const { AtomicI64::new(0) }; SLOTS],
            settings: AtomicU64::new(item.settings().pack()),
            is_limited: AtomicBool::new(item.has_limits()),
            is_receiving: AtomicBool::new(is_receiving),
            coming: [const { AtomicU64::new(0) }; SLOTS],
            awaited: AtomicUsize::new(0),
            moving: Mutex::ranked(Rank::Moving, ()),
            users: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
        })
    }

    /// Begins to use the subvolume.
    ///
    /// # Errors
    /// EBUSY when it is about to be deleted or rolled back.
    pub fn begin_use(self: &Arc<Subvol>) -> Result<InUse> {
        let more = |users: usize| (users != SHUT).then(|| users + 1);
        self.users
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .map_err(|_| Error::Posix(Errno::Busy))?;
        Ok(InUse(self.clone()))
    }

    /// Whether more than one use it.
    pub fn is_shared(&self) -> bool {
        self.users.load(Ordering::Acquire) > 1
    }

    /// Begins to work in the subvolume for a moment; `None` when it is about to be deleted or
    /// rolled back.
    pub fn begin_work(self: &Arc<Subvol>) -> Option<AtWork> {
        // First counted, then looked: who shuts it does that the other way round, so that one of
        // the two sees the other.
        self.workers.fetch_add(1, Ordering::SeqCst);
        let work = AtWork(self.clone());
        (self.users.load(Ordering::SeqCst) != SHUT).then_some(work)
    }

    /// Keeps everybody from using it from now on; false, and nothing changes, when somebody does.
    /// Waits for those who work in it for a moment. No lock may be held.
    pub fn shut(&self) -> bool {
        let shut = self.users.compare_exchange(0, SHUT, Ordering::SeqCst, Ordering::SeqCst);
        if shut.is_ok() {
            self.store.groups.wait_until(|| self.workers.load(Ordering::SeqCst) == 0);
        }
        shut.is_ok()
    }

    /// Takes [`Subvol::shut`] back.
    pub fn reopen(&self) {
        let _ = self.users.compare_exchange(SHUT, 0, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The published tree; holding it keeps what it reaches from being reused.
    pub fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }

    /// The item as of the newest published group.
    pub fn item(&self) -> SubvolItem {
        *self.item.lock()
    }

    /// What its settings come to, with those above it.
    pub fn settings(&self) -> Settings {
        Settings::unpack(self.settings.load(Ordering::Relaxed))
    }

    /// Its settings, or those above it, are others now.
    pub fn set_settings(&self, settings: Settings) {
        self.settings.store(settings.pack(), Ordering::Relaxed);
    }

    /// A new inode number.
    pub fn new_ino(&self) -> Result<Ino> {
        let next = |ino: u64| (ino <= INO_MAX).then_some(ino + 1);
        let ino = self.next_ino.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        ino.map(Ino).map_err(|_| Errno::NoSpc.into())
    }

    /// The next inode number that will be handed out.
    pub fn next_ino(&self) -> u64 {
        self.next_ino.load(Ordering::Relaxed)
    }

    /// Replay has seen this inode number: it must not be handed out again.
    pub fn saw_ino(&self, ino: Ino) {
        self.next_ino.fetch_max(ino.0.min(INO_MAX) + 1, Ordering::Relaxed);
    }

    /// The overlay of an unpublished group.
    pub fn overlay(&self, txg: Txg) -> &Overlay {
        &self.overlays[slot(txg)]
    }

    /// Number of inodes, unpublished changes included.
    pub fn inodes(&self) -> u64 {
        let delta: i64 = self.inode_delta.iter().map(|d| d.load(Ordering::Relaxed)).sum();
        self.item.lock().inodes.saturating_add_signed(delta)
    }

    /// Notes that group `txg` made (`1`) or removed (`-1`) an inode.
    pub fn count_inode(&self, txg: Txg, delta: i64) {
        self.inode_delta[slot(txg)].fetch_add(delta, Ordering::Relaxed);
    }

    /// Takes note that group `txg` adds data, so many bytes at most.
    pub fn note_data(&self, txg: Txg, bytes: u64) {
        if self.is_limited.load(Ordering::Relaxed) {
            self.coming[slot(txg)].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// How many bytes more its limits let it have, as far as is known before groups under way are
    /// published; `None` without limits.
    pub fn left(&self) -> Option<u64> {
        if !self.is_limited.load(Ordering::Relaxed) {
            return None;
        }
        let coming = self.coming.iter().map(|bytes| bytes.load(Ordering::Relaxed));
        let coming = coming.fold(0, |sum: u64, bytes| sum.saturating_add(bytes));
        self.item.lock().left().map(|left| left.saturating_sub(coming))
    }

    /// Puts an inode on the list of those group `txg` changed.
    pub fn list_dirty(&self, txg: Txg, inode: Arc<Inode>) {
        self.store.dirty.adjust(0, INODE_BYTES);
        self.dirty[slot(txg)].lock().push(inode);
    }

    /// The inodes that group `txg` changed; called by its writer.
    pub fn take_dirty(&self, txg: Txg) -> Vec<Arc<Inode>> {
        core::mem::take(&mut *self.dirty[slot(txg)].lock())
    }

    /// Whether group `txg` changed anything here.
    pub fn changed_in(&self, txg: Txg) -> bool {
        !self.dirty[slot(txg)].lock().is_empty() || !self.overlay(txg).is_empty()
    }

    /// Records a change of an item by group `txg`.
    pub fn set_item(&self, txg: Txg, key: Key, change: overlay::Change) {
        let grown = self.overlay(txg).set(key, change);
        self.overlay_bytes[slot(txg)].fetch_add(grown, Ordering::Relaxed);
        self.store.dirty.adjust(0, grown);
    }

    /// The item the writer of group `txg` stores: counts brought up to date, root as given.
    pub fn item_for(&self, txg: Txg, tree: &Tree, data: DataDelta) -> SubvolItem {
        let mut item = self.item.lock();
        let inodes = self.inode_delta[slot(txg)].swap(0, Ordering::Relaxed);
        item.inodes = item.inodes.saturating_add_signed(inodes);
        item.stored_bytes = item.stored_bytes.saturating_add_signed(data.stored);
        item.promised_bytes = item.promised_bytes.saturating_add_signed(data.promised);
        item.logical_bytes = item.logical_bytes.saturating_add_signed(data.logical);
        item.next_ino = self.next_ino();
        item.set_root(tree.root.as_ref());
        *item
    }

    /// The writer of a group changed the item: a snapshot was made, or one is gone.
    pub fn set_item_fields(&self, item: SubvolItem) {
        self.dead_entries.store(item.dead_entries, Ordering::Relaxed);
        self.has_parent.store(item.parent != 0, Ordering::Relaxed);
        self.is_limited.store(item.has_limits(), Ordering::Relaxed);
        self.is_receiving.store(item.is_receiving(), Ordering::Relaxed);
        *self.item.lock() = item;
    }

    /// Whether it is being received: only who receives it may look into it. The intent log has
    /// nothing of it, so after a crash it is as a group left it.
    pub fn is_receiving(&self) -> bool {
        self.is_receiving.load(Ordering::Relaxed)
    }

    /// Whether it goes on from a snapshot, or soon will, which has what is dropped here.
    pub fn has_parent(&self) -> bool {
        self.has_parent.load(Ordering::Relaxed) || self.awaited.load(Ordering::Relaxed) > 0
    }

    /// A snapshot of it is asked for: what operations drop that begin from now on may be what the
    /// snapshot has.
    pub fn await_snapshot(&self) {
        self.awaited.fetch_add(1, Ordering::Relaxed);
    }

    /// The snapshot is there, or will not come.
    pub fn end_await(&self) {
        self.awaited.fetch_sub(1, Ordering::Relaxed);
    }

    /// Group `txg` is published with this tree: readers see it from now on.
    pub fn published(&self, txg: Txg, tree: Tree) -> Arc<View> {
        let view = Arc::new(View { txg, tree });
        let old = core::mem::replace(&mut *self.view.write(), view);
        self.overlay(txg).clear();
        let freed = self.overlay_bytes[slot(txg)].swap(0, Ordering::Relaxed);
        self.store.dirty.adjust(freed, 0);
        self.coming[slot(txg)].store(0, Ordering::Relaxed);
        old
    }

    /// The inode with that number.
    ///
    /// # Errors
    /// ESTALE when there is none; errors of the device or the tree.
    pub fn inode(&self, ino: Ino) -> Result<Arc<Inode>> {
        loop {
            if let Some(inode) = self.table.get(ino) {
                return Ok(inode);
            }
            let view = self.view();
            let key = Key::new(ino.0, kind::INODE, 0);
            let value = view.tree.lookup(&*self.store, &key)?.ok_or(Error::Posix(Errno::Stale))?;
            if let Some(inode) = self.keep_inode(&view, ino, &value)? {
                return Ok(inode);
            }
        }
    }

    /// Puts an inode that was found in a tree in the table; `None` when the tree is out of date.
    // Not inlined: an inode is large, and looking it up goes deep.
    #[inline(never)]
    fn keep_inode(&self, view: &Arc<View>, ino: Ino, value: &[u8]) -> Result<Option<Arc<Inode>>> {
        let item = InodeItem::decode(value).map_err(|bad| bad.in_item(self.id, ino.0))?;
        // What we read is still true if nothing was published meanwhile: a change since would be
        // dirty, and so in the table.
        let current = || Arc::ptr_eq(view, &self.view.read());
        Ok(self.table.insert_if_absent(Inode::new(ino, State::clean(item)), current))
    }
}

/// By how much a group changed the sums of a subvolume's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataDelta {
    /// Bytes allocated on disk.
    pub stored: i64,
    /// Bytes promised.
    pub promised: i64,
    /// Bytes before compression.
    pub logical: i64,
}

impl DataDelta {
    /// Adds another delta.
    pub fn add(&mut self, other: DataDelta) {
        self.stored += other.stored;
        self.promised += other.promised;
        self.logical += other.logical;
    }
}
