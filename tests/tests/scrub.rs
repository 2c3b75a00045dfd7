//! Scrub: what is bad is found, repaired where another copy is good, and named where none is.

use cairn_tests::crash::{Crashes, Sampling};
use cairn_tests::device::{refs, Image, RamDevice, Recording};
use cairn_tests::drive::{is_long, seeds};
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::rng::Rng;
use cairn_tests::subject::{Pool, Subject};
use cairn_tests::tree::Tree;
use cairn_tests::world::World;
use fs_core::engine::ScrubStatus;
use fs_core::error::{Error, Incident};
use fs_core::format::chunk::Profile;
use fs_core::format::scrub::ScrubState;
use fs_core::vfs::{AccessTime, Caller, Filesystem, Volume, WriteFlags};
use std::collections::BTreeSet;

const DEVICE_BYTES: u64 = 24 << 20;
const SECTOR: u64 = 4096;

fn profiles() -> Vec<Pool> {
    let one = |data, metadata| Pool::on(1, data, metadata);
    let mut pools = vec![
        one(Profile::Single, Profile::Dup),
        one(Profile::Dup, Profile::Dup),
        Pool::on(2, Profile::Mirror, Profile::Mirror),
        Pool::on(3, Profile::Mirror3, Profile::Mirror),
        Pool::on(4, Profile::Mirror4, Profile::Mirror3),
        Pool::on(4, Profile::StripeMirror, Profile::StripeMirror),
    ];
    pools.iter_mut().for_each(|pool| pool.format.chunk_bytes = Some(2 << 20));
    pools
}

fn world(pool: &Pool, seed: u64) -> World {
    World::new(pool, seed, DEVICE_BYTES, 60, false)
}

/// What happens to a world here.
trait Scrubbed {
    fn status(&self) -> ScrubStatus;

    /// Waits for the end of the scrub, telling the story on.
    fn finish(&mut self) -> ScrubStatus;

    /// Puts garbage in the place of copies that are in use, each with a chance of `percent`, but
    /// always leaves one copy of a chunk alone if `leaves` says so. Returns how many sectors it
    /// hit.
    fn damage(&self, rng: &mut Rng, percent: u64, leaves: bool) -> usize;

    /// Spoils one of the two areas of each device, here and there.
    fn damage_labels(&self, rng: &mut Rng);
}

impl Scrubbed for World {
    fn status(&self) -> ScrubStatus {
        self.engine().scrub_status().unwrap()
    }

    fn finish(&mut self) -> ScrubStatus {
        for _ in 0..20_000 {
            if self.status().state != ScrubState::Running {
                return self.status();
            }
            self.let_time_pass();
            self.tell(1);
        }
        panic!("the scrub does not end: {:?}", self.status());
    }

    fn damage(&self, rng: &mut Rng, percent: u64, leaves: bool) -> usize {
        let mut images: Vec<Image> = self.rams.iter().map(|ram| ram.image()).collect();
        let used: Vec<BTreeSet<u64>> =
            images.iter().map(|image| image.used_sectors().collect()).collect();
        let pool = &self.engine().store.pool;
        let mut hit = 0;
        for chunk in pool.chunks() {
            let copies = chunk.profile.copies();
            let left = rng.below(copies);
            for at in (0..chunk.length).step_by(SECTOR as usize) {
                let addr = fs_core::units::Logical(chunk.logical.0 + at);
                let places = pool.map(addr, SECTOR).unwrap();
                for (copy, pieces) in (0..).zip(places) {
                    let (device, at) = pieces[0];
                    let is_used = used[usize::from(device)].contains(&at.0);
                    if !is_used || leaves && copy == left || rng.below(100) >= percent {
                        continue;
                    }
                    let mut garbage = vec![0; SECTOR as usize];
                    rng.fill(&mut garbage);
                    images[usize::from(device)].write(at.0, &garbage);
                    hit += 1;
                }
            }
        }
        for (ram, image) in self.rams.iter().zip(images) {
            ram.set_image(image);
        }
        hit
    }

    fn damage_labels(&self, rng: &mut Rng) {
        for ram in &self.rams {
            let mut image = ram.image();
            let area = if rng.chance(1, 2) { 64 << 10 } else { DEVICE_BYTES - (128 << 10) };
            if rng.chance(1, 2) {
                image.write(area, &[0x55; SECTOR as usize]);
            }
            for slot in 0..16 {
                if rng.chance(1, 2) {
                    image.write(area + (64 << 10) + slot * SECTOR, &[0xaa; SECTOR as usize]);
                }
            }
            ram.set_image(image);
        }
    }
}

