//! `version`: of this program, or of everything that a pod is made of.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kata_config::{ArtefactError, Artefacts, Config, Sources};
use kata_image::manifest::Manifest;
use serde::Serialize;

use super::Outcome;
use crate::cli::VersionArgs;
use crate::failure::chain;
use crate::output;
use crate::pod::SHIM;
use crate::table;

/// A part and its version.
#[derive(Debug, Serialize)]
pub struct Part {
    name: &'static str,
    /// `null` where it is not known.
    version: Option<String>,
    /// Where it is, or why it is not known.
    note: String,
}

/// Prints the versions.
pub fn run(args: &VersionArgs) -> Outcome {
    let own = env!("CARGO_PKG_VERSION");
    match (args.all, args.json) {
        (false, false) => output::print(&format!("kata-ctl {own}\n"))?,
        (false, true) => output::document(&serde_json::json!({ "version": own }))?,
        (true, json) => {
            // A configuration that cannot be read has other verbs to tell of it.
            let config = Config::load(&Sources::default()).unwrap_or_default();
            let parts = parts(&config);
            if json { output::document(&parts)? } else { output::print(&as_table(&parts))? }
        }
    }
    Ok(0)
}

/// Every part with its version, this program first.
pub fn parts(config: &Config) -> Vec<Part> {
    let exe = std::env::current_exe().map(|path| path.display().to_string()).unwrap_or_default();
    let mut parts =
        vec![Part { name: "kata-ctl", version: Some(env!("CARGO_PKG_VERSION").to_owned()), note: exe }];
    for (name, program) in [("owner", SHIM), ("kata-vmm", "kata-vmm"), ("kata-virtiofsd", "kata-virtiofsd")] {
        parts.push(of_artefact(name, Artefacts::program(program)));
    }
    parts.push(of_artefact("QEMU", Artefacts::qemu(config)));
    parts.extend(of_image(config));
    parts
}

fn of_artefact(name: &'static str, found: Result<PathBuf, ArtefactError>) -> Part {
    match found {
        Ok(path) => {
            Part { name, version: of_program(&path.to_string_lossy()), note: path.display().to_string() }
        }
        Err(error) => Part { name, version: None, note: chain(&error) },
    }
}

fn of_image(config: &Config) -> Vec<Part> {
    let unknown = |note: String| {
        ["agent", "guest kernel"].map(|name| Part { name, version: None, note: note.clone() }).into()
    };
    let dir = match Artefacts::guest_image(config) {
        Ok(dir) => dir,
        Err(error) => return unknown(chain(&error)),
    };
    let Some(dir) = dir else {
        return unknown("the configuration names kernel and root file system itself".to_owned());
    };
    match Manifest::load(&dir) {
        Ok(manifest) => {
            let known = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            vec![
                Part {
                    name: "agent",
                    version: known(&manifest.agent.version),
                    note: dir.display().to_string(),
                },
                Part {
                    name: "guest kernel",
                    version: known(&manifest.kernel.release),
                    note: manifest.kernel.provider,
                },
            ]
        }
        Err(error) => unknown(chain(&error)),
    }
}

/// The first thing in a program's answer to `--version` that looks like one.
pub fn of_program(path: &str) -> Option<String> {
    let output = Command::new(Path::new(path)).arg("--version").stdin(Stdio::null()).output().ok()?;
    first_version(&String::from_utf8_lossy(&output.stdout))
}

fn first_version(text: &str) -> Option<String> {
    let word = text
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.'))?;
    Some(word.trim_end_matches([',', ')']).to_owned())
}

fn as_table(parts: &[Part]) -> String {
    let line = |part: &Part| {
        let version = part.version.clone().unwrap_or_else(|| "-".to_owned());
        [part.name.to_owned(), version, part.note.clone()]
    };
    let lines: Vec<[String; 3]> = parts.iter().map(line).collect();
    table::columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022";
        assert_eq!(first_version(qemu).as_deref(), Some("7.2.22"));
        assert_eq!(first_version("kata-vmm 0.1.0\n").as_deref(), Some("0.1.0"));
        assert_eq!(first_version("no version at all"), None);
    }
}
