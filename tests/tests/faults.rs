//! Devices that fail and devices that lie.

use cairn_tests::device::{Access, Fault, FaultKind};
use cairn_tests::drive::{asked_seed, is_long, seeds};
use cairn_tests::fault::{attempt, compare_with, lie, requests, script, End, Script};
use cairn_tests::gen::Options;
use cairn_tests::rng::Rng;
use cairn_tests::subject::Pool;

/// Operations with many reads from the device among them.
const OPTIONS: Options =
    Options { sync_percent: 25, reads: true, remount_permille: 0, ..Options::CRASH };

fn story(seed: u64) -> Script {
    script(seed, 30, OPTIONS, 24 << 20)
}

/// Which requests to let fail: all, or about so many.
fn chosen(count: u64, about: u64) -> impl Iterator<Item = u64> {
    let step = if is_long() { 1 } else { (count / about).max(1) };
    (0..count + 2).step_by(step as usize)
}

#[test]
fn whatever_request_fails_nothing_is_lost() {
    let subject = Pool::cramped();
    let mut ends = [0; 3];
    for seed in seeds(3, 60) {
        let story = story(seed);
        let counts = requests(&subject, &story).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        for (access, count) in [
            (Access::Read, counts.reads),
            (Access::Write, counts.writes),
            (Access::Flush, counts.flushes),
        ] {
            for nth in chosen(count, 20) {
                for fault in [
                    Fault::nth(FaultKind::Failed, access, nth),
                    Fault::from_nth(FaultKind::Failed, access, nth),
                    Fault::nth(FaultKind::Gone, access, nth),
                ] {
                    match attempt(&subject, &story, fault.clone()) {
                        Ok(end) => ends[end as usize] += 1,
                        Err(what) => panic!("{}", report(&story, &fault, &what)),
                    }
                }
            }
        }
    }
    let [not_reached, unnoticed, noticed] = ends;
    assert!(noticed > 50 || asked_seed().is_some(), "{not_reached} {unnoticed} {noticed}");
}

fn report(story: &Script, fault: &Fault, what: &str) -> String {
    let ops = story.ops.iter().enumerate();
    let lines = ops.map(|(i, op)| format!("{:4}  {}\n", i + 1, cairn_tests::run::describe(op)));
    let seed = story.seed;
    format!("{}{fault:?}\n{what}\nsee it again: CAIRN_SEED={seed}", lines.collect::<String>())
}

#[test]
fn a_write_that_a_device_lies_about_never_shows_as_wrong_data() {
    let subject = Pool::default();
    let mut noticed = 0;
    for seed in seeds(4, 80) {
        let story = story(seed);
        let counts = requests(&subject, &story).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let mut rng = Rng::derived(seed, 0x6c69_6573);
        for nth in chosen(counts.writes, 30) {
            let to = rng.below(story.device_bytes / 4096 - 300) * 4096;
            for kind in [
                FaultKind::Lost,
                FaultKind::Torn { keep_bytes: rng.below(9) * 512 },
                FaultKind::Misdirected { to },
            ] {
                let fault = Fault::nth(kind, Access::Write, nth);
                match lie(&subject, &story, fault.clone()) {
                    Ok(end) => noticed += u64::from(end == End::Noticed),
                    Err(what) => panic!("{}", report(&story, &fault, &what)),
                }
            }
        }
    }
    assert!(noticed > 5 || asked_seed().is_some(), "only {noticed} lies had to be noticed");
}

/// What an image that was closed in an orderly way shows after one byte of it was changed.
fn flip_bytes(subject: &Pool, seed: u64, per_sector: u64) -> [u64; 3] {
    let built = cairn_tests::fault::built(subject, &story(seed));
    let (image, tree, core) = built.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    let mut rng = Rng::derived(seed, 0x666c_6970);
    let mut ends = [0; 3];
    let sectors: Vec<u64> = image.used_sectors().collect();
    let step = if is_long() { 1 } else { (sectors.len() / 250).max(1) };
    for sector in sectors.into_iter().step_by(step) {
        for _ in 0..per_sector {
            let mut flipped = image.clone();
            let at = sector + rng.below(4096);
            let mut byte = [0];
            flipped.read(at, &mut byte);
            flipped.write(at, &[byte[0] ^ 1 << rng.below(8)]);
            match compare_with(subject, &core, flipped, &tree) {
                Ok(end) => ends[end as usize] += 1,
                Err(what) => panic!("seed {seed}, byte {at} changed: {what}"),
            }
        }
    }
    ends
}

#[test]
fn a_changed_byte_is_healed_or_reported_and_never_believed() {
    let dup = Pool::default();
    let mut single = Pool::default();
    single.format.metadata_profile = fs_core::format::chunk::Profile::Single;
    // What was discarded reads as garbage and is changed too, which nobody can notice: so all
    // stories together are looked at.
    let mut noticed_alone = 0;
    for seed in seeds(3, 20) {
        let [_, healed, noticed] = flip_bytes(&dup, seed, 2);
        assert!(healed > noticed, "with two copies {healed} healed, {noticed} noticed");
        noticed_alone += flip_bytes(&single, seed, 2)[2];
    }
    assert!(noticed_alone > 30, "with one copy only {noticed_alone} noticed");
}
