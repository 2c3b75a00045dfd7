//! The files below some paths.

use super::{Files, Told};
use crate::target::daemon_gone;
use crate::Failure;
use cairn_host::mounts::{self, Mount};
use fs_core::format::pool::INO_MAX;
use indicatif::ProgressBar;
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Files with several names that are remembered, so as to be looked at once. One more is looked at
/// for each name, and found to share with itself.
const LINKED_MAX: usize = 1 << 20;

/// The mount that all paths are on, and the paths, without those that are below others.
pub(super) fn roots(paths: &[PathBuf], told: &mut Told) -> Result<(Mount, Vec<PathBuf>), Failure> {
    let mut on: Option<Mount> = None;
    let mut all = Vec::new();
    for path in paths {
        let shown = path.display();
        let of = |error: io::Error| {
            let failed = || Failure::new(format_args!("{shown}: {error}"));
            daemon_gone(path, &error).unwrap_or_else(failed)
        };
        if fs::symlink_metadata(path).map_err(of)?.is_symlink() {
            told.tell(path, "is a symbolic link, which is not followed");
            continue;
        }
        let found = mounts::mount_of(path).map_err(of)?.map(|(mount, _)| mount);
        let Some(mount) = found.filter(Mount::is_cairn) else {
            return Err(Failure::new(format_args!("{shown} is not on a mounted cairn pool")));
        };
        match &on {
            Some(other) if other.device != mount.device => {
                let what = "is on another mount than the paths before it, and shares nothing";
                return Err(Failure::new(format_args!("{shown} {what} with them")));
            }
            Some(_) => {}
            None => on = Some(mount),
        }
        all.push((path.canonicalize().map_err(of)?, path.clone()));
    }
    let Some(mount) = on else { return Err(Failure::new("there is nothing to look at")) };
    all.sort();
    let mut kept: Vec<(PathBuf, PathBuf)> = Vec::new();
    for (place, path) in all {
        if !kept.last().is_some_and(|(above, _)| place.starts_with(above)) {
            kept.push((place, path));
        }
    }
    Ok((mount, kept.into_iter().map(|(_, path)| path).collect()))
}

/// Looks for files.
pub(super) struct Walk<'a> {
    told: &'a mut Told,
    bar: ProgressBar,
    /// Device number of all that is wanted.
    device: u64,
    /// Bytes of the smallest file that is wanted.
    pub(super) least: u64,
    /// Files with several names that were seen.
    linked: HashSet<u64>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(told: &'a mut Told, device: u64) -> Walk<'a> {
        let (bar, linked) = (told.bar.clone(), HashSet::new());
        Walk { told, bar, device, least: 0, linked }
    }

    /// All files below the paths.
    pub(super) fn list(&mut self, paths: &[PathBuf]) -> Result<Files, Failure> {
        let mut files = Files::new()?;
        for path in paths {
            match fs::symlink_metadata(path) {
                // Of none that is above.
                Ok(data) => self.below(path, &data, &mut files)?,
                Err(error) => self.told.tell(path, error),
            }
        }
        files.finish()?;
        Ok(files)
    }

    fn below(&mut self, path: &Path, data: &Metadata, files: &mut Files) -> Result<(), Failure> {
        let mut directories = Vec::new();
        self.take(path, data, files, &mut directories)?;
        while let Some(directory) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) => {
                    self.told.tell(&directory, error);
                    continue;
                }
            };
            for entry in entries {
                let seen = entry.and_then(|entry| {
                    let is_wanted = entry.file_type()?.is_dir() || entry.file_type()?.is_file();
                    let data = if is_wanted { Some(entry.metadata()?) } else { None };
                    Ok(data.map(|data| (entry.path(), data)))
                });
                match seen {
                    Ok(Some((path, data))) => {
                        self.take(&path, &data, files, &mut directories)?;
                    }
                    Ok(None) => {}
                    // It was removed since.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => self.told.tell(&directory, error),
                }
            }
        }
        Ok(())
    }

    /// Notes a file, or a directory to look into.
    fn take(
        &mut self,
        path: &Path,
        data: &Metadata,
        files: &mut Files,
        directories: &mut Vec<PathBuf>,
    ) -> Result<(), Failure> {
        // Something else is mounted there.
        if data.dev() != self.device {
            return Ok(());
        }
        if data.is_dir() {
            directories.push(path.to_path_buf());
        }
        if !data.is_file() || data.len() < self.least.max(1) {
            return Ok(());
        }
        if data.nlink() > 1 {
            if self.linked.contains(&data.ino()) {
                return Ok(());
            }
            if self.linked.len() < LINKED_MAX {
                self.linked.insert(data.ino());
            }
        }
        self.bar.inc(1);
        files.push(path, data.ino(), data.len())
    }
}

/// What numbers of inodes tell of the subvolume they are of.
pub(super) fn subvolume_of(ino: u64) -> u64 {
    ino / (INO_MAX + 1)
}
