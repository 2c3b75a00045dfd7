//! The allocator against a model that knows every sector.
//!
//! The model is a set of sectors per state; the pool is a list of chunks; the space tree is a map
//! of items. Random histories of two overlapping groups are run against both, with evictions,
//! crashes and reopening, and after every step the allocator's own check runs as well.

use super::runs::RunSet;
use super::*;
use crate::format::chunk::{Profile, Stripe};
use crate::format::key::Key;
use crate::format::space::SummaryItem;
use crate::units::Physical;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const NODE: u64 = 16384;

// A pool that only knows what its chunks take.

struct FakeChunk {
    chunk: Chunk,
    dropped: Option<Txg>,
}

struct FakePool {
    chunk_bytes: u64,
    device_bytes: u64,
    chunks: Mutex<Vec<FakeChunk>>,
    next: Mutex<u64>,
    discarded: Mutex<Vec<Run>>,
    /// What a trim took of the unallocated bytes, and what it discarded of them.
    held: Mutex<u64>,
    rest_discarded: Mutex<Vec<Range<u64>>>,
    discards_fail: bool,
    /// Happens during the next discard.
    event: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl FakePool {
    fn new(chunk_bytes: u64, device_bytes: u64) -> FakePool {
        FakePool {
            chunk_bytes,
            device_bytes,
            chunks: Mutex::new(Vec::new()),
            next: Mutex::new(chunk_bytes),
            discarded: Mutex::new(Vec::new()),
            held: Mutex::new(0),
            rest_discarded: Mutex::new(Vec::new()),
            discards_fail: false,
            event: Mutex::new(None),
        }
    }

    /// The chunks in the chunk tree of a group.
    fn chunks_at(&self, txg: Txg) -> Vec<Chunk> {
        let chunks = self.chunks.lock();
        let there = chunks.iter().filter(|c| c.chunk.birth <= txg);
        let there = there.filter(|c| c.dropped.is_none_or(|dropped| dropped > txg));
        there.map(|c| c.chunk.clone()).collect()
    }

    /// What a crash leaves: nothing a younger group did happened.
    fn fall_back(&self, txg: Txg) {
        let mut chunks = self.chunks.lock();
        chunks.retain(|c| c.chunk.birth <= txg);
        for chunk in chunks.iter_mut() {
            chunk.dropped = chunk.dropped.filter(|dropped| *dropped <= txg);
        }
    }
}

impl ChunkSource for FakePool {
    fn create_chunk(&self, kind: ChunkKind, txg: Txg, _owed: u64) -> Result<Chunk> {
        let length = (self.unallocated_bytes() / self.copies(kind)).min(self.chunk_bytes);
        if length < MIB {
            return Err(Error::NoSpace);
        }
        let length = MIB << (length / MIB).ilog2();
        let mut next = self.next.lock();
        let profile = if self.copies(kind) == 2 { Profile::Dup } else { Profile::Single };
        let chunk = Chunk {
            logical: Logical(*next),
            length,
            birth: txg,
            kind,
            profile,
            stripes: vec![Stripe { device: 0, physical: Physical(0) }],
        };
        *next += self.chunk_bytes;
        self.chunks.lock().push(FakeChunk { chunk: chunk.clone(), dropped: None });
        Ok(chunk)
    }

    fn drop_chunk(&self, logical: Logical, txg: Txg) {
        let mut chunks = self.chunks.lock();
        let chunk = chunks.iter_mut().find(|c| c.chunk.logical == logical).unwrap();
        assert!(chunk.dropped.is_none(), "chunk dropped twice");
        chunk.dropped = Some(txg);
    }

    fn unallocated_bytes(&self) -> u64 {
        let chunks = self.chunks.lock();
        let held = chunks.iter().filter(|c| c.dropped.is_none());
        let held: u64 = held.map(|c| c.chunk.length * c.chunk.profile.copies()).sum();
        self.device_bytes - held - *self.held.lock()
    }

    fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    fn copies(&self, kind: ChunkKind) -> u64 {
        if kind == ChunkKind::Data {
            1
        } else {
            2
        }
    }

    fn is_within(&self, run: Run, range: &Range<u64>) -> bool {
        run.addr.0 < range.end && run.end().0 > range.start
    }

    fn discard(&self, run: Run, range: &Range<u64>) -> Result<u64> {
        let (start, end) = (run.addr.0.max(range.start), run.end().0.min(range.end));
        let part = Run { addr: Logical(start), bytes: end.saturating_sub(start) };
        self.discarded.lock().push(part);
        let event = self.event.lock().take();
        if let Some(event) = event {
            event();
        }
        if self.discards_fail {
            return Err(Error::Failed);
        }
        Ok(part.bytes)
    }

    fn hold(&self, from: u64, range: &Range<u64>, min_bytes: u64) -> Option<Range<u64>> {
        let all = self.unallocated_bytes();
        let (start, end) = (from.max(REST), range.end.min(REST + all));
        if start >= end || end - REST.max(range.start) < min_bytes {
            return None;
        }
        let held = start..end.min(start + self.chunk_bytes);
        *self.held.lock() = held.end - held.start;
        Some(held)
    }

    fn discard_held(&self, held: Range<u64>) -> Result<u64> {
        let before = core::mem::take(&mut *self.held.lock());
        assert_eq!(before, held.end - held.start, "something else was given back");
        self.rest_discarded.lock().push(held);
        if self.discards_fail {
            return Err(Error::Failed);
        }
        Ok(before)
    }
}

/// Where what no chunk has stands in the bytes of the fake devices; a chunk stands where its
/// logical address says.
const REST: u64 = 1 << 50;

// A space tree.

type Items = BTreeMap<Key, Vec<u8>>;

#[derive(Default)]
struct FakeTree {
    items: Mutex<Items>,
}

impl FakeTree {
    fn apply(items: &mut Items, edits: &[Edit]) {
        for (key, value) in edits {
            match value {
                Some(value) => items.insert(*key, value.clone()),
                None => Some(items.remove(key).expect("only items that exist are deleted")),
            };
        }
    }

    fn used_in_summary(&self, chunk: Logical) -> u64 {
        let items = self.items.lock();
        let value = items.get(&cut::summary_key(chunk)).expect("every chunk has a summary");
        SummaryItem::decode(value).unwrap().used_sectors
    }
}

impl BitmapSource for FakeTree {
    fn bitmap(&self, region: Logical) -> Result<Option<Vec<u8>>> {
        Ok(self.items.lock().get(&cut::bitmap_key(region)).cloned())
    }
}

/// Has something else happen while the bitmap number `when` is read.
struct Meanwhile<'a> {
    tree: &'a FakeTree,
    when: u32,
    event: Mutex<Option<Box<dyn FnOnce() + Send + 'a>>>,
    reads: Mutex<u32>,
}

impl BitmapSource for Meanwhile<'_> {
    fn bitmap(&self, region: Logical) -> Result<Option<Vec<u8>>> {
        let before = self.tree.bitmap(region);
        *self.reads.lock() += 1;
        if *self.reads.lock() == self.when {
            let event = self.event.lock().take().unwrap();
            event();
        }
        before
    }
}

type Sectors = BTreeSet<u64>;

fn sectors(run: Run) -> impl Iterator<Item = u64> {
    run.addr.0 / SECTOR_BYTES..run.end().0 / SECTOR_BYTES
}

fn run_at(sector: u64, count: u64) -> Run {
    Run { addr: Logical(sector * SECTOR_BYTES), bytes: count * SECTOR_BYTES }
}

/// The sectors that items and residue say are used.
fn used_on_disk(items: &Items, residue: &Residue) -> Sectors {
    let mut used = Sectors::new();
    for (key, value) in items {
        if key.kind != crate::format::key::kind::SPACE_BITMAP {
            continue;
        }
        assert!(value.iter().any(|byte| *byte != 0), "a free region has a bitmap");
        for (byte, at) in value.iter().zip(0..) {
            for bit in 0..8 {
                if byte >> bit & 1 == 1 {
                    used.insert(key.object / SECTOR_BYTES + at * 8 + bit);
                }
            }
        }
    }
    for run in &residue.taken {
        for sector in sectors(*run) {
            assert!(used.insert(sector), "the residue takes what is used");
        }
    }
    for run in &residue.freed {
        for sector in sectors(*run) {
            assert!(used.remove(&sector), "the residue frees what is free");
        }
    }
    used
}

// A pool in the middle of its life.

#[derive(Default)]
struct ModelGroup {
    taken: Sectors,
    freed: Sectors,
}

