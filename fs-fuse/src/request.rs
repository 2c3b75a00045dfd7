//! Requests: bytes of the kernel to typed values.
//!
//! [`Request::decode`] is the only reader of request bytes. The kernel is trusted not to be
//! malicious, but a length that does not fit is still an error (`EINVAL`) and never a panic: the
//! same code will read requests of transports whose other end is less well behaved.

use crate::wire::{self, fattr, opcode};
use fs_core::platform::Timestamp;
use fs_core::vfs::{Caller, Fallocate, RenameFlags, Seek, SetAttr, SetTime, XattrMode};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// One request.
#[derive(Debug)]
pub struct Request<'a> {
    /// Names the request in the reply.
    pub unique: u64,
    /// The inode it is about, in the kernel's numbering.
    pub node: u64,
    /// User that asks.
    pub uid: u32,
    /// Group that asks.
    pub gid: u32,
    /// Thread that asks, in the daemon's process-id namespace; 0 when it is not visible there.
    pub pid: u32,
    /// What is asked.
    pub op: Op<'a>,
}

impl Request<'_> {
    /// Who asks, for operations that create nothing.
    pub fn caller(&self) -> Caller {
        self.caller_with_umask(0)
    }

    /// Who asks, with the umask that came with the request.
    pub fn caller_with_umask(&self, umask: u32) -> Caller {
        Caller { uid: self.uid, gid: self.gid, umask: umask & 0o777 }
    }
}

/// What is asked.
#[derive(Debug)]
#[expect(missing_docs, reason = "fields mean what those of the vfs operation mean")]
pub enum Op<'a> {
    /// First request of a connection.
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    /// Last request of a connection, where the kernel sends one.
    Destroy,
    Lookup {
        name: &'a [u8],
    },
    Forget {
        count: u64,
    },
    BatchForget(Forgets<'a>),
    GetAttr {
        /// On behalf of an open file: a write, or a read or seek that depends on the size.
        by_handle: bool,
    },
    Statx,
    SetAttr(SetAttr),
    ReadLink,
    MkNod {
        name: &'a [u8],
        mode: u32,
        rdev: u64,
        umask: u32,
    },
    MkDir {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Create {
        name: &'a [u8],
        mode: u32,
        umask: u32,
        exclusive: bool,
        truncate: bool,
    },
    TmpFile {
        mode: u32,
        umask: u32,
    },
    Link {
        source: u64,
        name: &'a [u8],
    },
    Unlink {
        name: &'a [u8],
    },
    RmDir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_dir: u64,
        new_name: &'a [u8],
        flags: RenameFlags,
    },
    /// Opening and closing: see `ops`.
    Open,
    OpenDir,
    Release,
    ReleaseDir,
    Flush,
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
        kill_priv: bool,
        /// The kernel writes back what it took earlier.
        write_back: bool,
    },
    Fallocate {
        mode: Fallocate,
        offset: u64,
        len: u64,
    },
    Seek {
        offset: u64,
        what: Seek,
    },
    CopyRange {
        offset: u64,
        target: u64,
        target_offset: u64,
        len: u64,
        wide_reply: bool,
    },
    Fsync {
        data_only: bool,
    },
    FsyncDir,
    SyncFs,
    StatFs,
    ReadDir {
        cookie: u64,
        size: u32,
    },
    ReadDirPlus {
        cookie: u64,
        size: u32,
    },
    GetXattr {
        name: &'a [u8],
        size: u32,
    },
    SetXattr {
        name: &'a [u8],
        value: &'a [u8],
        mode: XattrMode,
        kill_sgid: bool,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a [u8],
    },
    Ioctl {
        command: u32,
        input: &'a [u8],
        out_size: u32,
    },
    /// Wants an earlier request cut short; needs no reply.
    Interrupt,
    /// Not known, or left to the kernel.
    Unknown,
}

