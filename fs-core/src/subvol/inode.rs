//! Inodes in memory.
//!
//! An [`Inode`] is what operations lock. Its [`State`] holds the current fields and, for a regular
//! file, the range map of the newest group that changed it.
//!
//! ```text
//! clean --touch(n)--> changed by n --touch(n+1) or capture(n)--> set aside for the writer of n
//!                                                                     |  n published
//!                                                                     v
//!                                                                  settled
//! ```
//!
//! - `State::txg` is the group of the current changes; zero when there are none.
//! - `State::aside` is what group *n* made of the inode while *n* is being written. There is at
//!   most one: the group before *n* is published before *n* closes.
//! - The fields that follow from extents (`stored_bytes`, `promised_bytes`) are those of the newest
//!   resolved group; [`State::settle`] carries them over.
//!
//! Never: change a state without [`State::touch`], or touch it outside of a group's handle.

use crate::format::inode::InodeItem;
use crate::subvol::ranges::RangeMap;
use crate::sync::{Mutex, Rank, RwLock};
use crate::units::{Ino, Txg};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An inode in memory.
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    /// Its state. Locked by inode number, ascending, when an operation needs several.
    pub state: RwLock<State>,
    /// Held by whoever writes its bytes early, so that two do not write the same.
    pub flushing: Mutex<()>,
    /// Recently used: the cache's second chance.
    pub used: AtomicBool,
}

/// What an inode is now.
pub struct State {
    /// The fields.
    pub item: InodeItem,
    /// Group of the current changes; zero when there are none.
    pub txg: Txg,
    /// Ranges that group changed.
    pub ranges: RangeMap,
    /// What the group before made of it, until that is published.
    pub aside: Option<Arc<Aside>>,
    /// The inode is gone: its items are deleted by group `txg`.
    pub gone: bool,
    /// An aside or current change of fields or ranges that the intent log has not seen.
    pub unlogged: bool,
    /// Of a directory: a name that was looked for in vain.
    pub absent: Absent,
}

/// The hash of the name that was last looked for in a directory and was not there. Whoever makes a
/// file looks for its name first, so it is not searched for again to make it.
///
/// A name comes into a directory with the next cookie, and no cookie comes twice: as long as the
/// next cookie is the one noted, nothing with that hash has come. It is noted with the directory
/// locked, so all that note anything at the same time note the same cookie.
#[derive(Default)]
pub struct Absent {
    hash: AtomicU64,
    /// The directory's next cookie then; zero, which no cookie is, when nothing is noted.
    cookie: AtomicU64,
}

impl Absent {
    /// Notes that no name with that hash is in the directory, whose fields these are.
    pub fn note(&self, hash: u64, dir: &InodeItem) {
        self.hash.store(hash, Ordering::Relaxed);
        self.cookie.store(dir.next_cookie, Ordering::Relaxed);
    }

    /// Whether it is known that no name with that hash is in the directory. For whoever has it
    /// locked exclusively.
    pub fn is(&self, hash: u64, dir: &InodeItem) -> bool {
        let cookie = self.cookie.load(Ordering::Relaxed);
        cookie != 0 && cookie == dir.next_cookie && self.hash.load(Ordering::Relaxed) == hash
    }
}

/// What an inode that a group changed costs in memory beside its ranges, until the group is
/// published: itself, what is set aside for the writer, the writer's edits, places in lists.
pub const INODE_BYTES: u64 = (core::mem::size_of::<Inode>()
    + core::mem::size_of::<Aside>()
    + 2 * InodeItem::BYTES
    + core::mem::size_of::<(crate::format::key::Key, crate::btree::Edit)>())
    as u64
    + 64;

/// State of an inode that belongs to the group being written.
pub struct Aside {
    /// The group.
    pub txg: Txg,
    /// The fields as that group leaves them.
    pub item: InodeItem,
    /// The ranges it changed.
    pub ranges: RangeMap,
    /// Whether it removed the inode.
    pub gone: bool,
    /// Whether the intent log lacks the fields.
    pub unlogged: bool,
}

impl Aside {
    /// Whether the intent log lacks anything of it.
    pub fn lacks(&self) -> bool {
        self.unlogged || self.ranges.lacks()
    }
}

impl State {
    /// State of an inode that is as the tree has it.
    pub fn clean(item: InodeItem) -> State {
        State {
            item,
            txg: Txg(0),
            ranges: RangeMap::default(),
            aside: None,
            gone: false,
            unlogged: false,
            absent: Absent::default(),
        }
    }

    /// Whether some unpublished group changed the inode.
    pub fn is_dirty(&self) -> bool {
        self.txg.0 != 0 || self.aside.is_some()
    }

    /// Announces a change by group `txg`. Returns whether this is the group's first, so that the
    /// inode must be put on its list.
    #[must_use = "the first change of a group puts the inode on its list"]
    pub fn touch(&mut self, txg: Txg) -> bool {
        self.unlogged = true;
        if self.txg == txg {
            return false;
        }
        assert!(self.txg < txg, "change of group {txg} after one of group {}", self.txg);
        if self.txg.0 != 0 {
            self.set_aside();
            self.unlogged = true;
        }
        self.txg = txg;
        true
    }

    /// Gives the writer of group `txg` what that group made of the inode, if nobody has yet.
    pub fn capture(&mut self, txg: Txg) {
        if self.txg == txg {
            self.set_aside();
        }
    }

    fn set_aside(&mut self) {
        assert!(self.aside.is_none(), "a third unpublished group");
        self.aside = Some(Arc::new(Aside {
            txg: self.txg,
            item: self.item,
            ranges: core::mem::take(&mut self.ranges),
            gone: self.gone,
            unlogged: core::mem::replace(&mut self.unlogged, false),
        }));
        self.txg = Txg(0);
    }

    /// Group `txg` is published: what it made of the inode is in the tree, with these sums.
    pub fn settle(&mut self, txg: Txg, stored_bytes: u64, promised_bytes: u64) {
        if self.aside.take_if(|aside| aside.txg == txg).is_some() {
            self.item.stored_bytes = stored_bytes;
            self.item.promised_bytes = promised_bytes;
        }
    }

    /// The ranges of group `txg`, to replace bytes by where they were written. `None` when the
    /// group's writer has them already, or the group changed nothing.
    pub fn ranges_of(&mut self, txg: Txg) -> Option<&mut RangeMap> {
        if self.txg == txg {
            return Some(&mut self.ranges);
        }
        let aside = self.aside.as_mut().filter(|aside| aside.txg == txg)?;
        Some(&mut Arc::get_mut(aside)?.ranges)
    }

    /// Bytes of the file that are in memory only.
    pub fn dirty_bytes(&self) -> u64 {
        self.ranges.data_bytes() + self.aside.as_ref().map_or(0, |a| a.ranges.data_bytes())
    }
}

impl Inode {
    /// An inode in that state.
    pub fn new(ino: Ino, state: State) -> Inode {
        Inode {
            ino,
            state: RwLock::numbered(Rank::Inode, ino.0, state),
            flushing: Mutex::ranked(Rank::Flushing, ()),
            used: AtomicBool::new(true),
        }
    }
}
