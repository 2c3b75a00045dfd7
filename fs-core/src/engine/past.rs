//! The groups before the newest.
//!
//! The ring keeps the superblocks of the last groups, and what a group gave up stays as it was
//! until something else is written there. So a pool can be opened as of an older group for as long
//! as what that names is there:
//!
//! ```text
//! ring:   ... 40   41   42   43 (newest)
//!              |    |    |    |
//!              a - a'    a'   a''     42 names what 41 names; 43 has given a' up,
//!              b    b    b    b       and where a was, something else may be by now
//! ```
//!
//! - An older group is only ever read: nothing is written to any device, neither a label nor a
//!   repair, and the log is not replayed, since it goes on from the newest group.
//! - What is read is verified by the checksum in what names it, as always. So what was overwritten
//!   is not found; it is never taken for what was there. Data without a checksum could be, and is
//!   refused ([`Error::Unverified`]).
//! - Opening needs the chunk tree, the pool tree, the space tree's summaries and the roots of
//!   subvolumes. When one of them is gone the group cannot be opened, and the error says which can
//!   ([`Error::NoGroup`]).
//! - Superblocks of the ring are believed no more than the newest: each is decoded, and what it
//!   names is checked when it is read.
//!
//! # What is left of a group
//!
//! [`history`] looks at the groups from the newest to the oldest. What a group shares with a
//! younger one that is whole need not be looked at again: a node that both name at the same place
//! is passed over with all below it, and so is an item that both have. So of each group only that
//! is read which the next younger one does not have, and of all of them together nothing twice. The
//! newest is where this begins; whether that is whole, the checker and a scrub say.
//!
//! What must never happen: a group being called whole of which something cannot be read, unless the
//! newest lacks that too. So nothing is shared when a chunk has moved in between, for an older
//! group looks for it where it was.

#[cfg(test)]
mod tests;

use crate::codec;
use crate::engine::open::{open_one, OpenOptions};
use crate::engine::survey::{Parts, Pass, Seen, Visitor};
use crate::engine::Engine;
use crate::error::{Error, Incident};
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::{DeviceRef, Platform, Report};
use crate::pool::{DataRead, DataSource, Pool};
use crate::subvol::store::Result;
use crate::units::{Logical, TreeId, Txg, SECTOR_SHIFT};
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What is left of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupState {
    /// It is the newest, and can be opened.
    Newest,
    /// All of it is there that the newest does not have as well.
    Whole,
    /// It can be opened, and some of it is gone.
    Partly(Lost),
    /// It cannot be opened.
    Gone(Error),
}

/// What of a group cannot be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Blocks of trees, and extents of files. What is below such a block is not counted.
    pub count: u64,
    /// Bytes of them, as they were stored.
    pub bytes: u64,
}

