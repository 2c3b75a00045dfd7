//! Extended attributes.
//!
//! An XATTR item holds all attributes of an inode whose names have one hash (nearly always one).
//! A value that would make the item too long goes to XATTR_PART items, in parts of
//! [`PART_BYTES`]; the attribute then holds the value's id.

use super::{rule, BadBytes, DiskField};
use crate::disk_struct;
use alloc::vec::Vec;

disk_struct! {
    /// Head of one attribute in an XATTR item; the name follows, then the value if it is inline.
    pub struct XattrHeader [16] {
        /// Bytes of the name.
        0x00 name_bytes: u8,
        /// 0: the value follows the name. 1: the value is in parts.
        0x01 place: u8,
        /// Reserved.
        0x02 reserved: u16,
        /// Bytes of the value.
        0x04 value_bytes: u32,
        /// Id of the value when it is in parts, else zero.
        0x08 value_id: u64,
    }
}

/// Longest attribute value, in bytes: what Linux allows.
pub const VALUE_BYTES_MAX: usize = 65536;
/// Longest value kept inline, in bytes.
pub const INLINE_VALUE_MAX: usize = 1024;
/// Bytes of every part but the last.
pub const PART_BYTES: usize = 2048;
/// Longest XATTR item, in bytes: bounds how many names may share a hash.
pub const ITEM_BYTES_MAX: usize = 3800;

/// Where an attribute's value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrValue {
    /// Here.
    Inline(Vec<u8>),
    /// In parts, under this id, so many bytes.
    Parts {
        /// The value's id: XATTR_PART keys are `id << 8 | part`.
        id: u64,
        /// Length of the value.
        bytes: u32,
    },
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name, such as `user.colour`: 1 to 255 bytes, no NUL.
    pub name: Vec<u8>,
    /// Its value.
    pub value: XattrValue,
}

/// Reads all attributes of an XATTR item.
///
/// # Errors
/// The rule that is broken.
pub fn decode(bytes: &[u8]) -> Result<Vec<Xattr>, BadBytes> {
    let mut list: Vec<Xattr> = Vec::new();
    let mut rest = bytes;
    rule(bytes.len() <= ITEM_BYTES_MAX, "attribute item too long")?;
    while !rest.is_empty() {
        rule(rest.len() >= XattrHeader::BYTES, "attribute cut off")?;
        let (head, tail) = rest.split_at(XattrHeader::BYTES);
        let raw = <XattrHeader as DiskField>::get(head);
        rule(raw.reserved == 0, "reserved field of an attribute is not zero")?;
        let name_bytes = raw.name_bytes as usize;
        rule(name_bytes > 0 && tail.len() >= name_bytes, "attribute name cut off")?;
        let (name, tail) = tail.split_at(name_bytes);
        rule(!name.contains(&0), "NUL in an attribute name")?;
        rule(list.iter().all(|x| x.name != name), "attribute name twice")?;
        rule(raw.value_bytes as usize <= VALUE_BYTES_MAX, "attribute value too long")?;
        let (value, tail) = match raw.place {
            0 => {
                rule(raw.value_id == 0, "inline attribute with an id")?;
                rule(tail.len() >= raw.value_bytes as usize, "attribute value cut off")?;
                let (value, tail) = tail.split_at(raw.value_bytes as usize);
                (XattrValue::Inline(value.to_vec()), tail)
            }
            1 => {
                rule(raw.value_id != 0 && raw.value_id <= u64::MAX >> 8, "value id out of range")?;
                rule(raw.value_bytes > 0, "empty attribute value in parts")?;
                (XattrValue::Parts { id: raw.value_id, bytes: raw.value_bytes }, tail)
            }
            _ => return Err(BadBytes("unknown place of an attribute value")),
        };
        list.push(Xattr { name: name.to_vec(), value });
        rest = tail;
    }
    rule(!list.is_empty(), "attribute item without attributes")?;
    Ok(list)
}

/// The attributes as an item's value.
pub fn encode(list: &[Xattr]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for xattr in list {
        let (place, value_bytes, value_id, inline): (u8, u32, u64, &[u8]) = match &xattr.value {
            XattrValue::Inline(value) => (0, value.len() as u32, 0, value),
            XattrValue::Parts { id, bytes } => (1, *bytes, *id, &[]),
        };
        let raw = XattrHeader {
            name_bytes: xattr.name.len() as u8,
            place,
            reserved: 0,
            value_bytes,
            value_id,
        };
        bytes.extend_from_slice(&raw.to_bytes());
        bytes.extend_from_slice(&xattr.name);
        bytes.extend_from_slice(inline);
    }
    bytes
}
