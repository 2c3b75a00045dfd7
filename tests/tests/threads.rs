//! Several programs at once, each in its own directory, next to a model of its own. What they share
//! is everything below: groups, the log, space, caches. Nothing here can be repeated exactly; what
//! fails says what is wrong, and running it often makes it likely.

use cairn_tests::device::{refs, RamDevice};
use cairn_tests::drive::seeds;
use cairn_tests::gen::{Generator, Op, Options};
use cairn_tests::model::Model;
use cairn_tests::platform::{Spawn, TestPlatform};
use cairn_tests::run::{compare, describe, is_left_open, Runner};
use cairn_tests::subject::{Pool, Subject};
use cairn_tests::tree::Tree;
use fs_core::platform::Platform;
use fs_core::testing::ThreadWorkers;
use fs_core::vfs::{Caller, Filesystem};
use std::sync::Arc;

const THREADS: u64 = 4;
const OPTIONS: Options = Options { sync_percent: 12, remount_permille: 0, ..Options::MODEL };
const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0 };

fn name(thread: u64) -> Vec<u8> {
    format!("thread {thread}").into_bytes()
}

/// One program; returns its model.
fn program(fs: Arc<dyn Filesystem>, seed: u64, thread: u64) -> Result<Arc<Model>, String> {
    let model = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
    // What the generator sees: the same, but with the directory as its root.
    let inner = Arc::new(Model::new(TestPlatform::new(0, Spawn::AtOnce).clock));
    model.mkdir(model.root(), &name(thread), 0o755, &CALLER).map_err(|e| e.to_string())?;
    let (mut expected, mut found) = (Runner::new(model.clone()), Runner::new(fs));
    let mut seen = Runner::new(inner.clone());
    let mut generator = Generator::new(seed * THREADS + thread, OPTIONS);
    for index in 0..300 {
        let op = generator.next(&inner.state());
        let below = op.clone().below(&name(thread));
        // The name of the pool belongs to all.
        if matches!(op, Op::SetLabel { .. })
            || names_the_root(&op)
            || is_left_open(&expected, &model.state(), &below)
        {
            continue;
        }
        seen.run(&op);
        let want = expected.run(&below);
        let got = found.run(&below);
        if let Some(damage) = found.damage.take() {
            return Err(format!("operation {index}, {}: {damage}", describe(&below)));
        }
        compare(&expected, &model.state(), &below, &want, &got)
            .map_err(|e| format!("operation {index}, {}: {e}", describe(&below)))?;
    }
    Ok(model)
}

/// Whether an operation does to the root what can be done to the directory that stands for it.
fn names_the_root(op: &Op) -> bool {
    match op {
        Op::Unlink { path } | Op::Rmdir { path } | Op::Hold { path, .. } => path.is_empty(),
        Op::Rename { from, to, .. } => from.is_empty() || to.is_empty(),
        _ => false,
    }
}

fn platform(test: &TestPlatform) -> Platform {
    Platform { workers: Arc::new(ThreadWorkers { threads: 2 }), ..test.platform() }
}

#[test]
fn programs_do_not_disturb_each_other() {
    for seed in seeds(6, 300) {
        let subject = if seed % 2 == 0 { Pool::default() } else { Pool::cramped() };
        let devices = refs(&[RamDevice::new("ram", 96 << 20)]);
        let test = TestPlatform::new(seed, Spawn::AtOnce);
        let core = platform(&test);
        let told = || format!("seed {seed}, reported {:?}", test.incidents.take());
        subject.format(&devices, &core).unwrap();
        let mounted = subject.open(&devices, &core).unwrap();
        let fs = mounted.fs();
        for thread in 0..THREADS {
            let made = fs.mkdir(fs.root(), &name(thread), 0o755, &CALLER).unwrap();
            fs.forget(made.ino, 1);
        }
        let models: Vec<_> = std::thread::scope(|scope| {
            let start = |thread| {
                let fs = fs.clone();
                scope.spawn(move || program(fs, seed, thread))
            };
            let running: Vec<_> = (0..THREADS).map(start).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let models: Vec<_> =
            models.into_iter().map(|m| m.unwrap_or_else(|e| panic!("{e}; {}", told()))).collect();
        let look = |when: &str, fs: &dyn Filesystem| {
            let found = Tree::read(fs).unwrap_or_else(|e| panic!("seed {seed}, {when}: {e}"));
            for (thread, model) in models.iter().enumerate() {
                let dir = name(thread as u64);
                let expected = Tree::of_state(&model.state()).below(&dir);
                if let Some(difference) = expected.difference(&found.below(&dir)) {
                    panic!("seed {seed}, {when}: {difference}");
                }
            }
        };
        look("at the end", &*fs);
        drop(fs);
        mounted.close().unwrap();
        let findings = subject.check(&devices, &core).unwrap();
        assert!(findings.is_empty(), "seed {seed}: {}", findings.join("\n"));
        let mounted = subject.open(&devices, &core).unwrap();
        look("opened again", &*mounted.fs());
        mounted.close().unwrap();
    }
}
