//! Stands in for `fs_core::engine` until the engine is there. To be replaced by
//! `use fs_core::engine::{format, FormatOptions, FormatSummary};`.
#![allow(missing_docs, dead_code, reason = "replaced by the engine's own definitions")]

use fs_core::error::Error;
use fs_core::format::chunk::Profile;
use fs_core::format::ptr::{ChecksumKind, CompressionKind};
use fs_core::platform::{DeviceRef, Platform, Result};

pub struct FormatOptions {
    pub name: String,
    pub pool_id: Option<[u8; 16]>,
    pub node_bytes: u32,
    pub data_profile: Profile,
    pub metadata_profile: Profile,
    pub chunk_bytes: Option<u64>,
    pub compression: CompressionKind,
    pub compression_level: i8,
    pub checksum: ChecksumKind,
    pub root_mode: u32,
    pub root_uid: u32,
    pub root_gid: u32,
}

pub struct FormatSummary;

pub fn format(
    devices: Vec<DeviceRef>,
    _platform: Platform,
    _options: &FormatOptions,
) -> Result<FormatSummary> {
    const MINIMUM: u64 = 8 << 20;
    if devices.iter().any(|device| device.geometry().bytes < MINIMUM) {
        return Err(Error::TooSmall { minimum: MINIMUM });
    }
    Err(Error::Argument { what: "this build has no engine to write a pool with" })
}
