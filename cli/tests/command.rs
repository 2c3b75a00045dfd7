//! The command on a pool with something in it.

use assert_cmd::Command;
use cairn_host::{Access, FileDevice, OpenOptions, Wait};
use clap::Parser;
use fs_core::check::{check, CheckOptions, Quiet};
use fs_core::engine;
use fs_core::format::inode::mode;
use fs_core::platform::DeviceRef;
use fs_core::units::Ino;
use fs_core::vfs::{AccessTime, Caller, Filesystem, Volume, WriteFlags};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

fn cairn() -> Command {
    Command::cargo_bin("cairn").unwrap()
}

#[test]
fn udev_is_told_name_and_id() {
    let image = Image::of_pool();
    let shown = cairn().arg("info").arg("--json").arg(image.path()).output().unwrap().stdout;
    let info: Value = serde_json::from_slice(&shown).unwrap();
    let id = info["id"].as_str().unwrap();
    cairn()
        .arg("udev")
        .arg(image.path())
        .assert()
        .success()
        .stdout(contains("ID_FS_TYPE=cairn\n").and(contains("ID_FS_LABEL_ENC=tank\n")))
        .stdout(contains(format!("ID_FS_UUID_ENC={id}\n")));
    let other = image.dir.path().join("other");
    fs::write(&other, vec![0; 1 << 20]).unwrap();
    cairn().arg("udev").arg(&other).assert().failure().stderr(contains("not a cairn pool"));
}

/// A pool named `tank` with a file of plain and of compressed extents; made once.
fn content() -> &'static [u8] {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    CONTENT.get_or_init(|| {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        let path = image.path();
        let arguments = ["mkfs", "--seed", "1", "-b", "64M", "-L", "tank", path.to_str().unwrap()];
        cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
        fill(&image);
        fs::read(path).unwrap()
    })
}

fn open(image: &Image) -> Arc<Volume> {
    let options = OpenOptions::new(Access::ReadWrite);
    let device = FileDevice::open(&image.path(), options, &Wait::usual()).unwrap();
    let devices = vec![Arc::new(device) as DeviceRef];
    let platform = cairn_host::host_platform();
    let options = engine::OpenOptions::default();
    Volume::open(devices, platform, &options, AccessTime::Never).unwrap()
}

fn fill(image: &Image) {
    let volume = open(image);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let dir = volume.mkdir(volume.root(), b"dir", mode::DIRECTORY | 0o755, &caller).unwrap().ino;
    let make = |name: &[u8]| -> Ino {
        volume.mknod(dir, name, mode::REGULAR | 0o644, 0, &caller).unwrap().ino
    };
    let mut noise = vec![0; 64 << 10];
    cairn_host::HostEntropy.fill_noise(&mut noise);
    volume.write(make(b"noise"), 0, &noise, WriteFlags::default()).unwrap();
    volume.write(make(b"text"), 0, &[b'x'; 128 << 10], WriteFlags::default()).unwrap();
    volume.close().unwrap();
}

trait Noise {
    fn fill_noise(&self, bytes: &mut [u8]);
}

