//! The agent that goes into an image, and what it tells about itself.
//!
//! An agent says what the host has to know about it in the ELF section [`SECTION`], as a JSON object:
//! `{"version":"0.1.0","announces":true}`, with any number of trailing NULs. So a build need not run a program that is made
//! for a guest, and an agent of somebody else's, which has no such section, is told apart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Progress;
use super::elf::{Elf, ElfError, MACHINE_X86_64};
use crate::manifest::{Agent, hex};

/// The section with the facts.
pub const SECTION: &str = ".kata.agent";

/// Why a program cannot be the agent of an image.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It cannot be read.
    #[error("cannot read the agent {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not a program.
    #[error("the agent {} is not a program", path.display())]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// It is for another kind of processor.
    #[error("the agent {} is for another machine (ELF machine {machine})", path.display())]
    Machine {
        /// Its path.
        path: PathBuf,
        /// Its `e_machine`.
        machine: u16,
    },
    /// It needs libraries.
    #[error("the agent {} is linked dynamically: the guest has no libraries, build it with `-C target-feature=+crt-static` and an explicit --target", path.display())]
    Dynamic {
        /// Its path.
        path: PathBuf,
    },
    /// Its facts make no sense.
    #[error("section {SECTION} of the agent {} is malformed", path.display())]
    Facts {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// An agent that a guest can start.
#[derive(Debug)]
pub(super) struct Program {
    bytes: Vec<u8>,
    facts: Option<Agent>,
}

impl Program {
    /// Reads the program and makes sure that it would start in a guest.
    pub(super) fn read(path: &Path) -> Result<Self, AgentError> {
        let path = path.to_path_buf();
        let bytes = fs::read(&path).map_err(|source| AgentError::Read { path: path.clone(), source })?;
        let elf = Elf::parse(&bytes).map_err(|source| AgentError::Elf { path: path.clone(), source })?;
        if cfg!(target_arch = "x86_64") && elf.machine() != MACHINE_X86_64 {
            return Err(AgentError::Machine { path, machine: elf.machine() });
        }
        if elf.is_dynamic() {
            return Err(AgentError::Dynamic { path });
        }
        let facts = elf.section(SECTION).map(|text| serde_json::from_slice(without_padding(text)));
        let facts = facts.transpose().map_err(|source| AgentError::Facts { path, source })?;
        Ok(Self { bytes, facts })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// SHA-256 of the program.
    pub(super) fn digest(&self) -> String {
        hex(&Sha256::digest(&self.bytes))
    }

    /// What the manifest says about the agent.
    pub(super) fn facts(&self, progress: Progress<'_>) -> Agent {
        self.facts.clone().unwrap_or_else(|| {
            progress("the agent tells nothing about itself: hosts will dial it instead of waiting for its announcement");
            Agent::default()
        })
    }
}

fn without_padding(section: &[u8]) -> &[u8] {
    let end = section.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    section.get(..end).unwrap_or_default()
}
