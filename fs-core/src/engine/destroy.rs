//! Taking deleted versions apart, a bounded step a group.
//!
//! What a step did is published with its group, so a crash loses at most a step. With the words of
//! `versions`, a deleted version S with the parent P is in one of three cases:
//!
//! - *Two or more go on from it.* It stays, hidden, until one does.
//! - *One goes on from it*, N. Only S has what is in `dead(N)` and was born after P: it is given
//!   up. The rest of `dead(N)`, and `dead(S)`, is what P has and N has not: joined, it is the dead
//!   list of N once N goes on from P. The shorter list is moved to the longer one, so an entry is
//!   moved at most once for each doubling of its list. When nothing is left to do, N's parent
//!   becomes P and S is gone.
//! - *None goes on from it.* Only S has what its tree holds that was born after P. The tree is
//!   walked, own nodes only, and given up from its beginning on; the `cursor` says how far. Then
//!   its dead list is emptied: P has all of it.
//!
//! What somebody still reads is not begun. A version with one successor of which a part is gone
//! can wait for as long as it likes: what it does with lists is right whatever became of its
//! neighbours meanwhile. Of a version without successors that is half walked the beginning was
//! given up as far as it was born after P. So P stays its parent until it is gone; and it is walked
//! only when P is not to be taken apart first, since what S and P have together has to be given up
//! once.
//!
//! # Sums
//!
//! `dead_own_bytes` of a version sums up the entries of its dead list that were born after its
//! parent's parent. When a version goes, the parent's parent of some becomes an older one. The sums
//! of N and of what goes on from N follow beforehand, from younger births to older ones, so many a
//! step: `dead_own_from` says how far they are.
//!
//! # Room
//!
//! A step is tried first: what it changes of dead lists is collected, what it would give up is
//! looked up in the reference tree and in the bitmaps, and room is reserved for writing all of it,
//! as for any delete: dead lists, references, items of versions, and bitmaps. If there is none, a
//! smaller step is tried; if there is none even for the smallest, that was all for this group. So
//! deleting goes on in a full pool, and never makes a group fail. When dead lists cannot be written
//! after all, those of the group's operations are written without the steps: room for that is
//! reserved as well.
//!
//! # Time
//!
//! Whoever waits for a commit waits for the steps in it. So only commits take steps along that are
//! made for that, in the background or because somebody needs room; never those that an fsync, a
//! sync or a snapshot asks for. And as an fsync may come while one is under way, no step is begun
//! after [`STEPS_NS`], and a step is at most [`WORK_PER_STEP`] references, items and entries.
//!
//! # Damage
//!
//! What cannot be read, or makes no sense, ends the deletion of that version, until the pool is
//! opened again: this is reported, and others go on.

