//! What a check can find: rules with permanent ids, and the list of what was found.

use crate::error::Error;
use crate::platform::Result;
use crate::units::{Logical, Physical, TreeId};
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
    /// What that means for whoever runs the pool, and what to do.
    pub advice: &'static str,
}

macro_rules! rules {
    ($( $name:ident $id:literal $severity:ident $text:literal $advice:ident; )*) => {
        $(
            #[doc = $text]
            pub const $name: Rule = Rule {
                id: $id,
                severity: Severity::$severity,
                text: $text,
                advice: advice::$advice,
            };
        )*

        /// All rules, for the manual.
        pub const TABLE: &[&Rule] = &[$( &$name ),*];
    };
}

/// What findings ask of whoever runs the pool. A pool that cairn wrote and whose devices keep what
/// they are given has none of them.
mod advice {
    pub const MOUNT: &str =
        "Nothing is lost: the other copy serves. Mounting the pool for writing \
        writes the damaged one anew. If it comes back, the device is failing: copy the files to a \
        pool on another one.";
    pub const DEVICE: &str =
        "Nothing is lost, but less may fail now. Connect the device that is missing; \
         what one that was away lacks is written to it while the pool is mounted.";
    pub const COUNTS: &str =
        "Files are not affected; what df and quotas say may be wrong. Copy the \
        files to a new pool when it suits you.";
    pub const COPY: &str =
        "Nothing is lost: the good copy is served. A read that meets the damaged \
        copy on a pool mounted for writing writes the good one over it; cairn scrub finds and \
        repairs all there are. If more such findings follow, the device is failing: copy the \
        files to a pool on another one.";
    pub const BLOCK: &str =
        "What the block holds cannot be reached. Mount the pool read-only, copy \
        what can be read to a new pool, and restore the rest from a backup.";
    pub const DATA: &str = "Reading the named bytes gives EIO; everything else is intact. Restore \
        the file from a backup, or delete it, and see whether the device is failing. Nothing in a \
        snapshot can be mended: what is damaged there stays until the snapshot is deleted.";
    pub const MOVE: &str = "Do not write to the pool: new data could take the place of old. Mount \
        it read-only, copy the files to a new pool, and compare them with a backup.";
    pub const LEAK: &str =
        "Nothing is lost but room: those sectors are never handed out. Copy the \
        files to a new pool if the room is missed.";
    pub const FILE: &str = "The named file or directory may be missing in part. Copy what can be \
        read of it, or restore it from a backup; do the same for the pool when it suits you.";
    pub const NAMES: &str =
        "Content is not affected; names may be missing, stray or impossible to \
        remove. Mount the pool read-only and copy the files to a new pool.";
    pub const LOG: &str =
        "What was synced in the last seconds before a crash may be missing. Make \
        a backup, mount the pool and look at the files that were being written.";
    pub const OVERWRITTEN: &str = "Nothing is wrong with the pool as it is now. Only a check of \
        an older group (fsck.cairn --txg) finds this: the named bytes of that group cannot be had \
        any more, and reading them gives EIO where it is mounted. cairn history shows which groups \
        are whole.";
    pub const INCOMPLETE: &str =
        "There may be more damage than is listed. See to the findings that \
        name blocks first.";
}

/// The rules.
pub mod rules {
    use super::{advice, Rule, Severity};

