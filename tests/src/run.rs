//! Carries out operations, and compares what two filesystems made of them.

use crate::gen::{Op, Path, Target, SLOTS};
use crate::model::{acl, Content, State};
use crate::tree::show;
use fs_core::error::{Errno, Error};
use fs_core::format::inode::{flag, mode};
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::{
    Attr, Dedupe, Fallocate, Filesystem, RenameFlags, Seek, SetAttr, SetTime, WriteFlags,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What an operation returned, as far as two filesystems must agree on it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after what they hold")]
pub enum Value {
    Nothing,
    Attr(Shown),
    Bytes(Vec<u8>),
    /// Names of attributes, sorted.
    Names(Vec<Vec<u8>>),
    /// Types of entries by name.
    Entries(BTreeMap<Vec<u8>, u32>),
    Number(u64),
    /// So many bytes are equal; what follows differs.
    Differs(u64),
}

/// The part of [`Attr`] that two filesystems must agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named by stat(2)")]
pub struct Shown {
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    /// Not for directories.
    pub size: Option<u64>,
    pub flags: u32,
    pub project: u32,
    /// When the operation chose it.
    pub mtime: Option<Timestamp>,
}

impl Shown {
    fn of(attr: &Attr) -> Shown {
        let is_dir = attr.mode & mode::TYPE == mode::DIRECTORY;
        Shown {
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            size: (!is_dir).then_some(attr.size),
            flags: attr.flags,
            project: attr.project,
            mtime: None,
        }
    }
}

/// What came of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What it returned.
    pub result: Result<Value, Errno>,
    /// For each inode it named: whether the modification and the change time moved.
    pub moved: Vec<(bool, bool)>,
}

/// A filesystem with what a program holds of it.
pub struct Runner {
    fs: Arc<dyn Filesystem>,
    slots: [Option<Ino>; SLOTS],
    /// An error that is no ordinary outcome, if there was one.
    pub damage: Option<Error>,
    /// In how many steps, each atomic, the last copy of a range was made.
    pub steps: usize,
    /// How many bytes these steps copied.
    pub copied: u64,
}

impl Runner {
    /// A program that holds nothing yet.
    pub fn new(fs: Arc<dyn Filesystem>) -> Runner {
        Runner { fs, slots: [None; SLOTS], damage: None, steps: 0, copied: 0 }
    }

    /// The filesystem.
    pub fn fs(&self) -> &Arc<dyn Filesystem> {
        &self.fs
    }

    /// The filesystem was closed and opened again: nothing is held any more.
    pub fn remounted(&mut self, fs: Arc<dyn Filesystem>) {
        *self = Runner::new(fs);
    }

    /// The inode in a slot.
    pub fn slot(&self, slot: usize) -> Option<Ino> {
        self.slots[slot]
    }

    /// The inode an operation works on.
    pub fn find_ino(&self, target: &Target) -> Option<u64> {
        let mut held = Held { fs: self.fs.clone(), inos: Vec::new() };
        self.find(&mut held, target).ok().map(|ino| ino.0)
    }

    /// What is held, to go back to.
    pub fn slots(&self) -> [Option<Ino>; SLOTS] {
        self.slots
    }

    /// Goes back to what was held before an operation that did not happen.
    pub fn set_slots(&mut self, slots: [Option<Ino>; SLOTS]) {
        self.slots = slots;
    }

    /// Carries out one operation. `Remount`, `DropCaches` and `Tick` are the caller's business.
    pub fn run(&mut self, op: &Op) -> Outcome {
        let mut held = Held { fs: self.fs.clone(), inos: Vec::new() };
        let named = self.named(&mut held, op);
        let before: Vec<_> = named.iter().map(|ino| self.fs.getattr(*ino).ok()).collect();
        let result = self.result(&mut held, op);
        let after = named.iter().map(|ino| self.fs.getattr(*ino).ok());
        let moved = before.iter().zip(after).map(|(a, b)| match (a, b) {
            (Some(a), Some(b)) => (a.mtime != b.mtime, a.ctime != b.ctime),
            _ => (false, false),
        });
        let moved = moved.collect();
        let result = result.map_err(|error| {
            let errno = error.errno();
            if !matches!(error, Error::Posix(_) | Error::NoSpace | Error::Argument { .. }) {
                self.damage = Some(error);
            }
            errno
        });
        Outcome { result, moved }
    }

