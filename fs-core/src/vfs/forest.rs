//! One mount over several subvolumes and snapshots.
//!
//! A mount shows one subvolume, or one snapshot. In the root directory of a subvolume appear the
//! subvolumes that are directly in it, whose names begin with its own, and, for who looks it up,
//! `.cairn`, in which are its snapshots:
//!
//! ```text
//! /                        the subvolume that is mounted
//! /mail                    the subvolume "mail"
//! /mail/.cairn/snapshot/monday
//! ```
//!
//! A file or directory that has such a name already stays the one that is seen.
//!
//! # Numbers
//!
//! Inode numbers of a subvolume have 48 bits. Those of the mount carry a *slot* above them, so that
//! each is unique in the mount:
//!
//! | slot | is |
//! | --- | --- |
//! | 0 | what is mounted |
//! | n | the version with number n, if that is less than [`CONTROL`] and it was not let go of |
//! | others | given to versions as they are looked up |
//! | [`CONTROL`] | `.cairn` and `.cairn/snapshot` of subvolumes |
//!
//! So the numbers of most versions are the same in every mount, and file handles outlive one. A
//! slot is not given to another version as long as drivers hold on to an inode of the one that had
//! it: a number that a driver remembers names what it named, or nothing (ESTALE). After a rollback
//! a subvolume gets another slot, because what drivers remember of it is wrong. Generations carry
//! the version's number, so that a handle does not fit what has its slot later, or in another
//! mount. Listing gives no slots.
//!
//! A handle may carry any number. It leads only to what the mount shows: the subvolume that is
//! mounted, those below it, and their snapshots.
//!
//! # Use
//!
//! A version is opened when somebody comes to its slot, and closed when drivers have forgotten all
//! its inodes: the engine deletes no subvolume that is in use, and a snapshot that is deleted stays
//! as long as it is open. Who is to delete one, or to roll it back, holds everybody off first, and
//! then lets go of it or lets everybody in again, whatever the engine decides:
//!
//! ```text
//! open --hold_off()--> held off: who comes waits --nobody is in it--> not in use
//! held off --let_in()--> open, as before
//! held off --let_go()--> stale --drivers have forgotten all--> free
//! ```

#[cfg(test)]
mod tests;

use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::inode::mode;
use crate::format::pool::{INO_MAX, ROOT_INO};
use crate::subvol::versions::{Versions, CONTROL_NAME};
use crate::sync::{Rank, RwLock, Signal};
use crate::units::{Ino, TreeId};
use crate::vfs::{
    AccessTime, Attr, BlockPlaces, Caller, Dedupe, DirEntry, Fallocate, Filesystem, RenameFlags,
    Result, Seek, SetAttr, StatFs, Volume, WriteFlags, XattrMode,
};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{fence, AtomicU64, Ordering};

/// Spreads the numbers of versions over generations, of which drivers remember 32 bits.
const GENERATION_STEP: u64 = 0x9e37_79b1;

/// Bits of a number within a slot.
const INNER_BITS: u32 = 48;
/// The slot of what has no inode on disk.
const CONTROL: u16 = u16::MAX;
/// Name of the directory of snapshots in `.cairn`.
const SNAPSHOT_NAME: &[u8] = b"snapshot";
/// Added to the number of a subvolume that appears in a directory: its cookie there.
const NESTED_COOKIE: u64 = 1 << 62;
/// Versions that may be open before inodes in memory are dropped of all but the next.
const OPEN_MANY: usize = 16;

const _: () = assert!(INO_MAX >> INNER_BITS == 0);

/// A version that is open.
struct Slot {
    number: u16,
    volume: Arc<Volume>,
    /// How often drivers hold on to inodes of it. Outlives the slot.
    lookups: Arc<AtomicU64>,
}

#[derive(Default)]
struct Slots {
    open: BTreeMap<u16, Arc<Slot>>,
    /// The slot of each version that was looked up, in use or not.
    numbers: BTreeMap<u64, u16>,
    /// The version of each slot that has not its version's number.
    given: BTreeMap<u16, u64>,
    /// Slots of what is gone, and how often drivers still hold on to inodes of it.
    stale: BTreeMap<u16, Arc<AtomicU64>>,
    /// Slots that nobody may come to for the moment.
    held_off: BTreeSet<u16>,
    /// The slot that was given last to a version that has another number.
    last: u16,
}

impl Slots {
    /// The version that a slot is for, or would be.
    fn version_of(&self, slot: u16) -> u64 {
        self.given.get(&slot).copied().unwrap_or(u64::from(slot))
    }

    fn is_free(&self, slot: u16) -> bool {
        let has_own = self.numbers.get(&u64::from(slot)) == Some(&slot);
        !has_own && !self.stale.contains_key(&slot) && !self.given.contains_key(&slot)
    }

