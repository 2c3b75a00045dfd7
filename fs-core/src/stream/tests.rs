//! States of a subvolume, compared and hashed, against what a walk over the mounted filesystem saw.

use super::changes::What;
use super::compare::{Comparison, Event};
use super::*;
use crate::btree::Tree;
use crate::engine::{format, FormatOptions, OpenOptions};
use crate::format::inode::mode;
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::platform::Timestamp;
use crate::subvol::View;
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, TreeId};
use crate::vfs::*;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use proptest::prelude::*;

pub(super) const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };

pub(super) fn options() -> [FormatOptions; 2] {
    let plain = FormatOptions {
        compression: CompressionKind::None,
        checksum: ChecksumKind::Crc32c,
        ..FormatOptions::default()
    };
    let packed = FormatOptions {
        compression: CompressionKind::Zstd,
        checksum: ChecksumKind::Blake3,
        node_bytes: 65536,
        ..FormatOptions::default()
    };
    [plain, packed]
}

pub(super) fn new_volume(options: &FormatOptions) -> Arc<Volume> {
    let device = RamDevice::new(64 << 20);
    let test = TestPlatform::new(7);
    format(alloc::vec![device.device()], test.platform.clone(), options).unwrap();
    let open = OpenOptions::default();
    Volume::open(alloc::vec![device.device()], test.platform.clone(), &open, AccessTime::Never)
        .unwrap()
}

/// A published state of the volume.
pub(super) fn view(fs: &Volume) -> Arc<View> {
    fs.sync().unwrap();
    fs.engine().default_subvol().unwrap().view()
}

pub(super) fn content(fs: &Volume, tree: &Tree) -> Content {
    Content::of(Source::of(&fs.engine().store), tree, &mut |_| Ok(())).unwrap()
}

fn identity(fs: &Volume) -> Identity {
    content(fs, &view(fs).tree).identity()
}

fn changes(fs: &Volume, old: &Tree, new: &Tree) -> Vec<Change> {
    let mut changes = Changes::new(old, new);
    let mut all = Vec::new();
    while let Some(change) = changes.next(&*fs.engine().store).unwrap() {
        all.push(change);
    }
    all
}

