//! Range maps: what one group has made of the ranges of a file.
//!
//! A sorted map of non-overlapping pieces. What no piece covers is as the group before left it.
//! Offsets and lengths are multiples of the sector size, except that a hole may reach to the end of
//! the offset space (truncation). Putting a piece cuts what was there; space that a cut piece had
//! been given in this same group is handed back to the caller, to be freed.
//!
//! Bytes carry an id that is unique in the map: when the writer comes back with extents for bytes
//! it took out of the map, ids tell which of them are still current.

use crate::buf::Slice;
use crate::format::extent::{Blob, Extent};
use crate::format::space::Run;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// What a range has become.
#[derive(Clone, Debug)]
pub enum Content {
    /// Bytes in memory.
    Bytes {
        /// As many as the piece is long.
        data: Slice,
        /// Identity of the write they came from.
        id: u64,
    },
    /// An extent written by this group: its first reference.
    Written(Extent),
    /// An extent that something else refers to already: one more reference.
    Shared(Extent),
    /// Reads as zeros, takes nothing.
    Hole,
    /// Reads as zeros, room is promised.
    Promised,
}

/// A piece of a range map.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Bytes of the file it covers.
    pub len: u64,
    /// What they have become.
    pub content: Content,
    /// Whether the intent log has it.
    pub logged: bool,
}

impl Piece {
    fn checksum_bytes(&self) -> u64 {
        match &self.content {
            Content::Written(Extent::Plain { checksums, .. })
            | Content::Shared(Extent::Plain { checksums, .. }) => checksums.len() as u64,
            _ => 0,
        }
    }

    /// Bytes that the intent log would have to carry: in memory, and not logged.
    fn fresh_bytes(&self) -> u64 {
        match &self.content {
            Content::Bytes { .. } if !self.logged => self.len,
            _ => 0,
        }
    }

    fn part(&self, from: u64, len: u64) -> Piece {
        let content = match &self.content {
            Content::Bytes { data, id } => {
                Content::Bytes { data: data.compact_part(from as usize, len as usize), id: *id }
            }
            Content::Written(extent) => Content::Written(extent.part(from, len)),
            Content::Shared(extent) => Content::Shared(extent.part(from, len)),
            Content::Hole => Content::Hole,
            Content::Promised => Content::Promised,
        };
        Piece { len, content, logged: self.logged }
    }
}

/// Changes of one group to the content of one file.
#[derive(Debug, Default)]
pub struct RangeMap {
    pieces: BTreeMap<u64, Piece>,
    /// Where the pieces begin that the intent log lacks: `fsync` looks at these only.
    fresh: BTreeSet<u64>,
    /// Bytes in memory of those.
    fresh_bytes: u64,
    data_bytes: u64,
    /// Bytes of the checksums of extents, which become part of items.
    checksum_bytes: u64,
    next_id: u64,
    /// Bytes that the last early write left in memory.
    left_early: u64,
}

/// What a piece costs in memory beside its bytes and checksums: keys and value, and a share of the
/// maps' nodes.
const PIECE_BYTES: u64 = 2 * (2 * 8 + core::mem::size_of::<Piece>() as u64);

/// Where an item's or piece's blob begins in the file: items of one blob with one anchor share one
/// reference.
pub fn anchor(at: u64, offset: u32) -> u64 {
    at.wrapping_sub(u64::from(offset))
}

impl RangeMap {
    /// Whether the group changed nothing.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes of the file held in memory.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Memory that the map takes, in bytes: those of the file, and what its pieces cost.
    pub fn memory(&self) -> u64 {
        self.data_bytes + self.checksum_bytes + self.pieces.len() as u64 * PIECE_BYTES
    }

    /// Bytes that came since the last early write. What that one left is scattered, and looking at
    /// it again with every write would take time in proportion to its square.
    pub fn bytes_since_early(&self) -> u64 {
        self.data_bytes.saturating_sub(self.left_early)
    }

    /// An early write is over.
    pub fn written_early(&mut self) {
        self.left_early = self.data_bytes;
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Every piece with its offset, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.pieces.iter().map(|(at, piece)| (*at, piece))
    }

