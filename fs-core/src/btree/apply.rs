//! Applying a sorted batch of edits: the only way a tree changes.
//!
//! ```text
//! down:  root -> ... -> level 1     Plan: which children of which nodes the edits fall into
//! up:    level 0                    each touched leaf: merge its items with its edits
//!        level 1, 2, ... root       each node with changed children: replace their entries
//!        above the root             new levels while there is more than one node; or collapse
//! ```
//!
//! On each level, changed nodes that stand side by side under one parent form a *run*: one row
//! of items, divided anew into nodes. So splitting and joining are the same thing, each node is
//! written once, and a dense cluster of edits leaves dense nodes. A run that has shrunk until it is
//! sparse takes in an unchanged neighbour under the same parent. What a run became is a [`Change`]:
//! the parent's entries `slots` are replaced by the new nodes `fresh`.
//!
//! Only the interior nodes on the way are held in memory, and of the leaves about [`RUN_NODES`] at
//! a time: from longer runs, finished nodes are written while the run goes on.
//!
//! Every old node that a run consumes is freed once, at the moment it enters the run; whatever
//! fails afterwards makes the owner of the sink give up the group, and with it those frees.

use super::node::Node;
use super::pack::{pack, sparse_bytes, Packing};
use super::{Edit, NodeSink, Place, Tree};
use crate::buf::Buf;
use crate::error::Error;
use crate::format::key::Key;
use crate::format::node::{capacity, footprint, set_addr, NodeBuilder, VALUE_BYTES_MAX};
use crate::format::ptr::{BlockPtr, LEVELS_MAX};
use crate::platform::Result;
use crate::units::TreeId;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

/// A run is written in parts when its items would fill this many nodes.
const RUN_NODES: usize = 64;
/// The sink gets nodes in batches of about this many bytes.
const BATCH_BYTES: usize = 8 << 20;

impl Tree {
    /// The tree after `edits`, which must ascend by key without duplicates.
    ///
    /// Nodes without changes are shared with this tree; when nothing changes at all, the result is
    /// this tree and nothing is allocated. Each node that is replaced is freed once. After an error
    /// nodes may have been written and freed: the group must be given up.
    ///
    /// # Errors
    /// [`Error::Argument`] for edits out of order or a value that is too long; [`Error::Corrupt`];
    /// [`Error::Memory`]; what the sink gives.
    pub fn apply(&self, sink: &dyn NodeSink, edits: &[(Key, Edit)]) -> Result<Tree> {
        check_edits(edits)?;
        if edits.is_empty() {
            return Ok(*self);
        }
        let batch = Batch { sink, tree: self.id, edits };
        let root = self.load_root(sink.as_source())?;
        let Some(top) = batch.rebuild(root.as_ref())? else { return Ok(*self) };
        let root = match top {
            Top::Nodes(nodes) => batch.grow(nodes)?,
            Top::Child(ptr) => Some(batch.collapse(ptr)?),
        };
        Ok(Tree { id: self.id, root })
    }
}

fn check_edits(edits: &[(Key, Edit)]) -> Result<()> {
    if !edits.windows(2).all(|pair| pair[0].0 < pair[1].0) {
        return Err(Error::Argument { what: "edits of a tree are out of order" });
    }
    let too_long = |edit: &Edit| matches!(edit, Edit::Put(value) if value.len() > VALUE_BYTES_MAX);
    if edits.iter().any(|(_, edit)| too_long(edit)) {
        return Err(Error::Argument { what: "value too long for an item" });
    }
    Ok(())
}

/// An interior node and those of its children that edits fall into.
struct Parent {
    place: Place,
    touched: Vec<Touch>,
}

struct Touch {
    slot: usize,
    /// Which edits fall into this child; at least one.
    edits: Range<usize>,
}

/// Entries `slots` of a parent give way to the nodes `fresh` of the level below it.
struct Change {
    slots: Range<usize>,
    fresh: Range<usize>,
    /// The items grow at the right edge of the tree.
    append: bool,
}

/// A level after it has been rebuilt.
struct Level {
    /// For each touched parent, in order, the changes to its entries.
    changes: Vec<Vec<Change>>,
    /// The nodes that were written.
    fresh: Fresh,
}

