//! `mount.cairn` over a filesystem in memory: small, correct, gone when unmounted.
//!
//! The tests of the driver mount it to see what the kernel and the driver do together without
//! the engine. Attributes `user.count.NAME` of the root directory show how often an operation was
//! called: `sync`, `fsync`, `write`, `open-inodes` and so on. Setting `user.capacity` of the root
//! directory makes writes beyond so many bytes in all fail; setting `user.frozen` of a file makes
//! it one that never changes.

use fs_core::error::{Errno, Error};
use fs_core::format::inode::mode;
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::{
    Attr, Caller, DirEntry, Fallocate, Filesystem, RenameFlags, Result, Seek, SetAttr, SetTime,
    StatFs, WriteFlags, XattrMode,
};
use fs_fuse::backend::{Mounted, Opened};
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

fn main() -> ExitCode {
    let open = |_: &std::path::Path, options: &fs_fuse::options::Options, _| {
        let volume = Arc::new(Memory::new(options.read_only));
        Ok(Opened {
            volume,
            release_claim: Box::new(|| {}),
            read_only: false,
            admin: None,
            kernel: Arc::default(),
        })
    };
    ExitCode::from(fs_fuse::command::run(std::env::args_os().skip(1), &open))
}

const ROOT: u64 = 77;
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const CAPACITY: &[u8] = b"user.capacity";
const FROZEN: &[u8] = b"user.frozen";
const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

enum Content {
    File(Vec<u8>),
    Dir(Directory),
    Symlink(Vec<u8>),
    Other,
}

#[derive(Default)]
struct Directory {
    names: BTreeMap<Vec<u8>, (u64, u64)>,
    /// Cookie to name and inode.
    order: BTreeMap<u64, (Vec<u8>, u64)>,
    next_cookie: u64,
    parent: u64,
}

struct Inode {
    attr: Attr,
    content: Content,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    lookups: u64,
}

#[derive(Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    next_ino: u64,
    counts: BTreeMap<&'static str, u64>,
    label: Vec<u8>,
    read_only: bool,
    shut_down: bool,
}

struct Memory {
    state: Mutex<State>,
    /// Files that never change. Asked for while a directory is listed under the other lock.
    frozen: Mutex<BTreeSet<u64>>,
}

fn no<T>(errno: Errno) -> Result<T> {
    Err(Error::Posix(errno))
}

fn now() -> Timestamp {
    let t = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Timestamp { secs: t.as_secs() as i64, nanos: t.subsec_nanos() }
}

impl State {
    fn inode(&mut self, ino: u64) -> Result<&mut Inode> {
        self.inodes.get_mut(&ino).ok_or(Error::Posix(Errno::Stale))
    }

    fn dir(&mut self, ino: u64) -> Result<&mut Directory> {
        match &mut self.inode(ino)?.content {
            Content::Dir(dir) => Ok(dir),
            _ => no(Errno::NotDir),
        }
    }

    fn file(&mut self, ino: u64) -> Result<&mut Vec<u8>> {
        match &mut self.inode(ino)?.content {
            Content::File(data) => Ok(data),
            Content::Dir(_) => no(Errno::IsDir),
            _ => no(Errno::Inval),
        }
    }

    fn attr(&mut self, ino: u64) -> Result<Attr> {
        let inode = self.inode(ino)?;
        let mut attr = inode.attr;
        match &inode.content {
            Content::File(data) => {
                attr.size = data.len() as u64;
                attr.blocks = attr.size.div_ceil(512);
            }
            Content::Symlink(target) => attr.size = target.len() as u64,
            Content::Dir(dir) => attr.size = dir.names.len() as u64,
            Content::Other => {}
        }
        Ok(attr)
    }

    fn touch(&mut self, ino: u64) -> Result<()> {
        let now = now();
        let attr = &mut self.inode(ino)?.attr;
        (attr.mtime, attr.ctime) = (now, now);
        attr.version += 1;
        Ok(())
    }

    fn find(&mut self, dir: u64, name: &[u8]) -> Result<u64> {
        match name {
            b"." => Ok(dir),
            b".." => Ok(self.dir(dir)?.parent),
            _ => self.dir(dir)?.names.get(name).map(|e| e.1).ok_or(Error::Posix(Errno::NoEnt)),
        }
    }

