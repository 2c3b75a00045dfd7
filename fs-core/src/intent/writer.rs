//! Appending frames.

use super::{LogStore, LIVE_BYTES_MAX, SEGMENTS_MAX};
use crate::buf::Buf;
use crate::error::Error;
use crate::format::log::{
    checked_part, frame_bytes, FrameHeader, FRAME_MAGIC, PAYLOAD_BYTES_MAX, SEGMENT_BYTES_MAX,
};
use crate::format::space::Run;
use crate::format::superblock::LogStart;
use crate::format::DiskField;
use crate::platform::Result;
use crate::units::{Logical, Txg, SECTOR_BYTES};
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// The end of a log, where frames are added.
///
/// After an error the log is as long as it was, or longer by an empty frame: the same frame, or
/// another, may be appended again.
#[derive(Debug)]
pub struct LogWriter {
    pool_id: [u8; 16],
    position: Option<LogStart>,
    /// Segments that have not been released, oldest first; the last is that of `position`.
    segments: VecDeque<(Run, Txg)>,
    /// A segment that was allocated but not named by a frame yet.
    spare: Option<(Run, Txg)>,
}

impl LogWriter {
    /// A writer that goes on at `start`, or that has no log yet.
    pub fn new(pool_id: [u8; 16], start: Option<LogStart>) -> LogWriter {
        let segments = start.iter().map(|start| (start.segment, Txg(0))).collect();
        LogWriter { pool_id, position: start, segments, spare: None }
    }

    /// Makes sure that frames can be appended, beginning a log in a new segment when there is none,
    /// and returns the position, which the superblock of group `txg` must then name: no frame
    /// counts before that is published.
    ///
    /// # Errors
    /// What allocating a segment gives.
    pub fn begin(&mut self, store: &dyn LogStore, txg: Txg) -> Result<LogStart> {
        if let Ok(position) = self.started() {
            return Ok(position);
        }
        let (segment, taken) = self.next_segment(store)?;
        let chain = first_chain(store, &self.pool_id, txg, segment.addr);
        let position = LogStart { segment, offset: 0, sequence: 1, chain };
        self.enter(segment, taken);
        self.position = Some(position);
        Ok(position)
    }

    /// Longest payload that [`append`](LogWriter::append) takes.
    pub fn max_payload(store: &dyn LogStore) -> usize {
        // A frame, and the sector that every segment keeps.
        let frame = store.segment_bytes_min().saturating_sub(SECTOR_BYTES);
        let payload = frame.saturating_sub(FrameHeader::BYTES as u64);
        payload.min(u64::from(PAYLOAD_BYTES_MAX)) as usize
    }

    /// Writes one frame that holds `payload`: `count` encoded records. It is durable after a flush.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when the log has reached its bounds; [`Error::Argument`] for a payload
    /// that is too long and for a log that has not begun; what the store gives.
    pub fn append(&mut self, store: &dyn LogStore, payload: &[u8], count: u32) -> Result<()> {
        if payload.len() > LogWriter::max_payload(store) {
            return Err(Error::Argument { what: "payload too long for a log frame" });
        }
        let mut position = self.started()?;
        let bytes = frame_bytes(payload.len() as u32);
        if bytes > room(&position) {
            let next = self.next_segment(store)?;
            self.write(store, &position, &[], 0, Some(next))?;
            position = self.started()?;
        }
        let next = match bytes + SECTOR_BYTES <= room(&position) {
            true => None,
            false => Some(self.next_segment(store)?),
        };
        self.write(store, &position, payload, count, next)
    }

    /// The position, which has room for an empty frame at least.
    fn started(&self) -> Result<LogStart> {
        let usable = self.position.filter(|position| room(position) >= SECTOR_BYTES);
        usable.ok_or(Error::Argument { what: "the log has not begun" })
    }

    /// The position the next frame will have.
    pub fn position(&self) -> Option<LogStart> {
        self.position
    }

    /// The segments that are in use, oldest first, and one that will be.
    pub fn segments(&self) -> Vec<Run> {
        self.segments.iter().chain(&self.spare).map(|(run, _)| *run).collect()
    }

