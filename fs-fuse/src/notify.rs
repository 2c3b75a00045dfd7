//! What the kernel is told without having asked: names and inodes that changed behind its back,
//! because subvolumes and snapshots came or went, and files whose data was refused.
//!
//! A notice may wait for requests that are under way, so none is sent by a thread that answers
//! requests: those leave it to a thread of its own ([`Kernel::distrust`], [`Kernel::drop_pages`]).

use crate::deference;
use crate::reply::Head;
use crate::syncs::Syncs;
use cairn_host::mounts::Mount;
use parking_lot::{Condvar, Mutex};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::Dev;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Inodes that may wait to be told of. Of the rest the kernel learns when it asks.
const WAITING_MAX: usize = 8192;

/// What of an inode is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Invalid {
    Attributes,
    /// These, and its pages.
    Pages,
}

impl Invalid {
    /// Where pages begin that are not valid.
    fn offset(self) -> i64 {
        match self {
            Invalid::Attributes => -1,
            Invalid::Pages => 0,
        }
    }
}

#[derive(Default)]
struct Waiting {
    inodes: BTreeMap<u64, Invalid>,
    /// There is a thread that sends.
    is_served: bool,
}

/// The kernel's end of a mount, once there is one.
#[derive(Default)]
pub struct Kernel {
    device: OnceLock<OwnedFd>,
    /// What the mount table calls the mount.
    mount: OnceLock<Dev>,
    /// Notices that answering threads have left. Nothing is called with it held.
    waiting: Mutex<Waiting>,
    came: Condvar,
    /// What syncs are to carry out.
    pub syncs: Syncs,
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

    /// The mount has this device number.
    pub fn mounted_as(&self, mount: Dev) {
        let _ = self.mount.set(mount);
    }

    /// Whether the kernel lets nobody change anything. A remount need not come through the mount
    /// helper, and the kernel does not tell the server.
    pub fn is_read_only(&self) -> bool {
        let Some(device) = self.mount.get() else { return false };
        let Ok(mounts) = cairn_host::mounts::mounts() else { return false };
        mounts.iter().find(|m| m.device == *device).is_some_and(|m| m.read_only_everywhere)
    }

    /// Whether anything is mounted on a directory of this filesystem, or on one below it, in any
    /// mount namespace: the kernel unmounts what is on a name that it forgets. `dir` is the path
    /// from the root directory. True when that cannot be found out.
    pub fn has_mounts_in(&self, dir: &Path) -> bool {
        let Ok(tables) = cairn_host::mounts::tables() else { return true };
        tables.iter().any(|mounts| {
            self.places(mounts, dir)
                .iter()
                .any(|place| mounts.iter().any(|mount| mount.mount_point.starts_with(place)))
        })
    }

    /// Has the kernel look up a path again, which programs that are in it may have lost sight of
    /// when it was to forget it.
    pub fn look_up_again(&self, dir: &Path) {
        let Ok(mounts) = cairn_host::mounts::mounts() else { return };
        for place in self.places(&mounts, dir) {
            // Only that it was looked up counts.
            let _ = std::fs::symlink_metadata(place);
        }
    }

    /// Where a directory of this filesystem is seen.
    fn places(&self, mounts: &[Mount], dir: &Path) -> Vec<PathBuf> {
        let Some(device) = self.mount.get() else { return Vec::new() };
        let dir = Path::new("/").join(dir.strip_prefix("/").unwrap_or(dir));
        let own = mounts.iter().filter(|mount| mount.device == *device);
        let places = own.filter_map(|own| {
            let below = dir.strip_prefix(&own.root).ok()?;
            Some(own.mount_point.join(below))
        });
        places.collect()
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

    /// What the kernel holds of a file's data was refused when it was written back, and always will
    /// be: it must not be shown. Does not wait.
    pub fn drop_pages(self: &Arc<Self>, node: u64) {
        self.leave(node, Invalid::Pages);
    }

    /// The kernel must ask for a file's attributes before it goes by them again. Does not wait.
    pub fn distrust(self: &Arc<Self>, node: u64) {
        self.leave(node, Invalid::Attributes);
    }

    /// As [`Kernel::distrust`], and waits until the kernel knows. Not for threads that answer it.
    pub fn distrust_now(&self, node: u64) {
        let Some(device) = self.device.get() else { return };
        // ENOENT: the kernel does not know the inode.
        let head = Head::notify_inval_inode(node, Invalid::Attributes.offset());
        let _ = send(device.as_fd(), &head, &[]);
    }

    fn leave(self: &Arc<Self>, node: u64, invalid: Invalid) {
        if self.device.get().is_none() {
            return;
        }
        let mut waiting = self.waiting.lock();
        if waiting.inodes.len() >= WAITING_MAX && !waiting.inodes.contains_key(&node) {
            return;
        }
        let known = waiting.inodes.entry(node).or_insert(invalid);
        *known = invalid.max(*known);
        if !waiting.is_served {
            let kernel = Arc::clone(self);
            let thread = std::thread::Builder::new().name("fuse-notify".into());
            let life = move || {
                deference::arrive();
                kernel.serve();
            };
            waiting.is_served = thread.spawn(life).is_ok();
        }
        drop(waiting);
        self.came.notify_one();
    }

    /// Sends what is left to be sent, as long as the process lives.
    fn serve(&self) {
        let Some(device) = self.device.get() else { return };
        loop {
            let (node, invalid) = {
                let mut waiting = self.waiting.lock();
                loop {
                    match waiting.inodes.pop_first() {
                        Some(next) => break next,
                        None => self.came.wait(&mut waiting),
                    }
                }
            };
            // ENOENT: the kernel does not know the inode.
            let _ = send(device.as_fd(), &Head::notify_inval_inode(node, invalid.offset()), &[]);
        }
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
