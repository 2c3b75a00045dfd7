//! `cairn inspect file`.

use super::describe;
use crate::output;
use crate::view::View;
use crate::Done;
use cairn_host::say;
use fs_core::btree::Tree;
use fs_core::error::Error;
use fs_core::format::extent::Extent;
use fs_core::format::inode::InodeItem;
use fs_core::format::key::{kind, Key};
use fs_core::platform::Result;
use serde_json::{json, Value};

pub(super) fn run(view: &View, tree: &Tree, ino: u64, as_json: bool) -> Result<Done> {
    let value = tree
        .lookup(view, &Key::new(ino, kind::INODE, 0))?
        .ok_or(Error::Argument { what: "there is no such inode" })?;
    let extents = extents(view, tree, ino)?;
    let report = json!({
        "inode": ino,
        "subvol": tree.id.0,
        "attributes": describe::fields(InodeItem::FIELDS, &value),
        "extents": extents,
    });
    if as_json {
        output::json(&report);
    } else {
        say!("inode {ino}: {}", output::line(&report["attributes"]));
        extents.iter().for_each(|extent| say!("{}", output::line(extent)));
    }
    Ok(Done::Whole)
}

fn extents(view: &View, tree: &Tree, ino: u64) -> Result<Vec<Value>> {
    let mut list = Vec::new();
    view.each_item(tree, Key::new(ino, kind::EXTENT, 0), |key, value| {
        if (key.object, key.kind) != (ino, kind::EXTENT) {
            return Ok(false);
        }
        list.push(match Extent::decode(&value, key.offset, value.birth()) {
            Ok((extent, birth)) => extent_row(view, key.offset, &extent, birth.0),
            Err(bad) => json!({ "offset": key.offset, "broken": bad.0 }),
        });
        Ok(true)
    })?;
    Ok(list)
}

fn extent_row(view: &View, offset: u64, extent: &Extent, birth: u64) -> Value {
    let mut row = json!({ "offset": offset, "length": extent.len(), "birth": birth });
    let checksum = |kind: fs_core::format::ptr::ChecksumKind| format!("{kind:?}").to_lowercase();
    match extent {
        Extent::Inline { bytes, .. } => {
            row["kind"] = json!("inline");
            row["stored"] = json!(bytes.len());
        }
        Extent::Plain { addr, len, checksum_kind, .. } => {
            row["kind"] = json!("plain");
            row["addr"] = json!(addr.0);
            row["checksum"] = json!(checksum(*checksum_kind));
            row["places"] = json!(view.places(*addr, *len));
        }
        Extent::Packed { blob, offset, .. } => {
            row["kind"] = json!("packed");
            row["addr"] = json!(blob.addr.0);
            row["stored"] = json!(blob.stored);
            row["expanded"] = json!(blob.logical);
            row["from"] = json!(offset);
            row["checksum"] = json!(checksum(blob.checksum_kind));
            row["places"] = json!(view.places(blob.addr, blob.allocated()));
        }
        Extent::Promised { .. } => row["kind"] = json!("promised"),
    }
    row
}
