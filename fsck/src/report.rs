//! What the check found, for people and for programs.

use crate::Arguments;
use cairn_host::parse::format_size;
use cairn_host::say;
use fs_core::check::{findings::rules, CheckReport, Finding, Place, Severity};
use fs_core::error::Error;
use serde_json::{json, Value};

pub(crate) fn print(report: &CheckReport, arguments: &Arguments, devices: &str, seconds: f64) {
    if arguments.json {
        say!("{:#}", json(report, devices, seconds));
        return;
    }
    lines(report).iter().for_each(|line| say!("{line}"));
    for (id, more) in not_listed(report) {
        say!("... and {more} more of {id}");
    }
    say!("{devices}: {}", verdict(report));
    if arguments.verbose > 0 {
        let stats = &report.stats;
        say!(
            "group {}: {} tree nodes, {} items, {} inodes, {} names, {} extents",
            stats.txg,
            stats.nodes,
            stats.items,
            stats.inodes,
            stats.names,
            stats.extents
        );
        say!(
            "{} of data verified, {} in use",
            format_size(stats.data_bytes),
            format_size(stats.used_bytes)
        );
    }
    if arguments.timing > 0 {
        say!("{seconds:.2} s");
    }
}

/// What is listed: of what one file or tree has in a row, the first few, and how many more.
fn lines(report: &CheckReport) -> Vec<String> {
    // Devices and addresses are not told apart by it, so each is listed.
    let is_same = |a: &Finding, b: &Finding| {
        let is_about_one = a.spot.object.is_some();
        is_about_one && (a.id, a.spot.tree, a.spot.object) == (b.id, b.spot.tree, b.spot.object)
    };
    let mut lines = Vec::new();
    for row in report.findings.chunk_by(is_same) {
        let shown = if row.len() > ROW_MAX { 1 } else { row.len() };
        lines.extend(row[..shown].iter().map(ToString::to_string));
        if row.len() > shown {
            let id = row[0].id;
            lines.push(format!("... and {} more of {id} in the same place", row.len() - shown));
        }
    }
    lines
}

/// Findings of one rule about one thing that are listed in full.
const ROW_MAX: usize = 3;

/// A pool that cannot even be opened.
pub(crate) fn print_unopenable(error: &Error, arguments: &Arguments, devices: &str) {
    if arguments.json {
        let report = json!({ "devices": devices, "clean": false, "unopenable": error.to_string() });
        say!("{report:#}");
    } else {
        say!("{devices}: cannot be opened: {error}");
    }
}

/// A check that could not be carried out, for programs.
pub(crate) fn print_failed(sentence: &str, arguments: &Arguments) {
    say!("{:#}", json!({ "devices": arguments.device_names(), "error": sentence }));
}

/// How many findings of each rule there were beyond those that are listed.
fn not_listed(report: &CheckReport) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    report.counts.iter().filter_map(|(id, count)| {
        let listed = report.findings.iter().filter(|finding| finding.id == *id).count() as u64;
        count.checked_sub(listed).filter(|more| *more > 0).map(|more| (*id, more))
    })
}

/// What findings are about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Devices that are missing or behind.
    Devices,
    /// What an older group had.
    Past,
    Anything,
}

impl About {
    fn of(id: &str) -> About {
        match id {
            id if id == rules::DEVICE_MISSING.id || id == rules::DEVICE_BEHIND.id => About::Devices,
            id if id == rules::OVERWRITTEN.id => About::Past,
            _ => About::Anything,
        }
    }
}

/// How many findings of a severity there were, listed or not, that are about that.
fn count(report: &CheckReport, severity: Severity, about: About) -> u64 {
    let of_severity =
        |id: &str| rules::TABLE.iter().any(|rule| rule.id == id && rule.severity == severity);
    let counts = report.counts.iter();
    let counts = counts.filter(|(id, _)| of_severity(id) && About::of(id) == about);
    counts.map(|(_, count)| count).sum()
}

fn verdict(report: &CheckReport) -> String {
    if report.is_clean() {
        return "no errors".into();
    }
    let words = [
        (Severity::Loss, About::Anything, "with loss of data"),
        (Severity::Error, About::Anything, "without loss of data"),
        (
            Severity::Warning,
            About::Devices,
            "of devices that are missing or behind: less may fail now",
        ),
        (Severity::Warning, About::Past, "of what this older group had and is overwritten since"),
        (Severity::Warning, About::Anything, "of no consequence to users"),
    ];
    let parts: Vec<String> = words
        .into_iter()
        .map(|(severity, about, word)| (count(report, severity, about), word))
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    format!("errors left: {}", parts.join(", "))
}

