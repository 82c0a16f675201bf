//! What KVM knows of a machine in a snapshot: its CPUs' registers, its interrupt controllers and its clock.
//!
//! ```text
//!   Processor        what CPUs are here; has to be the same where the machine goes on
//!   CpuState         registers, FPU, local APIC, registers of the model, how far its time stamp counter was
//!   ControllerState  both PICs, of which no guest makes use, and the I/O APIC; kvm-clock
//! ```
//!
//! Time goes on where it stood: the time stamp counters of all CPUs from what the first one's said, `kvm-clock` likewise. What time it
//! is elsewhere somebody in the guest has to be told.
//!
//! Of the registers of a model (MSRs) those are set that differ from a new CPU's, so that one that this KVM lets nobody write is no
//! obstacle where it says the same anyway.

use std::io;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::{KvmError, cpuid, refused};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
const CONTROLLERS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// `EFER.SVME` and `CR4.VMXE`: the guest runs machines of its own, whose state is not in any of these registers.
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;

/// How far two hosts' time stamp counters may be apart to be taken for the same, in millionths: KVM's own measure.
const TSC_TOLERANCE: u64 = 250;

/// What a snapshot's processor and the host's have in common: all that a guest may have found out about it, so that it never finds
/// another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processor {
    /// Leaf, subleaf, and what KVM can pass on of it, but for the numbers of the CPU that was asked.
    leaves: Vec<[u32; 6]>,
    /// Registers of the model that KVM keeps.
    registers: Vec<u32>,
}

impl Processor {
    /// This host's.
    pub(super) fn of(kvm: &Kvm) -> Result<Processor, KvmError> {
        let list = kvm.get_msr_index_list().map_err(refused("list the registers of a model"))?;
        Ok(Processor::new(&cpuid::supported(kvm)?, list.as_slice()))
    }

    fn new(supported: &CpuId, registers: &[u32]) -> Processor {
        let leaves = supported.as_slice().iter().filter_map(|entry| {
            let ebx = cpuid::common(entry.function)?;
            Some([entry.function, entry.index, entry.eax, entry.ebx & ebx, entry.ecx, entry.edx])
        });
        let mut registers = registers.to_vec();
        registers.sort_unstable();
        Processor { leaves: leaves.collect(), registers }
    }

    /// How this one differs from another, for people; `None` where it does not.
    pub fn difference(&self, other: &Processor) -> Option<String> {
        if self.name() != other.name() {
            return Some(format!("{} instead of {}", self.name(), other.name()));
        }
        let leaf = self.leaves.iter().find(|leaf| !other.leaves.contains(leaf));
        if let Some([function, index, ..]) =
            leaf.or_else(|| other.leaves.iter().find(|l| !self.leaves.contains(l)))
        {
            return Some(format!("{}, but other features in CPUID leaf {function:#x}.{index}", self.name()));
        }
        (self.registers != other.registers)
            .then(|| format!("{}, but a KVM with other registers of the model", self.name()))
    }

    /// Vendor, family, model and stepping.
    fn name(&self) -> String {
        let find = |function: u32| self.leaves.iter().find(|[leaf, ..]| *leaf == function);
        let vendor = find(0).map_or_else(String::new, |[_, _, _, ebx, ecx, edx]| {
            let bytes = [ebx, edx, ecx].map(|register| register.to_le_bytes()).concat();
            String::from_utf8_lossy(&bytes).escape_default().to_string()
        });
        let signature = find(1).map_or(0, |[_, _, eax, ..]| *eax);
        let (family, model, stepping) = (signature >> 8 & 0xf, signature >> 4 & 0xf, signature & 0xf);
        let family = if family == 0xf { family + (signature >> 20 & 0xff) } else { family };
        let model = if family >= 6 { model | (signature >> 16 & 0xf) << 4 } else { model };
        format!("{vendor} family {family} model {model} stepping {stepping}")
    }

