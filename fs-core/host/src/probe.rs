//! What is on a device already.
//!
//! `mkfs` asks before it writes over something. Three sources, because the question is worth it:
//! cairn's own label, which other tools may not know; `blkid`, which knows nearly everything else;
//! and a short table of signatures for systems without it.

use fs_core::format::label::Label;
use fs_core::platform::{Device, ReadOp};
use fs_core::units::Physical;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Something found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it is, such as `ext4` or `gpt partition table`.
    pub kind: String,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// Its id as text, if it has one.
    pub id: Option<String>,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if let Some(label) = &self.label {
            write!(f, " labelled '{label}'")?;
        }
        if let Some(id) = &self.id {
            write!(f, " with UUID {id}")?;
        }
        Ok(())
    }
}

impl Signature {
    fn kind(kind: impl Into<String>) -> Signature {
        Signature { kind: kind.into(), label: None, id: None }
    }
}

/// The signature on a device, or `None` if there is none that anyone here knows.
///
/// # Errors
/// The device, when it cannot be read.
pub fn probe(device: &dyn Device, path: &Path) -> Result<Option<Signature>, String> {
    if let Some(found) = cairn_label(device) {
        return Ok(Some(found));
    }
    match blkid(path) {
        Blkid::Found(found) => return Ok(Some(found)),
        // The table below still speaks: blkid does not report what it takes for a leftover.
        Blkid::Nothing | Blkid::Unavailable => {}
    }
    known_signature(device)
}

/// The valid label of either area, as the name and id of a pool.
pub fn cairn_label(device: &dyn Device) -> Option<Signature> {
    let areas = crate::stored::read_areas(device);
    let label = crate::stored::best_label(&areas)?;
    Some(Signature {
        kind: "a cairn pool".into(),
        label: label_name(label),
        id: Some(crate::parse::format_uuid(&label.pool_id)),
    })
}

/// The pool's name in a label; `None` when it has none.
pub fn label_name(label: &Label) -> Option<String> {
    let end = label.name.iter().position(|b| *b == 0).unwrap_or(label.name.len());
    (end > 0).then(|| String::from_utf8_lossy(&label.name[..end]).into_owned())
}

fn read(device: &dyn Device, at: u64, bytes: usize) -> Result<fs_core::buf::Buf, String> {
    let buf = fs_core::buf::Buf::zeroed(bytes).map_err(|e| e.to_string())?;
    let mut ops = [ReadOp { at: Physical(at), buf, result: Ok(()) }];
    device.read(&mut ops);
    let [op] = ops;
    match op.result {
        Ok(()) => Ok(op.buf),
        Err(cause) => Err(format!("{}: cannot be read at byte {at}: {cause:?}", device.name())),
    }
}

enum Blkid {
    Found(Signature),
    Nothing,
    Unavailable,
}

fn blkid(path: &Path) -> Blkid {
    // An ordinary user's PATH often lacks the directories of system tools.
    let program = ["/usr/sbin/blkid", "/sbin/blkid", "/usr/bin/blkid"]
        .into_iter()
        .find(|program| Path::new(program).exists())
        .unwrap_or("blkid");
    let Ok(path) = path.canonicalize() else { return Blkid::Unavailable };
    let output = Command::new(program)
        .args(["-p", "-o", "export"])
        .arg(path)
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else { return Blkid::Unavailable };
    match output.status.code() {
        Some(0) => parse_export(&String::from_utf8_lossy(&output.stdout)),
        Some(2) => Blkid::Nothing,
        Some(8) => Blkid::Found(Signature::kind("several conflicting filesystem signatures")),
        _ => Blkid::Unavailable,
    }
}

/// Reads `NAME=value` lines, where blkid puts a backslash before what a shell would take apart.
fn parse_export(text: &str) -> Blkid {
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='))?;
        let mut plain = String::with_capacity(line.len());
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            plain.extend(if c == '\\' { chars.next() } else { Some(c) });
        }
        Some(plain)
    };
    let table = value("PTTYPE").map(|kind| format!("{kind} partition table"));
    // PART_ENTRY lines describe the partition itself, not what is in it.
    match value("TYPE").or(table) {
        Some(kind) => Blkid::Found(Signature { kind, label: value("LABEL"), id: value("UUID") }),
        None => Blkid::Nothing,
    }
}

