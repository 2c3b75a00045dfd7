//! Writing and publishing a group: the steps that `docs/design.md` numbers.

use crate::btree::{Edit, Tree};
use crate::engine::data;
use crate::engine::dead::Lists;
use crate::engine::destroy::GivenUp;
use crate::engine::nodes::GroupSink;
use crate::engine::references;
use crate::engine::versions::Comings;
use crate::engine::{Engine, Roots};
use crate::error::Error;
use crate::format::chunk::{ChunkHeader, ChunkKind, StripeItem, STRIPES_MAX};
use crate::format::dead::DeadRef;
use crate::format::features;
use crate::format::key::Key;
use crate::format::pool::SubvolItem;
use crate::format::ptr::BlockPtr;
use crate::format::space::{Residue, ResidueHeader, ResidueItem, Run};
use crate::format::superblock::{LogStart, Superblock};
use crate::subvol::extents::{resolve, Resolved};
use crate::subvol::inode::{Inode, INODE_BYTES};
use crate::subvol::store::View;
use crate::subvol::store::{GroupDebts, Result};
use crate::subvol::{DataDelta, Subvol};
use crate::sync::MutexGuard;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::Ordering;

/// State of the one committer.
pub struct Committer {
    /// Roots of the published group.
    pub roots: Roots,
    /// The superblock that published it.
    pub superblock: Box<Superblock>,
    /// Items of the pool tree to write with the next group.
    pub pool_edits: Vec<(Key, Edit)>,
    /// What the group that is being written makes of subvolumes in memory.
    pub(super) comings: Comings,
    /// Views that readers may still hold, oldest first.
    views: Vec<Weak<View>>,
}

impl Committer {
    /// The committer of a pool whose newest superblock is `superblock`.
    pub fn new(superblock: Box<Superblock>) -> Committer {
        let tree = |id, root| Tree { id, root };
        let roots = Roots {
            pool: tree(TreeId::POOL, superblock.pool_root),
            chunk: tree(TreeId::CHUNK, superblock.chunk_root),
            refs: tree(TreeId::REFS, superblock.refs_root),
            dead: tree(TreeId::DEAD, superblock.dead_root),
            residue: superblock.residue,
        };
        Committer {
            roots,
            superblock,
            pool_edits: Vec::new(),
            comings: Comings::default(),
            views: Vec::new(),
        }
    }
}

/// Being the committer, for as long as it is held.
pub(super) struct Turn<'a> {
    engine: &'a Engine,
    /// Gone only while the turn is dropped.
    committer: Option<MutexGuard<'a, Committer>>,
}

impl Deref for Turn<'_> {
    type Target = Committer;

    fn deref(&self) -> &Committer {
        self.committer.as_ref().expect("the lock is held until the turn is dropped")
    }
}

impl DerefMut for Turn<'_> {
    fn deref_mut(&mut self) -> &mut Committer {
        self.committer.as_mut().expect("the lock is held until the turn is dropped")
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.committer = None;
        // Who found the lock taken waits on the signal, not on the lock, and looks again.
        self.engine.store.groups.notify();
    }
}

/// A subvolume's part of a written group.
struct WrittenSubvol {
    subvol: Arc<Subvol>,
    tree: Tree,
    /// Inodes with their sums after the group.
    inodes: Vec<(Arc<Inode>, u64, u64)>,
}

/// What is to be written of a group after its subvolumes.
struct Parts {
    debts: GroupDebts,
    pool_edits: Vec<(Key, Edit)>,
    dead: Tree,
    /// What deletions gave up.
    given_up: GivenUp,
    /// Nodes of subvolumes that are free.
    dead_nodes: Vec<Run>,
}

/// What a group did to a subvolume.
struct SubvolChange {
    data: DataDelta,
    /// Bytes of nodes written, less those replaced.
    tree_bytes: i64,
    /// Nodes of its own that were replaced.
    nodes: Vec<Run>,
    /// References and nodes that it dropped and its parent has.
    dead: Vec<DeadRef>,
}

