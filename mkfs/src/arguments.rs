//! The command line.

use cairn_host::parse::{parse_size, parse_uuid, BadSize};
use clap::{ArgAction, Parser, ValueEnum};
use fs_core::engine::FormatOptions;
use fs_core::format::chunk::Profile;
use fs_core::format::label::name_fault;
use fs_core::format::node::NODE_BYTES_ALLOWED;
use fs_core::format::ptr::{ChecksumKind, CompressionKind};
use std::path::PathBuf;

/// Make a cairn pool on block devices or image files.
///
/// A target that is not there yet is made as a sparse image file when --size is given. A device
/// that is mounted or otherwise in use is refused always, one that holds another filesystem or a
/// partition table unless --force is given.
#[derive(Clone, Debug, Parser)]
#[command(name = "mkfs.cairn", version, max_term_width = 100)]
pub struct Arguments {
    /// Block devices or image files, all those of the pool
    #[arg(value_name = "TARGET", required_unless_present = "features")]
    pub targets: Vec<PathBuf>,

    /// Size of the image file to make or resize, such as 64M or 10G
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = size)]
    pub size: Option<u64>,

    /// Name of the pool, up to 63 bytes: no '/', '@', '#' or control characters, and no '-' first
    #[arg(short = 'L', long, value_name = "NAME", default_value = "", hide_default_value = true,
          allow_hyphen_values = true, value_parser = label)]
    pub label: String,

    /// Id of the pool [default: random]
    #[arg(short = 'U', long, value_name = "UUID", value_parser = uuid)]
    pub uuid: Option<[u8; 16]>,

    /// Overwrite what is on the target
    #[arg(short, long)]
    pub force: bool,

    /// Check everything and show the result, but write nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,

    /// Compression of new files: none, zstd or zstd:LEVEL
    #[arg(long, value_name = "KIND", default_value = "zstd", value_parser = compression)]
    pub compress: Compression,

    /// Checksum of file data
    #[arg(long, value_name = "KIND", default_value = "crc32c")]
    pub checksum: Checksum,

    /// How file data lies on the devices [default: single]
    #[arg(short = 'd', long, value_name = "PROFILE", visible_alias = "data-profile")]
    pub profile: Option<Spread>,

    /// How metadata lies on the devices [default: dup on one device; on several a mirror, of as
    /// many copies as file data has]
    #[arg(short = 'm', long, value_name = "PROFILE")]
    pub metadata_profile: Option<Spread>,

    /// Bytes of a tree node: 16K, 32K or 64K
    #[arg(long, value_name = "SIZE", default_value = "16K", value_parser = node_size)]
    pub node_size: u32,

    /// Optional features of the format to use, separated by commas; "list" shows them
    #[arg(short = 'O', long, value_name = "FEATURE", value_delimiter = ',', value_parser = feature)]
    pub features: Vec<Feature>,

    /// Do not discard the device first
    #[arg(short = 'K', long)]
    pub no_discard: bool,

    /// Owner of the root directory [default: the user who runs the command]
    #[arg(long, value_name = "UID[:GID]", value_parser = owner)]
    pub root_owner: Option<Owner>,

    /// Make the same image each time: ids follow from TEXT, times are SOURCE_DATE_EPOCH or 1970
    #[arg(long, value_name = "TEXT")]
    pub seed: Option<String>,

    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,

    /// Print nothing but errors
    #[arg(short, long, conflicts_with_all = ["verbose", "json"])]
    pub quiet: bool,

    /// Print more; tell what is being done
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,

    /// Seconds to wait for a device that is being released
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub wait: u64,
}

/// Compression of new files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// How.
    pub kind: CompressionKind,
    /// How hard; zero is the default level.
    pub level: i8,
}

/// Owner of the root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What -O names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// No feature: show all.
    List,
}

/// Checksums of file data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Checksum {
    Crc32c,
    Blake3,
    None,
}