struct World {
    pool: Arc<FakePool>,
    tree: Arc<FakeTree>,
    space: Arc<Space>,
    published: Txg,
    residue: Residue,
    /// What the writing group's tree will be, once it is cut.
    next_tree: Option<Items>,
    used: Sectors,
    /// The group being written, and the open one.
    groups: [ModelGroup; 2],
    pending: BTreeMap<Txg, Sectors>,
    bitmaps_max: usize,
}

impl World {
    fn new(chunk_bytes: u64, device_bytes: u64, bitmaps_max: usize) -> World {
        let pool = Arc::new(FakePool::new(chunk_bytes, device_bytes));
        let options = Options { bitmaps_max, metadata_unit: NODE, ..Options::default() };
        World {
            space: Arc::new(Space::new(pool.clone(), options)),
            pool,
            tree: Arc::default(),
            published: Txg(0),
            residue: Residue::default(),
            next_tree: None,
            used: Sectors::new(),
            groups: Default::default(),
            pending: BTreeMap::new(),
            bitmaps_max,
        }
    }

    fn txg(&self, group: usize) -> Txg {
        Txg(self.published.0 + 1 + group as u64)
    }

    fn is_busy(&self, sector: u64) -> bool {
        self.used.contains(&sector)
            || self.groups.iter().any(|g| g.taken.contains(&sector) || g.freed.contains(&sector))
            || self.pending.values().any(|set| set.contains(&sector))
    }

    fn allocate(&mut self, kind: ChunkKind, group: usize, want: u64, min: u64) {
        let txg = self.txg(group);
        let got =
            self.space.allocate(kind, want * SECTOR_BYTES, min * SECTOR_BYTES, txg, &*self.tree);
        let Ok(run) = got else {
            assert_eq!(got, Err(Error::NoSpace));
            return;
        };
        assert!((min * SECTOR_BYTES..=want * SECTOR_BYTES).contains(&run.bytes));
        let chunks = self.pool.chunks.lock();
        let within = |c: &FakeChunk| {
            c.chunk.logical <= run.addr && run.end().0 <= c.chunk.logical.0 + c.chunk.length
        };
        let chunk = chunks.iter().find(|c| within(c)).expect("a run lies in one chunk");
        assert_eq!(chunk.chunk.kind, kind);
        assert!(chunk.dropped.is_none(), "space handed out in a dropped chunk");
        assert!(chunk.chunk.birth <= txg, "space handed out in a chunk the group does not have");
        drop(chunks);
        for sector in sectors(run) {
            assert!(!self.is_busy(sector), "sector {sector} handed out while it is in use");
            self.groups[group].taken.insert(sector);
        }
    }

    /// Whether the group may free the sector: it is in use as the group sees it.
    fn may_free(&self, group: usize, sector: u64) -> bool {
        let in_use = self.used.contains(&sector)
            || self.groups[..=group].iter().any(|g| g.taken.contains(&sector));
        in_use && !self.groups.iter().any(|g| g.freed.contains(&sector))
    }

    fn free(&mut self, group: usize, pick: usize, count: u64) {
        let mine = self.groups[..=group].iter().flat_map(|g| &g.taken);
        let all: Vec<u64> = self.used.iter().chain(mine).copied().collect();
        if all.is_empty() {
            return;
        }
        let first = all[pick % all.len()];
        let chunk_of = |sector: u64| sector * SECTOR_BYTES / self.pool.chunk_bytes;
        let fits = |s: &u64| self.may_free(group, *s) && chunk_of(*s) == chunk_of(first);
        let len = (first..first + count).take_while(fits).count() as u64;
        if len > 0 {
            self.space.free(run_at(first, len), self.txg(group));
            self.groups[group].freed.extend(first..first + len);
        }
    }

    fn drop_empty_and_seal(&mut self) {
        if self.next_tree.is_some() {
            return;
        }
        let txg = self.txg(0);
        for chunk in self.space.drop_empty(txg, &*self.tree).unwrap() {
            let first = chunk.0 / SECTOR_BYTES;
            let mut inside = first..first + self.pool.chunk_bytes / SECTOR_BYTES;
            assert!(inside.all(|sector| !self.is_busy(sector)), "a chunk in use was dropped");
        }
    }

    fn cut(&mut self) {
        if self.next_tree.is_some() {
            return;
        }
        let txg = self.txg(0);
        self.drop_empty_and_seal();
        self.space.seal_chunks(txg, || ());
        let edits = self.space.cut(txg, &*self.tree).unwrap();
        assert!(edits.windows(2).all(|w| w[0].0 < w[1].0), "edits are not sorted");
        let mut items = self.tree.items.lock().clone();
        FakeTree::apply(&mut items, &edits);
        self.next_tree = Some(items);
    }

    fn publish(&mut self) {
        self.cut();
        let txg = self.txg(0);
        let residue = self.space.residue(txg);
        let items = self.next_tree.take().unwrap();
        let group = core::mem::take(&mut self.groups[0]);
        self.used.extend(&group.taken);
        for sector in &group.freed {
            assert!(self.used.remove(sector));
        }
        assert_eq!(used_on_disk(&items, &residue), self.used, "the disk is not used(n)");
        let decoded = Residue::decode(&residue.encode(txg.0), txg.0).unwrap();
        assert_eq!(decoded, residue);
        self.residue = residue.clone();
        let tree = self.tree.clone();
        self.space.published(txg, residue, || *tree.items.lock() = items);
        self.groups.swap(0, 1);
        self.pending.insert(txg, group.freed);
        self.published = txg;
    }

    fn release(&mut self, age: u64) {
        let txg = Txg(self.published.0.saturating_sub(age));
        let released = self.space.release(txg);
        let kept = self.pending.split_off(&txg.next());
        let freed = core::mem::replace(&mut self.pending, kept);
        let count: usize = freed.values().map(BTreeSet::len).sum();
        assert_eq!(released.bytes, count as u64 * SECTOR_BYTES);
    }

    /// Discards what is free; what of it, is compared with what may not be touched.
    fn trim(&mut self, min_bytes: u64) {
        self.pool.discarded.lock().clear();
        let mut trim = Trim::new(0..u64::MAX, min_bytes);
        let (mut pieces, mut bytes) = (0, 0);
        while self.space.trim_piece(&mut trim, &*self.tree).unwrap() {
            self.space.check(&*self.tree).unwrap();
            pieces += 1;
            assert!(pieces < 100_000, "a trim without an end");
        }
        let chunks = self.pool.chunks.lock();
        let mut once = Sectors::new();
        for run in self.pool.discarded.lock().iter() {
            bytes += run.bytes;
            let at = |c: &&FakeChunk| {
                run.addr >= c.chunk.logical && run.end().0 <= c.chunk.logical.0 + c.chunk.length
            };
            let chunk = chunks.iter().find(at).expect("a run lies in one chunk");
            assert!(chunk.dropped.is_none(), "a discard in a dropped chunk");
            for sector in sectors(*run) {
                assert!(!self.is_busy(sector), "sector {sector} discarded while it is in use");
                assert!(once.insert(sector), "sector {sector} discarded twice");
            }
        }
        let rest = core::mem::take(&mut *self.pool.rest_discarded.lock());
        bytes += rest.iter().map(|held| held.end - held.start).sum::<u64>();
        assert_eq!(trim.discarded(), bytes);
    }

    /// Power fails; the published group is opened.
    fn crash(&mut self) {
        self.pool.fall_back(self.published);
        let options = Options {
            published: self.published,
            bitmaps_max: self.bitmaps_max,
            metadata_unit: NODE,
            ..Options::default()
        };
        self.space = Arc::new(Space::new(self.pool.clone(), options));
        for chunk in self.pool.chunks_at(self.published) {
            let used = self.tree.used_in_summary(chunk.logical);
            self.space.add_chunk(&chunk, used).unwrap();
        }
        self.space.load_residue(self.residue.clone()).unwrap();
        self.next_tree = None;
        self.groups = Default::default();
        self.pending.clear();
    }

