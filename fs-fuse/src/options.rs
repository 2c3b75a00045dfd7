//! What stands after `-o`.
//!
//! Three kinds of options: those of any mount (`ro`, `noatime`, ...), those for other readers of
//! fstab (`noauto`, `x-systemd...`), which are accepted and ignored, and cairn's own. Anything else
//! is an error, because a misspelt option must not be mistaken for one that is in force; `-s`
//! overrides that.

use cairn_host::versions::VersionName;
use rustix::mount::{MountAttrFlags, MountFlags};

/// How new data is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// By zstd, at a level; 0 is its default.
    Zstd(i8),
}

/// How requests travel from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Over io_uring where the kernel offers it.
    #[default]
    Auto,
    /// Over /dev/fuse.
    Device,
    /// Over io_uring; that it cannot be had is worth a warning.
    Uring,
}

/// Parsed options. Defaults are those of a mount by root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent options of a mount")]
pub struct Options {
    /// Refuse changes.
    pub read_only: bool,
    /// Rather fail than mount read-only what is write-protected.
    pub insist_on_writing: bool,
    /// Change the options of an existing mount.
    pub remount: bool,
    /// Let users other than the one who mounts in; always so for root.
    pub allow_other: bool,
    /// Per-mount flags, such as `nosuid`.
    pub flags: Flags,
    /// Open the pool without devices that are missing.
    pub degraded: bool,
    /// Further devices of the pool.
    pub devices: Vec<String>,
    /// What to mount instead of the default subvolume: `SUBVOLUME` or `SUBVOLUME@SNAPSHOT`, from
    /// the root subvolume on.
    pub subvolume: Option<String>,
    /// The snapshot of it to mount.
    pub snapshot: Option<String>,
    /// Mount the pool as of this group, read-only.
    pub txg: Option<u64>,
    /// Mount the pool as of the newest group before the last that is whole, read-only.
    pub rewind: bool,
    /// Override of the pool's compression.
    pub compression: Option<Compression>,
    /// Longest time in seconds that a change stays unwritten without fsync.
    pub commit_seconds: Option<u32>,
    /// Memory for cached metadata and data, in bytes.
    pub cache_bytes: Option<u64>,
    /// Memory for changes that are not yet written, in bytes.
    pub dirty_bytes: Option<u64>,
    /// Number of threads that answer requests.
    pub threads: Option<usize>,
    /// How requests travel from the kernel.
    pub transport: Transport,
    /// Security contexts, for the kernel.
    pub security: Vec<(String, String)>,
}

/// Least memory for changes: two threads' worth of it.
const DIRTY_BYTES_MIN: u64 = 16 << 20;

/// Flags of a mount and of its superblock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named and documented by mount(8)")]
#[expect(clippy::struct_excessive_bools, reason = "independent flags of mount(8)")]
pub struct Flags {
    pub nosuid: bool,
    pub nodev: bool,
    pub noexec: bool,
    pub noatime: bool,
    pub nodiratime: bool,
    pub strictatime: bool,
    pub nosymfollow: bool,
    pub sync: bool,
    pub dirsync: bool,
    pub lazytime: bool,
}

/// An option that cannot be used, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadOption(pub String);

impl std::fmt::Display for BadOption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Options for other readers of fstab, or about matters that are always so. mount(8) itself turns
/// `user` and its like into `nosuid,nodev,noexec`.
const IGNORED: &[&str] = &[
    "_netdev",
    "async",
    "auto",
    "bg",
    "defaults",
    "default_permissions",
    "fg",
    "group",
    "intr",
    "iversion",
    "loop",
    "loud",
    "mand",
    "noauto",
    "nofail",
    "nogroup",
    "noiversion",
    "nomand",
    "nonempty",
    "noowner",
    "nouser",
    "nousers",
    "owner",
    "quiet",
    "rw",
    "silent",
    "user",
    "users",
];

