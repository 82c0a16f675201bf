//! Packets of the socket device and the guest buffers they travel in.
//!
//! A packet is a header of [`HEADER_LEN`] bytes and `len` bytes of payload (virtio 1.2, section 5.10.6). The driver may
//! cut both into descriptors as it likes (section 2.7.4), and Linux does: one descriptor for both, a header and one
//! buffer, or a header and many page fragments. So a chain is first turned into [`Buffers`], which hides the cuts.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{
    GuestMemory, GuestMemoryError, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
    WriteVolatile,
};

/// Bytes of a packet header on the wire.
pub const HEADER_LEN: usize = 44;

/// Payload bytes of the largest packet accepted from, or sent to, a guest: what Linux's driver uses at most.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// Pieces of guest memory one chain may consist of; the payload limit in pages is 16.
const MAX_PIECES: usize = 128;

/// The socket type of byte streams, the only one this device has.
pub const TYPE_STREAM: u16 = 1;

/// [`Op::Shutdown`] flag: the sender takes no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// [`Op::Shutdown`] flag: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both [`Op::Shutdown`] flags: the sender has closed its socket.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet does to its stream (virtio 1.2, section 5.10.6, `VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a stream.
    Request = 1,
    /// Accepts a requested stream.
    Response = 2,
    /// Refuses or ends a stream.
    Reset = 3,
    /// Says which directions the sender has closed, in the flags.
    Shutdown = 4,
    /// Carries payload.
    ReadWrite = 5,
    /// Carries credit and nothing else.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number; `None` if there is no such.
    pub fn from_raw(raw: u16) -> Option<Op> {
        Some(match raw {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::ReadWrite,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// A packet header (virtio 1.2, section 5.10.6, `struct virtio_vsock_hdr`), in native byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type; only streams are served.
    pub kind: u16,
    /// Operation; see [`Op::from_raw`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes that the sender is ready to buffer for this stream.
    pub buf_alloc: u32,
    /// Bytes of this stream that the sender has taken out of its buffer so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes the wire form (little endian).
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Header {
        fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
            let Some((field, tail)) = rest.split_first_chunk() else { return [0; N] };
            *rest = tail;
            *field
        }
        let mut rest = bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes the wire form (little endian).
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
            if let Some((head, tail)) = std::mem::take(rest).split_first_chunk_mut() {
                *head = field;
                *rest = tail;
            }
        }
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet when nothing knows its stream.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}

/// Why a descriptor chain cannot hold a packet.
#[derive(Debug, Error)]
pub enum ChainError {
    /// A descriptor has the wrong direction for its queue.
    #[error("a descriptor of the chain has the wrong direction for its queue")]
    Direction,
    /// The chain has too little room for a header (and, on the receive queue, one byte).
    #[error("the chain has {0} bytes, too few for a packet")]
    TooShort(usize),
    /// The chain is cut into too many pieces.
    #[error("the chain has more than {MAX_PIECES} pieces")]
    TooManyPieces,
    /// A descriptor points outside guest memory.
    #[error("a descriptor of the chain points outside guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Guest memory of one chain, or of a part of it, in the order of the packet's bytes.
pub struct Buffers<'m, B: BitmapSlice> {
    pieces: VecDeque<VolatileSlice<'m, B>>,
    len: usize,
}

impl<'m, B: BitmapSlice> Buffers<'m, B> {
    /// The memory of `chain`, all of whose descriptors must be accessible the `access` way.
    pub fn from_chain<M>(
        mem: &'m M,
        chain: DescriptorChain<&'m M>,
        access: Permissions,
    ) -> Result<Buffers<'m, BS<'m, M::Bitmap>>, ChainError>
    where
        M: GuestMemory,
    {
        let mut buffers = Buffers { pieces: VecDeque::with_capacity(2), len: 0 };
        for (count, descriptor) in chain.enumerate() {
            if descriptor.is_write_only() != matches!(access, Permissions::Write) {
                return Err(ChainError::Direction);
            }
            // Counted apart from the pieces: descriptors of no length make none.
            if count >= MAX_PIECES {
                return Err(ChainError::TooManyPieces);
            }
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            for piece in mem.get_slices(descriptor.addr(), len, access).map_err(ChainError::Memory)? {
                if buffers.pieces.len() >= MAX_PIECES {
                    return Err(ChainError::TooManyPieces);
                }
                let piece = piece.map_err(ChainError::Memory)?;
                buffers.len += piece.len();
                buffers.pieces.push_back(piece);
            }
        }
        Ok(buffers)
    }

    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no room at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts the first `len` bytes off (all, if there are fewer) and returns them.
    pub fn split_to(&mut self, len: usize) -> Buffers<'m, B> {
        let mut front = Buffers { pieces: VecDeque::with_capacity(1), len: 0 };
        while front.len < len {
            let Some(piece) = self.pieces.pop_front() else { break };
            let piece = match piece.split_at(len - front.len) {
                Ok((wanted, rest)) => {
                    if !rest.is_empty() {
                        self.pieces.push_front(rest);
                    }
                    wanted
                }
                // The piece is shorter than what is still wanted.
                Err(_) => piece,
            };
            front.len += piece.len();
            self.len -= piece.len();
            front.pieces.push_back(piece);
        }
        front
    }

    /// Copies a header out of the first bytes.
    pub fn read_header(&mut self) -> Result<Header, ChainError> {
        if self.len < HEADER_LEN {
            return Err(ChainError::TooShort(self.len));
        }
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        for piece in self.split_to(HEADER_LEN).pieces {
            let copied = piece.copy_to(rest);
            rest = rest.get_mut(copied..).unwrap_or_default();
        }
        Ok(Header::from_bytes(&bytes))
    }

    /// Copies `header` into the first bytes; the rest of the room stays as it is.
    pub fn write_header(&self, header: &Header) {
        let bytes = header.to_bytes();
        let mut rest = bytes.as_slice();
        for piece in &self.pieces {
            piece.copy_from(rest);
            rest = rest.get(piece.len()..).unwrap_or_default();
        }
    }

    /// Writes to `socket`, straight from guest memory, as much as it takes without blocking. `Ok(n)` with `n` less than
    /// the length means that it took no more for now.
    pub fn write_to(&self, mut socket: &UnixStream) -> io::Result<usize> {
        let mut done = 0;
        for piece in &self.pieces {
            match retry(|| socket.write_volatile(piece)) {
                Ok(n) => {
                    done += n;
                    if n < piece.len() {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Reads what `socket` has, straight into guest memory, until `limit` bytes are read or the room is full. `Ok(0)` is
    /// its end, if there is room and the limit is not 0.
    pub fn read_from(&self, mut socket: &UnixStream, limit: usize) -> io::Result<usize> {
        let mut done = 0;
        for piece in &self.pieces {
            let wanted = piece.len().min(limit - done);
            let Ok(mut piece) = piece.subslice(0, wanted) else { break };
            match retry(|| socket.read_volatile(&mut piece)) {
                Ok(n) => {
                    done += n;
                    if n < wanted || done == limit {
                        break;
                    }
                }
                Err(_) if done > 0 => break,
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// Appends a copy of all bytes from `skip` on to `queue`.
    pub fn copy_into(&mut self, skip: usize, queue: &mut VecDeque<u8>) {
        let mut chunk = [0; 4096];
        self.split_to(skip);
        while !self.is_empty() {
            for piece in self.split_to(chunk.len()).pieces {
                let copied = piece.copy_to(&mut chunk);
                queue.extend(chunk.get(..copied).unwrap_or_default());
            }
        }
    }
}

/// Repeats `call` while a signal interrupts it.
fn retry(mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) -> io::Result<usize> {
    loop {
        match call() {
            Ok(n) => return Ok(n),
            Err(VolatileMemoryError::IOError(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(VolatileMemoryError::IOError(e)) => return Err(e),
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}