fn json(report: &CheckReport, devices: &str, seconds: f64) -> Value {
    let stats = &report.stats;
    let counts: serde_json::Map<String, Value> =
        report.counts.iter().map(|(id, count)| ((*id).to_string(), json!(count))).collect();
    json!({
        "devices": devices,
        "clean": report.is_clean(),
        "worst": report.worst().map(Severity::name),
        "seconds": seconds,
        "group": stats.txg.0,
        "closed": stats.clean,
        "nodes": stats.nodes,
        "items": stats.items,
        "subvolumes": stats.subvols,
        "inodes": stats.inodes,
        "names": stats.names,
        "extents": stats.extents,
        "data_bytes": stats.data_bytes,
        "used_bytes": stats.used_bytes,
        "counts": counts,
        "findings": report.findings.iter().map(finding).collect::<Vec<_>>(),
    })
}

fn finding(finding: &Finding) -> Value {
    let path = finding.path.as_deref().map(String::from_utf8_lossy);
    let place =
        |place: &Place| json!({ "device": place.device, "name": place.name, "offset": place.at.0 });
    let places: Vec<Value> = finding.places.iter().map(place).collect();
    let fields = [
        ("id", Some(json!(finding.id))),
        ("severity", Some(json!(finding.severity.name()))),
        ("message", Some(json!(finding.message))),
        ("path", path.map(|path| json!(path))),
        ("tree", finding.spot.tree.map(|tree| json!(tree.0))),
        ("object", finding.spot.object.map(|object| json!(object))),
        ("address", finding.spot.addr.map(|addr| json!(addr.0))),
        ("places", (!places.is_empty()).then(|| json!(places))),
    ];
    fields.into_iter().filter_map(|(name, value)| Some((name.to_string(), value?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::check::{Rule, Spot};
    use fs_core::units::TreeId;

    fn report(of: &[(&Rule, u64)]) -> CheckReport {
        let findings = of.iter().map(|(rule, _)| Finding {
            id: rule.id,
            severity: rule.severity,
            message: rule.text.into(),
            spot: Spot::object(TreeId(256), 17),
            path: None,
            places: Vec::new(),
        });
        CheckReport {
            findings: findings.collect(),
            counts: of.iter().map(|(rule, count)| (rule.id, *count)).collect(),
            ..CheckReport::default()
        }
    }

    #[test]
    fn the_verdict_counts_by_severity_also_what_is_not_listed() {
        assert_eq!(verdict(&report(&[])), "no errors");
        let found =
            report(&[(&rules::LINK_COUNT, 500), (&rules::SPACE_LEAK, 2), (&rules::DATA, 1)]);
        assert_eq!(
            verdict(&found),
            "errors left: 1 with loss of data, 500 without loss of data, \
             2 of no consequence to users"
        );
        let more: Vec<_> = not_listed(&found).collect();
        assert_eq!(more, [("E-LINK-COUNT", 499), ("W-SPACE-LEAK", 1)]);
    }

    #[test]
    fn a_device_that_is_missing_is_not_called_of_no_consequence() {
        let found = report(&[(&rules::DEVICE_MISSING, 1), (&rules::SPACE_LEAK, 2)]);
        assert_eq!(
            verdict(&found),
            "errors left: 1 of devices that are missing or behind: less may fail now, \
             2 of no consequence to users"
        );
    }

    #[test]
    fn what_one_file_has_in_a_row_is_gathered() {
        let mut found = report(&[(&rules::DATA, 1), (&rules::LINK_COUNT, 1)]);
        let (row, last) = (found.findings[0].clone(), found.findings.pop().unwrap());
        found.findings = vec![row.clone(); 3];
        assert_eq!(lines(&found).len(), 3);
        found.findings.extend(vec![row.clone(); 497]);
        found.findings.push(last);
        let listed = lines(&found);
        assert_eq!(listed.len(), 3, "{listed:?}");
        assert_eq!(listed[0], row.to_string());
        assert_eq!(listed[1], "... and 499 more of E-DATA in the same place");
        // What is about no one file or tree is not in the same place.
        let missing = Finding { spot: Spot::NONE, ..row };
        found.findings = vec![missing; 5];
        assert_eq!(lines(&found).len(), 5);
    }

    #[test]
    fn json_leaves_out_what_is_not_known() {
        let json = json(&report(&[(&rules::LINK_COUNT, 1)]), "d", 1.0);
        assert_eq!(json["clean"], false);
        assert_eq!(json["worst"], "error");
        assert_eq!(json["counts"]["E-LINK-COUNT"], 1);
        assert_eq!(json["findings"][0]["object"], 17);
        assert!(json["findings"][0].get("path").is_none());
    }
}
