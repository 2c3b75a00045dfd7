//! Scrub: everything that is in use is read from every copy, verified, and repaired.
//!
//! A scrub makes one pass over all trees (`survey`), in *rounds*:
//!
//! ```text
//! gather: the next leaves, and what they name -> a list, sorted by address
//! sweep:  all copies of it are read, from all devices at once, and verified (`pool::Sweep`)
//! mend:   what was not good is looked at again, copy by copy, and repaired
//! settle: the place in the pass moves on, and what was found is added up
//! ```
//!
//! While one round is swept, the next is gathered. After the pass: the residue block, the frames of
//! the log, labels and superblocks. Free space is never read.
//!
//! - *What moves.* Data that is shared with, or moved to, a place that the pass is past of may be
//!   named there only when the pass comes to where it was. So when there was any, another pass
//!   follows over what is younger than the one before: of what young references name it looks at
//!   what was shared since then, or at all after a remount, which has forgotten what that was. So
//!   it is over soon, however much others write. The last one sees the trees as one group has
//!   them, or none moved anything meanwhile.
//! - *What changes meanwhile.* A round holds the trees as one group has them, so that nothing it
//!   reads is used for something else before it has settled: what it finds bad was in use, and what
//!   it repairs still is what it was. A round takes a fraction of a second, and so nobody misses
//!   the space that it keeps from being used again. A block that was freed before a round came to
//!   it is in no tree, and not looked at. What is younger than the scrub was written when it had
//!   begun, and is passed over.
//! - *Nobody waits.* No lock is held while devices work, but for those that repairs and superblocks
//!   need, for the moment of that. When others use the devices, rounds become short, with pauses
//!   between them; with a limit, so long that it is kept.
//! - *It goes on.* The place and the counts are in the SCRUB property of the pool, which each group
//!   that is written takes along, and one is written every some seconds. What was repaired before
//!   is durable then, since a group flushes the devices. After a crash or a remount a scrub goes on
//!   there; what it looked at since then, it looks at again.
//! - *What a rollback does.* The pass would have to know what it puts in whose place (`survey`);
//!   instead it begins again, which the very group says that carries the rollback out.
//! - Runs with several references are named by several files. They are read once, as far as
//!   memory for what was seen goes ([`Seen`]); of those that are lost, every file is named.
//!
//! What must never happen: the place being past of what was not looked at; a repair being made with
//! content that no checksum vouches for, or where something else is by then.
//!
//! | file | idea |
//! | --- | --- |
//! | `round` | gathering, sweeping and mending |
//! | `seen` | a set of addresses |
//! | `status` | what is shown of a scrub |

mod round;
mod seen;
mod status;

pub use status::{ScrubEnd, ScrubStatus};

use crate::btree::Edit;
use crate::device::{Member, MendCounts};
use crate::engine::survey::{Progress, Spot};
use crate::engine::Engine;
use crate::error::{Error, Incident};
use crate::format::key::{kind, Key};
use crate::format::pool::property;
use crate::format::scrub::{ScrubDevice, ScrubItem, ScrubRecord, ScrubSpan, ScrubState, SPANS_MAX};
use crate::format::space::Run;
use crate::format::DiskField;
use crate::subvol::store::Result;
use crate::sync::{Mutex, Rank, Signal};
use crate::units::Txg;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use round::Rounds;
use seen::Seen;

/// How often it is looked whether there is something to do, in milliseconds.
const TICK_MS: u64 = 20;
/// How long it works before it lets others have the thread, in nanoseconds.
const TURN_NS: u64 = 1_000_000_000;
/// How often its place is made durable, in nanoseconds.
const SAVE_NS: u64 = 10_000_000_000;
/// How long it waits when there was no memory, in nanoseconds.
const PAUSE_NS: u64 = 1_000_000_000;
/// The speed that is shown is that of so long, or twice that, in nanoseconds.
const SPEED_NS: u64 = 5_000_000_000;

/// The scrub of a pool, as everybody sees it.
pub(super) struct Scrub {
    state: Mutex<State>,
    /// Somebody is at it.
    is_busy: AtomicBool,
    /// Nobody is at it any more.
    idle: Signal,
}

