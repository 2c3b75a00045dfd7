//! The driver and the running kernel together, over the filesystem in memory of
//! `examples/memory-fuse.rs`.
//!
//! Needs root, /dev/fuse and loop devices; elsewhere the tests say so and pass. Those over io_uring
//! also need the parameter `enable_uring` of the kernel, which `cargo xtask test rings` sets while
//! they run. Each test mounts for itself and unmounts however it ends.
//!
//! The tests run twice: here with requests over /dev/fuse, and in `kernel_rings`, which includes
//! this file as a module, over io_uring.

use rustix::fs::{
    self as rfs, AtFlags, FallocateFlags, Mode, OFlags, RenameFlags, XattrFlags, CWD,
};
use rustix::io::Errno;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{symlink, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where cargo puts the example beside the test.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join("examples/memory-fuse");
    let built = fs::metadata(&program).and_then(|m| m.modified());
    // `cargo test --test kernel` does not build examples; `cargo test -p fs-fuse` does.
    for folder in ["src", "examples"] {
        for source in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).unwrap() {
            let changed = source.unwrap().metadata().unwrap().modified().unwrap();
            let fresh = built.as_ref().is_ok_and(|built| *built >= changed);
            assert!(fresh, "memory-fuse is out of date: cargo build -p fs-fuse --examples");
        }
    }
    program
}

fn can_mount() -> bool {
    let able = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        eprintln!("skipped: needs root and /dev/fuse");
    }
    if over_rings() && !rings_are_offered() {
        eprintln!("skipped: needs {ENABLE_URING} to be set");
        return false;
    }
    able
}

fn rings_are_offered() -> bool {
    fs::read_to_string(ENABLE_URING).is_ok_and(|value| value.trim() != "N")
}

fn over_rings() -> bool {
    module_path!().starts_with("kernel_rings")
}

fn transport() -> &'static str {
    if over_rings() {
        "uring"
    } else {
        "device"
    }
}

/// Parameter of the module `fuse`: whether new connections are offered io_uring.
const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

/// A directory for one test with a mount in it; both go when it is dropped.
struct Mount {
    base: PathBuf,
}

impl Mount {
    /// Nothing mounted yet.
    fn prepared() -> Mount {
        Mount { base: Mount::directory() }
    }

    fn directory() -> PathBuf {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let base = std::env::temp_dir().join(format!("cairn-fuse-{}-{number}", std::process::id()));
        fs::create_dir_all(base.join("mnt")).unwrap();
        base.canonicalize().unwrap()
    }

    /// On an image file: type fuseblk.
    fn on_image(options: &str) -> Mount {
        let mount = Mount::prepared();
        File::create(mount.image()).unwrap().set_len(1 << 20).unwrap();
        let image = mount.image();
        mount.run(&image, options);
        mount
    }

    /// Without a device: type fuse.
    fn plain() -> Mount {
        let mount = Mount::prepared();
        mount.run(Path::new("no-device"), "rw");
        mount
    }

    fn run(&self, source: &Path, options: &str) {
        let output = self.command(source, options).output().unwrap();
        assert!(output.status.success(), "mount failed: {}", text(&output));
    }

    fn command(&self, source: &Path, options: &str) -> Command {
        let mut command = Command::new(program());
        let options = format!("transport={},{options}", transport());
        command.arg(source).arg(self.path()).args(["-o", &options]);
        command.env("MEMORY_FUSE_CLOSED", self.base.join("closed"));
        command
    }

    fn image(&self) -> PathBuf {
        self.base.join("image")
    }

