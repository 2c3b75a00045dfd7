//! What is received is what was sent, or is not there.

use super::{Destination, Receiver};
use crate::check::{check, CheckOptions, Quiet};
use crate::engine::versions::{PropertyChange, VersionOp};
use crate::engine::{format, FormatOptions, OpenOptions};
use crate::error::{Errno, Error};
use crate::format::inode::{mode, InodeItem};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::platform::{Result, Timestamp};
use crate::receive::{content_of, is_untouched, position};
use crate::stream::record::{Begin, Decoder, Encoder, Mark, Record};
use crate::stream::send::{Parent, Sender, Shipment};
use crate::stream::tests::{act, look, pattern, Seen, Step};
use crate::stream::{Content, Identity, Source};
use crate::testing::{RamDevice, TestPlatform};
use crate::units::{Ino, TreeId};
use crate::vfs::*;
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const HOME: u64 = TreeId::FIRST_SUBVOL.0;

/// A pool on a device in memory.
struct Host {
    device: Arc<RamDevice>,
    test: TestPlatform,
    fs: Arc<Volume>,
}

impl Host {
    fn new(options: &FormatOptions) -> Host {
        let device = RamDevice::new(96 << 20);
        let test = TestPlatform::new(9);
        format(vec![device.device()], test.platform.clone(), options).unwrap();
        let fs = Host::open(&device, &test);
        Host { device, test, fs }
    }

    fn open(device: &Arc<RamDevice>, test: &TestPlatform) -> Arc<Volume> {
        let (options, never) = (OpenOptions::default(), AccessTime::Never);
        Volume::open(vec![device.device()], test.platform.clone(), &options, never).unwrap()
    }

    fn change(&self, op: VersionOp) -> Result<u64> {
        self.fs.engine().change_versions(vec![op]).map(|ids| ids[0])
    }

    fn snapshot(&self, name: &str) -> u64 {
        let op = VersionOp::Snapshot { subvolume: HOME, name: name.into() };
        self.change(op).unwrap()
    }

    fn content(&self, id: u64) -> Content {
        content_of(self.fs.engine(), id, &mut |_| Ok(())).unwrap()
    }

    /// The content, from nothing but the tree.
    fn identity(&self, id: u64) -> Identity {
        let engine = self.fs.engine();
        let tree = engine.open_version(id).unwrap().view().tree;
        Content::of(Source::of(&engine.store), &tree, &mut |_| Ok(())).unwrap().identity()
    }

    fn send(&self, base: Option<u64>, id: u64) -> Vec<u8> {
        self.send_from(base, id, None)
    }

    fn send_from(&self, base: Option<u64>, id: u64, resumes: Option<Mark>) -> Vec<u8> {
        let engine = self.fs.engine();
        let item = |id| engine.with_versions(|versions| versions.get(id).unwrap().item);
        let open = |id| engine.open_version(id).unwrap();
        let (snapshot, content) = (open(id), self.content(id));
        let name = engine.with_versions(|versions| versions.get(id).unwrap().name.clone());
        let old = base.map(open);
        let parent = base.zip(old.as_ref()).map(|(base, old)| Parent {
            id: item(base).id,
            identity: self.content(base).identity(),
            tree: old.view().tree,
        });
        let what = Shipment {
            id: item(id).id,
            created: Timestamp { secs: item(id).created, nanos: 0 },
            name: &name,
            below: b"",
            properties: None,
            tree: snapshot.view().tree,
            tree_bytes: item(id).tree_bytes,
            content: &content,
            base: parent,
            is_followed: false,
            resumes,
        };
        let mut sender = Sender::new(&engine.store, &what);
        let codecs = &*self.test.platform.codecs;
        let (mut encoder, mut bytes) = (Encoder::default(), Vec::new());
        while let Some(record) = sender.next_record().unwrap() {
            bytes.extend(encoder.put(codecs, &record));
        }
        bytes
    }

    fn take_all(&self, to: &Destination, bytes: &[u8]) -> Result<u64> {
        self.take_and_check(to, bytes, u64::MAX)
    }

