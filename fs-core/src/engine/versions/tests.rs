//! Requests about versions: how they are judged, what they leave when they fail, and deletions
//! that meet full or damaged pools. Stories with models are in the crate of tests.

use crate::btree::Edit;
use crate::check::{check, CheckOptions, Quiet};
use crate::engine::nodes::GroupSink;
use crate::engine::tests::{create, mount, new_pool, noise, read_all};
use crate::engine::versions::{PropertyChange, VersionOp};
use crate::engine::{open, Engine, OpenOptions};
use crate::error::{Errno, Error, Incident};
use crate::format::dead::{birth_and_part, DeadHeader, DeadRef, Part};
use crate::format::key::{kind, Key};
use crate::format::pool::{version, Settings, SubvolItem};
use crate::subvol::versions::{Version, Versions};
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, TreeId, Txg};
use crate::vfs::*;
use std::string::String;
use std::sync::Arc;
use std::vec;
use std::vec::Vec;

const HOME: u64 = TreeId::FIRST_SUBVOL.0;

fn snapshot(name: &str) -> VersionOp {
    VersionOp::Snapshot { subvolume: HOME, name: name.into() }
}

fn subvolume(name: &str) -> VersionOp {
    VersionOp::CreateSubvolume { name: name.into(), mode: 0o755, uid: 0, gid: 0 }
}

fn rename(id: u64, name: &str) -> VersionOp {
    VersionOp::Rename { id, name: name.into() }
}

fn engine(device: &Arc<RamDevice>, test: &TestPlatform) -> Arc<Engine> {
    open(vec![device.device()], test.platform.clone(), &OpenOptions::default()).unwrap()
}

fn volume(engine: &Arc<Engine>, id: u64) -> Arc<Volume> {
    Volume::of_version(engine.clone(), id, AccessTime::Never).unwrap()
}

fn one(engine: &Engine, op: VersionOp) -> u64 {
    engine.change_versions(vec![op]).unwrap()[0]
}

fn refused(engine: &Engine, ops: Vec<VersionOp>) -> Errno {
    let before: Vec<Version> =
        engine.with_versions(|all| all.iter().map(|(_, v)| v.clone()).collect());
    let default = engine.published().1.default_subvol;
    let error = engine.change_versions(ops).unwrap_err();
    let after: Vec<Version> =
        engine.with_versions(|all| all.iter().map(|(_, v)| v.clone()).collect());
    assert_eq!(before, after, "a request that was refused changed something");
    assert_eq!(engine.published().1.default_subvol, default);
    error.errno()
}

fn findings(device: &Arc<RamDevice>, test: &TestPlatform) -> Vec<String> {
    let options = CheckOptions::default();
    let report = check(vec![device.device()], test.platform.clone(), &options, &Quiet).unwrap();
    report.findings.iter().map(|finding| std::format!("{finding}")).collect()
}

fn is_sound(device: &Arc<RamDevice>, test: &TestPlatform) {
    assert_eq!(findings(device, test), Vec::<String>::new());
}

/// Writes noise to a file until there is no room for more.
fn fill(fs: &Volume, name: &[u8]) -> Ino {
    let file = create(fs, fs.root(), name);
    let mut at = 0;
    for bytes in [1 << 16, 1 << 12] {
        let data = noise(bytes, at + 1);
        while fs.write(file, at, &data, WriteFlags::default()).is_ok() {
            at += bytes as u64;
        }
    }
    file
}

#[test]
fn snapshots_of_one_group_show_one_state_and_can_be_deleted_in_any_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (device, test) = new_pool(64 << 20);
        let fs = mount(&device, &test);
        let file = create(&fs, fs.root(), b"file");
        fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
        let engine = fs.engine().clone();
        let asked =
            [engine.ask(vec![snapshot("a"), snapshot("b")]), engine.ask(vec![snapshot("c")])];
        let made: Vec<u64> =
            asked.into_iter().flat_map(|asked| engine.answer(asked.unwrap()).unwrap()).collect();
        let groups: Vec<u64> = engine
            .with_versions(|all| made.iter().map(|id| all.get(*id).unwrap().item.txg).collect());
        assert!(groups.iter().all(|txg| *txg == groups[0]), "they are of {groups:?}");
        fs.write(file, 0, &noise(1 << 19, 2), WriteFlags::default()).unwrap();
        fs.close().unwrap();
        drop((fs, engine));
        is_sound(&device, &test);

        let engine = self::engine(&device, &test);
        for id in &made {
            let fs = volume(&engine, *id);
            let file = fs.lookup(fs.root(), b"file").unwrap().ino;
            assert_eq!(read_all(&fs, file), noise(1 << 20, 1));
        }
        for index in order {
            one(&engine, VersionOp::Delete { id: made[index] });
            engine.destroy_all().unwrap();
            is_sound(&device, &test);
        }
        assert_eq!(engine.with_versions(|all| all.iter().count()), 1);
        engine.close().unwrap();
    }
}

