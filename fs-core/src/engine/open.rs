//! From devices to an engine.
//!
//! 1. Labels and superblocks (`pool`): the newest valid superblock, with the system chunks mapped.
//! 2. Chunk tree: the rest of the map.
//! 3. Space summaries and the residue: a few bytes a chunk.
//! 4. Pool tree: properties and subvolumes.
//! 5. The intent log, if there is any: replayed and committed before anybody gets in.
//! 6. Orphans: queued, removed in the background.

use crate::btree::{NodeSource, Tree};
use crate::buf::SHELF_BYTES;
use crate::engine::{
    commit::Committer, destroy::REFS_PER_GROUP, devices::DeviceChanges, log::Log, past,
    scrub::Scrub, Engine,
};
use crate::error::{Error, FeatureClass};
use crate::format::chunk::{Chunk, DeviceItem};
use crate::format::features;
use crate::format::key::{kind, Key};
use crate::format::pool::{property, SubvolItem};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::format::space::{Residue, SummaryItem};
use crate::format::superblock::Superblock;
use crate::platform::{DeviceRef, Platform};
use crate::pool::{Pool, PoolOptions};
use crate::space::{self, ChunkSource, Space};
use crate::subvol::room::KnownShape;
use crate::subvol::store::{DataSettings, Result, Store, StoreParts};
use crate::subvol::versions::{Version, Versions};
use crate::subvol::Subvol;
use crate::sync::{Mutex, Rank, RwLock};
use crate::units::{Ino, Logical, TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How to open a pool.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Take no changes and write nothing, not even to replay the log or to repair copies.
    pub read_only: bool,
    /// With `read_only`: show the last published group, without what the log adds.
    pub ignore_log: bool,
    /// Open the pool as of this group, without what a log adds. Only with `read_only`; see
    /// [`past`](super::past).
    pub txg: Option<Txg>,
    /// Open the pool without devices that are missing, if the others have a copy of everything.
    pub degraded: bool,
    /// Bytes of tree nodes, inodes and buffers for data to keep in memory.
    pub cache_bytes: usize,
    /// Bytes of changes to hold in memory at most.
    pub dirty_bytes: u64,
    /// Longest time a change stays uncommitted, in seconds.
    pub commit_seconds: u64,
    /// References that one group gives up or moves because something was deleted.
    pub deletion_refs: usize,
    /// How new data is stored, in place of what the pool says: kind and level.
    pub compression: Option<(CompressionKind, i32)>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            ignore_log: false,
            txg: None,
            degraded: false,
            cache_bytes: 128 << 20,
            dirty_bytes: 256 << 20,
            commit_seconds: 5,
            deletion_refs: REFS_PER_GROUP,
            compression: None,
        }
    }
}

/// How often the engine looks whether there is something to do, in milliseconds.
const TICK_MS: u64 = 250;

/// Opens a pool.
///
/// # Errors
/// What the labels, the superblock and the trees give: see [`Error`]. Nothing was written then.
pub fn open(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &OpenOptions,
) -> Result<Arc<Engine>> {
    match options.txg {
        Some(txg) => past::open(devices, platform, options, txg),
        None => open_one(devices, platform, options),
    }
}

/// As [`open`], of one group, if that cannot be opened whatever others can.
#[inline(never)]
pub(super) fn open_one(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &OpenOptions,
) -> Result<Arc<Engine>> {
    let (engine, superblock) = found(devices, platform, options)?;
    engine.load_pool_tree(options)?;
    // Nothing is written before all is known to be readable.
    engine.store.pool.begin(&superblock)?;
    // The log goes on from the newest group, and from no other.
    let ignores_log = options.ignore_log || options.txg.is_some();
    if let (Some(start), false) = (&superblock.log, ignores_log) {
        let applied = engine.replay(start)?;
        if applied > 0 && !options.read_only {
            engine.commit_upto(engine.store.groups.open())?;
        }
    }
    if !options.read_only {
        engine.queue_orphans()?;
        // Power may have failed between the two. If it cannot be done, one of them is still good.
        let _ = engine.store.pool.repair_labels();
        start_ticking(&engine);
        engine.keep_scrubbing();
        engine.keep_changing();
    }
    Ok(engine)
}

