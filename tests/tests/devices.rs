//! Pools of several devices: devices that fail, lie, vanish and come back.

use cairn_tests::crash::{CrashState, Crashes, Sampling};
use cairn_tests::device::{refs, several, Access, Fault, FaultKind, Image, RamDevice, Recording};
use cairn_tests::drive::{is_long, run, seeds};
use cairn_tests::fault::{requests, script, survive, tolerate, End, Script};
use cairn_tests::gen::{Op, Options};
use cairn_tests::model::Model;
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::power::{Depth, Plan, Story};
use cairn_tests::rng::Rng;
use cairn_tests::run::Runner;
use cairn_tests::subject::{Pool, Subject};
use cairn_tests::tree::Tree;
use fs_core::device::{probe, Member, Ring};
use fs_core::error::{Error, Incident};
use fs_core::format::chunk::Profile;
use fs_core::platform::Platform;
use std::sync::Arc;

/// Pools that can lose a device, with chunks large enough to be striped.
fn redundant(seed: u64) -> Pool {
    let (devices, data, metadata) = match seed % 4 {
        0 => (2, Profile::Mirror, Profile::Mirror),
        1 => (4, Profile::StripeMirror, Profile::StripeMirror),
        2 => (3, Profile::Mirror, Profile::Mirror3),
        _ => (4, Profile::Mirror3, Profile::Mirror4),
    };
    let mut pool = Pool::on(devices, data, metadata);
    pool.format.chunk_bytes = Some(2 << 20);
    pool
}

fn story(seed: u64) -> Script {
    let options = Options { sync_percent: 25, reads: true, remount_permille: 0, ..Options::CRASH };
    script(seed, 30, options, 24 << 20)
}

#[test]
fn a_pool_of_any_profile_does_what_the_model_does() {
    for seed in seeds(10, 400) {
        let striped = Pool::on(3, Profile::Stripe, Profile::Mirror);
        let mixed = Pool::on(3, Profile::Single, Profile::Mirror);
        let pool = match seed % 6 {
            4 => striped,
            5 => mixed,
            other => redundant(other),
        };
        let plan = cairn_tests::drive::Plan {
            seed,
            count: 250,
            options: Options { remount_permille: 20, ..Options::MODEL },
            compare_every: 80,
            device_bytes: 40 << 20,
        };
        if let Err(failure) = run(&pool, &plan) {
            panic!("{}", failure.report("a_pool_of_any_profile", seed));
        }
    }
}

#[test]
fn a_full_pool_of_several_devices_never_fails_to_commit() {
    for seed in seeds(12, 600) {
        let mut pool = match seed % 3 {
            0 => Pool::on(3, Profile::Single, Profile::Mirror),
            1 => Pool::on(3, Profile::Mirror, Profile::Mirror),
            _ => Pool::on(4, Profile::StripeMirror, Profile::Mirror3),
        };
        pool.open.dirty_bytes = 1 << 20;
        let plan = cairn_tests::drive::Plan {
            seed,
            count: 250,
            options: Options::FILL,
            compare_every: 40,
            device_bytes: (8 + seed % 4 * 2) << 20,
        };
        if let Err(failure) = run(&pool, &plan) {
            panic!("{}", failure.report("a_full_pool_of_several_devices", seed));
        }
    }
}

#[test]
fn after_power_loss_any_device_may_be_missing_as_well() {
    let wanted = if is_long() { 200_000 } else { 6_000 };
    let mut count = 0;
    for seed in seeds(60, 100_000) {
        let pool = redundant(seed);
        let options = Options { file_bytes: 200 << 10, ..Options::CRASH };
        let plan = Plan { seed, count: 25, options, device_bytes: 12 << 20, random: 2 };
        let story = Story::tell(&pool, plan).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for state in story.states() {
            count += 1;
            let depth = if depth_of(&state) { Depth::Reopen } else { Depth::Open };
            if let Err(what) = story.judge(&pool, &state, depth) {
                panic!("{}", story.report("after_power_loss_any_device", &state, &what));
            }
        }
        if count >= wanted {
            return;
        }
    }
}

fn depth_of(state: &CrashState) -> bool {
    state.boundary % 8 == 0
}