/// What has become of the root.
enum Top {
    /// These nodes, side by side, instead of it: none, one or several.
    Nodes(Siblings),
    /// It would have one child: this one.
    Child(BlockPtr),
}

struct Siblings {
    fresh: Fresh,
    level: u8,
    append: bool,
}

type Fresh = Vec<(Key, BlockPtr)>;

struct Batch<'a> {
    sink: &'a dyn NodeSink,
    tree: TreeId,
    edits: &'a [(Key, Edit)],
}

impl Batch<'_> {
    /// Rebuilds all levels up to that of the root; `None` when the edits change nothing.
    fn rebuild(&self, root: Option<&Place>) -> Result<Option<Top>> {
        let plan = match root {
            Some(root) if root.node.level() > 0 => self.plan(root)?,
            _ => return self.rebuild_root_leaf(root),
        };
        let mut children: &[Parent] = &[];
        let mut below = Level { changes: Vec::new(), fresh: Vec::new() };
        for (level, parents) in plan.iter().rev().enumerate() {
            below = self.rebuild_level(level as u8, parents, children, &below)?;
            children = parents;
        }
        let (Some(root), Some(changes)) = (children.first(), below.changes.first()) else {
            return Ok(None);
        };
        if changes.is_empty() {
            return Ok(None);
        }
        let mut run = Run::new(0, 0);
        run.push_interior(self, &root.place, changes, &below.fresh)?;
        if let [item] = run.items.as_slice() {
            return Ok(Some(Top::Child(run.pointer(item, &below.fresh))));
        }
        self.finish_root(run, root.place.node.level(), &below.fresh).map(Some)
    }

    fn rebuild_root_leaf(&self, root: Option<&Place>) -> Result<Option<Top>> {
        let edits = 0..self.edits.len();
        let node = root.map(|root| &root.node);
        if !self.changes_leaf(node, edits.clone()) {
            return Ok(None);
        }
        let mut run = Run::new(0, 0);
        run.push_leaf(self, node, edits, true)?;
        self.finish_root(run, 0, &[]).map(Some)
    }

    fn finish_root(&self, run: Run, level: u8, below: &[(Key, BlockPtr)]) -> Result<Top> {
        let mut writer = Writer::new(self, level, below);
        let append = run.finish(&mut writer)?.append;
        Ok(Top::Nodes(Siblings { fresh: writer.flush()?, level, append }))
    }

    /// Finds the touched nodes from the root down to level 1, a level each. The touched children on
    /// one level, read from left to right, are the parents on the next.
    fn plan(&self, root: &Place) -> Result<Vec<Vec<Parent>>> {
        let mut parents = Vec::from([self.divide(root.clone(), 0..self.edits.len())]);
        let mut levels = Vec::new();
        for _ in 1..root.node.level() {
            let mut next = Vec::new();
            for parent in &parents {
                self.prefetch(parent);
                for touch in &parent.touched {
                    let child = parent.place.load_child(self.sink.as_source(), touch.slot)?;
                    next.push(self.divide(child, touch.edits.clone()));
                }
            }
            levels.push(core::mem::replace(&mut parents, next));
        }
        levels.push(parents);
        Ok(levels)
    }

    /// Divides edits among the children of a node. What lies before all goes to the first child.
    fn divide(&self, place: Place, edits: Range<usize>) -> Parent {
        let mut touched = Vec::new();
        let mut start = edits.start;
        while start < edits.end {
            let slot = place.node.slot_of(&self.edits[start].0);
            let end = match slot + 1 < place.node.count() {
                true => {
                    let upper = place.node.key(slot + 1);
                    let rest = &self.edits[start..edits.end];
                    start + rest.partition_point(|(key, _)| *key < upper)
                }
                false => edits.end,
            };
            touched.push(Touch { slot, edits: start..end });
            start = end;
        }
        Parent { place, touched }
    }

    fn prefetch(&self, parent: &Parent) {
        if parent.touched.len() > 1 {
            let child = |touch: &Touch| parent.place.node.child(touch.slot);
            let ptrs: Vec<BlockPtr> = parent.touched.iter().map(child).collect();
            self.sink.prefetch(self.tree, &ptrs);
        }
    }

    /// Whether any of `edits` makes a difference to a leaf.
    fn changes_leaf(&self, node: Option<&Arc<Node>>, edits: Range<usize>) -> bool {
        self.edits[edits].iter().any(|(key, edit)| {
            let old = node.and_then(|node| Some(node.value(node.search(key).ok()?)));
            match edit {
                Edit::Put(value) => old != Some(value),
                Edit::Delete => old.is_some(),
            }
        })
    }

    /// Rebuilds the touched nodes of `level`, which are the touched children of `parents`. Above
    /// the leaves, `nodes` are these nodes, and `below` what became of their children.
    fn rebuild_level(
        &self,
        level: u8,
        parents: &[Parent],
        nodes: &[Parent],
        below: &Level,
    ) -> Result<Level> {
        let mut writer = Writer::new(self, level, &below.fresh);
        let mut changes = Vec::with_capacity(parents.len());
        let mut nodes = nodes.iter().zip(&below.changes);
        for parent in parents {
            if level == 0 {
                self.prefetch(parent);
            }
            let mut row = Row::new(&parent.place, &mut writer);
            for touch in &parent.touched {
                if level == 0 {
                    row.rebuild_leaf(touch)?;
                } else {
                    let (node, changes) = nodes.next().expect("one parent for each touched child");
                    row.rebuild_interior(touch.slot, &node.place, changes)?;
                }
            }
            changes.push(row.finish()?);
        }
        Ok(Level { changes, fresh: writer.flush()? })
    }

    /// Puts levels on top until there is one node.
    fn grow(&self, mut top: Siblings) -> Result<Option<BlockPtr>> {
        while top.fresh.len() > 1 {
            let level = top.level + 1;
            if level >= LEVELS_MAX {
                let addr = top.fresh[0].1.addr;
                return Err(Error::Corrupt { what: "tree higher than the format allows", addr });
            }
            let mut run = Run::new(0, 0);
            run.push_fresh(&top.fresh, 0..top.fresh.len())?;
            run.append = top.append;
            let mut writer = Writer::new(self, level, &top.fresh);
            run.finish(&mut writer)?;
            top = Siblings { fresh: writer.flush()?, level, append: top.append };
        }
        Ok(top.fresh.first().map(|(_, ptr)| *ptr))
    }

    /// Takes away levels that have one child.
    fn collapse(&self, mut ptr: BlockPtr) -> Result<BlockPtr> {
        while ptr.level > 0 {
            let tree = Tree { id: self.tree, root: Some(ptr) };
            match tree.load_root(self.sink.as_source())? {
                Some(root) if root.node.count() == 1 => {
                    self.sink.free(self.tree, &ptr);
                    ptr = root.node.child(0);
                }
                _ => break,
            }
        }
        Ok(ptr)
    }
}

