//! The transport over io_uring, where the kernel offers it (Linux 6.14, parameter `enable_uring` of
//! the module `fuse`).
//!
//! The kernel has a queue for each CPU and puts a request into the queue of the CPU it is made on.
//! A queue has entries; each holds one request at a time, from its arrival to its reply. Here every
//! entry has a thread and a ring (`Ring`) of its own, and the threads stay on the CPU of their
//! queue:
//!
//! ```text
//! CPU 0:  entry - ring - thread, entry - ring - thread, ...
//! CPU 1:  entry - ring - thread, ...
//! ```
//!
//! So a request wakes no other, halted CPU, and reply and wait for the next are one system call.
//! The kernel takes the entry that came back last: one thread of each queue is busy and in the
//! caches, and the buffers of the others are never touched. When it is held up, by a device or in
//! the processor, the next request goes to the next thread.
//!
//! A large transfer takes long enough to be worth another CPU: with read-ahead and write-back there
//! are several at once, all from one CPU. So before one a thread lets go of its CPU (`Place`), and
//! comes back with the next short request.
//!
//! # Beginning and falling back
//!
//! Once INIT has been answered with the flag, the kernel holds requests back until each queue has
//! an entry, or until it has refused one. So all that can be refused on this side (rings, memory,
//! threads) is made before the flag is given; and if giving the entries to the kernel then fails
//! all the same, it is made to refuse one and goes on over /dev/fuse. There `device` listens in any
//! case: FORGET and INTERRUPT never come any other way.
//!
//! # Seeks
//!
//! SEEK_DATA and SEEK_HOLE wait for writes of dirty pages (see `device`), which come through the
//! same queues. So of no queue may all entries be occupied by seeks: the seek that takes the last
//! one gets the queue another before it begins.

use crate::deference::{Deference, Member};
use crate::device::{self, Threads};
use crate::log;
use crate::ops::{self, Afterwards, Server, TRANSFER_BYTES_MAX};
use crate::reply::{Head, Reply};
use crate::request::{Op, Request};
use crate::ring::Ring;
use crate::wire::{self, opcode};
use parking_lot::{Condvar, Mutex};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};
use std::sync::{mpsc, Arc};
use std::thread::Scope;
use zerocopy::FromBytes;

/// Bytes of the fixed part of an ioctl's reply, which stands before its body.
const IOCTL_FIXED_BYTES: usize = core::mem::size_of::<wire::IoctlOut>();

/// The queues of a connection and the threads that serve them.
pub(crate) struct Rings<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    device: Arc<OwnedFd>,
    server: Arc<Server>,
    /// By CPU.
    queues: Vec<Mutex<Queue>>,
    gate: Gate,
    deference: Arc<Deference>,
}

/// Entries of a queue.
#[derive(Default)]
struct Queue {
    entries: usize,
    /// How many of them seeks occupy.
    seeking: usize,
    /// Threads ever made, for their names.
    named: usize,
}

/// Where threads report, first that they could be made and then that they have an entry.
type Reports = mpsc::Receiver<Result<(), Errno>>;

/// Rings before they are used.
pub(crate) struct Prepared<'scope, 'env> {
    rings: Arc<Rings<'scope, 'env>>,
    threads: Vec<Reports>,
    /// For a queue that there is not: makes the kernel give up the rings.
    refusal: Ring,
}

