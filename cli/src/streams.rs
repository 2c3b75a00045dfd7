//! `cairn send`, `cairn receive` and `cairn stream`.
//!
//! The daemon of a mounted pool sends and receives itself; what goes through here are the bytes of
//! the stream.

use crate::arguments::{Receive, Send, Stream};
use crate::target::ask_failed;
use crate::versions::{self, named, Place};
use crate::{output, Done, Failure};
use cairn_host::admin::{self, Parts, Reply, Request};
use cairn_host::mounts::Mount;
use cairn_host::parse::format_size;
use cairn_host::streams::{self, Received, Sending, Sent, StreamInfo};
use cairn_host::versions::VersionName;
use cairn_host::{say, HostCodecs};
use fs_core::units::TreeId;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::fs::{AtFlags, Mode, OFlags, CWD};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Bytes that are copied at once.
const COPY_BYTES: usize = 256 << 10;

pub(crate) fn send(arguments: &Send) -> Result<Done, Failure> {
    let (place, name) = versions::find(&arguments.at)?;
    let snapshot = match arguments.token {
        None => versions::part(name)?,
        Some(_) => name,
    };
    let from = arguments.from.as_deref().map(|from| earlier(&place, &snapshot, from, arguments));
    let token = arguments.token.clone();
    let what = Sending { snapshot, from: from.transpose()?, replicate: arguments.replicate, token };
    let snapshot = what.snapshot.snapshot.clone();
    let output = arguments.output.as_deref().filter(|path| *path != Path::new("-"));
    let mut unfinished = None;
    let mut out: Box<dyn Write> = match output {
        Some(path) if !path.exists() || path.is_file() => {
            let file = Unfinished::new(path)?;
            let out = file.file.try_clone().map_err(|error| of_file(path, &error))?;
            unfinished = Some(file);
            Box::new(out)
        }
        // A pipe or a device.
        Some(path) => {
            let file = File::options().write(true).open(path);
            Box::new(file.map_err(|error| of_file(path, &error))?)
        }
        None if io::stdout().is_terminal() => {
            let what = "a stream is not for a terminal: send it into a file (-o) or a command";
            return Err(Failure::new(what));
        }
        None => Box::new(io::stdout().lock()),
    };
    let bar = bar(arguments.quiet, || about(&place, &what));
    let mut out = bar.wrap_write(&mut *out);
    let sent = match &place {
        Place::Mounted(mount) => send_mounted(mount, what, &mut out),
        Place::Devices(paths) => {
            let engine = versions::open_to_read(paths)?;
            let sent = streams::send(&engine, TreeId::FIRST_SUBVOL.0, &what, &mut out);
            engine.close().map_err(|error| named(paths, &error))?;
            sent.map_err(|error| named(paths, &error))
        }
    };
    bar.finish_and_clear();
    let sent = sent?;
    for name in &sent.left_out {
        let name = output::printable(name);
        let snapshot = output::printable(snapshot.as_deref().unwrap_or_default());
        eprintln!("cairn: {name} has no snapshot {snapshot}: it is not sent");
    }
    unfinished.map_or(Ok(()), Unfinished::keep)?;
    Ok(Done::Whole)
}

/// A file that gets its name when all is in it: until then there is what was there before.
struct Unfinished {
    file: File,
    /// Under which name it is until then; none where the filesystem allows it, so that nothing is
    /// left if the command is killed.
    at: Option<PathBuf>,
    directory: PathBuf,
    name: PathBuf,
}

impl Unfinished {
    fn new(name: &Path) -> Result<Unfinished, Failure> {
        // What a symbolic link leads to, and not the link.
        let name = name.canonicalize().unwrap_or_else(|_| name.into());
        let directory = match name.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        // A snapshot holds what some may not read, so by itself only its owner may read a stream.
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let (file, at) = match rustix::fs::open(&directory, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => (File::from(file), None),
            Err(_) => {
                let mut options = File::options();
                options.write(true).create_new(true).mode(0o600);
                let (file, at) = under_free_name(&name, |at| options.open(at))?;
                (file, Some(at))
            }
        };
        let unfinished = Unfinished { file, at, directory, name };
        // Who replaces a file goes on with its permissions.
        if let Ok(old) = unfinished.name.metadata() {
            let same = unfinished.file.set_permissions(old.permissions());
            same.map_err(|error| of_file(&unfinished.name, &error))?;
        }
        Ok(unfinished)
    }

    fn keep(mut self) -> Result<(), Failure> {
        let failed = |error: io::Error| of_file(&self.name, &error);
        self.file.sync_all().map_err(failed)?;
        let at = match self.at.take() {
            Some(at) => at,
            None => {
                let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                let link = |at: &Path| -> io::Result<()> {
                    rustix::fs::linkat(CWD, &file, CWD, at, AtFlags::SYMLINK_FOLLOW)?;
                    Ok(())
                };
                under_free_name(&self.name, link)?.1
            }
        };
        let renamed = std::fs::rename(&at, &self.name);
        if renamed.is_err() {
            self.at = Some(at);
        }
        renamed.map_err(|error| of_file(&self.name, &error))?;
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| of_file(&self.directory, &error))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(at) = &self.at {
            let _ = std::fs::remove_file(at);
        }
    }
}

