//! Running the tools that a build cannot do without (apt, dpkg, make, …).

use std::ffi::OsStr;
use std::io;
use std::process::{Command, ExitStatus, Stdio};

/// Lines of a failed tool's output that its error carries.
const TAIL_LINES: usize = 12;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed, or cannot be started.
    #[error("cannot run {program}; {hint}")]
    Start {
        /// The program.
        program: String,
        /// What to do about it.
        hint: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It ended with an error.
    #[error("`{command}` failed ({status}): {output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its status.
        status: ExitStatus,
        /// The end of what it wrote.
        output: String,
    },
}

/// Runs `command` to its end and hands back its standard output. Messages are asked for in English, because they end up in
/// ours; `hint` says what to do when the program is not there.
pub fn run(command: &mut Command, hint: &'static str) -> Result<String, ToolError> {
    Ok(run_both(command, hint)?.0)
}

/// The same, and what it wrote to its standard error.
pub fn run_both(command: &mut Command, hint: &'static str) -> Result<(String, String), ToolError> {
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|source| {
        ToolError::Start { program: command.get_program().to_string_lossy().into_owned(), hint, source }
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    if output.status.success() {
        return Ok((out, errors));
    }
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    Err(ToolError::Failed {
        command: words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "),
        status: output.status,
        output: tail(&format!("{out}{errors}")),
    })
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n")
}
