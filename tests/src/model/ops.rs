//! The operations, each in terms of steps on [`State`].

use super::names::Rename;
use super::{acl, acl::Acl, content::PAGE, Content, Kind, Model, Res, State, ROOT};
use fs_core::error::Errno;
use fs_core::format::extent::FILE_BYTES_MAX;
use fs_core::format::inode::{flag, mode};
use fs_core::format::xattr::VALUE_BYTES_MAX;
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::{
    Attr, Caller, Dedupe, DirEntry, Fallocate, Filesystem, RenameFlags, Result, Seek, SetAttr,
    SetTime, StatFs, WriteFlags, XattrMode, DEDUPE_BYTES,
};

/// Bytes that one copy_range copies at a time.
const COPY_STEP: u64 = 1 << 20;

impl State {
    fn set_attr(&mut self, ino: u64, set: &SetAttr, now: Timestamp) -> Res<()> {
        self.check_set_attr(ino, set)?;
        if let Some(size) = set.size {
            let content = self.file_mut(ino)?;
            content.truncate(size);
            self.node_mut(ino)?.mtime = now;
        }
        let node = self.node_mut(ino)?;
        if let Some(mode) = set.mode {
            node.mode = node.mode & mode::TYPE | mode & mode::PERMISSIONS;
            if let Some(bytes) = node.xattrs.get_mut(acl::ACCESS) {
                let mut acl = Acl::parse(bytes).ok().flatten().expect("only valid ACLs are stored");
                acl.chmod(mode);
                *bytes = acl.to_bytes();
            }
        }
        node.uid = set.uid.unwrap_or(node.uid);
        node.gid = set.gid.unwrap_or(node.gid);
        node.flags = set.flags.unwrap_or(node.flags);
        node.project = set.project.unwrap_or(node.project);
        let time = |chosen: Option<SetTime>, old| match chosen {
            None => old,
            Some(SetTime::Now) => now,
            Some(SetTime::At(time)) => time,
        };
        node.atime = time(set.atime, node.atime);
        node.mtime = time(set.mtime, node.mtime);
        if set.kill_priv {
            self.kill_priv(ino)?;
        }
        self.touch(ino, now, false)?;
        if let Some(ctime) = set.ctime {
            self.node_mut(ino)?.ctime = ctime;
        }
        Ok(())
    }

    fn check_set_attr(&self, ino: u64, set: &SetAttr) -> Res<()> {
        let node = self.node(ino)?;
        if set.flags.is_some_and(|flags| flags & !flag::KNOWN != 0) {
            return Err(Errno::OpNotSupp);
        }
        let owner = set.mode.is_some() || set.uid.is_some() || set.gid.is_some();
        let chosen = |time| matches!(time, Some(SetTime::At(_)));
        let chosen = chosen(set.atime) || chosen(set.mtime);
        let touched = set.atime.is_some() || set.mtime.is_some();
        let is_immutable = node.flags & flag::IMMUTABLE != 0;
        let refused = owner || chosen || set.size.is_some();
        if node.is_protected() && refused || is_immutable && touched {
            return Err(Errno::Perm);
        }
        if let Some(size) = set.size {
            self.file(ino)?;
            if size > FILE_BYTES_MAX {
                return Err(Errno::FBig);
            }
        }
        Ok(())
    }

    /// What write(2) and chown(2) by an ordinary user take away.
    fn kill_priv(&mut self, ino: u64) -> Res<()> {
        let node = self.node_mut(ino)?;
        if node.is_dir() {
            return Ok(());
        }
        node.mode &= !mode::SET_UID;
        if node.mode & 0o010 != 0 {
            node.mode &= !mode::SET_GID;
        }
        node.xattrs.remove(&b"security.capability"[..]);
        Ok(())
    }

