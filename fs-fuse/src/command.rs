//! The program `mount.cairn`.
//!
//! mount(8) calls it for mounts of type `cairn`, `fuse.cairn` and `fuseblk.cairn`; people call it
//! directly. It goes through these steps:
//!
//! ```text
//! parse -> [fork] -> open the pool -> mount -> serve -> INIT agreed, root answers
//!                                                        -> tell the parent
//!                                                |
//!                                                +-> DESTROY or end of connection -> commit, close
//! ```
//!
//! The parent waits on a pipe for one byte, the exit code, and ends with it. A child that dies
//! first closes the pipe without one. Until then the child talks on the caller's standard error,
//! then to syslog.
//!
//! Options follow the calling convention of mount(8), with one exception: `-f` stays in the
//! foreground, as people know it from other FUSE programs. What mount(8) means by it, to do
//! everything but mount, is `--fake`; mount(8) passes `-f` only when it is itself called with `-f`,
//! and then that is what it gets.

use crate::backend::{dirty_bytes, Opened};
use crate::device::{Session, Threads};
use crate::mount::{self, Plan};
use crate::noop::NoOp;
use crate::ops::{Server, READAHEAD_BYTES};
use crate::options::Options;
use crate::{fusermount, ioctl, log, sys};
use cairn_host::admin::{self, Handler, Reply, Request, Server as AdminServer};
use cairn_host::{mounts, source, without_codes};
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::fs::{Dev, Mode, OFlags};
use rustix::mount::MountFlags;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Exit codes of mount(8).
mod exit {
    pub const OK: u8 = 0;
    pub const USAGE: u8 = 1;
    pub const SYSTEM: u8 = 2;
    pub const MOUNT_FAILED: u8 = 32;
}

const USAGE: &str = "\
Usage: mount.cairn SOURCE... DIRECTORY [options]

Mounts the pool on SOURCE, a block device, an image file, UUID=... or LABEL=...
The other devices of a pool with several are found by themselves: among the block
devices, and beside an image file. Or all are given.

  -o OPTIONS         mount options, separated by commas (cairn-mount(5))
  -f, --foreground   stay in the foreground and log to standard error
      --fake         do everything but mount (mount --fake)
  -s                 ignore unknown mount options
  -n, -v             accepted for mount(8)
  -t TYPE            accepted for mount(8)
  -N NAMESPACE       not supported
  -h, --help         show this help
  -V, --version      show the version

Options of cairn: compress=none|zstd[:LEVEL], commit=SECONDS, cache=SIZE, dirty=SIZE,
  threads=N, transport=auto|device|uring, degraded, device=PATH, subvol=NAME,
  snapshot=NAME, txg=N, rewind";

/// A command line.
#[derive(Debug, Default)]
struct Invocation {
    source: String,
    target: PathBuf,
    options: Options,
    foreground: bool,
    fake: bool,
    noop: bool,
}

/// Why the program ends early: exit code and message.
#[derive(Debug)]
struct Exit(u8, String);

impl Exit {
    fn usage(message: impl Into<String>) -> Exit {
        Exit(exit::USAGE, message.into())
    }
    fn failed(message: impl Into<String>) -> Exit {
        Exit(exit::MOUNT_FAILED, message.into())
    }
}

/// Opens what is to be mounted: source, options, and whether the process is in the background.
pub type Opener<'a> = &'a dyn Fn(&Path, &Options, bool) -> Result<Opened, String>;