    /// Whether the intent log lacks any piece.
    pub fn lacks(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The pieces that the intent log lacks, with their offsets, ascending.
    pub fn fresh(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.fresh.iter().map(|at| (*at, &self.pieces[at]))
    }

    /// Bytes of the file in memory that the intent log lacks.
    pub fn fresh_bytes(&self) -> u64 {
        self.fresh_bytes
    }

    /// The intent log is given every piece that it lacks, by way of `log`.
    pub fn log_fresh(&mut self, mut log: impl FnMut(u64, &Piece)) {
        self.fresh_bytes = 0;
        for at in core::mem::take(&mut self.fresh) {
            if let Some(piece) = self.pieces.get_mut(&at) {
                piece.logged = true;
                log(at, piece);
            }
        }
    }

    fn insert(&mut self, at: u64, piece: Piece) {
        match piece.logged {
            true => self.fresh.remove(&at),
            false => self.fresh.insert(at),
        };
        self.checksum_bytes += piece.checksum_bytes();
        self.fresh_bytes += piece.fresh_bytes();
        if let Some(old) = self.pieces.insert(at, piece) {
            self.checksum_bytes -= old.checksum_bytes();
            self.fresh_bytes -= old.fresh_bytes();
        }
    }

    fn remove(&mut self, at: u64) -> Option<Piece> {
        self.fresh.remove(&at);
        let piece = self.pieces.remove(&at)?;
        self.checksum_bytes -= piece.checksum_bytes();
        self.fresh_bytes -= piece.fresh_bytes();
        Some(piece)
    }

    /// The pieces that overlap `start..end`, ascending; the first may begin before `start`.
    pub fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, &Piece)> {
        let first = self
            .pieces
            .range(..start)
            .next_back()
            .filter(|(at, piece)| **at + piece.len > start)
            .map_or(start, |(at, _)| *at);
        self.pieces.range(first..end.max(first)).map(|(at, piece)| (*at, piece))
    }

    /// Puts a piece, cutting what it covers. Runs that this group had taken and nothing in the map
    /// names any more are appended to `garbage`.
    pub fn put(&mut self, at: u64, len: u64, content: Content, garbage: &mut Vec<Run>) {
        assert!(len > 0 && at.checked_add(len).is_some(), "piece {at}+{len}");
        self.cut(at, len, garbage);
        if let Content::Bytes { data, .. } = &content {
            assert_eq!(data.len() as u64, len, "bytes of another length than their range");
            self.data_bytes += len;
        }
        self.insert(at, Piece { len, content, logged: false });
    }

    /// Puts bytes under a new identity.
    pub fn put_bytes(&mut self, at: u64, data: Slice, garbage: &mut Vec<Run>) {
        let id = self.next_id;
        self.next_id += 1;
        self.put(at, data.len() as u64, Content::Bytes { data, id }, garbage);
    }

    /// Makes the map silent about `at..at + len`.
    fn cut(&mut self, at: u64, len: u64, garbage: &mut Vec<Run>) {
        let end = at + len;
        let hit: Vec<u64> = self.overlapping(at, end).map(|(start, _)| start).collect();
        let mut dead_blobs: BTreeMap<(crate::units::Logical, u64), Blob> = BTreeMap::new();
        for start in hit {
            let piece = self.remove(start).expect("listed just now");
            let piece_end = start + piece.len;
            let (from, to) = (at.max(start), end.min(piece_end));
            if start < from {
                self.insert(start, piece.part(0, from - start));
            }
            if to < piece_end {
                self.insert(to, piece.part(to - start, piece_end - to));
            }
            match &piece.content {
                Content::Bytes { .. } => self.data_bytes -= to - from,
                Content::Written(Extent::Plain { addr, .. }) => garbage.push(Run {
                    addr: crate::units::Logical(addr.0 + (from - start)),
                    bytes: to - from,
                }),
                Content::Written(Extent::Packed { blob, offset, .. }) => {
                    dead_blobs.insert((blob.addr, anchor(start, *offset)), *blob);
                }
                _ => {}
            }
        }
        // By blob: its parts need not be neighbours, another may have been written in between.
        for ((_, anchor), blob) in dead_blobs {
            if !self.names_blob(anchor, &blob) {
                garbage.push(Run { addr: blob.addr, bytes: blob.allocated() });
            }
        }
    }

    /// Whether any written piece in the blob's window still names it.
    fn names_blob(&self, window: u64, blob: &Blob) -> bool {
        // The window may begin "before" zero: then it wraps, and its visible part starts at zero.
        let end = window.wrapping_add(u64::from(blob.logical));
        let start = if end < window { 0 } else { window };
        self.overlapping(start, end).any(|(at, piece)| {
            matches!(&piece.content, Content::Written(Extent::Packed { blob: b, offset, .. })
                if b.addr == blob.addr && anchor(at, *offset) == window)
        })
    }

