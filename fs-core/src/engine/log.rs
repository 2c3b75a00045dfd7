//! fsync: making one file durable without a commit.
//!
//! All who wait at one moment share a frame and a flush: the first becomes the leader, takes
//! everybody's requests, and writes. What a frame holds, in this order, for each requested file:
//! the part of the intent list that the log does not have yet, then the file's fields and the
//! ranges the log does not have. Both are taken under the file's lock, so the fields agree with the
//! names around them.
//!
//! When a frame cannot be had (the list overflowed, no room for a segment, too much for one frame)
//! a commit does instead.

use crate::buf::{Buf, Slice};
use crate::engine::{data, Engine};
use crate::error::Error;
use crate::format::extent::Extent;
use crate::format::key::{kind, Key};
use crate::format::log::{LogRecord, RangeContent, Record};
use crate::format::ptr::ChecksumKind;
use crate::format::space::Run;
use crate::format::superblock::LogStart;
use crate::intent::{LogStore, LogWriter, SEGMENT_BYTES_MIN};
use crate::pool::RunWrite;
use crate::subvol::inode::{Inode, State};
use crate::subvol::intents::Pending;
use crate::subvol::ranges::{Content, Piece, RangeMap};
use crate::subvol::store::{Result, Store};
use crate::subvol::Subvol;
use crate::sync::{Mutex, Rank, Signal};
use crate::units::{Ino, Logical, TreeId, Txg};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(test)]
mod tests;

/// Bytes of a segment in a pool of usual size.
const SEGMENT_BYTES: u64 = 4 << 20;
/// Bytes of a file that the log lacks, up to which they go into the log itself; more are written in
/// place first. What the log has already stays in memory for the group's commit, which writes it in
/// fewer and longer extents.
const LOG_DATA_MAX: u64 = 64 << 10;

/// Files collected for one frame; with more, a commit is the better deal.
const FILES_PER_FRAME_MAX: usize = 1024;

/// A file to be made durable.
type Request = (TreeId, Ino);

/// The intent log of an open pool.
pub struct Log {
    writer: Mutex<Writer>,
    waiting: Mutex<Vec<Request>>,
    /// Batches of requests that were begun and that are done; a request belongs to the batch after
    /// the last one begun.
    begun: AtomicU64,
    done: AtomicU64,
    /// Somebody leads.
    busy: AtomicBool,
    changed: Signal,
}

struct Writer {
    frames: LogWriter,
    /// Whether the published superblock names a place from which these frames are found.
    named: bool,
    /// Where the superblock being written says that replay begins.
    naming: Option<LogStart>,
    /// Whether somebody synced a file since the pool was opened.
    wanted: bool,
    /// Where frames begin, and the newest group of which they hold records.
    written: VecDeque<(LogStart, Txg)>,
}

impl Log {
    /// The log of a pool that was opened with nothing to replay.
    pub fn new(pool_id: [u8; 16]) -> Log {
        Log {
            writer: Mutex::ranked(
                Rank::Log,
                Writer {
                    frames: LogWriter::new(pool_id, None),
                    named: false,
                    naming: None,
                    wanted: false,
                    written: VecDeque::new(),
                },
            ),
            waiting: Mutex::ranked(Rank::Short, Vec::new()),
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            changed: Signal::new(),
        }
    }

    /// Before the cut of group `txg`, which is closed: where replay is to begin after it, which its
    /// superblock must name: the first frame with records of a later group, or the place of the
    /// next frame. `None` without a log.
    ///
    /// Segments before that place are freed by this very group, so that a crash after it does not
    /// leave them used and unnamed. One that was taken for a later group waits for that group.
    ///
    /// Makes a place for frames ready if one is wanted. Without room there is no log, and fsync
    /// commits.
    pub fn begin(&self, store: &Store, txg: Txg) -> Option<LogStart> {
        let mut writer = self.writer.lock();
        if writer.wanted && writer.frames.position().is_none() {
            let place = LogPlace { store, txg: Some(txg) };
            let _ = writer.frames.begin(&place, txg);
        }
        let first = writer.written.iter().find(|(_, newest)| *newest > txg);
        let start = first.map(|(start, _)| *start).or_else(|| writer.frames.position());
        writer.naming = start;
        if let Some(start) = &start {
            for run in writer.frames.release_before(start, txg) {
                store.space.free(run, txg);
            }
        }
        start
    }

    /// Group `txg` is published: frames with nothing newer are not needed any more.
    pub fn published(&self, txg: Txg) {
        let mut writer = self.writer.lock();
        writer.named = writer.naming.is_some();
        while writer.written.front().is_some_and(|(_, newest)| *newest <= txg) {
            writer.written.pop_front();
        }
    }

