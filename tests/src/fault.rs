//! Makes one request of a device fail, for every request there is in turn.
//!
//! A story is told on a device whose *n*-th read, write or flush goes wrong. It ends at the first
//! operation that fails otherwise than the model says; then the device behaves again, the pool is
//! opened as after a crash, and must show what [`History`] allows.

use crate::crash::{Crashes, Sampling};
use crate::device::{refs, several, Counts, Fault, Image, RamDevice, Recording};
use crate::gen::{Generator, Op, Options};
use crate::history::{Effect, History};
use crate::model::{Model, State};
use crate::platform::{Spawn, TestPlatform};
use crate::power::times;
use crate::run::{compare, is_left_open, Runner};
use crate::subject::{Mounted, Subject};
use crate::tree::{Tree, Trouble};
use fs_core::platform::Platform;
use fs_core::units::Ino;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

/// A list of operations and where they are carried out.
#[derive(Clone, Debug)]
pub struct Script {
    /// What chance follows from.
    pub seed: u64,
    /// The operations.
    pub ops: Vec<Op>,
    /// Bytes of the device.
    pub device_bytes: u64,
}

/// What became of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The fault never struck.
    NotReached,
    /// It struck and nobody noticed: a second copy served, or it was a hint.
    Unnoticed,
    /// An operation failed, and everything that was promised is there.
    Noticed,
}

struct Run<'a> {
    subject: &'a dyn Subject,
    devices: Vec<Arc<RamDevice>>,
    /// The devices before the recording.
    base: Vec<Image>,
    core: Platform,
    test: TestPlatform,
    recording: Recording,
    model: Arc<Model>,
    history: History,
}

/// Requests that a script makes when nothing goes wrong, after it was opened.
///
/// # Errors
/// When the script fails without any fault.
pub fn requests(subject: &dyn Subject, script: &Script) -> Result<Counts, String> {
    let mut run = Run::new(subject, script)?;
    let before = run.devices[0].counts();
    if let Some((index, what)) = run.tell(script)? {
        return Err(format!("operation {index} fails without any fault: {what}"));
    }
    let after = run.devices[0].counts();
    Ok(Counts {
        reads: after.reads - before.reads,
        writes: after.writes - before.writes,
        flushes: after.flushes - before.flushes,
    })
}

/// Carries out a script with a fault.
///
/// # Errors
/// What is wrong with what is left.
pub fn attempt(subject: &dyn Subject, script: &Script, fault: Fault) -> Result<End, String> {
    survive(subject, script, &[(0, fault)])
}