    /// Replaces bytes by the extent they were written to, wherever the bytes of `ids` (by file
    /// offset order) are still there. `extent` covers `at..at + extent.len()`. What is no longer
    /// current of the extent becomes garbage.
    pub fn written(&mut self, at: u64, extent: &Extent, ids: &[u64], garbage: &mut Vec<Run>) {
        let end = at + extent.len();
        let current: Vec<(u64, u64, bool)> = self
            .overlapping(at, end)
            .filter_map(|(start, piece)| match &piece.content {
                Content::Bytes { id, .. } if ids.contains(id) => {
                    Some((at.max(start), end.min(start + piece.len), piece.logged))
                }
                _ => None,
            })
            .collect();
        let mut used_to = at;
        let mut used = false;
        for (from, to, logged) in current {
            if let Extent::Plain { .. } = extent {
                garbage.extend(plain_run(extent, at, used_to, from));
            }
            let mut none = Vec::new();
            self.cut(from, to - from, &mut none);
            debug_assert!(none.is_empty(), "bytes have no space to give back");
            let part = extent.part(from - at, to - from);
            self.insert(from, Piece { len: to - from, content: Content::Written(part), logged });
            used_to = to;
            used = true;
        }
        match extent {
            Extent::Plain { .. } => garbage.extend(plain_run(extent, at, used_to, end)),
            Extent::Packed { blob, .. } if !used => {
                garbage.push(Run { addr: blob.addr, bytes: blob.allocated() });
            }
            _ => {}
        }
        self.join_written(at, end);
    }

    /// Joins neighbouring plain pieces that are neighbours on disk too, so that one write's pieces
    /// become as few items as possible.
    fn join_written(&mut self, start: u64, end: u64) {
        let starts: Vec<u64> =
            self.overlapping(start.saturating_sub(1), end).map(|p| p.0).collect();
        let mut last: Option<u64> = None;
        for at in starts {
            if let Some(left) = last {
                if self.try_join(left, at) {
                    continue;
                }
            }
            last = Some(at);
        }
    }

    fn try_join(&mut self, left: u64, right: u64) -> bool {
        let (Some(a), Some(b)) = (self.pieces.get(&left), self.pieces.get(&right)) else {
            return false;
        };
        if left + a.len != right || a.logged != b.logged {
            return false;
        }
        let (Content::Written(x), Content::Written(y)) = (&a.content, &b.content) else {
            return false;
        };
        let Some(joined) = join_plain(x, y) else { return false };
        let piece =
            Piece { len: joined.len(), content: Content::Written(joined), logged: a.logged };
        self.remove(right);
        self.insert(left, piece);
        true
    }

    /// Runs of bytes in memory that neighbour each other: offset, and pieces with their ids.
    pub fn byte_runs(&self) -> Vec<ByteRun> {
        let mut runs: Vec<ByteRun> = Vec::new();
        for (at, piece) in &self.pieces {
            if let Content::Bytes { data, id } = &piece.content {
                match runs.last_mut() {
                    Some(run) if run.at + run.len == *at => {
                        run.len += piece.len;
                        run.slices.push(data.clone());
                        run.ids.push(*id);
                    }
                    _ => runs.push(ByteRun {
                        at: *at,
                        len: piece.len,
                        slices: alloc::vec![data.clone()],
                        ids: alloc::vec![*id],
                    }),
                }
            }
        }
        runs
    }
}

/// Bytes in memory that follow each other in the file.
#[derive(Debug, Clone)]
pub struct ByteRun {
    /// Offset in the file.
    pub at: u64,
    /// Length of all slices together.
    pub len: u64,
    /// The bytes.
    pub slices: Vec<Slice>,
    /// Identities of the slices, one each.
    pub ids: Vec<u64>,
}

fn plain_run(extent: &Extent, at: u64, from: u64, to: u64) -> Option<Run> {
    let Extent::Plain { addr, .. } = extent else { return None };
    (from < to).then(|| Run { addr: crate::units::Logical(addr.0 + (from - at)), bytes: to - from })
}

/// One plain extent out of two that follow each other on disk, if it may be so long.
pub fn join_plain(a: &Extent, b: &Extent) -> Option<Extent> {
    let (
        Extent::Plain { addr, len, checksum_kind, checksums },
        Extent::Plain { addr: addr2, len: len2, checksum_kind: kind2, checksums: sums2 },
    ) = (a, b)
    else {
        return None;
    };
    let max = crate::format::extent::plain_bytes_max(*checksum_kind);
    // Neighbouring addresses may belong to two chunks, which an extent must not span. Chunks begin
    // at multiples of the smallest chunk.
    let may_be_a_chunk = addr2.0 % crate::format::chunk::CHUNK_BYTES_MIN == 0;
    if may_be_a_chunk || addr.0 + len != addr2.0 || checksum_kind != kind2 || len + len2 > max {
        return None;
    }
    let mut joined = Vec::with_capacity(checksums.len() + sums2.len());
    joined.extend_from_slice(checksums);
    joined.extend_from_slice(sums2);
    Some(Extent::Plain {
        addr: *addr,
        len: len + len2,
        checksum_kind: *checksum_kind,
        checksums: joined,
    })
}
