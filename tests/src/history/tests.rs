use super::*;
use crate::model::Model;
use crate::platform::VirtualClock;
use fs_core::units::Ino;
use fs_core::vfs::{Caller, Filesystem, RenameFlags, SetAttr};
use std::sync::Arc;

const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0 };

struct Story {
    model: Model,
    history: History,
}

impl Story {
    fn new() -> Story {
        let model = Model::new(Arc::new(VirtualClock::default()));
        let history = History::new(model.state());
        Story { model, history }
    }

    fn file(&mut self, name: &[u8]) -> Ino {
        let ino = self.model.mknod(self.model.root(), name, 0o100644, 0, &CALLER).unwrap().ino;
        self.then(Effect::None);
        ino
    }

    fn write(&mut self, ino: Ino, offset: u64, fill: u8, len: usize) {
        self.model.write(ino, offset, &vec![fill; len], Default::default()).unwrap();
        self.then(Effect::None);
    }

    fn then(&mut self, effect: Effect) -> u64 {
        self.history.push(self.model.state(), effect, Times::new())
    }

    /// As `then`, with times that matter.
    fn then_timed(&mut self, effect: Effect) {
        let state = self.model.state();
        let times = state.nodes.iter().map(|(ino, node)| (*ino, node.mtime)).collect();
        self.history.push(state, effect, times);
    }

    fn rename(&mut self, from: &[u8], to: &[u8], ino: Ino) {
        let root = self.model.root();
        self.model.rename(root, from, root, to, RenameFlags::default(), &CALLER).unwrap();
        self.then(Effect::Renamed(vec![ino.0]));
    }

    /// Whether what `other` shows may be left when the last operation had returned.
    fn allows(&self, other: &Model) -> bool {
        self.check(&Tree::of_state(&other.state()))
    }

    fn check(&self, found: &Tree) -> bool {
        let done = self.history.points.len() as u64 - 1;
        self.history.check(found, done).is_ok()
    }
}

/// A model in which `f` exists with that content.
fn with_file(name: &[u8], content: &[(u64, u8, usize)]) -> Model {
    let mut story = Story::new();
    let ino = story.file(name);
    for (offset, fill, len) in content {
        story.write(ino, *offset, *fill, *len);
    }
    story.model
}

#[test]
fn what_was_not_synced_may_be_lost_and_what_was_may_not() {
    let mut story = Story::new();
    let ino = story.file(b"f");
    story.write(ino, 0, 1, 8192);
    assert!(story.allows(&Story::new().model));
    assert!(story.allows(&with_file(b"f", &[])));
    story.then(Effect::Inode(ino.0));
    assert!(!story.allows(&Story::new().model));
    assert!(!story.allows(&with_file(b"f", &[])));
    assert!(story.allows(&with_file(b"f", &[(0, 1, 8192)])));
}

#[test]
fn a_block_may_be_old_or_new_but_not_a_mixture() {
    let mut story = Story::new();
    let ino = story.file(b"f");
    story.write(ino, 0, 1, 8192);
    story.then(Effect::Inode(ino.0));
    story.write(ino, 0, 2, 8192);
    assert!(story.allows(&with_file(b"f", &[(0, 1, 8192), (4096, 2, 4096)])));
    assert!(!story.allows(&with_file(b"f", &[(0, 1, 8192), (0, 2, 2048)])));
    assert!(!story.allows(&with_file(b"f", &[(0, 3, 8192)])));
    assert!(!story.allows(&with_file(b"f", &[(0, 1, 8191)])));
}

#[test]
fn what_was_cut_off_does_not_come_back_once_that_is_durable() {
    let mut story = Story::new();
    let ino = story.file(b"f");
    story.write(ino, 0, 1, 8192);
    story.then(Effect::Inode(ino.0));
    let cut = SetAttr { size: Some(100), ..SetAttr::default() };
    story.model.setattr(ino, &cut, &CALLER).unwrap();
    story.then(Effect::None);
    let long = with_file(b"f", &[(0, 1, 8192)]);
    assert!(story.allows(&long));
    story.then(Effect::Data(ino.0));
    assert!(!story.allows(&long));
    story.model.setattr(ino, &SetAttr { size: Some(8192), ..cut }, &CALLER).unwrap();
    story.then(Effect::None);
    assert!(!story.allows(&long));
    assert!(story.allows(&with_file(b"f", &[(0, 1, 100), (8191, 0, 1)])));
}

#[test]
fn the_namespace_is_that_of_one_moment() {
    let mut story = Story::new();
    let a = story.file(b"a");
    story.file(b"b");
    story.then(Effect::All);
    story.rename(b"a", b"c", a);
    story.file(b"d");
    let names = |names: &[&[u8]]| {
        let mut story = Story::new();
        for name in names {
            story.file(name);
        }
        story.model
    };
    assert!(story.allows(&names(&[b"a", b"b"])));
    assert!(story.allows(&names(&[b"b", b"c"])));
    assert!(story.allows(&names(&[b"b", b"c", b"d"])));
    // The rename is seen by neither name, by both, or comes after what followed it.
    assert!(!story.allows(&names(&[b"b"])));
    assert!(!story.allows(&names(&[b"a", b"b", b"c"])));
    assert!(!story.allows(&names(&[b"a", b"b", b"d"])));
}

#[test]
fn a_renamed_file_comes_with_the_data_it_had() {
    let mut story = Story::new();
    let target = story.file(b"target");
    story.write(target, 0, 1, 4096);
    story.then(Effect::All);
    let fresh = story.file(b"fresh");
    story.write(fresh, 0, 2, 4096);
    story.rename(b"fresh", b"target", fresh);
    assert!(story.allows(&with_file(b"target", &[(0, 1, 4096)])));
    assert!(story.allows(&with_file(b"target", &[(0, 2, 4096)])));
    assert!(!story.allows(&with_file(b"target", &[])));
}

#[test]
fn a_synced_time_does_not_go_back() {
    let mut story = Story::new();
    let ino = story.file(b"f");
    story.write(ino, 0, 1, 100);
    story.then_timed(Effect::None);
    let early = Tree::of_state(&story.model.state());
    story.write(ino, 0, 1, 100);
    story.then_timed(Effect::Data(ino.0));
    assert!(story.check(&early));
    story.then_timed(Effect::Inode(ino.0));
    assert!(!story.check(&early));
    assert!(story.check(&Tree::of_state(&story.model.state())));
}
