//! Sets of byte ranges, kept as few as they can be.

use crate::format::space::Run;
use crate::units::Logical;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

/// A set of addresses as disjoint ranges that do not even touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RunSet {
    /// Start to end.
    runs: BTreeMap<u64, u64>,
    bytes: u64,
}

/// Part of a range was in the set already; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overlap;

/// The addresses of a run.
pub(super) fn span(run: Run) -> Range<u64> {
    run.addr.0..run.end().0
}

impl RunSet {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of ranges.
    pub fn count(&self) -> usize {
        self.runs.len()
    }

    /// Sum of the lengths.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a range that is not empty.
    pub fn insert(&mut self, range: Range<u64>) -> Result<(), Overlap> {
        debug_assert!(range.start < range.end, "empty range {range:?}");
        let Range { mut start, mut end } = range.clone();
        let before = self.runs.range(..=start).next_back().map(|(s, e)| (*s, *e));
        let after = self.runs.range(start..).next().map(|(s, e)| (*s, *e));
        if before.is_some_and(|(_, e)| e > start) || after.is_some_and(|(s, _)| s < end) {
            return Err(Overlap);
        }
        self.bytes += end - start;
        if let Some((s, e)) = before.filter(|(_, e)| *e == start) {
            debug_assert!(e == range.start);
            start = s;
        }
        if let Some((s, e)) = after.filter(|(s, _)| *s == end) {
            self.runs.remove(&s);
            end = e;
        }
        self.runs.insert(start, end);
        Ok(())
    }

    /// Adds every range of `other`.
    pub fn merge(&mut self, other: RunSet) -> Result<(), Overlap> {
        if self.is_empty() {
            *self = other;
            return Ok(());
        }
        other.iter().try_for_each(|range| self.insert(range))
    }

    /// Takes out the first range.
    pub fn pop_first(&mut self) -> Option<Range<u64>> {
        let (start, end) = self.runs.pop_first()?;
        self.bytes -= end - start;
        Some(start..end)
    }

    /// All ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().map(|(start, end)| *start..*end)
    }

    /// The parts of the set that lie in `window`, ascending.
    pub fn within(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.runs.range(..window.start).next_back();
        let first = before.map_or(window.start, |(start, _)| *start);
        self.runs.range(first..window.end.max(first)).filter_map(move |(start, end)| {
            let part = (*start).max(window.start)..(*end).min(window.end);
            (part.start < part.end).then_some(part)
        })
    }

    /// Whether any address of `window` is in the set.
    pub fn touches(&self, window: Range<u64>) -> bool {
        self.within(window).next().is_some()
    }

    /// The addresses that are not in `other`.
    pub fn without(&self, other: &RunSet) -> RunSet {
        let mut left = RunSet::default();
        for range in self.iter() {
            let mut at = range.start;
            for hole in other.within(range.clone()) {
                left.push(at..hole.start);
                at = hole.end;
            }
            left.push(at..range.end);
        }
        left
    }

    fn push(&mut self, range: Range<u64>) {
        if range.start < range.end {
            self.insert(range).expect("parts of disjoint ranges are disjoint");
        }
    }

    /// The set as runs, cut where `cut` says: given an address, the end of what holds it.
    pub fn to_runs(&self, cut: impl Fn(u64) -> u64) -> Vec<Run> {
        let mut runs = Vec::new();
        for range in self.iter() {
            let mut at = range.start;
            while at < range.end {
                let end = cut(at).clamp(at + 1, range.end);
                runs.push(Run { addr: Logical(at), bytes: end - at });
                at = end;
            }
        }
        runs
    }
}
