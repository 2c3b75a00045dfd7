//! The oracle: a filesystem in memory, written to be read.
//!
//! It says what every operation of `Filesystem` does and which error it ends with, following
//! POSIX and, where that is silent, what Linux does. It keeps no secrets from tests: its state is a
//! value ([`State`]) that can be cloned at any moment to remember what things were like.
//!
//! What it leaves open, and a comparison must therefore ignore: `blocks`, `version`, values of
//! times that the caller did not choose, cookies' values, the order of entries, and where between
//! data and zeros `seek` sees a border.

pub mod acl;
pub mod content;
mod names;
mod ops;

pub use content::Content;

use fs_core::error::{Errno, Error};
use fs_core::format::inode::{flag, mode};
use fs_core::platform::{Clock, Timestamp};
use fs_core::units::Ino;
use fs_core::vfs::{Attr, Caller};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Outcome of a step of an operation.
pub(crate) type Res<T> = Result<T, Errno>;

/// Longest target of a symlink: PATH_MAX less its NUL.
pub const SYMLINK_BYTES_MAX: usize = 4095;

/// A directory entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Place in the order of readdir.
    pub cookie: u64,
    /// Inode.
    pub ino: u64,
}

/// What only one type of file has.
#[derive(Clone, Debug)]
pub enum Kind {
    /// A regular file.
    File(Content),
    /// A directory.
    Dir {
        /// Its entries by name, without `.` and `..`.
        entries: BTreeMap<Vec<u8>, Entry>,
        /// What `..` is.
        parent: u64,
        /// Cookie of the next entry.
        next_cookie: u64,
    },
    /// A symbolic link.
    Symlink(Vec<u8>),
    /// A device, FIFO or socket.
    Special,
}

/// An inode.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "fields not documented here are named by stat(2)")]
pub struct Node {
    pub kind: Kind,
    /// Type and permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub nlink: u32,
    /// Attribute flags.
    pub flags: u32,
    /// Project id.
    pub project: u32,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    /// Counts changes.
    pub version: u64,
    /// Made by O_TMPFILE and not yet linked, so that link may give it a name.
    pub linkable: bool,
}

impl Node {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, Kind::Dir { .. })
    }

    /// Entries of a directory.
    pub fn entries(&self) -> Option<&BTreeMap<Vec<u8>, Entry>> {
        match &self.kind {
            Kind::Dir { entries, .. } => Some(entries),
            _ => None,
        }
    }

    /// Content of a regular file.
    pub fn content(&self) -> Option<&Content> {
        match &self.kind {
            Kind::File(content) => Some(content),
            _ => None,
        }
    }

    /// Size as stat(2) shows it; that of a directory is left open.
    pub fn size(&self) -> u64 {
        match &self.kind {
            Kind::File(content) => content.size(),
            Kind::Symlink(target) => target.len() as u64,
            Kind::Dir { entries, .. } => entries.keys().map(|name| name.len() as u64).sum(),
            Kind::Special => 0,
        }
    }

    fn is_protected(&self) -> bool {
        self.flags & (flag::IMMUTABLE | flag::APPEND) != 0
    }
}

/// Everything there is. Cloning is cheap: inodes are shared until they change.
#[derive(Clone)]
pub struct State {
    /// Inodes by number, also those without a name that someone still holds.
    pub nodes: BTreeMap<u64, Arc<Node>>,
    /// Lookup counts that are not zero.
    lookups: BTreeMap<u64, u64>,
    next_ino: u64,
    label: Vec<u8>,
    shut_down: bool,
}

/// Inode number of the root directory.
pub const ROOT: u64 = 1;

/// The model.
pub struct Model {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
}

impl Model {
    /// An empty filesystem whose root belongs to user 0 and has mode 0755.
    pub fn new(clock: Arc<dyn Clock>) -> Model {
        let mut state = State {
            nodes: BTreeMap::new(),
            lookups: BTreeMap::new(),
            next_ino: ROOT + 1,
            label: Vec::new(),
            shut_down: false,
        };
        let kind = Kind::Dir { entries: BTreeMap::new(), parent: ROOT, next_cookie: 3 };
        let caller = Caller { uid: 0, gid: 0, umask: 0 };
        let node = State::new_node(kind, mode::DIRECTORY | 0o755, &caller, clock.now());
        state.nodes.insert(ROOT, Arc::new(Node { nlink: 2, ..node }));
        Model { state: Mutex::new(state), clock }
    }

