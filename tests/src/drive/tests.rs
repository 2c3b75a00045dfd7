use super::*;
use crate::model::State;
use crate::subject::ModelSubject;
use fs_core::error::Error;
use fs_core::platform::Platform;
use std::collections::BTreeSet;

fn plan(seed: u64) -> Plan {
    let options = Options { remount_permille: 40, ..Options::MODEL };
    Plan { seed, count: 150, options, compare_every: 50, device_bytes: 16 << 20 }
}

#[test]
fn the_model_agrees_with_itself() {
    for seed in 0..10 {
        if let Err(failure) = run(&ModelSubject::default(), &plan(seed)) {
            panic!("{}", failure.report("the_model_agrees_with_itself", seed));
        }
    }
}

#[test]
fn the_generator_makes_every_operation_succeed_somewhere() {
    let mut names = BTreeSet::new();
    for seed in 0..30 {
        let subject = ModelSubject::default();
        let mut pair = Pair::new(&subject, &plan(seed)).unwrap();
        let mut generator = Generator::new(seed, Options::MODEL);
        for _ in 0..200 {
            let op = generator.next(&pair.model.state());
            if pair.expected.run(&op).result.is_ok() {
                let text = format!("{op:?}");
                names.insert(text.split([' ', '{']).next().unwrap().to_owned());
            }
        }
    }
    let wanted = [
        "CopyRange",
        "DedupeRange",
        "DropCaches",
        "Fallocate",
        "Fsync",
        "Getattr",
        "Getxattr",
        "Hold",
        "Link",
        "Listxattr",
        "Lookup",
        "Mkdir",
        "Mknod",
        "Read",
        "Readdir",
        "Readlink",
        "Release",
        "Remount",
        "Removexattr",
        "Rename",
        "Rmdir",
        "Seek",
        "SetLabel",
        "Setattr",
        "Setxattr",
        "Symlink",
        "Sync",
        "Tick",
        "Tmpfile",
        "Trim",
        "Unlink",
        "Write",
    ];
    assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
}

/// A model that comes back from a remount with something changed.
struct Forgetful {
    inner: ModelSubject,
    harm: fn(&mut State),
}

struct MountedForgetful(Arc<Model>);

impl Subject for Forgetful {
    fn format(&self, devices: &[DeviceRef], platform: &Platform) -> Result<(), Error> {
        self.inner.format(devices, platform)
    }

    fn open(&self, _: &[DeviceRef], platform: &Platform) -> Result<Box<dyn Mounted>, Error> {
        let old = self.inner.model().ok_or(Error::NotCairn)?;
        old.remount();
        let mut state = old.state();
        (self.harm)(&mut state);
        let model = Arc::new(Model::from_state(state, platform.clock.clone()));
        self.inner.set_model(model.clone());
        Ok(Box::new(MountedForgetful(model)))
    }

    fn check(&self, _: &[DeviceRef], _: &Platform) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }
}

impl Mounted for MountedForgetful {
    fn fs(&self) -> Arc<dyn fs_core::vfs::Filesystem> {
        self.0.clone()
    }
    fn drop_caches(&self) {}
    fn tick(&self) {}
    fn close(self: Box<Self>) -> Result<(), Error> {
        Ok(())
    }
}

#[test]
fn a_subject_that_forgets_is_found_out_and_the_story_is_short() {
    let harms: [fn(&mut State); 4] = [
        |state| each_node(state, |node| node.xattrs.clear()),
        |state| each_node(state, |node| node.mode &= !0o022),
        |state| {
            each_node(state, |node| {
                if let crate::model::Kind::File(content) = &mut node.kind {
                    if content.size() > 4096 {
                        content.zero(content.size() - 1, 1);
                    }
                }
            })
        },
        |state| {
            each_node(state, |node| {
                if let crate::model::Kind::Dir { entries, .. } = &mut node.kind {
                    entries.remove(&b"b"[..]);
                }
            })
        },
    ];
    for harm in harms {
        let subject = Forgetful { inner: ModelSubject::default(), harm };
        let failure = (0..20).find_map(|seed| run(&subject, &plan(seed)).err());
        let failure = failure.expect("some list shows it");
        assert!(failure.ops.len() <= 12, "{}", failure.report("", 0));
    }
}

fn each_node(state: &mut State, change: impl Fn(&mut crate::model::Node)) {
    for node in state.nodes.values_mut() {
        change(Arc::make_mut(node));
    }
}
