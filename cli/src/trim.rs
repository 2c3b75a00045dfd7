//! `cairn trim`: what `fstrim` does, for who has none or wants JSON.

use crate::arguments::Trim;
use crate::target::mount_point;
use crate::{output, Done, Failure};
use cairn_host::parse::format_size;
use cairn_host::say;
use std::fs::File;
use std::path::Path;

pub(crate) fn run(arguments: &Trim) -> Result<Done, Failure> {
    let mut trimmed = Vec::new();
    for path in &arguments.mounts {
        let bytes = trim_one(path, arguments.min_len)?;
        if !arguments.json {
            let size = format_size(bytes);
            say!("{}: {size} ({bytes} bytes) discarded", path.display());
        }
        trimmed.push(serde_json::json!({ "mount": path, "discarded": bytes }));
    }
    if arguments.json {
        output::json(&serde_json::json!({ "trimmed": trimmed }));
    }
    Ok(Done::Whole)
}

fn trim_one(path: &Path, min_len: u64) -> Result<u64, Failure> {
    mount_point(path)?;
    let named = |error| Failure::new(format_args!("{}: {error}", path.display()));
    let directory = File::open(path).map_err(named)?;
    cairn_host::trim(&directory, min_len).map_err(named)
}