    fn path(&self) -> PathBuf {
        self.base.join("mnt")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// How often the server carried out an operation.
    fn count(&self, what: &str) -> u64 {
        let mut value = [0u8; 32];
        let name = format!("user.count.{what}");
        let len = rfs::getxattr(self.path(), name.as_str(), &mut value[..]).unwrap();
        std::str::from_utf8(&value[..len]).unwrap().parse().unwrap()
    }

    /// The line of the mount table.
    fn table_line(&self) -> Option<String> {
        let path = self.path().display().to_string();
        let table = fs::read_to_string("/proc/mounts").unwrap();
        table.lines().find(|l| l.split(' ').nth(1) == Some(&path)).map(str::to_string)
    }

    fn unmount(&self) {
        let output = Command::new("umount").arg(self.path()).output().unwrap();
        assert!(output.status.success(), "umount failed: {}", text(&output));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        while self.table_line().is_some() {
            let done =
                Command::new("umount").args(["-l"]).arg(self.path()).stderr(Stdio::null()).status();
            if !done.is_ok_and(|status| status.success()) {
                break;
            }
        }
        let _ = fs::remove_dir_all(&self.base);
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn loop_devices_over(path: &Path) -> usize {
    let Ok(devices) = fs::read_dir("/sys/block") else { return 0 };
    devices
        .filter_map(Result::ok)
        .filter_map(|d| fs::read_to_string(d.path().join("loop/backing_file")).ok())
        .filter(|name| Path::new(name.trim_end()) == path)
        .count()
}

#[test]
fn the_mount_table_shows_the_image_and_umount_waits_for_the_close() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw,noatime,nosuid");
    let line = mount.table_line().unwrap();
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!(fields[0], mount.image().to_str().unwrap());
    assert_eq!(fields[2], "fuseblk.cairn");
    for option in ["rw", "nosuid", "noatime", "allow_other", "default_permissions"] {
        assert!(fields[3].split(',').any(|o| o == option), "{option} in {line}");
    }
    assert_eq!(loop_devices_over(&mount.image()), 1);
    mount.unmount();
    assert!(mount.base.join("closed").exists(), "umount returned before the volume was closed");
    wait_until("the loop device to go", || loop_devices_over(&mount.image()) == 0);
}

#[test]
fn without_a_block_device_the_type_is_fuse() {
    if !can_mount() {
        return;
    }
    let mount = Mount::plain();
    let line = mount.table_line().unwrap();
    let source = std::env::current_dir().unwrap().join("no-device");
    assert!(line.starts_with(&format!("{} ", source.display())), "{line}");
    assert!(line.contains(" fuse.cairn "), "{line}");
    fs::write(mount.file("f"), "content").unwrap();
    assert_eq!(fs::read(mount.file("f")).unwrap(), b"content");
    mount.unmount();
    wait_until("the volume to be closed", || mount.base.join("closed").exists());
}

#[test]
fn sync_reaches_the_server_every_time_and_after_the_data() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let file = File::create(mount.file("f")).unwrap();
    for round in 1..=3 {
        // Stays in the page cache: the file is not closed.
        file.write_all_at(&vec![7; 3 << 20], (round - 1) * (3 << 20)).unwrap();
        rfs::syncfs(&file).unwrap();
        assert_eq!(mount.count("sync"), round);
        assert_eq!(mount.count("bytes-at-sync"), round * (3 << 20), "sync overtook writes");
    }
    file.sync_all().unwrap();
    assert_eq!(mount.count("fsync"), 1);
}

#[test]
fn files_keep_what_is_written_in_every_way() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    let pattern: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    fs::write(&path, &pattern).unwrap();
    assert_eq!(fs::read(&path).unwrap(), pattern);

    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    append.write_all(b"tail").unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 3_000_004);
    drop(append);
    assert_eq!(&fs::read(&path).unwrap()[3_000_000..], b"tail");

    // O_TRUNC must reach the server although opens do not.
    drop(OpenOptions::new().write(true).truncate(true).open(&path).unwrap());
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(fs::read(&path).unwrap(), b"");
    let file = OpenOptions::new().write(true).read(true).open(&path).unwrap();
    file.set_len(10_000).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![0; 10_000]);
}

#[test]
fn direct_and_buffered_transfers_see_each_other() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    let direct = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(&path)
        .unwrap();
    let mut buf = fs_core::buf::Buf::zeroed(2 << 20).unwrap();
    buf.fill(b'd');
    direct.write_all_at(&buf, 0).unwrap();
    assert_eq!(fs::read(&path).unwrap(), vec![b'd'; 2 << 20]);

    let buffered = OpenOptions::new().write(true).open(&path).unwrap();
    buffered.write_all_at(&[b'b'; 4096], 4096).unwrap();
    direct.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf[4095], b'd');
    assert!(buf[4096..8192].iter().all(|&b| b == b'b'));
}

#[test]
fn data_in_the_page_cache_is_not_taken_for_a_hole() {
    if !can_mount() {
        return;
    }
    seek_over_dirty_pages(&Mount::on_image("rw"));
}

