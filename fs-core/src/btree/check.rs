//! Verifying a whole tree.

use super::{NodeSource, Tree, Walk};
use crate::error::Error;
use crate::format::node::capacity;
use crate::platform::Result;
use alloc::vec::Vec;

/// What a sound tree is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Nodes by level.
    pub nodes: Vec<u64>,
    /// Items in leaves.
    pub items: u64,
    /// Bytes of their capacity that leaves use.
    pub leaf_bytes: u64,
    /// Nodes other than the root that are less than a third full.
    pub sparse: u64,
}

impl Census {
    /// All nodes.
    pub fn node_count(&self) -> u64 {
        self.nodes.iter().sum()
    }
}

/// Visits every node of `tree` and verifies what the module promises of trees.
///
/// # Errors
/// The first node that cannot be had or breaks a rule. Use [`Tree::walk`] to see all of them.
pub fn check(tree: &Tree, source: &dyn NodeSource) -> Result<Census> {
    let mut census = Census::default();
    let Some(root) = tree.root else { return Ok(census) };
    census.nodes.resize(root.level as usize + 1, 0);
    let capacity = capacity(source.node_bytes());
    tree.walk(source, &mut |visit| {
        let node = visit.node.map_err(Clone::clone)?;
        let is_root = visit.lower.is_none();
        if is_root && node.level() > 0 && node.count() < 2 {
            return Err(Error::Corrupt { what: "root with one child", addr: node.addr() });
        }
        census.nodes[node.level() as usize] += 1;
        if node.level() == 0 {
            census.items += node.count() as u64;
            census.leaf_bytes += node.used_bytes() as u64;
        }
        if !is_root && node.used_bytes() < super::pack::sparse_bytes(capacity) {
            census.sparse += 1;
        }
        Ok(Walk::Down)
    })?;
    Ok(census)
}
