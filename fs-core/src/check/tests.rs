//! A sound pool is clean, and each rule has a pool that breaks it.

use super::findings::rules::{self, TABLE};
use super::forge::{Built, Forge, Items, SECRET, SUBVOL, TXG};
use super::*;
use crate::engine::versions::VersionOp;
use crate::engine::OpenOptions;
use crate::error::Errno;
use crate::format::chunk::{DeviceItem, Profile};
use crate::format::dead::{key as dead_key, DeadHeader, DeadRef, Part};
use crate::format::dir::{encode_cookies, name_hash, Entry};
use crate::format::extent::Extent;
use crate::format::features;
use crate::format::inode::{mode, LinkItem};
use crate::format::key::kind;
use crate::format::label::{label_areas, ring_slot};
use crate::format::node::VALUE_BYTES_MAX;
use crate::format::pool::{encode_user, property, Settings, INO_MAX, ROOT_INO};
use crate::format::ptr::CompressionKind;
use crate::format::space::RefItem;
use crate::format::superblock::LogStart;
use crate::format::DiskField;
use crate::units::{Ino, Physical, SECTOR_BYTES};
use crate::vfs::{AccessTime, Caller, Filesystem, Volume};
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec;

fn check_built(built: &Built) -> CheckReport {
    let devices = vec![built.device.device()];
    let options = CheckOptions::default();
    check(devices, built.platform.platform.clone(), &options, &Quiet).unwrap()
}

fn ids(report: &CheckReport) -> BTreeSet<&'static str> {
    report.findings.iter().map(|finding| finding.id).collect()
}

fn text(report: &CheckReport) -> alloc::string::String {
    report.findings.iter().map(|finding| format!("{finding}\n")).collect()
}

/// Something to do to a pool before or after it is written.
enum Damage {
    Before(fn(&mut Forge)),
    After(fn(&Built)),
    /// After, on a pool with two copies of data.
    AfterDup(fn(&Built)),
}
use Damage::{After, AfterDup, Before};

fn build(damage: &Damage) -> Built {
    let profile = match damage {
        AfterDup(_) => Profile::Dup,
        _ => Profile::Single,
    };
    let mut forge = Forge::sound(profile);
    if let Before(change) = damage {
        change(&mut forge);
    }
    let built = forge.build();
    if let After(change) | AfterDup(change) = damage {
        change(&built);
    }
    built
}

fn report_of(damage: &Damage) -> CheckReport {
    check_built(&build(damage))
}

/// Flips a bit in some copies of a block.
fn flip(built: &Built, addr: Logical, copies: &[usize]) {
    let places = built.pool.map(addr, SECTOR_BYTES).unwrap();
    copies.iter().for_each(|copy| built.device.flip(places[*copy][0].1 .0 + 100));
}

fn space_key(forge: &Forge, kind: ChunkKind) -> Key {
    let chunk = forge.chunks.iter().find(|chunk| chunk.kind == kind).unwrap();
    Key::new(chunk.logical.0, kind::SPACE_BITMAP, 0)
}

fn each_value<T: DiskField>(items: &mut Items, kind: u8, change: impl Fn(&mut T)) {
    for (_, value) in items.iter_mut().filter(|(key, _)| key.kind == kind) {
        let mut item = T::get(value);
        change(&mut item);
        item.put(value);
    }
}

/// Takes an extent out of a file with its bytes in sums.
fn drop_extent(forge: &mut Forge, ino: u64, at: u64) {
    let value = forge.subvol.remove(&Key::new(ino, kind::EXTENT, at)).unwrap();
    let (extent, _) = Extent::decode(&value, at, TXG).unwrap();
    forge.item.logical_bytes -= extent.len();
    if let Extent::Plain { len, .. } = extent {
        forge.item.stored_bytes -= len;
        forge.edit(ino, |inode| inode.stored_bytes -= len);
    }
}

fn first_plain(forge: &Forge, ino: u64) -> Extent {
    Extent::decode(&forge.subvol[&Key::new(ino, kind::EXTENT, 0)], 0, TXG).unwrap().0
}

