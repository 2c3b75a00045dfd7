//! Asking whoever serves a mount to discard free space (`FITRIM`).

use rustix::ioctl;
use std::fs::File;
use std::io;

/// `struct fstrim_range` of the kernel.
#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

/// Has all free space of a mounted filesystem discarded, in runs of at least `min_len` bytes.
/// `file` is anything in it. Returns how many bytes were discarded.
///
/// # Errors
/// Those of the filesystem: EOPNOTSUPP when no device discards.
pub fn trim(file: &File, min_len: u64) -> io::Result<u64> {
    const FITRIM: ioctl::Opcode = ioctl::opcode::read_write::<FstrimRange>(b'X', 121);
    let mut range = FstrimRange { start: 0, len: u64::MAX, min_len };
    // SAFETY: FITRIM reads and writes one `fstrim_range`, and keeps no pointer to it.
    unsafe {
        ioctl::ioctl(file, ioctl::Updater::<FITRIM, FstrimRange>::new(&mut range))?;
    }
    Ok(range.len)
}
