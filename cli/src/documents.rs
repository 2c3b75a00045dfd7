//! Completions and manual pages, from the same definitions as the command lines.

use crate::{Done, Failure};
use clap_complete::Shell;
use std::fs;
use std::io;
use std::path::Path;

/// Every command of the project.
fn commands() -> [clap::Command; 3] {
    [crate::command(), cairn_mkfs::command(), cairn_fsck::command()]
}

/// Writes manual pages of section 8 for all commands and their verbs into `directory`.
///
/// # Errors
/// What the system says.
pub fn write_manual(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    commands().into_iter().try_for_each(|command| {
        let name = command.get_name().to_string();
        page(command, &name, directory)
    })
}

/// Writes a command's page and, for its verbs, pages named `COMMAND-VERB`.
fn page(command: clap::Command, name: &str, directory: &Path) -> io::Result<()> {
    let mut command = command.name(name.to_string()).disable_help_subcommand(true);
    command.build();
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        let name = format!("{name}-{}", verb.get_name());
        page(verb.clone(), &name, directory)?;
    }
    // The version is part of the page's footer in every other manual; a date would make builds
    // differ.
    let mut page = Vec::new();
    clap_mangen::Man::new(command).section("8").manual("cairn").render(&mut page)?;
    fs::write(directory.join(format!("{name}.8")), page)
}

/// Writes completions of all commands for bash, fish and zsh into `directory`.
///
/// # Errors
/// What the system says.
pub fn write_completions(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for mut command in commands() {
        let name = command.get_name().to_string();
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            clap_complete::generate_to(shell, &mut command, &name, directory)?;
        }
    }
    Ok(())
}

/// Prints completions of all commands.
pub(crate) fn print_completions(shell: Shell) -> Result<Done, Failure> {
    for mut command in commands() {
        let name = command.get_name().to_string();
        clap_complete::generate(shell, &mut command, name, &mut io::stdout());
    }
    Ok(Done::Whole)
}

pub(crate) fn run_manual(directory: &Path) -> Result<Done, Failure> {
    let failed = |error| Failure::new(format_args!("{}: {error}", directory.display()));
    write_manual(directory).map_err(failed)?;
    Ok(Done::Whole)
}
