//! Bytes that are checked while they are read.

use std::io::{self, BufReader, Chain, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use super::Digest;

/// Set once, seen by every reader of the image: stops work on threads that nobody can cancel.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Makes every reader fail from now on.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`set`](Self::set) was called.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A blob that is not what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// Other content.
    #[error("{name} is corrupt: its digest should be {expected} and is {actual}")]
    Mismatch {
        /// What it is.
        name: String,
        /// As the manifest says.
        expected: Digest,
        /// As found.
        actual: Digest,
    },
    /// Shorter or longer.
    #[error("{name} is corrupt: it should have {expected} bytes and has {actual}")]
    Size {
        /// What it is.
        name: String,
        /// As the manifest says.
        expected: u64,
        /// As found; one more than expected where it was not read to its end.
        actual: u64,
    },
}

/// Hashes and counts what passes through, and stops at a limit.
pub struct Metered<R> {
    from: R,
    hash: Sha256,
    read: u64,
    limit: u64,
    interrupt: Interrupt,
}

impl<R: Read> Metered<R> {
    /// Passes at most `limit` bytes of `from`.
    pub fn new(from: R, limit: u64, interrupt: Interrupt) -> Self {
        Self { from, hash: Sha256::new(), read: 0, limit, interrupt }
    }

    /// Reads what is left, and tells digest and length of the whole.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest::from_hash(&self.hash.finalize()), self.read))
    }

    /// Whether there is more than the limit.
    pub fn over_limit(&self) -> bool {
        self.read > self.limit
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.interrupt.is_set() {
            // Not ErrorKind::Interrupted: readers take that for a reason to try again.
            return Err(io::Error::other("interrupted"));
        }
        let n = self.from.read(buffer)?;
        self.hash.update(buffer.get(..n).unwrap_or_default());
        self.read += n as u64;
        if self.over_limit() {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {} bytes", self.limit),
            ));
        }
        Ok(n)
    }
}

/// The tar stream inside `blob`. The first bytes tell gzip, zstd and plain tar apart: media types are often wrong.
pub fn decompress<'a, R: Read + 'a>(mut blob: R) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::with_capacity(4);
    blob.by_ref().take(4).read_to_end(&mut magic)?;
    let (gzip, zstd) = (magic.starts_with(&[0x1f, 0x8b]), magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    let whole: BufReader<Chain<Cursor<Vec<u8>>, R>> =
        BufReader::with_capacity(128 << 10, Cursor::new(magic).chain(blob));
    Ok(match (gzip, zstd) {
        (true, _) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        (_, true) => Box::new(zstd::stream::read::Decoder::with_buffer(whole)?),
        _ => Box::new(whole),
    })
}