impl Noise for cairn_host::HostEntropy {
    fn fill_noise(&self, bytes: &mut [u8]) {
        fs_core::platform::Entropy::fill(self, bytes);
    }
}

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn of_pool() -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        fs::write(image.path(), content()).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn damage(&self, at: u64, bytes: usize) {
        let file = File::options().write(true).open(self.path()).unwrap();
        file.write_all_at(&vec![0x5a; bytes], at).unwrap();
    }

    fn json(&self, words: &[&str], after: &[&str], code: i32) -> Value {
        let output =
            cairn().args(words).arg(self.path()).args(after).arg("--json").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[test]
fn info_shows_name_settings_and_devices() {
    let info = Image::of_pool().json(&["info"], &[], 0);
    assert_eq!(info["name"], "tank");
    assert_eq!(info["clean"], true);
    assert_eq!(info["checksum"], "crc32c");
    assert_eq!(info["compression"], "zstd");
    assert_eq!(info["devices"][0]["bytes"], 64 << 20);
    assert!(info["devices"][0]["allocated"].as_u64().unwrap() > 0);
}

#[test]
fn df_adds_up() {
    let rows = Image::of_pool().json(&["df"], &[], 0);
    let number = |name: &str| rows[0][name].as_u64().unwrap();
    let used = |kind: &str| rows[0][kind]["used"].as_u64().unwrap();
    assert!(used("data") >= 64 << 10, "{rows:#}");
    assert!(used("metadata") >= 3 * 16384, "{rows:#}");
    assert!(number("device_allocated") + number("unallocated") <= number("device_bytes"));
    assert_eq!(number("logical_bytes"), 192 << 10);
    assert!(rows[0]["compression_ratio"].as_f64().unwrap() > 2.0, "{rows:#}");
}

#[test]
fn a_file_is_found_by_path_and_by_number_and_shows_where_its_data_is() {
    let image = Image::of_pool();
    let noise = image.json(&["inspect", "file"], &["/dir/noise"], 0);
    assert_eq!(noise["attributes"]["size"], 64 << 10);
    let plain: Vec<&Value> = noise["extents"].as_array().unwrap().iter().collect();
    assert!(plain.iter().all(|extent| extent["kind"] == "plain"), "{noise:#}");
    let number = noise["inode"].to_string();
    assert_eq!(image.json(&["inspect", "file"], &[&number], 0), noise);
    let text = image.json(&["inspect", "file"], &["dir/text"], 0);
    assert_eq!(text["extents"][0]["kind"], "packed");
    let places = text["extents"][0]["places"].as_array().unwrap();
    assert!(places[0].as_str().unwrap().contains("/image@"));
}

#[test]
fn what_is_not_there_is_said_in_one_sentence() {
    let image = Image::of_pool();
    for (verb, name) in [("file", "/dir/nothing"), ("inode", "999999"), ("chain", "/no/where")] {
        cairn()
            .args(["inspect", verb])
            .arg(image.path())
            .arg(name)
            .assert()
            .code(1)
            .stdout("")
            .stderr(contains("there is no such").and(contains("\n").count(1)));
    }
}

#[test]
fn trees_list_their_items_in_order_and_at_most_as_many_as_wanted() {
    let image = Image::of_pool();
    let items = image.json(&["inspect", "tree"], &["--from", "1", "--count", "4"], 0);
    let list = items["list"].as_array().unwrap();
    assert_eq!(list.len(), 4);
    let kinds: Vec<&str> = list.iter().map(|item| item["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds[..3], ["INODE", "DIR_HASH", "DIR_ENTRY"]);
    assert_eq!(list[2]["value"]["name"], "dir");
    for tree in ["pool", "chunk", "space"] {
        let nodes = image.json(&["inspect", "tree"], &["--tree", tree, "--nodes"], 0);
        assert_eq!(nodes["tree"], tree);
        assert!(nodes["list"][0].get("broken").is_none(), "{nodes:#}");
    }
}

#[test]
fn the_chain_leads_from_the_superblock_to_the_inode_and_shows_where_it_breaks() {
    let image = Image::of_pool();
    let chain = image.json(&["inspect", "chain"], &["/dir/text"], 0);
    let steps = chain.as_array().unwrap();
    assert_eq!(steps[0]["block"], "superblock");
    assert_eq!(steps.last().unwrap()["kind"], "INODE");
    let leaf = &steps[steps.len() - 2];
    assert_eq!(leaf["state"], "verified");
    for place in leaf["places"].as_array().unwrap() {
        let (_, at) = place.as_str().unwrap().rsplit_once('@').unwrap();
        image.damage(at.parse().unwrap(), 100);
    }
    let inode = steps.last().unwrap()["object"].to_string();
    cairn()
        .args(["inspect", "chain"])
        .arg(image.path())
        .arg(inode)
        .assert()
        .code(1)
        .stderr(contains("do not match their checksum"));
    let nodes = image.json(&["inspect", "tree"], &["--nodes"], 4);
    assert!(nodes["list"].to_string().contains("broken"), "{nodes:#}");
}

#[test]
fn superblocks_are_shown_although_one_area_is_damaged() {
    let image = Image::of_pool();
    let whole = image.json(&["inspect", "superblock", "--all"], &[], 0);
    assert_eq!(whole["areas"].as_array().unwrap().len(), 2);
    image.damage(64 << 10, 128 << 10);
    let half = image.json(&["inspect", "superblock"], &[], 4);
    assert_eq!(half["newest"], whole["newest"]);
    assert!(half["areas"][0]["label"]["invalid"].is_string());
    let end = (64 << 20) - (128 << 10);
    image.damage(end, 128 << 10);
    cairn().args(["inspect", "superblock"]).arg(image.path()).assert().code(1);
    cairn().arg("info").arg(image.path()).assert().code(1).stderr(contains("not a cairn pool"));
}

#[test]
fn an_id_names_the_content_and_follows_its_changes() {
    let (image, copy) = (Image::of_pool(), Image::of_pool());
    let id = image.json(&["id"], &[], 0);
    assert_eq!(id["identity"], copy.json(&["id"], &[], 0)["identity"]);
    assert_eq!(id["inodes"], 4, "{id:#}");
    assert_eq!(id["complete"], true);
    let hex = id["identity"].as_str().unwrap();
    assert_eq!(hex.len(), 64);
    let line = format!("{hex}  {}\n", image.path().display());
    cairn().arg("id").arg(image.path()).assert().success().stdout(line).stderr("");

    let volume = open(&copy);
    let dir = volume.lookup(volume.root(), b"dir").unwrap().ino;
    let text = volume.lookup(dir, b"text").unwrap().ino;
    volume.write(text, 100_000, b"y", WriteFlags::default()).unwrap();
    volume.close().unwrap();
    drop(volume);
    assert_ne!(copy.json(&["id"], &[], 0)["identity"], id["identity"]);
}

#[test]
fn an_id_of_what_was_not_unmounted_says_that_the_log_is_not_counted() {
    let image = Image::of_pool();
    let volume = open(&image);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    volume.mkdir(volume.root(), b"new", mode::DIRECTORY | 0o755, &caller).unwrap();
    volume.sync().unwrap();
    volume.shutdown();
    drop(volume);
    assert_eq!(image.json(&["id"], &[], 4)["complete"], false);
    cairn().arg("id").arg(image.path()).assert().code(4).stderr(contains("was not unmounted"));
}

#[test]
fn an_id_of_damaged_data_is_refused() {
    let image = Image::of_pool();
    let noise = image.json(&["inspect", "file"], &["/dir/noise"], 0);
    let place = noise["extents"][0]["places"][0].as_str().unwrap().to_string();
    image.damage(place.rsplit_once('@').unwrap().1.parse().unwrap(), 100);
    let damaged = contains("do not match their checksum");
    cairn().arg("id").arg(image.path()).assert().code(1).stdout("").stderr(damaged);
}

#[test]
fn looking_changes_nothing() {
    let image = Image::of_pool();
    for words in [&["info"][..], &["df"], &["id"], &["inspect", "tree"], &["inspect", "superblock"]]
    {
        cairn().args(words).arg(image.path()).assert().success();
    }
    assert!(fs::read(image.path()).unwrap() == content());
}

#[test]
fn what_is_asked_for_as_json_is_answered_as_json_in_any_case() {
    let image = Image { dir: tempfile::tempdir().unwrap() };
    fs::write(image.path(), [0; 8192]).unwrap();
    for words in [
        &["info"][..],
        &["status"],
        &["df"],
        &["id"],
        &["device", "status"],
        &["scrub", "status"],
        &["subvolume", "list"],
        &["snapshot", "show"],
        &["inspect", "tree"],
    ] {
        let output = cairn().args(words).arg(image.path()).arg("--json").output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        let said = json["error"].as_str().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), format!("cairn: {said}\n"));
        let output = cairn().args(words).arg(image.path()).output().unwrap();
        assert!(output.stdout.is_empty(), "{words:?}");
    }
}

#[test]
fn directories_that_are_no_cairn_mounts_are_refused() {
    cairn().args(["df", "/proc"]).assert().code(1).stderr(contains("type proc, not cairn"));
    let dir = tempfile::tempdir().unwrap();
    cairn().arg("info").arg(dir.path()).assert().code(1).stderr(contains("is not a mount point"));
    for verb in ["sync", "trim"] {
        cairn().arg(verb).arg(dir.path()).assert().code(1).stderr(contains("is not a mount point"));
    }
    cairn().args(["trim", "/proc"]).assert().code(1).stderr(contains("type proc, not cairn"));
}

#[test]
fn what_is_on_no_mount_is_not_looked_through_for_equal_files() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let dedup = |words: &[&str], path: &Path| cairn().arg("dedup").args(words).arg(path).assert();
    dedup(&[], dir.path()).code(1).stderr(contains("not on a mounted cairn pool"));
    dedup(&["-n"], &dir.path().join("none")).code(1).stderr(contains("No such file"));
    dedup(&[], &link).code(1).stderr(contains("is a symbolic link, which is not followed"));
    for size in ["3K", "2K", "2M", "x"] {
        dedup(&["-b", size], dir.path()).code(2).stderr(contains("--block-size"));
    }
    let out = dedup(&["--json"], dir.path()).code(1).get_output().stdout.clone();
    let out: Value = serde_json::from_slice(&out).unwrap();
    assert!(out["error"].as_str().unwrap().contains("not on a mounted"), "{out}");
}

