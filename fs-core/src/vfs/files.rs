//! Operations on the content of files.
//!
//! Ranges are kept in whole sectors, the last one padded with zeros. A write that covers a sector
//! in part reads the rest of it first. Whatever cuts bytes off writes zeros over the rest of the
//! last sector, so growing a file again shows zeros.

use crate::buf::{Buf, Slice};
use crate::engine::data;
use crate::error::{Errno, Error};
use crate::format::extent::{Extent, FILE_BYTES_MAX};
use crate::format::inode::{flag, InodeItem};
use crate::pool::{DataRead, DataSource, Pool};
use crate::space::{Class, Reservation};
use crate::subvol::change::Change;
use crate::subvol::extents::{Place, Segment, INLINE_LIMIT};
use crate::subvol::inode::{Inode, State};
use crate::subvol::ranges::Content;
use crate::subvol::room::Pieces;
use crate::subvol::View;
use crate::units::{align_down, sector_round, Ino, SECTOR_BYTES};
use crate::vfs::attrs::without_set_id;
use crate::vfs::volume::{Locked, Volume};
use crate::vfs::{Fallocate, Result, Seek, WriteFlags};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// Dirty bytes that one file gathers before whole windows of it are written early.
const EARLY_BYTES: u64 = 8 << 20;
/// The same when all files together have gathered much.
const EARLY_BYTES_PRESSED: u64 = 1 << 20;

/// How far a seek looks at once among extents.
const SEEK_STEP: u64 = 64 << 20;
/// What was changed within so many seconds has the times of a moment ago.
const RECENT_SECONDS: i64 = 1;

pub(super) fn check_file(state: &State) -> Result<()> {
    if state.gone {
        return Err(Errno::Stale.into());
    }
    if state.item.is_dir() {
        return Err(Errno::IsDir.into());
    }
    if !state.item.is_file() {
        return Err(Errno::Inval.into());
    }
    Ok(())
}

pub(super) fn check_writable(state: &State) -> Result<()> {
    check_file(state)?;
    if state.item.flags & flag::IMMUTABLE != 0 {
        return Err(Errno::Perm.into());
    }
    Ok(())
}

/// A place on the device to be read for some bytes of the caller's buffer.
struct Wanted<'out> {
    read: usize,
    /// Where in the read's bytes.
    from: usize,
    /// The part of the caller's buffer.
    out: &'out mut [u8],
}

/// Reads of a batch, and what is wanted of them.
#[derive(Default)]
struct Batch<'out> {
    reads: Vec<DataRead<'out>>,
    wanted: Vec<Wanted<'out>>,
}

/// The part of `start..end` that a segment has: offset in the segment, and length.
fn overlap(segment: &Segment, start: u64, end: u64) -> (usize, usize) {
    let from = start.max(segment.at);
    let to = end.min(segment.at + segment.len);
    ((from - segment.at) as usize, (to - from) as usize)
}

