//! Records of a stream: bytes to checked values and back.
//!
//! ```text
//! header (16) | body | checksum (32)
//! ```
//!
//! The checksum is BLAKE3-256 of the checksum of the record before (zeros before the first), the
//! header and the body. So a record vouches for all before it: none can be left out, repeated,
//! moved or taken from another stream. That finds damage; it does not tell who wrote a stream.
//!
//! Streams are hostile: a body is at most [`BODY_BYTES_MAX`] long, which is looked at before any
//! memory is taken for it, and nothing else in a stream decides how much is taken.
//!
//! The layout and the meaning of each record: `docs/stream.md`.

use super::content::{self, Identity, RECORD_BYTES};
use crate::error::Error;
use crate::format::dir::{self, name_is_valid};
use crate::format::extent::FILE_BYTES_MAX;
use crate::format::inode::{mode, InodeItem};
use crate::format::pool::{check_name, INO_MAX, NAME_BYTES_MAX};
pub use crate::format::received::Mark;
use crate::format::xattr::VALUE_BYTES_MAX;
use crate::format::{rule, BadBytes};
use crate::platform::{Codecs, Result, Timestamp};
use crate::units::{Ino, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// Version of the layout.
pub const VERSION: u32 = 1;
/// What a stream begins with, after its first header.
pub const MAGIC: [u8; 8] = *b"CrnStrm\0";
/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of a checksum.
pub const CHECKSUM_BYTES: usize = 32;
/// Longest body, in bytes.
pub const BODY_BYTES_MAX: usize = 192 << 10;
/// Longest target of a symbolic link, in bytes: what Linux allows.
pub const TARGET_BYTES_MAX: usize = 4095;
/// Most bytes that one *clone* names.
pub const CLONE_BYTES_MAX: u64 = 16 << 20;
/// Records of kinds with this bit may be passed over by who does not know them.
pub const PASS_OVER: u16 = 0x8000;

/// Bytes of an inode's fields.
const FIELDS_BYTES: usize = 72;

mod kind {
    pub const BEGIN: u16 = 1;
    pub const GONE: u16 = 2;
    pub const UNNAME: u16 = 3;
    pub const INODE: u16 = 4;
    pub const NAME: u16 = 5;
    pub const TARGET: u16 = 6;
    pub const ATTRIBUTE: u16 = 7;
    pub const UNATTRIBUTE: u16 = 8;
    pub const DATA: u16 = 9;
    pub const HOLE: u16 = 10;
    pub const END: u16 = 11;
    pub const CLONE: u16 = 12;
    pub const PROPERTY: u16 = super::PASS_OVER | 1;
}

/// Feature that a reader has to know: the stream begins at a later inode.
const RESUMES: u64 = 1;
/// Feature that a reader has to know: there may be records of kind *clone*.
const CLONES: u64 = 2;
/// Feature that a reader has to know: the stream is of a subvolume below the place it goes to.
const BELOW: u64 = 4;
/// Bit of [`Begin::compat`]: another stream follows this one. Where it does not, all are cut off.
pub const FOLLOWED: u64 = 1;
/// Bit of [`Begin::compat`]: properties are told, all that were chosen.
pub const PROPERTIES: u64 = 2;
/// Bytes of the names and values of all properties together, at most.
pub const PROPERTIES_BYTES_MAX: usize = 8192;

/// What a stream is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begin {
    /// Features that a reader may do without knowing.
    pub compat: u64,
    /// Id of the snapshot.
    pub id: [u8; 16],
    /// When it was taken.
    pub created: Timestamp,
    /// What the stream goes on from; `None` for a full stream.
    pub base: Option<Base>,
    /// The stream goes on where another of the same snapshot broke off.
    pub resumes: Option<Mark>,
    /// Data that several files share may be sent once.
    pub clones: bool,
    /// The subvolume, from the one that the first of several streams is of; empty for that.
    pub below: Vec<u8>,
    /// Name of the snapshot.
    pub name: Vec<u8>,
}

