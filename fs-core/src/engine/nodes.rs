//! Writing tree nodes of one group.

use crate::btree::{Node, NodeSink, NodeSource};
use crate::buf::Buf;
use crate::format::chunk::ChunkKind;
use crate::format::ptr::{BlockPtr, CompressionKind};
use crate::format::space::Run;
use crate::pool::RunWrite;
use crate::subvol::store::{Result, Store};
use crate::sync::Mutex;
use crate::units::{Logical, TreeId, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// The node sink of the group being written.
pub struct GroupSink<'a> {
    store: &'a Store,
    txg: Txg,
    freed: Mutex<Vec<(Run, Txg)>>,
    written_bytes: AtomicU64,
    /// Nodes since the mark, if there is one.
    marked: Mutex<Option<Vec<Logical>>>,
}

impl<'a> GroupSink<'a> {
    /// A sink for group `txg`.
    pub fn new(store: &'a Store, txg: Txg) -> GroupSink<'a> {
        let written_bytes = AtomicU64::new(0);
        let (freed, marked) = (Mutex::new(Vec::new()), Mutex::new(None));
        GroupSink { store, txg, freed, written_bytes, marked }
    }

    /// Blocks that were replaced since the last call, with their births.
    pub fn take_freed(&self) -> Vec<(Run, Txg)> {
        core::mem::take(&mut *self.freed.lock())
    }

    /// Bytes of nodes written since the last call.
    pub fn take_written_bytes(&self) -> u64 {
        self.written_bytes.swap(0, Ordering::Relaxed)
    }

    /// From now on takes note of what nodes get their places. What was replaced must have been
    /// taken.
    pub fn mark(&self) {
        debug_assert!(self.freed.lock().is_empty(), "what was replaced was not taken");
        *self.marked.lock() = Some(Vec::new());
    }

    /// What was written since the mark stays.
    pub fn forget_mark(&self) {
        *self.marked.lock() = None;
    }

    /// Nothing refers to the nodes that got their places since the mark, nor was any replaced.
    pub fn give_back_marked(&self) {
        self.freed.lock().clear();
        let bytes = self.store.node_bytes as u64;
        for addr in self.marked.lock().take().into_iter().flatten() {
            self.store.cache.remove(addr);
            self.store.space.free(Run { addr, bytes }, self.txg);
        }
    }

    /// Writes a block that is not a tree node, such as the residue.
    ///
    /// # Errors
    /// [`crate::error::Error::NoSpace`], [`crate::error::Error::Memory`], errors of the device.
    pub fn write_block(&self, run: Run, bytes: &[u8]) -> Result<BlockPtr> {
        let buf = Buf::copy_of(bytes)?;
        let ptr = BlockPtr {
            addr: run.addr,
            birth: self.txg,
            stored: bytes.len() as u32,
            logical: bytes.len() as u32,
            compression: CompressionKind::None,
            level: 0,
            checksum: self.store.platform.codecs.blake3(bytes),
        };
        let bufs = alloc::vec![buf.into_slice()];
        self.store.pool.write(alloc::vec![RunWrite { addr: run.addr, bufs }])?;
        Ok(ptr)
    }
}

impl NodeSource for GroupSink<'_> {
    fn node_bytes(&self) -> usize {
        self.store.node_bytes
    }

    fn pool_id(&self) -> [u8; 16] {
        self.store.pool.pool_id()
    }

    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        self.store.load(tree, ptr)
    }

    fn prefetch(&self, tree: TreeId, ptrs: &[BlockPtr]) {
        self.store.prefetch(tree, ptrs);
    }
}

impl NodeSink for GroupSink<'_> {
    fn as_source(&self) -> &dyn NodeSource {
        self
    }

    fn txg(&self) -> Txg {
        self.txg
    }

    fn allocate(&self, tree: TreeId, count: usize) -> Result<Vec<Logical>> {
        let kind = match tree {
            TreeId::CHUNK => ChunkKind::System,
            _ => ChunkKind::Metadata,
        };
        let node = self.store.node_bytes as u64;
        let mut places = Vec::with_capacity(count);
        while places.len() < count {
            let want = (count - places.len()) as u64 * node;
            let run = self.store.space.allocate(kind, want, node, self.txg, self.store)?;
            self.store.spend(self.txg, 0, run.bytes);
            let whole = run.bytes / node;
            places.extend((0..whole).map(|index| Logical(run.addr.0 + index * node)));
            let rest = run.bytes % node;
            if rest > 0 {
                let addr = Logical(run.addr.0 + whole * node);
                self.store.space.free(Run { addr, bytes: rest }, self.txg);
            }
        }
        if let Some(marked) = self.marked.lock().as_mut() {
            marked.extend_from_slice(&places);
        }
        Ok(places)
    }

    fn write(&self, tree: TreeId, level: u8, nodes: Vec<(Logical, Buf)>) -> Result<Vec<BlockPtr>> {
        let sums: Vec<Mutex<[u8; 32]>> = nodes.iter().map(|_| Mutex::new([0; 32])).collect();
        let codecs = &self.store.platform.codecs;
        self.store.platform.workers.parallel_for(nodes.len(), &|index| {
            *sums[index].lock() = codecs.blake3(&nodes[index].1);
        });
        let bytes = self.store.node_bytes as u32;
        let all_bytes = u64::from(bytes) * nodes.len() as u64;
        self.written_bytes.fetch_add(all_bytes, Ordering::Relaxed);
        let mut ptrs = Vec::with_capacity(nodes.len());
        let mut writes = Vec::with_capacity(nodes.len());
        let mut ready = Vec::with_capacity(nodes.len());
        for ((addr, buf), sum) in nodes.into_iter().zip(sums) {
            let ptr = BlockPtr {
                addr,
                birth: self.txg,
                stored: bytes,
                logical: bytes,
                compression: CompressionKind::None,
                level,
                checksum: sum.into_inner(),
            };
            // What is about to be written passes the same check as what is read.
            let node =
                Node::decode(buf.into_slice(), &ptr, tree, &self.pool_id(), self.store.node_bytes)?;
            writes.push(RunWrite { addr, bufs: alloc::vec![node.bytes().clone()] });
            ready.push(Arc::new(node));
            ptrs.push(ptr);
        }
        self.store.pool.write(writes)?;
        for node in ready {
            self.store.cache.insert(node);
        }
        Ok(ptrs)
    }

    fn free(&self, _tree: TreeId, ptr: &BlockPtr) {
        let run = Run { addr: ptr.addr, bytes: ptr.allocated() };
        self.freed.lock().push((run, ptr.birth));
    }
}
