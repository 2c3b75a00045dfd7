//! Sharing what is equal: two ranges are compared, and when they hold the same bytes the target
//! gets the extents of the source. And what finding such ranges takes: where the blocks of a file
//! are, and what they hash to.
//!
//! ```text
//! look at both, one after the other --> compare, no lock held --differ--> told so
//!         ^                                    | equal
//!         |                                    v
//!         +--changed meanwhile--- reserve room, lock both --as they were--> share
//! ```
//!
//! - What a file holds is told by the counter of changes in its inode: every operation that changes
//!   what a reader sees moves it. That bytes are given a place, early or by a commit, does not.
//! - So nobody waits for what is read here, and a range that is equal is shared as of a moment at
//!   which it was. After a few changes in a row the comparison is made under the locks; a piece of
//!   [`DEDUPE_BYTES`] is all that is held for it.
//! - A part of the target is left as it is when it has the extent of the source already, when it is
//!   a hole or promised room, and when that part of the source has no place on a device: small
//!   files, and bytes that are still in memory although they were written out just before.
//! - Where the source has a hole, the target gets one.
//! - Never: change what a reader sees, any time, or the counter of changes. Never give a target
//!   more bytes than it had, so that a limit is met as by a write over what is there.

use crate::error::{Errno, Error};
use crate::format::extent::Extent;
use crate::subvol::change::Change;
use crate::subvol::extents::{Place, Segment, INLINE_LIMIT};
use crate::subvol::inode::{Inode, State};
use crate::subvol::ranges::Content;
use crate::subvol::room::Pieces;
use crate::subvol::View;
use crate::sync::Mutex;
use crate::units::{sector_round, Ino, SECTOR_BYTES};
use crate::vfs::files::{check_file, check_writable, sharable};
use crate::vfs::volume::{Locked, Volume};
use crate::vfs::{Dedupe, Result};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Bytes that are compared and shared at once.
pub const DEDUPE_BYTES: u64 = 1 << 20;
/// How often what was compared may have changed before it is compared under the locks.
const TRIES: u32 = 3;

/// Largest block that places and hashes are told of.
pub const BLOCK_BYTES_MAX: u64 = 1 << 20;
/// Blocks whose places are told at once.
const PLACES_MAX: usize = 4096;
/// Blocks that are looked at under one lock.
const PLACES_STEP: u64 = 512;
/// The same behind a hole.
const PLACES_STEP_MAX: u64 = 16 * PLACES_STEP;
/// Bytes that are hashed at a request.
pub const HASHED_BYTES_MAX: u64 = 16 << 20;
/// Bytes that are read at once to be hashed.
const READ_BYTES: u64 = 4 << 20;

/// A block of a file that has something in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// Which, counted from the beginning of the file.
    pub index: u64,
    /// Names where on the devices all of it is: blocks with one place share it. `None` while some
    /// of it has no place of its own.
    pub place: Option<[u8; 16]>,
}

/// Blocks of a file, ascending. Those that are holes are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockPlaces {
    /// Bytes of the file.
    pub size: u64,
    /// The blocks.
    pub blocks: Vec<BlockPlace>,
    /// With which block to go on; `None` at the end of the file.
    pub next: Option<u64>,
}

/// Two ranges of one length.
#[derive(Clone, Copy)]
struct Pair<'a> {
    from: &'a Arc<Inode>,
    source: u64,
    to: &'a Arc<Inode>,
    target: u64,
}

/// One of two ranges, as it was at a moment.
struct Side {
    version: u64,
    size: u64,
    segments: Vec<Segment>,
    /// Keeps what the segments name from being reused.
    _view: Arc<View>,
}

/// What sharing comes to.
#[derive(Default)]
struct Plan {
    /// What the target is to get, at its place in the target: extents, and holes.
    pieces: Vec<Segment>,
    /// The target has the source's extents already, or both are holes, all over.
    is_shared: bool,
}

/// What becomes of a part of the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is where the source's part is.
    Same,
    /// It stays where it is.
    Kept,
    /// It gets what the source has.
    Given,
}

