//! The command as fsck(8) and systemd see it.

use assert_cmd::Command;
use cairn_host::{Access, FileDevice, OpenOptions, Wait};
use clap::Parser;
use fs_core::check::findings::rules::TABLE;
use fs_core::check::Rule;
use fs_core::engine;
use fs_core::format::label::{label_areas, ring_slot};
use fs_core::format::superblock::Superblock;
use fs_core::platform::DeviceRef;
use predicates::prelude::*;
use predicates::str::contains;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BYTES: u64 = 16 << 20;

fn fsck() -> Command {
    Command::cargo_bin("fsck-cairn").unwrap()
}

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn empty() -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        File::create(image.path()).unwrap().set_len(BYTES).unwrap();
        image
    }

    /// An image of an empty pool, closed or as a crash would leave it.
    fn of_pool(clean: bool) -> Image {
        let image = Image::empty();
        let path = image.path();
        let arguments = ["mkfs", "-q", "-L", "tank", path.to_str().unwrap()];
        cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
        if !clean {
            image.reopen();
        }
        image
    }

    /// Clears the mark that the pool was closed.
    fn reopen(&self) {
        for slot in self.slots() {
            let mut superblock = Superblock::decode(&self.read(slot)).unwrap();
            superblock.clean = false;
            self.write(slot, &superblock.encode());
        }
    }

    /// Where superblocks are.
    fn slots(&self) -> Vec<u64> {
        let rings = label_areas(BYTES).unwrap();
        let slots = rings.iter().flat_map(|area| (0..16).map(|slot| ring_slot(*area, slot).0));
        slots.filter(|at| self.read(*at).iter().any(|b| *b != 0)).collect()
    }

    fn read(&self, at: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        File::open(self.path()).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path()).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

#[test]
fn wrong_arguments_exit_with_16() {
    fsck().assert().code(16).stderr(contains("DEVICE"));
    fsck().args(["-y", "-n", "x"]).assert().code(16);
    fsck().args(["-Q", "x"]).assert().code(16);
    fsck().arg("-V").assert().code(0).stdout(contains("fsck.cairn 0."));
}

#[test]
fn what_cannot_be_opened_exits_with_8() {
    fsck().arg("/nonexistent").assert().code(8).stderr(contains("No such file"));
    fsck().args(["-a", "/dev/null"]).assert().code(8).stderr(contains("neither a block device"));
}

#[test]
fn what_is_no_pool_exits_with_8() {
    let image = Image::empty();
    fsck().args(["-a"]).arg(image.path()).assert().code(8).stderr(contains("not a cairn pool"));
}

#[test]
fn a_preen_says_whether_the_pool_was_closed_and_tolerates_unknown_letters() {
    let clean = Image::of_pool(true);
    let before = fs::read(clean.path()).unwrap();
    fsck().args(["-a", "-T", "-C0"]).arg(clean.path()).assert().code(0).stdout("tank: clean\n");
    assert!(fs::read(clean.path()).unwrap() == before);
    let open = Image::of_pool(false);
    fsck().arg("-p").arg(open.path()).assert().code(0).stdout(contains("was not unmounted"));
}

#[test]
fn a_preen_finds_that_a_pool_cannot_be_mounted_though_its_labels_are_well() {
    let image = Image::of_pool(true);
    fsck().arg("-a").arg(image.path()).assert().code(0).stdout("tank: clean\n");
    let len = fs::metadata(image.path()).unwrap().len();
    let file = fs::File::options().write(true).open(image.path()).unwrap();
    // All that is between the labels.
    for at in (1..(len >> 20) - 1).map(|mib| mib << 20) {
        file.write_all_at(&[0; 1 << 20], at).unwrap();
    }
    // Though it was looked at a moment ago.
    let told = contains("cannot be mounted").and(contains("do not match their checksum"));
    fsck().arg("-a").arg(image.path()).assert().code(4).stdout("").stderr(told);
}

