//! Rules of the sources that the compiler does not know.
//!
//! Layering: a module of `fs-core` uses what is below it in [`LAYERS`], never what is above or
//! beside it. Everywhere: ASCII, at most 100 columns, no `todo!`, a reason on every allowed lint,
//! and no path of the machine that somebody happened to work on.
//!
//! The sources are read as text with comments and strings blanked out, which is enough for rules
//! this coarse and needs no parser.

use crate::checkout;
use crate::run::Cmd;
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::Path;

/// The rows of `fs-core`, lowest first. A module may use the rows below its own; those of the
/// lowest row may use each other.
const LAYERS: &[&[&str]] = &[
    &["platform", "sync", "error", "units", "buf", "testing"],
    &["format"],
    &["codec"],
    &["device"],
    &["pool"],
    &["space"],
    &["txg"],
    &["btree", "intent"],
    &["subvol"],
    &["engine"],
    &["vfs", "stream", "check", "maint"],
    &["receive"],
    &["admin"],
];

/// Uses that look as if they pointed up: `(module, what it uses, why that is right)`.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("subvol", "vfs", "the types of operations are declared next to the trait that names them"),
    ("engine", "vfs", "the types of operations are declared next to the trait that names them"),
];

/// The module that tests share; it is not part of what is built for use.
const TEST_SUPPORT: &str = "testing";

/// Longest line of Rust, in columns.
const COLUMNS: usize = 100;

/// What no file of the project may contain: places on the machine of whoever wrote it.
const FORBIDDEN: &[&str] =
    &[concat!("/", "work/"), concat!("/", "tmp/wt"), concat!("/", "root/"), concat!("/", "home/")];

/// Checks the checkout. With `fix`, comments that are too wide are wrapped first.
///
/// # Errors
/// When a rule is broken; every place has been printed.
pub fn run(fix: bool) -> Result<()> {
    let mut broken = 0;
    let listing = Cmd::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .dir(checkout::root())
        .text()?;
    for name in listing.lines() {
        let path = checkout::root().join(name);
        // Removed but not yet committed as removed.
        let Ok(bytes) = fs::read(&path) else { continue };
        let Ok(mut text) = String::from_utf8(bytes) else { continue };
        if fix && name.ends_with(".rs") {
            let wrapped = wrap_comments(&text);
            if wrapped != text {
                fs::write(&path, &wrapped)?;
                text = wrapped;
            }
        }
        for (line, what) in findings(name, &text) {
            println!("{name}:{line}: {what}");
            broken += 1;
        }
    }
    check_modules_are_known()?;
    if broken > 0 {
        bail!("{broken} places break a rule of the sources");
    }
    Ok(())
}

fn check_modules_are_known() -> Result<()> {
    let sources = checkout::root().join("fs-core/src");
    for entry in fs::read_dir(&sources).context("fs-core has no sources")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let module = name.strip_suffix(".rs").unwrap_or(&name);
        if module != "lib" && module != TEST_SUPPORT && row_of(module).is_none() {
            bail!("fs-core/src/{name} is in no row of the layer table in xtask/src/tidy.rs");
        }
    }
    Ok(())
}

/// What is wrong with a file, with line numbers.
fn findings(name: &str, text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for word in FORBIDDEN {
            if line.contains(word) {
                found.push((index + 1, format!("names a place on one machine: {word}")));
            }
        }
    }
    if !name.ends_with(".rs") {
        return found;
    }
    for (index, line) in text.lines().enumerate() {
        if !line.is_ascii() {
            found.push((index + 1, "not ASCII".to_owned()));
        }
        let columns = line.chars().count();
        // A table's row cannot be wrapped.
        let is_table = comment(line).is_some_and(|(_, body)| body.starts_with('|'));
        if columns > COLUMNS && !is_table {
            found.push((index + 1, format!("{columns} columns; {COLUMNS} are allowed")));
        }
    }
    let code = blank(text);
    for macro_name in ["todo!", "unimplemented!"] {
        for at in occurrences(&code, macro_name) {
            found.push((line_of(&code, at), format!("{macro_name} in committed code")));
        }
    }
    for at in occurrences(&code, "[allow(") {
        let end = code[at..].find(")]").map_or(code.len(), |length| at + length);
        if !code[at..end].contains("reason") {
            found.push((line_of(&code, at), "a lint is allowed without a reason".to_owned()));
        }
    }
    if let Some(module) = core_module(name) {
        let code = without_tests(&code);
        for (at, used) in uses(code) {
            if let Some(what) = judge(module, &used) {
                found.push((line_of(code, at), what));
            }
        }
    }
    found
}

