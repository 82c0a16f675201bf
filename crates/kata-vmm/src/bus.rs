//! Where the guest's accesses go: port I/O and memory-mapped I/O, each one address space of ranges.
//!
//! ```text
//!   vCPU exit ──▶ Bus::read / write(address) ──▶ the range's Device, with the offset in it
//!                          └─ nobody there: reads are all ones, writes are lost, as on a real bus
//! ```

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

/// Something that the guest reaches by address. Called from any vCPU's thread; what it is told comes from a guest, so there is
/// nothing in it to rely on: neither offset, length nor order.
pub trait Device: Send + Sync {
    /// The guest reads `into.len()` bytes at `offset` of the range. `into` is all ones before.
    fn read(&self, offset: u64, into: &mut [u8]);
    /// The guest writes `data` at `offset` of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be given to a device.
#[derive(Debug, Error)]
pub enum BusError {
    /// No address at all, or beyond the end.
    #[error("{length:#x} bytes from {base:#x} are no range of addresses")]
    Range {
        /// First address.
        base: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Some of it belongs to somebody else.
    #[error("addresses {base:#x} to {last:#x} overlap with a device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Last address.
        last: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

/// One address space. Devices come and go while vCPUs run.
#[derive(Default)]
pub struct Bus(RwLock<BTreeMap<u64, Range>>);

/// What begins at a key of the map.
struct Range {
    last: u64,
    device: Arc<dyn Device>,
}

impl Bus {
    /// Gives `length` addresses from `base` on to a device.
    pub fn insert(&self, base: u64, length: u64, device: Arc<dyn Device>) -> Result<(), BusError> {
        let last = length
            .checked_sub(1)
            .and_then(|rest| base.checked_add(rest))
            .ok_or(BusError::Range { base, length })?;
        let mut ranges = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..=last).next_back().filter(|(_, range)| range.last >= base);
        if let Some((other, _)) = before {
            return Err(BusError::Overlap { base, last, other: *other });
        }
        ranges.insert(base, Range { last, device });
        Ok(())
    }

    /// Takes the range that starts at `base` away from its device. Nothing happens where none does.
    pub fn remove(&self, base: u64) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&base);
    }

    /// A guest's read.
    pub fn read(&self, address: u64, into: &mut [u8]) {
        into.fill(0xff);
        if let Some((offset, device)) = self.find(address, into.len()) {
            device.read(offset, into);
        }
    }

    /// A guest's write.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    /// Whose range the whole access is in. The lock is not held while the device works.
    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn Device>)> {
        let rest = u64::try_from(length).ok()?.checked_sub(1)?;
        let access: RangeInclusive<u64> = address..=address.checked_add(rest)?;
        let ranges = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (base, range) = ranges.range(..=address).next_back()?;
        (*access.end() <= range.last).then(|| (address - base, Arc::clone(&range.device)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Device for Recorder {
        fn read(&self, offset: u64, into: &mut [u8]) {
            into.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn access_reaches_its_device_with_the_offset() {
        let (bus, device) = (Bus::default(), Arc::new(Recorder::default()));
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut byte = [0];
        bus.read(0x1003, &mut byte);
        bus.write(0x100f, &[7]);
        assert_eq!(byte, [3]);
        assert_eq!(*device.0.lock().unwrap(), [(0xf, vec![7])]);
    }

    #[test]
    fn access_beyond_a_range_reaches_nobody_and_reads_ones() {
        let (bus, device) = (Bus::default(), Arc::new(Recorder::default()));
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        for address in [0, 0xfff, 0x100d, 0x1010, u64::MAX] {
            let mut word = [0; 4];
            bus.read(address, &mut word);
            assert_eq!(word, [0xff; 4], "{address:#x}");
            bus.write(address, &word);
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_range_is_refused_until_the_other_is_gone() {
        let bus = Bus::default();
        bus.insert(0x1000, 0x10, Arc::new(Recorder::default())).unwrap();
        for (base, length) in [(0xfff, 2), (0x1000, 0x10), (0x100f, 1), (0x0, 0x2000), (0x1004, 1)] {
            let refused = bus.insert(base, length, Arc::new(Recorder::default()));
            assert!(matches!(refused, Err(BusError::Overlap { other: 0x1000, .. })), "{base:#x}");
        }
        bus.insert(0x1010, 1, Arc::new(Recorder::default())).unwrap();
        bus.remove(0x1000);
        bus.insert(0xfff, 2, Arc::new(Recorder::default())).unwrap();
    }

    #[test]
    fn range_of_nothing_or_past_the_end_is_refused() {
        for (base, length) in [(0, 0), (u64::MAX, 2)] {
            let refused = Bus::default().insert(base, length, Arc::new(Recorder::default()));
            assert!(matches!(refused, Err(BusError::Range { .. })));
        }
    }
}
