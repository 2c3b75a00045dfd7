//! A hash of a set, to which elements can be added and from which they can be taken.
//!
//! LtHash16 with 1024 lanes: an element becomes 1024 numbers of 16 bits, the output of BLAKE3 in
//! extendable mode, and the hash of a set is the sum of its elements' numbers, lane by lane, modulo
//! 2^16. The order of additions does not matter, and a subtraction undoes one. Why two sets with
//! one sum cannot be found: `docs/decisions/0002-content-identity.md`.

use alloc::boxed::Box;
use alloc::vec::Vec;

/// Numbers of a sum.
const LANES: usize = 1024;
/// Bytes of one expanded element, and of the lanes of a sum.
const LANE_BYTES: usize = LANES * 2;

/// What elements are hashed for; never used for anything else.
const ELEMENT_CONTEXT: &str = "cairn 2026-11-26 element of a subvolume's content";
/// What sums are hashed for.
const SUM_CONTEXT: &str = "cairn 2026-11-26 identity of a subvolume's content";

/// The sum of a set's elements.
pub(super) struct Sum {
    lanes: Vec<u16>,
    /// How many elements there are.
    count: u64,
    hasher: Box<blake3::Hasher>,
    expanded: Vec<u8>,
}

#[inline(never)]
fn hasher(context: &str) -> Box<blake3::Hasher> {
    Box::new(blake3::Hasher::new_derive_key(context))
}

impl Clone for Sum {
    /// A hasher is large and has nothing between two elements, so it is made anew.
    fn clone(&self) -> Sum {
        let mut sum = Sum::empty();
        sum.lanes.copy_from_slice(&self.lanes);
        sum.count = self.count;
        sum
    }
}

impl Sum {
    /// Bytes of an encoded sum.
    pub const BYTES: usize = 8 + LANE_BYTES;

    /// The sum of no elements.
    pub fn empty() -> Sum {
        Sum {
            lanes: alloc::vec![0; LANES],
            count: 0,
            hasher: hasher(ELEMENT_CONTEXT),
            expanded: alloc::vec![0; LANE_BYTES],
        }
    }

    /// Adds an element.
    pub fn add(&mut self, element: &[u8]) {
        self.count = self.count.wrapping_add(1);
        self.each_lane(element, u16::wrapping_add);
    }

    /// Takes away an element.
    pub fn take(&mut self, element: &[u8]) {
        self.count = self.count.wrapping_sub(1);
        self.each_lane(element, u16::wrapping_sub);
    }

    fn each_lane(&mut self, element: &[u8], change: fn(u16, u16) -> u16) {
        self.hasher.reset();
        // Chunk by chunk: see `platform::blake3`.
        for chunk in element.chunks(blake3::CHUNK_LEN) {
            self.hasher.update(chunk);
        }
        self.hasher.finalize_xof().fill(&mut self.expanded);
        for (lane, bytes) in self.lanes.iter_mut().zip(self.expanded.chunks_exact(2)) {
            *lane = change(*lane, u16::from_le_bytes([bytes[0], bytes[1]]));
        }
    }

    /// How many elements the set has.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The sum as bytes: the count, then the lanes, all little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Sum::BYTES);
        bytes.extend_from_slice(&self.count.to_le_bytes());
        bytes.extend(self.lanes.iter().flat_map(|lane| lane.to_le_bytes()));
        bytes
    }

    /// The sum of those bytes; `None` when they are of another length.
    pub fn decode(bytes: &[u8]) -> Option<Sum> {
        let (count, lanes) = bytes.split_first_chunk::<8>()?;
        if lanes.len() != LANE_BYTES {
            return None;
        }
        let mut sum = Sum::empty();
        sum.count = u64::from_le_bytes(*count);
        for (lane, bytes) in sum.lanes.iter_mut().zip(lanes.chunks_exact(2)) {
            *lane = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
        Some(sum)
    }

    /// The short hash of the sum.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = hasher(SUM_CONTEXT);
        for chunk in self.encode().chunks(blake3::CHUNK_LEN) {
            hasher.update(chunk);
        }
        *hasher.finalize().as_bytes()
    }
}
