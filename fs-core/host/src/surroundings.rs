//! Time and randomness, real and fixed.
//!
//! The fixed kinds make `mkfs` reproducible: the same arguments and the same seed give the same
//! image, byte for byte.

use fs_core::platform::{Clock, Entropy, Timestamp};
use fs_core::sync::Mutex;
use rustix::time::{clock_gettime, ClockId};

/// The clocks of the system.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        let t = clock_gettime(ClockId::Realtime);
        Timestamp { secs: t.tv_sec, nanos: t.tv_nsec as u32 }
    }

    fn uptime_ns(&self) -> u64 {
        let t = clock_gettime(ClockId::Monotonic);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

/// A wall clock that stands still. Uptime goes on, so that timeouts work.
#[derive(Clone, Copy, Debug)]
pub struct FixedClock(pub Timestamp);

impl Clock for FixedClock {
    fn now(&self) -> Timestamp {
        self.0
    }

    fn uptime_ns(&self) -> u64 {
        HostClock.uptime_ns()
    }
}

/// Randomness of the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
                Ok(got) => rest = &mut rest[got..],
                Err(rustix::io::Errno::INTR) => {}
                // Ids and hash keys made of anything else would collide or be guessed.
                Err(error) => panic!("the kernel gives no randomness: {error}"),
            }
        }
    }
}

/// Randomness that follows from a seed: the output stream of BLAKE3 over it.
pub struct SeededEntropy(Mutex<blake3::OutputReader>);

impl SeededEntropy {
    /// The stream of `seed`.
    pub fn new(seed: &[u8]) -> SeededEntropy {
        let mut hasher = blake3::Hasher::new_derive_key("cairn 2025 mkfs --seed");
        hasher.update(seed);
        SeededEntropy(Mutex::new(hasher.finalize_xof()))
    }
}

impl Entropy for SeededEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.lock().fill(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_entropy_repeats_with_its_seed_and_never_within_a_stream() {
        let (a, b, c) =
            (SeededEntropy::new(b"1"), SeededEntropy::new(b"1"), SeededEntropy::new(b"2"));
        let draw = |e: &SeededEntropy| {
            let mut bytes = [0; 32];
            e.fill(&mut bytes);
            bytes
        };
        let first = draw(&a);
        assert_eq!(first, draw(&b));
        assert_ne!(first, draw(&c));
        assert_ne!(first, draw(&a));
    }

    #[test]
    fn uptime_never_goes_back_and_wall_time_is_after_2024() {
        let before = HostClock.uptime_ns();
        assert!(HostClock.uptime_ns() >= before);
        assert!(HostClock.now().secs > 1_704_067_200);
    }

    #[test]
    fn kernel_entropy_fills_every_part_of_a_large_buffer() {
        let mut bytes = vec![0; 4096];
        HostEntropy.fill(&mut bytes);
        assert!(bytes.chunks(64).all(|part| part.iter().any(|b| *b != 0)));
    }
}
