//! The registers by which the guest ends its machine: ACPI's for hardware-reduced machines (ACPI 6.5, 4.8.3.7, 4.8.3.6).

use std::sync::Arc;

use kata_vmm_api::EndReason;

use crate::bus::Device;
use crate::kvm::Ending;

/// Port of the register to sleep by; the others follow it.
pub const SLEEP_CONTROL: u16 = 0x600;
/// Port of the register that tells of a wake-up, of which there is none.
pub const SLEEP_STATUS: u16 = 0x601;
/// Port of the register to reset by.
pub const RESET: u16 = 0x602;
/// How many ports there are.
pub const PORTS: u16 = 3;
/// What resets.
pub const RESET_NOW: u8 = 1;
/// The kind of sleep that is off, as `\_S5` tells it.
pub const OFF: u8 = 5;
/// `SLP_EN` of the control register, with the kind of sleep below it.
const SLEEP_NOW: u8 = 1 << 5;
const KIND: u8 = 7 << 2;

/// The registers.
pub struct Power(pub Arc<Ending>);

impl Device for Power {
    fn read(&self, _: u64, into: &mut [u8]) {
        into.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            0 if value & SLEEP_NOW != 0 && (value & KIND) >> 2 == OFF => self.0.end(EndReason::Shutdown, ""),
            2 if value == RESET_NOW => self.0.end(EndReason::Reset, ""),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(offset: u64, data: &[u8]) -> Option<EndReason> {
        let ending = Arc::new(Ending::new().unwrap());
        Power(Arc::clone(&ending)).write(offset, data);
        ending.get().map(|end| end.reason)
    }

    #[test]
    fn guest_turns_off_and_resets() {
        assert_eq!(after(0, &[SLEEP_NOW | OFF << 2]), Some(EndReason::Shutdown));
        assert_eq!(after(2, &[RESET_NOW]), Some(EndReason::Reset));
    }

    #[test]
    fn anything_else_changes_nothing() {
        for (offset, data) in [
            (0, vec![OFF << 2]),
            (0, vec![SLEEP_NOW | 1 << 2]),
            (1, vec![0xff]),
            (2, vec![0]),
            (2, vec![1, 0]),
        ] {
            assert_eq!(after(offset, &data), None, "{offset} {data:?}");
        }
    }
}
