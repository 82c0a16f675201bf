//! The fuzz target: bytes become what a guest does to queues that another process serves.
//!
//! The other process is a thread here, with the project's own back end: of requests for files it would know nothing, but queues,
//! memory and messages are the same.

#![allow(clippy::expect_used, reason = "a fuzz target ends at the first surprise")]

use std::fs::File;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::fs::MemfdFlags;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{SharedFs, SharedFsConfig};
use crate::vhost_user::{VhostUserError, serve};
use crate::virtio::Device;
use crate::virtio::driver::{Ring, SIZE, any_descriptor, scribble, take};
use crate::virtio::told::Told;
use crate::vsock::{Vsock, VsockConfig};

/// Bytes of the guest's memory.
const MEMORY: usize = 0x10_0000;

struct Driver<'m> {
    memory: &'m GuestMemoryMmap,
    rings: [Ring<'m>; 2],
    /// What the driver has written into the device's registers.
    queues: [Queue; 2],
    kicks: Vec<EventFd>,
    told: Arc<Told>,
}

/// Plays `data` to a device. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let lost = Arc::new(AtomicU64::new(0));
    let (mut device, server) = share(Arc::clone(&lost));
    let memory = memory();
    let rings = [0, 0x4000].map(|base| Ring::new(&memory, base));
    let queues = rings.each_ref().map(Ring::queue);
    let mut driver = Driver { memory: &memory, rings, queues, kicks: Vec::new(), told: Told::new() };
    while let Some([step]) = take(&mut data) {
        if driver.step_once(step, &mut data, &mut device).is_none() {
            break;
        }
    }
    device.stop();
    drop(device);
    let served = server.join().expect("the server lives");
    assert!(served.is_ok(), "{served:?}: the guest has broken the connection");
    assert_eq!(lost.load(Ordering::SeqCst), 0, "the server was there all the time");
}

/// A device, and the thread at the other end of its connection.
fn share(lost: Arc<AtomicU64>) -> (SharedFs, JoinHandle<Result<(), VhostUserError>>) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("a socket").into();
    let config = VsockConfig { guest_cid: 3, listener, path: format!("/nowhere/{name}").into() };
    let served = Vsock::new(config).expect("a back end");
    let (socket, there) = UnixStream::pair().expect("a connection");
    let server = std::thread::spawn(move || serve(there, served));
    let on_lost = Box::new(move |_| {
        lost.fetch_add(1, Ordering::SeqCst);
    });
    let config = SharedFsConfig { tag: "share".to_owned(), socket, on_lost };
    (SharedFs::new(config).expect("a device"), server)
}

/// Memory that both ends map.
fn memory() -> GuestMemoryMmap {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("a file"));
    file.set_len(MEMORY as u64).expect("its length");
    let region = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([region]).expect("memory for a guest")
}

impl Driver<'_> {
    fn step_once(&mut self, step: u8, data: &mut &[u8], device: &mut SharedFs) -> Option<()> {
        match step % 8 {
            // Where a queue is to be.
            0 => {
                let [which, field] = take(data)?;
                let value = u64::from_le_bytes(take(data)?);
                let queue = self.queues.get_mut(usize::from(which % 2))?;
                // Mostly where there is memory.
                let value = if which < 200 { value % (MEMORY as u64 + 0x1000) } else { value };
                let [low, high] = [value, value >> 32].map(|half| (half & 0xffff_ffff) as u32);
                match field % 5 {
                    0 => queue.set_desc_table_address(Some(low), Some(high)),
                    1 => queue.set_avail_ring_address(Some(low), Some(high)),
                    2 => queue.set_used_ring_address(Some(low), Some(high)),
                    3 => queue.set_size((low & 0xffff) as u16),
                    _ => queue.set_next_avail((low & 0xffff) as u16),
                }
            }
            // The queues as a well-behaved driver has them.
            1 => self.queues = self.rings.each_ref().map(Ring::queue),
            2 => self.start(device, data)?,
            3 => self.stop(device),
            4 => {
                let [which] = take(data)?;
                if let Some(kick) = self.kicks.get(usize::from(which % 2)) {
                    kick.write(1).expect("an event");
                }
            }
            5 => {
                let [a, b, value] = take(data)?;
                scribble(self.memory, u16::from_le_bytes([a, b]), value);
            }
            6 => {
                let [offset, length] = take(data)?;
                device.read_configuration(offset.into(), &mut vec![0; length.into()]);
            }
            // Any descriptor.
            _ => {
                let [which, slot] = take(data)?;
                let ring = self.rings.get(usize::from(which % 2))?;
                ring.offer(u16::from(slot) % SIZE, &[any_descriptor(data)?]);
            }
        }
        Some(())
    }

    /// One queue or both, with whatever features.
    fn start(&mut self, device: &mut SharedFs, data: &mut &[u8]) -> Option<()> {
        let [which] = take(data)?;
        let features = u64::from_le_bytes(take(data)?);
        self.stop(device);
        let chosen = self.queues.iter().enumerate().filter(|(i, _)| which >> i & 1 == 0);
        let queues: Vec<_> = chosen.map(|(i, queue)| (i, copy(queue))).collect();
        let (activation, kicks) = self.told.activation(self.memory, features, &queues);
        if device.activate(activation).is_ok() {
            self.kicks = kicks;
        }
        Some(())
    }

    /// What works is answered for, and nothing else.
    fn stop(&mut self, device: &mut SharedFs) {
        let states: Vec<(usize, QueueState)> = device.stop();
        assert_eq!(states.len(), self.kicks.len());
        self.kicks.clear();
    }
}

fn copy(queue: &Queue) -> Queue {
    Queue::try_from(queue.state()).expect("a queue of this process")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_guest_breaks_the_connection(data in prop::collection::vec(any::<u8>(), 0..400)) {
            super::run(&data);
        }
    }

    /// Inputs that show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_server_alive() {
        crate::virtio::driver::corpus("share", super::run);
    }
}
