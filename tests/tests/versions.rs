//! Subvolumes and snapshots against models, with and without power failing.

use cairn_tests::drive::{asked_seed, is_long};
use cairn_tests::gen::Options;
use cairn_tests::subject::Pool;
use cairn_tests::versions::{Plan, World};
use fs_core::format::ptr::CompressionKind;

fn pool(seed: u64) -> Pool {
    let mut pool = if seed % 2 == 0 { Pool::cramped() } else { Pool::default() };
    if seed % 3 == 0 {
        pool.format.compression = CompressionKind::None;
    }
    // So that what is deleted takes many groups.
    pool.open.deletion_refs = [8192, 1, 7, 60][seed as usize / 2 % 4];
    pool
}

fn seeds(count: u64) -> Vec<u64> {
    asked_seed().map_or((0..count).collect(), |seed| vec![seed])
}

#[test]
fn versions_are_what_their_models_say_and_nothing_is_left_of_them() {
    let mut received = 0;
    for seed in seeds(if is_long() { 2000 } else { 40 }) {
        let options = Options { huge: false, remount_permille: 0, ..Options::MODEL };
        let plan = Plan {
            seed,
            steps: 60,
            ops_per_step: 12,
            options,
            device_bytes: 256 << 20,
            pool: pool(seed),
            checks: true,
            trims: true,
            clears: true,
        };
        let told = World::new(plan).and_then(|mut world| world.tell().map(|()| world.received()));
        received += told.unwrap_or_else(|what| panic!("{what}"));
    }
    assert!(asked_seed().is_some() || received > 100, "only {received} snapshots were received");
}

#[test]
fn a_crash_leaves_versions_whole_or_not_at_all() {
    let (mut count, mut received) = (0, 0);
    for seed in seeds(if is_long() { 400 } else { 8 }) {
        let plan = Plan {
            seed,
            steps: 24,
            ops_per_step: 4,
            options: Options::CRASH,
            device_bytes: 32 << 20,
            pool: pool(seed),
            checks: false,
            trims: true,
            clears: false,
        };
        let mut world = World::new(plan).unwrap();
        if let Err(what) = world.tell() {
            panic!("{what}");
        }
        received += world.received();
        for state in world.crashes(1) {
            count += 1;
            if let Err(what) = world.judge(&state) {
                let (boundary, variant) = (state.boundary, state.variant);
                let what = format!("crash {boundary}:{variant} after {}: {what}", state.mark);
                panic!("{}", world.report(&what));
            }
        }
    }
    assert!(asked_seed().is_some() || count > 1000, "only {count} states");
    assert!(asked_seed().is_some() || received > 4, "only {received} snapshots were received");
}
