//! The machine: from what it is to be made of to its end.
//!
//! ```text
//!   MachineSpec, descriptors ─▶ memory ─▶ KVM ─▶ PCI bus, devices ─▶ CPUs ─▶ kernel, ACPI, or a snapshot's state ─▶ they stand still
//!        boot ─▶ they run ◀─ pause / resume ─▶ they stand still, and so do the devices
//!                   │ add and remove devices, add CPUs: the bus or a register changes, the event tells the guest
//!                   │                                   └ snapshot: written to files
//!                   └ power, reset, a CPU's fault, a lost device ─▶ Ending
//! ```

mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod monitor;
mod passing;
mod snapshot;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kata_vmm_api::{Descriptor, DiskSpec, HostDeviceSpec, MachineSpec, NicSpec, Size, Start};
use thiserror::Error;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{AcpiError, EVENT_PIN};
use crate::boot::BootError;
use crate::bus::{Bus, BusError, Device};
use crate::chain;
use crate::cpus::{self, Present};
use crate::dma::Dma;
use crate::events::EventError;
use crate::generation::{self, Generation};
use crate::kvm::{Buses, Cpu, CpuThread, Ending, Hypervisor, KvmError};
use crate::memory::{self, Backing, MemoryError};
use crate::pci::{self, PciError, Slot};
use crate::power::{self, Power};
use crate::seccomp;
use crate::serial::{self, SerialPort};
use crate::snapshot::{Shape, SnapshotError};
use crate::virtio::mem::Growth;
use crate::virtio::{self, Memory};

use devices::DeviceError;
pub use monitor::Vmm;
use passing::Passing;
use snapshot::Origin;

/// How long the guest may take to let go of a device.
const REMOVAL_BOUND: Duration = Duration::from_secs(10);
/// How long the guest may take for the next block of memory, and for all of them. Whoever asks has to wait longer than that.
const GROWTH_BOUND: Duration = Duration::from_secs(5);
const WHOLE_GROWTH_BOUND: Duration = Duration::from_secs(50);
/// How often it is looked whether the machine has ended meanwhile.
const LOOK: Duration = Duration::from_millis(100);
/// What is done when there is one.
const NEW_DEVICE: &str = "tell the guest of a new device";
/// Longest name of a device, in bytes.
const LONGEST_ID: usize = 64;

/// Why there is no machine, or it does not do what it was asked for.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The numbers of descriptors in a command do not fit those that came with it.
    #[error("descriptor {number} of the {count} that came along is named twice, or is not there")]
    Descriptor {
        /// Which one.
        number: usize,
        /// How many came.
        count: usize,
    },
    /// Nothing in the command names them.
    #[error("{count} descriptors came along that the command does not name")]
    Unnamed {
        /// How many.
        count: usize,
    },
    /// A field makes no sense.
    #[error("{field}: {reason}")]
    Field {
        /// Which one.
        field: &'static str,
        /// Why.
        reason: String,
    },
    /// This VMM has no such thing.
    #[error("{what} is not possible with this virtual machine monitor")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// The memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Interrupts.
    #[error("the machine cannot have its interrupts")]
    Events(#[from] EventError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The bus.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Registers.
    #[error("the machine's registers cannot be placed")]
    Bus(#[from] BusError),
    /// One device.
    #[error("device {id} cannot be made")]
    Device {
        /// Which one.
        id: String,
        /// Why.
        #[source]
        source: DeviceError,
    },
    /// The guest keeps it.
    #[error(
        "the guest did not let go of device {id} within {REMOVAL_BOUND:?}; see whether its kernel runs, then remove it again"
    )]
    Held {
        /// Which one.
        id: String,
    },
    /// A snapshot that cannot be written or started from.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The host refused something small.
    #[error("the machine cannot {action}")]
    Host {
        /// What it was about to do.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Descriptors that came with a command.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// These, by their order.
    pub fn new(all: Vec<OwnedFd>) -> Descriptors {
        Descriptors(all.into_iter().map(Some).collect())
    }

    fn take(&mut self, Descriptor(number): Descriptor) -> Result<OwnedFd, MachineError> {
        let count = self.0.len();
        self.0.get_mut(number).and_then(Option::take).ok_or(MachineError::Descriptor { number, count })
    }

    fn take_all(&mut self, numbers: &[Descriptor]) -> Result<Vec<OwnedFd>, MachineError> {
        numbers.iter().map(|number| self.take(*number)).collect()
    }

    fn finish(&self) -> Result<(), MachineError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            count => Err(MachineError::Unnamed { count }),
        }
    }
}

