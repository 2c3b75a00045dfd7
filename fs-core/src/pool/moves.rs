//! Chunks that get another place.
//!
//! Pointers are logical, so a chunk moves without anybody above noticing. While it does, it has a
//! *next* place besides its own:
//!
//! ```text
//! staying --begin_moves--> doubled --(everything in use carried over)--> ripe
//! ripe --seal_moves, take_chunk_edits(n)--> sealed --published(n)--> staying, at the next place
//! doubled, ripe --cancel_moves--> staying, where it was
//! ```
//!
//! - A chunk that is doubled is read where it was, and written in both places.
//! - Whoever writes has looked the place up before, so it takes until the last one is gone who did
//!   so before the chunk was doubled ([`Pool::moves_begun`]): what is written from then on is in
//!   both places. What was written before is for the engine to name, and for
//!   [`Pool::carry_over`] to bring over, verified.
//! - The next place counts from the group on whose chunk tree has it. If the power fails before
//!   that is published, the chunk is where it was, and nothing in the old place was touched.
//! - While it is sealed a crash may find it in either place, so the devices of both are relied on.
//!   A device that fails a write before that spoils the moves to it: they are not sealed.
//! - The old place is given to others when nobody is left who could read or repair there.
//!
//! Nothing of this is stored: after a crash, chunks that were not sealed are where they were.

use super::layout::{self, Segment};
use super::ledger::Ledger;
use super::map::{segments, ChunkMap, Mapped, Place};
use super::read::{sector_of, Seal, Transfer};
use super::room::Room;
use super::{Content, DataSource, Lost, Pool};
use crate::buf::{Buf, Slice};
use crate::device::Member;
use crate::error::Error;
use crate::format::chunk::{Chunk, Profile, Stripe};
use crate::format::ptr::ChecksumKind;
use crate::platform::{Result, WriteOp};
use crate::units::{Logical, Physical, Txg, SECTOR_BYTES};
use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// What is to be free of chunks: everything at or behind a byte of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Eviction {
    /// The device.
    pub device: u16,
    /// The first byte.
    pub from: u64,
    /// The device that is to have it instead, if it can.
    pub target: Option<u16>,
}

impl Eviction {
    fn concerns(&self, stripe: &Stripe, bytes: u64) -> bool {
        stripe.device == self.device && stripe.physical.0 + bytes > self.from
    }

    fn concerns_any(&self, chunk: &Chunk) -> bool {
        chunk.stripes.iter().any(|stripe| self.concerns(stripe, chunk.stripe_bytes()))
    }
}

/// Chunks that get another place, and places that chunks have left.
#[derive(Default)]
pub struct Moves {
    by_chunk: BTreeMap<Logical, Move>,
    left: Vec<Left>,
    /// Whether the next chunk edits are to have them.
    is_ripe: bool,
}

struct Move {
    /// The chunk as it was in the map since before it was doubled.
    entries: Vec<Weak<Mapped>>,
    /// The devices it goes to, each with the failures it had.
    targets: Vec<(u16, u64)>,
    /// The group whose chunk tree has the next place.
    sealed: Option<Txg>,
}

/// A place that a chunk has left and somebody may still look at.
struct Left {
    entries: Vec<Weak<Mapped>>,
    segments: Vec<Segment>,
}

fn is_forgotten(entries: &[Weak<Mapped>]) -> bool {
    entries.iter().all(|entry| entry.strong_count() == 0)
}

impl Moves {
    /// Chunks whose next place the chunk tree of a group has.
    pub(super) fn sealed(&self, txg: Txg) -> Vec<Logical> {
        let sealed = self.by_chunk.iter().filter(|(_, one)| one.sealed == Some(txg));
        sealed.map(|(logical, _)| *logical).collect()
    }

    /// Chunks whose next places the next edits have.
    pub(super) fn ripe(&self) -> impl Iterator<Item = Logical> + '_ {
        let ripe = self.by_chunk.iter().filter(|(_, one)| self.is_ripe && one.sealed.is_none());
        ripe.map(|(logical, _)| *logical)
    }

    /// What chunks have left and is taken yet.
    pub(super) fn leaving(&self) -> impl Iterator<Item = Segment> + '_ {
        self.left.iter().flat_map(|left| left.segments.iter().copied())
    }
}