/// What a stream goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Id of the snapshot.
    pub id: [u8; 16],
    /// Identity of its content.
    pub identity: Identity,
}

/// One record. Those from `Name` to `Clone` are about the inode of the last `Inode`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The first.
    Begin(Box<Begin>),
    /// A property that was chosen for the subvolume.
    Property {
        /// Its name.
        name: Vec<u8>,
        /// Its value, as users write it.
        value: Vec<u8>,
    },
    /// An inode of the base, and all that it holds, is not there any more.
    Gone {
        /// The inode.
        ino: Ino,
    },
    /// A name of the base is not there any more.
    Unname {
        /// The directory.
        dir: Ino,
        /// What the name stood for.
        ino: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// An inode has these fields now; if it was not there, or was of another type, it is empty.
    Inode {
        /// The inode.
        ino: Ino,
        /// Its fields, as far as they are content; the others are zero.
        fields: Box<InodeItem>,
    },
    /// A name in this directory.
    Name {
        /// What it stands for; its `Inode` may be yet to come.
        ino: Ino,
        /// The type bits of that.
        file_type: u32,
        /// The name.
        name: Vec<u8>,
    },
    /// Where this symbolic link leads.
    Target {
        /// The target.
        target: Vec<u8>,
    },
    /// An attribute has this value now.
    Attribute {
        /// Its name.
        name: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// An attribute is not there any more.
    Unattribute {
        /// Its name.
        name: Vec<u8>,
    },
    /// Data of this file.
    Data {
        /// Where; a multiple of the sector size.
        offset: u64,
        /// Whole sectors of one content record, but that the last may end where the file does.
        bytes: Vec<u8>,
    },
    /// A range of this file reads as zeros now.
    Hole {
        /// Where; a multiple of the sector size.
        offset: u64,
        /// How long: whole sectors, or up to the end of the file.
        bytes: u64,
    },
    /// A range of this file holds what a range of another, or of this one, holds.
    Clone {
        /// Where; a multiple of the sector size.
        offset: u64,
        /// How long: whole sectors, or up to the end of both files.
        bytes: u64,
        /// The file that has it already.
        source: Ino,
        /// Where that has it; a multiple of the sector size.
        from: u64,
    },
    /// The last.
    End {
        /// Identity of the snapshot's content.
        identity: Identity,
        /// How many elements its content has.
        elements: u64,
    },
}

/// Takes a body apart.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<const N: usize>(&mut self) -> core::result::Result<[u8; N], BadBytes> {
        let (head, rest) = self.0.split_first_chunk().ok_or(BadBytes("record too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn slice(&mut self, bytes: usize) -> core::result::Result<&'a [u8], BadBytes> {
        rule(self.0.len() >= bytes, "record too short")?;
        let (head, rest) = self.0.split_at(bytes);
        self.0 = rest;
        Ok(head)
    }

    fn u16(&mut self) -> core::result::Result<u16, BadBytes> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> core::result::Result<u32, BadBytes> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> core::result::Result<u64, BadBytes> {
        self.take().map(u64::from_le_bytes)
    }

    fn ino(&mut self) -> core::result::Result<Ino, BadBytes> {
        let ino = self.u64()?;
        rule((1..=INO_MAX).contains(&ino), "inode number out of range")?;
        Ok(Ino(ino))
    }

    fn time(&mut self) -> core::result::Result<Timestamp, BadBytes> {
        let (secs, nanos) = (i64::from_le_bytes(self.take()?), self.u32()?);
        rule(nanos < 1_000_000_000, "nanoseconds out of range")?;
        Ok(Timestamp { secs, nanos })
    }

    fn rest(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.0)
    }
}

