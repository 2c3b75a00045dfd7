//! Profiles: how a chunk lies on its devices.
//!
//! A profile is one implementation of [`Layout`], found by [`of`]. The rest of the pool asks it
//! where to put a new chunk and which bytes of which device hold a range of a copy; it knows
//! nothing of stripes itself. A copy is whatever is enough to rebuild the range on its own, so a
//! profile that cuts a copy over several devices reports several segments.

use super::room::Room;
use crate::format::chunk::{Chunk, Profile, Stripe};
use crate::units::Physical;
use alloc::vec;
use alloc::vec::Vec;
use core::cmp::Reverse;

/// A piece of a range of one copy: consecutive bytes on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the device.
    pub device: u16,
    /// First byte on it.
    pub at: Physical,
    /// Length.
    pub bytes: u64,
}

/// How the chunks of a profile lie on devices.
pub trait Layout: Sync {
    /// How many independent copies a chunk has.
    fn copies(&self) -> usize;

    /// Bytes that each stripe of a chunk of `length` logical bytes takes on its device.
    fn stripe_bytes(&self, length: u64) -> u64;

    /// Chooses places for a chunk of `length` bytes; `rooms` is indexed by device. `None` when
    /// there is no room.
    fn place(&self, rooms: &[Room], length: u64) -> Option<Vec<Stripe>>;

    /// Calls `each` with the pieces of `offset..offset + bytes` of a copy, in order. The range lies
    /// in the chunk.
    fn segments(
        &self,
        chunk: &Chunk,
        copy: usize,
        offset: u64,
        bytes: u64,
        each: &mut dyn FnMut(Segment),
    );
}

/// The layout of a profile; `None` for those that this version does not have.
pub fn of(profile: Profile) -> Option<&'static dyn Layout> {
    match profile {
        Profile::Single => Some(&Copies { count: 1 }),
        Profile::Dup => Some(&Copies { count: 2 }),
        _ => None,
    }
}

/// One or two whole copies on one device.
struct Copies {
    count: usize,
}

impl Copies {
    /// Places on one device: the first copy as low, the second as high as it goes. So copies are as
    /// far apart as the device allows, the scratch that hits one is unlikely to hit the other, and
    /// the free space stays in one piece between them.
    fn place_on(&self, device: u16, room: &Room, length: u64) -> Option<Vec<Stripe>> {
        let low = room.lowest(length)?;
        if self.count == 1 {
            return Some(vec![Stripe { device, physical: low }]);
        }
        let high = room.highest(length)?;
        // They can only overlap in the one hole that is left for both.
        (high.0 - low.0 >= length)
            .then(|| vec![Stripe { device, physical: low }, Stripe { device, physical: high }])
    }
}

impl Layout for Copies {
    fn copies(&self) -> usize {
        self.count
    }

    fn stripe_bytes(&self, length: u64) -> u64 {
        length
    }

    fn place(&self, rooms: &[Room], length: u64) -> Option<Vec<Stripe>> {
        let mut order: Vec<usize> = (0..rooms.len()).collect();
        // The emptiest device first, equal ones in order.
        order.sort_unstable_by_key(|device| (Reverse(rooms[*device].usable()), *device));
        order
            .into_iter()
            .find_map(|device| self.place_on(u16::try_from(device).ok()?, &rooms[device], length))
    }

    fn segments(
        &self,
        chunk: &Chunk,
        copy: usize,
        offset: u64,
        bytes: u64,
        each: &mut dyn FnMut(Segment),
    ) {
        let stripe = chunk.stripes[copy];
        each(Segment { device: stripe.device, at: Physical(stripe.physical.0 + offset), bytes });
    }
}
