//! The transport over /dev/fuse.
//!
//! One read returns one request, one write delivers one reply. Each thread has a descriptor of its
//! own (`sys::clone_fuse`) with its own list of requests under way; a reply goes back through the
//! descriptor its request came from.
//!
//! A request is read into a buffer laid out so that the data of a WRITE, which begins behind 80
//! bytes of headers, is page-aligned. A reply is gathered from its head and body by the kernel, so
//! that data that was read is not copied on the way.
//!
//! # Threads
//!
//! The kernel keeps one queue and wakes its readers in the order in which they began to wait. With
//! several waiting, requests therefore go round the CPUs, and waking a thread on another, halted
//! CPU costs several times what the request does. So normally *one* thread waits, the leader, and
//! it stays on the CPU on which requests are made. Where that is, a thread of its own finds out
//! (`Session::start_to_follow`): what the kernel says of a process may be the last that holds on to
//! its memory, and then its mappings end there and then, with dirty pages that have to be written
//! back, which somebody must be free to do.
//!
//! ```text
//! leader:  wait -> answer -> wait -> ...
//! spare:   parked -> wait -> answer -> ... -> parked, when somebody else waits again
//! watch:   every millisecond: the leader is held up, or was busy at each of several looks?
//!          release a spare, or make one
//! ```
//!
//! So a leader that is held up by a device is joined within a millisecond, and one that has more
//! clients than it can serve soon after. While nothing is asked the watch sleeps too. Before a
//! request that is long in any case, a large transfer, the leader itself releases a spare, so that
//! read-ahead and write-back are served side by side.
//!
//! A halted CPU takes long to wake, on virtual machines above all, and a client that does one thing
//! after another halts it with each. So the leader does not sleep at once when requests have been
//! coming close together: it asks for the next one again and again for a moment (`Eager`), and
//! gives way to whatever else wants its CPU.
//!
//! # Seeks
//!
//! For SEEK_DATA and SEEK_HOLE the kernel asks without having written its dirty pages back, so
//! the core would take for a hole what is data in the page cache. The seeker thread makes the
//! kernel write back first (an invalidation of the range does that) and then answers. It is a
//! thread of its own because others must be free to receive those very writes.

use crate::deference::Deference;
use crate::log;
use crate::notify::send;
use crate::ops::{self, Afterwards, Server, TRANSFER_BYTES_MAX};
use crate::options::Transport;
use crate::reply::{Head, Reply};
use crate::request::{Op, Request};
use crate::rings::Prepared;
use crate::{sys, wire};
use fs_core::buf::Buf;
use fs_core::vfs::Seek;
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{sched_setaffinity, CpuSet, Pid};
use std::io::Write as _;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

/// Where a request begins in its buffer, so that data of a WRITE begins at the second page.
const REQUEST_START: usize = 4096 - wire::WRITE_DATA_OFFSET;

/// Room for extensions and names behind the largest data.
const REQUEST_BYTES: usize = 4096 + TRANSFER_BYTES_MAX + 4096;

/// Time between two looks of the watch.
const WATCH_EVERY: Duration = Duration::from_millis(1);

/// Looks in a row that find everybody busy, though getting on, after which one more joins. A thread
/// that is seldom needed takes requests to other CPUs.
const WATCH_LOOKS_BUSY: u32 = 16;

/// Looks without a request in between after which the watch sleeps.
const WATCH_LOOKS_IDLE: u32 = 50;

/// Time between two looks for requests that nobody waits for.
const COLLECT_EVERY: Duration = Duration::from_millis(2);

/// Requests after which the leader lets it be found out where they come from. It costs about as
/// much as one.
const FOLLOW_EVERY: u64 = 64;

/// No CPU has this number.
const NO_CPU: usize = usize::MAX;

/// Most memory that a thread needs, in bytes: its buffers, and for a request of the largest size
/// what is read, and what becomes of that when it is decompressed.
const THREAD_BYTES: usize = REQUEST_BYTES + 3 * TRANSFER_BYTES_MAX;

/// How long a parked thread keeps its buffers.
const KEEP_BUFFERS: Duration = Duration::from_millis(500);

