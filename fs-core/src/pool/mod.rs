//! The pool: devices as one logical space that verifies what it reads.
//!
//! Everything above names places by logical address. The logical space is made of chunks; the
//! *chunk map* says which bytes of which devices each is, and a *layout* how its profile spreads
//! them. The map is stored in the chunk tree, which itself needs the map to be read, so its own
//! chunks (*system* chunks) are embedded in the superblock:
//!
//! ```text
//! labels -> ring -> superblock -> system chunks -> chunk tree -> all chunks -> everything
//! ```
//!
//! The pool does not read trees. [`Pool::open`] returns the superblock with the system chunks
//! mapped; the engine reads the chunk tree and hands its items to [`Pool::add_chunks`] and
//! [`Pool::add_device_item`], and at each commit asks [`Pool::take_chunk_edits`] what to change in
//! it.
//!
//! | file | idea |
//! | --- | --- |
//! | `map` | from addresses to chunks; immutable, replaced as a whole |
//! | `layout` | what a profile is |
//! | `room` | which bytes of a device belong to chunks |
//! | `standing` | which devices have everything, and going on without those that do not |
//! | `ledger` | chunks made and dropped, and what the chunk tree must learn of it |
//! | `places` | devices that come, go, and change their size |
//! | `moves` | chunks that get another place |
//! | `read` | verified reads, and healing of bad copies |
//! | `mend` | all copies compared with what they should be, and repaired |
//! | `sweep` | reading all copies of many blocks, to see whether they are good |
//! | `write` | writes to every copy |
//! | `discard` | telling devices what they need not keep |
//! | `check` | invariants |
//!
//! What must never happen: content being returned that its checksum does not vouch for; a good copy
//! being overwritten by healing; the room of a chunk being given to another while a superblock that
//! a crash falls back to maps it.
//!
//! Locks, in order: `heal`, `changing`, `ledger`, `map`, `reported`, `roll`. Only the first two are
//! held during transfers, and only those that repair or write labels. Reads take no lock that a
//! write holds for longer than swapping a pointer.

mod check;
mod discard;
mod layout;
mod ledger;
mod map;
mod mend;
mod moves;
mod places;
mod read;
mod room;
mod standing;
mod sweep;
#[cfg(test)]
mod tests;
mod write;

pub use ledger::ChunkEdit;
pub use mend::Lost;
pub use moves::Eviction;
pub use places::ADDED_BYTES_MIN;
pub use read::{DataRead, DataSource};
pub use sweep::{Content, Sweep};
pub use write::RunWrite;

use crate::buf::{Buf, Shelf};
use crate::device::{choose, probe, ErrorCounts, Identity, Member, Probe, Ring, TableEntry};
use crate::error::{Error, FeatureClass, Incident};
use crate::format::chunk::{
    Chunk, ChunkKind, DeviceItem, Profile, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN,
};
use crate::format::features;
use crate::format::label::{DATA_START, DEVICES_MAX, LABEL_AREA_BYTES};
use crate::format::node::NODE_BYTES_ALLOWED;
use crate::format::space::Run;
use crate::format::superblock::Superblock;
use crate::platform::{DeviceRef, Platform, Result};
use crate::sync::{Mutex, Rank, RwLock};
use crate::units::{align_down, Logical, Physical, Txg, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use layout::Demand;
use ledger::Ledger;
use map::{ChunkMap, Place};
use standing::{Changes, Roll};

/// What a new pool shall be.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Name, UTF-8, padded with zeros.
    pub name: [u8; 64],
    /// Id of the pool; random when not given.
    pub pool_id: Option<[u8; 16]>,
    /// Bytes of a tree node.
    pub node_bytes: u32,
    /// Profile of data chunks.
    pub data_profile: Profile,
    /// Profile of metadata and system chunks.
    pub metadata_profile: Profile,
    /// Bytes of a new chunk; fitted to the pool's size when not given.
    pub chunk_bytes: Option<u64>,
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            name: [0; 64],
            pool_id: None,
            node_bytes: NODE_BYTES_ALLOWED[0],
            data_profile: Profile::Single,
            metadata_profile: Profile::Dup,
            chunk_bytes: None,
        }
    }
}

/// How to open a pool.
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolOptions {
    /// Write nothing, not even repairs.
    pub read_only: bool,
    /// Open the superblock of this group in place of the newest. Only with `read_only`.
    pub txg: Option<Txg>,
    /// Open it without devices that are missing, if the others have a copy of everything.
    pub degraded: bool,
    /// Bytes of buffers for data to keep in memory.
    pub kept_bytes: usize,
}

