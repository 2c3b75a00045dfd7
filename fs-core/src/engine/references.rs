//! The shared-reference tree: extra references of runs.
//!
//! Most runs have one reference and no item here. Items cover runs that do not overlap, each with
//! the number of references beyond the first. A group first adds the references it made, then takes
//! away those it dropped: a drop of a run with extra references takes one of them; what has none is
//! dead.
//!
//! Both lists are sorted and merged with the items they touch, so the cost is that of what changed.

use crate::btree::{Edit, NodeSource, Tree};
use crate::error::Error;
use crate::format::key::{kind, Key};
use crate::format::space::{RefItem, Run};
use crate::subvol::store::Result;
use crate::units::Logical;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What a group's references come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// Edits of the reference tree, ascending.
    pub edits: Vec<(Key, Edit)>,
    /// Runs that nothing refers to any more.
    pub dead: Vec<Run>,
    /// Runs that nothing refers to any more since `given_up` is taken into account.
    pub dead_given_up: Vec<Run>,
}

/// Extra references by address: end of the run, and how many.
struct Counts<'a> {
    source: &'a dyn NodeSource,
    tree: &'a Tree,
    /// Items as they are now, for the parts of the address space that were loaded.
    items: BTreeMap<u64, (u64, u64)>,
    /// Addresses whose items the tree has: to be deleted unless still there.
    stored: BTreeMap<u64, (u64, u64)>,
}

/// Settles a group's references: `given_up` are lost like `lost`, by what is deleted.
///
/// # Errors
/// Errors of the device or the tree; [`Error::BadItem`] for items that overlap.
pub(super) fn settle(
    source: &dyn NodeSource,
    tree: &Tree,
    mut gained: Vec<Run>,
    mut lost: Vec<Run>,
    mut given_up: Vec<Run>,
) -> Result<Settled> {
    let mut counts = Counts { source, tree, items: BTreeMap::new(), stored: BTreeMap::new() };
    gained.sort_unstable();
    lost.sort_unstable();
    given_up.sort_unstable();
    for run in gained {
        counts.add(run)?;
    }
    let mut dead = Vec::new();
    for run in lost {
        counts.take(run, &mut dead)?;
    }
    let mut dead_given_up = Vec::new();
    for run in given_up {
        counts.take(run, &mut dead_given_up)?;
    }
    Ok(Settled { edits: counts.edits(), dead, dead_given_up })
}

/// How many items of the reference tree runs lie in.
///
/// # Errors
/// As [`settle`].
pub(super) fn items_of(source: &dyn NodeSource, tree: &Tree, runs: &[Run]) -> Result<usize> {
    let mut counts = Counts { source, tree, items: BTreeMap::new(), stored: BTreeMap::new() };
    runs.iter().try_for_each(|run| counts.load(*run))?;
    Ok(counts.items.len())
}

/// Whether any part of a run has further references.
///
/// # Errors
/// Errors of the device or the tree; [`Error::BadItem`].
pub fn is_shared(source: &dyn NodeSource, tree: &Tree, run: Run) -> Result<bool> {
    // Items do not overlap, so no other reaches further than the last that begins before its end.
    let last = Key::new(run.end().0.saturating_sub(1), kind::REF, 0);
    let Some((key, value)) = tree.last_upto(source, &last)? else { return Ok(false) };
    let item = RefItem::decode(Logical(key.object), &value)
        .map_err(|bad| bad.in_item(tree.id, key.object))?;
    Ok(key.object + item.bytes > run.addr.0)
}

impl Counts<'_> {
    /// Makes sure that every item that overlaps the run is in `items`.
    fn load(&mut self, run: Run) -> Result<()> {
        if self.tree.root.is_none() {
            return Ok(());
        }
        let at = Key::new(run.addr.0, kind::REF, 0);
        let first = self.tree.last_upto(self.source, &at)?.map_or(at, |(key, _)| key);
        let mut cursor = self.tree.cursor();
        cursor.seek(self.source, &first)?;
        let mut done_to = 0;
        while let Some((key, value)) = cursor.next(self.source)? {
            if key.object >= run.end().0 {
                break;
            }
            let bad = |what| Error::BadItem { what, tree: self.tree.id, object: key.object };
            if key.kind != kind::REF || key.offset != 0 {
                return Err(bad("item of another kind in the reference tree"));
            }
            let item = RefItem::decode(Logical(key.object), &value)
                .map_err(|b| b.in_item(self.tree.id, key.object))?;
            if key.object < done_to {
                return Err(bad("reference items overlap"));
            }
            done_to = key.object + item.bytes;
            if self.stored.insert(key.object, (done_to, item.extra)).is_none() {
                self.items.insert(key.object, (done_to, item.extra));
            }
        }
        Ok(())
    }

    /// Makes item boundaries fall on both ends of the run.
    fn split_at(&mut self, addr: u64) {
        let Some((start, (end, extra))) = self.items.range(..addr).next_back() else { return };
        let (start, end, extra) = (*start, *end, *extra);
        if end > addr {
            self.items.insert(start, (addr, extra));
            self.items.insert(addr, (end, extra));
        }
    }

    fn add(&mut self, run: Run) -> Result<()> {
        self.load(run)?;
        self.split_at(run.addr.0);
        self.split_at(run.end().0);
        let mut at = run.addr.0;
        while at < run.end().0 {
            match self.items.range(at..run.end().0).next().map(|(k, v)| (*k, *v)) {
                Some((start, (end, extra))) if start == at => {
                    let extra = extra.checked_add(1).ok_or(Error::BadItem {
                        what: "reference count out of range",
                        tree: self.tree.id,
                        object: start,
                    })?;
                    self.items.insert(start, (end, extra));
                    at = end;
                }
                next => {
                    let end = next.map_or(run.end().0, |(start, _)| start);
                    self.items.insert(at, (end, 1));
                    at = end;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, run: Run, dead: &mut Vec<Run>) -> Result<()> {
        self.load(run)?;
        self.split_at(run.addr.0);
        self.split_at(run.end().0);
        let mut at = run.addr.0;
        while at < run.end().0 {
            match self.items.range(at..run.end().0).next().map(|(k, v)| (*k, *v)) {
                Some((start, (end, extra))) if start == at => {
                    match extra {
                        1 => self.items.remove(&start),
                        _ => self.items.insert(start, (end, extra - 1)),
                    };
                    at = end;
                }
                next => {
                    let end = next.map_or(run.end().0, |(start, _)| start);
                    dead.push(Run { addr: Logical(at), bytes: end - at });
                    at = end;
                }
            }
        }
        Ok(())
    }

    /// Joins neighbours with equal counts and compares with what is stored.
    fn edits(self) -> Vec<(Key, Edit)> {
        let mut joined: Vec<(u64, u64, u64)> = Vec::new();
        for (start, (end, extra)) in self.items {
            match joined.last_mut() {
                Some(last) if last.1 == start && last.2 == extra => last.1 = end,
                _ => joined.push((start, end, extra)),
            }
        }
        // One by one: collecting into a map sorts, with much of it on the stack.
        let mut edits = BTreeMap::new();
        for start in self.stored.keys() {
            edits.insert(*start, Edit::Delete);
        }
        for (start, end, extra) in joined {
            if self.stored.get(&start) == Some(&(end, extra)) {
                edits.remove(&start);
                continue;
            }
            let item = RefItem { bytes: end - start, extra };
            edits.insert(start, Edit::Put(item.to_bytes().to_vec()));
        }
        edits.into_iter().map(|(start, edit)| (Key::new(start, kind::REF, 0), edit)).collect()
    }
}
