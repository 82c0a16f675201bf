//! containerd's side of the program: how it starts a pod's owner, learns of events, and cleans up after one that died.
//!
//! ```text
//!   containerd ── start ──▶ bootstrap ── bundle: a pod's first container? ──▶ serve, in the pod's network namespace
//!        │                      │                                              │ life: until containerd shuts it down
//!        │                      └── a further container: the address of the pod's owner
//!        ├── Sandbox, where it makes the pod (sandboxer) ─────────────────────▶ pod.sock
//!        ├── Task v2 / v3 ─────────────────────────────────────────────────────▶ pod.sock
//!        ◀── events ──────────────────────────────────────────────── publisher ◀┘
//!        └── delete ──▶ cleanup: what a dead owner left
//! ```

pub(crate) mod bootstrap;
mod bundle;
pub(crate) mod cleanup;
pub(crate) mod info;
pub(crate) mod invocation;
pub(crate) mod launch;
mod life;
mod netns;
pub(crate) mod pod_config;
mod publisher;
pub(crate) mod sandboxer;
mod sched_core;
pub(crate) mod serve;

#[cfg(test)]
mod tests;
