use hyper::client::conn::http1 as client;
use kata_api::csi::{VolumeUsage, volume_usage};

use super::*;

async fn call(path: &Path, method: &str, target: &str, body: &str) -> (u16, String) {
    let stream = UnixStream::connect(path).await.unwrap();
    let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("Host", "localhost")
        .body(Full::new(Bytes::from(body.to_owned())))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    drop(sender);
    connection.abort();
    (status, String::from_utf8(body.into()).unwrap())
}

#[tokio::test]
async fn before_there_is_a_pod_its_owner_has_figures_and_the_rest_waits() {
    let dir = tempfile::tempdir().unwrap();
    serve(dir.path(), Arc::new(Slot::empty()));
    let socket = dir.path().join("shim-monitor.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    let (status, text) = call(&socket, "GET", "/metrics", "").await;
    assert_eq!(status, 200);
    let families = openmetrics_parser::prometheus::parse_prometheus(&text).unwrap().families;
    assert!(
        families.contains_key("kata_shim_threads") && families.contains_key("kata_shim_io_stat"),
        "{text}"
    );

    for (method, target) in [("GET", "/agent-url"), ("GET", "/iptables"), ("PUT", "/policy")] {
        let (status, text) = call(&socket, method, target, "x").await;
        assert_eq!(status, 503, "{target}");
        assert!(text.contains("no container yet"), "{text}");
    }
    assert_eq!(call(&socket, "DELETE", "/policy", "").await.0, 405);
    let (status, text) = call(&socket, "GET", "/nothing", "").await;
    assert!(status == 404 && text.contains("/agent-url"), "{status} {text}");
    let (status, text) = call(&socket, "POST", "/direct-volume/stats", "").await;
    assert!(status == 400 && text.contains("path"), "{status} {text}");
}

#[test]
fn statistics_of_a_volume_are_upstreams_json() {
    let usage = VolumeUsage {
        available: 1,
        total: 3,
        used: 2,
        unit: volume_usage::Unit::BYTES.into(),
        ..VolumeUsage::default()
    };
    let stats = VolumeStatsResponse { usage: vec![usage], ..VolumeStatsResponse::default() };
    let json = String::from_utf8(volume_json(&stats).unwrap()).unwrap();
    assert_eq!(json, r#"{"usage":[{"available":1,"total":3,"used":2,"unit":1}]}"#);
}

#[test]
fn both_of_upstreams_requests_to_resize_are_read() {
    for text in [r#"{"volume_guest_path":"/v","size":5}"#, r#"{"VolumePath":"/v","Size":5}"#] {
        let resize: Resize = serde_json::from_str(text).unwrap();
        assert_eq!((resize.volume_guest_path.as_str(), resize.size), ("/v", 5));
    }
}
