//! The pool tree: subvolumes, snapshots, bookmarks and properties.

use super::findings::rules;
use super::versions::{self, Family, Found};
use super::{push, tree, Checker, Spot};
use crate::format::devices::DeviceChangeItem;
use crate::format::key::{kind, Key};
use crate::format::pool::{property, SubvolItem};
use crate::format::scrub::ScrubRecord;
use crate::platform::Result;
use crate::subvol::versions::Versions;
use crate::units::{TreeId, Txg};
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;

/// Checks the pool tree and every subvolume and snapshot.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
#[inline(never)]
pub(super) fn check(checker: &mut Checker<'_>) -> Result<Box<Family>> {
    let (found, mut family) = load(checker)?;
    versions::check(checker, &mut family, &found)?;
    Ok(family)
}

/// What the pool tree says of subvolumes and versions. Apart from walking their trees, so that both
/// have more of a kernel's stack.
#[inline(never)]
fn load(checker: &mut Checker<'_>) -> Result<(Vec<Found>, Box<Family>)> {
    let mut found: Vec<Found> = Vec::new();
    let mut all = Versions::default();
    let pool = tree(TreeId::POOL, checker.superblock.pool_root);
    checker.each_item(&pool, &mut |checker, key, value, birth| {
        item(checker, &mut found, &mut all, key, value, birth)
    })?;
    let default = TreeId(checker.superblock.default_subvol);
    let is_default = |found: &Found| {
        found.id == default && !found.item.is_snapshot() && !found.item.is_deleted()
    };
    let has_default = found.iter().any(is_default);
    if !has_default && !checker.incomplete {
        let spot = Spot::object(TreeId::POOL, default.0);
        checker.findings.add(&rules::SUBVOL_DEFAULT, spot, "");
    }
    Ok((found, Box::new(Family::new(all))))
}

#[inline(never)]
fn item(
    checker: &mut Checker<'_>,
    found: &mut Vec<Found>,
    all: &mut Versions,
    key: Key,
    value: &[u8],
    birth: Txg,
) -> Result<()> {
    let spot = Spot::object(TreeId::POOL, key.object);
    match (key.kind, key.offset) {
        (kind::SUBVOL, 0) => {
            let bad = |bad: crate::format::BadBytes| bad.in_item(TreeId::POOL, key.object);
            let item = SubvolItem::decode(value).map_err(bad)?;
            let root = item.root(birth).map_err(bad)?;
            let id = TreeId(key.object);
            if !id.is_subvol() || id.0 >= checker.superblock.next_subvol {
                checker.findings.add(&rules::SUBVOL_ID, spot, "");
                return Ok(());
            }
            all.load(key, value)?;
            push(found, Found { id, item, root })
        }
        (kind::NAME | kind::HOLDS | kind::BOOKMARK | kind::CONTENT, 0) => {
            all.load(key, value).map(|_| ())
        }
        (kind::PROPERTY, property::SCRUB) if key.object == 0 => {
            let bad = |bad: crate::format::BadBytes| bad.in_item(TreeId::POOL, key.object);
            let record = ScrubRecord::decode(value).map_err(bad)?;
            if record.devices.len() > usize::from(checker.superblock.device_count) {
                checker.findings.add(&rules::ITEM, spot, "a scrub of more devices than there are");
            }
            Ok(())
        }
        (kind::PROPERTY, property::DEVICES) if key.object == 0 => {
            let bad = |bad: crate::format::BadBytes| bad.in_item(TreeId::POOL, key.object);
            DeviceChangeItem::decode(value).map(|_| ()).map_err(bad)
        }
        (kind::PROPERTY, property::USER) if key.object != 0 => all.load(key, value).map(|_| ()),
        (kind::PROPERTY, _) if key.object != 0 => {
            checker.findings.add(&rules::ITEM_KIND, spot, format!("{key:?}"));
            Ok(())
        }
        (kind::PROPERTY, number) => {
            let want = match number {
                property::COMPRESSION => 2,
                property::CHECKSUM => 1,
                _ => value.len(),
            };
            if value.len() != want {
                let detail = format!("property {number} has {} bytes", value.len());
                checker.findings.add(&rules::ITEM, spot, detail);
            }
            Ok(())
        }
        _ => {
            checker.findings.add(&rules::ITEM_KIND, spot, format!("{key:?}"));
            Ok(())
        }
    }
}
