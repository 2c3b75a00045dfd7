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
//! waits for its reply, or for a lock it holds, waits with it. So a guard looks every millisecond.
//! A thread that has answered nothing since the last look is made plain again, whatever the reason,
//! and so are all of a queue that has answered few requests. If one of them was running or ready to
//! run just then it may have been kept from it: for a while, longer each time, none of that queue
//! is meek. So a busy machine costs a request a millisecond or two once in a while, not more.
//!
//! Of the guard itself nothing may depend on a meek thread. It takes no memory while there may be
//! any, for the allocator has locks, and waits for no lock that is held by one (it is parked by the
//! standard library, which has no table of its own for that).
//!
//! # Invariants
//!
//! - Meek threads are marked in their seats. Class and mark change under the seat's lock, but for
//!   the guard, which makes a thread plain in any case and leaves the mark when the lock is taken:
//!   the thread may be about to become meek, and is made plain with the next look.
//! - The guard sleeps only when no seat is marked; a mark is set before the guard is woken.
//! - New threads have the class of the one that makes them. Those of this process's own making
//!   change it at once (`arrive`). Those that the kernel makes for io_uring, and whatever else, the
//!   guard looks for, now and then and twice before it sleeps, and makes plain.
//!
//! Without the permission to become plain again (the superuser's, or RLIMIT_NICE) no thread is ever
//! meek; nor when the process was given a class of its own.

use crate::device;
use crate::sys::{self, Class};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::process::getpid;
use rustix::thread::Pid;
use rustix::time::{clock_gettime, ClockId};
use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{Scope, Thread};
use std::time::{Duration, Instant};

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

/// For how long no thread of a queue is meek after one was kept from running: the first time, and
/// at most, when it happens again before as long a time has passed.
const PAUSE: (Duration, Duration) = (Duration::from_millis(64), Duration::from_millis(1024));

/// Quiet looks in a row, each with a search for heirs, after which the guard sleeps.
const LOOKS_QUIET: u32 = 2;

/// Who is meek, in one session.
#[derive(Default)]
pub(crate) struct Deference {
    /// The guard is there, and can make threads plain.
    is_possible: AtomicBool,
    /// By queue.
    queues: Vec<Queue>,
    /// The guard waits for a mark.
    is_asleep: AtomicBool,
    /// The session is over.
    has_ended: AtomicBool,
    guard: OnceLock<Thread>,
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
    /// With it held, a seat's `changing` is only tried, never waited for. No meek thread takes it.
    seats: Mutex<Vec<Arc<Seat>>>,
}

/// A thread that answers requests.
struct Seat {
    thread: Pid,
    is_meek: AtomicBool,
    /// Requests, and how many they were at the guard's last look.
    answered: AtomicU64,
    at_look: AtomicU64,
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

/// For how long threads stay plain that were kept from running. Times count from any one moment.
#[derive(Clone, Default)]
struct Pause {
    /// Its end, and its length; zero if there never was one.
    until: Duration,
    length: Duration,
}

impl Pause {
    fn is_at(&self, now: Duration) -> bool {
        now < self.until
    }

    /// Begins it.
    fn begin(&mut self, now: Duration) {
        let (first, most) = PAUSE;
        let again = !self.length.is_zero() && now <= self.until + self.length;
        self.length = if again { (2 * self.length).min(most) } else { first };
        self.until = now + self.length;
    }
}

/// Ends the guard when it is dropped.
pub(crate) struct Guarded(Arc<Deference>);

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::SeqCst);
        self.0.wake();
    }
}

/// A thread begins: it takes the class of the process's first thread if it has inherited another
/// from the one that made it.
pub(crate) fn arrive() {
    let inherited = || {
        sys::class_of(None) == Ok(Class::Meek) && sys::class_of(Some(getpid())) == Ok(Class::Plain)
    };
    if inherited() {
        // Without permission no thread was meek, and none inherits it.
        let _ = sys::set_class(None, Class::Plain);
    }
}