#[test]
fn one_device_may_go_wrong_in_any_way_and_nobody_notices() {
    let (mut struck, mut tried) = (0, 0);
    for seed in seeds(4, 200) {
        let pool = redundant(seed);
        let story = story(seed);
        let counts = requests(&pool, &story).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut rng = Rng::derived(seed, 0x6465_7669);
        for _ in 0..if is_long() { 400 } else { 40 } {
            let device = rng.below(pool.devices() as u64) as usize;
            let nth = |count: u64, rng: &mut Rng| rng.below(count.max(1));
            let (write, read) = (nth(counts.writes, &mut rng), nth(counts.reads, &mut rng));
            let to = rng.below(story.device_bytes / 4096 - 300) * 4096;
            let flip = FaultKind::Flipped { byte: rng.below(1 << 20), mask: 0x40 };
            let fault = match rng.below(11) {
                0 => Fault::nth(FaultKind::Lost, Access::Write, write),
                1 => Fault::nth(FaultKind::Torn { keep_bytes: 512 }, Access::Write, write),
                2 => Fault::nth(FaultKind::Misdirected { to }, Access::Write, write),
                3 => Fault::nth(FaultKind::Failed, Access::Write, write),
                4 => Fault::from_nth(FaultKind::Failed, Access::Write, write),
                5 => Fault::nth(FaultKind::Failed, Access::Flush, nth(counts.flushes, &mut rng)),
                6 => Fault::nth(FaultKind::Gone, Access::Write, write),
                7 => Fault::nth(FaultKind::Gone, Access::Read, read),
                8 => Fault::from_nth(FaultKind::Failed, Access::Read, read),
                9 => Fault::from_nth(flip, Access::Read, read),
                _ => Fault::from_nth(FaultKind::Stale, Access::Read, read),
            };
            tried += 1;
            match tolerate(&pool, &story, device, fault.clone()) {
                Ok(hit) => struck += u32::from(hit),
                Err(what) => panic!("seed {seed}, device {device}, {fault:?}: {what}"),
            }
        }
    }
    assert!(struck * 3 > tried, "only {struck} of {tried} faults struck");
}

fn core() -> Platform {
    TestPlatform::new(1, Spawn::AtOnce).platform()
}

/// Opens, makes a directory, and closes; what the devices hold then.
fn open_and_write(pool: &Pool, images: &[&Image], name: &[u8]) -> Result<Vec<Image>, Error> {
    let rams: Vec<Arc<RamDevice>> =
        images.iter().map(|image| RamDevice::of("ram", (*image).clone())).collect();
    let mounted = pool.open(&refs(&rams), &core())?;
    let fs = mounted.fs();
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    fs.mkdir(fs.root(), name, 0o755, &caller).map(|_| ())?;
    drop(fs);
    mounted.close()?;
    Ok(rams.iter().map(|ram| ram.image()).collect())
}

#[test]
fn halves_that_were_both_written_apart_are_refused_together() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let [a, b] = [rams[0].image(), rams[1].image()];
    let apart_a = open_and_write(&pool, &[&a], b"left").unwrap().remove(0);
    let apart_b = open_and_write(&pool, &[&b], b"right").unwrap().remove(0);
    let error = open_and_write(&pool, &[&apart_a, &apart_b], b"both").err();
    assert!(matches!(error, Some(Error::Split { .. })), "{error:?}");
    // One that was only left out is taken back, and not believed.
    let both = open_and_write(&pool, &[&apart_a, &b], b"left").map(|_| ());
    assert!(matches!(both, Err(Error::Posix(fs_core::error::Errno::Exist))), "{both:?}");
    let alone = several(1, 16 << 20);
    alone[0].set_image(apart_a);
    let mut strict = pool.clone();
    strict.open.degraded = false;
    let error = strict.open(&refs(&alone), &core()).err();
    assert!(matches!(error, Some(Error::MissingDevices { needed: false, .. })), "{error:?}");
}

