//! Devices are added, removed, replaced and made larger or smaller while the pool is in use.
//!
//! Adding and growing are done at once (`pool/places.rs`). The others *evict*: chunks that are in
//! the way get another place (`pool/moves.rs`), some of them at a time:
//!
//! ```text
//! choose: some of the chunks in the way are doubled
//! settle: nobody is left who writes them in one place only; a commit
//! pass:   every tree (`survey`): what is named in those chunks is carried over, verified
//! more:   nodes that are younger than the pass before, until these are few; the last of these
//!         passes sees the trees as one group has them
//! seal:   nobody looks at older trees any more; a commit; another, which has the other places
//! ```
//!
//! - As with the resilver, what was written before the pass is named by some tree, and what is
//!   written after it is in both places. The log needs no look: a commit makes it begin anew.
//! - Whoever reads trees that are older than what the last pass saw may still read what no younger
//!   tree names, and nobody carried over: so sealing waits for them to end.
//! - What is done is stored as the DEVICES property, not how far it is: chunks that have moved are
//!   not in the way any more. So it goes on after a remount or a crash, and loses at most what it
//!   was at, a sixteenth of the whole.
//! - As long as something in the way cannot be read, nothing that names it is moved: it waits, and
//!   looks again. What can be read and is bad in every copy is moved as it is.
//! - A device that fails while chunks are moved to it spoils what is under way, which begins anew
//!   with other places.
//! - A device is let go when no chunk of the published group is on it, and nobody reads there. Its
//!   labels are wiped when those of all others do not name it.

use crate::btree::Edit;
use crate::engine::survey::{Passes, Seen, Visitor};
use crate::engine::Engine;
use crate::error::Error;
use crate::format::devices::{DeviceChangeItem, DeviceChangeKind, DeviceChangeState};
use crate::format::features;
use crate::format::key::{kind, Key};
use crate::format::pool::property;
use crate::format::DiskField;
use crate::platform::DeviceRef;
use crate::pool::{Content, DataSource, Eviction, Lost, Pool, ADDED_BYTES_MIN};
use crate::subvol::store::Result;
use crate::sync::{Mutex, Rank, Signal};
use crate::units::{align_down, TreeId, Txg, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

/// How often somebody looks after it, in milliseconds.
const TICK_MS: u64 = 100;
/// How long it works before it lets others on, in nanoseconds.
const BUDGET_NS: u64 = 200_000_000;
/// Bytes carried over at once.
const STEP_BYTES: u64 = 4 << 20;
/// How long it waits when something could not be done, in nanoseconds.
const PAUSE_NS: u64 = 10_000_000_000;
/// How long it waits for others before it says so, in nanoseconds.
const WAIT_SHOWN_NS: u64 = 3_000_000_000;
/// A batch is so much of the whole, and not less than a number of chunks.
const BATCHES: u64 = 16;
const BATCH_CHUNKS_MIN: u64 = 8;

/// What is being done to the devices of a pool.
pub(super) struct DeviceChanges {
    state: Mutex<State>,
    /// Somebody goes on with it.
    is_busy: AtomicBool,
    idle: Signal,
}

#[derive(Default)]
struct State {
    item: Option<DeviceChangeItem>,
    is_unsaved: bool,
    /// It is looked whether one can begin.
    is_beginning: bool,
    has_timer: bool,
    /// Counts changes from outside: whoever is at work sees that what he does is of no use.
    generation: u64,
    work: Work,
    rests_until_ns: u64,
    waits_for: Option<Error>,
    /// Since when it waits for somebody who reads or writes what there was, uptime.
    waits_since_ns: Option<u64>,
}

/// Where it is.
#[derive(Default)]
enum Work {
    #[default]
    Choose,
    Settle,
    Pass(Box<Carrying>),
    /// The group that the last pass saw.
    Seal(Txg),
}

/// Carrying over what is named in chunks that move.
struct Carrying {
    /// What is younger than the first was written in both places.
    passes: Passes,
    unread: Option<Error>,
}

/// How a change of the devices stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceChangeStatus {
    /// What is done.
    pub kind: DeviceChangeKind,
    /// How it stands.
    pub state: DeviceChangeState,
    /// Index of the device.
    pub device: u16,
    /// Replaced: index of the device in its place.
    pub target: Option<u16>,
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended; zero while it has not.
    pub ended: i64,
    /// Bytes that were in the way when it began.
    pub total_bytes: u64,
    /// Bytes that are in the way yet.
    pub left_bytes: u64,
    /// Why it waits, if it does.
    pub waits_for: Option<ChangeWait>,
}

