//! The table of inodes in memory.
//!
//! Sharded by number. An inode stays while it is dirty, while a driver holds on to it *and* it has
//! no names left, or while someone uses it; others are dropped when the table grows beyond its
//! bound, those not used lately first (CLOCK). A dropped inode is loaded from the tree again when
//! wanted: lookup counts of inodes that still have names are not kept by the inode but by
//! [`Table::hold`].

use crate::subvol::inode::Inode;
use crate::sync::{Mutex, Rank};
use crate::units::Ino;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Bound;
use core::sync::atomic::Ordering;

const SHARDS: usize = 16;
/// Inodes a shard holds at least before it looks for some to drop.
const SHARD_INODES_MIN: usize = 64;
/// Inodes that are looked at for one to drop.
const LOOKED_AT_MAX: usize = 32;
/// What an inode in the table costs in memory: itself, its place in the map, allocation headers.
const ENTRY_BYTES: usize = core::mem::size_of::<Inode>() + 64;

#[derive(Default)]
struct Shard {
    inodes: BTreeMap<Ino, Arc<Inode>>,
    holds: BTreeMap<Ino, u64>,
    /// Where the search for something to drop goes on.
    hand: Ino,
}

/// Inodes in memory.
pub struct Table {
    /// On the heap: an array of them would pass over the stack while it is made.
    shards: Box<[Mutex<Shard>]>,
    /// Inodes a shard holds before it looks for some to drop.
    shard_inodes_max: usize,
}

impl Table {
    /// A table that holds about `bytes` of inodes which it could do without.
    pub fn new(bytes: usize) -> Table {
        Table {
            shards: (0..SHARDS).map(|_| Mutex::ranked(Rank::Short, Shard::default())).collect(),
            shard_inodes_max: (bytes / ENTRY_BYTES / SHARDS).max(SHARD_INODES_MIN),
        }
    }

    fn shard(&self, ino: Ino) -> &Mutex<Shard> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// The inode, if it is in memory.
    pub fn get(&self, ino: Ino) -> Option<Arc<Inode>> {
        let inode = self.shard(ino).lock().inodes.get(&ino).cloned()?;
        inode.used.store(true, Ordering::Relaxed);
        Some(inode)
    }

    /// Puts an inode in the table unless somebody was faster; returns the one that is there.
    /// `None`, and nothing is put, when `current` says that the inode's state is out of date.
    pub fn insert_if_absent(
        &self,
        inode: Inode,
        current: impl FnOnce() -> bool,
    ) -> Option<Arc<Inode>> {
        let mut shard = self.shard(inode.ino).lock();
        if let Some(there) = shard.inodes.get(&inode.ino) {
            return Some(there.clone());
        }
        if !current() {
            return None;
        }
        let is_full = shard.inodes.len() >= self.shard_inodes_max;
        let dropped = if is_full { shard.shrink() } else { None };
        let inode = Arc::new(inode);
        shard.inodes.insert(inode.ino, inode.clone());
        drop(shard);
        drop(dropped);
        Some(inode)
    }

    /// Puts an inode with a new number in the table.
    pub fn insert_new(&self, inode: Inode) -> Arc<Inode> {
        self.insert_if_absent(inode, || true).expect("never out of date")
    }

    /// Takes an inode that no longer exists out of the table.
    pub fn remove(&self, ino: Ino) {
        let old = self.shard(ino).lock().inodes.remove(&ino);
        drop(old);
    }

    /// A driver holds on to the inode once more.
    pub fn hold(&self, ino: Ino) {
        *self.shard(ino).lock().holds.entry(ino).or_insert(0) += 1;
    }

    /// A driver lets go of the inode `count` times. Returns whether nobody holds it any more.
    pub fn let_go(&self, ino: Ino, count: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Some(holds) = shard.holds.get_mut(&ino) else { return true };
        *holds = holds.saturating_sub(count);
        if *holds == 0 {
            shard.holds.remove(&ino);
            return true;
        }
        false
    }

    /// Whether a driver holds on to the inode.
    pub fn is_held(&self, ino: Ino) -> bool {
        self.shard(ino).lock().holds.contains_key(&ino)
    }

    /// What drivers hold on to.
    pub fn held(&self) -> Vec<Ino> {
        self.shards.iter().flat_map(|shard| held_in(&shard.lock())).collect()
    }

    /// Everything any driver holds on to is let go of; returns what was held.
    pub fn let_all_go(&self) -> Vec<Ino> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(core::mem::take(&mut shard.lock().holds).into_keys());
        }
        all
    }

    /// Drops every inode that is clean and not in use.
    pub fn drop_clean(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.inodes.retain(|_, inode| Arc::strong_count(inode) > 1 || is_busy(inode));
        }
    }
}

fn held_in(shard: &Shard) -> Vec<Ino> {
    shard.holds.keys().copied().collect()
}

/// Whether the table must keep the inode.
fn is_busy(inode: &Inode) -> bool {
    match inode.state.try_read() {
        Some(state) => state.is_dirty() || state.item.nlink == 0,
        None => true,
    }
}

impl Shard {
    /// Drops one inode that was not used lately, looking at a bounded number.
    fn shrink(&mut self) -> Option<Arc<Inode>> {
        let after = self.inodes.range((Bound::Excluded(self.hand), Bound::Unbounded));
        let all = after.chain(self.inodes.range(..=self.hand));
        let mut found = None;
        for (ino, inode) in all.take(LOOKED_AT_MAX) {
            self.hand = *ino;
            // One is the table's. New ones are handed out under this lock only.
            if Arc::strong_count(inode) == 1
                && !inode.used.swap(false, Ordering::Relaxed)
                && !is_busy(inode)
            {
                found = Some(*ino);
                break;
            }
        }
        self.inodes.remove(&found?)
    }
}
