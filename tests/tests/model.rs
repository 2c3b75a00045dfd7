//! A pool is compared with the model, operation by operation.

use cairn_tests::drive::{run, seeds, Plan};
use cairn_tests::gen::Options;
use cairn_tests::subject::{Pool, Subject};

/// A run ends after so many failures: several tell more than one, and all take too long.
const FAILURES_MAX: usize = 5;

fn compare(test: &str, subject: &dyn Subject, plan: impl Fn(u64) -> Plan, seeds: Vec<u64>) {
    let failed = |seed| Some(run(subject, &plan(seed)).err()?.report(test, seed));
    let failures: Vec<String> = seeds.into_iter().filter_map(failed).take(FAILURES_MAX).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
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