    /// The inodes whose times the operation may move, as far as they exist.
    fn named(&self, held: &mut Held, op: &Op) -> Vec<Ino> {
        let mut inos = Vec::new();
        let mut add = |ino: Result<Ino, Error>| inos.extend(ino.ok());
        match op {
            Op::Mknod { path, .. } | Op::Mkdir { path, .. } | Op::Symlink { path, .. } => {
                add(held.parent(path).map(|p| p.0));
            }
            Op::Unlink { path } | Op::Rmdir { path } => {
                add(held.parent(path).map(|p| p.0));
                add(held.resolve(path));
            }
            Op::Link { source, path } => {
                add(self.find(held, source));
                add(held.parent(path).map(|p| p.0));
            }
            Op::Rename { from, to, .. } => {
                for path in [from, to] {
                    add(held.parent(path).map(|p| p.0));
                    add(held.resolve(path));
                }
            }
            // Whether these move times when nothing changes is left open.
            Op::Fallocate { op: Fallocate::Allocate { .. }, .. } => {}
            Op::Setattr { set: SetAttr { size: Some(_), .. }, .. } => {}
            Op::DedupeRange { source, target, .. } => {
                add(self.find(held, source));
                add(self.find(held, target));
            }
            Op::Setattr { target, .. }
            | Op::Write { target, .. }
            | Op::Fallocate { target, .. }
            | Op::CopyRange { target, .. }
            | Op::Setxattr { target, .. }
            | Op::Removexattr { target, .. }
            | Op::Getattr { target } => add(self.find(held, target)),
            _ => {}
        }
        inos
    }

    fn find(&self, held: &mut Held, target: &Target) -> Result<Ino, Error> {
        match target {
            Target::Path(path) => held.resolve(path),
            Target::Slot(slot) => self.slots[*slot].ok_or(Error::Posix(Errno::BadF)),
        }
    }

    fn fill_slot(&mut self, slot: usize, ino: Option<Ino>) {
        if let Some(old) = std::mem::replace(&mut self.slots[slot], ino) {
            self.fs.forget(old, 1);
        }
    }

    fn result(&mut self, held: &mut Held, op: &Op) -> Result<Value, Error> {
        let fs = self.fs.clone();
        match op {
            Op::Mknod { path, mode, rdev, caller } => {
                let (dir, name) = held.parent(path)?;
                held.made(fs.mknod(dir, name, *mode, *rdev, caller))
            }
            Op::Mkdir { path, mode, caller } => {
                let (dir, name) = held.parent(path)?;
                held.made(fs.mkdir(dir, name, *mode, caller))
            }
            Op::Symlink { path, target, caller } => {
                let (dir, name) = held.parent(path)?;
                held.made(fs.symlink(dir, name, target, caller))
            }
            Op::Tmpfile { dir, mode, caller, slot } => {
                let dir = held.resolve(dir)?;
                let attr = fs.tmpfile(dir, *mode, caller)?;
                self.fill_slot(*slot, Some(attr.ino));
                Ok(Value::Attr(Shown::of(&attr)))
            }
            Op::Link { source, path } => {
                let ino = self.find(held, source)?;
                let (dir, name) = held.parent(path)?;
                held.made(fs.link(ino, dir, name))
            }
            Op::Unlink { path } => {
                let (dir, name) = held.parent(path)?;
                fs.unlink(dir, name).map(|()| Value::Nothing)
            }
            Op::Rmdir { path } => {
                let (dir, name) = held.parent(path)?;
                fs.rmdir(dir, name).map(|()| Value::Nothing)
            }
            Op::Rename { from, to, flags, caller } => {
                let (dir, name) = held.parent(from)?;
                let (new_dir, new_name) = held.parent(to)?;
                fs.rename(dir, name, new_dir, new_name, *flags, caller).map(|()| Value::Nothing)
            }
            Op::Lookup { path } => {
                let (dir, name) = held.parent(path)?;
                held.made(fs.lookup(dir, name))
            }
            Op::Hold { path, slot } => {
                let ino = held.resolve(path)?;
                if ino != fs.root() {
                    held.keep(ino);
                    self.fill_slot(*slot, Some(ino));
                }
                Ok(Value::Nothing)
            }
            Op::Release { slot } => {
                self.fill_slot(*slot, None);
                Ok(Value::Nothing)
            }
            Op::Sync => fs.sync().map(|()| Value::Nothing),
            // How much there is to discard, and whether it is done, is the subject's business.
            Op::Trim => match fs.trim(0, u64::MAX, 0) {
                Ok(_) | Err(Error::Posix(Errno::OpNotSupp)) => Ok(Value::Nothing),
                Err(error) => Err(error),
            },
            Op::SetLabel { name } => {
                fs.set_label(name)?;
                Ok(Value::Bytes(fs.label()))
            }
            Op::Remount | Op::DropCaches | Op::Tick => Ok(Value::Nothing),
            _ => self.on_inode(held, op),
        }
    }

