//! Data that several files share, and where whoever receives has it.
//!
//! Files share extents since one was cloned from the other. The pool counts further references of a
//! run in its tree of references, which tells what is shared and not with whom. So whoever sends
//! remembers where shared data was sent, and names that place when it comes again:
//!
//! ```text
//! data of a file --shared?--no--> sent
//!                    |yes
//!                    seen before? --no--> sent, and its place remembered
//!                    |yes
//!                    a clone of that place
//! ```
//!
//! An incremental stream may also name what the base has and the snapshot still has in the same
//! place. That is looked for once, in the beginning, by walking the snapshot's tree; but only if
//! what it may save is more than the tree is large, so that a stream costs what changed.
//!
//! A place is named only if whoever receives has all of it then, and it stays as it is: it came
//! earlier in the stream, or it does not come at all because the base has it.
//!
//! Memory: [`PLACES_MAX`] places. What is shared beyond them is sent as often as it occurs.

use super::compare::{Comparison, Event};
use super::read::File;
use super::record::Mark;
use super::Source;
use crate::btree::{NodeSource, Tree};
use crate::engine::data::run_of;
use crate::engine::references;
use crate::error::Error;
use crate::format::extent::Extent;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::platform::Result;
use crate::subvol::extents::each_extent;
use crate::subvol::store::Store;
use crate::units::{align_down, Ino, SECTOR_BYTES};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Places that are remembered; each takes about a hundred bytes.
pub const PLACES_MAX: usize = 1 << 18;

/// Where stored data begins, whatever files have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Spot {
    /// The blob that it is packed in, if it is.
    blob: Option<u64>,
    /// Offset in what that expands to, or address.
    at: u64,
}

/// A range of a file that whoever receives has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The file.
    pub ino: Ino,
    /// Offset in it.
    pub at: u64,
    /// Whole sectors, or up to the end of the file.
    pub bytes: u64,
}

/// What is next in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Data that has to be sent, up to that offset.
    Data(u64),
    /// What is in that place.
    Clone(Place),
}

/// Remembers where shared data is.
#[derive(Default)]
pub(super) struct Shared {
    places: BTreeMap<Spot, Place>,
}

impl Spot {
    /// Where the byte `skip` of an extent is stored.
    fn of(extent: &Extent, skip: u64) -> Option<Spot> {
        match extent {
            Extent::Plain { addr, .. } => {
                Some(Spot { blob: None, at: addr.0.saturating_add(skip) })
            }
            Extent::Packed { blob, offset, .. } => {
                let at = u64::from(*offset).saturating_add(skip);
                Some(Spot { blob: Some(blob.addr.0), at })
            }
            Extent::Inline { .. } | Extent::Promised { .. } => None,
        }
    }
}

/// Whether further references to an extent are counted.
fn is_shared(store: &Store, refs: &Tree, extent: &Extent) -> Result<bool> {
    match run_of(extent) {
        Some(run) => references::is_shared(store, refs, run),
        None => Ok(false),
    }
}

impl Shared {
    /// What a file has from `at` on, where there is data, and below `end`, which is not beyond its
    /// size. What has to be sent is remembered: it will be.
    ///
    /// # Errors
    /// Errors of the device or the trees.
    pub fn next(&mut self, store: &Store, file: &File<'_>, at: u64, end: u64) -> Result<Next> {
        let mut next = Next::Data(end);
        // Held as long as it is read: a commit gives what it replaces of it free.
        let refs = store.refs_view();
        if refs.tree.root.is_none() {
            return Ok(next);
        }
        each_extent(store, file.tree, file.ino, at, end, &mut |start, extent, _| {
            let (from, to) = (start.max(at), end.min(start.saturating_add(extent.len())));
            let Some(spot) = Spot::of(&extent, from - start).filter(|_| from < to) else {
                return Ok(true);
            };
            if !is_shared(store, &refs.tree, &extent)? {
                return Ok(true);
            }
            match self.find(spot, to - from, to == file.size) {
                Some(place) if from == at => {
                    next = Next::Clone(place);
                    Ok(false)
                }
                Some(_) => {
                    next = Next::Data(from);
                    Ok(false)
                }
                None => {
                    let bytes = self.up_to_next(spot, to - from);
                    self.remember(spot, Place { ino: file.ino, at: from, bytes });
                    let goes_on = from + bytes == to;
                    if !goes_on {
                        next = Next::Data(from + bytes);
                    }
                    Ok(goes_on)
                }
            }
        })?;
        Ok(next)
    }

