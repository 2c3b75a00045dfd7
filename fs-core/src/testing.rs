//! Surroundings for tests: a device in memory whose faults are switched on by hand, and a platform
//! that is deterministic.
//!
//! Real layers run on these; nothing of the core is mocked. Devices that drop, tear and reorder
//! writes by themselves belong to the simulator in `tests/`; here a test says exactly which byte is
//! flipped and which range fails. The faults have the same names in both places.

use crate::error::Incident;
use crate::platform::{
    Clock, Codecs, Device, DeviceError, DeviceRef, Entropy, Geometry, Job, Platform, ReadOp,
    Report, Timestamp, Workers, WriteOp,
};
use crate::sync::Mutex;
use crate::units::{Physical, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What a [`RamDevice`] does wrong. All off by default.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Reads that touch one of these byte ranges fail.
    pub fail_reads: Vec<Range<u64>>,
    /// Writes that touch one of these byte ranges fail and change nothing.
    pub fail_writes: Vec<Range<u64>>,
    /// Writes that touch one of these byte ranges find no memory.
    pub no_memory_for: Vec<Range<u64>>,
    /// Writes that touch one of these byte ranges report success and change nothing.
    pub lose_writes: Vec<Range<u64>>,
    /// Only the first so many sectors of each write land, and it reports success.
    pub tear_writes_after: Option<usize>,
    /// Flushes fail.
    pub fail_flush: bool,
    /// The device says that it does not discard.
    pub no_discards: bool,
    /// Discards turn out not to be supported.
    pub refuse_discards: bool,
    /// The device says it is read-only and refuses writes.
    pub read_only: bool,
    /// Every request fails with [`DeviceError::Gone`].
    pub gone: bool,
    /// How many more requests (reads, writes, flushes, discards; each op of a batch counts)
    /// succeed before all fail.
    pub fail_after: Option<u64>,
}

/// How often a [`RamDevice`] was asked for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requests {
    /// Read batches.
    pub read_batches: u64,
    /// Reads.
    pub reads: u64,
    /// Write batches.
    pub write_batches: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
}

struct RamState {
    content: Vec<u8>,
    faults: Faults,
    requests: Requests,
}

/// What a test does when a [`RamDevice`] is asked for something.
type Hook = Box<dyn FnOnce() + Send>;

/// Called before the next write and the next flush, each once.
#[derive(Default)]
struct Hooks {
    write: Option<Hook>,
    flush: Option<Hook>,
}

/// A device in memory.
pub struct RamDevice {
    name: String,
    state: Mutex<RamState>,
    hooks: Mutex<Hooks>,
}

fn touches(ranges: &[Range<u64>], at: u64, bytes: u64) -> bool {
    ranges.iter().any(|range| range.start < at + bytes && at < range.end)
}

