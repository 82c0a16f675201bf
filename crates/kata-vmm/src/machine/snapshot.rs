//! Where a machine begins, and how it is written to where another can begin.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kata_vmm_api::{KernelSpec, MachineSpec, SnapshotSpec};
use vm_memory::{GuestAddressSpace, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::{Descriptors, Machine, MachineError, host};
use crate::acpi;
use crate::boot;
use crate::generation::Generation;
use crate::kvm::{Cpu, CpuThread, Hypervisor};
use crate::memory::{self, Backing};
use crate::pci;
use crate::serial::SerialPort;
use crate::snapshot::{self, Shape, SnapshotError, State};
use crate::virtio::Memory;

/// What a guest finds of a machine that is to be made like this.
pub(super) fn shape(spec: &MachineSpec) -> Shape {
    Shape {
        cpus: spec.cpus,
        max_cpus: spec.max_cpus,
        size_mib: spec.memory.size_mib,
        max_mib: spec.memory.max_mib,
        console: spec.console.is_some(),
    }
}

/// What a guest begins with.
pub(super) enum Origin {
    /// A kernel.
    Kernel { kernel: File, initrd: Option<File>, command_line: String },
    /// Where another machine stood, and that one's memory.
    Snapshot(Box<State>, File),
}

impl Origin {
    pub(super) fn kernel(spec: &KernelSpec, files: &mut Descriptors) -> Result<Origin, MachineError> {
        let kernel = files.take(spec.kernel)?.into();
        let initrd = spec.initrd.map(|number| files.take(number).map(File::from)).transpose()?;
        Ok(Origin::Kernel { kernel, initrd, command_line: spec.command_line.clone() })
    }

    /// A snapshot that is whole, of this build, and of a machine of this shape.
    pub(super) fn snapshot(
        spec: &SnapshotSpec,
        shape: &Shape,
        files: &mut Descriptors,
    ) -> Result<Origin, MachineError> {
        let (mut state, memory) = (File::from(files.take(spec.state)?), File::from(files.take(spec.memory)?));
        let state = snapshot::inspect(&mut state, &memory, spec.verify)?;
        state.shape.compare(shape)?;
        Ok(Origin::Snapshot(Box::new(state), memory))
    }

    /// The guest's memory, with what is to be in it from the start. A snapshot's file is mapped where no other process has to reach the
    /// memory, and it need not be there at once; otherwise it is copied.
    pub(super) fn memory(
        &mut self,
        shape: &Shape,
        backing: Backing,
        shared: bool,
    ) -> Result<Memory, MachineError> {
        let (size, growth) = (shape.size_mib << 20, (shape.max_mib - shape.size_mib) << 20);
        let copied = shared || backing != Backing::default();
        match self {
            Origin::Snapshot(_, file) if !copied => Ok(memory::mapped(file, size, growth)?),
            Origin::Snapshot(state, file) => {
                let memory = memory::allocate(size, growth, backing)?;
                snapshot::load(file, &state.memory, &memory)?;
                Ok(memory)
            }
            Origin::Kernel { .. } => Ok(memory::allocate(size, growth, backing)?),
        }
    }

    /// Whether the guest can go on with this host's processor.
    pub(super) fn check(&self, hypervisor: &Hypervisor) -> Result<(), MachineError> {
        let Origin::Snapshot(state, _) = self else { return Ok(()) };
        Ok(state.fits(&hypervisor.processor()?)?)
    }

    /// The serial port.
    pub(super) fn serial(&self, output: OwnedFd, pin: EventFd) -> Result<Arc<SerialPort>, MachineError> {
        let registers = match self {
            Origin::Snapshot(state, _) => state.serial,
            Origin::Kernel { .. } => None,
        };
        let port = match registers {
            Some(registers) => SerialPort::restored(output, pin, registers),
            None => SerialPort::new(output, pin),
        };
        Ok(Arc::new(port.map_err(host("use its console"))?))
    }

    /// Puts a machine of which all parts are there, with these CPUs, to where it begins; answers what it boots, if it does.
    pub(super) fn put(
        self,
        machine: &Machine,
        cpus: &[Cpu],
        generation: &Generation,
    ) -> Result<Option<boot::Loaded>, MachineError> {
        let memory = machine.memory.memory();
        let identified = |result: Result<(), GuestMemoryError>| {
            let action = "give its guest an identifier";
            result.map_err(|e| host(action)(std::io::Error::other(e)))
        };
        match self {
            Origin::Kernel { mut kernel, mut initrd, command_line } => {
                let guest =
                    boot::Guest { kernel: &mut kernel, initrd: initrd.as_mut(), command_line: &command_line };
                let loaded = boot::load(&memory, guest)?;
                let facts = acpi::Facts {
                    cpus: machine.shape.cpus,
                    most_cpus: machine.shape.max_cpus,
                    pci: &machine.bus.0.aml(),
                    scan: pci::SCAN_METHOD,
                    serial: machine.serial.is_some(),
                };
                acpi::write(&memory, &facts)?;
                identified(Generation::identify(&memory))?;
                cpus.first().map_or(Ok(()), |first| first.enter(loaded.entry))?;
                Ok(Some(loaded))
            }
            Origin::Snapshot(state, _) => {
                // APICs first: what the bus raises reaches them.
                machine.hypervisor.restore(cpus, &state.cpus, &state.controllers)?;
                machine.bus.0.restore(&state.bus)?;
                machine.present.restore(state.told);
                identified(generation.renew(&memory))?;
                machine.tell("tell the guest that it is another")?;
                Ok(None)
            }
        }
    }
}

impl Machine {
    /// Writes the machine, which stands still and goes on standing, into two empty files.
    pub fn snapshot(&self, spec: &SnapshotSpec, mut files: Descriptors) -> Result<(), MachineError> {
        let (mut state, memory) = (File::from(files.take(spec.state)?), File::from(files.take(spec.memory)?));
        files.finish()?;
        snapshot::are_empty(&state, &memory)?;
        if self.cpus() != usize::try_from(self.shape.cpus).unwrap_or(0) {
            return Err(SnapshotError::Unsaved { what: "virtual CPUs that came while it ran" }.into());
        }
        let processor = self.hypervisor.processor()?;
        let save = |cpu: &CpuThread| cpu.save(processor.registers());
        let cpus = self.cpus.iter().map(save).collect::<Result<_, _>>()?;
        let (controllers, bus) = (self.hypervisor.save()?, self.bus.0.save()?);
        let content = snapshot::write_memory(&self.memory.memory(), &memory)?;
        if spec.verify {
            snapshot::verify(&memory, &content)?;
        }
        let saved = State {
            shape: self.shape.clone(),
            memory: content,
            processor,
            cpus,
            controllers,
            told: self.present.told(),
            serial: self.serial.as_ref().map(|port| port.registers()),
            bus,
        };
        Ok(snapshot::write(&mut state, &saved)?)
    }
}
