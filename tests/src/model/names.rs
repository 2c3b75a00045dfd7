//! What changes names: making, linking, removing, renaming.

use super::{acl, acl::Acl, Entry, Kind, Node, Res, State, ROOT, SYMLINK_BYTES_MAX};
use fs_core::error::Errno;
use fs_core::format::dir::NAME_BYTES_MAX;
use fs_core::format::inode::{flag, mode};
use fs_core::platform::Timestamp;
use fs_core::vfs::{Caller, RenameFlags};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Flags that files and directories get from the directory they are made in.
const INHERITED: u32 = flag::NODUMP | flag::COMPRESS | flag::NOCOMPRESS;

impl State {
    /// The entries of a directory that names may be looked up in.
    fn dir(&self, dir: u64) -> Res<&BTreeMap<Vec<u8>, Entry>> {
        self.node(dir)?.entries().ok_or(Errno::NotDir)
    }

    /// What a name stands for, `..` included; `.` is the inode itself, whatever its type.
    pub(super) fn lookup(&self, dir: u64, name: &[u8]) -> Res<u64> {
        if name == b"." {
            return self.node(dir).map(|_| dir);
        }
        let entries = self.dir(dir)?;
        if name.len() > NAME_BYTES_MAX {
            return Err(Errno::NameTooLong);
        }
        match name {
            b".." => match self.node(dir)?.kind {
                Kind::Dir { parent, .. } => Ok(parent),
                _ => unreachable!("only directories have entries"),
            },
            _ => entries.get(name).map(|entry| entry.ino).ok_or(Errno::NoEnt),
        }
    }

    /// Whether a new name may be put into a directory.
    fn check_new_name(&self, dir: u64, name: &[u8]) -> Res<()> {
        match self.lookup(dir, name) {
            Ok(_) => return Err(Errno::Exist),
            Err(Errno::NoEnt) => {}
            Err(other) => return Err(other),
        }
        if name.is_empty() || self.node(dir)?.nlink == 0 {
            return Err(Errno::NoEnt);
        }
        if name.contains(&b'/') || name.contains(&0) {
            return Err(Errno::Inval);
        }
        self.check_mutable(dir, flag::IMMUTABLE)
    }

    fn check_mutable(&self, ino: u64, flags: u32) -> Res<()> {
        if self.node(ino)?.flags & flags != 0 {
            return Err(Errno::Perm);
        }
        Ok(())
    }

    /// Whether the name of `ino` may be taken out of `dir`.
    fn check_removable(&self, dir: u64, ino: u64) -> Res<()> {
        self.check_mutable(dir, flag::IMMUTABLE | flag::APPEND)?;
        self.check_mutable(ino, flag::IMMUTABLE | flag::APPEND)
    }

    fn put_entry(&mut self, dir: u64, name: &[u8], ino: u64, now: Timestamp) -> Res<()> {
        let Kind::Dir { entries, next_cookie, .. } = &mut self.node_mut(dir)?.kind else {
            return Err(Errno::NotDir);
        };
        let entry = Entry { cookie: *next_cookie, ino };
        *next_cookie += 1;
        entries.insert(name.to_vec(), entry);
        self.touch(dir, now, true)
    }

    fn take_entry(&mut self, dir: u64, name: &[u8], now: Timestamp) -> Res<()> {
        let Kind::Dir { entries, .. } = &mut self.node_mut(dir)?.kind else {
            return Err(Errno::NotDir);
        };
        entries.remove(name).ok_or(Errno::NoEnt)?;
        self.touch(dir, now, true)
    }