    fn on_inode(&mut self, held: &mut Held, op: &Op) -> Result<Value, Error> {
        let fs = self.fs.clone();
        match op {
            Op::Getattr { target } => {
                let attr = fs.getattr(self.find(held, target)?)?;
                Ok(Value::Attr(Shown::of(&attr)))
            }
            Op::Setattr { target, set, caller } => {
                let attr = fs.setattr(self.find(held, target)?, set, caller)?;
                let chosen = matches!(set.mtime, Some(SetTime::At(_)));
                let mtime = chosen.then_some(attr.mtime);
                Ok(Value::Attr(Shown { mtime, ..Shown::of(&attr) }))
            }
            Op::Readlink { target } => fs.readlink(self.find(held, target)?).map(Value::Bytes),
            Op::Read { target, offset, len } => {
                let mut out = vec![0xaa; *len];
                let count = fs.read(self.find(held, target)?, *offset, &mut out)?;
                out.truncate(count);
                Ok(Value::Bytes(out))
            }
            Op::Write { target, offset, data, append, kill_priv } => {
                let flags =
                    WriteFlags { append: *append, kill_priv: *kill_priv, ..WriteFlags::default() };
                let ino = self.find(held, target)?;
                fs.write(ino, *offset, &data.bytes(), flags).map(Value::Number)
            }
            Op::Fallocate { target, op, offset, len } => {
                let ino = self.find(held, target)?;
                fs.fallocate(ino, *op, *offset, *len).map(|()| Value::Nothing)
            }
            Op::Seek { target, offset, what } => {
                fs.seek(self.find(held, target)?, *offset, *what).map(Value::Number)
            }
            Op::CopyRange { source, source_offset, target, target_offset, len } => {
                (self.steps, self.copied) = (0, 0);
                let (source, target) = (self.find(held, source)?, self.find(held, target)?);
                // It may copy less than it was asked to, and is asked again.
                while self.copied < *len {
                    let done = self.copied;
                    let (from, to) = (source_offset + done, target_offset + done);
                    match fs.copy_range(source, from, target, to, len - done)? {
                        0 => break,
                        count => (self.copied, self.steps) = (done + count, self.steps + 1),
                    }
                }
                Ok(Value::Number(self.copied))
            }
            Op::DedupeRange { source, source_offset, target, target_offset, len } => {
                let (source, target) = (self.find(held, source)?, self.find(held, target)?);
                let mut done = 0;
                loop {
                    let (from, to) = (source_offset + done, target_offset + done);
                    match fs.dedupe_range(source, from, target, to, len - done)? {
                        Dedupe::Differs => return Ok(Value::Differs(done)),
                        Dedupe::Same { bytes: 0, .. } => return Ok(Value::Number(done)),
                        Dedupe::Same { bytes, .. } => done += bytes,
                    }
                    if done == *len {
                        return Ok(Value::Number(done));
                    }
                }
            }
            Op::Readdir { target } => {
                let mut entries = BTreeMap::new();
                let dir = self.find(held, target)?;
                fs.readdir(dir, 0, &mut |entry| {
                    entries.insert(entry.name.to_vec(), entry.file_type);
                    true
                })?;
                Ok(Value::Entries(entries))
            }
            Op::Getxattr { target, name } => {
                fs.getxattr(self.find(held, target)?, name).map(Value::Bytes)
            }
            Op::Setxattr { target, name, value, how } => {
                let ino = self.find(held, target)?;
                fs.setxattr(ino, name, value, *how).map(|()| Value::Nothing)
            }
            Op::Listxattr { target } => {
                let list = fs.listxattr(self.find(held, target)?)?;
                let mut names: Vec<Vec<u8>> = list.split(|b| *b == 0).map(<[u8]>::to_vec).collect();
                names.sort_unstable();
                Ok(Value::Names(names))
            }
            Op::Removexattr { target, name } => {
                fs.removexattr(self.find(held, target)?, name).map(|()| Value::Nothing)
            }
            Op::Fsync { target, data_only } => {
                let ino = self.find(held, target)?;
                fs.fsync(ino, *data_only).map(|()| Value::Nothing)
            }
            _ => unreachable!("{op:?} names no inode"),
        }
    }
}

