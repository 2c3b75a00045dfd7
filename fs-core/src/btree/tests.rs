//! The tree against a `BTreeMap`, over a store that counts what becomes of every node.

use super::check::check;
use super::*;
use crate::format::node::{capacity, NodeBuilder, VALUE_BYTES_MAX};
use crate::format::ptr::{CompressionKind, LEVELS_MAX};
use crate::sync::Mutex;
use alloc::collections::{BTreeMap, BTreeSet};
use proptest::prelude::*;

const TREE: TreeId = TreeId(300);
const POOL_ID: [u8; 16] = *b"a pool of nodes.";

#[derive(Default)]
struct Blocks {
    next: u64,
    reserved: BTreeSet<Logical>,
    written: BTreeMap<Logical, Arc<Node>>,
    live: BTreeSet<Logical>,
    allocated: u64,
    /// How many more calls succeed.
    calls_left: Option<usize>,
    /// What `prefetch` was told.
    hints: Vec<Vec<Logical>>,
}

impl Blocks {
    fn call(&mut self) -> Result<()> {
        match &mut self.calls_left {
            Some(0) => return Err(Error::Failed),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(())
    }
}

/// Nodes in memory; panics when one is written, freed or allocated other than exactly once.
struct Store {
    node_bytes: usize,
    txg: Mutex<u64>,
    blocks: Mutex<Blocks>,
}

impl Store {
    fn new(node_bytes: usize) -> Store {
        let blocks = Blocks { next: 1 << 20, ..Blocks::default() };
        Store { node_bytes, txg: Mutex::new(1), blocks: Mutex::new(blocks) }
    }

    fn allocated(&self) -> u64 {
        self.blocks.lock().allocated
    }

    /// Applies a batch in a group of its own, and checks everything that can be checked.
    fn apply(&self, tree: &Tree, edits: &[(Key, Edit)]) -> Tree {
        *self.txg.lock() += 1;
        let before = self.allocated();
        let after = tree.apply(self, edits).unwrap();
        let value_bytes = edits.iter().map(|(_, edit)| match edit {
            Edit::Put(value) => value.len(),
            Edit::Delete => 0,
        });
        let bound = tree.apply_bound(edits.len(), value_bytes.sum(), self.node_bytes);
        let allocated = self.allocated() - before;
        assert!(allocated <= bound, "{allocated} nodes allocated, {bound} promised");
        self.verify(&after);
        after
    }

    /// Goes back to `tree`, which this store has had before: the next batch is applied to it.
    fn go_back(&self, tree: &Tree) {
        let mut live = BTreeSet::new();
        tree.walk(self, &mut |visit| {
            live.insert(visit.ptr.addr);
            Ok(Walk::Down)
        })
        .unwrap();
        self.blocks.lock().live = live;
    }

    /// Exactly the nodes of `tree` are allocated and not freed.
    fn verify(&self, tree: &Tree) {
        let mut reachable = BTreeSet::new();
        tree.walk(self, &mut |visit| {
            assert!(visit.node.is_ok(), "{:?}", visit.node);
            assert!(reachable.insert(visit.ptr.addr), "node visited twice");
            Ok(Walk::Down)
        })
        .unwrap();
        let blocks = self.blocks.lock();
        assert!(blocks.reserved.is_empty(), "allocated but not written: {:?}", blocks.reserved);
        assert_eq!(blocks.live, reachable, "nodes alive (left), nodes reachable (right)");
    }
}

impl NodeSource for Store {
    fn node_bytes(&self) -> usize {
        self.node_bytes
    }
    fn pool_id(&self) -> [u8; 16] {
        POOL_ID
    }
    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        let mut blocks = self.blocks.lock();
        blocks.call()?;
        let lost = Error::Checksum { addr: ptr.addr, bytes: u64::from(ptr.stored) };
        let node = blocks.written.get(&ptr.addr).ok_or(lost)?;
        assert_eq!(node.tree(), tree);
        assert_eq!(node.ptr(), ptr);
        Ok(node.clone())
    }
    fn prefetch(&self, _: TreeId, ptrs: &[BlockPtr]) {
        self.blocks.lock().hints.push(ptrs.iter().map(|ptr| ptr.addr).collect());
    }
}

impl NodeSink for Store {
    fn as_source(&self) -> &dyn NodeSource {
        self
    }
    fn txg(&self) -> Txg {
        Txg(*self.txg.lock())
    }
    fn allocate(&self, _: TreeId, count: usize) -> Result<Vec<Logical>> {
        let mut blocks = self.blocks.lock();
        blocks.call()?;
        let mut addrs = Vec::new();
        for _ in 0..count {
            addrs.push(Logical(blocks.next));
            blocks.next += self.node_bytes as u64;
        }
        blocks.reserved.extend(&addrs);
        blocks.allocated += count as u64;
        Ok(addrs)
    }
    fn write(&self, tree: TreeId, level: u8, nodes: Vec<(Logical, Buf)>) -> Result<Vec<BlockPtr>> {
        let txg = self.txg();
        let mut blocks = self.blocks.lock();
        blocks.call()?;
        let mut ptrs = Vec::new();
        for (addr, buf) in nodes {
            assert!(blocks.reserved.remove(&addr), "written twice or never allocated");
            let ptr = pointer(&buf, addr, level, txg);
            let node = Node::decode(buf.into_slice(), &ptr, tree, &POOL_ID, self.node_bytes);
            blocks.written.insert(addr, Arc::new(node.unwrap()));
            blocks.live.insert(addr);
            ptrs.push(ptr);
        }
        Ok(ptrs)
    }
    fn free(&self, _: TreeId, ptr: &BlockPtr) {
        assert!(self.blocks.lock().live.remove(&ptr.addr), "freed twice");
    }
}

