//! What goes into a frame, and who waits for it.

use super::*;
use crate::engine::tests::{create, mount, new_pool, noise, power_loss, read_all, with_log, ROOT};
use crate::format::ptr::ChecksumKind;
use crate::subvol::extents::Place;
use crate::subvol::store::DataSettings;
use crate::vfs::{Filesystem, SetAttr, Volume, WriteFlags};
use std::sync::mpsc::channel;
use std::time::Duration;

fn write(fs: &Volume, ino: Ino, offset: u64, data: &[u8]) {
    fs.write(ino, offset, data, WriteFlags::default()).unwrap();
}

#[test]
fn what_the_writer_of_a_group_looks_at_is_not_logged_behind_newer_bytes() {
    let (_device, _test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    sync_by_frame(&fs, file);
    write(&fs, file, 0, b"old");
    let engine = fs.engine();
    let subvol = engine.default_subvol().unwrap();
    let request = || std::vec![(subvol.id, file)];

    // The group is closed, and its writer holds what it made of the file.
    let closed = engine.store.groups.close();
    write(&fs, file, 0, b"new");
    let inode = subvol.table.get(file).unwrap();
    let held = inode.state.read().aside.clone().unwrap();
    assert_eq!(held.txg, closed);
    // In a frame of now "old" would stand before "new", and in the next one again, behind it.
    assert!(matches!(engine.collect(request()), Err(Trouble::NeedsCommit)));
    drop(held);
    assert_eq!(engine.collect(request()).map(|payload| payload.newest).ok(), Some(closed.next()));
    fs.shutdown();
}

/// Calls fsync, which must write a frame and no group.
fn sync_by_frame(fs: &Volume, ino: Ino) {
    let published = fs.engine().store.groups.published();
    fs.fsync(ino, false).unwrap();
    assert_eq!(fs.engine().store.groups.published(), published, "synced by a commit");
}

#[test]
fn a_sync_waits_for_the_frame_that_has_taken_its_changes() {
    let (device, _test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    write(&fs, file, 0, b"data");

    let (flushing, in_flush) = channel();
    let (go_on, may_go_on) = channel::<()>();
    device.on_next_flush(move || {
        flushing.send(()).unwrap();
        may_go_on.recv().unwrap();
    });
    let spawn_sync = || {
        let (fs, (done, is_done)) = (fs.clone(), channel());
        std::thread::spawn(move || done.send(fs.fsync(file, false)).unwrap());
        is_done
    };
    let published = fs.engine().store.groups.published();
    let first = spawn_sync();
    in_flush.recv().unwrap();
    // Nothing of the file is missing in the log now, but the frame is not durable.
    let second = spawn_sync();
    let early = second.recv_timeout(Duration::from_millis(300));
    go_on.send(()).unwrap();
    assert!(early.is_err(), "a sync returned before the flush of the frame");
    first.recv().unwrap().unwrap();
    second.recv().unwrap().unwrap();
    assert_eq!(fs.engine().store.groups.published(), published, "synced by a commit");
}

#[test]
fn a_commit_in_place_of_a_frame_has_all_that_was_taken_for_the_frame() {
    let (device, test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    // More records than a frame holds.
    for n in 0..4000 {
        let set = SetAttr { mode: Some(0o600 + n % 64), ..SetAttr::default() };
        fs.setattr(file, &set, &ROOT).unwrap();
    }
    write(&fs, file, 0, &noise(1 << 20, 4));
    // While the file's bytes are written to their place, somebody begins a commit, and somebody
    // else makes a directory in the group that it opens.
    let other = fs.clone();
    device.on_next_write(move || {
        let groups = &other.engine().store.groups;
        let before = groups.open();
        let committing = other.clone();
        std::thread::spawn(move || committing.sync().unwrap());
        while groups.open() == before {
            std::thread::yield_now();
        }
        let make = move || other.mkdir(other.root(), b"late", 0o755, &ROOT).map(drop);
        std::thread::spawn(make).join().unwrap().unwrap();
    });
    fs.fsync(file, false).unwrap();
    let late = fs.lookup(fs.root(), b"late").unwrap().ino;
    fs.fsync(late, false).unwrap();
    let fs = power_loss(&device, &test, fs);
    assert!(fs.lookup(fs.root(), b"late").is_ok(), "a directory that was synced is gone");
}

#[test]
fn data_that_replay_cannot_verify_is_durable_before_the_frame_that_names_it() {
    for (checksum, flushes) in [(ChecksumKind::Crc32c, 1), (ChecksumKind::None, 2)] {
        let (device, test, fs) = with_log(64 << 20);
        let store = &fs.engine().store;
        store.set_settings(DataSettings { checksum, ..store.settings() });
        let file = create(&fs, fs.root(), b"file");
        write(&fs, file, 0, &noise(1 << 20, 4));
        let before = device.requests();
        sync_by_frame(&fs, file);
        assert_eq!(device.requests().flushes - before.flushes, flushes, "{checksum:?}");
        let fs = power_loss(&device, &test, fs);
        let file = fs.lookup(fs.root(), b"file").unwrap().ino;
        assert!(read_all(&fs, file) == noise(1 << 20, 4), "{checksum:?}");
    }
}

/// Bytes of a file in memory, and those of them that the log lacks.
fn in_memory(fs: &Volume, ino: Ino) -> (u64, u64) {
    let inode = fs.engine().default_subvol().unwrap().table.get(ino).unwrap();
    let state = inode.state.read();
    (state.ranges.data_bytes(), state.ranges.fresh_bytes())
}

#[test]
fn what_the_log_has_stays_in_memory_until_the_commit() {
    let (device, test) = new_pool(256 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    // The first groups publish a chunk for data, and the place of the log in it.
    let is_synced_by_frame = |_| {
        write(&fs, file, 0, &noise(4096, 3));
        let published = fs.engine().store.groups.published();
        fs.fsync(file, false).unwrap();
        fs.engine().store.groups.published() == published
    };
    assert!((0..10).any(is_synced_by_frame));
    fs.sync().unwrap();
    let data = noise(48 * 4096, 4);
    for (index, part) in data.chunks(4096).enumerate() {
        write(&fs, file, index as u64 * 4096, part);
        assert_eq!(in_memory(&fs, file).1, 4096);
        sync_by_frame(&fs, file);
        assert_eq!(in_memory(&fs, file), ((index as u64 + 1) * 4096, 0));
    }
    let fs = power_loss(&device, &test, fs);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert!(read_all(&fs, file)[..data.len()] == data);
    fs.shutdown();
}

#[test]
fn what_is_too_long_for_the_log_goes_to_its_place() {
    let (device, test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    sync_by_frame(&fs, file);
    let data = noise(LOG_DATA_MAX as usize + 4096, 5);
    write(&fs, file, 0, &data);
    assert_eq!(in_memory(&fs, file), (data.len() as u64, data.len() as u64));
    sync_by_frame(&fs, file);
    assert_eq!(in_memory(&fs, file), (0, 0));
    let fs = power_loss(&device, &test, fs);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert!(read_all(&fs, file) == data);
    fs.shutdown();
}

#[test]
fn a_frame_that_shares_what_nobody_has_is_not_believed() {
    let (device, test, fs) = with_log(64 << 20);
    let engine = fs.engine();
    let subvol = engine.default_subvol().unwrap();
    let (file, gone) = (create(&fs, fs.root(), b"file"), create(&fs, fs.root(), b"gone"));
    write(&fs, gone, 0, &noise(1 << 20, 4));
    fs.sync().unwrap();
    let (layout, size) = (subvol.view(), 1 << 20);
    let inode = subvol.table.get(gone).unwrap();
    let segments = subvol.layout(&layout.tree, gone, &inode.state.read(), 0, size).unwrap();
    let Place::Extent(extent) = segments[0].place.clone() else { panic!("{segments:?}") };
    drop((layout, inode));
    fs.unlink(fs.root(), b"gone").unwrap();
    fs.forget(gone, 1);
    fs.sync().unwrap();

    // What a sound pool never writes.
    let mut payload = Payload::default();
    let (txg, len) = (engine.store.groups.open(), extent.len());
    let content = RangeContent::Shared(extent);
    payload.push(txg, subvol.id, Record::Range { ino: file, offset: 0, len, content });
    let place = LogPlace::new(&engine.store);
    engine.log.writer.lock().frames.append(&place, &payload.bytes, payload.count).unwrap();
    engine.store.pool.flush().unwrap();

    let fs = power_loss(&device, &test, fs);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert_eq!(fs.getattr(file).unwrap().blocks, 0, "the file has got what was free");
    fs.sync().unwrap();
}

#[test]
fn bytes_of_a_file_that_the_log_removes_again_are_not_dirty_after_replay() {
    let (device, test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    write(&fs, file, 0, &noise(20_000, 4));
    sync_by_frame(&fs, file);
    fs.unlink(fs.root(), b"file").unwrap();
    fs.forget(file, 1);
    let other = create(&fs, fs.root(), b"other");
    sync_by_frame(&fs, other);

    let fs = power_loss(&device, &test, fs);
    assert!(fs.lookup(fs.root(), b"file").is_err());
    assert_eq!(fs.engine().store.dirty.bytes(), 0);
}
