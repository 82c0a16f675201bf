//! Virtual CPUs that come while the guest runs: the registers that tell the guest how many there are, and what ACPI says of them
//! (ACPI 6.5, sections 5.6.6 and 8.4).
//!
//! ```text
//!   Present::set ── event ─▶ CSCN ()  for each CPU from TOLD up to HAVE: Notify (Cxxx, 1), and TOLD is HAVE
//!                                     └─▶ the guest asks _STA, reads the APIC's number in _MAT, and may bring the CPU to use
//!
//!   ports, four bytes each
//!   +0 HAVE   how many CPUs there are; what is written is lost
//!   +4 TOLD   how many of them the guest knows of; it keeps that itself
//! ```
//!
//! They come in the order of their numbers, and none goes: a guest that needs fewer puts them out of use by itself.

use std::sync::atomic::{AtomicU32, Ordering};

use acpi_tables::Aml;
use acpi_tables::aml::{
    BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, LessEqual,
    LessThan, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, Return, Store, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use crate::bus;

/// First port of the registers.
pub const PORT: u16 = 0xae20;
/// How many ports they have.
pub const PORTS: u16 = 8;
/// The ACPI method that looks for new CPUs.
pub const SCAN_METHOD: &str = "\\_SB_.CPUS.CSCN";

const HAVE: u64 = 0;
const TOLD: u64 = 4;
/// Device check (ACPI 6.5, table 5.218).
const DEVICE_CHECK: u8 = 1;
/// `_STA` of what is there, on, shown and works.
const THERE: u8 = 0xf;

/// The registers.
pub struct Present {
    have: AtomicU32,
    told: AtomicU32,
}

impl Present {
    /// So many CPUs are there from the start.
    pub fn new(count: u32) -> Present {
        Present { have: AtomicU32::new(count), told: AtomicU32::new(count) }
    }

    /// So many are there from now on. The guest looks when the event is raised that leads to [`SCAN_METHOD`].
    pub fn set(&self, count: u32) {
        self.have.store(count, Ordering::SeqCst);
    }
}

impl Present {
    /// How many the guest knows of, for a snapshot.
    pub fn told(&self) -> u32 {
        self.told.load(Ordering::SeqCst)
    }

    /// As [`Present::told`] said.
    pub fn restore(&self, told: u32) {
        self.told.store(told, Ordering::SeqCst);
    }
}

impl bus::Device for Present {
    fn read(&self, offset: u64, into: &mut [u8]) {
        let Ok(into) = <&mut [u8; 4]>::try_from(into) else { return };
        let value = match offset {
            HAVE => &self.have,
            TOLD => &self.told,
            _ => return,
        };
        *into = value.load(Ordering::SeqCst).to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (TOLD, Ok(told)) = (offset, <[u8; 4]>::try_from(data)) {
            self.told.store(u32::from_le_bytes(told), Ordering::SeqCst);
        }
    }
}

/// The device `\_SB.CPUS` with the CPUs `first` to `end`, without the latter: those that can come.
pub fn aml(first: u8, end: u8) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &"ACPI0010");
    let uid = Name::new("_UID".into(), &ZERO);
    let region = OpRegion::new("CREG".into(), OpRegionSpace::SystemIO, &PORT, &PORTS);
    let registers = Field::new(
        "CREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"HAVE", *b"TOLD"].map(|name| FieldEntry::Named(name, 32)).to_vec(),
    );
    let cpus = Encoded((first..end).flat_map(cpu).collect());
    let scan = Encoded(scan(first, end));
    encode(&Device::new("\\_SB_.CPUS".into(), vec![&hid, &uid, &region, &registers, &cpus, &scan]))
}

/// AML that is ready.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn name(number: u8) -> Path {
    format!("C{number:03}").as_str().into()
}

/// One CPU, whose number and whose APIC's number are the same.
fn cpu(number: u8) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &number);
    let have: Path = "HAVE".into();
    let (is_there, there, absent) = (LessThan::new(&number, &have), Return::new(&THERE), Return::new(&ZERO));
    let there = If::new(&is_there, vec![&there]);
    let status = Method::new("_STA".into(), 0, true, vec![&there, &absent]);
    let apic = BufferData::new(encode(&ProcessorLocalApic::new(number, number, EnabledStatus::Enabled)));
    let apic = Name::new("_MAT".into(), &apic);
    encode(&Device::new(name(number), vec![&hid, &uid, &status, &apic]))
}

fn scan(first: u8, end: u8) -> Vec<u8> {
    let (have, told): (Path, Path) = ("HAVE".into(), "TOLD".into());
    let mut body = encode(&Store::new(&Local(0), &told));
    body.extend(encode(&Store::new(&Local(1), &have)));
    body.extend(encode(&Store::new(&told, &Local(1))));
    for number in first..end {
        let name = name(number);
        let notify = Notify::new(&name, &DEVICE_CHECK);
        let (is_new, is_there) = (LessEqual::new(&Local(0), &number), LessThan::new(&number, &Local(1)));
        let come = If::new(&is_there, vec![&notify]);
        body.extend(encode(&If::new(&is_new, vec![&come])));
    }
    let body = Encoded(body);
    encode(&Method::new("CSCN".into(), 0, true, vec![&body]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Device as _;

    fn read(registers: &Present, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; length];
        registers.read(offset, &mut bytes);
        bytes
    }

    #[test]
    fn guest_learns_how_many_there_are_and_keeps_what_it_knows() {
        let registers = Present::new(1);
        registers.set(3);
        assert_eq!([read(&registers, HAVE, 4), read(&registers, TOLD, 4)], [[3, 0, 0, 0], [1, 0, 0, 0]]);
        registers.write(TOLD, &[3, 0, 0, 0]);
        registers.write(HAVE, &[9, 0, 0, 0]);
        assert_eq!([read(&registers, HAVE, 4), read(&registers, TOLD, 4)], [[3, 0, 0, 0], [3, 0, 0, 0]]);
    }

    #[test]
    fn accesses_that_no_register_has_change_nothing() {
        let registers = Present::new(2);
        for (offset, length) in [(0, 1), (0, 8), (2, 4), (4, 2), (8, 4), (u64::MAX, 4)] {
            registers.write(offset, &vec![7; length]);
            assert_eq!(read(&registers, offset, length), vec![0xff; length], "{offset} {length}");
        }
        assert_eq!([read(&registers, HAVE, 4), read(&registers, TOLD, 4)], [[2, 0, 0, 0], [2, 0, 0, 0]]);
    }

    #[test]
    fn each_cpu_that_can_come_is_described_and_notified_of() {
        let bytes = aml(2, 5);
        let count = |part: &[u8]| bytes.windows(part.len()).filter(|window| *window == part).count();
        for (name, times) in [(b"C001", 0), (b"C002", 2), (b"C004", 2), (b"C005", 0)] {
            assert_eq!(count(name), times, "{}", String::from_utf8_lossy(name));
        }
        // What a MADT would say: kind 0, 8 bytes, both numbers, enabled.
        assert_eq!(count(&[0, 8, 3, 3, 1, 0, 0, 0]), 1);
    }
}
