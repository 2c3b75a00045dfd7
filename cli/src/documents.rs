//! Completions and manual pages, from the same definitions as the command lines.

use crate::{Done, Failure};
use clap_complete::Shell;
use fs_core::check::findings::rules;
use std::fs;
use std::io;
use std::path::Path;

/// Every command of the project.
fn commands() -> [clap::Command; 3] {
    [crate::command(), cairn_mkfs::command(), cairn_fsck::command()]
}

/// Writes manual pages for all commands and their verbs, and the one of findings, into `directory`.
///
/// # Errors
/// What the system says.
pub fn write_manual(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    commands().into_iter().try_for_each(|command| {
        let name = command.get_name().to_string();
        page(command, &name, directory)
    })?;
    fs::write(directory.join("cairn-errors.7"), findings())
}

/// The page of what fsck.cairn finds.
fn findings() -> String {
    let mut page = String::from(
        ".TH cairn-errors 7 \"\" \"\" cairn\n\
         .SH NAME\n\
         cairn\\-errors \\- what fsck.cairn finds, and what to do about it\n\
         .SH DESCRIPTION\n\
         Each finding has a permanent name. Those that begin with W are warnings: nothing is wrong \
         for users yet. The others are errors; with \\fIloss\\fR, names or data are gone, or will \
         be when the pool is written to.\n\
         .PP\n\
         A finding names the file if it is about one, and where it is known the bytes on the \
         devices. Cairn never causes any of them by losing power. They come from devices that lose \
         or change what they were given, from other programs that wrote to them, or from a fault \
         in cairn; the last is worth reporting, with the output of fsck.cairn \\-v.\n\
         .PP\n\
         Before anything else make a copy of the devices, if there is room for one: it is what \
         every later attempt can start from.\n\
         .SH FINDINGS\n",
    );
    for rule in rules::TABLE {
        let (id, severity) = (rule.id.replace('-', "\\-"), rule.severity.name());
        let text = rule.text.replace('-', "\\-");
        let advice = rule.advice.replace('-', "\\-");
        page += &format!(".TP\n\\fB{id}\\fR (\\fI{severity}\\fR)\n{text}.\n.br\n{advice}\n");
    }
    page += ".SH SEE ALSO\nfsck.cairn(8), cairn\\-inspect(8)\n";
    // A line that begins with one of these would be a request of the formatter.
    debug_assert!(rules::TABLE.iter().all(|rule| !rule.text.starts_with(['.', '\''])));
    page
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
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, name, &mut script);
        cairn_host::output::text(&String::from_utf8_lossy(&script));
    }
    Ok(Done::Whole)
}

pub(crate) fn run_manual(directory: &Path) -> Result<Done, Failure> {
    let failed = |error| Failure::new(format_args!("{}: {error}", directory.display()));
    write_manual(directory).map_err(failed)?;
    Ok(Done::Whole)
}
