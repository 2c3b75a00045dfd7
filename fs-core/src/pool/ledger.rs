//! Chunks made and dropped, and what of that the chunk tree must still learn.
//!
//! ```text
//! create_chunk --> new --------take_chunk_edits(n)-> recorded(n) --published(n)--> published
//! drop_chunk(n) -> dropped(n) -take_chunk_edits(n)-> erased ------published(n)--> gone, room free
//! ```
//!
//! - A chunk is in the chunk map from its creation until it is gone.
//! - The room of a dropped chunk is taken until the group that dropped it is published: the group
//!   before, which a crash falls back to, still maps the chunk there.
//! - Every new chunk goes into the next edits, whichever group it was made for. The group being
//!   written may allocate in a chunk that the group being filled has made, and a recorded chunk
//!   without content does no harm. A drop waits for its own group: until then the content counts.
//! - A crash falls back to a published group, which maps published chunks only. What replay of the
//!   intent log must find has to be in one.

use super::layout::{self, Demand};
use super::map::{ChunkMap, Mapped};
use super::moves::Moves;
use super::room::Room;
use crate::device::Member;
use crate::error::Error;
use crate::format::chunk::{
    Chunk, ChunkKind, DeviceItem, Profile, Stripe, CHUNK_BYTES_MAX, CHUNK_BYTES_MIN,
};
use crate::format::key::{kind, Key};
use crate::format::superblock::SYSTEM_CHUNKS_MAX;
use crate::platform::Result;
use crate::units::{Logical, Txg};
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

struct Dropped {
    txg: Txg,
    /// Whether the chunk tree has been told.
    erased: bool,
}

/// See the module.
pub struct Ledger {
    /// Room of each device, by index.
    pub rooms: Vec<Room>,
    /// Address of the next new chunk.
    pub next_chunk: Logical,
    /// Chunks that the published group does not map, with the group whose edits have them, if any.
    unpublished: BTreeMap<Logical, Option<Txg>>,
    dropped: BTreeMap<Logical, Dropped>,
    /// The DEVICE items that the chunk tree has, by index.
    device_items: Vec<Option<DeviceItem>>,
    /// Devices, a bit for each, that came after the chunk tree was written, which names another in
    /// their place.
    strangers: u64,
    /// Chunks that get another place.
    pub moves: Moves,
}

/// An edit of the chunk tree: the item's new value, or that it goes.
pub type ChunkEdit = (Key, Option<Vec<u8>>);

impl Ledger {
    /// A pool without chunks on devices of those sizes.
    pub fn new(device_bytes: impl Iterator<Item = u64>, next_chunk: Logical) -> Ledger {
        let rooms: Vec<Room> = device_bytes.map(Room::new).collect();
        let device_items = rooms.iter().map(|_| None).collect();
        Ledger {
            rooms,
            // Address zero stands for "nothing" in the format.
            next_chunk: next_chunk.max(Logical(CHUNK_BYTES_MIN)),
            unpublished: BTreeMap::new(),
            dropped: BTreeMap::new(),
            device_items,
            strangers: 0,
            moves: Moves::default(),
        }
    }

    /// Adds stored chunks: to the room of their devices and, in the result, to the map.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a chunk that cannot be where it says; nothing is changed then.
    pub fn load(
        &mut self,
        map: &ChunkMap,
        chunks: impl IntoIterator<Item = Chunk>,
    ) -> Result<ChunkMap> {
        let mut rooms = self.rooms.clone();
        let mut more = Vec::new();
        for chunk in chunks {
            if map.get(chunk.logical).is_some_and(|mapped| mapped.chunk == chunk) {
                // System chunks are in the superblock and in the tree.
                continue;
            }
            self.check_address(&chunk)?;
            let mapped = Mapped::new(chunk);
            self.check_strangers(&mapped)?;
            take_rooms(&mut rooms, &mapped)?;
            more.try_reserve(1).map_err(|_| Error::Memory)?;
            more.push(Arc::new(mapped));
        }
        let map = map.with(more)?;
        self.rooms = rooms;
        Ok(map)
    }

    /// Takes note that the chunk tree names another device in the place of one.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when there are chunks.
    pub fn note_stranger(&mut self, map: &ChunkMap, index: u16) -> Result<()> {
        self.strangers |= 1u64.checked_shl(u32::from(index)).unwrap_or(0);
        map.iter().try_for_each(|mapped| self.check_strangers(mapped))
    }

    fn check_strangers(&self, mapped: &Mapped) -> Result<()> {
        let is_strange = |stripe: &Stripe| {
            self.strangers.checked_shr(u32::from(stripe.device)).unwrap_or(0) & 1 == 1
        };
        match mapped.chunk.stripes.iter().any(is_strange) {
            true => {
                let what = "chunk on a device that is another than the chunk tree says";
                Err(Error::Corrupt { what, addr: mapped.chunk.logical })
            }
            false => Ok(()),
        }
    }