#[test]
fn an_operation_is_judged_by_what_those_before_it_have_done() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let kept = one(&engine, snapshot("kept"));
    let work = one(&engine, subvolume("work"));
    let below = one(&engine, subvolume("work/below"));
    let hold = |snapshot| VersionOp::Hold { snapshot, tag: b"tag".to_vec() };
    let delete = |id| VersionOp::Delete { id };
    let cases: Vec<(Errno, Vec<VersionOp>)> = vec![
        (Errno::Busy, vec![VersionOp::SetDefault { subvolume: below }, delete(below)]),
        (Errno::Busy, vec![hold(kept), delete(kept)]),
        (Errno::NoEnt, vec![delete(kept), rename(kept, "other")]),
        (Errno::NoEnt, vec![delete(kept), delete(kept)]),
        (Errno::Exist, vec![hold(kept), hold(kept)]),
        (Errno::Exist, vec![snapshot("kept")]),
        (Errno::Exist, vec![snapshot("new"), snapshot("new")]),
        (Errno::Exist, vec![snapshot("new"), rename(kept, "new")]),
        (Errno::Exist, vec![subvolume("new"), rename(work, "new")]),
        // The name of a subvolume that goes with it.
        (Errno::Exist, vec![subvolume("new/below"), rename(work, "new")]),
        (Errno::Busy, vec![delete(work)]),
        (Errno::Busy, vec![delete(work), delete(below)]),
        // What a request makes has no id yet.
        (Errno::NoEnt, vec![snapshot("new"), delete(below + 1)]),
    ];
    for (errno, ops) in cases {
        assert_eq!(refused(&engine, ops.clone()), errno, "{ops:?}");
    }
    engine.change_versions(vec![delete(below), delete(work), subvolume("work")]).unwrap();
    engine.destroy_all().unwrap();
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn requests_of_one_group_are_judged_one_after_the_other() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let first = one(&engine, snapshot("first"));
    let asked = [
        vec![subvolume("same")],
        vec![subvolume("same")],
        vec![VersionOp::Delete { id: first }],
        vec![rename(first, "other")],
        vec![snapshot("first")],
    ]
    .map(|ops| engine.ask(ops).unwrap());
    let got = asked.map(|asked| engine.answer(asked).map_err(|error| error.errno()));
    let new = first + 1;
    assert_eq!(
        got,
        [Ok(vec![new]), Err(Errno::Exist), Ok(vec![0]), Err(Errno::NoEnt), Ok(vec![new + 1])]
    );
    engine.destroy_all().unwrap();
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn what_a_group_makes_cannot_be_used_unless_the_group_is_published() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let first = one(&engine, snapshot("first"));
    let ops = vec![
        subvolume("new"),
        VersionOp::Clone { snapshot: first, name: b"clone".to_vec() },
        snapshot("second"),
    ];
    let asked = engine.ask(ops).unwrap();
    device.faults(|faults| faults.fail_flush = true);
    assert_eq!(engine.answer(asked), Err(Error::Failed));
    device.faults(|faults| faults.fail_flush = false);
    for id in first + 1..first + 4 {
        let opened = engine.open_version(id).err();
        assert_eq!(opened, Some(Error::Posix(Errno::NoEnt)), "{id} can be used");
    }
    // What was there can still be read.
    volume(&engine, HOME);
    volume(&engine, first);
}

#[test]
fn what_was_deleted_or_rolled_back_is_never_used_again() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let first = one(&engine, VersionOp::Snapshot { subvolume: work, name: b"first".to_vec() });
    let before = engine.subvol(TreeId(work)).unwrap();
    one(&engine, VersionOp::Rollback { snapshot: first, keep: b"kept".to_vec() });
    assert_eq!(before.begin_use().err(), Some(Error::Posix(Errno::Busy)));
    let after = engine.subvol(TreeId(work)).unwrap();
    assert!(!Arc::ptr_eq(&before, &after));
    assert!(after.begin_use().is_ok());
    // Not deleted, because it has snapshots: it can be used.
    assert_eq!(refused(&engine, vec![VersionOp::Delete { id: work }]), Errno::Busy);
    assert!(after.begin_use().is_ok());
    let snapshots = engine.with_versions(|all| all.snapshots(work));
    let ids = snapshots.into_iter().chain([work]);
    engine.change_versions(ids.map(|id| VersionOp::Delete { id }).collect()).unwrap();
    assert_eq!(after.begin_use().err(), Some(Error::Posix(Errno::Busy)));
    assert!(engine.subvol(TreeId(work)).is_none());
}

#[test]
fn a_clone_needs_room_for_what_its_files_were_promised() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    let room = fs.statfs().unwrap().available_bytes;
    let promised = room / 3;
    fs.fallocate(file, Fallocate::Allocate { keep_size: false }, 0, promised).unwrap();
    let engine = fs.engine().clone();
    let first = one(&engine, snapshot("first"));
    let clone = |name: &str| VersionOp::Clone { snapshot: first, name: name.into() };
    let before = fs.statfs().unwrap().available_bytes;
    let id = one(&engine, clone("a"));
    let after = fs.statfs().unwrap().available_bytes;
    assert!(before - after >= promised, "{before} bytes available before, {after} after");
    assert_eq!(refused(&engine, vec![clone("b")]), Errno::NoSpc);
    // Both can be written in full, whatever fills the rest.
    fill(&fs, b"rest");
    for fs in [volume(&engine, id), fs.clone()] {
        let file = fs.lookup(fs.root(), b"file").unwrap().ino;
        let data = noise(1 << 16, 5);
        for at in (0..promised - (1 << 16)).step_by(1 << 16) {
            fs.write(file, at, &data, WriteFlags::default()).unwrap();
        }
    }
    engine.commit().unwrap();
}

