//! Programs that go into an image: static, and for the right machine. And what the agent tells about itself.
//!
//! An agent says what the host has to know about it in the ELF section [`SECTION`], as a JSON object:
//! `{"version":"0.1.0","announces":true,"policy":false}`, with any number of trailing NULs. So a build need not run a program
//! that is made for a guest, and an agent of somebody else's, which has no such section, is told apart.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::Progress;
use super::elf::{Elf, ElfError, MACHINE_X86_64};
use crate::manifest::{Agent, hex};

/// The section with the facts.
pub const SECTION: &str = ".kata.agent";

/// Why a program cannot go into an image.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It cannot be read.
    #[error("cannot read the guest program {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not a program.
    #[error("the guest program {} is not a program", path.display())]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// It is for another kind of processor.
    #[error("the guest program {} is for another machine (ELF machine {machine})", path.display())]
    Machine {
        /// Its path.
        path: PathBuf,
        /// Its `e_machine`.
        machine: u16,
    },
    /// It needs libraries.
    #[error("the guest program {} is linked dynamically: the guest has no libraries, build it with `-C target-feature=+crt-static` and an explicit --target", path.display())]
    Dynamic {
        /// Its path.
        path: PathBuf,
    },
    /// Its facts make no sense.
    #[error("section {SECTION} of the guest program {} is malformed", path.display())]
    Facts {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// What an agent tells about itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts {
    version: String,
    announces: bool,
    /// It asks a policy.
    #[serde(default)]
    policy: bool,
}

/// A program that a guest can start.
#[derive(Debug)]
pub(super) struct Program {
    bytes: Vec<u8>,
    facts: Option<Facts>,
}

impl Program {
    /// Reads the program and makes sure that it would start in a guest.
    pub(super) fn read(path: &Path) -> Result<Self, ProgramError> {
        let path = path.to_path_buf();
        let bytes = fs::read(&path).map_err(|source| ProgramError::Read { path: path.clone(), source })?;
        let elf = Elf::parse(&bytes).map_err(|source| ProgramError::Elf { path: path.clone(), source })?;
        if cfg!(target_arch = "x86_64") && elf.machine() != MACHINE_X86_64 {
            return Err(ProgramError::Machine { path, machine: elf.machine() });
        }
        if elf.is_dynamic() {
            return Err(ProgramError::Dynamic { path });
        }
        let facts = elf.section(SECTION).map(|text| serde_json::from_slice(without_padding(text)));
        let facts = facts.transpose().map_err(|source| ProgramError::Facts { path, source })?;
        Ok(Self { bytes, facts })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// SHA-256 of the program.
    pub(super) fn digest(&self) -> String {
        hex(&Sha256::digest(&self.bytes))
    }

    /// What the manifest says about the agent that this is.
    pub(super) fn agent(&self, progress: Progress<'_>) -> Agent {
        let Some(Facts { version, announces, .. }) = self.facts.clone() else {
            progress(
                "the agent tells nothing about itself: hosts will dial it instead of waiting for its announcement",
            );
            return Agent::default();
        };
        Agent { version, announces }
    }

    /// Whether this says of itself that it asks no policy. Somebody else's agent says nothing.
    pub(super) fn denies_policy(&self) -> bool {
        self.facts.as_ref().is_some_and(|facts| !facts.policy)
    }

    /// Whether this is an agent that asks a policy.
    pub(super) fn has_policy(&self) -> bool {
        self.facts.as_ref().is_some_and(|facts| facts.policy)
    }
}

fn without_padding(section: &[u8]) -> &[u8] {
    let end = section.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    section.get(..end).unwrap_or_default()
}