    fn granted(&mut self, ino: u64) -> Result<Attr> {
        self.inode(ino)?.lookups += 1;
        self.attr(ino)
    }

    fn put_name(&mut self, dir: u64, name: &[u8], ino: u64) -> Result<()> {
        let entries = self.dir(dir)?;
        let cookie = entries.next_cookie;
        entries.next_cookie += 1;
        entries.names.insert(name.to_vec(), (cookie, ino));
        entries.order.insert(cookie, (name.to_vec(), ino));
        self.touch(dir)
    }

    fn take_name(&mut self, dir: u64, name: &[u8]) -> Result<u64> {
        let entries = self.dir(dir)?;
        let (cookie, ino) = entries.names.remove(name).ok_or(Error::Posix(Errno::NoEnt))?;
        entries.order.remove(&cookie);
        self.touch(dir)?;
        Ok(ino)
    }

    fn changes(&mut self, what: &'static str) -> Result<()> {
        *self.counts.entry(what).or_default() += 1;
        match (self.shut_down, self.read_only) {
            (true, _) => no(Errno::Io),
            (_, true) => Err(Error::ReadOnly),
            _ => Ok(()),
        }
    }

    /// Whether so many bytes more would fit.
    fn has_room(&mut self, more: u64) -> bool {
        let bytes = |inode: &Inode| match &inode.content {
            Content::File(data) => data.len() as u64,
            _ => 0,
        };
        let used: u64 = self.inodes.values().map(bytes).sum();
        let capacity = self.inodes.get(&ROOT).and_then(|root| root.xattrs.get(CAPACITY));
        let capacity = capacity.and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
        used + more <= capacity.unwrap_or(u64::MAX)
    }

    fn reap(&mut self, ino: u64) {
        if self.inodes.get(&ino).is_some_and(|i| i.attr.nlink == 0 && i.lookups == 0) {
            self.inodes.remove(&ino);
        }
    }

    fn make(
        &mut self,
        dir: u64,
        name: Option<&[u8]>,
        file_mode: u32,
        rdev: u64,
        content: Content,
        caller: &Caller,
    ) -> Result<Attr> {
        self.changes("make")?;
        if let Some(name) = name {
            if name.len() > 255 {
                return no(Errno::NameTooLong);
            }
            if self.dir(dir)?.names.contains_key(name) {
                return no(Errno::Exist);
            }
        }
        let parent = self.inode(dir)?;
        let parent_mode = parent.attr.mode;
        let parent_gid = parent.attr.gid;
        let default_acl = parent.xattrs.get(DEFAULT_ACL).cloned();
        let is_dir = file_mode & mode::TYPE == mode::DIRECTORY;
        // Only whether the umask counts: the inheritance itself is the core's business.
        let mask = if default_acl.is_some() { 0 } else { caller.umask };
        let mut file_mode = file_mode & !mask;
        let set_gid = parent_mode & mode::SET_GID != 0;
        if set_gid && is_dir {
            file_mode |= mode::SET_GID;
        }
        self.next_ino += 1;
        let ino = self.next_ino;
        let time = now();
        let attr = Attr {
            ino: Ino(ino),
            generation: 9,
            mode: file_mode,
            nlink: match name {
                None => 0,
                Some(_) if is_dir => 2,
                Some(_) => 1,
            },
            uid: caller.uid,
            gid: if set_gid { parent_gid } else { caller.gid },
            rdev,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            flags: 0,
            project: 0,
            version: 1,
        };
        let xattrs = match default_acl {
            Some(acl) if is_dir => BTreeMap::from([(DEFAULT_ACL.to_vec(), acl)]),
            _ => BTreeMap::new(),
        };
        self.inodes.insert(ino, Inode { attr, content, xattrs, lookups: 0 });
        if let Some(name) = name {
            self.put_name(dir, name, ino)?;
            if is_dir {
                self.inode(dir)?.attr.nlink += 1;
                self.dir(ino)?.parent = dir;
            }
        }
        self.granted(ino)
    }

