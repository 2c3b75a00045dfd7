//! What an older group lacks: overwritten since, or damaged.
//!
//! A block of an older group that has no good copy was given up by a younger group and its place
//! used again, or it is still in use and damaged. Only the newest group can tell: what that names
//! as well, with the same checksum and in the same place, was never given up. So what has no good
//! copy is put aside while an older group is checked, and judged in the end, for which the trees of
//! the newest group are read if there is anything to judge.
//!
//! Of the newest group itself nothing is put aside: all that it lacks is damage.

use super::findings::{rules, Rule};
use super::{Checker, Spot};
use crate::engine::past::{find_named, padded, Suspect};
use crate::error::Error;
use crate::platform::{DeviceRef, Platform, Result};
use crate::units::Logical;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Places that are judged at most; bounds memory.
const SUSPECTS_MAX: usize = 1 << 16;

/// What is missing of an older group.
#[derive(Default)]
pub(super) struct Aside {
    /// What would be reported if it were damage.
    missing: Vec<Missing>,
    /// Each place with the number of what it is a part of.
    suspects: Vec<(Suspect, usize)>,
    /// What there was no room for.
    more: u64,
}

struct Missing {
    rule: &'static Rule,
    spot: Spot,
    detail: String,
}

impl Checker<'_> {
    /// Reports that something has no good copy, or puts it aside. `places` are those that are bad:
    /// the address of a block or sector, with its checksum.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub(super) fn report_missing(
        &mut self,
        rule: &'static Rule,
        spot: Spot,
        detail: String,
        places: &mut dyn Iterator<Item = (Logical, &[u8])>,
    ) -> Result<()> {
        let Some(aside) = &mut self.aside else {
            self.findings.add(rule, spot, detail);
            return Ok(());
        };
        if aside.suspects.len() >= SUSPECTS_MAX {
            aside.more += 1;
            return Ok(());
        }
        let number = aside.missing.len();
        for (addr, sum) in places {
            let suspect = Suspect { addr, sum: padded(sum), is_named: false };
            super::push(&mut aside.suspects, (suspect, number))?;
        }
        super::push(&mut aside.missing, Missing { rule, spot, detail })
    }

    /// As [`Checker::report_missing`], of a block that `error` kept from being read; an error that
    /// says nothing about the pool is passed on.
    ///
    /// # Errors
    /// [`Error::Memory`] and the like.
    pub(super) fn report_block(
        &mut self,
        spot: Spot,
        error: &Error,
        (addr, sum): (Logical, &[u8]),
    ) -> Result<()> {
        if !error.is_damage() {
            return Err(error.clone());
        }
        let places = &mut core::iter::once((addr, sum));
        self.report_missing(&rules::BLOCK, spot, error.to_string(), places)
    }

    /// Judges what was put aside.
    ///
    /// # Errors
    /// [`Error::Memory`] and the like.
    #[inline(never)]
    pub(super) fn judge(&mut self, devices: Vec<DeviceRef>, platform: &Platform) -> Result<()> {
        let Some(Aside { missing, suspects, more }) = self.aside.take() else {
            return Ok(());
        };
        if missing.is_empty() {
            return Ok(());
        }
        // By numbers: sorting what is larger takes more than a kernel's stack has.
        let mut order = Vec::new();
        order.try_reserve_exact(suspects.len()).map_err(|_| Error::Memory)?;
        order.extend(suspects.iter().map(|(suspect, _)| suspect.addr.0).zip(0..suspects.len()));
        order.sort_unstable();
        let mut sorted = Vec::new();
        sorted.try_reserve_exact(suspects.len()).map_err(|_| Error::Memory)?;
        sorted.extend(order.iter().map(|(_, at)| suspects[*at].0));
        let is_sure = find_named(devices, platform, self.pool, &mut sorted)?;
        let mut is_damaged = Vec::new();
        is_damaged.try_reserve_exact(missing.len()).map_err(|_| Error::Memory)?;
        is_damaged.resize(missing.len(), false);
        for (judged, (_, at)) in sorted.iter().zip(&order) {
            is_damaged[suspects[*at].1] |= judged.is_named;
        }
        for (Missing { rule, spot, detail }, is_damaged) in missing.into_iter().zip(is_damaged) {
            match (is_damaged, is_sure) {
                (true, _) => self.findings.add(rule, spot, detail),
                (false, true) => self.findings.add(&rules::OVERWRITTEN, spot, detail),
                (false, false) => {
                    let doubt = "or it was given up since: not all of the newest group can be read";
                    self.findings.add(rule, spot, format!("{detail}; {doubt}"));
                }
            }
        }
        if more > 0 {
            let detail = format!("{more} more places were not looked at");
            self.findings.add(&rules::INCOMPLETE, Spot::NONE, detail);
        }
        Ok(())
    }
}
