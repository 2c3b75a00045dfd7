//! What the thread that waits for an answer is doing.
//!
//! Opens send no request (`docs/decisions/0004-writes-to-snapshots.md`), but a snapshot's file must
//! not be opened for writing. The kernel can be made to ask for the file's attributes meanwhile,
//! and the thread that asks is named in the request; what it asks for is in `/proc`: the number of
//! the system call that it is in, and its arguments.
//!
//! Nothing relies on an answer. A thread that is not seen (in another pid namespace, through
//! io_uring, or where the daemon may not look) is taken to do nothing; whatever it writes is
//! refused when it arrives.

use std::time::Duration;

/// A system call under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    number: i64,
    arguments: [u64; 6],
}

/// Whether a thread opens a file for writing, or asks whether it may write.
pub(crate) fn is_to_open_for_writing(pid: u32) -> bool {
    call_of(pid).is_some_and(|call| opens_for_writing(&call))
}

/// What a thread does with a file that it has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// It writes.
    Writes,
    /// It reads, or looks for a position.
    Reads,
    /// That is not known.
    Unknown,
}

/// What a thread does that asks on behalf of an open file.
pub(crate) fn doing(pid: u32) -> Doing {
    match call_of(pid) {
        Some(call) if writes(&call) => Doing::Writes,
        Some(call) if reads(&call) => Doing::Reads,
        _ => Doing::Unknown,
    }
}

fn opens_for_writing(call: &Call) -> bool {
    const WRITE_OK: u64 = libc::W_OK as u64;
    let for_writing = |flags: u64| flags & libc::O_ACCMODE as u64 != libc::O_RDONLY as u64;
    let [_, second, third, ..] = call.arguments;
    match call.number {
        libc::SYS_openat => for_writing(third),
        libc::SYS_faccessat | libc::SYS_faccessat2 => third & WRITE_OK != 0,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_open => for_writing(second),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_creat => true,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_access => second & WRITE_OK != 0,
        // Of openat2 the flags are in the caller's memory.
        _ => {
            let _ = second;
            false
        }
    }
}

fn writes(call: &Call) -> bool {
    // What reads from a file to write to another does not ask for the first one's attributes.
    matches!(
        call.number,
        libc::SYS_write
            | libc::SYS_pwrite64
            | libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_sendfile
            | libc::SYS_splice
    )
}

fn reads(call: &Call) -> bool {
    matches!(
        call.number,
        libc::SYS_read
            | libc::SYS_pread64
            | libc::SYS_readv
            | libc::SYS_preadv
            | libc::SYS_preadv2
            | libc::SYS_lseek
    )
}

/// The system call that a thread waits in.
fn call_of(pid: u32) -> Option<Call> {
    /// Looks for a thread that has made its request and is about to wait for the answer.
    const LOOKS: u32 = 50;
    if pid == 0 {
        return None;
    }
    let path = format!("/proc/{pid}/syscall");
    for look in 0..LOOKS {
        let text = std::fs::read_to_string(&path).ok()?;
        if text.trim_end() != "running" {
            return parse(&text);
        }
        match look {
            0..10 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(20)),
        }
    }
    None
}

/// Reads `NUMBER ARGUMENT*6 SP PC`, arguments in hexadecimal.
fn parse(text: &str) -> Option<Call> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        let digits = words.next()?.strip_prefix("0x")?;
        *argument = u64::from_str_radix(digits, 16).ok()?;
    }
    Some(Call { number, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_line_of_proc_is_read() {
        let call = parse("257 0xffffff9c 0x7f 0x80001 0x0 0x1 0x2 0x7ffe 0x7fdb\n").unwrap();
        assert_eq!(call.number, 257);
        assert_eq!(call.arguments, [0xffff_ff9c, 0x7f, 0x80001, 0, 1, 2]);
        for text in ["", "running", "-1 0x7ffe 0x7fdb", "1 2 3 4 5 6 7 8 9", "x 0x1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn only_opens_for_writing_are_taken_for_such() {
        let open = |flags: libc::c_int| {
            let arguments = [libc::AT_FDCWD as u64, 0, flags as u64, 0, 0, 0];
            opens_for_writing(&Call { number: libc::SYS_openat, arguments })
        };
        assert!(open(libc::O_WRONLY | libc::O_CLOEXEC) && open(libc::O_RDWR));
        assert!(!open(libc::O_RDONLY | libc::O_CLOEXEC) && !open(libc::O_PATH));
    }

    #[test]
    fn a_thread_that_waits_is_seen_in_its_call() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get() as u32).unwrap();
            let mut byte = [0];
            // SYS_recvfrom or SYS_read, as the library likes it.
            std::fs::File::from(std::os::fd::OwnedFd::from(there.try_clone().unwrap()))
                .read_exact(&mut byte)
                .unwrap();
            there.write_all(&byte).unwrap();
        });
        let pid = told.recv().unwrap();
        let mut is_seen = false;
        for _ in 0..1000 {
            is_seen = doing(pid) == Doing::Reads;
            if is_seen {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let opens = is_to_open_for_writing(pid);
        here.write_all(b"x").unwrap();
        thread.join().unwrap();
        // Where a process may not look at itself, nothing is known.
        let may_look = std::fs::read_to_string("/proc/self/syscall").is_ok();
        assert_eq!(is_seen, may_look);
        assert!(!opens);
    }
}
