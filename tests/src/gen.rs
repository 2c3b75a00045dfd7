//! Operations from a seed.
//!
//! The namespace is small, so that operations meet; offsets lie around the borders at which code
//! changes its mind: sectors, compressed blobs, the end of the file. Operations name files by path,
//! so any part of a list still makes sense: a failing list can be shrunk by leaving some out.

use crate::model::{acl, Node, State, ROOT};
use crate::rng::Rng;
use fs_core::format::inode::{flag, mode};
use fs_core::platform::Timestamp;
use fs_core::vfs::{Caller, Fallocate, RenameFlags, Seek, SetAttr, SetTime, XattrMode};

/// A path as its components; empty for the root.
pub type Path = Vec<Vec<u8>>;

/// The file an operation works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The file with that name.
    Path(Path),
    /// The file that was put into a slot, whatever became of its names.
    Slot(usize),
}

/// What written bytes look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All zero.
    Zeros,
    /// One byte repeated.
    Byte,
    /// Like text: compresses well.
    Text,
    /// Does not compress.
    Noise,
}

/// Bytes to write, described.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Data {
    /// What they look like.
    pub look: Look,
    /// What they follow from.
    pub seed: u64,
    /// How many.
    pub len: usize,
}

impl Data {
    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut rng = Rng::derived(self.seed, 0x6461_7461);
        let mut bytes = vec![0; self.len];
        match self.look {
            Look::Zeros => {}
            Look::Byte => bytes.fill(rng.between(1, 255) as u8),
            Look::Noise => rng.fill(&mut bytes),
            Look::Text => {
                let words: Vec<[u8; 6]> =
                    (0..16).map(|_| std::array::from_fn(|_| b'a' + rng.below(26) as u8)).collect();
                for chunk in bytes.chunks_mut(7) {
                    let word = rng.pick(&words);
                    let len = chunk.len().min(6);
                    chunk[..len].copy_from_slice(&word[..len]);
                    chunk[len..].fill(b' ');
                }
            }
        }
        bytes
    }
}

/// An operation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after the operations of `Filesystem`")]
pub enum Op {
    Mknod {
        path: Path,
        mode: u32,
        rdev: u64,
        caller: Caller,
    },
    Mkdir {
        path: Path,
        mode: u32,
        caller: Caller,
    },
    Symlink {
        path: Path,
        target: Vec<u8>,
        caller: Caller,
    },
    /// Makes a file without a name in a slot.
    Tmpfile {
        dir: Path,
        mode: u32,
        caller: Caller,
        slot: usize,
    },
    Link {
        source: Target,
        path: Path,
    },
    Unlink {
        path: Path,
    },
    Rmdir {
        path: Path,
    },
    Rename {
        from: Path,
        to: Path,
        flags: RenameFlags,
        caller: Caller,
    },
    Lookup {
        path: Path,
    },
    Getattr {
        target: Target,
    },
    Setattr {
        target: Target,
        set: SetAttr,
        caller: Caller,
    },
    Readlink {
        target: Target,
    },
    Read {
        target: Target,
        offset: u64,
        len: usize,
    },
    Write {
        target: Target,
        offset: u64,
        data: Data,
        append: bool,
        kill_priv: bool,
    },
    Fallocate {
        target: Target,
        op: Fallocate,
        offset: u64,
        len: u64,
    },
    Seek {
        target: Target,
        offset: u64,
        what: Seek,
    },
    CopyRange {
        source: Target,
        source_offset: u64,
        target: Target,
        target_offset: u64,
        len: u64,
    },
    DedupeRange {
        source: Target,
        source_offset: u64,
        target: Target,
        target_offset: u64,
        len: u64,
    },
    Readdir {
        target: Target,
    },
    Getxattr {
        target: Target,
        name: Vec<u8>,
    },
    Setxattr {
        target: Target,
        name: Vec<u8>,
        value: Vec<u8>,
        how: XattrMode,
    },
    Listxattr {
        target: Target,
    },
    Removexattr {
        target: Target,
        name: Vec<u8>,
    },
    /// Puts a file into a slot, holding on to it.
    Hold {
        path: Path,
        slot: usize,
    },
    /// Empties a slot.
    Release {
        slot: usize,
    },
    Fsync {
        target: Target,
        data_only: bool,
    },
    Sync,
    SetLabel {
        name: Vec<u8>,
    },
    /// Discards free space.
    Trim,
    /// Closes and opens again.
    Remount,
    DropCaches,
    /// Lets time pass.
    Tick,
}