impl SubvolChange {
    /// Brings the counts of the item up to date. Entries of its dead list that were born after
    /// `since` are summed up.
    fn count(&self, item: &mut SubvolItem, since: Txg) {
        let sum = |since: Txg| {
            let young = self.dead.iter().filter(|entry| entry.birth > since);
            young.fold(0, |sum: u64, entry| sum.saturating_add(entry.run.bytes))
        };
        let (dead, dead_own) = (sum(Txg(0)), sum(since));
        item.tree_bytes = item.tree_bytes.saturating_add_signed(self.tree_bytes);
        // What went to the dead list was not its own.
        let own = self.data.stored.saturating_add(self.tree_bytes).saturating_add_unsigned(dead);
        item.own_bytes = item.own_bytes.saturating_add_signed(own);
        item.dead_entries = item.dead_entries.saturating_add(self.dead.len() as u64);
        item.dead_own_bytes = item.dead_own_bytes.saturating_add(dead_own);
    }
}

/// A group that is on the devices, but for its superblock.
struct Written {
    roots: Roots,
    space_tree: Tree,
    residue: Residue,
    subvols: Vec<WrittenSubvol>,
    dead_nodes: Vec<Run>,
    comings: Comings,
    /// Subvolumes that the group brings.
    fresh: Vec<Arc<Subvol>>,
    /// Where replay begins.
    log: Option<LogStart>,
}