#[test]
fn seeks_leave_a_thread_for_the_writes_they_wait_for() {
    if !can_mount() {
        return;
    }
    seek_over_dirty_pages(&Mount::on_image("rw,threads=1"));
}

fn seek_over_dirty_pages(mount: &Mount) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(mount.file("f"))
        .unwrap();
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    let seek = |whence: fn(u64) -> rfs::SeekFrom, at| rfs::seek(&file, whence(at));
    assert_eq!(seek(rfs::SeekFrom::Data, 0), Ok(1 << 20));
    assert_eq!(seek(rfs::SeekFrom::Hole, 0), Ok(0));
    assert_eq!(seek(rfs::SeekFrom::Hole, 1 << 20), Ok((1 << 20) + 4096));
    assert_eq!(seek(rfs::SeekFrom::Data, (1 << 20) + 4096), Err(Errno::NXIO));
    // Many at once, with the data dirty each time: none may wait for another for ever.
    std::thread::scope(|scope| {
        for thread in 0..16u64 {
            let path = mount.file(&format!("t{thread}"));
            scope.spawn(move || {
                let file = OpenOptions::new().write(true).create_new(true).open(path).unwrap();
                for round in 1..20u64 {
                    file.write_all_at(&[1; 10], round << 16).unwrap();
                    let found = rfs::seek(&file, rfs::SeekFrom::Data(((round - 1) << 16) + 4096));
                    assert_eq!(found, Ok(round << 16));
                }
            });
        }
    });
}

#[test]
fn who_goes_on_writing_to_a_full_filesystem_is_told() {
    if !can_mount() {
        return;
    }
    const MIB: usize = 1 << 20;
    let mount = Mount::on_image("rw");
    let capacity = |mib: usize| {
        let value = (mib * MIB).to_string();
        let name = "user.capacity";
        rfs::setxattr(mount.path(), name, value.as_bytes(), XattrFlags::empty()).unwrap();
    };
    capacity(8);
    let path = mount.file("f");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let full = |result: std::io::Result<()>| {
        result.is_err_and(|error| error.raw_os_error() == Some(Errno::NOSPC.raw_os_error()))
    };
    file.write_all_at(&vec![1; 16 * MIB], 0).unwrap();
    assert!(full(file.sync_data()), "more was stored than there is room for");
    // What is written right behind the refusal may still be taken.
    let write = |piece: u64| file.write_all_at(&vec![2; MIB], (16 + piece) * MIB as u64);
    let told = (0..1000).find(|piece| {
        std::thread::sleep(Duration::from_millis(1));
        full(write(*piece))
    });
    let told = told.expect("the kernel takes more and more");
    assert!((0..10).all(|piece| full(write(told + piece))), "and then again");
    let appended = OpenOptions::new().append(true).open(&path).unwrap().write_all(&vec![3; MIB]);
    assert!(full(appended), "another handle is told nothing");

    // Reads, also across the end, seeks and stat are none of it; nor are other files.
    for _ in 0..3 {
        let size = file.metadata().unwrap().len();
        assert_eq!(size, (16 + told) * MIB as u64);
        assert_eq!(file.read_at(&mut [0; 4096], size - 100).unwrap(), 100);
        assert_eq!(file.read_at(&mut [0; 4096], size).unwrap(), 0);
        assert_eq!((&file).seek(SeekFrom::End(0)).unwrap(), size);
        std::thread::sleep(Duration::from_millis(400));
    }
    fs::write(mount.file("other"), "").unwrap();

    // There is room again.
    capacity(64);
    write(told).unwrap();
    assert!(full(file.sync_data()) || told == 0, "what was taken before is not reported");
    write(told + 1).unwrap();
    file.sync_data().unwrap();
}

#[test]
fn a_file_cut_to_nothing_is_written_like_any_other() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let name = "user.capacity";
    rfs::setxattr(mount.path(), name, b"1000000", XattrFlags::empty()).unwrap();
    let path = mount.file("f");
    let file = File::create(&path).unwrap();
    file.write_all_at(&vec![1; 2 << 20], 0).unwrap();
    assert!(file.sync_data().is_err());
    drop(file);
    for _ in 0..10 {
        fs::write(&path, vec![7; 100_000]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![7; 100_000]);
    }
}

