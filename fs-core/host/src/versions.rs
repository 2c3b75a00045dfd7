//! Subvolumes, snapshots and bookmarks by name: what commands ask for, and how an engine answers,
//! be it the daemon's or one that a command has opened.
//!
//! A name is `SUBVOLUME`, `SUBVOLUME@SNAPSHOT` or `SUBVOLUME#BOOKMARK`; the root subvolume's is
//! empty. Names are relative to the subvolume that is mounted: at a mount of `home`, `alice@monday`
//! is `home/alice@monday`.

use crate::properties::{self, PropertyInfo};
use fs_core::engine::versions::VersionOp;
use fs_core::engine::Engine;
use fs_core::error::{Errno, Error};
use fs_core::format::pool::ROOT_INO;
use fs_core::receive::{Destination, WORKING_NAME};
use fs_core::stream::changes::What;
use fs_core::stream::{Changes, Content, Source};
use fs_core::subvol::versions::{Versions, CONTROL_NAME};
use fs_core::subvol::View;
use fs_core::units::{Ino, TreeId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Versions in one message: each may have 16 holds and names of 255 bytes, but then few do.
const PAGE: usize = 100;

/// What a name stands for, in words of the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionName {
    /// The subvolume; empty for the one that is mounted.
    pub subvolume: String,
    /// A snapshot of it.
    pub snapshot: Option<String>,
    /// A bookmark of it.
    pub bookmark: Option<String>,
}

impl VersionName {
    /// Reads `SUBVOLUME[@SNAPSHOT|#BOOKMARK]`. Slashes at both ends do not matter.
    pub fn parse(text: &str) -> VersionName {
        let (rest, snapshot) = match text.split_once('@') {
            Some((rest, snapshot)) => (rest, Some(snapshot.to_string())),
            None => (text, None),
        };
        let (rest, bookmark) = match rest.split_once('#') {
            Some((rest, bookmark)) if snapshot.is_none() => (rest, Some(bookmark.to_string())),
            _ => (rest, None),
        };
        VersionName { subvolume: rest.trim_matches('/').to_string(), snapshot, bookmark }
    }
}

impl std::fmt::Display for VersionName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.subvolume.as_str(), &self.snapshot, &self.bookmark) {
            ("", None, None) => f.write_str("/"),
            (subvolume, Some(snapshot), _) => write!(f, "{subvolume}@{snapshot}"),
            (subvolume, None, Some(bookmark)) => write!(f, "{subvolume}#{bookmark}"),
            (subvolume, None, None) => f.write_str(subvolume),
        }
    }
}

/// A change that a command asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Make an empty subvolume.
    Create {
        /// Its name.
        name: VersionName,
        /// Permission bits of its root directory.
        mode: u32,
        /// Owner of its root directory.
        uid: u32,
        /// Group of its root directory.
        gid: u32,
    },
    /// Make a snapshot of that name.
    Snapshot {
        /// With the name of the snapshot.
        name: VersionName,
        /// Of each subvolume below it, too.
        recursive: bool,
    },
    /// Make a subvolume that begins as a snapshot.
    Clone {
        /// The snapshot.
        snapshot: VersionName,
        /// Name of the subvolume.
        name: VersionName,
    },
    /// Make a subvolume what a snapshot of it is.
    Rollback {
        /// The snapshot.
        snapshot: VersionName,
        /// Name of the snapshot that keeps what the subvolume was.
        keep: String,
    },
    /// Give another name.
    Rename {
        /// A subvolume or snapshot.
        name: VersionName,
        /// Its new name; of a snapshot, the part behind `@`.
        new: String,
    },
    /// Delete a subvolume, snapshot or bookmark.
    Delete {
        /// Which.
        name: VersionName,
        /// With all snapshots of a subvolume and everything below it; of a snapshot, with those of
        /// the same name of subvolumes below.
        recursive: bool,
    },
    /// Keep a snapshot from being deleted.
    Hold {
        /// The snapshot.
        name: VersionName,
        /// Tells holds apart.
        tag: String,
    },
    /// Take a hold back.
    Release {
        /// The snapshot.
        name: VersionName,
        /// Which hold.
        tag: String,
    },
    /// Keep of a snapshot what is needed to send what came after it.
    Bookmark {
        /// The snapshot.
        name: VersionName,
        /// Name of the bookmark.
        bookmark: String,
    },
    /// Mount a subvolume unless another is asked for.
    SetDefault {
        /// The subvolume.
        name: VersionName,
    },
    /// Set properties of a subvolume or snapshot.
    Set {
        /// Which.
        name: VersionName,
        /// Names and values; without a value it chooses nothing itself any more.
        properties: Vec<(String, Option<String>)>,
    },
    /// Limit how much a subvolume may have; what is not given stays as it is.
    Limit {
        /// The subvolume.
        name: VersionName,
        /// Bytes that it may refer to; zero for any number.
        referenced: Option<u64>,
        /// Bytes that it may have beyond those of its newest snapshot; zero for any number.
        own: Option<u64>,
    },
}

