//! `cairn subvolume` and `cairn snapshot`.
//!
//! The daemon of a mounted pool is asked; a pool that is not mounted is opened for as long as it
//! takes. Both do the same, by `cairn_host::versions`.

use crate::arguments::{ListVersions, Named, Shown, Snapshot, Subvolume};
use crate::target::{ask, ask_failed, daemon_gone, Target};
use crate::{output, Done, Failure};
use cairn_host::admin::{self, Parts, Reply, Request};
use cairn_host::mounts::{self, Mount};
use cairn_host::parse::format_size;
use cairn_host::say;
use cairn_host::versions::{
    self, Change, Differences, Differing, Happened, VersionInfo, VersionName,
};
use cairn_host::{host_platform, members, open_devices, source, Access, OpenOptions, Wait};
use fs_core::engine::{self, Engine};
use fs_core::platform::DeviceRef;
use fs_core::units::TreeId;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a command waits for a device that is busy.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn subvolume(command: &Subvolume) -> Result<Done, Failure> {
    match command {
        Subvolume::Create(of) => {
            let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
            let (uid, gid) = (uid.as_raw(), gid.as_raw());
            change(of, |name| Ok(Change::Create { name: whole(name)?, mode: 0o755, uid, gid }))
        }
        Subvolume::List(arguments) => list(arguments, false),
        Subvolume::Show(of) => show(of),
        Subvolume::Rename { of, new } => {
            let (place, name, base) = find_from(&of.at)?;
            let changed = Change::Rename {
                name: whole(name.clone())?,
                new: new_name(&place, base.as_deref(), new)?.to_string(),
            };
            carry_out(&place, &[changed]).map_err(|failure| hint(failure, &of.at, &place, new))?;
            say(of, &name);
            Ok(Done::Whole)
        }
        Subvolume::SetDefault(of) => {
            change(of, |name| Ok(Change::SetDefault { name: whole(name)? }))
        }
        Subvolume::Limit { of, referenced, own } => change(of, |name| {
            Ok(Change::Limit { name: whole(name)?, referenced: *referenced, own: *own })
        }),
        Subvolume::Delete { of, recursive } => {
            change(of, |name| Ok(Change::Delete { name: whole(name)?, recursive: *recursive }))
        }
    }
}

pub(crate) fn snapshot(command: &Snapshot) -> Result<Done, Failure> {
    match command {
        Snapshot::Create { of, recursive, writable } => {
            let (place, name, base) = find_from(&of.at)?;
            let name = part(name)?;
            let mut changes = vec![Change::Snapshot { name: name.clone(), recursive: *recursive }];
            if let Some(new) = writable {
                let new = new_name(&place, base.as_deref(), new)?;
                changes.push(Change::Clone { snapshot: name.clone(), name: new });
            }
            let new = writable.as_deref().unwrap_or_default();
            carry_out(&place, &changes).map_err(|failure| hint(failure, &of.at, &place, new))?;
            say(of, &name);
            Ok(Done::Whole)
        }
        Snapshot::List(arguments) => list(arguments, true),
        Snapshot::Show(of) => show(of),
        Snapshot::Delete { of, recursive } => change(of, |name| {
            let name = if name.bookmark.is_some() { name } else { part(name)? };
            Ok(Change::Delete { name, recursive: *recursive })
        }),
        Snapshot::Rename { of, new } => {
            // With the same words before it, whatever pool they name, it is of the same subvolume.
            let words = of.at.name.to_str().and_then(|text| text.rsplit_once('@'));
            let same = words.and_then(|(before, _)| new.strip_prefix(before)?.strip_prefix('@'));
            let new = same.unwrap_or(new).to_string();
            change(of, |name| Ok(Change::Rename { name: part(name)?, new }))
        }
        Snapshot::Rollback { of, keep } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now = format!("before-{}.{:03}", now.as_secs(), now.subsec_millis());
            let keep = keep.clone().unwrap_or(now);
            change(of, |name| Ok(Change::Rollback { snapshot: part(name)?, keep }))
        }
        Snapshot::Clone { of, new } => {
            let (place, name, base) = find_from(&of.at)?;
            let snapshot = part(name.clone())?;
            let cloned = Change::Clone { snapshot, name: new_name(&place, base.as_deref(), new)? };
            carry_out(&place, &[cloned]).map_err(|failure| hint(failure, &of.at, &place, new))?;
            say(of, &name);
            Ok(Done::Whole)
        }
        Snapshot::Hold { of, tag } => {
            change(of, |name| Ok(Change::Hold { name: part(name)?, tag: tag.clone() }))
        }
        Snapshot::Release { of, tag } => {
            change(of, |name| Ok(Change::Release { name: part(name)?, tag: tag.clone() }))
        }
        Snapshot::Diff { of, later } => diff(of, later.as_deref()),
        Snapshot::Bookmark { of, bookmark } => change(of, |name| {
            Ok(Change::Bookmark { name: part(name)?, bookmark: bookmark.clone() })
        }),
    }
}

