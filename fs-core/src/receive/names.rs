//! Names, and inodes that have none.

use super::{first_item, is_unfinished, Receiver, ORPHANS_AT_ONCE};
use crate::error::{Errno, Error};
use crate::format::dir::Entry;
use crate::format::inode::NLINK_MAX;
use crate::format::key::{kind, Key};
use crate::format::pool::ROOT_INO;
use crate::format::BadBytes;
use crate::platform::Result;
use crate::subvol::change::Change;
use crate::subvol::inode::{Inode, State};
use crate::sync::WriteGuard;
use crate::units::Ino;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Entries that are looked at together.
const ENTRIES_AT_ONCE: usize = 64;

/// A directory and what a name of it stands for, locked in the order of their numbers.
struct Both<'a> {
    parent: WriteGuard<'a, State>,
    child: Option<WriteGuard<'a, State>>,
}

impl<'a> Both<'a> {
    fn lock(parent: &'a Inode, child: Option<&'a Inode>) -> Both<'a> {
        let before = child.filter(|child| child.ino < parent.ino);
        let mut child_state = before.map(|child| child.state.write());
        let parent_state = parent.state.write();
        if child_state.is_none() {
            child_state = child.map(|child| child.state.write());
        }
        Both { parent: parent_state, child: child_state }
    }
}