fn pointer(bytes: &[u8], addr: Logical, level: u8, birth: Txg) -> BlockPtr {
    BlockPtr {
        addr,
        birth,
        stored: bytes.len() as u32,
        logical: bytes.len() as u32,
        compression: CompressionKind::None,
        level,
        checksum: *blake3::hash(bytes).as_bytes(),
    }
}

fn key(n: u64) -> Key {
    Key::new(n / 16, (n / 4 % 4) as u8, n % 4)
}

fn value(seed: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (seed as usize + i) as u8).collect()
}

fn puts(numbers: impl Iterator<Item = u64>, len: usize) -> Vec<(Key, Edit)> {
    numbers.map(|n| (key(n), Edit::Put(value(n, len)))).collect()
}

/// All items by walking forwards, compared with walking backwards.
fn items(store: &Store, tree: &Tree) -> Vec<(Key, Vec<u8>)> {
    let mut cursor = tree.cursor();
    let mut forwards = Vec::new();
    while let Some((key, value)) = cursor.next(store).unwrap() {
        forwards.push((key, value.to_vec()));
    }
    let mut backwards = Vec::new();
    while let Some((key, value)) = cursor.prev(store).unwrap() {
        backwards.push((key, value.to_vec()));
    }
    backwards.reverse();
    assert_eq!(forwards, backwards);
    forwards
}

#[derive(Clone, Debug)]
struct Step {
    /// Numbers to put: the length of each value.
    puts: BTreeMap<u64, usize>,
    /// Numbers to delete.
    deletes: BTreeSet<u64>,
    /// Everything in here is deleted.
    wipe: Option<(u64, u64)>,
}

fn step() -> impl Strategy<Value = Step> {
    const SPAN: u64 = 6000;
    let len = prop_oneof![
        4 => 0..100usize,
        2 => 100..1000usize,
        1 => 1000..=VALUE_BYTES_MAX,
        1 => Just(0usize),
        1 => Just(VALUE_BYTES_MAX),
    ];
    let scattered = proptest::collection::btree_map(0..SPAN, len.clone(), 0..150);
    let dense = (0..SPAN, 1..400u64, len.clone())
        .prop_map(|(start, count, len)| (start..start + count).map(|n| (n, len)).collect());
    let none = Just(BTreeMap::new());
    let wipe = prop_oneof![
        3 => Just(None),
        2 => (0..SPAN, 0..SPAN).prop_map(Some),
        1 => Just(Some((0, SPAN * 2))),
    ];
    (
        prop_oneof![3 => scattered, 2 => dense, 1 => none],
        proptest::collection::btree_set(0..SPAN, 0..100),
        wipe,
    )
        .prop_map(|(puts, deletes, wipe)| Step { puts, deletes, wipe })
}

