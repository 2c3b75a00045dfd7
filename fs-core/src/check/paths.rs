//! Paths of the files that findings are about.

use super::blocks::Blocks;
use super::{tree, Finding};
use crate::btree::Tree;
use crate::error::Error;
use crate::format::dir::Entry;
use crate::format::inode::InodeItem;
use crate::format::key::{kind, Key};
use crate::format::pool::{SubvolItem, ROOT_INO};
use crate::format::superblock::Superblock;
use crate::platform::Result;
use crate::subvol::versions::Versions;
use crate::units::TreeId;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

/// A path has at most so many names: a forged pool may have directories in a circle.
const DEPTH_MAX: usize = 1024;

/// Adds paths to findings about files.
///
/// # Errors
/// [`Error::Memory`].
// Called once, and large when inlined: its frame is to be gone when the next part begins.
#[inline(never)]
pub(super) fn add(
    blocks: &Blocks<'_>,
    superblock: &Superblock,
    versions: &Versions,
    findings: &mut [Finding],
) -> Result<()> {
    let mut known: BTreeMap<(TreeId, u64), Vec<u8>> = BTreeMap::new();
    for finding in findings {
        let (Some(id), Some(ino)) = (finding.spot.tree, finding.spot.object) else { continue };
        if !id.is_subvol() || ino == 0 {
            continue;
        }
        if let Some(path) = known.get(&(id, ino)) {
            finding.path = Some(path.clone());
            continue;
        }
        let path = subvol_tree(blocks, superblock, id).and_then(|t| path_of(blocks, &t, ino));
        match path {
            Ok(path) => {
                let path = versions.shown_file(id.0, &path);
                known.insert((id, ino), path.clone());
                finding.path = Some(path);
            }
            Err(Error::Memory) => return Err(Error::Memory),
            Err(_) => {}
        }
    }
    // They were reported when the trees were walked.
    drop(blocks.take_bad());
    Ok(())
}

fn subvol_tree(blocks: &Blocks<'_>, superblock: &Superblock, id: TreeId) -> Result<Tree> {
    let missing = Error::BadItem { what: "no such subvolume", tree: TreeId::POOL, object: id.0 };
    let pool = tree(TreeId::POOL, superblock.pool_root);
    let value = pool.lookup(blocks, &Key::new(id.0, kind::SUBVOL, 0))?.ok_or(missing)?;
    let bad = |bad: crate::format::BadBytes| bad.in_item(TreeId::POOL, id.0);
    let item = SubvolItem::decode(&value).map_err(bad)?;
    Ok(tree(item.lineage(id), item.root(value.birth()).map_err(bad)?))
}

/// The path as far up as it can be followed; it begins with `#` and a number where it cannot.
fn path_of(blocks: &Blocks<'_>, tree: &Tree, mut ino: u64) -> Result<Vec<u8>> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    while ino != ROOT_INO {
        match first_name(blocks, tree, ino)? {
            Some((parent, name)) if parts.len() < DEPTH_MAX => {
                parts.push(name);
                ino = parent;
            }
            _ => {
                let mut path = format!("#{ino}").into_bytes();
                append(&mut path, &parts);
                return Ok(path);
            }
        }
    }
    let mut path = Vec::new();
    append(&mut path, &parts);
    if path.is_empty() {
        path.push(b'/');
    }
    Ok(path)
}

fn append(path: &mut Vec<u8>, parts: &[Vec<u8>]) {
    for part in parts.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(part);
    }
}

/// The directory and name an inode says it has, if that is so.
fn first_name(blocks: &Blocks<'_>, tree: &Tree, ino: u64) -> Result<Option<(u64, Vec<u8>)>> {
    let damaged_is_none = |result: Result<Option<_>>| match result {
        Err(error) if error.is_damage() => Ok(None),
        other => other,
    };
    let inode = damaged_is_none(tree.lookup(blocks, &Key::new(ino, kind::INODE, 0)))?;
    let Some(Ok(inode)) = inode.map(|value| InodeItem::decode(&value)) else { return Ok(None) };
    let key = Key::new(inode.parent, kind::DIR_ENTRY, inode.parent_cookie);
    let entry = damaged_is_none(tree.lookup(blocks, &key))?;
    let Some(Ok(entry)) = entry.map(|value| Entry::decode(&value)) else { return Ok(None) };
    Ok((entry.ino == ino).then_some((inode.parent, entry.name)))
}
