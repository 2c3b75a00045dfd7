//! The operations a driver calls: one method per operation, no kernel or FUSE type.
//!
//! [`Filesystem`] is what a driver needs of a mounted subvolume; [`Volume`] implements it over the
//! engine, and [`Forest`] over all volumes that one mount shows. A second implementation without
//! storage measures what a driver costs by itself, and a model in the tests is compared with the
//! real one call by call.
//!
//! Contract common to all operations:
//!
//! - Inodes are named by number. A driver tells how long it holds on to one: every successful call
//!   that returns [`Attr`] for a *name* (`lookup`, `create`, `mkdir`, ..., and each entry of
//!   `readdir_plus` it accepted) adds one to the inode's lookup count, `forget` takes away. An
//!   inode without names lives until its count is zero.
//! - Permissions are checked by the caller (the kernel's `default_permissions`, or its VFS): the
//!   operations check what only they can know, such as immutable flags, and what they must do on
//!   their own: set-id clearing, set-gid and ACL inheritance, from [`Caller`].
//! - Each operation is atomic in a crash: seen whole or not at all, except that a write longer than
//!   one request may be cut at a sector.
//! - Errors are [`crate::error::Error`]; ordinary outcomes are `Error::Posix`.

mod acl;
mod attrs;
mod dedupe;
mod files;
mod forest;
mod names;
pub mod property;
mod rename;
mod volume;

pub(crate) use attrs::check_attribute;
pub use dedupe::{BlockPlace, BlockPlaces, BLOCK_BYTES_MAX, DEDUPE_BYTES, HASHED_BYTES_MAX};
pub use forest::Forest;
pub use volume::{AccessTime, Volume};

use crate::error::Error;
use crate::platform::Timestamp;
use crate::units::Ino;
use alloc::vec::Vec;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Bits to clear in the mode of what is created; zero where the kernel has done so.
    pub umask: u32,
}

/// What stat(2) shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// With the number, names the file for good.
    pub generation: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number: major << 32 | minor.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space taken, in units of 512 bytes.
    pub blocks: u64,
    /// Access time.
    pub atime: Timestamp,
    /// Modification time.
    pub mtime: Timestamp,
    /// Change time.
    pub ctime: Timestamp,
    /// Birth time.
    pub btime: Timestamp,
    /// Attribute flags (`format::inode::flag`).
    pub flags: u32,
    /// Project id.
    pub project: u32,
    /// Counts changes.
    pub version: u64,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The time of the operation.
    Now,
    /// This time.
    At(Timestamp),
}

/// What `setattr` changes; `None` leaves a field as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size: truncates or extends with a hole.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time; only drivers whose kernel keeps times set it.
    pub ctime: Option<Timestamp>,
    /// Attribute flags.
    pub flags: Option<u32>,
    /// Project id.
    pub project: Option<u32>,
    /// The caller wants set-user-id, set-group-id and capabilities cleared as write(2) and
    /// chown(2) by an unprivileged process do.
    pub kill_priv: bool,
}

/// A directory entry as readdir(3) shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Inode.
    pub ino: Ino,
    /// Pass this to go on after the entry.
    pub cookie: u64,
    /// Type bits of the mode.
    pub file_type: u32,
    /// Name; `.` and `..` included.
    pub name: &'a [u8],
}

/// How `rename` treats the target name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameFlags {
    /// Fail with EEXIST when the target exists.
    pub no_replace: bool,
    /// Exchange the two names.
    pub exchange: bool,
    /// Leave a whiteout (character device 0:0) at the source.
    pub whiteout: bool,
}

/// What fallocate(2) is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Promise room; grow the file unless `keep_size`.
    Allocate {
        /// Leave the size alone.
        keep_size: bool,
    },
    /// Make a hole; the size stays.
    PunchHole,
    /// Make the range read as zeros, with room promised.
    ZeroRange {
        /// Leave the size alone.
        keep_size: bool,
    },
    /// Remove the range, moving what follows down.
    CollapseRange,
    /// Insert a hole, moving what follows up.
    InsertRange,
}

