//! Dead lists in the middle of a group: those of their tree under what the group has changed of
//! them. See `format::dead`.
//!
//! All changes of a group, whoever makes them, are collected in one [`Lists`] and applied to the
//! tree once. Steps that may turn out not to be possible are taken back with [`Lists::undo`].

use crate::btree::{Edit, NodeSource, Tree, Value};
use crate::error::Error;
use crate::format::dead::{birth_and_part, key, DeadHeader, DeadRef, Part, PART_ENTRIES};
use crate::format::key::{kind, Key};
use crate::subvol::store::Result;
use crate::units::{TreeId, Txg};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// The dead lists of a pool as a group is making them.
pub struct Lists<'a> {
    source: &'a dyn NodeSource,
    tree: Tree,
    edits: BTreeMap<Key, Edit>,
    /// Bytes of the values in `edits`.
    value_bytes: usize,
    /// What `edits` had for the keys that changed since [`Lists::begin`], the newest last.
    before: Vec<(Key, Option<Edit>)>,
}

fn bad(list: u64, what: &'static str) -> Error {
    Error::BadItem { what, tree: TreeId::DEAD, object: list }
}

fn read(key: Key, value: &[u8]) -> Result<Part> {
    Part::decode(key, value).map_err(|bad| bad.in_item(TreeId::DEAD, key.object))
}

fn place(list: u64, birth: Txg, part: u64) -> Result<Key> {
    key(list, birth, part).ok_or(bad(list, "dead list with too many entries of one birth"))
}

fn header(part: &Part, list: u64) -> Result<DeadHeader> {
    part.header.ok_or(bad(list, "dead list without its head"))
}

fn bytes_of(edit: Option<&Edit>) -> usize {
    match edit {
        Some(Edit::Put(value)) => value.len(),
        _ => 0,
    }
}

/// The first of what is stored under what has changed, in an order in which a key `comes_before`
/// another.
fn first_of<'e>(
    mut stored: impl FnMut() -> Result<Option<(Key, Value)>>,
    changed: impl Iterator<Item = (&'e Key, &'e Edit)>,
    comes_before: fn(&Key, &Key) -> bool,
) -> Result<Option<(Key, Part)>> {
    let mut next = stored()?;
    for (at, edit) in changed {
        match &next {
            Some((key, _)) if comes_before(key, at) => break,
            Some((key, _)) if key == at => next = stored()?,
            _ => {}
        }
        if let Edit::Put(value) = edit {
            return Ok(Some((*at, read(*at, value)?)));
        }
    }
    next.map(|(key, value)| Ok((key, read(key, &value)?))).transpose()
}

/// A sum of entries of a list.
pub struct Sum {
    /// Bytes of those born after `since`.
    pub bytes: u64,
    /// How far it came.
    pub since: Txg,
    /// How many births were looked at.
    pub births: usize,
}

/// Bytes of the runs of entries.
pub fn bytes(refs: &[DeadRef]) -> u64 {
    refs.iter().fold(0, |sum: u64, entry| sum.saturating_add(entry.run.bytes))
}

/// As [`bytes`], of those entries that were born after `since`.
pub fn bytes_after(refs: &[DeadRef], since: Txg) -> u64 {
    let younger = refs.iter().filter(|entry| entry.birth > since);
    younger.fold(0, |sum: u64, entry| sum.saturating_add(entry.run.bytes))
}