/// Why a change of the devices waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeWait {
    /// Something could not be done; it is tried again.
    Failure(Error),
    /// Somebody reads what there was some time ago, such as a snapshot that is being sent.
    Readers,
}

impl DeviceChangeStatus {
    /// What a pool has stored of one; `None` for what makes no sense.
    pub fn stored(pool: &Pool, value: &[u8]) -> Option<DeviceChangeStatus> {
        let item = DeviceChangeItem::decode(value).ok()?;
        Some(DeviceChangeStatus::of(pool, &item, None))
    }

    fn of(
        pool: &Pool,
        item: &DeviceChangeItem,
        waits_for: Option<ChangeWait>,
    ) -> DeviceChangeStatus {
        let is_running = item.state() == DeviceChangeState::Running;
        let left = || pool.bytes_to_evict(&eviction(item)).min(item.total_bytes);
        DeviceChangeStatus {
            kind: item.kind(),
            state: item.state(),
            device: item.device,
            target: (item.kind() == DeviceChangeKind::Replace).then_some(item.target),
            began: item.began,
            ended: item.ended,
            total_bytes: item.total_bytes,
            left_bytes: if is_running { left() } else { 0 },
            waits_for,
        }
    }
}

impl DeviceChanges {
    pub fn new() -> DeviceChanges {
        DeviceChanges {
            state: Mutex::ranked(Rank::Short, State::default()),
            is_busy: AtomicBool::new(false),
            idle: Signal::new(),
        }
    }

    /// Waits until nobody is at it; nobody begins, because the pool is closed.
    pub(super) fn wait_idle(&self) {
        self.idle.wait_until(|| !self.is_busy.load(Ordering::SeqCst));
    }
}

impl State {
    fn is_running(&self) -> bool {
        self.item.as_ref().is_some_and(|item| item.state() == DeviceChangeState::Running)
    }

    fn begin(&mut self, item: DeviceChangeItem) {
        *self = State {
            item: Some(item),
            is_unsaved: true,
            generation: self.generation + 1,
            has_timer: self.has_timer,
            ..State::default()
        };
    }

    fn end(&mut self, state: DeviceChangeState, now: i64) {
        if let Some(item) = &mut self.item {
            item.state = state as u8 + 1;
            item.ended = now;
        }
        self.is_unsaved = true;
        self.generation += 1;
        self.work = Work::Choose;
        self.waits_for = None;
        self.waits_since_ns = None;
    }
}

fn eviction(item: &DeviceChangeItem) -> Eviction {
    let from = match item.kind() {
        DeviceChangeKind::Shrink => crate::format::label::data_end(item.bytes),
        _ => 0,
    };
    let target = (item.kind() == DeviceChangeKind::Replace).then_some(item.target);
    Eviction { device: item.device, from, target }
}

impl Engine {
    /// Adds a device; whatever it holds is gone. Returns its index.
    ///
    /// # Errors
    /// Those of [`Pool::add_device`] and of
    /// [`Store::writable`](crate::subvol::store::Store::writable); [`Error::Failed`].
    pub fn add_device(&self, device: DeviceRef) -> Result<u16> {
        self.add_device_as(device, false)
    }

    fn add_device_as(&self, device: DeviceRef, closed: bool) -> Result<u16> {
        self.store.writable()?;
        self.announce(0)?;
        let index = {
            // No superblock is written meanwhile.
            let committer = self.committer();
            self.store.pool.add_device(device, &committer.superblock, closed)?
        };
        self.want_commit();
        self.commit()?;
        Ok(index)
    }

