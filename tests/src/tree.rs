//! Everything a user can see of a filesystem, as one value.
//!
//! Two filesystems number their inodes as they like. So a file's identity here is its place in the
//! sorted order of paths: names of one file have one identity, and equal trees are equal values.
//!
//! Left out: `blocks`, `version`, times, the size of directories, cookies, order of entries.

use crate::model::{Content, Kind, State, ROOT};
use fs_core::error::Error;
use fs_core::format::inode::mode;
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::{Attr, Filesystem, Seek};
use std::collections::BTreeMap;
use std::fmt;

/// Files longer than this are read where `seek` says there is data.
const READ_WHOLE_MAX: u64 = 8 << 20;
const READ_STEP: usize = 256 << 10;

/// What is the same for all names of a file, but for its content.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named by stat(2)")]
pub struct Facts {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u64,
    pub flags: u32,
    pub project: u32,
    /// Target of a symlink, else empty.
    pub target: Vec<u8>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Why a tree could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// An operation failed.
    Failed {
        /// Which, on what.
        what: String,
        /// How.
        error: Error,
    },
    /// Operations contradict each other.
    Wrong(String),
}

impl Trouble {
    fn at(self, path: &[u8]) -> Trouble {
        let path = show(path);
        match self {
            Trouble::Failed { what, error } => {
                Trouble::Failed { what: format!("{path}: {what}"), error }
            }
            Trouble::Wrong(what) => Trouble::Wrong(format!("{path}: {what}")),
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Failed { what, error } => write!(f, "{what}: {error}"),
            Trouble::Wrong(what) => write!(f, "{what}"),
        }
    }
}

