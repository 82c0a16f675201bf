//! The ACPI tables: what the guest cannot find out about its machine by looking (ACPI 6.5).
//!
//! ```text
//!   root pointer ─▶ XSDT ─┬─▶ FADT   hardware-reduced: registers to sleep and reset by, and nothing older ─▶ DSDT
//!                         └─▶ MADT   local APICs, the I/O APIC
//!   DSDT: \_SB.PCI0 (pci::Root::aml) · \_SB.CPUS, if more can come (cpus) · \_SB.GED0, which calls the scans of both on an event ·
//!         \_SB.VGEN, the generation identifier · \_SB.COM1, if there is one · \_S5
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Method, MethodCall, Name, Package, ResourceTemplate, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::{ACPI, ACPI_END};
use crate::cpus;
use crate::generation;
use crate::memory::{IO_APIC, LOCAL_APIC};
use crate::power;
use crate::serial;

const OEM: [u8; 6] = *b"KATA  ";
const OEM_TABLE: [u8; 8] = *b"KATAVMM ";
const REVISION: u32 = 1;
/// The pin of the I/O APIC by which the guest hears of events.
pub const EVENT_PIN: u32 = 5;
/// `IAPC_BOOT_ARCH`: no VGA, no clock of a PC. Clear bits say that there is no keyboard controller either.
const ABSENT: u16 = 1 << 2 | 1 << 5;
/// Most CPUs: their numbers have a byte, of which the last means all.
const MOST_CPUS: u32 = 254;

/// Why there are no tables.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They are larger than their place.
    #[error("the ACPI tables of {size:#x} bytes do not fit where they have to be")]
    Room {
        /// Their bytes.
        size: usize,
    },
    /// More than numbers of a byte can tell.
    #[error("{cpus} virtual CPUs are more than the ACPI tables can tell of, {MOST_CPUS}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
}

/// What the tables tell.
pub struct Facts<'a> {
    /// How many CPUs there are at boot.
    pub cpus: u32,
    /// How many there can be later; at least as many.
    pub most_cpus: u32,
    /// AML of the PCI bus.
    pub pci: &'a [u8],
    /// Method that looks for devices that came or go.
    pub scan: &'a str,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// Writes the tables to where both boot protocols look for them.
pub fn write(memory: &GuestMemoryMmap, facts: &Facts<'_>) -> Result<(), AcpiError> {
    let bytes = tables(facts)?;
    let room = AcpiError::Room { size: bytes.len() };
    if u64::try_from(bytes.len()).map_or(true, |size| size > ACPI_END - ACPI) {
        return Err(room);
    }
    memory.write_slice(&bytes, GuestAddress(ACPI)).map_err(|_| room)
}

/// All tables, one after the other, the root pointer first.
fn tables(facts: &Facts<'_>) -> Result<Vec<u8>, AcpiError> {
    let mut all = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = all.add(dsdt(facts)?.as_slice());
    let fadt = all.add(&encode(&fadt(dsdt)));
    let madt = all.add(&encode(&madt(facts.cpus, facts.most_cpus)?));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = all.add(&encode(&xsdt));
    let root = encode(&Rsdp::new(OEM, xsdt));
    for (to, from) in all.bytes.iter_mut().zip(root) {
        *to = from;
    }
    Ok(all.bytes)
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and answers its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(table);
        ACPI.saturating_add(u64::try_from(offset).unwrap_or(0))
    }
}

fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    table.iapc_boot_arch = ABSENT.into();
    table.reset_reg = register(power::RESET);
    table.reset_value = power::RESET_NOW;
    table.sleep_control_reg = register(power::SLEEP_CONTROL);
    table.sleep_status_reg = register(power::SLEEP_STATUS);
    table.finalize()
}

/// A number of CPUs in a byte.
fn count(cpus: u32) -> Result<u8, AcpiError> {
    u8::try_from(cpus).ok().filter(|_| cpus <= MOST_CPUS).ok_or(AcpiError::Cpus { cpus })
}

fn madt(cpus: u32, most: u32) -> Result<impl Aml, AcpiError> {
    let mut table = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LOCAL_APIC));
    let at_boot = count(cpus)?;
    for number in 0..count(most)? {
        let status =
            if number < at_boot { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        table.add_structure(ProcessorLocalApic::new(number, number, status));
    }
    table.add_structure(IoApic::new(0, IO_APIC, 0));
    Ok(table)
}

