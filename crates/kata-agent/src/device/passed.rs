//! Devices that a request passes to a container: from where the host has plugged them in to the guest's own numbers.
//!
//! | type | called by | becomes in the container |
//! |---|---|---|
//! | `blk` | `id`: [`PciPath`] | the block device, at `container_path` |
//! | `mmioblk`, `nvdimm` | `vm_path`: `/dev/NAME` | the same |
//! | `scsi` | `id`: target and unit, `0:1` | the same |
//! | `vfio-pci-gk` | `options`: `HOST=PATH`, each a PCI function of the host and its [`PciPath`] | what the guest's own driver makes of it |
//! | `vfio-pci` | the same | `/dev/vfio/GROUP`, the function being bound to `vfio-pci` |
//! | `blk-ccw`, `vfio-ap`, `vfio-ap-cold` | | refused: devices of another architecture |
//!
//! The specification still has the host's numbers. They are exchanged for the guest's in `linux.devices` and, with the
//! rule that allows them, in `linux.resources.devices`; functions of the host in variables `PCIDEVICE_…`, as device
//! plugins set them, for the guest's addresses.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::agent::Device;
use oci_spec::runtime::{LinuxDeviceType, Spec};
use tokio::time::{Instant, timeout_at};

use super::disk::{DiskError, Disks, Missing};
use super::pci::{self, PciPath, PciPathError};
use super::uevent::Uevents;
use crate::aside::{self, AsideError};
use crate::modules::{ModuleError, Modules};

/// Types that are served.
pub const DRIVERS: [&str; 6] = ["blk", "mmioblk", "nvdimm", "scsi", "vfio-pci", "vfio-pci-gk"];
/// The driver that hands a PCI function to a program.
const VFIO_PCI: &str = "vfio-pci";
/// Variables of device plugins that name PCI functions begin so.
const PCI_VARIABLE: &str = "PCIDEVICE_";

/// A device that cannot be passed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A type that this agent has no driver for.
    #[error("devices of type {0:?} are not supported: {1}")]
    Unsupported(String, &'static str),
    /// A request that makes no sense.
    #[error("device {device:?}: {reason}")]
    Invalid {
        /// Its path in the container, or its id.
        device: String,
        /// What is wrong.
        reason: String,
    },
    /// Where it is plugged in is not said in a form that is known.
    #[error("device {device:?}")]
    Path {
        /// Its path in the container, or its id.
        device: String,
        /// Why.
        #[source]
        source: PciPathError,
    },
    /// A block device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The driver's module.
    #[error("the driver {VFIO_PCI}")]
    Driver(#[source] ModuleError),
    /// The kernel's events cannot be heard.
    #[error("listening for device events")]
    Listen(#[source] io::Error),
    /// It has not come.
    #[error(
        "PCI function {function} of the host has not appeared within {waited:?}: either the host has not plugged it in, \
         or it needs longer (agent.hotplug_timeout)"
    )]
    Absent {
        /// The host's address.
        function: String,
        /// How long it was waited for.
        waited: Duration,
        /// What there was instead.
        #[source]
        missing: Missing,
    },
    /// A file of sysfs.
    #[error("{what} {path:?}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The kernel did not come back.
    #[error(transparent)]
    Aside(#[from] AsideError),
    /// The kernel did not let the driver have it.
    #[error(
        "PCI device {address} stays with the driver {driver:?} and does not go to {VFIO_PCI}: the image has no such driver, or \
         the machine no IOMMU for the device"
    )]
    NotBound {
        /// The guest's address.
        address: String,
        /// Its driver; empty for none.
        driver: String,
    },
}

/// Whether there is a driver for each of `devices`.
///
/// # Errors
/// [`DeviceError::Unsupported`] for the first that has none.
pub fn check(devices: &[Device]) -> Result<(), DeviceError> {
    let served = |device: &&Device| DRIVERS.contains(&device.type_.as_str());
    devices.iter().find(|device| !served(device)).map_or(Ok(()), |device| Err(unsupported(&device.type_)))
}

/// What has become of the passed devices in this guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Passed {
    nodes: Vec<Node>,
    /// The host's address of each PCI function, and the guest's.
    functions: HashMap<String, String>,
}

