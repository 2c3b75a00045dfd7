//! What passes see of a pool that changes under them, compared with what is there in the end.

use super::*;
use crate::engine::tests::{create, mount, new_pool, noise};
use crate::engine::versions::VersionOp;
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, SECTOR_BYTES};
use crate::vfs::{Filesystem, Volume, WriteFlags};
use proptest::prelude::*;
use std::boxed::Box;
use std::string::ToString;
use std::vec::Vec;

/// Notes which sectors of data and which blocks it was shown; stops at every leaf.
#[derive(Default)]
struct Noting {
    blocks: BTreeSet<(Logical, Txg)>,
    sectors: BTreeSet<Logical>,
    rootless: Vec<TreeId>,
}

impl Visitor for Noting {
    fn rootless(&mut self, id: TreeId, _: &Error) {
        self.rootless.push(id);
    }

    fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
        assert!(seen.error.is_none());
        self.blocks.insert((seen.ptr.addr, seen.ptr.birth));
        Ok(())
    }

    fn data(&mut self, _: TreeId, _: &Key, _: Txg, source: DataSource) -> Result<()> {
        let run = source.run();
        for at in (run.addr.0..run.addr.0 + run.bytes).step_by(SECTOR_BYTES as usize) {
            self.sectors.insert(Logical(at));
        }
        Ok(())
    }

    fn has_enough(&self) -> bool {
        true
    }
}

/// Takes a pass to its end, doing something before each step. If it is told what is passed over, it
/// goes on from what would be stored of it each time.
fn pass(
    engine: &Engine,
    (pass, stored): (&mut Pass, Option<Txg>),
    noting: &mut Noting,
    mut before: impl FnMut(),
) {
    loop {
        before();
        let parts = engine.parts();
        if let Some(least) = stored {
            *pass = Pass::resumed(least, &pass.progress(&parts));
        }
        if !pass.step(&engine.store, &parts, noting).unwrap() {
            return;
        }
    }
}

/// All that is there, no older group passed over.
fn all(engine: &Engine) -> Noting {
    let mut noting = Noting::default();
    pass(engine, (&mut Pass::default(), None), &mut noting, || {});
    noting
}

struct Fixture {
    _device: Arc<RamDevice>,
    _test: TestPlatform,
    fs: Arc<Volume>,
    files: Vec<Ino>,
}

const FILES: u64 = 8;
const FILE_SECTORS: u64 = 64;

fn fixture() -> Fixture {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let files: Vec<Ino> = (0..FILES).map(|n| create(&fs, fs.root(), &[b'a' + n as u8])).collect();
    for (number, file) in files.iter().enumerate() {
        // In many extents, so that there are many leaves.
        for at in (0..FILE_SECTORS).rev() {
            let seed = number as u64 * FILE_SECTORS + at;
            let data = noise(SECTOR_BYTES as usize, seed + 1);
            fs.write(*file, at * SECTOR_BYTES, &data, WriteFlags::default()).unwrap();
            if at % 8 == 0 {
                fs.sync().unwrap();
            }
        }
    }
    Fixture { _device: device, _test: test, fs, files }
}

#[derive(Clone, Debug)]
enum Step {
    Write { file: usize, at: u64 },
    Clone { from: usize, to: usize, at: u64 },
    Snapshot,
    Delete { which: usize },
    Rest,
}

fn step() -> impl Strategy<Value = Step> {
    let file = || 0..FILES as usize;
    prop_oneof![
        (file(), 0..FILE_SECTORS).prop_map(|(file, at)| Step::Write { file, at }),
        (file(), file(), 0..FILE_SECTORS - 8).prop_map(|(from, to, at)| Step::Clone {
            from,
            to,
            at
        }),
        Just(Step::Snapshot),
        (0usize..8).prop_map(|which| Step::Delete { which }),
        Just(Step::Rest),
    ]
}

impl Fixture {
    fn engine(&self) -> &Engine {
        self.fs.engine()
    }

