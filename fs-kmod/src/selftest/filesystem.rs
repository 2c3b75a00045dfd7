//! The filesystem itself, on a device in memory.

use super::{failed, on_threads, pattern, platform, Failure, Outcome};
use crate::kthread::Pool;
use crate::ram::RamDevice;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use fs_core::check::{self, CheckOptions, Quiet};
use fs_core::engine::{self, FormatOptions, OpenOptions};
use fs_core::error::{Errno, Error};
use fs_core::platform::{DeviceRef, Platform};
use fs_core::units::Ino;
use fs_core::vfs::{AccessTime, Caller, Filesystem, RenameFlags, Volume, WriteFlags, XattrMode};

const ROOT: Caller = Caller { uid: 0, gid: 0, umask: 0 };
const REGULAR: u32 = 0o100_644;
const DEVICE_BYTES: usize = 96 << 20;

/// A formatted device, and what it is opened with.
struct Disk {
    device: DeviceRef,
    platform: Platform,
}

impl Disk {
    fn new(pool: &Pool) -> Result<Disk, Failure> {
        let device: DeviceRef = Arc::new(RamDevice::new("ram", DEVICE_BYTES).map_err(failed)?);
        let disk = Disk { device, platform: platform(pool)? };
        let options = FormatOptions { name: String::from("selftest"), ..FormatOptions::default() };
        engine::format(vec![disk.device.clone()], disk.platform.clone(), &options)
            .map_err(failed)?;
        Ok(disk)
    }

    fn open(&self) -> Result<Arc<Volume>, Failure> {
        // The machine is small.
        let options =
            OpenOptions { cache_bytes: 8 << 20, dirty_bytes: 16 << 20, ..OpenOptions::default() };
        let devices = vec![self.device.clone()];
        Volume::open(devices, self.platform.clone(), &options, AccessTime::Relative).map_err(failed)
    }
}

impl Disk {
    /// Nothing is wrong with the pool on the device, which nobody has open.
    fn check(&self) -> Outcome {
        let devices = vec![self.device.clone()];
        let options = CheckOptions::default();
        let report =
            check::check(devices, self.platform.clone(), &options, &Quiet).map_err(failed)?;
        if !report.is_clean() {
            return Err(format!("{:?}", report.findings));
        }
        ensure!(report.stats.subvols == 1);
        Ok(())
    }
}

fn create(fs: &dyn Filesystem, dir: Ino, name: &str, data: &[u8]) -> Result<Ino, Error> {
    let ino = fs.mknod(dir, name.as_bytes(), REGULAR, 0, &ROOT)?.ino;
    fs.write(ino, 0, data, WriteFlags::default())?;
    Ok(ino)
}

fn content(fs: &dyn Filesystem, dir: Ino, name: &str) -> Result<Vec<u8>, Error> {
    let attr = fs.lookup(dir, name.as_bytes())?;
    let mut data = vec![0; attr.size as usize];
    let len = fs.read(attr.ino, 0, &mut data)?;
    data.truncate(len);
    fs.forget(attr.ino, 1);
    Ok(data)
}

fn names(fs: &dyn Filesystem, dir: Ino) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    fs.readdir(dir, 0, &mut |entry| {
        let name = String::from_utf8_lossy(entry.name);
        if name != "." && name != ".." {
            names.push(name.into_owned());
        }
        true
    })?;
    names.sort_unstable();
    Ok(names)
}

/// Files of many sizes: inline, one extent, several, all compressible.
const SIZES: &[usize] = &[0, 1, 100, 4096, 5000, 65_536, 300_001, 2 << 20];

fn fill(fs: &dyn Filesystem) -> Result<(), Error> {
    let dir = fs.mkdir(fs.root(), b"dir", 0o755, &ROOT)?.ino;
    for size in SIZES {
        let ino = create(fs, dir, &format!("file {size}"), &pattern(*size, 1 + *size as u32))?;
        fs.setxattr(ino, b"user.size", format!("{size}").as_bytes(), XattrMode::Create)?;
        fs.forget(ino, 1);
    }
    for index in 0..500 {
        let ino = create(fs, fs.root(), &format!("small {index}"), &[index as u8; 64])?;
        fs.forget(ino, 1);
    }
    for index in (0..500).step_by(2) {
        fs.unlink(fs.root(), format!("small {index}").as_bytes())?;
    }
    fs.symlink(fs.root(), b"link", b"dir/file 1", &ROOT)?;
    let flags = RenameFlags::default();
    fs.rename(fs.root(), b"small 1", dir, b"moved", flags, &ROOT)?;
    Ok(())
}

