//! Logs in memory: what was appended comes back, up to the first damage and no further.

use super::*;
use crate::error::Error;
use crate::format::key::{kind, Key};
use crate::format::log::{
    frame_bytes, FrameHeader, LogRecord, RangeContent, Record, SEGMENT_BYTES_MAX,
};
use crate::format::superblock::LogStart;
use crate::format::DiskField;
use crate::sync::Mutex;
use crate::units::{Ino, TreeId, Txg, SECTOR_BYTES};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use proptest::prelude::*;

const POOL_ID: [u8; 16] = *b"a pool with logs";
const BASE: u64 = 1 << 20;

/// Segments of one length in memory, filled with what was there before.
struct Memory {
    segment_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: BTreeMap<u64, Vec<u8>>,
    free: Vec<Run>,
    next: u64,
    writes: Vec<Run>,
    fail_writes: bool,
    unreadable: Option<u64>,
    /// What the first of two copies has in place of what was written, and where.
    first_copy: Option<(u64, u8)>,
}

impl Memory {
    fn new(segment_bytes: u64) -> Memory {
        Memory { segment_bytes, state: Mutex::new(State { next: BASE, ..State::default() }) }
    }

    fn with<T>(&self, at: u64, change: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut state = self.state.lock();
        let (start, segment) = state.bytes.range_mut(..=at).next_back().unwrap();
        change(&mut segment[(at - start) as usize..])
    }

    fn last_write(&self) -> Run {
        *self.state.lock().writes.last().unwrap()
    }
}

impl LogStore for Memory {
    fn copies(&self, _addr: Logical) -> usize {
        1 + usize::from(self.state.lock().first_copy.is_some())
    }
    fn read(&self, run: Run, copy: usize) -> Result<Buf> {
        let bad = self.state.lock().unreadable;
        if bad.is_some_and(|bad| (run.addr.0..run.end().0).contains(&bad)) {
            return Err(Error::Unmapped { addr: run.addr });
        }
        let mut buf = self.with(run.addr.0, |bytes| Buf::copy_of(&bytes[..run.bytes as usize]))?;
        let damage = self.state.lock().first_copy.filter(|_| copy == 0);
        if let Some((at, byte)) = damage.filter(|(at, _)| (run.addr.0..run.end().0).contains(at)) {
            buf[(at - run.addr.0) as usize] = byte;
        }
        Ok(buf)
    }
    fn write(&self, at: Logical, buf: Slice) -> Result<()> {
        if self.state.lock().fail_writes {
            return Err(Error::Failed);
        }
        self.with(at.0, |bytes| bytes[..buf.len()].copy_from_slice(&buf));
        self.state.lock().writes.push(Run { addr: at, bytes: buf.len() as u64 });
        Ok(())
    }
    fn allocate_segment(&self) -> Result<(Run, Txg)> {
        let mut state = self.state.lock();
        if let Some(run) = state.free.pop() {
            return Ok((run, Txg(1)));
        }
        let run = Run { addr: Logical(state.next), bytes: self.segment_bytes };
        state.next += self.segment_bytes;
        let stale = (0..self.segment_bytes).map(|i| (i % 251) as u8).collect();
        state.bytes.insert(run.addr.0, stale);
        Ok((run, Txg(1)))
    }
    fn segment_bytes_min(&self) -> u64 {
        self.segment_bytes
    }
}

fn record(n: u64, len: usize) -> LogRecord {
    let content = RangeContent::Bytes(alloc::vec![n as u8; len * SECTOR_BYTES as usize]);
    let record = match len {
        0 => Record::Item { key: Key::new(n, kind::INODE, 0), value: None, keep_size: false },
        _ => Record::Range { ino: Ino(n), offset: 0, len: len as u64 * SECTOR_BYTES, content },
    };
    LogRecord { txg: Txg(1 + n), tree: TreeId(256), record }
}

fn payload(records: &[LogRecord]) -> Vec<u8> {
    let mut payload = Vec::new();
    records.iter().for_each(|record| record.encode_to(&mut payload));
    payload
}

fn append(log: &mut LogWriter, store: &Memory, records: &[LogRecord]) {
    log.append(store, &payload(records), records.len() as u32).unwrap();
}

