//! Pools made by hand, for tests: a sound one with some of everything, which a test then damages.
//!
//! The forge keeps items as maps. [`Forge::build`] writes them as trees with right checksums, and
//! writes a space tree, a residue and a superblock that agree with them; so what a test changed in
//! a map is the only thing that is wrong.

use crate::btree::{Edit, Node, NodeSink, NodeSource, Tree};
use crate::buf::Buf;
use crate::codec;
use crate::format::chunk::{Chunk, ChunkKind, Profile};
use crate::format::dir::{decode_cookies, encode_cookies, name_hash, Entry};
use crate::format::extent::{Blob, Extent};
use crate::format::inode::{mode, xattr_hint, InodeItem, LinkItem};
use crate::format::key::{kind, Key};
use crate::format::pool::{property, SubvolItem, FIRST_INO, ROOT_INO};
use crate::format::ptr::{BlockPtr, ChecksumKind, CompressionKind};
use crate::format::space::{Residue, Run, SummaryItem, REGION_BYTES};
use crate::format::superblock::Superblock;
use crate::format::xattr::{self, Xattr, XattrValue, PART_BYTES};
use crate::platform::Result;
use crate::pool::{FormatOptions, Pool, RunWrite};
use crate::sync::Mutex;
use crate::testing::{CrateCodecs, RamDevice, TestPlatform};
use crate::units::{sector_round, Ino, Logical, TreeId, Txg, SECTOR_BYTES};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

pub type Items = BTreeMap<Key, Vec<u8>>;

pub const SECRET: [u8; 16] = *b"hash secret 0123";
pub const TXG: Txg = Txg(40);
pub const SUBVOL: TreeId = TreeId::FIRST_SUBVOL;
const SECTOR: usize = SECTOR_BYTES as usize;

/// A change of something that is made while the pool is built.
type Hook<T> = Box<dyn Fn(&mut T) + Send + Sync>;

pub struct Forge {
    pub device: Arc<RamDevice>,
    pub platform: TestPlatform,
    pub pool: Pool,
    pub chunks: Vec<Chunk>,
    pub subvol: Items,
    pub pool_tree: Items,
    pub refs: Items,
    pub dead: Items,
    pub item: SubvolItem,
    pub change_space: Hook<Items>,
    pub change_chunks: Hook<Items>,
    pub change_residue: Hook<Residue>,
    pub change_superblock: Hook<Superblock>,
    /// Next free byte of each chunk.
    next: Mutex<BTreeMap<u64, u64>>,
}

/// What was built.
pub struct Built {
    pub device: Arc<RamDevice>,
    pub platform: TestPlatform,
    pub pool: Pool,
    pub superblock: Superblock,
}

impl Forge {
    /// A pool with nothing but chunks.
    pub fn new(data_profile: Profile) -> Forge {
        let device = RamDevice::new(16 << 20);
        let platform = TestPlatform::new(1);
        let options = FormatOptions { data_profile, ..FormatOptions::default() };
        let pool =
            Pool::create(vec![device.device()], platform.platform.clone(), &options).unwrap();
        let kinds = [ChunkKind::System, ChunkKind::Metadata, ChunkKind::Data];
        let chunks = kinds.map(|kind| pool.create_chunk(kind, TXG, 0).unwrap()).to_vec();
        let next = chunks.iter().map(|c| (c.logical.0, c.logical.0)).collect();
        let mut item = SubvolItem::zeroed();
        (item.next_ino, item.birth) = (FIRST_INO, 1);
        Forge {
            device,
            platform,
            pool,
            chunks,
            subvol: Items::new(),
            pool_tree: Items::new(),
            refs: Items::new(),
            dead: Items::new(),
            item,
            change_space: Box::new(|_| {}),
            change_chunks: Box::new(|_| {}),
            change_residue: Box::new(|_| {}),
            change_superblock: Box::new(|_| {}),
            next: Mutex::new(next),
        }
    }

