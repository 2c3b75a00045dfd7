//! What every subvolume stands on: the pool, its space, cached nodes, and the group's loose ends.
//!
//! One [`Store`] a pool, shared by all subvolumes and by the engine. It reads nodes through the
//! cache and collects, per group, the runs that became garbage and the references that were added,
//! for the writer of the group to turn into edits of the reference and space trees.

use crate::btree::cache::NodeCache;
use crate::btree::{Node, NodeSource, Tree};
use crate::buf::Buf;
use crate::error::Error;
use crate::format::key::{kind, Key};
use crate::format::ptr::{BlockPtr, ChecksumKind, CompressionKind};
use crate::format::space::Run;
use crate::platform::{Platform, Timestamp};
use crate::pool::Pool;
use crate::space::{BitmapSource, Reservation, Space};
use crate::subvol::intents::Intents;
use crate::subvol::room::References;
use crate::sync::{Mutex, Rank, RwLock};
use crate::txg::{slot, Dirty, Groups, SLOTS};
use crate::units::{Logical, TreeId, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Shorthand.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// How new data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataSettings {
    /// Compression of new data.
    pub compression: CompressionKind,
    /// Its level.
    pub level: i32,
    /// Checksum of new data.
    pub checksum: ChecksumKind,
}

/// What one group owes to the trees of the pool.
#[derive(Default)]
pub struct GroupDebts {
    /// Runs that lost a reference.
    pub garbage: Vec<Run>,
    /// Runs that gained a reference beyond the first.
    pub shared: Vec<Run>,
}

/// The part of the cache that is for inodes; the rest is for tree nodes.
const INODE_SHARE: usize = 8;

/// What all subvolumes of a pool share.
pub struct Store {
    /// Time, threads, codecs.
    pub platform: Platform,
    /// Verified I/O.
    pub pool: Arc<Pool>,
    /// Allocation and reservations.
    pub space: Arc<Space>,
    /// Tree nodes in memory.
    pub cache: NodeCache,
    /// Transaction groups.
    pub groups: Groups,
    /// Memory held by changes.
    pub dirty: Dirty,
    /// Bytes of clean inodes that a subvolume keeps in memory.
    pub inode_bytes: usize,
    /// Changes in the order they happened, for the intent log.
    pub intents: Intents,
    /// Key of name hashes.
    pub hash_secret: [u8; 16],
    /// Bytes of a tree node.
    pub node_bytes: usize,
    space_view: RwLock<Arc<View>>,
    refs_view: RwLock<Arc<View>>,
    debts: [Mutex<GroupDebts>; SLOTS],
    /// Reservations of the operations of each group, one for each class.
    reserved: [Mutex<Vec<Reservation>>; SLOTS],
    /// Runs taken by each group that nothing was written to yet.
    spare: [Mutex<Vec<Run>>; SLOTS],
    settings: [AtomicU8; 3],
    /// Whether somebody reads leaves ahead of a scan.
    pub reading_ahead: AtomicBool,
    pub(super) references: References,
    failed: AtomicBool,
    shut_down: AtomicBool,
    read_only: AtomicBool,
}

/// A published tree that somebody reads. As long as it is held, nothing it reaches is reused.
pub struct View {
    /// Group that published it.
    pub txg: Txg,
    /// The tree.
    pub tree: Tree,
}

/// Parts of a new [`Store`].
pub struct StoreParts {
    /// Time, threads, codecs.
    pub platform: Platform,
    /// Verified I/O.
    pub pool: Arc<Pool>,
    /// Allocation.
    pub space: Arc<Space>,
    /// Newest published group.
    pub published: Txg,
    /// Key of name hashes.
    pub hash_secret: [u8; 16],
    /// Bytes of a tree node.
    pub node_bytes: usize,
    /// Published root of the space tree.
    pub space_tree: Tree,
    /// Published root of the tree of references.
    pub refs_tree: Tree,
    /// Bytes of nodes and inodes to keep in memory.
    pub cache_bytes: usize,
    /// Bytes of changes to hold in memory at most.
    pub dirty_bytes: u64,
    /// How new data is stored.
    pub settings: DataSettings,
    /// Whether changes are refused.
    pub read_only: bool,
}