impl Op {
    /// The same operation below a directory of the root.
    pub fn below(mut self, dir: &[u8]) -> Op {
        let down = |path: &mut Path| path.insert(0, dir.to_vec());
        match &mut self {
            Op::Mknod { path, .. }
            | Op::Mkdir { path, .. }
            | Op::Symlink { path, .. }
            | Op::Tmpfile { dir: path, .. }
            | Op::Unlink { path }
            | Op::Rmdir { path }
            | Op::Lookup { path }
            | Op::Hold { path, .. } => down(path),
            Op::Rename { from, to, .. } => [from, to].into_iter().for_each(down),
            Op::Link { source, path } => {
                source.path_mut().into_iter().for_each(down);
                down(path);
            }
            Op::CopyRange { source, target, .. } | Op::DedupeRange { source, target, .. } => {
                [source, target].into_iter().filter_map(Target::path_mut).for_each(down);
            }
            Op::Getattr { target }
            | Op::Setattr { target, .. }
            | Op::Readlink { target }
            | Op::Read { target, .. }
            | Op::Write { target, .. }
            | Op::Fallocate { target, .. }
            | Op::Seek { target, .. }
            | Op::Readdir { target }
            | Op::Getxattr { target, .. }
            | Op::Setxattr { target, .. }
            | Op::Listxattr { target }
            | Op::Removexattr { target, .. }
            | Op::Fsync { target, .. } => target.path_mut().into_iter().for_each(down),
            Op::Release { .. }
            | Op::Sync
            | Op::SetLabel { .. }
            | Op::Trim
            | Op::Remount
            | Op::DropCaches
            | Op::Tick => {}
        }
        self
    }
}

impl Target {
    fn path_mut(&mut self) -> Option<&mut Path> {
        match self {
            Target::Path(path) => Some(path),
            Target::Slot(_) => None,
        }
    }
}

/// How many slots there are.
pub const SLOTS: usize = 3;

/// What to generate.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Files rarely grow beyond this.
    pub file_bytes: u64,
    /// Whether a file may be given a size of terabytes.
    pub huge: bool,
    /// How many in a hundred operations make things durable.
    pub sync_percent: u64,
    /// How many in a thousand close and open again.
    pub remount_permille: u64,
    /// Whether operations that change nothing are wanted.
    pub reads: bool,
    /// Whether files are to grow until there is no room.
    pub growth: bool,
    /// How many in a hundred begin to write one thing to two places, and to share it then.
    pub twins_percent: u64,
}

impl Options {
    /// For comparing with the model.
    pub const MODEL: Options = Options {
        file_bytes: 600 << 10,
        huge: true,
        sync_percent: 4,
        remount_permille: 15,
        reads: true,
        growth: false,
        twins_percent: 2,
    };
    /// For filling a small pool.
    pub const FILL: Options =
        Options { file_bytes: 3 << 20, huge: false, growth: true, ..Options::MODEL };
    /// For crash simulation: small, many sync points, one mount.
    pub const CRASH: Options = Options {
        file_bytes: 96 << 10,
        huge: false,
        sync_percent: 20,
        remount_permille: 0,
        reads: false,
        growth: false,
        twins_percent: 4,
    };
}

/// With fewer inodes than this, most operations would find nothing to work on.
const FEW: usize = 5;

/// Makes operations.
pub struct Generator {
    rng: Rng,
    options: Options,
    /// What was begun, the last first.
    begun: Vec<Op>,
}

impl Generator {
    /// The operations of `seed`.
    pub fn new(seed: u64, options: Options) -> Generator {
        Generator { rng: Rng::derived(seed, 0x6f70_7321), options, begun: Vec::new() }
    }

