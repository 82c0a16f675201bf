//! Paths and names inside the guest that both sides rely on.

/// Tag of the virtio-fs share that holds the pod's files.
pub const SHARE_TAG: &str = "kataShared";
/// Where the share is mounted in the guest.
pub const SHARE_DIR: &str = "/run/kata-containers/shared/containers";
/// Storage that lives as long as the sandbox (`shm`, ephemeral volumes).
pub const SANDBOX_DIR: &str = "/run/kata-containers/sandbox";
/// Per-container state of the agent.
pub const CONTAINER_DIR: &str = "/run/kata-containers";
