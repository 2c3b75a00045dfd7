//! Taking apart what of a tree was born after a group, in steps.
//!
//! Nodes never change, so a node that is older than a snapshot is part of that snapshot's tree too,
//! with all below it. What is younger is the tree's own. The walk shows the own nodes, children
//! before parents, and can be ended at any item of a leaf; then it says at which key to go on. On
//! the way there it loads only nodes that it has not shown yet: those shown may be gone by then.

use super::{Node, NodeSource, Place, Tree};
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use crate::units::Txg;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Receives the own nodes of a tree.
pub trait FreshVisitor {
    /// A leaf, to be looked at from item `from` on. Returns the item to end the walk at, or the
    /// number of items.
    ///
    /// # Errors
    /// End the walk.
    fn leaf(&mut self, node: &Arc<Node>, from: usize) -> Result<usize>;

    /// A leaf that was looked at to its end, or an interior node after its children.
    ///
    /// # Errors
    /// End the walk.
    fn node(&mut self, ptr: &BlockPtr) -> Result<()>;

    /// Asked after each leaf: whether to end here.
    fn is_enough(&self) -> bool;
}

impl Tree {
    /// Shows the nodes born after group `since` from the key `from` on. Returns the key to go on
    /// at; `None` when that was all.
    ///
    /// # Errors
    /// What loading a node gives; those of the visitor.
    pub fn walk_fresh(
        &self,
        source: &dyn NodeSource,
        since: Txg,
        from: Key,
        visitor: &mut dyn FreshVisitor,
    ) -> Result<Option<Key>> {
        let Some(root) = self.root.filter(|root| root.birth > since) else { return Ok(None) };
        let place = self.load_root(source)?.expect("the tree has a root");
        // Each with its pointer and the next child to show.
        let mut path: Vec<(BlockPtr, Place, usize)> = Vec::new();
        let first = slot_from(&place, &from);
        path.push((root, place, first));
        while let Some((ptr, place, next)) = path.last_mut() {
            let is_leaf = place.node.level() == 0;
            if is_leaf {
                let end = visitor.leaf(&place.node, *next)?;
                if end < place.node.count() {
                    return Ok(Some(place.node.key(end)));
                }
                *next = end;
            }
            if *next >= place.node.count() {
                visitor.node(ptr)?;
                path.pop();
                if is_leaf && visitor.is_enough() {
                    return finish(path, since, visitor);
                }
                continue;
            }
            let slot = *next;
            *next += 1;
            let child = place.node.child(slot);
            if child.birth <= since {
                continue;
            }
            hint(source, &place.node, slot, since);
            let below = place.load_child(source, slot)?;
            let first = slot_from(&below, &from);
            path.push((child, below, first));
        }
        Ok(None)
    }
}

/// How many leaves are read together.
const GROUP: usize = 16;

/// Before the first of a group of leaves is loaded, tells that the others come next.
fn hint(source: &dyn NodeSource, node: &Node, slot: usize, since: Txg) {
    if node.level() != 1 || slot % GROUP != 0 {
        return;
    }
    let children = (slot..node.count().min(slot + GROUP)).map(|slot| node.child(slot));
    let own: Vec<BlockPtr> = children.filter(|child| child.birth > since).collect();
    source.prefetch(node.tree(), &own);
}

/// Where to begin: the child that may hold `from`, or the item from there on.
fn slot_from(place: &Place, from: &Key) -> usize {
    if place.node.count() == 0 || *from < place.node.first_key() {
        return 0;
    }
    match place.node.level() {
        0 => place.node.search(from).unwrap_or_else(|after| after),
        _ => place.node.slot_of(from),
    }
}

/// Ends a walk after a leaf: nodes that have no own children left are shown, and the key of the
/// next child is where to go on.
fn finish(
    mut path: Vec<(BlockPtr, Place, usize)>,
    since: Txg,
    visitor: &mut dyn FreshVisitor,
) -> Result<Option<Key>> {
    while let Some((ptr, place, next)) = path.pop() {
        let rest = next..place.node.count();
        if let Some(slot) = rest.into_iter().find(|slot| place.node.child(*slot).birth > since) {
            return Ok(Some(place.node.key(slot)));
        }
        visitor.node(&ptr)?;
    }
    Ok(None)
}
