//! Streams, against a model that is brought up to date with them; damaged and made-up ones.

use super::{Parent, Sender, Shipment};
use crate::btree::Tree;
use crate::error::Error;
use crate::format::inode::mode;
use crate::platform::{Codecs, Result, Timestamp};
use crate::stream::record::*;
use crate::stream::tests::*;
use crate::stream::verify::{Summary, Verifier};
use crate::stream::Content;
use crate::testing::TestPlatform;
use crate::vfs::*;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use proptest::prelude::*;

fn codecs() -> alloc::sync::Arc<dyn Codecs> {
    TestPlatform::new(1).platform.codecs
}

/// A stream as bytes.
fn send(fs: &Volume, old: Option<(&Tree, &Content)>, new: (&Tree, &Content)) -> Vec<u8> {
    let base = old.map(|(tree, content)| Parent {
        id: [1; 16],
        identity: content.identity(),
        tree: *tree,
    });
    let created = Timestamp { secs: -5, nanos: 6 };
    let (tree, content) = (*new.0, new.1);
    let (id, name) = ([2; 16], b"tuesday");
    let what = Shipment {
        id,
        created,
        name,
        below: b"",
        properties: None,
        tree,
        tree_bytes: 0,
        content,
        base,
        is_followed: false,
        resumes: None,
    };
    let mut sender = Sender::new(&fs.engine().store, &what);
    let (mut encoder, mut bytes) = (Encoder::default(), Vec::new());
    while let Some(record) = sender.next_record().unwrap() {
        bytes.extend(encoder.put(&*codecs(), &record));
    }
    assert_eq!(encoder.position().bytes, bytes.len() as u64);
    bytes
}

/// Reads a stream to its end: its records, each with its place.
fn decode(bytes: &[u8]) -> Result<Vec<(Record, u64)>> {
    let (codecs, mut decoder, mut records) = (codecs(), Decoder::default(), Vec::new());
    let mut rest = bytes;
    while decoder.need() > 0 {
        let at = decoder.position().bytes;
        if decoder.need() > rest.len() {
            return Err(Error::Stream { what: "the stream is cut off", at });
        }
        let (head, tail) = rest.split_at(decoder.need());
        rest = tail;
        records.extend(decoder.take(&*codecs, head)?.map(|record| (record, at)));
    }
    assert!(decoder.has_ended());
    assert_eq!(decoder.position().bytes as usize, bytes.len() - rest.len());
    Ok(records)
}

fn verify(bytes: &[u8]) -> Result<Summary> {
    let (codecs, mut verifier) = (codecs(), Verifier::default());
    for (record, at) in decode(bytes)? {
        verifier.take(&*codecs, &record, at)?;
    }
    assert!(verifier.has_ended());
    Ok(verifier.summary().clone())
}

