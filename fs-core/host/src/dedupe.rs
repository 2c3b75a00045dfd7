//! What `cairn dedup` asks of the daemon: where blocks of a file are, what they hash to, and to
//! compare two ranges and share what is equal.
//!
//! The kernel does not pass FIDEDUPERANGE on to a FUSE filesystem. Files are named by the numbers
//! that the mount shows, so that they need not be open. A number may have come to name another file
//! since: that does no harm, because only what is equal is shared.

use fs_core::error::{Errno, Error};
use fs_core::units::Ino;
use fs_core::vfs::{Dedupe, Filesystem, Forest};
use serde::{Deserialize, Serialize};

/// Bytes of a range that are compared at one request.
pub const RANGE_BYTES_MAX: u64 = 16 << 20;

/// A question about files, or a range to be shared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Where the blocks of a file are that are no holes, from the block `first` on. Answered by
    /// [`Answer::Places`].
    Places {
        /// The file.
        ino: u64,
        /// The first block.
        first: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// What blocks of a file hash to. Answered by [`Answer::Hashes`].
    Hashes {
        /// The file.
        ino: u64,
        /// Bytes of a block.
        block: u64,
        /// Which blocks, ascending.
        indices: Vec<u64>,
    },
    /// Make the target share what is equal. Answered by [`Answer::Shared`].
    Share {
        /// The file that has the extents, and where in it.
        source: (u64, u64),
        /// The file that gets them, and where in it.
        target: (u64, u64),
        /// How many bytes, [`RANGE_BYTES_MAX`] at most.
        bytes: u64,
    },
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To [`Question::Places`].
    Places {
        /// Bytes of the file.
        size: u64,
        /// Number and place of each.
        blocks: Vec<(u64, Option<[u8; 16]>)>,
        /// With which block to go on.
        next: Option<u64>,
        /// It is in a snapshot, or in a subvolume that refuses changes: it stays as it is.
        stays: bool,
    },
    /// To [`Question::Hashes`]: of each block as far as the file has it.
    Hashes(Vec<Option<[u8; 32]>>),
    /// To [`Question::Share`].
    Shared(Shared),
    /// To any: there is no such file any more.
    Gone,
}

/// What came of a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// So many bytes are equal, and shared as far as they can be.
    pub same: u64,
    /// So many of them had another place before.
    pub shared: u64,
    /// What follows them differs.
    pub differs: bool,
}

impl Question {
    /// Whether it is one to change something.
    pub fn is_change(&self) -> bool {
        matches!(self, Question::Share { .. })
    }
}

/// Answers a question about what a mount shows.
///
/// # Errors
/// One sentence that says why not.
pub fn answer(forest: &Forest, question: &Question) -> Result<Answer, String> {
    let answered = match question {
        Question::Places { ino, first, block } => {
            forest.block_places(Ino(*ino), *first, *block).map(|found| Answer::Places {
                size: found.size,
                blocks: found.blocks.iter().map(|block| (block.index, block.place)).collect(),
                next: found.next,
                stays: forest.never_changes(Ino(*ino)),
            })
        }
        Question::Hashes { ino, block, indices } => {
            forest.block_hashes(Ino(*ino), *block, indices).map(Answer::Hashes)
        }
        Question::Share { source, target, bytes } => {
            share(forest, *source, *target, (*bytes).min(RANGE_BYTES_MAX)).map(Answer::Shared)
        }
    };
    match answered {
        // It is no file any more, or has become shorter.
        Err(Error::Posix(Errno::Stale | Errno::IsDir | Errno::Inval)) => Ok(Answer::Gone),
        other => other.map_err(|error| sentence(&error)),
    }
}