impl<'scope, 'env> Prepared<'scope, 'env> {
    /// Makes all threads and rings, for a connection whose INIT has not been answered.
    ///
    /// # Errors
    /// What is refused.
    pub(crate) fn new(
        scope: &'scope Scope<'scope, 'env>,
        device: &Arc<OwnedFd>,
        server: &Arc<Server>,
        threads: Threads,
    ) -> Result<Prepared<'scope, 'env>, Errno> {
        let cpus = possible_cpus().ok_or(Errno::NOSYS)?;
        let rings = Arc::new(Rings {
            scope,
            device: Arc::clone(device),
            server: Arc::clone(server),
            queues: (0..cpus).map(|_| Mutex::default()).collect(),
            gate: Gate::default(),
            deference: Arc::new(Deference::new(cpus)),
        });
        let refusal = Ring::new(Arc::clone(device), u16::MAX, 0)?;
        let mut prepared = Prepared { rings, threads: Vec::new(), refusal };
        for cpu in 0..cpus {
            for _ in 0..threads.for_each_of(cpus) {
                let thread = prepared.rings.add(cpu).ok_or(Errno::AGAIN)?;
                prepared.threads.push(thread);
            }
        }
        prepared.reports()?;
        Ok(prepared)
    }

    /// Gives the entries to the kernel, which has agreed to use them. Gives back how their threads
    /// make way for clients.
    ///
    /// # Errors
    /// What the kernel refuses. It goes on over /dev/fuse, unless it had all it needs.
    pub(crate) fn begin(mut self) -> Result<Arc<Deference>, Errno> {
        self.rings.gate.decide(true);
        let begun = self.reports().inspect_err(|_| {
            // Always an error; the next reader of /dev/fuse gets the requests held back.
            let _ = self.refusal.register();
        });
        begun.map(|()| Arc::clone(&self.rings.deference))
    }

    /// One report of each thread; all of them have reported when this returns.
    fn reports(&self) -> Result<(), Errno> {
        let reports: Vec<_> = self.threads.iter().map(report).collect();
        reports.into_iter().collect()
    }
}

impl Drop for Prepared<'_, '_> {
    fn drop(&mut self) {
        self.rings.gate.decide(false);
    }
}

/// A thread that is gone has not done what was expected.
fn report(thread: &Reports) -> Result<(), Errno> {
    thread.recv().unwrap_or(Err(Errno::IO))
}

/// Holds threads until it is known whether the kernel uses the rings.
#[derive(Default)]
struct Gate {
    /// Leaf lock; nothing is called with it held.
    open: Mutex<Option<bool>>,
    decided: Condvar,
}

impl Gate {
    /// The first decision stands.
    fn decide(&self, open: bool) {
        self.open.lock().get_or_insert(open);
        self.decided.notify_all();
    }

    fn pass(&self) -> bool {
        let mut open = self.open.lock();
        loop {
            match *open {
                Some(open) => return open,
                None => self.decided.wait(&mut open),
            }
        }
    }
}

impl<'scope, 'env> Rings<'scope, 'env> {
    /// A thread, and an entry once the gate is open, for the queue of a CPU.
    fn add(self: &Arc<Self>, cpu: usize) -> Option<Reports> {
        let (to, reports) = mpsc::channel();
        let rings = Arc::clone(self);
        let number = {
            let mut queue = self.queues[cpu].lock();
            queue.named += 1;
            queue.named
        };
        let life = move || rings.live(cpu, &to);
        device::start(self.scope, &format!("fuse-{cpu}.{number}"), life).then_some(reports)
    }

    fn live(self: &Arc<Self>, cpu: usize, to: &mpsc::Sender<Result<(), Errno>>) {
        let place = Place::at(cpu);
        let made = Ring::new(Arc::clone(&self.device), cpu as u16, TRANSFER_BYTES_MAX);
        let (mut ring, reported) = match made {
            Ok(ring) => (ring, to.send(Ok(()))),
            Err(errno) => return to.send(Err(errno)).unwrap_or(()),
        };
        if reported.is_err() || !self.gate.pass() {
            return;
        }
        let registered = ring.register();
        if registered.is_ok() {
            self.queues[cpu].lock().entries += 1;
        }
        if to.send(registered).is_ok() && registered.is_ok() {
            self.serve(ring, place);
        }
    }

