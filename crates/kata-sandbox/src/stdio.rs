//! The client's standard streams, carried to and from the guest byte for byte.
//!
//! ```text
//!   client ──FIFO──▶ stdin pump  ──▶ vsock stream (port 1027) ──▶ process     end: shutdown of the write side
//!   client ◀──FIFO── output pump ◀── vsock stream             ◀── process     end: end of file
//!                                    or, where the guest refuses 1027, WriteStdin / ReadStdout / ReadStderr calls
//! ```
//!
//! The conventions are those of containerd's shims:
//! - The client may open its ends before or after us. Output waits for the first reader; until then the process meets
//!   back-pressure, and nothing is lost.
//! - A reader that went away is not waited for: what comes while there is none is thrown away, so that the process is
//!   never stuck on a client that crashed. Whoever opens the FIFO later gets the output from then on. Under containerd it
//!   is the other way round ([`Stdio::lasting`]): it holds the FIFOs through its own restart, and no line of a log may be
//!   missing afterwards.
//! - The end of a FIFO's writer is not the end of the process's input: a client may detach and attach again. The input
//!   ends when the client says so ([`close_stdin`](crate::Sandbox::close_stdin), containerd's `CloseIO`), after all
//!   that is in the FIFO by then. A regular file ends where it ends.

mod client;
mod guest;
mod pump;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::ports;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::agent_client::{Agent, Output};
use crate::error::ErrorKind;
use crate::hybrid::{self, HybridError, HybridStream};
use crate::pod::{ProcessId, Stdio};

/// Bound on one connection to the guest. Its kernel answers that by itself: one that does not by then is stuck.
const CONNECT: Duration = Duration::from_secs(10);

/// Why standard streams could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The client's end cannot be opened.
    #[error("cannot open {path}", path = .path.display())]
    Client {
        /// The client's path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A URI of a kind that is not carried.
    #[error("{0:?} is not supported: a standard stream is a FIFO, a file or a file:// URI")]
    Scheme(String),
    /// The guest's end cannot be reached.
    #[error("cannot reach the guest's streams")]
    Guest(#[from] HybridError),
}

impl StdioError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Client { .. } => ErrorKind::InvalidArgument,
            Self::Scheme(_) => ErrorKind::Unimplemented,
            Self::Guest(_) => ErrorKind::Internal,
        }
    }
}

/// The ports that name a process's streams to the agent. Zero is no stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ports {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

/// Streams that are connected on the guest's side and carry nothing yet.
pub(crate) struct Connected {
    stdin: Option<(client::Source, Option<HybridStream>)>,
    stdout: Option<(client::Sink, Option<HybridStream>)>,
    stderr: Option<(client::Sink, Option<HybridStream>)>,
}

impl Connected {
    /// Opens the client's ends and one connection to the guest for each. A guest that does not know stream ports is
    /// served by calls instead.
    pub(crate) async fn open(hybrid: &Path, stdio: &Stdio) -> Result<Self, StdioError> {
        let stderr = stdio.stderr.as_deref().filter(|_| !stdio.terminal);
        Ok(Self {
            stdin: match stdio.stdin.as_deref() {
                Some(path) => Some((client::Source::open(path)?, connect(hybrid).await?)),
                None => None,
            },
            stdout: match stdio.stdout.as_deref() {
                Some(path) => Some((client::Sink::open(path, stdio.lasting)?, connect(hybrid).await?)),
                None => None,
            },
            stderr: match stderr {
                Some(path) => Some((client::Sink::open(path, stdio.lasting)?, connect(hybrid).await?)),
                None => None,
            },
        })
    }

    /// The ports to name in the request.
    pub(crate) fn ports(&self) -> Ports {
        fn port<T>(end: &Option<(T, Option<HybridStream>)>) -> u32 {
            end.as_ref().and_then(|(_, stream)| stream.as_ref()).map_or(0, |stream| stream.host_port)
        }
        Ports { stdin: port(&self.stdin), stdout: port(&self.stdout), stderr: port(&self.stderr) }
    }

    /// Begins to carry. `close` ends the input.
    pub(crate) fn carry(self, agent: &Agent, process: &ProcessId, close: Arc<Notify>) -> Streams {
        let (carrying, delivered) = watch::channel(());
        let output = |(sink, stream): (client::Sink, Option<HybridStream>), which: Output| {
            let source = guest::Source::new(stream, agent, process, which);
            let carrying = carrying.clone();
            tokio::spawn(async move {
                pump::output(source, sink).await;
                drop(carrying);
            })
        };
        Streams {
            stdin: self.stdin.map(|(source, stream)| {
                tokio::spawn(pump::input(source, guest::Sink::new(stream, agent, process), close))
            }),
            outputs: [(self.stdout, Output::Stdout), (self.stderr, Output::Stderr)]
                .into_iter()
                .filter_map(|(end, which)| end.map(|end| output(end, which)))
                .collect(),
            delivered: Some(delivered),
        }
    }
}

async fn connect(hybrid: &Path) -> Result<Option<HybridStream>, HybridError> {
    match hybrid::connect_within(hybrid, ports::STREAM, CONNECT).await {
        Ok(stream) => Ok(Some(stream)),
        Err(HybridError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A process's streams, carried by tasks. Dropping them cuts them.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    stdin: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    /// Closed once nothing carries output any more.
    delivered: Option<watch::Receiver<()>>,
}

impl Streams {
    /// Closed once the client has all output, or will not get more.
    pub(crate) fn delivered(&self) -> Option<watch::Receiver<()>> {
        self.delivered.clone()
    }

    /// Waits until the client has all output of a process that ended, at most for `bound`; whether it got it.
    pub(crate) async fn drain(mut self, bound: Duration) -> bool {
        let delivered = async {
            for output in &mut self.outputs {
                // A pump neither panics nor is cancelled by anybody but us.
                let _ = output.await;
            }
        };
        tokio::time::timeout(bound, delivered).await.is_ok()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for pump in self.stdin.iter().chain(&self.outputs) {
            pump.abort();
        }
    }
}
