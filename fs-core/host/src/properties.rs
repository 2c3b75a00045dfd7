//! Properties of subvolumes and snapshots: their names and values as users write them, and where a
//! value comes from.
//!
//! | name | values |
//! | --- | --- |
//! | `compression` | `none`, `zstd`, `zstd:LEVEL` |
//! | `checksum` | `none`, `crc32c`, `blake3` |
//! | `atime` | `off`, `relative`, `on` |
//! | `readonly` | `off`, `on` |
//! | `referenced-limit`, `own-limit` | a size, or `none` |
//! | `MODULE:NAME` | any text |
//!
//! What a subvolume does not choose itself it inherits: from the subvolume that it is in, or the
//! next above that chooses, and in the end from the pool. Limits are not inherited.

use crate::parse::parse_size;
use fs_core::engine::versions::{PropertyChange, VersionOp};
use fs_core::engine::Engine;
use fs_core::format::pool::{check_user_name, Settings};
use fs_core::format::ptr::{ChecksumKind, CompressionKind};
use fs_core::subvol::versions::{Version, Versions};
use fs_core::vfs::property;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It is a fact that nobody chose.
    Fact,
    /// Nobody chose: it is what the pool has.
    Default,
    /// It was chosen here.
    Local,
    /// It was chosen for a subvolume above; the root subvolume's name is empty.
    Inherited(String),
}

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sort {
    /// Text.
    Text,
    /// A number of bytes.
    Bytes,
    /// Seconds since 1970.
    Time,
}

/// A property of a subvolume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PropertyInfo {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// What that is.
    pub sort: Sort,
    /// Where that comes from.
    pub source: Source,
}

/// Properties that can be set, besides those of users.
pub const SETTABLE: [&str; 6] =
    ["compression", "checksum", "atime", "readonly", "referenced-limit", "own-limit"];
/// Properties that are facts.
pub const FACTS: [&str; 5] = ["type", "created", "referenced", "unique", "logical"];

/// Whether a property of that name can be set.
pub fn is_settable(name: &str) -> bool {
    SETTABLE.contains(&name) || check_user_name(name.as_bytes()).is_ok()
}

/// Whether there may be a property of that name.
pub fn is_property(name: &str) -> bool {
    FACTS.contains(&name) || is_settable(name)
}

fn cannot_be(name: &str, value: &str, values: &str) -> String {
    format!("{name} cannot be {value:?}, but {values}")
}

fn limit(name: &str, value: Option<&str>) -> Result<u64, String> {
    match value {
        None | Some("none") => Ok(0),
        Some(value) => match parse_size(value) {
            Ok(bytes) if bytes > 0 => Ok(bytes),
            _ => Err(cannot_be(name, value, "a size of at least a byte, or none")),
        },
    }
}

/// The place of a value in a list, counted from one; zero for none.
fn among(name: &str, value: Option<&str>, values: &[&str]) -> Result<u8, String> {
    let Some(value) = value else { return Ok(0) };
    let at = values.iter().position(|other| *other == value);
    at.map(|at| at as u8 + 1).ok_or_else(|| cannot_be(name, value, &values.join(" or ")))
}

const ATIME: [&str; 3] = ["off", "relative", "on"];
const READONLY: [&str; 2] = ["off", "on"];

fn change(name: &str, value: Option<&str>) -> Result<PropertyChange, String> {
    Ok(match (name, value) {
        ("compression", None) => PropertyChange::Compression(0, 0),
        ("compression", Some(value)) => {
            let (kind, level) = property::parse_compression(value.as_bytes()).map_err(|_| {
                cannot_be(name, value, "none, zstd or zstd:LEVEL with a level from -7 to 19")
            })?;
            PropertyChange::Compression(kind as u8 + 1, level)
        }
        ("checksum", value) => {
            let values = ["none", "crc32c", "blake3"];
            PropertyChange::Checksum(among(name, value, &values)?)
        }
        ("atime", value) => PropertyChange::AccessTime(among(name, value, &ATIME)?),
        ("readonly", value) => PropertyChange::ReadOnly(among(name, value, &READONLY)?),
        (name, value) => {
            if FACTS.contains(&name) {
                return Err(format!("{name} is a fact: it cannot be set"));
            }
            if check_user_name(name.as_bytes()).is_err() {
                return Err(format!(
                    "{name:?} is no property; there are {}, and MODULE:NAME of your own, of small \
                     letters, digits and :+._-",
                    SETTABLE.join(", ")
                ));
            }
            PropertyChange::User(name.into(), value.map(|value| value.as_bytes().to_vec()))
        }
    })
}

/// What setting some properties of a version comes to; `None` takes a choice away.
pub(crate) fn plan(
    versions: &Versions,
    id: u64,
    wanted: &[(String, Option<String>)],
) -> Result<Vec<VersionOp>, String> {
    let item = versions.get(id).map(|version| &version.item);
    let old = item.map_or((0, 0), |item| (item.limit_referenced, item.limit_own));
    let (mut limits, mut changes) = (old, Vec::new());
    for (name, value) in wanted {
        match name.as_str() {
            "referenced-limit" => limits.0 = limit(name, value.as_deref())?,
            "own-limit" => limits.1 = limit(name, value.as_deref())?,
            _ => changes.push(change(name, value.as_deref())?),
        }
    }
    let mut ops = Vec::new();
    if !changes.is_empty() {
        ops.push(VersionOp::SetProperties { id, changes });
    }
    if limits != old {
        let (referenced, own) = limits;
        ops.push(VersionOp::SetLimits { subvolume: id, referenced, own });
    }
    Ok(ops)
}

