//! rename(2) with its flags: one change, so a crash shows both names before or both after.

use crate::error::{Errno, Error};
use crate::format::dir::Entry;
use crate::format::inode::{mode, InodeItem, NLINK_MAX};
use crate::space::Class;
use crate::subvol::change::Change;
use crate::subvol::inode::Inode;
use crate::subvol::names::Found;
use crate::units::Ino;
use crate::vfs::volume::{
    check_may_add, check_may_change, check_may_remove, check_name, Locked, Volume,
};
use crate::vfs::{Caller, RenameFlags, Result};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A name in a directory.
type Place<'a> = (Ino, &'a [u8]);

/// What a rename is about, as found.
struct Plan {
    source: Found,
    target: Option<Found>,
}

/// Copies of the fields of all inodes involved; put in place when nothing can fail any more.
struct Drafts(BTreeMap<Ino, InodeItem>);

impl Drafts {
    fn of(inodes: &[&Arc<Inode>], locked: &Locked<'_>) -> Drafts {
        // One by one: collecting into a map sorts, with much of it on the stack.
        let mut drafts = BTreeMap::new();
        for inode in inodes {
            drafts.insert(inode.ino, locked.get(inode.ino).item);
        }
        Drafts(drafts)
    }

    fn get(&mut self, ino: Ino) -> &mut InodeItem {
        self.0.get_mut(&ino).expect("every inode involved has a draft")
    }
}

impl Volume {
    pub(super) fn do_rename(
        &self,
        from: Place<'_>,
        to: Place<'_>,
        flags: RenameFlags,
        caller: &Caller,
    ) -> Result<()> {
        check_name(from.1)?;
        check_name(to.1)?;
        if [from.1, to.1].iter().any(|name| matches!(*name, b"." | b"..")) {
            return Err(Errno::Busy.into());
        }
        if flags.exchange && (flags.no_replace || flags.whiteout) {
            return Err(Errno::Inval.into());
        }
        let mut reservation = Some(self.reserve(0, 12, Class::Normal)?);
        let _moving = (from.0 != to.0).then(|| self.subvol.moving.lock());
        loop {
            let dir = self.inode(from.0)?;
            let new_dir = self.inode(to.0)?;
            let plan = self.find_both(from, to)?;
            let source = self.inode(Ino(plan.source.entry.ino))?;
            let target = match &plan.target {
                Some(found) => Some(self.inode(Ino(found.entry.ino))?),
                None => None,
            };
            self.check_no_cycle(from.0, to.0, &plan, flags)?;
            let mut all: Vec<&Arc<Inode>> = alloc::vec![&dir, &new_dir, &source];
            all.extend(&target);
            let mut locked = Locked::new(&all);
            let again = self.find_both(from, to)?;
            if again.source != plan.source || again.target != plan.target {
                continue;
            }
            if self.check_rename(&locked, from.0, to.0, &plan, flags)? {
                return Ok(());
            }
            let mut change = Change::begin(&self.subvol);
            let mut drafts = Drafts::of(&all, &locked);
            let mut whiteout = None;
            if flags.exchange {
                self.exchange(&mut change, &mut drafts, from.0, to.0, &plan)?;
            } else {
                self.replace(&mut change, &mut drafts, from, to, &plan, flags)?;
                if flags.whiteout {
                    let item = drafts.get(from.0);
                    let inherits = item.mode & mode::SET_GID != 0;
                    let gid = if inherits { item.gid } else { caller.gid };
                    let owner = Caller { gid, ..*caller };
                    whiteout = Some(self.whiteout(&mut change, from.0, &plan, &owner)?);
                }
            }
            for ino in [from.0, to.0] {
                self.stamp(drafts.get(ino));
            }
            self.stamp_ctime(drafts.get(source.ino));
            if let Some(target) = &target {
                self.stamp_ctime(drafts.get(target.ino));
            }
            if let Some((ino, item)) = whiteout {
                drop(self.subvol.new_inode(&mut change, ino, item));
            }
            // A name that stood for other content must not, after a crash, stand for a file whose
            // bytes were lost: they go to the log with the new name.
            let exchanged = target.as_ref().filter(|_| flags.exchange);
            for named in [Some(&source), exchanged].into_iter().flatten() {
                if locked.get(named.ino).item.is_file() {
                    self.engine.store.intents.need(change.txg(), self.subvol.id, named.ino);
                }
            }
            all.sort_unstable_by_key(|inode| inode.ino);
            all.dedup_by_key(|inode| inode.ino);
            for inode in all {
                change.log_inode(inode, locked.get_mut(inode.ino), *drafts.get(inode.ino));
            }
            if let Some(reservation) = reservation.take() {
                self.engine.keep(change.txg(), reservation);
            }
            change.finish();
            drop(locked);
            if let Some(target) = target {
                if drafts.get(target.ino).nlink == 0 {
                    self.drop_if_nameless(target.ino);
                }
            }
            return Ok(());
        }
    }

