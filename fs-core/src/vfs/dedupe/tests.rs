//! Sharing what is equal, and what is told of blocks.

use super::*;
use crate::check::{check, CheckOptions, Quiet};
use crate::engine::versions::VersionOp;
use crate::engine::{format, FormatOptions, OpenOptions};
use crate::format::inode::{flag, mode};
use crate::format::ptr::CompressionKind;
use crate::testing::{RamDevice, TestPlatform, ThreadWorkers};
use crate::units::TreeId;
use crate::vfs::{
    AccessTime, Attr, Caller, Fallocate, Filesystem, Seek, SetAttr, SetTime, WriteFlags,
};
use core::sync::atomic::{AtomicBool, Ordering};
use std::string::{String, ToString};
use std::vec;

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const MIB: usize = 1 << 20;
const BLOCK: u64 = 128 << 10;

struct Pool {
    device: Arc<RamDevice>,
    test: TestPlatform,
    fs: Arc<Volume>,
}

impl Pool {
    fn new() -> Pool {
        Pool::with(TestPlatform::new(7), &FormatOptions::default())
    }

    fn with(test: TestPlatform, options: &FormatOptions) -> Pool {
        let device = RamDevice::new(64 << 20);
        format(vec![device.device()], test.platform.clone(), options).unwrap();
        let fs = Pool::mount(&device, &test);
        Pool { device, test, fs }
    }

    fn mount(device: &Arc<RamDevice>, test: &TestPlatform) -> Arc<Volume> {
        let (options, times) = (OpenOptions::default(), AccessTime::Relative);
        Volume::open(vec![device.device()], test.platform.clone(), &options, times).unwrap()
    }

    fn file(&self, name: &str, content: &[u8]) -> Ino {
        let (fs, name) = (&self.fs, name.as_bytes());
        let ino = fs.mknod(fs.root(), name, mode::REGULAR | 0o644, 0, &ROOT).unwrap().ino;
        fs.write(ino, 0, content, WriteFlags::default()).unwrap();
        ino
    }

    fn read(&self, ino: Ino) -> Vec<u8> {
        let mut out = vec![0; self.fs.getattr(ino).unwrap().size as usize];
        let count = self.fs.read(ino, 0, &mut out).unwrap();
        assert_eq!(count, out.len());
        out
    }

    /// All of a range, as often as it takes: bytes that are equal, and that were shared.
    fn dedupe(&self, source: (Ino, u64), target: (Ino, u64), len: u64) -> Result<(u64, u64)> {
        let (mut done, mut all) = (0, 0);
        while done < len {
            let (from, to) = (source.1 + done, target.1 + done);
            match self.fs.dedupe_range(source.0, from, target.0, to, len - done)? {
                Dedupe::Same { bytes: 0, .. } | Dedupe::Differs => break,
                Dedupe::Same { bytes, shared } => (done, all) = (done + bytes, all + shared),
            }
        }
        Ok((done, all))
    }

    fn errno(&self, source: (Ino, u64), target: (Ino, u64), len: u64) -> Errno {
        self.dedupe(source, target, len).unwrap_err().errno()
    }

    /// Bytes of data in use, without what was given up.
    fn used(&self) -> u64 {
        (0..3).for_each(|_| self.fs.sync().unwrap());
        self.fs.engine().store.space.usage().data.used_bytes
    }

    fn is_at_one_place(&self, one: Ino, other: Ino) -> bool {
        let places = |ino| self.fs.block_places(ino, 0, BLOCK).unwrap().blocks;
        let (one, other) = (places(one), places(other));
        assert!(one.iter().all(|block| block.place.is_some()), "{one:?}");
        one == other
    }

    /// Closes it and looks whether the checker, which counts everything anew, is content.
    fn into_sound(self) {
        self.fs.close().unwrap();
        drop(self.fs);
        let (devices, options) = (vec![self.device.device()], CheckOptions::default());
        let report = check(devices, self.test.platform.clone(), &options, &Quiet).unwrap();
        let findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        assert_eq!(findings, Vec::<String>::new());
    }
}