use crate::btree::{FreshVisitor, Node, NodeSource, Shape, Tree};
use crate::engine::dead::{self, Lists, Sum};
use crate::engine::nodes::GroupSink;
use crate::engine::{references, Engine, Roots};
use crate::error::{Error, Incident};
use crate::format::chunk::ChunkKind;
use crate::format::dead::DeadRef;
use crate::format::extent::Extent;
use crate::format::key::{kind, Key};
use crate::format::pool::{version, SubvolItem};
use crate::format::ptr::BlockPtr;
use crate::format::space::{Run, REGION_BYTES};
use crate::space::Class;
use crate::subvol::extents::last_named;
use crate::subvol::store::Result;
use crate::subvol::versions::Versions;
use crate::units::{Ino, TreeId, Txg, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// References given up or moved by one group, unless asked otherwise.
pub(super) const REFS_PER_GROUP: usize = 8192;
/// Steps made by one group.
const STEPS_PER_GROUP: usize = 1024;
/// How long after the first step of a group another is begun, in nanoseconds.
const STEPS_NS: u64 = 20_000_000;
/// What one step does at most: references given up, entries moved, reference items looked up.
const WORK_PER_STEP: usize = 1024;
/// Items of trees that may be looked at instead of giving a reference up.
const ITEMS_PER_WORK: usize = 16;
/// The cursor of a version whose tree is gone.
const TREE_GONE: [u8; 24] = [0xff; 24];
/// Nodes of roots and of the residue that a group writes because something is deleted.
const ROOT_NODES: u64 = 4;
/// Versions that a step changes.
const VERSIONS_PER_STEP: usize = 3;
/// Bytes of a bitmap item.
const BITMAP_BYTES: u64 = REGION_BYTES / SECTOR_BYTES / 8;
/// How long to wait after there was no room or no memory, in nanoseconds.
const PAUSE_NS: u64 = 5_000_000_000;

/// What steps give up.
#[derive(Default)]
pub(super) struct GivenUp {
    /// References to data.
    pub data: Vec<Run>,
    /// Nodes.
    pub nodes: Vec<Run>,
    /// Entries that were moved or dropped, births that were summed up, reference items.
    moved: usize,
    /// Items of trees that were looked at.
    looked: usize,
    /// By which versions.
    pub ids: Vec<u64>,
}

impl GivenUp {
    fn add(&mut self, refs: &[DeadRef]) {
        for entry in refs {
            match entry.is_node {
                true => self.nodes.push(entry.run),
                false => self.data.push(entry.run),
            }
        }
    }

    fn work(&self) -> usize {
        self.data.len() + self.nodes.len() + self.moved + self.looked / ITEMS_PER_WORK
    }

    fn bytes(&self) -> u64 {
        let all = self.data.iter().chain(&self.nodes);
        all.fold(0, |sum: u64, run| sum.saturating_add(run.bytes))
    }

    fn append(&mut self, other: &mut GivenUp) {
        self.data.append(&mut other.data);
        self.nodes.append(&mut other.nodes);
        self.moved += other.moved;
        self.looked += other.looked;
    }
}

/// What a group does about deleted versions.
struct Work<'w, 'a> {
    sink: &'w GroupSink<'a>,
    roots: &'w Roots,
    txg: Txg,
    /// Of the pool tree and the space tree.
    shapes: [Shape; 2],
    /// Nodes of dead lists that are written in any case.
    base_nodes: u64,
    /// Metadata bytes that were reserved.
    reserved: u64,
    /// Reference items that what is given up lies in.
    ref_items: usize,
    /// Regions that what is given up lies in.
    regions: BTreeSet<u64>,
    out: GivenUp,
}

/// What came of trying a step.
enum Tried {
    Done,
    /// It was more than a step may be.
    TooMuch,
}

/// From where on the tree of a version has all that the version refers to; `None` when nobody reads
/// its tree any more.
pub(super) fn left_from(versions: &Versions, id: u64, item: &SubvolItem) -> Option<Key> {
    if item.flags & version::STARTED == 0 {
        return Some(Key::MIN);
    }
    // Between two others, what only it has is given up by list.
    let is_read = versions.child_count(id) == 0 && item.cursor != TREE_GONE;
    is_read.then(|| Key::peek(&item.cursor))
}

impl Engine {
    /// Whether something that was deleted can be taken apart further.
    pub(super) fn has_to_destroy(&self) -> bool {
        let now = self.store.platform.clock.uptime_ns();
        now >= self.destroy_after_ns.load(Ordering::Relaxed) && self.next_to_destroy().is_some()
    }

    /// Deleted versions that cannot be taken apart, because something of them is damaged.
    pub fn stopped_deletions(&self) -> Vec<u64> {
        self.stopped.lock().iter().copied().collect()
    }

    /// Bytes that deletions gave up since the pool was opened: data once for each reference.
    pub fn given_up_bytes(&self) -> u64 {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Takes everything that was deleted apart, committing in between. What somebody still reads
    /// stays, and what is damaged.
    ///
    /// # Errors
    /// [`Error::Failed`]; [`Error::NoSpace`] or [`Error::Memory`] when there is no room for it.
    pub fn destroy_all(&self) -> Result<()> {
        self.destroy_after_ns.store(0, Ordering::Relaxed);
        while self.next_to_destroy().is_some() {
            self.want_destroying();
            self.want_commit();
            self.commit_upto(self.store.groups.open())?;
            self.release();
            if self.destroy_after_ns.load(Ordering::Relaxed) != 0 {
                return Err(Error::NoSpace);
            }
        }
        Ok(())
    }

    /// The next commit takes steps along.
    pub(super) fn want_destroying(&self) {
        self.destroys.store(true, Ordering::Relaxed);
    }

    fn pause_destroying(&self) {
        let now = self.store.platform.clock.uptime_ns();
        self.destroy_after_ns.store(now.saturating_add(PAUSE_NS).max(1), Ordering::Relaxed);
    }

    /// Gives deletions up until the pool is opened again.
    fn stop_destroying(&self, ids: &[u64], error: &Error) {
        for id in ids {
            if !self.stopped.lock().insert(*id) {
                continue;
            }
            let incident = Incident::DeletionStopped { tree: TreeId(*id), error: error.clone() };
            self.store.platform.report.incident(&incident);
        }
    }

    /// Frees what deletions gave up. What cannot be is crafted: somebody else still has it.
    pub(super) fn free_given_up(&self, given_up: &GivenUp, txg: Txg) {
        for run in given_up.data.iter().chain(&given_up.nodes) {
            if let Err(error) = self.store.space.try_free(*run, txg) {
                self.stop_destroying(&given_up.ids, &error);
            }
        }
    }

    /// The version to go on with.
    fn next_to_destroy(&self) -> Option<u64> {
        // Before the versions: nothing deleted is opened any more, so it can only become less.
        let mut closed = self.open_snapshots();
        {
            let stopped = self.stopped.lock();
            closed.extend(stopped.iter().copied());
        }
        let versions = self.versions.read();
        let is_started = |id: u64| versions.started().contains(&id);
        let is_deleted = |id: u64| versions.deleted().contains(&id);
        // Its successor is not half walked: see above.
        let is_middle = |id: u64| {
            let child = versions.only_child(id).filter(|_| is_deleted(id));
            child.is_some_and(|child| !is_started(child) || versions.child_count(child) > 0)
        };
        let is_end = |id: u64| {
            let parent = versions.get(id).map_or(0, |version| version.item.parent);
            versions.child_count(id) == 0
                && (is_started(id) || !is_deleted(parent) || versions.child_count(parent) > 1)
        };
        let can_go_on = |id: &&u64| !closed.contains(*id) && (is_middle(**id) || is_end(**id));
        let mut started = versions.started().iter().filter(|id| is_deleted(**id));
        if let Some(id) = started.find(can_go_on) {
            return Some(*id);
        }
        versions.deleted().iter().find(can_go_on).copied()
    }

    /// Goes on with what was deleted, in group `txg`, after the subvolumes changed their dead
    /// lists. Returns the tree of dead lists after the group, and what was given up.
    #[inline(never)]
    pub(super) fn destroy_some(
        &self,
        sink: &GroupSink<'_>,
        roots: &Roots,
        lists: &mut Lists<'_>,
        txg: Txg,
    ) -> Result<(Tree, GivenUp)> {
        let tree = &roots.dead;
        if !self.destroys.swap(false, Ordering::Relaxed) || !self.has_to_destroy() {
            return Ok((tree.apply(sink, &lists.batch())?, GivenUp::default()));
        }
        let base = lists.batch();
        let space = self.store.space_view().tree;
        let mut work = Box::new(Work {
            sink,
            roots,
            txg,
            shapes: [roots.pool.shape(sink)?, space.shape(sink)?],
            base_nodes: lists.nodes_bound(),
            reserved: 0,
            ref_items: 0,
            regions: BTreeSet::new(),
            out: GivenUp::default(),
        });
        sink.mark();
        self.versions.write().begin();
        self.make_steps(&mut work, lists)?;
        let edits = lists.batch();
        match tree.apply(sink, &edits) {
            Ok(tree) => {
                self.versions.write().keep();
                sink.forget_mark();
                self.given_up.fetch_add(work.out.bytes(), Ordering::Relaxed);
                Ok((tree, work.out))
            }
            Err(error) if is_bearable(&error) && !work.out.ids.is_empty() => {
                // A neighbour of what was to be changed. Without deletions it may not matter.
                self.versions.write().undo();
                sink.give_back_marked();
                match error.is_damage() {
                    true => self.stop_destroying(&work.out.ids, &error),
                    false => self.pause_destroying(),
                }
                Ok((tree.apply(sink, &base)?, GivenUp::default()))
            }
            Err(error) => Err(error),
        }
    }

    fn make_steps(&self, work: &mut Work<'_, '_>, lists: &mut Lists<'_>) -> Result<()> {
        let most = self.deletion_refs;
        let mut budget = most.min(WORK_PER_STEP);
        let clock = &self.store.platform.clock;
        let until = clock.uptime_ns().saturating_add(STEPS_NS);
        for _ in 0..STEPS_PER_GROUP {
            let left = match clock.uptime_ns() <= until {
                true => most.saturating_sub(work.out.work()),
                false => 0,
            };
            let Some(id) = self.next_to_destroy().filter(|_| left > 0) else { return Ok(()) };
            lists.begin();
            match self.try_step(work, lists, id, budget.min(left)) {
                Ok(Tried::Done) if work.out.ids.last() != Some(&id) => work.out.ids.push(id),
                Ok(Tried::Done) => {}
                Ok(Tried::TooMuch) | Err(Error::NoSpace) if budget > 1 => {
                    lists.undo();
                    budget = (budget / 8).max(1);
                }
                Ok(Tried::TooMuch) | Err(Error::NoSpace | Error::Memory) => {
                    lists.undo();
                    // What was done makes room for more.
                    if work.out.ids.is_empty() {
                        self.pause_destroying();
                    }
                    return Ok(());
                }
                Err(error) if error.is_damage() => {
                    lists.undo();
                    self.stop_destroying(&[id], &error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn try_step(
        &self,
        work: &mut Work<'_, '_>,
        lists: &mut Lists<'_>,
        id: u64,
        most: usize,
    ) -> Result<Tried> {
        let mut given_up = GivenUp::default();
        let child = self.versions.read().only_child(id);
        let step = match child {
            None => self.end_step(work.sink, lists, id, most, &mut given_up)?,
            Some(child) => self.middle_step(lists, (id, child), most, &mut given_up)?,
        };
        let ref_items = self.prove(work, &given_up)?;
        // One reference may lie in as many items as it has sectors: it goes whatever that takes.
        if ref_items > ITEMS_PER_WORK * most && given_up.work() > 1 && most > 1 {
            return Ok(Tried::TooMuch);
        }
        self.make_room(work, lists, &given_up, ref_items)?;
        self.take_step(step)?;
        given_up.moved += ref_items;
        work.ref_items += ref_items;
        work.out.append(&mut given_up);
        Ok(Tried::Done)
    }

    /// What is given up is there, and can be looked up where that will be done. Returns how many
    /// reference items it lies in.
    fn prove(&self, work: &Work<'_, '_>, given_up: &GivenUp) -> Result<usize> {
        let store = &*self.store;
        let kinds = [(&given_up.data, ChunkKind::Data), (&given_up.nodes, ChunkKind::Metadata)];
        for (runs, kind) in kinds {
            for run in runs {
                if !store.space.is_used_as(*run, kind, store)? {
                    let what = "what is deleted names space that is not in use";
                    return Err(Error::Corrupt { what, addr: run.addr });
                }
            }
        }
        references::items_of(work.sink, &work.roots.refs, &given_up.data)
    }

    /// Reserves room for writing what the group's steps change, this one among them.
    fn make_room(
        &self,
        work: &mut Work<'_, '_>,
        lists: &Lists<'_>,
        given_up: &GivenUp,
        ref_items: usize,
    ) -> Result<()> {
        let node_bytes = self.store.node_bytes;
        let mut regions = work.regions.clone();
        for run in given_up.data.iter().chain(&given_up.nodes) {
            regions.extend(run.addr.0 / REGION_BYTES..=(run.end().0 - 1) / REGION_BYTES);
        }
        // An item may be cut in three.
        let edits = 3 * (work.ref_items + ref_items);
        let value = edits * crate::format::space::RefItem::BYTES;
        // Items of a version are neighbours: two leaves at most.
        let touched = self.versions.read().touched_count() + VERSIONS_PER_STEP;
        let versions = 2 * touched as u64;
        // A bitmap, and the summary of its chunk.
        let bitmaps = 2 * regions.len() as u64;
        let [pool, space] = work.shapes;
        let nodes = lists.nodes_bound()
            + work.base_nodes
            + work.roots.refs.apply_bound(edits, value, node_bytes)
            + pool.apply_bound(versions, versions * SubvolItem::BYTES as u64 / 2, node_bytes)
            + space.apply_bound(bitmaps, bitmaps * BITMAP_BYTES / 2, node_bytes)
            + ROOT_NODES;
        let need = nodes * node_bytes as u64;
        let more = need.saturating_sub(work.reserved);
        if more > 0 {
            let (space, cap) = (&self.store.space, || self.metadata_bound());
            let reservation = space.reserve_within(0, more, Class::Delete, Some(&cap))?;
            self.store.keep(work.txg, reservation);
            work.reserved = need;
        }
        work.regions = regions;
        Ok(())
    }

    /// A step for a version from which none goes on.
    #[inline(never)]
    fn end_step(
        &self,
        source: &dyn NodeSource,
        lists: &mut Lists<'_>,
        id: u64,
        most: usize,
        out: &mut GivenUp,
    ) -> Result<Step> {
        let (mut item, own_since) = {
            let versions = self.versions.read();
            let item = versions.need(id)?.item;
            (Box::new(item), versions.dead_own_since(&item))
        };
        item.flags |= version::STARTED;
        if item.cursor != TREE_GONE {
            let root = item.root(Txg(u64::MAX)).map_err(|bad| bad.in_item(TreeId::POOL, id))?;
            let own = Tree { id: item.lineage(TreeId(id)), root };
            let since = Txg(item.snapshot_txg);
            let from = Key::peek(&item.cursor);
            let mut taker = Taker { source, tree: &own, since, most, out };
            let next = own.walk_fresh(source, since, from, &mut taker)?;
            item.own_bytes = item.own_bytes.saturating_sub(out.bytes());
            item.cursor = TREE_GONE;
            if let Some(key) = next {
                key.encode(&mut item.cursor);
            }
            return Ok(Step::Goes(id, item));
        }
        let mut taken = Vec::new();
        let is_all = lists.take(item.dead_list(id), Txg(0), most, &mut taken)?;
        item.dead_entries = item.dead_entries.saturating_sub(taken.len() as u64);
        item.dead_own_bytes =
            item.dead_own_bytes.saturating_sub(dead::bytes_after(&taken, own_since));
        out.moved += taken.len();
        Ok(if is_all { Step::Gone(id) } else { Step::Goes(id, item) })
    }

    /// A step for a version from which one goes on.
    #[inline(never)]
    fn middle_step(
        &self,
        lists: &mut Lists<'_>,
        (id, child): (u64, u64),
        most: usize,
        out: &mut GivenUp,
    ) -> Result<Step> {
        let (mut item, mut next, above, item_since, parents) = {
            let versions = self.versions.read();
            let (item, next) = (versions.need(id)?.item, versions.need(child)?.item);
            let sinces = (versions.dead_own_since(&item), versions.dead_own_since(&next));
            let above = versions.parent_txg(item.parent);
            (Box::new(item), Box::new(next), above, sinces.0, sinces.1)
        };
        item.flags |= version::STARTED;
        let since = Txg(item.snapshot_txg);
        let mut taken = Vec::new();
        let is_all = lists.take(next.dead_list(child), since, most, &mut taken)?;
        let bytes = dead::bytes(&taken);
        out.add(&taken);
        next.dead_entries = next.dead_entries.saturating_sub(taken.len() as u64);
        next.dead_own_bytes = next.dead_own_bytes.saturating_sub(bytes);
        item.own_bytes = item.own_bytes.saturating_sub(bytes);
        if !is_all || !taken.is_empty() {
            return Ok(Step::Moves { id, item, child, next });
        }
        if parents > above {
            // What is older than P is left in the list: its sum begins with P's parent.
            let list = next.dead_list(child);
            out.moved += lower(&mut next, lists.sum_down(list, parents, above, most)?);
            return Ok(Step::Moves { id, item, child, next });
        }
        let mut sinces = (item_since, parents);
        if item.dead_entries > next.dead_entries {
            (next.dead_list, item.dead_list) = (item.dead_list(id), next.dead_list(child));
            core::mem::swap(&mut item.dead_entries, &mut next.dead_entries);
            core::mem::swap(&mut item.dead_own_bytes, &mut next.dead_own_bytes);
            sinces = (sinces.1, sinces.0);
            item.dead_own_from = sinces.0 .0.saturating_add(1);
            next.dead_own_from = sinces.1 .0.saturating_add(1);
        }
        let is_all = lists.take(item.dead_list(id), Txg(0), most, &mut taken)?;
        item.dead_own_bytes =
            item.dead_own_bytes.saturating_sub(dead::bytes_after(&taken, sinces.0));
        next.dead_own_bytes =
            next.dead_own_bytes.saturating_add(dead::bytes_after(&taken, sinces.1));
        let count = taken.len() as u64;
        item.dead_entries = item.dead_entries.saturating_sub(count);
        next.dead_entries = next.dead_entries.saturating_add(count);
        out.moved += taken.len();
        lists.append(next.dead_list(child), taken)?;
        if !is_all {
            return Ok(Step::Moves { id, item, child, next });
        }
        if let Some((after, lowered, births)) = self.sum_after(lists, child, since, most)? {
            out.moved += births;
            // As it is, and the sum of one that goes on from N.
            return Ok(Step::Sums { id, item, child, next, after, lowered });
        }
        next.own_bytes = next.own_bytes.saturating_add(item.own_bytes);
        (next.parent, next.snapshot_txg) = (item.parent, item.snapshot_txg);
        Ok(Step::Joined { id, child, next })
    }

    /// Lowers the sum of one of those that go on from a version, if there is one for which it does
    /// not begin after `since` yet.
    fn sum_after(
        &self,
        lists: &Lists<'_>,
        version: u64,
        since: Txg,
        most: usize,
    ) -> Result<Option<(u64, Box<SubvolItem>, usize)>> {
        let found = {
            let versions = self.versions.read();
            let item = |id: u64| versions.get(id).map(|after| (id, after.item));
            let mut after = versions.children(version).filter_map(item);
            let is_late = |(_, item): &(u64, SubvolItem)| versions.dead_own_since(item) > since;
            after
                .find(is_late)
                .map(|(id, item)| (id, Box::new(item), versions.dead_own_since(&item)))
        };
        let Some((id, mut item, from)) = found else { return Ok(None) };
        let sum = lists.sum_down(item.dead_list(id), from, since, most)?;
        let births = lower(&mut item, sum);
        Ok(Some((id, item, births)))
    }

    /// Notes what a step made of the versions.
    #[inline(never)]
    fn take_step(&self, step: Step) -> Result<()> {
        let mut versions = self.versions.write();
        let (id, item) = match step {
            Step::Gone(id) => return versions.remove(id),
            Step::Joined { id, child, next } => {
                // The list of N may have S's id for its own.
                versions.change(child, |there| *there = *next)?;
                return versions.remove(id);
            }
            Step::Goes(id, item) => (id, item),
            Step::Moves { id, item, child, next } => {
                versions.change(child, |there| *there = *next)?;
                (id, item)
            }
            Step::Sums { id, item, child, next, after, lowered } => {
                versions.change(child, |there| *there = *next)?;
                versions.change(after, |there| *there = *lowered)?;
                (id, item)
            }
        };
        versions.change(id, |there| *there = *item)
    }
}

/// Whether the pool can go on although a deletion has met this.
fn is_bearable(error: &Error) -> bool {
    error.is_damage() || matches!(error, Error::NoSpace | Error::Memory)
}

/// Adds a sum to that of a version, and notes where it begins now. Returns what that took.
fn lower(item: &mut SubvolItem, sum: Sum) -> usize {
    item.dead_own_bytes = item.dead_own_bytes.saturating_add(sum.bytes);
    item.dead_own_from = sum.since.0.saturating_add(1);
    sum.births + 1
}

/// What a step comes to.
enum Step {
    /// More is left of a version.
    Goes(u64, Box<SubvolItem>),
    /// Nothing is left of it.
    Gone(u64),
    /// Entries moved from one list to another.
    Moves { id: u64, item: Box<SubvolItem>, child: u64, next: Box<SubvolItem> },
    /// All have; the sum of one that goes on from the child was brought forward.
    Sums {
        id: u64,
        item: Box<SubvolItem>,
        child: u64,
        next: Box<SubvolItem>,
        after: u64,
        lowered: Box<SubvolItem>,
    },
    /// All have, and all sums are right.
    Joined { id: u64, child: u64, next: Box<SubvolItem> },
}

/// Gives up the own nodes of a tree and the own references in them.
struct Taker<'a> {
    source: &'a dyn NodeSource,
    tree: &'a Tree,
    since: Txg,
    most: usize,
    out: &'a mut GivenUp,
}

impl FreshVisitor for Taker<'_> {
    fn leaf(&mut self, node: &Arc<Node>, from: usize) -> Result<usize> {
        for index in from..node.count() {
            if self.out.work() >= self.most {
                return Ok(index);
            }
            self.out.looked += 1;
            let key = node.key(index);
            if key.kind != kind::EXTENT {
                continue;
            }
            let (extent, birth) = Extent::decode(node.value(index), key.offset, node.birth())
                .map_err(|bad| bad.in_item(self.tree.id, key.object))?;
            if birth <= self.since {
                continue;
            }
            let ino = Ino(key.object);
            let run = last_named(self.source, self.tree, ino, key.offset, &extent)?;
            self.out.data.extend(run);
        }
        Ok(node.count())
    }

    fn node(&mut self, ptr: &BlockPtr) -> Result<()> {
        self.out.nodes.push(Run { addr: ptr.addr, bytes: ptr.allocated() });
        Ok(())
    }

    fn is_enough(&self) -> bool {
        self.out.work() >= self.most
    }
}
