//! One io_uring with one entry of FUSE's queues: a request at a time.
//!
//! The kernel is told the addresses of an entry's buffers once. It puts a request into them, posts
//! a completion, and takes the reply out of them with the next command:
//!
//! ```text
//! REGISTER -> completion: a request is there -> COMMIT_AND_FETCH -> completion: ... -> error: over
//! ```
//!
//! Between a command and its completion the buffers are the kernel's, otherwise the thread's. A
//! `Ring` knows whose they are, so its methods are safe.
//!
//! Not used: `IORING_SETUP_DEFER_TASKRUN`. It is no faster here, and leaves requests for a thread
//! that has died lying where not even an abort of the connection finds them, for as long as any
//! thread of the process keeps the ring open.

use crate::wire::{self, ring};
use fs_core::buf::Buf;
use io_uring::squeue::Entry128;
use io_uring::IoUring;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use std::io;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// A ring, its entry's buffers, and the descriptor of /dev/fuse it works on.
pub struct Ring {
    uring: IoUring<Entry128>,
    buffers: ManuallyDrop<Buffers>,
    /// A command has been given and its completion not been seen.
    is_kernels: bool,
    fuse: Arc<OwnedFd>,
    queue: u16,
    /// A request was there when the entry had just been registered.
    arrived: bool,
}

/// What the kernel knows the addresses of.
struct Buffers {
    headers: Box<wire::RingHeaders>,
    payload: Buf,
    /// Both, for REGISTER.
    parts: Box<[Part; 2]>,
}

/// `struct iovec`.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Part {
    address: usize,
    bytes: usize,
}

/// `struct io_uring_sqe` with 128 bytes, as `IORING_OP_URING_CMD` has it. The crate's own builder
/// leaves out the length, which REGISTER needs.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    command: u32,
    padding: u32,
    address: u64,
    len: u32,
    command_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    file_index: u32,
    argument: wire::RingCommand,
    argument_rest: [u8; 80 - 24],
}

/// `IORING_OP_URING_CMD`.
const OP_URING_CMD: u8 = 46;

impl Ring {
    /// A ring for entries of one queue, for the calling thread only.
    ///
    /// # Errors
    /// What the kernel, or the memory, refuses.
    pub fn new(fuse: Arc<OwnedFd>, queue: u16, payload_bytes: usize) -> Result<Ring, Errno> {
        let uring = IoUring::<Entry128>::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .dontfork()
            .build(1)
            .map_err(|error| errno(&error))?;
        let mut headers = wire::RingHeaders::new_box_zeroed().map_err(|_| Errno::NOMEM)?;
        let mut payload = Buf::zeroed(payload_bytes).map_err(|_| Errno::NOMEM)?;
        let parts = Box::new([part(headers.as_mut_bytes()), part(&mut payload)]);
        let buffers = ManuallyDrop::new(Buffers { headers, payload, parts });
        Ok(Ring { uring, buffers, is_kernels: false, fuse, queue, arrived: false })
    }

    /// Gives the entry to its queue.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn register(&mut self) -> Result<(), Errno> {
        let parts = &self.buffers.parts;
        let (address, len) = (parts.as_ptr().expose_provenance() as u64, parts.len() as u32);
        self.push(ring::REGISTER, 0, address, len)?;
        self.uring.submit().map_err(|error| errno(&error))?;
        // A refusal is posted at once; otherwise the first completion is a request.
        match self.completed() {
            Some(Err(refused)) => Err(refused),
            Some(Ok(())) => {
                self.arrived = true;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Gives the reply, as it stands in the buffers, and the entry back to the kernel with the next
    /// [`Ring::wait`].
    ///
    /// # Errors
    /// `BUSY`: an earlier command has not been submitted.
    pub fn commit(&mut self) -> Result<(), Errno> {
        self.push(ring::COMMIT_AND_FETCH, self.buffers.headers.entry.commit_id, 0, 0)
    }

    /// Gives the kernel what [`Ring::commit`] left for the next wait, now. That wait tells whether
    /// it was taken.
    pub fn submit(&mut self) {
        // What cannot be submitted now is with the wait.
        let _ = self.uring.submit();
    }

    /// Submits what there is and waits for a request.
    ///
    /// # Errors
    /// Why the entry is no longer in the kernel's hands, nor a request in it: the connection is
    /// gone (`NOTCONN` and its like), or the reply was for no request.
    pub fn wait(&mut self) -> Result<(), Errno> {
        if std::mem::take(&mut self.arrived) {
            return Ok(());
        }
        loop {
            match self.uring.submit_and_wait(1).map_err(|error| errno(&error)) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(errno) => return Err(errno),
            }
            if let Some(completed) = self.completed() {
                return completed;
            }
        }
    }

    /// Headers and payload, of the request that is there and of its reply. Not to be asked for
    /// between a command and its completion.
    pub fn buffers(&mut self) -> (&mut wire::RingHeaders, &mut [u8]) {
        assert!(!self.is_kernels, "the buffers are the kernel's");
        let Buffers { headers, payload, .. } = &mut *self.buffers;
        (headers, payload)
    }

    fn completed(&mut self) -> Option<Result<(), Errno>> {
        let result = self.uring.completion().next()?.result();
        self.is_kernels = false;
        Some(if result < 0 { Err(Errno::from_raw_os_error(-result)) } else { Ok(()) })
    }

    fn push(&mut self, command: u32, commit_id: u64, address: u64, len: u32) -> Result<(), Errno> {
        let argument = wire::RingCommand { commit_id, queue: self.queue, ..Default::default() };
        let submission = Submission {
            opcode: OP_URING_CMD,
            fd: self.fuse.as_raw_fd(),
            command,
            address,
            len,
            argument,
            ..Submission::new_zeroed()
        };
        // SAFETY: both are 128 bytes of plain numbers in the layout of the kernel's submission.
        let entry = unsafe { std::mem::transmute::<Submission, Entry128>(submission) };
        if self.is_kernels {
            return Err(Errno::BUSY);
        }
        self.is_kernels = true;
        // SAFETY: the descriptor and the buffers belong to `self`, which keeps them where they are,
        // and leaves the buffers alone while `is_kernels` is set, even when it is dropped.
        unsafe { self.uring.submission().push(&entry) }.map_err(|_| Errno::BUSY)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Otherwise they are lost: closing the ring ends the kernel's use of them, but not at once.
        if !self.is_kernels {
            // SAFETY: nothing uses them after this.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

fn part(buffer: &mut [u8]) -> Part {
    Part { address: buffer.as_mut_ptr().expose_provenance(), bytes: buffer.len() }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_kernel() {
        assert_eq!(core::mem::size_of::<Submission>(), core::mem::size_of::<Entry128>());
        assert_eq!(core::mem::size_of::<Submission>(), 128);
        assert_eq!(core::mem::offset_of!(Submission, argument), 48);
        assert_eq!(core::mem::size_of::<wire::RingHeaders>(), 288);
        assert_eq!(core::mem::size_of::<Part>(), core::mem::size_of::<libc::iovec>());
    }
}
