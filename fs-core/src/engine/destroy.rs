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
//! A version whose deletion has begun ([`version::STARTED`]) is finished before another is begun.
//! What somebody still reads is not begun. So at most one is half gone. Of a version with one
//! successor the half that is gone was given up by nobody else: what goes on from it was not
//! walked, because a version without successors waits while its parent can be taken apart.

use crate::btree::{FreshVisitor, Node, NodeSource, Tree};
use crate::engine::nodes::GroupSink;
use crate::engine::{dead, Engine};
use crate::error::{Error, Incident};
use crate::format::dead::DeadRef;
use crate::format::extent::Extent;
use crate::format::key::{kind, Key};
use crate::format::pool::{version, SubvolItem};
use crate::format::ptr::BlockPtr;
use crate::format::space::Run;
use crate::subvol::extents::last_named;
use crate::subvol::store::Result;
use crate::units::{Ino, TreeId, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// References given up or moved by one group.
const REFS_PER_GROUP: usize = 8192;
/// Steps made by one group.
const STEPS_PER_GROUP: usize = 256;
/// The cursor of a version whose tree is gone.
const TREE_GONE: [u8; 24] = [0xff; 24];

/// What a step gives up.
#[derive(Default)]
pub(super) struct GivenUp {
    /// References to data.
    pub data: Vec<Run>,
    /// Nodes.
    pub nodes: Vec<Run>,
    /// Entries that were moved or dropped.
    moved: usize,
    /// Steps that were made.
    steps: usize,
}

impl GivenUp {
    fn add(&mut self, refs: &[DeadRef]) -> u64 {
        for entry in refs {
            match entry.is_node {
                true => self.nodes.push(entry.run),
                false => self.data.push(entry.run),
            }
        }
        refs.iter().map(|entry| entry.run.bytes).sum()
    }

    fn work(&self) -> usize {
        self.data.len() + self.nodes.len() + self.moved
    }
}

impl Engine {
    /// Whether something that was deleted can be taken apart further.
    pub(super) fn has_to_destroy(&self) -> bool {
        !self.destroying_failed.load(Ordering::Relaxed) && self.next_to_destroy().is_some()
    }

    /// Takes everything that was deleted apart, committing in between. What somebody still reads
    /// stays.
    ///
    /// # Errors
    /// [`Error::Failed`].
    pub fn destroy_all(&self) -> Result<()> {
        while self.has_to_destroy() {
            self.want_commit();
            self.commit_upto(self.store.groups.open())?;
        }
        Ok(())
    }

    /// The version to go on with.
    fn next_to_destroy(&self) -> Option<u64> {
        // Before the versions: nothing deleted is opened any more, so it can only become less.
        let open = self.open_snapshots();
        let versions = self.versions.read();
        let item = |id: u64| versions.get(id).map(|version| version.item);
        let is_started = |id: u64| item(id).is_some_and(|i| i.flags & version::STARTED != 0);
        if let Some(id) = versions.deleted().iter().find(|id| is_started(**id)) {
            return Some(*id);
        }
        let is_ready = |id: u64| {
            let is_deleted = item(id).is_some_and(|item| item.is_deleted());
            is_deleted && versions.child_count(id) == 1 && !open.contains(&id)
        };
        let mut rest = versions.deleted().iter().copied();
        let is_end = |id: u64| {
            let parent = item(id).map_or(0, |item| item.parent);
            versions.child_count(id) == 0 && !open.contains(&id) && !is_ready(parent)
        };
        rest.clone().find(|id| is_ready(*id)).or_else(|| rest.find(|id| is_end(*id)))
    }

    /// A step of group `txg`, after its dead lists were written to `tree`. Returns the tree after
    /// it.
    #[inline(never)]
    pub(super) fn destroy_some(
        &self,
        sink: &GroupSink<'_>,
        tree: Tree,
        out: &mut GivenUp,
    ) -> Result<Tree> {
        let mut tree = tree;
        let before = out.work();
        while out.work() - before < REFS_PER_GROUP
            && out.steps < STEPS_PER_GROUP
            && !self.destroying_failed.load(Ordering::Relaxed)
        {
            let Some(id) = self.next_to_destroy() else { break };
            let mut edits = dead::Edits::new();
            let mut given_up = GivenUp::default();
            let children = self.versions.read().children(id);
            let step = match children[..] {
                [] => self.end_step(sink, &tree, id, &mut given_up, &mut edits),
                [child] => self.middle_step(sink, &tree, (id, child), &mut given_up, &mut edits),
                _ => break,
            };
            let step = match step {
                Ok(step) => step,
                // Something of it cannot be read. It stays, and the pool goes on.
                Err(error) if error.is_damage() || error == Error::Memory => {
                    self.destroying_failed.store(true, Ordering::Relaxed);
                    let incident = Incident::DeletionStopped { tree: TreeId(id), error };
                    self.store.platform.report.incident(&incident);
                    break;
                }
                Err(error) => return Err(error),
            };
            tree = tree.apply(sink, &dead::batch(edits))?;
            self.take_step(sink, &tree, step)?;
            out.data.append(&mut given_up.data);
            out.nodes.append(&mut given_up.nodes);
            out.moved += given_up.moved;
            out.steps += 1;
        }
        Ok(tree)
    }

    /// A step for a version from which none goes on.
    #[inline(never)]
    fn end_step(
        &self,
        source: &dyn NodeSource,
        tree: &Tree,
        id: u64,
        out: &mut GivenUp,
        edits: &mut dead::Edits,
    ) -> Result<Step> {
        let mut item = self.versions.read().need(id)?.item;
        item.flags |= version::STARTED;
        if item.cursor != TREE_GONE {
            let root = item.root(Txg(u64::MAX)).map_err(|bad| bad.in_item(TreeId::POOL, id))?;
            let own = Tree { id: item.lineage(TreeId(id)), root };
            let since = Txg(item.snapshot_txg);
            let from = Key::peek(&item.cursor);
            let mut taker = Taker { source, tree: &own, since, out };
            let next = own.walk_fresh(source, since, from, &mut taker)?;
            item.cursor = TREE_GONE;
            if let Some(key) = next {
                key.encode(&mut item.cursor);
            }
            return Ok(Step::Goes(id, item));
        }
        let mut taken = Vec::new();
        let list = item.dead_list(id);
        let is_all = dead::take(source, tree, list, Txg(0), REFS_PER_GROUP, &mut taken, edits)?;
        item.dead_entries = item.dead_entries.saturating_sub(taken.len() as u64);
        out.moved += taken.len();
        Ok(if is_all { Step::Gone(id) } else { Step::Goes(id, item) })
    }

    /// A step for a version from which one goes on.
    #[inline(never)]
    fn middle_step(
        &self,
        source: &dyn NodeSource,
        tree: &Tree,
        (id, child): (u64, u64),
        out: &mut GivenUp,
        edits: &mut dead::Edits,
    ) -> Result<Step> {
        let (mut item, mut next) = {
            let versions = self.versions.read();
            (versions.need(id)?.item, versions.need(child)?.item)
        };
        item.flags |= version::STARTED;
        let since = Txg(item.snapshot_txg);
        let mut taken = Vec::new();
        let list = next.dead_list(child);
        let is_all = dead::take(source, tree, list, since, REFS_PER_GROUP, &mut taken, edits)?;
        let bytes = out.add(&taken);
        next.dead_entries = next.dead_entries.saturating_sub(taken.len() as u64);
        next.dead_own_bytes = next.dead_own_bytes.saturating_sub(bytes);
        item.own_bytes = item.own_bytes.saturating_sub(bytes);
        if !is_all || !taken.is_empty() {
            return Ok(Step::Moves { id, item, child, next });
        }
        if item.dead_entries > next.dead_entries {
            let lists = (item.dead_list(id), next.dead_list(child));
            (next.dead_list, item.dead_list) = lists;
            core::mem::swap(&mut item.dead_entries, &mut next.dead_entries);
        }
        let (from, to) = (item.dead_list(id), next.dead_list(child));
        let is_all = dead::take(source, tree, from, Txg(0), REFS_PER_GROUP, &mut taken, edits)?;
        item.dead_entries = item.dead_entries.saturating_sub(taken.len() as u64);
        next.dead_entries = next.dead_entries.saturating_add(taken.len() as u64);
        out.moved += taken.len();
        dead::append(source, tree, to, taken, edits)?;
        Ok(match is_all {
            true => Step::Joined { id, item, child, next },
            false => Step::Moves { id, item, child, next },
        })
    }

    /// Notes what a step made of the versions. `tree` has its dead lists.
    #[inline(never)]
    fn take_step(&self, source: &dyn NodeSource, tree: &Tree, step: Step) -> Result<()> {
        match step {
            Step::Goes(id, item) => self.versions.write().change(id, |there| *there = item),
            Step::Moves { id, item, child, next } => {
                let mut versions = self.versions.write();
                versions.change(id, |there| *there = item)?;
                versions.change(child, |there| *there = next)
            }
            Step::Gone(id) => {
                self.versions.write().remove(id);
                Ok(())
            }
            Step::Joined { id, item, child, mut next } => {
                // N goes on from P now, and what goes on from N has P for its parent's parent.
                let parent = Txg(item.snapshot_txg);
                let above = self.versions.read().parent_txg(item.parent);
                next.dead_own_bytes = match item.parent {
                    0 => 0,
                    _ => dead::sum(source, tree, next.dead_list(child), above, parent)?,
                };
                next.own_bytes = next.own_bytes.saturating_add(item.own_bytes);
                (next.parent, next.snapshot_txg) = (item.parent, item.snapshot_txg);
                // The list of N may have had S's id for its own.
                let grown = self.versions.read().children(child);
                for id in grown {
                    let mut after = self.versions.read().need(id)?.item;
                    let until = Txg(after.snapshot_txg);
                    let list = after.dead_list(id);
                    after.dead_own_bytes = dead::sum(source, tree, list, parent, until)?;
                    self.versions.write().change(id, |there| *there = after)?;
                }
                let mut versions = self.versions.write();
                versions.change(child, |there| *there = next)?;
                versions.remove(id);
                Ok(())
            }
        }
    }
}

/// What a step comes to.
enum Step {
    /// More is left of a version.
    Goes(u64, SubvolItem),
    /// Nothing is left of it.
    Gone(u64),
    /// Entries moved from one list to another.
    Moves { id: u64, item: SubvolItem, child: u64, next: SubvolItem },
    /// All have.
    Joined { id: u64, item: SubvolItem, child: u64, next: SubvolItem },
}

/// Gives up the own nodes of a tree and the own references in them.
struct Taker<'a> {
    source: &'a dyn NodeSource,
    tree: &'a Tree,
    since: Txg,
    out: &'a mut GivenUp,
}

impl FreshVisitor for Taker<'_> {
    fn node(&mut self, ptr: &BlockPtr, node: &Arc<Node>) -> Result<()> {
        self.out.nodes.push(Run { addr: ptr.addr, bytes: ptr.allocated() });
        if node.level() > 0 {
            return Ok(());
        }
        for index in 0..node.count() {
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
        Ok(())
    }

    fn is_enough(&self) -> bool {
        self.out.work() >= REFS_PER_GROUP
    }
}
