//! Replaying the intent log.
//!
//! Records are put where the operations had put them: items into the overlay, fields and ranges
//! into inodes. What follows is an ordinary commit. So replay can be interrupted anywhere: until
//! that commit is published the log is still there, and replaying it again gives the same.
//!
//! - Segments are taken out of free space first: replay must not write over what it reads.
//! - A range that names an extent is believed only after its data was read and verified: the frame
//!   may have reached the device when the data had not. Replay ends before that frame, as it ends
//!   at a torn one; so frames are looked at first and applied then.

use crate::buf::Buf;
use crate::engine::data;
use crate::engine::log::LogPlace;
use crate::engine::Engine;
use crate::error::{Error, Incident};
use crate::format::extent::Extent;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::log::{LogRecord, RangeContent, Record};
use crate::format::space::Run;
use crate::format::superblock::LogStart;
use crate::intent;
use crate::pool::DataSource;
use crate::subvol::inode::{Inode, State};
use crate::subvol::ranges::{anchor, Content};
use crate::subvol::store::Result;
use crate::subvol::Subvol;
use crate::txg::Handle;
use crate::units::{Ino, Logical, TreeId, Txg};
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;

struct Replay<'a> {
    engine: &'a Engine,
    handle: Handle<'a>,
    published: Txg,
    applied: u64,
    /// Blobs whose space was taken: pieces of one blob come in several records.
    taken: BTreeSet<(TreeId, Ino, Logical, u64)>,
}

impl Engine {
    /// Applies what the log has beyond the published group. Returns how many records.
    ///
    /// # Errors
    /// Errors of the device or the trees; a torn or stale frame is no error but the end.
    #[inline(never)]
    pub(super) fn replay(&self, start: &LogStart) -> Result<u64> {
        let store = &*self.store;
        let place = LogPlace::new(store);
        let pool_id = store.pool.pool_id();
        let published = store.groups.published();
        let mut proof = Proof { engine: self, published, blobs: BTreeSet::new() };
        let end = intent::scan(&place, pool_id, start, &mut |record| proof.holds(&record))?;
        let mut replay = Replay {
            engine: self,
            handle: store.groups.enter_alone(),
            published,
            applied: 0,
            taken: BTreeSet::new(),
        };
        for run in &end.segments {
            replay.pin_segment(*run)?;
        }
        // No record of a frame that does not hold is applied: the names it has go with its data.
        let mut left = end.records;
        intent::scan(&place, pool_id, start, &mut |record| {
            if left == 0 {
                return Ok(false);
            }
            left -= 1;
            replay.apply(record)?;
            Ok(true)
        })?;
        if let Some(error) = end.unreadable {
            store.platform.report.incident(&Incident::Lost {
                addr: end.position.segment.addr,
                bytes: end.position.segment.bytes,
                error,
            });
        }
        let applied = replay.applied;
        if applied > 0 {
            store.platform.report.incident(&Incident::Replayed { records: applied });
        }
        Ok(applied)
    }
}

