//! Whether the records of a stream make sense one after the other, found without writing anything.
//!
//! A full stream says all of a snapshot's content, so its identity is computed anew and compared
//! with the one the stream ends with. Of an incremental one only order and bounds can be known:
//! what it says is relative to a base that is not here. So it is with one that has clones: what
//! they name went by and was not kept.
//!
//! Memory: one record of content, whatever the stream says.

use super::content::{self, Content, Side, RECORD_BYTES};
use super::record::{Begin, Mark, Record, PROPERTIES, PROPERTIES_BYTES_MAX};
use crate::error::Error;
use crate::format::inode::{mode, InodeItem};
use crate::format::{rule, BadBytes};
use crate::platform::{Codecs, Result};
use crate::units::{Ino, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::vec::Vec;

/// What a stream holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Inodes that are new or differ.
    pub inodes: u64,
    /// Inodes that went.
    pub gone: u64,
    /// Names that came.
    pub names: u64,
    /// Names that went; not those in directories that went.
    pub unnamed: u64,
    /// Attributes that came or have another value.
    pub attributes: u64,
    /// Bytes of data.
    pub data_bytes: u64,
    /// Bytes that became holes.
    pub hole_bytes: u64,
    /// Bytes that other files of the stream or its base have.
    pub cloned_bytes: u64,
}

/// The inode that records are about.
struct Current {
    ino: Ino,
    fields: Box<InodeItem>,
    /// The end of the last range.
    data_to: u64,
    has_target: bool,
}

/// Follows a stream. After an error it must not be used.
pub struct Verifier {
    begin: Option<Box<Begin>>,
    current: Option<Current>,
    /// The record of content under way.
    index: u64,
    data: Vec<u8>,
    content: Content,
    summary: Summary,
    has_ended: bool,
    /// Whether the content is computed.
    is_summed: bool,
    /// Some data was only named.
    has_clones: bool,
    /// Bytes of properties so far.
    property_bytes: usize,
}

impl Default for Verifier {
    fn default() -> Verifier {
        Verifier {
            begin: None,
            current: None,
            index: 0,
            data: Vec::new(),
            content: Content::empty(),
            summary: Summary::default(),
            has_ended: false,
            is_summed: true,
            has_clones: false,
            property_bytes: 0,
        }
    }
}

impl Verifier {
    /// One that leaves the content to who stores it.
    pub fn of_order() -> Verifier {
        Verifier { is_summed: false, ..Verifier::default() }
    }

    /// Takes the next record, which begins at byte `at` of the stream.
    ///
    /// # Errors
    /// [`Error::Stream`] when it cannot follow those before; [`Error::Memory`].
    pub fn take(&mut self, codecs: &dyn Codecs, record: &Record, at: u64) -> Result<()> {
        let wrong = |bad: BadBytes| Error::Stream { what: bad.0, at };
        self.order(record).map_err(wrong)?;
        match record {
            Record::Begin(begin) => self.begin = Some(begin.clone()),
            Record::Property { name, value } => self.property_bytes += name.len() + value.len(),
            Record::Gone { .. } => self.summary.gone += 1,
            Record::Unname { .. } => self.summary.unnamed += 1,
            Record::Inode { ino, fields } => {
                self.flush(codecs);
                let said = content::fields(fields);
                let fields = fields.clone();
                let first = self.first();
                let data_to = if first.ino == ino.0 { first.offset } else { 0 };
                self.current = Some(Current { ino: *ino, fields, data_to, has_target: false });
                self.element(1, &[], &[&said]);
                self.summary.inodes += 1;
            }
            Record::Name { ino, name, .. } => {
                self.element(2, &[ino.0], &[name]);
                self.summary.names += 1;
            }
            Record::Target { target } => self.element(3, &[], &[target]),
            Record::Attribute { name, value } => {
                self.element(4, &[], &[name, value]);
                self.summary.attributes += 1;
            }
            Record::Unattribute { .. } => {}
            Record::Data { offset, bytes } => self.data(codecs, *offset, bytes)?,
            Record::Hole { bytes, .. } => {
                // Holes cost a stream nothing, so it may have any number of the largest.
                self.summary.hole_bytes = self.summary.hole_bytes.saturating_add(*bytes);
            }
            Record::Clone { bytes, .. } => {
                self.has_clones = true;
                self.summary.cloned_bytes = self.summary.cloned_bytes.saturating_add(*bytes);
            }
            Record::End { identity, elements } => {
                self.flush(codecs);
                self.has_ended = true;
                let found = (self.content.identity(), self.content.elements());
                if self.is_whole() && self.is_summed && found != (*identity, *elements) {
                    let what = "the stream does not hold the content that it says it holds";
                    return Err(Error::Stream { what, at });
                }
            }
        }
        Ok(())
    }

    /// What the stream is of, when it has begun.
    pub fn begin(&self) -> Option<&Begin> {
        self.begin.as_deref()
    }

