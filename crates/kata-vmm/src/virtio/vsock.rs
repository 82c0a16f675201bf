//! The socket device on the guest's bus: [`crate::vsock::Vsock`] in a thread of its own.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::epoll::EventFlags;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueState};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::BS;

use super::buffers::{ChainError, Request};
use super::ring::{QueueFault, give_back, next_or_wait, wants_interrupt};
use super::worker::{Rings, Served, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, positions, read_space};
use crate::vsock::{RECEIVE_QUEUE, Serviced, TRANSMIT_QUEUE, Vsock};

/// The queue of events, and the one event that there is: all streams are gone, and the context id is to be read anew (virtio 1.2,
/// section 5.10.6.7).
const EVENTS: usize = 2;
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Entries of the queues: to the guest, from the guest, of events.
const QUEUES: [u16; crate::vsock::QUEUES] = [128, 128, 16];

/// The device.
pub struct Socket {
    space: [u8; 8],
    worker: Worker<Server>,
    /// Where the queues were when it last stopped.
    stopped_at: Vec<(usize, u16)>,
}

impl Socket {
    /// Lends `vsock` to the guest.
    pub fn new(vsock: Vsock) -> Result<Socket, ActivateError> {
        let space = vsock.config_space();
        Ok(Socket { space, worker: Worker::new(Server { vsock, reset: false })?, stopped_at: Vec::new() })
    }
}

impl Device for Socket {
    fn kind(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        Vsock::FEATURES & !(1 << VIRTIO_F_VERSION_1)
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        read_space(&self.space, offset, into);
    }