#[test]
fn devices_that_are_missing_or_behind_are_told() {
    let pool = Pool::on(3, Profile::Mirror, Profile::Mirror3);
    let rams = several(3, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let images: Vec<Image> = rams.iter().map(|ram| ram.image()).collect();
    let check = |images: &[&Image]| {
        let rams: Vec<Arc<RamDevice>> =
            images.iter().map(|image| RamDevice::of("ram", (*image).clone())).collect();
        rams.iter().for_each(|ram| ram.forbid_writes());
        pool.check(&refs(&rams), &core()).unwrap()
    };
    assert_eq!(check(&[&images[2], &images[0], &images[1]]), Vec::<String>::new());
    let missing = check(&[&images[0], &images[2]]);
    assert!(missing.len() == 1 && missing[0].contains("W-DEVICE-MISSING"), "{missing:?}");
    let rest = open_and_write(&pool, &[&images[0], &images[2]], b"without it").unwrap();
    let behind = check(&[&rest[0], &images[1], &rest[1]]);
    assert!(behind.len() == 1 && behind[0].contains("W-DEVICE-BEHIND"), "{behind:?}");
    // It is written to again, but still it is known to lack something.
    let all = open_and_write(&pool, &[&rest[0], &images[1], &rest[1]], b"with it").unwrap();
    let alone = RamDevice::of("ram", all[1].clone());
    let error = pool.open(&refs(&[alone]), &core()).err();
    assert!(matches!(error, Some(Error::OnlyBehind { .. })), "{error:?}");
    // What it has can be read.
    let alone = RamDevice::of("ram", all[1].clone());
    alone.forbid_writes();
    let mut reading = pool.clone();
    reading.open.read_only = true;
    let mounted = reading.open(&refs(&[alone]), &core()).unwrap();
    mounted.fs().lookup(mounted.fs().root(), b"with it").unwrap();
    drop(mounted);
    let two = open_and_write(&pool, &[&all[0], &all[2]], b"last").map(|_| ());
    two.unwrap();
}

#[test]
fn a_pool_without_redundancy_does_not_open_without_a_device() {
    let pool = Pool::on(2, Profile::Stripe, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let mounted = pool.open(&refs(&rams), &core()).unwrap();
    let fs = mounted.fs();
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    for name in 0..8u8 {
        let file = fs.mknod(fs.root(), &[b'a' + name], 0o100_644, 0, &caller).unwrap();
        let mut content = vec![0; 1 << 20];
        cairn_tests::rng::Rng::new(u64::from(name)).fill(&mut content);
        let flags = fs_core::vfs::WriteFlags::default();
        fs.write(file.ino, 0, &content, flags).unwrap();
    }
    drop(fs);
    mounted.close().unwrap();
    let error = pool.open(&refs(&rams[..1]), &core()).err();
    assert!(matches!(error, Some(Error::MissingDevices { needed: true, .. })), "{error:?}");
}

#[test]
fn room_is_counted_in_bytes_of_file_data() {
    let profiles = [
        (2, Profile::Stripe),
        (2, Profile::Mirror),
        (3, Profile::Mirror3),
        (4, Profile::StripeMirror),
    ];
    for (devices, data) in profiles {
        let pool = Pool::on(devices, data, Profile::Mirror);
        let rams = several(devices, 64 << 20);
        pool.format(&refs(&rams), &core()).unwrap();
        let mounted = pool.open(&refs(&rams), &core()).unwrap();
        let room = mounted.fs().statfs().unwrap();
        let all = (devices as u64 * (64 << 20)) / data.copies();
        assert!((all / 8 * 7..=all).contains(&room.total_bytes), "{data:?}: {room:?}");
        let usual = room.total_bytes / 4 * 3..=room.total_bytes;
        assert!(usual.contains(&room.free_bytes), "{data:?}: {room:?}");
        assert!(room.available_bytes <= room.free_bytes, "{data:?}: {room:?}");
        mounted.close().unwrap();
    }
}

#[test]
fn halves_of_which_one_began_a_group_later_are_refused_together() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let mounted = pool.open(&refs(&rams), &core()).unwrap();
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    let fs = mounted.fs();
    let grow = |name: &[u8]| {
        fs.mkdir(fs.root(), name, 0o755, &caller).unwrap();
        fs.sync().unwrap();
        rams.iter().map(|ram| ram.image()).collect::<Vec<Image>>()
    };
    let (before, after) = (grow(b"one"), grow(b"two"));
    // The power fails when the newest superblock has reached only one of them; each goes on alone
    // by a single group.
    let alone = |image: &Image, name: &[u8]| {
        let rams = [RamDevice::of("ram", image.clone())];
        let mounted = pool.open(&refs(&rams), &core()).unwrap();
        mounted.fs().mkdir(mounted.fs().root(), name, 0o755, &caller).unwrap();
        mounted.fs().sync().unwrap();
        rams[0].image()
    };
    let (left, right) = (alone(&after[0], b"left"), alone(&before[1], b"right"));
    let error = open_and_write(&pool, &[&left, &right], b"both").err();
    assert!(matches!(error, Some(Error::Split { .. })), "{error:?}");
}

#[test]
fn an_open_that_fails_to_read_the_trees_writes_nothing() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let image = rams[0].image();
    let reads = {
        let ram = RamDevice::of("ram", image.clone());
        ram.forbid_writes();
        let mut reading = pool.clone();
        reading.open.read_only = true;
        drop(reading.open(&refs(std::slice::from_ref(&ram)), &core()).unwrap());
        ram.counts().reads
    };
    assert!(reads > 5);
    let mut failed = 0;
    for nth in 0..reads {
        let ram = RamDevice::of("ram", image.clone());
        ram.arm(Fault::from_nth(FaultKind::Failed, Access::Read, nth));
        if pool.open(&refs(std::slice::from_ref(&ram)), &core()).is_err() {
            failed += 1;
            assert_eq!(ram.counts().writes, 0, "the {nth}-th read fails");
        }
    }
    assert!(failed > 0);
}