/// The engine of a pool, and the superblock that it is opened by; no tree was read. Apart from
/// [`open`], so that what comes after has more of a kernel's stack.
#[inline(never)]
fn found(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &OpenOptions,
) -> Result<(Arc<Engine>, Box<Superblock>)> {
    let OpenOptions { read_only, txg, degraded, .. } = *options;
    let kept_bytes = kept_bytes(options);
    let pool_options = PoolOptions { read_only, txg, degraded, kept_bytes };
    let (pool, superblock) = Pool::open(devices, platform.clone(), &pool_options)?;
    let unknown = superblock.unknown_ro_compat();
    if unknown != 0 && !options.read_only {
        return Err(Error::Features { class: FeatureClass::RoCompat, unknown });
    }
    let engine = put_together(pool, superblock.clone(), platform, options)?;
    Ok((engine, superblock))
}

/// How much of the cache is left to buffers.
fn kept_bytes(options: &OpenOptions) -> usize {
    SHELF_BYTES.min(options.cache_bytes / 8)
}

#[inline(never)]
fn put_together(
    pool: Box<Pool>,
    superblock: Box<Superblock>,
    platform: Platform,
    options: &OpenOptions,
) -> Result<Arc<Engine>> {
    assemble(Parts {
        platform,
        pool: Arc::from(pool),
        superblock,
        subvols: Vec::new(),
        settings: DataSettings {
            compression: CompressionKind::None,
            level: 0,
            checksum: ChecksumKind::Crc32c,
        },
        cache_bytes: options.cache_bytes - kept_bytes(options),
        dirty_bytes: options.dirty_bytes,
        commit_seconds: options.commit_seconds,
        deletion_refs: options.deletion_refs,
        read_only: options.read_only,
    })
}

/// What an engine is put together from.
pub(super) struct Parts {
    pub platform: Platform,
    pub pool: Arc<Pool>,
    pub superblock: Box<Superblock>,
    pub subvols: Vec<(TreeId, SubvolItem)>,
    pub settings: DataSettings,
    pub cache_bytes: usize,
    pub dirty_bytes: u64,
    pub commit_seconds: u64,
    pub deletion_refs: usize,
    pub read_only: bool,
}

/// Puts an engine together and loads the chunk map and the summaries.
pub(super) fn assemble(parts: Parts) -> Result<Arc<Engine>> {
    let store = make_store(&parts);
    let superblock = parts.superblock;
    let space_tree = Tree { id: TreeId::SPACE, root: superblock.space_root };
    let chunk_tree = Tree { id: TreeId::CHUNK, root: superblock.chunk_root };
    load_chunks(&store, &chunk_tree)?;
    store.pool.check_reach()?;
    load_space(&store, &space_tree, &superblock)?;
    let limits = (parts.commit_seconds, parts.deletion_refs);
    let engine = make_engine(superblock, store, limits);
    parts.subvols.iter().try_for_each(|(id, item)| engine.add_first(*id, item))?;
    Ok(engine)
}

/// Kept apart from `assemble`, as [`make_store`] is.
#[inline(never)]
fn make_engine(
    superblock: Box<Superblock>,
    store: Arc<Store>,
    (commit_seconds, deletion_refs): (u64, usize),
) -> Arc<Engine> {
    let has_versions = superblock.features[2] & features::VERSIONS != 0;
    let commit_ns = commit_seconds.max(1).saturating_mul(1_000_000_000);
    Arc::new(Engine {
        default_subvol: AtomicU64::new(superblock.default_subvol),
        subvols: RwLock::ranked(Rank::Subvols, BTreeMap::new()),
        snapshots: RwLock::ranked(Rank::Subvols, BTreeMap::new()),
        versions: RwLock::ranked(Rank::Versions, Versions::default()),
        requests: Mutex::ranked(Rank::Short, Vec::new()),
        stopped: Mutex::ranked(Rank::Short, BTreeSet::new()),
        destroy_after_ns: AtomicU64::new(0),
        deletion_refs,
        given_up: AtomicU64::new(0),
        committer: Mutex::ranked(Rank::Committer, Committer::new(superblock)),
        log: Log::new(store.pool.pool_id()),
        reclaim: Mutex::ranked(Rank::Short, VecDeque::new()),
        promised: Mutex::ranked(Rank::Short, None),
        commit_due_ns: AtomicU64::new(store.platform.clock.uptime_ns().saturating_add(commit_ns)),
        commit_ns,
        wanted: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        has_versions: AtomicBool::new(has_versions),
        awaits_versions: AtomicBool::new(false),
        pool_shape: KnownShape::default(),
        destroys: AtomicBool::new(false),
        metadata_used: AtomicU64::new(store.space.usage().metadata.used_bytes),
        resilver: Mutex::ranked(Rank::Short, None),
        resilvering: AtomicBool::new(false),
        resilver_shown: Mutex::ranked(Rank::Short, None),
        turns: AtomicU64::new(0),
        damaged: Mutex::ranked(Rank::Short, BTreeMap::new()),
        device_changes: DeviceChanges::new(),
        scrub: Scrub::new(),
        store,
    })
}

