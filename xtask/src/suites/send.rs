//! A tree with one of everything is sent from one mounted pool to another, and on.
//!
//! Full, then from snapshot to snapshot, through pipes between two daemons. What the receiver shows
//! must be what was sent, by name, owner, time, attribute, content and identity; a receive that is
//! cut off, or spoilt, leaves nothing; and it goes on after a remount.

use super::programs::{describe, make_odd_tree};
use super::Suite;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{bail, ensure, Result};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

/// Runs it.
///
/// # Errors
/// When something arrives that was not sent, or does not arrive.
pub fn run(suite: &Suite<'_>) -> Result<Outcome> {
    need::release_build()?;
    need::tools(&[("setfacl", "acl"), ("setfattr", "attr")])?;
    let (mut from, mut to) = (suite.volume()?, suite.volume()?);
    let source = from.dir().join("source");
    make_odd_tree(&source)?;
    snapshot(from.dir(), "first")?;
    pass(&format!("{}@first", from.dir().display()), "", to.dir(), "copy")?;
    compare(from.dir(), to.dir(), "first")?;
    for round in 0..4 {
        change(&source, round)?;
        let (old, new) = (name_of(round), name_of(round + 1));
        snapshot(from.dir(), &new)?;
        if round == 2 {
            from.remount()?;
            to.remount()?;
        }
        let snapshot = format!("{}@{new}", from.dir().display());
        refused(&snapshot, &old, to.dir())?;
        pass(&snapshot, &format!("-i @{old}"), to.dir(), "copy")?;
        compare(from.dir(), to.dir(), &new)?;
    }
    into_a_file(from.dir())?;
    broken_off(from.dir(), to.dir())?;
    in_use(from.dir(), to.dir())?;
    // And from there on, all at once.
    let last = format!("{}/copy@{}", to.dir().display(), name_of(4));
    pass(&last, "-R", from.dir(), "back")?;
    let (one, other) = (from.dir().join("source"), from.dir().join("back/source"));
    ensure!(describe(&one)? == describe(&other)?, "what came back is something else");
    from.finish()?;
    to.finish()?;
    Ok(Outcome::Passed("full, four increments, -R back".into()))
}

fn name_of(round: u32) -> String {
    match round {
        0 => "first".into(),
        round => format!("round-{round}"),
    }
}

fn cairn() -> String {
    checkout::binary("cairn").display().to_string()
}

fn snapshot(dir: &Path, name: &str) -> Result<()> {
    let name = format!("{}@{name}", dir.display());
    Cmd::new(cairn()).args(["snapshot", "create", &name]).quiet()
}

/// Sends through a pipe.
fn pass(snapshot: &str, options: &str, to: &Path, name: &str) -> Result<()> {
    let (cairn, to) = (cairn(), to.display());
    let script =
        format!("set -o pipefail; {cairn} send {options} {snapshot} | {cairn} receive {to}/{name}");
    Cmd::new("bash").args(["-c", &script]).quiet()
}

/// What is cut off or spoilt is refused, and leaves nothing.
fn refused(snapshot: &str, old: &str, to: &Path) -> Result<()> {
    let (cairn, to) = (cairn(), to.display());
    let list = format!("{cairn} subvolume list -p {to}; {cairn} snapshot list -p {to}");
    let names = |text: &str| -> Vec<String> {
        let last = |line: &str| line.split_whitespace().last().map(String::from);
        text.lines().filter_map(last).collect()
    };
    let before = names(&Cmd::shell(&list).text()?);
    for spoil in ["sed s/cairn/Cairn/", "tr '\\000' '\\001'", "head -c 200", "head -c -40"] {
        let script =
            format!("{cairn} send -i @{old} {snapshot} | {spoil} | {cairn} receive -q {to}/copy");
        let out = Cmd::new("bash").args(["-c", &script]).output()?;
        ensure!(out.code == Some(1), "{spoil}: {}", out.both());
        ensure!(out.stderr.contains("the stream"), "{spoil}: {}", out.both());
    }
    // What came before the last bytes is kept, hidden, to go on with.
    Cmd::new(&cairn).args(["subvolume", "delete", &format!("{to}/copy/%receiving")]).quiet()?;
    let after = names(&Cmd::shell(&list).text()?);
    ensure!(before == after, "something is left: {before:?}, {after:?}");
    Ok(())
}

/// What breaks off goes on where it broke off, full and incremental.
fn broken_off(from: &Path, to: &Path) -> Result<()> {
    let (cairn, from, to) = (cairn(), from.display(), to.display());
    for (options, name, cut) in [("", "first", 900_000), ("-i @first", "round-3", 12_000)] {
        let send = |what: &str| {
            let script =
                format!("{cairn} send -q {what} | head -c {cut} | {cairn} receive -q {to}/parts");
            Cmd::new("bash").args(["-c", &script]).output()
        };
        let mut what = format!("{options} {from}@{name}");
        let mut parts = 0;
        loop {
            let out = send(&what)?;
            if out.code == Some(0) {
                break;
            }
            parts += 1;
            ensure!(parts < 100, "it does not come to an end: {}", out.both());
            let token = out.stderr.split(" -t ").nth(1).and_then(|rest| rest.split(',').next());
            let Some(token) = token else { bail!("there is no token: {}", out.both()) };
            let listed = Cmd::new(&cairn).args(["subvolume", "list", &to.to_string()]).text()?;
            ensure!(listed.contains("(receiving)"), "it is not listed: {listed}");
            what = format!("-t {token} {from}");
        }
        ensure!(parts > 1, "{name}: {parts} parts are too few to show anything");
        let id = |place: String| -> Result<String> {
            let text = Cmd::new(&cairn).args(["id", &place]).text()?;
            Ok(text.split_whitespace().next().unwrap_or("").to_string())
        };
        let (sent, received) = (id(format!("{from}@{name}"))?, id(format!("{to}/parts@{name}"))?);
        ensure!(sent == received, "{name}: {received} instead of {sent}");
    }
    Ok(())
}

