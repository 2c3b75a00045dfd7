//! The intent list: item changes of unpublished groups, in the order in which they happened.
//!
//! Every operation appends its records, already encoded, while it still holds its inodes' locks; so
//! any prefix of the list is a state the namespace once had. `fsync` takes the part that the log
//! does not have yet. Bytes of files are not here: they are taken from range maps when a file is
//! synced.
//!
//! The list is bounded. When a group's part grows too long it is dropped, and until that group is
//! published `fsync` makes a whole commit instead, which then is the better deal anyway.

use crate::sync::{Mutex, Rank};
use crate::txg::{slot, SLOTS};
use crate::units::{Ino, TreeId, Txg};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;

/// Longest part of one group where memory is not short, in bytes.
const GROUP_BYTES_MAX: u64 = 8 << 20;
/// The share of the memory for changes that a group's part may take.
const GROUP_SHARE: u64 = 16;

#[derive(Default)]
struct Part {
    bytes: Vec<u8>,
    /// Offsets in `bytes` where records begin.
    starts: Vec<u32>,
    /// Records the log has.
    logged: usize,
    overflowed: bool,
    /// Files whose bytes must be in the log before the next record that needs them, because a name
    /// that held other content now stands for them.
    needed: BTreeSet<(TreeId, Ino)>,
}

#[derive(Default)]
struct List {
    parts: [Part; SLOTS],
}

/// The intent list of a pool.
pub struct Intents {
    list: Mutex<List>,
    /// Longest part of one group, in bytes.
    group_bytes_max: usize,
}

/// What the log lacks.
pub struct Pending {
    /// Encoded records, in order, and where each begins.
    pub bytes: Vec<u8>,
    /// Offsets in `bytes` where records begin.
    pub starts: Vec<usize>,
    /// Files whose bytes must go along.
    pub needed: Vec<(TreeId, Ino)>,
}

impl Intents {
    /// An empty list, where `dirty_bytes` is the memory for changes.
    pub fn new(dirty_bytes: u64) -> Intents {
        Intents {
            list: Mutex::ranked(Rank::Short, List::default()),
            group_bytes_max: (dirty_bytes / GROUP_SHARE).min(GROUP_BYTES_MAX) as usize,
        }
    }

    /// Appends records of group `txg`; `starts` are the offsets in `records` where they begin.
    pub fn append(&self, txg: Txg, records: &[u8], starts: &[usize]) {
        let mut list = self.list.lock();
        let part = &mut list.parts[slot(txg)];
        if part.overflowed || part.bytes.len() + records.len() > self.group_bytes_max {
            *part = Part { overflowed: true, ..Part::default() };
            return;
        }
        let base = part.bytes.len();
        part.bytes.extend_from_slice(records);
        part.starts.extend(starts.iter().map(|start| (base + start) as u32));
    }

    /// Notes that a file's bytes must be in the log along with what group `txg` is about to append.
    pub fn need(&self, txg: Txg, tree: TreeId, ino: Ino) {
        let mut list = self.list.lock();
        let part = &mut list.parts[slot(txg)];
        if !part.overflowed {
            part.needed.insert((tree, ino));
        }
    }

    /// Takes what the log lacks of the groups from `first` to `last`. `None` when some of it was
    /// dropped: only a commit can make it durable.
    pub fn take(&self, first: Txg, last: Txg) -> Option<Pending> {
        let mut list = self.list.lock();
        let groups = || (first.0..=last.0).map(Txg);
        if groups().any(|txg| list.parts[slot(txg)].overflowed) {
            return None;
        }
        let mut pending = Pending { bytes: Vec::new(), starts: Vec::new(), needed: Vec::new() };
        for txg in groups() {
            let part = &mut list.parts[slot(txg)];
            pending.needed.extend(core::mem::take(&mut part.needed));
            let Some(from) = part.starts.get(part.logged).map(|start| *start as usize) else {
                continue;
            };
            let base = pending.bytes.len();
            pending.bytes.extend_from_slice(&part.bytes[from..]);
            pending
                .starts
                .extend(part.starts[part.logged..].iter().map(|s| base + *s as usize - from));
            part.logged = part.starts.len();
        }
        Some(pending)
    }

    /// Whether the log lacks anything of the groups from `first` to `last`.
    pub fn lacks(&self, first: Txg, last: Txg) -> bool {
        let list = self.list.lock();
        (first.0..=last.0).any(|txg| {
            let part = &list.parts[slot(Txg(txg))];
            part.overflowed || part.logged < part.starts.len()
        })
    }

    /// Forgets a published group.
    pub fn published(&self, txg: Txg) {
        let mut list = self.list.lock();
        let part = core::mem::take(&mut list.parts[slot(txg)]);
        drop(list);
        drop(part);
    }
}
