//! Messages of the daemon: standard error in the foreground, syslog in the background.

use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

static SYSLOG: OnceLock<UnixDatagram> = OnceLock::new();

/// Facility "daemon", times eight.
const FACILITY: u8 = 3 << 3;

/// Sends what follows to syslog; without one, to standard error as before.
pub fn use_syslog() {
    let socket = UnixDatagram::unbound().and_then(|s| s.connect("/dev/log").map(|()| s));
    if let Ok(socket) = socket {
        // A second call changes nothing.
        let _ = SYSLOG.set(socket);
    }
}

/// Something failed.
pub fn error(message: &str) {
    write(3, message);
}

/// Something an administrator should know.
pub fn warning(message: &str) {
    write(4, message);
}

/// An event of normal life.
pub fn info(message: &str) {
    write(6, message);
}

fn write(severity: u8, message: &str) {
    let message = cairn_host::without_codes(message);
    match SYSLOG.get() {
        Some(socket) => {
            let line =
                format!("<{}>mount.cairn[{}]: {message}", FACILITY | severity, std::process::id());
            // There is nobody left to tell.
            let _ = socket.send(line.as_bytes());
        }
        None => eprintln!("mount.cairn: {message}"),
    }
}
