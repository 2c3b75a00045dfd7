//! Every structure that reaches a disk: bytes to checked values and back, nothing else.
//!
//! All integers are little-endian. A structure is declared once with
//! [`disk_struct!`](crate::disk_struct), which refuses holes and overlaps at compile time and
//! yields the accessors, and the field table that `docs/format.md` and `cairn inspect` print.
//! Reserved bytes are written as zero and checked.
//!
//! `decode` functions turn untrusted bytes into values that need no further check; `encode` is
//! their inverse. Nothing here reads a device, allocates by a size found on disk without a bound,
//! or panics on any input.

pub mod chunk;
pub mod dead;
pub mod devices;
pub mod dir;
pub mod extent;
pub mod inode;
pub mod key;
pub mod label;
pub mod log;
pub mod node;
pub mod pool;
pub mod ptr;
pub mod received;
pub mod scrub;
pub mod space;
pub mod superblock;
pub mod xattr;

#[cfg(test)]
mod tests;

/// A value with a fixed place in a disk structure.
pub trait DiskField: Sized + Copy {
    /// Bytes on disk.
    const BYTES: usize;
    /// Name of the type in the specification.
    const NAME: &'static str;
    /// Reads the value from exactly `BYTES` bytes.
    fn get(bytes: &[u8]) -> Self;
    /// Writes the value to exactly `BYTES` bytes.
    fn put(&self, bytes: &mut [u8]);
}