#[test]
fn a_file_that_never_changes_is_not_opened_for_writing() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    fs::write(&path, "content").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    rfs::setxattr(&path, "user.frozen", b"1", XattrFlags::empty()).unwrap();
    // The kernel has known it as another.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    for _ in 0..3 {
        for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::WRONLY | OFlags::APPEND] {
            let opened = rfs::open(&path, flags, Mode::empty()).map(drop);
            assert_eq!(opened, Err(Errno::ROFS), "{flags:?}");
        }
        let created = rfs::open(&path, OFlags::RDWR | OFlags::CREATE, Mode::from(0o600));
        assert_eq!(created.map(drop), Err(Errno::ROFS));
        assert_eq!(rfs::access(&path, rfs::Access::WRITE_OK), Err(Errno::ROFS));
        rfs::access(&path, rfs::Access::READ_OK).unwrap();
        // All of it, over the end.
        assert_eq!(fs::read(&path).unwrap(), b"content");
        let mut file = File::open(&path).unwrap();
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 7);
        assert_eq!(file.read(&mut [0; 10]).unwrap(), 0);
    }
    // Others are asked nothing.
    let other = mount.file("other");
    fs::write(&other, "").unwrap();
    let asked = mount.count("getattr");
    for _ in 0..100 {
        drop(OpenOptions::new().write(true).open(&other).unwrap());
    }
    assert!(mount.count("getattr") < asked + 10, "opens have become slower");
}

#[test]
fn a_mapped_file_shows_and_stores_the_same_bytes() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    // Python maps shared and private without unsafe code here.
    let script = "import mmap,sys
p=sys.argv[1]
f=open(p,'w+b'); f.write(b'a'*10000); f.flush()
m=mmap.mmap(f.fileno(),10000); m[5000:5005]=b'HELLO'
assert open(p,'rb').read()[4999:5006]==b'aHELLOa'
m.flush(); m.close(); f.close()
assert open(p,'rb').read()[5000:5005]==b'HELLO'";
    let output =
        Command::new("python3").args(["-c", script]).arg(mount.file("f")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    mount.unmount();
}

#[test]
fn ten_thousand_names_are_listed_once_each_and_all_forgotten() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let dir = mount.file("dir");
    fs::create_dir(&dir).unwrap();
    for i in 0..10_000 {
        File::create(dir.join(format!("name-{i:05}"))).unwrap();
    }
    let list = || {
        let mut names: Vec<_> =
            fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names.dedup();
        names
    };
    assert_eq!(list().len(), 10_000);
    // Cold, so that entries come with attributes.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let names = list();
    assert_eq!(names.len(), 10_000);
    assert!(names.iter().all(|name| fs::metadata(dir.join(name)).unwrap().is_file()));
    for name in &names {
        fs::remove_file(dir.join(name)).unwrap();
    }
    fs::remove_dir(&dir).unwrap();
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    wait_until("the inodes to be forgotten", || {
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        mount.count("inodes") == 1
    });
}

#[test]
fn a_listing_shows_no_name_that_went_before_it_came_there() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let dir = mount.file("dir");
    fs::create_dir(&dir).unwrap();
    let name = |n: u32| format!("name-{n:05}");
    (0..5000).for_each(|n| drop(File::create(dir.join(name(n))).unwrap()));
    let number = |entry: std::io::Result<fs::DirEntry>| -> u32 {
        entry.unwrap().file_name().to_str().unwrap()["name-".len()..].parse().unwrap()
    };
    // Within what the second request gave; by then the part after it has been made.
    let mut listing = fs::read_dir(&dir).unwrap();
    let begun: Vec<_> = listing.by_ref().take(500).map(number).collect();
    assert_eq!(begun, (0..500).collect::<Vec<_>>());
    std::thread::sleep(Duration::from_millis(50));
    (500..4900).for_each(|n| fs::remove_file(dir.join(name(n))).unwrap());
    let rest: Vec<_> = listing.map(number).collect();
    assert!(rest.iter().all(|n| *n < 1100 || *n >= 4900), "{rest:?}");
    assert!(rest.ends_with(&(4900..5000).collect::<Vec<_>>()), "{rest:?}");
    mount.unmount();
}

#[test]
fn an_open_file_outlives_its_name() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(b"still here").unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "still here");
    drop(file);
    wait_until("the inode to go", || mount.count("inodes") == 1);
}

