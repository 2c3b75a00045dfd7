//! What older groups show, compared with what was there when they were published.

use super::*;
use crate::check::findings::rules;
use crate::check::{check, CheckOptions, CheckReport, Quiet};
use crate::engine::tests::{create, mount, new_pool, noise, read_all, with_log};
use crate::engine::versions::VersionOp;
use crate::engine::{format, FormatOptions};
use crate::error::Errno;
use crate::format::chunk::Profile;
use crate::format::extent::Extent;
use crate::format::key::kind;
use crate::format::label::{label_areas, ring_slot, RING_SLOTS};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::format::superblock::Superblock;
use crate::space::Class;
use crate::subvol::store::DataSettings;
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, SECTOR_BYTES};
use crate::vfs::{AccessTime, Filesystem, Volume, WriteFlags};
use std::collections::BTreeMap;
use std::string::{String, ToString};
use std::vec;

const SECTOR: usize = SECTOR_BYTES as usize;
const FILES: u64 = 12;

/// What files held, by number.
type Model = BTreeMap<u64, Vec<u8>>;

struct Story {
    device: Arc<RamDevice>,
    test: TestPlatform,
    fs: Option<Arc<Volume>>,
    files: BTreeMap<u64, Ino>,
    now: Model,
    /// What was there when each group was published.
    then: BTreeMap<Txg, Model>,
    seed: u64,
}

fn name(file: u64) -> Vec<u8> {
    std::format!("file-{file}").into_bytes()
}

impl Story {
    fn new(bytes: u64) -> Story {
        let (device, test) = new_pool(bytes);
        let fs = Some(mount(&device, &test));
        let (files, now, then) = Default::default();
        Story { device, test, fs, files, now, then, seed: 1 }
    }

    fn fs(&self) -> &Volume {
        self.fs.as_deref().unwrap()
    }

    fn next(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.seed >> 33
    }

    /// Writes a part of a file, or makes it.
    fn write(&mut self, file: u64, at: usize, data: &[u8]) {
        let fs = self.fs.clone().unwrap();
        let ino = *self.files.entry(file).or_insert_with(|| create(&fs, fs.root(), &name(file)));
        fs.write(ino, at as u64, data, WriteFlags::default()).unwrap();
        let content = self.now.entry(file).or_default();
        content.resize(content.len().max(at + data.len()), 0);
        content[at..at + data.len()].copy_from_slice(data);
    }

    fn remove(&mut self, file: u64) {
        if let Some(ino) = self.files.remove(&file) {
            self.fs().unlink(self.fs().root(), &name(file)).unwrap();
            // Or its room would not come back.
            self.fs().forget(ino, 1);
            self.now.remove(&file);
        }
    }

    /// A commit, of which is noted what it holds.
    fn commit(&mut self) -> Txg {
        let engine = self.fs().engine();
        engine.want_commit();
        engine.commit().unwrap();
        let txg = engine.published().1.txg;
        self.then.insert(txg, self.now.clone());
        txg
    }

    /// Ordinary work: some files are written, some in part, some go.
    fn work(&mut self) {
        for _ in 0..4 {
            let (file, size) = (self.next() % FILES, self.next() as usize % (20 * SECTOR) + 1);
            let at = self.next() as usize % (4 * SECTOR);
            let data = noise(size, self.next());
            match self.next() % 5 {
                0 => self.remove(file),
                _ => self.write(file, at, &data),
            }
        }
    }

    fn close(&mut self) {
        let fs = self.fs.take().unwrap();
        fs.sync().unwrap();
        fs.close().unwrap();
    }

    fn mount(&mut self) {
        let fs = mount(&self.device, &self.test);
        for file in self.files.keys() {
            fs.lookup(fs.root(), &name(*file)).unwrap();
        }
        self.fs = Some(fs);
    }

    fn devices(&self) -> Vec<DeviceRef> {
        vec![self.device.device()]
    }

    fn history(&self) -> Vec<PastGroup> {
        history(&self.devices(), &self.test.platform, true).unwrap()
    }

