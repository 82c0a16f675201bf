//! The node's monitor: all pods of this host over HTTP.
//!
//! ```text
//!   Prometheus ─ /metrics ──────▶ scrape ─▶ shim-monitor.sock of each pod, all at once, each within a bound
//!   browser ──── / ─────────────▶ page ───┐
//!   programs ─── /api/sandboxes ──────────┴▶ sandboxes ─▶ state.json of each pod, the kept starts
//! ```
//!
//! Paths, labels and names of families are those of upstream's kata-monitor. Pods are asked when somebody asks here, and
//! not otherwise. What lists pods reads files only: no pod can hold it up.

mod page;
mod sandboxes;
mod scrape;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::failure::chain;
use crate::pod::management::{ManagementError, ask};
use scrape::Scraper;

/// Connections that are served at a time.
const CONNECTIONS: usize = 64;
/// How long a connection may last, whatever it does.
const CONNECTION_BOUND: Duration = Duration::from_secs(300);
/// How long a client may take to say what it wants.
const HEADERS_BOUND: Duration = Duration::from_secs(10);
/// Rest after a failed accept: out of descriptors, it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";
/// Nothing is loaded from anywhere, and no script runs.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'";

/// An answer: code, type of content, content.
type Answer = (StatusCode, &'static str, Vec<u8>);

/// Serves for good.
pub async fn serve(listener: TcpListener) {
    let scraper = Arc::new(Scraper::default());
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // It is never closed.
    while let Ok(place) = places.clone().acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let scraper = scraper.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(CONNECTION_BOUND, converse(stream, scraper)).await;
            drop(place);
        });
    }
}

async fn converse(stream: TcpStream, scraper: Arc<Scraper>) {
    let service = service_fn(move |request| {
        let scraper = scraper.clone();
        async move { Ok::<_, Infallible>(respond(&scraper, &request).await) }
    });
    // A client that breaks off, or speaks something else, is its own affair.
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADERS_BOUND);
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn respond(scraper: &Scraper, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, kind, body) = answer(scraper, request).await;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    response
}

async fn answer(scraper: &Scraper, request: &Request<Incoming>) -> Answer {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return refused(StatusCode::METHOD_NOT_ALLOWED, "everything here is to be read with GET");
    }
    if !is_ours(request.headers().get(header::HOST)) {
        return refused(
            StatusCode::FORBIDDEN,
            "this host is asked for by another name than its address or localhost",
        );
    }
    let query = request.uri().query().unwrap_or_default();
    match request.uri().path() {
        "/" => (StatusCode::OK, HTML, page::render(&sandboxes::list(), &sandboxes::ended()).into_bytes()),
        "/metrics" => {
            let families = parameters(query, "filter_family");
            let text = scraper.scrape(&sandboxes::list(), &families).await;
            (StatusCode::OK, kata_api::metrics::CONTENT_TYPE, text.into_bytes())
        }
        "/sandboxes" => {
            let names: String = sandboxes::list().into_iter().map(|sandbox| sandbox.id + "\n").collect();
            (StatusCode::OK, TEXT, names.into_bytes())
        }
        "/api/sandboxes" => match serde_json::to_vec(&sandboxes::list()) {
            Ok(json) => (StatusCode::OK, JSON, json),
            Err(error) => refused(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        "/agent-url" => agent_url(parameters(query, "sandbox").first()).await,
        _ => refused(
            StatusCode::NOT_FOUND,
            "see /, /metrics, /sandboxes, /agent-url?sandbox=NAME, /api/sandboxes",
        ),
    }
}

/// Whether a request was meant for here. A page of somebody else's, opened in a browser on this host, could give its own name
/// this host's address and read what is served on loopback; the browser then says that name. Addresses, `localhost` and names
/// without a dot or this host's own cannot be had that way.
fn is_ours(host: Option<&HeaderValue>) -> bool {
    let Some(host) = host else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let own = rustix::system::uname();
    name.parse::<std::net::IpAddr>().is_ok()
        || !name.contains('.')
        || own.nodename().to_str().is_ok_and(|own| own == name)
}

async fn agent_url(name: Option<&String>) -> Answer {
    let Some(name) = name else {
        return refused(StatusCode::BAD_REQUEST, "the parameter sandbox is missing");
    };
    // Among those that there are: a name becomes no path.
    let Some(sandbox) = sandboxes::list().into_iter().find(|sandbox| sandbox.id == *name) else {
        return refused(StatusCode::NOT_FOUND, format!("there is no sandbox named {name:?}"));
    };
    match ask(&sandbox.run_dir, ("GET", "/agent-url"), Vec::new(), scrape::BOUND).await {
        Ok(url) => (StatusCode::OK, TEXT, url.into()),
        Err(ManagementError::Refused { status, text }) => {
            refused(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY), text)
        }
        Err(error) => refused(StatusCode::BAD_GATEWAY, chain(&error)),
    }
}

fn refused(status: StatusCode, text: impl Into<String>) -> Answer {
    (status, TEXT, (text.into() + "\n").into_bytes())
}

/// The values of a parameter, which may come more than once and hold several with commas between.
fn parameters(query: &str, name: &str) -> Vec<String> {
    let named = form_urlencoded::parse(query.as_bytes()).filter(|(known, _)| known == name);
    named
        .flat_map(|(_, value)| value.split(',').map(str::to_owned).collect::<Vec<_>>())
        .filter(|value| !value.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_stranger_could_point_here_are_refused() {
        let ours = |host: &str| is_ours(Some(&HeaderValue::from_str(host).unwrap()));
        for good in ["127.0.0.1:8090", "[::1]:8090", "10.0.0.7", "localhost:8090", "node7:8090"] {
            assert!(ours(good), "{good}");
        }
        for bad in ["evil.example:8090", "evil.example", "127.0.0.1.evil.example"] {
            assert!(!ours(bad), "{bad}");
        }
        assert!(is_ours(None), "HTTP/1.0 needs none");
    }

    #[test]
    fn parameters_come_alone_repeated_or_with_commas() {
        let query = "filter_family=kata_a&x=1&filter_family=b,c%2Cd&filter_family=";
        assert_eq!(parameters(query, "filter_family"), ["kata_a", "b", "c", "d"]);
        assert!(parameters("", "filter_family").is_empty());
    }
}
