//! Moving over a range of items.

use super::node::Value;
use super::{NodeSource, Place, Tree};
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use alloc::vec::Vec;

/// A node on the way from the root to the cursor.
struct Step {
    place: Place,
    /// Interior: the child the way goes through. Leaf: the item the cursor stands before.
    index: usize,
}

/// A place between two items of a tree.
///
/// [`next`](Cursor::next) returns the item behind it and moves past it, [`prev`](Cursor::prev)
/// returns the item before it and moves back. After an error the cursor stands where it stood.
pub struct Cursor {
    tree: Tree,
    /// From the root to a leaf; empty before the first use and in an empty tree.
    path: Vec<Step>,
}

/// Leaves read together: as many as one transfer of a disk makes worth while.
const READ_AHEAD_BYTES: usize = 256 << 10;
/// Groups of such leaves that are read before a reader comes to them.
const GROUPS_AHEAD: usize = 4;

/// Which way to go down.
#[derive(Clone, Copy)]
enum Towards<'a> {
    /// Before the first item.
    Start,
    /// Behind the last item.
    End,
    /// Before the first item that is not less.
    Key(&'a Key),
}

impl Cursor {
    pub(super) fn new(tree: Tree) -> Cursor {
        Cursor { tree, path: Vec::new() }
    }

    /// Moves before the first item whose key is at least `key`.
    ///
    /// # Errors
    /// What loading a node gives, and [`crate::error::Error::Corrupt`].
    pub fn seek(&mut self, source: &dyn NodeSource, key: &Key) -> Result<()> {
        self.go(source, Towards::Key(key))
    }

    /// Moves behind the last item.
    ///
    /// # Errors
    /// As [`seek`](Cursor::seek).
    pub fn seek_end(&mut self, source: &dyn NodeSource) -> Result<()> {
        self.go(source, Towards::End)
    }

    /// Moves before the last item whose key is at most `key`, and returns that item. When there is
    /// none, the cursor stands before the first item.
    ///
    /// # Errors
    /// As [`seek`](Cursor::seek).
    pub fn seek_last(
        &mut self,
        source: &dyn NodeSource,
        key: &Key,
    ) -> Result<Option<(Key, Value)>> {
        match key.successor() {
            Some(after) => self.seek(source, &after)?,
            None => self.seek_end(source)?,
        }
        self.prev(source)
    }

    /// The item behind the cursor; the cursor moves past it.
    ///
    /// # Errors
    /// As [`seek`](Cursor::seek).
    pub fn next(&mut self, source: &dyn NodeSource) -> Result<Option<(Key, Value)>> {
        if self.path.is_empty() {
            self.go(source, Towards::Start)?;
        }
        let Some(leaf) = self.path.last() else { return Ok(None) };
        if leaf.index == leaf.place.node.count() && !self.turn(source, Towards::Start)? {
            return Ok(None);
        }
        let leaf = self.path.last_mut().expect("a path that has been walked ends in a leaf");
        let item = item(leaf, leaf.index);
        leaf.index += 1;
        Ok(Some(item))
    }

    /// The item before the cursor; the cursor moves back over it.
    ///
    /// # Errors
    /// As [`seek`](Cursor::seek).
    pub fn prev(&mut self, source: &dyn NodeSource) -> Result<Option<(Key, Value)>> {
        let Some(leaf) = self.path.last() else { return Ok(None) };
        if leaf.index == 0 && !self.turn(source, Towards::End)? {
            return Ok(None);
        }
        let leaf = self.path.last_mut().expect("a path that has been walked ends in a leaf");
        leaf.index -= 1;
        Ok(Some(item(leaf, leaf.index)))
    }

    fn go(&mut self, source: &dyn NodeSource, towards: Towards<'_>) -> Result<()> {
        let mut path = Vec::new();
        if let Some(root) = self.tree.load_root(source)? {
            descend(source, &mut path, root, towards)?;
        }
        self.path = path;
        Ok(())
    }

