//! Everything that is checked without running the code.

use std::process::Command;

use crate::shell::{self, cargo, tree};
use crate::{Chores, deprecations, directions, docs, packages, say};

/// Runs all checks, the quick ones first.
pub fn run() -> Chores {
    let deny = packages::for_lint()?;
    say("formatting");
    shell::run(cargo().args(["fmt", "--all", "--check"]))?;
    directions::check()?;
    deprecations::check()?;
    docs::check()?;
    say("licences, sources and bans of dependencies");
    shell::run(Command::new(deny).current_dir(tree()).args([
        "--all-features",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    say("clippy");
    shell::run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    shell::run(cargo().args([
        "clippy",
        "-p",
        "kata-ctl",
        "--no-default-features",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    say("documentation");
    shell::run(
        cargo()
            .args(["doc", "--workspace", "--all-features", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}
