//! The one configuration of the project: defaults in Rust, files, overrides, validation.
//!
//! ```text
//!  defaults ─▶ configuration.toml ─▶ config.d/*.toml ─▶ --set key=value ─▶ rules ─▶ Config
//!                     every fault of every layer is collected, none hides another
//! ```
//!
//! A setting has exactly one entry in the table of the `keys` module; reading, suggestions for misspelt keys and the
//! refusal of upstream's keys that are not carried all work off it.

pub mod artefacts;
mod endpoint;
mod error;
mod keys;
mod layers;
pub mod paths;
mod settings;
mod text;

pub use artefacts::{ArtefactError, Artefacts};
pub use endpoint::OtlpEndpoint;
pub use error::{ConfigError, ConfigErrors, Fault, Origin};
pub use layers::Sources;
pub use settings::{
    AcceleratorChoice, AgentSection, Config, HypervisorChoice, HypervisorSection, KataAgent, LogLevel,
    MachineType, Qemu, Runtime, SharedFs, UidRange, VirtioFsCache,
};

#[cfg(test)]
mod tests;
