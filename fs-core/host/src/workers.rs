//! Threads.
//!
//! One pool serves jobs and the helpers of [`parallel_for`](Workers::parallel_for). It keeps as
//! many threads as the machine runs at once and starts more while all of them are taken, because a
//! job may wait for another job: with a fixed number, a commit that waits for writers which stand
//! in the queue behind it would wait for good. Threads beyond the kept ones leave after some idle
//! seconds.
//!
//! A `parallel_for` lends its closure to helpers. It invites only as many as are free; its caller
//! works too; and when the caller finds no index left, it *closes* the loop: an invitation that no
//! thread has taken up by then is void. So the caller never waits for a thread that is busy
//! elsewhere, only for helpers that are inside the closure at that moment.

use fs_core::platform::{Job, Workers};
use parking_lot::{Condvar, Mutex};
use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Threads the pool may have beyond one for each processor.
const EXTRA_THREADS: usize = 64;
/// How long a thread beyond the kept ones waits for work before it leaves.
const IDLE_PATIENCE: Duration = Duration::from_secs(5);

/// A thread pool, and a thread for each timer.
pub struct HostWorkers {
    pool: Arc<Pool>,
}

struct Pool {
    parallelism: usize,
    /// Where the threads may run: wherever the pool's maker could.
    cpus: CpuSet,
    state: Mutex<PoolState>,
    work: Condvar,
}

#[derive(Default)]
struct PoolState {
    queue: VecDeque<Task>,
    threads: usize,
    idle: usize,
    closed: bool,
}

enum Task {
    Run(Job),
    Help(Arc<Loop>),
}

impl HostWorkers {
    /// A pool for as many threads as this process may run at once. None is started yet.
    pub fn new() -> HostWorkers {
        let parallelism = std::thread::available_parallelism().map_or(1, |n| n.get());
        HostWorkers::with_parallelism(parallelism)
    }

    /// A pool for `parallelism` threads, at least one.
    pub fn with_parallelism(parallelism: usize) -> HostWorkers {
        HostWorkers {
            pool: Arc::new(Pool {
                parallelism: parallelism.max(1),
                cpus: allowed_cpus(),
                state: Mutex::default(),
                work: Condvar::new(),
            }),
        }
    }
}

impl Default for HostWorkers {
    fn default() -> HostWorkers {
        HostWorkers::new()
    }
}

impl Drop for HostWorkers {
    /// Lets the threads leave once the queue is empty. Waits for none: the last owner of a pool may
    /// be one of its own jobs.
    fn drop(&mut self) {
        self.pool.state.lock().closed = true;
        self.pool.work.notify_all();
    }
}

impl Workers for HostWorkers {
    fn parallelism(&self) -> usize {
        self.pool.parallelism
    }

    fn spawn(&self, job: Job) {
        let mut state = self.pool.state.lock();
        state.queue.push_back(Task::Run(job));
        let short = state.idle < state.queue.len();
        if short && state.threads < self.pool.parallelism + EXTRA_THREADS {
            Pool::start_thread(&self.pool, state);
        } else {
            drop(state);
            self.pool.work.notify_one();
        }
    }

    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        if count <= 1 || self.pool.parallelism == 1 {
            return (0..count).for_each(each);
        }
        lend(count, each, |shared| self.pool.invite(count - 1, shared));
    }

    fn every(&self, period_ms: u64, mut tick: Box<dyn FnMut() -> bool + Send>) {
        let period = Duration::from_millis(period_ms.max(1));
        // A thread for each timer, so that a tick that waits delays no other.
        start("cairn-timer", self.pool.cpus, move || loop {
            std::thread::sleep(period);
            if !tick() {
                return;
            }
        })
        .expect("the system gives a thread for a timer");
    }
}

/// What each thread does first.
static AT_START: OnceLock<fn()> = OnceLock::new();

/// Has all threads that are started from now on, in this process, do this first: a thread inherits
/// more than its CPUs from the one that starts it. The first that is given stays.
pub fn at_start(first: fn()) {
    AT_START.get_or_init(|| first);
}

