//! The whole core on a device in memory: the first things anybody would try.

use crate::engine::{data, format, FormatOptions, OpenOptions};
use crate::error::Errno;
use crate::format::chunk::ChunkKind;
use crate::format::inode::NLINK_MAX;
use crate::space::{Class, Reservation};
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, Txg};
use crate::vfs::*;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::vec::Vec;

pub(super) const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };

pub(super) fn new_pool(bytes: u64) -> (Arc<RamDevice>, TestPlatform) {
    let device = RamDevice::new(bytes);
    let test = TestPlatform::new(7);
    format(std::vec![device.device()], test.platform.clone(), &FormatOptions::default()).unwrap();
    (device, test)
}

pub(super) fn mount(device: &Arc<RamDevice>, test: &TestPlatform) -> Arc<Volume> {
    let options = OpenOptions::default();
    Volume::open(std::vec![device.device()], test.platform.clone(), &options, AccessTime::Relative)
        .unwrap()
}

pub(super) fn create(fs: &Volume, dir: Ino, name: &[u8]) -> Ino {
    fs.mknod(dir, name, 0o100644, 0, &ROOT).unwrap().ino
}

pub(super) fn read_all(fs: &Volume, ino: Ino) -> Vec<u8> {
    let size = fs.getattr(ino).unwrap().size as usize;
    let mut out = std::vec![0; size];
    assert_eq!(fs.read(ino, 0, &mut out).unwrap(), size);
    out
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i as u64 * 2654435761) >> 13) as u8 ^ seed).collect()
}

#[test]
fn what_was_written_is_read_after_a_remount() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let dir = fs.mkdir(fs.root(), b"d", 0o755, &ROOT).unwrap().ino;
    let small = create(&fs, dir, b"small");
    fs.write(small, 0, b"hello", WriteFlags::default()).unwrap();
    let big = create(&fs, dir, b"big");
    let data = pattern(3_000_001, 3);
    fs.write(big, 0, &data, WriteFlags::default()).unwrap();
    assert_eq!(read_all(&fs, big), data);
    fs.sync().unwrap();
    assert_eq!(read_all(&fs, big), data);
    fs.write(big, 5000, b"patch", WriteFlags::default()).unwrap();
    fs.close().unwrap();
    drop(fs);

    let fs = mount(&device, &test);
    let dir = fs.lookup(fs.root(), b"d").unwrap().ino;
    let small = fs.lookup(dir, b"small").unwrap();
    assert_eq!(small.size, 5);
    assert_eq!(read_all(&fs, small.ino), b"hello");
    let mut want = data;
    want[5000..5005].copy_from_slice(b"patch");
    let big = fs.lookup(dir, b"big").unwrap().ino;
    assert_eq!(read_all(&fs, big), want);
}

#[test]
fn a_synced_file_survives_without_a_commit() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let first = create(&fs, fs.root(), b"first");
    fs.fsync(first, false).unwrap();
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, b"important", WriteFlags::default()).unwrap();
    fs.fsync(file, false).unwrap();
    let other = create(&fs, fs.root(), b"other");
    fs.write(other, 0, b"not synced", WriteFlags::default()).unwrap();
    fs.shutdown();
    drop(fs);

    let fs = mount(&device, &test);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert_eq!(read_all(&fs, file), b"important");
    assert_eq!(fs.lookup(fs.root(), b"other").unwrap_err().errno(), Errno::NoEnt);
}

#[test]
fn what_is_published_is_not_counted_as_dirty_any_more() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let dirty = || fs.engine().store.dirty.bytes();
    for round in 0..3 {
        let name = [b'a' + round];
        let file = create(&fs, fs.root(), &name);
        for at in [0, 100_000, 1 << 20, 50_000] {
            fs.write(file, at, &pattern(200_000, round), WriteFlags::default()).unwrap();
        }
        let cut = SetAttr { size: Some(70_000), ..SetAttr::default() };
        fs.setattr(file, &cut, &ROOT).unwrap();
        fs.fsync(file, false).unwrap();
        fs.write(file, 4096, &pattern(9 << 20, round), WriteFlags::default()).unwrap();
        assert!(dirty() > 1000, "{} bytes dirty after changes", dirty());
        if round == 1 {
            fs.unlink(fs.root(), b"a").unwrap();
        }
        // What is removed is reclaimed by the group after.
        (0..3).for_each(|_| fs.sync().unwrap());
        assert_eq!(dirty(), 0, "after round {round}");
    }
}

#[test]
fn a_removed_file_gives_its_space_back() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    fs.sync().unwrap();
    let before = fs.statfs().unwrap().available_bytes;
    for round in 0..20 {
        let file = create(&fs, fs.root(), b"file");
        let data: Vec<u8> =
            (0..4_000_000u32).map(|i| (i.wrapping_mul(747796405 + round) >> 11) as u8).collect();
        fs.write(file, 0, &data, WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        fs.forget(file, 1);
        fs.unlink(fs.root(), b"file").unwrap();
        fs.sync().unwrap();
    }
    let after = fs.statfs().unwrap().available_bytes;
    assert!(after + (4 << 20) >= before, "{before} bytes available before, {after} after");
}

