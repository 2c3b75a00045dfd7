//! A run of named steps: timing, the report, the closing line.

use crate::run;
use anyhow::{bail, Result};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::{Duration, Instant};

/// How a step ended without failing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran and found nothing wrong; a few words on what it did may be added.
    Passed(String),
    /// It could not run here, for this reason.
    Skipped(String),
}

/// It ran and found nothing wrong.
pub fn passed() -> Result<Outcome> {
    Ok(Outcome::Passed(String::new()))
}

struct Done {
    name: String,
    took: Duration,
    result: Result<Outcome, String>,
}

/// Steps that have run, and which are to run.
pub struct Steps {
    filters: Vec<String>,
    fail_fast: bool,
    list_only: bool,
    done: Vec<Done>,
    stopped: bool,
    started: Instant,
}

impl Steps {
    /// A run of the steps whose names contain one of `filters`, or of all.
    pub fn new(filters: &[String], fail_fast: bool, list_only: bool) -> Steps {
        Steps {
            filters: filters.to_vec(),
            fail_fast,
            list_only,
            done: Vec::new(),
            stopped: false,
            started: Instant::now(),
        }
    }

    /// Whether a step of that name would run.
    pub fn wants(&self, name: &str) -> bool {
        !self.stopped
            && (self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str())))
    }

    /// Runs a step, if it is wanted.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<Outcome>) {
        if !self.wants(name) {
            return;
        }
        if self.list_only {
            println!("{name}");
            return;
        }
        self.always(name, work);
    }

    /// Runs a step that others need, whether or not its own name is asked for.
    pub fn always(&mut self, name: &str, work: impl FnOnce() -> Result<Outcome>) {
        if self.stopped || self.list_only {
            return;
        }
        println!("==> {name}");
        let start = Instant::now();
        let result = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err("the step panicked; see above".to_owned()),
        };
        let took = start.elapsed();
        let seconds = took.as_secs_f64();
        match &result {
            Ok(Outcome::Passed(note)) => println!("    ok    {name} ({seconds:.1} s) {note}"),
            Ok(Outcome::Skipped(why)) => println!("    skip  {name}: {why}"),
            Err(why) => {
                println!("    FAIL  {name} ({seconds:.1} s)\n{}", indent(why));
                self.stopped = self.fail_fast;
            }
        }
        self.done.push(Done { name: name.to_owned(), took, result });
    }

    /// Prints the summary and its closing line.
    ///
    /// # Errors
    /// When a step failed, or none ran.
    pub fn finish(self) -> Result<()> {
        if self.list_only {
            return Ok(());
        }
        println!("\n==> summary");
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        for Done { name, took, result } in &self.done {
            let (word, note) = match result {
                Ok(Outcome::Passed(note)) => {
                    passed += 1;
                    ("ok", note.clone())
                }
                Ok(Outcome::Skipped(why)) => {
                    skipped += 1;
                    ("skip", why.clone())
                }
                Err(why) => {
                    failed += 1;
                    ("FAIL", why.lines().next().unwrap_or_default().to_owned())
                }
            };
            println!("{word:>5}  {name:<28} {:>7.1} s  {note}", took.as_secs_f64());
        }
        println!("total {:.0} s", self.started.elapsed().as_secs_f64());
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed > 0 {
            bail!("{failed} steps failed");
        }
        if passed == 0 {
            bail!("no step ran; `cargo xtask test --list` names them");
        }
        Ok(())
    }
}

fn indent(text: &str) -> String {
    run::tail(text, 60).lines().map(|line| format!("          {line}\n")).collect()
}
