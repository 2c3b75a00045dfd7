//! Dead lists in their tree: appending, taking, summing up. See `format::dead`.
//!
//! Functions read a tree and collect edits; nothing is changed until the edits are applied, so what
//! fails has changed nothing.

use crate::btree::{Edit, NodeSource, Tree};
use crate::error::Error;
use crate::format::dead::{birth_and_part, key, DeadHeader, DeadRef, Part, PART_ENTRIES};
use crate::format::key::{kind, Key};
use crate::subvol::store::Result;
use crate::units::{TreeId, Txg};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Edits by key. Two calls for one list and birth must not share them.
pub type Edits = BTreeMap<Key, Edit>;

/// The edits as a batch.
pub fn batch(edits: Edits) -> Vec<(Key, Edit)> {
    edits.into_iter().collect()
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

/// The part with that number.
fn part(source: &dyn NodeSource, tree: &Tree, at: Key) -> Result<Part> {
    let value = tree.lookup(source, &at)?.ok_or(bad(at.object, "dead list part is missing"))?;
    read(at, &value)
}

fn header(part: &Part, list: u64) -> Result<DeadHeader> {
    part.header.ok_or(bad(list, "dead list without its head"))
}

/// Adds entries to a list.
///
/// # Errors
/// Errors of the device or the tree.
pub fn append(
    source: &dyn NodeSource,
    tree: &Tree,
    list: u64,
    mut refs: Vec<DeadRef>,
    edits: &mut Edits,
) -> Result<()> {
    refs.sort_unstable();
    for group in refs.chunk_by(|a, b| a.birth == b.birth) {
        append_birth(source, tree, list, group, edits)?;
    }
    Ok(())
}

fn append_birth(
    source: &dyn NodeSource,
    tree: &Tree,
    list: u64,
    mut refs: &[DeadRef],
    edits: &mut Edits,
) -> Result<()> {
    let birth = refs[0].birth;
    let at = place(list, birth, 0)?;
    let none = DeadHeader { entries: 0, bytes: 0, last_part: 0, reserved: 0 };
    let mut first = match tree.lookup(source, &at)? {
        Some(value) => read(at, &value)?,
        None => Part { header: Some(none), refs: Vec::new() },
    };
    let mut head = header(&first, list)?;
    head.entries = head.entries.saturating_add(refs.len() as u64);
    let more: u64 = refs.iter().map(|entry| entry.run.bytes).sum();
    head.bytes = head.bytes.saturating_add(more);
    let mut fill = |part: &mut Part| {
        let (now, later) = refs.split_at(refs.len().min(PART_ENTRIES - part.refs.len()));
        part.refs.extend_from_slice(now);
        refs = later;
        !refs.is_empty()
    };
    let mut goes_on = true;
    if head.last_part == 0 {
        goes_on = fill(&mut first);
    } else {
        let at = place(list, birth, head.last_part)?;
        let mut last = part(source, tree, at)?;
        goes_on &= fill(&mut last);
        edits.insert(at, Edit::Put(last.encode()));
    }
    while goes_on {
        head.last_part += 1;
        let mut next = Part { header: None, refs: Vec::new() };
        goes_on = fill(&mut next);
        edits.insert(place(list, birth, head.last_part)?, Edit::Put(next.encode()));
    }
    first.header = Some(head);
    edits.insert(at, Edit::Put(first.encode()));
    Ok(())
}

/// Takes entries born after `since` out of a list, the oldest first, whole parts, until there are
/// `enough` of them or no more. Returns whether there are no more.
///
/// # Errors
/// Errors of the device or the tree.
pub fn take(
    source: &dyn NodeSource,
    tree: &Tree,
    list: u64,
    since: Txg,
    enough: usize,
    taken: &mut Vec<DeadRef>,
    edits: &mut Edits,
) -> Result<bool> {
    let mut after = since;
    while let Some((birth, mut first)) = next_birth(source, tree, list, after)? {
        if taken.len() >= enough {
            return Ok(false);
        }
        let mut head = header(&first, list)?;
        loop {
            let at = place(list, birth, head.last_part)?;
            let refs = match head.last_part {
                0 => core::mem::take(&mut first.refs),
                _ => part(source, tree, at)?.refs,
            };
            edits.insert(at, Edit::Delete);
            head.entries = head.entries.saturating_sub(refs.len() as u64);
            let less: u64 = refs.iter().map(|entry| entry.run.bytes).sum();
            head.bytes = head.bytes.saturating_sub(less);
            taken.extend_from_slice(&refs);
            if head.last_part == 0 {
                break;
            }
            head.last_part -= 1;
            if taken.len() >= enough {
                if head.entries == 0 {
                    return Err(bad(list, "dead list with fewer entries than it counts"));
                }
                first.header = Some(head);
                edits.insert(place(list, birth, 0)?, Edit::Put(first.encode()));
                return Ok(false);
            }
        }
        after = birth;
    }
    Ok(true)
}

/// Bytes of the entries of a list that were born after `since` and not after `until`.
///
/// # Errors
/// Errors of the device or the tree.
pub fn sum(source: &dyn NodeSource, tree: &Tree, list: u64, since: Txg, until: Txg) -> Result<u64> {
    let (mut total, mut after) = (0u64, since);
    while let Some((birth, first)) = next_birth(source, tree, list, after)? {
        if birth > until {
            break;
        }
        total = total.saturating_add(header(&first, list)?.bytes);
        after = birth;
    }
    Ok(total)
}

/// The oldest birth after `after` that a list has entries of, with their first part.
fn next_birth(
    source: &dyn NodeSource,
    tree: &Tree,
    list: u64,
    after: Txg,
) -> Result<Option<(Txg, Part)>> {
    let Some(from) = key(list, after.next(), 0) else { return Ok(None) };
    let Some((at, value)) = tree.first_from(source, &from)? else { return Ok(None) };
    if at.object != list || at.kind != kind::DEAD {
        return Ok(None);
    }
    let (birth, number) = birth_and_part(at);
    let first = read(at, &value)?;
    if number != 0 {
        return Err(bad(list, "dead list without its head"));
    }
    Ok(Some((birth, first)))
}
