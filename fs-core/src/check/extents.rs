//! Extents of one file.

use super::data::{self, Job, Proof};
use super::findings::{rules, Findings};
use super::usage::Marked;
use super::{push, show, Checker, Spot};
use crate::buf::Buf;
use crate::codec;
use crate::format::chunk::ChunkKind;
use crate::format::extent::{Blob, Extent};
use crate::format::inode::InodeItem;
use crate::format::ptr::CompressionKind;
use crate::format::space::Run;
use crate::platform::Result;
use crate::units::{Logical, Txg, SECTOR_BYTES};
use alloc::format;
use alloc::vec::Vec;

/// A blob as the file refers to it: blob and anchor, until the window ends.
struct Window {
    blob: Blob,
    birth: Txg,
    anchor: u64,
}

impl Window {
    /// Whether an item at `at` or later can still name it. An anchor before zero has wrapped.
    fn reaches(&self, at: u64) -> bool {
        let end = self.anchor.wrapping_add(u64::from(self.blob.logical));
        at < end
    }
}

/// Byte counts of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub stored: u64,
    pub promised: u64,
    pub logical: u64,
}

/// What was met of a file's content.
#[derive(Default)]
pub(super) struct Extents {
    sums: Sums,
    count: u64,
    /// Where the last item ends.
    end: u64,
    /// Where the last item with data ends.
    data_end: u64,
    inline: Option<u64>,
    windows: Vec<Window>,
}

impl Extents {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Byte counts so far.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Takes note of an item.
    pub fn item(
        &mut self,
        checker: &mut Checker<'_>,
        spot: &Spot,
        at: u64,
        value: &[u8],
        birth: Txg,
    ) -> Result<()> {
        let (tree, ino) = (spot.tree.unwrap_or_default(), spot.object.unwrap_or_default());
        let (extent, birth) =
            Extent::decode(value, at, birth).map_err(|bad| bad.in_item(tree, ino))?;
        self.count += 1;
        if at < self.end {
            let detail = format!("at byte {at}, the one before ends at {}", self.end);
            checker.findings.add(&rules::EXTENT_OVERLAP, spot.clone(), detail);
        }
        let len = extent.len();
        // Extents of 2^63 - 1 bytes exist, sums beyond are forged.
        self.end = at.saturating_add(len.max(SECTOR_BYTES));
        if !matches!(extent, Extent::Promised { .. }) {
            self.data_end = at.saturating_add(len);
            self.sums.logical = self.sums.logical.saturating_add(len);
        }
        match extent {
            Extent::Inline { compression, logical, bytes } => {
                self.inline = Some(u64::from(logical));
                check_inline(checker, spot, compression, logical, &bytes)
            }
            Extent::Promised { len } => {
                self.sums.promised = self.sums.promised.saturating_add(len);
                Ok(())
            }
            Extent::Plain { addr, len, checksum_kind, checksums } => {
                self.sums.stored = self.sums.stored.saturating_add(len);
                let run = Run { addr, bytes: len };
                let proof = Proof::Sectors { kind: checksum_kind, sums: checksums };
                met(checker, birth, Job { spot: spot.clone(), at, run, proof })
            }
            Extent::Packed { blob, offset, .. } => {
                let anchor = at.wrapping_sub(u64::from(offset));
                self.packed(checker, spot, at, (blob, birth), anchor)
            }
        }
    }

    fn packed(
        &mut self,
        checker: &mut Checker<'_>,
        spot: &Spot,
        at: u64,
        (blob, birth): (Blob, Txg),
        anchor: u64,
    ) -> Result<()> {
        self.windows.retain(|window| window.reaches(at));
        let known = |w: &&Window| w.anchor == anchor && w.blob.addr == blob.addr;
        if let Some(window) = self.windows.iter().find(known) {
            // In pools of an early version an item that joins a reference may have another birth.
            checker.mixed_births |= window.birth != birth;
            if window.blob != blob {
                let detail = format!("at byte {at}");
                checker.findings.add(&rules::BLOB_WINDOW, spot.clone().at(blob.addr), detail);
            }
            return Ok(());
        }
        push(&mut self.windows, Window { blob, birth, anchor })?;
        let run = Run { addr: blob.addr, bytes: blob.allocated() };
        self.sums.stored = self.sums.stored.saturating_add(run.bytes);
        met(checker, birth, Job { spot: spot.clone(), at, run, proof: Proof::Blob(blob) })
    }

