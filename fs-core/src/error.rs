//! What can go wrong, as values.
//!
//! An error says what, where and what was expected, in fields; its `Display` is one sentence for
//! the person who must act. The errno is made at the edge, in the driver, from [`Error::errno`].

use crate::platform::DeviceError;
use crate::units::{Ino, Logical, Physical, TreeId, Txg};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// An id as its hexadecimal digits.
struct Hex<'a>(&'a [u8; 16]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The POSIX outcomes an operation can have. The names are those of errno(3); drivers turn them
/// into their platform's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named and documented by errno(3)")]
pub enum Errno {
    Perm,
    NoEnt,
    Io,
    BadF,
    Access,
    Busy,
    Exist,
    XDev,
    NotDir,
    IsDir,
    Inval,
    FBig,
    NoSpc,
    RoFs,
    MLink,
    NameTooLong,
    NotEmpty,
    NoData,
    Overflow,
    OpNotSupp,
    Stale,
    DQuot,
    NxIo,
    NoMem,
    TooBig,
    Range,
    Uclean,
    TxtBsy,
    Intr,
}

/// A feature word of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureClass {
    /// Unknown bits forbid opening at all.
    Incompat,
    /// Unknown bits forbid writing.
    RoCompat,
}

/// Why an operation did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// An ordinary outcome of the operation itself, such as a name that does not exist.
    Posix(Errno),
    /// Memory ran out; nothing was changed.
    Memory,
    /// The pool has no room; nothing was changed.
    NoSpace,
    /// The pool refuses changes.
    ReadOnly,
    /// Changes that were accepted cannot be made durable any more, because writing a group or a log
    /// frame failed; the log says why.
    Failed,
    /// A change is refused because the pool turned read-only when it failed.
    TurnedReadOnly,
    /// A device refused a transfer.
    Device {
        /// Index of the device in the pool.
        device: u16,
        /// First byte of the transfer.
        at: Physical,
        /// What the device said.
        cause: DeviceError,
    },
    /// No copy of a block has the content its parent vouches for.
    Checksum {
        /// Where the pointer points.
        addr: Logical,
        /// Bytes that were read.
        bytes: u64,
    },
    /// A structure breaks a rule of the format although its checksum is right or it has none.
    Corrupt {
        /// The rule that is broken.
        what: &'static str,
        /// Where the structure is, when known.
        addr: Logical,
    },
    /// A tree item breaks a rule of the format.
    BadItem {
        /// The rule that is broken.
        what: &'static str,
        /// The tree.
        tree: TreeId,
        /// The object (inode number, address or id) of the item's key.
        object: u64,
    },
    /// A block is not mapped by any chunk.
    Unmapped {
        /// The address no chunk covers.
        addr: Logical,
    },
    /// Not a cairn device at all.
    NotCairn,
    /// The label is there, but no superblock could be used.
    NoSuperblock,
    /// An older group that was asked for cannot be opened.
    NoGroup {
        /// Which; none when any that is whole would have done.
        txg: Option<Txg>,
        /// What kept it from being opened; none when no superblock names it any more.
        cause: Option<String>,
        /// Those that can be opened.
        others: Vec<Txg>,
    },
    /// No checksum says whether data of an older group is still there.
    Unverified {
        /// Where it was.
        addr: Logical,
    },
    /// The device is smaller than the pool says.
    Truncated {
        /// Bytes the pool expects.
        expected: u64,
        /// Bytes the device has.
        found: u64,
    },
    /// Written by a format version this build cannot read.
    Version {
        /// The version on disk.
        found: u32,
    },
    /// Feature bits this build does not know.
    Features {
        /// Which word.
        class: FeatureClass,
        /// The unknown bits.
        unknown: u64,
    },
    /// Devices of the pool are missing.
    MissingDevices {
        /// Index and id of each.
        devices: Vec<(u16, [u8; 16])>,
        /// Whether the pool cannot be opened without them at all.
        needed: bool,
        /// Devices that were given and have no label that can be read: each its name and why.
        unusable: Vec<String>,
    },
    /// Devices that have everything are missing; what is there lacks something that was written.
    OnlyBehind {
        /// Indices of those that are there and lack something.
        behind: Vec<u16>,
        /// Index and id of each that is missing.
        missing: Vec<(u16, [u8; 16])>,
    },
    /// Devices of the pool were written without the others, and the others without them.
    Split {
        /// Indices of those that are fewer changes of the set of devices from where they parted.
        devices: Vec<u16>,
    },
    /// A device belongs to another pool, or twice to this one.
    WrongDevice {
        /// The device's name.
        name: String,
    },
    /// A device was of the pool, and is not any more.
    FormerDevice {
        /// Name of the device.
        name: String,
    },
    /// The device is too small to hold a pool.
    TooSmall {
        /// The smallest size that works, in bytes.
        minimum: u64,
    },
    /// An argument of an administrative call is out of range.
    Argument {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A stream is damaged or breaks a rule of its format.
    Stream {
        /// The rule that is broken.
        what: &'static str,
        /// First byte of the record, from the beginning of the stream.
        at: u64,
    },
}