/// What receives: a walk that records change. It is strict about what they may say.
fn apply(seen: &mut Seen, records: &[(Record, u64)]) {
    let mut ino = 0;
    let mut types = BTreeMap::new();
    for (record, _) in records {
        let current = seen.inodes.get_mut(&ino);
        match record.clone() {
            Record::Begin(_) | Record::Property { .. } | Record::End { .. } => {}
            Record::Gone { ino } => {
                seen.inodes.remove(&ino.0).expect("what goes was there");
                seen.names.retain(|(dir, _), _| *dir != ino.0);
            }
            Record::Unname { dir, ino, name } => {
                let (was, _) = seen.names.remove(&(dir.0, name)).expect("the name was there");
                assert_eq!(was, ino.0);
            }
            Record::Inode { ino: number, fields: f } => {
                ino = number.0;
                let fields = (f.mode, f.uid, f.gid, f.flags, f.rdev, f.size);
                let times = (f.mtime(), f.ctime(), f.btime());
                let mut is = match seen.inodes.remove(&ino) {
                    Some(was) if (was.fields.0 ^ f.mode) & mode::TYPE == 0 => was,
                    _ => SeenInode {
                        fields,
                        times,
                        data: Vec::new(),
                        target: Vec::new(),
                        attributes: BTreeMap::new(),
                    },
                };
                (is.fields, is.times) = (fields, times);
                is.data.resize(f.size as usize, 0);
                seen.inodes.insert(ino, is);
            }
            Record::Name { ino: named, file_type, name } => {
                let old = seen.names.insert((ino, name), (named.0, Vec::new()));
                assert!(old.is_none(), "a name is free before it is taken");
                types.insert(named.0, file_type);
            }
            Record::Target { target } => current.unwrap().target = target,
            Record::Attribute { name, value } => {
                current.unwrap().attributes.insert(name, value);
            }
            Record::Unattribute { name } => {
                current.unwrap().attributes.remove(&name).expect("the attribute was there");
            }
            Record::Data { offset, bytes } => {
                let at = offset as usize;
                current.unwrap().data[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            Record::Hole { offset, bytes } => {
                let at = offset as usize;
                current.unwrap().data[at..at + bytes as usize].fill(0);
            }
            Record::Clone { offset, bytes, source, from } => {
                let (at, from, len) = (offset as usize, from as usize, bytes as usize);
                let data = seen.inodes[&source.0].data[from..from + len].to_vec();
                seen.inodes.get_mut(&ino).unwrap().data[at..at + len].copy_from_slice(&data);
            }
        }
    }
    for (ino, file_type) in types {
        assert_eq!(seen.inodes[&ino].fields.0 & mode::TYPE, file_type);
    }
}

/// Without paths, which a stream does not have.
fn pathless(mut seen: Seen) -> Seen {
    seen.names.values_mut().for_each(|(_, path)| path.clear());
    seen
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_brings_any_state_to_any_other(
        which in 0..2usize,
        rounds in proptest::collection::vec(
            proptest::collection::vec(any::<Step>(), 1..20), 2..5),
    ) {
        let fs = new_volume(&options()[which]);
        let mut held = BTreeSet::new();
        let mut states = Vec::new();
        for steps in rounds {
            for step in steps {
                act(&fs, &mut held, step);
            }
            let view = view(&fs);
            let content = content(&fs, &view.tree);
            states.push((view, pathless(look(&fs)), content));
        }
        for (view, seen, content) in &states {
            let new = (&view.tree, content);
            let full = send(&fs, None, new);
            let mut received = Seen::default();
            apply(&mut received, &decode(&full).unwrap());
            prop_assert_eq!(&received, seen);
            let summary = verify(&full).unwrap();
            prop_assert_eq!(summary.inodes, seen.inodes.len() as u64);
            prop_assert_eq!(summary.names, seen.names.len() as u64);
            // Forward, back, and to itself.
            for (old_view, old_seen, old_content) in &states {
                let old = Some((&old_view.tree, old_content));
                let records = send(&fs, old, new);
                verify(&records).unwrap();
                let mut received = old_seen.clone();
                apply(&mut received, &decode(&records).unwrap());
                prop_assert_eq!(&received, seen);
            }
        }
    }

    #[test]
    fn one_content_is_one_stream_however_it_is_stored(
        mut steps in proptest::collection::vec(any::<Step>(), 1..40),
    ) {
        // How much is shared depends on it.
        steps.retain(|(what, ..)| what % 18 != COPY);
        let [plain, packed] = stored_twice(steps);
        prop_assume!(look(&plain) == look(&packed));
        let [a, b] = [&plain, &packed].map(|fs| {
            let view = view(fs);
            send(fs, None, (&view.tree, &content(fs, &view.tree)))
        });
        let totals = |bytes: &[u8]| verify(bytes).unwrap();
        prop_assert_eq!(totals(&a), totals(&b));
        prop_assert_eq!(a.len(), b.len());
    }

    #[test]
    fn made_up_bytes_are_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        kind in 0..16u16,
        seal in any::<bool>(),
    ) {
        prop_assert!(decode(&bytes).is_err());
        // With a right beginning, and a header and a checksum that are right as well.
        let mut encoder = Encoder::default();
        let begin = Begin {
            compat: 0,
            id: [3; 16],
            created: Timestamp { secs: 0, nanos: 0 },
            base: None,
            resumes: None,
            clones: true,
            below: Vec::new(),
            name: b"n".to_vec(),
        };
        let mut stream = encoder.put(&*codecs(), &Record::Begin(Box::new(begin)));
        match seal {
            false => stream.extend_from_slice(&bytes),
            true => stream.extend(forge(&stream, kind, &bytes)),
        }
        prop_assert!(verify(&stream).is_err());
    }
}

/// More files than are looked at together, and more data of one.
#[test]
fn a_tree_that_is_more_than_what_is_read_at_once_is_sent_whole() {
    for options in options() {
        let fs = new_volume(&options);
        let make = |name: &str| fs.mknod(fs.root(), name.as_bytes(), 0o100644, 0, &ROOT);
        let write = |ino, at, len, seed| {
            fs.write(ino, at, &pattern(len, seed), WriteFlags::default()).unwrap();
        };
        let large = make("large").unwrap().ino;
        write(large, 5000, 2_500_000, 1);
        write(large, 6_000_000, 200_000, 2);
        let small: Vec<_> = (0..1500).map(|n| make(&alloc::format!("{n}")).unwrap().ino).collect();
        for (n, ino) in (0..).zip(&small) {
            write(*ino, 0, 900 + 13 * (n as usize % 500), n);
        }
        let (old, old_seen) = (view(&fs), pathless(look(&fs)));
        for (n, ino) in (0..).zip(&small).step_by(3) {
            write(*ino, 4096, 2000, n);
        }
        write(large, 1_000_000, 900_000, 3);
        fs.fallocate(large, Fallocate::PunchHole, 300_000, 400_000).unwrap();
        let (new, new_seen) = (view(&fs), pathless(look(&fs)));
        let contents = [&old, &new].map(|view| content(&fs, &view.tree));
        let full = send(&fs, None, (&new.tree, &contents[1]));
        let part = send(&fs, Some((&old.tree, &contents[0])), (&new.tree, &contents[1]));
        for (stream, mut seen) in [(full, Seen::default()), (part, old_seen)] {
            verify(&stream).unwrap();
            apply(&mut seen, &decode(&stream).unwrap());
            assert!(seen == new_seen, "something else arrives");
        }
    }
}

/// A record that follows the only one in `stream`, with any body and a right checksum.
fn forge(stream: &[u8], kind: u16, body: &[u8]) -> Vec<u8> {
    let mut out = stream[stream.len() - CHECKSUM_BYTES..].to_vec();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&0u16.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&1u64.to_le_bytes());
    out.extend_from_slice(body);
    let checksum = codecs().blake3(&out);
    out.drain(..CHECKSUM_BYTES);
    out.extend_from_slice(&checksum);
    out
}

