//! The node cache.
//!
//! Nodes are cached by address. Since nodes are immutable, a cached node is right as long as the
//! pointer that asks for it is the pointer that named it: birth and checksum are compared, so the
//! node that stood at a reused address before is never taken for the new one.
//!
//! Eviction is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023):
//!
//! ```text
//! new --> small --asked for again--> main --not asked for since--> out
//!           \---not asked for--> ghost (address only) --comes back--> main
//! ```
//!
//! A walk over everything passes through the small queue, a tenth of the cache, and leaves the main
//! queue alone. A hit only bumps a counter, so readers share a lock.

use super::Node;
use crate::format::ptr::BlockPtr;
use crate::sync::{Rank, RwLock};
use crate::units::{Logical, SECTOR_SHIFT};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, AtomicU8, AtomicUsize, Ordering};

/// Independently locked parts of the cache; a power of two.
const SHARDS: usize = 16;
/// Hits beyond this many do not prolong a node's stay.
const HITS_MAX: u8 = 3;
/// Memory of a node besides its bytes, roughly.
const OVERHEAD_BYTES: usize = 256;

/// What a cache has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups that found their node.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Bytes held now.
    pub bytes: u64,
    /// Nodes held now.
    pub nodes: u64,
}

/// A bounded, shared cache of nodes.
pub struct NodeCache {
    shards: Box<[RwLock<Shard>]>,
    /// Most bytes one shard may hold.
    shard_limit: AtomicUsize,
    hits: AtomicU64,
    misses: AtomicU64,
}

struct Cached {
    node: Arc<Node>,
    hits: AtomicU8,
    /// Tells this stay of the address from earlier ones, whose queue entries may still be there.
    stamp: u64,
    in_main: bool,
}

impl Cached {
    fn bytes(&self) -> usize {
        bytes_of(&self.node)
    }
}

fn bytes_of(node: &Node) -> usize {
    node.bytes().len() + OVERHEAD_BYTES
}

/// An entry of a queue. It is stale when the map has no node with that stamp.
#[derive(Clone, Copy)]
struct Ticket {
    addr: Logical,
    stamp: u64,
}

#[derive(Default)]
struct Shard {
    nodes: BTreeMap<Logical, Cached>,
    small: VecDeque<Ticket>,
    main: VecDeque<Ticket>,
    ghosts: Ghosts,
    next_stamp: u64,
    bytes: usize,
    small_bytes: usize,
}

/// Addresses that went out of the small queue not long ago.
#[derive(Default)]
struct Ghosts {
    order: VecDeque<Logical>,
    set: BTreeSet<Logical>,
}

impl Ghosts {
    fn add(&mut self, addr: Logical, limit: usize) {
        if self.set.insert(addr) {
            self.order.push_back(addr);
        }
        while self.order.len() > limit {
            if let Some(oldest) = self.order.pop_front() {
                self.set.remove(&oldest);
            }
        }
    }

    fn contains(&self, addr: Logical) -> bool {
        self.set.contains(&addr)
    }
}

