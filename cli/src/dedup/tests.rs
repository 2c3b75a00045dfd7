//! The whole of it on a pool in memory, but for the walk over a mount.

use super::*;
use cairn_host::dedupe;
use fs_core::engine::versions::{PropertyChange, VersionOp};
use fs_core::engine::{self, FormatOptions, OpenOptions};
use fs_core::format::inode::flag;
use fs_core::testing::{RamDevice, TestPlatform};
use fs_core::units::{Ino, TreeId};
use fs_core::vfs::{AccessTime, Caller, Filesystem, Forest, SetAttr, Volume, WriteFlags};
use std::sync::Arc;

const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const BLOCK: u64 = 128 << 10;

type Meanwhile = Box<dyn FnOnce(&Forest)>;

/// A daemon that counts.
struct Daemon {
    forest: Arc<Forest>,
    hashed: u64,
    shares: u64,
    /// Is carried out before the first range is shared.
    before: Option<Meanwhile>,
}

impl Ask for Daemon {
    fn ask(&mut self, question: Question) -> Result<Result<Answer, String>, Failure> {
        match &question {
            Question::Hashes { indices, .. } => self.hashed += indices.len() as u64,
            Question::Share { .. } => {
                self.shares += 1;
                if let Some(before) = self.before.take() {
                    before(&self.forest);
                }
            }
            Question::Places { .. } => {}
        }
        Ok(dedupe::answer(&self.forest, &question))
    }
}

impl Daemon {
    fn new() -> Daemon {
        let device = RamDevice::new(256 << 20);
        let platform = TestPlatform::new(1).platform;
        let options = FormatOptions::default();
        engine::format(vec![device.device()], platform.clone(), &options).unwrap();
        let (options, times) = (OpenOptions::default(), AccessTime::Relative);
        let volume = Volume::open(vec![device.device()], platform, &options, times).unwrap();
        Daemon { forest: Forest::new(volume), hashed: 0, shares: 0, before: None }
    }

    fn file(&self, dir: Ino, name: &str, content: &[u8]) -> u64 {
        let made = self.forest.mknod(dir, name.as_bytes(), 0o100644, 0, &CALLER).unwrap();
        self.forest.write(made.ino, 0, content, WriteFlags::default()).unwrap();
        made.ino.0
    }

    fn read(&self, ino: u64) -> Vec<u8> {
        let size = self.forest.getattr(Ino(ino)).unwrap().size;
        let mut out = vec![0; size as usize];
        assert_eq!(self.forest.read(Ino(ino), 0, &mut out).unwrap() as u64, size);
        out
    }

    /// Looks at these files.
    fn dedup(&mut self, inos: &[u64], how: &How) -> (Seen, u64) {
        self.forest.sync().unwrap();
        let mut files = Files::new().unwrap();
        for ino in inos {
            let size = self.forest.getattr(Ino(*ino)).map_or(0, |attr| attr.size);
            files.push(Path::new(&format!("/file {ino}")), *ino, size).unwrap();
        }
        files.finish().unwrap();
        let (mut told, mut seen) = (Told::new(true), Seen::default());
        (self.hashed, self.shares) = (0, 0);
        let blocks = examine(self, &files, how, &mut told, &mut seen).unwrap();
        share::all(self, &files, &blocks, how, &mut told, &mut seen).unwrap();
        (seen, told.count)
    }
}

fn how() -> How {
    How { block: BLOCK, memory: 1 << 20, dry_run: false, verbose: false }
}

/// Bytes of a kind of their own.
fn kind(number: u32, len: u64) -> impl Iterator<Item = u8> {
    let mut state = u64::from(number) << 8 | 1;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(len as usize)
}

/// A block for each number; those of equal numbers are equal.
fn blocks(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| kind(*number, BLOCK)).collect()
}

#[test]
fn what_is_equal_is_shared_once_and_read_once() {
    let mut daemon = Daemon::new();
    let root = daemon.forest.root();
    let tail = [blocks(&[1, 2, 3]), b"and a tail".to_vec()].concat();
    let contents = [tail.clone(), tail, blocks(&[9, 2, 3, 4]), blocks(&[4, 4, 8])];
    let names = ["one", "two", "three", "four"];
    let inos: Vec<u64> =
        names.iter().zip(&contents).map(|(name, all)| daemon.file(root, name, all)).collect();
    let dry = How { dry_run: true, ..how() };
    let expected = 3 * BLOCK + 10 + 2 * BLOCK + 2 * BLOCK;
    let (seen, errors) = daemon.dedup(&inos, &dry);
    let all = contents.iter().map(|content| content.len() as u64).sum();
    let wanted = Seen {
        files: 4,
        examined: all,
        read: all,
        shared: expected,
        shared_files: 3,
        ..Seen::default()
    };
    assert_eq!((seen, errors, daemon.shares), (wanted, 0, 0));
    let (seen, errors) = daemon.dedup(&inos, &how());
    assert_eq!((seen, errors), (wanted, 0));
    // Runs: all of "two"; 2 and 3 of "three"; twice 4 of "four".
    assert_eq!(daemon.shares, 4);
    let (seen, errors) = daemon.dedup(&inos, &how());
    // One of each is read: what is shared is at one place.
    let read = all - expected;
    let again = Seen { files: 4, examined: all, read, before: expected, ..Seen::default() };
    assert_eq!((seen, errors, daemon.shares), (again, 0, 0));
    for (ino, content) in inos.iter().zip(&contents) {
        assert!(daemon.read(*ino) == *content);
    }
}

