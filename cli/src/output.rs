//! Printing: JSON, and the same as text.

use cairn_host::say;
use serde::Serialize;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a value was printed as JSON.
static IS_PRINTED: AtomicBool = AtomicBool::new(false);

/// Prints a value as JSON.
pub(crate) fn json(value: &impl Serialize) {
    IS_PRINTED.store(true, Ordering::Relaxed);
    say!("{:#}", serde_json::json!(value));
}

/// Prints why a command failed as JSON, unless it has printed what there was as JSON before.
pub(crate) fn json_error(sentence: &str) {
    if !IS_PRINTED.load(Ordering::Relaxed) {
        json(&serde_json::json!({ "error": sentence }));
    }
}

/// A JSON value on one line as people read it: `a 1, b {c 2}`, text without quotes.
pub(crate) fn line(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let parts: Vec<String> =
                map.iter().map(|(k, v)| format!("{k} {}", nested(v))).collect();
            parts.join(", ")
        }
        Value::Array(list) => list.iter().map(nested).collect::<Vec<_>>().join(" "),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

fn nested(value: &Value) -> String {
    match value {
        Value::Object(_) => format!("{{{}}}", line(value)),
        Value::Array(list) if list.is_empty() => "[]".into(),
        Value::Array(_) => format!("[{}]", line(value)),
        other => line(other),
    }
}

/// Text from a disk must not steer the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = escaped.is_none().then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_structure_without_quotes() {
        let value = serde_json::json!({ "a": 1, "b": { "c": "x y" }, "d": [1, 2], "e": [] });
        assert_eq!(line(&value), "a 1, b {c x y}, d [1 2], e []");
    }

    #[test]
    fn control_characters_from_a_disk_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[2J\nb"), "a\\u{1b}[2J\\nb");
    }
}