/// The same with a value. Those in the second line are what the mount table shows of a FUSE mount:
/// a remount is given them back.
const IGNORED_WITH_VALUE: &[&str] = &[
    "comment",
    "fsname",
    "helper",
    "sizelimit",
    "subtype",
    "uhelper",
    "blksize",
    "fd",
    "group_id",
    "max_read",
    "rootmode",
    "user_id",
];

/// Options that say nothing without a value.
const NEEDS_VALUE: &[&str] = &[
    "cache",
    "commit",
    "compress",
    "device",
    "dirty",
    "snapshot",
    "subvol",
    "threads",
    "transport",
    "txg",
];

const SECURITY: &[&str] = &["context", "defcontext", "fscontext", "rootcontext"];

impl Options {
    /// Adds a list separated by commas. A comma within double quotes or after a backslash
    /// belongs to the value.
    ///
    /// # Errors
    /// The first option that is unknown or has a bad value. With `sloppy` unknown ones are
    /// ignored.
    pub fn add(&mut self, list: &str, sloppy: bool) -> Result<(), BadOption> {
        for option in split(list) {
            let known = self.add_one(&option)?;
            if !known && !sloppy {
                return Err(BadOption(format!("unknown mount option '{option}'")));
            }
        }
        Ok(())
    }

    fn add_one(&mut self, option: &str) -> Result<bool, BadOption> {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        if name.starts_with("x-") || name.starts_with("X-") {
            return Ok(true);
        }
        match value {
            None if NEEDS_VALUE.contains(&name) => {
                Err(BadOption(format!("mount option '{name}' needs a value: {name}=...")))
            }
            None => Ok(self.add_flag(name) || name.is_empty()),
            Some(value) => self.add_value(name, value),
        }
    }

    fn add_flag(&mut self, name: &str) -> bool {
        let flags = &mut self.flags;
        match name {
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "remount" => self.remount = true,
            "degraded" => self.degraded = true,
            "nodegraded" => self.degraded = false,
            "rewind" => self.rewind = true,
            "allow_other" => self.allow_other = true,
            "noallow_other" => self.allow_other = false,
            "suid" => flags.nosuid = false,
            "nosuid" => flags.nosuid = true,
            "dev" => flags.nodev = false,
            "nodev" => flags.nodev = true,
            "exec" => flags.noexec = false,
            "noexec" => flags.noexec = true,
            "noatime" => (flags.noatime, flags.strictatime) = (true, false),
            "atime" | "relatime" | "nostrictatime" => {
                (flags.noatime, flags.strictatime) = (false, false);
            }
            "strictatime" | "norelatime" => (flags.noatime, flags.strictatime) = (false, true),
            "nodiratime" => flags.nodiratime = true,
            "diratime" => flags.nodiratime = false,
            "nosymfollow" => flags.nosymfollow = true,
            "symfollow" => flags.nosymfollow = false,
            "sync" => flags.sync = true,
            "async" => flags.sync = false,
            "dirsync" => flags.dirsync = true,
            "lazytime" => flags.lazytime = true,
            "nolazytime" => flags.lazytime = false,
            name => return IGNORED.contains(&name),
        }
        true
    }