/// The touched nodes under one parent, from left to right.
struct Row<'a, 'w> {
    parent: &'a Place,
    writer: &'a mut Writer<'w>,
    run: Option<Run>,
    changes: Vec<Change>,
}

impl<'a, 'w> Row<'a, 'w> {
    fn new(parent: &'a Place, writer: &'a mut Writer<'w>) -> Row<'a, 'w> {
        Row { parent, writer, run: None, changes: Vec::new() }
    }

    fn rebuild_leaf(&mut self, touch: &Touch) -> Result<()> {
        let batch = self.writer.batch;
        let place = self.parent.load_child(batch.sink.as_source(), touch.slot)?;
        if !batch.changes_leaf(Some(&place.node), touch.edits.clone()) {
            return Ok(());
        }
        let mut run = self.run_at(touch.slot)?;
        let rightmost = place.upper.is_none();
        run.push_leaf(batch, Some(&place.node), touch.edits.clone(), rightmost)?;
        self.go_on(run)
    }

    fn rebuild_interior(&mut self, slot: usize, place: &Place, changes: &[Change]) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut run = self.run_at(slot)?;
        run.push_interior(self.writer.batch, place, changes, self.writer.below)?;
        self.go_on(run)
    }

    /// The run that the changed node in `slot` belongs to. A run that ended before it is finished,
    /// unless it is sparse and reaches this node by taking in those between.
    fn run_at(&mut self, slot: usize) -> Result<Run> {
        if let Some(mut run) = self.run.take() {
            self.take_in_right(&mut run, slot)?;
            if run.slots.end == slot {
                return Ok(run);
            }
            self.changes.push(run.finish(self.writer)?);
        }
        Ok(Run::new(slot, self.writer.keys.len()))
    }

    /// Keeps the run open, but writes what is certain when it has become long.
    fn go_on(&mut self, mut run: Run) -> Result<()> {
        run.slots.end += 1;
        if run.bytes > RUN_NODES * self.writer.capacity {
            run.write_front(self.writer)?;
        }
        self.run = Some(run);
        Ok(())
    }

    /// While the run is sparse, adds the unchanged nodes on its right that stand before `limit`.
    fn take_in_right(&mut self, run: &mut Run, limit: usize) -> Result<()> {
        while run.is_sparse(self.writer.capacity) && run.slots.end < limit {
            let place =
                self.parent.load_child(self.writer.batch.sink.as_source(), run.slots.end)?;
            run.push_whole(self.writer.batch, &place.node)?;
            run.slots.end += 1;
        }
        Ok(())
    }

    /// While the run is sparse, adds unchanged nodes on its left.
    fn take_in_left(&mut self, run: &mut Run) -> Result<()> {
        let limit = self.changes.last().map_or(0, |change| change.slots.end);
        while run.is_sparse(self.writer.capacity) && run.slots.start > limit {
            let place =
                self.parent.load_child(self.writer.batch.sink.as_source(), run.slots.start - 1)?;
            run.push_whole(self.writer.batch, &place.node)?;
            run.items.rotate_right(place.node.count());
            run.slots.start -= 1;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Change>> {
        if let Some(mut run) = self.run.take() {
            self.take_in_right(&mut run, self.parent.node.count())?;
            self.take_in_left(&mut run)?;
            self.changes.push(run.finish(self.writer)?);
        }
        Ok(self.changes)
    }
}

/// Where an item of a run comes from.
#[derive(Clone, Copy)]
enum Origin {
    /// An old node of the run, and the index in it.
    Old { node: u32, index: u32 },
    /// An edit.
    Edit(u32),
    /// A new node of the level below.
    Fresh(u32),
}

#[derive(Clone, Copy)]
struct Item {
    key: Key,
    origin: Origin,
    /// What it takes from a node's capacity.
    bytes: u32,
}

/// Neighbouring nodes of one level on their way to becoming other nodes.
struct Run {
    /// Which entries of the parent it replaces.
    slots: Range<usize>,
    /// Number of nodes the level had written when the run began.
    fresh_start: usize,
    items: Vec<Item>,
    /// Old nodes the items point into.
    nodes: Vec<Arc<Node>>,
    /// Sum of the items' bytes.
    bytes: usize,
    /// Bytes of items the old nodes had, without those that have been written.
    old_bytes: usize,
    /// Old nodes that came in, less new ones that have been written.
    old_nodes: usize,
    /// Items that were not there before.
    inserted: usize,
    /// See [`Change::append`].
    append: bool,
}

impl Run {
    fn new(slot: usize, fresh_start: usize) -> Run {
        Run {
            slots: slot..slot,
            fresh_start,
            items: Vec::new(),
            nodes: Vec::new(),
            bytes: 0,
            old_bytes: 0,
            old_nodes: 0,
            inserted: 0,
            append: false,
        }
    }

    fn reserve(&mut self, items: usize) -> Result<()> {
        self.items.try_reserve(items).map_err(|_| Error::Memory)
    }

    fn push(&mut self, key: Key, origin: Origin, bytes: usize) {
        self.items.push(Item { key, origin, bytes: bytes as u32 });
        self.bytes += bytes;
    }

    /// Consumes an old node: from here on it is freed. Its items are added by the caller.
    fn consume(&mut self, batch: &Batch<'_>, node: &Arc<Node>) -> u32 {
        batch.sink.free(batch.tree, node.ptr());
        self.nodes.push(node.clone());
        self.old_nodes += 1;
        self.old_bytes += node.used_bytes();
        (self.nodes.len() - 1) as u32
    }

    fn push_old(&mut self, number: u32, node: &Node, indexes: Range<usize>) {
        for index in indexes {
            let bytes = footprint(node.level(), node.content(index).len());
            let origin = Origin::Old { node: number, index: index as u32 };
            self.push(node.key(index), origin, bytes);
        }
    }

    /// Adds an unchanged node.
    fn push_whole(&mut self, batch: &Batch<'_>, node: &Arc<Node>) -> Result<()> {
        self.reserve(node.count())?;
        let number = self.consume(batch, node);
        self.push_old(number, node, 0..node.count());
        self.append = false;
        Ok(())
    }

    fn push_fresh(&mut self, below: &[(Key, BlockPtr)], which: Range<usize>) -> Result<()> {
        self.reserve(which.len())?;
        for index in which {
            self.push(below[index].0, Origin::Fresh(index as u32), footprint(1, 0));
        }
        Ok(())
    }

    /// Adds a leaf merged with its edits; no leaf when the tree is empty.
    fn push_leaf(
        &mut self,
        batch: &Batch<'_>,
        node: Option<&Arc<Node>>,
        edits: Range<usize>,
        rightmost: bool,
    ) -> Result<()> {
        let Some(node) = node else {
            self.reserve(edits.len())?;
            edits.for_each(|edit| self.push_edit(batch, edit));
            self.append = true;
            return Ok(());
        };
        self.reserve(node.count() + edits.len())?;
        let number = self.consume(batch, node);
        let (mut next, mut appended) = (0, 0);
        for edit in edits {
            let (key, what) = &batch.edits[edit];
            let (found, after) = match node.search(key) {
                Ok(index) => (index, index + 1),
                Err(index) => (index, index),
            };
            self.push_old(number, node, next..found);
            next = after;
            if matches!(what, Edit::Put(_)) {
                self.push_edit(batch, edit);
                self.inserted += usize::from(found == after);
                appended += usize::from(found == node.count());
            }
        }
        self.push_old(number, node, next..node.count());
        // Some of many items put here and there are greater than all that was; that is no growth at
        // the end yet.
        self.append = rightmost && appended > 0 && 2 * appended >= self.inserted;
        Ok(())
    }

    fn push_edit(&mut self, batch: &Batch<'_>, edit: usize) {
        if let (key, Edit::Put(value)) = &batch.edits[edit] {
            self.push(*key, Origin::Edit(edit as u32), footprint(0, value.len()));
        }
    }

    /// Adds an interior node with the entries of its changed children replaced.
    fn push_interior(
        &mut self,
        batch: &Batch<'_>,
        place: &Place,
        changes: &[Change],
        below: &[(Key, BlockPtr)],
    ) -> Result<()> {
        let node = &place.node;
        self.reserve(node.count())?;
        let number = self.consume(batch, node);
        let mut next = 0;
        for change in changes {
            self.push_old(number, node, next..change.slots.start);
            self.push_fresh(below, change.fresh.clone())?;
            next = change.slots.end;
        }
        self.push_old(number, node, next..node.count());
        self.append = place.upper.is_none() && changes.last().is_some_and(|change| change.append);
        Ok(())
    }

    /// Only what shrinks is joined: the right edge of a tree that grows there is sparse after each
    /// split, and joining it would rewrite its full neighbour each time.
    fn is_sparse(&self, capacity: usize) -> bool {
        self.bytes > 0 && self.bytes < sparse_bytes(capacity) && self.bytes < self.old_bytes
    }

    fn sizes(&self) -> impl ExactSizeIterator<Item = usize> + Clone + '_ {
        self.items.iter().map(|item| item.bytes as usize)
    }

    /// Writes the first half of the run. The other half stays, so that the run will not end sparse.
    fn write_front(&mut self, writer: &mut Writer<'_>) -> Result<()> {
        let ends = pack(self.sizes(), writer.capacity, Packing::Even { nodes: self.old_nodes });
        let ends = &ends[..ends.len() / 2];
        self.write_pieces(writer, ends)?;
        let written = ends.last().copied().unwrap_or(0);
        let bytes: usize = self.sizes().take(written).sum();
        self.items.drain(..written);
        self.bytes -= bytes;
        self.old_bytes = self.old_bytes.saturating_sub(bytes);
        self.old_nodes = self.old_nodes.saturating_sub(ends.len());
        self.forget_nodes();
        Ok(())
    }

    /// Lets go of old nodes that no item is left of.
    fn forget_nodes(&mut self) {
        let number = |item: &Item| match item.origin {
            Origin::Old { node, .. } => Some(node),
            _ => None,
        };
        let first = self.items.iter().find_map(number).unwrap_or(self.nodes.len() as u32);
        self.nodes.drain(..first as usize);
        for item in &mut self.items {
            if let Origin::Old { node, .. } = &mut item.origin {
                *node -= first;
            }
        }
    }

    fn finish(self, writer: &mut Writer<'_>) -> Result<Change> {
        let packing = match self.append {
            true => Packing::Append,
            false => Packing::Even { nodes: self.old_nodes },
        };
        let ends = pack(self.sizes(), writer.capacity, packing);
        self.write_pieces(writer, &ends)?;
        let fresh = self.fresh_start..writer.keys.len();
        Ok(Change { slots: self.slots, fresh, append: self.append })
    }

    fn write_pieces(&self, writer: &mut Writer<'_>, ends: &[usize]) -> Result<()> {
        let mut start = 0;
        for end in ends {
            writer.add(self, &self.items[start..*end])?;
            start = *end;
        }
        Ok(())
    }

    /// The pointer that an item of an interior run stands for.
    fn pointer(&self, item: &Item, below: &[(Key, BlockPtr)]) -> BlockPtr {
        match item.origin {
            Origin::Old { node, index } => self.nodes[node as usize].child(index as usize),
            Origin::Fresh(index) => below[index as usize].1,
            Origin::Edit(_) => unreachable!("edits are items of leaves"),
        }
    }
}

