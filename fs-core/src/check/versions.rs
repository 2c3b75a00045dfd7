//! Subvolumes and snapshots against each other: dead lists, and what each holds for itself.
//!
//! Every tree is walked whole, but what a version has in common with its parent is marked in the
//! parent's walk. By the rules in `engine::versions` that is what was born not after the parent.
//! So each reference is met once, and dead lists are exact when for each parent P of X
//!
//! ```text
//! references of P - references of X that were born not after P = entries of dead(X)
//! ```
//!
//! Both sides are compared as sums of hashes of where runs begin and end, which costs no memory and
//! does not depend on how references are cut into runs: where one ends and the next begins, the
//! hashes cancel out. Births are compared as well, in a sum of its own.
//!
//! What was deleted and has one successor is not walked: what only it had is in the dead list of
//! the successor, which is compared with the parent above, together with the list of what was
//! deleted. What was deleted and has no successor is walked from its cursor on.

use super::findings::rules;
use super::{extents, files, tree, Checker, Spot};
use crate::btree::{FreshVisitor, Node};
use crate::format::chunk::ChunkKind;
use crate::format::dead::{birth_and_part, DeadHeader, DeadRef, Part};
use crate::format::extent::Extent;
use crate::format::features;
use crate::format::key::{kind, Key};
use crate::format::pool::{version, Settings, SubvolItem};
use crate::format::ptr::BlockPtr;
use crate::format::space::Run;
use crate::platform::Result;
use crate::subvol::extents::last_named;
use crate::subvol::versions::Versions;
use crate::units::{Ino, TreeId, Txg};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A version that can be looked into.
pub(super) struct Found {
    pub id: TreeId,
    pub item: SubvolItem,
    pub root: Option<BlockPtr>,
}

/// A sum over references: how often each sector is referred to, and how often with which birth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum {
    sectors: u64,
    births: u64,
}

impl Sum {
    /// Adds a reference, in the same time however long it is. The counts of all sectors follow from
    /// where they rise and fall.
    fn add(&mut self, run: Run, birth: Txg, is_node: bool) {
        let kind = u64::from(is_node);
        let step = |salt: u64| mix(run.end().0 ^ salt).wrapping_sub(mix(run.addr.0 ^ salt));
        self.sectors = self.sectors.wrapping_add(step(mix(kind)));
        self.births = self.births.wrapping_add(step(mix(mix(kind) ^ birth.0)));
    }

    fn minus(self, other: Sum) -> Sum {
        Sum {
            sectors: self.sectors.wrapping_sub(other.sectors),
            births: self.births.wrapping_sub(other.births),
        }
    }

    fn plus(self, other: Sum) -> Sum {
        Sum {
            sectors: self.sectors.wrapping_add(other.sectors),
            births: self.births.wrapping_add(other.births),
        }
    }
}

/// The finalizer of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a walk of a version has met.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Met {
    /// What was born not after this is the parent's.
    pub since: Txg,
    /// As the item says, whatever was deleted in between.
    own_since: Txg,
    all: Sum,
    old: Sum,
    tree_bytes: u64,
    own_bytes: u64,
}

impl Met {
    /// Takes note of a reference or node.
    pub fn add(&mut self, run: Run, birth: Txg, is_node: bool) {
        self.all.add(run, birth, is_node);
        if birth <= self.since {
            self.old.add(run, birth, is_node);
        }
        if birth > self.own_since {
            self.own_bytes = self.own_bytes.saturating_add(run.bytes);
        }
        if is_node {
            self.tree_bytes = self.tree_bytes.saturating_add(run.bytes);
        }
    }
}

/// What was met of a dead list.
#[derive(Clone, Copy, Debug, Default)]
struct List {
    entries: u64,
    own_bytes: u64,
    sum: Sum,
}

