//! Interfaces: links with their addresses, as the host speaks of them.

use std::time::Duration;

use super::address::{self, Address};
use super::link::{self, HardwareAddress, Link, NOARP, UP};
use super::prefix::Prefix;
use super::{NetworkError, open};

/// An interface as it is, or as it is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Name of the link; empty to leave it as it is.
    pub name: String,
    /// What the link is found by.
    pub hardware: HardwareAddress,
    /// The addresses.
    pub addresses: Vec<Prefix>,
    /// Largest packet in bytes; zero to leave it as it is.
    pub mtu: u32,
    /// `IFF_*`. To be is only whether addresses are resolved.
    pub flags: u32,
}

impl Interface {
    fn of(link: &Link, addresses: &[Address]) -> Self {
        let own = addresses.iter().filter(|address| address.link == link.index);
        Self {
            name: link.name.clone(),
            hardware: link.address.clone(),
            addresses: own.map(|address| address.prefix).collect(),
            mtu: link.mtu,
            flags: link.flags,
        }
    }
}

/// All interfaces.
///
/// # Errors
/// [`NetworkError::Netlink`].
pub fn list() -> Result<Vec<Interface>, NetworkError> {
    let mut netlink = open()?;
    let addresses = address::list(&mut netlink)?;
    let links = link::list(&mut netlink)?;
    Ok(links.iter().map(|link| Interface::of(link, &addresses)).collect())
}

/// Finds the interface by its hardware address, waiting `within` for it to be plugged in, makes it what is `wanted`,
/// and brings it up. Returns it as it is then.
///
/// # Errors
/// [`NetworkError::NoLink`] if it does not come; [`NetworkError::Netlink`] with the step that was refused.
pub async fn update(wanted: &Interface, within: Duration) -> Result<Interface, NetworkError> {
    let mut netlink = open()?;
    let link = link::wait(&mut netlink, &wanted.hardware, within).await?;
    // Nothing is awaited from here on: no other request sees it half done.
    if !wanted.name.is_empty() {
        link::rename(&mut netlink, &link, &wanted.name)?;
    }
    if wanted.mtu > 0 {
        link::set_mtu(&mut netlink, &link, wanted.mtu)?;
    }
    link::set_flags(&mut netlink, &link, UP | wanted.flags & NOARP, UP | NOARP)?;
    address::replace(&mut netlink, link.index, &wanted.addresses)?;
    let addresses = address::list(&mut netlink)?;
    let links = link::list(&mut netlink)?;
    let name = if wanted.name.is_empty() { &link.name } else { &wanted.name };
    Ok(Interface::of(link::by_name(&links, name)?, &addresses))
}
