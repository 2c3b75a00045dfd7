//! The kernel's crc32c and zstd as the core's [`Codecs`].
//!
//! zstd works in a workspace that the caller provides: tens to hundreds of KiB, depending on level
//! and length. Workspaces are kept for reuse. Compressing without one is refused, and the core
//! stores the data as it is; expanding must not fail for want of memory, so one workspace for it is
//! made at the start, and callers wait for it when there is no memory for another.

use crate::sys;
use alloc::vec::Vec;
use fs_core::error::Error;
use fs_core::platform::Codecs;
use fs_core::sync::{Mutex, Signal};

/// How many idle workspaces of a kind are kept.
const KEEP: usize = 8;

/// Memory for one run of zstd, aligned as zstd wants it.
type Workspace = Vec<u64>;

fn workspace(bytes: usize) -> Result<Workspace, Error> {
    let words = bytes.div_ceil(size_of::<u64>());
    let mut space = Vec::new();
    space.try_reserve_exact(words).map_err(|_| Error::Memory)?;
    space.resize(words, 0);
    Ok(space)
}

fn bytes_of(space: &Workspace) -> usize {
    space.len() * size_of::<u64>()
}

/// The kernel's codecs.
pub(crate) struct KernelCodecs {
    compress: Mutex<Vec<Workspace>>,
    expand: Mutex<Vec<Workspace>>,
    expand_returned: Signal,
    expand_bytes: usize,
}

impl KernelCodecs {
    /// Codecs with one workspace for expanding.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is none for it.
    pub(crate) fn new() -> Result<KernelCodecs, Error> {
        // SAFETY: has no preconditions.
        let expand_bytes = unsafe { sys::zstd_dctx_workspace_bound() };
        let mut expand = Vec::with_capacity(KEEP);
        expand.push(workspace(expand_bytes)?);
        Ok(KernelCodecs {
            compress: Mutex::new(Vec::with_capacity(KEEP)),
            expand: Mutex::new(expand),
            expand_returned: Signal::new(),
            expand_bytes,
        })
    }

    fn take_compress(&self, bytes: usize) -> Option<Workspace> {
        let kept = {
            let mut kept = self.compress.lock();
            let fits = kept.iter().position(|space| bytes_of(space) >= bytes);
            fits.map(|index| kept.swap_remove(index))
        };
        kept.or_else(|| workspace(bytes).ok())
    }

    fn give_back(kept: &Mutex<Vec<Workspace>>, space: Workspace) {
        let mut kept = kept.lock();
        if kept.len() < KEEP {
            kept.push(space);
        }
    }

    fn take_expand(&self) -> Workspace {
        if let Some(space) = self.expand.lock().pop() {
            return space;
        }
        if let Ok(space) = workspace(self.expand_bytes) {
            return space;
        }
        let mut space = None;
        self.expand_returned.wait_until(|| {
            space = self.expand.lock().pop();
            space.is_some()
        });
        space.expect("the wait ends when there is one")
    }
}

impl Codecs for KernelCodecs {
    fn crc32c(&self, bytes: &[u8]) -> u32 {
        // SAFETY: reads exactly the bytes of the slice.
        !unsafe { sys::crc32c(!0, bytes.as_ptr().cast(), bytes.len()) }
    }

    fn zstd_compress(&self, src: &[u8], dst: &mut [u8], level: i32) -> Option<usize> {
        // SAFETY: has no preconditions.
        let params = unsafe { sys::zstd_get_params(level, src.len() as u64) };
        // SAFETY: reads the parameters.
        let bytes = unsafe { sys::zstd_cctx_workspace_bound(&params.cParams) };
        let mut space = self.take_compress(bytes)?;
        // SAFETY: the workspace is as large as the library asked for, and lives until the end.
        let context = unsafe { sys::zstd_init_cctx(space.as_mut_ptr().cast(), bytes_of(&space)) };
        let written = if context.is_null() {
            None
        } else {
            // SAFETY: the context is valid; both slices are described by their own lengths.
            let result = unsafe {
                sys::zstd_compress_cctx(
                    context,
                    dst.as_mut_ptr().cast(),
                    dst.len(),
                    src.as_ptr().cast(),
                    src.len(),
                    &params,
                )
            };
            // SAFETY: has no preconditions.
            (unsafe { sys::zstd_is_error(result) } == 0).then_some(result)
        };
        Self::give_back(&self.compress, space);
        written
    }

    fn zstd_expand(&self, src: &[u8], dst: &mut [u8]) -> bool {
        // The library takes a run of frames; the core stores exactly one.
        // SAFETY: reads at most the bytes of the slice; an error is a number above any length.
        if unsafe { sys::zstd_find_frame_compressed_size(src.as_ptr().cast(), src.len()) }
            != src.len()
        {
            return false;
        }
        let mut space = self.take_expand();
        // SAFETY: the workspace is as large as the library asked for, and lives until the end.
        let context = unsafe { sys::zstd_init_dctx(space.as_mut_ptr().cast(), bytes_of(&space)) };
        let fills = !context.is_null() && {
            // SAFETY: the context is valid; both slices are described by their own lengths.
            let result = unsafe {
                sys::zstd_decompress_dctx(
                    context,
                    dst.as_mut_ptr().cast(),
                    dst.len(),
                    src.as_ptr().cast(),
                    src.len(),
                )
            };
            result == dst.len()
        };
        Self::give_back(&self.expand, space);
        self.expand_returned.notify_all();
        fills
    }
}