/// What no compressor makes smaller.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// What compressors like.
fn text(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| b'a' + (at / 700) as u8 % 16 + seed).collect()
}

fn times(attr: Attr) -> [crate::platform::Timestamp; 4] {
    [attr.atime, attr.mtime, attr.ctime, attr.btime]
}

#[test]
fn equal_files_come_to_take_the_room_of_one_and_nothing_else_changes() {
    let tail = 3 * MIB + 1234;
    for (content, name) in [(noise(tail, 5), "plain"), (text(tail, 0), "packed")] {
        let pool = Pool::new();
        let one = pool.file("one", &content);
        let alone = pool.used();
        let other = pool.file("other", &content);
        let before = pool.fs.getattr(other).unwrap();
        assert_eq!(pool.used(), 2 * alone, "{name}");
        pool.test.clock.advance(5_000_000_000);
        let len = tail as u64;
        assert_eq!(pool.dedupe((one, 0), (other, 0), len).unwrap(), (len, len), "{name}");
        let after = pool.fs.getattr(other).unwrap();
        assert_eq!((times(before), before.version), (times(after), after.version), "{name}");
        assert_eq!(pool.used(), alone, "{name}");
        assert!(pool.is_at_one_place(one, other), "{name}");
        assert!(pool.read(one) == content && pool.read(other) == content, "{name}");
        // Again it is found shared, and nothing happens.
        assert_eq!(pool.dedupe((one, 0), (other, 0), len).unwrap(), (len, 0), "{name}");
        pool.fs.write(one, 0, b"apart", WriteFlags::default()).unwrap();
        assert_eq!(pool.read(other), content, "{name}");
        pool.into_sound();
    }
}

#[test]
fn what_differs_in_a_byte_is_told_and_left_alone() {
    let pool = Pool::new();
    let content = noise(2 * MIB, 3);
    let one = pool.file("one", &content);
    for at in [0, MIB - 1, MIB + 5000, 2 * MIB - 1] {
        let mut changed = content.clone();
        changed[at] ^= 1;
        let other = pool.file(&std::format!("other {at}"), &changed);
        let used = pool.used();
        let first = pool.fs.dedupe_range(one, 0, other, 0, MIB as u64).unwrap();
        let second = pool.fs.dedupe_range(one, MIB as u64, other, MIB as u64, MIB as u64).unwrap();
        assert_eq!([first, second].map(|done| done == Dedupe::Differs), [at < MIB, at >= MIB]);
        assert_eq!(pool.read(other), changed);
        assert_eq!(pool.used(), used - MIB as u64, "the half that is equal was not shared");
    }
    pool.into_sound();
}

