//! Broken images and troubled devices: each gets one clear sentence and the right exit code, and
//! nothing is lost or made worse.
//!
//! Device errors need no special driver: a loop device over a file in a small tmpfs refuses writes
//! when the tmpfs is full, and one whose file has been cut off behind its back refuses reads there.

use super::Suite;
use crate::guard::{self, Guard};
use crate::random::Random;
use crate::run::{Cmd, Output};
use crate::steps::Outcome;
use crate::subject::{MountOptions, Subject};
use crate::volume::{Backing, Volume};
use crate::{checkout, run};
use anyhow::{bail, ensure, Context, Result};
use fs_core::format::label::{self, Label};
use fs_core::format::superblock::Superblock;
use fs_core::units::Physical;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Small, because each is hashed before and after.
const IMAGE_BYTES: u64 = 64 << 20;
const DEVICE_BYTES: u64 = 256 << 20;

/// Exit code of mount(8) and its helpers when a mount fails.
const MOUNT_FAILED: i32 = 32;
/// Exit code of mount(8) and its helpers for wrong usage.
const MOUNT_USAGE: i32 = 1;
/// Exit codes of fsck(8).
const FSCK_LEFT: i32 = 4;
const FSCK_OPERATIONAL: i32 = 8;
const FSCK_USAGE: i32 = 16;

