//! Images that every later version must open.
//!
//! `images/golden` holds pools as they were once written, each with a list of what it shows. A
//! version that cannot open one of them, or shows something else, has broken the format. They are
//! made with `cargo run -p cairn-tests --bin golden`, which never writes over one that is there.

use crate::device::{refs, Image, RamDevice};
use crate::fault::{built, cut_off, script, Script};
use crate::gen::{Op, Options};
use crate::platform::{Spawn, TestPlatform};
use crate::subject::{Pool, Subject};
use crate::tree::{show, File, Tree};
use crate::versions::{Plan, World, ROOT_SUBVOLUME};
use fs_core::engine::versions::VersionOp;
use fs_core::engine::{Engine, OpenOptions};
use fs_core::format::chunk::Profile;
use fs_core::format::inode::mode;
use fs_core::format::ptr::{ChecksumKind, CompressionKind};
use fs_core::platform::Timestamp;
use fs_core::receive::{content_of, Destination, Receiver};
use fs_core::stream::record::{Decoder, Encoder, Record};
use fs_core::stream::send::{Sender, Shipment};
use fs_core::vfs::{AccessTime, Caller, Filesystem, Volume, WriteFlags};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A golden image: what it is called and how it was made.
pub struct Golden {
    /// Name of its file, without what follows the first dot.
    pub name: &'static str,
    /// Content of the device, and what it shows.
    pub make: fn() -> Result<(Image, Tree), String>,
}

/// All golden images of this version.
pub const ALL: &[Golden] = &[
    Golden { name: "v1-closed", make: || closed(&Pool::default(), 1) },
    Golden { name: "v1-log", make: || with_log(&Pool::default(), 2) },
    Golden { name: "v1-plain-blake3-single", make: || closed(&plain(), 3) },
    Golden { name: "v1-large-nodes-dup", make: || closed(&large_nodes(), 4) },
    Golden { name: "v1-versions", make: || with_versions(5) },
    Golden { name: "v1-limits", make: || with_limits(6) },
    Golden { name: "v1-properties", make: || with_properties(9) },
    Golden { name: "v1-scrub", make: || with_scrub(7) },
    Golden { name: "v1-received", make: || with_received(8) },
];

fn plain() -> Pool {
    let mut pool = Pool::default();
    pool.format.compression = CompressionKind::None;
    pool.format.checksum = ChecksumKind::Blake3;
    pool.format.metadata_profile = Profile::Single;
    pool
}

fn large_nodes() -> Pool {
    let mut pool = Pool::default();
    pool.format.node_bytes = 65536;
    pool.format.data_profile = Profile::Dup;
    pool
}

/// A bit of everything, and a directory large enough for interior nodes.
fn operations(seed: u64) -> Script {
    let options =
        Options { file_bytes: 40 << 10, remount_permille: 0, reads: false, ..Options::MODEL };
    let mut script = script(seed, 100, options, 12 << 20);
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let many = b"many".to_vec();
    script.ops.push(Op::Mkdir { path: vec![many.clone()], mode: 0o755, caller });
    for index in 0..400 {
        let path = vec![many.clone(), format!("file number {index}").into_bytes()];
        script.ops.push(Op::Mknod { path, mode: mode::REGULAR | 0o644, rdev: 0, caller });
    }
    script
}

fn closed(pool: &Pool, seed: u64) -> Result<(Image, Tree), String> {
    built(pool, &operations(seed)).map(|(image, tree, _)| (image, tree))
}

/// The power fails just after everything was synced into the log.
fn with_log(pool: &Pool, seed: u64) -> Result<(Image, Tree), String> {
    cut_off(pool, &operations(seed))
}

/// Snapshots, clones, a rolled-back subvolume, and things that are being deleted.
fn with_versions(seed: u64) -> Result<(Image, Tree), String> {
    let mut world = World::new(story(seed, 50))?;
    world.tell()?;
    world.close()
}

/// Limits of the root subvolume that it has not reached.
fn with_limits(seed: u64) -> Result<(Image, Tree), String> {
    let mut world = World::new(story(seed, 20))?;
    world.limit(1 << 30, 1 << 29)?;
    world.tell()?;
    world.close()
}

