//! KVM: the machine in the kernel, what interrupts it, and its CPUs.
//!
//! ```text
//!   /dev/kvm ──▶ Hypervisor ── memory slots, APICs
//!                   ├──▶ Router   irqfd, ioeventfd, the table of interrupts     (crate::events::Events)
//!                   ├──▶ Lending  pages and groups of devices of the host
//!                   └──▶ Cpu      registers at boot, memory mapped ahead, the loop of exits, one thread each
//! ```

mod cpu;
mod cpuid;
#[cfg(feature = "vfio")]
mod lending;
mod prefault;
mod router;
mod state;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{KVM_API_VERSION, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

pub use cpu::{Buses, Cpu, CpuThread, End, Ending, State};
#[cfg(feature = "vfio")]
pub use lending::Lending;
pub use router::Router;
pub use state::{ControllerState, CpuState, Processor};

/// Three pages that KVM wants on Intel's processors for real mode, and one for its tables: in the hole, above the APICs.
const TASK_STATE: usize = 0xfffb_d000;

/// Extensions without which there is no machine, and what they are for.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::Irqfd, "interrupts by descriptors"),
    (Cap::Ioeventfd, "doorbells by descriptors"),
    (Cap::UserMemory, "memory of a process"),
    (Cap::SetTssAddr, "a place for its task state"),
    (Cap::TscDeadlineTimer, "timers by the time stamp counter"),
];

/// Why KVM runs no machine.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` does not open.
    #[error("/dev/kvm does not open; is there hardware virtualisation, and may this user use it?")]
    Open(#[source] io::Error),
    /// It is no KVM, or one that nobody has had for long.
    #[error("/dev/kvm speaks version {0} of its interface, and not {KVM_API_VERSION}")]
    Version(i32),
    /// This KVM lacks something.
    #[error("this host's KVM lacks {what}; use a newer kernel, or QEMU")]
    Lacks {
        /// What it is for.
        what: &'static str,
    },
    /// More CPUs than it runs.
    #[error("{wanted} virtual CPUs are more than this host's KVM runs in a machine, {most}")]
    Cpus {
        /// What was asked for.
        wanted: u32,
        /// Most that it has.
        most: usize,
    },
    /// It refused.
    #[error("KVM cannot {action}")]
    Refused {
        /// What it was asked for.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A register that a snapshot needs.
    #[error(
        "this host's KVM does not set register {number:#x} of the processor's model to {value:#x}, as the snapshot has it"
    )]
    Register {
        /// Which one.
        number: u32,
        /// What it was to be.
        value: u64,
    },
    /// Time would go faster or slower.
    #[error("time stamps count {here} kHz here, and {there} kHz where the snapshot was taken")]
    Rate {
        /// Here.
        here: u32,
        /// There.
        there: u32,
    },
    /// The guest is a host.
    #[error("the guest runs virtual machines of its own, which no snapshot keeps")]
    Nested,
    /// A thread could not be started.
    #[error("the thread of virtual CPU {index} cannot be started")]
    Thread {
        /// Which one.
        index: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The error of an ioctl that was to do `action`.
fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Refused { action, source: io::Error::from_raw_os_error(e.errno()) }
}

/// A KVM that is one, and has what is needed.
fn checked(kvm: OwnedFd) -> Result<Kvm, KvmError> {
    // SAFETY: the descriptor is open and from here on belongs to `kvm` alone. Should it be none of KVM's, its ioctls fail.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::Version(version));
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, what)) => Err(KvmError::Lacks { what }),
        None => Ok(kvm),
    }
}

/// A machine in the kernel, without CPUs yet.
pub struct Hypervisor {
    kvm: Kvm,
    machine: Arc<VmFd>,
}

impl Hypervisor {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<OwnedFd, KvmError> {
        let file = File::options().read(true).write(true).open("/dev/kvm").map_err(KvmError::Open)?;
        Ok(file.into())
    }

    /// What processor the CPUs of a machine are that is made with an open `/dev/kvm`.
    pub fn processor_of(kvm: OwnedFd) -> Result<Processor, KvmError> {
        Processor::of(&checked(kvm)?)
    }

    /// A machine with this memory, made with an open `/dev/kvm`.
    pub fn new(kvm: OwnedFd, memory: &GuestMemoryMmap) -> Result<Hypervisor, KvmError> {
        let kvm = checked(kvm)?;
        let machine = kvm.create_vm().map_err(refused("make a machine"))?;
        machine.set_tss_address(TASK_STATE).map_err(refused("place its task state"))?;
        machine.create_irq_chip().map_err(refused("make interrupt controllers"))?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let part = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a whole mapping of guest memory. The machine owns a handle on all of them as long as there
            // are CPUs that could reach it (`machine::Machine`), and nothing in this process holds references into it.
            unsafe { machine.set_user_memory_region(part) }
                .map_err(refused("give the machine its memory"))?;
        }
        Ok(Hypervisor { kvm, machine: Arc::new(machine) })
    }

    /// Interrupts and doorbells of this machine.
    pub fn router(&self) -> Arc<Router> {
        Arc::new(Router::new(Arc::clone(&self.machine)))
    }

    /// What is for devices of the host.
    #[cfg(feature = "vfio")]
    pub fn lending(&self) -> Arc<Lending> {
        Arc::new(Lending::new(Arc::clone(&self.machine)))
    }

    /// What processor its CPUs are.
    pub fn processor(&self) -> Result<Processor, KvmError> {
        Processor::of(&self.kvm)
    }

    /// How many bits physical addresses of the guest have.
    pub fn address_bits(&self) -> Result<u32, KvmError> {
        Ok(cpuid::address_bits(&cpuid::supported(&self.kvm)?))
    }

    /// Its interrupt controllers and clock, for a snapshot; all CPUs stand still.
    pub fn save(&self) -> Result<ControllerState, KvmError> {
        ControllerState::of(&self.machine)
    }

    /// From a snapshot: the CPUs that [`Hypervisor::cpus`] made, in their order, and all else. Nothing runs yet.
    pub fn restore(
        &self,
        cpus: &[Cpu],
        states: &[CpuState],
        controllers: &ControllerState,
    ) -> Result<(), KvmError> {
        if let Some(first) = states.first() {
            cpus.iter().zip(states).try_for_each(|(cpu, state)| cpu.put(state, first))?;
        }
        controllers.put(&self.machine)
    }

    /// CPUs of these numbers, of a machine that can have `most`; they stand still. KVM makes each once and never again: whoever gets
    /// one has to keep it.
    pub fn cpus(
        &self,
        numbers: Range<u32>,
        most: u32,
    ) -> Result<impl Iterator<Item = Result<Cpu, KvmError>> + '_, KvmError> {
        let host = self.kvm.get_max_vcpus();
        if usize::try_from(most).map_or(true, |most| most > host) {
            return Err(KvmError::Cpus { wanted: most, most: host });
        }
        let supported = cpuid::supported(&self.kvm)?;
        Ok(numbers.map(move |number| Cpu::new(&self.machine, &supported, number, most)))
    }
}