/// For each rule, a way to break it.
const DAMAGES: &[(&Rule, Damage)] = &[
    (&rules::LABEL, After(|built| built.device.flip(label_areas(16 << 20).unwrap()[1].0 + 9))),
    (
        &rules::SUPERBLOCK_COPY,
        After(|built| {
            let area = label_areas(16 << 20).unwrap()[0];
            built.device.flip(ring_slot(area, TXG.0).0 + 700);
        }),
    ),
    (
        &rules::SUPERBLOCK_USAGE,
        Before(|forge| forge.change_superblock = Box::new(|superblock| superblock.data_used = 0)),
    ),
    (&rules::BLOCK, After(|built| flip(built, built.superblock.pool_root.unwrap().addr, &[0, 1]))),
    (
        &rules::BLOCK_COPY,
        After(|built| flip(built, built.superblock.pool_root.unwrap().addr, &[1])),
    ),
    (
        // The chunk tree's root as the root of the reference tree: another kind of chunk, and
        // another tree.
        &rules::NODE_PLACE,
        Before(|forge| {
            forge.change_superblock = Box::new(|s| s.refs_root = s.chunk_root);
        }),
    ),
    (
        &rules::ITEM_KIND,
        Before(|forge| {
            forge.subvol.insert(Key::new(3, 0x77, 0), vec![1]);
        }),
    ),
    (
        &rules::ITEM,
        Before(|forge| {
            forge.subvol.insert(Key::new(3, kind::LINK, 1), vec![1]);
        }),
    ),
    (
        &rules::CHUNK_OVERLAP,
        Before(|forge| {
            forge.change_chunks = Box::new(|items| {
                let mut of_kind = items.iter().filter(|(key, _)| key.kind == kind::CHUNK);
                let (key, value) = of_kind.next_back().unwrap();
                // One more chunk where the last one is.
                let key = Key::new(key.object + (1 << 20), kind::CHUNK, 0);
                let value = value.clone();
                items.insert(key, value);
            });
            forge.change_superblock = Box::new(|superblock| superblock.next_chunk.0 += 1 << 20);
        }),
    ),
    (
        &rules::CHUNK_NEXT,
        Before(|forge| {
            forge.change_superblock = Box::new(|superblock| superblock.next_chunk.0 -= 1 << 20);
        }),
    ),
    (
        &rules::CHUNK_SYSTEM,
        Before(|forge| {
            forge.change_superblock =
                Box::new(|superblock| superblock.system_chunks[0].birth = Txg(1));
        }),
    ),
    (
        &rules::DEVICE_ITEM,
        Before(|forge| {
            forge.change_chunks = Box::new(|items| {
                each_value::<DeviceItem>(items, kind::DEVICE, |item| item.id[0] ^= 1);
            });
        }),
    ),
    (
        &rules::DEVICE_ALLOCATED,
        Before(|forge| {
            forge.change_chunks = Box::new(|items| {
                each_value::<DeviceItem>(items, kind::DEVICE, |item| item.allocated -= 4096);
            });
        }),
    ),
    (
        &rules::SPACE_SHARED,
        Before(|forge| forge.change_superblock = Box::new(|s| s.dead_root = s.pool_root)),
    ),
    (
        &rules::SPACE_UNMAPPED,
        Before(|forge| {
            let Extent::Plain { len, checksum_kind, checksums, .. } = first_plain(forge, 3) else {
                panic!("plain");
            };
            let addr = Logical(1 << 40);
            let lost = Extent::Plain { addr, len, checksum_kind, checksums };
            drop_extent(forge, 3, 0);
            forge.extent(3, 0, &lost);
        }),
    ),
    (
        &rules::SPACE_IN_USE,
        Before(|forge| {
            let key = space_key(forge, ChunkKind::Data);
            forge.change_space = Box::new(move |items| items.get_mut(&key).unwrap()[0] &= !2);
        }),
    ),
    (
        &rules::SPACE_LEAK,
        Before(|forge| {
            let key = space_key(forge, ChunkKind::Data);
            forge.change_space = Box::new(move |items| items.get_mut(&key).unwrap()[20] |= 4);
        }),
    ),
    (
        &rules::SPACE_ITEM,
        Before(|forge| {
            forge.change_space = Box::new(|items| {
                items.insert(Key::new(1 << 40, kind::SPACE_BITMAP, 0), vec![0; 32]);
            });
        }),
    ),
    (
        &rules::SPACE_SUMMARY,
        Before(|forge| {
            forge.change_space = Box::new(|items| {
                items.retain(|key, _| key.kind != kind::SPACE_SUMMARY);
            });
        }),
    ),
    (
        &rules::SPACE_RESIDUE,
        Before(|forge| {
            forge.change_residue = Box::new(|residue| {
                let run = residue.taken[0];
                residue.freed.push(Run { addr: run.end(), bytes: SECTOR_BYTES });
            });
        }),
    ),
    (
        &rules::REF_COUNT,
        Before(|forge| each_value::<RefItem>(&mut forge.refs, kind::REF, |item| item.extra = 2)),
    ),
    (
        &rules::REF_OVERLAP,
        Before(|forge| {
            let (key, value) = forge.refs.first_key_value().unwrap();
            let key = Key::new(key.object + SECTOR_BYTES, kind::REF, 0);
            let value = value.clone();
            forge.refs.insert(key, value);
        }),
    ),
    (
        &rules::SUBVOL_ID,
        Before(|forge| forge.change_superblock = Box::new(|s| s.next_subvol = SUBVOL.0)),
    ),
    (
        &rules::SUBVOL_DEFAULT,
        Before(|forge| forge.change_superblock = Box::new(|s| s.default_subvol = 999)),
    ),
    (&rules::SUBVOL_SUMS, Before(|forge| forge.item.logical_bytes += 1)),
    (&rules::SUBVOL_NEXT_INO, Before(|forge| forge.item.next_ino = 9)),
    (
        &rules::DEAD_LIST,
        Before(|forge| {
            let run = Run { addr: Logical(SECTOR_BYTES), bytes: SECTOR_BYTES };
            let entry = DeadRef { birth: Txg(1), run, is_node: false };
            let bytes = SECTOR_BYTES;
            let header = DeadHeader { entries: 1, bytes, last_part: 0, reserved: 0 };
            let part = Part { header: Some(header), refs: vec![entry] };
            forge.dead.insert(dead_key(1, Txg(1), 0).unwrap(), part.encode());
        }),
    ),
    (
        &rules::VERSION_PARENT,
        Before(|forge| (forge.item.parent, forge.item.snapshot_txg) = (999, 1)),
    ),
    (
        &rules::VERSION,
        Before(|forge| {
            forge.pool_tree.insert(Key::new(SUBVOL.0, kind::NAME, 0), b"name".to_vec());
        }),
    ),
    (
        &rules::INODE_MISSING,
        Before(|forge| {
            forge.subvol.remove(&Forge::key(5));
        }),
    ),
    (&rules::INODE_FIELD, Before(|forge| forge.edit(3, |inode| inode.rdev = 7))),
    (
        &rules::ROOT_MISSING,
        Before(|forge| {
            forge.subvol.remove(&Forge::key(ROOT_INO));
        }),
    ),
    (&rules::LINK_COUNT, Before(|forge| forge.edit(3, |inode| inode.nlink = 3))),
    (&rules::LINK_ITEMS, Before(|forge| forge.edit(3, |inode| inode.links = 0))),
    (
        &rules::LINK_KEY,
        Before(|forge| {
            let key = *forge.subvol.keys().find(|key| key.kind == kind::LINK).unwrap();
            let value = forge.subvol.remove(&key).unwrap();
            forge.subvol.insert(Key::new(3, kind::LINK, key.offset ^ 1), value);
        }),
    ),
    (
        &rules::ORPHAN_LISTED,
        Before(|forge| {
            forge.subvol.insert(Key::new(0, kind::ORPHAN, 3), vec![]);
        }),
    ),
    (
        &rules::ORPHAN_UNLISTED,
        Before(|forge| {
            forge.subvol.remove(&Key::new(0, kind::ORPHAN, 9));
        }),
    ),
    (
        &rules::NAME_NO_INODE,
        Before(|forge| {
            forge.subvol.remove(&Forge::key(7));
        }),
    ),
    (&rules::NAME_TYPE, Before(|forge| forge.edit(7, |inode| inode.mode = mode::BLOCK))),
    (
        &rules::NAME_BACKLINK,
        Before(|forge| {
            forge.edit(6, |inode| (inode.parent, inode.parent_cookie) = (0, 0));
        }),
    ),
    (&rules::BACKLINK_NAME, Before(|forge| forge.edit(6, |inode| inode.parent_cookie += 100))),
    (
        &rules::NAME_HASH,
        Before(|forge| {
            forge.subvol.remove(&Forge::hash_key(ROOT_INO, b"file"));
        }),
    ),
    (
        &rules::HASH_NAME,
        Before(|forge| {
            let key = Forge::hash_key(ROOT_INO, b"ghost");
            forge.subvol.insert(key, encode_cookies(&[99]));
        }),
    ),
    (
        &rules::NAME_TWICE,
        Before(|forge| {
            forge.name(2, b"inner", 6);
        }),
    ),
    (&rules::NAME_COOKIE, Before(|forge| forge.edit(2, |inode| inode.next_cookie = 4))),
    (&rules::DIR_COUNT, Before(|forge| forge.edit(2, |inode| inode.entries += 1))),
    (
        // A directory whose only name is in itself.
        &rules::DIR_LOOP,
        Before(|forge| {
            forge.inode(20, mode::DIRECTORY);
            forge.name(20, b"self", 20);
            forge.edit(20, |inode| inode.nlink = 3);
        }),
    ),
    (
        &rules::EXTENT_OVERLAP,
        Before(|forge| {
            forge.extent(3, SECTOR_BYTES, &Extent::Promised { len: SECTOR_BYTES });
        }),
    ),
    (&rules::EXTENT_SIZE, Before(|forge| forge.edit(3, |inode| inode.size = SECTOR_BYTES))),
    (&rules::EXTENT_INLINE, Before(|forge| forge.edit(6, |inode| inode.size = 3))),
    (&rules::EXTENT_SUMS, Before(|forge| forge.edit(5, |inode| inode.stored_bytes += 4096))),
    (
        &rules::BLOB_WINDOW,
        Before(|forge| {
            let key = Key::new(5, kind::EXTENT, 2 * SECTOR_BYTES);
            let (extent, _) = Extent::decode(&forge.subvol[&key], key.offset, TXG).unwrap();
            let Extent::Packed { mut blob, offset, len } = extent else { panic!("packed") };
            blob.stored -= 1;
            let other = Extent::Packed { blob, offset, len };
            forge.subvol.insert(key, other.encode(TXG));
        }),
    ),
    (
        &rules::DATA,
        After(|built| {
            let data = built.pool.chunks().into_iter().find(|c| c.kind == ChunkKind::Data);
            flip(built, Logical(data.unwrap().logical.0 + SECTOR_BYTES), &[0]);
        }),
    ),
    (
        &rules::DATA_COPY,
        AfterDup(|built| {
            let data = built.pool.chunks().into_iter().find(|c| c.kind == ChunkKind::Data);
            flip(built, Logical(data.unwrap().logical.0 + SECTOR_BYTES), &[1]);
        }),
    ),
    (&rules::SYMLINK, Before(|forge| forge.edit(4, |inode| inode.size = 5))),
    (
        &rules::XATTR_HASH,
        Before(|forge| {
            let key = Key::new(3, kind::XATTR, name_hash(&SECRET, b"user.small"));
            let value = forge.subvol.remove(&key).unwrap();
            forge.subvol.insert(Key { offset: key.offset ^ 1, ..key }, value);
        }),
    ),
    (&rules::XATTR_HINT, Before(|forge| forge.edit(3, |inode| inode.xattr_hint = 0))),
    (
        &rules::XATTR_PARTS,
        Before(|forge| {
            forge.subvol.remove(&Key::new(3, kind::XATTR_PART, 1 << 8 | 1));
        }),
    ),
    (
        &rules::LOG,
        Before(|forge| {
            let segment = Run { addr: Logical(1 << 40), bytes: 1 << 20 };
            let log = LogStart { segment, offset: 0, sequence: 1, chain: [0; 32] };
            forge.change_superblock = Box::new(move |superblock| superblock.log = Some(log));
        }),
    ),
    (&rules::INCOMPLETE, After(|b| flip(b, b.superblock.space_root.unwrap().addr, &[0, 1]))),
];

