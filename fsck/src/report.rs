//! What the check found, for people and for programs.

use crate::core_api::{CheckReport, Finding, Severity};
use crate::Arguments;
use cairn_host::parse::format_size;
use fs_core::error::Error;
use serde::Serialize;

#[derive(Serialize)]
struct Json<'a> {
    devices: &'a str,
    clean: bool,
    seconds: f64,
    nodes: u64,
    items: u64,
    inodes: u64,
    data_bytes: u64,
    findings: Vec<JsonFinding<'a>>,
}

#[derive(Serialize)]
struct JsonFinding<'a> {
    id: &'a str,
    severity: &'static str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    tree: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
}

pub(crate) fn print(report: &CheckReport, arguments: &Arguments, devices: &str, seconds: f64) {
    if arguments.json {
        println!("{:#}", serde_json::json!(json(report, devices, seconds)));
        return;
    }
    for finding in &report.findings {
        if finding.severity > Severity::Info || arguments.verbose > 0 {
            println!("{}", line(finding));
        }
    }
    println!("{devices}: {}", verdict(report));
    if arguments.verbose > 0 {
        println!(
            "{} tree nodes, {} items, {} inodes, {} of data",
            report.nodes,
            report.items,
            report.inodes,
            format_size(report.data_bytes)
        );
    }
    if arguments.timing > 0 {
        println!("{seconds:.2} s");
    }
}

/// A pool that cannot even be opened.
pub(crate) fn print_unopenable(error: &Error, arguments: &Arguments, devices: &str) {
    if !arguments.json {
        println!("{devices}: cannot be opened: {error}");
        return;
    }
    let message = error.to_string();
    let finding = JsonFinding {
        id: "unopenable",
        severity: "error",
        message: &message,
        tree: None,
        object: None,
        address: None,
        path: None,
    };
    let nothing = CheckReport::default();
    let json = Json { clean: false, findings: vec![finding], ..json(&nothing, devices, 0.0) };
    println!("{:#}", serde_json::json!(json));
}

fn verdict(report: &CheckReport) -> String {
    let count = |severity| report.findings.iter().filter(|f| f.severity == severity).count();
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    match (count(Severity::Error), count(Severity::Warning)) {
        (0, 0) => "no errors".into(),
        (errors, 0) => format!("{} left", plural(errors, "error")),
        (0, warnings) => plural(warnings, "warning"),
        (errors, warnings) => {
            format!("{} left, {}", plural(errors, "error"), plural(warnings, "warning"))
        }
    }
}

fn line(finding: &Finding) -> String {
    let mut text = format!("{} [{}] ", name(finding.severity), finding.id);
    if let Some(path) = &finding.path {
        text.push_str(&format!("{path}: "));
    }
    text.push_str(&finding.message);
    let mut places = Vec::new();
    places.extend(finding.tree.map(|tree| format!("tree {tree}")));
    places.extend(finding.object.map(|object| format!("object {object}")));
    places.extend(finding.addr.map(|addr| format!("address {addr}")));
    if !places.is_empty() {
        text.push_str(&format!(" ({})", places.join(", ")));
    }
    text
}

fn name(severity: Severity) -> &'static str {
    match severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Error => "error",
    }
}

fn json<'a>(report: &'a CheckReport, devices: &'a str, seconds: f64) -> Json<'a> {
    let findings = report.findings.iter().map(|finding| JsonFinding {
        id: finding.id,
        severity: name(finding.severity),
        message: &finding.message,
        tree: finding.tree.map(|tree| tree.0),
        object: finding.object,
        address: finding.addr.map(|addr| addr.0),
        path: finding.path.as_deref(),
    });
    Json {
        devices,
        clean: report.clean(),
        seconds,
        nodes: report.nodes,
        items: report.items,
        inodes: report.inodes,
        data_bytes: report.data_bytes,
        findings: findings.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fs_core::units::{Logical, TreeId};

    fn finding(severity: Severity) -> Finding {
        Finding {
            id: "link-count",
            severity,
            message: "has 2 names but counts 3".into(),
            tree: Some(TreeId(256)),
            object: Some(17),
            addr: Some(Logical(4096)),
            path: Some("/a/b".into()),
        }
    }

    #[test]
    fn a_line_names_severity_rule_path_and_place() {
        assert_eq!(
            line(&finding(Severity::Error)),
            "error [link-count] /a/b: has 2 names but counts 3 (tree 256, object 17, address 4096)"
        );
    }

    #[test]
    fn the_verdict_counts_what_matters() {
        let report = |severities: &[Severity]| CheckReport {
            findings: severities.iter().map(|s| finding(*s)).collect(),
            ..CheckReport::default()
        };
        assert_eq!(verdict(&report(&[Severity::Info])), "no errors");
        assert_eq!(verdict(&report(&[Severity::Error])), "1 error left");
        assert_eq!(
            verdict(&report(&[Severity::Error, Severity::Error, Severity::Warning])),
            "2 errors left, 1 warning"
        );
    }

    #[test]
    fn json_leaves_out_what_is_not_known() {
        let mut unknown = finding(Severity::Warning);
        (unknown.path, unknown.addr) = (None, None);
        let report = CheckReport { findings: vec![unknown], ..CheckReport::default() };
        let json = serde_json::json!(json(&report, "d", 1.0));
        assert_eq!(json["clean"], false);
        assert_eq!(json["findings"][0]["object"], 17);
        assert!(json["findings"][0].get("path").is_none());
    }
}
