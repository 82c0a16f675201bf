//! Guest memory of descriptor chains.
//!
//! The driver may cut what it sends into descriptors as it likes (virtio 1.2, section 2.7.4), so a chain is first turned into
//! [`Buffers`], which hide the cuts: bytes in a row, taken off the front, copied, or lent to system calls without a copy.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::{
    GuestMemory, GuestMemoryError, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice,
    WriteVolatile,
};

/// Pieces of guest memory one chain may consist of: as many as one system call takes (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// Why a descriptor chain cannot be used.
#[derive(Debug, Error)]
pub enum ChainError {
    /// A descriptor has the wrong direction for its queue, or for its place in the chain.
    #[error("a descriptor of the chain has the wrong direction for its place")]
    Direction,
    /// There is too little of it for what it is to hold.
    #[error("the chain has {0} bytes, too few for what it is to hold")]
    TooShort(usize),
    /// The chain is cut into too many pieces.
    #[error("the chain has more than {MAX_PIECES} pieces")]
    TooManyPieces,
    /// A descriptor points outside guest memory.
    #[error("a descriptor of the chain points outside guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Both directions of a chain.
pub struct Request<'m, B: BitmapSlice> {
    /// What the driver says.
    pub said: Buffers<'m, B>,
    /// Room for the device's answer.
    pub answer: Buffers<'m, B>,
}

impl<'m, B: BitmapSlice> Request<'m, B> {
    /// The memory of `chain`: what the device reads comes first, what it writes after that (virtio 1.2, section 2.7.4.2).
    pub fn from_chain<M>(
        mem: &'m M,
        chain: DescriptorChain<&'m M>,
    ) -> Result<Request<'m, BS<'m, M::Bitmap>>, ChainError>
    where
        M: GuestMemory,
    {
        let mut request = Request { said: Buffers::default(), answer: Buffers::default() };
        for (count, descriptor) in chain.enumerate() {
            if count >= MAX_PIECES {
                return Err(ChainError::TooManyPieces);
            }
            let (buffers, access) = match (descriptor.is_write_only(), request.answer.pieces.is_empty()) {
                (true, _) => (&mut request.answer, Permissions::Write),
                (false, true) => (&mut request.said, Permissions::Read),
                (false, false) => return Err(ChainError::Direction),
            };
            buffers.add(mem, &descriptor, access)?;
        }
        Ok(request)
    }
}

/// Guest memory of one chain, or of a part of it, in the order of its bytes.
pub struct Buffers<'m, B: BitmapSlice> {
    pieces: VecDeque<VolatileSlice<'m, B>>,
    len: usize,
}

