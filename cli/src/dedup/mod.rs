//! `cairn dedup`: finds what files hold in common, and has them share it.
//!
//! ```text
//! list: names and numbers of files --> examine: places and hashes of blocks --> share
//! ```
//!
//! The daemon reads and hashes, and compares before it shares (`cairn_host::dedupe`); so nothing
//! that is written meanwhile is lost, and a hash need not be relied on. The lists are in files
//! without a name (`spill`), and what is remembered of hashes in memory is bounded: a run takes
//! more passes over its lists then, not over the data.
//!
//! A block is 128 KiB unless another size is chosen. What is compressed is stored in blobs of
//! 128 KiB, cut at multiples of that in a file, and a blob gives its room back only when nothing
//! of it is used any more. So aligned blocks of that size cover whole blobs. What is not compressed
//! may be shared by the sector, in extents of up to 1 MiB: blocks that follow each other in both
//! files are asked for together, up to 16 MiB, so that such an extent stays one.

mod list;
mod share;
mod spill;

#[cfg(test)]
mod tests;

use crate::arguments::Dedup as Arguments;
use crate::target::{ask, ask_failed};
use crate::{output, versions, Done, Failure};
use cairn_host::admin::{AdminError, Reply, Request, Session};
use cairn_host::dedupe::{Answer, Question};
use cairn_host::mounts::Mount;
use cairn_host::parse::format_size;
use cairn_host::say;
use fs_core::vfs::HASHED_BYTES_MAX;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use list::subvolume_of;
use spill::Spill;
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::hash::Hash;
use std::path::Path;

/// Number of the root directory of what is mounted.
const ROOT: u64 = fs_core::format::pool::ROOT_INO;

pub(crate) fn run(arguments: &Arguments) -> Result<Done, Failure> {
    let mut told = Told::new(arguments.quiet || arguments.json);
    let (mount, paths) = list::roots(&arguments.paths, &mut told)?;
    if mount.read_only_everywhere && !arguments.dry_run {
        let at = mount.mount_point.display();
        return Err(Failure::new(format_args!("{at} is mounted read-only")));
    }
    let mut asking = Asking::new(&mount)?;
    // What programs wrote has no place as long as the kernel or the daemon has it.
    versions::flush(&mount)?;
    ask(&mount, Request::Sync).map_err(|error| ask_failed(&mount, &error))?;

    told.begin(None, "{spinner} {pos} files found");
    let mut walk = list::Walk::new(&mut told, mount.device);
    walk.least = arguments.min_size;
    let files = walk.list(&paths)?;
    let template = "{spinner} {bytes} of {total_bytes} examined, {bytes_per_sec}, {eta} left";
    told.begin(Some(files.bytes), template);
    let how = How::of(arguments);
    let mut seen = Seen::default();
    let blocks = examine(&mut asking, &files, &how, &mut told, &mut seen)?;
    let count = blocks.len() / BLOCK_RECORD_BYTES as u64;
    told.begin(Some(count), "{spinner} {percent}% of blocks compared, {msg}shared, {eta} left");
    share::all(&mut asking, &files, &blocks, &how, &mut told, &mut seen)?;
    told.end();
    show(&seen, &told, arguments);
    Ok(if told.count > 0 { Done::Partly } else { Done::Whole })
}

fn show(seen: &Seen, told: &Told, arguments: &Arguments) {
    if arguments.json {
        output::json(&serde_json::json!({
            "dry_run": arguments.dry_run,
            "files": seen.files,
            "examined": seen.examined,
            "read": seen.read,
            "shared": seen.shared,
            "shared_files": seen.shared_files,
            "shared_before": seen.before,
            "changed": seen.changed,
            "errors": told.count,
        }));
        return;
    }
    let [examined, read, shared, before, changed] =
        [seen.examined, seen.read, seen.shared, seen.before, seen.changed].map(format_size);
    say!("{examined} examined in {} files, {read} of it read", seen.files);
    let (would, files) = (if arguments.dry_run { "would be " } else { "" }, seen.shared_files);
    say!("{shared} {would}shared in {files} files, {before} were shared before");
    if seen.changed > 0 {
        say!("{changed} were changed meanwhile, and left alone");
    }
}

/// How a run is to be done.
pub(super) struct How {
    block: u64,
    /// Bytes of memory for what is remembered.
    memory: u64,
    dry_run: bool,
    verbose: bool,
}

impl How {
    fn of(arguments: &Arguments) -> How {
        How {
            block: arguments.block_size,
            memory: arguments.memory,
            dry_run: arguments.dry_run,
            verbose: arguments.verbose && !arguments.json,
        }
    }

    /// How many entries a table may have: with a byte for each place, and one of eight places free.
    fn entries<K, V>(&self) -> usize {
        let places = self.memory / (std::mem::size_of::<(K, V)>() as u64 + 1);
        let places = (places.max(1024) / 2 + 1).next_power_of_two();
        places as usize / 8 * 7
    }
}

