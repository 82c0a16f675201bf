//! The host's side of the hybrid vsock: one unix socket that leads to every port of the guest.
//!
//! Connect, write `CONNECT <port>\n`, read `OK <port the guest sees>\n`; from then on the bytes are the guest's. A
//! connection that is closed instead of answered means that nobody listens on the port.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kata_api::ports;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer: `OK 4294967295`.
const ANSWER_MAX: usize = 13;

/// An open way to a port of the guest.
#[derive(Debug)]
pub(crate) struct HybridStream {
    pub(crate) stream: UnixStream,
    /// The port that the guest sees as the peer's.
    pub(crate) host_port: u32,
}

/// Why a port of the guest could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum HybridError {
    /// The socket itself cannot be connected to.
    #[error(
        "cannot connect to the pod's vsock device at {path}; see whether its process (kata-vmm vsock) runs",
        path = .path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody listens on this port.
    #[error("nobody in the guest listens on vsock port {port} ({use_of}); {NEXT}", use_of = use_of(*.port))]
    Refused {
        /// The port.
        port: u32,
    },
    /// The back end answered with something else.
    #[error(
        "the pod's vsock device answered {answer:?} to CONNECT {port}, which is no answer: see whether kata-vmm is the \
         installed one"
    )]
    Garbled {
        /// The port.
        port: u32,
        /// What it said.
        answer: String,
    },
    /// The connection broke during the handshake.
    #[error(
        "the connection to vsock port {port} of the guest ({use_of}) broke before it was made: the vsock device or the machine \
         ended; the owner's log tells which",
        use_of = use_of(*.port)
    )]
    Broken {
        /// The port.
        port: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer within the bound.
    #[error(
        "vsock port {port} of the guest ({use_of}) did not answer within {bound:?}: the guest hangs or is overloaded; {NEXT}",
        use_of = use_of(*.port)
    )]
    NoAnswer {
        /// The port.
        port: u32,
        /// The bound.
        bound: Duration,
    },
}

/// What to do about a guest that does not answer.
const NEXT: &str = "see its console (hypervisor.*.enable_debug shows more)";

/// What a port of the guest is for, in a user's words.
fn use_of(port: u32) -> &'static str {
    match port {
        ports::AGENT => "the agent",
        ports::LOG => "the agent's log",
        ports::STREAM => "standard streams",
        ports::FORWARD => "the guest's loopback",
        _ => "nothing of this runtime's",
    }
}

/// Connects to `port` of the guest behind the socket at `path`.
pub(crate) async fn connect(path: &Path, port: u32) -> Result<HybridStream, HybridError> {
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|source| HybridError::Connect { path: path.to_owned(), source })?;
    match handshake(&mut stream, port).await {
        Ok(answer) => match parse(&answer) {
            Some(host_port) => Ok(HybridStream { stream, host_port }),
            None if answer.is_empty() => Err(HybridError::Refused { port }),
            None => Err(HybridError::Garbled { port, answer }),
        },
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) => {
            Err(HybridError::Refused { port })
        }
        Err(source) => Err(HybridError::Broken { port, source }),
    }
}

/// Like [`connect`], at most for `bound`.
pub(crate) async fn connect_within(
    path: &Path,
    port: u32,
    bound: Duration,
) -> Result<HybridStream, HybridError> {
    tokio::time::timeout(bound, connect(path, port))
        .await
        .unwrap_or(Err(HybridError::NoAnswer { port, bound }))
}

/// The back end's line, without its end; empty if it closed the connection.
async fn handshake(stream: &mut UnixStream, port: u32) -> io::Result<String> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut line = String::new();
    // Byte by byte: what follows the line already belongs to the guest.
    while line.len() <= ANSWER_MAX {
        let mut byte = [0u8];
        if stream.read(&mut byte).await? == 0 || byte == *b"\n" {
            break;
        }
        line.push(char::from(byte[0]));
    }
    Ok(line)
}

fn parse(answer: &str) -> Option<u32> {
    answer.strip_prefix("OK ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    async fn answered_with(answer: &'static [u8]) -> Result<HybridStream, HybridError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hvsock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0u8; 13];
            stream.read_exact(&mut request).await.unwrap();
            assert_eq!(&request, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        });
        connect(&path, 1024).await
    }

    #[tokio::test]
    async fn bytes_after_the_answer_are_the_guests() {
        let mut open = answered_with(b"OK 1073741824\nhello").await.unwrap();
        assert_eq!(open.host_port, 1_073_741_824);
        let mut text = String::new();
        open.stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn closed_connection_is_refused() {
        assert!(matches!(answered_with(b"").await, Err(HybridError::Refused { port: 1024 })));
    }

    #[tokio::test]
    async fn other_answer_is_garbled() {
        let error = answered_with(b"HTTP/1.1 400 Bad Request\n").await.unwrap_err();
        assert!(
            matches!(&error, HybridError::Garbled { answer, .. } if answer.starts_with("HTTP/1.1")),
            "{error}"
        );
    }
}