/// Versions, and what was met of them.
#[derive(Default)]
pub(super) struct Family {
    versions: Versions,
    met: BTreeMap<u64, Met>,
    lists: BTreeMap<u64, List>,
    /// The version that owns each list.
    owners: BTreeMap<u64, u64>,
    broken: bool,
}

impl Family {
    /// Nothing was met yet.
    pub fn new(versions: Versions) -> Family {
        Family { versions, ..Family::default() }
    }

    /// What the pool tree says.
    pub fn versions(&self) -> &Versions {
        &self.versions
    }

    fn item(&self, id: u64) -> Option<&SubvolItem> {
        self.versions.get(id).map(|version| &version.item)
    }

    /// Whether nothing goes on from a deleted version, and a part of its tree may be gone.
    fn is_end(&self, id: u64) -> bool {
        let begun = version::DELETED | version::STARTED;
        let is_begun = self.item(id).is_some_and(|item| item.flags & begun == begun);
        is_begun && self.versions.child_count(id) == 0
    }

    /// Whether a version is deleted and all that only it had is in its successor's dead list.
    fn is_gone(&self, id: u64) -> bool {
        if !self.item(id).is_some_and(SubvolItem::is_deleted) {
            return false;
        }
        self.versions.only_child(id).is_some_and(|child| !self.is_end(child))
    }

    /// The next version above that is not gone; zero when there is none.
    fn parent(&self, id: u64) -> u64 {
        let mut parent = self.item(id).map_or(0, |item| item.parent);
        // From parent to parent groups and ids descend, so this ends.
        while parent != 0 && self.is_gone(parent) {
            parent = self.item(parent).map_or(0, |item| item.parent);
        }
        parent
    }

    fn since(&self, id: u64) -> Txg {
        Txg(self.item(self.parent(id)).map_or(0, |parent| parent.txg))
    }

    /// The version that is there in whose favour a list is kept: its own, or, of what is gone, that
    /// of the successor.
    fn heir(&self, mut id: u64) -> u64 {
        while self.is_gone(id) {
            let Some(child) = self.versions.only_child(id) else { break };
            id = child;
        }
        id
    }
}

/// Checks what the versions say of each other and walks their trees.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
#[inline(never)]
pub(super) fn check(checker: &mut Checker<'_>, family: &mut Family, found: &[Found]) -> Result<()> {
    if let Err(error) = family.versions.check(checker.superblock.next_subvol) {
        family.broken = true;
        checker.findings.add_error(&rules::VERSION_PARENT, Spot::NONE, error)?;
    }
    check_rules(checker, family)?;
    for version in found {
        let id = version.id.0;
        if !begin(checker, family, version) {
            continue;
        }
        if !family.broken && family.is_end(id) {
            walk_end(checker, version)?;
        } else {
            files::check(checker, version)?;
        }
        finish(checker, family, id);
    }
    checker.incomplete |= family.broken;
    Ok(())
}

/// Before the tree of a version is walked; false when there is none to walk. Apart from the walk,
/// which needs a kernel's stack for itself.
#[inline(never)]
fn begin(checker: &mut Checker<'_>, family: &mut Family, version: &Found) -> bool {
    checker.stats.subvols += 1;
    let id = version.id.0;
    family.owners.insert(version.item.dead_list(id), id);
    if !family.broken && family.is_gone(id) {
        return false;
    }
    let own_since = Txg(version.item.snapshot_txg);
    let since = if family.broken { own_since } else { family.since(id) };
    checker.met = Met { since, own_since, ..Met::default() };
    true
}

#[inline(never)]
fn finish(checker: &mut Checker<'_>, family: &mut Family, id: u64) {
    family.met.insert(id, core::mem::take(&mut checker.met));
}

