//! Packets of the socket device and the guest buffers they travel in.
//!
//! A packet is a header of [`HEADER_LEN`] bytes and `len` bytes of payload (virtio 1.2, section 5.10.6). The driver may
//! cut both into descriptors as it likes (section 2.7.4), and Linux does: one descriptor for both, a header and one
//! buffer, or a header and many page fragments. [`Buffers`] hide the cuts.

use vm_memory::bitmap::BitmapSlice;

use crate::virtio::buffers::{Buffers, ChainError};

/// Bytes of a packet header on the wire.
pub const HEADER_LEN: usize = 44;

/// Payload bytes of the largest packet accepted from, or sent to, a guest: what Linux's driver uses at most.
pub const MAX_PAYLOAD: usize = 64 * 1024;

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

/// Copies a header out of the first bytes of a packet, and leaves its payload.
pub fn read_header<B: BitmapSlice>(packet: &mut Buffers<'_, B>) -> Result<Header, ChainError> {
    if packet.len() < HEADER_LEN {
        return Err(ChainError::TooShort(packet.len()));
    }
    let mut bytes = [0; HEADER_LEN];
    packet.take(&mut bytes);
    Ok(Header::from_bytes(&bytes))
}