#[test]
fn a_full_pool_says_so_and_lets_files_be_removed() {
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let mut at = 0;
    let chunk: Vec<u8> =
        (0..65536u32).map(|i| (i.wrapping_mul(i ^ 0x5bd1e995) >> 7) as u8).collect();
    let error = loop {
        match fs.write(file, at, &chunk, WriteFlags::default()) {
            Ok(_) => at += chunk.len() as u64,
            Err(error) => break error,
        }
        assert!(at < 64 << 20);
    };
    assert_eq!(error.errno(), Errno::NoSpc, "{:?}", test.incidents.take());
    assert!(at > 6 << 20, "only {at} bytes fit");
    fs.sync().unwrap();
    fs.forget(file, 1);
    fs.unlink(fs.root(), b"file").unwrap();
    fs.sync().unwrap();
    let file = create(&fs, fs.root(), b"again");
    fs.write(file, 0, &chunk, WriteFlags::default()).unwrap();
    fs.sync().unwrap();
}

#[test]
fn many_files_in_one_directory_are_all_there() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    for i in 0..3000 {
        create(&fs, fs.root(), std::format!("f{i}").as_bytes());
        if i % 700 == 0 {
            fs.sync().unwrap();
        }
    }
    let mut seen = 0;
    fs.readdir(fs.root(), 0, &mut |_| {
        seen += 1;
        true
    })
    .unwrap();
    assert_eq!(seen, 3002);
    fs.close().unwrap();
    let fs = mount(&device, &test);
    assert!(fs.lookup(fs.root(), b"f2999").is_ok());
    assert!(fs.lookup(fs.root(), b"f3000").is_err());
}

#[test]
fn a_trim_gives_the_device_all_that_is_free_and_harms_nothing() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let kept = create(&fs, fs.root(), b"kept");
    fs.write(kept, 0, &pattern(3 << 20, 1), WriteFlags::default()).unwrap();
    let gone = create(&fs, fs.root(), b"gone");
    fs.write(gone, 0, &pattern(20 << 20, 2), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    fs.unlink(fs.root(), b"gone").unwrap();
    fs.forget(gone, 1);
    fs.engine().tick();
    let synced = create(&fs, fs.root(), b"synced");
    fs.write(synced, 0, &pattern(100_000, 3), WriteFlags::default()).unwrap();
    fs.fsync(synced, false).unwrap();
    let discarded = fs.trim(0, u64::MAX, 0).unwrap();
    assert!(discarded > 50 << 20, "{discarded} bytes of 64 MiB discarded");
    let after = fs.engine().room();
    assert_eq!(fs.trim(0, u64::MAX, 0).unwrap(), discarded, "a second trim differs");
    assert_eq!(fs.engine().room(), after);
    // A log frame on top of what was trimmed, then no power.
    fs.write(synced, 200_000, &pattern(50_000, 4), WriteFlags::default()).unwrap();
    fs.fsync(synced, false).unwrap();
    fs.trim(0, u64::MAX, 1 << 20).unwrap();
    fs.write(synced, 300_000, &pattern(50_000, 5), WriteFlags::default()).unwrap();
    fs.fsync(synced, false).unwrap();
    fs.shutdown();
    drop(fs);

    let fs = mount(&device, &test);
    let kept = fs.lookup(fs.root(), b"kept").unwrap().ino;
    assert_eq!(read_all(&fs, kept), pattern(3 << 20, 1));
    let synced = fs.lookup(fs.root(), b"synced").unwrap().ino;
    let content = read_all(&fs, synced);
    assert_eq!(content[..100_000], pattern(100_000, 3));
    assert_eq!(content[200_000..250_000], pattern(50_000, 4));
    assert_eq!(content[300_000..], pattern(50_000, 5));
}

#[test]
fn a_trim_is_refused_where_it_cannot_be_done() {
    let refused = |fs: &Volume, start| fs.trim(start, u64::MAX, 0).map_err(|error| error.errno());
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    assert_eq!(refused(&fs, 16 << 20), Err(Errno::Inval));
    assert_eq!(refused(&fs, u64::MAX), Err(Errno::Inval));
    device.faults(|faults| faults.refuse_discards = true);
    assert_eq!(refused(&fs, 0), Err(Errno::OpNotSupp));
    device.faults(|faults| faults.no_discards = true);
    assert_eq!(refused(&fs, 0), Err(Errno::OpNotSupp));
    device.faults(|faults| *faults = Default::default());
    assert!(refused(&fs, 0).is_ok());
    fs.set_read_only(true).unwrap();
    assert_eq!(refused(&fs, 0), Err(Errno::RoFs));
    fs.set_read_only(false).unwrap();
    fs.shutdown();
    assert!(refused(&fs, 0).is_err());
}

