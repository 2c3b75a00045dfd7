//! Removing files without names.
//!
//! A file that loses its last name gets an ORPHAN item in the same group. When no driver holds on
//! to it any more it is taken apart: a file with many extents from its end, so many of them a
//! group, the rest in one piece with the inode, its attributes and the ORPHAN item. A crash in
//! between finds the ORPHAN item and goes on.

use crate::btree::Cursor;
use crate::engine::Engine;
use crate::error::Error;
use crate::format::key::{kind, Key};
use crate::format::space::Run;
use crate::space::Class;
use crate::subvol::change::Change;
use crate::subvol::inode::{Inode, State};
use crate::subvol::ranges::Content;
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::units::{Ino, TreeId, SECTOR_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Extents removed from one file in one group.
const EXTENTS_PER_GROUP: u64 = 8192;
/// And when there is hardly room to list them in the dead list.
const EXTENTS_PER_GROUP_MIN: u64 = 4;
/// So many are tried in any case.
const EXTENTS_TRIED: u64 = 64;
/// Files looked at by one [`Engine::reclaim_some`].
const FILES_PER_STEP: usize = 4096;

/// How far a step came.
enum Progress {
    /// The file is gone, or is not to be removed.
    Done,
    /// More is left for a later group.
    More,
    /// There is no room even for that, or not at the moment.
    Full,
}

impl Engine {
    /// A file may have to be removed: it has no names, or nobody holds it any more.
    pub fn queue_reclaim(&self, subvol: &Subvol, ino: Ino) {
        self.reclaim.lock().push_back((subvol.id, ino));
    }

    /// Removes some of the files that wait for it.
    pub fn reclaim_some(&self) {
        for _ in 0..FILES_PER_STEP {
            let Some((tree, ino)) = self.reclaim.lock().pop_front() else { return };
            // The rest needs a commit, or room, before going on makes sense.
            if !matches!(self.reclaim_one(tree, ino), Progress::Done) {
                return;
            }
        }
    }

    /// Removes all files that wait for it, committing in between. What there is no room for stays.
    pub fn reclaim_all(&self) {
        loop {
            let Some((tree, ino)) = self.reclaim.lock().pop_front() else { return };
            let goes_on = match self.reclaim_one(tree, ino) {
                Progress::Done => true,
                Progress::More => self.commit_upto(self.store.groups.open()).is_ok(),
                Progress::Full => false,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Removes a file without names at once, committing in between, unless somebody holds it. It is
    /// gone with the next group.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; errors of devices and trees.
    pub fn reclaim_now(&self, subvol: &Arc<Subvol>, ino: Ino) -> Result<()> {
        loop {
            match self.reclaim_step(subvol, ino)? {
                Progress::More => self.commit_upto(self.store.groups.open())?,
                Progress::Full => return Err(Error::NoSpace),
                Progress::Done => return Ok(()),
            }
        }
    }

    fn reclaim_one(&self, tree: TreeId, ino: Ino) -> Progress {
        let Some(subvol) = self.subvol(tree) else { return Progress::Done };
        let progress = match self.reclaim_step(&subvol, ino) {
            Ok(progress) => progress,
            // It was tried with commits in between, but somebody else may have been faster.
            Err(Error::NoSpace) => Progress::Full,
            // Damaged, or no memory: the ORPHAN item stays, and the next mount tries again.
            Err(_) => Progress::Done,
        };
        match progress {
            Progress::Done => {}
            Progress::More => {
                self.queue_reclaim(&subvol, ino);
                self.want_commit();
            }
            Progress::Full => self.queue_reclaim(&subvol, ino),
        }
        progress
    }

    fn reclaim_step(&self, subvol: &Arc<Subvol>, ino: Ino) -> Result<Progress> {
        // What is about to be deleted or rolled back is left alone.
        let Some(_at_work) = subvol.begin_work() else { return Ok(Progress::Done) };
        let inode = match subvol.inode(ino) {
            Ok(inode) => inode,
            Err(Error::Posix(_)) => return Ok(Progress::Done),
            Err(error) => return Err(error),
        };
        let stored = inode.state.read().item.stored_bytes / SECTOR_BYTES;
        let mut most = match subvol.shares() {
            true => stored.clamp(EXTENTS_TRIED, EXTENTS_PER_GROUP),
            false => EXTENTS_PER_GROUP,
        };
        let room = |extents: u64| 8 * self.store.node_bytes as u64 + subvol.drop_room(extents);
        let reservation = match self.reserve_committing(0, room(most), Class::Delete) {
            Err(Error::NoSpace) if subvol.shares() => {
                most = EXTENTS_PER_GROUP_MIN;
                self.reserve_committing(0, room(most), Class::Delete)?
            }
            other => other?,
        };
        let mut state = inode.state.write();
        if state.item.nlink != 0 || state.gone || subvol.table.is_held(ino) {
            return Ok(Progress::Done);
        }
        let cut = if state.item.is_file() { self.cut_offset(subvol, ino, most)? } else { 0 };
        if cut > 0 && state.is_dirty() {
            return Ok(Progress::More);
        }
        let mut change = Change::begin(subvol);
        self.keep(change.txg(), reservation);
        if cut == 0 {
            remove(subvol, &inode, &mut state, change)?;
            return Ok(Progress::Done);
        }
        change.touch(&inode, &mut state);
        punch(&mut change, &mut state, cut, subvol);
        state.item.size = state.item.size.min(cut);
        change.finish();
        Ok(Progress::More)
    }

    /// Where to cut a file so that not more than so many extents go; zero when that is all.
    fn cut_offset(&self, subvol: &Subvol, ino: Ino, most: u64) -> Result<u64> {
        let view = subvol.view();
        let mut cursor: Cursor = view.tree.cursor();
        let end = Key::new(ino.0, kind::EXTENT, u64::MAX);
        let mut next = cursor.seek_last(&*subvol.store, &end)?;
        for _ in 0..most {
            match next {
                Some((key, _)) if key.object == ino.0 && key.kind == kind::EXTENT => {}
                _ => return Ok(0),
            }
            next = cursor.prev(&*subvol.store)?;
        }
        match next {
            Some((key, _)) if key.object == ino.0 && key.kind == kind::EXTENT => {
                // The next lower item stays whole.
                Ok(key.offset.max(1).next_multiple_of(crate::units::SECTOR_BYTES))
            }
            _ => Ok(0),
        }
    }
}

/// Cuts a file's ranges off. The caller has touched the inode, so the ranges are the group's own.
fn punch(change: &mut Change<'_>, state: &mut State, from: u64, subvol: &Subvol) {
    let mut garbage: Vec<Run> = Vec::new();
    let before = state.ranges.memory();
    state.ranges.put(from, u64::MAX - from, Content::Hole, &mut garbage);
    subvol.store.dirty.adjust(before, state.ranges.memory());
    change.garbage().append(&mut garbage);
}

fn remove(
    subvol: &Subvol,
    inode: &Arc<Inode>,
    state: &mut State,
    mut change: Change<'_>,
) -> Result<()> {
    let ino = inode.ino;
    if state.item.xattr_hint != 0 {
        subvol.delete_xattrs(&mut change, ino)?;
    }
    change.delete(Key::new(ino.0, kind::SYMLINK, 0));
    change.delete(Key::new(0, kind::ORPHAN, ino.0));
    change.log_gone(inode, state);
    if state.item.is_file() {
        punch(&mut change, state, 0, subvol);
    }
    change.finish();
    Ok(())
}
