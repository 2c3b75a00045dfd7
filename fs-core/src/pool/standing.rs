//! Which devices have everything.
//!
//! A device is *complete* while it has everything that the pool wrote to it. Every label has a
//! table of the pool's devices that says which of them are not: when one fails a write or a flush,
//! or is missing when the pool begins to write, it is *left behind*, which all others have in their
//! labels before anything counts on it:
//!
//! ```text
//! a write fails on device 1 -> labels of 0 and 2: "epoch 5: 1 is behind since group 812"
//!                           -> the write is done, as far as anybody is told
//! ```
//!
//! So what is acknowledged is on every complete device, and after a crash whoever opens the pool
//! knows which those are: the label with the greatest *epoch* has the table that counts. What must
//! never happen: something being acknowledged that a device lacks which the newest table calls
//! complete.
//!
//! A device is left behind only if the others have a copy of everything. Otherwise the failure is
//! that of the write, and the pool stops publishing.
//!
//! # Opening
//!
//! - The table of the greatest epoch counts; of two, that of the device with the newest superblock.
//! - The newest superblock of the complete devices is the pool's. That of a device that was left
//!   behind is older, and is not looked at.
//! - A device that was left behind may have gone its own way: opened alone, it left the others
//!   behind, and published groups that they do not have. Then neither side is the right one, and
//!   the pool is refused until one of them is taken away.
//! - With devices missing, each chunk must have a copy on devices that are complete.
//! - Before the pool writes anything, missing devices are left behind, and the superblock is put
//!   where a crash kept it from. Without that, a device that lacks it would be opened at the group
//!   before when it is alone, whose blocks have been used for something else by then.

use super::Pool;
use crate::device::{Identity, Member, Ring, Standing};
use crate::error::{Error, Incident};
use crate::format::superblock::Superblock;
use crate::platform::Result;
use crate::units::Txg;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// What the labels of the devices that are there agree on.
pub(super) struct Roll {
    /// Identity of the device whose label counts.
    pub newest: Identity,
    /// What the rings of complete devices hold.
    pub ring: Ring,
}

/// Compares the labels and rings of the devices that are there, sorted by index, and sets their
/// standing.
///
/// # Errors
/// [`Error::WrongDevice`], [`Error::Split`], [`Error::Corrupt`], [`Error::Memory`].
pub(super) fn call_roll(members: &[Member]) -> Result<Roll> {
    let pool_id = members[0].identity().pool_id;
    let mut rings = Vec::with_capacity(members.len());
    for member in members {
        let mut ring = Ring::default();
        ring.add(member, &pool_id)?;
        rings.push(ring);
    }
    let rank = |index: usize| {
        let identity = members[index].identity();
        let behind = identity.table.iter().filter(|entry| entry.behind.is_some()).count();
        (identity.epoch, rings[index].newest(), core::cmp::Reverse(behind), identity.sequence)
    };
    let best = (0..members.len()).rev().max_by_key(|index| rank(*index)).unwrap_or_default();
    let newest = members[best].identity();
    for member in members {
        let identity = member.identity();
        let is_known = match newest.table.get(usize::from(member.index())) {
            Some(entry) => entry.id == identity.device_id && entry.bytes == identity.bytes,
            // A pool that always had one device has no table.
            None => newest.table.is_empty() && members.len() == 1 && member.index() == 0,
        };
        if !is_known {
            return Err(Error::WrongDevice { name: member.name().to_string() });
        }
    }
    let behind = |index: u16| newest.table.get(usize::from(index)).and_then(|entry| entry.behind);
    let mut ring = Ring::default();
    for (member, own) in members.iter().zip(&rings) {
        if behind(member.index()).is_none() {
            ring.merge(own);
        }
    }
    let mut apart = Vec::new();
    for (member, own) in members.iter().zip(&rings) {
        if let Some(since) = behind(member.index()) {
            member.set_standing(Standing::Behind);
            if went_apart(&member.identity(), own, since, &newest, &ring) {
                apart.push(member.index());
            }
        }
    }
    match apart.is_empty() {
        true => Ok(Roll { newest, ring }),
        false => Err(Error::Split { devices: apart }),
    }
}

/// Whether a device that the newest table calls behind has published groups without the others.
fn went_apart(identity: &Identity, own: &Ring, since: Txg, newest: &Identity, ring: &Ring) -> bool {
    let both = identity.table.iter().zip(&newest.table);
    let left_others =
        both.into_iter().any(|(own, entry)| own.behind.is_some() && entry.behind.is_none());
    let has_own_group = own
        .valid
        .first()
        .is_some_and(|superblock| superblock.txg > since && !ring.valid.contains(superblock));
    left_others && has_own_group
}

/// Adds what stands for missing devices. Returns the members by index.
///
/// # Errors
/// [`Error::Corrupt`] for a table that cannot be.
pub(super) fn fill_gaps(members: Vec<Member>, newest: &Identity) -> Result<Vec<Member>> {
    let mut all: Vec<Member> = Vec::with_capacity(newest.table.len().max(1));
    let mut there = members.into_iter().peekable();
    for (index, entry) in (0..).zip(&newest.table) {
        match there.next_if(|member| member.index() == index) {
            Some(member) => all.push(member),
            None => {
                let identity =
                    Identity { index, device_id: entry.id, bytes: entry.bytes, ..newest.clone() };
                all.push(Member::missing(identity)?);
            }
        }
    }
    all.extend(there);
    Ok(all)
}