    fn open(&self, txg: Txg) -> Result<Arc<Volume>> {
        open_at(&self.devices(), &self.test, Some(txg))
    }

    fn check(&self, txg: Option<Txg>) -> CheckReport {
        let options = CheckOptions { data: true, txg };
        check(self.devices(), self.test.platform.clone(), &options, &Quiet).unwrap()
    }

    /// Flips a bit in all copies of what a logical address of a group holds.
    fn spoil(&self, txg: Option<Txg>, addr: Logical) {
        let fs = open_at(&self.devices(), &self.test, txg).unwrap();
        for copy in fs.engine().store.pool.map(addr, SECTOR_BYTES).unwrap() {
            self.device.flip(copy[0].1 .0 + 100);
        }
    }

    /// The root of the files that a group has.
    fn root_of(&self, txg: Txg) -> Option<BlockPtr> {
        let fs = self.open(txg).ok()?;
        let subvol = fs.engine().default_subvol()?;
        subvol.view().tree.root
    }

    /// Where the first bytes of a file are, as a group has it.
    fn place_of(&self, txg: Option<Txg>, file: u64) -> Logical {
        let fs = open_at(&self.devices(), &self.test, txg).unwrap();
        let ino = fs.lookup(fs.root(), &name(file)).unwrap().ino;
        let tree = fs.engine().default_subvol().unwrap().view().tree;
        let key = Key::new(ino.0, kind::EXTENT, 0);
        let value = tree.lookup(&*fs.engine().store, &key).unwrap().unwrap();
        match Extent::decode(&value, 0, Txg(u64::MAX)).unwrap().0 {
            Extent::Plain { addr, .. } => addr,
            Extent::Packed { blob, .. } => blob.addr,
            other => panic!("{other:?}"),
        }
    }
}

fn open_at(devices: &[DeviceRef], test: &TestPlatform, txg: Option<Txg>) -> Result<Arc<Volume>> {
    let options = OpenOptions { read_only: true, txg, ..OpenOptions::default() };
    Volume::open(devices.to_vec(), test.platform.clone(), &options, AccessTime::Never)
}

/// Every file of an older group is what it was, or gives EIO. Returns whether all could be read.
fn is_as_it_was(fs: &Volume, then: &Model) -> bool {
    let mut is_whole = true;
    for file in 0..FILES {
        let found = match fs.lookup(fs.root(), &name(file)) {
            Ok(found) => found,
            Err(Error::Posix(Errno::NoEnt)) => {
                assert!(!then.contains_key(&file), "file {file} was there");
                continue;
            }
            Err(error) => {
                assert_eq!(error.errno(), Errno::Io);
                is_whole = false;
                continue;
            }
        };
        let expected = then.get(&file).unwrap_or_else(|| panic!("file {file} was not there"));
        assert_eq!(found.size, expected.len() as u64);
        for (index, part) in expected.chunks(SECTOR).enumerate() {
            let mut buf = vec![0; part.len()];
            match fs.read(found.ino, (index * SECTOR) as u64, &mut buf) {
                Ok(len) => assert!(len == part.len() && buf == part, "file {file}, part {index}"),
                Err(error) => {
                    assert_eq!(error.errno(), Errno::Io);
                    is_whole = false;
                }
            }
        }
    }
    is_whole
}

#[test]
fn with_plenty_of_room_all_groups_of_the_ring_are_whole_and_show_what_was_there() {
    let mut story = Story::new(128 << 20);
    for _ in 0..40 {
        story.work();
        story.commit();
        story.fs().engine().tick();
    }
    let newest = *story.then.keys().last().unwrap();
    let before = story.device.image();
    let groups = story.history();
    assert_eq!(groups.len() as u64, RING_SLOTS);
    assert_eq!((groups[0].txg, &groups[0].state), (newest, &GroupState::Newest));
    for group in &groups[1..] {
        assert_eq!(group.state, GroupState::Whole, "group {} of {newest}", group.txg);
        assert!(is_as_it_was(&story.open(group.txg).unwrap(), &story.then[&group.txg]));
    }
    assert!(story.device.image() == before, "whoever looks back writes nothing");
    // Room that is kept for them counts as free, and is there when it is wanted.
    let engine = story.fs().engine();
    engine.store.space.check(&*engine.store).unwrap();
    let available = engine.room().available;
    let all = engine.reserve(available, 0, Class::Normal);
    assert_eq!(all.map(|all| all.data()), Ok(available));
    story.close();
}

