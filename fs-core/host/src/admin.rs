//! The admin protocol: how a command asks the daemon of a mounted pool.
//!
//! The daemon listens on a Unix socket named after the device number that files of its mount show
//! (`st_dev`), which the mount table tells to everyone: `/run/cairn/MAJOR-MINOR.sock` when the
//! daemon is root's. Otherwise it is in `$XDG_RUNTIME_DIR/cairn`, `/run/user/UID/cairn` or, where
//! there is neither, `/tmp/cairn-UID`, which nobody else may enter. One connection carries any
//! number of exchanges, each one [`Request`] and one [`Reply`]:
//!
//! ```text
//! length (u32, little-endian) | protocol version (u16) | message (bincode, standard configuration)
//! ```
//!
//! A stream goes over the same connection in parts, each its length (u32, little-endian) and as
//! many bytes; one without bytes is the last. Whoever takes them sets the pace.
//!
//! Most requests only look, or ask for what sync(2) lets anyone ask, so the socket is open to all
//! users. The kernel says who is at the other end: only root and whom the daemon belongs to may
//! change a pool, and learn what is in files and directories that others may not read.
//!
//! The encoding is for talk between programs of one installation. What reaches a disk is declared
//! in `fs_core::format`.

use crate::dedupe::{Answer, Question};
use crate::properties::PropertyInfo;
use crate::streams::{Received, Sending, Sent};
use crate::versions::{Change, Differences, VersionInfo, VersionName};
use fs_core::device::Standing;
use fs_core::engine::past::{GroupState, Lost, PastGroup};
use fs_core::engine::{ChangeWait, DeviceChangeStatus, ScrubEnd, ScrubStatus};
use fs_core::error::Error;
use fs_core::format::devices::{DeviceChangeKind, DeviceChangeState};
use fs_core::format::scrub::ScrubState;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Version of the protocol; both sides must have the same.
pub const VERSION: u16 = 11;
/// Longest message, in bytes.
const MESSAGE_BYTES_MAX: u32 = 1 << 20;
/// How long one side waits for the other to go on in the middle of a message.
const STALLED: Duration = Duration::from_secs(5);
/// How long a client waits for most replies.
const REPLY_PATIENCE: Duration = Duration::from_secs(600);
/// How long either side waits for the other while all of a subvolume may have to be read.
const STREAM_PATIENCE: Duration = Duration::from_secs(7 * 86_400);
/// Bytes of a part of a stream at most.
const PART_BYTES_MAX: usize = 256 << 10;
/// Connections of root, and of whom the daemon belongs to, served at once.
const CONNECTIONS_MAX: usize = 16;
/// Connections of everybody else; they take none of the others.
const GUESTS_MAX: usize = 16;

/// What a command may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// What the pool is. Answered by [`Reply::Info`].
    Info,
    /// Where its space is. Answered by [`Reply::Df`].
    Df,
    /// Make everything durable that is complete now. Answered by [`Reply::Synced`].
    Sync,
    /// What subvolumes, snapshots and bookmarks there are, but for the first so many of them.
    /// Answered by [`Reply::Versions`].
    Versions(u64),
    /// Change them. Answered by [`Reply::Changed`].
    Change(Change),
    /// Change them with the next syncfs(2) of the thread that asks, in one commit, so that it
    /// belongs to the change what the kernel still has. The daemon is asked to
    /// [agree](Parts::agree) about when. Answered by [`Reply::Changed`].
    ChangeAtSync(Change),
    /// The properties of a subvolume or snapshot. Answered by [`Reply::Properties`].
    Properties(VersionName),
    /// What differs between two states, in the inodes from a number on. Answered by
    /// [`Reply::Differences`].
    Differences {
        /// The old state.
        old: VersionName,
        /// The new state.
        new: VersionName,
        /// The first inode.
        first: u64,
    },
    /// The identity of a state's content, for which all of it is read. Answered by
    /// [`Reply::Identity`].
    Identity(VersionName),
    /// Count errors of the devices anew from zero, and forget which files were found damaged.
    /// Answered by [`Reply::Changed`].
    ClearErrors,
    /// Which files were found damaged. Answered by [`Reply::Damaged`].
    Damaged,
    /// What groups before the newest there are, and what is left of them. Answered by
    /// [`Reply::History`].
    History {
        /// Of the data of files as well, which has to be read for that.
        data: bool,
    },
    /// Begin a scrub, or end one. Answered by [`Reply::Changed`]; [`Request::Info`] tells how it
    /// stands.
    Scrub(ScrubChange),
    /// Send snapshots. Parts of the stream come before the reply, which is [`Reply::Sent`].
    Send(Sending),
    /// Receive snapshots in a subvolume. Parts of the stream follow the request. Answered by
    /// [`Reply::Received`].
    Receive(VersionName),
    /// Change the devices of the pool. Answered by [`Reply::Changed`] when that is done or goes on
    /// in the background; [`Request::Info`] tells how it stands.
    Device(DeviceRequest),
    /// Look for equal data in files, or share it. Answered by [`Reply::Dedupe`].
    Dedupe(Question),
}

/// What is to become of the devices of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceRequest {
    /// Add one.
    Add {
        /// Its path.
        path: PathBuf,
        /// Whatever it holds.
        force: bool,
    },
    /// Move everything off one, and let it go.
    Remove {
        /// Its index.
        index: u16,
    },
    /// Add one, move everything there that another has, and let that go.
    Replace {
        /// Index of the other.
        index: u16,
        /// Its path.
        path: PathBuf,
        /// Whatever it holds.
        force: bool,
    },
    /// Give one another size.
    Resize {
        /// Its index.
        index: u16,
        /// The size; all there is if not given.
        bytes: Option<u64>,
    },
    /// End what is under way.
    Cancel,
}

