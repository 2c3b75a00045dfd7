//! A pool that is read without being opened as a filesystem.
//!
//! Shows the newest published group, or an older one that is asked for. What the intent log holds
//! beyond it is not shown.

use cairn_host::{host_platform, FileDevice};
use fs_core::btree::{Node, NodeSource, Tree, Value};
use fs_core::engine::past;
use fs_core::error::Error;
use fs_core::format::chunk::{Chunk, DeviceItem};
use fs_core::format::dir::{decode_cookies, name_hash, Entry};
use fs_core::format::key::{kind, Key};
use fs_core::format::pool::{SubvolItem, ROOT_INO};
use fs_core::format::ptr::BlockPtr;
use fs_core::format::superblock::Superblock;
use fs_core::platform::{DeviceRef, Result};
use fs_core::pool::{Pool, PoolOptions};
use fs_core::units::{Logical, TreeId, Txg};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Nodes kept, so that walking beside a path does not read it again and again.
const NODES_KEPT: usize = 256;

/// A pool, read-only.
pub(crate) struct View {
    pub(crate) pool: Pool,
    pub(crate) superblock: Box<Superblock>,
    nodes: Mutex<BTreeMap<Logical, Arc<Node>>>,
}

impl View {
    /// Opens the pool on the devices, as of group `txg` if one is given, and loads its chunk tree.
    ///
    /// # Errors
    /// As [`Pool::open`], and what reading the chunk tree gives.
    pub(crate) fn open(devices: Vec<Arc<FileDevice>>, txg: Option<Txg>) -> Result<View> {
        let devices: Vec<DeviceRef> =
            devices.into_iter().map(|device| device as DeviceRef).collect();
        View::open_one(devices.clone(), txg).map_err(|error| match txg {
            Some(txg) => past::explain(error, txg, &devices, &host_platform()),
            None => error,
        })
    }

    fn open_one(devices: Vec<DeviceRef>, txg: Option<Txg>) -> Result<View> {
        let options =
            PoolOptions { read_only: true, degraded: true, txg, ..PoolOptions::default() };
        let (pool, superblock) = Pool::open(devices, host_platform(), &options)?;
        let view = View { pool: *pool, superblock, nodes: Mutex::default() };
        view.load_chunks()?;
        Ok(view)
    }

    fn load_chunks(&self) -> Result<()> {
        let mut chunks = Vec::new();
        self.each_item(&self.tree(TreeId::CHUNK)?, Key::MIN, |key, value| {
            let bad = |bad: fs_core::format::BadBytes| bad.in_item(TreeId::CHUNK, key.object);
            match key.kind {
                kind::CHUNK => {
                    chunks.push(Chunk::decode(Logical(key.object), &value).map_err(bad)?);
                }
                kind::DEVICE => {
                    let index = u16::try_from(key.object)
                        .map_err(|_| bad(fs_core::format::BadBytes("device index out of range")))?;
                    self.pool.add_device_item(index, &DeviceItem::decode(&value).map_err(bad)?)?;
                }
                _ => {}
            }
            Ok(true)
        })?;
        self.pool.add_chunks(chunks)
    }

    /// A tree of the pool or of a subvolume, as the published group has it.
    pub(crate) fn tree(&self, id: TreeId) -> Result<Tree> {
        let root = match id {
            TreeId::POOL => self.superblock.pool_root,
            TreeId::CHUNK => self.superblock.chunk_root,
            TreeId::SPACE => self.superblock.space_root,
            TreeId::REFS => self.superblock.refs_root,
            TreeId::DEAD => self.superblock.dead_root,
            subvol => {
                let item = self.subvol(subvol)?;
                let root = item.root(self.superblock.txg);
                let root = root.map_err(|bad| bad.in_item(TreeId::POOL, subvol.0))?;
                return Ok(Tree { id: item.lineage(subvol), root });
            }
        };
        Ok(Tree { id, root })
    }

    /// The item of a subvolume.
    pub(crate) fn subvol(&self, id: TreeId) -> Result<SubvolItem> {
        let key = Key::new(id.0, kind::SUBVOL, 0);
        let value = self.tree(TreeId::POOL)?.lookup(self, &key)?;
        let value = value.ok_or(Error::Argument { what: "the pool has no such subvolume" })?;
        SubvolItem::decode(&value).map_err(|bad| bad.in_item(TreeId::POOL, id.0))
    }

    /// The subvolume with that number, or the one that is mounted by default.
    pub(crate) fn subvol_id(&self, number: Option<u64>) -> TreeId {
        TreeId(number.unwrap_or(self.superblock.default_subvol))
    }

    /// Shows the items of a tree from `from` on until `each` returns false.
    pub(crate) fn each_item(
        &self,
        tree: &Tree,
        from: Key,
        mut each: impl FnMut(Key, Value) -> Result<bool>,
    ) -> Result<()> {
        let mut cursor = tree.cursor();
        cursor.seek(self, &from)?;
        while let Some((key, value)) = cursor.next(self)? {
            if !each(key, value)? {
                break;
            }
        }
        Ok(())
    }

    /// The inode a user named: by number, or by path from the root of the subvolume.
    pub(crate) fn find_inode(&self, tree: &Tree, name: &str) -> Result<u64> {
        if let Ok(number) = name.parse() {
            return Ok(number);
        }
        let mut components = name.split('/').filter(|component| !matches!(*component, "" | "."));
        components.try_fold(ROOT_INO, |directory, component| {
            self.find_name(tree, directory, component.as_bytes())
        })
    }

    fn find_name(&self, tree: &Tree, directory: u64, name: &[u8]) -> Result<u64> {
        let absent = Error::Argument { what: "there is no such file" };
        let hash = name_hash(&self.superblock.hash_secret, name);
        let bad = |bad: fs_core::format::BadBytes| bad.in_item(tree.id, directory);
        let cookies = tree.lookup(self, &Key::new(directory, kind::DIR_HASH, hash))?;
        for cookie in decode_cookies(&cookies.ok_or(absent.clone())?).map_err(bad)? {
            let key = Key::new(directory, kind::DIR_ENTRY, cookie);
            let Some(value) = tree.lookup(self, &key)? else { continue };
            let entry = Entry::decode(&value).map_err(bad)?;
            if entry.name == name {
                return Ok(entry.ino);
            }
        }
        Err(absent)
    }

    /// Where the copies of a block are: device and byte offset of the first piece of each.
    pub(crate) fn places(&self, addr: Logical, bytes: u64) -> Vec<String> {
        let Ok(copies) = self.pool.map(addr, bytes) else { return Vec::new() };
        let first = |pieces: &Vec<(u16, fs_core::units::Physical)>| {
            let (device, at) = pieces.first()?;
            let name = self.pool.members().get(usize::from(*device))?.name();
            Some(format!("{name}@{at}"))
        };
        copies.iter().filter_map(first).collect()
    }
}

impl NodeSource for View {
    fn node_bytes(&self) -> usize {
        self.superblock.node_bytes as usize
    }

    fn pool_id(&self) -> [u8; 16] {
        self.superblock.pool_id
    }

    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        let lock = || self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = lock().get(&ptr.addr).filter(|n| n.ptr() == ptr && n.tree() == tree) {
            return Ok(node.clone());
        }
        let block = self.pool.read_block(ptr)?.into_slice();
        let node = Arc::new(Node::decode(block, ptr, tree, &self.pool_id(), self.node_bytes())?);
        let mut nodes = lock();
        if nodes.len() >= NODES_KEPT {
            nodes.clear();
        }
        nodes.insert(ptr.addr, node.clone());
        Ok(node)
    }
}
