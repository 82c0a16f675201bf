//! The guest's ends of a process's streams: a vsock stream each, or calls to the agent.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::agent_client::{Agent, Output};
use crate::hybrid::HybridStream;
use crate::pod::ProcessId;

/// Where a process's output comes from.
pub(super) enum Source {
    Stream(UnixStream),
    Calls { agent: Agent, process: ProcessId, which: Output },
}

impl Source {
    pub(super) fn new(
        stream: Option<HybridStream>,
        agent: &Agent,
        process: &ProcessId,
        which: Output,
    ) -> Self {
        match stream {
            Some(open) => Self::Stream(open.stream),
            None => Self::Calls { agent: agent.clone(), process: process.clone(), which },
        }
    }

    /// Reads some output; zero bytes are its end.
    pub(super) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.read(buffer).await,
            Self::Calls { agent, process, which } => {
                let len = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
                match agent.read(process, *which, len).await {
                    Ok(data) => {
                        let taken = data.len().min(buffer.len());
                        if let (Some(to), Some(from)) = (buffer.get_mut(..taken), data.get(..taken)) {
                            to.copy_from_slice(from);
                        }
                        Ok(taken)
                    }
                    // These calls have no other way to tell the end than to fail.
                    Err(error) => {
                        tracing::debug!(%process, stream = ?which, %error, "output ended");
                        Ok(0)
                    }
                }
            }
        }
    }
}

/// Where a process's input goes to.
pub(super) enum Sink {
    Stream(UnixStream),
    Calls { agent: Agent, process: ProcessId },
}

impl Sink {
    pub(super) fn new(stream: Option<HybridStream>, agent: &Agent, process: &ProcessId) -> Self {
        match stream {
            Some(open) => Self::Stream(open.stream),
            None => Self::Calls { agent: agent.clone(), process: process.clone() },
        }
    }

    pub(super) async fn write(&mut self, mut data: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.write_all(data).await,
            Self::Calls { agent, process } => {
                while !data.is_empty() {
                    let taken = agent.write_stdin(process, data).await.map_err(io::Error::other)?;
                    if taken == 0 {
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    data = data.get(taken..).unwrap_or_default();
                }
                Ok(())
            }
        }
    }

    /// Ends the input: the process reads the end of file after what was written.
    pub(super) async fn close(mut self) -> io::Result<()> {
        match &mut self {
            Self::Stream(stream) => stream.shutdown().await,
            Self::Calls { agent, process } => agent.close_stdin(process).await.map_err(io::Error::other),
        }
    }
}