    /// Gives a device another size: all it has, if that is not said. A smaller size is under way
    /// when this returns, as long as chunks are beyond it.
    ///
    /// # Errors
    /// [`Error::Argument`], [`Error::NoSpace`] when what is beyond has no other place; those of
    /// [`Pool::resize_device`].
    pub fn resize_device(self: &Arc<Engine>, index: u16, bytes: Option<u64>) -> Result<()> {
        self.check_device(index)?;
        let member = &self.store.pool.members()[usize::from(index)];
        let found = member.device().geometry().bytes;
        let bytes = align_down(bytes.unwrap_or(found), SECTOR_BYTES);
        if bytes >= member.bytes() {
            self.announce(0)?;
            {
                let _no_commit = self.committer();
                self.store.pool.resize_device(index, bytes)?;
            }
            self.want_commit();
            return self.commit();
        }
        if bytes < ADDED_BYTES_MIN {
            return Err(Error::TooSmall { minimum: ADDED_BYTES_MIN });
        }
        self.begin_change(DeviceChangeKind::Shrink, index, bytes, None)
    }

    /// Begins to move everything off a device, which is no part of the pool any more then.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no such device, or profiles need it, or another change is
    /// under way; [`Error::NoSpace`]; [`Error::Failed`].
    pub fn remove_device(self: &Arc<Engine>, index: u16) -> Result<()> {
        self.check_device(index)?;
        self.begin_change(DeviceChangeKind::Remove, index, 0, None)
    }

    /// Adds a device and begins to move everything there that another has, which is no part of the
    /// pool any more then.
    ///
    /// # Errors
    /// As [`Engine::add_device`] and [`Engine::remove_device`].
    pub fn replace_device(self: &Arc<Engine>, index: u16, device: DeviceRef) -> Result<u16> {
        self.check_device(index)?;
        let needed = self.store.pool.taken_end(index).0 + crate::format::label::LABEL_AREA_BYTES;
        if device.geometry().bytes < needed {
            return Err(Error::TooSmall { minimum: needed.max(ADDED_BYTES_MIN) });
        }
        // Nothing is put there before the change has begun, so that it can be let go.
        let target = self.add_device_as(device, true)?;
        let begun = self.begin_change(DeviceChangeKind::Replace, index, 0, Some(target));
        if begun.is_err() && !self.is_target(target) {
            let _ = self.let_device_go(target, None);
        }
        begun.map(|()| target)
    }

    fn is_target(&self, index: u16) -> bool {
        let state = self.device_changes.state.lock();
        let item = state.item.filter(|_| state.is_running());
        item.is_some_and(|item| eviction(&item).target == Some(index))
    }

    /// Whether a change of a device can begin.
    fn check_device(&self, index: u16) -> Result<()> {
        self.store.writable()?;
        if !self.store.pool.has_device(index) {
            return Err(Error::Argument { what: "the pool has no such device" });
        }
        if self.device_changes.state.lock().is_running() {
            let what = "another change of the devices is under way: wait for it, or end it with \
                        cairn device cancel";
            return Err(Error::Argument { what });
        }
        Ok(())
    }

    fn begin_change(
        self: &Arc<Engine>,
        kind: DeviceChangeKind,
        device: u16,
        bytes: u64,
        target: Option<u16>,
    ) -> Result<()> {
        let pool = &self.store.pool;
        let mut item = <DeviceChangeItem as DiskField>::get(&[0; DeviceChangeItem::BYTES]);
        (item.state, item.kind) = (1, kind as u8 + 1);
        (item.device, item.target, item.bytes) = (device, target.unwrap_or(0), bytes);
        item.id = pool.members()[usize::from(device)].identity().device_id;
        item.began = self.store.now().secs;
        let eviction = eviction(&item);
        item.total_bytes = pool.bytes_to_evict(&eviction);
        // First what is promised is brought down to what there is.
        self.commit()?;
        self.release();
        {
            let mut state = self.device_changes.state.lock();
            if state.is_running() || core::mem::replace(&mut state.is_beginning, true) {
                return Err(Error::Argument { what: "another change of the devices is under way" });
            }
        }
        let check = || {
            pool.check_eviction(&eviction)?;
            // What was promised meanwhile counts.
            self.store.space.with_owed(|owed| pool.begin_eviction(&eviction, owed))
        };
        let possible = match check() {
            Err(Error::NoSpace) => self.drop_empty_chunks().and_then(|()| check()),
            other => other,
        };
        {
            let mut state = self.device_changes.state.lock();
            state.is_beginning = false;
            if possible.is_ok() {
                state.begin(item);
            }
        }
        possible?;
        self.keep_changing();
        self.save_device_change()
    }