/// The list of a batched forget.
#[derive(Clone, Copy, Debug)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// Inode (in the kernel's numbering) and count of each.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0
            .chunks_exact(core::mem::size_of::<wire::ForgetOne>())
            .filter_map(|bytes| wire::ForgetOne::read_from_bytes(bytes).ok())
            .map(|one| (one.node, one.count))
    }
}

/// Takes structures and names off the front of a request.
///
/// Nothing that is taken lies across the two parts.
struct Body<'a> {
    part: &'a [u8],
    /// What comes when `part` has been used up.
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    /// What has not been taken yet of the part it stands in.
    fn part(&mut self) -> &'a [u8] {
        if self.part.is_empty() {
            self.part = std::mem::take(&mut self.rest);
        }
        self.part
    }

    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.part()).map_err(|_| Errno::INVAL)?;
        self.part = rest;
        Ok(value)
    }

    /// A name that ends in NUL.
    fn name(&mut self) -> Result<&'a [u8], Errno> {
        let part = self.part();
        let end = part.iter().position(|&b| b == 0).ok_or(Errno::INVAL)?;
        let (name, rest) = part.split_at(end);
        self.part = &rest[1..];
        Ok(name)
    }

    /// The next `len` bytes.
    fn bytes(&mut self, len: u32) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.part().split_at_checked(len as usize).ok_or(Errno::INVAL)?;
        self.part = rest;
        Ok(bytes)
    }
}

/// What of INIT decides how later requests are to be read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Layout {
    /// SETXATTR carries flags (FUSE_SETXATTR_EXT was agreed on).
    pub setxattr_ext: bool,
}

impl<'a> Request<'a> {
    /// Reads a request. `bytes` is exactly what one read of the device returned.
    ///
    /// # Errors
    /// The request's number, when at least that could be read, and the errno to answer it with.
    pub fn decode(bytes: &'a [u8], layout: Layout) -> Result<Request<'a>, (Option<u64>, Errno)> {
        let (head, body) =
            wire::InHeader::read_from_prefix(bytes).map_err(|_| (None, Errno::INVAL))?;
        let fail = |errno| (Some(head.unique), errno);
        if head.len as usize != bytes.len() {
            return Err(fail(Errno::IO));
        }
        Request::of_parts(&head, body, &[], layout).map_err(fail)
    }

    /// Reads a request that came in three parts: the header, the fixed part of the operation at the
    /// front of `fixed`, and the rest.
    ///
    /// # Errors
    /// The errno to answer the request with.
    pub fn decode_split(
        head: &wire::InHeader,
        fixed: &'a [u8],
        payload: &'a [u8],
        layout: Layout,
    ) -> Result<Request<'a>, Errno> {
        // How long the fixed part is follows from the length of the whole.
        let fixed_bytes = (head.len as usize)
            .checked_sub(core::mem::size_of::<wire::InHeader>() + payload.len())
            .ok_or(Errno::IO)?;
        let fixed = fixed.get(..fixed_bytes).ok_or(Errno::IO)?;
        Request::of_parts(head, fixed, payload, layout)
    }

    fn of_parts(
        head: &wire::InHeader,
        part: &'a [u8],
        rest: &'a [u8],
        layout: Layout,
    ) -> Result<Request<'a>, Errno> {
        // Extensions, if any, stand at the end; none was asked for, so they are only left out.
        let extensions = usize::from(head.total_extlen) * 8;
        let without = |part: &'a [u8]| {
            let len = part.len().checked_sub(extensions).ok_or(Errno::INVAL)?;
            Ok(&part[..len])
        };
        let body = if rest.is_empty() {
            Body { part: without(part)?, rest }
        } else {
            Body { part, rest: without(rest)? }
        };
        Ok(Request {
            unique: head.unique,
            node: head.node,
            uid: head.uid,
            gid: head.gid,
            pid: head.pid,
            op: decode_op(head, body, layout)?,
        })
    }
}

