//! Bringing devices up to date that were behind when the pool was opened.
//!
//! What is written while the pool is open is written to such a device as well. So it has everything
//! once all that was there at opening has been compared with it:
//!
//! ```text
//! pass 1: every tree, a step at a time, while it changes. Nodes born before it began are seen.
//! pass 2: the trees as one group has them; what was born since pass 1 began, and all it names.
//! then:   a commit, and the labels say that the devices are complete.
//! ```
//!
//! A node that stays where it is in its tree is seen by pass 1 however the tree changes around it.
//! What moves (an extent that is cloned to a place the pass is past of) is named by a younger node,
//! which pass 2 sees. A version shares with the snapshot it goes on from what is older than that;
//! it is looked at after the snapshot, and only at what is younger. So it does no harm when a
//! snapshot is deleted meanwhile: what is left of it was either seen with it, or now belongs to a
//! version that was not looked at yet. One that is being taken apart is waited for. A rollback puts
//! an older tree in the place of one that may have been seen: then all begins again.
//!
//! A block that no copy is good of cannot be brought anywhere, and does not keep a device from
//! having all that others have.

use crate::btree::Tree;
use crate::engine::commit::Turn;
use crate::engine::{data, Engine};
use crate::error::Error;
use crate::format::extent::Extent;
use crate::format::key::{kind, Key};
use crate::format::pool::version;
use crate::format::ptr::BlockPtr;
use crate::pool::{DataSource, Pool};
use crate::subvol::store::{Result, View};
use crate::units::{Logical, TreeId, Txg};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// How long the resilver works before it lets others on, in nanoseconds.
const BUDGET_NS: u64 = 200_000_000;
/// Bytes compared before it looks at the time.
const STEP_BYTES: u64 = 4 << 20;

/// A tree to look at.
struct Part {
    tree: Tree,
    /// What is not younger is another part's.
    since: Txg,
    /// The part that has to be looked at before.
    after: u64,
    /// It is being taken apart.
    is_going: bool,
}

/// All trees as one group has them. While this is held, nothing they reach is reused.
struct Parts {
    txg: Txg,
    by_id: BTreeMap<u64, Part>,
    residue: Option<BlockPtr>,
    _view: Arc<View>,
}

/// Where a pass is.
#[derive(Default)]
struct Pass {
    done: BTreeSet<u64>,
    at: Option<(u64, Key)>,
}

/// A resilver under way.
pub(super) struct Resilver {
    /// The devices, each with the write errors it had.
    devices: Vec<(u16, u64)>,
    /// How many rollbacks there had been.
    turns: u64,
    /// The group that was published when pass 1 began.
    began: Txg,
    pass: Pass,
    /// In pass 2, what it looks at.
    last: Option<Parts>,
}

impl Resilver {
    /// Whether it may go on: no tree was turned back, and it is about these devices.
    fn fits(&self, turns: u64, behind: &[u16]) -> bool {
        let devices = self.devices.iter().map(|(device, _)| *device);
        self.turns == turns && devices.eq(behind.iter().copied())
    }
}

/// How far a step came.
enum Progress {
    More,
    /// Not now.
    Later,
    PassDone,
}

impl Engine {
    /// Goes on bringing devices up to date, for a while.
    pub(super) fn resilver_some(&self) {
        if self.resilvering.swap(true, Ordering::AcqRel) {
            // Somebody else is at it.
            return;
        }
        let before = self.resilver.lock().take();
        let after = self.resilver_for(BUDGET_NS, before);
        *self.resilver.lock() = after;
        self.resilvering.store(false, Ordering::Release);
    }

