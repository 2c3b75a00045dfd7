//! What a task needs of the machine, and how to get it.
//!
//! As root on a Debian system missing packages are installed; elsewhere the message names what is
//! missing and how to get it.

use crate::checkout;
use crate::run::{exists, Cmd};
use anyhow::{bail, Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// A program and the Debian package it comes in.
pub type Tool = (&'static str, &'static str);

/// What mounting through FUSE needs.
pub const MOUNT: &[Tool] =
    &[("fusermount3", "fuse3"), ("losetup", "mount"), ("mkfs.ext4", "e2fsprogs")];

/// What building needs beyond Rust: crates compile C, one of them through a makefile.
pub const BUILD: &[Tool] = &[("cc", "gcc"), ("make", "make")];

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether filesystems can be mounted here, or why not.
///
/// # Errors
/// The reason, as a sentence.
pub fn can_mount() -> Result<()> {
    if !is_root() {
        bail!("mounting test images takes root: run the task as root");
    }
    if !std::path::Path::new("/dev/fuse").exists() {
        bail!("there is no /dev/fuse: load the kernel's fuse module");
    }
    Ok(())
}

/// Makes sure that the tools are there.
///
/// # Errors
/// When one is missing and cannot be installed.
pub fn tools(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|(program, _)| !exists(program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    if !is_root() || !exists("apt-get") {
        let programs: Vec<&str> = missing.iter().map(|(program, _)| *program).collect();
        bail!(
            "missing: {}. On Debian or Ubuntu: sudo apt-get install {}",
            programs.join(", "),
            packages.join(" ")
        );
    }
    install_packages(&packages)
}

/// Installs a Debian package that has no program to look for.
///
/// # Errors
/// When it cannot be installed.
pub fn package(name: &str) -> Result<()> {
    let out = Cmd::new("dpkg-query").args(["-W", "-f", "${Status}", name]).output()?;
    if out.code == Some(0) && out.stdout.contains("ok installed") {
        return Ok(());
    }
    install_packages(&[name])
}

fn install_packages(packages: &[&str]) -> Result<()> {
    println!("    installing {}", packages.join(" "));
    let apt = |args: &[&str]| {
        Cmd::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=300"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .limit(Duration::from_secs(600))
    };
    let install = || {
        let args = ["install", "-y", "--no-install-recommends"];
        let args: Vec<&str> = args.iter().chain(packages).copied().collect();
        apt(&args).quiet()
    };
    // The package lists of a fresh machine are missing or old; those of a used one often do.
    if install().is_ok() {
        return Ok(());
    }
    apt(&["update"]).quiet().context("the package lists cannot be updated")?;
    install().with_context(|| format!("cannot install {}", packages.join(" ")))
}

/// A program built from a crate, kept outside the checkout; built when it is not there yet.
///
/// # Errors
/// When it cannot be built.
pub fn crate_program(name: &str, version: &str) -> Result<PathBuf> {
    let root = checkout::cache()?.join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    if program.is_file() {
        return Ok(program);
    }
    println!("    building {name} {version} (kept in {})", root.display());
    let log = checkout::artefacts("logs")?.join(format!("install-{name}.log"));
    // Next to the sources of other crates, so that a second build of the same version is quick.
    let out = Cmd::cargo(&["install", "--locked", "--root"])
        .arg(&root)
        .args([name, "--version", version])
        .env("CARGO_TARGET_DIR", checkout::cache()?.join("build"))
        .dir(&checkout::cache()?)
        .log_to(&log)?;
    if out.code != Some(0) {
        bail!("{name} {version} cannot be built: {}", crate::run::tail(&out.stdout, 20));
    }
    Ok(program)
}

/// Builds cairn's commands for release.
///
/// # Errors
/// When they do not compile.
pub fn release_build() -> Result<()> {
    tools(BUILD)?;
    Cmd::cargo(&["build", "--release", "--workspace", "--exclude", "xtask"]).run()?;
    checkout::stage()
}
