//! Checksums and compression by kind.
//!
//! Everything above names a [`ChecksumKind`] or [`CompressionKind`]; this module turns it into
//! calls of the platform's [`Codecs`]. It has no state.
//!
//! Compression is tried only when it may pay. Data that is already compressed or encrypted is
//! common, and finding that out by compressing it costs the most exactly where nothing is gained.
//! So a longer input is sampled first: a few sectors are counted into a histogram of byte values,
//! and when its entropy is close to eight bits a byte, a short stretch is compressed as a trial
//! before the whole. The histogram is the heuristic of Btrfs (Titovets, `fs/btrfs/compression.c`,
//! 2017), whose entropy in quarter bits from integer logarithms is used here; the trial, which
//! keeps repetitive data with an even histogram from being given up, follows the early abort of
//! OpenZFS (Ebert, `zfs_zstd.c`, 2022).

use crate::buf::Buf;
use crate::error::Error;
use crate::format::ptr::{ChecksumKind, CompressionKind, BLOCK_BYTES_MAX};
use crate::platform::{Codecs, Result};
use crate::units::{sector_round, Logical, SECTOR_BYTES};
use alloc::vec::Vec;

const SECTOR: usize = SECTOR_BYTES as usize;

/// The checksum of `bytes`, padded with zeros.
pub fn checksum(codecs: &dyn Codecs, kind: ChecksumKind, bytes: &[u8]) -> [u8; 32] {
    match kind {
        ChecksumKind::None => [0; 32],
        ChecksumKind::Crc32c => {
            let mut padded = [0; 32];
            padded[..4].copy_from_slice(&codecs.crc32c(bytes).to_le_bytes());
            padded
        }
        ChecksumKind::Blake3 => codecs.blake3(bytes),
    }
}

/// Whether `bytes` have the checksum `want`, of which `kind.bytes()` bytes count.
pub fn matches(codecs: &dyn Codecs, kind: ChecksumKind, bytes: &[u8], want: &[u8]) -> bool {
    let width = kind.bytes();
    width == 0 || want.get(..width) == Some(&checksum(codecs, kind, bytes)[..width])
}

/// The checksums of the sectors of `bytes`, one after another, as a plain extent stores them.
///
/// # Errors
/// [`Error::Memory`] when there is not enough of it.
pub fn checksum_sectors(codecs: &dyn Codecs, kind: ChecksumKind, bytes: &[u8]) -> Result<Vec<u8>> {
    let width = kind.bytes();
    let mut sums = Vec::new();
    sums.try_reserve_exact(bytes.len().div_ceil(SECTOR) * width).map_err(|_| Error::Memory)?;
    if width > 0 {
        for sector in bytes.chunks(SECTOR) {
            sums.extend_from_slice(&checksum(codecs, kind, sector)[..width]);
        }
    }
    Ok(sums)
}

/// The indices of the sectors of `bytes` that do not have their checksum in `sums`. A sector
/// without a checksum is bad, unless `kind` has none.
pub fn bad_sectors<'a>(
    codecs: &'a dyn Codecs,
    kind: ChecksumKind,
    bytes: &'a [u8],
    sums: &'a [u8],
) -> impl Iterator<Item = usize> + 'a {
    let sectors = if kind == ChecksumKind::None { &[] } else { bytes };
    sectors.chunks(SECTOR).enumerate().filter_map(move |(index, sector)| {
        let good = matches(codecs, kind, sector, sector_sum(kind, sums, index));
        (!good).then_some(index)
    })
}

/// The checksum of sector `index` among `sums`; too short when it is not there.
pub fn sector_sum(kind: ChecksumKind, sums: &[u8], index: usize) -> &[u8] {
    let width = kind.bytes();
    let from = index.saturating_mul(width).min(sums.len());
    &sums[from..sums.len().min(from + width)]
}

/// Compressed bytes, zero up to the end of the buffer.
#[derive(Debug)]
pub struct Compressed {
    /// The bytes, padded to whole sectors.
    pub buf: Buf,
    /// How many of them count.
    pub stored: u32,
}

/// Compresses `src` if that saves at least one sector.
///
/// `None` when it does not, when `kind` is [`CompressionKind::None`], or when memory is short: the
/// data is then stored as it is. `take` gives buffers, which may hold anything.
pub fn compress(
    codecs: &dyn Codecs,
    kind: CompressionKind,
    level: i32,
    src: &[u8],
    take: impl Fn(usize) -> Result<Buf>,
) -> Option<Compressed> {
    let room = (sector_round(src.len() as u64) as usize).checked_sub(SECTOR)?;
    if kind == CompressionKind::None || room == 0 || looks_incompressible(codecs, src) {
        return None;
    }
    compress_within(codecs, kind, level, src, room, take)
}