    fn carry_out(&self, step: &Step, number: u64) {
        let flags = WriteFlags::default();
        match step {
            Step::Write { file, at } => {
                let data = noise(3 * SECTOR_BYTES as usize, 10_000 + number);
                self.fs.write(self.files[*file], at * SECTOR_BYTES, &data, flags).unwrap();
            }
            Step::Clone { from, to, at } => {
                let (source, target) = (self.files[*from], self.files[*to]);
                let (at, len) = (at * SECTOR_BYTES, 8 * SECTOR_BYTES);
                let to = if source == target { at + len } else { at };
                let _ = self.fs.copy_range(source, at, target, to, len);
            }
            Step::Snapshot => {
                let (subvolume, name) = (TreeId::FIRST_SUBVOL.0, number.to_string().into_bytes());
                let op = VersionOp::Snapshot { subvolume, name };
                self.engine().change_versions(std::vec![op]).unwrap();
            }
            Step::Delete { which } => {
                let is_there = |v: &crate::subvol::versions::Version| {
                    v.item.is_snapshot() && !v.item.is_deleted()
                };
                let ids: Vec<u64> = self.engine().with_versions(|all| {
                    all.iter().filter(|(_, v)| is_there(v)).map(|(id, _)| id).collect()
                });
                if let Some(id) = ids.get(*which) {
                    self.engine()
                        .change_versions(std::vec![VersionOp::Delete { id: *id }])
                        .unwrap();
                }
                if *which % 2 == 0 {
                    self.engine().destroy_all().unwrap();
                }
            }
            Step::Rest => return,
        }
        self.engine().commit().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// As `resilver` does it: a pass over all, one over what is younger, and one over what is
    /// younger than that and does not change meanwhile.
    #[test]
    fn what_is_there_in_the_end_was_seen_or_is_young(
        steps in proptest::collection::vec(step(), 1..40),
        every in 1usize..6,
        stores in any::<bool>(),
    ) {
        let fixture = fixture();
        let engine = fixture.engine();
        let mut noting = Noting::default();
        let mut left = steps.iter().enumerate();
        let first = engine.parts().txg;
        let mut began = first;
        for number in 0..2 {
            let mut current = match number {
                0 => Pass::default(),
                _ => {
                    let now = engine.parts().txg;
                    Pass::younger_than(core::mem::replace(&mut began, now))
                }
            };
            let least = if number == 0 { Txg(0) } else { first };
            let mut count = 0;
            pass(engine, (&mut current, stores.then_some(least)), &mut noting, || {
                count += 1;
                if count % every == 0 {
                    if let Some((number, step)) = left.next() {
                        fixture.carry_out(step, number as u64);
                    }
                }
            });
        }
        let parts = engine.parts();
        let mut last = Pass::younger_than(began);
        while last.step(&engine.store, &parts, &mut noting).unwrap() {}
        let all = all(engine);
        let old = |seen: &&(Logical, Txg)| seen.1 <= first;
        // However young the reference is: it may name what is old.
        let unseen: Vec<_> = all.sectors.difference(&noting.sectors).collect();
        prop_assert!(unseen.is_empty(), "{} sectors were not seen", unseen.len());
        let unseen: Vec<_> = all.blocks.difference(&noting.blocks).filter(old).collect();
        prop_assert!(unseen.is_empty(), "{} blocks were not seen", unseen.len());
        fixture.fs.close().unwrap();
    }
}

#[test]
fn a_snapshot_taken_and_deleted_in_the_middle_of_a_pass_hides_nothing() {
    let fixture = fixture();
    let engine = fixture.engine();
    let (subvolume, name) = (TreeId::FIRST_SUBVOL.0, b"s".to_vec());
    let take = VersionOp::Snapshot { subvolume, name };
    let want = all(engine).sectors;
    for after in 1.. {
        let (mut noting, mut current, mut count, mut id) =
            (Noting::default(), Pass::default(), 0, None);
        pass(engine, (&mut current, None), &mut noting, || {
            count += 1;
            if count == after {
                id = Some(engine.change_versions(std::vec![take.clone()]).unwrap()[0]);
            }
            if count == after + 2 {
                let id = id.take().unwrap();
                engine.change_versions(std::vec![VersionOp::Delete { id }]).unwrap();
                engine.destroy_all().unwrap();
            }
        });
        assert_eq!(want.difference(&noting.sectors).count(), 0, "at step {after}");
        if count < after {
            break;
        }
        if let Some(id) = id {
            engine.change_versions(std::vec![VersionOp::Delete { id }]).unwrap();
            engine.destroy_all().unwrap();
        }
    }
}

#[test]
fn a_deletion_that_has_stopped_is_not_waited_for() {
    let fixture = fixture();
    let engine = fixture.engine();
    let (subvolume, name) = (TreeId::FIRST_SUBVOL.0, b"s".to_vec());
    let want = all(engine).sectors;
    let take = VersionOp::Snapshot { subvolume, name };
    let id = engine.change_versions(std::vec![take]).unwrap()[0];
    engine
        .versions
        .write()
        .change(id, |item| item.flags |= version::DELETED | version::STARTED)
        .unwrap();
    engine.stopped.lock().insert(id);
    let seen = all(engine).sectors;
    assert_eq!(want.difference(&seen).count(), 0);
}

#[test]
fn what_a_visitor_could_not_take_is_shown_again() {
    struct Failing(Noting, u32);
    impl Visitor for Failing {
        fn rootless(&mut self, id: TreeId, error: &Error) {
            self.0.rootless(id, error);
        }
        fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
            self.0.block(seen)
        }
        fn data(&mut self, id: TreeId, key: &Key, birth: Txg, source: DataSource) -> Result<()> {
            self.1 += 1;
            if self.1 % 3 == 0 {
                return Err(Error::Memory);
            }
            self.0.data(id, key, birth, source)
        }
        fn has_enough(&self) -> bool {
            false
        }
    }
    let fixture = fixture();
    let engine = fixture.engine();
    let want = all(engine).sectors;
    let mut failing = Box::new(Failing(Noting::default(), 0));
    let mut current = Pass::default();
    let parts = engine.parts();
    for _ in 0..10 {
        let _ = current.step(&engine.store, &parts, &mut *failing);
    }
    assert!(failing.1 > 3);

