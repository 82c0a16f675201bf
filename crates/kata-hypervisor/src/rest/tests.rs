use std::io::ErrorKind;
use std::time::Duration;

use hyper::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::fake::Interface;
use super::{Address, ApiError, Call, Client};

fn interface() -> Interface {
    Interface::parse(
        "[[endpoints]]\nrequest = \"PUT /thing/{id}\"\nbody = \"Thing\"\nanswers = [204]\n\
         [[endpoints]]\nrequest = \"GET /\"\nanswers = [200]\n\
         [schemas.Thing]\nname = \"string!\"\nsize = \"integer\"\nparts = \"[Thing]\"\nkind = \"'A'|'B'\"\n",
    )
}

#[test]
fn requests_that_are_not_published_are_refused() {
    let interface = interface();
    let wrong = |request: &str, body: Option<&serde_json::Value>| interface.check(request, body).unwrap_err();
    assert_eq!(wrong("PUT /other", None), "PUT /other: no such request");
    assert_eq!(wrong("PUT /thing/", None), "PUT /thing/: no such request");
    assert_eq!(wrong("PUT /thing/1", None), "PUT /thing/1: the body is missing");
    assert_eq!(wrong("GET /", Some(&json!({}))), "GET /: takes no body");
    for (body, why) in [
        (json!({}), "PUT /thing/1.name: is missing"),
        (json!({"name": 1}), "PUT /thing/1.name: 1 is no string"),
        (json!({"name": "a", "size": -1}), "PUT /thing/1.size: -1 is no integer"),
        (json!({"name": "a", "nmae": "b"}), "PUT /thing/1.nmae: no such field"),
        (json!({"name": "a", "kind": "C"}), "PUT /thing/1.kind: \"C\" is no 'A'|'B'"),
        (json!({"name": "a", "parts": [{}]}), "PUT /thing/1.parts.name: is missing"),
    ] {
        assert_eq!(wrong("PUT /thing/1", Some(&body)), why);
    }
    let right = json!({"name": "a", "size": 1, "kind": "B", "parts": [{"name": "b"}]});
    assert_eq!(interface.check("PUT /thing/1", Some(&right)), Ok(()));
}

/// How long an answer may take that does not come.
const BOUND: Duration = Duration::from_millis(300);
/// How long one may take that does.
const PATIENCE: Duration = Duration::from_secs(20);

/// What comes of a request that is answered with these bytes; then the connection is closed, or left as it is.
async fn answered(bytes: Vec<u8>, then_closed: bool) -> ApiError {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let vmm = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        // Whoever has read enough may be gone.
        let _ = stream.write_all(&bytes).await;
        if !then_closed {
            std::future::pending::<()>().await;
        }
    });
    let error = asked(Address::Path(path), if then_closed { PATIENCE } else { BOUND }).await;
    vmm.abort();
    error
}

async fn asked(address: Address, bound: Duration) -> ApiError {
    let client = Client::new("the VMM", address, |_| None);
    let call = Call { method: Method::GET, path: "/", bound };
    client.get::<serde_json::Value>(call).await.unwrap_err()
}

fn ok(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

#[tokio::test]
async fn socket_that_is_gone_or_without_a_listener_is_lost_with_the_request() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let kind = |error: ApiError| match error {
        ApiError::Lost { vmm: "the VMM", request, source } if request == "GET /" => source.kind(),
        other => panic!("{other}"),
    };
    assert_eq!(kind(asked(Address::Path(path.clone()), PATIENCE).await), ErrorKind::NotFound);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert_eq!(kind(asked(Address::Path(path), PATIENCE).await), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn answer_that_is_none_cut_off_or_too_long_is_no_answer() {
    let long = ok(&vec![b' '; (1 << 20) + 1]);
    let short = ok(b"{\"version\": 1}");
    for bytes in [b"".to_vec(), b"SSH-2.0-x\r\n".to_vec(), short[..short.len() - 3].to_vec(), long] {
        let error = answered(bytes, true).await;
        assert!(matches!(error, ApiError::Lost { .. }), "{error}");
    }
    let error = answered(ok(b"ready"), true).await;
    assert!(matches!(error, ApiError::Answer { .. }), "{error}");
    let endless = b"HTTP/1.1 500 Oops\r\n\r\n".iter().copied().chain([b'y'; 2000]).collect();
    let error = answered(endless, true).await;
    assert!(matches!(&error, ApiError::Refused { status: 500, said, .. } if said.len() == 600), "{error}");
}

#[tokio::test]
async fn answer_that_does_not_come_or_not_to_an_end_is_told_by_its_bound() {
    for bytes in [b"".to_vec(), b"HTTP/1.1 20".to_vec(), ok(b"{}")[..30].to_vec()] {
        let error = answered(bytes, false).await;
        assert!(matches!(error, ApiError::Timeout { bound: BOUND, .. }), "{error}");
    }
}
