//! The platform boundary: all the core knows of its surroundings.
//!
//! Six traits, used as objects because they are called per batch, per file or less. User space
//! implements them in `cairn-host`, the kernel module over bios and kthreads, the simulator over
//! memory. Locks are not here: they are called everywhere, so [`crate::sync`] picks them at compile
//! time.
//!
//! The core never starts a loop of its own: background work is started through [`Workers::spawn`],
//! and whoever waits for progress may do the work itself, so that a simulator without threads sees
//! every state in a fixed order.

use crate::buf::Buf;
use crate::error::{Error, Incident};
use crate::units::Physical;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What a device is and can do. Fixed while the device is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size in bytes; what lies beyond cannot be read or written.
    pub bytes: u64,
    /// Smallest unit the device writes, a power of two, at most [`crate::units::SECTOR_BYTES`].
    pub block_bytes: u32,
    /// Whether [`Device::discard`] does something.
    pub discards: bool,
    /// Whether the device refuses writes.
    pub read_only: bool,
}

/// One read of a batch. The result is filled in by the device.
pub struct ReadOp {
    /// Where to read; a multiple of the sector size.
    pub at: Physical,
    /// Filled on success; its length, a multiple of the sector size, is how much to read.
    pub buf: Buf,
    /// `Ok` until the device says otherwise.
    pub result: Result<(), DeviceError>,
}

/// One write of a batch: the pieces land one after another from `at`.
pub struct WriteOp {
    /// Where to write; a multiple of the sector size.
    pub at: Physical,
    /// What to write: shared slices, so that nothing is copied on the way to the device. Each
    /// slice's length is a multiple of the sector size.
    pub bufs: Vec<crate::buf::Slice>,
    /// `Ok` until the device says otherwise.
    pub result: Result<(), DeviceError>,
}

impl WriteOp {
    /// Total length in bytes.
    pub fn len(&self) -> u64 {
        self.bufs.iter().map(|b| b.len() as u64).sum()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.bufs.is_empty()
    }
}

/// Why a device refused. The core treats every kind as "this copy is not to be had".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The device reported an I/O error; the number is the platform's errno, zero when unknown.
    Io(i32),
    /// Beyond the end of the device.
    OutOfRange,
    /// The device is read-only.
    ReadOnly,
    /// The device is no longer there.
    Gone,
    /// Memory for the transfer was refused.
    Memory,
    /// The device cannot do that: only of discards.
    Unsupported,
}

/// A block device or image file. All methods block until done and may be called from any thread.
pub trait Device: Send + Sync {
    /// Size and abilities.
    fn geometry(&self) -> Geometry;
    /// Carries out every read of the batch, in any order, concurrently where it can; each op
    /// carries its own result.
    fn read(&self, batch: &mut [ReadOp]);
    /// Carries out every write of the batch, in any order. Durable only after [`Device::flush`].
    fn write(&self, batch: &mut [WriteOp]);
    /// Makes every write that was complete before this call durable.
    ///
    /// # Errors
    /// After an error nothing may be assumed about any write since the last flush that succeeded.
    fn flush(&self) -> Result<(), DeviceError>;
    /// Tells the device that a range holds nothing of value. A hint: contents are undefined after.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] when it turns out that the device has no use for it.
    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError>;
    /// A name for messages, such as a path.
    fn name(&self) -> &str;
}

/// A point in wall time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, Hash)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 UTC; may be negative.
    pub secs: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nanos: u32,
}

/// Time.
pub trait Clock: Send + Sync {
    /// Wall time.
    fn now(&self) -> Timestamp;
    /// Nanoseconds since some fixed point; never goes back.
    fn uptime_ns(&self) -> u64;
}

/// Randomness for identities and hash keys.
pub trait Entropy: Send + Sync {
    /// Fills `bytes`.
    fn fill(&self, bytes: &mut [u8]);
}

/// A job for a background thread.
pub type Job = Box<dyn FnOnce() + Send>;

/// Threads.
pub trait Workers: Send + Sync {
    /// How many jobs can really run at once; at least one.
    fn parallelism(&self) -> usize;
    /// Runs `job` on some other thread, soon; a platform without threads may run it at once.
    fn spawn(&self, job: Job);
    /// Calls `each` with `0..count`, on several threads when that pays, and returns when all are
    /// done. The caller's thread takes part, so this makes progress even with no free worker.
    fn parallel_for(&self, count: usize, each: &(dyn Fn(usize) + Sync));
    /// Calls `tick` about every `period_ms` until it returns false. A platform without threads
    /// ignores it: there, the owner drives progress.
    fn every(&self, period_ms: u64, tick: Box<dyn FnMut() -> bool + Send>);
}

/// Compression and accelerated checksums. Codecs hold no state between calls that a caller can see.
pub trait Codecs: Send + Sync {
    /// CRC32C (Castagnoli) of `bytes`, initial value and final xor as in RFC 3720.
    fn crc32c(&self, bytes: &[u8]) -> u32;
    /// BLAKE3-256 of `bytes`.
    fn blake3(&self, bytes: &[u8]) -> [u8; 32] {
        blake3(bytes)
    }
    /// Compresses `src` into `dst` as one zstd frame. `None` when it does not fit in `dst`.
    fn zstd_compress(&self, src: &[u8], dst: &mut [u8], level: i32) -> Option<usize>;
    /// Expands one zstd frame that must fill `dst` exactly. False when `src` is not such a frame.
    fn zstd_expand(&self, src: &[u8], dst: &mut [u8]) -> bool;
}

/// BLAKE3-256 of `bytes`, without the help of a platform.
#[cfg(not(feature = "kernel"))]
pub fn blake3(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// BLAKE3-256 of `bytes`, without the help of a platform.
///
/// At once, it would halve its input recursively: up to 7 KiB of stack for a tree node. Chunk by
/// chunk it does not, and the hasher, 2 KiB, is on the heap. The vector instructions that doing
/// much at once is for are not to be had in a kernel.
#[cfg(feature = "kernel")]
pub fn blake3(bytes: &[u8]) -> [u8; 32] {
    #[inline(never)]
    fn hasher() -> Box<blake3::Hasher> {
        Box::new(blake3::Hasher::new())
    }
    let mut hasher = hasher();
    for chunk in bytes.chunks(blake3::CHUNK_LEN) {
        hasher.update(chunk);
    }
    *hasher.finalize().as_bytes()
}

/// Receives what administrators must learn of.
pub trait Report: Send + Sync {
    /// Called at most once per distinct incident and place; must not call back into the core.
    fn incident(&self, incident: &Incident);
}

/// The surroundings of one pool, handed to it when it is opened.
#[derive(Clone)]
pub struct Platform {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub entropy: Arc<dyn Entropy>,
    /// Threads.
    pub workers: Arc<dyn Workers>,
    /// Compression and checksums.
    pub codecs: Arc<dyn Codecs>,
    /// Incident sink.
    pub report: Arc<dyn Report>,
}

/// A device with what the core must know to open it.
pub type DeviceRef = Arc<dyn Device>;

/// Shorthand used all over the core.
pub type Result<T, E = Error> = core::result::Result<T, E>;
