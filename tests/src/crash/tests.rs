//! The enumerator is tried on a journal small enough to be seen right, and on the same journal with
//! the mistakes that journals are made with.

use super::*;
use crate::device::{RamDevice, Recording};
use fs_core::buf::Buf;
use fs_core::platform::{Device, WriteOp};
use fs_core::units::Physical;
use std::sync::Arc;

/// What the journal leaves out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// The data is not flushed before the record that names it.
    NoFlushBefore,
    /// The record is not flushed before success is reported.
    NoFlushAfter,
    /// The record has no checksum.
    NoChecksum,
    /// Data goes where the data of the record before is.
    OverwritesLive,
}

/// A counter kept as data at one of two places and a record that says which; record *n* is at
/// sector 1 or 2 by turns, so that the one before survives a torn write.
struct Journal {
    device: Arc<RamDevice>,
    mistake: Mistake,
}

const SECTOR: u64 = 4096;

impl Journal {
    fn write(&self, at: u64, bytes: &[u8]) {
        let buf = Buf::copy_of(bytes).unwrap().into_slice();
        self.device.write(&mut [WriteOp { at: Physical(at), bufs: vec![buf], result: Ok(()) }]);
    }

    fn set(&self, value: u64) {
        let place = if self.mistake == Mistake::OverwritesLive { 0 } else { value % 2 };
        let at = (4 + 2 * place) * SECTOR;
        let data: Vec<u8> = (0..1024).flat_map(|_| value.to_le_bytes()).collect();
        self.write(at, &data);
        if self.mistake != Mistake::NoFlushBefore {
            self.device.flush().unwrap();
        }
        let mut record = vec![0; SECTOR as usize];
        record[..8].copy_from_slice(&value.to_le_bytes());
        record[8..16].copy_from_slice(&at.to_le_bytes());
        record[4000..4008].copy_from_slice(&value.to_le_bytes());
        let sum = crc32c::crc32c(&record[..4092]);
        record[4092..].copy_from_slice(&sum.to_le_bytes());
        self.write((1 + value % 2) * SECTOR, &record);
        if self.mistake != Mistake::NoFlushAfter {
            self.device.flush().unwrap();
        }
    }

    /// The value, or what is wrong with the image.
    fn open(image: &Image, mistake: Mistake) -> Result<u64, &'static str> {
        let record = |index: u64| {
            let mut bytes = vec![0; SECTOR as usize];
            image.read((1 + index) * SECTOR, &mut bytes);
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let sum = u32::from_le_bytes(bytes[4092..].try_into().unwrap());
            let valid = mistake == Mistake::NoChecksum || sum == crc32c::crc32c(&bytes[..4092]);
            (valid && word(0) != 0).then(|| (word(0), word(8), word(4000)))
        };
        let Some((value, at, again)) = record(0).max(record(1)) else { return Ok(0) };
        if value != again {
            return Err("torn record");
        }
        let mut data = vec![0; 2 * SECTOR as usize];
        image.read(at, &mut data);
        let intact = data.chunks(8).all(|word| word == value.to_le_bytes());
        intact.then_some(value).ok_or("data of a record is not there")
    }
}

/// The first thing that goes wrong over all crash states, and how many there were.
fn try_journal(mistake: Mistake) -> (usize, Option<&'static str>) {
    let device = RamDevice::new("journal", 1 << 20);
    let base = vec![device.image()];
    let recording = Recording::start(std::slice::from_ref(&device));
    let journal = Journal { device, mistake };
    for value in 1..=6 {
        journal.set(value);
        recording.mark(value);
    }
    let events = recording.events();
    let mut count = 0;
    for state in Crashes::new(base, &events, Sampling { seed: 1, random: 20 }) {
        count += 1;
        match Journal::open(&state.images[0], mistake) {
            Err(what) => return (count, Some(what)),
            Ok(value) if value < state.mark => return (count, Some("a durable value is lost")),
            Ok(value) if value > state.mark + 1 => return (count, Some("a value from nowhere")),
            Ok(_) => {}
        }
    }
    (count, None)
}

#[test]
fn a_right_journal_survives_every_crash() {
    let (count, wrong) = try_journal(Mistake::None);
    assert_eq!(wrong, None);
    assert!(count > 40, "only {count} states");
}

#[test]
fn every_mistake_is_found() {
    assert!(try_journal(Mistake::NoFlushBefore).1.is_some());
    assert_eq!(try_journal(Mistake::NoFlushAfter).1, Some("a durable value is lost"));
    assert_eq!(try_journal(Mistake::NoChecksum).1, Some("torn record"));
    assert!(try_journal(Mistake::OverwritesLive).1.is_some());
}

#[test]
fn a_state_can_be_made_again_from_its_name() {
    let device = RamDevice::new("journal", 1 << 20);
    let base = vec![device.image()];
    let recording = Recording::start(std::slice::from_ref(&device));
    let journal = Journal { device, mistake: Mistake::NoFlushBefore };
    (1..=3).for_each(|value| journal.set(value));
    let events = recording.events();
    let sampling = Sampling { seed: 5, random: 6 };
    for state in Crashes::new(base.clone(), &events, sampling) {
        let again = Crashes::state(base.clone(), &events, sampling, state.boundary, state.variant);
        assert_eq!(again.images[0].to_vec(), state.images[0].to_vec());
    }
}