#[test]
fn the_power_may_fail_at_every_write_while_a_device_is_leaving() {
    let wanted = if is_long() { 100_000 } else { 2_500 };
    let mut count = 0;
    for seed in seeds(40, 100_000) {
        let pool = redundant(seed);
        let mut rng = Rng::derived(seed, 0x6c65_6176);
        let device = rng.below(pool.devices() as u64) as usize;
        let nth = rng.below(60);
        let fault = match rng.below(4) {
            0 => Fault::nth(FaultKind::Failed, Access::Write, nth),
            1 => Fault::nth(FaultKind::Failed, Access::Flush, nth / 2),
            2 => Fault::nth(FaultKind::Gone, Access::Write, nth),
            _ => Fault::nth(FaultKind::Gone, Access::Flush, nth / 2),
        };
        let options = Options { file_bytes: 200 << 10, ..Options::CRASH };
        let plan = Plan { seed, count: 15, options, device_bytes: 12 << 20, random: 1 };
        let story = Story::tell_with(&pool, plan, Some((device, fault)))
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for state in story.states() {
            count += 1;
            let depth = if depth_of(&state) { Depth::Reopen } else { Depth::Open };
            if let Err(what) = story.judge(&pool, &state, depth) {
                panic!("{}", story.report("the_power_may_fail_at_every_write", &state, &what));
            }
        }
        if count >= wanted {
            return;
        }
    }
}

#[test]
fn devices_may_fail_between_any_two_steps_and_keep_what_was_promised() {
    let (mut noticed, mut tried) = (0, 0);
    for seed in seeds(4, 200) {
        let pool = redundant(seed);
        let story = story(seed);
        let counts = requests(&pool, &story).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut rng = Rng::derived(seed, 0x7477_6f20);
        for _ in 0..if is_long() { 400 } else { 40 } {
            let first = rng.below(pool.devices() as u64) as usize;
            let second =
                (first + 1 + rng.below(pool.devices() as u64 - 1) as usize) % pool.devices();
            let write = rng.below(counts.writes.max(1));
            let kind = if rng.chance(1, 2) { FaultKind::Failed } else { FaultKind::Gone };
            // The other fails soon after: while labels are written, as often as not.
            let faults = [
                (first, Fault::nth(kind, Access::Write, write)),
                (second, Fault::from_nth(FaultKind::Failed, Access::Write, write + rng.below(6))),
            ];
            tried += 1;
            match survive(&pool, &story, &faults) {
                Ok(End::Noticed) => noticed += 1,
                Ok(_) => {}
                Err(what) => panic!("seed {seed}, {faults:?}: {what}"),
            }
        }
    }
    assert!(noticed * 4 > tried, "only {noticed} of {tried} were too much");
}