struct State {
    /// What is stored of it; the spans and the place in it are those of `progress` when it is.
    /// `None` before there was any.
    record: Option<Box<ScrubRecord>>,
    progress: Progress,
    /// Changes when what is being looked at must not be added any more.
    generation: u64,
    /// The pool does not have `record` as it is.
    is_unsaved: bool,
    /// Uptime at which the pool is to have it.
    save_due_ns: u64,
    /// Uptime up to which the time is counted for which it ran.
    counted_ns: u64,
    /// Uptime before which it rests.
    rests_until_ns: u64,
    /// Uptime and bytes done, two moments ago.
    marks: [(u64, u64); 2],
    /// What of the repairs of each device is counted.
    mends: Vec<MendCounts>,
    /// Something calls [`Engine::scrub_some`].
    has_timer: bool,
    /// Between two turns.
    rounds: Option<Box<Rounds>>,
    /// What was shared since this pass began, and in the one before; `None` if that is not known.
    moved: [Option<Arc<Seen>>; 2],
}

impl Scrub {
    /// A pool that was never scrubbed, as far as is known yet.
    pub(super) fn new() -> Scrub {
        let state = State {
            record: None,
            progress: Progress::default(),
            generation: 0,
            is_unsaved: false,
            save_due_ns: 0,
            counted_ns: 0,
            rests_until_ns: 0,
            marks: [(0, 0); 2],
            mends: Vec::new(),
            has_timer: false,
            rounds: None,
            moved: [None, None],
        };
        Scrub {
            state: Mutex::ranked(Rank::Short, state),
            is_busy: AtomicBool::new(false),
            idle: Signal::new(),
        }
    }

    /// Waits until nobody is at it; nobody begins, because the pool is closed.
    pub(super) fn wait_idle(&self) {
        self.idle.wait_until(|| !self.is_busy.load(Ordering::SeqCst));
    }

    /// Whether there is something that the pool does not have.
    pub(super) fn is_unsaved(&self) -> bool {
        self.state.lock().is_unsaved
    }
}

impl State {
    fn state(&self) -> Option<ScrubState> {
        self.record.as_ref().map(|record| record.state())
    }

    fn is_running(&self) -> bool {
        self.state() == Some(ScrubState::Running)
    }

    /// Takes note of the time, if it was running.
    fn count_time(&mut self, now_ns: u64) {
        let ms = now_ns.saturating_sub(self.counted_ns) / 1_000_000;
        if let Some(record) = self.record.as_mut() {
            record.item.run_ms = record.item.run_ms.saturating_add(ms);
        }
        // What is less than one counts the next time.
        self.counted_ns += ms * 1_000_000;
    }

    /// It runs from now on, after it did not.
    fn note_running(&mut self, now_ns: u64, members: &[Member]) {
        let done = self.record.as_ref().map_or(0, |record| record.item.done_bytes);
        self.counted_ns = now_ns;
        self.save_due_ns = now_ns.saturating_add(SAVE_NS);
        self.rests_until_ns = 0;
        self.marks = [(now_ns, done); 2];
        self.mends = members.iter().map(Member::mends).collect();
    }

    /// Remembers what a group shares.
    fn note_moved(&mut self, shared: &[Run]) {
        let Some(mut moved) = self.moved[0].take() else { return };
        // Nobody else has that of this pass.
        let is_known = Arc::get_mut(&mut moved).is_some_and(|m| shared.iter().all(|r| m.add(*r)));
        self.moved[0] = is_known.then_some(moved);
    }

    /// What is known before the first round from where the pass is.
    fn fresh_rounds(&self, item: &ScrubItem) -> Box<Rounds> {
        // The first pass looks at everything.
        let moved = self.moved[1].clone().filter(|_| item.since > 0);
        Box::new(Rounds::new(self.generation, item, &self.progress, moved))
    }

    /// What is under way counts for nothing from now on.
    fn supersede(&mut self) {
        self.generation += 1;
        self.rounds = None;
    }

    /// Adds up what became of bad copies since this was done last.
    fn count_mends(&mut self, members: &[Member]) {
        let Some(record) = self.record.as_mut() else { return };
        record.devices.resize(members.len().max(record.devices.len()), ScrubDevice::default());
        for ((member, before), device) in
            members.iter().zip(&mut self.mends).zip(&mut record.devices)
        {
            let now = member.mends();
            let copies = now.mended.wrapping_sub(before.mended);
            let failed = now.failed.wrapping_sub(before.failed);
            let bytes = now.mended_bytes.wrapping_sub(before.mended_bytes);
            device.found = device.found.saturating_add(copies).saturating_add(failed);
            device.repaired_bytes = device.repaired_bytes.saturating_add(bytes);
            *before = now;
        }
    }
}

