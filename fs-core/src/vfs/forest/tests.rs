//! Mounts over several versions.

use super::*;
use crate::engine::versions::VersionOp;
use crate::engine::{format, FormatOptions, OpenOptions};
use crate::testing::{RamDevice, TestPlatform};
use std::string::String;
use std::vec;

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const TOP: Ino = Ino(ROOT_INO);
const NONE: RenameFlags = RenameFlags { no_replace: false, exchange: false, whiteout: false };
const HOME: u64 = TreeId::FIRST_SUBVOL.0;

fn forest() -> (Arc<Forest>, TestPlatform) {
    let (device, test) = (RamDevice::new(64 << 20), TestPlatform::new(7));
    format(vec![device.device()], test.platform.clone(), &FormatOptions::default()).unwrap();
    let (options, times) = (OpenOptions::default(), AccessTime::Relative);
    let volume = Volume::open(vec![device.device()], test.platform.clone(), &options, times);
    (Forest::new(volume.unwrap()), test)
}

/// Content that differs from directory to directory.
fn content(dir: Ino) -> Vec<u8> {
    (0..5000u64).map(|at| (at ^ dir.0 ^ dir.0 >> 48) as u8).collect()
}

fn change(forest: &Forest, op: VersionOp) -> u64 {
    forest.engine().change_versions(vec![op]).unwrap()[0]
}

fn subvolume(forest: &Forest, name: &str) -> u64 {
    let name = name.as_bytes().to_vec();
    change(forest, VersionOp::CreateSubvolume { name, mode: 0o755, uid: 0, gid: 0 })
}

fn snapshot(forest: &Forest, subvolume: u64, name: &str) -> u64 {
    change(forest, VersionOp::Snapshot { subvolume, name: name.into() })
}

/// Follows a path.
fn walk(forest: &Forest, path: &str) -> Result<Ino> {
    path.split('/').try_fold(TOP, |dir, name| Ok(forest.lookup(dir, name.as_bytes())?.ino))
}

fn write(forest: &Forest, dir: Ino, name: &str, data: &[u8]) -> Ino {
    let made = forest.mknod(dir, name.as_bytes(), mode::REGULAR | 0o644, 0, &ROOT).unwrap();
    forest.write(made.ino, 0, data, WriteFlags::default()).unwrap();
    made.ino
}

fn read(forest: &Forest, ino: Ino) -> Vec<u8> {
    let mut out = vec![0; forest.getattr(ino).unwrap().size as usize];
    forest.read(ino, 0, &mut out).unwrap();
    out
}

fn list(forest: &Forest, dir: Ino) -> Vec<String> {
    let mut names = Vec::new();
    let mut cookie = 0;
    // One by one, as a driver with little room does.
    loop {
        let before = names.len();
        forest
            .readdir(dir, cookie, &mut |entry| {
                if names.len() > before {
                    return false;
                }
                names.push(String::from_utf8_lossy(entry.name).into_owned());
                cookie = entry.cookie;
                true
            })
            .unwrap();
        if names.len() == before {
            names.retain(|name| name != "." && name != "..");
            return names;
        }
    }
}

fn errno<T: core::fmt::Debug>(result: Result<T>) -> Errno {
    result.unwrap_err().errno()
}

#[test]
fn a_subvolume_appears_in_the_root_of_the_one_it_is_in_and_its_files_have_numbers_of_their_own() {
    let (forest, _test) = forest();
    write(&forest, TOP, "plain", b"top");
    subvolume(&forest, "home");
    subvolume(&forest, "home/alice");
    subvolume(&forest, "else");
    assert_eq!(list(&forest, TOP), ["plain", "home", "else"]);
    assert_eq!(forest.getattr(TOP).unwrap().nlink, 4);
    let (home, alice) = (walk(&forest, "home").unwrap(), walk(&forest, "home/alice").unwrap());
    assert_eq!(list(&forest, home), ["alice"]);
    let files = [TOP, home, alice].map(|dir| write(&forest, dir, "same", &content(dir)));
    let inner = files.map(|ino| parts(ino).1);
    assert!(files[1] != files[2] && inner[1] == inner[2], "{files:?}");
    assert_eq!(read(&forest, walk(&forest, "home/alice/same").unwrap()), content(alice));
    assert_eq!(forest.lookup(alice, b"..").unwrap().ino, home);
    assert_eq!(forest.lookup(home, b"..").unwrap().ino, TOP);
    assert_eq!(walk(&forest, "home/alice/.").unwrap(), alice);
    assert_eq!(errno(walk(&forest, "alice")), Errno::NoEnt);
    assert_eq!(forest.statfs_at(alice).unwrap().inodes, 2);
}

