//! Stories of subvolumes, snapshots, clones and rollbacks, next to models of each.
//!
//! A [`World`] is a pool with a model for every subvolume and a remembered state for every
//! snapshot. A story is a list of steps drawn from a seed: operations on some subvolume, and what
//! `cairn subvolume` and `cairn snapshot` do. After the steps, and in every state that a crash may
//! leave, each snapshot shows exactly what it was taken of, each subvolume what its model says, and
//! the checker, which recomputes dead lists, references and space, finds nothing.

mod replicate;

use crate::crash::{CrashState, Crashes, Sampling};
use crate::device::{refs, Image, RamDevice, Recording};
use crate::gen::{Generator, Op, Options};
use crate::history::{Effect, History};
use crate::model::{Model, State};
use crate::platform::{Spawn, TestPlatform, VirtualClock};
use crate::power::times;
use crate::rng::Rng;
use crate::run::{compare, describe, is_left_open, Runner};
use crate::subject::{Pool, Subject};
use crate::tree::Tree;
use fs_core::check::findings::rules;
use fs_core::engine::versions::{PropertyChange, VersionOp};
use fs_core::engine::{self, Engine};
use fs_core::error::Errno;
use fs_core::format::pool::{Settings, UserProperties};
use fs_core::platform::Platform;
use fs_core::units::TreeId;
use fs_core::vfs::{AccessTime, Caller, Filesystem, Volume};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What to tell.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What everything follows from.
    pub seed: u64,
    /// How many steps.
    pub steps: usize,
    /// Operations of one step at most.
    pub ops_per_step: u64,
    /// How to generate operations.
    pub options: Options,
    /// Bytes of the device.
    pub device_bytes: u64,
    /// The pool.
    pub pool: Pool,
    /// Whether to check the pool after each step.
    pub checks: bool,
    /// Whether to discard what is free; a device in memory fills it with noise.
    pub trims: bool,
    /// Whether to delete everything in the end.
    pub clears: bool,
}

/// A subvolume and its model.
struct Head {
    model: Arc<Model>,
    expected: Runner,
    found: Runner,
    volume: Arc<Volume>,
    history: History,
    /// Number of its last operation.
    last: u64,
}

/// What there was after a step.
#[derive(Clone, Default)]
struct Moment {
    /// Subvolumes with the number of their last operation.
    heads: BTreeMap<u64, u64>,
    /// Snapshots.
    snapshots: BTreeMap<u64, Arc<Tree>>,
    /// What users see of each: its name and its holds.
    labels: BTreeMap<u64, Label>,
    /// Bookmarks by id: of which subvolume, and their names.
    bookmarks: BTreeMap<u64, (u64, Vec<u8>)>,
}

/// A name, holds and properties.
type Label = (Vec<u8>, Vec<Vec<u8>>, Properties);
/// What was chosen, and the properties of users.
type Properties = (Settings, UserProperties);
/// Names and holds by id, and bookmarks by id.
type Labels = (BTreeMap<u64, Label>, BTreeMap<u64, (u64, Vec<u8>)>);

/// A pool with its models.
pub struct World {
    plan: Plan,
    platform: TestPlatform,
    /// That of all models: it moves with every look.
    clock: Arc<VirtualClock>,
    core: Platform,
    devices: Vec<Arc<RamDevice>>,
    base: Vec<Image>,
    recording: Recording,
    engine: Arc<Engine>,
    heads: BTreeMap<u64, Head>,
    /// Histories of subvolumes that are gone, too.
    old: BTreeMap<u64, History>,
    /// Owner and state.
    snapshots: BTreeMap<u64, (u64, State)>,
    trees: BTreeMap<u64, Arc<Tree>>,
    labels: BTreeMap<u64, Label>,
    bookmarks: BTreeMap<u64, (u64, Vec<u8>)>,
    received: Vec<replicate::Received>,
    default: u64,
    generator: Generator,
    rng: Rng,
    /// For properties and streams: the rest of a story is as it would be without.
    extra: Rng,
    names: u64,
    moments: Vec<Moment>,
    log: Vec<String>,
}

/// The root subvolume.
pub const ROOT_SUBVOLUME: u64 = TreeId::FIRST_SUBVOL.0;

fn show(error: fs_core::error::Error) -> String {
    error.to_string()
}

