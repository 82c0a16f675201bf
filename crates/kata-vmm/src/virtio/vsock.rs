//! The socket device on the guest's bus: [`crate::vsock::Vsock`] in a thread of its own.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::epoll::EventFlags;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueState;

use super::worker::{Rings, Served, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, positions, read_space};
use crate::vsock::{RECEIVE_QUEUE, Serviced, TRANSMIT_QUEUE, Vsock};

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
        Ok(Socket { space, worker: Worker::new(Server { vsock })?, stopped_at: Vec::new() })
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