    /// Goes on for so long; returns where it is then, unless it has ended or must begin again.
    fn resilver_for(&self, ns: u64, mut state: Option<Box<Resilver>>) -> Option<Box<Resilver>> {
        let until = self.store.platform.clock.uptime_ns().saturating_add(ns);
        loop {
            let behind = self.store.pool.behind();
            if behind.is_empty() || self.store.writable().is_err() {
                return None;
            }
            let turns = self.turns.load(Ordering::Acquire);
            let fitting = state.take().filter(|resilver| resilver.fits(turns, &behind));
            let mut resilver = fitting.or_else(|| self.begin_resilver(turns, &behind))?;
            match self.resilver_step(&mut resilver) {
                Ok(Progress::More) => {}
                Ok(Progress::Later) => return Some(resilver),
                Ok(Progress::PassDone) if self.end_pass(&mut resilver) => {}
                // It has ended; or memory is short, or a device failed: it begins again. What is
                // lost was passed over.
                Ok(Progress::PassDone) | Err(_) => return None,
            }
            if self.store.platform.clock.uptime_ns() >= until {
                return Some(resilver);
            }
            state = Some(resilver);
        }
    }

    fn begin_resilver(&self, turns: u64, behind: &[u16]) -> Option<Box<Resilver>> {
        let parts = self.parts().ok()??;
        let errors = |device: &u16| {
            let member = self.store.pool.members().get(usize::from(*device));
            (*device, member.map_or(0, |member| member.errors().write))
        };
        Some(Box::new(Resilver {
            devices: behind.iter().map(errors).collect(),
            turns,
            began: parts.txg,
            pass: Pass::default(),
            last: None,
        }))
    }

    /// All trees as the published group has them; none while a group is being written.
    fn parts(&self) -> Result<Option<Parts>> {
        let Some(committer) = self.try_committer() else { return Ok(None) };
        self.parts_of(&committer).map(Some)
    }

    fn parts_of(&self, committer: &Turn<'_>) -> Result<Parts> {
        let view = self.store.space_view();
        let (txg, roots) = (committer.superblock.txg, &committer.roots);
        let own = |tree: Tree| Part { tree, since: Txg(0), after: 0, is_going: false };
        let mut by_id = BTreeMap::new();
        for tree in [roots.pool, roots.chunk, view.tree, roots.refs, roots.dead] {
            by_id.insert(tree.id.0, own(tree));
        }
        for (id, version) in self.versions.read().iter() {
            let item = &version.item;
            let root = item.root(txg).map_err(|bad| bad.in_item(TreeId::POOL, id))?;
            let part = Part {
                tree: Tree { id: item.lineage(TreeId(id)), root },
                since: Txg(item.snapshot_txg),
                after: item.parent,
                is_going: item.flags & version::STARTED != 0,
            };
            by_id.insert(id, part);
        }
        Ok(Parts { txg, by_id, residue: roots.residue, _view: view })
    }

    /// Compares about [`STEP_BYTES`].
    fn resilver_step(&self, resilver: &mut Resilver) -> Result<Progress> {
        let now;
        let (parts, least) = match &resilver.last {
            Some(parts) => (parts, resilver.began),
            None => {
                let Some(parts) = self.parts()? else { return Ok(Progress::Later) };
                now = parts;
                (&now, Txg(0))
            }
        };
        let pass = &mut resilver.pass;
        let (id, from) = match pass.next(parts, resilver.last.is_some()) {
            Next::Part(id, from) => (id, from),
            Next::Wait => return Ok(Progress::Later),
            Next::End => return Ok(Progress::PassDone),
        };
        let part = &parts.by_id[&id];
        let mut walk = Comparing { pool: &self.store.pool, part, bytes: 0, blob: Logical(0) };
        let next =
            part.tree.patrol(&*self.store, part.since.max(least), from, &mut |ptr, node| {
                walk.block(ptr)?;
                if let (Ok(node), true) = (node, TreeId(id).is_subvol()) {
                    for index in (0..node.count()).filter(|_| node.level() == 0) {
                        let key = node.key(index);
                        if key.kind == kind::EXTENT {
                            walk.extent(key, node.value(index), node.birth())?;
                        }
                    }
                }
                Ok(walk.bytes < STEP_BYTES)
            })?;
        match next {
            Some(key) => pass.at = Some((id, key)),
            None => pass.finish(id),
        }
        Ok(Progress::More)
    }

