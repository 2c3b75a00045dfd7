//! The build root: a Debian system in a directory, with the compilers that built the kernel.
//!
//! A module in Rust can be linked to a kernel only by the very compiler that built the kernel's own
//! Rust crates, and only against those crates' metadata, which Debian does not ship. So the set-up
//! installs the release that the kernel comes from, and has the kernel's source make the metadata
//! again, with the packaged kernel's configuration.
//!
//! Every step looks for what it would make, says what it does when that is missing, and puts the
//! result in place with a rename: a set-up that was interrupted goes on where it was.

use super::{capture, program, remove_tree, say, Failure};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Debian's release whose backports have the kernel.
const SUITE: &str = "trixie";
/// The kernel's series. The newest version of it that the mirror has is taken.
const SERIES: &str = "7.3";
/// Names the cache directory.
const CACHE: &str = "CAIRN_KMOD_CACHE";
/// What building needs inside, apart from the kernel's own packages.
const PACKAGES: &[&str] = &[
    "bc",
    "bindgen",
    "bison",
    "cargo",
    "clang",
    "cpio",
    "flex",
    "gcc-14",
    "kmod",
    "libelf-dev",
    "libssl-dev",
    "llvm",
    "make",
    "perl",
    "python3-minimal",
    "rust-src",
    "rustc",
    "rustfmt",
    "xz-utils",
];
/// What the machine itself needs: a program, and the package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("debootstrap", "debootstrap"),
    ("busybox", "busybox-static"),
    ("unshare", "util-linux"),
];
/// Part of the keyring package since it knows the keys of `SUITE`.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-trixie-stable.gpg";

/// A build root that is ready.
pub struct BuildRoot {
    /// The directory it is in.
    dir: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
    /// The kernel image.
    pub kernel: PathBuf,
}

impl BuildRoot {
    /// A program inside the build root, where the checkout has the path that it has outside.
    pub fn command(&self, name: &str) -> Command {
        inside(&self.dir, name)
    }

    /// The kernel's headers, as seen inside.
    pub fn headers(&self) -> String {
        headers(&self.release)
    }
}

fn headers(release: &str) -> String {
    format!("/usr/src/linux-headers-{release}")
}

/// Enters a build root: in a mount namespace of its own, so that nothing stays mounted. The rest of
/// the machine's mounts are let go of there: they would stay in use for as long as a build takes,
/// though unmounted everywhere else.
const ENTER: &str = r#"
set -eu
root=$1 checkout=$2
shift 2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mkdir -p "$root$checkout"
mount --bind "$checkout" "$root$checkout"
cd "$root"
pivot_root . mnt
exec chroot . /bin/sh -c 'umount --lazy /mnt && exec "$@"' enter /usr/bin/env -i \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive ${http_proxy:+"http_proxy=$http_proxy"} "$@"
"#;

fn inside(root: &Path, name: &str) -> Command {
    let mut command = program(
        "unshare",
        ["--mount", "--propagation", "private", "--", "sh", "-c", ENTER, "enter"],
    );
    command.arg(root).arg(super::checkout()).arg(name);
    command
}

/// Makes whatever is missing of the build root.
///
/// # Errors
/// [`Failure::Unavailable`]: this machine cannot have one.
pub fn ready() -> Result<BuildRoot, Failure> {
    prepare().map_err(Failure::Unavailable)
}

fn prepare() -> Result<BuildRoot, String> {
    must_be_root_on_debian()?;
    let cache = cache_dir()?;
    fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let _lock = lock(&cache)?;
    install_tools()?;
    let dir = cache.join("root");
    bootstrap(&dir)?;
    configure_apt(&dir)?;
    let release = choose_kernel(&cache, &dir)?;
    install_packages(&dir, &release)?;
    prepare_headers(&dir, &release)?;
    let kernel = fetch_kernel(&cache, &dir, &release)?;
    Ok(BuildRoot { dir, release, kernel })
}

fn must_be_root_on_debian() -> Result<(), String> {
    if !Path::new("/etc/debian_version").exists() {
        return Err("the kernel module is built with Debian's packages; this is not Debian".into());
    }
    if !rustix::process::geteuid().is_root() {
        return Err("setting up the build of the kernel module needs root".into());
    }
    Ok(())
}

fn cache_dir() -> Result<PathBuf, String> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var(CACHE)
        .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("cairn-kmod")))
        .or_else(|| var("HOME").map(|dir| dir.join(".cache/cairn-kmod")))
        .ok_or_else(|| format!("{CACHE} names no directory and there is no HOME"))
}