    /// The slot that a version has, or its own number if that is free.
    fn peek(&self, id: u64) -> Option<u16> {
        let own = || u16::try_from(id).ok().filter(|slot| (1..CONTROL).contains(slot));
        self.numbers.get(&id).copied().or_else(|| own().filter(|slot| self.is_free(*slot)))
    }

    /// A version that is open in a slot, if that is its slot and not held off.
    fn open_at(&self, slot: u16, id: u64) -> Option<Arc<Slot>> {
        let is_its = self.numbers.get(&id) == Some(&slot) && !self.held_off.contains(&slot);
        self.open.get(&slot).filter(|_| is_its).cloned()
    }

    /// The next slot for which something holds; it is the last one that was given now. What has no
    /// version of that number yet may get one, so it goes from the top downwards, and round.
    fn next_slot(&mut self, suits: impl Fn(&Slots, u16) -> bool) -> Option<u16> {
        let last = self.last;
        let mut round = (1..last).rev().chain((last.max(1)..CONTROL).rev());
        self.last = round.find(|slot| suits(self, *slot))?;
        Some(self.last)
    }

    /// A slot that a version had which nobody uses and of which drivers have forgotten all; the one
    /// that has had it longest.
    fn take_back(&mut self) -> Option<u16> {
        let is_unused = |slots: &Slots, slot: u16| {
            let is_used = slots.open.contains_key(&slot) || slots.held_off.contains(&slot);
            !is_used && !slots.stale.contains_key(&slot)
        };
        let slot = self.next_slot(is_unused)?;
        let id = self.version_of(slot);
        if self.numbers.get(&id) == Some(&slot) {
            self.numbers.remove(&id);
        }
        self.given.remove(&slot);
        Some(slot)
    }

    /// Gives a version a slot, unless it has one. `None` when drivers hold on to inodes in all.
    fn give(&mut self, id: u64) -> Option<u16> {
        let mut slot = self.peek(id);
        if slot.is_none() && self.numbers.len() + self.stale.len() < usize::from(CONTROL) - 1 {
            slot = self.next_slot(Slots::is_free);
        }
        let slot = slot.or_else(|| self.take_back())?;
        if u64::from(slot) != id {
            self.given.insert(slot, id);
        }
        self.numbers.insert(id, slot);
        Some(slot)
    }

    /// Drivers hold on to inodes of something stale less often: maybe its slot is free again.
    fn free_forgotten(&mut self, slot: u16) {
        let lookups = self.stale.get(&slot).map(|lookups| lookups.load(Ordering::Relaxed));
        if lookups == Some(0) {
            self.stale.remove(&slot);
        }
    }
}

/// A mount over several subvolumes and snapshots.
pub struct Forest {
    base: Arc<Volume>,
    access_time: AccessTime,
    /// What slots there are. Nothing that waits is called with it held.
    slots: RwLock<Slots>,
    /// Notified when somebody is let in again.
    let_in: Signal,
}

/// A directory that is not on disk, of the subvolume with that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Top(u64),
    Snapshots(u64),
}

impl Control {
    fn ino(self) -> Ino {
        let (id, which) = match self {
            Control::Top(id) => (id, 0),
            Control::Snapshots(id) => (id, 1),
        };
        number(CONTROL, Ino(id << 1 | which))
    }

    fn of(inner: Ino) -> Control {
        match inner.0 & 1 {
            0 => Control::Top(inner.0 >> 1),
            _ => Control::Snapshots(inner.0 >> 1),
        }
    }

    fn subvolume(self) -> u64 {
        match self {
            Control::Top(id) | Control::Snapshots(id) => id,
        }
    }
}

/// A volume while an operation goes on.
enum Held<'a> {
    Base(&'a Arc<Volume>),
    Slot(Arc<Slot>),
}

impl Deref for Held<'_> {
    type Target = Volume;

    fn deref(&self) -> &Volume {
        match self {
            Held::Base(volume) => volume,
            Held::Slot(slot) => &slot.volume,
        }
    }
}

