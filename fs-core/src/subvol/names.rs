//! Directories: names, their hash items, and which name of a file is its first.
//!
//! Callers hold the directory's lock (exclusively to change it) and, where a name comes or goes,
//! the lock of the inode it stands for. What changes is a *draft*: a copy of the inode's fields,
//! which the operation puts back when nothing can fail any more.

use crate::error::{Errno, Error};
use crate::format::dir::{self, Entry};
use crate::format::inode::{InodeItem, LinkItem};
use crate::format::key::{kind, Key};
use crate::subvol::change::Change;
use crate::subvol::inode::{Inode, State};
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::units::Ino;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A name found in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its cookie.
    pub cookie: u64,
    /// What it says.
    pub entry: Entry,
}

/// Where a name goes that is not in a directory.
pub struct Vacancy {
    key: Key,
    /// Of names with the same hash.
    cookies: Vec<u64>,
}

impl Subvol {
    fn hash_key(&self, dir: Ino, name: &[u8]) -> Key {
        Key::new(dir.0, kind::DIR_HASH, dir::name_hash(&self.store.hash_secret, name))
    }

    fn cookies(&self, change: Option<&Change<'_>>, key: &Key) -> Result<Vec<u64>> {
        let Some(value) = self.get_in(change, key)? else { return Ok(Vec::new()) };
        dir::decode_cookies(&value).map_err(|bad| bad.in_item(self.id, key.object))
    }

    fn entry_at(&self, dir: Ino, cookie: u64) -> Result<Option<Entry>> {
        let key = Key::new(dir.0, kind::DIR_ENTRY, cookie);
        let Some(value) = self.get_item(&key)? else { return Ok(None) };
        Entry::decode(&value).map(Some).map_err(|bad| bad.in_item(self.id, dir.0))
    }

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// Errors of the device or the tree; a hash item that names no entry is [`Error::BadItem`].
    pub fn find_name(&self, dir: Ino, name: &[u8]) -> Result<Option<Found>> {
        self.find_among(dir, name, &self.cookies(None, &self.hash_key(dir, name))?)
    }

    /// As [`Subvol::find_name`], in the directory whose state this is. What is not there is noted.
    ///
    /// # Errors
    /// As of [`Subvol::find_name`].
    pub fn look_for(&self, dir: Ino, state: &State, name: &[u8]) -> Result<Option<Found>> {
        let key = self.hash_key(dir, name);
        let cookies = self.cookies(None, &key)?;
        if cookies.is_empty() {
            state.absent.note(key.offset, &state.item);
        }
        self.find_among(dir, name, &cookies)
    }

    /// Where a new name goes in the directory whose state this is. The caller has it locked
    /// exclusively, and keeps it so until the name is added.
    ///
    /// # Errors
    /// EEXIST; otherwise as of [`Subvol::find_name`].
    pub fn vacancy(&self, dir: Ino, state: &State, name: &[u8]) -> Result<Vacancy> {
        let key = self.hash_key(dir, name);
        if state.absent.is(key.offset, &state.item) {
            debug_assert!(
                self.cookies(None, &key).map_or(true, |cookies| cookies.is_empty()),
                "a name came without a new cookie"
            );
            return Ok(Vacancy { key, cookies: Vec::new() });
        }
        let cookies = self.cookies(None, &key)?;
        match self.find_among(dir, name, &cookies)? {
            Some(_) => Err(Errno::Exist.into()),
            None => Ok(Vacancy { key, cookies }),
        }
    }

    /// Finds a name among those with the same hash.
    fn find_among(&self, dir: Ino, name: &[u8], cookies: &[u64]) -> Result<Option<Found>> {
        for &cookie in cookies {
            let what = "hash item names an entry that is not there";
            let entry = self.entry_at(dir, cookie)?.ok_or(Error::BadItem {
                what,
                tree: self.id,
                object: dir.0,
            })?;
            if entry.name == name {
                return Ok(Some(Found { cookie, entry }));
            }
        }
        Ok(None)
    }

    /// The name under which an inode stands in its first directory.
    pub fn first_name(&self, item: &InodeItem) -> Result<Option<Entry>> {
        if item.parent == 0 {
            return Ok(None);
        }
        self.entry_at(Ino(item.parent), item.parent_cookie)
    }

    /// Adds a name that is not there yet; returns its cookie. Updates the directory's fields except
    /// its times, and does not touch the target's. The change may have removed names before.
    ///
    /// # Errors
    /// ENOSPC when too many names have the same hash; errors of the device or the tree.
    pub fn add_name(
        &self,
        change: &mut Change<'_>,
        dir: Ino,
        dir_item: &mut InodeItem,
        entry: &Entry,
    ) -> Result<u64> {
        let key = self.hash_key(dir, &entry.name);
        let cookies = self.cookies(Some(change), &key)?;
        self.fill(Vacancy { key, cookies }, change, dir_item, entry)
    }