    /// Log replay takes what is free, and nothing else.
    fn take(&mut self, pick: u64, count: u64) {
        let chunks = self.pool.chunks_at(self.published);
        let live: Vec<&Chunk> = chunks.iter().collect();
        if live.is_empty() {
            return;
        }
        let chunk = live[pick as usize % live.len()];
        let length = chunk.length / SECTOR_BYTES;
        let first = chunk.logical.0 / SECTOR_BYTES + (pick / 7) % length;
        let count = count.min(chunk.logical.0 / SECTOR_BYTES + length - first);
        let dropped = {
            let chunks = self.pool.chunks.lock();
            chunks.iter().any(|c| c.chunk.logical == chunk.logical && c.dropped.is_some())
        };
        let free = !dropped && (first..first + count).all(|sector| !self.is_busy(sector));
        let txg = self.txg(0);
        let result = self.space.take(run_at(first, count), txg, &*self.tree);
        assert_eq!(result.is_ok(), free, "{result:?}");
        if free {
            self.groups[0].taken.extend(first..first + count);
        }
    }

    fn check(&self) {
        self.space.check(&*self.tree).unwrap();
        let usage = self.space.usage();
        let used = usage.data.used_bytes + usage.metadata.used_bytes + usage.system.used_bytes;
        let groups = self.groups.iter();
        let taken: usize = groups.clone().map(|g| g.taken.len()).sum();
        let freed: usize = groups.map(|g| g.freed.len()).sum();
        let expected = self.used.len() + taken - freed;
        assert_eq!(used, expected as u64 * SECTOR_BYTES);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Allocate { kind: ChunkKind, group: usize, want: u64, min: u64 },
    Free { group: usize, pick: usize, count: u64 },
    Take { pick: u64, count: u64 },
    DropEmpty,
    Cut,
    Publish,
    Release { age: u64 },
    Forget,
    Trim { min: u64 },
    Crash,
}

fn kinds() -> impl Strategy<Value = ChunkKind> {
    prop_oneof![
        6 => Just(ChunkKind::Data),
        3 => Just(ChunkKind::Metadata),
        1 => Just(ChunkKind::System),
    ]
}

fn ops(largest: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (kinds(), 0..2usize, 1..=largest, 1..=largest).prop_map(|(kind, group, a, b)| {
            Op::Allocate { kind, group, want: a.max(b), min: a.min(b) }
        }),
        10 => (0..2usize, any::<usize>(), 1..=largest * 2)
            .prop_map(|(group, pick, count)| Op::Free { group, pick, count }),
        2 => (any::<u64>(), 1..largest).prop_map(|(pick, count)| Op::Take { pick, count }),
        1 => Just(Op::DropEmpty),
        2 => Just(Op::Cut),
        3 => Just(Op::Publish),
        3 => (0..3u64).prop_map(|age| Op::Release { age }),
        2 => Just(Op::Forget),
        1 => (0..64u64).prop_map(|min| Op::Trim { min }),
        1 => Just(Op::Crash),
    ]
}

