//! Filesystems that suites and benchmarks are run on.
//!
//! cairn is one of them. The others show what is a fault of the suite and not of cairn, and what a
//! rate is worth on this machine.

use crate::checkout;
use crate::need::{self, Tool};
use crate::run::Cmd;
use anyhow::{bail, Context, Result};
use std::path::Path;
use std::time::Duration;

/// How a mount is wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct MountOptions<'a> {
    /// Refuse changes.
    pub read_only: bool,
    /// Further options, separated by commas.
    pub extra: &'a str,
}

/// A kind of filesystem: how to make, mount and check one.
pub trait Subject: Send + Sync {
    /// The name in reports.
    fn name(&self) -> &str;

    /// Makes sure that it can be used here.
    ///
    /// # Errors
    /// Why it cannot.
    fn prepare(&self) -> Result<()>;

    /// Whether its server is a process, whose memory can be looked at.
    fn is_fuse(&self) -> bool {
        false
    }

    /// Makes an empty filesystem on a device or image file.
    ///
    /// # Errors
    /// What its mkfs says.
    fn mkfs(&self, target: &Path) -> Result<()>;

    /// Mounts it.
    ///
    /// # Errors
    /// What its mount says.
    fn mount(&self, target: &Path, dir: &Path, options: MountOptions<'_>) -> Result<()>;

    /// Checks it, unmounted, without changing anything; an error tells what is wrong with it.
    ///
    /// # Errors
    /// What its checker says.
    fn check(&self, target: &Path) -> Result<()>;
}

/// The time a mount, an unmount or a check of a test image may take.
const LIMIT: Duration = Duration::from_secs(300);

fn mount_flags(options: MountOptions<'_>, own: &str) -> String {
    let access = if options.read_only { "ro" } else { "rw" };
    let parts = [access, own, options.extra];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(",")
}

/// cairn, through FUSE.
#[derive(Default)]
pub struct Cairn {
    /// Options that every mount gets, for comparing settings.
    pub options: &'static str,
}

impl Subject for Cairn {
    fn name(&self) -> &str {
        "cairn"
    }

    fn prepare(&self) -> Result<()> {
        need::tools(need::MOUNT)?;
        for program in ["mkfs.cairn", "mount.cairn", "fsck.cairn"] {
            if !checkout::binary(program).is_file() {
                bail!("{program} has not been built: cargo build --release");
            }
        }
        Ok(())
    }

    fn is_fuse(&self) -> bool {
        true
    }

    fn mkfs(&self, target: &Path) -> Result<()> {
        Cmd::new(checkout::binary("mkfs.cairn")).args(["-q", "-f"]).arg(target).limit(LIMIT).quiet()
    }

    fn mount(&self, target: &Path, dir: &Path, options: MountOptions<'_>) -> Result<()> {
        let flags = mount_flags(options, self.options);
        Cmd::new(checkout::binary("mount.cairn"))
            .args([target, dir])
            .args(["-o", &flags])
            .limit(LIMIT)
            .quiet()
    }

    fn check(&self, target: &Path) -> Result<()> {
        Cmd::new(checkout::binary("fsck.cairn")).args(["-f", "-n"]).arg(target).limit(LIMIT).quiet()
    }
}

/// A filesystem of the kernel.
pub struct Kernel {
    name: &'static str,
    kind: &'static str,
    tools: &'static [Tool],
    mkfs: &'static [&'static str],
    options: &'static str,
    check: &'static [&'static str],
}