impl Replay<'_> {
    /// Keeps a segment from being allocated, and gives it back once the replay is published.
    fn pin_segment(&self, run: Run) -> Result<()> {
        let store = &*self.engine.store;
        let txg = self.handle.txg();
        // The first segment may be in use by the published group already.
        match store.space.take(run, txg, store) {
            Ok(()) | Err(Error::Corrupt { .. }) => {}
            Err(error) => return Err(error),
        }
        store.space.free(run, txg);
        Ok(())
    }

    fn apply(&mut self, record: LogRecord) -> Result<()> {
        let subvol = self.engine.subvol(record.tree);
        let Some(subvol) = subvol.filter(|_| record.txg > self.published) else {
            return Ok(());
        };
        match record.record {
            Record::Item { key, value, keep_size } => {
                self.item(&subvol, key, value, keep_size)?;
            }
            Record::Range { ino, offset, len, content } => {
                self.range(&subvol, ino, offset, len, content)?;
            }
        }
        self.applied += 1;
        Ok(())
    }

    fn item(
        &self,
        subvol: &Arc<Subvol>,
        key: Key,
        value: Option<Vec<u8>>,
        keep_size: bool,
    ) -> Result<()> {
        if key.kind != kind::INODE {
            subvol.set_item(self.handle.txg(), key, value.map(|v| Arc::from(v.as_slice())));
            return Ok(());
        }
        let ino = Ino(key.object);
        match value {
            Some(bytes) => self.inode(subvol, ino, &bytes, keep_size),
            None => self.gone(subvol, ino),
        }
    }

    fn inode(&self, subvol: &Arc<Subvol>, ino: Ino, bytes: &[u8], keep_size: bool) -> Result<()> {
        subvol.saw_ino(ino);
        let there = match subvol.inode(ino) {
            Ok(inode) => Some(inode),
            Err(Error::Posix(_)) => None,
            Err(error) => return Err(error),
        };
        self.set_inode(subvol, ino, bytes, keep_size, there)
    }

    /// Gives an inode, `there` or a new one, the fields of a record.
    // Not inlined: an inode is large, and finding out whether it is there goes deep.
    #[inline(never)]
    fn set_inode(
        &self,
        subvol: &Arc<Subvol>,
        ino: Ino,
        bytes: &[u8],
        keep_size: bool,
        there: Option<Arc<Inode>>,
    ) -> Result<()> {
        let txg = self.handle.txg();
        let mut item = InodeItem::decode(bytes).map_err(|bad| bad.in_item(subvol.id, ino.0))?;
        let Some(inode) = there else {
            (item.stored_bytes, item.promised_bytes) = (0, 0);
            if keep_size {
                item.size = 0;
            }
            let mut state = State::clean(item);
            let first = state.touch(txg);
            debug_assert!(first, "a new inode was never touched");
            let inode = subvol.table.insert_new(Inode::new(ino, state));
            subvol.list_dirty(txg, inode);
            subvol.count_inode(txg, 1);
            return Ok(());
        };
        let mut state = inode.state.write();
        let old = state.item;
        (item.stored_bytes, item.promised_bytes) = (old.stored_bytes, old.promised_bytes);
        if keep_size {
            item.size = old.size;
        }
        if state.touch(txg) {
            subvol.list_dirty(txg, inode.clone());
        }
        state.item = item;
        Ok(())
    }

    fn gone(&self, subvol: &Arc<Subvol>, ino: Ino) -> Result<()> {
        let inode = match subvol.inode(ino) {
            Ok(inode) => inode,
            Err(Error::Posix(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let txg = self.handle.txg();
        let mut state = inode.state.write();
        if state.touch(txg) {
            subvol.list_dirty(txg, inode.clone());
        }
        if !state.gone {
            state.gone = true;
            subvol.count_inode(txg, -1);
            let mut garbage = Vec::new();
            let before = state.ranges.memory();
            state.ranges.put(0, u64::MAX, Content::Hole, &mut garbage);
            subvol.store.dirty.adjust(before, state.ranges.memory());
            subvol.store.add_garbage(txg, garbage);
        }
        Ok(())
    }

    fn range(
        &mut self,
        subvol: &Arc<Subvol>,
        ino: Ino,
        offset: u64,
        len: u64,
        content: RangeContent,
    ) -> Result<()> {
        let inode = match subvol.inode(ino) {
            Ok(inode) => inode,
            Err(Error::Posix(_)) => {
                let what = "log names a file that is not there";
                return Err(Error::BadItem { what, tree: subvol.id, object: ino.0 });
            }
            Err(error) => return Err(error),
        };
        if inode.state.read().gone {
            return Ok(());
        }
        let content = match content {
            RangeContent::Bytes(bytes) => {
                let data = Buf::copy_of(&bytes)?.into_slice();
                self.put(subvol, &inode, offset, len, None, Some(data));
                return Ok(());
            }
            RangeContent::Written(extent) => {
                self.take_written(subvol, ino, offset, &extent)?;
                Content::Written(extent)
            }
            RangeContent::Shared(extent) => Content::Shared(extent),
            RangeContent::Hole => Content::Hole,
            RangeContent::Promised => Content::Promised,
        };
        self.put(subvol, &inode, offset, len, Some(content), None);
        Ok(())
    }

    fn put(
        &self,
        subvol: &Arc<Subvol>,
        inode: &Arc<Inode>,
        offset: u64,
        len: u64,
        content: Option<Content>,
        bytes: Option<crate::buf::Slice>,
    ) {
        let txg = self.handle.txg();
        let mut garbage = Vec::new();
        let mut state = inode.state.write();
        if state.touch(txg) {
            subvol.list_dirty(txg, inode.clone());
        }
        let before = state.ranges.memory();
        match (content, bytes) {
            (Some(content), _) => state.ranges.put(offset, len, content, &mut garbage),
            (None, Some(data)) => state.ranges.put_bytes(offset, data, &mut garbage),
            (None, None) => {}
        }
        subvol.store.dirty.adjust(before, state.ranges.memory());
        drop(state);
        subvol.store.add_garbage(txg, garbage);
    }

    /// Takes the space of an extent the log names.
    fn take_written(
        &mut self,
        subvol: &Arc<Subvol>,
        ino: Ino,
        at: u64,
        extent: &Extent,
    ) -> Result<()> {
        let store = &*self.engine.store;
        let run = match extent {
            Extent::Plain { addr, len, .. } => Run { addr: *addr, bytes: *len },
            Extent::Packed { blob, offset, .. } => {
                let key = (subvol.id, ino, blob.addr, anchor(at, *offset));
                if !self.taken.insert(key) {
                    return Ok(());
                }
                Run { addr: blob.addr, bytes: blob.allocated() }
            }
            Extent::Inline { .. } | Extent::Promised { .. } => return Ok(()),
        };
        store.space.take(run, self.handle.txg(), store)
    }
}

/// Looks whether the data that records name is there.
struct Proof<'a> {
    engine: &'a Engine,
    published: Txg,
    /// Blobs that are there: pieces of one blob come in several records.
    blobs: BTreeSet<(Logical, [u8; 32])>,
}

impl Proof<'_> {
    /// Whether a record can be applied. If not, the frame it is in did not reach the device whole:
    /// nobody was told that it had.
    fn holds(&mut self, record: &LogRecord) -> Result<bool> {
        if record.txg <= self.published {
            return Ok(true);
        }
        // One that was deleted: nobody waits for what it was.
        if self.engine.subvol(record.tree).is_none() {
            return Ok(true);
        }
        match &record.record {
            Record::Range { content: RangeContent::Written(extent), .. } => self.is_there(extent),
            Record::Range { content: RangeContent::Shared(extent), .. } => self.is_owned(extent),
            _ => Ok(true),
        }
    }

    /// Whether an extent that is shared belongs to somebody. It is logged only when it does.
    fn is_owned(&self, extent: &Extent) -> Result<bool> {
        let store = &*self.engine.store;
        let Some(run) = data::run_of(extent) else { return Ok(false) };
        match store.space.is_used(run, store) {
            Err(Error::Unmapped { .. }) => Ok(false),
            outcome => outcome,
        }
    }

    /// Whether an extent's data is there. One that cannot be read may be: then reading it fails
    /// later, which says more than to forget that it was written.
    fn is_there(&mut self, extent: &Extent) -> Result<bool> {
        let source = match extent {
            Extent::Plain { addr, len, checksum_kind, checksums } => DataSource::Plain {
                addr: *addr,
                len: *len,
                checksum_kind: *checksum_kind,
                checksums: checksums.clone(),
            },
            Extent::Packed { blob, .. } => {
                if self.blobs.contains(&(blob.addr, blob.checksum)) {
                    return Ok(true);
                }
                DataSource::Packed { blob: *blob }
            }
            Extent::Inline { .. } | Extent::Promised { .. } => return Ok(false),
        };
        let is_there = match self.engine.store.pool.prove(&source) {
            // In a chunk that was never published.
            Err(Error::Unmapped { .. }) => false,
            Err(Error::Device { .. }) => true,
            outcome => outcome?,
        };
        if let (DataSource::Packed { blob }, true) = (&source, is_there) {
            self.blobs.insert((blob.addr, blob.checksum));
        }
        Ok(is_there)
    }
}