/// Where somebody is writing nothing is put in the place of what he writes.
fn in_use(from: &Path, to: &Path) -> Result<()> {
    let (cairn, sent) = (cairn(), from.display());
    let receive = |what: &str| {
        let to = to.display();
        let script = format!("{cairn} send -q {sent}@{what} | {cairn} receive -q {to}/used");
        Cmd::new("bash").args(["-c", &script]).output()
    };
    ensure!(receive("first")?.code == Some(0), "it cannot be received a second time");
    let mut file = OpenOptions::new().append(true).open(to.join("used/source/a/text"))?;
    file.write_all(b"not written back yet")?;
    let out = receive("round-1 -i @first")?;
    ensure!(out.code == Some(3), "somebody was writing there: {}", out.both());
    ensure!(out.stderr.contains("stays as it is"), "{}", out.both());
    file.write_all(b", and more")?;
    file.sync_all()?;
    let text = fs::read(to.join("used/source/a/text"))?;
    ensure!(text.ends_with(b"not written back yet, and more"), "what was written is lost");
    let whole = format!("{}/used@round-1", to.display());
    Cmd::new(&cairn).args(["id", &whole]).quiet()?;
    // Nor where somebody mounted something.
    let inner = to.join("copy/source/many");
    let out = Cmd::new("mount").args(["-t", "tmpfs", "none"]).arg(&inner).output()?;
    ensure!(out.code == Some(0), "{}", out.both());
    let name = format!("{sent}@more");
    Cmd::new(&cairn).args(["snapshot", "create", &name]).quiet()?;
    let script = format!(
        "{cairn} send -q -i @round-4 {name} | {cairn} receive -q {}/copy; mountpoint -q {}",
        to.display(),
        inner.display()
    );
    let out = Cmd::new("bash").args(["-c", &script]).output()?;
    Cmd::new("umount").arg(&inner).quiet()?;
    ensure!(out.code == Some(0), "what was mounted there is gone: {}", out.both());
    ensure!(out.stderr.contains("stays as it is"), "{}", out.both());
    Ok(())
}

/// A file is as it was until the whole stream is in it.
fn into_a_file(dir: &Path) -> Result<()> {
    let file = dir.join("stream");
    fs::write(&file, "an older backup")?;
    let send = |name: &str| {
        let name = format!("{}@{name}", dir.display());
        Cmd::new(cairn()).args(["send", "-q", &name, "-o"]).arg(&file).output()
    };
    ensure!(send("nothing")?.code == Some(1), "what is not there was sent");
    ensure!(fs::read(&file)? == b"an older backup", "the older backup is gone");
    ensure!(send("first")?.code == Some(0), "it cannot be sent into a file");
    let named = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b"stream");
    let streams = fs::read_dir(dir)?.filter(|entry| entry.as_ref().is_ok_and(named)).count();
    ensure!(streams == 1, "{streams} files instead of one");
    Cmd::new(cairn()).args(["receive", "-n", "-i"]).arg(&file).quiet()?;
    fs::remove_file(&file).map_err(Into::into)
}

fn compare(from: &Path, to: &Path, name: &str) -> Result<()> {
    let id = |place: String| -> Result<String> {
        let text = Cmd::new(cairn()).args(["id", &place]).text()?;
        Ok(text.split_whitespace().next().unwrap_or("").to_string())
    };
    let sent = id(format!("{}@{name}", from.display()))?;
    let received = id(format!("{}/copy@{name}", to.display()))?;
    ensure!(sent == received, "{name}: {received} instead of {sent}");
    let (one, other) = (describe(&from.join("source"))?, describe(&to.join("copy/source"))?);
    let differs = one.lines().zip(other.lines()).find(|(one, other)| one != other);
    ensure!(differs.is_none() && one.len() == other.len(), "{name}: {differs:?}");
    let hidden = fs::read_dir(to)?.count();
    ensure!(hidden == 1, "the receiver shows {hidden} names instead of one");
    Ok(())
}

/// Renames, replaces, cuts, punches, links and removes.
fn change(dir: &Path, round: u32) -> Result<()> {
    let script = format!(
        r#"
        mkdir -p new-{round}/deep
        mv many new-{round}/deep/many
        mkdir many; for n in $(seq 50); do echo {round} cairn > many/file-$n; done
        mv a/b new-{round}/b; mkdir a/b; mv new-{round}/b/* a/b/; rmdir new-{round}/b
        printf changed | dd of=a/random bs=1 seek=$((700000 + {round})) conv=notrunc status=none
        truncate -s $((2500000 + {round} * 77777)) a/text
        fallocate -p -o 0 -l $((100000 * ({round} + 1))) a/random
        rm -f 'a/b/c/a name with spaces and a
newline'
        ln a/random a/b/name-{round}
        ln -sfn round-{round} a/b/dangling
        setfattr -n user.round -v {round} a/text
        setfacl -m u:{round}:r a/text
        rm -rf new-$(({round} - 1))
        "#
    );
    Cmd::shell(&script).dir(dir).quiet()
}
