//! Labels survive damage at either end; the ring gives the newest whole superblock.

use super::*;
use crate::error::FeatureClass;
use crate::format::chunk::Profile;
use crate::format::label::{Label, LABEL_AREA_0, RING_OFFSET, RING_SLOTS};
use crate::format::superblock::Superblock;
use crate::format::DiskField;
use crate::testing::RamDevice;
use crate::units::{Logical, Txg};
use alloc::sync::Arc;
use alloc::vec::Vec;
use proptest::prelude::*;

const BYTES: u64 = 8 << 20;
const SECOND: u64 = BYTES - (128 << 10);
const POOL_ID: [u8; 16] = [7; 16];

fn identity() -> Identity {
    let mut name = [0; 64];
    name[..4].copy_from_slice(b"tank");
    Identity {
        pool_id: POOL_ID,
        device_id: [9; 16],
        index: 0,
        bytes: BYTES,
        name,
        written: 12,
        sequence: 1,
        epoch: 0,
        table: vec![],
    }
}

fn labelled() -> (Arc<RamDevice>, Member) {
    let ram = RamDevice::new(BYTES);
    let member = Member::fresh(ram.device(), identity()).unwrap();
    member.wipe().unwrap();
    member.write_labels().unwrap();
    (ram, member)
}

fn superblock(txg: u64) -> Superblock {
    Superblock {
        txg: Txg(txg),
        written: 0,
        pool_id: POOL_ID,
        features: [0; 3],
        hash_secret: [0; 16],
        node_bytes: 16384,
        device_count: 1,
        data_profile: Profile::Single,
        metadata_profile: Profile::Dup,
        clean: false,
        next_chunk: Logical(1 << 20),
        chunk_bytes: 1 << 20,
        next_subvol: 256,
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
        system_chunks: Vec::new(),
    }
}

fn ring(member: &Member) -> Ring {
    let mut ring = Ring::default();
    ring.add(member, &POOL_ID).unwrap();
    ring
}

fn slot_at(area: u64, txg: u64) -> u64 {
    area + RING_OFFSET + (txg % RING_SLOTS) * 4096
}

/// Writes `label` with its checksum made right.
fn poke_label(ram: &RamDevice, at: u64, change: impl FnOnce(&mut Label)) {
    let mut label = <Label as DiskField>::get(&ram.peek(at, 4096));
    change(&mut label);
    ram.poke(at, &label.encode(&[]));
}

