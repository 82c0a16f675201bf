//! Devices that the host plugs in, found by where they are in the machine.
//!
//! ```text
//!  host                                   guest
//!  device_add …,bus=rp0,addr=0            /sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0/virtio3/block/vda
//!  "02/00" ─── CreateContainer ────────▶  PciPath ── look ─▶ not there yet ── wait ─┐
//!                                                      ▲                            │
//!                                         kernel ── uevent ─────────────────────────┘
//! ```
//!
//! Request and device may arrive in either order. Whoever waits listens first and looks then, so that what arrives in
//! between is not missed; an event says only that it is worth looking again.

mod disk;
mod passed;
mod pci;
mod uevent;

pub use disk::{DiskError, Disks, Missing};
pub use passed::{DRIVERS, DeviceError, Passed, Passing, check};
pub use pci::{PciPath, PciPathError};
pub use uevent::Uevents;
