//! Where a PCI device is plugged in, and its directory in sysfs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::disk::Missing;

/// Text that is not a PCI path.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not a PCI path: slots of two hexadecimal digits, 00 to 1f, joined by '/', as in 02/00")]
pub struct PciPathError {
    text: String,
}

/// The way to a device: its slot on the root bus or, behind bridges, the slot of each bridge and then its own.
///
/// It is what the host knows. Bus numbers are the guest's business: they depend on what else is plugged in.
///
/// ```text
///  02/00      device 02 on the root bus is a bridge, device 00 behind it
///  1c.3/00    the bridge is function 3 of a multi-function device
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPath(Vec<Slot>);

/// Device and function on one bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slot {
    device: u8,
    function: u8,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.device, self.function)
    }
}

impl Slot {
    fn parse(text: &str) -> Option<Self> {
        let (device, function) = text.split_once('.').unwrap_or((text, "0"));
        let number = |text: &str, digits: usize, most: u8| {
            let plain = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(text, 16).ok().filter(|number| plain && *number <= most)
        };
        Some(Self { device: number(device, 2, 0x1f)?, function: number(function, 1, 7)? })
    }
}

impl FromStr for PciPath {
    type Err = PciPathError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let slots: Option<Vec<Slot>> = text.split('/').map(Slot::parse).collect();
        slots.map(Self).ok_or_else(|| PciPathError { text: text.to_owned() })
    }
}

/// The machine's root bus: the first of the first domain.
const ROOT_BUS: &str = "0000:00";

impl PciPath {
    /// The device's directory in the sysfs at `sys`.
    ///
    /// # Errors
    /// [`Missing`]: as far as the way leads.
    pub fn directory(&self, sys: &Path) -> Result<PathBuf, Missing> {
        let mut directory = sys.join(format!("devices/pci{ROOT_BUS}"));
        let mut bus = ROOT_BUS.to_owned();
        for (depth, slot) in self.0.iter().enumerate() {
            if depth > 0 {
                bus = bus_behind(&directory).ok_or_else(|| Missing::Bridge { address: name(&directory) })?;
            }
            let address = format!("{bus}:{slot}");
            let device = directory.join(&address);
            if !device.is_dir() {
                return Err(Missing::Device { present: devices(&directory, &bus), address });
            }
            directory = device;
        }
        Ok(directory)
    }
}

/// The bus behind the bridge in `directory`, by domain and number.
fn bus_behind(directory: &Path) -> Option<String> {
    names(&directory.join("pci_bus")).next()
}

/// Addresses of the devices on `bus`, whose bridge `directory` is.
fn devices(directory: &Path, bus: &str) -> Vec<String> {
    let on_bus = |name: &String| name.strip_prefix(bus).is_some_and(|rest| rest.starts_with(':'));
    let mut devices: Vec<String> = names(directory).filter(on_bus).collect();
    devices.sort_unstable();
    devices
}

/// Names in a directory; none where there is no directory.
pub(super) fn names(directory: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Last part of a path.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
