//! Reading every copy of many blocks, to see whether all are good.
//!
//! A *sweep* is given blocks and file data. It plans which bytes of which devices are copies of
//! them, sorts those of each device by place, joins neighbours into long transfers, and cuts them
//! into batches. Whoever has time takes a batch, reads it, and verifies what it read while another
//! reads the next:
//!
//! ```text
//! contents -> wants of each device, by place -> batches -> read -> verified -> suspects
//! ```
//!
//! - What is in one piece is verified when it was read. A block that is verified as a whole and is
//!   cut over several devices is put together first, each copy for itself.
//! - A sweep finds *suspects* and repairs nothing: what to do about one is a question of what the
//!   other copies hold, which [`Pool::mend`] finds out.
//! - The devices that are there count, complete or not. Nothing else is read: neither free space,
//!   nor what lies between blocks.
//! - Nothing here takes a lock that others wait for, and what is read counts as read by nobody
//!   ([`Member::read_aside`]), so that [`Sweep::was_in_the_way`] can tell whether somebody waited
//!   for the devices meanwhile.
//!
//! Whoever made the sweep keeps what it names from being used for something else until it is over.

use super::map::Place;
use super::read::DataSource;
use super::Pool;
use crate::buf::Buf;
use crate::codec;
use crate::device::Member;
use crate::error::Error;
use crate::format::ptr::{BlockPtr, ChecksumKind};
use crate::format::space::Run;
use crate::platform::{ReadOp, Result};
use crate::sync::{Mutex, Signal};
use crate::units::{Physical, SECTOR_BYTES};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

/// Something to verify.
#[derive(Clone, Debug)]
pub enum Content {
    /// A metadata block.
    Block(BlockPtr),
    /// File data.
    Data(DataSource),
}

impl Content {
    /// Where it is.
    pub fn run(&self) -> Run {
        match self {
            Content::Block(ptr) => Run { addr: ptr.addr, bytes: ptr.allocated() },
            Content::Data(source) => source.run(),
        }
    }

    /// Whether a checksum vouches for it.
    pub(super) fn is_verified(&self) -> bool {
        match self {
            Content::Block(_) => true,
            Content::Data(source) => source.is_verified(),
        }
    }

    /// Whether one checksum covers all of it.
    fn is_sealed(&self) -> bool {
        !matches!(self, Content::Data(DataSource::Plain { .. }))
    }
}

/// Bytes of all batches of a sweep that are read at one moment; two sweeps may be under way.
const FLYING_BYTES: u64 = 32 << 20;
/// Bytes of a batch: enough transfers that a device with several queues is busy.
const BATCH_BYTES: core::ops::RangeInclusive<u64> = 512 << 10..=4 << 20;
/// Bytes of a transfer, when neighbours are joined.
const JOINED_BYTES_MAX: u64 = 1 << 20;
/// Batches of a device that are worked on at once: one is read while another is verified.
const LANES_PER_DEVICE: usize = 2;

/// A copy of a piece of a content.
struct Want {
    at: Physical,
    bytes: u32,
    /// Index of the content.
    content: u32,
    /// Where in the content the piece begins.
    from: u32,
    /// Index of what it is a part of, if that must be put together.
    joint: Option<u32>,
}

/// One copy of a sealed content that is in several pieces.
struct Joint {
    content: u32,
    state: Mutex<Joining>,
}

struct Joining {
    /// Pieces that were not read yet.
    left: u32,
    /// One of them could not be read.
    is_bad: bool,
    /// What was read; nothing before the first piece.
    buf: Buf,
}

/// What is read of one device.
struct Lane {
    device: u16,
    wants: Vec<Want>,
    batches: Vec<Range<usize>>,
    /// The next batch to take.
    next: AtomicUsize,
}