#[test]
fn nothing_is_wrong_with_a_sound_pool() {
    for profile in [Profile::Single, Profile::Dup] {
        let report = check_built(&Forge::sound(profile).build());
        assert!(report.is_clean(), "{}", text(&report));
        let stats = report.stats;
        assert_eq!((stats.subvols, stats.inodes, stats.names), (1, 9, 8));
        assert!(stats.data_bytes >= 4 * SECTOR_BYTES && stats.nodes >= 5);
    }
}

#[test]
fn every_rule_that_is_broken_is_found() {
    for (rule, damage) in DAMAGES {
        let report = report_of(damage);
        assert!(ids(&report).contains(rule.id), "{}:\n{}", rule.id, text(&report));
    }
}

#[test]
fn every_rule_has_a_pool_that_breaks_it() {
    let broken: BTreeSet<&str> = DAMAGES.iter().map(|(rule, _)| rule.id).collect();
    let all: BTreeSet<&str> = TABLE.iter().map(|rule| rule.id).collect();
    assert_eq!(all.len(), TABLE.len(), "an id is there twice");
    // Pools here have one device; see `devices_that_are_missing_or_behind_are_told`.
    let several = [rules::DEVICE_MISSING.id, rules::DEVICE_BEHIND.id];
    // And one group; see the tests of `engine::past`.
    let past = [rules::OVERWRITTEN.id];
    let others = several.into_iter().chain(past);
    assert_eq!(broken.into_iter().chain(others).collect::<BTreeSet<&str>>(), all);
}