/// What a subvolume or snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Its number.
    pub number: u64,
    /// Its whole name, from the root subvolume.
    pub name: VersionName,
    /// Its identity, as `blkid` writes ids.
    pub id: String,
    /// When it was made, seconds since 1970; zero when that is not known.
    pub created: i64,
    /// Group as of which a snapshot or bookmark shows its subvolume.
    pub txg: u64,
    /// The snapshot it goes on from, unless that was deleted.
    pub parent: Option<VersionName>,
    /// Bytes that it refers to on the devices, one copy counted; `None` for a bookmark and while
    /// the pool does not count.
    pub referenced: Option<u64>,
    /// Bytes that would come free if it alone were deleted.
    pub unique: Option<u64>,
    /// Bytes of its data before compression.
    pub logical: Option<u64>,
    /// Bytes that a subvolume may refer to, if there is a limit.
    pub limit_referenced: Option<u64>,
    /// Bytes that it may have beyond those of its newest snapshot, if there is a limit.
    pub limit_own: Option<u64>,
    /// Number of its files and directories.
    pub inodes: u64,
    /// Whether it is mounted unless another is asked for.
    pub is_default: bool,
    /// Whether it is being received, or a part of it was: nobody can look into it.
    pub is_receiving: bool,
    /// Where a sender can go on with what was received in part.
    pub token: Option<String>,
    /// Tags that keep it from being deleted.
    pub holds: Vec<String>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A name relative to a subvolume, from the root.
fn full(base: &str, name: &str) -> String {
    match (base, name) {
        ("", name) => name.to_string(),
        (base, "") => base.to_string(),
        (base, name) => format!("{base}/{name}"),
    }
}

pub(crate) fn said(error: &Error, what: &impl std::fmt::Display) -> String {
    match error {
        Error::Posix(Errno::NoEnt) => format!("{what} does not exist"),
        Error::Posix(Errno::Exist) => format!("{what}: that name is taken"),
        Error::Posix(Errno::Busy) => {
            format!("{what} is in use, or something is in it")
        }
        Error::Posix(Errno::NameTooLong) => format!("{what}: the name is longer than 255 bytes"),
        Error::ReadOnly => "the pool is mounted read-only".to_string(),
        error => format!("{what}: {error}"),
    }
}

/// Names as they are understood at a mount.
struct Names<'a> {
    versions: &'a Versions,
    /// Name of the subvolume that is mounted.
    base: &'a str,
    /// The subvolume that is mounted unless another is asked for.
    default: u64,
}