/// See the module.
pub struct Sweep {
    pool: Arc<Pool>,
    contents: Vec<Content>,
    is_suspect: Vec<AtomicBool>,
    lanes: Vec<Lane>,
    joints: Vec<Joint>,
    /// Batches that are not done.
    left: AtomicUsize,
    done: Signal,
    /// How often it was looked whether somebody waits for a device, and how often somebody did.
    looks: AtomicU32,
    busy_looks: AtomicU32,
    /// It is not looked: whoever sweeps reads for himself.
    is_blind: AtomicBool,
    /// What is not begun is left.
    is_cancelled: AtomicBool,
}

impl Sweep {
    /// Plans to read all copies of `contents`.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn plan(pool: Arc<Pool>, contents: Vec<Content>) -> Result<Sweep> {
        // Before the devices: every one that it names is among them.
        let map = pool.chunk_map();
        let mut plan = Plan {
            pool: &pool,
            wants: pool.members().iter().map(|_| Vec::new()).collect(),
            joints: Vec::new(),
        };
        let is_suspect: Vec<AtomicBool> = contents.iter().map(|_| AtomicBool::new(false)).collect();
        for (index, content) in (0u32..).zip(&contents) {
            let is_planned = match map.locate(content.run()) {
                Ok(place) => plan.add(index, content, &place)?,
                // A pointer to nowhere.
                Err(_) => false,
            };
            if !is_planned {
                is_suspect[index as usize].store(true, Ordering::Relaxed);
            }
        }
        let Plan { wants, joints, .. } = plan;
        let busy = wants.iter().filter(|wants| !wants.is_empty()).count().max(1) as u64;
        let batch_bytes = (FLYING_BYTES / (busy * LANES_PER_DEVICE as u64))
            .clamp(*BATCH_BYTES.start(), *BATCH_BYTES.end());
        let lane = |(device, wants): (u16, Vec<Want>)| Lane::new(device, wants, batch_bytes);
        let lanes: Vec<Lane> =
            (0..).zip(wants).filter(|(_, wants)| !wants.is_empty()).map(lane).collect();
        let left = lanes.iter().map(|lane| lane.batches.len()).sum();
        Ok(Sweep {
            pool,
            contents,
            is_suspect,
            lanes,
            joints,
            left: AtomicUsize::new(left),
            done: Signal::new(),
            looks: AtomicU32::new(0),
            busy_looks: AtomicU32::new(0),
            is_blind: AtomicBool::new(false),
            is_cancelled: AtomicBool::new(false),
        })
    }

    /// What is verified.
    pub fn contents(&self) -> &[Content] {
        &self.contents
    }

    /// Has other threads begin. The caller calls [`Sweep::finish`] at last.
    pub fn start(self: &Arc<Sweep>) {
        let workers = &self.pool.platform().workers;
        for (index, lane) in self.lanes.iter().enumerate() {
            for _ in 0..LANES_PER_DEVICE.min(lane.batches.len()) {
                let sweep = self.clone();
                workers.spawn(alloc::boxed::Box::new(move || sweep.work(&sweep.lanes[index])));
            }
        }
    }

    /// Says whether the caller reads for himself from now on, which is not to be taken for somebody
    /// who waits for the devices.
    pub fn set_blind(&self, is_blind: bool) {
        self.is_blind.store(is_blind, Ordering::Relaxed);
    }

    /// Leaves what was not begun, and waits for the rest. What was found counts for nothing.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
        self.finish();
    }

    /// Does what nobody has begun, and waits for the rest. Returns the indices of suspects.
    pub fn finish(&self) -> Vec<usize> {
        self.lanes.iter().for_each(|lane| self.work(lane));
        self.done.wait_until(|| self.left.load(Ordering::Acquire) == 0);
        let is_suspect = |index: &usize| self.is_suspect[*index].load(Ordering::Relaxed);
        (0..self.contents.len()).filter(is_suspect).collect()
    }

    /// Whether somebody else had transfers under way most of the time.
    pub fn was_in_the_way(&self) -> bool {
        let looks = self.looks.load(Ordering::Relaxed);
        looks > 0 && self.busy_looks.load(Ordering::Relaxed) * 2 > looks
    }

    /// Takes batches of a device until there are no more.
    fn work(&self, lane: &Lane) {
        let mut spare = Vec::new();
        loop {
            let index = lane.next.fetch_add(1, Ordering::Relaxed);
            let Some(batch) = lane.batches.get(index) else { return };
            if self.is_cancelled.load(Ordering::Relaxed) {
                self.end_batch();
                continue;
            }
            if !self.is_blind.load(Ordering::Relaxed) {
                let is_busy = self.pool.members().iter().any(Member::is_busy);
                self.looks.fetch_add(1, Ordering::Relaxed);
                self.busy_looks.fetch_add(u32::from(is_busy), Ordering::Relaxed);
            }
            let wants = &lane.wants[batch.clone()];
            if self.read(lane.device, wants, &mut spare).is_err() {
                // Without memory for all of it, each may do.
                wants.iter().for_each(|want| self.suspect(want.content));
            }
            self.end_batch();
        }
    }

    fn end_batch(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.notify_all();
        }
    }

    fn suspect(&self, content: u32) {
        self.is_suspect[content as usize].store(true, Ordering::Relaxed);
    }

    /// Reads and looks. What was read into before serves again, since memory that is new costs a
    /// fault for each page of it.
    fn read(&self, device: u16, wants: &[Want], spare: &mut Vec<Buf>) -> Result<()> {
        let mut ops: Vec<ReadOp> = Vec::new();
        // For each want, its transfer and where in it.
        let mut places: Vec<(usize, usize)> = Vec::with_capacity(wants.len());
        let mut first = 0;
        while first < wants.len() {
            let (at, mut bytes) = (wants[first].at, 0);
            let mut end = first;
            while let Some(want) = wants.get(end) {
                let is_next = want.at.0 == at.0 + bytes;
                if end > first && (!is_next || bytes + u64::from(want.bytes) > JOINED_BYTES_MAX) {
                    break;
                }
                places.push((ops.len(), bytes as usize));
                bytes += u64::from(want.bytes);
                end += 1;
            }
            let buf = match spare.iter().position(|buf| buf.len() as u64 == bytes) {
                Some(index) => spare.swap_remove(index),
                None => self.pool.buffer(bytes as usize)?,
            };
            ops.push(ReadOp { at, buf, result: Ok(()) });
            first = end;
        }
        self.pool.member(device).read_aside(&mut ops);
        for (want, (op, from)) in wants.iter().zip(places) {
            let bytes = match &ops[op].result {
                Ok(()) => Some(&ops[op].buf[from..from + want.bytes as usize]),
                Err(_) => None,
            };
            self.take(want, bytes);
        }
        *spare = ops.into_iter().map(|op| op.buf).collect();
        Ok(())
    }

    /// Looks at what was read.
    fn take(&self, want: &Want, bytes: Option<&[u8]>) {
        let is_good = match (want.joint, bytes) {
            (Some(joint), bytes) => self.join(&self.joints[joint as usize], want, bytes),
            (None, Some(bytes)) => self.is_good(want, bytes),
            (None, None) => false,
        };
        if !is_good {
            self.suspect(want.content);
        }
    }

    fn is_good(&self, want: &Want, bytes: &[u8]) -> bool {
        let codecs = &*self.pool.platform().codecs;
        match &self.contents[want.content as usize] {
            Content::Data(DataSource::Plain { checksum_kind, checksums, .. }) => {
                let first = want.from as usize / SECTOR_BYTES as usize * checksum_kind.bytes();
                let sums = checksums.get(first..).unwrap_or_default();
                codec::bad_sectors(codecs, *checksum_kind, bytes, sums).next().is_none()
            }
            Content::Data(DataSource::Packed { blob }) => {
                let stored = bytes.get(..blob.stored as usize);
                stored.is_some_and(|stored| {
                    codec::matches(codecs, blob.checksum_kind, stored, &blob.checksum)
                })
            }
            Content::Block(ptr) => {
                let stored = bytes.get(..ptr.stored as usize);
                stored.is_some_and(|stored| {
                    codec::matches(codecs, ChecksumKind::Blake3, stored, &ptr.checksum)
                })
            }
        }
    }

    /// Adds a piece to what it is a part of. False when that is whole now, and not good.
    fn join(&self, joint: &Joint, want: &Want, bytes: Option<&[u8]>) -> bool {
        let mut state = joint.state.lock();
        state.left -= 1;
        match (bytes, state.is_bad) {
            (Some(bytes), false) => {
                if state.buf.is_empty() {
                    let len = self.contents[joint.content as usize].run().bytes;
                    match Buf::zeroed(len as usize) {
                        Ok(buf) => state.buf = buf,
                        Err(_) => state.is_bad = true,
                    }
                }
                let from = want.from as usize;
                if let Some(part) = state.buf.get_mut(from..from + bytes.len()) {
                    part.copy_from_slice(bytes);
                }
            }
            (None, _) => state.is_bad = true,
            (Some(_), true) => {}
        }
        if state.left > 0 {
            return true;
        }
        let buf = core::mem::take(&mut state.buf);
        let is_bad = state.is_bad;
        drop(state);
        let whole = Want { from: 0, joint: None, ..*want };
        !is_bad && self.is_good(&whole, &buf)
    }
}