impl Held<'_> {
    fn slot(&self) -> u16 {
        match self {
            Held::Base(_) => 0,
            Held::Slot(slot) => slot.number,
        }
    }

    /// A driver holds on to an inode once more.
    fn looked_up(&self) {
        if let Held::Slot(slot) = self {
            slot.lookups.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a number of the mount names.
enum Node<'a> {
    In(Held<'a>, Ino),
    Control(Control),
}

fn number(slot: u16, inner: Ino) -> Ino {
    Ino(u64::from(slot) << INNER_BITS | inner.0)
}

fn parts(ino: Ino) -> (u16, Ino) {
    ((ino.0 >> INNER_BITS) as u16, Ino(ino.0 & INO_MAX))
}

fn stale() -> Error {
    Errno::Stale.into()
}

/// The subvolumes directly in one, the oldest first, with what of their names is behind its own.
fn nested(versions: &Versions, id: u64) -> Vec<(u64, Vec<u8>)> {
    let Some(version) = versions.get(id) else { return Vec::new() };
    let skip = if version.name.is_empty() { 0 } else { version.name.len() + 1 };
    let last = |nested: u64| {
        let name = versions.get(nested)?.name.get(skip..)?;
        if versions.is_receiving(nested) {
            return None;
        }
        (!name.is_empty() && !name.contains(&b'/')).then(|| (nested, name.to_vec()))
    };
    let mut found = BTreeMap::new();
    found.extend(versions.nested(id).into_iter().filter_map(last));
    found.into_iter().collect()
}

/// The whole name of what appears in a subvolume under a name.
fn full_name(versions: &Versions, id: u64, name: &[u8]) -> Option<Vec<u8>> {
    let mut full = versions.get(id)?.name.clone();
    if !full.is_empty() {
        full.push(b'/');
    }
    full.extend_from_slice(name);
    Some(full)
}

impl Forest {
    /// A mount that shows `base`, and through it what is in it.
    pub fn new(base: Arc<Volume>) -> Arc<Forest> {
        let access_time = base.access_time;
        let slots = RwLock::ranked(Rank::Leaf, Slots::default());
        Arc::new(Forest { base, access_time, slots, let_in: Signal::new() })
    }

    /// What is mounted.
    pub fn base(&self) -> &Arc<Volume> {
        &self.base
    }

    fn engine(&self) -> &Arc<Engine> {
        self.base.engine()
    }

    fn held(&self, slot: u16) -> Result<Held<'_>> {
        if slot == 0 {
            return Ok(Held::Base(&self.base));
        }
        let id = loop {
            let slots = self.slots.read();
            if slots.held_off.contains(&slot) {
                drop(slots);
                self.wait_for(slot);
                continue;
            }
            if let Some(open) = slots.open.get(&slot) {
                return Ok(Held::Slot(open.clone()));
            }
            if slots.stale.contains_key(&slot) {
                return Err(stale());
            }
            break slots.version_of(slot);
        };
        // Nobody looked the version up in this mount, or all of it was forgotten.
        if !self.reaches(id) {
            return Err(stale());
        }
        let held = self.open(id).map_err(|error| match error {
            Error::Posix(Errno::NoEnt) => stale(),
            error => error,
        })?;
        if held.slot() == slot {
            Ok(held)
        } else {
            Err(stale())
        }
    }

    /// Waits while a slot is held off.
    fn wait_for(&self, slot: u16) {
        self.let_in.wait_until(|| !self.slots.read().held_off.contains(&slot));
    }

    /// Whether a version is one that the mount shows: what is mounted, what is below it, or one of
    /// their snapshots.
    fn reaches(&self, id: u64) -> bool {
        if self.base.is_snapshot() {
            return id == self.base.version();
        }
        self.engine().with_versions(|versions| {
            let owner = |id: u64| {
                let version = versions.get(id)?;
                match version.item.is_snapshot() {
                    true => versions.get(version.item.owner),
                    false => Some(version),
                }
            };
            let (Some(base), Some(found)) = (owner(self.base.version()), owner(id)) else {
                return false;
            };
            let below = found.name.strip_prefix(&base.name[..]);
            below.is_some_and(|rest| {
                base.name.is_empty() || rest.is_empty() || rest.starts_with(b"/")
            })
        })
    }

    fn node(&self, ino: Ino) -> Result<Node<'_>> {
        match parts(ino) {
            (CONTROL, inner) => {
                let control = Control::of(inner);
                let id = control.subvolume();
                match self.engine().subvol(TreeId(id)) {
                    Some(_) if self.reaches(id) => Ok(Node::Control(control)),
                    _ => Err(stale()),
                }
            }
            (slot, inner) => Ok(Node::In(self.held(slot)?, inner)),
        }
    }

    /// What has an inode on disk.
    fn place(&self, ino: Ino) -> Result<(Held<'_>, Ino)> {
        match self.node(ino)? {
            Node::In(held, inner) => Ok((held, inner)),
            Node::Control(_) => Err(Errno::RoFs.into()),
        }
    }

    /// Two inodes that have to be in one version. Its slot is asked for once: who waits for one
    /// that is held off must not be in any, or holding off would wait for it in turn.
    fn both(&self, one: Ino, other: Ino) -> Result<(Held<'_>, Ino, Ino)> {
        let (held, inner) = self.place(one)?;
        let (slot, other_inner) = parts(other);
        if slot == held.slot() {
            return Ok((held, inner, other_inner));
        }
        drop(held);
        self.place(other)?;
        Err(Errno::XDev.into())
    }

    /// The slot of a version.
    fn slot_of(&self, id: u64) -> Result<u16> {
        if id == self.base.version() {
            return Ok(0);
        }
        if let Some(slot) = self.slots.read().numbers.get(&id) {
            return Ok(*slot);
        }
        self.slots.write().give(id).ok_or(Error::Posix(Errno::NoMem))
    }

    /// What a listing shows as the number of a version's root directory: the one that it has, or
    /// will have as a rule, or one that nothing else has. Listing gives no slot.
    fn listed(&self, id: u64) -> Ino {
        let slot = match id == self.base.version() {
            true => Some(0),
            false => self.slots.read().peek(id),
        };
        // No control directory of a snapshot, or of a subvolume without a slot, has been shown.
        slot.map_or(Control::Top(id).ino(), |slot| number(slot, Ino(ROOT_INO)))
    }

    /// Opens a version, unless it is open.
    fn open(&self, id: u64) -> Result<Held<'_>> {
        loop {
            let number = self.slot_of(id)?;
            if number == 0 {
                return Ok(Held::Base(&self.base));
            }
            if self.is_held_off(number) {
                self.wait_for(number);
                continue;
            }
            if let Some(slot) = self.slots.read().open_at(number, id) {
                return Ok(Held::Slot(slot));
            }
            // Not under the lock: it reads.
            let volume = match Volume::of_version(self.engine().clone(), id, self.access_time) {
                // It has been held off since.
                Err(Error::Posix(Errno::Busy)) if self.is_held_off(number) => continue,
                opened => opened?,
            };
            if let Some(held) = self.install(id, number, volume)? {
                return Ok(held);
            }
        }
    }

    fn is_held_off(&self, number: u16) -> bool {
        self.slots.read().held_off.contains(&number)
    }

    /// Puts a version that was opened into its slot; `None` when that is not the slot any more, or
    /// is held off.
    fn install(&self, id: u64, number: u16, volume: Arc<Volume>) -> Result<Option<Held<'_>>> {
        let fresh = Arc::new(Slot { number, volume, lookups: Arc::default() });
        let mut many = Vec::new();
        let slot = {
            let mut slots = self.slots.write();
            if slots.stale.contains_key(&number) {
                return Err(stale());
            }
            if slots.numbers.get(&id) != Some(&number) || slots.held_off.contains(&number) {
                return Ok(None);
            }
            if slots.open.len() >= OPEN_MANY {
                many.extend(slots.open.values().cloned());
            }
            // Of two who open it at once one is first.
            slots.open.entry(number).or_insert_with(|| fresh.clone()).clone()
        };
        // Each has a table of inodes of its own, and together they must not take more and more.
        for slot in many {
            slot.volume.drop_clean();
        }
        Ok(Some(Held::Slot(slot)))
    }

    /// Closes a slot of which drivers have forgotten everything.
    fn close_forgotten(&self, number: u16) {
        let mut slots = self.slots.write();
        // Whoever begins to use it gets it from here, so nobody does if it is only here; and what
        // those counted who did before is seen only then.
        let is_forgotten = |slot: &Arc<Slot>| {
            let is_only_here = Arc::strong_count(slot) == 1;
            fence(Ordering::Acquire);
            is_only_here && slot.lookups.load(Ordering::Relaxed) == 0
        };
        let closed = match slots.open.get(&number).is_some_and(is_forgotten) {
            true => slots.open.remove(&number),
            false => None,
        };
        // It may have been let go of since.
        slots.free_forgotten(number);
        drop(slots);
        drop(closed);
    }

    /// Keeps everybody out of versions that may be about to be deleted or rolled back. True when
    /// nobody is in them any more, and then they are not in use; else it must be called again. Who
    /// comes waits, until one of [`Forest::let_in`] and [`Forest::let_go`] is called for each.
    pub fn hold_off(&self, ids: &[u64]) -> bool {
        let open: Vec<Arc<Slot>> = {
            let mut slots = self.slots.write();
            let numbers = ids.iter().filter(|id| **id != self.base.version());
            let numbers: Vec<u16> = numbers.filter_map(|id| slots.give(*id)).collect();
            slots.held_off.extend(numbers.iter().copied());
            let open = || numbers.iter().filter_map(|number| slots.open.get(number));
            // Whoever begins to use one gets it from here.
            if !open().all(|slot| Arc::strong_count(slot) == 1) {
                return false;
            }
            // What those counted who were in it is seen from here on.
            fence(Ordering::Acquire);
            open().cloned().collect()
        };
        open.iter().for_each(|slot| slot.volume.pause_use());
        true
    }

    /// Whether drivers hold on to an inode of a version: it may be in use, and there may be data of
    /// it that has not been written yet.
    pub fn is_remembered(&self, id: u64) -> bool {
        if id == self.base.version() {
            return true;
        }
        let slots = self.slots.read();
        let open = slots.numbers.get(&id).and_then(|number| slots.open.get(number));
        open.is_some_and(|slot| slot.lookups.load(Ordering::Acquire) > 0)
    }

    /// Nothing came of it: everybody may come to what was held off, and finds it as it was.
    pub fn let_in(&self, ids: &[u64]) {
        let mut gone = Vec::new();
        for id in ids {
            let open = {
                let slots = self.slots.read();
                slots.numbers.get(id).and_then(|number| slots.open.get(number)).cloned()
            };
            if open.is_some_and(|slot| slot.volume.resume_use().is_err()) {
                // Somebody else is about to end it.
                gone.push(*id);
            }
        }
        {
            let mut slots = self.slots.write();
            for id in ids {
                if let Some(number) = slots.numbers.get(id).copied() {
                    slots.held_off.remove(&number);
                }
            }
        }
        self.let_in.notify_all();
        gone.into_iter().for_each(|id| self.let_go(id));
    }

    /// Lets go of a version that was deleted or rolled back: its inodes are stale from now on.
    /// Operations under way still use it until they end.
    pub fn let_go(&self, id: u64) {
        let mut slots = self.slots.write();
        let Some(number) = slots.numbers.remove(&id) else { return };
        slots.given.remove(&number);
        slots.held_off.remove(&number);
        let closed = slots.open.remove(&number);
        if let Some(slot) = &closed {
            slots.stale.insert(number, slot.lookups.clone());
        }
        slots.free_forgotten(number);
        drop(slots);
        drop(closed);
        self.let_in.notify_all();
    }

    /// Where a version appears: a directory, and its name there. What drivers remember of both is
    /// wrong when the version comes, goes or is renamed.
    pub fn appears(&self, id: u64) -> Option<(Ino, Vec<u8>)> {
        let (dir, name) = self.engine().with_versions(|versions| {
            let version = versions.get(id).filter(|version| !version.item.is_deleted())?;
            if version.item.is_snapshot() {
                let dir = Control::Snapshots(version.item.owner);
                return Some((Err(dir), version.name.clone()));
            }
            let cut = version.name.iter().rposition(|byte| *byte == b'/');
            let (above, name) = match cut {
                Some(at) => (&version.name[..at], &version.name[at + 1..]),
                None => (&[][..], &version.name[..]),
            };
            Some((Ok(versions.subvolume(above)?), name.to_vec()))
        })?;
        match dir {
            Ok(above) => Some((self.listed(above), name)),
            Err(control) => Some((control.ino(), name)),
        }
    }

    /// The inodes of a subvolume that drivers know, as the mount numbers them.
    pub fn known(&self, id: u64) -> Vec<Ino> {
        let in_slot = |slot: u16, volume: &Volume| -> Vec<Ino> {
            volume.subvol.table.held().into_iter().map(|ino| number(slot, ino)).collect()
        };
        if self.base.version() == id {
            return in_slot(0, &self.base);
        }
        let open = {
            let slots = self.slots.read();
            let slot = slots.numbers.get(&id);
            slot.and_then(|slot| Some((*slot, slots.open.get(slot)?.clone())))
        };
        open.map_or(Vec::new(), |(slot, open)| in_slot(slot, &open.volume))
    }

    /// As [`Volume::block_places`].
    ///
    /// # Errors
    /// Those of it; EROFS for what is not on disk.
    pub fn block_places(&self, ino: Ino, first: u64, block: u64) -> Result<BlockPlaces> {
        let (held, inner) = self.place(ino)?;
        held.block_places(inner, first, block)
    }

    /// As [`Volume::block_hashes`].
    ///
    /// # Errors
    /// Those of it; EROFS for what is not on disk.
    pub fn block_hashes(
        &self,
        ino: Ino,
        block: u64,
        indices: &[u64],
    ) -> Result<Vec<Option<[u8; 32]>>> {
        let (held, inner) = self.place(ino)?;
        held.block_hashes(inner, block, indices)
    }

    /// The subvolume that appears in a directory under a name, if any does.
    fn nested_at(&self, held: &Volume, dir: Ino, name: &[u8]) -> Option<u64> {
        if dir.0 != ROOT_INO || held.is_snapshot() {
            return None;
        }
        let found = self.engine().with_versions(|versions| {
            let full = full_name(versions, held.version(), name)?;
            versions.subvolume(&full).filter(|id| !versions.is_receiving(*id))
        })?;
        // One whose group is not published yet is not there yet.
        self.engine().subvol(TreeId(found)).map(|_| found)
    }

    /// Whether something that is not on disk appears in a directory under a name.
    fn is_taken(&self, held: &Volume, dir: Ino, name: &[u8]) -> bool {
        let control = dir.0 == ROOT_INO && !held.is_snapshot() && name == CONTROL_NAME;
        control || self.nested_at(held, dir, name).is_some()
    }

    /// That a name can be made.
    fn check_free(&self, held: &Volume, dir: Ino, name: &[u8]) -> Result<()> {
        match self.is_taken(held, dir, name) {
            true => Err(Errno::Exist.into()),
            false => Ok(()),
        }
    }

    /// What stat(2) shows of an inode, as the mount numbers it.
    fn shown(&self, held: &Held<'_>, mut attr: Attr) -> Attr {
        if attr.ino.0 == ROOT_INO && !held.is_snapshot() {
            let id = held.version();
            let below = self.engine().with_versions(|versions| nested(versions, id).len());
            attr.nlink = attr.nlink.saturating_add(below as u32);
        }
        attr.ino = number(held.slot(), attr.ino);
        attr.generation ^= held.version().wrapping_mul(GENERATION_STEP);
        attr
    }

    /// As [`Forest::shown`], of an inode that a driver holds on to once more.
    fn found(&self, held: &Held<'_>, attr: Attr) -> Attr {
        held.looked_up();
        self.shown(held, attr)
    }

    /// The root directory of a version.
    fn enter(&self, id: u64) -> Result<Attr> {
        let held = self.open(id)?;
        let attr = held.lookup(Ino(ROOT_INO), b".")?;
        Ok(self.found(&held, attr))
    }

    fn control_attr(&self, control: Control) -> Result<Attr> {
        let held = self.open(control.subvolume())?;
        let mut attr = held.getattr(Ino(ROOT_INO))?;
        attr.ino = control.ino();
        attr.mode = mode::DIRECTORY | 0o555;
        (attr.nlink, attr.size, attr.blocks, attr.flags) = (2, 0, 0, 0);
        attr.nlink += u32::from(matches!(control, Control::Top(_)));
        attr.generation = 0;
        Ok(attr)
    }

    fn lookup_control(&self, control: Control, name: &[u8]) -> Result<Attr> {
        match (control, name) {
            (_, b".") => self.control_attr(control),
            (Control::Top(id), b"..") => self.enter(id),
            (Control::Top(id), SNAPSHOT_NAME) => self.control_attr(Control::Snapshots(id)),
            (Control::Top(_), _) => Err(Errno::NoEnt.into()),
            (Control::Snapshots(id), b"..") => self.control_attr(Control::Top(id)),
            (Control::Snapshots(id), name) => {
                let found = self.engine().with_versions(|versions| versions.snapshot(id, name));
                self.enter(found.ok_or(Error::Posix(Errno::NoEnt))?)
            }
        }
    }

    /// What is above the root directory of a version.
    fn lookup_above(&self, id: u64, is_snapshot: bool) -> Result<Attr> {
        if is_snapshot {
            let owner = self
                .engine()
                .with_versions(|versions| versions.get(id).map(|version| version.item.owner));
            return self.control_attr(Control::Snapshots(owner.ok_or(stale())?));
        }
        let above = self.engine().with_versions(|versions| {
            let name = &versions.get(id)?.name;
            let cut = name.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            versions.subvolume(&name[..cut])
        });
        self.enter(above.ok_or(stale())?)
    }

    /// Lists a directory that is not on disk: its dots, and what is in it.
    fn read_control(
        &self,
        control: Control,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let id = control.subvolume();
        let mut entries = Vec::new();
        let above = match control {
            Control::Top(id) => {
                entries.push((3, Control::Snapshots(id).ino(), SNAPSHOT_NAME.to_vec()));
                self.listed(id)
            }
            Control::Snapshots(_) => {
                let snapshots = self.engine().with_versions(|versions| {
                    let name = |id| Some((id, versions.get(id)?.name.clone()));
                    let mut all = BTreeMap::new();
                    all.extend(versions.snapshots(id).into_iter().filter_map(name));
                    all
                });
                for (id, name) in snapshots.into_iter().filter(|(id, _)| *id > cookie) {
                    entries.push((id, self.listed(id), name));
                }
                Control::Top(id).ino()
            }
        };
        let dots = [(1, control.ino(), b".".to_vec()), (2, above, b"..".to_vec())];
        for (at, ino, name) in dots.iter().chain(&entries).filter(|(at, ..)| *at > cookie) {
            let file_type = mode::DIRECTORY;
            if !each(&DirEntry { ino: *ino, cookie: *at, file_type, name }) {
                break;
            }
        }
        Ok(())
    }

    /// Lists the subvolumes that appear in a directory; with `each` come their numbers.
    fn read_nested(
        &self,
        held: &Held<'_>,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(u64, &DirEntry<'_>) -> bool,
    ) -> Result<()> {
        if dir.0 != ROOT_INO || held.is_snapshot() {
            return Ok(());
        }
        let all = self.engine().with_versions(|versions| nested(versions, held.version()));
        for (id, name) in all {
            let at = NESTED_COOKIE | id;
            let is_there = |id| self.engine().subvol(TreeId(id)).is_some();
            if at <= cookie || !is_there(id) || held.has_name(dir, &name)? {
                continue;
            }
            let ino = self.listed(id);
            let entry = DirEntry { ino, cookie: at, file_type: mode::DIRECTORY, name: &name };
            if !each(id, &entry) {
                break;
            }
        }
        Ok(())
    }
}

