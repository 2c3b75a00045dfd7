//! Devices are added, removed, replaced and resized while the pool is in use, whatever fails.

use cairn_tests::crash::{Crashes, Sampling};
use cairn_tests::device::{refs, Access, Fault, FaultKind, Image, RamDevice, Recording};
use cairn_tests::drive::{is_long, seeds};
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::rng::Rng;
use cairn_tests::subject::{Pool, Subject};
use cairn_tests::tree::Tree;
use cairn_tests::world::World;
use fs_core::engine::versions::VersionOp;
use fs_core::engine::{ChangeWait, Engine};
use fs_core::error::Error;
use fs_core::format::chunk::Profile;
use fs_core::format::devices::DeviceChangeState;
use fs_core::format::label::LABEL_AREA_BYTES;
use fs_core::platform::DeviceRef;
use fs_core::vfs::{AccessTime, Caller, Fallocate, Filesystem, Volume, WriteFlags};

const DEVICE_BYTES: u64 = 24 << 20;
const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };

/// Pools, each with one device more than its profile needs.
fn pools() -> Vec<Pool> {
    let mut pools = vec![
        Pool::on(2, Profile::Single, Profile::Single),
        Pool::on(2, Profile::Single, Profile::Dup),
        Pool::on(3, Profile::Mirror, Profile::Mirror),
        Pool::on(3, Profile::Stripe, Profile::Mirror),
        Pool::on(4, Profile::Mirror3, Profile::Mirror),
        Pool::on(5, Profile::StripeMirror, Profile::StripeMirror),
    ];
    pools.iter_mut().for_each(|pool| pool.format.chunk_bytes = Some(2 << 20));
    pools
}

fn world(pool: &Pool, seed: u64) -> World {
    World::new(pool, seed, DEVICE_BYTES, 120, true)
}

/// What happens to a world here.
trait Changed {
    /// Adds a device in memory to those of the world; not to the pool.
    fn new_ram(&mut self, bytes: u64) -> DeviceRef;
    fn state(&self) -> DeviceChangeState;
    /// Waits for the end of the change, telling the story on.
    fn finish(&mut self);
    fn has_chunks(&self, device: u16) -> bool;
}

impl Changed for World {
    fn new_ram(&mut self, bytes: u64) -> DeviceRef {
        let ram = RamDevice::new(&format!("new {}", self.rams.len()), bytes);
        self.rams.push(ram.clone());
        ram
    }

    fn state(&self) -> DeviceChangeState {
        self.engine().device_change().unwrap().state
    }

    fn finish(&mut self) {
        for _ in 0..3000 {
            if self.state() != DeviceChangeState::Running {
                return;
            }
            self.let_time_pass();
            self.tell(1);
        }
        panic!("the change does not end: {:?}", self.engine().device_change());
    }

    fn has_chunks(&self, device: u16) -> bool {
        let chunks = self.engine().store.pool.chunks();
        chunks.iter().any(|chunk| chunk.stripes.iter().any(|stripe| stripe.device == device))
    }
}

fn is_blank(ram: &RamDevice) -> bool {
    fs_core::device::probe(ram, 0).is_err()
}

