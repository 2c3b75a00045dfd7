//! Round trips, healing with every kind of damage, and the ledger against a model.

use super::*;
use crate::buf::{Buf, Slice};
use crate::codec;
use crate::device::Standing;
use crate::error::Incident;
use crate::format::chunk::Stripe;
use crate::format::extent::Blob;
use crate::format::key::{kind, Key};
use crate::format::ptr::{BlockPtr, ChecksumKind, CompressionKind};
use crate::platform::{Device, DeviceError, Entropy, Geometry, ReadOp, WriteOp};
use crate::testing::{CrateCodecs, RamDevice, SeededEntropy, TestPlatform, ThreadWorkers};
use alloc::collections::BTreeMap;
use alloc::vec;
use core::ops::Range;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const SECTOR: usize = SECTOR_BYTES as usize;

struct Fixture {
    ram: Arc<RamDevice>,
    env: TestPlatform,
    pool: Pool,
}

impl Fixture {
    fn new(bytes: u64) -> Fixture {
        Fixture::with(bytes, FormatOptions::default())
    }

    fn with(bytes: u64, options: FormatOptions) -> Fixture {
        let (ram, env) = (RamDevice::new(bytes), TestPlatform::new(1));
        let pool = Pool::create(vec![ram.device()], env.platform.clone(), &options).unwrap();
        Fixture { ram, env, pool }
    }

    /// A data pool with two copies of data.
    fn dup() -> Fixture {
        Fixture::with(16 * MIB, FormatOptions { data_profile: Profile::Dup, ..Default::default() })
    }

    fn open(&self, options: PoolOptions) -> Result<(Box<Pool>, Superblock)> {
        Pool::open(vec![self.ram.device()], self.env.platform.clone(), &options)
            .map(|(pool, superblock)| (pool, *superblock))
    }

    fn reopen(self, options: PoolOptions) -> Fixture {
        let (pool, superblock) = self.open(options).unwrap();
        let chunks = self.pool.chunks();
        assert!(chunks.iter().all(|chunk| chunk.logical < superblock.next_chunk));
        pool.add_chunks(chunks).unwrap();
        Fixture { pool: *pool, ..self }
    }

    /// A superblock of what the pool is now.
    fn superblock(&self, txg: u64) -> Superblock {
        Superblock {
            txg: Txg(txg),
            written: 0,
            pool_id: self.pool.pool_id(),
            features: [0; 3],
            hash_secret: [3; 16],
            node_bytes: self.pool.node_bytes(),
            device_count: self.pool.members().len() as u16,
            data_profile: self.pool.profile(ChunkKind::Data),
            metadata_profile: self.pool.profile(ChunkKind::Metadata),
            clean: false,
            next_chunk: self.pool.next_chunk(),
            chunk_bytes: self.pool.chunk_bytes(),
            next_subvol: 256,
            default_subvol: 256,
            pool_root: None,
            chunk_root: None,
            space_root: None,
            refs_root: None,
            dead_root: None,
            residue: None,
            log: None,
            data_used: 0,
            metadata_used: 0,
            system_chunks: self.pool.system_chunks(),
        }
    }

    fn commit(&self, txg: u64) {
        self.pool.flush().unwrap();
        self.pool.write_superblock(&self.superblock(txg)).unwrap();
        self.pool.flush().unwrap();
    }

    fn chunk(&self, kind: ChunkKind) -> Chunk {
        self.pool.create_chunk(kind, Txg(1), 0).unwrap()
    }

    /// Writes `content` as a block at the start of a new metadata chunk.
    fn block(&self, content: &[u8], compression: CompressionKind) -> BlockPtr {
        let chunk = self.chunk(ChunkKind::Metadata);
        let packed = codec::compress(&CrateCodecs, compression, 3, content, Buf::zeroed);
        let (buf, stored, compression) = match packed {
            Some(packed) => (packed.buf, packed.stored, compression),
            None => (Buf::copy_of(content).unwrap(), content.len() as u32, CompressionKind::None),
        };
        let checksum = codec::checksum(&CrateCodecs, ChecksumKind::Blake3, &buf[..stored as usize]);
        self.write(chunk.logical, buf);
        BlockPtr {
            addr: chunk.logical,
            birth: Txg(1),
            stored,
            logical: content.len() as u32,
            compression,
            level: 0,
            checksum,
        }
    }

    fn write(&self, addr: Logical, buf: Buf) {
        self.pool.write(vec![RunWrite { addr, bufs: vec![buf.into_slice()] }]).unwrap();
    }

    /// Where the copies of an address are on the only device.
    fn places(&self, addr: Logical) -> Vec<u64> {
        let copies = self.pool.map(addr, SECTOR_BYTES).unwrap();
        copies.iter().map(|pieces| pieces[0].1 .0).collect()
    }

    /// Writes plain data at the start of a new data chunk.
    fn plain(&self, content: &[u8], checksum_kind: ChecksumKind) -> DataSource {
        let chunk = self.chunk(ChunkKind::Data);
        self.write(chunk.logical, Buf::copy_of(content).unwrap());
        DataSource::Plain {
            addr: chunk.logical,
            len: content.len() as u64,
            checksum_kind,
            checksums: codec::checksum_sectors(&CrateCodecs, checksum_kind, content).unwrap(),
        }
    }

    fn read(&self, source: &DataSource) -> Result<Buf> {
        let mut reads = [DataRead::new(source.clone())];
        self.pool.read_data(&mut reads);
        let [read] = reads;
        read.result.map(|()| read.buf)
    }
}

fn addr_of(source: &DataSource) -> Logical {
    source.run().addr
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    SeededEntropy::new(seed).fill(&mut noise);
    noise
}

fn read_only() -> PoolOptions {
    PoolOptions { read_only: true, ..PoolOptions::default() }
}

#[test]
fn a_created_pool_is_opened_as_it_was_made() {
    let mut name = [0; 64];
    name[..4].copy_from_slice(b"tank");
    let options = FormatOptions {
        name,
        pool_id: Some([5; 16]),
        node_bytes: 32768,
        data_profile: Profile::Dup,
        metadata_profile: Profile::Single,
        chunk_bytes: Some(2 * MIB),
    };
    let fixture = Fixture::with(64 * MIB, options);
    assert_eq!(fixture.open(PoolOptions::default()).err(), Some(Error::NoSuperblock));
    let system = fixture.chunk(ChunkKind::System);
    fixture.commit(1);
    let (pool, superblock) = fixture.open(PoolOptions::default()).unwrap();
    assert_eq!(superblock, fixture.superblock(1));
    assert_eq!(pool.name(), name);
    assert_eq!(pool.pool_id(), [5; 16]);
    assert_eq!((pool.node_bytes(), pool.chunk_bytes()), (32768, 2 * MIB));
    assert_eq!(pool.profile(ChunkKind::Data), Profile::Dup);
    assert_eq!(pool.chunks(), vec![system]);
    assert_eq!(pool.newest_txg(), Txg(1));
    pool.check().unwrap();
}

#[test]
fn a_pool_of_the_minimum_size_holds_a_chunk_of_each_kind() {
    for profile in [Profile::Single, Profile::Dup] {
        let options = FormatOptions { data_profile: profile, ..Default::default() };
        let minimum = Pool::minimum_bytes(profile, Profile::Dup);
        assert!(minimum <= 9 * MIB, "{minimum}");
        let fixture = Fixture::with(minimum, options.clone());
        for kind in [ChunkKind::System, ChunkKind::Metadata, ChunkKind::Data] {
            fixture.chunk(kind);
        }
        let ram = RamDevice::new(minimum - 4096);
        let error = Pool::create(vec![ram.device()], fixture.env.platform.clone(), &options);
        assert_eq!(error.err(), Some(Error::TooSmall { minimum }));
    }
}

#[test]
fn chunk_sizes_follow_the_size_of_the_pool() {
    for (pool, chunk) in [
        (0, MIB),
        (8 * MIB, MIB),
        (1024 * MIB, 4 * MIB),
        (1536 * MIB, 4 * MIB),
        (1 << 40, 1 << 30),
        (u64::MAX, 1 << 30),
    ] {
        assert_eq!(Pool::default_chunk_bytes(pool), chunk, "{pool}");
    }
}