#[test]
fn a_call_in_the_manner_of_mount_is_pointed_to_the_helper() {
    cairn().args(["tank", "/", "-o", "ro"]).assert().code(1).stderr(contains("use mount.cairn"));
    cairn().args(["snapp"]).assert().code(2);
}

#[test]
fn manuals_and_completions_cover_every_command() {
    let dir = tempfile::tempdir().unwrap();
    cairn().arg("man").arg(dir.path()).assert().success();
    for page in ["cairn.8", "cairn-inspect-tree.8", "mkfs.cairn.8", "fsck.cairn.8"] {
        let text = fs::read_to_string(dir.path().join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(!dir.path().join("cairn-man.8").exists());
    let findings = fs::read_to_string(dir.path().join("cairn-errors.7")).unwrap();
    for rule in fs_core::check::findings::rules::TABLE {
        let entry = format!("\\fB{}\\fR (\\fI", rule.id.replace('-', "\\-"));
        assert_eq!(findings.matches(&entry).count(), 1, "{}", rule.id);
    }
    for shell in ["bash", "fish", "zsh"] {
        let all = contains("mkfs.cairn").and(contains("fsck.cairn")).and(contains("inspect"));
        cairn().args(["completions", shell]).assert().success().stdout(all);
    }
}

#[test]
fn counts_of_errors_are_shown_until_they_are_cleared() {
    let image = Image::of_pool();
    let noise = image.json(&["inspect", "file"], &["/dir/noise"], 0);
    let place = noise["extents"][0]["places"][0].as_str().unwrap().to_string();
    image.damage(place.rsplit_once('@').unwrap().1.parse().unwrap(), 100);
    let volume = open(&image);
    let dir = volume.lookup(volume.root(), b"dir").unwrap().ino;
    let file = volume.lookup(dir, b"noise").unwrap().ino;
    volume.read(file, 0, &mut [0; 4096]).unwrap_err();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    volume.mkdir(volume.root(), b"more", 0o755, &caller).unwrap();
    volume.close().unwrap();
    drop(volume);
    let said = contains("cairn clear");
    cairn().args(["status", "-x"]).arg(image.path()).assert().code(3).stdout(said);
    cairn().arg("clear").arg(image.path()).assert().code(0).stdout("");
    cairn().args(["status", "-x"]).arg(image.path()).assert().code(0).stdout("");
}

/// Properties of subvolumes of a pool that has `mail`, `mail/alice` and `mail@was`.
fn properties(pool: &str) {
    let run = |words: &[&str]| {
        let full = words.iter().map(|word| match word.strip_prefix("POOL") {
            Some(name) => format!("{pool}{name}"),
            None => word.to_string(),
        });
        cairn().args(full).assert()
    };
    let got = |words: &[&str]| {
        let run = run(words).success();
        let text = String::from_utf8_lossy(&run.get_output().stdout).into_owned();
        text.lines().map(|line| line.replacen(pool, "POOL", 1)).collect::<Vec<_>>()
    };
    run(&["set", "compression=zstd:5", "org:kind=mail", "POOL/mail"]).success();
    run(&["set", "readonly=on", "own-limit=3M", "POOL/mail/alice"]).success();
    let list = "compression,org:kind,own-limit,readonly,checksum";
    assert_eq!(
        got(&["get", "-H", "-p", list, "POOL/mail", "POOL/mail/alice"]),
        [
            "POOL/mail\tcompression\tzstd:5\tlocal",
            "POOL/mail\torg:kind\tmail\tlocal",
            "POOL/mail\town-limit\tnone\tdefault",
            "POOL/mail\treadonly\toff\tdefault",
            "POOL/mail\tchecksum\tcrc32c\tdefault",
            "POOL/mail/alice\tcompression\tzstd:5\tinherited from mail",
            "POOL/mail/alice\torg:kind\tmail\tinherited from mail",
            "POOL/mail/alice\town-limit\t3145728\tlocal",
            "POOL/mail/alice\treadonly\ton\tlocal",
            "POOL/mail/alice\tchecksum\tcrc32c\tdefault",
        ]
    );
    run(&["inherit", "compression", "POOL/mail"]).success();
    run(&["set", "readonly=inherit", "POOL/mail/alice"]).success();
    let is_default = |line: &String| line.ends_with("default");
    assert!(got(&["get", "-H", "compression", "POOL/mail"]).iter().all(is_default));
    assert!(got(&["get", "-H", "readonly", "POOL/mail/alice"]).iter().all(is_default));
    // A snapshot has the choices of its time, and only properties of users can be set.
    run(&["set", "org:note=kept", "POOL/mail@was"]).success();
    assert_eq!(
        got(&["get", "-H", "org:note,readonly,type", "POOL/mail@was"]),
        [
            "POOL/mail@was\torg:note\tkept\tlocal",
            "POOL/mail@was\treadonly\ton\t-",
            "POOL/mail@was\ttype\tsnapshot\t-",
        ]
    );
    run(&["set", "readonly=off", "POOL/mail@was"]).failure().stderr(contains("MODULE:NAME"));
    run(&["set", "checksum=md5", "POOL/mail"]).failure().stderr(contains("blake3"));
    run(&["set", "created=1", "POOL/mail"]).failure().stderr(contains("no property"));
    run(&["set", "org:kind=x", "POOL/none"]).failure().stderr(contains("no subvolume none"));
    run(&["get", "all", "POOL/none"]).failure().stderr(contains("there is no none"));
    run(&["get", "all"]).failure().stderr(contains("needs a name"));
    run(&["get", "all", "POOL/mail#mark"]).failure().stderr(contains("is a bookmark"));
    run(&["get", "compresion", "POOL/mail"]).failure().stderr(contains("compresion"));
    let output = run(&["get", "-j", "POOL/mail"]).success();
    let all: Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    let find = |name: &str| {
        let all = all["properties"].as_array().unwrap();
        all.iter().find(|row| row["property"] == name).unwrap().clone()
    };
    assert_eq!(find("org:kind")["source"], "local");
    assert!(find("referenced")["value"].is_u64());
}

#[test]
fn properties_come_before_paths_and_one_path_is_needed() {
    let run = |words: &[&str]| cairn().arg("set").args(words).assert().failure();
    run(&["compression=zstd", "checksum=blake3"]).stderr(contains("needs a path"));
    // The path is what is at fault here, not the second property.
    let words = ["compression=zstd", "checksum=blake3", "/proc/version"];
    run(&words).stderr(contains("/proc/version"));
    run(&["compression=zstd", "./checksum=blake3"]).stderr(contains("./checksum=blake3"));
}

#[test]
fn the_status_of_a_mirror_tells_which_device_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    let mut arguments = vec!["mkfs", "-q", "-b", "16M", "-L", "tank", "--profile", "mirror"];
    arguments.extend(paths.iter().map(|path| path.to_str().unwrap()));
    cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
    // The other device is found beside the one that is given.
    cairn().arg("status").arg(&paths[0]).assert().code(0).stdout(contains("state: online"));
    cairn().args(["status", "-x"]).arg(&paths[0]).assert().code(0).stdout("");
    let output = cairn().args(["info", "--json"]).arg(&paths[1]).output().unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(info["devices"].as_array().unwrap().len(), 2);
    fs::rename(&paths[1], dir.path().join("elsewhere")).unwrap();
    fs::create_dir(dir.path().join("away")).unwrap();
    fs::rename(dir.path().join("elsewhere"), dir.path().join("away/b")).unwrap();
    let said = contains("state: degraded").and(contains("device 1 (missing)"));
    cairn().args(["status", "-x"]).arg(&paths[0]).assert().code(3).stdout(said);
    cairn().arg("df").arg(&paths[0]).assert().code(0);
}

#[test]
fn a_device_that_was_replaced_while_it_was_away_is_left_out_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, c, away] = ["a", "b", "c", "sub/a"].map(|name| dir.path().join(name));
    let mut arguments = vec!["mkfs", "-q", "-b", "16M", "-L", "tank", "--profile", "mirror"];
    arguments.extend([a.to_str().unwrap(), b.to_str().unwrap()]);
    cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::rename(&a, &away).unwrap();
    fs::File::create(&c).unwrap().set_len(16 << 20).unwrap();
    cairn().args(["device", "replace"]).arg(&b).arg("0").arg(&c).assert().success();
    fs::rename(&away, &a).unwrap();
    // By itself it leads to the others.
    for given in [vec![&a], vec![&a, &b, &c]] {
        let online = contains("state: online").and(contains("missing").not());
        let warned = contains("was removed from this pool or replaced");
        cairn().arg("status").args(given).assert().code(0).stdout(online).stderr(warned);
    }
}