fn dsdt(facts: &Facts<'_>) -> Result<Sdt, AcpiError> {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    let mut body = facts.pci.to_vec();
    let mut scans = vec![facts.scan];
    if facts.most_cpus > facts.cpus {
        body.extend(cpus::aml(count(facts.cpus)?, count(facts.most_cpus)?));
        scans.push(cpus::SCAN_METHOD);
    }
    body.extend(generation::aml());
    scans.push(generation::SCAN_METHOD);
    body.extend(events(&scans));
    if facts.serial {
        body.extend(serial_port());
    }
    let five = power::OFF;
    let off = Package::new(vec![&five, &ZERO, &ZERO, &ZERO]);
    body.extend(encode(&Name::new("\\_S5_".into(), &off)));
    table.append_slice(&body);
    Ok(table)
}

/// The device by which the guest hears of events: it calls what looks for them.
fn events(scans: &[&str]) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &ZERO);
    // An edge, high, of its own.
    let interrupt = Interrupt::new(true, true, false, false, EVENT_PIN);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let resources = Name::new("_CRS".into(), &resources);
    let scans: Vec<_> = scans.iter().map(|scan| MethodCall::new((*scan).into(), vec![])).collect();
    let handler =
        Method::new("_EVT".into(), 1, true, scans.iter().map(|scan| -> &dyn Aml { scan }).collect());
    encode(&Device::new("\\_SB_.GED0".into(), vec![&hid, &uid, &resources, &handler]))
}

fn serial_port() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &ZERO);
    let ports = IO::new(serial::PORT, serial::PORT, 1, serial::PORTS);
    let interrupt = Interrupt::new(true, true, false, false, serial::PIN);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    let resources = Name::new("_CRS".into(), &resources);
    encode(&Device::new("\\_SB_.COM1".into(), vec![&hid, &uid, &resources]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(cpus: u32) -> Vec<u8> {
        let pci = encode(&Device::new("\\_SB_.PCI0".into(), vec![]));
        tables(&Facts { cpus, most_cpus: cpus, pci: &pci, scan: crate::pci::SCAN_METHOD, serial: true })
            .unwrap()
    }

    fn table(bytes: &[u8], signature: &[u8]) -> Vec<u8> {
        let at = bytes.windows(4).position(|window| window == signature).unwrap();
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        bytes[at..at + usize::try_from(length).unwrap()].to_vec()
    }

    #[test]
    fn sum_of_every_table_is_zero() {
        let bytes = some(3);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        for signature in [b"XSDT", b"FACP", b"APIC", b"DSDT"] {
            assert_eq!(sum(&table(&bytes, signature)), 0, "{}", String::from_utf8_lossy(signature));
        }
        assert_eq!(sum(&bytes[..20]), 0);
        assert_eq!(sum(&bytes[..36]), 0);
    }

    #[test]
    fn tables_lead_to_each_other() {
        let bytes = some(1);
        let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let at = |address: u64| &bytes[usize::try_from(address - ACPI).unwrap()..][..4];
        let xsdt = number(&bytes, 24);
        assert_eq!(at(xsdt), b"XSDT");
        let xsdt = table(&bytes, b"XSDT");
        assert_eq!([at(number(&xsdt, 36)), at(number(&xsdt, 44))], [b"FACP", b"APIC"]);
        assert_eq!(at(number(&table(&bytes, b"FACP"), 140)), b"DSDT");
    }

    #[test]
    fn each_cpu_is_told_once() {
        let madt = table(&some(254), b"APIC");
        assert_eq!(madt.len(), 44 + 254 * 8 + 12);
        let refused = tables(&Facts { cpus: 1, most_cpus: 255, pci: &[], scan: "\\SCAN", serial: false });
        assert!(matches!(refused, Err(AcpiError::Cpus { cpus: 255 })));
    }

    #[test]
    fn cpus_that_can_come_are_told_apart_from_those_that_are_there() {
        let facts = Facts { cpus: 2, most_cpus: 254, pci: &[], scan: "\\SCAN", serial: false };
        let bytes = tables(&facts).unwrap();
        let madt = table(&bytes, b"APIC");
        let flags: Vec<u8> = (0..254).map(|number| madt[44 + number * 8 + 4]).collect();
        assert_eq!((&flags[..2], &flags[2..]), (&[1, 1][..], &[2; 252][..]));
        let dsdt = table(&bytes, b"DSDT");
        assert_eq!(dsdt.windows(4).filter(|name| name == b"_MAT").count(), 252);
        assert!(u64::try_from(bytes.len()).unwrap() < (ACPI_END - ACPI) / 2, "{}", bytes.len());
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let memory = crate::memory::allocate(64 << 20, 0, crate::memory::Backing::default()).unwrap();
        let memory = vm_memory::GuestAddressSpace::memory(&memory);
        let pci = vec![0; 0x2_0000];
        let refused =
            write(&memory, &Facts { cpus: 1, most_cpus: 1, pci: &pci, scan: "\\SCAN", serial: false });
        assert!(matches!(refused, Err(AcpiError::Room { .. })));
    }
}