#[test]
fn what_linux_refuses_is_refused() {
    let pool = Pool::new();
    let fs = &pool.fs;
    let content = noise(40_000, 9);
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    let (dir, link) = (
        fs.mkdir(fs.root(), b"dir", 0o755, &ROOT).unwrap().ino,
        fs.symlink(fs.root(), b"link", b"one", &ROOT).unwrap().ino,
    );
    let none = Ino(1 << 40);
    for (source, target, len, why) in [
        ((one, 1), (other, 0), 4096, Errno::Inval),
        ((one, 0), (other, 512), 4096, Errno::Inval),
        ((one, 0), (other, 0), 40_001, Errno::Inval),
        ((one, 36_864), (other, 0), 4096, Errno::Inval),
        ((one, 0), (other, 36_864), 4096, Errno::Inval),
        ((one, 40_960), (other, 0), 4096, Errno::Inval),
        ((one, 0), (other, 0), u64::MAX, Errno::Inval),
        ((one, 4096), (one, 0), 8192, Errno::Inval),
        ((one, 0), (one, 4096), 8192, Errno::Inval),
        ((one, 0), (one, 0), 4096, Errno::Inval),
        ((dir, 0), (other, 0), 4096, Errno::IsDir),
        ((one, 0), (dir, 0), 4096, Errno::IsDir),
        ((link, 0), (other, 0), 4096, Errno::Inval),
        ((one, 0), (link, 0), 4096, Errno::Inval),
        ((none, 0), (other, 0), 4096, Errno::Stale),
    ] {
        assert_eq!(pool.errno(source, target, len), why, "{source:?} {target:?} {len}");
    }
    // A part of a sector is left out, unless both files end with it.
    assert_eq!(fs.dedupe_range(one, 0, other, 0, 0), Ok(Dedupe::Same { bytes: 0, shared: 0 }));
    assert_eq!(fs.dedupe_range(one, 0, other, 0, 100), Ok(Dedupe::Same { bytes: 0, shared: 0 }));
    assert_eq!(pool.dedupe((one, 0), (other, 0), 5000).unwrap(), (4096, 4096));
    assert_eq!(pool.dedupe((one, 4096), (other, 4096), 35_904).unwrap(), (35_904, 35_904));
    // Immutable is the target's to refuse; and nothing changes in what is read-only.
    let set = SetAttr { flags: Some(flag::IMMUTABLE), ..SetAttr::default() };
    fs.setattr(other, &set, &ROOT).unwrap();
    assert_eq!(pool.errno((one, 0), (other, 0), 4096), Errno::Perm);
    let third = pool.file("third", &content);
    assert_eq!(pool.dedupe((other, 0), (third, 0), 40_000).unwrap(), (40_000, 40_000));
    fs.set_read_only(true).unwrap();
    assert_eq!(pool.errno((one, 0), (third, 0), 4096), Errno::RoFs);
    fs.set_read_only(false).unwrap();
    pool.into_sound();
}

#[test]
fn a_limit_is_met_as_by_a_write() {
    let pool = Pool::new();
    let content = noise(MIB, 4);
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    pool.fs.sync().unwrap();
    let limit = |referenced| {
        let subvolume = TreeId::FIRST_SUBVOL.0;
        let op = VersionOp::SetLimits { subvolume, referenced, own: 0 };
        pool.fs.engine().change_versions(vec![op]).unwrap();
    };
    limit(2 * MIB as u64);
    assert_eq!(pool.errno((one, 0), (other, 0), MIB as u64), Errno::DQuot);
    limit(0);
    assert_eq!(pool.dedupe((one, 0), (other, 0), MIB as u64).unwrap().1, MIB as u64);
    pool.into_sound();
}

#[test]
fn holes_and_promised_room_stay_and_zeros_become_a_hole_where_the_source_has_one() {
    let pool = Pool::new();
    let fs = &pool.fs;
    let len = 256 << 10;
    let hole = pool.file("hole", b"");
    let set = SetAttr { size: Some(len), ..SetAttr::default() };
    fs.setattr(hole, &set, &ROOT).unwrap();
    let set = SetAttr { flags: Some(flag::NOCOMPRESS), ..SetAttr::default() };
    let zeros = pool.file("zeros", b"");
    fs.setattr(zeros, &set, &ROOT).unwrap();
    fs.write(zeros, 0, &vec![0; len as usize], WriteFlags::default()).unwrap();
    let promised = pool.file("promised", b"");
    fs.fallocate(promised, Fallocate::Allocate { keep_size: false }, 0, len).unwrap();
    fs.sync().unwrap();
    let blocks = |ino| fs.getattr(ino).unwrap().blocks;
    let (taken, kept) = (blocks(zeros), blocks(promised));
    assert!(taken >= len / 512 && kept >= len / 512);
    // Nothing is put where there is nothing, and no promise is taken back.
    assert_eq!(pool.dedupe((zeros, 0), (hole, 0), len).unwrap(), (len, 0));
    assert_eq!(pool.dedupe((zeros, 0), (promised, 0), len).unwrap(), (len, 0));
    assert_eq!(pool.dedupe((hole, 0), (promised, 0), len).unwrap(), (len, 0));
    fs.sync().unwrap();
    assert_eq!((blocks(zeros), blocks(promised), blocks(hole)), (taken, kept, 0));
    assert_eq!(pool.dedupe((hole, 0), (zeros, 0), len).unwrap(), (len, len));
    fs.sync().unwrap();
    assert_eq!(blocks(zeros), 0);
    assert_eq!(fs.seek(zeros, 0, Seek::Data).unwrap_err().errno(), Errno::NxIo);
    assert_eq!(pool.read(zeros), vec![0; len as usize]);
    pool.into_sound();
}

