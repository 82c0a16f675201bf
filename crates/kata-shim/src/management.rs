//! `shim-monitor.sock`: what CSI drivers and monitors ask of a pod, over HTTP, at upstream's paths.
//!
//! | request | answer |
//! |---|---|
//! | `GET /agent-url` | how the agent is reached |
//! | `GET /metrics` | figures of owner, machine, virtiofsd, agent and guest, for Prometheus; see [`figures`] |
//! | `GET` and `PUT /iptables`, `/ip6tables` | the guest's packet filter, as `iptables-save` writes it |
//! | `POST /direct-volume/stats?path=…` | space and files of a volume: `{"usage": [{"available", "total", "used", "unit"}]}`, unit 1 is bytes, 2 is inodes |
//! | `POST /direct-volume/resize` | takes `{"volume_guest_path", "size"}`, in bytes |
//! | `PUT /policy` | takes the policy's text |
//!
//! What the guest cannot do is 501 with the agent's reason; before the guest runs it is 503. Root alone may connect, and
//! nobody who does holds the pod or its owner up: connections here are bounded and do not count as clients.

pub(crate) mod figures;

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kata_sandbox::{ErrorKind, Guest, Sandbox, SandboxError, VolumeStatsResponse};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::connections::accept;
use crate::fault::chain;
use crate::slot::Slot;

/// Longest body that is taken: what fits into one message to the agent.
const BODY_MAX: usize = 3 << 20;
/// Connections that are served at a time.
const CONNECTIONS: usize = 16;
/// How long a connection may last, whatever it does.
const CONNECTION_BOUND: Duration = Duration::from_secs(120);
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "there is no {0}; see /agent-url, /metrics, /iptables, /ip6tables, /direct-volume/stats, /direct-volume/resize, /policy"
    )]
    NoPath(String),
    #[error("{path} does not take {method}")]
    Method { method: Method, path: String },
    #[error("{0}")]
    Invalid(String),
    #[error("the body cannot be read: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("the pod has no container yet, so that nothing runs; try again later")]
    NoPod,
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::NoPath(_) => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Invalid(_) | Self::Body(_) => StatusCode::BAD_REQUEST,
            Self::NoPod => StatusCode::SERVICE_UNAVAILABLE,
            Self::Sandbox(error) => match error.kind() {
                ErrorKind::NotFound => StatusCode::NOT_FOUND,
                ErrorKind::InvalidArgument => StatusCode::BAD_REQUEST,
                ErrorKind::PermissionDenied => StatusCode::FORBIDDEN,
                ErrorKind::AlreadyExists | ErrorKind::FailedPrecondition => StatusCode::CONFLICT,
                ErrorKind::Unimplemented => StatusCode::NOT_IMPLEMENTED,
                ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
                ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            },
        }
    }
}

/// Serves the socket in `run_dir` as long as the runtime runs. A pod lives without it, too.
pub(crate) fn serve(run_dir: &Path, slot: Arc<Slot>) {
    let path = run_dir.join(crate::ground::MONITOR_SOCKET);
    match listen(&path) {
        Ok(listener) => drop(tokio::spawn(accept_all(listener, slot))),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "the pod is not monitored: its socket cannot be made");
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept_all(listener: UnixListener, slot: Arc<Slot>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // It is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        let (stream, slot) = (accept(&listener).await, slot.clone());
        tokio::spawn(async move {
            let _ = tokio::time::timeout(CONNECTION_BOUND, converse(stream, slot)).await;
            drop(place);
        });
    }
}