fn fate(source: &Place, target: &Place) -> Fate {
    match (source, target) {
        (Place::Zeros { .. }, Place::Zeros { .. }) => Fate::Same,
        (Place::Extent(one), Place::Extent(other)) if one == other => Fate::Same,
        (_, Place::Zeros { .. }) => Fate::Kept,
        (Place::Zeros { .. }, _) => Fate::Given,
        (Place::Extent(Extent::Plain { .. } | Extent::Packed { .. }), _) => Fate::Given,
        (Place::Extent(_) | Place::Memory(_), _) => Fate::Kept,
    }
}

/// What could not be read.
struct Unread<'a> {
    inode: &'a Arc<Inode>,
    at: u64,
    error: Error,
}

fn extents(segments: &[Segment]) -> u64 {
    segments.iter().filter(|segment| matches!(segment.place, Place::Extent(_))).count() as u64
}

impl Pair<'_> {
    /// How many bytes are compared and shared at once, when the files have these sizes.
    fn piece(&self, source_size: u64, target_size: u64, len: u64) -> Result<u64> {
        let is_within = |at: u64, size: u64| {
            let end = at.checked_add(len);
            at % SECTOR_BYTES == 0 && at < size && end.is_some_and(|end| end <= size)
        };
        if !is_within(self.source, source_size) || !is_within(self.target, target_size) {
            return Err(Errno::Inval.into());
        }
        let of = |len| sharable((self.source, source_size), (self.target, target_size), len);
        let gap = self.source.abs_diff(self.target);
        if self.from.ino == self.to.ino && gap < sector_round(of(len)) {
            return Err(Errno::Inval.into());
        }
        Ok(of(len.min(DEDUPE_BYTES)))
    }

    /// What the target is to get. Segments of both cover ranges of one length.
    fn plan(&self, source: &[Segment], target: &[Segment]) -> Plan {
        let mut plan = Plan { pieces: Vec::new(), is_shared: true };
        let mut others = target.iter();
        let mut other = others.next();
        for segment in source {
            let mut at = segment.at - self.source + self.target;
            let end = at + segment.len;
            // Where what is given begins: parts that follow each other are given as one.
            let mut begun = None;
            while let Some(beside) = other.filter(|_| at < end) {
                let beside_end = beside.at + beside.len;
                let stop = end.min(beside_end);
                let own = self.part(segment, at, stop);
                let fate = fate(&own.place, &beside.clone().clip(at, stop).place);
                plan.is_shared &= fate == Fate::Same;
                match fate {
                    Fate::Given => begun = begun.or(Some(at)),
                    Fate::Same | Fate::Kept => {
                        plan.pieces.extend(begun.take().map(|from| self.part(segment, from, at)));
                    }
                }
                at = stop;
                if stop == beside_end {
                    other = others.next();
                }
            }
            plan.pieces.extend(begun.take().map(|from| self.part(segment, from, at)));
        }
        plan
    }

    /// The part of a segment of the source that goes to `from..to` of the target, at that place.
    fn part(&self, segment: &Segment, from: u64, to: u64) -> Segment {
        let back = |at: u64| at - self.target + self.source;
        let part = segment.clone().clip(back(from), back(to));
        Segment { at: from, ..part }
    }
}

impl Volume {
    pub(super) fn do_dedupe(
        &self,
        source: (Ino, u64),
        target: (Ino, u64),
        len: u64,
    ) -> Result<Dedupe> {
        self.writable()?;
        let (from, to) = (self.inode(source.0)?, self.inode(target.0)?);
        let pair = Pair { from: &from, source: source.1, to: &to, target: target.1 };
        let mut tried = 0;
        loop {
            let source_size = size_of(&from.state.read())?;
            let target_size = size_of(&to.state.read())?;
            if len == 0 {
                return Ok(Dedupe::Same { bytes: 0, shared: 0 });
            }
            check_writable(&to.state.read())?;
            let bytes = pair.piece(source_size, target_size, len)?;
            if bytes == 0 {
                return Ok(Dedupe::Same { bytes: 0, shared: 0 });
            }
            if let Some(done) = self.dedupe_piece(pair, bytes, tried >= TRIES)? {
                return Ok(done);
            }
            tried += 1;
        }
    }

