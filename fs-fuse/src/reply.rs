//! Replies: typed values to bytes for the kernel.
//!
//! A reply is a header, a fixed part and, for reads, listings, links, attribute values and ioctls,
//! a body that the operation has put into a buffer of the transport. The parts stay apart until the
//! kernel gathers them, so that file data is copied once on its way out of the core.

use crate::request::encode_rdev;
use crate::wire;
use fs_core::format::inode::{flag, mode};
use fs_core::platform::Timestamp;
use fs_core::vfs::{Attr, DirEntry, StatFs};
use rustix::io::Errno;
use zerocopy::IntoBytes;

/// Unit of the block counts in statfs(2) and of `st_blksize`.
const BLOCK_BYTES: u32 = 4096;

/// How long names, and the absence of names, are valid in the kernel: for good, because nobody but
/// this kernel changes the pool while it is mounted.
const ENTRY_VALID_SECS: u64 = 365 * 86_400;

/// How long attributes are valid once a file has been left alone.
const ATTR_VALID_SECS: u64 = 365 * 86_400;

/// How long they are valid while the file was changed lately. The space a file takes is known only
/// when its data has been compressed and written, which the kernel does not see.
const ATTR_VALID_SECS_CHANGED: u64 = 1;

/// "Lately": longer than data stays unwritten.
const CHANGED_LATELY_SECS: i64 = 60;

/// How long the kernel may go by attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// For good, but not for long when the file was changed lately.
    #[default]
    Usual,
    /// For good, whatever the file; they are invalidated otherwise.
    Lasting,
    /// Not at all: it asks before each use.
    Never,
}

/// What an operation answers. Numbers of inodes are already the kernel's.
#[derive(Debug)]
pub enum Reply {
    /// Nothing is sent.
    Silent,
    /// Success, and nothing more to say.
    Done,
    /// What was agreed on.
    Init(wire::InitOut),
    /// An inode found or made under a name: node number and attributes.
    Entry(u64, Attr, Trust),
    /// The name does not exist, and the kernel may remember that.
    NoEntry,
    /// An inode made and opened.
    Created(u64, Attr, Trust),
    /// Attributes.
    Attr(Attr, Trust),
    /// Attributes for statx(2).
    Statx(Attr, Trust),
    /// The first bytes of the body.
    Body(usize),
    /// Entries of a directory, in the first bytes of the body.
    Listing(Listed),
    /// Bytes written or copied, or the length of an attribute value.
    Size(u32),
    /// Bytes copied, or a position.
    Wide(u64),
    /// Figures of the filesystem.
    StatFs(StatFs),
    /// An ioctl succeeded; the first bytes of the body are its output.
    Ioctl(usize),
    /// Opened; handles are not used.
    Opened(wire::OpenOut),
}

/// The header and fixed part of a reply.
pub struct Head {
    bytes: [u8; Head::BYTES_MAX],
    len: usize,
}

impl Head {
    const BYTES_MAX: usize = 16 + 288;

    /// The bytes to send.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The header alone, and the fixed part alone.
    pub fn split(&self) -> (&[u8], &[u8]) {
        self.bytes().split_at(core::mem::size_of::<wire::OutHeader>())
    }

    fn new(unique: u64, error: i32, fixed: &[u8], body: usize) -> Head {
        let header_bytes = core::mem::size_of::<wire::OutHeader>();
        let len = header_bytes + fixed.len();
        let total = u32::try_from(len + body).expect("bodies are bounded by the buffer, 2 MiB");
        let header = wire::OutHeader { len: total, error, unique };
        let mut bytes = [0; Head::BYTES_MAX];
        bytes[..header_bytes].copy_from_slice(header.as_bytes());
        bytes[header_bytes..len].copy_from_slice(fixed);
        Head { bytes, len }
    }

    /// The notice that an inode's pages from `offset` on are no longer valid.
    pub fn notify_inval_inode(node: u64, offset: i64) -> Head {
        // A length of zero means up to the end.
        let notice = wire::NotifyInvalInodeOut { node, offset, len: 0 };
        // Notices carry their code in place of an error and answer no request.
        Head::new(0, wire::NOTIFY_INVAL_INODE, notice.as_bytes(), 0)
    }

    /// The notice that a name of so many bytes in a directory is no longer valid. The name follows,
    /// ended by NUL.
    pub fn notify_inval_entry(dir: u64, name_bytes: usize) -> Head {
        let name_bytes_wire = u32::try_from(name_bytes).expect("names have 255 bytes at most");
        let notice = wire::NotifyInvalEntryOut { dir, name_bytes: name_bytes_wire, flags: 0 };
        Head::new(0, wire::NOTIFY_INVAL_ENTRY, notice.as_bytes(), name_bytes + 1)
    }