impl Engine {
    /// Takes note of what the pool has of a scrub. What makes no sense is passed over: nothing
    /// depends on it.
    pub(super) fn load_scrub(&self, value: &[u8]) {
        let Ok(record) = ScrubRecord::decode(value) else { return };
        let item = &record.item;
        let spot =
            Spot { id: item.at_tree, since: Txg(item.at_since), key: Key::peek(&item.at_key) };
        let mut state = self.scrub.state.lock();
        state.progress = Progress {
            done: record.spans.iter().map(|span| (span.first, span.last)).collect(),
            at: (item.at_tree != 0).then_some(spot),
        };
        // Groups before this one may have shared something.
        state.moved = [None, None];
        if record.item.shared_txg <= record.item.pass_txg {
            state.moved[0] = Some(Arc::default());
        }
        state.record = Some(Box::new(record));
    }

    /// What group `txg` is to store of the scrub, if that is not what the pool has. It is told
    /// what data the group shares.
    pub(super) fn take_scrub_edit(&self, txg: Txg, shared: &[Run]) -> Option<(Key, Edit)> {
        let mut state = self.scrub.state.lock();
        let is_under_way = matches!(state.state(), Some(ScrubState::Running | ScrubState::Paused));
        if is_under_way && !shared.is_empty() {
            state.note_moved(shared);
            state.record.as_mut()?.item.shared_txg = txg.0;
            state.is_unsaved = true;
        }
        if !core::mem::take(&mut state.is_unsaved) {
            return None;
        }
        let State { record, progress, .. } = &mut *state;
        let record = record.as_mut()?;
        let spans = progress.done.iter().take(SPANS_MAX);
        record.spans =
            spans.map(|(first, last)| ScrubSpan { first: *first, last: *last }).collect();
        let item = &mut record.item;
        (item.at_tree, item.at_since, item.at_key) = (0, 0, [0; Key::BYTES]);
        // A place at the very beginning is none.
        if let Some(spot) = progress.at.filter(|spot| spot.key != Key::MIN) {
            (item.at_tree, item.at_since) = (spot.id, spot.since.0);
            spot.key.encode(&mut item.at_key);
        }
        Some((Key::new(0, kind::PROPERTY, property::SCRUB), Edit::Put(record.encode())))
    }

    /// A group that carries rollbacks out begins the pass of the scrub again.
    pub(super) fn restart_scrub(&self) {
        let mut state = self.scrub.state.lock();
        let state = &mut *state;
        let Some(record) = state.record.as_mut() else { return };
        if matches!(record.state(), ScrubState::Running | ScrubState::Paused) {
            let item = &mut record.item;
            if item.since > 0 {
                // What was shared in the first pass is forgotten, and the new one passes it over.
                state.moved[0] = None;
            }
            (item.done_bytes, item.since, item.pass_txg) = (0, 0, item.first);
            state.progress = Progress::default();
            state.marks = [(state.counted_ns, 0); 2];
            state.is_unsaved = true;
            state.supersede();
        }
    }

    /// Begins a scrub that looks at no more than `rate` bytes a second, one copy counted; at any
    /// number if that is zero. Returns when the pool knows of it.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is one that has not ended; those of
    /// [`Store::writable`](crate::subvol::store::Store::writable); [`Error::Failed`].
    pub fn start_scrub(self: &Arc<Engine>, rate: u64) -> Result<()> {
        self.store.writable()?;
        let total_bytes = self.used_bytes();
        let began = self.store.now().secs;
        let clock = &self.store.platform.clock;
        {
            // A group that is being written may move data without knowing of the scrub.
            let _no_commit = self.committer();
            let first = self.store.groups.published();
            let mut state = self.scrub.state.lock();
            let what = match state.state() {
                Some(ScrubState::Running) => "a scrub is under way already",
                Some(ScrubState::Paused) => {
                    "a scrub is paused: let it go on with cairn scrub resume, or end it with cairn \
                     scrub cancel"
                }
                _ => "",
            };
            if !what.is_empty() {
                return Err(Error::Argument { what });
            }
            let before = state.record.take().map(|record| record.item);
            let mut item = before.unwrap_or_else(|| DiskField::get(&[0; ScrubItem::BYTES]));
            item.state = ScrubState::Running as u8;
            (item.rate, item.began, item.ended, item.run_ms) = (rate, began, 0, 0);
            (item.first, item.total_bytes, item.done_bytes) = (first.0, total_bytes, 0);
            (item.lost_count, item.lost_bytes) = (0, 0);
            (item.since, item.pass_txg, item.shared_txg) = (0, first.0, 0);
            let devices = Vec::new();
            state.record = Some(Box::new(ScrubRecord { item, devices, spans: Vec::new() }));
            state.progress = Progress::default();
            state.moved = [Some(Arc::default()), None];
            state.supersede();
            state.note_running(clock.uptime_ns(), self.store.pool.members());
            state.is_unsaved = true;
        }
        self.keep_scrubbing();
        self.save_scrub()
    }

