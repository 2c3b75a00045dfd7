//! Where chunks come from: the pool.

use super::ChunkSource;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::format::space::Run;
use crate::platform::Result;
use crate::pool::Pool;
use crate::units::{Logical, Txg};

impl ChunkSource for Pool {
    fn create_chunk(&self, kind: ChunkKind, txg: Txg) -> Result<Chunk> {
        Pool::create_chunk(self, kind, txg)
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

    fn discard(&self, run: Run) -> Result<()> {
        Pool::discard(self, run)
    }
}
