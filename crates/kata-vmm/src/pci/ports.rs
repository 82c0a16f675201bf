//! How a guest reaches the bus: configuration mechanism #1 (PCI 3.0, section 3.2.2.3.2) or its like in memory, and the registers of
//! hot-plug.
//!
//! ```text
//!   0xcf8 address: 1<<31 enable | bus<<16 | device<<11 | function<<8 | register
//!   0xcfc data, of one, two or four bytes
//!
//!   hot-plug, four bytes each, a bit for each slot
//!   +0 came    read: slots that have a new device.          Write ones: the guest has seen them
//!   +4 leave   read: slots whose device is to be let go.    Write ones: the guest has seen them
//!   +8 eject   write ones: the guest has let go of them
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Root;
use crate::bus::Device;

/// First port of the configuration mechanism.
pub const CONFIGURATION_PORT: u16 = 0xcf8;
/// How many it has.
pub const CONFIGURATION_PORTS: u16 = 8;
/// First port of the hot-plug registers.
pub const HOTPLUG_PORT: u16 = 0xae00;
/// How many they have.
pub const HOTPLUG_PORTS: u16 = 12;

const ENABLE: u32 = 1 << 31;

/// Offsets of the hot-plug registers.
pub const CAME: u64 = 0;
pub const LEAVE: u64 = 4;
pub const EJECT: u64 = 8;

/// The configuration mechanism.
pub struct Ports(pub Arc<Root>);

impl Ports {
    /// Which slot and register an access of the data port is for. Only function 0 of bus 0 is there.
    fn target(&self, offset: u64, length: usize) -> Option<(u8, usize)> {
        let address = self.0.address.load(Ordering::SeqCst);
        let within = usize::try_from(offset.checked_sub(4)?).ok()?;
        let [register, function, bus, _] = address.to_le_bytes();
        let there = address & ENABLE != 0 && bus == 0 && function & 7 == 0 && within + length <= 4;
        there.then_some((function >> 3, usize::from(register & 0xfc) + within))
    }
}

impl Device for Ports {
    fn read(&self, offset: u64, into: &mut [u8]) {
        if offset == 0 {
            if let Ok(into) = <&mut [u8; 4]>::try_from(into) {
                *into = self.0.address.load(Ordering::SeqCst).to_le_bytes();
            }
        } else if let Some((slot, register)) = self.target(offset, into.len()) {
            self.0.read_configuration(slot, register, into);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            // Narrower writes are not for this register.
            if let Ok(data) = <[u8; 4]>::try_from(data) {
                self.0.address.store(u32::from_le_bytes(data) & !0x7f00_0003, Ordering::SeqCst);
            }
        } else if let Some((slot, register)) = self.target(offset, data.len()) {
            self.0.write_configuration(slot, register, data);
        }
    }
}

/// The hot-plug registers.
pub struct HotPlug(pub Arc<Root>);

impl Device for HotPlug {
    fn read(&self, offset: u64, into: &mut [u8]) {
        let Ok(into) = <&mut [u8; 4]>::try_from(into) else { return };
        *into = match offset {
            CAME => self.0.came(),
            LEAVE => self.0.leaving(),
            _ => 0,
        }
        .to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else { return };
        let slots = u32::from_le_bytes(data);
        match offset {
            CAME => self.0.seen(slots, 0),
            LEAVE => self.0.seen(0, slots),
            EJECT => self.0.eject(slots),
            _ => {}
        }
    }
}
