//! Spans for a collector, as OTLP over HTTP with JSON: the stages of a pod's start, and the calls of its clients after that.
//!
//! ```text
//!   start pod ─┬─ host ────── owner, hooks, network, …        service kata-shim
//!              ├─ vmm ─────── start, firmware                 service kata-vmm
//!              ├─ kernel ──── boot                            service kata-agent
//!              ├─ agent ───── what the agent reports          service kata-agent
//!              └─ container ─ create, start                   service kata-shim
//!   Start, Exec, Kill, …  below the caller's span where it names one (`traceparent`)
//! ```
//!
//! Off, it costs one look at a flag for each call: no task, no thread, no memory. On, one task sends what has come together
//! each second. A collector that is slow or gone loses spans, and nothing else.

use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use kata_config::OtlpEndpoint;
use kata_sandbox::{Inspection, Layer, Stage};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::fault::chain;

/// Spans that may wait to be sent; beyond that they are dropped.
const WAITING: usize = 1024;
/// How long spans are gathered.
const GATHER: Duration = Duration::from_secs(1);
/// Bound on one delivery.
const DELIVERY: Duration = Duration::from_secs(5);
/// OTLP's numbers for kinds of spans, and for the state of one that failed.
const INTERNAL: u8 = 1;
const SERVER: u8 = 2;
const FAILED: u8 = 2;

static TRACER: OnceLock<Tracer> = OnceLock::new();

/// Why a batch was not delivered.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error("cannot connect to {authority}")]
    Connect { authority: String, source: std::io::Error },
    #[error("it broke off")]
    Http(#[from] hyper::Error),
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
    #[error("it answered {0}")]
    Refused(hyper::StatusCode),
    #[error("it did not answer within {DELIVERY:?}")]
    Slow,
}

/// One span, of one service.
#[derive(Clone, Debug)]
struct Span {
    service: &'static str,
    trace: [u8; 16],
    id: [u8; 8],
    parent: Option<[u8; 8]>,
    name: String,
    kind: u8,
    from: SystemTime,
    length: Duration,
    failed: bool,
}

/// Takes the spans of this process, which owns one pod.
#[derive(Debug)]
pub(crate) struct Tracer {
    queue: mpsc::Sender<Vec<Span>>,
}

/// Has spans of the pod named `pod` sent to `endpoint`, from the network namespace `from` where that is not this process's.
/// Once for a process.
pub(crate) fn begin(pod: &str, endpoint: &OtlpEndpoint, from: Option<Arc<OwnedFd>>) {
    let (queue, spans) = mpsc::channel(WAITING);
    if TRACER.set(Tracer { queue }).is_ok() {
        tracing::info!(%endpoint, "spans are sent");
        tokio::spawn(send_all(spans, Collector { endpoint: endpoint.clone(), from, pod: pod.to_owned() }));
    }
}

/// The tracer, where one was asked for.
pub(crate) fn tracer() -> Option<&'static Tracer> {
    TRACER.get()
}

impl Tracer {
    /// Tells of a call that a client made. `parent` is the caller's `traceparent`.
    pub(crate) fn call(&self, name: &str, parent: Option<&str>, start: Instant, failed: bool) {
        let context = parent.and_then(traceparent);
        let (trace, parent) = context.map_or_else(|| (random(), None), |(trace, span)| (trace, Some(span)));
        let length = start.elapsed();
        let name = format!("containerd.task/{name}");
        let from = SystemTime::now().checked_sub(length).unwrap_or(UNIX_EPOCH);
        let id = random();
        self.send(vec![Span {
            service: "kata-shim",
            trace,
            id,
            parent,
            name,
            kind: SERVER,
            from,
            length,
            failed,
        }]);
    }

    /// Tells of a start. `zero` is that of the timeline.
    pub(crate) fn start(&self, pod: &Inspection, zero: Instant) {
        let from = SystemTime::now().checked_sub(zero.elapsed()).unwrap_or(UNIX_EPOCH);
        self.send(of_start(&pod.timeline, from, pod.fault.is_some()));
    }

    fn send(&self, spans: Vec<Span>) {
        // Spans that there is no room for are the price of a collector that is slow.
        let _ = self.queue.try_send(spans);
    }
}

fn of_start(timeline: &[Stage], zero: SystemTime, failed: bool) -> Vec<Span> {
    let trace = random();
    let end = |stage: &Stage| stage.start_us.saturating_add(stage.duration_us);
    let span = |service, parent, name: &str, start_us: u64, end_us: u64| Span {
        service,
        trace,
        id: random(),
        parent,
        name: name.to_owned(),
        kind: INTERNAL,
        from: zero.checked_add(Duration::from_micros(start_us)).unwrap_or(zero),
        length: Duration::from_micros(end_us.saturating_sub(start_us)),
        failed: false,
    };
    let all = timeline.iter().map(end).max().unwrap_or_default();
    let root = Span { failed, ..span("kata-shim", None, "start pod", 0, all) };
    let mut spans = Vec::with_capacity(timeline.len() + 6);
    for layer in [Layer::Host, Layer::Vmm, Layer::Kernel, Layer::Agent, Layer::Container] {
        let stages = || timeline.iter().filter(|stage| stage.layer == layer);
        let Some(from) = stages().map(|stage| stage.start_us).min() else { continue };
        let service = service(layer);
        let whole =
            span(service, Some(root.id), layer.as_str(), from, stages().map(end).max().unwrap_or(from));
        let parent = Some(whole.id);
        spans.push(whole);
        spans.extend(stages().map(|stage| span(service, parent, &stage.name, stage.start_us, end(stage))));
    }
    spans.insert(0, root);
    spans
}