    /// As [`Host::take_all`]; what is stored when record `stop` was taken is checked.
    fn take_and_check(&self, to: &Destination, bytes: &[u8], stop: u64) -> Result<u64> {
        let codecs = &*self.test.platform.codecs;
        let (mut decoder, mut rest, mut receiver) = (Decoder::default(), bytes, None);
        let outcome = loop {
            if decoder.position().records == stop && receiver.is_some() {
                self.check();
            }
            let at = decoder.position().bytes;
            if decoder.need() == 0 {
                break Ok(());
            }
            if decoder.need() > rest.len() {
                break Err(Error::Stream { what: "cut off", at });
            }
            let (head, tail) = rest.split_at(decoder.need());
            rest = tail;
            let step = match decoder.take(codecs, head) {
                Ok(None) => continue,
                Ok(Some(Record::Begin(begin))) => {
                    let engine = self.fs.engine();
                    Receiver::begin(engine, to, &begin, &mut |_| Ok(()))
                        .map(|new| receiver = Some(new))
                }
                Ok(Some(record)) => receiver.as_mut().unwrap().take(record, at),
                Err(error) => Err(error),
            };
            if let Err(error) = step {
                break Err(error);
            }
        };
        match (outcome, receiver) {
            (Ok(()), Some(receiver)) => {
                let arrival = receiver.finish(&mut |_| Ok(()))?;
                self.change(VersionOp::Publish(*arrival))
            }
            (Err(error), Some(receiver)) => {
                receiver.abort().unwrap();
                Err(error)
            }
            (outcome, None) => outcome.map(|()| 0),
        }
    }

    fn receive(&self, to: &Destination, bytes: &[u8]) -> u64 {
        self.take_all(to, bytes).unwrap()
    }

    /// Receives a snapshot of another pool in so many parts and one, each but the last broken off;
    /// in between the power may fail.
    fn receive_in_parts(
        &mut self,
        (from, base, id): (&Host, Option<u64>, u64),
        to: &Destination,
        cuts: &[(u16, bool, bool)],
    ) -> Result<u64> {
        let mut resumes = None;
        for (cut, commits, fails) in cuts {
            let records = decode(from, &from.send_from(base, id, resumes));
            let Record::Begin(begin) = &records[0] else { panic!("it begins") };
            let engine = self.fs.engine().clone();
            let mut receiver = Receiver::begin(&engine, to, begin, &mut |_| Ok(()))?;
            let stop = 1 + usize::from(*cut) % records.len();
            for (at, record) in records[..stop].iter().enumerate().skip(1) {
                receiver.take(record.clone(), at as u64)?;
            }
            let working = receiver.working();
            if *commits {
                engine.commit()?;
            }
            if *fails {
                engine.shutdown();
            }
            match fails {
                false => receiver.pause()?,
                true => drop(receiver),
            }
            drop(engine);
            if *fails {
                self.fs = Host::open(&self.device, &self.test);
            }
            self.check();
            resumes = Some(position(self.fs.engine(), working)?);
        }
        self.take_all(to, &from.send_from(base, id, resumes))
    }

    fn look(&self, id: u64) -> Seen {
        let engine = self.fs.engine().clone();
        look(&Volume::of_version(engine, id, AccessTime::Never).unwrap())
    }

    /// Everything that a user can name.
    fn names(&self) -> Vec<Vec<u8>> {
        let named = |versions: &crate::subvol::versions::Versions| {
            let named = versions.iter().filter(|(_, version)| !version.item.is_deleted());
            named.map(|(_, version)| version.name.clone()).collect()
        };
        self.fs.engine().with_versions(named)
    }

    fn check(&self) {
        self.fs.sync().unwrap();
        let options = CheckOptions { data: true, ..CheckOptions::default() };
        let (device, platform) = (self.device.device(), self.test.platform.clone());
        let report = check(vec![device], platform, &options, &Quiet).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    }

    /// Until nothing is left of what was deleted.
    fn settle(&self) {
        for _ in 0..50 {
            self.fs.engine().tick();
        }
        self.fs.sync().unwrap();
    }
}

fn options(which: usize) -> FormatOptions {
    let plain = FormatOptions {
        compression: CompressionKind::None,
        checksum: ChecksumKind::Crc32c,
        ..FormatOptions::default()
    };
    let packed = FormatOptions {
        compression: CompressionKind::Zstd,
        checksum: ChecksumKind::Blake3,
        node_bytes: 65536,
        ..FormatOptions::default()
    };
    [plain, packed].into_iter().nth(which % 2).unwrap()
}

fn new(name: &str) -> Destination {
    Destination::New(name.into())
}