/// Writes `images/damaged`: an image for each rule, but never over one that is there. Run with
/// `cargo test -p fs-core --lib -- --ignored images_of_damage`. The tests of `fsck` check them.
#[test]
#[ignore = "writes into the checkout"]
fn images_of_damage_are_written() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/damaged");
    std::fs::create_dir_all(directory).unwrap();
    for (rule, damage) in DAMAGES {
        let path = format!("{directory}/{}.cairn.zst", rule.id);
        if !std::path::Path::new(&path).exists() {
            let packed = zstd::encode_all(&build(damage).device.image()[..], 19).unwrap();
            std::fs::write(path, packed).unwrap();
        }
    }
}

#[test]
fn findings_about_blocks_name_every_copy_and_those_about_a_copy_that_one() {
    let places = |finding: &Finding| -> Vec<_> {
        finding.places.iter().map(|place| (place.device, place.at)).collect()
    };
    for (rule, profile, change) in DAMAGES.iter().filter_map(|(rule, damage)| match damage {
        After(change) => Some((*rule, Profile::Single, change)),
        AfterDup(change) => Some((*rule, Profile::Dup, change)),
        Before(_) => None,
    }) {
        let built = Forge::sound(profile).build();
        let before = built.device.image();
        change(&built);
        let after = built.device.image();
        // Which sectors are damaged is known: those that are not what they were.
        let differs = |at: &usize| before[*at..][..4096] != after[*at..][..4096];
        let damaged: Vec<_> = (0..before.len()).step_by(4096).filter(differs).collect();
        let damaged: Vec<_> = damaged.into_iter().map(|at| (0, Physical(at as u64))).collect();
        let report = check_built(&built);
        let finding = report.findings.iter().find(|finding| finding.id == rule.id).unwrap();
        if *rule == rules::INCOMPLETE {
            assert!(finding.places.is_empty());
            continue;
        }
        assert_eq!(places(finding), damaged, "{}", text(&report));
        let Physical(at) = damaged[0].1;
        let shown = format!("{finding}");
        assert!(shown.contains(&format!("; on device 0 (ram) byte {at}")), "{shown}");
    }
}

