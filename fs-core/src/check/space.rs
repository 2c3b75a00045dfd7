//! The space tree, the residue, and the log's place.

use super::findings::rules;
use super::usage::{ChunkUse, Marked};
use super::{show, tree, Checker, Spot};
use crate::buf::{Buf, Slice};
use crate::error::Error;
use crate::format::chunk::ChunkKind;
use crate::format::key::{kind, Key};
use crate::format::space::{Residue, Run, SummaryItem, REGION_BYTES};
use crate::intent::{self, LogStore};
use crate::platform::Result;
use crate::units::{Logical, TreeId, Txg, SECTOR_BYTES, SECTOR_SHIFT};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

/// What the pool says is in use.
#[derive(Default)]
pub(super) struct Stored {
    /// Bitmaps by region.
    bitmaps: BTreeMap<u64, Vec<u64>>,
    /// Used sectors by chunk.
    summaries: BTreeMap<u64, u64>,
    residue: Residue,
    /// Segments of the log. Those that the next group made are not recorded as used yet.
    log: Vec<Run>,
    /// Whether the tree and the residue could be read whole.
    complete: bool,
}

/// Reads the space tree and the residue.
///
/// # Errors
/// [`Error::Memory`] and the like.
#[inline(never)]
pub(super) fn load(checker: &mut Checker<'_>) -> Result<Stored> {
    let mut stored = Stored::default();
    let was_incomplete = core::mem::take(&mut checker.incomplete);
    let space_tree = tree(TreeId::SPACE, checker.superblock.space_root);
    checker.each_item(&space_tree, &mut |checker, key, value, _| {
        item(checker, &mut stored, key, value)
    })?;
    stored.complete = !checker.incomplete;
    checker.incomplete |= was_incomplete;
    load_residue(checker, &mut stored)?;
    Ok(stored)
}

fn item(checker: &mut Checker<'_>, stored: &mut Stored, key: Key, value: &[u8]) -> Result<()> {
    let spot = Spot::object(TreeId::SPACE, key.object);
    match (key.kind, key.object, key.offset) {
        (kind::SPACE_SUMMARY, 0, chunk) => {
            if checker.usage.chunk_at(Logical(chunk)).is_none() {
                checker.findings.add(&rules::SPACE_ITEM, spot.at(Logical(chunk)), "summary");
                return Ok(());
            }
            let summary =
                SummaryItem::decode(value).map_err(|bad| bad.in_item(TreeId::SPACE, chunk))?;
            stored.summaries.insert(chunk, summary.used_sectors);
        }
        (kind::SPACE_BITMAP, region, 0) => {
            let Some(sectors) = region_sectors(checker.usage.chunks(), region) else {
                checker.findings.add(&rules::SPACE_ITEM, spot.at(Logical(region)), "bitmap");
                return Ok(());
            };
            if value.len() as u64 != sectors / 8 {
                let what = "space bitmap of the wrong length";
                return Err(Error::BadItem { what, tree: TreeId::SPACE, object: region });
            }
            let words = value.chunks_exact(8).map(|bytes| {
                let mut raw = [0; 8];
                raw.copy_from_slice(bytes);
                u64::from_le_bytes(raw)
            });
            stored.bitmaps.insert(region, words.collect());
        }
        _ => checker.findings.add(&rules::ITEM_KIND, spot, format!("{key:?}")),
    }
    Ok(())
}

/// Sectors of the region that begins at `region`, if one does.
fn region_sectors(chunks: &[ChunkUse], region: u64) -> Option<u64> {
    let index = chunks.partition_point(|chunk| chunk.start.0 <= region).checked_sub(1)?;
    let chunk = &chunks[index];
    let offset = region - chunk.start.0;
    let fits = offset < chunk.length && offset % REGION_BYTES == 0;
    fits.then(|| (chunk.length - offset).min(REGION_BYTES) >> SECTOR_SHIFT)
}

fn load_residue(checker: &mut Checker<'_>, stored: &mut Stored) -> Result<()> {
    let Some(ptr) = checker.superblock.residue else { return Ok(()) };
    let spot = Spot::addr(ptr.addr);
    // Metadata is allocated in whole nodes, so that holes fit nodes.
    let node_bytes = u64::from(checker.superblock.node_bytes);
    let bytes = ptr.allocated().next_multiple_of(node_bytes);
    checker.mark_run(spot.clone(), Run { addr: ptr.addr, bytes }, ChunkKind::Metadata);
    let block = checker.blocks.read(&ptr);
    checker.report_bad_copies(TreeId::SPACE);
    let residue = block.and_then(|block| {
        let bytes = block.get(..ptr.logical as usize).unwrap_or(&block);
        Residue::decode(bytes, ptr.birth.0).map_err(|bad| bad.at(ptr.addr))
    });
    match residue {
        Ok(residue) => stored.residue = residue,
        Err(error) => {
            stored.complete = false;
            checker.report_block(spot, &error, (ptr.addr, &ptr.checksum))?;
        }
    }
    Ok(())
}

