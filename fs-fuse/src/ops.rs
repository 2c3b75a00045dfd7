//! From requests to calls of the core: no device, no buffer management, no threads.
//!
//! [`Server::handle`] takes a typed [`Request`] and gives a typed [`Reply`]. How requests arrive
//! is the transport's business ([`crate::device`], `rings`). Any number of threads may call it.
//!
//! What the kernel does by itself, and what is therefore not here:
//!
//! - Permissions and ACLs: `default_permissions` is always set, and ACCESS never arrives.
//! - Open files. OPEN and OPENDIR answer "not implemented" where the kernel allows it, which it
//!   takes as "always succeeds, keep the cache, don't ask again"; neither they nor RELEASE and
//!   FLUSH cost a round trip any more. An inode lives by its lookup count, not by handles. See
//!   `docs/decisions/0001-fuse-transport.md` for what this does to O_TRUNC.
//! - Locks, both kinds.
//! - Offsets of O_APPEND, and size and times of files with cached writes: with the write-back cache
//!   the kernel's size is the newer one until it is flushed, so a WRITE is always for its offset.
//!
//! Node numbers: the kernel calls the root 1. The core's root may have another number, so the two
//! are exchanged, both ways, by the same function.

use crate::ahead::{Ahead, Part};
use crate::asker::{self, Doing};
use crate::backend::Mounted;
use crate::ioctl;
use crate::notify::Kernel;
use crate::refused::Refused;
use crate::reply::{Listed, Listing, Reply, Trust};
use crate::request::{Layout, Op, Request};
use crate::wire::{self, init};
use fs_core::error::{Errno as CoreErrno, Error};
use fs_core::format::inode::mode;
use fs_core::units::Ino;
use fs_core::vfs::{Attr, SetAttr, WriteFlags, XattrMode};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest WRITE and READ.
pub const TRANSFER_BYTES_MAX: usize = 1 << 20;

/// Read-ahead asked for; the mount helper raises the device's limit to match.
pub const READAHEAD_BYTES: u32 = 2 << 20;

/// Requests the kernel may have under way on its own account (read-ahead, write-back, direct I/O
/// of one process) before it makes processes wait.
const BACKGROUND_MAX: u16 = 64;
const CONGESTION_THRESHOLD: u16 = 48;

/// What is asked of the kernel. Not among them: remote locks (the kernel's own are right for a
/// local filesystem), AUTO_INVAL_DATA (only for pools that change behind the kernel's back), and
/// ATOMIC_O_TRUNC, which with zero-message opens would cut a file in the kernel's cache only.
const WANTED: u64 = init::ASYNC_READ
    | init::EXPORT_SUPPORT
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::HAS_IOCTL_DIR
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::WRITEBACK_CACHE
    | init::NO_OPEN_SUPPORT
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::NO_OPENDIR_SUPPORT
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// Without these a mount would be wrong, not only slow.
const REQUIRED: u64 = init::DONT_MASK | init::POSIX_ACL | init::HANDLE_KILLPRIV_V2;

/// Directories whose names take more, which are some hundred thousand, are not kept by the kernel
/// when they are listed.
const KEPT_NAMES_BYTES_MAX: u64 = 4 << 20;

/// Answers requests for one mounted volume.
pub struct Server {
    volume: Arc<dyn Mounted>,
    kernel: Arc<Kernel>,
    /// Flags agreed on in INIT; zero before.
    agreed: AtomicU64,
    /// Whether the transport can take requests over io_uring.
    has_rings: AtomicBool,
    /// Files of which the kernel had data refused.
    refused: Refused,
    /// Parts of listings that will be asked for.
    ahead: Ahead,
    closed: Mutex<Option<Result<(), Error>>>,
}