impl Receiver {
    /// An inode, if there is one.
    pub(super) fn find(&self, ino: Ino) -> Result<Option<Arc<Inode>>> {
        match self.subvol().inode(ino) {
            Ok(inode) => Ok(Some(inode)),
            Err(Error::Posix(Errno::Stale)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An inode of that type, if there is one. One of another type that has no names makes room.
    pub(super) fn there(&mut self, ino: Ino, file_type: u32) -> Result<Option<Arc<Inode>>> {
        let Some(inode) = self.find(ino)? else { return Ok(None) };
        let item = Box::new(inode.state.read().item);
        if item.file_type() == file_type {
            return Ok(Some(inode));
        }
        let may_go = item.parent == 0 && ino.0 != ROOT_INO;
        self.holds(may_go, "an inode with names is of another type")?;
        drop(inode);
        self.remove(&[ino])?;
        Ok(None)
    }

    /// A name in directory `dir`.
    pub(super) fn name(&mut self, dir: Ino, ino: Ino, file_type: u32, name: &[u8]) -> Result<()> {
        self.holds(ino != dir && ino.0 != ROOT_INO, "a name of a directory in itself")?;
        let child = self.there(ino, file_type)?;
        match &child {
            None => self.holds(ino > dir, "a name of an inode that does not come")?,
            Some(child) => self.check_place(dir, child)?,
        }
        let reservation = self.reserve(8)?;
        let subvol = self.subvol().clone();
        let parent = subvol.inode(dir)?;
        let mut both = Both::lock(&parent, child.as_deref());
        if let Some(found) = subvol.find_name(dir, name)? {
            return self.holds(found.entry.ino == ino.0, "a name that is taken");
        }
        let mut item = Box::new(match &both.child {
            Some(state) => state.item,
            None => first_item(file_type),
        });
        let mut dir_item = Box::new(both.parent.item);
        let is_dir = item.is_dir();
        self.holds(!is_dir || item.parent == 0, "a directory with two names")?;
        self.holds(item.nlink > 0, "a name of an inode that goes")?;
        let fits = item.nlink < NLINK_MAX && dir_item.nlink < NLINK_MAX;
        self.holds(fits, "too many names of one inode")?;
        let mut change = Change::begin(&subvol);
        let entry = Entry { ino: ino.0, file_type, name: name.to_vec() };
        let cookie = subvol.add_name(&mut change, dir, &mut dir_item, &entry)?;
        let was_nameless = item.parent == 0;
        subvol.attach(&mut change, ino, &mut item, dir, cookie)?;
        dir_item.nlink += u32::from(is_dir);
        // The first name takes over the link that it had without any.
        item.nlink += u32::from(!is_dir && !was_nameless);
        if was_nameless && child.is_some() {
            change.delete(Key::new(0, kind::ORPHAN, ino.0));
        }
        match (&child, &mut both.child) {
            (Some(child), Some(state)) => change.log_inode(child, state, *item),
            _ => {
                subvol.saw_ino(ino);
                subvol.new_inode(&mut change, ino, *item);
                self.unfinished += 1;
            }
        }
        change.log_inode(&parent, &mut both.parent, *dir_item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    /// A directory gets one name, in none that is below it.
    fn check_place(&self, dir: Ino, child: &Inode) -> Result<()> {
        let (has_name, holds_something) = {
            let item = &child.state.read().item;
            if !item.is_dir() {
                return Ok(());
            }
            (item.parent, item.entries > 0)
        };
        // The name may be the one that is being said again.
        self.holds(has_name == 0 || has_name == dir.0, "a directory with two names")?;
        if !holds_something || has_name != 0 {
            return Ok(());
        }
        let mut above = dir;
        // A damaged pool may have a circle already: who goes round meets where it was when it had
        // come half as far (R. P. Brent, An improved Monte Carlo factorization algorithm, 1980).
        let (mut met, mut steps) = (Ino(0), 0u64);
        while above.0 != 0 {
            self.holds(above != child.ino, "a directory below itself")?;
            if above == met {
                let what = "directories that are in each other";
                return Err(BadBytes(what).in_item(self.subvol().id, above.0));
            }
            steps += 1;
            if steps.is_power_of_two() {
                met = above;
            }
            above = Ino(self.subvol().inode(above)?.state.read().item.parent);
        }
        Ok(())
    }

    /// A name goes. Whatever it stood for stays, at least until the end.
    pub(super) fn unname(&mut self, dir: Ino, ino: Ino, name: &[u8]) -> Result<()> {
        self.holds(ino != dir, "a name of a directory in itself")?;
        let (Some(parent), Some(child)) = (self.find(dir)?, self.find(ino)?) else {
            return self.holds(self.went_before, "a name goes that was not there");
        };
        let reservation = self.reserve(8)?;
        let subvol = self.subvol().clone();
        let mut both = Both::lock(&parent, Some(&child));
        let found = subvol.find_name(dir, name)?.filter(|found| found.entry.ino == ino.0);
        let (Some(found), Some(state)) = (found, &mut both.child) else {
            return self.holds(self.went_before, "a name goes that was not there");
        };
        let (mut item, mut dir_item) = (Box::new(state.item), Box::new(both.parent.item));
        let mut change = Change::begin(&subvol);
        subvol.remove_name(&mut change, dir, &mut dir_item, &found)?;
        subvol.detach(&mut change, ino, &mut item, dir, found.cookie)?;
        if item.is_dir() {
            dir_item.nlink = dir_item.nlink.saturating_sub(1);
        } else if item.parent != 0 {
            item.nlink = item.nlink.saturating_sub(1);
        }
        if item.parent == 0 {
            change.put(Key::new(0, kind::ORPHAN, ino.0), Vec::new());
        }
        change.log_inode(&child, state, *item);
        change.log_inode(&parent, &mut both.parent, *dir_item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    /// An inode goes: the names in it, if it is a directory. Its own names go with the directories
    /// that they are in, or one by one, and it goes itself at the end.
    pub(super) fn gone(&mut self, ino: Ino) -> Result<()> {
        self.holds(ino.0 != ROOT_INO, "the root goes")?;
        let Some(inode) = self.find(ino)? else {
            return self.holds(self.went_before, "an inode goes that was not there");
        };
        if !inode.state.read().item.is_dir() {
            return Ok(());
        }
        let (from, to) =
            (Key::new(ino.0, kind::DIR_ENTRY, 0), Key::new(ino.0, kind::DIR_ENTRY, u64::MAX));
        loop {
            let mut entries = Vec::new();
            self.subvol().scan(from, to, &mut |_, value| {
                entries.push(Entry::decode(value).map_err(|b| b.in_item(self.subvol().id, ino.0))?);
                Ok(entries.len() < ENTRIES_AT_ONCE)
            })?;
            if entries.is_empty() {
                return Ok(());
            }
            for entry in entries {
                self.unname(ino, Ino(entry.ino), &entry.name)?;
            }
        }
    }

    /// At the end: inodes without names go.
    pub(super) fn remove_nameless(&mut self) -> Result<()> {
        loop {
            let (from, to) = (Key::new(0, kind::ORPHAN, 0), Key::new(0, kind::ORPHAN, u64::MAX));
            let mut inodes = Vec::new();
            self.subvol().scan(from, to, &mut |key, _| {
                inodes.push(Ino(key.offset));
                Ok(inodes.len() < ORPHANS_AT_ONCE)
            })?;
            if inodes.is_empty() {
                return Ok(());
            }
            self.remove(&inodes)?;
        }
    }

    /// Removes inodes that have no names.
    fn remove(&mut self, inodes: &[Ino]) -> Result<()> {
        for ino in inodes {
            self.let_go(*ino)?;
        }
        for ino in inodes {
            self.engine.reclaim_now(self.subvol(), *ino)?;
        }
        self.engine.commit()?;
        for ino in inodes {
            if self.find(*ino)?.is_some() {
                return Err(Errno::Busy.into());
            }
        }
        Ok(())
    }

    /// An inode without names will not get one any more.
    fn let_go(&mut self, ino: Ino) -> Result<()> {
        let Some(inode) = self.find(ino)? else { return Ok(()) };
        let reservation = self.volume.reserve(0, 2, crate::space::Class::Delete)?;
        let mut state = inode.state.write();
        let mut item = Box::new(state.item);
        self.holds(item.entries == 0, "a directory goes that holds something")?;
        let was_unfinished = is_unfinished(&item);
        item.nlink = 0;
        item.flags = 0;
        let subvol = self.subvol().clone();
        let mut change = Change::begin(&subvol);
        self.unfinished = self.unfinished.saturating_sub(u64::from(was_unfinished));
        if item.generation == 0 {
            item.generation = change.txg().0;
        }
        change.log_inode(&inode, &mut state, *item);
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }
}