#[test]
fn with_little_memory_as_much_is_shared() {
    let mut daemon = Daemon::new();
    let root = daemon.forest.root();
    let small = How { block: 4096, memory: 1, ..how() };
    let most = small.entries::<[u8; 16], [u8; 24]>() as u32;
    // More contents than can be remembered, each twice, far apart.
    let content: Vec<u8> = (0..3 * most).flat_map(|number| kind(number, 4096)).collect();
    let inos = ["one", "two"].map(|name| daemon.file(root, name, &content));
    let (seen, errors) = daemon.dedup(&inos, &small);
    assert_eq!((seen.shared, errors), (content.len() as u64, 0));
    let (seen, _) = daemon.dedup(&inos, &small);
    assert_eq!((seen.shared, seen.before), (0, content.len() as u64));
    assert!(daemon.read(inos[1]) == content);
}

#[test]
fn what_changes_meanwhile_is_left_alone_and_the_rest_is_shared() {
    let mut daemon = Daemon::new();
    let root = daemon.forest.root();
    let content = blocks(&[1, 2, 3, 4]);
    let inos = ["one", "two", "three"].map(|name| daemon.file(root, name, &content));
    let target = Ino(inos[1]);
    daemon.before = Some(Box::new(move |forest| {
        forest.write(target, BLOCK + 5, b"other", WriteFlags::default()).unwrap();
        forest.unlink(forest.root(), b"three").unwrap();
    }));
    let (seen, errors) = daemon.dedup(&inos, &how());
    let held = 4 * BLOCK;
    assert_eq!((seen.shared + seen.changed, errors), (2 * held, 0));
    // It is held as long as somebody looks it up.
    assert_eq!(seen.shared, 3 * BLOCK + held);
    let mut changed = content.clone();
    changed[BLOCK as usize + 5..][..5].copy_from_slice(b"other");
    assert!(daemon.read(inos[1]) == changed && daemon.read(inos[0]) == content);
    daemon.forest.forget(Ino(inos[2]), 1);
    daemon.forest.sync().unwrap();
    let (seen, errors) = daemon.dedup(&[inos[2]], &how());
    assert_eq!((seen, errors), (Seen { files: 1, ..Seen::default() }, 0));
}

#[test]
fn what_refuses_is_told_and_others_are_shared() {
    let mut daemon = Daemon::new();
    let root = daemon.forest.root();
    let content = blocks(&[1, 2]);
    let inos = ["one", "two", "three"].map(|name| daemon.file(root, name, &content));
    let set = SetAttr { flags: Some(flag::IMMUTABLE), ..SetAttr::default() };
    daemon.forest.setattr(Ino(inos[1]), &set, &CALLER).unwrap();
    let (seen, errors) = daemon.dedup(&inos, &how());
    assert_eq!((seen.shared, seen.shared_files, errors), (2 * BLOCK, 1, 1));
}

#[test]
fn a_subvolume_that_refuses_changes_is_told_once_and_not_read() {
    let mut daemon = Daemon::new();
    let engine = daemon.forest.base().engine().clone();
    let name = b"kept".to_vec();
    let op = VersionOp::CreateSubvolume { name, mode: 0o755, uid: 0, gid: 0 };
    let id = engine.change_versions(vec![op]).unwrap()[0];
    let root = daemon.forest.root();
    let kept = daemon.forest.lookup(root, b"kept").unwrap().ino;
    let content = blocks(&[1, 2]);
    let inos = [
        daemon.file(kept, "one", &content),
        daemon.file(kept, "two", &content),
        daemon.file(root, "one", &content),
        daemon.file(root, "two", &content),
    ];
    let changes = vec![PropertyChange::ReadOnly(2)];
    engine.change_versions(vec![VersionOp::SetProperties { id, changes }]).unwrap();
    let (seen, errors) = daemon.dedup(&inos, &how());
    assert_eq!((seen.read, seen.shared, errors), (4 * BLOCK, 2 * BLOCK, 1));
}

#[test]
fn nothing_is_tried_between_two_subvolumes() {
    let mut daemon = Daemon::new();
    let op = VersionOp::CreateSubvolume { name: b"below".into(), mode: 0o755, uid: 0, gid: 0 };
    daemon.forest.base().engine().change_versions(vec![op]).unwrap();
    let root = daemon.forest.root();
    let below = daemon.forest.lookup(root, b"below").unwrap().ino;
    let content = blocks(&[5, 6]);
    let inos = [
        daemon.file(root, "one", &content),
        daemon.file(below, "one", &content),
        daemon.file(below, "two", &content),
    ];
    let (seen, errors) = daemon.dedup(&inos, &how());
    assert_eq!((seen.shared, seen.shared_files, errors), (2 * BLOCK, 1, 0));
    // What a snapshot shares by itself is not read again.
    let op = VersionOp::Snapshot { subvolume: TreeId::FIRST_SUBVOL.0, name: b"then".into() };
    let snapshot = daemon.forest.base().engine().change_versions(vec![op]).unwrap()[0];
    let name = b"then again".to_vec();
    let op = VersionOp::Clone { snapshot, name };
    daemon.forest.base().engine().change_versions(vec![op]).unwrap();
    let clone = daemon.forest.lookup(root, b"then again").unwrap().ino;
    let cloned = daemon.forest.lookup(clone, b"one").unwrap().ino.0;
    let (seen, errors) = daemon.dedup(&[inos[0], cloned], &how());
    assert_eq!((seen.read, seen.shared, seen.before, errors), (2 * BLOCK, 0, 0, 0));
}

#[test]
fn a_block_is_written_and_read_as_it_is() {
    let block =
        Block { content: [7; 16], place: [9; 16], file: 0x0102_0304, index: u32::MAX, bytes: 77 };
    assert_eq!(Block::of_bytes(&block.to_bytes()), block);
}