#[test]
fn damage_that_the_profile_bears_is_repaired_while_the_pool_is_in_use() {
    let mut repaired = 0;
    for seed in seeds(12, 600) {
        let pools = profiles();
        let pool = &pools[seed as usize % pools.len()];
        let mut world = world(pool, seed);
        let mut rng = Rng::derived(seed, 0x7363_7275);
        let is_single = pool.format.data_profile == Profile::Single;
        world.damage(&mut rng, 20, true);
        world.damage_labels(&mut rng);
        world.volume().engine().drop_caches();
        world.engine().start_scrub(if seed % 2 == 0 { 0 } else { 4 << 20 }).unwrap();
        let status = world.finish();
        assert_eq!(status.state, ScrubState::Finished);
        assert!(is_single || status.lost_count == 0, "seed {seed}: {status:?}");
        assert!(status.found > 0 && status.repaired_bytes > 0, "seed {seed}: {status:?}");
        assert_eq!(status.last.map(|last| last.found), Some(status.found));
        repaired += status.repaired_bytes;
        world.engine().start_scrub(0).unwrap();
        let again = world.finish();
        assert_eq!((again.found, again.lost_count), (0, 0), "seed {seed}: {again:?}");
        world.judge(&format!("seed {seed}"));
    }
    assert!(repaired > 0);
}

/// A file of noise.
fn write_file(volume: &Volume, name: &[u8], bytes: usize, seed: u64) -> Vec<u8> {
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let file = volume.mknod(volume.root(), name, 0o100_644, 0, &caller).unwrap();
    let mut content = vec![0; bytes];
    Rng::new(seed).fill(&mut content);
    let flags = WriteFlags::default();
    volume.write(file.ino, 0, &content, flags).unwrap();
    content
}

fn read_file(volume: &Volume, name: &[u8], bytes: usize) -> Result<Vec<u8>, Error> {
    let file = volume.lookup(volume.root(), name)?;
    let mut found = vec![0; bytes];
    let got = volume.read(file.ino, 0, &mut found)?;
    assert_eq!(got, bytes);
    Ok(found)
}

/// Device and first byte of each copy of a sector.
type Copies = Vec<(u16, u64)>;

/// A mirror with three files, and where the copies of the sectors of the second are.
fn three_files() -> (World, Vec<Vec<u8>>, Vec<Copies>) {
    let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    pool.format.compression = fs_core::format::ptr::CompressionKind::None;
    let mut world = world(&pool, 1);
    world.ops.truncate(world.next);
    let contents: Vec<Vec<u8>> = [&b"one"[..], b"two", b"three"]
        .iter()
        .zip(1..)
        .map(|(name, seed)| write_file(world.volume(), name, 200 << 10, seed))
        .collect();
    world.volume().sync().unwrap();
    let images: Vec<Image> = world.rams.iter().map(|ram| ram.image()).collect();
    let mut places = Vec::new();
    for sector in contents[1].chunks(SECTOR as usize) {
        let mut copies = Vec::new();
        for (device, image) in (0..).zip(&images) {
            for at in image.used_sectors() {
                let mut found = vec![0; SECTOR as usize];
                image.read(at, &mut found);
                if found == sector {
                    copies.push((device, at));
                }
            }
        }
        assert_eq!(copies.len(), 2);
        places.push(copies);
    }
    (world, contents, places)
}

fn spoil(world: &World, places: &[(u16, u64)], with: u8) {
    for (device, at) in places {
        let ram = &world.rams[usize::from(*device)];
        let mut image = ram.image();
        image.write(*at, &vec![with; SECTOR as usize]);
        ram.set_image(image);
    }
}