impl Record {
    fn encode(&self) -> (u16, Vec<u8>) {
        let mut out = Vec::new();
        let kind = match self {
            Record::Begin(begin) => {
                encode_begin(begin, &mut out);
                kind::BEGIN
            }
            Record::Property { name, value } => {
                out.extend_from_slice(&(name.len() as u16).to_le_bytes());
                out.extend_from_slice(name);
                out.extend_from_slice(value);
                kind::PROPERTY
            }
            Record::Gone { ino } => {
                out.extend_from_slice(&ino.0.to_le_bytes());
                kind::GONE
            }
            Record::Unname { dir, ino, name } => {
                out.extend_from_slice(&dir.0.to_le_bytes());
                out.extend_from_slice(&ino.0.to_le_bytes());
                out.extend_from_slice(name);
                kind::UNNAME
            }
            Record::Inode { ino, fields } => {
                out.extend_from_slice(&ino.0.to_le_bytes());
                out.extend_from_slice(&content::fields(fields));
                kind::INODE
            }
            Record::Name { ino, file_type, name } => {
                out.extend_from_slice(&ino.0.to_le_bytes());
                out.extend_from_slice(&file_type.to_le_bytes());
                out.extend_from_slice(name);
                kind::NAME
            }
            Record::Target { target } => {
                out.extend_from_slice(target);
                kind::TARGET
            }
            Record::Attribute { name, value } => {
                out.extend_from_slice(&(name.len() as u16).to_le_bytes());
                out.extend_from_slice(name);
                out.extend_from_slice(value);
                kind::ATTRIBUTE
            }
            Record::Unattribute { name } => {
                out.extend_from_slice(name);
                kind::UNATTRIBUTE
            }
            Record::Data { offset, bytes } => {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(bytes);
                kind::DATA
            }
            Record::Hole { offset, bytes } => {
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&bytes.to_le_bytes());
                kind::HOLE
            }
            Record::Clone { offset, bytes, source, from } => {
                for number in [*offset, *bytes, source.0, *from] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                kind::CLONE
            }
            Record::End { identity, elements } => {
                out.extend_from_slice(&identity.0);
                out.extend_from_slice(&elements.to_le_bytes());
                kind::END
            }
        };
        (kind, out)
    }

    /// Reads a body; `None` for a kind that may be passed over.
    fn decode(kind: u16, body: &[u8]) -> core::result::Result<Option<Record>, BadBytes> {
        let mut body = Body(body);
        let record = match kind {
            kind::BEGIN => Record::Begin(decode_begin(&mut body)?),
            kind::PROPERTY => {
                let name_bytes = body.u16()?;
                let name = body.slice(name_bytes.into())?.to_vec();
                let value = body.rest().to_vec();
                let is_text = |bytes: &[u8]| core::str::from_utf8(bytes).is_ok();
                rule(!name.is_empty() && is_text(&name), "property name not allowed")?;
                rule(is_text(&value), "property value that is not UTF-8")?;
                rule(name.len() + value.len() <= PROPERTIES_BYTES_MAX, "property too long")?;
                Record::Property { name, value }
            }
            kind::GONE => Record::Gone { ino: body.ino()? },
            kind::UNNAME => {
                let (dir, ino) = (body.ino()?, body.ino()?);
                Record::Unname { dir, ino, name: entry_name(&mut body)? }
            }
            kind::INODE => {
                let ino = body.ino()?;
                Record::Inode { ino, fields: decode_fields(&mut body)? }
            }
            kind::NAME => {
                let (ino, file_type) = (body.ino()?, body.u32()?);
                rule(mode::is_type(file_type), "unknown file type of a name")?;
                Record::Name { ino, file_type, name: entry_name(&mut body)? }
            }
            kind::TARGET => {
                let target = body.rest();
                rule(!target.is_empty(), "empty target of a symbolic link")?;
                rule(target.len() <= TARGET_BYTES_MAX, "target of a symbolic link too long")?;
                Record::Target { target: target.to_vec() }
            }
            kind::ATTRIBUTE => {
                let name_bytes = body.u16()?;
                let name = attribute_name(body.slice(name_bytes.into())?)?;
                let value = body.rest();
                rule(value.len() <= VALUE_BYTES_MAX, "attribute value too long")?;
                Record::Attribute { name, value: value.to_vec() }
            }
            kind::UNATTRIBUTE => Record::Unattribute { name: attribute_name(body.rest())? },
            kind::DATA => {
                let offset = body.u64()?;
                let bytes = body.rest();
                check_range(offset, bytes.len() as u64)?;
                let last = offset + bytes.len() as u64 - 1;
                rule(offset / RECORD_BYTES == last / RECORD_BYTES, "data of two content records")?;
                Record::Data { offset, bytes: bytes.to_vec() }
            }
            kind::HOLE => {
                let (offset, bytes) = (body.u64()?, body.u64()?);
                check_range(offset, bytes)?;
                Record::Hole { offset, bytes }
            }
            kind::CLONE => {
                let (offset, bytes) = (body.u64()?, body.u64()?);
                let (source, from) = (body.ino()?, body.u64()?);
                check_range(offset, bytes)?;
                check_range(from, bytes)?;
                rule(bytes <= CLONE_BYTES_MAX, "clone too long")?;
                Record::Clone { offset, bytes, source, from }
            }
            kind::END => {
                let identity = Identity(body.take()?);
                Record::End { identity, elements: body.u64()? }
            }
            _ => {
                rule(kind & PASS_OVER != 0, "unknown kind of record")?;
                return Ok(None);
            }
        };
        rule(body.0.is_empty(), "record too long")?;
        Ok(Some(record))
    }
}