/// Compresses `src` into at most `room` bytes, without looking first whether it may pay.
///
/// `None` when it does not fit, when `kind` is [`CompressionKind::None`], or when memory is short.
pub fn compress_within(
    codecs: &dyn Codecs,
    kind: CompressionKind,
    level: i32,
    src: &[u8],
    room: usize,
    take: impl Fn(usize) -> Result<Buf>,
) -> Option<Compressed> {
    let mut buf = take(room).ok()?;
    let stored = match kind {
        CompressionKind::None => return None,
        CompressionKind::Zstd => codecs.zstd_compress(src, &mut buf[..room], level)?,
    };
    // A buffer that lives on in dirty data should not hold the memory of the uncompressed size.
    if stored <= room / 2 {
        let large = buf;
        buf = take(stored).ok()?;
        buf[..stored].copy_from_slice(&large[..stored]);
    } else {
        buf.truncate(stored);
    }
    // A compressor may have used room after its result as scratch.
    buf[stored..].fill(0);
    Some(Compressed { buf, stored: u32::try_from(stored).ok()? })
}

/// Expands `stored`, whose checksum was right, to exactly `logical` bytes, zero-padded to whole
/// sectors. `addr` is for the error. `take` gives a buffer, which may hold anything.
///
/// # Errors
/// [`Error::Corrupt`] when `stored` is not what it should be, [`Error::Memory`].
pub fn expand(
    codecs: &dyn Codecs,
    kind: CompressionKind,
    stored: &[u8],
    logical: u32,
    addr: Logical,
    take: impl FnOnce(usize) -> Result<Buf>,
) -> Result<Buf> {
    if logical > BLOCK_BYTES_MAX {
        let what = "block expands to more than the largest block";
        return Err(Error::Corrupt { what, addr });
    }
    let logical = logical as usize;
    let mut buf = take(logical)?;
    expand_to(codecs, kind, stored, &mut buf[..logical], addr)?;
    buf[logical..].fill(0);
    Ok(buf)
}

/// As [`expand`], to the whole of `out`, which holds anything after an error.
///
/// # Errors
/// [`Error::Corrupt`] when `stored` is not what it should be.
pub fn expand_to(
    codecs: &dyn Codecs,
    kind: CompressionKind,
    stored: &[u8],
    out: &mut [u8],
    addr: Logical,
) -> Result<()> {
    let corrupt = |what| Err(Error::Corrupt { what, addr });
    match kind {
        CompressionKind::None if stored.len() != out.len() => {
            corrupt("uncompressed lengths differ")
        }
        CompressionKind::None => {
            out.copy_from_slice(stored);
            Ok(())
        }
        CompressionKind::Zstd if codecs.zstd_expand(stored, out) => Ok(()),
        CompressionKind::Zstd => corrupt("compressed data does not expand to its length"),
    }
}

/// Inputs up to this length are compressed without sampling: a trial would be most of them.
const SAMPLED_FROM: usize = 32 << 10;
const SAMPLES: usize = 4;
const TRIAL_BYTES: usize = 16 << 10;
/// Entropy from which data is suspected to be incompressible, in quarter bits a byte: 7.75 bits.
const SUSPECT_QUARTER_BITS: u64 = 31;

fn looks_incompressible(codecs: &dyn Codecs, src: &[u8]) -> bool {
    src.len() > SAMPLED_FROM
        && sample_entropy(src) >= SUSPECT_QUARTER_BITS
        && compress_within(
            codecs,
            CompressionKind::Zstd,
            1,
            &src[..TRIAL_BYTES],
            TRIAL_BYTES / 8 * 7,
            Buf::zeroed,
        )
        .is_none()
}

/// Entropy of the byte values in evenly spread sectors of `src`, in quarter bits a byte.
fn sample_entropy(src: &[u8]) -> u64 {
    let mut counts = [0u16; 256];
    let step = src.len() / SAMPLES;
    for sample in 0..SAMPLES {
        for byte in &src[sample * step..sample * step + SECTOR] {
            counts[*byte as usize] += 1;
        }
    }
    let total = (SAMPLES * SECTOR) as u64;
    let sum: u64 = counts
        .iter()
        .filter(|count| **count > 0)
        .map(|count| u64::from(*count))
        .map(|count| count * (quarter_log2(total) - quarter_log2(count)))
        .sum();
    sum / total
}