    /// Another context id is no other device: the driver is told of it.
    fn shape(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restored(&mut self) {
        if let Some(server) = self.worker.standing() {
            server.reset = true;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // A driver that starts anew knows no stream.
        if self.stopped_at != activation.positions()
            && let Some(server) = self.worker.standing()
        {
            server.vsock.forget_guest();
        }
        self.worker.start(activation)
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        let states = self.worker.stop();
        if !states.is_empty() {
            self.stopped_at = positions(&states);
        }
        states
    }
}

/// What the device's thread has.
struct Server {
    vsock: Vsock,
    /// The driver has to hear of [`TRANSPORT_RESET`].
    reset: bool,
}

impl Server {
    /// Tells the driver that its streams are gone, as soon as it has a buffer for that.
    fn tell(&mut self, mem: &GuestMemoryMmap, queue: &mut Queue) -> Result<Served, QueueFault> {
        let Some(chain) = next_or_wait(mem, queue)? else { return Ok(Served::default()) };
        let head = chain.head_index();
        let mut room = Request::<BS<'_, ()>>::from_chain(mem, chain)?.answer;
        let length = room.len();
        if length < TRANSPORT_RESET.len() {
            return Err(ChainError::TooShort(length).into());
        }
        let written = room.put(&TRANSPORT_RESET);
        give_back(mem, queue, head, written)?;
        self.reset = false;
        Ok(Served { interrupt: wants_interrupt(mem, queue, 1)?, more: false })
    }
}

impl Work for Server {
    const NAME: &'static str = "virtio-vsock";

    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        // Stays readable while there is something left that one call does not take.
        vec![(self.vsock.as_fd(), EventFlags::IN)]
    }

    fn turn(&mut self, wake: Wake, rings: &mut Rings) -> Then {
        if wake == Wake::default() || wake.own(0) {
            self.vsock.handle_host();
        }
        if self.reset {
            // Should the driver have lent no buffer, it will, and the first packet of a stream that is gone is answered with a reset.
            let _ = rings.serve(EVENTS, |mem, queue| self.tell(mem, queue));
        }
        let served = |Serviced { interrupt, more, .. }| Served { interrupt, more };
        let sent = rings.serve(TRANSMIT_QUEUE, |mem, queue| self.vsock.transmit(mem, queue).map(served));
        sent.or(rings.serve(RECEIVE_QUEUE, |mem, queue| self.vsock.fill(mem, queue).map(served)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::virtio::told::Told;
    use crate::vsock::driver::{Driver, MEMORY};
    use crate::vsock::{HOST_CID, Header, Op, VsockConfig};

    fn device(directory: &std::path::Path, guest_cid: u64) -> Socket {
        let path = directory.join("h");
        let listener = UnixListener::bind(&path).unwrap();
        Socket::new(Vsock::new(VsockConfig { guest_cid, listener: listener.into(), path }).unwrap()).unwrap()
    }

    #[test]
    fn driver_from_a_snapshot_hears_once_that_its_streams_are_gone() {
        let directory = tempfile::tempdir().unwrap();
        let mut device = device(directory.path(), 44);
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
        let (events, told) = (crate::virtio::driver::Ring::new(&mem, 0x4000), Told::new());
        events.offer(0, &[(0x1_0000, 4, crate::virtio::driver::WRITE)]);
        events.offer(1, &[(0x1_0010, 4, crate::virtio::driver::WRITE)]);
        vm_memory::Bytes::write_obj(&mem, u32::MAX, GuestAddress(0x1_0000)).unwrap();
        device.restored();
        let (activation, kicks) = told.activation(&mem, 0, &[(EVENTS, events.queue())]);
        device.activate(activation).unwrap();
        told.eventually("used 2");
        assert_eq!((events.given_back(), events.back(0)), (1, (0, 4)));
        assert_eq!(vm_memory::Bytes::read_obj::<u32>(&mem, GuestAddress(0x1_0000)).unwrap(), 0);
        kicks[0].write(1).unwrap();
        let states = device.stop();
        assert_eq!((events.given_back(), states[0].1.next_avail), (1, 1), "the other buffer stays");
    }

    fn packet(op: Op, to: &Header) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: to.dst_port,
            dst_port: to.src_port,
            kind: 1,
            op: op as u16,
            buf_alloc: 1 << 16,
            ..Header::default()
        }
    }

    #[test]
    fn stream_survives_a_pause_and_not_a_new_driver() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("h");
        let listener = UnixListener::bind(&path).unwrap();
        let config = VsockConfig { guest_cid: 3, listener: listener.into(), path: path.clone() };
        let mut device = Socket::new(Vsock::new(config).unwrap()).unwrap();
        let mut cid = [0; 8];
        device.read_configuration(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), 3);

        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (mut driver, told) = (Driver::new(&mem), Told::new());
        driver.offer_all();
        let [receive, transmit] = driver.queues();
        let (activation, kicks) = told.activation(&mem, 0, &[(0, receive), (1, transmit)]);
        device.activate(activation).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.write_all(b"CONNECT 7\n").unwrap();
        told.eventually("used 0");
        let [(request, _)] = &driver.received()[..] else { panic!("one packet") };
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 7));
        driver.send(packet(Op::Response, request), &[]);
        kicks[1].write(1).unwrap();
        let mut answer = [0; 3];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK ");

        let states = device.stop();
        assert_eq!(
            states.iter().map(|(index, state)| (*index, state.next_avail)).collect::<Vec<_>>(),
            [(0, 1), (1, 1)]
        );
        let queues: Vec<_> =
            states.into_iter().map(|(index, state)| (index, state.try_into().unwrap())).collect();
        let (activation, _kicks) = told.activation(&mem, 0, &queues);
        driver.send(packet(Op::ReadWrite, request), b"still here");
        device.activate(activation).unwrap();
        let mut rest = [0; 32];
        let mut text = Vec::new();
        while !text.ends_with(b"still here") {
            let read = client.read(&mut rest).unwrap();
            assert_ne!(read, 0, "the stream ended");
            text.extend(&rest[..read]);
        }

        device.stop();
        let driver = Driver::new(&mem);
        let [receive, transmit] = driver.queues();
        let (activation, _kicks) = told.activation(&mem, 0, &[(0, receive), (1, transmit)]);
        device.activate(activation).unwrap();
        assert_eq!(client.read(&mut rest).unwrap(), 0);
    }
}