impl Ledger {
    /// Finds another place for what of a chunk is in the way, and takes it.
    fn place_again(
        &mut self,
        chunk: &Chunk,
        eviction: &Eviction,
        complete: &[bool],
        demand: &layout::Demand,
    ) -> Option<Chunk> {
        let bytes = chunk.stripe_bytes();
        let mut next = chunk.clone();
        let mut taken: Vec<Stripe> = Vec::new();
        for index in 0..next.stripes.len() {
            if !eviction.concerns(&next.stripes[index], bytes) {
                continue;
            }
            let Some(stripe) = self.place_stripe(&next, index, eviction, complete) else {
                give_back(&mut self.rooms, &taken, bytes);
                return self.place_anew(chunk, complete, demand);
            };
            let room = &mut self.rooms[usize::from(stripe.device)];
            room.take(stripe.physical, bytes, chunk.logical).expect("a hole can be taken");
            next.stripes[index] = stripe;
            taken.push(stripe);
        }
        Some(next)
    }

    /// Another place for one stripe, the others staying.
    fn place_stripe(
        &self,
        chunk: &Chunk,
        index: usize,
        eviction: &Eviction,
        complete: &[bool],
    ) -> Option<Stripe> {
        let bytes = chunk.stripe_bytes();
        let others = chunk.stripes.iter().enumerate().filter(|(other, _)| *other != index);
        let others: Vec<u16> = others.map(|(_, stripe)| stripe.device).collect();
        let is_fit = |device: &u16| match chunk.profile {
            // Both are on one device.
            Profile::Dup => others.contains(device),
            _ => !others.contains(device),
        };
        let mut devices: Vec<u16> = (0u16..).take(self.rooms.len()).collect();
        devices.retain(|device| complete[usize::from(*device)] && is_fit(device));
        let free = |device: &u16| self.rooms[usize::from(*device)].usable();
        devices.sort_unstable_by_key(|device| {
            (Some(*device) != eviction.target, core::cmp::Reverse(free(device)), *device)
        });
        devices.into_iter().find_map(|device| {
            let physical = self.rooms[usize::from(device)].lowest(bytes)?;
            Some(Stripe { device, physical })
        })
    }

    /// Another place for all of a chunk.
    fn place_anew(
        &mut self,
        chunk: &Chunk,
        complete: &[bool],
        demand: &layout::Demand,
    ) -> Option<Chunk> {
        let placed = layout::place(&self.rooms, complete, demand, chunk.profile, chunk.length);
        let (length, stripes) = placed?;
        let is_whole = |stripe: &Stripe| complete[usize::from(stripe.device)];
        if length != chunk.length || !stripes.iter().all(is_whole) {
            return None;
        }
        let next = Chunk { stripes, ..chunk.clone() };
        for stripe in &next.stripes {
            let room = &mut self.rooms[usize::from(stripe.device)];
            let bytes = next.stripe_bytes();
            room.take(stripe.physical, bytes, chunk.logical).expect("a hole can be taken");
        }
        Some(next)
    }

    /// Group `txg` is on disk: chunks that it has elsewhere are there. Returns the map with them.
    pub(super) fn switch(&mut self, map: &ChunkMap, txg: Txg) -> Option<ChunkMap> {
        let is_due = |one: &Move| one.sealed.is_some_and(|sealed| sealed <= txg);
        let due = self.moves.by_chunk.iter().filter(|(_, one)| is_due(one));
        let due: Vec<Logical> = due.map(|(logical, _)| *logical).collect();
        let mut entries = Vec::new();
        for logical in due {
            let Some(mut one) = self.moves.by_chunk.remove(&logical) else { continue };
            let Some(mapped) = map.get(logical) else { continue };
            let Some(next) = mapped.next.clone() else { continue };
            one.entries.push(Arc::downgrade(mapped));
            let stays = |segment: &Segment| segments(&next).any(|other| other == *segment);
            let left = mapped.stripes().filter(|segment| !stays(segment)).collect();
            self.moves.left.push(Left { entries: one.entries, segments: left });
            entries.push(Arc::new(Mapped::new(Chunk::clone(&next))));
        }
        (!entries.is_empty()).then(|| map.replace(&entries))
    }
}