fn run_history(mut world: World, history: Vec<Op>) {
    for op in history {
        match op {
            Op::Allocate { kind, group, want, min } => world.allocate(kind, group, want, min),
            Op::Free { group, pick, count } => world.free(group, pick, count),
            Op::Take { pick, count } => world.take(pick, count),
            Op::DropEmpty => world.drop_empty_and_seal(),
            Op::Cut => world.cut(),
            Op::Publish => world.publish(),
            Op::Release { age } => world.release(age),
            Op::Forget => world.space.forget_bitmaps(),
            Op::Trim { min } => world.trim(min * SECTOR_BYTES),
            Op::Crash => world.crash(),
        }
        world.check();
    }
    world.publish();
    world.crash();
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn tiny_chunks_never_hand_out_what_is_in_use_and_store_what_is(
        history in proptest::collection::vec(ops(100), 1..120)
    ) {
        run_history(World::new(MIB, 12 * MIB, 64), history);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn chunks_of_many_regions_never_hand_out_what_is_in_use_and_store_what_is(
        history in proptest::collection::vec(ops(3000), 1..60)
    ) {
        run_history(World::new(72 * MIB, 400 * MIB, 64), history);
    }
}

// Promises.

#[derive(Clone, Debug)]
enum Promise {
    Reserve { data: u64, metadata: u64, class: Class },
    SpendData { pick: usize, want: u64 },
    SpendMetadata { pick: usize },
    FreeAndCommit { pick: usize, count: u64 },
    GiveBack { pick: usize },
}

fn promises() -> impl Strategy<Value = Promise> {
    let class = prop_oneof![Just(Class::Normal), Just(Class::Delete), Just(Class::Admin)];
    prop_oneof![
        4 => (0..3 * MIB, 0..MIB, class)
            .prop_map(|(data, metadata, class)| Promise::Reserve { data, metadata, class }),
        4 => (any::<usize>(), 1..300u64).prop_map(|(pick, want)| Promise::SpendData { pick, want }),
        4 => any::<usize>().prop_map(|pick| Promise::SpendMetadata { pick }),
        3 => (any::<usize>(), 1..200u64)
            .prop_map(|(pick, count)| Promise::FreeAndCommit { pick, count }),
        1 => any::<usize>().prop_map(|pick| Promise::GiveBack { pick }),
    ]
}

fn spend_data(world: &mut World, promise: &mut Reservation, want: u64, group: usize) {
    let want = (want * SECTOR_BYTES).min(promise.data());
    if want == 0 {
        return;
    }
    let txg = world.txg(group);
    let run = world.space.allocate(ChunkKind::Data, want, SECTOR_BYTES, txg, &*world.tree);
    let run = run.expect("promised data can be handed out");
    world.groups[group].taken.extend(sectors(run));
    promise.shrink(run.bytes, 0);
}

fn spend_metadata(world: &mut World, promise: &mut Reservation, group: usize) {
    if promise.metadata() == 0 {
        return;
    }
    let txg = world.txg(group);
    let run = world.space.allocate(ChunkKind::Metadata, NODE, NODE, txg, &*world.tree);
    let run = run.expect("promised metadata can be handed out");
    world.groups[group].taken.extend(sectors(run));
    promise.shrink(0, NODE);
}

/// Frees whole blocks and makes the space reusable.
fn free_and_commit(world: &mut World, pick: usize, count: u64) {
    for _ in 0..count {
        let kinds = world.pool.chunks.lock();
        let kind_at = |sector: u64| {
            let at = sector * SECTOR_BYTES / world.pool.chunk_bytes;
            let index = |c: &FakeChunk| c.chunk.logical.0 / world.pool.chunk_bytes;
            kinds.iter().find(|c| index(c) == at).map(|c| c.chunk.kind)
        };
        let all: Vec<u64> =
            world.groups[0].taken.difference(&world.groups[0].freed).copied().collect();
        if all.is_empty() {
            break;
        }
        let sector = all[pick % all.len()];
        // Nodes come in fours.
        let (first, len) = match kind_at(sector) {
            Some(ChunkKind::Data) => (sector, 1),
            _ => (sector / 4 * 4, 4),
        };
        drop(kinds);
        world.space.free(run_at(first, len), world.txg(0));
        world.groups[0].freed.extend(first..first + len);
    }
    world.publish();
    world.release(0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn what_is_promised_can_be_handed_out_in_any_order(
        slots in 4..40u64,
        history in proptest::collection::vec(promises(), 1..80),
        backwards in any::<bool>(),
        chunk_mib in prop_oneof![3 => Just(1), 1 => Just(2)],
    ) {
        let chunk_bytes = chunk_mib * MIB;
        let mut world = World::new(chunk_bytes, slots * chunk_bytes, 64);
        let mut held: Vec<Reservation> = Vec::new();
        for step in history {
            let count = held.len().max(1);
            match step {
                Promise::Reserve { data, metadata, class } => {
                    match world.space.reserve(data, metadata, class) {
                        Ok(promise) => held.push(promise),
                        Err(error) => assert_eq!(error, Error::NoSpace),
                    }
                }
                Promise::SpendData { pick, want } => {
                    if let Some(promise) = held.get_mut(pick % count) {
                        spend_data(&mut world, promise, want, pick % 2);
                    }
                }
                Promise::SpendMetadata { pick } => {
                    if let Some(promise) = held.get_mut(pick % count) {
                        spend_metadata(&mut world, promise, 0);
                    }
                }
                Promise::FreeAndCommit { pick, count } => free_and_commit(&mut world, pick, count),
                Promise::GiveBack { pick } => {
                    if !held.is_empty() {
                        drop(held.swap_remove(pick % count));
                    }
                }
            }
            world.check();
        }
        if backwards {
            held.reverse();
        }
        for mut promise in held {
            while promise.metadata() > 0 && backwards {
                spend_metadata(&mut world, &mut promise, 0);
            }
            while promise.data() > 0 {
                spend_data(&mut world, &mut promise, 256, 1);
            }
            while promise.metadata() > 0 {
                spend_metadata(&mut world, &mut promise, 0);
            }
        }
        world.check();
        prop_assert_eq!(world.space.usage().reserved_data, 0);
        prop_assert_eq!(world.space.usage().reserved_metadata, 0);
    }

    #[test]
    fn available_data_is_exactly_what_a_normal_writer_can_reserve(
        slots in 4..40u64,
        taken in proptest::collection::vec((1..600u64, any::<bool>()), 0..12),
    ) {
        let mut world = World::new(MIB, slots * MIB, 64);
        for (want, data) in taken {
            let kind = if data { ChunkKind::Data } else { ChunkKind::Metadata };
            world.allocate(kind, 0, want, 1);
        }
        let available = world.space.available_data();
        if available > 0 {
            let promise = world.space.reserve(available, 0, Class::Normal);
            prop_assert!(promise.is_ok());
            prop_assert_eq!(world.space.available_data(), 0);
        }
        let more = world.space.reserve(available + 1, 0, Class::Normal);
        prop_assert_eq!(more.map(|r| r.data()), Err(Error::NoSpace));
    }
}

#[test]
fn the_reserve_grows_with_the_pool_within_its_bounds() {
    let reserve = |bytes| Reserve::of(bytes, 2, 16384).metadata * 2;
    assert_eq!(reserve(8 * MIB), MIB / 2);
    assert_eq!(reserve(32 * MIB), 2 * MIB);
    assert_eq!(reserve(64 * MIB), 2 * MIB);
    assert_eq!(reserve(1 << 30), 32 * MIB);
    assert_eq!(reserve(1 << 40), 1 << 30);
    // What a delete needs does not become less in a small pool.
    assert_eq!(Reserve::of(8 * MIB, 2, 65536).metadata, 12 * 65536);
}

#[test]
fn deletes_may_reserve_what_normal_operations_may_not() {
    let world = World::new(MIB, 16 * MIB, 64);
    let mut all =
        vec![world.space.reserve(world.space.available_data(), 0, Class::Normal).unwrap()];
    // What is left of the reserve's chunk is nobody's yet.
    while let Ok(node) = world.space.reserve(0, NODE, Class::Normal) {
        all.push(node);
    }
    assert_eq!(world.space.reserve(SECTOR_BYTES, 0, Class::Normal).err(), Some(Error::NoSpace));
    let reserve = Reserve::of(16 * MIB, 2, NODE);
    for _ in 0..reserve.data / SECTOR_BYTES {
        all.push(world.space.reserve(SECTOR_BYTES, 0, Class::Delete).unwrap());
    }
    for _ in 0..reserve.metadata / NODE {
        all.push(world.space.reserve(0, NODE, Class::Delete).unwrap());
    }
    assert_eq!(world.space.reserve(0, NODE, Class::Delete).err(), Some(Error::NoSpace));
    assert_eq!(world.space.reserve(SECTOR_BYTES, 0, Class::Delete).err(), Some(Error::NoSpace));
    drop(all);
    assert_eq!(world.space.usage().reserved_metadata, 0);
}

#[test]
fn metadata_of_each_class_counts_up_to_the_cap() {
    let world = World::new(MIB, 16 * MIB, 64);
    let cap = || 4 * NODE;
    let reserve = |class| {
        let mut one = world.space.reserve_within(0, NODE, class, Some(&cap)).unwrap();
        one.keep();
        one
    };
    let mut many: Vec<Reservation> = Vec::new();
    many.extend((0..10_000).map(|_| reserve(Class::Normal)));
    many.extend((0..10_000).map(|_| reserve(Class::Delete)));
    // Now none is under way.
    drop(world.space.reserve_within(0, 0, Class::Normal, Some(&cap)));
    assert_eq!(world.space.usage().reserved_metadata, 8 * NODE);
    let delete = many.pop();
    drop(many);
    assert_eq!(world.space.usage().reserved_metadata, NODE);
    drop(delete);
}

#[test]
fn what_operations_under_way_may_add_counts_whoever_reserves_after_them() {
    let world = World::new(MIB, 64 * MIB, 64);
    let cap = || 4 * NODE;
    let reserve = |data, nodes| {
        world.space.reserve_within(data, nodes * NODE, Class::Normal, Some(&cap)).unwrap()
    };
    // As whoever reserves next sees it.
    let counted = || {
        drop(reserve(0, 0));
        world.space.usage().reserved_metadata
    };
    let mut large = reserve(MIB, 100);
    let mut small = reserve(0, 1);
    assert_eq!(counted(), 101 * NODE);
    large.keep();
    assert_eq!(counted(), 5 * NODE);
    small.keep();
    assert_eq!(counted(), 4 * NODE);
    let part = large.split(MIB, 50);
    small.join(part);
    assert_eq!(counted(), 4 * NODE);
    // What is joined with one under way is under way again.
    let mut other = reserve(0, 1);
    other.join(small);
    assert_eq!(counted(), 102 * NODE);
    drop((large, other));
    let rest = reserve(0, 5);
    assert_eq!(counted(), 5 * NODE);
    drop(rest);
    assert_eq!(counted(), 0);
}

#[test]
fn a_reservation_that_is_refused_leaves_what_others_were_promised_as_it_was() {
    let world = World::new(MIB, 16 * MIB, 64);
    let reserve = |data, nodes, cap: u64| {
        let space = &world.space;
        space.reserve_within(data, nodes * NODE, Class::Normal, Some(&|| cap))
    };
    let mut held: Vec<Reservation> = Vec::new();
    for _ in 0..2000 {
        let mut one = reserve(0, 1, 4 * NODE).unwrap();
        one.keep();
        held.push(one);
    }
    drop(reserve(0, 0, 4 * NODE));
    assert_eq!(world.space.usage().reserved_metadata, 4 * NODE);
    // Under the cap that comes with it the others alone would have no room.
    assert!(matches!(reserve(MIB, 1, 1 << 40), Err(Error::NoSpace)));
    assert_eq!(world.space.usage().reserved_metadata, 4 * NODE);
    drop(reserve(MIB, 1, 4 * NODE).unwrap());
    drop(held);
}

#[test]
fn a_split_and_rejoined_reservation_promises_the_same() {
    let world = World::new(MIB, 16 * MIB, 64);
    let mut promise = world.space.reserve(MIB, 2 * NODE, Class::Normal).unwrap();
    let part = promise.split(MIB / 2, NODE);
    assert_eq!((promise.data(), part.metadata()), (MIB / 2, NODE));
    assert_eq!(world.space.usage().reserved_data, MIB);
    promise.join(part);
    assert_eq!(world.space.usage().reserved_data, MIB);
    drop(promise);
    assert_eq!(world.space.usage().reserved_data, 0);
}

// Single cases.

fn allocate(world: &World, kind: ChunkKind, bytes: u64) -> Run {
    let least = if kind == ChunkKind::Data { SECTOR_BYTES } else { bytes };
    let run = world.space.allocate(kind, bytes, least, world.txg(0), &*world.tree).unwrap();
    assert_eq!(run.bytes, bytes);
    run
}

#[test]
fn allocations_in_a_row_are_contiguous_per_kind() {
    let world = World::new(64 * MIB, 512 * MIB, 64);
    let mut ends = [None, None];
    for _ in 0..100 {
        for (kind, end) in [ChunkKind::Data, ChunkKind::Metadata].into_iter().zip(&mut ends) {
            let run = allocate(&world, kind, NODE);
            assert!(end.is_none_or(|end| end == run.addr));
            *end = Some(run.end());
        }
    }
}

#[test]
fn what_a_group_took_and_freed_is_not_reused_until_released() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB);
    world.space.free(run, world.txg(0));
    world.groups[0].taken.extend(sectors(run));
    world.groups[0].freed.extend(sectors(run));
    let next = allocate(&world, ChunkKind::Data, MIB);
    assert_ne!(run, next);
    world.groups[0].taken.extend(sectors(next));
    world.publish();
    assert!(world.residue.taken.is_empty() && world.residue.freed.is_empty());
    assert_ne!(allocate(&world, ChunkKind::Data, MIB).addr, run.addr);
    world.release(0);
    assert_eq!(allocate(&world, ChunkKind::Data, MIB).addr, run.addr);
}

#[test]
fn the_residue_nets_out_and_remembers_what_the_tree_does_not() {
    let world = World::new(MIB, 8 * MIB, 64);
    let txg = world.txg(0);
    let before = allocate(&world, ChunkKind::Metadata, NODE);
    world.space.seal_chunks(txg, || ());
    world.space.cut(txg, &*world.tree).unwrap();
    let after = allocate(&world, ChunkKind::Metadata, NODE);
    let both = allocate(&world, ChunkKind::Metadata, NODE);
    world.space.free(before, txg);
    world.space.free(both, txg);
    let residue = world.space.residue(txg);
    assert_eq!(residue, Residue { taken: vec![after], freed: vec![before] });
}

