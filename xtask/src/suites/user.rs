//! An ordinary user: an image of one's own, made, mounted, used, unmounted, checked, without root.

use super::Suite;
use crate::guard;
use crate::run::Cmd;
use crate::steps::Outcome;
use crate::{checkout, need};
use anyhow::{ensure, Result};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Does it all as `nobody`.
///
/// # Errors
/// When a step fails.
pub fn run(_suite: &Suite<'_>) -> Result<Outcome> {
    need::tools(&[("setpriv", "util-linux"), ("fusermount3", "fuse3")])?;
    // The checkout may lie where other users cannot look.
    let (dir, _dir) = guard::temp_dir(&std::env::temp_dir(), "cairn-user")?;
    for name in ["mkfs.cairn", "mount.cairn", "fsck.cairn", "cairn"] {
        fs::copy(checkout::binary(name), dir.join(name))?;
    }
    // `temp_dir` keeps others out.
    Cmd::new("chmod").arg("-R").arg("a+rX").arg(&dir).quiet()?;
    let home = dir.join("home");
    fs::create_dir_all(home.join("mnt"))?;
    Cmd::new("chown").args(["-R", "65534:65534"]).arg(&home).quiet()?;
    let script = r#"
        truncate -s 300M pool.img
        ../mkfs.cairn -q pool.img
        ../mount.cairn pool.img mnt
        trap 'fusermount3 -u mnt || true' EXIT
        findmnt -no FSTYPE mnt | grep -q '^fuse.cairn$'
        head -c 5000000 /dev/urandom > mnt/file
        ln mnt/file mnt/link
        cp mnt/file copy
        test "$(stat -c %U mnt/file)" = nobody
        # Nobody has logged in, so there is no directory for sockets.
        ../cairn snapshot create mnt@before
        ../cairn info mnt | grep -q '^Mounted with: subvol=/,'
        fusermount3 -u mnt
        trap - EXIT
        ../fsck.cairn -f -n pool.img
        ../mount.cairn pool.img mnt
        trap 'fusermount3 -u mnt || true' EXIT
        cmp mnt/link copy
        ../cairn info mnt | grep -q '^State: .*in use'
        fusermount3 -u mnt
        chmod a-w pool.img
        ../mount.cairn pool.img mnt 2> said
        grep -q 'pool.img cannot be written to: Permission denied: mounting .* read-only' said
        findmnt -no OPTIONS mnt | grep -q '^ro,'
        cmp mnt/link copy
    "#;
    // As udev sets it on systems that people log in to.
    let _device = guard::permissions(Path::new("/dev/fuse"), 0o666)?;
    // Registered while nothing is mounted yet: should the script die, this takes the mount away.
    let mounted = guard::mounted(&home.join("mnt"));
    let shell = Cmd::new("setpriv").args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let shell =
        shell.args(["env", "-u", "XDG_RUNTIME_DIR", "bash", "-euo", "pipefail", "-c", script]);
    shell.env("HOME", &home).dir(&home).limit(Duration::from_secs(120)).quiet()?;
    ensure!(!guard::is_mounted(&home.join("mnt")), "the user's unmount did nothing");
    mounted.disarm();
    Ok(Outcome::Passed("made, mounted, unmounted and checked by nobody".into()))
}