/// The text with comments of more than [`COLUMNS`] columns wrapped. What does not fit goes to the
/// start of the next line of the comment, or to a line of its own where that one begins something
/// new.
fn wrap_comments(text: &str) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let mut index = 0;
    let mut in_code_block = false;
    while index < lines.len() {
        let line = lines[index].clone();
        index += 1;
        let Some((prefix, body)) = comment(&line) else {
            in_code_block = false;
            continue;
        };
        in_code_block ^= body.starts_with("```");
        if line.chars().count() <= COLUMNS || in_code_block || body.starts_with('|') {
            continue;
        }
        let Some(cut) = line[..=COLUMNS].rfind(' ').filter(|cut| *cut > prefix.len()) else {
            continue;
        };
        let (kept, moved) = (line[..cut].trim_end().to_owned(), line[cut + 1..].to_owned());
        let list_indent = if body.starts_with("- ") { "  " } else { "" };
        lines[index - 1] = kept;
        match lines.get(index).and_then(|next| comment(next)) {
            Some((next_prefix, next)) if next_prefix == prefix && continues(next) => {
                let next = next.trim_start();
                lines[index] = format!("{prefix}{list_indent}{moved} {next}");
            }
            _ => lines.insert(index, format!("{prefix}{list_indent}{moved}")),
        }
    }
    let mut out = lines.join("\n");
    if text.ends_with('\n') {
        out.push('\n');
    }
    out
}

/// Whether a line of a comment goes on with the sentence before it.
fn continues(body: &str) -> bool {
    let starts_something = ["- ", "* ", "|", "#", "```", "1. "];
    !body.trim().is_empty() && !starts_something.iter().any(|start| body.starts_with(start))
}

/// Indentation with the mark of a comment, and what follows; `None` for a line that is not one.
fn comment(line: &str) -> Option<(&str, &str)> {
    let indent = line.len() - line.trim_start().len();
    let mark = ["///", "//!", "//"].iter().find(|mark| line[indent..].starts_with(**mark))?;
    let rest = &line[indent + mark.len()..];
    let space = usize::from(rest.starts_with(' '));
    Some(line.split_at(indent + mark.len() + space))
}

/// The module of `fs-core` a file belongs to, unless the layer table does not bind it.
fn core_module(name: &str) -> Option<&str> {
    let inside = name.strip_prefix("fs-core/src/")?;
    let is_test = Path::new(inside).components().any(|part| {
        part.as_os_str().to_str().is_some_and(|part| part.trim_end_matches(".rs") == "tests")
    });
    let first = inside.split('/').next()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    (module != "lib" && module != TEST_SUPPORT && !is_test).then_some(module)
}

fn row_of(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

/// Why `module` may not use `used`, if it may not. What is not a module, such as an exported macro,
/// is nobody's business.
fn judge(module: &str, used: &str) -> Option<String> {
    let (from, to) = (row_of(module)?, row_of(used)?);
    let is_exception = EXCEPTIONS.iter().any(|(a, b, _)| *a == module && *b == used);
    let fine = module == used || to < from || (from == 0 && to == 0) || is_exception;
    (!fine).then(|| format!("{module} (row {from}) uses {used} (row {to})"))
}

/// The code before the module of unit tests.
fn without_tests(code: &str) -> &str {
    code.find("#[cfg(test)]\nmod tests {").map_or(code, |end| &code[..end])
}

/// Top-level modules of the crate that the code names, with the place of each.
fn uses(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for at in occurrences(code, "crate::") {
        let is_part_of_a_word = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let rest = &code[at + "crate::".len()..];
        if is_part_of_a_word {
            continue;
        }
        match rest.strip_prefix('{') {
            Some(group) => found.extend(group_heads(group).map(|head| (at, head))),
            None => found.push((at, identifier(rest))),
        }
    }
    found
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first identifier of each path in a `{...}` group, its opening brace taken off.
fn group_heads(group: &str) -> impl Iterator<Item = String> + '_ {
    let mut depth = 0usize;
    let mut at_head = true;
    let mut closed = false;
    group.char_indices().filter_map(move |(index, c)| {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => closed = true,
            '}' => depth -= 1,
            ',' if depth == 0 => at_head = true,
            c if at_head && !closed && !c.is_whitespace() => {
                at_head = false;
                return Some(identifier(&group[index..]));
            }
            _ => {}
        }
        None
    })
}

