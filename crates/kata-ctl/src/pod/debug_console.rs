//! The guest's debug console: a shell in the guest itself, on a vsock port.
//!
//! The host's side of a pod's vsock is a unix socket: `CONNECT <port>`, answered `OK <port>`, and from then on the bytes
//! are the guest's (docs/parts.md). It is the only thing beside the owner's socket that this program reaches a pod by: the
//! owner carries none of it, so a shell is to be had where the owner is what one looks into.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kata_api::ports;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::PodDir;

/// Bound on the answer to `CONNECT`. A guest that is emulated, and busy, takes its time.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest answer: `OK 4294967295`.
const ANSWER_MAX: usize = 13;

/// No shell.
#[derive(Debug, thiserror::Error)]
pub enum DebugConsoleError {
    /// The pod was made without.
    #[error(
        "pod {0} has no debug console: set agent.kata.debug_console_enabled = true (kata-ctl run --set \
         agent.kata.debug_console_enabled=true) and start it anew"
    )]
    Off(String),
    /// Nobody listens.
    #[error("pod {0} was to have a debug console, but its guest image has no shell (/bin/bash or /bin/sh)")]
    NoShell(String),
    /// The socket cannot be used.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest does not answer.
    #[error("the guest of pod {0} does not answer within {bound:?}: see `kata-ctl console`", bound = ANSWER)]
    NoAnswer(String),
}

/// A connection to a shell on a terminal of the guest.
pub struct DebugConsole(pub UnixStream);

impl DebugConsole {
    /// Connects to the shell of `pod`; `enabled` is what the owner says of it.
    ///
    /// # Errors
    /// [`DebugConsoleError`].
    pub async fn connect(pod: &PodDir, enabled: bool) -> Result<Self, DebugConsoleError> {
        if !enabled {
            return Err(DebugConsoleError::Off(pod.name.clone()));
        }
        let path = pod.hybrid();
        let connect = |source| DebugConsoleError::Connect { path: path.clone(), source };
        let mut stream = UnixStream::connect(&path).await.map_err(connect)?;
        match tokio::time::timeout(ANSWER, handshake(&mut stream)).await {
            Ok(Ok(answer)) if answer.starts_with("OK ") => Ok(Self(stream)),
            Ok(Ok(_)) => Err(DebugConsoleError::NoShell(pod.name.clone())),
            Ok(Err(source)) => Err(connect(source)),
            Err(_) => Err(DebugConsoleError::NoAnswer(pod.name.clone())),
        }
    }
}

/// The answer, without its end; empty where the port is refused.
async fn handshake(stream: &mut UnixStream) -> io::Result<String> {
    stream.write_all(format!("CONNECT {}\n", ports::DEBUG_CONSOLE).as_bytes()).await?;
    let mut line = String::new();
    // Byte by byte: what follows the line already belongs to the guest.
    while line.len() <= ANSWER_MAX {
        let mut byte = [0_u8];
        match stream.read(&mut byte).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            read => match (read?, byte) {
                (0, _) | (_, [b'\n']) => break,
                (_, [byte]) => line.push(char::from(byte)),
            },
        }
    }
    Ok(line)
}