    /// The next operation, for a filesystem that looks like `state` now.
    pub fn next(&mut self, state: &State) -> Op {
        if let Some(op) = self.begun.pop() {
            return op;
        }
        let twins = self.options.twins_percent;
        if twins > 0 && self.rng.below(100) < twins {
            return self.twins(state);
        }
        if self.rng.below(1000) < self.options.remount_permille {
            return Op::Remount;
        }
        if self.rng.below(100) < self.options.sync_percent {
            return self.durability(state);
        }
        if state.nodes.len() < FEW && self.rng.chance(1, 2) {
            let mode = mode::REGULAR | 0o644;
            return Op::Mknod { path: self.new_path(state), mode, rdev: 0, caller: self.caller() };
        }
        if self.options.growth && self.rng.chance(1, 6) {
            let len = self.rng.between(1 << 16, 1 << 20) as usize;
            let data = Data { look: Look::Noise, seed: self.rng.next_u64(), len };
            let target = self.file(state);
            return Op::Write { target, offset: 0, data, append: true, kill_priv: false };
        }
        match self.rng.below(if self.options.reads { 100 } else { 78 }) {
            0..=29 => self.naming(state),
            30..=59 => self.data(state),
            60..=77 => self.attributes(state),
            _ => self.reading(state),
        }
    }

    fn durability(&mut self, state: &State) -> Op {
        match self.rng.below(11) {
            0..=4 => Op::Fsync { target: self.file(state), data_only: self.rng.chance(1, 3) },
            5 => Op::Fsync { target: Target::Path(self.dir(state)), data_only: false },
            6 => Op::Sync,
            7 => Op::Trim,
            8 => Op::DropCaches,
            _ => Op::Tick,
        }
    }

    fn naming(&mut self, state: &State) -> Op {
        let caller = self.caller();
        match self.rng.below(21) {
            0..=4 => {
                let mode = mode::REGULAR | self.permissions();
                Op::Mknod { path: self.new_path(state), mode, rdev: 0, caller }
            }
            5 => {
                let kinds = [mode::CHAR, mode::BLOCK, mode::FIFO, mode::SOCKET];
                let mode = *self.rng.pick(&kinds) | self.permissions();
                let rdev = self.rng.below(256) << 32 | self.rng.below(1 << 20);
                Op::Mknod { path: self.new_path(state), mode, rdev, caller }
            }
            6..=7 => Op::Mkdir { path: self.new_path(state), mode: self.permissions(), caller },
            8 => {
                let len = *self.rng.pick(&[1, 10, 59, 200, 1000, 4095, 4096]);
                let target = Data { look: Look::Text, seed: self.rng.next_u64(), len }.bytes();
                Op::Symlink { path: self.new_path(state), target, caller }
            }
            9 => {
                let slot = self.slot();
                Op::Tmpfile { dir: self.dir(state), mode: self.permissions(), caller, slot }
            }
            10..=11 => Op::Link { source: self.file(state), path: self.new_path(state) },
            12..=13 => Op::Unlink { path: self.old_path(state) },
            14 => {
                let is_empty = |node: &Node| node.entries().is_some_and(|e| e.is_empty());
                let empty = self.existing(state, is_empty).filter(|_| self.rng.chance(3, 4));
                let path = empty.unwrap_or_else(|| self.dir(state));
                Op::Rmdir { path }
            }
            15 => Op::Hold { path: self.old_path(state), slot: self.slot() },
            16 => Op::Release { slot: self.slot() },
            _ => {
                let flags = RenameFlags {
                    no_replace: self.rng.chance(1, 8),
                    exchange: self.rng.chance(1, 5),
                    whiteout: self.rng.chance(1, 12),
                };
                let to =
                    if self.rng.chance(1, 2) { self.new_path(state) } else { self.old_path(state) };
                Op::Rename { from: self.old_path(state), to, flags, caller }
            }
        }
    }

