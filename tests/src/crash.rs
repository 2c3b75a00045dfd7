//! What power loss may leave, enumerated.
//!
//! A device promises only this: what was written before a flush that returned is there. Of what was
//! written since, any part may have arrived, in any order, and of each write any of its 512-byte
//! sectors. At every boundary between two events of a [`Recording`](crate::device::Recording) this
//! module makes the images that show the extremes (all of it, none of it, only the newest, the
//! newest torn) and as many random ones as asked for.
//!
//! A state is named by its boundary and variant, and follows from those and the seed alone.

use crate::device::{garbage_at, Event, Image};
use crate::rng::Rng;

/// Bytes that a device writes whole or not at all.
const ATOM: u64 = 512;

/// How many states to make.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// What the random states follow from.
    pub seed: u64,
    /// Random states at each boundary.
    pub random: u32,
}

/// One way things may be after power loss.
pub struct CrashState {
    /// Content of each device.
    pub images: Vec<Image>,
    /// Events that had happened.
    pub boundary: usize,
    /// Which of the states at that boundary.
    pub variant: u32,
    /// The last mark before the boundary; zero when there was none.
    pub mark: u64,
}

/// A write or discard that may not have arrived.
#[derive(Clone, Copy)]
struct Pending<'a> {
    device: usize,
    event: &'a Event,
}

/// Makes crash states one after another.
pub struct Crashes<'a> {
    events: &'a [Event],
    sampling: Sampling,
    /// Durable content.
    durable: Vec<Image>,
    pending: Vec<Pending<'a>>,
    boundary: usize,
    mark: u64,
    /// Variants left at this boundary.
    variants: Vec<u32>,
}

/// Variants with a meaning of their own; those after are random.
mod variant {
    pub const ALL: u32 = 0;
    pub const NONE: u32 = 1;
    pub const ONLY_NEWEST: u32 = 2;
    pub const NEWEST_TORN: u32 = 3;
    pub const FIRST_RANDOM: u32 = 4;
}

impl<'a> Crashes<'a> {
    /// The states of `events`, which happened to devices that durably held `base`.
    pub fn new(base: Vec<Image>, events: &'a [Event], sampling: Sampling) -> Crashes<'a> {
        Crashes {
            events,
            sampling,
            durable: base,
            pending: Vec::new(),
            boundary: 0,
            mark: 0,
            variants: vec![variant::NONE],
        }
    }

    /// The one state with that name.
    pub fn state(
        base: Vec<Image>,
        events: &'a [Event],
        sampling: Sampling,
        boundary: usize,
        variant: u32,
    ) -> CrashState {
        let mut crashes = Crashes::new(base, events, sampling);
        while crashes.boundary < boundary {
            assert!(crashes.advance(), "no boundary {boundary}");
        }
        crashes.make(variant)
    }

    /// The states after all events.
    pub fn at_end(
        base: Vec<Image>,
        events: &'a [Event],
        sampling: Sampling,
    ) -> impl Iterator<Item = CrashState> + 'a {
        let mut crashes = Crashes::new(base, events, sampling);
        while crashes.advance() {}
        let random = if crashes.pending.is_empty() { 0 } else { sampling.random };
        let variants = [variant::ALL, variant::NONE].into_iter();
        let variants = variants.chain((variant::FIRST_RANDOM..).take(random as usize));
        variants.map(move |variant| crashes.make(variant))
    }

    /// Moves past the next event. False when there is none.
    fn advance(&mut self) -> bool {
        let Some(event) = self.events.get(self.boundary) else { return false };
        self.boundary += 1;
        self.variants.clear();
        match event {
            Event::Mark(mark) => {
                self.mark = *mark;
                self.variants.push(variant::NONE);
                if !self.pending.is_empty() {
                    self.variants.push(variant::ALL);
                }
            }
            Event::Flush { device } => {
                let (done, rest) = self.pending.iter().partition(|p| p.device == *device);
                self.pending = rest;
                let done: Vec<Pending<'_>> = done;
                for write in done {
                    apply(&mut self.durable, write.event, |_| true);
                }
                self.variants.push(variant::NONE);
            }
            Event::Write { device, .. } | Event::Discard { device, .. } => {
                self.pending.push(Pending { device: *device, event });
                self.variants.extend([variant::ALL, variant::NEWEST_TORN]);
                if self.pending.len() > 1 {
                    self.variants.push(variant::ONLY_NEWEST);
                    let random = variant::FIRST_RANDOM..;
                    self.variants.extend(random.take(self.sampling.random as usize));
                }
            }
        }
        true
    }

