//! Compression and checksums by the libraries of user space.
//!
//! A zstd context is worth keeping: making one costs more than compressing a small block. Contexts
//! wait in a pool, not in thread-local storage, so that there are as many as run at once and not as
//! many as there are threads.

use fs_core::platform::Codecs;
use fs_core::sync::Mutex;
use zstd::zstd_safe::{find_frame_compressed_size, CCtx, DCtx};

/// Contexts kept when idle; more are made when needed, and freed after.
const IDLE_CONTEXTS: usize = 16;

/// A stack of idle contexts.
struct Idle<T>(Mutex<Vec<T>>);

impl<T> Idle<T> {
    const fn new() -> Idle<T> {
        Idle(Mutex::new(Vec::new()))
    }

    fn with<R>(
        &self,
        make: impl FnOnce() -> Option<T>,
        work: impl FnOnce(&mut T) -> R,
    ) -> Option<R> {
        let idle = self.0.lock().pop();
        let mut context = match idle {
            Some(context) => context,
            None => make()?,
        };
        let result = work(&mut context);
        let mut stack = self.0.lock();
        if stack.len() < IDLE_CONTEXTS {
            stack.push(context);
        }
        Some(result)
    }
}

/// The codecs of user space.
pub struct HostCodecs {
    compressors: Idle<CCtx<'static>>,
    expanders: Idle<DCtx<'static>>,
}

impl HostCodecs {
    /// Codecs without contexts yet.
    pub const fn new() -> HostCodecs {
        HostCodecs { compressors: Idle::new(), expanders: Idle::new() }
    }
}

impl Default for HostCodecs {
    fn default() -> HostCodecs {
        HostCodecs::new()
    }
}

impl Codecs for HostCodecs {
    fn crc32c(&self, bytes: &[u8]) -> u32 {
        crc32c::crc32c(bytes)
    }

    fn zstd_compress(&self, src: &[u8], dst: &mut [u8], level: i32) -> Option<usize> {
        self.compressors.with(CCtx::try_create, |c| c.compress(dst, src, level).ok())?
    }

    fn zstd_expand(&self, src: &[u8], dst: &mut [u8]) -> bool {
        // libzstd accepts frames in a row and skippable ones; the format has exactly one.
        if find_frame_compressed_size(src) != Ok(src.len()) {
            return false;
        }
        let expanded = self.expanders.with(DCtx::try_create, |d| {
            let len = dst.len();
            d.decompress(dst, src) == Ok(len)
        });
        expanded == Some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn crc32c_has_the_check_value_of_rfc_3720() {
        assert_eq!(HostCodecs::new().crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(HostCodecs::new().crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn compression_says_none_when_the_result_does_not_fit() {
        let codecs = HostCodecs::new();
        let noise: Vec<u8> = blake3::Hasher::new().finalize_xof().by_bytes(8192);
        assert_eq!(codecs.zstd_compress(&noise, &mut vec![0; 4096], 3), None);
        assert!(codecs.zstd_compress(&[7; 8192], &mut vec![0; 4096], 3).is_some());
    }

    #[test]
    fn two_frames_in_a_row_are_not_one_frame() {
        let codecs = HostCodecs::new();
        let mut packed = vec![0; 256];
        let n = codecs.zstd_compress(&[7; 4096], &mut packed, 3).unwrap();
        packed.truncate(n);
        assert!(codecs.zstd_expand(&packed, &mut [0; 4096]));
        let twice = [&packed[..], &packed[..]].concat();
        assert!(!codecs.zstd_expand(&twice, &mut [0; 8192]));
        assert!(!codecs.zstd_expand(&packed, &mut [0; 8192]));
        assert!(!codecs.zstd_expand(&packed, &mut [0; 2048]));
        assert!(!codecs.zstd_expand(&packed[..n - 1], &mut [0; 4096]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_compressed_expands_to_itself(
            data in proptest::collection::vec(0u8..4, 0..20_000), level in -5i32..=9
        ) {
            let codecs = HostCodecs::new();
            let mut packed = vec![0; data.len() + 1024];
            let n = codecs.zstd_compress(&data, &mut packed, level).unwrap();
            let mut back = vec![0; data.len()];
            prop_assert!(codecs.zstd_expand(&packed[..n], &mut back));
            prop_assert_eq!(back, data);
        }

        #[test]
        fn bytes_that_are_no_frame_are_refused_without_a_panic(
            junk in proptest::collection::vec(any::<u8>(), 0..512)
        ) {
            let mut out = [0; 4096];
            let _ = HostCodecs::new().zstd_expand(&junk, &mut out);
        }
    }

    trait ByBytes {
        fn by_bytes(self, count: usize) -> Vec<u8>;
    }
    impl ByBytes for blake3::OutputReader {
        fn by_bytes(mut self, count: usize) -> Vec<u8> {
            let mut bytes = vec![0; count];
            self.fill(&mut bytes);
            bytes
        }
    }
}
