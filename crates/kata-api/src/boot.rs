//! What the agent says when it is ready to serve.

use serde::{Deserialize, Serialize};

/// One JSON line that the agent writes to the host's [`READY`](crate::ports::READY) port once it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Version of the agent's package.
    pub agent_version: String,
    /// Guest kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// What the guest did until now, in order of start.
    pub timeline: Vec<BootStage>,
}

/// A stage of the guest's boot, in microseconds since the guest kernel started its clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootStage {
    /// `kernel` or `agent`.
    pub layer: String,
    /// What was done, e.g. `load modules`.
    pub name: String,
    /// Start of the stage.
    pub start_us: u64,
    /// Length of the stage.
    pub duration_us: u64,
}