    /// Gives up the segments that lie wholly before `start`, a position this writer had once, and
    /// that were taken for group `upto` or an older one; returns them. They may be used again as
    /// soon as a superblock is published that names `start` or a later position.
    pub fn release_before(&mut self, start: &LogStart, upto: Txg) -> Vec<Run> {
        let known = self.segments.iter().any(|(segment, _)| *segment == start.segment);
        let is_over = |(run, taken): &(Run, Txg)| *run != start.segment && *taken <= upto;
        let count = self.segments.iter().take_while(|segment| known && is_over(segment)).count();
        self.segments.drain(..count).map(|(run, _)| run).collect()
    }

    /// Builds a frame, writes it, and moves on.
    fn write(
        &mut self,
        store: &dyn LogStore,
        position: &LogStart,
        payload: &[u8],
        count: u32,
        next: Option<(Run, Txg)>,
    ) -> Result<()> {
        let corrupt = |what| Error::Corrupt { what, addr: position.segment.addr };
        let sequence =
            position.sequence.checked_add(1).ok_or(corrupt("log at its last sequence number"))?;
        let at = position.segment.addr.checked_add(position.offset);
        let at = at.ok_or(corrupt("log segment out of range"))?;
        let payload_bytes = payload.len() as u32;
        let bytes = frame_bytes(payload_bytes);
        let mut head = FrameHeader {
            magic: FRAME_MAGIC,
            checksum: [0; 32],
            pool_id: self.pool_id,
            sequence: position.sequence,
            payload_bytes,
            record_count: count,
            next_segment: next.map_or(0, |(run, _)| run.addr.0),
            next_segment_bytes: next.map_or(0, |(run, _)| run.bytes),
            chain: position.chain,
            reserved: [0; 8],
        };
        let mut frame = Buf::zeroed(bytes as usize)?;
        frame[FrameHeader::BYTES..][..payload.len()].copy_from_slice(payload);
        head.put(&mut frame[..FrameHeader::BYTES]);
        head.checksum = store.blake3(checked_part(&frame, payload_bytes));
        head.put(&mut frame[..FrameHeader::BYTES]);
        store.write(at, frame.into_slice())?;

        let (segment, offset) = match next {
            Some((segment, _)) => (segment, 0),
            None => (position.segment, position.offset + bytes),
        };
        if let Some((segment, taken)) = next {
            self.enter(segment, taken);
        }
        self.position = Some(LogStart { segment, offset, sequence, chain: head.checksum });
        Ok(())
    }

    /// The segment to go on in: allocated once, kept until a frame names it.
    fn next_segment(&mut self, store: &dyn LogStore) -> Result<(Run, Txg)> {
        if let Some(spare) = self.spare {
            return Ok(spare);
        }
        let live: u64 = self.segments.iter().map(|(segment, _)| segment.bytes).sum();
        if self.segments.len() >= SEGMENTS_MAX || live > LIVE_BYTES_MAX - SEGMENT_BYTES_MAX {
            return Err(Error::NoSpace);
        }
        let (run, taken) = store.allocate_segment()?;
        assert!(
            run.bytes >= store.segment_bytes_min()
                && run.bytes <= SEGMENT_BYTES_MAX
                && run.addr != Logical(0),
            "{run:?} cannot be a log segment"
        );
        debug_assert!(self.segments.back().is_none_or(|(_, before)| *before <= taken));
        self.spare = Some((run, taken));
        Ok((run, taken))
    }

    fn enter(&mut self, segment: Run, taken: Txg) {
        self.segments.push_back((segment, taken));
        self.spare = None;
    }
}

/// Bytes from a position to the end of its segment.
pub(super) fn room(position: &LogStart) -> u64 {
    position.segment.bytes.saturating_sub(position.offset)
}

/// No two logs of a pool are first published by the same group, so no two begin alike.
fn first_chain(store: &dyn LogStore, pool_id: &[u8; 16], txg: Txg, segment: Logical) -> [u8; 32] {
    let mut seed = [0; 48];
    seed[..16].copy_from_slice(b"cairn log begins");
    seed[16..32].copy_from_slice(pool_id);
    txg.0.put(&mut seed[32..40]);
    segment.0.put(&mut seed[40..]);
    store.blake3(&seed)
}