impl Names<'_> {
    fn subvolume(&self, name: &VersionName) -> Result<u64, String> {
        let full = full(self.base, &name.subvolume);
        let id = self.versions.subvolume(full.as_bytes());
        id.ok_or_else(|| match full.as_str() {
            "" => "the pool has no root subvolume".to_string(),
            full => format!("there is no subvolume {full}"),
        })
    }

    fn snapshot(&self, name: &VersionName) -> Result<u64, String> {
        let snapshot = name.snapshot.as_ref();
        let snapshot = snapshot.ok_or_else(|| format!("{name} is not the name of a snapshot"))?;
        let id = self.versions.snapshot(self.subvolume(name)?, snapshot.as_bytes());
        id.ok_or_else(|| format!("there is no snapshot {name}"))
    }

    fn version(&self, name: &VersionName) -> Result<u64, String> {
        match (&name.snapshot, &name.bookmark) {
            (Some(_), _) => self.snapshot(name),
            (None, None) => self.subvolume(name),
            (None, Some(_)) => Err(format!("{name} is a bookmark, which has no properties")),
        }
    }

    fn new_subvolume(&self, name: &VersionName) -> Result<Vec<u8>, String> {
        if name.snapshot.is_some() || name.bookmark.is_some() || name.subvolume.is_empty() {
            return Err(format!("{name} is not a name for a subvolume"));
        }
        let full = full(self.base, &name.subvolume);
        if let Some((above, _)) = full.rsplit_once('/') {
            if self.versions.subvolume(above.as_bytes()).is_none() {
                return Err(format!("there is no subvolume {above} for {full} to be in"));
            }
        }
        Ok(full.into_bytes())
    }

    /// A subvolume and those below it.
    fn with_nested(&self, id: u64) -> Vec<u64> {
        let mut ids = self.versions.nested(id);
        ids.push(id);
        ids
    }

    fn ops(&self, change: &Change) -> Result<Vec<VersionOp>, String> {
        Ok(match change {
            Change::Create { name, mode, uid, gid } => {
                let name = self.new_subvolume(name)?;
                vec![VersionOp::CreateSubvolume { name, mode: *mode, uid: *uid, gid: *gid }]
            }
            Change::Snapshot { name, recursive } => {
                let snapshot = name.snapshot.as_ref();
                let snapshot =
                    snapshot.ok_or_else(|| format!("{name}: a snapshot is SUBVOLUME@NAME"))?;
                let id = self.subvolume(name)?;
                let mut ids = if *recursive { self.with_nested(id) } else { vec![id] };
                ids.retain(|other| other == &id || !self.versions.is_receiving(*other));
                let of = |subvolume| VersionOp::Snapshot {
                    subvolume,
                    name: snapshot.clone().into_bytes(),
                };
                ids.into_iter().map(of).collect()
            }
            Change::Clone { snapshot, name } => {
                let name = self.new_subvolume(name)?;
                vec![VersionOp::Clone { snapshot: self.snapshot(snapshot)?, name }]
            }
            Change::Rollback { snapshot, keep } => {
                let id = self.snapshot(snapshot)?;
                if self.versions.snapshot(self.subvolume(snapshot)?, keep.as_bytes()).is_some() {
                    return Err(format!("{}@{keep}: that name is taken", snapshot.subvolume));
                }
                let keep = keep.clone().into_bytes();
                vec![VersionOp::Rollback { snapshot: id, keep }]
            }
            Change::Rename { name, new } if name.snapshot.is_some() => {
                let new = match new.split_once('@') {
                    None => new,
                    Some(("", new)) => new,
                    Some((of, new)) if VersionName::parse(of).subvolume == name.subvolume => new,
                    Some((of, _)) => {
                        return Err(format!(
                            "{name} stays a snapshot of its subvolume, not of {of}"
                        ))
                    }
                };
                let new = new.as_bytes().to_vec();
                vec![VersionOp::Rename { id: self.snapshot(name)?, name: new }]
            }
            Change::Rename { name, new } => {
                let new = self.new_subvolume(&VersionName::parse(new))?;
                vec![VersionOp::Rename { id: self.subvolume(name)?, name: new }]
            }
            Change::Delete { name, recursive } => self.deletions(name, *recursive)?,
            Change::Hold { name, tag } => {
                let tag = tag.clone().into_bytes();
                vec![VersionOp::Hold { snapshot: self.snapshot(name)?, tag }]
            }
            Change::Release { name, tag } => {
                let tag = tag.clone().into_bytes();
                vec![VersionOp::Release { snapshot: self.snapshot(name)?, tag }]
            }
            Change::Bookmark { name, bookmark } => {
                let bookmark = bookmark.rsplit('#').next().unwrap_or(bookmark);
                let bookmark = bookmark.as_bytes().to_vec();
                vec![VersionOp::Bookmark { snapshot: self.snapshot(name)?, name: bookmark }]
            }
            Change::SetDefault { name } => {
                vec![VersionOp::SetDefault { subvolume: self.subvolume(name)? }]
            }
            Change::Set { name, properties } => {
                properties::plan(self.versions, self.version(name)?, properties)?
            }
            Change::Limit { name, referenced, own } => {
                let subvolume = self.subvolume(name)?;
                let now = self.versions.get(subvolume).map(|version| &version.item);
                let (old_referenced, old_own) =
                    now.map_or((0, 0), |item| (item.limit_referenced, item.limit_own));
                vec![VersionOp::SetLimits {
                    subvolume,
                    referenced: referenced.unwrap_or(old_referenced),
                    own: own.unwrap_or(old_own),
                }]
            }
        })
    }

    fn deletions(&self, name: &VersionName, recursive: bool) -> Result<Vec<VersionOp>, String> {
        let subvolume = self.subvolume(name)?;
        if let Some(bookmark) = &name.bookmark {
            let id = self.versions.bookmark_named(subvolume, bookmark.as_bytes());
            let id = id.ok_or_else(|| format!("there is no bookmark {name}"))?;
            return Ok(vec![VersionOp::DeleteBookmark { id }]);
        }
        let delete = |id| VersionOp::Delete { id };
        let check_held = |id: u64| match self.versions.get(id).filter(|v| !v.holds.is_empty()) {
            Some(version) => {
                let tags: Vec<String> = version.holds.iter().map(|tag| text(tag)).collect();
                let of = name_of(self.versions, id).unwrap_or_default();
                let tags = tags.join(", ");
                Err(format!("{of} is held by {tags}: release it first (cairn snapshot release)"))
            }
            None => Ok(()),
        };
        let Some(snapshot) = &name.snapshot else {
            if subvolume == TreeId::FIRST_SUBVOL.0 {
                return Err("the root subvolume cannot be deleted".into());
            }
            if !recursive {
                if !self.versions.snapshots(subvolume).is_empty() {
                    return Err(format!("{name} has snapshots: delete them first, or use -r"));
                }
                if !self.versions.nested(subvolume).is_empty() {
                    return Err(format!("{name} has subvolumes in it: delete them, or use -r"));
                }
                self.check_not_default(&[subvolume])?;
                return Ok(vec![delete(subvolume)]);
            }
            // What is below first, and of each its snapshots first.
            let mut ids = self.with_nested(subvolume);
            let depth = |id: &u64| self.versions.get(*id).map_or(0, |version| version.name.len());
            ids.sort_unstable_by_key(|id| std::cmp::Reverse(depth(id)));
            self.check_not_default(&ids)?;
            let all = ids.into_iter().flat_map(|id| {
                let snapshots = self.versions.snapshots(id);
                snapshots.into_iter().chain([id])
            });
            let all: Vec<u64> = all.collect();
            all.iter().try_for_each(|id| check_held(*id))?;
            return Ok(all.into_iter().map(delete).collect());
        };
        let mut found = Vec::new();
        if recursive {
            let ids = self.with_nested(subvolume);
            let of = |id: &u64| self.versions.snapshot(*id, snapshot.as_bytes());
            found.extend(ids.iter().filter_map(of));
        } else {
            found.push(self.snapshot(name)?);
        }
        found.iter().try_for_each(|id| check_held(*id))?;
        match found.is_empty() {
            true => Err(format!("there is no snapshot {name}")),
            false => Ok(found.into_iter().map(delete).collect()),
        }
    }

    fn check_not_default(&self, ids: &[u64]) -> Result<(), String> {
        match ids.contains(&self.default) {
            true => Err(format!(
                "{} is mounted by default: choose another first (cairn subvolume set-default)",
                name_of(self.versions, self.default).unwrap_or_default()
            )),
            false => Ok(()),
        }
    }
}

