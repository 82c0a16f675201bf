//! The file behind a disk: what a descriptor must be like, and the operations on it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use thiserror::Error;

use crate::virtio::buffers::Buffers;

/// Bytes of a sector, the unit of all positions, whatever the size of a block is (virtio 1.2, section 5.2.4).
pub const SECTOR: u64 = 512;
/// Largest size of a block that is passed on to the guest.
const MAX_BLOCK: u32 = 64 * 1024;
/// `STATX_DIOALIGN`: what direct I/O asks of positions and buffers.
const DIRECT_ALIGNMENT: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// Why a descriptor cannot be a disk.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It is a directory, a socket or so.
    #[error("a disk must be a regular file or a block device")]
    Kind,
    /// Writes would fail.
    #[error("the disk may be written to, but its descriptor was not opened for that")]
    NotWritable,
    /// A defect here could write to it.
    #[error("the disk is read-only, but its descriptor was opened for writing: open it O_RDONLY")]
    Writable,
    /// Each write would go to the end.
    #[error("the disk's descriptor was opened with O_APPEND")]
    Append,
    /// The rest would be out of reach.
    #[error("the disk has {0} bytes, which is no multiple of its blocks of {1} bytes")]
    Size(u64, u32),
    /// Direct I/O asks for more than can be kept.
    #[error(
        "the disk is opened with O_DIRECT, which asks for an alignment of {0} bytes there: open it without"
    )]
    Alignment(u32),
    /// A limit that lets nothing through.
    #[error("the disk's limit of {0} a second is zero: leave it out for no limit")]
    NoRate(&'static str),
    /// The host refused something.
    #[error("the disk's file cannot be {action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A disk's file.
pub struct Disk {
    file: File,
    readonly: bool,
    size: u64,
    block: u32,
    /// It was opened with `O_DIRECT`, which wants buffers at multiples of this.
    direct: Option<usize>,
    /// Something was written since the last [`Disk::flush`].
    dirty: bool,
}

impl Disk {
    /// Looks at what a descriptor is.
    pub fn new(file: OwnedFd, readonly: bool) -> Result<Disk, DiskError> {
        let host = |action| move |e: rustix::io::Errno| DiskError::Host { action, source: e.into() };
        let file = File::from(file);
        let kind =
            file.metadata().map_err(|source| DiskError::Host { action: "examined", source })?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(host("examined"))?;
        match (readonly, flags & OFlags::ACCMODE) {
            (true, OFlags::RDONLY) | (false, OFlags::RDWR) => {}
            (true, _) => return Err(DiskError::Writable),
            (false, _) => return Err(DiskError::NotWritable),
        }
        if flags.contains(OFlags::APPEND) {
            return Err(DiskError::Append);
        }
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(host("measured"))?;
        let mut block = if kind.is_block_device() { block_size(&file)? } else { 512 };
        let mut direct = None;
        if flags.contains(OFlags::DIRECT) {
            let asked = rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH, DIRECT_ALIGNMENT)
                .map_err(host("examined"))?;
            // What a kernel or a file system does not say is what all block devices up to 4 KiB are content with.
            let said = |value: u32| if value == 0 { 4096 } else { value };
            let memory = said(asked.stx_dio_mem_align);
            block = block.max(asked.stx_dio_offset_align);
            direct = Some(usize::try_from(memory.max(block)).map_err(|_| DiskError::Alignment(memory))?);
        }
        if !block.is_power_of_two() || !(512..=MAX_BLOCK).contains(&block) {
            return Err(DiskError::Alignment(block));
        }
        if !size.is_multiple_of(block.into()) {
            return Err(DiskError::Size(size, block));
        }
        Ok(Disk { file, readonly, size, block, direct, dirty: false })
    }

    /// Sectors that it has.
    pub fn sectors(&self) -> u64 {
        self.size / SECTOR
    }

    /// Bytes of a block, the least that the guest reads or writes at once.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Whether nothing may be written.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Where a range begins, in bytes, if all of it is on the disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        (start.checked_add(bytes)? <= self.size).then_some(start)
    }

    /// Fills `room` from `offset` on.
    pub fn read(&self, mut room: Buffers<'_, ()>, mut offset: u64) -> io::Result<()> {
        if let Some(alignment) = self.bounces(&room) {
            let mut bounce = Bounce::new(room.len(), alignment);
            self.file.read_exact_at(bounce.bytes(), offset)?;
            room.put(bounce.bytes());
            return Ok(());
        }
        while !room.is_empty() {
            match room.read_at(&self.file, offset)? {
                // It became shorter than it was.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                done => {
                    offset += u64::try_from(done).map_err(io::Error::other)?;
                    room.split_to(done);
                }
            }
        }
        Ok(())
    }

    /// Writes all of `data` from `offset` on.
    pub fn write(&mut self, mut data: Buffers<'_, ()>, mut offset: u64) -> io::Result<()> {
        self.dirty = true;
        if let Some(alignment) = self.bounces(&data) {
            let mut bounce = Bounce::new(data.len(), alignment);
            data.take(bounce.bytes());
            return self.file.write_all_at(bounce.bytes(), offset);
        }
        while !data.is_empty() {
            match data.write_at(&self.file, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                done => {
                    offset += u64::try_from(done).map_err(io::Error::other)?;
                    data.split_to(done);
                }
            }
        }
        Ok(())
    }

    /// Brings all that was written to where a loss of power does not reach it.
    pub fn flush(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.dirty) {
            self.file.sync_data().inspect_err(|_| self.dirty = true)?;
        }
        Ok(())
    }

    /// Gives the room of a range back; it reads as zeroes from then on.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, bytes)
    }

    /// Has a range read as zeroes, and gives its room back if it may and can.
    pub fn zero(&mut self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        let (first, second) = match unmap {
            true => (FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE),
            false => (FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE),
        };
        match self.allocate(first, offset, bytes) {
            Err(e) if is_unsupported(&e) => self.allocate(second, offset, bytes),
            other => other,
        }
    }

    fn allocate(&mut self, how: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.dirty = true;
        Ok(rustix::fs::fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, bytes)?)
    }

    /// The alignment that direct I/O asks for, where these buffers do not have it.
    fn bounces(&self, buffers: &Buffers<'_, ()>) -> Option<usize> {
        self.direct.filter(|alignment| !buffers.is_aligned(*alignment))
    }
}

/// Whether the file or what is below it cannot do what was asked for.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Bytes of a block device's logical blocks.
fn block_size(file: &File) -> Result<u32, DiskError> {
    rustix::fs::ioctl_blksszget(file)
        .map_err(|e| DiskError::Host { action: "asked for the size of its blocks", source: e.into() })
}

/// Memory at a multiple of an alignment, for guests whose buffers are not.
struct Bounce {
    space: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    fn new(len: usize, alignment: usize) -> Bounce {
        let space = vec![0; len + alignment];
        let start = (space.as_ptr() as usize).wrapping_neg() % alignment;
        Bounce { space, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.space.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}