#[test]
fn what_was_labelled_is_probed_again() {
    let (ram, _) = labelled();
    let probe = probe(&*ram, 0).unwrap();
    assert_eq!(probe.identity, identity());
    assert_eq!(probe.areas, [Physical(LABEL_AREA_0), Physical(SECOND)]);
    assert_eq!(probe.damaged, [None, None]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_flipped_byte_of_one_label_is_noticed_and_the_other_serves(
        at in 0u64..4096,
        second in any::<bool>(),
    ) {
        let (ram, _) = labelled();
        ram.flip(at + if second { SECOND } else { LABEL_AREA_0 });
        let probe = probe(&*ram, 0).unwrap();
        prop_assert_eq!(probe.identity, identity());
        prop_assert_eq!(probe.damaged[0].is_some(), !second);
        prop_assert_eq!(probe.damaged[1].is_some(), second);
    }

    #[test]
    fn the_newest_whole_superblock_is_chosen(
        count in 1u64..40,
        torn in proptest::collection::btree_set((0u64..40, any::<bool>()), 0..6),
        asked in proptest::option::of(0u64..40),
    ) {
        let (ram, member) = labelled();
        for txg in 1..=count {
            member.write_superblock(&superblock(txg)).unwrap();
        }
        for (txg, second) in &torn {
            ram.flip(slot_at(if *second { SECOND } else { LABEL_AREA_0 }, *txg) + 1000);
        }
        let oldest = count.saturating_sub(RING_SLOTS - 1).max(1);
        // Marks are by slot, so a mark of another group in the same slot counts as well.
        let marked = |txg: u64, second| {
            torn.iter().filter(|(t, s)| t % 16 == txg % 16 && *s == second).count() % 2 == 1
        };
        let whole: Vec<u64> = (oldest..=count)
            .rev()
            .filter(|txg| !(marked(*txg, false) && marked(*txg, true)))
            .collect();
        let ring = ring(&member);
        let found: Vec<u64> = ring.valid.iter().map(|sb| sb.txg.0).collect();
        prop_assert_eq!(&found, &whole);
        let want = whole.iter().find(|txg| asked.is_none_or(|asked| **txg == asked));
        match (choose(&ring, asked.map(Txg)), want) {
            (Ok(chosen), Some(want)) => prop_assert_eq!(chosen.txg.0, *want),
            (Err(Error::NoGroup { txg, cause: None, others }), None) => {
                prop_assert_eq!(txg, asked.map(Txg));
                let others: Vec<u64> = others.iter().map(|txg| txg.0).collect();
                prop_assert_eq!(&others, &whole);
            }
            (Err(error), None) => {
                prop_assert!(asked.is_none());
                prop_assert_eq!(error, Error::NoSuperblock);
            }
            (chosen, want) => prop_assert!(false, "chose {:?}, not {:?}", chosen, want),
        }
    }
}

#[test]
fn a_device_without_a_label_is_not_cairn_whatever_its_size() {
    for bytes in [0, 4096, 65536, 69632, 1 << 20, BYTES] {
        let error = probe(&*RamDevice::new(bytes), 0).unwrap_err();
        assert_eq!(error, Error::NotCairn, "{bytes} bytes");
    }
}

#[test]
fn a_shortened_device_is_called_truncated() {
    let (ram, _) = labelled();
    ram.resize(BYTES - 4096);
    let error = probe(&*ram, 0).unwrap_err();
    assert_eq!(error, Error::Truncated { expected: BYTES, found: BYTES - 4096 });
}

#[test]
fn a_device_that_grew_still_has_both_labels() {
    let (ram, _) = labelled();
    ram.resize(BYTES + (5 << 20));
    let probe = probe(&*ram, 0).unwrap();
    assert_eq!(probe.damaged, [None, None]);
    assert_eq!(probe.areas[1], Physical(SECOND));
}

#[test]
fn a_torn_label_leads_to_the_other_on_a_device_that_is_larger_than_its_pool() {
    let (ram, member) = labelled();
    let smaller = BYTES - (2 << 20);
    member.resize(smaller, 5, |_| {}).unwrap();
    // As a torn write leaves it: the beginning is whole.
    ram.flip(LABEL_AREA_0 + 600);
    let found = probe(&*ram, 0).unwrap();
    assert_eq!(found.identity.bytes, smaller);
    assert!(found.damaged[0].is_some() && found.damaged[1].is_none());
    assert_eq!(found.areas, label_areas(smaller).unwrap());
    // What says nothing of use leads nowhere.
    for at in [LABEL_AREA_0, LABEL_AREA_0 + 0x39, LABEL_AREA_0 + 0x3f] {
        ram.flip(at);
        assert_eq!(probe(&*ram, 0).unwrap_err(), Error::NotCairn);
        ram.flip(at);
    }
}

#[test]
fn an_unreadable_label_is_like_a_damaged_one() {
    let (ram, _) = labelled();
    ram.faults(|faults| faults.fail_reads.push(LABEL_AREA_0..LABEL_AREA_0 + 1));
    let found = probe(&*ram, 3).unwrap();
    assert_eq!(found.identity, identity());
    assert!(matches!(found.damaged[0], Some(Error::Device { device: 3, .. })));
    ram.faults(|faults| faults.gone = true);
    assert!(matches!(probe(&*ram, 3), Err(Error::Device { device: 3, .. })));
}

#[test]
fn the_label_with_the_greater_sequence_is_right() {
    for (newer, older_area) in [(LABEL_AREA_0, 1), (SECOND, 0)] {
        let (ram, _) = labelled();
        poke_label(&ram, newer, |label| {
            label.sequence = 2;
            label.name[0] = b'T';
        });
        let probe = probe(&*ram, 0).unwrap();
        assert_eq!(probe.identity.name[0], b'T');
        assert!(probe.damaged[older_area].is_some() && probe.damaged[1 - older_area].is_none());
    }
}

#[test]
fn a_label_of_another_version_forbids_opening_even_if_the_other_is_ours() {
    for area in [LABEL_AREA_0, SECOND] {
        let (ram, _) = labelled();
        poke_label(&ram, area, |label| label.version = 2);
        assert_eq!(probe(&*ram, 0).unwrap_err(), Error::Version { found: 2 });
    }
}

#[test]
fn a_crash_while_labels_are_rewritten_leaves_one_whole() {
    // The n-th request and all after it fail; the label being written is torn as well.
    for allowed in 0..8 {
        let (ram, member) = labelled();
        ram.faults(|faults| faults.fail_after = Some(allowed));
        let done = member.relabel(13, |identity| identity.name[0] = b'X').is_ok();
        ram.faults(|faults| *faults = Default::default());
        if allowed < 4 {
            ram.flip(if allowed < 2 { LABEL_AREA_0 } else { SECOND } + 50);
        }
        let probe = probe(&*ram, 0).unwrap();
        let renamed = probe.identity.name[0] == b'X';
        assert_eq!(renamed, allowed >= 2, "after {allowed} requests");
        // Two writes and two flushes; an area that refuses the write leaves the other to serve.
        assert_eq!(done, allowed == 2 || allowed >= 4);
    }
}

#[test]
fn the_only_good_label_is_not_the_first_to_be_rewritten() {
    for damaged in [LABEL_AREA_0, SECOND] {
        let (ram, _) = labelled();
        ram.flip(damaged + 50);
        let found = probe(&*ram, 0).unwrap();
        let member = Member::new(ram.device(), &found);
        ram.faults(|faults| faults.fail_after = Some(1));
        assert!(member.write_labels().is_err());
        ram.faults(|faults| *faults = Default::default());
        // The crash tears what was being written.
        ram.flip(damaged + 50);
        assert_eq!(probe(&*ram, 0).unwrap().identity, identity());
    }
}

#[test]
fn a_newer_superblock_that_cannot_be_used_is_not_passed_over() {
    let (_ram, member) = labelled();
    member.write_superblock(&superblock(4)).unwrap();
    let mut strange = superblock(5);
    strange.features[2] = 1 << 40;
    member.write_superblock(&strange).unwrap();
    let ring = ring(&member);
    let error = Error::Features { class: FeatureClass::Incompat, unknown: 1 << 40 };
    assert_eq!(choose(&ring, None).unwrap_err(), error);
    assert_eq!(choose(&ring, Some(Txg(4))).unwrap().txg, Txg(4));
    assert_eq!(choose(&ring, Some(Txg(5))).unwrap_err(), error);
    assert_eq!(ring.newest(), Txg(5));
}

#[test]
fn a_superblock_of_another_pool_is_ignored() {
    let (_ram, member) = labelled();
    member.write_superblock(&superblock(4)).unwrap();
    let mut foreign = superblock(5);
    foreign.pool_id = [8; 16];
    member.write_superblock(&foreign).unwrap();
    assert_eq!(choose(&ring(&member), None).unwrap().txg, Txg(4));
}

#[test]
fn an_unreadable_sector_costs_only_its_slot() {
    let (ram, member) = labelled();
    (1..=3).for_each(|txg| member.write_superblock(&superblock(txg)).unwrap());
    let bad = |area| slot_at(area, 3)..slot_at(area, 3) + 1;
    ram.faults(|faults| faults.fail_reads.extend([bad(LABEL_AREA_0), bad(SECOND)]));
    let txgs: Vec<u64> = ring(&member).valid.iter().map(|sb| sb.txg.0).collect();
    assert_eq!(txgs, [2, 1]);
    assert!(member.errors().read > 0);
}

#[test]
fn a_superblock_is_written_if_one_area_takes_it() {
    let (ram, member) = labelled();
    let area = |start: u64| start..start + (128 << 10);
    ram.faults(|faults| faults.fail_writes.push(area(LABEL_AREA_0)));
    member.write_superblock(&superblock(1)).unwrap();
    assert_eq!(member.errors().write, 1);
    assert_eq!(ring(&member).valid.len(), 1);
    ram.faults(|faults| faults.fail_writes.push(area(SECOND)));
    assert!(matches!(member.write_superblock(&superblock(2)), Err(Error::Device { .. })));
}

#[test]
fn wiping_leaves_nothing_that_could_be_recognised() {
    let ram = RamDevice::from_image(vec![0xee; BYTES as usize]);
    Member::fresh(ram.device(), identity()).unwrap().wipe().unwrap();
    let image = ram.image();
    assert!(image[..1 << 20].iter().all(|byte| *byte == 0));
    assert!(image[(BYTES - (1 << 20)) as usize..].iter().all(|byte| *byte == 0));
    assert_eq!(image[1 << 20], 0xee, "the space for chunks is not wiped");
}

#[test]
fn stored_error_counts_cannot_overflow_the_counters() {
    let (_ram, member) = labelled();
    member.add_errors(ErrorCounts { read: u64::MAX, write: 1, checksum: u64::MAX });
    member.count_checksum_error();
    member.add_errors(ErrorCounts { read: 1, write: 1, checksum: 0 });
    assert_eq!(member.errors(), ErrorCounts { read: u64::MAX, write: 2, checksum: u64::MAX });
}