fn share(
    forest: &dyn Filesystem,
    source: (u64, u64),
    target: (u64, u64),
    bytes: u64,
) -> Result<Shared, Error> {
    let mut all = Shared::default();
    while all.same < bytes {
        let at = |(_, from): (u64, u64)| from.saturating_add(all.same);
        let (from, to, left) = (at(source), at(target), bytes - all.same);
        match forest.dedupe_range(Ino(source.0), from, Ino(target.0), to, left) {
            Ok(Dedupe::Same { bytes: 0, .. }) => break,
            Ok(Dedupe::Same { bytes, shared }) => {
                all.same += bytes;
                all.shared += shared;
            }
            Ok(Dedupe::Differs) => {
                all.differs = true;
                break;
            }
            // What is shared is to be told; the rest is asked for again, and fails again.
            Err(_) if all.same > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Why a file's data cannot be shared.
fn sentence(error: &Error) -> String {
    match error {
        Error::Posix(Errno::Perm) => "is immutable; chattr -i lets it be changed".into(),
        Error::Posix(Errno::RoFs) => {
            "is in a snapshot, or in a subvolume that refuses changes (cairn get readonly)".into()
        }
        Error::Posix(Errno::XDev) => "is in another subvolume, and shares nothing with it".into(),
        Error::Posix(Errno::DQuot) => {
            "its subvolume has not enough room left of its limits (cairn subvolume show)".into()
        }
        error => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::engine::{format, FormatOptions, OpenOptions};
    use fs_core::testing::{RamDevice, TestPlatform};
    use fs_core::vfs::{AccessTime, Caller, Volume, WriteFlags};
    use std::sync::Arc;

    fn forest() -> Arc<Forest> {
        let device = RamDevice::new(64 << 20);
        let platform = TestPlatform::new(1).platform;
        let options = FormatOptions::default();
        format(vec![device.device()], platform.clone(), &options).unwrap();
        let (options, times) = (OpenOptions::default(), AccessTime::Relative);
        Forest::new(Volume::open(vec![device.device()], platform, &options, times).unwrap())
    }

    fn file(forest: &Forest, name: &str, content: &[u8]) -> u64 {
        let root = Caller { uid: 0, gid: 0, umask: 0 };
        let made = forest.mknod(forest.root(), name.as_bytes(), 0o100644, 0, &root).unwrap();
        forest.write(made.ino, 0, content, WriteFlags::default()).unwrap();
        made.ino.0
    }

    #[test]
    fn places_hashes_and_sharing_go_together() {
        let forest = forest();
        let content: Vec<u8> = (0..900_000u32).map(|n| (n / 7) as u8).collect();
        let mut changed = content.clone();
        changed[400_000] ^= 1;
        let files =
            [("one", &content), ("other", &changed)].map(|(name, c)| file(&forest, name, c));
        forest.sync().unwrap();
        let ask = |question| answer(&forest, &question).unwrap();
        let block = 128 << 10;
        let places = |ino| match ask(Question::Places { ino, first: 0, block }) {
            Answer::Places { size: 900_000, blocks, next: None, stays: false } => blocks,
            other => panic!("{other:?}"),
        };
        let [one, other] = files.map(places);
        let indices: Vec<u64> = one.iter().map(|(index, _)| *index).collect();
        assert_eq!(indices, (0..7).collect::<Vec<u64>>());
        assert!(one.iter().zip(&other).all(|(one, other)| one.1.is_some() && one != other));
        let hashes = |ino| match ask(Question::Hashes { ino, block, indices: indices.clone() }) {
            Answer::Hashes(hashes) => hashes,
            other => panic!("{other:?}"),
        };
        let hashed = files.map(hashes);
        let equal: Vec<bool> = hashed[0].iter().zip(&hashed[1]).map(|(a, b)| a == b).collect();
        assert_eq!(equal, [true, true, true, false, true, true, true]);
        let share = |at: u64, bytes| {
            let (source, target) = ((files[0], at), (files[1], at));
            ask(Question::Share { source, target, bytes })
        };
        let shared = |same, shared, differs| Answer::Shared(Shared { same, shared, differs });
        assert_eq!(share(0, 3 * block), shared(3 * block, 3 * block, false));
        assert_eq!(share(3 * block, block), shared(0, 0, true));
        let rest = 900_000 - 4 * block;
        assert_eq!(share(4 * block, rest), shared(rest, rest, false));
        assert_eq!(share(4 * block, rest), shared(rest, 0, false));
        assert_eq!(share(4 * block, rest + 1), Answer::Gone);
        let [one, other] = files.map(places);
        let equal: Vec<bool> = one.iter().zip(&other).map(|(one, other)| one == other).collect();
        assert_eq!(equal, [true, true, true, false, true, true, true]);
    }

    #[test]
    fn what_is_gone_is_told_so_and_other_reasons_are_sentences() {
        let forest = forest();
        let one = file(&forest, "one", &[1; 8192]);
        let root = forest.root().0;
        for ino in [root, one + 1000, u64::MAX] {
            let question = Question::Share { source: (one, 0), target: (ino, 0), bytes: 4096 };
            let told = answer(&forest, &question);
            assert!(matches!(&told, Ok(Answer::Gone) | Err(_)), "{ino}: {told:?}");
        }
        forest.base().set_read_only(true).unwrap();
        let question = Question::Share { source: (one, 0), target: (one, 4096), bytes: 4096 };
        assert!(answer(&forest, &question).unwrap_err().contains("read-only"));
        let question = Question::Places { ino: one, first: 0, block: 4096 };
        assert!(answer(&forest, &question).is_ok());
    }
}