/// How the threads of a session are arranged.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// Most threads that answer requests.
    pub max: usize,
    /// Whether the leader follows its clients from CPU to CPU.
    pub follow: bool,
    /// How requests travel.
    pub transport: Transport,
    /// Whether `max` was asked for.
    pub is_given: bool,
}

impl Threads {
    /// What suits this machine where `max` is not given, with at most half of `memory`, in bytes.
    pub fn new(max: Option<usize>, memory: u64, transport: Transport) -> Threads {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let affordable = usize::try_from(memory / 2 / THREAD_BYTES as u64).unwrap_or(usize::MAX);
        let suitable = (4 * cpus).clamp(16, 64).min(affordable).max(1);
        let is_given = max.is_some();
        Threads { max: max.unwrap_or(suitable), follow: true, transport, is_given }
    }

    /// Most memory that they need, in bytes.
    pub fn memory(&self) -> u64 {
        (self.max * THREAD_BYTES) as u64
    }

    /// How many for each queue, of as many queues as there are CPUs. A second one is needed where
    /// requests must not wait for one that waits for the disk.
    pub(crate) fn for_each_of(&self, queues: usize) -> usize {
        match self.is_given {
            true => (self.max / queues).max(1),
            false => (64 / queues).clamp(2, 8).min(self.max / queues).max(1),
        }
    }
}

/// Serves one connection.
pub struct Session {
    device: Arc<OwnedFd>,
    server: Arc<Server>,
    threads: Threads,
    crew: Crew,
}

/// Whether a thread goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    Unmounted,
}

/// What a descriptor gave.
#[derive(Clone, Copy)]
enum Received {
    /// So many bytes of a request, in the worker's buffer.
    Request(usize),
    /// Nothing yet.
    Nothing,
    Unmounted,
}

/// How requests come once the protocol is agreed on.
enum Way {
    Device,
    Rings(Arc<Deference>),
}

impl Session {
    /// A session on a descriptor of /dev/fuse that has been, or will be, mounted.
    pub fn new(device: OwnedFd, server: Arc<Server>, threads: Threads) -> Session {
        Session { device: Arc::new(device), server, threads, crew: Crew::default() }
    }

    /// Answers requests until the filesystem is unmounted, then closes the volume. `ready` is
    /// called once the kernel has agreed on the protocol.
    ///
    /// # Errors
    /// The kernel's or the volume's refusal, in words.
    pub fn serve(self, ready: impl FnOnce()) -> Result<(), String> {
        let (seeks, to_seek) = mpsc::channel();
        let mut leader = Worker::new(&self, Arc::clone(&self.device), seeks.clone())
            .map_err(|_| "not enough memory for request buffers".to_string())?;
        std::thread::scope(|scope| {
            let served = self.initialise(scope, &mut leader);
            let Ok(Some(way)) = served else { return served.map(drop) };
            ready();
            match way {
                Way::Device => {
                    let (askers, to_follow) = mpsc::sync_channel(1);
                    start(scope, "fuse-seek", || self.seek_all(to_seek));
                    if self.threads.follow {
                        self.start_to_follow(to_follow);
                    }
                    start(scope, "fuse-watch", || self.watch(scope, seeks));
                    self.lead(leader, &askers);
                    drop(askers);
                    self.crew.end();
                }
                Way::Rings(deference) => {
                    let _guarded = deference.start(scope);
                    self.collect(leader);
                }
            }
            Ok(())
        })?;
        self.finish()
    }

    /// Answers requests until the protocol is agreed on. `None` when that never came to pass.
    fn initialise<'scope, 'env>(
        &self,
        scope: &'scope Scope<'scope, 'env>,
        leader: &mut Worker<'_>,
    ) -> Result<Option<Way>, String> {
        let mut prepared = None;
        while !self.server.is_initialised() {
            let received = leader.receive();
            if let Ok(Received::Request(len)) = received {
                if prepared.is_none() && leader.is_offered_rings(len) {
                    prepared = self.prepare(scope);
                }
            }
            match received.map(|received| leader.dispatch(received)) {
                Ok(Next::Request) => (),
                Ok(Next::Unmounted) => return Ok(None),
                Err(errno) => return Err(format!("cannot read from /dev/fuse: {errno}")),
            }
        }
        let begun = match prepared {
            Some(prepared) if self.server.uses_rings() => prepared.begin(),
            _ => Err(Errno::OPNOTSUPP),
        };
        if let (Err(errno), Transport::Uring) = (&begun, self.threads.transport) {
            log::warning(&format!("requests come over /dev/fuse, not over io_uring: {errno}"));
        }
        Ok(Some(begun.map_or(Way::Device, Way::Rings)))
    }