/// Lookups made on the way, given back at the end of the operation as the kernel would.
struct Held {
    fs: Arc<dyn Filesystem>,
    inos: Vec<Ino>,
}

impl Held {
    fn resolve(&mut self, path: &[Vec<u8>]) -> Result<Ino, Error> {
        let mut at = self.fs.root();
        for name in path {
            at = self.fs.lookup(at, name)?.ino;
            self.inos.push(at);
        }
        Ok(at)
    }

    fn parent<'a>(&mut self, path: &'a Path) -> Result<(Ino, &'a [u8]), Error> {
        let (name, dir) = path.split_last().ok_or(Error::Posix(Errno::Busy))?;
        Ok((self.resolve(dir)?, name))
    }

    fn made(&mut self, attr: Result<Attr, Error>) -> Result<Value, Error> {
        let attr = attr?;
        self.inos.push(attr.ino);
        Ok(Value::Attr(Shown::of(&attr)))
    }

    /// Leaves one lookup of the inode to the caller.
    fn keep(&mut self, ino: Ino) {
        let at = self.inos.iter().rposition(|held| *held == ino).expect("just looked up");
        self.inos.swap_remove(at);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.inos.iter().for_each(|ino| self.fs.forget(*ino, 1));
    }
}

/// The inode an operation works on, in the model.
fn in_model(runner: &Runner, state: &State, target: &Target) -> Option<u64> {
    match target {
        Target::Path(path) => state.resolve(path),
        Target::Slot(slot) => runner.slot(*slot).map(|ino| ino.0),
    }
}

