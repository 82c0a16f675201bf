//! The network of a pod as the guest sees it, against what is in the pod's namespace: at the start, and as it changes.
//!
//! ```text
//!   host's side                          the pod's namespace         the guest
//!   kt0 10.89.0.1, fd00:89::1 ── veth ── eth0 ─────────────────────── eth0
//!   late0 10.90.0.1           ── veth ── eth1, while the pod runs ─── eth1
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use kata_testkit::containerd::Version;
use kata_testkit::cri::{Container, Cri, handler};
use kata_testkit::host::{stderr, stdout, wait_for};
use kata_testkit::with_each_cri;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

with_each_cri!(guest_has_what_the_namespace_has_while_it_runs_and_localhost_is_its_own);

/// The network namespace of the only pod, by its owner.
struct Namespace(String);

impl Namespace {
    fn of_the_pod(cri: &Cri) -> Self {
        let owners = cri.host().pids_of("containerd-shim-kata");
        assert_eq!(owners.len(), 1, "{owners:?}");
        Self(format!("/proc/{}/ns/net", owners[0]))
    }

    /// Runs a command line in it.
    #[track_caller]
    fn run(&self, line: &str) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net={}", self.0))
            .args(line.split_whitespace())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {}", stderr(&output));
        stdout(&output)
    }

    /// Does something on a thread in it, as containerd dials ports.
    fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let network = File::open(&self.0).unwrap();
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                act()
            });
            entered.join().unwrap()
        })
    }
}

/// On the host's side.
#[track_caller]
fn outside(cri: &Cri, line: &str) {
    let mut command = cri.containerd().beside("ip");
    let output = command.args(line.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{line}: {}", stderr(&output));
}

/// Addresses and routes that are somebody's doing, in one order.
fn facts(addresses: &str, routes: &str) -> Vec<String> {
    let addresses = addresses.lines().filter(|line| !line.contains(" lo ")).filter_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (link, family, address) = (words.next()?, words.next()?, words.next()?);
        let link = link.split('@').next()?;
        // What the kernel makes of a hardware address by itself, on each side.
        (!address.starts_with("fe80")).then(|| format!("{link} {family} {address}"))
    });
    let routes = routes.lines().filter(|line| line.contains(" via ")).map(|line| {
        let words: Vec<&str> =
            line.split_whitespace().take_while(|word| *word != "proto" && *word != "metric").collect();
        words.join(" ")
    });
    let mut facts: Vec<String> = addresses.chain(routes).collect();
    facts.sort();
    facts
}

fn in_guest(container: &Container<'_>) -> Vec<String> {
    let routes = container.sh("ip route; ip -6 route").text();
    facts(&container.sh("ip -o addr").text(), &routes)
}

fn in_namespace(namespace: &Namespace) -> Vec<String> {
    let is_ours = |line: &&str| !line.contains("_kata");
    let addresses = namespace.run("ip -o addr");
    let addresses: Vec<&str> = addresses.lines().filter(is_ours).collect();
    facts(&addresses.join("\n"), &(namespace.run("ip route") + &namespace.run("ip -6 route")))
}

/// What a server says when asked, in one line.
fn fetch(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /name HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

fn guest_has_what_the_namespace_has_while_it_runs_and_localhost_is_its_own(cri: &mut Cri) {
    let pod = cri.pod("net").run();
    let serve = "mkdir /www; echo it is me > /www/name; httpd -p 127.0.0.1:80 -h /www; httpd -p [::1]:81 -h /www; exec sleep 1000";
    let main = pod.container("main").sh(serve).start();
    let namespace = Namespace::of_the_pod(cri);
    let same = |what: &str| {
        cri.host().wait_for(what, || (in_guest(&main) == in_namespace(&namespace)).then_some(()));
    };

    // As the plugins made it.
    let there = in_namespace(&namespace);
    assert_eq!(in_guest(&main), there);
    assert_eq!(there.iter().filter(|fact| fact.starts_with("eth0 inet")).count(), 2, "{there:?}");
    for address in ["10.89.0.1", "fd00:89::1"] {
        main.until(&format!("ping -c 1 -W 10 {address}"));
    }

    // The loopback, as port forwarding dials it.
    namespace.within(|| {
        for address in ["127.0.0.1:80", "[::1]:81", "127.0.0.1:81", "[::1]:80"] {
            let said = wait_for(address, Duration::from_secs(10), || fetch(address).ok());
            assert_eq!(said, "it is me", "{address}");
        }
        let refused = fetch("127.0.0.1:82").unwrap_err();
        assert!([ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&refused.kind()), "{refused}");
    });

    late_interface_comes_changes_and_goes(cri, &main, &namespace, same);
    pod.remove();
}

fn late_interface_comes_changes_and_goes(
    cri: &Cri,
    main: &Container<'_>,
    namespace: &Namespace,
    same: impl Fn(&str),
) {
    let path = &namespace.0;
    outside(cri, "link add late0 type veth peer name eth1");
    outside(cri, "addr add 10.90.0.1/24 dev late0");
    outside(cri, "link set late0 up");
    outside(cri, &format!("link set eth1 netns {path}"));
    namespace.run("ip addr add 10.90.0.2/24 dev eth1");
    namespace.run("ip link set eth1 mtu 1300 up");
    namespace.run("ip route add 10.91.0.0/16 via 10.90.0.1");
    same("the late interface");
    main.until("ping -c 1 -W 10 10.90.0.1");
    assert_eq!(main.sh("cat /sys/class/net/eth1/mtu").text(), "1300\n");
    namespace.run("ip addr add 10.92.0.2/24 dev eth1");
    namespace.run("ip route del 10.91.0.0/16");
    same("its second address, and no route");
    // A namespace with one route less is one with none of this device.
    outside(cri, "link del late0");
    same("it to go");
    cri.host().wait_for("the device to be gone", || {
        (main.sh("test -e /sys/class/net/eth1").code != 0).then_some(())
    });
    // The first is as it was.
    main.until("ping -c 1 -W 10 10.89.0.1");
}

#[test]
fn pod_on_a_macvtap_with_two_queues_is_on_the_network() {
    let handlers = |host: &kata_testkit::host::Host| {
        let file = host.scratch("macvtap.toml");
        let text = "[runtime]\ninternetworking_model = \"macvtap\"\n[hypervisor.qemu]\nnetwork_queues = 2\ndefault_vcpus = 2\n";
        host.configure_at(&file, text);
        let options =
            "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.macvtap.options]\nConfigPath = ";
        handler(Version::V2, "macvtap", "io.containerd.kata.v2", &format!("{options}{file:?}\n"))
    };
    let Some(cri) = Cri::with_handlers(Version::V2, handlers) else { return };
    let pod = cri.pod("tap").handler("macvtap").run();
    let main = pod.container("main").idle().start();
    let namespace = Namespace::of_the_pod(&cri);
    assert!(namespace.run("ip -d link show type macvtap").contains("mode passthru"));
    for address in ["10.89.0.1", "fd00:89::1"] {
        main.until(&format!("ping -c 1 -W 10 {address}"));
    }
    let look = main.sh("ls -d /sys/class/net/eth0/queues/rx-1");
    assert_eq!(look.code, 0, "{look:?}");
    pod.remove();
}
