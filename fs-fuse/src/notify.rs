//! What the kernel is told without having asked: names and inodes that changed behind its back,
//! because subvolumes and snapshots came or went.
//!
//! A notice may wait for requests that are under way, so none is sent by a thread that answers
//! requests.

use crate::reply::Head;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::io::IoSlice;
use std::sync::{Arc, OnceLock};

/// The kernel's end of a mount, once there is one.
#[derive(Default)]
pub struct Kernel {
    device: OnceLock<OwnedFd>,
}

impl Kernel {
    /// The mount is served by `device`.
    pub fn connect(&self, device: &OwnedFd) {
        // Without a descriptor to spare, what the kernel remembers becomes wrong; commands that
        // would make it so fail for the same reason.
        if let Ok(device) = device.try_clone() {
            let _ = self.device.set(device);
        }
    }

    /// A name in a directory came, went, or leads elsewhere.
    pub fn name_changed(&self, dir: u64, name: &[u8]) {
        let Some(device) = self.device.get() else { return };
        // ENOENT: the kernel does not know the directory or the name.
        let mut body = name.to_vec();
        body.push(0);
        let _ = send(device.as_fd(), &Head::notify_inval_entry(dir, name.len()), &body);
        let _ = send(device.as_fd(), &Head::notify_inval_inode(dir, 0), &[]);
    }

    /// What the kernel holds of a file's data was refused when it was written back: it must not be
    /// shown.
    pub fn drop_pages(self: &Arc<Self>, node: u64) {
        let kernel = Arc::clone(self);
        std::thread::spawn(move || {
            let Some(device) = kernel.device.get() else { return };
            let _ = send(device.as_fd(), &Head::notify_inval_inode(node, 0), &[]);
        });
    }
}

/// Sends a reply or a notice.
pub(crate) fn send(device: BorrowedFd<'_>, head: &Head, body: &[u8]) -> Result<(), Errno> {
    loop {
        let parts = [IoSlice::new(head.bytes()), IoSlice::new(body)];
        let parts = if body.is_empty() { &parts[..1] } else { &parts[..] };
        match rustix::io::writev(device, parts) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => (),
            Err(errno) => return Err(errno),
        }
    }
}
