//! stub
use anyhow::Result;
use std::path::Path;
pub fn run(_prefix: &Path, _destdir: Option<&Path>) -> Result<()> {
    Ok(())
}