#[test]
fn a_snapshot_is_deleted_on_a_full_pool_and_makes_room() {
    for (refs, shares) in [(8192, false), (8192, true), (5, true)] {
        let (device, test) = new_pool(32 << 20);
        let options = OpenOptions { deletion_refs: refs, ..OpenOptions::default() };
        let engine = open(vec![device.device()], test.platform.clone(), &options).unwrap();
        let fs = volume(&engine, HOME);
        let file = create(&fs, fs.root(), b"file");
        // Many extents of many births, some with further references.
        for round in 0..16u64 {
            for at in 0..60 {
                let at = (at * 16 + round) * 8192;
                fs.write(file, at, &noise(4096, at + 1), WriteFlags::default()).unwrap();
            }
            fs.sync().unwrap();
        }
        if shares {
            let other = create(&fs, fs.root(), b"other");
            let size = fs.getattr(file).unwrap().size;
            for at in (0..size).step_by(3 * 8192) {
                let len = 8192.min(size - at);
                fs.copy_range(file, at, other, at, len).unwrap();
            }
        }
        let first = one(&engine, snapshot("first"));
        let second = one(&engine, snapshot("second"));
        fs.unlink(fs.root(), b"file").unwrap();
        fs.forget(file, 1);
        fs.sync().unwrap();
        let rest = fill(&fs, b"rest");
        fs.sync().unwrap();
        for id in [second, first] {
            one(&engine, VersionOp::Delete { id });
        }
        engine.destroy_all().unwrap();
        assert_eq!(engine.with_versions(|all| all.iter().count()), 1);
        engine.store.writable().unwrap();
        let size = fs.getattr(rest).unwrap().size;
        for at in (0..2 << 20).step_by(4096) {
            fs.write(rest, size + at, &noise(4096, at + 9), WriteFlags::default()).unwrap();
        }
        engine.close().unwrap();
        is_sound(&device, &test);
    }
}

#[test]
fn what_a_snapshot_has_is_cut_off_on_a_full_pool_or_refused_but_never_fails_the_commit() {
    let (device, test) = new_pool(32 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"file");
    for round in 0..24u64 {
        for at in 0..80 {
            let at = (at * 24 + round) * 8192;
            fs.write(file, at, &noise(4096, at + 1), WriteFlags::default()).unwrap();
        }
        fs.sync().unwrap();
    }
    one(fs.engine(), snapshot("first"));
    fill(&fs, b"rest");
    fs.sync().unwrap();
    let set = SetAttr { size: Some(0), ..SetAttr::default() };
    if let Err(error) = fs.setattr(file, &set, &crate::engine::tests::ROOT) {
        assert_eq!(error.errno(), Errno::NoSpc);
    }
    fs.sync().unwrap();
    fs.engine().store.writable().unwrap();
    fs.close().unwrap();
    drop(fs);
    is_sound(&device, &test);
}

/// Makes every copy of a node unreadable.
fn spoil(engine: &Engine, device: &Arc<RamDevice>, item: &SubvolItem) {
    let root = item.root(engine.store.groups.published()).unwrap().unwrap();
    for copy in engine.store.pool.map(root.addr, root.allocated()).unwrap() {
        device.flip(copy[0].1 .0 + 100);
    }
    engine.drop_caches();
}

#[test]
fn damage_of_what_is_deleted_ends_its_deletion_and_nothing_else() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let fs = volume(&engine, HOME);
    let file = create(&fs, fs.root(), b"file");
    fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    let first = one(&engine, snapshot("first"));
    let [bad, good] = ["bad", "good"].map(|name| {
        let id = one(&engine, VersionOp::Clone { snapshot: first, name: name.into() });
        let fs = volume(&engine, id);
        let file = fs.lookup(fs.root(), b"file").unwrap().ino;
        fs.write(file, 0, &noise(1 << 19, 2), WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        id
    });
    let item = engine.with_versions(|all| all.get(bad).unwrap().item);
    spoil(&engine, &device, &item);
    engine.change_versions(vec![VersionOp::Delete { id: bad }]).unwrap();
    one(&engine, VersionOp::Delete { id: good });
    test.incidents.take();
    for mounts in 0..2 {
        let engine = match mounts {
            0 => engine.clone(),
            _ => self::engine(&device, &test),
        };
        engine.destroy_all().unwrap();
        let fs = volume(&engine, HOME);
        let file = fs.lookup(fs.root(), b"file").unwrap().ino;
        fs.write(file, 0, &noise(1 << 16, 3), WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        assert_eq!(engine.stopped_deletions(), [bad]);
        let left = engine.with_versions(|all| all.iter().map(|(id, _)| id).collect::<Vec<_>>());
        assert_eq!(left, [HOME, first, bad]);
        let count = |incident: &Incident| match incident {
            Incident::DeletionStopped { tree, .. } => usize::from(tree.0 == bad),
            _ => 0,
        };
        assert_eq!(test.incidents.take().iter().map(count).sum::<usize>(), 1);
        drop(fs);
        engine.close().unwrap();
    }
}

#[test]
fn a_crafted_deletion_that_cannot_end_is_left_alone() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let first = one(&engine, snapshot("first"));
    one(&engine, VersionOp::Clone { snapshot: first, name: b"clone".to_vec() });
    one(&engine, VersionOp::Delete { id: first });
    {
        let mut versions = engine.versions.write();
        versions.change(first, |item| item.flags |= version::STARTED).unwrap();
    }
    engine.destroy_all().unwrap();
    let txg = engine.store.groups.open();
    engine.tick();
    engine.tick();
    assert!(engine.store.groups.open().0 <= txg.0 + 1, "it commits for nothing");
}

#[test]
fn files_are_shown_with_the_version_that_they_are_in() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let home = one(&engine, subvolume("home"));
    let alice = one(&engine, subvolume("home/alice"));
    let root = TreeId::FIRST_SUBVOL.0;
    let monday = one(&engine, VersionOp::Snapshot { subvolume: alice, name: b"monday".to_vec() });
    let now = one(&engine, VersionOp::Snapshot { subvolume: root, name: b"now".to_vec() });
    let shown = |id| {
        engine.with_versions(|all| {
            let texts = [all.shown(id), all.shown_file(id, b"/docs/a"), all.shown_file(id, b"/")];
            texts.map(|text| String::from_utf8(text).unwrap())
        })
    };
    assert_eq!(shown(root), ["/", "/docs/a", "/"]);
    assert_eq!(shown(home), ["home", "home/docs/a", "home/"]);
    assert_eq!(shown(alice)[1], "home/alice/docs/a");
    assert_eq!(
        shown(monday),
        ["home/alice@monday", "home/alice@monday: docs/a", "home/alice@monday: "]
    );
    assert_eq!(shown(now)[1], "@now: docs/a");
    assert_eq!(shown(999)[1], "(deleted 999): docs/a");
}

