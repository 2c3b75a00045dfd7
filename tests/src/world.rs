//! A pool in memory that is in use: what is mounted, and the model that does the same.
//!
//! A story goes on in both, step by step, while a test does something to the pool. In the end both
//! show the same, and the check is content.

use crate::device::{refs, several, RamDevice};
use crate::fault::script;
use crate::gen::{Op, Options};
use crate::model::Model;
use crate::platform::{Spawn, TestPlatform};
use crate::run::{compare, Runner};
use crate::subject::{Pool, Subject as _};
use crate::tree::Tree;
use fs_core::engine::Engine;
use fs_core::error::Error;
use fs_core::vfs::{AccessTime, Filesystem, Volume};
use std::sync::Arc;

/// See the module.
pub struct World {
    /// How the pool is made and opened.
    pub pool: Pool,
    /// Its devices, and others.
    pub rams: Vec<Arc<RamDevice>>,
    /// Its surroundings.
    pub platform: TestPlatform,
    /// What it is compared with.
    pub model: Arc<Model>,
    /// What is mounted.
    pub volume: Option<Arc<Volume>>,
    /// The story.
    pub ops: Vec<Op>,
    /// The step that comes next.
    pub next: usize,
}

impl World {
    /// A new pool on devices of `device_bytes` that has seen the first half of a story of so many
    /// steps, with reads in it or not.
    pub fn new(pool: &Pool, seed: u64, device_bytes: u64, steps: usize, reads: bool) -> World {
        let options = Options { sync_percent: 25, reads, remount_permille: 0, ..Options::CRASH };
        let platform = TestPlatform::new(seed, Spawn::AtOnce);
        let rams = several(pool.devices(), device_bytes);
        pool.format(&refs(&rams), &platform.platform()).unwrap();
        let mut ops = script(seed, steps, options, device_bytes).ops;
        ops.retain(|op| !matches!(op, Op::Tick | Op::DropCaches));
        let mut world = World {
            pool: pool.clone(),
            rams,
            platform,
            model: Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock)),
            volume: None,
            ops,
            next: 0,
        };
        world.open().unwrap();
        world.tell(steps / 2);
        world.volume().sync().unwrap();
        world
    }

    /// Mounts the pool.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn open(&mut self) -> Result<(), Error> {
        let core = self.platform.platform();
        let open = &self.pool.open;
        let volume = Volume::open(refs(&self.rams), core, open, AccessTime::Relative)?;
        self.model.remount();
        self.volume = Some(volume);
        Ok(())
    }

    /// Unmounts it.
    pub fn close(&mut self) {
        self.volume.take().unwrap().close().unwrap();
    }

    /// Unmounts it and mounts it again.
    pub fn remount(&mut self) {
        self.close();
        self.open().unwrap();
    }

    /// What is mounted.
    pub fn volume(&self) -> &Arc<Volume> {
        self.volume.as_ref().unwrap()
    }

    /// The engine below.
    pub fn engine(&self) -> &Arc<Engine> {
        self.volume().engine()
    }

    /// Goes on with the story.
    pub fn tell(&mut self, count: usize) {
        let mut expected = Runner::new(self.model.clone());
        let mut found = Runner::new(self.volume().clone() as Arc<dyn Filesystem>);
        let end = (self.next + count).min(self.ops.len());
        for op in &self.ops[self.next..end] {
            let (want, got) = (expected.run(op), found.run(op));
            if let Op::Seek { .. } = op {
                // What is a hole is the filesystem's choice.
                let compared = compare(&expected, &self.model.state(), op, &want, &got);
                compared.unwrap_or_else(|what| panic!("{op:?}: {what}"));
                continue;
            }
            let (want, got) = (want.result, got.result);
            assert_eq!(want.is_ok(), got.is_ok(), "{op:?}: {:?}", got.err());
        }
        self.next = end;
    }

    /// Lets what works in the background go on.
    pub fn let_time_pass(&self) {
        self.platform.clock.advance_ms(300);
        self.platform.workers.tick();
        self.engine().store.pool.check().unwrap();
    }

    /// Everything is as it should be, seen from outside.
    pub fn judge(mut self, what: &str) {
        self.tell(usize::MAX / 2);
        let found = Tree::read(&**self.volume()).unwrap();
        let want = Tree::of_state(&self.model.state());
        assert_eq!(want.difference(&found), None, "{what}");
        self.close();
        let findings = self.pool.check(&refs(&self.rams), &self.platform.platform()).unwrap();
        assert_eq!(findings, Vec::<String>::new(), "{what}");
    }
}