impl Engine {
    /// Waits until nobody else is the committer.
    pub(super) fn committer(&self) -> Turn<'_> {
        Turn { engine: self, committer: Some(self.committer.lock()) }
    }

    /// Becomes the committer unless somebody is.
    pub(super) fn try_committer(&self) -> Option<Turn<'_>> {
        let committer = self.committer.try_lock()?;
        Some(Turn { engine: self, committer: Some(committer) })
    }

    /// Closes the open group, writes it and publishes it. `clean` when nothing is left to do after
    /// it.
    pub(super) fn commit_group(&self, committer: &mut Committer, clean: bool) -> Result<()> {
        if self.store.has_failed() {
            return Err(Error::Failed);
        }
        self.wanted.store(false, Ordering::Relaxed);
        let txg = self.store.groups.close();
        let result = self.write_group(committer, txg).and_then(|written| {
            let superblock = self.superblock_for(committer, txg, &written, clean)?;
            self.store.pool.flush()?;
            self.still_trusted()?;
            self.store.pool.write_superblock(&superblock)?;
            self.store.pool.flush()?;
            Ok((written, superblock))
        });
        match result {
            Ok((written, superblock)) => {
                self.publish(committer, txg, written, superblock);
                Ok(())
            }
            Err(error) => {
                self.fail(txg, &error);
                Err(Error::Failed)
            }
        }
    }

    /// Nothing is published after a shutdown or an error elsewhere.
    fn still_trusted(&self) -> Result<()> {
        if self.store.has_failed() {
            return Err(Error::Failed);
        }
        Ok(())
    }

    #[inline(never)]
    fn write_group(&self, committer: &mut Committer, txg: Txg) -> Result<Box<Written>> {
        let subvols: Vec<(Arc<Subvol>, Vec<Arc<Inode>>)> = self
            .subvols()
            .into_iter()
            .map(|subvol| {
                let dirty = capture(&subvol, txg);
                (subvol, dirty)
            })
            .collect();
        self.write_data(&subvols, txg)?;
        let sink = Box::new(GroupSink::new(&self.store, txg));
        let (parts, written) = self.write_subvols(committer, &sink, txg, subvols)?;
        self.write_pool_trees(committer, &sink, txg, parts, written)
    }

    /// Writes the trees of subvolumes, and what was asked for versions. Apart from what comes after
    /// it, so that both have more of a kernel's stack.
    #[inline(never)]
    fn write_subvols(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
        subvols: Vec<(Arc<Subvol>, Vec<Arc<Inode>>)>,
    ) -> Result<(Box<Parts>, Vec<WrittenSubvol>)> {
        let mut debts = GroupDebts::default();
        let mut written = Vec::new();
        let mut dead_nodes = Vec::new();
        let mut lists = Lists::new(sink, committer.roots.dead);
        let counts = committer.superblock.features[2] & features::VERSIONS != 0;
        for (subvol, dirty) in subvols {
            if dirty.is_empty() && subvol.overlay(txg).is_empty() {
                continue;
            }
            let (part, change) = write_subvol(sink, subvol, dirty, txg, &mut debts)?;
            let list = self.note_change(&part, &change, txg, counts)?;
            lists.append(list, change.dead)?;
            dead_nodes.extend(change.nodes);
            written.push(part);
        }
        self.carry_out(committer, sink, txg)?;
        if committer.comings.fresh.iter().any(|id| self.subvol(TreeId(*id)).is_some()) {
            // Rolled back: see `scrub`.
            self.restart_scrub();
        }
        let (dead, given_up) = self.destroy_some(sink, &committer.roots, &mut lists, txg)?;
        let mut pool_edits = self.take_pool_edits(committer)?;
        // Resolving may have met what operations noted; theirs come on top.
        let GroupDebts { mut garbage, mut shared } = self.store.take_debts(txg);
        debts.garbage.append(&mut garbage);
        debts.shared.append(&mut shared);
        if let Some(edit) = self.take_scrub_edit(txg, &debts.shared) {
            committer.superblock.features[0] |= features::SCRUB;
            let at = pool_edits.partition_point(|(key, _)| *key < edit.0);
            pool_edits.insert(at, edit);
        }
        if let Some(edit) = self.take_device_change_edit() {
            committer.superblock.features[0] |= features::DEVICE_CHANGE;
            let at = pool_edits.partition_point(|(key, _)| *key < edit.0);
            pool_edits.insert(at, edit);
        }
        Ok((Box::new(Parts { debts, pool_edits, dead, given_up, dead_nodes }), written))
    }

    /// Brings the item of a written subvolume up to date. Returns the id of its dead list.
    #[inline(never)]
    fn note_change(
        &self,
        part: &WrittenSubvol,
        change: &SubvolChange,
        txg: Txg,
        counts: bool,
    ) -> Result<u64> {
        let id = part.subvol.id.0;
        let mut item = part.subvol.item_for(txg, &part.tree, change.data);
        if counts {
            let since = self.versions.read().dead_own_since(&item);
            change.count(&mut item, since);
        }
        self.versions.write().change(id, |there| *there = item)?;
        Ok(item.dead_list(id))
    }

    /// What the group changes of the pool tree.
    #[inline(never)]
    fn take_pool_edits(&self, committer: &mut Committer) -> Result<Vec<(Key, Edit)>> {
        // A mistake here is better not published.
        self.versions.read().check_touched()?;
        let mut pool_edits = core::mem::take(&mut committer.pool_edits);
        let mut edits = self.versions.write().take_edits();
        pool_edits.append(&mut edits.tree);
        pool_edits.sort_unstable_by_key(|(key, _)| *key);
        for (id, item) in edits.items {
            let is_fresh = committer.comings.fresh.contains(&id);
            if let Some(subvol) = self.subvol(TreeId(id)).filter(|_| !is_fresh) {
                subvol.set_item_fields(item);
            }
        }
        Ok(pool_edits)
    }

    /// Everything of the group that is still bytes in memory goes to the devices.
    #[inline(never)]
    fn write_data(&self, subvols: &[(Arc<Subvol>, Vec<Arc<Inode>>)], txg: Txg) -> Result<()> {
        let mut tasks = Vec::new();
        for (subvol, dirty) in subvols {
            for inode in dirty {
                // Someone may be writing bytes of this group early: what they put counts.
                drop(inode.flushing.lock());
                tasks.extend(data::tasks(subvol, inode, &inode.state.read(), txg, false));
            }
        }
        data::write_tasks(&self.store, tasks)?;
        for run in self.store.take_spare(txg) {
            self.store.space.free(run, txg);
        }
        Ok(())
    }

    #[inline(never)]
    fn write_pool_trees(
        &self,
        committer: &mut Committer,
        sink: &GroupSink<'_>,
        txg: Txg,
        parts: Box<Parts>,
        subvols: Vec<WrittenSubvol>,
    ) -> Result<Box<Written>> {
        let store = &*self.store;
        let comings = core::mem::take(&mut committer.comings);
        let old = &committer.roots;
        let Parts { debts, pool_edits, dead, mut given_up, mut dead_nodes } = *parts;
        let data = core::mem::take(&mut given_up.data);
        let (refs, dead_given_up) = self.settle_references(sink, &old.refs, debts, data, txg)?;
        let pool = old.pool.apply(sink, &pool_edits)?;
        if let Some(residue) = &old.residue {
            store.space.free(residue_run(residue, store.node_bytes), txg);
        }

        let log = self.log.begin(store, txg);
        // What operations reserved has been spent, but for what they promised or overestimated.
        self.take_over_promises(store.take_reserved(txg));
        // From here on chunks may come and go only until their edits are taken.
        store.space.drop_empty(txg, store)?;
        self.ensure_system(&old.chunk, txg)?;
        let space_tree = store.space_view().tree;
        let need = self.space_tree_bytes(&space_tree, txg)?;
        store.space.ensure_free(ChunkKind::Metadata, need, txg, store)?;
        let chunk_edits = store.space.seal_chunks(txg, || store.pool.take_chunk_edits(txg));
        let chunk_edits = to_edits(chunk_edits);
        let chunk = old.chunk.apply(sink, &chunk_edits)?;
        dead_nodes.extend(sink.take_freed().into_iter().map(|(run, _)| run));
        for run in &dead_nodes {
            store.space.free(*run, txg);
        }
        // Last, so that what makes no sense of it is found out.
        given_up.data = dead_given_up;
        self.free_given_up(&given_up, txg);
        dead_nodes.append(&mut given_up.nodes);

        // The cut. What is taken and freed after it goes to the residue.
        let edits = to_edits(store.space.cut(txg, store)?);
        let space_tree = space_tree.apply(sink, &edits)?;
        for (run, _) in sink.take_freed() {
            store.space.free(run, txg);
            dead_nodes.push(run);
        }
        let (ptr, residue) = self.write_residue(sink, txg)?;
        let roots = Roots { pool, chunk, refs, dead, residue: Some(ptr) };
        let fresh = self.fresh_subvolumes(&comings, txg)?;
        Ok(Box::new(Written {
            roots,
            space_tree,
            residue,
            subvols,
            dead_nodes,
            comings,
            fresh,
            log,
        }))
    }

    /// Brings the reference tree up to date and frees what nothing refers to any more. Returns the
    /// tree, and what is free since deletions gave up `given_up`.
    #[inline(never)]
    fn settle_references(
        &self,
        sink: &GroupSink<'_>,
        refs: &Tree,
        debts: GroupDebts,
        given_up: Vec<Run>,
        txg: Txg,
    ) -> Result<(Tree, Vec<Run>)> {
        let GroupDebts { garbage, shared } = debts;
        let settled = references::settle(sink, refs, shared, garbage, given_up)?;
        let refs = refs.apply(sink, &settled.edits)?;
        for run in settled.dead {
            self.store.space.free(run, txg);
        }
        Ok((refs, settled.dead_given_up))
    }

    /// Sets room aside for the chunk tree: if there is any, as much as it may take; but that is an
    /// estimate, and no reason to fail where less is likely to do.
    fn ensure_system(&self, tree: &Tree, txg: Txg) -> Result<()> {
        let (need, space) = (self.chunk_tree_bytes(tree)?, &self.store.space);
        match space.ensure_free(ChunkKind::System, need, txg, &*self.store) {
            Err(Error::NoSpace) if need > CHUNK_TREE_BYTES => {
                space.ensure_free(ChunkKind::System, CHUNK_TREE_BYTES, txg, &*self.store)
            }
            ensured => ensured,
        }
    }

    /// A bound of what writing the chunk tree takes, with some more chunks than are known of now.
    fn chunk_tree_bytes(&self, tree: &Tree) -> Result<u64> {
        let (edits, bytes) = self.store.pool.chunk_edits_bound();
        if edits <= FEW_CHUNK_EDITS {
            return Ok(CHUNK_TREE_BYTES);
        }
        let (edits, bytes) = (edits + FEW_CHUNK_EDITS, bytes + FEW_CHUNK_EDITS * CHUNK_VALUE_MAX);
        let nodes = tree.apply_bound_exact(&*self.store, edits, bytes)?;
        Ok((nodes * self.store.node_bytes as u64).max(CHUNK_TREE_BYTES))
    }

    /// A bound of what writing the space tree takes after the cut.
    fn space_tree_bytes(&self, tree: &Tree, txg: Txg) -> Result<u64> {
        let store = &*self.store;
        let items = store.space.cut_bound(txg);
        let value = crate::format::space::REGION_BYTES as usize / 4096 / 8;
        let nodes = tree.apply_bound_exact(store, items, items * value)?;
        // The residue names nodes taken and nodes freed, and itself. To set more aside would make
        // a commit fail in a pool that is small or nearly full.
        let named = 2 * nodes + RESIDUE_SLACK;
        let residue = ResidueHeader::BYTES as u64 + named * ResidueItem::BYTES as u64;
        Ok(nodes * store.node_bytes as u64 + residue.next_multiple_of(store.node_bytes as u64))
    }

    fn write_residue(&self, sink: &GroupSink<'_>, txg: Txg) -> Result<(BlockPtr, Residue)> {
        let space = &self.store.space;
        // The block's own run is part of what it says: room for two more items. Metadata is
        // allocated in whole nodes, so that holes fit nodes.
        let bytes = space.residue(txg).encoded_bytes() as u64 + 64;
        let want = bytes.next_multiple_of(self.store.node_bytes as u64);
        let run = space.allocate(ChunkKind::Metadata, want, want, txg, &*self.store)?;
        let residue = space.residue(txg);
        let encoded = residue.encode(txg.0);
        assert!(encoded.len() as u64 <= run.bytes, "residue outgrew its block");
        Ok((sink.write_block(run, &encoded)?, residue))
    }

    // What is large when inlined stays out of the frame of `commit_group`.
    #[inline(never)]
    fn superblock_for(
        &self,
        committer: &Committer,
        txg: Txg,
        written: &Written,
        clean: bool,
    ) -> Result<Box<Superblock>> {
        let pool = &self.store.pool;
        let usage = self.store.space.usage();
        let roots = &written.roots;
        let [compat, ro_compat, incompat] = committer.superblock.features;
        Ok(Box::new(Superblock {
            // Pools of several devices were once made without saying so.
            features: [compat, ro_compat, incompat | pool.incompat()],
            txg,
            written: self.store.now().secs,
            clean,
            device_count: pool.place_count(),
            next_chunk: pool.next_chunk(),
            chunk_bytes: pool.chunk_bytes(),
            pool_root: roots.pool.root,
            chunk_root: roots.chunk.root,
            space_root: written.space_tree.root,
            refs_root: roots.refs.root,
            dead_root: roots.dead.root,
            residue: roots.residue,
            log: if clean { None } else { written.log },
            data_used: usage.data.used_bytes,
            metadata_used: usage.metadata.used_bytes + usage.system.used_bytes,
            system_chunks: pool.system_chunks(),
            ..Superblock::clone(&committer.superblock)
        }))
    }

    /// The group is durable: everybody sees it.
    #[inline(never)]
    fn publish(
        &self,
        committer: &mut Committer,
        txg: Txg,
        written: Box<Written>,
        superblock: Box<Superblock>,
    ) {
        let store = &*self.store;
        let mut old_view = None;
        store.space.published(txg, written.residue, || {
            old_view = Some(store.swap_space_view(txg, written.space_tree));
        });
        committer.views.extend(old_view.iter().map(Arc::downgrade));
        drop(old_view);
        let old_view = store.swap_refs_view(txg, written.roots.refs);
        committer.views.push(Arc::downgrade(&old_view));
        drop(old_view);
        store.pool.published(txg);
        committer.roots = written.roots;
        self.note_shapes(&committer.roots);
        self.metadata_used.store(superblock.metadata_used, Ordering::Relaxed);
        committer.superblock = superblock;
        for part in written.subvols {
            let old = part.subvol.published(txg, part.tree);
            committer.views.push(Arc::downgrade(&old));
            drop(old);
            for (inode, stored, promised) in part.inodes {
                settle(&part.subvol, &inode, txg, stored, promised);
            }
        }
        for run in written.dead_nodes {
            store.cache.remove(run.addr);
        }
        self.default_subvol.store(committer.superblock.default_subvol, Ordering::Relaxed);
        self.swap_subvolumes(written.comings, written.fresh);
        store.intents.published(txg);
        self.log.published(txg);
        self.settle_promises();
        store.groups.publish(txg);
        self.release_views(committer, false);
    }

    /// Takes note of how large trees are that others reserve room in. What cannot be read of them
    /// now, though it was just written, is met by who needs it.
    #[inline(never)]
    fn note_shapes(&self, roots: &Roots) {
        let store = &*self.store;
        let _ = store.note_references(store, &roots.refs);
        if let Ok(shape) = roots.pool.shape(store) {
            self.pool_shape.set(shape);
        }
    }

    /// Makes freed space usable that no reader can reach any more, all of it: room is wanted.
    pub(super) fn release(&self) {
        if let Some(mut committer) = self.try_committer() {
            self.release_views(&mut committer, true);
        }
    }

    /// As [`Engine::release`], of what older groups do not need; of all if there is not plenty.
    pub(super) fn release_late(&self) {
        if let Some(mut committer) = self.try_committer() {
            self.release_views(&mut committer, false);
        }
    }

    /// The group of the oldest trees that somebody may still look at.
    pub(super) fn oldest_view(&self) -> Txg {
        let mut committer = self.committer();
        committer.views.retain(|view| view.strong_count() > 0);
        let groups = committer.views.iter().filter_map(|view| Some(view.upgrade()?.txg));
        groups.min().unwrap_or_else(|| self.store.groups.published())
    }

    fn release_views(&self, committer: &mut Committer, all: bool) {
        committer.views.retain(|view| view.strong_count() > 0);
        let oldest = committer.views.iter().filter_map(|view| Some(view.upgrade()?.txg)).min();
        let safe = oldest.unwrap_or_else(|| self.store.groups.published());
        match all {
            true => self.store.space.release(safe),
            false => self.store.space.release_late(safe),
        };
    }

    /// One last group that says there is nothing left to do.
    pub(super) fn commit_clean(&self) -> Result<()> {
        let mut committer = self.committer();
        if committer.superblock.clean && !self.has_changes() {
            return Ok(());
        }
        self.log.retire(&self.store);
        self.commit_group(&mut committer, true)
    }
}

