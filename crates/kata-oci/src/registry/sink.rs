//! What sees the bytes of a download go by: a limit, an interrupt, whoever shows the progress.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

use crate::{Advance, Interrupt};

/// Passes bytes on to `to`, no more than a limit of them.
pub struct Sink<W> {
    to: W,
    left: u64,
    interrupt: Interrupt,
    advance: Option<Box<dyn Advance>>,
}

impl<W> Sink<W> {
    pub fn new(to: W, limit: u64, interrupt: Interrupt, advance: Option<Box<dyn Advance>>) -> Self {
        Self { to, left: limit, interrupt, advance }
    }

    pub fn into_inner(self) -> W {
        self.to
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Sink<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        if self.interrupt.is_set() {
            return Poll::Ready(Err(io::Error::other("interrupted")));
        }
        if buffer.len() as u64 > self.left {
            return Poll::Ready(Err(io::Error::other("more bytes than the manifest says")));
        }
        let written = std::task::ready!(Pin::new(&mut self.to).poll_write(cx, buffer))?;
        self.left -= written as u64;
        if let Some(advance) = &self.advance {
            advance.by(written as u64);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_shutdown(cx)
    }
}