impl<'a> Lists<'a> {
    /// The lists of a tree, with nothing changed.
    pub fn new(source: &'a dyn NodeSource, tree: Tree) -> Lists<'a> {
        Lists { source, tree, edits: BTreeMap::new(), value_bytes: 0, before: Vec::new() }
    }

    /// Begins a step that [`Lists::undo`] takes back.
    pub fn begin(&mut self) {
        self.before.clear();
    }

    /// Takes everything back since [`Lists::begin`].
    pub fn undo(&mut self) {
        while let Some((key, edit)) = self.before.pop() {
            let now = match edit {
                Some(edit) => {
                    self.value_bytes += bytes_of(Some(&edit));
                    self.edits.insert(key, edit)
                }
                None => self.edits.remove(&key),
            };
            self.value_bytes -= bytes_of(now.as_ref());
        }
    }

    /// A bound of the nodes that applying all changes writes.
    pub fn nodes_bound(&self) -> u64 {
        self.tree.apply_bound(self.edits.len(), self.value_bytes, self.source.node_bytes())
    }

    /// All changes as a batch for the tree.
    pub fn batch(&self) -> Vec<(Key, Edit)> {
        self.edits.iter().map(|(key, edit)| (*key, edit.clone())).collect()
    }

    fn set(&mut self, key: Key, edit: Edit) {
        self.value_bytes += bytes_of(Some(&edit));
        let old = self.edits.insert(key, edit);
        self.value_bytes -= bytes_of(old.as_ref());
        self.before.push((key, old));
    }

    fn get(&self, at: Key) -> Result<Option<Part>> {
        match self.edits.get(&at) {
            Some(Edit::Put(value)) => read(at, value).map(Some),
            Some(Edit::Delete) => Ok(None),
            None => match self.tree.lookup(self.source, &at)? {
                Some(value) => read(at, &value).map(Some),
                None => Ok(None),
            },
        }
    }

    /// The part with that number, which must be there.
    fn part(&self, at: Key) -> Result<Part> {
        self.get(at)?.ok_or(bad(at.object, "dead list part is missing"))
    }

    /// The first part from a key on.
    fn first_from(&self, from: Key) -> Result<Option<(Key, Part)>> {
        let mut cursor = self.tree.cursor();
        cursor.seek(self.source, &from)?;
        first_of(|| cursor.next(self.source), self.edits.range(from..), Key::lt)
    }

    /// The last part up to a key.
    fn last_upto(&self, to: Key) -> Result<Option<(Key, Part)>> {
        let mut cursor = self.tree.cursor();
        let mut last = Some(cursor.seek_last(self.source, &to)?);
        let stored = || last.take().map_or_else(|| cursor.prev(self.source), Ok);
        first_of(stored, self.edits.range(..=to).rev(), Key::gt)
    }

    /// Adds entries to a list.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn append(&mut self, list: u64, mut refs: Vec<DeadRef>) -> Result<()> {
        refs.sort_unstable();
        for group in refs.chunk_by(|a, b| a.birth == b.birth) {
            self.append_birth(list, group)?;
        }
        Ok(())
    }

    fn append_birth(&mut self, list: u64, mut refs: &[DeadRef]) -> Result<()> {
        let birth = refs[0].birth;
        let at = place(list, birth, 0)?;
        let none = DeadHeader { entries: 0, bytes: 0, last_part: 0, reserved: 0 };
        let mut first = self.get(at)?.unwrap_or(Part { header: Some(none), refs: Vec::new() });
        let mut head = header(&first, list)?;
        head.entries = head.entries.saturating_add(refs.len() as u64);
        head.bytes = head.bytes.saturating_add(bytes(refs));
        let mut fill = |part: &mut Part| {
            let room = PART_ENTRIES.saturating_sub(part.refs.len());
            let (now, later) = refs.split_at(refs.len().min(room));
            part.refs.extend_from_slice(now);
            refs = later;
            !refs.is_empty()
        };
        let goes_on = if head.last_part == 0 {
            fill(&mut first)
        } else {
            let at = place(list, birth, head.last_part)?;
            let mut last = self.part(at)?;
            let goes_on = fill(&mut last);
            self.set(at, Edit::Put(last.encode()));
            goes_on
        };
        let mut more = goes_on;
        while more {
            head.last_part += 1;
            let mut next = Part { header: None, refs: Vec::new() };
            more = fill(&mut next);
            self.set(place(list, birth, head.last_part)?, Edit::Put(next.encode()));
        }
        first.header = Some(head);
        self.set(at, Edit::Put(first.encode()));
        Ok(())
    }