#[test]
fn what_is_in_no_chunk_is_on_no_device() {
    let lost = report_of(&DAMAGES.iter().find(|d| *d.0 == rules::SPACE_UNMAPPED).unwrap().1);
    let finding = lost.findings.iter().find(|f| f.id == rules::SPACE_UNMAPPED.id).unwrap();
    assert!(finding.spot.addr.is_some() && finding.places.is_empty(), "{finding}");
}

#[test]
fn a_single_wrong_field_is_a_single_finding() {
    let only = [
        &rules::SUPERBLOCK_COPY,
        &rules::BLOCK_COPY,
        &rules::REF_COUNT,
        &rules::SUBVOL_SUMS,
        &rules::LINK_COUNT,
        &rules::LINK_ITEMS,
        &rules::DIR_COUNT,
        &rules::DATA,
        &rules::DATA_COPY,
        &rules::SYMLINK,
        &rules::XATTR_HINT,
        &rules::EXTENT_SUMS,
    ];
    for (rule, damage) in DAMAGES.iter().filter(|(rule, _)| only.contains(rule)) {
        let report = report_of(damage);
        assert_eq!(report.findings.len(), 1, "{}:\n{}", rule.id, text(&report));
    }
}

#[test]
fn properties_that_are_not_as_they_must_be_are_found() {
    let key = |id: u64| Key::new(id, kind::PROPERTY, property::USER);
    let good = encode_user(&[(b"a:b".to_vec(), b"c".to_vec())].into_iter().collect());
    let found = |declared: bool, change: &dyn Fn(&mut Forge)| {
        let mut forge = Forge::sound(Profile::Single);
        if declared {
            forge.change_superblock = Box::new(|s| s.features[2] |= features::PROPERTIES);
        }
        change(&mut forge);
        let report = check_built(&forge.build());
        report.findings.iter().map(|finding| finding.id).collect::<Vec<_>>()
    };
    let with = |key: Key, value: &[u8]| {
        found(true, &|forge| drop(forge.pool_tree.insert(key, value.to_vec())))
    };
    let choose = |declared: bool, settings: Settings| {
        found(declared, &|forge| forge.item.set_settings(settings))
    };
    let own = Settings { compression: 2, level: -7, checksum: 3, read_only: 2, access_time: 3 };
    assert!(choose(true, own).is_empty() && with(key(SUBVOL.0), &good).is_empty());
    assert_eq!(choose(false, own), [rules::VERSION.id]);
    let undeclared =
        found(false, &|forge| drop(forge.pool_tree.insert(key(SUBVOL.0), good.clone())));
    assert_eq!(undeclared, [rules::VERSION.id]);
    for bad in [
        Settings { compression: 3, ..own },
        Settings { level: 20, ..own },
        Settings { level: -8, ..own },
        Settings { compression: 1, ..own },
        Settings { checksum: 4, ..own },
        Settings { read_only: 3, ..own },
        Settings { access_time: 4, ..own },
    ] {
        assert!(choose(true, bad).contains(&rules::ITEM.id), "{bad:?}");
    }
    let long = [&[255][..], &[b'a'; 254], b":", &[0xff, 0x0f], &[b'x'; 4095]].concat();
    for bad in [
        &b""[..],
        &good[..good.len() - 1],
        &[&good[..], &good].concat(),
        b"\x03A:b\x01\0c",
        b"\x03abc\x01\0c",
        b"\x00\x01\0c",
        b"\x03a:b\x01\0\xff",
        b"\x03a:b\x01\0\n",
        b"\x03a:b\xff\xffc",
        &long[..VALUE_BYTES_MAX],
    ] {
        assert!(with(key(SUBVOL.0), bad).contains(&rules::ITEM.id), "{bad:?}");
    }
    // Of nothing that is there; and of no kind that there is.
    assert!(with(key(999), &good).contains(&rules::ITEM.id));
    assert_eq!(with(Key { offset: 6, ..key(SUBVOL.0) }, &good), [rules::ITEM_KIND.id]);
}

