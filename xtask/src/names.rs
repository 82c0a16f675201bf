//! What the runtime and the agent must not know by name: components that a guest image may bring. They are reached by sockets of
//! the project's own contract, see docs/guest-services.md.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::shell::{self, ChoreError};
use crate::{Chores, say};

/// Programs and paths of the components, in no program of ours that runs on the host or is the agent.
const NAMES: [&str; 5] =
    ["attestation-agent", "confidential-data-hub", "api-server-rest", "confidential-containers", "cdh.sock"];

/// Looks into the built programs themselves: what comes by a dependency counts, too.
pub fn check(programs: &[PathBuf]) -> Chores {
    say("no program names what it must not know");
    let mut found = Vec::new();
    for program in programs {
        found
            .extend(named_in(program)?.into_iter().map(|name| format!("{} has {name:?}", program.display())));
    }
    if found.is_empty() { Ok(()) } else { Err(ChoreError::Found(found.join("\n       "))) }
}

fn named_in(program: &Path) -> Chores<Vec<String>> {
    let mut grep = Command::new("grep");
    grep.args(["--text", "--only-matching", "--no-filename", "--fixed-strings"]);
    grep.args(NAMES.iter().flat_map(|name| ["-e", name])).arg("--").arg(program);
    let output = grep.output().map_err(|source| shell::start_error(&grep, source))?;
    // 1 is that nothing was found.
    if !matches!(output.status.code(), Some(0 | 1)) {
        return Err(ChoreError::Failed { command: shell::line(&grep), status: output.status });
    }
    let mut names: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_wherever_it_is_in_a_program() {
        let program = std::env::temp_dir().join(format!("names-{}", std::process::id()));
        let found = |content: &[u8]| {
            std::fs::write(&program, content).unwrap();
            named_in(&program).unwrap()
        };
        let bad = found(b"\x7fELF\0/run/confidential-containers/cdh.sock\0");
        let good = found(b"\x7fELF\0/run/guest-services/image-pull.socket\0");
        std::fs::remove_file(&program).unwrap();
        assert_eq!(bad, ["cdh.sock", "confidential-containers"]);
        assert!(good.is_empty(), "{good:?}");
        assert!(named_in(&program).is_err());
    }
}