/// `4 * log2(n)`, rounded down, for `n` from 1 to 2^15: the fourth power gives the two extra bits.
fn quarter_log2(n: u64) -> u64 {
    u64::from((n * n * n * n).ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Entropy;
    use crate::testing::{CrateCodecs, SeededEntropy};
    use alloc::vec;
    use proptest::prelude::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut noise = vec![0; bytes];
        SeededEntropy::new(7).fill(&mut noise);
        noise
    }

    /// A buffer that was used before.
    fn stale(bytes: usize) -> Result<Buf> {
        let mut buf = Buf::zeroed(bytes)?;
        buf.fill(0xA5);
        Ok(buf)
    }

    fn zstd(src: &[u8]) -> Option<Compressed> {
        compress(&CrateCodecs, CompressionKind::Zstd, 3, src, stale)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_compressed_expands_to_itself(
            word in proptest::collection::vec(any::<u8>(), 1..40),
            len in 1usize..200_000,
        ) {
            let src: Vec<u8> = word.iter().copied().cycle().take(len).collect();
            if let Some(packed) = zstd(&src) {
                let stored = &packed.buf[..packed.stored as usize];
                prop_assert!(packed.buf.len() + SECTOR <= sector_round(len as u64) as usize);
                prop_assert!(packed.buf[stored.len()..].iter().all(|b| *b == 0));
                let kind = CompressionKind::Zstd;
                let expand =
                    |len: usize| expand(&CrateCodecs, kind, stored, len as u32, Logical(0), stale);
                let back = expand(len).unwrap();
                prop_assert_eq!(&back[..len], &src[..]);
                prop_assert!(back[len..].iter().all(|b| *b == 0));
                prop_assert!(expand(len + 1).is_err());
            } else {
                prop_assert!(len <= 2 * SECTOR, "{} repetitive bytes were not compressed", len);
            }
        }

        #[test]
        fn every_flipped_sector_is_found_and_no_other(
            flips in proptest::collection::btree_set(0usize..8 * SECTOR, 0..4),
            blake in any::<bool>(),
        ) {
            let kind = if blake { ChecksumKind::Blake3 } else { ChecksumKind::Crc32c };
            let mut data = noise(8 * SECTOR);
            let sums = checksum_sectors(&CrateCodecs, kind, &data).unwrap();
            for at in &flips {
                data[*at] ^= 0x10;
            }
            let found: Vec<usize> = bad_sectors(&CrateCodecs, kind, &data, &sums).collect();
            let mut want: Vec<usize> = flips.iter().map(|at| at / SECTOR).collect();
            want.dedup();
            prop_assert_eq!(found, want);
        }
    }

    #[test]
    fn noise_is_given_up_and_text_is_not_suspected() {
        let noise = noise(128 << 10);
        assert!(sample_entropy(&noise) >= SUSPECT_QUARTER_BITS);
        assert!(looks_incompressible(&CrateCodecs, &noise));
        assert!(zstd(&noise).is_none());
        let text: Vec<u8> = b"the quick brown fox ".iter().copied().cycle().take(1 << 17).collect();
        assert!(sample_entropy(&text) < SUSPECT_QUARTER_BITS);
        assert!(zstd(&text).is_some());
    }

    #[test]
    fn repeated_noise_is_compressed_although_its_histogram_is_even() {
        let src: Vec<u8> = noise(2048).iter().copied().cycle().take(128 << 10).collect();
        assert!(sample_entropy(&src) >= 28, "entropy {}", sample_entropy(&src));
        assert!(zstd(&src).is_some());
    }

    #[test]
    fn a_missing_checksum_is_a_bad_sector() {
        let data = noise(2 * SECTOR);
        let sums = checksum_sectors(&CrateCodecs, ChecksumKind::Crc32c, &data).unwrap();
        let short = &sums[..6];
        let bad: Vec<usize> =
            bad_sectors(&CrateCodecs, ChecksumKind::Crc32c, &data, short).collect();
        assert_eq!(bad, [1]);
        assert_eq!(bad_sectors(&CrateCodecs, ChecksumKind::None, &data, &[]).count(), 0);
    }

    #[test]
    fn a_length_beyond_the_largest_block_is_refused_before_memory_is_asked_for() {
        let room = |_| panic!("memory was asked for");
        let kind = CompressionKind::Zstd;
        let error = expand(&CrateCodecs, kind, &[0; 16], u32::MAX, Logical(4096), room);
        assert!(matches!(error, Err(Error::Corrupt { addr: Logical(4096), .. })));
    }
}