/// Work that nobody waits for.
#[derive(Clone, Copy, Debug)]
pub enum Afterwards {
    /// A process has got a part of a listing, and will ask for the next one.
    ListAhead {
        /// The directory.
        node: u64,
        /// It was the first part.
        is_first: bool,
        /// The cookie of the last entry that the process has got.
        cookie: u64,
        /// Bytes it asks for at a time, where the next part can be made.
        room: Option<usize>,
    },
    /// The kernel must not go by attributes that it was told, because data of the file was refused.
    Distrust {
        /// The file.
        node: u64,
    },
}

impl Server {
    /// A server for a volume that has been opened; `kernel` is told what it must not remember.
    pub fn new(volume: Arc<dyn Mounted>, kernel: Arc<Kernel>) -> Server {
        Server {
            volume,
            kernel,
            agreed: AtomicU64::new(0),
            has_rings: AtomicBool::new(false),
            refused: Refused::default(),
            ahead: Ahead::default(),
            closed: Mutex::new(None),
        }
    }

    /// How requests are to be read, given what was agreed on so far.
    pub fn layout(&self) -> Layout {
        Layout { setxattr_ext: self.has(init::SETXATTR_EXT) }
    }

    /// Whether INIT has been answered.
    pub fn is_initialised(&self) -> bool {
        self.agreed.load(Ordering::Acquire) != 0
    }

    /// Lets INIT agree to requests over io_uring, if they are offered.
    pub fn accept_rings(&self) {
        self.has_rings.store(true, Ordering::Relaxed);
    }

    /// Whether INIT has agreed to requests over io_uring.
    pub fn uses_rings(&self) -> bool {
        self.has(init::OVER_IO_URING)
    }

    /// Writes everything and closes the volume; once, however often it is called. The first
    /// result is kept.
    pub fn close(&self) -> Result<(), Error> {
        self.closed.lock().get_or_insert_with(|| self.volume.close()).clone()
    }

    fn has(&self, flag: u64) -> bool {
        self.agreed.load(Ordering::Relaxed) & flag != 0
    }

    /// Carries out a request. The body of the reply, if it has one, is put into `body`.
    ///
    /// # Errors
    /// The errno to answer with.
    pub fn handle(&self, request: &Request<'_>, body: &mut [u8]) -> Result<Reply, Errno> {
        self.dispatch(request, body).map_err(|Failure(errno)| {
            let Op::Write { data, write_back, .. } = &request.op else { return errno };
            self.write_refused(request.node, errno, data.len() as u64);
            // For fsync(2) and close(2) the kernel remembers ENOSPC as it is and else EIO, which
            // would have people look for a broken device.
            match errno {
                Errno::DQUOT if *write_back => Errno::NOSPC,
                _ => errno,
            }
        })
    }

