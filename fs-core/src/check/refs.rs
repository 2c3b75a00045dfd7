//! The reference tree, compared with the references that were met.
//!
//! Every reference to data marks its sectors. What is marked a second time is noted as an *extra*
//! run; so the list is as long as there is sharing, and the number of extra runs over a sector is
//! the number that the reference tree must have for it.

use super::findings::rules;
use super::{push, show, tree, Checker, Spot};
use crate::format::key::kind;
use crate::format::space::{RefItem, Run};
use crate::platform::Result;
use crate::units::{Logical, TreeId};
use alloc::format;
use alloc::vec::Vec;

/// A run with that many references beyond the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Counted {
    run: Run,
    extra: u64,
}

/// Reads the reference tree.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
#[inline(never)]
pub(super) fn load(checker: &mut Checker<'_>) -> Result<Vec<Counted>> {
    let mut counted: Vec<Counted> = Vec::new();
    let refs = tree(TreeId::REFS, checker.superblock.refs_root);
    checker.each_item(&refs, &mut |checker, key, value, _| {
        let spot = Spot::object(TreeId::REFS, key.object);
        if (key.kind, key.offset) != (kind::REF, 0) {
            checker.findings.add(&rules::ITEM_KIND, spot, format!("{key:?}"));
            return Ok(());
        }
        let addr = Logical(key.object);
        let item =
            RefItem::decode(addr, value).map_err(|bad| bad.in_item(TreeId::REFS, key.object))?;
        if counted.last().is_some_and(|last| last.run.end() > addr) {
            checker.findings.add(&rules::REF_OVERLAP, spot, "");
            return Ok(());
        }
        push(&mut counted, Counted { run: Run { addr, bytes: item.bytes }, extra: item.extra })
    })?;
    Ok(counted)
}

/// Compares what is counted with what was met.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
#[inline(never)]
pub(super) fn compare(checker: &mut Checker<'_>, counted: &[Counted]) -> Result<()> {
    let mut extra = core::mem::take(&mut checker.extra);
    let met = overlay(&mut extra)?;
    for difference in differences(&met, counted)? {
        let (run, met, counted) = difference;
        let detail = format!("{}: {counted} counted beyond the first, {met} met", show(run));
        checker.findings.add(&rules::REF_COUNT, Spot::addr(run.addr), detail);
    }
    Ok(())
}

/// Runs that may overlap, as runs that do not with how many there are over each.
fn overlay(runs: &mut [Run]) -> Result<Vec<Counted>> {
    let mut edges: Vec<(u64, bool)> = Vec::new();
    for run in runs.iter() {
        push(&mut edges, (run.addr.0, true))?;
        push(&mut edges, (run.end().0, false))?;
    }
    edges.sort_unstable();
    let mut counted: Vec<Counted> = Vec::new();
    let (mut depth, mut from) = (0u64, 0);
    for (at, begins) in edges {
        if depth > 0 && at > from {
            let run = Run { addr: Logical(from), bytes: at - from };
            match counted.last_mut() {
                Some(last) if last.run.end().0 == from && last.extra == depth => {
                    last.run.bytes += run.bytes;
                }
                _ => push(&mut counted, Counted { run, extra: depth })?,
            }
        }
        // Ends sort before beginnings at one place, but the depth there is read only once.
        depth = if begins { depth + 1 } else { depth - 1 };
        from = at;
    }
    Ok(counted)
}

/// Where two lists differ: the run, what the first says, what the second says. Both lists are
/// sorted and do not overlap within themselves.
fn differences(first: &[Counted], second: &[Counted]) -> Result<Vec<(Run, u64, u64)>> {
    let mut edges: Vec<u64> = Vec::new();
    for counted in first.iter().chain(second) {
        push(&mut edges, counted.run.addr.0)?;
        push(&mut edges, counted.run.end().0)?;
    }
    edges.sort_unstable();
    edges.dedup();
    let (mut a, mut b) = (0, 0);
    let mut out: Vec<(Run, u64, u64)> = Vec::new();
    for edge in edges.windows(2) {
        let run = Run { addr: Logical(edge[0]), bytes: edge[1] - edge[0] };
        let (x, y) = (extra_at(first, &mut a, edge[0]), extra_at(second, &mut b, edge[0]));
        if x != y {
            push(&mut out, (run, x, y))?;
        }
    }
    Ok(out)
}

/// The count at an address; addresses ascend from call to call.
fn extra_at(list: &[Counted], index: &mut usize, addr: u64) -> u64 {
    while list.get(*index).is_some_and(|counted| counted.run.end().0 <= addr) {
        *index += 1;
    }
    match list.get(*index) {
        Some(counted) if counted.run.addr.0 <= addr => counted.extra,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(sector: u64, count: u64) -> Run {
        Run { addr: Logical(sector * 4096), bytes: count * 4096 }
    }

    fn counted(sector: u64, count: u64, extra: u64) -> Counted {
        Counted { run: run(sector, count), extra }
    }

    #[test]
    fn overlapping_runs_add_up() {
        let mut runs = [run(0, 4), run(2, 4), run(2, 2), run(6, 1), run(9, 1)];
        let expected = [counted(0, 2, 1), counted(2, 2, 3), counted(4, 3, 1), counted(9, 1, 1)];
        assert_eq!(overlay(&mut runs).unwrap(), expected);
    }

    #[test]
    fn only_differences_of_counts_matter_not_where_items_are_cut() {
        let whole = [counted(0, 4, 2)];
        let cut = [counted(0, 1, 2), counted(1, 3, 2)];
        assert_eq!(differences(&whole, &cut).unwrap(), []);
        let other = [counted(0, 1, 2), counted(2, 3, 2)];
        assert_eq!(differences(&whole, &other).unwrap(), [(run(1, 1), 2, 0), (run(4, 1), 0, 2)]);
    }
}
