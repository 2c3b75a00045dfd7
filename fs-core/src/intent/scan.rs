//! Reading frames back.

use super::writer::room;
use super::{LogStore, LIVE_BYTES_MAX, SEGMENTS_MAX};
use crate::buf::Buf;
use crate::error::Error;
use crate::format::log::{checked_part, frame_bytes, FrameHeader, LogRecord};
use crate::format::space::Run;
use crate::format::superblock::LogStart;
use crate::platform::Result;
use crate::units::{Logical, SECTOR_BYTES};
use alloc::vec::Vec;

/// How much is read at a time.
const WINDOW_BYTES: u64 = 256 << 10;

/// Where a log ends, and what was seen of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanEnd {
    /// Where the next frame would have been.
    pub position: LogStart,
    /// All segments from the start to the end, in order.
    pub segments: Vec<Run>,
    /// Frames that were visited whole.
    pub frames: u64,
    /// Records in these frames.
    pub records: u64,
    /// The log ended because this part of it could not be read. Promises may have been lost.
    pub unreadable: Option<Error>,
}

/// Visits the records of the log in order. It ends, without fuss, at the first frame that is not
/// there whole or is not the successor of the one before; or when `visit` returns false, with the
/// position of the frame that was being visited.
///
/// # Errors
/// Those of `visit`; [`Error::Corrupt`] for a frame that is whole but breaks the format, or a log
/// beyond all bounds: no crash makes those.
pub fn scan(
    store: &dyn LogStore,
    pool_id: [u8; 16],
    start: &LogStart,
    visit: &mut dyn FnMut(LogRecord) -> Result<bool>,
) -> Result<ScanEnd> {
    let mut end = ScanEnd {
        position: *start,
        segments: Vec::from([start.segment]),
        frames: 0,
        records: 0,
        unreadable: None,
    };
    let mut total_bytes = start.segment.bytes;
    let mut window = Window { store, copy: 0, addr: Logical(0), buf: Buf::default() };
    loop {
        let (head, frame) = match next_frame(&mut window, &pool_id, &end.position) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(end),
            Err(error) => return Ok(ScanEnd { unreadable: Some(error), ..end }),
        };
        let payload = &frame[FrameHeader::BYTES..][..head.payload_bytes as usize];
        let addr = end.position.segment.addr;
        if !visit_records(payload, head.record_count, addr, visit)? {
            return Ok(end);
        }
        end.frames += 1;
        end.records += u64::from(head.record_count);
        let (segment, offset) = match head.next() {
            Some(segment) => (segment, 0),
            None => (end.position.segment, end.position.offset + frame_bytes(head.payload_bytes)),
        };
        let corrupt = |what| Error::Corrupt { what, addr };
        let sequence =
            head.sequence.checked_add(1).ok_or(corrupt("log at its last sequence number"))?;
        if head.next().is_some() {
            total_bytes = total_bytes.saturating_add(segment.bytes);
            if end.segments.len() >= SEGMENTS_MAX || total_bytes > LIVE_BYTES_MAX {
                return Err(corrupt("log longer than any log"));
            }
            end.segments.push(segment);
        }
        end.position = LogStart { segment, offset, sequence, chain: head.checksum };
    }
}

/// Shows every frame from `start` up to `end` of which a copy is not whole, or cannot be read:
/// where it is, and what it should be. It ends early, without fuss, where no copy is whole.
///
/// # Errors
/// Those of `visit`; [`Error::Memory`].
pub fn compare_copies(
    store: &dyn LogStore,
    pool_id: [u8; 16],
    start: &LogStart,
    end: &LogStart,
    visit: &mut dyn FnMut(Run, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut position = *start;
    let mut total_bytes = 0;
    let mut window = Window { store, copy: 0, addr: Logical(0), buf: Buf::default() };
    while position != *end && total_bytes <= LIVE_BYTES_MAX {
        let room = room(&position);
        let Some((head, frame)) = next_frame(&mut window, &pool_id, &position)? else { break };
        let frame = Buf::copy_of(frame)?;
        let bytes = frame_bytes(head.payload_bytes);
        let is_lacking = (0..store.copies(position.segment.addr)).any(|copy| {
            window.use_copy(copy);
            !matches!(find_frame(&mut window, &pool_id, &position, room), Ok(Some(_)))
        });
        if is_lacking {
            let addr = Logical(position.segment.addr.0.saturating_add(position.offset));
            visit(Run { addr, bytes }, &frame[..bytes as usize])?;
        }
        let (segment, offset) = match head.next() {
            Some(segment) => (segment, 0),
            None => (position.segment, position.offset + bytes),
        };
        total_bytes += bytes;
        let sequence = head.sequence.saturating_add(1);
        position = LogStart { segment, offset, sequence, chain: head.checksum };
    }
    Ok(())
}

/// The frame at `position`, from the first copy that has it; none when there is something else.
fn next_frame<'w>(
    window: &'w mut Window<'_>,
    pool_id: &[u8; 16],
    position: &LogStart,
) -> Result<Option<(FrameHeader, &'w [u8])>> {
    let room = room(position);
    if room < SECTOR_BYTES {
        return Ok(None);
    }
    let (mut unreadable, mut is_readable) = (None, false);
    for copy in 0..window.store.copies(position.segment.addr).max(1) {
        window.use_copy(copy);
        match find_frame(window, pool_id, position, room) {
            Ok(Some(head)) => {
                let frame = window.get(position, frame_bytes(head.payload_bytes))?;
                return Ok(Some((head, frame)));
            }
            Ok(None) => is_readable = true,
            Err(error) => unreadable = Some(error),
        }
    }
    // Each copy has all that was promised: one that ends here is enough to know.
    match unreadable {
        Some(error) if !is_readable => Err(error),
        _ => Ok(None),
    }
}

