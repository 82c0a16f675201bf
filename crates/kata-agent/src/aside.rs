//! Work that may wait in the kernel, beside the one thread that serves everybody.
//!
//! A thread that waits there cannot be ended. What is waited for may well come, so the work goes on; but whoever asked for it is
//! told by name what takes so long, before the host stops listening.

use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How long the kernel may take for what it mostly does at once. Hosts wait for twenty seconds and more.
pub const BOUND: Duration = Duration::from_secs(15);

/// Work of which nothing came back.
#[derive(Debug, thiserror::Error)]
pub enum AsideError {
    /// It took longer than its bound.
    #[error(
        "{what} has not come to an end within {bound:?}: the guest's kernel waits for a device or for the host; the guest's \
         console may say which"
    )]
    Overdue {
        /// What was tried.
        what: String,
        /// How long it was waited for.
        bound: Duration,
    },
    /// The agent is ending.
    #[error("{what} was interrupted: the agent is ending")]
    Interrupted {
        /// What was tried.
        what: String,
    },
}

/// Does `work`, which is called `what`, for as long as it takes.
///
/// # Errors
/// [`AsideError::Interrupted`].
pub async fn run<T: Send + 'static>(
    what: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AsideError> {
    spawn_blocking(work).await.map_err(|_| AsideError::Interrupted { what: what.into() })
}

/// Does `work` to its end, also where whoever asked for it gives up: no half of it is left.
///
/// # Errors
/// [`AsideError::Interrupted`].
pub async fn whole<T: Send + 'static>(
    what: impl Into<String>,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, AsideError> {
    tokio::spawn(work).await.map_err(|_| AsideError::Interrupted { what: what.into() })
}

/// As [`run`], and waits no longer than `bound`. The work goes on all the same.
///
/// # Errors
/// [`AsideError`].
pub async fn within<T: Send + 'static>(
    bound: Duration,
    what: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AsideError> {
    match timeout(bound, spawn_blocking(work)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(_)) => Err(AsideError::Interrupted { what: what.into() }),
        Err(_) => Err(AsideError::Overdue { what: what.into(), bound }),
    }
}
