//! Which sectors are in use, as found by following every pointer.
//!
//! One bit a sector: 32 KiB for each GiB of chunks.

use crate::error::Error;
use crate::format::chunk::{Chunk, ChunkKind};
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, SECTOR_BYTES, SECTOR_SHIFT};
use alloc::vec::Vec;
use core::ops::Range;

/// What became of marking a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marked {
    /// Every sector was free before.
    Fresh,
    /// Some sectors were marked before; they were handed to the caller.
    Again,
    /// The run is not within one chunk.
    Unmapped,
    /// It is in a chunk of another kind; it is marked all the same.
    WrongKind,
}

/// The sectors of one chunk.
pub(super) struct ChunkUse {
    pub start: Logical,
    pub length: u64,
    pub kind: ChunkKind,
    words: Vec<u64>,
}

impl ChunkUse {
    /// Number of sectors in use.
    pub fn used(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Sectors `64 * index..` as bits.
    pub fn word(&self, index: usize) -> u64 {
        self.words[index]
    }

    /// Marks sectors; calls `again` for each run of those that were marked before.
    fn mark(&mut self, sectors: Range<u64>, again: &mut dyn FnMut(Range<u64>)) {
        let mut repeated: Option<Range<u64>> = None;
        let mut at = sectors.start;
        while at < sectors.end {
            let word = &mut self.words[(at / 64) as usize];
            // Whole words that are free are the common case.
            if at % 64 == 0 && sectors.end - at >= 64 && *word == 0 {
                *word = u64::MAX;
                at += 64;
                continue;
            }
            let bit = 1 << (at % 64);
            if *word & bit != 0 {
                match &mut repeated {
                    Some(run) if run.end == at => run.end += 1,
                    other => {
                        if let Some(run) = other.replace(at..at + 1) {
                            again(run);
                        }
                    }
                }
            }
            *word |= bit;
            at += 1;
        }
        if let Some(run) = repeated {
            again(run);
        }
    }
}

/// Which sectors of which chunks are in use.
pub(super) struct Usage {
    /// By address.
    chunks: Vec<ChunkUse>,
}

impl Usage {
    /// Nothing is in use yet. `chunks` ascend and do not overlap.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new(chunks: &[Chunk]) -> Result<Usage> {
        let mut list = Vec::new();
        list.try_reserve_exact(chunks.len()).map_err(|_| Error::Memory)?;
        for chunk in chunks {
            let count = (chunk.length >> SECTOR_SHIFT).div_ceil(64) as usize;
            let mut words = Vec::new();
            words.try_reserve_exact(count).map_err(|_| Error::Memory)?;
            words.resize(count, 0);
            let (start, length, kind) = (chunk.logical, chunk.length, chunk.kind);
            list.push(ChunkUse { start, length, kind, words });
        }
        Ok(Usage { chunks: list })
    }

    /// All chunks, by address.
    pub fn chunks(&self) -> &[ChunkUse] {
        &self.chunks
    }

    fn find(&mut self, run: Run) -> Option<&mut ChunkUse> {
        let index = self.chunks.partition_point(|chunk| chunk.start <= run.addr).checked_sub(1)?;
        let chunk = &mut self.chunks[index];
        let offset = run.addr.0 - chunk.start.0;
        (offset < chunk.length && run.bytes <= chunk.length - offset).then_some(chunk)
    }

    /// The chunk that begins at `start`.
    pub fn chunk_at(&self, start: Logical) -> Option<&ChunkUse> {
        let index = self.chunks.binary_search_by_key(&start, |chunk| chunk.start).ok()?;
        Some(&self.chunks[index])
    }

    /// Marks a run, which something of that kind uses; hands out what was marked before.
    pub fn mark(&mut self, run: Run, kind: ChunkKind, again: &mut dyn FnMut(Run)) -> Marked {
        let Some(chunk) = self.find(run) else { return Marked::Unmapped };
        let start = chunk.start;
        let first = (run.addr.0 - start.0) >> SECTOR_SHIFT;
        let mut repeated = false;
        chunk.mark(first..first + (run.bytes >> SECTOR_SHIFT), &mut |sectors| {
            repeated = true;
            let addr = Logical(start.0 + sectors.start * SECTOR_BYTES);
            again(Run { addr, bytes: (sectors.end - sectors.start) * SECTOR_BYTES });
        });
        match (chunk.kind == kind, repeated) {
            (false, _) => Marked::WrongKind,
            (true, true) => Marked::Again,
            (true, false) => Marked::Fresh,
        }
    }

    /// Bytes in use in chunks of those kinds.
    pub fn bytes(&self, is_wanted: impl Fn(ChunkKind) -> bool) -> u64 {
        let wanted = self.chunks.iter().filter(|chunk| is_wanted(chunk.kind));
        wanted.map(|chunk| chunk.used() * SECTOR_BYTES).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::chunk::Profile;
    use crate::units::Txg;

    fn usage() -> Usage {
        let chunk = |logical, kind| Chunk {
            logical: Logical(logical),
            length: 1 << 20,
            birth: Txg(1),
            kind,
            profile: Profile::Single,
            stripes: Vec::new(),
        };
        let chunks = [chunk(1 << 20, ChunkKind::Data), chunk(3 << 20, ChunkKind::Metadata)];
        Usage::new(&chunks).unwrap()
    }

    fn mark(usage: &mut Usage, addr: u64, bytes: u64, kind: ChunkKind) -> (Marked, Vec<Run>) {
        let mut again = Vec::new();
        let run = Run { addr: Logical(addr), bytes };
        let marked = usage.mark(run, kind, &mut |run| again.push(run));
        (marked, again)
    }

    #[test]
    fn what_is_marked_twice_is_handed_out_run_by_run() {
        let mut usage = usage();
        let base = 1 << 20;
        for sector in [3u64, 4, 70] {
            let outcome = mark(&mut usage, base + sector * 4096, 4096, ChunkKind::Data);
            assert_eq!(outcome, (Marked::Fresh, Vec::new()));
        }
        let (marked, again) = mark(&mut usage, base, 1 << 20, ChunkKind::Data);
        assert_eq!(marked, Marked::Again);
        let run = |sector: u64, count: u64| Run {
            addr: Logical(base + sector * 4096),
            bytes: count * 4096,
        };
        assert_eq!(again, [run(3, 2), run(70, 1)]);
        assert_eq!(usage.bytes(|kind| kind == ChunkKind::Data), 1 << 20);
    }

    #[test]
    fn a_run_must_lie_in_one_chunk_of_its_kind() {
        let mut usage = usage();
        assert_eq!(mark(&mut usage, 0, 4096, ChunkKind::Data).0, Marked::Unmapped);
        assert_eq!(mark(&mut usage, (2 << 20) - 4096, 8192, ChunkKind::Data).0, Marked::Unmapped);
        assert_eq!(mark(&mut usage, 2 << 20, 4096, ChunkKind::Data).0, Marked::Unmapped);
        assert_eq!(mark(&mut usage, 3 << 20, 4096, ChunkKind::Data).0, Marked::WrongKind);
        assert_eq!(mark(&mut usage, u64::MAX - 4095, 4096, ChunkKind::Data).0, Marked::Unmapped);
    }
}