/// Keeps two set-ups from working on one cache.
fn lock(cache: &Path) -> Result<fs::File, String> {
    use rustix::fs::{flock, FlockOperation};
    let path = cache.join("lock");
    let file = fs::File::create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        say("waiting for another set-up");
        flock(&file, FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
    }
    Ok(file)
}

fn apt_get(args: &[&str]) -> Command {
    let mut command = program("apt-get", ["-qq", "-o", "DPkg::Lock::Timeout=300"]);
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_installed(tool: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(tool).exists())
}

/// Installs what the machine lacks.
fn install_tools() -> Result<(), String> {
    let mut missing: Vec<&str> =
        TOOLS.iter().filter(|(tool, _)| !is_installed(tool)).map(|(_, package)| *package).collect();
    if !Path::new(KEYRING).exists() {
        missing.push("debian-archive-keyring");
    }
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("installing {}", missing.join(", ")));
    capture(&mut apt_get(&["update"]))?;
    let mut install = apt_get(&["install", "-y", "--no-install-recommends"]);
    capture(install.args(&missing)).map(drop)
}

/// The mirror that this machine's apt uses for Debian itself.
fn mirror() -> Result<String, String> {
    let query = || {
        let format = "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)";
        let targets = capture(&mut program("apt-get", ["indextargets", "--format", format]))?;
        let uri = targets.lines().find_map(|line| line.strip_prefix("Debian|Debian|main|"));
        Ok::<_, String>(uri.map(|uri| uri.trim_end_matches('/').to_owned()))
    };
    if let Some(uri) = query()? {
        return Ok(uri);
    }
    capture(&mut apt_get(&["update"]))?;
    query()?.ok_or_else(|| "apt knows no mirror of Debian".into())
}

/// Makes the system the build root starts from.
fn bootstrap(dir: &Path) -> Result<(), String> {
    if dir.exists() {
        return Ok(());
    }
    let mirror = mirror()?;
    say(&format!("installing a minimal {SUITE} (a minute or two)"));
    let partial = dir.with_extension("partial");
    remove_tree(&partial)?;
    let mut command = program("debootstrap", ["--variant=minbase", SUITE]);
    capture(command.arg(&partial).arg(&mirror))?;
    let sources = format!(
        "deb {mirror} {SUITE} main\n\
         deb {mirror} {SUITE}-updates main\n\
         deb {mirror} {SUITE}-backports main\n"
    );
    put(&partial.join("etc/apt/sources.list"), &sources)?;
    // The root is thrown away when something goes wrong; no need to sync every file.
    put(&partial.join("etc/dpkg/dpkg.cfg.d/unsafe-io"), "force-unsafe-io\n")?;
    fs::rename(&partial, dir).map_err(|error| format!("{}: {error}", dir.display()))
}

fn put(path: &Path, content: &str) -> Result<(), String> {
    super::write_if_changed(path, content.as_bytes())
}

/// Gives the build root this machine's way to the network, which may have changed.
fn configure_apt(dir: &Path) -> Result<(), String> {
    let dump =
        capture(&mut program("apt-config", ["dump", "--format", "%f \"%v\";%n", "Acquire"]))?;
    let mut conf: String = dump
        .lines()
        .filter(|line| line.contains("::Proxy"))
        .map(|line| format!("{line}\n"))
        .collect();
    conf.push_str("APT::Install-Recommends \"false\";\nAcquire::Retries \"3\";\n");
    put(&dir.join("etc/apt/apt.conf.d/90host"), &conf)?;
    for file in ["etc/resolv.conf", "etc/hosts"] {
        if let Ok(content) = fs::read(Path::new("/").join(file)) {
            super::write_if_changed(&dir.join(file), &content)?;
        }
    }
    Ok(())
}

/// Picks the kernel, once: the newest of the series whose source the mirror has, too.
fn choose_kernel(cache: &Path, dir: &Path) -> Result<String, String> {
    let chosen = cache.join("release");
    if let Ok(release) = fs::read_to_string(&chosen) {
        return Ok(release.trim().to_owned());
    }
    say("looking for the newest kernel");
    capture(inside(dir, "apt-get").args(["-qq", "update"]))?;
    let source = package_version(dir, &format!("linux-source-{SERIES}"))?;
    let pattern =
        format!("^linux-headers-{}\\.[0-9]+\\+deb[0-9]+-amd64$", SERIES.replace('.', "\\."));
    let found = capture(inside(dir, "apt-cache").args(["search", "--names-only", &pattern]))?;
    for package in found.lines().filter_map(|line| line.split_whitespace().next()) {
        if package_version(dir, package)? == source {
            let release = package.trim_start_matches("linux-headers-");
            put(&chosen, release)?;
            return Ok(release.to_owned());
        }
    }
    Err(format!("the mirror has no headers that match linux-source-{SERIES} {source}"))
}