/// Names, owners and groups of versions and bookmarks.
#[inline(never)]
fn check_rules(checker: &mut Checker<'_>, family: &Family) -> Result<()> {
    let newest = checker.superblock.txg.0;
    for (id, version) in family.versions.iter() {
        let spot = Spot::object(TreeId::POOL, id);
        if let Err(error) = family.versions.check_rules(id) {
            checker.findings.add_error(&rules::VERSION, spot.clone(), error)?;
        }
        let item = &version.item;
        if item.has_limits() && checker.superblock.features[2] & features::LIMITS == 0 {
            let detail = "it has limits, and the pool says that there are none";
            checker.findings.add(&rules::VERSION, spot.clone(), detail);
        }
        let uses_streams = item.is_receiving() || item.content != [0; 32];
        if uses_streams && checker.superblock.features[2] & features::STREAMS == 0 {
            let detail = "it was received, and the pool says that nothing was";
            checker.findings.add(&rules::VERSION, spot.clone(), detail);
        }
        let has_properties = item.settings() != Settings::default() || !version.user.is_empty();
        if has_properties && checker.superblock.features[2] & features::PROPERTIES == 0 {
            let detail = "it has properties, and the pool says that there are none";
            checker.findings.add(&rules::VERSION, spot.clone(), detail);
        }
        if item.txg.max(item.birth).max(item.snapshot_txg) > newest {
            checker.findings.add(&rules::VERSION, spot, "it is of a group to come");
        }
    }
    for (id, bookmark) in family.versions.bookmarks() {
        let spot = Spot::object(TreeId::POOL, id);
        if let Err(error) = family.versions.check_bookmark(id) {
            checker.findings.add_error(&rules::VERSION, spot.clone(), error)?;
        }
        if bookmark.item.txg > newest || bookmark.item.txg == 0 {
            checker.findings.add(&rules::VERSION, spot, "it is of a group to come, or of none");
        }
    }
    Ok(())
}

/// What is left of a deleted version from which none goes on.
#[inline(never)]
fn walk_end(checker: &mut Checker<'_>, found: &Found) -> Result<()> {
    if found.item.cursor == [0xff; 24] {
        return Ok(());
    }
    let own = tree(found.item.lineage(found.id), found.root);
    let since = checker.met.since;
    let from = Key::peek(&found.item.cursor);
    let blocks = checker.blocks;
    let mut left = Left { checker, tree: &own, since };
    match own.walk_fresh(blocks, since, from, &mut left) {
        Ok(_) => Ok(()),
        Err(error) => {
            checker.incomplete = true;
            let spot = Spot::object(TreeId::POOL, found.id.0);
            checker.findings.add_error(&rules::BLOCK, spot, error)
        }
    }
}

struct Left<'c, 'a, 't> {
    checker: &'c mut Checker<'a>,
    tree: &'t crate::btree::Tree,
    since: Txg,
}

impl FreshVisitor for Left<'_, '_, '_> {
    fn node(&mut self, ptr: &BlockPtr) -> Result<()> {
        let spot = Spot::block(self.tree.id, ptr.addr);
        let run = Run { addr: ptr.addr, bytes: ptr.allocated() };
        self.checker.mark_run(spot, run, ChunkKind::Metadata);
        self.checker.stats.nodes += 1;
        Ok(())
    }

    fn leaf(&mut self, node: &Arc<Node>, from: usize) -> Result<usize> {
        for index in from..node.count() {
            let key = node.key(index);
            if key.kind != kind::EXTENT {
                continue;
            }
            let (extent, birth) = Extent::decode(node.value(index), key.offset, node.birth())
                .map_err(|bad| bad.in_item(self.tree.id, key.object))?;
            if birth <= self.since {
                continue;
            }
            let blocks = self.checker.blocks;
            let ino = Ino(key.object);
            if let Some(run) = last_named(blocks, self.tree, ino, key.offset, &extent)? {
                let spot = Spot::object(self.tree.id, key.object);
                extents::mark(self.checker, &spot, run)?;
            }
        }
        Ok(node.count())
    }

    fn is_enough(&self) -> bool {
        false
    }
}