/// Runs the program with the arguments after its name, `open` giving what to mount; returns the
/// exit code.
pub fn run(arguments: impl Iterator<Item = OsString>, open: Opener<'_>) -> u8 {
    // Open until the reason was told: the caller goes on when it is closed.
    let mut caller = Caller::default();
    match parse(arguments).and_then(|invocation| act(invocation, open, &mut caller)) {
        Ok(()) => exit::OK,
        Err(Exit(exit::OK, text)) => {
            println!("{text}");
            exit::OK
        }
        Err(Exit(code, message)) => {
            log::error(&message);
            code
        }
    }
}

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, Exit> {
    let mut invocation = Invocation::default();
    let mut operands = Vec::new();
    let mut lists = Vec::new();
    let mut sloppy = false;
    let mut arguments = arguments.map(|argument| {
        argument
            .into_string()
            .map_err(|bad| Exit::usage(format!("{} is not UTF-8", bad.to_string_lossy())))
    });
    let mut only_operands = false;
    while let Some(argument) = arguments.next() {
        let argument = argument?;
        match argument.as_str() {
            "--" if !only_operands => only_operands = true,
            "--foreground" => invocation.foreground = true,
            "--fake" => invocation.fake = true,
            "--noop" => invocation.noop = true,
            "--help" => return Err(Exit(exit::OK, USAGE.into())),
            "--version" => {
                return Err(Exit(exit::OK, format!("mount.cairn {}", env!("CARGO_PKG_VERSION"))));
            }
            _ if only_operands || !argument.starts_with('-') || argument == "-" => {
                operands.push(argument);
            }
            _ if argument.starts_with("--") => {
                return Err(Exit::usage(format!("unknown option '{argument}'; try --help")));
            }
            _ => {
                let letters = &argument[1..];
                for (at, letter) in letters.char_indices() {
                    match letter {
                        'f' if is_called_by("mount") => invocation.fake = true,
                        'f' => invocation.foreground = true,
                        's' => sloppy = true,
                        'n' | 'v' => {}
                        'r' => lists.push("ro".to_string()),
                        'w' => {
                            lists.push("rw".to_string());
                            invocation.options.insist_on_writing = true;
                        }
                        'h' => return Err(Exit(exit::OK, USAGE.into())),
                        'V' => {
                            let version = env!("CARGO_PKG_VERSION");
                            return Err(Exit(exit::OK, format!("mount.cairn {version}")));
                        }
                        'o' | 't' | 'N' => {
                            let rest = &letters[at + 1..];
                            let value = if rest.is_empty() {
                                arguments.next().ok_or_else(|| {
                                    Exit::usage(format!("option -{letter} needs a value"))
                                })??
                            } else {
                                rest.to_string()
                            };
                            match letter {
                                'o' => lists.push(value),
                                'N' => {
                                    return Err(Exit::usage(
                                        "-N: mounting in another namespace is not supported; \
                                         run the command in it with nsenter",
                                    ));
                                }
                                _ => {}
                            }
                            break;
                        }
                        other => {
                            return Err(Exit::usage(format!("unknown option '-{other}'; try -h")));
                        }
                    }
                }
            }
        }
    }
    for list in lists {
        invocation.options.add(&list, sloppy).map_err(|e| Exit::usage(e.0))?;
    }
    if operands.len() < 2 {
        let given = operands.len();
        return Err(Exit::usage(format!(
            "a source and a directory are needed, {given} given\n{USAGE}"
        )));
    }
    invocation.target = operands.pop().map(PathBuf::from).unwrap_or_default();
    invocation.source = operands.remove(0);
    let options = &mut invocation.options;
    if options.txg.is_some() && options.rewind {
        return Err(Exit::usage("mount options 'txg' and 'rewind' choose both: give one of them"));
    }
    if options.names_group() && options.insist_on_writing {
        return Err(Exit::usage(
            "an older group can only be read: mount it without -w (mount options 'txg', 'rewind')",
        ));
    }
    options.read_only |= options.is_of_the_past();
    invocation.options.devices.append(&mut operands);
    Ok(invocation)
}

/// Whether a program of that name started this process.
fn is_called_by(name: &str) -> bool {
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero());
    parent.is_some_and(|pid| {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    })
}

fn act(mut invocation: Invocation, open: Opener<'_>, caller: &mut Caller) -> Result<(), Exit> {
    let target = &invocation.target;
    let kind = target.metadata().map_err(|error| {
        Exit::failed(mounts::daemon_gone(target, &error).unwrap_or_else(|| {
            let error = without_codes(&error.to_string());
            format!("cannot mount on {}: {error}", target.display())
        }))
    })?;
    if !kind.is_dir() {
        return Err(Exit::failed(format!("{} is not a directory", target.display())));
    }
    invocation.target = target.canonicalize().map_err(|error| {
        let error = without_codes(&error.to_string());
        Exit::failed(format!("cannot mount on {}: {error}", target.display()))
    })?;
    if invocation.options.remount {
        return remount(&invocation);
    }
    let source = if invocation.noop {
        PathBuf::from(&invocation.source)
    } else {
        let mut devices = source::resolve(&invocation.source).map_err(Exit::failed)?;
        let others = devices.split_off(1).into_iter();
        invocation.options.devices.extend(others.map(|path| path.display().to_string()));
        for device in &mut invocation.options.devices {
            *device = absolute(Path::new(device)).display().to_string();
        }
        absolute(&devices.remove(0))
    };
    if invocation.fake {
        return rehearse(&invocation, &source, open);
    }
    if invocation.foreground {
        return serve(&invocation, &source, open, Launch::foreground());
    }
    match detach()? {
        Detached::Parent(code) if code == exit::OK => Ok(()),
        Detached::Parent(code) => std::process::exit(code.into()),
        Detached::Child(launch) => {
            *caller = Arc::clone(&launch.caller);
            serve(&invocation, &source, open, launch)
        }
    }
}

