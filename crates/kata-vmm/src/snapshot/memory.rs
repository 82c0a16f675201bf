//! A guest's RAM in a file.
//!
//! ```text
//!   guest   0 ─ RAM ─ 3 GiB   4 GiB ─ RAM ─ …            pages of zeroes are holes in the file,
//!   file    0 ─────── 3 GiB ─────── … the RAM's size     and so is what nobody ever touched
//! ```
//!
//! Started from, the file is either mapped, so that all machines share what none of them writes, or its content is copied, where
//! another process has to reach the memory, or all of it has to be there at once. Copied takes the time and the memory of what is in it.
//!
//! The checksum is of each page that is not zero, with its place before it, so it says nothing about where holes are.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek, sendfile};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::{SnapshotError, damaged, digits, failed, is_empty};
use crate::memory::{filled, given, is_ram, shared_file};
use crate::virtio::Memory;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Bytes that are read at once.
const PIECE: usize = 64 * PAGE;

/// What is in a memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    /// Bytes of the file, with its holes.
    pub size: u64,
    /// Bytes of pages that are not zero.
    pub bytes: u64,
    /// SHA-256 of these, in hexadecimal digits.
    pub sum: String,
}

/// Sums up pages in their order.
#[derive(Default)]
struct Summary {
    digest: Sha256,
    bytes: u64,
}

impl Summary {
    fn add(&mut self, offset: u64, page: &[u8]) {
        self.digest.update(offset.to_le_bytes());
        self.digest.update(page);
        self.bytes += PAGE as u64;
    }

    fn content(self, size: u64) -> Content {
        Content { size, bytes: self.bytes, sum: digits(&self.digest.finalize()) }
    }
}

/// Writes the RAM to an empty file, while nobody else works on it.
pub fn write(memory: &GuestMemoryMmap, file: &File) -> Result<Content, SnapshotError> {
    is_empty("memory", file)?;
    let fault = failed("memory", "written");
    let (mut summary, mut base) = (Summary::default(), 0);
    let mut buffer = vec![0; PIECE];
    for region in memory.iter().filter(|region| is_ram(region)) {
        // What was never touched is zero.
        let touched = given(region).unwrap_or_else(|| std::iter::once(0..region.len()).collect());
        for (offset, length) in touched.into_iter().flat_map(pieces) {
            let piece = buffer.get_mut(..length).unwrap_or_default();
            let address = GuestAddress(region.start_addr().0 + offset);
            memory.read_slice(piece, address).map_err(|e| fault(io::Error::other(e)))?;
            for run in runs(piece) {
                let at = base + offset + run.start as u64;
                let bytes = piece.get(run).unwrap_or_default();
                (at..).step_by(PAGE).zip(bytes.chunks(PAGE)).for_each(|(at, page)| summary.add(at, page));
                file.write_all_at(bytes, at).map_err(&fault)?;
            }
        }
        base += region.len();
    }
    file.set_len(base).and_then(|()| file.sync_all()).map_err(&fault)?;
    Ok(summary.content(base))
}

/// Cuts a range: offset and length of each piece.
fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let end = range.end;
    range.step_by(PIECE).map(move |at| (at, usize::try_from(end - at).unwrap_or(PIECE).min(PIECE)))
}

/// Ranges of whole pages that are not zero, as long as they are.
fn runs(piece: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, page) in (0..).step_by(PAGE).zip(piece.chunks(PAGE)) {
        // All of it is looked at, which takes less time than to stop at the first.
        if page.iter().fold(0, |all, byte| all | byte) == 0 {
            continue;
        }
        let end = at + page.len();
        match runs.last_mut().filter(|run| run.end == at) {
            Some(run) => run.end = end,
            None => runs.push(at..end),
        }
    }
    runs
}

/// Compares a file's size with what was written.
pub fn check(file: &File, content: &Content) -> Result<(), SnapshotError> {
    let known = file.metadata().map_err(failed("memory", "read"))?;
    if !known.is_file() || known.len() != content.size {
        let (found, size) = (known.len(), content.size);
        return Err(damaged("memory", format_args!("it has {found} bytes, and is a file of {size}")));
    }
    Ok(())
}

/// Reads all of a file, and compares it with what was written.
pub fn verify(file: &File, content: &Content) -> Result<(), SnapshotError> {
    check(file, content)?;
    let mut summary = Summary::default();
    each(file, 0..content.size, |at, bytes| {
        (at..).step_by(PAGE).zip(bytes.chunks(PAGE)).for_each(|(at, page)| summary.add(at, page));
        Ok(())
    })?;
    match summary.content(content.size) == *content {
        true => Ok(()),
        false => Err(damaged("memory", "its checksum does not fit")),
    }
}

/// Copies a file's content to memory that is all zero.
pub fn load(file: &File, content: &Content, memory: &Memory) -> Result<(), SnapshotError> {
    let memory = memory.memory();
    // A file system that does not tell holes, or a copy without them: what is zero would be memory, too.
    let there: u64 = filled(file, 0..content.size).iter().map(|part| part.end - part.start).sum();
    let has_holes = there <= content.bytes.saturating_add(content.bytes / 8);
    let mut offset = 0;
    for region in memory.iter().filter(|region| is_ram(region)) {
        let base = region.start_addr().0;
        let own = shared_file(region);
        for part in filled(file, offset..offset + region.len()) {
            let to = part.start - offset;
            // Files of huge pages cannot be written to.
            if has_holes && own.is_some_and(|own| send(file, &part, own.file(), own.start() + to).is_ok()) {
                continue;
            }
            each(file, part, |at, bytes| {
                let copied = memory.write_slice(bytes, GuestAddress(base + (at - offset)));
                copied.map_err(|e| failed("memory", "copied")(io::Error::other(e)))
            })?;
        }
        offset += region.len();
    }
    Ok(())
}

/// Copies a part of a file to another place in another file, all within the kernel: once, and without a fault for each page of a mapping.
fn send(from: &File, part: &Range<u64>, to: &File, at: u64) -> io::Result<()> {
    seek(to, SeekFrom::Start(at))?;
    let mut next = part.start;
    while next < part.end {
        let left = usize::try_from(part.end - next).unwrap_or(usize::MAX);
        if sendfile(to, from, Some(&mut next), left)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Does something with each run of pages of a range that are not zero.
fn each(
    file: &File,
    range: Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let mut buffer = vec![0; PIECE];
    for (at, length) in filled(file, range).into_iter().flat_map(pieces) {
        let piece = buffer.get_mut(..length).unwrap_or_default();
        file.read_exact_at(piece, at).map_err(failed("memory", "read"))?;
        for run in runs(piece) {
            each(at + run.start as u64, piece.get(run).unwrap_or_default())?;
        }
    }
    Ok(())
}
