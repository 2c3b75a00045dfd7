//! Invariants of the pool's memory, for tests and the checker.

use super::Pool;
use crate::format::chunk::{CHUNK_BYTES_MAX, CHUNK_BYTES_MIN};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

impl Pool {
    /// Compares the chunk map with the room on the devices.
    ///
    /// # Errors
    /// One sentence on the first contradiction.
    pub fn check(&self) -> Result<(), String> {
        let ledger = self.ledger.lock();
        let map = self.chunk_map();
        let mut stripes = Vec::new();
        let mut end = CHUNK_BYTES_MIN;
        for mapped in map.iter() {
            let chunk = &mapped.chunk;
            if chunk.logical.0 < end {
                return Err(format!("chunk at {} overlaps the one before it", chunk.logical));
            }
            if !(CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&chunk.length) {
                return Err(format!("chunk at {} has {} bytes", chunk.logical, chunk.length));
            }
            end = chunk.logical.0 + chunk.length;
            stripes.extend(mapped.stripes());
            stripes.extend(mapped.further_stripes());
        }
        if end > ledger.next_chunk.0 {
            return Err(format!("chunks reach {end}, beyond the next at {}", ledger.next_chunk));
        }
        stripes.extend(ledger.moves.leaving());
        stripes.sort_unstable_by_key(|stripe| (stripe.device, stripe.at));
        for pair in stripes.windows(2) {
            let (a, b) = (pair[0], pair[1]);
            if a.device == b.device && a.at.0 + a.bytes > b.at.0 {
                return Err(format!("two chunks share byte {} of device {}", b.at, b.device));
            }
        }
        let taken: u64 = ledger.rooms.iter().map(super::room::Room::taken_bytes).sum();
        let mapped: u64 = stripes.iter().map(|stripe| stripe.bytes).sum();
        if taken != mapped {
            return Err(format!("{taken} bytes are taken on devices, chunks map {mapped}"));
        }
        ledger.rooms.iter().try_for_each(super::room::Room::check)
    }
}
