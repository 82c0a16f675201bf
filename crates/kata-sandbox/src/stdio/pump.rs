//! The loops that carry a process's streams.

use std::io;
use std::sync::Arc;

use tokio::sync::Notify;

use super::{client, guest};

/// Twice what a FIFO holds: one system call fills it, the next is ready. Untouched pages of it cost nothing.
const BUFFER: usize = 128 * 1024;

/// Carries a process's output until its end.
pub(super) async fn output(mut source: guest::Source, mut sink: client::Sink) {
    let mut buffer = vec![0; BUFFER];
    // Nothing is taken from the process before somebody can get it.
    sink.ready().await;
    let mut broken = false;
    loop {
        let data = match source.read(&mut buffer).await {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "a process's output broke off");
                return;
            }
        };
        if broken {
            continue;
        }
        if let Err(error) = sink.write(data).await {
            // The process goes on, so its output must go on to be taken.
            tracing::warn!(%error, "a process's output cannot be written; the rest of it is dropped");
            broken = true;
        }
    }
}

/// Carries a process's input until `close` is notified, or the process reads no more.
pub(super) async fn input(mut source: client::Source, mut sink: guest::Sink, close: Arc<Notify>) {
    match carry_input(&mut source, &mut sink, &close).await {
        Ok(()) => {}
        Err(error) => tracing::debug!(%error, "a process's input ended early"),
    }
    if let Err(error) = sink.close().await {
        tracing::debug!(%error, "a process's input was closed already");
    }
}

async fn carry_input(source: &mut client::Source, sink: &mut guest::Sink, close: &Notify) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = tokio::select! {
            count = source.read(&mut buffer) => count?,
            () = close.notified() => break,
        };
        if count == 0 {
            return Ok(());
        }
        sink.write(buffer.get(..count).unwrap_or_default()).await?;
    }
    loop {
        let count = source.read_rest(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        sink.write(buffer.get(..count).unwrap_or_default()).await?;
    }
}
