use std::io::{Read, Write};
use std::net::TcpListener;

use super::*;

fn stage(layer: Layer, name: &str, start_us: u64, duration_us: u64) -> Stage {
    Stage { layer, name: name.to_owned(), start_us, duration_us }
}

fn timeline() -> Vec<Stage> {
    vec![
        stage(Layer::Host, "owner", 0, 10),
        stage(Layer::Vmm, "start", 10, 40),
        stage(Layer::Vmm, "firmware", 50, 50),
        stage(Layer::Kernel, "boot", 100, 900),
        stage(Layer::Container, "create p", 1100, 20),
    ]
}

#[test]
fn stages_lie_below_their_layer_and_layers_below_the_start() {
    let zero = UNIX_EPOCH + Duration::from_secs(10);
    let spans = of_start(&timeline(), zero, false);
    let named = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let root = named("start pod");
    assert_eq!((root.parent, root.length), (None, Duration::from_micros(1120)));
    let vmm = named("vmm");
    assert_eq!((vmm.parent, vmm.length, vmm.service), (Some(root.id), Duration::from_micros(90), "kata-vmm"));
    assert_eq!((named("firmware").parent, named("boot").service), (Some(vmm.id), "kata-agent"));
    assert_eq!(named("firmware").from, zero + Duration::from_micros(50));
    assert!(spans.iter().all(|span| span.trace == root.trace));
    assert_eq!(spans.len(), 1 + 4 + 5);
}

#[test]
fn a_callers_span_is_the_parent() {
    let (trace, span) = traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
    assert_eq!(
        (digits(&trace).as_str(), digits(&span).as_str()),
        ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    );
    for bad in [
        "",
        "00",
        "00-0-0-0",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319é-b7ad6b7169203331-01",
    ] {
        assert!(traceparent(bad).is_none(), "{bad}");
    }
}

#[tokio::test]
async fn a_collector_gets_the_spans_as_otlp() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let read = stream.read(&mut chunk).unwrap();
            text.extend_from_slice(&chunk[..read]);
            let whole = String::from_utf8_lossy(&text).into_owned();
            if let Some((head, body)) = whole.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                if body.len() == length.parse::<usize>().unwrap() {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
                    return (head.to_owned(), body.to_owned());
                }
            }
        }
    });
    let collector = Collector { endpoint, from: None, pod: "web".to_owned() };
    collector.deliver(&of_start(&timeline(), SystemTime::now(), true)).await.unwrap();
    let (head, body) = receiver.join().unwrap();
    assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n") && head.contains("application/json"), "{head}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let resources = body["resourceSpans"].as_array().unwrap();
    let service = |n: usize| resources[n]["resource"]["attributes"][0]["value"]["stringValue"].clone();
    assert_eq!([service(0), service(1), service(2)], ["kata-shim", "kata-vmm", "kata-agent"]);
    let root = &resources[0]["scopeSpans"][0]["spans"][0];
    assert_eq!((&root["name"], &root["status"]["code"]), (&json!("start pod"), &json!(2)));
    assert!(root.get("parentSpanId").is_none());
    assert_eq!(resources[1]["scopeSpans"][0]["spans"][0]["parentSpanId"], root["spanId"]);
}

#[tokio::test]
async fn a_collector_that_is_away_is_told_as_such() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let collector = Collector { endpoint, from: None, pod: "web".to_owned() };
    let error = collector.deliver(&of_start(&timeline(), SystemTime::now(), false)).await.unwrap_err();
    assert!(chain(&error).contains("cannot connect to 127.0.0.1:"), "{}", chain(&error));
}
