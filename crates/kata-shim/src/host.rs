//! `host`: what this host can run pods with, and what would be chosen.

use kata_config::{ArtefactError, Artefacts, Config, ConfigErrors};
use kata_hypervisor::host::{Choice, Host, HostError, choose};
use serde_json::{Value, json};
use thiserror::Error;

use crate::cli::HostArgs;
use crate::fault::chain;

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
    Findings { qemu, choice: choose(config, &host), artefacts: Artefacts::locate(config), host }
}

fn as_json(findings: &Findings) -> Value {
    let artefacts = findings.artefacts.as_ref().ok().map(|found| {
        json!({
            "qemu": found.qemu,
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
    format!(
        "KVM:        {}\nQEMU:       {qemu}\nCPUs:       {}\nmemory:     {} MiB\nartefacts:  {artefacts}\nchoice:     {choice}\n",
        host.kvm, host.cpus, host.memory_mib
    )
}
