//! Metadata blocks, every copy of each verified.

use crate::btree::{Node, NodeSource};
use crate::buf::{Buf, Slice};
use crate::codec;
use crate::error::Error;
use crate::format::ptr::{BlockPtr, CompressionKind};
use crate::platform::Result;
use crate::pool::Pool;
use crate::sync::Mutex;
use crate::units::{Logical, Physical, TreeId};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A copy of a block that is not what its parent vouches for, although another is.
pub(super) struct BadCopy {
    pub addr: Logical,
    pub device: u16,
    pub at: Physical,
    pub error: Error,
}

/// Reads blocks without a cache: a walk asks for each once.
pub(super) struct Blocks<'a> {
    pub pool: &'a Pool,
    /// Bad copies since they were last taken.
    bad: Mutex<Vec<BadCopy>>,
}

impl<'a> Blocks<'a> {
    pub fn new(pool: &'a Pool) -> Blocks<'a> {
        Blocks { pool, bad: Mutex::new(Vec::new()) }
    }

    /// Bad copies that were met since the last call.
    pub fn take_bad(&self) -> Vec<BadCopy> {
        core::mem::take(&mut *self.bad.lock())
    }

    /// The content of a block, expanded. Every copy is read and verified.
    ///
    /// # Errors
    /// When no copy is good.
    pub fn read(&self, ptr: &BlockPtr) -> Result<Buf> {
        let codecs = &*self.pool.platform().codecs;
        let mut good = None;
        let mut bad = Vec::new();
        for (device, at) in copies(self.pool, ptr.addr, ptr.allocated())? {
            let stored = ptr.stored as usize;
            match read_copy(self.pool, device, at, ptr.allocated()) {
                Ok(buf) if codecs.blake3(&buf[..stored]) == ptr.checksum => {
                    good.get_or_insert(buf);
                }
                Ok(_) => {
                    let error = Error::Checksum { addr: ptr.addr, bytes: ptr.allocated() };
                    bad.push(BadCopy { addr: ptr.addr, device, at, error });
                }
                Err(Error::Memory) => return Err(Error::Memory),
                Err(error) => bad.push(BadCopy { addr: ptr.addr, device, at, error }),
            }
        }
        let Some(mut buf) = good else {
            let lost = Error::Checksum { addr: ptr.addr, bytes: ptr.allocated() };
            return Err(bad.pop().map_or(lost, |bad| bad.error));
        };
        self.bad.lock().append(&mut bad);
        if ptr.compression == CompressionKind::None {
            // What follows the content on disk is not vouched for.
            buf[ptr.stored as usize..].fill(0);
            return Ok(buf);
        }
        let stored = &buf[..ptr.stored as usize];
        codec::expand(codecs, ptr.compression, stored, ptr.logical, ptr.addr)
    }
}

/// Where the copies of a run are.
///
/// # Errors
/// [`Error::Unmapped`]; [`Error::Corrupt`] for a copy in pieces, which no known profile makes.
pub(super) fn copies(pool: &Pool, addr: Logical, bytes: u64) -> Result<Vec<(u16, Physical)>> {
    let whole = |pieces: Vec<(u16, Physical)>| match pieces[..] {
        [piece] => Ok(piece),
        _ => Err(Error::Corrupt { what: "copy of a block in several pieces", addr }),
    };
    pool.map(addr, bytes)?.into_iter().map(whole).collect()
}

/// One copy of a run, not verified.
///
/// # Errors
/// What the device says.
pub(super) fn read_copy(pool: &Pool, device: u16, at: Physical, bytes: u64) -> Result<Buf> {
    let member = pool.members().get(usize::from(device));
    member.ok_or(Error::MissingDevice { device })?.read_at(at, bytes as usize)
}

impl NodeSource for Blocks<'_> {
    fn node_bytes(&self) -> usize {
        self.pool.node_bytes() as usize
    }

    fn pool_id(&self) -> [u8; 16] {
        self.pool.pool_id()
    }

    fn load(&self, tree: TreeId, ptr: &BlockPtr) -> Result<Arc<Node>> {
        let buf = self.read(ptr)?;
        let bytes: Slice = buf.into_slice();
        let node = Node::decode(bytes, ptr, tree, &self.pool_id(), self.node_bytes())?;
        Ok(Arc::new(node))
    }
}