/// What a command must do about a bad image.
#[derive(Clone, Copy)]
enum Wanted {
    /// End with one of these codes and one sentence.
    Refused(&'static [i32]),
    /// Work, and find the file.
    Works,
}

/// An image that is not as it should be.
struct Case {
    name: &'static str,
    spoil: fn(&Path) -> Result<()>,
    mount: Wanted,
    mount_read_only: Wanted,
    fsck: Wanted,
}

const REFUSED_BY_MOUNT: Wanted = Wanted::Refused(&[MOUNT_FAILED]);
const REFUSED_BY_FSCK: Wanted = Wanted::Refused(&[FSCK_OPERATIONAL, FSCK_LEFT]);

const fn refused(name: &'static str, spoil: fn(&Path) -> Result<()>) -> Case {
    let mount = REFUSED_BY_MOUNT;
    Case { name, spoil, mount, mount_read_only: mount, fsck: REFUSED_BY_FSCK }
}

const fn tolerated(name: &'static str, spoil: fn(&Path) -> Result<()>, fsck: Wanted) -> Case {
    Case { name, spoil, mount: Wanted::Works, mount_read_only: Wanted::Works, fsck }
}

const CASES: &[Case] = &[
    refused("no such file", |image| Ok(fs::remove_file(image)?)),
    refused("an empty file", |image| Ok(open(image)?.set_len(0)?)),
    refused("one sector", |image| Ok(open(image)?.set_len(4096)?)),
    refused("zeros", |image| zero(image, 0, IMAGE_BYTES)),
    refused("random bytes", |image| {
        let mut bytes = vec![0; 2 << 20];
        Random(3).fill(&mut bytes);
        open(image)?.write_all_at(&bytes, 0)?;
        Ok(open(image)?.write_all_at(&bytes, IMAGE_BYTES - bytes.len() as u64)?)
    }),
    refused("another filesystem", |image| {
        zero(image, 0, IMAGE_BYTES)?;
        crate::subject::EXT4.mkfs(image)
    }),
    refused("a directory", |image| {
        fs::remove_file(image)?;
        Ok(fs::create_dir(image)?)
    }),
    refused("an image cut in half", |image| Ok(open(image)?.set_len(IMAGE_BYTES / 2)?)),
    refused("an image cut to its first MiB", |image| Ok(open(image)?.set_len(1 << 20)?)),
    refused("a newer format version", |image| {
        change_labels(image, |label| label.version = 99)?;
        Ok(())
    }),
    refused("an unknown incompat feature", |image| {
        change_superblocks(image, |superblock| superblock.features[2] |= 1 << 63)
    }),
    Case {
        name: "an unknown ro-compat feature",
        spoil: |image| change_superblocks(image, |superblock| superblock.features[1] |= 1 << 63),
        mount: REFUSED_BY_MOUNT,
        mount_read_only: Wanted::Works,
        fsck: Wanted::Refused(&[0, FSCK_OPERATIONAL, FSCK_LEFT]),
    },
    refused("both labels damaged", |image| {
        areas()?.iter().try_for_each(|area| zero(image, area.0, 4096))
    }),
    refused("all superblocks damaged", |image| {
        areas()?.iter().try_for_each(|area| zero(image, area.0 + label::RING_OFFSET, 64 << 10))
    }),
    tolerated(
        "the first label damaged",
        |image| zero(image, label::LABEL_AREA_0, 4096),
        REPAIRABLE,
    ),
    tolerated(
        "the first label area damaged",
        |image| zero(image, label::LABEL_AREA_0, label::LABEL_AREA_BYTES),
        REPAIRABLE,
    ),
    tolerated(
        "the second label area damaged",
        |image| zero(image, areas()?[1].0, label::LABEL_AREA_BYTES),
        REPAIRABLE,
    ),
];

/// The filesystem works; the checker may pass it, or ask for the copy to be written again.
const REPAIRABLE: Wanted = Wanted::Refused(&[0, FSCK_LEFT]);

/// Everything that is wrong with an image, and wrong usage.
///
/// # Errors
/// Lists what was answered wrongly.
pub fn images(suite: &Suite<'_>) -> Result<Outcome> {
    let (scratch, _scratch) = guard::temp_dir(&checkout::artefacts("scratch")?, "badinput")?;
    let good = good_image(suite, &scratch)?;
    let mut wrong = Vec::new();
    let mut judged = 0;
    let mut judge = |name: String, verdict: Result<()>| {
        judged += 1;
        if let Err(why) = verdict {
            wrong.push(format!("{name}: {why:#}"));
        }
    };
    for case in CASES {
        let image = scratch.join("image");
        for (what, wanted) in
            [("mount", case.mount), ("mount -o ro", case.mount_read_only), ("fsck", case.fsck)]
        {
            copy_sparse(&good, &image)?;
            (case.spoil)(&image).with_context(|| format!("cannot make {}", case.name))?;
            judge(format!("{what}, {}", case.name), answer(suite, what, &image, wanted));
            remove(&image)?;
        }
    }
    for (name, verdict) in usage(suite, &scratch, &good) {
        judge(name, verdict);
    }
    if wrong.is_empty() {
        return Ok(Outcome::Passed(format!("{judged} answers")));
    }
    bail!("{} of {judged} answers are wrong:\n{}", wrong.len(), wrong.join("\n"))
}

fn answer(suite: &Suite<'_>, what: &str, image: &Path, wanted: Wanted) -> Result<()> {
    let dir = image.with_file_name("mnt");
    let before = fingerprint(image)?;
    if what == "fsck" {
        let out = fsck(image)?;
        let Wanted::Refused(codes) = wanted else { bail!("no such case") };
        check_code(&out, codes)?;
        ensure!(out.code == Some(0) || !out.both().is_empty(), "it says nothing");
        no_panic(&out)?;
        ensure!(fingerprint(image)? == before, "fsck -n has changed the image");
        return Ok(());
    }
    let read_only = what.ends_with("ro");
    match wanted {
        Wanted::Refused(codes) => {
            let out = mount_output(image, &dir, read_only)?;
            let undo = guard::is_mounted(&dir).then(|| guard::mounted(&dir));
            ensure!(undo.is_none(), "it was mounted");
            refusal(&out, codes)?;
            ensure!(fingerprint(image)? == before, "a refused mount has changed the image");
        }
        Wanted::Works => {
            let options = MountOptions { read_only, extra: "" };
            suite.subject.mount(image, &dir, options)?;
            let mounted = guard::mounted(&dir);
            let found = fs::read(dir.join("file"))?;
            ensure!(found == content(), "the file has other content");
            Cmd::new("umount").arg(&dir).quiet()?;
            mounted.disarm();
        }
    }
    Ok(())
}

/// Wrong usage of each command.
fn usage(suite: &Suite<'_>, scratch: &Path, good: &Path) -> Vec<(String, Result<()>)> {
    let dir = scratch.join("mnt");
    let small = scratch.join("small");
    let mut verdicts = Vec::new();
    let mut refuse = |program: &str, args: &[&Path], codes: &[i32], name: &str| {
        let verdict = (|| {
            let before = fingerprint(good)?;
            let program = checkout::binary(program);
            let out = Cmd::new(program).args(args).limit(Duration::from_secs(60)).output()?;
            check_code(&out, codes)?;
            no_panic(&out)?;
            ensure!(!out.stderr.trim().is_empty(), "it says nothing");
            ensure!(fingerprint(good)? == before, "the image has changed");
            Ok(())
        })();
        verdicts.push((format!("{program}, {name}"), verdict));
    };
    let path = Path::new;
    let no_dir = scratch.join("no-such-directory");
    refuse("mount.cairn", &[good, &no_dir], &[MOUNT_FAILED, MOUNT_USAGE], "no such directory");
    refuse("mount.cairn", &[good, good], &[MOUNT_FAILED, MOUNT_USAGE], "a file to mount on");
    refuse("mount.cairn", &[good], &[MOUNT_USAGE], "no directory");
    refuse("mount.cairn", &[path("--no-such"), good, &dir], &[MOUNT_USAGE], "unknown flag");
    refuse("fsck.cairn", &[path("--no-such"), good], &[FSCK_USAGE], "unknown flag");
    refuse("fsck.cairn", &[], &[FSCK_USAGE], "no image");
    refuse("mkfs.cairn", &[good], &[1], "there is a filesystem already");
    refuse("mkfs.cairn", &[path("-L"), path("a/b"), &small], &[2], "a name that ends in itself");
    refuse("mkfs.cairn", &[path("--size"), path("many"), &small], &[1, 2], "not a size");
    refuse("mkfs.cairn", &[path("--size"), path("100K"), &small], &[1], "too small");
    refuse("mkfs.cairn", &[], &[1, 2], "no target");
    let other = scratch.join("other");
    let made = File::create(&other).and_then(|file| file.set_len(64 << 20));
    if made.is_ok() && crate::subject::EXT4.mkfs(&other).is_ok() {
        refuse("mkfs.cairn", &[&other], &[1], "another filesystem is there");
    }
    let _ = suite;
    verdicts
}

/// A device that is busy, full, read-only, failing, or wrong in what it returns.
///
/// # Errors
/// Lists what went wrong.
pub fn devices(suite: &Suite<'_>) -> Result<Outcome> {
    type Case = fn(&Suite<'_>) -> Result<()>;
    let cases: &[(&str, Case)] = &[
        ("busy", busy),
        ("mounted in another namespace", mounted_elsewhere),
        ("full", full),
        ("read-only device", read_only_device),
        ("remounted read-only", remounted_read_only),
        ("writes fail", writes_fail),
        ("reads fail", reads_fail),
        ("data is damaged", data_is_damaged),
    ];
    let mut wrong = Vec::new();
    for (name, case) in cases {
        match case(suite) {
            Ok(()) => println!("    {name}: as it should be"),
            Err(why) => wrong.push(format!("{name}: {why:#}")),
        }
    }
    if wrong.is_empty() {
        return Ok(Outcome::Passed(format!("{} troubles", cases.len())));
    }
    bail!("{}", wrong.join("\n"))
}

/// A mounted image is refused by a second mount, by mkfs and by fsck.
fn busy(suite: &Suite<'_>) -> Result<()> {
    for backing in [Backing::File, Backing::Loop] {
        let mut volume = Volume::create(suite.subject, backing, DEVICE_BYTES)?;
        volume.mount()?;
        fs::write(volume.dir().join("file"), content())?;
        let (elsewhere, _dir) = guard::temp_dir(&checkout::artefacts("scratch")?, "busy")?;
        let out = mount_output(volume.target(), &elsewhere, false)?;
        let undo = guard::is_mounted(&elsewhere).then(|| guard::mounted(&elsewhere));
        ensure!(undo.is_none(), "{backing:?}: mounted twice");
        refusal(&out, &[MOUNT_FAILED]).context("second mount")?;
        let mkfs = Cmd::new(checkout::binary("mkfs.cairn")).arg("-f").arg(volume.target());
        refusal(&mkfs.limit(Duration::from_secs(60)).output()?, &[1]).context("mkfs")?;
        refusal(&fsck(volume.target())?, &[FSCK_OPERATIONAL]).context("fsck")?;
        volume.remount()?;
        let found = fs::read(volume.dir().join("file"))?;
        ensure!(found == content(), "{backing:?}: the file has changed");
        volume.finish()?;
    }
    Ok(())
}

/// What is unmounted here lives on in a mount namespace that somebody made before: he is named.
fn mounted_elsewhere(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::Loop, DEVICE_BYTES)?;
    volume.mount()?;
    let mut elsewhere = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"])
        .stdout(std::process::Stdio::piped())
        .process_group(0)
        .spawn()?;
    let ends = guard::process_group(elsewhere.id());
    elsewhere.stdout.take().context("no pipe")?.read_exact(&mut [0])?;
    volume.unmount()?;
    let out = fsck(volume.target())?;
    check_code(&out, &[FSCK_OPERATIONAL])?;
    let named = format!("a mount in the mount namespace of process {}", elsewhere.id());
    ensure!(out.stderr.contains(&named), "not named:\n{}", out.both());
    drop(ends);
    elsewhere.wait()?;
    volume.mount()?;
    volume.finish()
}

/// ENOSPC, and nothing worse; deleting works; what was there stays.
fn full(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::Loop, DEVICE_BYTES)?;
    volume.mount()?;
    let dir = volume.dir().to_owned();
    fs::write(dir.join("file"), content())?;
    File::open(dir.join("file"))?.sync_all()?;
    let written = fill(&dir)?;
    ensure!(written > DEVICE_BYTES / 2, "full after {written} bytes of {DEVICE_BYTES}");
    for n in 0.. {
        match fs::write(dir.join(format!("small-{n}")), b"x") {
            Ok(()) if n < 1_000_000 => {}
            Ok(()) => bail!("a million files fit on a full filesystem"),
            Err(error) => {
                ensure!(error.kind() == ErrorKind::StorageFull, "{error}");
                break;
            }
        }
    }
    volume.remount().context("when full")?;
    ensure!(fs::read(dir.join("file"))? == content(), "the file has changed");
    for entry in fs::read_dir(&dir)?.collect::<Result<Vec<_>, _>>()? {
        if entry.file_name() != "file" {
            fs::remove_file(entry.path()).context("cannot delete on a full filesystem")?;
        }
    }
    fs::write(dir.join("again"), vec![1; 10 << 20]).context("after deleting")?;
    File::open(dir.join("again"))?.sync_all()?;
    volume.finish()
}