/// A pool of which one device has missed half of a story, and what it shows: images of all devices
/// before anything is done about that.
fn one_behind(pool: &Pool, seed: u64, missing: usize) -> (Vec<Image>, Tree) {
    let platform = TestPlatform::new(seed, Spawn::AtOnce);
    let core = platform.platform();
    let rams = several(pool.devices(), 24 << 20);
    pool.format(&refs(&rams), &core).unwrap();
    let model = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
    let ops = story(seed).ops;
    let (first, second) = ops.split_at(ops.len() / 2);
    let tell = |rams: &[Arc<RamDevice>], ops: &[Op]| {
        let mounted = pool.open(&refs(rams), &core).unwrap();
        model.remount();
        let (mut expected, mut found) = (Runner::new(model.clone()), Runner::new(mounted.fs()));
        for op in ops.iter().filter(|op| !matches!(op, Op::Tick | Op::DropCaches)) {
            let (want, got) = (expected.run(op).result, found.run(op).result);
            assert_eq!(want.is_ok(), got.is_ok(), "{op:?}");
        }
        drop(found);
        mounted.close().unwrap();
    };
    tell(&rams, first);
    let others: Vec<Arc<RamDevice>> =
        rams.iter().enumerate().filter(|(i, _)| *i != missing).map(|(_, r)| r.clone()).collect();
    tell(&others, second);
    (rams.iter().map(|ram| ram.image()).collect(), Tree::of_state(&model.state()))
}

/// Lets time pass until a device is told to be complete again, so many ticks at most.
fn is_complete_in(platform: &TestPlatform, ticks: usize) -> bool {
    (0..ticks).any(|_| {
        platform.clock.advance_ms(300);
        platform.workers.tick();
        let told = platform.incidents.take();
        told.iter().any(|incident| matches!(incident, Incident::DeviceComplete { .. }))
    })
}

/// Opens images, waits until all devices are complete, and closes; what they hold then.
fn bring_up_to_date(pool: &Pool, images: &[&Image]) -> Vec<Image> {
    let rams = rams_of(images);
    let platform = TestPlatform::new(3, Spawn::AtOnce);
    let mounted = pool.open(&refs(&rams), &platform.platform()).unwrap();
    assert!(is_complete_in(&platform, 1000));
    mounted.close().unwrap();
    rams.iter().map(|ram| ram.image()).collect()
}

fn rams_of(images: &[&Image]) -> Vec<Arc<RamDevice>> {
    images.iter().map(|image| RamDevice::of("ram", (*image).clone())).collect()
}

#[test]
fn an_old_copy_of_a_device_is_behind() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let images: Vec<Image> = rams.iter().map(|ram| ram.image()).collect();
    let later = open_and_write(&pool, &[&images[0], &images[1]], b"later").unwrap();
    let both = rams_of(&[&later[0], &images[1]]);
    both.iter().for_each(|ram| ram.forbid_writes());
    let findings = pool.check(&refs(&both), &core()).unwrap();
    assert!(findings.iter().any(|line| line.contains("W-DEVICE-BEHIND")), "{findings:?}");
    let both = open_and_write(&pool, &[&later[0], &images[1]], b"last").unwrap();
    let error = pool.open(&refs(&rams_of(&[&both[1]])), &core()).err();
    assert!(matches!(error, Some(Error::OnlyBehind { .. })), "{error:?}");
    let done = bring_up_to_date(&pool, &[&later[0], &images[1]]);
    let alone = open_and_write(&pool, &[&done[1]], b"later").map(|_| ());
    assert!(matches!(alone, Err(Error::Posix(fs_core::error::Errno::Exist))), "{alone:?}");
}

#[test]
fn an_old_copy_that_was_written_alone_is_refused() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let images: Vec<Image> = rams.iter().map(|ram| ram.image()).collect();
    let mut later = images.clone();
    for name in [b"a", b"b", b"c", b"d"] {
        later = open_and_write(&pool, &[&later[0], &later[1]], name).unwrap();
    }
    let old = open_and_write(&pool, &[&images[1]], b"alone").unwrap().remove(0);
    let mut left = later[0].clone();
    // Whether or not the other noticed that it was away.
    for round in 0..3 {
        let error = open_and_write(&pool, &[&left, &old], b"both").err();
        assert!(matches!(error, Some(Error::Split { .. })), "round {round}: {error:?}");
        left = open_and_write(&pool, &[&left], &[b'0' + round]).unwrap().remove(0);
    }
}

