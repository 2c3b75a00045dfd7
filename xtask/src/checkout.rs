//! Where things are: the checkout, what was built in it, and what is kept outside it.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Root of the checkout that this xtask was built from.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the checkout")
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A directory below the target directory for what xtask leaves behind: logs, results, pages.
///
/// # Errors
/// When it cannot be made.
pub fn artefacts(name: &str) -> Result<PathBuf> {
    let dir = target().join("xtask").join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// A directory outside the checkout for what is expensive to make and the same for every
/// checkout, such as test suites built from crates.
///
/// # Errors
/// When it cannot be made, or no home is known.
pub fn cache() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: nowhere to keep the test suites")?;
    let dir = base.join("cairn-xtask");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The commands of cairn with the names they are installed under. Cargo has no dots in the names of
/// what it builds.
pub const COMMANDS: &[(&str, &str)] = &[
    ("cairn", "cairn"),
    ("mkfs.cairn", "mkfs-cairn"),
    ("fsck.cairn", "fsck-cairn"),
    ("mount.cairn", "mount-cairn"),
];

/// What Cargo built for release under the name `built`.
pub fn release(built: &str) -> PathBuf {
    target().join("release").join(built)
}

/// A command of cairn under the name it is installed with, as [`stage`] put it there.
pub fn binary(name: &str) -> PathBuf {
    target().join("xtask").join("bin").join(name)
}

/// Links what was built for release to the names it is installed under.
///
/// # Errors
/// When a link cannot be made.
pub fn stage() -> Result<()> {
    let dir = artefacts("bin")?;
    for (name, built) in COMMANDS {
        let link = dir.join(name);
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link)?;
        }
        std::os::unix::fs::symlink(release(built), &link)
            .with_context(|| format!("cannot link {}", link.display()))?;
    }
    Ok(())
}
