//! `cairn sync`.
//!
//! First the kernel hands dirty pages of the mount to whoever serves it, then the daemon commits:
//! on a plain `fuse` mount the kernel's own sync stops half-way.

use crate::arguments::Sync;
use crate::target::{ask, ask_failed, mount_point};
use crate::{output, Done, Failure};
use cairn_host::admin::{AdminError, Reply, Request};
use std::fs::File;
use std::path::Path;

pub(crate) fn run(arguments: &Sync) -> Result<Done, Failure> {
    for path in &arguments.mounts {
        sync_one(path)?;
    }
    if arguments.json {
        output::json(&serde_json::json!({ "synced": arguments.mounts }));
    }
    Ok(Done::Whole)
}

fn sync_one(path: &Path) -> Result<(), Failure> {
    let mount = mount_point(path)?;
    let named = |error| Failure::new(format_args!("{}: {error}", path.display()));
    let directory = File::open(path).map_err(|e| named(e.to_string()))?;
    rustix::fs::syncfs(&directory).map_err(|e| named(e.to_string()))?;
    match ask(&mount, Request::Sync) {
        Ok(Reply::Synced) => Ok(()),
        Ok(_) => Err(named("the daemon answered another question".into())),
        // There the kernel's sync reached the filesystem itself.
        Err(AdminError::NoDaemon) if mount.fs_type != "fuse.cairn" => Ok(()),
        Err(error) => Err(ask_failed(&mount, &error)),
    }
}