/// Writes incompressible files until there is no room. Returns how many bytes went in.
fn fill(dir: &Path) -> Result<u64> {
    let mut random = Random(5);
    let mut bytes = vec![0; 1 << 20];
    let mut written = 0;
    for n in 0..64 {
        let mut file = File::create(dir.join(format!("fill-{n}")))?;
        for _ in 0..16 {
            random.fill(&mut bytes);
            // The kernel may take more than there is room for, and say so when it is synced.
            if let Err(error) = file.write_all(&bytes).and_then(|()| file.sync_data()) {
                ensure!(error.kind() == ErrorKind::StorageFull, "{error}");
                return Ok(written);
            }
            written += bytes.len() as u64;
        }
    }
    bail!("{written} bytes went into {DEVICE_BYTES}")
}

/// The kernel makes a mount read-only without the helper, so nobody tells the daemon: it changes
/// nothing for the admin command either, until the mount is writable again.
fn remounted_read_only(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::File, DEVICE_BYTES)?;
    volume.mount()?;
    let remount = |how: &str| Cmd::new("mount").args(["-i", "-o", how]).arg(volume.dir()).quiet();
    let make = |name: &str| {
        let command = Cmd::new(checkout::binary("cairn")).args(["subvolume", "create"]);
        command.arg(volume.dir().join(name)).output()
    };
    let status =
        || Cmd::new(checkout::binary("cairn")).args(["status", "-j"]).arg(volume.dir()).text();
    remount("remount,ro")?;
    let out = make("new")?;
    refusal(&out, &[1])?;
    ensure!(out.stderr.contains("read-only"), "another reason:\n{}", out.both());
    ensure!(status()?.contains("\"read_only\": true"), "the status says something else");
    remount("remount,rw")?;
    check_code(&make("new")?, &[0])?;
    ensure!(status()?.contains("\"read_only\": false"), "the status says something else");
    volume.finish()
}