    fn remove(&mut self, dir: u64, name: &[u8]) -> Result<()> {
        let ino = self.take_name(dir, name)?;
        let time = now();
        let inode = self.inode(ino)?;
        inode.attr.ctime = time;
        if matches!(inode.content, Content::Dir(_)) {
            inode.attr.nlink = 0;
            self.inode(dir)?.attr.nlink -= 1;
        } else {
            inode.attr.nlink -= 1;
        }
        self.reap(ino);
        Ok(())
    }

    fn is_dir(&self, ino: u64) -> bool {
        matches!(self.inodes.get(&ino).map(|i| &i.content), Some(Content::Dir(_)))
    }
}

impl Memory {
    fn new(read_only: bool) -> Memory {
        let mut state = State { next_ino: 1000, read_only, ..State::default() };
        let time = now();
        let attr = Attr {
            ino: Ino(ROOT),
            generation: 9,
            mode: mode::DIRECTORY | 0o755,
            nlink: 2,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            flags: 0,
            project: 0,
            version: 1,
        };
        let content = Content::Dir(Directory { parent: ROOT, ..Directory::default() });
        state.inodes.insert(ROOT, Inode { attr, content, xattrs: BTreeMap::new(), lookups: 1 });
        Memory { state: Mutex::new(state), frozen: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Filesystem for Memory {
    fn root(&self) -> Ino {
        Ino(ROOT)
    }

    fn statfs(&self) -> Result<StatFs> {
        Ok(StatFs {
            total_bytes: 1 << 30,
            free_bytes: 1 << 29,
            available_bytes: 1 << 28,
            inodes: self.state().inodes.len() as u64,
            free_inodes: 1 << 20,
            id: [0; 16],
        })
    }

    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        let mut state = self.state();
        *state.counts.entry("lookup").or_default() += 1;
        let ino = state.find(dir.0, name)?;
        state.granted(ino)
    }

    fn forget(&self, ino: Ino, count: u64) {
        let mut state = self.state();
        if let Ok(inode) = state.inode(ino.0) {
            assert!(inode.lookups >= count, "{ino}: {count} of {} forgotten", inode.lookups);
            inode.lookups -= count;
            state.reap(ino.0);
        }
    }

    fn getattr(&self, ino: Ino) -> Result<Attr> {
        let mut state = self.state();
        *state.counts.entry("getattr").or_default() += 1;
        state.attr(ino.0)
    }

    fn setattr(&self, ino: Ino, set: &SetAttr, _caller: &Caller) -> Result<Attr> {
        let mut state = self.state();
        state.changes("setattr")?;
        if let Some(size) = set.size {
            state.file(ino.0)?.resize(size as usize, 0);
            state.touch(ino.0)?;
        }
        let time = now();
        let at = |set: SetTime| match set {
            SetTime::Now => time,
            SetTime::At(t) => t,
        };
        let inode = state.inode(ino.0)?;
        let attr = &mut inode.attr;
        if let Some(bits) = set.mode {
            attr.mode = attr.mode & mode::TYPE | bits;
        }
        if set.kill_priv && attr.mode & mode::TYPE == mode::REGULAR {
            attr.mode &= !(mode::SET_UID | mode::SET_GID);
            inode.xattrs.remove(b"security.capability".as_slice());
        }
        attr.uid = set.uid.unwrap_or(attr.uid);
        attr.gid = set.gid.unwrap_or(attr.gid);
        attr.atime = set.atime.map_or(attr.atime, at);
        attr.mtime = set.mtime.map_or(attr.mtime, at);
        attr.flags = set.flags.unwrap_or(attr.flags);
        attr.project = set.project.unwrap_or(attr.project);
        attr.ctime = set.ctime.unwrap_or(time);
        state.attr(ino.0)
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        match &self.state().inode(ino.0)?.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => no(Errno::Inval),
        }
    }

    fn mknod(&self, dir: Ino, name: &[u8], mode: u32, rdev: u64, by: &Caller) -> Result<Attr> {
        let content = match mode & mode::TYPE {
            mode::REGULAR => Content::File(Vec::new()),
            _ => Content::Other,
        };
        self.state().make(dir.0, Some(name), mode, rdev, content, by)
    }

    fn mkdir(&self, dir: Ino, name: &[u8], mode: u32, caller: &Caller) -> Result<Attr> {
        let mode = mode & mode::PERMISSIONS | mode::DIRECTORY;
        let content = Content::Dir(Directory::default());
        self.state().make(dir.0, Some(name), mode, 0, content, caller)
    }

    fn symlink(&self, dir: Ino, name: &[u8], target: &[u8], caller: &Caller) -> Result<Attr> {
        let content = Content::Symlink(target.to_vec());
        self.state().make(dir.0, Some(name), mode::SYMLINK | 0o777, 0, content, caller)
    }

    fn tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr> {
        let mode = mode & mode::PERMISSIONS | mode::REGULAR;
        self.state().make(dir.0, None, mode, 0, Content::File(Vec::new()), caller)
    }

    fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr> {
        let mut state = self.state();
        state.changes("link")?;
        if state.dir(dir.0)?.names.contains_key(name) {
            return no(Errno::Exist);
        }
        state.inode(ino.0)?.attr.nlink += 1;
        state.put_name(dir.0, name, ino.0)?;
        state.granted(ino.0)
    }

    fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()> {
        let mut state = self.state();
        state.changes("unlink")?;
        let ino = state.find(dir.0, name)?;
        if state.is_dir(ino) {
            return no(Errno::IsDir);
        }
        state.remove(dir.0, name)
    }

    fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()> {
        let mut state = self.state();
        state.changes("rmdir")?;
        let ino = state.find(dir.0, name)?;
        if !state.dir(ino)?.names.is_empty() {
            return no(Errno::NotEmpty);
        }
        state.remove(dir.0, name)
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
        let mut state = self.state();
        state.changes("rename")?;
        let moved = state.find(dir.0, name)?;
        let target = state.find(new_dir.0, new_name).ok();
        if flags.exchange {
            let other = target.ok_or(Error::Posix(Errno::NoEnt))?;
            state.take_name(dir.0, name)?;
            state.take_name(new_dir.0, new_name)?;
            state.put_name(dir.0, name, other)?;
            return state.put_name(new_dir.0, new_name, moved);
        }
        match target {
            Some(_) if flags.no_replace => return no(Errno::Exist),
            Some(old) if old == moved => return Ok(()),
            Some(old) if state.is_dir(old) && !state.dir(old)?.names.is_empty() => {
                return no(Errno::NotEmpty);
            }
            Some(_) => state.remove(new_dir.0, new_name)?,
            None => {}
        }
        state.take_name(dir.0, name)?;
        state.put_name(new_dir.0, new_name, moved)?;
        if state.is_dir(moved) {
            state.inode(dir.0)?.attr.nlink -= 1;
            state.inode(new_dir.0)?.attr.nlink += 1;
            state.dir(moved)?.parent = new_dir.0;
        }
        if flags.whiteout {
            let made = state.make(dir.0, Some(name), mode::CHAR, 0, Content::Other, caller)?;
            state.inode(made.ino.0)?.lookups -= 1;
        }
        Ok(())
    }

    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        let mut state = self.state();
        if state.shut_down {
            return no(Errno::Io);
        }
        let data = state.file(ino.0)?;
        let from = data.get(offset as usize..).unwrap_or(&[]);
        let len = from.len().min(out.len());
        out[..len].copy_from_slice(&from[..len]);
        Ok(len)
    }

