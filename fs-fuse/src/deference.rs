//! Answering without driving clients from CPU to CPU.
//!
//! A client that does one thing after another waits while its request is answered by a thread on
//! its own CPU (`rings`). The reply wakes it, and the scheduler looks for an idle CPU to wake it
//! on. That of the thread is not idle, for the moment; so the client goes to another one, its next
//! request is answered there, and the reply drives it back again. Each request then wakes a halted
//! CPU, and each CPU fetches anew what the other has in its caches.
//!
//! To the scheduler a CPU that runs nothing but threads of class SCHED_IDLE is as good as idle
//! (`sched_idle_cpu` in `select_idle_sibling`, kernel/sched/fair.c, since Linux 5.4): a client
//! whose request is answered by such a thread stays where it is. So threads take that class while
//! requests come thick and fast: they are *meek*. What was measured is in
//! `docs/decisions/0001-fuse-transport.md`.
//!
//! # What it must not do
//!
//! A meek thread gets next to nothing of a CPU that others of its control group want, and whoever
//! waits for its reply, or for a lock it holds, waits with it. So a guard looks every millisecond,
//! and the threads of a queue that has answered few requests since the last look are made plain
//! again, whatever the reason. If one of them was ready to run just then it may have been kept from
//! it: for a while, longer each time, none is meek. A busy machine therefore costs a request a few
//! milliseconds once in a while, not more.
//!
//! # Invariants
//!
//! - Meek threads are marked in their seats. Class and mark change under the seat's lock, but for
//!   the guard, which makes a thread plain in any case and leaves the mark when the lock is taken:
//!   the thread may be about to become meek, and is made plain with the next look.
//! - The guard sleeps only when no seat is marked; a mark is set before the guard is woken.
//! - New threads, the kernel's for io_uring among them, have the class of the one that makes them.
//!   The guard makes those plain that have no seat.
//!
//! Without the permission to become plain again (the superuser's, or RLIMIT_NICE) no thread is ever
//! meek; nor when the process was given a class of its own.