    /// The reply that says a request failed.
    pub fn error(unique: u64, errno: Errno) -> Head {
        Head::new(unique, -errno.raw_os_error(), &[], 0)
    }
}

impl Reply {
    /// The head of the reply and how many bytes of the body follow it; `None` when nothing is to be
    /// sent. `now` is the wall time in seconds.
    pub fn head(&self, unique: u64, now: i64) -> Option<(Head, usize)> {
        let fixed = |bytes: &[u8]| Some((Head::new(unique, 0, bytes, 0), 0));
        match self {
            Reply::Silent => None,
            Reply::Done => fixed(&[]),
            Reply::Init(out) => fixed(out.as_bytes()),
            Reply::Entry(node, attr, trust) => {
                fixed(entry_out(*node, attr, *trust, now).as_bytes())
            }
            Reply::NoEntry => {
                let none = wire::EntryOut { entry_valid: ENTRY_VALID_SECS, ..Default::default() };
                fixed(none.as_bytes())
            }
            Reply::Created(node, attr, trust) => {
                let entry = entry_out(*node, attr, *trust, now);
                let open =
                    wire::OpenOut { open_flags: wire::fopen::KEEP_CACHE, ..Default::default() };
                fixed(wire::CreateOut { entry, open }.as_bytes())
            }
            Reply::Attr(attr, trust) => fixed(
                wire::AttrOut {
                    attr_valid: attr_valid(attr, *trust, now),
                    attr_valid_nanos: 0,
                    dummy: 0,
                    attr: wire_attr(attr),
                }
                .as_bytes(),
            ),
            Reply::Statx(attr, trust) => fixed(statx_out(attr, *trust, now).as_bytes()),
            Reply::Body(len) | Reply::Listing(Listed { bytes: len, .. }) => {
                Some((Head::new(unique, 0, &[], *len), *len))
            }
            Reply::Size(size) => fixed(wire::SizeOut { size: *size, padding: 0 }.as_bytes()),
            Reply::Wide(value) => fixed(value.as_bytes()),
            Reply::StatFs(stat) => fixed(statfs_out(stat).as_bytes()),
            Reply::Ioctl(len) => {
                Some((Head::new(unique, 0, wire::IoctlOut::default().as_bytes(), *len), *len))
            }
            Reply::Opened(out) => fixed(out.as_bytes()),
        }
    }
}

fn attr_valid(attr: &Attr, trust: Trust, now: i64) -> u64 {
    match trust {
        Trust::Usual => {}
        Trust::Lasting => return ATTR_VALID_SECS,
        Trust::Never => return 0,
    }
    let age = now.saturating_sub(attr.ctime.secs);
    let settled = attr.mode & mode::TYPE != mode::REGULAR || age > CHANGED_LATELY_SECS;
    if settled {
        ATTR_VALID_SECS
    } else {
        ATTR_VALID_SECS_CHANGED
    }
}

fn wire_attr(attr: &Attr) -> wire::WireAttr {
    wire::WireAttr {
        ino: attr.ino.0,
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime.secs as u64,
        mtime: attr.mtime.secs as u64,
        ctime: attr.ctime.secs as u64,
        atime_nanos: attr.atime.nanos,
        mtime_nanos: attr.mtime.nanos,
        ctime_nanos: attr.ctime.nanos,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: encode_rdev(attr.rdev),
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

fn entry_out(node: u64, attr: &Attr, trust: Trust, now: i64) -> wire::EntryOut {
    wire::EntryOut {
        node,
        generation: attr.generation,
        entry_valid: ENTRY_VALID_SECS,
        attr_valid: attr_valid(attr, trust, now),
        entry_valid_nanos: 0,
        attr_valid_nanos: 0,
        attr: wire_attr(attr),
    }
}

fn statx_time(t: Timestamp) -> wire::StatxTime {
    wire::StatxTime { secs: t.secs, nanos: t.nanos, reserved: 0 }
}

fn statx_out(attr: &Attr, trust: Trust, now: i64) -> wire::StatxOut {
    const BASIC_STATS_AND_BTIME: u32 = 0xfff;
    // STATX_ATTR_COMPRESSED, _IMMUTABLE, _APPEND and _NODUMP have the numbers of the flags.
    const ATTRIBUTES: u32 = flag::COMPRESS | flag::IMMUTABLE | flag::APPEND | flag::NODUMP;
    wire::StatxOut {
        attr_valid: attr_valid(attr, trust, now),
        attr_valid_nanos: 0,
        flags: 0,
        spare: [0; 2],
        stat: wire::WireStatx {
            mask: BASIC_STATS_AND_BTIME,
            blksize: BLOCK_BYTES,
            attributes: u64::from(attr.flags & ATTRIBUTES),
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            mode: attr.mode as u16,
            ino: attr.ino.0,
            size: attr.size,
            blocks: attr.blocks,
            attributes_mask: u64::from(ATTRIBUTES),
            atime: statx_time(attr.atime),
            btime: statx_time(attr.btime),
            ctime: statx_time(attr.ctime),
            mtime: statx_time(attr.mtime),
            rdev_major: (attr.rdev >> 32) as u32,
            rdev_minor: attr.rdev as u32,
            ..Default::default()
        },
    }
}

fn statfs_out(stat: &StatFs) -> wire::StatfsOut {
    let blocks = |bytes: u64| bytes / u64::from(BLOCK_BYTES);
    wire::StatfsOut {
        blocks: blocks(stat.total_bytes),
        free_blocks: blocks(stat.free_bytes),
        available_blocks: blocks(stat.available_bytes),
        files: stat.inodes.saturating_add(stat.free_inodes),
        free_files: stat.free_inodes,
        block_bytes: BLOCK_BYTES,
        name_bytes_max: 255,
        fragment_bytes: BLOCK_BYTES,
        padding: 0,
        spare: [0; 6],
    }
}

/// What a listing has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Bytes filled.
    pub bytes: usize,
    /// The cookie of the last entry, zero without one.
    pub last: u64,
    /// There was an entry that found no room.
    pub is_full: bool,
}

/// Packs directory entries into the body of a reply.
pub struct Listing<'a> {
    body: &'a mut [u8],
    listed: Listed,
    now: i64,
}

