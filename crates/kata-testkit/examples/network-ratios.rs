//! How much goes through a pod's network per second with our runtime and with runc, on the same bridge under one containerd.
//!
//! `network-ratios COUNT DIRECTORY` prints one JSON object: for each way the Gbit/s of `kata` and `runc`, measured by the iperf3 of
//! that directory, and where the host has `/dev/vhost-net` of `without` it, too. Programs, image and driver are named by the
//! variables of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Container, Cri, Pod, handler};
use kata_testkit::host::Host;

/// The bridge's own address.
const HOST: &str = "10.89.0.1";
const SECONDS: u32 = 2;
/// iperf3 in a container, with the libraries that came along.
const IPERF: &str = "/iperf/loader --library-path /iperf /iperf/iperf3";

/// The handler `without`, whose machine monitor moves the packets itself.
fn without_vhost(host: &Host) -> String {
    let file = host.scratch("without.toml");
    host.configure_at(&file, "[runtime]\n[hypervisor.qemu]\ndisable_vhost_net = true\n");
    let options =
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.without.options]\nConfigPath = ";
    handler(Version::V1, "without", "io.containerd.kata.v2", &format!("{options}{file:?}\n"))
}

fn start<'a>(pod: &'a Pod<'a>, program: &Path, script: &str) -> Container<'a> {
    pod.container("main").mount_read_only(program, "/iperf").sh(script).start()
}

/// Gbit/s that arrive at the receiving end.
fn measure(client: &Container<'_>, server: &str, options: &str) -> f64 {
    let script = format!("{IPERF} -c {server} -t {SECONDS} -J {options}");
    let said: serde_json::Value = serde_json::from_str(&client.until(&script)).unwrap();
    said.pointer("/end/sum_received/bits_per_second").and_then(serde_json::Value::as_f64).unwrap() / 1e9
}

fn main() {
    let count: usize = std::env::args()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .expect("the first argument is the number of runs");
    let program = PathBuf::from(std::env::args().nth(2).expect("the second is the directory with iperf3"));
    let cri = Cri::with_handlers(Version::V1, without_vhost).expect("the variables of the tests are set");
    let mut on_host = cri.containerd().beside(program.join("loader"));
    on_host.arg("--library-path").arg(&program).arg(program.join("iperf3")).arg("-s");
    let mut on_host = on_host.stdout(Stdio::null()).spawn().unwrap();
    let mut figures: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    let vhost = std::fs::File::options().read(true).write(true).open("/dev/vhost-net").is_ok();
    for handler in ["kata", "runc", "without"].into_iter().filter(|name| vhost || *name != "without") {
        let [client, server] =
            ["client", "server"].map(|name| cri.pod(&format!("{name}-{handler}")).handler(handler).run());
        let address = server.address();
        let _serving = start(&server, &program, &format!("exec {IPERF} -s"));
        let shell = start(&client, &program, "exec sleep 10000");
        for _ in 0..count {
            for (way, to, options) in
                [("to_host", HOST, ""), ("from_host", HOST, "-R"), ("between", address.as_str(), "")]
            {
                let speed = measure(&shell, to, options);
                figures.entry(way).or_default().entry(handler).or_default().push(speed);
            }
        }
        client.remove();
        server.remove();
    }
    on_host.kill().unwrap();
    on_host.wait().unwrap();
    println!("{}", serde_json::to_string(&figures).unwrap());
}
