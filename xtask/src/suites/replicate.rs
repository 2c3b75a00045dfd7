//! Whole trees of subvolumes, and a tree as people have them, sent from one mounted pool to
//! another.
//!
//! `cairn send -R` brings subvolumes that lie in each other, clones, and what was chosen for them;
//! what they share is stored once by the receiver too. A tree of many files, with attributes,
//! access lists, links, sparse files and devices, comes in increments that rsync finds no
//! difference in; streams of it that are cut anywhere go on, and streams with any byte changed show
//! nothing.

use super::programs::make_odd_tree;
use super::Suite;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{ensure, Context, Result};
use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::os::unix::fs::{symlink, FileExt, MetadataExt};
use std::path::Path;

/// Files of a directory.
const TOGETHER: u32 = 50;

/// How much is tried.
struct Scale {
    files: u32,
    increments: u32,
    cuts: u32,
    flips: u32,
}

/// Runs it.
///
/// # Errors
/// When something arrives that was not sent, or does not arrive.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    let tools = [("setfacl", "acl"), ("setfattr", "attr"), ("rsync", "rsync")];
    need::tools(&tools)?;
    let scale = match suite.long {
        true => Scale { files: 30_000, increments: 10, cuts: 100, flips: 100 },
        false => Scale { files: 1500, increments: 3, cuts: 5, flips: 8 },
    };
    let (from, to) = (suite.volume()?, suite.volume()?);
    subvolumes(from.dir(), to.dir())?;
    files(from.dir(), to.dir(), &scale)?;
    from.finish()?;
    to.finish()?;
    let Scale { files, increments, cuts, flips } = scale;
    Ok(Outcome::Passed(format!(
        "-R; {files} files, {increments} increments, {cuts} cuts, {flips} flips"
    )))
}

fn cairn(words: &[&str], name: &str) -> Result<()> {
    Cmd::new(checkout::binary("cairn")).args(words).arg(name).quiet()
}

fn text(words: &[&str], name: &str) -> Result<String> {
    let text = Cmd::new(checkout::binary("cairn")).args(words).arg(name).text()?;
    Ok(text.trim().to_string())
}

/// A script with the command's name in `$cairn`.
fn script(script: &str) -> Cmd {
    let cairn = checkout::binary("cairn").display().to_string();
    Cmd::new("bash").args(["-c", &format!("set -o pipefail; {script}")]).env("cairn", cairn)
}

fn id(name: &str) -> Result<String> {
    let text = text(&["id"], name)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_string())
}

/// Subvolumes in each other, a clone among them, with what was chosen for them.
fn subvolumes(from: &Path, to: &Path) -> Result<()> {
    let (home, copy) = (from.join("home"), to.join("copy"));
    let (home, copy) = (home.display().to_string(), copy.display().to_string());
    for below in ["", "/alice", "/alice/mail"] {
        cairn(&["subvolume", "create"], &format!("{home}{below}"))?;
    }
    cairn(&["set", "compression=zstd:5"], &home)?;
    cairn(&["set", "team:owner=alice", "atime=off"], &format!("{home}/alice"))?;
    let make = "head -c 20M /dev/urandom > alice/large && cp alice/large alice/copy && \
                echo mail > alice/mail/one && echo top > file";
    Cmd::shell(make).dir(Path::new(&home)).quiet()?;
    cairn(&["snapshot", "create", "-r"], &format!("{home}@start"))?;
    // Before what it is a clone of, in the order of names.
    Cmd::new(checkout::binary("cairn"))
        .args(["snapshot", "clone"])
        .args([format!("{home}/alice@start"), "home/a-clone".to_string()])
        .quiet()?;
    Cmd::shell("echo more >> a-clone/more && cp alice/large alice/third && rm alice/copy")
        .dir(Path::new(&home))
        .quiet()?;
    cairn(&["snapshot", "create", "-r"], &format!("{home}@one"))?;
    let pass = |options: &str, last: &str| {
        let words = format!("\"$cairn\" send -q -R {options} {home}@{last}");
        script(&format!("{words} | \"$cairn\" receive -q {copy}")).output()
    };
    let out = pass("", "one")?;
    ensure!(out.code == Some(0), "the tree does not arrive: {}", out.both());
    let same = |below: &str, snapshot: &str| -> Result<()> {
        let (sent, there) =
            (format!("{home}{below}@{snapshot}"), format!("{copy}{below}@{snapshot}"));
        let (sent, there) = (id(&sent)?, id(&there)?);
        ensure!(sent == there, "{below}@{snapshot}: {there} instead of {sent}");
        Ok(())
    };
    for below in ["", "/alice", "/alice/mail"] {
        same(below, "start")?;
        same(below, "one")?;
    }
    same("/a-clone", "one")?;
    let choice = |below: &str, name: &str| -> Result<String> {
        let line = text(&["get", "-H", name], &format!("{copy}{below}"))?;
        Ok(line.split('\t').nth(2).unwrap_or_default().to_string())
    };
    ensure!(choice("", "compression")? == "zstd:5", "compression was not told");
    ensure!(choice("/alice/mail", "team:owner")? == "alice", "a property of users was not told");
    ensure!(choice("/alice", "atime")? == "off", "atime was not told");
    // 20 MB of noise, named by five files.
    let used = |dir: &Path| -> Result<u64> {
        rustix::fs::syncfs(fs::File::open(dir)?)?;
        let stat = rustix::fs::statvfs(dir)?;
        Ok((stat.f_blocks - stat.f_bfree) * stat.f_frsize)
    };
    let (sent, there) = (used(from)?, used(to)?);
    ensure!(there < sent + (8 << 20), "{there} bytes are in use instead of {sent}");

    Cmd::shell("echo two > alice/mail/two && rm file").dir(Path::new(&home)).quiet()?;
    cairn(&["inherit", "atime"], &format!("{home}/alice"))?;
    cairn(&["subvolume", "create"], &format!("{home}/new"))?;
    cairn(&["snapshot", "create", "-r"], &format!("{home}@two"))?;
    cairn(&["subvolume", "create"], &format!("{home}/without"))?;
    let out = pass("-i @one", "two")?;
    ensure!(out.code == Some(0), "the increment does not arrive: {}", out.both());
    ensure!(out.stderr.contains("without has no snapshot two"), "{}", out.both());
    for below in ["", "/alice", "/alice/mail", "/a-clone", "/new"] {
        same(below, "two")?;
    }
    ensure!(
        choice("/alice", "atime")? == "relative",
        "a choice that was taken back is still there"
    );
    let out = pass("-i @one", "two")?;
    ensure!(out.code == Some(0), "what is there is not passed over: {}", out.both());
    Ok(())
}

