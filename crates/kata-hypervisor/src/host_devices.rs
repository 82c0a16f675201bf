//! PCI devices of the host, as a VMM gets them: VFIO's descriptors (Linux, Documentation/driver-api/vfio.rst).
//!
//! ```text
//!   0000:01:00.0 ─ /sys ─▶ bound to vfio-pci, and so is all of its IOMMU group? ─▶ /dev/vfio/vfio, /dev/vfio/GROUP, opened
//!                └ no ───▶ an error that says what to bind
//! ```
//!
//! Nothing is bound here: a driver that is taken from a device of the host is an administrator's decision.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// A PCI device of the host that a guest is to have for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    /// Its name among the machine's devices, `[A-Za-z0-9_-]+`.
    pub id: String,
    /// Where it is on the host, as in `/sys/bus/pci/devices`: `0000:01:00.0`.
    pub address: String,
}

/// Why a device of the host cannot be given to a guest.
#[derive(Debug, Error)]
pub enum HostDeviceError {
    /// Not an address.
    #[error("{0:?} is no address of a PCI device; they are like 0000:01:00.0, see lspci -D")]
    Address(String),
    /// No such device.
    #[error("there is no PCI device {0} on this host; see lspci -D")]
    NotFound(String),
    /// Nothing keeps the device from the host's memory.
    #[error(
        "PCI device {0} is in no IOMMU group; switch the IOMMU on in the host's firmware and kernel (intel_iommu=on on Intel's \
         processors)"
    )]
    NoIommu(String),
    /// It has another driver.
    #[error(
        "PCI device {address} is {}, not bound to vfio-pci; bind it: driverctl set-override {address} vfio-pci",
        bound(.driver.as_deref())
    )]
    NotBound {
        /// The device.
        address: String,
        /// Its driver, if it has one.
        driver: Option<String>,
    },
    /// The IOMMU cannot tell the device from another, which is the host's.
    #[error(
        "PCI device {address} is in IOMMU group {group} with {other}, which is {}; the whole group goes to the guest: bind it to \
         vfio-pci, or to no driver",
        bound(Some(.driver))
    )]
    GroupInUse {
        /// The device.
        address: String,
        /// Its group.
        group: u32,
        /// The other one.
        other: String,
        /// And its driver.
        driver: String,
    },
    /// Somebody else has it.
    #[error("IOMMU group {group} of PCI device {address} is another virtual machine's")]
    Busy {
        /// The device.
        address: String,
        /// Its group.
        group: u32,
    },
    /// A file of `/sys` or `/dev`.
    #[error("{path:?} cannot be used for PCI device {address}; is vfio-pci loaded?", path = .path.display())]
    File {
        /// The device.
        address: String,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM may not pin the guest's memory.
    #[error("the limit of locked memory of the virtual machine monitor cannot be raised to {bytes} bytes")]
    Limit {
        /// What is needed.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn bound(driver: Option<&str>) -> String {
    driver.map_or_else(|| "bound to no driver".to_owned(), |driver| format!("bound to {driver}"))
}

/// The driver whose devices can be lent.
const VFIO: &str = "vfio-pci";
/// Drivers with which a group is the guest's still: of bridges, and of nobody.
const HARMLESS: [&str; 3] = [VFIO, "pci-stub", "pcieport"];

/// The groups that a machine has open, each of which can be opened once.
#[derive(Debug)]
pub(crate) struct Groups {
    sys: PathBuf,
    dev: PathBuf,
    open: Mutex<BTreeMap<u32, Group>>,
}

#[derive(Debug)]
struct Group {
    file: OwnedFd,
    /// Devices that the machine has of it.
    devices: Vec<String>,
}

/// A device that is ready to be handed over.
#[derive(Debug)]
pub(crate) struct Ready {
    pub group: u32,
    pub container_file: OwnedFd,
    pub group_file: OwnedFd,
}

impl Default for Groups {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into(), open: Mutex::default() }
    }
}

impl Groups {
    /// Opens what belongs to a device, if it can be given to a guest. [`Groups::release`] has to follow, also when it was not.
    pub(crate) fn open(&self, device: &HostDevice) -> Result<Ready, HostDeviceError> {
        let group = self.check(&device.address)?;
        let failed = |path: &Path| {
            let (address, path) = (device.address.clone(), path.to_owned());
            move |source| HostDeviceError::File { address, path, source }
        };
        let opened = |path: &Path| File::options().read(true).write(true).open(path).map(OwnedFd::from);
        let container = self.dev.join("vfio/vfio");
        let container_file = opened(&container).map_err(failed(&container))?;
        let mut open = self.lock();
        let path = self.dev.join(format!("vfio/{group}"));
        let mut have = match open.remove(&group) {
            Some(have) => have,
            None => match opened(&path) {
                Ok(file) => Group { file, devices: Vec::new() },
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                    return Err(HostDeviceError::Busy { address: device.address.clone(), group });
                }
                Err(error) => return Err(failed(&path)(error)),
            },
        };
        let group_file = have.file.try_clone().map_err(failed(&path));
        have.devices.push(device.id.clone());
        open.insert(group, have);
        Ok(Ready { group, container_file, group_file: group_file? })
    }

    /// The machine does not have this device any more, or never had.
    pub(crate) fn release(&self, id: &str) {
        self.lock().retain(|_, group| {
            let had = group.devices.len();
            group.devices.retain(|device| device != id);
            had == group.devices.len() || !group.devices.is_empty()
        });
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// There is no machine any more.
    pub(crate) fn release_all(&self) {
        self.lock().clear();
    }

    /// The group of a device that can be given away.
    fn check(&self, address: &str) -> Result<u32, HostDeviceError> {
        if !is_address(address) {
            return Err(HostDeviceError::Address(address.to_owned()));
        }
        let device = self.sys.join("bus/pci/devices").join(address);
        if !device.exists() {
            return Err(HostDeviceError::NotFound(address.to_owned()));
        }
        let group = target(&device.join("iommu_group")).and_then(|name| name.parse().ok());
        let group: u32 = group.ok_or_else(|| HostDeviceError::NoIommu(address.to_owned()))?;
        let driver = target(&device.join("driver"));
        if driver.as_deref() != Some(VFIO) {
            return Err(HostDeviceError::NotBound { address: address.to_owned(), driver });
        }
        let path = self.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        let members = fs::read_dir(&path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let failed = |source| HostDeviceError::File { address: address.to_owned(), path, source };
        for member in members.map_err(failed)? {
            let other = member.file_name().to_string_lossy().into_owned();
            // By its address, whatever kind of link leads there.
            let driver = target(&self.sys.join("bus/pci/devices").join(&other).join("driver"));
            if let Some(driver) = driver.filter(|driver| !HARMLESS.contains(&driver.as_str())) {
                return Err(HostDeviceError::GroupInUse {
                    address: address.to_owned(),
                    group,
                    other,
                    driver,
                });
            }
        }
        Ok(group)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Group>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a link of `/sys` leads to, by its last part.
fn target(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// Domain, bus, device and function in hexadecimal digits.
fn is_address(address: &str) -> bool {
    let hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    let mut parts = address.split([':', '.']);
    let mut next = |digits| parts.next().is_some_and(|part| hex(part, digits));
    let right = next(4) && next(2) && next(2) && next(1);
    right && parts.next().is_none() && address.len() == 12 && address.get(10..11) == Some(".")
}

#[cfg(test)]
pub(crate) mod tests;
