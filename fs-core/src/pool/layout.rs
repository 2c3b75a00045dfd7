//! Profiles: how a chunk lies on its devices.
//!
//! A chunk is cut into *columns*, each of which has as many stripes as the profile has copies:
//!
//! ```text
//! stripes:    column 0, copy 0 | column 0, copy 1 | column 1, copy 0 | column 1, copy 1 | ...
//! addresses:  unit 0 is in column 0, unit 1 in column 1, ... and around again
//! ```
//!
//! Profiles that are not striped have one column, and no units. The stripes of a chunk are on
//! different devices, except those of `dup`, which are both on one.
//!
//! # Choosing devices
//!
//! The devices with the most free space come first. For copies on `k` devices this uses all space
//! that can be used: a chunk can be made as long as `k` devices have room. A striped chunk takes
//! from more devices at once, and with devices of unequal sizes could leave space that no longer
//! has a partner; so it gets only as many columns as lower the [`supply`] by no more than its own
//! size.
//!
//! # Supply
//!
//! Space is promised before chunks are made of it, so the pool must know how much it can promise:
//! *any* mix of chunks of data and metadata that takes no more than the supply can be made. With
//! `k` the most devices a chunk needs and `S(j)` the free bytes without the `j` fullest-of-space
//! devices, `k * min(S(j) / (k - j))` is what chunks on `k` devices can take; a chunk less for each
//! `j`, or two copies of one where they may be on one device, keeps that true whatever the order in
//! which chunks are made.
//!
//! What was promised before a device was lost counted on that device's room. As long as the others
//! have not enough for it, new copies stand on it *on paper*: such chunks lack a copy until it is
//! back, and the promise is kept.

use super::room::Room;
use crate::format::chunk::{Chunk, Profile, Stripe, CHUNK_BYTES_MIN, STRIPES_MAX, STRIPE_UNIT};
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

/// How many bytes from `offset` on are in one column.
pub fn piece_bytes(chunk: &Chunk, offset: u64) -> u64 {
    if chunk.columns() == 1 {
        return chunk.length - offset;
    }
    STRIPE_UNIT - offset % STRIPE_UNIT
}

/// Where a copy of `offset..offset + bytes` is, which lies in one column.
pub fn segment(chunk: &Chunk, copy: usize, offset: u64, bytes: u64) -> Segment {
    let columns = chunk.columns();
    let (column, inside) = if columns == 1 {
        (0, offset)
    } else {
        let unit = offset / STRIPE_UNIT;
        (unit % columns, unit / columns * STRIPE_UNIT + offset % STRIPE_UNIT)
    };
    let stripe = chunk.stripes[column as usize * chunk.profile.copies() as usize + copy];
    Segment { device: stripe.device, at: Physical(stripe.physical.0 + inside), bytes }
}

/// What the profiles of a pool ask of its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    data: Profile,
    metadata: Profile,
    chunk_bytes: u64,
}

impl Demand {
    /// What chunks of those profiles and that size need.
    pub fn new(data: Profile, metadata: Profile, chunk_bytes: u64) -> Demand {
        Demand { data, metadata, chunk_bytes }
    }

    /// The most devices that any chunk needs.
    pub fn devices(&self) -> u64 {
        self.data.devices_min().max(self.metadata.devices_min())
    }

    fn is_uniform(&self) -> bool {
        self.data.devices_min() == self.metadata.devices_min()
    }

    fn has_dup(&self) -> bool {
        self.data == Profile::Dup || self.metadata == Profile::Dup
    }

    /// Device bytes of which any mix of chunks can be made, with so much free on each device.
    fn supply_of(&self, mut free: Vec<u64>) -> u64 {
        if self.has_dup() && free.len() > 1 {
            // The last bit of a device has no room for the second copy.
            free.iter_mut().for_each(|bytes| *bytes = bytes.saturating_sub(CHUNK_BYTES_MIN));
        }
        free.sort_unstable_by_key(|bytes| Reverse(*bytes));
        let devices = self.devices();
        let is_exact = self.is_uniform() && free.len() as u64 == devices;
        // What one device may have to give at once that the others do not.
        let lopsided = self.chunk_bytes * if self.has_dup() { 2 } else { 1 };
        let mut least = u64::MAX;
        for skipped in 0..devices {
            let rest: u64 = free.iter().skip(skipped as usize).sum();
            let slack = if is_exact { 0 } else { (devices - 1 - skipped) * lopsided };
            least = least.min(rest.saturating_sub(slack) / (devices - skipped) * devices);
        }
        least
    }
}