fn check_range(offset: u64, bytes: u64) -> core::result::Result<(), BadBytes> {
    rule(offset % SECTOR_BYTES == 0, "range does not begin at a sector")?;
    rule(bytes > 0, "empty range")?;
    let end = offset.checked_add(bytes);
    rule(end.is_some_and(|end| end <= FILE_BYTES_MAX), "range beyond the largest file")
}

fn entry_name(body: &mut Body<'_>) -> core::result::Result<Vec<u8>, BadBytes> {
    let name = body.rest();
    rule(name_is_valid(name), "name not allowed in a directory")?;
    Ok(name.to_vec())
}

fn attribute_name(name: &[u8]) -> core::result::Result<Vec<u8>, BadBytes> {
    rule((1..=dir::NAME_BYTES_MAX).contains(&name.len()), "attribute name of the wrong length")?;
    rule(!name.contains(&0), "NUL in an attribute name")?;
    Ok(name.to_vec())
}

/// The fields that are content, checked as an inode on disk is.
#[inline(never)]
fn decode_fields(body: &mut Body<'_>) -> core::result::Result<Box<InodeItem>, BadBytes> {
    let mut fields = Body(body.slice(FIELDS_BYTES)?);
    let mut item = Box::new(InodeItem::zeroed());
    (item.mode, item.uid, item.gid) = (fields.u32()?, fields.u32()?, fields.u32()?);
    (item.flags, item.project) = (fields.u32()?, fields.u32()?);
    (item.rdev, item.size) = (fields.u64()?, fields.u64()?);
    item.set_mtime(fields.time()?);
    item.set_ctime(fields.time()?);
    item.set_btime(fields.time()?);
    InodeItem::decode(&item.to_bytes())?;
    rule(item.size == 0 || item.is_file(), "size of something that is not a file")?;
    let is_device = matches!(item.file_type(), mode::CHAR | mode::BLOCK);
    rule(item.rdev == 0 || is_device, "device number of something that is not a device")?;
    Ok(item)
}

