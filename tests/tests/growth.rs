//! Pools that become much larger than they were made.

use cairn_tests::platform::{Spawn, TestPlatform};
use fs_core::engine::{format, FormatOptions, OpenOptions};
use fs_core::format::chunk::{ChunkKind, Profile};
use fs_core::platform::{Device, DeviceError, DeviceRef, Geometry, ReadOp, WriteOp};
use fs_core::units::{Physical, SECTOR_BYTES};
use fs_core::vfs::{AccessTime, Volume};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

const SECTOR: usize = SECTOR_BYTES as usize;

/// A device of any size, of which only what was written takes memory.
struct Sparse {
    bytes: u64,
    sectors: Mutex<BTreeMap<u64, Box<[u8]>>>,
}

impl Sparse {
    fn new(bytes: u64) -> Arc<Sparse> {
        Arc::new(Sparse { bytes, sectors: Mutex::default() })
    }
}

impl Device for Sparse {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.bytes, block_bytes: 4096, discards: false, read_only: false }
    }

    fn read(&self, batch: &mut [ReadOp]) {
        let sectors = self.sectors.lock().unwrap();
        for op in batch {
            for (part, number) in op.buf.chunks_mut(SECTOR).zip(op.at.0 / SECTOR_BYTES..) {
                match sectors.get(&number) {
                    Some(sector) => part.copy_from_slice(&sector[..part.len()]),
                    None => part.fill(0),
                }
            }
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        let mut sectors = self.sectors.lock().unwrap();
        for op in batch {
            let bytes: Vec<u8> = op.bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
            for (part, number) in bytes.chunks(SECTOR).zip(op.at.0 / SECTOR_BYTES..) {
                match part.iter().all(|byte| *byte == 0) {
                    true => drop(sectors.remove(&number)),
                    false => drop(sectors.insert(number, part.into())),
                }
            }
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn discard(&self, _: Physical, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn name(&self) -> &str {
        "sparse"
    }
}

fn open(devices: &[DeviceRef], core: &TestPlatform) -> Arc<Volume> {
    let options = OpenOptions::default();
    Volume::open(devices.to_vec(), core.platform(), &options, AccessTime::Relative).unwrap()
}

#[test]
fn a_pool_that_has_grown_a_millionfold_can_use_all_of_it() {
    for (data, metadata, more) in [
        (Profile::Single, Profile::Dup, vec![16u64 << 40]),
        (Profile::Mirror, Profile::Mirror, vec![8 << 40, 3 << 40]),
        (Profile::Stripe, Profile::Mirror, vec![1 << 40, 8 << 40, 4 << 40]),
    ] {
        let is_one = data == Profile::Single;
        let mut devices: Vec<DeviceRef> =
            (0..if is_one { 1 } else { 2 }).map(|_| Sparse::new(16 << 20) as DeviceRef).collect();
        let core = TestPlatform::new(1, Spawn::AtOnce);
        let options = FormatOptions {
            data_profile: data,
            metadata_profile: metadata,
            ..FormatOptions::default()
        };
        format(devices.clone(), core.platform(), &options).unwrap();
        let volume = open(&devices, &core);
        let engine = volume.engine();
        for bytes in more {
            let device = Sparse::new(bytes);
            engine.add_device(device.clone()).unwrap();
            devices.push(device);
        }
        let pool = &engine.store.pool;
        let before = pool.unallocated_bytes();
        let mut count = 0;
        while pool.unallocated_bytes() > 64 << 20 {
            let kind = if count % 8 == 7 { ChunkKind::Metadata } else { ChunkKind::Data };
            pool.create_chunk(kind, engine.store.groups.open(), 0).unwrap();
            count += 1;
            if count % 512 == 0 {
                engine.commit().unwrap_or_else(|e| panic!("{data:?}, {count} chunks: {e}"));
            }
            assert!(count < 40_000, "{data:?}: chunks of {} bytes on average", before / count);
        }
        volume.close().unwrap();
        let volume = open(&devices, &core);
        assert!(volume.engine().store.pool.chunks().len() >= count as usize);
        volume.engine().store.pool.check().unwrap();
        volume.close().unwrap();
    }
}

#[test]
fn chunks_of_the_size_that_a_pool_was_made_with_are_named_however_many_there_are() {
    let devices: Vec<DeviceRef> = (0..64).map(|_| Sparse::new(1 << 40) as DeviceRef).collect();
    let core = TestPlatform::new(1, Spawn::AtOnce);
    let options = FormatOptions {
        data_profile: Profile::Stripe,
        metadata_profile: Profile::Mirror,
        chunk_bytes: Some(64 << 20),
        ..FormatOptions::default()
    };
    format(devices.clone(), core.platform(), &options).unwrap();
    let volume = open(&devices, &core);
    let engine = volume.engine();
    let pool = &engine.store.pool;
    // Their items alone are more than sixteen system chunks of the smallest size.
    for count in 0..20_000 {
        // So much is promised that chunks are as small as they are in an old pool.
        let owed = pool.unallocated_bytes();
        pool.create_chunk(ChunkKind::Data, engine.store.groups.open(), owed).unwrap();
        if count % 1024 == 0 {
            engine.commit().unwrap_or_else(|e| panic!("{count} chunks: {e}"));
        }
    }
    engine.commit().unwrap();
    assert!(pool.chunks().len() > 20_000);
    volume.close().unwrap();
    // Nothing is in them: the first commit gives them all up.
    let volume = open(&devices, &core);
    volume.engine().commit().unwrap();
    volume.close().unwrap();
}
