//! What a caller may name as source: paths, `UUID=` or `LABEL=` of a pool.

use crate::members::{block_devices, read_label};
use fs_core::format::label::Label;
use std::path::{Path, PathBuf};

/// Finds the devices that `source` names: at least one, perhaps not all of the pool. A path is
/// taken as it is, or as several with colons between them where there is no file of that name.
///
/// # Errors
/// One sentence: no device, or more than one pool, has that name.
pub fn resolve(source: &str) -> Result<Vec<PathBuf>, String> {
    let matches: Box<dyn Fn(&Label) -> bool> = match source.split_once('=') {
        Some(("UUID", id)) => {
            let wanted = parse_id(id).ok_or(format!("'{id}' is not a UUID"))?;
            Box::new(move |label| label.pool_id == wanted)
        }
        Some(("LABEL", name)) => {
            let wanted = name.trim_matches('"').as_bytes().to_vec();
            Box::new(move |label| label_name(label) == wanted)
        }
        _ => return Ok(paths(source)),
    };
    let mut found: Vec<(PathBuf, Label)> = Vec::new();
    for path in block_devices() {
        let Some(label) = read_label(&path).map(|found| found.label) else { continue };
        // Of several ways to one device the first is taken.
        let is_new = found.iter().all(|(_, other)| other.device_id != label.device_id);
        if matches(&label) && is_new {
            found.push((path, label));
        }
    }
    let Some((_, first)) = found.first() else {
        return Err(format!("no device has {source}"));
    };
    let pool = first.pool_id;
    let names = || found.iter().map(|(path, _)| path.display().to_string()).collect::<Vec<_>>();
    match found.iter().all(|(_, label)| label.pool_id == pool) {
        true => Ok(found.into_iter().map(|(path, _)| path).collect()),
        false => Err(format!(
            "{source} names several pools ({}); give the path of a device",
            names().join(", ")
        )),
    }
}

/// The devices that several sources name. What is not there may be the label of a pool, with or
/// without `LABEL=`, or its `UUID=`; everything else is a path, whatever is in it.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_all(sources: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    let mut all = Vec::new();
    for source in sources {
        let name = source.to_str().filter(|_| source.symlink_metadata().is_err());
        match name {
            Some(name) if name.starts_with("UUID=") || name.starts_with("LABEL=") => {
                all.extend(resolve(name)?);
            }
            Some(name) => all.extend(of_label(name).unwrap_or_else(|| vec![source.clone()])),
            None => all.push(source.clone()),
        }
    }
    Ok(all)
}

/// The devices of the pool that has a label, if one pool has it.
fn of_label(name: &str) -> Option<Vec<PathBuf>> {
    let is_label = !name.is_empty() && !name.contains('/');
    is_label.then(|| resolve(&format!("LABEL={name}")).ok())?
}

fn paths(source: &str) -> Vec<PathBuf> {
    let mut parts: Vec<PathBuf> = source.split(':').map(PathBuf::from).collect();
    let is_list = parts.len() > 1 && !Path::new(source).exists();
    // The first is the one that the mount shows: one that is there.
    parts.sort_by_key(|part| !part.exists());
    match is_list && parts[0].exists() {
        true => parts,
        false => vec![PathBuf::from(source)],
    }
}

fn parse_id(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .trim_matches('"')
        .bytes()
        .filter(|&b| b != b'-')
        .map(|b| char::from(b).to_digit(16).map(|d| d as u8))
        .collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    <[u8; 16]>::try_from(bytes).ok().filter(|_| digits.len() == 32)
}

fn label_name(label: &Label) -> &[u8] {
    let end = label.name.iter().position(|&b| b == 0).unwrap_or(label.name.len());
    &label.name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_with_and_without_dashes_and_quotes() {
        let id = parse_id("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(id[0], 0);
        assert_eq!(id[15], 0xff);
        assert_eq!(parse_id("\"00112233445566778899AABBCCDDEEFF\""), Some(id));
        assert_eq!(parse_id("0011"), None);
        assert_eq!(parse_id("00112233-4455-6677-8899-aabbccddeeff0"), None);
        assert_eq!(parse_id("zz112233-4455-6677-8899-aabbccddeeff"), None);
    }

    #[test]
    fn a_path_is_taken_as_it_is() {
        assert_eq!(resolve("/a/b=c"), Ok(vec![PathBuf::from("/a/b=c")]));
        assert_eq!(resolve("/a:/b"), Ok(vec![PathBuf::from("/a:/b")]));
        assert_eq!(resolve("/tmp:/dev").map(|paths| paths.len()), Ok(2));
        // What is missing is named by whoever opens it, or done without.
        assert_eq!(resolve("/not/there:/dev"), Ok(vec!["/dev".into(), "/not/there".into()]));
    }

    #[test]
    fn of_several_sources_only_names_of_pools_are_looked_for() {
        let sources = ["/a:/b", "/", "Label=no such pool"].map(PathBuf::from);
        assert_eq!(resolve_all(&sources), Ok(sources.to_vec()));
        assert!(resolve_all(&["/a".into(), "LABEL=no such pool".into()]).is_err());
    }

    #[test]
    fn an_id_that_no_device_has_is_an_error() {
        assert!(resolve("UUID=00112233-4455-6677-8899-aabbccddeeff").is_err());
        assert!(resolve("UUID=nonsense").is_err());
    }
}