/// Offset, bytes, name: what is common on Linux systems.
const KNOWN: &[(u64, &[u8], &str)] = &[
    (0x438, b"\x53\xef", "ext2, ext3 or ext4"),
    (0, b"XFSB", "xfs"),
    (0x10040, b"_BHRfS_M", "btrfs"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "bcachefs"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9", "bcachefs"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (54, b"FAT", "vfat"),
    (82, b"FAT32", "vfat"),
    (0, b"LUKS\xba\xbe", "crypto_LUKS"),
    (0x218, b"LVM2 001", "LVM2_member"),
    (4096, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
    (0, b"hsqs", "squashfs"),
    (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0x8001, b"CD001", "iso9660"),
    (4086, b"SWAPSPACE2", "swap"),
    (0x200, b"EFI PART", "gpt partition table"),
    (0x1000, b"EFI PART", "gpt partition table"),
];

/// Bytes of the longest stretch that [`KNOWN`] looks at.
const KNOWN_BYTES: usize = 0x11000;

fn known_signature(device: &dyn Device) -> Result<Option<Signature>, String> {
    let bytes = device.geometry().bytes & !4095;
    let head = read(device, 0, (KNOWN_BYTES as u64).min(bytes) as usize)?;
    let found = KNOWN.iter().find(|(at, magic, _)| {
        let at = *at as usize;
        head.get(at..at + magic.len()) == Some(*magic)
    });
    if let Some((_, _, kind)) = found {
        return Ok(Some(Signature::kind(*kind)));
    }
    Ok(is_mbr(&head).then(|| Signature::kind("dos partition table")))
}

/// A boot signature alone is also at the end of many boot sectors without partitions.
fn is_mbr(head: &[u8]) -> bool {
    let Some(sector) = head.get(..512) else { return false };
    let entries = || sector[446..510].chunks_exact(16);
    sector[510..] == [0x55, 0xaa]
        && entries().all(|e| e[0] & 0x7f == 0)
        && entries().any(|e| e[4] != 0 && e[12..16] != [0; 4])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, FileDevice, OpenOptions, Wait};
    use std::io::Write;

    fn device_with(at: u64, bytes: &[u8]) -> (tempfile::NamedTempFile, FileDevice) {
        use std::os::unix::fs::FileExt;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        file.as_file().write_all_at(bytes, at).unwrap();
        file.flush().unwrap();
        let options = OpenOptions::new(Access::ReadOnly);
        let device = FileDevice::open(file.path(), options, &Wait::none()).unwrap();
        (file, device)
    }

    #[test]
    fn every_signature_of_the_table_is_found_where_it_stands() {
        for (at, magic, kind) in KNOWN {
            let (_file, device) = device_with(*at, magic);
            let found = known_signature(&device).unwrap();
            assert_eq!(found.as_ref().map(|s| s.kind.as_str()), Some(*kind));
        }
    }

    #[test]
    fn an_empty_image_has_no_signature() {
        let (file, device) = device_with(0, b"");
        assert_eq!(probe(&device, file.path()).unwrap(), None);
    }

    #[test]
    fn a_partition_table_is_told_from_a_bare_boot_signature() {
        let mut sector = [0; 512];
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert!(!is_mbr(&sector));
        (sector[446 + 4], sector[446 + 12]) = (0x83, 1);
        assert!(is_mbr(&sector));
        assert!(!is_mbr(&sector[..511]));
    }

    #[test]
    fn what_blkid_exports_is_understood_with_its_escapes() {
        let text = "DEVNAME=/dev/x\nLABEL=my\\ disk\nUUID=1234\nTYPE=ext4\nUSAGE=filesystem\n";
        let Blkid::Found(found) = parse_export(text) else { panic!("nothing found") };
        assert_eq!(found.to_string(), "ext4 labelled 'my disk' with UUID 1234");
        assert!(matches!(parse_export("PART_ENTRY_SCHEME=gpt\n"), Blkid::Nothing));
        let Blkid::Found(found) = parse_export("PTTYPE=dos\n") else { panic!("nothing found") };
        assert_eq!(found.to_string(), "dos partition table");
    }
}
