//! What vouches for an image: the parameters on the command line, and the superblock and hash tree behind the data.
//!
//! ```text
//!  0                      data_blocks × data_block_size     + hash_block_size
//!  │ erofs                │ superblock, padded              │ top level │ … │ lowest level │
//!                                                             └ its hash is root_hash
//! ```
//!
//! The format is that of `veritysetup` (version 1, hash type 1: the salt goes before the block). The parameters alone are
//! believed. The superblock has to say the same, and the first block of the tree has to have the root's hash, so that a wrong
//! disk is told by its name here and not by an input/output error later; every other block is for the kernel to check, each
//! time that it is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

const DIGEST: usize = 32;
const SUPERBLOCK: usize = 512;
const SALT_MAX: usize = 256;
const SECTOR: u64 = 512;
/// Smallest and largest block: a sector, and a page.
const BLOCKS: std::ops::RangeInclusive<u32> = 512..=4096;

/// Parameters that cannot be, with the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    /// Something that is no `name=value`.
    #[error("{0:?} is not of the form name=value")]
    Form(String),
    /// A field that nobody knows.
    #[error("unknown field {0:?}")]
    Unknown(String),
    /// A field that is there twice.
    #[error("field {0} is there twice")]
    Twice(&'static str),
    /// A field that is not there.
    #[error("field {0} is missing")]
    Missing(&'static str),
    /// A value that the field cannot have.
    #[error("{field}={value:?} is not {expected}")]
    Value {
        /// The field.
        field: &'static str,
        /// What it was given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// An image that would end in the middle of a hash block, or beyond what 64 bits count.
    #[error("{data_blocks} blocks of {data_block_size} bytes are no whole number of hash blocks")]
    Size {
        /// Number of data blocks.
        data_blocks: u64,
        /// Bytes of each.
        data_block_size: u32,
    },
}

/// An image that is not the one that the parameters speak of.
#[derive(Debug, thiserror::Error)]
pub enum VerityError {
    /// The disk ends too early.
    #[error(
        "it has {bytes} bytes, and data and hash tree need {needed}: the image is cut off, or another one"
    )]
    Short {
        /// Size of the disk in bytes.
        bytes: u64,
        /// What the parameters ask for.
        needed: u64,
    },
    /// The disk cannot be read.
    #[error("reading at byte {offset}")]
    Read {
        /// From where.
        offset: u64,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// There is no superblock.
    #[error("no dm-verity superblock at byte {offset}: the image has no hash tree, or data_blocks is wrong")]
    NoSuperblock {
        /// Where one should be.
        offset: u64,
    },
    /// The superblock says something else than the command line.
    #[error(
        "the superblock says {field} {found}, the command line {expected}: the parameters are another image's"
    )]
    Differs {
        /// Which field.
        field: &'static str,
        /// What the disk says.
        found: String,
        /// What the command line says.
        expected: String,
    },
    /// The tree does not begin with what the root hash is for.
    #[error(
        "its first block has the hash {found}, not root_hash={expected}: another image, or a changed one"
    )]
    RootHash {
        /// What the block hashes to.
        found: String,
        /// What the command line says.
        expected: String,
    },
}

/// What the command line says of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    root_hash: [u8; DIGEST],
    salt: Vec<u8>,
    data_blocks: u64,
    data_block_size: u32,
    hash_block_size: u32,
}

impl FromStr for Params {
    type Err = ParamsError;