impl Error {
    /// The errno that tells a program what this error means for it.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Posix(errno) => *errno,
            Error::Memory => Errno::NoMem,
            Error::NoSpace | Error::TooSmall { .. } => Errno::NoSpc,
            Error::ReadOnly | Error::TurnedReadOnly => Errno::RoFs,
            Error::Device { cause: DeviceError::Unsupported, .. } => Errno::OpNotSupp,
            Error::Failed | Error::Device { .. } | Error::Checksum { .. } => Errno::Io,
            Error::Stream { .. } | Error::Unverified { .. } => Errno::Io,
            Error::NoGroup { .. } => Errno::Stale,
            Error::Corrupt { .. } | Error::BadItem { .. } | Error::Unmapped { .. } => Errno::Io,
            Error::NotCairn | Error::NoSuperblock | Error::Truncated { .. } => Errno::Uclean,
            Error::Version { .. } | Error::Features { .. } => Errno::OpNotSupp,
            Error::MissingDevices { .. } | Error::OnlyBehind { .. } => Errno::NxIo,
            Error::Split { .. } => Errno::Uclean,
            Error::WrongDevice { .. } | Error::FormerDevice { .. } | Error::Argument { .. } => {
                Errno::Inval
            }
        }
    }

    /// Whether the error says that stored data or the device cannot be trusted, as opposed to an
    /// ordinary outcome.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Error::Device { .. }
                | Error::Checksum { .. }
                | Error::Corrupt { .. }
                | Error::BadItem { .. }
                | Error::Unmapped { .. }
        )
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::Posix(errno)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Posix(errno) => write!(f, "{errno:?}"),
            Error::Memory => write!(f, "out of memory"),
            Error::NoSpace => write!(f, "no space left in the pool"),
            Error::ReadOnly => write!(f, "the pool is open read-only"),
            Error::Failed => write!(
                f,
                "changes could not be made durable and are lost after an error; see the log"
            ),
            Error::TurnedReadOnly => {
                write!(f, "the pool turned read-only after an error; see the log")
            }
            Error::Device { device, at, cause } => {
                write!(f, "device {device} failed at byte {at}: {cause:?}")
            }
            Error::Checksum { addr, bytes } => {
                write!(f, "{bytes} bytes at logical address {addr} do not match their checksum")
            }
            Error::Corrupt { what, addr } => {
                write!(f, "corrupt structure at logical address {addr}: {what}")
            }
            Error::BadItem { what, tree, object } => {
                write!(f, "corrupt item of object {object} in tree {tree}: {what}")
            }
            Error::Unmapped { addr } => write!(f, "logical address {addr} is in no chunk"),
            Error::NotCairn => write!(f, "not a cairn pool (no label found at either end)"),
            Error::NoSuperblock => {
                write!(f, "the pool's label is there but none of its superblocks is valid")
            }
            Error::NoGroup { txg, cause, others } => show_no_group(f, *txg, cause, others),
            Error::Unverified { addr } => write!(
                f,
                "data at logical address {addr} has no checksum, and so nothing says whether it is \
                 still that of an older group"
            ),
            Error::Truncated { expected, found } => write!(
                f,
                "the device has {found} bytes but the pool was made for {expected}; \
                 it has been cut off"
            ),
            Error::Version { found } => {
                write!(f, "format version {found} is not one this build can read")
            }
            Error::Features { class, unknown } => match class {
                FeatureClass::Incompat => {
                    write!(
                        f,
                        "the pool uses features this build does not know (incompat \
                         {unknown:#x}); use a newer cairn"
                    )
                }
                FeatureClass::RoCompat => {
                    write!(
                        f,
                        "the pool uses features this build can only read (ro-compat \
                         {unknown:#x}); mount it read-only or use a newer cairn"
                    )
                }
            },
            Error::MissingDevices { devices, needed, unusable } => {
                show_missing(f, devices, *needed)?;
                unusable.iter().try_for_each(|device| write!(f, "; {device}"))
            }
            Error::OnlyBehind { behind, missing } => {
                let s = if behind.len() == 1 { "" } else { "s" };
                let lack = if behind.len() == 1 { "lacks" } else { "lack" };
                write!(f, "device{s} ")?;
                list(f, behind.iter())?;
                write!(f, " {lack} some of what was written to the pool; ")?;
                if !missing.is_empty() {
                    let s = if missing.len() == 1 { "" } else { "s" };
                    write!(f, "connect device{s} ")?;
                    list(
                        f,
                        missing
                            .iter()
                            .map(|(index, id)| alloc::format!("{index} (id {})", Hex(id))),
                    )?;
                    write!(f, " as well, or ")?;
                }
                write!(f, "open the pool read-only and degraded to read what is there")
            }
            Error::Split { devices } => {
                write!(f, "the pool was written in two halves that no longer belong together: ")?;
                write!(f, "device{} ", if devices.len() == 1 { "" } else { "s" })?;
                list(f, devices.iter())?;
                write!(
                    f,
                    " without the others, and the others without {}; disconnect the half to give \
                     up and open the other degraded",
                    if devices.len() == 1 { "it" } else { "them" }
                )
            }
            Error::WrongDevice { name } => write!(f, "{name} does not belong to this pool"),
            Error::FormerDevice { name } => {
                write!(f, "{name} was removed from this pool or replaced, and what it holds is old")
            }
            Error::TooSmall { minimum } => {
                write!(f, "the device is too small: at least {minimum} bytes are needed")
            }
            Error::Argument { what } => write!(f, "{what}"),
            Error::Stream { what, at } => {
                write!(f, "the stream cannot be used: {what} (record at byte {at})")
            }
        }
    }
}

