//! Where incidents go: one line each, for the person who looks after the machine.

use fs_core::error::Incident;
use fs_core::platform::Report;
use std::os::unix::net::UnixDatagram;

/// Where lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard error: commands, and daemons in the foreground or under a service manager.
    Stderr,
    /// The system log (`/dev/log`, which the journal serves too): daemons in the background, whose
    /// standard error leads nowhere. Falls back to standard error.
    System,
}

/// Writes incidents as `NAME: sentence`.
#[derive(Clone, Debug)]
pub struct LogReport {
    name: String,
    target: LogTarget,
}

/// Facility "daemon" (3) and the severities used, as syslog(3) numbers them.
const FACILITY: u8 = 3 << 3;
const ERROR: u8 = 3;
const WARNING: u8 = 4;
const NOTICE: u8 = 5;

impl LogReport {
    /// A sink whose lines begin with `name`, the device's or the pool's.
    pub fn new(name: impl Into<String>, target: LogTarget) -> LogReport {
        LogReport { name: name.into(), target }
    }

    /// Writes one line at the severity of a notice.
    pub fn notice(&self, message: &str) {
        self.line(NOTICE, message);
    }

    fn line(&self, severity: u8, message: &str) {
        let delivered = self.target == LogTarget::System
            && send_to_syslog(&self.syslog_line(severity, message)).is_ok();
        if !delivered {
            eprintln!("{}: {message}", self.name);
        }
    }

    fn syslog_line(&self, severity: u8, message: &str) -> String {
        let pid = std::process::id();
        format!("<{}>cairn[{pid}]: {}: {message}", FACILITY | severity, self.name)
    }
}

fn send_to_syslog(line: &str) -> std::io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // A log that is stuck must not stop the filesystem.
    socket.set_nonblocking(true)?;
    socket.send_to(line.as_bytes(), "/dev/log").map(|_| ())
}

fn severity(incident: &Incident) -> u8 {
    match incident {
        Incident::Replayed { .. } | Incident::DeviceComplete { .. } => NOTICE,
        Incident::Scrubbed { lost: 0, .. } => NOTICE,
        Incident::Healed { .. } | Incident::DeviceUnusable { .. } => WARNING,
        Incident::Scrubbed { .. }
        | Incident::Lost { .. }
        | Incident::FileDamaged { .. }
        | Incident::DeviceFailed { .. }
        | Incident::WentReadOnly { .. }
        | Incident::DeletionStopped { .. } => ERROR,
    }
}

/// Tells nobody: for whoever opens a pool to look at one thing.
pub struct NoReport;

impl Report for NoReport {
    fn incident(&self, _: &Incident) {}
}

impl Report for LogReport {
    fn incident(&self, incident: &Incident) {
        self.line(severity(incident), &incident.to_string());
    }
}

/// A message without the numbers that libraries put behind what the system says: ` (os error 2)`.
pub fn without_codes(message: &str) -> String {
    let mut plain = String::with_capacity(message.len());
    let mut rest = message;
    while let Some((before, after)) = rest.split_once(" (os error ") {
        plain.push_str(before);
        let after = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
        rest = after.strip_prefix(')').unwrap_or(after);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_errors_are_left_out_of_messages() {
        let error = std::io::Error::from_raw_os_error(2);
        let said = without_codes(&format!("a: {error}; b: {error} (option x)"));
        assert_eq!(said, "a: No such file or directory; b: No such file or directory (option x)");
        assert_eq!(without_codes("(os error 2"), "(os error 2");
    }

    #[test]
    fn a_syslog_line_names_facility_process_and_device() {
        let report = LogReport::new("/dev/vdb", LogTarget::System);
        let line = report.syslog_line(severity(&Incident::Replayed { records: 3 }), "text");
        assert_eq!(line, format!("<29>cairn[{}]: /dev/vdb: text", std::process::id()));
    }
}
