//! From the commands of the interface to the machine.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use kata_vmm_api::{Answer, Command, EndReason, Failure, FailureKind, Info, MachineSpec, Size, State};

use super::{Descriptors, Machine, MachineError, Place};
use crate::chain;
use crate::kvm::KvmError;
use crate::pci::{PciError, Slot};
use crate::server::{Client, Monitor};
use crate::snapshot::SnapshotError;
use crate::virtio::worker::descriptor;

/// The machine of this process, before, while and after there is one.
pub struct Vmm {
    /// What the machine takes from the process, until there is one.
    place: Option<Place>,
    machine: Option<Machine>,
    state: State,
    jailed: bool,
}

impl Vmm {
    /// Without a machine.
    pub fn new(kvm: Option<OwnedFd>, sockets: Option<PathBuf>, jailed: bool) -> Vmm {
        Vmm { place: Some(Place { kvm, sockets }), machine: None, state: State::Empty, jailed }
    }

    fn create(&mut self, spec: &MachineSpec, descriptors: Descriptors) -> Result<Answer, Failure> {
        let place =
            self.place.as_ref().ok_or_else(|| wrong_state("create", "there was a machine already"))?;
        // One that is not made takes nothing along: what a snapshot was no good for may still boot.
        let place = place.try_clone().map_err(|source| {
            failure(&MachineError::Host { action: "have a descriptor of /dev/kvm", source })
        })?;
        self.machine = Some(Machine::new(spec, descriptors, place).map_err(|e| failure(&e))?);
        self.place = None;
        self.state = State::Created;
        Ok(Answer::Nothing)
    }

    /// The machine, where it does one of these.
    fn machine(&self, command: &str, states: &[State]) -> Result<&Machine, Failure> {
        match &self.machine {
            Some(machine) if states.contains(&self.state) => Ok(machine),
            Some(_) => Err(wrong_state(command, &format!("the machine is {}", name(self.state)))),
            None => Err(wrong_state(command, "there is no machine; create one first")),
        }
    }

    fn change(&mut self, command: &str, from: State, to: State) -> Result<Answer, Failure> {
        let machine = self.machine(command, &[from])?;
        match to {
            State::Running => machine.resume().map_err(|e| failure(&e))?,
            _ => machine.pause(),
        }
        self.state = to;
        Ok(Answer::Nothing)
    }

    fn info(&self) -> Info {
        let machine = self.machine.as_ref();
        let size = machine.map_or(Size { cpus: 0, memory_mib: 0 }, |machine| Size {
            cpus: u32::try_from(machine.cpus()).unwrap_or(u32::MAX),
            memory_mib: machine.memory() >> 20,
        });
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: self.state,
            size,
            cpu_threads: machine.map(Machine::cpu_threads).unwrap_or_default(),
            jailed: self.jailed,
        }
    }
}

impl Monitor for Vmm {
    fn execute(
        &mut self,
        command: Command,
        descriptors: Vec<OwnedFd>,
        client: Client<'_>,
    ) -> Result<Answer, Failure> {
        let given_up = || client.is_gone();
        let files = Descriptors::new(descriptors);
        let slot = |Slot(slot)| Answer::Slot(slot);
        let running = &[State::Running];
        let live = &[State::Created, State::Running, State::Paused];
        if !matches!(
            command,
            Command::Create(_)
                | Command::AddDisk(_)
                | Command::AddNic(_)
                | Command::AddHostDevice(_)
                | Command::Snapshot(_)
        ) {
            files.finish().map_err(|e| failure(&e))?;
        }
        match command {
            Command::Create(spec) => self.create(&spec, files),
            Command::Boot => self.change("boot", State::Created, State::Running),
            Command::Pause => self.change("pause", State::Running, State::Paused),
            Command::Resume => self.change("resume", State::Paused, State::Running),
            Command::Snapshot(spec) => {
                let machine = self.machine("snapshot", &[State::Paused])?;
                machine.snapshot(&spec, files).map_err(|e| failure(&e))?;
                Ok(Answer::Nothing)
            }
            Command::AddDisk(spec) => {
                self.machine("add-disk", running)?.add_disk(&spec, files).map(slot).map_err(|e| failure(&e))
            }
            Command::AddNic(spec) => {
                self.machine("add-nic", running)?.add_nic(&spec, files).map(slot).map_err(|e| failure(&e))
            }
            Command::AddHostDevice(spec) => {
                let machine = self.machine("add-host-device", running)?;
                machine.add_host_device(&spec, files).map(slot).map_err(|e| failure(&e))
            }
            Command::RemoveDevice { id } => {
                self.machine("remove-device", running)?.remove(&id, &given_up).map_err(|e| failure(&e))?;
                Ok(Answer::Nothing)
            }
            Command::Resize(size) => {
                self.machine("resize", running)?;
                if let Some(machine) = &mut self.machine {
                    machine.resize(size, &given_up).map_err(|e| failure(&e))?;
                }
                Ok(Answer::Nothing)
            }
            Command::Info => Ok(Answer::Info(self.info())),
            Command::Metrics => {
                let machine = self.machine("metrics", live)?;
                Ok(Answer::Metrics(machine.metrics()))
            }
            Command::Shutdown => Ok(Answer::Nothing),
        }
    }

    fn ended(&self) -> Option<BorrowedFd<'_>> {
        Some(descriptor(self.machine.as_ref()?.ending().event()))
    }

    fn end(&self) -> Option<(EndReason, String)> {
        let end = self.machine.as_ref()?.ending().get()?;
        Some((end.reason, end.detail))
    }
}

fn name(state: State) -> &'static str {
    match state {
        State::Empty => "not there",
        State::Created => "created and not booted",
        State::Running => "running",
        State::Paused => "paused",
    }
}

fn wrong_state(command: &str, why: &str) -> Failure {
    Failure { kind: FailureKind::WrongState, message: format!("{command} is not possible: {why}") }
}

fn failure(error: &MachineError) -> Failure {
    let kind = match error {
        MachineError::Descriptor { .. } | MachineError::Unnamed { .. } | MachineError::Field { .. } => {
            FailureKind::Invalid
        }
        MachineError::Snapshot(e) if e.is_stale() => FailureKind::Stale,
        MachineError::Kvm(KvmError::Register { .. } | KvmError::Rate { .. })
        | MachineError::Pci(PciError::Other { .. }) => FailureKind::Stale,
        MachineError::Snapshot(SnapshotError::NotEmpty { .. }) => FailureKind::Invalid,
        MachineError::Snapshot(SnapshotError::Unsaved { .. })
        | MachineError::Pci(PciError::Unsaved { .. })
        | MachineError::Kvm(KvmError::Nested)
        | MachineError::Unsupported { .. } => FailureKind::Unsupported,
        MachineError::Pci(PciError::Exists { .. }) => FailureKind::Exists,
        MachineError::Pci(PciError::NotFound { .. }) => FailureKind::NotFound,
        MachineError::Pci(PciError::Full | PciError::Window { .. } | PciError::NoRoom { .. }) => {
            FailureKind::Full
        }
        MachineError::Held { .. } => FailureKind::Held,
        _ => FailureKind::Host,
    };
    Failure { kind, message: chain(error) }
}