#[test]
fn an_older_group_is_what_it_was_or_an_error_and_nothing_is_ever_written() {
    // So small that what was given up is soon used again.
    let mut story = Story::new(16 << 20);
    let (mut refused, mut partly, mut whole) = (0, 0, 0);
    for round in 0..60 {
        story.work();
        if round % 3 == 0 {
            // Most of the room is taken, and given back.
            let size = story.fs().engine().room().available as usize * 9 / 10;
            let data = noise(size, 2 * round + 1);
            story.write(FILES, 0, &data);
            story.commit();
            story.remove(FILES);
        }
        story.commit();
        if round % 5 != 4 {
            continue;
        }
        story.close();
        let before = story.device.image();
        for group in story.history() {
            // Those that opening and closing made are not noted.
            let then = story.then.get(&group.txg);
            match (story.open(group.txg), &group.state) {
                (Ok(_), GroupState::Gone(error)) => panic!("{error}"),
                (Ok(fs), state) => {
                    let Some(then) = then else { continue };
                    let is_whole = is_as_it_was(&fs, then);
                    assert!(is_whole || matches!(state, GroupState::Partly(_)));
                    partly += u64::from(matches!(state, GroupState::Partly(_)));
                    whole += u64::from(is_whole);
                }
                (Err(error), GroupState::Gone(_)) => {
                    let Error::NoGroup { txg, cause: Some(_), others } = &error else {
                        panic!("{error}");
                    };
                    assert_eq!(*txg, Some(group.txg));
                    assert!(others.iter().all(|other| story.open(*other).is_ok()));
                    refused += 1;
                }
                (Err(error), state) => panic!("{error} though {state:?}"),
            }
        }
        assert!(story.device.image() == before, "whoever looks back writes nothing");
        story.mount();
    }
    assert!(refused > 0 && partly > 0 && whole > 0, "{refused} {partly} {whole}");
}

#[test]
fn the_log_is_not_replayed_on_an_older_group_nor_on_the_newest_that_is_asked_for() {
    let (device, test, fs) = with_log(64 << 20);
    let file = create(&fs, fs.root(), b"file");
    let write = |data: &[u8]| fs.write(file, 0, data, WriteFlags::default()).unwrap();
    let published = || fs.engine().published().1.txg;
    write(b"old");
    fs.sync().unwrap();
    let older = published();
    write(b"new");
    fs.sync().unwrap();
    let newest = published();
    write(b"log");
    fs.fsync(file, false).unwrap();
    assert_eq!(published(), newest, "it is in the log only");
    let image = RamDevice::from_image(device.image());
    let devices = [image.device()];
    let content = |txg| read_all(&open_at(&devices, &test, txg).unwrap(), file);
    assert_eq!(content(None), b"log");
    assert_eq!(content(Some(newest)), b"new");
    assert_eq!(content(Some(older)), b"old");
    assert!(image.image() == device.image());
    fs.close().unwrap();
}

