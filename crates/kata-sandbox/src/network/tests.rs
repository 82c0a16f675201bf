use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use kata_api::types::{ARPNeighbor, Interface, Route};
use kata_testkit::netns::Netns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::netlink::Netlink;
use super::scan::{Endpoint, scan};
use super::*;

const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// As it is without any configuration.
fn wiring() -> Wiring {
    Wiring::of(&Config::default(), DriverKind::Qemu)
}

fn network() -> Network {
    wired(wiring())
}

fn wired(wiring: Wiring) -> Network {
    let spec = NetworkSpec { hooks: Vec::new(), bundle: "/nonexistent".into(), runtime_netns: None };
    Network::new(spec, wiring)
}

/// A namespace with an eth0 that has 10.1.0.2, and 10.1.0.1 at its other end.
fn pod() -> Option<Netns> {
    let netns = Netns::enter()?;
    netns.veth("eth0");
    netns.run("ip link set eth0 address 02:00:00:00:00:01 mtu 1400");
    netns.run("ip addr add 10.1.0.2/24 dev eth0");
    netns.run_outside("ip addr add 10.1.0.1/24 dev out-eth0");
    Some(netns)
}

/// What the guest is told of the one endpoint.
async fn only_endpoint() -> Endpoint {
    let mut endpoints = scan(&Netlink::open().unwrap(), &[]).await.unwrap().endpoints;
    assert_eq!(endpoints.len(), 1, "{endpoints:?}");
    endpoints.remove(0)
}

fn addresses(endpoint: &Endpoint) -> Vec<String> {
    let text = |ip: &kata_api::types::IPAddress| format!("{}/{}", ip.address, ip.mask);
    endpoint.interface.ip_addresses.iter().map(text).collect()
}

fn routes(endpoint: &Endpoint) -> Vec<String> {
    let mut routes: Vec<String> = endpoint
        .routes
        .iter()
        .map(|ranked| {
            let route = &ranked.route;
            assert_eq!(route.device, "eth0");
            let Route { dest, gateway, source, scope, flags, mtu, .. } = route;
            let family = route.family.enum_value().unwrap();
            format!(
                "{family:?} {dest:?} via {gateway:?} src {source:?} scope {scope} flags {flags} mtu {mtu}"
            )
        })
        .collect();
    routes.sort();
    routes
}

#[tokio::test]
async fn link_is_told_with_its_addresses() {
    let Some(netns) = pod() else { return };
    netns.run("ip addr add fd00::2/64 dev eth0 nodad");
    let endpoint = only_endpoint().await;
    assert_eq!((endpoint.mac, endpoint.mtu), (MAC, 1400));
    let Interface { device, name, hw_addr, mtu, type_, raw_flags, device_path, .. } = &endpoint.interface;
    assert_eq!((device.as_str(), name.as_str()), ("eth0", "eth0"));
    assert_eq!((hw_addr.as_str(), *mtu, type_.as_str()), ("02:00:00:00:00:01", 1400, "veth"));
    assert_eq!((*raw_flags, device_path.as_str()), (0, ""));
    assert_eq!(addresses(&endpoint), ["10.1.0.2/24", "fd00::2/64"]);
    assert_eq!(routes(&endpoint), [""; 0], "the kernel makes these itself");
    assert!(endpoint.neighbours.is_empty());
}