/// A device that cannot be written is mounted read-only, with a sentence that says so; where that
/// is not what is wanted it is refused with one.
fn read_only_device(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::File, DEVICE_BYTES)?;
    volume.mount()?;
    fs::write(volume.dir().join("file"), content())?;
    volume.unmount()?;
    let (device, _device) = guard::loop_device(volume.image(), true)?;
    let says_so = |out: &Output, codes: &[i32]| {
        refusal(out, codes)?;
        ensure!(out.stderr.contains("is write-protected"), "another reason:\n{}", out.both());
        Ok(())
    };
    for read_only in [false, true] {
        let out = mount_output(&device, volume.dir(), read_only)?;
        let _mounted = guard::mounted(volume.dir());
        match read_only {
            false => says_so(&out, &[0]).context("mount for writing")?,
            true => check_code(&out, &[0]).context("mount -o ro")?,
        }
        ensure!(fs::read(volume.dir().join("file"))? == content(), "the file differs");
        let error = fs::write(volume.dir().join("new"), b"x").err();
        let kind = error.map(|error| error.kind());
        ensure!(kind == Some(ErrorKind::ReadOnlyFilesystem), "a write gives {kind:?}");
    }
    let insist = Cmd::new(checkout::binary("mount.cairn")).arg("-w").arg(&device).arg(volume.dir());
    says_so(&insist.limit(Duration::from_secs(60)).output()?, &[MOUNT_FAILED]).context("-w")?;
    let mkfs = Cmd::new(checkout::binary("mkfs.cairn")).arg("-f").arg(&device);
    says_so(&mkfs.limit(Duration::from_secs(60)).output()?, &[1]).context("mkfs")?;
    check_code(&fsck(&device)?, &[0]).context("fsck")?;
    let mut pool = Volume::create(suite.subject, Backing::File, DEVICE_BYTES)?;
    pool.mount()?;
    let add = Cmd::new(checkout::binary("cairn")).args(["device", "add", "-f"]);
    let add = add.arg(pool.dir()).arg(&device);
    says_so(&add.limit(Duration::from_secs(60)).output()?, &[1]).context("device add")?;
    pool.finish()
}

