//! What was made, for people and for programs.

use crate::{Arguments, Failure};
use cairn_host::parse::{format_size, format_uuid};
use cairn_host::say;
use cairn_host::stored;
use fs_core::engine::FormatOptions;
use fs_core::format::ptr::{ChecksumKind, CompressionKind};
use fs_core::platform::DeviceRef;
use serde::Serialize;

/// A new pool, read back from its devices.
#[derive(Debug, Serialize)]
pub struct Summary {
    name: String,
    id: String,
    devices: Vec<DeviceSummary>,
    data_profile: &'static str,
    metadata_profile: &'static str,
    node_bytes: u32,
    chunk_bytes: u64,
    checksum: &'static str,
    compression: String,
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct DeviceSummary {
    path: String,
    id: String,
    bytes: u64,
}

impl Summary {
    /// Reads labels and the superblock of what has just been made: a pool that cannot be read back
    /// must not be called made.
    pub(crate) fn read_back(
        devices: &[DeviceRef],
        options: &FormatOptions,
    ) -> Result<Summary, Failure> {
        let mut parts = Vec::new();
        let mut newest = None;
        for device in devices {
            let areas = stored::read_areas(&**device);
            let label = stored::best_label(&areas).ok_or_else(|| {
                Failure::new(format_args!("{}: the label cannot be read back", device.name()))
            })?;
            parts.push(DeviceSummary {
                path: device.name().to_string(),
                id: format_uuid(&label.device_id),
                bytes: label.device_bytes,
            });
            newest = newest.or_else(|| stored::newest_superblock(&areas).cloned());
        }
        let superblock =
            newest.ok_or_else(|| Failure::new("no superblock can be read back from the pool"))?;
        Ok(Summary {
            name: options.name.clone(),
            id: format_uuid(&superblock.pool_id),
            devices: parts,
            data_profile: superblock.data_profile.name(),
            metadata_profile: superblock.metadata_profile.name(),
            node_bytes: superblock.node_bytes,
            chunk_bytes: superblock.chunk_bytes,
            checksum: checksum_name(options.checksum),
            compression: compression_name(options),
            dry_run: false,
        })
    }

    /// Prints as the arguments ask.
    pub(crate) fn print(mut self, arguments: &Arguments) {
        self.dry_run = arguments.dry_run;
        if arguments.json {
            say!("{:#}", serde_json::json!(self));
        } else if !arguments.quiet {
            cairn_host::output::text(&self.table());
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let mut row = |name: &str, value: &str| {
            text.push_str(&format!("{:<14}{value}\n", format!("{name}:")));
        };
        row("Pool", if self.name.is_empty() { "(no name)" } else { &self.name });
        row("UUID", &self.id);
        for device in &self.devices {
            row("Device", &format!("{}, {}", device.path, format_size(device.bytes)));
        }
        let (data, metadata) = (self.data_profile, self.metadata_profile);
        row("Profiles", &format!("data {data}, metadata {metadata}"));
        row("Node size", &format_size(self.node_bytes.into()));
        row("Chunk size", &format_size(self.chunk_bytes));
        row("Checksum", &format!("data {}, metadata blake3", self.checksum));
        row("Compression", &self.compression);
        if self.dry_run {
            text.push_str("Dry run: nothing was written.\n");
        }
        text
    }
}

fn checksum_name(kind: ChecksumKind) -> &'static str {
    match kind {
        ChecksumKind::None => "none",
        ChecksumKind::Crc32c => "crc32c",
        ChecksumKind::Blake3 => "blake3",
    }
}

fn compression_name(options: &FormatOptions) -> String {
    match (options.compression, options.compression_level) {
        (CompressionKind::None, _) => "none".into(),
        (CompressionKind::Zstd, 0) => "zstd".into(),
        (CompressionKind::Zstd, level) => format!("zstd:{level}"),
    }
}
