//! A mounted subvolume: the operations, over the engine.
//!
//! Every changing operation has the same shape:
//!
//! 1. reserve room (may wait, no lock held);
//! 2. lock the inodes, ascending by number ([`Locked`]), and look again at what was found before;
//! 3. enter the group (`Change::begin`), compute drafts: everything that may fail;
//! 4. put drafts into the inodes and finish the change: nothing can fail;
//! 5. unlock, and do what needs no lock, such as writing data early.

use crate::engine::{self, Engine};
use crate::error::{Errno, Error, Incident};
use crate::format::dir::NAME_BYTES_MAX;
use crate::format::inode::{flag, InodeItem};
use crate::format::pool::{INO_MAX, ROOT_INO};
use crate::platform::{DeviceRef, Platform, Timestamp};
use crate::space::{Class, Reservation};
use crate::subvol::inode::{Inode, State};
use crate::subvol::room::Pieces;
use crate::subvol::{InUse, Subvol};
use crate::sync::{Mutex, Rank, WriteGuard};
use crate::units::{Ino, Txg, SECTOR_BYTES};
use crate::vfs::{
    Attr, Caller, Dedupe, DirEntry, Fallocate, Filesystem, RenameFlags, Result, Seek, SetAttr,
    StatFs, WriteFlags, XattrMode,
};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// When reading changes the access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessTime {
    /// Never.
    Never,
    /// When it is older than the last change, or than a day.
    #[default]
    Relative,
    /// Always.
    Strict,
}

/// A mounted subvolume.
pub struct Volume {
    pub(super) engine: Arc<Engine>,
    pub(super) subvol: Arc<Subvol>,
    is_snapshot: bool,
    /// Keeps the subvolume from being deleted, unless that is about to be tried.
    in_use: Mutex<Option<InUse>>,
    pub(super) access_time: AccessTime,
}

/// What a setting of a subvolume says; `None` when it says nothing.
fn access_time_from(number: u8) -> Option<AccessTime> {
    match number {
        1 => Some(AccessTime::Never),
        2 => Some(AccessTime::Relative),
        3 => Some(AccessTime::Strict),
        _ => None,
    }
}

impl Volume {
    /// Opens a pool and mounts its default subvolume.
    ///
    /// # Errors
    /// As [`engine::open`].
    pub fn open(
        devices: Vec<DeviceRef>,
        platform: Platform,
        options: &engine::OpenOptions,
        access_time: AccessTime,
    ) -> Result<Arc<Volume>> {
        let engine = engine::open(devices, platform, options)?;
        let subvol = engine.default_subvol().ok_or(Error::NoSuperblock)?;
        Volume::of(engine, subvol, access_time)
    }

    /// Mounts a subvolume or snapshot of a pool that is open.
    ///
    /// # Errors
    /// ENOENT when there is none, or it is being received; EBUSY when it is about to be deleted or
    /// rolled back.
    pub fn of_version(
        engine: Arc<Engine>,
        id: u64,
        access_time: AccessTime,
    ) -> Result<Arc<Volume>> {
        let subvol = engine.open_version(id)?;
        if subvol.is_receiving() {
            return Err(Errno::NoEnt.into());
        }
        Volume::of(engine, subvol, access_time)
    }

    /// A subvolume that is being received, for who receives it.
    ///
    /// # Errors
    /// ENOENT when there is none that is being received; EBUSY when somebody does already.
    pub(crate) fn of_receiving(engine: Arc<Engine>, id: u64) -> Result<Arc<Volume>> {
        let subvol = engine.open_version(id)?;
        if !subvol.is_receiving() {
            return Err(Errno::NoEnt.into());
        }
        let volume = Volume::of(engine, subvol, AccessTime::Never)?;
        match volume.subvol.is_shared() {
            true => Err(Errno::Busy.into()),
            false => Ok(volume),
        }
    }

    fn of(
        engine: Arc<Engine>,
        subvol: Arc<Subvol>,
        access_time: AccessTime,
    ) -> Result<Arc<Volume>> {
        let in_use = Mutex::ranked(Rank::Leaf, Some(subvol.begin_use()?));
        let is_snapshot = subvol.item().is_snapshot();
        Ok(Arc::new(Volume { engine, subvol, is_snapshot, in_use, access_time }))
    }

    /// The number of the subvolume or snapshot.
    pub fn version(&self) -> u64 {
        self.subvol.id.0
    }

    /// Whether it is a snapshot, which never changes.
    pub fn is_snapshot(&self) -> bool {
        self.is_snapshot
    }

    /// Lets the subvolume be deleted or rolled back from now on. No operation may be under way or
    /// begin before [`Volume::resume_use`] succeeds.
    pub(super) fn pause_use(&self) {
        let _ = self.in_use.lock().take();
    }

