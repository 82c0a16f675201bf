//! The fuzz target: bytes become what a guest and a client do to a device.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a fuzz target ends at the first surprise")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::driver::{Driver, MEMORY, SIZE};
use super::{Vsock, VsockConfig};

/// Where the sockets of all runs of this process are.
fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = std::env::temp_dir().join(format!("vsock-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory for sockets");
        directory
    })
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*front)
}

/// Plays `data` to a device. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    static RUNS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = directory().join(format!("h{run}"));
    let listener = UnixListener::bind(&path).expect("a hybrid socket");
    // Port 5 has a server.
    let served = directory().join(format!("h{run}_5"));
    let server = UnixListener::bind(&served).expect("a server's socket");
    server.set_nonblocking(true).expect("a nonblocking server");

    let config = VsockConfig { guest_cid: 3, listener: listener.into(), path: path.clone() };
    let mut device = Vsock::new(config).expect("a device");
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a guest");
    let mut driver = Driver::new(&mem);
    driver.offer_all();
    let [mut receive, mut transmit] = driver.queues();
    let mut sockets: Vec<UnixStream> = Vec::new();

    while let Some([step]) = take(&mut data) {
        if step_once(step, &mut data, &mem, &mut driver, &mut sockets, &path).is_none() {
            break;
        }
        if let Ok((accepted, _)) = server.accept() {
            accepted.set_nonblocking(true).expect("a nonblocking server");
            sockets.push(accepted);
        }
        device.handle_host();
        if device.transmit(&mem, &mut transmit).is_err() || device.fill(&mem, &mut receive).is_err() {
            break;
        }
    }
    for path in [path, served] {
        let _ = std::fs::remove_file(path);
    }
}

fn step_once(
    step: u8,
    data: &mut &[u8],
    mem: &GuestMemoryMmap,
    driver: &mut Driver<'_>,
    sockets: &mut Vec<UnixStream>,
    path: &Path,
) -> Option<()> {
    match step % 8 {
        // A packet whose header is on the wire as it is.
        0 | 1 => {
            let header = super::Header::from_bytes(&take(data)?);
            let [len] = take(data)?;
            driver.send_raw(header, &vec![step; usize::from(len) * 16]);
        }
        // A plausible packet: operation, ports out of few, flags.
        2 | 3 => {
            let [op, guest, host, flags, len] = take(data)?;
            let host = if host < 128 { u32::from(host) } else { (1 << 30) + u32::from(host - 128) };
            let header = super::Header {
                src_cid: 3,
                dst_cid: 2,
                src_port: guest.into(),
                dst_port: host,
                kind: 1,
                op: u16::from(op % 8),
                flags: flags.into(),
                buf_alloc: 1 << (flags % 24),
                ..super::Header::default()
            };
            driver.send(header, &vec![op; usize::from(len) * 256]);
        }
        // Any bytes anywhere in the rings or buffers.
        4 => {
            let [a, b, value] = take(data)?;
            mem.write_obj(value, GuestAddress(u64::from(u16::from_le_bytes([a, b])))).ok()?;
        }
        // A descriptor of the transmit queue.
        5 => {
            let [slot, flags, next] = take(data)?;
            let at = u64::from_le_bytes(take(data)?);
            let len = u32::from_le_bytes(take(data)?);
            let descriptor = virtio_queue::desc::split::Descriptor::new(at, len, flags.into(), next.into());
            driver.rings()[usize::from(flags >> 7)]
                .desc_table()
                .store(u16::from(slot) % SIZE, descriptor.into())
                .ok()?;
        }
        // A client, or what a client or server does.
        6 => {
            let [port] = take(data)?;
            let mut client = UnixStream::connect(path).ok()?;
            client.set_nonblocking(true).ok()?;
            client.write_all(format!("CONNECT {port}\n").as_bytes()).ok()?;
            sockets.push(client);
        }
        _ => {
            let [which, what] = take(data)?;
            if sockets.is_empty() {
                return Some(());
            }
            let which = usize::from(which) % sockets.len();
            let mut socket = &sockets[which];
            match what % 4 {
                0 => drop(socket.write(&[what; 5000])),
                1 => drop(socket.read(&mut [0; 5000])),
                2 => drop(socket.shutdown(std::net::Shutdown::Write)),
                _ => drop(sockets.swap_remove(which)),
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    /// Inputs that once mattered or show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_device_alive() {
        crate::virtio::driver::corpus("vsock", super::run);
    }
}