/// The snapshot of a name. Names are as for [`plan`].
///
/// # Errors
/// One sentence.
pub(crate) fn snapshot(engine: &Engine, base: u64, name: &VersionName) -> Result<u64, String> {
    let base = name_at(engine, base);
    engine.with_versions(|versions| Names { versions, base: &base, default: 0 }.snapshot(name))
}

/// The subvolume of a name, if there is one that anybody may look into.
pub(crate) fn subvolume(engine: &Engine, base: u64, name: &VersionName) -> Option<u64> {
    let at = name_at(engine, base);
    engine.with_versions(|versions| {
        let there = versions.subvolume(full(&at, &name.subvolume).as_bytes());
        there.filter(|id| !versions.is_receiving(*id))
    })
}

/// Where a snapshot is to be received that goes on from another, or from nothing; `origin` is the
/// subvolume that has the other if a subvolume may be made from that.
///
/// # Errors
/// One sentence.
pub(crate) fn destination(
    engine: &Engine,
    base: u64,
    name: &VersionName,
    has_base: bool,
    origin: Option<u64>,
) -> Result<Destination, String> {
    let at = name_at(engine, base);
    let found = engine.with_versions(|versions| {
        let names = Names { versions, base: &at, default: 0 };
        let there = versions.subvolume(full(&at, &name.subvolume).as_bytes());
        if name.snapshot.is_some() || name.bookmark.is_some() {
            return Err(format!("{name}: the stream says the name of the snapshot"));
        }
        match there.filter(|id| !versions.is_receiving(*id)) {
            Some(id) if has_base => Ok(Destination::Existing(id)),
            Some(_) => Err(format!(
                "{name} exists, and a full stream makes a subvolume: give another name"
            )),
            None if has_base && origin.is_some() => {
                let of = origin.unwrap_or_default();
                names.new_subvolume(name).map(|name| Destination::Clone { name, of })
            }
            None if has_base => Err(format!(
                "there is no subvolume {name}, and the stream goes on from a snapshot of one"
            )),
            None => names.new_subvolume(name).map(Destination::New),
        }
    })?;
    if let Destination::New(name) | Destination::Clone { name, .. } = &found {
        check_free(engine, name)?;
    }
    Ok(found)
}

