//! Where chunks come from: the pool.

use super::ChunkSource;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::format::space::Run;
use crate::platform::Result;
use crate::pool::Pool;
use crate::units::{Logical, Txg};
use core::ops::Range;

impl ChunkSource for Pool {
    fn create_chunk(&self, kind: ChunkKind, txg: Txg, owed: u64) -> Result<Chunk> {
        Pool::create_chunk(self, kind, txg, owed)
    }

    fn promised_bytes(&self) -> u64 {
        Pool::promised_bytes(self)
    }

    fn drop_chunk(&self, logical: Logical, txg: Txg) {
        Pool::drop_chunk(self, logical, txg);
    }

    fn unallocated_bytes(&self) -> u64 {
        Pool::unallocated_bytes(self)
    }

    fn chunk_bytes(&self) -> u64 {
        Pool::chunk_bytes(self)
    }

    fn copies(&self, kind: ChunkKind) -> u64 {
        self.profile(kind).copies()
    }

    fn is_within(&self, run: Run, range: &Range<u64>) -> bool {
        Pool::is_within(self, run, range)
    }

    fn discard(&self, run: Run, range: &Range<u64>) -> Result<u64> {
        Pool::discard(self, run, range)
    }

    fn hold(&self, from: u64, range: &Range<u64>, min_bytes: u64) -> Option<Range<u64>> {
        self.hold_unallocated(from, range, min_bytes)
    }

    fn discard_held(&self, held: Range<u64>) -> Result<u64> {
        Pool::discard_held(self, held)
    }
}