#[test]
fn versions_that_cannot_be_are_refused() {
    let mut item = SubvolItem::zeroed();
    item.next_ino = 2;
    let mut snapshot = item;
    (snapshot.flags, snapshot.owner, snapshot.txg) = (version::SNAPSHOT, HOME, 9);
    snapshot.lineage = HOME;
    let mut head = item;
    (head.parent, head.snapshot_txg, head.dead_list) = (300, 9, 300);
    snapshot.dead_list = HOME;
    type Craft = fn(&mut SubvolItem, &mut SubvolItem);
    let crafts: [(bool, Craft); 6] = [
        (true, |_, _| {}),
        (false, |head, _| head.dead_list = HOME),
        (false, |head, _| head.parent = 301),
        (false, |head, _| head.snapshot_txg = 8),
        (false, |head, _| head.lineage = 5),
        (false, |_, snapshot| (snapshot.parent, snapshot.snapshot_txg) = (300, 9)),
    ];
    for (index, (is_sound, craft)) in crafts.into_iter().enumerate() {
        let (mut head, mut snapshot) = (head, snapshot);
        craft(&mut head, &mut snapshot);
        let mut versions = Versions::default();
        for (id, item) in [(HOME, head), (300, snapshot)] {
            versions.load(Key::new(id, kind::SUBVOL, 0), &item.to_bytes()).unwrap();
        }
        assert_eq!(versions.check(301).is_ok(), is_sound, "{index}");
        assert!(versions.check(300).is_err(), "the next id is taken");
    }
    let mut versions = Versions::default();
    for id in [HOME, 300] {
        versions.load(Key::new(id, kind::SUBVOL, 0), &item.to_bytes()).unwrap();
    }
    versions.load(Key::new(HOME, kind::NAME, 0), b"same").unwrap();
    assert!(versions.load(Key::new(300, kind::NAME, 0), b"same").is_err());
}

#[test]
fn a_deletion_waits_for_who_works_in_the_subvolume_for_a_moment() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let at_work = engine.subvol(TreeId(work)).unwrap().begin_work().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let deleting = engine.clone();
        scope.spawn(move || {
            let done = deleting.change_versions(vec![VersionOp::Delete { id: work }]);
            sender.send(done).unwrap();
        });
        let wait = std::time::Duration::from_millis(50);
        assert!(receiver.recv_timeout(wait).is_err(), "it did not wait");
        drop(at_work);
        assert_eq!(receiver.recv().unwrap(), Ok(vec![0]));
    });
    assert!(engine.subvol(TreeId(work)).is_none());
}

#[test]
fn what_is_dropped_after_a_snapshot_was_asked_for_has_room_in_the_dead_list() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let home = engine.subvol(TreeId(HOME)).unwrap();
    assert_eq!(home.dead_room(100), 0);
    let asked = engine.ask(vec![snapshot("first")]).unwrap();
    assert!(home.dead_room(100) > 0, "before the snapshot is there");
    // A group that was closed before says otherwise.
    home.set_item_fields(home.item());
    assert!(home.dead_room(100) > 0);
    engine.answer(asked).unwrap();
    assert!(home.dead_room(100) > 0);
    // One that comes to nothing leaves nothing.
    let work = one(&engine, subvolume("work"));
    let ops = vec![VersionOp::Snapshot { subvolume: work, name: b"a".to_vec() }, subvolume("work")];
    assert_eq!(refused(&engine, ops), Errno::Exist);
    assert_eq!(engine.subvol(TreeId(work)).unwrap().dead_room(100), 0);
}

#[test]
fn a_rollback_needs_room_for_what_is_promised_beyond_what_is_promised_when_it_is_done() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let fs = volume(&engine, work);
    let file = create(&fs, fs.root(), b"file");
    let promised = fs.statfs().unwrap().available_bytes / 3 * 2;
    let op = Fallocate::Allocate { keep_size: false };
    fs.fallocate(file, op, 0, promised).unwrap();
    let first = one(&engine, VersionOp::Snapshot { subvolume: work, name: b"first".to_vec() });
    fs.fallocate(file, Fallocate::PunchHole, 0, promised).unwrap();
    fs.sync().unwrap();
    // Promised again, in a group that is not published when the rollback is asked for.
    fs.fallocate(file, op, 0, promised).unwrap();
    drop(fs);
    one(&engine, VersionOp::Rollback { snapshot: first, keep: b"kept".to_vec() });
    let fs = volume(&engine, work);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    fill(&volume(&engine, HOME), b"rest");
    let data = noise(1 << 16, 5);
    for at in (0..promised - (1 << 16)).step_by(1 << 16) {
        fs.write(file, at, &data, WriteFlags::default()).unwrap();
    }
    engine.commit().unwrap();
}

