//! What a check can find: rules with permanent ids, and the list of what was found.

use crate::error::Error;
use crate::platform::Result;
use crate::units::{Logical, TreeId};
use alloc::borrow::Cow;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is wrong for users: redundancy is reduced, or room is wasted.
    Warning,
    /// Something is wrong with what the pool says of itself; data is there.
    Error,
    /// Data or names are lost, or will be when the pool is written to.
    Loss,
}

impl Severity {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Warning => "warning",
            Severity::Error => "error",
            Severity::Loss => "loss",
        }
    }
}

/// A rule that a sound pool keeps. The id is permanent: scripts and manuals name it.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Permanent id.
    pub id: &'static str,
    /// How bad it is when the rule is broken.
    pub severity: Severity,
    /// What is wrong then.
    pub text: &'static str,
}

macro_rules! rules {
    ($( $name:ident $id:literal $severity:ident $text:literal; )*) => {
        $(
            #[doc = $text]
            pub const $name: Rule = Rule { id: $id, severity: Severity::$severity, text: $text };
        )*

        /// All rules, for the manual.
        pub const TABLE: &[&Rule] = &[$( &$name ),*];
    };
}

/// The rules.
pub mod rules {
    use super::{Rule, Severity};

    rules! {
        // Labels and superblocks.
        LABEL "W-LABEL" Warning "one of a device's labels is damaged or out of date";
        SUPERBLOCK_COPY "W-SUPERBLOCK-COPY" Warning "a copy of the newest superblock is damaged";
        SUPERBLOCK_USAGE "W-SUPERBLOCK-USAGE" Warning
            "the superblock counts other space than is in use";
        // Blocks.
        BLOCK "E-BLOCK" Loss "a metadata block cannot be had from any copy";
        BLOCK_COPY "W-BLOCK-COPY" Warning
            "one copy of a metadata block is damaged; another is good";
        NODE_PLACE "E-NODE-PLACE" Error "a metadata block is in a chunk of another kind";
        ITEM_KIND "E-ITEM-KIND" Error "an item is of a kind that its tree does not have";
        ITEM "E-ITEM" Error "an item breaks a rule of the format";
        // Chunks and devices.
        CHUNK_OVERLAP "E-CHUNK-OVERLAP" Loss "a chunk cannot be where it says it is";
        CHUNK_NEXT "E-CHUNK-NEXT" Error "the next chunk's address is not beyond all chunks";
        CHUNK_SYSTEM "E-CHUNK-SYSTEM" Error
            "the superblock and the chunk tree differ in a system chunk";
        DEVICE_ITEM "E-DEVICE-ITEM" Error "a device's item contradicts its label or is missing";
        DEVICE_ALLOCATED "E-DEVICE-ALLOCATED" Error
            "a device's item counts other bytes than its chunks take";
        // Space.
        SPACE_SHARED "E-SPACE-SHARED" Loss "a sector is used twice by what cannot be shared";
        SPACE_UNMAPPED "E-SPACE-UNMAPPED" Loss "something is stored in no chunk, or across two";
        SPACE_IN_USE "E-SPACE-IN-USE" Loss "sectors in use are recorded as free";
        SPACE_LEAK "W-SPACE-LEAK" Warning "sectors are recorded as used by nothing";
        SPACE_ITEM "E-SPACE-ITEM" Error "an item of the space tree belongs to no region or chunk";
        SPACE_SUMMARY "E-SPACE-SUMMARY" Error
            "a chunk's summary differs from its bitmaps, or is missing";
        SPACE_RESIDUE "E-SPACE-RESIDUE" Error "the residue contradicts the space tree";
        // References.
        REF_COUNT "E-REF-COUNT" Loss "extents have more or fewer references than are counted";
        REF_OVERLAP "E-REF-OVERLAP" Error "items of the reference tree overlap";
        // Pool tree.
        SUBVOL_ID "E-SUBVOL-ID" Error "a subvolume's id is out of range";
        SUBVOL_DEFAULT "E-SUBVOL-DEFAULT" Error "the default subvolume does not exist";
        SUBVOL_SUMS "E-SUBVOL-SUMS" Error "a subvolume's counts differ from what it holds";
        SUBVOL_NEXT_INO "E-SUBVOL-NEXT-INO" Error
            "an inode's number is not below the next one to hand out";
        DEAD_LIST "E-DEAD-LIST" Error "there is a dead list, but no snapshot";
        // Inodes.
        INODE_MISSING "E-INODE-MISSING" Loss "items belong to an inode that does not exist";
        INODE_FIELD "E-INODE-FIELD" Error "a field of an inode contradicts its type";
        ROOT_MISSING "E-ROOT-MISSING" Loss "a subvolume has no root directory";
        LINK_COUNT "E-LINK-COUNT" Error "an inode's link count differs from its names";
        LINK_ITEMS "E-LINK-ITEMS" Error "an inode counts other further names than it has items for";
        LINK_KEY "E-LINK-KEY" Error "a link item stands at another key than its content asks for";
        ORPHAN_LISTED "E-ORPHAN-LISTED" Error
            "an inode is listed as nameless and is not, or does not exist";
        ORPHAN_UNLISTED "E-ORPHAN-UNLISTED" Error "an inode without names is not listed as such";
        // Names.
        NAME_NO_INODE "E-NAME-NO-INODE" Loss "a name stands for an inode that does not exist";
        NAME_TYPE "E-NAME-TYPE" Error "a name says another file type than its inode";
        NAME_BACKLINK "E-NAME-BACKLINK" Error "a name that its inode does not know";
        BACKLINK_NAME "E-BACKLINK-NAME" Error "an inode knows a name that does not exist";
        NAME_HASH "E-NAME-HASH" Loss
            "a name has no hash item, or a wrong one: it cannot be looked up";
        HASH_NAME "E-HASH-NAME" Error "a hash item names an entry that does not exist";
        NAME_TWICE "E-NAME-TWICE" Error "a directory has one name twice";
        NAME_COOKIE "E-NAME-COOKIE" Error "an entry's cookie is out of range";
        DIR_COUNT "E-DIR-COUNT" Error "a directory's counts differ from its entries";
        DIR_LOOP "E-DIR-LOOP" Loss "a directory cannot be reached from the root";
        // Content.
        EXTENT_OVERLAP "E-EXTENT-OVERLAP" Loss "extents of a file overlap";
        EXTENT_SIZE "E-EXTENT-SIZE" Error "an extent lies beyond the end of its file";
        EXTENT_INLINE "E-EXTENT-INLINE" Loss
            "inline data is not the whole file, or does not expand";
        EXTENT_SUMS "E-EXTENT-SUMS" Error "an inode's byte counts differ from its extents";
        BLOB_WINDOW "E-BLOB-WINDOW" Error "a blob is described in two ways";
        DATA "E-DATA" Loss "data of a file cannot be had from any copy";
        DATA_COPY "W-DATA-COPY" Warning "one copy of a file's data is damaged; another is good";
        SYMLINK "E-SYMLINK" Loss "a symlink has no target, or one of another length";
        XATTR_HASH "E-XATTR-HASH" Loss "an attribute stands at another hash than its name's";
        XATTR_HINT "E-XATTR-HINT" Loss
            "an inode says it lacks attributes that it has, or has ones it lacks";
        XATTR_PARTS "E-XATTR-PARTS" Loss
            "parts of an attribute's value are missing, stray or of a wrong length";
        // The log.
        LOG "E-LOG" Error "the intent log cannot be where the superblock says";
        // The check itself.
        INCOMPLETE "W-INCOMPLETE" Warning
            "not everything could be compared, because blocks are damaged";
    }
}

