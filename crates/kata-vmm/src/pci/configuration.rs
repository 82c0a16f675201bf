//! The configuration space of a function: header of type 0 with memory BARs, and a list of capabilities (PCI 3.0, section 6).
//!
//! ```text
//!   0x00 vendor, device, command, status, revision, class      read-only but for three bits of the command
//!   0x10 BARs: memory, of 32 or 64 bits                        writable above their size
//!   0x2c subsystem           0x34 first capability             0x3c interrupt line: for the guest to remember
//!   0x40 capabilities, one after another
//! ```
//!
//! Every byte has a mask of the bits that a guest can write; what it cannot write stays as it was made.

use super::PciError;

/// Bytes of a configuration space.
pub const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const LATENCY: usize = 0x0d;
const BAR: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// Command: the function answers at its BAR.
const MEMORY: u16 = 1 << 1;
/// Command: the function may reach memory by itself. Kept for the guest to read; Linux sets it before it uses a device.
const MASTER: u16 = 1 << 2;
/// Command: no INTx, of which there is none here.
const NO_INTX: u16 = 1 << 10;
/// Status: there are capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device, by the vendor.
    pub device: u16,
    /// Base class, subclass and interface, in 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Number of its register, the first of two where it is wide: 0 to 5.
    pub register: usize,
    /// Bytes, a power of two from 16.
    pub size: u64,
    /// Its address has 64 bits, and two registers.
    pub wide: bool,
    /// Reading changes nothing.
    pub prefetchable: bool,
}

impl Bar {
    /// Where its register is.
    fn offset(self) -> usize {
        BAR + 4 * self.register
    }
}