fn restore(rooms: &mut [Room], limits: &[(u16, u64)]) {
    for (device, limit) in limits.iter().rev() {
        rooms[usize::from(*device)].set_limit(*limit);
    }
}

fn give_back(rooms: &mut [Room], stripes: &[Stripe], bytes: u64) {
    for stripe in stripes {
        rooms[usize::from(stripe.device)].give_back(stripe.physical, bytes);
    }
}

impl Pool {
    /// Keeps new chunks from what is to be evicted, or lets them on it again.
    pub fn limit_device(&self, device: u16, from: Option<u64>) {
        let mut ledger = self.ledger.lock();
        if let Some(room) = ledger.rooms.get_mut(usize::from(device)) {
            room.set_limit(from.unwrap_or(u64::MAX));
            let bit = 1 << device;
            match from {
                Some(0) => self.closed.fetch_or(bit, Ordering::AcqRel),
                _ => self.closed.fetch_and(!bit, Ordering::AcqRel),
            };
        }
    }

    /// Bytes of devices that chunks have where they are in the way.
    pub fn bytes_to_evict(&self, eviction: &Eviction) -> u64 {
        let map = self.chunk_map();
        let in_the_way = |mapped: &Arc<Mapped>| {
            let bytes = mapped.chunk.stripe_bytes();
            let stripes = mapped.chunk.stripes.iter();
            stripes.filter(|stripe| eviction.concerns(stripe, bytes)).count() as u64 * bytes
        };
        map.iter().map(in_the_way).fold(0, u64::saturating_add)
    }

    /// Whether all that is in the way has another place, as far as can be seen now.
    ///
    /// # Errors
    /// [`Error::Argument`] when profiles need more devices; [`Error::NoSpace`].
    pub fn check_eviction(&self, eviction: &Eviction) -> Result<()> {
        let demand = self.demand();
        // Tried on a copy: nobody is to see it.
        let mut trial = Ledger::new(core::iter::empty(), Logical(0));
        let complete = {
            let mut ledger = self.ledger.lock();
            let (complete, former) = self.limit_rooms(&mut ledger.rooms, eviction);
            trial.rooms = ledger.rooms.iter().map(Room::outline).collect();
            restore(&mut ledger.rooms, &former);
            complete
        };
        let map = self.chunk_map();
        let whole = complete.iter().filter(|complete| **complete).count() as u64;
        let in_the_way = || map.iter().filter(|mapped| eviction.concerns_any(&mapped.chunk));
        let needed = in_the_way().map(|mapped| mapped.chunk.profile.devices_min()).max();
        if whole < needed.unwrap_or(1).max(demand.devices()) {
            let what =
                "the profile of the pool needs as many devices as there are; add one first, \
                        or replace this one";
            return Err(Error::Argument { what });
        }
        for mapped in in_the_way() {
            let placed = trial.place_again(&mapped.chunk, eviction, &complete, &demand);
            placed.ok_or(Error::NoSpace)?;
        }
        Ok(())
    }