impl<B: BitmapSlice> Default for Buffers<'_, B> {
    fn default() -> Self {
        Buffers { pieces: VecDeque::new(), len: 0 }
    }
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
            buffers.add(mem, &descriptor, access)?;
        }
        Ok(buffers)
    }

    fn add<M>(
        &mut self,
        mem: &'m M,
        descriptor: &virtio_queue::desc::split::Descriptor,
        access: Permissions,
    ) -> Result<(), ChainError>
    where
        M: GuestMemory,
        M::Bitmap: vm_memory::bitmap::WithBitmapSlice<'m, S = B>,
    {
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        for piece in mem.get_slices(descriptor.addr(), len, access).map_err(ChainError::Memory)? {
            if self.pieces.len() >= MAX_PIECES {
                return Err(ChainError::TooManyPieces);
            }
            let piece = piece.map_err(ChainError::Memory)?;
            self.len += piece.len();
            self.pieces.push_back(piece);
        }
        Ok(())
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

    /// Copies the first bytes out, as many as both sides have, cuts them off and says how many they were.
    pub fn take(&mut self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.split_to(into.len()).pieces {
            done += piece.copy_to(into.get_mut(done..).unwrap_or_default());
        }
        done
    }

    /// Copies `bytes` into the first bytes, as many as both sides have, cuts them off and says how many they were.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.split_to(bytes.len()).pieces {
            piece.copy_from(bytes.get(done..).unwrap_or_default());
            done += piece.len();
        }
        done
    }

    /// Whether each piece begins and ends at a multiple of `alignment` in this process's memory.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.pieces.iter().all(|piece| {
            (piece.ptr_guard().as_ptr() as usize).is_multiple_of(alignment)
                && piece.len().is_multiple_of(alignment)
        })
    }

    /// Reads from `file` at `offset`, straight into guest memory, once: it can be less than there is room.
    pub fn read_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.call(|vectors, count| {
            // SAFETY: the vectors lie in guest memory, which stays mapped while the slices they come from are borrowed. The guest
            // may change what is there at any time: nobody holds a reference to it.
            unsafe { libc::preadv64(file.as_fd().as_raw_fd(), vectors, count, offset.cast_signed()) }
        })
    }

    /// Writes to `file` at `offset`, straight from guest memory, once: it can be less than there is.
    pub fn write_at(&self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        self.call(|vectors, count| {
            // SAFETY: as in `read_at`; the kernel only reads.
            unsafe { libc::pwritev64(file.as_fd().as_raw_fd(), vectors, count, offset.cast_signed()) }
        })
    }

    /// Writes all of it to `file` as one message, straight from guest memory.
    pub fn send(&self, file: impl AsFd) -> io::Result<usize> {
        self.call(|vectors, count| {
            // SAFETY: as in `write_at`.
            unsafe { libc::writev(file.as_fd().as_raw_fd(), vectors, count) }
        })
    }

    /// Has `call` work on these bytes; again when a signal interrupts it.
    fn call(&self, call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t) -> io::Result<usize> {
        let guards: Vec<_> = self.pieces.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let vectors: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
        loop {
            let done = call(vectors.as_ptr(), count);
            match usize::try_from(done) {
                Ok(done) => return Ok(done),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
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
            let copied = self.take(&mut chunk);
            queue.extend(chunk.get(..copied).unwrap_or_default());
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

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::virtio::driver::{Ring, WRITE};
    use crate::virtio::ring::next_chain;

    /// Memory in two pieces that follow each other: a descriptor may lie over both.
    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)])
            .unwrap()
    }

    proptest! {
        /// However a chain is cut, its bytes are those of its descriptors in a row.
        #[test]
        fn bytes_are_in_a_row_whatever_the_cuts(
            pieces in prop::collection::vec((0x8000u64..0x1_f000, 0u32..3000), 0..8),
            answers in prop::collection::vec(1u32..500, 0..6),
            cuts in prop::collection::vec(0usize..5000, 0..8),
        ) {
            let mem = memory();
            for at in (0x8000..0x2_0000).step_by(2) {
                mem.write_obj(u16::try_from(at & 0xffff).unwrap(), GuestAddress(at)).unwrap();
            }
            let ring = Ring::new(&mem, 0);
            let mut chain: Vec<_> = pieces.iter().map(|(at, len)| (*at, *len, 0)).collect();
            chain.extend(answers.iter().map(|len| (0x8000, *len, WRITE)));
            prop_assume!(!chain.is_empty());
            ring.offer(0, &chain);
            let mut expected = Vec::new();
            for (at, len) in &pieces {
                let mut piece = vec![0; usize::try_from(*len).unwrap()];
                mem.read_slice(&mut piece, GuestAddress(*at)).unwrap();
                expected.extend(piece);
            }

            let mut queue = ring.queue();
            let chain = next_chain(&mem, &mut queue).unwrap().unwrap();
            let Request { mut said, answer } = Request::<'_, ()>::from_chain(&mem, chain).unwrap();
            let room: u32 = answers.iter().sum();
            prop_assert_eq!(answer.len(), usize::try_from(room).unwrap());
            prop_assert_eq!(said.len(), expected.len());

            let mut file = tempfile::tempfile().unwrap();
            let mut written = 0;
            while written < said.len() {
                let mut rest = Buffers { pieces: said.pieces.clone(), len: said.len };
                rest.split_to(written);
                written += rest.write_at(&file, u64::try_from(written).unwrap()).unwrap();
            }
            let mut got: Vec<u8> = Vec::new();
            file.read_to_end(&mut got).unwrap();
            prop_assert_eq!(&got, &expected);

            let mut taken: Vec<u8> = Vec::new();
            for cut in cuts {
                let mut part = vec![0; cut];
                let len = said.take(&mut part);
                prop_assert_eq!(len, cut.min(expected.len() - taken.len()));
                taken.extend(&part[..len]);
            }
            prop_assert_eq!(&taken[..], &expected[..taken.len()]);
            prop_assert_eq!(said.len(), expected.len() - taken.len());
        }
    }
}