/// A configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability's offset goes.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl Configuration {
    /// Without BAR and capabilities.
    pub fn new(identity: Identity) -> Configuration {
        let mut space = Configuration {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: CAPABILITIES,
            free: FIRST_CAPABILITY,
        };
        let [class @ .., _] = identity.class.to_le_bytes();
        space.place(0x00, &identity.vendor.to_le_bytes());
        space.place(0x02, &identity.device.to_le_bytes());
        space.place(0x08, &[identity.revision]);
        space.place(0x09, &class);
        space.place(0x2c, &identity.subsystem.0.to_le_bytes());
        space.place(0x2e, &identity.subsystem.1.to_le_bytes());
        space.open(COMMAND, &(MEMORY | MASTER | NO_INTX).to_le_bytes());
        for remembered in [CACHE_LINE, LATENCY, INTERRUPT_LINE] {
            space.open(remembered, &[0xff]);
        }
        space
    }

    /// Gives it a BAR, first at `base`.
    pub fn set_bar(&mut self, bar: Bar, base: u64) {
        let address = !(bar.size.max(16) - 1);
        let kind = u32::from(bar.wide) << 2 | u32::from(bar.prefetchable) << 3;
        let ([low, high], [low_mask, high_mask]) = (halves(base & address), halves(address));
        self.place(bar.offset(), &(low | kind).to_le_bytes());
        self.open(bar.offset(), &low_mask.to_le_bytes());
        if bar.wide {
            self.place(bar.offset() + 4, &high.to_le_bytes());
            self.open(bar.offset() + 4, &high_mask.to_le_bytes());
        }
    }

    /// Adds a capability: its body comes after identifier and link, and so do the bits of it that a guest can write. Answers its
    /// offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, PciError> {
        let at = self.free;
        self.put_capability(at, id, body, writable)?;
        Ok(at)
    }

    /// The same at an offset of the caller's choice, behind all others in the list.
    pub fn put_capability(
        &mut self,
        at: usize,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<(), PciError> {
        let end = at.saturating_add(2 + body.len());
        let link = u8::try_from(at).ok().filter(|_| end <= SIZE && writable.len() <= body.len());
        let link = link.ok_or(PciError::Capabilities)?;
        self.place(STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.place(self.link, &[link]);
        self.place(at, &[id, 0]);
        self.place(at + 2, body);
        self.open(at + 2, writable);
        self.link = at + 1;
        self.free = self.free.max(end.next_multiple_of(4));
        Ok(())
    }

    /// Reads what there is at an offset; beyond the end `into` stays as it is.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let end = offset.saturating_add(into.len());
        if let Some(from) = self.bytes.get(offset..end) {
            into.copy_from_slice(from);
        }
    }

    /// A guest's write: only what it may write changes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset.saturating_add(data.len());
        let (Some(bytes), Some(writable)) = (self.bytes.get_mut(offset..end), self.writable.get(offset..end))
        else {
            return;
        };
        for ((byte, mask), new) in bytes.iter_mut().zip(writable).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// Changes what a guest reads, whatever it may write.
    pub fn place(&mut self, offset: usize, data: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(offset..offset.saturating_add(data.len())) {
            bytes.copy_from_slice(data);
        }
    }

    /// All bytes, for a snapshot.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes what a guest wrote from a snapshot; false, and nothing is changed, where what it cannot write differs.
    pub fn restore(&mut self, saved: &[u8]) -> bool {
        let same = |((now, mask), saved): ((&u8, &u8), &u8)| now & !mask == saved & !mask;
        let fits = saved.len() == SIZE && self.bytes.iter().zip(&self.writable).zip(saved).all(same);
        if fits {
            self.write(0, saved);
        }
        fits
    }

    /// Lets a guest write these bits.
    fn open(&mut self, offset: usize, mask: &[u8]) {
        if let Some(bytes) = self.writable.get_mut(offset..offset.saturating_add(mask.len())) {
            bytes.copy_from_slice(mask);
        }
    }

    /// Two bytes; zero beyond the end.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes; zero beyond the end.
    pub fn double(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the guest wants a BAR to answer now.
    pub fn decoded(&self, bar: Bar) -> Option<u64> {
        let high = if bar.wide { self.double(bar.offset() + 4) } else { 0 };
        let base = u64::from(high) << 32 | u64::from(self.double(bar.offset()) & !0xf);
        (self.word(COMMAND) & MEMORY != 0).then_some(base)
    }

    /// Whether the guest lets the function reach memory by itself.
    pub fn is_master(&self) -> bool {
        self.word(COMMAND) & MASTER != 0
    }

    /// Takes the guest's commands back, as a reset does.
    pub fn clear_command(&mut self) {
        self.place(COMMAND, &[0; 2]);
    }
}

fn halves(value: u64) -> [u32; 2] {
    [value, value >> 32].map(|half| u32::try_from(half & 0xffff_ffff).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> Configuration {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_00_00,
            revision: 1,
            subsystem: (0x1af4, 0x40),
        };
        let mut space = Configuration::new(identity);
        space.set_bar(FIRST, 0xc000_8000);
        space
    }

    const FIRST: Bar = Bar { register: 0, size: 0x8000, wide: false, prefetchable: false };

    #[test]
    fn identity_is_where_the_specification_has_it_and_cannot_be_written() {
        let mut space = space();
        for offset in (0..SIZE).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!((space.word(0), space.word(2)), (0x1af4, 0x1042));
        assert_eq!(space.double(8), 0x0100_0001);
        assert_eq!((space.word(0x2c), space.word(0x2e)), (0x1af4, 0x40));
        assert_eq!(space.word(COMMAND), MEMORY | MASTER | NO_INTX);
    }

    #[test]
    fn bar_tells_its_size_as_guests_ask_for_it() {
        let mut space = space();
        assert_eq!(space.double(BAR), 0xc000_8000);
        space.write(BAR, &u32::MAX.to_le_bytes());
        assert_eq!(!space.double(BAR) + 1, 0x8000);
        space.write(BAR, &0xc123_ffff_u32.to_le_bytes());
        assert_eq!(space.decoded(FIRST), None);
        space.write(COMMAND, &MEMORY.to_le_bytes());
        assert_eq!(space.decoded(FIRST), Some(0xc123_8000));
        // Other BARs are not there.
        space.write(BAR + 4, &u32::MAX.to_le_bytes());
        assert_eq!(space.double(BAR + 4), 0);
    }

    proptest! {
        /// As guests ask: all ones into the registers, and what stays says how large it is.
        #[test]
        fn bar_of_any_size_tells_it_and_answers_only_at_its_multiples(
            register in 0usize..5, order in 4u32..50, prefetchable: bool, base: u64
        ) {
            let bar = Bar { register, size: 1 << order, wide: order > 30, prefetchable };
            let mut space = space();
            space.set_bar(bar, 0);
            space.write(COMMAND, &MEMORY.to_le_bytes());
            space.write(bar.offset(), &[0xff; 4]);
            let high = if bar.wide { space.write(bar.offset() + 4, &[0xff; 4]); space.double(bar.offset() + 4) } else { u32::MAX };
            let low = space.double(bar.offset());
            prop_assert_eq!(low & 0xf, u32::from(bar.wide) << 2 | u32::from(prefetchable) << 3);
            let mask = u64::from(high) << 32 | u64::from(low & !0xf);
            prop_assert_eq!((!mask).wrapping_add(1), bar.size);

            let [low, high] = halves(base);
            space.write(bar.offset(), &low.to_le_bytes());
            let whole = if bar.wide { space.write(bar.offset() + 4, &high.to_le_bytes()); base } else { low.into() };
            prop_assert_eq!(space.decoded(bar), Some(whole & !(bar.size - 1)));
        }
    }

    #[test]
    fn capabilities_form_a_list_and_end_with_the_space() {
        let mut space = space();
        let first = space.add_capability(9, &[3, 4, 5], &[]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.word(STATUS), HAS_CAPABILITIES);
        assert_eq!(space.double(CAPABILITIES) & 0xff, 0x40);
        assert_eq!(space.double(0x40), 0x0403_4809);
        assert_eq!(space.word(0x48), 0x0011);
        space.write(0x48, &[0xff; 12]);
        assert_eq!(space.double(0x48), 0xc000_0011);
        assert_eq!(space.double(0x4c), 0);
        let full = std::iter::repeat_with(|| space.add_capability(9, &[0; 14], &[])).find_map(Result::err);
        assert!(matches!(full, Some(PciError::Capabilities)));
    }

    #[test]
    fn access_past_the_end_changes_nothing() {
        let mut space = space();
        let before = space.clone();
        let mut word = [0xff; 4];
        for offset in [254, SIZE, usize::MAX] {
            space.write(offset, &[0; 4]);
            space.read(offset, &mut word);
        }
        assert_eq!((space, word), (before, [0xff; 4]));
    }
}