/// Paths do not differ, and would only be in the way.
fn pathless(mut seen: Seen) -> Seen {
    seen.names.values_mut().for_each(|(_, path)| path.clear());
    seen
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_history_is_received_by_a_pool_with_other_settings(
        which in 0..2usize,
        rounds in proptest::collection::vec(
            proptest::collection::vec(any::<Step>(), 1..24), 1..5),
        keeps in any::<[bool; 5]>(),
        stops in any::<[u16; 5]>(),
        cuts in any::<[[(u16, bool, bool); 2]; 5]>(),
        broken in any::<[bool; 5]>(),
    ) {
        let (from, mut to) = (Host::new(&options(which)), Host::new(&options(which + 1)));
        let mut held = BTreeSet::new();
        let mut sent: Vec<u64> = Vec::new();
        let mut into = 0;
        for (round, steps) in rounds.into_iter().enumerate() {
            for step in steps {
                act(&from.fs, &mut held, step);
            }
            let id = from.snapshot(&alloc::format!("s{round}"));
            // From the one before, or from any other.
            let base = match keeps[round] {
                true => sent.last().copied(),
                false => sent.get(round / 2).copied(),
            };
            let stream = from.send(base, id);
            let destination = match base {
                None => new("in"),
                Some(_) => Destination::Existing(into),
            };
            let stop = u64::from(stops[round]) % decode(&from, &stream).len() as u64;
            let there = match broken[round] {
                false => to.take_and_check(&destination, &stream, stop),
                true => to.receive_in_parts((&from, base, id), &destination, &cuts[round]),
            };
            let there = there.unwrap();
            let owner = |v: &crate::subvol::versions::Versions| v.get(there).unwrap().item.owner;
            into = to.fs.engine().with_versions(owner);
            prop_assert_eq!(pathless(to.look(there)), pathless(from.look(id)));
            prop_assert_eq!(to.identity(there), from.identity(id));
            // What is kept is what is there.
            prop_assert_eq!(to.content(there).encode(), from.content(id).encode());
            sent.push(id);
            to.check();
        }
        to.settle();
        to.check();
        prop_assert_eq!(to.names().len(), sent.len() + 2);
        // And back: what was received can be sent on.
        let last = to.fs.engine().with_versions(|v| v.snapshots(into).last().copied().unwrap());
        let stream = to.send(None, last);
        let back = from.receive(&new("back"), &stream);
        prop_assert_eq!(from.identity(back), to.identity(last));
        from.check();
    }

    #[test]
    fn a_stream_with_any_byte_changed_leaves_nothing(
        steps in proptest::collection::vec(any::<Step>(), 1..40),
        place in any::<u32>(),
        bit in 0..8u32,
        is_cut in any::<bool>(),
    ) {
        let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
        for step in steps {
            act(&from.fs, &mut BTreeSet::new(), step);
        }
        let mut stream = from.send(None, from.snapshot("s"));
        let at = place as usize % stream.len();
        match is_cut {
            true => stream.truncate(at),
            false => stream[at] ^= 1 << bit,
        }
        prop_assert!(to.take_all(&new("in"), &stream).is_err());
        prop_assert_eq!(to.names(), [b""]);
        to.settle();
        to.check();
    }

    #[test]
    fn records_that_lie_leave_nothing_or_what_they_say(
        steps in proptest::collection::vec(any::<Step>(), 1..30),
        more in proptest::collection::vec(any::<Step>(), 1..20),
        lies in proptest::collection::vec(any::<(u16, u8, u16)>(), 1..6),
    ) {
        let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
        for step in steps {
            act(&from.fs, &mut BTreeSet::new(), step);
        }
        let first = from.snapshot("first");
        let base = to.receive(&new("in"), &from.send(None, first));
        let into = to.fs.engine().with_versions(|v| v.get(base).unwrap().item.owner);
        for step in more {
            act(&from.fs, &mut BTreeSet::new(), step);
        }
        let second = from.snapshot("second");
        let mut records = decode(&from, &from.send(Some(first), second));
        for (at, how, number) in lies {
            lie(&mut records, at, how, number);
        }
        let stream = encode(&from, &records);
        let outcome = to.take_all(&Destination::Existing(into), &stream);
        if let Ok(id) = outcome {
            prop_assert_eq!(to.identity(id), from.identity(second));
        }
        let wanted = 3 + usize::from(outcome.is_ok());
        prop_assert_eq!(to.names().len(), wanted);
        to.settle();
        to.check();
    }
}