#[test]
fn an_unnamed_file_can_be_given_a_name() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = File::from(rfs::open(mount.path(), flags, Mode::from(0o640)).unwrap());
    file.write_all_at(b"nameless", 0).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    rfs::linkat(&file, "", CWD, mount.file("named"), AtFlags::EMPTY_PATH).unwrap();
    drop(file);
    assert_eq!(fs::read(mount.file("named")).unwrap(), b"nameless");
}

#[test]
fn renames_replace_exchange_and_refuse_as_asked() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let (a, b) = (mount.file("a"), mount.file("b"));
    fs::write(&a, "A").unwrap();
    fs::write(&b, "B").unwrap();
    let rename = |flags| rfs::renameat_with(CWD, &a, CWD, &b, flags);
    assert_eq!(rename(RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"B");
    fs::rename(&a, &b).unwrap();
    assert_eq!(fs::read(&b).unwrap(), b"B");
    assert!(!a.exists());
    fs::create_dir(mount.file("dir")).unwrap();
    assert_eq!(fs::metadata(mount.path()).unwrap().nlink(), 3);
    fs::rename(&b, mount.file("dir/b")).unwrap();
    symlink("dir/b", &a).unwrap();
    assert_eq!(fs::read_link(&a).unwrap(), Path::new("dir/b"));
    assert_eq!(fs::read(&a).unwrap(), b"B");
    fs::hard_link(mount.file("dir/b"), mount.file("c")).unwrap();
    assert_eq!(fs::metadata(mount.file("c")).unwrap().nlink(), 2);
}

#[test]
fn attributes_are_stored_listed_and_removed() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    File::create(&path).unwrap();
    let set = |value: &[u8], flags| rfs::setxattr(&path, "user.name", value, flags);
    let mut value = vec![0u8; 65_536];
    assert_eq!(set(b"v", XattrFlags::REPLACE), Err(Errno::NODATA));
    set(b"v", XattrFlags::CREATE).unwrap();
    assert_eq!(set(b"w", XattrFlags::CREATE), Err(Errno::EXIST));
    let large = vec![b'x'; 60_000];
    set(&large, XattrFlags::empty()).unwrap();
    assert_eq!(rfs::getxattr(&path, "user.name", &mut value[..10]), Err(Errno::RANGE));
    assert_eq!(rfs::getxattr_query(&path, "user.name"), Ok(60_000));
    assert_eq!(rfs::getxattr(&path, "user.name", &mut value[..]), Ok(60_000));
    assert_eq!(value[..60_000], large);
    assert_eq!(rfs::listxattr(&path, &mut value[..]), Ok(10));
    assert_eq!(&value[..10], b"user.name\0");
    rfs::removexattr(&path, "user.name").unwrap();
    assert_eq!(rfs::getxattr(&path, "user.name", &mut value[..]), Err(Errno::NODATA));
}

#[test]
fn times_are_kept_and_the_birth_time_is_shown() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    fs::write(&path, "x").unwrap();
    let born = fs::metadata(&path).unwrap().created().unwrap();
    let old = rfs::Timestamps {
        last_access: rfs::Timespec { tv_sec: -5, tv_nsec: 1 },
        last_modification: rfs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 999_999_999 },
    };
    rfs::utimensat(CWD, &path, &old, AtFlags::empty()).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.atime(), meta.atime_nsec()), (-5, 1));
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (1_000_000_000, 999_999_999));
    assert_eq!(meta.created().unwrap(), born);
    // With the write-back cache the kernel sets times; they must reach the server.
    let before = std::time::SystemTime::now() - Duration::from_secs(1);
    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"y").unwrap();
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    assert!(fs::metadata(&path).unwrap().modified().unwrap() > before);
}

#[test]
fn the_umask_counts_except_under_a_default_acl() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let script = "cd \"$1\" && umask 077 && mkdir acl && : > plain \
        && setfacl -d -m u::rwx,g::rx,o::r acl \
                  && : > acl/under && stat -c %a plain acl/under \
        && setfacl -m u:1:rw plain && stat -c %a plain";
    let output = Command::new("sh").args(["-c", script, "sh"]).arg(mount.path()).output().unwrap();
    assert!(output.status.success(), "needs the acl package: {}", text(&output));
    // Group bits of the last show the mask.
    assert_eq!(String::from_utf8_lossy(&output.stdout), "600\n666\n660\n");
}

