//! Accepts clients and knows how many there are, so that the process can leave as soon as nobody listens any more.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// Rest after a failed accept: out of descriptors, it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener for ttrpc, and the number of its connections that are open.
pub(crate) fn counted(listener: UnixListener) -> (Listener, watch::Receiver<usize>) {
    let (count, open) = watch::channel(0);
    let accept = |(listener, count): (UnixListener, watch::Sender<usize>)| async move {
        let stream = accept(&listener).await;
        count.send_modify(|open| *open += 1);
        let counted = Counted { stream, count: count.clone() };
        Some((io::Result::Ok(counted), (listener, count)))
    };
    (Listener::new(futures_util::stream::unfold((listener, count), accept)), open)
}

/// The next client.
pub(crate) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection that is counted while it lives.
struct Counted {
    stream: UnixStream,
    count: watch::Sender<usize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.send_modify(|open| *open = open.saturating_sub(1));
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
