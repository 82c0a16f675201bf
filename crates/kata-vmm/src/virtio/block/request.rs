//! Requests (virtio 1.2, section 5.2.6): 16 bytes of header, data, one byte of status.

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::disk::{Disk, SECTOR, is_unsupported};
use super::{MAX_DATA, MAX_DISCARD, MAX_DISCARDS, MAX_ZEROES};
use crate::virtio::Counter;
use crate::virtio::buffers::{Buffers, ChainError, Request};

/// Bytes of a request's header.
const HEADER: usize = 16;
/// Bytes of a range to discard or to write zeroes to.
const RANGE: usize = 16;

type Room<'m> = Buffers<'m, ()>;

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// Bytes that the device wrote into the chain.
    pub written: usize,
    /// Bytes of the disk that went one way or the other: what a limit counts. Zeroes are written, whoever has them; what is
    /// discarded goes nowhere.
    pub data: usize,
    /// Bytes of the disk that the request was about, discarded ones too: what a turn's length is measured by.
    pub extent: usize,
}

/// What a request that succeeded has done.
struct Carried {
    /// Bytes written into the room for the answer.
    written: usize,
    /// See [`Done`].
    data: usize,
    extent: usize,
}

impl Carried {
    /// Nothing of the disk's.
    fn nothing(written: usize) -> Carried {
        Carried { written, data: 0, extent: 0 }
    }

    fn data(written: usize, data: usize) -> Carried {
        Carried { written, data, extent: data }
    }
}

/// Why a request fails.
enum Refusal {
    /// The driver asked for what is not there or not allowed.
    Forbidden,
    /// This device cannot do that.
    Unsupported,
    /// The host failed.
    Host(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        if is_unsupported(&error) { Refusal::Unsupported } else { Refusal::Host(error) }
    }
}

/// What was done, and what failed.
#[derive(Debug, Default)]
pub struct Counters {
    pub reads: Counter,
    pub read_bytes: Counter,
    pub writes: Counter,
    pub written_bytes: Counter,
    pub flushes: Counter,
    pub failures: Counter,
}

impl Counters {
    fn done(&self, kind: u32, bytes: usize) {
        let counters = match kind {
            VIRTIO_BLK_T_IN => (&self.reads, &self.read_bytes),
            VIRTIO_BLK_T_OUT => (&self.writes, &self.written_bytes),
            VIRTIO_BLK_T_FLUSH => return self.flushes.add(1),
            _ => return,
        };
        counters.0.add(1);
        counters.1.add(bytes);
    }
}

/// A disk, and what carries requests out on it.
pub struct Engine {
    disk: Disk,
    id: [u8; 20],
    counters: Arc<Counters>,
    /// The host has failed before: it is said aloud once.
    failed: bool,
}

impl Engine {
    /// Works on `disk`, whose serial number is `id`.
    pub fn new(disk: Disk, id: [u8; 20]) -> Engine {
        Engine { disk, id, counters: Arc::default(), failed: false }
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What it counts.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Makes safe what was written.
    pub fn finish(&mut self) {
        if let Err(error) = self.disk.flush() {
            self.report(&error);
        }
    }

    /// Carries out one request. An error means that its chain is none.
    pub fn carry_out(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
        write_through: bool,
    ) -> Result<Done, ChainError> {
        let Request { mut said, mut answer } = Request::<'_, ()>::from_chain(mem, chain)?;
        let mut header = [0; HEADER];
        let header_len = said.take(&mut header);
        let room = answer.len().checked_sub(1).filter(|_| header_len == HEADER);
        let room = room.ok_or(ChainError::TooShort(header_len))?;
        let into = answer.split_to(room);
        let (kind, sector) = parse(&header);
        // What the spec calls data is one of both, the other is nothing. A host that failed may have moved all of it.
        let failed = said.len().max(into.len());
        let result = self.dispatch(kind, sector, said, into).and_then(|carried| {
            if write_through {
                self.disk.flush()?;
            }
            Ok(carried)
        });
        let (status, Carried { written, data, extent }) = match result {
            Ok(carried) => (VIRTIO_BLK_S_OK, carried),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, Carried::nothing(0)),
            Err(Refusal::Forbidden) => (VIRTIO_BLK_S_IOERR, Carried::nothing(0)),
            Err(Refusal::Host(error)) => {
                self.report(&error);
                (VIRTIO_BLK_S_IOERR, Carried::data(0, failed))
            }
        };
        match status {
            VIRTIO_BLK_S_OK => self.counters.done(kind, data),
            _ => self.counters.failures.add(1),
        }
        answer.put(&[u8::try_from(status).unwrap_or(u8::MAX)]);
        Ok(Done { written: written + 1, data, extent })
    }