/// The name of a subvolume, not of a snapshot.
pub(crate) fn whole(name: VersionName) -> Result<VersionName, Failure> {
    match name.snapshot.is_none() && name.bookmark.is_none() {
        true => Ok(name),
        false => Err(Failure::new(format_args!("{name} is not the name of a subvolume"))),
    }
}

/// The name of a snapshot.
pub(crate) fn part(name: VersionName) -> Result<VersionName, Failure> {
    match name.snapshot.is_some() {
        true => Ok(name),
        false => Err(Failure::new(format_args!(
            "{name} is not the name of a snapshot, which is SUBVOLUME@SNAPSHOT"
        ))),
    }
}

/// Where what a user named is.
pub(crate) enum Place {
    /// On a mount; names begin at the subvolume that is mounted.
    Mounted(Mount),
    /// On devices that are not mounted; names begin at the root subvolume.
    Devices(Vec<PathBuf>),
}

impl Place {
    /// Whether two places are one.
    pub(crate) fn is(&self, other: &Place) -> bool {
        match (self, other) {
            (Place::Mounted(one), Place::Mounted(other)) => one.device == other.device,
            (Place::Devices(one), Place::Devices(other)) => one == other,
            _ => false,
        }
    }
}

/// Where a name may be cut: what is before names the pool, what is behind is in the pool. The
/// longest first.
fn cuts(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let marks = text.char_indices().rev().filter(|(_, c)| matches!(c, '/' | '@' | '#'));
    let inner = marks.map(move |(at, c)| match (at, c) {
        (0, '/') => ("/", text),
        (0, _) => (".", text),
        (at, _) => text.split_at(at),
    });
    let here = (!text.starts_with('/')).then_some((".", text));
    std::iter::once((text, "")).chain(inner).chain(here)
}

/// Finds out what a name names.
pub(crate) fn find(of: &Named) -> Result<(Place, VersionName), Failure> {
    find_from(of).map(|(place, name, _)| (place, name))
}

/// As [`find`]. For a mounted pool that was named by a device comes the name of the subvolume that
/// is mounted: the user's names begin at the root subvolume, those of the result at that one.
fn find_from(of: &Named) -> Result<(Place, VersionName, Option<String>), Failure> {
    let shown = of.name.display();
    let text = of.name.to_str();
    let text = text.ok_or_else(|| Failure::new(format_args!("{shown}: names are UTF-8")))?;
    for (pool, rest) in cuts(text) {
        let path = Path::new(pool);
        let kind = match std::fs::metadata(path) {
            Ok(kind) => kind,
            Err(error) => match daemon_gone(path, &error) {
                Some(failure) => return Err(failure),
                None => continue,
            },
        };
        if leads_out_of_a_pool(path) {
            continue;
        }
        if !kind.is_dir() && is_file_in_a_pool(path) {
            // Not a device: what is in its directory is meant.
            continue;
        }
        if !kind.is_dir() {
            return on_devices(std::iter::once(path.to_path_buf()), of, rest);
        }
        match mounts::mount_of(path) {
            Ok(Some((mount, place))) if mount.is_cairn() => {
                let rest = rest.trim_start_matches('/');
                let is_below = !rest.is_empty() && !rest.starts_with(['@', '#']);
                let name = match place.to_str() {
                    Some(place) if is_below => format!("{place}/{rest}"),
                    Some(place) => format!("{place}{rest}"),
                    None => continue,
                };
                return Ok((Place::Mounted(mount), VersionName::parse(&name), None));
            }
            _ => continue,
        }
    }
    // No path: maybe the label of a pool.
    let end = text.find(['/', '@', '#']).unwrap_or(text.len());
    let sources = [PathBuf::from(&text[..end])];
    match source::resolve_all(&sources).map_err(Failure::new)? {
        devices if devices != sources => on_devices(devices.into_iter(), of, &text[end..]),
        _ => Err(Failure::new(format_args!(
            "{shown}: no mounted pool, device, image file or label of a pool begins like that"
        ))),
    }
}