/// Device bytes of which any mix of chunks can be made. A device that is not `complete` counts as a
/// partner only when there are not enough others.
pub fn supply(rooms: &[Room], complete: &[bool], demand: &Demand) -> u64 {
    let free_of = |wanted: &dyn Fn(usize) -> bool| -> Vec<u64> {
        let wanted = rooms.iter().enumerate().filter(|(index, _)| wanted(*index));
        wanted.map(|(_, room)| room.usable()).collect()
    };
    let whole = free_of(&|index| complete[index]);
    let devices = demand.devices();
    if whole.len() as u64 >= devices {
        return demand.supply_of(whole);
    }
    // Each chunk takes room of at least one complete device.
    let each = if demand.is_uniform() { devices } else { 1 };
    let bound = whole.iter().sum::<u64>().saturating_mul(each);
    demand.supply_of(free_of(&|_| true)).min(bound)
}

/// Chooses places for a chunk of at most `length` bytes, the largest power of two that fits.
/// `None` when not even the smallest does.
pub fn place(
    rooms: &[Room],
    complete: &[bool],
    demand: &Demand,
    profile: Profile,
    length: u64,
) -> Option<(u64, Vec<Stripe>)> {
    let order = by_free_space(rooms);
    let whole: Vec<usize> = order.iter().copied().filter(|index| complete[*index]).collect();
    let lengths = || {
        core::iter::successors(Some(length), |length| Some(length / 2))
            .take_while(|length| *length >= CHUNK_BYTES_MIN)
    };
    let on_whole = lengths().find_map(|length| {
        let stripes = match profile {
            Profile::Dup => whole.iter().find_map(|index| dup_on(*index, &rooms[*index], length)),
            _ => spread(rooms, complete, &whole, demand, profile, length),
        };
        stripes.map(|stripes| (length, stripes))
    });
    if on_whole.is_some() || profile.devices_min() == 1 {
        return on_whole;
    }
    // Better a chunk that lacks copies until the devices are back than no chunk.
    let missing = order.iter().copied().filter(|index| !complete[*index]);
    let others: Vec<usize> = whole.iter().copied().chain(missing).collect();
    place_on_paper(rooms, (&whole, &others), profile, length)
}

/// As [`place`], where `owed` bytes must be left for what was promised when all of `counted` were
/// there: if they would not be left on complete devices, copies may be on others.
pub fn place_promised(
    rooms: &[Room],
    (complete, counted): (&[bool], &[bool]),
    demand: &Demand,
    (profile, length): (Profile, u64),
    owed: u64,
) -> Option<(u64, Vec<Stripe>)> {
    let placed = place(rooms, complete, demand, profile, length);
    if complete == counted || profile.devices_min() == 1 {
        return placed;
    }
    let leaves_enough = |(placed, stripes): &(u64, Vec<Stripe>)| {
        let columns = stripes.len() as u64 / profile.copies();
        // What a smaller chunk does not hold is asked for again.
        let owed = owed.saturating_add((length - placed) * profile.copies());
        let after = after(rooms, stripes, placed / columns);
        after.is_some_and(|after| supply(&after, complete, demand) >= owed)
    };
    if placed.as_ref().is_some_and(leaves_enough) {
        return placed;
    }
    let order = by_free_space(rooms);
    let whole: Vec<usize> = order.iter().copied().filter(|index| complete[*index]).collect();
    let others: Vec<usize> = order.into_iter().filter(|index| counted[*index]).collect();
    place_on_paper(rooms, (&whole, &others), profile, length).or(placed)
}

