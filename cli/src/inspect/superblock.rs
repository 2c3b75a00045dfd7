//! `cairn inspect superblock`.

use super::describe::{self, pointer};
use crate::output;
use crate::target::open_to_look;
use crate::{Done, Failure};
use cairn_host::say;
use cairn_host::stored::{self, Area};
use fs_core::format::chunk::{Chunk, ChunkHeader, StripeItem};
use fs_core::format::label::Label;
use fs_core::format::superblock::{Superblock, SuperblockRaw};
use serde_json::{json, Map, Value};
use std::path::{Path, PathBuf};

pub(super) fn run(device: &Path, all: bool, as_json: bool) -> Result<Done, Failure> {
    let devices = open_to_look(&[PathBuf::from(device)])?;
    let areas = stored::read_areas(&*devices[0]);
    let newest = stored::newest_superblock(&areas);
    let report = json!({
        "areas": areas.iter().map(|a| area(a, all)).collect::<Vec<_>>(),
        "newest": newest.map(superblock),
    });
    if as_json {
        output::json(&report);
    } else {
        print(&report);
    }
    if newest.is_none() {
        return Err(Failure::new(format_args!("{}: no valid superblock", device.display())));
    }
    let damaged = areas.len() < 2 || areas.iter().any(|area| area.label.is_err());
    Ok(if damaged { Done::Partly } else { Done::Whole })
}

fn area(area: &Area, all: bool) -> Value {
    let label = match &area.label {
        Ok(label) => {
            let mut map = describe::fields(Label::FIELDS, &label.to_bytes());
            map.insert("magic".into(), json!("label"));
            map.insert("name".into(), json!(cairn_host::probe::label_name(label)));
            Value::Object(map)
        }
        Err(error) => json!({ "invalid": error.to_string() }),
    };
    let slots: Vec<Value> = area
        .ring
        .iter()
        .enumerate()
        .filter_map(|(slot, content)| Some((slot, content.as_ref()?)))
        .map(|(slot, content)| match content {
            Ok(found) if all => json!({ "slot": slot, "superblock": superblock(found) }),
            Ok(found) => json!({ "slot": slot, "group": found.txg.0 }),
            Err(error) => json!({ "slot": slot, "invalid": error.to_string() }),
        })
        .collect();
    json!({ "at": area.at.0, "label": label, "ring": slots })
}

/// A superblock that has been checked, with what its raw fields hold inside.
fn superblock(superblock: &Superblock) -> Value {
    let mut map: Map<String, Value> = describe::fields(SuperblockRaw::FIELDS, &superblock.encode());
    // The key of name hashes is nobody's business; the rest is shown in a better way.
    for hidden in ["magic", "hash_secret", "system", "residue"] {
        map.remove(hidden);
    }
    map.insert("residue".into(), json!(superblock.residue.as_ref().map(pointer)));
    let chunks: Vec<Value> = superblock.system_chunks.iter().map(system_chunk).collect();
    map.insert("system_chunks".into(), json!(chunks));
    Value::Object(map)
}

fn system_chunk(chunk: &Chunk) -> Value {
    let bytes = chunk.encode();
    let mut map = describe::fields(ChunkHeader::FIELDS, &bytes);
    map.insert("logical".into(), json!(chunk.logical.0));
    let stripes = bytes[ChunkHeader::BYTES..].chunks(StripeItem::BYTES);
    let stripes: Vec<_> = stripes.map(|s| describe::fields(StripeItem::FIELDS, s)).collect();
    map.insert("stripes".into(), json!(stripes));
    Value::Object(map)
}

fn print(report: &Value) {
    for area in report["areas"].as_array().into_iter().flatten() {
        say!("label area at {}", area["at"]);
        say!("  {}", output::line(&area["label"]));
        for slot in area["ring"].as_array().into_iter().flatten() {
            say!("  {}", output::line(slot));
        }
    }
    if let Some(newest) = report["newest"].as_object() {
        say!("newest superblock");
        for (name, value) in newest {
            say!("  {name:<18}{}", output::line(value));
        }
    }
}