    fn find_both(&self, from: Place<'_>, to: Place<'_>) -> Result<Plan> {
        let source = self.subvol.find_name(from.0, from.1)?.ok_or(Error::Posix(Errno::NoEnt))?;
        let target = self.subvol.find_name(to.0, to.1)?;
        Ok(Plan { source, target })
    }

    /// A directory must not be moved below itself. The caller holds `moving` when the directories
    /// differ, so parents stay as they are.
    fn check_no_cycle(
        &self,
        dir: Ino,
        new_dir: Ino,
        plan: &Plan,
        flags: RenameFlags,
    ) -> Result<()> {
        if dir == new_dir {
            return Ok(());
        }
        if plan.source.entry.file_type == mode::DIRECTORY {
            self.check_not_above(Ino(plan.source.entry.ino), new_dir, Errno::Inval)?;
        }
        if let Some(target) = &plan.target {
            if target.entry.file_type == mode::DIRECTORY {
                let errno = if flags.exchange { Errno::Inval } else { Errno::NotEmpty };
                self.check_not_above(Ino(target.entry.ino), dir, errno)?;
            }
        }
        Ok(())
    }

    fn check_not_above(&self, above: Ino, below: Ino, errno: Errno) -> Result<()> {
        let mut current = below;
        // Deeper trees than this cannot be made with paths; a crafted one may have a cycle.
        for _ in 0..1 << 20 {
            if current == above {
                return Err(errno.into());
            }
            let parent = self.inode(current)?.state.read().item.parent;
            if parent == 0 {
                return Ok(());
            }
            current = Ino(parent);
        }
        Err(Error::BadItem { what: "cycle of directories", tree: self.subvol.id, object: below.0 })
    }

    /// Checks under the locks; true when there is nothing to do.
    fn check_rename(
        &self,
        locked: &Locked<'_>,
        dir: Ino,
        new_dir: Ino,
        plan: &Plan,
        flags: RenameFlags,
    ) -> Result<bool> {
        check_may_remove(locked.get(dir))?;
        check_may_add(locked.get(new_dir))?;
        let source = locked.get(Ino(plan.source.entry.ino));
        check_may_change(source)?;
        let Some(found) = &plan.target else {
            return if flags.exchange { Err(Errno::NoEnt.into()) } else { Ok(false) };
        };
        if flags.no_replace {
            return Err(Errno::Exist.into());
        }
        check_may_remove(locked.get(new_dir))?;
        let target = locked.get(Ino(found.entry.ino));
        check_may_change(target)?;
        if found.entry.ino == plan.source.entry.ino {
            return Ok(true);
        }
        if !flags.exchange {
            match (source.item.is_dir(), target.item.is_dir()) {
                (true, false) => return Err(Errno::NotDir.into()),
                (false, true) => return Err(Errno::IsDir.into()),
                (true, true) if target.item.entries > 0 => return Err(Errno::NotEmpty.into()),
                _ => {}
            }
        }
        Ok(false)
    }

