//! What the module tries of itself while loading, with `selftest=1`.
//!
//! Each test is a function whose name is a sentence that would be false if it failed. The table at
//! the end runs them in order; all run even if one fails.

use crate::codecs::KernelCodecs;
use crate::klock::{self, Mood};
use crate::kthread::{Pool, Thread};
use crate::ram::RamDevice;
use crate::services::{KernelClock, KernelEntropy, LogReport};
use crate::stack;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use fs_core::buf::Buf;
use fs_core::error::{Error, Incident};
use fs_core::format::{chunk, label, superblock, Skipped, FORMAT_VERSION};
use fs_core::platform::{
    Clock, Codecs, Device, DeviceError, Entropy, Platform, ReadOp, Report, WriteOp,
};
use fs_core::sync::{Mutex, RwLock, Signal};
use fs_core::units::{Logical, Physical, Txg};
use kernel::prelude::*;

/// Why a test failed.
type Failure = String;
/// What a test returns.
type Outcome = Result<(), Failure>;

/// Fails the test when the condition does not hold.
macro_rules! ensure {
    ($holds:expr) => {
        if !$holds {
            return Err(format!("line {}: not so: {}", line!(), stringify!($holds)));
        }
    };
}

/// Fails the test when the two differ, and says how.
macro_rules! ensure_eq {
    ($left:expr, $right:expr) => {
        match (&$left, &$right) {
            (left, right) if left == right => {}
            (left, right) => {
                return Err(format!("line {}: {left:?} is not {right:?}", line!()));
            }
        }
    };
}

mod filesystem;

fn failed(error: impl core::fmt::Debug) -> Failure {
    format!("{error:?}")
}

/// Runs `count` threads and waits for all.
fn on_threads(count: usize, main: impl Fn(usize) + Send + Sync + 'static) -> Outcome {
    let main = Arc::new(main);
    let mut threads = Vec::new();
    for index in 0..count {
        let main = main.clone();
        threads.push(Thread::spawn(move || main(index)).map_err(failed)?);
    }
    drop(threads);
    Ok(())
}

/// Random bytes and equal bytes in turns, so that they compress about two to one.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len);
    for index in 0..len {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.push(if index % 64 < 32 { state as u8 } else { b'=' });
    }
    bytes
}

// --- memory

fn containers_work_on_the_kernel_allocator() -> Outcome {
    let mut map = BTreeMap::new();
    for index in 0u64..10_000 {
        map.insert(index.wrapping_mul(0x9e37_79b9_7f4a_7c15), format!("value {index}"));
    }
    ensure_eq!(map.len(), 10_000);
    ensure_eq!(map.values().map(String::len).sum::<usize>(), 98_890);
    let mut grown = Vec::new();
    for index in 0u32..500_000 {
        grown.push(index);
    }
    ensure!(grown.iter().enumerate().all(|(index, value)| index as u32 == *value));
    grown.truncate(10);
    grown.shrink_to_fit();
    ensure_eq!(grown, (0..10).collect::<Vec<u32>>());
    Ok(())
}

fn buffers_are_zeroed_and_aligned_to_sectors() -> Outcome {
    for bytes in [1, 4096, 12_288, 131_072, 1 << 20, 4 << 20] {
        let mut buf = Buf::zeroed(bytes).map_err(failed)?;
        ensure_eq!(buf.len(), bytes.next_multiple_of(4096));
        ensure_eq!(buf.as_ptr() as usize % 4096, 0);
        ensure!(buf.iter().all(|byte| *byte == 0));
        buf.fill(0xa5);
    }
    Ok(())
}

fn too_large_a_buffer_is_refused_and_not_fatal() -> Outcome {
    ensure_eq!(Buf::zeroed(3 << 30).err(), Some(Error::Memory));
    ensure_eq!(Buf::zeroed(usize::MAX - 4096).err(), Some(Error::Memory));
    let mut list: Vec<u64> = Vec::new();
    ensure!(list.try_reserve_exact(1 << 40).is_err());
    Ok(())
}

// --- locks and waiting

fn a_mutex_admits_one_at_a_time() -> Outcome {
    const TURNS: u64 = 50_000;
    let count = Arc::new(Mutex::new(0u64));
    let shared = count.clone();
    on_threads(3, move |_| {
        for _ in 0..TURNS {
            let mut count = shared.lock();
            let before = *count;
            core::hint::black_box(&mut *count);
            *count = before + 1;
        }
    })?;
    ensure_eq!(*count.lock(), 3 * TURNS);
    let held = count.lock();
    ensure!(count.try_lock().is_none());
    drop(held);
    ensure!(count.try_lock().is_some());
    Ok(())
}