/// A path that means the same in every directory, as those that read the mount table take it; of a
/// symlink, such as those in /dev/disk, it stays the name.
fn absolute(path: &Path) -> PathBuf {
    if path.is_absolute() {
        return path.to_path_buf();
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    match (parent.unwrap_or(Path::new(".")).canonicalize(), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        // What is not there is named by whoever opens it.
        _ => path.to_path_buf(),
    }
}

/// Does what a mount does up to the mount itself, and writes nothing: whether the pool is there, is
/// whole, is not in use, and has what the options name.
fn rehearse(invocation: &Invocation, source: &Path, open: Opener<'_>) -> Result<(), Exit> {
    if invocation.noop {
        return Ok(());
    }
    let options = Options { read_only: true, ..invocation.options.clone() };
    let opened = open(source, &options, false).map_err(Exit::failed)?;
    opened.volume.close().map_err(|e| Exit::failed(format!("{}: {e}", source.display())))
}

/// Takes the exit code, for whoever waits for a process in the background.
type Caller = Arc<Mutex<Option<File>>>;

/// What the process that serves owes to whoever started it.
struct Launch {
    caller: Caller,
    in_background: bool,
}

impl Launch {
    fn foreground() -> Launch {
        Launch { caller: Caller::default(), in_background: false }
    }

    /// The mount answers: let the caller go on.
    fn ready(self) {
        let Some(mut parent) = self.caller.lock().take() else { return };
        log::use_syslog();
        // Holding on to the caller's terminal and directory would outlive the caller.
        let _ = std::env::set_current_dir("/");
        if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
            let _ = rustix::stdio::dup2_stdin(&null);
            let _ = rustix::stdio::dup2_stdout(&null);
            let _ = rustix::stdio::dup2_stderr(&null);
        }
        let _ = parent.write_all(&[exit::OK]);
    }
}

enum Detached {
    /// In the caller's process: the exit code the child reported.
    Parent(u8),
    Child(Launch),
}

/// Splits off the process that serves; returns in the caller's once that has reported.
fn detach() -> Result<Detached, Exit> {
    let system = |what: &str, e: rustix::io::Errno| Exit(exit::SYSTEM, format!("{what}: {e}"));
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| system("cannot make a pipe", e))?;
    match sys::fork().map_err(|e| system("cannot start a process", e))? {
        sys::Fork::Parent => {
            drop(writer);
            let mut code = [exit::MOUNT_FAILED];
            // Without a byte the child has died, and has said why if it could.
            let _ = File::from(reader).read_exact(&mut code);
            Ok(Detached::Parent(code[0]))
        }
        sys::Fork::Child => {
            // A session of its own: the caller's terminal must not send it signals.
            let _ = rustix::process::setsid();
            let caller = Arc::new(Mutex::new(Some(File::from(writer))));
            Ok(Detached::Child(Launch { caller, in_background: true }))
        }
    }
}

fn serve(
    invocation: &Invocation,
    source: &Path,
    open: Opener<'_>,
    launch: Launch,
) -> Result<(), Exit> {
    let opened = if invocation.noop {
        Opened {
            volume: Arc::new(NoOp),
            release_claim: Box::new(|| {}),
            read_only: false,
            admin: None,
            kernel: Arc::default(),
        }
    } else {
        open(source, &invocation.options, launch.in_background).map_err(Exit::failed)?
    };
    let total_bytes = opened.volume.statfs().map_or(0, |stat| stat.total_bytes);
    let server = Arc::new(Server::new(opened.volume, Arc::clone(&opened.kernel)));
    let options = &mut invocation.options.clone();
    options.read_only |= opened.read_only;
    let options = &*options;
    let plan = Plan { source, target: &invocation.target, options };
    let root = rustix::process::geteuid().is_root();
    (opened.release_claim)();
    let device = match connect(&plan, root) {
        Ok(device) => device,
        Err(message) => {
            // Nothing was served, so what there is to write is what opening made.
            let _ = server.close();
            return Err(Exit::failed(message));
        }
    };
    opened.kernel.connect(&device);
    unmount_on_signals(invocation.target.clone(), root);
    let threads = Threads::new(options.threads, dirty_bytes(options), options.transport);
    let session = Session::new(device, server, threads);
    let target = invocation.target.clone();
    let admin_socket = Arc::new(Mutex::new(None));
    let socket = Arc::clone(&admin_socket);
    let kernel = Arc::clone(&opened.kernel);
    let settle = move || {
        // Writing to sysfs and waiting for the caller is not for a thread that serves.
        std::thread::spawn(move || {
            if root {
                mount::raise_limits(&target, READAHEAD_BYTES, total_bytes);
            }
            match mount::device_of(&target) {
                Ok(device) => {
                    kernel.mounted_as(device);
                    *socket.lock() = opened.admin.and_then(|handler| listen(device, handler));
                }
                Err(errno) => {
                    log::warning(&format!("cannot look at {}: {errno}", target.display()))
                }
            }
            launch.ready();
        });
    };
    let served = session.serve(settle).map_err(Exit::failed);
    // The socket's name goes with it.
    drop(admin_socket.lock().take());
    served
}