fn start(name: &str, cpus: CpuSet, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let life = move || {
        // A thread inherits the CPUs of the one that starts it, which may have been tied to one.
        // Being tied is slower, not wrong.
        let _ = sched_setaffinity(None, &cpus);
        if let Some(first) = AT_START.get() {
            first();
        }
        body();
    };
    std::thread::Builder::new().name(name.into()).spawn(life).map(|_| ())
}

/// The CPUs the calling thread may run on.
fn allowed_cpus() -> CpuSet {
    sched_getaffinity(None).unwrap_or_else(|_| {
        let mut all = CpuSet::new();
        (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
        all
    })
}

impl Pool {
    /// Starts a thread for the queue. Without one to be had, the queue is served by the threads
    /// there are; without any, by the caller.
    fn start_thread(pool: &Arc<Pool>, mut state: parking_lot::MutexGuard<'_, PoolState>) {
        state.threads += 1;
        drop(state);
        let own = pool.clone();
        if start("cairn-worker", pool.cpus, move || own.serve()).is_ok() {
            return;
        }
        let mut state = pool.state.lock();
        state.threads -= 1;
        if state.threads > 0 {
            drop(state);
            pool.work.notify_one();
            return;
        }
        while let Some(task) = state.queue.pop_front() {
            parking_lot::MutexGuard::unlocked(&mut state, || task.run());
        }
    }

    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(task) = state.queue.pop_front() {
                parking_lot::MutexGuard::unlocked(&mut state, || task.run());
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE_PATIENCE).timed_out();
            state.idle -= 1;
            if timed_out && state.queue.is_empty() && state.threads > self.parallelism {
                break;
            }
        }
        state.threads -= 1;
    }

    /// Asks up to `wanted` free threads to help with a loop, starting threads up to one for each
    /// processor besides the caller's.
    fn invite(self: &Arc<Pool>, wanted: usize, shared: &Arc<Loop>) {
        let helpers = wanted.min(self.parallelism - 1);
        for _ in 0..helpers {
            let mut state = self.state.lock();
            if state.idle > state.queue.len() {
                state.queue.push_back(Task::Help(shared.clone()));
                drop(state);
                self.work.notify_one();
            } else if state.threads < self.parallelism {
                state.queue.push_back(Task::Help(shared.clone()));
                Pool::start_thread(self, state);
            } else {
                return;
            }
        }
    }
}

impl Task {
    /// Runs the task. A job that panics has already said so on standard error; it takes nothing
    /// else with it.
    fn run(self) {
        match self {
            Task::Run(job) => drop(catch_unwind(AssertUnwindSafe(job))),
            Task::Help(shared) => shared.help(),
        }
    }
}

/// A `parallel_for` in progress, shared with its helpers.
struct Loop {
    /// The caller's closure. Valid while the loop is open or a helper is inside.
    each: *const (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    state: Mutex<LoopState>,
    left: Condvar,
}

#[derive(Default)]
struct LoopState {
    closed: bool,
    inside: usize,
    panic: Option<Box<dyn Any + Send>>,
}

// SAFETY: the closure behind `each` is `Sync`, and `help` alone reads the pointer, under the rule
// stated there.
unsafe impl Send for Loop {}
// SAFETY: as for `Send`; everything else in it is `Sync`.
unsafe impl Sync for Loop {}

/// Runs `each` over `0..count` with whatever helpers `invite` finds, and returns when no one is
/// inside the closure any more.
fn lend(count: usize, each: &(dyn Fn(usize) + Sync), invite: impl FnOnce(&Arc<Loop>)) {
    let each: *const (dyn Fn(usize) + Sync + '_) = each;
    // SAFETY: only the lifetime changes, of a pointer that is not followed here. `help` follows it
    // only while the loop is open or the helper is counted as inside, and `Close` does not let this
    // function return or unwind before the loop is closed and nobody is inside.
    let each: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(each) };
    let shared = Arc::new(Loop {
        each,
        count,
        next: AtomicUsize::new(0),
        state: Mutex::default(),
        left: Condvar::new(),
    });
    let close = Close(&shared);
    invite(&shared);
    // SAFETY: the caller's borrow of the closure is still live here.
    shared.work(unsafe { &*each });
    drop(close);
    let panic = shared.state.lock().panic.take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Closes a loop and waits until nobody is inside, also when the caller unwinds.
struct Close<'a>(&'a Loop);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        while state.inside > 0 {
            self.0.left.wait(&mut state);
        }
    }
}