    fn data(&mut self, state: &State) -> Op {
        let target = self.file(state);
        let size = size_of(state, &target);
        let offset = self.offset(size);
        match self.rng.below(20) {
            0..=10 => {
                let data = self.bytes();
                let (append, kill_priv) = (self.rng.chance(1, 5), self.rng.chance(1, 6));
                Op::Write { target, offset, data, append, kill_priv }
            }
            11..=13 => {
                let set = SetAttr { size: Some(offset), ..SetAttr::default() };
                Op::Setattr { target, set, caller: self.caller() }
            }
            14..=16 => self.fallocate(target, offset),
            _ => {
                let source = self.file(state);
                let source_offset = self.offset(size_of(state, &source));
                let mut len = self.length();
                let mut offsets = (source_offset, offset);
                if self.rng.chance(2, 3) {
                    // What can be shared must be aligned.
                    offsets = (source_offset & !4095, offset & !4095);
                    len = (len | 4095) + 1;
                }
                let (source_offset, target_offset) = offsets;
                Op::CopyRange { source, source_offset, target, target_offset, len }
            }
        }
    }

    /// Writes the same to two places, now and then with something between, and shares it: all of
    /// it, a part, or more than is equal.
    fn twins(&mut self, state: &State) -> Op {
        let (source, target) = (self.file(state), self.file(state));
        let data = self.bytes();
        let mut offsets = [&source, &target].map(|file| self.offset(size_of(state, file)) & !4095);
        let are_whole = self.rng.chance(1, 3);
        if are_whole {
            offsets = [0, 0];
        }
        let [source_offset, target_offset] = offsets;
        let len = data.len as u64;
        for _ in 0..self.rng.between(1, 2) {
            let skip = match self.rng.below(3) {
                0 => self.rng.below(len.div_ceil(4096)) * 4096,
                _ => 0,
            };
            let len = match self.rng.below(6) {
                0 => self.rng.between(0, len),
                1 => (len - skip) / 4096 * 4096,
                2 => len - skip + self.rng.below(3) * 4096,
                _ => len - skip,
            };
            let (mut from, to) = ((source.clone(), source_offset), (target.clone(), target_offset));
            if self.rng.chance(1, 8) {
                from.1 += 1;
            }
            self.begun.push(Op::DedupeRange {
                source: from.0,
                source_offset: from.1 + skip,
                target: to.0,
                target_offset: to.1 + skip,
                len,
            });
            if self.rng.chance(1, 3) {
                let between = self.durability(state);
                self.begun.push(between);
            }
        }
        for (file, offset) in [(&source, source_offset), (&target, target_offset)] {
            let (target, append) = (file.clone(), false);
            self.begun.push(Op::Write { target, offset, data, append, kill_priv: false });
            if are_whole {
                let set = SetAttr { size: Some(0), ..SetAttr::default() };
                let (target, caller) = (file.clone(), self.caller());
                self.begun.push(Op::Setattr { target, set, caller });
            }
            if self.rng.chance(1, 4) {
                let between = self.durability(state);
                self.begun.push(between);
            }
        }
        self.begun.pop().expect("both writes were pushed")
    }

    fn fallocate(&mut self, target: Target, mut offset: u64) -> Op {
        let keep_size = self.rng.chance(1, 2);
        let op = *self.rng.pick(&[
            Fallocate::Allocate { keep_size },
            Fallocate::PunchHole,
            Fallocate::ZeroRange { keep_size },
            Fallocate::CollapseRange,
            Fallocate::InsertRange,
        ]);
        let mut len = self.length();
        let moves = matches!(op, Fallocate::CollapseRange | Fallocate::InsertRange);
        if moves && self.rng.chance(7, 8) {
            offset &= !4095;
            len = (len & !4095).max(4096);
        }
        Op::Fallocate { target, op, offset, len }
    }

    fn attributes(&mut self, state: &State) -> Op {
        let target = self.any(state);
        match self.rng.below(10) {
            0..=3 => {
                let set = self.set_attr();
                Op::Setattr { target, set, caller: self.caller() }
            }
            4..=7 => {
                let name = self.xattr_name();
                let value = self.xattr_value(&name);
                let is_acl = name.starts_with(b"system.");
                let how = match self.rng.below(4) {
                    0 if !is_acl => XattrMode::Create,
                    1 if !is_acl => XattrMode::Replace,
                    _ => XattrMode::Either,
                };
                Op::Setxattr { target, name, value, how }
            }
            8 => Op::Removexattr { target, name: self.xattr_name() },
            _ => {
                let len = *self.rng.pick(&[0, 5, 63, 64]);
                Op::SetLabel { name: Data { look: Look::Text, seed: 1, len }.bytes() }
            }
        }
    }

