//! Bringing devices up to date that were behind when the pool was opened.
//!
//! What is written while the pool is open is written to such a device as well. So it has everything
//! once all that was there when this began has been compared with it:
//!
//! ```text
//! pass 1:      every tree (`survey`)
//! more passes: the nodes that are younger than the pass before, until these are few
//! last pass:   the same once more, of the trees as one group has them
//! then:        a commit, and the labels say that the devices are complete
//! ```
//!
//! In the later passes all data is compared that a node younger than the pass before names newly.
//! Some of it was written to all devices; but a reference that is young may name data that is old,
//! as when a range was shared or moved, and nothing says how old. Only for the last pass, which is
//! short, trees are held as they are.
//!
//! What cannot be read is not the same as what is lost. A block whose copies are all there, and all
//! bad at several tries, cannot be brought anywhere, and does not keep a device from having all
//! that others have. But as long as a device that may have the only good copy does not give it out,
//! nothing is called complete: after a while all is looked at again.

use crate::device::Member;
use crate::engine::survey::{Parts, Passes, Seen, Visitor};
use crate::engine::Engine;
use crate::error::Error;
use crate::format::key::Key;
use crate::pool::{Content, DataSource, Lost, Pool};
use crate::subvol::store::Result;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// How long the resilver works before it lets others on, in nanoseconds.
const BUDGET_NS: u64 = 200_000_000;
/// Bytes compared before it looks at the time.
const STEP_BYTES: u64 = 4 << 20;
/// How long it waits when something could not be read, in nanoseconds.
const PAUSE_NS: u64 = 30_000_000_000;
/// How often a block is read before it is believed to be bad.
const TRIES: usize = 3;

/// A resilver under way.
pub(super) struct Resilver {
    /// The devices, each with the failures it had.
    devices: Vec<(u16, u64)>,
    /// What is younger than the first was written to the devices.
    passes: Passes,
    /// Something could not be read.
    has_gaps: bool,
    /// Bytes compared.
    bytes: u64,
    /// Uptime before which it rests.
    resumes_ns: u64,
}

/// How far devices are that are brought up to date.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResilverProgress {
    /// Bytes compared.
    pub done_bytes: u64,
    /// Bytes in use that were there to compare, about.
    pub total_bytes: u64,
    /// Something could not be read, so that it waits before it tries again.
    pub waits: bool,
}

impl Resilver {
    fn new(devices: Vec<(u16, u64)>, turns: u64, parts: &Parts) -> Resilver {
        let passes = Passes::new(turns, parts);
        Resilver { devices, passes, has_gaps: false, bytes: 0, resumes_ns: 0 }
    }

    /// Whether it may go on: no tree was turned back, and it is about these devices.
    fn fits(&self, turns: u64, behind: &[u16]) -> bool {
        let devices = self.devices.iter().map(|(device, _)| *device);
        self.passes.turns == turns && devices.eq(behind.iter().copied())
    }
}

impl Engine {
    /// Goes on bringing devices up to date, for a while.
    pub(super) fn resilver_some(&self) {
        if self.resilvering.swap(true, Ordering::AcqRel) {
            // Somebody else is at it.
            return;
        }
        let mut state = self.resilver.lock().take();
        if self.resilver_for(BUDGET_NS, &mut state).is_none() {
            state = None;
        }
        self.show_resilver(state.as_deref());
        *self.resilver.lock() = state;
        self.resilvering.store(false, Ordering::Release);
    }

    /// How far devices are that are brought up to date; `None` when there are none.
    pub fn resilver_progress(&self) -> Option<ResilverProgress> {
        *self.resilver_shown.lock()
    }

    fn show_resilver(&self, state: Option<&Resilver>) {
        let usage = self.store.space.usage();
        let kinds = [usage.data, usage.metadata, usage.system];
        let used = kinds.iter().fold(0u64, |sum, kind| sum.saturating_add(kind.used_bytes));
        *self.resilver_shown.lock() = state.map(|resilver| ResilverProgress {
            done_bytes: resilver.bytes.min(used),
            total_bytes: used,
            waits: resilver.resumes_ns > self.store.platform.clock.uptime_ns(),
        });
    }

    /// Goes on for so long; `None` when it has ended or must begin again.
    fn resilver_for(&self, ns: u64, state: &mut Option<Box<Resilver>>) -> Option<()> {
        let clock = &self.store.platform.clock;
        let until = clock.uptime_ns().saturating_add(ns);
        let behind = self.store.pool.behind();
        if behind.is_empty() || self.store.writable().is_err() {
            return None;
        }
        let turns = self.turns.load(Ordering::Acquire);
        state.take_if(|resilver| !resilver.fits(turns, &behind));
        // Held for this turn only, unless the last pass holds its own.
        let parts = self.parts();
        let resilver = state.get_or_insert_with(|| self.begin_resilver(turns, &behind, &parts));
        if resilver.resumes_ns > clock.uptime_ns() {
            return Some(());
        }
        loop {
            match self.resilver_step(resilver, &parts) {
                Ok(true) => {}
                Ok(false) => return self.end_pass(resilver, parts),
                // What it was at is tried again.
                Err(Error::Memory) => return Some(()),
                Err(_) => return None,
            }
            if clock.uptime_ns() >= until {
                return Some(());
            }
        }
    }

