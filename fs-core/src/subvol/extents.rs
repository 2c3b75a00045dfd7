//! What files are made of: reading through the layers, and resolving a group's ranges into items.
//!
//! [`Subvol::layout`] answers what a range of a file is now. [`resolve`] is run by the writer of a
//! group, when the group before is published: it cuts the items that the group's ranges cover, puts
//! the new ones, and says exactly which runs lost or gained a reference.
//!
//! A blob is referenced by a file once per anchor (`format::extent`). So for each (blob, anchor)
//! that a group's ranges touch, what counts is whether any item named it before, and whether any
//! does after:
//!
//! | before | after | |
//! | --- | --- | --- |
//! | yes | no | one reference less |
//! | no | yes, written by this group | its first reference |
//! | no | yes, shared | one reference more |
//!
//! The *birth* of a reference is the group in which it entered the tree. All items that hold one
//! reference together have its birth: parts that are left when an item is cut keep it, and an item
//! that joins a reference that is there takes it over. Snapshots rely on that: a reference born
//! not after a snapshot is in the snapshot too, and must not be given up when the head drops it.

use crate::btree::{Edit, NodeSource, Tree};
use crate::buf::Slice;
use crate::error::Error;
use crate::format::extent::{Blob, Extent};
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::ptr::CompressionKind;
use crate::format::space::Run;
use crate::subvol::inode::{Aside, State};
use crate::subvol::ranges::{anchor, Content, RangeMap};
use crate::subvol::store::Result;
use crate::subvol::{DataDelta, Subvol};
use crate::units::{Ino, Logical, Txg, SECTOR_BYTES};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;

/// Files up to this many bytes are kept in the tree.
pub const INLINE_LIMIT: u64 = 2048;

/// Whether bytes at `at` of a file of `size` bytes are to be kept in the tree.
pub fn is_inline(at: u64, len: u64, size: u64) -> bool {
    at == 0 && len == SECTOR_BYTES && size <= INLINE_LIMIT
}

/// Where the bytes of a part of a file are.
#[derive(Clone, Debug)]
pub enum Place {
    /// In memory.
    Memory(Slice),
    /// In an extent.
    Extent(Extent),
    /// Nowhere: zeros. `promised` when there is room promised.
    Zeros {
        /// Whether fallocate promised room.
        promised: bool,
    },
}

/// A part of a file.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Offset in the file.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

impl Segment {
    fn of_extent(at: u64, extent: Extent) -> Segment {
        let len = match &extent {
            // An inline extent stands for its whole sector.
            Extent::Inline { .. } => SECTOR_BYTES,
            other => other.len(),
        };
        let place = match extent {
            Extent::Promised { .. } => Place::Zeros { promised: true },
            other => Place::Extent(other),
        };
        Segment { at, len, place }
    }

    /// The part of the segment within `start..end`, which are multiples of the sector size and
    /// overlap it.
    pub fn clip(self, start: u64, end: u64) -> Segment {
        let from = start.max(self.at);
        let to = end.min(self.at + self.len);
        if from == self.at && to == self.at + self.len {
            return self;
        }
        let (skip, len) = (from - self.at, to - from);
        let place = match self.place {
            Place::Memory(slice) => Place::Memory(slice.part(skip as usize, len as usize)),
            Place::Extent(inline @ Extent::Inline { .. }) => Place::Extent(inline),
            Place::Extent(extent) => Place::Extent(extent.part(skip, len)),
            zeros => zeros,
        };
        Segment { at: from, len, place }
    }
}

fn decode(tree: &Tree, key: Key, value: &crate::btree::Value) -> Result<(Extent, Txg)> {
    Extent::decode(value, key.offset, value.birth()).map_err(|bad| bad.in_item(tree.id, key.object))
}

/// Bytes of the file an extent stands for, an inline one rounded up to its sector.
fn span(extent: &Extent) -> u64 {
    match extent {
        Extent::Inline { .. } => SECTOR_BYTES,
        other => other.len(),
    }
}