/// A tree as people have them.
fn files(from: &Path, to: &Path, scale: &Scale) -> Result<()> {
    let tree = from.join("tree");
    let (sent, there) = (tree.display().to_string(), to.join("tree").display().to_string());
    cairn(&["subvolume", "create"], &sent)?;
    make_odd_tree(&tree.join("odd"))?;
    (0..scale.files).try_for_each(|number| make_file(&tree, number))?;
    Cmd::shell("setfacl -R -m u:1234:rX,g:77:r group-0").dir(&tree).quiet()?;
    for round in 0..=scale.increments {
        let (name, older) = (format!("{sent}@{round}"), round.saturating_sub(1));
        if round > 0 {
            change(&tree, round, scale)?;
        }
        cairn(&["snapshot", "create"], &name)?;
        let options = if round > 0 { format!("-i @{older}") } else { String::new() };
        let pass = format!("\"$cairn\" send -q {options} {name} | \"$cairn\" receive -q {there}");
        script(&pass).quiet()?;
        compare(&tree, &to.join("tree"), round)?;
    }
    cut_and_flipped(&sent, to, scale)
}

fn make_file(tree: &Path, number: u32) -> Result<()> {
    let dir = tree.join(format!("group-{}/part-{}", number / TOGETHER / 20, number / TOGETHER));
    if number % TOGETHER == 0 {
        fs::create_dir_all(&dir)?;
    }
    let path = dir.join(format!("file-{number}"));
    let before = dir.join(format!("file-{}", number.saturating_sub(1)));
    let is_first = number % TOGETHER == 0;
    match number % 23 {
        3 if !is_first => fs::hard_link(before, path)?,
        5 => symlink(format!("file-{}", number + 1), path)?,
        7 => {
            let file = fs::File::create(path)?;
            file.set_len(5_000_000)?;
            file.write_all_at(b"an island", 3_000_000 + u64::from(number))?;
        }
        9 => {
            let path = path.as_path();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                path,
                rustix::fs::FileType::CharacterDevice,
                rustix::fs::Mode::RUSR,
                rustix::fs::makedev(1, number % 200),
            )?;
        }
        11 if !is_first && before.is_file() => drop(fs::copy(before, path)?),
        kind => {
            let line = format!("{number} of a tree as people have them\n");
            fs::write(&path, line.repeat(1 + (number as usize * 37) % 400))?;
            if kind % 5 == 0 {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(&path, "user.number", &number.to_le_bytes(), flags)?;
            }
        }
    }
    Ok(())
}

