//! What ACPI tells the guest of the bus (ACPI 6.5): its window and ports, and how devices come and go.
//!
//! ```text
//!   Device (\_SB.PCI0)
//!     _CRS      bus 0, the configuration ports, the windows
//!     CAME, LEAV, EJCT   the hot-plug registers
//!     PCNT ()   for each slot: Notify (Sxx, 1) if it has a new device, Notify (Sxx, 3) if its device is to go
//!     Device (Sxx)  _ADR, _SUN, _EJ0 for each of the slots 1 to 31
//! ```

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path,
    ResourceTemplate, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::ports::{CONFIGURATION_PORT, CONFIGURATION_PORTS, HOTPLUG_PORT, HOTPLUG_PORTS};
use super::{SLOTS, Windows};

/// Device check, and request to eject (ACPI 6.5, table 5.218).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The device `\_SB.PCI0`.
pub fn root(windows: Windows) -> Vec<u8> {
    let ports = u8::try_from(CONFIGURATION_PORTS).unwrap_or(u8::MAX);
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = IO::new(CONFIGURATION_PORT, CONFIGURATION_PORT, 1, ports);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let Windows { low, high } = windows;
    let low = AddressSpace::<u32>::new_memory(uncached, true, low.base, low.last(), None);
    let high = high.map(|high| AddressSpace::<u64>::new_memory(uncached, true, high.base, high.last(), None));
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports, &low];
    resources.extend(high.iter().map(|high| -> &dyn Aml { high }));
    let resources = ResourceTemplate::new(resources);
    let slots: Vec<Bytes> = (1..SLOTS).map(slot).collect();
    let scan = Bytes(scan());
    let registers = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [*b"CAME", *b"LEAV", *b"EJCT"].map(|name| FieldEntry::Named(name, 32)).to_vec(),
    );
    let resources = Name::new("_CRS".into(), &resources);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &ZERO);
    let bus = Name::new("_BBN".into(), &ZERO);
    let region = OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &HOTPLUG_PORT, &HOTPLUG_PORTS);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &bus, &resources, &region, &registers];
    children.extend(slots.iter().map(|slot| -> &dyn Aml { slot }));
    children.push(&scan);
    encode(&Device::new("\\_SB_.PCI0".into(), children))
}

/// AML that is ready.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn encode(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// A slot's name; its bit in the registers is shifted by its number.
fn name(slot: u8) -> Path {
    format!("S{slot:03}").as_str().into()
}

fn bit(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}

/// A slot and how its device is let go.
fn slot(slot: u8) -> Bytes {
    let address = Name::new("_ADR".into(), &(u32::from(slot) << 16));
    let number = Name::new("_SUN".into(), &slot);
    let bit = bit(slot);
    let register: Path = "EJCT".into();
    let eject = Store::new(&register, &bit);
    let eject = Method::new("_EJ0".into(), 1, true, vec![&eject]);
    Bytes(encode(&Device::new(name(slot), vec![&address, &number, &eject])))
}

/// Tells the guest's drivers of what has come and is to go, and the registers that they were told.
fn scan() -> Vec<u8> {
    let mut body = Vec::new();
    for (register, event) in [("CAME", DEVICE_CHECK), ("LEAV", EJECT_REQUEST)] {
        let register: Path = register.into();
        body.extend(encode(&Store::new(&Local(0), &register)));
        body.extend(encode(&Store::new(&register, &Local(0))));
        for slot in 1..SLOTS {
            let (bit, name) = (bit(slot), name(slot));
            let told = Notify::new(&name, &event);
            body.extend(encode(&If::new(&And::new(&ZERO, &Local(0), &bit), vec![&told])));
        }
    }
    let body = Bytes(body);
    encode(&Method::new("PCNT".into(), 0, true, vec![&body]))
}

#[cfg(test)]
mod tests {
    use super::super::{HighWindow, Window};
    use super::*;

    fn find(bytes: &[u8], part: &[u8]) -> usize {
        bytes.windows(part.len()).filter(|window| *window == part).count()
    }

    #[test]
    fn window_and_every_slot_are_told() {
        let low = Window { base: 0xc000_0000, size: 0x1000_0000 };
        let high = Some(HighWindow { base: 0x40_0000_0000, size: 0x10_0000_0000 });
        let bytes = root(Windows { low, high });
        let window: Vec<u8> = [0xc000_0000u32, 0xcfff_ffff, 0, 0x1000_0000].map(u32::to_le_bytes).concat();
        assert_eq!(find(&bytes, &window), 1);
        let window = [0x40_0000_0000u64, 0x4f_ffff_ffff, 0, 0x10_0000_0000].map(u64::to_le_bytes).concat();
        assert_eq!((find(&bytes, &window), find(&root(low.into()), &window)), (1, 0));
        assert_eq!(find(&bytes, b"_EJ0"), usize::from(SLOTS) - 1);
        for slot in 1..SLOTS {
            // Its device, and a notification of each kind.
            assert_eq!(find(&bytes, format!("S{slot:03}").as_bytes()), 3, "slot {slot}");
        }
    }
}