#[test]
fn small_files_are_compared_and_stay_where_they_are() {
    let pool = Pool::new();
    let [one, other] = ["one", "other"].map(|name| pool.file(name, b"a few words"));
    let third = pool.file("third", b"a few wordS");
    for _ in 0..2 {
        assert_eq!(pool.dedupe((one, 0), (other, 0), 11).unwrap(), (11, 0));
        assert_eq!(pool.fs.dedupe_range(one, 0, third, 0, 11), Ok(Dedupe::Differs));
        pool.fs.sync().unwrap();
    }
    pool.into_sound();
}

#[test]
fn what_was_not_written_yet_is_written_once_and_shared() {
    let pool = Pool::new();
    let content = noise(3 * MIB, 8);
    let empty = pool.used();
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    let len = content.len() as u64;
    assert_eq!(pool.dedupe((one, 0), (other, 0), len).unwrap(), (len, len));
    pool.fs.fsync(other, false).unwrap();
    // Power fails, and what is free then is used again.
    pool.fs.shutdown();
    let Pool { device, test, fs } = pool;
    drop(fs);
    let fs = Pool::mount(&device, &test);
    let pool = Pool { device, test, fs };
    let other = pool.fs.lookup(pool.fs.root(), b"other").unwrap().ino;
    let more = pool.file("more", &noise(8 * MIB, 2));
    pool.fs.sync().unwrap();
    assert_eq!(pool.read(other), content);
    pool.fs.unlink(pool.fs.root(), b"more").unwrap();
    pool.fs.forget(more, 1);
    assert!(pool.used() <= empty + 2 * len, "{}", pool.used());
    pool.into_sound();
}

#[test]
fn what_a_snapshot_has_stays_its_own() {
    let pool = Pool::new();
    let content = text(MIB, 1);
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    let snapshot = |name: &[u8]| {
        let op = VersionOp::Snapshot { subvolume: TreeId::FIRST_SUBVOL.0, name: name.into() };
        pool.fs.engine().change_versions(vec![op]).unwrap()[0]
    };
    let before = snapshot(b"before");
    let len = MIB as u64;
    let used = pool.used();
    assert_eq!(pool.dedupe((one, 0), (other, 0), len).unwrap(), (len, len));
    assert_eq!(pool.used(), used, "the snapshot still has what the file had");
    let kept = Volume::of_version(pool.fs.engine().clone(), before, AccessTime::Never).unwrap();
    let mut out = vec![0; MIB];
    assert_eq!(kept.read(other, 0, &mut out), Ok(MIB));
    assert_eq!(out, content);
    assert_eq!(kept.dedupe_range(one, 0, other, 0, len).unwrap_err().errno(), Errno::RoFs);
    drop(kept);
    let delete = vec![VersionOp::Delete { id: before }];
    pool.fs.engine().change_versions(delete).unwrap();
    pool.fs.engine().destroy_all().unwrap();
    assert_eq!(pool.used(), used / 2);
    assert_eq!(pool.read(other), content);
    pool.into_sound();
}