#[test]
fn names_and_data_do_not_cross_from_one_subvolume_to_another() {
    let (forest, _test) = forest();
    subvolume(&forest, "home");
    let home = walk(&forest, "home").unwrap();
    let file = write(&forest, TOP, "file", b"data");
    let other = write(&forest, home, "file", b"other");
    let flags = RenameFlags::default();
    let rename = |from, to, name: &[u8]| forest.rename(from, b"file", to, name, flags, &ROOT);
    assert_eq!(errno(rename(TOP, home, b"x")), Errno::XDev);
    assert_eq!(errno(forest.link(file, home, b"x")), Errno::XDev);
    assert_eq!(errno(forest.copy_range(file, 0, other, 0, 4)), Errno::XDev);
    // What appears is neither replaced, nor moved, nor removed.
    assert_eq!(errno(rename(TOP, TOP, b"home")), Errno::Busy);
    assert_eq!(errno(forest.rename(TOP, b"home", TOP, b"x", flags, &ROOT)), Errno::Busy);
    assert_eq!(errno(forest.rmdir(TOP, b"home")), Errno::Busy);
    assert_eq!(errno(forest.unlink(TOP, b"home")), Errno::IsDir);
    for name in [&b"home"[..], b".cairn"] {
        assert_eq!(errno(forest.mkdir(TOP, name, 0o755, &ROOT)), Errno::Exist);
        assert_eq!(errno(forest.link(file, TOP, name)), Errno::Exist);
        assert_eq!(errno(forest.symlink(TOP, name, b"x", &ROOT)), Errno::Exist);
    }
}

#[test]
fn snapshots_are_found_though_not_listed_and_never_change() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let file = write(&forest, walk(&forest, "home").unwrap(), "file", b"old");
    snapshot(&forest, home, "one");
    forest.write(file, 0, b"new", WriteFlags::default()).unwrap();
    snapshot(&forest, home, "two");
    let top = walk(&forest, "home").unwrap();
    assert_eq!(list(&forest, top), ["file"]);
    assert_eq!(list(&forest, walk(&forest, "home/.cairn").unwrap()), ["snapshot"]);
    assert_eq!(list(&forest, walk(&forest, "home/.cairn/snapshot").unwrap()), ["one", "two"]);
    let found = |name: &str| walk(&forest, &std::format!("home/.cairn/snapshot/{name}/file"));
    let (one, two) = (found("one").unwrap(), found("two").unwrap());
    assert!(one != two && one != file);
    assert_eq!((read(&forest, one), read(&forest, two)), (b"old".to_vec(), b"new".to_vec()));
    assert_eq!(errno(forest.write(one, 0, b"x", WriteFlags::default())), Errno::RoFs);
    let root = walk(&forest, "home/.cairn/snapshot/one").unwrap();
    assert_eq!(errno(forest.mkdir(root, b"x", 0o755, &ROOT)), Errno::RoFs);
    assert_eq!(errno(forest.lookup(root, b".cairn")), Errno::NoEnt);
    assert_eq!(forest.lookup(root, b"..").unwrap().ino, Control::Snapshots(home).ino());
    let control = walk(&forest, "home/.cairn").unwrap();
    assert_eq!(forest.lookup(control, b"..").unwrap().ino, top);
    assert_eq!(errno(forest.mkdir(control, b"x", 0o755, &ROOT)), Errno::RoFs);
    assert_eq!(errno(forest.unlink(control, b"snapshot")), Errno::RoFs);
    assert_eq!(errno(found("three")), Errno::NoEnt);
    assert_eq!(walk(&forest, ".cairn/snapshot").unwrap(), Control::Snapshots(HOME).ino());
}

