//! Everything that can be wrong before the pod exists: the configuration, the programs and the guest image, the host.

use kata_config::{ArtefactError, Artefacts, Config, ConfigErrors, Sources};
use kata_hypervisor::host::{Choice, Host, HostError, choose};
use thiserror::Error;

#[derive(Debug, Error)]
pub(crate) enum PlanError {
    #[error("the configuration cannot be used:\n{0}")]
    Config(ConfigErrors),
    #[error(transparent)]
    Artefacts(ArtefactError),
    #[error(transparent)]
    Host(HostError),
}

/// What a pod will be made with.
pub(crate) struct Plan {
    pub(crate) config: Config,
    pub(crate) artefacts: Artefacts,
    pub(crate) choice: Choice,
}

impl Plan {
    pub(crate) fn make(sources: &Sources) -> Result<Self, PlanError> {
        let config = Config::load(sources).map_err(PlanError::Config)?;
        let choice = choose(&config, &Host::probe()).map_err(PlanError::Host)?;
        let artefacts = Artefacts::locate(&config, choice.driver.into()).map_err(PlanError::Artefacts)?;
        Ok(Self { config, artefacts, choice })
    }
}