impl Store {
    /// A store over those parts.
    pub fn new(parts: StoreParts) -> Store {
        let store = Store {
            platform: parts.platform,
            pool: parts.pool,
            space: parts.space,
            cache: NodeCache::new(parts.cache_bytes - parts.cache_bytes / INODE_SHARE),
            inode_bytes: parts.cache_bytes / INODE_SHARE,
            groups: Groups::new(parts.published),
            dirty: Dirty::new(parts.dirty_bytes),
            intents: Intents::new(parts.dirty_bytes),
            hash_secret: parts.hash_secret,
            node_bytes: parts.node_bytes,
            space_view: RwLock::ranked(
                Rank::Leaf,
                Arc::new(View { txg: parts.published, tree: parts.space_tree }),
            ),
            refs_view: RwLock::ranked(
                Rank::Leaf,
                Arc::new(View { txg: parts.published, tree: parts.refs_tree }),
            ),
            debts: core::array::from_fn(|_| Mutex::ranked(Rank::Short, GroupDebts::default())),
            reserved: core::array::from_fn(|_| Mutex::ranked(Rank::Short, Vec::new())),
            spare: core::array::from_fn(|_| Mutex::ranked(Rank::Short, Vec::new())),
            settings: [const { AtomicU8::new(0) }; 3],
            reading_ahead: AtomicBool::new(false),
            references: References::default(),
            failed: AtomicBool::new(false),
            shut_down: AtomicBool::new(false),
            read_only: AtomicBool::new(parts.read_only),
        };
        store.set_settings(parts.settings);
        store
    }

    /// The published space tree.
    pub fn space_view(&self) -> Arc<View> {
        self.space_view.read().clone()
    }

    /// Group `txg` is published with this space tree. Returns the view before.
    pub fn swap_space_view(&self, txg: Txg, tree: Tree) -> Arc<View> {
        core::mem::replace(&mut *self.space_view.write(), Arc::new(View { txg, tree }))
    }

    /// The published tree of references.
    pub fn refs_view(&self) -> Arc<View> {
        self.refs_view.read().clone()
    }

    /// Group `txg` is published with this tree of references. Returns the view before.
    pub fn swap_refs_view(&self, txg: Txg, tree: Tree) -> Arc<View> {
        core::mem::replace(&mut *self.refs_view.write(), Arc::new(View { txg, tree }))
    }

    /// How new data is stored, unless the subvolume or file says otherwise.
    pub fn settings(&self) -> DataSettings {
        let [compression, level, checksum] =
            [0, 1, 2].map(|i: usize| self.settings[i].load(Ordering::Relaxed));
        DataSettings {
            compression: CompressionKind::from_raw(compression).unwrap_or(CompressionKind::None),
            level: i32::from(level as i8),
            checksum: ChecksumKind::from_raw(checksum).unwrap_or(ChecksumKind::Crc32c),
        }
    }

    /// Changes how new data is stored.
    pub fn set_settings(&self, settings: DataSettings) {
        self.settings[0].store(settings.compression as u8, Ordering::Relaxed);
        self.settings[1].store(settings.level as i8 as u8, Ordering::Relaxed);
        self.settings[2].store(settings.checksum as u8, Ordering::Relaxed);
    }

    /// Wall time.
    pub fn now(&self) -> Timestamp {
        self.platform.clock.now()
    }

    /// Notes runs that lost a reference in group `txg`.
    pub fn add_garbage(&self, txg: Txg, mut runs: Vec<Run>) {
        if !runs.is_empty() {
            self.debts[slot(txg)].lock().garbage.append(&mut runs);
        }
    }

    /// Notes runs that gained a reference in group `txg`.
    pub fn add_shared(&self, txg: Txg, mut runs: Vec<Run>) {
        if !runs.is_empty() {
            self.debts[slot(txg)].lock().shared.append(&mut runs);
        }
    }

    /// What group `txg` owes; called by its writer, when nobody adds any more.
    pub fn take_debts(&self, txg: Txg) -> GroupDebts {
        core::mem::take(&mut *self.debts[slot(txg)].lock())
    }

    /// Keeps an operation's reservation until the group it entered is published. The operation has
    /// made its changes, or makes them before it leaves the group.
    pub fn keep(&self, txg: Txg, mut reservation: Reservation) {
        reservation.keep();
        let mut kept = self.reserved[slot(txg)].lock();
        match kept.iter_mut().find(|all| all.class() == reservation.class()) {
            Some(all) => all.join(reservation),
            None => kept.push(reservation),
        }
    }

