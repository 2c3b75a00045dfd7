//! Where on the devices findings are.

use super::findings::Place;
use super::{push, Finding};
use crate::error::Error;
use crate::platform::Result;
use crate::pool::Pool;
use crate::units::{align_down, Logical, Physical, SECTOR_BYTES};
use alloc::vec::Vec;

/// Adds to each finding with an address where it lies: the copy it is about, or every copy. An
/// address in no chunk lies nowhere.
///
/// # Errors
/// [`Error::Memory`].
pub(super) fn add(pool: &Pool, findings: &mut [Finding]) -> Result<()> {
    for finding in findings {
        let spots = match (finding.spot.copy, finding.spot.addr) {
            (Some(copy), _) => Vec::from([copy]),
            (None, Some(addr)) => copies(pool, addr)?,
            (None, None) => continue,
        };
        for (device, at) in spots {
            let name = pool
                .members()
                .get(usize::from(device))
                .map_or_else(alloc::string::String::new, |member| member.name());
            push(&mut finding.places, Place { device, name, at })?;
        }
    }
    Ok(())
}

/// The first byte of every copy of what is at `addr`.
fn copies(pool: &Pool, addr: Logical) -> Result<Vec<(u16, Physical)>> {
    // A forged address need not be that of a sector.
    let sector = Logical(align_down(addr.0, SECTOR_BYTES));
    match pool.map(sector, SECTOR_BYTES) {
        Ok(copies) => Ok(copies.into_iter().flatten().collect()),
        Err(Error::Unmapped { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