    fn prepare<'scope, 'env>(
        &self,
        scope: &'scope Scope<'scope, 'env>,
    ) -> Option<Prepared<'scope, 'env>> {
        if self.threads.transport == Transport::Device {
            return None;
        }
        let prepared = Prepared::new(scope, &self.device, &self.server, self.threads);
        prepared
            .inspect(|_| self.server.accept_rings())
            .inspect_err(|errno| log::warning(&format!("cannot make io_uring rings: {errno}")))
            .ok()
    }

    fn finish(&self) -> Result<(), String> {
        self.server.close().map_err(|error| format!("cannot close the pool cleanly: {error}"))
    }

    /// Life of the leader where requests come over io_uring: what still comes here nobody waits
    /// for. The kernel collects it in the pauses, so that not each costs a wake-up.
    fn collect(&self, mut worker: Worker<'_>) {
        while self.turn(&mut worker) {
            std::thread::sleep(COLLECT_EVERY);
        }
    }

    /// Life of the leader. Now and then `askers` is told who asks.
    fn lead(&self, mut worker: Worker<'_>, askers: &mpsc::SyncSender<u32>) {
        let mut at = NO_CPU;
        worker.be_eager();
        for count in 1u64.. {
            if count % FOLLOW_EVERY == 0 {
                if let Some(pid) = worker.last_pid {
                    // Nobody follows, or has come to the last one yet.
                    let _ = askers.try_send(pid);
                }
            }
            let wanted = self.crew.cpu.load(Ordering::Relaxed);
            if wanted != at {
                at = wanted;
                stay_on(wanted);
            }
            if !self.turn(&mut worker) {
                return;
            }
        }
    }

    /// Has it found out where those who ask are: two in agreement move the leader. The end of the
    /// session does not wait for this thread, which may wait for what nobody answers any more.
    fn start_to_follow(&self, askers: mpsc::Receiver<u32>) {
        let cpu = Arc::clone(&self.crew.cpu);
        let life = move || {
            let mut before = None;
            for pid in askers {
                let seen = last_cpu(pid);
                if let Some(seen) = seen.filter(|_| seen == before) {
                    cpu.store(seen, Ordering::Relaxed);
                }
                before = seen;
            }
        };
        if let Err(error) = Builder::new().name("fuse-follow".into()).spawn(life) {
            log::warning(&format!("cannot start thread fuse-follow: {error}"));
        }
    }

    /// Life of a thread that joins when the leader is held up.
    fn spare(&self, mut worker: Worker<'_>) {
        while self.turn(&mut worker) {
            if !self.crew.somebody_waits() {
                continue;
            }
            let mut parked = self.crew.park(Some(KEEP_BUFFERS));
            if parked == Parked::Still {
                worker.drop_buffers();
                parked = self.crew.park(None);
                if let Err(error) = worker.make_buffers() {
                    // The watch finds that nobody waits, and tries again.
                    log::error(&format!("a thread that answers requests ends: {error}"));
                    return;
                }
            }
            if parked == Parked::Ended {
                return;
            }
        }
    }

    /// Waits for one request and answers it. False when the session is over.
    fn turn(&self, worker: &mut Worker<'_>) -> bool {
        match worker.step() {
            Ok(Next::Request) => return true,
            Ok(Next::Unmounted) => (),
            Err(errno) => log::error(&format!("cannot read from /dev/fuse: {errno}")),
        }
        self.crew.end();
        false
    }