    /// Gives the room back of chunks that have become empty, which commits do, to those that there
    /// is no other room for.
    fn drop_empty_chunks(&self) -> Result<()> {
        self.release();
        self.want_commit();
        self.commit()
    }

    /// Ends a change that is under way. What was moved stays where it is; a device that was to be
    /// in the place of another stays in the pool.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is none; [`Error::Failed`].
    pub fn cancel_device_change(&self) -> Result<()> {
        self.store.writable()?;
        let now = self.store.now().secs;
        {
            let _no_commit = self.committer();
            let mut state = self.device_changes.state.lock();
            let device = match &state.item {
                Some(item) if state.is_running() => item.device,
                _ => return Err(Error::Argument { what: "no change of the devices is under way" }),
            };
            state.end(DeviceChangeState::Cancelled, now);
            drop(state);
            self.store.pool.cancel_moves();
            self.store.pool.limit_device(device, None);
        }
        self.save_device_change()?;
        self.store.pool.give_back_left();
        Ok(())
    }

    /// How the change of the devices stands that is under way, or how the last one ended.
    pub fn device_change(&self) -> Option<DeviceChangeStatus> {
        let state = self.device_changes.state.lock();
        let item = state.item?;
        let now_ns = self.store.platform.clock.uptime_ns();
        let waits_for = state.waits_for.clone().map(ChangeWait::Failure).or_else(|| {
            let since = state.waits_since_ns.filter(|_| state.is_running())?;
            (now_ns.saturating_sub(since) >= WAIT_SHOWN_NS).then_some(ChangeWait::Readers)
        });
        drop(state);
        Some(DeviceChangeStatus::of(&self.store.pool, &item, waits_for))
    }

    /// Takes note of what the pool has of a change. What makes no sense is passed over: nothing
    /// depends on it.
    pub(super) fn load_device_change(&self, value: &[u8]) {
        let Ok(item) = DeviceChangeItem::decode(value) else { return };
        let mut state = self.device_changes.state.lock();
        state.item = Some(item);
        if !state.is_running() {
            return;
        }
        let pool = &self.store.pool;
        let member = pool.members().get(usize::from(item.device));
        if member.is_some_and(|m| !m.is_vacant() && m.identity().device_id == item.id) {
            pool.limit_device(item.device, Some(eviction(&item).from));
        } else {
            // It was let go, and the power failed before that was noted.
            state.end(DeviceChangeState::Finished, item.began);
        }
    }

    /// What the group that is written is to store of a change, if that is not what the pool has.
    pub(super) fn take_device_change_edit(&self) -> Option<(Key, Edit)> {
        let mut state = self.device_changes.state.lock();
        if !core::mem::take(&mut state.is_unsaved) {
            return None;
        }
        let item = state.item?;
        let key = Key::new(0, kind::PROPERTY, property::DEVICES);
        Some((key, Edit::Put(item.to_bytes().to_vec())))
    }

    fn save_device_change(&self) -> Result<()> {
        self.want_commit();
        self.commit()
    }

    /// Sees to it that somebody goes on with a change as long as it is under way.
    pub(super) fn keep_changing(self: &Arc<Engine>) {
        {
            let mut state = self.device_changes.state.lock();
            if !state.is_running() || core::mem::replace(&mut state.has_timer, true) {
                return;
            }
        }
        self.every(TICK_MS, |engine| {
            engine.change_some();
            engine.keeps_changing()
        });
    }

