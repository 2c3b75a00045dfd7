//! `cargo xtask`: everything done to cairn that is not `cargo build`.
//!
//! | module | does |
//! | --- | --- |
//! | `demo` | sets everything up and shows the filesystem at work |
//! | `test` | the steps CI runs, in order |
//! | `suites` | borrowed and own test suites on a mounted image |
//! | `bench` | measures cairn next to other filesystems |
//! | `tidy` | layering and text rules of the sources |
//! | `docs`, `pages` | tables of `docs/format.md`; manual pages and completions |
//! | `install` | puts binaries, links, man pages and completions in place |
//! | `kmod` | builds and tries the kernel module |
//! | `subject`, `volume` | a filesystem to be tried, and one image of it |
//! | `run`, `guard`, `steps`, `need`, `checkout`, `random` | surroundings |

mod bench;
mod checkout;
mod demo;
mod docs;
mod guard;
mod install;
mod kmod;
mod need;
mod pages;
mod random;
mod run;
mod steps;
mod subject;
mod suites;
mod test;
mod tidy;
mod volume;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Builds, tests, shows and measures cairn.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set everything up, make a filesystem, mount it, work on it, check it.
    Demo {
        /// Show another filesystem in cairn's place, to compare.
        #[arg(long, default_value = "cairn")]
        subject: String,
    },
    /// Run everything that CI runs.
    Test(test::Options),
    /// Check the rules of the sources that the compiler does not know.
    Tidy {
        /// Wrap comments that are too wide first.
        #[arg(long)]
        fix: bool,
    },
    /// Generate the tables of docs/format.md, man pages and completions.
    Docs {
        /// Change nothing; fail when docs/format.md is out of date.
        #[arg(long)]
        check: bool,
    },
    /// Install binaries, links, man pages and completions.
    Install {
        /// Where cairn will live.
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
        /// Put before every path, for packagers.
        #[arg(long)]
        destdir: Option<PathBuf>,
    },
    /// Measure cairn next to other filesystems, on this machine, in one run.
    Bench(bench::Options),
    /// Build and try the kernel module.
    Kmod {
        /// What to do: see docs/kernel-module.md.
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    guard::clean_up_on_signals();
    let result = match Cli::parse().task {
        Task::Demo { subject } => demo::run(&subject),
        Task::Test(options) => test::run(&options),
        Task::Tidy { fix } => tidy::run(fix),
        Task::Docs { check } => docs::run(check),
        Task::Install { prefix, destdir } => install::run(&prefix, destdir.as_deref()),
        Task::Bench(options) => bench::run(&options),
        Task::Kmod { args } => kmod::main(&args).map_err(anyhow::Error::msg),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