fn edits_of(step: &Step, model: &BTreeMap<Key, Vec<u8>>, seed: u64) -> Vec<(Key, Edit)> {
    let mut edits = BTreeMap::new();
    if let Some((a, b)) = step.wipe {
        let range = key(a.min(b))..key(a.max(b));
        edits.extend(model.range(range).map(|(key, _)| (*key, Edit::Delete)));
    }
    edits.extend(step.deletes.iter().map(|n| (key(*n), Edit::Delete)));
    edits.extend(step.puts.iter().map(|(n, len)| (key(*n), Edit::Put(value(n + seed, *len)))));
    edits.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_tree_holds_what_a_map_holds_after_any_batches(
        node_bytes in prop_oneof![Just(16384usize), Just(32768), Just(65536)],
        steps in proptest::collection::vec(step(), 1..12),
        probes in proptest::collection::vec(0..6500u64, 20),
    ) {
        let store = Store::new(node_bytes);
        let mut tree = Tree::empty(TREE);
        let mut model: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
        for (seed, step) in steps.iter().enumerate() {
            let edits = edits_of(step, &model, seed as u64);
            tree = store.apply(&tree, &edits);
            for (key, edit) in edits {
                match edit {
                    Edit::Put(value) => model.insert(key, value),
                    Edit::Delete => model.remove(&key),
                };
            }
            let census = check(&tree, &store).unwrap();
            prop_assert_eq!(census.items, model.len() as u64);
            // Only right edges, and the lone child of a parent that shrank, stay sparse.
            prop_assert!(census.sparse <= 3 + census.node_count() / 8, "{:?}", census);
            prop_assert_eq!(tree.root.is_none(), model.is_empty());
        }
        let expected: Vec<_> = model.iter().map(|(k, v)| (*k, v.clone())).collect();
        prop_assert_eq!(items(&store, &tree), expected);
        for n in probes {
            let key = key(n);
            let found = tree.lookup(&store, &key).unwrap().map(|value| value.to_vec());
            prop_assert_eq!(found.as_ref(), model.get(&key));
            let from = tree.first_from(&store, &key).unwrap().map(|(key, _)| key);
            prop_assert_eq!(from, model.range(key..).next().map(|(key, _)| *key));
            let upto = tree.last_upto(&store, &key).unwrap().map(|(key, _)| key);
            prop_assert_eq!(upto, model.range(..=key).next_back().map(|(key, _)| *key));
        }
    }

    #[test]
    fn a_cursor_moves_like_a_position_in_a_sorted_list(
        numbers in proptest::collection::btree_set(0..3000u64, 0..600),
        start in 0..3000u64,
        moves in proptest::collection::vec(any::<bool>(), 0..800),
    ) {
        let store = Store::new(16384);
        let tree = store.apply(&Tree::empty(TREE), &puts(numbers.iter().copied(), 150));
        let list: Vec<Key> = numbers.into_iter().map(key).collect();
        let mut at = list.partition_point(|k| *k < key(start));
        let mut cursor = tree.cursor();
        cursor.seek(&store, &key(start)).unwrap();
        for forward in moves {
            if forward {
                prop_assert_eq!(cursor.next(&store).unwrap().map(|i| i.0), list.get(at).copied());
                at = (at + 1).min(list.len());
            } else {
                let before = at.checked_sub(1).map(|i| list[i]);
                prop_assert_eq!(cursor.prev(&store).unwrap().map(|i| i.0), before);
                at = at.saturating_sub(1);
            }
        }
    }

    #[test]
    fn a_node_with_flipped_bits_is_refused_or_means_something_valid(
        level in 0..2u8,
        lens in proptest::collection::vec(0..600usize, 1..20),
        flips in proptest::collection::vec((0..16384usize, 0..8u32), 1..4),
        near_start in any::<bool>(),
    ) {
        let (mut image, ptr) = sample(level, &lens);
        for (byte, bit) in flips {
            image[if near_start { byte % 400 } else { byte }] ^= 1 << bit;
        }
        if let Ok(node) = Node::decode(image.into_slice(), &ptr, TREE, &POOL_ID, 16384) {
            read_everything(&node);
        }
    }

    #[test]
    fn random_bytes_behind_a_right_header_never_panic(
        level in 0..2u8,
        count in any::<u16>(),
        noise in proptest::collection::vec(any::<u8>(), 2000),
    ) {
        let (mut image, ptr) = sample(level, &[8]);
        image[6..8].copy_from_slice(&count.to_le_bytes());
        image[96..96 + noise.len()].copy_from_slice(&noise);
        if let Ok(node) = Node::decode(image.into_slice(), &ptr, TREE, &POOL_ID, 16384) {
            read_everything(&node);
        }
    }
}

fn sample(level: u8, lens: &[usize]) -> (Buf, BlockPtr) {
    let mut image = Buf::zeroed(16384).unwrap();
    let mut builder = NodeBuilder::new(&mut image, level);
    for (n, len) in lens.iter().enumerate() {
        let child = pointer(&[0; 16384], Logical(n as u64 * 16384), 0, Txg(3)).encode();
        let value = value(n as u64, *len);
        builder.push(&key(n as u64), if level == 0 { &value } else { &child });
    }
    builder.finish(TREE, Txg(4), POOL_ID);
    let addr = Logical(1 << 30);
    crate::format::node::set_addr(&mut image, addr);
    let ptr = pointer(&image, addr, level, Txg(4));
    (image, ptr)
}

/// Whatever a decoded node holds can be read, and builds the same image again.
fn read_everything(node: &Node) {
    let mut image = Buf::zeroed(node.bytes().len()).unwrap();
    let mut builder = NodeBuilder::new(&mut image, node.level());
    for index in 0..node.count() {
        assert_eq!(node.search(&node.key(index)), Ok(index));
        if node.level() > 0 {
            let child = node.child(index);
            assert!(child.level + 1 == node.level() && child.birth <= node.birth());
        }
        builder.push(&node.key(index), node.content(index));
    }
    builder.finish(node.tree(), node.birth(), POOL_ID);
    crate::format::node::set_addr(&mut image, node.addr());
    assert!(*image == **node.bytes());
}

#[test]
fn every_single_bit_of_a_header_counts() {
    for level in 0..2 {
        for bit in 0..96 * 8 {
            let (mut image, ptr) = sample(level, &[5, 0, 7]);
            image[bit / 8] ^= 1 << (bit % 8);
            let decoded = Node::decode(image.into_slice(), &ptr, TREE, &POOL_ID, 16384);
            assert!(decoded.is_err(), "bit {bit} of a header of level {level} flipped unnoticed");
        }
    }
}