use crate::device;
use crate::sys::{self, Class};
use parking_lot::{Condvar, Mutex};
use rustix::thread::Pid;
use rustix::time::{clock_gettime, ClockId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::Scope;
use std::time::Duration;

/// Time between two looks of the guard.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Requests between two looks that are enough to stay meek.
const ENOUGH: u64 = 4;

/// Log2 of the nanoseconds (some 4 ms) in which a queue must have answered [`MANY`] for its threads
/// to become meek.
const SPELL_SHIFT: u32 = 22;

/// See [`SPELL_SHIFT`]: one client that does hardly anything else.
const MANY: u64 = 32;

/// Looks between two searches for threads that inherited the class.
const LOOKS_FOR_HEIRS: u32 = 32;

/// Looks for which no thread of a queue is meek after one was kept from running: the first time,
/// and at most, when it happens again within as many looks of its end.
const PAUSE: (u32, u32) = (64, 4096);

/// Who is meek, in one session.
#[derive(Default)]
pub(crate) struct Deference {
    /// The guard is there, and can make threads plain.
    is_possible: AtomicBool,
    /// By queue.
    queues: Vec<Queue>,
    is_asleep: AtomicBool,
    /// Whether the session is over. Locked after a seat's `changing`, before a queue's `seats`.
    has_ended: Mutex<bool>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Requests.
    answered: AtomicU64,
    /// The present spell, and how many had been answered at its beginning.
    spell: AtomicU64,
    at_spell: AtomicU64,
    /// No thread becomes meek now.
    pauses: AtomicBool,
    /// With it held, a seat's `changing` is only tried, never waited for.
    seats: Mutex<Vec<Arc<Seat>>>,
}

/// A thread that answers requests.
struct Seat {
    thread: Pid,
    is_meek: AtomicBool,
    /// Held while the thread changes class.
    changing: Mutex<()>,
}

/// What the calling thread, which answers requests of one queue, tells of them.
pub(crate) struct Member {
    deference: Arc<Deference>,
    queue: usize,
    seat: Arc<Seat>,
}

/// What the guard knows of a queue.
#[derive(Clone, Default)]
struct Watched {
    answered: u64,
    pause: Pause,
}

/// For how long threads stay plain that were kept from running.
#[derive(Clone, Default)]
struct Pause {
    /// Looks that are left of it.
    left: u32,
    /// Its length.
    length: u32,
    /// Looks since its end.
    since: u32,
}

impl Pause {
    /// A look; whether there is a pause.
    fn look(&mut self) -> bool {
        if self.left == 0 {
            self.since = self.since.saturating_add(1);
            return false;
        }
        self.left -= 1;
        self.since = 0;
        true
    }

    /// Begins it.
    fn begin(&mut self) {
        let (first, most) = PAUSE;
        let again = self.length != 0 && self.since <= self.length;
        self.length = if again { (2 * self.length).min(most) } else { first };
        self.left = self.length;
    }
}

impl Deference {
    /// For so many queues.
    pub(crate) fn new(queues: usize) -> Deference {
        Deference { queues: (0..queues).map(|_| Queue::default()).collect(), ..Default::default() }
    }

    /// Starts the guard, if threads may be meek at all.
    pub(crate) fn start<'scope>(self: &Arc<Self>, scope: &'scope Scope<'scope, '_>) {
        if sys::class_of(None) == Ok(Class::Plain) {
            let deference = Arc::clone(self);
            device::start(scope, "fuse-guard", move || deference.guard());
        }
    }

    /// Ends the guard.
    pub(crate) fn end(&self) {
        *self.has_ended.lock() = true;
        self.changed.notify_all();
    }

    /// A seat for the calling thread.
    pub(crate) fn join(self: &Arc<Self>, queue: usize) -> Member {
        let seat = Arc::new(Seat {
            thread: rustix::thread::gettid(),
            is_meek: AtomicBool::new(false),
            changing: Mutex::new(()),
        });
        self.queues[queue].seats.lock().push(Arc::clone(&seat));
        Member { deference: Arc::clone(self), queue, seat }
    }

    /// Life of the guard.
    fn guard(&self) {
        // A thread that cannot come back must not be one that is needed.
        let can_return =
            sys::set_class(None, Class::Meek).is_ok() && sys::set_class(None, Class::Plain).is_ok();
        if !can_return {
            return;
        }
        self.is_possible.store(true, Ordering::SeqCst);
        let mut watched = vec![Watched::default(); self.queues.len()];
        let mut looks = 0u32;
        while !self.wait(LOOK_EVERY) {
            looks = looks.wrapping_add(1);
            let mut is_quiet = true;
            for (queue, watched) in self.queues.iter().zip(&mut watched) {
                is_quiet &= queue.look(watched);
            }
            if is_quiet || looks % LOOKS_FOR_HEIRS == 0 {
                self.make_heirs_plain();
            }
            if is_quiet && self.sleep() {
                break;
            }
        }
        self.is_possible.store(false, Ordering::SeqCst);
        self.queues.iter().for_each(Queue::make_plain);
        self.make_heirs_plain();
    }

    /// Lets a moment pass; whether the session is over.
    fn wait(&self, moment: Duration) -> bool {
        let mut has_ended = self.has_ended.lock();
        if !*has_ended {
            self.changed.wait_for(&mut has_ended, moment);
        }
        *has_ended
    }

    /// Waits for a mark; whether the session is over.
    fn sleep(&self) -> bool {
        let mut has_ended = self.has_ended.lock();
        self.is_asleep.store(true, Ordering::SeqCst);
        // Pairs with `Member::become_meek`: either this sees the mark, or that the sleep.
        while self.is_asleep.load(Ordering::SeqCst) && !self.has_marks() && !*has_ended {
            self.changed.wait(&mut has_ended);
        }
        self.is_asleep.store(false, Ordering::SeqCst);
        *has_ended
    }

    fn has_marks(&self) -> bool {
        self.queues.iter().any(Queue::has_marks)
    }

    fn wake(&self) {
        if self.is_asleep.load(Ordering::SeqCst) {
            let _has_ended = self.has_ended.lock();
            self.is_asleep.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Makes threads plain that have no seat.
    fn make_heirs_plain(&self) {
        let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return };
        for task in tasks.flatten() {
            let id = task.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(thread) = id.and_then(Pid::from_raw) else { continue };
            if sys::class_of(Some(thread)) == Ok(Class::Meek) && !self.seats(thread) {
                let _ = sys::set_class(Some(thread), Class::Plain);
            }
        }
    }

    /// Whether a thread has a seat.
    fn seats(&self, thread: Pid) -> bool {
        let seats = |queue: &Queue| queue.seats.lock().iter().any(|seat| seat.thread == thread);
        self.queues.iter().any(seats)
    }
}

impl Queue {
    /// Whether many were answered in this spell, the one just counted as the `count`th included.
    fn is_hot(&self, count: u64) -> bool {
        let now = clock_gettime(ClockId::MonotonicCoarse);
        let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let spell = nanoseconds >> SPELL_SHIFT;
        if self.spell.swap(spell, Ordering::Relaxed) != spell {
            self.at_spell.store(count, Ordering::Relaxed);
        }
        count.wrapping_sub(self.at_spell.load(Ordering::Relaxed)) >= MANY
    }

    /// The guard's look; whether nothing is left to be looked at.
    fn look(&self, watched: &mut Watched) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        let enough = answered.wrapping_sub(watched.answered) >= ENOUGH;
        watched.answered = answered;
        let paused = watched.pause.look();
        if !enough || paused {
            if self.was_kept_waiting() {
                watched.pause.begin();
            }
            self.make_plain();
        }
        let pauses = watched.pause.left > 0;
        self.pauses.store(pauses, Ordering::Relaxed);
        !pauses && !self.has_marks()
    }

    fn has_marks(&self) -> bool {
        self.seats.lock().iter().any(|seat| seat.is_meek.load(Ordering::SeqCst))
    }

    /// Whether a meek thread could run now.
    fn was_kept_waiting(&self) -> bool {
        let is_ready = |seat: &Arc<Seat>| {
            seat.is_meek.load(Ordering::SeqCst) && device::state_of(seat.thread) == Some(b'R')
        };
        self.seats.lock().iter().any(is_ready)
    }

    fn make_plain(&self) {
        for seat in &*self.seats.lock() {
            seat.make_plain();
        }
    }
}

