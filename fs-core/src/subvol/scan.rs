//! Reading items through the layers: overlays over the published tree.

use crate::btree::Value;
use crate::format::key::Key;
use crate::subvol::overlay::Change;
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::units::Txg;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::ops::Deref;
use core::sync::atomic::Ordering;

/// Changes taken from an overlay at once: few at first, because who asks may want only what comes
/// before them, and then more and more.
const BATCH_FIRST: usize = 16;
const BATCH_MAX: usize = 512;

/// An item's value, from an overlay or from a node.
pub enum ItemValue {
    /// From an overlay.
    Changed(Arc<[u8]>),
    /// From the tree.
    Stored(Value),
}

impl Deref for ItemValue {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            ItemValue::Changed(bytes) => bytes,
            ItemValue::Stored(value) => value,
        }
    }
}

impl Subvol {
    /// Groups that may have unpublished changes, oldest first. One that was published just now may
    /// be among them; its overlay says the same as the tree.
    fn unpublished(&self) -> impl DoubleEndedIterator<Item = Txg> {
        let open = self.store.groups.open();
        (open.0.saturating_sub(2)..=open.0).map(Txg)
    }

    /// The item's current value.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn get_item(&self, key: &Key) -> Result<Option<ItemValue>> {
        for txg in self.unpublished().rev() {
            if let Some(change) = self.overlay(txg).get(key) {
                return Ok(change.map(ItemValue::Changed));
            }
        }
        // The view is taken after the overlays were looked at: see the module's theory.
        let view = self.view();
        Ok(view.tree.lookup(&*self.store, key)?.map(ItemValue::Stored))
    }

    /// Has the leaves read that a scan which has come to `key` will need next. One caller at a time
    /// reads; others go on without.
    pub fn read_ahead(&self, key: &Key) {
        let busy = &self.store.reading_ahead;
        if busy.swap(true, Ordering::Acquire) {
            return;
        }
        // Whoever needs the leaves meets the error.
        let _ = self.view().tree.read_ahead(&*self.store, key);
        busy.store(false, Ordering::Release);
    }

    /// Calls `each` for every current item from `from` to `to`, both of one object, ascending,
    /// until it returns false.
    ///
    /// # Errors
    /// Errors of the device or the tree, and those of `each`.
    pub fn scan(
        &self,
        from: Key,
        to: Key,
        each: &mut dyn FnMut(Key, &[u8]) -> Result<bool>,
    ) -> Result<()> {
        let (mut from, mut batch) = (from, BATCH_FIRST);
        loop {
            let (changes, horizon) = self.changes(from, to, batch);
            if !self.scan_batch(from, horizon, changes, each)? || horizon >= to {
                return Ok(());
            }
            let Some(next) = horizon.successor() else { return Ok(()) };
            from = next;
            batch = (batch * 4).min(BATCH_MAX);
        }
    }

    /// Changes from `from` on, newest winning, and the last key up to which they are complete.
    fn changes(&self, from: Key, to: Key, limit: usize) -> (BTreeMap<Key, Change>, Key) {
        let mut merged = BTreeMap::new();
        let mut horizon = to;
        for txg in self.unpublished() {
            let batch = self.overlay(txg).range(from, to, limit);
            if batch.len() == limit {
                horizon = horizon.min(batch[limit - 1].0);
            }
            merged.extend(batch);
        }
        (merged, horizon)
    }

    fn scan_batch(
        &self,
        from: Key,
        to: Key,
        changes: BTreeMap<Key, Change>,
        each: &mut dyn FnMut(Key, &[u8]) -> Result<bool>,
    ) -> Result<bool> {
        let view = self.view();
        let mut cursor = view.tree.cursor();
        cursor.seek(&*self.store, &from)?;
        let mut stored = cursor.next(&*self.store)?.filter(|(key, _)| *key <= to);
        let mut changed = changes.into_iter().take_while(|(key, _)| *key <= to).peekable();
        loop {
            let next_stored = stored.as_ref().map(|(key, _)| *key);
            let next_changed = changed.peek().map(|(key, _)| *key);
            let take_stored = match (next_stored, next_changed) {
                (None, None) => return Ok(true),
                (Some(_), None) => true,
                (None, Some(_)) => false,
                (Some(a), Some(b)) => a < b,
            };
            if take_stored {
                let (key, value) = stored.take().expect("peeked at just now");
                if !each(key, &value)? {
                    return Ok(false);
                }
                stored = cursor.next(&*self.store)?.filter(|(key, _)| *key <= to);
                continue;
            }
            let (key, change) = changed.next().expect("peeked at just now");
            if next_stored == Some(key) {
                stored = cursor.next(&*self.store)?.filter(|(key, _)| *key <= to);
            }
            if let Some(value) = change {
                if !each(key, &value)? {
                    return Ok(false);
                }
            }
        }
    }
}