/// The device refuses writes: fsync says so, reads go on, what was durable stays.
fn writes_fail(suite: &Suite<'_>) -> Result<()> {
    let small = Tmpfs::mount("64M")?;
    let image = small.dir.join("image");
    File::create(&image)?.set_len(1 << 30)?;
    let (device, _device) = guard::loop_device(&image, false)?;
    suite.subject.mkfs(&device)?;
    let mnt = small.scratch.join("on-device");
    fs::create_dir(&mnt)?;
    suite.subject.mount(&device, &mnt, MountOptions::default())?;
    let mounted = guard::mounted(&mnt);
    fs::write(mnt.join("file"), content())?;
    File::open(mnt.join("file"))?.sync_all()?;
    let error = exhaust(&mnt)?;
    ensure!(error.raw_os_error() == Some(5), "an fsync that failed gives {error}, not EIO");
    ensure!(fs::read(mnt.join("file"))? == content(), "what was synced cannot be read");
    let again = File::open(mnt.join("file"))?.sync_all().err();
    let again = again.and_then(|error| error.raw_os_error());
    ensure!(again == Some(5), "a second fsync gives {again:?}, not EIO");
    let late = fs::write(mnt.join("late"), b"x").err().map(|error| error.kind());
    ensure!(late == Some(ErrorKind::ReadOnlyFilesystem), "a later write gives {late:?}");
    // The unmount may report the failure; the mount has to be gone all the same.
    let _ = Cmd::new("umount").arg(&mnt).limit(Duration::from_secs(60)).output();
    ensure!(!guard::is_mounted(&mnt), "cannot be unmounted after the failure");
    mounted.disarm();
    let cmd = Cmd::new("mount").args(["-o", "remount,size=2G"]);
    cmd.arg(&small.dir).quiet()?;
    suite.subject.check(&device).context("after the device works again")?;
    suite.subject.mount(&device, &mnt, MountOptions::default())?;
    let mounted = guard::mounted(&mnt);
    ensure!(fs::read(mnt.join("file"))? == content(), "what was synced is lost");
    fs::write(mnt.join("new"), b"x")?;
    Cmd::new("umount").arg(&mnt).quiet()?;
    mounted.disarm();
    suite.subject.check(&device)
}