#[test]
fn a_file_that_has_no_good_copy_is_named_and_not_repaired() {
    let (mut world, contents, places) = three_files();
    // One sector is lost; another is good in one copy each.
    spoil(&world, &places[3], 0x11);
    spoil(&world, &places[7][..1], 0x22);
    spoil(&world, &places[9][1..], 0x33);
    let lost: Vec<Vec<u8>> = [0, 1]
        .map(|device| {
            let mut found = vec![0; SECTOR as usize];
            world.rams[device].image().read(places[3][device].1, &mut found);
            found
        })
        .to_vec();
    world.engine().start_scrub(0).unwrap();
    let status = world.finish();
    assert_eq!(status.lost_count, 1, "{status:?}");
    assert!(status.devices.iter().all(|device| device.lost_bytes > 0), "{status:?}");
    let files = world.engine().damaged_files();
    let paths: Vec<&[u8]> = files.iter().map(|file| &file.path[..]).collect();
    assert_eq!(paths, [b"/two"]);
    let told = world.platform.incidents.take();
    let is_two = |incident: &Incident| match incident {
        Incident::FileDamaged { path, .. } => path == "/two",
        _ => false,
    };
    let count = told.iter().filter(|incident| is_two(incident)).count();
    assert_eq!(count, 1, "{told:?}");
    // What is lost stays as it is, and what is not was repaired.
    for (device, want) in lost.iter().enumerate() {
        let mut found = vec![0; SECTOR as usize];
        world.rams[device].image().read(places[3][device].1, &mut found);
        assert!(found == *want, "a copy that nothing vouches for was written over");
    }
    for sector in [7usize, 9] {
        let want = &contents[1][sector * SECTOR as usize..][..SECTOR as usize];
        for (device, at) in &places[sector] {
            let mut found = vec![0; SECTOR as usize];
            world.rams[usize::from(*device)].image().read(*at, &mut found);
            assert!(found == want, "sector {sector} of device {device}");
        }
    }
    assert!(read_file(world.volume(), b"two", 200 << 10).is_err());
    assert!(read_file(world.volume(), b"three", 200 << 10).unwrap() == contents[2]);
    // A second one finds the same, and nothing else.
    world.engine().start_scrub(0).unwrap();
    let again = world.finish();
    assert_eq!((again.lost_count, again.repaired_bytes), (1, 0), "{again:?}");
}

#[test]
fn what_was_removed_before_it_was_come_to_is_no_damage() {
    let (mut world, contents, places) = three_files();
    spoil(&world, &places[3], 0x11);
    world.engine().start_scrub(1).unwrap();
    world.let_time_pass();
    assert!(world.status().done_bytes < 200 << 10);
    world.volume().unlink(world.volume().root(), b"two").unwrap();
    world.engine().pause_scrub().unwrap();
    // Nobody has it open any more.
    world.remount();
    world.engine().resume_scrub(Some(0)).unwrap();
    let status = world.finish();
    assert_eq!((status.lost_count, status.found), (0, 0), "{status:?}");
    assert!(read_file(world.volume(), b"one", 200 << 10).unwrap() == contents[0]);
}

#[test]
fn only_what_is_in_use_is_read() {
    let (mut world, _, _) = three_files();
    world.engine().start_scrub(0).unwrap();
    let status = world.finish();
    let used = fs_core::engine::Room::clone(&world.engine().room());
    let used = used.total - used.free;
    assert!(status.done_bytes >= 600 << 10, "{status:?}");
    assert!(status.done_bytes < (used + (4 << 20)).min(DEVICE_BYTES / 2), "{status:?} of {used}");
    assert_eq!(status.done_bytes, status.total_bytes);
}

#[test]
fn a_scrub_goes_on_where_it_was_after_a_remount_and_rests_while_it_is_paused() {
    let (mut world, _, _) = three_files();
    // Each round is as small as can be.
    world.engine().start_scrub(256 << 10).unwrap();
    while world.status().done_bytes == 0 {
        world.let_time_pass();
    }
    world.engine().pause_scrub().unwrap();
    let before = world.status();
    assert_eq!(before.state, ScrubState::Paused);
    world.remount();
    for _ in 0..50 {
        world.let_time_pass();
    }
    assert_eq!(world.status().done_bytes, before.done_bytes, "it did not rest");
    assert_eq!(world.status().state, ScrubState::Paused);
    assert!(before.done_bytes < before.total_bytes);
    world.engine().resume_scrub(None).unwrap();
    // It goes on by itself when the pool is opened again.
    world.remount();
    assert_eq!(world.status().state, ScrubState::Running);
    assert_eq!(world.status().done_bytes, before.done_bytes);
    let status = world.finish();
    assert_eq!(status.state, ScrubState::Finished);
    // Had it begun again, more than there is would have been looked at.
    assert!(status.done_bytes <= before.total_bytes + (1 << 20), "{status:?}, {before:?}");
    assert!(status.run_ms > 0 && status.began == before.began);
    world.remount();
    assert_eq!(world.status().last.map(|last| last.ended), Some(status.ended));
    let error = world.engine().resume_scrub(None).unwrap_err();
    assert!(matches!(error, Error::Argument { .. }), "{error}");
    world.engine().start_scrub(1).unwrap();
    assert!(world.engine().start_scrub(0).is_err());
    world.engine().cancel_scrub().unwrap();
    let cancelled = world.status();
    assert_eq!(cancelled.state, ScrubState::Cancelled);
    assert_eq!(cancelled.last.map(|last| last.ended), Some(status.ended));
    world.volume.take().unwrap().close().unwrap();
    let findings = world.pool.check(&refs(&world.rams), &world.platform.platform()).unwrap();
    assert_eq!(findings, Vec::<String>::new());
}

