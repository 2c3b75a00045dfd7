//! Making a pool: an empty engine and its first commit.

use crate::btree::Edit;
use crate::engine::open::{assemble, Parts};
use crate::error::Error;
use crate::format::chunk::Profile;
use crate::format::inode::{mode, InodeItem};
use crate::format::key::{kind, Key};
use crate::format::label;
use crate::format::pool::{property, SubvolItem, FIRST_INO, ROOT_INO};
use crate::format::ptr::{ChecksumKind, CompressionKind};
use crate::format::superblock::Superblock;
use crate::platform::{DeviceError, DeviceRef, Platform};
use crate::pool::{self, Pool};
use crate::subvol::change::Change;
use crate::subvol::store::{DataSettings, Result};
use crate::units::{Ino, Physical, TreeId, Txg};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

/// What a new pool shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Name of the pool, at most 63 bytes.
    pub name: String,
    /// Id of the pool; random when not given.
    pub pool_id: Option<[u8; 16]>,
    /// Bytes of a tree node: 16384, 32768 or 65536.
    pub node_bytes: u32,
    /// Profile of data.
    pub data_profile: Profile,
    /// Profile of metadata.
    pub metadata_profile: Profile,
    /// Bytes of a chunk; fitted to the pool when not given.
    pub chunk_bytes: Option<u64>,
    /// Compression of new data.
    pub compression: CompressionKind,
    /// Its level; 0 is the default.
    pub compression_level: i8,
    /// Checksum of new data.
    pub checksum: ChecksumKind,
    /// Permission bits of the root directory.
    pub root_mode: u32,
    /// Owner of the root directory.
    pub root_uid: u32,
    /// Group of the root directory.
    pub root_gid: u32,
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            name: String::new(),
            pool_id: None,
            node_bytes: 16384,
            data_profile: Profile::Single,
            metadata_profile: Profile::Dup,
            chunk_bytes: None,
            compression: CompressionKind::Zstd,
            compression_level: 0,
            checksum: ChecksumKind::Crc32c,
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatSummary {
    /// Id of the pool.
    pub pool_id: [u8; 16],
    /// Bytes of all devices.
    pub device_bytes: u64,
    /// Bytes a writer can store.
    pub available_bytes: u64,
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// Bytes of a tree node.
    pub node_bytes: u32,
}

/// Makes an empty pool on the devices. What they held is lost.
///
/// # Errors
/// [`Error::TooSmall`] with the minimum, [`Error::Argument`], errors of the devices.
pub fn format(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &FormatOptions,
) -> Result<FormatSummary> {
    let (pool, engine) = prepare(devices, platform, options)?;
    {
        let mut committer = engine.committer.lock();
        engine.commit_group(&mut committer, true)?;
    }
    if let Some(failed) = pool.members().iter().find(|member| !member.is_complete()) {
        // It could do without, but nobody wants a new pool like that.
        return Err(failed.error(Physical(0), DeviceError::Gone));
    }
    let device_bytes = pool.members().iter().map(|m| m.identity().bytes).sum();
    Ok(FormatSummary {
        pool_id: pool.pool_id(),
        device_bytes,
        available_bytes: engine.room().available,
        chunk_bytes: pool.chunk_bytes(),
        node_bytes: options.node_bytes,
    })
}