    rules! {
        // Labels and superblocks.
        LABEL "W-LABEL" Warning
            "one of a device's two labels is missing, damaged or out of date" MOUNT;
        SUPERBLOCK_COPY "W-SUPERBLOCK-COPY" Warning
            "one copy of the newest superblock is missing, damaged or out of date" MOUNT;
        SUPERBLOCK_USAGE "W-SUPERBLOCK-USAGE" Warning
            "the superblock counts other space than is in use" COUNTS;
        DEVICE_MISSING "W-DEVICE-MISSING" Warning "a device of the pool is missing" DEVICE;
        DEVICE_BEHIND "W-DEVICE-BEHIND" Warning
            "a device has missed writes and holds fewer copies than it should" DEVICE;
        // Blocks.
        BLOCK "E-BLOCK" Loss "a metadata block cannot be had from any copy" BLOCK;
        BLOCK_COPY "W-BLOCK-COPY" Warning
            "one copy of a metadata block is damaged; another is good" COPY;
        NODE_PLACE "E-NODE-PLACE" Error "a metadata block is in a chunk of another kind" MOVE;
        ITEM_KIND "E-ITEM-KIND" Error "an item is of a kind that its tree does not have" FILE;
        ITEM "E-ITEM" Error "an item breaks a rule of the format" FILE;
        // Chunks and devices.
        CHUNK_OVERLAP "E-CHUNK-OVERLAP" Loss "a chunk cannot be where it says it is" MOVE;
        CHUNK_NEXT "E-CHUNK-NEXT" Error "the next chunk's address is not beyond all chunks" MOVE;
        CHUNK_SYSTEM "E-CHUNK-SYSTEM" Error
            "the superblock and the chunk tree differ in a system chunk" MOVE;
        DEVICE_ITEM "E-DEVICE-ITEM" Error
            "a device's item contradicts its label or is missing" MOVE;
        DEVICE_ALLOCATED "E-DEVICE-ALLOCATED" Error
            "a device's item counts other bytes than its chunks take" MOVE;
        // Space.
        SPACE_SHARED "E-SPACE-SHARED" Loss "a sector is used twice by what cannot be shared" MOVE;
        SPACE_UNMAPPED "E-SPACE-UNMAPPED" Loss
            "something is stored in no chunk, or across two" MOVE;
        SPACE_IN_USE "E-SPACE-IN-USE" Loss "sectors in use are recorded as free" MOVE;
        SPACE_LEAK "W-SPACE-LEAK" Warning "sectors are recorded as used by nothing" LEAK;
        SPACE_ITEM "E-SPACE-ITEM" Error
            "an item of the space tree belongs to no region or chunk" MOVE;
        SPACE_SUMMARY "E-SPACE-SUMMARY" Error
            "a chunk's summary differs from its bitmaps, or is missing" MOVE;
        SPACE_RESIDUE "E-SPACE-RESIDUE" Error "the residue contradicts the space tree" MOVE;
        // References.
        REF_COUNT "E-REF-COUNT" Loss "extents have more or fewer references than are counted" MOVE;
        REF_OVERLAP "E-REF-OVERLAP" Error "items of the reference tree overlap" MOVE;
        // Pool tree.
        SUBVOL_ID "E-SUBVOL-ID" Error "a subvolume's id is out of range" MOVE;
        SUBVOL_DEFAULT "E-SUBVOL-DEFAULT" Error "the default subvolume does not exist" FILE;
        SUBVOL_SUMS "E-SUBVOL-SUMS" Error "a subvolume's counts differ from what it holds" COUNTS;
        SUBVOL_NEXT_INO "E-SUBVOL-NEXT-INO" Error
            "an inode's number is not below the next one to hand out" MOVE;
        DEAD_LIST "E-DEAD-LIST" Loss
            "a dead list is not what a version dropped and its parent has" MOVE;
        VERSION_PARENT "E-VERSION-PARENT" Loss
            "a subvolume or snapshot goes on from one that is missing or another" MOVE;
        VERSION "E-VERSION" Error
            "a subvolume, snapshot or bookmark has a bad name, owner or group" MOVE;
        // Inodes.
        INODE_MISSING "E-INODE-MISSING" Loss "items belong to an inode that does not exist" FILE;
        INODE_FIELD "E-INODE-FIELD" Error "a field of an inode contradicts its type" FILE;
        ROOT_MISSING "E-ROOT-MISSING" Loss "a subvolume has no root directory" FILE;
        LINK_COUNT "E-LINK-COUNT" Error "an inode's link count differs from its names" NAMES;
        LINK_ITEMS "E-LINK-ITEMS" Error
            "an inode counts other further names than it has items for" NAMES;
        LINK_KEY "E-LINK-KEY" Error
            "a link item stands at another key than its content asks for" NAMES;
        ORPHAN_LISTED "E-ORPHAN-LISTED" Error
            "an inode is listed as nameless and is not, or does not exist" NAMES;
        ORPHAN_UNLISTED "E-ORPHAN-UNLISTED" Error
            "an inode without names is not listed as such" NAMES;
        // Names.
        NAME_NO_INODE "E-NAME-NO-INODE" Loss "a name stands for an inode that does not exist" NAMES;
        NAME_TYPE "E-NAME-TYPE" Error "a name says another file type than its inode" NAMES;
        NAME_BACKLINK "E-NAME-BACKLINK" Error "a name that its inode does not know" NAMES;
        BACKLINK_NAME "E-BACKLINK-NAME" Error "an inode knows a name that does not exist" NAMES;
        NAME_HASH "E-NAME-HASH" Loss
            "a name has no hash item, or a wrong one: it cannot be looked up" NAMES;
        HASH_NAME "E-HASH-NAME" Error "a hash item names an entry that does not exist" NAMES;
        NAME_TWICE "E-NAME-TWICE" Error "a directory has one name twice" NAMES;
        NAME_COOKIE "E-NAME-COOKIE" Error "an entry's cookie is out of range" NAMES;
        DIR_COUNT "E-DIR-COUNT" Error "a directory's counts differ from its entries" NAMES;
        DIR_LOOP "E-DIR-LOOP" Loss "a directory cannot be reached from the root" NAMES;
        // Content.
        EXTENT_OVERLAP "E-EXTENT-OVERLAP" Loss "extents of a file overlap" FILE;
        EXTENT_SIZE "E-EXTENT-SIZE" Error "an extent lies beyond the end of its file" FILE;
        EXTENT_INLINE "E-EXTENT-INLINE" Loss
            "inline data is longer than its file, or not all its data, or does not expand" FILE;
        EXTENT_SUMS "E-EXTENT-SUMS" Error "an inode's byte counts differ from its extents" COUNTS;
        BLOB_WINDOW "E-BLOB-WINDOW" Error "a blob is described in two ways" MOVE;
        DATA "E-DATA" Loss "data of a file cannot be had from any copy" DATA;
        DATA_COPY "W-DATA-COPY" Warning
            "one copy of a file's data is damaged; another is good" COPY;
        OVERWRITTEN "W-OVERWRITTEN" Warning
            "something that an older group had was given up since and is overwritten" OVERWRITTEN;
        SYMLINK "E-SYMLINK" Loss "a symlink has no target, or one of another length" FILE;
        XATTR_HASH "E-XATTR-HASH" Loss "an attribute stands at another hash than its name's" FILE;
        XATTR_HINT "E-XATTR-HINT" Loss
            "an inode says it lacks attributes that it has, or has ones it lacks" FILE;
        XATTR_PARTS "E-XATTR-PARTS" Loss
            "parts of an attribute's value are missing, stray or of a wrong length" FILE;
        // The log.
        LOG "E-LOG" Error "the intent log cannot be where the superblock says" LOG;
        // The check itself.
        INCOMPLETE "W-INCOMPLETE" Warning
            "not everything could be compared, because blocks are damaged" INCOMPLETE;
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
    /// The one copy it is about: index of the device, and the byte on it.
    pub copy: Option<(u16, Physical)>,
}

impl Spot {
    /// Nowhere in particular.
    pub const NONE: Spot = Spot { tree: None, object: None, addr: None, copy: None };