/// What a change comes to at a mount of the subvolume with number `base`.
///
/// # Errors
/// One sentence.
pub fn plan(engine: &Engine, base: u64, change: &Change) -> Result<Vec<VersionOp>, String> {
    let default = engine.default_subvol().map_or(0, |subvol| subvol.id.0);
    let base = name_at(engine, base);
    let ops =
        engine.with_versions(|versions| Names { versions, base: &base, default }.ops(change))?;
    for op in &ops {
        check_place(engine, op)?;
    }
    Ok(ops)
}

/// The name that names begin at where a subvolume, or a snapshot of it, is mounted.
pub fn name_at(engine: &Engine, base: u64) -> String {
    engine.with_versions(|versions| {
        let version = versions.get(base);
        let owner = version.filter(|version| version.item.is_snapshot());
        let version = owner.map_or(version, |version| versions.get(version.item.owner));
        version.map_or(String::new(), |version| text(&version.name))
    })
}

/// A subvolume appears in the root directory of the one that it is in, where nothing else has its
/// name.
fn check_place(engine: &Engine, op: &VersionOp) -> Result<(), String> {
    let name = match op {
        VersionOp::CreateSubvolume { name, .. } | VersionOp::Clone { name, .. } => name,
        VersionOp::Rename { id, name } => {
            let is_snapshot = |all: &Versions| all.get(*id).is_some_and(|v| v.item.is_snapshot());
            if engine.with_versions(is_snapshot) {
                return Ok(());
            }
            name
        }
        _ => return Ok(()),
    };
    check_free(engine, name)
}