/// How setxattr(2) treats an attribute that exists or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Set either way.
    Either,
    /// Fail with EEXIST when it exists.
    Create,
    /// Fail with ENODATA when it does not.
    Replace,
}

/// What came of comparing two ranges to share what is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dedupe {
    /// They are equal, and the target has the extents of the source as far as these can be shared.
    Same {
        /// So many bytes were compared: fewer than were asked for where more would have to be
        /// compared at once, or where what is left is no whole sector.
        bytes: u64,
        /// So many of them had another place before.
        shared: u64,
    },
    /// They differ, and nothing was done.
    Differs,
}

/// What lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte of data.
    Data,
    /// The next hole; the end of the file is one.
    Hole,
}

/// What statfs(2) shows, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Room for data if everything were data.
    pub total_bytes: u64,
    /// Free, including what only deletes may use.
    pub free_bytes: u64,
    /// What a writer can still store, before compression.
    pub available_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
    /// Inodes that could still be made.
    pub free_inodes: u64,
    /// Id for f_fsid.
    pub id: [u8; 16],
}

/// How write data is to be treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Write at the end of the file, whatever the offset (O_APPEND).
    pub append: bool,
    /// Clear set-user-id, set-group-id and capabilities first.
    pub kill_priv: bool,
    /// The driver wrote this to its own cache before, has the times of that, and sets them itself,
    /// maybe before this comes: times of a moment ago stay. Older ones do not, so that no new data
    /// has old times after a crash.
    pub has_times: bool,
}

/// Shorthand.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// A mounted subvolume, as a driver sees it. All methods may be called from any thread.
#[expect(missing_docs, reason = "methods not documented here are named and documented by POSIX")]
pub trait Filesystem: Send + Sync {
    /// Inode number of the root directory.
    fn root(&self) -> Ino;

    fn statfs(&self) -> Result<StatFs>;
    /// The same, with the inodes of the subvolume that an inode is in.
    fn statfs_at(&self, ino: Ino) -> Result<StatFs> {
        let _ = ino;
        self.statfs()
    }

    /// Finds a name; `..` works too. `.` finds the inode itself, which may be of any type: so file
    /// handles are opened. ESTALE when there is no such inode any more.
    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr>;

    /// Gives back `count` lookups of an inode.
    fn forget(&self, ino: Ino, count: u64);

    fn getattr(&self, ino: Ino) -> Result<Attr>;
    fn setattr(&self, ino: Ino, set: &SetAttr, caller: &Caller) -> Result<Attr>;
    fn readlink(&self, ino: Ino) -> Result<Vec<u8>>;

    /// Makes a file of any type but directory and symlink: `mode` carries the type.
    fn mknod(&self, dir: Ino, name: &[u8], mode: u32, rdev: u64, caller: &Caller) -> Result<Attr>;
    fn mkdir(&self, dir: Ino, name: &[u8], mode: u32, caller: &Caller) -> Result<Attr>;
    fn symlink(&self, dir: Ino, name: &[u8], target: &[u8], caller: &Caller) -> Result<Attr>;
    /// Makes a regular file without a name (O_TMPFILE); `link` may give it one.
    fn tmpfile(&self, dir: Ino, mode: u32, caller: &Caller) -> Result<Attr>;
    fn link(&self, ino: Ino, dir: Ino, name: &[u8]) -> Result<Attr>;
    fn unlink(&self, dir: Ino, name: &[u8]) -> Result<()>;
    fn rmdir(&self, dir: Ino, name: &[u8]) -> Result<()>;
    fn rename(
        &self,
        dir: Ino,
        name: &[u8],
        new_dir: Ino,
        new_name: &[u8],
        flags: RenameFlags,
        caller: &Caller,
    ) -> Result<()>;

