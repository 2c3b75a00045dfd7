//! Snapshots that are sent and received, within one pool: in parts, with commits in between, and
//! with crashes at any moment.
//!
//! What is received is hidden until it is whole; whatever the moment, there is a hidden subvolume
//! with its name, or the snapshot, which shows what was sent.

use super::{show, Properties, World};
use crate::history::History;
use crate::model::Model;
use crate::tree::Tree;
use fs_core::engine::versions::VersionOp;
use fs_core::error::Error;
use fs_core::platform::{Result, Timestamp};
use fs_core::receive::{content_of, position, Destination, Receiver};
use fs_core::stream::record::{Mark, Record};
use fs_core::stream::send::{Parent, Sender, Shipment};
use std::sync::Arc;

/// A snapshot that was received.
#[derive(Clone, Copy)]
pub(super) struct Received {
    /// What it is a copy of.
    source: u64,
    /// Its subvolume.
    into: u64,
}

/// What goes where.
struct Way {
    source: u64,
    base: Option<u64>,
    to: Destination,
    name: Vec<u8>,
}

impl World {
    /// How many snapshots were received.
    pub fn received(&self) -> usize {
        self.received.len()
    }

    /// Sends a snapshot and receives it: all of it into a new subvolume, or what it has beyond one
    /// that was received before.
    pub(super) fn replicate(&mut self, source: u64) -> std::result::Result<(), String> {
        let lineage =
            |id: u64| self.engine.open_version(id).map(|snapshot| snapshot.view().tree.id);
        let known = self.received.iter().filter(|known| {
            let is_there = self.snapshots.contains_key(&known.source) && known.source != source;
            is_there
                && self.heads.contains_key(&known.into)
                && lineage(known.source) == lineage(source)
        });
        let known: Vec<Received> = known.copied().collect();
        let after =
            (!known.is_empty() && self.extra.chance(2, 3)).then(|| *self.extra.pick(&known));
        let name = self.name();
        let way = match after {
            Some(Received { source: base, into }) => {
                let to = Destination::Existing(into);
                Way { source, base: Some(base), to, name }
            }
            None if self.heads.len() >= 5 => return Ok(()),
            None => Way { source, base: None, to: Destination::New(name.clone()), name },
        };
        self.log.push(format!("replicate {source} after {:?} to {:?}", way.base, way.to));
        let mut resumes = None;
        for part in 0..3 {
            let stop = match part {
                2 => usize::MAX,
                _ => self.extra.below(60) as usize,
            };
            match self.receive_part(&way, resumes, stop)? {
                Some(next) => resumes = Some(next),
                None => break,
            }
        }
        Ok(())
    }

