//! `cairn id`.

use crate::arguments::InSubvol;
use crate::target::{self, Target};
use crate::view::View;
use crate::{output, Done, Failure};
use fs_core::platform::Result as CoreResult;
use fs_core::stream::content::Progress;
use fs_core::stream::{Content, Identity, Source};
use fs_core::units::TreeId;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) fn run(of: &InSubvol) -> Result<Done, Failure> {
    let name = of.device.display();
    if let Target::Mounted(mount) = Target::find(std::slice::from_ref(&of.device))? {
        return Err(Failure::new(format_args!(
            "{name} is mounted on {}: what it holds may change while it is read; unmount it first",
            mount.mount_point.display()
        )));
    }
    let view = target::view(std::slice::from_ref(&of.device))?;
    let id = view.subvol_id(of.subvol);
    let failed = |error| Failure::new(format_args!("{name}: {error}"));
    let (identity, seen) = identity(&view, id, of.json).map_err(failed)?;
    if of.json {
        output::json(&serde_json::json!({
            "pool": name.to_string(),
            "subvol": id.0,
            "txg": view.superblock.txg.0,
            "identity": identity.to_string(),
            "inodes": seen.inodes,
            "bytes_read": seen.bytes,
            "complete": view.superblock.clean,
        }));
    } else {
        println!("{identity}  {}", output::printable(&name.to_string()));
    }
    if view.superblock.clean {
        return Ok(Done::Whole);
    }
    eprintln!("cairn: {name} was not unmounted: what is only in the log is not counted");
    Ok(Done::Partly)
}

fn identity(view: &View, id: TreeId, quiet: bool) -> CoreResult<(Identity, Progress)> {
    let tree = view.tree(id)?;
    let bar = bar(view.subvol(id)?.logical_bytes, quiet);
    let source = Source { nodes: view, pool: &view.pool };
    let mut seen = Progress::default();
    let content = Content::of(source, &tree, &mut |progress| {
        seen = *progress;
        // The total is what the extents name, which may be less than what records round up to.
        bar.set_length(bar.length().unwrap_or(0).max(progress.bytes));
        bar.set_position(progress.bytes);
        Ok(())
    });
    bar.finish_and_clear();
    Ok((content?.identity(), seen))
}

/// Hidden unless standard error is a terminal.
fn bar(bytes: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    let template = "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