/// Opens the pool on one of its devices alone, and publishes so many groups. It waits for the
/// device: a program that another test starts has it open too, until it begins.
fn write_alone(path: &Path, groups: usize) {
    let options = OpenOptions::new(Access::ReadWrite);
    let device = FileDevice::open(path, options, &Wait::usual()).unwrap();
    let options = engine::OpenOptions { degraded: true, ..engine::OpenOptions::default() };
    let devices = vec![Arc::new(device) as DeviceRef];
    let engine = engine::open(devices, cairn_host::host_platform(), &options).unwrap();
    for _ in 0..groups {
        engine.want_commit();
        engine.commit().unwrap();
    }
    engine.close().unwrap();
}

#[test]
fn the_status_of_halves_that_were_both_written_is_split() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    let mut arguments = vec!["mkfs", "-q", "-b", "16M", "-L", "tank", "--profile", "mirror"];
    arguments.extend(paths.iter().map(|path| path.to_str().unwrap()));
    cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
    write_alone(&paths[0], 3);
    cairn().args(["status", "-x"]).arg(&paths[0]).assert().code(3);
    write_alone(&paths[1], 5);
    for path in &paths {
        let said = contains("state: split").and(contains("two halves"));
        cairn().args(["status", "-x"]).arg(path).assert().code(3).stdout(said);
    }
}

