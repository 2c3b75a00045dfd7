//! Operations on names: look up, make, link, remove, read a directory.

use crate::error::{Errno, Error};
use crate::format::dir::{Entry, EntryRef, FIRST_COOKIE};
use crate::format::inode::{flag, mode, InodeItem, NLINK_MAX};
use crate::format::key::{kind, Key};
use crate::format::node::VALUE_BYTES_MAX;
use crate::space::{Class, Reservation};
use crate::subvol::change::Change;
use crate::subvol::inode::{Inode, State};
use crate::subvol::xattrs::{ACCESS_ACL, DEFAULT_ACL};
use crate::units::Ino;
use crate::vfs::acl::Acl;
use crate::vfs::volume::{
    check_may_add, check_may_change, check_may_remove, check_name, Locked, Volume,
};
use crate::vfs::{Attr, Caller, DirEntry, Result};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

/// Entries taken from a directory at once, to look at the inode of each.
const READDIR_BATCH: usize = 128;
/// Longest symlink target, in bytes.
const SYMLINK_BYTES_MAX: usize = 4095;

const _: () = assert!(SYMLINK_BYTES_MAX <= VALUE_BYTES_MAX);

/// What is to be made.
struct New<'a> {
    mode: u32,
    rdev: u64,
    target: &'a [u8],
}

/// Access and default lists that a new inode gets.
#[derive(Default)]
struct Inherited {
    access: Option<Vec<u8>>,
    default: Option<Vec<u8>>,
}

