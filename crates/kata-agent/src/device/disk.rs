//! Disks: from what a request calls them to a block device that can be opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use tokio::time::{Instant, timeout_at};

use super::pci::{self, PciPath, PciPathError};
use super::uevent::Uevents;
use crate::aside::{self, AsideError};
use crate::modules::{ModuleError, Modules};

/// The drivers of the disks that a host plugs in: behind virtio themselves, behind a SCSI controller, memory.
const DRIVERS: [&[&str]; 3] = [&["virtio_blk"], &["virtio_scsi", "sd_mod"], &["nfit", "nd_pmem"]];

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// What the request calls it is neither of the two forms.
    #[error("a disk is called by its PCI path or by /dev/NAME")]
    Source(#[from] PciPathError),
    /// What the request calls a SCSI disk is none.
    #[error("{0:?} is not the address of a SCSI disk: target and unit, as in 0:1")]
    Address(String),
    /// The driver's module.
    #[error("the driver of disks")]
    Driver(#[source] ModuleError),
    /// The kernel's events cannot be heard.
    #[error("listening for device events")]
    Listen(#[source] std::io::Error),
    /// It has not come.
    #[error(
        "disk {disk} has not appeared within {waited:?}: either the host has not plugged it in, or it needs longer \
         (agent.hotplug_timeout)"
    )]
    Absent {
        /// As the request calls it.
        disk: String,
        /// How long it was waited for.
        waited: Duration,
        /// What there was instead.
        #[source]
        missing: Missing,
    },
    /// The kernel did not come back.
    #[error(transparent)]
    Aside(#[from] AsideError),
}

/// What was found at the end of the way to a disk that is not there.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// Nothing is plugged in at this address.
    #[error("there is no PCI device {address}; on its bus: {}", list(.present))]
    Device {
        /// Domain, bus, device and function.
        address: String,
        /// What else is on its bus.
        present: Vec<String>,
    },
    /// The way goes on behind a device that nothing can be plugged into.
    #[error("PCI device {address} is not a bridge")]
    Bridge {
        /// Domain, bus, device and function.
        address: String,
    },
    /// The device is there and no disk of it.
    #[error("PCI device {address} ({id}) is not a virtio disk, or its driver has not taken it yet")]
    Disk {
        /// Domain, bus, device and function.
        address: String,
        /// Vendor and device number.
        id: String,
    },
    /// No controller has such a SCSI disk.
    #[error("no SCSI controller has a disk {0}")]
    Scsi(String),
    /// The block device is not open to anybody yet.
    #[error("opening {node:?}")]
    Node {
        /// Its path.
        node: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
}

fn list(addresses: &[String]) -> String {
    if addresses.is_empty() { "none".to_owned() } else { addresses.join(", ") }
}

/// Finds disks and waits for those that are still on their way.
#[derive(Debug)]
pub struct Disks {
    modules: Arc<Modules>,
    tree: Tree,
    timeout: Duration,
    /// For each thing that is asked of the kernel.
    bound: Duration,
}

impl Disks {
    /// Those of this guest; `timeout` is how long one may take to appear.
    #[must_use]
    pub fn new(modules: Arc<Modules>, timeout: Duration) -> Self {
        let tree = Tree { sys: "/sys".into(), dev: "/dev".into() };
        Self { modules, tree, timeout, bound: aside::BOUND }
    }

    /// The block device of `disk`, a [`PciPath`] or `/dev/NAME`, once it can be opened.
    ///
    /// # Errors
    /// [`DiskError`]; [`DiskError::Absent`] after the timeout.
    pub async fn find(&self, disk: &str) -> Result<PathBuf, DiskError> {
        self.appear(disk, Place::parse(disk)?).await
    }

    /// The block device of the SCSI disk at `address`, target and unit, once it can be opened.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub async fn find_scsi(&self, address: &str) -> Result<PathBuf, DiskError> {
        self.appear(address, Place::scsi(address)?).await
    }

    async fn appear(&self, disk: &str, place: Place) -> Result<PathBuf, DiskError> {
        // Before the driver: its disks must not appear unheard.
        let uevents = Uevents::listen().map_err(DiskError::Listen)?;
        let (modules, drivers) = (self.modules.clone(), place.drivers());
        let load = move || drivers.iter().try_for_each(|driver| modules.want(driver));
        let what = format!("loading the driver of disk {disk}");
        aside::within(self.bound, what, load).await?.map_err(DiskError::Driver)?;
        self.wait(disk, &place, &uevents).await
    }

    async fn wait(&self, disk: &str, place: &Place, uevents: &Uevents) -> Result<PathBuf, DiskError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let (tree, wanted) = (self.tree.clone(), place.clone());
            // The first to open a disk may read from it, and so wait for the host; so may a controller that is told to look.
            let what = format!("looking for disk {disk}");
            let missing = match aside::within(self.bound, what, move || tree.look(&wanted)).await? {
                Ok(node) => return Ok(node),
                Err(missing) => missing,
            };
            match timeout_at(deadline, uevents.changed()).await {
                Ok(changed) => changed.map_err(DiskError::Listen)?,
                Err(_) => {
                    return Err(DiskError::Absent { disk: disk.to_owned(), waited: self.timeout, missing });
                }
            }
        }
    }
}