/// Calls `each` for the items of a file that overlap `start..end`, ascending, until it returns
/// false.
///
/// # Errors
/// Errors of the device or the tree; [`Error::BadItem`] when items overlap.
pub fn each_extent(
    source: &dyn NodeSource,
    tree: &Tree,
    ino: Ino,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(u64, Extent, Txg) -> Result<bool>,
) -> Result<()> {
    let at = Key::new(ino.0, kind::EXTENT, start);
    let first = match tree.last_upto(source, &at)? {
        Some((key, _)) if key.object == ino.0 && key.kind == kind::EXTENT => key,
        _ => at,
    };
    let mut cursor = tree.cursor();
    cursor.seek(source, &first)?;
    let mut done_to = 0;
    while let Some((key, value)) = cursor.next(source)? {
        if key.object != ino.0 || key.kind != kind::EXTENT || key.offset >= end {
            break;
        }
        let (extent, birth) = decode(tree, key, &value)?;
        if key.offset < done_to {
            let what = "extents overlap";
            return Err(Error::BadItem { what, tree: tree.id, object: ino.0 });
        }
        done_to = key.offset + span(&extent);
        if done_to > start && !each(key.offset, extent, birth)? {
            break;
        }
    }
    Ok(())
}

/// Moves what `map` says about `gaps` to `out`; returns the gaps that are left.
fn cover(map: &RangeMap, gaps: Vec<(u64, u64)>, out: &mut Vec<Segment>) -> Vec<(u64, u64)> {
    if map.is_empty() {
        return gaps;
    }
    let mut left = Vec::new();
    for (start, end) in gaps {
        let mut at = start;
        for (piece_at, piece) in map.overlapping(start, end) {
            let from = piece_at.max(start);
            if at < from {
                left.push((at, from));
            }
            let place = match &piece.content {
                Content::Bytes { data, .. } => Place::Memory(data.clone()),
                Content::Written(extent) | Content::Shared(extent) => Place::Extent(extent.clone()),
                Content::Hole => Place::Zeros { promised: false },
                Content::Promised => Place::Zeros { promised: true },
            };
            let segment = Segment { at: piece_at, len: piece.len, place };
            at = end.min(piece_at + piece.len);
            out.push(segment.clip(start, end));
        }
        if at < end {
            left.push((at, end));
        }
    }
    left
}

impl Subvol {
    /// What `start..end` of a file is made of now, ascending and without gaps. Both are multiples
    /// of the sector size. The caller holds the inode's lock, and holds `view`, taken after the
    /// lock, for as long as it uses the extents.
    ///
    /// # Errors
    /// Errors of the device or the tree.
    pub fn layout(
        &self,
        tree: &Tree,
        ino: Ino,
        state: &State,
        start: u64,
        end: u64,
    ) -> Result<Vec<Segment>> {
        let mut out = Vec::new();
        if start >= end {
            return Ok(out);
        }
        let mut gaps = cover(&state.ranges, alloc::vec![(start, end)], &mut out);
        if let Some(aside) = &state.aside {
            gaps = cover(&aside.ranges, gaps, &mut out);
        }
        for (start, end) in gaps {
            let mut at = start;
            each_extent(&*self.store, tree, ino, start, end, &mut |from, extent, _| {
                if at < from {
                    out.push(zeros(at, from));
                }
                let segment = Segment::of_extent(from, extent).clip(start, end);
                at = segment.at + segment.len;
                out.push(segment);
                Ok(true)
            })?;
            if at < end {
                out.push(zeros(at, end));
            }
        }
        out.sort_unstable_by_key(|segment| segment.at);
        Ok(out)
    }
}

fn zeros(from: u64, to: u64) -> Segment {
    Segment { at: from, len: to - from, place: Place::Zeros { promised: false } }
}

