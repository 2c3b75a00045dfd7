//! Batches through `io_uring`.
//!
//! A ring belongs to one batch at a time: whoever has a batch takes an idle ring, submits all
//! transfers, waits until none is in flight, and puts the ring back. So there is no completion
//! thread, no shared state between batches, and no transfer outlives the borrow of its memory.
//!
//! A ring does only the plain case. What it leaves undone (a short transfer, an interrupted one,
//! an operation an old kernel lacks, everything when the ring itself fails) it reports as the
//! number of bytes that did get done, and the caller finishes with `preadv` and `pwritev`. That
//! makes the rare paths one code for both methods.

use io_uring::{opcode, types, IoUring};
use parking_lot::Mutex;
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;
use std::io::{IoSlice, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Transfers a ring can have in flight.
const ENTRIES: u32 = 128;
/// Rings a device may have; a batch that finds none idle goes without.
const RINGS_MAX: usize = 8;

/// One transfer of a batch: where on the device, and which memory.
pub(super) enum Transfer<'a> {
    Read { at: u64, into: &'a mut [u8] },
    Write { at: u64, from: &'a [IoSlice<'a>] },
}

/// The rings of one device.
pub(super) struct Rings {
    idle: Mutex<Vec<IoUring>>,
    made: AtomicUsize,
    refused: AtomicBool,
}

impl Rings {
    pub(super) fn new() -> Rings {
        Rings {
            idle: Mutex::new(Vec::new()),
            made: AtomicUsize::new(0),
            refused: AtomicBool::new(false),
        }
    }

    /// Carries out what it can of `batch`. For each transfer, how many of its first bytes are done,
    /// or a device's error. `None` when no ring was to be had: nothing is done.
    pub(super) fn run(
        &self,
        fd: BorrowedFd<'_>,
        batch: &mut [Transfer<'_>],
    ) -> Option<Vec<Result<usize, Errno>>> {
        let mut ring = self.take()?;
        let mut outcomes = vec![Ok(0); batch.len()];
        if drive(&mut ring, fd, batch, &mut outcomes) {
            self.idle.lock().push(ring);
        } else {
            self.made.fetch_sub(1, Ordering::Relaxed);
        }
        Some(outcomes)
    }

    fn take(&self) -> Option<IoUring> {
        if let Some(ring) = self.idle.lock().pop() {
            return Some(ring);
        }
        if self.refused.load(Ordering::Relaxed) {
            return None;
        }
        if self.made.fetch_add(1, Ordering::Relaxed) < RINGS_MAX {
            match IoUring::builder().setup_coop_taskrun().build(ENTRIES) {
                Ok(ring) => return Some(ring),
                // Old kernels, seccomp filters and the io_uring_disabled setting say no for good.
                Err(_) => match IoUring::new(ENTRIES) {
                    Ok(ring) => return Some(ring),
                    Err(_) => self.refused.store(true, Ordering::Relaxed),
                },
            }
        }
        self.made.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

/// Submits and completes the whole batch. False when the ring failed and must not be used again;
/// even then nothing is in flight any more.
fn drive(
    ring: &mut IoUring,
    fd: BorrowedFd<'_>,
    batch: &mut [Transfer<'_>],
    outcomes: &mut [Result<usize, Errno>],
) -> bool {
    let mut next = 0;
    let mut in_flight = 0;
    loop {
        while next < batch.len() && in_flight < ENTRIES as usize {
            let entry = entry(fd, &mut batch[next]).user_data(next as u64);
            // SAFETY: the memory and the descriptor the entry names are borrowed by this function's
            // arguments, and every path out of this function has first seen the entry complete or
            // made sure that it was never handed to the kernel.
            if unsafe { ring.submission().push(&entry) }.is_err() {
                break;
            }
            next += 1;
            in_flight += 1;
        }
        if in_flight == 0 {
            return true;
        }
        // With more to push, go on when half are done, so that the device stays busy.
        let enough = if next < batch.len() { in_flight.div_ceil(2) } else { in_flight };
        match ring.submit_and_wait(enough) {
            Ok(_) => in_flight -= reap(ring, outcomes),
            Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {
                in_flight -= reap(ring, outcomes);
            }
            Err(_) => {
                abandon(ring, in_flight, outcomes);
                return false;
            }
        }
    }
}

fn entry(fd: BorrowedFd<'_>, transfer: &mut Transfer<'_>) -> io_uring::squeue::Entry {
    let fd = types::Fd(fd.as_raw_fd());
    match transfer {
        Transfer::Read { at, into } => {
            opcode::Read::new(fd, into.as_mut_ptr(), clamp(into.len())).offset(*at).build()
        }
        // `IoSlice` is documented to have the layout of `iovec`.
        Transfer::Write { at, from } => {
            let count = from.len().min(super::IOV_MAX) as u32;
            opcode::Writev::new(fd, from.as_ptr().cast(), count).offset(*at).build()
        }
    }
}

/// The kernel transfers at most about 2 GiB at once; the rest is left as a short transfer.
fn clamp(len: usize) -> u32 {
    len.min(1 << 30) as u32
}

/// Takes all completions there are; says how many.
fn reap(ring: &mut IoUring, outcomes: &mut [Result<usize, Errno>]) -> usize {
    let mut count = 0;
    for done in ring.completion() {
        count += 1;
        let Some(outcome) = outcomes.get_mut(done.user_data() as usize) else { continue };
        *outcome = match usize::try_from(done.result()) {
            Ok(bytes) => Ok(bytes),
            Err(_) => left_undone(Errno::from_raw_os_error(-done.result())),
        };
    }
    count
}

/// Errors that say nothing about the device: the caller tries again without a ring.
fn left_undone(error: Errno) -> Result<usize, Errno> {
    match error {
        Errno::INTR | Errno::AGAIN | Errno::CANCELED | Errno::INVAL | Errno::OPNOTSUPP => Ok(0),
        other => Err(other),
    }
}

/// After the ring itself failed: waits for what the kernel already has. What it has not taken from
/// the submission queue it never will, because this ring is not entered again.
fn abandon(ring: &mut IoUring, in_flight: usize, outcomes: &mut [Result<usize, Errno>]) {
    let mut submission = ring.submission();
    submission.sync();
    let mut pending = in_flight - submission.len();
    drop(submission);
    loop {
        pending -= reap(ring, outcomes);
        if pending == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The memory of a read as one `IoSliceMut`, for the path without a ring.
pub(super) fn rest_of(into: &mut [u8], done: usize) -> [IoSliceMut<'_>; 1] {
    [IoSliceMut::new(&mut into[done..])]
}
