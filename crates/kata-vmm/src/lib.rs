//! The project's own virtual machine monitor, its virtual devices, and the vhost-user back ends that lend them to other VMMs.

pub mod bus;
pub mod events;
pub mod pci;
pub mod seccomp;
pub mod vhost_user;
pub mod virtio;
pub mod vsock;
