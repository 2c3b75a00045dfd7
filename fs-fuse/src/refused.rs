//! Files of which the kernel had data refused.
//!
//! With the write-back cache, write(2) succeeds when the data is in the page cache. Later the
//! kernel sends it, and only then learns that there is no room. It drops what was refused,
//! remembers the error for the next fsync(2) or close(2), and goes on taking data: a program that
//! writes for long is not told that none of it is stored.
//!
//! One thing makes write(2) ask first: it wants to know the mode, for a set-user-id bit that it
//! would have to clear, and sends a GETATTR on behalf of the open file when what it remembers of
//! the mode is not valid any more. An error in reply is what write(2) returns. So, of a file whose
//! data was refused, the kernel's attributes are invalidated, and the next write is refused.
//!
//! ```text
//! WRITE refused --> attributes are invalidated, and from then on shown as not valid
//! GETATTR by a write: the error, once whatever happened since, then while there is no room
//! GETATTR by a write, room again --> forgotten
//! cut to nothing, or the kernel forgets the inode --> forgotten
//! ```
//!
//! Reads that reach the end of the file and SEEK_END ask alike when attributes are out of date, and
//! must get them. What asks is seen in the system call of the thread (`asker`). Where it is not,
//! this tells them apart: reads go by the time for which attributes were said to be valid, writes
//! also by an invalidation, which leaves that time as it is. So who asks first is given attributes
//! that are valid for good, which are invalidated when they have arrived, and from then on (`asks`)
//! only writes ask.
//!
//! What is written before the first invalidation arrives is taken by the kernel as before; it is
//! little. Writes through a mapping never ask.

use parking_lot::Mutex;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Files that are remembered. The kernel tells fsync(2) and close(2) of the others.
const FILES_MAX: usize = 4096;

/// How long a write is told of what was refused before it, although there is room again.
const TELL_WITHIN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
struct Refusal {
    errno: Errno,
    /// How much was refused at once.
    bytes: u64,
    at: Instant,
    /// A write has got the error.
    is_told: bool,
    /// Only writes ask for attributes by handle: the kernel has some that are invalidated, and that
    /// it takes for valid otherwise.
    asks: bool,
}

/// Files of which data was refused, by node number.
#[derive(Default)]
pub(crate) struct Refused {
    /// How many there are: nearly always none, and then nothing is locked.
    count: AtomicUsize,
    files: Mutex<BTreeMap<u64, Refusal>>,
}

impl Refused {
    fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// Some data was refused. Returns whether the file is remembered.
    pub(crate) fn note(&self, node: u64, errno: Errno, bytes: u64) -> bool {
        let mut files = self.files.lock();
        if files.len() >= FILES_MAX && !files.contains_key(&node) {
            return false;
        }
        let asks = files.get(&node).is_some_and(|known| known.asks);
        files.insert(node, Refusal { errno, bytes, at: Instant::now(), is_told: false, asks });
        self.count.store(files.len(), Ordering::Relaxed);
        true
    }

    /// The file is as any other again.
    pub(crate) fn forget(&self, node: u64) {
        if !self.is_empty() {
            let mut files = self.files.lock();
            files.remove(&node);
            self.count.store(files.len(), Ordering::Relaxed);
        }
    }

    /// Attributes of a file are about to be shown: for good, or as not valid. False when no data of
    /// it was refused.
    pub(crate) fn show(&self, node: u64, for_good: bool) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut files = self.files.lock();
        files.get_mut(&node).map(|refusal| refusal.asks = for_good).is_some()
    }

    /// Whether data of the file was refused.
    pub(crate) fn has(&self, node: u64) -> bool {
        !self.is_empty() && self.files.lock().contains_key(&node)
    }

    /// Somebody asks for attributes by handle, a write or who is not known: what to tell it.
    /// `check` says whether so much data would be refused now; it may wait.
    pub(crate) fn tell(
        &self,
        node: u64,
        is_write: bool,
        check: impl FnOnce(u64) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        if self.is_empty() {
            return Ok(());
        }
        let refusal = {
            let mut files = self.files.lock();
            let Some(refusal) = files.get_mut(&node).filter(|known| is_write || known.asks) else {
                return Ok(());
            };
            if !refusal.is_told && refusal.at.elapsed() < TELL_WITHIN {
                refusal.is_told = true;
                return Err(refusal.errno);
            }
            *refusal
        };
        check(refusal.bytes)?;
        self.forget(node);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: Result<(), Errno> = Err(Errno::NOSPC);

    fn refused() -> Refused {
        let refused = Refused::default();
        assert!(refused.note(7, Errno::NOSPC, 4096));
        refused
    }

    #[test]
    fn a_write_is_told_once_in_any_case_and_then_as_long_as_there_is_no_room() {
        let refused = refused();
        let tell =
            |check| refused.tell(7, true, |bytes| if bytes == 4096 { check } else { Ok(()) });
        assert_eq!(tell(Ok(())), FULL);
        assert_eq!(tell(FULL), FULL);
        assert_eq!(tell(Ok(())), Ok(()));
        assert_eq!(tell(FULL), Ok(()), "it has been forgotten");
    }

    #[test]
    fn who_asks_first_may_be_a_read_if_it_is_not_known_and_is_told_nothing() {
        let refused = refused();
        assert_eq!(refused.tell(7, false, |_| FULL), Ok(()));
        assert!(refused.show(7, true));
        assert_eq!(refused.tell(7, false, |_| FULL), FULL);
        // A lookup: its attributes are not valid, so that a read asks too.
        assert!(refused.show(7, false));
        assert_eq!(refused.tell(7, false, |_| FULL), Ok(()));
        assert_eq!(refused.tell(7, true, |_| FULL), FULL);
    }

    #[test]
    fn other_files_are_not_concerned() {
        let refused = refused();
        assert!(!refused.show(8, true) && !refused.has(8));
        assert_eq!(refused.tell(8, true, |_| FULL), Ok(()));
        refused.forget(7);
        assert!(!refused.has(7) && refused.is_empty());
    }

    #[test]
    fn no_more_than_so_many_files_are_remembered() {
        let refused = Refused::default();
        let noted = (0..FILES_MAX as u64 + 10).filter(|n| refused.note(*n, Errno::IO, 1)).count();
        assert_eq!(noted, FILES_MAX);
        assert!(refused.note(0, Errno::NOSPC, 1), "one that is remembered already");
    }
}