async fn converse(stream: UnixStream, slot: Arc<Slot>) {
    let service = service_fn(move |request| {
        let slot = slot.clone();
        async move { Ok::<_, Infallible>(respond(&slot, request).await) }
    });
    // A client that breaks off, or speaks something else, is its own affair.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn respond(slot: &Slot, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let (status, kind, body) = match answer(slot, request).await {
        Ok((kind, body)) => (StatusCode::OK, kind, body),
        Err(refusal) => {
            let text = chain(&refusal);
            tracing::debug!(%method, path, "{text}");
            (refusal.status(), TEXT, Bytes::from(text + "\n"))
        }
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

async fn answer(slot: &Slot, request: Request<Incoming>) -> Result<(&'static str, Bytes), Refusal> {
    let path = request.uri().path().to_owned();
    let ipv6 = path == "/ip6tables";
    match (request.method().as_str(), path.as_str()) {
        ("GET", "/agent-url") => Ok((TEXT, pod(slot)?.agent_url().into())),
        ("GET", "/metrics") => Ok((kata_api::metrics::CONTENT_TYPE, figures::text(slot.get()).await.into())),
        ("GET", "/iptables" | "/ip6tables") => Ok((TEXT, guest(slot)?.iptables(ipv6).await?.into())),
        ("PUT", "/iptables" | "/ip6tables") => {
            let guest = guest(slot)?;
            Ok((TEXT, guest.set_iptables(ipv6, body(request).await?.into()).await?.into()))
        }
        ("POST", "/direct-volume/stats") => {
            let volume = parameter(&request, "path")?;
            let stats = guest(slot)?.volume_stats(&volume).await?;
            Ok((JSON, volume_json(&stats)?.into()))
        }
        ("POST", "/direct-volume/resize") => {
            let guest = guest(slot)?;
            let resize: Resize = serde_json::from_slice(&body(request).await?)
                .map_err(|error| Refusal::Invalid(format!("the body is no request to resize: {error}")))?;
            guest.resize_volume(&resize.volume_guest_path, resize.size).await?;
            Ok((TEXT, Bytes::new()))
        }
        ("PUT", "/policy") => {
            let guest = guest(slot)?;
            let policy = String::from_utf8(body(request).await?.into())
                .map_err(|error| Refusal::Invalid(format!("the policy is no text: {error}")))?;
            guest.set_policy(policy).await?;
            Ok((TEXT, Bytes::new()))
        }
        (
            _,
            "/agent-url"
            | "/metrics"
            | "/iptables"
            | "/ip6tables"
            | "/direct-volume/stats"
            | "/direct-volume/resize"
            | "/policy",
        ) => Err(Refusal::Method { method: request.method().clone(), path }),
        _ => Err(Refusal::NoPath(path)),
    }
}

fn pod(slot: &Slot) -> Result<&Sandbox, Refusal> {
    slot.get().ok_or(Refusal::NoPod)
}

fn guest(slot: &Slot) -> Result<Guest, Refusal> {
    Ok(pod(slot)?.guest()?)
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Refusal> {
    let body = Limited::new(request.into_body(), BODY_MAX).collect().await;
    body.map(http_body_util::Collected::to_bytes).map_err(Refusal::Body)
}

fn parameter(request: &Request<Incoming>, name: &str) -> Result<String, Refusal> {
    let query = request.uri().query().unwrap_or_default();
    form_urlencoded::parse(query.as_bytes())
        .find(|(known, value)| known == name && !value.is_empty())
        .map(|(_, value)| value.into_owned())
        .ok_or_else(|| Refusal::Invalid(format!("the parameter {name} is missing")))
}

/// A volume's new size. The second names are those of upstream's first runtime.
#[derive(Deserialize)]
struct Resize {
    // stays: CSI drivers for that runtime send it
    #[serde(alias = "VolumePath")]
    volume_guest_path: String,
    /// In bytes.
    // stays: likewise
    #[serde(alias = "Size")]
    size: u64,
}

fn volume_json(stats: &VolumeStatsResponse) -> Result<Vec<u8>, Refusal> {
    #[derive(Serialize)]
    struct Volume<'a> {
        usage: Vec<Usage>,
        #[serde(skip_serializing_if = "Option::is_none")]
        volume_condition: Option<Condition<'a>>,
    }
    #[derive(Serialize)]
    struct Usage {
        available: u64,
        total: u64,
        used: u64,
        unit: i32,
    }
    #[derive(Serialize)]
    struct Condition<'a> {
        abnormal: bool,
        message: &'a str,
    }
    let usage = stats.usage.iter().map(|usage| Usage {
        available: usage.available,
        total: usage.total,
        used: usage.used,
        unit: usage.unit.value(),
    });
    let condition = stats.volume_condition.as_ref();
    let volume = Volume {
        usage: usage.collect(),
        volume_condition: condition.map(|it| Condition { abnormal: it.abnormal, message: &it.message }),
    };
    serde_json::to_vec(&volume).map_err(|error| Refusal::Invalid(error.to_string()))
}

#[cfg(test)]
mod tests;