#[tokio::test]
async fn routes_are_told_but_not_the_kernels_own() {
    let Some(netns) = pod() else { return };
    netns.run("ip addr add fd00::2/64 dev eth0 nodad");
    netns.run("ip route add 169.254.1.1 dev eth0 scope link");
    netns.run("ip route add default via 169.254.1.1 dev eth0 src 10.1.0.2 mtu 1300");
    netns.run("ip route add 10.9.0.0/16 via 192.0.2.1 dev eth0 onlink");
    netns.run("ip -6 route add default via fd00::1 dev eth0");
    netns.run("ip route add 10.77.0.0/16 via 10.1.0.1 table 77");
    assert_eq!(
        routes(&only_endpoint().await),
        [
            r#"v4 "" via "169.254.1.1" src "10.1.0.2" scope 0 flags 0 mtu 1300"#,
            r#"v4 "10.9.0.0/16" via "192.0.2.1" src "" scope 0 flags 4 mtu 0"#,
            r#"v4 "169.254.1.1/32" via "" src "" scope 253 flags 0 mtu 0"#,
            r#"v6 "" via "fd00::1" src "" scope 0 flags 0 mtu 0"#,
        ]
    );
}

#[tokio::test]
async fn route_with_two_next_hops_is_refused_by_name() {
    let Some(netns) = pod() else { return };
    netns.run("ip route add 10.8.0.0/16 nexthop via 10.1.0.1 nexthop via 10.1.0.3");
    let error = network().attach().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the route 10.8.0.0/16 of eth0 cannot be given to the guest: it has several next hops"
    );
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
}

#[tokio::test]
async fn route_that_drops_packets_is_refused_by_name() {
    let Some(netns) = pod() else { return };
    netns.run("ip route add blackhole 10.66.0.0/16");
    let error = network().attach().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the route 10.66.0.0/16 of the namespace cannot be given to the guest: it drops what it matches, and the agent's \
         protocol has no word for that"
    );
}