#[test]
fn a_pool_of_two_devices_is_looked_at_once() {
    let (_dir, paths) = mirror();
    let both = || fsck().arg("-a").args(&paths).assert().code(0);
    both().stdout("tank: clean\n");
    // By one of its devices, as fsck(8) calls it for a line of fstab, as root at least.
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    for path in paths.iter().filter(|_| is_root) {
        let told = contains("was looked at a moment ago");
        fsck().arg("-a").arg(path).assert().code(0).stdout(told);
    }
    let output = fsck().args(["-a", "--json"]).arg(&paths[1]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["pool"], &json["clean"], &json["closed"]),
        (&"tank".into(), &true.into(), &true.into())
    );
    // One that is missing is another state.
    fs::remove_file(&paths[1]).unwrap();
    let said = contains("device 1 is missing");
    fsck().arg("-a").arg(&paths[0]).assert().code(0).stdout("tank: clean\n").stderr(said);
}

#[test]
fn what_is_asked_for_as_json_is_answered_as_json_in_any_case() {
    let image = Image::empty();
    for arguments in [&["--json"][..], &["--json", "-a"]] {
        for path in [image.path(), image.dir.path().join("none")] {
            let output = fsck().args(arguments).arg(&path).output().unwrap();
            assert_eq!(output.status.code(), Some(8));
            let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            let said = [&json["error"], &json["notes"][0]];
            let said = said.iter().find_map(|text| text.as_str()).unwrap();
            assert!(said.contains(path.to_str().unwrap()), "{said}");
            assert!(String::from_utf8_lossy(&output.stderr).contains(said));
        }
    }
}

#[test]
fn a_preen_goes_on_with_one_label_and_ring_and_says_so() {
    let image = Image::of_pool(true);
    image.write(64 << 10, &[0; 128 << 10]);
    fsck()
        .arg("-a")
        .arg(image.path())
        .assert()
        .code(0)
        .stdout("tank: clean\n")
        .stderr(contains("one of the two labels is damaged"));
}

#[test]
fn a_pool_without_a_superblock_or_cut_off_exits_with_4() {
    let image = Image::of_pool(true);
    for slot in image.slots() {
        image.write(slot, &[1; 4096]);
    }
    fsck().arg("-a").arg(image.path()).assert().code(4).stderr(contains("superblocks"));
    let image = Image::of_pool(true);
    File::options().write(true).open(image.path()).unwrap().set_len(BYTES / 2).unwrap();
    fsck().arg("-a").arg(image.path()).assert().code(4).stderr(contains("cut off"));
}

#[test]
fn a_device_in_use_is_waited_for_and_then_named() {
    let image = Image::of_pool(true);
    let options = OpenOptions::new(Access::ReadWrite);
    let _user = FileDevice::open(&image.path(), options, &Wait::usual()).unwrap();
    fsck()
        .args(["-a", "--wait", "1"])
        .arg(image.path())
        .assert()
        .code(8)
        .stderr(contains("waiting for").and(contains("not released within 1 s")));
}

#[test]
fn a_sound_pool_passes_the_full_check_and_is_not_touched() {
    let image = Image::of_pool(true);
    let before = fs::read(image.path()).unwrap();
    for flags in [&["-n"][..], &["-fa"], &["-y"], &[]] {
        fsck().args(flags).arg(image.path()).assert().code(0).stdout(contains("no errors"));
    }
    let output = fsck().arg("--json").arg(image.path()).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["clean"], true);
    assert_eq!(json["inodes"], 1);
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn damage_is_named_and_left_also_when_repair_was_asked_for() {
    let image = Image::of_pool(true);
    let [first, _] = label_areas(BYTES).unwrap();
    image.write(first.0, &[0; 4096]);
    let before = fs::read(image.path()).unwrap();
    fsck().arg("-n").arg(image.path()).assert().code(4).stdout(contains("W-LABEL"));
    fsck()
        .arg("-y")
        .arg(image.path())
        .assert()
        .code(4)
        .stderr(contains("repair is not part of this version"));
    assert!(fs::read(image.path()).unwrap() == before);
}