#[test]
fn a_scrub_of_a_pool_that_is_not_mounted_repairs_what_it_can_and_names_the_rest() {
    let image = Image::of_pool();
    let scrub = |code: i32| {
        let done = cairn().args(["scrub", "--offline"]).arg(image.path()).assert().code(code);
        String::from_utf8_lossy(&done.get_output().stdout).into_owned()
    };
    assert!(scrub(0).starts_with("scrub repaired 0 B in "));
    // An older superblock, which the second area has as well.
    image.damage((128 << 10) + 4096, 4096);
    let repaired = scrub(0);
    assert!(!repaired.starts_with("scrub repaired 0 B"), "{repaired}");
    let noise = image.json(&["inspect", "file"], &["/dir/noise"], 0);
    let place = noise["extents"][0]["places"][0].as_str().unwrap().to_string();
    image.damage(place.rsplit_once('@').unwrap().1.parse().unwrap(), 100);
    let named = scrub(3);
    assert!(named.contains("with 1 error on ") && named.contains("/dir/noise"), "{named}");
    let status = image.json(&["scrub", "status"], &[], 3);
    assert_eq!((&status["state"], &status["lost_count"]), (&"finished".into(), &1.into()));
    cairn().args(["status", "-x"]).arg(image.path()).assert().code(3).stdout(contains("scan: "));
    let said = contains("cairn scrub --offline");
    cairn().args(["scrub", "start"]).arg(image.path()).assert().code(1).stderr(said);
    cairn().arg("scrub").arg(image.path()).assert().code(2);
}

#[test]
fn a_new_name_that_begins_with_the_pool_is_refused_with_the_one_that_is_meant() {
    let image = Image::of_pool();
    let pool = image.path().display().to_string();
    let monday = format!("{pool}@monday");
    cairn().args(["snapshot", "create", &monday]).assert().success();
    let (whole, meant) = (format!("{pool}/home"), format!("home, not {pool}/home)"));
    let refused = contains(format!("(a new name is given without the pool: {meant}"));
    cairn().args(["snapshot", "clone", &monday, &whole]).assert().code(1).stderr(refused.clone());
    cairn().args(["snapshot", "clone", &monday, "home"]).assert().success();
    cairn().args(["subvolume", "rename", &whole, &whole]).assert().code(1).stderr(refused);
    let no_hint = contains("a new name").not();
    cairn().args(["snapshot", "clone", &monday, "home"]).assert().code(1).stderr(no_hint);
    for (old, new) in [("monday", "tuesday"), ("tuesday", "@friday")] {
        cairn().args(["snapshot", "rename", &format!("{pool}@{old}"), new]).assert().success();
    }
    let new = format!("{pool}@sunday");
    cairn().args(["snapshot", "rename", &format!("{pool}@friday"), &new]).assert().success();
    let other = format!("{pool}/home@sunday");
    let refused = contains("stays a snapshot of its subvolume");
    cairn().args(["snapshot", "rename", &new, &other]).assert().code(1).stderr(refused);
}

