//! Changes that are carried out by a sync.
//!
//! A snapshot is to hold what programs wrote. Part of that is with the kernel, which hands it on
//! when somebody calls syncfs(2), and then asks for everything to be durable: a commit, and the
//! snapshot would be a second. So whoever wants one says so first, and then calls syncfs(2); the
//! request that comes of that, known by the thread that made the call, carries the change out, in
//! the one commit that the sync needs anyway.
//!
//! Whatever goes wrong, nothing is less durable than after a sync: a change that could not be
//! carried out leaves the sync to be done, and a request that does not come, because the mount has
//! no such requests or the thread is seen under another number, leaves the change to who wanted it.

use parking_lot::Mutex;

/// Carries a change out; says whether all that was complete before is durable now.
pub type Work = Box<dyn FnOnce() -> bool + Send>;

/// Changes that wait for the sync of a thread.
#[derive(Default)]
pub struct Syncs {
    waiting: Mutex<Vec<(u32, Work)>>,
}

/// A change that waits, as long as this is held.
pub struct Expected<'a> {
    syncs: &'a Syncs,
    thread: u32,
}

impl Syncs {
    /// The next sync of a thread is to carry a change out. A thread has one at a time: `None` if
    /// another is waiting.
    pub fn expect(&self, thread: u32, work: Work) -> Option<Expected<'_>> {
        let mut waiting = self.waiting.lock();
        if thread == 0 || waiting.iter().any(|(other, _)| *other == thread) {
            return None;
        }
        waiting.push((thread, work));
        Some(Expected { syncs: self, thread })
    }

    /// A thread asks for a sync: what it is to carry out.
    pub fn take(&self, thread: u32) -> Option<Work> {
        let mut waiting = self.waiting.lock();
        let at = waiting.iter().position(|(other, _)| *other == thread)?;
        Some(waiting.swap_remove(at).1)
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        drop(self.syncs.take(self.thread));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_goes_with_the_next_sync_of_its_thread_and_no_other() {
        let syncs = Syncs::default();
        let expected = syncs.expect(7, Box::new(|| true)).unwrap();
        assert!(syncs.expect(7, Box::new(|| false)).is_none());
        assert!(syncs.take(8).is_none());
        assert!(syncs.take(7).unwrap()());
        assert!(syncs.take(7).is_none());
        drop(expected);
        let expected = syncs.expect(7, Box::new(|| true)).unwrap();
        drop(expected);
        assert!(syncs.take(7).is_none(), "nobody waits for it any more");
        // Of a thread that cannot be seen from here.
        assert!(syncs.expect(0, Box::new(|| true)).is_none());
    }
}
