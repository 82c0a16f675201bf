//! The fuzz target: bytes become a guest's accesses to the ports that every machine has, and what its owner does meanwhile.

#![allow(clippy::expect_used, reason = "a fuzz target ends at the first surprise")]

use std::sync::Arc;

use kata_vmm_api::EndReason;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ports;
use crate::bus::Bus;
use crate::cpus::{self, Present};
use crate::generation::{self, Generation};
use crate::kvm::Ending;
use crate::pci::guest::Guest;
use crate::pci::{CONFIGURATION_PORT, HOTPLUG_PORT};
use crate::power;
use crate::serial::{self, SerialPort};
use crate::virtio::driver::take;

/// Where registers begin, and where there are none.
const PORTS: [u16; 8] = [
    serial::PORT,
    power::SLEEP_CONTROL,
    CONFIGURATION_PORT,
    HOTPLUG_PORT,
    cpus::PORT,
    generation::PORT,
    0x0,
    0xfff8,
];

/// A port where nobody is.
const NOBODY: u64 = 0x80;

struct Machine {
    guest: Guest,
    bus: Bus,
    ending: Arc<Ending>,
    serial: Arc<SerialPort>,
    present: Arc<Present>,
    generation: Arc<Generation>,
    /// How many CPUs there are.
    have: u32,
}

/// Plays `data` to the ports. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let mut machine = Machine::new();
    while let Some([step]) = take(&mut data) {
        if machine.step_once(step, &mut data).is_none() {
            break;
        }
        machine.check();
    }
}

impl Machine {
    fn new() -> Machine {
        let (guest, bus) = (Guest::new(), Bus::default());
        let ending = Arc::new(Ending::new().expect("a descriptor"));
        let serial = Arc::new(port(None));
        let (present, generation) = (Arc::new(Present::new(1)), Arc::new(Generation::default()));
        ports(&bus, &guest.root, &ending).expect("ports");
        bus.insert(serial::PORT.into(), serial::PORTS.into(), serial.clone()).expect("ports");
        bus.insert(cpus::PORT.into(), cpus::PORTS.into(), present.clone()).expect("ports");
        bus.insert(generation::PORT.into(), generation::PORTS.into(), generation.clone()).expect("ports");
        Machine { guest, bus, ending, serial, present, generation, have: 1 }
    }

    fn step_once(&mut self, step: u8, data: &mut &[u8]) -> Option<()> {
        match step % 8 {
            // An access of 1, 2, 4 or 8 bytes.
            0..6 => {
                let [which, offset, width] = take(data)?;
                let bytes: [u8; 8] = take(data)?;
                let base = PORTS.iter().cycle().nth(which.into())?;
                let (address, (bytes, _)) =
                    (u64::from(*base) + u64::from(offset % 16), bytes.split_at(1 << (width % 4)));
                if step.is_multiple_of(2) {
                    self.bus.write(address, bytes);
                } else {
                    self.bus.read(address, &mut bytes.to_vec());
                }
            }
            // CPUs come.
            6 => {
                let [more] = take(data)?;
                self.have = self.have.saturating_add(more.into());
                self.present.set(self.have);
            }
            // The machine is a copy.
            _ => {
                self.generation.renew(&self.guest.memory.memory()).expect("an identifier");
                let mut changed = [0; 4];
                self.bus.read(generation::PORT.into(), &mut changed);
                assert_eq!(u32::from_le_bytes(changed), 1);
            }
        }
        Some(())
    }

    fn check(&self) {
        let mut have = [0; 4];
        self.bus.read(cpus::PORT.into(), &mut have);
        assert_eq!(u32::from_le_bytes(have), self.have, "only the owner brings CPUs");
        let mut nothing = [0; 4];
        self.bus.read(NOBODY, &mut nothing);
        assert_eq!(nothing, [0xff; 4]);
        if let Some(end) = self.ending.get() {
            assert!(matches!(end.reason, EndReason::Shutdown | EndReason::Reset), "{:?}", end.reason);
        }
        // Whatever the guest made of it, the serial port can be that of a copy.
        let registers = self.serial.registers();
        assert_eq!(port(Some(registers)).registers(), registers);
    }
}

/// A serial port that nobody listens to.
fn port(registers: Option<serial::Registers>) -> SerialPort {
    let (_, output) = std::io::pipe().expect("a pipe");
    let interrupt = EventFd::new(EFD_NONBLOCK).expect("an event");
    match registers {
        Some(registers) => SerialPort::restored(output.into(), interrupt, registers),
        None => SerialPort::new(output.into(), interrupt),
    }
    .expect("a serial port")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_access_to_a_port_ends_the_process(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::run(&data);
        }
    }

    /// Inputs that show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_ports_alive() {
        crate::virtio::driver::corpus("ports", super::run);
    }
}
