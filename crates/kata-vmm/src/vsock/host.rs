//! The host's side of the device: a unix socket that speaks the hybrid-vsock handshake, and the sockets beside it.
//!
//! A client that wants guest port P connects, writes `CONNECT P\n` and reads `OK <port>\n` once the guest has accepted;
//! a connection that is closed without an answer was refused. A guest that connects to host port P reaches the socket
//! at `<path>_<P>`.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, recv,
    socket_with,
};

/// Longest line a client may send: `CONNECT ` with ten digits and some slack for blanks and a carriage return.
const MAX_LINE: usize = 32;

/// Longest path that a unix socket address holds.
const MAX_SOCKET_PATH: usize = 107;

const SOCKET_FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// The listening socket and the path it is bound to.
pub struct Host {
    listener: OwnedFd,
    path: PathBuf,
}

/// How far a client came with its request.
pub enum Request {
    /// It wants this guest port.
    Port(u32),
    /// It has not written its whole line yet.
    Incomplete,
    /// It closed, or wrote something else.
    Invalid,
}

impl Host {
    /// `None` if the sockets beside `path` would have names too long for a socket address.
    pub fn new(listener: OwnedFd, path: &Path) -> Option<Host> {
        let longest = path.as_os_str().len() + "_4294967295".len();
        (longest <= MAX_SOCKET_PATH).then(|| Host { listener, path: path.to_owned() })
    }

    /// The listening socket.
    pub fn listener(&self) -> &OwnedFd {
        &self.listener
    }

    /// The next waiting client; `None` if there is none.
    pub fn accept(&self) -> rustix::io::Result<Option<UnixStream>> {
        loop {
            match accept_with(&self.listener, SOCKET_FLAGS) {
                Ok(client) => return Ok(Some(client.into())),
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Connects to the socket that serves `port`.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(Path::new(&path))?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SOCKET_FLAGS, None)?;
        // A unix socket connects at once or not at all: it never stays "in progress".
        connect(&socket, &address)?;
        Ok(socket.into())
    }
}

/// Takes a client's request off its socket; bytes after the line stay there.
pub fn read_request(client: &UnixStream) -> Request {
    let mut buffer = [0; MAX_LINE];
    let peeked = match recv(client, &mut buffer, RecvFlags::PEEK) {
        Ok((n, _)) => n,
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Request::Incomplete,
        Err(_) => return Request::Invalid,
    };
    let bytes = buffer.get(..peeked).unwrap_or_default();
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        return if peeked == 0 || peeked == MAX_LINE { Request::Invalid } else { Request::Incomplete };
    };
    let (line, _) = bytes.split_at(end);
    let port =
        std::str::from_utf8(line).ok().and_then(|line| line.strip_prefix("CONNECT ")?.trim().parse().ok());
    let Some(port) = port else { return Request::Invalid };
    let mut line = [0; MAX_LINE];
    match recv(client, line.get_mut(..=end).unwrap_or_default(), RecvFlags::empty()) {
        Ok((n, _)) if n == end + 1 => Request::Port(port),
        _ => Request::Invalid,
    }
}

/// Empties a socket that is about to be closed, within a bound: closed unread, it would turn the end that its peer is
/// going to read into an error.
pub fn discard_unread(mut socket: &UnixStream) {
    let mut scratch = [0; 4096];
    for _ in 0..64 {
        match socket.read(&mut scratch) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}
