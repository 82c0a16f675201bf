//! PCI as the guest sees it: one bus, on it a host bridge and virtio devices, which come and go while the guest runs.
//!
//! ```text
//!   0xcf8, 0xcfc ──▶ ports ────────────┐                        ┌─▶ slot 0: host bridge
//!   hot-plug ports ──────▶ HotPlug ────┼─▶ Root ─ 32 slots ─────┼─▶ virtio::Function ─▶ virtio::Device
//!   the VMM: attach, plug, unplug ─────┘    │                   └─▶ passed::Function ─▶ passed::Lent, a device of the host
//!                                           └ BARs on the memory bus, in the windows ◀── guest's accesses
//! ```
//!
//! | Part | What it knows | From |
//! |---|---|---|
//! | [`Root`] | which device is in which slot, where BARs may be | |
//! | `configuration` | bytes of a configuration space and which of them a guest can change | PCI 3.0, 6.1, 6.7 |
//! | `msix` | vectors, masks, routes of the hypervisor | PCI 3.0, 6.8.2 |
//! | [`virtio`] | a virtio device behind a BAR | virtio 1.2, 4.1 |
//! | [`passed`] | what a guest sees of a device of the host | PCI 3.0, 6; PCI Express 4.0, 7.5 |
//! | `aml` | what ACPI says of all this, and the methods of hot-plug | ACPI 6.5, 5.6.6, 6.3 |
//!
//! There is no firmware: BARs are given out here, before the guest runs, and Linux keeps them or moves them as it likes. Interrupts
//! are messages only.
//!
//! A device goes in three steps: [`Root::unplug`] sets its bit and the caller raises the event; the guest takes its driver away and
//! writes the slot to the eject register; then the device stands still, nothing leads to it any more, and the slot is free. A guest
//! that never ejects keeps it: how long to wait is for the caller to say. A slot that nobody asked to leave cannot be ejected.

mod aml;
mod configuration;
mod function;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod guest;
mod msix;
pub mod passed;
mod ports;
mod root;
pub mod virtio;

use thiserror::Error;

use crate::events::EventError;
use crate::virtio::ActivateError;

pub use function::Function;
pub use ports::{CONFIGURATION_PORT, CONFIGURATION_PORTS, HOTPLUG_PORT, HOTPLUG_PORTS};
pub use root::{BusState, Departure, Root};

/// The ACPI method that looks at the hot-plug registers: for the handler of the event that the VMM raises after
/// [`Root::plug`] and [`Root::unplug`].
pub const SCAN_METHOD: &str = "\\_SB_.PCI0.PCNT";
/// Slots of the bus, with the host bridge's.
pub const SLOTS: u8 = 32;

/// Number of a slot, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u8);

/// Addresses that BARs may have, below 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub base: u32,
    /// Bytes.
    pub size: u32,
}

impl Window {
    /// Whether a whole BAR is in it.
    pub fn holds(self, base: u32, size: u32) -> bool {
        let offset = base.checked_sub(self.base);
        offset.and_then(|offset| offset.checked_add(size)).is_some_and(|end| end <= self.size)
    }

    /// Last address.
    pub fn last(self) -> u32 {
        self.base.saturating_add(self.size.saturating_sub(1))
    }
}

/// Addresses above 4 GiB that wide BARs may have, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HighWindow {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl HighWindow {
    /// Last address.
    pub fn last(self) -> u64 {
        self.base.saturating_add(self.size.saturating_sub(1))
    }
}

/// All addresses that BARs may have. No memory of the guest's is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// For every BAR.
    pub low: Window,
    /// For wide ones; none where the processor has no addresses left.
    pub high: Option<HighWindow>,
}

impl Windows {
    /// Whether a whole BAR is in one of them.
    pub fn hold(self, base: u64, size: u64) -> bool {
        let within = |first: u64, length: u64| {
            let end = base.checked_sub(first).and_then(|offset| offset.checked_add(size));
            end.is_some_and(|end| end <= length)
        };
        let Windows { low, high } = self;
        within(low.base.into(), low.size.into()) || high.is_some_and(|high| within(high.base, high.size))
    }
}

impl From<Window> for Windows {
    fn from(low: Window) -> Windows {
        Windows { low, high: None }
    }
}

/// Why a device does not come, go, stop or go on.
#[derive(Debug, Error)]
pub enum PciError {
    /// The name is taken.
    #[error("there is a device {id} already; give the new one another name")]
    Exists {
        /// The name.
        id: String,
    },
    /// There is no such device.
    #[error("there is no device {id}")]
    NotFound {
        /// The name.
        id: String,
    },
    /// All slots are taken.
    #[error("all {} slots of the PCI bus are taken; remove a device first", SLOTS - 1)]
    Full,
    /// The window has no room for another BAR.
    #[error("the window of {size:#x} bytes for PCI devices has no room for another")]
    Window {
        /// Bytes of the window.
        size: u32,
    },
    /// Neither has room for a BAR of a device of the host.
    #[error("the windows for PCI devices have no room for a BAR of {size:#x} bytes; remove a device first")]
    NoRoom {
        /// Bytes of the BAR.
        size: u64,
    },
    /// A device of the host.
    #[error(transparent)]
    Passed(#[from] passed::PassedError),
    /// More queues than there are vectors for.
    #[error("a device of {queues} queues is not possible, the most are {}", virtio::MAX_QUEUES)]
    Queues {
        /// How many it has.
        queues: usize,
    },
    /// No room in a configuration space.
    #[error("the configuration space of a device has no room for another capability")]
    Capabilities,
    /// The process has no descriptors left, or the like.
    #[error("a device cannot have the descriptors that it needs")]
    Descriptor(#[source] std::io::Error),
    /// The hypervisor refused.
    #[error("a device cannot have its interrupts")]
    Interrupts(#[from] EventError),
    /// No snapshot is taken.
    #[error("device {id} keeps the machine from being written to a snapshot: {what}")]
    Unsaved {
        /// Its name.
        id: String,
        /// What would be lost.
        what: &'static str,
    },
    /// A snapshot is of another machine.
    #[error("the snapshot is of a machine with other devices: {id}: {what}")]
    Other {
        /// Name of one that differs.
        id: String,
        /// How.
        what: &'static str,
    },
    /// It could not be made to work again after a pause.
    #[error("device {id} does not go on")]
    Resume {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: ActivateError,
    },
}
