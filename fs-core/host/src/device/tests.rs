//! Devices over image files, with and without the page cache, with and without a ring.

use super::*;
use fs_core::buf::Buf;
use fs_core::units::SECTOR_BYTES;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const SECTOR: usize = SECTOR_BYTES as usize;
const SECTORS: u64 = 256;

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn new() -> Image {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        create_image(&image.path(), SECTORS * SECTOR_BYTES).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn open(&self, access: Access, direct: bool, method: IoMethod) -> FileDevice {
        let options = OpenOptions { access, direct, method };
        FileDevice::open(&self.path(), options, &Wait::none()).unwrap()
    }
}

fn every_way() -> impl Iterator<Item = (bool, IoMethod)> {
    [(true, IoMethod::Uring), (true, IoMethod::Vectored), (false, IoMethod::Vectored)].into_iter()
}

fn read_op(sector: u64, sectors: usize) -> ReadOp {
    let buf = Buf::zeroed(sectors * SECTOR).unwrap();
    ReadOp { at: Physical(sector * SECTOR_BYTES), buf, result: Ok(()) }
}

fn write_op(sector: u64, pieces: &[u8]) -> WriteOp {
    let bufs =
        pieces.iter().map(|fill| Buf::copy_of(&[*fill; SECTOR]).unwrap().into_slice()).collect();
    WriteOp { at: Physical(sector * SECTOR_BYTES), bufs, result: Ok(()) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_written_in_batches_is_what_is_read_and_what_is_in_the_file(
        batches in vec(
            btree_map(0..64u64, vec(any::<u8>(), 1..4), 1..40),
            1..4,
        )
    ) {
        for (direct, method) in every_way() {
            let image = Image::new();
            let device = image.open(Access::ReadWrite, direct, method);
            let mut model = vec![0u8; SECTORS as usize];
            for batch in &batches {
                // Slots of four sectors keep the writes of one batch apart.
                let mut ops: Vec<WriteOp> =
                    batch.iter().map(|(slot, pieces)| write_op(slot * 4, pieces)).collect();
                device.write(&mut ops);
                prop_assert!(ops.iter().all(|op| op.result.is_ok()));
                for (slot, pieces) in batch {
                    let at = *slot as usize * 4;
                    model[at..at + pieces.len()].copy_from_slice(pieces);
                }
            }
            device.flush().unwrap();
            let mut reads: Vec<ReadOp> = (0..64).map(|slot| read_op(slot * 4, 4)).collect();
            device.read(&mut reads);
            let expected: Vec<u8> = model.iter().flat_map(|fill| [*fill; SECTOR]).collect();
            let found: Vec<u8> = reads.iter().flat_map(|op| op.buf.to_vec()).collect();
            prop_assert!(reads.iter().all(|op| op.result.is_ok()));
            prop_assert!(found == expected);
            drop(device);
            prop_assert!(std::fs::read(image.path()).unwrap() == expected);
        }
    }
}

#[test]
fn a_write_of_more_pieces_than_one_call_takes_is_completed() {
    for (direct, method) in every_way() {
        let image = Image::new();
        let pieces = IOV_MAX + 100;
        let large = image.dir.path().join("large");
        create_image(&large, (pieces as u64 + 1) * SECTOR_BYTES).unwrap();
        let options = OpenOptions { access: Access::ReadWrite, direct, method };
        let device = FileDevice::open(&large, options, &Wait::none()).unwrap();
        let fills: Vec<u8> = (0..pieces).map(|i| i as u8).collect();
        let mut ops = [write_op(1, &fills), write_op(0, &[9])];
        device.write(&mut ops);
        assert_eq!(ops.each_ref().map(|op| op.result), [Ok(()), Ok(())]);
        let mut back = [read_op(1, pieces)];
        device.read(&mut back);
        assert!(back[0]
            .buf
            .chunks(SECTOR)
            .zip(&fills)
            .all(|(sector, fill)| sector == [*fill; SECTOR]));
    }
}

#[test]
fn transfers_beyond_the_end_fail_alone_in_their_batch() {
    for (direct, method) in every_way() {
        let image = Image::new();
        let device = image.open(Access::ReadWrite, direct, method);
        let mut writes = [write_op(SECTORS - 1, &[1, 1]), write_op(3, &[7]), write_op(5, &[])];
        writes[2].at = Physical(u64::MAX);
        device.write(&mut writes);
        assert_eq!(writes[0].result, Err(DeviceError::OutOfRange));
        assert_eq!(writes[1].result, Ok(()));
        assert_eq!(writes[2].result, Err(DeviceError::OutOfRange));
        let mut reads = [read_op(SECTORS, 1), read_op(3, 1), read_op(SECTORS - 1, 1)];
        device.read(&mut reads);
        assert_eq!(reads[0].result, Err(DeviceError::OutOfRange));
        assert!(reads[1].result.is_ok() && reads[1].buf[..] == [7; SECTOR]);
        assert!(reads[2].result.is_ok() && reads[2].buf[..] == [0; SECTOR]);
        assert_eq!(device.discard(Physical(0), u64::MAX), Err(DeviceError::OutOfRange));
    }
}

#[test]
fn reading_where_the_file_was_cut_off_says_that_the_device_is_gone() {
    for (direct, method) in every_way() {
        let image = Image::new();
        let device = image.open(Access::ReadWrite, direct, method);
        File::options().write(true).open(image.path()).unwrap().set_len(8 * SECTOR_BYTES).unwrap();
        let mut reads = [read_op(7, 1), read_op(6, 4), read_op(20, 1)];
        device.read(&mut reads);
        assert_eq!(
            reads.each_ref().map(|op| op.result),
            [Ok(()), Err(DeviceError::Gone), Err(DeviceError::Gone)]
        );
    }
}

#[test]
fn a_discarded_range_of_an_image_reads_as_zeros_and_gives_its_blocks_back() {
    use std::os::unix::fs::MetadataExt;
    let image = Image::new();
    let device = image.open(Access::ReadWrite, true, IoMethod::Uring);
    device.write(&mut [write_op(0, &[1; 64])]);
    device.flush().unwrap();
    let blocks = || std::fs::metadata(image.path()).unwrap().blocks();
    let before = blocks();
    device.discard(Physical(0), 32 * SECTOR_BYTES).unwrap();
    let mut reads = [read_op(31, 1), read_op(32, 1)];
    device.read(&mut reads);
    assert!(reads[0].buf[..] == [0; SECTOR] && reads[1].buf[..] == [1; SECTOR]);
    assert!(blocks() < before, "{} blocks, before {before}", blocks());
}

#[test]
fn a_device_opened_for_reading_refuses_to_change() {
    let image = Image::new();
    let device = image.open(Access::ReadOnly, true, IoMethod::Uring);
    assert!(device.geometry().read_only);
    let mut writes = [write_op(0, &[1])];
    device.write(&mut writes);
    assert_eq!(writes[0].result, Err(DeviceError::ReadOnly));
    assert_eq!(device.discard(Physical(0), SECTOR_BYTES), Err(DeviceError::ReadOnly));
    assert_eq!(device.flush(), Ok(()));
}

#[test]
fn many_threads_share_a_device() {
    let image = Image::new();
    let device = image.open(Access::ReadWrite, true, IoMethod::Uring);
    let bad = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        // More threads than rings.
        for thread in 0..12u64 {
            let (device, bad) = (&device, &bad);
            scope.spawn(move || {
                for round in 0..10u8 {
                    let at = thread * 16;
                    let mut writes: Vec<_> = (0..16).map(|i| write_op(at + i, &[round])).collect();
                    device.write(&mut writes);
                    let mut reads: Vec<_> = (0..16).map(|i| read_op(at + i, 1)).collect();
                    device.read(&mut reads);
                    let good = writes.iter().all(|op| op.result.is_ok())
                        && reads.iter().all(|op| op.buf[..] == [round; SECTOR]);
                    bad.fetch_add(usize::from(!good), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(bad.into_inner(), 0);
}

#[test]
fn writers_keep_everyone_else_away_and_readers_keep_writers_away() {
    let image = Image::new();
    let open = |access| FileDevice::open(&image.path(), OpenOptions::new(access), &Wait::none());
    let writer = open(Access::ReadWrite).unwrap();
    assert!(matches!(open(Access::ReadWrite), Err(OpenError::Busy { .. })));
    assert!(matches!(open(Access::ReadOnly), Err(OpenError::Busy { .. })));
    assert!(open(Access::Unlocked).is_ok());
    drop(writer);
    let readers = (open(Access::ReadOnly).unwrap(), open(Access::ReadOnly).unwrap());
    assert!(matches!(open(Access::ReadWrite), Err(OpenError::Busy { .. })));
    drop(readers);
    assert!(open(Access::ReadWrite).is_ok());
}

#[test]
fn opening_waits_for_the_holder_and_says_so_once() {
    let image = Image::new();
    let holder = image.open(Access::ReadWrite, true, IoMethod::Uring);
    let announced = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(800));
            drop(holder);
        });
        let wait = Wait {
            bound: Duration::from_secs(20),
            announce: &|message| announced.lock().push(message.to_string()),
        };
        let start = Instant::now();
        let options = OpenOptions::new(Access::ReadWrite);
        FileDevice::open(&image.path(), options, &wait).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(700));
        assert!(start.elapsed() < Duration::from_secs(10));
    });
    let want = format!("waiting for {} to be released ...", image.path().display());
    assert_eq!(announced.into_inner(), [want]);
}