    /// From where to where frames are that are needed, all of them written; `None` when there are
    /// none.
    pub fn needed(&self) -> Option<(LogStart, LogStart)> {
        let writer = self.writer.lock();
        let (first, _) = writer.written.front()?;
        Some((*first, writer.frames.position()?))
    }

    /// Gives all segments back; the pool is about to be closed.
    pub fn retire(&self, store: &Store) {
        let mut writer = self.writer.lock();
        writer.written.clear();
        let segments = writer.frames.segments();
        writer.frames = LogWriter::new(store.pool.pool_id(), None);
        writer.named = false;
        // Or the last commit would make a segment that no superblock names.
        writer.wanted = false;
        drop(writer);
        if segments.is_empty() {
            return;
        }
        let handle = store.groups.enter();
        for run in segments {
            store.space.free(run, handle.txg());
        }
    }
}

/// Where frames go: data chunks that the published chunk tree has, so that replay finds them.
pub(super) struct LogPlace<'a> {
    store: &'a Store,
    /// The group to take segments for; the open one when not given.
    txg: Option<Txg>,
}

impl<'a> LogPlace<'a> {
    /// For frames written while groups come and go.
    pub fn new(store: &'a Store) -> LogPlace<'a> {
        LogPlace { store, txg: None }
    }
}

impl LogStore for LogPlace<'_> {
    fn copies(&self, addr: Logical) -> usize {
        self.store.pool.copies_at(addr)
    }

    fn read(&self, run: Run, copy: usize) -> Result<Buf> {
        self.store.pool.read_run(run, copy)
    }

    fn write(&self, at: Logical, buf: Slice) -> Result<()> {
        self.store.pool.write(alloc::vec![RunWrite { addr: at, bufs: alloc::vec![buf] }])
    }

    fn allocate_segment(&self) -> Result<(Run, Txg)> {
        let store = self.store;
        let least = self.segment_bytes_min();
        // A small pool has no room for long ones.
        let want = if least < SEGMENT_BYTES_MIN { least } else { SEGMENT_BYTES };
        // The handle keeps the group from being cut while it gets the segment.
        let handle = if self.txg.is_none() { Some(store.groups.enter()) } else { None };
        let txg = handle.as_ref().map(|handle| handle.txg()).or(self.txg).unwrap_or_default();
        let run = store.space.allocate_published(want, least, txg, store)?;
        Ok((run, txg))
    }

    fn segment_bytes_min(&self) -> u64 {
        (self.store.pool.chunk_bytes() / 4).clamp(64 << 10, SEGMENT_BYTES_MIN)
    }

    fn blake3(&self, bytes: &[u8]) -> [u8; 32] {
        self.store.platform.codecs.blake3(bytes)
    }
}

/// Records on their way to a frame.
#[derive(Default)]
struct Payload {
    bytes: Vec<u8>,
    count: u32,
    /// Newest group of any record.
    newest: Txg,
    /// A record names data without a checksum: it must be durable before the frame may be.
    is_unproven: bool,
}

impl Payload {
    fn push(&mut self, txg: Txg, tree: TreeId, record: Record) {
        LogRecord { txg, tree, record }.encode_to(&mut self.bytes);
        self.count += 1;
        self.newest = self.newest.max(txg);
    }
}

/// Why a batch could not go to the log.
enum Trouble {
    /// A commit will do instead.
    NeedsCommit,
    /// The pool is broken.
    Broken(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        match error {
            Error::NoSpace | Error::Memory => Trouble::NeedsCommit,
            other => Trouble::Broken(other),
        }
    }
}