fn verify(fs: &dyn Filesystem) -> Outcome {
    let dir = fs.lookup(fs.root(), b"dir").map_err(failed)?.ino;
    for size in SIZES {
        let name = format!("file {size}");
        let data = content(fs, dir, &name).map_err(failed)?;
        ensure_eq!(data.len(), *size);
        ensure!(data == pattern(*size, 1 + *size as u32));
        let ino = fs.lookup(dir, name.as_bytes()).map_err(failed)?.ino;
        let value = fs.getxattr(ino, b"user.size").map_err(failed)?;
        ensure_eq!(value, format!("{size}").into_bytes());
        fs.forget(ino, 1);
    }
    ensure_eq!(names(fs, dir).map_err(failed)?.len(), SIZES.len() + 1);
    // "dir", "link", and every other small one but the one that was moved.
    ensure_eq!(names(fs, fs.root()).map_err(failed)?.len(), 2 + 249);
    ensure_eq!(content(fs, dir, "moved").map_err(failed)?, [1; 64]);
    ensure_eq!(
        fs.lookup(fs.root(), b"small 0").err().map(|error| error.errno()),
        Some(Errno::NoEnt)
    );
    fs.forget(dir, 1);
    Ok(())
}

/// What is written, committed and closed is there when the pool is opened again.
pub(crate) fn a_filesystem_keeps_its_files_over_reopening() -> Outcome {
    let pool = Pool::for_this_machine().map_err(failed)?;
    let disk = Disk::new(&pool)?;
    let fs = disk.open()?;
    fill(&*fs).map_err(failed)?;
    verify(&*fs)?;
    fs.sync().map_err(failed)?;
    fs.engine().drop_caches();
    verify(&*fs)?;
    fs.close().map_err(failed)?;
    drop(fs);
    let fs = disk.open()?;
    verify(&*fs)?;
    fs.close().map_err(failed)?;
    drop(fs);
    disk.check()
}

/// What was synced is there after everything stopped at once; what is there is whole.
pub(crate) fn a_synced_file_survives_a_crash() -> Outcome {
    let pool = Pool::for_this_machine().map_err(failed)?;
    let disk = Disk::new(&pool)?;
    let fs = disk.open()?;
    fill(&*fs).map_err(failed)?;
    fs.sync().map_err(failed)?;
    let data = pattern(200_000, 77);
    let ino = create(&*fs, fs.root(), "synced", &data).map_err(failed)?;
    fs.fsync(ino, false).map_err(failed)?;
    fs.shutdown();
    ensure!(fs.mknod(fs.root(), b"late", REGULAR, 0, &ROOT).is_err());
    drop(fs);
    let fs = disk.open()?;
    ensure!(content(&*fs, fs.root(), "synced").map_err(failed)? == data);
    fs.unlink(fs.root(), b"synced").map_err(failed)?;
    verify(&*fs)?;
    fs.close().map_err(failed)?;
    drop(fs);
    disk.check()
}

/// Threads work side by side in directories of their own, and each finds what it wrote.
pub(crate) fn threads_may_share_a_filesystem() -> Outcome {
    let pool = Pool::for_this_machine().map_err(failed)?;
    let disk = Disk::new(&pool)?;
    let fs = disk.open()?;
    let wrong = Arc::new(AtomicU64::new(0));
    let (shared, seen) = (fs.clone(), wrong.clone());
    on_threads(3, move |thread| {
        let work = || -> Result<bool, Error> {
            let name = format!("thread {thread}");
            let dir = shared.mkdir(shared.root(), name.as_bytes(), 0o755, &ROOT)?.ino;
            for round in 0..60 {
                let data = pattern(20_000 + round * 100, 1 + (thread * 1000 + round) as u32);
                let ino = create(&*shared, dir, "file", &data)?;
                if round % 20 == 0 {
                    shared.fsync(ino, true)?;
                }
                if content(&*shared, dir, "file")? != data {
                    return Ok(false);
                }
                shared.unlink(dir, b"file")?;
                shared.forget(ino, 1);
            }
            shared.rmdir(shared.root(), name.as_bytes())?;
            Ok(true)
        };
        if !work().unwrap_or(false) {
            seen.fetch_add(1, Ordering::Relaxed);
        }
    })?;
    ensure_eq!(wrong.load(Ordering::Relaxed), 0);
    ensure!(names(&*fs, fs.root()).map_err(failed)?.is_empty());
    fs.close().map_err(failed)?;
    drop(fs);
    disk.check()
}
