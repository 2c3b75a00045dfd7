//! The command as fsck(8) and systemd see it.

use assert_cmd::Command;
use cairn_host::{Access, FileDevice, OpenOptions, Wait};
use fs_core::format::chunk::{Chunk, ChunkKind, Profile, Stripe};
use fs_core::format::label::{label_areas, ring_slot, Label, LABEL_MAGIC};
use fs_core::format::superblock::Superblock;
use fs_core::format::FORMAT_VERSION;
use fs_core::units::{Logical, Physical, Txg};
use predicates::prelude::*;
use predicates::str::contains;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

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

    /// An image with labels and one superblock.
    fn of_pool(clean: bool) -> Image {
        let image = Image::empty();
        for area in label_areas(BYTES).unwrap() {
            image.write(area.0, &label().encode());
            image.write(ring_slot(area, 7).0, &superblock(clean).encode());
        }
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(self.path()).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

fn label() -> Label {
    let mut name = [0; 64];
    name[..4].copy_from_slice(b"tank");
    Label {
        magic: LABEL_MAGIC,
        version: FORMAT_VERSION,
        sector_bytes: 4096,
        pool_id: [7; 16],
        device_id: [8; 16],
        device_index: 0,
        reserved0: [0; 6],
        device_bytes: BYTES,
        name,
        written: 1,
        sequence: 1,
        reserved: fs_core::format::Skipped::ZEROS,
        checksum: [0; 32],
    }
}

fn superblock(clean: bool) -> Superblock {
    Superblock {
        txg: Txg(7),
        written: 1,
        pool_id: [7; 16],
        features: [0; 3],
        hash_secret: [1; 16],
        node_bytes: 16384,
        device_count: 1,
        data_profile: Profile::Single,
        metadata_profile: Profile::Single,
        clean,
        next_chunk: Logical(2 << 20),
        chunk_bytes: 1 << 20,
        next_subvol: 257,
        default_subvol: 256,
        pool_root: None,
        chunk_root: None,
        space_root: None,
        refs_root: None,
        dead_root: None,
        residue: None,
        log: None,
        data_used: 0,
        metadata_used: 0,
        system_chunks: vec![Chunk {
            logical: Logical(1 << 20),
            length: 1 << 20,
            birth: Txg(1),
            kind: ChunkKind::System,
            profile: Profile::Single,
            stripes: vec![Stripe { device: 0, physical: Physical(1 << 20) }],
        }],
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
    for area in label_areas(BYTES).unwrap() {
        image.write(ring_slot(area, 7).0, &[1; 4096]);
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
    let _user = FileDevice::open(&image.path(), options, &Wait::none()).unwrap();
    fsck()
        .args(["-a", "--wait", "1"])
        .arg(image.path())
        .assert()
        .code(8)
        .stderr(contains("waiting for").and(contains("not released within 1 s")));
}