/// What is fixed while a pool is open.
struct Settings {
    pool_id: [u8; 16],
    node_bytes: u32,
    data_profile: Profile,
    metadata_profile: Profile,
    chunk_bytes: u64,
    newest_txg: Txg,
    opened_txg: Txg,
}

/// An open pool. See the module.
pub struct Pool {
    platform: Platform,
    /// A place for each device there may be; those there are, are in the first `places`.
    members: Vec<Member>,
    places: AtomicUsize,
    settings: Settings,
    read_only: bool,
    /// Which label areas were damaged when the pool was opened.
    damaged: Mutex<Vec<DamagedLabel>>,
    /// Memory for transfers.
    buffers: Arc<Shelf>,
    /// Where addresses lead. Held only to copy or swap the pointer.
    map: RwLock<Arc<ChunkMap>>,
    /// Room and chunk-tree edits. Whoever changes `map` holds it.
    ledger: Mutex<Ledger>,
    /// One repair at a time; see `read`.
    heal: Mutex<()>,
    /// Leaving devices behind, and everything else that writes labels; see `standing`.
    changing: Mutex<Changes>,
    /// Devices failed that the labels do not tell yet.
    is_owing: AtomicBool,
    /// Devices that were complete and failed since the pool was opened, a bit for each.
    lost: AtomicU64,
    /// Devices that get no new chunk, a bit for each.
    closed: AtomicU64,
    /// The name, the epoch and the table that every label should have.
    roll: Mutex<Identity>,
    /// The newest published group.
    published_txg: AtomicU64,
    /// Places already reported as damaged.
    reported: Mutex<read::Reported>,
}

/// A part of a run each copy of which is on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Length.
    pub bytes: u64,
    /// Device and first byte of each copy.
    pub copies: Vec<(u16, Physical)>,
}

/// A label area that was not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedLabel {
    /// Index of the device.
    pub device: u16,
    /// 0 for the area at the start, 1 for the one at the end.
    pub area: usize,
    /// What was wrong.
    pub error: Error,
}

/// So much is left for chunks of the pool's own size, at most.
const KEPT_BYTES_MAX: u64 = 2 << 30;

/// Chunks of the smallest size that a pool needs beyond one of each kind: metadata is copied before
/// the old copy is free.
const SPARE_CHUNKS: u64 = 1;

impl Pool {
    /// The smallest devices a pool with those profiles can be made on, in bytes.
    pub fn minimum_bytes(data: Profile, metadata: Profile) -> u64 {
        let on_one = |profile: Profile| profile.copies() / profile.devices_min();
        // System and metadata, then data.
        let chunks = 2 * on_one(metadata) + on_one(data) + SPARE_CHUNKS;
        let bytes = DATA_START + chunks * CHUNK_BYTES_MIN + LABEL_AREA_BYTES;
        // Whole units are easier to act on, and leave a little room.
        bytes.next_multiple_of(CHUNK_BYTES_MIN)
    }