#[test]
fn only_whoever_reads_opens_an_older_group_and_those_that_are_there_are_named() {
    let mut story = Story::new(64 << 20);
    for _ in 0..20 {
        story.commit();
    }
    story.close();
    let groups: Vec<Txg> = story.history().iter().map(|group| group.txg).collect();
    let options = OpenOptions { txg: Some(groups[3]), ..OpenOptions::default() };
    let platform = || story.test.platform.clone();
    let writing = crate::engine::open(story.devices(), platform(), &options).map(drop);
    assert!(matches!(writing, Err(Error::Argument { .. })));
    let writing = rewind(story.devices(), platform(), &OpenOptions::default()).map(drop);
    assert!(matches!(writing, Err(Error::Argument { .. })));
    let error = story.open(Txg(1)).map(drop).unwrap_err();
    assert_eq!(error, Error::NoGroup { txg: Some(Txg(1)), cause: None, others: groups.clone() });
    let (last, first) = (groups[0], groups[groups.len() - 1]);
    let sentence = std::format!(
        "the pool does not have its group 1 any more; those that can be opened are {first} to \
         {last}"
    );
    assert_eq!(error.to_string(), sentence);
    let some = [9, 8, 6, 3, 2, 1].map(Txg).to_vec();
    let gone = Error::Checksum { addr: Logical(4096), bytes: 512 };
    let error = Error::NoGroup { txg: Some(Txg(4)), cause: Some(gone.to_string()), others: some };
    assert!(error.to_string().ends_with("are 1 to 3, 6, 8 and 9"), "{error}");
    let none = Error::NoGroup { txg: None, cause: None, others: Vec::new() };
    assert!(none.to_string().ends_with("; there is no other that can be opened"), "{none}");
}

#[test]
fn when_the_newest_is_damaged_a_rewind_opens_the_newest_before_it_that_is_whole() {
    let mut story = Story::new(64 << 20);
    story.write(0, 0, &noise(3 * SECTOR, 1));
    story.write(1, 0, &noise(3 * SECTOR, 3));
    let good = story.commit();
    story.write(1, 0, b"later");
    let bad = story.commit();
    story.write(2, 0, b"last");
    story.commit();
    story.close();
    let groups: Vec<Txg> = story.history().iter().map(|group| group.txg).collect();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let back = || rewind(story.devices(), story.test.platform.clone(), &options);
    assert_eq!(back().unwrap().published().1.txg, groups[1], "the newest is passed over");
    // Later groups have the root of the files in other places. What several have is spoilt once.
    let mut roots: Vec<(Txg, Logical)> = Vec::new();
    for txg in groups.iter().filter(|txg| **txg >= bad) {
        let root = story.root_of(*txg).unwrap();
        if roots.iter().all(|(_, addr)| *addr != root.addr) {
            roots.push((*txg, root.addr));
        }
    }
    roots.iter().for_each(|(txg, addr)| story.spoil(Some(*txg), *addr));
    let before = story.device.image();
    assert_eq!(back().unwrap().published().1.txg, good);
    assert!(is_as_it_was(&story.open(good).unwrap(), &story.then[&good]));
    assert!(story.device.image() == before);
    story.spoil(Some(good), story.root_of(good).unwrap().addr);
    match back() {
        Ok(engine) => assert!(engine.published().1.txg < good),
        Err(error) => assert!(matches!(error, Error::NoGroup { txg: None, .. }), "{error}"),
    }
}

#[test]
fn data_without_a_checksum_is_refused_in_an_older_group() {
    let (device, test) = new_pool(64 << 20);
    let fs = mount(&device, &test);
    let file = create(&fs, fs.root(), b"plain");
    let engine = fs.engine();
    let (compression, checksum) = (CompressionKind::None, ChecksumKind::None);
    engine.store.set_settings(DataSettings { compression, checksum, ..engine.settings() });
    let data = noise(20 * SECTOR, 5);
    fs.write(file, 0, &data, WriteFlags::default()).unwrap();
    fs.sync().unwrap();
    let older = engine.published().1.txg;
    create(&fs, fs.root(), b"another");
    fs.sync().unwrap();
    assert_eq!(read_all(&fs, file), data);
    fs.close().unwrap();
    let devices = [device.device()];
    let past = open_at(&devices, &test, Some(older)).unwrap();
    let error = past.read(file, 0, &mut [0; 10]).unwrap_err();
    assert!(matches!(error, Error::Unverified { .. }) && error.errno() == Errno::Io, "{error}");
    assert_eq!(read_all(&open_at(&devices, &test, None).unwrap(), file), data);
}