/// Reads the dead lists, marks what only they hold, and compares.
///
/// # Errors
/// [`crate::error::Error::Memory`] and the like.
#[inline(never)]
pub(super) fn check_dead(checker: &mut Checker<'_>, family: &mut Family) -> Result<()> {
    let dead = tree(TreeId::DEAD, checker.superblock.dead_root);
    let mut open: Option<Birth> = None;
    checker.each_item(&dead, &mut |checker, key, value, _| {
        let part = Part::decode(key, value).map_err(|bad| bad.in_item(TreeId::DEAD, key.object))?;
        let (birth, number) = birth_and_part(key);
        let goes_on = open.as_ref().is_some_and(|open| {
            (open.list, open.birth) == (key.object, birth) && number == open.next_part
        });
        if !goes_on {
            finish_birth(checker, open.take());
            open = part.header.map(|header| Birth::new(key.object, birth, header));
        }
        let Some(open) = open.as_mut() else {
            let detail = format!("list {}, birth {birth}: no head", key.object);
            checker.findings.add(&rules::DEAD_LIST, Spot::object(TreeId::DEAD, key.object), detail);
            return Ok(());
        };
        open.next_part += 1;
        open.entries += part.refs.len() as u64;
        for entry in &part.refs {
            open.bytes = open.bytes.saturating_add(entry.run.bytes);
            entry_met(checker, family, key.object, entry)?;
        }
        Ok(())
    })?;
    finish_birth(checker, open);
    if !checker.incomplete && !family.broken {
        compare(checker, family);
    }
    Ok(())
}

/// Entries of one birth of one list.
struct Birth {
    list: u64,
    birth: Txg,
    header: DeadHeader,
    next_part: u64,
    entries: u64,
    bytes: u64,
}

impl Birth {
    fn new(list: u64, birth: Txg, header: DeadHeader) -> Birth {
        Birth { list, birth, header, next_part: 0, entries: 0, bytes: 0 }
    }
}

fn finish_birth(checker: &mut Checker<'_>, birth: Option<Birth>) {
    let Some(Birth { list, birth, header, next_part, entries, bytes }) = birth else { return };
    if (header.entries, header.bytes, header.last_part + 1) != (entries, bytes, next_part) {
        let detail = format!("list {list}, birth {birth}: its head counts otherwise");
        checker.findings.add(&rules::DEAD_LIST, Spot::object(TreeId::DEAD, list), detail);
    }
}

fn entry_met(
    checker: &mut Checker<'_>,
    family: &mut Family,
    list: u64,
    entry: &DeadRef,
) -> Result<()> {
    if family.broken {
        // Who goes on from whom cannot be followed: it may lead round in a circle.
        return Ok(());
    }
    let Some(owner) = family.owners.get(&list).copied() else {
        let spot = Spot::object(TreeId::DEAD, list);
        checker.findings.add(&rules::DEAD_LIST, spot, "it belongs to nobody");
        return Ok(());
    };
    let heir = family.heir(owner);
    let since = family.since(heir);
    let item = family.item(owner).copied().unwrap_or(SubvolItem::zeroed());
    if entry.birth.0 > item.snapshot_txg {
        let spot = Spot::object(TreeId::DEAD, list);
        checker.findings.add(&rules::DEAD_LIST, spot, "an entry its parent cannot have");
    }
    let own_since = family.versions.dead_own_since(&item);
    let met = family.lists.entry(owner).or_default();
    met.entries += 1;
    if entry.birth > own_since {
        met.own_bytes = met.own_bytes.saturating_add(entry.run.bytes);
    }
    if entry.birth <= since {
        met.sum.add(entry.run, entry.birth, entry.is_node);
        return Ok(());
    }
    // Only what is deleted held it.
    let spot = Spot::object(TreeId::DEAD, list);
    if entry.is_node {
        checker.mark_run(spot, entry.run, ChunkKind::Metadata);
        return Ok(());
    }
    extents::mark(checker, &spot, entry.run)
}