/// What is to become of a scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubChange {
    /// Begin one.
    Start {
        /// Bytes it may look at in a second, one copy counted; 0 for any number.
        rate: u64,
    },
    /// Let it rest.
    Pause,
    /// Let it go on.
    Resume {
        /// Another rate.
        rate: Option<u64>,
    },
    /// End it.
    Cancel,
}

impl Request {
    /// Whether only some may ask: it changes the pool, or shows what not everybody may see.
    fn is_guarded(&self) -> bool {
        match self {
            Request::Info | Request::Df | Request::Sync => false,
            // Names of subvolumes that others may not come to, and of their snapshots.
            Request::Versions(_) | Request::Properties(_) => true,
            Request::Change(_) | Request::ChangeAtSync(_) => true,
            Request::ClearErrors | Request::Scrub(_) => true,
            Request::Device(_) => true,
            Request::Send(_) | Request::Receive(_) => true,
            Request::Damaged | Request::Differences { .. } | Request::Identity(_) => true,
            // It may read much.
            Request::History { .. } => true,
            // Files are named by number, whoever may come to them.
            Request::Dedupe(_) => true,
        }
    }

    /// How long to wait for the reply: a sync may have much to write, an identity all to read.
    fn patience(&self) -> Duration {
        match self {
            Request::Identity(_) | Request::History { .. } => STREAM_PATIENCE,
            Request::Send(_) | Request::Receive(_) => STREAM_PATIENCE,
            _ => REPLY_PATIENCE,
        }
    }
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::Info`].
    Info(PoolInfo),
    /// To [`Request::Df`].
    Df(SpaceInfo),
    /// To [`Request::Sync`]: all durable.
    Synced,
    /// To [`Request::Versions`]: with the name of the subvolume that is mounted.
    Versions {
        /// Its name.
        base: String,
        /// The next of them; none when these were all.
        next: Vec<VersionInfo>,
    },
    /// To [`Request::Change`], [`Request::ClearErrors`], [`Request::Scrub`] and
    /// [`Request::Device`]: all is done and durable, or begun.
    Changed,
    /// To [`Request::Damaged`].
    Damaged(Vec<DamagedInfo>),
    /// To [`Request::History`]: the newest first.
    History(Vec<PastGroupInfo>),
    /// To [`Request::Properties`]; `None` when there is none of that name.
    Properties(Option<Vec<PropertyInfo>>),
    /// To [`Request::Differences`].
    Differences(Differences),
    /// To [`Request::Identity`].
    Identity(String),
    /// To [`Request::Send`], after the parts of the stream.
    Sent(Sent),
    /// To [`Request::Receive`].
    Received(Received),
    /// To [`Request::Dedupe`].
    Dedupe(Answer),
    /// To any request: one sentence that says why not.
    Failed(String),
}

/// What a pool is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolInfo {
    /// Name of the pool; empty when it has none.
    pub name: String,
    /// Id of the pool, as `blkid` writes ids.
    pub id: String,
    /// Version of the format.
    pub format_version: u32,
    /// Feature bits: compat, ro-compat, incompat.
    pub features: [u64; 3],
    /// Newest published transaction group.
    pub txg: u64,
    /// When it was published, seconds since 1970.
    pub written: i64,
    /// Whether the pool was closed with nothing left to do. Always false while it is mounted.
    pub clean: bool,
    /// Whether changes are refused.
    pub read_only: bool,
    /// Whether an error ended writing; what is stored can be read.
    pub has_stopped: bool,
    /// cairn's own options of the mount as they are in force, those that were not given included;
    /// empty while it is not mounted.
    pub mount_options: Vec<String>,
    /// Bytes of a tree node.
    pub node_bytes: u32,
    /// Bytes of a new chunk.
    pub chunk_bytes: u64,
    /// Profile of new data chunks.
    pub data_profile: String,
    /// Profile of new metadata chunks.
    pub metadata_profile: String,
    /// Compression of new data, such as `zstd:3`; empty when not known.
    pub compression: String,
    /// Checksum of new data; empty when not known.
    pub checksum: String,
    /// Number of devices the pool is made of.
    pub device_count: u16,
    /// Those that are known.
    pub devices: Vec<DeviceInfo>,
    /// How far devices are that are brought up to date, if there are any.
    pub resilver: Option<ResilverInfo>,
    /// The scrub that is under way, or how the last one ended.
    pub scrub: Option<Box<ScrubInfo>>,
    /// The change of its devices that is under way, or how the last one ended.
    pub device_change: Option<Box<DeviceChangeInfo>>,
    /// The pool was written in two halves; this is one of them, or these are both.
    pub is_split: bool,
    /// How many files were found damaged since the pool was mounted.
    pub damaged_count: u64,
    /// Which, for those whom [`Request::Damaged`] tells; empty in a reply to [`Request::Info`].
    pub damaged: Vec<DamagedInfo>,
}

/// A file of which something could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedInfo {
    /// Number of the subvolume or snapshot.
    pub subvol: u64,
    /// Number of the file.
    pub ino: u64,
    /// Where it was then, with the subvolume or snapshot: `home/a`, `home@monday: a`.
    pub path: String,
}

/// A group that the ring of superblocks still has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastGroupInfo {
    /// Which transaction group.
    pub txg: u64,
    /// When it was published, seconds since 1970; 0 when that is not known.
    pub written: i64,
    /// Whether the pool was closed with nothing left to do.
    pub clean: bool,
    /// `newest`, `whole`, `partly` when it can be opened and some of it is gone, or `gone`.
    pub state: String,
    /// Blocks and extents that are gone.
    pub lost_count: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// Why it cannot be opened; empty when it can.
    pub reason: String,
}

impl PastGroupInfo {
    /// What the core says of it.
    pub fn of(group: &PastGroup) -> PastGroupInfo {
        let (state, lost, reason) = match &group.state {
            GroupState::Newest => ("newest", Lost::default(), String::new()),
            GroupState::Whole => ("whole", Lost::default(), String::new()),
            GroupState::Partly(lost) => ("partly", *lost, String::new()),
            GroupState::Gone(error) => ("gone", Lost::default(), error.to_string()),
        };
        PastGroupInfo {
            txg: group.txg.0,
            written: group.written,
            clean: group.clean,
            state: state.into(),
            lost_count: lost.count,
            lost_bytes: lost.bytes,
            reason,
        }
    }
}

/// How far devices are that are brought up to date.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResilverInfo {
    /// Bytes compared.
    pub done_bytes: u64,
    /// Bytes that there are to compare, about.
    pub total_bytes: u64,
    /// Something could not be read, so that it waits before it tries again.
    pub waits: bool,
}

/// How a scrub stands, or how it ended. Bytes count one copy, except of devices and repairs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubInfo {
    /// `running`, `paused`, `finished` or `cancelled`.
    pub state: String,
    /// Bytes it may look at in a second; 0 for any number.
    pub rate: u64,
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended; 0 while it has not.
    pub ended: i64,
    /// For how long it ran, in milliseconds.
    pub run_ms: u64,
    /// Bytes that were in use when it began.
    pub total_bytes: u64,
    /// Bytes that were looked at.
    pub done_bytes: u64,
    /// Bytes it looked at in a second lately; 0 when that is not known.
    pub bytes_per_second: u64,
    /// Seconds until it ends, if it goes on like that.
    pub seconds_left: Option<u64>,
    /// Copies that were bad or could not be read.
    pub found: u64,
    /// Bytes of copies that were repaired.
    pub repaired_bytes: u64,
    /// Blocks and extents without a good copy.
    pub lost_count: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// What was found on each device, by index.
    pub devices: Vec<ScrubDeviceInfo>,
    /// How the last one ended that looked at everything.
    pub last: Option<ScrubEndInfo>,
}

/// How a change of devices stands, or how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceChangeInfo {
    /// `remove`, `replace` or `shrink`.
    pub kind: String,
    /// `running`, `finished` or `cancelled`.
    pub state: String,
    /// Index of the device.
    pub device: u16,
    /// Index of the device that comes in its place.
    pub target: Option<u16>,
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended; 0 while it has not.
    pub ended: i64,
    /// Bytes of devices that were to be moved.
    pub total_bytes: u64,
    /// Bytes that are not moved yet.
    pub left_bytes: u64,
    /// Why it waits; empty when it does not.
    pub waits_for: String,
}

impl DeviceChangeInfo {
    /// What the core says of it.
    pub fn of(status: &DeviceChangeStatus) -> DeviceChangeInfo {
        let kind = match status.kind {
            DeviceChangeKind::Remove => "remove",
            DeviceChangeKind::Replace => "replace",
            DeviceChangeKind::Shrink => "shrink",
        };
        let state = match status.state {
            DeviceChangeState::Running => "running",
            DeviceChangeState::Finished => "finished",
            DeviceChangeState::Cancelled => "cancelled",
        };
        let waits_for = status.waits_for.as_ref().map(|wait| match wait {
            ChangeWait::Failure(Error::NoSpace) => {
                "the other devices have not enough room for what \
                 is on it and what was promised; delete something or add a device"
                    .into()
            }
            ChangeWait::Failure(error) => error.to_string(),
            ChangeWait::Readers => "something reads what the pool was before, such as a snapshot \
                 that is being sent; it goes on when that has ended"
                .into(),
        });
        DeviceChangeInfo {
            kind: kind.into(),
            state: state.into(),
            device: status.device,
            target: status.target,
            began: status.began,
            ended: status.ended,
            total_bytes: status.total_bytes,
            left_bytes: status.left_bytes,
            waits_for: waits_for.unwrap_or_default(),
        }
    }
}

/// What a scrub found on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubDeviceInfo {
    /// Copies that were bad or could not be read.
    pub found: u64,
    /// Bytes of copies that were repaired.
    pub repaired_bytes: u64,
    /// Bytes of copies of which no other was good either.
    pub lost_bytes: u64,
}

/// How a scrub ended that looked at everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubEndInfo {
    /// When it began, seconds since 1970.
    pub began: i64,
    /// When it ended.
    pub ended: i64,
    /// For how long it ran, in milliseconds.
    pub run_ms: u64,
    /// Bytes that it looked at.
    pub bytes: u64,
    /// Copies that were bad or could not be read.
    pub found: u64,
    /// Bytes of copies that were repaired.
    pub repaired_bytes: u64,
    /// Blocks and extents without a good copy.
    pub lost_count: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
}

impl ScrubInfo {
    /// What the core says of it.
    pub fn of(status: &ScrubStatus) -> ScrubInfo {
        let state = match status.state {
            ScrubState::Running => "running",
            ScrubState::Paused => "paused",
            ScrubState::Finished => "finished",
            ScrubState::Cancelled => "cancelled",
        };
        let device = |device: &fs_core::format::scrub::ScrubDevice| ScrubDeviceInfo {
            found: device.found,
            repaired_bytes: device.repaired_bytes,
            lost_bytes: device.lost_bytes,
        };
        let end = |end: ScrubEnd| ScrubEndInfo {
            began: end.began,
            ended: end.ended,
            run_ms: end.run_ms,
            bytes: end.bytes,
            found: end.found,
            repaired_bytes: end.repaired_bytes,
            lost_count: end.lost_count,
            lost_bytes: end.lost_bytes,
        };
        ScrubInfo {
            state: state.into(),
            rate: status.rate,
            began: status.began,
            ended: status.ended,
            run_ms: status.run_ms,
            total_bytes: status.total_bytes,
            done_bytes: status.done_bytes,
            bytes_per_second: status.bytes_per_second,
            seconds_left: status.seconds_left,
            found: status.found,
            repaired_bytes: status.repaired_bytes,
            lost_count: status.lost_count,
            lost_bytes: status.lost_bytes,
            devices: status.devices.iter().map(device).collect(),
            last: status.last.map(end),
        }
    }
}

/// Whether a device has what was written to the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// It has everything.
    #[default]
    Online,
    /// It was away, and lacks something that was written meanwhile.
    Behind,
    /// It is missing, or failed.
    Missing,
}

impl DeviceState {
    /// That of a device in that standing.
    pub fn of(standing: Standing) -> DeviceState {
        match standing {
            Standing::Complete => DeviceState::Online,
            Standing::Behind => DeviceState::Behind,
            Standing::Leaving | Standing::Absent | Standing::Vacant => DeviceState::Missing,
        }
    }

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            DeviceState::Online => "online",
            DeviceState::Behind => "behind",
            DeviceState::Missing => "missing",
        }
    }
}

/// A device of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Index in the pool.
    pub index: u16,
    /// Path or other name.
    pub name: String,
    /// Whether it has everything.
    pub state: DeviceState,
    /// Id of the device.
    pub id: String,
    /// Usable bytes.
    pub bytes: u64,
    /// Bytes taken by chunks, if known.
    pub allocated: Option<u64>,
    /// Read errors.
    pub read_errors: u64,
    /// Write errors.
    pub write_errors: u64,
    /// Checksum errors.
    pub checksum_errors: u64,
}

/// Where the space of a pool is. All in bytes; of what is stored in copies, one copy is counted,
/// except in `device_*` and `unallocated`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceInfo {
    /// Bytes of all devices.
    pub device_bytes: u64,
    /// Bytes of devices that chunks take, copies counted.
    pub device_allocated: u64,
    /// Bytes of devices that no chunk takes.
    pub unallocated: u64,
    /// Data chunks.
    pub data: Usage,
    /// Metadata chunks.
    pub metadata: Usage,
    /// System chunks.
    pub system: Usage,
    /// What only deletes, commits and administration may use.
    pub reserve: u64,
    /// Freed, but not to be used again yet.
    pub pending_free: u64,
    /// What a writer can still store; `None` when only a mounted pool could tell.
    pub available: Option<u64>,
    /// Data on disk, after compression; `None` when not known.
    pub stored_bytes: Option<u64>,
    /// The same data before compression.
    pub logical_bytes: Option<u64>,
}

/// Chunks of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of the chunks.
    pub total: u64,
    /// Bytes of them in use.
    pub used: u64,
}

impl SpaceInfo {
    /// Bytes before compression for each byte stored; `None` when there is nothing to compare.
    pub fn compression_ratio(&self) -> Option<f64> {
        match (self.logical_bytes, self.stored_bytes) {
            (Some(logical), Some(stored)) if stored > 0 => Some(logical as f64 / stored as f64),
            _ => None,
        }
    }
}

/// Why an exchange failed.
#[derive(Debug)]
pub enum AdminError {
    /// No daemon listens for this mount.
    NoDaemon,
    /// The daemon speaks another version.
    Version(u16),
    /// Not a message of this protocol.
    Garbled,
    /// The daemon ended, or hung up, before it answered.
    Ended,
    /// The daemon says why it refuses.
    Refused(String),
    /// The system says why.
    Io(io::Error),
}

impl fmt::Display for AdminError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminError::NoDaemon => write!(f, "no cairn daemon answers for this mount"),
            AdminError::Version(found) => write!(
                f,
                "the daemon speaks version {found} of the admin protocol, this command {VERSION}; \
                 use the cairn that mounted the pool"
            ),
            AdminError::Garbled => write!(f, "the daemon's answer makes no sense"),
            AdminError::Ended => write!(
                f,
                "the daemon of this mount ended before it answered; the system log may say why"
            ),
            AdminError::Refused(why) => write!(f, "{why}"),
            AdminError::Io(error) => write!(f, "cannot talk to the daemon: {error}"),
        }
    }
}

impl std::error::Error for AdminError {}

impl From<io::Error> for AdminError {
    fn from(error: io::Error) -> AdminError {
        AdminError::Io(error)
    }
}

/// Directory of sockets of root's daemons.
const SYSTEM_DIRECTORY: &str = "/run/cairn";

/// Where daemons may listen, those of the system first: an ordinary user's daemon cannot pass for
/// root's.
fn directories() -> Vec<PathBuf> {
    std::iter::once(PathBuf::from(SYSTEM_DIRECTORY)).chain(own_directories()).collect()
}

/// Where a user's daemons may listen, the best first. Whoever looks for one may have another
/// environment than who mounted, so all are looked into. None belongs to anyone else.
fn own_directories() -> Vec<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let given = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let given = given.map(|dir| PathBuf::from(dir).join("cairn"));
    let usual = [format!("/run/user/{user}/cairn"), format!("/tmp/cairn-{user}")];
    given.into_iter().chain(usual.map(PathBuf::from)).collect()
}

/// A directory that only this user may enter, made if it is not there: in /tmp anybody may have
/// made what has its name, and listen there.
fn make_private(directory: &Path) -> io::Result<()> {
    let made = fs::DirBuilder::new().mode(0o700).create(directory);
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    match is_private(directory) {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{} is there and is not a directory that only this user may enter",
            directory.display()
        ))),
    }
}

/// Whether only this user may put anything there.
fn is_private(directory: &Path) -> bool {
    // Not of what a symlink leads to.
    fs::symlink_metadata(directory).is_ok_and(|found| {
        let is_own = found.uid() == rustix::process::geteuid().as_raw();
        found.is_dir() && is_own && found.mode() & 0o077 == 0
    })
}

fn socket_name(device: u64) -> String {
    format!("{}-{}.sock", rustix::fs::major(device), rustix::fs::minor(device))
}

/// Asks the daemon of the mount with device number `device`. Blocks until it answers.
///
/// # Errors
/// [`AdminError::NoDaemon`] when nobody listens, [`AdminError::Refused`] with the daemon's reason,
/// and what else can go wrong between two processes.
pub fn ask(device: u64, request: Request) -> Result<Reply, AdminError> {
    ask_in(&directories(), device, request)
}

fn ask_in(directories: &[PathBuf], device: u64, request: Request) -> Result<Reply, AdminError> {
    exchange(&mut connect(directories, device)?, &request)
}

fn exchange(stream: &mut UnixStream, request: &Request) -> Result<Reply, AdminError> {
    stream.set_write_timeout(Some(STALLED))?;
    stream.set_read_timeout(Some(request.patience()))?;
    send(stream, request)?;
    match answer(stream)? {
        Reply::Failed(why) => Err(AdminError::Refused(why)),
        reply => Ok(reply),
    }
}

/// A connection to the daemon of a mount, for who has many questions.
pub struct Session {
    directories: Vec<PathBuf>,
    device: u64,
    /// With the time when it was used last: the daemon hangs up on who is silent for long.
    open: Option<(UnixStream, Instant)>,
}

impl Session {
    /// One with the daemon of the mount with device number `device`; it connects when it is asked.
    pub fn new(device: u64) -> Session {
        Session { directories: directories(), device, open: None }
    }

    /// Asks, as [`ask`] does.
    ///
    /// # Errors
    /// Those of [`ask`].
    pub fn ask(&mut self, request: &Request) -> Result<Reply, AdminError> {
        let mut stream = match self.open.take() {
            Some((stream, used)) if used.elapsed() < STALLED / 2 => stream,
            _ => connect(&self.directories, self.device)?,
        };
        let reply = exchange(&mut stream, request);
        if matches!(reply, Ok(_) | Err(AdminError::Refused(_))) {
            self.open = Some((stream, Instant::now()));
        }
        reply
    }
}

/// As [`ask`], for a request with a stream: `talk` reads its parts or writes them. When the daemon
/// hangs up on it, the reply says why.
///
/// # Errors
/// Those of [`ask`]; what `talk` says went wrong at the other end of the stream.
pub fn converse(
    device: u64,
    request: Request,
    talk: &mut dyn FnMut(&mut Parts<'_>) -> io::Result<()>,
) -> Result<Reply, AdminError> {
    let mut stream = connect(&directories(), device)?;
    stream.set_write_timeout(Some(STREAM_PATIENCE))?;
    stream.set_read_timeout(Some(STREAM_PATIENCE))?;
    send(&mut stream, &request)?;
    let mut parts = Parts::new(&mut stream);
    match talk(&mut parts) {
        Err(error) if !parts.is_broken => return Err(error.into()),
        _ => {}
    }
    match answer(&mut stream)? {
        Reply::Failed(why) => Err(AdminError::Refused(why)),
        reply => Ok(reply),
    }
}

/// The daemon's reply, or that it has none to give any more.
fn answer(stream: &mut UnixStream) -> Result<Reply, AdminError> {
    match receive(stream) {
        Ok(reply) => reply.ok_or(AdminError::Ended),
        Err(AdminError::Io(error))
            if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) =>
        {
            Err(AdminError::Ended)
        }
        Err(error) => Err(error),
    }
}

fn connect(directories: &[PathBuf], device: u64) -> Result<UnixStream, AdminError> {
    let name = socket_name(device);
    let is_trusted = |dir: &&PathBuf| **dir == Path::new(SYSTEM_DIRECTORY) || is_private(dir);
    let found = directories
        .iter()
        .filter(is_trusted)
        .find_map(|directory| UnixStream::connect(directory.join(&name)).ok());
    found.ok_or(AdminError::NoDaemon)
}

/// A stream in parts, read or written.
pub struct Parts<'a> {
    stream: &'a mut UnixStream,
    /// Bytes left of the part that is read.
    left: usize,
    has_ended: bool,
    /// The other side does not talk any more.
    is_broken: bool,
    /// The process at the other end, as it is seen here; zero if it cannot be.
    peer: u32,
}

impl<'a> Parts<'a> {
    fn new(stream: &'a mut UnixStream) -> Parts<'a> {
        let peer = rustix::net::sockopt::socket_peercred(&*stream);
        let peer = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get() as u32);
        Parts { stream, left: 0, has_ended: false, is_broken: false, peer }
    }

    /// The process at the other end, by the number it has here; zero if it has none.
    pub fn peer(&self) -> u32 {
        self.peer
    }

    /// The daemon's side of agreeing on a moment: it is ready, and returns when the other side has
    /// done its part.
    ///
    /// # Errors
    /// Errors of the connection; the other side ends it.
    pub fn agree(&mut self) -> io::Result<()> {
        self.write_all(&[0])?;
        let mut done = Vec::new();
        self.take(16).read_to_end(&mut done)?;
        match done.is_empty() {
            true => Err(ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }

    /// The other side: does something when the daemon is ready, unless that refuses.
    ///
    /// # Errors
    /// Errors of the connection.
    pub fn when_ready(&mut self, act: impl FnOnce()) -> io::Result<()> {
        if self.read(&mut [0])? == 0 {
            return Ok(());
        }
        act();
        self.write_all(&[0])?;
        self.end()?;
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(ErrorKind::InvalidData.into()),
        }
    }

    /// Nothing more is written.
    ///
    /// # Errors
    /// Errors of the connection.
    pub fn end(&mut self) -> io::Result<()> {
        self.note(|stream| stream.write_all(&[0; 4]))
    }

    fn note<T>(&mut self, work: impl FnOnce(&mut UnixStream) -> io::Result<T>) -> io::Result<T> {
        let outcome = work(self.stream);
        self.is_broken |= outcome.is_err();
        outcome
    }
}

impl Read for Parts<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.has_ended && !buf.is_empty() {
            let mut head = [0; 4];
            self.note(|stream| stream.read_exact(&mut head))?;
            self.left = u32::from_le_bytes(head) as usize;
            self.has_ended = self.left == 0;
        }
        let len = buf.len().min(self.left);
        if len == 0 {
            return Ok(0);
        }
        let found = self.note(|stream| stream.read(&mut buf[..len]))?;
        if found == 0 {
            self.is_broken = true;
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= found;
        Ok(found)
    }
}

impl Write for Parts<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let part = &buf[..buf.len().min(PART_BYTES_MAX)];
        if !part.is_empty() {
            let head = (part.len() as u32).to_le_bytes();
            self.note(|stream| stream.write_all(&head).and_then(|()| stream.write_all(part)))?;
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send<T: Serialize>(stream: &mut impl Write, message: &T) -> Result<(), AdminError> {
    let body = bincode::serde::encode_to_vec(message, bincode::config::standard())
        .map_err(|_| AdminError::Garbled)?;
    let length = u32::try_from(body.len()).ok().filter(|n| *n <= MESSAGE_BYTES_MAX);
    let mut frame = length.ok_or(AdminError::Garbled)?.to_le_bytes().to_vec();
    frame.extend_from_slice(&VERSION.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(stream.write_all(&frame)?)
}

/// The next message, or `None` when the other side has closed.
fn receive<T: for<'a> Deserialize<'a>>(stream: &mut impl Read) -> Result<Option<T>, AdminError> {
    let mut head = [0; 6];
    if stream.read(&mut head[..1])? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut head[1..])?;
    let [l0, l1, l2, l3, v0, v1] = head;
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(AdminError::Version(version));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    if length > MESSAGE_BYTES_MAX {
        return Err(AdminError::Garbled);
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    // The limit also bounds what the decoder allocates for lengths inside the message.
    let limits = bincode::config::standard().with_limit::<{ MESSAGE_BYTES_MAX as usize }>();
    match bincode::serde::decode_from_slice(&body, limits) {
        Ok((message, used)) if used == body.len() => Ok(Some(message)),
        _ => Err(AdminError::Garbled),
    }
}

/// Answers requests; called from several threads. Those that come with a stream read or write its
/// parts.
pub type Handler = dyn Fn(Request, &mut Parts<'_>) -> Reply + Send + Sync;

/// The daemon's end. Removes the socket when dropped.
pub struct Server {
    path: PathBuf,
}

impl Server {
    /// Listens for the mount with device number `device` and answers with `handler`, on threads of
    /// its own, until the process ends or the server is dropped.
    ///
    /// # Errors
    /// What the system says; a daemon can do its work without a server.
    pub fn start(device: u64, handler: Arc<Handler>) -> io::Result<Server> {
        if rustix::process::geteuid().is_root() {
            fs::create_dir_all(SYSTEM_DIRECTORY)?;
            return Server::start_in(Path::new(SYSTEM_DIRECTORY), device, handler);
        }
        let mut why = None;
        for directory in own_directories() {
            // Of a runtime directory that is not there the next serves; the last must.
            match make_private(&directory) {
                Ok(()) => return Server::start_in(&directory, device, handler),
                Err(error) => why = Some(error),
            }
        }
        Err(why.unwrap_or_else(|| io::Error::other("there is no place for a socket")))
    }

    fn start_in(directory: &Path, device: u64, handler: Arc<Handler>) -> io::Result<Server> {
        let path = directory.join(socket_name(device));
        // Device numbers are used again; what is there belongs to a mount that is gone.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let server = Server { path };
        fs::set_permissions(&server.path, fs::Permissions::from_mode(0o666))?;
        let name = "cairn-admin".to_string();
        std::thread::Builder::new().name(name).spawn(move || accept(&listener, &handler))?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread stays in accept, on a socket without a name, until the process ends; a daemon
        // drops its server when it is about to.
        let _ = fs::remove_file(&self.path);
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// Root, or whom the daemon belongs to.
    Owner,
    Guest,
}

impl Peer {
    fn of(stream: &UnixStream) -> io::Result<Peer> {
        let peer = rustix::net::sockopt::socket_peercred(stream)?.uid;
        let is_owner = peer.is_root() || peer == rustix::process::geteuid();
        Ok(if is_owner { Peer::Owner } else { Peer::Guest })
    }

    fn connections_max(self) -> usize {
        match self {
            Peer::Owner => CONNECTIONS_MAX,
            Peer::Guest => GUESTS_MAX,
        }
    }
}

/// One of the connections that are counted, however it ends.
struct OneOf(Arc<AtomicUsize>);

impl Drop for OneOf {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn accept(listener: &UnixListener, handler: &Arc<Handler>) {
    let (owners, guests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: others must close theirs first.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        let Ok(peer) = Peer::of(&stream) else { continue };
        let open = match peer {
            Peer::Owner => &owners,
            Peer::Guest => &guests,
        };
        if open.load(Ordering::Relaxed) >= peer.connections_max() {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (handler, one) = (handler.clone(), OneOf(open.clone()));
        // Without a thread, one goes at once.
        let _ = std::thread::Builder::new().name("cairn-admin".into()).spawn(move || {
            let _one = one;
            // Whoever breaks the protocol is hung up on.
            let _ = serve(stream, peer, &*handler);
        });
    }
}

fn serve(mut stream: UnixStream, peer: Peer, handler: &Handler) -> Result<(), AdminError> {
    stream.set_read_timeout(Some(STALLED))?;
    stream.set_write_timeout(Some(STALLED))?;
    while let Some(request) = receive::<Request>(&mut stream)? {
        let both = matches!(request, Request::ChangeAtSync(_));
        let sends = both || matches!(request, Request::Send(_));
        let receives = both || matches!(request, Request::Receive(_));
        if sends || receives {
            stream.set_read_timeout(Some(STREAM_PATIENCE))?;
            stream.set_write_timeout(Some(STREAM_PATIENCE))?;
        }
        let mut parts = Parts::new(&mut stream);
        let reply = match request.is_guarded() && peer == Peer::Guest {
            true => Reply::Failed("only root and whoever mounted the pool may do that".into()),
            false => handler(request, &mut parts),
        };
        if sends {
            parts.end()?;
        }
        // Nobody knows any more where parts end and requests begin.
        let is_over = receives && !parts.has_ended;
        send(&mut stream, &reply)?;
        if is_over {
            return Ok(());
        }
        stream.set_read_timeout(Some(STALLED))?;
        stream.set_write_timeout(Some(STALLED))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(request: Request) -> Reply {
        match request {
            Request::Info => Reply::Info(PoolInfo {
                name: "tank".into(),
                devices: vec![DeviceInfo { bytes: 1 << 40, ..DeviceInfo::default() }],
                ..PoolInfo::default()
            }),
            Request::Df => Reply::Df(SpaceInfo { available: Some(7), ..SpaceInfo::default() }),
            Request::Sync => Reply::Failed("the pool is read-only".into()),
            Request::Versions(_) => Reply::Versions { base: String::new(), next: Vec::new() },
            Request::Change(_) | Request::ChangeAtSync(_) => Reply::Changed,
            Request::ClearErrors => Reply::Changed,
            Request::Scrub(_) | Request::Device(_) => Reply::Changed,
            Request::Damaged => Reply::Damaged(Vec::new()),
            Request::History { .. } => Reply::History(Vec::new()),
            Request::Differences { .. } => {
                Reply::Differences(Differences { all: Vec::new(), next: None })
            }
            Request::Identity(_) => Reply::Identity(String::new()),
            Request::Send(_) => Reply::Sent(Sent::default()),
            Request::Receive(_) => Reply::Received(Received::default()),
            Request::Properties(_) => Reply::Properties(None),
            Request::Dedupe(_) => Reply::Dedupe(Answer::Gone),
        }
    }

    /// Sends something; counts what it receives.
    fn handle(request: Request, parts: &mut Parts<'_>) -> Reply {
        match request {
            Request::Send(_) => parts.write_all(&[7; 600_000]).unwrap(),
            Request::ChangeAtSync(_) => parts.agree().unwrap(),
            Request::Receive(_) => {
                let mut all = Vec::new();
                parts.take(500_000).read_to_end(&mut all).unwrap();
                let (name, identity) = (String::new(), all.len().to_string());
                return Reply::Received(Received {
                    snapshots: vec![(name, identity)],
                    ..Received::default()
                });
            }
            _ => {}
        }
        answer(request)
    }

    fn server() -> (tempfile::TempDir, Server) {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let server = Server::start_in(dir.path(), 0x2a, Arc::new(handle)).unwrap();
        (dir, server)
    }

    #[test]
    fn a_client_gets_the_answer_the_handler_gives() {
        let (dir, _server) = server();
        let ask = |request| ask_in(&[dir.path().into()], 0x2a, request);
        assert_eq!(ask(Request::Info).unwrap(), answer(Request::Info));
        assert_eq!(ask(Request::Df).unwrap(), answer(Request::Df));
        assert_eq!(ask(Request::Sync).unwrap_err().to_string(), "the pool is read-only");
    }

    #[test]
    fn a_session_asks_again_and_again_and_connects_anew_when_it_was_silent() {
        let (dir, _server) = server();
        let directories = vec![dir.path().into()];
        let mut session = Session { directories, device: 0x2a, open: None };
        for _ in 0..3 {
            assert_eq!(session.ask(&Request::Df).unwrap(), answer(Request::Df));
            assert!(matches!(session.ask(&Request::Sync), Err(AdminError::Refused(_))));
            assert!(session.open.is_some());
        }
        let (stream, used) = session.open.take().unwrap();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        session.open = used.checked_sub(STALLED).map(|long_ago| (stream, long_ago));
        assert_eq!(session.ask(&Request::Df).unwrap(), answer(Request::Df));
        session.device = 0x2b;
        session.open = None;
        assert!(matches!(session.ask(&Request::Df), Err(AdminError::NoDaemon)));
    }

    #[test]
    fn a_directory_that_others_may_enter_or_made_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("cairn");
        make_private(&place).unwrap();
        make_private(&place).unwrap();
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
        let server = Server::start_in(&place, 0x2a, Arc::new(handle)).unwrap();
        let ask = || ask_in(std::slice::from_ref(&place), 0x2a, Request::Info);
        ask().unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&place).is_err());
        assert!(matches!(ask(), Err(AdminError::NoDaemon)));
        drop(server);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(make_private(&link).is_err());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(make_private(&dir.path().join("file")).is_err());
        assert!(make_private(&dir.path().join("no/such")).is_err());
    }

    #[test]
    fn of_a_users_places_the_one_that_is_given_comes_first_and_that_in_tmp_last() {
        let places = own_directories();
        let user = rustix::process::geteuid().as_raw();
        assert_eq!(places.last().unwrap().file_name().unwrap(), &*format!("cairn-{user}"));
        assert!(places.len() >= 2 && places.len() <= 3);
    }

    #[test]
    fn without_a_daemon_the_client_is_told_so() {
        let (dir, server) = server();
        let ask = |device| ask_in(&[dir.path().into()], device, Request::Info);
        assert!(matches!(ask(0x2b), Err(AdminError::NoDaemon)));
        drop(server);
        assert!(matches!(ask(0x2a), Err(AdminError::NoDaemon)));
    }

    #[test]
    fn a_client_that_talks_nonsense_is_hung_up_on_and_others_are_served() {
        let (dir, server) = server();
        for junk in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[1, 0, 0, 0, 1, 0, 0xee]] {
            let mut stream = UnixStream::connect(&server.path).unwrap();
            stream.write_all(junk).unwrap();
            let mut rest = Vec::new();
            // The server may close with bytes unread, which resets the connection.
            let _ = stream.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
        assert!(ask_in(&[dir.path().into()], 0x2a, Request::Df).is_ok());
    }

    #[test]
    fn a_message_with_a_foreign_version_length_or_tail_is_refused() {
        let mut good = Vec::new();
        send(&mut good, &Request::Sync).unwrap();
        assert!(matches!(receive::<Request>(&mut &good[..]), Ok(Some(Request::Sync))));
        let changed = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes.push(0);
            receive::<Request>(&mut &bytes[..])
        };
        assert!(matches!(changed(4, 77), Err(AdminError::Version(77))));
        assert!(matches!(changed(3, 1), Err(AdminError::Garbled)));
        assert!(matches!(changed(0, 2), Err(AdminError::Garbled)));
        assert!(matches!(changed(6, 77), Err(AdminError::Garbled)));
        for end in 1..good.len() {
            assert!(receive::<Request>(&mut &good[..end]).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn a_guest_learns_no_names_and_changes_nothing() {
        let ask = |peer, request: &Request| {
            let (mut here, there) = UnixStream::pair().unwrap();
            let serving = std::thread::spawn(move || serve(there, peer, &handle));
            send(&mut here, request).unwrap();
            let reply = receive::<Reply>(&mut here).unwrap().unwrap();
            drop(here);
            serving.join().unwrap().unwrap();
            reply
        };
        let change = Change::SetDefault { name: VersionName::default() };
        let history = Request::History { data: true };
        let hashes = Question::Hashes { ino: 1, block: 4096, indices: vec![0] };
        let guarded = [
            Request::Versions(0),
            Request::Damaged,
            Request::Change(change),
            history,
            Request::Dedupe(hashes),
        ];
        for request in guarded {
            assert!(matches!(ask(Peer::Guest, &request), Reply::Failed(_)), "{request:?}");
            assert_eq!(ask(Peer::Owner, &request), answer(request));
        }
        assert_eq!(ask(Peer::Guest, &Request::Df), answer(Request::Df));
    }

    #[test]
    fn streams_go_over_the_same_connection() {
        let talk = |request: &Request, talk: &dyn Fn(&mut Parts<'_>)| {
            let (mut here, there) = UnixStream::pair().unwrap();
            let serving = std::thread::spawn(move || serve(there, Peer::Owner, &handle));
            send(&mut here, request).unwrap();
            talk(&mut Parts::new(&mut here));
            let reply = receive::<Reply>(&mut here).unwrap().unwrap();
            drop(here);
            serving.join().unwrap().unwrap();
            reply
        };
        let name = VersionName::default();
        let snapshot = name.clone();
        let sending = Sending { snapshot, from: None, replicate: false, token: None };
        let reply = talk(&Request::Send(sending), &|parts| {
            let mut all = Vec::new();
            assert_eq!(parts.read_to_end(&mut all).unwrap(), 600_000);
        });
        assert_eq!(reply, Reply::Sent(Sent::default()));
        let taken = |bytes: usize| {
            let request = Request::Receive(name.clone());
            // When it has enough it hangs up, and says so.
            let reply = talk(&request, &|parts| {
                let _ = parts.write_all(&vec![1; bytes]).and_then(|()| parts.end());
            });
            let Reply::Received(Received { snapshots, .. }) = reply else { panic!("{reply:?}") };
            snapshots[0].1.clone()
        };
        assert_eq!(taken(400_000), "400000");
        assert_eq!(taken(9_000_000), "500000");
    }

    #[test]
    fn the_ratio_of_nothing_is_not_known() {
        let mut space =
            SpaceInfo { stored_bytes: Some(0), logical_bytes: Some(0), ..<_>::default() };
        assert_eq!(space.compression_ratio(), None);
        (space.stored_bytes, space.logical_bytes) = (Some(100), Some(250));
        assert_eq!(space.compression_ratio(), Some(2.5));
    }
}