    /// Answers the requests of an entry until the connection is gone.
    fn serve(self: &Arc<Self>, mut ring: Ring, mut place: Place) {
        let cpu = place.cpu;
        let member = self.deference.join(cpu);
        let mut input = Vec::new();
        let mut granted = None;
        loop {
            let waited = ring.wait();
            match waited {
                Ok(()) => {
                    let after;
                    (granted, after) = self.answer(&mut ring, &mut place, &member, &mut input);
                    if place.stays && after.is_none() {
                        member.answers();
                    }
                    if ring.commit().is_ok() {
                        if let Some(after) = after {
                            member.become_plain();
                            ring.submit();
                            device::carry_out(&self.server, &after);
                        }
                        continue;
                    }
                }
                Err(errno) if is_end(errno) => return,
                Err(errno) => log::error(&format!("the kernel refused a reply: {errno}")),
            }
            // The entry is no more; the connection is.
            if let Some(reply) = granted.take() {
                self.server.undo(&reply);
            }
            if let Err(errno) = ring.register() {
                self.queues[cpu].lock().entries -= 1;
                return log::error(&format!("one thread less on CPU {cpu}: {errno}"));
            }
        }
    }

    /// Answers the request in the ring's buffers. Gives back what is to be undone if the reply
    /// cannot be delivered, and what is to be done when it is on its way.
    fn answer(
        self: &Arc<Self>,
        ring: &mut Ring,
        place: &mut Place,
        member: &Member,
        input: &mut Vec<u8>,
    ) -> (Option<Reply>, Option<Afterwards>) {
        let (headers, payload) = ring.buffers();
        let (head, _) = wire::InHeader::read_from_prefix(&headers.in_out)
            .expect("the header's place is larger than the header");
        let mut after = None;
        let (result, body_at) = match split(head.opcode, headers, payload, input) {
            Ok(parts) => {
                let layout = self.server.layout();
                let request = Request::decode_split(&head, &headers.op_in, parts.input, layout);
                let result = request.and_then(|request| match request.op {
                    Op::Seek { offset, .. } => {
                        member.become_plain();
                        self.seek(place.cpu, &request, offset)
                    }
                    _ => {
                        place.suit(&request.op);
                        if !place.stays {
                            member.become_plain();
                        }
                        let handled = device::handle(&self.server, &request, parts.body);
                        let reply = handled.as_ref().ok();
                        after = reply.and_then(|reply| self.server.afterwards(&request, reply));
                        handled
                    }
                });
                (result, parts.body_at)
            }
            Err(errno) => (Err(errno), 0),
        };
        let (head, body_bytes) = match &result {
            // Nothing that wants no reply comes this way; an entry comes back with one only.
            Ok(reply) => reply
                .head(head.unique, ops::now())
                .unwrap_or_else(|| (Head::error(head.unique, Errno::NOSYS), 0)),
            Err(errno) => (Head::error(head.unique, *errno), 0),
        };
        let (header, fixed) = head.split();
        debug_assert!(body_bytes == 0 || fixed.len() == body_at);
        headers.in_out[..header.len()].copy_from_slice(header);
        payload[..fixed.len()].copy_from_slice(fixed);
        headers.entry.payload_bytes = (fixed.len() + body_bytes) as u32;
        let granted = |reply: &Reply| matches!(reply, Reply::Entry(..) | Reply::Created(..));
        (result.ok().filter(granted), after)
    }

    /// Answers a seek, after the kernel has written back; see the module's documentation.
    fn seek(
        self: &Arc<Self>,
        cpu: usize,
        request: &Request<'_>,
        offset: u64,
    ) -> Result<Reply, Errno> {
        let _seeking = Seeking::begin(self, cpu)?;
        // NOENT: the kernel holds no such inode, so it holds no dirty page of it either.
        let _ = device::notify_inval_range(self.device.as_fd(), request.node, offset);
        device::handle(&self.server, request, &mut [])
    }
}