#[test]
fn a_node_that_is_not_what_its_pointer_says_is_refused() {
    let (image, ptr) = sample(0, &[5]);
    let bytes = image.into_slice();
    let decode = |ptr: &BlockPtr, tree, pool: &[u8; 16], len| {
        Node::decode(bytes.clone(), ptr, tree, pool, len).is_ok()
    };
    assert!(decode(&ptr, TREE, &POOL_ID, 16384));
    assert!(!decode(&BlockPtr { addr: Logical(4096), ..ptr }, TREE, &POOL_ID, 16384));
    assert!(!decode(&BlockPtr { birth: Txg(5), ..ptr }, TREE, &POOL_ID, 16384));
    assert!(!decode(&BlockPtr { level: 1, ..ptr }, TREE, &POOL_ID, 16384));
    assert!(!decode(&BlockPtr { logical: 32768, ..ptr }, TREE, &POOL_ID, 16384));
    assert!(!decode(&ptr, TreeId(301), &POOL_ID, 16384));
    assert!(!decode(&ptr, TREE, &[0; 16], 16384));
    assert!(!decode(&ptr, TREE, &POOL_ID, 32768));
}

#[test]
fn an_empty_value_at_the_very_end_of_the_largest_node_can_be_read() {
    let store = Store::new(65536);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..1, 0));
    assert_eq!(tree.lookup(&store, &key(0)).unwrap().unwrap().len(), 0);
}

#[test]
fn deleting_what_is_not_there_gives_the_same_tree_and_allocates_nothing() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts((0..4000).step_by(2), 100));
    let before = store.allocated();
    let absent: Vec<_> = (1..6000).step_by(2).map(|n| (key(n), Edit::Delete)).collect();
    assert_eq!(store.apply(&tree, &absent), tree);
    let same = puts((0..4000).step_by(2), 100);
    assert_eq!(store.apply(&tree, &same), tree, "putting what is there changes nothing either");
    let empty = Tree::empty(TREE);
    assert_eq!(empty.apply(&store, &absent).unwrap(), empty);
    assert_eq!(store.allocated(), before);
}

#[test]
fn ascending_inserts_leave_dense_leaves() {
    for batch in [1, 7, 500] {
        let store = Store::new(16384);
        let mut tree = Tree::empty(TREE);
        for start in (0..3000).step_by(batch) {
            tree = store.apply(&tree, &puts(start..start + batch as u64, 60));
        }
        let census = check(&tree, &store).unwrap();
        let leaves = census.nodes[0];
        let fill = census.leaf_bytes * 100 / ((leaves - 1) * capacity(16384) as u64);
        assert!(fill >= 94, "batches of {batch}: leaves are {fill} % full");
    }
}

#[test]
fn scattered_inserts_leave_leaves_more_than_half_full() {
    let store = Store::new(16384);
    let mut tree = Tree::empty(TREE);
    for start in 0..600 {
        let batch: BTreeSet<u64> = (0..8).map(|i| (start * 8 + i) * 7919 % 100_003).collect();
        tree = store.apply(&tree, &puts(batch.into_iter(), 60));
    }
    let census = check(&tree, &store).unwrap();
    let fill = census.leaf_bytes * 100 / (census.nodes[0] * capacity(16384) as u64);
    assert!(fill >= 55, "leaves are {fill} % full");
}

#[test]
fn a_change_to_one_item_rewrites_one_node_a_level() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..60_000, 60));
    assert_eq!(tree.root.unwrap().level, 2);
    let before = store.allocated();
    let after = store.apply(&tree, &[(key(30_000), Edit::Put(value(1, 60)))]);
    assert_eq!(store.allocated() - before, 3);
    assert_eq!(after.lookup(&store, &key(30_000)).unwrap().unwrap().birth(), store.txg());
    assert!(after.lookup(&store, &key(7)).unwrap().unwrap().birth() < store.txg());
}

#[test]
fn deleting_item_after_item_keeps_leaves_filled_and_ends_with_no_root() {
    let store = Store::new(16384);
    let mut tree = store.apply(&Tree::empty(TREE), &puts(0..20_000, 20));
    let mut left: Vec<u64> = (0..20_000).collect();
    while !left.is_empty() {
        // Every other item, so that every leaf shrinks to half each time.
        let edits: Vec<_> = left.iter().step_by(2).map(|n| (key(*n), Edit::Delete)).collect();
        tree = store.apply(&tree, &edits);
        left = left.into_iter().skip(1).step_by(2).collect();
        let census = check(&tree, &store).unwrap();
        assert!(census.sparse <= 1, "{census:?}");
    }
    assert_eq!(tree.root, None);
}

#[test]
fn a_huge_batch_is_written_in_parts() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts((0..60_000).step_by(2), 400));
    let tree = store.apply(&tree, &puts((1..60_000).step_by(2), 400));
    assert_eq!(check(&tree, &store).unwrap().items, 60_000);
    let wipe: Vec<_> = (10..59_990).map(|n| (key(n), Edit::Delete)).collect();
    let tree = store.apply(&tree, &wipe);
    let census = check(&tree, &store).unwrap();
    // Leaves are joined under one parent only; the two ends were not under one.
    assert!(census.items == 20 && census.node_count() <= 3, "{census:?}");
}

