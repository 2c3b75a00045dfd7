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
//! ```text
//! complete --fails--> leaving --labels of all others tell--> absent
//! missing when the pool begins to write --labels tell-------> absent
//! behind in the labels when the pool is opened: behind ------fails--> absent
//!                                               behind --brought up to date--> complete
//! ```
//!
//! What failed and is not in the labels yet is *owed*. As long as anything is owed, no write, no
//! flush and no superblock is done, whatever device it was for: each settles first. So it does not
//! matter between which two steps the next device fails. A device is left behind only if the others
//! have a copy of everything, with no chunk being made meanwhile. If they have not, it stays owed,
//! which is the end of writing: the pool stops publishing, and the labels say no more than what
//! holds of what was acknowledged.
//!
//! # Opening
//!
//! - The table of the greatest epoch counts; of two, that of the device with the newest superblock.
//! - A device that it calls complete and that lacks more than the newest superblock is an old copy,
//!   and behind.
//! - The newest superblock of the complete devices is the pool's. That of a device that was left
//!   behind is older, and is not looked at.
//! - A device that was left behind may have gone its own way: opened alone, it left the others
//!   behind, and published groups that they do not have. Then neither side is the right one, and
//!   the pool is refused until one of them is taken away. One that did not is told by its label
//!   that it is behind, before anything else is written to it. The superblocks that it has and no
//!   complete device has are erased just before it counts again, so that they are never looked at
//!   then; until then they do no harm, since a device that knows that it is behind has no say.
//! - With devices missing, each chunk must have a copy on devices that are complete.
//! - When only devices are there that are behind, what they have can be read, and nothing written.
//! - Before the pool writes anything, it flushes: the superblock it read may have been in a
//!   device's cache. Then missing devices are left behind, and the superblock is put where a crash
//!   kept it from. Without that, a device that lacks it would be opened at the group before when it
//!   is alone, whose blocks have been used for something else by then.

