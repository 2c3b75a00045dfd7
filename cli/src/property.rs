//! `cairn get`, `cairn set` and `cairn inherit`: properties of subvolumes and snapshots, and of
//! files and directories.
//!
//! Those of subvolumes are the pool's to keep: the daemon of a mounted pool is asked, a pool that
//! is not mounted is opened. Those of files are extended attributes; what is made in a directory
//! takes over the directory's. A path that names a subvolume means the subvolume, not the directory
//! that it appears as.

use crate::arguments::{Get, Inherit, Named, Set};
use crate::target::{ask, ask_failed};
use crate::versions::{carry_out, find, open, utc, Place};
use crate::{output, Done, Failure};
use cairn_host::admin::{Reply, Request};
use cairn_host::mounts::Mount;
use cairn_host::parse::format_size;
use cairn_host::properties::{self, PropertyInfo, Sort, Source};
use cairn_host::versions::{self, Change, VersionName};
use fs_core::units::TreeId;
use rustix::fs::{getxattr, removexattr, setxattr, XattrFlags};
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// Longest value of a property of a file.
const VALUE_BYTES_MAX: usize = 64;

/// What is shown for a property of a file that has no value of its own, and what takes it away.
const INHERITED: &str = "inherit";

/// Properties that files have.
const OF_FILES: [&str; 2] = ["compression", "checksum"];

/// What a word names.
enum Subject {
    /// A subvolume or snapshot; for those of a mounted pool, its properties.
    Version(Place, VersionName, Option<Vec<PropertyInfo>>),
    /// A file or directory of a mounted pool; with why the daemon would not say whether it is a
    /// subvolume.
    File(PathBuf, Option<Failure>),
}

/// A property and its value.
struct Row {
    /// Of what, as the user named it.
    name: String,
    property: String,
    /// `None` for a file that has none of its own.
    value: Option<String>,
    sort: Sort,
    source: Source,
}

pub(crate) fn get(arguments: &Get) -> Result<Done, Failure> {
    let (wanted, names) = wanted(&arguments.words)?;
    let mut rows = Vec::new();
    for name in names {
        match subject(name, &arguments.device)? {
            Subject::Version(place, version, known) => {
                let all = match known {
                    Some(all) => all,
                    None => of_version(&place, &version)?,
                };
                rows.extend(chosen(all, &wanted, name));
            }
            Subject::File(path, refusal) => rows.extend(of_file(&path, refusal, &wanted)?),
        }
    }
    if arguments.json {
        let all: Vec<_> = rows.iter().map(Row::json).collect();
        output::json(&serde_json::json!({ "properties": all }));
        return Ok(Done::Whole);
    }
    cairn_host::output::text(&table(&rows, arguments));
    Ok(Done::Whole)
}

pub(crate) fn set(arguments: &Set) -> Result<Done, Failure> {
    let assignment = |word: &PathBuf| crate::arguments::parse_assignment(word.to_str()?).ok();
    let more: Vec<_> = arguments.paths.iter().map_while(assignment).collect();
    let names = &arguments.paths[more.len()..];
    if names.is_empty() {
        return Err(Failure::new("cairn set needs a path behind PROPERTY=VALUE"));
    }
    let given = core::iter::once(arguments.assignment.clone()).chain(more);
    let given = given.map(|(name, value)| (name, (value != INHERITED).then_some(value)));
    change(names, &arguments.device, given.collect())
}

pub(crate) fn inherit(arguments: &Inherit) -> Result<Done, Failure> {
    change(&arguments.names, &arguments.device, vec![(arguments.property.clone(), None)])
}

fn change(
    names: &[PathBuf],
    device: &[PathBuf],
    properties: Vec<(String, Option<String>)>,
) -> Result<Done, Failure> {
    for name in names {
        match subject(name, device)? {
            Subject::Version(place, version, _) => {
                let properties = properties.clone();
                carry_out(&place, &[Change::Set { name: version, properties }])?;
            }
            Subject::File(path, refusal) => {
                let is_of_files = |name: &str| OF_FILES.contains(&name);
                let all_are = properties.iter().all(|(name, _)| is_of_files(name));
                if let Some(refusal) = refusal.filter(|_| !all_are) {
                    return Err(refusal);
                }
                for (property, value) in &properties {
                    write(&path, property, value.as_deref())?;
                }
            }
        }
    }
    Ok(Done::Whole)
}