#[test]
fn a_dot_finds_an_inode_of_any_type_for_as_long_as_it_exists() {
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    let stale = |result: crate::subvol::store::Result<Attr>| result.unwrap_err().errno();
    let dir = fs.mkdir(fs.root(), b"d", 0o755, &ROOT).unwrap().ino;
    let file = create(&fs, dir, b"f");
    let link = fs.symlink(dir, b"l", b"f", &ROOT).unwrap().ino;
    fs.sync().unwrap();
    for ino in [dir, file, link] {
        fs.forget(ino, 1);
    }
    fs.engine().drop_caches();
    for ino in [fs.root(), dir, file, link] {
        assert_eq!(fs.lookup(ino, b".").unwrap().ino, ino);
    }
    assert_eq!(fs.lookup(dir, b"..").unwrap().ino, fs.root());
    assert_eq!(fs.lookup(fs.root(), b"..").unwrap().ino, fs.root());
    assert_eq!(stale(fs.lookup(file, b"..")), Errno::NotDir);
    // Found once by its handle, so it lives on without a name until that is given back.
    fs.unlink(dir, b"f").unwrap();
    assert_eq!(fs.lookup(file, b".").unwrap().nlink, 0);
    fs.forget(file, 2);
    assert_eq!(stale(fs.lookup(file, b".")), Errno::Stale);
    fs.unlink(dir, b"l").unwrap();
    fs.rmdir(fs.root(), b"d").unwrap();
    fs.forget(dir, 1);
    fs.sync().unwrap();
    assert_eq!(stale(fs.lookup(dir, b".")), Errno::Stale);
    assert_eq!(stale(fs.lookup(Ino(0), b".")), Errno::Stale);
    assert_eq!(stale(fs.lookup(Ino(1 << 40), b".")), Errno::Stale);
    assert_eq!(stale(fs.lookup(Ino(u64::MAX), b".")), Errno::Stale);
}

/// Bytes that no compressor makes smaller.
pub(super) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The newest published group.
fn published(fs: &Volume) -> Txg {
    fs.engine().store.groups.published()
}

/// A pool whose log has begun, and whose free space is all in chunks that are published: where
/// records may name new data, so that a sync writes a frame and no group.
pub(super) fn with_log(bytes: u64) -> (Arc<RamDevice>, TestPlatform, Arc<Volume>) {
    let (device, test) = new_pool(bytes);
    let fs = mount(&device, &test);
    let name = |n: u64| std::format!("filler {n}");
    let filled = (0..).find(|n| {
        let ino = create(&fs, fs.root(), name(*n).as_bytes());
        let written = fs.write(ino, 0, &noise(300 << 10, n + 100), WriteFlags::default());
        fs.forget(ino, 1);
        written.is_err()
    });
    fs.sync().unwrap();
    let fillers = filled.unwrap();
    (0..fillers).step_by(2).for_each(|n| fs.unlink(fs.root(), name(n).as_bytes()).unwrap());
    fs.sync().unwrap();
    fs.engine().tick();
    fs.sync().unwrap();
    let first = create(&fs, fs.root(), b"first");
    fs.fsync(first, false).unwrap();

    // So much is written to its place before anybody asks.
    let before = published(&fs);
    fs.write(first, 0, &noise(9 << 20, 3), WriteFlags::default()).unwrap();
    fs.fsync(first, false).unwrap();
    assert_eq!(published(&fs), before, "new data is synced by a commit, not by the log");
    (device, test, fs)
}

#[test]
fn a_synced_clone_of_a_file_that_was_not_synced_keeps_its_bytes() {
    let (device, test, fs) = with_log(64 << 20);
    let data = noise(9 << 20, 5);
    let source = create(&fs, fs.root(), b"source");
    fs.write(source, 0, &data, WriteFlags::default()).unwrap();
    let clone = create(&fs, fs.root(), b"clone");
    let copied = fs.copy_range(source, 0, clone, 0, data.len() as u64).unwrap();
    assert_eq!(copied, data.len() as u64);
    fs.fsync(clone, false).unwrap();
    assert!(after_power_loss(&device, &test, fs, b"clone") == data, "the clone has other bytes");
}

/// The pool as it is found after a power failure.
pub(super) fn power_loss(
    device: &Arc<RamDevice>,
    test: &TestPlatform,
    fs: Arc<Volume>,
) -> Arc<Volume> {
    fs.shutdown();
    drop(fs);
    mount(device, test)
}

/// What a file holds when the power has failed and what is free then has been used again.
fn after_power_loss(
    device: &Arc<RamDevice>,
    test: &TestPlatform,
    fs: Arc<Volume>,
    name: &[u8],
) -> Vec<u8> {
    let fs = power_loss(device, test, fs);
    let file = fs.lookup(fs.root(), name).unwrap().ino;
    let other = create(&fs, fs.root(), b"other");
    let _ = fs.write(other, 0, &noise(12 << 20, 6), WriteFlags::default());
    fs.sync().unwrap();
    read_all(&fs, file)
}

#[test]
fn ranges_moved_within_a_file_keep_their_bytes_when_synced() {
    let (device, test, fs) = with_log(64 << 20);
    let data = noise(9 << 20, 7);
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, &data, WriteFlags::default()).unwrap();
    fs.fallocate(file, Fallocate::CollapseRange, 0, 1 << 20).unwrap();
    fs.fsync(file, false).unwrap();
    let found = after_power_loss(&device, &test, fs, b"file");
    assert!(found == data[1 << 20..], "the file has other bytes");
}

#[test]
fn a_large_file_makes_room_for_the_next_as_soon_as_it_is_removed() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let mut written = 0;
    for round in 0..4 {
        let file = create(&fs, fs.root(), b"file");
        let mut size = 0u64;
        let piece = noise(1 << 20, round + 1);
        while fs.write(file, size, &piece, WriteFlags::default()).is_ok() {
            size += piece.len() as u64;
        }
        assert!(size >= written / 10 * 9, "{written} bytes fit, then {size}");
        written = written.max(size);
        fs.unlink(fs.root(), b"file").unwrap();
        fs.forget(file, 1);
    }
}