#[test]
fn a_subvolume_with_many_bookmarks_is_deleted_or_refused_but_never_fails_the_commit() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let name = |index: u64| std::format!("{index:0>200}").into_bytes();
    let owners: Vec<u64> = ["work", "other"].map(|name| one(&engine, subvolume(name))).to_vec();
    let snapshots: Vec<u64> = owners
        .iter()
        .map(|id| one(&engine, VersionOp::Snapshot { subvolume: *id, name: b"s".to_vec() }))
        .collect();
    // Bookmarks of both in turn, so that none of the nodes goes as a whole.
    for first in (0..4000).step_by(50) {
        let mark = |index: u64| VersionOp::Bookmark {
            snapshot: snapshots[index as usize % 2],
            name: name(index / 2),
        };
        engine.change_versions((first..first + 50).map(mark).collect()).unwrap();
    }
    engine.change_versions(vec![VersionOp::Delete { id: snapshots[0] }]).unwrap();
    engine.destroy_all().unwrap();
    fill(&volume(&engine, HOME), b"rest");
    let before = engine.published().0.pool;
    let asked = engine.ask(vec![VersionOp::Delete { id: owners[0] }]);
    if let Ok(asked) = asked {
        let room: u64 = {
            let txg = engine.store.groups.open();
            let all = engine.store.take_reserved(txg);
            let room = all.iter().map(|one| one.metadata()).sum();
            all.into_iter().for_each(|one| engine.store.keep(txg, one));
            room
        };
        let leaves = before.shape(&*engine.store).unwrap().leaves;
        let least = leaves / 2 * engine.store.node_bytes as u64;
        assert!(room >= least, "{room} bytes for {leaves} leaves, of each of which half goes");
        engine.answer(asked).unwrap();
    }
    engine.commit().unwrap();
    engine.store.writable().unwrap();
    engine.close().unwrap();
    is_sound(&device, &test);
}

/// A clone of much that is its own, deleted.
fn deleted_clone(engine: &Arc<Engine>, make: impl FnOnce(&Volume)) -> u64 {
    let first = one(engine, snapshot("first"));
    let clone = one(engine, VersionOp::Clone { snapshot: first, name: b"clone".to_vec() });
    let fs = volume(engine, clone);
    make(&fs);
    fs.sync().unwrap();
    drop(fs);
    one(engine, VersionOp::Delete { id: clone });
    clone
}

#[test]
fn only_commits_in_the_background_take_deletions_along() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let clone = deleted_clone(&engine, |fs| {
        let file = create(fs, fs.root(), b"file");
        fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    });
    let fs = volume(&engine, HOME);
    let is_there = || engine.with_versions(|all| all.get(clone).is_some());
    for index in 0..8u8 {
        let file = create(&fs, fs.root(), &[b'a' + index]);
        fs.fsync(file, false).unwrap();
        fs.sync().unwrap();
        assert!(is_there(), "commit {index}, which somebody waited for");
        assert_eq!(engine.given_up_bytes(), 0);
    }
    (0..8).for_each(|_| engine.tick());
    assert!(!is_there(), "it is never done");
}

#[test]
fn a_group_takes_so_much_of_a_deletion_along_as_there_are_items_to_look_at() {
    let (device, test) = new_pool(64 << 20);
    let options = OpenOptions { deletion_refs: 64, ..OpenOptions::default() };
    let engine = open(vec![device.device()], test.platform.clone(), &options).unwrap();
    let extents = 20;
    deleted_clone(&engine, |fs| {
        // Every second sector of each extent has a further reference.
        let file = create(fs, fs.root(), b"file");
        let other = create(fs, fs.root(), b"other");
        for index in 0..extents {
            fs.write(file, index << 20, &noise(1 << 20, index + 1), WriteFlags::default()).unwrap();
        }
        fs.sync().unwrap();
        for at in (0..extents << 20).step_by(8192) {
            fs.copy_range(file, at, other, at, 4096).unwrap();
        }
    });
    let before = engine.store.groups.published().0;
    engine.destroy_all().unwrap();
    let groups = engine.store.groups.published().0 - before;
    // As many as there are sectors to give up, and one for each extent, in 128 items.
    assert!(groups >= extents * 128 / 64 + extents - 5, "{groups} groups");
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn a_birth_that_a_dead_list_has_wrong_is_found() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let fs = volume(&engine, HOME);
    let file = create(&fs, fs.root(), b"file");
    for _ in 0..4 {
        engine.want_commit();
        engine.commit().unwrap();
    }
    fs.write(file, 0, &noise(1 << 20, 1), WriteFlags::default()).unwrap();
    one(&engine, snapshot("first"));
    fs.write(file, 0, &noise(1 << 20, 2), WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    {
        // The entries of data of one birth, under another.
        let mut committer = engine.committer();
        let dead = committer.roots.dead;
        let mut cursor = dead.cursor();
        cursor.seek(&*engine.store, &Key::MIN).unwrap();
        let mut found = None;
        while let Some((key, value)) = cursor.next(&*engine.store).unwrap() {
            let part = Part::decode(key, &value).unwrap();
            if part.refs.iter().any(|entry| !entry.is_node) {
                found = Some((key, part));
            }
        }
        let (old, part) = found.unwrap();
        let (birth, number) = birth_and_part(old);
        let new = crate::format::dead::key(old.object, Txg(birth.0 - 1), number).unwrap();
        assert!(dead.lookup(&*engine.store, &new).unwrap().is_none(), "births are neighbours");
        let (nodes, data) = part.refs.into_iter().partition(|entry| entry.is_node);
        let edit = |refs: Vec<DeadRef>| match refs.len() as u64 {
            0 => Edit::Delete,
            entries => {
                let bytes = crate::engine::dead::bytes(&refs);
                let header = DeadHeader { entries, bytes, last_part: 0, reserved: 0 };
                Edit::Put(Part { header: Some(header), refs }.encode())
            }
        };
        let edits = [(new, edit(data)), (old, edit(nodes))];
        let sink = GroupSink::new(&engine.store, engine.store.groups.open());
        committer.roots.dead = dead.apply(&sink, &edits).unwrap();
        for (run, _) in sink.take_freed() {
            engine.store.space.free(run, engine.store.groups.open());
        }
    }
    drop(fs);
    engine.want_commit();
    engine.close().unwrap();
    let findings = findings(&device, &test);
    assert!(!findings.is_empty(), "it is not found");
    assert!(findings.iter().all(|found| found.contains("births")), "{findings:?}");
}

fn limits(id: u64, referenced: u64, own: u64) -> VersionOp {
    VersionOp::SetLimits { subvolume: id, referenced, own }
}

/// Appends noise to a file until it is refused; returns why.
fn append(fs: &Volume, file: Ino, bytes: u64) -> Result<()> {
    let size = fs.getattr(file).unwrap().size;
    for at in (size..size + bytes).step_by(1 << 15) {
        fs.write(file, at, &noise(1 << 15, at + 1), WriteFlags::default())?;
    }
    Ok(())
}

#[test]
fn a_subvolume_takes_what_its_limits_let_it_and_no_more() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let fs = volume(&engine, work);
    let file = create(&fs, fs.root(), b"file");
    append(&fs, file, 1 << 20).unwrap();
    fs.sync().unwrap();
    let limit = 4 << 20;
    one(&engine, limits(work, limit, 0));
    let used = || engine.with_versions(|all| all.get(work).unwrap().item.referenced_bytes());
    let shown = fs.statfs().unwrap();
    assert_eq!((shown.total_bytes, shown.available_bytes), (limit, limit - used()));
    assert_eq!(append(&fs, file, 8 << 20).map_err(|error| error.errno()), Err(Errno::DQuot));
    fs.sync().unwrap();
    // Nothing is refused that fits, and nodes are all that goes beyond.
    assert!(used() >= limit - (1 << 15) && used() <= limit + (1 << 18), "{} bytes", used());
    let other = fs.mknod(fs.root(), b"other", 0o100644, 0, &crate::engine::tests::ROOT);
    if let Ok(other) = other {
        let shared = fs.copy_range(file, 0, other.ino, 0, 1 << 20);
        assert_eq!(shared.map_err(|error| error.errno()), Err(Errno::DQuot));
    }
    // Others have no such limit, and what makes room is never refused.
    let home = volume(&engine, HOME);
    let elsewhere = create(&home, home.root(), b"file");
    append(&home, elsewhere, 8 << 20).unwrap();
    let set = SetAttr { size: Some(1 << 20), ..SetAttr::default() };
    fs.setattr(file, &set, &crate::engine::tests::ROOT).unwrap();
    append(&fs, file, 2 << 20).unwrap();
    fs.close().unwrap();
    drop((fs, home, engine));
    is_sound(&device, &test);

    // It lasts until it is taken away.
    let engine = self::engine(&device, &test);
    let fs = volume(&engine, work);
    let file = fs.lookup(fs.root(), b"file").unwrap().ino;
    assert_eq!(append(&fs, file, 4 << 20).map_err(|error| error.errno()), Err(Errno::DQuot));
    one(&engine, limits(work, 0, 0));
    append(&fs, file, 8 << 20).unwrap();
    engine.close().unwrap();
}