/// Properties of the root subvolume, and of snapshots and clones of it.
fn with_properties(seed: u64) -> Result<(Image, Tree), String> {
    let mut world = World::new(story(seed, 40))?;
    for _ in 0..8 {
        world.set_property(ROOT_SUBVOLUME)?;
    }
    world.tell()?;
    world.close()
}

/// A scrub that has finished, and one that is paused in the middle.
fn with_scrub(seed: u64) -> Result<(Image, Tree), String> {
    let (image, tree) = closed(&Pool::default(), seed)?;
    let ram = RamDevice::of("ram", image);
    let platform = TestPlatform::new(seed, Spawn::AtOnce);
    let open = || {
        let (core, options) = (platform.platform(), OpenOptions::default());
        let devices = refs(std::slice::from_ref(&ram));
        Volume::open(devices, core, &options, AccessTime::Relative).map_err(|e| e.to_string())
    };
    for rate in [0, 1] {
        let volume = open()?;
        volume.engine().start_scrub(rate).map_err(|e| e.to_string())?;
        platform.clock.advance_ms(1000);
        platform.workers.tick();
        if rate > 0 {
            volume.engine().pause_scrub().map_err(|e| e.to_string())?;
        }
        volume.close().map_err(|e| e.to_string())?;
    }
    Ok((ram.image(), tree))
}

/// A subvolume that was received and went on, and one of which a part was received.
fn with_received(seed: u64) -> Result<(Image, Tree), String> {
    let (image, tree) = closed(&Pool::default(), seed)?;
    let ram = RamDevice::of("ram", image);
    let platform = TestPlatform::new(seed, Spawn::AtOnce);
    let devices = refs(std::slice::from_ref(&ram));
    let options = OpenOptions::default();
    let volume = Volume::open(devices, platform.platform(), &options, AccessTime::Relative)
        .map_err(|e| e.to_string())?;
    let full = include_bytes!("../../images/streams/full-1.stream");
    let incremental = include_bytes!("../../images/streams/incremental-1.stream");
    let engine = volume.engine();
    receive(engine, &Destination::New(b"in".to_vec()), full)?;
    let (id, first) = engine.with_versions(|versions| {
        let id = versions.subvolume(b"in").ok_or("it is not there")?;
        Ok::<_, String>((id, versions.snapshots(id)[0]))
    })?;
    // Both streams give their snapshot the same name.
    let rename = VersionOp::Rename { id: first, name: b"first".to_vec() };
    engine.change_versions(vec![rename]).map_err(|e| e.to_string())?;
    receive(engine, &Destination::Existing(id), incremental)?;
    // It is cut off, and nobody tidies up.
    let half = &full[..full.len() / 2];
    receive(engine, &Destination::New(b"half".to_vec()), half).expect_err("cut off");
    volume.close().map_err(|e| e.to_string())?;
    Ok((ram.image(), tree))
}

/// Receives a stream, as far as it goes.
fn receive(engine: &Arc<Engine>, to: &Destination, mut bytes: &[u8]) -> Result<(), String> {
    let codecs = engine.store.platform.codecs.clone();
    let (mut decoder, mut receiver) = (Decoder::default(), None);
    while decoder.need() > 0 {
        let at = decoder.position().bytes;
        let (head, tail) = bytes.split_at_checked(decoder.need()).ok_or("cut off")?;
        bytes = tail;
        match decoder.take(&*codecs, head).map_err(|e| e.to_string())? {
            None => {}
            Some(Record::Begin(begin)) => {
                let begun = Receiver::begin(engine, to, &begin, &mut |_| Ok(()));
                receiver = Some(begun.map_err(|e| e.to_string())?);
            }
            Some(record) => {
                let receiver: &mut Receiver = receiver.as_mut().ok_or("no beginning")?;
                receiver.take(record, at).map_err(|e| e.to_string())?;
            }
        }
    }
    let receiver = receiver.ok_or("no beginning")?;
    let arrival = receiver.finish(&mut |_| Ok(())).map_err(|e| e.to_string())?;
    let publish = VersionOp::Publish(*arrival);
    engine.change_versions(vec![publish]).map(drop).map_err(|e| e.to_string())
}