#[test]
fn halves_are_refused_together_also_after_a_third_copy_was_taken_back() {
    let pool = Pool::on(3, Profile::Mirror3, Profile::Mirror3);
    let rams = several(3, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let [a, b, c] = [0, 1, 2].map(|index| rams[index].image());
    let both = open_and_write(&pool, &[&a, &b], b"both").unwrap();
    let a = open_and_write(&pool, &[&both[0]], b"left").unwrap().remove(0);
    let b = open_and_write(&pool, &[&both[1]], b"right").unwrap().remove(0);
    let ac = bring_up_to_date(&pool, &[&a, &c]);
    for (there, name) in [(vec![&ac[0], &b, &ac[1]], "all"), (vec![&b, &ac[1]], "two")] {
        let error = open_and_write(&pool, &there, b"more").err();
        assert!(matches!(error, Some(Error::Split { .. })), "{name}: {error:?}");
    }
}

/// The superblocks on a device.
fn ring_of(image: &Image) -> Ring {
    let ram = RamDevice::of("ram", image.clone());
    let probe = probe(&*ram, 0).unwrap();
    let mut ring = Ring::default();
    ring.add(&Member::new(ram, &probe), &probe.identity.pool_id).unwrap();
    ring
}

#[test]
fn a_device_that_comes_back_keeps_no_superblock_that_others_do_not_have() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let mounted = pool.open(&refs(&rams), &core()).unwrap();
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    let grow = |name: &[u8]| {
        mounted.fs().mkdir(mounted.fs().root(), name, 0o755, &caller).unwrap();
        mounted.fs().sync().unwrap();
        rams.iter().map(|ram| ram.image()).collect::<Vec<Image>>()
    };
    let (before, after) = (grow(b"one"), grow(b"two"));
    // Power fails when the newest superblock has reached the second only, and the first goes on.
    let alone = open_and_write(&pool, &[&before[0]], b"other").unwrap().remove(0);
    let alone = open_and_write(&pool, &[&alone], b"another").unwrap().remove(0);
    let known = |ours: &Ring, other: &Ring| other.valid.iter().all(|s| ours.valid.contains(s));
    assert!(!known(&ring_of(&alone), &ring_of(&after[1])));
    // It keeps them as long as it does not count, and that is no sign of having gone apart.
    let rams = rams_of(&[&alone, &after[1]]);
    drop(pool.open(&refs(&rams), &core()).unwrap());
    let images: Vec<Image> = rams.iter().map(|ram| ram.image()).collect();
    assert!(!known(&ring_of(&images[0]), &ring_of(&images[1])));
    let again = bring_up_to_date(&pool, &[&images[0], &images[1]]);
    assert!(known(&ring_of(&again[0]), &ring_of(&again[1])));
    let both = bring_up_to_date(&pool, &[&alone, &after[1]]);
    assert!(known(&ring_of(&both[0]), &ring_of(&both[1])));
}

#[test]
fn a_device_is_not_complete_while_something_it_lacks_cannot_be_read() {
    for seed in seeds(3, 60) {
        let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
        let (images, want) = one_behind(&pool, seed, 1);
        let rams: Vec<Arc<RamDevice>> =
            images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        let platform = TestPlatform::new(seed, Spawn::AtOnce);
        let mounted = pool.open(&refs(&rams), &platform.platform()).unwrap();
        mounted.drop_caches();
        // A few reads succeed, so that it fails in the middle of a tree as well.
        rams[0].arm(Fault::from_nth(FaultKind::Failed, Access::Read, seed * 3));
        assert!(!is_complete_in(&platform, 20), "seed {seed}: what could not be read was passed");
        rams[0].disarm();
        assert!(is_complete_in(&platform, 1000), "seed {seed}: it is not tried again");
        mounted.close().unwrap();
        let mounted = pool.open(&refs(&rams[1..]), &core()).unwrap();
        let found = Tree::read(&*mounted.fs()).unwrap();
        assert_eq!(want.difference(&found), None, "seed {seed}");
    }
}