    /// Compares and shares; `None` when one of the files was changed meanwhile, unless `insists`.
    fn dedupe_piece(&self, pair: Pair<'_>, bytes: u64, insists: bool) -> Result<Option<Dedupe>> {
        let same = |shared: u64| Some(Dedupe::Same { bytes, shared: shared.min(bytes) });
        let mut source = self.side(pair.from, pair.source, bytes)?;
        if source.segments.iter().any(|segment| matches!(segment.place, Place::Memory(_))) {
            self.write_bytes(pair.from, false);
            source = self.side(pair.from, pair.source, bytes)?;
        }
        let target = self.side(pair.to, pair.target, bytes)?;
        let plan = pair.plan(&source.segments, &target.segments);
        if plan.is_shared {
            return Ok(same(0));
        }
        let is_same = self.is_same(pair, &source.segments, &target.segments, bytes);
        if !is_same.map_err(|unread| self.unread(unread))? {
            return Ok(Some(Dedupe::Differs));
        }
        let is_small = source.size <= INLINE_LIMIT || target.size <= INLINE_LIMIT;
        if plan.pieces.is_empty() || is_small {
            return Ok(same(0));
        }
        let versions = (source.version, target.version);
        let (expected, dropped) = (Pieces::of(&plan.pieces), extents(&target.segments));
        // Held any longer, they would keep space from coming free that room is looked for in.
        drop((source, target, plan));
        self.within_limits(sector_round(bytes))?;
        let reservation = self.reserve_pieces(0, 4, &expected, dropped)?;

        let mut locked = Locked::new(&[pair.from, pair.to]);
        let (source, target) = (locked.get(pair.from.ino), locked.get(pair.to.ino));
        let (source_size, target_size) = (size_of(source)?, size_of(target)?);
        check_writable(target)?;
        let is_unchanged = (source.item.version, target.item.version) == versions;
        let is_all = pair.piece(source_size, target_size, bytes)? == bytes;
        if !is_all || !is_unchanged && !insists {
            return Ok(None);
        }
        let view = self.subvol.view();
        let at = |ino: Ino, state: &State, at: u64| {
            self.subvol.layout(&view.tree, ino, state, at, at + sector_round(bytes))
        };
        let source = at(pair.from.ino, source, pair.source)?;
        let target = at(pair.to.ino, target, pair.target)?;
        if !is_unchanged {
            match self.is_same(pair, &source, &target, bytes) {
                Ok(true) => {}
                Ok(false) => return Ok(Some(Dedupe::Differs)),
                Err(unread) => {
                    // To name the file it is locked.
                    drop(locked);
                    return Err(self.unread(unread));
                }
            }
        }
        let plan = pair.plan(&source, &target);
        if !Pieces::of(&plan.pieces).is_within(&expected) || extents(&target) > dropped {
            return Ok(None);
        }
        if plan.pieces.is_empty() || source_size.min(target_size) <= INLINE_LIMIT {
            return Ok(same(0));
        }
        let mut change = Change::begin(&self.subvol);
        let state = locked.get_mut(pair.to.ino);
        change.touch(pair.to, state);
        let mut shared = 0;
        for piece in plan.pieces {
            let content = match piece.place {
                Place::Extent(extent) => Content::Shared(extent),
                Place::Zeros { .. } | Place::Memory(_) => Content::Hole,
            };
            self.put(&mut change, state, piece.at, piece.len, content);
            shared += piece.len;
        }
        self.keep(change.txg(), reservation, shared);
        change.finish();
        Ok(same(shared))
    }

    fn side(&self, inode: &Arc<Inode>, at: u64, bytes: u64) -> Result<Side> {
        let state = inode.state.read();
        let size = size_of(&state)?;
        let view = self.subvol.view();
        let end = at + sector_round(bytes);
        let segments = self.subvol.layout(&view.tree, inode.ino, &state, at, end)?;
        Ok(Side { version: state.item.version, size, segments, _view: view })
    }

