//! The processes of a guest, as the agent tells them.

use serde::{Deserialize, Serialize};

/// `log_type` of a `GetDiagnosticData` request that lists processes: ours, unknown to other agents.
///
/// The answer is a JSON array of [`GuestProcess`]; with a container's id, of that container alone.
pub const PROCESSES: &str = "processes";

/// A process of the guest with a program of its own: kernel threads are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestProcess {
    /// The container; empty for the guest's own.
    pub container: String,
    /// In the guest's pid namespace.
    pub pid: u32,
    /// In the innermost pid namespace, which is the container's.
    pub container_pid: u32,
    /// Of the parent, in the guest's pid namespace.
    pub parent_pid: u32,
    /// Effective user id.
    pub uid: u32,
    /// One letter, as in proc(5): `R`, `S`, `D`, `Z`, `T`, …
    pub state: String,
    /// Threads.
    pub threads: u32,
    /// User and system time since it began, in microseconds.
    pub cpu_time_us: u64,
    /// Resident memory, in bytes.
    pub rss_bytes: u64,
    /// Time since it began, in microseconds.
    pub age_us: u64,
    /// The command line; of a process without one, its name.
    pub command: Vec<String>,
}