    fn write(&self, ino: Ino, offset: u64, data: &[u8], flags: WriteFlags) -> Result<u64> {
        let mut state = self.state();
        state.changes("write")?;
        let end = offset as usize + data.len();
        let more = end.saturating_sub(state.file(ino.0)?.len()) as u64;
        if self.never_changes(ino) {
            return no(Errno::RoFs);
        }
        if !state.has_room(more) {
            return no(Errno::NoSpc);
        }
        let file = state.file(ino.0)?;
        if file.len() < end {
            file.resize(end, 0);
        }
        file[offset as usize..end].copy_from_slice(data);
        if flags.kill_priv {
            state.inode(ino.0)?.attr.mode &= !(mode::SET_UID | mode::SET_GID);
        }
        state.touch(ino.0)?;
        Ok(offset)
    }

    fn check_write(&self, ino: Ino, bytes: u64) -> Result<()> {
        match (self.never_changes(ino), self.state().has_room(bytes)) {
            (true, _) => no(Errno::RoFs),
            (false, true) => Ok(()),
            (false, false) => no(Errno::NoSpc),
        }
    }

    fn never_changes(&self, ino: Ino) -> bool {
        self.frozen.lock().unwrap().contains(&ino.0)
    }

    fn fallocate(&self, ino: Ino, op: Fallocate, offset: u64, len: u64) -> Result<()> {
        let mut state = self.state();
        state.changes("fallocate")?;
        let file = state.file(ino.0)?;
        let (start, end) = (offset as usize, (offset + len) as usize);
        let zero = !matches!(op, Fallocate::Allocate { .. });
        let grow = matches!(
            op,
            Fallocate::Allocate { keep_size: false } | Fallocate::ZeroRange { keep_size: false }
        );
        if zero {
            let file_end = file.len();
            file[start.min(file_end)..end.min(file_end)].fill(0);
        }
        if grow && file.len() < end {
            file.resize(end, 0);
        }
        state.touch(ino.0)
    }