impl Deference {
    /// For so many queues.
    pub(crate) fn new(queues: usize) -> Deference {
        Deference { queues: (0..queues).map(|_| Queue::default()).collect(), ..Default::default() }
    }

    /// Starts the guard, if threads may be meek at all.
    pub(crate) fn start<'scope>(self: &Arc<Self>, scope: &'scope Scope<'scope, '_>) -> Guarded {
        if sys::class_of(None) == Ok(Class::Plain) && sees_itself() {
            let deference = Arc::clone(self);
            cairn_host::at_start(arrive);
            device::start(scope, "fuse-guard", move || deference.guard());
        }
        Guarded(Arc::clone(self))
    }

    /// A seat for the calling thread.
    pub(crate) fn join(self: &Arc<Self>, queue: usize) -> Member {
        arrive();
        let seat = Arc::new(Seat {
            thread: rustix::thread::gettid(),
            is_meek: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            at_look: AtomicU64::new(0),
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
        self.guard.get_or_init(std::thread::current);
        self.is_possible.store(true, Ordering::SeqCst);
        let mut watched = vec![Watched::default(); self.queues.len()];
        let begun = Instant::now();
        let (mut looks, mut quiet) = (0u32, 0);
        while !self.has_ended() {
            std::thread::sleep(LOOK_EVERY);
            looks = looks.wrapping_add(1);
            let mut is_quiet = true;
            for (queue, watched) in self.queues.iter().zip(&mut watched) {
                is_quiet &= queue.look(watched, begun.elapsed());
            }
            if is_quiet || looks % LOOKS_FOR_HEIRS == 0 {
                is_quiet &= self.make_heirs_plain();
            }
            quiet = if is_quiet { quiet + 1 } else { 0 };
            if quiet == LOOKS_QUIET {
                quiet = 0;
                self.sleep();
                for (queue, watched) in self.queues.iter().zip(&mut watched) {
                    watched.answered = queue.answered.load(Ordering::Relaxed);
                }
            }
        }
        // Pairs with `Member::become_meek`: either this finds the mark, or that finds this.
        self.is_possible.store(false, Ordering::SeqCst);
        self.queues.iter().for_each(Queue::make_plain);
        self.make_heirs_plain();
    }

    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::SeqCst)
    }

    /// Waits for a mark, or the end of the session.
    fn sleep(&self) {
        self.is_asleep.store(true, Ordering::SeqCst);
        // Pairs with `wake`, before which there is a mark or the end: either this sees it, or that
        // the sleep. An unparking that comes before the parking is kept for it.
        while self.is_asleep.load(Ordering::SeqCst) && !self.has_marks() && !self.has_ended() {
            std::thread::park();
        }
        self.is_asleep.store(false, Ordering::SeqCst);
    }

    fn has_marks(&self) -> bool {
        self.queues.iter().any(Queue::has_marks)
    }

    fn wake(&self) {
        if self.is_asleep.swap(false, Ordering::SeqCst) {
            if let Some(guard) = self.guard.get() {
                guard.unpark();
            }
        }
    }

    /// Makes threads plain that are not marked. Gives back whether all were looked at.
    fn make_heirs_plain(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let Ok(tasks) = rustix::fs::open("/proc/self/task", flags, Mode::empty()) else {
            return false;
        };
        let mut room = [MaybeUninit::uninit(); 2048];
        let mut tasks = RawDir::new(tasks, &mut room);
        while let Some(task) = tasks.next() {
            let Ok(task) = task else { return false };
            let id = task.file_name().to_str().ok().and_then(|name| name.parse().ok());
            let Some(thread) = id.and_then(Pid::from_raw) else { continue };
            if sys::class_of(Some(thread)) == Ok(Class::Meek) && !self.is_marked(thread) {
                let _ = sys::set_class(Some(thread), Class::Plain);
            }
        }
        true
    }

    fn is_marked(&self, thread: Pid) -> bool {
        let marked =
            |seat: &Arc<Seat>| seat.thread == thread && seat.is_meek.load(Ordering::SeqCst);
        self.queues.iter().any(|queue| queue.seats.lock().iter().any(marked))
    }
}