impl<'a> Run<'a> {
    fn new(subject: &'a dyn Subject, script: &Script) -> Result<Run<'a>, String> {
        let test = TestPlatform::new(script.seed, Spawn::AtOnce);
        let core = test.platform();
        let devices = several(subject.devices(), script.device_bytes);
        subject.format(&refs(&devices), &core).map_err(|e| format!("format: {e}"))?;
        let model = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
        let history = History::new(model.state());
        let base = devices.iter().map(|device| device.image()).collect();
        let recording = Recording::start(&devices);
        Ok(Run { subject, devices, base, core, test, recording, model, history })
    }

    /// Carries out the operations until one fails that should not, or reports damage; says which,
    /// and how. An error is a wrong result.
    fn tell(&mut self, script: &Script) -> Result<Option<(usize, String)>, String> {
        let opened = self.subject.open(&refs(&self.devices), &self.core);
        let mounted = match opened {
            Ok(mounted) => mounted,
            Err(error) => return Ok(Some((0, format!("open: {error}")))),
        };
        let mut expected = Runner::new(self.model.clone());
        let mut found = Runner::new(mounted.fs());
        for (index, op) in script.ops.iter().enumerate() {
            let before = self.model.state();
            if is_left_open(&expected, &before, op) {
                continue;
            }
            let effect = Effect::of(op, &expected, &before);
            let want = expected.run(op);
            self.pass_time(op, &*mounted);
            let got = found.run(op);
            if let Some(damage) = found.damage.take() {
                // It may have been carried out or not.
                self.history.push(self.model.state(), Effect::None, Default::default());
                if let Op::CopyRange { target, .. } = op {
                    let ino = expected.find_ino(target);
                    ino.into_iter().for_each(|ino| self.history.in_steps(ino));
                }
                let told = self.test.incidents.take();
                let told: Vec<String> = told.iter().map(ToString::to_string).collect();
                return Ok(Some((index + 1, format!("{damage} ({})", told.join("; ")))));
            }
            compare(&expected, &self.model.state(), op, &want, &got)
                .map_err(|e| format!("operation {}: {e}", index + 1))?;
            let effect = if got.result.is_ok() { effect } else { Effect::None };
            // Looking at times may run into the fault as well.
            let times = times(&*mounted.fs(), &self.model.state()).unwrap_or_default();
            let mark = self.history.push(self.model.state(), effect, times);
            self.recording.mark(mark);
        }
        match mounted.close() {
            Ok(()) => {
                let mark = self.history.push(self.model.state(), Effect::All, Default::default());
                self.recording.mark(mark);
                Ok(None)
            }
            Err(error) => Ok(Some((script.ops.len() + 1, format!("close: {error}")))),
        }
    }

    fn pass_time(&self, op: &Op, mounted: &dyn Mounted) {
        match op {
            Op::DropCaches => mounted.drop_caches(),
            Op::Tick => {
                self.test.clock.advance_ms(6000);
                self.test.workers.tick();
                mounted.tick();
            }
            _ => {}
        }
    }

    /// Looks at what is left on the device, and at what would be had power failed at the end.
    fn look(&self) -> Result<(), String> {
        let events = self.recording.events();
        let sampling = Sampling { seed: 7, random: 2 };
        for state in Crashes::at_end(self.base.clone(), &events, sampling) {
            self.look_at(&state.images, state.mark)?;
        }
        Ok(())
    }

    fn look_at(&self, images: &[Image], mark: u64) -> Result<(), String> {
        let rams: Vec<Arc<RamDevice>> =
            images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        let devices = refs(&rams);
        let at = |what: &'static str| move |e| format!("after the fault, {what}: {e}");
        let mounted = self.subject.open(&devices, &self.core).map_err(at("open"))?;
        let tree = Tree::read(&*mounted.fs()).map_err(|e| format!("after the fault: {e}"))?;
        self.history.check(&tree, mark).map_err(|e| format!("after the fault: {e}"))?;
        mounted.close().map_err(at("close"))?;
        let mut findings = self.subject.check(&devices, &self.core).map_err(at("check"))?;
        // A device that failed may be behind.
        findings.retain(|finding| images.len() == 1 || !finding.starts_with("warning "));
        match findings.is_empty() {
            true => Ok(()),
            false => Err(format!("after the fault, the check finds:\n{}", findings.join("\n"))),
        }
    }
}

/// Carries out a script on several devices of which some go wrong, which may be more than the
/// subject can do without: what was promised is there when they behave again.
///
/// # Errors
/// What is wrong with what is left.
pub fn survive(
    subject: &dyn Subject,
    script: &Script,
    faults: &[(usize, Fault)],
) -> Result<End, String> {
    let guarded = catch_unwind(AssertUnwindSafe(|| {
        let mut run = Run::new(subject, script)?;
        for (device, fault) in faults {
            run.devices[*device].arm(fault.clone());
        }
        let noticed = run.tell(script)?;
        let struck = faults.iter().all(|(device, _)| run.devices[*device].struck());
        run.look()?;
        Ok(match (struck, noticed) {
            (false, _) => End::NotReached,
            (true, None) => End::Unnoticed,
            (true, Some(_)) => End::Noticed,
        })
    }));
    guarded.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map_or("of an unknown kind", String::as_str);
        Err(format!("panic: {text}"))
    })
}

/// Carries out a script on a device that lies once, and reads everything again: what can be read
/// must be right.
///
/// # Errors
/// What was wrong.
pub fn lie(subject: &dyn Subject, script: &Script, fault: Fault) -> Result<End, String> {
    let mut run = Run::new(subject, script)?;
    run.devices[0].arm(fault);
    if run.tell(script)?.is_some() {
        return Ok(End::Noticed);
    }
    if !run.devices[0].struck() {
        return Ok(End::NotReached);
    }
    run.devices[0].disarm();
    compare_with(subject, &run.core, run.devices[0].image(), &Tree::of_state(&run.model.state()))
}

/// Carries out a script on several devices one of which goes wrong, which is less than the subject
/// can do without: no operation fails, and everything is there, with that device as it is then, and
/// without it. Returns whether the fault struck.
///
/// # Errors
/// What was wrong.
pub fn tolerate(
    subject: &dyn Subject,
    script: &Script,
    device: usize,
    fault: Fault,
) -> Result<bool, String> {
    let guarded = catch_unwind(AssertUnwindSafe(|| {
        let mut run = Run::new(subject, script)?;
        run.devices[device].arm(fault);
        if let Some((index, what)) = run.tell(script)? {
            return Err(format!("operation {index} fails: {what}"));
        }
        let struck = run.devices[device].struck();
        let images: Vec<Image> = run.devices.iter().map(|device| device.image()).collect();
        let want = Tree::of_state(&run.model.state());
        for with_it in [true, false] {
            let there = (0..images.len()).filter(|index| with_it || *index != device);
            let rams: Vec<Arc<RamDevice>> =
                there.map(|index| RamDevice::of("ram", images[index].clone())).collect();
            let which = if with_it { "with" } else { "without" };
            run.expect_tree(&rams, &want).map_err(|e| format!("{which} the device: {e}"))?;
        }
        Ok(struck)
    }));
    guarded.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map_or("of an unknown kind", String::as_str);
        Err(format!("panic: {text}"))
    })
}

