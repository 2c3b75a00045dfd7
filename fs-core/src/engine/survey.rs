//! Walking all that a pool names, in steps, while it changes.
//!
//! A *pass* visits every tree once, from its first key to its last, a bounded step at a time:
//!
//! ```text
//! trees as the published group has them -> the next part of one of them -> a visitor
//! ```
//!
//! - A node that stays where it is in its tree is seen by a pass however the tree changes around
//!   it. What moves (an extent that is cloned to a place the pass is past of) is named by a node
//!   that is younger than the pass; another pass over such nodes sees it.
//! - A version shares with the snapshot it goes on from what is older than that. It is looked at
//!   after the snapshot, and only at what is younger. When a snapshot is taken of a version in the
//!   middle of which the pass is, all of that version is looked at again, after the snapshot: else
//!   what they have in common would be seen by nobody if the snapshot were deleted meanwhile.
//! - So it does no harm when a snapshot is deleted: what is left of it was either seen with it, or
//!   belongs to a version that was not looked at yet. One that is being taken apart between two
//!   others counts as gone, since nobody reads its tree any more: what goes on from it is looked at
//!   as far as it is younger than what comes before. So does one whose root makes no sense.
//! - The tree of one that ends is read to take it apart, from its beginning on. What is left of it
//!   is looked at, and nothing before: that may be another's by now.
//! - A rollback puts an older tree in the place of one that may have been seen: whoever goes on
//!   with a pass must begin again when [`Engine::turns`] has changed.

#[cfg(test)]
mod tests;

use crate::btree::{Node, Tree};
use crate::engine::{data, destroy, Engine};
use crate::error::Error;
use crate::format::extent::Extent;
use crate::format::key::{kind, Key};
use crate::format::pool::version;
use crate::format::ptr::BlockPtr;
use crate::pool::DataSource;
use crate::subvol::store::{Result, Store, View};
use crate::subvol::versions::Versions;
use crate::units::{Logical, TreeId, Txg};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;

/// A tree to look at.
struct Part {
    /// Or what is wrong with what the version says of its root.
    tree: core::result::Result<Tree, Error>,
    /// What is not younger is another part's.
    since: Txg,
    /// What is before it is gone.
    from: Key,
    /// The part that has to be looked at before.
    after: u64,
}

/// All trees as one group has them. While this is held, nothing they reach is reused.
pub(super) struct Parts {
    /// The group.
    pub txg: Txg,
    by_id: BTreeMap<u64, Part>,
    /// The residue block.
    pub residue: Option<BlockPtr>,
    _view: Arc<View>,
}

/// What is shown what a pass comes to.
pub(super) trait Visitor {
    /// A version that names no root that can be: nothing of it is found.
    fn rootless(&mut self, id: TreeId, error: &Error);
    /// A block of a tree, before what it names.
    fn block(&mut self, seen: &Seen<'_>) -> Result<()>;
    /// File data, born in group `birth`, in the subvolume or snapshot `id`.
    fn data(&mut self, id: TreeId, key: &Key, birth: Txg, source: DataSource) -> Result<()>;
    /// Whether that was enough for one step.
    fn has_enough(&self) -> bool;
    /// Whether a block is of no interest, nor anything below it: then it is not even loaded. The
    /// first key is known of all but roots.
    fn passes_over(&self, _id: TreeId, _ptr: &BlockPtr, _key: Option<&Key>) -> Result<bool> {
        Ok(false)
    }
    /// Whether what an item of a subvolume names is of no interest.
    fn passes_over_item(&self, _id: TreeId, _key: &Key, _value: &[u8]) -> Result<bool> {
        Ok(false)
    }
}

/// A block that a pass came to.
pub(super) struct Seen<'a> {
    /// The subvolume or snapshot, or a tree of the pool.
    pub id: TreeId,
    /// What names it.
    pub ptr: &'a BlockPtr,
    /// Why what it names is not visited, if it cannot be read.
    pub error: Option<&'a Error>,
}

/// A place in a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub id: u64,
    /// The part's, when the place was left.
    pub since: Txg,
    pub key: Key,
}

/// How far a pass is, in a form that can be stored: ids are never given twice, so whatever had an
/// id between the first and the last of a span then was looked at, or is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Trees that were looked at: first and last id, ascending.
    pub done: Vec<(u64, u64)>,
    /// The tree in the middle of which it is.
    pub at: Option<Spot>,
}

/// How far a pass is.
#[derive(Default)]
pub(super) struct Pass {
    done: BTreeSet<u64>,
    /// What was looked at before the pass went on from a [`Progress`].
    before: Vec<(u64, u64)>,
    at: Option<Spot>,
    /// Nodes that are not younger are passed over.
    least: Txg,
}

/// The trees are held as they are for a pass when the one before came to no more blocks than these.
const LAST_BLOCKS: u64 = 4096;
/// Passes before the last at most: more would not become shorter.
const PASSES_MAX: usize = 8;

