//! Writing to every copy.

use super::map::Place;
use super::Pool;
use crate::buf::Slice;
use crate::format::space::Run;
use crate::platform::{Result, WriteOp};
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
    /// Writes runs to all their copies. All transfers of one call are handed to each device
    /// together. Nothing is durable before [`Pool::flush`].
    ///
    /// # Errors
    /// [`Error::Device`](crate::error::Error::Device) if any copy could not be written, although
    /// the others may have been; [`Error::Unmapped`](crate::error::Error::Unmapped) for a run that
    /// is not within one chunk, in which case nothing is written;
    /// [`Error::ReadOnly`](crate::error::Error::ReadOnly).
    pub fn write(&self, mut writes: Vec<RunWrite>) -> Result<()> {
        self.check_writable()?;
        let map = self.chunk_map();
        // Layouts keep order, so sorting once here makes neighbours meet on the devices.
        writes.sort_unstable_by_key(|write| write.addr);
        let mut batches: Vec<Vec<WriteOp>> = self.members().iter().map(|_| Vec::new()).collect();
        for write in &writes {
            let place = map.locate(write.run())?;
            for copy in 0..place.copies() {
                push_copy(&mut batches, &place, copy, &write.bufs);
            }
        }
        self.write_batches(batches)
    }

    /// Writes one copy of a run, for repair.
    pub(super) fn write_copy(&self, place: &Place, copy: usize, content: Slice) -> Result<()> {
        let mut batches: Vec<Vec<WriteOp>> = self.members().iter().map(|_| Vec::new()).collect();
        push_copy(&mut batches, place, copy, &[content]);
        self.write_batches(batches)
    }

    fn write_batches(&self, batches: Vec<Vec<WriteOp>>) -> Result<()> {
        let mut outcome = Ok(());
        for (member, batch) in self.members().iter().zip(batches) {
            if !batch.is_empty() {
                outcome = outcome.and(member.write(&mut join(batch)));
            }
        }
        outcome
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// [`Error::Device`](crate::error::Error::Device): nothing may be assumed about what was
    /// written since the last flush.
    pub fn flush(&self) -> Result<()> {
        self.check_writable()?;
        let mut outcome = Ok(());
        for member in self.members() {
            // Every device is asked, even after one has failed.
            let done = member.flush();
            outcome = outcome.and(done);
        }
        outcome
    }
}

/// Adds the writes of one copy to the batches of its devices.
fn push_copy(batches: &mut [Vec<WriteOp>], place: &Place, copy: usize, bufs: &[Slice]) {
    let mut done = 0;
    place.segments(copy, &mut |segment| {
        let bufs = cut(bufs, done, segment.bytes);
        done += segment.bytes;
        let op = WriteOp { at: segment.at, bufs, result: Ok(()) };
        batches[usize::from(segment.device)].push(op);
    });
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