#[test]
fn a_forged_superblock_of_the_ring_is_no_more_than_an_error() {
    let mut story = Story::new(64 << 20);
    for _ in 0..6 {
        story.work();
        story.commit();
    }
    story.close();
    let groups = story.history();
    let victim = groups[3].txg;
    let areas = label_areas(64 << 20).unwrap();
    let at = |area: usize| ring_slot(areas[area], victim.0).0;
    let good = Superblock::decode(&story.device.peek(at(0), SECTOR)).unwrap();
    let put = |superblock: &Superblock| {
        (0..2).for_each(|area| story.device.poke(at(area), &superblock.encode()));
    };
    let forgeries: &[&dyn Fn(&mut Superblock)] = &[
        &|s| s.pool_root = None,
        &|s| s.chunk_root = None,
        &|s| s.space_root = None,
        &|s| s.system_chunks.clear(),
        &|s| s.default_subvol = u64::MAX,
        &|s| s.device_count = 64,
        &|s| s.residue = s.pool_root,
        &|s| s.pool_root = s.space_root,
        &|s| s.next_chunk = Logical(0),
        &|s| s.system_chunks.iter_mut().for_each(|chunk| chunk.stripes[0].device = 63),
    ];
    for (index, forge) in forgeries.iter().enumerate() {
        let mut forged = good.clone();
        forge(&mut forged);
        put(&forged);
        let outcome = story.open(victim).map(drop);
        let found = story.history();
        let state = &found.iter().find(|group| group.txg == victim).unwrap().state;
        assert_eq!(outcome.is_err(), matches!(state, GroupState::Gone(_)), "{index}: {state:?}");
        // It does not speak for the others.
        assert_eq!(found[0].state, GroupState::Newest, "{index}");
        assert_eq!(found[1].state, groups[1].state, "{index}");
    }
    put(&good);
    assert_eq!(story.history(), groups);
}

