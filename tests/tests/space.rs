//! What the filesystem says of its space can be believed.

use cairn_tests::device::{refs, RamDevice};
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::rng::Rng;
use cairn_tests::subject::{Mounted, Pool, Subject};
use fs_core::error::Errno;
use fs_core::units::Ino;
use fs_core::vfs::{Caller, Fallocate, Filesystem, SetAttr, XattrMode};

const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const PIECE: usize = 64 << 10;

fn mount(pool: &Pool, bytes: u64) -> Box<dyn Mounted> {
    let devices = refs(&[RamDevice::new("ram", bytes)]);
    let core = TestPlatform::new(1, Spawn::AtOnce).platform();
    pool.format(&devices, &core).unwrap();
    pool.open(&devices, &core).unwrap()
}

fn create(fs: &dyn Filesystem, name: &[u8]) -> Ino {
    fs.mknod(fs.root(), name, 0o100644, 0, &CALLER).unwrap().ino
}

/// Appends what cannot be compressed until there is no room; returns how many bytes there was room
/// for.
fn fill(fs: &dyn Filesystem, ino: Ino, seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let (mut piece, mut size) = (vec![0; PIECE], 0);
    loop {
        rng.fill(&mut piece);
        match fs.write(ino, size, &piece, Default::default()) {
            Ok(_) => size += piece.len() as u64,
            Err(error) => {
                assert_eq!(error.errno(), Errno::NoSpc, "{error}");
                fs.sync().unwrap();
                return size;
            }
        }
    }
}

#[test]
fn what_df_says_is_available_can_be_written() {
    for bytes in [32 << 20, 64 << 20, 200 << 20] {
        let mounted = mount(&Pool::default(), bytes);
        let fs = mounted.fs();
        let said = fs.statfs().unwrap().available_bytes;
        let written = fill(&*fs, create(&*fs, b"f"), bytes);
        // Metadata takes a little of it; more than it said would be as wrong as less.
        let (low, high) = (said / 100 * 90, said / 100 * 103);
        assert!((low..=high).contains(&written), "{bytes}: {said} available, {written} written");
        let left = fs.statfs().unwrap().available_bytes;
        assert!(left < said / 50, "{bytes}: full, but {left} of {said} bytes are available");
    }
}

/// Fills and empties a pool; the room must not become less.
fn fill_and_empty(pool: &Pool, bytes: u64) {
    let mounted = mount(pool, bytes);
    let fs = mounted.fs();
    let mut file = create(&*fs, b"f");
    let first = fill(&*fs, file, 0);
    for round in 1..6 {
        fs.unlink(fs.root(), b"f").unwrap();
        // Its space is given back when nobody holds it any more.
        fs.forget(file, 1);
        file = create(&*fs, b"f");
        let again = fill(&*fs, file, round);
        assert!(again >= first / 100 * 95, "{bytes}: {first} at first, {again} in round {round}");
    }
    mounted.close().unwrap();
}

#[test]
fn a_pool_can_be_filled_and_emptied_any_number_of_times() {
    for bytes in [12 << 20, 20 << 20, 32 << 20, 80 << 20] {
        fill_and_empty(&Pool::cramped(), bytes);
        let mut large = Pool::cramped();
        large.format.node_bytes = 65536;
        fill_and_empty(&large, bytes);
    }
}

/// Fills a pool with files of a few sectors, then removes them all.
fn fill_with_files(pool: &Pool, bytes: u64, sync_every: usize) {
    let mounted = mount(pool, bytes);
    let fs = mounted.fs();
    let mut rng = Rng::new(bytes);
    let mut names = Vec::new();
    let mut data = vec![0; 3 * 4096];
    loop {
        let name = format!("a file with a name of some length, number {}", names.len());
        let made = fs.mknod(fs.root(), name.as_bytes(), 0o100644, 0, &CALLER);
        rng.fill(&mut data);
        let written = made.and_then(|attr| {
            names.push(name);
            let written = fs.write(attr.ino, 0, &data, Default::default());
            fs.forget(attr.ino, 1);
            written
        });
        if let Err(error) = written {
            assert_eq!(error.errno(), Errno::NoSpc, "{error}");
            break;
        }
    }
    rng.shuffle(&mut names);
    for (index, name) in names.iter().enumerate() {
        let removed = fs.unlink(fs.root(), name.as_bytes());
        removed.unwrap_or_else(|e| panic!("{bytes}: removing file {index}: {e}"));
        if index % sync_every == 0 {
            fs.sync().unwrap_or_else(|e| panic!("{bytes}: after removing file {index}: {e}"));
        }
    }
    let left = fs.statfs().unwrap().inodes;
    assert_eq!(left, 1, "inodes after everything was removed");
    mounted.close().unwrap();
}

#[test]
fn every_file_of_a_full_pool_can_be_removed() {
    for (bytes, sync_every) in [(12 << 20, 2), (30 << 20, 100), (30 << 20, usize::MAX)] {
        fill_with_files(&Pool::cramped(), bytes, sync_every);
        let mut large = Pool::cramped();
        large.format.node_bytes = 65536;
        fill_with_files(&large, bytes, sync_every);
    }
}

