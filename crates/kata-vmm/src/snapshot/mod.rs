//! A machine in two files: written while it stands still, and started from as often as somebody likes.
//!
//! ```text
//!   state    {"format":1,"build":"…","length":…,"sum":"…"}     what decides whether the rest can be understood, and whether it is whole
//!            {"shape":…,"memory":…,"processor":…,…}            registers of CPUs and devices, a checksum of the memory
//!   memory   the RAM in the order of its addresses, with holes where it is zero (`memory`)
//!
//!   Machine::snapshot ─▶ State ─▶ write         read ─▶ State ─▶ compared with what the new machine is made of ─▶ Machine::new
//! ```
//!
//! | who has it | what is kept |
//! |---|---|
//! | `kvm` | registers of CPUs, interrupt controllers, clock; what the processor is |
//! | `pci` | configuration spaces, interrupts, the registers of each device's driver, where its queues are |
//! | `serial`, `cpus` | their registers |
//! | `virtio` | nothing: a device in which something would be lost keeps its machine from being written |
//!
//! Registers have no meaning beyond the build that wrote them, so there is no conversion from one to another: whoever keeps snapshots
//! makes new ones. Both files are their owner's, who is trusted; checksums tell damage, not forgery. That of the state is always
//! compared; that of the memory only if that is asked for, for it takes longer than a start.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod memory;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use memory::{Content, load, verify, write as write_memory};

use crate::kvm::{ControllerState, CpuState, Processor};
use crate::pci::BusState;
use crate::serial;

/// Version of the layout of both files.
pub const FORMAT: u32 = 1;
/// Which program this is.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "-", env!("KATA_VMM_BUILD"));
/// Most bytes of a state: some 30 KiB a CPU, of the most CPUs, and as much again.
const MOST: u64 = 16 << 20;
/// Most bytes of its first line.
const MOST_HEADER: usize = 4096;

/// Why a machine is not written, or does not start from what was.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// It is no snapshot, or not as it was written.
    #[error("the snapshot's {file} is damaged: {what}; make the snapshot anew")]
    Damaged {
        /// `state`, `memory`.
        file: &'static str,
        /// In what way.
        what: String,
    },
    /// Another build wrote it.
    #[error(
        "the snapshot is of another build of this program, {found}, and this is {BUILD}; make the snapshot anew"
    )]
    Build {
        /// Which one.
        found: String,
    },
    /// It was taken elsewhere.
    #[error("the snapshot is of another processor: {how}; make it anew on this one")]
    Processor {
        /// How they differ.
        how: String,
    },
    /// It is of another machine.
    #[error("the snapshot is of a machine with another {what}: {there}, and this one is to have {here}")]
    Machine {
        /// What differs.
        what: &'static str,
        /// In the snapshot.
        there: String,
        /// As was asked for.
        here: String,
    },
    /// The machine has what is not kept.
    #[error("the machine cannot be written to a snapshot: it has {what}")]
    Unsaved {
        /// What would be lost.
        what: &'static str,
    },
    /// It would overwrite something.
    #[error("the file for the snapshot's {file} is no empty regular file")]
    NotEmpty {
        /// `state`, `memory`.
        file: &'static str,
    },
    /// A file failed.
    #[error("the snapshot's {file} cannot be {action}")]
    File {
        /// `state`, `memory`.
        file: &'static str,
        /// `read`, `written`.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl SnapshotError {
    /// Whether no machine can start from it here.
    pub fn is_stale(&self) -> bool {
        use SnapshotError::{Build, Damaged, Machine, Processor};
        matches!(self, Damaged { .. } | Build { .. } | Processor { .. } | Machine { .. })
    }
}

fn failed(file: &'static str, action: &'static str) -> impl Fn(io::Error) -> SnapshotError {
    move |source| SnapshotError::File { file, action, source }
}

fn damaged(file: &'static str, what: impl std::fmt::Display) -> SnapshotError {
    SnapshotError::Damaged { file, what: what.to_string() }
}

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: u32,
    build: String,
    /// Bytes behind this line.
    length: u64,
    /// SHA-256 of these, in hexadecimal digits.
    sum: String,
}

/// What a machine was made of, as far as its guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// CPUs.
    pub cpus: u32,
    /// Most of them.
    pub max_cpus: u32,
    /// RAM in MiB.
    pub size_mib: u64,
    /// Most of it.
    pub max_mib: u64,
    /// Whether there is a serial port.
    pub console: bool,
}

impl Shape {
    /// What differs between the snapshot's machine and that which is to start from it.
    pub fn compare(&self, here: &Shape) -> Result<(), SnapshotError> {
        let fields = [
            ("number of virtual CPUs", u64::from(self.cpus), u64::from(here.cpus)),
            ("most virtual CPUs", u64::from(self.max_cpus), u64::from(here.max_cpus)),
            ("memory in MiB", self.size_mib, here.size_mib),
            ("most memory in MiB", self.max_mib, here.max_mib),
            ("number of serial ports", u64::from(self.console), u64::from(here.console)),
        ];
        match fields.into_iter().find(|(_, there, here)| there != here) {
            None => Ok(()),
            Some((what, there, here)) => {
                Err(SnapshotError::Machine { what, there: there.to_string(), here: here.to_string() })
            }
        }
    }
}