#[test]
fn an_unprivileged_write_clears_set_user_id() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    fs::write(&path, "x").unwrap();
    let bits = || fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
    let set = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
    set();
    let output = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "sh",
            "-c",
            "echo y > \"$1\"",
            "sh",
        ])
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(bits(), 0o777);
    set();
    std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap();
    assert_eq!(bits(), 0o777, "a change of owner clears them for everyone");
}

#[test]
fn ranges_are_allocated_punched_and_copied() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(mount.file("f"))
        .unwrap();
    file.write_all_at(&[9; 20_000], 0).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rfs::fallocate(&file, punch, 4096, 8192).unwrap();
    rfs::fallocate(&file, FallocateFlags::empty(), 0, 30_000).unwrap();
    let mut content = fs::read(mount.file("f")).unwrap();
    assert_eq!(content.len(), 30_000);
    assert!(content[4096..12_288].iter().all(|&b| b == 0));
    assert!(content[12_288..20_000].iter().all(|&b| b == 9));
    let copy = File::create(mount.file("copy")).unwrap();
    let copied = rfs::copy_file_range(&file, Some(&mut 0), &copy, Some(&mut 0), 30_000).unwrap();
    assert_eq!(copied, 30_000);
    assert_eq!(mount.count("copy-range"), 1);
    content.truncate(copied);
    assert_eq!(fs::read(mount.file("copy")).unwrap(), content);
}

#[test]
fn flags_labels_trim_and_shutdown_arrive_as_ioctls() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    fs::write(&path, "x").unwrap();
    let file = File::open(&path).unwrap();
    let flags = rfs::ioctl_getflags(&file).unwrap();
    rfs::ioctl_setflags(&file, flags | rfs::IFlags::NODUMP).unwrap();
    assert!(rfs::ioctl_getflags(&file).unwrap().contains(rfs::IFlags::NODUMP));
    // The rest has no safe wrapper; Python's fcntl does.
    let script = "import fcntl,os,struct,sys,errno
d=os.open(sys.argv[1],os.O_RDONLY); f=os.open(sys.argv[2],os.O_RDONLY)
fcntl.ioctl(d,0x41009432,b'name'.ljust(256,b'\\0'))
assert fcntl.ioctl(f,0x81009431,b'\\0'*256).rstrip(b'\\0')==b'name'
r=fcntl.ioctl(d,0xc0185879,struct.pack('QQQ',0,2**64-1,0))
assert struct.unpack('QQQ',r)[1]==1<<20
x=struct.unpack('IIIII8x',fcntl.ioctl(f,0x801c581f,bytes(28)))
assert x[0]==0x80,x
fcntl.ioctl(f,0x401c5820,struct.pack('IIIII8x',0x40,0,0,42,0))
x=struct.unpack('IIIII8x',fcntl.ioctl(f,0x801c581f,bytes(28)))
assert x[0]==0x40 and x[3]==42,x
if os.fork()==0:
  os.setresuid(65534,65534,65534)
  try: fcntl.ioctl(d,0x8004587d,bytes(4))
  except PermissionError: os._exit(0)
  os._exit(1)