/// Listens for the `cairn` command. A daemon can do without.
fn listen(device: Dev, handler: Arc<Handler>) -> Option<AdminServer> {
    AdminServer::start(device, handler)
        .map_err(|error| {
            log::warning(&format!("the cairn command cannot reach this mount: {error}"))
        })
        .ok()
}

/// Mounts, and returns the descriptor to serve.
fn connect(plan: &Plan<'_>, root: bool) -> Result<OwnedFd, String> {
    if !root {
        return fusermount::mount(plan);
    }
    let device = sys::open_fuse().map_err(|e| format!("cannot open /dev/fuse: {e}"))?;
    mount::mount_as_root(plan, &device).map_err(|e| {
        format!("cannot mount {} on {}: {e}", plan.source.display(), plan.target.display())
    })?;
    Ok(device)
}

/// Unmounts when the process is asked to end. Serving ends with the connection, after a commit.
fn unmount_on_signals(target: PathBuf, root: bool) {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let signals = match signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM]) {
        Ok(signals) => signals,
        Err(error) => return log::warning(&format!("signals will not unmount: {error}")),
    };
    std::thread::spawn(move || {
        let mut signals = signals;
        for _ in signals.forever() {
            log::info(&format!("unmounting {} on a signal", target.display()));
            let done = if root {
                mount::unmount_as_root(&target).map_err(|e| e.to_string())
            } else {
                fusermount::unmount(&target)
            };
            if let Err(error) = done {
                log::error(&format!("cannot unmount {}: {error}", target.display()));
            }
        }
    });
}

/// Changes the flags of an existing mount, and tells its daemon.
fn remount(invocation: &Invocation) -> Result<(), Exit> {
    let target = &invocation.target;
    let options = &invocation.options;
    let failed =
        |e: rustix::io::Errno| Exit::failed(format!("cannot remount {}: {e}", target.display()));
    if invocation.fake {
        return Ok(());
    }
    let unlike = differing(&options.own(), &in_force(target));
    if !unlike.is_empty() {
        return Err(Exit::failed(format!(
            "cannot remount {}: {} cannot change while it is mounted; unmount it, and mount it \
             with what is wanted",
            target.display(),
            unlike.join(", ")
        )));
    }
    // The daemon allows changes before the kernel does, and refuses them after.
    if !options.read_only {
        set_read_only(target, false).map_err(failed)?;
    }
    // With no other operation among the flags this is MS_REMOUNT for mount and superblock.
    let flags = options.mount_flags() | MountFlags::empty();
    rustix::mount::mount_remount(target, flags, c"").map_err(failed)?;
    if options.read_only {
        set_read_only(target, true).map_err(failed)?;
    }
    Ok(())
}

/// cairn's own options of a mount; none when nobody can be asked.
fn in_force(target: &Path) -> Vec<String> {
    let asked = mount::device_of(target).ok().map(|device| admin::ask(device, Request::Info));
    match asked {
        Some(Ok(Reply::Info(info))) => info.mount_options,
        _ => Vec::new(),
    }
}

/// Those of the options wanted that are not in force, as far as that is known: mount(8) repeats
/// those of fstab with every remount.
fn differing(wanted: &[String], in_force: &[String]) -> Vec<String> {
    let differs = |option: &&String| !in_force.is_empty() && !in_force.contains(option);
    wanted.iter().filter(differs).cloned().collect()
}