impl Volume {
    pub(super) fn do_read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        let inode = self.inode(ino)?;
        let count = self.read_at(&inode, offset, out)?;
        if count > 0 {
            self.accessed(&inode);
        }
        Ok(count)
    }

    /// Reads up to `out.len()` bytes, and does not note that the file was read.
    pub(super) fn read_at(&self, inode: &Arc<Inode>, offset: u64, out: &mut [u8]) -> Result<usize> {
        let (view, segments, count) = {
            let state = inode.state.read();
            check_file(&state)?;
            let left = state.item.size.saturating_sub(offset);
            let count = left.min(out.len() as u64) as usize;
            let view = self.subvol.view();
            let segments = if count == 0 {
                Vec::new()
            } else {
                let start = align_down(offset, SECTOR_BYTES);
                let end = sector_round(offset + count as u64);
                self.subvol.layout(&view.tree, inode.ino, &state, start, end)?
            };
            (view, segments, count)
        };
        let result = self.read_segments(&segments, offset, &mut out[..count]);
        // Until here the view kept what the segments name from being reused.
        drop(view);
        if let Err(error) = &result {
            self.report_damage(inode, offset, error);
        }
        result.map(|()| count)
    }

    /// Fills `out` with the bytes from `start` on, which the segments cover, one after the other.
    pub(super) fn read_segments(
        &self,
        segments: &[Segment],
        start: u64,
        out: &mut [u8],
    ) -> Result<()> {
        let end = start + out.len() as u64;
        let mut batch = Batch::default();
        let mut rest = out;
        for segment in segments {
            let (skip, len) = overlap(segment, start, end);
            let (out, after) = rest.split_at_mut(len);
            rest = after;
            match &segment.place {
                Place::Memory(data) => out.copy_from_slice(&data[skip..skip + len]),
                Place::Zeros { .. } => out.fill(0),
                Place::Extent(extent) => self.want(extent, skip, out, &mut batch)?,
            }
        }
        debug_assert!(rest.is_empty(), "segments end before the bytes that are read");
        let Batch { mut reads, wanted } = batch;
        self.engine.store.pool.read_data(&mut reads);
        if let Some(error) = reads.iter().find_map(|read| read.result.as_ref().err()) {
            return Err(error.clone());
        }
        for Wanted { read, from, out } in wanted {
            let len = out.len();
            out.copy_from_slice(&reads[read].buf[from..from + len]);
        }
        Ok(())
    }

    fn want<'out>(
        &self,
        extent: &Extent,
        skip: usize,
        out: &'out mut [u8],
        batch: &mut Batch<'out>,
    ) -> Result<()> {
        let Batch { reads, wanted } = batch;
        match extent {
            Extent::Inline { compression, logical, bytes } => {
                let expanded = self.expand_inline(*compression, *logical, bytes)?;
                for (index, byte) in out.iter_mut().enumerate() {
                    *byte = expanded.get(skip + index).copied().unwrap_or(0);
                }
            }
            Extent::Plain { .. } => {
                let first = align_down(skip as u64, SECTOR_BYTES);
                let end = (skip + out.len()) as u64;
                let part = extent.part(first, sector_round(end) - first);
                let Extent::Plain { addr, len: bytes, checksum_kind, checksums } = part else {
                    return Ok(());
                };
                let source = DataSource::Plain { addr, len: bytes, checksum_kind, checksums };
                wanted.push(Wanted { read: reads.len(), from: skip - first as usize, out });
                reads.push(DataRead::new(source));
            }
            Extent::Packed { blob, offset, .. } => {
                let from = *offset as usize + skip;
                if from == 0 && out.len() == blob.logical as usize {
                    reads.push(DataRead::whole(*blob, out));
                    return Ok(());
                }
                // Neighbouring items may name one blob: it is read once.
                let same = |read: &DataRead<'_>| match &read.source {
                    DataSource::Packed { blob: other } => other == blob && read.out.is_none(),
                    DataSource::Plain { .. } => false,
                };
                if !reads.last().is_some_and(same) {
                    reads.push(DataRead::new(DataSource::Packed { blob: *blob }));
                }
                wanted.push(Wanted { read: reads.len() - 1, from, out });
            }
            Extent::Promised { .. } => out.fill(0),
        }
        Ok(())
    }

    fn expand_inline(
        &self,
        kind: crate::format::ptr::CompressionKind,
        logical: u32,
        bytes: &[u8],
    ) -> Result<Vec<u8>> {
        if kind == crate::format::ptr::CompressionKind::None {
            return Ok(bytes.to_vec());
        }
        let mut out = alloc::vec![0; logical as usize];
        if self.engine.store.platform.codecs.zstd_expand(bytes, &mut out) {
            return Ok(out);
        }
        let addr = crate::units::Logical(0);
        Err(Error::Corrupt { what: "inline data does not expand", addr })
    }

    /// The sector at `at` as it is now; `None` when it reads as zeros. The caller holds the lock.
    fn read_sector(&self, ino: Ino, state: &State, at: u64) -> Result<Option<Buf>> {
        let view: Arc<View> = self.subvol.view();
        let segments = self.subvol.layout(&view.tree, ino, state, at, at + SECTOR_BYTES)?;
        if segments.iter().all(|s| matches!(s.place, Place::Zeros { .. })) {
            return Ok(None);
        }
        let mut buf = Buf::zeroed(SECTOR_BYTES as usize)?;
        self.read_segments(&segments, at, &mut buf)?;
        Ok(Some(buf))
    }

    /// A file that grows beyond what is kept in the tree takes its first sector out of it. Returns
    /// the sector that is to be put.
    fn leave_tree(&self, ino: Ino, state: &State, new_size: u64) -> Result<Option<Buf>> {
        let old = state.item.size;
        if old == 0 || old > INLINE_LIMIT || new_size <= INLINE_LIMIT {
            return Ok(None);
        }
        self.read_sector(ino, state, 0)
    }

    /// Puts content in place of a range; the inode has been touched.
    pub(super) fn put(
        &self,
        change: &mut Change<'_>,
        state: &mut State,
        at: u64,
        len: u64,
        content: Content,
    ) {
        let before = state.ranges.memory();
        state.ranges.put(at, len, content, change.garbage());
        self.engine.store.dirty.adjust(before, state.ranges.memory());
    }

    fn put_bytes(&self, change: &mut Change<'_>, state: &mut State, at: u64, data: Slice) {
        let before = state.ranges.memory();
        state.ranges.put_bytes(at, data, change.garbage());
        self.engine.store.dirty.adjust(before, state.ranges.memory());
    }

    pub(super) fn do_write(
        &self,
        ino: Ino,
        offset: u64,
        bytes: &[u8],
        flags: WriteFlags,
    ) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(offset);
        }
        let (room, items) = write_room(bytes.len() as u64);
        let inode = self.inode(ino)?;
        let mut reservation = match self.reserve(room, items, Class::Normal) {
            Err(Error::NoSpace) => self.promised_room(&inode, offset, bytes.len() as u64, items)?,
            other => other?,
        };
        // Copied before the lock is taken, when the place is known.
        let pool = &self.engine.store.pool;
        let early = if flags.append { None } else { Some(fill(pool, offset, bytes)?) };
        let mut state = inode.state.write();
        check_writable(&state)?;
        let at = if flags.append { state.item.size } else { offset };
        let end = at.checked_add(bytes.len() as u64).filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(Error::Posix(Errno::FBig))?;
        let mut buf = match early {
            Some(buf) => buf,
            None => fill(pool, at, bytes)?,
        };
        let start = align_down(at, SECTOR_BYTES);
        self.complete(ino, &state, at, end, &mut buf)?;
        let first = if start > 0 { self.leave_tree(ino, &state, end)? } else { None };

        let mut change = Change::begin(&self.subvol);
        let mut item = state.item;
        if flags.kill_priv {
            item.mode = without_set_id(item.mode);
            self.drop_capabilities(&mut change, ino, &mut item)?;
        }
        item.size = item.size.max(end);
        match flags.has_times && self.is_recent(&item) {
            true => item.version = item.version.wrapping_add(1),
            false => self.stamp(&mut item),
        }
        let is_first = state.txg != change.txg();
        let is_new_mode = item.mode != state.item.mode || item.xattr_hint != state.item.xattr_hint;
        if is_new_mode {
            change.log_inode(&inode, &mut state, item);
        } else {
            change.touch(&inode, &mut state);
            state.item = item;
        }
        let before = state.ranges.data_bytes();
        if let Some(sector) = first {
            self.put_bytes(&mut change, &mut state, 0, sector.into_slice());
        }
        self.put_bytes(&mut change, &mut state, start, buf.into_slice());
        let more = state.ranges.data_bytes().saturating_sub(before);
        let adds_items = is_first || is_new_mode || more > 0;
        give_back_surplus(&inode, &mut reservation, more, adds_items);
        let data = reservation.data();
        self.keep(change.txg(), reservation, data);
        change.finish();
        let came = state.ranges.bytes_since_early();
        drop(state);
        let pressed = self.engine.store.dirty.over_soft();
        if came >= if pressed { EARLY_BYTES_PRESSED } else { EARLY_BYTES } {
            self.write_bytes(&inode, true);
        }
        Ok(at)
    }

    /// Whether a file was changed a moment ago.
    fn is_recent(&self, item: &InodeItem) -> bool {
        let (now, then) = (self.now(), item.mtime());
        then <= now && now.secs.saturating_sub(then.secs) <= RECENT_SECONDS
    }

    pub(super) fn do_check_write(&self, ino: Ino, bytes: u64) -> Result<()> {
        let (room, items) = write_room(bytes);
        match self.reserve(room, items, Class::Normal) {
            // It depends on where it would be written.
            Err(Error::NoSpace) if self.inode(ino)?.state.read().item.promised_bytes > 0 => Ok(()),
            reserved => reserved.map(drop),
        }
    }

    /// Room for a write into a range that fallocate promised, when there is no other.
    fn promised_room(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        len: u64,
        items: u64,
    ) -> Result<Reservation> {
        let end = offset.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX);
        let end = sector_round(end.ok_or(Error::Posix(Errno::FBig))?);
        let start = align_down(offset, SECTOR_BYTES);
        {
            let state = inode.state.read();
            check_file(&state)?;
            let view = self.subvol.view();
            let segments = self.subvol.layout(&view.tree, inode.ino, &state, start, end)?;
            let promised = |s: &Segment| matches!(s.place, Place::Zeros { promised: true });
            if !segments.iter().all(promised) {
                return Err(Error::NoSpace);
            }
        }
        let metadata = self.reserve(0, items, Class::Admin)?;
        let data = self.engine.spend_promise(end - start)?;
        // Of one class, so they can be kept as one.
        let mut both = metadata;
        both.join(data);
        Ok(both)
    }

    /// Fills the parts of the first and last sector that a write leaves alone.
    fn complete(&self, ino: Ino, state: &State, at: u64, end: u64, buf: &mut Buf) -> Result<()> {
        let start = align_down(at, SECTOR_BYTES);
        let head = (at - start) as usize;
        let size = state.item.size;
        if head > 0 && start < size {
            if let Some(old) = self.read_sector(ino, state, start)? {
                buf[..head].copy_from_slice(&old[..head]);
            }
        }
        let tail_at = align_down(end, SECTOR_BYTES);
        let tail = (end - tail_at) as usize;
        if tail > 0 && tail_at < size && size > end {
            if let Some(old) = self.read_sector(ino, state, tail_at)? {
                let from = (tail_at - start) as usize + tail;
                buf[from..].copy_from_slice(&old[tail..]);
            }
        }
        Ok(())
    }

    /// Writes bytes of a file that are in memory before a commit does, all of them or only whole
    /// windows. What somebody else is writing at the moment is left to them.
    pub(super) fn write_bytes(&self, inode: &Arc<Inode>, whole_windows_only: bool) {
        let Some(_only_one) = inode.flushing.try_lock() else { return };
        let (txg, tasks) = {
            let state = inode.state.read();
            if state.txg.0 == 0 {
                return;
            }
            (state.txg, data::tasks(&self.subvol, inode, &state, state.txg, whole_windows_only))
        };
        // Bytes that could not be written stay in memory. Without room the commit may yet find
        // some; after an error of a device nothing more is published.
        if let Err(error @ Error::Device { .. }) = data::write_tasks(&self.engine.store, tasks) {
            self.engine.fail(txg, &error);
        }
        let mut state = inode.state.write();
        if let Some(ranges) = state.ranges_of(txg) {
            ranges.written_early();
        }
    }

    pub(super) fn truncate(&self, ino: Ino, size: u64) -> Result<()> {
        if size > FILE_BYTES_MAX {
            return Err(Errno::FBig.into());
        }
        let inode = self.inode(ino)?;
        let at = align_down(size, SECTOR_BYTES);
        let keep = (size - at) as usize;
        let (reservation, mut state) = loop {
            let class = match size <= inode.state.read().item.size {
                true => Class::Delete,
                false => Class::Normal,
            };
            // Growing may move a small file out of the tree, cutting leaves a part of a sector.
            let cut = if keep > 0 { SECTOR_BYTES } else { 0 };
            let room = if class == Class::Normal { SECTOR_BYTES } else { cut };
            let dropped = self.subvol.extents_behind(&inode, size)?;
            let reservation = self.reserve_dropping(room, 4, dropped, class)?;
            let state = inode.state.write();
            if class == Class::Normal || size <= state.item.size {
                break (reservation, state);
            }
        };
        check_writable(&state)?;
        if state.item.flags & flag::APPEND != 0 {
            return Err(Errno::Perm.into());
        }
        let mut last = None;
        if size < state.item.size && keep > 0 {
            last = self.read_sector(ino, &state, at)?;
        }
        let first = self.leave_tree(ino, &state, size)?;
        let mut change = Change::begin(&self.subvol);
        change.touch(&inode, &mut state);
        if size < state.item.size {
            let end = sector_round(size);
            self.put(&mut change, &mut state, end, u64::MAX - end, Content::Hole);
            if let Some(mut sector) = last {
                sector[keep..].fill(0);
                self.put_bytes(&mut change, &mut state, at, sector.into_slice());
            }
        }
        if let Some(sector) = first {
            self.put_bytes(&mut change, &mut state, 0, sector.into_slice());
        }
        let mut item = state.item;
        if size != item.size {
            item.size = size;
        }
        self.stamp(&mut item);
        state.item = item;
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    pub(super) fn do_fallocate(
        &self,
        ino: Ino,
        op: Fallocate,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        if len == 0 {
            return Err(Errno::Inval.into());
        }
        let end = offset.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX);
        let end = end.ok_or(Error::Posix(Errno::FBig))?;
        match op {
            Fallocate::Allocate { keep_size } => self.promise(ino, offset, end, keep_size),
            Fallocate::PunchHole => self.clear(ino, offset, end, false, true),
            Fallocate::ZeroRange { keep_size } => self.clear(ino, offset, end, true, keep_size),
            Fallocate::CollapseRange => self.shift(ino, offset, len, true),
            Fallocate::InsertRange => self.shift(ino, offset, len, false),
        }
    }

    /// Promises room for every hole in a range.
    fn promise(&self, ino: Ino, offset: u64, end: u64, keep_size: bool) -> Result<()> {
        let (start, stop) = (align_down(offset, SECTOR_BYTES), sector_round(end));
        let inode = self.inode(ino)?;
        // Items that stand between the holes are written again with their leaves.
        let look = |state: &State| -> Result<(Vec<(u64, u64)>, Pieces)> {
            let view = self.subvol.view();
            let segments = self.subvol.layout(&view.tree, ino, state, start, stop)?;
            let hole = |s: &&Segment| matches!(s.place, Place::Zeros { promised: false });
            let holes = segments.iter().filter(hole).map(|s| (s.at, s.len)).collect();
            Ok((holes, Pieces::of(&segments)))
        };
        let sum = |holes: &[(u64, u64)]| holes.iter().map(|(_, len)| len).sum::<u64>();
        loop {
            let (holes, expected) = look(&inode.state.read())?;
            let wanted = sum(&holes);
            self.within_limits(wanted)?;
            // Nothing is shared.
            let mut items = expected;
            items.extents = 0;
            let reservation = self.reserve_pieces(wanted + SECTOR_BYTES, 5, &items, 0)?;
            let mut state = inode.state.write();
            check_writable(&state)?;
            let (holes, pieces) = look(&state)?;
            if sum(&holes) > wanted || !pieces.is_within(&expected) {
                continue;
            }
            let new_size = if keep_size { state.item.size } else { state.item.size.max(end) };
            let first = self.leave_tree(ino, &state, new_size)?;
            let mut change = Change::begin(&self.subvol);
            change.touch(&inode, &mut state);
            for (at, len) in holes {
                self.put(&mut change, &mut state, at, len, Content::Promised);
            }
            if let Some(sector) = first {
                self.put_bytes(&mut change, &mut state, 0, sector.into_slice());
            }
            let mut item = state.item;
            if new_size != item.size {
                item.size = new_size;
                item.set_mtime(self.now());
            }
            self.stamp_ctime(&mut item);
            state.item = item;
            self.engine.keep(change.txg(), reservation);
            change.finish();
            return Ok(());
        }
    }

    /// Makes a range read as zeros: a hole, or promised room.
    fn clear(
        &self,
        ino: Ino,
        offset: u64,
        end: u64,
        promised: bool,
        keep_size: bool,
    ) -> Result<()> {
        let (start, stop) = (align_down(offset, SECTOR_BYTES), sector_round(end));
        let room = if promised { stop - start } else { 0 };
        let class = if promised { Class::Normal } else { Class::Delete };
        let inode = self.inode(ino)?;
        let dropped = self.subvol.extents_behind(&inode, start)?;
        let reservation = self.reserve_dropping(room + 2 * SECTOR_BYTES, 6, dropped, class)?;
        let mut state = inode.state.write();
        check_writable(&state)?;
        let size = state.item.size;
        let new_size = if keep_size { size } else { size.max(end) };
        let first = self.leave_tree(ino, &state, new_size)?;
        // Sectors that keep some of their bytes.
        let mut edges: Vec<(u64, Buf)> = Vec::new();
        for at in [start, align_down(end, SECTOR_BYTES)] {
            let covered = offset <= at && (end >= at + SECTOR_BYTES || end >= size);
            if covered || edges.iter().any(|(edge, _)| *edge == at) || at >= stop {
                continue;
            }
            if let Some(mut sector) = self.read_sector(ino, &state, at)? {
                let from = offset.max(at) - at;
                let to = end.min(at + SECTOR_BYTES) - at;
                sector[from as usize..to as usize].fill(0);
                edges.push((at, sector));
            }
        }
        let mut change = Change::begin(&self.subvol);
        change.touch(&inode, &mut state);
        if let Some(sector) = first {
            self.put_bytes(&mut change, &mut state, 0, sector.into_slice());
        }
        let content = if promised { Content::Promised } else { Content::Hole };
        self.put(&mut change, &mut state, start, stop - start, content);
        for (at, sector) in edges {
            self.put_bytes(&mut change, &mut state, at, sector.into_slice());
        }
        let mut item = state.item;
        item.size = new_size;
        self.stamp(&mut item);
        state.item = item;
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    /// Collapses (`down`) or inserts a range: what follows moves by sharing its extents at the new
    /// place and dropping them at the old. Bytes that have no extent yet may be written at both.
    fn shift(&self, ino: Ino, offset: u64, len: u64, down: bool) -> Result<()> {
        if offset % SECTOR_BYTES != 0 || len % SECTOR_BYTES != 0 {
            return Err(Errno::Inval.into());
        }
        let inode = self.inode(ino)?;
        let count = |state: &State| -> Result<Pieces> {
            let view = self.subvol.view();
            let stop = sector_round(state.item.size);
            let moved = self.subvol.layout(&view.tree, ino, state, offset.min(stop), stop)?;
            Ok(Pieces::of(&moved))
        };
        let (reservation, mut state) = loop {
            let expected = count(&inode.state.read())?;
            let room = 2 * SECTOR_BYTES + expected.unwritten;
            let reserved = self.reserve_pieces(room, 11, &expected, expected.extents);
            if is_full(&reserved) && count(&inode.state.read())?.unwritten < expected.unwritten {
                // Looking for room has written some of them.
                continue;
            }
            let reservation = reserved?;
            let state = inode.state.write();
            check_writable(&state)?;
            if count(&state)?.is_within(&expected) {
                break (reservation, state);
            }
        };
        let size = state.item.size;
        let (from, to, new_size) = if down {
            if offset + len >= size {
                return Err(Errno::Inval.into());
            }
            (offset + len, offset, size - len)
        } else {
            if offset >= size {
                return Err(Errno::Inval.into());
            }
            let new_size = size.checked_add(len).filter(|s| *s <= FILE_BYTES_MAX);
            (offset, offset + len, new_size.ok_or(Error::Posix(Errno::FBig))?)
        };
        let first = self.leave_tree(ino, &state, new_size)?;
        let view = self.subvol.view();
        let stop = sector_round(size);
        let segments = self.subvol.layout(&view.tree, ino, &state, from, stop)?;
        let mut moved = Vec::with_capacity(segments.len());
        for segment in segments {
            let at = segment.at - from + to;
            let content = match segment.place {
                Place::Extent(Extent::Inline { .. }) => {
                    let sector = self.read_sector(ino, &state, segment.at)?;
                    moved.push((at, SECTOR_BYTES, None, sector));
                    continue;
                }
                Place::Memory(data) => {
                    moved.push((at, segment.len, Some(Err(data)), None));
                    continue;
                }
                Place::Extent(extent) => Content::Shared(extent),
                Place::Zeros { promised: true } => Content::Promised,
                Place::Zeros { promised: false } => Content::Hole,
            };
            moved.push((at, segment.len, Some(Ok(content)), None));
        }
        let mut change = Change::begin(&self.subvol);
        change.touch(&inode, &mut state);
        if let Some(sector) = first {
            if offset > 0 {
                self.put_bytes(&mut change, &mut state, 0, sector.into_slice());
            }
        }
        self.put(&mut change, &mut state, offset, u64::MAX - offset, Content::Hole);
        for (at, len, content, sector) in moved {
            match (content, sector) {
                (Some(Ok(content)), _) => self.put(&mut change, &mut state, at, len, content),
                (Some(Err(data)), _) => self.put_bytes(&mut change, &mut state, at, data),
                (None, Some(sector)) => {
                    self.put_bytes(&mut change, &mut state, at, sector.into_slice());
                }
                (None, None) => {}
            }
        }
        let mut item = state.item;
        item.size = new_size;
        self.stamp(&mut item);
        state.item = item;
        self.engine.keep(change.txg(), reservation);
        change.finish();
        Ok(())
    }

    pub(super) fn do_seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let inode = self.inode(ino)?;
        let state = inode.state.read();
        check_file(&state)?;
        let size = state.item.size;
        if offset >= size {
            return Err(Errno::NxIo.into());
        }
        let view = self.subvol.view();
        let (mut at, mut step) = (align_down(offset, SECTOR_BYTES), SEEK_STEP);
        let stop = sector_round(size);
        while at < stop {
            let end = at.saturating_add(step).min(stop);
            let mut is_dense = false;
            for segment in self.subvol.layout(&view.tree, ino, &state, at, end)? {
                is_dense |= matches!(segment.place, Place::Extent(_));
                let is_hole = matches!(segment.place, Place::Zeros { .. });
                if is_hole == (what == Seek::Hole) {
                    return Ok(segment.at.max(offset).min(size));
                }
            }
            at = end;
            // Far apart extents of a sparse file are found in few steps; those of a dense one are
            // looked at by and by.
            step = if is_dense { SEEK_STEP } else { step.saturating_mul(2) };
        }
        match what {
            Seek::Data => Err(Errno::NxIo.into()),
            Seek::Hole => Ok(size),
        }
    }

    pub(super) fn do_copy_range(
        &self,
        source: (Ino, u64),
        target: (Ino, u64),
        len: u64,
    ) -> Result<u64> {
        let from = self.inode(source.0)?;
        let to = self.inode(target.0)?;
        let size = {
            let state = from.state.read();
            check_file(&state)?;
            state.item.size
        };
        check_file(&to.state.read())?;
        let len = len.min(size.saturating_sub(source.1));
        if len == 0 {
            return Ok(0);
        }
        let end = target.1.checked_add(len).filter(|end| *end <= FILE_BYTES_MAX);
        end.ok_or(Error::Posix(Errno::FBig))?;
        let overlaps = source.1 < target.1 + len && target.1 < source.1 + len;
        if source.0 == target.0 && overlaps {
            return Err(Errno::Inval.into());
        }
        let shared = self.share_range(&from, source.1, &to, target.1, len)?;
        if shared > 0 {
            return Ok(shared);
        }
        self.copy_bytes(source, target, len)
    }

    /// Shares the whole sectors of a range, if both ends are aligned alike. Returns how many bytes
    /// are done; zero when nothing could be shared.
    fn share_range(
        &self,
        from: &Arc<Inode>,
        source: u64,
        to: &Arc<Inode>,
        target: u64,
        len: u64,
    ) -> Result<u64> {
        if source % SECTOR_BYTES != 0 || target % SECTOR_BYTES != 0 {
            return Ok(0);
        }
        let layout = |ino: Ino, state: &State, at: u64| {
            let stop = sector_round(at + len.min(state.item.size.saturating_sub(at)));
            let view = self.subvol.view();
            self.subvol.layout(&view.tree, ino, state, at, stop).map(|all| Pieces::of(&all))
        };
        let shared = |state: &State| layout(from.ino, state, source);
        if shared(&from.state.read())?.unwritten > 0 {
            // Bytes that have no extent to share yet would be written twice.
            self.write_bytes(from, false);
        }
        let replaced = |state: &State| layout(to.ino, state, target).map(|pieces| pieces.extents);
        self.within_limits(sector_round(len))?;
        let (reservation, mut locked) = loop {
            let expected = shared(&from.state.read())?;
            let dropped = replaced(&to.state.read())?;
            let room = expected.unwritten + 2 * SECTOR_BYTES;
            let reserved = self.reserve_pieces(room, 4, &expected, dropped);
            if is_full(&reserved) && shared(&from.state.read())?.unwritten < expected.unwritten {
                // Looking for room has written some of them.
                continue;
            }
            let reservation = reserved?;
            let locked = Locked::new(&[from, to]);
            let is_within = shared(locked.get(from.ino))?.is_within(&expected);
            if is_within && replaced(locked.get(to.ino))? <= dropped {
                break (reservation, locked);
            }
        };
        let source_state = locked.get(from.ino);
        check_writable(locked.get(to.ino))?;
        let (size, target_size) = (source_state.item.size, locked.get(to.ino).item.size);
        let mut len = len.min(size.saturating_sub(source));
        len = sharable((source, size), (target, target_size), len);
        if len == 0 || target + len <= INLINE_LIMIT || size <= INLINE_LIMIT {
            return Ok(0);
        }
        let view = self.subvol.view();
        let stop = source + sector_round(len);
        let segments = self.subvol.layout(&view.tree, from.ino, source_state, source, stop)?;
        if segments.iter().any(|s| matches!(s.place, Place::Extent(Extent::Inline { .. }))) {
            return Ok(0);
        }
        let end = target + len;
        let first = match target {
            0 => None,
            _ => self.leave_tree(to.ino, locked.get(to.ino), end)?,
        };
        let mut change = Change::begin(&self.subvol);
        let state = locked.get_mut(to.ino);
        change.touch(to, state);
        if let Some(sector) = first {
            self.put_bytes(&mut change, state, 0, sector.into_slice());
        }
        for segment in segments {
            let at = segment.at - source + target;
            match segment.place {
                Place::Memory(data) => self.put_bytes(&mut change, state, at, data),
                Place::Extent(extent) => {
                    self.put(&mut change, state, at, segment.len, Content::Shared(extent));
                }
                Place::Zeros { .. } => {
                    self.put(&mut change, state, at, segment.len, Content::Hole);
                }
            }
        }
        let mut item = state.item;
        item.size = item.size.max(end);
        self.stamp(&mut item);
        state.item = item;
        self.keep(change.txg(), reservation, sector_round(len));
        change.finish();
        Ok(len)
    }

    fn copy_bytes(&self, source: (Ino, u64), target: (Ino, u64), len: u64) -> Result<u64> {
        let mut buf = Buf::zeroed(len.min(1 << 20) as usize)?;
        let mut done = 0;
        while done < len {
            let want = (len - done).min(buf.len() as u64) as usize;
            let count = self.do_read(source.0, source.1 + done, &mut buf[..want])?;
            if count == 0 {
                break;
            }
            let flags = WriteFlags::default();
            self.do_write(target.0, target.1 + done, &buf[..count], flags)?;
            done += count as u64;
        }
        Ok(done)
    }
}