fn encode_begin(begin: &Begin, out: &mut Vec<u8>) {
    let base = begin.base.unwrap_or(Base { id: [0; 16], identity: Identity([0; 32]) });
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&u32::from(begin.base.is_some()).to_le_bytes());
    let resumes = if begin.resumes.is_some() { RESUMES } else { 0 };
    let clones = if begin.clones { CLONES } else { 0 };
    let features = resumes | clones | if begin.below.is_empty() { 0 } else { BELOW };
    out.extend_from_slice(&features.to_le_bytes());
    out.extend_from_slice(&begin.compat.to_le_bytes());
    out.extend_from_slice(&begin.id);
    out.extend_from_slice(&begin.created.secs.to_le_bytes());
    out.extend_from_slice(&begin.created.nanos.to_le_bytes());
    out.extend_from_slice(&0u32.to_le_bytes());
    out.extend_from_slice(&base.id);
    out.extend_from_slice(&base.identity.0);
    if let Some(mark) = begin.resumes {
        out.extend_from_slice(&mark.encode());
    }
    if !begin.below.is_empty() {
        out.extend_from_slice(&(begin.below.len() as u16).to_le_bytes());
        out.extend_from_slice(&begin.below);
    }
    out.extend_from_slice(&begin.name);
}

#[inline(never)]
fn decode_begin(body: &mut Body<'_>) -> core::result::Result<Box<Begin>, BadBytes> {
    rule(body.take()? == MAGIC, "not a stream of cairn")?;
    rule(body.u32()? == VERSION, "version of the stream that this build cannot read")?;
    let has_base = body.u32()?;
    rule(has_base <= 1, "unknown kind of stream")?;
    let what = "the stream uses features that this build does not know; use a newer cairn";
    let features = body.u64()?;
    rule(features & !(RESUMES | CLONES | BELOW) == 0, what)?;
    let compat = body.u64()?;
    let (id, created) = (body.take()?, body.time()?);
    rule(body.u32()? == 0, "reserved field of a stream is not zero")?;
    let base = Base { id: body.take()?, identity: Identity(body.take()?) };
    let is_zero = base.id == [0; 16] && base.identity.0 == [0; 32];
    rule(has_base == 1 || is_zero, "full stream with a base")?;
    let resumes = match features & RESUMES {
        0 => None,
        _ => Some(Mark::decode(body.slice(Mark::BYTES)?)?),
    };
    let below = match features & BELOW {
        0 => Vec::new(),
        _ => {
            let bytes = body.u16()?;
            let below = body.slice(bytes.into())?;
            check_name(below)?;
            below.to_vec()
        }
    };
    let name = body.rest();
    rule((1..=NAME_BYTES_MAX).contains(&name.len()), "snapshot name of the wrong length")?;
    rule(!name.contains(&b'/'), "snapshot name not allowed")?;
    check_name(name)?;
    let base = (has_base == 1).then_some(base);
    let (clones, name) = (features & CLONES != 0, name.to_vec());
    Ok(Box::new(Begin { compat, id, created, base, resumes, clones, below, name }))
}

/// Where in a stream one is: what the next record follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Checksum of the record before.
    chain: [u8; CHECKSUM_BYTES],
    /// Records before.
    pub records: u64,
    /// Bytes before.
    pub bytes: u64,
}

impl Position {
    /// The checksum of a record here. `record` has room for the chain, then header and body.
    fn checksum(&self, codecs: &dyn Codecs, record: &mut [u8]) -> [u8; CHECKSUM_BYTES] {
        record[..CHECKSUM_BYTES].copy_from_slice(&self.chain);
        codecs.blake3(record)
    }

    fn pass(&mut self, checksum: [u8; CHECKSUM_BYTES], body_bytes: usize) {
        self.chain = checksum;
        self.records += 1;
        self.bytes += (HEADER_BYTES + body_bytes + CHECKSUM_BYTES) as u64;
    }
}

/// Writes records.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    at: Position,
}