    /// Takes entries born after `since` out of a list, the oldest births first, `most` at most.
    /// Returns whether there are no more.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn take(
        &mut self,
        list: u64,
        since: Txg,
        most: usize,
        taken: &mut Vec<DeadRef>,
    ) -> Result<bool> {
        let mut left = most;
        let mut after = since;
        while let Some((birth, mut first)) = self.next_birth(list, after)? {
            let mut head = header(&first, list)?;
            loop {
                if left == 0 {
                    if head.entries == 0 {
                        let what = "dead list with more entries than it counts";
                        return Err(bad(list, what));
                    }
                    first.header = Some(head);
                    self.set(place(list, birth, 0)?, Edit::Put(first.encode()));
                    return Ok(false);
                }
                let at = place(list, birth, head.last_part)?;
                let mut part = match head.last_part {
                    0 => first.clone(),
                    _ => self.part(at)?,
                };
                let kept = part.refs.len().saturating_sub(left);
                let refs = part.refs.split_off(kept);
                left -= refs.len();
                head.entries = head.entries.saturating_sub(refs.len() as u64);
                head.bytes = head.bytes.saturating_sub(bytes(&refs));
                taken.extend_from_slice(&refs);
                if kept > 0 {
                    match head.last_part {
                        0 => first.refs = part.refs,
                        _ => self.set(at, Edit::Put(part.encode())),
                    }
                    continue;
                }
                self.set(at, Edit::Delete);
                if head.last_part == 0 {
                    break;
                }
                head.last_part -= 1;
            }
            after = birth;
        }
        Ok(true)
    }

    /// Sums up the entries of a list that were born after `to` and not after `from`, the youngest
    /// births first, `most` births at most.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn sum_down(&self, list: u64, from: Txg, to: Txg, most: usize) -> Result<Sum> {
        let mut sum = Sum { bytes: 0, since: from, births: 0 };
        while sum.births < most {
            match self.last_birth(list, sum.since)? {
                Some((birth, bytes)) if birth > to => {
                    sum.bytes = sum.bytes.saturating_add(bytes);
                    sum.since = Txg(birth.0 - 1);
                    sum.births += 1;
                }
                _ => {
                    sum.since = to;
                    break;
                }
            }
        }
        sum.since = sum.since.max(to);
        Ok(sum)
    }

    /// The oldest birth after `after` that a list has entries of, with their first part.
    fn next_birth(&self, list: u64, after: Txg) -> Result<Option<(Txg, Part)>> {
        let from = after.0.checked_add(1).and_then(|birth| key(list, Txg(birth), 0));
        let Some(from) = from else { return Ok(None) };
        let Some((at, first)) = self.first_from(from)? else { return Ok(None) };
        if at.object != list || at.kind != kind::DEAD {
            return Ok(None);
        }
        let (birth, number) = birth_and_part(at);
        if number != 0 {
            return Err(bad(list, "dead list without its head"));
        }
        Ok(Some((birth, first)))
    }

    /// The youngest birth up to `upto` that a list has entries of, with their bytes.
    fn last_birth(&self, list: u64, upto: Txg) -> Result<Option<(Txg, u64)>> {
        let after = upto.0.checked_add(1).and_then(|birth| key(list, Txg(birth), 0));
        // No part has that number.
        let to = match after {
            Some(after) => Key::new(list, kind::DEAD, after.offset - 1),
            None => Key::new(list, kind::DEAD, u64::MAX),
        };
        let Some((at, part)) = self.last_upto(to)? else { return Ok(None) };
        if at.object != list || at.kind != kind::DEAD {
            return Ok(None);
        }
        let (birth, number) = birth_and_part(at);
        let first = match number {
            0 => part,
            _ => self.part(place(list, birth, 0)?)?,
        };
        Ok(Some((birth, header(&first, list)?.bytes)))
    }
}
