//! Amounts of memory and processors as users write them.

use std::str::FromStr;

/// Memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory(pub u64);

/// Processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(pub u32);

/// Text that is no amount.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Not a size.
    #[error("expected a size such as 256M, 1G or 1.5G")]
    Memory,
    /// No virtual machine runs in so little.
    #[error("a virtual machine needs at least 1M")]
    TooLittle,
    /// Not a number of processors.
    #[error("expected a whole number from 1 to 1024: a virtual machine has no part of a processor")]
    Cpus,
}

impl FromStr for Memory {
    type Err = AmountError;

    /// A number of bytes, or of what the unit says: k, m, g, t, with or without `b` or `ib`. Rounded up to whole MiB.
    fn from_str(text: &str) -> Result<Self, AmountError> {
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
        let (number, unit) = lower.split_at(digits);
        let shift = match unit.trim_end_matches("ib").trim_end_matches('b') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(AmountError::Memory),
        };
        let bytes = scaled(number, shift).ok_or(AmountError::Memory)?;
        match bytes.div_ceil(1 << 20) {
            0 => Err(AmountError::TooLittle),
            mib => u64::try_from(mib).map(Self).map_err(|_| AmountError::Memory),
        }
    }
}

/// `number` · 2^`shift`, without going through floating point: 1.1G should be the same everywhere.
fn scaled(number: &str, shift: u32) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let parse = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    if (whole.is_empty() && fraction.is_empty()) || whole.len() > 18 || fraction.len() > 18 {
        return None;
    }
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    Some((parse(whole)? << shift) + (parse(fraction)? << shift) / scale)
}

impl FromStr for Cpus {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        let number = text.parse().ok().filter(|number| (1..=1024).contains(number));
        number.map(Self).ok_or(AmountError::Cpus)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_are_rounded_up_to_mebibytes() {
        for (text, mib) in [
            ("256M", 256),
            ("256m", 256),
            ("256MiB", 256),
            ("256mb", 256),
            ("1G", 1024),
            ("1.5g", 1536),
            ("2T", 2 << 20),
            ("268435456", 256),
            ("1", 1),
            ("1025k", 2),
            (".5G", 512),
            ("1.1G", 1127),
        ] {
            assert_eq!(text.parse(), Ok(Memory(mib)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "abc", "1X", "-1M", "1.2.3M", "99999999999999999999G", "1 G B"] {
            assert_eq!(text.parse::<Memory>(), Err(AmountError::Memory), "{text:?}");
        }
        assert_eq!("0M".parse::<Memory>(), Err(AmountError::TooLittle));
    }

    #[test]
    fn processors_are_whole() {
        assert_eq!("2".parse(), Ok(Cpus(2)));
        for text in ["0", "0.5", "-1", "1025", "two"] {
            assert_eq!(text.parse::<Cpus>(), Err(AmountError::Cpus), "{text}");
        }
    }
}
