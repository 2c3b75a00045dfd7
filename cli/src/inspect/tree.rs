//! `cairn inspect tree` and `cairn inspect inode`.

use super::{describe, tree_name};
use crate::arguments::TreeName;
use crate::view::View;
use crate::{output, Done};
use cairn_host::say;
use fs_core::btree::Walk;
use fs_core::error::Error;
use fs_core::format::key::Key;
use fs_core::platform::Result;
use fs_core::units::TreeId;
use serde_json::{json, Value};

pub(super) fn id_of(name: TreeName, view: &View, subvol: Option<u64>) -> TreeId {
    match name {
        TreeName::Pool => TreeId::POOL,
        TreeName::Chunk => TreeId::CHUNK,
        TreeName::Space => TreeId::SPACE,
        TreeName::Refs => TreeId::REFS,
        TreeName::Dead => TreeId::DEAD,
        TreeName::Subvol => view.subvol_id(subvol),
    }
}

/// Shows items or nodes of a tree.
pub(super) fn run(
    view: &View,
    id: TreeId,
    nodes: bool,
    from: u64,
    limit: usize,
    as_json: bool,
) -> Result<Done> {
    let mut printer = Printer::new(as_json, &tree_name(id));
    let done = if nodes {
        show_nodes(view, id, limit, &mut printer)
    } else {
        show_items(view, id, Key::new(from, 0, 0), |_| true, limit, &mut printer)
    };
    printer.finish();
    done
}

/// Shows every item of one object.
pub(super) fn run_object(view: &View, id: TreeId, object: u64, as_json: bool) -> Result<Done> {
    let mut printer = Printer::new(as_json, &tree_name(id));
    let belongs = |key: &Key| key.object == object;
    let from = Key::new(object, 0, 0);
    show_items(view, id, from, belongs, usize::MAX, &mut printer)?;
    if printer.count == 0 {
        return Err(Error::Argument { what: "there is no such inode" });
    }
    printer.finish();
    Ok(Done::Whole)
}

fn show_items(
    view: &View,
    id: TreeId,
    from: Key,
    belongs: impl Fn(&Key) -> bool,
    limit: usize,
    printer: &mut Printer,
) -> Result<Done> {
    view.each_item(&view.tree(id)?, from, |key, value| {
        if !belongs(&key) || printer.count == limit {
            return Ok(false);
        }
        printer.item(&describe::item(key, &value, value.birth()));
        Ok(true)
    })?;
    Ok(Done::Whole)
}

fn show_nodes(view: &View, id: TreeId, limit: usize, printer: &mut Printer) -> Result<Done> {
    let mut done = Done::Whole;
    view.tree(id)?.walk(view, &mut |visit| {
        if printer.count == limit {
            return Ok(Walk::Stop);
        }
        let mut node = json!({
            "addr": visit.ptr.addr.0,
            "level": visit.ptr.level,
            "birth": visit.ptr.birth.0,
            "places": view.places(visit.ptr.addr, visit.ptr.allocated()),
        });
        match visit.node {
            Ok(found) => {
                node["count"] = json!(found.count());
                node["used_bytes"] = json!(found.used_bytes());
                node["first_key"] = json!(format!("{:?}", found.first_key()));
            }
            Err(error) => {
                node["broken"] = json!(error.to_string());
                done = Done::Partly;
            }
        }
        printer.node(&node);
        Ok(Walk::Down)
    })?;
    Ok(done)
}

/// Prints one thing after another: lines as they come, or one JSON array at the end.
struct Printer {
    tree: String,
    list: Option<Vec<Value>>,
    count: usize,
}

impl Printer {
    fn new(as_json: bool, tree: &str) -> Printer {
        Printer { tree: tree.into(), list: as_json.then(Vec::new), count: 0 }
    }

    fn item(&mut self, item: &Value) {
        self.print(item, |item| {
            let (kind, value) = (output::line(&item["kind"]), output::line(&item["value"]));
            format!("({} {kind} {}) {value}", item["object"], item["offset"])
        });
    }

    fn node(&mut self, node: &Value) {
        self.print(node, output::line);
    }

    fn print(&mut self, value: &Value, text: impl Fn(&Value) -> String) {
        self.count += 1;
        match &mut self.list {
            Some(list) => list.push(value.clone()),
            None => say!("{}", text(value)),
        }
    }

    fn finish(self) {
        if let Some(list) = self.list {
            output::json(&json!({ "tree": self.tree, "list": list }));
        }
    }
}