#[test]
fn what_only_a_device_has_that_failed_a_write_is_still_read() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let mounted = pool.open(&refs(&rams), &core()).unwrap();
    let fs = mounted.fs();
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    let file = fs.mknod(fs.root(), b"file", 0o100_644, 0, &caller).unwrap();
    let mut content = vec![0; 256 << 10];
    Rng::new(1).fill(&mut content);
    let flags = fs_core::vfs::WriteFlags::default();
    fs.write(file.ino, 0, &content, flags).unwrap();
    fs.sync().unwrap();
    rams[1].arm(Fault::nth(FaultKind::Failed, Access::Write, 0));
    fs.mkdir(fs.root(), b"more", 0o755, &caller).unwrap();
    fs.sync().unwrap();
    // Now the other loses what it has. Trees are in memory.
    rams[0].arm(Fault::within(FaultKind::Failed, Access::Read, 1 << 20..16 << 20));
    let mut found = vec![0; content.len()];
    assert_eq!(fs.read(file.ino, 0, &mut found).unwrap(), content.len());
    assert!(found == content);
}

#[test]
fn a_device_that_was_away_when_others_forgot_to_tell_is_not_believed() {
    let pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    let rams = several(2, 16 << 20);
    pool.format(&refs(&rams), &core()).unwrap();
    let [a, b] = [rams[0].image(), rams[1].image()];
    let b = open_and_write(&pool, &[&b], b"left").unwrap().remove(0);
    // The power fails between the two labels that call the first complete again.
    let rams = rams_of(&[&a, &b]);
    let platform = TestPlatform::new(3, Spawn::AtOnce);
    let mounted = pool.open(&refs(&rams), &platform.platform()).unwrap();
    let recording = Recording::start(&rams);
    let base: Vec<Image> = rams.iter().map(|ram| ram.image()).collect();
    assert!(is_complete_in(&platform, 1000));
    drop(mounted);
    let epoch = |image: &Image| {
        let ram = RamDevice::of("ram", image.clone());
        probe(&*ram, 0).unwrap().identity.epoch
    };
    let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
    let mut content = vec![0; 256 << 10];
    Rng::new(1).fill(&mut content);
    let mut seen = 0;
    for state in Crashes::new(base, &recording.events(), Sampling { seed: 1, random: 1 }) {
        for (there, other) in [(0, 1), (1, 0)] {
            if epoch(&state.images[there]) >= epoch(&state.images[other]) {
                continue;
            }
            // The other stays away while one group is published; then the power fails again.
            let one = rams_of(&[&state.images[there]]);
            let Ok(mounted) = pool.open(&refs(&one), &core()) else { continue };
            let fs = mounted.fs();
            let file = fs.mknod(fs.root(), b"new", 0o100_644, 0, &caller).unwrap();
            let flags = fs_core::vfs::WriteFlags::default();
            fs.write(file.ino, 0, &content, flags).unwrap();
            fs.sync().unwrap();
            drop(fs);
            let mut images = state.images.clone();
            images[there] = one[0].image();
            drop(mounted);
            let both = open_and_write(&pool, &[&images[0], &images[1]], b"both").unwrap();
            seen += 1;
            match pool.open(&refs(&rams_of(&[&both[other]])), &core()) {
                Err(Error::OnlyBehind { .. }) => {}
                Err(error) => panic!("device {there} was there: {error}"),
                Ok(mounted) => {
                    let mut found = vec![0; content.len()];
                    let file = mounted.fs().lookup(mounted.fs().root(), b"new").unwrap();
                    mounted.fs().read(file.ino, 0, &mut found).unwrap();
                    assert!(found == content, "device {there} was there");
                }
            }
        }
    }
    assert!(seen > 0);
}

#[test]
fn a_device_that_was_behind_gets_everything_and_counts_again() {
    for seed in seeds(8, 300) {
        let pool = redundant(seed);
        let missing = seed as usize % pool.devices();
        let (images, want) = one_behind(&pool, seed, missing);
        let rams: Vec<Arc<RamDevice>> =
            images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        let platform = TestPlatform::new(seed, Spawn::AtOnce);
        let mounted = pool.open(&refs(&rams), &platform.platform()).unwrap();
        assert!(is_complete_in(&platform, 1000), "seed {seed}: the device is still behind");
        mounted.close().unwrap();
        let findings = pool.check(&refs(&rams), &core()).unwrap();
        assert_eq!(findings, Vec::<String>::new(), "seed {seed}");
        // As many others may be lost as the profile allows.
        let other = (missing + 1) % pool.devices();
        let rest: Vec<Arc<RamDevice>> =
            (0..pool.devices()).filter(|i| *i != other).map(|i| rams[i].clone()).collect();
        let mounted = pool.open(&refs(&rest), &core()).unwrap();
        let found = Tree::read(&*mounted.fs()).unwrap();
        assert_eq!(want.difference(&found), None, "seed {seed}");
    }
}