/// What is known of a sweep while it is planned.
struct Plan<'a> {
    pool: &'a Pool,
    /// By device.
    wants: Vec<Vec<Want>>,
    joints: Vec<Joint>,
}

impl Plan<'_> {
    /// Adds all copies of a content. False when something about it cannot be found out in a sweep.
    fn add(&mut self, index: u32, content: &Content, place: &Place) -> Result<bool> {
        let count = if content.is_sealed() { place.pieces().count() } else { 1 };
        let mut is_known = true;
        for copy in 0..place.copies() {
            let joint = match count {
                1 => None,
                _ => {
                    let is_there =
                        |piece: Place| self.pool.member(piece.segment(copy).device).is_there();
                    if !place.pieces().all(is_there) {
                        // A part of it has nothing that vouches for it.
                        is_known = false;
                        continue;
                    }
                    let joining =
                        Joining { left: count as u32, is_bad: false, buf: Buf::default() };
                    let joint = Joint { content: index, state: Mutex::new(joining) };
                    self.joints.try_reserve(1).map_err(|_| Error::Memory)?;
                    self.joints.push(joint);
                    Some(self.joints.len() as u32 - 1)
                }
            };
            let mut from = 0;
            for piece in place.pieces() {
                let segment = piece.segment(copy);
                if self.pool.member(segment.device).is_there() {
                    let wants = &mut self.wants[usize::from(segment.device)];
                    wants.try_reserve(1).map_err(|_| Error::Memory)?;
                    let bytes = segment.bytes as u32;
                    wants.push(Want { at: segment.at, bytes, content: index, from, joint });
                }
                from += segment.bytes as u32;
            }
        }
        let is_any = |piece: Place| {
            (0..piece.copies()).any(|c| self.pool.member(piece.segment(c).device).is_there())
        };
        Ok(is_known && place.pieces().all(is_any))
    }
}

impl Lane {
    fn new(device: u16, mut wants: Vec<Want>, batch_bytes: u64) -> Lane {
        wants.sort_unstable_by_key(|want| want.at);
        let mut batches = Vec::new();
        let (mut first, mut bytes) = (0, 0);
        for (index, want) in wants.iter().enumerate() {
            bytes += u64::from(want.bytes);
            if bytes >= batch_bytes {
                batches.push(first..index + 1);
                (first, bytes) = (index + 1, 0);
            }
        }
        if first < wants.len() {
            batches.push(first..wants.len());
        }
        Lane { device, wants, batches, next: AtomicUsize::new(0) }
    }
}