    /// Pages of zeros count as holes.
    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let mut state = self.state();
        *state.counts.entry("seek").or_default() += 1;
        let file = state.file(ino.0)?;
        if offset >= file.len() as u64 {
            return no(Errno::NxIo);
        }
        let is_data = |page: u64| file[page as usize..].iter().take(4096).any(|&byte| byte != 0);
        let mut at = offset;
        while at < file.len() as u64 {
            let page = at & !4095;
            if is_data(page) == (what == Seek::Data) {
                return Ok(at);
            }
            at = page + 4096;
        }
        match what {
            Seek::Data => no(Errno::NxIo),
            Seek::Hole => Ok(file.len() as u64),
        }
    }

    fn copy_range(&self, from: Ino, at: u64, to: Ino, to_at: u64, len: u64) -> Result<u64> {
        let bytes = {
            let mut state = self.state();
            *state.counts.entry("copy-range").or_default() += 1;
            let data = state.file(from.0)?;
            let rest = data.get(at as usize..).unwrap_or(&[]);
            rest[..rest.len().min(len as usize)].to_vec()
        };
        self.write(to, to_at, &bytes, WriteFlags::default())?;
        Ok(bytes.len() as u64)
    }

    fn fsync(&self, _ino: Ino, _data_only: bool) -> Result<()> {
        *self.state().counts.entry("fsync").or_default() += 1;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.state();
        *state.counts.entry("sync").or_default() += 1;
        let bytes = |inode: &Inode| match &inode.content {
            Content::File(data) => data.len() as u64,
            _ => 0,
        };
        let total = state.inodes.values().map(bytes).sum();
        state.counts.insert("bytes-at-sync", total);
        Ok(())
    }

    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        self.list(dir, cookie, |_, entry| Ok(each(entry)))
    }

    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        self.list(dir, cookie, |state, entry| {
            let attr = state.attr(entry.ino.0)?;
            let taken = each(entry, Some(&attr));
            if taken && entry.name != b"." && entry.name != b".." {
                state.inode(entry.ino.0)?.lookups += 1;
            }
            Ok(taken)
        })
    }

    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        let mut state = self.state();
        if let (ROOT, Some(count)) = (ino.0, name.strip_prefix(b"user.count.")) {
            let value = match count {
                b"inodes" => state.inodes.len() as u64,
                b"lookups" => state.inodes.values().map(|i| i.lookups).sum(),
                other => {
                    let name = std::str::from_utf8(other).unwrap();
                    state.counts.get(name).copied().unwrap_or(0)
                }
            };
            return Ok(value.to_string().into_bytes());
        }
        *state.counts.entry("getxattr").or_default() += 1;
        state.inode(ino.0)?.xattrs.get(name).cloned().ok_or(Error::Posix(Errno::NoData))
    }

    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], how: XattrMode) -> Result<()> {
        let mut state = self.state();
        state.changes("setxattr")?;
        let inode = state.inode(ino.0)?;
        match (how, inode.xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return no(Errno::Exist),
            (XattrMode::Replace, false) => return no(Errno::NoData),
            _ => {}
        }
        inode.xattrs.insert(name.to_vec(), value.to_vec());
        if name == FROZEN {
            self.frozen.lock().unwrap().insert(ino.0);
        }
        if name == ACCESS_ACL {
            inode.attr.mode = inode.attr.mode & !0o777 | acl_mode(value);
        }
        inode.attr.ctime = now();
        Ok(())
    }

    fn listxattr(&self, ino: Ino) -> Result<Vec<u8>> {
        let mut state = self.state();
        let names = state.inode(ino.0)?.xattrs.keys();
        Ok(names.flat_map(|name| [name.as_slice(), b"\0"].concat()).collect())
    }

    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        let mut state = self.state();
        state.changes("removexattr")?;
        let removed = state.inode(ino.0)?.xattrs.remove(name);
        removed.map(|_| ()).ok_or(Error::Posix(Errno::NoData))
    }

    fn label(&self) -> Vec<u8> {
        self.state().label.clone()
    }

    fn set_label(&self, name: &[u8]) -> Result<()> {
        self.state().label = name.to_vec();
        Ok(())
    }

    fn trim(&self, _offset: u64, len: u64, _min_len: u64) -> Result<u64> {
        Ok(len.min(1 << 20))
    }

    fn shutdown(&self) {
        self.state().shut_down = true;
    }
}

