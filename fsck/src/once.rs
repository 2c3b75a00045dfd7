//! A pool is looked at once at boot, by whichever of its devices it is named.
//!
//! fsck(8) runs the check for each line of fstab, and several may name devices or subvolumes of one
//! pool. Who looks takes a lock that has the pool's id as its name, and leaves behind what the
//! labels and superblocks were, and on which devices; who comes within a minute and finds them the
//! same need not look again. The file is in a directory that only root writes to and that is empty
//! after a boot. Where it cannot be had, as by an ordinary user, the pool is looked at every time.

use cairn_host::parse::format_uuid;
use rustix::fs::{flock, FlockOperation};
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

const DIRECTORY: &str = "/run/cairn";

/// How long it is not looked at again what has not changed.
const FRESH: Duration = Duration::from_secs(60);

/// The right to look at a pool.
pub(crate) struct Turn {
    file: Option<File>,
    state: String,
}

impl Turn {
    /// Waits until nobody else looks at the pool. `state` is told from another by any change.
    pub(crate) fn take(pool: &[u8; 16], state: String) -> Turn {
        Turn::take_in(Path::new(DIRECTORY), pool, state)
    }

    fn take_in(directory: &Path, pool: &[u8; 16], state: String) -> Turn {
        let open = || {
            fs::create_dir_all(directory).ok()?;
            let path = directory.join(format!("fsck-{}", format_uuid(pool)));
            let options = &mut File::options();
            let file = options.read(true).write(true).create(true).truncate(false).open(path);
            let file = file.ok()?;
            flock(&file, FlockOperation::LockExclusive).ok()?;
            Some(file)
        };
        Turn { file: open(), state }
    }

    /// Whether the pool was found well a moment ago, as it is now.
    pub(crate) fn was_taken(&mut self) -> bool {
        let Some(file) = &mut self.file else { return false };
        let written = file.metadata().and_then(|data| data.modified());
        let is_fresh = written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < FRESH));
        let mut found = String::new();
        let read = file.take(self.state.len() as u64 + 1).read_to_string(&mut found);
        is_fresh && read.is_ok() && found == self.state
    }

    /// The pool was found well.
    pub(crate) fn found_well(mut self) {
        if let Some(file) = &mut self.file {
            // Whoever cannot read this looks again.
            let _ = file
                .rewind()
                .and_then(|()| file.set_len(0))
                .and_then(|()| file.write_all(self.state.as_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_not_looked_at_again_unless_it_has_changed_or_was_not_well() {
        let dir = tempfile::tempdir().unwrap();
        let turn = |pool: u8, state: &str| Turn::take_in(dir.path(), &[pool; 16], state.into());
        assert!(!turn(1, "a").was_taken());
        assert!(!turn(1, "a").was_taken(), "nobody said that it is well");
        turn(1, "state").found_well();
        assert!(turn(1, "state").was_taken());
        assert!(!turn(1, "stat").was_taken());
        assert!(!turn(1, "state2").was_taken());
        assert!(!turn(2, "state").was_taken());
        turn(1, "b").found_well();
        assert!(turn(1, "b").was_taken());
        let old = std::time::SystemTime::now() - FRESH;
        let path = dir.path().join(format!("fsck-{}", format_uuid(&[1; 16])));
        File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        assert!(!turn(1, "b").was_taken());
    }

    #[test]
    fn who_comes_second_waits_for_who_looks() {
        let dir = tempfile::tempdir().unwrap();
        let first = Turn::take_in(dir.path(), &[1; 16], "a".into());
        let place = dir.path().to_path_buf();
        let second =
            std::thread::spawn(move || Turn::take_in(&place, &[1; 16], "a".into()).was_taken());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished());
        first.found_well();
        assert!(second.join().unwrap());
    }

    #[test]
    fn without_a_place_for_the_lock_every_look_is_taken() {
        let place = Path::new("/proc/no/such");
        let mut turn = Turn::take_in(place, &[1; 16], "a".into());
        assert!(!turn.was_taken());
        turn.found_well();
    }
}