impl Lost {
    fn add(&mut self, bytes: u64) {
        self.count = self.count.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// A group that the ring still has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastGroup {
    /// Which.
    pub txg: Txg,
    /// When it was published, seconds since 1970; zero when not even that can be told.
    pub written: i64,
    /// Whether the pool was closed with nothing left to do.
    pub clean: bool,
    /// What is left of it.
    pub state: GroupState,
}

/// Memory for nodes while groups are looked at.
const LOOK_CACHE_BYTES: usize = 16 << 20;
/// Memory for changes, of which there are none.
const LOOK_DIRTY_BYTES: u64 = 1 << 20;
/// Data that is read together.
const BATCH_BYTES: u64 = 4 << 20;
/// Extents that are read together.
const BATCH_COUNT: usize = 256;

/// Is told that things are gone, which is expected.
struct Unheard;

impl Report for Unheard {
    fn incident(&self, _: &Incident) {}
}

fn quiet(platform: &Platform) -> Platform {
    Platform { report: Arc::new(Unheard), ..platform.clone() }
}

fn to_look(txg: Option<Txg>) -> OpenOptions {
    OpenOptions {
        read_only: true,
        ignore_log: true,
        txg,
        degraded: true,
        cache_bytes: LOOK_CACHE_BYTES,
        dirty_bytes: LOOK_DIRTY_BYTES,
        ..OpenOptions::default()
    }
}

/// Whether an older group may fail to open like that because of what came after it.
fn is_gone(error: &Error) -> bool {
    match error {
        // A device that it was on has been removed since: it is not missed.
        Error::MissingDevices { devices, needed, .. } => *needed && devices.is_empty(),
        error => error.is_damage(),
    }
}

/// Opens the pool as of group `txg`.
#[inline(never)]
pub(super) fn open(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &OpenOptions,
    txg: Txg,
) -> Result<Arc<Engine>> {
    if !options.read_only {
        return Err(Error::Argument { what: "an older group can only be opened read-only" });
    }
    let opened = open_one(devices.clone(), platform.clone(), options);
    opened.map_err(|error| explain(error, txg, &devices, &platform))
}

/// Why group `txg` cannot be used, with the groups that can, when `error` came of that.
pub fn explain(error: Error, txg: Txg, devices: &[DeviceRef], platform: &Platform) -> Error {
    let cause = match error {
        Error::NoGroup { cause, .. } => cause,
        error if is_gone(&error) => Some(error.to_string()),
        error => return error,
    };
    let others = openable(devices, platform, |other| other != txg);
    Error::NoGroup { txg: Some(txg), cause, others }
}

/// The groups that can be opened, newest first, of those that are asked for.
#[inline(never)]
fn openable(
    devices: &[DeviceRef],
    platform: &Platform,
    is_wanted: impl Fn(Txg) -> bool,
) -> Vec<Txg> {
    let Ok(ring) = Pool::past(devices.to_vec()) else { return Vec::new() };
    let groups = ring.valid.iter().map(|superblock| superblock.txg);
    let can_be_opened = |txg: &Txg| {
        let options = to_look(Some(*txg));
        open_one(devices.to_vec(), quiet(platform), &options).is_ok()
    };
    groups.filter(|txg| is_wanted(*txg)).filter(can_be_opened).collect()
}

/// Opens the pool as of the newest group before the last that is whole: all of its trees can be
/// read. Data is verified when it is read. `options` ask for a pool that is only read.
///
/// # Errors
/// [`Error::NoGroup`] when there is none; [`Error::Argument`], [`Error::Memory`]; what labels that
/// cannot be used give.
pub fn rewind(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &OpenOptions,
) -> Result<Arc<Engine>> {
    if !options.read_only {
        return Err(Error::Argument { what: "an older group can only be opened read-only" });
    }
    let ring = Pool::past(devices.clone())?;
    let newest = ring.newest();
    for superblock in ring.valid.iter().filter(|superblock| superblock.txg < newest) {
        let options = OpenOptions { txg: Some(superblock.txg), ..options.clone() };
        match open_one(devices.clone(), platform.clone(), &options) {
            Ok(engine) if lost(&engine, None, false)? == Lost::default() => return Ok(engine),
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    let others = openable(&devices, &platform, |txg| txg < newest);
    Err(Error::NoGroup { txg: None, cause: None, others })
}

/// What groups there are, the newest first, and what is left of each: of its trees, and with `data`
/// of the data of files. Writes nothing. May be asked of devices that are in use: what is
/// overwritten meanwhile is gone.
///
/// # Errors
/// What labels that cannot be used give; [`Error::Memory`].
pub fn history(devices: &[DeviceRef], platform: &Platform, data: bool) -> Result<Vec<PastGroup>> {
    let ring = Pool::past(devices.to_vec())?;
    let platform = quiet(platform);
    let mut groups = Vec::new();
    let mut base: Option<Arc<Engine>> = None;
    for superblock in &ring.valid {
        let options = to_look(Some(superblock.txg));
        let state = match open_one(devices.to_vec(), platform.clone(), &options) {
            Ok(engine) => {
                let state = match superblock.txg == ring.newest() {
                    true => GroupState::Newest,
                    false => state_of(lost(&engine, base.as_deref(), data)?),
                };
                if !matches!(state, GroupState::Partly(_)) {
                    base = Some(engine);
                }
                state
            }
            Err(Error::Memory) => return Err(Error::Memory),
            Err(error) => GroupState::Gone(error),
        };
        let (txg, written, clean) = (superblock.txg, superblock.written, superblock.clean);
        groups.push(PastGroup { txg, written, clean, state });
    }
    for refused in &ring.refused {
        if groups.iter().all(|group| group.txg != refused.txg) {
            let state = GroupState::Gone(refused.error.clone());
            groups.push(PastGroup { txg: refused.txg, written: 0, clean: false, state });
        }
    }
    groups.sort_unstable_by_key(|group| core::cmp::Reverse(group.txg));
    Ok(groups)
}

fn state_of(lost: Lost) -> GroupState {
    match lost == Lost::default() {
        true => GroupState::Whole,
        false => GroupState::Partly(lost),
    }
}

/// What cannot be had of an opened group, of what `base` does not name as well.
#[inline(never)]
fn lost(engine: &Engine, base: Option<&Engine>, data: bool) -> Result<Lost> {
    let base = base.filter(|base| agree(&engine.store.pool, &base.store.pool));
    let base = base.map(|base| (base, base.parts()));
    let parts = engine.parts();
    let mut look = Look { engine, base, data, queue: Vec::new(), bytes: 0, lost: Lost::default() };
    let mut pass = Pass::default();
    while pass.step(&engine.store, &parts, &mut look)? {}
    look.read()?;
    Ok(look.lost)
}

/// Whether the chunks that two groups have in common are in the same places.
fn agree(old: &Pool, new: &Pool) -> bool {
    old.chunks().iter().all(|chunk| match new.chunk_of(chunk.logical) {
        Some(other) => other == *chunk,
        None => true,
    })
}

/// Looks at what there is of a group.
struct Look<'a> {
    engine: &'a Engine,
    /// A younger group, of which nothing is gone.
    base: Option<(&'a Engine, Parts)>,
    data: bool,
    /// Data that waits to be read.
    queue: Vec<DataSource>,
    bytes: u64,
    lost: Lost,
}

impl Look<'_> {
    /// Reads what waits.
    fn read(&mut self) -> Result<()> {
        self.bytes = 0;
        let queue = core::mem::take(&mut self.queue);
        let mut reads: Vec<DataRead<'_>> = queue.into_iter().map(DataRead::new).collect();
        self.engine.store.pool.read_data(&mut reads);
        for read in reads {
            match read.result {
                Ok(()) => {}
                Err(Error::Memory) => return Err(Error::Memory),
                Err(_) => self.lost.add(read.source.run().bytes),
            }
        }
        Ok(())
    }
}

/// An answer that may have been kept from being found: then it is no.
fn if_known(answer: Result<bool>) -> Result<bool> {
    match answer {
        Err(Error::Memory) => Err(Error::Memory),
        answer => Ok(answer.unwrap_or(false)),
    }
}

impl Visitor for Look<'_> {
    fn rootless(&mut self, _: TreeId, _: &Error) {
        self.lost.add(0);
    }

    fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
        match seen.error {
            None => {}
            Some(Error::Memory) => return Err(Error::Memory),
            Some(_) => self.lost.add(seen.ptr.allocated()),
        }
        Ok(())
    }

