//! What a caller may name as source: a path, `UUID=` or `LABEL=` of a pool.

use fs_core::format::label::{label_areas, Label};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Finds the device that `source` names. A path is taken as it is.
///
/// # Errors
/// One sentence: nothing, or more than one device, has that name.
pub fn resolve(source: &str) -> Result<PathBuf, String> {
    let matches: Box<dyn Fn(&Label) -> bool> = match source.split_once('=') {
        Some(("UUID", id)) => {
            let wanted = parse_id(id).ok_or(format!("'{id}' is not a UUID"))?;
            Box::new(move |label| label.pool_id == wanted)
        }
        Some(("LABEL", name)) => {
            let wanted = name.trim_matches('"').as_bytes().to_vec();
            Box::new(move |label| label_name(label) == wanted)
        }
        _ => return Ok(PathBuf::from(source)),
    };
    let mut found: Vec<PathBuf> = block_devices()
        .into_iter()
        .filter(|path| read_label(path).is_some_and(|l| matches(&l)))
        .collect();
    match found.len() {
        0 => Err(format!("no device has {source}")),
        1 => Ok(found.remove(0)),
        _ => Err(format!(
            "{source} names {} devices ({}); give the path of one",
            found.len(),
            found.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
        )),
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

fn block_devices() -> Vec<PathBuf> {
    let Ok(devices) = std::fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut paths: Vec<PathBuf> = devices
        .filter_map(Result::ok)
        // A slash in a device's name is written as an exclamation mark.
        .filter_map(|d| d.file_name().into_string().ok())
        .map(|name| Path::new("/dev").join(name.replace('!', "/")))
        .collect();
    paths.sort();
    paths
}

/// The first valid label of a device, if it has one.
fn read_label(path: &Path) -> Option<Label> {
    let mut file = File::open(path).ok()?;
    let areas = label_areas(file.seek(SeekFrom::End(0)).ok()?)?;
    areas.into_iter().find_map(|area| {
        let mut bytes = vec![0; Label::BYTES];
        file.read_exact_at(&mut bytes, area.0).ok()?;
        Label::decode(&bytes).ok()
    })
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
        assert_eq!(resolve("/a/b=c"), Ok(PathBuf::from("/a/b=c")));
    }

    #[test]
    fn an_id_that_no_device_has_is_an_error() {
        assert!(resolve("UUID=00112233-4455-6677-8899-aabbccddeeff").is_err());
        assert!(resolve("UUID=nonsense").is_err());
    }
}
