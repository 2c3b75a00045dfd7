//! Writing to every copy.

use super::map::Place;
use super::Pool;
use crate::buf::Slice;
use crate::device::Member;
use crate::error::Error;
use crate::format::space::Run;
use crate::format::superblock::Superblock;
use crate::platform::{DeviceError, Result, WriteOp};
use crate::sync::{Mutex, MutexGuard};
use crate::units::Logical;
use alloc::vec::Vec;

/// Bytes for one run of logical space.
#[derive(Clone, Debug)]
pub struct RunWrite {
    /// First address.
    pub addr: Logical,
    /// What to write from there on; each a multiple of the sector size.
    pub bufs: Vec<Slice>,
}

impl RunWrite {
    /// The run that is written.
    pub fn run(&self) -> Run {
        Run { addr: self.addr, bytes: self.bufs.iter().map(|buf| buf.len() as u64).sum() }
    }
}

/// Neighbours are joined up to this length: beyond it a larger request is no faster, and a device
/// with several queues does better with several.
const JOINED_BYTES_MAX: u64 = 4 << 20;
/// Pieces of one request; what vectored writes of common platforms take at once.
const JOINED_PIECES_MAX: usize = 1024;

impl Pool {
    /// Writes runs to all their copies. All transfers of one call are handed to all devices
    /// together. Nothing is durable before [`Pool::flush`].
    ///
    /// A device that fails is left behind if the others have a copy of everything; see `standing`.
    ///
    /// # Errors
    /// [`Error::Device`] if some run is not on a device that can be
    /// relied on, although copies may have been written;
    /// [`Error::Unmapped`] for a run that is not within one chunk, in
    /// which case nothing is written; [`Error::ReadOnly`].
    pub fn write(&self, mut writes: Vec<RunWrite>) -> Result<()> {
        self.check_writable()?;
        let map = self.chunk_map();
        // Layouts keep order, so sorting once here makes neighbours meet on the devices.
        writes.sort_unstable_by_key(|write| write.addr);
        let mut batches: Vec<Vec<WriteOp>> = self.members().iter().map(|_| Vec::new()).collect();
        let mut places = Vec::with_capacity(writes.len());
        for write in &writes {
            let place = map.locate(write.run())?;
            self.push(&mut batches, &place, &write.bufs);
            places.push(place);
        }
        self.write_batches(batches)?;
        places.iter().try_for_each(|place| self.check_relied(place))
    }

    /// Adds the writes of a run to the batches of the devices of its copies.
    fn push(&self, batches: &mut [Vec<WriteOp>], place: &Place, bufs: &[Slice]) {
        let mut done = 0;
        for piece in place.pieces() {
            for segment in (0..piece.copies()).map(|copy| piece.segment(copy)) {
                if self.member(segment.device).is_there() {
                    let bufs = cut(bufs, done, segment.bytes);
                    let op = WriteOp { at: segment.at, bufs, result: Ok(()) };
                    batches[usize::from(segment.device)].push(op);
                }
            }
            done += piece.bytes;
        }
        let Some(next) = place.next() else { return };
        let mut done = 0;
        for piece in next.pieces() {
            for segment in (0..piece.copies()).map(|copy| piece.segment(copy)) {
                if !place.is_in(&segment) && self.member(segment.device).is_there() {
                    let bufs = cut(bufs, done, segment.bytes);
                    let op = WriteOp { at: segment.at, bufs, result: Ok(()) };
                    batches[usize::from(segment.device)].push(op);
                }
            }
            done += piece.bytes;
        }
    }

    pub(super) fn write_batches(&self, batches: Vec<Vec<WriteOp>>) -> Result<()> {
        let busy = batches.into_iter().enumerate().filter(|(_, batch)| !batch.is_empty());
        let failed = self.ask_devices(busy.collect(), &|index, batch| {
            self.member(index).write(&mut join(core::mem::take(batch)))
        });
        self.leave_behind(failed)
    }