macro_rules! disk_int {
    ($($t:ty),*) => {$(
        impl DiskField for $t {
            const BYTES: usize = core::mem::size_of::<$t>();
            const NAME: &'static str = stringify!($t);
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; core::mem::size_of::<$t>()];
                raw.copy_from_slice(bytes);
                <$t>::from_le_bytes(raw)
            }
            fn put(&self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
disk_int!(u8, u16, u32, u64, i64);

impl<const N: usize> DiskField for [u8; N] {
    const BYTES: usize = N;
    const NAME: &'static str = "bytes";
    fn get(bytes: &[u8]) -> Self {
        let mut raw = [0; N];
        raw.copy_from_slice(bytes);
        raw
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes.copy_from_slice(self);
    }
}

/// Bytes of a structure that its Rust value does not hold, so that the value stays small enough for
/// a kernel stack. They are written as zeros; of what was read, only whether all were zero is kept.
///
/// For long reserved fields, and for fields whose content is read in place (`place_of`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skipped<const N: usize> {
    is_zero: bool,
}

impl<const N: usize> Skipped<N> {
    /// The field as it is written.
    pub const ZEROS: Skipped<N> = Skipped { is_zero: true };

    /// Whether all bytes that were read are zero.
    pub fn is_zero(self) -> bool {
        self.is_zero
    }
}

impl<const N: usize> DiskField for Skipped<N> {
    const BYTES: usize = N;
    const NAME: &'static str = "bytes";
    fn get(bytes: &[u8]) -> Self {
        Skipped { is_zero: bytes.iter().all(|byte| *byte == 0) }
    }
    fn put(&self, bytes: &mut [u8]) {
        bytes.fill(0);
    }
}

/// Where the field of that name is in a structure; for constants, since a wrong name panics.
pub(crate) const fn place_of(fields: &[FieldDoc], name: &str) -> core::ops::Range<usize> {
    let mut index = 0;
    while index < fields.len() {
        let field = &fields[index];
        if is_same(field.name.as_bytes(), name.as_bytes()) {
            return field.offset..field.offset + field.bytes;
        }
        index += 1;
    }
    panic!("no field of that name")
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}

/// One row of a structure's table in the specification.
#[derive(Clone, Copy, Debug)]
pub struct FieldDoc {
    /// Byte offset in the structure.
    pub offset: usize,
    /// Bytes it takes.
    pub bytes: usize,
    /// Type on disk.
    pub kind: &'static str,
    /// Field name.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
}

/// Declares a disk structure: name, size, and each field with its offset.
///
/// The fields must follow each other without holes and fill the size exactly; anything else does
/// not compile.
#[macro_export]
macro_rules! disk_struct {
    (
        $(#[doc = $sdoc:literal])*
        pub struct $name:ident [$size:literal] {
            $( $(#[doc = $fdoc:literal])* $off:literal $field:ident : $ty:ty ),* $(,)?
        }
    ) => {
        $(#[doc = $sdoc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            $( $(#[doc = $fdoc])* pub $field: $ty, )*
        }

        const _: () = {
            let mut end = 0usize;
            $(
                assert!($off == end, concat!("hole or overlap before ", stringify!($field)));
                end += <$ty as $crate::format::DiskField>::BYTES;
            )*
            assert!(end == $size, "the fields do not fill the structure");
        };

        impl $crate::format::DiskField for $name {
            const BYTES: usize = $size;
            const NAME: &'static str = stringify!($name);
            fn get(bytes: &[u8]) -> Self {
                $name {
                    $( $field: <$ty as $crate::format::DiskField>::get(
                        &bytes[$off..$off + <$ty as $crate::format::DiskField>::BYTES]), )*
                }
            }
            fn put(&self, bytes: &mut [u8]) {
                $( <$ty as $crate::format::DiskField>::put(&self.$field,
                    &mut bytes[$off..$off + <$ty as $crate::format::DiskField>::BYTES]); )*
            }
        }

        impl $name {
            /// Bytes on disk.
            pub const BYTES: usize = $size;
            /// The structure's description.
            pub const DOC: &'static str = concat!($($sdoc, "\n"),*);
            /// The table of fields.
            pub const FIELDS: &'static [$crate::format::FieldDoc] = &[
                $( $crate::format::FieldDoc {
                    offset: $off,
                    bytes: <$ty as $crate::format::DiskField>::BYTES,
                    kind: <$ty as $crate::format::DiskField>::NAME,
                    name: stringify!($field),
                    doc: concat!($($fdoc),*),
                } ),*
            ];

            /// The structure as bytes.
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut bytes = [0; $size];
                $crate::format::DiskField::put(self, &mut bytes);
                bytes
            }
        }
    };
}

/// Version of the format this build writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Feature bits this build knows.
pub mod features {
    /// Incompat: the pool has, or had, more than one subvolume, or snapshots. Set when the first is
    /// made.
    pub const VERSIONS: u64 = 1 << 0;
    /// Incompat: the pool has several devices, or had when it was made.
    pub const DEVICES: u64 = 1 << 1;
    /// Incompat: there is, or was, a limit to what a subvolume may refer to.
    pub const LIMITS: u64 = 1 << 2;
    /// Compat: there is, or was, a scrub: the pool tree has a SCRUB property.
    pub const SCRUB: u64 = 1 << 0;
    /// Incompat: the tables of devices may have vacant places, of devices that were removed.
    pub const VACANCIES: u64 = 1 << 3;
    /// Compat: the set of devices is being changed, or was: the pool tree has a DEVICES property.
    pub const DEVICE_CHANGE: u64 = 1 << 1;
    /// Incompat: a subvolume is, or was, received from a stream, or the content of a snapshot is
    /// kept.
    pub const STREAMS: u64 = 1 << 4;
    /// Incompat: a subvolume or snapshot has, or had, properties of its own.
    pub const PROPERTIES: u64 = 1 << 5;
    /// Bits that forbid opening when unknown.
    pub const INCOMPAT_KNOWN: u64 = VERSIONS | DEVICES | LIMITS | VACANCIES | STREAMS | PROPERTIES;
    /// Bits that forbid writing when unknown. None are defined yet.
    pub const RO_COMPAT_KNOWN: u64 = 0;
}

/// A rule that an item's bytes break; the caller adds which item it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBytes(pub &'static str);

impl BadBytes {
    /// The error for an item of `object` in `tree`.
    pub fn in_item(self, tree: crate::units::TreeId, object: u64) -> crate::error::Error {
        crate::error::Error::BadItem { what: self.0, tree, object }
    }

    /// The error for a structure at `addr`.
    pub fn at(self, addr: crate::units::Logical) -> crate::error::Error {
        crate::error::Error::Corrupt { what: self.0, addr }
    }
}

/// Fails with a rule's text when `holds` is false.
#[inline]
pub(crate) fn rule(holds: bool, what: &'static str) -> Result<(), BadBytes> {
    if holds {
        Ok(())
    } else {
        Err(BadBytes(what))
    }
}
