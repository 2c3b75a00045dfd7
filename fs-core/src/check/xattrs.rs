//! Extended attributes of one inode.

use super::findings::{rules, Findings};
use super::{push, Spot};
use crate::format::dir::name_hash;
use crate::format::inode::{xattr_hint, InodeItem};
use crate::format::xattr::{Xattr, XattrValue, PART_BYTES};
use crate::platform::Result;
use alloc::format;
use alloc::vec::Vec;

/// The parts of one value as they were met.
struct Parts {
    id: u64,
    count: u64,
    bytes: u64,
    /// A part is missing, too long, or short without being the last.
    is_broken: bool,
    /// The last part met was short: none may follow.
    is_ended: bool,
}

/// What was met of an inode's attributes.
#[derive(Default)]
pub(super) struct Xattrs {
    hint: u8,
    /// Ids and lengths of values in parts.
    values: Vec<(u64, u64)>,
    /// Ascending by id.
    parts: Vec<Parts>,
}

impl Xattrs {
    /// Takes note of an item with all attributes of one hash.
    pub fn item(
        &mut self,
        secret: &[u8; 16],
        hash: u64,
        list: &[Xattr],
        spot: &Spot,
        findings: &mut Findings,
    ) -> Result<()> {
        for xattr in list {
            if name_hash(secret, &xattr.name) != hash {
                findings.add(&rules::XATTR_HASH, spot.clone(), "");
            }
            self.hint |= match xattr.name.as_slice() {
                b"system.posix_acl_access" => xattr_hint::ACCESS_ACL,
                b"system.posix_acl_default" => xattr_hint::DEFAULT_ACL,
                _ => xattr_hint::OTHER,
            };
            if let XattrValue::Parts { id, bytes } = xattr.value {
                push(&mut self.values, (id, u64::from(bytes)))?;
            }
        }
        Ok(())
    }

    /// Takes note of a part. Parts ascend by id and index.
    pub fn part(
        &mut self,
        offset: u64,
        bytes: usize,
        spot: &Spot,
        findings: &mut Findings,
    ) -> Result<()> {
        let (id, index) = (offset >> 8, offset & 0xff);
        if self.parts.last().is_none_or(|parts| parts.id != id) {
            let fresh = Parts { id, count: 0, bytes: 0, is_broken: false, is_ended: false };
            push(&mut self.parts, fresh)?;
        }
        let parts = self.parts.last_mut().expect("there is one, pushed just now or before");
        let is_out_of_line = index != parts.count || parts.is_ended || bytes > PART_BYTES;
        if is_out_of_line && !parts.is_broken {
            parts.is_broken = true;
            let detail = format!("part {index} of value {id}");
            findings.add(&rules::XATTR_PARTS, spot.clone(), detail);
        }
        parts.count += 1;
        parts.bytes += bytes as u64;
        parts.is_ended = bytes < PART_BYTES;
        Ok(())
    }

    /// Compares with the inode, and values with their parts.
    pub fn finish(&mut self, inode: &InodeItem, spot: &Spot, findings: &mut Findings) {
        if self.hint != inode.xattr_hint {
            let detail = format!("{:#05b} instead of {:#05b}", inode.xattr_hint, self.hint);
            findings.add(&rules::XATTR_HINT, spot.clone(), detail);
        }
        let mut report = |detail| findings.add(&rules::XATTR_PARTS, spot.clone(), detail);
        self.values.sort_unstable();
        for pair in self.values.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            report(format!("two attributes have value {}", pair[0].0));
        }
        for (id, bytes) in &self.values {
            if *id >= inode.next_cookie {
                report(format!("value {id} is not below the next, {}", inode.next_cookie));
            }
            match self.parts.binary_search_by_key(id, |parts| parts.id) {
                Ok(index) if self.parts[index].bytes == *bytes => {}
                Ok(index) => {
                    report(format!("value {id} has {} bytes of {bytes}", self.parts[index].bytes));
                }
                Err(_) => report(format!("value {id} of {bytes} bytes has no parts")),
            }
        }
        for parts in &self.parts {
            if self.values.binary_search_by_key(&parts.id, |value| value.0).is_err() {
                report(format!("no attribute has value {}", parts.id));
            }
        }
    }
}