fn readers_never_see_half_of_a_write() -> Outcome {
    const TURNS: u64 = 20_000;
    let pair = Arc::new(RwLock::new((0u64, 0u64)));
    let torn = Arc::new(AtomicU64::new(0));
    let (shared, seen) = (pair.clone(), torn.clone());
    on_threads(4, move |index| {
        for _ in 0..TURNS {
            if index < 2 {
                let mut pair = shared.write();
                pair.0 += 1;
                core::hint::black_box(&mut *pair);
                pair.1 += 1;
            } else {
                let pair = shared.read();
                if pair.0 != pair.1 {
                    seen.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    })?;
    ensure_eq!(torn.load(Ordering::Relaxed), 0);
    ensure_eq!(*pair.read(), (2 * TURNS, 2 * TURNS));
    let reader = pair.read();
    ensure!(pair.try_read().is_some());
    ensure!(pair.try_write().is_none());
    drop(reader);
    let writer = pair.write();
    ensure!(pair.try_read().is_none());
    drop(writer);
    Ok(())
}

fn an_unlocked_lock_may_be_moved() -> Outcome {
    let mut mutex = Mutex::new(1);
    *mutex.lock() += 1;
    for _ in 0..10 {
        let moved = Box::new(mutex);
        *moved.lock() += 1;
        mutex = *moved;
    }
    ensure_eq!(mutex.into_inner(), 12);
    Ok(())
}

fn a_signal_wakes_whoever_waits_for_it() -> Outcome {
    const TURNS: u64 = 300;
    let shared = Arc::new((Signal::new(), AtomicU64::new(0)));
    let ball = shared.clone();
    on_threads(2, move |index| {
        let (signal, turn) = &*ball;
        for round in 0..TURNS {
            let mine = 2 * round + index as u64;
            signal.wait_until(|| turn.load(Ordering::Acquire) == mine);
            turn.store(mine + 1, Ordering::Release);
            signal.notify_all();
        }
    })?;
    ensure_eq!(shared.1.load(Ordering::Relaxed), 2 * TURNS);
    Ok(())
}

fn a_condition_may_take_a_lock() -> Outcome {
    const ITEMS: usize = 5_000;
    let shared = Arc::new((Signal::new(), Mutex::new(Vec::new()), AtomicUsize::new(0)));
    let queue = shared.clone();
    on_threads(3, move |index| {
        let (signal, items, taken) = &*queue;
        if index == 0 {
            for item in 0..ITEMS {
                items.lock().push(item);
                signal.notify_all();
            }
            return;
        }
        while taken.fetch_add(1, Ordering::Relaxed) < ITEMS {
            let mut item = None;
            signal.wait_until(|| {
                item = items.lock().pop();
                item.is_some()
            });
        }
    })?;
    ensure!(shared.1.lock().is_empty());
    Ok(())
}

fn a_wait_with_a_limit_ends() -> Outcome {
    let key = AtomicBool::new(false);
    let begin = KernelClock.uptime_ns();
    let ready = klock::wait(key.as_ptr().cast(), Mood::Idle, Some(klock::ticks_of_ms(50)), || {
        key.load(Ordering::Relaxed)
    });
    ensure!(!ready);
    ensure!(KernelClock.uptime_ns() - begin >= 40_000_000);
    Ok(())
}

// --- platform services

fn parallel_for_calls_every_index_once() -> Outcome {
    let pool = Pool::new(3).map_err(failed)?;
    let workers = pool.workers();
    for count in [0, 1, 2, 3, 100, 5_000] {
        let calls: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
        workers.parallel_for(count, &|index| {
            calls[index].fetch_add(1, Ordering::Relaxed);
        });
        ensure!(calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1));
    }
    Ok(())
}

fn parallel_for_may_be_nested() -> Outcome {
    let pool = Pool::new(2).map_err(failed)?;
    let workers = pool.workers();
    let sum = AtomicU64::new(0);
    workers.parallel_for(8, &|outer| {
        workers.parallel_for(8, &|inner| {
            sum.fetch_add((outer * 8 + inner) as u64, Ordering::Relaxed);
        });
    });
    ensure_eq!(sum.load(Ordering::Relaxed), 63 * 64 / 2);
    Ok(())
}

fn jobs_given_before_the_pool_ends_are_done() -> Outcome {
    let pool = Pool::new(2).map_err(failed)?;
    let workers = pool.workers();
    let count = Arc::new(AtomicU64::new(0));
    let job = || {
        let count = count.clone();
        Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
    };
    for _ in 0..1000 {
        workers.spawn(job());
    }
    drop(pool);
    ensure_eq!(count.load(Ordering::Relaxed), 1000);
    workers.spawn(job());
    ensure_eq!(count.load(Ordering::Relaxed), 1001);
    Ok(())
}

fn a_ticker_ticks_until_it_says_stop_or_the_pool_ends() -> Outcome {
    let pool = Pool::new(1).map_err(failed)?;
    let shared = Arc::new((Signal::new(), AtomicU64::new(0)));
    let ticks = shared.clone();
    pool.workers().every(
        10,
        Box::new(move || {
            let count = ticks.1.fetch_add(1, Ordering::AcqRel) + 1;
            ticks.0.notify_all();
            count < 3
        }),
    );
    // A second one, which only the end of the pool stops.
    pool.workers().every(3_600_000, Box::new(|| true));
    shared.0.wait_until(|| shared.1.load(Ordering::Acquire) == 3);
    drop(pool);
    ensure_eq!(shared.1.load(Ordering::Relaxed), 3);
    Ok(())
}

fn clocks_advance_and_random_bytes_differ() -> Outcome {
    let begin = KernelClock.uptime_ns();
    let now = KernelClock.now();
    ensure!(now.nanos < 1_000_000_000);
    // The emulated clock is right to the day: after 2024, before 2100.
    ensure!((1_704_067_200..4_102_444_800).contains(&now.secs));
    ensure!(KernelClock.uptime_ns() >= begin);
    let (mut first, mut second) = ([0u8; 32], [0u8; 32]);
    KernelEntropy.fill(&mut first);
    KernelEntropy.fill(&mut second);
    ensure!(first != second && first != [0; 32]);
    Ok(())
}

fn an_incident_reaches_the_log() -> Outcome {
    LogReport.incident(&Incident::Replayed { records: 0 });
    Ok(())
}

fn checksums_have_their_published_values() -> Outcome {
    let codecs = KernelCodecs::new().map_err(failed)?;
    ensure_eq!(codecs.crc32c(b"123456789"), 0xe306_9283);
    ensure_eq!(codecs.crc32c(&[0; 32]), 0x8a91_36aa);
    ensure_eq!(codecs.crc32c(b""), 0);
    ensure_eq!(codecs.blake3(b"")[..8], [0xaf, 0x13, 0x49, 0xb9, 0xf5, 0xf9, 0xa1, 0xa6]);
    // Long enough for the tree of hashes to have several levels.
    let long: Vec<u8> = (0..102_400u32).map(|index| (index % 251) as u8).collect();
    ensure_eq!(codecs.blake3(&long)[..8], [0xbc, 0x3e, 0x3d, 0x41, 0xa1, 0x14, 0x6b, 0x06]);
    Ok(())
}

fn what_zstd_compressed_it_expands() -> Outcome {
    let codecs = KernelCodecs::new().map_err(failed)?;
    for (len, level) in [(1, 3), (4096, 1), (131_072, 3), (131_072, 9), (131_072, -5)] {
        let plain = pattern(len, len as u32);
        let mut packed = vec![0; len + 1024];
        let written = codecs.zstd_compress(&plain, &mut packed, level).ok_or("no room")?;
        packed.truncate(written);
        let mut back = vec![0; len];
        ensure!(codecs.zstd_expand(&packed, &mut back));
        ensure!(back == plain);
        if len == 1 {
            continue;
        }
        ensure!(written < len);
        ensure!(codecs.zstd_compress(&plain, &mut vec![0; written - 1], level).is_none());
        ensure!(!codecs.zstd_expand(&packed[..written - 1], &mut back));
        ensure!(!codecs.zstd_expand(&packed, &mut back[..len - 1]));
        ensure!(!codecs.zstd_expand(&packed, &mut vec![0; len + 1]));
        let twice = [&packed[..], &packed[..]].concat();
        ensure!(!codecs.zstd_expand(&twice, &mut vec![0; 2 * len]));
    }
    ensure!(!codecs.zstd_expand(b"", &mut []));
    Ok(())
}

fn codecs_may_be_used_by_many_threads() -> Outcome {
    let codecs = Arc::new(KernelCodecs::new().map_err(failed)?);
    let bad = Arc::new(AtomicU64::new(0));
    let seen = bad.clone();
    on_threads(3, move |index| {
        let plain = pattern(65_536, index as u32 + 1);
        let mut packed = vec![0; 65_536];
        let mut back = vec![0; 65_536];
        for _ in 0..10 {
            let ok = codecs
                .zstd_compress(&plain, &mut packed, 3)
                .is_some_and(|len| codecs.zstd_expand(&packed[..len], &mut back))
                && back == plain;
            seen.fetch_add(u64::from(!ok), Ordering::Relaxed);
        }
    })?;
    ensure_eq!(bad.load(Ordering::Relaxed), 0);
    Ok(())
}

// --- the core's own structures

fn a_label_reads_back_and_a_changed_one_does_not() -> Outcome {
    let written = label::Label {
        magic: label::LABEL_MAGIC,
        version: FORMAT_VERSION,
        sector_bytes: 4096,
        pool_id: [7; 16],
        device_id: [8; 16],
        device_index: 0,
        reserved0: [0; 6],
        device_bytes: 64 << 20,
        name: [b'n'; 64],
        written: 1,
        sequence: 3,
        epoch: 0,
        device_count: 0,
        reserved1: [0; 6],
        members: Skipped::ZEROS,
        reserved: Skipped::ZEROS,
        checksum: [0; 32],
    };
    let mut bytes = written.encode(&[]);
    let mut read = label::Label::decode(&bytes).map_err(failed)?;
    read.checksum = [0; 32];
    ensure_eq!(read, written);
    for at in (0..bytes.len()).step_by(97) {
        bytes[at] ^= 0x10;
        ensure!(label::Label::decode(&bytes).is_err());
        bytes[at] ^= 0x10;
    }
    Ok(())
}

fn a_superblock_reads_back_and_a_changed_one_does_not() -> Outcome {
    let system = chunk::Chunk {
        logical: Logical(1 << 20),
        length: 1 << 20,
        birth: Txg(1),
        kind: chunk::ChunkKind::System,
        profile: chunk::Profile::Dup,
        stripes: vec![
            chunk::Stripe { device: 0, physical: Physical(1 << 20) },
            chunk::Stripe { device: 0, physical: Physical(2 << 20) },
        ],
    };
    let written = superblock::Superblock {
        txg: Txg(5),
        written: 1,
        pool_id: [7; 16],
        features: [0; 3],
        hash_secret: [9; 16],
        node_bytes: 16_384,
        device_count: 1,
        data_profile: chunk::Profile::Single,
        metadata_profile: chunk::Profile::Dup,
        clean: true,
        next_chunk: Logical(1 << 30),
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
        data_used: 1,
        metadata_used: 2,
        system_chunks: vec![system],
    };
    let mut bytes = written.encode();
    ensure_eq!(superblock::Superblock::decode(&bytes), Ok(written));
    for at in (0..bytes.len()).step_by(97) {
        bytes[at] ^= 0x10;
        ensure!(superblock::Superblock::decode(&bytes).is_err());
        bytes[at] ^= 0x10;
    }
    Ok(())
}

// --- devices

fn a_ram_device_keeps_what_is_written_and_refuses_what_is_beyond() -> Outcome {
    let device = RamDevice::new("ram", 4 << 20).map_err(failed)?;
    let data = pattern(320 << 10, 5);
    let slice = Buf::copy_of(&data).map_err(failed)?.into_slice();
    let at = Physical(100 << 10);
    let halves = vec![slice.part(0, 128 << 10), slice.part(128 << 10, 192 << 10)];
    let beyond = Physical((4 << 20) - 4096);
    let mut writes = [
        WriteOp { at, bufs: halves, result: Ok(()) },
        WriteOp { at: beyond, bufs: vec![slice.part(0, 8192)], result: Ok(()) },
        WriteOp { at: Physical(u64::MAX - 4095), bufs: vec![slice], result: Ok(()) },
    ];
    device.write(&mut writes);
    ensure_eq!(writes[0].result, Ok(()));
    ensure_eq!(writes[1].result, Err(DeviceError::OutOfRange));
    ensure_eq!(writes[2].result, Err(DeviceError::OutOfRange));
    device.flush().map_err(failed)?;
    ensure_eq!(device.flushes(), 1);
    let mut reads = [
        ReadOp { at, buf: Buf::zeroed(data.len()).map_err(failed)?, result: Ok(()) },
        ReadOp { at: Physical(512), buf: Buf::zeroed(4096).map_err(failed)?, result: Ok(()) },
    ];
    device.read(&mut reads);
    ensure_eq!(reads[0].result, Ok(()));
    ensure!(*reads[0].buf == data[..]);
    ensure!(reads[1].result.is_err());
    device.discard(at, 4096).map_err(failed)?;
    device.read(&mut reads[..1]);
    ensure!(reads[0].buf[..4096] != data[..4096] && reads[0].buf[4096..] == data[4096..]);
    Ok(())
}

/// The kernel as the core's surroundings. The pool must outlive what is opened with it.
fn platform(pool: &Pool) -> Result<Platform, Failure> {
    Ok(Platform {
        clock: Arc::new(KernelClock),
        entropy: Arc::new(KernelEntropy),
        workers: pool.workers(),
        codecs: Arc::new(KernelCodecs::new().map_err(failed)?),
        report: Arc::new(LogReport),
    })
}

fn the_core_gets_a_whole_platform() -> Outcome {
    let pool = Pool::for_this_machine().map_err(failed)?;
    let platform = platform(&pool)?;
    ensure!(platform.workers.parallelism() >= 1);
    Ok(())
}

macro_rules! tests {
    ($($($part:ident)::+),* $(,)?) => {
        &[$((stringify!($($part)::+), $($part)::+ as fn() -> Outcome)),*]
    };
}

const TESTS: &[(&str, fn() -> Outcome)] = tests![
    containers_work_on_the_kernel_allocator,
    buffers_are_zeroed_and_aligned_to_sectors,
    too_large_a_buffer_is_refused_and_not_fatal,
    a_mutex_admits_one_at_a_time,
    readers_never_see_half_of_a_write,
    an_unlocked_lock_may_be_moved,
    a_signal_wakes_whoever_waits_for_it,
    a_condition_may_take_a_lock,
    a_wait_with_a_limit_ends,
    parallel_for_calls_every_index_once,
    parallel_for_may_be_nested,
    jobs_given_before_the_pool_ends_are_done,
    a_ticker_ticks_until_it_says_stop_or_the_pool_ends,
    clocks_advance_and_random_bytes_differ,
    an_incident_reaches_the_log,
    checksums_have_their_published_values,
    what_zstd_compressed_it_expands,
    codecs_may_be_used_by_many_threads,
    a_label_reads_back_and_a_changed_one_does_not,
    a_superblock_reads_back_and_a_changed_one_does_not,
    a_ram_device_keeps_what_is_written_and_refuses_what_is_beyond,
    the_core_gets_a_whole_platform,
    filesystem::a_filesystem_keeps_its_files_over_reopening,
    filesystem::a_synced_file_survives_a_crash,
    filesystem::threads_may_share_a_filesystem,
];

/// Most of a stack of 16 KiB that a test may use: the rest is for whoever calls a filesystem, and
/// for interrupts.
const STACK_BYTES_MAX: usize = 12 << 10;

/// How often a test may begin to find out what it needs itself: an interrupt at the deepest place
/// adds up to 2 KiB, and does not come at that place each time.
const STACK_TRIES: u32 = 3;

/// Runs one test on a thread of its own, whose stack is watched.
fn run_one(test: fn() -> Outcome) -> Outcome {
    let outcome = Arc::new(Mutex::new(None));
    let slot = outcome.clone();
    drop(Thread::spawn(move || *slot.lock() = Some(test())).map_err(failed)?);
    let outcome = outcome.lock().take();
    outcome.unwrap_or_else(|| Err(String::from("the thread ended without a result")))
}

/// Runs one test, and says how many bytes of stack it needed.
fn measure(test: fn() -> Outcome) -> (Outcome, usize) {
    let mut least = usize::MAX;
    for _ in 0..STACK_TRIES {
        let outcome = run_one(test);
        let bytes = stack::take_deepest();
        least = least.min(bytes);
        if outcome.is_err() || least <= STACK_BYTES_MAX {
            return (outcome, least);
        }
        pr_info!("selftest used {} bytes of stack, and is run again\n", bytes);
    }
    (Err(format!("used {least} bytes of stack")), least)
}

/// Runs all tests.
///
/// # Errors
/// When one fails; the log says which.
pub(crate) fn run() -> Result {
    stack::watch(true);
    let mut failures = 0;
    for (name, test) in TESTS {
        let begin = KernelClock.uptime_ns();
        let (outcome, bytes) = measure(*test);
        let ms = (KernelClock.uptime_ns() - begin) / 1_000_000;
        match outcome {
            Ok(()) => pr_info!("selftest {} ... ok ({} ms, {} bytes of stack)\n", name, ms, bytes),
            Err(why) => {
                failures += 1;
                pr_err!("selftest {} ... FAILED: {}\n", name, &*why);
            }
        }
    }
    stack::watch(false);
    pr_info!("selftest: {} passed, {} failed\n", TESTS.len() - failures, failures);
    if failures == 0 {
        Ok(())
    } else {
        Err(EIO)
    }
}