#[inline(never)]
fn compare(checker: &mut Checker<'_>, family: &Family) {
    if checker.superblock.features[2] & features::VERSIONS == 0 {
        return;
    }
    let mut sums: BTreeMap<u64, Sum> = BTreeMap::new();
    let mut inherited: Vec<u64> = Vec::new();
    for (id, version) in family.versions.iter() {
        let list = family.lists.get(&id).copied().unwrap_or_default();
        let heir = family.heir(id);
        let sum = sums.entry(heir).or_default();
        *sum = sum.plus(list.sum);
        if heir != id {
            inherited.push(heir);
        }
        let spot = Spot::object(TreeId::POOL, id);
        let item = &version.item;
        if item.dead_entries != list.entries {
            let detail = format!("{} entries instead of {}", item.dead_entries, list.entries);
            checker.findings.add(&rules::DEAD_LIST, spot.clone(), detail);
        }
        if item.dead_own_bytes != list.own_bytes {
            let (counted, met) = (item.dead_own_bytes, list.own_bytes);
            let detail = format!("{counted} bytes only its parent has instead of {met}");
            checker.findings.add(&rules::SUBVOL_SUMS, spot.clone(), detail);
        }
        let Some(met) = family.met.get(&id).filter(|_| !family.is_end(id)) else { continue };
        for (what, counted, met) in [
            ("of nodes", item.tree_bytes, met.tree_bytes),
            ("of its own", item.own_bytes, met.own_bytes),
        ] {
            if counted != met {
                let detail = format!("{counted} bytes {what} instead of {met}");
                checker.findings.add(&rules::SUBVOL_SUMS, spot.clone(), detail);
            }
        }
    }
    for (id, met) in &family.met {
        let parent = family.parent(*id);
        if family.is_end(*id) {
            continue;
        }
        let dropped = match family.met.get(&parent) {
            Some(above) => above.all.minus(met.old),
            None => Sum::default(),
        };
        let listed = sums.get(id).copied().unwrap_or_default();
        let is_misdated = listed.births != dropped.births && !checker.mixed_births;
        if listed.sectors != dropped.sectors || is_misdated {
            let shared = if inherited.contains(id) { ", with what it takes over" } else { "" };
            let which = if listed.sectors == dropped.sectors { ": births" } else { "" };
            let detail = format!("that of {id}{shared}{which}");
            checker.findings.add(&rules::DEAD_LIST, Spot::object(TreeId::POOL, *id), detail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Logical;

    fn sum(runs: &[(u64, u64, u64)]) -> Sum {
        let mut sum = Sum::default();
        for (addr, end, birth) in runs {
            let run = Run { addr: Logical(*addr), bytes: end - addr };
            sum.add(run, Txg(*birth), false);
        }
        sum
    }

    #[test]
    fn sums_count_sectors_however_they_are_cut_into_runs() {
        let whole = sum(&[(0, 1 << 60, 5), (8192, 12288, 5)]);
        assert_eq!(whole, sum(&[(0, 12288, 5), (8192, 1 << 60, 5)]));
        assert_eq!(whole, sum(&[(0, 4096, 5), (4096, 12288, 5), (8192, 1 << 60, 5)]));
        assert_ne!(whole.sectors, sum(&[(0, 1 << 60, 5)]).sectors);
        assert_ne!(whole.sectors, sum(&[(0, 1 << 60, 5), (4096, 8192, 5)]).sectors);
    }

    #[test]
    fn sums_tell_births_and_kinds_apart() {
        let one = sum(&[(0, 4096, 5)]);
        let other = sum(&[(0, 4096, 6)]);
        assert_eq!(one.sectors, other.sectors);
        assert_ne!(one.births, other.births);
        let mut node = Sum::default();
        node.add(Run { addr: Logical(0), bytes: 4096 }, Txg(5), true);
        assert_ne!(one.sectors, node.sectors);
    }
}