#[test]
fn a_batch_whose_nth_call_fails_says_so_and_leaves_the_old_tree_as_it_was() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts((0..60_000).step_by(2), 50));
    let before = items(&store, &tree);
    let live = store.blocks.lock().live.clone();
    let mut edits = puts((1..60_000).step_by(997), 50);
    edits.extend((40_000..50_000).map(|n| (key(n), Edit::Delete)));
    edits.sort_by_key(|edit| edit.0);
    edits.dedup_by_key(|edit| edit.0);
    let mut failures = 0;
    loop {
        store.blocks.lock().calls_left = Some(failures);
        let result = tree.apply(&store, &edits);
        let mut blocks = store.blocks.lock();
        blocks.calls_left = None;
        if result.is_ok() {
            break;
        }
        assert_eq!(result, Err(Error::Failed));
        failures += 1;
        // The owner gives up the group.
        blocks.live = live.clone();
        blocks.written.retain(|addr, _| live.contains(addr));
        blocks.reserved.clear();
    }
    assert!(failures > 60, "{failures}");
    assert_eq!(items(&store, &tree), before);
}

#[test]
fn edits_out_of_order_or_too_long_are_refused() {
    let store = Store::new(16384);
    let tree = Tree::empty(TREE);
    for pair in [[1, 0], [1, 1]] {
        assert!(tree.apply(&store, &puts(pair.into_iter(), 1)).is_err());
    }
    assert!(tree.apply(&store, &puts(0..1, VALUE_BYTES_MAX + 1)).is_err());
    assert!(tree.apply(&store, &puts(0..1, VALUE_BYTES_MAX)).is_ok());
}

/// Writes a node as a forger would: sound in itself, with a right checksum.
fn forge(store: &Store, level: u8, entries: &[(Key, BlockPtr)]) -> BlockPtr {
    let addr = store.allocate(TREE, 1).unwrap()[0];
    let mut image = Buf::zeroed(store.node_bytes).unwrap();
    let mut builder = NodeBuilder::new(&mut image, level);
    for (key, ptr) in entries {
        let child = ptr.encode();
        builder.push(key, if level == 0 { b"value" } else { &child });
    }
    builder.finish(TREE, store.txg(), POOL_ID);
    crate::format::node::set_addr(&mut image, addr);
    store.write(TREE, level, Vec::from([(addr, image)])).unwrap()[0]
}

#[test]
fn a_leaf_under_an_entry_with_another_key_is_reported_by_every_operation() {
    let store = Store::new(16384);
    let none = pointer(&[0; 16384], Logical(0), 0, Txg(1));
    let leaf = |keys: &[u64]| {
        let items: Vec<_> = keys.iter().map(|n| (key(*n), none)).collect();
        forge(&store, 0, &items)
    };
    let (low, wrong_start, too_far) = (leaf(&[0, 1]), leaf(&[11, 12]), leaf(&[0, 10]));
    let high = leaf(&[10, 20]);
    for (left, right) in [(low, wrong_start), (too_far, high), (low, low)] {
        let root = forge(&store, 1, &[(key(0), left), (key(10), right)]);
        let tree = Tree { id: TREE, root: Some(root) };
        let bad = if left == low { 10 } else { 0 };
        let is_corrupt = |error: Error| matches!(error, Error::Corrupt { .. });
        assert!(is_corrupt(tree.lookup(&store, &key(bad)).unwrap_err()));
        assert!(is_corrupt(tree.cursor().seek(&store, &key(bad)).unwrap_err()));
        let edit = [(key(bad), Edit::Put(Vec::new()))];
        assert!(is_corrupt(tree.apply(&store, &edit).unwrap_err()));
        assert!(is_corrupt(check(&tree, &store).unwrap_err()));
        let mut seen = (0, 0);
        tree.walk(&store, &mut |visit| {
            if visit.node.is_ok() {
                seen.0 += 1
            } else {
                seen.1 += 1
            }
            Ok(Walk::Down)
        })
        .unwrap();
        assert_eq!(seen, (2, 1), "a walk goes on beside the bad leaf");
    }
}

#[test]
fn a_tree_of_the_greatest_height_refuses_to_grow_higher() {
    let store = Store::new(16384);
    // A way down through full nodes only. What lies beside it is never loaded and need not exist.
    let beside = |level| pointer(&[0; 16384], Logical(1 << 40), level, Txg(1));
    let items: Vec<_> = (0..561).map(|n| (Key::new(0, 0, n), beside(0))).collect();
    let mut ptr = forge(&store, 0, &items);
    for level in 1..LEVELS_MAX {
        let mut entries = Vec::from([(Key::MIN, ptr)]);
        let first = u64::from(level) * 1000;
        let others = first..first + capacity(16384) as u64 / 88 - 1;
        entries.extend(others.map(|n| (Key::new(n, 0, 0), beside(level - 1))));
        ptr = forge(&store, level, &entries);
    }
    let tree = Tree { id: TREE, root: Some(ptr) };
    let replace = [(Key::new(0, 0, 7), Edit::Put(b"other".to_vec()))];
    assert_eq!(tree.apply(&store, &replace).unwrap().root.unwrap().level, LEVELS_MAX - 1);
    let tree = Tree { id: TREE, root: Some(forge_again(&store, &tree)) };
    let insert = [(Key::new(0, 1, 7), Edit::Put(b"more".to_vec()))];
    let grown = tree.apply(&store, &insert);
    assert!(matches!(grown, Err(Error::Corrupt { .. })), "{grown:?}");
}

