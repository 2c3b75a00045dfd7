//! A filesystem that stores nothing, to measure what the driver and the kernel cost by themselves.
//!
//! It has no state: what an inode is follows from its number, and the number from its name. Names
//! that begin with `d` are directories and with `f` files of [`FILE_BYTES`] zeros; other names do
//! not exist until they are created, and then in the kernel's cache only. Every directory lists
//! [`ENTRIES`] files.

use crate::backend::Mounted;
use fs_core::error::{Errno, Error};
use fs_core::format::inode::mode;
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::{
    Attr, Caller, DirEntry, Fallocate, Filesystem, RenameFlags, Result, Seek, SetAttr, StatFs,
    WriteFlags, XattrMode,
};

/// Size of a file that is found by name.
pub const FILE_BYTES: u64 = 1 << 30;
/// Entries of every directory, beside the dots.
pub const ENTRIES: u64 = 1000;

const ROOT: Ino = Ino(1);
const KIND_MASK: u64 = 3;
const KIND_FILE: u64 = 0;
const KIND_DIR: u64 = 1;
const KIND_CREATED: u64 = 2;

/// See the module.
#[derive(Debug, Default)]
pub struct NoOp;

fn number(dir: Ino, name: &[u8], kind: u64) -> Ino {
    // FNV-1a; a collision only makes two names one file of zeros.
    let hash = name.iter().fold(dir.0 ^ 0xcbf2_9ce4_8422_2325, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    Ino((hash & !KIND_MASK) | kind | 1 << 40)
}

fn attr(ino: Ino) -> Attr {
    let (file_type, size) = match ino.0 & KIND_MASK {
        _ if ino == ROOT => (mode::DIRECTORY | 0o777, 0),
        KIND_DIR => (mode::DIRECTORY | 0o777, 0),
        KIND_FILE => (mode::REGULAR | 0o666, FILE_BYTES),
        _ => (mode::REGULAR | 0o666, 0),
    };
    Attr {
        ino,
        generation: 1,
        mode: file_type,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        size,
        blocks: 0,
        atime: Timestamp::default(),
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
        btime: Timestamp::default(),
        flags: 0,
        project: 0,
        version: 0,
    }
}

fn entry_name(index: u64) -> [u8; 6] {
    let digit = |unit: u64| b'0' + (index / unit % 10) as u8;
    [b'f', digit(10_000), digit(1000), digit(100), digit(10), digit(1)]
}

fn list(dir: Ino, cookie: u64, mut each: impl FnMut(&DirEntry<'_>) -> bool) {
    for cookie in cookie..ENTRIES + 2 {
        let numbered;
        let (ino, file_type, name): (Ino, u32, &[u8]) = match cookie {
            0 => (dir, mode::DIRECTORY, b"."),
            1 => (ROOT, mode::DIRECTORY, b".."),
            _ => {
                numbered = entry_name(cookie - 2);
                (number(dir, &numbered, KIND_FILE), mode::REGULAR, &numbered)
            }
        };
        if !each(&DirEntry { ino, cookie: cookie + 1, file_type, name }) {
            return;
        }
    }
}

fn not_supported<T>() -> Result<T> {
    Err(Error::Posix(Errno::OpNotSupp))
}

impl Filesystem for NoOp {
    fn root(&self) -> Ino {
        ROOT
    }
    fn statfs(&self) -> Result<StatFs> {
        let (total, inodes) = (1 << 40, 1 << 20);
        Ok(StatFs {
            total_bytes: total,
            free_bytes: total,
            available_bytes: total,
            inodes,
            free_inodes: inodes,
            id: [0; 16],
        })
    }
    fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Attr> {
        match name {
            b"." => Ok(attr(dir)),
            b".." => Ok(attr(ROOT)),
            [b'd', ..] => Ok(attr(number(dir, name, KIND_DIR))),
            [b'f', ..] => Ok(attr(number(dir, name, KIND_FILE))),
            _ => Err(Error::Posix(Errno::NoEnt)),
        }
    }
    fn forget(&self, _ino: Ino, _count: u64) {}
    fn getattr(&self, ino: Ino) -> Result<Attr> {
        Ok(attr(ino))
    }
    fn setattr(&self, ino: Ino, set: &SetAttr, _caller: &Caller) -> Result<Attr> {
        let old = attr(ino);
        Ok(Attr { size: set.size.unwrap_or(old.size), ..old })
    }
    fn readlink(&self, _ino: Ino) -> Result<Vec<u8>> {
        Err(Error::Posix(Errno::Inval))
    }
    fn mknod(
        &self,
        dir: Ino,
        name: &[u8],
        _mode: u32,
        _rdev: u64,
        _caller: &Caller,
    ) -> Result<Attr> {
        Ok(attr(number(dir, name, KIND_CREATED)))
    }
    fn mkdir(&self, dir: Ino, name: &[u8], _mode: u32, _caller: &Caller) -> Result<Attr> {
        Ok(attr(number(dir, name, KIND_DIR)))
    }
    fn symlink(&self, _dir: Ino, _name: &[u8], _target: &[u8], _caller: &Caller) -> Result<Attr> {
        not_supported()
    }
    fn tmpfile(&self, _dir: Ino, _mode: u32, _caller: &Caller) -> Result<Attr> {
        not_supported()
    }
    fn link(&self, _ino: Ino, _dir: Ino, _name: &[u8]) -> Result<Attr> {
        not_supported()
    }
    fn unlink(&self, _dir: Ino, _name: &[u8]) -> Result<()> {
        Ok(())
    }
    fn rmdir(&self, _dir: Ino, _name: &[u8]) -> Result<()> {
        Ok(())
    }
    fn rename(
        &self,
        _dir: Ino,
        _name: &[u8],
        _new_dir: Ino,
        _new_name: &[u8],
        _flags: RenameFlags,
        _caller: &Caller,
    ) -> Result<()> {
        Ok(())
    }
    fn read(&self, ino: Ino, offset: u64, out: &mut [u8]) -> Result<usize> {
        // The buffer holds zeros or what an earlier reply left; either serves a measurement.
        Ok(attr(ino).size.saturating_sub(offset).min(out.len() as u64) as usize)
    }
    fn write(&self, _ino: Ino, offset: u64, _data: &[u8], _flags: WriteFlags) -> Result<u64> {
        Ok(offset)
    }
    fn fallocate(&self, _ino: Ino, _op: Fallocate, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let size = attr(ino).size;
        match what {
            _ if offset >= size => Err(Error::Posix(Errno::NxIo)),
            Seek::Data => Ok(offset),
            Seek::Hole => Ok(size),
        }
    }
    fn copy_range(&self, _: Ino, _: u64, _: Ino, _: u64, len: u64) -> Result<u64> {
        Ok(len)
    }
    fn fsync(&self, _ino: Ino, _data_only: bool) -> Result<()> {
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        Ok(())
    }
    fn readdir(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<()> {
        list(dir, cookie, each);
        Ok(())
    }
    fn readdir_plus(
        &self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(&DirEntry<'_>, Option<&Attr>) -> bool,
    ) -> Result<()> {
        list(dir, cookie, |entry| each(entry, Some(&attr(entry.ino))));
        Ok(())
    }
    fn getxattr(&self, _ino: Ino, _name: &[u8]) -> Result<Vec<u8>> {
        Err(Error::Posix(Errno::NoData))
    }
    fn setxattr(&self, _: Ino, _: &[u8], _: &[u8], _: XattrMode) -> Result<()> {
        not_supported()
    }
    fn listxattr(&self, _ino: Ino) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }
    fn removexattr(&self, _ino: Ino, _name: &[u8]) -> Result<()> {
        Err(Error::Posix(Errno::NoData))
    }
    fn label(&self) -> Vec<u8> {
        b"noop".to_vec()
    }
    fn set_label(&self, _name: &[u8]) -> Result<()> {
        not_supported()
    }
    fn trim(&self, _offset: u64, _len: u64, _min_len: u64) -> Result<u64> {
        Ok(0)
    }
    fn shutdown(&self) {}
}

impl Mounted for NoOp {
    fn set_read_only(&self, _read_only: bool) -> Result<()> {
        Ok(())
    }
    fn close(&self) -> Result<()> {
        Ok(())
    }
}