#[test]
fn blocks_are_told_by_their_place_however_they_are_cut_and_holes_are_not() {
    let pool = Pool::new();
    let content = noise(4 * BLOCK as usize, 6);
    let one = pool.file("one", &content);
    let set = SetAttr { size: Some(1 << 40), ..SetAttr::default() };
    pool.fs.setattr(one, &set, &ROOT).unwrap();
    pool.fs.write(one, (1 << 40) - 10, b"end", WriteFlags::default()).unwrap();
    let unwritten = pool.fs.block_places(one, 0, BLOCK).unwrap();
    assert!(unwritten.blocks.iter().all(|block| block.place.is_none()));
    pool.fs.sync().unwrap();
    let found = pool.fs.block_places(one, 0, BLOCK).unwrap();
    let indices: Vec<u64> = found.blocks.iter().map(|block| block.index).collect();
    let last = (1 << 40) / BLOCK - 1;
    assert_eq!((found.size, found.next, indices), (1 << 40, None, vec![0, 1, 2, 3, last]));
    assert_eq!(pool.fs.block_places(one, last + 1, BLOCK).unwrap().blocks, []);
    assert_eq!(pool.fs.block_places(one, u64::MAX, BLOCK).unwrap().blocks, []);
    // A clone in pieces, which become items of their own.
    let other = pool.file("other", b"");
    for at in (0..content.len() as u64).step_by(4096) {
        assert_eq!(pool.fs.copy_range(one, at, other, at, 4096), Ok(4096));
        pool.fs.sync().unwrap();
    }
    let places = pool.fs.block_places(other, 0, BLOCK).unwrap().blocks;
    assert_eq!(places, found.blocks[..4]);
    for block in [0, 1000, 2048, 6144, 2 * BLOCK_BYTES_MAX] {
        assert_eq!(pool.fs.block_places(one, 0, block).unwrap_err().errno(), Errno::Inval);
    }
    pool.into_sound();
}

#[test]
fn hashes_are_those_of_the_bytes_and_no_time_moves() {
    let pool = Pool::new();
    let content = text(5 * BLOCK as usize + 77, 2);
    let ino = pool.file("file", &content);
    let long_ago = SetTime::At(crate::platform::Timestamp { secs: 1, nanos: 0 });
    let set = SetAttr { atime: Some(long_ago), ..SetAttr::default() };
    pool.fs.setattr(ino, &set, &ROOT).unwrap();
    let before = pool.fs.getattr(ino).unwrap();
    let indices = [0, 1, 3, 4, 5, 6, 900];
    let hashes = pool.fs.block_hashes(ino, BLOCK, &indices).unwrap();
    let of = |index: &u64| {
        let from = content.len().min(*index as usize * BLOCK as usize);
        let part = &content[from..content.len().min(from + BLOCK as usize)];
        (!part.is_empty()).then(|| crate::platform::blake3(part))
    };
    assert_eq!(hashes, indices.iter().map(of).collect::<Vec<_>>());
    assert_eq!(pool.fs.getattr(ino).unwrap(), before);
    let many: Vec<u64> = (0..=HASHED_BYTES_MAX / BLOCK).collect();
    assert_eq!(pool.fs.block_hashes(ino, BLOCK, &many).unwrap_err().errno(), Errno::Inval);
    assert_eq!(pool.fs.block_hashes(ino, 4096, &[u64::MAX]), Ok(vec![None]));
}

#[test]
fn a_file_that_is_damaged_is_named_and_not_shared() {
    let compression = CompressionKind::None;
    let options = FormatOptions { compression, ..FormatOptions::default() };
    let pool = Pool::with(TestPlatform::new(7), &options);
    let content = noise(MIB, 12);
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    pool.fs.sync().unwrap();
    // Of the first of two equal files: data is written in the order of files.
    let image = pool.device.image();
    let at = image.windows(64).position(|bytes| bytes == &content[..64]).unwrap();
    pool.device.flip(at as u64);
    pool.fs.engine().drop_caches();
    let failed = pool.fs.dedupe_range(one, 0, other, 0, MIB as u64).unwrap_err();
    assert!(failed.is_damage(), "{failed}");
    assert_eq!(pool.fs.engine().damaged_files().len(), 1);
    assert!(!pool.is_at_one_place(one, other));
}