    /// What it holds.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Whether it is there to its end.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    fn is_full(&self) -> bool {
        self.begin.as_ref().is_some_and(|begin| begin.base.is_none())
    }

    /// Whether it says all of a snapshot, as far as is known.
    fn is_whole(&self) -> bool {
        let resumes = self.begin.as_ref().is_some_and(|begin| begin.resumes.is_some());
        self.is_full() && !resumes && !self.has_clones
    }

    /// Where it begins.
    fn first(&self) -> Mark {
        self.begin.as_ref().and_then(|begin| begin.resumes).unwrap_or_default()
    }

    /// Whether a record may come here.
    fn order(&mut self, record: &Record) -> core::result::Result<(), BadBytes> {
        rule(!self.has_ended, "a record after the end")?;
        rule(self.begin.is_some() != matches!(record, Record::Begin(_)), "a stream begins once")?;
        let is_full = self.is_full();
        match record {
            Record::Begin(_) | Record::End { .. } => return Ok(()),
            Record::Property { name, value } => {
                let tells = self.begin.as_ref().is_some_and(|b| b.compat & PROPERTIES != 0);
                rule(tells, "a property in a stream that says it has none")?;
                let came = (self.summary.gone, self.summary.unnamed, self.summary.inodes);
                rule(came == (0, 0, 0), "a property after what the snapshot holds")?;
                let bytes = self.property_bytes + name.len() + value.len();
                return rule(bytes <= PROPERTIES_BYTES_MAX, "more properties than there can be");
            }
            Record::Gone { .. } | Record::Unname { .. } => {
                rule(!is_full, "something goes in a full stream")?;
                let has_come = self.current.is_some() || self.first().ino > 0;
                return rule(!has_come, "something goes after something came");
            }
            Record::Inode { ino, .. } => {
                let is_next = match &self.current {
                    Some(current) => current.ino < *ino,
                    None => self.first().ino <= ino.0,
                };
                return rule(is_next, "inodes do not ascend");
            }
            Record::Hole { .. } => rule(!is_full, "a hole in a full stream")?,
            Record::Unattribute { .. } => rule(!is_full, "something goes in a full stream")?,
            _ => {}
        }
        let clones = self.begin.as_ref().is_some_and(|begin| begin.clones);
        let current = self.current.as_mut().ok_or(BadBytes("a record without an inode"))?;
        match record {
            Record::Name { .. } => rule(current.fields.is_dir(), "a name outside of a directory"),
            Record::Target { .. } => {
                let is_link = current.fields.file_type() == mode::SYMLINK;
                rule(is_link, "a target of something that is not a symbolic link")?;
                rule(!current.has_target, "a second target")?;
                current.has_target = true;
                Ok(())
            }
            Record::Data { offset, bytes } => current.range(*offset, bytes.len() as u64),
            Record::Hole { offset, bytes } => current.range(*offset, *bytes),
            Record::Clone { offset, bytes, source, from } => {
                rule(clones, "a clone in a stream that says it has none")?;
                let is_apart = *source != current.ino
                    || from.saturating_add(*bytes) <= *offset
                    || offset.saturating_add(*bytes) <= *from;
                rule(is_apart, "a clone of itself")?;
                current.range(*offset, *bytes)
            }
            _ => Ok(()),
        }
    }

    fn element(&mut self, tag: u8, numbers: &[u64], parts: &[&[u8]]) {
        let Some(current) = self.current.as_ref().filter(|_| self.is_summed) else { return };
        let mut all = Vec::with_capacity(2);
        all.push(current.ino.0);
        all.extend_from_slice(numbers);
        self.content.put(Side::New, tag, &all, parts);
    }

    fn data(&mut self, codecs: &dyn Codecs, offset: u64, bytes: &[u8]) -> Result<()> {
        self.summary.data_bytes += bytes.len() as u64;
        if !self.is_whole() || !self.is_summed {
            return Ok(());
        }
        if self.index != offset / RECORD_BYTES {
            self.flush(codecs);
            self.index = offset / RECORD_BYTES;
        }
        // Within the record, as the decoder and `Current::range` see to.
        let end = (offset % RECORD_BYTES) as usize + bytes.len();
        self.data.try_reserve(end - self.data.len()).map_err(|_| Error::Memory)?;
        self.data.resize((offset % RECORD_BYTES) as usize, 0);
        self.data.extend_from_slice(bytes);
        Ok(())
    }

    /// The record of content under way is complete.
    fn flush(&mut self, codecs: &dyn Codecs) {
        if let Some(last) = self.data.iter().rposition(|byte| *byte != 0) {
            let hash = codecs.blake3(&self.data[..=last]);
            self.element(5, &[self.index], &[&hash]);
        }
        self.data.clear();
    }
}

impl Current {
    /// A range of data or of zeros.
    fn range(&mut self, offset: u64, bytes: u64) -> core::result::Result<(), BadBytes> {
        let end = offset.saturating_add(bytes);
        rule(self.fields.is_file(), "data of something that is not a file")?;
        rule(self.data_to <= offset, "ranges of a file do not ascend")?;
        rule(end <= self.fields.size, "data beyond the end of a file")?;
        let is_whole = end % SECTOR_BYTES == 0 || end == self.fields.size;
        rule(is_whole, "a range ends within a sector")?;
        self.data_to = end;
        Ok(())
    }
}