/// A device of the guest that a container is to see.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    /// How the specification calls it.
    container_path: PathBuf,
    /// How the container shall see it.
    path: PathBuf,
    major: i64,
    minor: i64,
}

/// Finds passed devices and makes them ready.
#[derive(Debug)]
pub struct Passing {
    modules: Arc<Modules>,
    disks: Disks,
    sys: PathBuf,
    timeout: Duration,
    /// For each thing that is asked of the kernel.
    bound: Duration,
}

impl Passing {
    /// Devices of this guest; `timeout` is how long one may take to appear.
    #[must_use]
    pub fn new(modules: Arc<Modules>, timeout: Duration) -> Self {
        let disks = Disks::new(modules.clone(), timeout);
        Self { disks, modules, sys: "/sys".into(), timeout, bound: aside::BOUND }
    }

    /// Waits for all `devices`, each within the timeout.
    ///
    /// # Errors
    /// [`DeviceError`] of the first that cannot be passed.
    pub async fn find(&self, devices: &[Device]) -> Result<Passed, DeviceError> {
        let mut passed = Passed::default();
        for device in devices {
            match device.type_.as_str() {
                "blk" => passed.nodes.push(self.block(device, &self.disks.find(&device.id).await?)?),
                "mmioblk" | "nvdimm" => {
                    passed.nodes.push(self.block(device, &self.disks.find(&device.vm_path).await?)?);
                }
                "scsi" => passed.nodes.push(self.block(device, &self.disks.find_scsi(&device.id).await?)?),
                "vfio-pci-gk" | VFIO_PCI => self.functions(device, &mut passed).await?,
                kind => return Err(unsupported(kind)),
            }
        }
        Ok(passed)
    }

    /// The block device at `node` of the guest.
    fn block(&self, device: &Device, node: &Path) -> Result<Node, DeviceError> {
        self.node(
            device,
            &self.sys.join("class/block").join(pci::name(node)),
            device.container_path.clone().into(),
        )
    }

    /// The device whose directory in sysfs is `directory`.
    fn node(&self, device: &Device, directory: &Path, path: PathBuf) -> Result<Node, DeviceError> {
        let file = directory.join("dev");
        let text = read(&file)?;
        let numbers = text.trim().split_once(':');
        let numbers = numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = numbers.ok_or_else(|| invalid(device, format!("{file:?} holds {text:?}")))?;
        Ok(Node { container_path: device.container_path.clone().into(), path, major, minor })
    }

    /// The PCI functions of one passed group.
    async fn functions(&self, device: &Device, passed: &mut Passed) -> Result<(), DeviceError> {
        let mut groups = Vec::new();
        for option in &device.options {
            let (host, path) = option
                .split_once('=')
                .ok_or_else(|| invalid(device, format!("{option:?} is not HOST=PATH")))?;
            let path: PciPath =
                path.parse().map_err(|source| DeviceError::Path { device: named(device), source })?;
            let uevents = Uevents::listen().map_err(DeviceError::Listen)?;
            let directory = self.wait(host, &path, &uevents).await?;
            if device.type_ == VFIO_PCI {
                self.give_to_vfio(&directory).await?;
                let group = directory.join("iommu_group");
                let link = std::fs::read_link(&group).map_err(file("reading", &group))?;
                groups.push(pci::name(&link));
            }
            passed.functions.insert(host.to_owned(), pci::name(&directory));
        }
        groups.dedup();
        match groups.as_slice() {
            [] if device.type_ != VFIO_PCI => {}
            [group] => {
                let directory = self.sys.join("class/vfio").join(group);
                passed.nodes.push(self.node(device, &directory, Path::new("/dev/vfio").join(group))?);
            }
            groups => {
                let reason =
                    format!("its functions are in the IOMMU groups {groups:?} of the guest, not in one");
                return Err(invalid(device, reason));
            }
        }
        Ok(())
    }

    /// A driver that lets go of its device, and one that takes it, may wait for the device.
    async fn give_to_vfio(&self, directory: &Path) -> Result<(), DeviceError> {
        let what = format!("giving PCI device {} to {VFIO_PCI}", pci::name(directory));
        let (modules, sys, directory) = (self.modules.clone(), self.sys.clone(), directory.to_owned());
        let give = move || {
            modules.want(VFIO_PCI).map_err(DeviceError::Driver)?;
            bind(&sys, &directory)
        };
        aside::within(self.bound, what, give).await?
    }