/// Profiles this version can make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Spread {
    /// One copy, on one device
    Single,
    /// Two copies on one device
    Dup,
    /// One copy, striped over all devices
    #[value(alias = "raid0")]
    Stripe,
    /// Copies on two devices
    #[value(aliases = ["mirror2", "raid1"])]
    Mirror,
    /// Copies on three devices
    #[value(alias = "raid1c3")]
    Mirror3,
    /// Copies on four devices
    #[value(alias = "raid1c4")]
    Mirror4,
    /// Mirrors of two devices, striped
    #[value(name = "stripe+mirror", alias = "raid10")]
    StripeMirror,
}

impl From<Checksum> for ChecksumKind {
    fn from(choice: Checksum) -> ChecksumKind {
        match choice {
            Checksum::Crc32c => ChecksumKind::Crc32c,
            Checksum::Blake3 => ChecksumKind::Blake3,
            Checksum::None => ChecksumKind::None,
        }
    }
}

impl From<Spread> for Profile {
    fn from(choice: Spread) -> Profile {
        match choice {
            Spread::Single => Profile::Single,
            Spread::Dup => Profile::Dup,
            Spread::Stripe => Profile::Stripe,
            Spread::Mirror => Profile::Mirror,
            Spread::Mirror3 => Profile::Mirror3,
            Spread::Mirror4 => Profile::Mirror4,
            Spread::StripeMirror => Profile::StripeMirror,
        }
    }
}

/// The profile of metadata that goes with one of data on so many devices: metadata must not be lost
/// with fewer devices than data.
fn matching(data: Profile, devices: usize) -> Profile {
    match data {
        Profile::Mirror3 | Profile::Mirror4 => data,
        Profile::Mirror | Profile::StripeMirror => Profile::Mirror,
        _ if devices > 1 => Profile::Mirror,
        _ => Profile::Dup,
    }
}

impl Arguments {
    /// Profiles of data and metadata.
    fn profiles(&self) -> (Profile, Profile) {
        let data = self.profile.map_or(Profile::Single, Profile::from);
        let metadata = self.metadata_profile.map(Profile::from);
        (data, metadata.unwrap_or_else(|| matching(data, self.targets.len())))
    }

    /// The profile that needs more devices than there are, and how many it needs.
    pub(crate) fn lacks_devices(&self) -> Option<(Profile, u64)> {
        let (data, metadata) = self.profiles();
        let count = self.targets.len() as u64;
        let lacking = [data, metadata].into_iter().find(|profile| profile.devices_min() > count);
        lacking.map(|profile| (profile, profile.devices_min()))
    }

    /// What the core is asked for.
    pub(crate) fn format_options(&self) -> FormatOptions {
        let owner = self.root_owner.unwrap_or_else(|| Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        });
        let (data_profile, metadata_profile) = self.profiles();
        FormatOptions {
            name: self.label.clone(),
            pool_id: self.uuid,
            node_bytes: self.node_size,
            data_profile,
            metadata_profile,
            chunk_bytes: None,
            compression: self.compress.kind,
            compression_level: self.compress.level,
            checksum: self.checksum.into(),
            root_mode: 0o755,
            root_uid: owner.uid,
            root_gid: owner.gid,
        }
    }
}

fn size(text: &str) -> Result<u64, BadSize> {
    parse_size(text)
}

fn uuid(text: &str) -> Result<[u8; 16], String> {
    let id = parse_uuid(text)?;
    match id {
        [0, ..] if id == [0; 16] => Err("the nil UUID names nothing".into()),
        id => Ok(id),
    }
}

fn label(text: &str) -> Result<String, String> {
    match name_fault(text.as_bytes()) {
        Some(fault) => Err(fault.into()),
        None => Ok(text.into()),
    }
}

/// The same as `cairn set` and the mount option take: those beyond need memory out of proportion.
const LEVELS: std::ops::RangeInclusive<i8> = -7..=19;