impl World {
    /// An empty pool.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(plan: Plan) -> Result<World, String> {
        let platform = TestPlatform::new(plan.seed, Spawn::AtOnce);
        let core = platform.platform();
        let devices = vec![RamDevice::new("ram", plan.device_bytes)];
        plan.pool.format(&refs(&devices), &core).map_err(show)?;
        let base = devices.iter().map(|device| device.image()).collect();
        let recording = Recording::start(&devices);
        let engine = engine::open(refs(&devices), core.clone(), &plan.pool.open).map_err(show)?;
        let clock = TestPlatform::new(0, Spawn::AtOnce).clock;
        let model = Arc::new(Model::new(clock.clone()));
        let mut world = World {
            clock,
            generator: Generator::new(plan.seed, plan.options),
            rng: Rng::derived(plan.seed, 0x7665_7273),
            extra: Rng::derived(plan.seed, 0x7072_6f70),
            plan,
            platform,
            core,
            devices,
            base,
            recording,
            engine,
            heads: BTreeMap::new(),
            old: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            trees: BTreeMap::new(),
            labels: BTreeMap::from([(ROOT_SUBVOLUME, Label::default())]),
            bookmarks: BTreeMap::new(),
            received: Vec::new(),
            default: ROOT_SUBVOLUME,
            names: 0,
            moments: Vec::new(),
            log: Vec::new(),
        };
        let history = History::new(model.state());
        world.mount(ROOT_SUBVOLUME, model, history)?;
        world.remember();
        Ok(world)
    }

    fn mount(&mut self, id: u64, model: Arc<Model>, history: History) -> Result<(), String> {
        let volume = Volume::of_version(self.engine.clone(), id, AccessTime::Relative);
        let volume = volume.map_err(show)?;
        let last = history.last();
        let (expected, found) = (Runner::new(model.clone()), Runner::new(volume.clone()));
        self.heads.insert(id, Head { model, expected, found, volume, history, last });
        Ok(())
    }

    /// Stops using a subvolume; what was held of it is let go.
    fn unmount(&mut self, id: u64) -> Head {
        let mut head = self.heads.remove(&id).expect("a subvolume");
        head.expected.remounted(head.model.clone());
        head.model.remount();
        for slot in head.found.slots().into_iter().flatten() {
            head.volume.forget(slot, 1);
        }
        head.found.remounted(head.model.clone());
        head
    }

    fn remember(&mut self) {
        let heads = self.heads.iter().map(|(id, head)| (*id, head.last)).collect();
        self.moments.push(Moment {
            heads,
            snapshots: self.trees.clone(),
            labels: self.labels.clone(),
            bookmarks: self.bookmarks.clone(),
        });
        self.recording.mark(self.moments.len() as u64 - 1);
    }

    fn name(&mut self) -> Vec<u8> {
        self.names += 1;
        format!("n{}", self.names).into_bytes()
    }

    fn change(&mut self, op: VersionOp) -> Result<u64, String> {
        self.log.push(format!("{op:?}"));
        let made = self.engine.change_versions(vec![op.clone()]);
        made.map(|made| made[0]).map_err(|error| format!("{op:?}: {error}"))
    }

    /// Everything so far is durable in every subvolume.
    fn all_durable(&mut self) -> Result<(), String> {
        for head in self.heads.values_mut() {
            let times = times(&*head.volume, &head.model.state())?;
            head.last = head.history.push(head.model.state(), Effect::All, times);
        }
        Ok(())
    }

    /// Tells the story.
    ///
    /// # Errors
    /// What is wrong, with the steps so far.
    pub fn tell(&mut self) -> Result<(), String> {
        for _ in 0..self.plan.steps {
            let step = self.step().and_then(|()| self.set_some());
            let outcome = step.and_then(|()| match self.plan.checks {
                true => self.look(),
                false => Ok(()),
            });
            outcome.map_err(|what| self.report(&what))?;
        }
        self.look().map_err(|what| self.report(&what))?;
        if self.plan.clears {
            self.clear().map_err(|what| self.report(&what))?;
        }
        Ok(())
    }

    /// The steps so far and what is wrong.
    pub fn report(&self, what: &str) -> String {
        format!("{}\n{what}\nseed {}", self.log.join("\n"), self.plan.seed)
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> Option<T> {
        (!list.is_empty()).then(|| *self.rng.pick(list))
    }

    /// Now and then, a property, and a snapshot that is sent and received.
    fn set_some(&mut self) -> Result<(), String> {
        let heads: Vec<u64> = self.heads.keys().copied().collect();
        let head = *self.extra.pick(&heads);
        if self.extra.chance(1, 8) {
            self.set_property(head)?;
        }
        let snapshots: Vec<u64> = self.snapshots.keys().copied().collect();
        match !snapshots.is_empty() && self.extra.chance(1, 6) {
            true => {
                let snapshot = *self.extra.pick(&snapshots);
                self.replicate(snapshot)
            }
            false => Ok(()),
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let heads: Vec<u64> = self.heads.keys().copied().collect();
        let snapshots: Vec<u64> = self.snapshots.keys().copied().collect();
        let head = self.pick(&heads).expect("the root subvolume is always there");
        match self.rng.below(25) {
            0..=7 => self.operate(head),
            8..=11 => self.snapshot(&[head]),
            12 => self.snapshot(&heads),
            13 if heads.len() < 4 => match self.pick(&snapshots) {
                Some(snapshot) => self.clone(snapshot),
                None => self.create(),
            },
            14 => match self.pick(&snapshots) {
                Some(snapshot) => self.roll_back(snapshot),
                None => Ok(()),
            },
            15..=17 => match self.pick(&snapshots) {
                Some(snapshot) => self.delete_snapshot(snapshot),
                None => Ok(()),
            },
            18 if head != ROOT_SUBVOLUME && self.rng.chance(1, 2) => self.delete_subvolume(head),
            19 => self.rename(head, &snapshots),
            20 => match self.pick(&snapshots) {
                Some(snapshot) => self.hold(snapshot),
                None => Ok(()),
            },
            21 => match self.pick(&snapshots) {
                Some(snapshot) => self.bookmark(snapshot),
                None => Ok(()),
            },
            22 => self.set_default(head),
            _ => {
                self.log.push("time passes".into());
                self.platform.clock.advance_ms(6000);
                self.platform.workers.tick();
                self.engine.tick();
                self.remember();
                Ok(())
            }
        }
    }

    /// Operations on one subvolume.
    fn operate(&mut self, id: u64) -> Result<(), String> {
        let count = 1 + self.rng.below(self.plan.ops_per_step);
        let head = self.heads.get_mut(&id).expect("a subvolume");
        let mut done = 0;
        while done < count {
            let before = head.model.state();
            let op = self.generator.next(&before);
            if is_left_open(&head.expected, &before, &op)
                || matches!(op, Op::Remount | Op::SetLabel { .. })
                || matches!(op, Op::Trim) && !self.plan.trims
            {
                continue;
            }
            let effect = Effect::of(&op, &head.expected, &before);
            let slots = head.expected.slots();
            let want = head.expected.run(&op);
            if want.result.is_err() && !self.plan.options.reads {
                continue;
            }
            done += 1;
            self.log.push(format!("{id}: {}", describe(&op)));
            match op {
                Op::DropCaches => self.engine.drop_caches(),
                Op::Tick => self.engine.tick(),
                _ => {}
            }
            let got = head.found.run(&op);
            if got.result == Err(Errno::NoSpc) && want.result.is_ok() {
                // Snapshots hold what was written: the pool may be full.
                if head.expected.slots() != slots || matches!(op, Op::CopyRange { .. }) {
                    return Err("no space left for an operation that cannot be undone".into());
                }
                head.model.set_state(before);
                continue;
            }
            compare(&head.expected, &head.model.state(), &op, &want, &got)
                .map_err(|what| format!("{}: {what}", describe(&op)))?;
            let times = times(&*head.volume, &head.model.state())?;
            let effect = if got.result.is_ok() { effect } else { Effect::None };
            head.last = head.history.push(head.model.state(), effect, times);
            if let Op::CopyRange { target, .. } = &op {
                let target = head.expected.find_ino(target);
                target.into_iter().for_each(|ino| head.history.in_steps(ino));
            }
            let heads = BTreeMap::from([(id, head.last)]);
            let last = self.moments.last().expect("the first").clone();
            let heads = last.heads.clone().into_iter().chain(heads).collect();
            self.moments.push(Moment { heads, ..last });
            self.recording.mark(self.moments.len() as u64 - 1);
        }
        Ok(())
    }

    fn add_snapshot(&mut self, id: u64, owner: u64, name: Vec<u8>, state: State) {
        let properties = self.labels[&owner].2.clone();
        self.labels.insert(id, (name, Vec::new(), properties));
        self.trees.insert(id, Arc::new(Tree::of_state(&state)));
        self.snapshots.insert(id, (owner, state));
    }

    fn snapshot(&mut self, heads: &[u64]) -> Result<(), String> {
        let ops = heads.iter().map(|head| {
            let name = format!("s{}-{head}", self.moments.len()).into_bytes();
            VersionOp::Snapshot { subvolume: *head, name }
        });
        let ops: Vec<VersionOp> = ops.collect();
        self.log.push(format!("{ops:?}"));
        let made = self.engine.change_versions(ops).map_err(show)?;
        for (id, head) in made.into_iter().zip(heads) {
            let state = self.heads[head].model.state();
            let name = format!("s{}-{head}", self.moments.len()).into_bytes();
            self.add_snapshot(id, *head, name, state);
        }
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn create(&mut self) -> Result<(), String> {
        let name = self.name();
        let op = VersionOp::CreateSubvolume { name: name.clone(), mode: 0o755, uid: 0, gid: 0 };
        let id = self.change(op)?;
        self.labels.insert(id, (name, Vec::new(), Properties::default()));
        let model = Arc::new(Model::new(self.clock.clone()));
        let history = History::new(model.state());
        self.mount(id, model, history)?;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn clone(&mut self, snapshot: u64) -> Result<(), String> {
        let name = self.name();
        let id = self.change(VersionOp::Clone { snapshot, name: name.clone() })?;
        let (mut settings, user) = self.labels[&snapshot].2.clone();
        settings.read_only = 0;
        self.labels.insert(id, (name, Vec::new(), (settings, user)));
        let state = self.snapshots[&snapshot].1.clone();
        let model = Arc::new(Model::from_state(state, self.clock.clone()));
        model.remount();
        let history = History::new(model.state());
        self.mount(id, model, history)?;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn roll_back(&mut self, snapshot: u64) -> Result<(), String> {
        let owner = self.snapshots[&snapshot].0;
        if !self.heads.contains_key(&owner) {
            return Ok(());
        }
        let busy = self
            .engine
            .change_versions(vec![VersionOp::Rollback { snapshot, keep: b"never".to_vec() }]);
        if busy.err().map(|error| error.errno()) != Some(Errno::Busy) {
            return Err("a mounted subvolume was rolled back".into());
        }
        let head = self.unmount(owner);
        let (model, mut history) = (head.model.clone(), head.history);
        drop((head.expected, head.found, head.volume));
        let name = self.name();
        let kept = self.change(VersionOp::Rollback { snapshot, keep: name.clone() })?;
        let was = model.state();
        model.set_state(self.snapshots[&snapshot].1.clone());
        model.remount();
        self.add_snapshot(kept, owner, name, was);
        history.push(model.state(), Effect::All, BTreeMap::new());
        self.mount(owner, model, history)?;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn delete_snapshot(&mut self, snapshot: u64) -> Result<(), String> {
        if !self.labels[&snapshot].1.is_empty() {
            let held = self.engine.change_versions(vec![VersionOp::Delete { id: snapshot }]);
            if held.err().map(|error| error.errno()) != Some(Errno::Busy) {
                return Err(format!("snapshot {snapshot} is held and was deleted"));
            }
            self.release_all(snapshot)?;
        }
        let measured = self.rng.chance(1, 3);
        let mut unique = 0;
        if measured {
            self.engine.commit().and_then(|()| self.engine.destroy_all()).map_err(show)?;
            unique = self.engine.with_versions(|versions| versions.unique_bytes(snapshot));
        }
        let before = self.engine.given_up_bytes();
        self.change(VersionOp::Delete { id: snapshot })?;
        self.snapshots.remove(&snapshot);
        self.trees.remove(&snapshot);
        self.labels.remove(&snapshot);
        if measured {
            self.engine.destroy_all().map_err(show)?;
            let freed = self.engine.given_up_bytes() - before;
            if freed != unique {
                return Err(format!("{freed} bytes came free and {unique} were announced"));
            }
        }
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn release_all(&mut self, snapshot: u64) -> Result<(), String> {
        for tag in self.labels[&snapshot].1.clone() {
            self.change(VersionOp::Release { snapshot, tag })?;
        }
        self.labels.get_mut(&snapshot).expect("it is there").1.clear();
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn rename(&mut self, head: u64, snapshots: &[u64]) -> Result<(), String> {
        let snapshot = self.pick(snapshots);
        let id = snapshot.filter(|_| self.rng.chance(1, 2)).unwrap_or(head);
        if id == ROOT_SUBVOLUME {
            return Ok(());
        }
        let name = self.name();
        self.change(VersionOp::Rename { id, name: name.clone() })?;
        self.labels.get_mut(&id).expect("it is there").0 = name;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn hold(&mut self, snapshot: u64) -> Result<(), String> {
        if !self.labels[&snapshot].1.is_empty() && self.rng.chance(1, 2) {
            return self.release_all(snapshot);
        }
        if self.labels[&snapshot].1.len() == 16 {
            return Ok(());
        }
        let tag = self.name();
        self.change(VersionOp::Hold { snapshot, tag: tag.clone() })?;
        self.labels.get_mut(&snapshot).expect("it is there").1.push(tag);
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn bookmark(&mut self, snapshot: u64) -> Result<(), String> {
        let ids: Vec<u64> = self.bookmarks.keys().copied().collect();
        match self.pick(&ids).filter(|_| self.rng.chance(1, 3)) {
            Some(id) => {
                self.change(VersionOp::DeleteBookmark { id })?;
                self.bookmarks.remove(&id);
            }
            None => {
                let name = self.name();
                let id = self.change(VersionOp::Bookmark { snapshot, name: name.clone() })?;
                self.bookmarks.insert(id, (self.snapshots[&snapshot].0, name));
            }
        }
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    /// Chooses a property of a subvolume, or takes a choice away; with a property of users.
    ///
    /// # Errors
    /// When that fails.
    pub fn set_property(&mut self, id: u64) -> Result<(), String> {
        let which = self.extra.below(4);
        if which == 2 {
            self.refuse_changes(id)?;
        }
        let (settings, user) = &mut self.labels.get_mut(&id).expect("it is there").2;
        let mut changes = Vec::new();
        match which {
            0 => {
                let (kind, level) = *self.extra.pick(&[(0, 0), (1, 0), (2, 0), (2, 3)]);
                (settings.compression, settings.level) = (kind, level);
                changes.push(PropertyChange::Compression(kind, level));
            }
            1 => {
                settings.checksum = self.extra.below(4) as u8;
                changes.push(PropertyChange::Checksum(settings.checksum));
            }
            2 => {
                settings.read_only = self.extra.below(2) as u8;
                changes.push(PropertyChange::ReadOnly(settings.read_only));
            }
            _ => {
                // The model is told nothing of it, and mounts say when times change.
                settings.access_time = *self.extra.pick(&[0, 2]);
                changes.push(PropertyChange::AccessTime(settings.access_time));
            }
        }
        let name = format!("test:{}", self.extra.below(4)).into_bytes();
        let value = self.extra.chance(2, 3).then(|| vec![b'v'; self.extra.below(900) as usize]);
        match &value {
            Some(value) => drop(user.insert(name.clone(), value.clone())),
            None => drop(user.remove(&name)),
        }
        changes.push(PropertyChange::User(name, value));
        self.change(VersionOp::SetProperties { id, changes })?;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    /// Sets a subvolume read-only, and tries to change it.
    fn refuse_changes(&mut self, id: u64) -> Result<(), String> {
        self.change(VersionOp::SetProperties { id, changes: vec![PropertyChange::ReadOnly(2)] })?;
        self.labels.get_mut(&id).expect("it is there").2 .0.read_only = 2;
        let volume = &self.heads[&id].volume;
        let root = Caller { uid: 0, gid: 0, umask: 0 };
        let tried = volume.mkdir(volume.root(), b"refused", 0o755, &root);
        if tried.err().map(|error| error.errno()) != Some(Errno::RoFs) {
            return Err(format!("{id} is read-only and took a change"));
        }
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn set_default(&mut self, head: u64) -> Result<(), String> {
        self.change(VersionOp::SetDefault { subvolume: head })?;
        self.default = head;
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn delete_subvolume(&mut self, id: u64) -> Result<(), String> {
        if self.default == id {
            self.set_default(ROOT_SUBVOLUME)?;
        }
        let head = self.unmount(id);
        self.old.insert(id, head.history);
        drop((head.expected, head.found, head.volume));
        let owned = self.snapshots.iter().filter(|(_, (owner, _))| *owner == id);
        let mut ids: Vec<u64> = owned.map(|(snapshot, _)| *snapshot).collect();
        for snapshot in &ids {
            self.release_all(*snapshot)?;
        }
        ids.push(id);
        let ops: Vec<VersionOp> = ids.iter().map(|id| VersionOp::Delete { id: *id }).collect();
        self.log.push(format!("{ops:?}"));
        self.engine.change_versions(ops).map_err(show)?;
        for id in ids {
            self.snapshots.remove(&id);
            self.trees.remove(&id);
            self.labels.remove(&id);
        }
        self.bookmarks.retain(|_, (owner, _)| *owner != id);
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    fn labels_of(engine: &Engine) -> Labels {
        engine.with_versions(|versions| {
            let live = versions.iter().filter(|(_, version)| !version.item.is_deleted());
            let bookmarks = versions.bookmarks();
            (
                live.map(|(id, v)| {
                    let properties = (v.item.settings(), v.user.clone());
                    (id, (v.name.clone(), v.holds.clone(), properties))
                })
                .collect(),
                bookmarks.map(|(id, b)| (id, (b.item.owner, b.name.clone()))).collect(),
            )
        })
    }

    fn tree_of(engine: &Arc<Engine>, id: u64) -> Result<Tree, String> {
        let volume = Volume::of_version(engine.clone(), id, AccessTime::Relative).map_err(show)?;
        Tree::read(&*volume).map_err(|trouble| format!("version {id}: {trouble}"))
    }

    /// Every tree is as it should be, and the checker finds nothing.
    fn look(&mut self) -> Result<(), String> {
        for (id, head) in &self.heads {
            let found = Tree::read(&*head.volume)?;
            if let Some(difference) = Tree::of_state(&head.model.state()).difference(&found) {
                return Err(format!("subvolume {id}: {difference}"));
            }
        }
        for (id, tree) in &self.trees {
            if let Some(difference) = tree.difference(&World::tree_of(&self.engine, *id)?) {
                return Err(format!("snapshot {id}: {difference}"));
            }
        }
        let found = World::labels_of(&self.engine);
        if found != (self.labels.clone(), self.bookmarks.clone()) {
            return Err(format!("names, holds and bookmarks are {found:?}"));
        }
        let default = self.engine.default_subvol().map_or(0, |subvol| subvol.id.0);
        if default != self.default {
            return Err(format!("{default} is the default subvolume, not {}", self.default));
        }
        self.check(&self.devices, "after a step")
    }

    fn check(&self, devices: &[Arc<RamDevice>], when: &str) -> Result<(), String> {
        let mut findings = self.plan.pool.check(&refs(devices), &self.core).map_err(show)?;
        // Power may fail between the copies of a superblock, or of a label.
        let allowed = [rules::SUPERBLOCK_COPY.id, rules::LABEL.id];
        findings.retain(|finding| !allowed.iter().any(|id| finding.contains(id)));
        match findings.is_empty() {
            true => Ok(()),
            false => Err(format!("the check {when} finds:\n{}", findings.join("\n"))),
        }
    }

    /// Deletes everything: nothing is left of it.
    fn clear(&mut self) -> Result<(), String> {
        let others: Vec<u64> =
            self.heads.keys().copied().filter(|id| *id != ROOT_SUBVOLUME).collect();
        for id in others {
            self.delete_subvolume(id)?;
        }
        let snapshots: Vec<u64> = self.snapshots.keys().copied().collect();
        for id in snapshots {
            self.delete_snapshot(id)?;
        }
        self.engine.destroy_all().map_err(show)?;
        let left = self.engine.with_versions(|versions| versions.iter().count());
        if left != 1 {
            return Err(format!("{left} versions are left of one"));
        }
        let (item, unique) = self.engine.with_versions(|versions| {
            (versions.get(ROOT_SUBVOLUME).expect("the root").item, versions.unique_bytes(256))
        });
        if item.own_bytes != item.referenced_bytes() || unique != item.own_bytes {
            return Err(format!("not all that is left is the root's own: {item:?}"));
        }
        if self.engine.published().0.dead.root.is_some() {
            return Err("a dead list is left".into());
        }
        self.look()
    }

    /// Closes the pool: what is on the device, and what a mount of it shows.
    ///
    /// # Errors
    /// When that fails.
    pub fn close(mut self) -> Result<(Image, Tree), String> {
        let ids: Vec<u64> = self.heads.keys().copied().collect();
        let mut shown = None;
        for id in ids {
            let head = self.unmount(id);
            // What a mount shows.
            if id == self.default {
                shown = Some(Tree::of_state(&head.model.state()));
            }
        }
        self.engine.close().map_err(show)?;
        self.check(&self.devices, "after closing")?;
        Ok((self.devices[0].image(), shown.expect("the default subvolume is always there")))
    }

    /// Limits what the root subvolume may refer to, and may have of its own.
    ///
    /// # Errors
    /// When that fails.
    pub fn limit(&self, referenced: u64, own: u64) -> Result<(), String> {
        let op = VersionOp::SetLimits { subvolume: ROOT_SUBVOLUME, referenced, own };
        self.engine.change_versions(vec![op]).map(|_| ()).map_err(show)
    }

    /// All states that a crash may leave.
    pub fn crashes(&self, random: u32) -> impl Iterator<Item = CrashState> {
        let sampling = Sampling { seed: self.plan.seed, random };
        let events = self.recording.events();
        let all = Crashes::new(self.base.clone(), &events, sampling);
        all.collect::<Vec<_>>().into_iter()
    }

    /// Looks at what a crash has left.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge(&self, state: &CrashState) -> Result<(), String> {
        let devices: Vec<_> =
            state.images.iter().map(|image| RamDevice::of("ram", image.clone())).collect();
        self.check(&devices, "before replay")?;
        let core = TestPlatform::new(self.plan.seed ^ 1, Spawn::AtOnce).platform();
        let engine = engine::open(refs(&devices), core, &self.plan.pool.open).map_err(show)?;
        let mark = state.mark as usize;
        let before = &self.moments[mark];
        let after = self.moments.get(mark + 1).unwrap_or(before);
        let there: Vec<u64> = engine.with_versions(|versions| {
            let live = versions.iter().filter(|(_, v)| !v.item.is_deleted());
            live.filter(|(_, v)| v.item.is_snapshot()).map(|(id, _)| id).collect()
        });
        for id in &there {
            let tree = before.snapshots.get(id).or_else(|| after.snapshots.get(id));
            let tree = tree.ok_or(format!("snapshot {id} is there"))?;
            if let Some(difference) = tree.difference(&World::tree_of(&engine, *id)?) {
                return Err(format!("snapshot {id}: {difference}"));
            }
        }
        for id in before.snapshots.keys() {
            if after.snapshots.contains_key(id) && !there.contains(id) {
                return Err(format!("snapshot {id} is lost"));
            }
        }
        let found = World::labels_of(&engine);
        let either = [before, after].map(|moment| (&moment.labels, &moment.bookmarks));
        if !either.contains(&(&found.0, &found.1)) {
            return Err(format!("names, holds and bookmarks are {found:?}"));
        }
        for (id, last) in &before.heads {
            if !after.heads.contains_key(id) {
                continue;
            }
            let history = self.heads.get(id).map(|head| &head.history);
            let history = history.or_else(|| self.old.get(id)).expect("of each subvolume");
            let found = World::tree_of(&engine, *id)?;
            let next = after.heads[id];
            let mut outcome = Err(String::new());
            for done in *last..=next.max(*last) {
                outcome = outcome.or_else(|_| history.check(&found, done));
            }
            outcome.map_err(|what| format!("subvolume {id}: {what}"))?;
        }
        World::discard_partial(&engine)?;
        engine.destroy_all().map_err(show)?;
        engine.close().map_err(show)?;
        self.check(&devices, "after replay")
    }
}
