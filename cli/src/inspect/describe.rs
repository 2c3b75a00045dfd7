//! Stored structures as JSON values, from the same tables that the format document is made of.
//!
//! Everything is shown as it is stored, right or wrong; a value that breaks a rule of the format
//! carries the rule under `broken`.

use crate::output::hex;
use fs_core::format::chunk::{Chunk, ChunkHeader, DeviceItem, StripeItem};
use fs_core::format::dir::{decode_cookies, Entry, EntryHeader};
use fs_core::format::extent::{Extent, ExtentHeader};
use fs_core::format::inode::{InodeItem, LinkItem};
use fs_core::format::key::{kind, Key};
use fs_core::format::pool::SubvolItem;
use fs_core::format::ptr::{BlockPtr, BlockPtrRaw};
use fs_core::format::space::{RefItem, SummaryItem};
use fs_core::format::{xattr, BadBytes, FieldDoc};
use fs_core::units::{Logical, Txg};
use serde_json::{json, Map, Value};

/// The fields of a structure; reserved ones and identities of nothing only when they are not zero.
pub(super) fn fields(table: &[FieldDoc], bytes: &[u8]) -> Map<String, Value> {
    let mut map = Map::new();
    for field in table {
        let Some(stored) = bytes.get(field.offset..field.offset + field.bytes) else { break };
        let zero = stored.iter().all(|b| *b == 0);
        if zero && (field.name.starts_with("reserved") || field.kind == "bytes") {
            continue;
        }
        map.insert(field.name.into(), field_value(field, stored));
    }
    map
}

fn field_value(field: &FieldDoc, stored: &[u8]) -> Value {
    let mut wide = [0; 8];
    let signed = field.kind.starts_with('i');
    if field.kind == "bytes" || stored.len() > wide.len() {
        return if field.bytes == BlockPtrRaw::BYTES && field.name.contains("root") {
            Value::Object(fields(BlockPtrRaw::FIELDS, stored))
        } else {
            Value::String(hex(stored))
        };
    }
    wide[..stored.len()].copy_from_slice(stored);
    let value = u64::from_le_bytes(wide);
    match signed {
        // Sign-extend from the field's own width.
        true => {
            let shift = 64 - 8 * stored.len() as u32;
            json!((value << shift) as i64 >> shift)
        }
        false => json!(value),
    }
}

/// A pointer that has been checked.
pub(super) fn pointer(ptr: &BlockPtr) -> Value {
    json!({
        "addr": ptr.addr.0,
        "level": ptr.level,
        "birth": ptr.birth.0,
        "stored": ptr.stored,
        "checksum": hex(&ptr.checksum),
    })
}

/// The name of an item's kind.
pub(super) fn kind_name(number: u8) -> String {
    let row = kind::TABLE.iter().find(|row| row.0 == number);
    row.map_or_else(|| format!("kind {number:#x}"), |row| row.1.to_string())
}

/// An item with its key. `newest` is the group of the node it stands in.
pub(super) fn item(key: Key, value: &[u8], newest: Txg) -> Value {
    let (mut content, rule) = content(key, value, newest);
    if let Err(BadBytes(rule)) = rule {
        content.insert("broken".into(), json!(rule));
    }
    json!({
        "object": key.object,
        "kind": kind_name(key.kind),
        "offset": key.offset,
        "value": content,
    })
}

type Content = (Map<String, Value>, Result<(), BadBytes>);

fn content(key: Key, value: &[u8], newest: Txg) -> Content {
    let plain = |table, rule: Result<(), BadBytes>| (fields(table, value), rule);
    match key.kind {
        kind::INODE => plain(InodeItem::FIELDS, InodeItem::decode(value).map(|_| ())),
        kind::LINK => plain(LinkItem::FIELDS, LinkItem::decode(value).map(|_| ())),
        kind::SUBVOL => plain(SubvolItem::FIELDS, SubvolItem::decode(value).map(|_| ())),
        kind::DEVICE => plain(DeviceItem::FIELDS, DeviceItem::decode(value).map(|_| ())),
        kind::SPACE_SUMMARY => plain(SummaryItem::FIELDS, SummaryItem::decode(value).map(|_| ())),
        kind::REF => {
            plain(RefItem::FIELDS, RefItem::decode(Logical(key.object), value).map(|_| ()))
        }
        kind::CHUNK => chunk(key, value),
        kind::EXTENT => extent(key, value, newest),
        kind::DIR_ENTRY => entry(value),
        kind::DIR_HASH => match decode_cookies(value) {
            Ok(cookies) => one("cookies", json!(cookies)),
            Err(bad) => raw(value, Err(bad)),
        },
        kind::XATTR => attributes(value),
        kind::SYMLINK => one("target", json!(String::from_utf8_lossy(value))),
        kind::SPACE_BITMAP => {
            let used: u32 = value.iter().map(|byte| byte.count_ones()).sum();
            one("used_sectors", json!(used))
        }
        _ => raw(value, Ok(())),
    }
}