fn compression(text: &str) -> Result<Compression, String> {
    let (name, level) = match text.split_once(':') {
        Some((name, level)) => (name, Some(level)),
        None => (text, None),
    };
    match (name, level) {
        ("none", None) => Ok(Compression { kind: CompressionKind::None, level: 0 }),
        ("zstd", None) => Ok(Compression { kind: CompressionKind::Zstd, level: 0 }),
        ("zstd", Some(level)) => {
            let level = level.parse().ok().filter(|level| LEVELS.contains(level));
            let level =
                level.ok_or("the level must be from 1 to 19, or from -7 to -1 for speed")?;
            Ok(Compression { kind: CompressionKind::Zstd, level })
        }
        _ => Err("one of none, zstd, zstd:LEVEL is wanted".into()),
    }
}

/// The format has no optional feature yet: every pool of version 1 has all there is.
fn feature(text: &str) -> Result<Feature, String> {
    match text {
        "list" => Ok(Feature::List),
        _ => Err("there is no such feature; -O list shows those there are".into()),
    }
}

fn node_size(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text).map_err(|e| e.to_string())?;
    NODE_BYTES_ALLOWED
        .into_iter()
        .find(|allowed| u64::from(*allowed) == bytes)
        .ok_or_else(|| "one of 16K, 32K, 64K is wanted".into())
}

fn owner(text: &str) -> Result<Owner, String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    let number = |part: &str| {
        let id = part.parse().ok().filter(|id| *id != u32::MAX);
        id.ok_or_else(|| format!("'{part}' is not a user or group number"))
    };
    Ok(Owner { uid: number(uid)?, gid: number(gid)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn metadata_is_at_least_as_safe_as_data() {
        let profiles = |line: &str| {
            let arguments = Arguments::parse_from(line.split(' '));
            let (data, metadata) = arguments.profiles();
            format!("{} {}", data.name(), metadata.name())
        };
        assert_eq!(profiles("mkfs a"), "single dup");
        assert_eq!(profiles("mkfs a b"), "single mirror");
        assert_eq!(profiles("mkfs a b c --profile mirror3"), "mirror3 mirror3");
        assert_eq!(profiles("mkfs a b c d -d stripe+mirror"), "stripe+mirror mirror");
        assert_eq!(profiles("mkfs a b -d raid0 -m single"), "stripe single");
        let lacking = Arguments::parse_from(["mkfs", "a", "b", "-d", "mirror3"]).lacks_devices();
        assert_eq!(lacking, Some((Profile::Mirror3, 3)));
    }

    #[test]
    fn compression_is_written_as_a_kind_and_a_level() {
        let zstd = |level| Ok(Compression { kind: CompressionKind::Zstd, level });
        assert_eq!(compression("zstd"), zstd(0));
        assert_eq!(compression("zstd:19"), zstd(19));
        assert_eq!(compression("zstd:-5"), zstd(-5));
        for bad in ["", "lz4", "zstd:", "zstd:20", "zstd:x", "none:3", "zstd:-8", "zstd:999"] {
            assert!(compression(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_owner_without_a_group_has_the_group_of_the_same_number() {
        assert_eq!(owner("1000"), Ok(Owner { uid: 1000, gid: 1000 }));
        assert_eq!(owner("0:5"), Ok(Owner { uid: 0, gid: 5 }));
        for bad in ["", ":", "1:", "-1", "4294967295", "root"] {
            assert!(owner(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_that_do_not_fit_print_or_name_are_refused() {
        assert!(label(&"x".repeat(63)).is_ok());
        assert!(label(&"x".repeat(64)).is_err());
        for bad in ["a\nb", "a\u{85}b", "a/b", "a@b", "a#b", "-a"] {
            assert!(label(bad).is_err(), "{bad:?}");
        }
        for good in ["", "tank", "a-b", "my pool", "B\u{e4}r", "a=b:c", "."] {
            assert_eq!(label(good), Ok(good.into()));
        }
    }
}
