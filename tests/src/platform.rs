//! A platform on which equal seeds give equal runs.
//!
//! Time is a counter, chance is seeded, and there is one thread: a spawned job runs at once, or
//! waits in a queue until [`SerialWorkers::drive`] is called, whichever the test wants.

use crate::rng::Rng;
use fs_core::error::Incident;
use fs_core::platform::{Clock, Codecs, Entropy, Job, Platform, Report, Timestamp, Workers};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Nanoseconds by which every look at the clock moves it, so that no two looks are equal.
const NANOS_PER_LOOK: u64 = 1000;
/// Where the clock starts: 2024-01-01 UTC.
const EPOCH_SECS: i64 = 1_704_067_200;

/// Time that moves only when looked at or told to.
#[derive(Default)]
pub struct VirtualClock {
    nanos: AtomicU64,
}

impl VirtualClock {
    /// Moves the clock on.
    pub fn advance_ms(&self, ms: u64) {
        self.nanos.fetch_add(ms * 1_000_000, Ordering::SeqCst);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Timestamp {
        let nanos = self.uptime_ns();
        Timestamp {
            secs: EPOCH_SECS + (nanos / 1_000_000_000) as i64,
            nanos: (nanos % 1_000_000_000) as u32,
        }
    }

    fn uptime_ns(&self) -> u64 {
        self.nanos.fetch_add(NANOS_PER_LOOK, Ordering::SeqCst) + NANOS_PER_LOOK
    }
}

/// Chance from a seed.
pub struct SeededEntropy(Mutex<Rng>);

impl Entropy for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.lock().unwrap().fill(bytes);
    }
}

/// When a spawned job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spawn {
    /// Before `spawn` returns.
    AtOnce,
    /// When the test calls [`SerialWorkers::drive`].
    WhenDriven,
}

type Tick = Box<dyn FnMut() -> bool + Send>;

/// Workers without threads.
pub struct SerialWorkers {
    spawn: Spawn,
    queue: Mutex<VecDeque<Job>>,
    ticks: Mutex<Vec<Tick>>,
}

impl SerialWorkers {
    fn new(spawn: Spawn) -> SerialWorkers {
        SerialWorkers { spawn, queue: Mutex::default(), ticks: Mutex::default() }
    }

    /// Runs queued jobs, and those they queue, until none is left. Returns how many ran.
    pub fn drive(&self) -> usize {
        let mut count = 0;
        loop {
            // Not `while let`: the guard must be gone while the job runs, since it may spawn.
            let job = self.queue.lock().unwrap().pop_front();
            let Some(job) = job else { return count };
            job();
            count += 1;
        }
    }

    /// Calls everything registered with `every` once.
    pub fn tick(&self) {
        let mut ticks = std::mem::take(&mut *self.ticks.lock().unwrap());
        ticks.retain_mut(|tick| tick());
        self.ticks.lock().unwrap().append(&mut ticks);
    }
}

impl Workers for SerialWorkers {
    fn parallelism(&self) -> usize {
        1
    }

    fn spawn(&self, job: Job) {
        match self.spawn {
            Spawn::AtOnce => job(),
            Spawn::WhenDriven => self.queue.lock().unwrap().push_back(job),
        }
    }

    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(each);
    }

    fn every(&self, _period_ms: u64, tick: Tick) {
        self.ticks.lock().unwrap().push(tick);
    }
}

/// zstd and crc32c from their crates.
pub struct CrateCodecs;

thread_local! {
    // A zstd context is large; making one per block would dominate a short run.
    static EXPANDER: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("memory for a zstd context"));
    static COMPRESSOR: RefCell<zstd::bulk::Compressor<'static>> =
        RefCell::new(zstd::bulk::Compressor::new(1).expect("memory for a zstd context"));
}

impl Codecs for CrateCodecs {
    fn crc32c(&self, bytes: &[u8]) -> u32 {
        crc32c::crc32c(bytes)
    }

    fn zstd_compress(&self, src: &[u8], dst: &mut [u8], level: i32) -> Option<usize> {
        COMPRESSOR.with_borrow_mut(|zstd| {
            zstd.set_compression_level(level).ok()?;
            zstd.compress_to_buffer(src, dst).ok()
        })
    }

    fn zstd_expand(&self, src: &[u8], dst: &mut [u8]) -> bool {
        let want = dst.len();
        EXPANDER.with_borrow_mut(|zstd| zstd.decompress_to_buffer(src, dst).ok() == Some(want))
    }
}

/// Keeps every incident for the test to look at.
#[derive(Default)]
pub struct Incidents(Mutex<Vec<Incident>>);

impl Incidents {
    /// What was reported since the last call.
    pub fn take(&self) -> Vec<Incident> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Report for Incidents {
    fn incident(&self, incident: &Incident) {
        self.0.lock().unwrap().push(incident.clone());
    }
}

/// A deterministic platform with handles to its parts.
#[derive(Clone)]
pub struct TestPlatform {
    /// Time.
    pub clock: Arc<VirtualClock>,
    /// Jobs.
    pub workers: Arc<SerialWorkers>,
    /// What was reported.
    pub incidents: Arc<Incidents>,
    entropy: Arc<SeededEntropy>,
}

impl TestPlatform {
    /// A platform whose chance comes from `seed`.
    pub fn new(seed: u64, spawn: Spawn) -> TestPlatform {
        TestPlatform {
            clock: Arc::default(),
            workers: Arc::new(SerialWorkers::new(spawn)),
            incidents: Arc::default(),
            entropy: Arc::new(SeededEntropy(Mutex::new(Rng::derived(seed, 0x656e_7472)))),
        }
    }

    /// What the core is given.
    pub fn platform(&self) -> Platform {
        Platform {
            clock: self.clock.clone(),
            entropy: self.entropy.clone(),
            workers: self.workers.clone(),
            codecs: Arc::new(CrateCodecs),
            report: self.incidents.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queued_job_runs_when_driven_and_not_before() {
        let workers = Arc::new(SerialWorkers::new(Spawn::WhenDriven));
        let ran = Arc::new(AtomicU64::new(0));
        let (inner_workers, inner_ran) = (workers.clone(), ran.clone());
        workers.spawn(Box::new(move || {
            inner_ran.fetch_add(1, Ordering::SeqCst);
            let ran = inner_ran.clone();
            inner_workers.spawn(Box::new(move || {
                ran.fetch_add(10, Ordering::SeqCst);
            }));
        }));
        assert_eq!(ran.load(Ordering::SeqCst), 0);
        assert_eq!(workers.drive(), 2);
        assert_eq!(ran.load(Ordering::SeqCst), 11);
    }

    #[test]
    fn a_frame_expands_only_to_its_own_length() {
        let src = [7u8; 5000];
        let mut packed = [0; 5000];
        let len = CrateCodecs.zstd_compress(&src, &mut packed, 3).unwrap();
        let mut out = [0; 5000];
        assert!(CrateCodecs.zstd_expand(&packed[..len], &mut out));
        assert_eq!(out, src);
        assert!(!CrateCodecs.zstd_expand(&packed[..len], &mut [0; 5001]));
        assert!(!CrateCodecs.zstd_expand(&packed[..len], &mut [0; 4999]));
        assert!(!CrateCodecs.zstd_expand(&packed[..len - 1], &mut out));
    }
}