/// As [`place`], for a chunk of more than `least` bytes, and of at most `length`, which is larger
/// than those that promises count on: it takes a small part of what is not owed, or there is none.
/// So a pool that has grown is not made of chunks for a small one, of which the chunk tree could
/// not name enough; and what is left when it is nearly full is shared out as ever.
pub fn place_large(
    rooms: &[Room],
    complete: &[bool],
    demand: &Demand,
    (profile, least, length): (Profile, u64, u64),
    owed: u64,
) -> Option<(u64, Vec<Stripe>)> {
    let spare = supply(rooms, complete, demand).saturating_sub(owed);
    let mut length = length;
    while length > least && length * profile.copies() > spare / LARGE_PART {
        length /= 2;
    }
    if length <= least {
        return None;
    }
    let (placed, stripes) = place(rooms, complete, demand, profile, length)?;
    let columns = stripes.len() as u64 / profile.copies();
    let after = after(rooms, &stripes, placed / columns)?;
    let is_large = placed > least && supply(&after, complete, demand) >= owed;
    is_large.then_some((placed, stripes))
}

/// A large chunk takes no more of what is not owed.
const LARGE_PART: u64 = 8;

/// One copy on a device that is `whole`, the others on any, in that order.
fn place_on_paper(
    rooms: &[Room],
    (whole, others): (&[usize], &[usize]),
    profile: Profile,
    length: u64,
) -> Option<(u64, Vec<Stripe>)> {
    let lengths = core::iter::successors(Some(length), |length| Some(length / 2));
    lengths.take_while(|length| *length >= CHUNK_BYTES_MIN).find_map(|length| {
        let has_hole = |index: &&usize| rooms[**index].lowest(length).is_some();
        let first = *whole.iter().find(has_hole)?;
        let others = others.iter().filter(|index| **index != first).filter(has_hole);
        let mut devices = vec![first];
        devices.extend(others.take(profile.copies() as usize - 1));
        if (devices.len() as u64) < profile.copies() {
            return None;
        }
        stripes_on(rooms, &devices, length).map(|stripes| (length, stripes))
    })
}

/// Devices, the emptiest first, equal ones in order.
fn by_free_space(rooms: &[Room]) -> Vec<usize> {
    let free: Vec<u64> = rooms.iter().map(Room::usable).collect();
    let mut order: Vec<usize> = (0..rooms.len()).collect();
    order.sort_unstable_by_key(|index| (Reverse(free[*index]), *index));
    order
}

/// Two copies on one device: the first as low, the second as high as it goes. So copies are as far
/// apart as the device allows, the scratch that hits one is unlikely to hit the other, and the free
/// space stays in one piece between them.
fn dup_on(index: usize, room: &Room, length: u64) -> Option<Vec<Stripe>> {
    let device = u16::try_from(index).ok()?;
    let (low, high) = (room.lowest(length)?, room.highest(length)?);
    // They can only overlap in the one hole that is left for both.
    (high.0 - low.0 >= length)
        .then(|| vec![Stripe { device, physical: low }, Stripe { device, physical: high }])
}

/// As many columns as there are devices for; `order` has those that may be used.
fn spread(
    rooms: &[Room],
    complete: &[bool],
    order: &[usize],
    demand: &Demand,
    profile: Profile,
    length: u64,
) -> Option<Vec<Stripe>> {
    let copies = profile.copies() as usize;
    let most = if profile.is_striped() { order.len().min(STRIPES_MAX) / copies } else { 1 };
    let columns_max = most.checked_ilog2().map(|log| 1u64 << log)?;
    let columns_max = columns_max.min(length / CHUNK_BYTES_MIN);
    let price = length * copies as u64;
    let mut columns = columns_max;
    while columns > 0 {
        let bytes = length / columns;
        let has_hole = |index: &usize| rooms[*index].lowest(bytes).is_some();
        let wanted = columns as usize * copies;
        let devices: Vec<usize> = order.iter().copied().filter(has_hole).take(wanted).collect();
        if devices.len() == wanted {
            let stripes = stripes_on(rooms, &devices, bytes)?;
            if columns == 1 || keeps_supply(rooms, complete, demand, &stripes, bytes, price) {
                return Some(stripes);
            }
        }
        columns /= 2;
    }
    None
}

fn stripes_on(rooms: &[Room], devices: &[usize], bytes: u64) -> Option<Vec<Stripe>> {
    let stripe = |index: &usize| {
        let physical = rooms[*index].lowest(bytes)?;
        Some(Stripe { device: u16::try_from(*index).ok()?, physical })
    };
    devices.iter().map(stripe).collect()
}

/// Whether a chunk takes no more of the supply than its size.
fn keeps_supply(
    rooms: &[Room],
    complete: &[bool],
    demand: &Demand,
    stripes: &[Stripe],
    bytes: u64,
    price: u64,
) -> bool {
    after(rooms, stripes, bytes).is_some_and(|after| {
        supply(&after, complete, demand).saturating_add(price) >= supply(rooms, complete, demand)
    })
}