/// Follows the log from where the superblock says it begins, and marks its segments.
///
/// # Errors
/// [`Error::Memory`] and the like.
#[inline(never)]
pub(super) fn mark_log(checker: &mut Checker<'_>, stored: &mut Stored) -> Result<()> {
    let Some(start) = checker.superblock.log else { return Ok(()) };
    let spot = Spot::addr(start.segment.addr);
    let store = LogReader { checker };
    let scanned = intent::scan(&store, checker.pool.pool_id(), &start, &mut |_| Ok(true));
    stored.log = match scanned {
        Ok(end) => {
            if let Some(error) = end.unreadable {
                checker.findings.add_error(&rules::LOG, spot, error)?;
            }
            end.segments
        }
        Err(error) => {
            checker.findings.add_error(&rules::LOG, spot, error)?;
            Vec::from([start.segment])
        }
    };
    for segment in &stored.log {
        let mut shared = None;
        let marked = checker.usage.mark(*segment, ChunkKind::Data, &mut |run| shared = Some(run));
        let detail = match marked {
            Marked::Fresh => continue,
            Marked::Again => format!("it shares {}", shared.map(show).unwrap_or_default()),
            Marked::Unmapped => "a segment is in no chunk".into(),
            Marked::WrongKind => "a segment is not in a data chunk".into(),
        };
        checker.findings.add(&rules::LOG, Spot::addr(segment.addr), detail);
    }
    Ok(())
}

/// The log, to be read only.
struct LogReader<'c, 'a> {
    checker: &'c Checker<'a>,
}

impl LogStore for LogReader<'_, '_> {
    fn copies(&self, addr: Logical) -> usize {
        self.checker.pool.copies_at(addr)
    }

    fn read(&self, run: Run, copy: usize) -> Result<Buf> {
        self.checker.pool.read_run(run, copy)
    }

    fn write(&self, _at: Logical, _buf: Slice) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn allocate_segment(&self) -> Result<(Run, Txg)> {
        Err(Error::ReadOnly)
    }
}

/// Compares what is recorded as used with what was met.
///
/// # Errors
/// [`Error::Memory`] and the like.
#[inline(never)]
pub(super) fn compare(checker: &mut Checker<'_>, stored: &Stored) -> Result<()> {
    check_summaries(checker, stored);
    let mut bitmaps = Bitmaps { map: &stored.bitmaps, changed: BTreeMap::new() };
    for (runs, taken) in [(&stored.residue.taken, true), (&stored.residue.freed, false)] {
        for run in runs {
            if !bitmaps.apply(checker.usage.chunks(), *run, taken) {
                let what = if taken { "taken" } else { "freed" };
                let detail = format!("{what}: {}", show(*run));
                checker.findings.add(&rules::SPACE_RESIDUE, Spot::addr(run.addr), detail);
            }
        }
    }
    if !stored.complete {
        return Ok(());
    }
    let mut wrong = Vec::new();
    for chunk in checker.usage.chunks() {
        compare_chunk(chunk, &bitmaps, &stored.log, &mut wrong);
    }
    for (run, in_use) in wrong {
        // What was not met may be used by what could not be read, or by the log of an older group,
        // which is not followed.
        if !in_use && (checker.incomplete || checker.pool.is_past()) {
            continue;
        }
        let rule = if in_use { &rules::SPACE_IN_USE } else { &rules::SPACE_LEAK };
        checker.findings.add(rule, Spot::addr(run.addr), show(run));
    }
    if !checker.incomplete {
        check_totals(checker, stored);
    }
    Ok(())
}