    fn write(
        &mut self,
        ino: u64,
        offset: u64,
        data: &[u8],
        flags: WriteFlags,
        now: Timestamp,
    ) -> Res<u64> {
        let content = self.file(ino)?;
        let offset = if flags.append { content.size() } else { offset };
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(Errno::FBig);
        }
        if data.is_empty() {
            return Ok(offset);
        }
        if flags.kill_priv {
            self.kill_priv(ino)?;
        }
        self.file_mut(ino)?.write(offset, data);
        self.touch(ino, now, true)?;
        Ok(offset)
    }

    fn allocate(
        &mut self,
        ino: u64,
        op: Fallocate,
        offset: u64,
        len: u64,
        now: Timestamp,
    ) -> Res<()> {
        let size = self.file(ino)?.size();
        if len == 0 {
            return Err(Errno::Inval);
        }
        let end = offset.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(Errno::FBig)?;
        let aligned = offset % PAGE == 0 && len % PAGE == 0;
        let content = self.file_mut(ino)?;
        match op {
            Fallocate::Allocate { keep_size } => {
                if !keep_size && end > size {
                    content.truncate(end);
                }
            }
            Fallocate::PunchHole => content.zero(offset, len),
            Fallocate::ZeroRange { keep_size } => {
                content.zero(offset, len);
                if !keep_size && end > size {
                    content.truncate(end);
                }
            }
            Fallocate::CollapseRange if aligned && end < size => content.collapse(offset, len),
            Fallocate::InsertRange if aligned && offset < size => {
                if size.checked_add(len).is_none_or(|size| size > FILE_BYTES_MAX) {
                    return Err(Errno::FBig);
                }
                content.insert(offset, len);
            }
            Fallocate::CollapseRange | Fallocate::InsertRange => return Err(Errno::Inval),
        }
        self.touch(ino, now, true)
    }

    fn seek(&self, ino: u64, offset: u64, what: Seek) -> Res<u64> {
        let content = self.file(ino)?;
        if offset >= content.size() {
            return Err(Errno::NxIo);
        }
        let mut pages = content.pages().skip_while(|page| *page < offset / PAGE).peekable();
        match what {
            Seek::Data => {
                let start = pages.next().map(|page| offset.max(page * PAGE));
                start.filter(|at| *at < content.size()).ok_or(Errno::NxIo)
            }
            Seek::Hole => {
                let mut at = offset / PAGE;
                while pages.next_if_eq(&at).is_some() {
                    at += 1;
                }
                Ok(offset.max(at * PAGE).min(content.size()))
            }
        }
    }

    fn copy_range(&mut self, step: Copy, now: Timestamp) -> Res<u64> {
        let source = self.file(step.source)?;
        self.file(step.target)?;
        let len = source.size().saturating_sub(step.source_offset).min(step.len);
        if len == 0 {
            return Ok(0);
        }
        let end = step.target_offset.checked_add(len);
        if end.is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(Errno::FBig);
        }
        let gap = step.source_offset.abs_diff(step.target_offset);
        if step.source == step.target && gap < len {
            return Err(Errno::Inval);
        }
        let mut done = 0;
        while done < len {
            let mut part = vec![0; (len - done).min(COPY_STEP) as usize];
            self.file(step.source)?.read(step.source_offset + done, &mut part);
            self.file_mut(step.target)?.write(step.target_offset + done, &part);
            done += part.len() as u64;
        }
        self.touch(step.target, now, true)?;
        Ok(len)
    }

    /// Changes nothing that anybody sees.
    fn dedupe_range(&self, step: Copy) -> Res<Dedupe> {
        let (source, target) = (self.file(step.source)?, self.file(step.target)?);
        let nothing = Dedupe::Same { bytes: 0, shared: 0 };
        if step.len == 0 {
            return Ok(nothing);
        }
        if self.node(step.target)?.flags & flag::IMMUTABLE != 0 {
            return Err(Errno::Perm);
        }
        let ranges = [(step.source_offset, source), (step.target_offset, target)];
        let is_within = |(at, content): (u64, &Content)| {
            let end = at.checked_add(step.len);
            at % PAGE == 0 && at < content.size() && end.is_some_and(|end| end <= content.size())
        };
        if !ranges.into_iter().all(is_within) {
            return Err(Errno::Inval);
        }
        let are_ends = ranges.into_iter().all(|(at, content)| at + step.len == content.size());
        let len = if are_ends { step.len } else { step.len / PAGE * PAGE };
        let gap = step.source_offset.abs_diff(step.target_offset);
        if step.source == step.target && gap < len.div_ceil(PAGE) * PAGE {
            return Err(Errno::Inval);
        }
        let bytes = len.min(DEDUPE_BYTES);
        let [one, other] = ranges.map(|(at, content)| {
            let mut part = vec![0; bytes as usize];
            content.read(at, &mut part);
            part
        });
        Ok(if one == other { Dedupe::Same { bytes, shared: 0 } } else { Dedupe::Differs })
    }

    fn set_xattr(
        &mut self,
        ino: u64,
        name: &[u8],
        value: &[u8],
        how: XattrMode,
        now: Timestamp,
    ) -> Res<()> {
        check_xattr_name(name)?;
        if value.len() > VALUE_BYTES_MAX {
            return Err(Errno::TooBig);
        }
        let node = self.node(ino)?;
        if node.is_protected() {
            return Err(Errno::Perm);
        }
        match (how, node.xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return Err(Errno::Exist),
            (XattrMode::Replace, false) => return Err(Errno::NoData),
            _ => {}
        }
        if name == acl::ACCESS || name == acl::DEFAULT {
            self.set_acl(ino, name, value)?;
        } else {
            self.node_mut(ino)?.xattrs.insert(name.to_vec(), value.to_vec());
        }
        self.touch(ino, now, false)
    }

    fn set_acl(&mut self, ino: u64, name: &[u8], value: &[u8]) -> Res<()> {
        let node = self.node_mut(ino)?;
        if matches!(node.kind, Kind::Symlink(_)) {
            return Err(Errno::OpNotSupp);
        }
        let acl = Acl::parse(value)?;
        if name == acl::DEFAULT && !node.is_dir() {
            return if acl.is_some() { Err(Errno::Access) } else { Ok(()) };
        }
        let Some(acl) = acl else {
            node.xattrs.remove(name);
            return Ok(());
        };
        if name == acl::ACCESS {
            node.mode = node.mode & !0o777 | acl.mode();
            if acl.is_equivalent_to_mode() {
                node.xattrs.remove(name);
                return Ok(());
            }
        }
        node.xattrs.insert(name.to_vec(), acl.to_bytes());
        Ok(())
    }

    fn remove_xattr(&mut self, ino: u64, name: &[u8], now: Timestamp) -> Res<()> {
        check_xattr_name(name)?;
        if self.node(ino)?.is_protected() {
            return Err(Errno::Perm);
        }
        self.node_mut(ino)?.xattrs.remove(name).ok_or(Errno::NoData)?;
        self.touch(ino, now, false)
    }

    /// The entries after `cookie`, in order: cookie, inode, name.
    fn list(&self, dir: u64, cookie: u64) -> Res<Vec<(u64, u64, Vec<u8>)>> {
        let node = self.node(dir)?;
        let Kind::Dir { entries, parent, .. } = &node.kind else { return Err(Errno::NotDir) };
        let mut list = vec![(1, dir, b".".to_vec()), (2, *parent, b"..".to_vec())];
        list.extend(entries.iter().map(|(name, e)| (e.cookie, e.ino, name.clone())));
        list.retain(|(at, ..)| *at > cookie);
        list.sort_unstable();
        Ok(list)
    }

    fn type_of(&self, ino: u64) -> u32 {
        self.nodes.get(&ino).map_or(mode::DIRECTORY, |node| node.mode & mode::TYPE)
    }
}