/// A stream of files that share data, of a subvolume below, with properties.
///
/// # Errors
/// When it cannot be made.
pub fn clones_stream() -> Result<Vec<u8>, String> {
    let (pool, ram) = (plain(), RamDevice::new("ram", 24 << 20));
    let core = TestPlatform::new(11, Spawn::AtOnce).platform();
    let said = |error: fs_core::error::Error| error.to_string();
    let devices = || refs(std::slice::from_ref(&ram));
    pool.format(&devices(), &core).map_err(said)?;
    let options = OpenOptions::default();
    let volume =
        Volume::open(devices(), core.clone(), &options, AccessTime::Never).map_err(said)?;
    let caller = Caller { uid: 0, gid: 0, umask: 0 };
    let make = |name: &[u8]| volume.mknod(volume.root(), name, 0o100644, 0, &caller);
    let (one, two) = (make(b"one").map_err(said)?.ino, make(b"two").map_err(said)?.ino);
    let data: Vec<u8> =
        (0..20_000u32).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    volume.write(one, 0, &data[..20_000], WriteFlags::default()).map_err(said)?;
    volume.copy_range(one, 4096, two, 8192, 12_288).map_err(said)?;
    let (engine, subvolume) = (volume.engine(), volume.version());
    let op = VersionOp::Snapshot { subvolume, name: b"shared".to_vec() };
    let id = engine.change_versions(vec![op]).map_err(said)?[0];
    let (snapshot, content) = (
        engine.open_version(id).map_err(said)?,
        content_of(engine, id, &mut |_| Ok(())).map_err(said)?,
    );
    let properties = [("compression", "zstd:3"), ("team:owner", "alice")];
    let properties = properties.map(|(name, value)| (name.to_string(), value.to_string()));
    let shipment = Shipment {
        id: snapshot.item().id,
        created: Timestamp { secs: snapshot.item().created, nanos: 0 },
        name: b"shared",
        below: b"home/alice",
        properties: Some(&properties),
        tree: snapshot.view().tree,
        tree_bytes: 0,
        content: &content,
        base: None,
        is_followed: false,
        resumes: None,
    };
    let (mut sender, mut encoder) = (Sender::new(&engine.store, &shipment), Encoder::default());
    let mut bytes = Vec::new();
    while let Some(record) = sender.next_record().map_err(said)? {
        bytes.extend(encoder.put(&*core.codecs, &record));
    }
    Ok(bytes)
}

/// A story of that many steps on a small pool.
fn story(seed: u64, steps: usize) -> Plan {
    Plan {
        seed,
        steps,
        ops_per_step: 5,
        options: Options { file_bytes: 8 << 10, ..Options::CRASH },
        device_bytes: 24 << 20,
        pool: Pool::default(),
        checks: false,
        trims: false,
        clears: false,
    }
}

/// Where golden streams are kept.
pub fn streams() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../images/streams")
}

/// Where golden images are kept.
pub fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../images/golden")
}

/// What a tree shows, a line for each name.
pub fn describe(tree: &Tree) -> String {
    let mut first: BTreeMap<usize, String> = BTreeMap::new();
    let mut text = String::new();
    for (path, identity) in &tree.names {
        let path = show(path).escape_debug().to_string();
        match first.get(identity) {
            Some(other) => text += &format!("{path} = {other}\n"),
            None => {
                text += &format!("{path} {}\n", describe_file(&tree.files[*identity]));
                first.insert(*identity, path);
            }
        }
    }
    text
}

fn describe_file(file: &File) -> String {
    let facts = &file.facts;
    let mut text = format!(
        "mode {:o} links {} owner {}:{} rdev {:#x} flags {:#x} project {}",
        facts.mode, facts.nlink, facts.uid, facts.gid, facts.rdev, facts.flags, facts.project
    );
    if let Some(content) = &file.content {
        let mut sum = 0;
        for page in content.pages() {
            let bytes = content.page(page);
            if bytes.iter().any(|b| *b != 0) {
                sum = crc32c::crc32c_append(sum, &page.to_le_bytes());
                sum = crc32c::crc32c_append(sum, bytes);
            }
        }
        text += &format!(" size {} content {sum:08x}", content.size());
    }
    if !facts.target.is_empty() {
        text += &format!(" target {:08x}", crc32c::crc32c(&facts.target));
    }
    for (name, value) in &facts.xattrs {
        text += &format!(" {} {:08x}", show(name), crc32c::crc32c(value));
    }
    text
}