    /// Lets the scrub rest until [`Engine::resume_scrub`], also when the pool is opened again.
    ///
    /// # Errors
    /// [`Error::Argument`] when none is running; as [`Engine::start_scrub`] else.
    pub fn pause_scrub(&self) -> Result<()> {
        self.store.writable()?;
        let now_ns = self.store.platform.clock.uptime_ns();
        {
            let mut state = self.scrub.state.lock();
            if !state.is_running() {
                return Err(Error::Argument { what: "no scrub is running" });
            }
            state.count_time(now_ns);
            if let Some(record) = state.record.as_mut() {
                record.item.state = ScrubState::Paused as u8;
            }
            state.is_unsaved = true;
        }
        self.save_scrub()
    }

    /// Lets a scrub go on that was paused, and with another `rate` if there is one.
    ///
    /// # Errors
    /// [`Error::Argument`] when none is paused; as [`Engine::start_scrub`] else.
    pub fn resume_scrub(self: &Arc<Engine>, rate: Option<u64>) -> Result<()> {
        self.store.writable()?;
        let now_ns = self.store.platform.clock.uptime_ns();
        {
            let mut state = self.scrub.state.lock();
            if state.state() != Some(ScrubState::Paused) {
                return Err(Error::Argument { what: "no scrub is paused" });
            }
            if let Some(record) = state.record.as_mut() {
                record.item.state = ScrubState::Running as u8;
                record.item.rate = rate.unwrap_or(record.item.rate);
            }
            // A round from before may be under way, at another rate.
            state.supersede();
            state.note_running(now_ns, self.store.pool.members());
            state.is_unsaved = true;
        }
        self.keep_scrubbing();
        self.save_scrub()
    }

    /// Ends a scrub that is running or paused.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is none; as [`Engine::start_scrub`] else.
    pub fn cancel_scrub(&self) -> Result<()> {
        self.store.writable()?;
        let ended = self.store.now().secs;
        let now_ns = self.store.platform.clock.uptime_ns();
        {
            let mut state = self.scrub.state.lock();
            match state.state() {
                Some(ScrubState::Running) => state.count_time(now_ns),
                Some(ScrubState::Paused) => {}
                _ => return Err(Error::Argument { what: "no scrub is running or paused" }),
            }
            if let Some(record) = state.record.as_mut() {
                record.item.state = ScrubState::Cancelled as u8;
                record.item.ended = ended;
            }
            state.progress = Progress::default();
            state.supersede();
            state.is_unsaved = true;
        }
        self.save_scrub()
    }

    /// How the scrub stands, or how the last one ended; `None` when there was none.
    pub fn scrub_status(&self) -> Option<ScrubStatus> {
        let now_ns = self.store.platform.clock.uptime_ns();
        let state = self.scrub.state.lock();
        let mut status = ScrubStatus::of(state.record.as_ref()?);
        if status.state == ScrubState::Running {
            let ms = now_ns.saturating_sub(state.counted_ns) / 1_000_000;
            // One that the pool cannot go on with stands still.
            if state.has_timer {
                status.run_ms = status.run_ms.saturating_add(ms);
            }
            status.set_speed(state.marks[0], now_ns);
        }
        Some(status)
    }

    fn save_scrub(&self) -> Result<()> {
        self.want_commit();
        self.commit()
    }

    /// Bytes in use, one copy counted.
    fn used_bytes(&self) -> u64 {
        let usage = self.store.space.usage();
        let kinds = [usage.data, usage.metadata, usage.system];
        kinds.iter().fold(0, |sum: u64, kind| sum.saturating_add(kind.used_bytes))
    }

    /// Sees to it that somebody goes on with the scrub as long as it is running.
    pub(super) fn keep_scrubbing(self: &Arc<Engine>) {
        let now_ns = self.store.platform.clock.uptime_ns();
        {
            let mut state = self.scrub.state.lock();
            if !state.is_running() || core::mem::replace(&mut state.has_timer, true) {
                return;
            }
            state.note_running(now_ns, self.store.pool.members());
        }
        self.every(TICK_MS, |engine| {
            engine.scrub_some();
            engine.keeps_scrubbing()
        });
    }