    fn check_address(&self, chunk: &Chunk) -> Result<()> {
        let corrupt = |what| Err(Error::Corrupt { what, addr: chunk.logical });
        if chunk.logical < Logical(CHUNK_BYTES_MIN) {
            return corrupt("chunk at address zero");
        }
        match chunk.logical.checked_add(chunk.length) {
            Some(end) if end <= self.next_chunk => Ok(()),
            _ => corrupt("chunk beyond the next new one"),
        }
    }

    /// Makes a chunk of at most `length` bytes: the largest power of two that fits somewhere; or
    /// one of up to `large` bytes when there is plenty of room beyond what is `kept`. It is told
    /// which `devices` are complete, and on which what is `owed` was promised.
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub fn create(
        &mut self,
        map: &ChunkMap,
        kind: ChunkKind,
        (profile, length, large): (Profile, u64, u64),
        (devices, demand): ((&[bool], &[bool]), &Demand),
        (owed, kept, txg): (u64, u64, Txg),
    ) -> Result<(ChunkMap, Chunk)> {
        if kind == ChunkKind::System && system_chunks(map).count() >= SYSTEM_CHUNKS_MAX {
            return Err(Error::NoSpace);
        }
        let (length, large) = (length.min(CHUNK_BYTES_MAX), large.min(CHUNK_BYTES_MAX));
        let (complete, counted) = devices;
        let placed = match large > length && complete == counted {
            true => {
                let wanted = (profile, length, large);
                layout::place_large(&self.rooms, complete, demand, wanted, kept)
            }
            false => None,
        };
        let placed = placed.or_else(|| {
            layout::place_promised(&self.rooms, devices, demand, (profile, length), owed)
        });
        let (length, stripes) = placed.ok_or(Error::NoSpace)?;
        let logical = self.next_chunk;
        let next = logical.checked_add(length).ok_or(Error::NoSpace)?;
        let chunk = Chunk { logical, length, birth: txg, kind, profile, stripes };
        let mapped = Arc::new(Mapped::new(chunk.clone()));
        let map = map.with(vec![mapped.clone()])?;
        take_rooms(&mut self.rooms, &mapped).expect("a layout places chunks in free room");
        self.next_chunk = next;
        self.unpublished.insert(logical, None);
        Ok((map, chunk))
    }

    /// Makes the room of a device, which has no chunk, that of one of so many bytes.
    pub fn set_room(&mut self, index: u16, bytes: u64) {
        let index = usize::from(index);
        let places = self.rooms.len().max(index + 1);
        self.rooms.resize(places, Room::new(0));
        self.device_items.resize(places, None);
        self.rooms[index] = Room::new(bytes);
    }

    /// Marks a chunk as dropped by group `txg`.
    pub fn drop_chunk(&mut self, logical: Logical, txg: Txg) {
        let before = self.dropped.insert(logical, Dropped { txg, erased: false });
        assert!(before.is_none(), "chunk at {logical} dropped twice");
    }

    /// Whether edits that were taken, or the tree that was loaded, have the chunk.
    pub fn is_recorded(&self, logical: Logical) -> bool {
        self.unpublished.get(&logical) != Some(&None)
    }

    /// Whether the published group maps the chunk.
    pub fn is_published(&self, logical: Logical) -> bool {
        !self.unpublished.contains_key(&logical)
    }

    /// System chunks that the superblock of the group whose edits were taken last must embed.
    pub fn system_chunks(&self, map: &ChunkMap) -> Vec<Chunk> {
        let system = map.iter().map(|mapped| mapped.recorded());
        let system = system.filter(|chunk| chunk.kind == ChunkKind::System);
        system.filter(|chunk| !self.is_erased(chunk)).cloned().collect()
    }

    fn is_erased(&self, chunk: &Chunk) -> bool {
        self.dropped.get(&chunk.logical).is_some_and(|drop| drop.erased)
    }

    /// A bound of the edits that [`take_edits`](Self::take_edits) would return now, and of their
    /// bytes.
    pub fn edits_bound(&self, map: &ChunkMap) -> (usize, usize) {
        let value = |logical: &Logical| {
            let mapped = map.get(*logical);
            mapped.map_or(0, |mapped| {
                let next = mapped.next.as_ref().map_or(0, |next| next.encoded_bytes());
                mapped.chunk.encoded_bytes().max(next)
            })
        };
        let new = self.unpublished.iter().filter(|(_, recorded)| recorded.is_none());
        let new = new.map(|(logical, _)| value(logical));
        let moved = self.moves.ripe().map(|logical| value(&logical));
        let devices = self.device_items.iter().map(|_| DeviceItem::BYTES);
        let gone = self.dropped.values().filter(|drop| !drop.erased).map(|_| 0);
        let all = new.chain(moved).chain(devices).chain(gone);
        all.fold((0, 0), |(count, bytes), value| (count + 1, bytes + value))
    }

