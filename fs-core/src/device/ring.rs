//! The ring of superblocks.

use super::Member;
use crate::buf::{Buf, Slice};
use crate::error::Error;
use crate::format::label::{ring_slot, RING_OFFSET, RING_SLOTS};
use crate::format::superblock::Superblock;
use crate::format::DiskField;
use crate::platform::{Result, WriteOp};
use crate::units::{Physical, Txg, SECTOR_BYTES};
use alloc::vec;
use alloc::vec::Vec;

const SLOT: usize = SECTOR_BYTES as usize;

/// A superblock that was written whole but cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The group it publishes, as far as its layout is known.
    pub txg: Txg,
    /// Why not.
    pub error: Error,
}

/// What the rings of a pool hold.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    /// Valid superblocks of the pool, newest first, each group once.
    pub valid: Vec<Superblock>,
    /// Superblocks with a right checksum that this build cannot use.
    pub refused: Vec<Refused>,
}

impl Ring {
    /// Adds what both rings of `member` hold. What cannot be read or is torn is left out: the ring
    /// is there for that.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn add(&mut self, member: &Member, pool_id: &[u8; 16]) -> Result<()> {
        for area in member.areas() {
            match member.read_at(Physical(area.0 + RING_OFFSET), SLOT * RING_SLOTS as usize) {
                Ok(buf) => buf.chunks_exact(SLOT).for_each(|slot| self.add_slot(slot, pool_id)),
                Err(Error::Memory) => return Err(Error::Memory),
                // One unreadable sector fails the whole read; the others are wanted all the more.
                Err(_) => {
                    for slot in 0..RING_SLOTS {
                        if let Ok(buf) = member.read_at(ring_slot(area, slot), SLOT) {
                            self.add_slot(&buf, pool_id);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn add_slot(&mut self, bytes: &[u8], pool_id: &[u8; 16]) {
        // Positions of `txg` and `pool_id`; they hold for this version of the format.
        let txg = Txg(u64::get(&bytes[0x28..0x30]));
        match Superblock::decode(bytes) {
            Ok(superblock) if superblock.pool_id == *pool_id => self.insert(superblock),
            Ok(_) | Err(Error::NotCairn) => {}
            Err(error @ Error::Version { .. }) => self.refused.push(Refused { txg, error }),
            Err(error) if bytes[0x38..0x48] == *pool_id => {
                self.refused.push(Refused { txg, error });
            }
            Err(_) => {}
        }
    }

    /// Adds what another ring holds.
    pub fn merge(&mut self, other: &Ring) {
        other.valid.iter().for_each(|superblock| self.insert(superblock.clone()));
        self.refused.extend_from_slice(&other.refused);
    }

    fn insert(&mut self, superblock: Superblock) {
        let at = self.valid.partition_point(|other| other.txg > superblock.txg);
        if self.valid.get(at).is_none_or(|other| other.txg != superblock.txg) {
            self.valid.insert(at, superblock);
        }
    }

    /// The newest group any superblock publishes, usable or not. What is written next must be
    /// newer, or it would lose against what is there.
    pub fn newest(&self) -> Txg {
        self.groups().max().unwrap_or_default()
    }

    /// The groups that superblocks publish, usable or not.
    pub fn groups(&self) -> impl Iterator<Item = Txg> + '_ {
        let refused = self.refused.iter().map(|refused| refused.txg);
        self.valid.iter().map(|valid| valid.txg).chain(refused)
    }

    /// Whether a slot holds one of the valid superblocks.
    fn has(&self, slot: &[u8]) -> bool {
        Superblock::decode(slot).is_ok_and(|superblock| self.valid.contains(&superblock))
    }
}

/// Whether a slot has a superblock that is whole and cannot be used.
fn is_refused(slot: &[u8]) -> bool {
    !matches!(Superblock::decode(slot), Ok(_) | Err(Error::NotCairn))
}

/// The superblock to open: the newest, or that of the group `txg` and no other.
///
/// A superblock that is whole but cannot be used is not passed over for an older one: it is no torn
/// write but the pool's state, and going back behind it would undo commits that were promised. That
/// takes an explicit `txg`.
///
/// # Errors
/// Why it cannot be used; [`Error::NoSuperblock`] when there is none at all, [`Error::NoGroup`]
/// when there is none of that group.
pub fn choose(ring: &Ring, txg: Option<Txg>) -> Result<&Superblock> {
    let is_wanted = |found: Txg| txg.is_none_or(|txg| found == txg);
    let valid = ring.valid.iter().find(|superblock| is_wanted(superblock.txg));
    let refused = ring.refused.iter().filter(|refused| is_wanted(refused.txg));
    match (valid, refused.max_by_key(|refused| refused.txg), txg) {
        (Some(valid), Some(refused), _) if refused.txg > valid.txg => Err(refused.error.clone()),
        (Some(valid), ..) => Ok(valid),
        (None, Some(refused), _) => Err(refused.error.clone()),
        (None, None, Some(txg)) => {
            let others = ring.valid.iter().map(|superblock| superblock.txg).collect();
            Err(Error::NoGroup { txg: Some(txg), cause: None, others })
        }
        (None, None, None) => Err(Error::NoSuperblock),
    }
}

impl Member {
    /// Writes a superblock into its slot of the areas that lack it, durably and one after the
    /// other: an area that cannot be read now may hold the only one.
    ///
    /// # Errors
    /// [`Error::Device`] when neither area has it then; [`Error::Memory`].
    pub fn complete_superblock(&self, superblock: &Superblock) -> Result<()> {
        let slice = Buf::copy_of(&superblock.encode())?.into_slice();
        let (mut outcome, mut is_anywhere) = (Ok(()), false);
        for area in self.areas() {
            let at = ring_slot(area, superblock.txg.0);
            let is_there = match self.read_at(at, SLOT) {
                Err(Error::Memory) => return Err(Error::Memory),
                slot => slot.is_ok_and(|slot| slot[..] == slice[..]),
            };
            if !is_there {
                match self.write_at(at, slice.clone()) {
                    Ok(()) => self.flush()?,
                    Err(error) => {
                        outcome = Err(error);
                        continue;
                    }
                }
            }
            is_anywhere = true;
        }
        match is_anywhere {
            true => Ok(()),
            false => outcome,
        }
    }

    /// Looks whether both areas have the same superblocks, and `newest` among them; with `repair`,
    /// writes what is missing, not yet durably. Of two that differ the newer is right. Returns how
    /// many slots lacked theirs, and how many of these could not be written.
    ///
    /// With `repair`, the caller sees to it that nobody writes a superblock at the same time.
    ///
    /// # Errors
    /// [`Error::Memory`].
    #[inline(never)]
    pub fn mend_superblocks(&self, newest: &Superblock, repair: bool) -> Result<(u64, u64)> {
        let mut own = Ring::default();
        own.add(self, &newest.pool_id)?;
        own.insert(newest.clone());
        let (mut lacking, mut failed) = (0, 0);
        for slot in 0..RING_SLOTS {
            // Newest first.
            let Some(best) = own.valid.iter().find(|s| s.txg.0 % RING_SLOTS == slot) else {
                continue;
            };
            let slice = Buf::copy_of(&best.encode())?.into_slice();
            for area in self.areas() {
                let at = ring_slot(area, slot);
                match self.read_at(at, SLOT) {
                    Err(Error::Memory) => return Err(Error::Memory),
                    // What only a newer build can use stays.
                    Ok(held) if held[..] == slice[..] || is_refused(&held) => continue,
                    Ok(_) if repair => self.count_checksum_error(),
                    _ => {}
                }
                lacking += 1;
                if repair {
                    let outcome = self.write_at(at, slice.clone());
                    self.count_mend(SECTOR_BYTES, outcome.is_ok());
                    failed += u64::from(outcome.is_err());
                }
            }
        }
        Ok((lacking, failed))
    }

    /// Erases what the slots of both areas hold and `known` does not, durably.
    ///
    /// # Errors
    /// [`Error::Device`]; [`Error::Memory`].
    #[inline(never)]
    pub fn erase_superblocks(&self, known: &Ring) -> Result<()> {
        let zeros = Buf::zeroed(SLOT)?.into_slice();
        let mut is_changed = false;
        for area in self.areas() {
            for slot in (0..RING_SLOTS).map(|slot| ring_slot(area, slot)) {
                match self.read_at(slot, SLOT) {
                    Err(Error::Memory) => return Err(Error::Memory),
                    Ok(held) if held.iter().all(|byte| *byte == 0) || known.has(&held) => continue,
                    _ => {}
                }
                self.write_at(slot, zeros.clone())?;
                is_changed = true;
            }
        }
        match is_changed {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// The ring as the first area has it, or the second, where the first cannot be read.
    ///
    /// # Errors
    /// [`Error::Device`]; [`Error::Memory`].
    pub(super) fn ring_to_copy(&self) -> Result<Slice> {
        let mut ring = Buf::zeroed(SLOT * RING_SLOTS as usize)?;
        for (slot, bytes) in (0..RING_SLOTS).zip(ring.chunks_exact_mut(SLOT)) {
            let [first, second] = self.areas().map(|area| ring_slot(area, slot));
            match self.read_at(first, SLOT) {
                Ok(held) if Superblock::decode(&held).is_ok() => bytes.copy_from_slice(&held),
                Err(Error::Memory) => return Err(Error::Memory),
                _ => bytes.copy_from_slice(&self.read_at(second, SLOT)?),
            }
        }
        Ok(ring.into_slice())
    }

    /// Writes a superblock into its slot of both areas. Not durable before a flush.
    ///
    /// One area that cannot be written does not fail the call, since the superblock is found in the
    /// other; the error is counted.
    ///
    /// # Errors
    /// [`Error::Device`] when neither could be written.
    pub fn write_superblock(&self, superblock: &Superblock) -> Result<()> {
        let slice = Buf::copy_of(&superblock.encode())?.into_slice();
        let mut batch = self.areas().map(|area| WriteOp {
            at: ring_slot(area, superblock.txg.0),
            bufs: vec![slice.clone()],
            result: Ok(()),
        });
        let outcome = self.write(&mut batch);
        if batch.iter().any(|op| op.result.is_ok()) {
            return Ok(());
        }
        outcome
    }
}
