//! What an incremental stream goes on from.

use super::{NAME_BYTES_MAX, WORKING_NAME};
use crate::btree::{Difference, Tree, Value};
use crate::engine::versions::VersionOp;
use crate::engine::Engine;
use crate::error::{Errno, Error};
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::platform::{Result, Timestamp};
use crate::stream::content::Progress;
use crate::stream::{record, Content, Identity, Source};
use crate::subvol::versions::Versions;
use crate::subvol::Subvol;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A snapshot and what it holds.
pub struct Base {
    /// The snapshot, which is kept as long as this is held.
    pub snapshot: Arc<Subvol>,
    /// Its content.
    pub content: Content,
}

/// Name of the subvolume in which a snapshot of subvolume `id` is received.
pub fn working_name(engine: &Engine, id: u64) -> Result<Vec<u8>> {
    let name = engine.with_versions(|versions| {
        let version = versions.get(id).filter(|version| !version.item.is_deleted());
        version.map(|version| version.name.clone())
    });
    let mut name = name.ok_or(Error::Posix(Errno::NoEnt))?;
    if !name.is_empty() {
        name.push(b'/');
    }
    name.extend_from_slice(WORKING_NAME);
    match name.len() <= NAME_BYTES_MAX {
        true => Ok(name),
        false => Err(Errno::NameTooLong.into()),
    }
}

/// The content of a snapshot: what is kept of it, or what is found by reading all of it, which is
/// then kept if the pool takes changes.
///
/// # Errors
/// ENOENT; errors of devices and trees; those of `progress`.
pub fn content_of(
    engine: &Engine,
    id: u64,
    progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Content> {
    let kept = engine.kept_content(id)?.and_then(|sum| Content::decode(&sum));
    let identity = engine.with_versions(|versions| versions.get(id).map(|v| v.item.content));
    // What is kept vouches for itself as far as that goes; a snapshot never changes.
    if let Some(content) = kept.filter(|content| Some(content.identity().0) == identity) {
        return Ok(content);
    }
    let snapshot = engine.open_version(id)?;
    let source = Source::of(&engine.store);
    let content = Content::of(source, &snapshot.view().tree, progress)?;
    keep(engine, id, &content);
    Ok(content)
}

/// As [`content_of`], of what goes on from a state whose content is known.
///
/// # Errors
/// As [`content_of`].
pub fn content_after(
    engine: &Engine,
    (old, known): (&Tree, &Content),
    id: u64,
    progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Content> {
    let is_kept = |versions: &Versions| {
        versions.get(id).is_some_and(|version| version.item.content != [0; 32])
    };
    let snapshot = engine.open_version(id)?;
    if engine.with_versions(is_kept) || snapshot.view().tree.id != old.id {
        return content_of(engine, id, progress);
    }
    let mut content = known.clone();
    content.update(Source::of(&engine.store), old, &snapshot.view().tree, progress)?;
    keep(engine, id, &content);
    Ok(content)
}

/// Whether all that is stored of a tree is as in an older one, but for times of last access.
///
/// # Errors
/// Errors of devices and trees.
pub fn is_untouched(engine: &Engine, old: &Tree, new: &Tree) -> Result<bool> {
    let inode = |key: &Key, value: &Value| -> Result<Box<InodeItem>> {
        let item = InodeItem::decode(value).map_err(|bad| bad.in_item(new.id, key.object))?;
        let mut item = Box::new(item);
        item.set_atime(Timestamp::default());
        item.version = 0;
        Ok(item)
    };
    let mut differences = old.differences(new, Key::MIN);
    while let Some(Difference { key, old, new }) = differences.next(&*engine.store)? {
        let (Some(old), Some(new), kind::INODE) = (old, new, key.kind) else { return Ok(false) };
        if inode(&key, &old)? != inode(&key, &new)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Notes the content of a snapshot, to be faster the next time, if there is room.
fn keep(engine: &Engine, id: u64, content: &Content) {
    let is_snapshot =
        engine.with_versions(|versions| versions.get(id).is_some_and(|v| v.item.is_snapshot()));
    if is_snapshot && engine.store.writable().is_ok() {
        let (identity, sum) = (content.identity().0, content.encode());
        let op = VersionOp::KeepContent { snapshot: id, identity, sum };
        // To be faster the next time, if there is room.
        let _ = engine.change_versions(alloc::vec![op]);
    }
}

/// The snapshot of a subvolume that has the content which a stream goes on from.
pub fn find(
    engine: &Engine,
    subvolume: u64,
    wanted: &record::Base,
    progress: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Base> {
    let Identity(identity) = wanted.identity;
    let (same, named) = engine.with_versions(|versions| {
        let snapshots = versions.snapshots(subvolume);
        let item = |id: &u64| versions.get(*id).map(|version| version.item);
        let same = |id: &u64| item(id).is_some_and(|item| item.content == identity);
        let is_unknown = |id: &u64| {
            let is_it = |item: &crate::format::pool::SubvolItem| {
                let is_named = item.id == wanted.id || item.origin == wanted.id;
                is_named && item.content == [0; 32]
            };
            item(id).is_some_and(|item| is_it(&item))
        };
        let all = |is_it: &dyn Fn(&u64) -> bool| -> Vec<u64> {
            snapshots.iter().rev().copied().filter(|id| is_it(id)).collect()
        };
        (all(&same), all(&is_unknown))
    });
    let was_named = !named.is_empty();
    for id in same.into_iter().chain(named) {
        let snapshot = engine.open_version(id)?;
        let content = content_of(engine, id, progress)?;
        if content.identity() == wanted.identity {
            return Ok(Base { snapshot, content });
        }
    }
    let what = match was_named {
        true => "the snapshot that the stream goes on from does not hold the same here",
        false => "there is no snapshot here with the content that the stream goes on from",
    };
    Err(Error::Argument { what })
}