/// A small tree with one of everything, and its stream.
fn sample() -> Vec<u8> {
    let fs = new_volume(&options()[0]);
    let dir = fs.mkdir(fs.root(), b"d", 0o755, &ROOT).unwrap().ino;
    let file = fs.mknod(dir, b"f", 0o100644, 0, &ROOT).unwrap().ino;
    fs.write(file, 0, &[5; 600], WriteFlags::default()).unwrap();
    fs.write(file, 300_000, &[7; 100], WriteFlags::default()).unwrap();
    fs.setxattr(file, b"user.a", b"1", XattrMode::Either).unwrap();
    fs.symlink(dir, b"s", b"../there", &ROOT).unwrap();
    fs.mknod(dir, b"c", 0o020600, 77, &ROOT).unwrap();
    fs.link(file, fs.root(), b"g").unwrap();
    let view = view(&fs);
    send(&fs, None, (&view.tree, &content(&fs, &view.tree)))
}

#[test]
fn any_changed_bit_and_any_cut_is_found() {
    let stream = sample();
    let summary = verify(&stream).unwrap();
    assert_eq!((summary.inodes, summary.names, summary.attributes), (5, 5, 1));
    // A hole of 300 KB costs nothing.
    assert_eq!(summary.data_bytes, 4096 + 100 + 300_000 % 4096);
    assert_eq!(summary.hole_bytes, 0);
    let mut damaged = stream.clone();
    for at in 0..stream.len() {
        for bit in [at % 8, (at * 5 + 3) % 8] {
            damaged[at] ^= 1 << bit;
            assert!(decode(&damaged).is_err(), "bit {bit} of byte {at}");
            damaged[at] ^= 1 << bit;
        }
        assert!(decode(&stream[..at]).is_err(), "cut off at {at}");
    }
}