/// What a machine takes from its process.
pub struct Place {
    /// `/dev/kvm`; opened here where it is not given.
    pub kvm: Option<OwnedFd>,
    /// Where the sockets are that the guest's connections go to.
    pub sockets: Option<PathBuf>,
}

impl Place {
    /// The same for another try.
    fn try_clone(&self) -> io::Result<Place> {
        let kvm = self.kvm.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok(Place { kvm, sockets: self.sockets.clone() })
    }
}

/// A machine.
pub struct Machine {
    // In this order they go: CPUs first, devices next, and memory when nobody touches it any more.
    cpus: Vec<CpuThread>,
    /// The next ones, which have no threads yet: KVM makes each once.
    ready: VecDeque<Cpu>,
    bus: Devices,
    /// The machine in the kernel goes before the memory that it reaches.
    hypervisor: Hypervisor,
    buses: Buses,
    /// What it was made of.
    shape: Shape,
    /// How many CPUs the guest is told that there are.
    present: Arc<Present>,
    serial: Option<Arc<SerialPort>>,
    /// Memory that it can have later.
    growth: Option<Growth>,
    memory: Memory,
    /// What takes devices of the host.
    passing: Passing,
    event: EventFd,
    ending: Arc<Ending>,
}

/// The bus, whose devices stand still when it goes.
struct Devices(Arc<pci::Root>);

impl Drop for Devices {
    fn drop(&mut self) {
        self.0.pause();
    }
}

impl Machine {
    /// Makes a machine, whose CPUs stand still: at a kernel's first instruction, or where a snapshot's stood.
    pub fn new(spec: &MachineSpec, mut files: Descriptors, place: Place) -> Result<Machine, MachineError> {
        check(spec)?;
        let shape = snapshot::shape(spec);
        let mut origin = match &spec.start {
            Start::Kernel(kernel) => Origin::kernel(kernel, &mut files)?,
            Start::Snapshot(from) => Origin::snapshot(from, &shape, &mut files)?,
        };
        let kvm = place.kvm.map_or_else(Hypervisor::open, Ok)?;
        let backing = Backing { prealloc: spec.memory.prealloc, hugepages: spec.memory.hugepages };
        let memory = origin.memory(&shape, backing, spec.shared_fs.is_some())?;
        let hypervisor = Hypervisor::new(kvm, &memory.memory())?;
        origin.check(&hypervisor)?;
        let router = hypervisor.router();
        let ending = Arc::new(Ending::new().map_err(host("have a descriptor for its end"))?);
        let event = router.pin(EVENT_PIN)?;
        let buses = Buses::default();
        let windows = memory::windows(&memory.memory(), hypervisor.address_bits()?);
        let root = pci::Root::new(router.clone(), Arc::clone(&buses.memory), memory.clone(), windows);
        // From here on every way out stops the devices.
        let bus = Devices(root);
        ports(&buses.ports, &bus.0, &ending)?;
        let serial = match spec.console {
            Some(console) => Some(origin.serial(files.take(console)?, router.pin(serial::PIN)?)?),
            None => None,
        };
        if let Some(port) = &serial {
            buses.ports.insert(serial::PORT.into(), serial::PORTS.into(), port.clone())?;
        }
        let dma = Dma::new(memory.clone());
        let passing = Passing::new(&hypervisor, dma.clone());
        let ready = devices::all(spec, &mut files, place.sockets.as_deref(), &ending, &dma)?;
        let take = |spec: &HostDeviceSpec| Ok((spec.id.clone(), passing.take(spec, &mut files)?));
        let passed = spec.host_devices.iter().map(take).collect::<Result<Vec<_>, MachineError>>()?;
        files.finish()?;
        let (growth, grows) = match memory::growth(&memory.memory()) {
            Some((base, size)) => Some(devices::growth(base, size, backing, dma)?).unzip(),
            None => (None, None),
        };
        let grows = grows.map(|device| (devices::GROWTH.to_owned(), device));
        for (id, device) in ready.into_iter().chain(grows) {
            bus.0.attach(&id, device)?;
        }
        for (id, device) in passed {
            bus.0.attach_passed(&id, device)?;
        }
        let present = Arc::new(Present::new(spec.cpus));
        buses.ports.insert(cpus::PORT.into(), cpus::PORTS.into(), present.clone())?;
        let generation = Arc::new(Generation::default());
        buses.ports.insert(generation::PORT.into(), generation::PORTS.into(), generation.clone())?;

        let mut ready = hypervisor.cpus(0..spec.cpus, spec.max_cpus)?.collect::<Result<VecDeque<_>, _>>()?;
        let mut machine = Machine {
            cpus: Vec::new(),
            ready: VecDeque::new(),
            bus,
            hypervisor,
            buses,
            shape,
            present,
            serial,
            growth,
            memory,
            passing,
            event,
            ending,
        };
        let loaded = origin.put(&machine, ready.make_contiguous(), &generation)?;
        // Of memory that is there as a whole, or that a device of the host reaches, it would be all; huge pages take few exits.
        let whole = backing != Backing::default() || !spec.host_devices.is_empty();
        if let Some(first) = ready.front().filter(|_| !whole) {
            let memory = machine.memory.memory();
            memory::take(&memory, &loaded.map(|loaded| loaded.written_first(&memory)).unwrap_or_default());
            first.prefault(&memory::resident(&memory));
        }
        machine.ready = ready;
        machine.start(spec.cpus)?;
        Ok(machine)
    }