    /// Whether every piece of a run has a copy on a device that is complete.
    fn check_relied(&self, place: &Place) -> Result<()> {
        if self.members().iter().all(Member::is_complete) {
            return Ok(());
        }
        let next = place.next().filter(|_| place.is_sealed());
        for piece in place.pieces().chain(next.iter().flat_map(Place::pieces)) {
            let mut copies = (0..piece.copies()).map(|copy| piece.segment(copy));
            if !copies.any(|segment| self.member(segment.device).is_complete()) {
                let segment = piece.segment(0);
                return Err(self.member(segment.device).error(segment.at, DeviceError::Gone));
            }
        }
        Ok(())
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// [`Error::Device`]: nothing may be assumed about what was
    /// written since the last flush.
    pub fn flush(&self) -> Result<()> {
        self.check_writable()?;
        let failed = self.flush_all();
        self.leave_behind(failed)
    }

    /// Flushes all devices; returns which failed.
    pub(super) fn flush_all(&self) -> Vec<(u16, Error)> {
        let there = self.members().iter().filter(|member| member.is_there());
        self.flush_some(&there.map(Member::index).collect::<Vec<u16>>())
    }

    /// Flushes devices; returns which failed.
    pub(super) fn flush_some(&self, devices: &[u16]) -> Vec<(u16, Error)> {
        let asked = devices.iter().map(|index| (usize::from(*index), ())).collect();
        // Every device is asked, even after one has failed.
        self.ask_devices(asked, &|index, ()| self.member(index).flush())
    }

    /// Writes the superblock into its slot of every device. The caller flushes before, so that what
    /// it refers to is durable, and after, which publishes it.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::Device`] when a device took it in neither area and cannot be
    /// left behind.
    pub fn write_superblock(&self, superblock: &Superblock) -> Result<()> {
        self.check_writable()?;
        let there = self.members().iter().enumerate().filter(|(_, member)| member.is_there());
        let asked = there.map(|(index, _)| (index, ())).collect();
        let write = |index, (): &mut ()| self.member(index).write_superblock(superblock);
        let failed = self.ask_devices(asked, &write);
        self.leave_behind(failed)
    }

    /// Calls `each` for devices, by index, with what is theirs, for all of them at once.
    pub(super) fn on_devices<T: Send>(
        &self,
        mut work: Vec<(usize, T)>,
        each: &(dyn Fn(u16, &mut T) + Sync),
    ) {
        let index_of = |index: usize| u16::try_from(index).expect("a pool has few devices");
        if let [(index, work)] = &mut work[..] {
            return each(index_of(*index), work);
        }
        // Each slot is taken by exactly one worker; the lock only makes that visible to the
        // compiler.
        let slots: Vec<Mutex<(usize, T)>> = work.into_iter().map(Mutex::new).collect();
        self.platform().workers.parallel_for(slots.len(), &|slot| {
            let (index, work) = &mut *slots[slot].lock();
            each(index_of(*index), work);
        });
    }

    /// As [`Pool::on_devices`]; returns which devices failed, by index, and how.
    fn ask_devices<T: Send>(
        &self,
        work: Vec<(usize, T)>,
        each: &(dyn Fn(u16, &mut T) -> Result<()> + Sync),
    ) -> Vec<(u16, Error)> {
        let failed = Mutex::new(Vec::new());
        self.on_devices(work, &|index, work| {
            if let Err(error) = each(index, work) {
                let mut failed: MutexGuard<'_, Vec<(u16, Error)>> = failed.lock();
                let at = failed.partition_point(|(other, _)| *other < index);
                failed.insert(at, (index, error));
            }
        });
        failed.into_inner()
    }
}

/// The bytes `from..from + len` of the concatenation of `bufs`.
fn cut(bufs: &[Slice], from: u64, len: u64) -> Vec<Slice> {
    let mut pieces = Vec::with_capacity(bufs.len());
    let (mut skip, mut left) = (from as usize, len as usize);
    for buf in bufs {
        let start = skip.min(buf.len());
        skip -= start;
        let take = left.min(buf.len() - start);
        left -= take;
        if take == buf.len() {
            pieces.push(buf.clone());
        } else if take > 0 {
            pieces.push(buf.part(start, take));
        }
    }
    pieces
}

/// Joins writes that follow each other on the device.
fn join(mut batch: Vec<WriteOp>) -> Vec<WriteOp> {
    batch.sort_unstable_by_key(|op| op.at);
    let mut joined: Vec<WriteOp> = Vec::with_capacity(batch.len());
    // Length of the last of `joined`, kept so that joining many pieces stays linear.
    let mut last_bytes = 0;
    for op in batch {
        let bytes = op.len();
        if let Some(last) = joined.last_mut() {
            assert!(last.at.0 + last_bytes <= op.at.0, "two writes overlap at {:?}", op.at);
            if last.at.0 + last_bytes == op.at.0
                && last_bytes + bytes <= JOINED_BYTES_MAX
                && last.bufs.len() + op.bufs.len() <= JOINED_PIECES_MAX
            {
                last.bufs.extend(op.bufs);
                last_bytes += bytes;
                continue;
            }
        }
        last_bytes = bytes;
        joined.push(op);
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::Buf;
    use crate::units::Physical;
    use alloc::vec;
    use proptest::prelude::*;

    fn slice(sectors: usize, tag: u8) -> Slice {
        let mut buf = Buf::zeroed(sectors * 4096).unwrap();
        buf.fill(tag);
        buf.into_slice()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn cutting_keeps_the_bytes(
            lens in proptest::collection::vec(1usize..4, 1..5),
            from in 0usize..8,
            len in 1usize..8,
        ) {
            let total: usize = lens.iter().sum();
            let from = from % total;
            let len = len.min(total - from);
            let bufs: Vec<Slice> =
                lens.iter().enumerate().map(|(tag, len)| slice(*len, tag as u8)).collect();
            let flat =
                |bufs: &[Slice]| bufs.iter().flat_map(|buf| buf.to_vec()).collect::<Vec<u8>>();
            let pieces = cut(&bufs, from as u64 * 4096, len as u64 * 4096);
            prop_assert_eq!(
                flat(&pieces), flat(&bufs)[from * 4096..(from + len) * 4096].to_vec());
        }
    }

    #[test]
    fn neighbours_become_one_request_and_others_stay_apart() {
        let op = |at: u64, tag| WriteOp {
            at: Physical(at * 4096),
            bufs: vec![slice(1, tag)],
            result: Ok(()),
        };
        let joined = join(vec![op(7, 0), op(2, 1), op(3, 2), op(1, 3)]);
        let shape: Vec<(u64, usize)> =
            joined.iter().map(|op| (op.at.0 / 4096, op.bufs.len())).collect();
        assert_eq!(shape, [(1, 3), (7, 1)]);
        assert_eq!(joined[0].bufs[0][0], 3);
    }
}
