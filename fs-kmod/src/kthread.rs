//! Kernel threads, and the core's [`Workers`] on top of them.
//!
//! A [`Thread`] runs a closure and is joined when it is dropped. Joining waits until the thread is
//! gone, not only until its closure has returned: the module's code may be unloaded right after.
//!
//! A [`Pool`] owns a fixed number of threads that take jobs from one queue, and one thread for each
//! ticker. [`Pool::workers`] is the handle for the core; it may outlive the pool, whose threads
//! then no longer exist: a job given to it afterwards runs at once, in the thread that gives it.

use crate::klock::{self, Mood};
use crate::stack;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use fs_core::platform::{Job, Workers};
use fs_core::sync::{Mutex, Signal};
use kernel::bindings as b;
use kernel::error::{from_err_ptr, Result};
use kernel::ffi::{c_int, c_void};
use kernel::prelude::*;

/// What the new thread and its owner share.
struct Start {
    main: Mutex<Option<Job>>,
    has_returned: AtomicBool,
}

impl Start {
    fn key(&self) -> *mut c_void {
        self.has_returned.as_ptr().cast()
    }
}

/// A kernel thread; dropping it waits for its end.
pub(crate) struct Thread {
    task: NonNull<b::task_struct>,
    start: Arc<Start>,
}

// SAFETY: a task pointer with a reference may be used from any thread.
unsafe impl Send for Thread {}
// SAFETY: nothing is done through a shared reference.
unsafe impl Sync for Thread {}

unsafe extern "C" fn thread_main(data: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes a reference it has given up.
    let start = unsafe { Arc::from_raw(data.cast_const().cast::<Start>()) };
    let main = start.main.lock().take();
    if let Some(main) = main {
        stack::watched(main);
    }
    start.has_returned.store(true, Ordering::Release);
    klock::wake(start.key());
    0
}

impl Thread {
    /// Starts a thread that runs `main`.
    ///
    /// # Errors
    /// When the kernel cannot make one.
    pub(crate) fn spawn(main: impl FnOnce() + Send + 'static) -> Result<Thread> {
        let start = Arc::new(Start {
            main: Mutex::new(Some(Box::new(main))),
            has_returned: AtomicBool::new(false),
        });
        let data = Arc::into_raw(start.clone());
        // SAFETY: `thread_main` takes over the reference in `data`; the format takes no argument.
        let task = from_err_ptr(unsafe {
            b::kthread_create_on_node(
                Some(thread_main),
                data.cast_mut().cast(),
                b::NUMA_NO_NODE,
                c"cairn".as_ptr().cast(),
            )
        })
        .inspect_err(|_| {
            // SAFETY: no thread was made, so the reference was not taken over.
            drop(unsafe { Arc::from_raw(data) });
        })?;
        // SAFETY: the task has not run yet, so it is alive; the reference keeps it so.
        unsafe {
            b::get_task_struct(task);
            b::wake_up_process(task);
        }
        let task = NonNull::new(task).ok_or(ENOMEM)?;
        Ok(Thread { task, start })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // A thread that is stopped before it ran never calls its closure, so wait for that first.
        let start = &self.start;
        klock::wait(start.key(), Mood::Needed, None, || start.has_returned.load(Ordering::Acquire));
        // SAFETY: the reference taken in `spawn` is given back here.
        unsafe { b::kthread_stop_put(self.task.as_ptr()) };
    }
}

/// The queue, shared by the pool's threads and all handles.
struct Shared {
    queue: Mutex<Queue>,
    /// Notified when the queue gets a job or is closed; its address also is what tickers sleep on.
    changed: Signal,
    parallelism: usize,
}

struct Queue {
    jobs: VecDeque<Job>,
    tickers: Vec<Thread>,
    is_closed: bool,
}

impl Shared {
    fn key(&self) -> *mut c_void {
        (&raw const self.changed).cast_mut().cast()
    }

    fn wake_all(&self) {
        klock::wake(self.key());
    }

    /// The next job; `None` when the queue is closed and empty.
    fn next(&self) -> Option<Job> {
        let mut job = None;
        klock::wait(self.key(), Mood::Idle, None, || {
            let mut queue = self.queue.lock();
            job = queue.jobs.pop_front();
            job.is_some() || queue.is_closed
        });
        job
    }

    fn is_closed(&self) -> bool {
        self.queue.lock().is_closed
    }
}