/// Whether POSIX and Linux leave open what comes of the operation, or a driver never asks for it.
/// `runner` runs on the model, whose state is `state`.
pub fn is_left_open(runner: &Runner, state: &State, op: &Op) -> bool {
    let node = |target: &Target| {
        in_model(runner, state, target).and_then(|ino| state.nodes.get(&ino).cloned())
    };
    let is_protected = |target: &Target| node(target).is_some_and(|n| n.flags & PROTECTED != 0);
    let is_dead_dir = |target: &Target| node(target).is_some_and(|n| n.is_dir() && n.nlink == 0);
    match op {
        // The kernel checks these flags when a file is opened, not when it is written.
        Op::Write { target, kill_priv, .. } => {
            is_protected(target)
                || node(target).is_some_and(|n| n.content().is_none() && !n.is_dir())
                || *kill_priv && node(target).is_some_and(|n| locks_group(n.mode))
        }
        Op::Fallocate { target, .. } => {
            is_protected(target) || node(target).is_some_and(|n| n.content().is_none())
        }
        Op::CopyRange { source, target, .. } => {
            let special = |n: Arc<crate::model::Node>| n.content().is_none();
            is_protected(target)
                || node(target).is_some_and(|n| n.mode & (mode::SET_UID | mode::SET_GID) != 0)
                || node(source).is_some_and(special)
                || node(target).is_some_and(special)
        }
        Op::DedupeRange { source, target, .. } => {
            [source, target].iter().any(|file| node(file).is_some_and(|n| n.content().is_none()))
        }
        Op::Seek { target, .. } => node(target).is_some_and(|n| n.content().is_none()),
        Op::Setattr { target, set, .. } => {
            let is_symlink = node(target).is_some_and(|n| n.mode & mode::TYPE == mode::SYMLINK);
            let is_file = node(target).is_some_and(|n| n.content().is_some());
            set.mode.is_some() && is_symlink
                || set.size.is_some() && !is_file && is_protected(target)
                || set.kill_priv && node(target).is_some_and(|n| locks_group(n.mode))
        }
        Op::Setxattr { target, name, .. } | Op::Removexattr { target, name } => {
            // The kernel lets only files and directories have attributes of users.
            name.starts_with(b"user.")
                && node(target).is_some_and(|n| !n.is_dir() && n.content().is_none())
                || matches!(op, Op::Removexattr { .. }) && name.starts_with(b"system.")
        }
        Op::Link { source, .. } => node(source).is_some_and(|n| n.nlink == 0 && !n.linkable),
        // The kernel sees that there is nothing to do before it looks at flags.
        Op::Rename { from, to, .. }
            if state.resolve(from) == state.resolve(to)
                && [from.as_slice(), parent_of(from), parent_of(to)]
                    .iter()
                    .any(|path| is_protected(&Target::Path(path.to_vec()))) =>
        {
            true
        }
        Op::Rename { from, to, flags: RenameFlags { whiteout: true, .. }, .. } => {
            let parent = from.split_last().and_then(|(_, dir)| state.resolve(dir));
            parent.is_some_and(|dir| state.nodes[&dir].xattrs.contains_key(acl::DEFAULT))
                || state.resolve(from) == state.resolve(to)
        }
        Op::Readdir { target } => is_dead_dir(target),
        _ => false,
    }
}

fn parent_of(path: &[Vec<u8>]) -> &[Vec<u8>] {
    path.split_last().map_or(path, |(_, dir)| dir)
}

const PROTECTED: u32 = flag::IMMUTABLE | flag::APPEND;

/// Set-group-id without group execute once meant mandatory locking.
fn locks_group(mode: u32) -> bool {
    mode & (mode::SET_GID | 0o010) == mode::SET_GID
}

/// Whether an operation must succeed although there is no room: it gives some back, or none is
/// asked for.
pub fn needs_no_room(op: &Op) -> bool {
    match op {
        Op::Unlink { .. } | Op::Rmdir { .. } | Op::Release { .. } | Op::Fsync { .. } => true,
        Op::Sync | Op::Trim | Op::Read { .. } | Op::Seek { .. } | Op::Lookup { .. } => true,
        Op::Hold { .. } | Op::Getattr { .. } | Op::Readdir { .. } | Op::Getxattr { .. } => true,
        Op::Setattr { set, .. } => set.size.is_none_or(|size| size == 0),
        Op::Removexattr { .. } => true,
        _ => false,
    }
}

/// Compares what the model and the subject made of an operation. `state` is the model's after it.
///
/// # Errors
/// What the difference is.
pub fn compare(
    runner: &Runner,
    state: &State,
    op: &Op,
    expected: &Outcome,
    found: &Outcome,
) -> Result<(), String> {
    if let Op::Seek { target, offset, what } = op {
        let content = in_model(runner, state, target)
            .and_then(|ino| state.nodes.get(&ino))
            .and_then(|node| node.content());
        if let Some(content) = content {
            return check_seek(content, *offset, *what, &found.result);
        }
    }
    if expected == found {
        return Ok(());
    }
    // Of several reasons not to do it, the kernel has looked at most before it asks.
    let is_checked = matches!(
        op,
        Op::Lookup { .. }
            | Op::Rename { .. }
            | Op::Link { .. }
            | Op::Mknod { .. }
            | Op::Mkdir { .. }
            | Op::Symlink { .. }
    );
    if is_checked && expected.result.is_err() && found.result.is_err() {
        return Ok(());
    }
    Err(format!("expected {}, found {}", brief(expected), brief(found)))
}