assert os.wait()[1]==0,'an ordinary user stopped the pool'
fcntl.ioctl(d,0x8004587d,bytes(4))
try: os.unlink(sys.argv[2]); sys.exit('still alive')
except OSError as e: assert e.errno==errno.EIO";
    let output =
        Command::new("python3").args(["-c", script]).args([mount.path(), path]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn sharing_and_maps_of_extents_are_refused_before_the_server_is_asked() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let files = ["one", "two"].map(|name| mount.file(name));
    files.iter().for_each(|path| fs::write(path, [7u8; 8192]).unwrap());
    let script = "import fcntl,struct,sys,errno
a,b=open(sys.argv[1],'rb'),open(sys.argv[2],'r+b')
def refused(f,number,value):
  try: r=fcntl.ioctl(f,number,value)
  except OSError as e: return e.errno
  return r
assert refused(b,0x40049409,a.fileno())==errno.EOPNOTSUPP,'FICLONE'
one=struct.pack('QQHHIqQQiI',0,4096,1,0,0,b.fileno(),0,0,0,0)
r=refused(a,0xc0189436,one)
status=r if isinstance(r,int) else -struct.unpack('QQHHIqQQiI',r)[8]
assert status in (errno.EOPNOTSUPP,errno.EINVAL),('FIDEDUPERANGE',status)
r=refused(a,0xc020660b,struct.pack('QQIIII',0,8192,0,0,1,0)+bytes(56))
assert r==errno.EOPNOTSUPP,('FIEMAP',r)";
    let output = Command::new("python3").args(["-c", script]).args(files).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn handles_of_files_survive_the_kernels_cache() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    fs::create_dir(mount.file("d")).unwrap();
    fs::write(mount.file("d/f"), "by handle").unwrap();
    let script = "import ctypes,errno,os,sys
c=ctypes.CDLL(None,use_errno=True)
class H(ctypes.Structure):
    _fields_=[('n',ctypes.c_uint),('t',ctypes.c_int),('b',ctypes.c_ubyte*128)]
r=os.open(sys.argv[1],os.O_RDONLY)
def handle(name):
    h=H(); h.n=128; m=ctypes.c_int()
    path=(sys.argv[1]+name).encode()
    assert c.name_to_handle_at(-100,path,ctypes.byref(h),ctypes.byref(m),0)==0
    return h
def opened(h):
    open('/proc/sys/vm/drop_caches','w').write('2')
    f=c.open_by_handle_at(r,ctypes.byref(h),os.O_RDONLY)
    return f if f>=0 else -ctypes.get_errno()
f,d=handle('/d/f'),handle('/d')
assert os.read(opened(f),100)==b'by handle'
assert os.listdir(opened(d))==['f']
g=handle('/d/f')
os.link(sys.argv[1]+'/d/f',sys.argv[1]+'/other')
os.unlink(sys.argv[1]+'/d/f')
assert os.read(opened(g),100)==b'by handle'
os.closerange(r+1,100)
os.unlink(sys.argv[1]+'/other')
assert opened(g)==-errno.ESTALE,opened(g)";
    let output = Command::new("python3").args(["-c", script]).arg(mount.path()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_remount_changes_kernel_and_server() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    let path = mount.file("f");
    fs::write(&path, "x").unwrap();
    let syncs = mount.count("sync");
    mount.run(&mount.image(), "remount,ro,noatime");
    assert!(mount.table_line().unwrap().contains(" ro,noatime"));
    assert!(mount.count("sync") > syncs, "the remount did not commit");
    assert_eq!(mount.count("set-read-only"), 1);
    assert_eq!(File::create(&path).unwrap_err().raw_os_error(), Some(30));
    mount.run(&mount.image(), "remount,rw");
    fs::write(&path, "y").unwrap();
    assert_eq!(mount.count("set-read-only"), 2);
}

#[test]
fn a_signal_unmounts_and_closes() {
    if !can_mount() {
        return;
    }
    let mount = Mount::prepared();
    File::create(mount.image()).unwrap().set_len(1 << 20).unwrap();
    let mut daemon = mount.command(&mount.image(), "rw").arg("-f").spawn().unwrap();
    wait_until("the mount", || mount.table_line().is_some());
    fs::write(mount.file("f"), "x").unwrap();
    // Busy, so that the unmount is a lazy one.
    let open = File::open(mount.file("f")).unwrap();
    let pid = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait_until("the mount to go", || mount.table_line().is_none());
    assert!(daemon.try_wait().unwrap().is_none(), "the daemon left an open file behind");
    drop(open);
    assert!(daemon.wait().unwrap().success());
    assert!(mount.base.join("closed").exists());
}

/// Serves in the foreground, on an image.
fn serve_in_foreground(mount: &Mount) -> Child {
    serve_in_foreground_with(mount, "rw")
}

fn serve_in_foreground_with(mount: &Mount, options: &str) -> Child {
    File::create(mount.image()).unwrap().set_len(1 << 20).unwrap();
    let daemon = mount.command(&mount.image(), options).arg("-f").spawn().unwrap();
    wait_until("the mount", || mount.table_line().is_some());
    // Answered means that the protocol, and so the transport, is agreed on.
    fs::write(mount.file("first"), "x").unwrap();
    daemon
}

/// Whether a process has a thread for a queue of the first CPU.
fn serves_rings(process: &Child) -> bool {
    let threads = fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    threads
        .filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).ok())
        .any(|name| name.starts_with("fuse-0."))
}