/// Changes one file of a hundred, and names.
fn change(tree: &Path, round: u32, scale: &Scale) -> Result<()> {
    let parts = scale.files.div_ceil(TOGETHER);
    let path = |number: u32| {
        let (group, part) = (number / TOGETHER / 20, number / TOGETHER);
        tree.join(format!("group-{group}/part-{part}/file-{number}"))
    };
    for number in (0..scale.files).skip(round as usize * 13 % 100).step_by(100) {
        let path = path(number);
        let Ok(found) = path.symlink_metadata() else { continue };
        match number / 100 % 4 {
            0 => fs::remove_file(&path)?,
            1 => fs::rename(&path, path.with_extension(round.to_string()))?,
            _ if found.is_file() && found.nlink() == 1 => {
                let file = fs::File::options().write(true).open(&path)?;
                file.write_all_at(format!("round {round}").as_bytes(), u64::from(round) * 700)?;
            }
            _ => {}
        }
    }
    // A directory goes elsewhere, and another takes its name.
    let part = (round * 7) % parts;
    let dir = tree.join(format!("group-{}/part-{part}", part / 20));
    if dir.is_dir() {
        fs::rename(&dir, tree.join(format!("moved-{round}")))?;
        fs::create_dir(&dir)?;
        fs::write(dir.join("instead"), round.to_string())?;
    }
    let script = format!(
        "chmod 7{round}5 odd/a/text; setfacl -m u:{round}:r odd/a/text; \
         fallocate -p -o {round}00000 -l 50000 odd/a/random; cp odd/a/random odd/a/random-{round}"
    );
    Cmd::shell(&script).dir(tree).quiet()
}

/// As rsync sees two snapshots.
fn compare(from: &Path, to: &Path, round: u32) -> Result<()> {
    let side = |tree: &Path| format!("{}/.cairn/snapshot/{round}/", tree.display());
    let cmd = Cmd::new("rsync").args(["-aHAXcn", "--delete", "--itemize-changes"]);
    let out = cmd.args([side(from), side(to)]).text()?;
    ensure!(out.trim().is_empty(), "@{round} differs from what was sent:\n{out}");
    let (sent, there) =
        (format!("{}@{round}", from.display()), format!("{}@{round}", to.display()));
    ensure!(id(&sent)? == id(&there)?, "@{round} has another identity");
    Ok(())
}

/// Streams that are cut off go on; streams with a byte changed show nothing.
fn cut_and_flipped(sent: &str, to: &Path, scale: &Scale) -> Result<()> {
    let (scratch, _guard) = crate::guard::temp_dir(&checkout::artefacts("scratch")?, "replicate")?;
    let stream = scratch.join("stream");
    let last = format!("{sent}@{}", scale.increments);
    let cmd = Cmd::new(checkout::binary("cairn")).args(["send", "-q", "-o"]).arg(&stream);
    cmd.arg(&last).quiet()?;
    let mut bytes = fs::read(&stream)?;
    let (wanted, to) = (id(&last)?, to.display());
    let random = RandomState::new();
    let at =
        |round: u32, what: &str| (random.hash_one((what, round)) % bytes.len() as u64) as usize;
    let (cuts, flips): (Vec<_>, Vec<_>) = (
        (0..scale.cuts).map(|round| at(round, "cut")).collect(),
        (0..scale.flips).map(|round| at(round, "flip")).collect(),
    );
    for at in cuts {
        let path = stream.display();
        let part = format!("head -c {at} {path} | \"$cairn\" receive -q {to}/cut");
        let out = script(&part).output()?;
        ensure!(out.code == Some(1), "a stream of {at} bytes is received: {}", out.both());
        let token = out.stderr.split(" -t ").nth(1).and_then(|rest| rest.split(',').next());
        let rest = match token {
            Some(token) => format!("\"$cairn\" send -q -t {token} {sent}"),
            // Nothing came before.
            None => format!("cat {path}"),
        };
        script(&format!("{rest} | \"$cairn\" receive -q {to}/cut"))
            .quiet()
            .with_context(|| format!("after {at} bytes"))?;
        let found = id(&format!("{to}/cut@{}", scale.increments))?;
        ensure!(found == wanted, "cut at {at}: {found} instead of {wanted}");
        cairn(&["subvolume", "delete", "-r"], &format!("{to}/cut"))?;
    }
    let spoilt = scratch.join("spoilt");
    for at in flips {
        bytes[at] ^= 1 << (at % 8);
        fs::write(&spoilt, &bytes)?;
        bytes[at] ^= 1 << (at % 8);
        let part = format!("\"$cairn\" receive -q -i {} {to}/flip", spoilt.display());
        let out = script(&part).output()?;
        ensure!(out.code == Some(1), "byte {at} is changed, and it is received: {}", out.both());
        // What came before it is whole: it may be kept to go on with, hidden.
        let seen = text(&["subvolume", "list"], &to.to_string())?;
        let seen = seen.lines().filter(|line| line.contains("flip")).collect::<Vec<_>>();
        let is_hidden = seen.iter().all(|line| line.contains("(receiving)"));
        ensure!(is_hidden, "byte {at} is changed, and something is seen: {seen:?}");
        ensure!(!Path::new(&format!("{to}/flip")).exists(), "byte {at}: it is seen");
        if !seen.is_empty() {
            cairn(&["subvolume", "delete"], &format!("{to}/flip"))?;
        }
    }
    Ok(())
}
