//! The kernel module: built and tried in a virtual machine. It is not in this checkout yet.

/// What a command came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All done; a line that says what.
    #[expect(dead_code, reason = "nothing can be done without the module")]
    Done(String),
    /// Not possible here; why.
    Skipped(String),
}

/// Runs the command that `args` names.
///
/// # Errors
/// Always: there is nothing to run.
pub fn main(_args: &[String]) -> Result<(), String> {
    Err("the kernel module is not in this checkout".into())
}

/// Builds the module and lets it test itself in a virtual machine: the step of CI.
///
/// # Errors
/// Never.
pub fn smoke() -> Result<Outcome, String> {
    Ok(Outcome::Skipped("the kernel module is not in this checkout".into()))
}