/// What versions share is looked at once, in the oldest.
#[test]
fn a_damaged_file_is_named_with_the_subvolume_or_snapshot_that_it_is_in() {
    let image = Image::of_pool();
    let pool = image.path().display().to_string();
    let noise = image.json(&["inspect", "file"], &["/dir/noise"], 0);
    let place = noise["extents"][0]["places"][0].as_str().unwrap().to_string();
    let monday = format!("{pool}@monday");
    cairn().args(["snapshot", "create", &monday]).assert().success();
    cairn().args(["snapshot", "clone", &monday, "home"]).assert().success();
    image.damage(place.rsplit_once('@').unwrap().1.parse().unwrap(), 100);
    let named = "damaged: @monday: dir/noise (subvolume ";
    cairn().args(["scrub", "--offline"]).arg(image.path()).assert().code(3).stdout(contains(named));
    let device =
        FileDevice::open(&image.path(), OpenOptions::new(Access::ReadOnly), &Wait::usual());
    let devices = vec![Arc::new(device.unwrap()) as DeviceRef];
    let options = CheckOptions::default();
    let checked = check(devices, cairn_host::host_platform(), &options, &Quiet).unwrap();
    let paths: Vec<_> = checked.findings.iter().map(|finding| finding.path.as_deref()).collect();
    assert_eq!(paths, [Some(&b"@monday: dir/noise"[..])]);
    let shown = checked.findings[0].to_string();
    assert!(shown.contains("; file @monday: dir/noise; tree "), "{shown}");
}

#[test]
fn subvolumes_and_snapshots_of_a_pool_that_is_not_mounted_are_made_shown_and_deleted() {
    let image = Image::of_pool();
    let pool = image.path().display().to_string();
    let run = |noun: &str, verb: &str, name: &str, rest: &[&str]| {
        let name = format!("{pool}{name}");
        let mut command = cairn();
        command.args([noun, verb]).arg(name).args(rest);
        command.assert()
    };
    let names = |noun: &str| -> Vec<String> {
        let output = cairn().args([noun, "list", "-j"]).arg(&pool).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        let name = |version: &Value| {
            let name = &version["name"];
            let part = |sign: &str, key: &str| {
                name[key].as_str().map_or(String::new(), |part| format!("{sign}{part}"))
            };
            format!("{}{}{}", part("", "subvolume"), part("@", "snapshot"), part("#", "bookmark"))
        };
        all.as_array().unwrap().iter().map(name).collect()
    };
    run("subvolume", "create", "/mail", &[]).success();
    run("subvolume", "create", "/mail", &[]).failure().stderr(contains("that name is taken"));
    run("subvolume", "create", "/mail/alice", &[]).success();
    run("snapshot", "create", "@first", &["-r"]).success();
    run("snapshot", "create", "/mail@second", &[]).success();
    run("snapshot", "bookmark", "/mail@second", &["mark"]).success();
    run("snapshot", "clone", "@first", &["work"]).success();
    assert_eq!(names("subvolume"), ["", "mail", "mail/alice", "work"]);
    let all = ["@first", "mail@first", "mail@second", "mail#mark", "mail/alice@first"];
    assert_eq!(names("snapshot"), all);
    run("snapshot", "hold", "@first", &["keep"]).success();
    run("snapshot", "delete", "@first", &[]).failure().stderr(contains("held"));
    run("snapshot", "release", "@first", &["keep"]).success();
    run("snapshot", "rollback", "/mail@first", &["--keep", "was"]).success();
    run("subvolume", "limit", "/mail", &[]).failure();
    run("subvolume", "limit", "/mail", &["--own", "0"]).failure().stderr(contains("none"));
    run("subvolume", "limit", "/mail", &["--referenced", "4M", "--own=2M"]).success();
    run("subvolume", "limit", "/mail", &["--own=none"]).success();
    run("subvolume", "show", "/mail", &[])
        .success()
        .stdout(contains("may refer to  4.00 MiB").and(contains("may have own").not()));
    properties(&image.path().to_string_lossy());
    run("snapshot", "rename", "/mail@was", &["/house@is"]).failure().stderr(contains("stays"));
    run("subvolume", "rename", "/mail", &["house"]).success();
    run("snapshot", "rename", "/house@was", &["is"]).success();
    run("subvolume", "set-default", "/work", &[]).success();
    run("subvolume", "delete", "/work", &[]).failure().stderr(contains("default"));
    run("subvolume", "set-default", "", &[]).success();
    run("subvolume", "delete", "/house", &[]).failure();
    let shown = run("subvolume", "show", "/house@is", &["-j"]).success();
    let shown: Value = serde_json::from_slice(&shown.get_output().stdout).unwrap();
    assert_eq!(shown["name"]["snapshot"], "is");
    let listed = run("snapshot", "list", "/house", &["-p", "-H"]).success();
    assert_eq!(String::from_utf8_lossy(&listed.get_output().stdout).lines().count(), 5);
    run("subvolume", "delete", "/house", &["-r"]).success();
    run("snapshot", "delete", "@first", &["-r"]).success();
    run("subvolume", "delete", "/work", &[]).success();
    run("subvolume", "delete", "/nothing", &[]).failure().stderr(contains("there is no subvolume"));
    assert_eq!((names("subvolume"), names("snapshot")), (vec![String::new()], vec![]));
    let volume = open(&image);
    assert_eq!(volume.engine().with_versions(|versions| versions.iter().count()), 1);
    volume.close().unwrap();
}