/// What a group makes of one inode.
#[derive(Debug, Default)]
pub struct Resolved {
    /// Edits of the subvolume's tree, ascending.
    pub edits: Vec<(Key, Edit)>,
    /// References that the tree drops, each with its birth.
    pub dropped: Vec<(Run, Txg)>,
    /// Runs that gain a reference beyond their first.
    pub shared: Vec<Run>,
    /// Change of the sums.
    pub delta: DataDelta,
    /// Bytes allocated for the inode's data, after the group.
    pub stored_bytes: u64,
    /// Bytes promised to it, after the group.
    pub promised_bytes: u64,
}

/// A blob as a file refers to it.
type BlobRef = (Logical, u64);

struct Resolver<'a> {
    source: &'a dyn NodeSource,
    tree: &'a Tree,
    ino: Ino,
    txg: Txg,
    /// Items by offset: new value, or `None` when deleted.
    items: BTreeMap<u64, Option<(Extent, Txg)>>,
    /// What is left to the right of the last cut.
    carry: Option<(u64, Extent, Txg)>,
    /// Items that begin below this have been dealt with.
    done_to: u64,
    /// With the births of the references.
    cut_blobs: BTreeMap<BlobRef, (Blob, Txg)>,
    written_blobs: BTreeMap<BlobRef, Blob>,
    shared_blobs: BTreeMap<BlobRef, Blob>,
    out: Resolved,
}

/// Resolves what a group made of an inode against the tree of the group before. Bytes in memory
/// must have been written before, except those of small files.
///
/// # Errors
/// Errors of the device or the tree.
pub fn resolve(source: &dyn NodeSource, tree: &Tree, ino: Ino, aside: &Aside) -> Result<Resolved> {
    let mut resolver = Resolver {
        source,
        tree,
        ino,
        txg: aside.txg,
        items: BTreeMap::new(),
        carry: None,
        done_to: 0,
        cut_blobs: BTreeMap::new(),
        written_blobs: BTreeMap::new(),
        shared_blobs: BTreeMap::new(),
        out: Resolved::default(),
    };
    for (at, piece) in aside.ranges.iter() {
        resolver.cut(at, at.saturating_add(piece.len))?;
        resolver.put(at, piece.len, &piece.content, &aside.item)?;
    }
    resolver.flush_carry();
    resolver.count_blobs()?;
    Ok(resolver.finish(aside))
}