/// The new pool, with all that its first group has to write. Apart from [`format`], so that the
/// commit has more of a kernel's stack.
#[inline(never)]
fn prepare(
    devices: Vec<DeviceRef>,
    platform: Platform,
    options: &FormatOptions,
) -> Result<(Arc<Pool>, Arc<super::Engine>)> {
    let name = name_field(options.name.as_bytes())?;
    let pool = Pool::create(
        devices,
        platform.clone(),
        &pool::FormatOptions {
            name,
            pool_id: options.pool_id,
            node_bytes: options.node_bytes,
            data_profile: options.data_profile,
            metadata_profile: options.metadata_profile,
            chunk_bytes: options.chunk_bytes,
        },
    )?;
    let pool = Arc::new(pool);
    let mut secret = [0; 16];
    platform.entropy.fill(&mut secret);
    let superblock = first_superblock(&pool, options, secret);
    let subvols = first_subvol(&platform);
    let settings = DataSettings {
        compression: options.compression,
        level: i32::from(options.compression_level),
        checksum: options.checksum,
    };
    let engine = assemble(Parts {
        platform,
        pool: pool.clone(),
        superblock,
        subvols,
        settings,
        cache_bytes: 8 << 20,
        dirty_bytes: 8 << 20,
        commit_seconds: 5,
        deletion_refs: 1,
        read_only: false,
    })?;
    let subvol = engine.default_subvol().ok_or(Error::NoSuperblock)?;
    make_root(&subvol, options);
    engine.committer.lock().pool_edits = settings_items(&settings);
    Ok((pool, engine))
}

// Not inlined: the item is large.
#[inline(never)]
fn first_subvol(platform: &Platform) -> Vec<(TreeId, SubvolItem)> {
    let mut item = SubvolItem::zeroed();
    item.next_ino = FIRST_INO;
    item.birth = 1;
    platform.entropy.fill(&mut item.id);
    alloc::vec![(TreeId::FIRST_SUBVOL, item)]
}

/// A name as the label stores it.
///
/// # Errors
/// [`Error::Argument`] when it is too long or holds a NUL.
pub(super) fn name_field(name: &[u8]) -> Result<[u8; 64]> {
    if let Some(what) = label::name_fault(name) {
        return Err(Error::Argument { what });
    }
    let mut field = [0; 64];
    field[..name.len()].copy_from_slice(name);
    Ok(field)
}

#[inline(never)]
fn first_superblock(
    pool: &Pool,
    options: &FormatOptions,
    hash_secret: [u8; 16],
) -> Box<Superblock> {
    Box::new(Superblock {
        txg: Txg(0),
        written: 0,
        pool_id: pool.pool_id(),
        features: [0, 0, pool.incompat()],
        hash_secret,
        node_bytes: options.node_bytes,
        device_count: pool.members().len() as u16,
        data_profile: options.data_profile,
        metadata_profile: options.metadata_profile,
        clean: true,
        next_chunk: pool.next_chunk(),
        chunk_bytes: pool.chunk_bytes(),
        next_subvol: TreeId::FIRST_SUBVOL.0 + 1,
        default_subvol: TreeId::FIRST_SUBVOL.0,
        pool_root: None,
        chunk_root: None,
        space_root: None,
        refs_root: None,
        dead_root: None,
        residue: None,
        log: None,
        data_used: 0,
        metadata_used: 0,
        system_chunks: Vec::new(),
    })
}

#[inline(never)]
fn make_root(subvol: &Arc<crate::subvol::Subvol>, options: &FormatOptions) {
    let now = subvol.store.now();
    let mut item = InodeItem::zeroed();
    item.mode = mode::DIRECTORY | (options.root_mode & mode::PERMISSIONS);
    (item.uid, item.gid) = (options.root_uid, options.root_gid);
    item.nlink = 2;
    item.generation = 1;
    item.next_cookie = crate::format::dir::FIRST_COOKIE;
    item.set_atime(now);
    item.set_mtime(now);
    item.set_ctime(now);
    item.set_btime(now);
    let mut change = Change::begin(subvol);
    let root = subvol.new_inode(&mut change, Ino(ROOT_INO), item);
    change.finish();
    drop(root);
}

/// The properties that say how new data is stored.
pub(super) fn settings_items(settings: &DataSettings) -> Vec<(Key, Edit)> {
    let compression = alloc::vec![settings.compression as u8 + 1, settings.level as i8 as u8];
    let checksum = alloc::vec![settings.checksum as u8 + 1];
    alloc::vec![
        (Key::new(0, kind::PROPERTY, property::COMPRESSION), Edit::Put(compression)),
        (Key::new(0, kind::PROPERTY, property::CHECKSUM), Edit::Put(checksum)),
    ]
}
