//! Manual pages and completions, written by the commands themselves.

use crate::checkout;
use crate::run::Cmd;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A file to install, and where below the prefix.
pub struct Page {
    /// The file.
    pub from: PathBuf,
    /// Its place below the prefix.
    pub to: PathBuf,
}

/// Commands that have completions; those of `mount.cairn` would only be in the way.
const COMPLETED: &[&str] = &["cairn", "mkfs.cairn", "fsck.cairn"];

/// Generates all pages below `target/dist`. The commands must have been built for release.
///
/// # Errors
/// When a command cannot write them.
pub fn generate() -> Result<Vec<Page>> {
    let dist = checkout::target().join("dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).context("cannot remove what was generated before")?;
    }
    fs::create_dir_all(&dist)?;
    let mut pages = manual(&dist.join("man"))?;
    pages.extend(bash_and_fish(&dist)?);
    pages.extend(zsh(&dist)?);
    Ok(pages)
}

/// What the commands write, and what is written by hand in `docs/man`.
fn manual(dir: &Path) -> Result<Vec<Page>> {
    Cmd::new(checkout::binary("cairn")).arg("man").arg(dir).quiet()?;
    let mut pages = Vec::new();
    for source in [dir.to_owned(), checkout::root().join("docs/man")] {
        let Ok(entries) = fs::read_dir(source) else { continue };
        for entry in entries {
            let from = entry?.path();
            let section = from.extension().unwrap_or_default().to_string_lossy().into_owned();
            let name = from.file_name().unwrap_or_default();
            if section.len() == 1 && section.starts_with(|c: char| c.is_ascii_digit()) {
                let to = Path::new("share/man").join(format!("man{section}")).join(name);
                pages.push(Page { from, to });
            }
        }
    }
    Ok(pages)
}

/// These shells look for a file by the command's name; one file has the completions of all.
fn bash_and_fish(dist: &Path) -> Result<Vec<Page>> {
    let mut pages = Vec::new();
    for (shell, dir, suffix) in [
        ("bash", "share/bash-completion/completions", ""),
        ("fish", "share/fish/vendor_completions.d", ".fish"),
    ] {
        let from = dist.join(format!("cairn.{shell}"));
        fs::write(&from, completions(shell)?)?;
        for command in COMPLETED {
            let to = Path::new(dir).join(format!("{command}{suffix}"));
            pages.push(Page { from: from.clone(), to });
        }
    }
    Ok(pages)
}

/// This shell wants a file for each command, and reads in its first line what it is for.
fn zsh(dist: &Path) -> Result<Vec<Page>> {
    let mut pages = Vec::new();
    for part in completions("zsh")?.split("#compdef ").skip(1) {
        let command = part.split_whitespace().next().unwrap_or_default();
        let from = dist.join(format!("_{command}"));
        fs::write(&from, format!("#compdef {part}"))?;
        let to = Path::new("share/zsh/site-functions").join(format!("_{command}"));
        pages.push(Page { from, to });
    }
    Ok(pages)
}

fn completions(shell: &str) -> Result<String> {
    Cmd::new(checkout::binary("cairn")).args(["completions", shell]).text()
}