fn service(layer: Layer) -> &'static str {
    match layer {
        Layer::Host | Layer::Container => "kata-shim",
        Layer::Vmm => "kata-vmm",
        Layer::Kernel | Layer::Agent => "kata-agent",
    }
}

/// Ids need not be secret, only different.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes
}

/// The trace and span of `00-<32 digits>-<16 digits>-<2 digits>` (W3C Trace Context).
fn traceparent(text: &str) -> Option<([u8; 16], [u8; 8])> {
    let mut parts = text.split('-');
    let version = parts.next()?;
    let (trace, span) = (hex(parts.next()?)?, hex(parts.next()?)?);
    (version.len() == 2 && version != "ff" && trace != [0; 16] && span != [0; 8]).then_some((trace, span))
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (position, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * position..2 * position + 2)?, 16).ok()?;
    }
    Some(bytes)
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where spans go.
struct Collector {
    endpoint: OtlpEndpoint,
    from: Option<Arc<OwnedFd>>,
    pod: String,
}

async fn send_all(mut queue: mpsc::Receiver<Vec<Span>>, collector: Collector) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    while let Some(mut spans) = queue.recv().await {
        tokio::time::sleep(GATHER).await;
        while let Ok(more) = queue.try_recv() {
            spans.extend(more);
        }
        let delivered = tokio::time::timeout(DELIVERY, collector.deliver(&spans)).await;
        if let Err(error) = delivered.unwrap_or(Err(DeliveryError::Slow)) {
            let (count, endpoint) = (spans.len(), &collector.endpoint);
            // Once aloud: a collector that is away stays so for a while.
            if TOLD.swap(true, Ordering::Relaxed) {
                tracing::debug!(count, %endpoint, error = chain(&error), "spans are lost");
            } else {
                tracing::warn!(count, %endpoint, error = chain(&error), "spans are lost");
            }
        }
    }
}

impl Collector {
    async fn deliver(&self, spans: &[Span]) -> Result<(), DeliveryError> {
        let authority = self.endpoint.authority();
        let connect = |source| DeliveryError::Connect { authority: authority.clone(), source };
        let stream = connected(authority.clone(), self.from.clone()).await.map_err(connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let body = serde_json::to_vec(&payload(&self.pod, spans)).unwrap_or_default();
        let request = Request::post(self.endpoint.path())
            .header(HOST, &authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        // Whatever it says, it is to be heard out.
        let _ = http_body_util::Limited::new(answer.into_body(), 64 << 10).collect().await;
        connection.abort();
        if status.is_success() { Ok(()) } else { Err(DeliveryError::Refused(status)) }
    }
}

/// A connection that is made in the network namespace `from`: the owner of a pod is in the pod's. Only a thread of its own
/// can go there and take nobody else along.
async fn connected(authority: String, from: Option<Arc<OwnedFd>>) -> std::io::Result<tokio::net::TcpStream> {
    let work = move || {
        let Some(from) = from else { return connect(&authority) };
        let there = std::thread::spawn(move || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&*from), Some(LinkNameSpaceType::Network))?;
            connect(&authority)
        });
        there.join().unwrap_or_else(|_| Err(std::io::Error::other("the connecting thread panicked")))
    };
    let stream = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)??;
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream)
}

/// A collector that swallows packets holds the thread no longer than it holds a delivery.
fn connect(authority: &str) -> std::io::Result<std::net::TcpStream> {
    let mut last = std::io::Error::from(std::io::ErrorKind::NotFound);
    for address in authority.to_socket_addrs()? {
        match std::net::TcpStream::connect_timeout(&address, DELIVERY) {
            Err(error) => last = error,
            connected => return connected,
        }
    }
    Err(last)
}

/// The request's body: `ExportTraceServiceRequest` in OTLP's JSON.
fn payload(pod: &str, spans: &[Span]) -> Value {
    let attribute = |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
    let of = |service: &str| {
        let own: Vec<Value> = spans.iter().filter(|span| span.service == service).map(as_json).collect();
        let attributes = [
            attribute("service.name", service),
            attribute("service.version", env!("CARGO_PKG_VERSION")),
            attribute("kata.sandbox.id", pod),
        ];
        (!own.is_empty()).then(|| {
            json!({ "resource": { "attributes": attributes },
                "scopeSpans": [{ "scope": { "name": "kata" }, "spans": own }] })
        })
    };
    let resources: Vec<Value> = ["kata-shim", "kata-vmm", "kata-agent"].into_iter().filter_map(of).collect();
    json!({ "resourceSpans": resources })
}

fn as_json(span: &Span) -> Value {
    // 64-bit numbers are strings in protobuf's JSON.
    let nanos = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    let mut value = json!({
        "traceId": digits(&span.trace),
        "spanId": digits(&span.id),
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": nanos(span.from),
        "endTimeUnixNano": nanos(span.from.checked_add(span.length).unwrap_or(span.from)),
    });
    if let Value::Object(keys) = &mut value {
        if let Some(parent) = &span.parent {
            keys.insert("parentSpanId".to_owned(), digits(parent).into());
        }
        if span.failed {
            keys.insert("status".to_owned(), json!({ "code": FAILED }));
        }
    }
    value
}

#[cfg(test)]
mod tests;