    fn dispatch(
        &mut self,
        kind: u32,
        sector: u64,
        data: Room<'_>,
        mut room: Room<'_>,
    ) -> Result<Carried, Refusal> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let (offset, len) = (self.check(sector, room.len())?, room.len());
                self.disk.read(room, offset)?;
                Ok(Carried::data(len, len))
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let (offset, len) = (self.check(sector, data.len())?, data.len());
                self.disk.write(data, offset)?;
                Ok(Carried::data(0, len))
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(Carried::nothing(0))
            }
            VIRTIO_BLK_T_GET_ID => {
                let id = self.id;
                Ok(Carried::nothing(room.put(&id)))
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                let discard = kind == VIRTIO_BLK_T_DISCARD;
                let extent = self.change_ranges(discard, data)?;
                Ok(Carried { written: 0, data: if discard { 0 } else { extent }, extent })
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.disk.is_readonly() { Err(Refusal::Forbidden) } else { Ok(()) }
    }

    /// Where data begins, in bytes, if it is whole sectors on the disk.
    fn check(&self, sector: u64, len: usize) -> Result<u64, Refusal> {
        let bytes = u64::try_from(len).map_err(|_| Refusal::Forbidden)?;
        if len > MAX_DATA || !bytes.is_multiple_of(SECTOR) {
            return Err(Refusal::Forbidden);
        }
        self.disk.range(sector, bytes).ok_or(Refusal::Forbidden)
    }

    /// Discards ranges or fills them with zeroes: all are looked at before the first is changed. Answers how many bytes they are.
    fn change_ranges(&mut self, discard: bool, mut data: Room<'_>) -> Result<usize, Refusal> {
        let count = data.len() / RANGE;
        let most = if discard { MAX_DISCARDS } else { 1 };
        if count == 0 || count * RANGE != data.len() || count > usize::try_from(most).unwrap_or(0) {
            return Err(Refusal::Forbidden);
        }
        let mut ranges = Vec::with_capacity(count);
        let mut bytes = [0; RANGE];
        while data.take(&mut bytes) == RANGE {
            ranges.push(self.check_range(discard, &bytes)?);
        }
        let mut extent = 0_u64;
        for (offset, len, unmap) in ranges {
            if discard {
                self.disk.discard(offset, len)?;
            } else {
                self.disk.zero(offset, len, unmap)?;
            }
            extent = extent.saturating_add(len);
        }
        Ok(usize::try_from(extent).unwrap_or(usize::MAX))
    }

    /// Start and length of a range in bytes, and whether its room may be given back.
    fn check_range(&self, discard: bool, bytes: &[u8; RANGE]) -> Result<(u64, u64, bool), Refusal> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let unmap = flags == VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        // Section 5.2.6.2: flags that are not known, and unmap in a discard, are answered so.
        if flags != 0 && (discard || !unmap) {
            return Err(Refusal::Unsupported);
        }
        if sectors > if discard { MAX_DISCARD } else { MAX_ZEROES } {
            return Err(Refusal::Forbidden);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.disk.range(sector, len).ok_or(Refusal::Forbidden)?;
        Ok((offset, len, unmap))
    }

    fn report(&mut self, error: &io::Error) {
        let disk = String::from_utf8_lossy(&self.id);
        let disk = disk.trim_end_matches('\0');
        if std::mem::replace(&mut self.failed, true) {
            tracing::debug!(disk, error = %error, "the host failed a disk's request again");
        } else {
            tracing::warn!(disk, error = %error, "the host failed a disk's request; the guest sees an I/O error");
        }
    }
}

/// Kind and first sector of a request.
fn parse(header: &[u8; HEADER]) -> (u32, u64) {
    let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = *header;
    (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]))
}