    /// Compares the file's fields with what was met.
    pub fn finish(&self, inode: &InodeItem, spot: &Spot, findings: &mut Findings) {
        let size_end = inode.size.next_multiple_of(SECTOR_BYTES);
        if self.data_end > size_end {
            let detail = format!("data to byte {}, size {}", self.data_end, inode.size);
            findings.add(&rules::EXTENT_SIZE, spot.clone(), detail);
        }
        if let Some(bytes) = self.inline {
            // A file that has grown since reads as zeros after its inline bytes.
            if bytes > inode.size || self.data_end > bytes {
                let detail = format!("{bytes} bytes inline, size {}", inode.size);
                findings.add(&rules::EXTENT_INLINE, spot.clone(), detail);
            }
        }
        let Sums { stored, promised, .. } = self.sums;
        if inode.stored_bytes != stored || inode.promised_bytes != promised {
            let detail = format!(
                "{} bytes stored and {} promised instead of {stored} and {promised}",
                inode.stored_bytes, inode.promised_bytes
            );
            findings.add(&rules::EXTENT_SUMS, spot.clone(), detail);
        }
    }
}

fn check_inline(
    checker: &mut Checker<'_>,
    spot: &Spot,
    compression: CompressionKind,
    logical: u32,
    bytes: &[u8],
) -> Result<()> {
    if compression == CompressionKind::None {
        return Ok(());
    }
    let codecs = &*checker.pool.platform().codecs;
    match codec::expand(codecs, compression, bytes, logical, Logical(0), Buf::zeroed) {
        Ok(_) => Ok(()),
        Err(error) => checker.findings.add_error(&rules::EXTENT_INLINE, spot.clone(), error),
    }
}

/// Marks the space of data that is not verified.
pub(super) fn mark(checker: &mut Checker<'_>, spot: &Spot, run: Run) -> Result<()> {
    let (marked, _) = mark_data(checker, run)?;
    let rule = match marked {
        Marked::Fresh | Marked::Again => return Ok(()),
        Marked::Unmapped => &rules::SPACE_UNMAPPED,
        Marked::WrongKind => &rules::SPACE_SHARED,
    };
    checker.findings.add(rule, spot.clone().at(run.addr), show(run));
    Ok(())
}

/// Marks the space of data; returns how many bytes of it were marked before.
fn mark_data(checker: &mut Checker<'_>, run: Run) -> Result<(Marked, u64)> {
    let (extra, mut outcome) = (&mut checker.extra, Ok(()));
    let mut repeated = 0;
    let marked = checker.usage.mark(run, ChunkKind::Data, &mut |run| {
        repeated += run.bytes;
        if let Err(error) = push(extra, run) {
            outcome = Err(error);
        }
    });
    outcome.map(|()| (marked, repeated))
}

/// Marks the space of data, and queues the data for verification when it is met for the first time.
fn met(checker: &mut Checker<'_>, birth: Txg, job: Job) -> Result<()> {
    checker.stats.extents += 1;
    checker.met.add(job.run, birth, false);
    if birth <= checker.met.since {
        return Ok(());
    }
    let (marked, repeated) = mark_data(checker, job.run)?;
    let spot = job.spot.clone().at(job.run.addr);
    match marked {
        Marked::Fresh | Marked::Again => {}
        Marked::Unmapped => {
            let detail = format!("data at byte {}: {}", job.at, show(job.run));
            checker.findings.add(&rules::SPACE_UNMAPPED, spot, detail);
            return Ok(());
        }
        Marked::WrongKind => {
            let detail = format!("data at byte {} is not in a data chunk", job.at);
            checker.findings.add(&rules::SPACE_SHARED, spot, detail);
        }
    }
    if repeated == job.run.bytes || !checker.options.data {
        return Ok(());
    }
    data::queue(checker, job)
}