/// Writes pieces, ever smaller ones, until not even a sector has room.
fn fill_to_the_brim(fs: &dyn Filesystem, files: &[Ino]) {
    let mut rng = Rng::new(3);
    let mut piece = vec![0; 300 << 10];
    rng.fill(&mut piece);
    let mut at = vec![0; files.len()];
    while piece.len() >= 4096 {
        for (ino, at) in files.iter().zip(&mut at) {
            match fs.write(*ino, *at, &piece, Default::default()) {
                Ok(_) => *at += piece.len() as u64,
                Err(error) => {
                    assert_eq!(error.errno(), Errno::NoSpc, "{error}");
                    piece.truncate(piece.len() / 2);
                    break;
                }
            }
        }
    }
}

#[test]
fn on_a_full_pool_with_promised_room_and_a_log_everything_that_gives_room_back_succeeds() {
    for (node_bytes, mib) in [16384, 65536].into_iter().flat_map(|n| (10..26).map(move |m| (n, m)))
    {
        let mut pool = Pool::cramped();
        pool.format.node_bytes = node_bytes;
        let mounted = mount(&pool, mib << 20);
        let fs = mounted.fs();
        let what = format!("{mib} MiB, nodes of {node_bytes} bytes");
        let names: [&[u8]; 4] = [b"a", b"b", b"c", b"d"];
        let files: Vec<Ino> = names.map(|name| create(&*fs, name)).into();
        let promised = create(&*fs, b"promised");
        let room = 100 << 12;
        fs.fallocate(promised, Fallocate::Allocate { keep_size: true }, 0, room).unwrap();
        fs.setxattr(files[0], b"user.x", &[7; 2000], XattrMode::Either).unwrap();
        // To cut what is shared frees nothing, and leaves a part of a sector that needs a new one.
        let clones = clones(&*fs, 6);
        fill_to_the_brim(&*fs, &files);
        // The log begins when there is hardly room for it.
        for ino in &files {
            fs.fsync(*ino, false).unwrap();
        }

        let cut = |ino, size| {
            let set = SetAttr { size: Some(size), ..SetAttr::default() };
            fs.setattr(ino, &set, &CALLER).unwrap_or_else(|e| panic!("{what}: cut to {size}: {e}"));
        };
        let punch = |ino, at, len| {
            let punched = fs.fallocate(ino, Fallocate::PunchHole, at, len);
            punched.unwrap_or_else(|e| panic!("{what}: punching {at}+{len}: {e}"));
        };
        let sync = || fs.sync().unwrap_or_else(|e| panic!("{what}: {e}"));
        for ino in &clones[..3] {
            cut(*ino, 5001);
            sync();
        }
        for ino in &clones[3..] {
            punch(*ino, 5000, 20_000);
            sync();
        }
        punch(files[0], 1000, 9000);
        let removed = fs.removexattr(files[0], b"user.x");
        removed.unwrap_or_else(|e| panic!("{what}: removing an attribute: {e}"));
        cut(files[1], 5001);
        cut(files[2], 0);
        sync();
        let mut data = vec![0; room as usize];
        Rng::new(5).fill(&mut data);
        let written = fs.write(promised, 0, &data, Default::default());
        written.unwrap_or_else(|e| panic!("{what}: into promised room: {e}"));
        for (name, ino) in names.into_iter().zip(files) {
            fs.unlink(fs.root(), name).unwrap_or_else(|e| panic!("{what}: removing: {e}"));
            fs.forget(ino, 1);
        }
        mounted.close().unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

/// So many files that share all their data with one that stays.
fn clones(fs: &dyn Filesystem, count: usize) -> Vec<Ino> {
    let original = create(fs, b"original");
    let mut data = vec![0; 64 << 10];
    Rng::new(9).fill(&mut data);
    fs.write(original, 0, &data, Default::default()).unwrap();
    fs.sync().unwrap();
    let clone = |n| {
        let ino = create(fs, format!("clone {n}").as_bytes());
        let shared = fs.copy_range(original, 0, ino, 0, data.len() as u64).unwrap();
        assert_eq!(shared, data.len() as u64);
        ino
    };
    (0..count).map(clone).collect()
}

#[test]
fn a_copy_of_bytes_that_are_not_written_yet_is_refused_when_there_is_no_room_for_both() {
    for mib in 10..26 {
        let mounted = mount(&Pool::cramped(), mib << 20);
        let fs = mounted.fs();
        let (source, copy) = (create(&*fs, b"source"), create(&*fs, b"copy"));
        let mut data = vec![0; 2 << 20];
        Rng::new(mib).fill(&mut data);
        fs.write(source, 0, &data, Default::default()).unwrap();
        fs.fsync(source, false).unwrap();
        fill_to_the_brim(&*fs, &[create(&*fs, b"filler")]);
        fs.sync().unwrap();
        // There is room for these once, in place of what they replace.
        let set = SetAttr { size: Some(0), ..SetAttr::default() };
        fs.setattr(source, &set, &CALLER).unwrap();
        fs.sync().unwrap();
        let mut written = 0;
        while fs
            .write(source, written as u64, &data[written..][..PIECE], Default::default())
            .is_ok()
        {
            written += PIECE;
            if written == data.len() {
                break;
            }
        }
        let copied = fs.copy_range(source, 0, copy, 0, written as u64);
        fs.sync().unwrap_or_else(|e| panic!("{mib} MiB: {copied:?} of {written} copied: {e}"));
        mounted.close().unwrap();
    }
}
