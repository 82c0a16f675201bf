//! `measured`: what a pod's machine is started with, as far as hardware measures it. What it answers is JSON, for `kata-ctl measure`.

use kata_config::{ArtefactError, Artefacts, Config, ConfigErrors, HypervisorChoice};
use kata_sandbox::BootError;
use thiserror::Error;

use crate::cli::SourceArgs;

#[derive(Debug, Error)]
pub(crate) enum MeasuredError {
    #[error("the configuration cannot be used:\n{0}")]
    Config(ConfigErrors),
    #[error(transparent)]
    Artefacts(ArtefactError),
    #[error(transparent)]
    Boot(Box<BootError>),
}

/// Answers on the standard output. This host need not be able to run the machine.
///
/// # Errors
/// The configuration is of no use, or there is nothing to boot.
pub(crate) fn run(sources: &SourceArgs) -> Result<(), MeasuredError> {
    let config = Config::load(&sources.sources()).map_err(MeasuredError::Config)?;
    let artefacts = Artefacts::locate(&config, HypervisorChoice::Qemu).map_err(MeasuredError::Artefacts)?;
    let measured =
        kata_sandbox::measured(&config, &artefacts).map_err(|error| MeasuredError::Boot(Box::new(error)))?;
    // The type is written to memory without fail.
    println!("{}", serde_json::to_string_pretty(&measured).unwrap_or_default());
    Ok(())
}