#[test]
fn a_pool_that_is_open_for_reading_is_not_scrubbed_and_shows_how_it_stands() {
    let (mut world, _, _) = three_files();
    world.engine().start_scrub(1).unwrap();
    world.let_time_pass();
    world.volume.take().unwrap().close().unwrap();
    world.rams.iter().for_each(|ram| ram.forbid_writes());
    world.pool.open.read_only = true;
    world.open().unwrap();
    let before = world.status();
    assert_eq!(before.state, ScrubState::Running);
    for _ in 0..20 {
        world.let_time_pass();
    }
    assert_eq!(world.status().done_bytes, before.done_bytes);
    assert_eq!(world.engine().pause_scrub(), Err(Error::ReadOnly));
    assert_eq!(world.engine().start_scrub(0), Err(Error::ReadOnly));
}

#[test]
fn a_golden_image_knows_how_its_scrubs_stood() {
    let path = cairn_tests::golden::directory().join("v1-scrub.cairn.zst");
    let content = zstd::decode_all(&std::fs::read(path).unwrap()[..]).unwrap();
    let ram = RamDevice::of("ram", Image::of(&content));
    let core = TestPlatform::new(1, Spawn::AtOnce).platform();
    let devices = refs(std::slice::from_ref(&ram));
    let volume = Volume::open(devices, core, &Default::default(), AccessTime::Relative).unwrap();
    let status = volume.engine().scrub_status().unwrap();
    assert_eq!(status.state, ScrubState::Paused);
    assert!(0 < status.done_bytes && status.done_bytes < status.total_bytes);
    let last = status.last.unwrap();
    assert!(last.bytes == last.bytes.max(status.total_bytes / 2) && last.ended > 0, "{last:?}");
    volume.engine().resume_scrub(Some(0)).unwrap();
    volume.close().unwrap();
}

#[test]
fn the_rate_is_kept() {
    let (world, _, _) = three_files();
    let rate = 100 << 10;
    let began = world.platform.clock.clone();
    let start = fs_core::platform::Clock::uptime_ns(&*began);
    world.engine().start_scrub(rate).unwrap();
    while world.status().state == ScrubState::Running {
        world.platform.clock.advance_ms(50);
        world.platform.workers.tick();
    }
    let ns = fs_core::platform::Clock::uptime_ns(&*began) - start;
    let status = world.status();
    let allowed = rate * ns / 1_000_000_000;
    // The last round needs no rest after it.
    assert!(status.done_bytes <= allowed + (700 << 10), "{status:?}, {allowed} allowed");
    assert!(status.done_bytes * 2 > allowed, "{status:?}, {allowed} allowed");
}

#[test]
fn files_that_share_what_is_lost_are_all_named_and_it_is_read_once() {
    let (mut world, _, places) = three_files();
    let volume = world.volume().clone();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let source = volume.lookup(volume.root(), b"two").unwrap();
    for name in [b"four", b"five"] {
        let target = volume.mknod(volume.root(), name, 0o100_644, 0, &caller).unwrap();
        let copied = volume.copy_range(source.ino, 0, target.ino, 0, 200 << 10);
        assert_eq!(copied, Ok(200 << 10));
    }
    volume.sync().unwrap();
    drop(volume);
    spoil(&world, &places[3], 0x11);
    // In small rounds, so that the files are not all in one.
    world.engine().start_scrub(64 << 10).unwrap();
    let status = world.finish();
    let mut paths: Vec<Vec<u8>> =
        world.engine().damaged_files().into_iter().map(|file| file.path).collect();
    paths.sort();
    assert_eq!(paths, [&b"/five"[..], b"/four", b"/two"]);
    assert_eq!(status.lost_count, 1, "{status:?}");
    assert!(status.done_bytes < 1400 << 10, "{status:?}");
}