    /// Gives CPUs their threads, in which they stand still, until so many have one. Those that got none can be tried again.
    fn start(&mut self, wanted: u32) -> Result<(), MachineError> {
        while let Some(cpu) = self.ready.front() {
            let number = self.cpus.len();
            if number >= usize::try_from(wanted).unwrap_or(usize::MAX) {
                break;
            }
            let confine = move || seccomp::confine_thread(&format!("vcpu{number}")).map_err(|e| chain(&e));
            self.cpus.push(cpu.start(self.buses.clone(), Arc::clone(&self.ending), confine)?);
            self.ready.pop_front();
        }
        Ok(())
    }

    /// Brings a running machine to another size, up to what it was made for, as far as it can: CPUs come and do not go; of the
    /// memory the guest takes and gives back what it can in time, see [`Machine::memory`]. It brings both to use itself. Nothing is
    /// waited for once `given_up` says that nobody does.
    pub fn resize(&mut self, size: Size, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        let fault = |field, reason| MachineError::Field { field, reason };
        let have = u32::try_from(self.cpus.len()).unwrap_or(u32::MAX);
        let most = self.shape.max_cpus;
        if size.cpus < have {
            return Err(MachineError::Unsupported { what: "taking virtual CPUs away" });
        }
        if size.cpus > most {
            return Err(fault("cpus", format!("the machine was made for up to {most}")));
        }
        let memory = self.memory.memory();
        let (ram, later) = (memory::size(&memory), memory::growth(&memory).map_or(0, |(_, size)| size));
        let wanted = size.memory_mib.checked_mul(1 << 20).and_then(|bytes| bytes.checked_sub(ram));
        let Some(wanted) = wanted.filter(|wanted| *wanted <= later) else {
            let (least, most) = (ram >> 20, (ram + later) >> 20);
            return Err(fault("memory-mib", format!("the machine was made for {least} to {most} MiB")));
        };
        self.add_cpus(size.cpus)?;
        if let Some(growth) = &self.growth {
            let stop = || self.ending.get().is_some() || given_up();
            growth.settle(growth.set(wanted), GROWTH_BOUND, WHOLE_GROWTH_BOUND, stop);
        }
        Ok(())
    }

    fn add_cpus(&mut self, wanted: u32) -> Result<(), MachineError> {
        let before = self.cpus.len();
        let made = u32::try_from(before + self.ready.len()).unwrap_or(u32::MAX);
        if wanted == u32::try_from(before).unwrap_or(u32::MAX) {
            return Ok(());
        }
        for cpu in self.hypervisor.cpus(made..wanted.max(made), self.shape.max_cpus)? {
            self.ready.push_back(cpu?);
        }
        let started = self.start(wanted);
        self.cpus.iter().skip(before).for_each(CpuThread::resume);
        // Those that did start are there, even if another did not.
        self.present.set(u32::try_from(self.cpus.len()).unwrap_or(u32::MAX));
        self.tell("tell the guest of new virtual CPUs")?;
        started
    }

    /// Lets the CPUs run: the guest boots, or goes on.
    pub fn resume(&self) -> Result<(), MachineError> {
        self.bus.0.resume()?;
        self.cpus.iter().for_each(CpuThread::resume);
        Ok(())
    }

    /// Makes all CPUs stand still, and then all devices.
    pub fn pause(&self) {
        self.cpus.iter().for_each(CpuThread::pause);
        self.bus.0.pause();
    }

    /// Adds a disk while the guest runs.
    pub fn add_disk(&self, spec: &DiskSpec, mut files: Descriptors) -> Result<Slot, MachineError> {
        let device = devices::disk(spec, &mut files)?;
        files.finish()?;
        self.plug(&spec.id, device)
    }

    /// Adds a network interface while the guest runs.
    pub fn add_nic(&self, spec: &NicSpec, mut files: Descriptors) -> Result<Slot, MachineError> {
        let device = devices::nic(spec, &mut files)?;
        files.finish()?;
        self.plug(&spec.id, device)
    }