    /// Sees to it that somebody waits for requests.
    fn watch<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
        seeks: mpsc::Sender<Asked>,
    ) {
        let mut spares = 0;
        let (mut looks_idle, mut looks_busy) = (0, 0);
        let mut served = 0;
        while !self.crew.has_ended() {
            std::thread::sleep(WATCH_EVERY);
            let gets_on = self.crew.served_more_than(&mut served);
            if !self.crew.somebody_waits() {
                looks_idle = 0;
                looks_busy += 1;
                if gets_on && looks_busy < WATCH_LOOKS_BUSY {
                    continue;
                }
                looks_busy = 0;
                if !self.crew.release() && spares + 1 < self.threads.max {
                    spares += usize::from(self.add_spare(scope, seeks.clone(), spares));
                }
                continue;
            }
            looks_busy = 0;
            if gets_on {
                looks_idle = 0;
            } else {
                looks_idle += 1;
                if looks_idle >= WATCH_LOOKS_IDLE {
                    self.crew.sleep_until_request(served);
                    looks_idle = 0;
                }
            }
        }
    }

    fn add_spare<'scope, 'env>(
        &'scope self,
        scope: &'scope Scope<'scope, 'env>,
        seeks: mpsc::Sender<Asked>,
        index: usize,
    ) -> bool {
        // Without permission to open /dev/fuse (a mount made by fusermount3) threads share one.
        let device =
            sys::clone_fuse(&self.device).map_or_else(|_| Arc::clone(&self.device), Arc::new);
        match Worker::new(self, device, seeks) {
            Ok(worker) => start(scope, &format!("fuse-{index}"), move || self.spare(worker)),
            // Fewer threads are slower, not wrong; the next look tries again.
            Err(_) => false,
        }
    }

    /// Life of the seeker.
    fn seek_all(&self, asked: mpsc::Receiver<Asked>) {
        for seek in asked {
            let Op::Seek { offset, .. } = seek.op else { continue };
            // NOENT: the kernel holds no such inode, so it holds no dirty page of it either.
            let _ = notify_inval_range(seek.device.as_fd(), seek.node, offset);
            let request = Request {
                unique: seek.unique,
                node: seek.node,
                uid: seek.uid,
                gid: seek.gid,
                pid: seek.pid,
                op: seek.op,
            };
            let _ = answer(&self.server, seek.device.as_fd(), &request, &mut []);
        }
    }
}

pub(crate) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    life: impl FnOnce() + Send + 'scope,
) -> bool {
    let started = Builder::new().name(name.to_string()).spawn_scoped(scope, life);
    started.map_err(|error| log::error(&format!("cannot start thread {name}: {error}"))).is_ok()
}

/// A seek on its way to the seeker.
struct Asked {
    device: Arc<OwnedFd>,
    unique: u64,
    node: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    op: Op<'static>,
}

/// Who waits, who is parked.
struct Crew {
    /// Threads waiting for a request.
    waiting: AtomicUsize,
    /// Requests received.
    served: AtomicU64,
    /// Whether the watch sleeps until a request arrives.
    watch_sleeps: AtomicBool,
    /// Where the leader should be.
    cpu: Arc<AtomicUsize>,
    /// Leaf lock; nothing is called with it held.
    state: Mutex<CrewState>,
    changed: Condvar,
}

#[derive(Default)]
struct CrewState {
    parked: usize,
    /// Parked threads that have been told to go on and have not done so yet.
    released: usize,
    ended: bool,
}

/// How parking ended.
#[derive(PartialEq, Eq)]
enum Parked {
    /// A thread is wanted.
    Released,
    /// The session is over.
    Ended,
    /// Nothing happened for as long as one was ready to wait.
    Still,
}