    fn reading(&mut self, state: &State) -> Op {
        let target = self.any(state);
        match self.rng.below(12) {
            0..=3 => {
                let target = self.file(state);
                let offset = self.offset(size_of(state, &target));
                Op::Read { target, offset, len: self.length() as usize }
            }
            4..=6 => {
                let target = self.file(state);
                let offset = self.offset(size_of(state, &target));
                let what = *self.rng.pick(&[Seek::Data, Seek::Hole]);
                Op::Seek { target, offset, what }
            }
            7 => Op::Lookup { path: self.new_path(state) },
            8 => Op::Getattr { target },
            9 => Op::Readdir { target: Target::Path(self.dir(state)) },
            10 => Op::Getxattr { target, name: self.xattr_name() },
            _ => match self.rng.below(2) {
                0 => Op::Readlink { target },
                _ => Op::Listxattr { target },
            },
        }
    }

    fn caller(&mut self) -> Caller {
        Caller {
            uid: *self.rng.pick(&[0, 0, 1000]),
            gid: *self.rng.pick(&[0, 100, 1000]),
            umask: *self.rng.pick(&[0, 0o022, 0o077]),
        }
    }

    fn permissions(&mut self) -> u32 {
        *self.rng.pick(&[0o644, 0o755, 0o600, 0o777, 0o2775, 0o4755, 0o000, 0o1777])
    }

    fn slot(&mut self) -> usize {
        self.rng.below(SLOTS as u64) as usize
    }

    fn name(&mut self) -> Vec<u8> {
        match self.rng.below(30) {
            0 => vec![b'L'; 255],
            1 => vec![b'M'; 256],
            2 => b"\xff\xfe odd\nname".to_vec(),
            n => vec![b'a' + (n % 5) as u8],
        }
    }

    /// A path in a directory that exists (nearly always), whose last name may or may not exist.
    fn new_path(&mut self, state: &State) -> Path {
        let mut path = self.dir(state);
        if path.len() >= 3 {
            path.clear();
        }
        path.push(self.name());
        path
    }

    fn old_path(&mut self, state: &State) -> Path {
        self.existing(state, |_| true).unwrap_or_else(|| vec![self.name()])
    }

    fn dir(&mut self, state: &State) -> Path {
        if self.rng.chance(1, 3) {
            return Vec::new();
        }
        if self.rng.chance(1, 20) {
            return self.old_path(state);
        }
        self.existing(state, Node::is_dir).unwrap_or_default()
    }

    fn file(&mut self, state: &State) -> Target {
        if self.rng.chance(1, 8) {
            return Target::Slot(self.slot());
        }
        if self.rng.chance(1, 30) {
            return Target::Path(self.old_path(state));
        }
        let path = self.existing(state, |node| node.content().is_some());
        Target::Path(path.unwrap_or_else(|| vec![self.name()]))
    }

    fn any(&mut self, state: &State) -> Target {
        match self.rng.below(8) {
            0 => Target::Slot(self.slot()),
            1 => Target::Path(Vec::new()),
            _ => Target::Path(self.old_path(state)),
        }
    }

    fn existing(&mut self, state: &State, wanted: impl Fn(&Node) -> bool) -> Option<Path> {
        let mut found = Vec::new();
        let mut todo = vec![(Path::new(), ROOT)];
        while let Some((path, dir)) = todo.pop() {
            let entries = state.nodes[&dir].entries().expect("only directories are put there");
            for (name, entry) in entries {
                let node = &state.nodes[&entry.ino];
                let mut child = path.clone();
                child.push(name.clone());
                if node.is_dir() {
                    todo.push((child.clone(), entry.ino));
                }
                if wanted(node) {
                    found.push(child);
                }
            }
        }
        (!found.is_empty()).then(|| self.rng.pick(&found).clone())
    }

