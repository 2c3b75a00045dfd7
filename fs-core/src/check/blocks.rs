//! Metadata blocks, every copy of each verified.

use crate::btree::{Node, NodeSource};
use crate::buf::{Buf, Slice};
use crate::codec;
use crate::device::Member;
use crate::error::Error;
use crate::format::ptr::{BlockPtr, CompressionKind};
use crate::format::space::Run;
use crate::platform::{DeviceError, Result};
use crate::pool::{Piece, Pool};
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
        let run = Run { addr: ptr.addr, bytes: ptr.allocated() };
        let pieces = self.pool.pieces(run)?;
        for (copy, (device, at)) in places(self.pool, &pieces) {
            let stored = ptr.stored as usize;
            match read_copy(self.pool, &pieces, copy) {
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
        if good.is_none() {
            // Pieces of different copies may make a whole block, or a device that lacks some
            // things may have this one.
            if let Ok(block) = self.pool.read_block(ptr) {
                self.bad.lock().append(&mut bad);
                return Ok(block);
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
        codec::expand(codecs, ptr.compression, stored, ptr.logical, ptr.addr, Buf::zeroed)
    }
}

/// The copies of a run that something of is on a complete device, with the first such place.
pub(super) fn places(pool: &Pool, pieces: &[Piece]) -> Vec<(usize, (u16, Physical))> {
    let copies = pieces.first().map_or(0, |piece| piece.copies.len());
    let first = |copy: usize| {
        let mut places = pieces.iter().filter_map(|piece| piece.copies.get(copy));
        Some((copy, *places.find(|(device, _)| is_complete(pool, *device))?))
    };
    (0..copies).filter_map(first).collect()
}

/// Whether a device should have everything.
pub(super) fn is_complete(pool: &Pool, device: u16) -> bool {
    pool.members().get(usize::from(device)).is_some_and(Member::is_complete)
}

/// One copy of a run, not verified; what of it is not on a complete device is taken from another
/// copy, so that the rest can be judged.
///
/// # Errors
/// What the device says.
pub(super) fn read_copy(pool: &Pool, pieces: &[Piece], copy: usize) -> Result<Buf> {
    let mut whole = Buf::zeroed(pieces.iter().map(|piece| piece.bytes as usize).sum())?;
    let mut at = 0;
    for piece in pieces {
        let own = piece.copies.get(copy).into_iter();
        let mut places = own.chain(&piece.copies);
        let place = places.find(|(device, _)| is_complete(pool, *device));
        let (device, from) = *place.or(piece.copies.first()).ok_or(Error::Failed)?;
        let bytes = read_place(pool, device, from, piece.bytes)?;
        whole[at..at + bytes.len()].copy_from_slice(&bytes);
        at += bytes.len();
    }
    Ok(whole)
}

/// Bytes of a device.
///
/// # Errors
/// What the device says.
pub(super) fn read_place(pool: &Pool, device: u16, at: Physical, bytes: u64) -> Result<Buf> {
    let gone = Error::Device { device, at, cause: DeviceError::Gone };
    pool.members().get(usize::from(device)).ok_or(gone)?.read_at(at, bytes as usize)
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
