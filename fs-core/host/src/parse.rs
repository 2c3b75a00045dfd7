//! How people write sizes and ids.

use std::fmt;

/// Why a size could not be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSize(String);

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is not a size: give a number of bytes, or one with a suffix (K, M, G, T, P, E or \
             KiB, MiB, ... for powers of 1024; KB, MB, ... for powers of 1000)",
            self.0
        )
    }
}

impl std::error::Error for BadSize {}

const PREFIXES: &str = "KMGTPE";

/// Reads a size: `4096`, `64M` and `64MiB` (both times 1024 twice), `64MB` (times 1000 twice).
///
/// # Errors
/// [`BadSize`] for anything else, and for what does not fit in 64 bits.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    size_of(text.trim()).ok_or_else(|| BadSize(text.to_string()))
}

fn size_of(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    number.parse::<u64>().ok()?.checked_mul(multiplier(suffix.trim_start())?)
}

fn multiplier(suffix: &str) -> Option<u64> {
    let upper = suffix.to_ascii_uppercase();
    if matches!(upper.as_str(), "" | "B") {
        return Some(1);
    }
    let mut chars = upper.chars();
    let power = PREFIXES.find(chars.next()?)? as u32 + 1;
    match chars.as_str() {
        "" | "IB" => Some(1024u64.pow(power)),
        "B" => Some(1000u64.pow(power)),
        _ => None,
    }
}

/// A size for people: three significant digits and a unit of 1024, such as `1.50 GiB`.
pub fn format_size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut prefixes = PREFIXES.chars();
    let mut prefix = prefixes.next().unwrap_or('K');
    for next in prefixes {
        // What would print as 1024 is one of the next unit.
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        prefix = next;
    }
    let digits = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {prefix}iB")
}

/// Reads an id as `uuidgen` prints it; braces and missing dashes are accepted.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    uuid::Uuid::try_parse(text)
        .map(uuid::Uuid::into_bytes)
        .map_err(|e| format!("'{text}' is not a UUID: {e}"))
}

/// An id as `blkid` prints it.
pub fn format_uuid(id: &[u8; 16]) -> String {
    uuid::Uuid::from_bytes(*id).hyphenated().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_mean_what_storage_tools_mean_by_them() {
        for (text, want) in [
            ("0", 0),
            ("4096", 4096),
            ("512b", 512),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("1GiB", 1 << 30),
            ("1 GiB", 1 << 30),
            ("1GB", 1_000_000_000),
            ("3T", 3 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_its_text() {
        for text in ["", "M", "-1", "1.5G", "1X", "1MiBs", "16E", "99999999999999999999", "0x10"] {
            let error = parse_size(text).expect_err(text);
            assert!(error.to_string().contains(text));
        }
    }

    #[test]
    fn sizes_are_printed_with_three_digits() {
        for (bytes, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 20, "1.50 GiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (100 << 30, "100 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(format_size(bytes), want);
        }
    }

    #[test]
    fn an_id_survives_being_printed_and_read() {
        let id = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
        assert_eq!(format_uuid(&id), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(parse_uuid(&format_uuid(&id)), Ok(id));
        assert!(parse_uuid("00112233").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in ".{0,24}") {
            let _ = (parse_size(&text), parse_uuid(&text));
        }
    }
}
