//! The virtual machine the module is tried in.
//!
//! It has no disk: its initial file system is busybox, `tools/vm/init`, the module and one script.
//! `init` runs the script, looks through the kernel's log, and ends the machine with a status.
//! The processor is emulated, so this works on any machine; it takes half a minute.

use super::setup::BuildRoot;
use super::{capture, checkout, out_dir, program, remove_tree, say, Failure};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long a machine may run; it is done in a tenth of that on two processors with nothing to do.
const LIMIT: Duration = Duration::from_secs(300);

/// Lets the module test itself.
///
/// # Errors
/// What the machine's console showed.
pub fn selftest(root: &BuildRoot, module: &Path) -> Result<String, Failure> {
    say("starting the virtual machine");
    let console =
        run(root, &[("selftest", "run")], &[(module, "cairn.ko")]).map_err(Failure::Failed)?;
    let results: Vec<&str> = console
        .lines()
        .filter_map(|line| line.split_once("cairn: selftest").map(|(_, what)| what.trim()))
        .collect();
    for line in &results {
        say(line.trim_start_matches(':').trim());
    }
    let passed = |line: &&&str| line.starts_with(':') && line.ends_with(" passed, 0 failed");
    match results.iter().rfind(passed) {
        Some(line) => Ok(format!("in the kernel: {}", line.trim_start_matches(':').trim())),
        None => Err(Failure::Failed(format!("the self-test said nothing:\n{console}"))),
    }
}

/// Runs a machine that holds scripts of `tools/vm` and other files under `/test`, each with the
/// name it is to have; gives the console's output when it ended well.
fn run(
    root: &BuildRoot,
    scripts: &[(&str, &str)],
    files: &[(&Path, &str)],
) -> Result<String, String> {
    let tools = checkout().join("tools/vm");
    let mut content: Vec<(PathBuf, PathBuf)> =
        vec![(busybox()?, "bin/busybox".into()), (tools.join("init"), "init".into())];
    content.extend(scripts.iter().map(|(from, to)| (tools.join(from), Path::new("test").join(to))));
    content.extend(files.iter().map(|(from, to)| (from.to_path_buf(), Path::new("test").join(to))));
    let image = initial_file_system(&content)?;
    let log = out_dir().join("vm/console.log");
    let status = boot(&root.kernel, &image, &log)?;
    let console = fs::read(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let console = String::from_utf8_lossy(&console).replace('\r', "");
    let wrong = match status {
        // qemu ends with twice the status of `init` plus one.
        Some(1) => return Ok(console),
        Some(3) => "the test failed".to_owned(),
        Some(5) => "the kernel complained".to_owned(),
        Some(other) => format!("the machine died (qemu ended with {other})"),
        None => format!("the machine did not end within {} s", LIMIT.as_secs()),
    };
    Err(format!(
        "{}\n{wrong}; all of the console is in {}",
        super::tail(&console, 80),
        log.display()
    ))
}

/// The statically linked one.
fn busybox() -> Result<PathBuf, String> {
    ["/usr/bin/busybox", "/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .ok_or_else(|| "busybox-static is not installed".into())
}

/// Packs files into an initial file system, named by where they come from and where they go.
fn initial_file_system(content: &[(PathBuf, PathBuf)]) -> Result<PathBuf, String> {
    let dir = out_dir().join("vm/files");
    let image = out_dir().join("vm/initrd");
    remove_tree(&dir)?;
    for (from, to) in content {
        let to = dir.join(to);
        let copied = fs::create_dir_all(to.parent().unwrap_or(&dir))
            .and_then(|()| fs::copy(from, &to))
            .and_then(|_| fs::set_permissions(&to, fs::Permissions::from_mode(0o755)));
        copied.map_err(|error| format!("{}: {error}", from.display()))?;
    }
    let pack = "cd \"$1\" && find . | busybox cpio -o -H newc >\"$2\"";
    capture(program("sh", ["-c", pack, "pack"]).arg(&dir).arg(&image))?;
    Ok(image)
}

/// Runs qemu; its exit status, or `None` when it had to be ended.
fn boot(kernel: &Path, image: &Path, log: &Path) -> Result<Option<i32>, String> {
    let console = File::create(log).map_err(|error| format!("{}: {error}", log.display()))?;
    let errors = console.try_clone().map_err(|error| error.to_string())?;
    let mut qemu = program("qemu-system-x86_64", ["-machine", "q35", "-cpu", "max", "-smp", "2"]);
    qemu.args(["-m", "1G", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // Emulated even where there is hardware support, which does not work alike on all machines.
    qemu.args(["-accel", "tcg,thread=multi"]);
    qemu.args(["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(image);
    // no_timer_check: emulated timers may be too late for the kernel's own test of them.
    qemu.args([
        "-append",
        "console=ttyS0 quiet panic=-1 oops=panic mitigations=off no_timer_check",
    ]);
    let mut machine = qemu
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(errors)
        .spawn()
        .map_err(|error| format!("qemu could not be started: {error}"))?;
    let begin = Instant::now();
    loop {
        if let Some(status) = machine.try_wait().map_err(|error| error.to_string())? {
            return Ok(Some(status.code().unwrap_or(-1)));
        }
        if begin.elapsed() > LIMIT {
            machine.kill().and_then(|()| machine.wait()).map_err(|error| error.to_string())?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