/// All that is in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// What the machine was made of.
    pub shape: Shape,
    /// What the memory file holds.
    pub memory: Content,
    /// What the host was.
    pub processor: Processor,
    /// CPUs in their order.
    pub cpus: Vec<CpuState>,
    /// The rest of what KVM has.
    pub controllers: ControllerState,
    /// How many CPUs the guest knows of.
    pub told: u32,
    /// The serial port.
    pub serial: Option<serial::Registers>,
    /// The bus with all devices.
    pub bus: BusState,
}

impl State {
    /// Whether a guest can go on with this processor.
    pub fn fits(&self, here: &Processor) -> Result<(), SnapshotError> {
        self.processor.difference(here).map_or(Ok(()), |how| Err(SnapshotError::Processor { how }))
    }

    /// Whether its parts fit each other.
    fn check(&self) -> Result<(), SnapshotError> {
        let cpus = u32::try_from(self.cpus.len()) == Ok(self.shape.cpus);
        let memory = self.shape.size_mib.checked_mul(1 << 20) == Some(self.memory.size);
        match cpus && memory && self.serial.is_some() == self.shape.console {
            true => Ok(()),
            false => Err(damaged("state", "its parts are not of one machine")),
        }
    }
}

/// Writes a state to an empty file.
pub fn write(file: &mut File, state: &State) -> Result<(), SnapshotError> {
    let sealed = seal(state).map_err(|e| failed("state", "written")(e.into()))?;
    file.write_all(&sealed).and_then(|()| file.sync_all()).map_err(failed("state", "written"))
}

/// Whether both files can be written to, before one of them is.
pub fn are_empty(state: &File, memory: &File) -> Result<(), SnapshotError> {
    is_empty("state", state).and_then(|()| is_empty("memory", memory))
}

/// Only a file in which nothing is lost is written to.
fn is_empty(what: &'static str, file: &File) -> Result<(), SnapshotError> {
    let known = file.metadata().map_err(failed(what, "written"))?;
    match known.is_file() && known.len() == 0 {
        true => Ok(()),
        false => Err(SnapshotError::NotEmpty { file: what }),
    }
}

/// A body with its header.
fn seal(body: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let body = serde_json::to_vec(body)?;
    let length = u64::try_from(body.len()).unwrap_or(u64::MAX);
    let header = Header { format: FORMAT, build: BUILD.to_owned(), length, sum: sum(&body) };
    Ok([&serde_json::to_vec(&header)?[..], b"\n", &body].concat())
}

/// Reads a state that this build wrote, and all of it.
pub fn read(file: &mut File) -> Result<State, SnapshotError> {
    let mut bytes = Vec::new();
    file.rewind().map_err(failed("state", "read"))?;
    file.take(MOST + 1).read_to_end(&mut bytes).map_err(failed("state", "read"))?;
    if u64::try_from(bytes.len()).map_or(true, |length| length > MOST) {
        return Err(damaged("state", format_args!("it has more than {MOST} bytes")));
    }
    serde_json::from_slice(open(&bytes)?).map_err(|e| damaged("state", e))
}

/// Reads a state, and looks whether the memory file fits it; with `verify` whether that is as it was written.
pub fn inspect(state: &mut File, memory: &File, verify: bool) -> Result<State, SnapshotError> {
    let state = read(state)?;
    state.check()?;
    memory::check(memory, &state.memory)?;
    if verify {
        memory::verify(memory, &state.memory)?;
    }
    Ok(state)
}

/// The body behind a header that fits it.
fn open(bytes: &[u8]) -> Result<&[u8], SnapshotError> {
    let end = bytes.iter().take(MOST_HEADER).position(|byte| *byte == b'\n');
    let parts = end.and_then(|end| Some((bytes.get(..end)?, bytes.get(end + 1..)?)));
    let (header, body) = parts.ok_or_else(|| damaged("state", "it has no first line"))?;
    // Another format may have another header: its number comes first.
    let value: serde_json::Value = serde_json::from_slice(header).map_err(|e| damaged("state", e))?;
    let format = value.get("format").and_then(serde_json::Value::as_u64);
    if format.is_some_and(|format| format != u64::from(FORMAT)) {
        let found = format!("of format {} instead of {FORMAT}", format.unwrap_or(0));
        return Err(SnapshotError::Build { found });
    }
    let header: Header = serde_json::from_value(value).map_err(|e| damaged("state", e))?;
    if header.build != BUILD {
        return Err(SnapshotError::Build { found: header.build.escape_debug().to_string() });
    }
    if u64::try_from(body.len()) != Ok(header.length) {
        return Err(damaged("state", format_args!("{} bytes of {} are there", body.len(), header.length)));
    }
    if sum(body) != header.sum {
        return Err(damaged("state", "its checksum does not fit"));
    }
    Ok(body)
}

fn sum(bytes: &[u8]) -> String {
    digits(&Sha256::digest(bytes))
}

fn digits(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
