//! The fuzz target: bytes become what a guest and its network do to a device.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a fuzz target ends at the first surprise")]

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::driver::{Ring, SIZE, WRITE, any_descriptor, scribble, take};

/// Bytes of the guest's memory.
const MEMORY: usize = 0x4_0000;

/// Plays `data` to a device with two pairs. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let Some([features]) = take(&mut data) else { return };
    let features = u64::from(features & 1) << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_MQ;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = || {
        let (tap, world) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a pair of sockets");
        (Tap::stand_in(tap), world)
    };
    let ((first, world), (second, _other)) = (pair(), pair());
    let mut server = Server::new(vec![first, second], Arc::new(AtomicBool::new(true)), None);
    server.begin(features, false).expect("a driver");
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a guest");
    let rings = [0, 0x4000, 0x8000].map(|base| Ring::new(&mem, base));
    let [mut receive, mut transmit, mut commands] = [0, 1, 2].map(|at: usize| rings[at].queue());
    while let Some([step]) = take(&mut data) {
        if step_once(step, &mut data, &mem, &rings, &world).is_none() {
            break;
        }
        let pair = &mut server.pairs[0];
        pair.readable = true;
        if pair.receive(&mem, &mut receive).is_err()
            || pair.transmit(&mem, &mut transmit).is_err()
            || control::serve(&mut server, &mem, &mut commands).is_err()
        {
            break;
        }
        assert!((1..=2).contains(&server.used));
        let _ = rustix::io::read(&world, &mut [0; 64]);
    }
}

fn step_once(
    step: u8,
    data: &mut &[u8],
    mem: &GuestMemoryMmap,
    rings: &[Ring<'_>; 3],
    world: &OwnedFd,
) -> Option<()> {
    match step % 6 {
        // Room for packets.
        0 => {
            let [slot, len] = take(data)?;
            rings[0].offer(u16::from(slot) % SIZE, &[(0x1_0000, u32::from(len) * 16, WRITE)]);
        }
        // A packet from outside.
        1 => {
            let [len] = take(data)?;
            let _ = rustix::io::write(world, &vec![len; 13 + usize::from(len) * 32]);
        }
        // A packet, or a command.
        2 | 3 => {
            let [slot, a, b, c, d] = take(data)?;
            mem.write_slice(&[a % 8, b % 2, c, d], GuestAddress(0x1_8000)).ok()?;
            let slot = u16::from(slot) % (SIZE - 1);
            if step % 6 == 2 {
                rings[1].offer(slot, &[(0x1_8000, 12, 0), (0x1_0000, u32::from(a) * 64, 0)]);
            } else {
                rings[2].offer(slot, &[(0x1_8000, 4, 0), (0x1_8010, 1, WRITE)]);
            }
        }
        // Any bytes anywhere in the rings.
        4 => {
            let [a, b, value] = take(data)?;
            scribble(mem, u16::from_le_bytes([a, b]), value);
        }
        // Any descriptor.
        _ => {
            let [which, slot] = take(data)?;
            rings[usize::from(which) % 3].offer(u16::from(slot) % SIZE, &[any_descriptor(data)?]);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_guest_ends_the_process(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::run(&data);
        }
    }

    /// Inputs that show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_device_alive() {
        crate::virtio::driver::corpus("net", super::run);
    }
}