/// Kept apart from `assemble`, whose frame would hold the store as it is being made.
#[inline(never)]
fn make_store(parts: &Parts) -> Arc<Store> {
    let superblock = &parts.superblock;
    let chunks: Arc<dyn ChunkSource> = parts.pool.clone();
    let space = Arc::new(Space::new(
        chunks,
        space::Options {
            published: superblock.txg,
            metadata_unit: u64::from(superblock.node_bytes),
            ..space::Options::default()
        },
    ));
    Arc::new(Store::new(StoreParts {
        platform: parts.platform.clone(),
        pool: parts.pool.clone(),
        space,
        published: superblock.txg,
        hash_secret: superblock.hash_secret,
        node_bytes: superblock.node_bytes as usize,
        space_tree: Tree { id: TreeId::SPACE, root: superblock.space_root },
        refs_tree: Tree { id: TreeId::REFS, root: superblock.refs_root },
        cache_bytes: parts.cache_bytes,
        dirty_bytes: parts.dirty_bytes,
        settings: parts.settings,
        read_only: parts.read_only,
    }))
}

/// Calls `each` for every item of a tree.
fn each_item(
    source: &dyn NodeSource,
    tree: &Tree,
    mut each: impl FnMut(Key, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut cursor = tree.cursor();
    cursor.seek(source, &Key::MIN)?;
    while let Some((key, value)) = cursor.next(source)? {
        each(key, &value)?;
    }
    Ok(())
}

// Not inlined: its frame is to be gone when the rest of opening goes on.
#[inline(never)]
fn load_chunks(store: &Store, tree: &Tree) -> Result<()> {
    let mut chunks = Vec::new();
    each_item(store, tree, |key, value| {
        let bad = |b: crate::format::BadBytes| b.in_item(TreeId::CHUNK, key.object);
        match key.kind {
            kind::CHUNK => {
                chunks.push(Chunk::decode(Logical(key.object), value).map_err(bad)?);
            }
            kind::DEVICE => {
                let index = u16::try_from(key.object).map_err(|_| Error::BadItem {
                    what: "device index out of range",
                    tree: TreeId::CHUNK,
                    object: key.object,
                })?;
                store.pool.add_device_item(index, &DeviceItem::decode(value).map_err(bad)?)?;
            }
            _ => return Err(bad(crate::format::BadBytes("item of another kind"))),
        }
        Ok(())
    })?;
    // System chunks are mapped already, by the superblock.
    let known = store.pool.system_chunks();
    chunks.retain(|chunk| !known.contains(chunk));
    store.pool.add_chunks(chunks)
}

// Not inlined: its frame is to be gone when the rest of opening goes on.
#[inline(never)]
fn load_space(store: &Store, tree: &Tree, superblock: &Superblock) -> Result<()> {
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    let mut cursor = tree.cursor();
    cursor.seek(store, &Key::new(0, kind::SPACE_SUMMARY, 0))?;
    while let Some((key, value)) = cursor.next(store)? {
        if key.object != 0 || key.kind != kind::SPACE_SUMMARY {
            break;
        }
        let summary =
            SummaryItem::decode(&value).map_err(|b| b.in_item(TreeId::SPACE, key.offset))?;
        used.insert(key.offset, summary.used_sectors);
    }
    for chunk in store.pool.chunks() {
        let sectors = used.get(&chunk.logical.0).copied();
        store.space.add_chunk(&chunk, sectors)?;
    }
    if let Some(ptr) = &superblock.residue {
        let block = store.pool.read_block(ptr)?;
        let bytes = block.get(..ptr.logical as usize).unwrap_or(&block);
        let residue = Residue::decode(bytes, superblock.txg.0).map_err(|bad| bad.at(ptr.addr))?;
        store.space.load_residue(residue)?;
    }
    Ok(())
}

impl Engine {
    /// Adds a subvolume of a pool that is being made.
    #[inline(never)]
    fn add_first(&self, id: TreeId, item: &SubvolItem) -> Result<()> {
        let version = Version::new(*item, b"");
        self.versions.write().insert(id.0, version)?;
        let subvol = self.make_subvol(id, item, self.store.groups.published())?;
        self.subvols.write().insert(id, subvol);
        Ok(())
    }

    // Not inlined: a subvolume is large, and made on the stack.
    #[inline(never)]
    fn make_subvol(&self, id: TreeId, item: &SubvolItem, txg: Txg) -> Result<Arc<Subvol>> {
        Ok(Arc::new(Subvol::new(id, *item, txg, self.store.clone())?))
    }

    #[inline(never)]
    fn load_pool_tree(&self, options: &OpenOptions) -> Result<()> {
        let (tree, txg, next) = {
            let committer = self.committer.lock();
            (committer.roots.pool, committer.superblock.txg, committer.superblock.next_subvol)
        };
        self.load_versions(&tree, next, options)?;
        let refs = self.committer.lock().roots.refs;
        self.store.note_references(&*self.store, &refs)?;
        self.pool_shape.set(tree.shape(&*self.store)?);
        let mut subvols = BTreeMap::new();
        for (id, version) in self.versions.read().iter() {
            if !version.item.is_snapshot() && !version.item.is_deleted() {
                let id = TreeId(id);
                subvols.insert(id, self.make_subvol(id, &version.item, txg)?);
            }
        }
        let default = TreeId(self.default_subvol.load(Ordering::Relaxed));
        if !subvols.contains_key(&default) {
            return Err(Error::BadItem {
                what: "the default subvolume is missing",
                tree: TreeId::POOL,
                object: default.0,
            });
        }
        *self.subvols.write() = subvols;
        self.settle_settings();
        self.settle_promises();
        Ok(())
    }

    /// Reads the settings, and what subvolumes and snapshots there are.
    #[inline(never)]
    fn load_versions(&self, tree: &Tree, next: u64, options: &OpenOptions) -> Result<()> {
        let mut settings = self.store.settings();
        let mut versions = Versions::default();
        each_item(&*self.store, tree, |key, value| {
            if !versions.load(key, value)? && key.kind == kind::PROPERTY && key.object == 0 {
                match key.offset {
                    property::SCRUB => self.load_scrub(value),
                    property::DEVICES => self.load_device_change(value),
                    number => read_setting(&mut settings, number, value),
                }
            }
            Ok(())
        })?;
        versions.check(next)?;
        versions.check_all_rules()?;
        if let Some((kind, level)) = options.compression {
            (settings.compression, settings.level) = (kind, level);
        }
        self.store.set_settings(settings);
        *self.versions.write() = versions;
        Ok(())
    }

    #[inline(never)]
    fn queue_orphans(&self) -> Result<()> {
        let subvols = self.subvols();
        // What is being received may get names again.
        let mut whole = subvols.iter().filter(|subvol| !subvol.is_receiving());
        whole.try_for_each(|subvol| self.queue_orphans_of(subvol))
    }

    /// Queues the nameless inodes of a subvolume that nobody uses yet.
    pub(super) fn queue_orphans_of(&self, subvol: &Subvol) -> Result<()> {
        let from = Key::new(0, kind::ORPHAN, 0);
        let to = Key::new(0, kind::ORPHAN, u64::MAX);
        subvol.scan(from, to, &mut |key, _| {
            self.queue_reclaim(subvol, Ino(key.offset));
            Ok(true)
        })
    }
}

fn read_setting(settings: &mut DataSettings, number: u64, value: &[u8]) {
    let first = value.first().copied().unwrap_or(0).checked_sub(1);
    match number {
        property::COMPRESSION => {
            if let Some(kind) = first.and_then(CompressionKind::from_raw) {
                settings.compression = kind;
                settings.level = i32::from(value.get(1).copied().unwrap_or(0) as i8);
            }
        }
        property::CHECKSUM => {
            if let Some(kind) = first.and_then(ChecksumKind::from_raw) {
                settings.checksum = kind;
            }
        }
        _ => {}
    }
}

fn start_ticking(engine: &Arc<Engine>) {
    let is_open = |engine: &Engine| !engine.closed.load(core::sync::atomic::Ordering::Acquire);
    engine.every(TICK_MS, move |engine| {
        engine.tick();
        is_open(engine)
    });
    if engine.store.pool.behind().is_empty() {
        return;
    }
    engine.every(TICK_MS, move |engine| {
        engine.resilver_some();
        is_open(engine) && !engine.store.pool.behind().is_empty()
    });
}
