//! Devices in memory.
//!
//! A [`RamDevice`] keeps its content as an [`Image`], which is cloned in microseconds, so that a
//! crash simulation can open tens of thousands of them. It can record every write and flush in
//! order ([`Recording`]) and misbehave by name ([`Fault`]).
//!
//! What a device was told to forget reads as garbage afterwards, because the core may not rely on
//! anything else; requests that are not whole sectors panic, because only a bug makes them.

mod fault;
mod image;

pub use fault::{Access, Fault, FaultKind};
pub use image::{garbage_at, Image};

use fault::Armed;
use fs_core::platform::{Device, DeviceError, DeviceRef, Geometry, ReadOp, WriteOp};
use fs_core::units::{Physical, SECTOR_BYTES};
use std::sync::{Arc, Mutex};

/// Something that happened to a set of devices.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes were handed to a device.
    Write {
        /// Index of the device.
        device: usize,
        /// First byte.
        at: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
    /// A range was given up.
    Discard {
        /// Index of the device.
        device: usize,
        /// First byte.
        at: u64,
        /// Length.
        bytes: u64,
    },
    /// Everything handed to the device before is durable.
    Flush {
        /// Index of the device.
        device: usize,
    },
    /// The workload got this far; see [`Recording::mark`].
    Mark(u64),
}

/// What happened to a set of devices, in order.
#[derive(Clone, Default)]
pub struct Recording {
    events: Arc<Mutex<Vec<Event>>>,
}

impl Recording {
    /// Begins to record what happens to `devices` from now on.
    pub fn start(devices: &[Arc<RamDevice>]) -> Recording {
        let recording = Recording::default();
        for (index, device) in devices.iter().enumerate() {
            device.lock().recorder = Some((index, recording.clone()));
        }
        recording
    }

    /// Notes that the workload got to `mark`.
    pub fn mark(&self, mark: u64) {
        self.push(Event::Mark(mark));
    }

    /// Everything recorded so far.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    fn push(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

/// How many requests a device has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
}

struct State {
    image: Image,
    recorder: Option<(usize, Recording)>,
    counts: Counts,
    faults: Vec<Armed>,
    /// What a stale read sees.
    past: Option<Image>,
    gone: bool,
    read_only: bool,
}

/// A device in memory.
pub struct RamDevice {
    name: String,
    geometry: Geometry,
    state: Mutex<State>,
}

impl RamDevice {
    /// An empty device that takes discards.
    pub fn new(name: &str, bytes: u64) -> Arc<RamDevice> {
        RamDevice::of(name, Image::zeroed(bytes))
    }