    /// The chunk size for a pool of that many bytes: 256 chunks, within the format's bounds.
    pub fn default_chunk_bytes(pool_bytes: u64) -> u64 {
        let part = (pool_bytes / 256).max(1);
        (1 << part.ilog2()).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX)
    }

    /// Makes an empty pool on the devices: wipes what was there, writes labels, flushes. There is
    /// no superblock yet; the first commit writes it.
    ///
    /// # Errors
    /// [`Error::TooSmall`], [`Error::ReadOnly`], [`Error::Argument`] for options out of range, and
    /// what the devices say.
    pub fn create(
        devices: Vec<DeviceRef>,
        platform: Platform,
        options: &FormatOptions,
    ) -> Result<Pool> {
        check_options(options)?;
        if devices.is_empty() {
            return Err(Error::Argument { what: "a pool needs a device" });
        }
        let needed = options.data_profile.devices_min().max(options.metadata_profile.devices_min());
        if (devices.len() as u64) < needed {
            return Err(Error::Argument { what: "the profile needs more devices than there are" });
        }
        if devices.len() > DEVICES_MAX {
            return Err(Error::Argument { what: "a pool has at most 64 devices" });
        }
        let minimum = Pool::minimum_bytes(options.data_profile, options.metadata_profile);
        let mut pool_bytes = 0u64;
        for device in &devices {
            let geometry = device.geometry();
            if geometry.read_only {
                return Err(Error::ReadOnly);
            }
            if geometry.bytes < minimum {
                return Err(Error::TooSmall { minimum });
            }
            pool_bytes = pool_bytes.saturating_add(geometry.bytes);
        }
        let settings = Settings {
            pool_id: options.pool_id.unwrap_or_else(|| random_id(&platform)),
            node_bytes: options.node_bytes,
            data_profile: options.data_profile,
            metadata_profile: options.metadata_profile,
            chunk_bytes: options
                .chunk_bytes
                .unwrap_or_else(|| Pool::default_chunk_bytes(pool_bytes)),
            newest_txg: Txg(0),
            opened_txg: Txg(0),
        };
        let members = fresh_members(devices, &platform, &settings.pool_id, &options.name)?;
        // All are wiped before the first is labelled: a pool never has members of an older one.
        members.iter().try_for_each(Member::wipe)?;
        members.iter().try_for_each(Member::write_labels)?;
        Ok(Pool::assemble(platform, members, settings, false, Logical(0)))
    }

    /// Reads labels and rings; returns the newest superblock with its system chunks mapped.
    ///
    /// # Errors
    /// [`Error::NotCairn`], [`Error::Truncated`], [`Error::WrongDevice`], [`Error::Split`],
    /// [`Error::MissingDevices`], [`Error::OnlyBehind`],
    /// [`Error::NoSuperblock`], [`Error::Version`], [`Error::Features`], [`Error::ReadOnly`] when a
    /// device cannot be written and `options` ask for it, [`Error::Corrupt`] for a superblock that
    /// contradicts its devices, and what the devices say.
    pub fn open(
        devices: Vec<DeviceRef>,
        platform: Platform,
        options: &PoolOptions,
    ) -> Result<(Box<Pool>, Box<Superblock>)> {
        if options.txg.is_some() && !options.read_only {
            return Err(Error::Argument { what: "an older group can only be opened read-only" });
        }
        let probed = probe_all(devices, options.read_only)?;
        Pool::of_probed(probed, platform, options)
    }

    /// The superblocks that the devices have, of which [`PoolOptions::txg`] opens one. They are no
    /// more than whole: a forged one may name anything, and is found out when it is opened.
    ///
    /// # Errors
    /// What labels that cannot be read or do not belong together give, as [`Pool::open`].
    #[inline(never)]
    pub fn past(devices: Vec<DeviceRef>) -> Result<Box<Ring>> {
        let mut probed = probe_all(devices, true)?;
        let Probed { members, unusable, .. } = &mut probed;
        Ok(Box::new(standing::call_roll(members, unusable)?.ring))
    }

    // Not inlined, so that looking at the labels has more of a kernel's stack.
    #[inline(never)]
    fn of_probed(
        mut probed: Probed,
        platform: Platform,
        options: &PoolOptions,
    ) -> Result<(Box<Pool>, Box<Superblock>)> {
        let Probed { members, unusable, .. } = &mut probed;
        let Roll { newest, ring, only_behind } = standing::call_roll(members, unusable)?;
        let members = standing::fill_gaps(probed.members, &newest)?;
        if only_behind && !(options.read_only && options.degraded) {
            return Err(standing::missing(&members, true, &probed.unusable));
        }
        let superblock = choose(&ring, options.txg)?;
        check_superblock(superblock, newest.table.len(), options.read_only)?;
        let mut pool = Pool::found(platform, members, &ring, superblock, options.read_only)?;
        pool.buffers = Arc::new(Shelf::new(options.kept_bytes));
        *pool.roll.lock() = *newest;
        let is_missing = |member: &Member| !member.is_there() && !member.is_vacant();
        if !options.degraded && pool.members().iter().any(is_missing) {
            return Err(standing::missing(pool.members(), false, &probed.unusable));
        }
        pool.check_reach_without(&probed.unusable)?;
        for (name, error) in probed.unusable {
            pool.platform.report.incident(&Incident::DeviceUnusable { name, error });
        }
        *pool.damaged.lock() = probed.damaged;
        Ok((pool, boxed(superblock)))
    }

    /// The pool that `superblock` describes, with its system chunks.
    // Not inlined, as `assemble`: a pool is large, and would be in the frame several times.
    #[inline(never)]
    fn found(
        platform: Platform,
        members: Vec<Member>,
        ring: &Ring,
        superblock: &Superblock,
        read_only: bool,
    ) -> Result<Box<Pool>> {
        // Addresses of chunks are never used twice, not even by a pool that went back in time.
        let next_chunk = ring.valid.iter().map(|valid| valid.next_chunk).max().unwrap_or_default();
        let settings = Settings {
            pool_id: superblock.pool_id,
            node_bytes: superblock.node_bytes,
            data_profile: superblock.data_profile,
            metadata_profile: superblock.metadata_profile,
            chunk_bytes: superblock.chunk_bytes,
            newest_txg: ring.newest(),
            opened_txg: superblock.txg,
        };
        let pool = Pool::assemble(platform, members, settings, read_only, next_chunk);
        let pool = Box::new(pool);
        pool.add_chunks(superblock.system_chunks.iter().cloned())?;
        Ok(pool)
    }

    #[inline(never)]
    fn assemble(
        platform: Platform,
        members: Vec<Member>,
        settings: Settings,
        read_only: bool,
        next_chunk: Logical,
    ) -> Pool {
        let roll = Mutex::new(members[0].identity());
        let published_txg = AtomicU64::new(settings.opened_txg.0);
        let sizes = members.iter().map(Member::bytes);
        let ledger = Mutex::ranked(Rank::Ledger, Ledger::new(sizes, next_chunk));
        let places = AtomicUsize::new(members.len());
        let members = with_all_places(members);
        Pool {
            platform,
            members,
            places,
            settings,
            read_only,
            damaged: Mutex::new(Vec::new()),
            buffers: Arc::default(),
            map: RwLock::ranked(Rank::Leaf, Arc::new(ChunkMap::default())),
            ledger,
            heal: Mutex::ranked(Rank::Heal, ()),
            changing: Mutex::ranked(Rank::Standing, Changes::default()),
            is_owing: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            roll,
            published_txg,
            reported: Mutex::ranked(Rank::Leaf, read::Reported::default()),
        }
    }

    /// A buffer for data that is under way; it holds *anything*: see [`Shelf::take`].
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn buffer(&self, bytes: usize) -> Result<Buf> {
        self.buffers.take(bytes)
    }

    /// The pool's surroundings.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Id of the pool.
    pub fn pool_id(&self) -> [u8; 16] {
        self.settings.pool_id
    }

    /// Bytes of a tree node.
    pub fn node_bytes(&self) -> u32 {
        self.settings.node_bytes
    }

    /// Profile of new chunks of that kind.
    pub fn profile(&self, kind: ChunkKind) -> Profile {
        match kind {
            ChunkKind::Data => self.settings.data_profile,
            ChunkKind::Metadata => self.settings.metadata_profile,
            ChunkKind::System => self.settings.metadata_profile.of_system(),
        }
    }

    fn demand(&self) -> Demand {
        let Settings { data_profile, metadata_profile, chunk_bytes, .. } = self.settings;
        Demand::new(data_profile, metadata_profile, chunk_bytes)
    }

    /// Feature bits that readers of this pool must know.
    pub fn incompat(&self) -> u64 {
        let is_plain = |kind| matches!(self.profile(kind), Profile::Single | Profile::Dup);
        match self.place_count() {
            1 if is_plain(ChunkKind::Data) && is_plain(ChunkKind::Metadata) => 0,
            _ => features::DEVICES,
        }
    }

    /// Bytes of a new chunk when there is room for one of full size.
    pub fn chunk_bytes(&self) -> u64 {
        self.settings.chunk_bytes
    }

    /// The newest group that any superblock published when the pool was opened. Newer than the
    /// superblock that was opened if an older one was asked for.
    pub fn newest_txg(&self) -> Txg {
        self.settings.newest_txg
    }

    /// Whether it was opened as of an older group than the newest. What that group names and the
    /// newest does not may be something else by now: only what a checksum vouches for is given out,
    /// and what is gone is no sign of a bad device.
    pub fn is_past(&self) -> bool {
        self.settings.opened_txg < self.settings.newest_txg
    }

    /// Name of the pool, padded with zeros.
    pub fn name(&self) -> [u8; 64] {
        self.roll.lock().name
    }

    /// Renames the pool: rewrites every label. A device whose label cannot be written is left
    /// behind if it can be done without.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Argument`] unless `name` is padded UTF-8; [`Error::Device`]
    /// when a device failed that cannot be done without: the others may have the name then.
    pub fn set_name(&self, name: [u8; 64]) -> Result<()> {
        self.check_writable()?;
        check_name(&name)?;
        self.change_labels(|roll| roll.name = name)
    }

    /// The devices, by index.
    pub fn members(&self) -> &[Member] {
        &self.members[..self.places.load(Ordering::Acquire)]
    }

    /// Whether the pool writes nothing.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Label areas that were damaged or out of date when the pool was opened and have not been
    /// rewritten since.
    pub fn damaged_labels(&self) -> Vec<DamagedLabel> {
        self.damaged.lock().clone()
    }

    /// Rewrites the labels of the devices that have a damaged one.
    ///
    /// # Errors
    /// [`Error::ReadOnly`] or [`Error::Device`].
    pub fn repair_labels(&self) -> Result<()> {
        self.check_writable()?;
        let _one_at_a_time = self.changing.lock();
        let written = self.platform.clock.now().secs;
        for label in self.damaged_labels() {
            let member = self.member(label.device);
            if member.is_there() {
                let bad = member.relabel(written, |_| {})?;
                self.note_label(label.device, bad);
            }
        }
        Ok(())
    }

    /// All valid superblocks, newest first, as they are on the devices now.
    pub fn superblocks(&self) -> Vec<Superblock> {
        let mut ring = Ring::default();
        for member in self.members().iter().filter(|member| member.is_complete()) {
            // What cannot be read is not valid.
            let _ = ring.add(member, &self.settings.pool_id);
        }
        ring.valid
    }

    /// Counts errors of all devices anew from zero. The next group that is written has it.
    ///
    /// # Errors
    /// [`Error::ReadOnly`].
    pub fn clear_errors(&self) -> Result<()> {
        self.check_writable()?;
        self.members().iter().for_each(Member::clear_errors);
        Ok(())
    }

    /// Maps chunks that the chunk tree has. Those already mapped, as system chunks are, are
    /// skipped.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a chunk that is not where it can be, or overlaps another in logical
    /// space or on a device; nothing is mapped then.
    pub fn add_chunks(&self, chunks: impl IntoIterator<Item = Chunk>) -> Result<()> {
        let mut ledger = self.ledger.lock();
        let map = ledger.load(&self.chunk_map(), chunks)?;
        self.set_map(map);
        Ok(())
    }

    /// Takes note of a DEVICE item of the chunk tree: continues its error counters.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it contradicts the device's label.
    pub fn add_device_item(&self, index: u16, item: &DeviceItem) -> Result<()> {
        let what = "item of a device that the pool does not have";
        let member = self
            .members()
            .get(usize::from(index))
            .ok_or(Error::Corrupt { what, addr: Logical(0) })?;
        let identity = member.identity();
        let mut ledger = self.ledger.lock();
        // How large it is, the label says. The place may have become another's since the item was
        // written, or vacant; then nothing is there.
        if item.id != identity.device_id {
            ledger.set_device_item(index, *item);
            return ledger.note_stranger(&self.chunk_map(), index);
        }
        ledger.set_device_item(index, *item);
        drop(ledger);
        member.add_errors(ErrorCounts {
            read: item.read_errors,
            write: item.write_errors,
            checksum: item.checksum_errors,
        });
        Ok(())
    }

    /// Makes a chunk and maps it. It has the pool's chunk size, or when there is no room for that
    /// the largest power of two for which there is; in a pool that has grown the size for a pool of
    /// its size, as long as there is plenty of room. `owed` device bytes are promised besides: see
    /// [`Pool::promised_bytes`].
    ///
    /// # Errors
    /// [`Error::NoSpace`], [`Error::ReadOnly`].
    pub fn create_chunk(&self, kind: ChunkKind, txg: Txg, owed: u64) -> Result<Chunk> {
        self.check_writable()?;
        let mut ledger = self.ledger.lock();
        let map = self.chunk_map();
        let (length, large) = match kind {
            ChunkKind::System => (CHUNK_BYTES_MIN, ledger::system_chunk_bytes(&map)),
            ChunkKind::Data | ChunkKind::Metadata => {
                (self.settings.chunk_bytes, Pool::default_chunk_bytes(self.device_bytes()))
            }
        };
        let (map, chunk) = ledger.create(
            &map,
            kind,
            (self.profile(kind), length, large),
            ((&self.complete(), &self.counted()), &self.demand()),
            (owed, owed.saturating_add(self.kept_from_large()), txg),
        )?;
        self.set_map(map);
        Ok(chunk)
    }

    /// Device bytes that large chunks leave besides what is owed: more than the reserve for
    /// deletes, and the last part of a pool goes in small pieces.
    fn kept_from_large(&self) -> u64 {
        (self.device_bytes() / 16).min(KEPT_BYTES_MAX)
    }

    /// Gives up the chunk at `logical`, in which group `txg` has nothing left. It stays readable,
    /// and its room taken, until that group is published.
    ///
    /// # Panics
    /// When there is no such chunk, or it was dropped already.
    pub fn drop_chunk(&self, logical: Logical, txg: Txg) {
        let mut ledger = self.ledger.lock();
        let known = self.chunk_map().get(logical).is_some_and(|m| m.chunk.logical == logical);
        assert!(known, "no chunk at {logical} to drop");
        ledger.drop_chunk(logical, txg);
    }

    /// What the chunk tree of group `txg` must change: CHUNK and DEVICE items, sorted by key. Each
    /// edit is returned once.
    ///
    /// A chunk made after this call is not in the tree of `txg`, so nothing that `txg` refers to
    /// may be put there: see [`Pool::is_recorded`].
    pub fn take_chunk_edits(&self, txg: Txg) -> Vec<ChunkEdit> {
        let mut ledger = self.ledger.lock();
        let bound = ledger.edits_bound(&self.chunk_map());
        self.seal_moves(&mut ledger, txg);
        let edits = ledger.take_edits(&self.chunk_map(), self.members(), txg);
        let bytes: usize = edits.iter().filter_map(|(_, value)| Some(value.as_ref()?.len())).sum();
        debug_assert!(edits.len() <= bound.0 && bytes <= bound.1, "{} of {bound:?}", edits.len());
        edits
    }

    /// A bound of the edits that [`Pool::take_chunk_edits`] would return now, and of their bytes.
    pub fn chunk_edits_bound(&self) -> (usize, usize) {
        self.ledger.lock().edits_bound(&self.chunk_map())
    }

    /// Whether the chunk that covers `addr` is in the chunk tree, counting edits that have been
    /// taken.
    pub fn is_recorded(&self, addr: Logical) -> bool {
        self.ask_ledger(addr, Ledger::is_recorded)
    }

    /// Whether the published group maps `addr`, so that it can be found after a crash. A chunk that
    /// was made since is not there for replay: a log frame must neither stand in it nor name
    /// anything in it.
    pub fn is_published(&self, addr: Logical) -> bool {
        self.ask_ledger(addr, Ledger::is_published)
    }

    fn ask_ledger(&self, addr: Logical, question: fn(&Ledger, Logical) -> bool) -> bool {
        let ledger = self.ledger.lock();
        self.chunk_map().get(addr).is_some_and(|mapped| question(&ledger, mapped.chunk.logical))
    }

    /// System chunks for the superblock of the group whose edits were taken last.
    pub fn system_chunks(&self) -> Vec<Chunk> {
        let ledger = self.ledger.lock();
        ledger.system_chunks(&self.chunk_map())
    }

    /// Group `txg` is on disk: chunks it dropped are gone and their room is free.
    pub fn published(&self, txg: Txg) {
        self.published_txg.fetch_max(txg.0, Ordering::AcqRel);
        let mut ledger = self.ledger.lock();
        if let Some(map) = ledger.published(&self.chunk_map(), txg) {
            self.set_map(map);
        }
    }

    /// Device bytes that no chunk holds and that any mix of new chunks can take; copies are not
    /// deducted.
    pub fn unallocated_bytes(&self) -> u64 {
        layout::supply(&self.ledger.lock().rooms, &self.complete(), &self.demand())
    }

    /// Device bytes on which promises may have been made: those of [`Pool::unallocated_bytes`], and
    /// what devices had that were lost since the pool was opened, as far as copies on the others
    /// make up for them.
    pub fn promised_bytes(&self) -> u64 {
        layout::supply(&self.ledger.lock().rooms, &self.counted(), &self.demand())
    }

    /// Logical address of the next new chunk.
    pub fn next_chunk(&self) -> Logical {
        self.ledger.lock().next_chunk
    }

    /// All chunks, by address, with those dropped by groups that are not published yet.
    pub fn chunks(&self) -> Vec<Chunk> {
        self.chunk_map().iter().map(|mapped| mapped.chunk.clone()).collect()
    }

    /// The chunk that covers `addr`.
    pub fn chunk_of(&self, addr: Logical) -> Option<Chunk> {
        self.chunk_map().get(addr).map(|mapped| mapped.chunk.clone())
    }

    /// For each copy of a run: the pieces it is made of, as device and offset.
    ///
    /// # Errors
    /// [`Error::Unmapped`] unless the run lies in one chunk.
    pub fn map(&self, addr: Logical, bytes: u64) -> Result<Vec<Vec<(u16, Physical)>>> {
        let place = self.locate(Run { addr, bytes })?;
        let pieces = |copy| {
            let segments = place.pieces().map(|piece| piece.segment(copy));
            segments.map(|segment| (segment.device, segment.at)).collect()
        };
        Ok((0..place.copies()).map(pieces).collect())
    }

    /// The pieces of a run, in order, with the places of the copies of each.
    ///
    /// # Errors
    /// [`Error::Unmapped`] unless the run lies in one chunk; [`Error::Memory`].
    pub fn pieces(&self, run: Run) -> Result<Vec<Piece>> {
        let place = self.locate(run)?;
        let mut pieces = Vec::new();
        for piece in place.pieces() {
            let copies = (0..piece.copies()).map(|copy| piece.segment(copy));
            let copies = copies.map(|segment| (segment.device, segment.at)).collect();
            pieces.try_reserve(1).map_err(|_| Error::Memory)?;
            pieces.push(Piece { bytes: piece.bytes, copies });
        }
        Ok(pieces)
    }

    /// How many copies of the block at `addr` there are.
    pub fn copies_at(&self, addr: Logical) -> usize {
        self.chunk_map().get(addr).map_or(0, |mapped| mapped.chunk.profile.copies() as usize)
    }

    /// Bytes of all devices.
    pub fn device_bytes(&self) -> u64 {
        self.members().iter().map(Member::bytes).sum()
    }

    fn chunk_map(&self) -> Arc<ChunkMap> {
        self.map.read().clone()
    }

    /// Replaces the map; the caller holds `ledger`.
    fn set_map(&self, map: ChunkMap) {
        *self.map.write() = Arc::new(map);
    }

    fn locate(&self, run: Run) -> Result<Place> {
        self.chunk_map().locate(run)
    }

    /// The member with that index, which came from a checked chunk or label.
    fn member(&self, index: u16) -> &Member {
        &self.members[usize::from(index)]
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        Ok(())
    }
}