fn occurrences<'a>(text: &'a str, what: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(what).map(|(at, _)| at)
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// The text with the inside of comments, strings and character literals replaced by spaces, line
/// for line.
fn blank(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = skipped_bytes(rest);
        let word = identifier(rest);
        if skipped > 0 {
            out.extend(rest[..skipped].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            rest = &rest[skipped..];
        } else if !word.is_empty() {
            out.push_str(&word);
            rest = &rest[word.len()..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// Bytes of the comment or literal at the start of `rest`; zero when there is none.
fn skipped_bytes(rest: &str) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return rest.find("*/").map_or(rest.len(), |end| end + 2);
    }
    let raw = rest.trim_start_matches('b');
    if let Some(tail) = raw.strip_prefix('r') {
        let hashes = tail.len() - tail.trim_start_matches('#').len();
        if tail[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let body = &tail[hashes + 1..];
            let end = body.find(&close).map_or(body.len(), |end| end + close.len());
            return rest.len() - body.len() + end;
        }
    }
    if let Some(tail) = rest.strip_prefix('"') {
        return 1 + literal_end(tail, '"');
    }
    if let Some(tail) = rest.strip_prefix('\'') {
        // A lifetime has no closing quote after its first character.
        let is_char =
            tail.starts_with('\\') || tail.chars().nth(1) == Some('\'') && !tail.starts_with('\'');
        return if is_char { 1 + literal_end(tail, '\'') } else { 0 };
    }
    0
}

/// Bytes up to and including the quote that closes a literal.
fn literal_end(body: &str, quote: char) -> usize {
    let mut escaped = false;
    for (index, c) in body.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return index + 1,
            _ => {}
        }
    }
    body.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(name: &str, text: &str) -> Vec<String> {
        findings(name, text).into_iter().map(|(_, what)| what).collect()
    }

    #[test]
    fn a_use_of_a_higher_row_is_found() {
        let found = whats("fs-core/src/pool/mod.rs", "use crate::engine::Engine;\n");
        assert_eq!(found, ["pool (row 4) uses engine (row 9)"]);
    }

    #[test]
    fn a_use_in_a_group_or_in_a_path_is_found() {
        let text = "use crate::{error::{Error, Errno}, txg::Group};\nfn f() { crate::vfs::g() }\n";
        let found = whats("fs-core/src/space/mod.rs", text);
        assert_eq!(found, ["space (row 5) uses txg (row 6)", "space (row 5) uses vfs (row 10)"]);
    }

    #[test]
    fn modules_of_one_row_may_not_use_each_other_except_in_the_lowest() {
        assert_eq!(whats("fs-core/src/intent/mod.rs", "use crate::btree::Tree;").len(), 1);
        assert_eq!(whats("fs-core/src/buf.rs", "use crate::error::Error;").len(), 0);
    }

    #[test]
    fn downward_uses_tests_comments_and_macros_are_fine() {
        let text = "//! See [`crate::engine`].\nuse crate::disk_struct;\nuse crate::units::Ino;\n\
                    #[cfg(test)]\nmod tests {\n use crate::engine::Engine;\n}\n";
        assert_eq!(whats("fs-core/src/format/key.rs", text), [""; 0]);
        assert_eq!(whats("fs-core/src/format/tests.rs", "use crate::engine::X;"), [""; 0]);
    }

    #[test]
    fn long_lines_other_alphabets_and_bare_allows_are_found() {
        let long = format!("// {}\n", "x".repeat(98));
        assert_eq!(whats("a.rs", &long), ["101 columns; 100 are allowed"]);
        assert_eq!(whats("a.rs", "// \u{e9}\n"), ["not ASCII"]);
        assert_eq!(whats("a.rs", "#[allow(dead_code)]\n").len(), 1);
        assert_eq!(whats("a.rs", "#[allow(\n dead_code,\n reason = \"it is\")]\n").len(), 0);
    }

    #[test]
    fn unfinished_code_is_found_and_talk_about_it_is_not() {
        let call = concat!("fn f() { to", "do!() }\n");
        assert_eq!(whats("a.rs", call).len(), 1);
        assert_eq!(whats("a.rs", concat!("// no to", "do!\n")).len(), 0);
        assert_eq!(whats("a.rs", concat!("const A: &str = \"to", "do!\";\n")).len(), 0);
    }

    #[test]
    fn blanking_keeps_lifetimes_and_lines() {
        let text = "fn f<'a>(x: &'a str) { '\"'; r#\"a \" b\"#; \"c\\\"d\" } // e\n/* f\n */ g\n";
        let code = blank(text);
        assert_eq!(code.matches('\n').count(), text.matches('\n').count());
        assert!(code.contains("fn f<'a>(x: &'a str)"), "{code}");
        for gone in ["a \" b", "c\\", "// e", " f\n"] {
            assert!(!code.contains(gone), "{gone} is left in {code}");
        }
    }

    #[test]
    fn wrapping_moves_words_on_and_leaves_tables_lists_and_code_alone() {
        let word = "abcdefghi ";
        let long = format!("    /// {}end\n", word.repeat(10));
        let wrapped = wrap_comments(&format!("{long}    /// next\n    /// - item\n"));
        let start = format!("    /// {}", word.repeat(9).trim_end());
        assert_eq!(wrapped, format!("{start}\n    /// abcdefghi end next\n    /// - item\n"));
        let table = format!("// | {} |\n", word.repeat(12));
        let code = format!("let x = \"{}\";\n", word.repeat(12));
        for text in [table, code] {
            assert_eq!(wrap_comments(&text), text);
        }
        let alone = wrap_comments(&format!("{long}    fn f() {{}}\n"));
        assert!(alone.ends_with("\n    /// abcdefghi end\n    fn f() {}\n"), "{alone}");
    }

    #[test]
    fn a_path_of_a_machine_is_found_in_any_file() {
        let text = format!("see {}\n", FORBIDDEN[0]);
        assert_eq!(whats("README.md", &text).len(), 1);
    }
}