    /// Registers of the model that are kept of each CPU.
    pub fn registers(&self) -> &[u32] {
        &self.registers
    }
}

/// One CPU in a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    general: kvm_regs,
    special: kvm_sregs,
    float: kvm_xsave,
    extended: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    mode: kvm_mp_state,
    events: kvm_vcpu_events,
    /// Number and value of each.
    model: Vec<(u32, u64)>,
    khz: u32,
}

impl CpuState {
    /// Of a CPU that stands still, with these registers of the model as far as they can be read.
    pub(super) fn of(cpu: &VcpuFd, registers: &[u32]) -> Result<CpuState, KvmError> {
        let read = refused("read a CPU's state");
        // First: it takes an INIT or a start-up message that waits, which changes the registers.
        let mode = cpu.get_mp_state().map_err(&read)?;
        let special = cpu.get_sregs().map_err(&read)?;
        if special.efer & EFER_SVME != 0 || special.cr4 & CR4_VMXE != 0 {
            return Err(KvmError::Nested);
        }
        Ok(CpuState {
            general: cpu.get_regs().map_err(&read)?,
            special,
            // It holds all: parts that need more room (AMX) a guest gets only where its VMM asks the kernel for them.
            float: cpu.get_xsave().map_err(&read)?,
            extended: cpu.get_xcrs().map_err(&read)?,
            debug: cpu.get_debug_regs().map_err(&read)?,
            apic: cpu.get_lapic().map_err(&read)?,
            mode,
            events: cpu.get_vcpu_events().map_err(&read)?,
            model: model(cpu, registers)?,
            khz: cpu.get_tsc_khz().map_err(&read)?,
        })
    }

    /// Puts a new CPU of the same number there. `first` is the state of the first CPU, whose time all have.
    pub(super) fn put(&self, cpu: &VcpuFd, first: &CpuState) -> Result<(), KvmError> {
        let write = refused("set a CPU's state");
        self.set_rate(cpu)?;
        cpu.set_mp_state(self.mode).map_err(&write)?;
        cpu.set_sregs(&self.special).map_err(&write)?;
        cpu.set_regs(&self.general).map_err(&write)?;
        // SAFETY: the structure is complete, and KVM reads no more than its 4096 bytes where no larger state was asked for.
        unsafe { cpu.set_xsave(&self.float) }.map_err(&write)?;
        cpu.set_xcrs(&self.extended).map_err(&write)?;
        cpu.set_debug_regs(&self.debug).map_err(&write)?;
        cpu.set_lapic(&self.apic).map_err(&write)?;
        self.put_model(cpu, first.counter())?;
        cpu.set_vcpu_events(&self.events).map_err(&write)
    }

    /// The time stamp counter runs as fast as it did, as far as the host's can.
    fn set_rate(&self, cpu: &VcpuFd) -> Result<(), KvmError> {
        let here = cpu.get_tsc_khz().map_err(refused("tell how fast time stamps count"))?;
        if here == self.khz {
            return Ok(());
        }
        let apart = u64::from(here.abs_diff(self.khz)) * 1_000_000 / u64::from(here.max(1));
        let failed = KvmError::Rate { here, there: self.khz };
        if apart > TSC_TOLERANCE || cpu.set_tsc_khz(self.khz).is_err() {
            return Err(failed);
        }
        Ok(())
    }