    fn keeps_changing(&self) -> bool {
        let is_over = self.closed.load(Ordering::SeqCst) || self.store.writable().is_err();
        let mut state = self.device_changes.state.lock();
        state.has_timer = !is_over && state.is_running();
        state.has_timer
    }

    /// Goes on with a change for a while.
    pub(super) fn change_some(&self) {
        if self.device_changes.is_busy.swap(true, Ordering::SeqCst) {
            return;
        }
        let clock = &self.store.platform.clock;
        let until = clock.uptime_ns().saturating_add(BUDGET_NS);
        while !self.closed.load(Ordering::SeqCst) && self.store.writable().is_ok() {
            if !self.change_step() || clock.uptime_ns() >= until {
                break;
            }
        }
        self.device_changes.is_busy.store(false, Ordering::SeqCst);
        self.device_changes.idle.notify_all();
    }

    /// Takes the next step. False when there is nothing to do now.
    fn change_step(&self) -> bool {
        let now_ns = self.store.platform.clock.uptime_ns();
        let (item, generation, work) = {
            let mut state = self.device_changes.state.lock();
            if !state.is_running() || now_ns < state.rests_until_ns {
                return false;
            }
            let Some(item) = state.item else { return false };
            (item, state.generation, core::mem::take(&mut state.work))
        };
        let outcome = match work {
            Work::Choose => self.choose(&item, generation),
            Work::Settle => self.settle_moves(),
            Work::Pass(carrying) => self.carry(carrying),
            Work::Seal(txg) => self.seal(txg, generation),
        };
        let mut state = self.device_changes.state.lock();
        if generation != state.generation {
            return true;
        }
        match outcome {
            Ok((work, goes_on)) => {
                state.work = work;
                state.waits_for = None;
                match goes_on {
                    true => state.waits_since_ns = None,
                    false => state.waits_since_ns = state.waits_since_ns.or(Some(now_ns)),
                }
                goes_on
            }
            Err(error) => {
                state.rests_until_ns = now_ns.saturating_add(PAUSE_NS);
                state.waits_for = Some(error);
                drop(state);
                // From the start, with other places perhaps.
                self.cancel_moves_of(generation);
                false
            }
        }
    }

    fn cancel_moves_of(&self, generation: u64) {
        let _no_commit = self.committer();
        if self.device_changes.state.lock().generation == generation {
            self.store.pool.cancel_moves();
        }
    }

    #[inline(never)]
    fn choose(&self, item: &DeviceChangeItem, generation: u64) -> Result<(Work, bool)> {
        let pool = &self.store.pool;
        let has_all_back = pool.give_back_left();
        let batch = item.total_bytes / BATCHES;
        let batch = batch.max(pool.chunk_bytes().saturating_mul(BATCH_CHUNKS_MIN));
        let bytes = {
            let _no_commit = self.committer();
            if self.device_changes.state.lock().generation != generation {
                return Ok((Work::Choose, true));
            }
            let eviction = eviction(item);
            let begin = |owed| pool.begin_moves(&eviction, batch, owed);
            match self.store.space.with_owed(begin) {
                // What was left may be what there is no room for yet.
                Err(Error::NoSpace) if !has_all_back => return Ok((Work::Choose, false)),
                other => other,
            }
        };
        if bytes == Err(Error::NoSpace) {
            // For the next time.
            self.drop_empty_chunks()?;
        }
        let bytes = bytes?;
        match bytes {
            0 if has_all_back => {
                self.finish_change(item, generation).map(|()| (Work::Choose, false))
            }
            0 => Ok((Work::Choose, false)),
            _ => Ok((Work::Settle, true)),
        }
    }

