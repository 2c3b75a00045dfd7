//! stub
use anyhow::Result;
pub fn run(_check: bool) -> Result<()> {
    Ok(())
}