    /// A pool with some of everything, in which nothing is wrong.
    pub fn sound(data_profile: Profile) -> Forge {
        let mut forge = Forge::new(data_profile);
        forge.inode(ROOT_INO, mode::DIRECTORY);
        forge.inode(2, mode::DIRECTORY);
        for (ino, file_type) in [(3, mode::REGULAR), (4, mode::SYMLINK), (5, mode::REGULAR)] {
            forge.inode(ino, file_type);
        }
        for (ino, file_type) in [(6, mode::REGULAR), (7, mode::CHAR), (8, mode::REGULAR)] {
            forge.inode(ino, file_type);
        }
        forge.inode(9, mode::REGULAR);
        forge.name(ROOT_INO, b"dir", 2);
        forge.name(ROOT_INO, b"file", 3);
        forge.name(2, b"hard", 3);
        forge.name(ROOT_INO, b"symlink", 4);
        forge.name(ROOT_INO, b"packed", 5);
        forge.name(ROOT_INO, b"small", 6);
        forge.name(ROOT_INO, b"device", 7);
        forge.name(2, b"inner", 8);
        forge.subvol.insert(Key::new(0, kind::ORPHAN, 9), Vec::new());
        forge.subvol.insert(Key::new(4, kind::SYMLINK, 0), b"target".to_vec());
        forge.edit(4, |inode| inode.size = 6);
        forge.edit(7, |inode| inode.rdev = 5 << 32 | 1);
        let plain = forge.plain(3, 0, &[1, 2, 3]);
        forge.extent(3, 5 * SECTOR_BYTES, &Extent::Promised { len: SECTOR_BYTES });
        forge.edit(3, |inode| inode.size = 3 * SECTOR_BYTES - 5);
        // Another file shares the last two sectors.
        let shared = plain.part(SECTOR_BYTES, 2 * SECTOR_BYTES);
        forge.extent(8, 0, &shared);
        forge.edit(8, |inode| inode.size = 2 * SECTOR_BYTES);
        if let Extent::Plain { addr, len, .. } = shared {
            let item = crate::format::space::RefItem { bytes: len, extra: 1 };
            forge.refs.insert(Key::new(addr.0, kind::REF, 0), item.to_bytes().to_vec());
        }
        let blob = forge.blob();
        let packed = |offset| Extent::Packed { blob, offset, len: SECTOR_BYTES };
        forge.extent(5, 0, &packed(0));
        forge.extent(5, 2 * SECTOR_BYTES, &packed(2 * SECTOR as u32));
        forge.edit(5, |inode| {
            inode.size = 3 * SECTOR_BYTES;
            inode.stored_bytes = blob.allocated();
        });
        forge.item.stored_bytes += blob.allocated();
        let inline = Extent::Inline {
            compression: CompressionKind::None,
            logical: 5,
            bytes: b"hello".to_vec(),
        };
        forge.extent(6, 0, &inline);
        forge.edit(6, |inode| inode.size = 5);
        forge.xattr(3, b"user.small", b"value");
        forge.xattr(3, b"user.large", &[7; 5000]);
        forge.pool_tree.insert(Key::new(0, kind::PROPERTY, property::CHECKSUM), vec![2]);
        forge
    }

    pub fn key(ino: u64) -> Key {
        Key::new(ino, kind::INODE, 0)
    }

    pub fn inode(&mut self, ino: u64, file_type: u32) {
        let mut inode = InodeItem::zeroed();
        inode.mode = file_type | 0o644;
        inode.generation = 2;
        if file_type == mode::DIRECTORY {
            (inode.nlink, inode.next_cookie) = (2, 3);
        }
        self.subvol.insert(Forge::key(ino), inode.to_bytes().to_vec());
        self.item.next_ino = self.item.next_ino.max(ino + 1);
        self.item.inodes += 1;
    }

    pub fn edit(&mut self, ino: u64, change: impl FnOnce(&mut InodeItem)) {
        let value = self.subvol.get_mut(&Forge::key(ino)).unwrap();
        let mut inode = InodeItem::decode(value).unwrap();
        change(&mut inode);
        *value = inode.to_bytes().to_vec();
    }

