//! The command line.

use cairn_host::parse::parse_size;
use cairn_host::properties;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use fs_core::vfs::BLOCK_BYTES_MAX;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Look at cairn pools and administer them.
#[derive(Clone, Debug, Parser)]
#[command(name = "cairn", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what a pool is: name, id, devices, settings
    Info(Info),
    /// Show where the space of a pool is
    Df(Df),
    /// Show whether pools are well: the state and the errors of each device
    Status(Status),
    /// Show the past commits of a pool that it can still be mounted as of, read-only
    History(History),
    /// Read every copy of all that a pool holds, and repair what is bad
    Scrub(Scrub),
    /// Add, remove, replace and resize the devices of a pool
    #[command(subcommand)]
    Device(DeviceVerb),
    /// Count the errors of the devices of pools anew from zero
    Clear(Clear),
    /// Make everything that is complete now durable
    Sync(Sync),
    /// Discard free space: tell the devices of mounted pools what they need not keep
    Trim(Trim),
    /// Make a file that shares the data of another one
    Clone(CloneFile),
    /// Find what files have in common, and have them share it
    Dedup(Dedup),
    /// Make, show and delete subvolumes
    #[command(subcommand, visible_alias = "subvol")]
    Subvolume(Subvolume),
    /// Make, show and delete snapshots; go back to them; begin anew from them
    #[command(subcommand, visible_alias = "snap")]
    Snapshot(Snapshot),
    /// Show properties of subvolumes, snapshots, files and directories, and where they come from
    Get(Get),
    /// Set properties of subvolumes, files and directories
    Set(Set),
    /// Choose a property no more: take what is above
    Inherit(Inherit),
    /// Name the content of a subvolume or snapshot: equal where the same is stored, however
    Id(Id),
    /// Write a snapshot as a stream, all of it or what came after an earlier one
    Send(Send),
    /// Receive snapshots from a stream, each as it was sent or not at all
    Receive(Receive),
    /// Look at streams
    #[command(subcommand)]
    Stream(Stream),
    /// Look at what is stored on a pool that is not mounted
    #[command(subcommand)]
    Inspect(Inspect),
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print what udev rules need to know of a device
    Udev {
        /// The device
        device: PathBuf,
    },
    /// Write the manual pages of all commands
    #[command(hide = true)]
    Man {
        /// Where to
        directory: PathBuf,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct OfPool {
    /// Mount point, device, image file or label; all devices of a pool with several
    #[arg(value_name = "POOL", required = true)]
    pub(crate) pool: Vec<PathBuf>,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) of: OfPool,
    /// As this older group has it; of a pool that is not mounted
    #[arg(long, value_name = "GROUP")]
    pub(crate) txg: Option<u64>,
}

/// Each commit is a transaction group. The last 16 are known, and what they held is there until its
/// place is used again: mount options txg=GROUP and rewind mount one of them, fsck.cairn --txg
/// checks it. A group is whole when all can be read that the newest does not have as well.
///
/// Exits with 3 when the newest group cannot be opened.
#[derive(Args, Clone, Debug)]
pub(crate) struct History {
    #[command(flatten)]
    pub(crate) of: OfPool,
    /// Read only what is needed to find files, not what they hold
    #[arg(long)]
    pub(crate) metadata_only: bool,
}

