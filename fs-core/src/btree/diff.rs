//! What differs between two trees.
//!
//! Two states of one tree share every node that no batch between them touched, so a comparison need
//! only look where pointers differ. Each side stands before an *element*: an entry of an interior
//! node, which stands for the subtree below it, or an item of a leaf. The keys of the two elements
//! decide what happens:
//!
//! | keys | elements | step |
//! | --- | --- | --- |
//! | equal | two entries with one pointer | both sides pass over the subtree |
//! | equal | entries of one level, or of two | go down where the level is higher, or on both sides |
//! | equal | two items | they differ if their values do |
//! | one is less | an entry | go down there |
//! | one is less | an item | it is in that tree only |
//!
//! Why nothing shared is missed: one node has one first key, so two entries with one pointer have
//! equal keys; and a side goes down past the level of such an entry only when its key is less, so
//! in a subtree that begins before the shared one and cannot be it.
//!
//! The cost is that of the nodes on the paths to what changed, on both sides. Memory is one path of
//! each tree.

use super::node::Value;
use super::{NodeSource, Place, Tree};
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use alloc::vec::Vec;
use core::cmp::Ordering;

/// An item that differs between two trees: in one of them only, or with two values.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The item's key.
    pub key: Key,
    /// What it is in the old tree.
    pub old: Option<Value>,
    /// What it is in the new tree.
    pub new: Option<Value>,
}

/// The items that differ between two trees, ascending by key.
///
/// After an error the comparison stands where it stood.
pub struct Differences {
    old: Side,
    new: Side,
    /// Items below this are of no interest.
    from: Key,
}

/// What a side stands before.
#[derive(Clone, Copy)]
struct Element {
    key: Key,
    /// Level of the node the element stands in: zero for an item.
    level: u8,
}

/// A way into one of the trees.
struct Side {
    tree: Tree,
    started: bool,
    /// Nodes from the root down, each with the element that is next. Empty at the end.
    path: Vec<(Place, usize)>,
}

impl Tree {
    /// What differs in `new`, from the key `from` on.
    pub fn differences(&self, new: &Tree, from: Key) -> Differences {
        Differences { old: Side::new(*self), new: Side::new(*new), from }
    }
}

impl Differences {
    /// The next item that differs.
    ///
    /// # Errors
    /// What loading a node gives, and [`crate::error::Error::Corrupt`].
    pub fn next(&mut self, source: &dyn NodeSource) -> Result<Option<Difference>> {
        if !self.old.started && self.old.tree.root == self.new.tree.root {
            return Ok(None);
        }
        self.old.start(source, &self.from)?;
        self.new.start(source, &self.from)?;
        loop {
            let order = match (self.old.element(), self.new.element()) {
                (None, None) => return Ok(None),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(old), Some(new)) => old.key.cmp(&new.key),
            };
            let found = match order {
                Ordering::Less => self
                    .old
                    .step(source, &self.from)?
                    .map(|(key, value)| Difference { key, old: Some(value), new: None }),
                Ordering::Greater => self
                    .new
                    .step(source, &self.from)?
                    .map(|(key, value)| Difference { key, old: None, new: Some(value) }),
                Ordering::Equal => self.step_both(source)?,
            };
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// One step where both sides stand before the same key.
    fn step_both(&mut self, source: &dyn NodeSource) -> Result<Option<Difference>> {
        let level = |side: &Side| side.element().map_or(0, |element| element.level);
        let (old, new) = (level(&self.old), level(&self.new));
        if old == 0 && new == 0 {
            let (key, old) = self.old.take_item();
            let (_, new) = self.new.take_item();
            let differs = *old != *new;
            return Ok(differs.then_some(Difference { key, old: Some(old), new: Some(new) }));
        }
        if old == new && self.old.pointer() == self.new.pointer() {
            self.old.pass();
            self.new.pass();
            return Ok(None);
        }
        if old >= new {
            self.old.go_down(source, &self.from)?;
        }
        // When this fails after the other side went down, the levels differ, and the next call
        // goes down here alone.
        if new >= old {
            self.new.go_down(source, &self.from)?;
        }
        Ok(None)
    }
}

impl Side {
    fn new(tree: Tree) -> Side {
        Side { tree, started: false, path: Vec::new() }
    }

    fn start(&mut self, source: &dyn NodeSource, from: &Key) -> Result<()> {
        if !self.started {
            if let Some(root) = self.tree.load_root(source)? {
                self.enter(root, from);
            }
            self.started = true;
        }
        Ok(())
    }

    fn element(&self) -> Option<Element> {
        let (place, index) = self.path.last()?;
        Some(Element { key: place.node.key(*index), level: place.node.level() })
    }

    /// The pointer of the entry the side stands before.
    fn pointer(&self) -> Option<BlockPtr> {
        let (place, index) = self.path.last()?;
        Some(place.node.child(*index))
    }

    /// Past an item, which is returned, or down into a subtree.
    fn step(&mut self, source: &dyn NodeSource, from: &Key) -> Result<Option<(Key, Value)>> {
        match self.element() {
            Some(Element { level: 0, .. }) => Ok(Some(self.take_item())),
            Some(_) => self.go_down(source, from).map(|()| None),
            None => Ok(None),
        }
    }

    /// The item the side stands before; the side moves past it.
    fn take_item(&mut self) -> (Key, Value) {
        let (place, index) = self.path.last().expect("a side that stands before an item");
        let item = (place.node.key(*index), Value::of(&place.node, *index));
        self.pass();
        item
    }

    /// Moves past the element.
    fn pass(&mut self) {
        if let Some((_, index)) = self.path.last_mut() {
            *index += 1;
        }
        self.leave_finished();
    }

    /// Goes into the subtree the side stands before. The entry is passed with its subtree.
    fn go_down(&mut self, source: &dyn NodeSource, from: &Key) -> Result<()> {
        let (place, index) = self.path.last_mut().expect("a side that stands before an entry");
        let child = place.load_child(source, *index)?;
        *index += 1;
        self.enter(child, from);
        Ok(())
    }

    fn enter(&mut self, place: Place, from: &Key) {
        let index = match place.node.level() {
            0 => place.node.search(from).unwrap_or_else(|after| after),
            _ => place.node.slot_of(from),
        };
        self.path.push((place, index));
        self.leave_finished();
    }

    fn leave_finished(&mut self) {
        while self.path.last().is_some_and(|(place, index)| *index == place.node.count()) {
            self.path.pop();
        }
    }
}
