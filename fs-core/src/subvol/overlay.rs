//! Overlays: items that one group has put or deleted and no published tree has yet.
//!
//! Sharded by object, so that operations on unrelated inodes do not meet. All items of one object
//! are in one shard, which makes a range of them one lock and one walk.

use crate::btree::Edit;
use crate::format::key::Key;
use crate::sync::{Rank, RwLock};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

const SHARDS: usize = 16;

/// An item's new value; `None` when it was deleted.
pub type Change = Option<Arc<[u8]>>;

/// The items one group changed in one subvolume.
pub struct Overlay {
    /// On the heap: an array of them would pass over the stack while it is made.
    shards: Box<[RwLock<BTreeMap<Key, Change>>]>,
}

impl Default for Overlay {
    fn default() -> Overlay {
        Overlay {
            shards: (0..SHARDS).map(|_| RwLock::ranked(Rank::Short, BTreeMap::new())).collect(),
        }
    }
}

impl Overlay {
    fn shard(&self, object: u64) -> &RwLock<BTreeMap<Key, Change>> {
        // Fibonacci hashing (Knuth, TAOCP 6.4): neighbouring inode numbers go to different shards.
        &self.shards[(object.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize]
    }

    /// The change of an item; the outer `None` when this group did not change it.
    pub fn get(&self, key: &Key) -> Option<Change> {
        self.shard(key.object).read().get(key).cloned()
    }

    /// Records a change. Returns by how many bytes the overlay grew.
    pub fn set(&self, key: Key, change: Change) -> u64 {
        let bytes = entry_bytes(&change);
        match self.shard(key.object).write().insert(key, change) {
            Some(old) => bytes.saturating_sub(entry_bytes(&old)),
            None => bytes,
        }
    }

    /// The first `limit` changes from `from` up to and including `to`, both of one object.
    pub fn range(&self, from: Key, to: Key, limit: usize) -> Vec<(Key, Change)> {
        debug_assert_eq!(from.object, to.object);
        if from > to {
            return Vec::new();
        }
        let shard = self.shard(from.object).read();
        shard.range(from..=to).take(limit).map(|(k, v)| (*k, v.clone())).collect()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.read().is_empty())
    }

    /// All changes, ascending, as edits of the tree.
    pub fn edits(&self) -> Vec<(Key, Edit)> {
        let mut all: Vec<(Key, Edit)> = Vec::new();
        for shard in &self.shards {
            all.extend(shard.read().iter().map(|(key, change)| {
                let edit = match change {
                    Some(value) => Edit::Put(value.to_vec()),
                    None => Edit::Delete,
                };
                (*key, edit)
            }));
        }
        all.sort_unstable_by_key(|(key, _)| *key);
        all
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for shard in &self.shards {
            let old = core::mem::take(&mut *shard.write());
            drop(old);
        }
    }
}

/// What an entry costs in memory beside its value: key, tree node share, allocation headers, and
/// the edit that the group's writer makes of it.
const ENTRY_BYTES: u64 = 96 + core::mem::size_of::<(Key, Edit)>() as u64;

/// What an entry costs in memory, in bytes. The writer's edit copies the value.
fn entry_bytes(change: &Change) -> u64 {
    ENTRY_BYTES + change.as_ref().map_or(0, |value| 2 * value.len() as u64)
}