/// Makes the nodes of a tree live again after a batch has freed them.
fn forge_again(store: &Store, tree: &Tree) -> BlockPtr {
    let mut blocks = store.blocks.lock();
    blocks.live = blocks.written.keys().copied().collect();
    tree.root.unwrap()
}

#[test]
fn a_tall_tree_of_single_children_collapses_to_its_leaf() {
    let store = Store::new(16384);
    let none = pointer(&[0; 16384], Logical(0), 0, Txg(1));
    let tower = |n: u64| {
        let first = Key::new(n, 0, 0);
        let mut ptr = forge(&store, 0, &[(first, none)]);
        for level in 1..LEVELS_MAX - 1 {
            ptr = forge(&store, level, &[(first, ptr)]);
        }
        (first, ptr)
    };
    let root = forge(&store, LEVELS_MAX - 1, &[tower(1), tower(2), tower(3)]);
    let tree = Tree { id: TREE, root: Some(root) };
    check(&tree, &store).unwrap();
    let edits = [1, 3].map(|n| (Key::new(n, 0, 0), Edit::Delete));
    let collapsed = store.apply(&tree, &edits);
    assert_eq!(collapsed.root.unwrap().level, 0);
    assert_eq!(check(&collapsed, &store).unwrap().items, 1);
}

#[test]
fn a_cursor_that_goes_on_hints_at_each_leaf_once() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..60, 4000));
    let root = store.load(TREE, &tree.root.unwrap()).unwrap();
    assert!(root.level() == 1 && root.count() > 16, "{} leaves", root.count());
    store.blocks.lock().hints.clear();
    let mut cursor = tree.cursor();
    let mut seen = 0;
    while cursor.next(&store).unwrap().is_some() {
        seen += 1;
    }
    assert_eq!(seen, 60);
    let hints = core::mem::take(&mut store.blocks.lock().hints);
    let hinted: Vec<Logical> = hints.into_iter().flatten().collect();
    // The first group has been begun by seeking, and nobody knew how far the cursor would go.
    let rest: Vec<Logical> = (16..root.count()).map(|slot| root.child(slot).addr).collect();
    assert_eq!(hinted, rest);
    while cursor.prev(&store).unwrap().is_some() {}
    assert!(store.blocks.lock().hints.is_empty(), "going back is not read ahead");
}

#[test]
fn reading_ahead_asks_for_the_leaves_that_follow_across_parents() {
    let store = Store::new(16384);
    // Keys of leaves that hold three items each.
    let tree = store.apply(&Tree::empty(TREE), &puts(0..3000, 4000));
    assert!(tree.root.unwrap().level >= 2);
    let mut leaves = Vec::new();
    let mut parents = Vec::new();
    let mut at = key(0);
    while let Some(above) = cursor::above_leaf(&tree, &store, &at).unwrap() {
        parents.push(leaves.len());
        leaves.extend((0..above.node.count()).map(|slot| above.node.child(slot)));
        match above.upper {
            Some(upper) => at = upper,
            None => break,
        }
    }
    assert!(parents.len() > 1);
    let first_key = |ptr: &BlockPtr| store.load(TREE, ptr).unwrap().first_key();
    for from in [0, 7, 15, 16, parents[1] - 5, parents[1] - 1, leaves.len() - 3, leaves.len() - 1] {
        store.blocks.lock().hints.clear();
        tree.read_ahead(&store, &first_key(&leaves[from])).unwrap();
        let hints = core::mem::take(&mut store.blocks.lock().hints);
        let hinted: Vec<Logical> = hints.into_iter().flatten().collect();
        let expected: Vec<Logical> = leaves[from + 1..].iter().map(|ptr| ptr.addr).collect();
        assert_eq!(hinted[..], expected[..hinted.len()], "from leaf {from}");
        assert!(hinted.len() >= 64.min(expected.len()), "{} from {from}", hinted.len());
        assert!(hinted.len() <= 80, "{} from {from}", hinted.len());
    }
    let nothing = Tree::empty(TREE);
    nothing.read_ahead(&store, &key(1)).unwrap();
}

#[test]
fn a_failing_load_leaves_a_cursor_where_it_was() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..1000, 100));
    let mut cursor = tree.cursor();
    let hidden = core::mem::take(&mut store.blocks.lock().written);
    assert!(cursor.next(&store).is_err());
    store.blocks.lock().written = hidden;
    let mut expected = 0;
    loop {
        // Before each step, one failing attempt when the step needs a node.
        let hidden = core::mem::take(&mut store.blocks.lock().written);
        let without = cursor.next(&store);
        store.blocks.lock().written = hidden;
        let item = match without {
            Ok(item) => item,
            Err(_) => cursor.next(&store).unwrap(),
        };
        let Some((found, _)) = item else { break };
        assert_eq!(found, key(expected));
        expected += 1;
    }
    assert_eq!(expected, 1000);
}