/// Threads for background work; dropping it finishes what is queued and ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
}

impl Pool {
    /// A pool of `count` threads.
    ///
    /// # Errors
    /// When not all threads could be started.
    pub(crate) fn new(count: usize) -> Result<Pool> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                jobs: VecDeque::new(),
                tickers: Vec::new(),
                is_closed: false,
            }),
            changed: Signal::new(),
            parallelism: count.max(1),
        });
        let mut pool = Pool { shared, threads: Vec::new() };
        for _ in 0..count {
            let shared = pool.shared.clone();
            pool.threads.push(Thread::spawn(move || {
                while let Some(job) = shared.next() {
                    job();
                }
            })?);
        }
        Ok(pool)
    }

    /// As many threads as there are processors.
    ///
    /// # Errors
    /// When not all threads could be started.
    pub(crate) fn for_this_machine() -> Result<Pool> {
        // SAFETY: the kernel's own count of processors, read with one load.
        let online = unsafe { (&raw const b::__num_online_cpus).cast::<i32>().read_volatile() };
        Pool::new(usize::try_from(online).unwrap_or(1).max(1))
    }

    /// What the core gets.
    pub(crate) fn workers(&self) -> Arc<dyn Workers> {
        Arc::new(PoolWorkers(self.shared.clone()))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let tickers = {
            let mut queue = self.shared.queue.lock();
            queue.is_closed = true;
            core::mem::take(&mut queue.tickers)
        };
        self.shared.wake_all();
        // Tickers first: the jobs they give are still taken.
        drop(tickers);
        self.threads.clear();
    }
}

struct PoolWorkers(Arc<Shared>);

/// One `parallel_for`. Helpers may come to it after it has ended: then they find nothing to do, and
/// do not touch `each`.
struct Batch {
    each: *const (dyn Fn(usize) + Sync),
    count: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    ended: Signal,
}

// SAFETY: `each` may be called from any thread (`Sync`), and is followed only while its owner
// waits.
unsafe impl Send for Batch {}
// SAFETY: as above.
unsafe impl Sync for Batch {}

impl Batch {
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                return;
            }
            // SAFETY: `done` has not reached `count` without this index, so `parallel_for` waits
            // and its `each` is alive.
            unsafe { (*self.each)(index) };
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
                self.ended.notify_all();
            }
        }
    }
}

impl Workers for PoolWorkers {
    fn parallelism(&self) -> usize {
        self.0.parallelism
    }

    fn spawn(&self, job: Job) {
        {
            let mut queue = self.0.queue.lock();
            if !queue.is_closed {
                queue.jobs.push_back(job);
                drop(queue);
                self.0.wake_all();
                return;
            }
        }
        job();
    }

    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        if count <= 1 || self.0.parallelism <= 1 {
            (0..count).for_each(each);
            return;
        }
        // SAFETY: only the lifetime changes; the pointer is not followed after this call ends.
        let each: *const (dyn Fn(usize) + Sync + 'static) =
            unsafe { core::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), _>(each) };
        let batch = Arc::new(Batch {
            each,
            count,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            ended: Signal::new(),
        });
        for _ in 1..self.0.parallelism.min(count) {
            let batch = batch.clone();
            self.spawn(Box::new(move || batch.work()));
        }
        batch.work();
        batch.ended.wait_until(|| batch.done.load(Ordering::Acquire) == count);
    }

    fn every(&self, period_ms: u64, mut tick: Box<dyn FnMut() -> bool + Send>) {
        let ticks = klock::ticks_of_ms(period_ms);
        let shared = self.0.clone();
        let ticker = Thread::spawn(move || loop {
            let closed = klock::wait(shared.key(), Mood::Idle, Some(ticks), || shared.is_closed());
            if closed || !tick() {
                return;
            }
        });
        match ticker {
            Ok(thread) => self.adopt(thread),
            // The core makes progress without: whoever waits for it does the work.
            Err(error) => pr_warn!("no thread for periodic work: error {}\n", error.to_errno()),
        }
    }
}

impl PoolWorkers {
    /// Keeps a ticker until the pool ends. One that comes too late ends at once, and is joined
    /// here.
    fn adopt(&self, ticker: Thread) {
        let mut queue = self.0.queue.lock();
        if queue.is_closed {
            // The ticker needs the lock to see that.
            drop(queue);
            drop(ticker);
        } else {
            queue.tickers.push(ticker);
        }
    }
}
