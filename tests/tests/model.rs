//! A pool is compared with the model, operation by operation.

use cairn_tests::drive::{asked_seed, run, seeds, Plan, Seen};
use cairn_tests::gen::Options;
use cairn_tests::subject::{Pool, Subject};
use fs_core::format::chunk::Profile;

/// A run ends after so many failures: several tell more than one, and all take too long.
const FAILURES_MAX: usize = 5;

fn compare(test: &str, subject: &dyn Subject, plan: impl Fn(u64) -> Plan, seeds: Vec<u64>) -> Seen {
    let mut seen = Seen::default();
    let failed = |seed| match run(subject, &plan(seed)) {
        Ok(run) => {
            seen.ops += run.ops;
            seen.full += run.full;
            None
        }
        Err(failure) => Some(failure.report(test, seed)),
    };
    let failures: Vec<String> = seeds.into_iter().filter_map(failed).take(FAILURES_MAX).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    seen
}

fn plan(seed: u64) -> Plan {
    let options = Options::MODEL;
    Plan { seed, count: 400, options, compare_every: 100, device_bytes: 64 << 20 }
}

#[test]
fn a_pool_does_what_the_model_does() {
    let pool = Pool::default();
    compare("a_pool_does_what_the_model_does", &pool, plan, seeds(40, 2000));
}

#[test]
fn a_pool_without_memory_to_spare_does_what_the_model_does() {
    let pool = Pool::cramped();
    let plan = |seed| {
        let options = Options { remount_permille: 40, sync_percent: 10, ..Options::MODEL };
        Plan { seed, count: 250, options, compare_every: 50, device_bytes: 48 << 20 }
    };
    compare("a_pool_without_memory_to_spare", &pool, plan, seeds(20, 1000));
}

#[test]
fn a_full_pool_does_all_of_an_operation_or_nothing_and_always_deletes() {
    let plan = |seed| {
        let device_bytes = (10 + seed % 4 * 2) << 20;
        Plan { seed, count: 300, options: Options::FILL, compare_every: 30, device_bytes }
    };
    let seen = compare("a_full_pool", &Pool::cramped(), plan, seeds(20, 1000));
    assert!(seen.full > seen.ops / 50 || asked_seed().is_some(), "hardly ever full: {seen:?}");
}

#[test]
fn a_full_pool_with_large_nodes_and_two_copies_of_everything_never_fails_to_commit() {
    let plan = |seed| {
        let device_bytes = (12 + seed % 4 * 4) << 20;
        Plan { seed, count: 300, options: Options::FILL, compare_every: 30, device_bytes }
    };
    let mut pool = Pool::cramped();
    pool.format.node_bytes = 65536;
    pool.format.data_profile = Profile::Dup;
    compare("a_full_pool_with_large_nodes", &pool, plan, seeds(20, 1000));
}