#[derive(Clone, Copy)]
struct Copy {
    source: u64,
    source_offset: u64,
    target: u64,
    target_offset: u64,
    len: u64,
}

fn check_xattr_name(name: &[u8]) -> Res<()> {
    if name.is_empty() || name.len() > 255 {
        return Err(Errno::Range);
    }
    Ok(())
}

impl Filesystem for Model {
    fn root(&self) -> Ino {
        Ino(ROOT)
    }

    fn statfs(&self) -> Result<StatFs> {
        self.look(|state| Ok(StatFs { inodes: state.nodes.len() as u64, ..StatFs::default() }))
    }

    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        self.change(|state, _| {
            let ino = state.lookup(dir.0, name)?;
            state.hand_out(ino)
        })
    }

    fn forget(&self, ino: Ino, count: u64) {
        let mut state = self.lock();
        if let Some(held) = state.lookups.get_mut(&ino.0) {
            assert!(*held >= count, "inode {ino} forgotten {count} times, held {held} times");
            *held -= count;
            if *held == 0 {
                state.lookups.remove(&ino.0);
                state.drop_if_dead(ino.0);
            }
        }
    }

    fn getattr(&self, ino: Ino) -> Result<Attr> {
        self.look(|state| state.attr(ino.0))
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, _caller: &Caller) -> Result<Attr> {
        self.change(|state, now| {
            state.set_attr(ino.0, set, now)?;
            state.attr(ino.0)
        })
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.look(|state| match &state.node(ino.0)?.kind {
            Kind::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::Inval),
        })
    }

    fn mknod(&self, dir: Ino, name: &[u8], mode: u32, rdev: u64, caller: &Caller) -> Result<Attr> {
        self.change(|state, now| {
            let (kind, rdev) = match mode & mode::TYPE {
                mode::REGULAR => (Kind::File(Default::default()), 0),
                mode::CHAR | mode::BLOCK => (Kind::Special, rdev),
                mode::FIFO | mode::SOCKET => (Kind::Special, 0),
                _ => return Err(Errno::Inval),
            };
            let mut node = State::new_node(kind, mode, caller, now);
            node.rdev = rdev;
            let ino = state.make(dir.0, name, node, caller.umask, now)?;
            state.hand_out(ino)
        })
    }

    fn mkdir(&self, dir: Ino, name: &[u8], mode: u32, caller: &Caller) -> Result<Attr> {
        self.change(|state, now| {
            let ino = state.make_dir(dir.0, name, mode, caller, now)?;
            state.hand_out(ino)
        })
    }

    fn symlink(&self, dir: Ino, name: &[u8], target: &[u8], caller: &Caller) -> Result<Attr> {
        self.change(|state, now| {
            let ino = state.make_symlink(dir.0, name, target, caller, now)?;
            state.hand_out(ino)
        })
    }

    fn tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr> {
        self.change(|state, now| {
            let ino = state.make_tmpfile(dir.0, mode, caller, now)?;
            state.hand_out(ino)
        })
    }

    fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        self.change(|state, now| {
            state.link(ino.0, dir.0, name, now)?;
            state.hand_out(ino.0)
        })
    }

    fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.change(|state, now| state.unlink(dir.0, name, now))
    }

    fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        self.change(|state, now| state.rmdir(dir.0, name, now))
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
        let step = Rename { dir: dir.0, name, new_dir: new_dir.0, new_name, flags, caller };
        self.change(|state, now| state.rename(&step, now))
    }

    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        self.look(|state| Ok(state.file(ino.0)?.read(offset, out)))
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], flags: WriteFlags) -> Result<u64> {
        self.change(|state, now| state.write(ino.0, offset, data, flags, now))
    }

    fn fallocate(&self, ino: Ino, op: Fallocate, offset: u64, len: u64) -> Result<()> {
        self.change(|state, now| state.allocate(ino.0, op, offset, len, now))
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.look(|state| state.seek(ino.0, offset, what))
    }

    fn copy_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<u64> {
        let step = Copy { source: source.0, source_offset, target: target.0, target_offset, len };
        self.change(|state, now| state.copy_range(step, now))
    }

    fn dedupe_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<Dedupe> {
        let step = Copy { source: source.0, source_offset, target: target.0, target_offset, len };
        self.look(|state| state.dedupe_range(step))
    }

    fn fsync(&self, ino: Ino, _data_only: bool) -> Result<()> {
        self.look(|state| state.node(ino.0).map(|_| ()))
    }

    fn sync(&self) -> Result<()> {
        self.look(|_| Ok(()))
    }

    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let list = self.look(|state| {
            let list = state.list(dir.0, cookie)?.into_iter();
            let typed = list.map(|(at, ino, name)| (at, ino, state.type_of(ino), name));
            Ok(typed.collect::<Vec<_>>())
        })?;
        for (cookie, ino, file_type, name) in list {
            if !each(&DirEntry { ino: Ino(ino), cookie, file_type, name: &name }) {
                break;
            }
        }
        Ok(())
    }

    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        let list = self.look(|state| state.list(dir.0, cookie))?;
        for (cookie, ino, name) in list {
            let attr = self.look(|state| state.attr(ino)).ok();
            let file_type = attr.map_or(mode::DIRECTORY, |attr| attr.mode & mode::TYPE);
            let entry = DirEntry { ino: Ino(ino), cookie, file_type, name: &name };
            if !each(&entry, attr.as_ref()) {
                break;
            }
            if name != b"." && name != b".." {
                self.change(|state, _| state.hand_out(ino))?;
            }
        }
        Ok(())
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.look(|state| {
            check_xattr_name(name)?;
            state.node(ino.0)?.xattrs.get(name).cloned().ok_or(Errno::NoData)
        })
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], how: XattrMode) -> Result<()> {
        self.change(|state, now| state.set_xattr(ino.0, name, value, how, now))
    }

    fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        self.look(|state| {
            let names = state.node(ino.0)?.xattrs.keys();
            Ok(names.flat_map(|name| name.iter().copied().chain([0])).collect())
        })
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        self.change(|state, now| state.remove_xattr(ino.0, name, now))
    }

    fn label(&self) -> Vec<u8> {
        self.lock().label.clone()
    }

    fn set_label(&self, name: &[u8]) -> Result<()> {
        self.change(|state, _| {
            if name.len() > 63 || name.contains(&0) {
                return Err(Errno::Inval);
            }
            state.label = name.to_vec();
            Ok(())
        })
    }

    fn trim(&self, _offset: u64, _len: u64, _min_len: u64) -> Result<u64> {
        self.look(|_| Ok(0))
    }

    fn shutdown(&self) {
        self.lock().shut_down = true;
    }
}
