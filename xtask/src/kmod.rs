//! The kernel module: set-up, build, and a try in a virtual machine.
//!
//! | command | does |
//! | --- | --- |
//! | `setup` | makes the build root and fetches the kernel, once |
//! | `check185` | compiles `fs-core` with the kernel's compiler, quickly |
//! | `build` | builds `cairn.ko` and checks what came out |
//! | `smoke` | loads it in a virtual machine, where it tests itself |
//!
//! Each command does what the ones above it do first (`build` does not need `check185`). What is
//! set up stays in a cache directory, see `docs/kernel-module.md`; what is built is in
//! `target/kmod`.

mod build;
mod gates;
mod setup;
mod vm;

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How to call it.
pub const USAGE: &str = "cargo xtask kmod setup|check185|build|smoke";

/// Set to 1 to be content with a message where the module cannot be built.
const OPTIONAL: &str = "CAIRN_KMOD_OPTIONAL";

/// Why a command did not do its work.
#[derive(Debug)]
pub enum Failure {
    /// This machine does not let the module be built: not Debian, not root, no package mirror.
    Unavailable(String),
    /// The module or its test is at fault.
    Failed(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Unavailable(why) => {
                write!(f, "{why}\n({OPTIONAL}=1 skips the kernel module where it can't be built)")
            }
            Failure::Failed(why) => f.write_str(why),
        }
    }
}

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All done; a line that says what.
    Done(String),
    /// Not possible here, which the caller has allowed; why.
    Skipped(String),
}

/// Runs the command that `args` names.
///
/// # Errors
/// A message for the person at the terminal.
pub fn main(args: &[String]) -> Result<(), String> {
    let [command] = args else { return Err(format!("usage: {USAGE}")) };
    match perform(command)? {
        Outcome::Done(what) => say(&what),
        Outcome::Skipped(why) => say(&format!("skipped: {why}")),
    }
    Ok(())
}

/// Builds the module and lets it test itself in a virtual machine: the step of CI.
///
/// # Errors
/// A message that says what is wrong.
pub fn smoke() -> Result<Outcome, String> {
    perform("smoke")
}

fn perform(command: &str) -> Result<Outcome, String> {
    let result = match command {
        "setup" => setup::ready().map(|root| format!("ready to build for {}", root.release)),
        "check185" => setup::ready().and_then(|root| build::check(&root)),
        "build" => setup::ready()
            .and_then(|root| build::module(&root))
            .map(|module| format!("built {}", module.display())),
        "smoke" => setup::ready()
            .and_then(|root| Ok((build::module(&root)?, root)))
            .and_then(|(module, root)| vm::selftest(&root, &module)),
        _ => return Err(format!("usage: {USAGE}")),
    };
    match result {
        Ok(what) => Ok(Outcome::Done(what)),
        Err(Failure::Unavailable(why)) if is_optional() => Ok(Outcome::Skipped(why)),
        Err(failure) => Err(failure.to_string()),
    }
}

fn is_optional() -> bool {
    std::env::var_os(OPTIONAL).is_some_and(|value| value == "1")
}

fn say(what: &str) {
    println!("kmod: {what}");
}

/// The checkout that this program was built from.
fn checkout() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Where everything of the module is built.
fn out_dir() -> PathBuf {
    checkout().join("target/kmod")
}

/// The end of a long text.
fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a program with both outputs in one string; an error carries the end of them.
fn capture(command: &mut Command) -> Result<String, String> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{shown} could not be started: {error}"))?;
    let text = [output.stdout, output.stderr]
        .iter()
        .map(|bytes| String::from_utf8_lossy(bytes))
        .collect::<String>();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{shown} failed ({}):\n{}", output.status, tail(&text, 60)))
    }
}

fn program<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(name);
    command.args(args);
    command
}

/// Writes a file unless it has that content already, so that nothing made from it looks outdated.
fn write_if_changed(path: &Path, content: &[u8]) -> Result<(), String> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    }
    fs::write(path, content).map_err(|error| format!("{}: {error}", path.display()))
}

/// Removes a directory tree that may not be there.
fn remove_tree(path: &Path) -> Result<(), String> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}