#[test]
fn the_walk_shows_each_node_with_the_keys_its_parent_allows() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..5000, 100));
    let mut leaves = Vec::new();
    tree.walk(&store, &mut |visit| {
        let node = visit.node.unwrap();
        if node.level() == 0 {
            leaves.push((visit.lower.unwrap(), visit.upper, node.last_key()));
        }
        Ok(Walk::Down)
    })
    .unwrap();
    assert_eq!(leaves.first().unwrap().0, key(0));
    assert_eq!(leaves.last().unwrap().1, None);
    for pair in leaves.windows(2) {
        assert_eq!(pair[0].1, Some(pair[1].0));
        assert!(pair[0].2 < pair[1].0);
    }
}

mod caching {
    use super::*;

    fn leaf(addr: u64, birth: u64) -> Arc<Node> {
        let mut image = Buf::zeroed(16384).unwrap();
        let mut builder = NodeBuilder::new(&mut image, 0);
        builder.push(&key(1), b"one");
        builder.finish(TREE, Txg(birth), POOL_ID);
        let addr = Logical(addr * 16384);
        crate::format::node::set_addr(&mut image, addr);
        let ptr = pointer(&image, addr, 0, Txg(birth));
        Arc::new(Node::decode(image.into_slice(), &ptr, TREE, &POOL_ID, 16384).unwrap())
    }