/// The head of the frame at `position`, if the copy that is looked at has the whole frame.
fn find_frame(
    window: &mut Window<'_>,
    pool_id: &[u8; 16],
    position: &LogStart,
    room: u64,
) -> Result<Option<FrameHeader>> {
    let Ok(head) = FrameHeader::decode(window.get(position, SECTOR_BYTES)?) else {
        return Ok(None);
    };
    let bytes = frame_bytes(head.payload_bytes);
    let is_next = head.pool_id == *pool_id
        && head.sequence == position.sequence
        && head.chain == position.chain;
    if !is_next || bytes > room {
        return Ok(None);
    }
    let store = window.store;
    let frame = window.get(position, bytes)?;
    let padding = &frame[FrameHeader::BYTES + head.payload_bytes as usize..];
    let is_whole = store.blake3(checked_part(frame, head.payload_bytes)) == head.checksum
        && padding.iter().all(|byte| *byte == 0);
    Ok(is_whole.then_some(head))
}

/// Visits the records of a frame; false when `visit` has had enough.
fn visit_records(
    mut payload: &[u8],
    count: u32,
    addr: Logical,
    visit: &mut dyn FnMut(LogRecord) -> Result<bool>,
) -> Result<bool> {
    for _ in 0..count {
        let (record, bytes) = LogRecord::decode(payload).map_err(|bad| bad.at(addr))?;
        payload = &payload[bytes..];
        if !visit(record)? {
            return Ok(false);
        }
    }
    if !payload.is_empty() {
        return Err(Error::Corrupt { what: "bytes after the last record of a frame", addr });
    }
    Ok(true)
}

/// The part of a segment that was read last.
struct Window<'a> {
    store: &'a dyn LogStore,
    /// The copy that is looked at.
    copy: usize,
    addr: Logical,
    buf: Buf,
}

impl Window<'_> {
    /// Looks at another copy from now on.
    fn use_copy(&mut self, copy: usize) {
        if self.copy != copy {
            (self.copy, self.buf) = (copy, Buf::default());
        }
    }

    /// `bytes` at `position`; the segment has so many there.
    fn get(&mut self, position: &LogStart, bytes: u64) -> Result<&[u8]> {
        let out_of_range =
            Error::Corrupt { what: "log segment out of range", addr: position.segment.addr };
        let at = position.segment.addr.checked_add(position.offset).ok_or(out_of_range)?;
        let start = match self.offset_of(at, bytes) {
            Some(start) => start,
            None => {
                self.fill(at, bytes, room(position))?;
                0
            }
        };
        Ok(&self.buf[start..start + bytes as usize])
    }

    fn offset_of(&self, at: Logical, bytes: u64) -> Option<usize> {
        let start = at.0.checked_sub(self.addr.0)?;
        (start.checked_add(bytes)? <= self.buf.len() as u64).then_some(start as usize)
    }

    /// Reads ahead, at most `room`; when that fails, perhaps for the sake of sectors that nobody
    /// needs, reads only `bytes`.
    fn fill(&mut self, at: Logical, bytes: u64, room: u64) -> Result<()> {
        let ahead = Run { addr: at, bytes: bytes.max(WINDOW_BYTES).min(room) };
        let exact = Run { addr: at, bytes };
        let read = |run| self.store.read(run, self.copy);
        self.buf = read(ahead).or_else(|_| read(exact))?;
        self.addr = at;
        match self.buf.len() as u64 >= bytes {
            true => Ok(()),
            false => Err(Error::Corrupt { what: "log segment cut off", addr: at }),
        }
    }
}
