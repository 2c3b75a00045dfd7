//! stub
use crate::steps::Steps;
use anyhow::Result;
pub fn steps(_steps: &mut Steps, _subject: &str, _long: bool) -> Result<()> { Ok(()) }
