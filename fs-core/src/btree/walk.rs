//! Visiting every node, for the checker.

use super::{Node, NodeSource, Place, Tree};
use crate::error::Error;
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What a walk shows of one node.
pub struct Visit<'a> {
    /// The pointer to it, as its parent has it.
    pub ptr: &'a BlockPtr,
    /// The node, or why it cannot be had; what is below such a node is not visited.
    pub node: core::result::Result<&'a Arc<Node>, &'a Error>,
    /// Least key the subtree holds, as its parent has it; `None` for the root.
    pub lower: Option<Key>,
    /// The keys of the subtree end below this; `None` on the right edge.
    pub upper: Option<Key>,
}

/// How a walk goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// Into the node's children.
    Down,
    /// Past them.
    Over,
    /// Not at all.
    Stop,
}

impl Tree {
    /// Shows every node to `visit`, parents before children, by ascending keys. A node that cannot
    /// be loaded, or that does not belong where it stands, is shown as an error and the walk goes
    /// on beside it.
    ///
    /// No node is visited twice: a child must start with the key of its entry, and entries ascend.
    ///
    /// # Errors
    /// None of its own; those of `visit`.
    pub fn walk(
        &self,
        source: &dyn NodeSource,
        visit: &mut dyn FnMut(Visit<'_>) -> Result<Walk>,
    ) -> Result<()> {
        let Some(root) = &self.root else { return Ok(()) };
        // The way down, each with the next child to show.
        let mut path: Vec<(Place, usize)> = Vec::new();
        let loaded = self.load_root(source).map(|root| root.expect("the tree has a root"));
        match show(root, &loaded, None, None, visit)? {
            Walk::Stop => return Ok(()),
            Walk::Over => {}
            Walk::Down => enter(&mut path, loaded),
        }
        while let Some((place, next)) = path.last_mut() {
            if *next == place.node.count() {
                path.pop();
                continue;
            }
            let slot = *next;
            *next += 1;
            let ptr = place.node.child(slot);
            let (lower, upper) = (Some(place.node.key(slot)), place.upper_of(slot));
            let loaded = place.load_child(source, slot);
            match show(&ptr, &loaded, lower, upper, visit)? {
                Walk::Stop => return Ok(()),
                Walk::Over => {}
                Walk::Down => enter(&mut path, loaded),
            }
        }
        Ok(())
    }
}

fn enter(path: &mut Vec<(Place, usize)>, loaded: Result<Place>) {
    match loaded {
        Ok(place) if place.node.level() > 0 => path.push((place, 0)),
        _ => {}
    }
}

fn show(
    ptr: &BlockPtr,
    loaded: &Result<Place>,
    lower: Option<Key>,
    upper: Option<Key>,
    visit: &mut dyn FnMut(Visit<'_>) -> Result<Walk>,
) -> Result<Walk> {
    visit(Visit { ptr, node: loaded.as_ref().map(|place| &place.node), lower, upper })
}
