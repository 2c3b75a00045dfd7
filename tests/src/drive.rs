//! Runs a subject next to the model and says where they part.
//!
//! A failing list of operations is shrunk: parts of it are left out for as long as it still fails.

use crate::device::{refs, several};
use crate::gen::{Generator, Op, Options};
use crate::model::Model;
use crate::platform::{Spawn, TestPlatform};
use crate::run::{compare, describe, is_left_open, needs_no_room, Runner};
use crate::subject::{Mounted, Subject};
use crate::tree::Tree;
use fs_core::error::Errno;
use fs_core::platform::DeviceRef;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What everything follows from.
    pub seed: u64,
    /// How many operations.
    pub count: usize,
    /// How to generate them.
    pub options: Options,
    /// Whole trees are compared after so many operations.
    pub compare_every: usize,
    /// Bytes of the device.
    pub device_bytes: u64,
}

/// Where subject and model part.
#[derive(Debug)]
pub struct Failure {
    /// The operations up to there.
    pub ops: Vec<Op>,
    /// The difference.
    pub what: String,
}

impl Failure {
    /// The report of a failed test: the operations, the difference, and how to see it again.
    pub fn report(&self, test: &str, seed: u64) -> String {
        let mut text = String::new();
        for (index, op) in self.ops.iter().enumerate() {
            text += &format!("{:4}  {}\n", index + 1, describe(op));
        }
        text + &format!(
            "{}\nsee it again: CAIRN_SEED={seed} cargo test -p cairn-tests {test}",
            self.what
        )
    }
}

struct Pair<'a> {
    subject: &'a dyn Subject,
    devices: Vec<DeviceRef>,
    platform: TestPlatform,
    mounted: Option<Box<dyn Mounted>>,
    model: Arc<Model>,
    expected: Runner,
    found: Runner,
    /// Operations that failed for want of room.
    full: usize,
}

impl<'a> Pair<'a> {
    fn new(subject: &'a dyn Subject, plan: &Plan) -> Result<Pair<'a>, String> {
        let platform = TestPlatform::new(plan.seed, Spawn::AtOnce);
        let devices = refs(&several(subject.devices(), plan.device_bytes));
        let core = platform.platform();
        subject.format(&devices, &core).map_err(|e| format!("format: {e}"))?;
        let mounted = subject.open(&devices, &core).map_err(|e| format!("open: {e}"))?;
        let model_clock = TestPlatform::new(plan.seed, Spawn::AtOnce).clock;
        let model = Arc::new(Model::new(model_clock));
        let (expected, found) = (Runner::new(model.clone()), Runner::new(mounted.fs()));
        let mounted = Some(mounted);
        Ok(Pair { subject, devices, platform, mounted, model, expected, found, full: 0 })
    }

    fn mounted(&self) -> &dyn Mounted {
        self.mounted.as_deref().expect("mounted between operations")
    }

    /// Carries out one operation on both. False when it was left out.
    fn step(&mut self, op: &Op) -> Result<bool, String> {
        match op {
            Op::Remount => return self.remount().map(|()| true),
            Op::DropCaches => self.mounted().drop_caches(),
            Op::Tick => {
                self.platform.clock.advance_ms(1000);
                self.platform.workers.tick();
                self.mounted().tick();
            }
            _ => {}
        }
        if is_left_open(&self.expected, &self.model.state(), op) {
            return Ok(false);
        }
        let before = (self.model.state(), self.expected.slots());
        let expected = self.expected.run(op);
        let found = self.found.run(op);
        if let Some(damage) = self.found.damage.take() {
            return Err(format!("no ordinary outcome: {damage}"));
        }
        if found.result == Err(Errno::NoSpc) && expected != found {
            if needs_no_room(op) {
                return Err("it says there is no room, but it needs none".into());
            }
            // What fails for want of room has not happened at all.
            self.model.set_state(before.0);
            self.expected.set_slots(before.1);
            // But for the steps of a copy before the one that failed.
            let mut copy = op.clone();
            if let Op::CopyRange { len, .. } = &mut copy {
                *len = self.found.copied;
                self.expected.run(&copy);
            }
            self.full += 1;
            return Ok(true);
        }
        compare(&self.expected, &self.model.state(), op, &expected, &found)?;
        Ok(true)
    }

    fn remount(&mut self) -> Result<(), String> {
        // What is held is let go first, as the kernel does when it unmounts.
        let release = |slot| Op::Release { slot };
        (0..crate::gen::SLOTS).map(release).for_each(|op| drop(self.found.run(&op)));
        let mounted = self.mounted.take().expect("mounted between operations");
        mounted.close().map_err(|e| format!("close: {e}"))?;
        let core = self.platform.platform();
        let findings =
            self.subject.check(&self.devices, &core).map_err(|e| format!("check: {e}"))?;
        if !findings.is_empty() {
            return Err(format!("the check finds:\n{}", findings.join("\n")));
        }
        let mounted = self.subject.open(&self.devices, &core).map_err(|e| format!("open: {e}"))?;
        self.found.remounted(mounted.fs());
        self.mounted = Some(mounted);
        self.model.remount();
        self.expected.remounted(self.model.clone());
        Ok(())
    }

    fn compare_trees(&self) -> Result<(), String> {
        let expected = Tree::of_state(&self.model.state());
        let found = Tree::read(&*self.mounted().fs())?;
        match expected.difference(&found) {
            Some(difference) => Err(format!("model and subject differ: {difference}")),
            None => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<(), String> {
        self.compare_trees()?;
        self.remount()?;
        self.compare_trees()?;
        match self.platform.incidents.take().first() {
            Some(incident) => Err(format!("reported: {incident}")),
            None => Ok(()),
        }
    }
}

/// Turns a panic into a failure, so that it can be shrunk too.
fn guarded<T>(step: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("of an unknown kind")))
    })
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Operations carried out.
    pub ops: usize,
    /// Operations that failed for want of room.
    pub full: usize,
}