fn decode_op<'a>(
    head: &wire::InHeader,
    mut body: Body<'a>,
    layout: Layout,
) -> Result<Op<'a>, Errno> {
    Ok(match head.opcode {
        opcode::INIT => init(body)?,
        opcode::DESTROY => Op::Destroy,
        opcode::LOOKUP => Op::Lookup { name: body.name()? },
        opcode::FORGET => Op::Forget { count: body.take()? },
        opcode::BATCH_FORGET => {
            body.take::<wire::BatchForgetIn>()?;
            Op::BatchForget(Forgets(body.part()))
        }
        opcode::GETATTR => {
            let args: wire::GetattrIn = body.take()?;
            Op::GetAttr { by_handle: args.getattr_flags & wire::GETATTR_BY_HANDLE != 0 }
        }
        opcode::STATX => Op::Statx,
        opcode::SETATTR => Op::SetAttr(setattr(&body.take()?)),
        opcode::READLINK => Op::ReadLink,
        opcode::MKNOD => {
            let args: wire::MknodIn = body.take()?;
            let rdev = decode_rdev(args.rdev);
            Op::MkNod { name: body.name()?, mode: args.mode, rdev, umask: args.umask }
        }
        opcode::MKDIR => {
            let args: wire::MkdirIn = body.take()?;
            Op::MkDir { name: body.name()?, mode: args.mode, umask: args.umask }
        }
        opcode::SYMLINK => Op::Symlink { name: body.name()?, target: body.name()? },
        opcode::CREATE => {
            let args: wire::CreateIn = body.take()?;
            Op::Create {
                name: body.name()?,
                mode: args.mode,
                umask: args.umask,
                exclusive: args.flags & rustix::fs::OFlags::EXCL.bits() != 0,
                truncate: args.flags & rustix::fs::OFlags::TRUNC.bits() != 0,
            }
        }
        opcode::TMPFILE => {
            let args: wire::CreateIn = body.take()?;
            Op::TmpFile { mode: args.mode, umask: args.umask }
        }
        opcode::LINK => Op::Link { source: body.take()?, name: body.name()? },
        opcode::UNLINK => Op::Unlink { name: body.name()? },
        opcode::RMDIR => Op::RmDir { name: body.name()? },
        opcode::RENAME => {
            let new_dir = body.take()?;
            rename(&mut body, new_dir, 0)?
        }
        opcode::RENAME2 => {
            let args: wire::Rename2In = body.take()?;
            rename(&mut body, args.new_dir, args.flags)?
        }
        opcode::OPEN => Op::Open,
        opcode::OPENDIR => Op::OpenDir,
        opcode::RELEASE => Op::Release,
        opcode::RELEASEDIR => Op::ReleaseDir,
        opcode::FLUSH => Op::Flush,
        opcode::READ => {
            let args: wire::ReadIn = body.take()?;
            Op::Read { offset: args.offset, size: args.size }
        }
        opcode::WRITE => {
            let args: wire::WriteIn = body.take()?;
            Op::Write {
                offset: args.offset,
                data: body.bytes(args.size)?,
                kill_priv: args.write_flags & wire::WRITE_KILL_SUIDGID != 0,
                write_back: args.write_flags & wire::WRITE_CACHE != 0,
            }
        }
        opcode::FALLOCATE => {
            let args: wire::FallocateIn = body.take()?;
            Op::Fallocate { mode: fallocate(args.mode)?, offset: args.offset, len: args.length }
        }
        opcode::LSEEK => {
            let args: wire::LseekIn = body.take()?;
            Op::Seek { offset: args.offset, what: seek(args.whence)? }
        }
        opcode::COPY_FILE_RANGE => copy_range(&body.take()?, false)?,
        opcode::COPY_FILE_RANGE_64 => copy_range(&body.take()?, true)?,
        opcode::FSYNC => {
            let args: wire::FsyncIn = body.take()?;
            Op::Fsync { data_only: args.fsync_flags & wire::FSYNC_DATA_ONLY != 0 }
        }
        opcode::FSYNCDIR => Op::FsyncDir,
        opcode::SYNCFS => Op::SyncFs,
        opcode::STATFS => Op::StatFs,
        opcode::READDIR => {
            let args: wire::ReadIn = body.take()?;
            Op::ReadDir { cookie: args.offset, size: args.size }
        }
        opcode::READDIRPLUS => {
            let args: wire::ReadIn = body.take()?;
            Op::ReadDirPlus { cookie: args.offset, size: args.size }
        }
        opcode::GETXATTR => {
            let args: wire::GetxattrIn = body.take()?;
            Op::GetXattr { name: body.name()?, size: args.size }
        }
        opcode::SETXATTR => setxattr(body, layout)?,
        opcode::LISTXATTR => Op::ListXattr { size: body.take::<wire::GetxattrIn>()?.size },
        opcode::REMOVEXATTR => Op::RemoveXattr { name: body.name()? },
        opcode::IOCTL => {
            let args: wire::IoctlIn = body.take()?;
            Op::Ioctl {
                command: args.command,
                input: body.bytes(args.in_size)?,
                out_size: args.out_size,
            }
        }
        opcode::INTERRUPT => Op::Interrupt,
        _ => Op::Unknown,
    })
}

