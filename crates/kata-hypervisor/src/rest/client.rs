//! A client of an HTTP interface on a unix socket. Each request has a connection of its own, so a caller that gives up half way
//! leaves nothing behind that a later answer could be mistaken for.

use std::fmt;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// Longest answer that is read, in bytes. The description of a machine has some ten KiB.
const ANSWER_LIMIT: usize = 1 << 20;
/// How much of an answer that says no is repeated, in characters.
const SAID_LIMIT: usize = 600;
/// Most descriptors that go with one request: the queues of a network interface. Linux takes 253 in one message.
const FD_LIMIT: usize = 253;

/// What can go wrong on a VMM's programming interface. `request` is the method and the path.
#[derive(Debug, Error)]
pub enum ApiError {
    /// There is no connection, or it broke.
    #[error("{vmm} cannot be reached for {request}")]
    Lost {
        /// The VMM's name.
        vmm: &'static str,
        /// What was asked.
        request: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There was no answer in time.
    #[error("{vmm} did not answer {request} within {bound:?}; the host may be overloaded, or the VMM hangs")]
    Timeout {
        /// The VMM's name.
        vmm: &'static str,
        /// What was asked.
        request: String,
        /// The bound that has passed.
        bound: Duration,
    },
    /// The VMM said no.
    #[error("{vmm} refused {request} with status {status}: {said}")]
    Refused {
        /// The VMM's name.
        vmm: &'static str,
        /// What was asked.
        request: String,
        /// HTTP's status code.
        status: u16,
        /// Its explanation.
        said: String,
    },
    /// The answer makes no sense.
    #[error(
        "{vmm} answered {request} with something else than its published interface says; is this another version?"
    )]
    Answer {
        /// The VMM's name.
        vmm: &'static str,
        /// What was asked.
        request: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// Where a VMM listens.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    /// A socket that has a path.
    Path(PathBuf),
    /// A socket whose path is gone, opened with `O_PATH`.
    Inode(Arc<OwnedFd>),
}

impl Address {
    async fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Self::Path(path) => UnixStream::connect(path).await,
            Self::Inode(fd) => UnixStream::connect(format!("/proc/self/fd/{}", fd.as_raw_fd())).await,
        }
    }
}

/// One VMM's interface. Clones speak to the same one.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    vmm: &'static str,
    address: Address,
    /// Makes a text of an answer that says no.
    explain: fn(&[u8]) -> Option<String>,
}

/// One request: its method, its path, and how long its answer may take.
#[derive(Clone, Debug)]
pub(crate) struct Call<'a> {
    pub method: Method,
    pub path: &'a str,
    pub bound: Duration,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

impl Client {
    /// `explain` is given the body of a refusal; where it makes nothing of it, the body is taken as text.
    pub(crate) fn new(vmm: &'static str, address: Address, explain: fn(&[u8]) -> Option<String>) -> Self {
        Self { vmm, address, explain }
    }

    /// Sends a request without a body and reads the answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, call: Call<'_>) -> Result<T, ApiError> {
        let (_, answer) = self.send(&call, Bytes::new(), Vec::new()).await?;
        self.read(&call, &answer)
    }

    /// Sends a request with a body, whose answer is that it is done.
    pub(crate) async fn tell(&self, call: Call<'_>, body: &impl Serialize) -> Result<(), ApiError> {
        let body = self.write(&call, body)?;
        self.send(&call, body, Vec::new()).await.map(drop)
    }

    /// Sends a request without a body, whose answer is that it is done.
    pub(crate) async fn order(&self, call: Call<'_>) -> Result<(), ApiError> {
        self.send(&call, Bytes::new(), Vec::new()).await.map(drop)
    }

    /// Sends a request with descriptors along, and reads the answer, if there is one.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        call: Call<'_>,
        body: &impl Serialize,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<T>, ApiError> {
        let body = self.write(&call, body)?;
        match self.send(&call, body, fds).await? {
            (StatusCode::NO_CONTENT, _) => Ok(None),
            (_, answer) => self.read(&call, &answer).map(Some),
        }
    }

    fn write(&self, call: &Call<'_>, body: &impl Serialize) -> Result<Bytes, ApiError> {
        let body = serde_json::to_vec(body).map_err(|error| self.lost(call, io::Error::other(error)))?;
        Ok(body.into())
    }

    fn read<T: DeserializeOwned>(&self, call: &Call<'_>, answer: &[u8]) -> Result<T, ApiError> {
        serde_json::from_slice(answer).map_err(|source| ApiError::Answer {
            vmm: self.vmm,
            request: call.to_string(),
            source,
        })
    }

    fn lost(&self, call: &Call<'_>, source: io::Error) -> ApiError {
        ApiError::Lost { vmm: self.vmm, request: call.to_string(), source }
    }

    async fn send(
        &self,
        call: &Call<'_>,
        body: Bytes,
        fds: Vec<OwnedFd>,
    ) -> Result<(StatusCode, Bytes), ApiError> {
        let vmm = self.vmm;
        let exchanged = tokio::time::timeout(call.bound, self.exchange(call, body, fds)).await;
        let (status, answer) = match exchanged {
            Ok(exchanged) => exchanged.map_err(|source| self.lost(call, source))?,
            Err(_) => {
                return Err(ApiError::Timeout { vmm, request: call.to_string(), bound: call.bound });
            }
        };
        if status.is_success() {
            return Ok((status, answer));
        }
        let said = (self.explain)(&answer).unwrap_or_else(|| crate::process::printable(&answer));
        let said = match said.trim() {
            "" => "it does not say why".to_owned(),
            said => said.chars().take(SAID_LIMIT).collect(),
        };
        Err(ApiError::Refused { vmm, request: call.to_string(), status: status.as_u16(), said })
    }

    async fn exchange(
        &self,
        call: &Call<'_>,
        body: Bytes,
        fds: Vec<OwnedFd>,
    ) -> io::Result<(StatusCode, Bytes)> {
        if fds.len() > FD_LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors"));
        }
        let stream = Stream { socket: self.address.connect().await?, fds };
        let mut request = Request::builder()
            .method(&call.method)
            .uri(call.path)
            .header("Host", "localhost")
            .header("Accept", "application/json");
        if !body.is_empty() {
            request = request.header("Content-Type", "application/json");
        }
        let request = request.body(Full::new(body)).map_err(io::Error::other)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(io::Error::other)?;
            let status = response.status();
            let body =
                Limited::new(response.into_body(), ANSWER_LIMIT).collect().await.map_err(io::Error::other)?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(exchange);
        tokio::select! {
            biased;
            done = &mut exchange => done,
            // All there is was read by then.
            _ = connection => exchange.await,
        }
    }
}

/// A connection whose first bytes have file descriptors with them.
struct Stream {
    socket: UnixStream,
    /// Those that are still to be sent.
    fds: Vec<OwnedFd>,
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.fds.is_empty() {
            return Pin::new(&mut self.socket).poll_write(cx, bytes);
        }
        loop {
            std::task::ready!(self.socket.poll_write_ready(cx))?;
            let Self { socket, fds } = &*self;
            match socket.try_io(Interest::WRITABLE, || send_with(socket, bytes, fds)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => {
                    self.fds.clear();
                    return Poll::Ready(sent);
                }
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

fn send_with(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FD_LIMIT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("there is no room for the file descriptors"));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}