impl Default for Crew {
    fn default() -> Crew {
        Crew {
            waiting: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            watch_sleeps: AtomicBool::new(false),
            cpu: Arc::new(AtomicUsize::new(NO_CPU)),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

impl Crew {
    fn somebody_waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Around the wait for a request.
    fn begin_wait(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
    }

    fn end_wait(&self) {
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.served.fetch_add(1, Ordering::SeqCst);
        // Pairs with `sleep_until_request`: either this sees the flag or the watch the count.
        if self.watch_sleeps.load(Ordering::SeqCst) {
            let _state = self.state.lock();
            self.watch_sleeps.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Waits to be released, for so long or for ever.
    fn park(&self, patience: Option<Duration>) -> Parked {
        let until = patience.map(|patience| Instant::now() + patience);
        let mut state = self.state.lock();
        state.parked += 1;
        let mut is_over = false;
        while state.released == 0 && !state.ended && !is_over {
            match until {
                Some(until) => is_over = self.changed.wait_until(&mut state, until).timed_out(),
                None => self.changed.wait(&mut state),
            }
        }
        state.parked -= 1;
        if state.ended {
            return Parked::Ended;
        }
        if state.released == 0 {
            return Parked::Still;
        }
        state.released -= 1;
        Parked::Released
    }

    /// Lets a parked thread go on; false when there is none.
    fn release(&self) -> bool {
        let mut state = self.state.lock();
        if state.parked <= state.released {
            return false;
        }
        state.released += 1;
        self.changed.notify_all();
        true
    }

    fn served_more_than(&self, before: &mut u64) -> bool {
        let served = self.served.load(Ordering::SeqCst);
        std::mem::replace(before, served) != served
    }

    fn sleep_until_request(&self, served: u64) {
        let mut state = self.state.lock();
        self.watch_sleeps.store(true, Ordering::SeqCst);
        while self.watch_sleeps.load(Ordering::SeqCst)
            && self.served.load(Ordering::SeqCst) == served
            && !state.ended
        {
            self.changed.wait(&mut state);
        }
        self.watch_sleeps.store(false, Ordering::SeqCst);
    }

    fn has_ended(&self) -> bool {
        self.state.lock().ended
    }

    fn end(&self) {
        self.state.lock().ended = true;
        self.changed.notify_all();
    }
}

/// The CPU a thread last ran on; the 39th field of its stat file.
fn last_cpu(pid: u32) -> Option<usize> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let field = behind_name(&stat)?.split(|&b| b == b' ').nth(36)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// What a thread of this process does, as a letter of proc_pid_stat(5): `R` when it runs or could.
/// Takes no memory.
pub(crate) fn state_of(thread: Pid) -> Option<u8> {
    let mut path = [0; 48];
    let mut rest = &mut path[..];
    write!(rest, "/proc/self/task/{}/stat", thread.as_raw_nonzero()).ok()?;
    let unused = rest.len();
    let path = &path[..path.len() - unused];
    let stat = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    // The name has at most 15 bytes.
    let mut text = [0; 64];
    let len = rustix::io::read(stat, &mut text).ok()?;
    behind_name(&text[..len])?.first().copied()
}

/// A stat file from its third field on. The second, a name in parentheses, may hold anything.
fn behind_name(stat: &[u8]) -> Option<&[u8]> {
    let end = stat.iter().rposition(|&b| b == b')')?;
    stat.get(end + 2..)
}

/// Keeps the calling thread on a CPU. Being elsewhere is slower, not wrong.
pub(crate) fn stay_on(cpu: usize) -> bool {
    if cpu >= CpuSet::MAX_CPU {
        return false;
    }
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).is_ok()
}

/// Whether to look for the next request for a moment before sleeping.
///
/// It is worth it when the last sleep was shorter than the moment; after a long one it is not, so
/// a filesystem that is hardly used costs nothing.
struct Eager {
    is_hot: bool,
}

impl Eager {
    /// How long to look. A wake-up takes up to 100 us where this was measured (a virtual machine
    /// without halt polling); what a client does between two requests is mostly less.
    const MOMENT: Duration = Duration::from_micros(100);

    /// Waits for a request on a descriptor whose reads do not block.
    fn receive(&mut self, device: &OwnedFd, buf: &mut [u8]) -> Result<usize, Errno> {
        let begun = Instant::now();
        while self.is_hot {
            match rustix::io::read(device, &mut *buf) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                received => return received,
            }
            self.is_hot = begun.elapsed() < Eager::MOMENT;
        }
        let slept = Instant::now();
        rustix::event::poll(&mut [PollFd::new(device, PollFlags::IN)], None)?;
        self.is_hot = slept.elapsed() < Eager::MOMENT;
        rustix::io::read(device, buf)
    }
}

/// A thread's descriptor and buffers.
struct Worker<'a> {
    session: &'a Session,
    device: Arc<OwnedFd>,
    seeks: mpsc::Sender<Asked>,
    request: Buf,
    body: Buf,
    /// Who made the last request.
    last_pid: Option<u32>,
    /// For the leader, if it has a descriptor to itself.
    eager: Option<Eager>,
}

impl<'a> Worker<'a> {
    fn new(
        session: &'a Session,
        device: Arc<OwnedFd>,
        seeks: mpsc::Sender<Asked>,
    ) -> Result<Worker<'a>, fs_core::error::Error> {
        let mut worker = Worker {
            session,
            device,
            seeks,
            request: Buf::default(),
            body: Buf::default(),
            last_pid: None,
            eager: None,
        };
        worker.make_buffers()?;
        Ok(worker)
    }

    /// Gives the memory of the buffers back, until [`Worker::make_buffers`].
    fn drop_buffers(&mut self) {
        self.request = Buf::default();
        self.body = Buf::default();
    }

    fn make_buffers(&mut self) -> Result<(), fs_core::error::Error> {
        self.request = Buf::zeroed(REQUEST_BYTES)?;
        self.body = Buf::zeroed(TRANSFER_BYTES_MAX)?;
        Ok(())
    }

    /// Makes it look for requests before it sleeps, if it can have a descriptor to itself: that
    /// reads do not block holds for all who share one.
    fn be_eager(&mut self) {
        let Ok(device) = sys::clone_fuse(&self.device) else { return };
        if rustix::fs::fcntl_setfl(&device, OFlags::NONBLOCK).is_ok() {
            self.device = Arc::new(device);
            self.eager = Some(Eager { is_hot: false });
        }
    }

    /// Receives one request and answers it, or hands it on.
    fn step(&mut self) -> Result<Next, Errno> {
        let received = self.receive()?;
        Ok(self.dispatch(received))
    }

    /// Waits for a request.
    fn receive(&mut self) -> Result<Received, Errno> {
        let crew = &self.session.crew;
        crew.begin_wait();
        let buf = &mut self.request[REQUEST_START..];
        let received = match &mut self.eager {
            Some(eager) => eager.receive(&self.device, buf),
            None => rustix::io::read(&self.device, buf),
        };
        crew.end_wait();
        match received {
            Ok(0) | Err(Errno::NODEV | Errno::CONNABORTED) => Ok(Received::Unmounted),
            Ok(len) => Ok(Received::Request(len)),
            // NOENT: the request was withdrawn between being queued and being read.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => Ok(Received::Nothing),
            Err(errno) => Err(errno),
        }
    }

    /// The request in the buffer.
    fn decode(&self, len: usize) -> Result<Request<'_>, (Option<u64>, Errno)> {
        let bytes = &self.request[REQUEST_START..REQUEST_START + len];
        Request::decode(bytes, self.session.server.layout())
    }

