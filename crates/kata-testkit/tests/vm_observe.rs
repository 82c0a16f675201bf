//! What is seen of pods from outside: their management sockets, metrics, the node's monitor and its page, starts, spans.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{Host, patience, stderr, stdout, wait_for};
use serde_json::Value;

/// A pod that stays; removed with its world's last word.
fn detached(host: &Host, name: &str) {
    let image = host.image();
    let output = host.output(["run", "-d", "--name", name, &image, "sleep", "1000"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn remove(host: &Host, name: &str) {
    let output = host.output(["rm", "-f", name]);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn json(host: &Host, words: &[&str]) -> Value {
    let output = host.output(words);
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// One request of HTTP/1.0; code and body of the answer.
fn exchange(mut stream: impl Read + Write, method: &str, target: &str, body: &str) -> (u16, String) {
    let head =
        format!("{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn of_pod(host: &Host, pod: &str, method: &str, target: &str, body: &str) -> (u16, String) {
    let socket = host.run_dir().join(pod).join("shim-monitor.sock");
    exchange(UnixStream::connect(socket).unwrap(), method, target, body)
}

/// Names of the families in a text that a scraper takes.
fn families(text: &str) -> BTreeSet<String> {
    // The parser wants counters to be called `_total`, which the format does not, and upstream's are not.
    let text = &text.replace("_count counter\n", "_count gauge\n");
    let read = openmetrics_parser::prometheus::parse_prometheus(text);
    read.unwrap_or_else(|error| panic!("{error}\n{text}")).families.into_keys().collect()
}

/// The families that the documentation promises, of those whose names begin with one of `prefixes`.
fn promised(prefixes: &[&str]) -> BTreeSet<String> {
    let docs = include_str!("../../../docs/observability.md");
    let names = docs.lines().filter_map(|line| Some(line.strip_prefix("| `kata_")?.split_once('`')?.0));
    let names = names.map(|name| format!("kata_{name}"));
    names.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))).collect()
}

/// The node's monitor, until it is dropped.
struct Monitor {
    child: Child,
    address: SocketAddr,
}

impl Monitor {
    fn start(host: &Host) -> Self {
        let mut child =
            host.ctl(["monitor", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap().trim_end_matches('/');
        Self { child, address: address.parse().unwrap() }
    }

    fn get(&self, target: &str) -> (u16, String) {
        exchange(TcpStream::connect(self.address).unwrap(), "GET", target, "")
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn management_socket_answers_at_upstreams_paths() {
    let Some(host) = Host::new() else { return };
    detached(&host, "web");
    let socket = host.run_dir().join("web/shim-monitor.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    let expected = format!("hvsock://{}:1024", host.run_dir().join("web/kata.hvsock").display());
    assert_eq!(of_pod(&host, "web", "GET", "/agent-url", ""), (200, expected));

    let (code, text) = of_pod(&host, "web", "POST", "/direct-volume/stats?path=%2F", "");
    let stats: Value = serde_json::from_str(&text).unwrap();
    assert!(code == 200 && stats["usage"][0]["total"].as_u64().unwrap() > 0, "{text}");
    assert_eq!(stats["usage"][0]["unit"], 1);
    let (code, text) = of_pod(&host, "web", "POST", "/direct-volume/stats?path=/no/such", "");
    assert!(code == 404 && text.contains("/no/such"), "{code} {text}");

    for (method, target, body) in [
        ("GET", "/iptables", ""),
        ("PUT", "/ip6tables", "*filter\nCOMMIT\n"),
        ("PUT", "/policy", "package agent_policy"),
        ("POST", "/direct-volume/resize", r#"{"volume_guest_path":"/","size":1}"#),
    ] {
        let (code, text) = of_pod(&host, "web", method, target, body);
        assert!(code == 501 && text.contains("does not support"), "{target}: {code} {text}");
    }
    remove(&host, "web");
}

#[test]
fn figures_of_a_pod_are_those_that_are_promised() {
    let Some(host) = Host::new() else { return };
    detached(&host, "web");
    let prefixes =
        ["kata_shim_", "kata_hypervisor_", "kata_vsock_", "kata_virtiofsd_", "kata_agent_", "kata_guest_"];
    let promised = promised(&prefixes);
    // Not every guest has disks, not every kernel counts what a task reads, and templates are off unless asked for.
    let depends = ["kata_guest_diskstat", "kata_agent_io_stat", "kata_shim_template_starts"];
    let expected: BTreeSet<_> =
        promised.iter().filter(|name| !depends.contains(&name.as_str())).cloned().collect();
    // A guest that is late with its figures is left out: nobody waits for it.
    let found = host.wait_for(&format!("{expected:?}"), || {
        let output = host.output(["metrics", "web"]);
        assert!(output.status.success(), "{}", stderr(&output));
        Some(families(&stdout(&output))).filter(|found| expected.is_subset(found))
    });
    let surprising: Vec<_> = found.difference(&promised).collect();
    assert!(surprising.is_empty(), "told and not in docs/observability.md: {surprising:?}");

    let figures = host.wait_for("the guest's figures", || {
        let figures = json(&host, &["metrics", "--json", "web"]);
        let told = figures.as_array().unwrap().iter().any(|it| it["name"] == "kata_guest_meminfo");
        told.then_some(figures)
    });
    let figure = |name: &str, item: &str| {
        let of = |it: &&Value| it["name"] == name && (item.is_empty() || it["labels"]["item"] == item);
        figures.as_array().unwrap().iter().find(of).unwrap_or_else(|| panic!("{name}"))["value"]
            .as_f64()
            .unwrap()
    };
    let (total, left) =
        (figure("kata_guest_meminfo", "mem_total"), figure("kata_guest_meminfo", "mem_available"));
    assert!(total > left && left > 32e6, "{left} of {total} bytes");
    assert!(figure("kata_hypervisor_proc_status", "vmrss") > figure("kata_shim_proc_status", "vmrss"));
    assert!(figure("kata_virtiofsd_threads", "") >= 2.0, "both of its processes");
    remove(&host, "web");
}

#[test]
fn verbs_about_the_guest_tell_what_it_can_and_cannot_do() {
    let Some(host) = Host::new() else { return };
    detached(&host, "web");
    let output = host.output(["volume", "stats", "web", "/"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).lines().nth(1).unwrap().starts_with("bytes "), "{}", stdout(&output));
    assert_eq!(json(&host, &["volume", "stats", "--json", "web", "/"])[1]["unit"], 2);
    let rules = host.scratch("rules");
    std::fs::write(&rules, "*filter\nCOMMIT\n").unwrap();
    let rules = rules.display().to_string();
    for words in [
        vec!["iptables", "get", "web"],
        vec!["iptables", "set", "--v6", "web", &rules],
        vec!["policy", "set", "web", &rules],
        vec!["volume", "resize", "web", "/", "4096"],
    ] {
        let output = host.output(&words);
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        let text = stderr(&output);
        assert!(text.starts_with("kata-ctl: the agent cannot ") && text.lines().count() == 1, "{text}");
    }
    for words in [
        vec!["metrics", "nobody"],
        vec!["iptables", "get", "nobody"],
        vec!["policy", "set", "nobody", &rules],
        vec!["volume", "stats", "nobody", "/"],
        vec!["analyze", "nobody"],
    ] {
        let output = host.output(&words);
        assert_eq!(output.status.code(), Some(3), "{words:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("nobody"), "{}", stderr(&output));
    }
    remove(&host, "web");
}

#[test]
fn start_can_be_analysed_while_the_pod_runs_and_after_it_is_gone() {
    let Some(host) = Host::new() else { return };
    let output = host.output(["analyze", "--last"]);
    assert_eq!(output.status.code(), Some(3), "nothing was started: {}", stderr(&output));
    detached(&host, "web");
    let live = json(&host, &["analyze", "web", "--json"]);
    let layers: BTreeSet<&str> =
        live["timeline"].as_array().unwrap().iter().map(|stage| stage["layer"].as_str().unwrap()).collect();
    assert_eq!(layers, BTreeSet::from(["agent", "container", "host", "kernel", "vmm"]));
    let own: u64 =
        live["layers"].as_array().unwrap().iter().map(|layer| layer["own_us"].as_u64().unwrap()).sum();
    assert_eq!(Some(own), live["total_us"].as_u64(), "the shares are the whole");

    let saved = host.scratch("web.json");
    std::fs::write(&saved, live.to_string()).unwrap();
    remove(&host, "web");
    let image = host.image();
    let output = host.output(["run", "--rm", "--name", "brief", &image, "true"]);
    assert!(output.status.success(), "{}", stderr(&output));

    assert_eq!(json(&host, &["analyze", "--last", "--json"])["id"], "brief");
    assert_eq!(json(&host, &["analyze", "web", "--json"])["timeline"], live["timeline"]);
    let svg = host.scratch("start.svg");
    let output = host.output(["analyze", "brief", "--svg", &svg.display().to_string()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let table = stdout(&output);
    assert!(
        table.starts_with("Pod brief: ") && table.contains("start brief") && table.contains('█'),
        "{table}"
    );
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.contains("Start of pod brief") && svg.contains("class=\"kernel\""), "{svg}");

    let saved = saved.display().to_string();
    let output = host.output(["analyze", "compare", &saved, "brief"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("create container 1"), "{}", stdout(&output));
    let compared = json(&host, &["analyze", "compare", "--json", &saved, "brief"]);
    assert_eq!(compared["total"]["a_us"], live["total_us"]);
}

#[test]
fn monitor_tells_of_all_pods_and_waits_for_none() {
    let Some(host) = Host::new() else { return };
    detached(&host, "web");
    detached(&host, "stuck");
    let monitor = Monitor::start(&host);
    assert_eq!(monitor.get("/sandboxes"), (200, "stuck\nweb\n".to_owned()));
    let (code, url) = monitor.get("/agent-url?sandbox=web");
    assert!(code == 200 && url.starts_with("hvsock://"), "{url}");
    assert_eq!(monitor.get("/agent-url?sandbox=..%2Fweb").0, 404);
    assert_eq!(monitor.get("/agent-url").0, 400);
    assert_eq!(monitor.get("/else").0, 404);

    // Three loads of each pod; one that is late with its figures is left out.
    let text = host.wait_for("the loads of both pods", || {
        let (code, text) = monitor.get("/metrics");
        assert_eq!(code, 200);
        let loads = text.lines().filter(|line| line.starts_with("kata_guest_load{")).count();
        (loads == 6).then_some(text)
    });
    let found = families(&text);
    assert!(promised(&["kata_monitor_"]).is_subset(&found), "{found:?}");
    assert!(text.contains("sandbox_id=\"web\"") && text.contains("cri_namespace=\"\""), "{text}");
    host.wait_for("the loads alone", || {
        let (_, text) = monitor.get("/metrics?filter_family=kata_guest_load");
        (families(&text) == BTreeSet::from(["kata_guest_load".to_owned()])).then_some(())
    });
    let failed = |text: &str| -> u64 {
        let told = text.lines().find_map(|line| line.strip_prefix("kata_monitor_scrape_failed_count "));
        told.unwrap().parse().unwrap()
    };
    let before = failed(&monitor.get("/metrics?filter_family=kata_monitor").1);

    let pods = json(&host, &["ps", "--json"]);
    let of_stuck = |pod: &&Value| pod["name"] == "stuck";
    let owner = pods.as_array().unwrap().iter().find(of_stuck).unwrap()["owner_pid"].as_u64().unwrap();
    let owner = rustix::process::Pid::from_raw(i32::try_from(owner).unwrap()).unwrap();
    rustix::process::kill_process(owner, rustix::process::Signal::STOP).unwrap();
    let text = host.wait_for("figures of the other pod", || {
        let begin = Instant::now();
        let (code, text) = monitor.get("/metrics");
        let took = begin.elapsed();
        assert!(code == 200 && took < patience(Duration::from_secs(8)), "{took:?}");
        assert!(!text.contains("sandbox_id=\"stuck\""), "{text}");
        text.contains("sandbox_id=\"web\"").then_some(text)
    });
    rustix::process::kill_process(owner, rustix::process::Signal::CONT).unwrap();
    assert!(failed(&text) > before, "{text}");

    let (_, text) = monitor.get("/api/sandboxes");
    let sandboxes: Value = serde_json::from_str(&text).unwrap();
    let names: Vec<_> = sandboxes.as_array().unwrap().iter().map(|pod| pod["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["stuck", "web"]);
    assert_eq!(
        (&sandboxes[1]["state"], sandboxes[1]["start"]["timeline"].is_array()),
        (&"running".into(), true)
    );
    drop(monitor);
    remove(&host, "stuck");
    remove(&host, "web");
}

#[test]
fn monitor_says_so_where_others_can_reach_it() {
    let Some(host) = Host::new() else { return };
    let mut child = host
        .ctl(["monitor", "--listen", "0.0.0.0:0"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.contains("is not a loopback address"), "{line}");
}

/// Where Debian, and others, have a browser.
fn browser() -> Option<PathBuf> {
    let places = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
    let found = places.iter().map(PathBuf::from).find(|path| path.exists());
    if found.is_none() {
        kata_testkit::skip("no chromium on this machine: the page is not looked at in a browser");
    }
    found
}

fn browse(browser: &Path, host: &Host, words: &[&str]) -> String {
    let profile = format!("--user-data-dir={}", host.scratch("browser/profile").display());
    let fixed =
        ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1160,1100"];
    let output = Command::new(browser).args(fixed).arg(profile).args(words).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

#[test]
fn status_page_shows_pods_and_their_starts_in_a_browser() {
    let Some(browser) = browser() else { return };
    let Some(host) = Host::new() else { return };
    detached(&host, "web");
    detached(&host, "db");
    let image = host.image();
    assert!(host.output(["run", "--rm", "--name", "gone", &image, "true"]).status.success());
    let monitor = Monitor::start(&host);
    let url = format!("http://{}/", monitor.address);

    let page = browse(&browser, &host, &["--dump-dom", &url]);
    for part in [
        "<th scope=\"row\">web</th>",
        "<th scope=\"row\">db</th>",
        "Start of pod web: ",
        "Start of pod gone: ",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    let bars = page.matches("<rect class=\"kernel\"").count();
    assert!(bars >= 2 * 3 + 2, "{bars} bars of kernels");
    assert!(page.contains("sleep 1000"));

    // KATA_TEST_PICTURES keeps what it looks like.
    let pictures =
        std::env::var_os("KATA_TEST_PICTURES").map_or_else(|| host.scratch("pictures"), PathBuf::from);
    std::fs::create_dir_all(&pictures).unwrap();
    for (name, mode) in [
        ("light", "--blink-settings=preferredColorScheme=1"),
        ("dark", "--blink-settings=preferredColorScheme=0"),
    ] {
        let file = pictures.join(format!("status-{name}.png"));
        browse(&browser, &host, &[mode, &format!("--screenshot={}", file.display()), &url]);
        assert!(std::fs::metadata(&file).unwrap().len() > 20_000, "an empty picture");
    }
    drop(monitor);
    remove(&host, "db");
    remove(&host, "web");
}

/// Takes OTLP over HTTP, and hands on every span with the name of its service.
fn collector() -> (SocketAddr, mpsc::Receiver<(String, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, spans) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            // Who has waited too long breaks off, and comes again with what is next.
            let Ok(body) = delivery(&mut reader) else { continue };
            let _ = reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
            let body: Value = serde_json::from_slice(&body).unwrap();
            for resource in body["resourceSpans"].as_array().unwrap() {
                let service = resource["resource"]["attributes"][0]["value"]["stringValue"].as_str().unwrap();
                for span in resource["scopeSpans"][0]["spans"].as_array().unwrap() {
                    if sender.send((service.to_owned(), span.clone())).is_err() {
                        return;
                    }
                }
            }
        }
    });
    (address, spans)
}

/// The body of a request.
fn delivery(reader: &mut impl BufRead) -> std::io::Result<Vec<u8>> {
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line)? > 2 {
        head += &line;
        line.clear();
    }
    assert!(head.is_empty() || head.starts_with("POST /v1/traces "), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.ok_or(std::io::ErrorKind::UnexpectedEof)?.parse().unwrap()];
    reader.read_exact(&mut body)?;
    Ok(body)
}

/// Waits until there is a span of that name among those that came.
fn until(
    spans: &mpsc::Receiver<(String, Value)>,
    seen: &mut Vec<(String, Value)>,
    name: &str,
) -> (String, Value) {
    wait_for(&format!("the span {name}"), Duration::from_secs(15), || {
        seen.extend(spans.try_iter());
        seen.iter().find(|(_, span)| span["name"] == name).cloned()
    })
}

#[test]
fn spans_of_a_start_reach_a_collector_below_their_parents() {
    let Some(host) = Host::new() else { return };
    let (address, spans) = collector();
    host.configure(&format!("[runtime]\nenable_tracing = true\notlp_endpoint = \"http://{address}\"\n"));
    detached(&host, "web");
    let mut seen = Vec::new();
    let (service, root) = until(&spans, &mut seen, "start pod");
    assert_eq!((service.as_str(), root.get("parentSpanId")), ("kata-shim", None));
    for (layer, of, stage) in [
        ("vmm", "kata-vmm", "firmware"),
        ("kernel", "kata-agent", ""),
        ("agent", "kata-agent", "create sandbox"),
        ("container", "kata-shim", "start web"),
    ] {
        let (service, whole) = until(&spans, &mut seen, layer);
        assert_eq!((service.as_str(), &whole["parentSpanId"]), (of, &root["spanId"]), "{layer}");
        if !stage.is_empty() {
            assert_eq!(until(&spans, &mut seen, stage).1["parentSpanId"], whole["spanId"], "{stage}");
        }
        assert_eq!(whole["traceId"], root["traceId"]);
    }
    assert!(host.output(["exec", "web", "true"]).status.success());
    let (_, call) = until(&spans, &mut seen, "containerd.task/Exec");
    assert_eq!(call["kind"], 2, "a server's");
    remove(&host, "web");
}

#[test]
fn pods_of_containerd_are_monitored_and_traced_from_their_network() {
    kata_testkit::containerd::with(Version::V1, |rig: &mut Containerd| {
        if !rig.has_machines() {
            return;
        }
        let (address, spans) = collector();
        let config = format!("[runtime]\nenable_tracing = true\notlp_endpoint = \"http://{address}\"\n");
        rig.host().configure(&config);
        let annotations: Vec<String> = ["uid", "name", "namespace"]
            .iter()
            .flat_map(|key| {
                ["--annotation".to_owned(), format!("io.kubernetes.cri.sandbox-{key}={key}-of-pod")]
            })
            .collect();
        let options: Vec<&str> = annotations.iter().map(String::as_str).collect();
        rig.detached(&options, "web", "exec sleep 1000");
        let monitor = Monitor::start(rig.host());
        let labels = "cri_name=\"name-of-pod\",cri_namespace=\"namespace-of-pod\",cri_uid=\"uid-of-pod\",sandbox_id=\"web\"";
        rig.host().wait_for(labels, || {
            let (_, text) = monitor.get("/metrics?filter_family=kata_guest_tasks");
            text.contains(labels).then_some(())
        });
        drop(monitor);
        let mut seen = Vec::new();
        until(&spans, &mut seen, "start pod");
        rig.remove("web");
    });
}
