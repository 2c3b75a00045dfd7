//! `cairn udev`: what udev is told of a device, so that `/dev/disk/by-uuid` and `by-label` name it.
//!
//! mount(8), fsck(8) and systemd look for `UUID=` and `LABEL=` there before they ask libblkid,
//! which does not know the format. The properties are those that udev's own `blkid` sets.

use crate::{Done, Failure};
use cairn_host::parse::format_uuid;
use cairn_host::{probe, stored, Access, FileDevice, OpenOptions, Wait};
use fs_core::platform::Device;
use std::fmt::Write as _;
use std::path::Path;

/// Prints the properties of a device of a pool.
pub(crate) fn run(device: &Path) -> Result<Done, Failure> {
    // Unlocked: udev looks when it is told to, also at what is mounted or about to be.
    let options = OpenOptions::new(Access::Unlocked);
    let device = FileDevice::open(device, options, &Wait::none()).map_err(Failure::new)?;
    let areas = stored::read_areas(&device);
    let label = stored::best_label(&areas)
        .ok_or_else(|| Failure::new(format_args!("{}: not a cairn pool", device.name())))?;
    let id = format_uuid(&label.pool_id);
    let mut text = format!(
        "ID_FS_TYPE=cairn\nID_FS_USAGE=filesystem\nID_FS_VERSION={}\n\
         ID_FS_UUID={id}\nID_FS_UUID_ENC={id}\nID_FS_UUID_SUB={}\n",
        label.version,
        format_uuid(&label.device_id),
    );
    if let Some(name) = probe::label_name(label) {
        let safe: String = name.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
        let _ = writeln!(text, "ID_FS_LABEL={safe}\nID_FS_LABEL_ENC={}", encode(&name));
    }
    cairn_host::output::text(&text);
    Ok(Done::Whole)
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii()
}

/// As udev encodes names for links: what is not plain as `\xNN`.
fn encode(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match is_plain(c) {
            true => out.push(c),
            false => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn names_are_encoded_as_udev_does() {
        assert_eq!(encode("tank"), "tank");
        assert_eq!(encode("my tank/1"), "my\\x20tank\\x2f1");
        assert_eq!(encode("a\\b\nc"), "a\\x5cb\\x0ac");
        assert_eq!(encode("gr\u{fc}n"), "gr\u{fc}n");
    }
}