#[test]
fn a_reader_that_goes_away_ends_nothing_and_a_full_disk_is_told() {
    let image = Image::of_pool();
    let mut listing = std::process::Command::new(assert_cmd::cargo::cargo_bin("cairn"))
        .args(["completions", "bash"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(listing.stdout.take());
    let ended = listing.wait_with_output().unwrap();
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = std::process::Command::new(assert_cmd::cargo::cargo_bin("cairn"))
        .args(["df", "-j"])
        .arg(image.path())
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cannot be written"), "{ended:?}");
}

#[test]
fn what_changed_since_a_snapshot_is_shown_and_its_identity_stays() {
    let image = Image::of_pool();
    let name = |part: &str| format!("{}{part}", image.path().display());
    let run = |arguments: &[&str]| {
        let output = cairn().args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let identity = |part: &str| run(&["id", &name(part)])[..64].to_string();
    let before = identity("");
    run(&["snapshot", "create", &name("@first")]);
    let volume = open(&image);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let made = volume.mknod(volume.root(), b"new", mode::REGULAR | 0o644, 0, &caller).unwrap();
    volume.write(made.ino, 0, b"new", WriteFlags::default()).unwrap();
    volume.mkdir(volume.root(), b"later", 0o755, &caller).unwrap();
    volume.close().unwrap();
    drop(volume);
    assert_eq!(run(&["snapshot", "diff", &name("@first")]), "+  /new\n+  /later\n");
    run(&["snapshot", "create", &name("@second")]);
    let all = run(&["snapshot", "diff", "-j", &name("@second"), "@first"]);
    let all: Value = serde_json::from_str(&all).unwrap();
    assert_eq!((&all[0]["what"], &all[0]["path"]), (&"removed".into(), &"/new".into()));
    assert_eq!((identity("@first"), identity("@second")), (before, identity("")));
    assert_ne!(identity("@first"), identity("@second"));
    cairn().args(["id", &name("@third")]).assert().failure();
    cairn().args(["snapshot", "diff", &name("@third")]).assert().failure();
}

#[test]
fn what_is_sent_arrives_in_another_pool_or_nothing_does() {
    let (image, other) = (Image::of_pool(), Image::of_pool());
    let name = |part: &str| format!("{}{part}", image.path().display());
    let there = |part: &str| format!("{}{part}", other.path().display());
    let file = |name: &str| image.dir.path().join(name).display().to_string();
    let run = |arguments: &[&str]| {
        let output = cairn().args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let fails = |arguments: &[&str], why: &str| {
        cairn().args(arguments).assert().code(1).stderr(contains(why.to_string()));
    };
    let identity = |place: String| run(&["id", &place])[..64].to_string();
    run(&["snapshot", "create", &name("@first")]);
    let volume = open(&image);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let dir = volume.lookup(volume.root(), b"dir").unwrap().ino;
    volume.unlink(dir, b"noise").unwrap();
    volume.mkdir(volume.root(), b"later", 0o755, &caller).unwrap();
    volume.close().unwrap();
    drop(volume);
    run(&["snapshot", "create", &name("@second")]);
    let (one, two, all) = (&file("one"), &file("two"), &file("all"));
    run(&["send", &name("@first"), "-o", one]);
    run(&["send", "-i", "@first", &name("@second"), "-o", two]);
    run(&["send", "-R", &name("@second"), "-o", all]);
    assert!(fs::metadata(two).unwrap().len() < 3000);
    let streams: Value = serde_json::from_str(&run(&["stream", "show", "-j", all])).unwrap();
    assert_eq!(streams.as_array().unwrap().len(), 2);
    assert_eq!(streams[1]["identity"], identity(name("@second")));
    assert_eq!(streams[1]["base_identity"], identity(name("@first")));
    assert!(run(&["receive", "-n", "-i", one]).contains("first"));

    fails(&["receive", &there("/in"), "-i", two], "there is no subvolume in");
    fails(&["receive", &there(""), "-i", two], "there is no snapshot here");
    fails(&["send", &name("@third"), "-o", two], "there is no snapshot");
    fails(&["send", "-i", "@first", &name("@first"), "-o", "/dev/null"], "from itself");
    fails(&["receive", "-n", "-i", &name("")], "not a stream");
    run(&["send", "-i", "@first", &name("@second"), "-o", two]);
    let bytes = fs::read(one).unwrap();
    for spoilt in [&bytes[..bytes.len() - 1], &bytes[..5000], &[&bytes[..], b"x"].concat()] {
        fs::write(file("spoilt"), spoilt).unwrap();
        fails(&["receive", "-n", "-i", &file("spoilt")], "the stream");
    }
    fs::write(file("spoilt"), &bytes[..5000]).unwrap();
    fails(&["receive", &there("/in"), "-i", &file("spoilt")], "cut off");
    assert!(!run(&["subvolume", "list", &there("")]).contains("in\n"));

    run(&["receive", &there("/in"), "-i", one]);
    // What is there is passed over, as long as it is the same.
    run(&["receive", &there("/in"), "-i", one]);
    let whole = &file("whole");
    run(&["send", &name("@second"), "-o", whole]);
    fails(&["receive", &there("/in"), "-i", whole], "exists");
    run(&["receive", &there("/in"), "-i", two]);
    for snapshot in ["@first", "@second"] {
        let place = there(&format!("/in{snapshot}"));
        assert_eq!(identity(place), identity(name(snapshot)));
    }
    assert_eq!(identity(there("/in")), identity(name("@second")), "it follows");
    let received = run(&["receive", "-j", &there("/in/all"), "-i", all]);
    let received: Value = serde_json::from_str(&received).unwrap();
    assert_eq!(received["snapshots"][1]["name"], "in/all@second");
    // And what was received is sent on.
    run(&["send", "-i", "@first", &there("/in@second"), "-o", all]);
    assert_eq!(fs::metadata(all).unwrap().len(), fs::metadata(two).unwrap().len());
}

/// A pool with several groups, each of which has one more file; the groups with their files.
fn groups_of(image: &Image) -> Vec<(u64, Vec<String>)> {
    let volume = open(image);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let mut files = Vec::new();
    let groups = (0..6).map(|number| {
        let name = format!("file-{number}");
        let mode = mode::REGULAR | 0o644;
        let ino = volume.mknod(volume.root(), name.as_bytes(), mode, 0, &caller).unwrap().ino;
        volume.write(ino, 0, name.as_bytes(), WriteFlags::default()).unwrap();
        volume.sync().unwrap();
        files.push(name);
        (volume.engine().published().1.txg.0, files.clone())
    });
    let groups = groups.collect();
    volume.close().unwrap();
    groups
}

#[test]
fn older_groups_are_listed_and_looked_at_and_nothing_is_written() {
    let image = Image::of_pool();
    let known = groups_of(&image);
    let before = fs::read(image.path()).unwrap();
    let shown = image.json(&["history"], &[], 0);
    assert_eq!(shown["verified"], "all");
    let groups = shown["groups"].as_array().unwrap();
    assert_eq!(groups[0]["state"], "newest");
    assert!(groups.len() <= 16 && groups.iter().all(|group| group["txg"].is_u64()));
    let descend = groups.windows(2).all(|pair| pair[0]["txg"].as_u64() > pair[1]["txg"].as_u64());
    assert!(descend, "{groups:?}");
    for (txg, files) in &known {
        let group = groups.iter().find(|group| group["txg"] == *txg).unwrap();
        assert_eq!(group["state"], "whole", "{group}");
        assert!(group["written"].as_i64().unwrap() > 1_600_000_000);
        let number = txg.to_string();
        assert_eq!(image.json(&["info"], &["--txg", &number], 0)["txg"], *txg);
        let (last, next) = (files.last().unwrap(), format!("/file-{}", files.len()));
        let args = [&format!("/{last}")[..], "--txg", &number];
        image.json(&["inspect", "file"], &args, 0);
        let mut none = cairn();
        none.args(["inspect", "file"]).arg(image.path()).args([&next, "--txg", &number]);
        none.assert().code(1).stderr(contains("no such file"));
    }
    let trees = image.json(&["history"], &["--metadata-only"], 0);
    assert_eq!(trees["verified"], "metadata");
    let table = cairn().arg("history").arg(image.path()).assert().success();
    let table = String::from_utf8_lossy(&table.get_output().stdout).into_owned();
    assert!(table.starts_with("GROUP  PUBLISHED ") && table.contains("  whole\n"), "{table}");
    for words in [&["info"][..], &["inspect", "tree"]] {
        let said = contains("does not have its group 9999 any more; those that can be opened are");
        let mut command = cairn();
        command.args(words).arg(image.path()).args(["--txg", "9999"]);
        command.assert().code(1).stderr(said);
    }
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn a_damaged_newest_group_is_told_with_those_that_are_left() {
    let image = Image::of_pool();
    groups_of(&image);
    let nodes = image.json(&["inspect", "tree"], &["--tree", "pool", "--nodes"], 0);
    for place in nodes["list"][0]["places"].as_array().unwrap() {
        image.damage(place.as_str().unwrap().rsplit_once('@').unwrap().1.parse().unwrap(), 100);
    }
    let shown = image.json(&["history"], &[], 3);
    let groups = shown["groups"].as_array().unwrap();
    let states: Vec<_> = groups.iter().map(|group| group["state"].as_str().unwrap()).collect();
    // The last, which unmounting published, has the pool's tree of the one before.
    let gone = states.iter().take_while(|state| **state == "gone").count();
    assert!((1..=2).contains(&gone) && states[gone] == "whole", "{states:?}");
    assert!(shown["groups"][0]["reason"].as_str().unwrap().contains("checksum"));
}
