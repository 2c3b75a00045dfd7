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
//! slot is never given to another version: a number that a driver remembers names what it named, or
//! nothing (ESTALE). After a rollback a subvolume gets another slot, because what drivers remember
//! of it is wrong. Generations carry the version's number, so that a handle of a slot that was
//! given away by one mount does not fit what has that slot in the next.
//!
//! A version is opened when somebody comes to its slot, and closed when drivers have forgotten all
//! its inodes: the engine deletes no subvolume that is open, and a snapshot that is deleted stays
//! as long as it is open. Who deletes one in spite of that lets go of it first
//! ([`Forest::let_go`]): files that are open in it are stale then.

#[cfg(test)]
mod tests;

use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::inode::mode;
use crate::format::pool::{INO_MAX, ROOT_INO};
use crate::subvol::versions::{Versions, CONTROL_NAME};
use crate::sync::{Rank, RwLock};
use crate::units::{Ino, TreeId};
use crate::vfs::{
    AccessTime, Attr, Caller, DirEntry, Fallocate, Filesystem, RenameFlags, Result, Seek, SetAttr,
    StatFs, Volume, WriteFlags, XattrMode,
};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

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
    /// How often drivers hold on to inodes of it.
    lookups: AtomicU64,
}

#[derive(Default)]
struct Slots {
    open: BTreeMap<u16, Arc<Slot>>,
    /// The slot of each version that was looked up, in use or not.
    numbers: BTreeMap<u64, u16>,
    /// The version of each slot that has not its version's number.
    given: BTreeMap<u16, u64>,
    /// Slots of what is gone.
    stale: BTreeSet<u16>,
}

/// A mount over several subvolumes and snapshots.
pub struct Forest {
    base: Arc<Volume>,
    access_time: AccessTime,
    /// What slots there are. Nothing that waits is called with it held.
    slots: RwLock<Slots>,
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
        Arc::new(Forest { base, access_time, slots: RwLock::ranked(Rank::Leaf, Slots::default()) })
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
        let id = {
            let slots = self.slots.read();
            if let Some(open) = slots.open.get(&slot) {
                return Ok(Held::Slot(open.clone()));
            }
            if slots.stale.contains(&slot) {
                return Err(stale());
            }
            slots.given.get(&slot).copied().unwrap_or(u64::from(slot))
        };
        // Nobody looked the version up in this mount, or all of it was forgotten.
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