fn set_read_only(target: &Path, read_only: bool) -> Result<(), rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(target, flags, Mode::empty())?;
    sys::command_u32::<{ ioctl::SET_READ_ONLY }>(&root, read_only.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Invocation, Exit> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn the_calling_convention_of_mount_is_understood() {
        let invocation =
            parsed(&["/dev/x", "/mnt", "-snv", "-o", "ro,bogus", "-t", "fuse.cairn"]).unwrap();
        assert_eq!(invocation.source, "/dev/x");
        assert_eq!(invocation.target, Path::new("/mnt"));
        assert!(invocation.options.read_only);
        assert!(!invocation.foreground);
    }

    #[test]
    fn several_sources_are_devices_of_one_pool() {
        let invocation = parsed(&["a", "b", "-o", "device=d,degraded", "c", "/mnt"]).unwrap();
        assert_eq!((invocation.source.as_str(), invocation.target.to_str()), ("a", Some("/mnt")));
        assert_eq!(invocation.options.devices, ["d", "b", "c"]);
        assert!(invocation.options.degraded);
    }

    #[test]
    fn a_mount_of_a_snapshot_is_read_only() {
        let options = |list| parsed(&["a", "/mnt", "-o", list]).unwrap().options;
        assert!(options("subvol=home,snapshot=monday").read_only);
        assert!(options("subvol=home@monday").read_only);
        assert!(!options("subvol=home").read_only);
        assert!(parsed(&["a", "/mnt", "-o", "snapshot="]).is_err());
    }

    #[test]
    fn a_mount_of_an_older_group_is_read_only_and_nobody_insists_on_more() {
        let options = |list| parsed(&["a", "/mnt", "-o", list]).unwrap().options;
        // mount(8) says rw unless it is told otherwise.
        let older = options("rw,txg=17");
        assert!(older.read_only && older.txg == Some(17) && older.own().contains(&"txg=17".into()));
        assert!(options("rw,rewind").read_only && options("rw,rewind").rewind);
        for bad in ["txg", "txg=", "txg=0", "txg=-1", "txg=x", "txg=1,rewind"] {
            assert!(parsed(&["a", "/mnt", "-o", bad]).is_err(), "{bad}");
        }
        let insisting = parsed(&["-w", "a", "/mnt", "-o", "txg=17"]).unwrap_err();
        assert!(insisting.0 == exit::USAGE && insisting.1.contains("only be read"));
    }

    #[test]
    fn a_mount_that_is_only_tried_fails_where_a_real_one_would_and_opens_to_read() {
        let dir = std::env::temp_dir();
        let arguments = ["image", dir.to_str().unwrap(), "--fake"].map(OsString::from);
        let open = |_: &Path, options: &Options, _: bool| {
            assert!(options.read_only);
            Err("image: there is no pool".to_string())
        };
        assert_eq!(run(arguments.into_iter(), &open), exit::MOUNT_FAILED);
    }

    #[test]
    fn a_remount_repeats_what_is_in_force_and_changes_nothing_of_it() {
        let list = |text: &str| text.split(',').map(String::from).collect::<Vec<_>>();
        let in_force = list("subvol=home,compress=zstd,commit=5");
        assert_eq!(differing(&list("compress=zstd,subvol=home"), &in_force), list("")[1..]);
        assert_eq!(differing(&list("commit=5,compress=none"), &in_force), ["compress=none"]);
        assert_eq!(differing(&list("degraded"), &in_force), ["degraded"]);
        assert!(differing(&list("compress=none"), &[]).is_empty());
    }

    #[test]
    fn a_source_is_shown_by_a_path_that_does_not_depend_on_a_directory() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(absolute(Path::new("Cargo.toml")), here.join("Cargo.toml"));
        assert_eq!(absolute(Path::new("src/../src/./lib.rs")), here.join("src/lib.rs"));
        assert_eq!(absolute(Path::new("../x")), here.parent().unwrap().join("x"));
        for as_it_is in ["/dev/disk/../x", "no/such/directory"] {
            assert_eq!(absolute(Path::new(as_it_is)), Path::new(as_it_is));
        }
    }

    #[test]
    fn values_may_be_attached_to_their_letter() {
        let invocation = parsed(&["-oro", "-fooremount", "a", "b"]);
        // -f and then -o with the value "oremount".
        assert!(invocation.is_err());
        assert!(parsed(&["-fnoro", "a", "b"]).unwrap().options.read_only);
    }

    #[test]
    fn a_wrong_command_line_exits_with_1_and_help_with_0() {
        for arguments in [&["a"][..], &[], &["-x", "a", "b"], &["a", "b", "-o", "bogus"], &["-o"]] {
            assert_eq!(parsed(arguments).unwrap_err().0, exit::USAGE, "{arguments:?}");
        }
        assert_eq!(parsed(&["--help"]).unwrap_err().0, exit::OK);
        assert_eq!(parsed(&["-V"]).unwrap_err().0, exit::OK);
    }
}
