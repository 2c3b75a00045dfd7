//! The ioctls that reach a FUSE server, on files and directories.
//!
//! The kernel copies arguments in and out by the size and direction in the command's number. It has
//! checked ownership and CAP_LINUX_IMMUTABLE for the flag ioctls, and nothing for the others: who
//! may trim, rename or stop the pool is checked here.

use crate::backend::Mounted;
use crate::ops::Failure;
use crate::request::Request;
use fs_core::format::inode::flag;
use fs_core::units::Ino;
use fs_core::vfs::{Caller, SetAttr};
use rustix::io::Errno;
use rustix::ioctl::opcode;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct fsxattr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fsxattr {
    xflags: u32,
    extent_bytes: u32,
    extent_count: u32,
    project: u32,
    cow_extent_bytes: u32,
    padding: [u8; 8],
}

/// `struct fstrim_range`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

type LabelBuffer = [u8; 256];

/// Numbers of the commands, from the kernel's `fs.h`.
mod command {
    use super::{opcode, FstrimRange, Fsxattr, LabelBuffer};

    // Declared with `long`, but an int is passed.
    pub const GETFLAGS: u32 = opcode::read::<core::ffi::c_long>(b'f', 1);
    pub const SETFLAGS: u32 = opcode::write::<core::ffi::c_long>(b'f', 2);
    pub const GETVERSION: u32 = opcode::read::<core::ffi::c_long>(b'v', 1);
    pub const FSGETXATTR: u32 = opcode::read::<Fsxattr>(b'X', 31);
    pub const FSSETXATTR: u32 = opcode::write::<Fsxattr>(b'X', 32);
    pub const FITRIM: u32 = opcode::read_write::<FstrimRange>(b'X', 121);
    pub const SHUTDOWN: u32 = opcode::read::<u32>(b'X', 125);
    pub const GETFSLABEL: u32 = opcode::read::<LabelBuffer>(0x94, 49);
    pub const SETFSLABEL: u32 = opcode::write::<LabelBuffer>(0x94, 50);
}

/// cairn's own command: a u32, 1 to refuse changes from now on, after a commit, 0 to allow them
/// again. The mount helper sends it to the root directory when it remounts.
pub const SET_READ_ONLY: u32 = opcode::write::<u32>(0xca, 1);

/// Pairs of a flag of FS_IOC_GETFLAGS and one of FS_IOC_FSGETXATTR.
const XFLAGS: [(u32, u32); 6] = [
    (flag::IMMUTABLE, 0x08),
    (flag::APPEND, 0x10),
    (flag::SYNC, 0x20),
    (flag::NOATIME, 0x40),
    (flag::NODUMP, 0x80),
    (flag::PROJINHERIT, 0x200),
];

/// FS_XFLAG_HASATTR: reported by some filesystems, never settable, ignored when set.
const XFLAG_HASATTR: u32 = 0x8000_0000;

/// One ioctl.
pub struct Call<'a> {
    /// The request it came in.
    pub request: &'a Request<'a>,
    /// The inode.
    pub ino: Ino,
    /// The command.
    pub command: u32,
    /// What the caller passed.
    pub input: &'a [u8],
}

impl Call<'_> {
    fn caller(&self) -> Caller {
        self.request.caller()
    }

    fn argument<T: FromBytes + KnownLayout + Immutable>(&self) -> Result<T, Errno> {
        T::read_from_prefix(self.input).map(|(value, _)| value).map_err(|_| Errno::INVAL)
    }

    /// Refuses callers that may not administer the pool.
    fn administrator(&self) -> Result<(), Errno> {
        if self.request.uid == 0 && has_sys_admin(self.request.pid) {
            Ok(())
        } else {
            Err(Errno::PERM)
        }
    }
}

/// Whether a command changes the pool without the kernel asking whether the mount is writable.
pub(crate) fn changes(command: u32) -> bool {
    matches!(command, command::FITRIM | command::SETFSLABEL)
}