impl NodeCache {
    /// A cache of at most about `bytes`.
    pub fn new(bytes: usize) -> NodeCache {
        NodeCache {
            shards: (0..SHARDS).map(|_| RwLock::ranked(Rank::Leaf, Shard::default())).collect(),
            shard_limit: AtomicUsize::new(bytes / SHARDS),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    fn shard(&self, addr: Logical) -> &RwLock<Shard> {
        // Neighbouring nodes go to different shards whatever the node size: a multiplication
        // spreads the low bits of the sector number over the high ones (Fibonacci hashing).
        let mixed = (addr.0 >> SECTOR_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        &self.shards[(mixed >> 32) as usize % SHARDS]
    }

    /// The node that `ptr` names, if it is here.
    pub fn get(&self, ptr: &BlockPtr) -> Option<Arc<Node>> {
        let shard = self.shard(ptr.addr).read();
        let cached = shard.nodes.get(&ptr.addr).filter(|cached| cached.node.ptr() == ptr);
        let Some(cached) = cached else {
            self.misses.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        // Racing hits may count as one. Storing only what changes keeps hot nodes' lines shared.
        let hits = cached.hits.load(Ordering::Relaxed);
        if hits < HITS_MAX {
            cached.hits.store(hits + 1, Ordering::Relaxed);
        }
        Some(cached.node.clone())
    }

    /// Whether the node that `ptr` names is here. Does not count as asking for it.
    pub fn contains(&self, ptr: &BlockPtr) -> bool {
        let shard = self.shard(ptr.addr).read();
        shard.nodes.get(&ptr.addr).is_some_and(|cached| cached.node.ptr() == ptr)
    }

    /// About how many bytes it may hold.
    pub fn limit(&self) -> usize {
        self.shard_limit.load(Ordering::Relaxed) * SHARDS
    }

    /// Adds a node, in place of any other at its address.
    pub fn insert(&self, node: Arc<Node>) {
        let limit = self.shard_limit.load(Ordering::Relaxed);
        if bytes_of(&node) > limit {
            self.remove(node.addr());
            return;
        }
        let mut shard = self.shard(node.addr()).write();
        shard.insert(node);
        shard.shrink(limit);
    }

    /// Drops whatever node is cached at `addr`.
    pub fn remove(&self, addr: Logical) {
        self.shard(addr).write().remove(addr);
    }

    /// Changes the limit, dropping nodes until it holds.
    pub fn set_limit(&self, bytes: usize) {
        let limit = bytes / SHARDS;
        self.shard_limit.store(limit, Ordering::Relaxed);
        for shard in &self.shards {
            shard.write().shrink(limit);
        }
    }

    /// Drops every node.
    pub fn clear(&self) {
        for shard in &self.shards {
            let old = core::mem::take(&mut *shard.write());
            drop(old);
        }
    }

    /// What the cache holds and has done.
    pub fn stats(&self) -> CacheStats {
        let mut stats = CacheStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            ..CacheStats::default()
        };
        for shard in &self.shards {
            let shard = shard.read();
            stats.bytes += shard.bytes as u64;
            stats.nodes += shard.nodes.len() as u64;
        }
        stats
    }
}

impl Shard {
    fn insert(&mut self, node: Arc<Node>) {
        let addr = node.addr();
        self.remove(addr);
        let in_main = self.ghosts.contains(addr);
        let ticket = Ticket { addr, stamp: self.next_stamp };
        self.next_stamp += 1;
        let cached = Cached { node, hits: AtomicU8::new(0), stamp: ticket.stamp, in_main };
        self.bytes += cached.bytes();
        if in_main {
            self.main.push_back(ticket);
        } else {
            self.small_bytes += cached.bytes();
            self.small.push_back(ticket);
        }
        self.nodes.insert(addr, cached);
        self.forget_stale();
    }

    fn remove(&mut self, addr: Logical) {
        if let Some(cached) = self.nodes.remove(&addr) {
            self.bytes -= cached.bytes();
            if !cached.in_main {
                self.small_bytes -= cached.bytes();
            }
        }
    }

    /// Removing leaves a stale ticket; they must not outnumber the nodes by much.
    fn forget_stale(&mut self) {
        if self.small.len() + self.main.len() > 2 * self.nodes.len() + 64 {
            let Shard { nodes, small, main, .. } = self;
            let live = |ticket: &Ticket| {
                nodes.get(&ticket.addr).is_some_and(|cached| cached.stamp == ticket.stamp)
            };
            small.retain(live);
            main.retain(live);
        }
    }

    fn shrink(&mut self, limit: usize) {
        while self.bytes > limit {
            if self.small_bytes > limit / 10 || self.main.is_empty() {
                self.evict_small();
            } else {
                self.evict_main();
            }
        }
    }

    /// Takes the oldest node out of the small queue: up into the main queue if it was asked for,
    /// else out.
    fn evict_small(&mut self) {
        let Some(ticket) = self.small.pop_front() else { return };
        let Some(cached) = self.nodes.get_mut(&ticket.addr) else { return };
        if cached.stamp != ticket.stamp {
            return;
        }
        if *cached.hits.get_mut() > 0 {
            *cached.hits.get_mut() = 0;
            cached.in_main = true;
            self.small_bytes -= cached.bytes();
            self.main.push_back(ticket);
        } else {
            self.remove(ticket.addr);
            self.ghosts.add(ticket.addr, self.nodes.len().max(16));
        }
    }

    /// Takes the oldest node out of the main queue: round again if it was asked for, else out.
    fn evict_main(&mut self) {
        let Some(ticket) = self.main.pop_front() else { return };
        let Some(cached) = self.nodes.get_mut(&ticket.addr) else { return };
        if cached.stamp != ticket.stamp {
            return;
        }
        let hits = cached.hits.get_mut();
        if *hits > 0 {
            *hits -= 1;
            self.main.push_back(ticket);
        } else {
            self.remove(ticket.addr);
        }
    }
}