impl<'a> Listing<'a> {
    /// A listing that may fill `body`.
    pub fn new(body: &'a mut [u8], now: i64) -> Listing<'a> {
        Listing { body, listed: Listed::default(), now }
    }

    /// What it has come to.
    pub fn listed(&self) -> Listed {
        self.listed
    }

    /// Adds an entry of READDIR; false when there is no more room.
    pub fn push(&mut self, entry: &DirEntry<'_>) -> bool {
        self.put(&[], entry)
    }

    /// Adds an entry of READDIRPLUS; false when there is no more room. Without attributes (node
    /// 0) the kernel learns the name only and looks it up when needed.
    pub fn push_plus(&mut self, entry: &DirEntry<'_>, known: Option<(u64, &Attr, Trust)>) -> bool {
        let head = match known {
            Some((node, attr, trust)) => entry_out(node, attr, trust, self.now),
            None => wire::EntryOut::default(),
        };
        self.put(head.as_bytes(), entry)
    }

    fn put(&mut self, prefix: &[u8], entry: &DirEntry<'_>) -> bool {
        let head = wire::DirentHead {
            ino: entry.ino.0,
            cookie: entry.cookie,
            name_bytes: entry.name.len() as u32,
            kind: (entry.file_type & mode::TYPE) >> 12,
        };
        let bytes = prefix.len() + core::mem::size_of_val(&head) + entry.name.len();
        let padded = bytes.next_multiple_of(8);
        let Some(mut room) =
            self.body.get_mut(self.listed.bytes..).and_then(|r| r.get_mut(..padded))
        else {
            self.listed.is_full = true;
            return false;
        };
        for part in [prefix, head.as_bytes(), entry.name, &[0; 7][..padded - bytes]] {
            let (here, rest) = room.split_at_mut(part.len());
            here.copy_from_slice(part);
            room = rest;
        }
        self.listed.bytes += padded;
        self.listed.last = entry.cookie;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::units::Ino;

    #[test]
    fn an_entry_that_does_not_fit_leaves_the_listing_as_it_was() {
        let mut body = [0xaa; 60];
        let mut listing = Listing::new(&mut body, 0);
        let entry = DirEntry { ino: Ino(5), cookie: 1, file_type: mode::REGULAR, name: b"name" };
        assert!(listing.push(&entry));
        assert_eq!(listing.listed(), Listed { bytes: 32, last: 1, is_full: false });
        assert!(!listing.push(&entry));
        assert_eq!(listing.listed(), Listed { bytes: 32, last: 1, is_full: true });
        assert_eq!(&body[24..32], b"name\0\0\0\0");
        assert_eq!(body[20], 8, "DT_REG");
        assert!(body[32..].iter().all(|&b| b == 0xaa));
    }

    #[test]
    fn attributes_of_a_file_changed_lately_are_not_trusted_for_long() {
        let attr = |file_type, ctime| Attr {
            ino: Ino(2),
            generation: 1,
            mode: file_type | 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp { secs: ctime, nanos: 0 },
            btime: Timestamp::default(),
            flags: 0,
            project: 0,
            version: 0,
        };
        let valid = |file_type, now| attr_valid(&attr(file_type, 1000), Trust::Usual, now);
        assert_eq!(valid(mode::REGULAR, 1010), ATTR_VALID_SECS_CHANGED);
        assert_eq!(valid(mode::REGULAR, 2000), ATTR_VALID_SECS);
        assert_eq!(valid(mode::DIRECTORY, 1010), ATTR_VALID_SECS);
    }
}