    /// Keeps it from being deleted again.
    ///
    /// # Errors
    /// EBUSY when it is about to be deleted or rolled back.
    pub(super) fn resume_use(&self) -> Result<()> {
        let mut in_use = self.in_use.lock();
        if in_use.is_none() {
            *in_use = Some(self.subvol.begin_use()?);
        }
        Ok(())
    }

    /// Whether a directory has an entry of that name.
    pub(super) fn has_name(&self, dir: Ino, name: &[u8]) -> Result<bool> {
        let inode = self.inode(dir)?;
        let _state = inode.state.read();
        Ok(self.subvol.find_name(dir, name)?.is_some())
    }

    /// Drops inodes in memory that are clean and that nobody uses.
    pub(super) fn drop_clean(&self) {
        self.subvol.table.drop_clean();
    }

    /// The subvolume.
    pub(crate) fn subvol(&self) -> &Arc<Subvol> {
        &self.subvol
    }

    /// The engine below.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Makes everything durable and marks the pool clean. Operations after it fail.
    ///
    /// # Errors
    /// [`Error::Failed`] when not everything could be made durable.
    pub fn close(&self) -> Result<()> {
        self.engine.close()
    }

    /// Refuses changes from now on, after making everything durable; or takes them again.
    ///
    /// # Errors
    /// [`Error::Failed`] when not everything could be made durable; [`Error::ReadOnly`] when the
    /// devices are.
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        if !read_only && self.engine.store.pool.read_only() {
            return Err(Error::ReadOnly);
        }
        // First, so that what is under way is the last there is to commit.
        self.engine.store.set_read_only(read_only);
        if read_only {
            self.engine.commit()?;
        }
        Ok(())
    }

    /// The inode with that number.
    pub(super) fn inode(&self, ino: Ino) -> Result<Arc<Inode>> {
        if ino.0 == 0 || ino.0 > INO_MAX {
            return Err(Errno::Stale.into());
        }
        self.subvol.inode(ino)
    }

    pub(super) fn now(&self) -> Timestamp {
        self.engine.store.now()
    }

    /// Whether it refuses changes, whatever the pool does: it is a snapshot, or was set read-only.
    pub(super) fn refuses_changes(&self) -> bool {
        // What is being received may be below one that refuses changes.
        self.is_snapshot || self.subvol.settings().refuses_changes() && !self.subvol.is_receiving()
    }

    /// When reading changes the access time: as the mount says, and where that says what is usual,
    /// as the subvolume does.
    pub(crate) fn access_time(&self) -> AccessTime {
        match self.access_time {
            AccessTime::Relative => {
                let own = access_time_from(self.subvol.settings().access_time);
                own.unwrap_or(AccessTime::Relative)
            }
            chosen => chosen,
        }
    }

    /// Whether the volume takes changes.
    pub(super) fn writable(&self) -> Result<()> {
        if self.refuses_changes() {
            return Err(Errno::RoFs.into());
        }
        self.engine.store.writable()
    }

    /// Room for an operation that changes about so many items.
    pub(crate) fn reserve(&self, data: u64, items: u64, class: Class) -> Result<Reservation> {
        // What is written may take the place of what a snapshot has, sector by sector.
        self.reserve_dropping(data, items, data / SECTOR_BYTES, class)
    }

    /// As [`Volume::reserve`], for an operation that drops so many references.
    pub(super) fn reserve_dropping(
        &self,
        data: u64,
        items: u64,
        dropped: u64,
        class: Class,
    ) -> Result<Reservation> {
        self.writable()?;
        if class == Class::Normal {
            self.within_limits(data)?;
        }
        let nodes = items * self.engine.store.node_bytes as u64;
        // Nodes that are replaced are dropped, too.
        let metadata = nodes
            .saturating_add(self.subvol.dead_room(dropped.saturating_add(items)))
            .saturating_add(self.engine.store.references_room(0, dropped));
        self.engine.reserve(data, metadata, class)
    }

    /// Whether the limits of the subvolume let it have so many bytes more. Where estimates of what
    /// is under way do not, a commit turns them into facts first. No lock may be held.
    ///
    /// # Errors
    /// EDQUOT.
    pub(super) fn within_limits(&self, more: u64) -> Result<()> {
        let is_over = || self.subvol.left().is_some_and(|left| left < more.max(1));
        if is_over() {
            self.engine.commit()?;
            if is_over() {
                return Err(Errno::DQuot.into());
            }
        }
        Ok(())
    }

    /// Keeps the reservation of an operation until its group is published; so many bytes of data
    /// may count against the limits of the subvolume then.
    pub(super) fn keep(&self, txg: Txg, reservation: Reservation, data: u64) {
        self.subvol.note_data(txg, data);
        self.engine.keep(txg, reservation);
    }

    /// As [`Volume::reserve`], for an operation that puts pieces of files, which may share extents,
    /// and drops so many references.
    pub(super) fn reserve_pieces(
        &self,
        data: u64,
        items: u64,
        pieces: &Pieces,
        dropped: u64,
    ) -> Result<Reservation> {
        self.writable()?;
        let subvol = &self.subvol;
        let nodes = items * self.engine.store.node_bytes as u64;
        let metadata = nodes
            .saturating_add(subvol.pieces_room(pieces))
            .saturating_add(self.engine.store.references_room(pieces.extents, dropped))
            .saturating_add(subvol.dead_room(dropped));
        self.engine.reserve(data, metadata, Class::Normal)
    }

    /// Names a damaged file to the administrator.
    pub(super) fn report_damage(&self, inode: &Arc<Inode>, offset: u64, error: &Error) {
        if !error.is_damage() {
            return;
        }
        let path = self.subvol.path_of(inode);
        let (tree, ino) = (self.subvol.id, inode.ino);
        let path = self.engine.with_versions(|versions| versions.shown_file(tree.0, &path));
        self.engine.note_damaged(crate::engine::DamagedFile { tree, ino, path: path.clone() });
        self.engine.store.platform.report.incident(&Incident::FileDamaged {
            tree,
            ino,
            path: String::from_utf8_lossy(&path).into_owned(),
            offset,
            error: error.clone(),
        });
    }

    pub(super) fn attr(&self, ino: Ino, state: &State) -> Attr {
        attr_of(ino, &state.item, state.dirty_bytes())
    }
}