impl Volume {
    pub(super) fn do_lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        if name == b"." {
            return self.look_again(dir);
        }
        let parent = self.inode(dir)?;
        let ino = {
            let state = parent.state.read();
            if !state.item.is_dir() {
                return Err(Errno::NotDir.into());
            }
            if name == b".." {
                let above = parent_of(dir, &state);
                drop(state);
                return self.look_again(above);
            }
            let found = self.subvol.look_for(dir, &state, name)?;
            let found = found.ok_or(Error::Posix(Errno::NoEnt))?;
            // Held under the directory's lock: until then the name keeps it alive.
            self.subvol.table.hold(Ino(found.entry.ino));
            Ino(found.entry.ino)
        };
        let result = self.inode(ino).map(|inode| {
            let state = inode.state.read();
            self.attr(ino, &state)
        });
        match result {
            Ok(attr) => Ok(attr),
            Err(error) => {
                self.do_forget(ino, 1);
                // A name for an inode that is not there is damage, not "no such file".
                Err(match error {
                    Error::Posix(_) => Error::BadItem {
                        what: "name of an inode that is not there",
                        tree: self.subvol.id,
                        object: dir.0,
                    },
                    other => other,
                })
            }
        }
    }

    /// Looks up an inode of any type by its number, which need not be in use any more: file handles
    /// keep numbers for as long as they like.
    fn look_again(&self, ino: Ino) -> Result<Attr> {
        let inode = self.inode(ino)?;
        let state = inode.state.read();
        let nameless = state.item.nlink == 0;
        if state.gone || (nameless && !self.subvol.table.is_held(ino)) {
            return Err(Errno::Stale.into());
        }
        // Held under its lock: a file without names is removed under it, if nobody holds it.
        self.subvol.table.hold(ino);
        Ok(self.attr(ino, &state))
    }

    pub(super) fn do_forget(&self, ino: Ino, count: u64) {
        if !self.subvol.table.let_go(ino, count) {
            return;
        }
        // An inode without names is in the table: it is kept there.
        let Some(inode) = self.subvol.table.get(ino) else { return };
        let nameless = inode.state.try_read().is_none_or(|state| state.item.nlink == 0);
        if nameless {
            drop(inode);
            self.remove_nameless(ino);
        }
    }

    fn remove_nameless(&self, ino: Ino) {
        // Also where changes are refused: that the name is gone was agreed to before.
        if !self.is_snapshot() && self.engine.store.writable().is_ok() {
            self.engine.queue_reclaim(&self.subvol, ino);
            self.engine.reclaim_some();
        }
    }

    pub(super) fn do_mknod(
        &self,
        dir: Ino,
        name: &[u8],
        mode: u32,
        rdev: u64,
        caller: &Caller,
    ) -> Result<Attr> {
        let rdev = match mode & mode::TYPE {
            mode::CHAR | mode::BLOCK => rdev,
            mode::REGULAR | mode::FIFO | mode::SOCKET => 0,
            _ => return Err(Errno::Inval.into()),
        };
        self.make(dir, name, &New { mode, rdev, target: &[] }, caller)
    }

    pub(super) fn do_mkdir(
        &self,
        dir: Ino,
        name: &[u8],
        mode: u32,
        caller: &Caller,
    ) -> Result<Attr> {
        let mode = mode::DIRECTORY | (mode & mode::PERMISSIONS);
        self.make(dir, name, &New { mode, rdev: 0, target: &[] }, caller)
    }

    pub(super) fn do_symlink(
        &self,
        dir: Ino,
        name: &[u8],
        target: &[u8],
        caller: &Caller,
    ) -> Result<Attr> {
        if target.is_empty() {
            return Err(Errno::NoEnt.into());
        }
        if target.len() > SYMLINK_BYTES_MAX {
            return Err(Errno::NameTooLong.into());
        }
        self.make(dir, name, &New { mode: mode::SYMLINK | 0o777, rdev: 0, target }, caller)
    }

    fn make(&self, dir: Ino, name: &[u8], new: &New<'_>, caller: &Caller) -> Result<Attr> {
        check_name(name)?;
        if matches!(name, b"." | b"..") {
            return Err(Errno::Exist.into());
        }
        let reservation = self.reserve(0, 6, Class::Normal)?;
        let parent = self.inode(dir)?;
        let mut dir_state = parent.state.write();
        check_may_add(&dir_state)?;
        if new.mode & mode::TYPE == mode::DIRECTORY && dir_state.item.nlink >= NLINK_MAX {
            return Err(Errno::MLink.into());
        }
        let vacancy = self.subvol.vacancy(dir, &dir_state, name)?;
        let ino = self.subvol.new_ino()?;
        let mut change = Change::begin(&self.subvol);
        let mut item = self.draft(&change, &dir_state.item, new, caller);
        let inherited = self.inherit(dir, &dir_state.item, &mut item, caller)?;
        let mut dir_item = dir_state.item;
        let entry = Entry { ino: ino.0, file_type: item.file_type(), name: name.to_vec() };
        let cookie = self.subvol.fill(vacancy, &mut change, &mut dir_item, &entry)?;
        self.subvol.attach(&mut change, ino, &mut item, dir, cookie)?;
        self.put_inherited(&mut change, ino, &mut item, &inherited)?;
        if !new.target.is_empty() {
            change.put(Key::new(ino.0, kind::SYMLINK, 0), new.target.to_vec());
        }
        item.nlink = 1 + u32::from(item.is_dir());
        dir_item.nlink += u32::from(item.is_dir());
        self.stamp(&mut dir_item);

        let inode = self.subvol.new_inode(&mut change, ino, item);
        self.subvol.table.hold(ino);
        self.done(change, reservation, &mut [(&parent, &mut dir_state, dir_item)]);
        let state = inode.state.read();
        Ok(self.attr(ino, &state))
    }

    pub(super) fn do_tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr> {
        let reservation = self.reserve(0, 6, Class::Normal)?;
        let parent = self.inode(dir)?;
        let dir_state = parent.state.write();
        check_may_add(&dir_state)?;
        let ino = self.subvol.new_ino()?;
        let mut change = Change::begin(&self.subvol);
        let new = New { mode: mode::REGULAR | (mode & mode::PERMISSIONS), rdev: 0, target: &[] };
        let mut item = self.draft(&change, &dir_state.item, &new, caller);
        let inherited = self.inherit(dir, &dir_state.item, &mut item, caller)?;
        self.put_inherited(&mut change, ino, &mut item, &inherited)?;
        change.put(Key::new(0, kind::ORPHAN, ino.0), Vec::new());
        let inode = self.subvol.new_inode(&mut change, ino, item);
        self.subvol.table.hold(ino);
        self.done(change, reservation, &mut []);
        let state = inode.state.read();
        Ok(self.attr(ino, &state))
    }

    /// Fields of a new inode, but for what it inherits by access lists.
    fn draft(
        &self,
        change: &Change<'_>,
        dir: &InodeItem,
        new: &New<'_>,
        caller: &Caller,
    ) -> InodeItem {
        let now = self.now();
        let mut item = InodeItem::zeroed();
        item.mode = new.mode & (mode::TYPE | mode::PERMISSIONS);
        (item.uid, item.gid) = (caller.uid, caller.gid);
        if dir.mode & mode::SET_GID != 0 {
            item.gid = dir.gid;
            if item.is_dir() {
                item.mode |= mode::SET_GID;
            }
        }
        item.rdev = new.rdev;
        item.size = new.target.len() as u64;
        item.generation = change.txg().0;
        item.next_cookie = if item.is_dir() { FIRST_COOKIE } else { 1 };
        if item.is_dir() || item.is_file() {
            item.flags = dir.flags & (flag::NODUMP | flag::COMPRESS | flag::NOCOMPRESS);
            (item.compression, item.compression_level) = (dir.compression, dir.compression_level);
            item.checksum = dir.checksum;
        }
        if dir.flags & flag::PROJINHERIT != 0 {
            item.project = dir.project;
            if item.is_dir() {
                item.flags |= flag::PROJINHERIT;
            }
        }
        item.set_atime(now);
        item.set_mtime(now);
        item.set_ctime(now);
        item.set_btime(now);
        item
    }

    /// Applies the directory's default list, or the umask, to a draft's mode.
    fn inherit(
        &self,
        dir: Ino,
        dir_item: &InodeItem,
        item: &mut InodeItem,
        caller: &Caller,
    ) -> Result<Inherited> {
        let mut inherited = Inherited::default();
        if item.file_type() == mode::SYMLINK {
            return Ok(inherited);
        }
        let Some(default) = self.subvol.get_xattr(dir, dir_item, DEFAULT_ACL)? else {
            item.mode &= !(caller.umask & 0o777);
            return Ok(inherited);
        };
        let mut acl = Acl::decode(&default)?;
        item.mode = (item.mode & !0o777) | acl.inherit(item.mode);
        if !acl.is_minimal() {
            inherited.access = Some(acl.encode());
        }
        if item.is_dir() {
            inherited.default = Some(default);
        }
        Ok(inherited)
    }

    fn put_inherited(
        &self,
        change: &mut Change<'_>,
        ino: Ino,
        item: &mut InodeItem,
        inherited: &Inherited,
    ) -> Result<()> {
        for (name, value) in [(ACCESS_ACL, &inherited.access), (DEFAULT_ACL, &inherited.default)] {
            if let Some(value) = value {
                self.subvol.set_xattr(change, ino, item, name, Some(value))?;
            }
        }
        Ok(())
    }

    /// Notes that a directory's or inode's content changed now.
    pub(super) fn stamp(&self, item: &mut InodeItem) {
        let now = self.now();
        item.set_mtime(now);
        item.set_ctime(now);
        item.version = item.version.wrapping_add(1);
    }

    /// Notes that an inode's fields changed now.
    pub(super) fn stamp_ctime(&self, item: &mut InodeItem) {
        item.set_ctime(self.now());
        item.version = item.version.wrapping_add(1);
    }

    /// Puts drafts in place and finishes a change.
    pub(super) fn done(
        &self,
        mut change: Change<'_>,
        reservation: Reservation,
        drafts: &mut [(&Arc<Inode>, &mut State, InodeItem)],
    ) {
        for (inode, state, item) in drafts.iter_mut() {
            change.log_inode(inode, state, *item);
        }
        self.engine.keep(change.txg(), reservation);
        change.finish();
    }

    pub(super) fn do_link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        check_name(name)?;
        if matches!(name, b"." | b"..") {
            return Err(Errno::Exist.into());
        }
        let reservation = self.reserve(0, 6, Class::Normal)?;
        let inode = self.inode(ino)?;
        let parent = self.inode(dir)?;
        if ino == dir {
            return Err(Errno::Perm.into());
        }
        let mut locked = Locked::new(&[&inode, &parent]);
        check_may_add(locked.get(dir))?;
        let state = locked.get(ino);
        if state.gone {
            return Err(Errno::NoEnt.into());
        }
        if state.item.is_dir() {
            return Err(Errno::Perm.into());
        }
        check_may_change(state)?;
        if state.item.nlink >= NLINK_MAX {
            return Err(Errno::MLink.into());
        }
        let vacancy = self.subvol.vacancy(dir, locked.get(dir), name)?;
        let mut change = Change::begin(&self.subvol);
        let (mut item, mut dir_item) = (state.item, locked.get(dir).item);
        let entry = Entry { ino: ino.0, file_type: item.file_type(), name: name.to_vec() };
        let cookie = self.subvol.fill(vacancy, &mut change, &mut dir_item, &entry)?;
        self.subvol.attach(&mut change, ino, &mut item, dir, cookie)?;
        if item.nlink == 0 {
            change.delete(Key::new(0, kind::ORPHAN, ino.0));
        }
        item.nlink += 1;
        self.stamp_ctime(&mut item);
        self.stamp(&mut dir_item);
        self.subvol.table.hold(ino);
        change.log_inode(&inode, locked.get_mut(ino), item);
        change.log_inode(&parent, locked.get_mut(dir), dir_item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(self.attr(ino, locked.get(ino)))
    }

    pub(super) fn do_remove(&self, dir: Ino, name: &[u8], is_rmdir: bool) -> Result<()> {
        check_name(name)?;
        match (name, is_rmdir) {
            (b".", true) => return Err(Errno::Inval.into()),
            (b"..", true) => return Err(Errno::NotEmpty.into()),
            (b"." | b"..", false) => return Err(Errno::IsDir.into()),
            _ => {}
        }
        let mut reservation = Some(self.reserve(0, 6, Class::Delete)?);
        loop {
            let parent = self.inode(dir)?;
            let found = {
                let state = parent.state.read();
                if !state.item.is_dir() {
                    return Err(Errno::NotDir.into());
                }
                self.subvol.find_name(dir, name)?.ok_or(Error::Posix(Errno::NoEnt))?
            };
            let ino = Ino(found.entry.ino);
            let inode = self.inode(ino)?;
            let mut locked = Locked::new(&[&parent, &inode]);
            if self.subvol.find_name(dir, name)?.as_ref() != Some(&found) {
                continue;
            }
            check_may_remove(locked.get(dir))?;
            let state = locked.get(ino);
            check_may_change(state)?;
            match (is_rmdir, state.item.is_dir()) {
                (true, false) => return Err(Errno::NotDir.into()),
                (false, true) => return Err(Errno::IsDir.into()),
                (true, true) if state.item.entries > 0 => return Err(Errno::NotEmpty.into()),
                _ => {}
            }
            let mut change = Change::begin(&self.subvol);
            let (mut item, mut dir_item) = (state.item, locked.get(dir).item);
            self.subvol.remove_name(&mut change, dir, &mut dir_item, &found)?;
            self.subvol.detach(&mut change, ino, &mut item, dir, found.cookie)?;
            self.drop_link(&mut change, ino, &mut item);
            if is_rmdir {
                dir_item.nlink = dir_item.nlink.saturating_sub(1);
            }
            self.stamp(&mut dir_item);
            change.log_inode(&inode, locked.get_mut(ino), item);
            change.log_inode(&parent, locked.get_mut(dir), dir_item);
            if let Some(reservation) = reservation.take() {
                self.engine.keep(change.txg(), reservation);
            }
            change.finish();
            drop(locked);
            if item.nlink == 0 && !self.subvol.table.is_held(ino) {
                self.remove_nameless(ino);
            }
            return Ok(());
        }
    }

    /// Takes a name's link away from a draft; an inode without names becomes an orphan.
    pub(super) fn drop_link(&self, change: &mut Change<'_>, ino: Ino, item: &mut InodeItem) {
        item.nlink = if item.is_dir() { 0 } else { item.nlink.saturating_sub(1) };
        if item.nlink == 0 {
            change.put(Key::new(0, kind::ORPHAN, ino.0), Vec::new());
        }
        self.stamp_ctime(item);
    }

    /// After a rename: an inode that lost its last name may go.
    pub(super) fn drop_if_nameless(&self, ino: Ino) {
        if !self.subvol.table.is_held(ino) {
            self.remove_nameless(ino);
        }
    }

    pub(super) fn do_readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let inode = self.inode(ino)?;
        let target = {
            let state = inode.state.read();
            if state.item.file_type() != mode::SYMLINK {
                return Err(Errno::Inval.into());
            }
            let key = Key::new(ino.0, kind::SYMLINK, 0);
            let missing = Error::BadItem {
                what: "symlink without a target",
                tree: self.subvol.id,
                object: ino.0,
            };
            self.subvol.get_item(&key)?.ok_or(missing)?.to_vec()
        };
        self.accessed(&inode);
        Ok(target)
    }

    /// Calls `each` for the entries after `cookie`, other than the dots, until it returns false.
    fn entries(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let Some(next) = cookie.max(FIRST_COOKIE - 1).checked_add(1) else { return Ok(()) };
        let from = Key::new(dir.0, kind::DIR_ENTRY, next);
        let to = Key::new(dir.0, kind::DIR_ENTRY, u64::MAX);
        self.subvol.scan(from, to, &mut |key, value| {
            let entry = EntryRef::decode(value).map_err(|b| b.in_item(self.subvol.id, dir.0))?;
            let EntryRef { ino, file_type, name } = entry;
            Ok(each(&DirEntry { ino: Ino(ino), cookie: key.offset, file_type, name }))
        })
    }

    /// Calls `each` with the dots after `cookie`; false when it has had enough.
    fn dots(
        &self,
        dir: &Arc<Inode>,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<bool> {
        let state = dir.state.read();
        if !state.item.is_dir() {
            return Err(Errno::NotDir.into());
        }
        let parent = parent_of(dir.ino, &state);
        drop(state);
        let file_type = mode::DIRECTORY;
        let own = DirEntry { ino: dir.ino, cookie: 1, file_type, name: b"." };
        let up = DirEntry { ino: parent, cookie: 2, file_type, name: b".." };
        for entry in [own, up] {
            if entry.cookie > cookie && !each(&entry) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn do_readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let inode = self.inode(dir)?;
        self.accessed(&inode);
        if !self.dots(&inode, cookie, each)? {
            return Ok(());
        }
        self.entries(dir, cookie, each)
    }

    /// Has leaves read that a reader who has just got the entries from `cookie` on will come to.
    pub(super) fn do_readdir_ahead(&self, dir: Ino, cookie: u64) {
        self.subvol.read_ahead(&Key::new(dir.0, kind::DIR_ENTRY, cookie.max(FIRST_COOKIE)));
    }

    pub(super) fn do_readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        let inode = self.inode(dir)?;
        self.accessed(&inode);
        if !self.dots(&inode, cookie, &mut |entry| each(entry, None))? {
            return Ok(());
        }
        let mut cookie = cookie;
        loop {
            // Inodes are read after the scan, not within: that would take twice the stack.
            let mut batch: Vec<(DirEntry<'_>, Range<usize>)> = Vec::new();
            let mut names = Vec::new();
            self.entries(dir, cookie, &mut |entry| {
                let start = names.len();
                names.extend_from_slice(entry.name);
                batch.push((DirEntry { name: &[], ..*entry }, start..names.len()));
                batch.len() < READDIR_BATCH
            })?;
            let Some((last, _)) = batch.last() else { return Ok(()) };
            cookie = last.cookie;
            for (entry, name) in batch {
                let ino = entry.ino;
                // Held before it is looked at, so that it cannot be removed in between.
                self.subvol.table.hold(ino);
                let attr = self.inode(ino).ok().map(|inode| {
                    let state = inode.state.read();
                    self.attr(ino, &state)
                });
                let shown = DirEntry { name: &names[name], ..entry };
                let go_on = each(&shown, attr.as_ref());
                if !go_on || attr.is_none() {
                    self.do_forget(ino, 1);
                }
                if !go_on {
                    return Ok(());
                }
            }
        }
    }
}

/// What `..` of a directory is; the root's is itself.
fn parent_of(dir: Ino, state: &State) -> Ino {
    match state.item.parent {
        0 => dir,
        parent => Ino(parent),
    }
}