#[test]
fn options_out_of_range_are_refused_before_anything_is_written() {
    let env = TestPlatform::new(1);
    let ram = RamDevice::from_image(vec![0xee; 16 << 20]);
    let mut bad_name = [0; 64];
    bad_name[1] = b'x';
    for options in [
        FormatOptions { node_bytes: 8192, ..Default::default() },
        FormatOptions { data_profile: Profile::Parity1, ..Default::default() },
        FormatOptions { metadata_profile: Profile::Mirror, ..Default::default() },
        FormatOptions { metadata_profile: Profile::Parity3, ..Default::default() },
        FormatOptions { chunk_bytes: Some(3 * MIB), ..Default::default() },
        FormatOptions { chunk_bytes: Some(MIB / 2), ..Default::default() },
        FormatOptions { name: bad_name, ..Default::default() },
        FormatOptions { name: [0xff; 64], ..Default::default() },
    ] {
        let made = Pool::create(vec![ram.device()], env.platform.clone(), &options);
        assert!(matches!(made.err(), Some(Error::Argument { .. })), "{options:?}");
    }
    assert!(ram.image().iter().all(|byte| *byte == 0xee));
}

#[test]
fn a_device_that_refuses_writes_opens_read_only_and_no_other_way() {
    let fixture = Fixture::new(16 * MIB);
    fixture.commit(1);
    fixture.ram.faults(|faults| faults.read_only = true);
    assert_eq!(fixture.open(PoolOptions::default()).err(), Some(Error::ReadOnly));
    let (pool, _) = fixture.open(read_only()).unwrap();
    assert_eq!(pool.create_chunk(ChunkKind::Data, Txg(2), 0).err(), Some(Error::ReadOnly));
    assert_eq!(pool.write(vec![]).err(), Some(Error::ReadOnly));
    assert_eq!(pool.set_name([0; 64]).err(), Some(Error::ReadOnly));
}

#[test]
fn a_damaged_label_is_told_and_repaired() {
    let fixture = Fixture::new(16 * MIB);
    fixture.commit(1);
    fixture.ram.flip(65536 + 100);
    let (pool, _) = fixture.open(read_only()).unwrap();
    assert_eq!(pool.repair_labels().err(), Some(Error::ReadOnly));
    let (pool, _) = fixture.open(PoolOptions::default()).unwrap();
    let damaged: Vec<(u16, usize)> =
        pool.damaged_labels().iter().map(|label| (label.device, label.area)).collect();
    assert_eq!(damaged, [(0, 0)]);
    pool.repair_labels().unwrap();
    assert_eq!(pool.damaged_labels(), []);
    let (pool, _) = fixture.open(PoolOptions::default()).unwrap();
    assert_eq!(pool.damaged_labels(), []);
}

#[test]
fn a_new_name_is_there_after_opening_again() {
    let fixture = Fixture::new(16 * MIB);
    fixture.commit(1);
    let mut name = [0; 64];
    name[..5].copy_from_slice(b"depot");
    fixture.pool.set_name(name).unwrap();
    assert_eq!(fixture.open(read_only()).unwrap().0.name(), name);
}

#[test]
fn a_new_name_goes_without_a_device_that_can_be_done_without() {
    let (rams, fixture, _) = published_mirror(2);
    rams[0].faults(|faults| faults.gone = true);
    fixture.pool.set_name([b'n'; 64]).unwrap();
    assert_eq!(fixture.pool.absent(), [0]);
    assert_eq!(probe(&*rams[1].device(), 1).unwrap().identity.name, [b'n'; 64]);
    // The other one cannot, and is none the worse for it.
    rams[1].faults(|faults| faults.fail_writes.push(0..u64::MAX));
    fixture.pool.set_name([b'm'; 64]).unwrap_err();
    fixture.pool.set_name([b'm'; 64]).unwrap_err();
    rams[1].faults(|faults| faults.fail_writes.clear());
    fixture.pool.flush().unwrap();
    fixture.commit(2);
    fixture.pool.set_name([b'm'; 64]).unwrap();
    assert_eq!(fixture.pool.absent(), [0]);
    assert_eq!(probe(&*rams[1].device(), 1).unwrap().identity.name, [b'm'; 64]);
}

#[test]
fn a_name_that_the_only_device_did_not_take_can_be_given_again() {
    let fixture = Fixture::new(16 * MIB);
    fixture.commit(1);
    fixture.ram.faults(|faults| faults.fail_writes.push(0..u64::MAX));
    fixture.pool.set_name([b'n'; 64]).unwrap_err();
    fixture.ram.faults(|faults| faults.fail_writes.clear());
    fixture.pool.set_name([b'n'; 64]).unwrap();
    fixture.commit(2);
    assert_eq!(fixture.open(read_only()).unwrap().0.name(), [b'n'; 64]);
}

#[test]
fn going_back_opens_the_older_group_and_knows_of_the_newer() {
    let fixture = Fixture::new(32 * MIB);
    fixture.commit(1);
    fixture.chunk(ChunkKind::Data);
    fixture.commit(2);
    let options = PoolOptions { txg: Some(Txg(1)), ..Default::default() };
    assert!(matches!(fixture.open(options), Err(Error::Argument { .. })), "only to read");
    let options = PoolOptions { read_only: true, ..options };
    let (pool, superblock) = fixture.open(options).unwrap();
    assert_eq!((superblock.txg, pool.newest_txg()), (Txg(1), Txg(2)));
    assert!(pool.is_past());
    let newest = PoolOptions { txg: Some(Txg(2)), ..options };
    assert!(!fixture.open(newest).unwrap().0.is_past());
    let error = fixture.open(PoolOptions { txg: Some(Txg(7)), ..options }).map(drop).unwrap_err();
    let others = vec![Txg(2), Txg(1)];
    assert_eq!(error, Error::NoGroup { txg: Some(Txg(7)), cause: None, others });
    assert_eq!(pool.next_chunk(), fixture.pool.next_chunk(), "addresses are not used twice");
    let all: Vec<u64> = pool.superblocks().iter().map(|sb| sb.txg.0).collect();
    assert_eq!(all, [2, 1]);
}

#[test]
fn devices_that_do_not_belong_together_are_refused() {
    let env = TestPlatform::new(1);
    let make = |count: usize| {
        let rams: Vec<_> = (0..count).map(|_| RamDevice::new(16 * MIB)).collect();
        let devices = rams.iter().map(|ram| ram.device()).collect();
        let pool = Pool::create(devices, env.platform.clone(), &FormatOptions::default()).unwrap();
        let fixture = Fixture { ram: rams[0].clone(), env: TestPlatform::new(2), pool };
        fixture.commit(1);
        rams
    };
    let open = |rams: &[&Arc<RamDevice>]| {
        let devices = rams.iter().map(|ram| ram.device()).collect();
        Pool::open(devices, env.platform.clone(), &PoolOptions::default()).map(|_| ())
    };
    let (a, b) = (make(2), make(1));
    open(&[&a[1], &a[0]]).unwrap();
    let missing = |result| match result {
        Err(Error::MissingDevices { devices, needed: false, .. }) => devices[0].0,
        other => panic!("{other:?}"),
    };
    assert_eq!(missing(open(&[&a[0]])), 1);
    assert_eq!(missing(open(&[&a[1]])), 0);
    assert!(matches!(open(&[&a[0], &b[0]]), Err(Error::WrongDevice { .. })));
    assert!(matches!(open(&[&a[0], &a[0]]), Err(Error::WrongDevice { .. })));
    assert!(matches!(open(&[]), Err(Error::Argument { .. })));
}

#[test]
fn unknown_features_forbid_what_they_should() {
    let fixture = Fixture::new(16 * MIB);
    let mut superblock = fixture.superblock(1);
    superblock.features = [1, 4, 0];
    fixture.pool.write_superblock(&superblock).unwrap();
    let error = Error::Features { class: FeatureClass::RoCompat, unknown: 4 };
    assert_eq!(fixture.open(PoolOptions::default()).err(), Some(error));
    fixture.open(read_only()).unwrap();
    superblock.features = [0, 0, 1 << 40];
    superblock.txg = Txg(2);
    fixture.pool.write_superblock(&superblock).unwrap();
    let error = Error::Features { class: FeatureClass::Incompat, unknown: 1 << 40 };
    assert_eq!(fixture.open(read_only()).err(), Some(error));
}

#[test]
fn a_superblock_whose_system_chunks_cannot_be_is_refused() {
    let broken: [fn(&mut Superblock); 6] = [
        |sb| sb.system_chunks[0].stripes[1].physical = sb.system_chunks[0].stripes[0].physical,
        |sb| sb.system_chunks[0].stripes[0].device = 1,
        |sb| sb.system_chunks[0].stripes[0].physical = Physical(0),
        |sb| sb.system_chunks[0].stripes[0].physical = Physical(15 * MIB),
        |sb| sb.system_chunks[0].kind = ChunkKind::Data,
        |sb| sb.next_chunk = sb.system_chunks[0].logical,
    ];
    for (case, change) in broken.iter().enumerate() {
        let fixture = Fixture::new(16 * MIB);
        fixture.chunk(ChunkKind::System);
        let mut superblock = fixture.superblock(1);
        change(&mut superblock);
        fixture.pool.write_superblock(&superblock).unwrap();
        let error = fixture.open(PoolOptions::default()).err();
        assert!(matches!(error, Some(Error::Corrupt { .. })), "case {case}: {error:?}");
    }
}