fn init<'a>(mut body: Body<'a>) -> Result<Op<'a>, Errno> {
    let args: wire::InitIn = body.take()?;
    let mut flags = u64::from(args.flags);
    if flags & wire::init::INIT_EXT != 0 {
        flags |= u64::from(body.take::<u32>()?) << 32;
    }
    Ok(Op::Init { major: args.major, minor: args.minor, max_readahead: args.max_readahead, flags })
}

fn time(secs: u64, nanos: u32) -> Timestamp {
    // Seconds before 1970 travel as two's complement.
    Timestamp { secs: secs as i64, nanos: nanos.min(999_999_999) }
}

fn setattr(args: &wire::SetattrIn) -> SetAttr {
    let has = |bit| args.valid & bit != 0;
    let set_time = |given, now, at| match (has(now), has(given)) {
        (true, _) => Some(SetTime::Now),
        (false, true) => Some(SetTime::At(at)),
        (false, false) => None,
    };
    let owner = has(fattr::UID) || has(fattr::GID);
    SetAttr {
        mode: has(fattr::MODE).then_some(args.mode & 0o7777),
        uid: has(fattr::UID).then_some(args.uid),
        gid: has(fattr::GID).then_some(args.gid),
        size: has(fattr::SIZE).then_some(args.size),
        atime: set_time(fattr::ATIME, fattr::ATIME_NOW, time(args.atime, args.atime_nanos)),
        mtime: set_time(fattr::MTIME, fattr::MTIME_NOW, time(args.mtime, args.mtime_nanos)),
        ctime: has(fattr::CTIME).then_some(time(args.ctime, args.ctime_nanos)),
        flags: None,
        project: None,
        // With HANDLE_KILLPRIV_V2 the kernel leaves it to the server to clear set-user-id,
        // set-group-id and capabilities on every change of owner, and says so for truncation.
        kill_priv: owner || has(fattr::KILL_SUIDGID),
    }
}

fn rename<'a>(body: &mut Body<'a>, new_dir: u64, flags: u32) -> Result<Op<'a>, Errno> {
    const NO_REPLACE: u32 = 1;
    const EXCHANGE: u32 = 2;
    const WHITEOUT: u32 = 4;
    if flags & !(NO_REPLACE | EXCHANGE | WHITEOUT) != 0 {
        return Err(Errno::INVAL);
    }
    let flags = RenameFlags {
        no_replace: flags & NO_REPLACE != 0,
        exchange: flags & EXCHANGE != 0,
        whiteout: flags & WHITEOUT != 0,
    };
    Ok(Op::Rename { name: body.name()?, new_dir, new_name: body.name()?, flags })
}