    /// Receives so many records. Returns where to go on; nothing when it is over.
    fn receive_part(
        &mut self,
        way: &Way,
        resumes: Option<Mark>,
        stop: usize,
    ) -> std::result::Result<Option<Mark>, String> {
        let engine = self.engine.clone();
        let state = self.snapshots[&way.source].1.clone();
        let sent = (engine.open_version(way.source)).map_err(show)?;
        let old = way.base.map(|base| engine.open_version(base)).transpose().map_err(show)?;
        let content = content_of(&engine, way.source, &mut |_| Ok(())).map_err(show)?;
        let parent = match (way.base, &old) {
            (Some(base), Some(old)) => Some(Parent {
                id: old.item().id,
                identity: content_of(&engine, base, &mut |_| Ok(())).map_err(show)?.identity(),
                tree: old.view().tree,
            }),
            _ => None,
        };
        let item = sent.item();
        let shipment = Shipment {
            id: item.id,
            created: Timestamp { secs: item.created, nanos: 0 },
            name: &way.name,
            below: b"",
            properties: None,
            tree: sent.view().tree,
            tree_bytes: item.tree_bytes,
            content: &content,
            base: parent,
            is_followed: false,
            resumes,
        };
        let mut sender = Sender::new(&engine.store, &shipment);
        let Some(Record::Begin(begin)) = sender.next_record().map_err(show)? else {
            return Err("a stream begins with something else".into());
        };
        let mut receiver = match Receiver::begin(&engine, &way.to, &begin, &mut |_| Ok(())) {
            // What it would go on from was deleted where it was received.
            Err(Error::Argument { .. }) if way.base.is_some() && resumes.is_none() => {
                return Ok(None)
            }
            Err(Error::NoSpace) => return Ok(None),
            other => other.map_err(show)?,
        };
        let working = receiver.working();
        self.note_working(working)?;
        let mut taken = 0;
        let outcome = loop {
            let record = match sender.next_record() {
                Ok(Some(record)) if taken < stop => record,
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            };
            if let Err(error) = receiver.take(record, taken as u64) {
                break Err(error);
            }
            taken += 1;
            match self.extra.below(24) {
                0 => engine.commit().map_err(show)?,
                1 => engine.tick(),
                _ => {}
            }
        };
        if outcome.is_ok() && taken == stop {
            receiver.pause().map_err(show)?;
            return position(&engine, working).map(Some).map_err(show);
        }
        let published = outcome.and_then(|()| self.publish(receiver, way, working, state));
        match published {
            Ok(()) => Ok(None),
            Err(Error::NoSpace) => {
                // It is deleted, here or by who found that out.
                if engine.with_versions(|versions| versions.is_receiving(working)) {
                    self.change(VersionOp::Delete { id: working })?;
                }
                self.labels.remove(&working);
                self.all_durable()?;
                self.remember();
                Ok(None)
            }
            Err(error) => Err(show(error)),
        }
    }

    /// There is a hidden subvolume, if there was none before.
    fn note_working(&mut self, working: u64) -> std::result::Result<(), String> {
        if self.labels.contains_key(&working) {
            return Ok(());
        }
        let label = self.engine.with_versions(|versions| {
            let version = versions.get(working)?;
            let properties: Properties = (version.item.settings(), version.user.clone());
            Some((version.name.clone(), Vec::new(), properties))
        });
        self.labels.insert(working, label.ok_or("what is received is nowhere")?);
        self.all_durable()?;
        self.remember();
        Ok(())
    }

    /// All was received.
    fn publish(
        &mut self,
        receiver: Receiver,
        way: &Way,
        working: u64,
        state: crate::model::State,
    ) -> Result<()> {
        let arrival = receiver.finish(&mut |_| Ok(()))?;
        let into = arrival.into;
        let made = self.engine.change_versions(vec![VersionOp::Publish(*arrival)])?;
        let id = made[0];
        let (name, holds, properties) = match into == working {
            true => self.labels[&working].clone(),
            false => self.labels.remove(&working).expect("it was noted"),
        };
        self.labels.insert(id, (way.name.clone(), holds, properties));
        debug_assert!(into != working || name == way.name);
        self.trees.insert(id, Arc::new(Tree::of_state(&state)));
        self.snapshots.insert(id, (into, state.clone()));
        if into == working {
            let model = Arc::new(Model::from_state(state, self.clock.clone()));
            model.remount();
            let history = History::new(model.state());
            self.mount(into, model, history).expect("it can be mounted");
        }
        self.received.push(Received { source: way.source, into });
        self.all_durable().expect("it can be looked at");
        self.remember();
        Ok(())
    }

    /// What was being received when the power failed can be deleted.
    pub(super) fn discard_partial(
        engine: &fs_core::engine::Engine,
    ) -> std::result::Result<(), String> {
        let partial: Vec<u64> = engine.with_versions(|versions| {
            let all = versions.iter().map(|(id, _)| id);
            all.filter(|id| versions.is_receiving(*id)).collect()
        });
        for id in partial {
            position(engine, id).map_err(show)?;
            engine.change_versions(vec![VersionOp::Delete { id }]).map_err(show)?;
        }
        Ok(())
    }
}