    pub fn read_inode(&self, ino: u64) -> InodeItem {
        InodeItem::decode(&self.subvol[&Forge::key(ino)]).unwrap()
    }

    pub fn hash_key(dir: u64, name: &[u8]) -> Key {
        Key::new(dir, kind::DIR_HASH, name_hash(&SECRET, name))
    }

    pub fn name(&mut self, dir: u64, name: &[u8], ino: u64) -> u64 {
        let target = self.read_inode(ino);
        let cookie = self.read_inode(dir).next_cookie;
        let entry = Entry { ino, file_type: target.file_type(), name: name.to_vec() };
        self.subvol.insert(Key::new(dir, kind::DIR_ENTRY, cookie), entry.encode());
        let hash = self.subvol.entry(Forge::hash_key(dir, name)).or_default();
        let mut cookies = if hash.is_empty() { vec![] } else { decode_cookies(hash).unwrap() };
        cookies.push(cookie);
        *hash = encode_cookies(&cookies);
        self.edit(dir, |inode| {
            inode.next_cookie += 1;
            inode.entries += 1;
            inode.size += name.len() as u64;
            inode.nlink += u32::from(target.is_dir());
        });
        if target.parent == 0 {
            self.edit(ino, |inode| (inode.parent, inode.parent_cookie) = (dir, cookie));
        } else {
            let key = Key::new(ino, kind::LINK, LinkItem::offset(Ino(dir), cookie));
            let link = LinkItem { parent: dir, cookie };
            self.subvol.insert(key, link.to_bytes().to_vec());
            self.edit(ino, |inode| inode.links += 1);
        }
        if !target.is_dir() {
            self.edit(ino, |inode| inode.nlink += 1);
        }
        cookie
    }

    pub fn xattr(&mut self, ino: u64, name: &[u8], value: &[u8]) {
        let id = self.read_inode(ino).next_cookie.max(1);
        let is_large = value.len() > xattr::INLINE_VALUE_MAX;
        let stored = match is_large {
            true => XattrValue::Parts { id, bytes: value.len() as u32 },
            false => XattrValue::Inline(value.to_vec()),
        };
        let list = [Xattr { name: name.to_vec(), value: stored }];
        let key = Key::new(ino, kind::XATTR, name_hash(&SECRET, name));
        self.subvol.insert(key, xattr::encode(&list));
        if is_large {
            for (index, part) in value.chunks(PART_BYTES).enumerate() {
                let key = Key::new(ino, kind::XATTR_PART, id << 8 | index as u64);
                self.subvol.insert(key, part.to_vec());
            }
        }
        self.edit(ino, |inode| {
            inode.xattr_hint |= xattr_hint::OTHER;
            inode.next_cookie = id + u64::from(is_large);
        });
    }

    /// Adds an extent item, with its bytes in all sums except those of blobs.
    pub fn extent(&mut self, ino: u64, at: u64, extent: &Extent) {
        self.subvol.insert(Key::new(ino, kind::EXTENT, at), extent.encode(TXG));
        let len = extent.len();
        match extent {
            Extent::Promised { .. } => {
                self.item.promised_bytes += len;
                self.edit(ino, |inode| inode.promised_bytes += len);
                return;
            }
            Extent::Plain { .. } => {
                self.item.stored_bytes += len;
                self.edit(ino, |inode| inode.stored_bytes += len);
            }
            _ => {}
        }
        self.item.logical_bytes += len;
    }

    /// Writes sectors filled with those bytes and adds their extent.
    pub fn plain(&mut self, ino: u64, at: u64, fills: &[u8]) -> Extent {
        let bytes: Vec<u8> = fills.iter().flat_map(|fill| [*fill; SECTOR]).collect();
        let addr = self.store(ChunkKind::Data, &bytes);
        let checksum_kind = ChecksumKind::Crc32c;
        let checksums = codec::checksum_sectors(&CrateCodecs, checksum_kind, &bytes).unwrap();
        let extent = Extent::Plain { addr, len: bytes.len() as u64, checksum_kind, checksums };
        self.extent(ino, at, &extent);
        extent
    }