    fn begin_resilver(&self, turns: u64, behind: &[u16], parts: &Parts) -> Box<Resilver> {
        let failures = |device: &u16| {
            let member = self.store.pool.members().get(usize::from(*device));
            (*device, member.map_or(0, Member::failures))
        };
        Box::new(Resilver::new(behind.iter().map(failures).collect(), turns, parts))
    }

    /// Compares about [`STEP_BYTES`]. False at the end of the pass.
    fn resilver_step(&self, resilver: &mut Resilver, now: &Parts) -> Result<bool> {
        let mut compared = Comparing {
            pool: &self.store.pool,
            first: resilver.passes.first,
            node_bytes: self.store.node_bytes as u64,
            blocks: 0,
            bytes: 0,
            work: 0,
            has_gaps: false,
        };
        let outcome = resilver.passes.step(&self.store, now, &mut compared);
        resilver.has_gaps |= compared.has_gaps;
        if outcome.is_ok() {
            resilver.passes.blocks += compared.blocks;
            resilver.bytes += compared.bytes;
        }
        outcome
    }

    /// Begins the next pass, or ends the resilver: `None`.
    fn end_pass(&self, resilver: &mut Resilver, now: Parts) -> Option<()> {
        if resilver.has_gaps {
            *resilver = Resilver::new(resilver.devices.clone(), resilver.passes.turns, &now);
            resilver.resumes_ns = self.store.platform.clock.uptime_ns().saturating_add(PAUSE_NS);
            return Some(());
        }
        let Some(parts) = resilver.passes.end_pass(now) else { return Some(()) };
        if let Some(ptr) = &parts.residue {
            let mended = mended(&self.store.pool, &Content::Block(*ptr));
            if !matches!(mended, Ok(Mended::Good | Mended::Lost)) {
                resilver.passes.hold(parts);
                return Some(());
            }
        }
        drop(parts);
        // What is named by the superblock of an earlier opening, such as its log, is not needed
        // any more after this.
        self.want_commit();
        if self.commit().is_ok() {
            let _no_commit = self.committer();
            // What fails now was told, or is tried again.
            let _ = self.store.pool.mark_complete(&resilver.devices);
        }
        None
    }
}

/// Compares what a pass comes to with all devices.
struct Comparing<'a> {
    pool: &'a Pool,
    /// What is younger was written to all devices.
    first: Txg,
    node_bytes: u64,
    blocks: u64,
    /// Bytes compared.
    bytes: u64,
    /// Bytes compared or passed over.
    work: u64,
    has_gaps: bool,
}

impl Visitor for Comparing<'_> {
    fn rootless(&mut self, _: TreeId, _: &Error) {
        // What only it names cannot be had from any device; what goes on from it is looked at.
    }

    fn block(&mut self, seen: &Seen<'_>) -> Result<()> {
        self.blocks += 1;
        self.work += self.node_bytes;
        if seen.ptr.birth > self.first && seen.error.is_none() {
            return Ok(());
        }
        self.bytes += seen.ptr.allocated();
        let mended = mended(self.pool, &Content::Block(*seen.ptr))?;
        self.has_gaps |= match (mended, seen.error) {
            (Mended::Unread, _) => true,
            // It is good now: what it names was passed over.
            (Mended::Good, Some(Error::Device { .. } | Error::Checksum { .. })) => true,
            (_, Some(Error::Memory)) => return Err(Error::Memory),
            _ => false,
        };
        Ok(())
    }

    fn data(&mut self, _: TreeId, _: &Key, _: Txg, source: DataSource) -> Result<()> {
        self.bytes += source.run().bytes;
        self.work += source.run().bytes;
        let mended = mended(self.pool, &Content::Data(source))?;
        self.has_gaps |= mended == Mended::Unread;
        Ok(())
    }

    fn has_enough(&self) -> bool {
        self.work >= STEP_BYTES
    }
}

/// What became of something that was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mended {
    /// All devices have it.
    Good,
    /// No copy is good, which was told.
    Lost,
    /// A device does not give it out, now.
    Unread,
}

/// Tries to mend something.
///
/// # Errors
/// What says nothing about the content.
fn mended(pool: &Pool, content: &Content) -> Result<Mended> {
    let lost = try_to_mend(pool, content)?;
    let is_unread = |lost: &Lost| matches!(lost.error, Error::Device { .. });
    Ok(match lost.is_empty() {
        true => Mended::Good,
        false if lost.iter().any(is_unread) => Mended::Unread,
        false => Mended::Lost,
    })
}

/// Tries to mend something, several times; what of it has no good copy.
///
/// # Errors
/// What says nothing about the content.
pub(super) fn try_to_mend(pool: &Pool, content: &Content) -> Result<Vec<Lost>> {
    let mut lost = Vec::new();
    for _ in 0..TRIES {
        lost = pool.mend(content)?;
        if lost.is_empty() {
            break;
        }
    }
    Ok(lost)
}