/// Bytes set aside for the nodes of the chunk tree that one group rewrites, at least.
const CHUNK_TREE_BYTES: u64 = 8 * 65536;
/// For so many edits of the chunk tree, that is enough.
const FEW_CHUNK_EDITS: usize = 8;
/// Bytes of the item of a chunk, at most.
const CHUNK_VALUE_MAX: usize = ChunkHeader::BYTES + STRIPES_MAX * StripeItem::BYTES;
/// Runs the residue may name besides nodes: its own block, twice.
const RESIDUE_SLACK: u64 = 4;

/// The run of a residue block: whole nodes, though its pointer says fewer bytes.
fn residue_run(ptr: &BlockPtr, node_bytes: usize) -> Run {
    Run { addr: ptr.addr, bytes: ptr.allocated().next_multiple_of(node_bytes as u64) }
}

fn to_edits(items: Vec<(Key, Option<Vec<u8>>)>) -> Vec<(Key, Edit)> {
    let edit = |value| match value {
        Some(bytes) => Edit::Put(bytes),
        None => Edit::Delete,
    };
    items.into_iter().map(|(key, value)| (key, edit(value))).collect()
}

/// Sets aside what group `txg` made of each inode it changed.
fn capture(subvol: &Subvol, txg: Txg) -> Vec<Arc<Inode>> {
    let mut dirty = subvol.take_dirty(txg);
    dirty.sort_unstable_by_key(|inode| inode.ino);
    for inode in &dirty {
        inode.state.write().capture(txg);
    }
    dirty
}