#[test]
fn what_moves_while_it_runs_is_not_missed() {
    for seed in seeds(12, 400) {
        let mut pool = Pool::on(1, Profile::Dup, Profile::Dup);
        pool.format.compression = fs_core::format::ptr::CompressionKind::None;
        let mut world = world(&pool, seed);
        world.ops.truncate(world.next);
        let volume = world.volume().clone();
        let caller = Caller { uid: 0, gid: 0, umask: 0 };
        let name = |number: u64| format!("file {number}").into_bytes();
        for number in 0..24 {
            write_file(&volume, &name(number), 48 << 10, number);
            volume.sync().unwrap();
        }
        let mut rng = Rng::derived(seed, 0x6d6f_7665);
        // Each is bad in one copy: the test sees which ones were looked at.
        assert!(world.damage(&mut rng, 100, true) > 0);
        volume.engine().drop_caches();
        world.engine().start_scrub(128 << 10).unwrap();
        let mut next = 24;
        for _ in 0..400 {
            if world.status().state != ScrubState::Running {
                break;
            }
            world.let_time_pass();
            if next >= 60 || !rng.chance(1, 2) {
                continue;
            }
            // A file moves to the end, or to an inode that was there before.
            let (from, to) = (rng.below(next), rng.below(next + 1));
            let Ok(source) = volume.lookup(volume.root(), &name(from)) else { continue };
            let target = match volume.lookup(volume.root(), &name(to)) {
                Ok(target) => target,
                Err(_) => {
                    next += 1;
                    let made = name(next - 1);
                    volume.mknod(volume.root(), &made, 0o100_644, 0, &caller).unwrap()
                }
            };
            if source.ino == target.ino {
                continue;
            }
            let copied = volume.copy_range(source.ino, 0, target.ino, 64 << 10, 48 << 10);
            assert!(copied.is_ok(), "{copied:?}");
            volume.unlink(volume.root(), &name(from)).unwrap();
            volume.forget(source.ino, u64::MAX);
            volume.sync().unwrap();
        }
        drop(volume);
        let status = world.finish();
        assert_eq!((status.state, status.lost_count), (ScrubState::Finished, 0), "{status:?}");
        world.volume.take().unwrap().close().unwrap();
        let findings = world.pool.check(&refs(&world.rams), &world.platform.platform()).unwrap();
        assert_eq!(findings, Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn what_is_written_while_it_runs_is_read_only_if_it_was_shared() {
    let (mut world, _, places) = three_files();
    let volume = world.volume().clone();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    world.engine().start_scrub(64 << 10).unwrap();
    while world.status().done_bytes == 0 {
        world.let_time_pass();
    }
    // What was bad before is looked at where it goes.
    let source = volume.lookup(volume.root(), b"two").unwrap();
    let target = volume.mknod(volume.root(), b"four", 0o100_644, 0, &caller).unwrap();
    assert_eq!(volume.copy_range(source.ino, 0, target.ino, 0, 200 << 10), Ok(200 << 10));
    volume.sync().unwrap();
    spoil(&world, &places[3], 0x11);
    write_file(&volume, b"much", 6 << 20, 9);
    volume.sync().unwrap();
    drop(volume);
    let status = world.finish();
    assert_eq!(status.lost_count, 1, "{status:?}");
    assert!(status.done_bytes < 4 << 20, "{status:?}");
    let paths: BTreeSet<Vec<u8>> =
        world.engine().damaged_files().into_iter().map(|file| file.path).collect();
    assert!(paths.contains(&b"/four"[..]), "{paths:?}");
}

#[test]
fn the_power_may_fail_at_every_write_of_a_scrub() {
    let wanted = if is_long() { 40_000 } else { 700 };
    let mut count = 0;
    let mut resumed = 0;
    for seed in seeds(60, 100_000) {
        let pools = profiles();
        let pool = &pools[seed as usize % pools.len()];
        let mut world = world(pool, seed);
        world.ops.truncate(world.next);
        let want = Tree::of_state(&world.model.state());
        let mut rng = Rng::derived(seed, 0x6372_6173);
        if pool.format.data_profile == Profile::Single {
            continue;
        }
        world.damage(&mut rng, 20, true);
        world.engine().drop_caches();
        let base: Vec<Image> = world.rams.iter().map(|ram| ram.image()).collect();
        let recording = Recording::start(&world.rams);
        world.engine().start_scrub(200 << 10).unwrap();
        for step in 0..4000 {
            if world.status().state != ScrubState::Running {
                break;
            }
            // Long enough that its place is stored several times.
            world.platform.clock.advance_ms(2000);
            world.platform.workers.tick();
            if step % 5 == 4 && world.status().state == ScrubState::Running {
                world.engine().pause_scrub().unwrap();
                world.engine().resume_scrub(None).unwrap();
            }
        }
        assert_eq!(world.status().state, ScrubState::Finished);
        drop(world.volume.take());
        let events = recording.events();
        let every = if is_long() { 3 } else { 17 };
        for state in Crashes::new(base, &events, Sampling { seed, random: 1 }).step_by(every) {
            count += 1;
            let which = (seed, state.boundary, state.variant);
            world.rams =
                state.images.into_iter().map(|image| RamDevice::of("ram", image)).collect();
            world.platform = TestPlatform::new(seed, Spawn::AtOnce);
            world.open().unwrap();
            let before = world.engine().scrub_status();
            match before.as_ref().map(|status| status.state) {
                // The pool does not know of it yet.
                None => world.engine().start_scrub(0).unwrap(),
                Some(ScrubState::Paused) => world.engine().resume_scrub(Some(0)).unwrap(),
                Some(_) => {}
            }
            resumed += u32::from(before.is_some_and(|status| status.done_bytes > 0));
            let status = world.finish();
            assert_eq!(status.state, ScrubState::Finished, "{which:?}");
            assert_eq!(status.lost_count, 0, "{which:?}: {status:?}");
            // Whatever it looked at before the power failed need not be looked at again.
            world.engine().start_scrub(0).unwrap();
            let again = world.finish();
            assert_eq!((again.found, again.lost_count), (0, 0), "{which:?}: {again:?}");
            let found = Tree::read(&**world.volume()).unwrap();
            assert_eq!(want.difference(&found), None, "{which:?}");
            world.volume.take().unwrap().close().unwrap();
            let findings = pool.check(&refs(&world.rams), &world.platform.platform()).unwrap();
            assert_eq!(findings, Vec::<String>::new(), "{which:?}");
        }
        if count >= wanted {
            break;
        }
    }
    assert!(resumed > 20, "only {resumed} of {count} went on in the middle");
}

#[test]
fn what_was_about_to_be_shared_when_it_began_is_looked_at() {
    let (mut world, _, places) = three_files();
    let volume = world.volume().clone();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    spoil(&world, &places[3], 0x11);
    let source = volume.lookup(volume.root(), b"two").unwrap();
    let target = volume.mknod(volume.root(), b"four", 0o100_644, 0, &caller).unwrap();
    assert_eq!(volume.copy_range(source.ino, 0, target.ino, 0, 200 << 10), Ok(200 << 10));
    volume.unlink(volume.root(), b"two").unwrap();
    volume.forget(source.ino, u64::MAX);
    drop(volume);
    world.engine().start_scrub(0).unwrap();
    let status = world.finish();
    assert_eq!(status.lost_count, 1, "{status:?}");
}

#[test]
fn what_is_shared_after_a_pause_at_the_beginning_is_looked_at() {
    let (mut world, _, places) = three_files();
    let volume = world.volume().clone();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    spoil(&world, &places[3], 0x11);
    world.engine().start_scrub(0).unwrap();
    world.engine().pause_scrub().unwrap();
    let source = volume.lookup(volume.root(), b"two").unwrap();
    let target = volume.mknod(volume.root(), b"four", 0o100_644, 0, &caller).unwrap();
    assert_eq!(volume.copy_range(source.ino, 0, target.ino, 0, 200 << 10), Ok(200 << 10));
    volume.unlink(volume.root(), b"two").unwrap();
    volume.forget(source.ino, u64::MAX);
    volume.sync().unwrap();
    drop(volume);
    world.engine().resume_scrub(None).unwrap();
    let status = world.finish();
    assert_eq!(status.lost_count, 1, "{status:?}");
}