impl Run<'_> {
    /// Opens, compares, closes, and checks that at most copies are damaged or missing.
    fn expect_tree(&self, rams: &[Arc<RamDevice>], want: &Tree) -> Result<(), String> {
        let devices = refs(rams);
        let mounted = self.subject.open(&devices, &self.core).map_err(|e| format!("open: {e}"))?;
        let found = Tree::read(&*mounted.fs()).map_err(|e| format!("read: {e}"))?;
        if let Some(difference) = want.difference(&found) {
            return Err(difference);
        }
        mounted.close().map_err(|e| format!("close: {e}"))?;
        let findings = self.subject.check(&devices, &self.core);
        let findings = findings.map_err(|e| format!("check: {e}"))?;
        match findings.iter().find(|finding| !finding.starts_with("warning ")) {
            Some(finding) => Err(format!("the check finds: {finding}")),
            None => Ok(()),
        }
    }
}

/// Whether an image shows exactly a tree, or reports damage.
///
/// # Errors
/// What was wrong.
pub fn compare_with(
    subject: &dyn Subject,
    core: &Platform,
    image: Image,
    expected: &Tree,
) -> Result<End, String> {
    let devices = refs(&[RamDevice::of("ram", image)]);
    let mounted = match subject.open(&devices, core) {
        Ok(mounted) => mounted,
        Err(_) => return Ok(End::Noticed),
    };
    match Tree::read(&*mounted.fs()) {
        Ok(tree) => match expected.difference(&tree) {
            None => Ok(End::Unnoticed),
            Some(difference) => Err(format!("wrong without an error: {difference}")),
        },
        Err(Trouble::Failed { error, .. }) if error.is_damage() => Ok(End::Noticed),
        Err(trouble) => Err(format!("damage shows as: {trouble}")),
    }
}

/// The operations that a seed makes.
pub fn script(seed: u64, count: usize, options: Options, device_bytes: u64) -> Script {
    let model = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
    let mut runner = Runner::new(model.clone());
    let mut generator = Generator::new(seed, options);
    let mut ops = Vec::new();
    while ops.len() < count {
        let op = generator.next(&model.state());
        if !is_left_open(&runner, &model.state(), &op) && runner.run(&op).result.is_ok() {
            ops.push(op);
        }
    }
    Script { seed, ops, device_bytes }
}

/// Carries out a script and closes; returns the image, what it shows, and the platform.
///
/// # Errors
/// When that fails.
pub fn built(subject: &dyn Subject, script: &Script) -> Result<(Image, Tree, Platform), String> {
    let mut run = Run::new(subject, script)?;
    if let Some((index, what)) = run.tell(script)? {
        return Err(format!("operation {index} fails without any fault: {what}"));
    }
    Ok((run.devices[0].image(), Tree::of_state(&run.model.state()), run.core))
}

/// Carries out a script, syncs every file, and cuts the power; returns what is on the device and
/// what it must show.
///
/// # Errors
/// When that fails.
pub fn cut_off(subject: &dyn Subject, script: &Script) -> Result<(Image, Tree), String> {
    let run = Run::new(subject, script)?;
    let mounted = subject.open(&refs(&run.devices), &run.core);
    let mounted = mounted.map_err(|e| format!("open: {e}"))?;
    let mut expected = Runner::new(run.model.clone());
    let mut found = Runner::new(mounted.fs());
    let named = |state: &State| state.nodes.iter().filter(|(_, n)| n.nlink > 0).count();
    for op in script.ops.iter().filter(|op| !matches!(op, Op::Sync | Op::Tick)) {
        if expected.run(op).result != found.run(op).result {
            return Err(format!("operation goes wrong: {op:?}"));
        }
    }
    let tree = Tree::read(&*mounted.fs())?;
    for file in &tree.files {
        let synced = mounted.fs().fsync(Ino(file.ino), false);
        synced.map_err(|e| format!("fsync: {e}"))?;
    }
    assert!(named(&run.model.state()) == tree.files.len(), "model and subject differ");
    Ok((run.devices[0].image(), tree))
}