#[test]
fn a_limit_of_what_is_its_own_begins_anew_with_a_snapshot_but_holds_for_what_is_changed() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let fs = volume(&engine, HOME);
    let file = create(&fs, fs.root(), b"file");
    one(&engine, limits(HOME, 0, 2 << 20));
    append(&fs, file, 3 << 19).unwrap();
    assert_eq!(append(&fs, file, 1 << 20).map_err(|error| error.errno()), Err(Errno::DQuot));
    let first = one(&engine, snapshot("first"));
    let has_limits = |id| engine.with_versions(|all| all.get(id).unwrap().item.has_limits());
    assert!(has_limits(HOME) && !has_limits(first));
    append(&fs, file, 1 << 20).unwrap();
    // Changing what the snapshot has takes room of its own.
    let overwrite = |at| fs.write(file, at, &noise(1 << 15, 3), WriteFlags::default());
    let changed = (0..2 << 20).step_by(1 << 15).try_for_each(|at| overwrite(at).map(|_| ()));
    assert_eq!(changed.map_err(|error| error.errno()), Err(Errno::DQuot));
    // A clone has none, and what is rolled back keeps them.
    let ops = vec![VersionOp::Clone { snapshot: first, name: b"clone".to_vec() }];
    let clone = engine.change_versions(ops).unwrap()[0];
    assert!(!has_limits(clone));
    drop(fs);
    one(&engine, VersionOp::Rollback { snapshot: first, keep: b"kept".to_vec() });
    assert!(has_limits(HOME));
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn whatever_is_done_limits_hold_at_every_commit() {
    for seed in 0..4u64 {
        let (device, test) = new_pool(64 << 20);
        let engine = engine(&device, &test);
        let work = one(&engine, subvolume("work"));
        let fs = volume(&engine, work);
        let files: Vec<Ino> = (0..4u8).map(|i| create(&fs, fs.root(), &[b'a' + i])).collect();
        let (referenced, own) = (6 << 20, 3 << 20);
        one(&engine, limits(work, referenced, own));
        let random = noise(4000, seed + 77);
        for (step, draw) in random.chunks_exact(4).enumerate() {
            let file = files[usize::from(draw[0]) % 4];
            let at = u64::from(draw[1]) << 14;
            let done = match draw[2] % 16 {
                0 => fs.sync(),
                1 => {
                    let set = SetAttr { size: Some(at), ..SetAttr::default() };
                    fs.setattr(file, &set, &crate::engine::tests::ROOT).map(|_| ())
                }
                2 => fs.fallocate(file, Fallocate::PunchHole, at, 1 << 18),
                3 => {
                    let other = files[usize::from(draw[3]) % 4];
                    let copy = |len| fs.copy_range(file, at, other, at, len);
                    if file == other {
                        Ok(())
                    } else {
                        copy(1 << 18).map(|_| ())
                    }
                }
                4 if step % 3 == 0 => {
                    let name = std::format!("{step}").into_bytes();
                    one(&engine, VersionOp::Snapshot { subvolume: work, name });
                    Ok(())
                }
                _ => {
                    let data = noise(usize::from(draw[3]) << 10 | 1, step as u64 + 1);
                    fs.write(file, at, &data, WriteFlags::default()).map(|_| ())
                }
            };
            if let Err(error) = done {
                assert!(matches!(error.errno(), Errno::DQuot | Errno::NoSpc), "{error}");
            }
            let item = engine.with_versions(|all| all.get(work).unwrap().item);
            // Nodes of a group may go beyond.
            let slack = 64 * engine.store.node_bytes as u64;
            assert!(item.referenced_bytes() <= referenced + slack, "seed {seed}, step {step}");
            assert!(item.own_bytes <= own + slack, "seed {seed}, step {step}: {}", item.own_bytes);
        }
        fs.close().unwrap();
        drop((fs, engine));
        is_sound(&device, &test);
    }
}