#[test]
fn a_file_of_many_extents_is_removed_a_part_each_tick_without_waiting_for_a_commit_to_be_due() {
    let (device, test) = new_pool(256 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let sector = noise(4096, 1);
    for n in 0..20_000 {
        fs.write(file, n << 13, &sector, WriteFlags::default()).unwrap();
    }
    fs.sync().unwrap();
    fs.unlink(fs.root(), b"file").unwrap();
    fs.forget(file, 1);
    let ticks = (1..=6).find(|_| {
        // No time passes.
        fs.engine().tick();
        fs.statfs().unwrap().inodes == 1
    });
    assert!(ticks.is_some_and(|ticks| ticks >= 3), "gone after {ticks:?} ticks");
}

#[test]
fn whoever_needs_room_gets_that_of_a_file_of_many_extents_that_was_removed() {
    let (device, test) = new_pool(128 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let sector = noise(4096, 1);
    let full = (0..).find(|n| fs.write(file, n << 13, &sector, WriteFlags::default()).is_err());
    let extents = full.unwrap();
    assert!(extents > 20_000, "{extents} extents");
    fs.sync().unwrap();
    fs.unlink(fs.root(), b"file").unwrap();
    fs.forget(file, 1);
    let next = create(&fs, fs.root(), b"next");
    for n in 0..(extents * 4096 / 10 * 9) >> 20 {
        let written = fs.write(next, n << 20, &noise(1 << 20, n), WriteFlags::default());
        written.unwrap_or_else(|error| panic!("{extents} extents, then {n} MiB: {error}"));
    }
}

#[test]
fn small_writes_in_a_row_need_few_commits_on_a_pool_that_is_nearly_full() {
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    let (filler, log) = (create(&fs, fs.root(), b"filler"), create(&fs, fs.root(), b"log"));
    fs.write(log, 0, &noise(8192, 1), WriteFlags::default()).unwrap();
    let piece = noise(4096, 2);
    let mut at = 0;
    while fs.write(filler, at, &piece, WriteFlags::default()).is_ok() {
        at += 4096;
    }
    let set = SetAttr { size: Some(at - 40_000), ..SetAttr::default() };
    fs.setattr(filler, &set, &ROOT).unwrap();
    fs.sync().unwrap();
    let before = published(&fs).0;
    for n in 0..4000 {
        fs.write(log, 8192 + 2 * n, b"ab", WriteFlags::default()).unwrap();
    }
    let commits = published(&fs).0 - before;
    assert!(commits < 20, "{commits} commits for 4000 writes to two sectors");
}

/// Promises everything that is left to somebody else.
fn take_all_room(fs: &Volume) -> Vec<Reservation> {
    let space = &fs.engine().store.space;
    let mut held = Vec::new();
    let mut take = |data: u64, metadata: u64, class| {
        let one = space.reserve(data, metadata, class);
        one.map(|one| held.push(one)).is_ok()
    };
    for shift in (12..26).rev() {
        while take(1 << shift, 0, Class::Admin) {}
    }
    for class in [Class::Normal, Class::Admin] {
        (0..1000).any(|_| !take(0, 16384, class));
    }
    held
}

#[test]
fn a_file_whose_removal_found_no_room_is_removed_when_there_is_some() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    fs.unlink(fs.root(), b"file").unwrap();
    fs.sync().unwrap();
    let inodes = || fs.statfs().unwrap().inodes;
    let held = take_all_room(&fs);
    fs.forget(file, 1);
    assert_eq!(inodes(), 2, "there was room");
    drop(held);
    fs.engine().tick();
    assert_eq!(inodes(), 1);
}

#[test]
fn promised_room_is_nobody_elses_while_the_promise_is_committed() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let room = 8 << 20;
    fs.fallocate(file, Fallocate::Allocate { keep_size: true }, 0, room).unwrap();
    let (sender, taken) = std::sync::mpsc::channel();
    let other = fs.clone();
    device.on_next_flush(move || sender.send(take_all_room(&other)).unwrap());
    fs.sync().unwrap();
    let mut held = taken.recv().unwrap();
    // Others give back what a write needs of metadata.
    held.retain(|one| one.data() > 0);
    fs.write(file, 0, &noise(room as usize, 1), WriteFlags::default()).unwrap();
    drop(held);
    fs.sync().unwrap();
}

#[test]
fn a_scrub_does_not_begin_while_a_group_is_written() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    create(&fs, fs.root(), b"file");
    let (sender, answer) = std::sync::mpsc::channel();
    let engine = fs.engine().clone();
    device.on_next_flush(move || {
        let starter = engine.clone();
        let start = std::thread::spawn(move || starter.start_scrub(0));
        // Long enough for one that does not wait.
        std::thread::sleep(std::time::Duration::from_millis(100));
        sender.send((engine.scrub_status().is_some(), start)).unwrap();
    });
    fs.sync().unwrap();
    let (has_begun, start) = answer.recv().unwrap();
    start.join().unwrap().unwrap();
    assert!(!has_begun, "what the group moved would be passed over");
    assert!(fs.engine().scrub_status().is_some());
}

