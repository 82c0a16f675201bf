//! Links: the guest's network devices.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::NetworkError;
use super::message::{Request, attributes, text, u32_at};
use super::netlink::{LinkEvents, Netlink};

const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
/// `family`, `type`, index, flags and which flags to change.
const HEADER: usize = 16;

/// The link is in use.
pub const UP: u32 = 0x1;
/// The link is the loopback.
pub const LOOPBACK: u32 = 0x8;
/// The link resolves no addresses.
pub const NOARP: u32 = 0x80;

/// Longest name of a link in bytes.
pub const NAME_MAX: usize = 15;
/// Longest hardware address in bytes.
const ADDRESS_MAX: usize = 32;

/// `02:00:00:00:00:01`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HardwareAddress(Vec<u8>);

/// A text that is no hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a hardware address")]
pub struct HardwareAddressError;

impl HardwareAddress {
    /// The bytes in order.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for HardwareAddress {
    type Err = HardwareAddressError;

    fn from_str(text: &str) -> Result<Self, HardwareAddressError> {
        let byte = |text: &str| {
            let digits = text.len() <= 2 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
            u8::from_str_radix(text, 16).ok().filter(|_| digits).ok_or(HardwareAddressError)
        };
        let bytes: Vec<u8> = text.split(':').take(ADDRESS_MAX + 1).map(byte).collect::<Result<_, _>>()?;
        if bytes.len() <= ADDRESS_MAX { Ok(Self(bytes)) } else { Err(HardwareAddressError) }
    }
}

impl fmt::Display for HardwareAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if place > 0 { ":" } else { "" })?;
        }
        Ok(())
    }
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// What the kernel knows it by.
    pub index: u32,
    /// What people know it by.
    pub name: String,
    /// Empty for a device that has none.
    pub address: HardwareAddress,
    /// Bytes.
    pub mtu: u32,
    /// `IFF_*`.
    pub flags: u32,
}

impl Link {
    /// Whether it is in use.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.flags & UP != 0
    }

    /// Whether it is the guest's way to itself.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.flags & LOOPBACK != 0
    }
}

/// All links.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn list(netlink: &mut Netlink) -> Result<Vec<Link>, NetworkError> {
    netlink
        .dump(&Request::dump(RTM_GETLINK, &[0; HEADER]), parse)
        .map_err(NetworkError::netlink("listing links"))
}

/// The link of this hardware address; if there is none, the one that gets plugged in within the time given.
///
/// # Errors
/// [`NetworkError::NoLink`] when the time is over.
pub async fn wait(
    netlink: &mut Netlink,
    address: &HardwareAddress,
    within: Duration,
) -> Result<Link, NetworkError> {
    let failed = NetworkError::netlink("waiting for a link");
    // Before the first look, so that no link comes between it and the waiting.
    let events = LinkEvents::subscribe().map_err(failed)?;
    let appears = async {
        loop {
            let found = list(netlink)?.into_iter().find(|it| it.address == *address && !it.is_loopback());
            if let Some(link) = found {
                return Ok(link);
            }
            events.changed().await.map_err(NetworkError::netlink("waiting for a link"))?;
        }
    };
    match tokio::time::timeout(within, appears).await {
        Ok(link) => link,
        Err(_) => {
            let present = describe(&list(netlink)?);
            Err(NetworkError::NoLink { address: address.clone(), within, present })
        }
    }
}

/// The link of this name.
///
/// # Errors
/// [`NetworkError::NoDevice`].
pub fn by_name<'a>(links: &'a [Link], name: &str) -> Result<&'a Link, NetworkError> {
    let missing = || NetworkError::NoDevice { name: name.to_owned(), present: describe(links) };
    links.iter().find(|link| link.name == name).ok_or_else(missing)
}

/// Names and addresses, for an error.
fn describe(links: &[Link]) -> String {
    let links: Vec<_> = links.iter().map(|link| format!("{} ({})", link.name, link.address)).collect();
    links.join(", ")
}

/// Gives `link` the name. A link that has it gets the old name of `link` instead.
///
/// # Errors
/// [`NetworkError::LoopbackName`], [`NetworkError::Netlink`].
pub fn rename(netlink: &mut Netlink, link: &Link, name: &str) -> Result<(), NetworkError> {
    if link.name == name {
        return Ok(());
    }
    let holder = list(netlink)?.into_iter().find(|other| other.name == name);
    let Some(holder) = holder else { return set_name(netlink, link, name) };
    if holder.is_loopback() {
        return Err(NetworkError::LoopbackName(holder.name));
    }
    set_name(netlink, &holder, &format!("swap{}", holder.index))?;
    set_name(netlink, link, name)?;
    set_name(netlink, &holder, &link.name)?;
    if holder.is_up() { set_flags(netlink, &holder, UP, UP) } else { Ok(()) }
}

/// Kernels before 6.2 give no new name to a link that is up.
fn set_name(netlink: &mut Netlink, link: &Link, name: &str) -> Result<(), NetworkError> {
    if link.is_up() {
        set_flags(netlink, link, 0, UP)?;
    }
    let request = set(link, 0, 0).with(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
    netlink
        .change(&request)
        .map_err(NetworkError::netlink(format!("renaming link {} to {name:?}", link.name)))
}

/// Sets those of the flags that are in `mask`.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn set_flags(netlink: &mut Netlink, link: &Link, flags: u32, mask: u32) -> Result<(), NetworkError> {
    let what = format!("setting flags {flags:#x} of {mask:#x} of link {}", link.name);
    netlink.change(&set(link, flags, mask)).map_err(NetworkError::netlink(what))
}

/// Sets the largest packet, in bytes.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn set_mtu(netlink: &mut Netlink, link: &Link, mtu: u32) -> Result<(), NetworkError> {
    let request = set(link, 0, 0).with_u32(IFLA_MTU, mtu);
    netlink
        .change(&request)
        .map_err(NetworkError::netlink(format!("setting mtu {mtu} of link {}", link.name)))
}

fn set(link: &Link, flags: u32, mask: u32) -> Request {
    let header = [[0; 4], link.index.to_ne_bytes(), flags.to_ne_bytes(), mask.to_ne_bytes()].concat();
    Request::change(RTM_SETLINK, 0, &header)
}

fn parse(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        address: HardwareAddress::default(),
        mtu: 0,
        flags: u32_at(body, 8)?,
    };
    for (kind, value) in attributes(body.get(HEADER..)?) {
        match kind {
            IFLA_IFNAME => link.name = text(value),
            IFLA_ADDRESS => link.address = HardwareAddress(value.to_vec()),
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hardware_address_is_read_as_it_is_written() {
        let address: HardwareAddress = "02:00:00:00:0A:ff".parse().unwrap();
        assert_eq!(address.to_string(), "02:00:00:00:0a:ff");
        assert_eq!(address.bytes(), [2, 0, 0, 0, 10, 255]);
    }

    #[test]
    fn what_is_no_hardware_address_is_refused() {
        let long = ["00"; 33].join(":");
        for text in ["", "02:", "02:000", "+2:00", "02-00", "g0:00", &long] {
            assert_eq!(text.parse::<HardwareAddress>(), Err(HardwareAddressError), "{text:?}");
        }
    }
}