/// What a run came to. All but numbers of files in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    files: u64,
    examined: u64,
    /// Read from the devices.
    read: u64,
    shared: u64,
    shared_files: u64,
    /// Was shared before.
    before: u64,
    /// Was found equal and is not any more.
    changed: u64,
}

/// What is shown while it goes on, and what goes wrong with single files.
pub(super) struct Told {
    bar: ProgressBar,
    is_quiet: bool,
    count: u64,
}

impl Told {
    fn new(is_quiet: bool) -> Told {
        Told { bar: ProgressBar::hidden(), is_quiet, count: 0 }
    }

    /// Shows something else from now on. Hidden unless standard error is a terminal.
    fn begin(&mut self, len: Option<u64>, template: &str) {
        self.end();
        if self.is_quiet {
            return;
        }
        self.bar = ProgressBar::with_draw_target(len, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }

    /// Says what is wrong with a file. The run goes on.
    fn tell(&mut self, path: &Path, why: impl Display) {
        self.count += 1;
        let name = output::printable(&path.display().to_string());
        let why = cairn_host::without_codes(&why.to_string());
        self.bar.suspend(|| eprintln!("cairn: {name}: {why}"));
    }
}

/// Who answers.
pub(super) trait Ask {
    /// # Errors
    /// A sentence, when the file is to blame; else the run is over.
    fn ask(&mut self, question: Question) -> Result<Result<Answer, String>, Failure>;
}

/// The daemon of a mount.
struct Asking<'a> {
    mount: &'a Mount,
    session: Session,
}

impl<'a> Asking<'a> {
    fn new(mount: &'a Mount) -> Result<Asking<'a>, Failure> {
        let mut asking = Asking { mount, session: Session::new(mount.device) };
        // What it says of every file is not said of each.
        match asking.ask(Question::Places { ino: ROOT, first: 0, block: 4096 })? {
            Ok(_) => Ok(asking),
            Err(why) => Err(ask_failed(mount, &AdminError::Refused(why))),
        }
    }
}

impl Ask for Asking<'_> {
    fn ask(&mut self, question: Question) -> Result<Result<Answer, String>, Failure> {
        match self.session.ask(&Request::Dedupe(question)) {
            Ok(Reply::Dedupe(answer)) => Ok(Ok(answer)),
            Ok(_) => Err(odd()),
            Err(AdminError::Refused(why)) => Ok(Err(why)),
            Err(error) => Err(ask_failed(self.mount, &error)),
        }
    }
}

fn odd() -> Failure {
    Failure::new("the daemon answered another question")
}

/// The files that were found, with their names.
pub(super) struct Files {
    found: Spill,
    names: Spill,
    count: u32,
    bytes: u64,
}

/// Where something is: 16 bytes of a hash.
type Place = [u8; 16];
/// What stands for a place of its own, or for none that is known.
const NOWHERE: Place = [0; 16];

/// A block of a file, with something in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// Names its content, and the subvolume: nothing is shared between two.
    content: [u8; 16],
    place: Place,
    file: u32,
    index: u32,
    bytes: u32,
}

/// What is said of a file in such a subvolume.
const STAYS: &str =
    "is in a snapshot, or in a subvolume that refuses changes, and stays as it is, \
     like all that is in that";

/// Bytes of a [`Block`] in its list.
const BLOCK_RECORD_BYTES: usize = 44;

impl Block {
    fn to_bytes(self) -> [u8; BLOCK_RECORD_BYTES] {
        let mut record = [0; BLOCK_RECORD_BYTES];
        record[..16].copy_from_slice(&self.content);
        record[16..32].copy_from_slice(&self.place);
        let numbers = [self.file, self.index, self.bytes];
        for (place, number) in record[32..].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        record
    }

    fn of_bytes(record: &[u8; BLOCK_RECORD_BYTES]) -> Block {
        let part = |at: usize| {
            let mut part = [0; 16];
            part.copy_from_slice(&record[at..at + 16]);
            part
        };
        let number = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&record[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        Block {
            content: part(0),
            place: part(16),
            file: number(32),
            index: number(36),
            bytes: number(40),
        }
    }
}

/// A map that never has more than so many entries.
struct Bounded<K, V> {
    map: HashMap<K, V>,
    most: usize,
}

impl<K: Eq + Hash, V> Bounded<K, V> {
    /// One that will be given `expected` entries.
    fn new(how: &How, expected: u64) -> Bounded<K, V> {
        let most = how.entries::<K, V>();
        let first = usize::try_from(expected).map_or(most, |expected| expected.min(most));
        Bounded { map: HashMap::with_capacity(first), most }
    }