impl RamState {
    /// Counts one request; fails it when the device is gone or its budget is spent.
    fn admit(&mut self) -> Result<(), DeviceError> {
        if self.faults.gone {
            return Err(DeviceError::Gone);
        }
        match &mut self.faults.fail_after {
            Some(0) => Err(DeviceError::Io(5)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn bounds(&self, at: Physical, bytes: u64) -> Result<Range<usize>, DeviceError> {
        assert!(
            at.0 % SECTOR_BYTES == 0 && bytes % SECTOR_BYTES == 0,
            "unaligned transfer of {bytes} bytes at {at:?}"
        );
        let end = at.0.checked_add(bytes).ok_or(DeviceError::OutOfRange)?;
        if end > self.content.len() as u64 {
            return Err(DeviceError::OutOfRange);
        }
        Ok(at.0 as usize..end as usize)
    }

    fn read_one(&mut self, at: Physical, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.requests.reads += 1;
        self.admit()?;
        let range = self.bounds(at, buf.len() as u64)?;
        if touches(&self.faults.fail_reads, at.0, buf.len() as u64) {
            return Err(DeviceError::Io(5));
        }
        buf.copy_from_slice(&self.content[range]);
        Ok(())
    }

    fn write_one(&mut self, op: &WriteOp) -> Result<(), DeviceError> {
        self.requests.writes += 1;
        self.requests.written_bytes += op.len();
        self.admit()?;
        if self.faults.read_only {
            return Err(DeviceError::ReadOnly);
        }
        let range = self.bounds(op.at, op.len())?;
        if touches(&self.faults.fail_writes, op.at.0, op.len()) {
            return Err(DeviceError::Io(5));
        }
        if touches(&self.faults.no_memory_for, op.at.0, op.len()) {
            return Err(DeviceError::Memory);
        }
        if touches(&self.faults.lose_writes, op.at.0, op.len()) {
            return Ok(());
        }
        let mut room = self.faults.tear_writes_after.map_or(usize::MAX, |s| s * 4096);
        let mut at = range.start;
        for piece in &op.bufs {
            let landed = piece.len().min(room);
            self.content[at..at + landed].copy_from_slice(&piece[..landed]);
            at += piece.len();
            room -= landed;
        }
        Ok(())
    }
}

impl RamDevice {
    /// A device of `bytes` zeros.
    pub fn new(bytes: u64) -> Arc<RamDevice> {
        RamDevice::from_image(vec![0; bytes as usize])
    }

    /// A device with that content.
    pub fn from_image(content: Vec<u8>) -> Arc<RamDevice> {
        let state = RamState { content, faults: Faults::default(), requests: Requests::default() };
        let (name, state) = ("ram".to_string(), Mutex::new(state));
        Arc::new(RamDevice { name, state, hooks: Mutex::new(Hooks::default()) })
    }

    /// The device as the core takes it.
    pub fn device(self: &Arc<RamDevice>) -> DeviceRef {
        self.clone()
    }

    /// A copy of all of the content.
    pub fn image(&self) -> Vec<u8> {
        self.state.lock().content.clone()
    }

    /// The content at `at`, without going through the faults.
    pub fn peek(&self, at: u64, bytes: usize) -> Vec<u8> {
        self.state.lock().content[at as usize..at as usize + bytes].to_vec()
    }

    /// Changes the content at `at`, without going through the faults.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.state.lock().content[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Inverts one bit of the byte at `at`.
    pub fn flip(&self, at: u64) {
        self.state.lock().content[at as usize] ^= 1;
    }

    /// Makes the device smaller or larger.
    pub fn resize(&self, bytes: u64) {
        self.state.lock().content.resize(bytes as usize, 0);
    }

    /// Changes what the device does wrong.
    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.lock().faults);
    }

    /// Calls `hook` at the beginning of the next batch of writes, and only of that.
    pub fn on_next_write(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().write = Some(Box::new(hook));
    }

    /// Calls `hook` at the beginning of the next flush, and only of that: so a test gets between
    /// what was written and its being durable.
    pub fn on_next_flush(&self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.lock().flush = Some(Box::new(hook));
    }

    /// What has been asked of the device so far.
    pub fn requests(&self) -> Requests {
        self.state.lock().requests
    }
}

impl Device for RamDevice {
    fn geometry(&self) -> Geometry {
        let state = self.state.lock();
        Geometry {
            bytes: state.content.len() as u64,
            block_bytes: 512,
            discards: !state.faults.no_discards,
            read_only: state.faults.read_only,
        }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        let mut state = self.state.lock();
        state.requests.read_batches += 1;
        for op in batch {
            op.result = state.read_one(op.at, &mut op.buf);
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        let hook = self.hooks.lock().write.take();
        hook.into_iter().for_each(|hook| hook());
        let mut state = self.state.lock();
        state.requests.write_batches += 1;
        for op in batch {
            op.result = state.write_one(op);
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let hook = self.hooks.lock().flush.take();
        hook.into_iter().for_each(|hook| hook());
        let mut state = self.state.lock();
        state.requests.flushes += 1;
        state.admit()?;
        if state.faults.fail_flush {
            return Err(DeviceError::Io(5));
        }
        Ok(())
    }

    /// Fills the range with a pattern, so that whoever relies on what was discarded notices.
    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        state.requests.discards += 1;
        state.admit()?;
        if state.faults.refuse_discards {
            return Err(DeviceError::Unsupported);
        }
        let range = state.bounds(at, bytes)?;
        state.content[range].fill(0xdc);
        Ok(())
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// A clock that moves only when told to.
#[derive(Default)]
pub struct ManualClock {
    ns: AtomicU64,
}

impl ManualClock {
    /// Lets `ns` nanoseconds pass.
    pub fn advance(&self, ns: u64) {
        self.ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        let ns = self.uptime_ns();
        let secs = 1_700_000_000 + (ns / 1_000_000_000) as i64;
        Timestamp { secs, nanos: (ns % 1_000_000_000) as u32 }
    }
    fn uptime_ns(&self) -> u64 {
        self.ns.load(Ordering::Relaxed)
    }
}

/// Bytes that look random and are the same in every run from one seed.
pub struct SeededEntropy {
    state: AtomicU64,
}

impl SeededEntropy {
    /// The sequence of that seed.
    pub fn new(seed: u64) -> SeededEntropy {
        SeededEntropy { state: AtomicU64::new(seed) }
    }

    /// The next 64 bits. SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
    /// generators", 2014.
    pub fn next_u64(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.state.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Entropy for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
}

/// No threads: every job runs at once on the caller's.
pub struct SerialWorkers;

impl Workers for SerialWorkers {
    fn parallelism(&self) -> usize {
        1
    }
    fn spawn(&self, job: Job) {
        job();
    }
    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(each);
    }
    fn every(&self, _period_ms: u64, _tick: Box<dyn FnMut() -> bool + Send>) {}
}

/// Real threads, made for each call: for tests that look for races.
pub struct ThreadWorkers {
    /// How many threads work on one [`Workers::parallel_for`], the caller's among them.
    pub threads: usize,
}

impl Workers for ThreadWorkers {
    fn parallelism(&self) -> usize {
        self.threads
    }
    fn spawn(&self, job: Job) {
        std::thread::spawn(job);
    }
    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let work = || loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            each(index);
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads.min(count) {
                scope.spawn(work);
            }
            work();
        });
    }
    /// Ticks as often as can be, so that more happens at the same time.
    fn every(&self, _period_ms: u64, mut tick: Box<dyn FnMut() -> bool + Send>) {
        std::thread::spawn(move || {
            while tick() {
                std::thread::sleep(core::time::Duration::from_millis(1));
            }
        });
    }
}

/// zstd and CRC32C from their crates.
pub struct CrateCodecs;

impl Codecs for CrateCodecs {
    fn crc32c(&self, bytes: &[u8]) -> u32 {
        crc32c::crc32c(bytes)
    }
    fn zstd_compress(&self, src: &[u8], dst: &mut [u8], level: i32) -> Option<usize> {
        zstd::bulk::compress_to_buffer(src, dst, level).ok()
    }
    fn zstd_expand(&self, src: &[u8], dst: &mut [u8]) -> bool {
        zstd::bulk::decompress_to_buffer(src, dst).is_ok_and(|len| len == dst.len())
    }
}

/// Keeps every incident for the test to look at.
#[derive(Default)]
pub struct Incidents {
    seen: Mutex<Vec<Incident>>,
}

impl Incidents {
    /// Takes what was reported since the last call.
    pub fn take(&self) -> Vec<Incident> {
        core::mem::take(&mut *self.seen.lock())
    }
}

impl Report for Incidents {
    fn incident(&self, incident: &Incident) {
        self.seen.lock().push(incident.clone());
    }
}

/// A platform with the handles a test needs.
pub struct TestPlatform {
    /// What the core is given.
    pub platform: Platform,
    /// Its clock.
    pub clock: Arc<ManualClock>,
    /// What it was told.
    pub incidents: Arc<Incidents>,
}

impl TestPlatform {
    /// A platform without threads.
    pub fn new(seed: u64) -> TestPlatform {
        TestPlatform::with_workers(seed, Arc::new(SerialWorkers))
    }

    /// A platform with those threads.
    pub fn with_workers(seed: u64, workers: Arc<dyn Workers>) -> TestPlatform {
        let clock = Arc::new(ManualClock::default());
        let incidents = Arc::new(Incidents::default());
        let platform = Platform {
            clock: clock.clone(),
            entropy: Arc::new(SeededEntropy::new(seed)),
            workers,
            codecs: Arc::new(CrateCodecs),
            report: incidents.clone(),
        };
        TestPlatform { platform, clock, incidents }
    }
}