#[test]
fn findings_name_the_path_of_the_file() {
    let report = report_of(&Before(|forge| forge.edit(8, |inode| inode.rdev = 1)));
    let paths: Vec<_> = report.findings.iter().map(|f| f.path.as_deref().unwrap()).collect();
    assert_eq!(paths, [b"/dir/inner"]);
    let report = report_of(&Before(|forge| forge.edit(9, |inode| inode.rdev = 1)));
    assert_eq!(report.findings[0].path.as_deref(), Some(&b"/#9"[..]));
}

#[test]
fn damaged_data_is_named_by_its_place_in_the_file() {
    let report = report_of(&After(|built| {
        let data = built.pool.chunks().into_iter().find(|c| c.kind == ChunkKind::Data).unwrap();
        flip(built, Logical(data.logical.0 + 2 * SECTOR_BYTES), &[0]);
    }));
    // The sector belongs to two files; it is read once, for the first.
    assert_eq!(report.findings.len(), 1, "{}", text(&report));
    let finding = &report.findings[0];
    assert_eq!(finding.path.as_deref(), Some(&b"/file"[..]));
    assert!(finding.message.contains("4096 bytes from byte 8192"), "{}", finding.message);
}

#[test]
fn without_data_only_metadata_is_read() {
    let built = Forge::sound(Profile::Single).build();
    let data = built.pool.chunks().into_iter().find(|c| c.kind == ChunkKind::Data).unwrap();
    flip(&built, data.logical, &[0]);
    let options = CheckOptions { data: false, txg: None };
    let platform = built.platform.platform.clone();
    let report = check(vec![built.device.device()], platform, &options, &Quiet).unwrap();
    assert!(report.is_clean());
    assert_eq!(report.stats.data_bytes, 0);
}