#[test]
fn of_more_damaged_files_than_are_remembered_nobody_is_told() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let note = |number: u64| {
        let (tree, ino) = (crate::units::TreeId(256), Ino(number));
        fs.engine().note_damaged(crate::engine::DamagedFile { tree, ino, path: Vec::new() })
    };
    assert!(note(0) && !note(0));
    let told = (1..5000).filter(|number| note(*number)).count();
    assert_eq!(told + 1, fs.engine().damaged_files().len());
}

#[test]
fn what_is_accepted_while_a_pool_becomes_read_only_is_durable_when_it_is() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let (sender, answer) = std::sync::mpsc::channel();
    let writer = fs.clone();
    device.on_next_flush(move || {
        let write = move || writer.write(file, 0, b"late", WriteFlags::default());
        sender.send(std::thread::spawn(write).join().unwrap()).unwrap();
    });
    fs.set_read_only(true).unwrap();
    let accepted = answer.recv().unwrap();
    let fs = power_loss(&device, &test, fs);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    match accepted {
        Ok(_) => assert_eq!(read_all(&fs, file), b"late"),
        Err(error) => assert_eq!(error.errno(), Errno::RoFs),
    }
}

#[test]
fn what_is_left_to_commit_when_a_pool_is_read_only_is_committed_by_whoever_asks_first() {
    type Ask = fn(&Volume, Ino);
    let asks: [Ask; 3] = [
        |fs, file| fs.fsync(file, false).unwrap(),
        |fs, _| fs.engine().tick(),
        |fs, _| fs.close().unwrap(),
    ];
    for ask in asks {
        let (device, test) = new_pool(16 << 20);
        let fs = mount(&device, &test);
        let file = create(&fs, fs.root(), b"file");
        fs.write(file, 0, b"kept", WriteFlags::default()).unwrap();
        // An operation that was let in just before, and came to its end just after.
        fs.engine().store.set_read_only(true);
        test.clock.advance(60_000_000_000);
        ask(&fs, file);
        let fs = power_loss(&device, &test, fs);
        let file = fs.lookup(fs.root(), b"file").unwrap().ino;
        assert_eq!(read_all(&fs, file), b"kept");
    }
}

#[test]
fn a_device_that_refused_an_early_write_is_not_trusted_with_a_commit() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    fs.sync().unwrap();
    device.faults(|faults| faults.fail_writes = std::vec![0..u64::MAX]);
    fs.write(file, 0, &noise(9 << 20, 1), WriteFlags::default()).unwrap();
    device.faults(|faults| faults.fail_writes.clear());
    assert_eq!(fs.sync().unwrap_err().errno(), Errno::Io);
}

#[test]
fn space_taken_for_data_that_found_no_room_is_given_back() {
    let with_file = || {
        let (device, test) = new_pool(64 << 20);
        let fs = mount(&device, &test);
        let file = create(&fs, fs.root(), b"file");
        for n in 0..4 {
            fs.write(file, n << 20, &noise(1 << 20, n), WriteFlags::default()).unwrap();
        }
        // Or others could not take what was promised to it.
        drop(fs.engine().store.take_reserved(fs.engine().store.groups.open()));
        (fs, file)
    };
    let take = |fs: &Volume| {
        let (store, txg) = (&fs.engine().store, fs.engine().store.groups.open());
        store.space.allocate(ChunkKind::Data, 1 << 20, 4096, txg, &**store).ok()
    };
    let (fs, _) = with_file();
    let runs = std::iter::from_fn(|| take(&fs)).count();
    fs.shutdown();

    // Room is left for a part of the file.
    let (fs, file) = with_file();
    (1..runs).for_each(|_| assert!(take(&fs).is_some()));
    let (engine, store) = (fs.engine(), &fs.engine().store);
    let (txg, before) = (store.groups.open(), store.space.usage().data.used_bytes);
    let subvol = engine.default_subvol().unwrap();
    let inode = subvol.table.get(file).unwrap();
    let tasks = data::tasks(&subvol, &inode, &inode.state.read(), txg, false);
    assert_eq!(data::write_tasks(store, tasks).unwrap_err().errno(), Errno::NoSpc);
    let taken = store.space.usage().data.used_bytes - before;
    let spare: u64 = store.take_spare(txg).iter().map(|run| run.bytes).sum();
    let garbage: u64 = store.take_debts(txg).garbage.iter().map(|run| run.bytes).sum();
    assert!(taken > 0, "there was no room at all");
    assert_eq!(spare + garbage, taken);
    fs.shutdown();
}

#[test]
fn links_beyond_what_an_inode_can_count_are_refused() {
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    let dir = |name| fs.mkdir(fs.root(), name, 0o755, &ROOT).unwrap().ino;
    let (full, other) = (dir(b"full"), dir(b"other"));
    let file = create(&fs, other, b"file");
    fs.mkdir(other, b"sub", 0o755, &ROOT).unwrap();
    let subvol = fs.engine().default_subvol().unwrap();
    for ino in [full, file] {
        subvol.inode(ino).unwrap().state.write().item.nlink = NLINK_MAX;
    }
    let refused = |result: Result<(), crate::error::Error>| {
        assert_eq!(result.unwrap_err().errno(), Errno::MLink);
    };
    refused(fs.mkdir(full, b"sub", 0o755, &ROOT).map(|_| ()));
    refused(fs.link(file, other, b"link").map(|_| ()));
    refused(fs.rename(other, b"sub", full, b"sub", RenameFlags::default(), &ROOT));
    create(&fs, full, b"file");
    let exchange = RenameFlags { exchange: true, ..RenameFlags::default() };
    refused(fs.rename(other, b"sub", full, b"file", exchange, &ROOT));
    fs.shutdown();
}

