//! The command as its callers see it: refusals, exit codes, what it leaves behind.

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

fn mkfs() -> Command {
    let mut command = Command::cargo_bin("mkfs-cairn").unwrap();
    command.env_remove("SOURCE_DATE_EPOCH");
    command
}

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn none() -> Image {
        Image { dir: tempfile::tempdir().unwrap() }
    }

    fn of(bytes: u64) -> Image {
        let image = Image::none();
        File::create(image.path()).unwrap().set_len(bytes).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }
}

#[test]
fn wrong_arguments_exit_with_2_and_say_what_is_wanted() {
    for (arguments, said) in [
        (&[][..], "TARGET"),
        (&["--node-size", "8K", "x"], "16K, 32K, 64K"),
        (&["--size", "big", "x"], "is not a size"),
        (&["-U", "12", "x"], "is not a UUID"),
        (&["-U", "00000000-0000-0000-0000-000000000000", "x"], "nil UUID"),
        (&["--compress", "lz4", "x"], "zstd:LEVEL"),
        (&["--profile", "parity1", "x"], "single, dup, stripe, mirror"),
        (&["-L", &"n".repeat(64), "x"], "at most 63 bytes"),
        (&["-L", "a/b", "x"], "no '/', '@' or '#'"),
        (&["-L", "-a", "x"], "does not begin with '-'"),
        (&["-q", "-v", "x"], "cannot be used with"),
        (&["-O", "checksums", "x"], "-O list"),
    ] {
        mkfs().args(arguments).assert().code(2).stderr(contains(said));
    }
}

