//! What a crash may leave.
//!
//! - The namespace (names, types, links, attributes) is that of one moment: at or after the last
//!   `fsync` or `sync` that returned, at or before the operation that was under way.
//! - A file's size, and each 4 KiB block of it, is from some moment at or after the file was last
//!   synced (or renamed, as of the namespace that is seen): never garbage, never another file's,
//!   and never what had been cut off or punched out by then.

use crate::gen::{Op, Target};
use crate::model::content::PAGE;
use crate::model::{Content, State};
use crate::run::Runner;
use crate::tree::{show, File, Tree};
use fs_core::platform::Timestamp;
use std::collections::BTreeMap;

/// What an operation made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// All names and attributes, and the data of one inode.
    Inode(u64),
    /// The data of one inode.
    Data(u64),
    /// The data of these files, as soon as the new names are.
    Renamed(Vec<u64>),
}

impl Effect {
    /// The effect of an operation that succeeded. `runner` runs on the model; `before` is its state
    /// before the operation.
    pub fn of(op: &Op, runner: &Runner, before: &State) -> Effect {
        match op {
            Op::Sync => Effect::All,
            Op::Fsync { target, data_only } => {
                let ino = match target {
                    Target::Path(path) => before.resolve(path),
                    Target::Slot(slot) => runner.slot(*slot).map(|ino| ino.0),
                };
                match (ino, data_only) {
                    (None, _) => Effect::None,
                    (Some(ino), false) => Effect::Inode(ino),
                    (Some(ino), true) => Effect::Data(ino),
                }
            }
            Op::Rename { from, to, flags, .. } => {
                let (source, target) = (before.resolve(from), before.resolve(to));
                if source == target {
                    return Effect::None;
                }
                let target = target.filter(|_| flags.exchange);
                Effect::Renamed(source.into_iter().chain(target).collect())
            }
            _ => Effect::None,
        }
    }

    fn makes_names_durable(&self) -> bool {
        matches!(self, Effect::All | Effect::Inode(_))
    }

    fn makes_data_durable(&self, ino: u64) -> bool {
        match self {
            Effect::All => true,
            Effect::Inode(synced) | Effect::Data(synced) => *synced == ino,
            Effect::None | Effect::Renamed(_) => false,
        }
    }

    fn renames(&self, ino: u64) -> bool {
        matches!(self, Effect::Renamed(inos) if inos.contains(&ino))
    }
}

struct Point {
    state: State,
    tree: Tree,
    effect: Effect,
    times: Times,
    /// A file that the operation changed in several steps, each atomic, all together not.
    stepwise: Option<u64>,
}

/// Modification times as the subject showed them, by the model's inode numbers.
pub type Times = BTreeMap<u64, Timestamp>;

/// What there was after each operation.
pub struct History {
    points: Vec<Point>,
}

impl History {
    /// Begins with a state that is durable.
    pub fn new(state: State) -> History {
        let mut history = History { points: Vec::new() };
        history.push(state, Effect::All, Times::new());
        history
    }

    /// Adds the state after one more operation. Returns the operation's number, from 1.
    pub fn push(&mut self, state: State, effect: Effect, times: Times) -> u64 {
        let tree = Tree::of_state(&state);
        self.points.push(Point { state, tree, effect, times, stepwise: None });
        self.points.len() as u64 - 1
    }

    /// Number of the last operation.
    pub fn last(&self) -> u64 {
        self.points.len() as u64 - 1
    }

    /// The last operation changed that file in several steps, and any of them may have been the
    /// last of a group. What a crash leaves of the file is not looked at until it is durable again.
    pub fn in_steps(&mut self, ino: u64) {
        self.points.last_mut().expect("an operation").stepwise = Some(ino);
    }