    /// Gives a new inode what it inherits from its directory and adds it, without a name yet.
    fn add_node(&mut self, dir: u64, mut node: Node, umask: u32) -> Res<u64> {
        let parent = self.node(dir)?;
        if parent.mode & mode::SET_GID != 0 {
            node.gid = parent.gid;
            if node.is_dir() {
                node.mode |= mode::SET_GID;
            }
        }
        if matches!(node.kind, Kind::File(_) | Kind::Dir { .. }) {
            node.flags = parent.flags & INHERITED;
        }
        if parent.flags & flag::PROJINHERIT != 0 {
            node.project = parent.project;
            if node.is_dir() {
                node.flags |= flag::PROJINHERIT;
            }
        }
        let default = parent.xattrs.get(acl::DEFAULT);
        if !matches!(node.kind, Kind::Symlink(_)) {
            match default {
                Some(bytes) => inherit_acl(&mut node, bytes),
                None => node.mode &= !(umask & 0o777),
            }
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        self.nodes.insert(ino, Arc::new(node));
        Ok(ino)
    }

    pub(super) fn make(
        &mut self,
        dir: u64,
        name: &[u8],
        node: Node,
        umask: u32,
        now: Timestamp,
    ) -> Res<u64> {
        self.check_new_name(dir, name)?;
        let is_dir = node.is_dir();
        let ino = self.add_node(dir, node, umask)?;
        self.put_entry(dir, name, ino, now)?;
        self.node_mut(ino)?.nlink = if is_dir { 2 } else { 1 };
        if is_dir {
            self.node_mut(dir)?.nlink += 1;
        }
        Ok(ino)
    }

    pub(super) fn make_dir(
        &mut self,
        dir: u64,
        name: &[u8],
        mode: u32,
        caller: &Caller,
        now: Timestamp,
    ) -> Res<u64> {
        let kind = Kind::Dir { entries: BTreeMap::new(), parent: dir, next_cookie: 3 };
        let node = State::new_node(kind, mode::DIRECTORY | mode & 0o7777, caller, now);
        self.make(dir, name, node, caller.umask, now)
    }

    pub(super) fn make_symlink(
        &mut self,
        dir: u64,
        name: &[u8],
        target: &[u8],
        caller: &Caller,
        now: Timestamp,
    ) -> Res<u64> {
        match target.len() {
            0 => return Err(Errno::NoEnt),
            len if len > SYMLINK_BYTES_MAX => return Err(Errno::NameTooLong),
            _ => {}
        }
        let kind = Kind::Symlink(target.to_vec());
        let node = State::new_node(kind, mode::SYMLINK | 0o777, caller, now);
        self.make(dir, name, node, caller.umask, now)
    }

    pub(super) fn make_tmpfile(
        &mut self,
        dir: u64,
        mode: u32,
        caller: &Caller,
        now: Timestamp,
    ) -> Res<u64> {
        self.dir(dir)?;
        self.check_mutable(dir, flag::IMMUTABLE)?;
        let kind = Kind::File(Default::default());
        let node = State::new_node(kind, mode::REGULAR | mode & 0o7777, caller, now);
        let ino = self.add_node(dir, node, caller.umask)?;
        self.node_mut(ino)?.linkable = true;
        Ok(ino)
    }

    pub(super) fn link(&mut self, ino: u64, dir: u64, name: &[u8], now: Timestamp) -> Res<()> {
        let node = self.node(ino)?;
        let (is_dir, is_gone) = (node.is_dir(), node.nlink == 0 && !node.linkable);
        self.check_new_name(dir, name)?;
        self.check_mutable(ino, flag::IMMUTABLE | flag::APPEND)?;
        if is_dir {
            return Err(Errno::Perm);
        }
        if is_gone {
            return Err(Errno::NoEnt);
        }
        self.put_entry(dir, name, ino, now)?;
        let node = self.node_mut(ino)?;
        node.nlink += 1;
        node.linkable = false;
        self.touch(ino, now, false)
    }

    pub(super) fn unlink(&mut self, dir: u64, name: &[u8], now: Timestamp) -> Res<()> {
        let ino = self.named(dir, name)?;
        self.check_removable(dir, ino)?;
        if self.node(ino)?.is_dir() {
            return Err(Errno::IsDir);
        }
        self.take_entry(dir, name, now)?;
        self.lose_name(ino, now)
    }

    pub(super) fn rmdir(&mut self, dir: u64, name: &[u8], now: Timestamp) -> Res<()> {
        let ino = self.named(dir, name)?;
        self.check_removable(dir, ino)?;
        let entries = self.node(ino)?.entries().ok_or(Errno::NotDir)?;
        if !entries.is_empty() {
            return Err(Errno::NotEmpty);
        }
        self.take_entry(dir, name, now)?;
        self.lose_subdir(dir, ino, now)
    }

    /// What a name that may be removed or renamed stands for.
    fn named(&self, dir: u64, name: &[u8]) -> Res<u64> {
        match name {
            b"." => Err(Errno::Inval),
            b".." => Err(Errno::NotEmpty),
            _ => self.lookup(dir, name),
        }
    }

    fn lose_name(&mut self, ino: u64, now: Timestamp) -> Res<()> {
        self.node_mut(ino)?.nlink -= 1;
        self.touch(ino, now, false)?;
        self.drop_if_dead(ino);
        Ok(())
    }

    fn lose_subdir(&mut self, dir: u64, ino: u64, now: Timestamp) -> Res<()> {
        self.node_mut(dir)?.nlink -= 1;
        self.node_mut(ino)?.nlink = 0;
        self.touch(ino, now, false)?;
        self.drop_if_dead(ino);
        Ok(())
    }

    /// Whether `ino` is `dir` or a directory above it.
    fn is_above(&self, ino: u64, dir: u64) -> Res<bool> {
        let mut at = dir;
        loop {
            if at == ino {
                return Ok(true);
            }
            if at == ROOT {
                return Ok(false);
            }
            at = match self.node(at)?.kind {
                Kind::Dir { parent, .. } => parent,
                _ => return Ok(false),
            };
        }
    }

    pub(super) fn rename(&mut self, step: &Rename<'_>, now: Timestamp) -> Res<()> {
        let Rename { dir, name, new_dir, new_name, flags, caller } = *step;
        if flags.exchange && (flags.no_replace || flags.whiteout) {
            return Err(Errno::Inval);
        }
        self.dir(dir)?;
        self.dir(new_dir)?;
        let source = self.renamed(dir, name)?;
        let target = match self.renamed(new_dir, new_name) {
            Ok(target) => Some(target),
            Err(Errno::NoEnt) => None,
            Err(other) => return Err(other),
        };
        if flags.no_replace && target.is_some() {
            return Err(Errno::Exist);
        }
        if flags.exchange && target.is_none() {
            return Err(Errno::NoEnt);
        }
        self.check_loops(step, source, target)?;
        if target == Some(source) {
            return Ok(());
        }
        self.check_removable(dir, source)?;
        match target {
            None => self.check_new_name(new_dir, new_name)?,
            Some(target) => self.check_replaced(step, source, target)?,
        }
        match target {
            Some(target) if flags.exchange => self.exchange(step, source, target, now),
            _ => {
                if let Some(target) = target {
                    self.replace(new_dir, new_name, target, now)?;
                }
                self.take_entry(dir, name, now)?;
                self.put_entry(new_dir, new_name, source, now)?;
                self.moved(source, dir, new_dir, now)?;
                if flags.whiteout {
                    let node = State::new_node(Kind::Special, mode::CHAR, caller, now);
                    self.make(dir, name, node, caller.umask, now)?;
                }
                Ok(())
            }
        }
    }

    /// What a name that rename(2) is given stands for: `.` and `..` are busy.
    fn renamed(&self, dir: u64, name: &[u8]) -> Res<u64> {
        match name {
            b"." | b".." => Err(Errno::Busy),
            _ => self.lookup(dir, name),
        }
    }

    fn check_loops(&self, step: &Rename<'_>, source: u64, target: Option<u64>) -> Res<()> {
        if self.node(source)?.is_dir() && self.is_above(source, step.new_dir)? {
            return Err(Errno::Inval);
        }
        let Some(target) = target else { return Ok(()) };
        if self.node(target)?.is_dir() && self.is_above(target, step.dir)? {
            return Err(if step.flags.exchange { Errno::Inval } else { Errno::NotEmpty });
        }
        Ok(())
    }

    fn check_replaced(&self, step: &Rename<'_>, source: u64, target: u64) -> Res<()> {
        self.check_removable(step.new_dir, target)?;
        if step.flags.exchange {
            return Ok(());
        }
        match (self.node(source)?.is_dir(), self.node(target)?.entries()) {
            (true, None) => Err(Errno::NotDir),
            (false, Some(_)) => Err(Errno::IsDir),
            (true, Some(entries)) if !entries.is_empty() => Err(Errno::NotEmpty),
            _ => Ok(()),
        }
    }

    fn replace(&mut self, dir: u64, name: &[u8], target: u64, now: Timestamp) -> Res<()> {
        let is_dir = self.node(target)?.is_dir();
        self.take_entry(dir, name, now)?;
        if is_dir {
            self.lose_subdir(dir, target, now)
        } else {
            self.lose_name(target, now)
        }
    }

    fn exchange(&mut self, step: &Rename<'_>, source: u64, target: u64, now: Timestamp) -> Res<()> {
        self.take_entry(step.dir, step.name, now)?;
        self.take_entry(step.new_dir, step.new_name, now)?;
        self.put_entry(step.dir, step.name, target, now)?;
        self.put_entry(step.new_dir, step.new_name, source, now)?;
        self.moved(source, step.dir, step.new_dir, now)?;
        self.moved(target, step.new_dir, step.dir, now)
    }

    /// After the name of `ino` went from one directory to another.
    fn moved(&mut self, ino: u64, from: u64, to: u64, now: Timestamp) -> Res<()> {
        if let Kind::Dir { parent, .. } = &mut self.node_mut(ino)?.kind {
            *parent = to;
            self.node_mut(from)?.nlink -= 1;
            self.node_mut(to)?.nlink += 1;
        }
        self.touch(ino, now, false)
    }
}

fn inherit_acl(node: &mut Node, default: &[u8]) {
    let parsed = Acl::parse(default).ok().flatten().expect("only valid ACLs are stored");
    if node.is_dir() {
        node.xattrs.insert(acl::DEFAULT.to_vec(), parsed.to_bytes());
    }
    let mut access = parsed;
    node.mode = access.inherit(node.mode);
    if !access.is_equivalent_to_mode() {
        node.xattrs.insert(acl::ACCESS.to_vec(), access.to_bytes());
    }
}

/// A rename as it was asked for.
#[derive(Clone, Copy)]
pub(super) struct Rename<'a> {
    pub dir: u64,
    pub name: &'a [u8],
    pub new_dir: u64,
    pub new_name: &'a [u8],
    pub flags: RenameFlags,
    pub caller: &'a Caller,
}