#[test]
fn records_cannot_be_left_out_repeated_or_swapped() {
    let stream = sample();
    let records = decode(&stream).unwrap();
    let mut starts: Vec<usize> = records.iter().map(|(_, at)| *at as usize).collect();
    starts.push(stream.len());
    let part = |index: usize| &stream[starts[index]..starts[index + 1]];
    let count = records.len();
    for index in 0..count - 1 {
        let mut parts: Vec<&[u8]> = (0..count).map(part).collect();
        parts.remove(index);
        assert!(decode(&parts.concat()).is_err(), "without record {index}");
        parts.insert(index, part(index));
        parts.insert(index, part(index));
        assert!(decode(&parts.concat()).is_err(), "record {index} twice");
        parts.remove(index);
        parts.swap(index, index + 1);
        assert!(decode(&parts.concat()).is_err(), "records {index} and the next swapped");
    }
}

#[test]
fn what_is_sealed_anew_but_another_content_is_found_by_its_identity() {
    let records = decode(&sample()).unwrap();
    let seal = |records: &[Record]| {
        let mut encoder = Encoder::default();
        records.iter().flat_map(|record| encoder.put(&*codecs(), record)).collect::<Vec<u8>>()
    };
    let whole: Vec<Record> = records.into_iter().map(|(record, _)| record).collect();
    verify(&seal(&whole)).unwrap();
    for index in 0..whole.len() {
        let mut less = whole.clone();
        if !matches!(less.remove(index), Record::Begin(_) | Record::End { .. }) {
            assert!(verify(&seal(&less)).is_err(), "without record {index}");
        }
        let mut other = whole.clone();
        match &mut other[index] {
            Record::Inode { fields, .. } => fields.uid += 1,
            Record::Name { name, .. } => name.push(b'x'),
            Record::Target { target } => target.push(b'x'),
            Record::Attribute { value, .. } => value.push(b'x'),
            Record::Data { bytes, .. } => bytes[0] ^= 1,
            Record::End { identity, .. } => identity.0[0] ^= 1,
            _ => continue,
        }
        assert!(verify(&seal(&other)).is_err(), "another record {index}");
    }
}

#[test]
fn a_length_is_refused_before_memory_is_taken_for_it() {
    let mut decoder = Decoder::default();
    let mut header = [0; HEADER_BYTES];
    header[0] = 1;
    header[4..8].copy_from_slice(&(BODY_BYTES_MAX as u32 + 1).to_le_bytes());
    assert_eq!(decoder.need(), HEADER_BYTES);
    assert!(decoder.take(&*codecs(), &header).is_err());
    let mut decoder = Decoder::default();
    header[4..8].copy_from_slice(&(BODY_BYTES_MAX as u32).to_le_bytes());
    assert_eq!(decoder.take(&*codecs(), &header), Ok(None));
    assert_eq!(decoder.need(), BODY_BYTES_MAX + CHECKSUM_BYTES);
}

#[test]
fn a_kind_that_may_be_passed_over_is_and_any_other_is_not() {
    let stream = sample();
    let records = decode(&stream).unwrap();
    let begin = &stream[..records[1].1 as usize];
    for (kind, is_known) in [(PASS_OVER | 99, true), (99, false)] {
        let mut decoder = Decoder::default();
        let mut rest = [begin, &forge(begin, kind, b"new")].concat();
        for _ in 0..3 {
            let tail = rest.split_off(decoder.need());
            decoder.take(&*codecs(), &rest).unwrap();
            rest = tail;
        }
        assert_eq!(decoder.take(&*codecs(), &rest).is_ok(), is_known);
    }
}