/// Writes until the device fails; returns what the `fsync` says that finds out.
fn exhaust(dir: &Path) -> Result<std::io::Error> {
    let mut random = Random(9);
    let mut bytes = vec![0; 1 << 20];
    for n in 0..200 {
        random.fill(&mut bytes);
        let path = dir.join(format!("big-{n}"));
        let mut file = match File::create(&path) {
            // A commit was faster than the `fsync`: what that says, every later one says too.
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => File::open(dir)?,
            other => other?,
        };
        // Whether what is written is refused or lost later is a matter of timing.
        let _ = file.write_all(&bytes);
        if let Err(error) = file.sync_all() {
            return Ok(error);
        }
    }
    bail!("200 MiB went into 64")
}

/// The device refuses reads of what is beyond its middle: EIO or the right bytes, nothing else.
fn reads_fail(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::File, DEVICE_BYTES)?;
    volume.mount()?;
    let file = |n: u64| {
        let mut bytes = vec![0; 4 << 20];
        Random(100 + n).fill(&mut bytes);
        bytes
    };
    for n in 0..40 {
        fs::write(volume.dir().join(n.to_string()), file(n))?;
    }
    volume.unmount()?;
    let (device, _device) = guard::loop_device(volume.image(), false)?;
    OpenOptions::new().write(true).open(volume.image())?.set_len(DEVICE_BYTES / 2)?;
    let out = mount_output(&device, volume.dir(), true)?;
    if !guard::is_mounted(volume.dir()) {
        return refusal(&out, &[MOUNT_FAILED]);
    }
    let _mounted = guard::mounted(volume.dir());
    let (mut good, mut failed) = (0, 0);
    for n in 0..40 {
        match fs::read(volume.dir().join(n.to_string())) {
            Ok(bytes) => {
                ensure!(bytes == file(n), "file {n} reads without error and is wrong");
                good += 1;
            }
            Err(error) => {
                ensure!(error.raw_os_error() == Some(5), "file {n}: {error}, not EIO");
                failed += 1;
            }
        }
    }
    ensure!(guard::is_mounted(volume.dir()) && good + failed == 40, "the mount is gone");
    Ok(())
}

/// A file whose sectors were changed on the device: EIO, never wrong bytes; others are not touched.
fn data_is_damaged(suite: &Suite<'_>) -> Result<()> {
    let mut volume = Volume::create(suite.subject, Backing::File, DEVICE_BYTES)?;
    volume.mount()?;
    let mut bytes = vec![0; 1 << 20];
    Random(77).fill(&mut bytes);
    fs::write(volume.dir().join("victim"), &bytes)?;
    fs::write(volume.dir().join("file"), content())?;
    volume.unmount()?;
    let image = fs::read(volume.image())?;
    let sector = &bytes[512 << 10..][..4096];
    let mut hits = 0;
    for (index, found) in image.chunks_exact(4096).enumerate() {
        if found == sector {
            open(volume.image())?.write_all_at(&[!sector[100]], index as u64 * 4096 + 100)?;
            hits += 1;
        }
    }
    ensure!(hits > 0, "the file's bytes are nowhere on the device");
    let out = fsck(volume.image())?;
    check_code(&out, &[FSCK_LEFT]).context("fsck of damaged data")?;
    ensure!(out.both().contains("victim"), "fsck does not name the file:\n{}", out.both());
    volume.mount()?;
    let error = fs::read(volume.dir().join("victim")).err().context("damaged data was returned")?;
    ensure!(error.raw_os_error() == Some(5), "{error}, not EIO");
    ensure!(fs::read(volume.dir().join("file"))? == content(), "another file is affected");
    fs::remove_file(volume.dir().join("victim")).context("a damaged file cannot be removed")?;
    volume.finish().context("after the damaged file was removed")
}

/// A tmpfs of its own.
struct Tmpfs {
    // Dropped in this order.
    _mounted: Guard,
    _scratch: Guard,
    scratch: PathBuf,
    dir: PathBuf,
}

impl Tmpfs {
    fn mount(size: &str) -> Result<Tmpfs> {
        let (scratch, removal) = guard::temp_dir(&checkout::artefacts("scratch")?, "tmpfs")?;
        let dir = scratch.join("tmpfs");
        fs::create_dir(&dir)?;
        let options = format!("size={size}");
        Cmd::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&dir).quiet()?;
        Ok(Tmpfs { _mounted: guard::mounted(&dir), _scratch: removal, scratch, dir })
    }
}

