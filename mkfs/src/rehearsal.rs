//! A device in memory, as large as the real one: what is written to it is kept, the rest is zeros.

use fs_core::platform::{Device, DeviceError, DeviceRef, Geometry, ReadOp, WriteOp};
use fs_core::units::{Physical, SECTOR_BYTES};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

const SECTOR: usize = SECTOR_BYTES as usize;

pub(crate) struct Memory {
    name: String,
    bytes: u64,
    sectors: Mutex<BTreeMap<u64, Box<[u8]>>>,
}

impl Memory {
    /// A device of `bytes` zeros that bears the name of the real one.
    pub(crate) fn shared(path: &Path, bytes: u64) -> DeviceRef {
        let sectors = Mutex::default();
        Arc::new(Memory { name: path.display().to_string(), bytes, sectors })
    }

    fn in_range(&self, at: Physical, len: u64) -> Result<(), DeviceError> {
        let end = at.0.checked_add(len).filter(|end| *end <= self.bytes);
        end.map(|_| ()).ok_or(DeviceError::OutOfRange)
    }

    fn sectors(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Box<[u8]>>> {
        // A map of whole sectors is right at every moment, so a panic elsewhere harms nothing.
        self.sectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Memory {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.bytes, block_bytes: 512, discards: true, read_only: false }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        let sectors = self.sectors();
        for op in batch {
            op.result = self.in_range(op.at, op.buf.len() as u64);
            if op.result.is_err() {
                continue;
            }
            let numbers = op.at.0 / SECTOR_BYTES..;
            for (into, number) in op.buf.chunks_exact_mut(SECTOR).zip(numbers) {
                match sectors.get(&number) {
                    Some(content) => into.copy_from_slice(content),
                    None => into.fill(0),
                }
            }
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        let mut sectors = self.sectors();
        for op in batch {
            op.result = self.in_range(op.at, op.len());
            if op.result.is_err() {
                continue;
            }
            let contents = op.bufs.iter().flat_map(|buf| buf.chunks_exact(SECTOR));
            for (content, number) in contents.zip(op.at.0 / SECTOR_BYTES..) {
                // Zeros are what is there without an entry; wiping a device must not fill memory.
                if content.iter().all(|b| *b == 0) {
                    sectors.remove(&number);
                } else {
                    sectors.insert(number, content.into());
                }
            }
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        self.in_range(at, bytes)
    }

    fn name(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::buf::Buf;

    #[test]
    fn what_was_written_is_read_and_the_rest_is_zeros() {
        let device = Memory::shared(Path::new("m"), 1 << 50);
        let at = Physical((1 << 50) - 3 * SECTOR_BYTES);
        let one = Buf::copy_of(&[1; 2 * SECTOR]).unwrap().into_slice();
        let mut writes = [
            WriteOp { at, bufs: vec![one.clone(), one.part(0, SECTOR)], result: Ok(()) },
            WriteOp { at, bufs: vec![one.clone(), one], result: Ok(()) },
        ];
        device.write(&mut writes);
        assert_eq!(writes[0].result, Ok(()));
        assert_eq!(writes[1].result, Err(DeviceError::OutOfRange));
        let at = Physical(at.0 - SECTOR_BYTES);
        let mut reads = [ReadOp { at, buf: Buf::zeroed(2 * SECTOR).unwrap(), result: Ok(()) }];
        device.read(&mut reads);
        assert!(reads[0].buf[..SECTOR].iter().all(|b| *b == 0));
        assert!(reads[0].buf[SECTOR..].iter().all(|b| *b == 1));
    }
}