impl Seat {
    /// Makes the thread plain, and unmarks it unless it is changing its class itself.
    fn make_plain(&self) {
        if !self.is_meek.load(Ordering::SeqCst) {
            return;
        }
        let changing = self.changing.try_lock();
        let done = sys::set_class(Some(self.thread), Class::Plain).is_ok();
        if done && changing.is_some() {
            self.is_meek.store(false, Ordering::SeqCst);
        }
    }
}

impl Member {
    /// The reply to a short request is about to be given.
    pub(crate) fn answers(&self) {
        let queue = &self.deference.queues[self.queue];
        let count = queue.answered.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        if !self.seat.is_meek.load(Ordering::Relaxed)
            && self.deference.is_possible.load(Ordering::Relaxed)
            && queue.is_hot(count)
            && !queue.pauses.load(Ordering::Relaxed)
        {
            self.become_meek();
        }
    }

    fn become_meek(&self) {
        let _changing = self.seat.changing.lock();
        self.seat.is_meek.store(true, Ordering::SeqCst);
        self.deference.wake();
        if sys::set_class(None, Class::Meek).is_err() {
            self.seat.is_meek.store(false, Ordering::SeqCst);
        }
    }

    /// Something that takes long is about to be done.
    pub(crate) fn become_plain(&self) {
        if self.seat.is_meek.load(Ordering::Relaxed) {
            let _changing = self.seat.changing.lock();
            if sys::set_class(None, Class::Plain).is_ok() {
                self.seat.is_meek.store(false, Ordering::SeqCst);
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.become_plain();
        let mut seats = self.deference.queues[self.queue].seats.lock();
        seats.retain(|seat| !Arc::ptr_eq(seat, &self.seat));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// Held by each test that has meek threads: a guard makes those plain that it does not know.
    static ALONE: Mutex<()> = Mutex::new(());

    /// Asks until it is so, for as long as a busy machine may take.
    fn eventually(mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it never came to pass");
            std::thread::yield_now();
        }
    }

    /// Whether this process may leave the class again.
    fn may_be_meek() -> bool {
        let tried = || {
            sys::set_class(None, Class::Meek).unwrap();
            sys::set_class(None, Class::Plain).is_ok()
        };
        sys::class_of(None) == Ok(Class::Plain) && std::thread::spawn(tried).join().unwrap()
    }

    fn class() -> Class {
        sys::class_of(None).unwrap()
    }

    #[test]
    fn threads_are_meek_while_requests_come_thick_and_fast_only() {
        let _alone = ALONE.lock();
        let deference = Arc::new(Deference::new(2));
        std::thread::scope(|scope| {
            deference.start(scope);
            let member = deference.join(1);
            if may_be_meek() {
                eventually(|| {
                    member.answers();
                    class() == Class::Meek
                });
                // Without requests it is the guard that makes it plain, and then it sleeps.
                eventually(|| class() == Class::Plain);
                eventually(|| deference.is_asleep.load(Ordering::SeqCst));
                assert!(!deference.has_marks());
                // And again, up to something long.
                eventually(|| {
                    member.answers();
                    class() == Class::Meek
                });
                member.become_plain();
                assert_eq!(class(), Class::Plain);
                assert!(!deference.has_marks());
            } else {
                (0..10 * MANY).for_each(|_| member.answers());
                assert_eq!(class(), Class::Plain);
            }
            drop(member);
            deference.end();
        });
        assert!(deference.queues[1].seats.lock().is_empty());
    }

    #[test]
    fn the_end_of_a_session_leaves_nobody_meek() {
        let _alone = ALONE.lock();
        let deference = Arc::new(Deference::new(1));
        let before = class();
        std::thread::scope(|scope| {
            deference.start(scope);
            let member = deference.join(0);
            eventually(|| {
                member.answers();
                class() == Class::Meek || !may_be_meek()
            });
            deference.end();
            eventually(|| class() == before);
        });
    }

    #[test]
    fn who_inherits_the_class_does_not_keep_it() {
        let _alone = ALONE.lock();
        if !may_be_meek() {
            return;
        }
        let deference = Arc::new(Deference::new(1));
        std::thread::scope(|scope| {
            deference.start(scope);
            let member = deference.join(0);
            eventually(|| {
                member.answers();
                class() == Class::Meek
            });
            let heir = scope.spawn(|| eventually(|| class() == Class::Plain));
            eventually(|| {
                member.answers();
                heir.is_finished()
            });
            deference.end();
        });
    }

    #[test]
    fn a_thread_that_was_kept_from_running_is_plain_for_a_while() {
        let _alone = ALONE.lock();
        if !may_be_meek() {
            return;
        }
        let deference = Arc::new(Deference::new(1));
        deference.is_possible.store(true, Ordering::SeqCst);
        let member = deference.join(0);
        let queue = &deference.queues[0];
        let mut watched = Watched::default();
        member.become_meek();
        assert_eq!(class(), Class::Meek);
        // It runs, so it could; and it has answered nothing.
        assert!(!queue.look(&mut watched));
        assert_eq!(class(), Class::Plain);
        for _ in 0..PAUSE.0 {
            assert!(queue.pauses.load(Ordering::SeqCst));
            (0..2 * MANY).for_each(|_| member.answers());
            assert_eq!(class(), Class::Plain);
            queue.look(&mut watched);
        }
        eventually(|| {
            member.answers();
            class() == Class::Meek
        });
        member.become_plain();
    }

    #[test]
    fn pauses_grow_when_they_did_not_help_and_begin_anew_when_they_did() {
        let mut pause = Pause::default();
        let sit_out = |pause: &mut Pause| (0..).take_while(|_| pause.look()).count() as u32;
        let mut expected = PAUSE.0;
        for _ in 0..10 {
            pause.begin();
            assert_eq!(sit_out(&mut pause), expected);
            expected = (2 * expected).min(PAUSE.1);
        }
        assert_eq!(expected, PAUSE.1);
        (0..=PAUSE.1).for_each(|_| assert!(!pause.look()));
        pause.begin();
        assert_eq!(sit_out(&mut pause), PAUSE.0);
    }
}