impl Engine {
    /// Makes a file's data, size and attributes durable, and every name change so far.
    ///
    /// # Errors
    /// [`Error::Failed`] when that is not possible; errors that reading the file's tree gives.
    pub fn fsync(&self, subvol: &Subvol, ino: Ino) -> Result<()> {
        if self.store.has_failed() {
            return Err(Error::Failed);
        }
        if !self.lacks_anything(subvol, ino) {
            return self.wait_for_begun();
        }
        if self.store.is_read_only() {
            // What came in while the pool was made read-only.
            return self.commit();
        }
        let log = &self.log;
        let batch = {
            let mut waiting = log.waiting.lock();
            waiting.push((subvol.id, ino));
            log.begun.load(Ordering::SeqCst) + 1
        };
        loop {
            if log.done.load(Ordering::SeqCst) >= batch {
                return if self.store.has_failed() { Err(Error::Failed) } else { Ok(()) };
            }
            if log.busy.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                self.lead();
                log.busy.store(false, Ordering::SeqCst);
                log.changed.notify_all();
                continue;
            }
            log.changed.wait_until(|| {
                log.done.load(Ordering::SeqCst) >= batch || !log.busy.load(Ordering::SeqCst)
            });
        }
    }

    /// What counts as logged may be on its way to a frame that is not durable yet, or to a commit.
    /// Waits for the batch that took it.
    fn wait_for_begun(&self) -> Result<()> {
        let log = &self.log;
        let begun = log.begun.load(Ordering::SeqCst);
        if log.done.load(Ordering::SeqCst) < begun {
            log.changed.wait_until(|| log.done.load(Ordering::SeqCst) >= begun);
        }
        if self.store.has_failed() {
            return Err(Error::Failed);
        }
        Ok(())
    }

    /// Whether anything of the file, or of the namespace, is neither published nor in the log.
    fn lacks_anything(&self, subvol: &Subvol, ino: Ino) -> bool {
        let groups = &self.store.groups;
        if self.store.intents.lacks(groups.published().next(), groups.open()) {
            return true;
        }
        // An inode that is not in memory has no unpublished changes.
        subvol.table.get(ino).is_some_and(|inode| lacks(&inode.state.read()))
    }

    /// Serves everybody who waits now.
    fn lead(&self) {
        let log = &self.log;
        let (batch, requests) = {
            let mut waiting = log.waiting.lock();
            let batch = log.begun.fetch_add(1, Ordering::SeqCst) + 1;
            (batch, core::mem::take(&mut *waiting))
        };
        let outcome = self.write_frame(requests);
        // Not before: what was taken for the frame, and counts as logged now, may be of a group
        // that was opened meanwhile.
        let upto = self.store.groups.open();
        match outcome {
            Ok(()) => {}
            Err(Trouble::NeedsCommit) => {
                // A failure is seen by everybody through `has_failed`.
                let _ = self.commit_upto(upto);
            }
            Err(Trouble::Broken(error)) => self.fail(upto, &error),
        }
        log.done.store(batch, Ordering::SeqCst);
    }

    fn write_frame(&self, requests: Vec<Request>) -> Result<(), Trouble> {
        {
            let mut writer = self.log.writer.lock();
            if !writer.named {
                // The next group's superblock will name a place for frames.
                writer.wanted = true;
                return Err(Trouble::NeedsCommit);
            }
        }
        let payload = self.collect(requests)?;
        if payload.count == 0 {
            return Ok(());
        }
        if payload.is_unproven {
            self.store.pool.flush()?;
        }
        let mut writer = self.log.writer.lock();
        let place = LogPlace::new(&self.store);
        if payload.bytes.len() > LogWriter::max_payload(&place) {
            return Err(Trouble::NeedsCommit);
        }
        let start = writer.frames.position().ok_or(Trouble::NeedsCommit)?;
        // Known before it is on the device: a group that is published meanwhile must not begin
        // replay after this frame.
        writer.written.push_back((start, payload.newest));
        writer.frames.append(&place, &payload.bytes, payload.count)?;
        drop(writer);
        self.store.pool.flush()?;
        Ok(())
    }

    /// What the requested files and the namespace need to be durable.
    fn collect(&self, requests: Vec<Request>) -> Result<Payload, Trouble> {
        let mut payload = Payload::default();
        let mut todo: Vec<Request> = requests;
        todo.sort_unstable();
        todo.dedup();
        let mut files = 0;
        // A file may come again: renamed when it had been looked at, with bytes written since.
        while let Some((tree, ino)) = todo.pop() {
            files += 1;
            if files > FILES_PER_FRAME_MAX {
                return Err(Trouble::NeedsCommit);
            }
            let Some(subvol) = self.subvol(tree) else { continue };
            match subvol.table.get(ino) {
                Some(inode) => {
                    self.write_large(&subvol, &inode)?;
                    let mut state = inode.state.write();
                    if !self.is_replayable(&state) {
                        return Err(Trouble::NeedsCommit);
                    }
                    self.take_intents(&mut payload, &mut todo)?;
                    collect_inode(&mut payload, tree, &inode, &mut state)?;
                }
                None => self.take_intents(&mut payload, &mut todo)?,
            }
        }
        Ok(payload)
    }

    fn take_intents(&self, payload: &mut Payload, todo: &mut Vec<Request>) -> Result<(), Trouble> {
        let groups = &self.store.groups;
        // Open first: a group that closes in between is then still looked at.
        let open = groups.open();
        let first = groups.published().next();
        let Pending { bytes, starts, needed } =
            self.store.intents.take(first, open.next()).ok_or(Trouble::NeedsCommit)?;
        if !starts.is_empty() {
            payload.bytes.extend_from_slice(&bytes);
            payload.count += starts.len() as u32;
            payload.newest = payload.newest.max(groups.open());
        }
        todo.extend(needed);
        Ok(())
    }

    /// Whether everything a log record of the inode would name could be found after a crash: the
    /// chunk map it would be found by is the published one, and what it shares is somebody's there.
    /// What has been logged was replayable then, and stays so.
    fn is_replayable(&self, state: &State) -> bool {
        let space = &self.store.space;
        let known = |map: &RangeMap| {
            map.fresh().all(|(_, piece)| match &piece.content {
                Content::Written(extent) => {
                    data::run_of(extent).is_none_or(|run| space.is_published(run))
                }
                Content::Shared(extent) => {
                    data::run_of(extent).is_none_or(|run| space.is_of_published_groups(run))
                }
                _ => true,
            })
        };
        known(&state.ranges) && state.aside.as_ref().is_none_or(|aside| known(&aside.ranges))
    }

    /// Writes a file's bytes to their place when they are too many for the log. Only those of the
    /// open group: those of a group that is being written are its writer's business, and space may
    /// not be taken for it once it is published, which may be at any moment.
    fn write_large(&self, subvol: &Arc<Subvol>, inode: &Arc<Inode>) -> Result<(), Trouble> {
        let is_large = |state: &State| match &state.aside {
            Some(aside) if aside.ranges.fresh_bytes() > LOG_DATA_MAX => Err(Trouble::NeedsCommit),
            _ => Ok(state.ranges.fresh_bytes() > LOG_DATA_MAX),
        };
        // Nobody waits for the writer of the group who has nothing to write himself.
        if !is_large(&inode.state.read())? {
            return Ok(());
        }
        // Whoever writes a group waits for this lock before it looks at the inode's bytes.
        let _only_one = inode.flushing.lock();
        let tasks = {
            let state = inode.state.read();
            if !is_large(&state)? {
                return Ok(());
            }
            data::tasks(subvol, inode, &state, state.txg, false)
        };
        Ok(data::write_tasks(&self.store, tasks)?)
    }
}