#[test]
fn a_device_can_be_removed_while_the_pool_is_in_use() {
    for seed in seeds(12, 400) {
        let pools = pools();
        let mut world = world(&pools[seed as usize % pools.len()], seed);
        let device = (seed / 6 % world.rams.len() as u64) as u16;
        world.engine().remove_device(device).unwrap();
        world.finish();
        assert_eq!(world.state(), DeviceChangeState::Finished);
        assert!(!world.has_chunks(device) && !world.engine().store.pool.has_device(device));
        let gone = world.rams.remove(usize::from(device));
        assert!(is_blank(&gone), "seed {seed}: labels are left");
        let before = gone.counts();
        world.tell(10);
        assert_eq!(gone.counts(), before, "seed {seed}: what was removed is used");
        world.close();
        world.open().unwrap();
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn a_device_that_is_added_serves_at_once_and_takes_the_place_of_one_that_was_removed() {
    for seed in seeds(6, 200) {
        let pools = pools();
        let mut world = world(&pools[seed as usize % pools.len()], seed);
        let room = world.engine().room();
        let added = world.new_ram(DEVICE_BYTES);
        let index = world.engine().add_device(added).unwrap();
        assert_eq!(usize::from(index), world.pool.devices());
        assert!(world.engine().room().available > room.available, "seed {seed}");
        world.tell(10);
        world.engine().remove_device(0).unwrap();
        world.finish();
        world.rams.remove(0);
        let again = world.new_ram(2 * DEVICE_BYTES);
        assert_eq!(world.engine().add_device(again).unwrap(), 0);
        world.tell(10);
        world.close();
        world.open().unwrap();
        assert!(world.engine().store.pool.has_device(0));
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn a_pool_that_always_had_one_device_gets_another_and_loses_the_first() {
    for seed in seeds(4, 100) {
        let mut pool = Pool::default();
        pool.format.chunk_bytes = Some(1 << 20);
        let mut world = world(&pool, seed);
        let added = world.new_ram(DEVICE_BYTES);
        world.engine().add_device(added).unwrap();
        world.engine().remove_device(0).unwrap();
        world.finish();
        world.rams.remove(0);
        world.close();
        world.open().unwrap();
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn a_device_can_be_replaced_whether_it_is_there_or_not() {
    for seed in seeds(12, 400) {
        let pools = pools();
        let pool = &pools[seed as usize % pools.len()];
        let mut world = world(pool, seed);
        let is_redundant = pool.format.data_profile.devices_min() > 1;
        let is_missing = is_redundant && seed / 6 % 2 == 1;
        let device = (seed % world.rams.len() as u64) as u16;
        if is_missing {
            world.close();
            world.rams.remove(usize::from(device));
            world.open().unwrap();
            world.tell(5);
        }
        let new = world.new_ram(DEVICE_BYTES);
        let index = world.engine().replace_device(device, new).unwrap();
        world.finish();
        assert_eq!(world.state(), DeviceChangeState::Finished);
        assert!(world.has_chunks(index) && !world.has_chunks(device));
        if !is_missing {
            assert!(is_blank(&world.rams.remove(usize::from(device))));
        }
        // All that was promised is kept by the others.
        world.pool.open.degraded = false;
        world.close();
        world.open().unwrap();
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn little_is_read_from_a_device_that_is_replaced_while_others_have_copies() {
    let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    pool.format.chunk_bytes = Some(2 << 20);
    let mut world = world(&pool, 5);
    let new = world.new_ram(DEVICE_BYTES);
    // It gives out nothing any more.
    world.rams[0].arm(Fault::from_nth(FaultKind::Failed, Access::Read, 0));
    let before = world.rams[0].counts().reads;
    world.engine().replace_device(0, new).unwrap();
    world.ops.truncate(world.next);
    world.finish();
    assert_eq!(world.state(), DeviceChangeState::Finished);
    assert!(world.rams[0].counts().reads < before + 40);
    world.rams.remove(0);
    world.close();
    world.open().unwrap();
    world.judge("replaced");
}

#[test]
fn a_device_is_made_larger_and_smaller_while_the_pool_is_in_use() {
    for seed in seeds(8, 200) {
        let pools = pools();
        let mut world = world(&pools[seed as usize % pools.len()], seed);
        let device = (seed % world.rams.len() as u64) as u16;
        // It lies in the middle of its chunks that it is to end.
        let bytes = 6 << 20;
        let room = world.engine().room().total;
        world.engine().resize_device(device, Some(bytes)).unwrap();
        world.finish();
        assert!(world.engine().room().total < room, "seed {seed}");
        world.tell(10);
        world.close();
        let mut image = Image::zeroed(bytes);
        let whole = world.rams[usize::from(device)].image().to_vec();
        // Nothing of the label that was at the end is left to be found there.
        let end = &whole[(DEVICE_BYTES - LABEL_AREA_BYTES) as usize..];
        assert!(end.iter().all(|byte| *byte == 0), "seed {seed}");
        image.write(0, &whole[..bytes as usize]);
        world.rams[usize::from(device)] = RamDevice::of("cut", image);
        world.open().unwrap();
        world.tell(5);
        world.close();
        let mut image = Image::zeroed(DEVICE_BYTES);
        image.write(0, &world.rams[usize::from(device)].image().to_vec());
        world.rams[usize::from(device)] = RamDevice::of("grown", image);
        world.open().unwrap();
        world.engine().resize_device(device, None).unwrap();
        assert_eq!(world.engine().room().total, room, "seed {seed}");
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn the_areas_of_labels_may_overlap_when_a_size_changes_by_little() {
    let mut world = world(&pools()[0], 1);
    for bytes in [DEVICE_BYTES - 4096, DEVICE_BYTES - LABEL_AREA_BYTES, DEVICE_BYTES - 8192] {
        world.engine().resize_device(0, Some(bytes)).unwrap();
        world.finish();
        world.close();
        let damaged = fs_core::device::probe(&*world.rams[0], 0).unwrap().damaged;
        assert_eq!(damaged, [None, None], "{bytes} bytes");
        world.open().unwrap();
        world.tell(3);
    }
    world.judge("in the end");
}

#[test]
fn a_change_that_cannot_be_is_refused_and_leaves_nothing_behind() {
    let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    pool.format.chunk_bytes = Some(2 << 20);
    let mut world = world(&pool, 1);
    let (room, free) = (world.engine().room(), world.engine().store.pool.unallocated_bytes());
    let refused = world.engine().remove_device(1).unwrap_err();
    assert!(matches!(refused, Error::Argument { .. }), "{refused:?}");
    assert!(matches!(world.engine().remove_device(2), Err(Error::Argument { .. })));
    let tiny: DeviceRef = RamDevice::new("tiny", 1 << 20);
    assert!(matches!(world.engine().add_device(tiny.clone()), Err(Error::TooSmall { .. })));
    assert!(matches!(world.engine().replace_device(0, tiny), Err(Error::TooSmall { .. })));
    assert!(world.engine().resize_device(0, Some(DEVICE_BYTES + 4096)).is_err());
    assert!(world.engine().cancel_device_change().is_err());
    let after = (world.engine().room(), world.engine().store.pool.unallocated_bytes());
    assert_eq!(after, (room, free));
    world.tell(10);
    world.judge("refused");
}

#[test]
fn a_change_that_is_cancelled_leaves_the_pool_as_it_is_then() {
    for seed in seeds(8, 200) {
        let pools = pools();
        let mut world = world(&pools[seed as usize % pools.len()], seed);
        world.engine().remove_device(0).unwrap();
        for _ in 0..seed {
            world.let_time_pass();
            world.tell(1);
        }
        if world.state() == DeviceChangeState::Running {
            world.engine().cancel_device_change().unwrap();
            assert_eq!(world.state(), DeviceChangeState::Cancelled);
            assert!(world.engine().store.pool.has_device(0));
            // And another begins.
            world.engine().remove_device(0).unwrap();
            world.finish();
        }
        assert_eq!(world.state(), DeviceChangeState::Finished);
        world.rams.remove(0);
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn what_was_refused_leaves_the_last_change_as_it_was() {
    let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
    pool.format.chunk_bytes = Some(2 << 20);
    let mut world = world(&pool, 1);
    let added = world.new_ram(DEVICE_BYTES);
    world.engine().add_device(added).unwrap();
    world.engine().remove_device(2).unwrap();
    world.finish();
    world.rams.remove(2);
    let before = world.engine().device_change();
    assert!(world.engine().remove_device(1).is_err());
    assert_eq!(world.engine().device_change(), before);
    world.remount();
    assert_eq!(world.engine().device_change(), before);
    assert!(world.engine().store.pool.has_device(1));
    world.judge("refused");
}

/// A new subvolume whose tree has some leaves.
fn filled_subvolume(engine: &std::sync::Arc<Engine>, name: &str) -> u64 {
    let (name, mode) = (name.as_bytes().to_vec(), 0o755);
    let made = VersionOp::CreateSubvolume { name, mode, uid: 0, gid: 0 };
    let id = engine.change_versions(vec![made]).unwrap()[0];
    let filled = Volume::of_version(engine.clone(), id, AccessTime::Relative).unwrap();
    for n in 0..300 {
        let name = format!("a name that takes some room in a leaf, number {n}");
        filled.mknod(filled.root(), name.as_bytes(), 0o100644, 0, &ROOT).unwrap();
    }
    id
}

#[test]
fn what_is_taken_apart_meanwhile_is_not_lost() {
    for seed in seeds(12, 200) {
        let pools = pools();
        let mut pool = pools[seed as usize % pools.len()].clone();
        pool.open.deletion_refs = 1;
        let mut world = world(&pool, seed);
        let engine = world.engine().clone();
        let ids = ["first", "other"].map(|name| filled_subvolume(&engine, name));
        world.volume().sync().unwrap();
        // One is half gone when the change begins, and another goes in the middle of it.
        engine.change_versions(vec![VersionOp::Delete { id: ids[0] }]).unwrap();
        (0..seed * 3).for_each(|_| world.let_time_pass());
        engine.remove_device(0).unwrap();
        world.let_time_pass();
        engine.change_versions(vec![VersionOp::Delete { id: ids[1] }]).unwrap();
        for _ in 0..5000 {
            world.let_time_pass();
            if world.state() == DeviceChangeState::Finished {
                break;
            }
        }
        assert_eq!(world.state(), DeviceChangeState::Finished, "seed {seed}");
        drop(engine);
        world.rams.remove(0);
        // From here on everything is read.
        world.remount();
        world.engine().destroy_all().unwrap();
        assert_eq!(world.engine().stopped_deletions(), [0; 0], "seed {seed}");
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn a_device_that_comes_back_gets_what_is_left_of_a_tree_that_is_taken_apart() {
    let mut half_gone = 0;
    for seed in seeds(12, 200) {
        let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
        pool.format.chunk_bytes = Some(2 << 20);
        pool.open.deletion_refs = 1;
        let mut world = world(&pool, seed);
        world.close();
        let away = world.rams.remove(1);
        world.pool.open.degraded = true;
        world.open().unwrap();
        let engine = world.engine().clone();
        let id = filled_subvolume(&engine, "filled");
        world.volume().sync().unwrap();
        engine.change_versions(vec![VersionOp::Delete { id }]).unwrap();
        (0..seed * 8).for_each(|_| world.let_time_pass());
        let is_there = engine.with_versions(|all| all.get(id).is_some());
        half_gone += u32::from(is_there && engine.given_up_bytes() > 0);
        drop(engine);
        // As slow as it is, it is not at its end before the device has everything else.
        world.close();
        world.rams.push(away);
        world.open().unwrap();
        for _ in 0..500 {
            world.let_time_pass();
            if world.engine().store.pool.behind().is_empty() {
                break;
            }
        }
        assert_eq!(world.engine().store.pool.behind(), [0; 0], "seed {seed}");
        world.close();
        // It has to be as good as the other, from here on.
        let other = world.rams.remove(0);
        world.open().unwrap();
        world.engine().destroy_all().unwrap();
        assert_eq!(world.engine().stopped_deletions(), [0; 0], "seed {seed}");
        world.close();
        world.rams.insert(0, other);
        world.open().unwrap();
        for _ in 0..500 {
            world.let_time_pass();
        }
        world.judge(&format!("seed {seed}"));
    }
    assert!(half_gone > 3, "{half_gone}");
}

/// What is done to the devices, in a run that power cuts short.
fn act(world: &mut World, seed: u64) {
    let engine = world.engine().clone();
    match seed % 4 {
        0 => engine.remove_device(0).unwrap(),
        1 => {
            let new = world.rams.last().unwrap().clone();
            engine.replace_device(0, new).unwrap();
        }
        2 => {
            let new = world.rams.last().unwrap().clone();
            engine.add_device(new).unwrap();
            engine.remove_device(1).unwrap();
        }
        _ => engine.resize_device(0, Some(5 << 20)).unwrap(),
    }
}

#[test]
fn after_power_loss_a_change_goes_on_and_nothing_is_lost() {
    let mut count = 0;
    for seed in seeds(8, 400) {
        let pools = pools();
        let pool = &pools[(seed / 4 + seed) as usize % pools.len()];
        let mut world = world(pool, seed);
        world.new_ram(DEVICE_BYTES);
        world.ops.truncate(world.next);
        let want = Tree::of_state(&world.model.state());
        let base: Vec<Image> = world.rams.iter().map(|ram| ram.image()).collect();
        let recording = Recording::start(&world.rams);
        act(&mut world, seed);
        world.finish();
        assert_eq!(world.state(), DeviceChangeState::Finished);
        drop(world.volume.take());
        let events = recording.events();
        let every = if is_long() { 3 } else { 23 };
        for state in Crashes::new(base, &events, Sampling { seed, random: 1 }).step_by(every) {
            count += 1;
            let which = (seed, state.boundary, state.variant);
            world.rams =
                state.images.into_iter().map(|image| RamDevice::of("ram", image)).collect();
            // What has no label yet, or no more, nobody would find.
            world.rams.retain(|ram| !is_blank(ram));
            world.platform = TestPlatform::new(seed, Spawn::AtOnce);
            world.pool.open.degraded = false;
            let findings = world.pool.check(&refs(&world.rams), &world.platform.platform());
            let findings = findings.unwrap_or_else(|e| panic!("{which:?}: {e}"));
            // A crash may leave a label or superblock that the next mount completes.
            let serious = |line: &&String| {
                !["LABEL", "SUPERBLOCK-COPY", "DEVICE-BEHIND"].iter().any(|id| line.contains(id))
            };
            assert_eq!(findings.iter().filter(serious).count(), 0, "{which:?}: {findings:?}");
            world.open().unwrap_or_else(|e| panic!("{which:?}: {e}"));
            let found = Tree::read(&**world.volume()).unwrap();
            assert_eq!(want.difference(&found), None, "{which:?}");
            if state.boundary % 3 == 0 {
                if world.engine().device_change().is_some() {
                    world.finish();
                }
                for _ in 0..8 {
                    world.let_time_pass();
                }
                world.close();
                world.rams.retain(|ram| !is_blank(ram));
                let findings = world.pool.check(&refs(&world.rams), &world.platform.platform());
                assert_eq!(findings.unwrap(), Vec::<String>::new(), "{which:?}");
                world.open().unwrap();
                let found = Tree::read(&**world.volume()).unwrap();
                assert_eq!(want.difference(&found), None, "{which:?}");
            }
            drop(world.volume.take());
        }
    }
    assert!(count > 100, "{count} states");
}

#[test]
fn a_device_that_fails_in_the_middle_of_a_change_costs_nothing_that_copies_keep() {
    let mut struck = 0;
    for seed in seeds(24, 1000) {
        let pools = pools();
        let pool = &pools[[2, 4, 5][seed as usize % 3]];
        let mut rng = Rng::derived(seed, 0x6661_696c);
        let mut world = world(pool, seed);
        let new = world.new_ram(DEVICE_BYTES);
        world.engine().replace_device(0, new).unwrap();
        for _ in 0..rng.below(4) {
            world.let_time_pass();
        }
        let victim = match rng.below(3) {
            0 => 0,
            1 => world.rams.len() - 1,
            _ => 1,
        };
        let access = if rng.chance(1, 2) { Access::Write } else { Access::Read };
        let kind = if rng.chance(1, 2) { FaultKind::Gone } else { FaultKind::Failed };
        world.rams[victim].arm(Fault::from_nth(kind, access, rng.below(60)));
        for _ in 0..60 {
            world.let_time_pass();
            world.platform.clock.advance_ms(4000);
            world.tell(1);
        }
        struck += u32::from(world.rams[victim].struck());
        world.ops.truncate(world.next);
        let want = Tree::of_state(&world.model.state());
        let found = Tree::read(&**world.volume()).unwrap();
        assert_eq!(want.difference(&found), None, "seed {seed}");
        world.volume().sync().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        drop(world.volume.take());
        // It is there again, with what it had, and then it is not.
        world.rams[victim].disarm();
        let images: Vec<Image> = world.rams.iter().map(|ram| ram.image()).collect();
        for without in [None, Some(victim)] {
            world.rams = images.iter().map(|i| RamDevice::of("ram", i.clone())).collect();
            if let Some(victim) = without {
                world.rams.remove(victim);
            }
            world.rams.retain(|ram| !is_blank(ram));
            world.platform = TestPlatform::new(seed, Spawn::AtOnce);
            world.open().unwrap_or_else(|e| panic!("seed {seed} without {without:?}: {e}"));
            let found = Tree::read(&**world.volume()).unwrap();
            assert_eq!(want.difference(&found), None, "seed {seed} without {without:?}");
            drop(world.volume.take());
        }
    }
    assert!(struck > 5, "{struck} faults struck");
}

#[test]
fn a_device_that_was_removed_and_comes_back_is_left_out() {
    let mut pool = Pool::on(3, Profile::Mirror, Profile::Mirror);
    pool.format.chunk_bytes = Some(2 << 20);
    for is_reused in [false, true] {
        let mut world = world(&pool, 3);
        // As if its labels had not been wiped.
        let old = world.rams[1].image();
        world.engine().remove_device(1).unwrap();
        world.finish();
        if is_reused {
            let new = world.new_ram(DEVICE_BYTES);
            assert_eq!(world.engine().add_device(new).unwrap(), 1);
        }
        world.close();
        world.rams[1] = RamDevice::of("old", old);
        world.open().unwrap();
        world.tell(20);
        assert_eq!(world.engine().store.pool.has_device(1), is_reused);
        let counts = world.rams[1].counts();
        assert_eq!((counts.writes, counts.flushes), (0, 0));
        world.rams.remove(1);
        world.judge("without it");
    }
}

#[test]
fn room_that_was_promised_meanwhile_is_not_taken_by_a_removal() {
    let mut pool = Pool::on(2, Profile::Single, Profile::Single);
    pool.format.chunk_bytes = Some(1 << 20);
    let mut world = world(&pool, 4);
    world.tell(usize::MAX / 2);
    let want = Tree::of_state(&world.model.state());
    let engine = world.engine().clone();
    let volume = world.volume().clone();
    engine.remove_device(1).unwrap();
    // Nothing has moved yet.
    let file = volume.mknod(volume.root(), b"promised", 0o100_644, 0, &ROOT).unwrap().ino;
    let promised = engine.room().available / 4096 * 4096 - (256 << 10);
    volume.fallocate(file, Fallocate::Allocate { keep_size: false }, 0, promised).unwrap();
    for _ in 0..40 {
        world.let_time_pass();
    }
    let status = engine.device_change().unwrap();
    assert_eq!(status.state, DeviceChangeState::Running);
    assert_eq!(status.waits_for, Some(ChangeWait::Failure(Error::NoSpace)));
    // What was promised is there.
    let mut content = vec![0; 1 << 20];
    Rng::new(1).fill(&mut content);
    for at in (0..promised).step_by(1 << 20) {
        let part = &content[..(promised - at).min(1 << 20) as usize];
        volume.write(file, at, part, WriteFlags::default()).unwrap();
    }
    volume.sync().unwrap();
    // When there is room, it goes on.
    volume.unlink(volume.root(), b"promised").unwrap();
    volume.forget(file, 1);
    volume.sync().unwrap();
    for _ in 0..2000 {
        world.platform.clock.advance_ms(1000);
        world.let_time_pass();
        if world.state() == DeviceChangeState::Finished {
            break;
        }
    }
    let status = engine.device_change().unwrap();
    assert_eq!(status.state, DeviceChangeState::Finished, "{status:?}, {:?}", engine.room());
    let found = Tree::read(&**world.volume()).unwrap();
    assert_eq!(want.difference(&found), None);
    drop((engine, volume));
    world.rams.remove(1);
    world.judge("in the end");
}

#[test]
fn a_replacement_that_is_refused_gives_the_new_device_back() {
    for seed in seeds(4, 100) {
        let mut pool = Pool::on(2, Profile::Mirror, Profile::Mirror);
        pool.format.chunk_bytes = Some(1 << 20);
        let mut world = world(&pool, seed);
        world.tell(usize::MAX / 2);
        let (engine, volume) = (world.engine().clone(), world.volume().clone());
        let make =
            |name: &[u8]| volume.mknod(volume.root(), name, 0o100_644, 0, &ROOT).unwrap().ino;
        let (promised, written) = (make(b"promised"), make(b"written"));
        let mut content = vec![0; 6 << 20];
        Rng::new(seed).fill(&mut content);
        volume.write(written, 0, &content, WriteFlags::default()).unwrap();
        volume.sync().unwrap();
        let promise = engine.room().available / 4096 * 4096 - (4 << 20);
        let op = Fallocate::Allocate { keep_size: false };
        volume.fallocate(promised, op, 0, promise).unwrap();
        let devices = world.rams.len();
        // It has more room than the others, until what they have would be there as well.
        let new = world.new_ram(DEVICE_BYTES - (6 << 20));
        // There is something to write for the commits on the way.
        let more = &content[..3 << 20];
        volume.write(written, 6 << 20, more, WriteFlags::default()).unwrap();
        let refused = engine.replace_device(0, new).unwrap_err();
        assert_eq!(refused, Error::NoSpace, "seed {seed}");
        assert!(!engine.store.pool.has_device(devices as u16), "seed {seed}: it is in the pool");
        assert!(is_blank(&world.rams.pop().unwrap()), "seed {seed}: it has labels");
        volume.sync().unwrap();
        for file in [&b"promised"[..], b"written"] {
            volume.unlink(volume.root(), file).unwrap();
        }
        volume.forget(promised, 1);
        volume.forget(written, 1);
        drop((engine, volume));
        world.judge(&format!("seed {seed}"));
    }
}

#[test]
fn a_device_that_could_not_be_added_is_not_taken_for_one_of_the_pool_later() {
    let mut labelled = 0;
    for (devices, profile) in [(1, Profile::Single), (2, Profile::Mirror)] {
        for nth in 0..12 {
            let mut pool = Pool::on(devices, profile, profile);
            pool.format.chunk_bytes = Some(2 << 20);
            let mut world = world(&pool, 7);
            let bad = world.new_ram(DEVICE_BYTES);
            let stray = world.rams.pop().unwrap();
            stray.arm(Fault::from_nth(FaultKind::Gone, Access::Write, nth));
            if world.engine().add_device(bad).is_ok() {
                // One area is enough.
                continue;
            }
            // As it is when it is there again.
            let stray = RamDevice::of("stray", stray.image());
            let new = world.new_ram(DEVICE_BYTES);
            let index = world.engine().add_device(new).unwrap();
            assert_eq!(usize::from(index), devices, "write {nth}");
            let epoch = |ram: &RamDevice| fs_core::device::probe(ram, 0).unwrap().identity.epoch;
            if !is_blank(&stray) {
                labelled += 1;
                let epochs = (epoch(&stray), epoch(&world.rams[0]));
                assert!(epochs.0 < epochs.1, "write {nth}: {epochs:?}");
            }
            world.tell(10);
            if !is_blank(&stray) {
                world.close();
                world.rams.insert(0, stray);
                world.open().unwrap();
                assert_eq!(world.engine().store.pool.members().len(), devices + 1);
                world.rams.remove(0);
            }
            world.judge(&format!("write {nth}"));
        }
    }
    assert!(labelled > 0, "none had a label");
}

#[test]
fn a_change_that_waits_for_readers_says_so() {
    let mut pool = Pool::on(2, Profile::Single, Profile::Single);
    pool.format.chunk_bytes = Some(2 << 20);
    let mut world = world(&pool, 3);
    let engine = world.engine().clone();
    let reader = engine.store.space_view();
    engine.remove_device(1).unwrap();
    for _ in 0..100 {
        world.let_time_pass();
    }
    let status = engine.device_change().unwrap();
    assert_eq!(
        (status.state, status.waits_for),
        (DeviceChangeState::Running, Some(ChangeWait::Readers))
    );
    drop(reader);
    world.finish();
    assert_eq!(engine.device_change().unwrap().waits_for, None);
    drop(engine);
    world.rams.remove(1);
    world.judge("in the end");
}
