//! `cargo xtask test`: what CI runs, cheapest first.

use crate::run::Cmd;
use crate::steps::{passed, Outcome, Steps};
use crate::{docs, guard, kmod, need, suites, tidy};
use anyhow::Result;
use std::path::Path;

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Options {
    /// Also run what takes hours: soaks and long random runs.
    #[arg(long)]
    pub long: bool,
    /// Stop at the first step that fails.
    #[arg(long)]
    pub fail_fast: bool,
    /// Only name the steps.
    #[arg(long)]
    pub list: bool,
    /// Run the mounted suites on another filesystem: ext4 or btrfs show whether a suite is sound.
    #[arg(long, default_value = "cairn")]
    pub subject: String,
    /// Run only the steps whose names contain one of these words.
    pub filter: Vec<String>,
}

/// Runs the steps.
///
/// # Errors
/// When a step fails.
pub fn run(options: &Options) -> Result<()> {
    let mut steps = Steps::new(&options.filter, options.fail_fast, options.list);
    sources(&mut steps);
    builds(&mut steps);
    units(&mut steps, options.long);
    steps.step("rings", rings);
    suites::steps(&mut steps, &options.subject, options.long)?;
    steps.step("kmod-smoke", || match kmod::smoke().map_err(anyhow::Error::msg)? {
        kmod::Outcome::Done(what) => Ok(Outcome::Passed(what)),
        kmod::Outcome::Skipped(why) => Ok(Outcome::Skipped(why)),
    });
    steps.finish()
}

fn sources(steps: &mut Steps) {
    steps.step("fmt", || {
        Cmd::cargo(&["fmt", "--all", "--check"]).run()?;
        passed()
    });
    steps.step("tidy", || {
        tidy::run(false)?;
        passed()
    });
    steps.step("clippy", || {
        need::tools(need::BUILD)?;
        let args = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        Cmd::cargo(&args).run()?;
        passed()
    });
    steps.step("docs", || {
        docs::run(true)?;
        passed()
    });
    steps.step("rustdoc", || {
        Cmd::cargo(&["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings")
            .run()?;
        passed()
    });
}

fn builds(steps: &mut Steps) {
    let core = |features: &'static [&'static str]| {
        move || {
            let args = ["build", "--package", "fs-core", "--no-default-features"];
            Cmd::cargo(&args).args(features).run()?;
            passed()
        }
    };
    steps.step("core-bare", core(&[]));
    steps.step("core-kernel", core(&["--features", "kernel"]));
    steps.step("core-no-std", || {
        // Host builds prove nothing about `std` creeping in through a dependency; this one does.
        let target = "x86_64-unknown-none";
        if !target_is_installed(target) {
            return Ok(Outcome::Skipped(format!("target {target} is not installed")));
        }
        let args = ["build", "--package", "fs-core", "--no-default-features"];
        Cmd::cargo(&args).args(["--features", "kernel", "--target", target]).run()?;
        passed()
    });
}

fn target_is_installed(target: &str) -> bool {
    let libraries = Cmd::new("rustc").args(["--print", "target-libdir", "--target", target]).text();
    libraries.is_ok_and(|dir| Path::new(dir.trim()).is_dir())
}

fn units(steps: &mut Steps, long: bool) {
    steps.step("unit", || {
        need::tools(need::BUILD)?;
        need::tools(DRIVER_TESTS)?;
        let mut cmd = Cmd::cargo(&["test", "--workspace"]);
        if long {
            cmd = cmd.env("PROPTEST_CASES", "4096").env("CAIRN_LONG", "1");
        }
        cmd.run()?;
        passed()
    });
}

/// What the driver's tests call.
const DRIVER_TESTS: &[need::Tool] = &[("setfacl", "acl"), ("fusermount3", "fuse3")];

/// The driver's tests with requests over io_uring, which the kernel offers while a parameter of the
/// whole machine is set.
fn rings() -> Result<Outcome> {
    let parameter = Path::new("/sys/module/fuse/parameters/enable_uring");
    if let Err(why) = need::can_mount() {
        return Ok(Outcome::Skipped(format!("{why:#}")));
    }
    if !parameter.exists() {
        return Ok(Outcome::Skipped("this kernel has no FUSE over io_uring".into()));
    }
    need::tools(DRIVER_TESTS)?;
    Cmd::cargo(&["build", "--package", "fs-fuse", "--examples"]).run()?;
    let _set = guard::setting(parameter, "Y")?;
    Cmd::cargo(&["test", "--package", "fs-fuse", "--test", "kernel_rings"]).run()?;
    passed()
}