/// The kernel's ext4.
pub const EXT4: Kernel = Kernel {
    name: "ext4",
    kind: "ext4",
    tools: &[("mkfs.ext4", "e2fsprogs")],
    // With inodes for a million files on the smallest device that is measured on.
    mkfs: &["mkfs.ext4", "-q", "-F", "-i", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    options: "",
    check: &["fsck.ext4", "-f", "-n"],
};

/// The kernel's Btrfs, compressing as cairn does.
pub const BTRFS: Kernel = Kernel {
    name: "btrfs",
    kind: "btrfs",
    tools: &[("mkfs.btrfs", "btrfs-progs")],
    mkfs: &["mkfs.btrfs", "-q", "-f"],
    options: "compress=zstd",
    check: &["btrfs", "check"],
};

impl Subject for Kernel {
    fn name(&self) -> &str {
        self.name
    }

    fn prepare(&self) -> Result<()> {
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if !known.lines().any(|line| line.trim_start() == self.kind) {
            // It may be a module that mount(8) loads; only a kernel that cannot load any is final.
            if !Path::new("/proc/modules").exists() {
                bail!("this kernel has no {}", self.kind);
            }
        }
        need::tools(self.tools)
    }

    fn mkfs(&self, target: &Path) -> Result<()> {
        Cmd::new(self.mkfs[0]).args(&self.mkfs[1..]).arg(target).limit(LIMIT).quiet()
    }

    fn mount(&self, target: &Path, dir: &Path, options: MountOptions<'_>) -> Result<()> {
        let flags = mount_flags(options, self.options);
        let cmd = Cmd::new("mount").args(["-t", self.kind, "-o", &flags]);
        cmd.args([target, dir]).limit(LIMIT).quiet()
    }

    fn check(&self, target: &Path) -> Result<()> {
        // The kernel lets go of the device a moment after the unmount.
        let mut tries = 0;
        loop {
            let cmd = Cmd::new(self.check[0]).args(&self.check[1..]).arg(target).limit(LIMIT);
            let result = cmd.quiet();
            tries += 1;
            let is_busy = result.as_ref().is_err_and(|why| format!("{why:#}").contains("busy"));
            if !is_busy || tries == 20 {
                return result;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Another filesystem behind FUSE.
pub struct Fuse {
    name: &'static str,
    tools: &'static [Tool],
    mkfs: &'static [&'static str],
    program: &'static str,
    options: &'static str,
}

/// ext4 behind FUSE.
pub const FUSE2FS: Fuse = Fuse {
    name: "fuse2fs",
    tools: &[("fuse2fs", "fuse2fs"), ("mkfs.ext4", "e2fsprogs")],
    mkfs: EXT4.mkfs,
    program: "fuse2fs",
    options: "allow_other,default_permissions,fakeroot",
};

/// NTFS behind FUSE: the one driver of this kind in wide use.
pub const NTFS3G: Fuse = Fuse {
    name: "ntfs-3g",
    tools: &[("ntfs-3g", "ntfs-3g"), ("mkfs.ntfs", "ntfs-3g")],
    mkfs: &["mkfs.ntfs", "--fast", "--quiet", "--force"],
    program: "ntfs-3g",
    options: "allow_other,permissions,big_writes",
};

impl Subject for Fuse {
    fn name(&self) -> &str {
        self.name
    }

    fn prepare(&self) -> Result<()> {
        need::tools(self.tools)
    }

    fn is_fuse(&self) -> bool {
        true
    }

    fn mkfs(&self, target: &Path) -> Result<()> {
        Cmd::new(self.mkfs[0]).args(&self.mkfs[1..]).arg(target).limit(LIMIT).quiet()
    }

    fn mount(&self, target: &Path, dir: &Path, options: MountOptions<'_>) -> Result<()> {
        let flags = mount_flags(options, self.options);
        Cmd::new(self.program).args([target, dir]).args(["-o", &flags]).limit(LIMIT).quiet()
    }

    fn check(&self, _target: &Path) -> Result<()> {
        Ok(())
    }
}

/// The subject of that name.
///
/// # Errors
/// When there is none.
pub fn by_name(name: &str) -> Result<Box<dyn Subject>> {
    Ok(match name {
        "cairn" => Box::new(Cairn::default()),
        "ext4" => Box::new(EXT4),
        "btrfs" => Box::new(BTRFS),
        "fuse2fs" => Box::new(FUSE2FS),
        "ntfs-3g" => Box::new(NTFS3G),
        _ => {
            bail!("no filesystem called {name}: cairn, ext4, btrfs, fuse2fs and ntfs-3g are known")
        }
    })
}

/// The process that serves the FUSE mount of `target` at `dir`.
///
/// # Errors
/// When none is found.
pub fn server_of(target: &Path, dir: &Path) -> Result<u32> {
    let names = [target, dir].map(|path| path.as_os_str().as_encoded_bytes().to_vec());
    let mentions = |line: &[u8]| {
        line.split(|byte| *byte == 0).any(|word| names.iter().any(|name| name == word))
    };
    let serves = |pid: &Path| {
        std::fs::read_dir(pid.join("fd")).is_ok_and(|files| {
            files.flatten().any(|file| {
                std::fs::read_link(file.path()).is_ok_and(|link| link == Path::new("/dev/fuse"))
            })
        })
    };
    for entry in std::fs::read_dir("/proc").context("no /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if mentions(&line) && serves(&entry.path()) {
            return Ok(pid);
        }
    }
    bail!("no process serves {}", dir.display())
}

/// The most memory a process has had resident so far, in bytes.
pub fn memory_peak(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