#[test]
fn what_is_asked_for_as_json_is_answered_as_json_in_any_case() {
    let image = Image::of(4096);
    let output = mkfs().arg("--json").arg(image.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let said = json["error"].as_str().unwrap();
    assert!(said.contains("is too small"), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("mkfs.cairn: {said}\n"));
}

#[test]
fn a_target_that_is_missing_needs_a_size() {
    let image = Image::none();
    mkfs().arg(image.path()).assert().code(1).stderr(contains("does not exist; give --size"));
    assert!(!image.path().exists());
    // Not so of what cannot be looked at.
    let file = Image::of(4096);
    let below = file.path().join("x");
    mkfs().arg(&below).assert().code(1).stderr(contains("x: Not a directory\n"));
    mkfs().args(["-b", "64M"]).arg(&below).assert().code(1).stderr(contains("Not a directory\n"));
}

#[test]
fn too_small_a_target_is_refused_with_the_minimum_and_nothing_is_made() {
    let image = Image::none();
    let too_small = || contains("too small").and(contains("needs at least")).and(contains("MiB"));
    mkfs().args(["--size", "1M"]).arg(image.path()).assert().code(1).stderr(too_small());
    assert!(!image.path().exists());
    let image = Image::of(64 << 10);
    mkfs().arg(image.path()).assert().code(1).stderr(too_small());
    assert!(fs::read(image.path()).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn another_filesystem_is_named_and_left_alone() {
    let image = Image::of(64 << 20);
    let file = File::options().write(true).open(image.path()).unwrap();
    file.write_all_at(b"_BHRfS_M", 0x10040).unwrap();
    let before = fs::read(image.path()).unwrap();
    mkfs()
        .arg(image.path())
        .assert()
        .code(1)
        .stderr(contains("holds btrfs").and(contains("--force")));
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn an_image_of_another_size_is_left_alone() {
    let image = Image::of(64 << 20);
    mkfs()
        .args(["--size", "128M"])
        .arg(image.path())
        .assert()
        .code(1)
        .stderr(contains("exists with 64.0 MiB"));
    assert_eq!(fs::metadata(image.path()).unwrap().len(), 64 << 20);
}

#[test]
fn an_image_that_someone_uses_is_refused() {
    let image = Image::of(64 << 20);
    let options = cairn_host::OpenOptions::new(cairn_host::Access::ReadWrite);
    let wait = cairn_host::Wait::usual();
    let _user = cairn_host::FileDevice::open(&image.path(), options, &wait).unwrap();
    mkfs()
        .args(["--wait", "0"])
        .arg(image.path())
        .assert()
        .code(1)
        .stderr(contains("is in use by process"));
}

#[test]
fn what_is_no_device_is_refused() {
    mkfs().arg("/dev/null").assert().code(1).stderr(contains("neither a block device"));
}

#[test]
fn a_target_given_twice_is_refused() {
    let image = Image::of(64 << 20);
    let other_name = image.dir.path().join(".").join("image");
    mkfs().arg(image.path()).arg(other_name).assert().code(1).stderr(contains("given twice"));
}

#[test]
fn a_date_that_is_no_number_is_refused() {
    let image = Image::of(64 << 20);
    mkfs()
        .env("SOURCE_DATE_EPOCH", "yesterday")
        .arg(image.path())
        .assert()
        .code(1)
        .stderr(contains("SOURCE_DATE_EPOCH"));
}

#[test]
fn features_are_listed_without_a_target() {
    mkfs().args(["-O", "list"]).assert().success().stdout(contains("no optional features"));
}

#[test]
fn the_version_goes_to_standard_output() {
    mkfs().arg("-V").assert().success().stdout(contains("mkfs.cairn 0."));
}

#[test]
fn a_pool_is_made_and_not_made_again_without_force() {
    let image = Image::none();
    let made = contains("tank").and(contains("64.0 MiB")).and(contains("dup"));
    mkfs().args(["-b", "64M", "-L", "tank"]).arg(image.path()).assert().success().stdout(made);
    let before = fs::read(image.path()).unwrap();
    assert_eq!(before.len(), 64 << 20);
    mkfs()
        .arg(image.path())
        .assert()
        .code(1)
        .stderr(contains("holds a cairn pool labelled 'tank'").and(contains("--force")));
    assert!(fs::read(image.path()).unwrap() == before);
    mkfs().args(["-f", "-q"]).arg(image.path()).assert().success().stdout("");
    assert!(fs::read(image.path()).unwrap() != before);
}

#[test]
fn a_seed_makes_the_same_image_again() {
    let make = |seed: &str| {
        let image = Image::none();
        mkfs().args(["-q", "-b", "32M", "--seed", seed]).arg(image.path()).assert().success();
        fs::read(image.path()).unwrap()
    };
    let first = make("one");
    assert!(first == make("one"));
    assert!(first != make("two"));
}

#[test]
fn a_dry_run_says_what_would_be_made_and_makes_nothing() {
    let image = Image::none();
    let output = mkfs()
        .args(["-n", "--json", "-b", "64M", "-U", "6f1c5a1e-0000-4000-8000-0123456789ab"])
        .arg(image.path())
        .output()
        .unwrap();
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["id"], "6f1c5a1e-0000-4000-8000-0123456789ab");
    assert_eq!(json["devices"][0]["bytes"], 64 << 20);
    assert_eq!(json["dry_run"], true);
    assert!(!image.path().exists());
    let image = Image::of(64 << 20);
    mkfs().arg("-n").arg(image.path()).assert().success().stdout(contains("nothing was written"));
    assert!(fs::read(image.path()).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn a_profile_that_needs_more_devices_is_refused_before_anything_is_made() {
    let image = Image::none();
    let said = "the profile mirror needs 2 devices, and one is given";
    let arguments = ["--size", "16M", "--profile", "mirror"];
    mkfs().args(arguments).arg(image.path()).assert().code(1).stderr(contains(said));
    assert!(!image.path().exists());
}

#[test]
fn several_targets_make_one_pool_whose_metadata_is_a_mirror() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| dir.path().join(name));
    let output = mkfs().args(["--size", "16M", "--json", "-d", "stripe"]).args(&paths).output();
    let summary: serde_json::Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    assert_eq!(summary["devices"].as_array().unwrap().len(), 3);
    assert_eq!(
        (&summary["data_profile"], &summary["metadata_profile"]),
        (&"stripe".into(), &"mirror".into())
    );
}
