//! The slots of a machine that devices are plugged into while it runs: which device has which.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::vm::{HypervisorError, PciPath};

/// Where the bridge is that devices are plugged into: far above the slots of the root bus that QEMU gives to other devices, which
/// start at 1.
pub(crate) const BRIDGE_SLOT: u8 = 0x10;
/// The slots that one PCI bridge offers. The first, 0, belongs to the bridge's own hot-plug controller, where it has one.
pub(crate) const SLOTS: RangeInclusive<u8> = 1..=31;

/// Where the guest finds what is in `slot` of the bridge.
pub(crate) fn path(slot: u8) -> PciPath {
    PciPath(format!("{BRIDGE_SLOT:02x}/{slot:02x}"))
}

/// Devices of a running machine by their slot, each with what `T` its driver keeps of it.
#[derive(Debug)]
pub(crate) struct Slots<T>(BTreeMap<u8, (String, T)>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Slots<T> {
    /// Gives `id` the lowest free slot, with what `keep` makes of its number.
    ///
    /// # Errors
    /// [`HypervisorError::DeviceExists`], [`HypervisorError::NoFreeSlot`].
    pub(crate) fn take(
        &mut self,
        id: &str,
        keep: impl FnOnce(u8) -> T,
    ) -> Result<(u8, &mut T), HypervisorError> {
        let id = id.to_owned();
        if self.slot_of(&id).is_some() {
            return Err(HypervisorError::DeviceExists { id });
        }
        let Some(slot) = SLOTS.into_iter().find(|slot| !self.0.contains_key(slot)) else {
            return Err(HypervisorError::NoFreeSlot { id, slots: self.0.len() });
        };
        Ok((slot, &mut self.0.entry(slot).or_insert_with(|| (id, keep(slot))).1))
    }

    /// What is kept of the device `id`.
    ///
    /// # Errors
    /// [`HypervisorError::UnknownDevice`].
    pub(crate) fn get_mut(&mut self, id: &str) -> Result<&mut T, HypervisorError> {
        let kept = self.0.values_mut().find(|(of, _)| of == id);
        kept.map(|(_, kept)| kept).ok_or_else(|| HypervisorError::UnknownDevice { id: id.to_owned() })
    }

    /// Gives the slot of `id` back.
    ///
    /// # Errors
    /// [`HypervisorError::UnknownDevice`].
    pub(crate) fn free(&mut self, id: &str) -> Result<T, HypervisorError> {
        let freed = self.slot_of(id).and_then(|slot| self.0.remove(&slot));
        freed.map(|(_, kept)| kept).ok_or_else(|| HypervisorError::UnknownDevice { id: id.to_owned() })
    }

    /// The devices, in the order of their slots.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.0.values().map(|(id, kept)| (id.as_str(), kept))
    }

    fn slot_of(&self, id: &str) -> Option<u8> {
        self.0.iter().find(|(_, (of, _))| of == id).map(|(slot, _)| *slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_has_two_hexadecimal_digits_for_each_bus() {
        assert_eq!((path(1).0, path(31).0), ("10/01".to_owned(), "10/1f".to_owned()));
    }

    #[test]
    fn lowest_free_slot_is_taken_and_a_freed_one_is_taken_again() {
        let mut slots = Slots::default();
        assert_eq!(slots.take("a", |slot| slot).unwrap().0, 1);
        assert_eq!(slots.take("b", |slot| slot).unwrap().0, 2);
        assert_eq!(slots.free("a").unwrap(), 1);
        assert_eq!(slots.take("c", |slot| slot).unwrap().0, 1);
        assert_eq!(slots.iter().map(|(id, slot)| (id, *slot)).collect::<Vec<_>>(), [("c", 1), ("b", 2)]);
    }

    #[test]
    fn name_that_is_taken_is_refused_and_its_device_stays() {
        let mut slots = Slots::default();
        slots.take("a", |_| "first").unwrap();
        let error = slots.take("a", |_| "second").unwrap_err();
        assert!(matches!(error, HypervisorError::DeviceExists { id } if id == "a"));
        assert_eq!(*slots.get_mut("a").unwrap(), "first");
    }

    #[test]
    fn full_machine_says_how_many_slots_it_has() {
        let mut slots = Slots::default();
        for number in SLOTS {
            slots.take(&format!("disk-{number}"), |_| ()).unwrap();
        }
        let error = slots.take("one-more", |_| ()).unwrap_err();
        assert!(error.to_string().contains("all 31 slots"), "{error}");
    }

    #[test]
    fn device_that_was_never_added_is_unknown() {
        let mut slots = Slots::<()>::default();
        assert!(matches!(slots.free("a").unwrap_err(), HypervisorError::UnknownDevice { id } if id == "a"));
        assert!(slots.get_mut("a").is_err());
    }
}