    /// Whether whoever goes on with the scrub has something left to do; if not, he goes.
    fn keeps_scrubbing(&self) -> bool {
        let is_over = self.closed.load(Ordering::SeqCst) || self.store.writable().is_err();
        let mut state = self.scrub.state.lock();
        state.has_timer = !is_over && state.is_running();
        state.has_timer
    }

    /// Goes on with the scrub for a while.
    pub(super) fn scrub_some(self: &Arc<Engine>) {
        if self.scrub.is_busy.swap(true, Ordering::SeqCst) {
            return;
        }
        // Whoever closes the pool waits for those who came before.
        if !self.closed.load(Ordering::SeqCst) && self.store.writable().is_ok() {
            self.scrub_turn();
        }
        self.scrub.is_busy.store(false, Ordering::SeqCst);
        self.scrub.idle.notify_all();
    }

    // Nor are the steps of it inlined: their frames would be in one, on a kernel's stack.
    #[inline(never)]
    fn scrub_turn(self: &Arc<Engine>) {
        let now_ns = self.store.platform.clock.uptime_ns();
        let Some(mut rounds) = self.take_rounds(now_ns) else { return };
        let outcome = self.make_rounds(&mut rounds, now_ns.saturating_add(TURN_NS));
        let mut state = self.scrub.state.lock();
        match outcome {
            Ok(()) if rounds.generation == state.generation => state.rounds = Some(rounds),
            Ok(()) => {}
            // From where it was, after a while.
            Err(_) => {
                state.rests_until_ns = now_ns.saturating_add(PAUSE_NS);
                if rounds.generation == state.generation {
                    rounds.go_back(&state.progress);
                    state.rounds = Some(rounds);
                }
            }
        }
    }

    /// What the scrub knows between two rounds, if it is to go on now.
    #[inline(never)]
    fn take_rounds(&self, now_ns: u64) -> Option<Box<Rounds>> {
        let mut state = self.scrub.state.lock();
        if !state.is_running() || now_ns < state.rests_until_ns {
            return None;
        }
        if let Some(rounds) = state.rounds.take() {
            return Some(rounds);
        }
        let item = state.record.as_ref()?.item;
        Some(state.fresh_rounds(&item))
    }

    /// Begins another pass, if something was moved during the one that is over.
    fn begin_pass(&self, rounds: &mut Rounds) -> bool {
        // What a group that is being written shares has to be seen by the pass that begins, or
        // remembered for the one after it.
        let _no_commit = self.committer();
        let published = self.store.groups.published();
        let mut state = self.scrub.state.lock();
        let state = &mut *state;
        if rounds.generation != state.generation {
            return true;
        }
        let Some(record) = state.record.as_mut() else { return true };
        let item = &mut record.item;
        if item.shared_txg <= item.pass_txg {
            return false;
        }
        (item.since, item.pass_txg) = (item.pass_txg, published.0);
        state.moved = [Some(Arc::default()), state.moved[0].take()];
        state.progress = Progress::default();
        state.is_unsaved = true;
        let item = record.item;
        state.supersede();
        let mut next = state.fresh_rounds(&item);
        next.keep_lost_of(rounds);
        state.rounds = Some(next);
        true
    }

    /// The pass is over, and all that no tree names was looked at.
    #[inline(never)]
    fn finish_scrub(&self, generation: u64) -> Result<()> {
        let ended = self.store.now().secs;
        let now_ns = self.store.platform.clock.uptime_ns();
        let told = {
            let mut state = self.scrub.state.lock();
            if generation != state.generation || !state.is_running() {
                return Ok(());
            }
            state.count_time(now_ns);
            state.count_mends(self.store.pool.members());
            state.progress = Progress::default();
            state.is_unsaved = true;
            state.supersede();
            let Some(record) = state.record.as_mut() else { return Ok(()) };
            let (found, repaired_bytes) = (record.found(), record.repaired_bytes());
            let item = &mut record.item;
            item.state = ScrubState::Finished as u8;
            item.ended = ended;
            item.total_bytes = item.done_bytes;
            (item.last_began, item.last_ended) = (item.began, ended);
            (item.last_run_ms, item.last_bytes) = (item.run_ms, item.done_bytes);
            (item.last_found, item.last_repaired_bytes) = (found, repaired_bytes);
            (item.last_lost_count, item.last_lost_bytes) = (item.lost_count, item.lost_bytes);
            Incident::Scrubbed { found, repaired_bytes, lost: item.lost_count }
        };
        self.store.platform.report.incident(&told);
        self.save_scrub()
    }
}