/// Passes one after the other, each over what is younger than the one before, until one of them is
/// short. The last sees the trees as one group has them.
pub(super) struct Passes {
    /// The group that was published when this began.
    pub first: Txg,
    /// How many rollbacks there had been.
    pub turns: u64,
    /// Blocks that this pass came to.
    pub blocks: u64,
    /// The group that was published when this pass began.
    began: Txg,
    pass: Pass,
    count: usize,
    /// In the last pass, what it looks at.
    last: Option<Parts>,
}

impl Passes {
    /// At the beginning of the first.
    pub(super) fn new(turns: u64, parts: &Parts) -> Passes {
        let (first, began) = (parts.txg, parts.txg);
        Passes { first, turns, blocks: 0, began, pass: Pass::default(), count: 1, last: None }
    }

    /// Visits the next part of what this pass looks at; of `now`, unless it is the last. False at
    /// its end.
    ///
    /// # Errors
    /// As [`Pass::step`].
    pub(super) fn step(
        &mut self,
        store: &Store,
        now: &Parts,
        visitor: &mut dyn Visitor,
    ) -> Result<bool> {
        self.pass.step(store, self.last.as_ref().unwrap_or(now), visitor)
    }

    /// At the end of a pass: begins the next, or says what the last one looked at.
    pub(super) fn end_pass(&mut self, now: Parts) -> Option<Parts> {
        if self.last.is_some() {
            return self.last.take();
        }
        self.pass = Pass::younger_than(self.began);
        self.began = now.txg;
        let is_short = self.blocks <= LAST_BLOCKS || self.count >= PASSES_MAX;
        self.last = is_short.then_some(now);
        self.count += 1;
        self.blocks = 0;
        None
    }

    /// Something is left to do about what the last one looked at.
    pub(super) fn hold(&mut self, parts: Parts) {
        self.last = Some(parts);
    }
}

impl Engine {
    /// All trees as the published group has them. Waits for a group that is being written.
    pub(super) fn parts(&self) -> Parts {
        let committer = self.committer();
        let view = self.store.space_view();
        let (txg, roots) = (committer.superblock.txg, &committer.roots);
        let own = |tree: Tree| Part { tree: Ok(tree), since: Txg(0), from: Key::MIN, after: 0 };
        let mut by_id = BTreeMap::new();
        for tree in [roots.pool, roots.chunk, view.tree, roots.refs, roots.dead] {
            by_id.insert(tree.id.0, own(tree));
        }
        let versions = self.versions.read();
        for (id, version) in versions.iter() {
            let item = &version.item;
            let Some(from) = destroy::left_from(&versions, id, item) else { continue };
            let tree = match item.root(txg) {
                Ok(root) => Ok(Tree { id: item.lineage(TreeId(id)), root }),
                Err(bad) => Err(bad.in_item(TreeId::POOL, id)),
            };
            let (after, since) = before(&versions, id, txg);
            by_id.insert(id, Part { tree, since, from, after });
        }
        drop(versions);
        Parts { txg, by_id, residue: roots.residue, _view: view }
    }
}

impl Parts {
    /// The tree of the pool, the subvolume or the snapshot with that id, if it can be had.
    pub(super) fn tree(&self, id: TreeId) -> Option<&Tree> {
        self.by_id.get(&id.0)?.tree.as_ref().ok()
    }

    /// The tree of references, unless it is empty.
    pub(super) fn references(&self) -> Option<Tree> {
        let tree = self.by_id.get(&TreeId::REFS.0)?.tree.as_ref().ok()?;
        tree.root.is_some().then_some(*tree)
    }
}

/// What a version goes on from, past snapshots that nobody looks at, and its group.
fn before(versions: &Versions, id: u64, newest: Txg) -> (u64, Txg) {
    let mut place = (0, Txg(0));
    let mut next = Some(id);
    while let Some(version) = next.take().and_then(|id| versions.get(id)) {
        place = (version.item.parent, Txg(version.item.snapshot_txg));
        let is_going = |parent: &u64| {
            versions.get(*parent).is_some_and(|v| {
                v.item.flags & version::STARTED != 0 || v.item.root(newest).is_err()
            })
        };
        next = Some(place.0).filter(is_going);
    }
    place
}

impl Pass {
    /// A pass over nodes that are younger than a group.
    pub(super) fn younger_than(least: Txg) -> Pass {
        Pass { least, ..Pass::default() }
    }

    /// A pass over nodes that are younger than a group, which goes on where one was.
    pub(super) fn resumed(least: Txg, progress: &Progress) -> Pass {
        let Progress { done, at } = progress;
        Pass { before: done.clone(), at: *at, least, ..Pass::default() }
    }

