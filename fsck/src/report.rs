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
    report.findings.iter().for_each(|finding| say!("{finding}"));
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

/// How many findings of a severity there were, listed or not.
fn count(report: &CheckReport, severity: Severity) -> u64 {
    let of_severity =
        |id: &str| rules::TABLE.iter().any(|rule| rule.id == id && rule.severity == severity);
    report.counts.iter().filter(|(id, _)| of_severity(id)).map(|(_, count)| count).sum()
}

fn verdict(report: &CheckReport) -> String {
    if report.is_clean() {
        return "no errors".into();
    }
    let words = [
        (Severity::Loss, "with loss of data"),
        (Severity::Error, "without loss of data"),
        (Severity::Warning, "of no consequence to users"),
    ];
    let parts: Vec<String> = words
        .into_iter()
        .map(|(severity, word)| (count(report, severity), word))
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
    fn json_leaves_out_what_is_not_known() {
        let json = json(&report(&[(&rules::LINK_COUNT, 1)]), "d", 1.0);
        assert_eq!(json["clean"], false);
        assert_eq!(json["worst"], "error");
        assert_eq!(json["counts"]["E-LINK-COUNT"], 1);
        assert_eq!(json["findings"][0]["object"], 17);
        assert!(json["findings"][0].get("path").is_none());
    }
}
