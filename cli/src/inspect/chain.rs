//! `cairn inspect chain`: why a file can be believed.
//!
//! From the superblock down, every block's pointer holds the checksum of the block. The chain lists
//! the blocks on the way to the file's inode, each read from the device and verified.

use super::{describe, tree_name};
use crate::output;
use crate::view::View;
use crate::Done;
use cairn_host::say;
use fs_core::btree::NodeSource;
use fs_core::error::Error;
use fs_core::format::key::{kind, Key};
use fs_core::format::ptr::BlockPtr;
use fs_core::platform::Result;
use fs_core::units::TreeId;
use serde_json::{json, Value};

pub(super) fn run(view: &View, subvol: TreeId, ino: u64, as_json: bool) -> Result<Done> {
    let mut steps = vec![json!({
        "block": "superblock",
        "group": view.superblock.txg.0,
        "slot": view.superblock.txg.0 % fs_core::format::label::RING_SLOTS,
    })];
    let way = descend(view, TreeId::POOL, Key::new(subvol.0, kind::SUBVOL, 0), &mut steps)
        .and_then(|()| descend(view, subvol, Key::new(ino, kind::INODE, 0), &mut steps));
    if as_json {
        output::json(&steps);
    } else {
        steps.iter().for_each(|step| say!("{}", output::line(step)));
    }
    // What was good down to the break has been shown.
    way.map(|()| Done::Whole)
}

/// Adds the nodes on the way to `key`, and its item.
fn descend(view: &View, id: TreeId, key: Key, steps: &mut Vec<Value>) -> Result<()> {
    let mut next = view.tree(id)?.root;
    while let Some(ptr) = next {
        let node = view.load(id, &ptr).inspect_err(|error| {
            steps.push(step(view, id, &ptr, json!(error.to_string())));
        })?;
        steps.push(step(view, id, &ptr, json!("verified")));
        if node.level() != ptr.level {
            return Err(Error::Corrupt { what: "node of another level", addr: ptr.addr });
        }
        if node.level() == 0 {
            let found = node.search(&key).map_err(|_| Error::Argument { what: "no such item" })?;
            steps.push(describe::item(key, node.value(found), node.birth()));
            return Ok(());
        }
        next = Some(node.child(node.slot_of(&key)));
    }
    Err(Error::Argument { what: "no such item" })
}

fn step(view: &View, id: TreeId, ptr: &BlockPtr, state: Value) -> Value {
    json!({
        "block": "node",
        "tree": tree_name(id),
        "pointer": describe::pointer(ptr),
        "places": view.places(ptr.addr, ptr.allocated()),
        "state": state,
    })
}
