//! One operation's changes.
//!
//! A [`Change`] is made when the operation has its locks and has entered the group. It collects
//! items and redo records; [`Change::finish`] puts the items into the overlay and the records, in
//! one piece, into the intent list. An operation that fails half way drops its change, and nothing
//! has happened: so everything that can fail comes before the inodes' states are changed.

use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::log::{LogRecord, Record};
use crate::format::space::Run;
use crate::subvol::inode::{Inode, State};
use crate::subvol::overlay;
use crate::subvol::scan::ItemValue;
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::txg::Handle;
use crate::units::{Ino, Txg};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Changes of one operation, within one group.
#[must_use = "a change that is not finished did not happen"]
pub struct Change<'a> {
    subvol: &'a Subvol,
    handle: Handle<'a>,
    items: BTreeMap<Key, overlay::Change>,
    records: Vec<u8>,
    starts: Vec<usize>,
    garbage: Vec<Run>,
}

/// Records that most operations make, and bytes that they take.
const RECORDS: usize = 8;
const RECORDS_BYTES: usize = 1024;

impl<'a> Change<'a> {
    /// Enters the open group. The caller holds the locks of every inode the operation changes, and
    /// keeps them until [`Change::finish`].
    pub fn begin(subvol: &'a Subvol) -> Change<'a> {
        Change {
            subvol,
            handle: subvol.store.groups.enter(),
            items: BTreeMap::new(),
            records: Vec::with_capacity(RECORDS_BYTES),
            starts: Vec::with_capacity(RECORDS),
            garbage: Vec::new(),
        }
    }

    /// The group.
    pub fn txg(&self) -> Txg {
        self.handle.txg()
    }

    fn record(&mut self, record: Record) {
        self.starts.push(self.records.len());
        LogRecord { txg: self.handle.txg(), tree: self.subvol.id, record }
            .encode_to(&mut self.records);
    }

    /// Gives an item a value.
    pub fn put(&mut self, key: Key, value: Vec<u8>) {
        self.items.insert(key, Some(Arc::from(value.as_slice())));
        self.record(Record::Item { key, value: Some(value), keep_size: false });
    }

    /// Deletes an item.
    pub fn delete(&mut self, key: Key) {
        self.items.insert(key, None);
        self.record(Record::Item { key, value: None, keep_size: false });
    }

    /// Puts a changed inode on the group's list. The intent list is not told: see
    /// [`Change::log_inode`]. Only when nothing can fail any more.
    pub fn touch(&mut self, inode: &Arc<Inode>, state: &mut State) {
        if state.touch(self.txg()) {
            self.subvol.list_dirty(self.txg(), inode.clone());
        }
    }

    /// Gives an inode new fields that the namespace depends on, and records them. Size and space of
    /// a regular file are left out of the record: they follow its data. Only when nothing can fail
    /// any more.
    pub fn log_inode(&mut self, inode: &Arc<Inode>, state: &mut State, item: InodeItem) {
        self.touch(inode, state);
        state.item = item;
        let key = Key::new(inode.ino.0, kind::INODE, 0);
        let value = Some(item.to_bytes().to_vec());
        self.record(Record::Item { key, value, keep_size: item.is_file() });
    }

    /// Removes an inode, and records it. Only when nothing can fail any more.
    pub fn log_gone(&mut self, inode: &Arc<Inode>, state: &mut State) {
        self.touch(inode, state);
        state.gone = true;
        let key = Key::new(inode.ino.0, kind::INODE, 0);
        self.record(Record::Item { key, value: None, keep_size: false });
        self.subvol.count_inode(self.txg(), -1);
    }

    /// Where runs that the operation made garbage are collected.
    pub fn garbage(&mut self) -> &mut Vec<Run> {
        &mut self.garbage
    }

    /// Hands everything over. Still under the inodes' locks.
    pub fn finish(self) {
        let txg = self.handle.txg();
        for (key, item) in self.items {
            self.subvol.set_item(txg, key, item);
        }
        let store = &self.subvol.store;
        if !self.starts.is_empty() && !self.subvol.is_receiving() {
            store.intents.append(txg, &self.records, &self.starts);
        }
        store.add_garbage(txg, self.garbage);
    }
}

impl Subvol {
    /// The current value of an item, as an operation in progress sees it.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn get_in(&self, change: Option<&Change<'_>>, key: &Key) -> Result<Option<ItemValue>> {
        match change.and_then(|change| change.items.get(key)) {
            Some(item) => Ok(item.clone().map(ItemValue::Changed)),
            None => self.get_item(key),
        }
    }

    /// A new inode in memory, on the list of the change's group. Nobody can know it yet.
    pub fn new_inode(&self, change: &mut Change<'_>, ino: Ino, item: InodeItem) -> Arc<Inode> {
        let mut state = State::clean(item);
        let inode = {
            // Announced before it is shared, so that the table never sees it clean.
            let first = state.touch(change.txg());
            debug_assert!(first, "a new inode was never touched");
            self.table.insert_new(Inode::new(ino, state))
        };
        self.list_dirty(change.txg(), inode.clone());
        let key = Key::new(ino.0, kind::INODE, 0);
        let value = Some(item.to_bytes().to_vec());
        change.record(Record::Item { key, value, keep_size: item.is_file() });
        self.count_inode(change.txg(), 1);
        inode
    }
}