/// What a request calls a disk.
#[derive(Clone, Debug)]
enum Place {
    Pci(PciPath),
    /// Below `/dev`.
    Name(String),
    /// Target and unit behind a SCSI controller.
    Scsi(u16, u16),
}

impl Place {
    fn parse(disk: &str) -> Result<Self, PciPathError> {
        match disk.strip_prefix("/dev/") {
            Some(name) if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric()) => {
                Ok(Self::Name(name.to_owned()))
            }
            _ => disk.parse().map(Self::Pci),
        }
    }

    fn scsi(address: &str) -> Result<Self, DiskError> {
        let parts = address.split_once(':');
        let parsed =
            parts.and_then(|(target, unit)| Some(Self::Scsi(target.parse().ok()?, unit.parse().ok()?)));
        parsed.ok_or_else(|| DiskError::Address(address.to_owned()))
    }

    fn drivers(&self) -> &'static [&'static str] {
        let [virtio, scsi, memory] = DRIVERS;
        match self {
            Self::Scsi(..) => scsi,
            Self::Name(name) if name.starts_with("pmem") => memory,
            Self::Pci(_) | Self::Name(_) => virtio,
        }
    }
}

/// Where the kernel shows its devices.
#[derive(Clone, Debug)]
struct Tree {
    sys: PathBuf,
    dev: PathBuf,
}

impl Tree {
    fn look(&self, place: &Place) -> Result<PathBuf, Missing> {
        let name = match place {
            Place::Name(name) => name.clone(),
            Place::Pci(path) => disk_of(&path.directory(&self.sys)?)?,
            Place::Scsi(target, unit) => self.scsi_disk(*target, *unit)?,
        };
        let node = self.dev.join(name);
        // In sysfs it is before it can be opened: the kernel's last step is the first that is of use.
        match open(&node, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => Ok(node),
            Err(error) => Err(Missing::Node { node, source: error.into() }),
        }
    }
}

impl Tree {
    /// The name of the disk that some controller has there: `HOST:0:TARGET:UNIT/block/NAME`.
    fn scsi_disk(&self, target: u16, unit: u16) -> Result<String, Missing> {
        let devices = self.sys.join("bus/scsi/devices");
        let end = format!(":0:{target}:{unit}");
        let mut found = pci::names(&devices).filter(|name| name.ends_with(&end));
        let disk = found.find_map(|name| pci::names(&devices.join(name).join("block")).next());
        disk.ok_or_else(|| {
            // A controller that tells of nothing by itself is told to look. Where none is, nothing is lost.
            for host in pci::names(&self.sys.join("class/scsi_host")) {
                let scan = self.sys.join("class/scsi_host").join(host).join("scan");
                let _ = std::fs::write(scan, format!("0 {target} {unit}"));
            }
            Missing::Scsi(format!("{target}:{unit}"))
        })
    }
}

/// The name of the disk that a PCI device is: `DEVICE/virtioN/block/NAME`.
fn disk_of(device: &Path) -> Result<String, Missing> {
    let mut virtio = pci::names(device).filter(|name| name.starts_with("virtio"));
    let disk = virtio.find_map(|virtio| pci::names(&device.join(virtio).join("block")).next());
    disk.ok_or_else(|| {
        let id = |file| std::fs::read_to_string(device.join(file)).unwrap_or_default();
        let digits = |text: String| text.trim().trim_start_matches("0x").to_owned();
        let id = format!("{}:{}", digits(id("vendor")), digits(id("device")));
        Missing::Disk { address: pci::name(device), id }
    })
}

#[cfg(test)]
mod tests;
