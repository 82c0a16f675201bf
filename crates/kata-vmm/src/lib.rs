//! The project's own virtual machine monitor, its virtual devices, and the vhost-user back ends that lend them to other VMMs.
//!
//! ```text
//!   client ─▶ server ─▶ machine ─┬─ memory, boot, acpi    what the guest finds
//!                                ├─ kvm                   CPUs, interrupts, doorbells
//!                                ├─ snapshot              the machine in files
//!                                ├─ bus ─▶ pci ─▶ virtio  what the guest reaches, and the threads that serve it
//!                                │           └──▶ vfio, dma   devices of the host, and the memory that they reach
//!                                └─ power, serial, generation   the rest of a PC that is left
//!   around all of it: jail, seccomp
//! ```

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cpus;
pub mod dma;
pub mod events;
pub mod generation;
pub mod jail;
pub mod kvm;
pub mod log;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod power;
pub mod seccomp;
pub mod serial;
pub mod server;
pub mod snapshot;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vhost_user;
pub mod virtio;
pub mod vsock;

/// An error with all its causes, for people.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
