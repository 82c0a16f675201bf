//! What can go wrong with a machine, whichever driver runs it.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::{Quoted, VmExit};
use crate::builtin::BuiltinError;
use crate::host_devices::HostDeviceError;
use crate::process::{Exit, RecordError, SpawnError};
use crate::qemu::qmp::QmpError;
use crate::rest::ApiError;
use crate::vsock::VsockError;

/// What can go wrong with a virtual machine before and while it runs. Each says which layer failed and what to do.
#[derive(Debug, Error)]
pub enum HypervisorError {
    /// The driver or the machine type has no such operation.
    #[error("{operation} is not supported by {driver}")]
    Unsupported {
        /// What was asked.
        operation: &'static str,
        /// Driver and machine type.
        driver: String,
    },
    /// A field of the [`VmSpec`](super::VmSpec) makes no machine.
    #[error("virtual machine {id:?} cannot be started: {reason}")]
    InvalidSpec {
        /// The machine.
        id: String,
        /// Which field, and why.
        reason: String,
    },
    /// The operation does not fit what the machine is doing.
    #[error("{operation} is not possible: the virtual machine {state}")]
    WrongState {
        /// What was asked.
        operation: &'static str,
        /// `is not started`, `was started already`, `has ended`.
        state: &'static str,
    },
    /// A file that the VMM needs could not be opened or prepared.
    #[error("{what} {path:?} cannot be used{next}", path = .path.display(), next = remedy(.what))]
    File {
        /// `guest kernel`, `initrd`, `image`, `disk`, `vsock socket` and the like.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A process could not be started.
    #[error("the {name} process could not be started; {next}")]
    Start {
        /// `qemu`, `vsock`.
        name: &'static str,
        /// What to do about it.
        next: &'static str,
        /// Why.
        #[source]
        source: SpawnError,
    },
    /// The vsock back end could not be set up.
    #[error("the vsock back end could not be set up")]
    Vsock(#[from] VsockError),
    /// The VMM ended before it ran the guest: it refused its arguments, a device or the guest kernel.
    #[error("{program:?} ended before it ran the guest: it {exit}{quoted}", program = .program.display(), quoted = Quoted(.output))]
    Refused {
        /// The VMM.
        program: PathBuf,
        /// How it ended.
        exit: Exit,
        /// The tail of what it said.
        output: String,
    },
    /// A process that the VMM needs ended before the guest ran.
    #[error("the {name} process ended before the guest ran: it {exit}{quoted}", quoted = Quoted(.output))]
    BackEndLost {
        /// Which one: `vsock`.
        name: String,
        /// How it ended.
        exit: Exit,
        /// The tail of what it said.
        output: String,
    },
    /// The VMM runs and says nothing.
    #[error("{program:?} did not answer on its control socket within {bound:?}; it waits for {waits_for}{quoted}",
        program = .program.display(), quoted = Quoted(.output))]
    Unresponsive {
        /// The VMM.
        program: PathBuf,
        /// The bound that has passed.
        bound: Duration,
        /// What it probably waits for.
        waits_for: &'static str,
        /// The tail of what it said.
        output: String,
    },
    /// The host does not let the VMM use the accelerator, or the hardware behind it.
    #[error("{device} cannot be used by the VMM, which runs as user {uid}: {reason}", device = .device.display())]
    DeviceDenied {
        /// `/dev/kvm`, `/dev/sev`.
        device: PathBuf,
        /// The VMM's user.
        uid: u32,
        /// Why, and what to do.
        reason: String,
    },
    /// A [`Disk`](super::Disk) or [`Nic`](super::Nic) makes no device.
    #[error("device {id:?} cannot be added: {reason}")]
    InvalidDevice {
        /// The device.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A device of that name was added before.
    #[error("device {id:?} cannot be added: the virtual machine has a device of that name; remove it first")]
    DeviceExists {
        /// The device.
        id: String,
    },
    /// The machine was not started so that it could grow that far.
    #[error("the virtual machine cannot grow to {wanted}: {most}; {next}")]
    TooLarge {
        /// What was asked.
        wanted: String,
        /// What it can have.
        most: String,
        /// What to do about it.
        next: &'static str,
    },
    /// There is no room for another device.
    #[error(
        "device {id:?} cannot be added: all {slots} slots of the virtual machine are taken; remove a device first"
    )]
    NoFreeSlot {
        /// The device.
        id: String,
        /// How many slots there are.
        slots: usize,
    },
    /// No device of that name was added to the running machine. What it started with cannot be removed.
    #[error(
        "device {id:?} cannot be removed: no device of that name was added to the running virtual machine"
    )]
    UnknownDevice {
        /// The device.
        id: String,
    },
    /// The guest was asked to give a device back and did not.
    #[error(
        "device {id:?} cannot be removed: the guest did not let go of it within {bound:?}; see whether its kernel runs, then remove \
         it again"
    )]
    DeviceHeld {
        /// The device.
        id: String,
        /// The bound that has passed.
        bound: Duration,
    },
    /// The guest was given a CPU or memory, and did not take it.
    #[error(
        "the guest does not take the {what} that was added to its machine: {reason}; see whether its kernel can, and its console"
    )]
    NotTaken {
        /// `virtual CPU`, `memory`.
        what: &'static str,
        /// Its answer, or that there was none.
        reason: String,
    },
    /// A device of the host.
    #[error("the device of the host cannot be the guest's")]
    HostDevice(#[from] HostDeviceError),
    /// The control socket failed.
    #[error("QEMU's control socket failed")]
    Qmp(#[from] QmpError),
    /// The VMM's programming interface failed, or refused.
    #[error("the VMM does not do what it was asked")]
    Api(#[from] ApiError),
    /// The VMM has added a device and did not tell where.
    #[error("{driver} added a device and does not tell where: {said:?} is no place on its bus")]
    Place {
        /// The VMM.
        driver: &'static str,
        /// What it said instead.
        said: String,
    },
    /// The built-in VMM failed, or its socket.
    #[error("the virtual machine monitor does not do what it was asked")]
    Builtin(#[from] BuiltinError),
    /// The machine has ended.
    #[error("{0}")]
    Ended(VmExit),
    /// The leak record could not be written.
    #[error("the record of the pod's processes and files could not be written")]
    Record(#[from] RecordError),
}

impl HypervisorError {
    /// That `driver` cannot do `operation`, and what to do about it.
    pub(crate) fn unsupported(operation: &'static str, driver: &str, next: &str) -> Self {
        Self::Unsupported { operation, driver: format!("{driver}; {next}") }
    }
}

/// What to do about a file that cannot be used, as the end of a sentence.
fn remedy(what: &str) -> &'static str {
    match what {
        "guest kernel" => {
            "; set hypervisor.qemu.kernel to a file that can, or leave it out for the guest image's own"
        }
        "initrd" => {
            "; set hypervisor.qemu.initrd to a file that can, or leave it out for the guest image's own"
        }
        "firmware" => "; set hypervisor.qemu.firmware to a file that can, or leave it out for the VMM's own",
        "image" => {
            "; set hypervisor.qemu.image to a file that can, or leave it out for the guest image's own"
        }
        _ => "",
    }
}