    /// The registers of the model that differ from what is there, the deadline of the timer last: it counts by the others.
    fn put_model(&self, cpu: &VcpuFd, counter: u64) -> Result<(), KvmError> {
        let numbers: Vec<u32> = self.model.iter().map(|(number, _)| *number).collect();
        let present = model(cpu, &numbers)?;
        let differs =
            |entry: &&(u32, u64)| !matches!(entry.0, MSR_TSC | MSR_TSC_DEADLINE) && !present.contains(entry);
        // A timer that went off when the snapshot was taken may have left no trace. One interrupt too many does no harm.
        let deadline = self.register(MSR_TSC_DEADLINE).map(|set| if set == 0 { counter } else { set });
        let wanted = [(MSR_TSC, counter)].into_iter().chain(self.model.iter().filter(differs).copied());
        for (number, value) in wanted.chain(deadline.map(|deadline| (MSR_TSC_DEADLINE, deadline))) {
            let entry = kvm_msr_entry { index: number, data: value, ..Default::default() };
            if cpu.set_msrs(&entries(&[entry])?).map_err(refused("set the registers of a model"))? != 1 {
                return Err(KvmError::Register { number, value });
            }
        }
        Ok(())
    }

    fn register(&self, wanted: u32) -> Option<u64> {
        self.model.iter().find(|(number, _)| *number == wanted).map(|(_, value)| *value)
    }

    fn counter(&self) -> u64 {
        self.register(MSR_TSC).unwrap_or(0)
    }
}

/// Registers of the model of these numbers, but for those that cannot be read.
fn model(cpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut found = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let wanted: Vec<_> =
            rest.iter().map(|number| kvm_msr_entry { index: *number, ..Default::default() }).collect();
        let mut wanted = entries(&wanted)?;
        let count = cpu.get_msrs(&mut wanted).map_err(refused("read the registers of a model"))?;
        found.extend(wanted.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
        // It stops at the first that it cannot read.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(found)
}

fn entries(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|e| KvmError::Refused {
        action: "hold the registers of a model",
        source: io::Error::other(format!("{e:?}")),
    })
}

/// What belongs to no CPU, in a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerState {
    controllers: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl ControllerState {
    pub(super) fn of(machine: &VmFd) -> Result<ControllerState, KvmError> {
        let controllers = CONTROLLERS.map(|chip_id| {
            let mut state = kvm_irqchip { chip_id, ..Default::default() };
            machine.get_irqchip(&mut state).map(|()| state)
        });
        let controllers: Result<_, _> = controllers.into_iter().collect();
        Ok(ControllerState {
            controllers: controllers.map_err(refused("read its interrupt controllers"))?,
            clock: machine.get_clock().map_err(refused("read its clock"))?,
        })
    }

    pub(super) fn put(&self, machine: &VmFd) -> Result<(), KvmError> {
        for state in &self.controllers {
            machine.set_irqchip(state).map_err(refused("set its interrupt controllers"))?;
        }
        // Without flags: from this value on, however long ago that was.
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        machine.set_clock(&clock).map_err(refused("set its clock"))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn processor(signature: u32, apic: u32, features: u32, registers: &[u32]) -> Processor {
        let vendor = [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
        let entries =
            [entry(0, vendor), entry(1, [signature, apic << 24, features, 0]), entry(0xb, [0, 0, 0, apic])];
        Processor::new(&CpuId::from_entries(&entries).unwrap(), registers)
    }

    #[test]
    fn processor_is_the_same_on_whichever_of_its_cpus_one_looks() {
        let here = processor(0x000a_0671, 3, 1, &[0x10, 0x174]);
        assert_eq!(here.difference(&processor(0x000a_0671, 9, 1, &[0x174, 0x10])), None);
    }

    #[test]
    fn other_processor_is_told_apart_and_how() {
        let here = processor(0x000a_0671, 0, 1, &[0x10]);
        for (other, how) in [
            (processor(0x000c_0652, 0, 1, &[0x10]), "model 197 stepping 2"),
            (processor(0x000a_0671, 0, 3, &[0x10]), "CPUID leaf 0x1.0"),
            (processor(0x000a_0671, 0, 1, &[0x10, 0x11]), "registers of the model"),
        ] {
            let difference = here.difference(&other).unwrap();
            assert!(difference.contains(how) && difference.contains("GenuineIntel"), "{difference}");
            assert!(other.difference(&here).is_some());
        }
    }
}