#[test]
fn a_pool_whose_root_is_lost_is_a_finding_not_a_crash() {
    let image = Image::of_pool(true);
    let slot = image.slots()[0];
    let superblock = Superblock::decode(&image.read(slot)).unwrap();
    let root = superblock.pool_root.unwrap().addr;
    // Chunks lie where the first copies of both lie, and at the end; wipe all between the labels.
    assert!(root.0 > 0);
    image.write(1 << 20, &vec![0x5a; (BYTES - (1 << 20) - (128 << 10)) as usize]);
    fsck().arg("-f").arg(image.path()).assert().code(4).stdout(contains("loss"));
}

/// What a rule is for is that its damage is recognised, by this version and every later one.
#[test]
fn every_finding_has_a_damaged_image_that_shows_it() {
    let directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../images/damaged"));
    // An image is one device; the tests of several devices find these two.
    let several = ["W-DEVICE-MISSING", "W-DEVICE-BEHIND"];
    // And this is found in older groups only: see `of_an_older_group_it_is_told_what_...`.
    let past = ["W-OVERWRITTEN"];
    let is_alone = |rule: &&&Rule| !several.contains(&rule.id) && !past.contains(&rule.id);
    let alone: Vec<_> = TABLE.iter().filter(is_alone).collect();
    for rule in &alone {
        let packed = fs::read(directory.join(format!("{}.cairn.zst", rule.id)));
        let packed = packed.unwrap_or_else(|error| panic!("image of {}: {error}", rule.id));
        let image = Image::empty();
        image.write(0, &zstd::decode_all(&packed[..]).unwrap());
        let before = fs::read(image.path()).unwrap();
        let output = fsck().args(["-n", "--json"]).arg(image.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{}", rule.id);
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = json["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["id"] == rule.id);
        let finding = finding.unwrap_or_else(|| panic!("{} is not found: {json:#}", rule.id));
        assert_eq!(finding["severity"], rule.severity.name());
        assert!(fs::read(image.path()).unwrap() == before, "{}", rule.id);
    }
    let images = fs::read_dir(directory).unwrap().count();
    assert_eq!(images, alone.len(), "an image of no finding, or two of one");
}

#[test]
fn findings_of_labels_say_which_one_and_how_it_is_mended() {
    for (id, what) in [
        ("W-LABEL", "labels is missing, damaged or out of date: the one at the end is missing"),
        (
            "W-SUPERBLOCK-COPY",
            "superblock is missing, damaged or out of date: the one at the start",
        ),
    ] {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/damaged");
        let packed = fs::read(format!("{directory}/{id}.cairn.zst")).unwrap();
        let image = Image::empty();
        image.write(0, &zstd::decode_all(&packed[..]).unwrap());
        let mended = contains("; mounting the pool for writing writes it anew; on device 0");
        let said = contains(what).and(mended).and(contains("not a cairn pool").not());
        fsck().arg(image.path()).assert().code(4).stdout(said);
    }
}

#[test]
fn a_device_that_is_given_twice_is_checked_once() {
    let image = Image::of_pool(true);
    let link = image.dir.path().join("link");
    std::os::unix::fs::symlink(image.path(), &link).unwrap();
    let said = format!("{}: no errors\n", image.path().display());
    let paths = [&image.path(), &link, &image.path()];
    fsck().args(paths).assert().code(0).stdout(said);
}

#[test]
fn a_finding_names_device_and_byte_in_text_and_json() {
    let packed = include_bytes!("../../images/damaged/E-DATA.cairn.zst");
    let image = Image::empty();
    image.write(0, &zstd::decode_all(&packed[..]).unwrap());
    let output = fsck().arg("--json").arg(image.path()).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = &json["findings"][0];
    let place = &finding["places"][0];
    let name = image.path().display().to_string();
    assert_eq!((&finding["path"], &place["device"]), (&"/file".into(), &0.into()));
    assert_eq!(place["name"], name);
    // The damage is one flipped bit, and the rest of its sector has one value.
    let at = place["offset"].as_u64().unwrap();
    let sector = image.read(at);
    assert_eq!(sector.iter().filter(|byte| **byte != sector[0]).count(), 1);
    let text = "file /file; tree 256, object 0x3; logical address ";
    let place = format!("; on device 0 ({name}) byte {at}\n");
    fsck().arg(image.path()).assert().code(4).stdout(contains(text).and(contains(place)));
}

/// A pool named tank on two devices.
fn mirror() -> (tempfile::TempDir, [PathBuf; 2]) {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| dir.path().join(name));
    let mut arguments = vec!["mkfs", "-q", "-b", "16M", "-L", "tank", "--profile", "mirror"];
    arguments.extend(paths.iter().map(|path| path.to_str().unwrap()));
    cairn_mkfs::run(&cairn_mkfs::Arguments::parse_from(arguments)).unwrap();
    (dir, paths)
}

#[test]
fn the_other_devices_of_a_pool_are_found_or_missed() {
    let (_dir, paths) = mirror();
    fsck().arg(&paths[1]).assert().code(0);
    fsck().arg("-a").arg(&paths[1]).assert().code(0);
    fs::remove_file(&paths[0]).unwrap();
    fsck().arg(&paths[1]).assert().code(4).stdout(contains("W-DEVICE-MISSING"));
    // Whether it can do without is for the mount to say: a boot goes on.
    fsck().arg("-a").arg(&paths[1]).assert().code(0).stderr(contains("device 0 is missing"));
}

/// Opens the pool on one of its devices alone, and publishes so many groups.
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
fn a_boot_does_not_go_on_with_halves_that_were_both_written() {
    let (_dir, paths) = mirror();
    write_alone(&paths[0], 3);
    fsck().arg("-a").arg(&paths[0]).assert().code(0);
    write_alone(&paths[1], 5);
    for path in &paths {
        fsck().arg("-a").arg(path).assert().code(4).stderr(contains("two halves"));
    }
}

#[test]
fn of_an_older_group_it_is_told_what_was_given_up_and_what_is_damaged() {
    let image = Image::of_pool(true);
    let options = OpenOptions::new(Access::ReadWrite);
    let device = FileDevice::open(&image.path(), options, &Wait::usual()).unwrap();
    let devices = vec![Arc::new(device) as DeviceRef];
    let options = engine::OpenOptions::default();
    let engine = engine::open(devices, cairn_host::host_platform(), &options).unwrap();
    let mut roots = Vec::new();
    for _ in 0..3 {
        engine.want_commit();
        engine.commit().unwrap();
        let (roots_of, superblock) = engine.published();
        let residue = roots_of.residue.unwrap();
        let places = engine.store.pool.map(residue.addr, 4096).unwrap();
        let places: Vec<u64> = places.iter().map(|copy| copy[0].1 .0).collect();
        roots.push((superblock.txg.0, places));
    }
    engine.close().unwrap();
    drop(engine);
    let (txg, places) = &roots[0];
    let older = txg.to_string();
    let checked = |code: i32| {
        let output = fsck().args(["-n", "--json", "--txg", &older]).arg(image.path()).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let before = fs::read(image.path()).unwrap();
    assert_eq!(checked(0)["group"], *txg);
    assert!(fs::read(image.path()).unwrap() == before);
    places.iter().for_each(|at| image.write(*at, &[0x5a; 100]));
    let found = checked(4);
    assert_eq!(found["findings"][0]["id"], "W-OVERWRITTEN", "{found:#}");
    fsck().args(["-f", "-n"]).arg(image.path()).assert().code(0);
    let said = contains("of what this older group had and is overwritten since");
    fsck().args(["-n", "--txg", &older]).arg(image.path()).assert().code(4).stdout(said);
    let said = contains("does not have its group 9999 any more");
    fsck().args(["-n", "--txg", "9999"]).arg(image.path()).assert().code(8).stderr(said);
    fsck().args(["-a", "--txg", "1"]).arg(image.path()).assert().code(16);
}