fn fallocate(mode: u32) -> Result<Fallocate, Errno> {
    const KEEP_SIZE: u32 = 0x01;
    const PUNCH_HOLE: u32 = 0x02;
    const COLLAPSE_RANGE: u32 = 0x08;
    const ZERO_RANGE: u32 = 0x10;
    const INSERT_RANGE: u32 = 0x20;
    let keep_size = mode & KEEP_SIZE != 0;
    match mode & !KEEP_SIZE {
        0 => Ok(Fallocate::Allocate { keep_size }),
        PUNCH_HOLE if keep_size => Ok(Fallocate::PunchHole),
        ZERO_RANGE => Ok(Fallocate::ZeroRange { keep_size }),
        COLLAPSE_RANGE if !keep_size => Ok(Fallocate::CollapseRange),
        INSERT_RANGE if !keep_size => Ok(Fallocate::InsertRange),
        _ => Err(Errno::OPNOTSUPP),
    }
}

fn seek(whence: u32) -> Result<Seek, Errno> {
    match whence {
        3 => Ok(Seek::Data),
        4 => Ok(Seek::Hole),
        _ => Err(Errno::INVAL),
    }
}

fn copy_range<'a>(args: &wire::CopyFileRangeIn, wide_reply: bool) -> Result<Op<'a>, Errno> {
    if args.flags != 0 {
        return Err(Errno::INVAL);
    }
    // The older request counts what was copied in 32 bits; a shorter copy is a valid answer.
    let len = if wide_reply { args.len } else { args.len.min(u64::from(u32::MAX) & !0xfffff) };
    Ok(Op::CopyRange {
        offset: args.source_offset,
        target: args.target_node,
        target_offset: args.target_offset,
        len,
        wide_reply,
    })
}

fn setxattr<'a>(mut body: Body<'a>, layout: Layout) -> Result<Op<'a>, Errno> {
    const CREATE: u32 = 1;
    const REPLACE: u32 = 2;
    let (base, extra) = if layout.setxattr_ext {
        let args: wire::SetxattrInExt = body.take()?;
        (args.base, args.setxattr_flags)
    } else {
        (body.take()?, 0)
    };
    let mode = match base.flags {
        0 => XattrMode::Either,
        CREATE => XattrMode::Create,
        REPLACE => XattrMode::Replace,
        _ => return Err(Errno::INVAL),
    };
    Ok(Op::SetXattr {
        name: body.name()?,
        value: body.bytes(base.size)?,
        mode,
        kill_sgid: extra & wire::SETXATTR_ACL_KILL_SGID != 0,
    })
}

/// The kernel's 32-bit device number as major << 32 | minor.
fn decode_rdev(dev: u32) -> u64 {
    let major = (dev >> 8) & 0xfff;
    let minor = (dev & 0xff) | ((dev >> 12) & 0xfff00);
    u64::from(major) << 32 | u64::from(minor)
}

