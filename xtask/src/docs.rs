//! What the sources can say about themselves: the tables of `docs/format.md`.
//!
//! The document is written by hand except between `<!-- table: NAME -->` and `<!-- end -->`, where
//! the table of the structure NAME stands, as declared with `disk_struct!`. `--check` compares.

use crate::{checkout, need, pages};
use anyhow::{bail, Context, Result};
use fs_core::format::{
    chunk, dead, devices, dir, extent, inode, key, label, log, node, pool, ptr, scrub, space,
    superblock, xattr, FieldDoc,
};
use std::fmt::Write as _;
use std::fs;

/// A structure as the document shows it.
struct Structure {
    name: &'static str,
    doc: &'static str,
    bytes: usize,
    fields: &'static [FieldDoc],
}

macro_rules! structures {
    ($($module:ident :: $name:ident),* $(,)?) => {
        &[$( Structure {
            name: stringify!($name),
            doc: $module::$name::DOC,
            bytes: $module::$name::BYTES,
            fields: $module::$name::FIELDS,
        } ),*]
    };
}

/// Every structure that reaches a disk.
const STRUCTURES: &[Structure] = structures![
    label::Label,
    label::LabelMember,
    superblock::SuperblockRaw,
    ptr::BlockPtrRaw,
    node::NodeHeader,
    node::ItemHead,
    chunk::ChunkHeader,
    chunk::StripeItem,
    dead::DeadHeader,
    dead::DeadEntry,
    chunk::DeviceItem,
    pool::SubvolItem,
    pool::BookmarkItem,
    devices::DeviceChangeItem,
    scrub::ScrubItem,
    scrub::ScrubDevice,
    scrub::ScrubSpan,
    inode::InodeItem,
    inode::LinkItem,
    dir::EntryHeader,
    xattr::XattrHeader,
    extent::ExtentHeader,
    space::SummaryItem,
    space::RefItem,
    space::ResidueHeader,
    space::ResidueItem,
    log::FrameHeader,
    log::RecordHeader,
];

const BEGIN: &str = "<!-- table: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- end -->";

/// Brings `docs/format.md` up to date and generates manual pages and completions, or with `check`
/// fails when the document is not up to date.
///
/// # Errors
/// When it is out of date or a marker names nothing.
pub fn run(check: bool) -> Result<()> {
    format_tables(check)?;
    if !check {
        need::release_build()?;
        let pages = pages::generate()?;
        println!("{} pages and completions are in target/dist", pages.len());
    }
    Ok(())
}

fn format_tables(check: bool) -> Result<()> {
    let path = checkout::root().join("docs/format.md");
    let old = fs::read_to_string(&path).context("cannot read docs/format.md")?;
    let new = fill(&old)?;
    if old == new {
        return Ok(());
    }
    if check {
        bail!("docs/format.md is out of date: run `cargo xtask docs` and commit it");
    }
    fs::write(&path, new).context("cannot write docs/format.md")?;
    println!("docs/format.md has been brought up to date");
    Ok(())
}

/// The document with every table made anew.
fn fill(document: &str) -> Result<String> {
    let mut out = String::with_capacity(document.len());
    let mut rest = document;
    let mut missing: Vec<&str> = STRUCTURES.iter().map(|s| s.name).collect();
    while let Some(at) = rest.find(BEGIN) {
        let (before, tail) = rest.split_at(at + BEGIN.len());
        let (name, tail) = tail.split_once(BEGIN_END).context("a marker is not closed")?;
        let end = tail.find(END).with_context(|| format!("the table of {name} has no end"))?;
        out.push_str(before);
        let _ = write!(out, "{name}{BEGIN_END}\n{}", table(name)?);
        missing.retain(|other| *other != name);
        rest = &tail[end..];
    }
    out.push_str(rest);
    if !missing.is_empty() {
        bail!("docs/format.md has no table of {}", missing.join(", "));
    }
    Ok(out)
}

fn table(name: &str) -> Result<String> {
    if name == "item kinds" {
        return Ok(kinds());
    }
    let structure = STRUCTURES.iter().find(|structure| structure.name == name);
    let structure = structure.with_context(|| format!("there is no structure {name}"))?;
    let mut out = format!("`{name}`, {} bytes. {}\n\n", structure.bytes, sentence(structure.doc));
    out.push_str("| offset | bytes | type | field | meaning |\n");
    out.push_str("| ---: | ---: | --- | --- | --- |\n");
    for field in structure.fields {
        let FieldDoc { offset, bytes, kind, name, doc } = field;
        let _ = writeln!(
            out,
            "| {offset:#05x} | {bytes} | {kind} | `{name}` | {} |",
            sentence(doc).replace('|', "\\|")
        );
    }
    Ok(out)
}

fn kinds() -> String {
    let mut out = String::from("| kind | name | tree | object | offset | value |\n");
    out.push_str("| ---: | --- | --- | --- | --- | --- |\n");
    for (kind, name, tree, object, offset, value) in key::kind::TABLE {
        let _ = writeln!(out, "| {kind:#04x} | {name} | {tree} | {object} | {offset} | {value} |");
    }
    out
}

/// A doc comment on one line.
fn sentence(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Cmd;

    #[test]
    fn the_document_in_the_checkout_is_up_to_date() {
        let text = fs::read_to_string(checkout::root().join("docs/format.md")).unwrap();
        assert_eq!(fill(&text).unwrap(), text, "run `cargo xtask docs`");
    }

    #[test]
    fn a_structure_without_a_table_is_an_error() {
        let error = fill("<!-- table: Label -->\n<!-- end -->\n").unwrap_err().to_string();
        assert!(error.contains("NodeHeader") && !error.contains("Label,"), "{error}");
    }

    #[test]
    fn a_table_of_nothing_is_an_error() {
        assert!(fill("<!-- table: Nothing -->\n<!-- end -->\n").is_err());
    }

    /// A test that has been renamed or is gone protects nobody.
    #[test]
    fn every_test_that_the_hazards_name_exists() {
        let text = fs::read_to_string(checkout::root().join("docs/hazards.md")).unwrap();
        let list = Cmd::new("git").args(["grep", "-hoE", "fn [a-z0-9_]+\\(", "--", "*.rs"]);
        let functions = list.dir(checkout::root()).text().unwrap();
        let steps = fs::read_to_string(checkout::root().join("docs/testing.md")).unwrap();
        let mut tests = 0;
        for name in text.split('`').skip(1).step_by(2) {
            let is_test = name.matches('_').count() >= 3 && !name.contains(' ');
            let exists = functions.lines().any(|line| line == format!("fn {name}("));
            assert!(!is_test || exists, "there is no test {name}");
            tests += usize::from(is_test);
        }
        assert!(tests > 30, "{tests} tests");
        for line in text.lines().filter(|line| line.starts_with('|')) {
            for name in line.split("step").skip(1).flat_map(|rest| rest.split('`').nth(1)) {
                assert!(steps.contains(&format!("`{name}`")), "there is no step {name}");
            }
        }
    }
}