    /// A device with the content of `image`.
    pub fn of(name: &str, image: Image) -> Arc<RamDevice> {
        let geometry =
            Geometry { bytes: image.bytes(), block_bytes: 512, discards: true, read_only: false };
        let state = State {
            image,
            recorder: None,
            counts: Counts::default(),
            faults: Vec::new(),
            past: None,
            gone: false,
            read_only: false,
        };
        Arc::new(RamDevice { name: name.to_owned(), geometry, state: Mutex::new(state) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The content as it is now, flushed or not.
    pub fn image(&self) -> Image {
        self.lock().image.clone()
    }

    /// Replaces the content.
    pub fn set_image(&self, image: Image) {
        assert_eq!(image.bytes(), self.geometry.bytes, "image of another size");
        self.lock().image = image;
    }

    /// Requests seen so far.
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// Makes the device misbehave; counting of requests starts now.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.lock();
        if fault.kind == FaultKind::Stale && state.past.is_none() {
            state.past = Some(state.image.clone());
        }
        state.faults.push(Armed::new(fault));
    }

    /// Makes the device behave again. A device that is gone stays so.
    pub fn disarm(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.past = None;
    }

    /// Whether any armed fault has struck.
    pub fn struck(&self) -> bool {
        self.lock().faults.iter().any(Armed::struck)
    }

    /// From now on a write panics: for showing that nothing is written.
    pub fn forbid_writes(&self) {
        self.lock().read_only = true;
    }
}

fn check_request(at: Physical, len: u64, bytes: u64) -> Result<(), DeviceError> {
    assert!(at.0 % SECTOR_BYTES == 0, "transfer at unaligned {at}");
    assert!(len > 0 && len % SECTOR_BYTES == 0, "transfer of {len} bytes");
    match at.0.checked_add(len) {
        Some(end) if end <= bytes => Ok(()),
        _ => Err(DeviceError::OutOfRange),
    }
}

impl State {
    /// What befalls the next request of that kind, if anything.
    fn strike(&mut self, access: Access, at: u64, len: u64) -> Option<FaultKind> {
        match access {
            Access::Read => self.counts.reads += 1,
            Access::Write => self.counts.writes += 1,
            Access::Flush => self.counts.flushes += 1,
        }
        let mut struck = None;
        for armed in &mut self.faults {
            let hit = armed.strike(access, at, len);
            struck = struck.or(hit);
        }
        if struck == Some(FaultKind::Gone) {
            self.gone = true;
        }
        struck
    }

    fn record(&self, event: impl FnOnce(usize) -> Event) {
        if let Some((index, recording)) = &self.recorder {
            recording.push(event(*index));
        }
    }

    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let struck = self.strike(Access::Read, at, out.len() as u64);
        if self.gone {
            return Err(DeviceError::Gone);
        }
        match struck {
            Some(FaultKind::Failed) => return Err(DeviceError::Io(5)),
            Some(FaultKind::Stale) => {
                self.past.as_ref().expect("kept when the fault was armed").read(at, out);
            }
            Some(FaultKind::Flipped { byte, mask }) => {
                self.image.read(at, out);
                let at = byte as usize % out.len();
                out[at] ^= mask;
            }
            _ => self.image.read(at, out),
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        assert!(!self.read_only, "write at {at} to a device that must not be written");
        let struck = self.strike(Access::Write, at, bytes.len() as u64);
        if self.gone {
            return Err(DeviceError::Gone);
        }
        let (at, bytes) = match struck {
            Some(FaultKind::Failed) => return Err(DeviceError::Io(5)),
            Some(FaultKind::Lost) => return Ok(()),
            Some(FaultKind::Torn { keep_bytes }) => {
                (at, &bytes[..bytes.len().min(keep_bytes as usize / 512 * 512)])
            }
            Some(FaultKind::Misdirected { to }) => {
                assert!(to + bytes.len() as u64 <= self.image.bytes(), "misdirected too far");
                (to, bytes)
            }
            _ => (at, bytes),
        };
        self.image.write(at, bytes);
        self.record(|device| Event::Write { device, at, bytes: bytes.into() });
        Ok(())
    }
}

impl Device for RamDevice {
    fn geometry(&self) -> Geometry {
        self.geometry.clone()
    }

    fn read(&self, batch: &mut [ReadOp]) {
        let mut state = self.lock();
        for op in batch {
            op.result = check_request(op.at, op.buf.len() as u64, self.geometry.bytes)
                .and_then(|()| state.read(op.at.0, &mut op.buf));
        }
    }

    fn write(&self, batch: &mut [WriteOp]) {
        let mut state = self.lock();
        for op in batch {
            op.result = check_request(op.at, op.len(), self.geometry.bytes).and_then(|()| {
                let bytes: Vec<u8> = op.bufs.iter().flat_map(|b| b.iter().copied()).collect();
                state.write(op.at.0, &bytes)
            });
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        let struck = state.strike(Access::Flush, 0, 0);
        if state.gone {
            return Err(DeviceError::Gone);
        }
        if struck == Some(FaultKind::Failed) {
            return Err(DeviceError::Io(5));
        }
        if struck != Some(FaultKind::Lost) {
            state.record(|device| Event::Flush { device });
        }
        Ok(())
    }

    fn discard(&self, at: Physical, bytes: u64) -> Result<(), DeviceError> {
        check_request(at, bytes, self.geometry.bytes)?;
        let mut state = self.lock();
        assert!(!state.read_only, "discard at {at} on a device that must not be written");
        if state.gone {
            return Err(DeviceError::Gone);
        }
        state.image.discard(at.0, bytes);
        state.record(|device| Event::Discard { device, at: at.0, bytes });
        Ok(())
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// So many empty devices.
pub fn several(count: usize, bytes: u64) -> Vec<Arc<RamDevice>> {
    (0..count).map(|index| RamDevice::new(&format!("ram{index}"), bytes)).collect()
}

/// The devices as the core takes them.
pub fn refs(devices: &[Arc<RamDevice>]) -> Vec<DeviceRef> {
    devices.iter().map(|d| d.clone() as DeviceRef).collect()
}

#[cfg(test)]
mod tests;