    /// How far it is, in the trees it was shown last.
    pub(super) fn progress(&self, parts: &Parts) -> Progress {
        let mut done: Vec<(u64, u64)> = Vec::new();
        let mut goes_on = false;
        for id in parts.by_id.keys() {
            let is_done = self.is_done(*id);
            match done.last_mut() {
                Some(span) if is_done && goes_on => span.1 = *id,
                _ if is_done => done.push((*id, *id)),
                _ => {}
            }
            goes_on = is_done;
        }
        Progress { done, at: self.at }
    }

    fn is_done(&self, id: u64) -> bool {
        let after = self.before.partition_point(|(first, _)| *first <= id);
        let is_in = |(_, last): &(u64, u64)| id <= *last;
        self.before[..after].last().is_some_and(is_in) || self.done.contains(&id)
    }

    /// Visits the next part of what there is. False when that was all.
    ///
    /// # Errors
    /// Those of the visitor; the same is visited again then.
    pub(super) fn step(
        &mut self,
        store: &Store,
        parts: &Parts,
        visitor: &mut dyn Visitor,
    ) -> Result<bool> {
        let Some((id, from)) = self.next(parts) else { return Ok(false) };
        let part = &parts.by_id[&id];
        let tree = match &part.tree {
            Ok(tree) => tree,
            Err(error) => {
                visitor.rootless(TreeId(id), error);
                self.done.insert(id);
                return Ok(true);
            }
        };
        self.at = Some(Spot { id, since: part.since, key: from });
        let from = from.max(part.from);
        let blob = Logical(0);
        let walk = Walk { id: TreeId(id), since: part.since, from: part.from, blob, visitor };
        // One of the two is called at a time.
        let walk = RefCell::new(walk);
        let since = part.since.max(self.least);
        let mut passes_over = |ptr: &BlockPtr, key: Option<&Key>| match ptr.birth <= since {
            true => Ok(true),
            false => walk.borrow().visitor.passes_over(TreeId(id), ptr, key),
        };
        let next = tree.patrol(store, &mut passes_over, from, &mut |ptr, node| {
            let walk = &mut *walk.borrow_mut();
            walk.visitor.block(&Seen { id: walk.id, ptr, error: node.err() })?;
            if let Ok(node) = node {
                walk.leaf(node)?;
            }
            Ok(!walk.visitor.has_enough())
        })?;
        match next {
            Some(key) => self.at = Some(Spot { id, since: part.since, key }),
            None => {
                self.at = None;
                self.done.insert(id);
            }
        }
        Ok(true)
    }

    /// Where to go on.
    fn next(&mut self, parts: &Parts) -> Option<(u64, Key)> {
        let at = self.at.take();
        let is_ready =
            |part: &Part| !parts.by_id.contains_key(&part.after) || self.is_done(part.after);
        if let Some(Spot { id, since, key }) = at {
            let part = parts.by_id.get(&id);
            // When it goes on from a younger snapshot than before, that has the older nodes.
            if part.is_some_and(|part| part.since <= since && is_ready(part)) {
                return Some((id, key));
            }
        }
        let due = || parts.by_id.iter().filter(|(id, _)| !self.is_done(**id));
        let ready = due().find(|(_, part)| is_ready(part));
        // Of versions that go on from each other in a circle, none is ever ready.
        ready.or_else(|| due().next()).map(|(id, _)| (*id, Key::MIN))
    }
}

/// What is on the way from a tree to a visitor.
struct Walk<'a> {
    id: TreeId,
    since: Txg,
    /// What is before it is gone.
    from: Key,
    /// The blob shown last: neighbouring items name the same.
    blob: Logical,
    visitor: &'a mut dyn Visitor,
}

impl Walk<'_> {
    fn leaf(&mut self, node: &Node) -> Result<()> {
        if !self.id.is_subvol() || node.level() != 0 {
            return Ok(());
        }
        for index in 0..node.count() {
            let key = node.key(index);
            let is_wanted = key.kind == kind::EXTENT && key >= self.from;
            if is_wanted && !self.visitor.passes_over_item(self.id, &key, node.value(index))? {
                self.extent(&key, node.value(index), node.birth())?;
            }
        }
        Ok(())
    }

    fn extent(&mut self, key: &Key, value: &[u8], newest: Txg) -> Result<()> {
        // What cannot be decoded names nothing that could be looked at.
        let Ok((extent, birth)) = Extent::decode(value, key.offset, newest) else { return Ok(()) };
        if data::run_of(&extent).is_none() || birth <= self.since {
            return Ok(());
        }
        let source = match extent {
            Extent::Plain { addr, len, checksum_kind, checksums } => {
                DataSource::Plain { addr, len, checksum_kind, checksums }
            }
            Extent::Packed { blob, .. } if blob.addr == self.blob => return Ok(()),
            Extent::Packed { blob, .. } => {
                self.blob = blob.addr;
                DataSource::Packed { blob }
            }
            Extent::Inline { .. } | Extent::Promised { .. } => return Ok(()),
        };
        self.visitor.data(self.id, key, birth, source)
    }
}