/// Builds the new nodes of one level and hands them to the sink in batches.
struct Writer<'a> {
    batch: &'a Batch<'a>,
    level: u8,
    capacity: usize,
    /// The new nodes of the level below.
    below: &'a [(Key, BlockPtr)],
    /// First keys of all nodes built so far.
    keys: Vec<Key>,
    /// Nodes that have no address yet.
    images: Vec<Buf>,
    /// Pointers to the nodes that have been written.
    written: Vec<BlockPtr>,
}

impl<'a> Writer<'a> {
    fn new(batch: &'a Batch<'a>, level: u8, below: &'a [(Key, BlockPtr)]) -> Writer<'a> {
        Writer {
            batch,
            level,
            capacity: capacity(batch.sink.node_bytes()),
            below,
            keys: Vec::new(),
            images: Vec::new(),
            written: Vec::new(),
        }
    }

    fn add(&mut self, run: &Run, items: &[Item]) -> Result<()> {
        let sink = self.batch.sink;
        let mut image = Buf::zeroed(sink.node_bytes())?;
        let mut builder = NodeBuilder::new(&mut image, self.level);
        for item in items {
            match item.origin {
                Origin::Old { node, index } => {
                    builder.push(&item.key, run.nodes[node as usize].content(index as usize));
                }
                Origin::Edit(edit) => match &self.batch.edits[edit as usize].1 {
                    Edit::Put(value) => builder.push(&item.key, value),
                    Edit::Delete => unreachable!("a deletion adds no item"),
                },
                Origin::Fresh(index) => {
                    builder.push(&item.key, &self.below[index as usize].1.encode());
                }
            }
        }
        builder.finish(self.batch.tree, sink.txg(), sink.pool_id());
        self.keys.push(items[0].key);
        self.images.push(image);
        if self.images.len() * sink.node_bytes() >= BATCH_BYTES {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        if self.images.is_empty() {
            return Ok(());
        }
        let Batch { sink, tree, .. } = *self.batch;
        let addrs = sink.allocate(tree, self.images.len())?;
        assert_eq!(addrs.len(), self.images.len(), "the sink gives one address for each node");
        let mut nodes: Vec<_> = addrs.into_iter().zip(self.images.drain(..)).collect();
        for (addr, image) in &mut nodes {
            set_addr(image, *addr);
        }
        self.written.append(&mut sink.write(tree, self.level, nodes)?);
        assert_eq!(self.written.len(), self.keys.len(), "the sink gives a pointer for each node");
        Ok(())
    }

    fn flush(mut self) -> Result<Fresh> {
        self.write()?;
        Ok(self.keys.into_iter().zip(self.written).collect())
    }
}
