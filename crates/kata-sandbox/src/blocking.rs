//! Work that blocks, off the pod's one thread; on it where the host has no thread left.
//!
//! A runtime's own pool panics then, and the owner would die of what it should report.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

/// Does `work` on a thread of its own, or here and now where none can be started. `None` only where it panicked.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    on(std::thread::Builder::new().name("blocking".to_owned()), work).await
}

async fn on<T: Send + 'static>(
    thread: std::thread::Builder,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (answer, answered) = oneshot::channel();
    // A thread that does not start keeps what it was given.
    let slot = Arc::new(Mutex::new(Some(work)));
    let theirs = slot.clone();
    let take = |slot: &Mutex<Option<_>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let started = thread.spawn(move || {
        if let Some(work) = take(&theirs) {
            // Whoever asked may have gone.
            let _ = answer.send(work());
        }
    });
    match started {
        Ok(_) => answered.await.ok(),
        Err(error) => {
            tracing::warn!(%error, "the host has no thread left: the pod's own has to do");
            take(&slot).map(|work| work())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_whether_a_thread_can_be_started_or_not() {
        let name = || std::thread::current().name().map(str::to_owned);
        assert_eq!(blocking(name).await, Some(Some("blocking".to_owned())));
        // No address space has room for such a stack.
        let impossible = std::thread::Builder::new().stack_size(1 << 60);
        assert_eq!(on(impossible, || 7).await, Some(7));
    }
}
