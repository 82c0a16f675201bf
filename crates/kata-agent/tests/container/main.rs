//! Real containers on this machine: the engine with the built agent as its helper and busybox as the root.
//!
//! They need root, a cgroup v2 hierarchy (an empty one will do) and a static `/bin/busybox`; without, each test says
//! why it is skipped. `KATA_AGENT_PROGRAM` names another build of the agent to test.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of this is test code, also what is outside of test functions"
)]

mod world;

mod exec;
mod figures;
mod hooks;
mod isolation;
mod lifecycle;
mod limits;
mod mounts;
mod replay;
mod rights;
mod terminal;