/// An unmounted image with one file on it, and a directory to mount on beside it.
fn good_image(suite: &Suite<'_>, scratch: &Path) -> Result<PathBuf> {
    let good = scratch.join("good");
    let dir = scratch.join("mnt");
    fs::create_dir(&dir)?;
    File::create(&good)?.set_len(IMAGE_BYTES)?;
    suite.subject.mkfs(&good)?;
    suite.subject.mount(&good, &dir, MountOptions::default())?;
    let mounted = guard::mounted(&dir);
    fs::write(dir.join("file"), content())?;
    Cmd::new("umount").arg(&dir).quiet()?;
    mounted.disarm();
    suite.subject.check(&good)?;
    Ok(good)
}

fn content() -> Vec<u8> {
    let mut bytes = vec![0; 100_000];
    Random(1).fill(&mut bytes);
    bytes
}

fn open(image: &Path) -> Result<File> {
    Ok(OpenOptions::new().write(true).read(true).open(image)?)
}

fn zero(image: &Path, at: u64, bytes: u64) -> Result<()> {
    let file = open(image)?;
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < bytes {
        let count = (bytes - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..count as usize], at + done)?;
        done += count;
    }
    Ok(())
}

fn areas() -> Result<[Physical; 2]> {
    label::label_areas(IMAGE_BYTES).context("the test image is large enough")
}

/// Rewrites both labels with a right checksum.
fn change_labels(image: &Path, change: fn(&mut Label)) -> Result<()> {
    let file = open(image)?;
    for area in areas()? {
        let mut bytes = [0; Label::BYTES];
        file.read_exact_at(&mut bytes, area.0)?;
        let mut label = Label::decode(&bytes)?;
        change(&mut label);
        file.write_all_at(&label.encode(&[]), area.0)?;
    }
    Ok(())
}

/// Rewrites every valid superblock with a right checksum.
fn change_superblocks(image: &Path, change: fn(&mut Superblock)) -> Result<()> {
    let file = open(image)?;
    let mut changed = 0;
    for area in areas()? {
        for slot in 0..label::RING_SLOTS {
            let at = label::ring_slot(area, slot).0;
            let mut bytes = [0; 4096];
            file.read_exact_at(&mut bytes, at)?;
            if let Ok(mut superblock) = Superblock::decode(&bytes) {
                change(&mut superblock);
                file.write_all_at(&superblock.encode(), at)?;
                changed += 1;
            }
        }
    }
    ensure!(changed > 0, "a good image has no superblock");
    Ok(())
}

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    Cmd::new("cp").args(["--sparse=always", "--"]).args([from, to]).quiet()
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(fs::remove_dir(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
        Err(_) => Ok(()),
    }
}

/// What tells whether an image was changed; `None` when it is not a file.
fn fingerprint(path: &Path) -> Result<Option<String>> {
    if !path.is_file() {
        return Ok(None);
    }
    Cmd::new("sha256sum").arg(path).text().map(Some)
}

fn mount_output(target: &Path, dir: &Path, read_only: bool) -> Result<Output> {
    let cmd = Cmd::new(checkout::binary("mount.cairn")).args([target, dir]);
    let cmd = cmd.args(["-o", if read_only { "ro" } else { "rw" }]);
    cmd.limit(Duration::from_secs(60)).output()
}

fn fsck(target: &Path) -> Result<Output> {
    let cmd = Cmd::new(checkout::binary("fsck.cairn")).args(["-f", "-n"]).arg(target);
    cmd.limit(Duration::from_secs(60)).output()
}

/// One sentence on standard error, a code that fits, no panic.
fn refusal(out: &Output, codes: &[i32]) -> Result<()> {
    check_code(out, codes)?;
    no_panic(out)?;
    let lines = out.stderr.trim().lines().count();
    ensure!(lines == 1, "{lines} lines instead of one sentence:\n{}", out.both());
    Ok(())
}

fn check_code(out: &Output, codes: &[i32]) -> Result<()> {
    let fits = out.code.is_some_and(|code| codes.contains(&code));
    let said = run::tail(&out.both(), 8);
    ensure!(fits, "exit code {:?}, not one of {codes:?}:\n{said}", out.code);
    Ok(())
}

fn no_panic(out: &Output) -> Result<()> {
    ensure!(!out.both().contains("panicked"), "it panicked:\n{}", out.both());
    Ok(())
}