#[test]
fn freeing_twice_in_a_group_fails_the_cut() {
    let world = World::new(MIB, 4 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.space.free(run, world.txg(0));
    world.space.free(Run { bytes: SECTOR_BYTES, ..run }, world.txg(0));
    let failed = world.space.cut(world.txg(0), &*world.tree);
    assert!(matches!(failed, Err(Error::Corrupt { .. })), "{failed:?}");
}

#[test]
fn freeing_before_and_after_the_cut_fails_the_next_cut() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    world.publish();
    world.space.free(run, world.txg(0));
    world.space.seal_chunks(world.txg(0), || ());
    world.space.cut(world.txg(0), &*world.tree).unwrap();
    world.space.free(run, world.txg(0));
    let failed = world.space.cut(world.txg(1), &*world.tree);
    assert!(matches!(failed, Err(Error::Corrupt { .. })), "{failed:?}");
}

#[test]
fn freeing_what_is_free_or_pending_fails_the_cut() {
    for wait in [false, true] {
        let mut world = World::new(MIB, 4 * MIB, 64);
        let run = allocate(&world, ChunkKind::Data, MIB / 2);
        world.groups[0].taken.extend(sectors(run));
        world.publish();
        world.space.free(run, world.txg(0));
        world.groups[0].freed.extend(sectors(run));
        world.publish();
        if wait {
            world.release(0);
        }
        world.space.free(run, world.txg(0));
        let failed = world.space.cut(world.txg(0), &*world.tree);
        assert!(matches!(failed, Err(Error::Corrupt { .. })), "{failed:?}");
    }
}

#[test]
fn freeing_what_is_in_no_chunk_or_no_sector_fails_the_cut() {
    let strange = [
        Run { addr: Logical(1 << 50), bytes: SECTOR_BYTES },
        Run { addr: Logical(MIB + 1), bytes: SECTOR_BYTES },
        Run { addr: Logical(MIB), bytes: 0 },
        Run { addr: Logical(MIB), bytes: 2 * MIB },
        Run { addr: Logical(u64::MAX - 4095), bytes: 1 << 20 },
    ];
    for run in strange {
        let world = World::new(MIB, 4 * MIB, 64);
        allocate(&world, ChunkKind::Data, MIB);
        world.space.free(run, world.txg(0));
        assert!(world.space.cut(world.txg(0), &*world.tree).is_err(), "{run:?}");
    }
}

#[test]
fn a_publication_during_a_load_makes_the_load_start_over() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    world.cut();
    world.space.forget_bitmaps();
    // The old tree knows nothing of the run. If what was read of it were believed after the swap,
    // when the run is in no group's list any more, the run would be handed out again.
    let (txg, open) = (world.txg(0), world.txg(1));
    let residue = world.space.residue(txg);
    let items = world.next_tree.take().unwrap();
    let (space, tree) = (&world.space, &world.tree);
    let event = move || space.published(txg, residue, || *tree.items.lock() = items);
    let source =
        Meanwhile { tree, when: 1, event: Mutex::new(Some(Box::new(event))), reads: Mutex::new(0) };
    let other = space.allocate(ChunkKind::Data, MIB / 2, MIB / 2, open, &source).unwrap();
    assert_eq!(other.addr, run.end());
    assert_eq!(*source.reads.lock(), 2);
    space.check(&**tree).unwrap();
}

#[test]
fn space_is_discarded_before_it_is_free_and_a_failed_discard_does_not_leak_it() {
    let mut pool = FakePool::new(MIB, 4 * MIB);
    pool.discards_fail = true;
    let pool = Arc::new(pool);
    let mut world = World::new(MIB, 4 * MIB, 64);
    let options = Options { discard: true, metadata_unit: NODE, ..Options::default() };
    world.space = Arc::new(Space::new(pool.clone(), options));
    world.pool = pool.clone();
    // Two chunks that touch: the discard must not cross.
    let runs = [allocate(&world, ChunkKind::Data, MIB), allocate(&world, ChunkKind::Data, MIB)];
    for run in runs {
        world.groups[0].taken.extend(sectors(run));
        world.groups[0].freed.extend(sectors(run));
        world.space.free(run, world.txg(0));
    }
    world.publish();
    assert!(pool.discarded.lock().is_empty());
    let released = world.space.release(world.published);
    assert_eq!(released, Released { bytes: 2 * MIB, discard_error: Some(Error::Failed) });
    assert_eq!(*pool.discarded.lock(), runs);
    assert_eq!(world.space.usage().data.pending_bytes, 0);
    assert_eq!(allocate(&world, ChunkKind::Data, MIB).bytes, MIB);
}

#[test]
fn space_that_is_being_discarded_is_not_handed_out_although_its_bitmap_is_read_again() {
    let mut world = World::new(MIB, MIB, 64);
    world.space.set_discard(true);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    world.publish();
    world.space.free(run, world.txg(0));
    world.groups[0].freed.extend(sectors(run));
    world.publish();
    let (space, tree, txg) = (world.space.clone(), world.tree.clone(), world.txg(0));
    *world.pool.event.lock() = Some(Box::new(move || {
        space.forget_bitmaps();
        space.check(&*tree).unwrap();
        let rest = space.allocate(ChunkKind::Data, MIB, NODE, txg, &*tree).unwrap();
        assert_eq!(rest, Run { addr: run.end(), bytes: MIB / 2 });
        let early = space.allocate(ChunkKind::Data, NODE, NODE, txg, &*tree);
        assert_eq!(early, Err(Error::NoSpace));
    }));
    world.release(0);
    assert_eq!(*world.pool.discarded.lock(), [run]);
    assert_eq!(allocate(&world, ChunkKind::Data, MIB / 2), run);
}

/// A pool of eight chunks with two of data, the first three quarters full.
fn half_empty() -> World {
    let mut world = World::new(MIB, 8 * MIB, 64);
    for _ in 0..2 {
        let run = allocate(&world, ChunkKind::Data, 3 * MIB / 4);
        world.groups[0].taken.extend(sectors(run));
    }
    let rest = allocate(&world, ChunkKind::Data, MIB / 4);
    world.groups[0].taken.extend(sectors(rest));
    world.publish();
    world.space.free(rest, world.txg(0));
    world.groups[0].freed.extend(sectors(rest));
    world
}

fn discarded_bytes(world: &World) -> u64 {
    world.pool.discarded.lock().iter().map(|run| run.bytes).sum()
}

#[test]
fn a_trim_discards_all_that_is_free_and_leaves_what_a_crash_may_need() {
    let mut world = half_empty();
    let chunks = world.pool.chunks.lock().len() as u64 * MIB;
    world.trim(0);
    // Freed, but the group that did is not published.
    assert_eq!(discarded_bytes(&world), chunks - 7 * MIB / 4);
    world.publish();
    world.trim(0);
    // Published, but somebody may still read the group before.
    assert_eq!(discarded_bytes(&world), chunks - 7 * MIB / 4);
    world.release(0);
    world.trim(0);
    assert_eq!(discarded_bytes(&world), chunks - 6 * MIB / 4);
    world.check();
}

#[test]
fn a_trim_discards_what_no_chunk_has_chunk_by_chunk() {
    let world = half_empty();
    let mut trim = Trim::new(0..u64::MAX, 0);
    while world.space.trim_piece(&mut trim, &*world.tree).unwrap() {}
    let rest = world.pool.rest_discarded.lock().clone();
    let all = world.pool.unallocated_bytes();
    assert!(all >= 2 * MIB, "{all} bytes are unallocated");
    let pieces: Vec<Range<u64>> =
        (0..all / MIB).map(|n| REST + n * MIB..REST + n * MIB + MIB).collect();
    assert_eq!(rest, pieces);
}

