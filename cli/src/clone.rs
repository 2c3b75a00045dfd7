//! `cairn clone`: a file that shares its data with another.
//!
//! What `cp --reflink=always` does on a filesystem whose driver can carry FICLONE. Through FUSE the
//! kernel refuses that and passes copy_file_range(2) on, which shares whole sectors. But where it
//! cannot be passed on, the kernel copies bytes itself and says nothing. So what would make it do
//! that is looked for first, and refused.

use crate::arguments::CloneFile as Arguments;
use crate::{output, Done, Failure};
use cairn_host::mounts;
use cairn_host::parse::format_size;
use cairn_host::say;
use fs_core::format::pool::INO_MAX;
use rustix::fs::OFlags;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Data is shared in units of this.
const SECTOR_BYTES: u64 = 4096;
/// Asked for at once, so that an interrupt comes through.
const PIECE_BYTES: u64 = 1 << 30;

pub(crate) fn run(arguments: &Arguments) -> Result<Done, Failure> {
    let source = &arguments.source;
    // Of a pipe nobody is to wait for the other end.
    let nonblock = OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(nonblock).open(source);
    let file = file.map_err(|error| of(source, &error))?;
    let data = file.metadata().map_err(|error| of(source, &error))?;
    if !data.is_file() {
        return Err(Failure::new(format_args!("{}: not a regular file", source.display())));
    }
    let target = match (arguments.target.is_dir(), source.file_name()) {
        (true, Some(name)) => arguments.target.join(name),
        _ => arguments.target.clone(),
    };
    can_share(source, &data, &target)?;
    let range = Range::of(arguments, &data)?;
    let (out, is_new) = open(&target, &data, arguments)?;
    let there = out.metadata().map_err(|error| of(&target, &error))?;
    let outcome = match there.ino() == data.ino() && range.overlaps() {
        true => Err(Failure::new("a range cannot be shared with itself")),
        false => share(&file, &out, &range, (source, &target)),
    };
    if outcome.is_err() && is_new {
        // Nobody asked for a part of it.
        let _ = std::fs::remove_file(&target);
    }
    outcome?;
    if arguments.json {
        output::json(&serde_json::json!({
            "source": source, "target": target, "shared": range.bytes,
        }));
    } else if arguments.verbose {
        say!("{} -> {}: {}", source.display(), target.display(), format_size(range.bytes));
    }
    Ok(Done::Whole)
}

fn of(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format_args!("{}: {error}", path.display()))
}

/// What is to be shared, in bytes.
struct Range {
    from: u64,
    to: u64,
    bytes: u64,
}

impl Range {
    fn of(arguments: &Arguments, source: &Metadata) -> Result<Range, Failure> {
        let from = arguments.offset.unwrap_or(0);
        let to = arguments.to.unwrap_or(from);
        let there = source.len().saturating_sub(from);
        let bytes = arguments.length.unwrap_or(there);
        if bytes > there || from > source.len() {
            let end = from.saturating_add(bytes);
            let what = format_args!("the file ends at {}, before {end}", source.len());
            return Err(Failure::new(what));
        }
        let is_aligned = |at: u64| at % SECTOR_BYTES == 0;
        if !is_aligned(from) || !is_aligned(to) || !(is_aligned(bytes) || bytes == there) {
            return Err(Failure::new(format_args!(
                "data is shared in sectors of {SECTOR_BYTES} bytes: offsets and length are \
                 multiples of that, but for a length that reaches to the end of the file"
            )));
        }
        Ok(Range { from, to, bytes })
    }

    fn overlaps(&self) -> bool {
        self.from < self.to.saturating_add(self.bytes)
            && self.to < self.from.saturating_add(self.bytes)
    }
}

/// Whether the kernel passes on what is asked, instead of copying.
fn can_share(source: &Path, data: &Metadata, target: &Path) -> Result<(), Failure> {
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let beside = parent.metadata().map_err(|error| of(parent, &error))?;
    let on = |path: &Path| -> Result<mounts::Mount, Failure> {
        let on = mounts::mount_of(path).map_err(|error| of(path, &error))?;
        on.map(|(mount, _)| mount).filter(mounts::Mount::is_cairn).ok_or_else(|| {
            Failure::new(format_args!("{} is not on a mounted cairn pool", path.display()))
        })
    };
    let names = || (source.display(), target.display());
    if on(source)?.device != on(parent)?.device {
        let (source, target) = names();
        return Err(Failure::new(format_args!(
            "{source} and {target} are on different mounts, and share nothing: use cp"
        )));
    }
    // Numbers of inodes tell which subvolume they are of.
    if data.ino() / (INO_MAX + 1) != beside.ino() / (INO_MAX + 1) {
        let (source, target) = names();
        return Err(Failure::new(format_args!(
            "{source} and {target} are in different subvolumes, and share nothing: use cp"
        )));
    }
    Ok(())
}

/// Opens the target, and says whether it is new.
fn open(target: &Path, source: &Metadata, given: &Arguments) -> Result<(File, bool), Failure> {
    let is_part = given.offset.is_some() || given.length.is_some() || given.to.is_some();
    let mut new = OpenOptions::new();
    new.write(true).create_new(true).mode(source.mode() & 0o777);
    match new.open(target) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(of(target, &error)),
        Err(_) if !given.force && !is_part => Err(Failure::new(format_args!(
            "{} exists; -f replaces what it holds",
            target.display()
        ))),
        Err(_) => {
            let there = target.metadata().map_err(|error| of(target, &error))?;
            if there.ino() == source.ino() && there.dev() == source.dev() && !is_part {
                let what = format_args!("{} is the file itself", target.display());
                return Err(Failure::new(what));
            }
            let mut old = OpenOptions::new();
            let file = old.write(true).truncate(!is_part).open(target);
            Ok((file.map_err(|error| of(target, &error))?, false))
        }
    }
}

fn share(
    source: &File,
    target: &File,
    range: &Range,
    names: (&PathBuf, &PathBuf),
) -> Result<(), Failure> {
    let (mut from, mut to) = (range.from, range.to);
    let end = range.from + range.bytes;
    while from < end {
        let piece = (end - from).min(PIECE_BYTES) as usize;
        let done =
            rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), piece);
        match done {
            Ok(0) => {
                return Err(Failure::new(format_args!(
                    "{} became shorter meanwhile",
                    names.0.display()
                )))
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(of(names.1, &errno.into())),
        }
    }
    Ok(())
}