    /// Edits that the chunk tree of group `txg` needs, sorted by key.
    pub fn take_edits(&mut self, map: &ChunkMap, members: &[Member], txg: Txg) -> Vec<ChunkEdit> {
        let mut edits: BTreeMap<Key, Option<Vec<u8>>> = BTreeMap::new();
        for logical in self.moves.sealed(txg) {
            if let Some(mapped) = map.get(logical) {
                let value = mapped.recorded().encode();
                edits.insert(Key::new(logical.0, kind::CHUNK, 0), Some(value));
            }
        }
        let key = |logical: &Logical| Key::new(logical.0, kind::CHUNK, 0);
        for (logical, drop) in &mut self.dropped {
            if drop.txg <= txg && !drop.erased {
                drop.erased = true;
                // What the tree never had needs no deletion.
                if self.unpublished.get(logical) == Some(&None) {
                    self.unpublished.remove(logical);
                } else {
                    edits.insert(key(logical), None);
                }
            }
        }
        for (logical, recorded) in &mut self.unpublished {
            if recorded.is_none() {
                let mapped = map.get(*logical).expect("a new chunk is in the map");
                edits.insert(key(logical), Some(mapped.recorded().encode()));
                *recorded = Some(txg);
            }
        }
        for (member, item) in members.iter().zip(self.make_device_items(map, members)) {
            let known = &mut self.device_items[usize::from(member.index())];
            let item = (!member.is_vacant()).then_some(item);
            if *known != item {
                let key = Key::new(u64::from(member.index()), kind::DEVICE, 0);
                edits.insert(key, item.map(|item| item.to_bytes().to_vec()));
                *known = item;
            }
        }
        edits.into_iter().collect()
    }

    /// DEVICE items as they should be, by index.
    fn make_device_items(&self, map: &ChunkMap, members: &[Member]) -> Vec<DeviceItem> {
        let mut allocated = vec![0; self.rooms.len()];
        for mapped in map.iter().filter(|mapped| !self.is_erased(&mapped.chunk)) {
            let bytes = mapped.recorded().stripe_bytes();
            for stripe in &mapped.recorded().stripes {
                allocated[usize::from(stripe.device)] += bytes;
            }
        }
        let make = |(member, allocated): (&Member, u64)| {
            let (identity, errors) = (member.identity(), member.errors());
            DeviceItem {
                id: identity.device_id,
                bytes: identity.bytes,
                allocated,
                state: 0,
                role: 0,
                reserved0: [0; 6],
                read_errors: errors.read,
                write_errors: errors.write,
                checksum_errors: errors.checksum,
                reserved: [0; 64],
            }
        };
        members.iter().zip(allocated).map(make).collect()
    }

    /// Notes the DEVICE item that the chunk tree has.
    pub fn set_device_item(&mut self, index: u16, item: DeviceItem) {
        self.device_items[usize::from(index)] = Some(item);
    }

    /// Group `txg` is on disk: what it dropped is gone. Returns the map without it, if it changed.
    pub fn published(&mut self, map: &ChunkMap, txg: Txg) -> Option<ChunkMap> {
        let moved = self.switch(map, txg);
        let map = moved.as_ref().unwrap_or(map);
        self.unpublished.retain(|_, recorded| recorded.is_none_or(|recorded| recorded > txg));
        let is_gone = |drop: &Dropped| drop.txg <= txg && drop.erased;
        // Ascending, as the map of drops is.
        let gone: Vec<Logical> = self
            .dropped
            .iter()
            .filter(|(_, drop)| is_gone(drop))
            .map(|(logical, _)| *logical)
            .collect();
        if gone.is_empty() {
            return moved;
        }
        for logical in &gone {
            self.dropped.remove(logical);
            let mapped = map.get(*logical).expect("a dropped chunk stays mapped until it is gone");
            for stripe in mapped.stripes().chain(mapped.further_stripes()) {
                self.rooms[usize::from(stripe.device)].give_back(stripe.at, stripe.bytes);
            }
        }
        Some(map.without(|chunk| gone.binary_search(&chunk.logical).is_ok()))
    }
}

/// Bytes of the next system chunk. There are at most [`SYSTEM_CHUNKS_MAX`] of them; so the first
/// few are small, and each further one as large as all before it, if there is plenty of room.
pub(super) fn system_chunk_bytes(map: &ChunkMap) -> u64 {
    let sizes = system_chunks(map).map(|chunk| chunk.length);
    let (count, bytes) = sizes.fold((0, 0u64), |(count, sum), bytes| (count + 1, sum + bytes));
    match count < SMALL_SYSTEM_CHUNKS {
        true => CHUNK_BYTES_MIN,
        false => (1 << bytes.ilog2()).clamp(CHUNK_BYTES_MIN, CHUNK_BYTES_MAX),
    }
}

/// So many system chunks are of the smallest size.
const SMALL_SYSTEM_CHUNKS: usize = 4;

fn system_chunks(map: &ChunkMap) -> impl Iterator<Item = &Chunk> {
    map.iter().map(|mapped| &mapped.chunk).filter(|chunk| chunk.kind == ChunkKind::System)
}

pub(super) fn take_rooms(rooms: &mut [Room], mapped: &Mapped) -> Result<()> {
    let addr = mapped.chunk.logical;
    for stripe in mapped.stripes() {
        let what = "chunk on a device that the pool does not have";
        let room =
            rooms.get_mut(usize::from(stripe.device)).ok_or(Error::Corrupt { what, addr })?;
        room.take(stripe.at, stripe.bytes, addr)?;
    }
    Ok(())
}