    /// Reads up to `out.len()` bytes; fewer only at the end of the file.
    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize>;
    /// Writes all of `data`; returns the offset it was written at.
    fn write(&self, ino: Ino, offset: u64, data: &[u8], flags: WriteFlags) -> Result<u64>;
    /// Whether a write of so many bytes somewhere in a file would be refused now, as far as the
    /// state of the pool and its room decide that. May wait for a commit, as the write would.
    fn check_write(&self, ino: Ino, bytes: u64) -> Result<()> {
        let _ = (ino, bytes);
        Ok(())
    }
    /// Whether an inode is one of a snapshot, or of a subvolume that was set read-only, in a mount
    /// that otherwise takes changes: a driver must not let it be opened for writing, nor written to
    /// where it is open. May be called by `each` of a listing.
    fn never_changes(&self, ino: Ino) -> bool {
        let _ = ino;
        false
    }
    fn fallocate(&self, ino: Ino, op: Fallocate, offset: u64, len: u64) -> Result<()>;
    /// Position of the next data or hole at or after `offset`; ENXIO beyond the end.
    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64>;
    /// Copies a range by sharing extents where the offsets allow, by copying elsewhere. Returns
    /// how many bytes were copied; fewer than `len` at the end of the source.
    fn copy_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<u64>;

    /// Compares a range of one file with one of another, or of the same, and where they hold the
    /// same bytes makes the target share the extents of the source, as FIDEDUPERANGE does: what a
    /// reader sees stays as it is, and so do all times. At most [`DEDUPE_BYTES`] are done at once.
    /// Like Linux it wants both offsets on sectors, both ranges within their files and apart from
    /// each other (EINVAL), and leaves out a part of a sector unless it ends both files. Whether
    /// the caller may write to the target is checked by the caller, as for `write`.
    fn dedupe_range(
        &self,
        source: Ino,
        source_offset: u64,
        target: Ino,
        target_offset: u64,
        len: u64,
    ) -> Result<Dedupe> {
        let _ = (source, source_offset, target, target_offset, len);
        Err(crate::error::Errno::OpNotSupp.into())
    }

    /// Makes data, size, attributes and all namespace changes so far durable; with `data_only` at
    /// least data and size.
    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()>;
    /// Makes everything so far durable.
    fn sync(&self) -> Result<()>;

    /// Calls `each` for the entries after `cookie` (0 to begin) until it returns false or there are
    /// no more.
    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()>;
    /// Somebody has just got the entries after `cookie`, and will probably ask for more: reads from
    /// the devices what that will need. A hint, given when the answer is on its way; errors are
    /// left to the reader.
    fn readdir_ahead(&self, dir: Ino, cookie: u64) {
        let _ = (dir, cookie);
    }
    /// Whether `version` of the directory's attributes counts each change to its entries up to
    /// `cookie`.
    fn counts_changes_to(&self, dir: Ino, cookie: u64) -> bool {
        let _ = (dir, cookie);
        true
    }
    /// As `readdir`, with attributes. Each entry for which `each` returns true, except `.` and
    /// `..`, adds one to its inode's lookup count. An entry whose inode is damaged comes without
    /// attributes.
    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()>;

    /// The value of an attribute; ENODATA when there is none.
    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>>;
    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], mode: XattrMode) -> Result<()>;
    /// The names, each followed by NUL.
    fn listxattr(&self, ino: Ino) -> Result<Vec<u8>>;
    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()>;

    /// Name of the pool (`FS_IOC_GETFSLABEL`).
    fn label(&self) -> Vec<u8>;
    /// Changes the name of the pool; at most 63 bytes.
    fn set_label(&self, name: &[u8]) -> Result<()>;
    /// Discards free space; returns how many bytes were offered to the device.
    fn trim(&self, offset: u64, len: u64, min_len: u64) -> Result<u64>;
    /// Stops at once as if power had failed: nothing more is written, every later call fails.
    fn shutdown(&self);
}