#[test]
fn what_was_let_go_of_is_stale_and_its_numbers_name_nothing_else() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let dir = walk(&forest, "home").unwrap();
    let file = write(&forest, dir, "file", b"old");
    let before = snapshot(&forest, home, "before");
    forest.write(file, 0, b"new", WriteFlags::default()).unwrap();
    let roll_back = VersionOp::Rollback { snapshot: before, keep: b"was".to_vec() };
    // As long as the mount has it open it is in use.
    assert_eq!(errno(forest.engine().change_versions(vec![roll_back.clone()])), Errno::Busy);
    assert!(forest.hold_off(&[home]));
    change(&forest, roll_back);
    forest.let_go(home);
    assert_eq!(errno(forest.getattr(file)), Errno::Stale);
    assert_eq!(errno(forest.lookup(dir, b"file")), Errno::Stale);
    let again = walk(&forest, "home/file").unwrap();
    assert!(again != file && parts(again).1 == parts(file).1);
    assert_eq!(read(&forest, again), b"old");
    assert_eq!(read(&forest, walk(&forest, "home/.cairn/snapshot/was/file").unwrap()), b"new");
    // Forgetting what is stale does nothing to what is there.
    forest.forget(file, 3);
    assert_eq!(read(&forest, again), b"old");

    let snapshots: Vec<u64> = forest.engine().with_versions(|all| all.snapshots(home));
    for id in snapshots.into_iter().chain([home]) {
        assert!(forest.hold_off(&[id]));
        change(&forest, VersionOp::Delete { id });
        forest.let_go(id);
    }
    assert_eq!(errno(walk(&forest, "home")), Errno::NoEnt);
    assert_eq!(errno(forest.getattr(again)), Errno::Stale);
    assert_eq!(errno(forest.getattr(Control::Top(home).ino())), Errno::Stale);
    forest.engine().destroy_all().unwrap();
    assert_eq!(forest.engine().with_versions(|all| all.iter().count()), 1);
}

#[test]
fn a_version_is_closed_when_all_of_it_is_forgotten_and_opened_again_by_its_numbers() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let dir = walk(&forest, "home").unwrap();
    let file = write(&forest, dir, "file", b"data");
    assert_eq!(forest.slots.read().open.len(), 1);
    forest.forget(file, 1);
    assert_eq!(forest.slots.read().open.len(), 1);
    forest.forget(dir, 1);
    assert_eq!(forest.slots.read().open.len(), 0);
    // A file handle.
    let attr = forest.lookup(file, b".").unwrap();
    assert_eq!((attr.ino, read(&forest, file)), (file, b"data".to_vec()));
    forest.forget(file, 1);
    change(&forest, VersionOp::Delete { id: home });
    assert_eq!(errno(forest.lookup(file, b".")), Errno::Stale);
}

#[test]
fn numbers_that_were_never_given_are_stale() {
    let (forest, _test) = forest();
    for slot in [1, 255, 256, 300, CONTROL - 1, CONTROL] {
        for inner in [0, 1, 2, 600, INO_MAX] {
            let ino = number(slot, Ino(inner));
            assert_eq!(errno(forest.getattr(ino)), Errno::Stale, "{slot} {inner}");
            assert_eq!(errno(forest.lookup(ino, b"x")), Errno::Stale, "{slot} {inner}");
            forest.forget(ino, 7);
        }
    }
}

#[test]
fn a_file_of_the_name_of_a_subvolume_stays_the_one_that_is_seen() {
    let (forest, _test) = forest();
    let file = write(&forest, TOP, "home", b"file");
    // From before the name meant something.
    let own = forest.base().mknod(TOP, b".cairn", mode::REGULAR | 0o644, 0, &ROOT).unwrap().ino;
    forest.write(own, 0, b"own", WriteFlags::default()).unwrap();
    subvolume(&forest, "home");
    assert_eq!(walk(&forest, "home").unwrap(), file);
    assert_eq!(list(&forest, TOP), ["home", ".cairn"]);
    assert_eq!(read(&forest, walk(&forest, ".cairn").unwrap()), b"own");
    forest.unlink(TOP, b"home").unwrap();
    assert_eq!(list(&forest, TOP), [".cairn", "home"]);
    assert!(walk(&forest, "home").unwrap() != file);
}

#[test]
fn a_mounted_snapshot_shows_itself_and_nothing_else() {
    let (forest, _test) = forest();
    let engine = forest.engine().clone();
    subvolume(&forest, "home");
    let file = write(&forest, TOP, "file", b"old");
    let id = snapshot(&forest, HOME, "one");
    forest.write(file, 0, b"new", WriteFlags::default()).unwrap();
    let shown = Forest::new(Volume::of_version(engine, id, AccessTime::Never).unwrap());
    assert_eq!(list(&shown, TOP), ["file"]);
    assert_eq!(read(&shown, file), b"old");
    assert_eq!(errno(walk(&shown, "home")), Errno::NoEnt);
    assert_eq!(errno(walk(&shown, ".cairn")), Errno::NoEnt);
}