impl Resolver<'_> {
    /// Removes what the old items say about `start..end`.
    fn cut(&mut self, start: u64, end: u64) -> Result<()> {
        if let Some((at, extent, birth)) = self.carry.take() {
            if at + extent.len() > start {
                self.cut_item(at, extent, birth, start, end);
            } else {
                self.items.insert(at, Some((extent, birth)));
            }
        }
        let from = start.max(self.done_to);
        if from >= end {
            return Ok(());
        }
        let (source, tree, ino) = (self.source, self.tree, self.ino);
        each_extent(source, tree, ino, from, end, &mut |at, extent, birth| {
            if at >= self.done_to {
                self.done_to = at + span(&extent);
                self.cut_item(at, extent, birth, start, end);
            }
            Ok(true)
        })
    }

    fn cut_item(&mut self, at: u64, extent: Extent, birth: Txg, start: u64, end: u64) {
        let item_end = at + span(&extent);
        let (from, to) = (start.max(at), end.min(item_end));
        debug_assert!(from < to, "cut {start}..{end} of an item at {at}..{item_end}");
        self.items.insert(at, None);
        if !matches!(extent, Extent::Promised { .. }) {
            self.out.delta.logical -= (to - from).min(extent.len()) as i64;
        }
        match &extent {
            Extent::Inline { .. } => return,
            Extent::Plain { addr, .. } => {
                let run = Run { addr: Logical(addr.0 + (from - at)), bytes: to - from };
                self.out.dropped.push((run, birth));
                self.out.delta.stored -= (to - from) as i64;
            }
            Extent::Packed { blob, offset, .. } => {
                let key = (blob.addr, anchor(at, *offset));
                let cut = self.cut_blobs.entry(key).or_insert((*blob, birth));
                cut.1 = cut.1.min(birth);
            }
            Extent::Promised { .. } => self.out.delta.promised -= (to - from) as i64,
        }
        if at < from {
            self.items.insert(at, Some((extent.part(0, from - at), birth)));
        }
        if to < item_end {
            self.carry = Some((to, extent.part(to - at, item_end - to), birth));
        }
    }

    fn flush_carry(&mut self) {
        if let Some((at, extent, birth)) = self.carry.take() {
            self.items.insert(at, Some((extent, birth)));
        }
    }

    fn put(&mut self, at: u64, len: u64, content: &Content, item: &InodeItem) -> Result<()> {
        let mut birth = self.txg;
        let extent = match content {
            Content::Hole => return Ok(()),
            Content::Promised => {
                self.out.delta.promised += len as i64;
                Extent::Promised { len }
            }
            Content::Bytes { data, .. } => {
                assert!(is_inline(at, len, item.size), "bytes of {}+{at} not written", self.ino);
                if item.size == 0 {
                    return Ok(());
                }
                Extent::Inline {
                    compression: CompressionKind::None,
                    logical: item.size as u32,
                    bytes: data[..item.size as usize].to_vec(),
                }
            }
            Content::Written(extent) => {
                self.count_new(at, extent, false);
                extent.clone()
            }
            Content::Shared(extent) => {
                self.count_new(at, extent, true);
                birth = self.birth_of(at, extent)?;
                extent.clone()
            }
        };
        if !matches!(extent, Extent::Promised { .. }) {
            self.out.delta.logical += extent.len() as i64;
        }
        self.items.insert(at, Some((extent, birth)));
        Ok(())
    }

    /// The birth of the reference that a shared extent holds at `at`: that of the one it joins, or
    /// this group.
    fn birth_of(&self, at: u64, extent: &Extent) -> Result<Txg> {
        let Extent::Packed { blob, offset, .. } = extent else { return Ok(self.txg) };
        let key = (blob.addr, anchor(at, *offset));
        let stored = match self.cut_blobs.get(&key) {
            Some((_, birth)) => Some(*birth),
            None => self.stored_birth(key, blob)?,
        };
        Ok(stored.unwrap_or(self.txg))
    }

    fn count_new(&mut self, at: u64, extent: &Extent, shared: bool) {
        match extent {
            Extent::Plain { addr, len, .. } => {
                self.out.delta.stored += *len as i64;
                if shared {
                    self.out.shared.push(Run { addr: *addr, bytes: *len });
                }
            }
            Extent::Packed { blob, offset, .. } => {
                let map = if shared { &mut self.shared_blobs } else { &mut self.written_blobs };
                map.insert((blob.addr, anchor(at, *offset)), *blob);
            }
            Extent::Inline { .. } | Extent::Promised { .. } => {
                debug_assert!(false, "a range without a place on the device");
            }
        }
    }

    fn count_blobs(&mut self) -> Result<()> {
        // Not collected: that sorts, with much of it on the stack.
        let mut touched: BTreeSet<BlobRef> = BTreeSet::new();
        touched.extend(self.cut_blobs.keys().copied());
        for map in [&self.written_blobs, &self.shared_blobs] {
            touched.extend(map.keys().copied());
        }
        for key in touched {
            let cut = self.cut_blobs.get(&key).copied();
            let new = || self.written_blobs.get(&key).or_else(|| self.shared_blobs.get(&key));
            let blob = cut
                .map(|(blob, _)| blob)
                .or_else(|| new().copied())
                .expect("collected from these maps");
            let before = match cut {
                Some((_, birth)) => Some(birth),
                None => self.stored_birth(key, &blob)?,
            };
            let after = self.names(key, &blob)?;
            let run = Run { addr: blob.addr, bytes: blob.allocated() };
            match (before, after) {
                (Some(birth), false) => {
                    self.out.dropped.push((run, birth));
                    self.out.delta.stored -= run.bytes as i64;
                }
                (None, true) => {
                    self.out.delta.stored += run.bytes as i64;
                    if !self.written_blobs.contains_key(&key) {
                        self.out.shared.push(run);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The birth of the reference to the blob if an item of the old tree names it.
    fn stored_birth(&self, key: BlobRef, blob: &Blob) -> Result<Option<Txg>> {
        let (start, end) = window(key.1, blob);
        let mut found = None;
        each_extent(self.source, self.tree, self.ino, start, end, &mut |at, extent, birth| {
            found = names(&extent, at, key).then_some(birth);
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    /// Whether an item of the new tree names the blob.
    fn names(&self, key: BlobRef, blob: &Blob) -> Result<bool> {
        let (start, end) = window(key.1, blob);
        let changed = self
            .items
            .range(start..end)
            .any(|(at, item)| matches!(item, Some((extent, _)) if names(extent, *at, key)));
        if changed {
            return Ok(true);
        }
        let mut found = false;
        each_extent(self.source, self.tree, self.ino, start, end, &mut |at, extent, _| {
            found = !self.items.contains_key(&at) && names(&extent, at, key);
            Ok(!found)
        })?;
        Ok(found)
    }

    fn finish(mut self, aside: &Aside) -> Resolved {
        let object = self.ino.0;
        let mut item = aside.item;
        item.stored_bytes = item.stored_bytes.saturating_add_signed(self.out.delta.stored);
        item.promised_bytes = item.promised_bytes.saturating_add_signed(self.out.delta.promised);
        self.out.stored_bytes = item.stored_bytes;
        self.out.promised_bytes = item.promised_bytes;
        let inode = Key::new(object, kind::INODE, 0);
        let edit = match aside.gone {
            true => Edit::Delete,
            false => Edit::Put(item.to_bytes().to_vec()),
        };
        self.out.edits.push((inode, edit));
        for (at, extent) in core::mem::take(&mut self.items) {
            let edit = match extent {
                Some((extent, birth)) => Edit::Put(extent.encode(birth)),
                None => Edit::Delete,
            };
            self.out.edits.push((Key::new(object, kind::EXTENT, at), edit));
        }
        self.out
    }
}

fn names(extent: &Extent, at: u64, key: BlobRef) -> bool {
    matches!(extent, Extent::Packed { blob, offset, .. }
        if (blob.addr, anchor(at, *offset)) == key)
}

/// The reference that an item of a tree without changes is the last to name, if it is: where a
/// whole tree is taken apart item by item, each reference is given up once, at its last item.
///
/// # Errors
/// Errors of the device or the tree.
pub fn last_named(
    source: &dyn NodeSource,
    tree: &Tree,
    ino: Ino,
    at: u64,
    extent: &Extent,
) -> Result<Option<Run>> {
    match extent {
        Extent::Inline { .. } | Extent::Promised { .. } => Ok(None),
        Extent::Plain { addr, len, .. } => Ok(Some(Run { addr: *addr, bytes: *len })),
        Extent::Packed { blob, offset, len } => {
            let key = (blob.addr, anchor(at, *offset));
            let (_, end) = window(key.1, blob);
            let from = at + len;
            let mut is_named = false;
            if from < end {
                each_extent(source, tree, ino, from, end, &mut |at, extent, _| {
                    is_named = at >= from && names(&extent, at, key);
                    Ok(!is_named)
                })?;
            }
            Ok((!is_named).then(|| Run { addr: blob.addr, bytes: blob.allocated() }))
        }
    }
}

/// File offsets at which an item may name a blob with that anchor. An anchor before zero has
/// wrapped.
fn window(anchor: u64, blob: &Blob) -> (u64, u64) {
    let end = anchor.wrapping_add(u64::from(blob.logical));
    if end < anchor {
        (0, end)
    } else {
        (anchor, end)
    }
}