/// The properties that are asked for, none for all, and what they are asked of.
fn wanted(words: &[PathBuf]) -> Result<(Vec<String>, &[PathBuf]), Failure> {
    let first = words[0].to_str().unwrap_or("");
    let listed: Vec<String> = first.split(',').map(String::from).collect();
    let are_properties = listed.iter().all(|name| properties::is_property(name));
    if first != "all" && !are_properties {
        return Ok((Vec::new(), words));
    }
    match &words[1..] {
        [] if words[0].exists() => Ok((Vec::new(), words)),
        [] => Err(Failure::new(format_args!("cairn get needs a name behind {first}"))),
        names => Ok((if first == "all" { Vec::new() } else { listed }, names)),
    }
}

/// Finds out what a word names.
fn subject(word: &Path, device: &[PathBuf]) -> Result<Subject, Failure> {
    let of = Named { name: word.to_path_buf(), device: device.to_vec() };
    let (place, name) = match find(&of) {
        Ok(found) => found,
        // A name in a pool that leads elsewhere, or one that is not text.
        Err(_) if is_in_a_pool(word) => return Ok(Subject::File(word.to_path_buf(), None)),
        Err(failure) => return Err(failure),
    };
    if name.bookmark.is_some() {
        let word = word.display();
        return Err(Failure::new(format_args!("{word} is a bookmark, which has no properties")));
    }
    let Place::Mounted(mount) = &place else { return Ok(Subject::Version(place, name, None)) };
    match of_mounted(mount, &name) {
        Ok(Some(all)) => Ok(Subject::Version(place, name, Some(all))),
        Ok(None) if is_in_a_pool(word) => Ok(Subject::File(word.to_path_buf(), None)),
        Ok(None) => Err(Failure::new(format_args!("{}: there is no {name}", word.display()))),
        // Whoever may not ask the daemon may still look at files.
        Err(refusal) if is_in_a_pool(word) && !name.subvolume.is_empty() => {
            Ok(Subject::File(word.to_path_buf(), Some(refusal)))
        }
        Err(failure) => Err(failure),
    }
}

fn is_in_a_pool(path: &Path) -> bool {
    let mount = cairn_host::mounts::mount_of(path).ok().flatten();
    mount.is_some_and(|(mount, _)| mount.is_cairn())
}

fn of_mounted(mount: &Mount, name: &VersionName) -> Result<Option<Vec<PropertyInfo>>, Failure> {
    match ask(mount, Request::Properties(name.clone())) {
        Ok(Reply::Properties(all)) => Ok(all),
        Ok(_) => Err(Failure::new("the daemon answered another question")),
        Err(error) => Err(ask_failed(mount, &error)),
    }
}

fn of_version(place: &Place, name: &VersionName) -> Result<Vec<PropertyInfo>, Failure> {
    let all = match place {
        Place::Mounted(mount) => of_mounted(mount, name)?,
        Place::Devices(paths) => {
            let engine = open(paths, true)?;
            versions::properties(&engine, TreeId::FIRST_SUBVOL.0, name)
        }
    };
    all.ok_or_else(|| Failure::new(format_args!("there is no {name}")))
}

/// Those of some properties that are asked for; one that is not there has no value.
fn chosen(all: Vec<PropertyInfo>, wanted: &[String], word: &Path) -> Vec<Row> {
    let row = |info: PropertyInfo| Row {
        name: word.display().to_string(),
        property: info.name,
        value: Some(info.value),
        sort: info.sort,
        source: info.source,
    };
    if wanted.is_empty() {
        return all.into_iter().map(row).collect();
    }
    let find = |name: &String| {
        all.iter().find(|info| info.name == *name).cloned().unwrap_or_else(|| PropertyInfo {
            name: name.clone(),
            value: "-".to_string(),
            sort: Sort::Text,
            source: Source::Fact,
        })
    };
    wanted.iter().map(|name| row(find(name))).collect()
}

fn of_file(path: &Path, refusal: Option<Failure>, wanted: &[String]) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    let is_of_files = |name: &String| OF_FILES.contains(&name.as_str());
    if let Some(refusal) = refusal.filter(|_| !wanted.iter().all(is_of_files)) {
        return Err(refusal);
    }
    for name in
        OF_FILES.iter().filter(|name| wanted.is_empty() || wanted.iter().any(|w| w == *name))
    {
        let value = read(path, name)?;
        let source = match value {
            Some(_) => Source::Local,
            None => Source::Default,
        };
        let name = name.to_string();
        let of = path.display().to_string();
        rows.push(Row { name: of, property: name, value, sort: Sort::Text, source });
    }
    match rows.is_empty() {
        true => Err(Failure::new(format_args!(
            "{} is a file or directory, whose properties are {}; the others are those of its \
             subvolume",
            path.display(),
            OF_FILES.join(" and ")
        ))),
        false => Ok(rows),
    }
}

