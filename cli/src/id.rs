//! `cairn id`.

use crate::arguments::Id;
use crate::versions::{self, Place};
use crate::view::View;
use crate::{output, target, Done, Failure};
use cairn_host::admin::{Reply, Request};
use cairn_host::mounts::Mount;
use cairn_host::say;
use cairn_host::versions::VersionName;
use fs_core::error::Error;
use fs_core::format::key::Key;
use fs_core::platform::Result as CoreResult;
use fs_core::stream::content::Progress;
use fs_core::stream::{Content, Identity, Source};
use fs_core::subvol::versions::Versions;
use fs_core::units::TreeId;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(crate) fn run(arguments: &Id) -> Result<Done, Failure> {
    let name = arguments.of.at.name.display();
    let (paths, version) = match versions::find(&arguments.of.at)? {
        (Place::Mounted(mount), version) => return of_mount(&mount, version, arguments),
        (Place::Devices(paths), version) => (paths, version),
    };
    let view = target::view(&paths, None)?;
    let failed = |error: &dyn std::fmt::Display| Failure::new(format_args!("{name}: {error}"));
    let is_named = version != VersionName::default();
    let id = match (is_named, arguments.subvol) {
        (true, _) => find_version(&view, &version).map_err(|error| failed(&error))?,
        (false, number) => view.subvol_id(number),
    };
    let (identity, seen) =
        identity(&view, id, arguments.of.json).map_err(|error| failed(&error))?;
    if arguments.of.json {
        output::json(&serde_json::json!({
            "pool": paths[0].display().to_string(),
            "subvol": id.0,
            "txg": view.superblock.txg.0,
            "identity": identity.to_string(),
            "inodes": seen.inodes,
            "bytes_read": seen.bytes,
            "complete": view.superblock.clean,
        }));
    } else {
        say!("{identity}  {}", output::printable(&name.to_string()));
    }
    // What is in the log is not in a snapshot anyway.
    if view.superblock.clean || version.snapshot.is_some() {
        return Ok(Done::Whole);
    }
    eprintln!("cairn: {name} was not unmounted: what is only in the log is not counted");
    Ok(Done::Partly)
}

/// The daemon reads everything, as it was when it was asked.
fn of_mount(mount: &Mount, version: VersionName, arguments: &Id) -> Result<Done, Failure> {
    if arguments.subvol.is_some() {
        return Err(Failure::new("of a pool that is mounted, give a name instead of --subvol"));
    }
    if version.snapshot.is_none() {
        versions::flush(mount)?;
    }
    let identity = match target::ask(mount, Request::Identity(version)) {
        Ok(Reply::Identity(identity)) => identity,
        Ok(_) => return Err(Failure::new("the daemon answered another question")),
        Err(error) => return Err(target::ask_failed(mount, &error)),
    };
    let name = arguments.of.at.name.display().to_string();
    if arguments.of.json {
        output::json(&serde_json::json!({ "name": name, "identity": identity }));
    } else {
        say!("{identity}  {}", output::printable(&name));
    }
    Ok(Done::Whole)
}

/// The number of what a name names, in a pool that is only looked at.
fn find_version(view: &View, name: &VersionName) -> CoreResult<TreeId> {
    let mut all = Versions::default();
    view.each_item(&view.tree(TreeId::POOL)?, Key::MIN, |key, value| {
        all.load(key, &value)?;
        Ok(true)
    })?;
    let absent = Error::Argument { what: "there is no subvolume or snapshot of that name" };
    let subvolume = all.subvolume(name.subvolume.as_bytes()).ok_or(absent.clone())?;
    let found = match &name.snapshot {
        Some(snapshot) => all.snapshot(subvolume, snapshot.as_bytes()),
        None => Some(subvolume),
    };
    found.map(TreeId).ok_or(absent)
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