    fn is_same<'a>(
        &self,
        pair: Pair<'a>,
        source: &[Segment],
        target: &[Segment],
        bytes: u64,
    ) -> Result<bool, Unread<'a>> {
        let store = &self.engine.store;
        let _buffers = store.dirty.buffer(2 * bytes);
        let bytes = bytes as usize;
        let read = |inode: &'a Arc<Inode>, at: u64, segments: &[Segment]| {
            let read = store.pool.buffer(bytes).and_then(|mut buf| {
                self.read_segments(segments, at, &mut buf[..bytes])?;
                Ok(buf)
            });
            read.map_err(|error| Unread { inode, at, error })
        };
        let one = read(pair.from, pair.source, source)?;
        let other = read(pair.to, pair.target, target)?;
        Ok(one[..bytes] == other[..bytes])
    }

    fn unread(&self, unread: Unread<'_>) -> Error {
        self.report_damage(unread.inode, unread.at, &unread.error);
        unread.error
    }

    /// Where blocks of a file are, from the block `first` on; not all of them at once. A block is a
    /// power of two from a sector to [`BLOCK_BYTES_MAX`].
    ///
    /// # Errors
    /// EINVAL for another block; ESTALE, EISDIR and EINVAL for what is no file; what reading the
    /// tree gives.
    pub fn block_places(&self, ino: Ino, first: u64, block: u64) -> Result<BlockPlaces> {
        check_block(block)?;
        let inode = self.inode(ino)?;
        let mut found = BlockPlaces::default();
        let (mut next, mut step) = (first, PLACES_STEP * block);
        loop {
            let state = inode.state.read();
            found.size = size_of(&state)?;
            let stop = sector_round(found.size);
            let at = next.checked_mul(block).filter(|at| *at < stop);
            let Some(at) = at else {
                found.next = None;
                return Ok(found);
            };
            if found.blocks.len() >= PLACES_MAX {
                found.next = Some(next);
                return Ok(found);
            }
            let end = at.saturating_add(step).min(stop);
            let view = self.subvol.view();
            let segments = self.subvol.layout(&view.tree, ino, &state, at, end)?;
            drop(state);
            let before = found.blocks.len();
            self.places(&segments, block, &mut found.blocks);
            // Far apart blocks of a sparse file are found in few steps.
            step = match found.blocks.len() == before {
                true => (2 * step).min(PLACES_STEP_MAX * block),
                false => PLACES_STEP * block,
            };
            next = end.div_ceil(block);
        }
    }

    /// The places of the blocks that segments cover, which begin with a block and end with one, or
    /// with the file.
    fn places(&self, segments: &[Segment], block: u64, out: &mut Vec<BlockPlace>) {
        let Some(mut index) = segments.first().map(|segment| segment.at / block) else { return };
        let mut parts = Parts::default();
        for segment in segments {
            let (mut at, end) = (segment.at, segment.at + segment.len);
            while at < end {
                if at / block != index {
                    out.extend(self.place(index, &parts));
                    (index, parts) = (at / block, Parts::default());
                }
                let stop = end.min((index + 1) * block);
                parts.add(&segment.place, at - segment.at, stop - at);
                at = stop;
            }
        }
        out.extend(self.place(index, &parts));
    }

    fn place(&self, index: u64, parts: &Parts) -> Option<BlockPlace> {
        if parts.are_zeros() {
            return None;
        }
        let place = parts.encode().map(|code| {
            let hash = self.engine.store.platform.codecs.blake3(&code);
            let mut place = [0; 16];
            place.copy_from_slice(&hash[..16]);
            place
        });
        Some(BlockPlace { index, place })
    }

    /// BLAKE3 of blocks of a file, as far as the file has them, without moving its access time.
    /// Ascending numbers of blocks that follow each other are read together.
    ///
    /// # Errors
    /// EINVAL for a block that may not be, or more than [`HASHED_BYTES_MAX`] in all; as reading.
    pub fn block_hashes(
        &self,
        ino: Ino,
        block: u64,
        indices: &[u64],
    ) -> Result<Vec<Option<[u8; 32]>>> {
        check_block(block)?;
        if indices.len() as u64 > HASHED_BYTES_MAX / block {
            return Err(Errno::Inval.into());
        }
        let inode = self.inode(ino)?;
        let store = &self.engine.store;
        let _buffers = store.dirty.buffer(READ_BYTES.min(indices.len() as u64 * block));
        let mut hashes = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while let Some(first) = rest.first().copied() {
            let most = (READ_BYTES / block) as usize;
            let follows = |(index, next): &(u64, &u64)| first.checked_add(*index) == Some(**next);
            let count = (0..).zip(rest).take(most).take_while(follows).count();
            rest = &rest[count..];
            let Some(at) = first.checked_mul(block) else {
                hashes.resize(hashes.len() + count, None);
                continue;
            };
            let mut buf = store.pool.buffer(count * block as usize)?;
            let out = &mut buf[..count * block as usize];
            let read = self.read_at(&inode, at, out)?;
            hashes.extend(self.hashes(&out[..read], block as usize));
            hashes.resize(hashes.len() + count - read.div_ceil(block as usize), None);
        }
        Ok(hashes)
    }

    fn hashes(&self, bytes: &[u8], block: usize) -> Vec<Option<[u8; 32]>> {
        let platform = &self.engine.store.platform;
        let count = bytes.len().div_ceil(block);
        let slots: Vec<Mutex<Option<[u8; 32]>>> = (0..count).map(|_| Mutex::new(None)).collect();
        platform.workers.parallel_for(count, &|index| {
            let part = &bytes[index * block..bytes.len().min((index + 1) * block)];
            *slots[index].lock() = Some(platform.codecs.blake3(part));
        });
        slots.into_iter().map(Mutex::into_inner).collect()
    }
}

