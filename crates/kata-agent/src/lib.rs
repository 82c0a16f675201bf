//! The guest agent, as a library so that tests can drive its parts. The binary is a thin shell around [`boot::main`].
//!
//! ```text
//!  boot ─▶ serve ─▶ rpc ─────┬─▶ container   namespaces, cgroups, seccomp: the engine
//!   │        │               ├─▶ mount       storages, with modules loaded on demand
//!   │        ├─▶ log         │     └─▶ device   disks that the host plugs in
//!   │        ├─▶ forward     ├─▶ network     interfaces, routes and neighbours of the guest
//!   │        │               ├─▶ stdio ─▶ stream    bytes between processes and the host
//!   │        └─▶ console     ├─▶ services    what programs of the guest do for it
//!   │                        └─▶ reaper      who ended, and how
//!   └─ mounts, root, modules, settings: only as PID 1
//! ```
//!
//! What the kernel may keep waiting is done `aside`, wherever it belongs.

pub mod aside;
pub mod boot;
pub mod cmdline;
pub mod console;
pub mod container;
pub mod device;
pub mod entropy;
pub mod forward;
pub mod log;
pub mod modules;
pub mod mount;
pub mod network;
pub mod pause;
pub mod reaper;
pub mod rpc;
pub mod serve;
pub mod services;
pub mod stdio;
pub mod stream;

/// The error and its causes, joined with ": ".
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