fn decode(host: &Host, mut bytes: &[u8]) -> Vec<Record> {
    let (mut decoder, mut records) = (Decoder::default(), Vec::new());
    while decoder.need() > 0 {
        let (head, tail) = bytes.split_at(decoder.need());
        bytes = tail;
        records.extend(decoder.take(&*host.test.platform.codecs, head).unwrap());
    }
    records
}

fn encode(host: &Host, records: &[Record]) -> Vec<u8> {
    let mut encoder = Encoder::default();
    let codecs = &*host.test.platform.codecs;
    records.iter().flat_map(|record| encoder.put(codecs, record)).collect()
}

/// Says something else in a record, leaves it out, repeats it or moves it.
fn lie(records: &mut Vec<Record>, at: u16, how: u8, number: u16) {
    let last = records.len() - 1;
    if last < 2 {
        return;
    }
    let at = 1 + usize::from(at) % (last - 1);
    let ino = Ino(1 + u64::from(number) % 24);
    match (how % 6, &mut records[at]) {
        (0, _) => drop(records.remove(at)),
        (1, record) => {
            let again = record.clone();
            records.insert(at, again);
        }
        (2, _) => records.swap(at, at.min(last - 2) + 1),
        (_, Record::Gone { ino: gone }) => *gone = ino,
        (3, Record::Unname { dir, .. }) => *dir = ino,
        (_, Record::Unname { ino: named, .. }) => *named = ino,
        (3, Record::Inode { fields, .. }) => {
            let kinds = [mode::REGULAR, mode::DIRECTORY, mode::SYMLINK, mode::FIFO];
            fields.mode = kinds[usize::from(number) % 4] | 0o644;
            if !fields.is_file() {
                fields.size = 0;
            }
        }
        (_, Record::Inode { ino: described, .. }) => *described = ino,
        (_, Record::Name { ino: named, .. }) => *named = ino,
        (3, Record::Clone { source, .. }) => *source = ino,
        (4, Record::Clone { from, .. }) => *from ^= u64::from(number) * 4096,
        (_, Record::Clone { offset, .. }) => *offset ^= u64::from(number) * 4096,
        (_, Record::Data { offset, .. }) => *offset ^= u64::from(number) * 4096,
        (_, Record::Attribute { name, .. }) => *name = b"system.posix_acl_access".to_vec(),
        _ => {}
    }
}

#[test]
fn what_an_incremental_stream_costs_is_what_changed() {
    let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
    let root = from.fs.root();
    for n in 0..40u32 {
        let name = alloc::format!("f{n}");
        let ino = from.fs.mknod(root, name.as_bytes(), 0o100644, 0, &ROOT).unwrap().ino;
        from.fs.write(ino, 0, &pattern(200_000, n + 7), WriteFlags::default()).unwrap();
    }
    let first = from.snapshot("first");
    let base = to.receive(&new("in"), &from.send(None, first));
    let into = to.fs.engine().with_versions(|v| v.get(base).unwrap().item.owner);
    let ino = from.fs.lookup(root, b"f7").unwrap().ino;
    from.fs.write(ino, 4096, &pattern(100, 3), WriteFlags::default()).unwrap();
    let second = from.snapshot("second");
    let stream = from.send(Some(first), second);
    assert!(stream.len() < 20_000, "{} bytes", stream.len());
    // Nor is it what the receiver reads.
    let engine = to.fs.engine();
    let records = decode(&from, &stream);
    let mut receiver = None;
    let mut read = 0;
    for (at, record) in records.into_iter().enumerate() {
        let mut progress = |_: &_| panic!("the content of the base is kept");
        match record {
            Record::Begin(begin) => {
                let to = Destination::Existing(into);
                receiver = Some(Receiver::begin(engine, &to, &begin, &mut progress).unwrap());
            }
            record => receiver.as_mut().unwrap().take(record, at as u64).unwrap(),
        }
    }
    let arrival = receiver.unwrap().finish(&mut |progress| {
        read = progress.bytes;
        Ok(())
    });
    assert_eq!(read, 2 * crate::stream::content::RECORD_BYTES);
    let id = to.change(VersionOp::Publish(*arrival.unwrap())).unwrap();
    assert_eq!(to.identity(id), from.identity(second));
    to.settle();
    to.check();
}

