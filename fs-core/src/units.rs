//! Newtypes that keep the kinds of numbers apart.
//!
//! A logical address, a place on a device, a transaction group and an inode number are all 64 bits
//! wide; mixing them up loses data. Conversions are spelled out.

use core::fmt;

/// Bytes in one sector: the unit of allocation, of checksums of uncompressed data, and of every
/// address on disk. Fixed by the format.
pub const SECTOR_BYTES: u64 = 4096;

/// `log2(SECTOR_BYTES)`.
pub const SECTOR_SHIFT: u32 = 12;

macro_rules! unit {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

unit! {
    /// A byte address in the pool's logical space; block pointers hold these. Always a multiple of
    /// [`SECTOR_BYTES`] when it names a block.
    Logical
}
unit! {
    /// A byte offset on one device.
    Physical
}
unit! {
    /// The number of a transaction group. Zero is before the first commit.
    Txg
}
unit! {
    /// An inode number, local to its subvolume. Never reused.
    Ino
}
unit! {
    /// The identity of a tree: a fixed number for the pool's own trees, the subvolume's id
    /// otherwise.
    TreeId
}

impl Logical {
    /// The address `bytes` further on. `None` when that leaves the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Logical> {
        self.0.checked_add(bytes).map(Logical)
    }
}

impl Txg {
    /// The group after this one.
    pub fn next(self) -> Txg {
        Txg(self.0 + 1)
    }
}

impl TreeId {
    /// Subvolume roots and pool-wide properties.
    pub const POOL: TreeId = TreeId(1);
    /// Chunk map and devices.
    pub const CHUNK: TreeId = TreeId(2);
    /// Free space.
    pub const SPACE: TreeId = TreeId(3);
    /// Extra references of shared extents.
    pub const REFS: TreeId = TreeId(4);
    /// Dead lists of snapshots.
    pub const DEAD: TreeId = TreeId(5);
    /// The first id a subvolume may have; ids are never reused.
    pub const FIRST_SUBVOL: TreeId = TreeId(256);

    /// Whether the id names a subvolume's tree.
    pub fn is_subvol(self) -> bool {
        self >= TreeId::FIRST_SUBVOL
    }
}

/// `value` rounded down to a multiple of `unit`, a power of two.
pub const fn align_down(value: u64, unit: u64) -> u64 {
    debug_assert!(unit.is_power_of_two());
    value & !(unit - 1)
}

/// `value` rounded up to a multiple of `unit`, a power of two; `None` when that overflows.
pub const fn align_up(value: u64, unit: u64) -> Option<u64> {
    debug_assert!(unit.is_power_of_two());
    match value.checked_add(unit - 1) {
        Some(v) => Some(v & !(unit - 1)),
        None => None,
    }
}

/// Bytes of `len` rounded up to whole sectors. `len` is a length cairn has already bounded.
pub const fn sector_round(len: u64) -> u64 {
    match align_up(len, SECTOR_BYTES) {
        Some(v) => v,
        None => panic!("length too close to 2^64 to round"),
    }
}
