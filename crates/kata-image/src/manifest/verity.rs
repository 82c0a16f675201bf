//! The parameters of a dm-verity device, and how they are written: `root_hash=<hex>,salt=<hex>,data_blocks=<n>,
//! data_block_size=<n>,hash_block_size=<n>`, the spelling of upstream's `kernel_verity_params`.
//!
//! The hash area lies right behind the data in the same file: a block with the superblock, then the tree. The hash is
//! SHA-256 always.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest salt of the superblock, in bytes.
const SALT_MAX: usize = 256;
/// Block sizes that the kernel's driver takes; the page of x86-64 is its largest.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;

/// What the blocks of a disk are verified against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verity {
    /// The hash over the whole tree, 64 lower-case hexadecimal digits.
    pub root_hash: String,
    /// The salt, lower-case hexadecimal digits; empty for none.
    pub salt: String,
    /// How many blocks of data there are.
    pub data_blocks: u64,
    /// The size of one, in bytes.
    pub data_block_size: u32,
    /// The size of a block of hashes, in bytes.
    pub hash_block_size: u32,
}

/// Why parameters are not usable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerityError {
    /// A part is not `key=value`.
    #[error("{0:?} is not of the form key=value")]
    Form(String),
    /// A key that there is not.
    #[error(
        "{0:?} is no verity parameter: they are root_hash, salt, data_blocks, data_block_size and hash_block_size"
    )]
    Unknown(String),
    /// A key that is there twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// A key that is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("{key}: {value:?} is not {rule}")]
    Value {
        /// Its key.
        key: &'static str,
        /// It.
        value: String,
        /// What it has to be.
        rule: &'static str,
    },
}

impl Verity {
    /// Bytes of data, which the hash area follows.
    #[must_use]
    pub fn data_size(&self) -> u64 {
        self.data_blocks.saturating_mul(u64::from(self.data_block_size))
    }

    /// Checks what the shape does not.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn check(&self) -> Result<(), VerityError> {
        let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let rule = |holds: bool, key, value: &dyn ToString, rule| {
            if holds { Ok(()) } else { Err(VerityError::Value { key, value: value.to_string(), rule }) }
        };
        let hash = &self.root_hash;
        rule(hash.len() == 64 && is_hex(hash), "root_hash", hash, "64 lower-case hexadecimal digits")?;
        let salt = &self.salt;
        let fits = salt.len() <= 2 * SALT_MAX && salt.len().is_multiple_of(2) && is_hex(salt);
        rule(fits, "salt", salt, "at most 256 bytes in lower-case hexadecimal digits")?;
        rule(self.data_blocks > 0, "data_blocks", &self.data_blocks, "a number of blocks above 0")?;
        for (key, size) in
            [("data_block_size", self.data_block_size), ("hash_block_size", self.hash_block_size)]
        {
            let fits = size.is_power_of_two() && BLOCK_SIZES.contains(&size);
            rule(fits, key, &size, "a power of two from 512 to 4096")?;
        }
        Ok(())
    }
}

impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { root_hash, salt, data_blocks, data_block_size, hash_block_size } = self;
        write!(
            f,
            "root_hash={root_hash},salt={salt},data_blocks={data_blocks},data_block_size={data_block_size},\
             hash_block_size={hash_block_size}"
        )
    }
}

impl FromStr for Verity {
    type Err = VerityError;

    fn from_str(text: &str) -> Result<Self, VerityError> {
        const KEYS: [&str; 5] = ["root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size"];
        let mut values: [Option<&str>; 5] = [None; 5];
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| VerityError::Form(part.to_owned()))?;
            let place = KEYS.iter().position(|known| *known == key).and_then(|at| values.get_mut(at));
            let place = place.ok_or_else(|| VerityError::Unknown(key.to_owned()))?;
            if place.replace(value).is_some() {
                return Err(VerityError::Twice(key.to_owned()));
            }
        }
        fn number<T: FromStr>(key: &'static str, text: &str) -> Result<T, VerityError> {
            let value = || VerityError::Value { key, value: text.to_owned(), rule: "a number that fits" };
            text.parse().map_err(|_| value())
        }
        let [root_hash, salt, data_blocks, data_block_size, hash_block_size] = values;
        let given = |value: Option<&'_ str>, key| value.ok_or(VerityError::Missing(key)).map(str::to_owned);
        let verity = Self {
            root_hash: given(root_hash, "root_hash")?,
            salt: given(salt, "salt")?,
            data_blocks: number("data_blocks", &given(data_blocks, "data_blocks")?)?,
            data_block_size: number("data_block_size", &given(data_block_size, "data_block_size")?)?,
            hash_block_size: number("hash_block_size", &given(hash_block_size, "hash_block_size")?)?,
        };
        verity.check()?;
        Ok(verity)
    }
}