/// Bytes of data in a stream, and bytes that it only names.
fn sums(records: &[Record]) -> (u64, u64) {
    records.iter().fold((0, 0), |(data, cloned), record| match record {
        Record::Data { bytes, .. } => (data + bytes.len() as u64, cloned),
        Record::Clone { bytes, .. } => (data, cloned + bytes),
        _ => (data, cloned),
    })
}

#[test]
fn what_files_share_is_sent_once_and_stays_shared() {
    for which in 0..2 {
        let (from, to) = (Host::new(&options(which)), Host::new(&options(which + 1)));
        let make = |name: &[u8]| from.fs.mknod(from.fs.root(), name, 0o100644, 0, &ROOT).unwrap();
        let copy = |source, from_at, target, at, bytes| {
            let copied = from.fs.copy_range(source, from_at, target, at, bytes).unwrap();
            assert_eq!(copied, bytes);
        };
        const SIZE: u64 = 700_000;
        // Not what compression makes nothing of.
        let noise: Vec<u8> = (0..SIZE.div_ceil(8))
            .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes())
            .collect();
        let a = make(b"a").ino;
        from.fs.write(a, 0, &noise[..SIZE as usize], WriteFlags::default()).unwrap();
        let b = make(b"b").ino;
        copy(a, 0, b, 0, SIZE);
        let first = from.snapshot("first");
        let full = from.send(None, first);
        let (data, cloned) = sums(&decode(&from, &full));
        assert_eq!((data, cloned), (SIZE, SIZE), "all of it is sent once");
        let base = to.receive(&new("in"), &full);
        let used = || to.fs.engine().store.space.usage().data.used_bytes;
        let once = used();
        assert!(once < SIZE * 5 / 4, "{once} bytes are stored");
        assert_eq!(to.identity(base), from.identity(first));

        // Of what was there before, in another place, and of that.
        let c = make(b"c").ino;
        copy(a, 4096, c, 40_960, 400_000 / 4096 * 4096);
        let d = make(b"d").ino;
        copy(c, 40_960, d, 0, 80 * 4096);
        from.fs.write(a, 0, &[7; 8192], WriteFlags::default()).unwrap();
        let second = from.snapshot("second");
        let more = from.send(Some(first), second);
        let (data, cloned) = sums(&decode(&from, &more));
        assert_eq!((data, cloned), (8192, 400_000 / 4096 * 4096 + 80 * 4096));
        let into = to.fs.engine().with_versions(|v| v.get(base).unwrap().item.owner);
        let there = to.receive(&Destination::Existing(into), &more);
        assert!(used() < once + (200 << 10), "{} bytes are stored", used());
        assert_eq!(to.identity(there), from.identity(second));
        // A sender that goes on knows what came before.
        let rest = from.send_from(None, second, Some(Mark { ino: b.0, offset: 0 }));
        let (data, cloned) = sums(&decode(&from, &rest));
        assert_eq!(data, 8192, "what was overwritten in one of two");
        assert!(cloned > SIZE);
        to.settle();
        to.check();
    }
}

fn begin_of(name: &[u8]) -> Begin {
    let created = Timestamp { secs: 1, nanos: 2 };
    let (base, resumes, name) = (None, None, name.to_vec());
    Begin { compat: 0, id: [3; 16], created, base, resumes, clones: true, below: vec![], name }
}