fn check_block(block: u64) -> Result<()> {
    match block.is_power_of_two() && (SECTOR_BYTES..=BLOCK_BYTES_MAX).contains(&block) {
        true => Ok(()),
        false => Err(Errno::Inval.into()),
    }
}

fn size_of(state: &State) -> Result<u64> {
    check_file(state)?;
    Ok(state.item.size)
}

/// Kinds of parts of a block.
mod part {
    pub const ZEROS: u8 = 0;
    pub const PLAIN: u8 = 1;
    pub const PACKED: u8 = 2;
}

/// A part of a block: bytes from `offset` on, of the blob at `blob` or of all logical addresses.
struct Part {
    kind: u8,
    blob: u64,
    offset: u64,
    len: u64,
}

/// What a block is made of. However it is cut into items, parts that follow each other are one.
#[derive(Default)]
struct Parts {
    all: Vec<Part>,
    /// Some of it is in memory only, or in the tree.
    has_no_place: bool,
}

impl Parts {
    /// Adds so many bytes of a place, without the first ones.
    fn add(&mut self, place: &Place, skip: u64, len: u64) {
        let part = match place {
            Place::Zeros { .. } => Part { kind: part::ZEROS, blob: 0, offset: 0, len },
            Place::Extent(Extent::Plain { addr, .. }) => {
                Part { kind: part::PLAIN, blob: 0, offset: addr.0 + skip, len }
            }
            Place::Extent(Extent::Packed { blob, offset, .. }) => {
                let offset = u64::from(*offset) + skip;
                Part { kind: part::PACKED, blob: blob.addr.0, offset, len }
            }
            Place::Extent(_) | Place::Memory(_) => {
                self.has_no_place = true;
                return;
            }
        };
        let follows = |last: &&mut Part| {
            let is_of_one = (last.kind, last.blob) == (part.kind, part.blob);
            is_of_one && (part.kind == part::ZEROS || last.offset + last.len == part.offset)
        };
        match self.all.last_mut().filter(follows) {
            Some(last) => last.len += len,
            None => self.all.push(part),
        }
    }

    fn are_zeros(&self) -> bool {
        !self.has_no_place && self.all.iter().all(|part| part.kind == part::ZEROS)
    }

    /// As bytes; `None` when some of it has no place.
    fn encode(&self) -> Option<Vec<u8>> {
        if self.has_no_place {
            return None;
        }
        let mut code = Vec::with_capacity(self.all.len() * 25);
        for Part { kind, blob, offset, len } in &self.all {
            code.push(*kind);
            [blob, offset, len].iter().for_each(|n| code.extend_from_slice(&n.to_le_bytes()));
        }
        Some(code)
    }
}

#[cfg(test)]
mod tests;
