//! Stands in for `fs_core::check` until the checker is there. To be replaced by
//! `use fs_core::check::{check, CheckOptions, CheckProgress, CheckReport, Finding, Severity};`.
#![allow(missing_docs, dead_code, reason = "replaced by the checker's own definitions")]

use fs_core::error::Error;
use fs_core::platform::{DeviceRef, Platform, Result};
use fs_core::units::{Logical, TreeId};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Info,
    Warning,
    Error,
}

pub struct Finding {
    pub id: &'static str,
    pub severity: Severity,
    pub message: String,
    pub tree: Option<TreeId>,
    pub object: Option<u64>,
    pub addr: Option<Logical>,
    pub path: Option<String>,
}

#[derive(Default)]
pub struct CheckReport {
    pub findings: Vec<Finding>,
    pub nodes: u64,
    pub items: u64,
    pub inodes: u64,
    pub data_bytes: u64,
}

impl CheckReport {
    pub fn clean(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity == Severity::Info)
    }
}

pub struct CheckOptions {
    pub verify_data: bool,
}

pub trait CheckProgress: Sync {
    fn progress(&self, pass: u32, done: u64, total: u64);
}

pub fn check(
    _devices: Vec<DeviceRef>,
    _platform: Platform,
    _options: &CheckOptions,
    _progress: &dyn CheckProgress,
) -> Result<CheckReport> {
    Err(Error::Argument { what: "this build has no checker" })
}