/// Names and values of what was chosen for a version itself, but for limits: what a stream tells.
pub(crate) fn chosen(versions: &Versions, id: u64) -> Vec<(String, String)> {
    let Some(version) = versions.get(id) else { return Vec::new() };
    let settings = version.item.settings();
    let read_only = named(settings.read_only, &READONLY).filter(|_| !version.item.is_snapshot());
    let all = [
        ("compression", compression(settings)),
        ("checksum", checksum(settings)),
        ("atime", named(settings.access_time, &ATIME)),
        ("readonly", read_only),
    ];
    let all = all.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?)));
    let user = version.user.iter().map(|(name, value)| (text(name), text(value)));
    all.chain(user).collect()
}

/// The choice that a stream tells; none if this version does not know of it, or it is no choice.
///
/// # Errors
/// One sentence, when it is known and cannot have that value.
pub(crate) fn told(name: &str, value: &str) -> Result<Option<PropertyChange>, String> {
    match is_settable(name) && !name.ends_with("-limit") {
        true => change(name, Some(value)).map(Some),
        false => Ok(None),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A value of a version or of what is above, and where it is from.
fn inherited<T>(
    versions: &Versions,
    id: u64,
    choice: impl Fn(&Version) -> Option<T>,
) -> Option<(T, Source)> {
    let mut upwards = versions.upwards(id);
    upwards.find_map(|(from, version)| {
        let source =
            if from == id { Source::Local } else { Source::Inherited(text(&version.name)) };
        choice(version).map(|value| (value, source))
    })
}

/// How a value that is kept as a place in a list is called.
fn named(number: u8, values: &[&str]) -> Option<String> {
    let at = usize::from(number.checked_sub(1)?);
    values.get(at).map(|value| value.to_string())
}

fn compression(settings: Settings) -> Option<String> {
    let kind = CompressionKind::from_raw(settings.compression.checked_sub(1)?)?;
    Some(property::compression_name(kind, i32::from(settings.level)))
}

fn checksum(settings: Settings) -> Option<String> {
    let kind = ChecksumKind::from_raw(settings.checksum.checked_sub(1)?)?;
    Some(property::checksum_name(kind).to_string())
}

/// All properties of a version, those of users last; none when there is no such version.
pub fn all(engine: &Engine, id: u64) -> Vec<PropertyInfo> {
    let (counts, pool) = (engine.counts_versions(), engine.settings());
    engine.with_versions(|versions| {
        let Some(version) = versions.get(id) else { return Vec::new() };
        let item = &version.item;
        let mut all = Vec::new();
        let mut push = |name: &str, value: String, sort, source| {
            all.push(PropertyInfo { name: name.to_string(), value, sort, source });
        };
        let kind = if item.is_snapshot() { "snapshot" } else { "subvolume" };
        push("type", kind.to_string(), Sort::Text, Source::Fact);
        if item.created != 0 {
            push("created", item.created.to_string(), Sort::Time, Source::Fact);
        }
        if counts {
            let (referenced, unique) = (item.referenced_bytes(), versions.unique_bytes(id));
            push("referenced", referenced.to_string(), Sort::Bytes, Source::Fact);
            push("unique", unique.to_string(), Sort::Bytes, Source::Fact);
        }
        push("logical", item.logical_bytes.to_string(), Sort::Bytes, Source::Fact);
        let setting = |choice: &dyn Fn(Settings) -> Option<String>, default: String| {
            let found = inherited(versions, id, |version| choice(version.item.settings()));
            found.unwrap_or((default, Source::Default))
        };
        let (value, source) =
            setting(&compression, property::compression_name(pool.compression, pool.level));
        push("compression", value, Sort::Text, source);
        let (value, source) =
            setting(&checksum, property::checksum_name(pool.checksum).to_string());
        push("checksum", value, Sort::Text, source);
        let (value, source) =
            setting(&|settings| named(settings.access_time, &ATIME), ATIME[1].to_string());
        push("atime", value, Sort::Text, source);
        let (value, source) = match item.is_snapshot() {
            true => (READONLY[1].to_string(), Source::Fact),
            false => {
                setting(&|settings| named(settings.read_only, &READONLY), READONLY[0].to_string())
            }
        };
        push("readonly", value, Sort::Text, source);
        if !item.is_snapshot() {
            for (name, bytes) in
                [("referenced-limit", item.limit_referenced), ("own-limit", item.limit_own)]
            {
                match bytes {
                    0 => push(name, "none".to_string(), Sort::Text, Source::Default),
                    bytes => push(name, bytes.to_string(), Sort::Bytes, Source::Local),
                }
            }
        }
        let names = versions.upwards(id).flat_map(|(_, version)| version.user.keys());
        let names: BTreeSet<_> = names.collect();
        for name in names {
            let value = inherited(versions, id, |version| version.user.get(name).cloned());
            if let Some((value, source)) = value {
                push(&text(name), text(&value), Sort::Text, source);
            }
        }
        all
    })
}