/// An entry as the mount numbers it.
fn in_slot<'a>(slot: u16, entry: &DirEntry<'a>) -> DirEntry<'a> {
    DirEntry { ino: number(slot, entry.ino), ..*entry }
}

impl Filesystem for Forest {
    fn root(&self) -> Ino {
        Ino(ROOT_INO)
    }

    fn statfs(&self) -> Result<StatFs> {
        self.base.statfs()
    }

    fn statfs_at(&self, ino: Ino) -> Result<StatFs> {
        match self.node(ino)? {
            Node::In(held, _) => held.statfs(),
            Node::Control(_) => self.base.statfs(),
        }
    }

    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        let (held, inner) = match self.node(dir)? {
            Node::In(held, inner) => (held, inner),
            Node::Control(control) => return self.lookup_control(control, name),
        };
        if name == b".." && inner.0 == ROOT_INO && held.slot() != 0 {
            let (id, is_snapshot) = (held.version(), held.is_snapshot());
            // What is above may be held off, and so may this one: see `Forest::both`.
            drop(held);
            return self.lookup_above(id, is_snapshot);
        }
        match held.lookup(inner, name) {
            Err(Error::Posix(Errno::NoEnt)) if inner.0 == ROOT_INO && !held.is_snapshot() => {}
            found => return found.map(|attr| self.found(&held, attr)),
        }
        let (id, nested) = (held.version(), self.nested_at(&held, inner, name));
        drop(held);
        match nested {
            Some(nested) => self.enter(nested),
            None if name == CONTROL_NAME => self.control_attr(Control::Top(id)),
            None => Err(Errno::NoEnt.into()),
        }
    }

    fn forget(&self, ino: Ino, count: u64) {
        let (number, inner) = parts(ino);
        if number == 0 {
            return self.base.forget(inner, count);
        }
        let less = |lookups: &AtomicU64| {
            let less = |lookups: u64| Some(lookups.saturating_sub(count));
            lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
        };
        let slot = loop {
            let slots = self.slots.read();
            if slots.held_off.contains(&number) {
                drop(slots);
                self.wait_for(number);
                continue;
            }
            break match slots.open.get(&number) {
                Some(slot) => slot.clone(),
                None => {
                    let is_last = slots
                        .stale
                        .get(&number)
                        .is_some_and(|lookups| less(lookups).is_ok_and(|before| before <= count));
                    drop(slots);
                    if is_last {
                        self.slots.write().free_forgotten(number);
                    }
                    return;
                }
            };
        };
        slot.volume.forget(inner, count);
        let before = less(&slot.lookups);
        drop(slot);
        if before.is_ok_and(|before| before <= count) {
            self.close_forgotten(number);
        }
    }

    fn getattr(&self, ino: Ino) -> Result<Attr> {
        match self.node(ino)? {
            Node::In(held, inner) => Ok(self.shown(&held, held.getattr(inner)?)),
            Node::Control(control) => self.control_attr(control),
        }
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, caller: &Caller) -> Result<Attr> {
        let (held, inner) = self.place(ino)?;
        Ok(self.shown(&held, held.setattr(inner, set, caller)?))
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let (held, inner) = self.place(ino)?;
        held.readlink(inner)
    }

    fn mknod(&self, dir: Ino, name: &[u8], mode: u32, rdev: u64, caller: &Caller) -> Result<Attr> {
        let (held, inner) = self.place(dir)?;
        self.check_free(&held, inner, name)?;
        Ok(self.found(&held, held.mknod(inner, name, mode, rdev, caller)?))
    }

    fn mkdir(&self, dir: Ino, name: &[u8], mode: u32, caller: &Caller) -> Result<Attr> {
        let (held, inner) = self.place(dir)?;
        self.check_free(&held, inner, name)?;
        Ok(self.found(&held, held.mkdir(inner, name, mode, caller)?))
    }

    fn symlink(&self, dir: Ino, name: &[u8], target: &[u8], caller: &Caller) -> Result<Attr> {
        let (held, inner) = self.place(dir)?;
        self.check_free(&held, inner, name)?;
        Ok(self.found(&held, held.symlink(inner, name, target, caller)?))
    }

    fn tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr> {
        let (held, inner) = self.place(dir)?;
        Ok(self.found(&held, held.tmpfile(inner, mode, caller)?))
    }

    fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        let (held, inner, inner_dir) = self.both(ino, dir)?;
        self.check_free(&held, inner_dir, name)?;
        Ok(self.found(&held, held.link(inner, inner_dir, name)?))
    }

    fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        let (held, inner) = self.place(dir)?;
        match held.unlink(inner, name) {
            Err(Error::Posix(Errno::NoEnt)) if self.is_taken(&held, inner, name) => {
                Err(Errno::IsDir.into())
            }
            done => done,
        }
    }

    fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        let (held, inner) = self.place(dir)?;
        match held.rmdir(inner, name) {
            Err(Error::Posix(Errno::NoEnt)) if self.is_taken(&held, inner, name) => {
                Err(Errno::Busy.into())
            }
            done => done,
        }
    }

    fn rename(
        &self,
        dir: Ino,
        name: &[u8],
        new_dir: Ino,
        new_name: &[u8],
        flags: RenameFlags,
        caller: &Caller,
    ) -> Result<()> {
        let (held, inner, new_inner) = self.both(dir, new_dir)?;
        // What is on disk has its name before what appears.
        if self.is_taken(&held, new_inner, new_name) && !held.has_name(new_inner, new_name)? {
            return Err(Errno::Busy.into());
        }
        match held.rename(inner, name, new_inner, new_name, flags, caller) {
            Err(Error::Posix(Errno::NoEnt)) if self.is_taken(&held, inner, name) => {
                Err(Errno::Busy.into())
            }
            done => done,
        }
    }

    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        let (held, inner) = self.place(ino)?;
        held.read(inner, offset, out)
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], flags: WriteFlags) -> Result<u64> {
        let (held, inner) = self.place(ino)?;
        held.write(inner, offset, data, flags)
    }

    fn check_write(&self, ino: Ino, bytes: u64) -> Result<()> {
        let (held, inner) = self.place(ino)?;
        held.check_write(inner, bytes)
    }

    fn never_changes(&self, ino: Ino) -> bool {
        match parts(ino) {
            // A mount of a snapshot is read-only as a whole. There are no files in the others.
            (CONTROL, _) => false,
            (0, _) => !self.base.is_snapshot() && self.base.refuses_changes(),
            (slot, _) => {
                let slots = self.slots.read();
                slots.open.get(&slot).is_some_and(|slot| slot.volume.refuses_changes())
            }
        }
    }

    fn fallocate(&self, ino: Ino, op: Fallocate, offset: u64, len: u64) -> Result<()> {
        let (held, inner) = self.place(ino)?;
        held.fallocate(inner, op, offset, len)
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let (held, inner) = self.place(ino)?;
        held.seek(inner, offset, what)
    }

    fn copy_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<u64> {
        let (held, source, target) = self.both(source, target)?;
        held.copy_range(source, source_offset, target, target_offset, len)
    }

    fn dedupe_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<Dedupe> {
        let (held, source, target) = self.both(source, target)?;
        held.dedupe_range(source, source_offset, target, target_offset, len)
    }

    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()> {
        match self.node(ino)? {
            Node::In(held, inner) => held.fsync(inner, data_only),
            Node::Control(_) => Ok(()),
        }
    }

    fn sync(&self) -> Result<()> {
        self.base.sync()
    }

    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let (held, inner) = match self.node(dir)? {
            Node::In(held, inner) => (held, inner),
            Node::Control(control) => return self.read_control(control, cookie, each),
        };
        let mut go_on = true;
        if cookie < NESTED_COOKIE {
            held.readdir(inner, cookie, &mut |entry| {
                go_on = each(&in_slot(held.slot(), entry));
                go_on
            })?;
        }
        match go_on {
            true => self.read_nested(&held, inner, cookie, &mut |_, entry| each(entry)),
            false => Ok(()),
        }
    }

    fn readdir_ahead(&self, dir: Ino, cookie: u64) {
        if let Ok(Node::In(held, inner)) = self.node(dir) {
            held.readdir_ahead(inner, cookie);
        }
    }

    fn counts_changes_to(&self, dir: Ino, cookie: u64) -> bool {
        cookie < NESTED_COOKIE && matches!(self.node(dir), Ok(Node::In(..)))
    }

    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        let (held, inner) = match self.node(dir)? {
            Node::In(held, inner) => (held, inner),
            // The driver looks up what it wants to know of them.
            Node::Control(control) => {
                return self.read_control(control, cookie, &mut |entry| each(entry, None));
            }
        };
        let mut go_on = true;
        if cookie < NESTED_COOKIE {
            held.readdir_plus(inner, cookie, &mut |entry, attr| {
                let dots = matches!(entry.name, b"." | b"..");
                let known = attr.map(|attr| self.shown(&held, *attr));
                go_on = each(&in_slot(held.slot(), entry), known.as_ref());
                if go_on && known.is_some() && !dots {
                    held.looked_up();
                }
                go_on
            })?;
        }
        if !go_on {
            return Ok(());
        }
        self.read_nested(&held, inner, cookie, &mut |_, entry| each(entry, None))
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        match self.node(ino)? {
            Node::In(held, inner) => held.getxattr(inner, name),
            Node::Control(_) => Err(Errno::NoData.into()),
        }
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        let (held, inner) = self.place(ino)?;
        held.setxattr(inner, name, value, mode)
    }

    fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        match self.node(ino)? {
            Node::In(held, inner) => held.listxattr(inner),
            Node::Control(_) => Ok(Vec::new()),
        }
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        let (held, inner) = self.place(ino)?;
        held.removexattr(inner, name)
    }

    fn label(&self) -> Vec<u8> {
        self.base.label()
    }

    fn set_label(&self, name: &[u8]) -> Result<()> {
        self.base.set_label(name)
    }

    fn trim(&self, offset: u64, len: u64, min_len: u64) -> Result<u64> {
        self.base.trim(offset, len, min_len)
    }

    fn shutdown(&self) {
        self.base.shutdown();
    }
}
