//! The transport over /dev/fuse.
//!
//! One read returns one request, one write delivers one reply. Requests wait in one queue of the
//! connection; a descriptor of its own for each thread ([`sys::clone_fuse`]) keeps the lists of
//! requests under way, and their locks, apart.
//!
//! A request is read into a buffer laid out so that the data of a WRITE, which begins behind 80 bytes
//! of headers, is page-aligned. A reply is gathered from its head and body by the kernel, so data
//! that was read is not copied on the way.

use crate::log;
use crate::ops::{self, Server, TRANSFER_BYTES_MAX};
use crate::reply::{Head, Reply};
use crate::request::Request;
use crate::{sys, wire};
use fs_core::buf::Buf;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::io::IoSlice;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

/// Where a request begins in its buffer, so that data of a WRITE begins at the second page.
const REQUEST_START: usize = 4096 - wire::WRITE_DATA_OFFSET;

/// Room for extensions and names behind the largest data.
const REQUEST_BYTES: usize = 4096 + TRANSFER_BYTES_MAX + 4096;

/// How the threads of a session are arranged.
#[derive(Clone, Copy, Debug)]
pub struct Threads {
    /// How many.
    pub count: usize,
    /// Whether thread *n* stays on the *n*-th CPU.
    pub pinned: bool,
}

/// Serves one connection.
pub struct Session {
    device: OwnedFd,
    server: Arc<Server>,
}

/// Whether a thread goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Request,
    Unmounted,
}

impl Session {
    /// A session on a descriptor of /dev/fuse that has been, or will be, mounted.
    pub fn new(device: OwnedFd, server: Arc<Server>) -> Session {
        Session { device, server }
    }

    /// Answers requests until the filesystem is unmounted, then closes the volume. `ready` is
    /// called once the kernel has agreed on the protocol.
    ///
    /// # Errors
    /// The kernel's or the volume's refusal, in words.
    pub fn serve(self, threads: Threads, ready: impl FnOnce()) -> Result<(), String> {
        let memory = |_| "not enough memory for request buffers".to_string();
        let mut first = Worker::new(&self.server).map_err(memory)?;
        while !self.server.is_initialised() {
            match first.step(self.device.as_fd()) {
                Ok(Next::Request) => (),
                Ok(Next::Unmounted) => return self.finish(),
                Err(errno) => return Err(format!("cannot read from /dev/fuse: {errno}")),
            }
        }
        ready();
        std::thread::scope(|scope| {
            for index in 1..threads.count {
                let session = &self;
                std::thread::Builder::new()
                    .name(format!("fuse-{index}"))
                    .spawn_scoped(scope, move || match Worker::new(&session.server) {
                        Ok(worker) => session.run(worker, index, threads.pinned),
                        Err(error) => log::error(&format!("serving thread {index}: {error}")),
                    })
                    .map_err(|e| log::error(&format!("serving thread {index}: {e}")))
                    .ok();
            }
            self.run(first, 0, threads.pinned);
        });
        self.finish()
    }

    fn finish(&self) -> Result<(), String> {
        self.server.close().map_err(|error| format!("cannot close the pool cleanly: {error}"))
    }

    fn run(&self, mut worker: Worker, index: usize, pinned: bool) {
        if pinned {
            pin(index);
        }
        // Without permission to open /dev/fuse (a mount made by fusermount3) threads share one.
        let own = if index == 0 { None } else { sys::clone_fuse(&self.device).ok() };
        let device = own.as_ref().map_or(self.device.as_fd(), |own| own.as_fd());
        loop {
            match worker.step(device) {
                Ok(Next::Request) => (),
                Ok(Next::Unmounted) => return,
                Err(errno) => {
                    log::error(&format!("cannot read from /dev/fuse: {errno}"));
                    return;
                }
            }
        }
    }
}

/// Keeps the calling thread on the `index`-th of the CPUs it may use, counted round.
fn pin(index: usize) {
    use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
    let Some(&cpu) = cpus.get(index % cpus.len().max(1)) else { return };
    let mut only = CpuSet::new();
    only.set(cpu);
    // Being somewhere else is slower, not wrong.
    let _ = sched_setaffinity(None, &only);
}

/// A thread's buffers.
struct Worker {
    server: Arc<Server>,
    request: Buf,
    body: Buf,
}

impl Worker {
    fn new(server: &Arc<Server>) -> Result<Worker, fs_core::error::Error> {
        Ok(Worker {
            server: Arc::clone(server),
            request: Buf::zeroed(REQUEST_BYTES)?,
            body: Buf::zeroed(TRANSFER_BYTES_MAX)?,
        })
    }

    /// Receives one request and answers it.
    fn step(&mut self, device: BorrowedFd<'_>) -> Result<Next, Errno> {
        let len = match rustix::io::read(device, &mut self.request[REQUEST_START..]) {
            Ok(0) => return Ok(Next::Unmounted),
            Ok(len) => len,
            // NOENT: the request was withdrawn between being queued and being read.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => return Ok(Next::Request),
            Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(Next::Unmounted),
            Err(errno) => return Err(errno),
        };
        let bytes = &self.request[REQUEST_START..REQUEST_START + len];
        match Request::decode(bytes, self.server.layout()) {
            Ok(request) => answer(&self.server, device, &request, &mut self.body),
            Err((Some(unique), errno)) => send(device, &Head::error(unique, errno), &[]),
            Err((None, errno)) => {
                log::error(&format!("unreadable request of {len} bytes: {errno}"));
                Ok(())
            }
        }
        // The request is gone (NOENT) or the connection is: the next read tells which.
        .unwrap_or(());
        Ok(Next::Request)
    }
}

fn answer(
    server: &Server,
    device: BorrowedFd<'_>,
    request: &Request<'_>,
    body: &mut [u8],
) -> Result<(), Errno> {
    let result = catch_unwind(AssertUnwindSafe(|| server.handle(request, body)));
    match result {
        Ok(Ok(reply)) => deliver(server, device, request.unique, &reply, body),
        Ok(Err(errno)) => send(device, &Head::error(request.unique, errno), &[]),
        // A bug must not leave the caller waiting for ever. The message was printed by the hook.
        Err(_) => send(device, &Head::error(request.unique, Errno::IO), &[]),
    }
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

fn send(device: BorrowedFd<'_>, head: &Head, body: &[u8]) -> Result<(), Errno> {
    loop {
        let parts = [IoSlice::new(head.bytes()), IoSlice::new(body)];
        let parts = if body.is_empty() { &parts[..1] } else { &parts };
        match rustix::io::writev(device, parts) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => (),
            Err(errno) => return Err(errno),
        }
    }
}
