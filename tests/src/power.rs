//! Cuts the power at every moment of a story and looks at what is left.
//!
//! A story is a list of operations carried out on recording devices, next to the model. Each crash
//! state is opened as after a reboot and judged: it must check clean before it is opened, open,
//! show what [`History`] allows, and check clean after it was closed.

use crate::crash::{CrashState, Crashes, Sampling};
use crate::device::{refs, several, Event, Fault, Image, RamDevice, Recording};
use crate::gen::{Generator, Op, Options};
use crate::history::{Effect, History, Times};
use crate::model::{Model, State, ROOT};
use crate::platform::{Spawn, TestPlatform};
use crate::run::{compare, describe, is_left_open, Runner};
use crate::subject::{Mounted, Subject};
use crate::tree::Tree;
use fs_core::check::findings::rules;
use fs_core::platform::Platform;
use fs_core::vfs::Filesystem;
use std::sync::Arc;

/// What to tell.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What everything follows from.
    pub seed: u64,
    /// How many operations.
    pub count: usize,
    /// How to generate them.
    pub options: Options,
    /// Bytes of the device.
    pub device_bytes: u64,
    /// Random states at each boundary.
    pub random: u32,
}

impl Plan {
    fn sampling(&self) -> Sampling {
        Sampling { seed: self.seed, random: self.random }
    }
}

/// Operations that were carried out, and what the devices saw of them.
pub struct Story {
    plan: Plan,
    /// The device that fails in the course of it.
    failing: Option<usize>,
    ops: Vec<Op>,
    history: History,
    base: Vec<Image>,
    events: Vec<Event>,
}

/// What must hold of crash states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// It checks clean, opens, and shows what is allowed.
    Open,
    /// Also: it closes, checks clean again, and shows the same when opened again.
    Reopen,
    /// Also: power fails again at moments of opening it, and then it opens and shows what is
    /// allowed.
    Twice,
}

/// Devices as they were left.
struct Left<'a> {
    subject: &'a dyn Subject,
    devices: Vec<Arc<RamDevice>>,
    core: Platform,
}

impl Left<'_> {
    fn new<'a>(subject: &'a dyn Subject, seed: u64, images: &[Image]) -> Left<'a> {
        let core = TestPlatform::new(seed ^ 1, Spawn::AtOnce).platform();
        let devices = images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        Left { subject, devices, core }
    }

    fn open<T>(
        &self,
        then: impl FnOnce(Box<dyn Mounted>) -> Result<T, String>,
    ) -> Result<T, String> {
        let mounted = self.subject.open(&refs(&self.devices), &self.core);
        then(mounted.map_err(|e| format!("open: {e}"))?)
    }

    /// Fails when the checker finds anything but `allowed`.
    fn check(&self, when: &str, allowed: &[&str]) -> Result<(), String> {
        let findings = self.subject.check(&refs(&self.devices), &self.core);
        let mut findings = findings.map_err(|e| format!("check {when}: {e}"))?;
        findings.retain(|finding| !allowed.iter().any(|id| finding.contains(id)));
        match findings.is_empty() {
            true => Ok(()),
            false => Err(format!("the check {when} finds:\n{}", findings.join("\n"))),
        }
    }

    /// After a second opening and closing it is clean and shows the same.
    fn reopen(&self, tree: &Tree, allowed: &[&str]) -> Result<(), String> {
        self.open(|mounted| mounted.close().map_err(|e| format!("close: {e}")))?;
        self.check("after replay", allowed)?;
        self.open(|mounted| match tree.difference(&Tree::read(&*mounted.fs())?) {
            Some(difference) => Err(format!("opened again, it is not the same: {difference}")),
            None => Ok(()),
        })
    }
}

impl Story {
    /// Carries out a story.
    ///
    /// # Errors
    /// When subject and model disagree without any crash.
    pub fn tell(subject: &dyn Subject, plan: Plan) -> Result<Story, String> {
        Story::tell_with(subject, plan, None)
    }