    fn is_full(&self) -> bool {
        self.map.len() >= self.most
    }
}

/// Asks for the places of all blocks of all files, and for the hash of each place once.
fn examine(
    asking: &mut dyn Ask,
    files: &Files,
    how: &How,
    told: &mut Told,
    seen: &mut Seen,
) -> Result<Spill, Failure> {
    let mut blocks = Spill::new()?;
    let mut known = Bounded::new(how, files.bytes / how.block + u64::from(files.count));
    let (mut examined, mut staying) = (0, HashSet::new());
    for index in 0..files.count {
        let found = files.get(index)?;
        let mut one = One {
            asking: &mut *asking,
            how,
            known: &mut known,
            blocks: &mut blocks,
            staying: &mut staying,
        };
        match one.examine(index, found.ino, examined, told, seen)? {
            Ok(()) => seen.files += 1,
            Err(why) => told.tell(&files.name(&found)?, why),
        }
        examined += found.size;
        told.bar.set_position(examined);
    }
    blocks.finish()?;
    Ok(blocks)
}

/// What is needed to examine one file.
struct One<'a> {
    asking: &'a mut dyn Ask,
    how: &'a How,
    known: &'a mut Bounded<Place, [u8; 16]>,
    blocks: &'a mut Spill,
    /// Subvolumes of which it was said that they stay as they are.
    staying: &'a mut HashSet<u64>,
}

impl One<'_> {
    fn examine(
        &mut self,
        file: u32,
        ino: u64,
        before: u64,
        told: &Told,
        seen: &mut Seen,
    ) -> Result<Result<(), String>, Failure> {
        let block = self.how.block;
        let mut next = Some(0);
        while let Some(first) = next {
            let places = match self.asking.ask(Question::Places { ino, first, block })? {
                // It is said of the first file of a subvolume.
                Ok(Answer::Places { stays: true, .. }) => {
                    let is_new = self.staying.insert(subvolume_of(ino));
                    return Ok(if is_new { Err(STAYS.into()) } else { Ok(()) });
                }
                Ok(Answer::Places { size, blocks, next: goes_on, .. }) => {
                    next = goes_on;
                    (size, blocks)
                }
                // Of what is gone nothing need be said.
                Ok(Answer::Gone) => return Ok(Ok(())),
                Ok(_) => return Err(odd()),
                Err(why) => return Ok(Err(why)),
            };
            let (size, places) = places;
            let known: Vec<Option<[u8; 16]>> = places
                .iter()
                .map(|(_, place)| self.known.map.get(place.as_ref()?).copied())
                .collect();
            let is_wanted = |((index, _), known): (&(u64, _), &Option<_>)| match known {
                Some(_) => None,
                None => Some(*index),
            };
            let wanted: Vec<u64> = places.iter().zip(&known).filter_map(is_wanted).collect();
            let mut hashes = Vec::with_capacity(wanted.len());
            for part in wanted.chunks((HASHED_BYTES_MAX / block) as usize) {
                let indices = part.to_vec();
                match self.asking.ask(Question::Hashes { ino, block, indices })? {
                    Ok(Answer::Hashes(found)) if found.len() == part.len() => hashes.extend(found),
                    Ok(Answer::Gone) => return Ok(Ok(())),
                    Ok(_) => return Err(odd()),
                    Err(why) => return Ok(Err(why)),
                }
                told.bar.set_position(before + part.last().map_or(0, |index| index * block));
            }
            let mut hashes = hashes.into_iter();
            for ((index, place), known) in places.into_iter().zip(known) {
                let bytes = block.min(size.saturating_sub(index * block));
                let content = match known {
                    Some(content) => content,
                    None => match hashes.next().flatten() {
                        Some(hash) => {
                            seen.read += bytes;
                            self.content(place, &hash)
                        }
                        // The file has become shorter.
                        None => continue,
                    },
                };
                seen.examined += bytes;
                let Ok(index) = u32::try_from(index) else {
                    return Ok(Err("is too large for blocks of this size".into()));
                };
                let content = in_subvolume(content, ino);
                let place = place.unwrap_or(NOWHERE);
                let block = Block { content, place, file, index, bytes: bytes as u32 };
                self.blocks.push(&block.to_bytes())?;
            }
        }
        Ok(Ok(()))
    }

    /// The name of a content; what has a place is not read again.
    fn content(&mut self, place: Option<Place>, hash: &[u8; 32]) -> [u8; 16] {
        let mut content = [0; 16];
        content.copy_from_slice(&hash[..16]);
        if let Some(place) = place {
            // What was met long ago is less likely to be met again.
            if self.known.is_full() {
                self.known.map.clear();
            }
            self.known.map.insert(place, content);
        }
        content
    }
}

/// Nothing is shared between subvolumes: what is equal in two has two names.
fn in_subvolume(mut content: [u8; 16], ino: u64) -> [u8; 16] {
    for (byte, number) in content.iter_mut().zip(subvolume_of(ino).to_le_bytes()) {
        *byte ^= number;
    }
    content
}