    /// An object of a tree.
    pub fn object(tree: TreeId, object: u64) -> Spot {
        Spot { tree: Some(tree), object: Some(object), ..Spot::NONE }
    }

    /// A logical address.
    pub fn addr(addr: Logical) -> Spot {
        Spot { addr: Some(addr), ..Spot::NONE }
    }

    /// A block of a tree.
    pub fn block(tree: TreeId, addr: Logical) -> Spot {
        Spot { tree: Some(tree), addr: Some(addr), ..Spot::NONE }
    }

    /// The same with an address.
    pub fn at(self, addr: Logical) -> Spot {
        Spot { addr: Some(addr), ..self }
    }

    /// The same, of one copy only.
    pub fn copy(self, device: u16, at: Physical) -> Spot {
        Spot { copy: Some((device, at)), ..self }
    }
}

/// A place on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the device in the pool.
    pub device: u16,
    /// The device's name.
    pub name: String,
    /// The byte.
    pub at: Physical,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} ({}) byte {}", self.device, self.name, self.at)
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
    /// The file with its subvolume or snapshot, `home/a` or `home@monday: a`, if it is about one.
    pub path: Option<Vec<u8>>,
    /// Where that is on the devices: the damaged copy if it is about one, and else every copy.
    pub places: Vec<Place>,
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
        for (index, place) in self.places.iter().enumerate() {
            write!(f, "{}{place}", if index == 0 { "; on " } else { " and " })?;
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
        let places = Vec::new();
        self.kept.push(Finding { id, severity, message, spot, path: None, places });
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

    /// Findings that are kept, to add paths and places to.
    pub fn kept_mut(&mut self) -> &mut [Finding] {
        &mut self.kept
    }

    /// What was found, and how many findings of each rule there were.
    pub fn finish(self) -> (Vec<Finding>, Vec<(&'static str, u64)>) {
        (self.kept, self.counts.into_iter().collect())
    }
}