/// Where something is wrong, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spot {
    /// The tree.
    pub tree: Option<TreeId>,
    /// Inode number, address or id in it.
    pub object: Option<u64>,
    /// Logical address.
    pub addr: Option<Logical>,
}

impl Spot {
    /// Nowhere in particular.
    pub const NONE: Spot = Spot { tree: None, object: None, addr: None };

    /// An object of a tree.
    pub fn object(tree: TreeId, object: u64) -> Spot {
        Spot { tree: Some(tree), object: Some(object), addr: None }
    }

    /// A logical address.
    pub fn addr(addr: Logical) -> Spot {
        Spot { addr: Some(addr), ..Spot::NONE }
    }

    /// A block of a tree.
    pub fn block(tree: TreeId, addr: Logical) -> Spot {
        Spot { tree: Some(tree), object: None, addr: Some(addr) }
    }

    /// The same with an address.
    pub fn at(self, addr: Logical) -> Spot {
        Spot { addr: Some(addr), ..self }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Id of the rule that is broken.
    pub id: &'static str,
    /// How bad that is.
    pub severity: Severity,
    /// What is wrong, in one sentence with numbers.
    pub message: String,
    /// Where.
    pub spot: Spot,
    /// The file, from the root of its subvolume, if it is about one.
    pub path: Option<Vec<u8>>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity.name(), self.id, self.message)?;
        if let Some(path) = &self.path {
            write!(f, "; file {}", Printable(path))?;
        }
        if let Some(tree) = self.spot.tree {
            write!(f, "; tree {tree}")?;
        }
        if let Some(object) = self.spot.object {
            write!(f, ", object {object:#x}")?;
        }
        if let Some(addr) = self.spot.addr {
            write!(f, "; logical address {:#x}", addr.0)?;
        }
        Ok(())
    }
}

/// A path as text: what is not printable ASCII or UTF-8 is escaped.
struct Printable<'a>(&'a [u8]);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() {
                    write!(f, "{}", c.escape_default())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Findings of one rule that are kept in full; further ones are only counted.
const KEPT_PER_RULE: u64 = 100;

/// Collects findings.
#[derive(Default)]
pub(super) struct Findings {
    kept: Vec<Finding>,
    counts: BTreeMap<&'static str, u64>,
}

impl Findings {
    /// Adds a finding: the rule's text, and what is particular.
    pub fn add(&mut self, rule: &'static Rule, spot: Spot, detail: impl Into<Cow<'static, str>>) {
        let count = self.counts.entry(rule.id).or_insert(0);
        *count += 1;
        if *count > KEPT_PER_RULE {
            return;
        }
        let detail = detail.into();
        let mut message = String::from(rule.text);
        if !detail.is_empty() {
            message.push_str(": ");
            message.push_str(&detail);
        }
        let (id, severity) = (rule.id, rule.severity);
        self.kept.push(Finding { id, severity, message, spot, path: None });
    }

    /// Adds the finding an error amounts to; errors that say nothing about the pool are passed on.
    ///
    /// # Errors
    /// [`Error::Memory`] and the like.
    pub fn add_error(&mut self, rule: &'static Rule, spot: Spot, error: Error) -> Result<()> {
        if !error.is_damage() {
            return Err(error);
        }
        self.add(rule, spot, alloc::format!("{error}"));
        Ok(())
    }

    /// Findings that are kept, to add paths to.
    pub fn kept_mut(&mut self) -> &mut [Finding] {
        &mut self.kept
    }

    /// What was found, and how many findings of each rule there were.
    pub fn finish(self) -> (Vec<Finding>, Vec<(&'static str, u64)>) {
        (self.kept, self.counts.into_iter().collect())
    }
}
