//! A pod's management socket: one HTTP request, one answer, within a bound.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// Name of the socket in a pod's directory.
pub const MONITOR_SOCKET: &str = "shim-monitor.sock";
/// Longest answer that is taken.
const ANSWER_MAX: usize = 8 << 20;

/// Why there is no answer, or none that is good.
#[derive(Debug, thiserror::Error)]
pub enum ManagementError {
    /// Nobody listens.
    #[error("cannot reach the pod's owner at {}; see `kata-ctl list -a`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not speak HTTP, or broke off.
    #[error("the pod's owner does not answer {target}")]
    Http {
        /// What was asked.
        target: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long.
    #[error(
        "the pod's owner did not answer {target} within {bound:?}: it hangs, or the host is overloaded; `kata-ctl logs --source owner` tells more"
    )]
    Slow {
        /// What was asked.
        target: String,
        /// The bound.
        bound: Duration,
    },
    /// It said no. The text is the owner's own.
    #[error("{text}")]
    Refused {
        /// HTTP's code.
        status: u16,
        /// Its text.
        text: String,
    },
}

/// Asks the owner of the pod in `run_dir`; the body of its answer.
///
/// # Errors
/// [`ManagementError`].
pub async fn ask(
    run_dir: &Path,
    (method, target): (&str, &str),
    body: Vec<u8>,
    bound: Duration,
) -> Result<Bytes, ManagementError> {
    let slow = |_| ManagementError::Slow { target: target.to_owned(), bound };
    tokio::time::timeout(bound, exchange(run_dir, method, target, body)).await.map_err(slow)?
}

async fn exchange(
    run_dir: &Path,
    method: &str,
    target: &str,
    body: Vec<u8>,
) -> Result<Bytes, ManagementError> {
    fn failed<E>(target: &str) -> impl FnOnce(E) -> ManagementError
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |error| ManagementError::Http { target: target.to_owned(), source: error.into() }
    }
    let path = run_dir.join(MONITOR_SOCKET);
    let stream =
        UnixStream::connect(&path).await.map_err(|source| ManagementError::Connect { path, source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed(target))?;
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("Host", "localhost")
        .body(Full::new(Bytes::from(body)))
        .map_err(failed(target))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(failed(target))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(failed(target))?;
        Ok((status, body.to_bytes()))
    };
    // The connection ends with this; what is still to be read of it is part of the answer.
    let answered = tokio::select! {
        biased;
        answered = answer => answered,
        Err(error) = connection => Err(failed(target)(error)),
    };
    let (status, body) = answered?;
    if status.is_success() {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    Err(ManagementError::Refused { status: status.as_u16(), text })
}