/// What a walk over the mounted filesystem sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Directory and name: inode and path.
    pub names: BTreeMap<(u64, Vec<u8>), (u64, Vec<u8>)>,
    pub inodes: BTreeMap<u64, SeenInode>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SeenInode {
    pub fields: (u32, u32, u32, u32, u64, u64),
    pub times: (Timestamp, Timestamp, Timestamp),
    pub data: Vec<u8>,
    pub target: Vec<u8>,
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

pub(crate) fn look(fs: &Volume) -> Seen {
    let mut seen = Seen::default();
    let mut left = alloc::vec![(fs.root(), Vec::new())];
    see(fs, fs.root(), &mut seen);
    while let Some((dir, path)) = left.pop() {
        let mut entries = Vec::new();
        fs.readdir(dir, 2, &mut |e| {
            entries.push((e.ino, e.file_type, e.name.to_vec()));
            true
        })
        .unwrap();
        for (ino, file_type, name) in entries {
            let path = [&path[..], b"/", &name].concat();
            see(fs, ino, &mut seen);
            seen.names.insert((dir.0, name), (ino.0, path.clone()));
            if file_type == mode::DIRECTORY {
                left.push((ino, path));
            }
        }
    }
    seen
}

fn see(fs: &Volume, ino: Ino, seen: &mut Seen) {
    let attr = fs.getattr(ino).unwrap();
    let mut data = Vec::new();
    let mut size = 0;
    if attr.mode & mode::TYPE == mode::REGULAR {
        size = attr.size;
        data.resize(size as usize, 0);
        fs.read(ino, 0, &mut data).unwrap();
    }
    let target = match attr.mode & mode::TYPE {
        mode::SYMLINK => fs.readlink(ino).unwrap(),
        _ => Vec::new(),
    };
    let names = fs.listxattr(ino).unwrap();
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let attributes = names.map(|name| (name.to_vec(), fs.getxattr(ino, name).unwrap())).collect();
    let fields = (attr.mode, attr.uid, attr.gid, attr.flags, attr.rdev, size);
    let times = (attr.mtime, attr.ctime, attr.btime);
    seen.inodes.insert(ino.0, SeenInode { fields, times, data, target, attributes });
}

/// One step: what, two picks, a number.
pub(crate) type Step = (u8, u8, u8, u32);

pub(crate) fn pattern(len: usize, seed: u32) -> Vec<u8> {
    (0..len).map(|i| (i as u32 / 97).wrapping_mul(seed | 1).to_le_bytes()[1]).collect()
}

/// The step that shares a range of a file with another.
pub(crate) const COPY: u8 = 13;

/// Does a step; what cannot be done is not done.
pub(crate) fn act(fs: &Volume, held: &mut BTreeSet<u64>, (what, a, b, n): Step) {
    let seen = look(fs);
    let dirs: Vec<Ino> = seen
        .inodes
        .iter()
        .filter(|(_, inode)| inode.fields.0 & mode::TYPE == mode::DIRECTORY)
        .map(|(ino, _)| Ino(*ino))
        .collect();
    let files: Vec<Ino> = seen
        .inodes
        .iter()
        .filter(|(_, inode)| inode.fields.0 & mode::TYPE == mode::REGULAR)
        .map(|(ino, _)| Ino(*ino))
        .collect();
    let pick = |list: &[Ino], n: u8| list[n as usize % list.len().max(1)];
    let dir = pick(&dirs, a);
    let name = [b'a' + b % 7];
    let names: Vec<_> = seen.names.keys().collect();
    let flags = WriteFlags::default();
    match what % 18 {
        0 | 1 => drop(fs.mknod(dir, &name, 0o100644, 0, &ROOT)),
        2 => drop(fs.mkdir(dir, &name, 0o755, &ROOT)),
        3 => drop(fs.symlink(dir, &name, &pattern(1 + n as usize % 100, n | 3), &ROOT)),
        4 => drop(fs.mknod(dir, &name, 0o020600, u64::from(n), &ROOT)),
        5 if !names.is_empty() => {
            let (from, old) = names[n as usize % names.len()];
            let flags = RenameFlags { exchange: n % 5 == 0, ..RenameFlags::default() };
            let _ = fs.rename(Ino(*from), old, dir, &name, flags, &ROOT);
        }
        6 if !names.is_empty() => {
            let (from, old) = names[n as usize % names.len()];
            let _ = fs.unlink(Ino(*from), old);
            let _ = fs.rmdir(Ino(*from), old);
        }
        _ if files.is_empty() => {}
        7 => drop(fs.link(pick(&files, b), dir, &name)),
        8..=10 => {
            let at = u64::from(n % 700_000);
            let len = [1, 100, 5000, 140_000][b as usize % 4];
            fs.write(pick(&files, a), at, &pattern(len, n), flags).unwrap();
        }
        11 => {
            let size = Some(u64::from(n % 900_000));
            fs.setattr(pick(&files, a), &SetAttr { size, ..SetAttr::default() }, &ROOT).unwrap();
        }
        12 => {
            let (at, len) = (u64::from(n % 500_000), u64::from(b) * 1000 + 1);
            let op =
                [Fallocate::PunchHole, Fallocate::Allocate { keep_size: true }][a as usize % 2];
            fs.fallocate(pick(&files, n as u8), op, at, len).unwrap();
        }
        COPY => {
            let (from, to) = (pick(&files, a), pick(&files, b));
            let at = u64::from(n % 64) * 4096;
            let _ = fs.copy_range(from, 0, to, at, u64::from(n % 300_000));
        }
        14 | 15 => {
            let name = [b"user.".as_slice(), &name].concat();
            let len = if n % 3 == 0 { 3000 } else { n as usize % 50 };
            let _ = fs.setxattr(pick(&files, a), &name, &pattern(len, n), XattrMode::Either);
        }
        16 => {
            let mode = Some(n & 0o777);
            fs.setattr(pick(&files, a), &SetAttr { mode, ..SetAttr::default() }, &ROOT).unwrap();
        }
        17 => {
            // Held open: it may lose its last name and stay. Or it never had one, and may get one.
            match n % 2 {
                0 => {
                    if let Some(((dir, name), _)) = seen.names.iter().nth(b as usize) {
                        if let Ok(attr) = fs.lookup(Ino(*dir), name) {
                            held.insert(attr.ino.0);
                        }
                    }
                }
                _ => {
                    let file = fs.tmpfile(dir, 0o600, &ROOT).unwrap().ino;
                    fs.write(file, 0, &pattern(9000, n), flags).unwrap();
                    fs.setxattr(file, b"user.t", b"1", XattrMode::Either).unwrap();
                    fs.sync().unwrap();
                    let _ = fs.link(file, dir, &name);
                }
            }
        }
        _ => {}
    }
}

/// What `Changes` must say about names: those that are in one walk and not in the other.
fn check_names(old: &Seen, new: &Seen, changes: &[Change]) {
    let only = |these: &Seen, those: &Seen| -> Vec<(u64, Vec<u8>)> {
        let stays = |name, ino| those.names.get(name).is_some_and(|(other, _)| *other == ino);
        let gone = these.names.iter().filter(|(name, (ino, _))| !stays(*name, *ino));
        let mut list: Vec<_> = gone.map(|(_, named)| named.clone()).collect();
        list.sort();
        list
    };
    let (mut came, mut gone) = (Vec::new(), Vec::new());
    for change in changes {
        let named = (change.ino.0, change.path.clone());
        match &change.what {
            What::Created => came.push(named),
            What::Removed => gone.push(named),
            What::Renamed { from } => {
                came.push(named);
                gone.push((change.ino.0, from.clone()));
            }
            _ => {}
        }
    }
    came.sort();
    gone.sort();
    assert_eq!(came, only(new, old), "names that came");
    assert_eq!(gone, only(old, new), "names that went");
}

/// Outside the ranges that `Changes` names, data is the same; attributes differ where it says so.
fn check_inodes(old: &Seen, new: &Seen, changes: &[Change]) {
    for (ino, was) in &old.inodes {
        let Some(is) = new.inodes.get(ino) else { continue };
        let mut masked = was.data.clone();
        masked.resize(was.data.len().max(is.data.len()), 0);
        let mut now = is.data.clone();
        now.resize(masked.len(), 0);
        let mut last = None;
        for change in changes.iter().filter(|change| change.ino.0 == *ino) {
            if let What::Data { start, end } = change.what {
                assert!(last.is_none_or(|last| last < start), "ranges ascend and are joined");
                last = Some(end);
                masked[start as usize..end as usize].fill(0);
                now[start as usize..end as usize].fill(0);
            }
        }
        assert!(masked == now, "inode {ino} differs outside of the ranges");
        let told = changes.iter().any(|c| c.ino.0 == *ino && c.what == What::Attributes);
        let fields = |seen: &SeenInode| {
            let (mode, uid, gid, flags, rdev, _) = seen.fields;
            (mode, uid, gid, flags, rdev, seen.attributes.clone())
        };
        if fields(was) != fields(is) {
            assert!(told, "attributes of inode {ino}");
        }
    }
}

fn tree_of(view: &Option<Arc<View>>) -> Tree {
    view.as_ref().map_or(Tree::empty(TreeId::FIRST_SUBVOL), |view| view.tree)
}

/// Two volumes to which the same happened, and which store it in other ways.
pub(super) fn stored_twice(steps: Vec<Step>) -> [Arc<Volume>; 2] {
    let [plain, packed] = options().map(|options| new_volume(&options));
    for (index, step) in steps.into_iter().enumerate() {
        act(&plain, &mut BTreeSet::new(), step);
        act(&packed, &mut BTreeSet::new(), step);
        // Other extents too.
        if index % 5 == 0 {
            packed.sync().unwrap();
        }
    }
    [plain, packed]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn changes_and_identity_follow_what_a_walk_sees(
        which in 0..2usize,
        rounds in proptest::collection::vec(
            proptest::collection::vec(any::<Step>(), 1..20), 2..6),
    ) {
        let fs = new_volume(&options()[which]);
        let source = Source::of(&fs.engine().store);
        let mut held = BTreeSet::new();
        let mut states: Vec<(Option<Arc<View>>, Seen, Content)> = Vec::new();
        states.push((None, Seen::default(), Content::empty()));
        for steps in rounds {
            for step in steps {
                act(&fs, &mut held, step);
            }
            let (view, seen) = (view(&fs), look(&fs));
            let whole = content(&fs, &view.tree);
            for (old, old_seen, old_content) in &states {
                // From every earlier state, and back.
                let old = tree_of(old);
                let mut forward = old_content.clone();
                forward.update(source, &old, &view.tree, &mut |_| Ok(())).unwrap();
                prop_assert_eq!(forward.encode(), whole.encode());
                let mut back = whole.clone();
                back.update(source, &view.tree, &old, &mut |_| Ok(())).unwrap();
                prop_assert_eq!(back.encode(), old_content.encode());
                prop_assert_eq!(old_seen == &seen, back.identity() == whole.identity());
                if old.root.is_some() {
                    let list = changes(&fs, &old, &view.tree);
                    check_names(old_seen, &seen, &list);
                    check_inodes(old_seen, &seen, &list);
                    let list = changes(&fs, &view.tree, &old);
                    check_names(&seen, old_seen, &list);
                    check_inodes(&seen, old_seen, &list);
                }
            }
            states.push((Some(view), seen, whole));
        }
    }

    #[test]
    fn one_content_has_one_identity_however_it_is_stored(
        steps in proptest::collection::vec(any::<Step>(), 1..60),
    ) {
        let [plain, packed] = stored_twice(steps);
        prop_assume!(look(&plain) == look(&packed));
        prop_assert_eq!(identity(&plain), identity(&packed));
    }
}

#[test]
fn zeros_holes_and_promised_room_are_the_same_content() {
    let [a, b] = options().map(|options| new_volume(&options));
    let time = Timestamp { secs: 5, nanos: 6 };
    let make = |fs: &Volume, fill: &dyn Fn(&Volume, Ino)| {
        let ino = fs.mknod(fs.root(), b"f", 0o100644, 0, &ROOT).unwrap().ino;
        fs.write(ino, 0, &pattern(300_000, 9), WriteFlags::default()).unwrap();
        fill(fs, ino);
        for ino in [ino, fs.root()] {
            let at = Some(SetTime::At(time));
            let set = SetAttr { mtime: at, ctime: Some(time), ..SetAttr::default() };
            fs.setattr(ino, &set, &ROOT).unwrap();
        }
        identity(fs)
    };
    let holes = make(&a, &|fs, ino| {
        fs.fallocate(ino, Fallocate::PunchHole, 10_000, 200_000).unwrap();
        let set = SetAttr { size: Some(2_000_000), ..SetAttr::default() };
        fs.setattr(ino, &set, &ROOT).unwrap();
    });
    let zeros = make(&b, &|fs, ino| {
        fs.write(ino, 10_000, &alloc::vec![0; 200_000], WriteFlags::default()).unwrap();
        fs.write(ino, 300_000, &alloc::vec![0; 700_000], WriteFlags::default()).unwrap();
        let op = Fallocate::Allocate { keep_size: false };
        fs.fallocate(ino, op, 1_000_000, 1_000_000).unwrap();
    });
    assert_eq!(holes, zeros);
}

#[test]
fn a_change_of_anything_that_counts_changes_the_identity() {
    let fs = new_volume(&options()[0]);
    let dir = fs.mkdir(fs.root(), b"d", 0o755, &ROOT).unwrap().ino;
    let file = fs.mknod(dir, b"f", 0o100644, 0, &ROOT).unwrap().ino;
    fs.write(file, 0, &pattern(400_000, 5), WriteFlags::default()).unwrap();
    let mut known = BTreeSet::from([identity(&fs)]);
    let mut differs = |what: &str| assert!(known.insert(identity(&fs)), "{what}");
    let set = |set: SetAttr| fs.setattr(file, &set, &ROOT).map(|_| ()).unwrap();
    let stamp = Some(Timestamp { secs: 1, nanos: 2 });
    // Each with the same change time, so that nothing else tells.
    let keep = SetAttr { ctime: stamp, ..SetAttr::default() };
    set(keep);
    differs("change time");
    set(SetAttr { mode: Some(0o600), ..keep });
    differs("mode");
    set(SetAttr { uid: Some(1), ..keep });
    differs("owner");
    set(SetAttr { gid: Some(1), ..keep });
    differs("group");
    set(SetAttr { mtime: Some(SetTime::At(Timestamp { secs: 1, nanos: 1 })), ..keep });
    differs("time of modification");
    set(SetAttr { flags: Some(crate::format::inode::flag::NODUMP), ..keep });
    differs("flags");
    set(SetAttr { project: Some(3), ..keep });
    differs("project");
    fs.setxattr(file, b"user.a", b"1", XattrMode::Either).unwrap();
    differs("an attribute");
    fs.setxattr(file, b"user.a", &[1; 5000], XattrMode::Either).unwrap();
    differs("a long value");
    fs.write(file, 399_999, b"x", WriteFlags::default()).unwrap();
    differs("the last byte");
    fs.link(file, dir, b"g").unwrap();
    differs("a further name");
    fs.rename(dir, b"g", fs.root(), b"g", RenameFlags::default(), &ROOT).unwrap();
    differs("a name in another directory");
    // When it was last read says nothing about what it holds.
    let before = identity(&fs);
    let time = SetTime::At(Timestamp { secs: 77, nanos: 0 });
    let ctime = Some(fs.getattr(file).unwrap().ctime);
    set(SetAttr { atime: Some(time), ctime, ..SetAttr::default() });
    assert_eq!(identity(&fs), before);
}

#[test]
fn an_overwritten_sector_is_the_only_range_that_differs() {
    let fs = new_volume(&options()[0]);
    let file = fs.mknod(fs.root(), b"f", 0o100644, 0, &ROOT).unwrap().ino;
    let noise: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(747796405) >> 11) as u8).collect();
    fs.write(file, 0, &noise, WriteFlags::default()).unwrap();
    let old = view(&fs);
    fs.write(file, 500_000, b"other", WriteFlags::default()).unwrap();
    let new = view(&fs);
    let mut comparison = Comparison::new(&old.tree, &new.tree);
    let mut ranges = Vec::new();
    while let Some(event) = comparison.next(&*fs.engine().store).unwrap() {
        if let Event::Data { start, end } = event {
            ranges.push((start, end));
        }
    }
    assert_eq!(ranges, [(499_712, 503_808)]);
    // And what is hashed again is the record around it, in both states.
    let mut content = content(&fs, &old.tree);
    let mut bytes = 0;
    let source = Source::of(&fs.engine().store);
    content
        .update(source, &old.tree, &new.tree, &mut |progress| {
            bytes = progress.bytes;
            Ok(())
        })
        .unwrap();
    assert_eq!(bytes, 2 * super::content::RECORD_BYTES);
}

#[test]
fn the_encoding_of_a_content_can_be_gone_on_with() {
    let fs = new_volume(&options()[1]);
    let whole = content(&fs, &view(&fs).tree);
    let bytes = whole.encode();
    assert_eq!(bytes.len(), Content::BYTES);
    assert_eq!(Content::decode(&bytes).unwrap().identity(), whole.identity());
    assert!(Content::decode(&bytes[1..]).is_none());
    assert_eq!(whole.elements(), 1, "the root directory");
    assert_ne!(whole.identity(), Content::empty().identity());
}