/// That the name of a subvolume is not that of something else.
fn check_free(engine: &Engine, name: &[u8]) -> Result<(), String> {
    let cut = name.iter().rposition(|byte| *byte == b'/');
    let (above, last) = cut.map_or((&[][..], name), |at| (&name[..at], &name[at + 1..]));
    let shown = text(name);
    if last == WORKING_NAME {
        return Err(format!("{shown}: that name is for what is being received"));
    }
    if last == CONTROL_NAME {
        return Err(format!("{shown}: snapshots are seen under that name"));
    }
    let above = engine.with_versions(|versions| versions.subvolume(above));
    let Some(above) = above.and_then(|id| engine.subvol(TreeId(id))) else { return Ok(()) };
    match above.find_name(Ino(ROOT_INO), last) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(format!("{shown}: a file or directory has that name")),
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

/// Carries a change out that was planned: all of it, or nothing. Returns when it is durable.
///
/// # Errors
/// One sentence.
pub fn carry_out(engine: &Engine, ops: Vec<VersionOp>, change: &Change) -> Result<(), String> {
    let done = engine.change_versions(ops);
    done.map(drop).map_err(|error| sentence(&error, change))
}

/// The subvolumes that end as they are: they are deleted or rolled back, so nobody may use them.
pub fn ends(engine: &Engine, ops: &[VersionOp]) -> Vec<u64> {
    let ends = |op: &VersionOp| match op {
        VersionOp::Delete { id } => engine.subvol(TreeId(*id)).map(|_| *id),
        VersionOp::Rollback { snapshot, .. } | VersionOp::Follow { snapshot, .. } => {
            engine.with_versions(|all| all.get(*snapshot).map(|version| version.item.owner))
        }
        _ => None,
    };
    ops.iter().filter_map(ends).collect()
}

/// The versions that are there and of which something users see changes.
pub fn touched(engine: &Engine, ops: &[VersionOp]) -> Vec<u64> {
    let named = ops.iter().filter_map(|op| match op {
        VersionOp::Delete { id } | VersionOp::Rename { id, .. } => Some(*id),
        // It appears now.
        VersionOp::Publish(arrival) if arrival.into == arrival.working => Some(arrival.into),
        _ => None,
    });
    named.chain(ends(engine, ops)).collect()
}

/// Which of some versions are not there any more.
pub fn gone(engine: &Engine, ids: &[u64]) -> Vec<u64> {
    engine.with_versions(|all| {
        let is_gone = |id: &u64| all.get(*id).is_none_or(|version| version.item.is_deleted());
        ids.iter().copied().filter(is_gone).collect()
    })
}

/// Why a change was not carried out, as a sentence.
pub fn sentence(error: &Error, change: &Change) -> String {
    said(error, &subject(change))
}

/// What a change is about.
fn subject(change: &Change) -> String {
    match change {
        Change::Create { name, .. } | Change::Clone { name, .. } => name.to_string(),
        Change::Snapshot { name, .. } | Change::Delete { name, .. } => name.to_string(),
        Change::Rollback { snapshot, .. } => {
            VersionName { snapshot: None, ..snapshot.clone() }.to_string()
        }
        Change::Rename { new, .. } => new.clone(),
        Change::Hold { tag, .. } | Change::Release { tag, .. } => format!("hold {tag}"),
        Change::Bookmark { bookmark, .. } => bookmark.clone(),
        Change::SetDefault { name } | Change::Limit { name, .. } | Change::Set { name, .. } => {
            name.to_string()
        }
    }
}

/// What happened to a file between two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Happened {
    /// The name came.
    Created,
    /// The name went.
    Removed,
    /// The name was another.
    Renamed,
    /// Data was written, or the size changed.
    Modified,
    /// Mode, owner, times or extended attributes differ.
    Attributes,
}

/// Something that changed between two states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differing {
    /// What happened.
    pub what: Happened,
    /// The path, from the root of the subvolume on; the new one, unless it was removed.
    pub path: String,
    /// The path before it was renamed.
    pub from: Option<String>,
    /// Number of the inode.
    pub inode: u64,
    /// Bytes of a file that may differ.
    pub bytes: Option<u64>,
}

/// Part of what changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Differences {
    /// What changed of some inodes.
    pub all: Vec<Differing>,
    /// The inode to go on with; `None` at the end.
    pub next: Option<u64>,
}

/// Bytes of paths after which a part of the differences ends.
const DIFFERENCES_BYTES: usize = 1 << 18;
/// Bytes of paths of one inode at most: its names must fit into one message.
const DIFFERENCES_BYTES_MAX: usize = 3 << 18;