    /// Begins pass 2, or ends the resilver: false.
    fn end_pass(&self, resilver: &mut Resilver) -> bool {
        let Some(parts) = resilver.last.take() else {
            // A pass that cannot begin now begins with the next step.
            resilver.last = self.parts().ok().flatten();
            if resilver.last.is_some() {
                resilver.pass = Pass::default();
            }
            return true;
        };
        let is_mended = match &parts.residue {
            Some(ptr) => passed_over(self.store.pool.mend_block(ptr)).is_ok(),
            None => true,
        };
        drop(parts);
        // What is named by the superblock of an earlier opening, such as its log, is not needed
        // any more after this.
        self.want_commit();
        if is_mended && self.commit().is_ok() {
            // What fails now was told, or is tried again.
            let _ = self.store.pool.mark_complete(&resilver.devices);
        }
        false
    }
}

/// What a pass looks at next.
enum Next {
    Part(u64, Key),
    Wait,
    End,
}

impl Pass {
    /// `is_last` in a pass that looks at younger nodes only: what is being taken apart has none
    /// that others need.
    fn next(&mut self, parts: &Parts, is_last: bool) -> Next {
        if let Some((id, key)) = self.at.take() {
            match parts.by_id.get(&id) {
                Some(part) if !part.is_going => return Next::Part(id, key),
                _ => {}
            }
        }
        let is_due = |id: u64| !self.done.contains(&id);
        let is_ready = |part: &Part| {
            let is_first = !parts.by_id.contains_key(&part.after);
            is_last || part.after == 0 || is_first || self.done.contains(&part.after)
        };
        let mut waits = false;
        for (id, part) in parts.by_id.iter().filter(|(id, _)| is_due(**id)) {
            if part.is_going {
                waits |= !is_last;
            } else if is_ready(part) {
                return Next::Part(*id, Key::MIN);
            } else {
                waits = true;
            }
        }
        match waits {
            true => Next::Wait,
            false => Next::End,
        }
    }

    fn finish(&mut self, id: u64) {
        self.done.insert(id);
    }
}

/// Compares what a tree names with all devices.
struct Comparing<'a> {
    pool: &'a Pool,
    part: &'a Part,
    bytes: u64,
    /// The blob looked at last: neighbouring items name the same.
    blob: Logical,
}

impl Comparing<'_> {
    fn block(&mut self, ptr: &BlockPtr) -> Result<()> {
        self.bytes += ptr.allocated();
        passed_over(self.pool.mend_block(ptr))
    }

    fn extent(&mut self, key: Key, value: &[u8], newest: Txg) -> Result<()> {
        // What cannot be decoded names nothing that could be compared.
        let Ok((extent, birth)) = Extent::decode(value, key.offset, newest) else { return Ok(()) };
        let Some(run) = data::run_of(&extent) else { return Ok(()) };
        if birth <= self.part.since {
            return Ok(());
        }
        let source = match extent {
            Extent::Plain { addr, len, checksum_kind, checksums } => {
                DataSource::Plain { addr, len, checksum_kind, checksums }
            }
            Extent::Packed { blob, .. } if blob.addr == self.blob => return Ok(()),
            Extent::Packed { blob, .. } => {
                self.blob = blob.addr;
                DataSource::Packed { blob }
            }
            Extent::Inline { .. } | Extent::Promised { .. } => return Ok(()),
        };
        self.bytes += run.bytes;
        passed_over(self.pool.mend_data(&source))
    }
}

/// What is lost is lost on all devices, and was told.
fn passed_over(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(Error::Memory | Error::Failed | Error::ReadOnly) => outcome,
        _ => Ok(()),
    }
}
