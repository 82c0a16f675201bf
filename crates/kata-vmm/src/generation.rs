//! The virtual machine generation identifier: the guest hears that it is a copy, and makes its random numbers anew.
//!
//! ```text
//!   Generation::renew ─▶ 16 random bytes in memory ── event ─▶ GSCN ()  if CHNG: Notify (VGEN, 0x80)
//!                                                                └─▶ the guest reads the bytes, and mixes them into its entropy
//!
//!   port, four bytes
//!   +0 CHNG   read: 1 if the guest has not been told of a change. Write ones: it has
//! ```
//!
//! From the document "Virtual Machine Generation ID" (2012), as Linux's driver (drivers/virt/vmgenid.c) reads it: a device with an
//! object `ADDR`, a package of the two halves of the bytes' address.

use std::sync::atomic::{AtomicU32, Ordering};

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, Name,
    Notify, OpRegion, OpRegionSpace, Package, Path, Store, ZERO,
};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::boot::GENERATION;
use crate::bus;

/// First port of the register.
pub const PORT: u16 = 0xae40;
/// How many ports it has.
pub const PORTS: u16 = 4;
/// The ACPI method that tells the guest of a change.
pub const SCAN_METHOD: &str = "\\_SB_.VGEN.GSCN";

/// What the guest's driver is told.
const CHANGED: u8 = 0x80;

/// The register.
#[derive(Default)]
pub struct Generation {
    changed: AtomicU32,
}

impl Generation {
    /// Gives the guest's memory a new identifier.
    pub fn identify(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        let mut identifier = [0; 16];
        // So few bytes come at once, and whole, from a generator that is ready; it is, long before there are virtual machines.
        getrandom(&mut identifier, GetRandomFlags::empty())
            .map_err(|e| GuestMemoryError::IOError(e.into()))?;
        memory.write_slice(&identifier, GuestAddress(GENERATION))
    }

    /// The guest is another from now on. It looks when the event is raised that leads to [`SCAN_METHOD`].
    pub fn renew(&self, memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
        Generation::identify(memory)?;
        self.changed.store(1, Ordering::SeqCst);
        Ok(())
    }
}

impl bus::Device for Generation {
    fn read(&self, offset: u64, into: &mut [u8]) {
        if let (0, Ok(into)) = (offset, <&mut [u8; 4]>::try_from(into)) {
            *into = self.changed.load(Ordering::SeqCst).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(told)) = (offset, <[u8; 4]>::try_from(data)) {
            self.changed.fetch_and(!u32::from_le_bytes(told), Ordering::SeqCst);
        }
    }
}

/// The device `\_SB.VGEN`.
pub fn aml() -> Vec<u8> {
    let hid = Name::new("_HID".into(), &"KATAVGEN");
    // The document's name, and the two that drivers of Linux have for it.
    let names = Package::new(vec![&"VM_Gen_Counter", &"VM_GEN_COUNTER", &"VMGENCTR"]);
    let names = Name::new("_CID".into(), &names);
    let shown = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let uid = Name::new("_UID".into(), &ZERO);
    let low = u32::try_from(GENERATION & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(GENERATION >> 32).unwrap_or(0);
    let address = Package::new(vec![&low, &high]);
    let address = Name::new("ADDR".into(), &address);
    let region = OpRegion::new("GREG".into(), OpRegionSpace::SystemIO, &PORT, &PORTS);
    let registers = Field::new(
        "GREG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"CHNG", 32)],
    );
    let (register, device): (Path, Path) = ("CHNG".into(), "\\_SB_.VGEN".into());
    let (local, one) = (Local(0), 1u8);
    let (read, told) = (Store::new(&local, &register), Store::new(&register, &local));
    let notify = Notify::new(&device, &CHANGED);
    let is_changed = And::new(&ZERO, &local, &one);
    let tell = If::new(&is_changed, vec![&notify]);
    let scan = Method::new("GSCN".into(), 0, true, vec![&read, &told, &tell]);
    let mut bytes = Vec::new();
    Device::new("\\_SB_.VGEN".into(), vec![&hid, &names, &shown, &uid, &address, &region, &registers, &scan])
        .to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::bus::Device as _;

    fn read(generation: &Generation, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; length];
        generation.read(0, &mut bytes);
        bytes
    }

    #[test]
    fn renewed_identifier_differs_and_is_told_until_the_guest_knows() {
        let memory = crate::memory::allocate(64 << 20, 0, crate::memory::Backing::default()).unwrap();
        let memory = memory.memory();
        let identifier = || memory.read_obj::<[u8; 16]>(GuestAddress(GENERATION)).unwrap();
        let generation = Generation::default();
        Generation::identify(&memory).unwrap();
        let first = identifier();
        assert_eq!(read(&generation, 4), [0; 4]);
        generation.renew(&memory).unwrap();
        assert_ne!(identifier(), first);
        assert_eq!(read(&generation, 4), [1, 0, 0, 0]);
        generation.write(0, &[1]);
        assert_eq!((read(&generation, 4), read(&generation, 1)), (vec![1, 0, 0, 0], vec![0xff]));
        generation.write(0, &[1, 0, 0, 0]);
        assert_eq!(read(&generation, 4), [0; 4]);
    }

    #[test]
    fn device_names_the_address_and_is_notified() {
        let bytes = aml();
        let find = |part: &[u8]| bytes.windows(part.len()).filter(|window| *window == part).count();
        assert_eq!(find(b"VM_Gen_Counter\0"), 2);
        // A package of two numbers, of which the first is a double word and the second is zero.
        assert_eq!(find(&[b'A', b'D', b'D', b'R', 0x12, 8, 2, 0x0c, 0, 0xf0, 0x0f, 0, 0]), 1);
        assert_eq!(find(&[0x0a, CHANGED]), 1);
    }
}
