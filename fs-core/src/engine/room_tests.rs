//! Room for what a group makes of extents: whatever was accepted on a nearly full pool can be
//! committed.

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

/// A file of so many extents of a sector, far apart in the file, and not neighbours on the device.
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
            let op = VersionOp::Snapshot { subvolume: TreeId::FIRST_SUBVOL.0, name: b"s".into() };
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
