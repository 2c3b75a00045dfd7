//! The checker: everything the pool says of itself, recomputed from its trees and compared.
//!
//! It opens the newest published group read-only, or an older one that is asked for, and follows
//! every pointer there is:
//!
//! ```text
//! labels, superblocks -> chunk tree -> pool tree -> subvolumes -> extents
//!                                  \-> reference tree, space tree, residue, log
//! ```
//!
//! | file | compares |
//! | --- | --- |
//! | `blocks` | every copy of every metadata block with its checksum |
//! | `labels` | labels and superblock copies |
//! | `chunks` | the chunk tree with devices and superblock |
//! | `files` | inodes, one object of a subvolume after the other |
//! | `dirs` | entries, hashes and counts of a directory |
//! | `extents`, `xattrs` | content of a file |
//! | `versions` | subvolumes and snapshots, their dead lists |
//! | `links` | names with inodes, both ways; directories with the root |
//! | `data` | file data with its checksums, every copy |
//! | `refs` | references that were met with those that are counted |
//! | `space`, `usage` | sectors that were met with bitmaps, residue and summaries |
//! | `past` | what an older group lacks with what the newest has |
//! | `findings` | the rules, each with a permanent id |
//! | `paths`, `places` | nothing: they say which file a finding is about, and where it lies |
//!
//! What could not be read hides what is below it. So comparisons that need everything (links,
//! references, leaks) are left out, with a finding that says so, once a tree is incomplete; what
//! can be said of what is there is still said.
//!
//! Memory: one bit for each sector, and about 100 bytes for each inode of the largest subvolume.
//! Nothing recurses; lengths and counts from the device are checked before they are used.

mod blocks;
mod chunks;
mod data;
mod dirs;
mod extents;
mod files;
pub mod findings;
#[cfg(test)]
mod forge;
mod labels;
mod links;
mod past;
mod paths;
mod places;
mod refs;
mod space;
mod subvols;
#[cfg(test)]
mod tests;
mod usage;
mod versions;
mod xattrs;

pub use findings::{Finding, Place, Rule, Severity, Spot};

use crate::btree::{Tree, Walk};
use crate::buf::SHELF_BYTES;
use crate::error::{Errno, Error};
use crate::format::chunk::ChunkKind;
use crate::format::key::Key;
use crate::format::ptr::BlockPtr;
use crate::format::space::Run;
use crate::format::superblock::Superblock;
use crate::platform::{DeviceRef, Platform, Result};
use crate::pool::{Pool, PoolOptions};
use crate::units::{Logical, TreeId, Txg};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use blocks::Blocks;
use data::DataQueue;
use findings::{rules, Findings};
use usage::{Marked, Usage};

/// What to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckOptions {
    /// Read all file data and verify its checksums.
    pub data: bool,
    /// Check the pool as of this group instead of the newest.
    pub txg: Option<Txg>,
}

impl Default for CheckOptions {
    fn default() -> CheckOptions {
        CheckOptions { data: true, txg: None }
    }
}

/// What the check is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Chunks, subvolumes, files and their data.
    Trees,
    /// Names against inodes.
    Names,
    /// References and space.
    Space,
}

/// Told how far the check is.
pub trait CheckProgress {
    /// `done` of about `total` bytes of the pass have been read. Returns whether to go on.
    fn progress(&self, pass: Pass, done: u64, total: u64) -> bool;
}

/// Nobody wants to know.
pub struct Quiet;

impl CheckProgress for Quiet {
    fn progress(&self, _pass: Pass, _done: u64, _total: u64) -> bool {
        true
    }
}

