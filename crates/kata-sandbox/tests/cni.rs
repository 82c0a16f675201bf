//! What real CNI plugins make of a namespace is what the guest is told, with a fake machine.
//!
//! ```text
//!  plugins, run as a container runtime runs them ──▶ namespace ──▶ pod ──▶ machine's interfaces, agent's calls
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use kata_sandbox::NetworkSpec;
use kata_testkit::netns::Netns;
use rig::{Rig, soon};
use serde_json::{Value, json};

/// Where Debian installs the plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A pod's namespace that a chain of plugins fills.
struct Plugged {
    netns: Netns,
    rig: Rig,
    chain: Vec<Value>,
    result: Value,
}

impl Plugged {
    /// `chain` is made by what it is told of the directory for addresses.
    async fn new(chain: impl FnOnce(&Netns, &Value) -> Vec<Value>) -> Option<Self> {
        if !Path::new(PLUGINS).join("bridge").exists() {
            kata_testkit::skip("containernetworking-plugins is not installed");
            return None;
        }
        let netns = Netns::enter()?;
        let mut rig = Rig::new().await?;
        let bundle = rig.bundle("c");
        rig.network = Some(NetworkSpec { hooks: Vec::new(), bundle, runtime_netns: None });
        let addresses = json!({
            "type": "host-local", "dataDir": rig.dir.path().join("addresses"),
            "ranges": [[{"subnet": "10.7.0.0/24"}], [{"subnet": "fd07::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}, {"dst": "10.8.0.0/16", "gw": "10.7.0.1"}],
        });
        netns.run_outside("ip link set lo up");
        let chain = chain(&netns, &addresses);
        let mut world = Self { netns, rig, chain, result: Value::Null };
        for plugin in world.chain.clone() {
            let result = world.call("ADD", &plugin);
            // A network of its own for the runtimes that have it.
            if plugin["type"] != "loopback" {
                world.result = result;
            }
        }
        Some(world)
    }

    /// Runs one plugin on the host's side.
    fn call(&self, command: &str, plugin: &Value) -> Value {
        let mut config = plugin.clone();
        config["cniVersion"] = json!("0.4.0");
        config["name"] = json!("kt");
        if !self.result.is_null() {
            config["prevResult"] = self.result.clone();
        }
        let here =
            format!("/proc/{}/task/{}/ns/net", std::process::id(), rustix::thread::gettid().as_raw_pid());
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", self.netns.outside()))
            .arg(Path::new(PLUGINS).join(plugin["type"].as_str().unwrap()))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "pod")
            .env("CNI_NETNS", here)
            .env("CNI_IFNAME", if plugin["type"] == "loopback" { "lo" } else { "eth0" })
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{command} of {plugin}: {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// Has a pod started there, and compares what its guest is told with what the plugins said; then all is taken down.
    async fn is_the_guests(self) {
        let pod = self.rig.pod().await;
        let told = self.rig.agent.network();
        let [interface] = told.interfaces.as_slice() else { panic!("{:?}", told.interfaces) };
        assert_eq!(interface.name, "eth0");
        let mut addresses: Vec<String> =
            interface.ip_addresses.iter().map(|ip| format!("{}/{}", ip.address, ip.mask)).collect();
        addresses.sort();
        let ips = self.result["ips"].as_array().unwrap();
        let mut expected: Vec<&str> = ips.iter().map(|ip| ip["address"].as_str().unwrap()).collect();
        expected.sort_unstable();
        assert_eq!(addresses, expected);
        let link = self.netns.run("ip -o link show eth0");
        assert!(link.contains(&interface.hw_addr), "{} in {link}", interface.hw_addr);
        let default =
            |via: &str| told.routes.iter().any(|route| route.dest.is_empty() && route.gateway == via);
        assert!(default("10.7.0.1") && default("fd07::1"), "{:?}", told.routes);
        let further = told.routes.iter().find(|route| route.dest == "10.8.0.0/16").unwrap();
        assert_eq!(further.gateway, "10.7.0.1");
        soon(pod.shutdown()).await.unwrap();
        for plugin in self.chain.iter().rev() {
            self.call("DEL", plugin);
        }
        assert!(!self.netns.run("ip link").contains("eth0"), "plugins take back what they made");
        self.rig.assert_clean().await;
    }
}

#[tokio::test]
async fn bridge_with_ports_rates_firewall_and_loopback_is_the_guests() {
    let world = Plugged::new(|_, addresses| {
        let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        let mut chain = vec![
            json!({"type": "loopback"}),
            json!({"type": "bridge", "bridge": "kt0", "isGateway": true, "ipMasq": true, "mtu": 1400, "ipam": addresses}),
            json!({"type": "portmap", "capabilities": {"portMappings": true}, "runtimeConfig": {"portMappings": ports}}),
            json!({"type": "bandwidth", "ingressRate": 8_000_000, "ingressBurst": 8_000_000}),
        ];
        if Command::new("iptables").arg("-V").output().is_err() {
            kata_testkit::skip("no iptables: port mappings and the firewall are left out");
            chain.remove(2);
            chain[1]["ipMasq"] = json!(false);
        } else {
            chain.push(json!({"type": "firewall", "backend": "iptables"}));
        }
        chain
    });
    let Some(world) = world.await else { return };
    assert!(world.netns.run_outside("tc qdisc show").contains("tbf"), "the rate is kept on the host's side");
    world.is_the_guests().await;
}

#[tokio::test]
async fn point_to_point_is_the_guests() {
    let world = Plugged::new(|_, addresses| vec![json!({"type": "ptp", "mtu": 1400, "ipam": addresses})]);
    let Some(world) = world.await else { return };
    world.is_the_guests().await;
}

#[tokio::test]
async fn macvlan_is_the_guests() {
    let world = Plugged::new(|netns, addresses| {
        netns.run_outside("ip link add lower type veth peer name beyond");
        netns.run_outside("ip link set beyond up");
        netns.run_outside("ip link set lower up");
        vec![json!({"type": "macvlan", "master": "lower", "mode": "bridge", "ipam": addresses})]
    });
    let Some(world) = world.await else { return };
    world.is_the_guests().await;
}