    /// Carries out a story in which a device fails, which nobody may notice.
    ///
    /// # Errors
    /// When subject and model disagree.
    pub fn tell_with(
        subject: &dyn Subject,
        plan: Plan,
        fault: Option<(usize, Fault)>,
    ) -> Result<Story, String> {
        let platform = TestPlatform::new(plan.seed, Spawn::AtOnce);
        let devices = several(subject.devices(), plan.device_bytes);
        let core = platform.platform();
        subject.format(&refs(&devices), &core).map_err(|e| format!("format: {e}"))?;
        let base = devices.iter().map(|device| device.image()).collect();
        let recording = Recording::start(&devices);
        let failing = fault.as_ref().map(|(device, _)| *device);
        if let Some((device, fault)) = fault {
            devices[device].arm(fault);
        }
        let mounted = subject.open(&refs(&devices), &core).map_err(|e| format!("open: {e}"))?;
        let model = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
        let (mut expected, mut found) = (Runner::new(model.clone()), Runner::new(mounted.fs()));
        let mut history = History::new(model.state());
        let mut generator = Generator::new(plan.seed, plan.options);
        let mut ops = Vec::new();
        while ops.len() < plan.count {
            let before = model.state();
            let op = generator.next(&before);
            if is_left_open(&expected, &before, &op) {
                continue;
            }
            let effect = Effect::of(&op, &expected, &before);
            let want = expected.run(&op);
            if want.result.is_err() {
                // What changes nothing has nothing to lose.
                continue;
            }
            match op {
                Op::DropCaches => mounted.drop_caches(),
                Op::Tick => {
                    platform.clock.advance_ms(6000);
                    platform.workers.tick();
                    mounted.tick();
                }
                _ => {}
            }
            let got = found.run(&op);
            compare(&expected, &model.state(), &op, &want, &got)
                .map_err(|e| format!("without any crash, {}: {e}", describe(&op)))?;
            let effect = if got.result.is_ok() { effect } else { Effect::None };
            let times = times(&*mounted.fs(), &model.state())?;
            let mark = history.push(model.state(), effect, times);
            if let Op::CopyRange { target, .. } = &op {
                // The subject may copy less at a time than is asked for.
                if found.steps > 1 {
                    expected.find_ino(target).into_iter().for_each(|ino| history.in_steps(ino));
                }
            }
            recording.mark(mark);
            ops.push(op);
        }
        let events = recording.events();
        Ok(Story { plan, failing, ops, history, base, events })
    }