    fn offset(&mut self, size: u64) -> u64 {
        if self.options.huge && self.rng.chance(1, 200) {
            return self.rng.between(1 << 40, 1 << 41);
        }
        let max = self.options.file_bytes;
        let base = match self.rng.below(8) {
            0 => 0,
            1 => self.rng.below(max),
            2..=3 => self.rng.below(max / 4096) * 4096,
            4 => self.rng.below(max.div_ceil(128 << 10)) * (128 << 10),
            5 => self.rng.below(4096),
            _ => size,
        };
        match self.rng.below(5) {
            0 => base + 1,
            1 => base.saturating_sub(1),
            2 => base.saturating_sub(self.rng.below(5000)),
            _ => base,
        }
    }

    fn length(&mut self) -> u64 {
        let most = self.options.file_bytes / 2;
        let len = match self.rng.below(8) {
            0 => self.rng.between(1, 16),
            1..=2 => self.rng.between(1, 4096),
            3 => *self.rng.pick(&[4095, 4096, 4097, 8192, 3072, 3073]),
            4..=5 => self.rng.between(1, 20_000),
            6 => (128 << 10) - 1 + self.rng.below(3),
            _ => self.rng.between(1, most),
        };
        len.min(most)
    }

    fn bytes(&mut self) -> Data {
        let look = *self.rng.pick(&[Look::Text, Look::Text, Look::Noise, Look::Byte, Look::Zeros]);
        Data { look, seed: self.rng.next_u64(), len: self.length() as usize }
    }

    fn set_attr(&mut self) -> SetAttr {
        let mut set = SetAttr::default();
        match self.rng.below(8) {
            0..=2 => set.mode = Some(self.permissions()),
            3 => {
                set.uid = Some(self.rng.below(3) as u32 * 500);
                set.kill_priv = self.rng.chance(1, 2);
            }
            4 => {
                set.gid = Some(self.rng.below(3) as u32 * 500);
                set.kill_priv = self.rng.chance(1, 2);
            }
            5 => {
                let nanos = self.rng.below(1_000_000_000) as u32;
                let time = Timestamp { secs: self.rng.below(1 << 33) as i64 - (1 << 31), nanos };
                set.atime = Some(SetTime::Now);
                set.mtime = Some(SetTime::At(time));
            }
            6 => {
                let flags = [0, 0, 0, flag::NODUMP, flag::NOATIME | flag::SYNC, flag::IMMUTABLE];
                set.flags = Some(*self.rng.pick(&flags));
                if self.rng.chance(1, 10) {
                    set.flags = Some(1 << 31);
                }
            }
            _ => set.project = Some(self.rng.below(5) as u32),
        }
        set
    }

    fn xattr_name(&mut self) -> Vec<u8> {
        match self.rng.below(9) {
            0 => acl::ACCESS.to_vec(),
            1 => acl::DEFAULT.to_vec(),
            2 => b"security.capability".to_vec(),
            3 => b"trusted.t".to_vec(),
            4 => [b"user.", &[b'n'; 250][..]].concat(),
            n => vec![b'u', b's', b'e', b'r', b'.', b'a' + n as u8 % 3],
        }
    }

    fn xattr_value(&mut self, name: &[u8]) -> Vec<u8> {
        if name.starts_with(b"system.") {
            let perms = std::array::from_fn(|_| self.rng.below(8) as u16);
            return match self.rng.below(8) {
                0 => acl::Acl::minimal(self.permissions()).to_bytes(),
                1 => b"\x02\0\0\0\x01\0\x01\0".to_vec(),
                _ => acl::Acl::sample(perms).to_bytes(),
            };
        }
        let len = *self.rng.pick(&[0, 1, 20, 300, 1024, 1025, 2048, 2049, 5000, 65536, 65537]);
        let look = *self.rng.pick(&[Look::Text, Look::Noise]);
        Data { look, seed: self.rng.next_u64(), len }.bytes()
    }
}

fn size_of(state: &State, target: &Target) -> u64 {
    let Target::Path(path) = target else { return 10_000 };
    let content = state.resolve(path).and_then(|ino| state.nodes[&ino].content());
    content.map_or(0, |content| content.size())
}
