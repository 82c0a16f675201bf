//! What sees the bytes of a download go by: a limit, an interrupt, a progress bar.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::io::AsyncWrite;

use crate::image::Interrupt;

/// The bars of one pull, on the standard error output.
pub struct Bars(MultiProgress);

impl Bars {
    /// Bars that can be seen, or not.
    pub fn new(visible: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self(MultiProgress::with_draw_target(target))
    }

    /// A bar for the layer whose digest begins with `hex`.
    pub fn add(&self, hex: &str, size: u64) -> ProgressBar {
        let bar = self.0.add(ProgressBar::new(size));
        if let Ok(style) = ProgressStyle::with_template("{prefix} {wide_bar} {bytes:>10}/{total_bytes:<10}") {
            bar.set_style(style);
        }
        bar.set_prefix(hex.chars().take(12).collect::<String>());
        bar
    }

    /// Takes all bars off the terminal.
    pub fn clear(&self) {
        // Only the look of a terminal is at stake.
        let _ = self.0.clear();
    }
}

/// Passes bytes on to `to`, no more than a limit of them.
pub struct Sink<W> {
    to: W,
    left: u64,
    watch: Option<(ProgressBar, Interrupt)>,
}

impl<W> Sink<W> {
    pub fn new(to: W, limit: u64, watch: Option<(ProgressBar, Interrupt)>) -> Self {
        Self { to, left: limit, watch }
    }

    pub fn into_inner(self) -> W {
        self.to
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Sink<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        if self.watch.as_ref().is_some_and(|(_, interrupt)| interrupt.is_set()) {
            return Poll::Ready(Err(io::Error::other("interrupted")));
        }
        if buffer.len() as u64 > self.left {
            return Poll::Ready(Err(io::Error::other("more bytes than the manifest says")));
        }
        let written = std::task::ready!(Pin::new(&mut self.to).poll_write(cx, buffer))?;
        self.left -= written as u64;
        if let Some((bar, _)) = &self.watch {
            bar.inc(written as u64);
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