    /// Reads `root_hash=HEX,salt=HEX,data_blocks=N,data_block_size=N,hash_block_size=N`, in any order.
    fn from_str(text: &str) -> Result<Self, ParamsError> {
        const FIELDS: [&str; 5] = ["root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size"];
        let mut values: [Option<&str>; 5] = [None; 5];
        for word in text.split(',') {
            let (name, value) = word.split_once('=').ok_or_else(|| ParamsError::Form(word.to_owned()))?;
            let place = FIELDS.iter().zip(&mut values).find(|(field, _)| **field == name);
            let (field, place) = place.ok_or_else(|| ParamsError::Unknown(name.to_owned()))?;
            if place.replace(value).is_some() {
                return Err(ParamsError::Twice(field));
            }
        }
        let [root_hash, salt, data_blocks, data_block_size, hash_block_size] = values;
        let params = Self {
            root_hash: root_hash_of(root_hash.ok_or(ParamsError::Missing("root_hash"))?)?,
            salt: salt_of(salt.ok_or(ParamsError::Missing("salt"))?)?,
            data_blocks: data_blocks_of(data_blocks.ok_or(ParamsError::Missing("data_blocks"))?)?,
            data_block_size: block_size("data_block_size", data_block_size)?,
            hash_block_size: block_size("hash_block_size", hash_block_size)?,
        };
        let size =
            params.needed().filter(|_| params.data_bytes().is_multiple_of(params.hash_block_size.into()));
        size.map(|_| params.clone()).ok_or(ParamsError::Size {
            data_blocks: params.data_blocks,
            data_block_size: params.data_block_size,
        })
    }
}

fn value_error(field: &'static str, value: &str, expected: &'static str) -> ParamsError {
    ParamsError::Value { field, value: value.to_owned(), expected }
}

fn root_hash_of(text: &str) -> Result<[u8; DIGEST], ParamsError> {
    let bytes = unhex(text).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| value_error("root_hash", text, "a SHA-256 in hexadecimal"))
}

fn salt_of(text: &str) -> Result<Vec<u8>, ParamsError> {
    let bytes = unhex(text).filter(|bytes| bytes.len() <= SALT_MAX);
    bytes.ok_or_else(|| value_error("salt", text, "hexadecimal of at most 256 bytes"))
}

fn data_blocks_of(text: &str) -> Result<u64, ParamsError> {
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.ok_or_else(|| value_error("data_blocks", text, "a number of at least 1"))
}

fn block_size(field: &'static str, text: Option<&str>) -> Result<u32, ParamsError> {
    let text = text.ok_or(ParamsError::Missing(field))?;
    let size = text.parse().ok().filter(|size: &u32| size.is_power_of_two() && BLOCKS.contains(size));
    size.ok_or_else(|| value_error(field, text, "a power of two from 512 to 4096"))
}

impl Params {
    /// The root hash in hexadecimal.
    #[must_use]
    pub fn root_hash(&self) -> String {
        hex(&self.root_hash)
    }

    /// Size of the mapped device in sectors of 512 bytes.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.data_bytes() / SECTOR
    }

    /// The kernel's table line for the image on the disk `MAJOR:MINOR` (Documentation/admin-guide/device-mapper/verity.rst).
    ///
    /// A block that is found changed restarts the machine, which is its end: who makes the disk may not choose which files of
    /// the guest can be read.
    #[must_use]
    pub fn table(&self, disk: &str) -> String {
        let Self { data_blocks, data_block_size, hash_block_size, .. } = self;
        let salt = if self.salt.is_empty() { "-".to_owned() } else { hex(&self.salt) };
        let (root, start) = (self.root_hash(), self.hash_start());
        format!(
            "1 {disk} {disk} {data_block_size} {hash_block_size} {data_blocks} {start} sha256 {root} {salt} \
             1 restart_on_corruption"
        )
    }

    /// Checks that the image on `disk`, which has `bytes` bytes, is the one that these parameters are for.
    ///
    /// # Errors
    /// [`VerityError`]: nothing of the image may be used.
    pub fn check(&self, disk: &File, bytes: u64) -> Result<(), VerityError> {
        let needed = self.needed().unwrap_or(u64::MAX);
        if bytes < needed {
            return Err(VerityError::Short { bytes, needed });
        }
        let offset = self.data_bytes();
        let mut superblock = [0; SUPERBLOCK];
        read_at(disk, &mut superblock, offset)?;
        let superblock = Superblock::parse(&superblock).ok_or(VerityError::NoSuperblock { offset })?;
        superblock.agrees(self)?;
        let (offset, size) = self.top();
        let mut block = vec![0; usize::try_from(size).unwrap_or_default()];
        read_at(disk, &mut block, offset)?;
        let found = Sha256::new().chain_update(&self.salt).chain_update(&block).finalize();
        if found.as_slice() == self.root_hash {
            return Ok(());
        }
        Err(VerityError::RootHash { found: hex(found.as_slice()), expected: self.root_hash() })
    }

    fn data_bytes(&self) -> u64 {
        self.data_blocks.saturating_mul(self.data_block_size.into())
    }

    /// The tree's first block, counted in hash blocks: behind the data and the superblock.
    fn hash_start(&self) -> u64 {
        self.data_bytes() / u64::from(self.hash_block_size) + 1
    }

    /// Where the block is that has the root hash, and its size: the tree's first, or the only one of data, which needs no tree.
    fn top(&self) -> (u64, u32) {
        match self.data_blocks {
            1 => (0, self.data_block_size),
            _ => (self.hash_start() * u64::from(self.hash_block_size), self.hash_block_size),
        }
    }

    /// Bytes of data, superblock and tree; `None` where 64 bits do not do.
    fn needed(&self) -> Option<u64> {
        self.data_blocks.checked_mul(self.data_block_size.into())?;
        let hashes = u64::from(self.hash_block_size) / u64::try_from(DIGEST).ok()?;
        let mut blocks = self.hash_start();
        let mut level = self.data_blocks;
        while level > 1 {
            level = level.div_ceil(hashes);
            blocks = blocks.checked_add(level)?;
        }
        blocks.checked_mul(self.hash_block_size.into())
    }
}