impl Encoder {
    /// The bytes of the next record.
    ///
    /// # Panics
    /// If a part of the record is longer than the format has it, which whoever made it knew.
    pub fn put(&mut self, codecs: &dyn Codecs, record: &Record) -> Vec<u8> {
        let (kind, body) = record.encode();
        assert!(body.len() <= BODY_BYTES_MAX, "a record's body of {} bytes", body.len());
        let mut out = Vec::with_capacity(CHECKSUM_BYTES * 2 + HEADER_BYTES + body.len());
        out.extend_from_slice(&[0; CHECKSUM_BYTES]);
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&0u16.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.at.records.to_le_bytes());
        out.extend_from_slice(&body);
        let checksum = self.at.checksum(codecs, &mut out);
        self.at.pass(checksum, body.len());
        out.drain(..CHECKSUM_BYTES);
        out.extend_from_slice(&checksum);
        out
    }

    /// What was written.
    pub fn position(&self) -> Position {
        self.at
    }
}

/// Reads records. Give it as many bytes as it [needs](Decoder::need), again and again.
///
/// After an error it must not be used.
#[derive(Debug, Default)]
pub struct Decoder {
    at: Position,
    /// Kind and length of the body of the record whose header was read.
    head: Option<Head>,
    has_ended: bool,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    raw: [u8; HEADER_BYTES],
    kind: u16,
    body_bytes: usize,
}

impl Head {
    fn decode(raw: [u8; HEADER_BYTES], number: u64) -> core::result::Result<Head, BadBytes> {
        let mut fields = Body(&raw);
        let (kind, reserved) = (fields.u16()?, fields.u16()?);
        let (body_bytes, found) = (fields.u32()? as usize, fields.u64()?);
        if number == 0 {
            rule(kind == kind::BEGIN && found == 0, "not a stream of cairn")?;
        }
        rule(reserved == 0, "reserved field of a record is not zero")?;
        rule(body_bytes <= BODY_BYTES_MAX, "record too long")?;
        rule(found == number, "record out of turn")?;
        rule((kind == kind::BEGIN) == (number == 0), "a stream begins within another")?;
        Ok(Head { raw, kind, body_bytes })
    }
}

impl Decoder {
    /// How many bytes to read next: at most [`BODY_BYTES_MAX`] and a checksum; 0 at the end.
    pub fn need(&self) -> usize {
        match self.head {
            _ if self.has_ended => 0,
            None => HEADER_BYTES,
            Some(head) => head.body_bytes + CHECKSUM_BYTES,
        }
    }

    /// Takes the next bytes, as many as it needs. Gives a record when one is whole.
    ///
    /// # Errors
    /// [`Error::Stream`] when they are damaged, or break a rule; [`Error::Memory`].
    ///
    /// # Panics
    /// If there are more or fewer bytes than it needs.
    pub fn take(&mut self, codecs: &dyn Codecs, bytes: &[u8]) -> Result<Option<Record>> {
        assert_eq!(bytes.len(), self.need(), "as many bytes as are needed");
        let at = self.at.bytes;
        let bad = |bad: BadBytes| Error::Stream { what: bad.0, at };
        let Some(head) = self.head.take() else {
            if let Ok(raw) = bytes.try_into() {
                self.head = Some(Head::decode(raw, self.at.records).map_err(bad)?);
            }
            return Ok(None);
        };
        let (body, checksum) = bytes.split_at(head.body_bytes);
        let mut record = Vec::new();
        let len = CHECKSUM_BYTES + HEADER_BYTES + body.len();
        record.try_reserve_exact(len).map_err(|_| Error::Memory)?;
        record.extend_from_slice(&[0; CHECKSUM_BYTES]);
        record.extend_from_slice(&head.raw);
        record.extend_from_slice(body);
        let found = self.at.checksum(codecs, &mut record);
        if found != checksum {
            return Err(bad(BadBytes("a record does not match its checksum")));
        }
        let decoded = Record::decode(head.kind, body).map_err(bad)?;
        self.at.pass(found, body.len());
        self.has_ended = head.kind == kind::END;
        Ok(decoded)
    }

    /// Whether the last record of the stream was read.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// What was read.
    pub fn position(&self) -> Position {
        self.at
    }
}