/// The rooms when those stripes are taken.
fn after(rooms: &[Room], stripes: &[Stripe], bytes: u64) -> Option<Vec<Room>> {
    let mut after: Vec<Room> = rooms.iter().map(Room::outline).collect();
    for stripe in stripes {
        let room = &mut after[usize::from(stripe.device)];
        room.take(stripe.physical, bytes, crate::units::Logical(0)).ok()?;
    }
    Some(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Logical;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn rooms(free: &[u64]) -> Vec<Room> {
        free.iter().map(|mib| Room::new((mib + 1) * MIB + (128 << 10))).collect()
    }

    fn take(rooms: &mut [Room], stripes: &[Stripe], bytes: u64) {
        for stripe in stripes {
            let room = &mut rooms[usize::from(stripe.device)];
            room.take(stripe.physical, bytes, Logical(0)).unwrap();
        }
    }

    /// Makes chunks of a profile until there is no room; returns how much they hold.
    fn fill(free: &[u64], profile: Profile, chunk: u64) -> u64 {
        let mut rooms = rooms(free);
        let complete = vec![true; rooms.len()];
        let demand = Demand::new(profile, profile.of_system(), chunk * MIB);
        let mut held = 0;
        while let Some((length, stripes)) = place(&rooms, &complete, &demand, profile, chunk * MIB)
        {
            let columns = stripes.len() as u64 / profile.copies();
            take(&mut rooms, &stripes, length / columns);
            held += length / MIB;
        }
        held
    }

    #[test]
    fn devices_of_unequal_sizes_are_used_as_far_as_the_profile_allows() {
        use Profile::*;
        for (free, profile, want) in [
            (&[10, 3, 7][..], Single, 20),
            (&[10, 3, 7], Stripe, 20),
            (&[8, 8], Mirror, 8),
            (&[10, 3, 7], Mirror, 10),
            (&[10, 2, 2, 2], Mirror, 6),
            (&[10, 2, 2, 2], StripeMirror, 6),
            (&[4, 4, 4, 4], StripeMirror, 8),
            (&[6, 6, 6], Mirror3, 6),
            (&[4, 4, 4, 4, 4], Mirror4, 5),
        ] {
            assert_eq!(fill(free, profile, 1), want, "{profile:?} on {free:?}");
        }
    }

    #[test]
    fn a_striped_chunk_is_on_all_devices_and_a_range_of_it_in_their_turn() {
        let rooms = rooms(&[16, 16, 16, 16]);
        let demand = Demand::new(Profile::StripeMirror, Profile::Mirror, 4 * MIB);
        let complete = [true; 4];
        let (length, stripes) =
            place(&rooms, &complete, &demand, Profile::StripeMirror, 4 * MIB).unwrap();
        let chunk = Chunk {
            logical: Logical(MIB),
            length,
            birth: crate::units::Txg(1),
            kind: crate::format::chunk::ChunkKind::Data,
            profile: Profile::StripeMirror,
            stripes,
        };
        assert_eq!((chunk.length, chunk.columns(), chunk.stripe_bytes()), (4 * MIB, 2, 2 * MIB));
        let device = |copy, unit: u64| segment(&chunk, copy, unit * STRIPE_UNIT, 4096).device;
        let mut seen: Vec<u16> = vec![device(0, 0), device(1, 0), device(0, 1), device(1, 1)];
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3]);
        assert_eq!((device(0, 2), device(1, 3)), (device(0, 0), device(1, 1)));
        assert_eq!(segment(&chunk, 0, 2 * STRIPE_UNIT + 4096, 4096).at.0, MIB + STRIPE_UNIT + 4096);
        assert_eq!(piece_bytes(&chunk, STRIPE_UNIT - 4096), 4096);
        assert_eq!(Chunk::decode(chunk.logical, &chunk.encode()), Ok(chunk));
    }

    fn profile() -> impl Strategy<Value = Profile> {
        let known: Vec<Profile> = Profile::ALL.into_iter().filter(|p| p.is_known()).collect();
        proptest::sample::select(known)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn what_was_promised_before_a_device_was_lost_can_be_made_after(
            free in proptest::collection::vec(0u64..40, 2..7),
            lost in 0usize..7,
            data in proptest::sample::select(vec![Profile::Mirror, Profile::StripeMirror]),
            metadata in proptest::sample::select(vec![Profile::Mirror, Profile::Mirror3]),
            chunk in 0u32..3,
            kinds in proptest::collection::vec(any::<bool>(), 200),
        ) {
            let chunk_bytes = MIB << chunk;
            let demand = Demand::new(data, metadata, chunk_bytes);
            let counted = vec![true; free.len()];
            let mut complete = counted.clone();
            complete[lost % free.len()] = false;
            let mut rooms = rooms(&free);
            let mut promised = supply(&rooms, &counted, &demand);
            for is_data in kinds {
                let profile = if is_data { data } else { metadata };
                let price = chunk_bytes * profile.copies();
                if promised < price {
                    continue;
                }
                promised -= price;
                let mut left = chunk_bytes;
                while left > 0 {
                    let wanted = 1 << left.ilog2();
                    let owed = promised + (left - wanted) * profile.copies();
                    let both = (&complete[..], &counted[..]);
                    let placed = place_promised(&rooms, both, &demand, (profile, wanted), owed);
                    let Some((length, stripes)) = placed else {
                        return Err(TestCaseError::fail(alloc::format!(
                            "no {} chunk: {promised} promised, {rooms:?}", profile.name())));
                    };
                    let copies = stripes.chunks(profile.copies() as usize);
                    for copies in copies {
                        prop_assert!(copies.iter().any(|s| complete[usize::from(s.device)]));
                    }
                    let columns = stripes.len() as u64 / profile.copies();
                    take(&mut rooms, &stripes, length / columns);
                    left -= length;
                }
            }
        }

        #[test]
        fn chunks_that_are_larger_leave_what_is_owed(
            free in proptest::collection::vec(0u64..400, 1..7),
            data in profile(),
            metadata in profile(),
            large in 1u32..8,
            owed in 0u64..400,
        ) {
            let demand = Demand::new(data, metadata, MIB);
            let complete = vec![true; free.len()];
            let mut rooms = rooms(&free);
            let mut before = supply(&rooms, &complete, &demand);
            let owed = owed * MIB;
            for profile in [data, metadata].into_iter().cycle() {
                let wanted = (profile, MIB, MIB << large);
                let Some((length, stripes)) =
                    place_large(&rooms, &complete, &demand, wanted, owed) else { break };
                prop_assert!(length > MIB && length <= MIB << large);
                let columns = stripes.len() as u64 / profile.copies();
                take(&mut rooms, &stripes, length / columns);
                let after = supply(&rooms, &complete, &demand);
                prop_assert!(after >= owed && after <= before, "{after} of {before}, {owed} owed");
                before = after;
            }
        }

        #[test]
        fn any_mix_of_chunks_that_the_supply_is_enough_for_can_be_made(
            free in proptest::collection::vec(0u64..40, 1..7),
            data in profile(),
            metadata in profile(),
            chunk in 0u32..4,
            kinds in proptest::collection::vec(any::<bool>(), 200),
        ) {
            let chunk_bytes = MIB << chunk;
            let demand = Demand::new(data, metadata, chunk_bytes);
            let complete = vec![true; free.len()];
            let mut rooms = rooms(&free);
            let mut promised = supply(&rooms, &complete, &demand);
            prop_assert!(promised <= rooms.iter().map(Room::usable).sum());
            for is_data in kinds {
                let profile = if is_data { data } else { metadata };
                if promised < chunk_bytes * profile.copies() {
                    continue;
                }
                // A chunk may be smaller when free space is in pieces; the rest is asked for again.
                let mut left = chunk_bytes;
                while left > 0 {
                    let wanted = 1 << left.ilog2();
                    let placed = place(&rooms, &complete, &demand, profile, wanted);
                    let Some((length, stripes)) = placed else {
                        return Err(TestCaseError::fail(alloc::format!(
                            "no {} chunk: {promised} promised, {rooms:?}", profile.name())));
                    };
                    let columns = stripes.len() as u64 / profile.copies();
                    take(&mut rooms, &stripes, length / columns);
                    left -= length;
                }
                promised -= chunk_bytes * profile.copies();
            }
        }
    }
}