    /// Where at most `bytes` from a spot on are; `is_last` when the file that wants them ends.
    fn find(&self, spot: Spot, bytes: u64, is_last: bool) -> Option<Place> {
        let (start, place) = self.places.range(..=spot).next_back()?;
        let skip = spot.at.checked_sub(start.at).filter(|_| start.blob == spot.blob)?;
        if skip >= place.bytes {
            return None;
        }
        let found = (place.bytes - skip).min(bytes);
        // A part of a sector is the same only if both files end in it.
        let ends_both = is_last && found == bytes && found == place.bytes - skip;
        let found = if ends_both { found } else { align_down(found, SECTOR_BYTES) };
        (found > 0).then_some(Place { ino: place.ino, at: place.at + skip, bytes: found })
    }

    /// How many of the `bytes` from a spot on, which no place has, come before what one has.
    fn up_to_next(&self, spot: Spot, bytes: u64) -> u64 {
        let behind = Spot { at: spot.at.saturating_add(SECTOR_BYTES), ..spot };
        let end = Spot { at: spot.at.saturating_add(bytes).max(behind.at), ..spot };
        let next = self.places.range(behind..end).next();
        next.map_or(bytes, |(next, _)| align_down(next.at - spot.at, SECTOR_BYTES))
    }

    fn remember(&mut self, spot: Spot, place: Place) {
        if let Some((start, last)) = self.places.range_mut(..=spot).next_back() {
            let follows = start.blob == spot.blob
                && spot.at - start.at == last.bytes
                && (last.ino, last.at + last.bytes) == (place.ino, place.at);
            if follows {
                last.bytes += place.bytes;
                return;
            }
            if *start == spot {
                if last.bytes < place.bytes {
                    *last = place;
                }
                return;
            }
        }
        if self.places.len() < PLACES_MAX {
            self.places.insert(spot, place);
        }
    }

    /// Remembers what a stream that broke off has sent: all before `first`.
    ///
    /// # Errors
    /// Errors of the device or the trees.
    pub fn look_at_sent(
        &mut self,
        store: &Store,
        (old, new): (&Tree, &Tree),
        first: Mark,
    ) -> Result<()> {
        if store.refs_view().tree.root.is_none() {
            return Ok(());
        }
        each_change(store, (old, new), &mut |file, start, end| {
            let end = match file.ino.0.cmp(&first.ino) {
                core::cmp::Ordering::Less => end,
                core::cmp::Ordering::Equal => end.min(align_down(first.offset, SECTOR_BYTES)),
                core::cmp::Ordering::Greater => return Ok(false),
            };
            let mut at = start;
            while at < end {
                at = match self.next(store, file, at, end)? {
                    Next::Data(to) => to,
                    Next::Clone(place) => at + place.bytes,
                };
            }
            Ok(true)
        })
    }

    /// Finds what is to be sent, and shared, in what the base has and the snapshot keeps.
    ///
    /// # Errors
    /// Errors of the device or the trees.
    pub fn look_at_kept(
        &mut self,
        store: &Store,
        (old, new): (&Tree, &Tree),
        tree_bytes: u64,
    ) -> Result<()> {
        let wanted = wanted(store, old, new)?;
        if wanted.bytes == 0 || wanted.bytes < tree_bytes {
            return Ok(());
        }
        let mut kept = Kept { store, old, new, ino: Ino(0), size: 0 };
        let mut cursor = new.cursor();
        cursor.seek(store, &Key::new(1, 0, 0))?;
        while let Some((key, value)) = cursor.next(store)? {
            if key.kind != kind::EXTENT {
                continue;
            }
            let (extent, _) = Extent::decode(&value, key.offset, value.birth())
                .map_err(|bad| bad.in_item(new.id, key.object))?;
            if wanted.has(&extent) {
                kept.each(Ino(key.object), key.offset, &extent, &mut |spot, place| {
                    self.remember(spot, place);
                })?;
            }
        }
        Ok(())
    }
}

/// What is to be sent and shared.
#[derive(Default)]
struct Wanted {
    /// How many bytes from each spot on.
    spots: BTreeMap<Spot, u64>,
    bytes: u64,
}

impl Wanted {
    fn has(&self, extent: &Extent) -> bool {
        let Some(first) = Spot::of(extent, 0) else { return false };
        let last = Spot { at: first.at.saturating_add(extent.len() - 1), ..first };
        let found = self.spots.range(..=last).next_back();
        found.is_some_and(|(spot, bytes)| {
            spot.blob == first.blob && spot.at.saturating_add(*bytes) > first.at
        })
    }
}