/// What stat(2) shows of an inode with those fields and so many bytes not yet on disk.
pub(super) fn attr_of(ino: Ino, item: &InodeItem, dirty_bytes: u64) -> Attr {
    let space = item.stored_bytes + item.promised_bytes + dirty_bytes;
    Attr {
        ino,
        generation: item.generation,
        mode: item.mode,
        nlink: item.nlink,
        uid: item.uid,
        gid: item.gid,
        rdev: item.rdev,
        size: item.size,
        blocks: space.div_ceil(512),
        atime: item.atime(),
        mtime: item.mtime(),
        ctime: item.ctime(),
        btime: item.btime(),
        flags: item.flags,
        project: item.project,
        version: item.version,
    }
}

/// Whether a name can be looked up or made.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NameTooLong.into());
    }
    if name.is_empty() || name.iter().any(|b| *b == b'/' || *b == 0) {
        return Err(Errno::Inval.into());
    }
    Ok(())
}

/// Whether names may be added to a directory.
pub(super) fn check_may_add(dir: &State) -> Result<()> {
    if !dir.item.is_dir() {
        return Err(Errno::NotDir.into());
    }
    if dir.gone || dir.item.nlink == 0 {
        return Err(Errno::NoEnt.into());
    }
    if dir.item.flags & flag::IMMUTABLE != 0 {
        return Err(Errno::Perm.into());
    }
    Ok(())
}

/// Whether names may be removed from a directory.
pub(super) fn check_may_remove(dir: &State) -> Result<()> {
    check_may_add(dir)?;
    if dir.item.flags & flag::APPEND != 0 {
        return Err(Errno::Perm.into());
    }
    Ok(())
}

/// Whether an inode's names and attributes may change.
pub(super) fn check_may_change(state: &State) -> Result<()> {
    if state.item.flags & (flag::IMMUTABLE | flag::APPEND) != 0 {
        return Err(Errno::Perm.into());
    }
    Ok(())
}

/// Exclusive locks of a few inodes, taken in ascending order.
pub(super) struct Locked<'a> {
    guards: Vec<(Ino, WriteGuard<'a, State>)>,
}

