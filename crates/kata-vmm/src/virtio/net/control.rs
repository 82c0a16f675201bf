//! The control queue (virtio 1.2, section 5.1.6.5): class, command, data, and one byte for the answer.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::Server;
use crate::virtio::buffers::{Buffers, ChainError, Request};
use crate::virtio::ring::{QueueFault, give_back, next_or_wait, wants_interrupt};
use crate::virtio::worker::Served;

/// Carries commands out.
pub fn serve(server: &mut Server, mem: &GuestMemoryMmap, queue: &mut Queue) -> Result<Served, QueueFault> {
    let (mut used, mut more) = (0, true);
    for _ in 0..queue.size() {
        let Some(chain) = next_or_wait(mem, queue)? else {
            more = false;
            break;
        };
        let head = chain.head_index();
        let Request { mut said, mut answer } = Request::<'_, ()>::from_chain(mem, chain)?;
        if answer.is_empty() {
            return Err(ChainError::TooShort(said.len()).into());
        }
        let code = if carry_out(server, &mut said) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let written = answer.put(&[u8::try_from(code).unwrap_or(u8::MAX)]);
        give_back(mem, queue, head, written)?;
        used += 1;
    }
    Ok(Served { interrupt: wants_interrupt(mem, queue, used)?, more })
}

/// Whether the command was known and carried out.
fn carry_out(server: &mut Server, said: &mut Buffers<'_, ()>) -> bool {
    let mut command = [0; 4];
    let [class, what, low, high] = match said.take(&mut command) {
        4 => command,
        _ => return false,
    };
    if (u32::from(class), u32::from(what)) != (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) {
        return false;
    }
    let count = usize::from(u16::from_le_bytes([low, high]));
    if !(1..=server.pairs.len()).contains(&count) {
        return false;
    }
    server
        .use_pairs(count)
        .inspect_err(|error| tracing::warn!(%error, count, "a tap's queues cannot be used"))
        .is_ok()
}