    while current.step(&engine.store, &parts, &mut failing.0).unwrap() {}
    assert_eq!(want.difference(&failing.0.sectors).count(), 0);
}

#[test]
fn a_version_whose_root_makes_no_sense_is_told_of_once_and_keeps_no_pass_from_its_end() {
    let fixture = fixture();
    let engine = fixture.engine();
    let all_blocks = all(engine).blocks.len();
    let mut parts = engine.parts();
    let bad = TreeId::FIRST_SUBVOL;
    let error = Error::BadItem { what: "a root", tree: TreeId::POOL, object: bad.0 };
    parts.by_id.get_mut(&bad.0).unwrap().tree = Err(error);
    let (mut current, mut noting) = (Pass::default(), Noting::default());
    let mut steps = 0;
    while current.step(&engine.store, &parts, &mut noting).unwrap() {
        steps += 1;
        assert!(steps < 10_000);
    }
    assert_eq!(noting.rootless, [bad]);
    assert!(noting.sectors.is_empty());
    assert!((1..all_blocks).contains(&noting.blocks.len()));
}

#[test]
fn what_goes_on_from_a_version_whose_root_makes_no_sense_is_looked_at() {
    let fixture = fixture();
    let engine = fixture.engine();
    let (subvolume, name) = (TreeId::FIRST_SUBVOL.0, b"s".to_vec());
    let want = all(engine).sectors;
    let take = VersionOp::Snapshot { subvolume, name };
    let id = engine.change_versions(std::vec![take]).unwrap()[0];
    assert_eq!(want.difference(&all(engine).sectors).count(), 0);
    engine.versions.write().change(id, |item| item.root.fill(0xff)).unwrap();
    let noting = all(engine);
    assert_eq!(noting.rootless, [TreeId(id)]);
    let missed = want.difference(&noting.sectors).count();
    assert_eq!(missed, 0, "of {}", want.len());
}
