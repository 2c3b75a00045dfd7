//! The chunk tree.

use super::blocks::Blocks;
use super::findings::{rules, Findings};
use super::{push, tree, Spot};
use crate::btree::Walk;
use crate::format::chunk::{Chunk, ChunkKind, DeviceItem};
use crate::format::features;
use crate::format::key::{kind, Key};
use crate::format::superblock::Superblock;
use crate::platform::Result;
use crate::units::{Logical, TreeId};
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

/// Maps the chunks of the chunk tree and compares them with devices and superblock; returns all
/// that are mapped.
///
/// Nodes are neither marked nor counted here: that needs the map.
// Called once, and large when inlined: its frame is to be gone when the next part begins.
#[inline(never)]
pub(super) fn load(
    blocks: &Blocks<'_>,
    superblock: &Superblock,
    findings: &mut Findings,
) -> Result<Vec<Chunk>> {
    let mut found = ChunkTree::default();
    let chunk_tree = tree(TreeId::CHUNK, superblock.chunk_root);
    chunk_tree.walk(blocks, &mut |visit| {
        let Ok(node) = visit.node else { return Ok(Walk::Over) };
        if node.level() == 0 {
            for index in 0..node.count() {
                found.item(node.key(index), node.value(index), findings)?;
            }
        }
        Ok(Walk::Down)
    })?;
    // They will be met again, and reported, when the tree is walked with the others.
    drop(blocks.take_bad());
    found.map(blocks, superblock, findings)?;
    let chunks = blocks.pool.chunks();
    check_devices((blocks, superblock), &found.devices, &chunks, findings);
    Ok(chunks)
}

#[derive(Default)]
struct ChunkTree {
    chunks: Vec<Chunk>,
    devices: Vec<(u64, DeviceItem)>,
}

impl ChunkTree {
    fn item(&mut self, key: Key, value: &[u8], findings: &mut Findings) -> Result<()> {
        let spot = Spot::object(TreeId::CHUNK, key.object);
        match (key.kind, key.offset) {
            (kind::CHUNK, 0) => match Chunk::decode(Logical(key.object), value) {
                Ok(chunk) => push(&mut self.chunks, chunk)?,
                Err(bad) => findings.add(&rules::ITEM, spot, bad.0),
            },
            (kind::DEVICE, 0) => match DeviceItem::decode(value) {
                Ok(item) => push(&mut self.devices, (key.object, item))?,
                Err(bad) => findings.add(&rules::ITEM, spot, bad.0),
            },
            _ => findings.add(&rules::ITEM_KIND, spot, format!("{key:?}")),
        }
        Ok(())
    }

    fn map(
        &self,
        blocks: &Blocks<'_>,
        superblock: &Superblock,
        findings: &mut Findings,
    ) -> Result<()> {
        for chunk in &self.chunks {
            let spot = Spot::addr(chunk.logical);
            let end = chunk.logical.0.saturating_add(chunk.length);
            if end > superblock.next_chunk.0 {
                let detail = format!("the chunk ends at {end:#x}, the next one begins before");
                findings.add(&rules::CHUNK_NEXT, spot.clone(), detail);
            }
            let embedded =
                superblock.system_chunks.iter().find(|other| other.logical == chunk.logical);
            match (chunk.kind, embedded) {
                (ChunkKind::System, Some(other)) if other == chunk => continue,
                (ChunkKind::System, _) | (_, Some(_)) => {
                    findings.add(&rules::CHUNK_SYSTEM, spot.clone(), "");
                    continue;
                }
                _ => {}
            }
            // One at a time, so that one bad chunk does not hide the others.
            if let Err(error) = blocks.pool.add_chunks([chunk.clone()]) {
                let rule = match blocks.pool.is_past() {
                    true => &rules::OVERWRITTEN,
                    false => &rules::CHUNK_OVERLAP,
                };
                findings.add_error(rule, spot, error)?;
            }
        }
        let is_known = |chunk: &Chunk| self.chunks.iter().any(|c| c.logical == chunk.logical);
        for chunk in superblock.system_chunks.iter().filter(|chunk| !is_known(chunk)) {
            let detail = "it is not in the chunk tree";
            findings.add(&rules::CHUNK_SYSTEM, Spot::addr(chunk.logical), detail);
        }
        Ok(())
    }
}

/// Labels are ahead of the chunk tree when the power failed while devices came, went, or changed
/// their size: only then may they differ, and only in what no chunk is concerned by.
fn check_devices(
    (blocks, superblock): (&Blocks<'_>, &Superblock),
    items: &[(u64, DeviceItem)],
    chunks: &[Chunk],
    findings: &mut Findings,
) {
    if blocks.pool.is_past() {
        // Devices are what they have become since.
        return;
    }
    let members = blocks.pool.members();
    let mut allocated = vec![0u64; members.len()];
    for chunk in chunks {
        for stripe in &chunk.stripes {
            if let Some(sum) = allocated.get_mut(usize::from(stripe.device)) {
                *sum = sum.saturating_add(chunk.stripe_bytes());
            }
        }
    }
    for (index, item) in items {
        let spot = Spot::object(TreeId::CHUNK, *index);
        let member = usize::try_from(*index).ok().and_then(|index| members.get(index));
        let Some(member) = member else {
            findings.add(&rules::DEVICE_ITEM, spot, "the pool has no such device");
            continue;
        };
        let identity = member.identity();
        let sum = allocated[usize::from(member.index())];
        let is_another = identity.device_id != item.id && (item.allocated > 0 || sum > 0);
        let has_changes = superblock.features[0] & features::DEVICE_CHANGE != 0;
        let is_resized = identity.device_id == item.id && identity.bytes != item.bytes;
        if is_another || is_resized && !has_changes {
            findings.add(&rules::DEVICE_ITEM, spot.clone(), "id or size differ");
        }
        if sum != item.allocated {
            let detail = format!("{} instead of {sum}", item.allocated);
            findings.add(&rules::DEVICE_ALLOCATED, spot, detail);
        }
    }
    for member in members {
        let index = u64::from(member.index());
        let is_told = index < u64::from(superblock.device_count) && !member.is_vacant();
        if is_told && !items.iter().any(|(other, _)| *other == index) {
            let spot = Spot::object(TreeId::CHUNK, index);
            findings.add(&rules::DEVICE_ITEM, spot, "the device has no item");
        }
    }
}