fn check_summaries(checker: &mut Checker<'_>, stored: &Stored) {
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    for (region, words) in &stored.bitmaps {
        let chunks = checker.usage.chunks();
        let index = chunks.partition_point(|chunk| chunk.start.0 <= *region) - 1;
        let used: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        *sums.entry(chunks[index].start.0).or_insert(0) += used;
    }
    if !stored.complete {
        return;
    }
    let mut wrong = Vec::new();
    for chunk in checker.usage.chunks() {
        let used = sums.get(&chunk.start.0).copied().unwrap_or(0);
        match stored.summaries.get(&chunk.start.0) {
            Some(summary) if *summary == used => {}
            Some(summary) => wrong.push((chunk.start, format!("{summary} instead of {used}"))),
            None => wrong.push((chunk.start, format!("none instead of {used}"))),
        }
    }
    for (addr, detail) in wrong {
        checker.findings.add(&rules::SPACE_SUMMARY, Spot::addr(addr), detail);
    }
}

/// The stored bitmaps with the residue applied to copies of those it touches.
struct Bitmaps<'a> {
    map: &'a BTreeMap<u64, Vec<u64>>,
    changed: BTreeMap<u64, Vec<u64>>,
}

impl Bitmaps<'_> {
    fn word(&self, region: u64, index: usize) -> u64 {
        let words = self.changed.get(&region).or_else(|| self.map.get(&region));
        words.map_or(0, |words| words[index])
    }

    /// Takes or frees a run; false when it is not in one chunk, or some of it was so already.
    fn apply(&mut self, chunks: &[ChunkUse], run: Run, taken: bool) -> bool {
        let Some(index) = chunks.partition_point(|chunk| chunk.start <= run.addr).checked_sub(1)
        else {
            return false;
        };
        let chunk = &chunks[index];
        let offset = run.addr.0 - chunk.start.0;
        if offset >= chunk.length || run.bytes > chunk.length - offset {
            return false;
        }
        let mut exact = true;
        for at in (offset..offset + run.bytes).step_by(SECTOR_BYTES as usize) {
            let region = chunk.start.0 + at / REGION_BYTES * REGION_BYTES;
            let words = self.region(chunk, region);
            let sector = (at % REGION_BYTES) >> SECTOR_SHIFT;
            let (word, bit) = ((sector / 64) as usize, 1 << (sector % 64));
            exact &= (words[word] & bit != 0) != taken;
            words[word] ^= bit;
        }
        exact
    }

    fn region(&mut self, chunk: &ChunkUse, region: u64) -> &mut Vec<u64> {
        let map = self.map;
        self.changed.entry(region).or_insert_with(|| {
            let bytes = (chunk.length - (region - chunk.start.0)).min(REGION_BYTES);
            let empty = || alloc::vec![0; (bytes >> SECTOR_SHIFT) as usize / 64];
            map.get(&region).cloned().unwrap_or_else(empty)
        })
    }
}

/// Adds runs that are in use but recorded as free (true), or the other way round (false).
fn compare_chunk(
    chunk: &ChunkUse,
    bitmaps: &Bitmaps<'_>,
    log: &[Run],
    wrong: &mut Vec<(Run, bool)>,
) {
    let words = (chunk.length >> SECTOR_SHIFT) / 64;
    let words_per_region = (REGION_BYTES >> SECTOR_SHIFT) / 64;
    for index in 0..words {
        let region = chunk.start.0 + index / words_per_region * REGION_BYTES;
        let recorded = bitmaps.word(region, (index % words_per_region) as usize);
        let met = chunk.word(index as usize);
        let mut different = recorded ^ met;
        while different != 0 {
            let bit = different.trailing_zeros();
            different &= different - 1;
            let sector = index * 64 + u64::from(bit);
            let addr = Logical(chunk.start.0 + sector * SECTOR_BYTES);
            if log.iter().any(|run| run.addr <= addr && addr < run.end()) {
                continue;
            }
            let in_use = met >> bit & 1 == 1;
            match wrong.last_mut() {
                Some((run, same)) if *same == in_use && run.end() == addr => {
                    run.bytes += SECTOR_BYTES;
                }
                _ => wrong.push((Run { addr, bytes: SECTOR_BYTES }, in_use)),
            }
        }
    }
}

fn check_totals(checker: &mut Checker<'_>, stored: &Stored) {
    let data = checker.usage.bytes(|kind| kind == ChunkKind::Data);
    let metadata = checker.usage.bytes(|kind| kind != ChunkKind::Data);
    let slack: u64 = stored.log.iter().map(|run| run.bytes).sum();
    let superblock = checker.superblock;
    // The superblock may count space that the next group has already taken.
    for (what, counted, met) in
        [("data", superblock.data_used, data), ("metadata", superblock.metadata_used, metadata)]
    {
        if counted + slack < met {
            let detail = format!("{counted} bytes of {what} instead of {met}");
            checker.findings.add(&rules::SUPERBLOCK_USAGE, Spot::NONE, detail);
        }
    }
}