fn generate(subject: &dyn Subject, plan: &Plan, ops: &mut Vec<Op>) -> Result<Seen, String> {
    let mut pair = Pair::new(subject, plan)?;
    let mut generator = Generator::new(plan.seed, plan.options);
    for index in 1..=plan.count {
        let op = generator.next(&pair.model.state());
        ops.push(op);
        if !pair.step(ops.last().expect("just pushed"))? {
            ops.pop();
        }
        if index % plan.compare_every == 0 {
            pair.compare_trees()?;
        }
    }
    pair.finish()?;
    Ok(Seen { ops: ops.len(), full: pair.full })
}

/// Why a list fails, if it does.
fn replay(subject: &dyn Subject, plan: &Plan, ops: &[Op]) -> Option<String> {
    let run = || {
        let mut pair = Pair::new(subject, plan)?;
        for op in ops {
            pair.step(op)?;
        }
        pair.finish()
    };
    guarded(run).err()
}

/// Runs a plan.
///
/// # Errors
/// The shortest list found that fails.
pub fn run(subject: &dyn Subject, plan: &Plan) -> Result<Seen, Box<Failure>> {
    let mut ops = Vec::new();
    let what = match guarded(|| generate(subject, plan, &mut ops)) {
        Ok(seen) => return Ok(seen),
        Err(what) => what,
    };
    Err(Box::new(shrink(subject, plan, Failure { ops, what })))
}

/// How many lists shrinking may try.
const SHRINK_TRIES: usize = 600;

fn shrink(subject: &dyn Subject, plan: &Plan, mut failure: Failure) -> Failure {
    let mut part = failure.ops.len().div_ceil(2);
    let mut tries = 0;
    while part > 0 {
        let mut start = 0;
        let mut shorter = false;
        while start < failure.ops.len() && tries < SHRINK_TRIES {
            tries += 1;
            let mut ops = failure.ops.clone();
            ops.drain(start..(start + part).min(ops.len()));
            match replay(subject, plan, &ops) {
                Some(what) => (failure, shorter) = (Failure { ops, what }, true),
                None => start += part,
            }
        }
        if !shorter || part > 1 {
            part /= 2;
        }
        if tries >= SHRINK_TRIES {
            break;
        }
    }
    failure
}

/// The seed to replay, if one was asked for.
pub fn asked_seed() -> Option<u64> {
    let text = std::env::var("CAIRN_SEED").ok()?;
    Some(text.parse().expect("CAIRN_SEED is a number"))
}

/// Whether a long run was asked for.
pub fn is_long() -> bool {
    std::env::var("CAIRN_LONG").is_ok_and(|v| v == "1")
}

/// The seeds of a run: the one asked for, or so many.
pub fn seeds(short: u64, long: u64) -> Vec<u64> {
    match asked_seed() {
        Some(seed) => vec![seed],
        None => (0..if is_long() { long } else { short }).collect(),
    }
}

#[cfg(test)]
mod tests;
