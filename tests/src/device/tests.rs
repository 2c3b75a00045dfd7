use super::*;
use fs_core::buf::Buf;

fn write(device: &RamDevice, at: u64, fill: u8, bytes: usize) -> Result<(), DeviceError> {
    let buf = Buf::copy_of(&vec![fill; bytes]).unwrap();
    let mut batch = [WriteOp { at: Physical(at), bufs: vec![buf.into_slice()], result: Ok(()) }];
    device.write(&mut batch);
    batch[0].result
}

fn read(device: &RamDevice, at: u64, bytes: usize) -> Result<Vec<u8>, DeviceError> {
    let mut batch = [ReadOp { at: Physical(at), buf: Buf::zeroed(bytes).unwrap(), result: Ok(()) }];
    device.read(&mut batch);
    batch[0].result.map(|()| batch[0].buf.to_vec())
}

#[test]
fn a_clone_keeps_its_content_when_the_original_changes() {
    let device = RamDevice::new("a", 1 << 20);
    write(&device, 12 << 10, 1, 8192).unwrap();
    let before = device.image();
    write(&device, 16 << 10, 2, 4096).unwrap();
    let mut byte = [0];
    before.read(16 << 10, &mut byte);
    assert_eq!(byte, [1]);
    assert_eq!(read(&device, 16 << 10, 4096).unwrap(), vec![2; 4096]);
    assert_eq!(Image::of(&before.to_vec()).to_vec(), before.to_vec());
}

#[test]
fn beyond_the_end_is_refused() {
    let device = RamDevice::new("a", 1 << 20);
    assert_eq!(write(&device, (1 << 20) - 4096, 1, 8192), Err(DeviceError::OutOfRange));
    assert_eq!(read(&device, u64::MAX - 4095, 4096), Err(DeviceError::OutOfRange));
}

#[test]
fn each_fault_does_what_its_name_says() {
    let device = RamDevice::new("a", 1 << 20);
    let fresh = |kind, access| {
        device.disarm();
        write(&device, 0, 1, 4096).unwrap();
        write(&device, 8192, 0, 4096).unwrap();
        device.arm(Fault::nth(kind, access, 0));
    };

    fresh(FaultKind::Lost, Access::Write);
    write(&device, 0, 2, 4096).unwrap();
    assert!(device.struck());
    assert_eq!(read(&device, 0, 4096).unwrap(), vec![1; 4096]);

    fresh(FaultKind::Torn { keep_bytes: 1500 }, Access::Write);
    write(&device, 0, 2, 4096).unwrap();
    let torn = read(&device, 0, 4096).unwrap();
    assert_eq!((torn[1023], torn[1024]), (2, 1));

    fresh(FaultKind::Misdirected { to: 8192 }, Access::Write);
    write(&device, 0, 2, 4096).unwrap();
    assert_eq!(read(&device, 0, 4096).unwrap(), vec![1; 4096]);
    assert_eq!(read(&device, 8192, 4096).unwrap(), vec![2; 4096]);

    fresh(FaultKind::Stale, Access::Read);
    write(&device, 0, 2, 4096).unwrap();
    assert_eq!(read(&device, 0, 4096).unwrap(), vec![1; 4096]);
    assert_eq!(read(&device, 0, 4096).unwrap(), vec![2; 4096]);

    fresh(FaultKind::Flipped { byte: 5000, mask: 4 }, Access::Read);
    assert_eq!(read(&device, 0, 4096).unwrap()[5000 % 4096], 1 ^ 4);
    assert_eq!(read(&device, 0, 4096).unwrap(), vec![1; 4096]);

    fresh(FaultKind::Failed, Access::Flush);
    assert_eq!(device.flush(), Err(DeviceError::Io(5)));
    assert_eq!(device.flush(), Ok(()));

    fresh(FaultKind::Gone, Access::Read);
    assert_eq!(read(&device, 0, 4096), Err(DeviceError::Gone));
    assert_eq!(write(&device, 0, 1, 4096), Err(DeviceError::Gone));
    assert_eq!(device.flush(), Err(DeviceError::Gone));
}

#[test]
fn a_fault_strikes_the_nth_request_in_its_range_only() {
    let device = RamDevice::new("a", 1 << 20);
    device.arm(Fault { after: 1, ..Fault::within(FaultKind::Failed, Access::Read, 4096..8192) });
    assert!(read(&device, 4096, 4096).is_ok());
    assert!(read(&device, 8192, 4096).is_ok());
    assert!(!device.struck());
    assert!(read(&device, 0, 8192).is_err());
    assert!(device.struck());
}

#[test]
fn what_was_discarded_is_neither_old_data_nor_zeros() {
    let device = RamDevice::new("a", 1 << 20);
    write(&device, 0, 1, 8192).unwrap();
    device.discard(Physical(0), 4096).unwrap();
    let content = read(&device, 0, 8192).unwrap();
    assert_eq!(content[..512], garbage_at(0));
    assert_eq!(content[4096..], vec![1; 4096]);
}