/// A state to read: as of the newest published group, pinned for as long as it is held.
fn state(engine: &Engine, base: u64, name: &VersionName) -> Result<Arc<View>, String> {
    let base = name_at(engine, base);
    let id = engine.with_versions(|versions| {
        let names = Names { versions, base: &base, default: 0 };
        match name.snapshot {
            Some(_) => names.snapshot(name),
            None => names.subvolume(name),
        }
    })?;
    if name.snapshot.is_none() && !engine.store.is_read_only() {
        engine.commit().map_err(|error| said(&error, name))?;
    }
    let subvol = engine.open_version(id).map_err(|error| said(&error, name))?;
    Ok(subvol.view())
}

/// What changed from one state to another in the inodes from `first` on, as far as it fits into
/// one message. Names are as for [`plan`].
///
/// # Errors
/// One sentence.
pub fn differences(
    engine: &Engine,
    base: u64,
    (old, new): (&VersionName, &VersionName),
    first: u64,
) -> Result<Differences, String> {
    let views = (state(engine, base, old)?, state(engine, base, new)?);
    if views.0.tree.id != views.1.tree.id {
        return Err(format!("{old} and {new} do not go back to one subvolume"));
    }
    let mut changes = Changes::from(&views.0.tree, &views.1.tree, Ino(first));
    let mut all: Vec<Differing> = Vec::new();
    let mut bytes = 0;
    while let Some(change) = changes.next(&*engine.store).map_err(|error| said(&error, new))? {
        let is_next = all.last().is_none_or(|last| last.inode != change.ino.0);
        if is_next && bytes >= DIFFERENCES_BYTES {
            return Ok(Differences { all, next: Some(change.ino.0) });
        }
        let differing = differing(change);
        if let (Some(last), Some(more)) = (all.last_mut(), differing.bytes) {
            // Ranges of one file are summed up.
            if let (false, Some(sum)) = (is_next, last.bytes.as_mut()) {
                *sum = sum.saturating_add(more);
                continue;
            }
        }
        bytes += differing.path.len() + differing.from.as_ref().map_or(0, String::len) + 32;
        if bytes > DIFFERENCES_BYTES_MAX {
            return Err(format!("inode {} has too many names to show", differing.inode));
        }
        all.push(differing);
    }
    Ok(Differences { all, next: None })
}

fn differing(change: fs_core::stream::Change) -> Differing {
    let (what, from, bytes) = match change.what {
        What::Created => (Happened::Created, None, None),
        What::Removed => (Happened::Removed, None, None),
        What::Renamed { from } => (Happened::Renamed, Some(text(&from)), None),
        What::Data { start, end } => (Happened::Modified, None, Some(end - start)),
        What::Attributes => (Happened::Attributes, None, None),
    };
    Differing { what, path: text(&change.path), from, inode: change.ino.0, bytes }
}

/// The identity of a state's content. It reads everything that the state holds.
///
/// # Errors
/// One sentence.
pub fn identity(engine: &Engine, base: u64, name: &VersionName) -> Result<String, String> {
    let view = state(engine, base, name)?;
    let content = Content::of(Source::of(&engine.store), &view.tree, &mut |_| Ok(()));
    content.map(|content| content.identity().to_string()).map_err(|error| said(&error, name))
}

/// As many of a list as fit into one message, but for the first `skip`.
pub fn page(all: Vec<VersionInfo>, skip: u64) -> Vec<VersionInfo> {
    let skip = usize::try_from(skip).unwrap_or(usize::MAX);
    all.into_iter().skip(skip).take(PAGE).collect()
}