/// Whether something of an inode is neither published nor in the log.
fn lacks(state: &State) -> bool {
    state.unlogged
        || state.ranges.lacks()
        || state.aside.as_ref().is_some_and(|aside| aside.lacks())
}

fn collect_inode(
    payload: &mut Payload,
    tree: TreeId,
    inode: &Inode,
    state: &mut State,
) -> Result<(), Trouble> {
    // Of an inode that is gone the list of intents says all there is to say.
    if state.gone {
        return Ok(());
    }
    if let Some(shared) = state.aside.as_mut().filter(|aside| !aside.gone && aside.lacks()) {
        // While the group's writer looks at it nothing can be marked as logged. To log it without
        // would be wrong: it would come again, after newer ranges.
        let aside = Arc::get_mut(shared).ok_or(Trouble::NeedsCommit)?;
        let txg = aside.txg;
        collect_ranges(payload, txg, tree, inode.ino, &mut aside.ranges);
        aside.unlogged = false;
        push_inode(payload, txg, tree, inode.ino, &aside.item);
    }
    if state.txg.0 != 0 {
        collect_ranges(payload, state.txg, tree, inode.ino, &mut state.ranges);
        push_inode(payload, state.txg, tree, inode.ino, &state.item);
        state.unlogged = false;
    }
    Ok(())
}

fn push_inode(
    payload: &mut Payload,
    txg: Txg,
    tree: TreeId,
    ino: Ino,
    item: &crate::format::inode::InodeItem,
) {
    let key = Key::new(ino.0, kind::INODE, 0);
    let value = Some(item.to_bytes().to_vec());
    payload.push(txg, tree, Record::Item { key, value, keep_size: false });
}

fn collect_ranges(payload: &mut Payload, txg: Txg, tree: TreeId, ino: Ino, map: &mut RangeMap) {
    map.log_fresh(|offset, piece| {
        payload.is_unproven |= is_unproven(&piece.content);
        let content = content_of(piece);
        payload.push(txg, tree, Record::Range { ino, offset, len: piece.len, content });
    });
}

/// Whether replay cannot find out that the data did not reach the device.
fn is_unproven(content: &Content) -> bool {
    let Content::Written(extent) = content else { return false };
    match extent {
        Extent::Plain { checksum_kind, .. } => *checksum_kind == ChecksumKind::None,
        Extent::Packed { blob, .. } => blob.checksum_kind == ChecksumKind::None,
        Extent::Inline { .. } | Extent::Promised { .. } => false,
    }
}

fn content_of(piece: &Piece) -> RangeContent {
    match &piece.content {
        Content::Bytes { data, .. } => RangeContent::Bytes(data.to_vec()),
        Content::Written(extent) => RangeContent::Written(clone_data(extent)),
        Content::Shared(extent) => RangeContent::Shared(clone_data(extent)),
        Content::Hole => RangeContent::Hole,
        Content::Promised => RangeContent::Promised,
    }
}

fn clone_data(extent: &Extent) -> Extent {
    debug_assert!(matches!(extent, Extent::Plain { .. } | Extent::Packed { .. }));
    extent.clone()
}