#[test]
fn inline_data_that_does_not_expand_is_found() {
    let report = report_of(&Before(|forge| {
        drop_extent(forge, 6, 0);
        let compression = CompressionKind::Zstd;
        let bytes = b"no frame".to_vec();
        forge.extent(6, 0, &Extent::Inline { compression, logical: 20, bytes });
        forge.edit(6, |inode| inode.size = 20);
    }));
    assert_eq!(ids(&report), BTreeSet::from([rules::EXTENT_INLINE.id]), "{}", text(&report));
}

#[test]
fn two_hard_links_in_one_directory_are_sound() {
    let mut forge = Forge::sound(Profile::Single);
    forge.name(ROOT_INO, b"again", 3);
    let report = check_built(&forge.build());
    assert!(report.is_clean(), "{}", text(&report));
}

#[test]
fn a_name_twice_under_one_link_item_is_found() {
    let report = report_of(&Before(|forge| {
        let link = LinkItem { parent: ROOT_INO, cookie: forge.read_inode(3).parent_cookie };
        let key = Key::new(3, kind::LINK, LinkItem::offset(Ino(ROOT_INO), link.cookie));
        forge.subvol.insert(key, link.to_bytes().to_vec());
        forge.edit(3, |inode| inode.links += 1);
    }));
    assert_eq!(ids(&report), BTreeSet::from([rules::BACKLINK_NAME.id]), "{}", text(&report));
}