/// Carries out an ioctl; its output goes to `out`. Returns the output's length.
pub(crate) fn handle(
    volume: &dyn Mounted,
    call: &Call<'_>,
    out: &mut [u8],
) -> Result<usize, Failure> {
    match call.command {
        command::GETFLAGS => put(&volume.getattr(call.ino)?.flags, out),
        command::SETFLAGS => {
            let flags: u32 = call.argument()?;
            if flags & !flag::KNOWN != 0 {
                return Err(Errno::OPNOTSUPP.into());
            }
            set(volume, call, SetAttr { flags: Some(flags), ..SetAttr::default() })
        }
        command::GETVERSION => put(&(volume.getattr(call.ino)?.generation as u32), out),
        command::FSGETXATTR => {
            let attr = volume.getattr(call.ino)?;
            let fsx = Fsxattr {
                xflags: xflags_of(attr.flags),
                extent_bytes: 0,
                extent_count: 0,
                project: attr.project,
                cow_extent_bytes: 0,
                padding: [0; 8],
            };
            put(&fsx, out)
        }
        command::FSSETXATTR => fssetxattr(volume, call),
        command::FITRIM => {
            call.administrator()?;
            let mut range: FstrimRange = call.argument()?;
            range.len = volume.trim(range.start, range.len, range.min_len)?;
            put(&range, out)
        }
        command::GETFSLABEL => {
            let label = volume.label();
            let mut buffer: LabelBuffer = [0; 256];
            let len = label.len().min(buffer.len() - 1);
            buffer[..len].copy_from_slice(&label[..len]);
            put(&buffer, out)
        }
        command::SETFSLABEL => {
            call.administrator()?;
            let buffer: LabelBuffer = call.argument()?;
            let len = buffer.iter().position(|&b| b == 0).ok_or(Errno::INVAL)?;
            volume.set_label(&buffer[..len])?;
            Ok(0)
        }
        command::SHUTDOWN => {
            call.administrator()?;
            volume.shutdown();
            // The argument, which says what to flush first, does not arrive with a command that
            // is declared as reading.
            Ok(0)
        }
        SET_READ_ONLY => {
            call.administrator()?;
            volume.set_read_only(call.argument::<u32>()? != 0)?;
            Ok(0)
        }
        _ => Err(Errno::NOTTY.into()),
    }
}

fn put<T: IntoBytes + Immutable>(value: &T, out: &mut [u8]) -> Result<usize, Failure> {
    let bytes = value.as_bytes();
    // GETFLAGS is declared with a `long`: what the caller has room for is filled with zeros.
    let out = out.get_mut(..bytes.len()).ok_or(Errno::INVAL)?;
    out.copy_from_slice(bytes);
    Ok(bytes.len())
}

fn set(volume: &dyn Mounted, call: &Call<'_>, set: SetAttr) -> Result<usize, Failure> {
    volume.setattr(call.ino, &set, &call.caller())?;
    Ok(0)
}

fn fssetxattr(volume: &dyn Mounted, call: &Call<'_>) -> Result<usize, Failure> {
    let fsx: Fsxattr = call.argument()?;
    let known = XFLAGS.iter().fold(XFLAG_HASATTR, |all, (_, xflag)| all | xflag);
    if fsx.xflags & !known != 0 || fsx.extent_bytes != 0 || fsx.cow_extent_bytes != 0 {
        return Err(Errno::OPNOTSUPP.into());
    }
    let attr = volume.getattr(call.ino)?;
    let flags = Some(flags_with(attr.flags, fsx.xflags)).filter(|&flags| flags != attr.flags);
    let project = Some(fsx.project).filter(|&project| project != attr.project);
    if flags.is_none() && project.is_none() {
        return Ok(0);
    }
    set(volume, call, SetAttr { flags, project, ..SetAttr::default() })
}

fn xflags_of(flags: u32) -> u32 {
    XFLAGS.iter().filter(|(f, _)| flags & f != 0).fold(0, |all, (_, xflag)| all | xflag)
}

/// `flags` with those that have an xflag set or cleared as `xflags` says.
fn flags_with(flags: u32, xflags: u32) -> u32 {
    XFLAGS.iter().fold(flags, |flags, &(f, xflag)| match xflags & xflag {
        0 => flags & !f,
        _ => flags | f,
    })
}

/// Whether a thread has CAP_SYS_ADMIN in effect. The thread waits for the reply, so its number
/// is still its own. A thread that cannot be seen from here is not trusted.
fn has_sys_admin(pid: u32) -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        .is_some_and(|effective| effective >> CAP_SYS_ADMIN & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_without_an_xflag_survive_fssetxattr() {
        let flags = flag::COMPRESS | flag::IMMUTABLE;
        assert_eq!(flags_with(flags, 0x10), flag::COMPRESS | flag::APPEND);
        assert_eq!(xflags_of(flags), 0x08);
    }

    #[test]
    fn numbers_of_commands_are_those_of_the_kernel() {
        assert_eq!(command::GETFLAGS, 0x8008_6601);
        assert_eq!(command::SETFLAGS, 0x4008_6602);
        assert_eq!(command::FSGETXATTR, 0x801c_581f);
        assert_eq!(command::FSSETXATTR, 0x401c_5820);
        assert_eq!(command::FITRIM, 0xc018_5879);
        assert_eq!(command::SHUTDOWN, 0x8004_587d);
        assert_eq!(command::GETFSLABEL, 0x8100_9431);
        assert_eq!(command::SETFSLABEL, 0x4100_9432);
    }

    #[test]
    fn this_thread_is_seen_with_its_own_capabilities() {
        assert_eq!(has_sys_admin(std::process::id()), rustix::process::geteuid().is_root());
        assert!(!has_sys_admin(0));
    }
}
