//! Visiting a tree in steps, past what is old and past what cannot be had.

use super::{Node, NodeSource, Place, Tree};
use crate::error::Error;
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::platform::Result;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Is shown a node, or why it cannot be had; says whether to go on.
pub type EachNode<'a> =
    dyn FnMut(&BlockPtr, core::result::Result<&Arc<Node>, &Error>) -> Result<bool> + 'a;

/// Says of a node whether it is passed over, with all below it, and not even loaded. It is told the
/// pointer, and the first key, which is known of all but the root.
pub type PassesOver<'a> = dyn FnMut(&BlockPtr, Option<&Key>) -> Result<bool> + 'a;

impl Tree {
    /// Shows the nodes that may hold keys from `from` on and are not passed over, parents before
    /// children, until `each` has had enough. Returns the key to go on at; `None` when that was
    /// all. Whoever goes on there is shown the nodes on the way down again.
    ///
    /// # Errors
    /// Those of `passes_over` and `each`.
    pub fn patrol(
        &self,
        source: &dyn NodeSource,
        passes_over: &mut PassesOver<'_>,
        from: Key,
        each: &mut EachNode<'_>,
    ) -> Result<Option<Key>> {
        let Some(root) = self.root else { return Ok(None) };
        if passes_over(&root, None)? {
            return Ok(None);
        }
        let loaded = self.load_root(source).map(|root| root.expect("the tree has a root"));
        each(&root, loaded.as_ref().map(|place| &place.node))?;
        // The way down, each with the next child to show.
        let mut path: Vec<(Place, usize)> = Vec::new();
        enter(&mut path, loaded, &from);
        while let Some((place, next)) = path.last_mut() {
            if *next == place.node.count() {
                path.pop();
                continue;
            }
            let slot = *next;
            *next += 1;
            let ptr = place.node.child(slot);
            if passes_over(&ptr, Some(&place.node.key(slot)))? {
                continue;
            }
            let below = place.load_child(source, slot);
            let goes_on = each(&ptr, below.as_ref().map(|place| &place.node))?;
            if !goes_on && ptr.level == 0 {
                return Ok(next_key(path));
            }
            enter(&mut path, below, &from);
        }
        Ok(None)
    }
}

impl Tree {
    /// Whether the tree has this very node where a subtree begins with `key`; with no key, as its
    /// root. Loads the interior nodes above it.
    ///
    /// # Errors
    /// What loading a node gives.
    pub fn has_node(
        &self,
        source: &dyn NodeSource,
        ptr: &BlockPtr,
        key: Option<&Key>,
    ) -> Result<bool> {
        if self.root.as_ref() == Some(ptr) {
            return Ok(true);
        }
        let Some(key) = key else { return Ok(false) };
        let Some(mut place) = self.load_root(source)? else { return Ok(false) };
        while place.node.level() > ptr.level {
            let slot = place.node.slot_of(key);
            if place.node.child(slot) == *ptr {
                return Ok(true);
            }
            place = place.load_child(source, slot)?;
        }
        Ok(false)
    }
}

fn enter(path: &mut Vec<(Place, usize)>, below: Result<Place>, from: &Key) {
    let Ok(place) = below else { return };
    if place.node.level() == 0 {
        return;
    }
    let first = if *from < place.node.first_key() { 0 } else { place.node.slot_of(from) };
    path.push((place, first));
}

/// The first key of what was not shown yet.
fn next_key(mut path: Vec<(Place, usize)>) -> Option<Key> {
    while let Some((place, next)) = path.pop() {
        if next < place.node.count() {
            return Some(place.node.key(next));
        }
    }
    None
}