#[test]
fn what_was_held_off_in_vain_is_as_it_was_and_who_came_meanwhile_has_waited() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let dir = walk(&forest, "home").unwrap();
    let file = write(&forest, dir, "file", b"data");
    // Open, and without a name: it goes when it is forgotten.
    let open = write(&forest, dir, "open", b"open");
    forest.unlink(dir, b"open").unwrap();
    snapshot(&forest, home, "one");
    let attr = forest.getattr(file).unwrap();

    // Somebody is in it.
    let held = forest.held(parts(dir).0).unwrap();
    assert!(!forest.hold_off(&[home]));
    drop(held);
    assert!(forest.hold_off(&[home]));
    let came = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let come = |what: fn(&Forest, Ino, Ino)| {
            let (forest, came) = (&forest, &came);
            scope.spawn(move || {
                what(forest, dir, file);
                came.fetch_add(1, Ordering::SeqCst);
            });
        };
        come(|forest, _, file| {
            forest.write(file, 0, b"more", WriteFlags::default()).unwrap();
        });
        come(|forest, dir, _| {
            forest.lookup(dir, b"file").unwrap();
        });
        come(|forest, _, _| {
            walk(forest, "home").unwrap();
        });
        come(|forest, _, file| forest.forget(file, 1));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(came.load(Ordering::SeqCst), 0);
        // It has a snapshot.
        let delete = VersionOp::Delete { id: home };
        assert_eq!(errno(forest.engine().change_versions(vec![delete.clone()])), Errno::Busy);
        assert_eq!(came.load(Ordering::SeqCst), 0);
        forest.let_in(&[home]);
    });
    assert_eq!(read(&forest, file), b"more");
    assert_eq!(forest.getattr(file).unwrap().generation, attr.generation);
    assert_eq!(read(&forest, open), b"open");
    // It is in use as before, until all is forgotten.
    let delete = VersionOp::Delete { id: home };
    assert_eq!(errno(forest.engine().change_versions(vec![delete])), Errno::Busy);
    forest.forget(open, 1);
    assert_eq!(errno(forest.getattr(open)), Errno::Stale);
    assert_eq!(forest.statfs_at(dir).unwrap().inodes, 2);
}

#[test]
fn listing_snapshots_gives_no_slots_and_shows_the_numbers_they_get() {
    let (forest, _test) = forest();
    for at in 0..20 {
        snapshot(&forest, HOME, &std::format!("s{at}"));
    }
    subvolume(&forest, "home");
    let dir = walk(&forest, ".cairn/snapshot").unwrap();
    let listed = |dir: Ino| {
        let mut all = BTreeMap::new();
        forest
            .readdir(dir, 0, &mut |entry| all.insert(entry.name.to_vec(), entry.ino).is_none())
            .unwrap();
        all.retain(|name, _| !name.starts_with(b"."));
        all
    };
    let (snapshots, top) = (listed(dir), listed(TOP));
    assert_eq!((snapshots.len(), top.len()), (20, 1));
    assert!(forest.slots.read().numbers.is_empty());
    for (name, ino) in snapshots {
        assert_eq!(forest.lookup(dir, &name).unwrap().ino, ino);
    }
    assert_eq!(forest.lookup(TOP, b"home").unwrap().ino, top[&b"home"[..]]);
}

#[test]
fn slots_that_are_forgotten_are_given_again_and_others_are_not() {
    let mut slots = Slots::default();
    let ids = || 1_000_000..1_000_000 + u64::from(CONTROL) - 1;
    let given: BTreeSet<u16> = ids().map(|id| slots.give(id).unwrap()).collect();
    assert_eq!(given.len(), usize::from(CONTROL) - 1, "a slot is given twice");
    // All are forgotten.
    let again: BTreeSet<u16> = (1..1000).map(|id| slots.give(id).unwrap()).collect();
    assert_eq!(again.len(), 999);
    // Something stale, of which drivers hold on to an inode.
    let (mut slots, lookups) = (Slots::default(), Arc::new(AtomicU64::new(1)));
    slots.stale.insert(CONTROL - 1, lookups.clone());
    assert_eq!(slots.give(1 << 20), Some(CONTROL - 2));
    slots.free_forgotten(CONTROL - 1);
    assert_eq!(slots.give(1 << 21), Some(CONTROL - 3));
    lookups.store(0, Ordering::Relaxed);
    slots.free_forgotten(CONTROL - 1);
    assert!(slots.is_free(CONTROL - 1) && !slots.is_free(CONTROL - 2));
}