    fn data(&mut self, _: TreeId, _: &Key, _: Txg, source: DataSource) -> Result<()> {
        self.bytes += source.run().bytes;
        self.queue.try_reserve(1).map_err(|_| Error::Memory)?;
        self.queue.push(source);
        match self.bytes >= BATCH_BYTES || self.queue.len() >= BATCH_COUNT {
            true => self.read(),
            false => Ok(()),
        }
    }

    fn has_enough(&self) -> bool {
        false
    }

    fn passes_over(&self, id: TreeId, ptr: &BlockPtr, key: Option<&Key>) -> Result<bool> {
        let Some((base, parts)) = &self.base else { return Ok(false) };
        let Some(tree) = parts.tree(id) else { return Ok(false) };
        if_known(tree.has_node(&*base.store, ptr, key))
    }

    fn passes_over_item(&self, id: TreeId, key: &Key, value: &[u8]) -> Result<bool> {
        if !self.data {
            return Ok(true);
        }
        let Some((base, parts)) = &self.base else { return Ok(false) };
        let Some(tree) = parts.tree(id) else { return Ok(false) };
        let found = tree.lookup(&*base.store, key);
        if_known(found.map(|found| found.is_some_and(|found| *found == *value)))
    }
}

/// Something of an older group that no copy is good of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Where it was: a block, a packed blob, or a sector of plain data.
    pub addr: Logical,
    /// Its checksum, padded with zeros.
    pub sum: [u8; 32],
    /// The newest group names it as well, in the same place: then it was not given up.
    pub is_named: bool,
}