    fn add_value(&mut self, name: &str, value: &str) -> Result<bool, BadOption> {
        let bad = || {
            let allowed = match name {
                "compress" => "none, zstd or zstd:LEVEL (-7 to 19)",
                "commit" => "1 to 3600 seconds",
                "cache" => "a size such as 256M",
                "dirty" => "a size of at least 16M",
                "threads" => "1 to 256",
                "degraded" => "yes or no",
                "device" => "the path of a device",
                "snapshot" => "the name of a snapshot",
                "txg" => "the number of a group (cairn history shows them)",
                _ => "auto, device or uring",
            };
            BadOption(format!("mount option '{name}' cannot be '{value}': it takes {allowed}"))
        };
        match name {
            "device" if !value.is_empty() => self.devices.push(value.to_string()),
            "device" => return Err(bad()),
            "degraded" => {
                self.degraded = match value {
                    "yes" => true,
                    "no" => false,
                    _ => return Err(bad()),
                }
            }
            "compress" => self.compression = Some(parse_compression(value).ok_or_else(bad)?),
            "commit" => {
                let seconds = value.parse().ok().filter(|s| (1..=3600).contains(s));
                self.commit_seconds = Some(seconds.ok_or_else(bad)?);
            }
            "subvol" => self.subvolume = Some(value.to_string()),
            "snapshot" if !value.is_empty() => self.snapshot = Some(value.to_string()),
            "snapshot" => return Err(bad()),
            "txg" => {
                let txg = value.parse().ok().filter(|txg| *txg > 0);
                self.txg = Some(txg.ok_or_else(bad)?);
            }
            "cache" => self.cache_bytes = Some(parse_bytes(value).ok_or_else(bad)?),
            "dirty" => {
                let bytes = parse_bytes(value).filter(|bytes| *bytes >= DIRTY_BYTES_MIN);
                self.dirty_bytes = Some(bytes.ok_or_else(bad)?);
            }
            "threads" => {
                let threads = value.parse().ok().filter(|t| (1..=256).contains(t));
                self.threads = Some(threads.ok_or_else(bad)?);
            }
            "transport" => {
                self.transport = match value {
                    "auto" => Transport::Auto,
                    "device" => Transport::Device,
                    "uring" => Transport::Uring,
                    _ => return Err(bad()),
                }
            }
            _ if SECURITY.contains(&name) => {
                self.security.push((name.to_string(), value.to_string()));
            }
            _ => return Ok(IGNORED_WITH_VALUE.contains(&name)),
        }
        Ok(true)
    }

    /// cairn's own options that were given, in one way of writing each.
    pub fn own(&self) -> Vec<String> {
        let number = |name: &str, value: Option<u64>| value.map(|value| format!("{name}={value}"));
        let subvolume = (self.subvolume.is_some() || self.snapshot.is_some()).then(|| {
            let mut name = VersionName::parse(self.subvolume.as_deref().unwrap_or_default());
            name.snapshot = self.snapshot.clone().or(name.snapshot);
            format!("subvol={name}")
        });
        let compression = self.compression.map(|compression| match compression {
            Compression::None => "compress=none".to_string(),
            Compression::Zstd(0) => "compress=zstd".to_string(),
            Compression::Zstd(level) => format!("compress=zstd:{level}"),
        });
        let transport = match self.transport {
            Transport::Auto => None,
            Transport::Device => Some("transport=device".to_string()),
            Transport::Uring => Some("transport=uring".to_string()),
        };
        let all = [
            subvolume,
            compression,
            number("commit", self.commit_seconds.map(u64::from)),
            number("cache", self.cache_bytes),
            number("dirty", self.dirty_bytes),
            number("threads", self.threads.map(|threads| threads as u64)),
            transport,
            self.degraded.then(|| "degraded".to_string()),
            number("txg", self.txg),
            self.rewind.then(|| "rewind".to_string()),
        ];
        all.into_iter().flatten().collect()
    }