#[test]
fn the_power_may_fail_at_every_write_while_a_device_is_brought_up_to_date() {
    let wanted = if is_long() { 50_000 } else { 1_200 };
    let mut count = 0;
    for seed in seeds(40, 100_000) {
        let pool = redundant(seed);
        let missing = seed as usize % pool.devices();
        let (images, want) = one_behind(&pool, seed, missing);
        let rams: Vec<Arc<RamDevice>> =
            images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        let recording = Recording::start(&rams);
        let platform = TestPlatform::new(seed, Spawn::AtOnce);
        let mounted = pool.open(&refs(&rams), &platform.platform()).unwrap();
        for _ in 0..4 {
            platform.clock.advance_ms(300);
            platform.workers.tick();
        }
        mounted.close().unwrap();
        let events = recording.events();
        let epoch = |image: &Image| {
            let ram = RamDevice::of("ram", image.clone());
            fs_core::device::probe(&*ram, 0).unwrap().identity.epoch
        };
        let unknowing = epoch(&images[missing]);
        let show = |images: Vec<Image>| {
            let rams: Vec<Arc<RamDevice>> =
                images.into_iter().map(|image| RamDevice::of("ram", image)).collect();
            let mounted = pool.open(&refs(&rams), &core())?;
            Ok(Tree::read(&*mounted.fs()).unwrap())
        };
        let mut alone = 0;
        for state in Crashes::new(images, &events, Sampling { seed, random: 1 }).step_by(3) {
            count += 1;
            let which = (state.boundary, state.variant);
            let found: Result<Tree, Error> = show(state.images.clone());
            assert_eq!(want.difference(&found.unwrap()), None, "seed {seed}, {which:?}");
            if epoch(&state.images[missing]) == unknowing {
                // Alone it would show what it knew before it was away.
                continue;
            }
            // Without another it is refused, or has everything.
            let mut rest = state.images;
            rest.remove((missing + 1) % pool.devices());
            match show(rest) {
                Ok(found) => {
                    alone += 1;
                    assert_eq!(want.difference(&found), None, "seed {seed}, {which:?}");
                }
                Err(Error::OnlyBehind { .. }) => {}
                Err(error) => panic!("seed {seed}, {which:?}: {error}"),
            }
        }
        assert!(alone > 0, "it was never complete");
        if count >= wanted {
            return;
        }
    }
}

#[test]
fn what_was_taken_in_is_kept_when_a_device_is_lost_before_it_is_written() {
    for lost in 0..3 {
        let pool = Pool::on(3, Profile::Mirror, Profile::Mirror);
        let rams = several(3, 24 << 20);
        pool.format(&refs(&rams), &core()).unwrap();
        let mounted = pool.open(&refs(&rams), &core()).unwrap();
        let fs = mounted.fs();
        let caller = fs_core::vfs::Caller { uid: 0, gid: 0, umask: 0 };
        let file = fs.mknod(fs.root(), b"large", 0o100_644, 0, &caller).unwrap();
        // More than two devices have room for, all of it in memory.
        let mut content = vec![0; 26 << 20];
        Rng::new(lost).fill(&mut content);
        let flags = fs_core::vfs::WriteFlags::default();
        for (part, at) in content.chunks(1 << 20).zip((0..).step_by(1 << 20)) {
            fs.write(file.ino, at, part, flags).unwrap();
        }
        rams[lost as usize].arm(Fault::from_nth(FaultKind::Gone, Access::Write, 0));
        fs.sync().unwrap();
        drop(fs);
        mounted.close().unwrap();
        let rest: Vec<Arc<RamDevice>> =
            (0..3).filter(|i| *i != lost as usize).map(|i| rams[i].clone()).collect();
        let mounted = pool.open(&refs(&rest), &core()).unwrap();
        let fs = mounted.fs();
        let file = fs.lookup(fs.root(), b"large").unwrap();
        let mut found = vec![0; content.len()];
        for (part, at) in found.chunks_mut(1 << 20).zip((0..).step_by(1 << 20)) {
            assert_eq!(fs.read(file.ino, at, part).unwrap(), part.len());
        }
        assert!(found == content, "without device {lost}");
    }
}
