//! Building the module.
//!
//! Inside the build root there is no network, and its cargo must not see the rest of the workspace,
//! whose crates need a newer compiler. So `target/kmod` holds a small workspace of its own with
//! nothing but `fs-core` (a link to it), a lock file with the same versions, vendored sources, and
//! a copy of `fs-kmod` for the kernel's build system to fill with objects.

use super::setup::BuildRoot;
use super::{
    capture, checkout, gates, out_dir, program, remove_tree, say, write_if_changed, Failure,
};
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};

/// Compiles the core with the kernel's compiler, but for user space: shows within seconds whether
/// the compiler takes it.
///
/// # Errors
/// What the compiler said.
pub fn check(root: &BuildRoot) -> Result<String, Failure> {
    let stage = Stage::make().map_err(Failure::Failed)?;
    say("checking fs-core with the kernel's compiler");
    let mut cargo = root.command("env");
    cargo.arg(format!("CARGO_TARGET_DIR={}", out_dir().join("check").display()));
    cargo.args(["cargo", "check", "--quiet", "--offline", "--package", "fs-core", "--lib"]);
    cargo.args(["--no-default-features", "--features", "kernel"]);
    cargo.arg("--manifest-path").arg(&stage.manifest).arg("--config").arg(&stage.config);
    let said = capture(&mut cargo).map_err(Failure::Failed)?;
    print!("{said}");
    Ok("fs-core compiles with the kernel's compiler".into())
}

/// Builds `cairn.ko` and checks it.
///
/// # Errors
/// What the compiler said, or what [`gates`] found.
pub fn module(root: &BuildRoot) -> Result<PathBuf, Failure> {
    build(root).map_err(Failure::Failed)
}

fn build(root: &BuildRoot) -> Result<PathBuf, String> {
    let stage = Stage::make()?;
    let dir = out_dir().join("module");
    forget_another_kernels_objects(&dir, &root.release)?;
    copy_sources(&checkout().join("fs-kmod"), &dir)?;
    say("building cairn.ko (a minute or two the first time)");
    let mut make = root.command("make");
    make.arg("-C").arg(root.headers());
    make.arg(format!("M={}", dir.display()));
    make.arg(format!("CAIRN_CORE_MANIFEST={}", stage.manifest.display()));
    make.arg(format!("CAIRN_CARGO_CONFIG={}", stage.config.display()));
    let said = capture(make.arg("modules"))?;
    let module = dir.join("cairn.ko");
    gates::pass(root, &module, &said).inspect_err(|_| {
        // What the linker complains of, it says only when it links: make it say so again.
        for object in ["cairn.ko", "cairn.o"] {
            let _ = fs::remove_file(dir.join(object));
        }
    })?;
    Ok(module)
}

/// Objects for another kernel are of no use, and make would not notice.
fn forget_another_kernels_objects(dir: &Path, release: &str) -> Result<(), String> {
    let mark = dir.join(".release");
    if fs::read_to_string(&mark).is_ok_and(|built| built == release) {
        return Ok(());
    }
    remove_tree(dir)?;
    write_if_changed(&mark, release.as_bytes())
}

/// Copies a directory tree; files that are the same stay untouched, so that make sees no change.
fn copy_sources(from: &Path, to: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", from.display());
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let target = to.join(entry.file_name());
        if entry.file_type().map_err(failed)?.is_dir() {
            copy_sources(&entry.path(), &target)?;
            continue;
        }
        write_if_changed(&target, &fs::read(entry.path()).map_err(failed)?)?;
        let mode = entry.metadata().map_err(failed)?.permissions().mode();
        fs::set_permissions(&target, fs::Permissions::from_mode(mode)).map_err(failed)?;
    }
    Ok(())
}

/// A workspace with nothing but the core, and vendored sources for it.
struct Stage {
    manifest: PathBuf,
    config: PathBuf,
}

impl Stage {
    fn make() -> Result<Stage, String> {
        let dir = out_dir().join("stage");
        let manifest = dir.join("Cargo.toml");
        let config = dir.join("vendor.toml");
        let read = |name: &str| {
            let path = checkout().join(name);
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let (workspace, lock) = (read("Cargo.toml")?, read("Cargo.lock")?);
        let core = read("fs-core/Cargo.toml")?;
        let made_from = format!("{workspace}\n{lock}\n{core}");
        let mark = dir.join("made-from");
        if fs::read_to_string(&mark).is_ok_and(|old| old == made_from) {
            return Ok(Stage { manifest, config });
        }
        say("vendoring the sources that fs-core depends on");
        remove_tree(&dir)?;
        write_if_changed(&manifest, only_the_core(&workspace)?.as_bytes())?;
        write_if_changed(&dir.join("Cargo.lock"), lock.as_bytes())?;
        symlink(checkout().join("fs-core"), dir.join("fs-core"))
            .map_err(|error| format!("{}: {error}", dir.display()))?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut vendor =
            program(&cargo.to_string_lossy(), ["vendor", "--quiet", "--versioned-dirs"]);
        vendor.current_dir(&dir).arg(dir.join("vendor"));
        capture(&mut vendor)?;
        let sources = format!(
            "[source.crates-io]\nreplace-with = \"vendored\"\n\n\
             [source.vendored]\ndirectory = {:?}\n",
            dir.join("vendor")
        );
        write_if_changed(&config, sources.as_bytes())?;
        write_if_changed(&mark, made_from.as_bytes())?;
        Ok(Stage { manifest, config })
    }
}

/// The workspace's manifest with the core as its only member.
fn only_the_core(workspace: &str) -> Result<String, String> {
    let (before, after) = workspace
        .split_once("members = [")
        .and_then(|(before, rest)| Some((before, rest.split_once(']')?.1)))
        .ok_or("Cargo.toml lists no members")?;
    let rest: String = after
        .lines()
        .filter(|line| !line.starts_with("exclude =") && !line.starts_with("default-members ="))
        .map(|line| format!("{line}\n"))
        .collect();
    Ok(format!("{before}members = [\"fs-core\"]{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_staged_workspace_has_one_member_and_keeps_the_rest() {
        let workspace = "[workspace]\nresolver = \"3\"\nmembers = [\n \"a\",\n \"b\",\n]\n\
                         exclude = [\"c\"]\n\n[profile.release]\ndebug = 1\n";
        assert_eq!(
            only_the_core(workspace).unwrap(),
            "[workspace]\nresolver = \"3\"\nmembers = [\"fs-core\"]\n\n\
             [profile.release]\ndebug = 1\n"
        );
        assert!(only_the_core("[package]").is_err());
    }
}