    /// Nothing is in the way any more.
    #[inline(never)]
    fn finish_change(&self, item: &DeviceChangeItem, generation: u64) -> Result<()> {
        match item.kind() {
            DeviceChangeKind::Shrink => {
                let _no_commit = self.committer();
                if !self.is_change(generation) {
                    return Ok(());
                }
                self.store.pool.resize_device(item.device, item.bytes)?;
            }
            _ if !self.let_device_go(item.device, Some(generation))? => return Ok(()),
            _ => {}
        }
        // Before another can begin, whose target may get the place.
        self.store.pool.limit_device(item.device, None);
        {
            let ended = self.store.now().secs;
            let mut state = self.device_changes.state.lock();
            if state.generation == generation {
                state.end(DeviceChangeState::Finished, ended);
            }
        }
        self.save_device_change()
    }

    /// Publishes that labels may be ahead of the chunk tree, and the bits of `incompat`.
    fn announce(&self, incompat: u64) -> Result<()> {
        let is_new = {
            let mut committer = self.committer();
            let [compat, _, known] = &mut committer.superblock.features;
            let before = (*compat, *known);
            *compat |= features::DEVICE_CHANGE;
            *known |= incompat;
            before != (*compat, *known)
        };
        if is_new {
            self.want_commit();
            self.commit()?;
        }
        Ok(())
    }

    /// Whether a change is still the one that is under way. Who ends it has the committer.
    fn is_change(&self, generation: u64) -> bool {
        self.device_changes.state.lock().generation == generation
    }

    /// Makes a device that has no chunk no part of the pool. False when the change that this is
    /// for has ended meanwhile.
    fn let_device_go(&self, index: u16, generation: Option<u64>) -> Result<bool> {
        self.announce(features::VACANCIES)?;
        {
            let _no_commit = self.committer();
            if generation.is_some_and(|generation| !self.is_change(generation)) {
                return Ok(false);
            }
            self.store.pool.drop_device(index)?;
        }
        self.want_commit();
        self.commit().map(|()| true)
    }

    /// Waits until whatever is written is written in both places, and begins to carry over the
    /// rest.
    fn settle_moves(&self) -> Result<(Work, bool)> {
        if !self.store.pool.moves_begun() {
            return Ok((Work::Settle, false));
        }
        // What the group that is open now has, may have been written before.
        self.want_commit();
        self.commit_upto(self.store.groups.open())?;
        let turns = self.turns.load(Ordering::Acquire);
        let parts = self.parts();
        let carrying = Carrying { passes: Passes::new(turns, &parts), unread: None };
        Ok((Work::Pass(Box::new(carrying)), true))
    }

    #[inline(never)]
    fn carry(&self, mut carrying: Box<Carrying>) -> Result<(Work, bool)> {
        let now = self.parts();
        let Carrying { passes, unread } = &mut *carrying;
        if passes.turns != self.turns.load(Ordering::Acquire) {
            return Ok((Work::Settle, true));
        }
        let mut gathered = Gathering {
            first: passes.first,
            node_bytes: self.store.node_bytes as u64,
            contents: Vec::new(),
            blocks: 0,
            bytes: 0,
            unread: None,
        };
        let goes_on = passes.step(&self.store, &now, &mut gathered)?;
        passes.blocks += gathered.blocks;
        let lost = carry_over(&self.store.pool, &gathered.contents)?;
        let is_unread = |(_, lost): &&(usize, Lost)| matches!(lost.error, Error::Device { .. });
        let found = lost.iter().find(is_unread).map(|(_, lost)| lost.error.clone());
        *unread = unread.take().or(found).or(gathered.unread);
        if goes_on {
            return Ok((Work::Pass(carrying), true));
        }
        if let Some(error) = unread.take() {
            return Err(error);
        }
        let Some(parts) = passes.end_pass(now) else {
            return Ok((Work::Pass(carrying), true));
        };
        if let Some(ptr) = &parts.residue {
            let lost = carry_over(&self.store.pool, &[Content::Block(*ptr)])?;
            if let Some((_, lost)) = lost.first() {
                return Err(lost.error.clone());
            }
        }
        Ok((Work::Seal(parts.txg), true))
    }

