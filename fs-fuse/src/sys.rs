//! The few system calls that have no safe wrapper elsewhere, behind safe functions.

use rustix::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{self, opcode, Ioctl, IoctlOutput, Opcode, Setter};
use rustix::thread::{Pid, UnshareFlags};
use std::ffi::c_void;

/// Opens /dev/fuse.
pub fn open_fuse() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// A second descriptor for the connection of `device`, with its own list of requests under way.
pub fn clone_fuse(device: impl AsFd) -> Result<OwnedFd, Errno> {
    const FUSE_DEV_IOC_CLONE: Opcode = opcode::read::<u32>(229, 0);
    let clone = open_fuse()?;
    let original = device.as_fd().as_raw_fd() as u32;
    // SAFETY: the command reads one u32, a descriptor's number, through the pointer.
    unsafe { ioctl::ioctl(&clone, Setter::<FUSE_DEV_IOC_CLONE, u32>::new(original))? };
    Ok(clone)
}

/// Sends a cairn command that takes a u32 to the open file or directory.
pub fn command_u32<const COMMAND: Opcode>(file: impl AsFd, value: u32) -> Result<(), Errno> {
    // SAFETY: commands of this crate's `ioctl` module with a u32 read it through the pointer.
    unsafe { ioctl::ioctl(file, Setter::<COMMAND, u32>::new(value)) }
}

/// What fork(2) returned.
pub enum Fork {
    /// In the parent.
    Parent,
    /// In the child.
    Child,
}

/// Splits the process in two.
///
/// # Errors
/// `BUSY` when there are threads already: only the calling one would live on in the child, with
/// whatever locks the others hold. Otherwise what the system says.
pub fn fork() -> Result<Fork, Errno> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, |tasks| tasks.count());
    if threads > 1 {
        return Err(Errno::BUSY);
    }
    // SAFETY: this is the only thread, so the child's memory is consistent.
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent),
        _ => Err(Errno::from_raw_os_error(
            std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EAGAIN),
        )),
    }
}

/// Gives the calling thread a mount namespace of its own.
pub fn unshare_mounts() -> Result<(), Errno> {
    // SAFETY: the table of descriptors stays shared; only FILES would make this unsafe.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// A thread's place among those that want a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// SCHED_OTHER.
    Plain,
    /// SCHED_IDLE.
    Meek,
    /// Any other, or one with more to it.
    Other,
}

/// The class of a thread of this process; of the calling one when none is named.
///
/// # Errors
/// What the system says; `SRCH` when the thread is gone.
pub fn class_of(thread: Option<Pid>) -> Result<Class, Errno> {
    // SAFETY: takes a number and touches no memory of the process.
    match unsafe { libc::sched_getscheduler(raw(thread)) } {
        libc::SCHED_OTHER => Ok(Class::Plain),
        libc::SCHED_IDLE => Ok(Class::Meek),
        ..0 => Err(last_errno()),
        _ => Ok(Class::Other),
    }
}

/// Changes the class of a thread of this process; of the calling one when none is named. Its nice
/// value stays what it is.
///
/// # Errors
/// What the system says: `PERM` for a change from `Meek` to `Plain` without permission, `SRCH` when
/// the thread is gone. `INVAL` for `Other`.
pub fn set_class(thread: Option<Pid>, class: Class) -> Result<(), Errno> {
    let policy = match class {
        Class::Plain => libc::SCHED_OTHER,
        Class::Meek => libc::SCHED_IDLE,
        Class::Other => return Err(Errno::INVAL),
    };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads one `sched_param` through the pointer.
    match unsafe { libc::sched_setscheduler(raw(thread), policy, &parameters) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

fn raw(thread: Option<Pid>) -> libc::pid_t {
    thread.map_or(0, |thread| thread.as_raw_nonzero().get())
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// `struct loop_info64` of the kernel's loop.h.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of the kernel's loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// How a loop device is to behave.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoopFlags {
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the page cache of the file below.
    pub direct_io: bool,
}

/// Number of a loop device that is not in use, at this moment.
pub fn free_loop_device(control: impl AsFd) -> Result<u32, Errno> {
    struct GetFree;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number.
    unsafe impl Ioctl for GetFree {
        type Output = u32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            0x4c82
        }
        fn as_ptr(&mut self) -> *mut c_void {
            core::ptr::null_mut()
        }
        unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<u32, Errno> {
            Ok(out as u32)
        }
    }
    // SAFETY: as above.
    unsafe { ioctl::ioctl(control, GetFree) }
}

/// Puts a loop device over `file`; it lets go of it when the last user closes the device.
pub fn configure_loop(
    device: impl AsFd,
    file: RawFd,
    name: &[u8],
    flags: LoopFlags,
) -> Result<(), Errno> {
    const LOOP_CONFIGURE: Opcode = 0x4c0a;
    const READ_ONLY: u32 = 1;
    const AUTOCLEAR: u32 = 4;
    const DIRECT_IO: u32 = 16;
    let mut file_name = [0; 64];
    let len = name.len().min(file_name.len() - 1);
    file_name[..len].copy_from_slice(&name[..len]);
    let config = LoopConfig {
        fd: file as u32,
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: AUTOCLEAR
                | if flags.read_only { READ_ONLY } else { 0 }
                | if flags.direct_io { DIRECT_IO } else { 0 },
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the command reads a `struct loop_config` through the pointer.
    unsafe { ioctl::ioctl(device, Setter::<LOOP_CONFIGURE, LoopConfig>::new(config)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_structures_have_the_sizes_of_the_kernel() {
        assert_eq!(core::mem::size_of::<LoopInfo>(), 232);
        assert_eq!(core::mem::size_of::<LoopConfig>(), 304);
    }
}
