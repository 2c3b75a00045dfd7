//! Mounting without privilege, through the set-user-id program fusermount3.
//!
//! It opens /dev/fuse, mounts, and sends the descriptor back over a socket whose number it finds in
//! the environment.

use crate::mount::Plan;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::net::{
    recvmsg, socketpair, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags,
    SocketFlags, SocketType,
};
use std::ffi::OsString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = "fusermount3";

/// Mounts and returns the descriptor of the connection.
///
/// # Errors
/// One sentence. The program itself has said more on standard error.
pub fn mount(plan: &Plan<'_>) -> Result<OwnedFd, String> {
    let failed = |what: &str, cause: &dyn std::fmt::Display| format!("{what}: {cause}");
    // Neither end is close-on-exec here: the child must inherit one, and no other program is run.
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
            .map_err(|e| failed("cannot make a socket", &e))?;
    let mut child = Command::new(PROGRAM)
        .arg("-o")
        .arg(option_list(plan))
        .arg("--")
        .arg(plan.target)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .spawn()
        .map_err(|e| failed("cannot run fusermount3 (is fuse3 installed?)", &e))?;
    drop(theirs);
    let device = receive_descriptor(&ours);
    let status = child.wait().map_err(|e| failed(PROGRAM, &e))?;
    match device {
        Some(device) if status.success() => {
            rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::CLOEXEC)
                .map_err(|e| failed(PROGRAM, &e))?;
            Ok(device)
        }
        _ => Err(format!("fusermount3 could not mount on {}", plan.target.display())),
    }
}

/// Unmounts what [`mount`] mounted, lazily when it is busy.
///
/// # Errors
/// One sentence.
pub fn unmount(target: &Path) -> Result<(), String> {
    let run = |arguments: &[&str]| {
        Command::new(PROGRAM).args(arguments).arg("--").arg(target).status().map(|s| s.success())
    };
    match run(&["-u", "-q"]).and_then(|done| if done { Ok(true) } else { run(&["-u", "-z"]) }) {
        Ok(true) => Ok(()),
        _ => Err(format!("fusermount3 could not unmount {}", target.display())),
    }
}

fn option_list(plan: &Plan<'_>) -> OsString {
    let options = plan.options;
    let mut list: Vec<u8> = b"subtype=cairn,default_permissions,fsname=".to_vec();
    for &byte in plan.source.as_os_str().as_bytes() {
        if byte == b',' || byte == b'\\' {
            list.push(b'\\');
        }
        list.push(byte);
    }
    let mut add = |option: &str| {
        list.push(b',');
        list.extend_from_slice(option.as_bytes());
    };
    add(if options.read_only { "ro" } else { "rw" });
    if options.allow_other {
        add("allow_other");
    }
    options.helper_flags().for_each(add);
    OsString::from_vec(list)
}

fn receive_descriptor(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::empty()).ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}