fn replay(store: &Memory, start: &LogStart) -> (Vec<LogRecord>, ScanEnd) {
    let mut seen = Vec::new();
    let end = scan(store, POOL_ID, start, &mut |record| {
        seen.push(record);
        Ok(true)
    });
    (seen, end.unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn replay_gives_back_what_was_appended_from_any_position(
        frames in proptest::collection::vec(proptest::collection::vec(0..4usize, 0..4), 0..40),
        segment_sectors in 16..64u64,
    ) {
        let store = Memory::new(segment_sectors * SECTOR_BYTES);
        let mut log = LogWriter::new(POOL_ID, None);
        log.begin(&store, Txg(1)).unwrap();
        let mut starts = Vec::new();
        let mut all = Vec::new();
        for lens in frames {
            starts.push((log.position().unwrap(), all.len()));
            let numbers = all.len() as u64..;
            let records: Vec<_> = numbers.zip(lens).map(|(n, len)| record(n, len)).collect();
            append(&mut log, &store, &records);
            all.extend(records);
        }
        let all_segments = log.segments().len();
        for (start, before) in &starts {
            let (seen, end) = replay(&store, start);
            prop_assert_eq!(&seen, &all[*before..]);
            prop_assert_eq!(Some(end.position), log.position());
            prop_assert_eq!(end.records as usize, seen.len());
            prop_assert!(log.segments().ends_with(&end.segments));
        }
        if let Some((start, _)) = starts.last() {
            let released = log.release_before(start, Txg(1));
            prop_assert_eq!(log.segments()[0], start.segment);
            prop_assert_eq!(released.len() + log.segments().len(), all_segments);
        }
    }

    #[test]
    fn garbage_anywhere_in_a_log_never_panics_and_yields_only_what_was_appended(
        damage in proptest::collection::vec((0..200_000u64, any::<u8>()), 1..4),
    ) {
        let (store, start, records) = log_of_ten();
        for (at, byte) in damage {
            let length = 4 * store.segment_bytes;
            store.with(BASE + at % length, |bytes| bytes[0] = byte);
        }
        let (seen, end) = replay(&store, &start);
        prop_assert_eq!(&seen[..], &records[..seen.len()]);
        prop_assert!(end.segments.len() <= 4);
    }

    #[test]
    fn random_heads_with_right_checksums_never_panic(
        noise in proptest::collection::vec(any::<u8>(), 0x80),
        keep in any::<[bool; 5]>(),
        payload_bytes in 0..300u32,
    ) {
        let (store, start, _) = log_of_ten();
        store.with(start.segment.addr.0, |bytes| {
            let old = bytes[..0x80].to_vec();
            let good = <FrameHeader as DiskField>::get(&old);
            let mut head = <FrameHeader as DiskField>::get(&noise);
            (head.magic, head.pool_id) = (good.magic, good.pool_id);
            (head.sequence, head.chain) = (good.sequence, good.chain);
            if keep[0] { head.reserved = [0; 8] }
            if keep[1] { head.payload_bytes = payload_bytes }
            if keep[2] { head.record_count = good.record_count }
            if keep[3] { (head.next_segment, head.next_segment_bytes) = (0, 0) }
            if keep[4] { head.next_segment = BASE }
            head.put(&mut bytes[..0x80]);
            let covered = 0x80 + (head.payload_bytes as usize).min(4096 - 0x80);
            head.checksum = *blake3::hash(&bytes[0x28..covered]).as_bytes();
            head.put(&mut bytes[..0x80]);
        });
        let _ = scan(&store, POOL_ID, &start, &mut |_| Ok(true));
    }
}

/// A log of ten frames of different lengths over three segments and a bit.
fn log_of_ten() -> (Memory, LogStart, Vec<LogRecord>) {
    let store = Memory::new(12 * SECTOR_BYTES);
    let mut log = LogWriter::new(POOL_ID, None);
    let start = log.begin(&store, Txg(1)).unwrap();
    let records: Vec<_> = (0..10).map(|n| record(n, (n * 3 % 7) as usize)).collect();
    for record in &records {
        append(&mut log, &store, core::slice::from_ref(record));
    }
    assert_eq!(log.segments().len(), 4);
    (store, start, records)
}

#[test]
fn a_frame_that_one_copy_lost_is_read_from_the_other() {
    let (store, start, records) = log_of_ten();
    for at in (0..4 * store.segment_bytes).step_by(1000) {
        let byte = store.with(BASE + at, |bytes| bytes[0]);
        store.state.lock().first_copy = Some((BASE + at, !byte));
        assert_eq!(replay(&store, &start).0, records, "damage at {at}");
    }
}

#[test]
fn a_frame_torn_at_any_block_ends_replay_before_it() {
    let mut torn = 0;
    for last in 0..10 {
        let (store, start, records) = log_of_ten();
        // Frames of payload and of links: all are written in order.
        let writes = store.state.lock().writes.clone();
        let frames: Vec<Run> = writes.iter().copied().filter(|run| !is_link(&store, run)).collect();
        let frame = frames[last];
        let whole = store.with(frame.addr.0, |bytes| bytes[..frame.bytes as usize].to_vec());
        for block in 0..frame.bytes as usize / 512 {
            // This block, and in the other case also all after it, did not reach the device.
            for range in [block * 512..(block + 1) * 512, block * 512..whole.len()] {
                store.with(frame.addr.0, |bytes| bytes[range].fill(0xa5));
                let (seen, end) = replay(&store, &start);
                assert_eq!(seen, records[..last]);
                assert_eq!(end.position.segment.addr.0 + end.position.offset, frame.addr.0);
                store.with(frame.addr.0, |bytes| bytes[..whole.len()].copy_from_slice(&whole));
                torn += 1;
            }
        }
        assert_eq!(replay(&store, &start).0, records);
    }
    assert!(torn > 500, "{torn}");
}

fn is_link(store: &Memory, run: &Run) -> bool {
    store.with(run.addr.0, |bytes| FrameHeader::decode(bytes).unwrap().record_count == 0)
}

#[test]
fn a_log_goes_on_after_a_crash_and_frames_that_were_lost_stay_lost() {
    let (store, start, records) = log_of_ten();
    let writes = store.state.lock().writes.clone();
    // The third frame is torn; those after it are there whole.
    store.with(writes[2].addr.0 + 512, |bytes| bytes[0] ^= 1);
    let (seen, end) = replay(&store, &start);
    assert_eq!(seen, records[..2]);
    let mut log = LogWriter::new(POOL_ID, Some(end.position));
    // A frame as long as the lost one, so that the next old frame follows it directly.
    append(&mut log, &store, &[record(99, 6)]);
    assert_eq!(store.last_write(), writes[2]);
    let (seen, _) = replay(&store, &start);
    assert_eq!(seen[..2], records[..2]);
    assert_eq!(seen[2..], [record(99, 6)]);
}

#[test]
fn frames_of_an_earlier_use_of_a_segment_are_not_taken() {
    let (store, start, _) = log_of_ten();
    // Another log begins in the same segment; the old first frame is still there.
    store.state.lock().free.push(start.segment);
    let mut log = LogWriter::new(POOL_ID, None);
    let again = log.begin(&store, Txg(2)).unwrap();
    assert_eq!(again.segment, start.segment);
    assert_eq!(replay(&store, &again).0, []);
    append(&mut log, &store, &[record(50, 0)]);
    assert_eq!(replay(&store, &again).0, [record(50, 0)]);
    // Nor those of another pool at the same place.
    let end = scan(&store, [0; 16], &again, &mut |_| Ok(true)).unwrap();
    assert_eq!(end.frames, 0);
}

#[test]
fn a_segment_that_comes_round_again_ends_replay() {
    let store = Memory::new(8 * SECTOR_BYTES);
    let mut log = LogWriter::new(POOL_ID, None);
    let start = log.begin(&store, Txg(1)).unwrap();
    store.state.lock().free.push(start.segment);
    // Eight small frames fill the segment; the last names the segment itself.
    (0..8).for_each(|n| append(&mut log, &store, &[record(n, 0)]));
    assert_eq!(log.position().unwrap().segment, start.segment);
    let (seen, end) = replay(&store, &start);
    assert_eq!(seen.len(), 8);
    assert_eq!(end.segments, [start.segment; 2]);
}

#[test]
fn a_failed_write_can_be_repeated_and_loses_no_segment() {
    let store = Memory::new(8 * SECTOR_BYTES);
    let mut log = LogWriter::new(POOL_ID, None);
    let start = log.begin(&store, Txg(1)).unwrap();
    let records: Vec<_> = (0..12).map(|n| record(n, (n % 5) as usize)).collect();
    for record in &records {
        let payload = payload(core::slice::from_ref(record));
        store.state.lock().fail_writes = true;
        assert_eq!(log.append(&store, &payload, 1), Err(Error::Failed));
        store.state.lock().fail_writes = false;
        log.append(&store, &payload, 1).unwrap();
    }
    assert_eq!(replay(&store, &start).0, records);
    let allocated = store.state.lock().bytes.len();
    assert_eq!(log.segments().len(), allocated, "a segment was allocated and forgotten");
}

#[test]
fn an_unreadable_sector_behind_the_end_does_no_harm_and_one_before_it_is_told() {
    let (store, start, records) = log_of_ten();
    let last = store.last_write();
    store.state.lock().unreadable = Some(last.end().0 + SECTOR_BYTES);
    let (seen, end) = replay(&store, &start);
    assert_eq!((seen, end.unreadable), (records.clone(), None));
    store.state.lock().unreadable = Some(last.addr.0);
    let (seen, end) = replay(&store, &start);
    assert_eq!(seen, records[..9]);
    assert!(end.unreadable.is_some());
}

#[test]
fn the_longest_payload_fits_and_a_longer_one_is_refused() {
    let store = Memory::new(16 * SECTOR_BYTES);
    let mut log = LogWriter::new(POOL_ID, None);
    assert!(log.append(&store, &[], 0).is_err(), "a log must begin before it is appended to");
    let start = log.begin(&store, Txg(1)).unwrap();
    let most = LogWriter::max_payload(&store);
    // Items without padding between them: one that fills the payload to the last byte.
    let value = alloc::vec![7; 4200];
    let key = Key::new(1, kind::INODE, 0);
    let item = |value: &[u8]| LogRecord {
        txg: Txg(1),
        tree: TreeId(256),
        record: Record::Item { key, value: Some(value.to_vec()), keep_size: true },
    };
    let mut records: Vec<_> = (0..most / 4256).map(|_| item(&value)).collect();
    records.push(item(&value[..most % 4256 - 56]));
    for _ in 0..3 {
        let payload = payload(&records);
        assert_eq!(payload.len(), most);
        log.append(&store, &payload, records.len() as u32).unwrap();
    }
    assert_eq!(replay(&store, &start).0.len(), 3 * records.len());
    assert!(log.append(&store, &alloc::vec![0; most + 1], 0).is_err());
}

#[test]
fn a_log_at_its_bounds_says_so_until_segments_are_released() {
    let store = Memory::new(4 * SECTOR_BYTES);
    let mut log = LogWriter::new(POOL_ID, None);
    let start = log.begin(&store, Txg(1)).unwrap();
    let mut frames = 0;
    let full = loop {
        match log.append(&store, &[], 0) {
            Ok(()) => frames += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full, Error::NoSpace);
    assert_eq!(frames, SEGMENTS_MAX * 4 - 1);
    assert_eq!(replay(&store, &start).1.frames, frames as u64);
    let position = log.position().unwrap();
    assert_eq!(log.release_before(&position, Txg(1)).len(), SEGMENTS_MAX - 1);
    log.append(&store, &[], 0).unwrap();
}

#[test]
fn a_whole_frame_with_a_bad_record_is_an_error() {
    let store = Memory::new(8 * SECTOR_BYTES);
    for (payload, count) in [(alloc::vec![0; 64], 2), (alloc::vec![0; 64], 0)] {
        let mut log = LogWriter::new(POOL_ID, None);
        let start = log.begin(&store, Txg(1)).unwrap();
        log.append(&store, &payload, count).unwrap();
        let end = scan(&store, POOL_ID, &start, &mut |_| Ok(true));
        assert!(matches!(end, Err(Error::Corrupt { .. })));
    }
}

#[test]
fn a_visitor_that_has_had_enough_ends_replay_at_its_frame() {
    let (store, start, records) = log_of_ten();
    let mut seen = 0;
    let end = scan(&store, POOL_ID, &start, &mut |_| {
        seen += 1;
        Ok(seen < 4)
    })
    .unwrap();
    assert_eq!((seen, end.frames), (4, 3));
    assert_eq!(replay(&store, &end.position).0, records[3..]);
}

#[test]
fn a_start_out_of_range_ends_replay_at_once() {
    let (store, start, _) = log_of_ten();
    let beyond = LogStart { offset: start.segment.bytes + SECTOR_BYTES, ..start };
    assert_eq!(replay(&store, &beyond).1.frames, 0);
    let segment = Run { addr: Logical(u64::MAX - 4095), bytes: SEGMENT_BYTES_MAX };
    let far = LogStart { segment, offset: SECTOR_BYTES, ..start };
    assert!(replay(&store, &far).1.unreadable.is_some());
    assert_eq!(frame_bytes(0), SECTOR_BYTES);
}