#[test]
fn an_overwritten_sector_costs_a_sector() {
    let fs = new_volume(&options()[0]);
    let file = fs.mknod(fs.root(), b"f", 0o100644, 0, &ROOT).unwrap().ino;
    for n in 0..200u32 {
        let name = alloc::format!("other {n}");
        fs.mknod(fs.root(), name.as_bytes(), 0o100644, 0, &ROOT).unwrap();
    }
    let noise: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(747796405) >> 11) as u8).collect();
    fs.write(file, 0, &noise, WriteFlags::default()).unwrap();
    let old = view(&fs);
    fs.write(file, 500_000, b"other", WriteFlags::default()).unwrap();
    fs.fallocate(file, Fallocate::PunchHole, 8192, 300_000 - 8192).unwrap();
    let new = view(&fs);
    let (a, b) = (content(&fs, &old.tree), content(&fs, &new.tree));
    let stream = send(&fs, Some((&old.tree, &a)), (&new.tree, &b));
    let summary = verify(&stream).unwrap();
    // The sector that was written, and the one that the hole ends in.
    assert_eq!((summary.inodes, summary.data_bytes), (1, 8192));
    assert_eq!(summary.hole_bytes, 299_008 - 8192);
    assert!(stream.len() < 10_000, "{} bytes", stream.len());
}

/// Streams as version 1 had them are read for good, and say what they said.
#[test]
fn streams_of_version_1_are_read() {
    let full = include_bytes!("../../../../images/streams/full-1.stream");
    let incremental = include_bytes!("../../../../images/streams/incremental-1.stream");
    let identity = |stream: &[u8]| match decode(stream).unwrap().pop() {
        Some((Record::End { identity, .. }, _)) => alloc::format!("{identity}"),
        _ => panic!("a stream ends with its end"),
    };
    let old = "d0fb85a3f38a4761613537e55f80813ae49561468184c3527028922fbe0f7a0f";
    let new = "7bb78ec24ec7928559e6a94d2650494d1596127dfc2d20a4605838fb26012084";
    assert_eq!((identity(full).as_str(), identity(incremental).as_str()), (old, new));
    let mut expected =
        Summary { inodes: 5, names: 5, attributes: 2, data_bytes: 10_088, ..Summary::default() };
    assert_eq!(verify(full).as_ref(), Ok(&expected));
    (expected.inodes, expected.gone, expected.names, expected.unnamed) = (4, 1, 2, 2);
    (expected.attributes, expected.data_bytes, expected.hole_bytes) = (1, 4099, 4096);
    assert_eq!(verify(incremental), Ok(expected));
    let mut seen = Seen::default();
    apply(&mut seen, &decode(full).unwrap());
    let file = seen.names[&(1, b"again".to_vec())].0;
    assert_eq!(seen.inodes[&file].data[300_000..305_000], [7; 5000]);
    apply(&mut seen, &decode(incremental).unwrap());
    assert!(!seen.names.contains_key(&(1, b"again".to_vec())));
    let file = &seen.inodes[&file];
    assert_eq!(file.data[4096..4100], *b"more");
    assert_eq!(file.data[300_000..303_104], [0; 3104]);
    assert_eq!(file.attributes[&b"user.colour"[..]], b"blue");
    assert_eq!(file.attributes.len(), 1);
}

/// And as they were when they first had clones, a place below, and properties.
#[test]
fn streams_with_clones_are_read() {
    let stream = include_bytes!("../../../../images/streams/clones-1.stream");
    let records = decode(stream).unwrap();
    let Record::Begin(begin) = &records[0].0 else { panic!("it begins") };
    assert_eq!((begin.compat, begin.clones, begin.resumes), (PROPERTIES, true, None));
    assert_eq!((&begin.below[..], &begin.name[..]), (&b"home/alice"[..], &b"shared"[..]));
    let property = |name: &str, value: &str| Record::Property {
        name: name.as_bytes().to_vec(),
        value: value.as_bytes().to_vec(),
    };
    assert_eq!(records[1].0, property("compression", "zstd:3"));
    assert_eq!(records[2].0, property("team:owner", "alice"));
    let summary = verify(stream).unwrap();
    assert_eq!((summary.inodes, summary.data_bytes, summary.cloned_bytes), (3, 20_000, 12_288));
    let mut seen = Seen::default();
    apply(&mut seen, &records);
    let data = |name: &[u8]| &seen.inodes[&seen.names[&(1, name.to_vec())].0].data;
    assert_eq!(data(b"one").len(), 20_000);
    assert_eq!(data(b"two")[8192..], data(b"one")[4096..16_384]);
    assert_eq!(data(b"two")[..8192], [0; 8192]);
}
