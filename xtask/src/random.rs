//! Repeatable randomness, and memory for direct I/O.

use anyhow::Result;

/// Memory that O_DIRECT accepts.
pub struct Aligned {
    memory: fs_core::buf::Buf,
}

impl Aligned {
    /// So many zeros.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(bytes: usize) -> Result<Aligned> {
        Ok(Aligned { memory: fs_core::buf::Buf::zeroed(bytes)? })
    }

    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

/// Numbers that follow from a seed: xorshift64*, which is enough to pick calls with.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.word() >> 33) as usize % bound
    }

    /// Fills `bytes` with what no compressor can shorten.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.word().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
