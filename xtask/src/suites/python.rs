//! Python's own tests of what a filesystem does, on the mount and beside it.
//!
//! Only what fails on the mount and passes on the filesystem of the checkout counts.

use super::Suite;
use crate::guard;
use crate::need;
use crate::run::{exists, Cmd};
use crate::steps::Outcome;
use anyhow::{bail, Result};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const MODULES: &[&str] = &[
    "test.test_os",
    "test.test_posix",
    "test.test_shutil",
    "test.test_mmap",
    "test.test_tempfile",
    "test.test_glob",
    "test.test_largefile",
    "test.test_zipfile",
    "test.test_dbm_dumb",
];

/// Runs the modules in both places.
///
/// # Errors
/// When a test fails on the mount alone.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    let Some(python) = python()? else {
        return Ok(Outcome::Skipped("no Python with its tests is to be had".into()));
    };
    let volume = suite.volume()?;
    let (beside, _beside) = guard::temp_dir(&crate::checkout::artefacts("scratch")?, "python")?;
    let there = results(&python, volume.dir(), &suite.log("python"))?;
    if there.len() < 500 {
        bail!("only {} tests ran; see {}", there.len(), suite.log("python").display());
    }
    let bad: Vec<&String> = there.iter().filter(|(_, ok)| !**ok).map(|(name, _)| name).collect();
    let mut new: Vec<&str> = Vec::new();
    if !bad.is_empty() {
        let here = results(&python, &beside, &suite.log("python-beside"))?;
        let only_there = bad.iter().filter(|name| here.get(**name) != Some(&false));
        new.extend(only_there.map(|name| name.as_str()));
    }
    volume.finish()?;
    if !new.is_empty() {
        bail!("{} tests fail on the mount alone:\n{}", new.len(), new.join("\n"));
    }
    Ok(Outcome::Passed(format!("{} tests, {} fail anywhere", there.len(), bad.len())))
}

/// A Python that has its tests.
fn python() -> Result<Option<String>> {
    let works = |program: &str| {
        let out = Cmd::new(program).args(["-c", "import test.test_os"]).output();
        out.is_ok_and(|out| out.code == Some(0))
    };
    if exists("python3") && works("python3") {
        return Ok(Some("python3".into()));
    }
    // Debian's Python comes without them; the package has no program to look for.
    if need::is_root() && exists("apt-get") {
        need::package("libpython3-testsuite")?;
        if works("/usr/bin/python3") {
            return Ok(Some("/usr/bin/python3".into()));
        }
    }
    Ok(None)
}

/// Each test with whether it passed, for tests that ran.
fn results(python: &str, dir: &Path, log: &Path) -> Result<BTreeMap<String, bool>> {
    let out = Cmd::new(python)
        .args(["-m", "unittest", "--verbose"])
        .args(MODULES)
        .dir(dir)
        .env("TMPDIR", dir)
        .limit(Duration::from_secs(900))
        .log_to(log)?;
    Ok(parse(&out.stdout))
}

/// Reads the lines "test_name (module.Class.test_name) ... ok". Output of the tests themselves may
/// stand between the dots and the verdict, and the verdict may be on a line of its own.
fn parse(text: &str) -> BTreeMap<String, bool> {
    let mut found = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        if let Some((head, _)) = line.split_once(" ... ") {
            let is_test = head.starts_with("test") && head.contains(" (test.");
            current = is_test.then(|| head.to_owned()).or(current);
        } else if line.starts_with("test") && line.ends_with(')') {
            current = Some(line.to_owned());
        }
        let verdict = line.rsplit(' ').next().unwrap_or_default();
        let passed = match verdict {
            "ok" => true,
            "FAIL" | "ERROR" => false,
            _ => continue,
        };
        if let Some(name) = current.take() {
            found.insert(name, passed);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_found_with_noise_and_descriptions_between() {
        let text = "test_a (test.test_os.A.test_a) ... ok\n\
                    test_b (test.test_os.A.test_b) ... noise\nFAIL\n\
                    test_c (test.test_os.A.test_c)\nWhat it does. ... ERROR\n\
                    test_d (test.test_os.A.test_d) ... skipped 'no'\n";
        let found = parse(text);
        let verdicts: Vec<(&str, bool)> = found.iter().map(|(n, ok)| (&n[..6], *ok)).collect();
        assert_eq!(verdicts, [("test_a", true), ("test_b", false), ("test_c", false)]);
    }
}