fn read_at(disk: &File, bytes: &mut [u8], offset: u64) -> Result<(), VerityError> {
    disk.read_exact_at(bytes, offset).map_err(|source| VerityError::Read { offset, source })
}

/// What a disk says of itself. Of no worth but to tell why it is the wrong one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    version: u32,
    hash_type: u32,
    algorithm: String,
    data_block_size: u32,
    hash_block_size: u32,
    data_blocks: u64,
    salt: Vec<u8>,
}

impl Superblock {
    /// Takes a superblock apart; `None` for what is none.
    pub(crate) fn parse(bytes: &[u8; SUPERBLOCK]) -> Option<Self> {
        let rest = bytes.strip_prefix(b"verity\0\0")?;
        let (version, rest) = rest.split_first_chunk()?;
        let (hash_type, rest) = rest.split_first_chunk()?;
        let (_uuid, rest) = rest.split_first_chunk::<16>()?;
        let (algorithm, rest) = rest.split_first_chunk::<32>()?;
        let (data_block_size, rest) = rest.split_first_chunk()?;
        let (hash_block_size, rest) = rest.split_first_chunk()?;
        let (data_blocks, rest) = rest.split_first_chunk()?;
        let (salt_size, rest) = rest.split_first_chunk()?;
        let (_padding, rest) = rest.split_first_chunk::<6>()?;
        let salt = rest.get(..SALT_MAX)?.get(..u16::from_le_bytes(*salt_size).into())?;
        let name = algorithm.split(|byte| *byte == 0).next()?;
        Some(Self {
            version: u32::from_le_bytes(*version),
            hash_type: u32::from_le_bytes(*hash_type),
            algorithm: name.escape_ascii().to_string(),
            data_block_size: u32::from_le_bytes(*data_block_size),
            hash_block_size: u32::from_le_bytes(*hash_block_size),
            data_blocks: u64::from_le_bytes(*data_blocks),
            salt: salt.to_vec(),
        })
    }

    fn agrees(&self, params: &Params) -> Result<(), VerityError> {
        let fields = [
            ("version", self.version.to_string(), "1".to_owned()),
            ("hash type", self.hash_type.to_string(), "1".to_owned()),
            ("algorithm", self.algorithm.clone(), "sha256".to_owned()),
            ("data_block_size", self.data_block_size.to_string(), params.data_block_size.to_string()),
            ("hash_block_size", self.hash_block_size.to_string(), params.hash_block_size.to_string()),
            ("data_blocks", self.data_blocks.to_string(), params.data_blocks.to_string()),
            ("salt", hex(&self.salt), hex(&params.salt)),
        ];
        match fields.into_iter().find(|(_, found, expected)| found != expected) {
            Some((field, found, expected)) => Err(VerityError::Differs { field, found, expected }),
            None => Ok(()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    rest.is_empty()
        .then(|| pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect())?
}

#[cfg(test)]
pub(crate) mod tests;
