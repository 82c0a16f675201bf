//! Pods in networks: one prepared before the container, and one made by CNI plugins, against both containerds.
//!
//! ```text
//!   the test's own network namespace, where containerd runs     the pod's
//!   kt0 10.88.0.1 (bridge) ── veth ────────────────────────────── eth0 10.88.0.2 ── tap ── the machine's eth0
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output};

use kata_testkit::containerd::{Containerd, IMAGE, Version};
use kata_testkit::host::{stderr, stdout};

/// The tests run in a network namespace of their own, so not with `with_each_containerd`.
macro_rules! with_each_network {
    ($($test:ident),* $(,)?) => {
        mod v1 {
            $(#[test] fn $test() { super::with(super::Version::V1, super::$test) })*
        }
        mod v2 {
            $(#[test] fn $test() { super::with(super::Version::V2, super::$test) })*
        }
    };
}

with_each_network!(
    interface_of_a_prepared_namespace_is_the_machines_and_can_be_used_again,
    interface_that_plugins_make_after_the_creation_is_plugged_in,
);

fn with(version: Version, test: fn(&Containerd)) {
    let Some(rig) = Containerd::configured(version, "", &["unshare", "--net"]) else { return };
    runs(&mut rig.beside("ip"), &["link", "set", "lo", "up"]);
    test(&rig);
}

#[track_caller]
fn runs(command: &mut Command, words: &[&str]) {
    let output = command.args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
}

/// A network namespace that lasts as long as its file is mounted.
struct Namespace(PathBuf);

impl Namespace {
    /// Connected to the bridge `kt0`, which is made on the way.
    fn prepared(rig: &Containerd) -> Self {
        let file = rig.host().scratch("netns");
        File::create(&file).unwrap();
        let path = file.to_str().unwrap();
        runs(&mut Command::new("unshare"), &[&format!("--net={path}"), "true"]);
        let namespace = Self(file.clone());
        let outside = |words: &str| runs(&mut rig.beside("ip"), &words.split(' ').collect::<Vec<_>>());
        outside("link add kt0 type bridge");
        outside("addr add 10.88.0.1/24 dev kt0");
        outside("link set kt0 up");
        outside("link add kt1 type veth peer name eth0");
        outside("link set kt1 master kt0 up");
        outside(&format!("link set eth0 netns {path}"));
        let inside = |words: &str| {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={path}")).arg("ip");
            runs(&mut command, &words.split(' ').collect::<Vec<_>>());
        };
        inside("link set lo up");
        inside("addr add 10.88.0.2/24 dev eth0");
        inside("link set eth0 up");
        inside("route add default via 10.88.0.1");
        namespace
    }

    /// The interfaces in it, with their addresses, and what filters their packets.
    fn interfaces(&self) -> String {
        let inside = |words: &[&str]| {
            let mut command = Command::new("nsenter");
            stdout(&command.arg(format!("--net={}", self.0.display())).args(words).output().unwrap())
        };
        let links = inside(&["ip", "-br", "link"]);
        // The state between the name and the address depends on whether the other end is up yet.
        let links = links
            .lines()
            .map(|link| link.split_whitespace().step_by(2).take(2).collect::<Vec<_>>().join(" "));
        links.collect::<Vec<_>>().join("\n") + "\n" + &inside(&["tc", "qdisc"])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// What a server says, seen from the host.
fn fetch(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.rsplit_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

fn interface_of_a_prepared_namespace_is_the_machines_and_can_be_used_again(rig: &Containerd) {
    let network = Namespace::prepared(rig);
    let before = network.interfaces();
    let option = format!("network:{}", network.0.display());
    for round in ["first", "second"] {
        let script = format!(
            "for n in $(seq 20); do ping -c 1 -W 10 10.88.0.1 > /ping && break; done; mkdir /www; echo {round} > /www/index.html; exec httpd -f -p 80 -h /www"
        );
        rig.detached(&["--with-ns", &option], "net", &script);
        let answer = rig.host().wait_for("the server", || rig.on_its_host(|| fetch("10.88.0.2:80")));
        assert_eq!(answer, format!("{round}\n"));
        let look = rig.exec("net", "look", "cat /ping; ip route; cat /sys/class/net/eth0/address");
        let text = stdout(&look);
        assert!(text.contains("1 packets received"), "{text}");
        assert!(text.contains("default via 10.88.0.1"), "{text}");
        let address = text.lines().last().unwrap();
        assert!(before.contains(address), "the machine has the interface's address {address}: {before}");
        rig.remove("net");
        rig.host().wait_for("the owner's taps to be gone", || (network.interfaces() == before).then_some(()));
    }
}

/// `ctr` where containers' networks are made: it runs the plugins itself, and looks for them at fixed places.
fn with_plugins(rig: &Containerd, words: &[String]) -> Output {
    let scratch = |name: &str| rig.host().scratch(&format!("cni/{name}"));
    for dir in ["etc/cni/net.d", "opt/cni", "var/lib", "work/etc", "work/opt", "work/var/lib"] {
        std::fs::create_dir_all(scratch(dir)).unwrap();
    }
    let _ = std::os::unix::fs::symlink("/usr/lib/cni", scratch("opt/cni/bin"));
    let config = serde_json::json!({
        "cniVersion": "0.4.0", "name": "kt", "plugins": [{
            "type": "bridge", "bridge": "kt0", "isGateway": true,
            "ipam": {"type": "host-local", "subnet": "10.88.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]},
        }],
    });
    std::fs::write(scratch("etc/cni/net.d/10-kt.conflist"), config.to_string()).unwrap();
    // Over the host's directories, for this client alone.
    let base = scratch("");
    let base = base.display();
    let overlays = ["etc", "opt", "var/lib"].map(|dir| {
        format!("mount -t overlay -o lowerdir=/{dir},upperdir={base}/{dir},workdir={base}/work/{dir} kt /{dir} && ")
    });
    let mut client = rig.beside("unshare");
    client.args(["--mount", "sh", "-c", &(overlays.concat() + "exec \"$@\""), "sh"]);
    client.arg(rig.client()).arg("--address").arg(rig.socket()).args(words);
    client.stdin(std::process::Stdio::null()).output().unwrap()
}

fn interface_that_plugins_make_after_the_creation_is_plugged_in(rig: &Containerd) {
    if !std::path::Path::new("/usr/lib/cni/bridge").exists() {
        kata_testkit::skip("containernetworking-plugins is not installed");
        return;
    }
    for _ in 0..2 {
        let script = "for n in $(seq 20); do ping -c 1 -W 10 10.88.0.1 && break; done; ip route";
        let output = with_plugins(rig, &rig.run(&["--rm", "--cni", IMAGE, "cni", "sh", "-c", script]));
        let text = stdout(&output);
        assert!(text.contains("1 packets received"), "{text}{}", stderr(&output));
        assert!(text.contains("default via 10.88.0.1"), "{text}");
    }
}