#[test]
fn findings_of_one_rule_are_counted_but_not_all_kept() {
    let report = report_of(&Before(|forge| {
        for index in 0..300u64 {
            let name = format!("ghost {index}");
            let entry = Entry { ino: 5000, file_type: mode::REGULAR, name: name.into_bytes() };
            let key = Key::new(2, kind::DIR_ENTRY, 1000 + index);
            forge.subvol.insert(key, entry.encode());
        }
    }));
    let count = |id| report.counts.iter().find(|(other, _)| *other == id).unwrap().1;
    assert_eq!(count(rules::NAME_NO_INODE.id), 300);
    let kept = report.findings.iter().filter(|f| f.id == rules::NAME_NO_INODE.id).count();
    assert_eq!(kept, 100);
}

#[test]
fn a_check_that_is_told_to_stop_stops() {
    struct Impatient;
    impl CheckProgress for Impatient {
        fn progress(&self, _: Pass, _: u64, _: u64) -> bool {
            false
        }
    }
    let built = Forge::sound(Profile::Single).build();
    let platform = built.platform.platform.clone();
    let options = CheckOptions::default();
    let outcome = check(vec![built.device.device()], platform, &options, &Impatient);
    assert_eq!(outcome, Err(Error::Posix(Errno::Intr)));
}

#[test]
fn no_flipped_byte_makes_the_check_panic_or_look_away() {
    let built = Forge::sound(Profile::Single).build();
    let content = built.device.image();
    let (system, metadata) = (&built.superblock.chunk_root, &built.superblock.pool_root);
    let mut unnoticed = Vec::new();
    for root in [system, metadata] {
        let addr = root.unwrap().addr;
        let places = built.pool.map(addr, 1 << 14).unwrap();
        for offset in (0..1 << 14).step_by(61) {
            for place in &places {
                built.device.flip(place[0].1 .0 + offset);
            }
            let devices = vec![built.device.device()];
            let platform = built.platform.platform.clone();
            let outcome = check(devices, platform, &CheckOptions::default(), &Quiet);
            if outcome.is_ok_and(|report| report.worst() != Some(Severity::Loss)) {
                unnoticed.push((addr, offset));
            }
            built.device.poke(0, &content);
        }
    }
    assert_eq!(unnoticed, []);
}

fn opened(change: impl FnOnce(&mut Forge)) -> crate::platform::Result<Arc<Volume>> {
    let mut forge = Forge::sound(Profile::Single);
    change(&mut forge);
    let built = forge.build();
    let (devices, platform) = (vec![built.device.device()], built.platform.platform.clone());
    Volume::open(devices, platform, &OpenOptions::default(), AccessTime::Never)
}

#[test]
fn a_pool_whose_versions_break_a_rule_is_not_opened() {
    assert!(opened(|_| {}).is_ok());
    let named = opened(|forge| {
        forge.pool_tree.insert(Key::new(SUBVOL.0, kind::NAME, 0), b"name".to_vec());
    });
    assert!(matches!(named.err(), Some(Error::BadItem { .. })));
}

#[test]
fn numbers_that_are_used_up_are_never_given_again() {
    let beyond = opened(|forge| forge.item.next_ino = u64::MAX);
    assert!(matches!(beyond.err(), Some(Error::BadItem { .. })));

    let fs = opened(|forge| {
        forge.item.next_ino = INO_MAX;
        forge.change_superblock = Box::new(|superblock| superblock.next_subvol = u64::MAX - 1);
    });
    let fs = fs.unwrap();
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let make = |name: &[u8]| fs.mknod(fs.root(), name, 0o100644, 0, &caller);
    assert_eq!(make(b"last").unwrap().ino.0, INO_MAX);
    let subvolume = |name: &[u8]| {
        let (name, mode) = (name.to_vec(), 0o755);
        let op = VersionOp::CreateSubvolume { name, mode, uid: 0, gid: 0 };
        fs.engine().change_versions(vec![op]).map(|ids| ids[0])
    };
    assert_eq!(subvolume(b"last"), Ok(u64::MAX - 1));
    for _ in 0..3 {
        assert_eq!(make(b"more").map_err(|error| error.errno()), Err(Errno::NoSpc));
        assert_eq!(subvolume(b"more").map_err(|error| error.errno()), Err(Errno::NoSpc));
    }
    fs.sync().unwrap();
    fs.close().unwrap();
}