#[test]
fn chunk_items_that_overlap_are_refused_and_change_nothing() {
    let fixture = Fixture::new(32 * MIB);
    let data = fixture.chunk(ChunkKind::Data);
    fixture.chunk(ChunkKind::Metadata);
    let before = fixture.pool.chunks();
    let free = fixture.pool.unallocated_bytes();
    let stripe = |device, at: u64| Stripe { device, physical: Physical(at) };
    let item = |logical: u64, stripes| Chunk { logical: Logical(logical), stripes, ..data.clone() };
    let last = fixture.pool.next_chunk().0 - MIB;
    let taken = data.stripes[0].physical.0;
    for bad in [
        vec![item(data.logical.0, vec![stripe(0, 9 * MIB)])],
        vec![item(last + MIB, vec![stripe(0, 9 * MIB)])],
        vec![item(0, vec![stripe(0, 9 * MIB)])],
        vec![item(last, vec![stripe(0, taken)])],
        vec![item(last, vec![stripe(0, taken + 4096)])],
        vec![item(last, vec![stripe(0, 31 * MIB)])],
        vec![item(last, vec![stripe(0, u64::MAX - 4095)])],
        vec![item(last, vec![stripe(9, 9 * MIB)])],
    ] {
        let error = fixture.pool.add_chunks(bad.clone()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{bad:?}: {error:?}");
        assert_eq!(fixture.pool.chunks(), before);
        assert_eq!(fixture.pool.unallocated_bytes(), free);
        fixture.pool.check().unwrap();
    }
    fixture.pool.add_chunks(before.clone()).unwrap();
    assert_eq!(fixture.pool.chunks(), before, "a chunk that is mapped already is skipped");
}

#[test]
fn a_device_item_must_agree_with_the_label() {
    let fixture = Fixture::new(16 * MIB);
    fixture.chunk(ChunkKind::Data);
    let edits = fixture.pool.take_chunk_edits(Txg(1));
    assert_eq!(edits[0].0, Key::new(0, kind::DEVICE, 0));
    let mut item = DeviceItem::decode(edits[0].1.as_ref().unwrap()).unwrap();
    assert_eq!(item.allocated, MIB);
    item.read_errors = 3;
    fixture.pool.add_device_item(0, &item).unwrap();
    assert_eq!(fixture.pool.members()[0].errors().read, 3);
    assert!(fixture.pool.take_chunk_edits(Txg(2)).is_empty(), "nothing has changed");
    assert!(fixture.pool.add_device_item(1, &item).is_err());
    item.id[0] ^= 1;
    assert!(fixture.pool.add_device_item(0, &item).is_err());
}

#[test]
fn copies_of_a_chunk_are_far_apart() {
    let fixture = Fixture::dup();
    let chunk = fixture.chunk(ChunkKind::Data);
    let distance = chunk.stripes[1].physical.0 - chunk.stripes[0].physical.0;
    assert!(distance > 8 * MIB, "{distance}");
}

#[test]
fn a_chunk_shrinks_to_what_is_left() {
    let options = FormatOptions { chunk_bytes: Some(8 * MIB), ..Default::default() };
    let fixture = Fixture::with(17 * MIB, options);
    let lengths: Vec<u64> = core::iter::from_fn(|| {
        fixture.pool.create_chunk(ChunkKind::Data, Txg(1), 0).ok().map(|chunk| chunk.length / MIB)
    })
    .collect();
    assert_eq!(lengths, [8, 4, 2, 1]);
    assert_eq!(fixture.pool.unallocated_bytes(), 0);
    let error = fixture.pool.create_chunk(ChunkKind::Data, Txg(1), 0).err();
    assert_eq!(error, Some(Error::NoSpace));
}

#[test]
fn the_superblock_never_gets_more_system_chunks_than_it_can_embed() {
    let fixture = Fixture::new(64 * MIB);
    for _ in 0..16 {
        fixture.chunk(ChunkKind::System);
    }
    let error = fixture.pool.create_chunk(ChunkKind::System, Txg(1), 0).err();
    assert_eq!(error, Some(Error::NoSpace));
    let _ = fixture.superblock(1).encode();
}

#[test]
fn system_chunks_become_larger_when_there_are_many() {
    let options = FormatOptions { metadata_profile: Profile::Single, ..Default::default() };
    let fixture = Fixture::with(64 * MIB, options.clone());
    let lengths: Vec<u64> =
        (0..10).map(|_| fixture.chunk(ChunkKind::System).length / MIB).collect();
    assert_eq!(lengths, [1, 1, 1, 1, 4, 4, 4, 4, 4, 4]);
    let small = Fixture::with(14 * MIB, options.clone());
    assert!((0..8).all(|_| small.chunk(ChunkKind::System).length == MIB));
}

#[test]
fn a_dropped_chunk_is_readable_and_its_room_taken_until_its_group_is_published() {
    let fixture = Fixture::new(16 * MIB);
    let system = fixture.chunk(ChunkKind::System);
    let chunk = fixture.chunk(ChunkKind::Data);
    fixture.pool.take_chunk_edits(Txg(1));
    fixture.pool.published(Txg(1));
    let free = fixture.pool.unallocated_bytes();
    fixture.pool.drop_chunk(chunk.logical, Txg(3));
    fixture.pool.drop_chunk(system.logical, Txg(3));
    // Group 2 is still being written: for it, both chunks are there.
    assert!(fixture.pool.take_chunk_edits(Txg(2)).is_empty());
    assert_eq!(fixture.pool.system_chunks().len(), 1);
    fixture.pool.published(Txg(2));
    assert!(fixture.pool.chunk_of(chunk.logical).is_some());
    let gone: Vec<_> = fixture.pool.take_chunk_edits(Txg(3));
    assert_eq!(
        gone.iter().filter(|(key, value)| key.kind == kind::CHUNK && value.is_none()).count(),
        2
    );
    assert_eq!(fixture.pool.system_chunks().len(), 0);
    assert!(fixture.pool.chunk_of(chunk.logical).is_some());
    assert_eq!(fixture.pool.unallocated_bytes(), free);
    fixture.pool.published(Txg(3));
    assert!(fixture.pool.chunk_of(chunk.logical).is_none());
    assert_eq!(fixture.pool.unallocated_bytes(), free + 3 * MIB);
    fixture.pool.check().unwrap();
}

#[test]
fn a_chunk_is_recorded_once_its_edit_is_taken_and_published_with_that_group() {
    let fixture = Fixture::new(16 * MIB);
    let pool = &fixture.pool;
    let state = |chunk: &Chunk| {
        let inside = Logical(chunk.logical.0 + 4096);
        (pool.is_recorded(inside), pool.is_published(inside))
    };
    let first = fixture.chunk(ChunkKind::Data);
    assert_eq!(state(&first), (false, false));
    pool.take_chunk_edits(Txg(1));
    assert_eq!(state(&first), (true, false));
    let later = fixture.chunk(ChunkKind::Data);
    pool.published(Txg(1));
    assert_eq!(state(&first), (true, true));
    assert_eq!(state(&later), (false, false));
    // Never recorded: nothing to delete.
    pool.drop_chunk(later.logical, Txg(2));
    assert!(pool.take_chunk_edits(Txg(2)).is_empty());
    pool.published(Txg(2));
    assert_eq!(pool.chunks(), vec![first]);
    assert!(!pool.is_published(later.logical));
}

#[derive(Clone, Debug)]
enum Step {
    Create(ChunkKind),
    Drop(usize),
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop_oneof![
            Just(ChunkKind::Data), Just(ChunkKind::Metadata), Just(ChunkKind::System)
        ].prop_map(Step::Create),
        3 => (0usize..100).prop_map(Step::Drop),
        2 => Just(Step::Commit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_edits_of_every_group_give_the_map_that_is_opened_again(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let options = FormatOptions { chunk_bytes: Some(2 * MIB), ..Default::default() };
        let fixture = Fixture::with(40 * MIB, options);
        let mut tree: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
        let mut live: Vec<Logical> = Vec::new();
        let mut txg = 1;
        for step in steps.into_iter().chain([Step::Commit]) {
            match step {
                Step::Create(kind) => match fixture.pool.create_chunk(kind, Txg(txg), 0) {
                    Ok(chunk) => live.push(chunk.logical),
                    Err(error) => prop_assert_eq!(error, Error::NoSpace),
                },
                Step::Drop(at) if !live.is_empty() => {
                    fixture.pool.drop_chunk(live.swap_remove(at % live.len()), Txg(txg));
                }
                Step::Drop(_) => {}
                Step::Commit => {
                    let edits = fixture.pool.take_chunk_edits(Txg(txg));
                    prop_assert!(edits.windows(2).all(|pair| pair[0].0 < pair[1].0));
                    for (key, value) in edits {
                        match value {
                            Some(value) => { tree.insert(key, value); }
                            None => prop_assert!(tree.remove(&key).is_some(), "{:?}", key),
                        }
                    }
                    fixture.commit(txg);
                    fixture.pool.published(Txg(txg));
                    txg += 1;
                }
            }
            fixture.pool.check().unwrap();
        }
        live.sort();
        let (pool, _) = fixture.open(PoolOptions::default()).unwrap();
        for (key, value) in &tree {
            if key.kind == kind::CHUNK {
                pool.add_chunks([Chunk::decode(Logical(key.object), value).unwrap()]).unwrap();
            } else {
                pool.add_device_item(0, &DeviceItem::decode(value).unwrap()).unwrap();
            }
        }
        prop_assert!(pool.chunks().iter().all(|chunk| pool.is_published(chunk.logical)));
        prop_assert!(live.iter().all(|logical| fixture.pool.is_published(*logical)));
        let opened: Vec<Logical> = pool.chunks().iter().map(|chunk| chunk.logical).collect();
        prop_assert_eq!(opened, live);
        prop_assert_eq!(pool.chunks(), fixture.pool.chunks());
        prop_assert_eq!(pool.unallocated_bytes(), fixture.pool.unallocated_bytes());
        prop_assert!(pool.take_chunk_edits(Txg(txg)).is_empty());
    }

    #[test]
    fn a_flipped_byte_in_one_copy_of_a_block_is_healed_and_told(
        at in 0usize..16384,
        copy in 0usize..2,
        compressible in any::<bool>(),
    ) {
        let fixture = Fixture::new(16 * MIB);
        let content = if compressible { vec![b'a'; 16384] } else { noise(16384, 5) };
        let ptr = fixture.block(&content, CompressionKind::Zstd);
        prop_assert_eq!(ptr.compression == CompressionKind::Zstd, compressible);
        let at = at as u64 % u64::from(ptr.stored);
        let places = fixture.places(ptr.addr);
        let before = fixture.ram.image();
        fixture.ram.flip(places[copy] + at);
        let read = fixture.pool.read_block(&ptr).unwrap();
        prop_assert_eq!(&read[..], &content[..]);
        // The second copy is not looked at while the first is good.
        let told = fixture.env.incidents.take();
        if copy == 0 {
            let device = 0;
            let at = Physical(places[0]);
            prop_assert_eq!(
                told, vec![Incident::Healed { addr: ptr.addr, device, at, rewritten: true }]);
            prop_assert_eq!(fixture.ram.image(), before);
            prop_assert_eq!(fixture.pool.members()[0].errors().checksum, 1);
            fixture.pool.read_block(&ptr).unwrap();
            prop_assert_eq!(fixture.env.incidents.take(), vec![]);
        } else {
            prop_assert_eq!(told, vec![]);
        }
    }

    #[test]
    fn plain_data_is_read_as_long_as_each_sector_has_one_good_copy(
        bad in proptest::collection::btree_map(0usize..16, 0usize..3, 0..8),
        unreadable in any::<bool>(),
        blake in any::<bool>(),
        zeros in any::<bool>(),
    ) {
        let kind = if blake { ChecksumKind::Blake3 } else { ChecksumKind::Crc32c };
        let fixture = Fixture::dup();
        let content = if zeros { vec![0; 16 * SECTOR] } else { noise(16 * SECTOR, 9) };
        let source = fixture.plain(&content, kind);
        let places = fixture.places(addr_of(&source));
        let image = fixture.ram.image();
        // 0 and 1: damage in that copy; 2: in both.
        for (sector, copies) in &bad {
            for copy in [0, 1] {
                if *copies == copy || *copies == 2 {
                    let at = places[copy] + (sector * SECTOR) as u64;
                    if unreadable {
                        fixture.ram.faults(|faults| faults.fail_reads.push(at..at + 1));
                    } else {
                        fixture.ram.flip(at + 77);
                    }
                }
            }
        }
        let lost = bad.iter().find(|(_, copies)| **copies == 2);
        match (fixture.read(&source), lost) {
            (Ok(buf), None) => prop_assert_eq!(&buf[..], &content[..]),
            (Err(Error::Checksum { addr, .. }), Some((sector, _))) => {
                prop_assert!(!unreadable);
                prop_assert_eq!(addr.0, addr_of(&source).0 + (sector * SECTOR) as u64);
            }
            (Err(Error::Device { .. }), Some(_)) => prop_assert!(unreadable),
            (read, lost) => prop_assert!(false, "{:?}, lost {:?}", read, lost),
        }
        let told = fixture.env.incidents.take();
        let losses = told.iter().filter(|i| matches!(i, Incident::Lost { .. })).count();
        prop_assert_eq!(losses, usize::from(lost.is_some()));
        let reread = fixture.read(&source);
        prop_assert_eq!(reread.is_err(), lost.is_some());
        if !unreadable {
            prop_assert_eq!(fixture.env.incidents.take(), vec![], "told once");
            if lost.is_none() && bad.values().all(|copy| *copy == 0) {
                prop_assert_eq!(fixture.ram.image(), image, "copy 0 is whole again");
            }
        }
    }

    #[test]
    fn what_is_written_in_any_pieces_is_in_every_copy(
        pieces in proptest::collection::vec((1usize..5, 0usize..3), 1..20),
        order in any::<u64>(),
    ) {
        let fixture = Fixture::dup();
        let chunk = fixture.chunk(ChunkKind::Data);
        let mut writes = Vec::new();
        let mut model = vec![0; MIB as usize];
        let mut at = 0;
        for (tag, (sectors, gap)) in pieces.iter().enumerate() {
            let bytes = noise(sectors * SECTOR, tag as u64);
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            let slice: Slice = Buf::copy_of(&bytes).unwrap().into_slice();
            let cut = (sectors / 2) * SECTOR;
            let bufs = if cut == 0 { vec![slice] } else {
                vec![slice.part(0, cut), slice.part(cut, slice.len() - cut)]
            };
            writes.push(RunWrite { addr: Logical(chunk.logical.0 + at as u64), bufs });
            at += bytes.len() + gap * SECTOR;
        }
        let entropy = SeededEntropy::new(order);
        writes.sort_by_cached_key(|_| entropy.next_u64());
        let batches = fixture.ram.requests().write_batches;
        fixture.pool.write(writes).unwrap();
        prop_assert_eq!(fixture.ram.requests().write_batches, batches + 1);
        for place in fixture.places(chunk.logical) {
            prop_assert!(fixture.ram.peek(place, MIB as usize) == model);
        }
    }
}

#[test]
fn blocks_read_together_are_verified_and_healed_one_by_one() {
    let fixture = Fixture::dup();
    let contents: Vec<Vec<u8>> = (0..4).map(|seed| noise(16384, seed)).collect();
    let ptrs: Vec<BlockPtr> =
        contents.iter().map(|content| fixture.block(content, CompressionKind::None)).collect();
    // Of the second block one copy is bad, of the third both, and the fourth is not mapped.
    fixture.ram.flip(fixture.places(ptrs[1].addr)[0]);
    fixture.places(ptrs[2].addr).iter().for_each(|place| fixture.ram.flip(*place));
    let nowhere = BlockPtr { addr: Logical(1 << 50), ..ptrs[3] };
    let read = fixture.pool.read_blocks(&[ptrs[0], ptrs[1], ptrs[2], nowhere]);
    assert_eq!(&read[0].as_ref().unwrap()[..], &contents[0][..]);
    assert_eq!(&read[1].as_ref().unwrap()[..], &contents[1][..]);
    assert!(matches!(read[2], Err(Error::Checksum { .. })), "{:?}", read[2]);
    assert!(matches!(read[3], Err(Error::Unmapped { .. })), "{:?}", read[3]);
    let told = fixture.env.incidents.take();
    assert!(matches!(
        told[..],
        [Incident::Healed { addr: healed, rewritten: true, .. }, Incident::Lost { addr: lost, .. }]
            if healed == ptrs[1].addr && lost == ptrs[2].addr
    ));
}

#[test]
fn a_block_without_a_good_copy_is_a_typed_error_and_told_once() {
    let fixture = Fixture::new(16 * MIB);
    let ptr = fixture.block(&noise(5000, 1), CompressionKind::None);
    fixture.places(ptr.addr).iter().for_each(|at| fixture.ram.flip(*at));
    let error = Error::Checksum { addr: ptr.addr, bytes: 8192 };
    for told in [1, 0] {
        assert_eq!(fixture.pool.read_block(&ptr).err(), Some(error.clone()));
        assert_eq!(fixture.env.incidents.take().len(), told);
    }
    fixture.ram.faults(|faults| faults.gone = true);
    assert!(matches!(fixture.pool.read_block(&ptr), Err(Error::Device { .. })));
}

#[test]
fn an_unreadable_copy_is_served_from_the_other_and_rewritten() {
    let fixture = Fixture::new(16 * MIB);
    let content = noise(16384, 1);
    let ptr = fixture.block(&content, CompressionKind::None);
    let at = fixture.places(ptr.addr)[0];
    fixture.ram.faults(|faults| faults.fail_reads.push(at..at + 1));
    let writes = fixture.ram.requests().writes;
    assert_eq!(&fixture.pool.read_block(&ptr).unwrap()[..], &content[..]);
    assert_eq!(fixture.ram.requests().writes, writes + 1);
    assert!(fixture.pool.members()[0].errors().read > 0);
}

#[test]
fn a_read_only_pool_serves_the_good_copy_and_leaves_the_bad_one() {
    let fixture = Fixture::new(16 * MIB);
    let content = noise(16384, 1);
    let ptr = fixture.block(&content, CompressionKind::None);
    fixture.commit(1);
    let fixture = fixture.reopen(read_only());
    fixture.ram.flip(fixture.places(ptr.addr)[0]);
    let image = fixture.ram.image();
    for told in [1, 0] {
        assert_eq!(&fixture.pool.read_block(&ptr).unwrap()[..], &content[..]);
        let incidents = fixture.env.incidents.take();
        assert_eq!(incidents.len(), told);
        assert!(incidents.iter().all(|i| matches!(i, Incident::Healed { rewritten: false, .. })));
    }
    assert!(fixture.ram.image() == image);
}

#[test]
fn content_after_the_end_of_a_block_does_not_leak() {
    let fixture = Fixture::new(16 * MIB);
    let ptr = fixture.block(&noise(5000, 1), CompressionKind::None);
    for at in fixture.places(ptr.addr) {
        fixture.ram.flip(at + 6000);
    }
    assert!(fixture.pool.read_block(&ptr).unwrap()[5000..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_block_that_does_not_expand_is_corrupt_not_a_panic() {
    let fixture = Fixture::new(16 * MIB);
    let ptr = fixture.block(&noise(8192, 1), CompressionKind::None);
    let lying = BlockPtr { compression: CompressionKind::Zstd, logical: 16384, ..ptr };
    assert!(matches!(fixture.pool.read_block(&lying), Err(Error::Corrupt { .. })));
}

#[test]
fn addresses_outside_chunks_are_unmapped() {
    let fixture = Fixture::new(16 * MIB);
    let chunk = fixture.chunk(ChunkKind::Data);
    let end = chunk.logical.0 + chunk.length;
    let last = fixture.chunk(ChunkKind::Data);
    assert_eq!(last.logical.0, end);
    for (addr, bytes) in [
        (0, 4096),
        (chunk.logical.0 - 4096, 8192),
        (end - 4096, 8192),
        (chunk.logical.0, 0),
        (chunk.logical.0 + 1, 4096),
        (chunk.logical.0, 4097),
        (end + MIB, 4096),
        (u64::MAX - 4095, 4096),
        (chunk.logical.0, u64::MAX - 4095),
    ] {
        let run = Run { addr: Logical(addr), bytes };
        let unmapped = Error::Unmapped { addr: Logical(addr) };
        assert_eq!(fixture.pool.read_run(run, 0).err(), Some(unmapped.clone()));
        let source = DataSource::Plain {
            addr: run.addr,
            len: bytes,
            checksum_kind: ChecksumKind::None,
            checksums: vec![],
        };
        assert_eq!(fixture.read(&source).err(), Some(unmapped.clone()));
        assert_eq!(fixture.pool.discard(run, &(0..u64::MAX)).err(), Some(unmapped.clone()));
        assert_eq!(fixture.pool.map(run.addr, run.bytes).err(), Some(unmapped));
    }
}

#[test]
fn an_unverified_read_is_of_the_copy_that_is_asked_for() {
    let fixture = Fixture::dup();
    let chunk = fixture.chunk(ChunkKind::Data);
    fixture.write(chunk.logical, Buf::copy_of(&[1; SECTOR]).unwrap());
    let places = fixture.places(chunk.logical);
    fixture.ram.poke(places[1], &[2; SECTOR]);
    let run = Run { addr: chunk.logical, bytes: SECTOR_BYTES };
    assert_eq!(fixture.pool.read_run(run, 0).unwrap()[0], 1);
    assert_eq!(fixture.pool.read_run(run, 1).unwrap()[0], 2);
    assert!(matches!(fixture.pool.read_run(run, 2), Err(Error::Checksum { .. })));
    fixture.ram.faults(|faults| faults.fail_reads.push(places[0]..places[0] + 1));
    assert!(matches!(fixture.pool.read_run(run, 0), Err(Error::Device { .. })));
    assert_eq!(fixture.pool.read_run(run, 1).unwrap()[0], 2);
}

#[test]
fn a_failed_write_or_flush_is_an_error_and_counted() {
    let fixture = Fixture::dup();
    let chunk = fixture.chunk(ChunkKind::Data);
    let at = fixture.places(chunk.logical)[1];
    fixture.ram.faults(|faults| faults.fail_writes.push(at..at + 1));
    let bufs = vec![Buf::zeroed(SECTOR).unwrap().into_slice()];
    let outcome = fixture.pool.write(vec![RunWrite { addr: chunk.logical, bufs }]);
    assert!(matches!(outcome, Err(Error::Device { device: 0, .. })));
    fixture.ram.faults(|faults| faults.fail_flush = true);
    assert!(fixture.pool.flush().is_err());
    assert_eq!(fixture.pool.members()[0].errors().write, 2);
}

#[test]
fn a_write_that_lies_half_outside_writes_nothing() {
    let fixture = Fixture::new(16 * MIB);
    let chunk = fixture.chunk(ChunkKind::Data);
    let image = fixture.ram.image();
    let write = |addr: u64| RunWrite {
        addr: Logical(addr),
        bufs: vec![Buf::copy_of(&[1; 2 * SECTOR]).unwrap().into_slice()],
    };
    let end = chunk.logical.0 + chunk.length;
    let outcome = fixture.pool.write(vec![write(chunk.logical.0), write(end - SECTOR_BYTES)]);
    assert_eq!(outcome, Err(Error::Unmapped { addr: Logical(end - SECTOR_BYTES) }));
    assert!(fixture.ram.image() == image);
}

#[test]
fn a_batch_read_by_many_threads_gives_each_its_own_result() {
    let workers = Arc::new(ThreadWorkers { threads: 4 });
    let env = TestPlatform::with_workers(1, workers);
    let ram = RamDevice::new(64 * MIB);
    let options = FormatOptions { chunk_bytes: Some(16 * MIB), ..Default::default() };
    let pool = Pool::create(vec![ram.device()], env.platform.clone(), &options).unwrap();
    let fixture = Fixture { ram, env, pool };
    let chunk = fixture.chunk(ChunkKind::Data);
    let mut sources = Vec::new();
    let mut want = Vec::new();
    for index in 0..40u64 {
        let addr = Logical(chunk.logical.0 + index * 131072);
        let text: Vec<u8> = noise(64, index).iter().copied().cycle().take(131072).collect();
        let packed =
            codec::compress(&CrateCodecs, CompressionKind::Zstd, 1, &text, Buf::zeroed).unwrap();
        let checksum = codec::checksum(
            &CrateCodecs,
            ChecksumKind::Crc32c,
            &packed.buf[..packed.stored as usize],
        );
        fixture.write(addr, packed.buf);
        sources.push(DataSource::Packed {
            blob: Blob {
                addr,
                stored: packed.stored,
                logical: 131072,
                compression: CompressionKind::Zstd,
                checksum_kind: ChecksumKind::Crc32c,
                checksum,
            },
        });
        want.push(text);
    }
    fixture.ram.flip(fixture.places(addr_of(&sources[7]))[0] + 9);
    let batches = fixture.ram.requests().read_batches;
    let mut reads: Vec<DataRead<'_>> = sources.into_iter().map(DataRead::new).collect();
    fixture.pool.read_data(&mut reads);
    assert_eq!(fixture.ram.requests().read_batches, batches + 1);
    for (index, (read, want)) in reads.iter().zip(&want).enumerate() {
        if index == 7 {
            assert!(matches!(read.result, Err(Error::Checksum { .. })));
        } else {
            assert_eq!(read.result, Ok(()));
            assert!(read.buf[..] == want[..], "read {index}");
        }
    }
    assert_eq!(fixture.env.incidents.take().len(), 1);
}

#[test]
fn two_readers_of_one_bad_block_repair_it_once() {
    let fixture = Fixture::new(16 * MIB);
    let content = noise(16384, 1);
    let ptr = fixture.block(&content, CompressionKind::None);
    let place = fixture.pool.locate(Run { addr: ptr.addr, bytes: 16384 }).unwrap();
    fixture.ram.flip(fixture.places(ptr.addr)[0]);
    let good = |bytes: &[u8]| bytes == &content[..];
    // Both have read the bad copy; then both come to heal it.
    for _ in 0..2 {
        fixture.pool.heal(&place, 0, &content, &[], &good).unwrap();
    }
    assert_eq!(fixture.env.incidents.take().len(), 1);
}

#[test]
fn what_no_chunk_has_is_discarded_once_and_no_chunk_is_made_of_it_meanwhile() {
    let (a, b) = (RamDevice::new(9 * MIB + 12288), RamDevice::new(16 * MIB));
    let env = TestPlatform::new(1);
    let devices = vec![a.device(), b.device()];
    let pool = Pool::create(devices, env.platform.clone(), &FormatOptions::default()).unwrap();
    pool.create_chunk(ChunkKind::Metadata, Txg(1), 0).unwrap();
    let chunk = pool.create_chunk(ChunkKind::Data, Txg(1), 0).unwrap();
    let allocated: u64 =
        pool.chunks().iter().map(|chunk| chunk.length * chunk.stripes.len() as u64).sum();
    let usable = pool.unallocated_bytes();
    let mut seen = Vec::new();
    let mut from = 0;
    while let Some(held) = pool.hold_unallocated(from, &(0..u64::MAX), 0) {
        let bytes = held.end - held.start;
        assert!(pool.unallocated_bytes() + 2 * MIB > usable);
        assert_eq!(pool.unallocated_bytes() % MIB, 0);
        assert_eq!(pool.discard_held(held.clone()), Ok(bytes));
        assert_eq!(pool.unallocated_bytes(), usable);
        from = held.end;
        seen.push(held);
    }
    assert!(seen.windows(2).all(|pair| pair[0].end <= pair[1].start), "{seen:?}");
    let labels = 2 * (DATA_START + LABEL_AREA_BYTES);
    let discarded: u64 = seen.iter().map(|held| held.end - held.start).sum();
    assert_eq!(discarded, pool.device_bytes() - labels - allocated);
    let places = pool.map(chunk.logical, chunk.length).unwrap();
    let (device, at) = places[0][0];
    let base = u64::from(device) * (9 * MIB + 12288);
    let stripe = base + at.0..base + at.0 + chunk.length;
    assert!(seen.iter().all(|held| held.end <= stripe.start || held.start >= stripe.end));
    pool.check().unwrap();
}

#[test]
fn a_hold_keeps_to_its_range_and_to_runs_that_are_long_enough() {
    let fixture = Fixture::new(16 * MIB);
    let hold = |from, range: Range<u64>, min_bytes| {
        let held = fixture.pool.hold_unallocated(from, &range, min_bytes)?;
        fixture.pool.discard_held(held.clone()).unwrap();
        Some(held)
    };
    let range = 5 * MIB + 100..7 * MIB - 100;
    assert_eq!(hold(0, range.clone(), 0), Some(5 * MIB + 4096..7 * MIB - 4096));
    assert_eq!(hold(6 * MIB, range.clone(), 0), Some(6 * MIB..7 * MIB - 4096));
    // What is left counts as the run that it is the rest of.
    assert!(hold(6 * MIB, range.clone(), 3 * MIB / 2).is_some());
    assert_eq!(hold(0, range.clone(), 2 * MIB), None);
    assert_eq!(hold(7 * MIB, range, 0), None);
    assert_eq!(hold(0, 0..DATA_START, 0), None);
    assert_eq!(hold(16 * MIB, 0..u64::MAX, 0), None);
}

#[test]
fn a_discard_reaches_every_copy_and_nothing_outside_of_its_range() {
    let fixture = Fixture::dup();
    let chunk = fixture.chunk(ChunkKind::Data);
    fixture.write(chunk.logical, Buf::copy_of(&vec![7; 4 * SECTOR]).unwrap());
    let places = fixture.places(chunk.logical);
    let run = Run { addr: chunk.logical, bytes: 4 * SECTOR_BYTES };
    let second = places[1] + SECTOR_BYTES..places[1] + 2 * SECTOR_BYTES;
    assert!(fixture.pool.is_within(run, &second));
    assert!(!fixture.pool.is_within(run, &(0..places[0])));
    assert_eq!(fixture.pool.discard(run, &second), Ok(SECTOR_BYTES));
    let sectors = |at: u64| {
        let content = fixture.ram.image();
        [0, 1, 2, 3].map(|n| content[at as usize + n * SECTOR] == 7)
    };
    assert_eq!(sectors(places[0]), [true; 4]);
    assert_eq!(sectors(places[1]), [true, false, true, true]);
    assert_eq!(fixture.pool.discard(run, &(0..u64::MAX)), Ok(8 * SECTOR_BYTES));
    assert_eq!(sectors(places[0]), [false; 4]);
}

/// A pool on several devices, with a mirror of data.
fn mirror(count: usize) -> (Vec<Arc<RamDevice>>, Fixture) {
    let rams: Vec<Arc<RamDevice>> = (0..count).map(|_| RamDevice::new(16 * MIB)).collect();
    let env = TestPlatform::new(1);
    let options = FormatOptions {
        data_profile: Profile::Mirror,
        metadata_profile: Profile::Mirror,
        ..Default::default()
    };
    let devices = rams.iter().map(|ram| ram.device()).collect();
    let pool = Pool::create(devices, env.platform.clone(), &options).unwrap();
    (rams.clone(), Fixture { ram: rams[0].clone(), env, pool })
}

#[test]
fn reads_of_a_mirror_are_spread_over_its_devices() {
    let (rams, fixture) = mirror(2);
    let source = fixture.plain(&noise(MIB as usize, 3), ChecksumKind::Crc32c);
    let before: Vec<u64> = rams.iter().map(|ram| ram.requests().reads).collect();
    for part in 0..4 {
        let DataSource::Plain { addr, checksum_kind, checksums, .. } = &source else { panic!() };
        let (start, len) = (part * (256 << 10), 64 << 10);
        let sums = &checksums[start as usize / SECTOR * 4..][..len as usize / SECTOR * 4];
        let part = DataSource::Plain {
            addr: Logical(addr.0 + start),
            len,
            checksum_kind: *checksum_kind,
            checksums: sums.to_vec(),
        };
        fixture.read(&part).unwrap();
    }
    let reads: Vec<u64> =
        rams.iter().zip(before).map(|(ram, before)| ram.requests().reads - before).collect();
    assert_eq!(reads, [2, 2]);
}

#[test]
fn a_write_is_done_only_when_all_labels_know_which_device_missed_it() {
    let (rams, fixture) = mirror(3);
    fixture.chunk(ChunkKind::System);
    fixture.commit(1);
    fixture.pool.published(Txg(1));
    let chunk = fixture.chunk(ChunkKind::Data);
    let failing = chunk.stripes[0].device;
    rams[usize::from(failing)].faults(|faults| faults.gone = true);
    let content = noise(SECTOR, 1);
    fixture.write(chunk.logical, Buf::copy_of(&content).unwrap());
    assert_eq!(fixture.pool.absent(), [failing]);
    for (index, ram) in rams.iter().enumerate() {
        if index == usize::from(failing) {
            continue;
        }
        let identity = probe(&*ram.device(), 0).unwrap().identity;
        let behind: Vec<Option<Txg>> = identity.table.iter().map(|entry| entry.behind).collect();
        let want = |device| (device == usize::from(failing)).then_some(Txg(1));
        assert_eq!(behind, (0..3).map(want).collect::<Vec<_>>());
    }
    let told = fixture.env.incidents.take();
    let failed = told.iter().filter_map(|incident| match incident {
        Incident::DeviceFailed { device, .. } => Some(*device),
        _ => None,
    });
    assert_eq!(failed.collect::<Vec<_>>(), [failing]);
    // One more, and some chunk has no copy left.
    let other = chunk.stripes[1].device;
    rams[usize::from(other)].faults(|faults| faults.gone = true);
    let bufs = vec![Buf::copy_of(&content).unwrap().into_slice()];
    let error = fixture.pool.write(vec![RunWrite { addr: chunk.logical, bufs }]).err();
    assert!(matches!(error, Some(Error::Device { device, .. }) if device == other), "{error:?}");
    assert_eq!(fixture.pool.absent(), [failing]);
}

#[test]
fn a_sweep_that_is_given_up_reads_no_more_and_one_that_is_not_finds_what_is_bad() {
    let (rams, fixture) = mirror(2);
    let content = |seed| Content::Data(fixture.plain(&noise(SECTOR, seed), ChecksumKind::Crc32c));
    let contents: Vec<Content> = (0..5).map(content).collect();
    let Fixture { env: _env, pool, .. } = fixture;
    let pool = Arc::new(pool);
    let reads = || rams.iter().map(|ram| ram.requests().reads).sum::<u64>();
    let before = reads();
    let given_up = Sweep::plan(pool.clone(), contents.clone()).unwrap();
    given_up.cancel();
    assert_eq!(reads(), before);
    assert!(!given_up.was_in_the_way());
    let at = pool.pieces(contents[3].run()).unwrap()[0].copies[1];
    rams[usize::from(at.0)].flip(at.1 .0);
    let sweep = Arc::new(Sweep::plan(pool, contents).unwrap());
    sweep.start();
    assert_eq!(sweep.finish(), [3]);
    assert!(reads() >= before + 10);
}

/// A device that calls something before each read or write, which may change anything.
struct Hooked {
    ram: Arc<RamDevice>,
    before_read: Mutex<Option<Hook>>,
    before_write: Mutex<Option<Hook>>,
}

type Hook = Arc<dyn Fn(Physical) + Send + Sync>;

impl Hooked {
    fn new(ram: &Arc<RamDevice>) -> Arc<Hooked> {
        let (before_read, before_write) = (Mutex::new(None), Mutex::new(None));
        Arc::new(Hooked { ram: ram.clone(), before_read, before_write })
    }
}

impl Device for Hooked {
    fn geometry(&self) -> Geometry {
        self.ram.geometry()
    }
    fn read(&self, batch: &mut [ReadOp]) {
        let hook = self.before_read.lock().clone();
        hook.iter().for_each(|hook| hook(batch[0].at));
        self.ram.read(batch);
    }
    fn write(&self, batch: &mut [WriteOp]) {
        let hook = self.before_write.lock().clone();
        hook.iter().for_each(|hook| hook(batch[0].at));
        self.ram.write(batch);
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.ram.flush()
    }
    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        self.ram.discard(at, bytes)
    }
    fn name(&self) -> &str {
        self.ram.name()
    }
}

/// Where the labels of the devices of [`mirror`] are.
const LABELS: [Range<u64>; 2] =
    [(64 << 10)..(64 << 10) + 4096, 16 * MIB - (128 << 10)..16 * MIB - (128 << 10) + 4096];

fn try_write(fixture: &Fixture, chunk: &Chunk) -> Result<()> {
    let bufs = vec![Buf::copy_of(&noise(SECTOR, 1)).unwrap().into_slice()];
    fixture.pool.write(vec![RunWrite { addr: chunk.logical, bufs }])
}

fn open_all(rams: &[Arc<RamDevice>], options: PoolOptions) -> Result<(Box<Pool>, Box<Superblock>)> {
    let env = TestPlatform::new(9);
    Pool::open(rams.iter().map(|ram| ram.device()).collect(), env.platform.clone(), &options)
}

/// A published mirror with a data chunk on the first two devices.
fn published_mirror(count: usize) -> (Vec<Arc<RamDevice>>, Fixture, Chunk) {
    let (rams, fixture) = mirror(count);
    fixture.chunk(ChunkKind::System);
    let chunk = fixture.chunk(ChunkKind::Data);
    fixture.commit(1);
    fixture.pool.published(Txg(1));
    (rams, fixture, chunk)
}

fn degraded() -> PoolOptions {
    PoolOptions { degraded: true, ..PoolOptions::default() }
}

#[test]
fn devices_that_fail_one_after_the_other_are_never_all_called_behind() {
    let (rams, fixture, chunk) = published_mirror(2);
    let data = MIB..15 * MIB;
    rams[0].faults(|faults| faults.fail_writes = vec![data.clone()]);
    rams[1].faults(|faults| faults.fail_writes = LABELS.to_vec());
    try_write(&fixture, &chunk).unwrap_err();
    rams[1].faults(|faults| faults.fail_writes = vec![data]);
    try_write(&fixture, &chunk).unwrap_err();
    rams.iter().for_each(|ram| ram.faults(|faults| *faults = Default::default()));
    // What was not written to one of them is not forgotten when it behaves again.
    try_write(&fixture, &chunk).unwrap_err();
    fixture.pool.flush().unwrap_err();
    let (pool, superblock) = open_all(&rams, PoolOptions::default()).unwrap();
    pool.begin(&superblock).unwrap();
    assert!(pool.members().iter().any(Member::is_complete));
}

#[test]
fn a_label_area_that_cannot_be_written_does_not_cost_the_device() {
    let (rams, fixture, chunk) = published_mirror(2);
    rams[0].faults(|faults| faults.gone = true);
    rams[1].faults(|faults| faults.fail_writes = vec![LABELS[0].clone()]);
    try_write(&fixture, &chunk).unwrap();
    assert_eq!(fixture.pool.absent(), [0]);
    let damaged = fixture.pool.damaged_labels();
    assert!(matches!(damaged[..], [DamagedLabel { device: 1, area: 0, .. }]), "{damaged:?}");
    let (pool, _) = open_all(&rams[1..], degraded()).unwrap();
    assert_eq!(pool.members()[1].identity().table[0].behind, Some(Txg(1)));
}

#[test]
fn a_lack_of_memory_says_nothing_about_a_device_and_is_made_up_for() {
    let (rams, fixture, chunk) = published_mirror(2);
    rams[0].faults(|faults| faults.gone = true);
    rams[1].faults(|faults| faults.no_memory_for = LABELS.to_vec());
    assert_eq!(try_write(&fixture, &chunk), Err(Error::Memory));
    assert_eq!(fixture.pool.absent(), []);
    assert_eq!(fixture.pool.flush(), Err(Error::Memory), "the labels do not tell yet");
    rams[1].faults(|faults| *faults = Default::default());
    fixture.pool.flush().unwrap();
    assert_eq!(fixture.pool.absent(), [0]);
}

#[test]
fn a_device_that_fails_beside_a_lack_of_memory_is_left_behind_too() {
    let (rams, fixture, chunk) = published_mirror(3);
    let [first, second] = [0, 1].map(|copy| usize::from(chunk.stripes[copy].device));
    rams[first].faults(|faults| faults.no_memory_for.push(MIB..15 * MIB));
    rams[second].faults(|faults| faults.gone = true);
    assert_eq!(try_write(&fixture, &chunk), Err(Error::Memory));
    rams[first].faults(|faults| *faults = Default::default());
    fixture.pool.flush().unwrap();
    assert_eq!(fixture.pool.absent(), [second as u16]);
}

#[test]
fn no_chunk_is_made_on_a_device_while_it_is_left_behind() {
    let env = TestPlatform::new(1);
    let rams = [32, 16, 16].map(|mib| RamDevice::new(mib * MIB));
    let hooked = [Hooked::new(&rams[1]), Hooked::new(&rams[2])];
    let devices: Vec<DeviceRef> = vec![rams[0].device(), hooked[0].clone(), hooked[1].clone()];
    let options = FormatOptions {
        data_profile: Profile::Mirror,
        metadata_profile: Profile::Mirror,
        ..Default::default()
    };
    let pool = Arc::new(Pool::create(devices, env.platform.clone(), &options).unwrap());
    let first = pool.create_chunk(ChunkKind::Data, Txg(1), 0).unwrap();
    assert_eq!(first.stripes[0].device, 0, "the emptiest device comes first");
    let made = Arc::new(Mutex::new(Vec::new()));
    let (weak, list) = (Arc::downgrade(&pool), made.clone());
    let hook: Hook = Arc::new(move |at| {
        if at.0 == LABELS[0].start {
            let chunk = weak.upgrade().unwrap().create_chunk(ChunkKind::Data, Txg(1), 0).unwrap();
            list.lock().push(chunk);
        }
    });
    hooked.iter().for_each(|device| *device.before_write.lock() = Some(hook.clone()));
    rams[0].faults(|faults| faults.gone = true);
    let bufs = vec![Buf::copy_of(&noise(SECTOR, 1)).unwrap().into_slice()];
    pool.write(vec![RunWrite { addr: first.logical, bufs }]).unwrap();
    let made = made.lock();
    assert_eq!(made.len(), 2, "one before each label");
    assert!(made.iter().flat_map(|chunk| &chunk.stripes).all(|stripe| stripe.device != 0));
}

#[test]
fn nobody_is_told_of_a_device_while_labels_are_locked() {
    struct Probe(Mutex<Option<alloc::sync::Weak<Pool>>>, AtomicU64);
    impl crate::platform::Report for Probe {
        fn incident(&self, _: &Incident) {
            let pool = self.0.lock().as_ref().and_then(alloc::sync::Weak::upgrade);
            // What is told may ask for anything, such as a new name.
            pool.unwrap().set_name([0; 64]).unwrap();
            self.1.fetch_add(1, Ordering::Relaxed);
        }
    }
    let env = TestPlatform::new(1);
    let report = Arc::new(Probe(Mutex::new(None), AtomicU64::new(0)));
    let platform = Platform { report: report.clone(), ..env.platform.clone() };
    let rams = [16, 16].map(|mib| RamDevice::new(mib * MIB));
    let options = FormatOptions {
        data_profile: Profile::Mirror,
        metadata_profile: Profile::Mirror,
        ..Default::default()
    };
    let devices = rams.iter().map(|ram| ram.device()).collect();
    let pool = Arc::new(Pool::create(devices, platform, &options).unwrap());
    *report.0.lock() = Some(Arc::downgrade(&pool));
    rams[0].faults(|faults| faults.gone = true);
    pool.flush().unwrap();
    assert_eq!(report.1.load(Ordering::Relaxed), 1);
}

#[test]
fn a_pool_flushes_before_it_relies_on_what_it_was_opened_at() {
    let fixture = Fixture::new(16 * MIB);
    fixture.commit(1);
    let (pool, superblock) = fixture.open(PoolOptions::default()).unwrap();
    let before = fixture.ram.requests();
    pool.begin(&superblock).unwrap();
    let after = fixture.ram.requests();
    assert_eq!((after.flushes - before.flushes, after.writes - before.writes), (1, 0));
}

#[test]
fn sectors_are_looked_for_in_every_copy_even_if_the_order_changes_meanwhile() {
    let env = TestPlatform::new(1);
    let rams: Vec<Arc<RamDevice>> = (0..3).map(|_| RamDevice::new(16 * MIB)).collect();
    let hooked: Vec<Arc<Hooked>> = rams.iter().map(Hooked::new).collect();
    let devices = hooked.iter().map(|device| device.clone() as DeviceRef).collect();
    let options = FormatOptions {
        data_profile: Profile::Mirror3,
        metadata_profile: Profile::Mirror3,
        ..Default::default()
    };
    let pool = Pool::create(devices, env.platform.clone(), &options).unwrap();
    let fixture = Fixture { ram: rams[0].clone(), env, pool };
    let content = noise(SECTOR, 4);
    let source = fixture.plain(&content, ChecksumKind::Crc32c);
    let addr = addr_of(&source);
    let place = fixture.pool.locate(Run { addr, bytes: SECTOR_BYTES }).unwrap();
    // Tried in turn: a copy that cannot be read and vanishes then, a good one, a bad one.
    let turn = (addr.0 >> 18) as usize % 3;
    let device = |step: usize| place.segment((turn + step) % 3);
    let (first, last) = (device(0), device(2));
    rams[usize::from(last.device)].flip(last.at.0);
    let ram = rams[usize::from(first.device)].clone();
    ram.faults(|faults| faults.fail_reads.push(first.at.0..first.at.0 + 1));
    let seen = AtomicU64::new(0);
    *hooked[usize::from(first.device)].before_read.lock() = Some(Arc::new(move |_| {
        if seen.fetch_add(1, Ordering::Relaxed) == 1 {
            ram.faults(|faults| faults.gone = true);
        }
    }));
    assert_eq!(fixture.read(&source).unwrap()[..], content[..]);
}

#[test]
fn what_verifies_itself_is_not_read_from_a_device_that_is_behind() {
    let (rams, fixture, chunk) = published_mirror(2);
    try_write(&fixture, &chunk).unwrap();
    let run = Run { addr: chunk.logical, bytes: SECTOR_BYTES };
    let [behind, other] = [0, 1].map(|copy| chunk.stripes[copy]);
    fixture.pool.member(behind.device).set_standing(Standing::Behind);
    for nth in 0..2 {
        assert_eq!(fixture.pool.read_run(run, nth).unwrap()[..], noise(SECTOR, 1)[..]);
    }
    let at = other.physical.0;
    rams[usize::from(other.device)].faults(|faults| faults.fail_reads.push(at..at + 1));
    for nth in 0..2 {
        fixture.pool.read_run(run, nth).unwrap_err();
    }
}

#[test]
fn an_older_pool_of_several_devices_gets_its_table_when_all_are_there() {
    let (rams, fixture, _) = published_mirror(2);
    for (ram, member) in rams.iter().zip(fixture.pool.members()) {
        let identity = Identity { epoch: 0, table: Vec::new(), ..member.identity() };
        Member::fresh(ram.device(), identity).unwrap().write_labels().unwrap();
    }
    let alone = open_all(&rams[..1], degraded()).err();
    assert!(matches!(alone, Some(Error::Argument { .. })), "{alone:?}");
    let (pool, superblock) = open_all(&rams, PoolOptions::default()).unwrap();
    pool.begin(&superblock).unwrap();
    let (pool, _) = open_all(&rams[1..], degraded()).unwrap();
    assert_eq!((pool.members().len(), pool.absent()), (2, vec![0]));
}

#[test]
fn a_table_in_which_nobody_is_complete_is_told_as_that() {
    let (rams, fixture, _) = published_mirror(2);
    for (ram, member) in rams.iter().zip(fixture.pool.members()) {
        let mut identity = member.identity();
        identity.table.iter_mut().for_each(|entry| entry.behind = Some(Txg(1)));
        Member::fresh(ram.device(), identity).unwrap().write_labels().unwrap();
    }
    let error = open_all(&rams, degraded()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "devices 0 and 1 lack some of what was written to the pool; open the pool read-only and \
         degraded to read what is there"
    );
    open_all(&rams, PoolOptions { read_only: true, ..degraded() }).unwrap();
}

#[test]
fn a_device_whose_label_cannot_be_read_is_named() {
    let (rams, _, _) = published_mirror(2);
    rams[1].faults(|faults| faults.fail_reads = LABELS.to_vec());
    let error = open_all(&rams, PoolOptions::default()).err().unwrap();
    assert!(error.to_string().contains("ram: device 1 failed at byte"), "{error}");
    let env = TestPlatform::new(9);
    let devices = rams.iter().map(|ram| ram.device()).collect();
    Pool::open(devices, env.platform.clone(), &degraded()).unwrap();
    let told = env.incidents.take();
    assert!(matches!(told[..], [Incident::DeviceUnusable { .. }]), "{told:?}");
}

#[test]
fn a_device_that_failed_a_flush_of_its_label_falls_behind_from_there() {
    let (rams, fixture, chunk) = published_mirror(2);
    try_write(&fixture, &chunk).unwrap();
    // What was just written may be lost, and the device does not say so twice.
    rams[1].faults(|faults| faults.fail_flush = true);
    fixture.pool.set_name([b'n'; 64]).unwrap();
    rams[1].faults(|faults| faults.fail_flush = false);
    assert_eq!(fixture.pool.absent(), [1]);
    fixture.pool.flush().unwrap();
    let identity = probe(&*rams[0].device(), 0).unwrap().identity;
    assert_eq!((identity.table[1].behind, identity.name), (Some(Txg(1)), [b'n'; 64]));
    assert_eq!(fixture.pool.members()[1].errors().write, 1);
}

#[test]
fn a_table_of_devices_too_large_to_be_added_up_is_refused() {
    let (rams, fixture, _) = published_mirror(3);
    let mut identity = fixture.pool.members()[0].identity();
    identity.table[1].bytes = (1 << 56) + 4096;
    identity.epoch += 1;
    Member::fresh(rams[0].device(), identity).unwrap().write_labels().unwrap();
    let error = open_all(&rams[..1], degraded()).err().unwrap();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}