#[test]
fn a_trim_keeps_to_its_range_and_leaves_short_runs_alone() {
    let mut world = World::new(MIB, 8 * MIB, 64);
    // One sector of two in the first half of the chunk.
    let runs: Vec<Run> =
        (0..128).map(|_| allocate(&world, ChunkKind::Data, SECTOR_BYTES)).collect();
    let start = runs[0].addr.0;
    world.groups[0].taken.extend(runs.iter().copied().flat_map(sectors));
    world.publish();
    for run in runs.iter().step_by(2) {
        world.space.free(*run, world.txg(0));
        world.groups[0].freed.extend(sectors(*run));
    }
    world.publish();
    world.release(0);
    let trimmed = |range: Range<u64>, min_bytes| {
        world.pool.discarded.lock().clear();
        let mut trim = Trim::new(range, min_bytes);
        while world.space.trim_piece(&mut trim, &*world.tree).unwrap() {}
        assert_eq!(discarded_bytes(&world), trim.discarded());
        trim.discarded()
    };
    assert_eq!(trimmed(start..start + MIB, 0), 64 * SECTOR_BYTES + MIB / 2);
    assert_eq!(trimmed(start..start + MIB, 2 * SECTOR_BYTES), MIB / 2);
    assert_eq!(trimmed(start..start + MIB, MIB / 2 + SECTOR_BYTES), 0);
    assert_eq!(trimmed(start..start + 4 * SECTOR_BYTES, 0), 2 * SECTOR_BYTES);
    assert_eq!(trimmed(start + MIB / 2 + 4096..start + MIB / 2 + 12288, 0), 8192);
    assert_eq!(trimmed(0..start, 0), 0);
}

#[test]
fn what_a_trim_has_taken_out_is_not_handed_out_although_its_bitmap_is_read_again() {
    let mut world = World::new(MIB, 8 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    world.publish();
    let promise = world.space.reserve(MIB, 0, Class::Normal).unwrap();
    let (space, tree, txg) = (world.space.clone(), world.tree.clone(), world.txg(0));
    *world.pool.event.lock() = Some(Box::new(move || {
        space.forget_bitmaps();
        space.check(&*tree).unwrap();
        // What is promised is there all the same, but not where the discard is.
        let other = space.allocate(ChunkKind::Data, MIB, SECTOR_BYTES, txg, &*tree).unwrap();
        assert!(other.addr.0 >= run.addr.0 + MIB, "{other:?} is being discarded");
    }));
    let mut trim = Trim::new(0..run.addr.0 + MIB, 0);
    while world.space.trim_piece(&mut trim, &*world.tree).unwrap() {}
    assert_eq!(trim.discarded(), MIB / 2);
    assert!(world.pool.event.lock().is_none());
    drop(promise);
    assert_eq!(allocate(&world, ChunkKind::Data, MIB / 2).addr, run.end());
}

#[test]
fn a_discard_that_fails_ends_the_trim_and_loses_no_space() {
    let mut world = half_empty();
    world.publish();
    world.release(0);
    let mut failing = FakePool::new(MIB, 8 * MIB);
    failing.discards_fail = true;
    failing.chunks = Mutex::new(core::mem::take(&mut *world.pool.chunks.lock()));
    failing.next = Mutex::new(*world.pool.next.lock());
    world.pool = Arc::new(failing);
    world.crash();
    let before = (world.space.usage(), world.pool.unallocated_bytes());
    let first = world.pool.chunks.lock().iter().map(|c| c.chunk.logical.0).min().unwrap();
    for range in [first..first + 8 * MIB, REST..u64::MAX] {
        let mut trim = Trim::new(range, 0);
        let mut outcome = Ok(true);
        while outcome == Ok(true) {
            outcome = world.space.trim_piece(&mut trim, &*world.tree);
        }
        assert_eq!(outcome, Err(Error::Failed));
        assert_eq!(trim.discarded(), 0);
        assert_eq!((world.space.usage(), world.pool.unallocated_bytes()), before);
        world.check();
    }
}

#[test]
fn a_trim_leaves_to_a_full_pool_what_is_promised() {
    let world = World::new(MIB, 4 * MIB, 64);
    allocate(&world, ChunkKind::Data, SECTOR_BYTES);
    let available = world.space.available_data();
    let promise = world.space.reserve(available, 0, Class::Normal).unwrap();
    let mut trim = Trim::new(0..u64::MAX, 0);
    while world.space.trim_piece(&mut trim, &*world.tree).unwrap() {}
    assert_eq!(trim.discarded(), 0);
    drop(promise);
    let mut trim = Trim::new(0..u64::MAX, 0);
    while world.space.trim_piece(&mut trim, &*world.tree).unwrap() {}
    assert!(trim.discarded() > 0);
}

#[test]
fn a_chunk_made_for_the_open_group_serves_the_one_being_written() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    // Room for one data chunk, and one of metadata.
    let filler = allocate(&world, ChunkKind::Data, MIB);
    world.groups[0].taken.extend(sectors(filler));
    let mut nodes = world.space.reserve(0, NODE, Class::Delete).unwrap();
    let mut older = world.space.reserve(MIB / 2, 0, Class::Admin).unwrap();
    let mut younger = world.space.reserve(MIB / 2, 0, Class::Admin).unwrap();
    assert_eq!(world.space.available_data(), 0);
    spend_data(&mut world, &mut younger, 128, 1);
    spend_data(&mut world, &mut older, 128, 0);
    spend_metadata(&mut world, &mut nodes, 0);
    assert_eq!((older.data(), younger.data(), nodes.metadata()), (0, 0, 0));
}

/// Data chunks of which only the first holds anything, at a time when nothing is unallocated.
fn emptied(chunks: usize) -> (World, Vec<Run>) {
    emptied_of(chunks, MIB)
}

fn emptied_of(chunks: usize, chunk_bytes: u64) -> (World, Vec<Run>) {
    let mut world = World::new(chunk_bytes, chunks as u64 * chunk_bytes, 64);
    let bytes = chunk_bytes.min(REGION_BYTES);
    let count = chunks as u64 * chunk_bytes / bytes;
    let runs: Vec<Run> = (0..count).map(|_| allocate(&world, ChunkKind::Data, bytes)).collect();
    for run in &runs {
        world.groups[0].taken.extend(sectors(*run));
    }
    world.cut();
    // After the cut: the tree says used, the residue knows better.
    for run in &runs[1..] {
        world.space.free(*run, world.txg(0));
        world.groups[0].freed.extend(sectors(*run));
    }
    world.publish();
    world.release(0);
    (world, runs)
}

#[test]
fn dropping_a_chunk_deletes_the_bitmaps_that_only_the_residue_cleared() {
    let (mut world, runs) = emptied(4);
    let gone = world.space.drop_empty(world.txg(0), &*world.tree).unwrap();
    // Two make room for any chunk; the third stays.
    assert_eq!(gone, [runs[1].addr, runs[2].addr]);
    assert!(world.tree.bitmap(gone[0]).unwrap().is_some());
    world.publish();
    for chunk in gone {
        assert!(!world.tree.items.lock().contains_key(&cut::summary_key(chunk)));
        assert!(world.tree.bitmap(chunk).unwrap().is_none());
    }
    world.crash();
    world.check();
}

#[test]
fn an_empty_chunk_that_a_promise_counts_on_is_not_dropped() {
    let (world, runs) = emptied(4);
    let promised = 2 * MIB - Reserve::of(4 * MIB, 2, NODE).data;
    let promise = world.space.reserve(promised, 0, Class::Admin).unwrap();
    let gone = world.space.drop_empty(world.txg(0), &*world.tree).unwrap();
    assert_eq!(gone, [runs[1].addr]);
    drop(promise);
}

#[test]
fn a_chunk_that_is_used_while_its_bitmaps_are_read_is_not_dropped() {
    let (world, runs) = emptied_of(2, 2 * REGION_BYTES);
    world.space.forget_bitmaps();
    let (space, tree, txg) = (&world.space, &world.tree, world.txg(0));
    // The first region of the second chunk was seen empty; now it is not.
    let event = move || space.take(runs[2], txg, &**tree).unwrap();
    let source =
        Meanwhile { tree, when: 2, event: Mutex::new(Some(Box::new(event))), reads: Mutex::new(0) };
    assert_eq!(space.drop_empty(txg, &source).unwrap(), []);
    assert_eq!(*source.reads.lock(), 2);
    space.check(&**tree).unwrap();
}

#[test]
fn nodes_step_back_into_line_after_a_block_of_another_size() {
    let world = World::new(MIB, 4 * MIB, 64);
    allocate(&world, ChunkKind::Metadata, SECTOR_BYTES);
    let node = allocate(&world, ChunkKind::Metadata, NODE);
    assert_eq!(node.addr.0 % NODE, 0);
    assert_eq!(allocate(&world, ChunkKind::Metadata, NODE).addr, node.end());
}

