//! The one configuration of the project: defaults in Rust, files, overrides, validation.
//!
//! ```text
//!  defaults ─▶ configuration.toml ─▶ config.d/*.toml ─▶ environment ─▶ --set key=value ─▶ annotations ─▶ rules ─▶ Reading
//!                     every fault of every layer is collected, none hides another                                  │
//!                     notes, and what this version does not carry out ◀──── none of the latter: ─▶ Config ◀────────┘
//! ```
//!
//! A setting has exactly one row in the table of [`keys`]; reading, suggestions for misspelt keys, annotations, what is said
//! of keys that are not carried, and the generated reference all work off it.

pub mod annotations;
pub mod artefacts;
pub mod deprecation;
pub mod direct_volume;
mod endpoint;
mod error;
mod extension;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod keys;
mod layers;
pub mod paths;
mod settings;
mod text;

pub use artefacts::{ArtefactError, Artefacts};
pub use endpoint::OtlpEndpoint;
pub use error::{ConfigError, ConfigErrors, Fault, Note, Origin, Remark};
pub use extension::ExtensionImage;
pub use layers::{Met, Reading, Sources, Survey, Written, search};
pub use settings::{
    AcceleratorChoice, AgentSection, Config, EmptyDirMode, Factory, Feature, HugepageType, HypervisorChoice,
    HypervisorSection, InternetworkingModel, KataAgent, KernelParams, LogLevel, MachineType, Program, Qemu,
    Runtime, SharedFs, Tee, UidRange, VirtioFsCache, value_at,
};

#[cfg(test)]
mod tests;