/// All subvolumes, snapshots and bookmarks: by subvolume, each with its snapshots, the oldest
/// first, and its bookmarks.
pub fn list(engine: &Engine) -> Vec<VersionInfo> {
    let default = engine.default_subvol().map_or(0, |subvol| subvol.id.0);
    let counts = engine.counts_versions();
    let mut all = engine.with_versions(|versions| {
        let live = versions.iter().filter(|(_, version)| !version.item.is_deleted());
        let heads = live.filter(|(_, version)| !version.item.is_snapshot());
        let mut heads: Vec<(Vec<u8>, u64)> = heads.map(|(id, v)| (v.name.clone(), id)).collect();
        heads.sort_unstable();
        let mut all = Vec::new();
        for (_, head) in heads {
            let of = |id: u64| info(versions, id, (default, counts));
            all.extend(of(head));
            all.extend(versions.snapshots(head).into_iter().filter_map(of));
            all.extend(versions.bookmarks_of(head).into_iter().filter_map(|id| {
                let bookmark = versions.bookmark(id)?;
                let name = VersionName {
                    subvolume: text(&versions.get(head)?.name),
                    bookmark: Some(text(&bookmark.name)),
                    snapshot: None,
                };
                Some(VersionInfo {
                    number: id,
                    name,
                    id: crate::parse::format_uuid(&bookmark.item.id),
                    created: bookmark.item.created,
                    txg: bookmark.item.txg,
                    parent: None,
                    referenced: None,
                    unique: None,
                    logical: None,
                    limit_referenced: None,
                    limit_own: None,
                    inodes: 0,
                    is_default: false,
                    is_receiving: false,
                    token: None,
                    holds: Vec::new(),
                })
            }));
        }
        all
    });
    crate::streams::add_tokens(engine, &mut all);
    all
}

pub(crate) fn name_of(versions: &Versions, id: u64) -> Option<VersionName> {
    let version = versions.get(id).filter(|version| !version.item.is_deleted())?;
    let name = text(&version.name);
    Some(match version.item.is_snapshot() {
        false => VersionName { subvolume: name, ..VersionName::default() },
        true => VersionName {
            subvolume: text(&versions.get(version.item.owner)?.name),
            snapshot: Some(name),
            bookmark: None,
        },
    })
}

fn info(versions: &Versions, id: u64, (default, counts): (u64, bool)) -> Option<VersionInfo> {
    let version = versions.get(id)?;
    let item = &version.item;
    let counted = |bytes: u64| counts.then_some(bytes);
    let limit = |bytes: u64| (bytes != 0).then_some(bytes);
    Some(VersionInfo {
        number: id,
        name: name_of(versions, id)?,
        id: crate::parse::format_uuid(&item.id),
        created: item.created,
        txg: item.txg,
        parent: name_of(versions, item.parent),
        referenced: counted(item.referenced_bytes()),
        unique: counted(versions.unique_bytes(id)),
        logical: Some(item.logical_bytes),
        limit_referenced: limit(item.limit_referenced),
        limit_own: limit(item.limit_own),
        inodes: item.inodes,
        is_default: id == default,
        is_receiving: item.is_receiving(),
        token: None,
        holds: version.holds.iter().map(|tag| text(tag)).collect(),
    })
}

/// The properties of a subvolume or snapshot; `None` when there is none of that name. Names are as
/// for [`plan`].
pub fn properties(engine: &Engine, base: u64, name: &VersionName) -> Option<Vec<PropertyInfo>> {
    let base = name_at(engine, base);
    let names = |versions: &Versions| Names { versions, base: &base, default: 0 }.version(name);
    engine.with_versions(names).ok().map(|id| properties::all(engine, id))
}

/// The subvolume or snapshot of a name, to be mounted.
///
/// # Errors
/// One sentence.
pub fn find(engine: &Engine, name: &VersionName) -> Result<u64, String> {
    engine.with_versions(|versions| {
        let names = Names { versions, base: "", default: 0 };
        match name.snapshot {
            Some(_) => names.snapshot(name),
            None => names.subvolume(name),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (given, shown) in [
            ("home", "home"),
            ("/srv/", "srv"),
            ("home/alice@monday", "home/alice@monday"),
            ("@monday", "@monday"),
            ("home#mark", "home#mark"),
            ("", "/"),
        ] {
            assert_eq!(VersionName::parse(given).to_string(), shown, "{given}");
        }
        let name = VersionName::parse("home@a#b");
        assert_eq!((name.snapshot.as_deref(), name.bookmark), (Some("a#b"), None));
    }
}