#[inline(never)]
fn write_subvol(
    sink: &GroupSink<'_>,
    subvol: Arc<Subvol>,
    dirty: Vec<Arc<Inode>>,
    txg: Txg,
    debts: &mut GroupDebts,
) -> Result<(WrittenSubvol, SubvolChange)> {
    let view = subvol.view();
    let since = Txg(subvol.item().snapshot_txg);
    let mut dead = Vec::new();
    let mut edits = subvol.overlay(txg).edits();
    let mut delta = DataDelta::default();
    let mut inodes = Vec::with_capacity(dirty.len());
    for inode in dirty {
        let aside = inode.state.read().aside.clone().filter(|aside| aside.txg == txg);
        let Some(aside) = aside else {
            debug_assert!(false, "inode {} is on the list of {txg} without changes", inode.ino);
            continue;
        };
        let resolved: Resolved = resolve(sink, &view.tree, inode.ino, &aside)?;
        edits.extend(resolved.edits);
        for (run, birth) in resolved.dropped {
            match birth > since {
                true => debts.garbage.push(run),
                false => dead.push(DeadRef { birth, run, is_node: false }),
            }
        }
        debts.shared.extend(resolved.shared);
        delta.add(resolved.delta);
        inodes.push((inode, resolved.stored_bytes, resolved.promised_bytes));
    }
    edits.sort_unstable_by_key(|(key, _)| *key);
    sink.take_written_bytes();
    let tree = view.tree.apply(sink, &edits)?;
    let mut tree_bytes = sink.take_written_bytes() as i64;
    let mut nodes = Vec::new();
    for (run, birth) in sink.take_freed() {
        tree_bytes -= run.bytes as i64;
        match birth > since {
            true => nodes.push(run),
            false => dead.push(DeadRef { birth, run, is_node: true }),
        }
    }
    let change = SubvolChange { data: delta, tree_bytes, nodes, dead };
    Ok((WrittenSubvol { subvol, tree, inodes }, change))
}

fn settle(subvol: &Subvol, inode: &Arc<Inode>, txg: Txg, stored: u64, promised: u64) {
    let mut state = inode.state.write();
    let left = state.aside.as_ref().map_or(0, |aside| aside.ranges.memory());
    state.settle(txg, stored, promised);
    subvol.store.dirty.adjust(left + INODE_BYTES, 0);
    if state.gone && !state.is_dirty() {
        subvol.table.remove(inode.ino);
    }
}