#[test]
fn a_wait_that_is_over_names_the_time_and_the_device() {
    let image = Image::new();
    let _holder = image.open(Access::ReadWrite, true, IoMethod::Uring);
    let wait = Wait { bound: Duration::from_millis(1100), announce: &|_| {} };
    let error = FileDevice::open(&image.path(), OpenOptions::new(Access::ReadWrite), &wait);
    let text = error.err().unwrap().to_string();
    assert!(text.contains("/image is in use"), "{text}");
    assert!(text.ends_with("and was not released within 1 s"), "{text}");
}

#[test]
fn what_is_no_device_is_refused_by_name() {
    let options = OpenOptions::new(Access::ReadOnly);
    let open = |path: &str| match FileDevice::open(Path::new(path), options, &Wait::none()) {
        Ok(_) => panic!("{path} was opened"),
        Err(error) => error.to_string(),
    };
    assert_eq!(open("/dev/null"), "/dev/null: neither a block device nor an image file");
    assert_eq!(open("/proc"), "/proc: neither a block device nor an image file");
    assert_eq!(open("/nonexistent/x"), "/nonexistent/x: No such file or directory");
}

#[test]
fn an_existing_file_is_never_made_into_an_image_again() {
    let image = Image::new();
    assert!(create_image(&image.path(), 4096).is_err());
    assert_eq!(std::fs::metadata(image.path()).unwrap().len(), SECTORS * SECTOR_BYTES);
}