/// Writes a list as a sentence has it.
fn list<T: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    items: impl ExactSizeIterator<Item = T>,
) -> fmt::Result {
    let last = items.len().saturating_sub(1);
    for (position, item) in items.enumerate() {
        let before = match position {
            0 => "",
            _ if position == last => " and ",
            _ => ", ",
        };
        write!(f, "{before}{item}")?;
    }
    Ok(())
}

fn show_no_group(
    f: &mut fmt::Formatter<'_>,
    txg: Option<Txg>,
    cause: &Option<String>,
    others: &[Txg],
) -> fmt::Result {
    match (txg, cause) {
        (Some(txg), None) => write!(f, "the pool does not have its group {txg} any more")?,
        (Some(txg), Some(cause)) => write!(
            f,
            "group {txg} cannot be opened any more, because something that it needs was given up \
             since and overwritten, or is damaged ({cause})"
        )?,
        (None, _) => write!(f, "none of the groups before the newest is whole any more")?,
    }
    match others {
        [] => write!(f, "; there is no other that can be opened"),
        [only] => write!(f, "; the only one that can be opened is {only}"),
        _ => {
            write!(f, "; those that can be opened are ")?;
            list_groups(f, others)
        }
    }
}

/// Writes groups in ascending order, those in a row by the first and the last.
fn list_groups(f: &mut fmt::Formatter<'_>, groups: &[Txg]) -> fmt::Result {
    let mut sorted = groups.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let rows = sorted.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0));
    let row = |row: &[Txg]| match row {
        [first, .., last] if row.len() > 2 => alloc::vec![alloc::format!("{first} to {last}")],
        row => row.iter().map(|txg| alloc::format!("{txg}")).collect(),
    };
    let shown: Vec<String> = rows.flat_map(row).collect();
    list(f, shown.iter())
}

fn show_missing(
    f: &mut fmt::Formatter<'_>,
    devices: &[(u16, [u8; 16])],
    needed: bool,
) -> fmt::Result {
    let (many, be, it) = if devices.len() == 1 { ("", "is", "it") } else { ("s", "are", "them") };
    write!(f, "the pool's device{many} ")?;
    list(f, devices.iter().map(|(index, id)| alloc::format!("{index} (id {})", Hex(id))))?;
    write!(f, " {be} missing")?;
    match needed {
        true => write!(f, " and the other devices do not have all that is on {it}; connect {it}"),
        false => write!(f, "; connect {it}, or open the pool degraded to go on without {it}"),
    }
}

