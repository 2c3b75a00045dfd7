//! Listings of directories made before they are asked for.
//!
//! A process that lists a directory asks for one part after the other, each as large as its buffer.
//! While the kernel hands a part to the process, the daemon has nothing to do; when the next
//! request arrives, the kernel waits. So who has answered such a request makes the next part, which
//! is then copied only.
//!
//! A part that was made ahead is given only for the request that it was made for (directory,
//! position, room), and only if the directory is what it was: its change counter and its change
//! time are looked at before the part is made and when it is given. Each change of its names counts
//! up under the lock of the directory, so an entry that is not there any more is never shown. What
//! stands in a listing without being in the directory (subvolumes within another) is not counted,
//! and such parts are not kept.
//!
//! Who comes while the part that is wanted is being made waits for it, a little: to make it once
//! more would take as long. Everybody else finds the place occupied and goes on without.

use crate::reply::Listed;
use fs_core::platform::Timestamp;
use fs_core::units::Ino;
use fs_core::vfs::Attr;
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Directories that are listed at the same time and have their parts made ahead.
const PLACES: usize = 4;

/// Larger parts are not made: those who ask for that much at once ask seldom.
const BYTES_MAX: usize = 256 << 10;

/// How long to wait for a part that is being made. It takes a tenth of a millisecond, if it needs
/// nothing from a device.
const PATIENCE: Duration = Duration::from_millis(2);

/// What a part was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The directory.
    pub dir: Ino,
    /// The cookie after which it begins.
    pub cookie: u64,
    /// Bytes it may take.
    pub room: usize,
}

impl Part {
    /// A number that another part is not likely to have.
    fn mark(self) -> u64 {
        self.dir.0.rotate_left(32) ^ self.cookie
    }
}

/// The state of a directory. Two that are equal have the same entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    version: u64,
    ctime: Timestamp,
}

impl State {
    fn of(attr: &Attr) -> State {
        State { version: attr.version, ctime: attr.ctime }
    }
}

#[derive(Default)]
struct Made {
    /// Taken when it has been given: the next request is for another.
    part: Option<(Part, State, Listed)>,
    /// Kept, to be used again.
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Place {
    /// The mark of what is being made, or was last.
    making: AtomicU64,
    /// Leaf lock; who makes a part holds it.
    made: Mutex<Made>,
}

impl Place {
    fn made(&self, part: Part) -> Option<MutexGuard<'_, Made>> {
        self.made.try_lock().or_else(|| {
            let is_coming = self.making.load(Ordering::Relaxed) == part.mark();
            is_coming.then(|| self.made.try_lock_for(PATIENCE)).flatten()
        })
    }
}

/// Parts that were made ahead.
#[derive(Default)]
pub(crate) struct Ahead {
    places: [Place; PLACES],
}

impl Ahead {
    fn place(&self, dir: Ino) -> &Place {
        &self.places[dir.0 as usize % PLACES]
    }

    /// Copies a part to `body`, if it was made. `attr` tells of the directory as it is now.
    pub fn take(
        &self,
        part: Part,
        body: &mut [u8],
        attr: impl FnOnce() -> Option<Attr>,
    ) -> Option<Listed> {
        let mut made = self.place(part.dir).made(part)?;
        made.part.as_ref().filter(|(made_for, ..)| *made_for == part)?;
        let (_, state, listed) = made.part.take()?;
        if State::of(&attr()?) != state {
            return None;
        }
        body.get_mut(..listed.bytes)?.copy_from_slice(&made.bytes[..listed.bytes]);
        Some(listed)
    }

    /// Makes a part, with `list`, which says whether it is one to be kept.
    pub fn make(
        &self,
        part: Part,
        attr: impl FnOnce() -> Option<Attr>,
        list: impl FnOnce(&mut [u8]) -> Option<Listed>,
    ) {
        if part.room > BYTES_MAX {
            return;
        }
        let place = self.place(part.dir);
        let Some(mut made) = place.made.try_lock() else { return };
        place.making.store(part.mark(), Ordering::Relaxed);
        let Made { part: kept, bytes } = &mut *made;
        *kept = None;
        if bytes.len() < part.room {
            *bytes = vec![0; part.room];
        }
        let Some(before) = attr() else { return };
        *kept = list(&mut bytes[..part.room]).map(|listed| (part, State::of(&before), listed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: Part = Part { dir: Ino(7), cookie: 40, room: 100 };
    const FILLED: Listed = Listed { bytes: 3, last: 43, is_full: true };

    fn attr(version: u64) -> Option<Attr> {
        let time = Timestamp::default();
        Some(Attr {
            ino: PART.dir,
            generation: 1,
            mode: 0o40755,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            flags: 0,
            project: 0,
            version,
        })
    }

    fn made(version: u64) -> Ahead {
        let ahead = Ahead::default();
        ahead.make(
            PART,
            || attr(version),
            |body| {
                assert_eq!(body.len(), PART.room);
                body[..3].copy_from_slice(b"abc");
                Some(FILLED)
            },
        );
        ahead
    }

    #[test]
    fn a_part_is_given_once_and_only_for_what_it_was_made_for() {
        let ahead = made(5);
        let mut body = [0; 100];
        for other in [
            Part { dir: Ino(8), ..PART },
            Part { dir: Ino(PART.dir.0 + PLACES as u64), ..PART },
            Part { cookie: 41, ..PART },
            Part { room: 99, ..PART },
        ] {
            assert_eq!(ahead.take(other, &mut body, || attr(5)), None);
        }
        assert_eq!(ahead.take(PART, &mut body, || attr(5)), Some(FILLED));
        assert_eq!(&body[..4], b"abc\0");
        assert_eq!(ahead.take(PART, &mut body, || attr(5)), None);
    }

    #[test]
    fn a_part_of_a_directory_that_changed_is_not_given() {
        let mut body = [0; 100];
        assert_eq!(made(5).take(PART, &mut body, || attr(6)), None);
        assert_eq!(made(5).take(PART, &mut body, || None), None);
        let ahead = made(5);
        let later = Timestamp { secs: 1, nanos: 0 };
        let changed = || attr(5).map(|attr| Attr { ctime: later, ..attr });
        assert_eq!(ahead.take(PART, &mut body, changed), None);
        assert_eq!(body, [0; 100]);
    }

    #[test]
    fn nothing_is_made_of_what_is_gone_or_too_large() {
        let mut body = vec![0; BYTES_MAX + 1];
        let ahead = Ahead::default();
        ahead.make(PART, || None, |_| panic!("there is no directory"));
        let large = Part { room: BYTES_MAX + 1, ..PART };
        ahead.make(large, || attr(1), |_| panic!("too large"));
        assert_eq!(ahead.take(large, &mut body, || attr(1)), None);
    }
}
