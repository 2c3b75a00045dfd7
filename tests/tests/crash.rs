//! The power fails at every moment.

use cairn_tests::crash::CrashState;
use cairn_tests::drive::{asked_seed, is_long};
use cairn_tests::gen::Options;
use cairn_tests::power::{asked_state, Depth, Plan, Story};
use cairn_tests::subject::{Pool, Subject};
use fs_core::format::chunk::Profile;
use fs_core::format::ptr::{ChecksumKind, CompressionKind};

/// A run ends after so many stories that failed.
const FAILURES_MAX: usize = 3;
/// One state in so many is closed and opened again, and one loses power again.
const REOPEN_EVERY: u64 = 16;

fn plan(seed: u64) -> Plan {
    Plan { seed, count: 40, options: Options::CRASH, device_bytes: 24 << 20, random: 4 }
}

/// Most stories are told on a pool as mkfs makes it, some on others.
fn pool(seed: u64) -> Pool {
    let mut pool = Pool::default();
    match seed % 8 {
        1 => pool.format.node_bytes = 65536,
        3 => pool.format.data_profile = Profile::Dup,
        5 => {
            pool.format.compression = CompressionKind::None;
            pool.format.checksum = ChecksumKind::Blake3;
        }
        7 => pool.format.metadata_profile = Profile::Single,
        _ => {}
    }
    pool
}

fn depth(state: &CrashState) -> Depth {
    match (state.boundary as u64 * 5 + u64::from(state.variant)) % REOPEN_EVERY {
        0 => Depth::Reopen,
        7 => Depth::Twice,
        _ => Depth::Open,
    }
}

/// Looks at all states of a story, or the one asked for; returns how many there were.
fn look(test: &str, subject: &dyn Subject, plan: Plan) -> Result<u64, String> {
    let story = Story::tell(subject, plan)
        .map_err(|e| format!("{e}\nsee it again: CAIRN_SEED={} cargo test {test}", plan.seed))?;
    if let Some((boundary, variant)) = asked_state() {
        let state = story.state(boundary, variant);
        for depth in [Depth::Open, Depth::Reopen, Depth::Twice] {
            let judged = story.judge(subject, &state, depth);
            judged.map_err(|what| story.report(test, &state, &what))?;
        }
        return Ok(1);
    }
    let mut count = 0;
    for state in story.states() {
        count += 1;
        if let Err(what) = story.judge(subject, &state, depth(&state)) {
            return Err(story.report(test, &state, &what));
        }
    }
    Ok(count)
}

/// Looks at so many states, story after story.
fn look_at(test: &str, pool: impl Fn(u64) -> Pool, wanted: u64, plan: impl Fn(u64) -> Plan) {
    let (mut count, mut failures) = (0, Vec::new());
    for seed in asked_seed().map_or(0..u64::MAX, |seed| seed..seed + 1) {
        match look(test, &pool(seed), plan(seed)) {
            Ok(states) => count += states,
            Err(failure) => {
                // A long run may be ended before it says what it found.
                eprintln!("{failure}");
                failures.push(failure);
            }
        }
        if count >= wanted || failures.len() >= FAILURES_MAX {
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(asked_seed().is_some() || count >= wanted, "only {count} states");
}

#[test]
fn what_is_left_after_power_loss_is_what_was_promised() {
    let wanted = if is_long() { 1_000_000 } else { 50_000 };
    look_at("what_is_left_after_power_loss", pool, wanted, plan);
}

#[test]
fn a_pool_without_memory_to_spare_keeps_its_promises() {
    let wanted = if is_long() { 200_000 } else { 5_000 };
    let plan = |seed| Plan {
        options: Options { file_bytes: 400 << 10, ..Options::CRASH },
        count: 30,
        random: 2,
        ..plan(seed)
    };
    look_at("a_pool_without_memory_to_spare", |_| Pool::cramped(), wanted, plan);
}