    /// Whether `found` may be what a crash leaves after operation `done` returned, and before the
    /// one after the next began.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, found: &Tree, done: u64) -> Result<(), String> {
        let done = done as usize;
        let last = (done + 1).min(self.points.len() - 1);
        let durable = |p: &Point| p.effect.makes_names_durable();
        let first = self.points[..=done].iter().rposition(durable).expect("the first point is");
        let mut reason = None;
        for moment in (first..=last).rev() {
            let point = &self.points[moment];
            let outcome = match point.tree.namespace_difference(found) {
                Some(difference) => Err(format!("as of operation {moment}: {difference}")),
                None => self.check_files(found, moment, done, last),
            };
            match outcome {
                Ok(()) => return Ok(()),
                // A moment whose names match says more than one whose names do not.
                Err(e) if reason.is_none() || !e.starts_with("as of") => reason = Some(e),
                Err(_) => {}
            }
        }
        let reason = reason.expect("there is at least one moment");
        Err(format!("no moment from operation {first} to {last} fits: {reason}"))
    }

    fn check_files(
        &self,
        found: &Tree,
        moment: usize,
        done: usize,
        last: usize,
    ) -> Result<(), String> {
        let tree = &self.points[moment].tree;
        for (path, identity) in &tree.names {
            let file = &found.files[*identity];
            let ino = tree.files[*identity].ino;
            let all = |p: &Point| p.effect == Effect::All || p.effect == Effect::Inode(ino);
            let whole = self.points[..=done].iter().rposition(all).unwrap_or(0);
            if self.points[whole + 1..=last].iter().any(|p| p.stepwise == Some(ino)) {
                continue;
            }
            self.check_time(ino, file, moment, done, last)
                .map_err(|e| format!("{}: {e}", show(path)))?;
            let Some(content) = &file.content else { continue };
            let synced = |p: &Point| p.effect.makes_data_durable(ino);
            let renamed = |p: &Point| p.effect.renames(ino);
            let synced = self.points[..=done].iter().rposition(synced).unwrap_or(0);
            let renamed = self.points[..=moment].iter().rposition(renamed).unwrap_or(0);
            let from = synced.max(renamed);
            self.check_content(ino, content, from, last)
                .map_err(|e| format!("{} (durable as of operation {from}): {e}", show(path)))?;
        }
        Ok(())
    }

    /// A file's modification time goes with its data; that of anything else with the namespace.
    fn check_time(
        &self,
        ino: u64,
        found: &File,
        moment: usize,
        done: usize,
        last: usize,
    ) -> Result<(), String> {
        let attributes = |p: &Point| match p.effect {
            Effect::All => true,
            Effect::Inode(synced) => synced == ino,
            _ => false,
        };
        let (from, last) = match found.content {
            Some(_) => {
                let synced = self.points[..=done].iter().rposition(attributes);
                (synced.unwrap_or(0), last)
            }
            None => (moment, moment),
        };
        let mut times =
            self.points[from..=last].iter().filter_map(|p| p.times.get(&ino)).peekable();
        // Times of the first moment are not known.
        if from == 0 || times.peek().is_none() || times.any(|time| *time == found.mtime) {
            return Ok(());
        }
        Err(format!("modification time {:?} is not from operation {from} to {last}", found.mtime))
    }

    fn check_content(
        &self,
        ino: u64,
        found: &Content,
        from: usize,
        last: usize,
    ) -> Result<(), String> {
        let past: Vec<&Content> = self.points[from..=last]
            .iter()
            .filter_map(|p| p.state.nodes.get(&ino).and_then(|node| node.content()))
            .collect();
        if !past.iter().any(|content| content.size() == found.size()) {
            return Err(format!("size {} was never its size", found.size()));
        }
        let blocks = found.size().div_ceil(PAGE);
        let written = |content: &Content| content.pages().collect::<Vec<_>>();
        let mut pages: Vec<u64> = past.iter().flat_map(|c| written(c)).collect();
        pages.extend(found.pages());
        pages.sort_unstable();
        pages.dedup();
        for page in pages.into_iter().filter(|page| *page < blocks) {
            let len = (found.size() - page * PAGE).min(PAGE) as usize;
            let bytes = &found.page(page)[..len];
            if !past.iter().any(|content| &content.page(page)[..len] == bytes) {
                let what = self.origin(bytes, page);
                return Err(format!("block {page} was never like this: {what}"));
            }
        }
        Ok(())
    }

    /// Where else a block's content was seen, for the message.
    fn origin(&self, bytes: &[u8], page: u64) -> String {
        if bytes.iter().all(|b| *b == 0) {
            return "zeros".into();
        }
        let mut seen = BTreeMap::new();
        for (moment, point) in self.points.iter().enumerate() {
            for (ino, node) in &point.state.nodes {
                let Some(content) = node.content() else { continue };
                for other in content.pages() {
                    if content.page(other)[..bytes.len()] == *bytes {
                        seen.entry((*ino, other)).or_insert(moment);
                    }
                }
            }
        }
        match seen.iter().min_by_key(|((_, other), _)| *other != page) {
            Some(((ino, other), moment)) => {
                format!("block {other} of inode {ino} was, at operation {moment}")
            }
            None => format!("garbage {:02x?}", &bytes[..bytes.len().min(16)]),
        }
    }
}

#[cfg(test)]
mod tests;