/// Whether a path names a file in a mounted pool that is not an image of another pool.
fn is_file_in_a_pool(path: &Path) -> bool {
    let mount = mounts::mount_of(path).ok().flatten();
    mount.is_some_and(|(mount, _)| mount.is_cairn()) && members::read_label(path).is_none()
}

/// What a name names in the pool on some devices.
fn on_devices(
    devices: impl Iterator<Item = PathBuf>,
    of: &Named,
    rest: &str,
) -> Result<(Place, VersionName, Option<String>), Failure> {
    let paths: Vec<PathBuf> = devices.chain(of.device.iter().cloned()).collect();
    let name = VersionName::parse(rest);
    Ok(match Target::find(&paths)? {
        Target::Mounted(mount) => {
            let base = mounted_subvolume(&mount)?;
            let name = from_mounted(&mount, &base, name)?;
            (Place::Mounted(mount), name, Some(base))
        }
        Target::Devices(paths) => (Place::Devices(paths), name, None),
    })
}

/// Whether a path goes through a symlink that is in a mounted pool. Names in a pool are names of
/// subvolumes; what somebody put there must not lead a command elsewhere.
fn leads_out_of_a_pool(path: &Path) -> bool {
    let is_in_pool = |above: &Path| {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        mounts::mount_of(above).is_ok_and(|found| found.is_some_and(|(mount, _)| mount.is_cairn()))
    };
    path.ancestors().any(|part| {
        let is_symlink = std::fs::symlink_metadata(part).is_ok_and(|kind| kind.is_symlink());
        is_symlink && part.parent().is_some_and(is_in_pool)
    })
}

