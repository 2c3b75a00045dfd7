//! `fsx`: random calls on one file, each read compared with what was written.

use super::Suite;
use crate::need;
use crate::run::{tail, Cmd};
use crate::steps::Outcome;
use crate::volume::Volume;
use anyhow::{bail, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

const VERSION: &str = "0.3.2";

/// A mix of calls, and a file size at which it is interesting.
struct Mix {
    name: &'static str,
    /// Its calls take so long that one of this many does.
    share: u32,
    /// As `share`, in a long run.
    long_share: u32,
    configuration: &'static str,
}

const MIXES: &[Mix] = &[
    Mix {
        name: "calls",
        share: 1,
        long_share: 1,
        configuration: "flen = 1048576\n[opsize]\nmin = 1\nmax = 65536\n[weights]\n\
            close_open = 1\ninvalidate = 0\nmapread = 0\nmapwrite = 0\nread = 10\nwrite = 10\n\
            truncate = 5\nfsync = 0.2\nfdatasync = 0.2\nposix_fallocate = 5\npunch_hole = 5\n\
            sendfile = 2\nposix_fadvise = 1\ncopy_file_range = 5\n",
    },
    Mix {
        name: "maps",
        share: 1,
        // Every write to a mapping is waited for; and fsx 0.3.2 leaves each mapping it has read
        // from behind, of which a process may have 65,530.
        long_share: 8,
        configuration: "flen = 1048576\n[opsize]\nmin = 1\nmax = 65536\n[weights]\n\
            close_open = 1\ninvalidate = 1\nmapread = 10\nmapwrite = 10\nread = 5\nwrite = 5\n\
            truncate = 5\nfsync = 0.2\nfdatasync = 0.2\nposix_fallocate = 3\npunch_hole = 5\n\
            sendfile = 2\nposix_fadvise = 2\ncopy_file_range = 3\n",
    },
    Mix {
        name: "tiny",
        share: 1,
        // As above: the more mappings there are, the longer each next one takes.
        long_share: 8,
        // Below the size at which files are stored inline, and a little above it.
        configuration: "flen = 6000\n[opsize]\nmin = 1\nmax = 3000\n[weights]\n\
            close_open = 2\ninvalidate = 0\nmapread = 2\nmapwrite = 2\nread = 10\nwrite = 10\n\
            truncate = 10\nfsync = 0.5\nfdatasync = 0.2\nposix_fallocate = 2\npunch_hole = 3\n\
            sendfile = 1\nposix_fadvise = 1\ncopy_file_range = 3\n",
    },
    Mix {
        name: "aligned",
        share: 8,
        long_share: 8,
        // Without posix_fallocate, whose offsets fsx does not align and whose lengths it cuts to
        // zero.
        configuration: "flen = 8388608\n[opsize]\nmin = 4096\nmax = 1048576\nalign = 4096\n\
            [weights]\n\
            close_open = 1\ninvalidate = 0\nmapread = 2\nmapwrite = 2\nread = 10\nwrite = 10\n\
            truncate = 5\nfsync = 0.5\nfdatasync = 0.2\nposix_fallocate = 0\npunch_hole = 8\n\
            sendfile = 1\nposix_fadvise = 1\ncopy_file_range = 10\n",
    },
];

/// Runs every mix with several seeds, then looks at the files again after a remount.
///
/// # Errors
/// When a read differs; the command that shows it again is in the error.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let program = need::crate_program("fsx", VERSION)?;
    let (ops, seeds) = if suite.long { (1_000_000, 1) } else { (20_000, 5) };
    let mut volume = suite.volume()?;
    let (mut runs, mut total) = (0, 0);
    for seed in 1..=seeds {
        for mix in MIXES {
            let ops = ops / if suite.long { mix.long_share } else { mix.share };
            exercise(suite, &program, &volume, mix, seed, ops)?;
            runs += 1;
            total += ops;
        }
    }
    compare_after_remount(&mut volume)?;
    volume.finish()?;
    Ok(Outcome::Passed(format!("{runs} runs, {total} calls in all")))
}

fn exercise(
    suite: &Suite<'_>,
    program: &Path,
    volume: &Volume<'_>,
    mix: &Mix,
    seed: u32,
    ops: u32,
) -> Result<()> {
    let artefacts = suite.logs.join(format!("fsx-{}", mix.name));
    fs::create_dir_all(&artefacts)?;
    let config = artefacts.join("fsx.toml");
    fs::write(&config, mix.configuration)?;
    let file = volume.dir().join(format!("{}-{seed}", mix.name));
    let cmd = Cmd::new(program)
        .arg("-f")
        .arg(&config)
        .args(["-N", &ops.to_string(), "-S", &seed.to_string(), "-P"])
        .args([&artefacts, &file])
        .limit(Duration::from_secs(if suite.long { 7200 } else { 300 }));
    let shown = cmd.shown().to_owned();
    let out = cmd.log_to(&suite.log(&format!("fsx-{}-{seed}", mix.name)))?;
    if out.code != Some(0) {
        bail!("{shown}\n{}", tail(&out.stdout, 25));
    }
    Ok(())
}

/// What was read through the cache must be what is stored.
fn compare_after_remount(volume: &mut Volume<'_>) -> Result<()> {
    let before = contents(volume.dir())?;
    volume.remount()?;
    let after = contents(volume.dir())?;
    for (name, bytes) in &before {
        if after.get(name) != Some(bytes) {
            bail!("{name} has other content after unmounting and mounting");
        }
    }
    Ok(())
}

fn contents(dir: &Path) -> Result<std::collections::BTreeMap<String, Vec<u8>>> {
    fs::read_dir(dir)?
        .map(|entry| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_file = entry.file_type()?.is_file();
            Ok((name, if is_file { fs::read(entry.path())? } else { Vec::new() }))
        })
        .collect()
}
