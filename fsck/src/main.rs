//! The `fsck.cairn` command.

fn main() -> std::process::ExitCode {
    cairn_fsck::main()
}