#[test]
fn a_stale_slot_is_free_when_drivers_have_forgotten_its_inodes() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let dir = walk(&forest, "home").unwrap();
    let file = write(&forest, dir, "file", b"data");
    assert!(forest.hold_off(&[home]));
    change(&forest, VersionOp::Delete { id: home });
    forest.let_go(home);
    assert_eq!(forest.slots.read().stale.len(), 1);
    forest.forget(file, 1);
    forest.forget(dir, 1);
    assert!(forest.slots.read().stale.is_empty());
    // Whatever has the slot next: handles carry another generation.
    assert_eq!(errno(forest.lookup(file, b".")), Errno::Stale);
}

#[test]
fn handles_lead_to_nothing_that_the_mount_does_not_show() {
    let (forest, _test) = forest();
    let engine = forest.engine().clone();
    let [home, inner, other] = ["home", "home/inner", "other"].map(|name| subvolume(&forest, name));
    let (one, two) = (snapshot(&forest, home, "one"), snapshot(&forest, HOME, "two"));
    let top = |id: u64| number(u16::try_from(id).unwrap(), Ino(ROOT_INO));
    for id in [home, inner, other, one, two] {
        forest.getattr(top(id)).unwrap();
    }
    let shown = Forest::new(Volume::of_version(engine.clone(), home, AccessTime::Never).unwrap());
    for id in [inner, one] {
        shown.getattr(top(id)).unwrap();
        shown.lookup(top(id), b".").unwrap();
    }
    for id in [HOME, home, other, two] {
        assert_eq!(errno(shown.getattr(top(id))), Errno::Stale, "{id}");
        assert_eq!(errno(shown.lookup(top(id), b".")), Errno::Stale, "{id}");
    }
    assert_eq!(errno(shown.getattr(Control::Top(other).ino())), Errno::Stale);
    shown.getattr(Control::Top(inner).ino()).unwrap();
    let shown = Forest::new(Volume::of_version(engine, one, AccessTime::Never).unwrap());
    for id in [HOME, home, inner, other, two] {
        assert_eq!(errno(shown.getattr(top(id))), Errno::Stale, "{id}");
    }
}

#[test]
fn a_handle_of_what_was_mounted_does_not_fit_what_is_mounted_instead() {
    let (forest, _test) = forest();
    let engine = forest.engine().clone();
    let ids = ["one", "two"].map(|name| subvolume(&forest, name));
    let generations = ids.map(|id| {
        let volume = Volume::of_version(engine.clone(), id, AccessTime::Never).unwrap();
        Forest::new(volume).getattr(TOP).unwrap().generation as u32
    });
    assert_ne!(generations[0], generations[1]);
}

#[test]
fn who_waits_for_what_is_held_off_is_in_nothing_else_that_may_be() {
    let (forest, _test) = forest();
    let (home, mail) = (subvolume(&forest, "home"), subvolume(&forest, "home/mail"));
    let dir = walk(&forest, "home").unwrap();
    let nested = walk(&forest, "home/mail").unwrap();
    let file = write(&forest, nested, "file", b"data");
    assert!(forest.hold_off(&[mail]));
    std::thread::scope(|scope| {
        let down = scope.spawn(|| forest.lookup(dir, b"mail").unwrap().ino);
        let across = scope.spawn(|| errno(forest.link(file, dir, b"link")));
        let back = scope.spawn(|| errno(forest.rename(dir, b"a", nested, b"b", NONE, &ROOT)));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!down.is_finished() && !across.is_finished() && !back.is_finished());
        assert!(forest.hold_off(&[home]));
        forest.let_in(&[home, mail]);
        assert_eq!(down.join().unwrap(), nested);
        assert_eq!(across.join().unwrap(), Errno::XDev);
        assert_eq!(back.join().unwrap(), Errno::XDev);
    });
    // The other way round: from what is held off to what is above it.
    assert!(forest.hold_off(&[home]));
    std::thread::scope(|scope| {
        let up = scope.spawn(|| forest.lookup(nested, b"..").unwrap().ino);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!up.is_finished());
        assert!(forest.hold_off(&[mail]));
        forest.let_in(&[home, mail]);
        assert_eq!(up.join().unwrap(), dir);
    });
}

#[test]
fn the_slot_of_what_is_let_go_of_while_it_is_being_forgotten_is_free() {
    let (forest, _test) = forest();
    let home = subvolume(&forest, "home");
    let dir = walk(&forest, "home").unwrap();
    let slot = parts(dir).0;
    forest.let_go(home);
    assert!(forest.slots.read().stale.contains_key(&slot));
    // As one does that found it open.
    forest.slots.read().stale[&slot].store(0, Ordering::Relaxed);
    forest.close_forgotten(slot);
    assert!(!forest.slots.read().stale.contains_key(&slot));
}