fn ids(report: &CheckReport) -> Vec<&'static str> {
    let mut ids: Vec<_> = report.findings.iter().map(|finding| finding.id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn text(report: &CheckReport) -> String {
    report.findings.iter().map(|finding| std::format!("{finding}\n")).collect()
}

#[test]
fn the_check_of_an_older_group_tells_what_was_overwritten_from_what_is_damaged() {
    let mut story = Story::new(64 << 20);
    story.write(0, 0, &noise(4 * SECTOR, 11));
    story.write(1, 0, &noise(4 * SECTOR, 13));
    let older = story.commit();
    story.write(1, 0, &noise(4 * SECTOR, 15));
    story.commit();
    story.close();
    let clean = story.check(Some(older));
    assert!(clean.is_clean(), "{}", text(&clean));
    assert_eq!(clean.stats.txg, older);
    // What the newest group has given up.
    story.spoil(Some(older), story.place_of(Some(older), 1));
    assert_eq!(ids(&story.check(Some(older))), [rules::OVERWRITTEN.id]);
    assert!(story.check(None).is_clean());
    let group = story.history().into_iter().find(|group| group.txg == older).unwrap();
    assert!(matches!(group.state, GroupState::Partly(Lost { count: 1, .. })), "{group:?}");
    // What it has as well.
    let shared = story.place_of(Some(older), 0);
    assert_eq!(shared, story.place_of(None, 0));
    story.spoil(None, shared);
    assert_eq!(ids(&story.check(None)), [rules::DATA.id]);
    let both = story.check(Some(older));
    assert_eq!(ids(&both), [rules::DATA.id, rules::OVERWRITTEN.id], "{}", text(&both));
    let path = |id| both.findings.iter().find(|f| f.id == id).unwrap().path.clone().unwrap();
    assert_eq!(path(rules::DATA.id), b"/file-0");
    assert_eq!(path(rules::OVERWRITTEN.id), b"/file-1");
    // A node that was replaced.
    let root = story.open(older).unwrap().engine().published().0.pool.root.unwrap();
    story.spoil(Some(older), root.addr);
    let report = story.check(Some(older));
    assert!(ids(&report).contains(&rules::OVERWRITTEN.id), "{}", text(&report));
    assert!(!ids(&report).contains(&rules::BLOCK.id), "{}", text(&report));
    let options = CheckOptions { data: true, txg: Some(Txg(9999)) };
    let unknown = check(story.devices(), story.test.platform.clone(), &options, &Quiet);
    assert!(matches!(unknown, Err(Error::NoGroup { cause: None, .. })));
}

#[test]
fn a_snapshot_that_was_deleted_is_there_in_an_older_group() {
    let mut story = Story::new(128 << 20);
    story.write(0, 0, &noise(8 * SECTOR, 1));
    let subvolume = story.fs().engine().default_subvol().unwrap().id.0;
    let op = VersionOp::Snapshot { subvolume, name: b"monday".to_vec() };
    let id = story.fs().engine().change_versions(vec![op]).unwrap()[0];
    story.write(0, 0, &noise(8 * SECTOR, 3));
    let older = story.commit();
    story.fs().engine().change_versions(vec![VersionOp::Delete { id }]).unwrap();
    story.fs().engine().destroy_all().unwrap();
    story.commit();
    story.close();
    let group = story.history().into_iter().find(|group| group.txg == older).unwrap();
    let past = story.open(older).unwrap();
    assert!(past.engine().with_versions(|all| all.get(id).is_some()));
    let is_whole = is_as_it_was(&past, &story.then[&older]);
    assert!(is_whole || group.state != GroupState::Whole);
    let newest = open_at(&story.devices(), &story.test, None).unwrap();
    assert!(newest.engine().with_versions(|all| all.get(id).is_none()));
}

#[test]
fn every_device_of_a_mirror_has_the_ring() {
    let test = TestPlatform::new(3);
    let rams: Vec<_> = (0..2).map(|_| RamDevice::new(64 << 20)).collect();
    let devices: Vec<DeviceRef> = rams.iter().map(|ram| ram.device()).collect();
    let (data_profile, metadata_profile) = (Profile::Mirror, Profile::Mirror);
    let options = FormatOptions { data_profile, metadata_profile, ..FormatOptions::default() };
    format(devices.clone(), test.platform.clone(), &options).unwrap();
    let options = OpenOptions::default();
    let fs = Volume::open(devices.clone(), test.platform.clone(), &options, AccessTime::Never);
    let fs = fs.unwrap();
    let file = create(&fs, fs.root(), b"file");
    let mut then = BTreeMap::new();
    for round in 0..6 {
        let data = noise(5 * SECTOR, 2 * round + 1);
        fs.write(file, 0, &data, WriteFlags::default()).unwrap();
        fs.sync().unwrap();
        then.insert(fs.engine().published().1.txg, data);
    }
    fs.close().unwrap();
    drop(fs);
    let all = history(&devices, &test.platform, true).unwrap();
    let whole = all.iter().filter(|group| group.state == GroupState::Whole);
    assert_eq!(whole.filter(|group| then.contains_key(&group.txg)).count(), then.len());
    for alone in &devices {
        let one = history(core::slice::from_ref(alone), &test.platform, true).unwrap();
        assert_eq!(one, all, "either alone has it all");
    }
    let images: Vec<_> = rams.iter().map(|ram| ram.image()).collect();
    for (txg, data) in &then {
        let past = open_at(&devices, &test, Some(*txg)).unwrap();
        assert_eq!(read_all(&past, file), *data);
    }
    assert!(rams.iter().zip(&images).all(|(ram, image)| ram.image() == *image));
}

#[test]
fn what_is_kept_for_older_groups_is_given_to_whoever_is_refused_room() {
    let mut story = Story::new(128 << 20);
    let data = noise(6 << 20, 21);
    for round in 0..4 {
        // What it replaces is given up, and kept.
        story.write(FILES + 1, 0, &data);
        story.write(round, 0, b"small");
        story.commit();
        story.fs().engine().tick();
    }
    let engine = story.fs().engine();
    let kept = engine.store.space.usage().data.pending_bytes;
    assert!(kept >= 12 << 20, "{kept} bytes are kept");
    let available = engine.room().available;
    let more = engine.reserve(available, 0, Class::Normal).unwrap();
    assert_eq!(engine.store.space.usage().data.pending_bytes, 0, "it was given free");
    drop(more);
    assert_eq!(engine.room().available, available);
    engine.store.space.check(&*engine.store).unwrap();
    story.close();
}
