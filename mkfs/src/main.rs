//! The `mkfs.cairn` command.

fn main() -> std::process::ExitCode {
    cairn_mkfs::main()
}