fn set(id: u64, changes: Vec<PropertyChange>) -> VersionOp {
    VersionOp::SetProperties { id, changes }
}

fn user(name: &str, value: Option<&str>) -> PropertyChange {
    PropertyChange::User(name.into(), value.map(|value| value.into()))
}

/// What the settings of every subvolume come to, by name.
fn settings(engine: &Arc<Engine>, name: &str) -> Settings {
    let id = engine.with_versions(|all| all.subvolume(name.as_bytes())).unwrap();
    let told = engine.subvol(TreeId(id)).unwrap().settings();
    assert_eq!(told, engine.with_versions(|all| all.settings(id)), "{name} was not told");
    told
}

#[test]
fn what_a_subvolume_does_not_choose_it_takes_from_the_next_above_that_does() {
    let (device, test) = new_pool(64 << 20);
    let engine_ = engine(&device, &test);
    one(&engine_, subvolume("a"));
    let b = one(&engine_, subvolume("a/b"));
    one(&engine_, subvolume("a/b/c"));
    one(&engine_, subvolume("other"));
    assert_eq!(settings(&engine_, "a/b/c"), Settings::default());
    one(&engine_, set(HOME, vec![PropertyChange::Compression(2, 5), PropertyChange::Checksum(3)]));
    one(&engine_, set(b, vec![PropertyChange::Compression(1, 0), PropertyChange::AccessTime(1)]));
    let top = Settings { compression: 2, level: 5, checksum: 3, ..Settings::default() };
    let below = Settings { compression: 1, checksum: 3, access_time: 1, ..Settings::default() };
    let look = |engine: &Arc<Engine>| {
        assert_eq!(settings(engine, ""), top);
        assert_eq!(settings(engine, "a"), top);
        assert_eq!(settings(engine, "other"), top);
        assert_eq!(settings(engine, "a/b"), below);
        assert_eq!(settings(engine, "a/b/c"), below);
    };
    look(&engine_);
    engine_.close().unwrap();
    let engine = engine(&device, &test);
    look(&engine);
    // A subvolume that moves takes what is above it there.
    let c = engine.with_versions(|all| all.subvolume(b"a/b/c")).unwrap();
    one(&engine, rename(c, "other/c"));
    assert_eq!(settings(&engine, "other/c"), top);
    one(&engine, set(HOME, vec![PropertyChange::Compression(0, 0), PropertyChange::Checksum(0)]));
    assert_eq!(settings(&engine, "other/c"), Settings::default());
    assert_eq!(settings(&engine, "a/b"), Settings { checksum: 0, ..below });
    // And one that comes to be above it, between it and what was.
    let b_then = one(&engine, VersionOp::Snapshot { subvolume: b, name: "s".into() });
    one(&engine, subvolume("other/d/e"));
    one(&engine, VersionOp::Clone { snapshot: b_then, name: "other/d".into() });
    assert_eq!(settings(&engine, "other/d/e"), Settings { checksum: 0, ..below });
    assert_eq!(settings(&engine, "other/c"), Settings::default());
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn a_subvolume_that_is_read_only_refuses_changes_at_once_and_takes_them_again() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let inner = one(&engine, subvolume("work/inner"));
    let (volume_, below) = (volume(&engine, work), volume(&engine, inner));
    let (kept, gone) =
        (create(&volume_, volume_.root(), b"kept"), create(&volume_, volume_.root(), b"gone"));
    volume_.write(kept, 0, b"before", WriteFlags::default()).unwrap();
    // Without a name, and in use until later.
    volume_.unlink(volume_.root(), b"gone").unwrap();
    one(&engine, set(work, vec![PropertyChange::ReadOnly(2)]));
    let is_refused = |outcome: Result<(), Error>| {
        assert_eq!(outcome.unwrap_err().errno(), Errno::RoFs);
    };
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    is_refused(volume_.write(kept, 0, b"after!", WriteFlags::default()).map(drop));
    is_refused(volume_.mkdir(volume_.root(), b"dir", 0o755, &caller).map(drop));
    is_refused(volume_.unlink(volume_.root(), b"kept"));
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    is_refused(volume_.setattr(kept, &mode, &caller).map(drop));
    is_refused(volume_.setxattr(kept, b"user.a", b"b", XattrMode::Either));
    is_refused(volume_.fallocate(kept, Fallocate::Allocate { keep_size: true }, 0, 4096));
    is_refused(below.mkdir(below.root(), b"dir", 0o755, &caller).map(drop));
    assert_eq!(read_all(&volume_, kept), b"before");
    // What was agreed to before is done all the same.
    let before = volume_.statfs().unwrap().inodes;
    volume_.forget(gone, 1);
    engine.commit().unwrap();
    assert_eq!(volume_.statfs().unwrap().inodes, before - 1);
    // One below may choose otherwise; and a snapshot and a clone are still made.
    one(&engine, set(inner, vec![PropertyChange::ReadOnly(1)]));
    below.mkdir(below.root(), b"dir", 0o755, &caller).unwrap();
    let kept_state = one(&engine, VersionOp::Snapshot { subvolume: work, name: "s".into() });
    let clone = one(&engine, VersionOp::Clone { snapshot: kept_state, name: "clone".into() });
    let clone = volume(&engine, clone);
    clone.mkdir(clone.root(), b"dir", 0o755, &caller).unwrap();
    one(&engine, set(work, vec![PropertyChange::ReadOnly(0)]));
    volume_.write(kept, 0, b"after!", WriteFlags::default()).unwrap();
    drop((volume_, below, clone));
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn properties_of_users_are_kept_by_snapshots_and_clones_and_left_alone_by_a_rollback() {
    let (device, test) = new_pool(64 << 20);
    let engine_ = engine(&device, &test);
    one(&engine_, set(HOME, vec![user("org:kind", Some("mail")), user("a:empty", Some(""))]));
    let first = one(&engine_, snapshot("first"));
    one(&engine_, set(HOME, vec![user("org:kind", Some("news")), user("a:empty", None)]));
    one(&engine_, set(first, vec![user("org:note", Some("kept \u{e9}"))]));
    let clone = one(&engine_, VersionOp::Clone { snapshot: first, name: "clone".into() });
    let of = |engine: &Arc<Engine>, id: u64| {
        let all = engine.with_versions(|all| all.get(id).unwrap().user.clone());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        all.into_iter().map(|(n, v)| text(n) + "=" + &text(v)).collect::<Vec<_>>()
    };
    let rollback = VersionOp::Rollback { snapshot: first, keep: "old".into() };
    one(&engine_, set(HOME, vec![PropertyChange::Compression(1, 0)]));
    let old = one(&engine_, rollback);
    let look = |engine: &Arc<Engine>| {
        let then = ["a:empty=", "org:kind=mail", "org:note=kept \u{e9}"];
        assert_eq!(of(engine, HOME), ["org:kind=news"]);
        assert_eq!(of(engine, first), then);
        assert_eq!(of(engine, clone), then);
        assert_eq!(of(engine, old), ["org:kind=news"]);
        assert_eq!(settings(engine, "").compression, 1);
    };
    look(&engine_);
    engine_.close().unwrap();
    let engine = engine(&device, &test);
    look(&engine);
    // What is refused changes nothing, and the others of its request come to nothing too.
    let argument = |ops: Vec<VersionOp>| {
        assert_eq!(refused(&engine, ops), Errno::Inval);
    };
    argument(vec![set(HOME, vec![user("b:c", Some("d")), user("NoSmall:x", Some("y"))])]);
    argument(vec![set(HOME, vec![user("nocolon", Some("y"))])]);
    argument(vec![set(HOME, vec![user("a:b", Some("line\nbreak"))])]);
    argument(vec![set(HOME, vec![user("a:b", Some(&"x".repeat(4097)))])]);
    argument(vec![set(
        HOME,
        vec![user("a:b", Some(&"x".repeat(4000))), user("a:c", Some(&"y".repeat(90)))],
    )]);
    argument(vec![set(first, vec![PropertyChange::ReadOnly(1)])]);
    assert_eq!(refused(&engine, vec![set(9999, vec![user("a:b", Some("c"))])]), Errno::NoEnt);
    // The most there may be fits.
    one(&engine, set(HOME, vec![user("a:b", Some(&"x".repeat(4000)))]));
    one(&engine, VersionOp::Delete { id: first });
    engine.destroy_all().unwrap();
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn new_data_is_stored_as_the_subvolume_says_and_the_file_before_it() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let work = one(&engine, subvolume("work"));
    let volume = volume(&engine, work);
    let stored = || engine.subvol(TreeId(work)).unwrap().item().stored_bytes;
    let zeros_and_ones = vec![b'1'; 1 << 20];
    let write = |name: &str, own: Option<&[u8]>| {
        let before = stored();
        let ino = create(&volume, volume.root(), name.as_bytes());
        if let Some(value) = own {
            volume.setxattr(ino, b"cairn.compression", value, XattrMode::Either).unwrap();
        }
        volume.write(ino, 0, &zeros_and_ones, WriteFlags::default()).unwrap();
        engine.commit().unwrap();
        stored() - before
    };
    one(&engine, set(HOME, vec![PropertyChange::Compression(1, 0)]));
    assert!(write("plain", None) >= 1 << 20);
    assert!(write("own", Some(b"zstd")) < 1 << 17);
    one(&engine, set(work, vec![PropertyChange::Compression(2, 3)]));
    assert!(write("packed", None) < 1 << 17);
    assert!(write("not", Some(b"none")) >= 1 << 20);
    drop(volume);
    engine.close().unwrap();
    is_sound(&device, &test);
}

#[test]
fn the_mount_is_asked_first_when_access_times_change_and_the_subvolume_after_it() {
    let (device, test) = new_pool(64 << 20);
    let engine = engine(&device, &test);
    let of = |access_time| Volume::of_version(engine.clone(), HOME, access_time).unwrap();
    let now = |volume: &Volume| volume.access_time();
    for (number, usual) in [
        (0, AccessTime::Relative),
        (1, AccessTime::Never),
        (2, AccessTime::Relative),
        (3, AccessTime::Strict),
    ] {
        one(&engine, set(HOME, vec![PropertyChange::AccessTime(number)]));
        assert_eq!(now(&of(AccessTime::Relative)), usual);
        assert_eq!(now(&of(AccessTime::Never)), AccessTime::Never);
        assert_eq!(now(&of(AccessTime::Strict)), AccessTime::Strict);
    }
    engine.close().unwrap();
}