/// Exits with 3 when a pool is not well.
#[derive(Args, Clone, Debug)]
pub(crate) struct Status {
    /// Mount point, device, image file or label [default: all mounted pools]
    #[arg(value_name = "POOL")]
    pub(crate) pool: Vec<PathBuf>,
    /// Show only pools that are not well
    #[arg(short = 'x', long)]
    pub(crate) unwell: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Df {
    /// Mount point, device, image file or label [default: all mounted pools]
    #[arg(value_name = "POOL")]
    pub(crate) pool: Vec<PathBuf>,
    /// Print exact numbers of bytes
    #[arg(short = 'p', long)]
    pub(crate) exact: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Clear {
    /// Mount point, device, image file or label; all devices of a pool with several
    #[arg(value_name = "POOL", required = true)]
    pub(crate) pool: Vec<PathBuf>,
}

/// Verbs are for mounted pools. A scrub goes on when the pool is mounted again; one that is paused
/// stays so.
///
/// Exit codes: 0 when what was waited for or shown is in order, 1 when it failed, 3 when something
/// has no good copy any more, 4 when the scrub that was waited for was paused or cancelled.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Scrub {
    #[command(subcommand)]
    pub(crate) verb: Option<ScrubVerb>,
    /// Scrub a pool that is not mounted, and wait for it
    #[arg(long, required = true)]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) how: Option<ScrubOffline>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct ScrubOffline {
    /// Devices or image files of one pool; others of it are looked for
    #[arg(value_name = "DEVICE", required = true)]
    pub(crate) devices: Vec<PathBuf>,
    /// Look at no more bytes in a second, one copy counted
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) rate: Option<u64>,
    /// Print how it ended as JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ScrubVerb {
    /// Begin a scrub of a mounted pool
    Start {
        /// Mount point, device, image file or label
        #[arg(value_name = "POOL", required = true)]
        pool: Vec<PathBuf>,
        /// Wait until it ends
        #[arg(short, long)]
        wait: bool,
        /// Look at no more bytes in a second, one copy counted
        #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
        rate: Option<u64>,
    },
    /// Let the scrub of a mounted pool rest, also when it is mounted again
    Pause {
        /// Mount point, device, image file or label
        #[arg(value_name = "POOL", required = true)]
        pool: Vec<PathBuf>,
    },
    /// Let a scrub go on that was paused
    Resume {
        /// Mount point, device, image file or label
        #[arg(value_name = "POOL", required = true)]
        pool: Vec<PathBuf>,
        /// Wait until it ends
        #[arg(short, long)]
        wait: bool,
        /// From now on look at no more bytes in a second, one copy counted; 0 for any number
        #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
        rate: Option<u64>,
    },
    /// End the scrub of a mounted pool
    Cancel {
        /// Mount point, device, image file or label
        #[arg(value_name = "POOL", required = true)]
        pool: Vec<PathBuf>,
    },
    /// Show how the scrub of a pool stands, or how the last one ended
    Status {
        #[command(flatten)]
        of: OfPool,
        /// Wait until it ends
        #[arg(short, long)]
        wait: bool,
    },
}

/// A device of a pool.
#[derive(Args, Clone, Debug)]
pub(crate) struct DeviceOf {
    /// Mount point, or a device or image file of the pool
    #[arg(value_name = "POOL")]
    pub(crate) pool: PathBuf,
    /// The device: its path, its index, or its id; cairn device status shows them
    #[arg(value_name = "DEVICE")]
    pub(crate) device: String,
    /// Wait until it ends; always so when the pool is not mounted
    #[arg(short, long)]
    pub(crate) wait: bool,
}