    #[test]
    fn a_reused_address_never_yields_the_node_of_before() {
        let cache = NodeCache::new(64 << 20);
        let (old, new) = (leaf(7, 1), leaf(7, 2));
        cache.insert(old.clone());
        assert!(cache.get(old.ptr()).is_some());
        assert!(cache.get(new.ptr()).is_none());
        assert!(cache.get(&BlockPtr { checksum: [1; 32], ..*old.ptr() }).is_none());
        cache.insert(new.clone());
        assert!(cache.get(old.ptr()).is_none());
        assert_eq!(cache.get(new.ptr()).unwrap().birth(), Txg(2));
        cache.remove(new.addr());
        assert!(cache.get(new.ptr()).is_none());
        assert_eq!(cache.stats().bytes, 0);
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_in_use() {
        let cache = NodeCache::new(16 << 20);
        let hot: Vec<_> = (0..100).map(|n| leaf(n, 1)).collect();
        hot.iter().for_each(|node| cache.insert(node.clone()));
        hot.iter().for_each(|node| assert!(cache.get(node.ptr()).is_some()));
        for n in 0..5000 {
            cache.insert(leaf(1000 + n, 1));
        }
        let kept = hot.iter().filter(|node| cache.get(node.ptr()).is_some()).count();
        assert!(kept >= 95, "{kept} of 100 nodes in use survived a scan");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_limit_holds_and_the_sums_are_right_whatever_happens(
            moves in proptest::collection::vec((0..5u8, 0..400u64), 1..1500),
        ) {
            let mut limit = 4 << 20;
            let cache = NodeCache::new(limit);
            let nodes: Vec<_> = (0..400).map(|n| leaf(n, 1)).collect();
            for (what, n) in moves {
                let node = &nodes[n as usize];
                match what {
                    0 | 1 => cache.insert(node.clone()),
                    2 => cache.remove(node.addr()),
                    3 => if let Some(found) = cache.get(node.ptr()) {
                        prop_assert_eq!(found.addr(), node.addr());
                    },
                    _ => if n < 4 {
                        limit = (n as usize) << 20;
                        cache.set_limit(limit);
                    },
                }
                prop_assert!(cache.stats().bytes <= limit as u64);
            }
            let found = nodes.iter().filter(|node| cache.get(node.ptr()).is_some()).count();
            prop_assert_eq!(cache.stats().nodes, found as u64);
            cache.set_limit(0);
            prop_assert_eq!((cache.stats().bytes, cache.stats().nodes), (0, 0));
        }
    }
}

/// What `Differences` finds, checked for its order.
fn differences(store: &Store, old: &Tree, new: &Tree, from: Key) -> Vec<FoundDifference> {
    let mut found: Vec<FoundDifference> = Vec::new();
    let mut differences = old.differences(new, from);
    while let Some(Difference { key, old, new }) = differences.next(store).unwrap() {
        assert!(found.last().is_none_or(|last| last.0 < key), "{key:?} out of order");
        found.push((key, old.map(|value| value.to_vec()), new.map(|value| value.to_vec())));
    }
    assert!(differences.next(store).unwrap().is_none(), "the end is the end");
    found
}

type FoundDifference = (Key, Option<Vec<u8>>, Option<Vec<u8>>);

/// The same of two maps.
fn differences_of_maps(
    old: &BTreeMap<Key, Vec<u8>>,
    new: &BTreeMap<Key, Vec<u8>>,
    from: Key,
) -> Vec<FoundDifference> {
    let keys: BTreeSet<Key> = old.range(from..).chain(new.range(from..)).map(|i| *i.0).collect();
    let both = keys.into_iter().map(|key| (key, old.get(&key).cloned(), new.get(&key).cloned()));
    both.filter(|(_, old, new)| old != new).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn two_trees_differ_where_their_maps_do(
        node_bytes in prop_oneof![Just(16384usize), Just(65536)],
        steps in proptest::collection::vec(step(), 1..8),
        froms in proptest::collection::vec(0..6500u64, 4),
    ) {
        let store = Store::new(node_bytes);
        let mut states = alloc::vec![(Tree::empty(TREE), BTreeMap::new())];
        for (seed, step) in steps.iter().enumerate() {
            let (tree, mut map) = states.last().unwrap().clone();
            let edits = edits_of(step, &map, seed as u64);
            for (key, edit) in &edits {
                match edit {
                    Edit::Put(value) => map.insert(*key, value.clone()),
                    Edit::Delete => map.remove(key),
                };
            }
            states.push((store.apply(&tree, &edits), map));
        }
        for (old_tree, old_map) in &states {
            for (new_tree, new_map) in &states {
                for from in core::iter::once(Key::MIN).chain(froms.iter().map(|n| key(*n))) {
                    let found = differences(&store, old_tree, new_tree, from);
                    prop_assert!(found == differences_of_maps(old_map, new_map, from));
                }
            }
        }
    }
}

#[test]
fn comparing_reads_only_what_differs() {
    let store = Store::new(16384);
    let tree = store.apply(&Tree::empty(TREE), &puts(0..60_000, 60));
    let height = u64::from(tree.root.unwrap().level) + 1;
    let changed = |numbers: &[u64]| {
        let edits: Vec<_> = numbers.iter().map(|n| (key(*n), Edit::Put(value(1, 60)))).collect();
        store.go_back(&tree);
        store.apply(&tree, &edits)
    };
    let loads = |new: &Tree, from| {
        store.blocks.lock().calls_left = Some(1_000_000);
        let found = differences(&store, &tree, new, from);
        let left = store.blocks.lock().calls_left.take().unwrap();
        (found.len(), 1_000_000 - left as u64)
    };
    assert_eq!(loads(&tree.clone(), Key::MIN), (0, 0), "equal roots");
    let one = changed(&[30_000]);
    assert_eq!(loads(&one, Key::MIN), (1, 2 * height));
    assert_eq!(loads(&one, key(29_999)), (1, 2 * height), "from just before it");
    let (found, count) = loads(&one, key(30_001));
    assert!(found == 0 && count <= 2 * height);
    let three = changed(&[3, 30_000, 59_000]);
    let (found, count) = loads(&three, Key::MIN);
    assert!(found == 3 && count <= 3 * 2 * height, "{count} loads");
}

#[test]
fn a_tree_that_has_grown_by_a_level_still_shares_its_leaves() {
    let store = Store::new(16384);
    let small = store.apply(&Tree::empty(TREE), &puts(0..20_000, 60));
    let census = check(&small, &store).unwrap();
    let grown = store.apply(&small, &puts(20_000..60_000, 60));
    assert!(grown.root.unwrap().level > small.root.unwrap().level);
    let added = check(&grown, &store).unwrap().nodes[0] - census.nodes[0];
    for (old, new) in [(&small, &grown), (&grown, &small)] {
        store.blocks.lock().calls_left = Some(1_000_000);
        assert_eq!(differences(&store, old, new, Key::MIN).len(), 40_000);
        let count = 1_000_000 - store.blocks.lock().calls_left.take().unwrap() as u64;
        assert!(count < added + added / 8 + 8, "{count} loads for {added} leaves more");
    }
}

#[test]
fn a_comparison_goes_on_after_any_load_failed() {
    let store = Store::new(16384);
    let old = store.apply(&Tree::empty(TREE), &puts(0..3000, 300));
    let edits: Vec<_> = (0..3000).step_by(700).map(|n| (key(n), Edit::Delete)).collect();
    let new = store.apply(&store.apply(&old, &edits), &puts(3000..3300, 300));
    let whole = differences(&store, &old, &new, Key::MIN);
    let mut found = Vec::new();
    let mut comparison = old.differences(&new, Key::MIN);
    let mut failures = 0;
    // Every load fails once.
    loop {
        store.blocks.lock().calls_left = Some(0);
        let first = comparison.next(&store);
        store.blocks.lock().calls_left = Some(1);
        let next = match first {
            Err(_) => {
                failures += 1;
                match comparison.next(&store) {
                    Err(_) => continue,
                    next => next.unwrap(),
                }
            }
            first => first.unwrap(),
        };
        match next {
            Some(Difference { key, old, new }) => {
                found.push((key, old.map(|v| v.to_vec()), new.map(|v| v.to_vec())));
            }
            None => break,
        }
    }
    assert!(failures > 10, "{failures} failures");
    assert!(found == whole);
}