    /// Writes a blob of four sectors.
    pub fn blob(&mut self) -> Blob {
        let bytes: Vec<u8> = (0..4 * SECTOR).map(|i| (i / 100) as u8).collect();
        let kind = CompressionKind::Zstd;
        let packed =
            codec::compress_within(&CrateCodecs, kind, 3, &bytes, 3 * SECTOR, Buf::zeroed).unwrap();
        let addr = self.store(ChunkKind::Data, &packed.buf);
        let stored = &packed.buf[..packed.stored as usize];
        Blob {
            addr,
            stored: packed.stored,
            logical: 4 * SECTOR as u32,
            compression: kind,
            checksum_kind: ChecksumKind::Crc32c,
            checksum: codec::checksum(&CrateCodecs, ChecksumKind::Crc32c, stored),
        }
    }

    /// Takes space at the end of what is used of a chunk of that kind.
    pub fn take(&self, kind: ChunkKind, bytes: u64) -> Logical {
        let chunk = self.chunks.iter().find(|chunk| chunk.kind == kind).unwrap();
        let mut all = self.next.lock();
        let next = all.get_mut(&chunk.logical.0).unwrap();
        let addr = Logical(*next);
        *next += sector_round(bytes);
        assert!(*next <= chunk.logical.0 + chunk.length, "the forge's chunk is full");
        addr
    }

    fn store(&self, kind: ChunkKind, bytes: &[u8]) -> Logical {
        let addr = self.take(kind, bytes.len() as u64);
        self.write_at(addr, Buf::copy_of(bytes).unwrap());
        addr
    }

    fn write_at(&self, addr: Logical, buf: Buf) {
        self.pool.write(vec![RunWrite { addr, bufs: vec![buf.into_slice()] }]).unwrap();
    }

    fn block(&self, addr: Logical, buf: Buf, stored: usize, level: u8) -> BlockPtr {
        let checksum = *blake3::hash(&buf[..stored]).as_bytes();
        self.write_at(addr, buf);
        let compression = CompressionKind::None;
        let stored = stored as u32;
        BlockPtr { addr, birth: TXG, stored, logical: stored, compression, level, checksum }
    }

    fn plant(&self, id: TreeId, items: &Items) -> Option<BlockPtr> {
        let edits: Vec<(Key, Edit)> =
            items.iter().map(|(key, value)| (*key, Edit::Put(value.clone()))).collect();
        Tree::empty(id).apply(self, &edits).unwrap().root
    }

    fn used(&self) -> BTreeMap<u64, u64> {
        self.next.lock().clone()
    }

    /// The space tree for what has been taken so far.
    fn space_items(&self) -> Items {
        let mut items = Items::new();
        for (chunk, end) in self.used() {
            let sectors = (end - chunk) / SECTOR_BYTES;
            let length = self.chunks.iter().find(|c| c.logical.0 == chunk).unwrap().length;
            assert!(length <= REGION_BYTES);
            let mut bits = vec![0u8; (length / SECTOR_BYTES / 8) as usize];
            (0..sectors).for_each(|sector| bits[sector as usize / 8] |= 1 << (sector % 8));
            let summary = SummaryItem { used_sectors: sectors, reserved: 0 };
            let key = Key::new(0, kind::SPACE_SUMMARY, chunk);
            items.insert(key, summary.to_bytes().to_vec());
            if sectors > 0 {
                items.insert(Key::new(chunk, kind::SPACE_BITMAP, 0), bits);
            }
        }
        items
    }