#[test]
fn what_is_being_received_can_be_deleted_and_nothing_else() {
    let to = Host::new(&options(0));
    let engine = to.fs.engine();
    let begin = begin_of(b"s");
    let receiver = Receiver::begin(engine, &new("in"), &begin, &mut |_| Ok(())).unwrap();
    let id = engine.with_versions(|versions| versions.subvolume(b"in")).unwrap();
    let enter = || Volume::of_version(engine.clone(), id, AccessTime::Never);
    assert!(enter().is_err(), "nobody looks into it");
    let refused = [
        VersionOp::Snapshot { subvolume: id, name: b"x".to_vec() },
        VersionOp::Rename { id, name: b"x".to_vec() },
        VersionOp::SetDefault { subvolume: id },
        VersionOp::SetLimits { subvolume: id, referenced: 1, own: 1 },
        VersionOp::SetProperties { id, changes: vec![PropertyChange::ReadOnly(1)] },
        VersionOp::Delete { id },
    ];
    for op in refused {
        assert!(to.change(op.clone()).is_err(), "{op:?}");
    }
    // Nothing comes below it: it could not be deleted then.
    let (name, base) = (b"in/x".to_vec(), to.snapshot("other"));
    let elsewhere = VersionOp::CreateSubvolume { name: b"y".to_vec(), mode: 0, uid: 0, gid: 0 };
    let other = to.change(elsewhere).unwrap();
    for op in [
        VersionOp::CreateSubvolume { name: name.clone(), mode: 0o755, uid: 0, gid: 0 },
        VersionOp::Clone { snapshot: base, name: name.clone() },
        VersionOp::Rename { id: other, name: name.clone() },
        VersionOp::Receive { name, base: None, origin: [1; 16] },
    ] {
        assert!(to.change(op.clone()).is_err(), "{op:?}");
    }
    to.change(VersionOp::Delete { id: other }).unwrap();
    to.change(VersionOp::Delete { id: base }).unwrap();
    // Two at once do not disturb each other.
    assert!(Receiver::begin(engine, &new("in"), &begin, &mut |_| Ok(())).is_err());
    to.check();
    // As if it had been interrupted: what is left is hidden, and a new attempt takes its place.
    drop(receiver);
    assert!(enter().is_err());
    let receiver = Receiver::begin(engine, &new("in"), &begin, &mut |_| Ok(())).unwrap();
    receiver.abort().unwrap();
    assert_eq!(to.names(), [b""]);
    to.settle();
    to.check();
}

#[test]
fn a_crash_leaves_what_is_hidden_and_can_be_begun_anew() {
    let from = Host::new(&options(1));
    for n in 0..30u32 {
        let name = alloc::format!("d{n}");
        let dir = from.fs.mkdir(from.fs.root(), name.as_bytes(), 0o755, &ROOT).unwrap().ino;
        let file = from.fs.mknod(dir, b"f", 0o100644, 0, &ROOT).unwrap().ino;
        from.fs.write(file, 0, &pattern(20_000, n + 3), WriteFlags::default()).unwrap();
    }
    let id = from.snapshot("s");
    let stream = from.send(None, id);
    let records = decode(&from, &stream);
    for stop in [1, 20, 60, records.len() - 1] {
        let mut to = Host::new(&options(0));
        let engine = to.fs.engine().clone();
        let Record::Begin(begin) = &records[0] else { panic!("it begins") };
        let mut receiver = Receiver::begin(&engine, &new("in"), begin, &mut |_| Ok(())).unwrap();
        for (at, record) in records.iter().enumerate().take(stop).skip(1) {
            receiver.take(record.clone(), at as u64).unwrap();
        }
        engine.commit().unwrap();
        // Whoever syncs a file here makes nothing of that durable.
        let other = to.fs.mknod(to.fs.root(), b"other", 0o100644, 0, &ROOT).unwrap().ino;
        to.fs.fsync(other, false).unwrap();
        engine.shutdown();
        drop((receiver, engine));
        to.fs = Host::open(&to.device, &to.test);
        assert!(to.fs.lookup(to.fs.root(), b"other").is_ok());
        assert!(to.fs.engine().with_versions(|v| v.is_receiving(v.subvolume(b"in").unwrap())));
        to.check();
        let there = to.receive(&new("in"), &stream);
        assert_eq!(to.identity(there), from.identity(id));
        to.settle();
        to.check();
        assert_eq!(to.names().len(), 3);
    }
}

/// A stream that says what it is given, with the right identity for that.
fn made_up(host: &Host, records: Vec<Record>) -> Vec<u8> {
    let mut all = vec![Record::Begin(Box::new(begin_of(b"s")))];
    all.extend(records);
    // The identity that it has is not looked at before the rules are.
    all.push(Record::End { identity: Identity([0; 32]), elements: 0 });
    encode(host, &all)
}

