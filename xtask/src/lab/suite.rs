//! Tests in the lab. They are built here; the lab has neither a compiler nor a network.
//!
//! ```text
//!  cargo nextest list ──▶ target/lab/binaries.json ─┐
//!  cargo metadata ──────▶ target/lab/metadata.json ─┼─▶ nextest in the lab ──▶ target/nextest/lab/junit.xml
//!  cargo-nextest ───────▶ target/lab/cargo-nextest ─┘
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Options, prepare};
use crate::products::{self, Profile};
use crate::shell::{self, ChoreError, at, cargo, tree};
use crate::unpacked::NEWER_CONTAINERD;
use crate::{Chores, packages, say, suite};

/// The runner's profile in `.config/nextest.toml`.
const PROFILE: &str = "lab";
/// What everything may take, in seconds.
const TIME_OF_ALL: u64 = 3 * 3600;
/// The same of the profile's choice: some hosts emulate nested machines three times slower than others.
const TIME_OF_CHOICE: u64 = 28 * 60;
/// How often the whole is tried again if the lab's machine itself goes down, which is said each time.
const AGAIN: usize = 1;
/// Every test that boots machines or needs a host with controllers.
const ALL: &str = "package(kata-testkit) & binary(/^vm_/) | package(kata-agent) & binary(=container)";

/// Runs the lab's choice, or all, or what the filter says, in a lab with an IOMMU or without; answers the runner's status.
pub fn run(all: bool, iommu: bool, filter: &[String]) -> Chores<u8> {
    packages::for_test()?;
    let mut environment = vec!["KATA_TEST_LAB=1".to_owned()];
    for (name, path) in suite::prepare()? {
        environment.push(format!("{name}={}", path.display()));
    }
    environment.extend(newer_containerd());
    // Which driver runs the pods: the same tests for each.
    environment
        .extend(std::env::var("KATA_TEST_HYPERVISOR").map(|name| format!("KATA_TEST_HYPERVISOR={name}")));
    say("building the tests");
    let command = runner(all, filter)?;
    let lab = prepare(Some(&suite::file_server()))?;
    let choice = !all && filter.is_empty();
    let options =
        Options { iommu, ..Options::with_timeout(if choice { TIME_OF_CHOICE } else { TIME_OF_ALL }) };
    let report = suite::report(PROFILE);
    if report.exists() {
        std::fs::remove_file(&report).map_err(at("remove", &report))?;
    }
    say("running them in the lab");
    let mut again = 0;
    let status = loop {
        match lab.run(&options, environment.clone(), command.clone()) {
            Err(error @ ChoreError::LabLost { .. }) if again < AGAIN => {
                again += 1;
                say(&format!("try {again} of {AGAIN} more: {}", shell::chain(&error)));
            }
            result => break result?,
        }
    };
    suite::tell_report(PROFILE)?;
    Ok(status)
}

/// The variable that says where containerd 2 is, copied into the source tree, which is all that the lab sees of this machine.
fn newer_containerd() -> Option<String> {
    let copied = NEWER_CONTAINERD.program().and_then(|containerd| {
        let dir = tree().join("target/lab/newer-containerd");
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        for program in [containerd.clone(), containerd.with_file_name("ctr")] {
            let copy = dir.join(program.file_name().unwrap_or_default());
            std::fs::copy(&program, &copy).map_err(at("copy to", &copy))?;
        }
        Ok(dir.join("containerd"))
    });
    match copied {
        Ok(program) => Some(format!("{}={}", suite::NEWER_CONTAINERD_VARIABLE, program.display())),
        Err(error) => {
            say(&format!("{} stays unset: {}", suite::NEWER_CONTAINERD_VARIABLE, shell::chain(&error)));
            None
        }
    }
}

/// The runner's command line, with everything that it needs in the source tree.
fn runner(all: bool, filter: &[String]) -> Chores<Vec<String>> {
    let dir = tree().join("target/lab");
    std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
    let (binaries, metadata) = (dir.join("binaries.json"), dir.join("metadata.json"));
    let mut list = cargo();
    list.args(["nextest", "list", "--workspace", "--cargo-profile", Profile::Quick.name()]);
    list.args(products::TESTED_FEATURES);
    list.args(["--list-type", "binaries-only", "--message-format", "json"]);
    for (file, command) in
        [(&binaries, &mut list), (&metadata, cargo().args(["metadata", "--format-version", "1"]))]
    {
        std::fs::write(file, shell::output(command)?).map_err(at("write", file))?;
    }
    let program = dir.join("cargo-nextest");
    std::fs::copy(nextest()?, &program).map_err(at("copy to", &program))?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut command = vec![text(&program), "nextest".to_owned(), "run".to_owned()];
    command.extend(["--profile".to_owned(), PROFILE.to_owned()]);
    command.extend(["--binaries-metadata".to_owned(), text(&binaries)]);
    command.extend(["--cargo-metadata".to_owned(), text(&metadata)]);
    if all || !filter.is_empty() {
        command.push("--ignore-default-filter".to_owned());
    }
    if all {
        command.extend(["-E".to_owned(), ALL.to_owned()]);
    }
    command.extend_from_slice(filter);
    Ok(command)
}

/// Where cargo finds its sub-command.
fn nextest() -> Chores<PathBuf> {
    let search = r#"PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin" command -v cargo-nextest"#;
    shell::output(Command::new("sh").args(["-c", search])).map(|path| PathBuf::from(path.trim()))
}