    /// So many bytes of data and metadata of group `txg` have got their space: they need not be
    /// reserved any more.
    pub fn spend(&self, txg: Txg, mut data: u64, mut metadata: u64) {
        for all in self.reserved[slot(txg)].lock().iter_mut() {
            let part = (data.min(all.data()), metadata.min(all.metadata()));
            all.shrink(part.0, part.1);
            data -= part.0;
            metadata -= part.1;
        }
    }

    /// What the operations of group `txg` reserved and did not spend.
    pub fn take_reserved(&self, txg: Txg) -> Vec<Reservation> {
        core::mem::take(&mut *self.reserved[slot(txg)].lock())
    }

    /// Keeps runs that group `txg` took for data and did not use yet.
    pub fn keep_spare(&self, txg: Txg, mut runs: Vec<Run>) {
        self.spare[slot(txg)].lock().append(&mut runs);
    }

    /// Runs that group `txg` took for data and did not use yet.
    pub fn take_spare(&self, txg: Txg) -> Vec<Run> {
        core::mem::take(&mut *self.spare[slot(txg)].lock())
    }

    /// Whether the pool takes changes.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] by choice, [`Error::TurnedReadOnly`] after an error, [`Error::Failed`]
    /// after a shutdown.
    pub fn writable(&self) -> Result<()> {
        if self.shut_down.load(Ordering::Acquire) {
            return Err(Error::Failed);
        }
        if self.has_failed() {
            return Err(Error::TurnedReadOnly);
        }
        if self.read_only.load(Ordering::Acquire) {
            return Err(Error::ReadOnly);
        }
        Ok(())
    }

    /// Whether publishing stopped for good.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Stops publishing for good. Returns whether this call was the first.
    pub fn fail(&self) -> bool {
        let first = !self.failed.swap(true, Ordering::AcqRel);
        self.groups.notify();
        first
    }

    /// Stops publishing for good, as if power had failed.
    pub fn shut_down(&self) {
        self.shut_down.store(true, Ordering::Release);
        self.fail();
    }

    /// Whether changes are refused by choice.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Refuses changes from now on, or takes them again.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Release);
    }
}

/// Most bytes of nodes that one hint makes the pool read.
const PREFETCH_BYTES_MAX: usize = 4 << 20;
/// Nor are they more than this part of the cache: few enough that the first is still there when
/// the last is used. A node that was not yet used twice stays in a tenth of the cache.
const PREFETCH_SHARE: usize = 32;

impl Store {
    /// The node in a block that has been read, which is cached from now on.
    fn decode_node(&self, tree: TreeId, ptr: &BlockPtr, buf: Buf) -> Result<Arc<Node>> {
        let pool_id = self.pool.pool_id();
        let node = Node::decode(buf.into_slice(), ptr, tree, &pool_id, self.node_bytes)?;
        let node = Arc::new(node);
        self.cache.insert(node.clone());
        Ok(node)
    }
}

impl NodeSource for Store {
    fn node_bytes(&self) -> usize {
        self.node_bytes
    }

    fn pool_id(&self) -> [u8; 16] {
        self.pool.pool_id()
    }

    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        if let Some(node) = self.cache.get(ptr) {
            return Ok(node);
        }
        self.decode_node(tree, ptr, self.pool.read_block(ptr)?)
    }

    fn prefetch(&self, tree: TreeId, ptrs: &[BlockPtr]) {
        let bytes = PREFETCH_BYTES_MAX.min(self.cache.limit() / PREFETCH_SHARE);
        let most = bytes / self.node_bytes;
        let missing = ptrs.iter().filter(|ptr| !self.cache.contains(ptr)).take(most);
        let missing: Vec<BlockPtr> = missing.copied().collect();
        if missing.len() < 2 {
            return;
        }
        for (ptr, buf) in missing.iter().zip(self.pool.read_blocks(&missing)) {
            // Who needs the node meets the error.
            let _ = buf.and_then(|buf| self.decode_node(tree, ptr, buf));
        }
    }
}

impl BitmapSource for Store {
    fn bitmap(&self, region: Logical) -> Result<Option<Vec<u8>>> {
        let view = self.space_view();
        let key = Key::new(region.0, kind::SPACE_BITMAP, 0);
        Ok(view.tree.lookup(self, &key)?.map(|value| value.to_vec()))
    }
}