#[test]
fn trees_that_cannot_be_are_refused_by_rule() {
    let to = Host::new(&options(0));
    let inode = |ino: u64, bits: u32| {
        let mut fields = Box::new(InodeItem::zeroed());
        fields.mode = bits;
        Record::Inode { ino: Ino(ino), fields }
    };
    let numbered = |ino: u64, bits: u32, rdev: u64| {
        let mut fields = Box::new(InodeItem::zeroed());
        (fields.mode, fields.rdev) = (bits, rdev);
        Record::Inode { ino: Ino(ino), fields }
    };
    let name = |ino: u64, file_type: u32, name: &[u8]| Record::Name {
        ino: Ino(ino),
        file_type,
        name: name.to_vec(),
    };
    let dir = mode::DIRECTORY;
    let root = || inode(1, dir | 0o755);
    let cases = [
        ("a directory with two names", vec![root(), name(2, dir, b"a"), name(2, dir, b"b")]),
        (
            "a directory below itself",
            vec![root(), inode(2, dir), name(3, dir, b"a"), inode(3, dir), name(2, dir, b"b")],
        ),
        ("a name of a directory in itself", vec![root(), name(1, dir, b"a")]),
        ("a name of an inode that does not come", vec![root(), name(2, mode::FIFO, b"a")]),
        (
            "a directory goes that holds something",
            vec![root(), inode(2, dir), name(3, mode::FIFO, b"a"), inode(3, mode::FIFO)],
        ),
        (
            "an inode with names is of another type",
            vec![root(), name(2, dir, b"a"), inode(2, mode::FIFO)],
        ),
        (
            "a symbolic link without a target",
            vec![root(), name(2, mode::SYMLINK, b"a"), inode(2, mode::SYMLINK)],
        ),
        (
            "a name that is taken",
            vec![root(), name(2, mode::FIFO, b"a"), name(3, mode::FIFO, b"a")],
        ),
        (
            "device number of something that is not a device",
            vec![root(), name(2, mode::FIFO, b"a"), numbered(2, mode::FIFO, 7)],
        ),
        ("what was received is not what was sent", vec![root()]),
    ];
    for (wanted, records) in cases {
        let stream = made_up(&to, records);
        match to.take_all(&new("in"), &stream) {
            Err(Error::Stream { what, .. }) => assert_eq!(what, wanted),
            other => panic!("{wanted}: {other:?}"),
        }
        assert_eq!(to.names(), [b""]);
    }
    to.settle();
    to.check();
}

#[test]
fn a_stream_comes_where_its_base_is() {
    let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
    let first = from.snapshot("first");
    from.fs.mkdir(from.fs.root(), b"d", 0o755, &ROOT).unwrap();
    let second = from.snapshot("second");
    let full = from.send(None, first);
    let stream = from.send(Some(first), second);
    let sentence = |outcome: Result<u64>| outcome.unwrap_err().to_string();
    assert!(sentence(to.take_all(&new("in"), &stream)).contains("goes on from"));
    assert!(sentence(to.take_all(&Destination::Existing(HOME), &stream)).contains("no snapshot"));
    let here = to.receive(&new("in"), &full);
    let into = to.fs.engine().with_versions(|v| v.get(here).unwrap().item.owner);
    assert!(to.take_all(&new("in"), &full).is_err(), "there is one of that name");
    to.receive(&Destination::Existing(into), &stream);
    assert!(to.take_all(&Destination::Existing(into), &stream).is_err(), "twice");
    to.settle();
    to.check();
}

#[test]
fn a_subvolume_follows_unless_it_changed_meanwhile() {
    let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
    let root = from.fs.root();
    let file = from.fs.mknod(root, b"f", 0o100644, 0, &ROOT).unwrap().ino;
    from.fs.write(file, 0, &pattern(50_000, 1), WriteFlags::default()).unwrap();
    let first = from.snapshot("first");
    let base = to.receive(&new("in"), &from.send(None, first));
    let engine = to.fs.engine();
    let into = engine.with_versions(|v| v.get(base).unwrap().item.owner);
    let enter = |id| Volume::of_version(engine.clone(), id, AccessTime::Never).unwrap();
    // Named before it was described: the times are those of the one that was sent.
    let seen = enter(base).lookup(root, b"f").unwrap();
    assert_eq!((seen.atime, seen.mtime), (seen.mtime, from.fs.getattr(file).unwrap().mtime));
    from.fs.write(file, 4096, &pattern(100, 3), WriteFlags::default()).unwrap();
    let second = from.snapshot("second");
    let here = to.receive(&Destination::Existing(into), &from.send(Some(first), second));
    let root_now = || {
        engine.commit().unwrap();
        engine.subvol(TreeId(into)).unwrap().item().root
    };
    let untouched = || {
        let (was, is) = (engine.open_version(base).unwrap(), engine.open_version(into).unwrap());
        is_untouched(engine, &was.view().tree, &is.view().tree).unwrap()
    };
    let was = root_now();
    assert!(untouched());
    let fs = enter(into);
    let set =
        SetAttr { atime: Some(SetTime::At(Timestamp { secs: 5, nanos: 6 })), ..SetAttr::default() };
    fs.setattr(seen.ino, &SetAttr { ctime: Some(seen.ctime), ..set }, &ROOT).unwrap();
    let read = root_now();
    assert!(untouched(), "it was only read");
    fs.write(seen.ino, 0, b"mine", WriteFlags::default()).unwrap();
    drop(fs);
    let written = root_now();
    assert!(!untouched());
    for root in [was, read] {
        let refused = to.change(VersionOp::Follow { snapshot: here, root });
        assert!(matches!(refused, Err(Error::Posix(crate::error::Errno::Busy))));
    }
    let mut kept = [0; 4];
    enter(into).read(seen.ino, 0, &mut kept).unwrap();
    assert_eq!(&kept, b"mine");
    to.change(VersionOp::Follow { snapshot: here, root: written }).unwrap();
    assert_eq!(pathless(look(&enter(into))), pathless(from.look(second)));
    assert_eq!(to.names().len(), 4, "what it was is gone: {:?}", to.names());
    to.settle();
    to.check();
}