impl Pool {
    /// For each device, whether it is complete.
    pub(super) fn complete(&self) -> Vec<bool> {
        self.members().iter().map(Member::is_complete).collect()
    }

    /// Devices that are missing or have failed.
    pub fn absent(&self) -> Vec<u16> {
        let absent = self.members().iter().filter(|member| !member.is_there());
        absent.map(Member::index).collect()
    }

    /// Whether each column of each chunk has a copy on a device for which `good` holds.
    fn has_all(&self, good: &dyn Fn(u16) -> bool) -> bool {
        self.chunk_map().iter().all(|mapped| {
            let chunk = &mapped.chunk;
            let mut columns = chunk.stripes.chunks(chunk.profile.copies() as usize);
            columns.all(|copies| copies.iter().any(|stripe| good(stripe.device)))
        })
    }

    /// Whether everything that is mapped can be had from the devices that are there.
    ///
    /// # Errors
    /// [`Error::MissingDevices`] when not.
    pub(super) fn check_reach(&self) -> Result<()> {
        let good = |device: u16| {
            // What is read is verified; but what is not there cannot be written.
            let member = self.member(device);
            member.is_complete() || self.read_only() && member.is_there()
        };
        if self.has_all(&good) {
            return Ok(());
        }
        Err(self.missing_devices(true))
    }

    /// The error for devices that are missing.
    pub(super) fn missing_devices(&self, needed: bool) -> Error {
        let named = |index: u16| (index, self.member(index).identity().device_id);
        Error::MissingDevices { devices: self.absent().into_iter().map(named).collect(), needed }
    }

    /// Makes sure, when all chunks are mapped and before anything is written or replayed, that the
    /// pool can be relied on; leaves missing devices behind and repairs what a crash left undone
    /// between devices. `superblock` is the one that was opened.
    ///
    /// # Errors
    /// [`Error::MissingDevices`], errors of devices that cannot be done without.
    pub fn begin(&self, superblock: &Superblock) -> Result<()> {
        self.check_reach()?;
        if self.read_only() {
            return Ok(());
        }
        let mut table = self.roll.lock().clone();
        let mut is_new = false;
        for (entry, member) in table.table.iter_mut().zip(self.members()) {
            if entry.behind.is_none() && !member.is_there() {
                entry.behind = Some(superblock.txg);
                is_new = true;
            }
        }
        if is_new {
            table.epoch += 1;
        }
        let failed = self.write_tables(&table, &[]);
        *self.roll.lock() = table;
        self.leave_behind(failed)?;
        let mut failed = Vec::new();
        for member in self.members().iter().filter(|member| member.is_there()) {
            if let Err(error) = member.complete_superblock(superblock) {
                failed.push((member.index(), error));
            }
        }
        self.leave_behind(failed)
    }

    /// Writes the table into the labels that have another, of devices that are there and not in
    /// `without`. Returns those that failed.
    fn write_tables(&self, roll: &Identity, without: &[u16]) -> Vec<(u16, Error)> {
        let now = self.platform().clock.now().secs;
        let mut failed = Vec::new();
        for member in self.members() {
            let identity = member.identity();
            let is_right = (identity.epoch, &identity.table) == (roll.epoch, &roll.table)
                && identity.name == roll.name;
            if is_right || !member.is_there() || without.contains(&member.index()) {
                continue;
            }
            let written = member.relabel(now, |identity| {
                identity.epoch = roll.epoch;
                identity.table.clone_from(&roll.table);
                identity.name = roll.name;
            });
            if let Err(error) = written {
                failed.push((member.index(), error));
            }
        }
        failed
    }

    /// Goes on without the devices that failed, or says why that cannot be: the first failure.
    pub(super) fn leave_behind(&self, failed: Vec<(u16, Error)>) -> Result<()> {
        let Some((_, first)) = failed.first() else { return Ok(()) };
        let first = first.clone();
        if let Some((_, other)) = failed.iter().find(|(_, e)| !matches!(e, Error::Device { .. })) {
            // That says nothing about the device.
            return Err(other.clone());
        }
        let _one_at_a_time = self.changing.lock();
        let mut lost: Vec<(u16, Error)> = Vec::new();
        let mut news = failed;
        loop {
            // Someone else may have left it behind meanwhile.
            news.retain(|(index, _)| {
                self.member(*index).is_there() && lost.iter().all(|(other, _)| other != index)
            });
            if news.is_empty() {
                break;
            }
            lost.append(&mut news);
            let indices: Vec<u16> = lost.iter().map(|(index, _)| *index).collect();
            let good = |index: u16| self.member(index).is_complete() && !indices.contains(&index);
            let is_anyone = self.members().iter().any(|member| good(member.index()));
            if !is_anyone || !self.has_all(&good) {
                return Err(first);
            }
            if indices.iter().any(|index| self.member(*index).is_complete()) {
                let mut roll = self.roll.lock().clone();
                let since = Txg(self.published_txg.load(Ordering::Acquire).max(1));
                for index in &indices {
                    roll.table[usize::from(*index)].behind.get_or_insert(since);
                }
                roll.epoch += 1;
                news = self.write_tables(&roll, &indices);
                *self.roll.lock() = roll;
            }
        }
        for (index, error) in lost {
            let member = self.member(index);
            member.set_standing(Standing::Absent);
            let incident =
                Incident::DeviceFailed { device: index, name: member.name().to_string(), error };
            self.platform().report.incident(&incident);
        }
        Ok(())
    }
}