#[test]
fn an_empty_chunk_goes_back_when_the_other_kind_starves() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    let runs: Vec<Run> = (0..4).map(|_| allocate(&world, ChunkKind::Data, MIB)).collect();
    for run in &runs {
        world.groups[0].taken.extend(sectors(*run));
    }
    world.publish();
    assert!(world
        .space
        .allocate(ChunkKind::Metadata, NODE, NODE, world.txg(0), &*world.tree)
        .is_err());
    for run in &runs[1..] {
        world.space.free(*run, world.txg(0));
        world.groups[0].freed.extend(sectors(*run));
    }
    assert_eq!(world.space.drop_empty(world.txg(0), &*world.tree).unwrap(), []);
    world.publish();
    assert_eq!(world.space.drop_empty(world.txg(0), &*world.tree).unwrap(), []);
    world.release(0);
    let gone = world.space.drop_empty(world.txg(0), &*world.tree).unwrap();
    assert!(!gone.is_empty());
    let node = allocate(&world, ChunkKind::Metadata, NODE);
    world.groups[0].taken.extend(sectors(node));
    world.publish();
    for chunk in gone {
        assert!(!world.tree.items.lock().contains_key(&cut::summary_key(chunk)));
        assert!(world.tree.bitmap(chunk).unwrap().is_none());
    }
    world.crash();
    world.check();
}

#[test]
fn a_group_that_is_sealed_gets_no_chunk_and_none_of_younger_groups() {
    let world = World::new(MIB, 8 * MIB, 64);
    let txg = world.txg(0);
    world.space.ensure_free(ChunkKind::Metadata, 3 * NODE, txg, &*world.tree).unwrap();
    world.space.seal_chunks(txg, || ());
    let data = world.space.allocate(ChunkKind::Data, NODE, NODE, txg, &*world.tree);
    assert_eq!(data, Err(Error::NoSpace));
    let next = world.space.allocate(ChunkKind::Data, NODE, NODE, world.txg(1), &*world.tree);
    let next = next.unwrap();
    assert!(!world.space.is_published(next));
    let data = world.space.allocate(ChunkKind::Data, NODE, NODE, txg, &*world.tree);
    assert_eq!(data, Err(Error::NoSpace));
    for _ in 0..3 {
        allocate(&world, ChunkKind::Metadata, NODE);
    }
}

#[test]
fn log_space_comes_only_from_published_chunks() {
    let mut world = World::new(MIB, 8 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    let log = world.space.allocate_published(NODE, NODE, world.txg(0), &*world.tree);
    assert_eq!(log, Err(Error::NoSpace));
    assert!(!world.space.is_published(run));
    world.publish();
    assert!(world.space.is_published(run));
    world.space.allocate_published(NODE, NODE, world.txg(0), &*world.tree).unwrap();
}

#[test]
fn ensured_metadata_is_there_although_space_is_fragmented() {
    let mut world = World::new(MIB, 16 * MIB, 64);
    // Every other sector of a chunk is free: plenty of bytes, no room for a node.
    let all = allocate(&world, ChunkKind::Metadata, MIB);
    world.groups[0].taken.extend(sectors(all));
    for sector in sectors(all).step_by(2) {
        world.space.free(run_at(sector, 1), world.txg(0));
        world.groups[0].freed.insert(sector);
    }
    world.publish();
    world.release(0);
    let txg = world.txg(0);
    world.space.ensure_free(ChunkKind::Metadata, 8 * NODE, txg, &*world.tree).unwrap();
    world.space.seal_chunks(txg, || ());
    for _ in 0..8 {
        allocate(&world, ChunkKind::Metadata, NODE);
    }
}

#[test]
fn a_last_bit_that_is_smaller_than_a_chunk_is_used_when_nothing_else_is_left() {
    // The fake pool makes chunks of what is left.
    let world = World::new(4 * MIB, 5 * MIB, 64);
    assert_eq!(world.space.available_data(), 0, "the reserve's chunk does not fit");
    assert_eq!(allocate(&world, ChunkKind::Data, 4 * MIB).bytes, 4 * MIB);
    assert_eq!(allocate(&world, ChunkKind::Data, MIB).bytes, MIB);
}

#[test]
fn the_longest_run_is_found_when_none_is_as_long_as_wanted() {
    let mut world = World::new(MIB, MIB, 64);
    let all = allocate(&world, ChunkKind::Data, MIB);
    world.groups[0].taken.extend(sectors(all));
    let first = all.addr.0 / SECTOR_BYTES;
    for (at, len) in [(3, 2), (50, 7), (120, 5)] {
        world.space.free(run_at(first + at, len), world.txg(0));
        world.groups[0].freed.extend(first + at..first + at + len);
    }
    world.publish();
    world.release(0);
    world.space.forget_bitmaps();
    let txg = world.txg(0);
    let get = || world.space.allocate(ChunkKind::Data, MIB, SECTOR_BYTES, txg, &*world.tree);
    assert_eq!(get(), Ok(run_at(first + 50, 7)));
    assert_eq!(get(), Ok(run_at(first + 120, 5)));
    assert_eq!(get(), Ok(run_at(first + 3, 2)));
    assert_eq!(get(), Err(Error::NoSpace));
}

// Crafted pools.

/// A published pool with one data chunk, half of it used, opened with another summary.
fn with_summary(used: u64) -> (World, Run, Result<()>) {
    let mut world = World::new(MIB, 2 * MIB, 64);
    let run = allocate(&world, ChunkKind::Data, MIB / 2);
    world.groups[0].taken.extend(sectors(run));
    world.publish();
    let options = Options { published: world.published, ..Options::default() };
    world.space = Arc::new(Space::new(world.pool.clone(), options));
    let chunk = world.pool.chunks_at(world.published).remove(0);
    let added = world.space.add_chunk(&chunk, used);
    (world, run, added)
}

#[test]
fn a_summary_that_counts_too_much_is_refused() {
    assert!(matches!(with_summary(257).2, Err(Error::Corrupt { .. })));
    assert!(matches!(with_summary(u64::MAX).2, Err(Error::Corrupt { .. })));
}

#[test]
fn a_lying_summary_never_makes_used_sectors_free() {
    for lie in [0, 1, 127, 129, 255, 256] {
        let (mut world, run, added) = with_summary(lie);
        added.unwrap();
        assert!(world.space.check(&*world.tree).is_err());
        assert_eq!(world.space.drop_empty(world.txg(0), &*world.tree).unwrap(), []);
        for _ in 0..300 {
            world.allocate(ChunkKind::Data, 0, 2, 1);
        }
        world.space.free(run, world.txg(0));
        match world.space.cut(world.txg(0), &*world.tree) {
            Ok(_) => {}
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error:?}"),
        }
    }
}

#[test]
fn a_chunk_that_only_claims_to_be_empty_is_not_dropped() {
    let (mut world, _) = emptied(4);
    let options = Options { published: world.published, ..Options::default() };
    world.space = Arc::new(Space::new(world.pool.clone(), options));
    for chunk in world.pool.chunks_at(world.published) {
        world.space.add_chunk(&chunk, 0).unwrap();
    }
    // No residue: the tree alone says that everything is used.
    assert_eq!(world.space.drop_empty(world.txg(0), &*world.tree).unwrap(), []);
}

#[test]
fn a_bitmap_of_the_wrong_length_is_refused() {
    for length in [0, 1, 31, 33, 1024] {
        let mut world = World::new(MIB, MIB, 64);
        let run = allocate(&world, ChunkKind::Data, MIB / 2);
        world.groups[0].taken.extend(sectors(run));
        world.publish();
        world.space.forget_bitmaps();
        world.tree.items.lock().insert(cut::bitmap_key(Logical(MIB)), vec![0xff; length]);
        let got = world.space.allocate(ChunkKind::Data, NODE, NODE, world.txg(0), &*world.tree);
        assert!(matches!(got, Err(Error::Corrupt { .. })), "{got:?}");
        world.space.free(run, world.txg(0));
        let cut = world.space.cut(world.txg(0), &*world.tree);
        assert!(matches!(cut, Err(Error::Corrupt { .. })), "{cut:?}");
    }
}

#[test]
fn a_residue_that_contradicts_itself_or_the_chunks_is_refused() {
    let run = run_at(256, 4);
    let far = run_at(1 << 40, 1);
    let wide = run_at(256, 4096);
    let residue =
        |taken: &[Run], freed: &[Run]| Residue { taken: taken.to_vec(), freed: freed.to_vec() };
    let bad = [
        residue(&[run, run], &[]),
        residue(&[], &[run, run]),
        residue(&[run], &[run]),
        residue(&[far], &[]),
        residue(&[], &[far]),
        residue(&[wide], &[]),
        residue(&[], &[wide]),
    ];
    for residue in bad {
        let (world, _, added) = with_summary(128);
        added.unwrap();
        assert!(world.space.load_residue(residue.clone()).is_err(), "{residue:?}");
    }
}