    fn replace(
        &self,
        change: &mut Change<'_>,
        drafts: &mut Drafts,
        from: Place<'_>,
        to: Place<'_>,
        plan: &Plan,
        flags: RenameFlags,
    ) -> Result<()> {
        let subvol = &self.subvol;
        let ino = Ino(plan.source.entry.ino);
        let file_type = plan.source.entry.file_type;
        let is_dir = file_type == mode::DIRECTORY;
        let cookie = match &plan.target {
            Some(found) => {
                let victim = Ino(found.entry.ino);
                subvol.detach(change, victim, drafts.get(victim), to.0, found.cookie)?;
                self.drop_link(change, victim, drafts.get(victim));
                if drafts.get(victim).is_dir() {
                    drafts.get(to.0).nlink = drafts.get(to.0).nlink.saturating_sub(1);
                }
                subvol.retarget_name(change, to.0, found, ino, file_type);
                found.cookie
            }
            None => {
                let entry = Entry { ino: ino.0, file_type, name: to.1.to_vec() };
                subvol.add_name(change, to.0, drafts.get(to.0), &entry)?
            }
        };
        if !flags.whiteout {
            subvol.remove_name(change, from.0, drafts.get(from.0), &plan.source)?;
        }
        subvol.detach(change, ino, drafts.get(ino), from.0, plan.source.cookie)?;
        subvol.attach(change, ino, drafts.get(ino), to.0, cookie)?;
        if is_dir && from.0 != to.0 {
            move_link(drafts, from.0, to.0)?;
        }
        Ok(())
    }

    /// A character device 0:0 where the source was.
    fn whiteout(
        &self,
        change: &mut Change<'_>,
        dir: Ino,
        plan: &Plan,
        caller: &Caller,
    ) -> Result<(Ino, InodeItem)> {
        let ino = self.subvol.new_ino()?;
        let now = self.now();
        let mut item = InodeItem::zeroed();
        item.mode = mode::CHAR;
        (item.uid, item.gid) = (caller.uid, caller.gid);
        (item.nlink, item.next_cookie, item.generation) = (1, 1, change.txg().0);
        item.set_atime(now);
        item.set_mtime(now);
        item.set_ctime(now);
        item.set_btime(now);
        self.subvol.retarget_name(change, dir, &plan.source, ino, mode::CHAR);
        self.subvol.attach(change, ino, &mut item, dir, plan.source.cookie)?;
        Ok((ino, item))
    }

    fn exchange(
        &self,
        change: &mut Change<'_>,
        drafts: &mut Drafts,
        dir: Ino,
        new_dir: Ino,
        plan: &Plan,
    ) -> Result<()> {
        let subvol = &self.subvol;
        let target = plan.target.as_ref().ok_or(Error::Posix(Errno::NoEnt))?;
        let (a, b) = (&plan.source, target);
        let (a_ino, b_ino) = (Ino(a.entry.ino), Ino(b.entry.ino));
        subvol.retarget_name(change, dir, a, b_ino, b.entry.file_type);
        subvol.retarget_name(change, new_dir, b, a_ino, a.entry.file_type);
        subvol.detach(change, a_ino, drafts.get(a_ino), dir, a.cookie)?;
        subvol.detach(change, b_ino, drafts.get(b_ino), new_dir, b.cookie)?;
        subvol.attach(change, a_ino, drafts.get(a_ino), new_dir, b.cookie)?;
        subvol.attach(change, b_ino, drafts.get(b_ino), dir, a.cookie)?;
        if dir != new_dir {
            for (found, old, new) in [(a, dir, new_dir), (b, new_dir, dir)] {
                if found.entry.file_type == mode::DIRECTORY {
                    move_link(drafts, old, new)?;
                }
            }
        }
        Ok(())
    }
}

/// A directory's link to its parent is moved.
fn move_link(drafts: &mut Drafts, old: Ino, new: Ino) -> Result<()> {
    if drafts.get(new).nlink >= NLINK_MAX {
        return Err(Errno::MLink.into());
    }
    drafts.get(old).nlink = drafts.get(old).nlink.saturating_sub(1);
    drafts.get(new).nlink += 1;
    Ok(())
}
