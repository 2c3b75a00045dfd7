//! Extended attributes of an inode. Callers hold the inode's lock.

use crate::error::{Errno, Error};
use crate::format::dir::name_hash;
use crate::format::inode::{xattr_hint, InodeItem};
use crate::format::key::{kind, Key};
use crate::format::xattr::{self, Xattr, XattrValue};
use crate::subvol::change::Change;
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::units::Ino;
use alloc::vec::Vec;

/// Name of the access ACL.
pub const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
/// Name of the default ACL.
pub const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// The hint bit of an attribute's name.
pub fn hint_of(name: &[u8]) -> u8 {
    match name {
        ACCESS_ACL => xattr_hint::ACCESS_ACL,
        DEFAULT_ACL => xattr_hint::DEFAULT_ACL,
        _ => xattr_hint::OTHER,
    }
}

impl Subvol {
    fn xattr_key(&self, ino: Ino, name: &[u8]) -> Key {
        Key::new(ino.0, kind::XATTR, name_hash(&self.store.hash_secret, name))
    }

    fn xattr_list(&self, change: Option<&Change<'_>>, key: &Key) -> Result<Vec<Xattr>> {
        let Some(value) = self.get_in(change, key)? else { return Ok(Vec::new()) };
        xattr::decode(&value).map_err(|bad| bad.in_item(self.id, key.object))
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn get_xattr(&self, ino: Ino, item: &InodeItem, name: &[u8]) -> Result<Option<Vec<u8>>> {
        if item.xattr_hint & hint_of(name) == 0 {
            return Ok(None);
        }
        let list = self.xattr_list(None, &self.xattr_key(ino, name))?;
        match list.into_iter().find(|x| x.name == name) {
            None => Ok(None),
            Some(Xattr { value: XattrValue::Inline(bytes), .. }) => Ok(Some(bytes)),
            Some(Xattr { value: XattrValue::Parts { id, bytes }, .. }) => {
                self.read_parts(ino, id, bytes as usize).map(Some)
            }
        }
    }

    fn read_parts(&self, ino: Ino, id: u64, bytes: usize) -> Result<Vec<u8>> {
        let bad = |what| Error::BadItem { what, tree: self.id, object: ino.0 };
        let mut value = Vec::new();
        value.try_reserve_exact(bytes).map_err(|_| Error::Memory)?;
        let (from, to) = part_keys(ino, id);
        self.scan(from, to, &mut |_, part| {
            if value.len() + part.len() > bytes {
                return Err(bad("attribute value longer than it says"));
            }
            value.extend_from_slice(part);
            Ok(true)
        })?;
        if value.len() != bytes {
            return Err(bad("attribute value shorter than it says"));
        }
        Ok(value)
    }

    fn delete_parts(&self, change: &mut Change<'_>, ino: Ino, id: u64) -> Result<()> {
        let (from, to) = part_keys(ino, id);
        let mut keys = Vec::new();
        self.scan(from, to, &mut |key, _| {
            keys.push(key);
            Ok(true)
        })?;
        for key in keys {
            change.delete(key);
        }
        Ok(())
    }

    /// Gives an attribute a value, or removes it (`None`). Returns whether it was there.
    ///
    /// # Errors
    /// ENOSPC when too many long names share a hash; errors of the device or the tree. Nothing was
    /// changed then.
    pub fn set_xattr(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<bool> {
        let key = self.xattr_key(ino, name);
        let mut list = self.xattr_list(Some(change), &key)?;
        let old = list.iter().position(|x| x.name == name).map(|at| list.remove(at));
        if value.is_none() && old.is_none() {
            return Ok(false);
        }
        let large = value.is_some_and(|v| v.len() > xattr::INLINE_VALUE_MAX);
        let value_id = item.next_cookie.max(1);
        if let Some(value) = value {
            let stored = if large {
                XattrValue::Parts { id: value_id, bytes: value.len() as u32 }
            } else {
                XattrValue::Inline(value.to_vec())
            };
            list.push(Xattr { name: name.to_vec(), value: stored });
        }
        let bytes = xattr::encode(&list);
        if bytes.len() > xattr::ITEM_BYTES_MAX {
            return Err(Errno::NoSpc.into());
        }
        if let Some(Xattr { value: XattrValue::Parts { id, .. }, .. }) = &old {
            self.delete_parts(change, ino, *id)?;
        }
        if let (true, Some(value)) = (large, value) {
            item.next_cookie = value_id + 1;
            for (index, part) in value.chunks(xattr::PART_BYTES).enumerate() {
                let offset = value_id << 8 | index as u64;
                change.put(Key::new(ino.0, kind::XATTR_PART, offset), part.to_vec());
            }
        }
        if list.is_empty() {
            change.delete(key);
        } else {
            change.put(key, bytes);
        }
        self.update_hint(ino, item, name, value.is_some())?;
        Ok(old.is_some())
    }

    fn update_hint(&self, ino: Ino, item: &mut InodeItem, name: &[u8], there: bool) -> Result<()> {
        let bit = hint_of(name);
        if there {
            item.xattr_hint |= bit;
        } else if bit != xattr_hint::OTHER || !self.has_other_xattrs(ino, name)? {
            item.xattr_hint &= !bit;
        }
        Ok(())
    }

    /// Whether there is an attribute other than ACLs and than the one being removed.
    fn has_other_xattrs(&self, ino: Ino, removed: &[u8]) -> Result<bool> {
        let mut other = false;
        self.each_xattr(ino, &mut |name| {
            other |= hint_of(name) == xattr_hint::OTHER && name != removed;
            !other
        })?;
        Ok(other)
    }

    /// Calls `each` with the name of every attribute until it returns false.
    pub fn each_xattr(&self, ino: Ino, each: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        let from = Key::new(ino.0, kind::XATTR, 0);
        let to = Key::new(ino.0, kind::XATTR, u64::MAX);
        self.scan(from, to, &mut |_, value| {
            let list = xattr::decode(value).map_err(|bad| bad.in_item(self.id, ino.0))?;
            Ok(list.iter().all(|x| each(&x.name)))
        })
    }

    /// Deletes all attributes of an inode that is going away.
    pub fn delete_xattrs(&self, change: &mut Change<'_>, ino: Ino) -> Result<()> {
        let mut keys = Vec::new();
        let from = Key::new(ino.0, kind::XATTR, 0);
        let to = Key::new(ino.0, kind::XATTR_PART, u64::MAX);
        self.scan(from, to, &mut |key, _| {
            keys.push(key);
            Ok(true)
        })?;
        for key in keys {
            change.delete(key);
        }
        Ok(())
    }
}

fn part_keys(ino: Ino, id: u64) -> (Key, Key) {
    (Key::new(ino.0, kind::XATTR_PART, id << 8), Key::new(ino.0, kind::XATTR_PART, id << 8 | 0xff))
}
