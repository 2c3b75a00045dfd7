//! Running other programs.
//!
//! Every program runs in a process group of its own with a time limit, so that one that hangs ends
//! the step and not the run. Captured output goes through files and not pipes: a server that a
//! program leaves behind keeps its standard output open, and a pipe would never end.

use crate::guard;
use anyhow::{bail, Context, Result};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long a program may run when nothing else is said.
const LIMIT: Duration = Duration::from_secs(1800);

/// A program to run.
#[must_use = "a command does nothing until it is run"]
pub struct Cmd {
    command: Command,
    shown: String,
    limit: Duration,
}

/// What a program left when it ended.
#[derive(Debug)]
pub struct Output {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Output {
    /// Both streams, for a report.
    pub fn both(&self) -> String {
        let mut text = self.stdout.trim_end().to_owned();
        if !text.is_empty() && !self.stderr.is_empty() {
            text.push('\n');
        }
        text + self.stderr.trim_end()
    }

    fn ending(&self) -> String {
        match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "an unknown end".to_owned(),
        }
    }
}

impl Cmd {
    /// The program of that name or path.
    pub fn new(program: impl AsRef<OsStr>) -> Cmd {
        let program = program.as_ref();
        let short = Path::new(program).file_name().unwrap_or(program);
        Cmd {
            command: Command::new(program),
            shown: short.to_string_lossy().into_owned(),
            limit: LIMIT,
        }
    }

    /// Cargo itself, in the checkout.
    pub fn cargo(args: &[&str]) -> Cmd {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        Cmd::new(cargo).args(args).dir(crate::checkout::root())
    }

    /// A script for the shell, ending at its first error.
    pub fn shell(script: &str) -> Cmd {
        let mut cmd = Cmd::new("bash");
        cmd.command.args(["-euo", "pipefail", "-c", script]);
        cmd.shown = script.trim().to_owned();
        cmd
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Cmd {
        let arg = arg.as_ref();
        self.shown.push(' ');
        self.shown.push_str(&arg.to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Cmd {
        args.into_iter().fold(self, Cmd::arg)
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Cmd {
        self.command.env(name, value);
        self
    }

    /// Runs it in that directory.
    pub fn dir(mut self, dir: &Path) -> Cmd {
        self.command.current_dir(dir);
        self
    }

    /// Kills it after that time.
    pub fn limit(mut self, limit: Duration) -> Cmd {
        self.limit = limit;
        self
    }

    /// The command line, for people.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// Runs it with its output on the terminal.
    ///
    /// # Errors
    /// When it cannot be started, runs too long, or fails.
    pub fn run(mut self) -> Result<()> {
        let status = self.wait(Stdio::inherit(), Stdio::inherit())?;
        if status.success() {
            return Ok(());
        }
        bail!("`{}` failed with {status}", self.shown)
    }

    /// Runs it with its output going to a file, for long and talkative programs.
    ///
    /// # Errors
    /// When it cannot be started or runs too long.
    pub fn log_to(mut self, path: &Path) -> Result<Output> {
        let out = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let err = out.try_clone()?;
        let status = self.wait(out.into(), err.into())?;
        let stdout = String::from_utf8_lossy(&std::fs::read(path)?).into_owned();
        Ok(Output { code: status.code(), signal: status.signal(), stdout, stderr: String::new() })
    }

    /// Runs it and keeps its output, whatever its exit code.
    ///
    /// # Errors
    /// When it cannot be started or runs too long.
    pub fn output(mut self) -> Result<Output> {
        let mut out = tempfile::tempfile()?;
        let mut err = tempfile::tempfile()?;
        let status = self.wait(out.try_clone()?.into(), err.try_clone()?.into())?;
        let read = |file: &mut File| -> Result<String> {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(0))?;
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        Ok(Output {
            code: status.code(),
            signal: status.signal(),
            stdout: read(&mut out)?,
            stderr: read(&mut err)?,
        })
    }

    /// Runs it; it must succeed, and its standard output is returned.
    ///
    /// # Errors
    /// When it cannot be started, runs too long, or fails; its output is in the error.
    pub fn text(self) -> Result<String> {
        let shown = self.shown.clone();
        let out = self.output()?;
        if out.code == Some(0) {
            return Ok(out.stdout);
        }
        bail!("`{shown}` failed with {}: {}", out.ending(), tail(&out.both(), 30))
    }

    /// Runs it quietly; it must succeed.
    ///
    /// # Errors
    /// As [`Cmd::text`].
    pub fn quiet(self) -> Result<()> {
        self.text().map(drop)
    }

    fn start(&mut self, out: Stdio, err: Stdio) -> Result<(Child, guard::Guard)> {
        self.command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child =
            self.command.spawn().with_context(|| format!("cannot start `{}`", self.shown))?;
        let guard = guard::process_group(child.id());
        Ok((child, guard))
    }

    fn wait(&mut self, out: Stdio, err: Stdio) -> Result<ExitStatus> {
        let (mut child, guard) = self.start(out, err)?;
        let (ended, watch) = mpsc::channel::<()>();
        let limit = self.limit;
        let watchdog = std::thread::spawn(move || {
            let late = watch.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if late {
                drop(guard);
            } else {
                guard.disarm();
            }
            late
        });
        let status = child.wait();
        // The watchdog may have given up waiting at this very moment; then nobody listens.
        let _ = ended.send(());
        let late = watchdog.join().expect("the watchdog does not panic");
        if late {
            bail!("`{}` did not end within {} s and was killed", self.shown, limit.as_secs());
        }
        status.with_context(|| format!("cannot wait for `{}`", self.shown))
    }
}

/// The last `count` lines of `text`.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Whether a program of that name can be found.
pub fn exists(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(Into::into);
    std::env::split_paths(&path).chain(extra).any(|dir| dir.join(program).is_file())
}