    /// Writes everything.
    pub fn build(mut self) -> Built {
        let root = self.plant(SUBVOL, &self.subvol.clone());
        self.item.set_root(root.as_ref());
        let key = Key::new(SUBVOL.0, kind::SUBVOL, 0);
        self.pool_tree.entry(key).or_insert(self.item.to_bytes().to_vec());
        let pool_root = self.plant(TreeId::POOL, &self.pool_tree);
        let refs_root = self.plant(TreeId::REFS, &self.refs);
        let dead_root = self.plant(TreeId::DEAD, &self.dead);
        let edits = self.pool.take_chunk_edits(TXG);
        let mut chunks: Items =
            edits.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        (self.change_chunks)(&mut chunks);
        let chunk_root = self.plant(TreeId::CHUNK, &chunks);
        // The cut.
        let before = self.used();
        let mut space = self.space_items();
        (self.change_space)(&mut space);
        let space_root = self.plant(TreeId::SPACE, &space);
        let addr = self.take(ChunkKind::Metadata, self.node_bytes() as u64);
        let mut residue = Residue::default();
        for (chunk, end) in self.used() {
            let (addr, bytes) = (Logical(before[&chunk]), end - before[&chunk]);
            if bytes > 0 {
                residue.taken.push(Run { addr, bytes });
            }
        }
        (self.change_residue)(&mut residue);
        let encoded = residue.encode(TXG.0);
        let buf = Buf::copy_of(&encoded).unwrap();
        let residue = Some(self.block(addr, buf, encoded.len(), 0));
        let used = |kind| {
            let of_kind = self.chunks.iter().filter(move |chunk| chunk.kind == kind);
            of_kind.map(|c| self.used()[&c.logical.0] - c.logical.0).sum::<u64>()
        };
        let mut superblock = Superblock {
            txg: TXG,
            written: 0,
            pool_id: self.pool.pool_id(),
            features: [0; 3],
            hash_secret: SECRET,
            node_bytes: self.pool.node_bytes(),
            device_count: 1,
            data_profile: self.pool.profile(ChunkKind::Data),
            metadata_profile: self.pool.profile(ChunkKind::Metadata),
            clean: true,
            next_chunk: self.pool.next_chunk(),
            chunk_bytes: self.pool.chunk_bytes(),
            next_subvol: SUBVOL.0 + 1,
            default_subvol: SUBVOL.0,
            pool_root,
            chunk_root,
            space_root,
            refs_root,
            dead_root,
            residue,
            log: None,
            data_used: used(ChunkKind::Data),
            metadata_used: used(ChunkKind::Metadata) + used(ChunkKind::System),
            system_chunks: self.pool.system_chunks(),
        };
        (self.change_superblock)(&mut superblock);
        self.pool.write_superblock(&superblock).unwrap();
        let Forge { device, platform, pool, .. } = self;
        Built { device, platform, pool, superblock }
    }
}

impl NodeSource for Forge {
    fn node_bytes(&self) -> usize {
        self.pool.node_bytes() as usize
    }

    fn pool_id(&self) -> [u8; 16] {
        self.pool.pool_id()
    }

    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        let bytes = self.pool.read_block(ptr)?.into_slice();
        Ok(Arc::new(Node::decode(bytes, ptr, tree, &self.pool_id(), self.node_bytes())?))
    }
}

impl NodeSink for Forge {
    fn as_source(&self) -> &dyn NodeSource {
        self
    }

    fn txg(&self) -> Txg {
        TXG
    }

    fn allocate(&self, tree: TreeId, count: usize) -> Result<Vec<Logical>> {
        let kind = match tree {
            TreeId::CHUNK => ChunkKind::System,
            _ => ChunkKind::Metadata,
        };
        Ok((0..count).map(|_| self.take(kind, self.node_bytes() as u64)).collect())
    }

    fn write(&self, _: TreeId, level: u8, nodes: Vec<(Logical, Buf)>) -> Result<Vec<BlockPtr>> {
        let write = |(addr, buf): (Logical, Buf)| {
            let stored = buf.len();
            self.block(addr, buf, stored, level)
        };
        Ok(nodes.into_iter().map(write).collect())
    }

    fn free(&self, _: TreeId, _: &BlockPtr) {}
}