    /// Makes the other places count, when nobody looks at older trees than were carried over.
    #[inline(never)]
    fn seal(&self, txg: Txg, generation: u64) -> Result<(Work, bool)> {
        if self.oldest_view() < txg {
            return Ok((Work::Seal(txg), false));
        }
        // The log begins anew with each commit.
        self.want_commit();
        self.commit()?;
        let pool = &self.store.pool;
        {
            let _no_commit = self.committer();
            if self.device_changes.state.lock().generation != generation {
                return Ok((Work::Choose, true));
            }
            pool.ripen_moves();
        }
        self.want_commit();
        self.commit()?;
        match pool.moves() {
            0 => Ok((Work::Choose, true)),
            // A device has failed to which they were to go.
            _ => {
                self.cancel_moves_of(generation);
                Ok((Work::Choose, true))
            }
        }
    }
}

/// Carries contents over, several times if some could not be read; so many bytes at once, since a
/// single leaf may name a thousand times as much as it has.
fn carry_over(pool: &Pool, contents: &[Content]) -> Result<Vec<(usize, Lost)>> {
    let (mut lost, mut first) = (Vec::new(), 0);
    while first < contents.len() {
        let end = first + at_once(&contents[first..]);
        let mut left = Vec::new();
        for _ in 0..3 {
            left = pool.carry_over(&contents[first..end])?;
            if left.is_empty() {
                break;
            }
        }
        lost.extend(left.into_iter().map(|(number, lost)| (first + number, lost)));
        first = end;
    }
    Ok(lost)
}

/// How many of the first have no more than [`STEP_BYTES`]; at least one.
fn at_once(contents: &[Content]) -> usize {
    let mut bytes = 0u64;
    let is_within = |content: &&Content| {
        bytes = bytes.saturating_add(content.run().bytes);
        bytes <= STEP_BYTES
    };
    contents.iter().take_while(is_within).count().max(1)
}

/// What a step of a pass comes to.
struct Gathering {
    /// What is younger was written in both places.
    first: Txg,
    node_bytes: u64,
    contents: Vec<Content>,
    blocks: u64,
    bytes: u64,
    unread: Option<Error>,
}

impl Gathering {
    fn add(&mut self, content: Content) -> Result<()> {
        self.contents.try_reserve(1).map_err(|_| Error::Memory)?;
        self.contents.push(content);
        Ok(())
    }
}

impl Visitor for Gathering {
    fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
        self.blocks += 1;
        self.bytes += self.node_bytes;
        match seen.error {
            Some(Error::Memory) => return Err(Error::Memory),
            // What it names is not visited.
            Some(error @ Error::Device { .. }) => self.unread = Some(error.clone()),
            _ => {}
        }
        match seen.ptr.birth > self.first {
            true => Ok(()),
            false => self.add(Content::Block(*seen.ptr)),
        }
    }

    fn data(&mut self, _: TreeId, _: &Key, _: Txg, source: DataSource) -> Result<()> {
        self.bytes += source.run().bytes;
        self.add(Content::Data(source))
    }

    fn rootless(&mut self, _: TreeId, _: &Error) {
        // Nothing of it can be had, wherever it is.
    }

    fn has_enough(&self) -> bool {
        self.bytes >= STEP_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ptr::{BlockPtr, CompressionKind};
    use crate::units::Logical;

    #[test]
    fn what_is_carried_over_at_once_has_a_bound() {
        let content = |mib: u32| {
            Content::Block(BlockPtr {
                addr: Logical(1 << 20),
                birth: Txg(1),
                stored: mib << 20,
                logical: mib << 20,
                compression: CompressionKind::None,
                level: 0,
                checksum: [0; 32],
            })
        };
        let of =
            |sizes: &[u32]| at_once(&sizes.iter().map(|mib| content(*mib)).collect::<Vec<_>>());
        assert_eq!(of(&[1; 500]), 4);
        assert_eq!(of(&[2, 2, 1]), 2);
        assert_eq!(of(&[9, 1]), 1);
        assert_eq!(of(&[1]), 1);
    }
}