fn one(name: &str, value: Value) -> Content {
    (Map::from_iter([(name.to_string(), value)]), Ok(()))
}

fn raw(value: &[u8], rule: Result<(), BadBytes>) -> Content {
    match value {
        [] => (Map::new(), rule),
        bytes => (Map::from_iter([("bytes".to_string(), json!(hex(bytes)))]), rule),
    }
}

fn chunk(key: Key, value: &[u8]) -> Content {
    let mut map = fields(ChunkHeader::FIELDS, value);
    let stripes = value.get(ChunkHeader::BYTES..).unwrap_or(&[]);
    let stripes: Vec<Value> = stripes
        .chunks(StripeItem::BYTES)
        .map(|stripe| Value::Object(fields(StripeItem::FIELDS, stripe)))
        .collect();
    map.insert("stripes".into(), json!(stripes));
    (map, Chunk::decode(Logical(key.object), value).map(|_| ()))
}

fn extent(key: Key, value: &[u8], newest: Txg) -> Content {
    let mut map = fields(ExtentHeader::FIELDS, value);
    let rest = value.len().saturating_sub(ExtentHeader::BYTES);
    map.insert("bytes_that_follow".into(), json!(rest));
    (map, Extent::decode(value, key.offset, newest).map(|_| ()))
}

fn entry(value: &[u8]) -> Content {
    let mut map = fields(EntryHeader::FIELDS, value);
    let name = value.get(EntryHeader::BYTES..).unwrap_or(&[]);
    map.insert("name".into(), json!(String::from_utf8_lossy(name)));
    (map, Entry::decode(value).map(|_| ()))
}

fn attributes(value: &[u8]) -> Content {
    let list = match xattr::decode(value) {
        Ok(list) => list,
        Err(bad) => return raw(value, Err(bad)),
    };
    let attributes: Vec<Value> = list
        .iter()
        .map(|attribute| {
            let name = String::from_utf8_lossy(&attribute.name);
            match &attribute.value {
                xattr::XattrValue::Inline(value) => json!({ "name": name, "value": hex(value) }),
                xattr::XattrValue::Parts { id, bytes } => {
                    json!({ "name": name, "value_id": id, "value_bytes": bytes })
                }
            }
        })
        .collect();
    one("attributes", json!(attributes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_shown_by_the_names_of_its_fields() {
        let mut inode = InodeItem::zeroed();
        (inode.mode, inode.size, inode.mtime) = (0o100644, 5, -7);
        inode.compression_level = -3;
        let shown = item(Key::new(9, kind::INODE, 0), &inode.to_bytes(), Txg(1));
        assert_eq!(shown["kind"], "INODE");
        assert_eq!(shown["value"]["mode"], 0o100644);
        assert_eq!(shown["value"]["mtime"], -7);
        assert_eq!(shown["value"]["compression_level"], -3);
        assert!(shown["value"].get("reserved").is_none());
        assert!(shown["value"].get("broken").is_none());
    }

    #[test]
    fn a_broken_item_is_shown_with_the_rule_it_breaks() {
        let mut inode = InodeItem::zeroed();
        inode.mode = 0o170000;
        let shown = item(Key::new(9, kind::INODE, 0), &inode.to_bytes(), Txg(1));
        assert_eq!(shown["value"]["broken"], "unknown file type");
    }

    #[test]
    fn every_kind_of_item_with_any_bytes_is_shown_without_a_panic() {
        for kind in 0..=u8::MAX {
            for len in [0, 1, 15, 16, 17, 48, 63, 64, 128, 256, 512, 600] {
                for fill in [0, 1, 0xff] {
                    let _ = item(Key::new(1, kind, 0), &vec![fill; len], Txg(1));
                }
            }
        }
    }
}