/// major << 32 | minor as the kernel's 32-bit device number.
pub fn encode_rdev(rdev: u64) -> u32 {
    let (major, minor) = ((rdev >> 32) as u32, rdev as u32);
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let head = wire::InHeader {
            len: (40 + body.len()) as u32,
            opcode,
            unique: 7,
            node: 1,
            uid: 0,
            gid: 0,
            pid: 0,
            total_extlen: 0,
            padding: 0,
        };
        [head.as_bytes(), body].concat()
    }

    #[test]
    fn device_numbers_survive_the_kernels_encoding() {
        for rdev in [0, 1, 8 << 32 | 1, 0xfff << 32 | 0xfffff, 259 << 32 | 300] {
            assert_eq!(decode_rdev(encode_rdev(rdev)), rdev);
        }
    }

    #[test]
    fn a_request_of_any_length_and_opcode_is_decoded_or_refused_without_a_panic() {
        for opcode in 0..64 {
            for len in 0..160 {
                for fill in [0u8, 1, 0xff] {
                    let bytes = request(opcode, &vec![fill; len]);
                    for layout in [false, true] {
                        let layout = Layout { setxattr_ext: layout };
                        let _ = Request::decode(&bytes, layout);
                        let _ = Request::decode(&bytes[..bytes.len() / 2], layout);
                    }
                }
            }
        }
    }

    #[test]
    fn a_request_in_parts_means_what_it_means_in_one_piece() {
        let lookup: &[u8] = b"name\0";
        let rename = [&9u64.to_ne_bytes()[..], &4u64.to_ne_bytes(), b"old\0new\0"].concat();
        let write = [&[0; 16][..], &4u32.to_ne_bytes(), &[0; 20], b"data"].concat();
        let cases = [
            (opcode::LOOKUP, 0, lookup),
            (opcode::RENAME2, 16, &rename),
            (opcode::WRITE, 40, &write),
        ];
        for (opcode, fixed_bytes, body) in cases {
            let whole = request(opcode, body);
            let (head, _) = wire::InHeader::read_from_prefix(&whole).unwrap();
            // What is behind the fixed part is left from earlier requests.
            let mut fixed = [0xff; 128];
            fixed[..fixed_bytes].copy_from_slice(&body[..fixed_bytes]);
            let layout = Layout::default();
            let split = Request::decode_split(&head, &fixed, &body[fixed_bytes..], layout).unwrap();
            let one_piece = Request::decode(&whole, layout).unwrap();
            assert_eq!(format!("{split:?}"), format!("{one_piece:?}"));
        }
    }

    #[test]
    fn parts_of_any_length_are_decoded_or_refused_without_a_panic() {
        for opcode in 0..64 {
            for len in [0, 8, 40, 100, 167, 168, 169, 300, u32::MAX] {
                for payload in [0, 1, 60, 200] {
                    let whole = request(opcode, &[]);
                    let (mut head, _) = wire::InHeader::read_from_prefix(&whole).unwrap();
                    for extensions in [0, 1, 100] {
                        (head.len, head.total_extlen) = (len, extensions);
                        let (fixed, payload) = ([1; 128], vec![1; payload]);
                        let _ = Request::decode_split(&head, &fixed, &payload, Layout::default());
                    }
                }
            }
        }
    }

    #[test]
    fn a_write_longer_than_its_request_is_refused() {
        let args = wire::WriteIn {
            fh: 0,
            offset: 0,
            size: 5,
            write_flags: 0,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        };
        let bytes = request(opcode::WRITE, &[args.as_bytes(), b"four"].concat());
        let refused = Request::decode(&bytes, Layout::default()).unwrap_err();
        assert_eq!(refused, (Some(7), Errno::INVAL));
    }

    #[test]
    fn the_data_of_a_write_begins_right_after_both_headers() {
        assert_eq!(wire::WRITE_DATA_OFFSET, 80);
    }

    #[test]
    fn structures_have_the_sizes_of_the_protocol() {
        assert_eq!(core::mem::size_of::<wire::WireAttr>(), 88);
        assert_eq!(core::mem::size_of::<wire::EntryOut>(), 128);
        assert_eq!(core::mem::size_of::<wire::StatxOut>(), 288);
        assert_eq!(core::mem::size_of::<wire::InitOut>(), 64);
        assert_eq!(core::mem::size_of::<wire::SetattrIn>(), 88);
        assert_eq!(core::mem::size_of::<wire::StatfsOut>(), 80);
    }

    #[test]
    fn a_change_of_owner_asks_for_privileges_to_be_cleared() {
        let mut args = wire::SetattrIn::read_from_bytes(&[0; 88]).unwrap();
        args.valid = fattr::MODE;
        assert!(!setattr(&args).kill_priv);
        args.valid = fattr::GID;
        assert!(setattr(&args).kill_priv);
        args.valid = fattr::SIZE | fattr::KILL_SUIDGID;
        assert!(setattr(&args).kill_priv);
    }
}
