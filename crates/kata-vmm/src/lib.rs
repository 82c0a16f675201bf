//! The project's own virtual devices, and the vhost-user back ends that lend them to other VMMs.

pub mod seccomp;
pub mod vhost_user;
pub mod vsock;