/// `seek` may take zeros for data or for a hole, but never data for a hole.
fn check_seek(
    content: &Content,
    offset: u64,
    what: Seek,
    found: &Result<Value, Errno>,
) -> Result<(), String> {
    let size = content.size();
    let data = content.next_nonzero(offset).unwrap_or(size);
    let fine = match (what, found) {
        (_, Err(Errno::NxIo)) if offset >= size => true,
        (Seek::Data, Err(Errno::NxIo)) => data >= size,
        (Seek::Data, Ok(Value::Number(at))) => (offset..size).contains(at) && *at <= data,
        (Seek::Hole, Ok(Value::Number(at))) => {
            let is_hole = *at == size || content.next_nonzero(*at) != Some(*at);
            offset < size && (offset..=size).contains(at) && is_hole
        }
        _ => false,
    };
    if fine {
        return Ok(());
    }
    Err(format!("seek {what:?} from {offset} of {size} found {found:?}; next data at {data}"))
}

fn brief(outcome: &Outcome) -> String {
    let mut text = match &outcome.result {
        Ok(Value::Bytes(bytes)) => {
            let start = &bytes[..bytes.len().min(16)];
            format!("{} bytes {start:02x?} crc {:#x}", bytes.len(), crc32c::crc32c(bytes))
        }
        other => format!("{other:?}"),
    };
    if !outcome.moved.is_empty() {
        text += &format!(" (mtime, ctime) moved {:?}", outcome.moved);
    }
    text
}

/// An operation in one line.
pub fn describe(op: &Op) -> String {
    let path = |path: &Path| {
        let parts: Vec<String> = path.iter().map(|name| show(name)).collect();
        format!("/{}", parts.join("/"))
    };
    let target = |t: &Target| match t {
        Target::Path(p) => path(p),
        Target::Slot(slot) => format!("slot {slot}"),
    };
    match op {
        Op::Rename { from, to, flags, .. } => {
            format!("rename {} {} {flags:?}", path(from), path(to))
        }
        Op::Write { target: t, offset, data, append, kill_priv } => format!(
            "write {} at {offset}{} {} bytes {:?} seed {:#x}{}",
            target(t),
            if *append { " (append)" } else { "" },
            data.len,
            data.look,
            data.seed,
            if *kill_priv { " kill_priv" } else { "" },
        ),
        Op::Setxattr { target: t, name, value, how } => {
            format!("setxattr {} {} {} bytes {how:?}", target(t), show(name), value.len())
        }
        Op::Symlink { path: p, target: t, .. } => format!("symlink {} {} bytes", path(p), t.len()),
        Op::Fallocate { target: t, op, offset, len } => {
            format!("fallocate {} {op:?} {offset}+{len}", target(t))
        }
        Op::Fsync { target: t, data_only } => format!("fsync {} data_only {data_only}", target(t)),
        Op::Link { source, path: p } => format!("link {} {}", target(source), path(p)),
        Op::Unlink { path: p } => format!("unlink {}", path(p)),
        Op::Rmdir { path: p } => format!("rmdir {}", path(p)),
        Op::Hold { path: p, slot } => format!("hold {} in slot {slot}", path(p)),
        Op::Mknod { path: p, mode, caller, .. } => format!("mknod {} {mode:o} {caller:?}", path(p)),
        Op::Mkdir { path: p, mode, caller } => format!("mkdir {} {mode:o} {caller:?}", path(p)),
        Op::Setattr { target: t, set, .. } => format!("setattr {} {set:?}", target(t)),
        other => format!("{other:?}"),
    }
}
