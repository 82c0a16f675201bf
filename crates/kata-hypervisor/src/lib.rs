//! Hypervisor drivers behind one small trait.
//!
//! ```text
//!   kata-sandbox ──▶ trait Vm ──┬─ builtin           this project's own VMM on KVM, `kata-vmm run`
//!                               ├─ qemu              q35 and microvm, KVM or TCG; driven over QMP
//!                               ├─ cloud_hypervisor  KVM; driven over HTTP
//!                               ├─ firecracker       KVM; driven over HTTP; neither shares files nor takes devices
//!                               └─ fake              no guest at all; for tests of what sits above
//!                      │
//!                      ├─ host      what this machine can run, and the choice that follows from it
//!                      ├─ life      the processes of one machine until their end, and why they ended
//!                      ├─ files     what a VMM is given as open descriptors
//!                      ├─ host_devices  PCI devices of the host that a guest has for itself
//!                      ├─ rest      what the drivers over HTTP have in common
//!                      ├─ slots     which device is plugged in where
//!                      ├─ process   the one way a child is started, watched, ended and recorded
//!                      └─ vsock     the back end of the guest's vsock device, `kata-vmm vsock`
//! ```
//!
//! A driver gets a [`VmSpec`], starts the processes that make up one virtual machine and tells how they ended. It knows
//! nothing of pods, containers or the agent.

mod builtin;
mod cloud_hypervisor;
pub mod fake;
mod files;
mod firecracker;
pub mod host;
mod host_devices;
mod life;
pub mod process;
mod qemu;
mod rest;
mod slots;
mod vm;
mod vsock;

pub use builtin::BuiltinError;
pub use host::{Choice, DriverKind, Host, Support, Tees};
pub use host_devices::{HostDevice, HostDeviceError};
pub use qemu::qmp::QmpError;
pub use rest::ApiError;
pub use vm::{
    Accelerator, Backing, Capabilities, Confidential, ConfidentialKind, Device, Disk, DiskLimits, Growth,
    HypervisorError, Layout, Machine, Nic, Origin, PciPath, ProcessInfo, SharedFs, Size, Template, Vm,
    VmExit, VmSpec,
};
pub use vsock::VsockError;

/// The kernel's whole command line in a confidential machine with these parameters, as its hardware measures it.
pub fn measured_command_line(kernel_params: &[String]) -> String {
    qemu::command_line::on_kvm(kernel_params)
}

/// The processor that SEV-SNP's machines have, as QEMU calls it. Its signature is measured.
pub const SNP_CPU: &str = qemu::confidential::SNP_CPU;

/// A driver of the given kind that runs nothing yet.
pub fn driver(kind: DriverKind) -> Box<dyn Vm> {
    match kind {
        DriverKind::Builtin => Box::new(builtin::BuiltinVm::new()),
        DriverKind::Qemu => Box::new(qemu::QemuVm::new()),
        DriverKind::CloudHypervisor => Box::new(cloud_hypervisor::CloudHypervisorVm::new()),
        DriverKind::Firecracker => Box::new(firecracker::FirecrackerVm::new()),
    }
}

#[cfg(test)]
mod tests;
