//! `cargo xtask install`: binaries, helper links, man pages, completions, the setting of the kernel
//! that is made at each boot by systemd-tmpfiles(8), and the rules by which udev names devices.
//!
//! The administration commands and the mount helpers go to `sbin`. mount(8) and fsck(8) look for
//! helpers in `/sbin` only, so with another prefix links are put there too.

use crate::{checkout, need, pages};
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

/// Names by which mount(8) asks for the mount helper, besides its own.
const HELPERS: &[&str] = &["mount.fuse.cairn", "mount.fuseblk.cairn"];

/// What mount(8), fsck(8) and mkfs(8) look for in `/sbin`.
const FOUND_IN_SBIN: &[&str] =
    &["mount.cairn", "mount.fuse.cairn", "mount.fuseblk.cairn", "fsck.cairn", "mkfs.cairn"];

/// Builds for release and installs below `prefix`, all paths put behind `destdir`.
///
/// # Errors
/// When the build fails or a file cannot be written.
pub fn run(prefix: &Path, destdir: Option<&Path>) -> Result<()> {
    need::release_build()?;
    let place = Place { destdir: destdir.map(Path::to_owned) };
    let bin = prefix.join("bin");
    let sbin = prefix.join("sbin");
    for (name, built) in checkout::COMMANDS {
        let dir = if *name == "cairn" { &bin } else { &sbin };
        place.copy(&checkout::release(built), &dir.join(name), 0o755)?;
    }
    for name in HELPERS {
        place.link(Path::new("mount.cairn"), &sbin.join(name))?;
    }
    if sbin != Path::new("/sbin") && sbin != Path::new("/usr/sbin") {
        for name in FOUND_IN_SBIN {
            place.link(&sbin.join(name), &Path::new("/sbin").join(name))?;
        }
    }
    for page in pages::generate()? {
        place.copy(&page.from, &prefix.join(page.to), 0o644)?;
    }
    let settings = checkout::root().join("tools/etc/cairn-tmpfiles.conf");
    place.copy(&settings, &prefix.join("lib/tmpfiles.d/cairn.conf"), 0o644)?;
    let rules = fs::read_to_string(checkout::root().join("tools/etc/cairn-udev.rules"))?;
    let rules = rules.replace("@BIN@", &bin.display().to_string());
    place.write(&rules, &prefix.join("lib/udev/rules.d/66-cairn.rules"))?;
    Ok(())
}

/// Where files really go.
struct Place {
    destdir: Option<PathBuf>,
}

impl Place {
    /// The path with `destdir` put before it.
    fn real(&self, path: &Path) -> PathBuf {
        match &self.destdir {
            Some(destdir) => destdir.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_owned(),
        }
    }

    fn ready(&self, path: &Path) -> Result<PathBuf> {
        let real = self.real(path);
        let parent = real.parent().context("a path with a directory")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        if fs::symlink_metadata(&real).is_ok() {
            // Not written over: a program that runs keeps its file.
            fs::remove_file(&real).with_context(|| format!("cannot replace {}", real.display()))?;
        }
        println!("{}", real.display());
        Ok(real)
    }

    fn copy(&self, from: &Path, to: &Path, mode: u32) -> Result<()> {
        let real = self.ready(to)?;
        fs::copy(from, &real).with_context(|| format!("cannot install {}", from.display()))?;
        fs::set_permissions(&real, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    fn write(&self, text: &str, to: &Path) -> Result<()> {
        let real = self.ready(to)?;
        fs::write(&real, text).with_context(|| format!("cannot write {}", real.display()))
    }

    fn link(&self, target: &Path, link: &Path) -> Result<()> {
        let real = self.ready(link)?;
        symlink(target, &real).with_context(|| format!("cannot make {}", real.display()))
    }
}
