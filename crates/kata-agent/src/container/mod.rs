//! The container engine of the guest: namespaces, mounts, cgroups and seccomp, without a runtime binary.
//!
//! ```text
//!  agent (async, many tasks)        template         helper                       init
//!  NativeEngine::new ─ spawns ────▶ waits for work
//!  plan = Plan::of(spec)  ── refused, or whole
//!  cgroup made, limits and device filter set
//!  a socket ──────────────────────▶ forks ─────────▶ reads request and fds
//!                       ◀── seccomp filter ───────── compiles the profile
//!                       ◀── pid ──────────────────── clone3(INTO_CGROUP) ───────▶ mounts, pivot_root,
//!                                                    exits                        terminal, ids, lookup
//!                       ◀── master of a terminal ────────────────────────────────
//!                       ◀── ready ─────────────────────────────────────────────── waits at the gate
//!  start: opens the gate  ──────────────────────────────────────────────────────▶ seccomp, capabilities, execve
//!                       ◀── socket closed by exec, or the error ─────────────────
//! ```
//!
//! The agent itself never forks: a process with many threads and a heap must not run code between fork and exec. The
//! template and its helpers have one thread, so their children may. All are cloned with `CLONE_PARENT`, which makes
//! them children of the agent: it gets the exit status of a container's processes first hand.
//!
//! What a spec asks for and this engine does not do is refused by [`EngineError::Unsupported`] before anything is
//! made. Hooks that belong to the host side (`prestart`, `createRuntime`, `poststart`, `poststop`) are the business of
//! the runtime there and are not looked at; for the others see `hooks`.

use std::os::fd::OwnedFd;
use std::path::Path;

use async_trait::async_trait;
use kata_api::agent::CgroupStats;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::process::{Pid, Signal};

mod capabilities;
mod cgroup;
mod child;
mod devices;
mod engine;
mod error;
mod filesystem;
mod hooks;
mod init;
mod lookup;
mod namespaces;
mod plan;
mod restrictions;
mod rootfs;
mod seccomp;
mod template;
mod terminal;
mod tree;
mod wire;

pub use cgroup::{CgroupError, OomEvents};
pub use child::helper_main;
pub use engine::{Layout, NativeEngine};
pub use error::{EngineError, Fault};
pub use namespaces::PodNamespaces;
pub use rootfs::make_root_pivotable;

/// `argv[0]` of the helper process. `main` calls [`helper_main`] when it sees this, before anything else.
pub const HELPER_NAME: &str = "kata-agent-container";

/// The standard streams of a process without a terminal. `None` is `/dev/null`. With `process.terminal` none of this is
/// looked at: the terminal is all three.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// Read end of a pipe.
    pub stdin: Option<OwnedFd>,
    /// Write end of a pipe.
    pub stdout: Option<OwnedFd>,
    /// Write end of a pipe.
    pub stderr: Option<OwnedFd>,
}

/// A process that was made.
#[derive(Debug)]
pub struct Spawned {
    /// By the agent's pid namespace. It is a child of the agent: register it with the reaper.
    pub pid: Pid,
    /// With `process.terminal`, the master of the process's terminal, which lives in the container's own devpts and is
    /// as large as `process.consoleSize` says.
    pub terminal: Option<OwnedFd>,
}

/// Runs containers in this guest. All methods may be called at the same time, for one container or many.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Makes the container and its init, which waits before its `execve` with everything else done.
    ///
    /// `bundle` is what a relative `root.path` is relative to. Nothing is left behind when this fails or is dropped
    /// halfway.
    ///
    /// # Errors
    /// Spec refused, command not found or not executable, or the step of the setup that failed.
    async fn create(
        &self,
        id: &str,
        spec: &Spec,
        bundle: &Path,
        io: ProcessIo,
    ) -> Result<Spawned, EngineError>;

    /// Lets the init run; returns once its `execve` has succeeded.
    ///
    /// # Errors
    /// Unknown container, started before, or `execve` failed (the init is gone then).
    async fn start(&self, id: &str) -> Result<(), EngineError>;

    /// Runs another process in the container and returns once its `execve` has succeeded (it may have ended already).
    ///
    /// # Errors
    /// As [`create`](Self::create); also a container whose init has ended or that is paused.
    async fn exec(&self, id: &str, process: &Process, io: ProcessIo) -> Result<Spawned, EngineError>;

    /// Sends `signal` to every process of the container, those of execs included.
    ///
    /// # Errors
    /// Unknown container; a cgroup file that cannot be read or written.
    async fn signal_all(&self, id: &str, signal: Signal) -> Result<(), EngineError>;

    /// Freezes all processes; returns when the last one is frozen.
    ///
    /// # Errors
    /// Unknown container; [`CgroupError::TimedOut`] where the kernel does not get there.
    async fn pause(&self, id: &str) -> Result<(), EngineError>;

    /// Thaws what [`pause`](Self::pause) froze.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    async fn resume(&self, id: &str) -> Result<(), EngineError>;

    /// Changes the limits that `resources` names and leaves the others alone.
    ///
    /// # Errors
    /// Unknown container, a limit that is not supported, a controller that the guest kernel lacks.
    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), EngineError>;

    /// Usage by the container's cgroup. Controllers that the kernel lacks are absent from the answer.
    ///
    /// # Errors
    /// Unknown container; a cgroup file that cannot be read.
    async fn stats(&self, id: &str) -> Result<CgroupStats, EngineError>;

    /// The container's processes, by the agent's pid namespace.
    ///
    /// # Errors
    /// Unknown container; a cgroup file that cannot be read.
    async fn pids(&self, id: &str) -> Result<Vec<Pid>, EngineError>;

    /// Kills what is left of the container, waits for its end (bounded) and removes its cgroup.
    ///
    /// # Errors
    /// Unknown container; [`CgroupError::TimedOut`] where a process cannot be killed.
    async fn delete(&self, id: &str) -> Result<(), EngineError>;

    /// The container's out-of-memory kills from now on.
    ///
    /// # Errors
    /// Unknown container; a kernel without the memory controller.
    fn oom_events(&self, id: &str) -> Result<OomEvents, EngineError>;
}
