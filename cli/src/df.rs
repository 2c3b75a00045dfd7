//! `cairn df`.

use crate::arguments::Df;
use crate::target::{ask, ask_failed, view, Target};
use crate::view::View;
use crate::{output, Done, Failure};
use cairn_host::admin::{AdminError, Reply, Request, SpaceInfo, Usage};
use cairn_host::mounts::{self, Mount};
use cairn_host::parse::format_size;
use fs_core::format::chunk::ChunkKind;
use fs_core::format::key::{kind, Key};
use fs_core::format::pool::SubvolItem;
use fs_core::format::space::SummaryItem;
use fs_core::platform::Result as CoreResult;
use fs_core::units::{Logical, TreeId, SECTOR_BYTES};
use serde::Serialize;
use std::path::PathBuf;

/// A pool's space with the name it was asked by.
#[derive(Serialize)]
struct Row {
    pool: String,
    #[serde(flatten)]
    space: SpaceInfo,
    compression_ratio: Option<f64>,
}

impl Row {
    fn new(pool: impl ToString, space: SpaceInfo) -> Row {
        Row { pool: pool.to_string(), compression_ratio: space.compression_ratio(), space }
    }
}

pub(crate) fn run(arguments: &Df) -> Result<Done, Failure> {
    let mut done = Done::Whole;
    let rows = if arguments.pool.is_empty() {
        let (rows, all) = of_every_mount()?;
        done = all;
        rows
    } else {
        vec![match Target::find(&arguments.pool)? {
            Target::Mounted(mount) => of_mount(&mount)?,
            Target::Devices(paths) => of_devices(&paths)?,
        }]
    };
    if arguments.json {
        output::json(&rows);
    } else {
        let tables: Vec<String> = rows.iter().map(|row| table(row, arguments.exact)).collect();
        cairn_host::output::text(&tables.join("\n"));
    }
    Ok(done)
}

fn of_every_mount() -> Result<(Vec<Row>, Done), Failure> {
    let mounts = mounts::mounts().map_err(Failure::new)?;
    let (mut rows, mut done) = (Vec::new(), Done::Whole);
    for mount in mounts.iter().filter(|mount| mount.is_cairn()) {
        match of_mount(mount) {
            Ok(row) => rows.push(row),
            Err(failure) => {
                eprintln!("cairn: {failure}");
                done = Done::Partly;
            }
        }
    }
    Ok((rows, done))
}

fn of_mount(mount: &Mount) -> Result<Row, Failure> {
    match ask(mount, Request::Df) {
        Ok(Reply::Df(space)) => Ok(Row::new(mount.mount_point.display(), space)),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        // The kernel module has no daemon; what it published last is on the device.
        Err(AdminError::NoDaemon) => of_devices(std::slice::from_ref(&mount.source)),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

fn of_devices(paths: &[PathBuf]) -> Result<Row, Failure> {
    let name = paths[0].display().to_string();
    let space = of_view(&view(paths, None)?);
    Ok(Row::new(&name, space.map_err(|e| Failure::new(format_args!("{name}: {e}")))?))
}

/// Adds up what the trees of a pool that is not mounted say.
fn of_view(view: &View) -> CoreResult<SpaceInfo> {
    let mut space = SpaceInfo { unallocated: view.pool.unallocated_bytes(), ..<_>::default() };
    space.device_bytes = view.pool.device_bytes();
    for chunk in view.pool.chunks() {
        usage_of(&mut space, chunk.kind).total += chunk.length;
        space.device_allocated += chunk.stripe_bytes() * chunk.stripes.len() as u64;
    }
    view.each_item(&view.tree(TreeId::SPACE)?, Key::MIN, |key, value| {
        if key.kind == kind::SPACE_SUMMARY {
            let bad = |bad: fs_core::format::BadBytes| bad.in_item(TreeId::SPACE, key.object);
            let summary = SummaryItem::decode(&value).map_err(bad)?;
            // A summary of a chunk that is gone counts for nothing.
            if let Some(chunk) = view.pool.chunk_of(Logical(key.offset)) {
                let used = summary.used_sectors.saturating_mul(SECTOR_BYTES).min(chunk.length);
                usage_of(&mut space, chunk.kind).used += used;
            }
        }
        Ok(true)
    })?;
    let (mut stored, mut logical) = (0u64, 0u64);
    view.each_item(&view.tree(TreeId::POOL)?, Key::MIN, |key, value| {
        if key.kind == kind::SUBVOL {
            let bad = |bad: fs_core::format::BadBytes| bad.in_item(TreeId::POOL, key.object);
            let subvol = SubvolItem::decode(&value).map_err(bad)?;
            if subvol.is_snapshot() || subvol.is_deleted() {
                return Ok(true);
            }
            stored = stored.saturating_add(subvol.stored_bytes);
            logical = logical.saturating_add(subvol.logical_bytes);
        }
        Ok(true)
    })?;
    (space.stored_bytes, space.logical_bytes) = (Some(stored), Some(logical));
    Ok(space)
}

fn usage_of(space: &mut SpaceInfo, kind: ChunkKind) -> &mut Usage {
    match kind {
        ChunkKind::Data => &mut space.data,
        ChunkKind::Metadata => &mut space.metadata,
        ChunkKind::System => &mut space.system,
    }
}

fn table(row: &Row, exact: bool) -> String {
    let size = |bytes: u64| if exact { bytes.to_string() } else { format_size(bytes) };
    let space = &row.space;
    let mut lines = vec![
        (row.pool.clone(), "size".to_string(), "used".to_string()),
        ("  data".into(), size(space.data.total), size(space.data.used)),
        ("  metadata".into(), size(space.metadata.total), size(space.metadata.used)),
        ("  system".into(), size(space.system.total), size(space.system.used)),
        ("  unallocated".into(), size(space.unallocated), String::new()),
    ];
    if space.reserve > 0 {
        lines.push(("  reserve".into(), size(space.reserve), String::new()));
    }
    if space.pending_free > 0 {
        lines.push(("  being freed".into(), size(space.pending_free), String::new()));
    }
    let all = (size(space.device_bytes), size(space.device_allocated));
    lines.push(("  devices".into(), all.0, all.1));
    if let Some(available) = space.available {
        lines.push(("  available".into(), size(available), String::new()));
    }
    if let Some(ratio) = row.compression_ratio {
        lines.push(("  compression".into(), format!("{ratio:.2}x"), String::new()));
    }
    let width = |of: fn(&(String, String, String)) -> &String| {
        lines.iter().map(|line| of(line).chars().count()).max().unwrap_or(0)
    };
    let (first, second, third) = (width(|l| &l.0), width(|l| &l.1), width(|l| &l.2));
    let text = |(name, size, used): &(String, String, String)| {
        let line = format!("{name:<first$}  {size:>second$}  {used:>third$}");
        format!("{}\n", line.trim_end())
    };
    lines.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up_and_leaves_out_what_is_not_known() {
        let space = SpaceInfo {
            device_bytes: 10 << 30,
            data: Usage { total: 1 << 30, used: 1 << 20 },
            stored_bytes: Some(1 << 20),
            logical_bytes: Some(3 << 19),
            ..SpaceInfo::default()
        };
        let text = table(&Row::new("/mnt", space), false);
        assert!(text.starts_with("/mnt               size      used\n"), "{text}");
        assert!(text.contains("  data         1.00 GiB  1.00 MiB\n"), "{text}");
        assert!(text.contains("  compression     1.50x\n"), "{text}");
        assert!(!text.contains("available") && !text.contains("reserve"));
    }
}
