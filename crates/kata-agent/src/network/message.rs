//! Messages of the kernel's routing socket, as bytes.
//!
//! ```text
//!  length u32 · kind u16 · flags u16 · sequence u32 · port u32 │ header of the kind │ attribute │ attribute …
//!                                                                                     └ length u16 · type u16 · value
//! ```
//!
//! Numbers are in the machine's byte order, everything starts at a multiple of four. The agent needs four kinds of
//! objects and a dozen attributes; the crates that know them all would make every guest half a megabyte larger.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The object is made if it is not there.
pub const CREATE: u16 = 0x400;
/// The object takes the place of one that is there.
pub const REPLACE: u16 = 0x100;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// What is left of an attribute's type without its flag bits.
const TYPE_MASK: u16 = 0x3fff;

/// A message to the kernel.
#[derive(Debug)]
pub struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// Changes an object: `kind` is an `RTM_*` and has a header of its own, `flags` are [`CREATE`] and [`REPLACE`].
    #[must_use]
    pub fn change(kind: u16, flags: u16, header: &[u8]) -> Self {
        Self { kind, flags: flags | NLM_F_REQUEST | NLM_F_ACK, body: header.to_vec() }
    }

    /// Lists all objects of a kind.
    #[must_use]
    pub fn dump(kind: u16, header: &[u8]) -> Self {
        Self { kind, flags: NLM_F_REQUEST | NLM_F_DUMP, body: header.to_vec() }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, attribute: u16, value: &[u8]) -> Self {
        append_attribute(&mut self.body, attribute, value);
        self
    }

    /// Adds an attribute that is a number.
    #[must_use]
    pub fn with_u32(self, attribute: u16, value: u32) -> Self {
        self.with(attribute, &value.to_ne_bytes())
    }

    /// Adds an attribute that is an IP address.
    #[must_use]
    pub fn with_ip(self, attribute: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.with(attribute, &address.octets()),
            IpAddr::V6(address) => self.with(attribute, &address.octets()),
        }
    }

    /// The whole message.
    #[must_use]
    pub fn encode(&self, sequence: u32) -> Vec<u8> {
        let length = HEADER + self.body.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.body);
        bytes
    }
}

/// Appends an attribute, and what is missing to a multiple of four. A value that no attribute can hold gets a length
/// that the kernel refuses.
pub fn append_attribute(bytes: &mut Vec<u8>, attribute: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(attribute.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(aligned(bytes.len()), 0);
}

/// A message from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// `RTM_*` or `NLMSG_*`.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The request's.
    pub sequence: u32,
    /// Header of the kind and attributes.
    pub body: &'a [u8],
}

/// The messages of a datagram, up to the first whose length makes no sense.
pub fn replies(mut rest: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let message = rest.get(..length)?;
        let reply = Reply {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            body: message.get(HEADER..)?,
        };
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some(reply)
    })
}

/// Types and values of attributes, up to the first whose length makes no sense.
pub fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let value = rest.get(ATTRIBUTE_HEADER..length)?;
        let kind = u16_at(rest, 2)? & TYPE_MASK;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The number at `offset`.
#[must_use]
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

/// The number at `offset`.
#[must_use]
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// An address of four or of sixteen bytes.
#[must_use]
pub fn ip(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
    v4.or_else(|_| <[u8; 16]>::try_from(value).map(|octets| IpAddr::V6(Ipv6Addr::from(octets)))).ok()
}

/// A text that ends at its first NUL.
#[must_use]
pub fn text(value: &[u8]) -> String {
    let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let request = Request::change(16, 0, &[7; 4]).with(3, b"eth0\0").with_u32(4, 1500);
        let mut bytes = request.encode(9);
        bytes.extend(Request::dump(20, &[]).encode(10));
        let replies: Vec<_> = replies(&bytes).collect();
        assert_eq!((replies[0].kind, replies[0].flags, replies[0].sequence), (16, 5, 9));
        assert_eq!((replies[1].kind, replies[1].sequence), (20, 10));
        let attributes: Vec<_> = attributes(&replies[0].body[4..]).collect();
        assert_eq!(attributes, [(3, &b"eth0\0"[..]), (4, &1500_u32.to_ne_bytes()[..])]);
        assert_eq!(text(attributes[0].1), "eth0");
    }

    #[test]
    fn a_length_past_the_end_ends_the_reading() {
        let mut bytes = Request::dump(16, &[0; 4]).encode(1);
        bytes[0] += 1;
        assert_eq!(replies(&bytes).count(), 0);
        assert_eq!(attributes(&[9, 0, 1, 0, 1, 1]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "shorter than its own header");
    }

    proptest! {
        #[test]
        fn no_bytes_whatever_are_too_much(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            for reply in replies(&bytes) {
                prop_assert!(attributes(reply.body).count() <= reply.body.len());
            }
        }
    }
}
