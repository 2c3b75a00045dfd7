//! What a device may do wrong, by name.

use std::ops::Range;

/// The requests a fault can befall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

/// What happens to the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A write, or a flush, is acknowledged and not carried out.
    Lost,
    /// Only the first bytes of a write arrive, cut at 512.
    Torn {
        /// How many arrive.
        keep_bytes: u64,
    },
    /// A write lands somewhere else.
    Misdirected {
        /// Where it lands.
        to: u64,
    },
    /// A read returns what was there when the fault was armed.
    Stale,
    /// A read returns one byte changed.
    Flipped {
        /// Which byte of what is read, modulo its length.
        byte: u64,
        /// The bits to change.
        mask: u8,
    },
    /// The request is refused with EIO.
    Failed,
    /// The device vanishes: this request and all later ones are refused.
    Gone,
}

/// A fault that waits for its request.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// To which requests.
    pub access: Access,
    /// How many of them pass unharmed first.
    pub after: u64,
    /// How many are harmed then.
    pub count: u64,
    /// Only requests that touch this range, if any.
    pub range: Option<Range<u64>>,
}

impl Fault {
    /// Befalls the `nth` request from now, counting from zero, and no other.
    pub fn nth(kind: FaultKind, access: Access, nth: u64) -> Fault {
        Fault { kind, access, after: nth, count: 1, range: None }
    }

    /// Befalls every request from the `nth` on, counting from zero.
    pub fn from_nth(kind: FaultKind, access: Access, nth: u64) -> Fault {
        Fault { count: u64::MAX, ..Fault::nth(kind, access, nth) }
    }

    /// Befalls every request that touches `range`.
    pub fn within(kind: FaultKind, access: Access, range: Range<u64>) -> Fault {
        Fault { range: Some(range), ..Fault::from_nth(kind, access, 0) }
    }
}

/// A fault and how many of its requests it has seen.
pub(super) struct Armed {
    fault: Fault,
    seen: u64,
}

impl Armed {
    pub(super) fn new(fault: Fault) -> Armed {
        Armed { fault, seen: 0 }
    }

    pub(super) fn struck(&self) -> bool {
        self.seen > self.fault.after
    }

    pub(super) fn strike(&mut self, access: Access, at: u64, len: u64) -> Option<FaultKind> {
        if access != self.fault.access {
            return None;
        }
        if let Some(range) = &self.fault.range {
            if at >= range.end || at + len <= range.start {
                return None;
            }
        }
        let index = self.seen;
        self.seen += 1;
        (index >= self.fault.after && index - self.fault.after < self.fault.count)
            .then_some(self.fault.kind)
    }
}