#[test]
fn what_is_received_where_changes_are_refused_comes_and_is_read_only() {
    let (from, to) = (Host::new(&options(0)), Host::new(&options(1)));
    let file = from.fs.mknod(from.fs.root(), b"f", 0o100644, 0, &ROOT).unwrap().ino;
    from.fs.write(file, 0, &pattern(200_000, 3), WriteFlags::default()).unwrap();
    let first = from.snapshot("first");
    from.fs.mkdir(from.fs.root(), b"d", 0o755, &ROOT).unwrap();
    let second = from.snapshot("second");
    to.change(VersionOp::SetProperties { id: HOME, changes: vec![PropertyChange::ReadOnly(2)] })
        .unwrap();
    let here = to.receive(&new("in"), &from.send(None, first));
    let into = to.fs.engine().with_versions(|v| v.get(here).unwrap().item.owner);
    let there = to.receive(&Destination::Existing(into), &from.send(Some(first), second));
    assert_eq!(to.identity(there), from.identity(second));
    let volume = Volume::of_version(to.fs.engine().clone(), into, AccessTime::Never).unwrap();
    let tried = volume.mkdir(volume.root(), b"x", 0o755, &ROOT);
    assert_eq!(tried.unwrap_err().errno(), Errno::RoFs);
    drop(volume);
    to.settle();
    to.check();
}

#[test]
fn what_one_stream_began_another_cannot_leave_unfinished() {
    let to = Host::new(&options(0));
    let engine = to.fs.engine();
    let inode = |ino: u64, bits: u32| {
        let mut fields = Box::new(InodeItem::zeroed());
        fields.mode = bits;
        Record::Inode { ino: Ino(ino), fields }
    };
    let name = |ino: u64, file_type: u32, name: &[u8]| Record::Name {
        ino: Ino(ino),
        file_type,
        name: name.to_vec(),
    };
    // A link that leads nowhere yet, and a name of what has not come.
    for began in [
        vec![inode(1, mode::DIRECTORY), name(7, mode::SYMLINK, b"a"), inode(7, mode::SYMLINK)],
        vec![inode(1, mode::DIRECTORY), name(7, mode::FIFO, b"a"), inode(3, mode::FIFO)],
    ] {
        let begin = begin_of(b"s");
        let mut receiver = Receiver::begin(engine, &new("in"), &begin, &mut |_| Ok(())).unwrap();
        for (at, record) in began.into_iter().enumerate() {
            receiver.take(record, at as u64).unwrap();
        }
        let working = receiver.working();
        receiver.pause().unwrap();
        let mark = position(engine, working).unwrap();
        for resumes in [mark, Mark { ino: 1, offset: 0 }] {
            let begin = Begin { resumes: Some(resumes), ..begin_of(b"s") };
            let resumed = Receiver::begin(engine, &new("in"), &begin, &mut |_| Ok(()));
            let mut receiver = resumed.unwrap();
            receiver.take(inode(8, mode::FIFO), 0).unwrap();
            let end = Record::End { identity: Identity([0; 32]), elements: 0 };
            match receiver.take(end, 1) {
                Err(Error::Stream { what, .. }) => assert!(what.contains("does not come")),
                other => panic!("{other:?}"),
            }
        }
        to.change(VersionOp::Delete { id: working }).unwrap();
    }
    to.settle();
    to.check();
}
