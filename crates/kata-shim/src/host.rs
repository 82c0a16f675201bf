//! `host`: what this host can run pods with, and what would be chosen.

use std::path::Path;
use std::process::{Command, Stdio};

use kata_config::{ArtefactError, Artefacts, Config, ConfigErrors};
use kata_hypervisor::host::{Choice, DriverKind, Host, HostError, choose};
use rustix::event::Timespec;
use rustix::process::Pid;
use serde_json::{Value, json};
use thiserror::Error;

use crate::cli::HostArgs;
use crate::delete::left_within;
use crate::fault::chain;

/// How long the built-in monitor may take to try its jail. It does so in milliseconds.
const JAIL_BOUND: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

#[derive(Debug, Error)]
pub(crate) enum HostVerbError {
    #[error("the configuration cannot be used:\n{0}")]
    Config(ConfigErrors),
}

/// What was found, and for each thing that was not, why.
struct Findings {
    host: Host,
    qemu: Result<(), String>,
    choice: Result<Choice, HostError>,
    artefacts: Result<Artefacts, ArtefactError>,
    /// Whether the built-in monitor can be confined; `None` where it is not chosen.
    jail: Option<Result<(), String>>,
}

/// Prints what was found. A host that cannot run pods is an answer, not a failure.
pub(crate) fn run(args: &HostArgs) -> Result<(), HostVerbError> {
    let config = Config::load(&args.sources.sources()).map_err(HostVerbError::Config)?;
    let findings = look(&config);
    if args.json {
        println!("{:#}", as_json(&findings));
    } else {
        print!("{}", as_text(&findings));
    }
    Ok(())
}

fn look(config: &Config) -> Findings {
    let mut host = Host::probe();
    let qemu = Artefacts::qemu(config).map_err(|error| chain(&error)).and_then(|program| {
        host = host.clone().with_qemu(&program).map_err(|error| chain(&error))?;
        Ok(())
    });
    let choice = choose(config, &host);
    let driver = choice.as_ref().map_or(config.runtime.hypervisor_name, |choice| choice.driver.into());
    let artefacts = Artefacts::locate(config, driver);
    let builtin = choice.as_ref().is_ok_and(|choice| choice.driver == DriverKind::Builtin);
    let jail = artefacts.as_ref().ok().filter(|_| builtin).map(|found| jail(&found.kata_vmm, config));
    Findings { qemu, choice, artefacts, jail, host }
}

/// Has the built-in monitor try its jail, as a pod's user.
fn jail(program: &Path, config: &Config) -> Result<(), String> {
    let mut command = Command::new(program);
    command.arg("check").env_clear();
    if rustix::process::geteuid().is_root() {
        let user = config.runtime.uid_range.last;
        command.args(["--user", &format!("{user}:{user}")]);
    }
    finish(command, program, &JAIL_BOUND)
}

/// Runs a program that says on its standard error why it fails.
fn finish(mut command: Command, program: &Path, bound: &Timespec) -> Result<(), String> {
    let named = |error: std::io::Error| format!("{}: {error}", program.display());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(named)?;
    if !left_within(Pid::from_child(&child), bound) {
        // Not waited for: one that hangs in the kernel does not end by that either.
        let _ = child.kill();
        return Err(format!(
            "{} has not ended within {} s: the host is overloaded, or its kernel makes it wait; /proc/{}/stack tells for what",
            program.display(),
            bound.tv_sec,
            child.id()
        ));
    }
    let output = child.wait_with_output().map_err(named)?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().chars().take(500).collect()),
    }
}

fn as_json(findings: &Findings) -> Value {
    let artefacts = findings.artefacts.as_ref().ok().map(|found| {
        json!({
            "vmm": found.vmm,
            "kata_vmm": found.kata_vmm,
            "virtiofsd": found.virtiofsd,
            "guest_image": found.guest_image,
        })
    });
    json!({
        "host": findings.host,
        "qemu_error": findings.qemu.as_ref().err(),
        "choice": findings.choice.as_ref().ok(),
        "choice_error": findings.choice.as_ref().err().map(|error| chain(error)),
        "artefacts": artefacts,
        "jail": findings.jail.as_ref().map(Result::is_ok),
        "jail_error": findings.jail.as_ref().and_then(|jail| jail.as_ref().err()),
        "artefacts_error": findings.artefacts.as_ref().err().map(|error| chain(error)),
    })
}

fn as_text(findings: &Findings) -> String {
    let host = &findings.host;
    let qemu = match (&host.qemu, &findings.qemu) {
        (Some(qemu), _) => format!("{} at {}", qemu.version, qemu.path.display()),
        (None, Err(why)) => why.clone(),
        (None, Ok(())) => "not looked at".to_owned(),
    };
    let choice = findings.choice.as_ref().map_or_else(|error| chain(error), |choice| choice.reason.clone());
    let artefacts = findings.artefacts.as_ref().map_or_else(|error| chain(error), |_| "all found".to_owned());
    let jail = match &findings.jail {
        None => "not asked for: the built-in monitor is not chosen".to_owned(),
        Some(Ok(())) => "the built-in monitor can be confined".to_owned(),
        Some(Err(why)) => why.clone(),
    };
    format!(
        "KVM:        {}\nQEMU:       {qemu}\nCPUs:       {}\nmemory:     {} MiB\nartefacts:  {artefacts}\njail:       {jail}\nchoice:     {choice}\n",
        host.kvm, host.cpus, host.memory_mib
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_tries_the_jail_is_waited_for_within_a_bound() {
        let run = |script: &str, bound: i64| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            finish(command, Path::new("vmm"), &Timespec { tv_sec: bound, tv_nsec: 0 })
        };
        assert_eq!(run("true", 20), Ok(()));
        assert_eq!(run("echo no user >&2; exit 1", 20), Err("no user".to_owned()));
        assert!(run("exec sleep 60", 1).unwrap_err().contains("vmm has not ended within 1 s"));
    }
}
