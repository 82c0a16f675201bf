//! The two containerds that differ in how they start and speak to a shim.

use std::path::Path;

/// What serves the CRI: costs start time, so only those have it who speak it.
const CRI: [&str; 3] =
    ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];
/// Plugins that no test here uses, and that cost start time or look for programs, modules and directories of the host.
const UNUSED: [&str; 5] = [
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.internal.v1.opt",
    "io.containerd.tracing.processor.v1.otlp",
];

/// What containerd waits for some seconds only, which a busy machine may need. A test that is about a bound keeps it itself.
const PATIENT: [&str; 3] = ["task.state", "shim.load", "shim.cleanup"];

/// A major version of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// 1.x: the shim prints an address and serves Task v2.
    V1,
    /// 2.x: the shim reads bootstrap parameters and may answer with JSON and serve Task v3.
    V2,
}

impl Version {
    /// The variable that holds the path of its program.
    pub(super) fn variable(self) -> &'static str {
        match self {
            Self::V1 => "KATA_TEST_CONTAINERD",
            Self::V2 => "KATA_TEST_NEWER_CONTAINERD",
        }
    }

    /// The beginning of its configuration, with the CRI or without.
    pub(super) fn config(self, root: &Path, state: &Path, socket: &Path, cri: bool) -> String {
        let disabled: Vec<&str> = UNUSED.iter().chain(CRI.iter().filter(|_| !cri)).copied().collect();
        let schema = match self {
            Self::V1 => 2,
            Self::V2 => 3,
        };
        format!(
            "version = {schema}\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = {disabled:?}\n\
             [grpc]\naddress = {socket:?}\n[debug]\nlevel = \"debug\"\n[timeouts]\n{}",
            PATIENT.map(|bound| format!("\"io.containerd.timeout.{bound}\" = \"60s\"\n")).concat()
        )
    }
}