#[test]
fn what_was_under_way_when_a_pool_became_read_only_is_there_later() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, b"kept", WriteFlags::default()).unwrap();
    fs.set_read_only(true).unwrap();
    let refused = fs.write(file, 0, b"lost", WriteFlags::default());
    assert_eq!(refused.unwrap_err().errno(), Errno::RoFs);
    fs.fsync(file, false).unwrap();
    fs.close().unwrap();
    drop(fs);
    let fs = mount(&device, &test);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert_eq!(read_all(&fs, file), b"kept");
}

#[test]
fn after_a_failure_changes_are_refused_lost_ones_reported_and_reads_go_on() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let kept = create(&fs, fs.root(), b"kept");
    fs.write(kept, 0, &pattern(100_000, 1), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    fs.write(kept, 200_000, b"accepted", WriteFlags::default()).unwrap();
    device.faults(|faults| faults.fail_flush = true);
    assert_eq!(fs.sync().unwrap_err().errno(), Errno::Io);
    device.faults(|faults| faults.fail_flush = false);

    let errno = |result: Result<(), crate::error::Error>| result.unwrap_err().errno();
    let write = |data: &[u8]| fs.write(kept, 0, data, WriteFlags::default()).map(|_| ());
    assert_eq!(errno(write(b"no")), Errno::RoFs);
    assert_eq!(errno(fs.mknod(fs.root(), b"new", 0o100644, 0, &ROOT).map(|_| ())), Errno::RoFs);
    assert_eq!(errno(fs.unlink(fs.root(), b"kept")), Errno::RoFs);
    assert_eq!(errno(fs.set_label(b"name")), Errno::RoFs);
    assert_eq!(errno(fs.trim(0, u64::MAX, 0).map(|_| ())), Errno::RoFs);
    // However often it is asked.
    for _ in 0..2 {
        assert_eq!(errno(fs.fsync(kept, false)), Errno::Io);
        assert_eq!(errno(fs.sync()), Errno::Io);
    }
    let mut out = std::vec![0; 100_000];
    assert_eq!(fs.read(kept, 0, &mut out).unwrap(), out.len());
    assert_eq!(out, pattern(100_000, 1));
    assert!(fs.close().is_err());

    // Power going away is no such failure: there is no filesystem left to be read-only.
    let fs = mount(&device, &test);
    let kept = fs.lookup(fs.root(), b"kept").unwrap();
    assert_eq!(kept.size, 100_000);
    fs.shutdown();
    assert_eq!(errno(fs.unlink(fs.root(), b"kept")), Errno::Io);
    assert_eq!(errno(fs.sync()), Errno::Io);
}