impl Memory {
    fn list(
        &self,
        dir: Ino,
        cookie: u64,
        mut each: impl FnMut(&mut State, &DirEntry<'_>) -> Result<bool>,
    ) -> Result<()> {
        const FIRST: u64 = 2;
        let mut state = self.state();
        *state.counts.entry("readdir").or_default() += 1;
        let parent = state.dir(dir.0)?.parent;
        for (at, name, ino) in [(0, b".".as_slice(), dir.0), (1, b"..", parent)] {
            if cookie <= at {
                let file_type = mode::DIRECTORY;
                let entry = DirEntry { ino: Ino(ino), cookie: at + 1, file_type, name };
                if !each(&mut state, &entry)? {
                    return Ok(());
                }
            }
        }
        let mut next = cookie.saturating_sub(FIRST);
        loop {
            let found = state.dir(dir.0)?.order.range(next..).next();
            let Some((at, (name, ino))) = found.map(|(at, entry)| (*at, entry.clone())) else {
                return Ok(());
            };
            let file_type = state.attr(ino)?.mode & mode::TYPE;
            let entry = DirEntry { ino: Ino(ino), cookie: at + 1 + FIRST, file_type, name: &name };
            if !each(&mut state, &entry)? {
                return Ok(());
            }
            next = at + 1;
        }
    }
}

/// Owner, mask or group, and others of an access ACL (version 4 bytes, entries of 8 bytes).
fn acl_mode(acl: &[u8]) -> u32 {
    let entries: Vec<(u16, u32)> = acl[4..]
        .chunks_exact(8)
        .map(|e| (u16::from_le_bytes([e[0], e[1]]), u16::from_le_bytes([e[2], e[3]]).into()))
        .collect();
    let find = |tag| entries.iter().find(|e| e.0 == tag).map(|e| e.1);
    let (user, group, mask, other) = (find(0x01), find(0x04), find(0x10), find(0x20));
    user.unwrap_or(0) << 6 | mask.or(group).unwrap_or(0) << 3 | other.unwrap_or(0)
}

impl Mounted for Memory {
    fn set_read_only(&self, read_only: bool) -> Result<()> {
        let mut state = self.state();
        *state.counts.entry("set-read-only").or_default() += 1;
        state.read_only = read_only;
        Ok(())
    }

    fn close(&self) -> Result<()> {
        // Where a test can see that it happened before umount(8) returned.
        if let Some(path) = std::env::var_os("MEMORY_FUSE_CLOSED") {
            std::fs::write(path, "closed").unwrap();
        }
        Ok(())
    }
}