/// A checksum of any kind, padded with zeros.
pub fn padded(sum: &[u8]) -> [u8; 32] {
    let mut padded = [0; 32];
    let width = sum.len().min(padded.len());
    padded[..width].copy_from_slice(&sum[..width]);
    padded
}

/// Finds out which of the suspects of an older group, sorted by address, the newest names as well.
/// Reads all trees of the newest. Returns whether all of these could be read: if not, it may name
/// others too.
///
/// # Errors
/// [`Error::Memory`].
pub fn find_named(
    devices: Vec<DeviceRef>,
    platform: &Platform,
    older: &Pool,
    suspects: &mut [Suspect],
) -> Result<bool> {
    let engine = match open_one(devices, quiet(platform), &to_look(None)) {
        Ok(engine) => engine,
        Err(Error::Memory) => return Err(Error::Memory),
        Err(_) => return Ok(false),
    };
    let parts = engine.parts();
    let mut naming = Naming { suspects, is_whole: true };
    if let Some(residue) = &parts.residue {
        naming.note(residue.addr, &residue.checksum);
    }
    let mut pass = Pass::default();
    while pass.step(&engine.store, &parts, &mut naming)? {}
    let is_whole = naming.is_whole;
    let newest = &engine.store.pool;
    for suspect in suspects.iter_mut().filter(|suspect| suspect.is_named) {
        // A chunk that has moved left what it held behind.
        suspect.is_named = older.chunk_of(suspect.addr) == newest.chunk_of(suspect.addr);
    }
    Ok(is_whole)
}

/// Marks what it comes to.
struct Naming<'a> {
    suspects: &'a mut [Suspect],
    is_whole: bool,
}

impl Naming<'_> {
    fn note(&mut self, addr: Logical, sum: &[u8]) {
        let sum = padded(sum);
        let first = self.suspects.partition_point(|suspect| suspect.addr < addr);
        let here = self.suspects[first..].iter_mut().take_while(|suspect| suspect.addr == addr);
        here.filter(|suspect| suspect.sum == sum).for_each(|suspect| suspect.is_named = true);
    }
}

impl Visitor for Naming<'_> {
    fn rootless(&mut self, _: TreeId, _: &Error) {
        self.is_whole = false;
    }

    fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
        self.note(seen.ptr.addr, &seen.ptr.checksum);
        match seen.error {
            Some(Error::Memory) => return Err(Error::Memory),
            error => self.is_whole &= error.is_none(),
        }
        Ok(())
    }

    fn data(&mut self, _: TreeId, _: &Key, _: Txg, source: DataSource) -> Result<()> {
        match source {
            DataSource::Packed { blob } => self.note(blob.addr, &blob.checksum),
            DataSource::Plain { addr, len, checksum_kind, checksums } => {
                let end = Logical(addr.0.saturating_add(len));
                let first = self.suspects.partition_point(|suspect| suspect.addr < addr);
                for suspect in &mut self.suspects[first..] {
                    if suspect.addr >= end {
                        break;
                    }
                    let sector = ((suspect.addr.0 - addr.0) >> SECTOR_SHIFT) as usize;
                    let sum = codec::sector_sum(checksum_kind, &checksums, sector);
                    suspect.is_named |= !sum.is_empty() && suspect.sum == padded(sum);
                }
            }
        }
        Ok(())
    }

    fn has_enough(&self) -> bool {
        false
    }
}