fn check_options(options: &FormatOptions) -> Result<()> {
    let require = |holds: bool, what| if holds { Ok(()) } else { Err(Error::Argument { what }) };
    check_name(&options.name)?;
    require(
        NODE_BYTES_ALLOWED.contains(&options.node_bytes),
        "the node size must be 16384, 32768 or 65536",
    )?;
    require(
        options.data_profile.is_known() && options.metadata_profile.is_known(),
        "this version has no parity profiles",
    )?;
    require(
        options.chunk_bytes.is_none_or(|bytes| {
            bytes.is_power_of_two() && (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&bytes)
        }),
        "the chunk size must be a power of two from 1 MiB to 1 GiB",
    )
}

fn check_name(name: &[u8; 64]) -> Result<()> {
    let used = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let (text, padding) = name.split_at(used);
    if core::str::from_utf8(text).is_err() || padding.iter().any(|byte| *byte != 0) {
        return Err(Error::Argument { what: "the name must be UTF-8 without zero bytes" });
    }
    Ok(())
}

/// A random id in the form of a version 4 UUID (RFC 9562), since tools show it as one.
fn random_id(platform: &Platform) -> [u8; 16] {
    let mut id = [0; 16];
    platform.entropy.fill(&mut id);
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

fn fresh_members(
    devices: Vec<DeviceRef>,
    platform: &Platform,
    pool_id: &[u8; 16],
    name: &[u8; 64],
) -> Result<Vec<Member>> {
    let written = platform.clock.now().secs;
    let entry = |device: &DeviceRef| TableEntry {
        id: random_id(platform),
        bytes: align_down(device.geometry().bytes, SECTOR_BYTES),
        behind: None,
    };
    let table: Vec<TableEntry> = devices.iter().map(entry).collect();
    let mut members = Vec::with_capacity(devices.len());
    for (index, device) in (0..).zip(devices) {
        let TableEntry { id, bytes, .. } = table[usize::from(index)];
        let identity = Identity {
            pool_id: *pool_id,
            device_id: id,
            index,
            bytes,
            name: *name,
            written,
            sequence: 1,
            epoch: u64::from(table.len() > 1),
            // A single device says nothing of others.
            table: if table.len() > 1 { table.clone() } else { Vec::new() },
        };
        members.push(Member::fresh(device, identity)?);
    }
    Ok(members)
}

/// What the labels of the devices say.
struct Probed {
    /// By index.
    members: Vec<Member>,
    damaged: Vec<DamagedLabel>,
    /// Devices that cannot be members, and why.
    unusable: Vec<(String, Error)>,
}

/// Reads the labels of all devices. A device without a label that can be read is like one that is
/// not there, as long as another has one.
// Called once, and large when inlined.
#[inline(never)]
fn probe_all(devices: Vec<DeviceRef>, read_only: bool) -> Result<Probed> {
    let members = Vec::with_capacity(devices.len());
    let mut probed = Probed { members, damaged: Vec::new(), unusable: Vec::new() };
    for (position, device) in devices.into_iter().enumerate() {
        if device.geometry().read_only && !read_only {
            return Err(Error::ReadOnly);
        }
        let probe = match probe(&*device, u16::try_from(position).unwrap_or(u16::MAX)) {
            Ok(probe) => Box::new(probe),
            Err(error @ (Error::NotCairn | Error::Device { .. } | Error::Truncated { .. })) => {
                probed.unusable.push((device.name().to_string(), error));
                continue;
            }
            Err(error) => return Err(error),
        };
        note_damage(&mut probed.damaged, &probe);
        probed.add(device, &probe)?;
    }
    let newest = probed.members.iter().max_by_key(|member| member.identity().epoch);
    let Some(newest) = newest.map(Member::identity) else {
        let nothing = Error::Argument { what: "a pool needs a device" };
        return Err(probed.unusable.into_iter().next().map_or(nothing, |(_, error)| error));
    };
    // With all devices there, it can only be one too many.
    let there = newest.table.iter().filter(|entry| !entry.is_vacant());
    let is_met = |entry: &&TableEntry| {
        probed.members.iter().any(|member| member.identity().device_id == entry.id)
    };
    let is_all = newest.table.is_empty() || there.clone().filter(is_met).count() == there.count();
    match probed.unusable.first() {
        Some((name, _)) if is_all => Err(Error::WrongDevice { name: name.clone() }),
        _ => Ok(probed),
    }
}

impl Probed {
    /// Adds a device, in its place.
    #[inline(never)]
    fn add(&mut self, device: DeviceRef, probe: &Probe) -> Result<()> {
        let member = Member::new(device, probe);
        let at = self.members.partition_point(|other| other.index() < member.index());
        let is_foreign = |other: &Member| other.identity().pool_id != probe.identity.pool_id;
        // Of two devices with one index, one was removed.
        let id = probe.identity.device_id;
        let is_twice = self.members.iter().any(|other| other.identity().device_id == id);
        if is_twice || self.members.iter().any(is_foreign) {
            return Err(Error::WrongDevice { name: member.name().to_string() });
        }
        self.members.insert(at, member);
        Ok(())
    }
}

/// The devices, and vacant places for as many as a pool may have.
// Not inlined: a member is large, and made on the stack.
#[inline(never)]
fn with_all_places(mut members: Vec<Member>) -> Vec<Member> {
    let first = Box::new(members[0].identity());
    for index in (0..DEVICES_MAX as u16).skip(members.len()) {
        members.push(Member::vacant(index, &first));
    }
    members
}

fn note_damage(damaged: &mut Vec<DamagedLabel>, probe: &Probe) {
    for (area, error) in probe.damaged.iter().enumerate() {
        if let Some(error) = error.clone() {
            damaged.push(DamagedLabel { device: probe.identity.index, area, error });
        }
    }
}

// Not inlined: a superblock is large, and copied by way of the stack.
#[inline(never)]
fn boxed(superblock: &Superblock) -> Box<Superblock> {
    Box::new(superblock.clone())
}

/// Compares the superblock with the number of devices in their table, and with what this version
/// can do. Where there is a table it counts: devices are added to it, or taken from it, before a
/// superblock says so.
fn check_superblock(superblock: &Superblock, count: usize, read_only: bool) -> Result<()> {
    if count == 0 && superblock.device_count > 1 {
        // Made before labels named the other devices.
        let what =
            "the pool has several devices, and this one does not name them; give all of them";
        return Err(Error::Argument { what });
    }
    if usize::from(superblock.device_count) > count.max(1) {
        let what = "superblock and label differ in the number of devices";
        return Err(Error::Corrupt { what, addr: Logical(0) });
    }
    let unknown = superblock.unknown_ro_compat();
    if unknown != 0 && !read_only {
        return Err(Error::Features { class: FeatureClass::RoCompat, unknown });
    }
    if !superblock.data_profile.is_known() || !superblock.metadata_profile.is_known() {
        let what = "superblock with a profile of a newer version";
        return Err(Error::Corrupt { what, addr: Logical(0) });
    }
    if superblock.system_chunks.iter().any(|chunk| chunk.kind != ChunkKind::System) {
        let what = "superblock embeds a chunk that is not a system chunk";
        return Err(Error::Corrupt { what, addr: Logical(0) });
    }
    Ok(())
}