    /// Sees to it that who goes on writing to the file learns of it.
    fn write_refused(&self, node: u64, errno: Errno, bytes: u64) {
        // The rest is about the request or the file, and not about its data.
        if !matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::ROFS) {
            return;
        }
        if self.refused.note(node, errno, bytes) {
            self.kernel.distrust(node);
        }
        // The kernel takes what is written to a snapshot, finds out when it writes back, and would
        // go on showing it.
        if errno == Errno::ROFS {
            self.kernel.drop_pages(node);
        }
    }

    /// What there is to do once the reply is on its way.
    pub fn afterwards(&self, request: &Request<'_>, reply: &Reply) -> Option<Afterwards> {
        match (&request.op, reply) {
            // With attributes the next part would be granted lookups that nobody may ask for.
            (
                Op::ReadDir { cookie, size } | Op::ReadDirPlus { cookie, size },
                Reply::Listing(Listed { last, is_full: true, .. }),
            ) => {
                let room = matches!(request.op, Op::ReadDir { .. }).then_some(*size as usize);
                let (node, is_first) = (request.node, *cookie == 0);
                Some(Afterwards::ListAhead { node, is_first, cookie: *last, room })
            }
            // When they have arrived, and not before: an invalidation that overtakes them has the
            // kernel ignore for how long they are valid.
            (_, Reply::Attr(_, Trust::Lasting)) => {
                Some(Afterwards::Distrust { node: request.node })
            }
            _ => None,
        }
    }

    /// Does it.
    pub fn carry_out(&self, afterwards: &Afterwards) {
        match *afterwards {
            Afterwards::ListAhead { node, is_first, cookie, room } => {
                let dir = self.ino(node);
                if is_first {
                    self.keep_small(node);
                }
                if let Some(room) = room {
                    self.list_ahead(Part { dir, cookie, room });
                }
                self.volume.readdir_ahead(dir, cookie);
            }
            Afterwards::Distrust { node } => self.kernel.distrust(node),
        }
    }

    /// Lets the kernel not keep what it has got of the listing of a very large directory, after
    /// which it keeps nothing of the rest: to store each entry in its page cache takes it half the
    /// time of a listing, and tens of megabytes.
    fn keep_small(&self, dir: u64) {
        if self.volume.getattr(self.ino(dir)).is_ok_and(|a| a.size > KEPT_NAMES_BYTES_MAX) {
            self.kernel.drop_pages(dir);
        }
    }

    /// Takes back what a reply granted, when the reply could not be delivered.
    pub fn undo(&self, reply: &Reply) {
        if let Reply::Entry(_, attr, _) | Reply::Created(_, attr, _) = reply {
            self.volume.forget(attr.ino, 1);
        }
    }

    fn dispatch(&self, request: &Request<'_>, body: &mut [u8]) -> Result<Reply, Failure> {
        let fs = &self.volume;
        let ino = self.ino(request.node);
        match request.op {
            Op::Init { major, minor, max_readahead, flags } => {
                self.init(major, minor, max_readahead, flags)
            }
            Op::Destroy => {
                self.close()?;
                Ok(Reply::Done)
            }
            Op::Lookup { name } => self.lookup(ino, name),
            Op::Forget { count } => {
                self.forget(request.node, count);
                Ok(Reply::Silent)
            }
            Op::BatchForget(forgets) => {
                forgets.iter().for_each(|(node, count)| self.forget(node, count));
                Ok(Reply::Silent)
            }
            Op::GetAttr { by_handle } => self.getattr(request, by_handle),
            Op::Statx => {
                let attr = fs.getattr(ino)?;
                Ok(Reply::Statx(attr, self.trust(request.node, &attr)))
            }
            Op::SetAttr(ref set) => self.setattr(request, set),
            Op::ReadLink => copy_out(&fs.readlink(ino)?, body),
            Op::MkNod { name, mode, rdev, umask } => {
                self.entry(fs.mknod(ino, name, mode, rdev, &request.caller_with_umask(umask))?)
            }
            Op::MkDir { name, mode, umask } => {
                self.entry(fs.mkdir(ino, name, mode, &request.caller_with_umask(umask))?)
            }
            Op::Symlink { name, target } => {
                self.entry(fs.symlink(ino, name, target, &request.caller())?)
            }
            Op::Create { .. } => self.create(request),
            Op::TmpFile { mode, umask } => {
                self.created(fs.tmpfile(ino, mode, &request.caller_with_umask(umask))?)
            }
            Op::Link { source, name } => self.entry(fs.link(self.ino(source), ino, name)?),
            Op::Unlink { name } => done(fs.unlink(ino, name)),
            Op::RmDir { name } => done(fs.rmdir(ino, name)),
            Op::Rename { name, new_dir, new_name, flags } => {
                done(fs.rename(ino, name, self.ino(new_dir), new_name, flags, &request.caller()))
            }
            Op::Open => self.open(init::NO_OPEN_SUPPORT, wire::fopen::KEEP_CACHE),
            Op::OpenDir => self
                .open(init::NO_OPENDIR_SUPPORT, wire::fopen::KEEP_CACHE | wire::fopen::CACHE_DIR),
            Op::Release | Op::ReleaseDir => Ok(Reply::Done),
            // The kernel has written its cache back before it asks; nothing is left to do.
            Op::Flush => Err(Errno::NOSYS.into()),
            Op::Read { offset, size } => {
                let len = body.len().min(size as usize);
                Ok(Reply::Body(fs.read(ino, offset, &mut body[..len])?))
            }
            Op::Write { offset, data, kill_priv, write_back } => {
                // What is written back comes after the times of it, or before: both are sent at
                // once. The kernel has the right ones.
                let flags = WriteFlags { append: false, kill_priv, has_times: write_back };
                fs.write(ino, offset, data, flags)?;
                Ok(Reply::Size(data.len() as u32))
            }
            Op::Fallocate { mode, offset, len } => done(fs.fallocate(ino, mode, offset, len)),
            Op::Seek { offset, what } => Ok(Reply::Wide(fs.seek(ino, offset, what)?)),
            Op::CopyRange { offset, target, target_offset, len, wide_reply } => {
                let copied = fs.copy_range(ino, offset, self.ino(target), target_offset, len)?;
                Ok(if wide_reply { Reply::Wide(copied) } else { Reply::Size(copied as u32) })
            }
            Op::Fsync { data_only } => done(fs.fsync(ino, data_only)),
            Op::FsyncDir => done(fs.fsync(ino, false)),
            Op::SyncFs => match self.kernel.syncs.take(request.pid).is_some_and(|work| work()) {
                true => Ok(Reply::Done),
                false => done(fs.sync()),
            },
            Op::StatFs => Ok(Reply::StatFs(fs.statfs_at(ino)?)),
            Op::ReadDir { cookie, size } => self.readdir(ino, cookie, limit(body, size)),
            Op::ReadDirPlus { cookie, size } => self.readdir_plus(ino, cookie, limit(body, size)),
            Op::GetXattr { name, size } => sized(&fs.getxattr(ino, name)?, size, body),
            Op::ListXattr { size } => sized(&fs.listxattr(ino)?, size, body),
            Op::SetXattr { name, value, mode, kill_sgid } => {
                self.setxattr(request, name, value, mode, kill_sgid)
            }
            Op::RemoveXattr { name } => done(fs.removexattr(ino, name)),
            Op::Ioctl { command, input, out_size } => {
                let out = limit(body, out_size);
                let call = ioctl::Call { request, ino, command, input };
                if ioctl::changes(command) && self.kernel.is_read_only() {
                    return Err(Errno::ROFS.into());
                }
                Ok(Reply::Ioctl(ioctl::handle(self.volume.as_ref(), &call, out)?))
            }
            Op::Interrupt => Ok(Reply::Silent),
            Op::Unknown => Err(Errno::NOSYS.into()),
        }
    }

    fn init(
        &self,
        major: u32,
        minor: u32,
        max_readahead: u32,
        offered: u64,
    ) -> Result<Reply, Failure> {
        if major < wire::MAJOR || (major == wire::MAJOR && minor < wire::MINOR_MIN) {
            return Err(Errno::PROTO.into());
        }
        let rings = self.has_rings.load(Ordering::Relaxed);
        let agreed = offered & (WANTED | if rings { init::OVER_IO_URING } else { 0 });
        if major == wire::MAJOR && agreed & REQUIRED != REQUIRED {
            return Err(Errno::PROTO.into());
        }
        let out = wire::InitOut {
            major: wire::MAJOR,
            minor: wire::MINOR,
            max_readahead: max_readahead.max(READAHEAD_BYTES),
            flags: agreed as u32,
            max_background: BACKGROUND_MAX,
            congestion_threshold: CONGESTION_THRESHOLD,
            max_write: TRANSFER_BYTES_MAX as u32,
            time_gran: 1,
            max_pages: (TRANSFER_BYTES_MAX / 4096) as u16,
            map_alignment: 0,
            flags2: (agreed >> 32) as u32,
            max_stack_depth: 0,
            request_timeout: 0,
            unused: [0; 11],
        };
        // A newer major version answers this one by asking again with ours.
        if major == wire::MAJOR {
            self.agreed.store(agreed, Ordering::Release);
        }
        Ok(Reply::Init(out))
    }

    /// The core's number of a node.
    fn ino(&self, node: u64) -> Ino {
        exchange_root(node, self.volume.root())
    }

    /// The kernel's number of an inode. Zero would mean "no such name".
    fn node(&self, ino: Ino) -> Result<u64, Failure> {
        match exchange_root(ino.0, self.volume.root()).0 {
            0 => Err(Errno::IO.into()),
            node => Ok(node),
        }
    }

    fn entry(&self, attr: Attr) -> Result<Reply, Failure> {
        let node = self.node(attr.ino)?;
        Ok(Reply::Entry(node, attr, self.trust(node, &attr)))
    }

    fn created(&self, attr: Attr) -> Result<Reply, Failure> {
        let node = self.node(attr.ino)?;
        Ok(Reply::Created(node, attr, self.trust(node, &attr)))
    }

    /// For how long the kernel may go by attributes that it is about to be told.
    fn trust(&self, node: u64, attr: &Attr) -> Trust {
        match self.refused.show(node, false) || self.is_unchanging_file(attr) {
            true => Trust::Never,
            false => Trust::Usual,
        }
    }

    /// Whether it is a file that must not be opened for writing, whatever its mode.
    fn is_unchanging_file(&self, attr: &Attr) -> bool {
        attr.mode & mode::TYPE == mode::REGULAR && self.volume.never_changes(attr.ino)
    }

    fn getattr(&self, request: &Request<'_>, by_handle: bool) -> Result<Reply, Failure> {
        let (node, ino) = (request.node, self.ino(request.node));
        let is_refused = by_handle && self.refused.has(node);
        let mut doing = None;
        let mut doing = || *doing.get_or_insert_with(|| asker::doing(request.pid));
        if is_refused && doing() != Doing::Reads {
            let check = |bytes| self.volume.check_write(ino, bytes).map_err(|e| errno(&e));
            self.refused.tell(node, doing() == Doing::Writes, check)?;
        }
        let attr = self.volume.getattr(ino)?;
        if self.is_unchanging_file(&attr) {
            let writes = match by_handle {
                true => doing() == Doing::Writes,
                false => asker::is_to_open_for_writing(request.pid),
            };
            if writes {
                return Err(Errno::ROFS.into());
            }
        }
        let for_good = is_refused && doing() == Doing::Unknown && self.refused.show(node, true);
        let trust = if for_good { Trust::Lasting } else { self.trust(node, &attr) };
        Ok(Reply::Attr(attr, trust))
    }

    fn setattr(&self, request: &Request<'_>, set: &SetAttr) -> Result<Reply, Failure> {
        let attr = self.volume.setattr(self.ino(request.node), set, &request.caller())?;
        if set.size == Some(0) {
            // Nothing is left of what was refused.
            self.refused.forget(request.node);
        }
        Ok(Reply::Attr(attr, self.trust(request.node, &attr)))
    }

    fn forget(&self, node: u64, count: u64) {
        self.refused.forget(node);
        self.volume.forget(self.ino(node), count);
    }

    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Reply, Failure> {
        match self.volume.lookup(dir, name) {
            // By its number the kernel asks only for what it does not know. So nobody has this one
            // open any more, and the FORGET that will end it is on its way.
            Ok(attr) if name == b"." && attr.nlink == 0 => {
                self.volume.forget(attr.ino, 1);
                Err(Errno::STALE.into())
            }
            Ok(attr) => self.entry(attr),
            // `.` is how the kernel finds an inode of a file handle again; it must not remember
            // that as a name.
            Err(Error::Posix(CoreErrno::NoEnt)) if name != b"." && name != b".." => {
                Ok(Reply::NoEntry)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn create(&self, request: &Request<'_>) -> Result<Reply, Failure> {
        let Op::Create { name, mode, umask, exclusive, truncate } = request.op else {
            return Err(Errno::INVAL.into());
        };
        let dir = self.ino(request.node);
        let caller = request.caller_with_umask(umask);
        let file_mode = (mode & mode::PERMISSIONS) | mode::REGULAR;
        let attr = match self.volume.mknod(dir, name, file_mode, 0, &caller) {
            // The name came into being although the kernel believed it absent. Without O_EXCL
            // that is an open of what is there.
            Err(Error::Posix(CoreErrno::Exist)) if !exclusive => {
                let found = self.volume.lookup(dir, name)?;
                self.open_found(found, truncate, request)?
            }
            made => made?,
        };
        self.created(attr)
    }

    /// Opens, for CREATE, a file that has just been looked up; gives the lookup back on failure.
    fn open_found(
        &self,
        found: Attr,
        truncate: bool,
        request: &Request<'_>,
    ) -> Result<Attr, Failure> {
        let result = if found.mode & mode::TYPE != mode::REGULAR {
            Err(Error::Posix(CoreErrno::Exist))
        } else if truncate {
            let set = SetAttr { size: Some(0), kill_priv: true, ..SetAttr::default() };
            self.volume.setattr(found.ino, &set, &request.caller())
        } else {
            Ok(found)
        };
        result.map_err(|error| {
            self.volume.forget(found.ino, 1);
            error.into()
        })
    }

    fn open(&self, zero_message: u64, open_flags: u32) -> Result<Reply, Failure> {
        if self.has(zero_message) {
            return Err(Errno::NOSYS.into());
        }
        Ok(Reply::Opened(wire::OpenOut { open_flags, ..Default::default() }))
    }

    fn readdir(&self, dir: Ino, cookie: u64, body: &mut [u8]) -> Result<Reply, Failure> {
        let part = Part { dir, cookie, room: body.len() };
        let attr = || self.volume.getattr(dir).ok();
        let listed = match self.ahead.take(part, body, attr) {
            Some(listed) => listed,
            None => self.list(part, body)?,
        };
        Ok(Reply::Listing(listed))
    }

    fn list(&self, part: Part, body: &mut [u8]) -> Result<Listed, Failure> {
        let mut listing = Listing::new(body, now());
        self.volume.readdir(part.dir, part.cookie, &mut |entry| listing.push(entry))?;
        Ok(listing.listed())
    }

    fn list_ahead(&self, part: Part) {
        let attr = || self.volume.getattr(part.dir).ok();
        self.ahead.make(part, attr, |body| {
            let listed = self.list(part, body).ok()?;
            // Whoever asks meets an error, and finds the end himself.
            let is_counted = self.volume.counts_changes_to(part.dir, listed.last);
            (listed.is_full && is_counted).then_some(listed)
        });
    }

    fn readdir_plus(&self, dir: Ino, cookie: u64, body: &mut [u8]) -> Result<Reply, Failure> {
        let mut listing = Listing::new(body, now());
        self.volume.readdir_plus(dir, cookie, &mut |entry, attr| {
            // The kernel takes no lookup for the dots, so they go without a node.
            let dots = entry.name == b"." || entry.name == b"..";
            let known = attr.filter(|_| !dots).map(|attr| {
                let node = self.node(attr.ino).unwrap_or(0);
                (node, attr, self.trust(node, attr))
            });
            listing.push_plus(entry, known)
        })?;
        Ok(Reply::Listing(listing.listed()))
    }

    fn setxattr(
        &self,
        request: &Request<'_>,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        kill_sgid: bool,
    ) -> Result<Reply, Failure> {
        let ino = self.ino(request.node);
        if !is_attribute(name) {
            return Err(Errno::OPNOTSUPP.into());
        }
        if kill_sgid {
            // First, so that a crash between the two leaves too little and not too much.
            let attr = self.volume.getattr(ino)?;
            if attr.mode & mode::SET_GID != 0 {
                let permissions = attr.mode & mode::PERMISSIONS & !mode::SET_GID;
                let set = SetAttr { mode: Some(permissions), ..SetAttr::default() };
                self.volume.setattr(ino, &set, &request.caller())?;
            }
        }
        done(self.volume.setxattr(ino, name, value, mode))
    }
}

/// Whether attributes of that name can be set: those of the kinds that Linux has, so that a copy to
/// another filesystem does not fail for them, and cairn's own.
fn is_attribute(name: &[u8]) -> bool {
    const KINDS: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    const NAMES: [&[u8]; 5] = [
        b"system.posix_acl_access",
        b"system.posix_acl_default",
        b"cairn.compression",
        b"cairn.checksum",
        b"btrfs.compression",
    ];
    KINDS.iter().any(|kind| name.starts_with(kind)) || NAMES.contains(&name)
}

/// An errno on its way to the kernel.
pub(crate) struct Failure(pub Errno);

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure(errno)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure(errno(&error))
    }
}

