//! What callers hand in and get back: the nouns of a pod.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use kata_config::Config;
use kata_config::artefacts::Artefacts;
use kata_hypervisor::host::Choice;
use serde::{Deserialize, Serialize};

use crate::resources::ResourceSpec;
use crate::timeline::{BOOTED, COPIED, Layer, Stage};

/// What it takes to launch a pod.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// Name of the pod.
    pub id: String,
    /// The guest's host name; `None` for the pod's own name.
    pub hostname: Option<String>,
    /// The validated configuration.
    pub config: Config,
    /// Where the programs and the guest image are.
    pub artefacts: Artefacts,
    /// The pod's directory, `/run/kata/<id>`. It is made if its parent exists.
    pub run_dir: PathBuf,
    /// When the owner process began: zero of the [timeline](crate::Stage).
    pub started: Instant,
    /// The VMM driver and accelerator that were picked, and why.
    pub choice: Choice,
    /// The pod's network; `None` for a pod without one.
    pub network: Option<NetworkSpec>,
    /// What the pod may use of the host.
    pub resources: ResourceSpec,
}

/// The pod's network is what is in the network namespace of the calling process, now and after the hooks.
#[derive(Clone, Debug)]
pub struct NetworkSpec {
    /// Programs of the host that set the network up: the specification's `prestart` and `createRuntime` hooks.
    pub hooks: Vec<oci_spec::runtime::Hook>,
    /// The bundle, for the state that hooks are told.
    pub bundle: PathBuf,
    /// The network namespace that the calling process came from, where hooks run; `None` if that is the pod's.
    pub runtime_netns: Option<Arc<OwnedFd>>,
}

/// One container to create, as containerd's `Task.Create` describes it.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// Name of the container, unique in the pod.
    pub id: String,
    /// The OCI bundle: the rootfs is mounted at `<bundle>/rootfs`.
    pub bundle: PathBuf,
    /// The bundle's `config.json`.
    pub spec: oci_spec::runtime::Spec,
    /// Mounts that make up the root file system; empty when `<bundle>/rootfs` (or the spec's `root.path`) is ready.
    pub rootfs: Vec<RootfsMount>,
    /// The client's ends of the standard streams.
    pub stdio: Stdio,
}

/// One mount of a root file system, as containerd hands it over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// File system type, e.g. `overlay`, or `bind`.
    pub fs_type: String,
    /// Device, directory, or a word where the type takes none.
    pub source: String,
    /// Place below the rootfs; empty or `/` for the root itself.
    pub target: String,
    /// Options as in fstab: flags and file system options mixed.
    pub options: Vec<String>,
}

/// The client's ends of a process's standard streams.
///
/// A path names a FIFO, a regular file (created and appended to) or is a `file://` URI. `None` means no such stream:
/// the process gets `/dev/null`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Where the process's input comes from.
    pub stdin: Option<PathBuf>,
    /// Where its output goes; with a terminal, all of it.
    pub stdout: Option<PathBuf>,
    /// Where its error output goes; unused with a terminal.
    pub stderr: Option<PathBuf>,
    /// Whether the process gets a pseudo terminal.
    pub terminal: bool,
    /// Whether a reader that goes comes back, as containerd does when it is restarted: output then waits in the FIFO.
    /// Otherwise it is dropped while nobody reads.
    pub lasting: bool,
}

/// A container's first process, or one that was executed in it later.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// The exec, or `None` for the container's own process.
    pub exec: Option<String>,
}

impl ProcessId {
    /// The container's own process.
    pub fn init(container: impl Into<String>) -> Self {
        Self { container: container.into(), exec: None }
    }

    /// A process executed in the container.
    pub fn exec(container: impl Into<String>, exec: impl Into<String>) -> Self {
        Self { container: container.into(), exec: Some(exec.into()) }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "container {}", self.container),
            Some(exec) => write!(f, "exec {exec} of container {}", self.container),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code; 128 + signal for a process that a signal ended; 255 when its virtual machine ended under it.
    pub code: u32,
    /// When the host learnt of it.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Made, not started.
    Created,
    /// Started.
    Running,
    /// Started, and frozen.
    Paused,
    /// Ended; its [`Exit`] is known.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What is known of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// Where it is in its life.
    pub status: Status,
    /// The pid shown to clients: the owner's, since guest pids mean nothing on the host.
    pub pid: u32,
    /// The streams it was given.
    pub stdio: Stdio,
    /// How it ended, once it did.
    pub exit: Option<Exit>,
    /// Bundle of its container.
    pub bundle: PathBuf,
}

/// What happens in a pod, for those who listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A container was created or an exec registered.
    Created {
        /// Which.
        process: ProcessId,
    },
    /// A process was started.
    Started {
        /// Which.
        process: ProcessId,
    },
    /// A process ended. Its last output may still be on its way: [`delete`](crate::Sandbox::delete) waits for it.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// A container was frozen.
    Paused {
        /// The container's id.
        container: String,
    },
    /// A container was thawed.
    Resumed {
        /// The container's id.
        container: String,
    },
    /// A process was removed. Nothing follows of it.
    Deleted {
        /// Which.
        process: ProcessId,
        /// How it had ended.
        exit: Exit,
    },
    /// The guest's kernel killed something in this container for want of memory.
    Oom {
        /// The container's id.
        container: String,
    },
    /// The pod is over. Nothing follows.
    Stopped {
        /// Why, where it did not end by request.
        fault: Option<String>,
    },
}

/// Everything known about a pod. Maps one to one onto `kata.control.v1.Pod`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Name of the pod.
    pub id: String,
    /// `creating`, `ready`, `stopping` or `stopped`.
    pub state: String,
    /// The process that owns the pod.
    pub owner_pid: u32,
    /// The VMM, 0 when it does not run.
    pub vmm_pid: u32,
    /// Milliseconds since the epoch.
    pub created_at_ms: u64,
    /// Name of the driver.
    pub hypervisor: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why this VMM and this accelerator.
    pub choice: String,
    /// Release of the guest's kernel; empty until the agent announced it.
    pub guest_kernel: String,
    /// Version of the agent; empty until known.
    pub agent_version: String,
    /// The stages of the start, by start time.
    pub timeline: Vec<Stage>,
    /// The pod's containers.
    pub containers: Vec<ContainerView>,
    /// Why the pod ended, where it did not end by request.
    pub fault: Option<String>,
}

impl Inspection {
    /// Whether the machine started as a copy of a [template](crate::template); `None` before it runs.
    pub fn started_from_template(&self) -> Option<bool> {
        self.timeline.iter().find_map(|stage| match (stage.layer, stage.name.as_str()) {
            (Layer::Vmm, BOOTED) => Some(false),
            (Layer::Vmm, COPIED) => Some(true),
            _ => None,
        })
    }
}

/// A container as [`Inspection`] and `state.json` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerView {
    /// Name of the container.
    pub id: String,
    /// Where it is in its life.
    pub state: Status,
    /// Its command line.
    pub args: Vec<String>,
    /// Set once stopped.
    pub exit_code: Option<u32>,
    /// Milliseconds since the epoch, once stopped.
    pub exited_at_ms: Option<u64>,
}