    fn node(&self, ino: Ino) -> Result<Node<'_>> {
        match parts(ino) {
            (CONTROL, inner) => {
                let control = Control::of(inner);
                match self.engine().subvol(TreeId(control.subvolume())) {
                    Some(_) => Ok(Node::Control(control)),
                    None => Err(stale()),
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

    /// The slot of a version.
    fn slot_of(&self, id: u64) -> Result<u16> {
        if id == self.base.version() {
            return Ok(0);
        }
        if let Some(slot) = self.slots.read().numbers.get(&id) {
            return Ok(*slot);
        }
        let mut slots = self.slots.write();
        if let Some(slot) = slots.numbers.get(&id) {
            return Ok(*slot);
        }
        let own = u16::try_from(id).ok().filter(|slot| (1..CONTROL).contains(slot));
        let free = |slot: &u16| {
            let has_own = slots.numbers.get(&u64::from(*slot)) == Some(slot);
            !has_own && !slots.stale.contains(slot) && !slots.given.contains_key(slot)
        };
        // What has no version of that number yet may get one, so search from the top.
        let slot = own.filter(free).or_else(|| (1..CONTROL).rev().find(free));
        let slot = slot.ok_or(Error::Posix(Errno::NoMem))?;
        if Some(slot) != own {
            slots.given.insert(slot, id);
        }
        slots.numbers.insert(id, slot);
        Ok(slot)
    }

    /// Opens a version, unless it is open.
    fn open(&self, id: u64) -> Result<Held<'_>> {
        let number = self.slot_of(id)?;
        if number == 0 {
            return Ok(Held::Base(&self.base));
        }
        if let Some(slot) = self.slots.read().open.get(&number) {
            return Ok(Held::Slot(slot.clone()));
        }
        // Not under the lock: it reads.
        let volume = Volume::of_version(self.engine().clone(), id, self.access_time)?;
        let fresh = Arc::new(Slot { number, volume, lookups: AtomicU64::new(0) });
        let mut many = Vec::new();
        let slot = {
            let mut slots = self.slots.write();
            if slots.stale.contains(&number) {
                return Err(stale());
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
        Ok(Held::Slot(slot))
    }

    /// Closes a slot of which drivers have forgotten everything.
    fn close_forgotten(&self, number: u16) {
        let mut slots = self.slots.write();
        // Whoever begins to use it gets it from here, so nobody does if it is only here.
        let is_forgotten = |slot: &Arc<Slot>| {
            slot.lookups.load(Ordering::Relaxed) == 0 && Arc::strong_count(slot) == 1
        };
        let closed = match slots.open.get(&number).is_some_and(is_forgotten) {
            true => slots.open.remove(&number),
            false => None,
        };
        drop(slots);
        drop(closed);
    }

    /// Lets go of a version that is about to be deleted or rolled back, or was: its inodes are
    /// stale from now on. Operations under way still use it until they end.
    pub fn let_go(&self, id: u64) {
        let mut slots = self.slots.write();
        let Some(number) = slots.numbers.remove(&id) else { return };
        slots.given.remove(&number);
        slots.stale.insert(number);
        let closed = slots.open.remove(&number);
        drop(slots);
        drop(closed);
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
            Ok(above) => Some((number(self.slot_of(above).ok()?, Ino(ROOT_INO)), name)),
            Err(control) => Some((control.ino(), name)),
        }
    }

    /// The subvolume that appears in a directory under a name, if any does.
    fn nested_at(&self, held: &Volume, dir: Ino, name: &[u8]) -> Option<u64> {
        if dir.0 != ROOT_INO || held.is_snapshot() {
            return None;
        }
        let found = self.engine().with_versions(|versions| {
            let full = full_name(versions, held.version(), name)?;
            versions.subvolume(&full)
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
        if let Held::Slot(slot) = held {
            attr.ino = number(slot.number, attr.ino);
            attr.generation ^= slot.volume.version();
        }
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
    fn lookup_above(&self, held: &Held<'_>) -> Result<Attr> {
        let id = held.version();
        if held.is_snapshot() {
            let owner = self
                .engine()
                .with_versions(|versions| versions.get(id).map_or(0, |version| version.item.owner));
            return self.control_attr(Control::Snapshots(owner));
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
                number(self.slot_of(id)?, Ino(ROOT_INO))
            }
            Control::Snapshots(_) => {
                let snapshots = self.engine().with_versions(|versions| {
                    let name = |id| Some((id, versions.get(id)?.name.clone()));
                    let mut all = BTreeMap::new();
                    all.extend(versions.snapshots(id).into_iter().filter_map(name));
                    all
                });
                for (id, name) in snapshots.into_iter().filter(|(id, _)| *id > cookie) {
                    entries.push((id, number(self.slot_of(id)?, Ino(ROOT_INO)), name));
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
            let ino = number(self.slot_of(id)?, Ino(ROOT_INO));
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
            return self.lookup_above(&held);
        }
        match held.lookup(inner, name) {
            Err(Error::Posix(Errno::NoEnt)) if inner.0 == ROOT_INO && !held.is_snapshot() => {}
            found => return found.map(|attr| self.found(&held, attr)),
        }
        if let Some(id) = self.nested_at(&held, inner, name) {
            return self.enter(id);
        }
        match name == CONTROL_NAME {
            true => self.control_attr(Control::Top(held.version())),
            false => Err(Errno::NoEnt.into()),
        }
    }

    fn forget(&self, ino: Ino, count: u64) {
        let (number, inner) = parts(ino);
        if number == 0 {
            return self.base.forget(inner, count);
        }
        // Of what is stale nothing is held.
        let open = self.slots.read().open.get(&number).cloned();
        let Some(slot) = open else { return };
        slot.volume.forget(inner, count);
        let less = |lookups: u64| Some(lookups.saturating_sub(count));
        let before = slot.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
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
        let ((source, inner), (held, inner_dir)) = (self.place(ino)?, self.place(dir)?);
        if source.slot() != held.slot() {
            return Err(Errno::XDev.into());
        }
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
        let ((held, inner), (target, new_inner)) = (self.place(dir)?, self.place(new_dir)?);
        if held.slot() != target.slot() {
            return Err(Errno::XDev.into());
        }
        // What is on disk has its name before what appears.
        if self.is_taken(&target, new_inner, new_name) && !target.has_name(new_inner, new_name)? {
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
            (0 | CONTROL, _) => false,
            (slot, _) => {
                self.slots.read().open.get(&slot).is_some_and(|slot| slot.volume.is_snapshot())
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
        let ((from, source), (to, target)) = (self.place(source)?, self.place(target)?);
        if from.slot() != to.slot() {
            return Err(Errno::XDev.into());
        }
        to.copy_range(source, source_offset, target, target_offset, len)
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