use super::{DamagedLabel, Pool, Settings};
use crate::device::{probe, Identity, Member, Ring, Standing, TableEntry};
use crate::error::{Error, Incident};
use crate::format::chunk::Chunk;
use crate::format::superblock::Superblock;
use crate::platform::Result;
use crate::sync::MutexGuard;
use crate::units::{Txg, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// What is happening to the set of devices.
#[derive(Default)]
pub(super) struct Changes {
    /// Devices that missed something the labels do not tell yet, and how each failed.
    owed: Vec<(u16, Error)>,
}

/// What the labels of the devices that are there agree on.
pub(super) struct Roll {
    /// Identity of the device whose label counts.
    pub newest: Box<Identity>,
    /// What the rings of complete devices hold; of those that are behind when no other is there.
    pub ring: Ring,
    /// No complete device is there.
    pub only_behind: bool,
}

/// Compares the labels and rings of the devices that are there, sorted by index, and sets their
/// standing.
///
/// # Errors
/// [`Error::WrongDevice`], [`Error::Split`], [`Error::Corrupt`], [`Error::Memory`].
// Called once, and large when inlined: its frame is to be gone when the pool is put together.
#[inline(never)]
pub(super) fn call_roll(
    members: &mut Vec<Member>,
    unusable: &mut Vec<(String, Error)>,
) -> Result<Roll> {
    let mut rings = read_rings(members)?;
    let mut newest = newest_label(members, &rings);
    set_aside(members, &mut rings, &newest, unusable)?;
    let members = &members[..];
    note_sizes(members, &mut newest);
    note_old(members, &rings, &mut newest);
    let behind = |index: u16| newest.table.get(usize::from(index)).and_then(|entry| entry.behind);
    let is_complete = |member: &&Member| behind(member.index()).is_none();
    let only_behind = !members.iter().any(|member| is_complete(&member));
    let mut ring = Ring::default();
    for (member, own) in members.iter().zip(&rings) {
        if only_behind || is_complete(&member) {
            ring.merge(own);
        }
    }
    let mut apart = Vec::new();
    for (member, own) in members.iter().zip(&rings) {
        if let Some(since) = behind(member.index()) {
            member.set_standing(Standing::Behind);
            if !only_behind && went_apart(&member.identity(), own, since, &newest, &ring) {
                apart.push(member.index());
            }
        }
    }
    match apart.is_empty() {
        true => Ok(Roll { newest, ring, only_behind }),
        false => Err(Error::Split { devices: apart }),
    }
}

/// Takes out the devices that the table that counts does not have: they were removed, or were about
/// to be added. What can be neither is no device of the pool.
#[inline(never)]
fn set_aside(
    members: &mut Vec<Member>,
    rings: &mut Vec<Ring>,
    newest: &Identity,
    unusable: &mut Vec<(String, Error)>,
) -> Result<()> {
    let mut at = 0;
    while let Some(member) = members.get(at) {
        let identity = member.identity();
        let is_known = match newest.table.get(usize::from(member.index())) {
            Some(entry) => entry.id == identity.device_id,
            // A pool that always had one device has no table.
            None => newest.table.is_empty() && members.len() == 1 && member.index() == 0,
        };
        let error = Error::WrongDevice { name: member.name() };
        match is_known {
            true => at += 1,
            false if identity.epoch == 0 && newest.epoch > 0 && !newest.table.is_empty() => {
                return Err(error);
            }
            false if newest.table.is_empty() => return Err(error),
            false => {
                let name = members.remove(at).name();
                unusable.push((name.clone(), Error::FormerDevice { name }));
                rings.remove(at);
            }
        }
    }
    Ok(())
}

/// Each device knows best how large it is: it is told before the others.
#[inline(never)]
fn note_sizes(members: &[Member], newest: &mut Identity) {
    let mut is_new = false;
    for member in members {
        if let Some(entry) = newest.table.get_mut(usize::from(member.index())) {
            is_new |= entry.bytes != member.bytes();
            entry.bytes = member.bytes();
        }
    }
    newest.epoch += u64::from(is_new);
}

/// Puts into the table that devices are behind which it calls complete, and which are not: they
/// lack a superblock that another has, and that is not the newest. A superblock is written only
/// when the one before is on every complete device; so this is an old copy in the place of one, or
/// it has lost what it took. Which group the content of a copy is of, nobody knows.
#[inline(never)]
fn note_old(members: &[Member], rings: &[Ring], newest: &mut Identity) {
    let (mut first, mut second) = (Txg(0), Txg(0));
    let is_complete = |newest: &Identity, member: &Member| {
        newest.table.get(usize::from(member.index())).is_some_and(|entry| entry.behind.is_none())
    };
    for (member, own) in members.iter().zip(rings) {
        for txg in own.groups().filter(|_| is_complete(newest, member)) {
            if txg > first {
                (first, second) = (txg, first);
            } else if txg < first {
                second = second.max(txg);
            }
        }
    }
    let mut is_new = false;
    for (member, own) in members.iter().zip(rings) {
        if is_complete(newest, member) && own.newest() < second {
            let since = Txg(own.newest().0.max(1));
            newest.table[usize::from(member.index())].behind = Some(since);
            is_new = true;
        }
    }
    newest.epoch += u64::from(is_new);
}

#[inline(never)]
fn read_rings(members: &[Member]) -> Result<Vec<Ring>> {
    let pool_id = members[0].identity().pool_id;
    let mut rings = Vec::with_capacity(members.len());
    for member in members {
        let mut ring = Ring::default();
        ring.add(member, &pool_id)?;
        rings.push(ring);
    }
    Ok(rings)
}

/// The label that counts.
#[inline(never)]
fn newest_label(members: &[Member], rings: &[Ring]) -> Box<Identity> {
    let rank = |index: usize| {
        let identity = members[index].identity();
        let behind = identity.table.iter().filter(|entry| entry.behind.is_some()).count();
        (identity.epoch, rings[index].newest(), core::cmp::Reverse(behind), identity.sequence)
    };
    let best = (0..members.len()).rev().max_by_key(|index| rank(*index)).unwrap_or_default();
    let mut newest = Box::new(members[best].identity());
    if newest.table.is_empty() && members.len() > 1 {
        // Made before labels had tables: what is there is all there is, as the superblock will say.
        let entry = |member: &Member| {
            let Identity { device_id, bytes, .. } = member.identity();
            TableEntry { id: device_id, bytes, behind: None }
        };
        newest.table = members.iter().map(entry).collect();
    }
    newest
}

/// Whether a device that is behind `since` a group has published groups without the others.
///
/// A device that knows that it is behind has followed others. One that does not has been in company
/// up to `since`, perhaps with one superblock more that the power kept from the others. It went
/// apart
///
/// - if it has still younger ones, and the complete devices do not know of the newest;
/// - or if it left every device that is complete behind and went on from there. It left them where
///   they parted, which may be the group before `since`: the newest superblock may have reached
///   only some. Devices that were left behind earlier, before the two parted, are no sign in
///   themselves: they may have been brought up to date by either side since. But one that calls
///   nobody complete but itself was alone.
fn went_apart(identity: &Identity, own: &Ring, since: Txg, newest: &Identity, ring: &Ring) -> bool {
    if identity.table.is_empty() {
        // From before there was a table: it names nobody that it left.
        return false;
    }
    let Some(last) = own.valid.first().filter(|last| !ring.valid.contains(last)) else {
        return false;
    };
    let itself = usize::from(identity.index);
    if identity.table[itself].behind.is_some() {
        return false;
    }
    if last.txg.0 > since.0.saturating_add(1) {
        return true;
    }
    let mut left_at = Txg(0);
    // A device that was added or removed since is no sign.
    let both = identity.table.iter().zip(&newest.table);
    let both = both.filter(|(own, entry)| own.id == entry.id && !entry.is_vacant());
    for (own, _) in both.filter(|(_, entry)| entry.behind.is_none()) {
        match own.behind {
            Some(left) => left_at = left_at.max(left),
            None => return false,
        }
    }
    let mut others = identity.table.iter().enumerate().filter(|(index, _)| *index != itself);
    let was_alone = others.all(|(_, entry)| entry.behind.is_some() || entry.is_vacant());
    let parted_there = left_at.0.saturating_add(1) >= since.0;
    last.txg > left_at && (parted_there || was_alone)
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
            None if entry.is_vacant() => all.push(Member::vacant(index, newest)),
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

/// The error for devices that are missing, some perhaps because they are `unusable`.
pub(super) fn missing(members: &[Member], needed: bool, unusable: &[(String, Error)]) -> Error {
    let unusable = unusable.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    let having =
        |standing: Standing| members.iter().filter(move |member| member.standing() == standing);
    let devices: Vec<(u16, [u8; 16])> = having(Standing::Absent)
        .map(|member| (member.index(), member.identity().device_id))
        .collect();
    let behind: Vec<u16> = having(Standing::Behind).map(Member::index).collect();
    match needed && !behind.is_empty() {
        true => Error::OnlyBehind { behind, missing: devices },
        false => Error::MissingDevices { devices, needed, unusable },
    }
}

/// Devices that were just left behind, to be told.
type Gone = Vec<(u16, Error)>;

impl Pool {
    /// For each device, whether new chunks may rely on it.
    pub(super) fn complete(&self) -> Vec<bool> {
        let may_have = |m: &Member| m.is_complete() && !self.is_closed(m);
        self.members().iter().map(may_have).collect()
    }

    /// For each device, whether what is promised may count on its room: complete ones, and those
    /// lost since the pool was opened if every chunk has more copies than there are of them.
    pub(super) fn counted(&self) -> Vec<bool> {
        let lost = self.lost.load(Ordering::Acquire);
        let Settings { data_profile, metadata_profile, .. } = self.settings;
        let copies = data_profile.devices_min().min(metadata_profile.devices_min());
        let is_made_up_for = u64::from(lost.count_ones()) < copies;
        let is_lost = |member: &Member| is_made_up_for && lost >> member.index() & 1 == 1;
        let is_counted = |m: &Member| (m.is_complete() || is_lost(m)) && !self.is_closed(m);
        self.members().iter().map(is_counted).collect()
    }

    /// Devices that are missing or have failed.
    pub fn absent(&self) -> Vec<u16> {
        let is_absent = |member: &&Member| member.standing() == Standing::Absent;
        self.members().iter().filter(is_absent).map(Member::index).collect()
    }

    /// Devices that are there and lack something.
    pub fn behind(&self) -> Vec<u16> {
        let is_behind = |member: &&Member| member.standing() == Standing::Behind;
        self.members().iter().filter(is_behind).map(Member::index).collect()
    }

    /// Calls devices complete that were behind and have everything now: what was there when they
    /// came back has been compared, and what was written since was written to them. Nobody may
    /// write superblocks meanwhile.
    ///
    /// # Errors
    /// Errors of devices that cannot be done without; [`Error::Memory`]. One of `devices` that
    /// failed meanwhile is passed over: each comes with the failures it had in the beginning.
    pub fn mark_complete(&self, devices: &[(u16, u64)]) -> Result<()> {
        self.check_writable()?;
        let mut gone = Gone::new();
        let mut done = Vec::new();
        let outcome = {
            let mut changes = self.changing.lock();
            let is_behind = |index: &u16| {
                let member = self.member(*index);
                // Who saw it fail may still wait to say so.
                let before = devices.iter().find(|(device, _)| device == index);
                let is_well = before.is_some_and(|(_, failures)| member.failures() == *failures);
                is_well && member.standing() == Standing::Behind
            };
            let back: Vec<u16> = devices.iter().map(|(device, _)| *device).collect();
            let back: Vec<u16> = back.into_iter().filter(is_behind).collect();
            let flushed = self.flush_some(&back);
            self.note_failed(&mut changes, flushed)
                .and_then(|()| self.settle(&mut changes, &mut gone))
                .and_then(|()| {
                    // Before the labels say that they count: one that is not the pool's could be
                    // taken for the newest when the device is alone.
                    let there: Vec<u16> = back.iter().copied().filter(is_behind).collect();
                    let failed = self.erase_strays(&there)?;
                    self.note_failed(&mut changes, failed)?;
                    self.settle(&mut changes, &mut gone)
                })
                .and_then(|()| {
                    let back: Vec<u16> = back.into_iter().filter(is_behind).collect();
                    self.clear_behind(&back);
                    self.settle(&mut changes, &mut gone)?;
                    for index in back.into_iter().filter(is_behind) {
                        self.member(index).set_standing(Standing::Complete);
                        done.push(index);
                    }
                    Ok(())
                })
        };
        self.tell_gone(gone);
        for index in done {
            let name = self.member(index).name();
            self.platform().report.incident(&Incident::DeviceComplete { device: index, name });
        }
        outcome
    }

    fn clear_behind(&self, devices: &[u16]) {
        let mut roll = self.roll.lock();
        devices.iter().for_each(|index| roll.table[usize::from(*index)].behind = None);
        roll.epoch += u64::from(!devices.is_empty());
    }

    /// Whether each column of each chunk has a copy on a device for which `good` holds.
    fn has_all(&self, good: &dyn Fn(u16) -> bool) -> bool {
        let is_had = |chunk: &Chunk| {
            let mut columns = chunk.stripes.chunks(chunk.profile.copies() as usize);
            columns.all(|copies| copies.iter().any(|stripe| good(stripe.device)))
        };
        // A chunk of which the group being written says that it is elsewhere may be in either place
        // by the time that the next one fails.
        self.chunk_map().iter().all(|mapped| is_had(&mapped.chunk) && is_had(mapped.recorded()))
    }

    /// Whether everything that is mapped can be had from the devices that are there.
    ///
    /// # Errors
    /// [`Error::MissingDevices`] when not.
    pub fn check_reach(&self) -> Result<()> {
        self.check_reach_without(&[])
    }

    /// As [`Pool::check_reach`]; the error names devices that are `unusable`.
    pub(super) fn check_reach_without(&self, unusable: &[(String, Error)]) -> Result<()> {
        let good = |device: u16| {
            // What is read is verified; but what is not there cannot be written.
            let member = self.member(device);
            member.is_complete() || self.read_only() && member.is_there()
        };
        if self.has_all(&good) {
            return Ok(());
        }
        Err(missing(self.members(), true, unusable))
    }

    /// Makes sure, when all trees can be read and before anything is written or replayed, that the
    /// pool can be relied on; leaves missing devices behind and repairs what a crash left undone
    /// between devices. `superblock` is the one that was opened.
    ///
    /// # Errors
    /// [`Error::MissingDevices`], errors of devices that cannot be done without.
    #[inline(never)]
    pub fn begin(&self, superblock: &Superblock) -> Result<()> {
        self.check_reach()?;
        if self.read_only() {
            return Ok(());
        }
        let failed = self.flush_all();
        if self.members().len() == 1 {
            self.leave_behind(failed)?;
            return self.members()[0].complete_superblock(superblock);
        }
        self.change(failed, |roll| {
            let mut is_new = roll.epoch == 0 && !roll.table.is_empty();
            for (entry, member) in roll.table.iter_mut().zip(self.members()) {
                if member.standing() == Standing::Absent {
                    entry.behind.get_or_insert(superblock.txg);
                    is_new = true;
                }
            }
            // A missing device may have a label of the epoch that comes next, which the power kept
            // from the others. It must not count for more than what they do now without it.
            roll.epoch += 2 * u64::from(is_new);
        })?;
        let mut failed = Vec::new();
        for member in self.members().iter().filter(|member| member.is_there()) {
            if let Err(error) = member.complete_superblock(superblock) {
                failed.push((member.index(), error));
            }
        }
        self.leave_behind(failed)
    }

    /// Erases, durably, what superblocks devices have that no complete one has. Returns those that
    /// failed.
    #[inline(never)]
    fn erase_strays(&self, devices: &[u16]) -> Result<Vec<(u16, Error)>> {
        let mut known = Ring::default();
        for member in self.members().iter().filter(|member| member.is_complete()) {
            known.add(member, &self.pool_id())?;
        }
        let mut failed = Vec::new();
        for index in devices {
            match self.member(*index).erase_superblocks(&known) {
                Ok(()) => {}
                Err(Error::Memory) => return Err(Error::Memory),
                Err(error) => failed.push((*index, error)),
            }
        }
        Ok(failed)
    }

    /// Goes on without the devices that failed, or says why that cannot be. Nothing that was
    /// written before may be called done unless this returns `Ok`.
    ///
    /// # Errors
    /// How the first device failed that cannot be done without, now or earlier;
    /// [`Error::Memory`], after which the next call tries again.
    pub(super) fn leave_behind(&self, failed: Vec<(u16, Error)>) -> Result<()> {
        if failed.is_empty() && !self.is_owing.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.members().iter().filter(|member| !member.is_vacant()).count() == 1 {
            // There is nothing to tell anybody, and whoever asked for it is told.
            return failed.into_iter().try_for_each(|(_, error)| Err(error));
        }
        self.change(failed, |_| {})
    }

    /// Changes what all labels say and nothing depends on, and writes it. A device that fails is
    /// left behind if it can be done without; otherwise nothing is held against it, and its label
    /// is written again with the next change of the table.
    ///
    /// # Errors
    /// How the first device failed that cannot be done without; the others have the change, unless
    /// the pool has stopped writing. [`Error::Memory`].
    pub(super) fn change_labels(&self, change: impl FnOnce(&mut Identity)) -> Result<()> {
        let mut gone = Gone::new();
        let outcome = {
            let mut changes = self.changing.lock();
            self.change_labels_of(&mut changes, &mut gone, change)
        };
        self.tell_gone(gone);
        outcome
    }

    fn change_labels_of(
        &self,
        changes: &mut MutexGuard<'_, Changes>,
        gone: &mut Gone,
        change: impl FnOnce(&mut Identity),
    ) -> Result<()> {
        if !changes.owed.is_empty() {
            self.settle(changes, gone)?;
        }
        let roll = {
            let mut roll = self.roll.lock();
            change(&mut roll);
            roll.clone()
        };
        let failed = self.write_tables(&roll, &[]);
        let Some((_, first)) = failed.first() else { return Ok(()) };
        if !self.can_spare(&failed) {
            return Err(first.clone());
        }
        self.note_failed(changes, failed)?;
        self.settle(changes, gone)
    }

    /// Whether the others have a copy of everything.
    fn can_spare(&self, failed: &[(u16, Error)]) -> bool {
        let _no_new_chunk = self.ledger.lock();
        let is_good = |index: u16| {
            let has_failed = failed.iter().any(|(device, _)| *device == index);
            self.member(index).is_complete() && !has_failed
        };
        self.members().iter().any(|member| is_good(member.index())) && self.has_all(&is_good)
    }

    /// Changes the table, notes which devices failed, and writes the labels that lack any of it.
    fn change(&self, failed: Vec<(u16, Error)>, change: impl FnOnce(&mut Identity)) -> Result<()> {
        self.change_after(|changes| {
            change(&mut self.roll.lock());
            self.note_failed(changes, failed)
        })
    }

    /// Lets `prepare` change the table, while nobody else does, and writes the labels that lack
    /// any of it.
    pub(super) fn change_after(
        &self,
        prepare: impl FnOnce(&mut MutexGuard<'_, Changes>) -> Result<()>,
    ) -> Result<()> {
        let mut gone = Gone::new();
        let outcome = {
            let mut changes = self.changing.lock();
            let other = prepare(&mut changes);
            let settled = self.settle(&mut changes, &mut gone);
            settled.and(other)
        };
        self.tell_gone(gone);
        outcome
    }

    /// Not under a lock: who is told may ask for anything.
    fn tell_gone(&self, gone: Gone) {
        for (index, error) in gone {
            let name = self.member(index).name();
            self.platform().report.incident(&Incident::DeviceFailed { device: index, name, error });
        }
    }

    /// Puts devices that failed on the list of what is owed.
    ///
    /// # Errors
    /// The first failure that says nothing about a device.
    fn note_failed(
        &self,
        changes: &mut MutexGuard<'_, Changes>,
        failed: Vec<(u16, Error)>,
    ) -> Result<()> {
        let mut other = Ok(());
        for (index, error) in failed {
            if !matches!(error, Error::Device { .. }) {
                other = other.and(Err(error));
                continue;
            }
            // Someone else may have left it behind meanwhile.
            let is_gone = self.member(index).standing() == Standing::Absent;
            if !is_gone && changes.owed.iter().all(|(other, _)| *other != index) {
                changes.owed.push((index, error));
                self.is_owing.store(true, Ordering::Release);
            }
        }
        other
    }

    /// Makes all labels say what the table says and which devices are owed; those are absent then.
    fn settle(&self, changes: &mut MutexGuard<'_, Changes>, gone: &mut Gone) -> Result<()> {
        loop {
            self.check_without(&changes.owed)?;
            let roll = self.mark_owed(&changes.owed);
            let owed: Vec<u16> = changes.owed.iter().map(|(index, _)| *index).collect();
            let failed = self.write_tables(&roll, &owed);
            if failed.is_empty() {
                break;
            }
            self.note_failed(changes, failed)?;
        }
        for (index, error) in changes.owed.drain(..) {
            self.member(index).set_standing(Standing::Absent);
            gone.push((index, error));
        }
        self.is_owing.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether the pool can go on without the devices that are owed. From then on no chunk is made
    /// on them.
    fn check_without(&self, owed: &[(u16, Error)]) -> Result<()> {
        let Some((_, first)) = owed.first() else { return Ok(()) };
        // Whoever makes a chunk holds this, and looks which devices are complete.
        let _no_new_chunk = self.ledger.lock();
        let members = || owed.iter().map(|(index, _)| self.member(*index));
        if members().all(|member| member.standing() == Standing::Behind) {
            return Ok(());
        }
        members().filter(|member| member.is_complete()).for_each(|member| {
            self.lost.fetch_or(1 << member.index(), Ordering::AcqRel);
            member.set_standing(Standing::Leaving);
        });
        let is_anyone = self.members().iter().any(Member::is_complete);
        match is_anyone && self.has_all(&|index| self.member(index).is_complete()) {
            true => Ok(()),
            false => Err(first.clone()),
        }
    }

    /// The table in which the devices that are owed are behind.
    fn mark_owed(&self, owed: &[(u16, Error)]) -> Identity {
        let since = Txg(self.published_txg.load(Ordering::Acquire).max(1));
        let mut roll = self.roll.lock();
        let mut is_new = false;
        for (index, _) in owed {
            let behind = &mut roll.table[usize::from(*index)].behind;
            is_new |= behind.is_none();
            behind.get_or_insert(since);
        }
        roll.epoch += u64::from(is_new);
        roll.clone()
    }

    /// Writes the table into the labels that have another, of devices that are there and not in
    /// `without`. Returns those that failed.
    fn write_tables(&self, roll: &Identity, without: &[u16]) -> Vec<(u16, Error)> {
        let now = self.platform().clock.now().secs;
        let mut failed = Vec::new();
        for member in self.members().iter().filter(|member| member.is_there()) {
            if member.is_labelled(roll) || without.contains(&member.index()) {
                continue;
            }
            let written = member.relabel(now, |identity| {
                identity.epoch = roll.epoch;
                identity.table.clone_from(&roll.table);
                identity.name = roll.name;
            });
            match written {
                Ok(bad) => self.note_label(member.index(), bad),
                Err(error) => failed.push((member.index(), error)),
            }
        }
        failed
    }

    /// Reads the labels of all devices, and rewrites those that are not as they should be.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Memory`].
    pub fn mend_labels(&self) -> Result<()> {
        self.check_writable()?;
        // Or a label that is being written would be taken for a bad one.
        let _one_at_a_time = self.changing.lock();
        let written = self.platform().clock.now().secs;
        for member in self.members().iter().filter(|member| member.is_there()) {
            let bad = match probe(&*member.device(), member.index()) {
                Err(Error::Memory) => return Err(Error::Memory),
                Err(_) => 2,
                Ok(found) if !member.has_label(&found.identity) => 2,
                Ok(found) => found.damaged.iter().flatten().count(),
            };
            if bad == 0 {
                continue;
            }
            (0..bad).for_each(|_| member.count_checksum_error());
            let outcome = member.relabel(written, |_| {});
            let failed = match &outcome {
                Ok(area) => usize::from(area.is_some()),
                Err(Error::Memory) => return Err(Error::Memory),
                Err(_) => bad,
            };
            (0..bad).for_each(|nth| member.count_mend(SECTOR_BYTES, nth >= failed));
            if let Ok(area) = outcome {
                self.note_label(member.index(), area);
            }
        }
        Ok(())
    }

    /// Whether a slot of a device that is complete lacks its superblock; with `repair`, writes it,
    /// durably. Nobody may write superblocks meanwhile then.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Memory`]; errors of devices that cannot be done without.
    pub fn mend_superblocks(&self, repair: bool) -> Result<bool> {
        self.check_writable()?;
        let known = self.superblocks();
        let Some(newest) = known.first() else { return Ok(true) };
        let (mut is_any, mut failed) = (false, Vec::new());
        for member in self.members().iter().filter(|member| member.is_complete()) {
            let (lacking, _) = member.mend_superblocks(newest, repair)?;
            is_any |= lacking > 0;
            if repair && lacking > 0 {
                // One area that cannot be written is told; the other serves.
                failed.extend(member.flush().err().map(|error| (member.index(), error)));
            }
        }
        self.leave_behind(failed)?;
        Ok(is_any)
    }

    /// Takes note of how a label was rewritten: which area could not be, if any.
    pub(super) fn note_label(&self, device: u16, bad: Option<(usize, Error)>) {
        let mut damaged = self.damaged.lock();
        damaged.retain(|label| label.device != device);
        damaged.extend(bad.map(|(area, error)| DamagedLabel { device, area, error }));
    }
}
