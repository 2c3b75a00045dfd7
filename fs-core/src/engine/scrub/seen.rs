//! A set of addresses that a scrub remembers, of bounded size.

use crate::format::space::Run;
use alloc::collections::BTreeMap;

/// Runs that are remembered at most.
const SEEN_MAX: usize = 65536;

/// Parts of the address space: begin and end of each. They do not touch.
#[derive(Default)]
pub(super) struct Seen {
    runs: BTreeMap<u64, u64>,
}

impl Seen {
    /// Whether all of a run was added.
    pub(super) fn covers(&self, run: Run) -> bool {
        let before = self.runs.range(..=run.addr.0).next_back();
        before.is_some_and(|(_, end)| *end >= run.end().0)
    }

    /// Whether something of a run was added.
    pub(super) fn touches(&self, run: Run) -> bool {
        let before = self.runs.range(..run.end().0).next_back();
        before.is_some_and(|(_, end)| *end > run.addr.0)
    }

    /// Adds a run. False when that was too much to remember, and it was not added.
    pub(super) fn add(&mut self, run: Run) -> bool {
        let (mut start, mut end) = (run.addr.0, run.end().0);
        while let Some((first, last)) =
            self.runs.range(..=end).next_back().map(|(first, last)| (*first, *last))
        {
            if last < start {
                break;
            }
            self.runs.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        let has_room = self.runs.len() < SEEN_MAX;
        if has_room {
            self.runs.insert(start, end);
        }
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Logical;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_seen_is_what_was_added(
            added in proptest::collection::vec((0u64..40, 1u64..8), 0..20),
            asked in (0u64..40, 1u64..8),
        ) {
            let mut seen = Seen::default();
            let mut want = [false; 64];
            for (addr, bytes) in added {
                assert!(seen.add(Run { addr: Logical(addr), bytes }));
                want[addr as usize..(addr + bytes) as usize].fill(true);
            }
            let ends: Vec<(u64, u64)> = seen.runs.iter().map(|(a, b)| (*a, *b)).collect();
            prop_assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0));
            let run = Run { addr: Logical(asked.0), bytes: asked.1 };
            let all = want[asked.0 as usize..(asked.0 + asked.1) as usize].iter().all(|b| *b);
            prop_assert_eq!(seen.covers(run), all);
            let any = want[asked.0 as usize..(asked.0 + asked.1) as usize].iter().any(|b| *b);
            prop_assert_eq!(seen.touches(run), any);
        }
    }
}