/// Whether the numbers of threads in /proc are those of this process.
fn sees_itself() -> bool {
    let own = getpid().as_raw_nonzero().to_string();
    std::fs::read_link("/proc/self").is_ok_and(|link| link == Path::new(&own))
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
        count.saturating_sub(self.at_spell.load(Ordering::Relaxed)) >= MANY
    }

    /// The guard's look; whether nothing is left to be looked at.
    fn look(&self, watched: &mut Watched, now: Duration) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        let enough = answered.saturating_sub(watched.answered) >= ENOUGH;
        watched.answered = answered;
        let may_be_meek = enough && !watched.pause.is_at(now);
        let mut was_kept = false;
        for seat in &*self.seats.lock() {
            let gets_on = seat.gets_on();
            if seat.is_meek.load(Ordering::SeqCst) && !(may_be_meek && gets_on) {
                was_kept |= !gets_on && device::state_of(seat.thread) == Some(b'R');
                seat.make_plain();
            }
        }
        if was_kept {
            watched.pause.begin(now);
        }
        let pauses = watched.pause.is_at(now);
        self.pauses.store(pauses, Ordering::Relaxed);
        !pauses && !self.has_marks()
    }

    fn has_marks(&self) -> bool {
        self.seats.lock().iter().any(|seat| seat.is_meek.load(Ordering::SeqCst))
    }

    fn make_plain(&self) {
        for seat in &*self.seats.lock() {
            seat.make_plain();
        }
    }
}