    /// The directory of a PCI function, once it is there.
    async fn wait(&self, host: &str, path: &PciPath, uevents: &Uevents) -> Result<PathBuf, DeviceError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let missing = match path.directory(&self.sys) {
                Ok(directory) => return Ok(directory),
                Err(missing) => missing,
            };
            match timeout_at(deadline, uevents.changed()).await {
                Ok(changed) => changed.map_err(DeviceError::Listen)?,
                Err(_) => {
                    let (function, waited) = (host.to_owned(), self.timeout);
                    return Err(DeviceError::Absent { function, waited, missing });
                }
            }
        }
    }
}

impl Passed {
    /// Exchanges the host's numbers and addresses in `spec` for the guest's.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`]: `linux.devices` does not have a device that was passed.
    pub fn update(&self, spec: &mut Spec) -> Result<(), DeviceError> {
        let mut exchanged = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let devices = spec.linux_mut().as_mut().and_then(|linux| linux.devices_mut().as_mut());
            let device = devices.into_iter().flatten().find(|device| *device.path() == node.container_path);
            let device = device.ok_or_else(|| DeviceError::Invalid {
                device: node.container_path.display().to_string(),
                reason: "is passed, and linux.devices of the specification does not have it".to_owned(),
            })?;
            exchanged.push(((device.typ(), device.major(), device.minor()), node));
            device.set_path(node.path.clone()).set_major(node.major).set_minor(node.minor);
        }
        let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
        let rules = resources.and_then(|resources| resources.devices_mut().as_mut());
        for rule in rules.into_iter().flatten() {
            let (Some(major), Some(minor)) = (rule.major(), rule.minor()) else { continue };
            let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
            if let Some((_, node)) = exchanged.iter().find(|(host, _)| *host == (kind, major, minor)) {
                rule.set_major(Some(node.major)).set_minor(Some(node.minor));
            }
        }
        let env = spec.process_mut().as_mut().and_then(|process| process.env_mut().as_mut());
        for variable in env.into_iter().flatten() {
            self.exchange_functions(variable);
        }
        Ok(())
    }

    /// `PCIDEVICE_NAME=ADDRESS,ADDRESS` with the guest's addresses.
    fn exchange_functions(&self, variable: &mut String) {
        let Some((name, list)) = variable.split_once('=') else { return };
        if self.functions.is_empty() || !name.starts_with(PCI_VARIABLE) {
            return;
        }
        let guests = |address| self.functions.get(address).map_or(address, String::as_str);
        let list: Vec<&str> = list.split(',').map(guests).collect();
        *variable = format!("{name}={}", list.join(","));
    }
}

/// Gives a PCI device to `vfio-pci`, whoever has it.
fn bind(sys: &Path, device: &Path) -> Result<(), DeviceError> {
    let address = pci::name(device);
    let write = |path: PathBuf, text: &str| std::fs::write(&path, text).map_err(file("writing", &path));
    let driver =
        || std::fs::read_link(device.join("driver")).map(|link| pci::name(&link)).unwrap_or_default();
    if driver() == VFIO_PCI {
        return Ok(());
    }
    write(device.join("driver_override"), VFIO_PCI)?;
    if !driver().is_empty() {
        write(device.join("driver/unbind"), &address)?;
    }
    write(sys.join("bus/pci/drivers_probe"), &address)?;
    match driver() {
        driver if driver == VFIO_PCI => Ok(()),
        driver => Err(DeviceError::NotBound { address, driver }),
    }
}

fn unsupported(kind: &str) -> DeviceError {
    let reason = match kind {
        "blk-ccw" | "vfio-ap" | "vfio-ap-cold" => "not on this architecture",
        _ => "the protocol has no such type",
    };
    DeviceError::Unsupported(kind.to_owned(), reason)
}

fn named(device: &Device) -> String {
    let path = &device.container_path;
    if path.is_empty() { device.id.clone() } else { path.clone() }
}

fn invalid(device: &Device, reason: String) -> DeviceError {
    DeviceError::Invalid { device: named(device), reason }
}

fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DeviceError {
    move |source| DeviceError::File { what, path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<String, DeviceError> {
    std::fs::read_to_string(path).map_err(file("reading", path))
}

#[cfg(test)]
mod tests;