/// How much was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckStats {
    /// The group that was checked.
    pub txg: Txg,
    /// Whether the pool had been closed in an orderly way.
    pub clean: bool,
    /// Tree nodes read.
    pub nodes: u64,
    /// Tree items looked at.
    pub items: u64,
    /// Subvolumes.
    pub subvols: u64,
    /// Inodes.
    pub inodes: u64,
    /// Names.
    pub names: u64,
    /// Extents with data on the devices.
    pub extents: u64,
    /// Bytes of file data read and verified, one copy counted.
    pub data_bytes: u64,
    /// Bytes in use on the devices, one copy counted.
    pub used_bytes: u64,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What is wrong; at most a hundred findings of each rule.
    pub findings: Vec<Finding>,
    /// How many findings of each rule there were, by id.
    pub counts: Vec<(&'static str, u64)>,
    /// How much was checked.
    pub stats: CheckStats,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    /// The worst that is wrong.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// Checks the pool on `devices`. Writes nothing.
///
/// # Errors
/// When there is no pool to check: what [`Pool::open`] gives; [`Error::NoGroup`] when there is no
/// such group; [`Error::Memory`]; EINTR when `progress` says to stop. Damage is not an error but a
/// finding.
pub fn check(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &CheckOptions,
    progress: &dyn CheckProgress,
) -> Result<CheckReport> {
    let opened = open(devices.clone(), platform.clone(), options);
    let (pool, superblock) = opened.map_err(|error| match options.txg {
        Some(txg) => crate::engine::past::explain(error, txg, &devices, &platform),
        None => error,
    })?;
    examine((devices, platform), (&pool, &superblock), options, progress)
}

/// The pool to check. Apart from checking it, so that each has more of a kernel's stack.
#[inline(never)]
fn open(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &CheckOptions,
) -> Result<(Box<Pool>, Box<Superblock>)> {
    let pool_options =
        PoolOptions { read_only: true, txg: options.txg, degraded: true, kept_bytes: SHELF_BYTES };
    Pool::open(devices, platform, &pool_options)
}

#[inline(never)]
fn examine(
    (devices, platform): (Vec<DeviceRef>, Platform),
    (pool, superblock): (&Pool, &Superblock),
    options: &CheckOptions,
    progress: &dyn CheckProgress,
) -> Result<CheckReport> {
    let mut findings = Findings::default();
    labels::check(pool, superblock, &mut findings);
    let blocks = Blocks::new(pool);
    let chunks = chunks::load(&blocks, superblock, &mut findings)?;
    let mut checker = Box::new(Checker {
        pool,
        blocks: &blocks,
        superblock,
        options,
        progress,
        findings,
        usage: Usage::new(&chunks)?,
        extra: Vec::new(),
        aside: pool.is_past().then(past::Aside::default),
        met: versions::Met::default(),
        incomplete: false,
        mixed_births: false,
        queue: DataQueue::default(),
        stats: CheckStats::default(),
        total_bytes: superblock.metadata_used.saturating_add(superblock.data_used),
        done_bytes: 0,
    });
    let family = checker.run()?;
    checker.judge(devices, &platform)?;
    paths::add(&blocks, superblock, family.versions(), checker.findings.kept_mut())?;
    places::add(pool, checker.findings.kept_mut())?;
    Ok(checker.finish())
}

/// What is done with an item: its key, its value, the group of its leaf.
type EachItem<'e, 'a> = dyn FnMut(&mut Checker<'a>, Key, &[u8], Txg) -> Result<()> + 'e;

/// A check under way.
struct Checker<'a> {
    pool: &'a Pool,
    blocks: &'a Blocks<'a>,
    superblock: &'a Superblock,
    options: &'a CheckOptions,
    progress: &'a dyn CheckProgress,
    findings: Findings,
    usage: Usage,
    /// Runs of data that were met once more after the first time.
    extra: Vec<Run>,
    /// What has no good copy, if the group is not the newest.
    aside: Option<past::Aside>,
    /// What was met of the version whose tree is walked.
    met: versions::Met,
    /// Some block could not be had: what is below it was not met.
    incomplete: bool,
    /// Items that hold one reference together have several births.
    mixed_births: bool,
    queue: DataQueue,
    stats: CheckStats,
    total_bytes: u64,
    done_bytes: u64,
}

impl<'a> Checker<'a> {
    #[inline(never)]
    fn run(&mut self) -> Result<Box<versions::Family>> {
        let superblock = self.superblock;
        self.each_item(&tree(TreeId::CHUNK, superblock.chunk_root), &mut |_, _, _, _| Ok(()))?;
        let mut family = subvols::check(self)?;
        data::flush(self)?;
        self.step(Pass::Space, 0)?;
        versions::check_dead(self, &mut family)?;
        let counted = refs::load(self)?;
        let mut stored = space::load(self)?;
        if !self.pool.is_past() {
            // The log goes on from the newest group; where it was, another may be.
            space::mark_log(self, &mut stored)?;
        }
        if self.incomplete {
            self.findings.add(&rules::INCOMPLETE, Spot::NONE, "");
        } else {
            refs::compare(self, &counted)?;
        }
        space::compare(self, &stored)?;
        self.stats.used_bytes = self.usage.bytes(|_| true);
        Ok(family)
    }

    fn finish(self: Box<Self>) -> CheckReport {
        let mut stats = self.stats;
        (stats.txg, stats.clean) = (self.superblock.txg, self.superblock.clean);
        let (findings, counts) = self.findings.finish();
        CheckReport { findings, counts, stats }
    }

    /// Tells how far the check is.
    fn step(&mut self, pass: Pass, bytes: u64) -> Result<()> {
        self.done_bytes = self.done_bytes.saturating_add(bytes);
        if !self.progress.progress(pass, self.done_bytes.min(self.total_bytes), self.total_bytes) {
            return Err(Error::Posix(Errno::Intr));
        }
        Ok(())
    }

    /// Marks the space of a metadata block.
    fn mark_run(&mut self, spot: Spot, run: Run, kind: ChunkKind) {
        let mut shared = false;
        let marked = self.usage.mark(run, kind, &mut |_| shared = true);
        let rule = match marked {
            Marked::Fresh => return,
            Marked::Again => &rules::SPACE_SHARED,
            Marked::Unmapped => &rules::SPACE_UNMAPPED,
            Marked::WrongKind => &rules::NODE_PLACE,
        };
        self.findings.add(rule, spot, format!("a block of {} bytes", run.bytes));
    }

    fn report_bad_copies(&mut self, tree: TreeId) {
        for bad in self.blocks.take_bad() {
            let spot = Spot::block(tree, bad.addr).copy(bad.device, bad.at);
            self.findings.add(&rules::BLOCK_COPY, spot, format!("{}", bad.error));
        }
    }

    /// Calls `each` for every item that can be had, with the group of its leaf; marks and verifies
    /// all nodes. An error of `each` that says the item is damaged becomes a finding.
    fn each_item(&mut self, tree: &Tree, each: &mut EachItem<'_, 'a>) -> Result<()> {
        let kind = match tree.id {
            TreeId::CHUNK => ChunkKind::System,
            _ => ChunkKind::Metadata,
        };
        let blocks = self.blocks;
        let mut outcome = Ok(());
        tree.walk(blocks, &mut |visit| {
            let spot = Spot::block(tree.id, visit.ptr.addr);
            let run = Run { addr: visit.ptr.addr, bytes: visit.ptr.allocated() };
            // What is older the walk of the version's parent has marked.
            if visit.ptr.birth > self.met.since {
                self.mark_run(spot.clone(), run, kind);
            }
            self.met.add(run, visit.ptr.birth, true);
            self.report_bad_copies(tree.id);
            self.step(Pass::Trees, visit.ptr.allocated())?;
            let node = match visit.node {
                Ok(node) => node,
                Err(error) => {
                    self.incomplete = true;
                    self.report_block(spot, error, (visit.ptr.addr, &visit.ptr.checksum))?;
                    return Ok(Walk::Over);
                }
            };
            self.stats.nodes += 1;
            if node.level() > 0 {
                return Ok(Walk::Down);
            }
            for index in 0..node.count() {
                let key = node.key(index);
                self.stats.items += 1;
                let result = each(self, key, node.value(index), node.birth());
                if let Err(error) = result {
                    let spot = Spot::object(tree.id, key.object).at(node.addr());
                    if let Err(error) = self.findings.add_error(&rules::ITEM, spot, error) {
                        outcome = Err(error);
                        return Ok(Walk::Stop);
                    }
                }
            }
            Ok(Walk::Down)
        })?;
        outcome
    }
}

/// A tree of the pool.
fn tree(id: TreeId, root: Option<BlockPtr>) -> Tree {
    Tree { id, root }
}

/// Appends without aborting when memory is short.
fn push<T>(list: &mut Vec<T>, value: T) -> Result<()> {
    list.try_reserve(1).map_err(|_| Error::Memory)?;
    list.push(value);
    Ok(())
}

/// A run for messages.
fn show(run: Run) -> alloc::string::String {
    let Logical(addr) = run.addr;
    format!("{} bytes at {addr:#x}", run.bytes)
}
