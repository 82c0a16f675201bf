//! The first bytes of a connection on [`ports::FORWARD`](crate::ports::FORWARD).
//!
//! ```text
//!  host ── family 4 | 6, 0, port (big endian) ──▶ guest
//!       ◀── 0, or why not ─────────────────────          from then on, after a 0, bytes of the two ends
//! ```

/// Where on the guest's loopback the host wants to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Whether `::1` is meant rather than `127.0.0.1`. The guest tries the other one after it.
    pub v6: bool,
    /// The TCP port.
    pub port: u16,
}

impl Forward {
    /// Bytes of the request.
    pub const LENGTH: usize = 4;

    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let [high, low] = self.port.to_be_bytes();
        [if self.v6 { 6 } else { 4 }, 0, high, low]
    }

    /// What was sent, if it means anything.
    #[must_use]
    pub fn decode(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        match bytes {
            [family @ (4 | 6), 0, high, low] => {
                Some(Self { v6: family == 6, port: u16::from_be_bytes([high, low]) })
            }
            _ => None,
        }
    }
}

/// The guest's one byte of answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// The bytes that follow are those of the two ends.
    Connected,
    /// Nobody listens there.
    Refused,
    /// Something else.
    Failed,
}

impl Forwarded {
    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> u8 {
        match self {
            Self::Connected => 0,
            Self::Refused => 1,
            Self::Failed => 2,
        }
    }

    /// What was sent; of what is not known, only that it is not a connection.
    #[must_use]
    pub fn decode(byte: u8) -> Self {
        match byte {
            0 => Self::Connected,
            1 => Self::Refused,
            _ => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_destination_comes_back_as_it_was_sent() {
        for v6 in [false, true] {
            for port in 0..=u16::MAX {
                let forward = Forward { v6, port };
                assert_eq!(Forward::decode(forward.encode()), Some(forward));
            }
        }
    }

    #[test]
    fn what_is_no_destination_is_told_apart() {
        for bytes in [[0, 0, 0, 80], [5, 0, 0, 80], [4, 1, 0, 80], [0x43, 0x4f, 0x4e, 0x4e]] {
            assert_eq!(Forward::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn answer_that_is_not_known_is_no_connection() {
        for answer in [Forwarded::Connected, Forwarded::Refused, Forwarded::Failed] {
            assert_eq!(Forwarded::decode(answer.encode()), answer);
        }
        assert_eq!(Forwarded::decode(255), Forwarded::Failed);
    }
}