    fn make(&self, variant: u32) -> CrashState {
        let name = (self.boundary as u64) << 32 | u64::from(variant);
        let mut rng = Rng::derived(self.sampling.seed, name);
        let mut images = self.durable.clone();
        let newest = self.pending.len().saturating_sub(1);
        match variant {
            variant::NONE => {}
            variant::ALL => {
                self.pending.iter().for_each(|p| apply(&mut images, p.event, |_| true));
            }
            variant::ONLY_NEWEST => apply(&mut images, self.pending[newest].event, |_| true),
            variant::NEWEST_TORN => {
                for (index, p) in self.pending.iter().enumerate() {
                    if index == newest {
                        apply_torn(&mut images, p.event, &mut rng);
                    } else {
                        apply(&mut images, p.event, |_| true);
                    }
                }
            }
            _ => self.apply_randomly(&mut images, &mut rng),
        }
        CrashState { images, boundary: self.boundary, variant, mark: self.mark }
    }

    /// A random part of what is pending, in random order, some of it torn.
    fn apply_randomly(&self, images: &mut [Image], rng: &mut Rng) {
        let mut order: Vec<usize> = (0..self.pending.len()).collect();
        rng.shuffle(&mut order);
        // Most bugs need one write missing or one write early: make those as likely as the rest.
        let (lost, torn) = *rng.pick(&[(1, 2), (1, 8), (7, 8), (0, 1)]);
        let (lost, torn) = match (lost, torn) {
            (0, _) => ((0, 1), (1, 2)),
            (part, whole) => ((part, whole), (1, 4)),
        };
        let spared = order.first().copied().filter(|_| rng.chance(1, 4));
        for index in order {
            let event = self.pending[index].event;
            if spared == Some(index) || spared.is_none() && rng.chance(lost.0, lost.1) {
                continue;
            }
            if rng.chance(torn.0, torn.1) {
                apply_torn(images, event, rng);
            } else {
                apply(images, event, |_| true);
            }
        }
    }
}

impl Iterator for Crashes<'_> {
    type Item = CrashState;

    fn next(&mut self) -> Option<CrashState> {
        loop {
            if let Some(variant) = self.variants.pop() {
                return Some(self.make(variant));
            }
            if !self.advance() {
                return None;
            }
        }
    }
}

fn apply_torn(images: &mut [Image], event: &Event, rng: &mut Rng) {
    let atoms = match event {
        Event::Write { bytes, .. } => bytes.len() as u64 / ATOM,
        Event::Discard { bytes, .. } => bytes / ATOM,
        _ => return,
    };
    let cut = rng.below(atoms + 1);
    match rng.below(3) {
        0 => apply(images, event, |atom| atom < cut),
        1 => apply(images, event, |atom| atom >= cut),
        _ => {
            let arrived: Vec<bool> = (0..atoms).map(|_| rng.chance(1, 2)).collect();
            apply(images, event, |atom| arrived[atom as usize]);
        }
    }
}

/// Carries out those 512-byte parts of a write or discard that arrived.
fn apply(images: &mut [Image], event: &Event, arrived: impl Fn(u64) -> bool) {
    match event {
        Event::Write { device, at, bytes } => {
            let atoms = bytes.len() as u64 / ATOM;
            let mut start = 0;
            while start < atoms {
                let count = (start..atoms).take_while(|atom| arrived(*atom)).count() as u64;
                let part = (start * ATOM) as usize..((start + count) * ATOM) as usize;
                images[*device].write(at + start * ATOM, &bytes[part]);
                start += count + 1;
            }
        }
        Event::Discard { device, at, bytes } => {
            for atom in (0..bytes / ATOM).filter(|atom| arrived(*atom)) {
                let at = at + atom * ATOM;
                images[*device].write(at, &garbage_at(at));
            }
        }
        Event::Flush { .. } | Event::Mark(_) => {}
    }
}

#[cfg(test)]
mod tests;