/// Where a thread runs. Being elsewhere is slower, not wrong.
struct Place {
    /// That of its queue.
    cpu: usize,
    /// Where else it may be.
    anywhere: Option<CpuSet>,
    stays: bool,
}

impl Place {
    /// Brings the calling thread to a CPU.
    fn at(cpu: usize) -> Place {
        let anywhere = sched_getaffinity(None).ok();
        Place { cpu, anywhere, stays: device::stay_on(cpu) }
    }

    /// Stays for a short request, and may go elsewhere for a long one.
    fn suit(&mut self, op: &Op<'_>) {
        let is_long = device::is_long(op);
        if is_long == self.stays {
            self.stays = match &self.anywhere {
                Some(anywhere) if is_long => sched_setaffinity(None, anywhere).is_err(),
                _ => device::stay_on(self.cpu),
            };
        }
    }
}

/// Counts a seek that occupies an entry.
struct Seeking<'a>(&'a Mutex<Queue>);

impl<'a> Seeking<'a> {
    fn begin(rings: &'a Arc<Rings<'_, '_>>, cpu: usize) -> Result<Seeking<'a>, Errno> {
        let queue = &rings.queues[cpu];
        let seeking = Seeking(queue);
        let was_last = {
            let mut queue = queue.lock();
            queue.seeking += 1;
            queue.seeking >= queue.entries
        };
        if was_last {
            let thread = rings.add(cpu).ok_or(Errno::NOMEM)?;
            report(&thread)?;
            report(&thread)?;
        }
        Ok(seeking)
    }
}

impl Drop for Seeking<'_> {
    fn drop(&mut self) {
        self.0.lock().seeking -= 1;
    }
}

/// Where the parts of a request, and of its reply, are.
struct Parts<'a> {
    input: &'a [u8],
    body: &'a mut [u8],
    body_at: usize,
}

/// Divides the payload, which is for the request's and for the reply's. What is large has a reply
/// without body, and stays where it is; the rest makes room.
fn split<'a>(
    code: u32,
    headers: &wire::RingHeaders,
    payload: &'a mut [u8],
    input: &'a mut Vec<u8>,
) -> Result<Parts<'a>, Errno> {
    let bytes = headers.entry.payload_bytes as usize;
    if matches!(code, opcode::WRITE | opcode::SETXATTR) {
        let input = payload.get(..bytes).ok_or(Errno::IO)?;
        return Ok(Parts { input, body: &mut [], body_at: 0 });
    }
    let arrived = payload.get(..bytes).ok_or(Errno::IO)?;
    input.clear();
    input.try_reserve(arrived.len()).map_err(|_| Errno::NOMEM)?;
    input.extend_from_slice(arrived);
    let body_at = if code == opcode::IOCTL { IOCTL_FIXED_BYTES } else { 0 };
    Ok(Parts { input, body: &mut payload[body_at..], body_at })
}

/// Whether an error says that the connection is gone.
fn is_end(errno: Errno) -> bool {
    matches!(errno, Errno::NOTCONN | Errno::CONNABORTED | Errno::CANCELED | Errno::NODEV)
}

/// How many CPUs the kernel counts with, present or not: as many queues it has.
fn possible_cpus() -> Option<usize> {
    count(&std::fs::read_to_string("/sys/devices/system/cpu/possible").ok()?)
}

/// Numbers in a list such as `0-3,8`.
fn count(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0usize, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(usize::from(last.checked_sub(first)?) + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_cpus_is_counted_or_refused() {
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0-3,8-11\n"), Some(8));
        for bad in ["", "x", "3-1", "0-", "0,,1", "0-70000"] {
            assert_eq!(count(bad), None, "{bad}");
        }
    }

    #[test]
    fn threads_pass_the_gate_as_it_was_first_decided() {
        let gate = Gate::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.pass());
            gate.decide(true);
            gate.decide(false);
            assert!(waiting.join().unwrap());
        });
    }
}