impl From<Trouble> for String {
    fn from(trouble: Trouble) -> String {
        trouble.to_string()
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(Error) -> Trouble {
    let what = what.into();
    move |error| Trouble::Failed { what, error }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, Trouble> {
    Err(Trouble::Wrong(what.into()))
}

/// A file with a name.
#[derive(Clone, Debug)]
pub struct File {
    /// Its inode number where it was seen; not compared.
    pub ino: u64,
    /// Its modification time; not compared, because two filesystems look at the clock when they
    /// like.
    pub mtime: Timestamp,
    /// What does not depend on its content.
    pub facts: Facts,
    /// Content of a regular file.
    pub content: Option<Content>,
}

/// A path: `/`, or names each after a `/`.
pub type Path = Vec<u8>;

/// A filesystem as seen at one moment.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Identity of each path.
    pub names: BTreeMap<Path, usize>,
    /// Files by identity.
    pub files: Vec<File>,
}

/// A path for messages.
pub fn show(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    if text.len() <= 60 {
        return text.into_owned();
    }
    let cut: String = text.chars().take(40).collect();
    format!("{cut}...({} bytes)", path.len())
}

fn join(dir: &[u8], name: &[u8]) -> Path {
    let mut path = if dir == b"/" { Vec::new() } else { dir.to_vec() };
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

impl Tree {
    /// What the filesystem shows, read through its operations.
    ///
    /// # Errors
    /// What could not be read or contradicts itself.
    pub fn read(fs: &dyn Filesystem) -> Result<Tree, Trouble> {
        let mut paths = BTreeMap::from([(b"/".to_vec(), fs.root().0)]);
        let mut todo = vec![(b"/".to_vec(), fs.root())];
        while let Some((path, dir)) = todo.pop() {
            for (name, ino, is_dir) in read_dir(fs, dir).map_err(|e| e.at(&path))? {
                let child = join(&path, &name);
                if is_dir {
                    todo.push((child.clone(), ino));
                }
                paths.insert(child, ino.0);
            }
        }
        Tree::number(paths, |ino| read_file(fs, Ino(ino)))
    }

    /// What a state of the model shows.
    pub fn of_state(state: &State) -> Tree {
        let mut paths = BTreeMap::from([(b"/".to_vec(), ROOT)]);
        let mut todo = vec![(b"/".to_vec(), ROOT)];
        while let Some((path, dir)) = todo.pop() {
            let node = &state.nodes[&dir];
            for (name, entry) in node.entries().expect("a directory") {
                let child = join(&path, name);
                if state.nodes[&entry.ino].is_dir() {
                    todo.push((child.clone(), entry.ino));
                }
                paths.insert(child, entry.ino);
            }
        }
        let file = |ino| {
            let attr = state.attr(ino).expect("named inodes exist");
            let node = &state.nodes[&ino];
            let target = match &node.kind {
                Kind::Symlink(target) => target.clone(),
                _ => Vec::new(),
            };
            let facts = facts(&attr, target, node.xattrs.clone());
            Ok(File { ino, mtime: node.mtime, facts, content: node.content().cloned() })
        };
        Tree::number(paths, file).expect("a state of the model can be read")
    }

    fn number(
        paths: BTreeMap<Path, u64>,
        read: impl Fn(u64) -> Result<File, Trouble>,
    ) -> Result<Tree, Trouble> {
        let mut tree = Tree::default();
        let mut identities = BTreeMap::new();
        for (path, ino) in paths {
            let identity = match identities.get(&ino) {
                Some(identity) => *identity,
                None => {
                    tree.files.push(read(ino).map_err(|e| e.at(&path))?);
                    identities.insert(ino, tree.files.len() - 1);
                    tree.files.len() - 1
                }
            };
            tree.names.insert(path, identity);
        }
        Ok(tree)
    }

    /// What is at and below a directory of the root.
    pub fn below(&self, dir: &[u8]) -> Tree {
        let mut below = Tree::default();
        let mut identities = BTreeMap::new();
        let prefix = [b"/", dir].concat();
        let inside = |path: &Path| {
            path.strip_prefix(&prefix[..]).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        for (path, identity) in self.names.iter().filter(|(path, _)| inside(path)) {
            let identity = *identities.entry(*identity).or_insert_with(|| {
                below.files.push(self.files[*identity].clone());
                below.files.len() - 1
            });
            below.names.insert(path.clone(), identity);
        }
        below
    }

    /// The first way in which names, types, attributes or links differ.
    pub fn namespace_difference(&self, other: &Tree) -> Option<String> {
        if let Some(path) = self.names.keys().find(|path| !other.names.contains_key(*path)) {
            return Some(format!("{} is only in the first", show(path)));
        }
        if let Some(path) = other.names.keys().find(|path| !self.names.contains_key(*path)) {
            return Some(format!("{} is only in the second", show(path)));
        }
        let differs = |(path, identity): (&Path, &usize)| {
            let other_identity = other.names[path];
            if *identity != other_identity {
                return Some(format!("{} is linked differently", show(path)));
            }
            let (a, b) = (&self.files[*identity].facts, &other.files[*identity].facts);
            (a != b).then(|| format!("{}: {a:?} != {b:?}", show(path)))
        };
        self.names.iter().find_map(differs)
    }

    /// The first way in which the two differ, as a sentence.
    pub fn difference(&self, other: &Tree) -> Option<String> {
        if let Some(difference) = self.namespace_difference(other) {
            return Some(difference);
        }
        self.names.iter().find_map(|(path, identity)| {
            let (a, b) = (&self.files[*identity].content, &other.files[*identity].content);
            let (a, b) = (a.as_ref()?, b.as_ref()?);
            if a.size() != b.size() {
                return Some(format!("{}: size {} != {}", show(path), a.size(), b.size()));
            }
            let page = a.first_difference(b)?;
            let (x, y) = (a.page(page), b.page(page));
            let byte = x.iter().zip(y).position(|(x, y)| x != y).expect("pages differ");
            let offset = page * 4096 + byte as u64;
            Some(format!("{}: byte {offset}: {:#x} != {:#x}", show(path), x[byte], y[byte]))
        })
    }
}

fn facts(attr: &Attr, target: Vec<u8>, xattrs: BTreeMap<Vec<u8>, Vec<u8>>) -> Facts {
    Facts {
        mode: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        nlink: attr.nlink,
        rdev: attr.rdev,
        flags: attr.flags,
        project: attr.project,
        target,
        xattrs,
    }
}

/// Names, inodes and "is a directory" of a directory's entries, having looked at them in every way
/// there is.
fn read_dir(fs: &dyn Filesystem, dir: Ino) -> Result<Vec<(Vec<u8>, Ino, bool)>, Trouble> {
    let mut plain = Vec::new();
    fs.readdir(dir, 0, &mut |e| {
        plain.push((e.cookie, e.ino, e.file_type, e.name.to_vec()));
        true
    })
    .map_err(failed("readdir"))?;
    if !plain.windows(2).all(|w| w[0].0 < w[1].0) {
        return wrong("cookies do not ascend");
    }
    let mut plus = Vec::new();
    let mut strange = None;
    fs.readdir_plus(dir, 0, &mut |e, attr| {
        plus.push((e.cookie, e.ino, e.file_type, e.name.to_vec()));
        match attr {
            Some(attr) if attr.ino == e.ino && attr.mode & mode::TYPE == e.file_type => {}
            // Nobody needs these to say more.
            None if e.name == b"." || e.name == b".." => {}
            _ => strange = Some(format!("entry {}: attributes {attr:?}", show(e.name))),
        }
        true
    })
    .map_err(failed("readdir_plus"))?;
    for (_, ino, _, name) in &plus {
        if name != b"." && name != b".." {
            fs.forget(*ino, 1);
        }
    }
    if let Some(strange) = strange {
        return wrong(strange);
    }
    if plain != plus {
        return wrong("readdir and readdir_plus differ");
    }
    resumes(fs, dir, &plain)?;
    let dots: Vec<_> = plain.iter().take(2).map(|e| e.3.as_slice()).collect();
    if dots != [&b"."[..], b".."] {
        return wrong("the first entries are not . and ..");
    }
    let mut entries = Vec::new();
    for (_, ino, file_type, name) in plain.into_iter().skip(2) {
        let attr = fs.lookup(dir, &name).map_err(failed(format!("lookup {}", show(&name))))?;
        fs.forget(attr.ino, 1);
        if attr.ino != ino {
            return wrong(format!("{} is inode {} and {ino}", show(&name), attr.ino));
        }
        entries.push((name, ino, file_type == mode::DIRECTORY));
    }
    Ok(entries)
}

/// Reading goes on after any entry with the one that follows.
fn resumes(fs: &dyn Filesystem, dir: Ino, all: &[(u64, Ino, u32, Vec<u8>)]) -> Result<(), Trouble> {
    for pair in all.windows(2) {
        let mut next = None;
        fs.readdir(dir, pair[0].0, &mut |e| {
            next = Some(e.cookie);
            false
        })
        .map_err(failed("readdir"))?;
        if next != Some(pair[1].0) {
            return wrong(format!("after cookie {} comes {next:?}", pair[0].0));
        }
    }
    Ok(())
}

fn read_file(fs: &dyn Filesystem, ino: Ino) -> Result<File, Trouble> {
    let attr = fs.getattr(ino).map_err(failed("getattr"))?;
    let file_type = attr.mode & mode::TYPE;
    let target = match file_type {
        mode::SYMLINK => fs.readlink(ino).map_err(failed("readlink"))?,
        _ => Vec::new(),
    };
    if file_type == mode::SYMLINK && attr.size != target.len() as u64 {
        return wrong(format!("size {} of a symlink to {} bytes", attr.size, target.len()));
    }
    let content = match file_type {
        mode::REGULAR => Some(read_content(fs, &attr)?),
        _ => None,
    };
    let facts = facts(&attr, target, read_xattrs(fs, ino)?);
    Ok(File { ino: ino.0, mtime: attr.mtime, facts, content })
}

fn read_xattrs(fs: &dyn Filesystem, ino: Ino) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Trouble> {
    let list = fs.listxattr(ino).map_err(failed("listxattr"))?;
    let mut xattrs = BTreeMap::new();
    for name in list.split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let what = format!("getxattr {}", show(name));
        let value = fs.getxattr(ino, name).map_err(failed(what))?;
        if xattrs.insert(name.to_vec(), value).is_some() {
            return wrong(format!("attribute {} twice", show(name)));
        }
    }
    Ok(xattrs)
}

fn read_content(fs: &dyn Filesystem, attr: &Attr) -> Result<Content, Trouble> {
    let mut content = Content::default();
    content.truncate(attr.size);
    let mut buf = vec![0; READ_STEP];
    let mut offset = 0;
    while offset < attr.size {
        if attr.size > READ_WHOLE_MAX {
            match fs.seek(attr.ino, offset, Seek::Data) {
                Ok(data) => offset = data,
                Err(Error::Posix(fs_core::error::Errno::NxIo)) => break,
                Err(error) => return Err(failed(format!("seek at {offset}"))(error)),
            }
        }
        let want = (attr.size - offset).min(READ_STEP as u64) as usize;
        let count = fs
            .read(attr.ino, offset, &mut buf[..want])
            .map_err(failed(format!("read at {offset}")))?;
        if count != want {
            return wrong(format!("read at {offset}: {count} bytes of {want}"));
        }
        let mut done = 0;
        while done < count {
            let part = (4096 - (offset as usize + done) % 4096).min(count - done);
            if buf[done..done + part].iter().any(|b| *b != 0) {
                content.write(offset + done as u64, &buf[done..done + part]);
            }
            done += part;
        }
        offset += count as u64;
    }
    Ok(content)
}