    /// A model that goes on from a remembered state.
    pub fn from_state(state: State, clock: Arc<dyn Clock>) -> Model {
        Model { state: Mutex::new(state), clock }
    }

    /// What there is now.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Goes back to a remembered state.
    pub fn set_state(&self, state: State) {
        *self.lock() = state;
    }

    /// Unmounts and mounts again: nobody holds anything afterwards.
    pub fn remount(&self) {
        let mut state = self.lock();
        let held: Vec<u64> = std::mem::take(&mut state.lookups).into_keys().collect();
        held.into_iter().for_each(|ino| state.drop_if_dead(ino));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Runs a step that changes things, at one moment.
    fn change<T>(&self, step: impl FnOnce(&mut State, Timestamp) -> Res<T>) -> Result<T, Error> {
        let now = self.clock.now();
        let mut state = self.lock();
        if state.shut_down {
            return Err(Errno::Io.into());
        }
        step(&mut state, now).map_err(Error::from)
    }

    /// Runs a step that only looks.
    fn look<T>(&self, step: impl FnOnce(&State) -> Res<T>) -> Result<T, Error> {
        let state = self.lock();
        if state.shut_down {
            return Err(Errno::Io.into());
        }
        step(&state).map_err(Error::from)
    }
}

impl State {
    /// The inode, or ESTALE.
    pub fn node(&self, ino: u64) -> Res<&Node> {
        self.nodes.get(&ino).map(|node| &**node).ok_or(Errno::Stale)
    }

    fn node_mut(&mut self, ino: u64) -> Res<&mut Node> {
        self.nodes.get_mut(&ino).map(Arc::make_mut).ok_or(Errno::Stale)
    }

    /// The regular file, EISDIR, or EINVAL.
    fn file(&self, ino: u64) -> Res<&Content> {
        match &self.node(ino)?.kind {
            Kind::File(content) => Ok(content),
            Kind::Dir { .. } => Err(Errno::IsDir),
            _ => Err(Errno::Inval),
        }
    }

    fn file_mut(&mut self, ino: u64) -> Res<&mut Content> {
        match &mut self.node_mut(ino)?.kind {
            Kind::File(content) => Ok(content),
            Kind::Dir { .. } => Err(Errno::IsDir),
            _ => Err(Errno::Inval),
        }
    }

    fn new_node(kind: Kind, mode: u32, caller: &Caller, now: Timestamp) -> Node {
        Node {
            kind,
            mode,
            uid: caller.uid,
            gid: caller.gid,
            rdev: 0,
            nlink: 0,
            flags: 0,
            project: 0,
            xattrs: BTreeMap::new(),
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            version: 1,
            linkable: false,
        }
    }

    /// What stat(2) shows.
    pub fn attr(&self, ino: u64) -> Res<Attr> {
        let node = self.node(ino)?;
        Ok(Attr {
            ino: Ino(ino),
            generation: 0,
            mode: node.mode,
            nlink: node.nlink,
            uid: node.uid,
            gid: node.gid,
            rdev: node.rdev,
            size: node.size(),
            blocks: 0,
            atime: node.atime,
            mtime: node.mtime,
            ctime: node.ctime,
            btime: node.btime,
            flags: node.flags,
            project: node.project,
            version: node.version,
        })
    }

    /// As [`State::attr`], counting one lookup.
    fn hand_out(&mut self, ino: u64) -> Res<Attr> {
        let attr = self.attr(ino)?;
        *self.lookups.entry(ino).or_insert(0) += 1;
        Ok(attr)
    }

    fn drop_if_dead(&mut self, ino: u64) {
        let held = self.lookups.contains_key(&ino);
        if !held && self.nodes.get(&ino).is_some_and(|node| node.nlink == 0) {
            self.nodes.remove(&ino);
        }
    }

    /// Whether the inode is held by a lookup count although it has no name.
    pub fn is_orphan(&self, ino: u64) -> bool {
        self.nodes.get(&ino).is_some_and(|node| node.nlink == 0)
    }

    fn touch(&mut self, ino: u64, now: Timestamp, modified: bool) -> Res<()> {
        let node = self.node_mut(ino)?;
        node.ctime = now;
        node.version += 1;
        if modified {
            node.mtime = now;
        }
        Ok(())
    }

    /// The inode of an absolute path given as its components.
    pub fn resolve(&self, path: &[Vec<u8>]) -> Option<u64> {
        path.iter()
            .try_fold(ROOT, |dir, name| Some(self.nodes.get(&dir)?.entries()?.get(name)?.ino))
    }
}

#[cfg(test)]
mod tests;