    /// Adds a device of the host while the guest runs.
    pub fn add_host_device(
        &self,
        spec: &HostDeviceSpec,
        mut files: Descriptors,
    ) -> Result<Slot, MachineError> {
        check_id(&spec.id)?;
        let device = self.passing.take(spec, &mut files)?;
        files.finish()?;
        let slot = self.bus.0.plug_passed(&spec.id, device)?;
        self.tell(NEW_DEVICE)?;
        Ok(slot)
    }

    fn plug(&self, id: &str, device: Box<dyn virtio::Device>) -> Result<Slot, MachineError> {
        check_id(id)?;
        let slot = self.bus.0.plug(id, device)?;
        self.tell(NEW_DEVICE)?;
        Ok(slot)
    }

    /// Takes a device away: comes back when the guest has let go of it, or has not in time, or `given_up` says that nobody waits.
    pub fn remove(&self, id: &str, given_up: &dyn Fn() -> bool) -> Result<(), MachineError> {
        if devices::is_fixed(id) {
            return Err(MachineError::Unsupported { what: "removing what the machine needs" });
        }
        let departure = self.bus.0.unplug(id)?;
        self.tell("tell the guest that a device is to go")?;
        let until = Instant::now() + REMOVAL_BOUND;
        while !departure.wait(LOOK) {
            if Instant::now() >= until || self.ending.get().is_some() || given_up() {
                return Err(MachineError::Held { id: id.to_owned() });
            }
        }
        Ok(())
    }

    fn tell(&self, action: &'static str) -> Result<(), MachineError> {
        self.event.write(1).map_err(host(action))
    }

    /// Its end.
    pub fn ending(&self) -> &Arc<Ending> {
        &self.ending
    }

    /// How many CPUs it has.
    pub fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// Threads of its CPUs, in their order, by the numbers that they have where this process runs.
    pub fn cpu_threads(&self) -> Vec<u32> {
        self.cpus.iter().map(CpuThread::id).collect()
    }

    /// Its memory in bytes, with what the guest took of what can come later.
    pub fn memory(&self) -> u64 {
        memory::size(&self.memory.memory()) + self.growth.as_ref().map_or(0, Growth::plugged)
    }

    /// Counters of its CPUs and devices, each after the name of what counts.
    pub fn metrics(&self) -> BTreeMap<String, u64> {
        let of_cpu = |(number, cpu): (usize, &CpuThread)| {
            cpu.exits().map(|(name, count)| (format!("cpu{number}.{name}"), count))
        };
        self.cpus.iter().enumerate().flat_map(of_cpu).chain(self.bus.0.counters()).collect()
    }
}

/// What makes no machine, whatever the host can do.
fn check(spec: &MachineSpec) -> Result<(), MachineError> {
    let fault = |field, reason: &str| Err(MachineError::Field { field, reason: reason.to_owned() });
    if spec.cpus == 0 {
        return fault("cpus", "a machine has at least one");
    }
    if spec.max_cpus < spec.cpus || spec.memory.max_mib < spec.memory.size_mib {
        return fault("max-cpus, max-mib", "less than it starts with");
    }
    if spec.memory.max_mib > u64::MAX >> 20 {
        return fault("memory", "more than there are addresses");
    }
    spec.disks
        .iter()
        .map(|disk| &disk.id)
        .chain(spec.nics.iter().map(|nic| &nic.id))
        .chain(spec.host_devices.iter().map(|device| &device.id))
        .try_for_each(|id| check_id(id))
}

fn check_id(id: &str) -> Result<(), MachineError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if (1..=LONGEST_ID).contains(&id.len()) && id.chars().all(plain) && !devices::is_fixed(id) {
        return Ok(());
    }
    let reason = format!(
        "{id:?} is no name for a device: 1 to {LONGEST_ID} of A-Z a-z 0-9 _ -, and none of the machine's own"
    );
    Err(MachineError::Field { field: "id", reason })
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Host { action, source }
}

/// Puts the registers that are there in every machine on the bus of ports.
fn ports(bus: &Bus, root: &Arc<pci::Root>, ending: &Arc<Ending>) -> Result<(), BusError> {
    let power: Arc<dyn Device> = Arc::new(Power(Arc::clone(ending)));
    bus.insert(power::SLEEP_CONTROL.into(), power::PORTS.into(), power)?;
    bus.insert(pci::CONFIGURATION_PORT.into(), pci::CONFIGURATION_PORTS.into(), root.config_ports())?;
    bus.insert(pci::HOTPLUG_PORT.into(), pci::HOTPLUG_PORTS.into(), root.hotplug_block())
}

#[cfg(test)]
mod tests;