#[test]
fn a_write_that_finds_no_room_because_the_commit_fails_is_refused_not_lost() {
    let (device, test) = new_pool(16 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    device.faults(|faults| faults.fail_flush = true);
    let chunk = pattern(1 << 20, 9);
    let refused = (0..64).find_map(|n| {
        fs.write(file, n << 20, &chunk, WriteFlags::default()).err().map(|error| error.errno())
    });
    assert_eq!(refused, Some(Errno::RoFs));
    assert_eq!(fs.fsync(file, false).unwrap_err().errno(), Errno::Io);
}

#[test]
fn many_files_made_and_removed_in_one_group_leave_it_room_to_commit() {
    let (device, test) = new_pool(256 << 20);
    let fs = mount(&device, &test);
    let name = |n: u32| std::format!("f{n}");
    for n in 0..3000 {
        let ino = create(&fs, fs.root(), name(n).as_bytes());
        fs.write(ino, 0, &noise(4096, u64::from(n)), WriteFlags::default()).unwrap();
        fs.forget(ino, 1);
    }
    (0..3000).for_each(|n| fs.unlink(fs.root(), name(n).as_bytes()).unwrap());
    let last = create(&fs, fs.root(), b"last");
    fs.write(last, 0, &noise(8 << 10, 9), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
}

#[test]
fn errors_of_devices_are_kept_until_they_are_cleared() {
    let (device, test) = new_pool(64 << 20);
    let errors = |fs: &Volume| fs.engine().store.pool.members()[0].errors();
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    device.faults(|faults| faults.fail_reads = std::vec![1 << 20..60 << 20]);
    let mut buf = [0; 4096];
    fs.read(file, 8192, &mut buf).unwrap_err();
    device.faults(|faults| *faults = Default::default());
    assert!(errors(&fs).read > 0);
    let damaged = fs.engine().damaged_files();
    assert_eq!(damaged.len(), 1);
    assert_eq!((damaged[0].ino, &damaged[0].path[..]), (file, &b"/file"[..]));
    let seen = errors(&fs);
    create(&fs, fs.root(), b"more");
    fs.close().unwrap();
    drop(fs);

    let fs = mount(&device, &test);
    assert_eq!(errors(&fs), seen);
    fs.engine().clear_errors().unwrap();
    assert_eq!(fs.engine().damaged_files(), std::vec![]);
    // It is durable then.
    fs.shutdown();
    drop(fs);
    let fs = mount(&device, &test);
    assert_eq!(errors(&fs), Default::default());
}

/// Room for what a group makes of extents: whatever was accepted on a nearly full pool can be
/// committed.
mod room {
    use crate::check::{check, CheckOptions, Quiet};
    use crate::engine::tests::{create, mount, new_pool, noise, ROOT};
    use crate::engine::versions::VersionOp;
    use crate::error::Errno;
    use crate::testing::{RamDevice, TestPlatform};
    use crate::units::{Ino, TreeId};
    use crate::vfs::*;
    use std::string::String;
    use std::sync::Arc;
    use std::vec::Vec;

    fn is_sound(device: &Arc<RamDevice>, test: &TestPlatform) {
        let options = CheckOptions::default();
        let report = check(std::vec![device.device()], test.platform.clone(), &options, &Quiet);
        let findings = report.unwrap().findings;
        let findings: Vec<String> = findings.iter().map(|found| std::format!("{found}")).collect();
        assert_eq!(findings, Vec::<String>::new());
    }

    /// A file of so many extents of a sector, far apart in the file, and not neighbours
    /// on the device.
    fn scattered(fs: &Volume, name: &[u8], extents: u64) -> Ino {
        let file = create(fs, fs.root(), name);
        let rounds = 16;
        for round in 0..rounds {
            for index in (round..extents).step_by(rounds as usize) {
                let data = noise(4096, index + 1);
                fs.write(file, index * 8192, &data, WriteFlags::default()).unwrap();
            }
            fs.sync().unwrap();
        }
        file
    }

    /// Takes all room but so many bytes.
    fn fill_but(fs: &Volume, left: u64) -> Ino {
        let file = create(fs, fs.root(), b"filler");
        let mut at = 0;
        for bytes in [1 << 16, 1 << 12] {
            let data = noise(bytes, at + 1);
            while fs.write(file, at, &data, WriteFlags::default()).is_ok() {
                at += bytes as u64;
            }
        }
        let set = SetAttr { size: Some(at - left), ..SetAttr::default() };
        fs.setattr(file, &set, &ROOT).unwrap();
        (0..3).for_each(|_| fs.sync().unwrap());
        file
    }

    /// The group that took what was accepted can be published, and the pool is as it should be.
    fn commits(fs: Arc<Volume>, device: &Arc<RamDevice>, test: &TestPlatform) {
        fs.sync().unwrap();
        fs.engine().store.writable().unwrap();
        fs.close().unwrap();
        drop(fs);
        is_sound(device, test);
    }

    fn no_space<T: core::fmt::Debug>(result: Result<T>) {
        assert_eq!(result.unwrap_err().errno(), Errno::NoSpc);
    }

    #[test]
    fn extents_are_shared_or_refused_on_a_nearly_full_pool_but_never_fail_the_commit() {
        for left in [2 << 20, 12 << 20, 24 << 20] {
            let (device, test) = new_pool(128 << 20);
            let fs = mount(&device, &test);
            let extents = 12000;
            let file = scattered(&fs, b"file", extents);
            fill_but(&fs, left);
            let len = extents * 8192 - 4096;
            let (mut copies, mut shared) = (0, 0);
            loop {
                let target = match fs.mknod(fs.root(), &[b'c', b'0' + copies], 0o100644, 0, &ROOT) {
                    Ok(attr) => attr.ino,
                    Err(error) => {
                        assert_eq!(error.errno(), Errno::NoSpc);
                        break;
                    }
                };
                copies += 1;
                if let Err(error) = fs.copy_range(file, 0, target, 0, len) {
                    assert_eq!(error.errno(), Errno::NoSpc);
                    break;
                }
                shared += 1;
            }
            assert!(left < 24 << 20 || shared > 0, "nothing is shared with {left} bytes left");
            commits(fs, &device, &test);
        }
    }

    #[test]
    fn shared_extents_are_cut_or_removed_on_a_full_pool_and_never_fail_the_commit() {
        for with_snapshot in [false, true] {
            let (device, test) = new_pool(32 << 20);
            let fs = mount(&device, &test);
            let extents = 1500;
            let file = scattered(&fs, b"file", extents);
            let len = extents * 8192 - 4096;
            let copies: Vec<Ino> = (0..3u8)
                .map(|index| {
                    let target = create(&fs, fs.root(), &[b'c', b'0' + index]);
                    fs.copy_range(file, 0, target, 0, len).unwrap();
                    fs.sync().unwrap();
                    target
                })
                .collect();
            if with_snapshot {
                let op =
                    VersionOp::Snapshot { subvolume: TreeId::FIRST_SUBVOL.0, name: b"s".into() };
                fs.engine().change_versions(std::vec![op]).unwrap();
            }
            fill_but(&fs, 0);
            // One of them goes; of another, every second extent; of the last its end.
            fs.unlink(fs.root(), b"c0").unwrap();
            fs.forget(copies[0], 1);
            for index in (0..extents).step_by(2) {
                match fs.fallocate(copies[1], Fallocate::PunchHole, index * 8192, 4096) {
                    Ok(()) => {}
                    Err(error) => assert_eq!(error.errno(), Errno::NoSpc),
                }
            }
            let set = SetAttr { size: Some(8192), ..SetAttr::default() };
            if let Err(error) = fs.setattr(copies[2], &set, &ROOT) {
                assert_eq!(error.errno(), Errno::NoSpc);
            }
            fs.engine().tick();
            fs.sync().unwrap();
            fs.engine().reclaim_all();
            commits(fs, &device, &test);
        }
    }

    /// What operations of the open group have reserved: data and metadata.
    fn reserved(fs: &Volume) -> (u64, u64) {
        let store = &fs.engine().store;
        let txg = store.groups.open();
        let all = store.take_reserved(txg);
        let sum = all.iter().fold((0, 0), |sum, one| (sum.0 + one.data(), sum.1 + one.metadata()));
        all.into_iter().for_each(|one| store.keep(txg, one));
        sum
    }

    #[test]
    fn holes_are_promised_room_by_their_number() {
        let (device, test) = new_pool(64 << 20);
        let fs = mount(&device, &test);
        // One sector at many places, with holes between them.
        let sector = create(&fs, fs.root(), b"sector");
        fs.write(sector, 0, &noise(4096, 1), WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        let file = create(&fs, fs.root(), b"file");
        let extents = 3000;
        for index in 0..extents {
            fs.copy_range(sector, 0, file, index * 8192, 4096).unwrap();
        }
        fs.sync().unwrap();
        let op = Fallocate::Allocate { keep_size: false };
        fs.fallocate(file, op, 0, extents * 8192).unwrap();
        let (data, metadata) = reserved(&fs);
        assert!(data >= extents * 4096, "{data} bytes of data");
        // An item for each hole, and those between them again.
        assert!(metadata >= 2 * extents * 72, "{metadata} bytes of metadata");
        fill_but(&fs, 0);
        commits(fs, &device, &test);
    }

    #[test]
    fn bytes_under_way_that_are_moved_have_room_at_both_places() {
        let (device, test) = new_pool(64 << 20);
        let fs = mount(&device, &test);
        let file = create(&fs, fs.root(), b"file");
        fs.write(file, 0, &noise(4096, 1), WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        for at in (0..3u64 << 20).step_by(1 << 16) {
            fs.write(file, at, &noise(1 << 16, at), WriteFlags::default()).unwrap();
        }
        let (before, _) = reserved(&fs);
        fs.fallocate(file, Fallocate::InsertRange, 0, 4096).unwrap();
        let (after, _) = reserved(&fs);
        assert!(after - before >= 3 << 20, "{} bytes for 3 MiB that move", after - before);
        fill_but(&fs, 0);
        match fs.fallocate(file, Fallocate::InsertRange, 0, 4096) {
            Ok(()) => {}
            other => no_space(other),
        }
        commits(fs, &device, &test);
    }
}

#[test]
fn room_of_a_change_that_was_cancelled_comes_back_when_nobody_writes_there_any_more() {
    let (device, test) = new_pool(32 << 20);
    let fs = mount(&device, &test);
    let engine = fs.engine().clone();
    let file = create(&fs, fs.root(), b"a");
    fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    let pool = engine.store.pool.clone();
    engine.add_device(RamDevice::new(32 << 20).device()).unwrap();
    let before = pool.unallocated_bytes();
    // Somebody reads what there was, so that chunks do not just move.
    let view = engine.store.space_view();
    engine.remove_device(0).unwrap();
    engine.change_some();
    assert!(pool.moves() > 0);
    let chunks = pool.chunks();
    let chunk = chunks.iter().find(|chunk| chunk.kind == ChunkKind::Data).unwrap();
    let addr = crate::units::Logical(chunk.logical.0 + chunk.length - 4096);
    let bufs = std::vec![crate::buf::Buf::zeroed(4096).unwrap().into_slice()];
    let (cancels, tells) = (engine.clone(), std::sync::Arc::new(AtomicU64::new(0)));
    let told = tells.clone();
    device.on_next_write(move || {
        cancels.cancel_device_change().unwrap();
        tells.store(cancels.store.pool.unallocated_bytes(), Ordering::SeqCst);
    });
    // The last sector of a chunk is nobody's yet.
    pool.write(std::vec![crate::pool::RunWrite { addr, bufs }]).unwrap();
    assert!(told.load(Ordering::SeqCst) < before, "nobody wrote there");
    drop(view);
    engine.tick();
    assert_eq!(pool.unallocated_bytes(), before);
    fs.close().unwrap();
}

#[test]
fn who_has_the_times_of_a_write_keeps_those_of_a_moment_ago() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"f");
    let written = |flags, seconds: u64| {
        test.clock.advance(seconds * 1_000_000_000);
        fs.write(file, 0, b"x", flags).unwrap();
        fs.getattr(file).unwrap()
    };
    let has_times = WriteFlags { has_times: true, ..WriteFlags::default() };
    let first = written(WriteFlags::default(), 1);
    let kept = written(has_times, 1);
    assert_eq!((kept.mtime, kept.ctime), (first.mtime, first.ctime));
    let later = written(WriteFlags::default(), 1);
    assert!(later.mtime > first.mtime && later.ctime > first.ctime);
    // If it comes to nothing but that write, nobody takes the file for what it was.
    let much_later = written(has_times, 60);
    assert!(much_later.mtime > later.mtime && much_later.ctime > later.ctime);
}
