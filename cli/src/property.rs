//! `cairn get` and `cairn set`: how new data of files is stored.
//!
//! Properties are extended attributes of files and directories; what is made in a directory takes
//! over the directory's.

use crate::arguments::{parse_assignment, Get, Property, Set};
use crate::{output, Done, Failure};
use cairn_host::say;
use rustix::fs::{getxattr, removexattr, setxattr, XattrFlags};
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// Longest value of a property.
const VALUE_BYTES_MAX: usize = 64;

/// What is shown for a property that has no value of its own.
const INHERITED: &str = "inherit";

impl Property {
    fn name(self) -> &'static str {
        match self {
            Property::Compression => "compression",
            Property::Checksum => "checksum",
        }
    }

    fn attribute(self) -> String {
        format!("cairn.{}", self.name())
    }
}

pub(crate) fn get(arguments: &Get) -> Result<Done, Failure> {
    let wanted = match arguments.property {
        Some(one) => vec![one],
        None => vec![Property::Compression, Property::Checksum],
    };
    let mut found = Vec::new();
    for path in &arguments.paths {
        for property in &wanted {
            let value = read(path, *property)?;
            let shown = value.as_deref().unwrap_or(INHERITED);
            if !arguments.json {
                say!("{}\t{}\t{shown}", path.display(), property.name());
            }
            found.push(serde_json::json!({
                "path": path, "property": property.name(), "value": value,
            }));
        }
    }
    if arguments.json {
        output::json(&serde_json::json!({ "properties": found }));
    }
    Ok(Done::Whole)
}

pub(crate) fn set(arguments: &Set) -> Result<Done, Failure> {
    let assignment = |word: &PathBuf| parse_assignment(word.to_str()?).ok();
    let more: Vec<_> = arguments.paths.iter().map_while(assignment).collect();
    let paths = &arguments.paths[more.len()..];
    if paths.is_empty() {
        return Err(Failure::new("cairn set needs a path behind PROPERTY=VALUE"));
    }
    for path in paths {
        for (property, value) in core::iter::once(&arguments.assignment).chain(&more) {
            write(path, *property, value)?;
        }
    }
    Ok(Done::Whole)
}

fn read(path: &Path, property: Property) -> Result<Option<String>, Failure> {
    let mut value = [0; VALUE_BYTES_MAX];
    match getxattr(path, property.attribute(), &mut value) {
        Ok(len) => Ok(Some(String::from_utf8_lossy(&value[..len]).into_owned())),
        Err(Errno::NODATA) => Ok(None),
        Err(error) => Err(failed(path, property, error)),
    }
}

fn write(path: &Path, property: Property, value: &str) -> Result<(), Failure> {
    let outcome = if value == INHERITED {
        match removexattr(path, property.attribute()) {
            Err(Errno::NODATA) => Ok(()),
            outcome => outcome,
        }
    } else {
        setxattr(path, property.attribute(), value.as_bytes(), XattrFlags::empty())
    };
    outcome.map_err(|error| match error {
        Errno::INVAL => Failure::new(format_args!(
            "{}: {} cannot be {value:?}; see cairn set --help for its values",
            path.display(),
            property.name()
        )),
        error => failed(path, property, error),
    })
}

fn failed(path: &Path, property: Property, error: Errno) -> Failure {
    let path = path.display();
    match error {
        Errno::OPNOTSUPP => Failure::new(format_args!("{path} is not on a mounted cairn pool")),
        error => Failure::new(format_args!("{path}: {}: {error}", property.name())),
    }
}
