//! Lists that may be longer than memory: written once to a file without a name, and read again.

use super::Files;
use crate::Failure;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where it is when nothing else is said: unlike /tmp, not in memory.
const DIRECTORY: &str = "/var/tmp";

/// A file without a name.
pub(super) struct Spill {
    out: BufWriter<File>,
    bytes: u64,
    directory: PathBuf,
}

impl Spill {
    pub(super) fn new() -> Result<Spill, Failure> {
        let given = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
        let directory = match given {
            Some(given) => PathBuf::from(given),
            None if Path::new(DIRECTORY).is_dir() => PathBuf::from(DIRECTORY),
            None => std::env::temp_dir(),
        };
        let file = nameless(&directory).map_err(|error| failed(&directory, &error))?;
        Ok(Spill { out: BufWriter::new(file), bytes: 0, directory })
    }

    /// Bytes in it.
    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.out.write_all(bytes).map_err(|error| failed(&self.directory, &error))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Nothing more comes: from here on it is read.
    pub(super) fn finish(&mut self) -> Result<(), Failure> {
        self.out.flush().map_err(|error| failed(&self.directory, &error))
    }

    /// Fills `out` with what begins at `at`.
    pub(super) fn read_at(&self, at: u64, out: &mut [u8]) -> Result<(), Failure> {
        let read = self.out.get_ref().read_exact_at(out, at);
        read.map_err(|error| failed(&self.directory, &error))
    }

    /// Everything from `at` on, as pieces of `N` bytes.
    pub(super) fn pieces<const N: usize>(
        &self,
        at: u64,
    ) -> impl Iterator<Item = Result<[u8; N], Failure>> + '_ {
        let left = self.bytes.saturating_sub(at) / N as u64;
        let mut from = BufReader::with_capacity(256 << 10, At { file: self.out.get_ref(), at });
        (0..left).map(move |_| {
            let mut piece = [0; N];
            let read = from.read_exact(&mut piece);
            read.map(|()| piece).map_err(|error| failed(&self.directory, &error))
        })
    }
}

fn failed(directory: &Path, error: &io::Error) -> Failure {
    Failure::new(format_args!(
        "a list that was to be kept in {}: {error}; TMPDIR chooses another directory",
        directory.display()
    ))
}

fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        return Ok(File::from(file));
    }
    let name = directory.join(format!(".cairn-dedup-{}", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(&name)?;
    std::fs::remove_file(&name)?;
    Ok(file)
}

/// A file from some place on.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(out, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A file that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Its number in the mount.
    pub(super) ino: u64,
    /// Its size when it was found.
    pub(super) size: u64,
    name_at: u64,
    name_len: u64,
}

/// Bytes of a [`Found`].
const FOUND_BYTES: usize = 32;

impl Files {
    pub(super) fn new() -> Result<Files, Failure> {
        Ok(Files { found: Spill::new()?, names: Spill::new()?, count: 0, bytes: 0 })
    }

    pub(super) fn push(&mut self, name: &Path, ino: u64, size: u64) -> Result<(), Failure> {
        let (name, name_at) = (name.as_os_str().as_bytes(), self.names.len());
        let mut record = [0; FOUND_BYTES];
        let numbers = [ino, size, name_at, name.len() as u64];
        for (place, number) in record.chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        self.count = match self.count.checked_add(1) {
            Some(count) => count,
            None => {
                return Err(Failure::new("there are too many files to be looked at in one run"))
            }
        };
        self.bytes += size;
        self.names.push(name)?;
        self.found.push(&record)
    }

    pub(super) fn finish(&mut self) -> Result<(), Failure> {
        self.names.finish()?;
        self.found.finish()
    }

    pub(super) fn get(&self, index: u32) -> Result<Found, Failure> {
        let mut record = [0; FOUND_BYTES];
        self.found.read_at(u64::from(index) * FOUND_BYTES as u64, &mut record)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&record[8 * at..8 * at + 8]);
            u64::from_le_bytes(bytes)
        };
        Ok(Found { ino: number(0), size: number(1), name_at: number(2), name_len: number(3) })
    }

    pub(super) fn name(&self, found: &Found) -> Result<PathBuf, Failure> {
        let mut name = vec![0; found.name_len as usize];
        self.names.read_at(found.name_at, &mut name)?;
        Ok(PathBuf::from(std::ffi::OsString::from_vec(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_again_from_anywhere_on() {
        let mut files = Files::new().unwrap();
        let all: Vec<(PathBuf, u64)> = (0..3000)
            .map(|n| (PathBuf::from(format!("/a/{n}/{}", "x".repeat(n % 90))), n as u64))
            .collect();
        for (name, ino) in &all {
            files.push(name, *ino, ino * 10).unwrap();
        }
        files.finish().unwrap();
        assert_eq!((files.count, files.bytes), (3000, 10 * (0..3000).sum::<u64>()));
        for (index, (name, ino)) in all.iter().enumerate().rev() {
            let found = files.get(index as u32).unwrap();
            assert_eq!((found.ino, found.size), (*ino, ino * 10));
            assert_eq!(files.name(&found).unwrap(), *name);
        }
        let from = |at: u64| files.found.pieces::<FOUND_BYTES>(at * FOUND_BYTES as u64);
        for at in [0, 1, 2999, 3000] {
            let inos: Vec<u64> = from(at).map(|piece| u64::from(piece.unwrap()[0])).collect();
            assert_eq!(inos, (at..3000).map(|ino| ino & 0xff).collect::<Vec<_>>());
        }
        assert!(files.get(3000).is_err());
    }
}