impl Seat {
    /// Whether it has answered anything since this was asked last.
    fn gets_on(&self) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        self.at_look.swap(answered, Ordering::Relaxed) != answered
    }

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
        self.seat.answered.fetch_add(1, Ordering::Relaxed);
        let count = queue.answered.fetch_add(1, Ordering::Relaxed) + 1;
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
        let is_possible = self.deference.is_possible.load(Ordering::SeqCst);
        if !is_possible || sys::set_class(None, Class::Meek).is_err() {
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

    /// Held by each test that has meek threads: a guard makes those plain that it does not know.
    static ALONE: Mutex<()> = Mutex::new(());

    /// Asks until it is so, for as long as a busy machine may take.
    fn eventually(mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it never came to pass");
            std::thread::sleep(Duration::from_micros(100));
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

    /// Requests one upon the other; the class of the thread that answered them.
    fn burst(member: &Member) -> Class {
        (0..2 * MANY).for_each(|_| member.answers());
        class()
    }

    #[test]
    fn threads_are_meek_while_requests_come_thick_and_fast_only() {
        let _alone = ALONE.lock();
        let deference = Arc::new(Deference::new(2));
        let may_be_meek = may_be_meek();
        std::thread::scope(|scope| {
            let guarded = deference.start(scope);
            let member = deference.join(1);
            if may_be_meek {
                eventually(|| burst(&member) == Class::Meek);
                // Without requests it is the guard that makes it plain, and then it sleeps.
                eventually(|| class() == Class::Plain);
                eventually(|| deference.is_asleep.load(Ordering::SeqCst));
                assert!(!deference.has_marks());
                // And again, up to something long.
                eventually(|| burst(&member) == Class::Meek);
                member.become_plain();
                assert_eq!(class(), Class::Plain);
                assert!(!deference.has_marks());
            } else {
                assert_eq!(burst(&member), Class::Plain);
            }
            drop(member);
            drop(guarded);
        });
        assert!(deference.queues[1].seats.lock().is_empty());
    }

    #[test]
    fn nobody_is_meek_once_the_guard_is_gone() {
        let _alone = ALONE.lock();
        let deference = Arc::new(Deference::new(1));
        let before = class();
        let member = deference.join(0);
        std::thread::scope(|scope| drop(deference.start(scope)));
        assert_eq!(burst(&member), before);
        // Had it just been found possible.
        member.become_meek();
        assert_eq!(class(), before);
        assert!(!deference.has_marks());
    }

    #[test]
    fn who_inherits_the_class_does_not_keep_it() {
        let _alone = ALONE.lock();
        if !may_be_meek() {
            return;
        }
        let deference = Arc::new(Deference::new(1));
        std::thread::scope(|scope| {
            let guarded = deference.start(scope);
            let member = deference.join(0);
            let inherits = || {
                burst(&member);
                let heir = scope.spawn(|| {
                    let inherited = class() == Class::Meek;
                    eventually(|| class() == Class::Plain);
                    inherited
                });
                while !heir.is_finished() {
                    burst(&member);
                }
                heir.join().unwrap()
            };
            eventually(inherits);
            // A thread of this process's own making sees to it itself.
            let arrives = || {
                burst(&member);
                let heir = || {
                    let inherited = class() == Class::Meek;
                    arrive();
                    assert_eq!(class(), Class::Plain);
                    inherited
                };
                scope.spawn(heir).join().unwrap()
            };
            eventually(arrives);
            drop(guarded);
        });
    }

    /// A thread that is meek, without a guard.
    fn meek() -> (Arc<Deference>, Member) {
        let deference = Arc::new(Deference::new(1));
        deference.is_possible.store(true, Ordering::SeqCst);
        let member = deference.join(0);
        member.become_meek();
        assert_eq!(class(), Class::Meek);
        (deference, member)
    }

    #[test]
    fn a_thread_that_was_kept_from_running_is_plain_for_a_while() {
        let _alone = ALONE.lock();
        if !may_be_meek() {
            return;
        }
        let (deference, member) = meek();
        let queue = &deference.queues[0];
        let mut watched = Watched::default();
        // It runs, so it could; and it has answered nothing.
        assert!(!queue.look(&mut watched, Duration::ZERO));
        assert_eq!(class(), Class::Plain);
        assert_eq!(burst(&member), Class::Plain);
        queue.look(&mut watched, PAUSE.0 - LOOK_EVERY);
        assert_eq!(burst(&member), Class::Plain);
        queue.look(&mut watched, PAUSE.0);
        eventually(|| burst(&member) == Class::Meek);
        member.become_plain();
    }

    #[test]
    fn a_thread_that_does_not_get_on_is_made_plain_though_others_do() {
        let _alone = ALONE.lock();
        if !may_be_meek() {
            return;
        }
        let (deference, member) = meek();
        let queue = &deference.queues[0];
        let mut watched = Watched::default();
        let now = Duration::ZERO;
        // It answers as much as others do, and stays.
        member.answers();
        queue.answered.fetch_add(ENOUGH, Ordering::Relaxed);
        queue.look(&mut watched, now);
        assert_eq!(class(), Class::Meek);
        // Now only they do.
        queue.answered.fetch_add(ENOUGH, Ordering::Relaxed);
        queue.look(&mut watched, now);
        assert_eq!(class(), Class::Plain);
        assert!(queue.pauses.load(Ordering::SeqCst) && !queue.has_marks());
    }

    #[test]
    fn pauses_grow_when_they_did_not_help_and_begin_anew_when_they_did() {
        let mut pause = Pause::default();
        let (mut now, mut expected) = (Duration::ZERO, PAUSE.0);
        assert!(!pause.is_at(now));
        for _ in 0..10 {
            pause.begin(now);
            assert!(pause.is_at(now + expected - LOOK_EVERY) && !pause.is_at(now + expected));
            now += 2 * expected;
            expected = (2 * expected).min(PAUSE.1);
        }
        assert_eq!(expected, PAUSE.1);
        now += LOOK_EVERY;
        pause.begin(now);
        assert!(!pause.is_at(now + PAUSE.0));
    }
}