    /// Keeps new chunks from what is to be evicted, and lets them on the device that is to have it
    /// instead, if `owed` bytes are left then to make chunks of. Nothing may be promised meanwhile.
    ///
    /// # Errors
    /// [`Error::NoSpace`]; everything is as before then.
    pub fn begin_eviction(&self, eviction: &Eviction, owed: u64) -> Result<()> {
        let mut ledger = self.ledger.lock();
        let (complete, former) = self.limit_rooms(&mut ledger.rooms, eviction);
        if layout::supply(&ledger.rooms, &complete, &self.demand()) < owed {
            restore(&mut ledger.rooms, &former);
            return Err(Error::NoSpace);
        }
        if let Some(target) = eviction.target {
            self.closed.fetch_and(!(1 << target), Ordering::AcqRel);
        }
        if eviction.from == 0 {
            self.closed.fetch_or(1 << eviction.device, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Limits rooms as an eviction asks for. Returns which devices may have chunks then, and the
    /// former limits.
    fn limit_rooms(&self, rooms: &mut [Room], eviction: &Eviction) -> (Vec<bool>, Vec<(u16, u64)>) {
        let mut complete = self.complete();
        let mut former = Vec::new();
        let mut limit = |device: u16, from: u64| {
            let room = &mut rooms[usize::from(device)];
            former.push((device, room.limit()));
            room.set_limit(from);
        };
        limit(eviction.device, eviction.from);
        complete[usize::from(eviction.device)] &= eviction.from > 0;
        if let Some(target) = eviction.target {
            limit(target, u64::MAX);
            complete[usize::from(target)] = self.member(target).is_complete();
        }
        (complete, former)
    }

    /// Doubles chunks that are in the way, of about `bytes_max` together, and at least one. Returns
    /// the bytes of devices that this will make free; zero when nothing is in the way. What is
    /// `owed` is left: nothing may be promised meanwhile.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when there is no place for any; [`Error::ReadOnly`].
    pub fn begin_moves(&self, eviction: &Eviction, bytes_max: u64, owed: u64) -> Result<u64> {
        self.check_writable()?;
        let (complete, demand) = (self.complete(), self.demand());
        let mut ledger = self.ledger.lock();
        let map = self.chunk_map();
        let (mut bytes, mut entries, mut has_room) = (0u64, Vec::new(), true);
        for mapped in map.iter().filter(|mapped| eviction.concerns_any(&mapped.chunk)) {
            if bytes >= bytes_max {
                break;
            }
            if mapped.next.is_some() {
                continue;
            }
            let placed = ledger.place_again(&mapped.chunk, eviction, &complete, &demand);
            let Some(next) = placed else {
                has_room = false;
                continue;
            };
            let next = Arc::new(next);
            let doubled =
                Mapped { chunk: mapped.chunk.clone(), next: Some(next), is_sealed: false };
            if layout::supply(&ledger.rooms, &complete, &demand) < owed {
                for segment in doubled.further_stripes() {
                    let room = &mut ledger.rooms[usize::from(segment.device)];
                    room.give_back(segment.at, segment.bytes);
                }
                has_room = false;
                break;
            }
            let target = |segment: Segment| {
                bytes += segment.bytes;
                (segment.device, self.member(segment.device).failures())
            };
            let targets = doubled.further_stripes().map(target).collect();
            let entry = vec![Arc::downgrade(mapped)];
            let one = Move { entries: entry, targets, sealed: None };
            ledger.moves.by_chunk.insert(mapped.chunk.logical, one);
            entries.push(Arc::new(doubled));
        }
        ledger.moves.is_ripe = false;
        if entries.is_empty() && !has_room {
            return Err(Error::NoSpace);
        }
        let map = map.replace(&entries);
        self.set_map(map);
        Ok(bytes)
    }

    /// Whether nobody is left who writes doubled chunks in one place only.
    pub fn moves_begun(&self) -> bool {
        let ledger = self.ledger.lock();
        ledger.moves.by_chunk.values().all(|one| is_forgotten(&one.entries))
    }

    /// How many chunks are doubled.
    pub fn moves(&self) -> usize {
        self.ledger.lock().moves.by_chunk.len()
    }

    /// The next chunk edits that are taken have the next places: all that is in use was carried
    /// over. Where a device has failed meanwhile, nothing comes of it.
    pub fn ripen_moves(&self) {
        self.ledger.lock().moves.is_ripe = true;
    }

    /// Chunks that were doubled, and not sealed, stay where they are.
    pub fn cancel_moves(&self) {
        let mut ledger = self.ledger.lock();
        let ledger = &mut *ledger;
        ledger.moves.is_ripe = false;
        let map = self.chunk_map();
        let mut entries = Vec::new();
        let Moves { by_chunk, left, .. } = &mut ledger.moves;
        by_chunk.retain(|logical, one| {
            let mapped = map.get(*logical).filter(|_| one.sealed.is_none());
            let Some(mapped) = mapped else { return true };
            let mut watched = core::mem::take(&mut one.entries);
            watched.push(Arc::downgrade(mapped));
            left.push(Left { entries: watched, segments: mapped.further_stripes().collect() });
            entries.push(Arc::new(Mapped::new(mapped.chunk.clone())));
            false
        });
        let map = map.replace(&entries);
        self.set_map(map);
    }

    /// Gives places that chunks have left to whoever needs them, as far as nobody looks there any
    /// more. Returns whether that was all.
    pub fn give_back_left(&self) -> bool {
        let mut ledger = self.ledger.lock();
        let ledger = &mut *ledger;
        let rooms = &mut ledger.rooms;
        ledger.moves.left.retain(|left| {
            if !is_forgotten(&left.entries) {
                return true;
            }
            for segment in &left.segments {
                rooms[usize::from(segment.device)].give_back(segment.at, segment.bytes);
            }
            false
        });
        ledger.moves.left.is_empty()
    }

    /// Seals what is ripe, for the chunk tree of group `txg`; the caller holds `ledger`.
    pub(super) fn seal_moves(&self, ledger: &mut Ledger, txg: Txg) {
        if !core::mem::take(&mut ledger.moves.is_ripe) {
            return;
        }
        let map = self.chunk_map();
        let is_well = |(device, failures): &(u16, u64)| {
            let member = self.member(*device);
            member.is_complete() && member.failures() == *failures
        };
        let mut entries = Vec::new();
        for (logical, one) in &mut ledger.moves.by_chunk {
            let Some(mapped) = map.get(*logical) else { continue };
            if one.sealed.is_some() || !one.targets.iter().all(is_well) {
                continue;
            }
            one.sealed = Some(txg);
            one.entries.push(Arc::downgrade(mapped));
            let next = mapped.next.clone();
            let chunk = mapped.chunk.clone();
            entries.push(Arc::new(Mapped { chunk, next, is_sealed: true }));
        }
        self.set_map(map.replace(&entries));
    }

    /// Brings content to the next places of its chunks, verified. Returns what of it has no good
    /// copy, with the number of each.
    ///
    /// What is bad in every copy stays so. When [`Error::Device`] says why, a copy that cannot be
    /// read now may be good.
    ///
    /// # Errors
    /// [`Error::Memory`]; those of leaving a device behind.
    pub fn carry_over(&self, contents: &[Content]) -> Result<Vec<(usize, Lost)>> {
        let mut lost = Vec::new();
        let mut due: Vec<(usize, Place)> = Vec::new();
        let map = self.chunk_map();
        for (number, content) in contents.iter().enumerate() {
            // What is nowhere has nowhere to go.
            let Ok(place) = map.locate(content.run()) else { continue };
            if place.next().is_some() {
                due.push((number, place));
            }
        }
        due.sort_unstable_by_key(|(number, place)| (place.addr(), *number));
        while !due.is_empty() {
            // Of what overlaps, one after the other.
            let (mut round, mut later, mut end) = (Vec::new(), Vec::new(), 0);
            for (number, place) in due {
                match place.addr().0 >= end {
                    true => {
                        end = place.addr().0 + place.bytes;
                        round.push((number, place));
                    }
                    false => later.push((number, place)),
                }
            }
            self.carry_round(contents, &round, &mut lost)?;
            due = later;
        }
        Ok(lost)
    }

    fn carry_round(
        &self,
        contents: &[Content],
        round: &[(usize, Place)],
        lost: &mut Vec<(usize, Lost)>,
    ) -> Result<()> {
        let mut transfer = Transfer::new(self);
        let mut plans = Vec::new();
        for (number, place) in round {
            plans.push(transfer.add_first(place, contents[*number].is_verified()));
        }
        transfer.run();
        let mut batches: Vec<Vec<WriteOp>> = self.members().iter().map(|_| Vec::new()).collect();
        for ((number, place), plan) in round.iter().zip(plans) {
            let got = plan.map(|plan| transfer.take(plan));
            let read = got.and_then(|got| self.read_content(&contents[*number], place, got));
            match read {
                Ok(buf) => self.push_next(&mut batches, place, buf),
                Err(error) if !error.is_damage() => return Err(error),
                Err(error) => {
                    let mut parts = self.carry_sectors(&contents[*number], place, error)?;
                    lost.extend(parts.drain(..).map(|part| (*number, part)));
                }
            }
        }
        self.write_batches(batches)
    }

    fn read_content(
        &self,
        content: &Content,
        place: &Place,
        got: Vec<super::read::Got>,
    ) -> Result<Buf> {
        match content {
            Content::Block(ptr) => {
                let (kind, stored) = (ChecksumKind::Blake3, ptr.stored as usize);
                self.read_whole(place, &Seal { kind, sum: &ptr.checksum, stored }, got)
            }
            Content::Data(DataSource::Packed { blob }) => {
                let (kind, stored) = (blob.checksum_kind, blob.stored as usize);
                self.read_whole(place, &Seal { kind, sum: &blob.checksum, stored }, got)
            }
            Content::Data(DataSource::Plain { checksum_kind, checksums, .. }) => {
                self.read_sectors(place, *checksum_kind, checksums, got)
            }
        }
    }

    /// Adds the writes of a run to the next place of its chunk.
    fn push_next(&self, batches: &mut [Vec<WriteOp>], place: &Place, buf: Buf) {
        let Some(next) = place.next() else { return };
        let whole: Slice = buf.into_slice();
        let mut done = 0;
        for piece in next.pieces() {
            for segment in (0..piece.copies()).map(|copy| piece.segment(copy)) {
                if !place.is_in(&segment) && self.member(segment.device).is_there() {
                    let part = whole.part(done, segment.bytes as usize);
                    let op = WriteOp { at: segment.at, bufs: vec![part], result: Ok(()) };
                    batches[usize::from(segment.device)].push(op);
                }
            }
            done += piece.bytes as usize;
        }
    }

    /// Brings over what is left of something that is damaged: of plain data the sectors that are
    /// good, and otherwise what is there, as it is.
    fn carry_sectors(&self, content: &Content, place: &Place, error: Error) -> Result<Vec<Lost>> {
        let mut lost = Vec::new();
        let mut batches: Vec<Vec<WriteOp>> = self.members().iter().map(|_| Vec::new()).collect();
        let sectors = (place.bytes / SECTOR_BYTES) as usize;
        for index in 0..sectors {
            let piece = sector_of(place, index);
            let sums = match content {
                Content::Data(DataSource::Plain { checksum_kind, checksums, .. }) => Some((
                    *checksum_kind,
                    crate::codec::sector_sum(*checksum_kind, checksums, index),
                )),
                _ => None,
            };
            let is_verified = content.is_verified();
            let verified = match sums {
                Some((kind, sums)) => self
                    .read_first(&piece, is_verified)
                    .and_then(|got| self.read_sectors(&piece, kind, sums, got)),
                None => Err(error.clone()),
            };
            let found = match verified {
                Ok(buf) => Some(buf),
                Err(Error::Memory) => return Err(Error::Memory),
                Err(error) => {
                    let start = index as u64 * SECTOR_BYTES;
                    lost.push(Lost { range: start..start + SECTOR_BYTES, error });
                    let order = self.order(&piece, true);
                    let mut copies = order.iter();
                    copies.find_map(|copy| self.read_copy(&piece, copy).ok())
                }
            };
            if let Some(buf) = found {
                self.push_next(&mut batches, &piece, buf);
            }
        }
        self.write_batches(batches)?;
        Ok(lost)
    }

    /// For each device, whether new chunks are kept from all of it.
    pub(super) fn is_closed(&self, member: &Member) -> bool {
        self.closed.load(Ordering::Acquire) >> member.index() & 1 == 1
    }

    /// The last byte that chunks have on a device, or are about to have.
    pub fn taken_end(&self, device: u16) -> Physical {
        let ledger = self.ledger.lock();
        Physical(ledger.rooms.get(usize::from(device)).map_or(0, Room::taken_end))
    }
}