/// Linux's number for an error of the core.
pub fn errno(error: &Error) -> Errno {
    match error.errno() {
        CoreErrno::Perm => Errno::PERM,
        CoreErrno::NoEnt => Errno::NOENT,
        CoreErrno::Io => Errno::IO,
        CoreErrno::BadF => Errno::BADF,
        CoreErrno::Access => Errno::ACCESS,
        CoreErrno::Busy => Errno::BUSY,
        CoreErrno::Exist => Errno::EXIST,
        CoreErrno::XDev => Errno::XDEV,
        CoreErrno::NotDir => Errno::NOTDIR,
        CoreErrno::IsDir => Errno::ISDIR,
        CoreErrno::Inval => Errno::INVAL,
        CoreErrno::FBig => Errno::FBIG,
        CoreErrno::NoSpc => Errno::NOSPC,
        CoreErrno::RoFs => Errno::ROFS,
        CoreErrno::MLink => Errno::MLINK,
        CoreErrno::NameTooLong => Errno::NAMETOOLONG,
        CoreErrno::NotEmpty => Errno::NOTEMPTY,
        CoreErrno::NoData => Errno::NODATA,
        CoreErrno::Overflow => Errno::OVERFLOW,
        CoreErrno::OpNotSupp => Errno::OPNOTSUPP,
        CoreErrno::Stale => Errno::STALE,
        CoreErrno::DQuot => Errno::DQUOT,
        CoreErrno::NxIo => Errno::NXIO,
        CoreErrno::NoMem => Errno::NOMEM,
        CoreErrno::TooBig => Errno::TOOBIG,
        CoreErrno::Range => Errno::RANGE,
        CoreErrno::Uclean => Errno::UCLEAN,
        CoreErrno::TxtBsy => Errno::TXTBSY,
        CoreErrno::Intr => Errno::INTR,
    }
}

/// Wall time in seconds.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// Exchanges the core's root with the kernel's, which makes it its own inverse.
fn exchange_root(number: u64, root: Ino) -> Ino {
    if number == wire::ROOT_NODE {
        root
    } else if number == root.0 {
        Ino(wire::ROOT_NODE)
    } else {
        Ino(number)
    }
}

fn done(result: Result<(), Error>) -> Result<Reply, Failure> {
    result?;
    Ok(Reply::Done)
}

fn limit(body: &mut [u8], size: u32) -> &mut [u8] {
    let len = body.len().min(size as usize);
    &mut body[..len]
}

fn copy_out(value: &[u8], body: &mut [u8]) -> Result<Reply, Failure> {
    body.get_mut(..value.len()).ok_or(Errno::IO)?.copy_from_slice(value);
    Ok(Reply::Body(value.len()))
}

/// An attribute value or list: its length when `size` is zero, else the bytes if they fit.
fn sized(value: &[u8], size: u32, body: &mut [u8]) -> Result<Reply, Failure> {
    let len = u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?;
    match size {
        0 => Ok(Reply::Size(len)),
        size if len > size => Err(Errno::RANGE.into()),
        _ => copy_out(value, body),
    }
}