/// How much of a range may be shared, the offset of which in the source and the source's size are
/// given, and the same of the target: whole sectors, and of the last one a part when it is the last
/// of both files.
pub(super) fn sharable(source: (u64, u64), target: (u64, u64), len: u64) -> u64 {
    let ends_both = source.0 + len == source.1 && target.0 + len >= target.1;
    match ends_both {
        true => len,
        false => align_down(len, SECTOR_BYTES),
    }
}

/// Bytes of data, and items, that a write of so many bytes may need.
fn write_room(bytes: u64) -> (u64, u64) {
    let room = sector_round(bytes) + 2 * SECTOR_BYTES;
    (room, 3 + room.div_ceil(512 << 10))
}

fn is_full(reserved: &Result<Reservation>) -> bool {
    matches!(reserved, Err(Error::NoSpace))
}

/// Gives back what a write reserved and does not need: data beyond the `more` bytes by which it
/// made those in memory more, because for those that it replaced room is reserved; and metadata,
/// unless it adds to what the group has to store of the inode. On a nearly full pool small writes
/// in a row would else need a commit every few of them. The caller holds the lock of the inode's
/// state.
fn give_back_surplus(inode: &Inode, reservation: &mut Reservation, more: u64, adds_items: bool) {
    // Who is writing the replaced bytes to their place has spent what was reserved for them.
    if inode.flushing.try_lock().is_none() {
        return;
    }
    let data = reservation.data().saturating_sub(more);
    let metadata = if adds_items { 0 } else { reservation.metadata() };
    reservation.shrink(data, metadata);
}

/// A buffer of whole sectors that holds `bytes` at their place, zeros around them.
fn fill(pool: &Pool, at: u64, bytes: &[u8]) -> Result<Buf> {
    let head = (at % SECTOR_BYTES) as usize;
    let end = head + bytes.len();
    let mut buf = pool.buffer(end)?;
    buf[..head].fill(0);
    buf[head..end].copy_from_slice(bytes);
    buf[end..].fill(0);
    Ok(buf)
}