/// Writers of both files, each with a copy of what it wrote, and one who shares what is equal at
/// the moment. Half of the blocks of the two files are equal at any time.
#[test]
fn concurrent_writers_find_what_they_wrote() {
    let workers = Arc::new(ThreadWorkers { threads: 2 });
    let pool = Pool::with(TestPlatform::with_workers(3, workers), &FormatOptions::default());
    const BLOCKS: u64 = 64;
    let block = |value: u64| match value % 2 {
        0 => noise(16 << 10, value + 1),
        _ => text(16 << 10, value as u8),
    };
    let size = (BLOCKS as usize) << 14;
    let files = ["one", "other"].map(|name| pool.file(name, &vec![0; size]));
    let has_ended = AtomicBool::new(false);
    let write = |ino: Ino, seed: u64| {
        let mut copy = vec![0u64; BLOCKS as usize];
        let random = noise(3 * 600, seed);
        for step in random.chunks(3) {
            let (at, value) = (u64::from(step[0]) % BLOCKS, u64::from(step[1]) % 4);
            pool.fs.write(ino, at << 14, &block(value), WriteFlags::default()).unwrap();
            copy[at as usize] = value + 1;
            if step[2] < 10 {
                pool.fs.sync().unwrap();
            }
        }
        copy
    };
    let share = || {
        let (mut shared, mut round) = (0, 0u64);
        while !has_ended.load(Ordering::Relaxed) || round == 0 {
            for at in 0..BLOCKS {
                let (from, to) = (at << 14, ((at + round) % BLOCKS) << 14);
                let pairs = [(files[0], files[1]), (files[1], files[0])];
                let (source, target) = pairs[(round % 2) as usize];
                let done = pool.fs.dedupe_range(source, from, target, to, 16 << 10).unwrap();
                shared += match done {
                    Dedupe::Same { bytes, shared } => {
                        assert_eq!(bytes, 16 << 10);
                        shared
                    }
                    Dedupe::Differs => 0,
                };
            }
            round += 1;
        }
        shared
    };
    let (copies, shared) = std::thread::scope(|scope| {
        let sharing = scope.spawn(share);
        let writers = [(files[0], 77), (files[1], 99)];
        let writers = writers.map(|(ino, seed)| scope.spawn(move || write(ino, seed)));
        let copies = writers.map(|writer| writer.join());
        has_ended.store(true, Ordering::Relaxed);
        (copies.map(|copy| copy.unwrap()), sharing.join().unwrap())
    });
    assert!(shared > 0, "nothing was shared");
    for (ino, copy) in files.into_iter().zip(copies) {
        let found = pool.read(ino);
        for (at, (found, value)) in found.chunks(16 << 10).zip(copy).enumerate() {
            let want = value.checked_sub(1).map_or(vec![0; 16 << 10], block);
            assert!(found == want, "block {at} of {ino}");
        }
    }
    pool.into_sound();
}

/// The counters of changes move all the time, by writes to other parts.
#[test]
fn a_part_that_rests_is_shared_while_others_of_its_file_change_all_the_time() {
    let workers = Arc::new(ThreadWorkers { threads: 2 });
    let pool = Pool::with(TestPlatform::with_workers(4, workers), &FormatOptions::default());
    let content = noise(MIB, 21);
    let (one, other) = (pool.file("one", &content), pool.file("other", &content));
    let has_ended = AtomicBool::new(false);
    let shared = std::thread::scope(|scope| {
        for ino in [one, other] {
            let (pool, has_ended) = (&pool, &has_ended);
            scope.spawn(move || {
                let mut value = 0u8;
                while !has_ended.load(Ordering::Relaxed) {
                    value = value.wrapping_add(1);
                    pool.fs.write(ino, 2 << 20, &[value; 100], WriteFlags::default()).unwrap();
                }
            });
        }
        let all = (0..16u64).map(|index| {
            let at = index << 16;
            pool.dedupe((one, at), (other, at), 1 << 16).unwrap().1
        });
        let all: u64 = all.sum();
        has_ended.store(true, Ordering::Relaxed);
        all
    });
    assert_eq!(shared, MIB as u64);
    assert_eq!(pool.read(one)[..MIB], content);
    assert_eq!(pool.read(other)[..MIB], content);
    pool.into_sound();
}