#[test]
fn requests_come_the_way_that_was_asked_for() {
    if !can_mount() {
        return;
    }
    let mount = Mount::prepared();
    let mut daemon = serve_in_foreground(&mount);
    assert_eq!(serves_rings(&daemon), over_rings());
    mount.unmount();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn without_an_offer_of_rings_the_device_is_used() {
    if !can_mount() || over_rings() || rings_are_offered() {
        return;
    }
    let mount = Mount::prepared();
    let mut daemon = serve_in_foreground_with(&mount, "rw,transport=uring");
    assert!(!serves_rings(&daemon));
    mount.unmount();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn requests_of_many_clients_are_all_answered() {
    if !can_mount() {
        return;
    }
    let mount = Mount::on_image("rw");
    std::thread::scope(|scope| {
        for client in 0..24 {
            let dir = mount.file(&format!("d{client}"));
            scope.spawn(move || {
                fs::create_dir(&dir).unwrap();
                for round in 0..100u32 {
                    let path = dir.join(round.to_string());
                    fs::write(&path, round.to_le_bytes().repeat(1000)).unwrap();
                    File::open(&path).unwrap().sync_all().unwrap();
                    assert_eq!(fs::read(&path).unwrap(), round.to_le_bytes().repeat(1000));
                    fs::rename(&path, dir.join("last")).unwrap();
                }
                assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
            });
        }
    });
    mount.unmount();
}

#[test]
fn an_aborted_connection_ends_the_daemon() {
    if !can_mount() {
        return;
    }
    let mount = Mount::prepared();
    let mut daemon = serve_in_foreground(&mount);
    // Busy, so that forcing it does no more than abort.
    let open = File::open(mount.file("first")).unwrap();
    let forced = rustix::mount::unmount(mount.path(), rustix::mount::UnmountFlags::FORCE);
    assert_eq!(forced, Err(Errno::BUSY));
    wait_until("the daemon to end", || daemon.try_wait().unwrap().is_some());
    assert!(fs::metadata(mount.file("not there")).is_err());
    drop(open);
}

#[test]
fn a_killed_daemon_leaves_nobody_waiting() {
    if !can_mount() {
        return;
    }
    let mount = Mount::prepared();
    let mut daemon = serve_in_foreground(&mount);
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    // Which error depends on how far the kernel is with taking the connection down.
    let error = fs::metadata(mount.file("not there")).unwrap_err();
    assert_ne!(error.kind(), std::io::ErrorKind::NotFound);
    mount.unmount();
}

#[test]
fn a_mount_that_fails_exits_with_32_and_a_bad_option_with_1() {
    if !can_mount() {
        return;
    }
    let mount = Mount::prepared();
    let output = mount.command(Path::new("x"), "bogus").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("bogus"));
    fs::remove_dir(mount.path()).unwrap();
    let output = mount.command(Path::new("x"), "rw").output().unwrap();
    assert_eq!(output.status.code(), Some(32), "{}", text(&output));
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    if !can_mount() {
        return;
    }
    let device_mode = fs::metadata("/dev/fuse").unwrap().permissions().mode();
    if !Path::new("/usr/bin/fusermount3").exists() || device_mode & 0o006 != 0o006 {
        eprintln!("skipped: needs fusermount3, and /dev/fuse open to everyone");
        return;
    }
    let mount = Mount::prepared();
    // The user must be able to reach both the program and the directory.
    let program_copy = mount.base.join("memory-fuse");
    fs::copy(program(), &program_copy).unwrap();
    for path in [mount.base.clone(), mount.path()] {
        std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
    }
    let as_user = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
        command
    };
    let output = as_user(&program_copy)
        .arg("a,source")
        .arg(mount.path())
        .args(["-o", &format!("noatime,transport={}", transport())])
        .env("MEMORY_FUSE_CLOSED", mount.base.join("closed"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let line = mount.table_line().unwrap();
    assert!(line.starts_with("a,source "), "{line}");
    assert!(line.contains(" fuse.cairn ") && line.contains("nosuid,nodev"), "{line}");
    let script = "cd \"$1\" && echo hello > f && mv f g && cat g";
    let output =
        as_user(Path::new("sh")).args(["-c", script, "sh"]).arg(mount.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n", "{}", text(&output));
    let output = as_user(Path::new("fusermount3")).arg("-u").arg(mount.path()).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    wait_until("the volume to be closed", || mount.base.join("closed").exists());
}