/// All work on mounted pools, while they are in use, and on pools that are not mounted. What takes
/// longer goes on in the background, and after a crash or a remount.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum DeviceVerb {
    /// Add devices or image files to a pool; what is on them is lost
    Add {
        /// Mount point, or a device or image file of the pool
        #[arg(value_name = "POOL")]
        pool: PathBuf,
        /// The new ones
        #[arg(value_name = "DEVICE", required = true)]
        devices: Vec<PathBuf>,
        /// Also when they hold something
        #[arg(short, long)]
        force: bool,
    },
    /// Move everything off a device, and take it out of the pool
    Remove {
        #[command(flatten)]
        of: DeviceOf,
    },
    /// Put another device in the place of one, which may be missing or failing
    ///
    /// What other devices have copies of is read from them.
    Replace {
        #[command(flatten)]
        of: DeviceOf,
        /// The device or image file that comes in its place; what is on it is lost
        #[arg(value_name = "NEW")]
        new: PathBuf,
        /// Also when it holds something
        #[arg(short, long)]
        force: bool,
    },
    /// Use more of a device that has become larger, or less of it
    ///
    /// To make a device itself smaller, first have the pool use less of it.
    Resize {
        #[command(flatten)]
        of: DeviceOf,
        /// How much of it the pool is to use
        #[arg(value_name = "SIZE|max")]
        size: String,
    },
    /// Show the devices of a pool, and how a removal, replacement or shrinking stands
    Status {
        #[command(flatten)]
        of: OfPool,
        /// Wait until it ends
        #[arg(short, long)]
        wait: bool,
    },
    /// End a removal, replacement or shrinking that is under way
    ///
    /// What was moved stays where it is. A device that was to come in the place of another stays in
    /// the pool.
    Cancel {
        /// Mount point, or a device or image file of the pool
        #[arg(value_name = "POOL")]
        pool: PathBuf,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Sync {
    /// Mount points
    #[arg(value_name = "MOUNT_POINT", required = true)]
    pub(crate) mounts: Vec<PathBuf>,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Get {
    /// Print exact numbers of bytes, and times in seconds since 1970
    #[arg(short = 'p', long)]
    pub(crate) exact: bool,
    /// Print no heading, and tabs between columns
    #[arg(short = 'H', long)]
    pub(crate) no_heading: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
    /// Further devices of a pool that is not mounted
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<PathBuf>,
    /// Properties with commas between them, or all, which may be left out; and of what: a subvolume
    /// or snapshot, POOL/SUBVOLUME[@SNAPSHOT], or a file or directory of a mounted pool
    #[arg(value_name = "[PROPERTY|all] NAME", required = true)]
    pub(crate) words: Vec<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Set {
    /// compression=none, zstd or zstd:LEVEL (-7 to 19); checksum=none, crc32c or blake3; of a
    /// subvolume also atime=on, relative or off; readonly=on or off; referenced-limit=SIZE or none;
    /// own-limit=SIZE or none; MODULE:NAME=TEXT, also of a snapshot; or =inherit, to take what is
    /// above
    #[arg(value_name = "PROPERTY=VALUE", value_parser = parse_assignment)]
    pub(crate) assignment: (String, String),
    /// Further devices of a pool that is not mounted
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<PathBuf>,
    /// A subvolume, POOL/SUBVOLUME, or a file or directory of a mounted pool; what is made in a
    /// directory takes over its properties. Further PROPERTY=VALUE may come before them; write
    /// ./NAME for a path that looks like one
    #[arg(value_name = "NAME", required = true)]
    pub(crate) paths: Vec<PathBuf>,
}

pub(crate) fn parse_assignment(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected PROPERTY=VALUE")?;
    let property = parse_property(name)?;
    if value.is_empty() && !name.contains(':') {
        return Err(format!("{name} needs a value"));
    }
    Ok((property, value.to_string()))
}

fn parse_property(name: &str) -> Result<String, String> {
    match properties::is_settable(name) {
        true => Ok(name.to_string()),
        false => Err(format!(
            "{name:?} is no property; there are {}, and MODULE:NAME of your own",
            properties::SETTABLE.join(", ")
        )),
    }
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Inherit {
    /// What is not to be chosen here any more
    #[arg(value_name = "PROPERTY", value_parser = parse_property)]
    pub(crate) property: String,
    /// Further devices of a pool that is not mounted
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<PathBuf>,
    /// A subvolume, POOL/SUBVOLUME, or a file or directory of a mounted pool
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Trim {
    /// Mount points
    #[arg(value_name = "MOUNT_POINT", required = true)]
    pub(crate) mounts: Vec<PathBuf>,
    /// Leave alone what is free in shorter runs
    #[arg(short, long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    pub(crate) min_len: u64,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

/// Both files are on one mount and in one subvolume. Nothing is copied: where data cannot be shared
/// the command fails. What is written later to one of the files does not show in the other.
#[derive(Args, Clone, Debug)]
pub(crate) struct CloneFile {
    /// The file whose data is shared
    #[arg(value_name = "SOURCE")]
    pub(crate) source: PathBuf,
    /// The new file, or a directory to make it in
    #[arg(value_name = "TARGET")]
    pub(crate) target: PathBuf,
    /// Replace what TARGET holds, if it exists
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Share what begins here; TARGET may exist, and keeps what is around it
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) offset: Option<u64>,
    /// Share so much [default: up to the end of SOURCE]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) length: Option<u64>,
    /// Where in TARGET it begins [default: as in SOURCE]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) to: Option<u64>,
    /// Say what was done
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

/// What files hold, when they change, and what programs read of them stays as it is; only the room
/// that is taken for the same twice comes free, with the next commit. Files are compared while they
/// are in use: what is written meanwhile is left alone. Only root and whoever mounted the pool may
/// do that.
///
/// All paths are on one mount. Symbolic links are not followed, and nothing is shared between two
/// subvolumes. What a snapshot has too comes free when that is deleted. Files in a snapshot, in a
/// subvolume that refuses changes, and immutable ones stay as they are.
///
/// What is stored where is asked first: what is shared already is read once, and holes are not read
/// at all. Lists go to a file in TMPDIR, or /var/tmp: 44 bytes for each block.
///
/// Exit codes: 0 when all was looked at, 1 when that failed, 4 when something was wrong with some
/// files, which are named.
#[derive(Args, Clone, Debug)]
pub(crate) struct Dedup {
    /// Files, and directories with all that is below them
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<PathBuf>,
    /// Only say what would be shared
    #[arg(short = 'n', long)]
    pub(crate) dry_run: bool,
    /// Leave out files that are smaller
    #[arg(short, long, value_name = "SIZE", default_value = "4K", value_parser = parse_size)]
    pub(crate) min_size: u64,
    /// Compare blocks of this size, at multiples of it: a power of two from 4K to 1M. Smaller ones
    /// find more, but of what is compressed, 128K at a time, only the whole comes free
    #[arg(short, long, value_name = "SIZE", default_value = "128K", value_parser = parse_block)]
    pub(crate) block_size: u64,
    /// Take no more memory than this to remember blocks, and a bit for each; with less of it lists
    /// are read more often
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// Say what comes to share with what
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

fn parse_block(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|bad| bad.to_string())?;
    match bytes.is_power_of_two() && (4096..=BLOCK_BYTES_MAX).contains(&bytes) {
        true => Ok(bytes),
        false => Err("a block is a power of two from 4K to 1M".into()),
    }
}

/// One of a pool, named by the pool and the name within it.
#[derive(Args, Clone, Debug)]
pub(crate) struct Named {
    /// POOL/SUBVOLUME, POOL/SUBVOLUME@SNAPSHOT or POOL/SUBVOLUME#BOOKMARK: a path on a mounted
    /// pool, or a device, image file or label of a pool and a name from the root subvolume on
    #[arg(value_name = "NAME")]
    pub(crate) name: PathBuf,
    /// Further devices of a pool that is not mounted
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Shown {
    #[command(flatten)]
    pub(crate) at: Named,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct ListVersions {
    #[command(flatten)]
    pub(crate) of: Shown,
    /// Print exact numbers of bytes, and times in seconds since 1970
    #[arg(short = 'p', long)]
    pub(crate) exact: bool,
    /// Print no heading
    #[arg(short = 'H', long)]
    pub(crate) no_heading: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Subvolume {
    /// Make an empty subvolume
    Create(Shown),
    /// Show subvolumes, and what each holds
    List(ListVersions),
    /// Show all that is known of a subvolume
    Show(Shown),
    /// Give a subvolume another name; those below it go with it
    Rename {
        #[command(flatten)]
        of: Shown,
        /// The new name, without the pool: from the mounted subvolume on, or the pool's root. So of
        /// /mnt/docs/old on a mount at /mnt it is docs/new
        #[arg(value_name = "NEW_NAME")]
        new: String,
    },
    /// Choose the subvolume that is mounted unless another is asked for
    SetDefault(Shown),
    /// Limit how much a subvolume may hold: beyond it, writing fails with EDQUOT
    ///
    /// What is in snapshots of it or in subvolumes below does not count, but for what the subvolume
    /// still refers to itself. Removing files is never refused.
    #[command(group(clap::ArgGroup::new("what").required(true).multiple(true)
        .args(["referenced", "own"])))]
    Limit {
        #[command(flatten)]
        of: Shown,
        /// What it refers to, shared or not
        #[arg(short, long, value_name = "SIZE|none", value_parser = parse_limit)]
        referenced: Option<u64>,
        /// What it has that its newest snapshot does not have
        #[arg(short, long, value_name = "SIZE|none", value_parser = parse_limit)]
        own: Option<u64>,
    },
    /// Delete a subvolume
    Delete {
        #[command(flatten)]
        of: Shown,
        /// With all its snapshots and all subvolumes below it
        #[arg(short, long)]
        recursive: bool,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Keep what a subvolume is now
    Create {
        #[command(flatten)]
        of: Shown,
        /// Of each subvolume below it too, all at one moment
        #[arg(short, long)]
        recursive: bool,
        /// Make a subvolume of that name, too, that begins as the snapshot and can be written to;
        /// the name is one as for clone
        #[arg(short, long, value_name = "SUBVOLUME")]
        writable: Option<String>,
    },
    /// Show snapshots and bookmarks, and what each holds
    List(ListVersions),
    /// Show all that is known of a snapshot or bookmark
    Show(Shown),
    /// Delete a snapshot or a bookmark
    Delete {
        #[command(flatten)]
        of: Shown,
        /// With the snapshots of that name of subvolumes below
        #[arg(short, long)]
        recursive: bool,
    },
    /// Give a snapshot another name
    Rename {
        #[command(flatten)]
        of: Shown,
        /// The new name: NEW or @NEW, or with all that stands before @ in NAME
        #[arg(value_name = "NEW_NAME")]
        new: String,
    },
    /// Make a subvolume what it was; what it is now is kept as a snapshot
    Rollback {
        #[command(flatten)]
        of: Shown,
        /// Name of the snapshot that keeps what the subvolume is now [default: before- and the
        /// seconds since 1970, to the millisecond]
        #[arg(short, long, value_name = "NAME")]
        keep: Option<String>,
    },
    /// Make a subvolume that begins as a snapshot
    Clone {
        #[command(flatten)]
        of: Shown,
        /// Name of the subvolume, without the pool: from the mounted subvolume on, or the pool's
        /// root. So on a mount at /mnt it is work, or docs/work, for /mnt/work or /mnt/docs/work
        #[arg(value_name = "NEW_NAME")]
        new: String,
    },
    /// Keep a snapshot from being deleted
    Hold {
        #[command(flatten)]
        of: Shown,
        /// Tells holds apart
        #[arg(value_name = "TAG")]
        tag: String,
    },
    /// Take a hold back
    Release {
        #[command(flatten)]
        of: Shown,
        /// Which
        #[arg(value_name = "TAG")]
        tag: String,
    },
    /// Show what changed between a snapshot and another, or what the subvolume is now
    Diff {
        #[command(flatten)]
        of: Shown,
        /// Name of the later snapshot, the part behind @ [default: what the subvolume is now]
        #[arg(value_name = "LATER")]
        later: Option<String>,
    },
    /// Keep of a snapshot what is needed to tell later what came after it
    Bookmark {
        #[command(flatten)]
        of: Shown,
        /// Name of the bookmark, the part behind #
        #[arg(value_name = "BOOKMARK")]
        bookmark: String,
    },
}

/// Bytes of a limit; zero for none.
fn parse_limit(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        text => match cairn_host::parse::parse_size(text) {
            Ok(0) => Err("a limit is at least a byte; \"none\" takes it away".into()),
            Ok(bytes) => Ok(bytes),
            Err(bad) => Err(bad.to_string()),
        },
    }
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Id {
    #[command(flatten)]
    pub(crate) of: Shown,
    /// Number of the subvolume or snapshot, of a pool that is not mounted, in place of a name
    #[arg(short, long, value_name = "ID")]
    pub(crate) subvol: Option<u64>,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Send {
    #[command(flatten)]
    pub(crate) at: Named,
    /// Send what came after this snapshot, which the receiver has: @SNAPSHOT of the same
    /// subvolume, or a whole name
    #[arg(short = 'i', long = "from", value_name = "SNAPSHOT", allow_hyphen_values = false)]
    pub(crate) from: Option<String>,
    /// Send the snapshots in between as well, one after the other; without -i, all older ones. So
    /// of all subvolumes below that have a snapshot of that name, and the properties of all
    #[arg(short = 'R', long)]
    pub(crate) replicate: bool,
    /// Go on where a receive broke off, which says this token; the pool is enough of a name then
    #[arg(short, long, value_name = "TOKEN", conflicts_with_all = ["from", "replicate"])]
    pub(crate) token: Option<String>,
    /// Write to a file instead of standard output; it gets its name when all is in it
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Receive {
    /// POOL/SUBVOLUME: a full stream makes the subvolume, another goes on from a snapshot of it
    #[arg(value_name = "NAME", required_unless_present = "dry_run")]
    pub(crate) name: Option<PathBuf>,
    /// Further devices of a pool that is not mounted
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Vec<PathBuf>,
    /// Read from a file instead of standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Only verify the stream, as far as that goes without the snapshot that it goes on from
    #[arg(short = 'n', long, conflicts_with = "name")]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

impl Receive {
    /// Where to.
    pub(crate) fn at(&self) -> Option<Named> {
        let name = self.name.clone()?;
        Some(Named { name, device: self.device.clone() })
    }
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Stream {
    /// Read a stream to its end, and show what it holds
    Show {
        /// The file that it is in, or - [default: standard input]
        #[arg(value_name = "FILE")]
        input: Option<PathBuf>,
        /// Print JSON
        #[arg(short, long)]
        json: bool,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Inspect {
    /// Labels and superblocks of a device, good and bad
    Superblock {
        /// Device or image file
        device: PathBuf,
        /// Show every superblock of the rings, not only the newest
        #[arg(short, long)]
        all: bool,
        /// Print JSON
        #[arg(short, long)]
        json: bool,
    },
    /// Items or nodes of a tree
    Tree {
        #[command(flatten)]
        of: InSubvol,
        /// Which: pool, chunk, space, refs, dead, or subvol
        #[arg(long, default_value = "subvol")]
        tree: TreeName,
        /// Show nodes instead of items
        #[arg(long)]
        nodes: bool,
        /// Begin at this object (inode number, address or id)
        #[arg(long, value_name = "OBJECT", default_value_t = 0)]
        from: u64,
        /// Show at most so many
        #[arg(short = 'c', long, value_name = "NUMBER")]
        count: Option<usize>,
    },
    /// Every item of an inode
    Inode {
        #[command(flatten)]
        of: InSubvol,
        /// Inode number, or path from the root of the subvolume
        inode: String,
    },
    /// A file and where its data is
    File {
        #[command(flatten)]
        of: InSubvol,
        /// Path from the root of the subvolume, or inode number
        file: String,
    },
    /// Every block that vouches for a file, from the superblock down, each verified
    Chain {
        #[command(flatten)]
        of: InSubvol,
        /// Path from the root of the subvolume, or inode number
        file: String,
    },
}

#[derive(Args, Clone, Debug)]
pub(crate) struct InSubvol {
    /// Device or image file
    pub(crate) device: PathBuf,
    /// Number of the subvolume [default: the one that is mounted by default]
    #[arg(short, long, value_name = "ID")]
    pub(crate) subvol: Option<u64>,
    /// As this older group has it
    #[arg(long, value_name = "GROUP")]
    pub(crate) txg: Option<u64>,
    /// Print JSON
    #[arg(short, long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TreeName {
    Pool,
    Chunk,
    Space,
    Refs,
    Dead,
    Subvol,
}

/// Whether `cairn` was called as `mount.fuse` calls the program of a `fuse.cairn` mount: source,
/// directory, options.
pub(crate) fn looks_like_mount(given: &[OsString]) -> bool {
    let [_, source, directory, rest @ ..] = given else { return false };
    let is_verb = |name: &OsString| {
        use clap::CommandFactory;
        let name = name.to_str().unwrap_or("");
        let is_name = |verb: &clap::Command| {
            verb.get_name() == name || verb.get_all_aliases().any(|alias| alias == name)
        };
        name.starts_with('-')
            || name == "help"
            || Arguments::command().get_subcommands().any(is_name)
    };
    !is_verb(source) && (rest.iter().any(|a| a == "-o") || Path::new(directory).is_dir())
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
    fn only_a_source_and_a_directory_look_like_a_mount() {
        let call = |words: &[&str]| {
            let given: Vec<OsString> = words.iter().map(OsString::from).collect();
            looks_like_mount(&given)
        };
        assert!(call(&["cairn", "/dev/vdb", "/mnt", "-o", "ro"]));
        assert!(call(&["cairn", "tank", "/"]));
        assert!(!call(&["cairn", "df", "/"]));
        assert!(!call(&["cairn", "--help", "/"]));
        assert!(!call(&["cairn", "snap", "/"]));
        assert!(!call(&["cairn", "df"]));
    }
}