/// The name of the subvolume that is mounted.
fn mounted_subvolume(mount: &Mount) -> Result<String, Failure> {
    match ask(mount, Request::Versions(0)) {
        Ok(Reply::Versions { base, .. }) => Ok(base),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

/// A name from the root subvolume on, as the daemon takes it: from the one that is mounted.
fn from_mounted(mount: &Mount, base: &str, name: VersionName) -> Result<VersionName, Failure> {
    relative(base, name).map_err(|name| {
        let at = mount.mount_point.display();
        Failure::new(format_args!(
            "{name} is not in {base}, which is what is mounted on {at}: mount what it is in"
        ))
    })
}

/// A name that a user gives to something new, from where [`find_from`] has names begin.
fn new_name(place: &Place, base: Option<&str>, new: &str) -> Result<VersionName, Failure> {
    let name = VersionName::parse(new);
    match (place, base) {
        (Place::Mounted(mount), Some(base)) => from_mounted(mount, base, name),
        _ => Ok(name),
    }
}

/// Adds what a new name looks like, where the one that did not do begins with the pool, as the name
/// of something that is there does.
fn hint(failure: Failure, of: &Named, place: &Place, new: &str) -> Failure {
    let words = of.name.to_str().unwrap_or_default();
    let mut paths = cuts(words).map(|(pool, _)| pool);
    let is_at = |path: &str, place: &Path| Path::new(path).canonicalize().is_ok_and(|p| p == place);
    let (at, path) = match place {
        Place::Mounted(Mount { mount_point, .. }) => {
            (Some(mount_point), paths.find(|path| is_at(path, mount_point)))
        }
        Place::Devices(_) => (None, paths.find(|path| Path::new(path).exists())),
    };
    // Without a path it is a label.
    let pool = path.or_else(|| words.split(['/', '@', '#']).next());
    let by_words = pool.and_then(|pool| new.strip_prefix(pool)?.strip_prefix('/'));
    let within = by_words.or_else(|| Path::new(new).strip_prefix(at?).ok()?.to_str());
    match within.filter(|name| !name.is_empty()) {
        Some(name) => Failure::new(format_args!(
            "{failure} (a new name is given without the pool: {name}, not {new})"
        )),
        None => failure,
    }
}

/// A name from the root subvolume on, from another one on; itself when it is not in that.
fn relative(base: &str, name: VersionName) -> Result<VersionName, VersionName> {
    if !is_below(&name.subvolume, base) {
        return Err(name);
    }
    let subvolume = name.subvolume[base.len()..].trim_start_matches('/').to_string();
    Ok(VersionName { subvolume, ..name })
}

/// Opens the pool on devices that are not mounted.
pub(crate) fn open(paths: &[PathBuf], read_only: bool) -> Result<Arc<Engine>, Failure> {
    open_with(paths, engine::OpenOptions { read_only, ..engine::OpenOptions::default() })
}

/// Opens the pool on devices that are not mounted to read of it: for writing where that can be, so
/// that what was found out about a snapshot is kept.
pub(crate) fn open_to_read(paths: &[PathBuf]) -> Result<Arc<Engine>, Failure> {
    let is_writable =
        |path: &PathBuf| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
    open(paths, !paths.iter().all(is_writable))
}

/// Opens a pool for writing, without devices that are missing if `degraded` says so.
pub(crate) fn open_degraded(paths: &[PathBuf], degraded: bool) -> Result<Arc<Engine>, Failure> {
    open_with(paths, engine::OpenOptions { degraded, ..engine::OpenOptions::default() })
}

fn open_with(paths: &[PathBuf], options: engine::OpenOptions) -> Result<Arc<Engine>, Failure> {
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let wait = Wait { bound: PATIENCE, announce: &|message| eprintln!("cairn: {message}") };
    let all = members::complete(paths);
    let devices = open_devices(&all, OpenOptions::new(access), &wait).map_err(Failure::new)?;
    let devices = devices.into_iter().map(|device| device as DeviceRef).collect();
    engine::open(devices, host_platform(), &options).map_err(|error| named(paths, &error))
}

pub(crate) fn named(paths: &[PathBuf], error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format_args!("{}: {error}", paths[0].display()))
}

fn change(
    of: &Shown,
    to: impl FnOnce(VersionName) -> Result<Change, Failure>,
) -> Result<Done, Failure> {
    let (place, name) = find(&of.at)?;
    carry_out(&place, &[to(name.clone())?])?;
    say(of, &name);
    Ok(Done::Whole)
}

/// Says what was done to, where somebody wants to read it.
fn say(of: &Shown, name: &VersionName) {
    if of.json {
        output::json(&serde_json::json!({ "done": name.to_string() }));
    }
}

/// Carries changes out one after the other.
pub(crate) fn carry_out(place: &Place, changes: &[Change]) -> Result<(), Failure> {
    let paths = match place {
        Place::Mounted(mount) => {
            return changes.iter().try_for_each(|change| carry_out_mounted(mount, change));
        }
        Place::Devices(paths) => paths,
    };
    let engine = open(paths, false)?;
    let base = TreeId::FIRST_SUBVOL.0;
    let changed = changes.iter().try_for_each(|change| {
        versions::carry_out(&engine, versions::plan(&engine, base, change)?, change)
    });
    if changed.is_ok() {
        // What was deleted is taken apart at once; what cannot be now is when the pool is mounted.
        let _ = engine.destroy_all();
    }
    let closed = engine.close().map_err(|error| named(paths, &error));
    changed.map_err(|error| named(paths, &error))?;
    closed
}

/// What programs wrote may still be with the kernel: it hands it on.
pub(crate) fn flush(mount: &Mount) -> Result<(), Failure> {
    let path = &mount.mount_point;
    let flush = || File::open(path).and_then(|root| Ok(rustix::fs::syncfs(&root)?));
    // The first may tell of what was refused before; that is whoever wrote it to hear.
    flush().or_else(|_| flush()).map_err(|error| {
        let failed = || Failure::new(format_args!("{}: {error}", path.display()));
        daemon_gone(path, &error).unwrap_or_else(failed)
    })
}

fn carry_out_mounted(mount: &Mount, change: &Change) -> Result<(), Failure> {
    if let Change::Snapshot { .. } = change {
        return carry_out_at_sync(mount, change);
    }
    let is_last = match change {
        Change::Rollback { .. } => true,
        // What it comes below may be read-only.
        Change::Rename { .. } => true,
        Change::Set { properties, .. } => properties.iter().any(|(name, _)| name == "readonly"),
        _ => false,
    };
    // What was written before belongs to before.
    if is_last {
        flush(mount)?;
    }
    match ask(mount, Request::Change(change.clone())) {
        Ok(Reply::Changed) => Ok(()),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

/// The change comes with the sync in which the kernel hands on what programs wrote before.
fn carry_out_at_sync(mount: &Mount, change: &Change) -> Result<(), Failure> {
    let mut flushed = Ok(());
    let request = Request::ChangeAtSync(change.clone());
    let mut talk = |parts: &mut Parts<'_>| parts.when_ready(|| flushed = flush(mount));
    let reply = admin::converse(mount.device, request, &mut talk);
    match reply {
        Ok(Reply::Changed) => flushed,
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

/// All versions of a pool, with the name of the subvolume that names begin at.
pub(crate) fn all(place: &Place) -> Result<(String, Vec<VersionInfo>), Failure> {
    let mount = match place {
        Place::Mounted(mount) => mount,
        Place::Devices(paths) => {
            let engine = open(paths, true)?;
            return Ok((String::new(), versions::list(&engine)));
        }
    };
    let mut all = Vec::new();
    loop {
        match ask(mount, Request::Versions(all.len() as u64)) {
            Ok(Reply::Versions { base, next }) if next.is_empty() => return Ok((base, all)),
            Ok(Reply::Versions { next, .. }) => all.extend(next),
            Ok(_) => return Err(Failure::new("the daemon answered another question")),
            Err(error) => return Err(ask_failed(mount, &error)),
        }
    }
}

/// Shows what changed, in the order of inodes.
fn diff(of: &Shown, later: Option<&str>) -> Result<Done, Failure> {
    let (place, old) = find(&of.at)?;
    let old = part(old)?;
    let snapshot = later.map(|name| name.rsplit('@').next().unwrap_or(name).to_string());
    let new = VersionName { snapshot, ..old.clone() };
    let mut all = Vec::new();
    let mut show = |found: Differences| {
        match of.json {
            true => all.extend(found.all),
            false => found.all.iter().for_each(|change| say!("{}", line(change))),
        }
        found.next
    };
    let mut next = Some(0);
    match &place {
        Place::Mounted(mount) => {
            while let Some(first) = next {
                let (old, new) = (old.clone(), new.clone());
                next = match ask(mount, Request::Differences { old, new, first }) {
                    Ok(Reply::Differences(found)) => show(found),
                    Ok(_) => return Err(Failure::new("the daemon answered another question")),
                    Err(error) => return Err(ask_failed(mount, &error)),
                };
            }
        }
        Place::Devices(paths) => {
            let engine = open(paths, true)?;
            let base = TreeId::FIRST_SUBVOL.0;
            while let Some(first) = next {
                let found = versions::differences(&engine, base, (&old, &new), first);
                next = show(found.map_err(|error| named(paths, &error))?);
            }
        }
    }
    if of.json {
        output::json(&all);
    }
    Ok(Done::Whole)
}

fn line(change: &Differing) -> String {
    let sign = match change.what {
        Happened::Created => '+',
        Happened::Removed => '-',
        Happened::Renamed => 'R',
        Happened::Modified => 'M',
        Happened::Attributes => 'A',
    };
    let path = output::printable(&change.path);
    match &change.from {
        Some(from) => format!("{sign}  {} -> {path}", output::printable(from)),
        None => format!("{sign}  {path}"),
    }
}

pub(crate) fn join(base: &str, name: &str) -> String {
    match (base, name) {
        ("", name) | (name, "") => name.to_string(),
        (base, name) => format!("{base}/{name}"),
    }
}

fn is_below(name: &str, above: &str) -> bool {
    let rest = name.strip_prefix(above);
    above.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn list(arguments: &ListVersions, parts: bool) -> Result<Done, Failure> {
    let (place, name) = find(&arguments.of.at)?;
    let name = whole(name)?;
    let (base, all) = all(&place)?;
    let above = join(&base, &name.subvolume);
    if !all.iter().any(|version| version.name.subvolume == above) {
        return Err(Failure::new(format_args!("there is no subvolume {above}")));
    }
    let is_part = |v: &VersionInfo| v.name.snapshot.is_some() || v.name.bookmark.is_some();
    let shown: Vec<&VersionInfo> =
        all.iter().filter(|v| is_part(v) == parts && is_below(&v.name.subvolume, &above)).collect();
    if arguments.of.json {
        output::json(&shown);
    } else {
        cairn_host::output::text(&table(&shown, arguments));
    }
    Ok(Done::Whole)
}

fn show(of: &Shown) -> Result<Done, Failure> {
    let (place, name) = find(&of.at)?;
    let (base, all) = all(&place)?;
    let wanted = VersionName { subvolume: join(&base, &name.subvolume), ..name };
    let found = all.iter().find(|version| version.name == wanted);
    let found = found.ok_or_else(|| Failure::new(format_args!("there is no {wanted}")))?;
    if of.json {
        output::json(found);
        return Ok(Done::Whole);
    }
    let size =
        |bytes: Option<u64>| bytes.map(|bytes| format!("{} ({bytes} bytes)", format_size(bytes)));
    let lines = [
        ("name", Some(found.name.to_string())),
        ("number", Some(found.number.to_string())),
        ("id", Some(found.id.clone())),
        ("created", (found.created != 0).then(|| format!("{} UTC", utc(found.created)))),
        ("group", (found.txg != 0).then(|| found.txg.to_string())),
        ("goes on from", found.parent.as_ref().map(VersionName::to_string)),
        ("referenced", size(found.referenced)),
        ("unique", size(found.unique)),
        ("logical", size(found.logical)),
        ("may refer to", size(found.limit_referenced)),
        ("may have own", size(found.limit_own)),
        ("inodes", (found.inodes != 0).then(|| found.inodes.to_string())),
        ("default", found.is_default.then(|| "yes".to_string())),
        ("receiving", found.is_receiving.then(|| "yes, nobody can look into it".to_string())),
        ("go on with", found.token.clone()),
        ("held by", (!found.holds.is_empty()).then(|| found.holds.join(", "))),
    ];
    for (label, value) in lines.into_iter().filter_map(|(label, v)| Some((label, v?))) {
        say!("{label:<14}{}", output::printable(&value));
    }
    Ok(Done::Whole)
}

/// A table: columns of numbers to the right.
fn table(shown: &[&VersionInfo], arguments: &ListVersions) -> String {
    let exact = arguments.exact;
    let size = |bytes: Option<u64>| match bytes {
        None => "-".to_string(),
        Some(bytes) if exact => bytes.to_string(),
        Some(bytes) => format_size(bytes),
    };
    let time = |seconds: i64| match seconds {
        0 => "-".to_string(),
        seconds if exact => seconds.to_string(),
        seconds => utc(seconds),
    };
    let heading = ["UNIQUE", "REFERS", "LOGICAL", "CREATED", "NAME"].map(String::from);
    let row = |version: &&VersionInfo| {
        let mut name = output::printable(&version.name.to_string());
        if version.is_default && !exact {
            name.push_str(" (default)");
        }
        if version.is_receiving && !exact {
            name.push_str(" (receiving)");
        }
        if !version.holds.is_empty() && !exact {
            name.push_str(" (held)");
        }
        [
            size(version.unique),
            size(version.referenced),
            size(version.logical),
            time(version.created),
            name,
        ]
    };
    let heading = (!arguments.no_heading).then_some(heading);
    let rows: Vec<[String; 5]> = heading.into_iter().chain(shown.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    let line = |[unique, refers, logical, created, name]: &[String; 5]| {
        let [a, b, c, d] = widths;
        format!("{unique:>a$}  {refers:>b$}  {logical:>c$}  {created:<d$}  {name}\n")
    };
    rows.iter().map(line).collect()
}

/// Seconds since 1970 as a time in UTC, such as `2026-01-31 23:59:59`.
pub(crate) fn utc(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    // Years begin in March, so that a leap day is the last of its year: see Hinnant's
    // "chrono-compatible low-level date algorithms".
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_where_the_pool_may_end_the_longest_first() {
        let all: Vec<_> = cuts("/mnt/home@monday").collect();
        assert_eq!(
            all,
            [
                ("/mnt/home@monday", ""),
                ("/mnt/home", "@monday"),
                ("/mnt", "/home@monday"),
                ("/", "/mnt/home@monday"),
            ]
        );
        assert_eq!(cuts("@now").collect::<Vec<_>>()[1..], [(".", "@now"), (".", "@now")]);
        assert_eq!(cuts("home").collect::<Vec<_>>(), [("home", ""), (".", "home")]);
    }

    #[test]
    fn names_from_the_root_are_turned_into_those_of_a_mount_or_refused() {
        let relative = |base, name| {
            let name = relative(base, VersionName::parse(name));
            name.map(|name| name.to_string()).map_err(|name| name.to_string())
        };
        assert_eq!(relative("", "home/alice@one"), Ok("home/alice@one".into()));
        assert_eq!(relative("home", "home/alice@one"), Ok("alice@one".into()));
        assert_eq!(relative("home", "home@one"), Ok("@one".into()));
        assert_eq!(relative("home", "homes"), Err("homes".into()));
        assert_eq!(relative("home", "@one"), Err("@one".into()));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
            (-1, "1969-12-31 23:59:59"),
        ] {
            assert_eq!(utc(seconds), shown);
        }
    }

    #[test]
    fn what_is_below_a_subvolume_begins_with_its_whole_name() {
        assert!(is_below("home/alice", "home") && is_below("home", "home") && is_below("x", ""));
        assert!(!is_below("homes", "home") && !is_below("home", "home/alice"));
    }
}