/// Makes something beside a file, under a name that nothing has.
fn under_free_name<T>(
    name: &Path,
    make: impl Fn(&Path) -> io::Result<T>,
) -> Result<(T, PathBuf), Failure> {
    let mut tried = 0;
    loop {
        let mut at = name.as_os_str().to_owned();
        at.push(format!(".partial-{}-{tried}", std::process::id()));
        let at = PathBuf::from(at);
        match make(&at) {
            Ok(made) => return Ok((made, at)),
            // Left by somebody that had the same number.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tried < 100 => tried += 1,
            Err(error) => return Err(of_file(&at, &error)),
        }
    }
}

/// The snapshot that the receiver has: `@NAME` or `NAME` of the same subvolume, or a whole name.
fn earlier(
    place: &Place,
    snapshot: &VersionName,
    from: &str,
    arguments: &Send,
) -> Result<VersionName, Failure> {
    let (of, name) = from.rsplit_once('@').unwrap_or(("", from));
    if name.contains('#') {
        let what = "what is gone since a bookmark is not known: send from a snapshot";
        return Err(Failure::new(what));
    }
    if of.is_empty() {
        return Ok(VersionName { snapshot: Some(name.to_string()), ..snapshot.clone() });
    }
    let mut at = arguments.at.clone();
    at.name = from.into();
    match versions::find(&at)? {
        (other, found) if other.is(place) => versions::part(found),
        _ => Err(Failure::new(format_args!("{from} is in another pool"))),
    }
}

fn send_mounted(mount: &Mount, what: Sending, out: &mut dyn Write) -> Result<Sent, Failure> {
    let mut failed = None;
    let mut copy =
        |parts: &mut Parts<'_>| pass_on(parts, &mut Noted { inner: out, failed: &mut failed });
    let reply = admin::converse(mount.device, Request::Send(what), &mut copy);
    if let Some(error) = failed {
        return Err(Failure::new(format_args!("the stream could not be written: {error}")));
    }
    match reply {
        Ok(Reply::Sent(sent)) => Ok(sent),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

/// Notes what goes wrong with what is written to, or read: the connection is not to blame.
struct Noted<'a, T: ?Sized> {
    inner: &'a mut T,
    failed: &'a mut Option<String>,
}

impl<S: ?Sized> Noted<'_, S> {
    fn note<T>(&mut self, outcome: io::Result<T>) -> io::Result<T> {
        match &outcome {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                *self.failed = Some(error.to_string());
            }
            _ => {}
        }
        outcome
    }
}

impl Write for Noted<'_, dyn Write + '_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let outcome = self.inner.write(buf);
        self.note(outcome)
    }

    fn flush(&mut self) -> io::Result<()> {
        let outcome = self.inner.flush();
        self.note(outcome)
    }
}

impl Read for Noted<'_, dyn Read + '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let outcome = self.inner.read(buf);
        self.note(outcome)
    }
}