fn package_version(dir: &Path, package: &str) -> Result<String, String> {
    let text = capture(inside(dir, "apt-cache").args(["policy", package]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
        .ok_or_else(|| format!("the mirror has no package {package}"))
}

/// Installs compilers and kernel headers.
fn install_packages(dir: &Path, release: &str) -> Result<(), String> {
    let packages = format!("{} linux-headers-{release}", PACKAGES.join(" "));
    let done = dir.join("var/lib/cairn-packages");
    if fs::read_to_string(&done).is_ok_and(|installed| installed == packages) {
        return Ok(());
    }
    say("installing compilers and kernel headers (two minutes or so)");
    capture(inside(dir, "apt-get").args(["-qq", "update"]))?;
    capture(inside(dir, "apt-get").args(["-qq", "install", "-y"]).args(packages.split(' ')))?;
    capture(inside(dir, "apt-get").arg("clean"))?;
    must_have_the_kernels_compiler(dir, release)?;
    put(&done, &packages)
}

/// Another build of the same compiler version makes crates that do not fit together.
fn must_have_the_kernels_compiler(dir: &Path, release: &str) -> Result<(), String> {
    let config = dir.join(&headers(release)[1..]).join(".config");
    let config =
        fs::read_to_string(&config).map_err(|error| format!("{}: {error}", config.display()))?;
    let wanted = config
        .lines()
        .find_map(|line| line.strip_prefix("CONFIG_RUSTC_VERSION_TEXT="))
        .map(|text| text.trim_matches('"'))
        .ok_or("the kernel was built without Rust")?;
    let found = capture(inside(dir, "rustc").arg("--version"))?;
    if found.trim() == wanted {
        return Ok(());
    }
    Err(format!("the kernel was built by {wanted}, but {SUITE} has {}", found.trim()))
}

/// Has the kernel's source make the metadata of the kernel's crates. Half of the source is drivers,
/// of which only the configuration is needed.
const PREPARE_HEADERS: &str = r#"
set -eu
headers=$1 series=$2
rm -rf /build
mkdir /build
cd /build
apt-get -qq download "linux-source-$series"
dpkg-deb --fsys-tarfile linux-source-*.deb | tar -xO --wildcards '*/linux-source-*.tar.xz' |
    tar -xJ --strip-components=1 --exclude='*/drivers/*.c' --exclude='*/sound/*.c' \
        --exclude='*/drivers/gpu/drm/amd/*.h'
rm linux-source-*.deb
cp "$headers/.config" .config
make olddefconfig
make -j"$(nproc)" CC=x86_64-linux-gnu-gcc-14 prepare
cp scripts/target.json "$(readlink -f "$headers/scripts")/"
rm -rf "$headers/rust.partial"
cp -a rust "$headers/rust.partial"
mv "$headers/rust.partial" "$headers/rust"
cd /
rm -rf /build
"#;

fn prepare_headers(dir: &Path, release: &str) -> Result<(), String> {
    if dir.join(&headers(release)[1..]).join("rust").exists() {
        return Ok(());
    }
    say("making the kernel's Rust metadata from its source (one to four minutes)");
    let mut command = inside(dir, "sh");
    capture(command.args(["-c", PREPARE_HEADERS, "prepare", &headers(release), SERIES])).map(drop)
}

/// Fetches the kernel image; nothing of its package needs to be installed.
fn fetch_kernel(cache: &Path, dir: &Path, release: &str) -> Result<PathBuf, String> {
    let kernel = cache.join(format!("vmlinuz-{release}"));
    if kernel.exists() {
        return Ok(kernel);
    }
    say(&format!("fetching the kernel {release}"));
    let script = r#"
        set -eu
        rm -rf /kernel
        mkdir /kernel
        cd /kernel
        apt-get -qq download "linux-binary-$1"
        dpkg-deb -x linux-binary-*.deb .
        find . -name 'vmlinuz*' -type f -exec cp {} image ';'
    "#;
    capture(inside(dir, "sh").args(["-c", script, "fetch", release]))?;
    let image = dir.join("kernel/image");
    let partial = kernel.with_extension("partial");
    fs::copy(&image, &partial)
        .and_then(|_| fs::set_permissions(&partial, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&partial, &kernel))
        .map_err(|error| format!("{}: {error}", image.display()))?;
    remove_tree(&dir.join("kernel"))?;
    Ok(kernel)
}