#[tokio::test]
async fn other_end_of_a_point_to_point_address_is_told_as_a_route() {
    let Some(netns) = pod() else { return };
    netns.run("ip addr flush dev eth0");
    netns.run("ip addr add 10.5.0.1 peer 10.6.0.1/32 dev eth0");
    let endpoint = only_endpoint().await;
    assert_eq!(addresses(&endpoint), ["10.5.0.1/32"]);
    assert_eq!(routes(&endpoint), [r#"v4 "10.6.0.1/32" via "" src "" scope 253 flags 0 mtu 0"#]);
}

#[tokio::test]
async fn only_permanent_neighbours_are_told() {
    let Some(netns) = pod() else { return };
    netns.run("ip neigh add 10.1.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent");
    netns.run("ip neigh add 10.1.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud reachable");
    let endpoint = only_endpoint().await;
    assert_eq!(endpoint.neighbours.len(), 1);
    let ARPNeighbor { to_ip_address, device, lladdr, state, .. } = &endpoint.neighbours[0];
    assert_eq!(to_ip_address.address, "10.1.0.7");
    assert_eq!((device.as_str(), lladdr.as_str(), *state), ("eth0", "02:00:00:00:00:07", 0x80));
}

#[tokio::test]
async fn namespace_with_only_a_loopback_gives_nothing() {
    let Some(netns) = Netns::enter() else { return };
    netns.run("ip link set lo up");
    let network = network();
    assert!(network.attach().await.unwrap().is_empty());
    network.release().await.unwrap();
}

#[tokio::test]
async fn link_that_is_down_is_no_endpoint_until_it_is_up() {
    let Some(netns) = pod() else { return };
    netns.run("ip link set eth0 down");
    let network = network();
    assert!(network.attach().await.unwrap().is_empty());
    netns.run("ip link set eth0 up");
    assert_eq!(network.attach().await.unwrap().len(), 1);
    assert!(network.attach().await.unwrap().is_empty(), "it is known by now");
}

#[tokio::test]
async fn frames_cross_both_ways() {
    let Some(netns) = pod() else { return };
    let nics = network().attach().await.unwrap();
    let [nic] = nics.as_slice() else { panic!("{nics:?}") };
    assert_eq!((nic.mac, nic.mtu, nic.queues.len()), (MAC, 1400, 1));
    assert!(nic.id.starts_with("net"), "{}", nic.id);
    let tap = netns.run("ip -d link show type tun");
    assert!(tap.contains("_kata:") && tap.contains("mtu 1400") && tap.contains("UP"), "{tap}");
    resolve(&nic.queues[0]);
}

#[tokio::test]
async fn namespace_of_a_killed_owner_can_be_used_again() {
    let Some(netns) = pod() else { return };
    // As if killed: the tap closes, and nobody removes the redirection.
    drop(network().attach().await.unwrap());
    assert!(netns.run("tc qdisc show dev eth0").contains("ingress"));
    let nics = network().attach().await.unwrap();
    resolve(&nics[0].queues[0]);
}

#[tokio::test]
async fn namespace_of_a_running_machine_is_refused_and_the_machine_keeps_its_network() {
    let Some(netns) = pod() else { return };
    let first = network();
    let nics = first.attach().await.unwrap();
    let second = network();
    let error = second.attach().await.unwrap_err();
    assert!(matches!(&error, NetworkError::InUse { tap } if netns.run("ip link").contains(tap)), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unimplemented);
    second.release().await.unwrap();
    resolve(&nics[0].queues[0]);
    // What comes later to the first is nobody else's.
    netns.veth("eth1");
    assert_eq!(first.attach().await.unwrap().len(), 1);
    first.release().await.unwrap();
}

#[tokio::test]
async fn release_leaves_neither_tap_nor_redirection() {
    let Some(netns) = pod() else { return };
    netns.veth("eth1");
    let network = network();
    let nics = network.attach().await.unwrap();
    assert_eq!(nics.len(), 2);
    // Even where somebody still has the taps open.
    network.release().await.unwrap();
    assert_eq!(netns.run("ip link show type tun"), "");
    for link in ["eth0", "eth1"] {
        assert!(!netns.run(&format!("tc qdisc show dev {link}")).contains("ingress"));
    }
    let error = network.attach().await.unwrap_err();
    assert!(matches!(error, NetworkError::Released), "{error}");
    network.release().await.unwrap();
}

#[tokio::test]
async fn filters_of_somebody_else_are_not_taken_away() {
    let Some(netns) = pod() else { return };
    netns.run("tc qdisc add dev eth0 clsact");
    let network = network();
    let error = network.attach().await.unwrap_err();
    let text = crate::error::chain(&error);
    assert!(text.starts_with("cannot add an ingress qdisc to link"), "{text}");
    assert!(text.contains("File exists"), "{text}");
    network.release().await.unwrap();
    assert!(netns.run("tc qdisc show dev eth0").contains("clsact"));
    assert_eq!(netns.run("ip link show type tun"), "");
}

#[tokio::test]
async fn machine_gets_one_file_for_each_queue() {
    let Some(netns) = pod() else { return };
    let network = wired(Wiring { queues: 4, ..wiring() });
    let nics = network.attach().await.unwrap();
    assert_eq!(nics[0].queues.len(), 4);
    let tap = netns.run("ip -d link show type tun");
    assert!(tap.contains("multi_queue numqueues 4"), "{tap}");
    network.release().await.unwrap();
}

#[tokio::test]
async fn link_without_ethernet_is_refused_unless_it_is_down() {
    let Some(netns) = pod() else { return };
    netns.run("ip tuntap add vpn0 mode tun");
    assert_eq!(network().attach().await.unwrap().len(), 1);
    netns.run("ip link set vpn0 up");
    let error = network().attach().await.unwrap_err();
    // A tun that nobody has open.
    assert!(
        error.to_string().starts_with("the link vpn0 cannot be given to the guest: it carries no Ethernet"),
        "{error}"
    );
}

#[tokio::test]
async fn tap_that_was_there_is_the_machines_own() {
    let Some(netns) = Netns::enter() else { return };
    netns.run("ip tuntap add tap7 mode tap");
    netns.run("ip link set tap7 address 02:00:00:00:00:01 mtu 1400 up");
    netns.run("ip addr add 10.1.0.2/24 dev tap7");
    let network = network();
    let nics = network.attach().await.unwrap();
    let [nic] = nics.as_slice() else { panic!("{nics:?}") };
    assert_eq!((nic.mac, nic.mtu, nic.queues.len()), (MAC, 1400, 1));
    assert!(!netns.run("tc qdisc show").contains("ingress"));
    // Now that it is in use, it is nobody else's, and still this machine's.
    assert!(wired(wiring()).attach().await.unwrap().is_empty());
    assert!(network.attach().await.unwrap().is_empty());
    network.release().await.unwrap();
    assert!(netns.run("ip link show type tun").contains("tap7"), "it is its maker's to remove");
}

#[tokio::test]
async fn macvlan_is_an_endpoint_like_any_other() {
    let Some(netns) = Netns::enter() else { return };
    netns.run_outside("ip link add lower type veth peer name beyond");
    let here = format!("/proc/{}/task/{}/ns/net", std::process::id(), rustix::thread::gettid().as_raw_pid());
    netns.run_outside(&format!("ip link add link lower name eth0 netns {here} type macvlan mode bridge"));
    netns.run("ip link set eth0 address 02:00:00:00:00:01 up");
    netns.run("ip addr add 10.1.0.2/24 dev eth0");
    netns.run_outside("ip addr add 10.1.0.1/24 dev beyond");
    for link in ["lower", "beyond"] {
        netns.run_outside(&format!("ip link set {link} up"));
    }
    let network = network();
    let nics = network.attach().await.unwrap();
    assert_eq!((nics.len(), nics[0].mac), (1, MAC));
    resolve(&nics[0].queues[0]);
    network.release().await.unwrap();
}

#[tokio::test]
async fn model_none_leaves_the_tap_for_somebody_else_to_join() {
    let Some(netns) = pod() else { return };
    let network = wired(Wiring { model: InternetworkingModel::None, ..wiring() });
    let nics = network.attach().await.unwrap();
    assert_eq!((nics.len(), nics[0].mac), (1, MAC));
    assert!(!netns.run("tc qdisc show").contains("ingress"));
    let tap = netns.run("ip -o link show type tun");
    let tap = tap.split(": ").nth(1).unwrap();
    // A bridge, as such a somebody would have.
    netns.run("ip link add br0 type bridge");
    netns.run("ip addr flush dev eth0");
    netns.run("ip link set eth0 address 02:00:00:00:00:09");
    for link in [tap, "eth0"] {
        netns.run(&format!("ip link set {link} master br0"));
    }
    netns.run("ip link set br0 up");
    resolve(&nics[0].queues[0]);
    network.release().await.unwrap();
}

#[tokio::test]
async fn model_macvtap_carries_frames_and_leaves_nothing() {
    let Some(netns) = pod() else { return };
    let macvtap = Wiring { model: InternetworkingModel::MacVtap, ..wiring() };
    let network = wired(Wiring { queues: 2, ..macvtap });
    assert_eq!(network.attach().await.unwrap()[0].queues.len(), 2);
    network.release().await.unwrap();
    let network = wired(macvtap);
    let nics = network.attach().await.unwrap();
    let [nic] = nics.as_slice() else { panic!("{nics:?}") };
    assert_eq!((nic.mac, nic.mtu, nic.queues.len()), (MAC, 1400, 1));
    let link = netns.run("ip -d link show type macvtap");
    assert!(link.contains("macvtap mode passthru") && link.contains("02:00:00:00:00:01"), "{link}");
    assert!(!netns.run("tc qdisc show").contains("ingress"));
    let error = wired(wiring()).attach().await.unwrap_err();
    assert!(matches!(&error, NetworkError::InUse { tap } if link.contains(tap)), "{error}");
    resolve(&nic.queues[0]);
    network.release().await.unwrap();
    assert_eq!(netns.run("ip link show type macvtap"), "");
}

#[tokio::test]
async fn rates_become_bounds_of_both_directions_and_go_with_the_pod() {
    let Some(netns) = pod() else { return };
    let rates = Wiring { into_pod: 8_000_000, out_of_pod: 40_000_000_000, ..wiring() };
    for _ in 0..2 {
        // As if killed the first time: the bound of the link is left, and gives way.
        std::mem::forget(wired(rates).attach().await.unwrap().pop());
        netns.run("ip -o link show type tun").split(": ").nth(1).map(|tap| {
            let bound = netns.run(&format!("tc qdisc show dev {tap} root"));
            assert!(bound.contains("tbf") && bound.contains("rate 8Mbit burst 64Kb"), "{bound}");
            netns.run(&format!("ip link del {tap}"))
        });
        let bound = netns.run("tc qdisc show dev eth0 root");
        assert!(bound.contains("tbf") && bound.contains("rate 40Gbit"), "{bound}");
    }
    let network = wired(rates);
    network.attach().await.unwrap();
    network.release().await.unwrap();
    assert!(!netns.run("tc qdisc show").contains("tbf"));
}

#[tokio::test]
async fn bound_that_cannot_be_kept_is_refused_with_its_setting() {
    let Some(_netns) = pod() else { return };
    for (wiring, text) in [
        (
            Wiring { model: InternetworkingModel::MacVtap, into_pod: 1, ..wiring() },
            "eth0 cannot be held to hypervisor.qemu.rx_rate_limiter_max_rate: nothing queues on the way through a macvtap",
        ),
        (
            Wiring { model: InternetworkingModel::None, out_of_pod: 1, ..wiring() },
            "eth0 cannot be held to hypervisor.qemu.tx_rate_limiter_max_rate: its tap is joined with nothing here",
        ),
    ] {
        let error = wired(wiring).attach().await.unwrap_err();
        assert!(error.to_string().starts_with(text), "{error}");
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
    }
}

#[tokio::test]
async fn queueing_discipline_of_somebody_else_is_not_taken_away() {
    let Some(netns) = pod() else { return };
    netns.run("tc qdisc add dev eth0 root handle 1: htb");
    let error = wired(Wiring { out_of_pod: 1_000_000, ..wiring() }).attach().await.unwrap_err();
    let text = crate::error::chain(&error);
    assert!(text.starts_with("cannot hold link") && text.contains("File exists"), "{text}");
    assert!(netns.run("tc qdisc show dev eth0 root").contains("htb"));
}

/// As a guest with the address 10.1.0.2: asks for the hardware address of 10.1.0.1, and gets an answer.
fn resolve(tap: &OwnedFd) {
    let frame = [
        &[0; 10][..],                     // no offloads
        &[0xff; 6],                       // to everybody
        &MAC,                             // from us
        &[0x08, 0x06],                    // ARP
        &[0, 1, 0x08, 0, 6, 4, 0, 1],     // Ethernet, IPv4, request
        &MAC,                             // from us
        &[10, 1, 0, 2, 0, 0, 0, 0, 0, 0], // who asks whom
        &[10, 1, 0, 1],                   // for this
    ]
    .concat();
    let deadline = Instant::now() + Duration::from_secs(30);
    let moment = Timespec::try_from(Duration::from_millis(300)).unwrap();
    loop {
        assert!(Instant::now() < deadline, "no answer");
        // Again, as guests do: the kernel tells a link that another one is up when it comes to it.
        assert_eq!(rustix::io::write(tap, &frame).unwrap(), frame.len());
        if poll(&mut [PollFd::new(tap, PollFlags::IN)], Some(&moment)).unwrap() == 0 {
            continue;
        }
        let mut buffer = [0; 2048];
        let length = rustix::io::read(tap, &mut buffer).unwrap();
        // An ARP reply to us, among what else the kernel sends.
        let (to, kind) = (&buffer[10..16], &buffer[22..32]);
        if length >= 52 && to == MAC && kind == [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2] {
            assert_eq!(buffer[38..42], [10, 1, 0, 1]);
            return;
        }
    }
}