    /// All crash states.
    pub fn states(&self) -> Crashes<'_> {
        Crashes::new(self.base.clone(), &self.events, self.plan.sampling())
    }

    /// The one with that name.
    pub fn state(&self, boundary: usize, variant: u32) -> CrashState {
        let sampling = self.plan.sampling();
        Crashes::state(self.base.clone(), &self.events, sampling, boundary, variant)
    }

    /// Looks at what a crash has left.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge(
        &self,
        subject: &dyn Subject,
        state: &CrashState,
        depth: Depth,
    ) -> Result<(), String> {
        let left = Left::new(subject, self.plan.seed, &state.images);
        // Power may fail between the copies of a superblock, or of a label.
        left.check("before replay", self.allowed())?;
        self.judge_without_some(subject, state)?;
        let recording = Recording::start(&left.devices);
        let tree = left.open(|mounted| self.found(mounted, state.mark))?;
        match depth {
            Depth::Open => Ok(()),
            Depth::Reopen => {
                let behind: &[&str] = &[rules::DEVICE_BEHIND.id];
                left.reopen(&tree, if self.failing.is_some() { behind } else { &[] })
            }
            Depth::Twice => {
                let events = recording.events();
                let sampling = Sampling { seed: self.plan.seed, random: 1 };
                let again = Crashes::new(state.images.clone(), &events, sampling);
                for (index, second) in again.step_by(3).enumerate() {
                    let left = Left::new(subject, self.plan.seed, &second.images);
                    left.open(|mounted| self.found(mounted, state.mark)).map_err(|e| {
                        format!("power failed again while opening (state {index}): {e}")
                    })?;
                }
                Ok(())
            }
        }
    }

    /// What the checker may find before anything was repaired.
    fn allowed(&self) -> &'static [&'static str] {
        const BEFORE: &[&str] = &[rules::SUPERBLOCK_COPY.id, rules::LABEL.id];
        const WITH_FAILED: &[&str] =
            &[rules::SUPERBLOCK_COPY.id, rules::LABEL.id, rules::DEVICE_BEHIND.id];
        if self.failing.is_some() {
            return WITH_FAILED;
        }
        BEFORE
    }

    /// With the power, as many devices are lost as the subject can do without; in turn, or none.
    fn judge_without_some(&self, subject: &dyn Subject, state: &CrashState) -> Result<(), String> {
        let (count, spare) = (subject.devices(), subject.spare());
        let turn = (state.boundary + state.variant as usize) % (count + 1);
        if spare == 0 || turn == count {
            return Ok(());
        }
        // One that failed may have been all that can be lost.
        let first = self.failing.unwrap_or(turn);
        let lost: Vec<usize> = (0..spare).map(|step| (first + step) % count).collect();
        let images = state.images.iter().enumerate();
        let rest: Vec<Image> = images
            .filter(|(index, _)| !lost.contains(index))
            .map(|(_, image)| image.clone())
            .collect();
        let left = Left::new(subject, self.plan.seed, &rest);
        let without = |e| format!("without devices {lost:?}: {e}");
        let allowed = [self.allowed(), &[rules::DEVICE_MISSING.id]].concat();
        left.check("before replay", &allowed).map_err(without)?;
        left.open(|mounted| {
            self.found(mounted, state.mark)?;
            Ok(())
        })
        .map_err(without)?;
        // What was written since is whole too, and the others are known to lack it.
        left.open(|mounted| mounted.close().map_err(|e| format!("close: {e}"))).map_err(without)?;
        left.check("after replay", &[rules::DEVICE_MISSING.id]).map_err(without)?;
        let again = Left {
            devices: (0..count)
                .map(|index| match lost.contains(&index) {
                    true => RamDevice::of("back", state.images[index].clone()),
                    false => {
                        let at = (0..index).filter(|other| !lost.contains(other)).count();
                        left.devices[at].clone()
                    }
                })
                .collect(),
            ..left
        };
        again.open(|mounted| self.found(mounted, state.mark)).map_err(|e| {
            format!("with devices {lost:?} back, which lack what was written since: {e}")
        })?;
        Ok(())
    }

    /// What an open filesystem shows, which must be allowed.
    fn found(&self, mounted: Box<dyn Mounted>, mark: u64) -> Result<Tree, String> {
        let tree = Tree::read(&*mounted.fs())?;
        self.history.check(&tree, mark)?;
        Ok(tree)
    }

    /// The operations up to a crash, the error, and how to see it again.
    pub fn report(&self, test: &str, state: &CrashState, what: &str) -> String {
        let mut text = String::new();
        for (index, op) in self.ops.iter().enumerate().take(state.mark as usize + 1) {
            text += &format!("{:4}  {}\n", index + 1, describe(op));
        }
        let (seed, boundary, variant) = (self.plan.seed, state.boundary, state.variant);
        text + &format!(
            "the power failed after operation {} had returned\n{what}\n\
             see it again: CAIRN_SEED={seed} CAIRN_STATE={boundary}:{variant} \
             cargo test -p cairn-tests {test}",
            state.mark
        )
    }
}

/// Modification times of everything that has a name.
pub(crate) fn times(fs: &dyn Filesystem, state: &State) -> Result<Times, String> {
    let mut times = Times::new();
    let mut todo = vec![(ROOT, fs.root())];
    while let Some((dir, ino)) = todo.pop() {
        let attr = fs.getattr(ino).map_err(|e| format!("getattr: {e}"))?;
        times.insert(dir, attr.mtime);
        for (name, entry) in state.nodes[&dir].entries().expect("only directories are put there") {
            let attr = fs.lookup(ino, name).map_err(|e| format!("lookup: {e}"))?;
            fs.forget(attr.ino, 1);
            times.insert(entry.ino, attr.mtime);
            if state.nodes[&entry.ino].is_dir() {
                todo.push((entry.ino, attr.ino));
            }
        }
    }
    Ok(times)
}

/// The crash state to look at, if one was asked for.
pub fn asked_state() -> Option<(usize, u32)> {
    let text = std::env::var("CAIRN_STATE").ok()?;
    let (boundary, variant) = text.split_once(':').expect("CAIRN_STATE is boundary:variant");
    let number = "CAIRN_STATE holds two numbers";
    Some((boundary.parse().expect(number), variant.parse().expect(number)))
}