impl Row {
    /// Where the value comes from, for people.
    fn source(&self) -> String {
        match &self.source {
            Source::Fact => "-".to_string(),
            Source::Default if self.value.is_none() => "subvolume".to_string(),
            Source::Default => "default".to_string(),
            Source::Local => "local".to_string(),
            Source::Inherited(from) if from.is_empty() => "inherited from /".to_string(),
            Source::Inherited(from) => format!("inherited from {from}"),
        }
    }

    fn json(&self) -> serde_json::Value {
        let (source, from) = match &self.source {
            Source::Fact => (None, None),
            Source::Default if self.value.is_none() => (Some("subvolume"), None),
            Source::Default => (Some("default"), None),
            Source::Local => (Some("local"), None),
            Source::Inherited(from) if from.is_empty() => (Some("inherited"), Some("/")),
            Source::Inherited(from) => (Some("inherited"), Some(from.as_str())),
        };
        let number = match self.sort {
            Sort::Text => None,
            Sort::Bytes | Sort::Time => self.value.as_ref().and_then(|text| text.parse().ok()),
        };
        let value = match number {
            Some(number) => serde_json::Value::Number(number),
            None => serde_json::json!(self.value),
        };
        serde_json::json!({
            "name": self.name, "property": self.property, "value": value,
            "source": source, "from": from,
        })
    }

    fn shown(&self, exact: bool) -> String {
        let Some(value) = &self.value else { return INHERITED.to_string() };
        match (self.sort, value.parse()) {
            (Sort::Bytes, Ok(bytes)) if !exact => format_size(bytes),
            (Sort::Time, Ok(seconds)) if !exact => format!("{} UTC", utc(seconds as i64)),
            _ => output::printable(value),
        }
    }
}

fn table(rows: &[Row], arguments: &Get) -> String {
    let cells = rows.iter().map(|row| {
        let (name, property) = (output::printable(&row.name), output::printable(&row.property));
        [name, property, row.shown(arguments.exact), output::printable(&row.source())]
    });
    if arguments.no_heading {
        return cells.map(|cells| cells.join("\t") + "\n").collect();
    }
    let heading = ["NAME", "PROPERTY", "VALUE", "SOURCE"].map(String::from);
    let lines: Vec<[String; 4]> = core::iter::once(heading).chain(cells).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let [a, b, c] = [0, 1, 2].map(|column| width(column).unwrap_or(0));
    let line = |[name, property, value, source]: &[String; 4]| {
        format!("{name:<a$}  {property:<b$}  {value:<c$}  {source}\n")
    };
    lines.iter().map(line).collect()
}

fn attribute(property: &str) -> String {
    format!("cairn.{property}")
}

fn read(path: &Path, property: &str) -> Result<Option<String>, Failure> {
    let mut value = [0; VALUE_BYTES_MAX];
    match getxattr(path, attribute(property), &mut value) {
        Ok(len) => Ok(Some(String::from_utf8_lossy(&value[..len]).into_owned())),
        Err(Errno::NODATA) => Ok(None),
        Err(error) => Err(failed(path, property, error)),
    }
}

fn write(path: &Path, property: &str, value: Option<&str>) -> Result<(), Failure> {
    let shown = path.display();
    if !OF_FILES.contains(&property) {
        return Err(Failure::new(format_args!(
            "{shown} is a file or directory, not a subvolume: it has no {property} of its own"
        )));
    }
    let outcome = match value {
        None => match removexattr(path, attribute(property)) {
            Err(Errno::NODATA) => Ok(()),
            outcome => outcome,
        },
        Some(value) => setxattr(path, attribute(property), value.as_bytes(), XattrFlags::empty()),
    };
    outcome.map_err(|error| match error {
        Errno::INVAL => Failure::new(format_args!(
            "{shown}: {property} cannot be {:?}; see cairn set --help for its values",
            value.unwrap_or(INHERITED)
        )),
        error => failed(path, property, error),
    })
}

fn failed(path: &Path, property: &str, error: Errno) -> Failure {
    let path = path.display();
    match error {
        Errno::OPNOTSUPP => Failure::new(format_args!("{path} is not on a mounted cairn pool")),
        error => Failure::new(format_args!("{path}: {property}: {error}")),
    }
}