    /// Goes over to the leaf on the right, before its first item, or on the left, behind its last;
    /// false when there is none.
    fn turn(&mut self, source: &dyn NodeSource, towards: Towards<'_>) -> Result<bool> {
        let forward = matches!(towards, Towards::Start);
        let (_, above) = self.path.split_last().expect("only a path that ends in a leaf turns");
        let fork = above.iter().rposition(|step| match forward {
            true => step.index + 1 < step.place.node.count(),
            false => step.index > 0,
        });
        let Some(fork) = fork else { return Ok(false) };
        let step = &self.path[fork];
        let index = if forward { step.index + 1 } else { step.index - 1 };
        if forward {
            read_ahead(source, &step.place, index);
        }
        let child = step.place.load_child(source, index)?;
        let mut below = Vec::with_capacity(self.path.len() - fork - 1);
        descend(source, &mut below, child, towards)?;
        self.path.truncate(fork + 1);
        self.path[fork].index = index;
        self.path.append(&mut below);
        Ok(true)
    }
}

/// Before going on to the leaf at `index` of a node, has a group of leaves from there on read
/// together. Groups begin at multiples of their size, so that each leaf is asked for once, whether
/// one cursor goes over all of them or, as when a directory is listed, one after another does.
fn read_ahead(source: &dyn NodeSource, above: &Place, index: usize) {
    let group = READ_AHEAD_BYTES / source.node_bytes();
    if above.node.level() != 1 || index % group != 0 {
        return;
    }
    let end = above.node.count().min(index + group);
    let ptrs: Vec<BlockPtr> = (index..end).map(|slot| above.node.child(slot)).collect();
    source.prefetch(above.node.tree(), &ptrs);
}

/// Has the leaves behind the one where `key` is, or would be, read together: those of the rest of
/// its group and of a few groups more. What is in memory already costs no more than finding that
/// out.
///
/// # Errors
/// What loading an interior node gives.
pub(super) fn read_on(tree: &Tree, source: &dyn NodeSource, key: &Key) -> Result<()> {
    let group = (READ_AHEAD_BYTES / source.node_bytes()).max(1);
    let Some(mut place) = above_leaf(tree, source, key)? else { return Ok(()) };
    let mut next = place.node.slot_of(key) + 1;
    let mut left = group - next % group + GROUPS_AHEAD * group;
    loop {
        let end = place.node.count().min(next + left);
        let ptrs: Vec<BlockPtr> = (next..end).map(|slot| place.node.child(slot)).collect();
        source.prefetch(place.node.tree(), &ptrs);
        left -= ptrs.len();
        let Some(upper) = place.upper.filter(|_| left > 0) else { return Ok(()) };
        let Some(behind) = above_leaf(tree, source, &upper)? else { return Ok(()) };
        (place, next) = (behind, 0);
    }
}

/// The parent of the leaf where `key` is, or would be; none when the tree has less than two levels.
pub(super) fn above_leaf(tree: &Tree, source: &dyn NodeSource, key: &Key) -> Result<Option<Place>> {
    let Some(mut place) = tree.load_root(source)? else { return Ok(None) };
    while place.node.level() > 1 {
        place = place.load_child(source, place.node.slot_of(key))?;
    }
    Ok(Some(place).filter(|place| place.node.level() == 1))
}

fn item(leaf: &Step, index: usize) -> (Key, Value) {
    (leaf.place.node.key(index), Value::of(&leaf.place.node, index))
}

/// Appends the way from `place` down to a leaf to `path`.
fn descend(
    source: &dyn NodeSource,
    path: &mut Vec<Step>,
    mut place: Place,
    towards: Towards<'_>,
) -> Result<()> {
    while place.node.level() > 0 {
        let index = match towards {
            Towards::Start => 0,
            Towards::End => place.node.count() - 1,
            Towards::Key(key) => place.node.slot_of(key),
        };
        let child = place.load_child(source, index)?;
        path.push(Step { place, index });
        place = child;
    }
    let index = match towards {
        Towards::Start => 0,
        Towards::End => place.node.count(),
        Towards::Key(key) => place.node.search(key).unwrap_or_else(|index| index),
    };
    path.push(Step { place, index });
    Ok(())
}