impl core::error::Error for Error {}

/// Something an administrator must learn of, sent to [`crate::platform::Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incident {
    /// A copy of a block was bad; another was good and was served.
    Healed {
        /// The block.
        addr: Logical,
        /// The device with the bad copy.
        device: u16,
        /// Where the bad copy is.
        at: Physical,
        /// Whether the good content could be written over it.
        rewritten: bool,
    },
    /// No good copy of a block was found.
    Lost {
        /// The block.
        addr: Logical,
        /// Bytes that could not be had.
        bytes: u64,
        /// What was wrong with the last copy tried.
        error: Error,
    },
    /// Data of a file could not be read.
    FileDamaged {
        /// The subvolume.
        tree: TreeId,
        /// The file.
        ino: Ino,
        /// Its path as far as it could be found, with the subvolume or snapshot.
        path: String,
        /// First damaged byte of the file.
        offset: u64,
        /// The error below.
        error: Error,
    },
    /// Something that was deleted cannot be taken apart.
    DeletionStopped {
        /// The subvolume or snapshot that was deleted.
        tree: TreeId,
        /// What could not be read.
        error: Error,
    },
    /// The pool stopped accepting changes.
    WentReadOnly {
        /// The group that could not be published.
        txg: Txg,
        /// Why.
        error: Error,
    },
    /// A device failed, and the pool goes on without it.
    DeviceFailed {
        /// Index of the device.
        device: u16,
        /// Its name.
        name: String,
        /// What it did.
        error: Error,
    },
    /// A device that lacked something has everything again.
    DeviceComplete {
        /// Index of the device.
        device: u16,
        /// Its name.
        name: String,
    },
    /// A device that was given has no label that can be read; the pool was opened without it.
    DeviceUnusable {
        /// Its name.
        name: String,
        /// Why it has none.
        error: Error,
    },
    /// A scrub has looked at everything.
    Scrubbed {
        /// Copies that it found bad.
        found: u64,
        /// Bytes of copies that were repaired.
        repaired_bytes: u64,
        /// Blocks and extents without a good copy.
        lost: u64,
    },
    /// The intent log was replayed on open.
    Replayed {
        /// How many log records were applied.
        records: u64,
    },
}

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Incident::Healed { addr, device, at, rewritten } => write!(
                f,
                "bad copy of block {addr} on device {device} at byte {at}: served from another \
                 copy{}",
                if *rewritten { " and repaired" } else { "; the bad copy could not be rewritten" }
            ),
            Incident::Lost { addr, bytes, error } => {
                write!(f, "block {addr} ({bytes} bytes) is lost: {error}")
            }
            Incident::FileDamaged { tree, ino, path, offset, error } => write!(
                f,
                "file {path} (inode {ino}, subvolume {tree}) cannot be read at byte \
                 {offset}: {error}"
            ),
            Incident::DeletionStopped { tree, error } => write!(
                f,
                "what only the deleted subvolume or snapshot {tree} held cannot be freed now: \
                 {error}; it is tried again when the pool is opened next"
            ),
            Incident::WentReadOnly { txg, error } => write!(
                f,
                "transaction group {txg} could not be written ({error}); the pool is now \
                 read-only and keeps the last good state"
            ),
            Incident::DeviceFailed { device, name, error } => write!(
                f,
                "device {device} ({name}) failed and is no longer written: {error}; the pool goes \
                 on with the copies on the other devices; once the device works again, unmount and \
                 mount the pool to bring it up to date"
            ),
            Incident::DeviceComplete { device, name } => {
                write!(f, "device {device} ({name}) has been brought up to date")
            }
            Incident::DeviceUnusable { name, error } => {
                write!(f, "{name} is left out of the pool: {error}")
            }
            Incident::Scrubbed { found, repaired_bytes, lost } => write!(
                f,
                "scrub finished: {found} bad copies found, {repaired_bytes} bytes repaired, {lost} \
                 blocks lost"
            ),
            Incident::Replayed { records } => {
                write!(f, "replayed {records} records of the intent log after an unclean shutdown")
            }
        }
    }
}