fn wanted(store: &Store, old: &Tree, new: &Tree) -> Result<Wanted> {
    let mut wanted = Wanted::default();
    if store.refs_view().tree.root.is_none() {
        return Ok(wanted);
    }
    each_change(store, (old, new), &mut |file, start, end| {
        let refs = store.refs_view();
        each_extent(store, file.tree, file.ino, start, end, &mut |at, extent, _| {
            if !is_shared(store, &refs.tree, &extent)? {
                return Ok(true);
            }
            let (from, to) = (at.max(start), end.min(at.saturating_add(extent.len())));
            if let Some(spot) = Spot::of(&extent, from - at).filter(|_| from < to) {
                let known = wanted.spots.entry(spot).or_default();
                *known = (to - from).max(*known);
                wanted.bytes = wanted.bytes.saturating_add(to - from);
            }
            Ok(wanted.spots.len() < PLACES_MAX)
        })?;
        Ok(wanted.spots.len() < PLACES_MAX)
    })?;
    Ok(wanted)
}

/// Calls `each` for the ranges of files in which data may differ, as far as the new ones reach,
/// until it returns false.
fn each_change(
    store: &Store,
    (old, new): (&Tree, &Tree),
    each: &mut dyn FnMut(&File<'_>, u64, u64) -> Result<bool>,
) -> Result<()> {
    let mut comparison = Comparison::new(old, new);
    let mut file = File { source: Source::of(store), tree: new, ino: Ino(0), size: 0 };
    while let Some(event) = comparison.next(store)? {
        match event {
            Event::Inode { ino, new, .. } => {
                let is_file = |item: &&InodeItem| item.is_file();
                let size = new.as_deref().filter(is_file).map_or(0, |item| item.size);
                (file.ino, file.size) = (ino, size);
            }
            Event::Data { start, end } => {
                let goes_on = start >= file.size || each(&file, start, end.min(file.size))?;
                if !goes_on {
                    return Ok(());
                }
            }
            Event::Item { .. } => {}
        }
    }
    Ok(())
}

/// Looks for what both trees have in the same place.
struct Kept<'a> {
    store: &'a Store,
    old: &'a Tree,
    new: &'a Tree,
    /// The file that was looked at last, and up to where it is in both.
    ino: Ino,
    size: u64,
}

impl Kept<'_> {
    /// Calls `each` for what the base has of an extent of the new tree.
    fn each(
        &mut self,
        ino: Ino,
        at: u64,
        extent: &Extent,
        each: &mut dyn FnMut(Spot, Place),
    ) -> Result<()> {
        if self.ino != ino {
            (self.ino, self.size) = (ino, self.common_size(ino)?);
        }
        let end = at.saturating_add(extent.len()).min(self.size);
        let mut all: Vec<(Spot, Place)> = Vec::new();
        if at < end {
            each_extent(self.store, self.old, ino, at, end, &mut |old_at, old, _| {
                let (from, to) = (old_at.max(at), end.min(old_at.saturating_add(old.len())));
                let (was, is) = (Spot::of(&old, from - old_at), Spot::of(extent, from - at));
                if let Some(spot) = is.filter(|is| from < to && Some(*is) == was) {
                    all.push((spot, Place { ino, at: from, bytes: to - from }));
                }
                Ok(true)
            })?;
        }
        all.into_iter().for_each(|(spot, place)| each(spot, place));
        Ok(())
    }

    /// Up to where a file is in both states; zero unless it has names in both.
    fn common_size(&self, ino: Ino) -> Result<u64> {
        let size = |tree: &Tree| -> Result<u64> {
            let nodes: &dyn NodeSource = self.store;
            let value = tree.lookup(nodes, &Key::new(ino.0, kind::INODE, 0))?;
            let Some(value) = value else { return Ok(0) };
            let item = InodeItem::decode(&value)
                .map_err(|bad| -> Error { bad.in_item(tree.id, ino.0) })?;
            Ok(if item.is_file() && item.nlink > 0 { item.size } else { 0 })
        };
        let (old, new) = (size(self.old)?, size(self.new)?);
        // In the file that is shorter the last sector may end earlier.
        Ok(if old == new { old } else { align_down(old.min(new), SECTOR_BYTES) })
    }
}