fn pass_on(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut buf = vec![0; COPY_BYTES];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return to.flush(),
            Ok(found) => to.write_all(&buf[..found])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn receive(arguments: &Receive) -> Result<Done, Failure> {
    let mut input = input(arguments.input.as_deref())?;
    let bar = bar(arguments.quiet, || None);
    let mut input = bar.wrap_read(&mut *input);
    if arguments.dry_run {
        let found = streams::look(&HostCodecs::new(), &mut input);
        bar.finish_and_clear();
        let found = found.map_err(Failure::new)?;
        if arguments.json {
            output::json(&found);
        } else {
            found.iter().for_each(|stream| say!("{}  {}", stream.identity, name_of(stream)));
        }
        return Ok(Done::Whole);
    }
    let Some(at) = arguments.at() else {
        return Err(Failure::new("where to receive is missing: POOL/SUBVOLUME"));
    };
    let (place, name) = versions::find(&at)?;
    let to = versions::whole(name)?;
    let received = match &place {
        Place::Mounted(mount) => receive_mounted(mount, to, &mut input),
        Place::Devices(paths) => {
            let engine = versions::open(paths, false)?;
            let base = TreeId::FIRST_SUBVOL.0;
            let received = streams::receive(&engine, base, &to, &mut input, &*engine);
            // What is left of what was deleted is taken apart when the pool is mounted.
            let _ = engine.destroy_all();
            let closed = engine.close().map_err(|error| named(paths, &error));
            received.map_err(|error| named(paths, &error)).and_then(|all| closed.map(|()| all))
        }
    };
    bar.finish_and_clear();
    told(&received?, arguments.json)
}

fn receive_mounted(
    mount: &Mount,
    to: VersionName,
    input: &mut dyn Read,
) -> Result<Received, Failure> {
    let mut failed = None;
    let mut copy = |parts: &mut Parts<'_>| {
        pass_on(&mut Noted { inner: &mut *input, failed: &mut failed }, parts)?;
        parts.end()
    };
    let reply = admin::converse(mount.device, Request::Receive(to), &mut copy);
    if let Some(error) = failed {
        return Err(Failure::new(format_args!("the stream could not be read: {error}")));
    }
    match reply {
        Ok(Reply::Received(received)) => Ok(received),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

fn told(received: &Received, is_json: bool) -> Result<Done, Failure> {
    if is_json {
        output::json(&serde_json::json!({
            "snapshots": received.snapshots.iter().map(|(name, identity)| {
                serde_json::json!({ "name": name, "identity": identity })
            }).collect::<Vec<_>>(),
            "earlier": received.earlier,
            "stays": received.stays,
        }));
    } else {
        if received.earlier > 0 {
            say!("({} snapshots before these)", received.earlier);
        }
        for (name, identity) in &received.snapshots {
            say!("{identity}  {}", output::printable(name));
        }
    }
    for to in &received.stays {
        let to = output::printable(to);
        eprintln!(
            "cairn: {to} is in use, or was changed since its newest snapshot: it stays as it is, \
             and what was received is in its snapshots"
        );
    }
    Ok(if received.stays.is_empty() { Done::Whole } else { Done::Attention })
}

pub(crate) fn stream(command: &Stream) -> Result<Done, Failure> {
    let Stream::Show { input: path, json } = command;
    let mut input = input(path.as_deref())?;
    let found = streams::look(&HostCodecs::new(), &mut *input).map_err(Failure::new)?;
    if *json {
        output::json(&found);
        return Ok(Done::Whole);
    }
    for (index, stream) in found.iter().enumerate() {
        if index > 0 {
            say!("");
        }
        show(stream);
    }
    Ok(Done::Whole)
}

fn show(stream: &StreamInfo) {
    let row = |what: &str, value: &str| say!("{what:<14} {value}");
    row("snapshot", &name_of(stream));
    for (name, value) in stream.properties.iter().flatten() {
        row("property", &output::printable(&format!("{name}={value}")));
    }
    row("id", &stream.id);
    row("made", &format!("{} UTC", versions::utc(stream.created)));
    match (&stream.base, &stream.base_identity) {
        (Some(base), Some(identity)) => {
            row("goes on from", base);
            row("which holds", identity);
        }
        _ => row("goes on from", "nothing: all is there"),
    }
    if let Some(next) = stream.resumes {
        row("resumes", &format!("with inode {next}: what is before came with another stream"));
    }
    row("identity", &stream.identity);
    row("inodes", &format!("{} new or changed, {} gone", stream.inodes, stream.gone));
    row("names", &format!("{} new, {} gone", stream.names, stream.unnamed));
    row("attributes", &stream.attributes.to_string());
    row("data", &format_size(stream.data_bytes));
    if stream.base.is_some() {
        row("holes", &format_size(stream.hole_bytes));
    }
    if stream.cloned_bytes > 0 {
        row("shared", &format!("{} of files that are there", format_size(stream.cloned_bytes)));
    }
    row("stream", &format!("{}, {} records", format_size(stream.bytes), stream.records));
}

fn name_of(stream: &StreamInfo) -> String {
    match stream.below.as_str() {
        "" => output::printable(&stream.snapshot),
        below => output::printable(&format!("{below}@{}", stream.snapshot)),
    }
}

fn input(path: Option<&Path>) -> Result<Box<dyn Read>, Failure> {
    match path.filter(|path| *path != Path::new("-")) {
        Some(path) if path.is_dir() => {
            Err(Failure::new(format_args!("{}: is a directory", path.display())))
        }
        Some(path) => {
            let file = File::open(path).map_err(|error| of_file(path, &error))?;
            Ok(Box::new(io::BufReader::with_capacity(COPY_BYTES, file)))
        }
        None if io::stdin().is_terminal() => {
            Err(Failure::new("the stream comes from standard input, or a file that is named"))
        }
        None => Ok(Box::new(io::stdin().lock())),
    }
}

fn of_file(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format_args!("{}: {error}", path.display()))
}

/// About how many bytes will be sent: the data of a snapshot that is sent whole. What came after
/// another is not known before it is sent.
fn about(place: &Place, what: &Sending) -> Option<u64> {
    if what.from.is_some() || what.replicate || what.token.is_some() {
        return None;
    }
    let (base, all) = versions::all(place).ok()?;
    let subvolume = versions::join(&base, &what.snapshot.subvolume);
    let wanted = VersionName { subvolume, ..what.snapshot.clone() };
    all.into_iter().find(|version| version.name == wanted)?.logical
}

/// Hidden unless standard error is a terminal. `about` says how many bytes will pass, if that is
/// known.
fn bar(quiet: bool, about: impl FnOnce() -> Option<u64>) -> ProgressBar {
    if quiet || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let about = about();
    let bar = ProgressBar::with_draw_target(about, ProgressDrawTarget::stderr());
    let template = match about {
        Some(_) => {
            "{spinner} {bytes} of about {total_bytes} in {elapsed}, {bytes_per_sec}, {eta} left"
        }
        None => "{spinner} {bytes} in {elapsed}, {bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