#[test]
fn a_residue_that_contradicts_a_bitmap_is_found_when_the_bitmap_is_read() {
    // The first half of the chunk is used.
    let lies = [
        Residue { taken: vec![run_at(256, 4)], freed: vec![] },
        Residue { taken: vec![], freed: vec![run_at(256 + 200, 4)] },
    ];
    for residue in lies {
        let (world, _, added) = with_summary(128);
        added.unwrap();
        world.space.load_residue(residue.clone()).unwrap();
        let got = world.space.allocate(ChunkKind::Data, NODE, NODE, world.txg(0), &*world.tree);
        assert!(matches!(got, Err(Error::Corrupt { .. })), "{residue:?}: {got:?}");
    }
}

#[test]
fn nonsense_arguments_are_errors() {
    let world = World::new(MIB, 4 * MIB, 64);
    let get = |want, min, txg| world.space.allocate(ChunkKind::Data, want, min, txg, &*world.tree);
    let txg = world.txg(0);
    for (want, min) in [(0, 0), (4096, 0), (4096, 8192), (4097, 4096), (8192, 1)] {
        assert!(matches!(get(want, min, txg), Err(Error::Argument { .. })), "{want} {min}");
    }
    assert!(matches!(get(4096, 4096, Txg(0)), Err(Error::Argument { .. })));
    assert_eq!(get(!4095, 1 << 40, txg), Err(Error::NoSpace));
    assert!(get(!4095, 4096, txg).is_ok());
    let space = &world.space;
    assert!(matches!(space.cut(Txg(0), &*world.tree), Err(Error::Argument { .. })));
    space.cut(txg, &*world.tree).unwrap();
    assert!(matches!(space.cut(txg, &*world.tree), Err(Error::Argument { .. })));
    assert_eq!(space.reserve(u64::MAX, 0, Class::Admin).err(), Some(Error::NoSpace));
    assert_eq!(space.reserve(0, u64::MAX, Class::Admin).err(), Some(Error::NoSpace));
    assert_eq!(space.reserve(1 << 62, 1 << 62, Class::Admin).err(), Some(Error::NoSpace));
}

// Range sets and bitmaps.

proptest! {
    #[test]
    fn a_range_set_is_the_set_of_its_members(
        ranges in proptest::collection::vec((0..200u64, 1..20u64), 0..40),
        others in proptest::collection::vec((0..200u64, 1..20u64), 0..20),
        window in (0..220u64, 0..220u64),
    ) {
        let build = |ranges: &[(u64, u64)]| {
            let (mut set, mut model) = (RunSet::default(), BTreeSet::new());
            for (start, len) in ranges {
                let members = *start..start + len;
                let overlaps = members.clone().any(|x| model.contains(&x));
                assert_eq!(set.insert(members.clone()).is_err(), overlaps);
                if !overlaps {
                    model.extend(members);
                }
            }
            (set, model)
        };
        let (set, model) = build(&ranges);
        let (other, other_model) = build(&others);
        let flat = |set: &RunSet| set.iter().flatten().collect::<BTreeSet<u64>>();
        prop_assert_eq!(flat(&set), model.clone());
        prop_assert_eq!(set.bytes(), model.len() as u64);
        let list: Vec<_> = set.iter().collect();
        prop_assert!(list.windows(2).all(|w| w[0].end < w[1].start), "ranges touch");
        let difference: BTreeSet<u64> = model.difference(&other_model).copied().collect();
        prop_assert_eq!(flat(&set.without(&other)), difference);
        let window = window.0.min(window.1)..window.0.max(window.1);
        let inside: BTreeSet<u64> = set.within(window.clone()).flatten().collect();
        let expected: BTreeSet<u64> = model.range(window.clone()).copied().collect();
        prop_assert_eq!(&inside, &expected);
        prop_assert_eq!(set.touches(window), !expected.is_empty());
        for run in set.to_runs(|at| (at / 16 + 1) * 16) {
            prop_assert_eq!(run.addr.0 / 16, (run.end().0 - 1) / 16);
        }
    }

    #[test]
    fn a_bitmap_is_the_set_of_its_sectors(
        changes in proptest::collection::vec((0..256u32, 1..80u32, any::<bool>()), 0..20),
        from in 0..256u32,
        want in 1..100u32,
    ) {
        let mut bits = bits::Bits::free(256).unwrap();
        let mut model = vec![false; 256];
        for (start, len, used) in changes {
            let range = start..(start + len).min(256);
            let slice = &mut model[range.start as usize..range.end as usize];
            let differ = slice.iter().filter(|bit| **bit != used).count() as u32;
            let changed = if used { bits.set(range.clone()) } else { bits.clear(range.clone()) };
            prop_assert_eq!(changed, differ);
            slice.fill(used);
            prop_assert_eq!(bits.is_free(range.clone()), !used);
            if !used {
                let left = model[..range.start as usize].iter().rev();
                let before = left.take_while(|b| !**b).count();
                let after = model[range.end as usize..].iter().take_while(|b| !**b).count();
                let around = (before + after) as u32 + range.end - range.start;
                prop_assert_eq!(bits.free_around(range), around);
            }
        }
        prop_assert_eq!(bits.used() as usize, model.iter().filter(|bit| **bit).count());
        let next = |wanted| {
            (from..256).find(|at| model[*at as usize] == wanted).unwrap_or(256)
        };
        prop_assert_eq!(bits.next_used(from), next(true));
        prop_assert_eq!(bits.next_free(from), next(false));
        let room = |at: u32| model[at as usize..].iter().take_while(|bit| !**bit).count() as u32;
        let first = (from..256).find(|at| room(*at) >= want);
        prop_assert_eq!(bits.first_fit(from, want).ok().map(|run| run.start), first);
        let encoded = bits.encode();
        prop_assert_eq!(encoded.len(), 32);
        let decoded = bits::Bits::decode(Logical(0), 256, Some(&encoded)).unwrap();
        prop_assert_eq!(decoded, bits);
    }
}

#[test]
fn the_log_takes_no_data_that_is_promised_and_a_delete_is_let_in_even_if_somebody_did() {
    let mut world = World::new(MIB, 4 * MIB, 64);
    // One chunk of each kind, published, and no room for another.
    let node = allocate(&world, ChunkKind::Metadata, NODE);
    world.groups[0].taken.extend(sectors(node));
    let first = allocate(&world, ChunkKind::Data, SECTOR_BYTES);
    world.groups[0].taken.extend(sectors(first));
    world.cut();
    world.publish();
    let left = world.space.reserve(world.space.available_data(), 0, Class::Normal).unwrap();
    assert!(left.data() > 0);
    let log = world.space.allocate_published(NODE, SECTOR_BYTES, world.txg(0), &*world.tree);
    assert_eq!(log.err(), Some(Error::NoSpace));

    // Somebody takes what the promises and the reserve count on.
    let all = MIB - SECTOR_BYTES;
    let taken = allocate(&world, ChunkKind::Data, all / 2 / SECTOR_BYTES * SECTOR_BYTES);
    world.groups[0].taken.extend(sectors(taken));
    let more = world.space.reserve(0, NODE, Class::Normal);
    assert_eq!(more.err(), Some(Error::NoSpace));
    let delete = world.space.reserve(0, NODE, Class::Delete).unwrap();
    drop((left, delete));
}

#[test]
fn a_chunk_of_the_reserve_is_made_for_sectors_that_are_promised_but_not_for_a_longer_run() {
    let mut world = World::new(MIB, 3 * MIB, 64);
    let first = allocate(&world, ChunkKind::Data, MIB);
    world.groups[0].taken.extend(sectors(first));
    // Two MiB are left: the reserve's, for a chunk of metadata.
    let (txg, tree) = (world.txg(0), world.tree.clone());
    let blob =
        world.space.allocate(ChunkKind::Data, 2 * SECTOR_BYTES, 2 * SECTOR_BYTES, txg, &*tree);
    assert_eq!(blob.err(), Some(Error::NoSpace));
    let sector = world.space.allocate(ChunkKind::Data, SECTOR_BYTES, SECTOR_BYTES, txg, &*tree);
    world.groups[0].taken.extend(sectors(sector.unwrap()));
}