    /// As [`Subvol::add_name`], where the change has not touched the directory yet.
    ///
    /// # Errors
    /// ENOSPC when too many names have the same hash.
    pub fn fill(
        &self,
        vacancy: Vacancy,
        change: &mut Change<'_>,
        dir_item: &mut InodeItem,
        entry: &Entry,
    ) -> Result<u64> {
        let Vacancy { key, mut cookies } = vacancy;
        if cookies.len() >= dir::HASH_COOKIES_MAX {
            return Err(Errno::NoSpc.into());
        }
        let cookie = dir_item.next_cookie;
        dir_item.next_cookie += 1;
        dir_item.entries += 1;
        dir_item.size += entry.name.len() as u64;
        cookies.push(cookie);
        change.put(key, dir::encode_cookies(&cookies));
        change.put(Key::new(key.object, kind::DIR_ENTRY, cookie), entry.encode());
        Ok(cookie)
    }

    /// Removes a name. Updates the directory's fields except its times.
    pub fn remove_name(
        &self,
        change: &mut Change<'_>,
        dir: Ino,
        dir_item: &mut InodeItem,
        found: &Found,
    ) -> Result<()> {
        let key = self.hash_key(dir, &found.entry.name);
        let mut cookies = self.cookies(Some(change), &key)?;
        cookies.retain(|cookie| *cookie != found.cookie);
        if cookies.is_empty() {
            change.delete(key);
        } else {
            change.put(key, dir::encode_cookies(&cookies));
        }
        change.delete(Key::new(dir.0, kind::DIR_ENTRY, found.cookie));
        dir_item.entries = dir_item.entries.saturating_sub(1);
        let bytes = found.entry.name.len() as u64;
        dir_item.size = dir_item.size.saturating_sub(bytes);
        Ok(())
    }

    /// Makes an existing name stand for another inode, keeping its cookie.
    pub fn retarget_name(
        &self,
        change: &mut Change<'_>,
        dir: Ino,
        found: &Found,
        ino: Ino,
        file_type: u32,
    ) {
        let entry = Entry { ino: ino.0, file_type, name: found.entry.name.clone() };
        change.put(Key::new(dir.0, kind::DIR_ENTRY, found.cookie), entry.encode());
    }

    /// Tells an inode that it has got the name with that cookie. The link count is the caller's.
    pub fn attach(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
        dir: Ino,
        cookie: u64,
    ) -> Result<()> {
        if item.parent == 0 {
            (item.parent, item.parent_cookie) = (dir.0, cookie);
            return Ok(());
        }
        let key = Key::new(ino.0, kind::LINK, LinkItem::offset(dir, cookie));
        if self.get_in(Some(change), &key)?.is_some() {
            return Err(Errno::MLink.into());
        }
        change.put(key, LinkItem { parent: dir.0, cookie }.to_bytes().to_vec());
        item.links += 1;
        Ok(())
    }

    /// Tells an inode that it has lost the name with that cookie. Another name becomes the first.
    pub fn detach(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
        dir: Ino,
        cookie: u64,
    ) -> Result<()> {
        if (item.parent, item.parent_cookie) != (dir.0, cookie) {
            change.delete(Key::new(ino.0, kind::LINK, LinkItem::offset(dir, cookie)));
            item.links = item.links.saturating_sub(1);
            return Ok(());
        }
        (item.parent, item.parent_cookie) = (0, 0);
        if item.links == 0 {
            return Ok(());
        }
        let mut next = None;
        let (from, to) = (Key::new(ino.0, kind::LINK, 0), Key::new(ino.0, kind::LINK, u64::MAX));
        self.scan(from, to, &mut |key, value| {
            next = Some((key, LinkItem::decode(value).map_err(|b| b.in_item(self.id, ino.0))?));
            Ok(false)
        })?;
        if let Some((key, link)) = next {
            change.delete(key);
            (item.parent, item.parent_cookie) = (link.parent, link.cookie);
            item.links -= 1;
        }
        Ok(())
    }

    /// The path of an inode from the root of the subvolume, as far as it can be found: for
    /// messages. Takes shared locks of the inodes on the way, one at a time; the caller holds none
    /// of them.
    pub fn path_of(&self, inode: &Arc<Inode>) -> Vec<u8> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut current = inode.clone();
        // A crafted image may have a cycle of parents.
        for _ in 0..4096 {
            if current.ino.0 == crate::format::pool::ROOT_INO {
                break;
            }
            let (parent, name) = {
                let state = current.state.read();
                (Ino(state.item.parent), self.first_name(&state.item))
            };
            match name {
                Ok(Some(entry)) => parts.push(entry.name),
                _ => parts.push(alloc::format!("#{}", current.ino).into_bytes()),
            }
            if parent.0 == 0 {
                break;
            }
            match self.inode(parent) {
                Ok(next) => current = next,
                Err(_) => break,
            }
        }
        let mut path = Vec::new();
        for part in parts.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(part);
        }
        if path.is_empty() {
            path.push(b'/');
        }
        path
    }
}
