//! An IP address with the length of its network's prefix.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// `10.0.0.2/24`, `fd00::2/64`: an address within a network, or the network itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The address.
    pub address: IpAddr,
    /// Leading bits that are the network's.
    pub length: u8,
}

/// A text that is no address, or a length that the address does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an IP address, or a prefix longer than it")]
pub struct PrefixError;

impl Prefix {
    /// `length` bits of `address`.
    ///
    /// # Errors
    /// [`PrefixError`] if the address has fewer.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, PrefixError> {
        if length <= bits(address) { Ok(Self { address, length }) } else { Err(PrefixError) }
    }

    /// All bits of `address`.
    #[must_use]
    pub fn whole(address: IpAddr) -> Self {
        Self { address, length: bits(address) }
    }

    /// Whether this is one address.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.length == bits(self.address)
    }

    /// The address family, as the kernel numbers it.
    #[must_use]
    pub fn family(&self) -> u8 {
        family(self.address)
    }
}

/// The address family of `address`, as the kernel numbers it.
#[must_use]
pub fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { IPV4 } else { IPV6 }
}

/// AF_INET.
pub const IPV4: u8 = 2;
/// AF_INET6.
pub const IPV6: u8 = 10;

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    /// With a length or without; then it is the whole address.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length.parse().map_err(|_| PrefixError)?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| PrefixError)?;
        length.map_or_else(|| Ok(Self::whole(address)), |length| Self::new(address, length))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_read_as_it_is_written() {
        for text in ["10.0.0.2/24", "0.0.0.0/0", "fd00::2/64", "::/0"] {
            assert_eq!(text.parse::<Prefix>().unwrap().to_string(), text);
        }
        assert_eq!("10.0.0.2".parse::<Prefix>().unwrap().to_string(), "10.0.0.2/32");
        assert!("::1".parse::<Prefix>().unwrap().is_whole());
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        for text in ["", "10.0.0/24", "10.0.0.2/33", "::/129", "::/", "10.0.0.2/-1", "eth0"] {
            assert_eq!(text.parse::<Prefix>(), Err(PrefixError), "{text:?}");
        }
    }
}