impl Loop {
    fn work(&self, each: &(dyn Fn(usize) + Sync)) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            each(index);
        }
    }

    fn help(&self) {
        {
            let mut state = self.state.lock();
            if state.closed {
                return;
            }
            state.inside += 1;
        }
        // SAFETY: the loop was open when this helper was counted as inside, so the caller is still
        // in `lend` and stays there until the count is taken back below.
        let each = unsafe { &*self.each };
        let outcome = catch_unwind(AssertUnwindSafe(|| self.work(each)));
        let mut state = self.state.lock();
        if let Err(panic) = outcome {
            // No use in going on; the caller passes the panic on.
            self.next.fetch_max(self.count, Ordering::Relaxed);
            state.panic.get_or_insert(panic);
        }
        state.inside -= 1;
        if state.inside == 0 {
            self.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc;

    #[test]
    fn parallel_for_calls_every_index_exactly_once() {
        let workers = HostWorkers::with_parallelism(4);
        for count in [0, 1, 2, 3, 100, 5000] {
            let calls: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
            workers.parallel_for(count, &|i| {
                calls[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(calls.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn parallel_for_really_uses_several_threads() {
        let workers = HostWorkers::with_parallelism(2);
        let barrier = std::sync::Barrier::new(2);
        // Two indices that wait for each other can only both return on two threads.
        workers.parallel_for(2, &|_| {
            barrier.wait();
        });
    }

    #[test]
    fn parallel_for_makes_progress_inside_itself_and_inside_jobs() {
        let workers = Arc::new(HostWorkers::with_parallelism(2));
        let (send, receive) = mpsc::channel();
        for _ in 0..8 {
            let (workers, send) = (workers.clone(), send.clone());
            workers.clone().spawn(Box::new(move || {
                let sum = AtomicUsize::new(0);
                workers.parallel_for(10, &|_| {
                    workers.parallel_for(10, &|i| {
                        sum.fetch_add(i, Ordering::Relaxed);
                    });
                });
                send.send(sum.into_inner()).unwrap();
            }));
        }
        let sums: Vec<usize> = (0..8).map(|_| receive.recv().unwrap()).collect();
        assert_eq!(sums, vec![450; 8]);
    }

    #[test]
    fn jobs_that_wait_for_jobs_queued_behind_them_do_not_starve() {
        let workers = HostWorkers::with_parallelism(1);
        let barrier = Arc::new(std::sync::Barrier::new(9));
        for _ in 0..8 {
            let barrier = barrier.clone();
            workers.spawn(Box::new(move || {
                barrier.wait();
            }));
        }
        barrier.wait();
    }

    #[test]
    fn a_panic_in_a_loop_reaches_its_caller_and_leaves_the_pool_usable() {
        let workers = HostWorkers::with_parallelism(3);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            workers.parallel_for(100, &|i| assert!(i != 50, "index fifty"));
        }));
        assert!(outcome.is_err());
        let sum = AtomicUsize::new(0);
        workers.parallel_for(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn a_timer_ticks_until_its_tick_says_no() {
        let workers = HostWorkers::with_parallelism(1);
        let (send, receive) = mpsc::channel();
        let mut left = 3;
        workers.every(
            1,
            Box::new(move || {
                left -= 1;
                send.send(left).unwrap();
                left > 0
            }),
        );
        assert_eq!(receive.iter().collect::<Vec<_>>(), [2, 1, 0]);
    }

    #[test]
    fn jobs_already_queued_run_although_the_pool_is_dropped() {
        let workers = HostWorkers::with_parallelism(1);
        let (send, receive) = mpsc::channel();
        for i in 0..20 {
            let send = send.clone();
            workers.spawn(Box::new(move || send.send(i).unwrap()));
        }
        drop((workers, send));
        assert_eq!(receive.iter().sum::<i32>(), 190);
    }
}