    /// Whether the request in the buffer is an INIT that offers to go over io_uring.
    fn is_offered_rings(&self, len: usize) -> bool {
        self.decode(len).is_ok_and(|request| match request.op {
            Op::Init { flags, .. } => flags & wire::init::OVER_IO_URING != 0,
            _ => false,
        })
    }

    /// Answers the request in the buffer, or hands it on.
    fn dispatch(&mut self, received: Received) -> Next {
        let len = match received {
            Received::Request(len) => len,
            Received::Nothing => return Next::Request,
            Received::Unmounted => return Next::Unmounted,
        };
        let Session { server, crew, .. } = self.session;
        let bytes = &self.request[REQUEST_START..REQUEST_START + len];
        let delivered = match Request::decode(bytes, server.layout()) {
            Ok(request) => {
                self.last_pid = Some(request.pid).filter(|&pid| pid != 0);
                if is_long(&request.op) && !crew.somebody_waits() {
                    crew.release();
                }
                match request.op {
                    Op::Seek { offset, what } => self.hand_on(&request, offset, what),
                    _ => {
                        let fd = self.device.as_fd();
                        let (sent, after) = answer(server, fd, &request, &mut self.body);
                        if let Some(after) = after {
                            if !crew.somebody_waits() {
                                crew.release();
                            }
                            carry_out(server, &after);
                        }
                        sent
                    }
                }
            }
            Err((Some(unique), errno)) => {
                send(self.device.as_fd(), &Head::error(unique, errno), &[])
            }
            Err((None, errno)) => {
                log::error(&format!("unreadable request of {len} bytes: {errno}"));
                Ok(())
            }
        };
        // An undeliverable reply means that the request is gone, or the connection; the next
        // read tells which.
        delivered.unwrap_or(());
        Next::Request
    }