    /// Attributes of the mount, for the new mount API.
    pub fn mount_attributes(&self) -> MountAttrFlags {
        let flags = &self.flags;
        [
            (self.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
            (flags.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
            (flags.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
            (flags.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
            (flags.noatime, MountAttrFlags::MOUNT_ATTR_NOATIME),
            (flags.strictatime, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
            (flags.nodiratime, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
            (flags.nosymfollow, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(MountAttrFlags::empty(), |all, (_, flag)| all | flag)
    }

    /// Names of the superblock's flags, for the new mount API.
    pub fn superblock_flags(&self) -> impl Iterator<Item = &'static str> {
        let flags = self.flags;
        [
            (self.read_only, "ro"),
            (flags.sync, "sync"),
            (flags.dirsync, "dirsync"),
            (flags.lazytime, "lazytime"),
        ]
        .into_iter()
        .filter_map(|(wanted, name)| wanted.then_some(name))
    }

    /// Flags in the words of fusermount3, which adds `nosuid` and `nodev` itself.
    pub fn helper_flags(&self) -> impl Iterator<Item = &'static str> {
        let flags = self.flags;
        [
            (flags.noexec, "noexec"),
            (flags.noatime, "noatime"),
            (flags.nodiratime, "nodiratime"),
            (flags.sync, "sync"),
            (flags.dirsync, "dirsync"),
        ]
        .into_iter()
        .filter_map(|(wanted, name)| wanted.then_some(name))
    }

    /// Whether what is to be mounted never changes.
    pub fn is_of_the_past(&self) -> bool {
        let named = self.subvolume.as_ref().is_some_and(|name| name.contains('@'));
        self.snapshot.is_some() || named || self.names_group()
    }

    /// Whether an older group is to be mounted.
    pub fn names_group(&self) -> bool {
        self.txg.is_some() || self.rewind
    }

    /// Everything as flags of mount(2), for a remount.
    pub fn mount_flags(&self) -> MountFlags {
        let flags = &self.flags;
        [
            (self.read_only, MountFlags::RDONLY),
            (flags.nosuid, MountFlags::NOSUID),
            (flags.nodev, MountFlags::NODEV),
            (flags.noexec, MountFlags::NOEXEC),
            (flags.noatime, MountFlags::NOATIME),
            (flags.strictatime, MountFlags::STRICTATIME),
            (flags.nodiratime, MountFlags::NODIRATIME),
            (flags.sync, MountFlags::SYNCHRONOUS),
            (flags.dirsync, MountFlags::DIRSYNC),
            (flags.lazytime, MountFlags::LAZYTIME),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(MountFlags::empty(), |all, (_, flag)| all | flag)
    }
}

fn split(list: &str) -> Vec<String> {
    let mut options = vec![String::new()];
    let (mut quoted, mut escaped) = (false, false);
    for c in list.chars() {
        let current = options.last_mut().expect("there is always a last option");
        match c {
            _ if escaped => {
                current.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            ',' if !quoted => options.push(String::new()),
            c => current.push(c),
        }
    }
    options
}

fn parse_compression(value: &str) -> Option<Compression> {
    match value.split_once(':') {
        None => match value {
            "none" | "no" | "off" => Some(Compression::None),
            "zstd" | "on" => Some(Compression::Zstd(0)),
            _ => None,
        },
        Some(("zstd", level)) => {
            level.parse().ok().filter(|l| (-7..=19).contains(l)).map(Compression::Zstd)
        }
        Some(_) => None,
    }
}

/// A number of bytes, with K, M, G or T for powers of 1024.
fn parse_bytes(value: &str) -> Option<u64> {
    let digits = value.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match value[digits.len()..].to_ascii_lowercase().trim_end_matches("ib") {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &str) -> Result<Options, BadOption> {
        let mut options = Options::default();
        options.add(list, false).map(|()| options)
    }

    #[test]
    fn options_of_fstab_that_concern_others_are_accepted() {
        let list = "defaults,noauto,x-systemd.automount,x-systemd.device-timeout=30,nofail,_netdev";
        assert_eq!(parse(list).unwrap(), Options::default());
        assert_eq!(parse("").unwrap(), Options::default());
    }

    #[test]
    fn the_last_of_two_contrary_options_wins() {
        assert!(!parse("ro,rw").unwrap().read_only);
        assert!(parse("rw,ro").unwrap().read_only);
        assert!(!parse("noatime,relatime").unwrap().flags.noatime);
        assert!(!parse("nosuid,suid").unwrap().flags.nosuid);
    }

    #[test]
    fn an_unknown_option_is_named_in_the_error_unless_sloppy() {
        let error = parse("ro,compres=zstd").unwrap_err();
        assert_eq!(error.0, "unknown mount option 'compres=zstd'");
        let mut options = Options::default();
        options.add("ro,compres=zstd", true).unwrap();
        assert!(options.read_only);
    }

    #[test]
    fn an_option_without_the_value_it_needs_is_refused_even_when_sloppy() {
        for name in NEEDS_VALUE {
            let error = Options::default().add(name, true).unwrap_err();
            assert_eq!(error.0, format!("mount option '{name}' needs a value: {name}=..."));
        }
    }

    #[test]
    fn a_bad_value_is_refused_even_when_sloppy() {
        for list in [
            "commit=0",
            "commit=x",
            "compress=lzma",
            "compress=zstd:99",
            "threads=0",
            "transport=x",
        ] {
            assert!(Options::default().add(list, true).is_err(), "{list}");
        }
    }

    #[test]
    fn the_manual_names_options_that_exist_and_all_that_do_something() {
        let manual = include_str!("../../docs/man/cairn-mount.5");
        // Names stand in bold; what a value may be, in italics.
        let bold = manual.split("\\fB").skip(1).map(|rest| rest.split("\\f").next().unwrap());
        let named: Vec<String> = bold.map(|name| name.replace('\\', "")).collect();
        for name in &named {
            let known = match name.as_str() {
                // Values of `compress`.
                "off" | "no" | "on" => true,
                "-s" | "x-*" => true,
                name => match name.strip_suffix('=') {
                    None => Options::default().add_flag(name),
                    // Refusing a value is as good as taking it.
                    Some(name) => Options::default().add_value(name, "?") != Ok(false),
                },
            };
            assert!(known, "{name} is in the manual only");
        }
        let ours = "compress= commit= cache= dirty= threads= transport= degraded device= \
                    subvol= snapshot= allow_other";
        let flags = "ro rw remount noallow_other suid nosuid dev nodev exec noexec atime noatime \
                     relatime norelatime strictatime nostrictatime diratime nodiratime symfollow \
                     nosymfollow sync async dirsync lazytime nolazytime context= fscontext= \
                     defcontext= rootcontext=";
        for name in ours.split_whitespace().chain(flags.split_whitespace()) {
            assert!(named.iter().any(|other| other == name), "{name} is not in the manual");
        }
    }

    #[test]
    fn values_are_read() {
        let options =
            parse("compress=zstd:7,commit=30,cache=512M,dirty=16M,threads=3,transport=device")
                .unwrap();
        assert_eq!(options.compression, Some(Compression::Zstd(7)));
        assert_eq!(options.commit_seconds, Some(30));
        assert_eq!(options.cache_bytes, Some(512 << 20));
        assert_eq!(options.dirty_bytes, Some(16 << 20));
        assert!(parse("dirty=15M").is_err());
        assert_eq!(options.threads, Some(3));
        assert_eq!(options.transport, Transport::Device);
        assert_eq!(parse_bytes("1GiB"), Some(1 << 30));
        assert_eq!(parse_bytes("99999999T"), None);
        assert_eq!(parse_bytes("G"), None);
    }

    #[test]
    fn own_options_are_written_in_one_way() {
        let own = |list| parse(list).unwrap().own().join(",");
        assert_eq!(own("ro,noatime,allow_other,device=/dev/x"), "");
        assert_eq!(own("compress=on,cache=1G,transport=auto"), "compress=zstd,cache=1073741824");
        let whole = "subvol=home@monday,compress=none,commit=30,dirty=16777216,threads=3,degraded";
        assert_eq!(own(whole), whole);
        assert_eq!(own("snapshot=monday,subvol=/a/b/"), "subvol=a/b@monday");
        assert_eq!(own("subvol="), "subvol=/");
        assert_eq!(own("transport=uring,compress=zstd:-3"), "compress=zstd:-3,transport=uring");
    }

    #[test]
    fn a_quoted_comma_belongs_to_the_value() {
        let options = parse("context=\"system_u:object_r:t:s0:c1,c2\",ro").unwrap();
        assert_eq!(options.security[0].1, "system_u:object_r:t:s0:c1,c2");
        assert!(options.read_only);
    }
}