impl<'a> Locked<'a> {
    /// Locks the inodes; naming one twice is fine.
    pub fn new(inodes: &[&'a Arc<Inode>]) -> Locked<'a> {
        let mut sorted: Vec<&'a Arc<Inode>> = inodes.to_vec();
        sorted.sort_unstable_by_key(|inode| inode.ino);
        sorted.dedup_by_key(|inode| inode.ino);
        let guards = sorted.into_iter().map(|inode| (inode.ino, inode.state.write())).collect();
        Locked { guards }
    }

    /// The state of one of them.
    pub fn get(&self, ino: Ino) -> &State {
        let (_, guard) = self.guards.iter().find(|(i, _)| *i == ino).expect("locked above");
        guard
    }

    /// The state of one of them, to change.
    pub fn get_mut(&mut self, ino: Ino) -> &mut State {
        let (_, guard) = self.guards.iter_mut().find(|(i, _)| *i == ino).expect("locked above");
        guard
    }
}

impl Filesystem for Volume {
    fn root(&self) -> Ino {
        Ino(ROOT_INO)
    }

    fn statfs(&self) -> Result<StatFs> {
        let mut room = self.engine.room();
        if let Some(left) = self.subvol.left() {
            // What is left of the limits, on top of what there is already.
            let has = self.subvol.item().referenced_bytes();
            room.available = room.available.min(left);
            room.free = room.free.min(left);
            room.total = room.total.min(has.saturating_add(left));
        }
        let inodes = self.subvol.inodes();
        Ok(StatFs {
            total_bytes: room.total,
            free_bytes: room.free,
            available_bytes: room.available,
            inodes,
            // An inode takes about this much metadata.
            free_inodes: room.available / 512,
            id: self.engine.store.pool.pool_id(),
        })
    }

    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        self.do_lookup(dir, name)
    }

    fn forget(&self, ino: Ino, count: u64) {
        self.do_forget(ino, count);
    }

    fn getattr(&self, ino: Ino) -> Result<Attr> {
        let inode = self.inode(ino)?;
        let state = inode.state.read();
        if state.gone {
            return Err(Errno::Stale.into());
        }
        Ok(self.attr(ino, &state))
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, caller: &Caller) -> Result<Attr> {
        self.do_setattr(ino, set, caller)
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.do_readlink(ino)
    }

    fn mknod(&self, dir: Ino, name: &[u8], mode: u32, rdev: u64, caller: &Caller) -> Result<Attr> {
        self.do_mknod(dir, name, mode, rdev, caller)
    }

    fn mkdir(&self, dir: Ino, name: &[u8], mode: u32, caller: &Caller) -> Result<Attr> {
        self.do_mkdir(dir, name, mode, caller)
    }

    fn symlink(&self, dir: Ino, name: &[u8], target: &[u8], caller: &Caller) -> Result<Attr> {
        self.do_symlink(dir, name, target, caller)
    }

    fn tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr> {
        self.do_tmpfile(dir, mode, caller)
    }

    fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        self.do_link(ino, dir, name)
    }

    fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.do_remove(dir, name, false)
    }

    fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.do_remove(dir, name, true)
    }

    fn rename(
        &self,
        dir: Ino,
        name: &[u8],
        new_dir: Ino,
        new_name: &[u8],
        flags: RenameFlags,
        caller: &Caller,
    ) -> Result<()> {
        self.do_rename((dir, name), (new_dir, new_name), flags, caller)
    }

    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        self.do_read(ino, offset, out)
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], flags: WriteFlags) -> Result<u64> {
        self.do_write(ino, offset, data, flags)
    }

    fn check_write(&self, ino: Ino, bytes: u64) -> Result<()> {
        self.do_check_write(ino, bytes)
    }

    fn fallocate(&self, ino: Ino, op: Fallocate, offset: u64, len: u64) -> Result<()> {
        self.do_fallocate(ino, op, offset, len)
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.do_seek(ino, offset, what)
    }

    fn copy_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<u64> {
        self.do_copy_range((source, source_offset), (target, target_offset), len)
    }

    fn dedupe_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<Dedupe> {
        self.do_dedupe((source, source_offset), (target, target_offset), len)
    }

    fn fsync(&self, ino: Ino, _data_only: bool) -> Result<()> {
        self.engine.fsync(&self.subvol, ino)
    }

    fn sync(&self) -> Result<()> {
        if self.engine.store.is_read_only() {
            return Ok(());
        }
        self.engine.commit()
    }

    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        self.do_readdir(dir, cookie, each)
    }

    fn readdir_ahead(&self, dir: Ino, cookie: u64) {
        self.do_readdir_ahead(dir, cookie);
    }

    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        self.do_readdir_plus(dir, cookie, each)
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.do_getxattr(ino, name)
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()> {
        self.do_setxattr(ino, name, value, mode)
    }

    fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        self.do_listxattr(ino)
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.do_removexattr(ino, name)
    }

    fn label(&self) -> Vec<u8> {
        let name = self.engine.store.pool.name();
        name.iter().copied().take_while(|b| *b != 0).collect()
    }

    fn set_label(&self, name: &[u8]) -> Result<()> {
        self.engine.set_name(name)
    }

    fn trim(&self, offset: u64, len: u64, min_len: u64) -> Result<u64> {
        self.engine.trim(offset, len, min_len)
    }

    fn shutdown(&self) {
        self.engine.shutdown();
    }
}