    fn hand_on(&self, request: &Request<'_>, offset: u64, what: Seek) -> Result<(), Errno> {
        let asked = Asked {
            device: Arc::clone(&self.device),
            unique: request.unique,
            node: request.node,
            uid: request.uid,
            gid: request.gid,
            pid: request.pid,
            op: Op::Seek { offset, what },
        };
        match self.seeks.send(asked) {
            Ok(()) => Ok(()),
            // The seeker could not be started. An error is better than a hole that is none.
            Err(_) => send(self.device.as_fd(), &Head::error(request.unique, Errno::IO), &[]),
        }
    }
}

/// Whether waking another thread costs little compared with answering.
pub(crate) fn is_long(op: &Op<'_>) -> bool {
    const LARGE: usize = 128 << 10;
    match op {
        Op::Read { size, .. } => *size as usize >= LARGE,
        Op::Write { data, .. } => data.len() >= LARGE,
        _ => false,
    }
}

/// Carries out a request and sends the reply. Gives back what is to be done after that.
fn answer(
    server: &Server,
    device: BorrowedFd<'_>,
    request: &Request<'_>,
    body: &mut [u8],
) -> (Result<(), Errno>, Option<Afterwards>) {
    match handle(server, request, body) {
        Ok(reply) => {
            let sent = deliver(server, device, request.unique, &reply, body);
            (sent, server.afterwards(request, &reply))
        }
        Err(errno) => (send(device, &Head::error(request.unique, errno), &[]), None),
    }
}

/// Carries out a request, whatever becomes of it: a bug must not leave the caller waiting for ever.
pub(crate) fn handle(
    server: &Server,
    request: &Request<'_>,
    body: &mut [u8],
) -> Result<Reply, Errno> {
    // The panic hook has told what it was.
    catch_unwind(AssertUnwindSafe(|| server.handle(request, body))).unwrap_or(Err(Errno::IO))
}

/// Does what is left after a reply. The panic hook has told of a bug; nobody waits for this.
pub(crate) fn carry_out(server: &Server, after: &Afterwards) {
    let _ = catch_unwind(AssertUnwindSafe(|| server.carry_out(after)));
}

fn deliver(
    server: &Server,
    device: BorrowedFd<'_>,
    unique: u64,
    reply: &Reply,
    body: &[u8],
) -> Result<(), Errno> {
    let Some((head, body_len)) = reply.head(unique, ops::now()) else { return Ok(()) };
    send(device, &head, &body[..body_len]).inspect_err(|_| server.undo(reply))
}

/// Makes the kernel write dirty pages of an inode from `offset` on back, and drop them. Blocks
/// until the writes have been answered, by other threads.
pub(crate) fn notify_inval_range(
    device: BorrowedFd<'_>,
    node: u64,
    offset: u64,
) -> Result<(), Errno> {
    let start = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    send(device, &Head::notify_inval_inode(node, start), &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_of_a_thread_is_read_from_its_stat_file() {
        assert!(last_cpu(std::process::id()).is_some());
        assert_eq!(last_cpu(0), None);
    }

    #[test]
    fn a_released_thread_goes_on_and_the_others_stay_parked() {
        let crew = Crew::default();
        assert!(!crew.release(), "nobody is parked");
        assert!(crew.park(Some(Duration::from_millis(1))) == Parked::Still);
        std::thread::scope(|scope| {
            let parked: Vec<_> = (0..2).map(|_| scope.spawn(|| crew.park(None))).collect();
            while crew.state.lock().parked < 2 {
                std::thread::yield_now();
            }
            assert!(crew.release());
            while crew.state.lock().parked > 1 {
                std::thread::yield_now();
            }
            crew.end();
            // One was released while the session went on, the other by its end.
            let went_on = parked.into_iter().map(|t| t.join().unwrap());
            let went_on = went_on.filter(|parked| *parked == Parked::Released).count();
            assert!(went_on <= 1);
        });
    }

    #[test]
    fn a_request_wakes_the_watch() {
        let crew = Crew::default();
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| crew.sleep_until_request(0));
            while !crew.watch_sleeps.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            crew.begin_wait();
            crew.end_wait();
            watch.join().unwrap();
        });
    }
}
