//! Writing the hash area of a dm-verity device: the superblock and the tree over the blocks of a file, behind them.
//!
//! ```text
//!   data                      │ superblock │ top level … │ … │ leaf level
//!   block 0 … data_blocks-1   │ one block  │ one block   │   │ one hash for each block of data
//! ```
//!
//! The format is that of the kernel's `Documentation/admin-guide/device-mapper/verity.rst` and of `veritysetup`: version 1,
//! in which the salt comes before the block that is hashed. The hash of a block of the level above covers as many hashes as
//! a block holds, and what is not filled is zero. The root hash is that of the one block at the top; of a single block of
//! data there is no tree, and the root hash is its own.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use sha2::{Digest, Sha256};

use crate::manifest::{Verity, hex};

/// Of data and of hashes: the page, which is what erofs has, too.
pub const BLOCK_SIZE: u32 = 4096;
const BLOCK: usize = BLOCK_SIZE as usize;
const SIGNATURE: &[u8; 8] = b"verity\0\0";
const VERSION: u32 = 1;
/// Hashes of a block: the normal type, salt before data.
const HASH_TYPE: u32 = 1;
const ALGORITHM: &[u8] = b"sha256";
const HASH: usize = 32;
/// As the superblock says it. The salt is as long as a hash.
const SALT_LENGTH: u16 = 32;

/// Appends the hash area to `file`, all of which is data.
///
/// # Errors
/// What reading and writing say; `InvalidData` where the data is no whole number of blocks, or nothing.
pub fn append(file: &mut File, salt: &[u8; HASH], uuid: &[u8; 16]) -> io::Result<Verity> {
    let size = file.seek(SeekFrom::End(0))?;
    let data_blocks = size / u64::from(BLOCK_SIZE);
    if data_blocks == 0 || !size.is_multiple_of(u64::from(BLOCK_SIZE)) {
        let why = format!("{size} bytes are no whole number of blocks of {BLOCK_SIZE}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    file.rewind()?;
    let mut hashes = leaves(file, data_blocks, salt)?;
    let mut levels = Vec::new();
    while hashes.len() > HASH {
        let level = padded(hashes);
        hashes = level.chunks(BLOCK).flat_map(|block| hash(salt, block)).collect();
        levels.push(level);
    }
    file.write_all(&superblock(data_blocks, salt, uuid))?;
    for level in levels.iter().rev() {
        file.write_all(level)?;
    }
    Ok(Verity {
        root_hash: hex(&hashes),
        salt: hex(salt),
        data_blocks,
        data_block_size: BLOCK_SIZE,
        hash_block_size: BLOCK_SIZE,
    })
}

/// The hashes of all blocks of data; the file is behind the last then.
fn leaves(file: &mut File, data_blocks: u64, salt: &[u8]) -> io::Result<Vec<u8>> {
    let mut hashes = Vec::new();
    let mut block = [0; BLOCK];
    for _ in 0..data_blocks {
        file.read_exact(&mut block)?;
        hashes.extend(hash(salt, &block));
    }
    Ok(hashes)
}

fn hash(salt: &[u8], block: &[u8]) -> [u8; HASH] {
    Sha256::new().chain_update(salt).chain_update(block).finalize().into()
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// `struct verity_sb`: numbers little endian, strings filled up with zeroes.
fn superblock(data_blocks: u64, salt: &[u8; HASH], uuid: &[u8; 16]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    block.extend(SIGNATURE);
    block.extend(VERSION.to_le_bytes());
    block.extend(HASH_TYPE.to_le_bytes());
    block.extend(uuid);
    block.extend(ALGORITHM);
    block.resize(64, 0);
    block.extend(BLOCK_SIZE.to_le_bytes());
    block.extend(BLOCK_SIZE.to_le_bytes());
    block.extend(data_blocks.to_le_bytes());
    // The length of the salt, in two bytes, and six to align.
    block.extend(SALT_LENGTH.to_le_bytes());
    block.extend([0; 6]);
    block.extend(salt);
    padded(block)
}

#[cfg(test)]
mod tests;
