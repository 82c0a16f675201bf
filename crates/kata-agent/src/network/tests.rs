//! The guest's network in namespaces of the tests' own, looked at with iproute2.

use std::net::IpAddr;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::interface::Interface;
use super::neighbour::{Neighbour, PERMANENT};
use super::route::Route;
use super::*;

const FIRST: &str = "02:00:00:00:00:01";
const SECOND: &str = "02:00:00:00:00:02";
const WITHIN: Duration = Duration::from_secs(10);

/// Runs `test` in a network namespace with a loopback that is up, or says why not.
fn in_namespace(test: impl AsyncFnOnce() + Send + 'static) {
    let obstacle = if !rustix::process::geteuid().is_root() {
        Some("a network namespace needs root")
    } else if Command::new("ip").arg("-V").output().is_err() {
        Some("needs the ip command of iproute2")
    } else {
        None
    };
    if let Some(obstacle) = obstacle {
        eprintln!("skipped: {obstacle}");
        return;
    }
    let thread = std::thread::spawn(|| {
        // SAFETY: the table of files stays shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[track_caller]
fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Plugs an interface in; its other end is up.
fn plug(name: &str, address: &str) {
    ip(&format!("link add {name} address {address} type veth peer name {name}-far"));
    ip(&format!("link set {name}-far up"));
}

fn wanted(name: &str, hardware: &str, addresses: &[&str]) -> Interface {
    Interface {
        name: name.into(),
        hardware: hardware.parse().unwrap(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        mtu: 0,
        flags: 0,
    }
}

/// What the interface is then. The link-local address that the kernel adds when it gets to it is left out.
async fn update(wanted: &Interface) -> Interface {
    let mut now = interface::update(wanted, WITHIN).await.unwrap();
    now.addresses.retain(|prefix| !prefix.to_string().starts_with("fe80:"));
    now
}

/// `NETWORK [via GATEWAY] DEVICE`
fn route(text: &str) -> Route {
    let words: Vec<_> = text.split(' ').collect();
    Route {
        destination: words[0].parse().unwrap(),
        gateway: (words[1] == "via").then(|| words[2].parse().unwrap()),
        device: words.last().copied().unwrap().into(),
        source: None,
        scope: 0,
        flags: 0,
        mtu: 0,
    }
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn an_interface_is_found_by_its_hardware_address_renamed_and_brought_up() {
    in_namespace(async || {
        plug("veth7", FIRST);
        let request = Interface { mtu: 1400, ..wanted("eth0", FIRST, &["10.0.0.2/24"]) };
        let now = update(&request).await;
        assert_eq!((now.name.as_str(), now.mtu, now.addresses), ("eth0", 1400, request.addresses));
        assert_eq!(now.flags & link::UP, link::UP);
        assert_has(&ip("addr show eth0"), &[FIRST, "mtu 1400", "UP", "inet 10.0.0.2/24 brd 10.0.0.255"]);
        assert!(Command::new("ip").args(["link", "show", "veth7"]).output().unwrap().stdout.is_empty());
    });
}

#[test]
fn what_the_request_leaves_open_stays_as_it_is() {
    in_namespace(async || {
        plug("veth7", FIRST);
        ip("link set veth7 mtu 1400");
        let now = update(&wanted("", FIRST, &[])).await;
        assert_eq!((now.name.as_str(), now.mtu, now.addresses), ("veth7", 1400, vec![]));
    });
}

#[test]
fn a_link_that_has_the_name_gets_the_old_one_in_exchange() {
    in_namespace(async || {
        plug("eth0", FIRST);
        plug("eth1", SECOND);
        ip("link set eth0 up");
        ip("link set eth1 up");
        update(&wanted("eth0", SECOND, &[])).await;
        assert_has(&ip("-br link show eth0"), &[SECOND, "UP"]);
        assert_has(&ip("-br link show eth1"), &[FIRST, "UP"]);
    });
}

#[test]
fn no_interface_takes_the_name_of_the_loopback() {
    in_namespace(async || {
        plug("eth0", FIRST);
        let error = interface::update(&wanted("lo", FIRST, &[]), WITHIN).await.unwrap_err();
        assert!(matches!(error, NetworkError::LoopbackName(_)), "{error}");
        assert_has(&ip("link show lo"), &["LOOPBACK"]);
    });
}

#[test]
fn addresses_of_both_families_are_replaced() {
    in_namespace(async || {
        plug("eth0", FIRST);
        let old = ["10.0.0.2/24", "10.0.0.3/24", "192.168.7.1/32", "fd00::2/64"];
        assert_eq!(update(&wanted("eth0", FIRST, &old)).await.addresses.len(), 4);
        let new = ["10.0.0.3/24", "10.0.0.9/16", "fd00::3/64"];
        update(&wanted("eth0", FIRST, &new)).await;
        let text = ip("addr show eth0");
        assert_has(&text, &["inet 10.0.0.3/24", "inet 10.0.0.9/16", "inet6 fd00::3/64"]);
        for gone in ["10.0.0.2/", "192.168.7.1", "fd00::2/"] {
            assert!(!text.contains(gone), "{gone} is still in:\n{text}");
        }
    });
}

#[test]
fn the_link_local_address_stays_and_an_ipv6_address_is_of_use_at_once() {
    in_namespace(async || {
        plug("eth0", FIRST);
        ip("link set eth0 up");
        // The kernel gives it one when it gets to it.
        let begin = std::time::Instant::now();
        while !ip("-6 addr show eth0").contains("fe80::ff:fe00:1/64") {
            assert!(begin.elapsed() < std::time::Duration::from_secs(20), "no link-local address");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        update(&wanted("eth0", FIRST, &["fd00::2/64"])).await;
        assert_has(&ip("-6 addr show eth0"), &["fe80::ff:fe00:1/64"]);
        let text = ip("-6 addr show dev eth0 scope global");
        assert!(text.contains("fd00::2/64") && !text.contains("tentative"), "{text}");
    });
}

#[test]
fn an_interface_may_go_without_address_resolution() {
    in_namespace(async || {
        plug("eth0", FIRST);
        let request = Interface { flags: link::NOARP, ..wanted("eth0", FIRST, &[]) };
        update(&request).await;
        assert_has(&ip("link show eth0"), &["NOARP"]);
        update(&wanted("eth0", FIRST, &[])).await;
        assert!(!ip("link show eth0").contains("NOARP"));
    });
}

#[test]
fn an_interface_that_is_plugged_in_later_is_waited_for() {
    in_namespace(async || {
        let request = wanted("eth0", FIRST, &["10.0.0.2/24"]);
        let (now, ()) = tokio::join!(update(&request), async {
            // One that is not it comes first.
            tokio::time::sleep(Duration::from_millis(50)).await;
            plug("veth6", SECOND);
            tokio::time::sleep(Duration::from_millis(50)).await;
            plug("veth7", FIRST);
        });
        assert_eq!(now.name, "eth0");
    });
}

#[test]
fn an_unknown_hardware_address_is_an_error_that_lists_what_there_is() {
    in_namespace(async || {
        plug("eth0", FIRST);
        let within = Duration::from_millis(20);
        let error = interface::update(&wanted("eth1", SECOND, &[]), within).await.unwrap_err();
        assert!(matches!(error, NetworkError::NoLink { .. }));
        assert_has(
            &error.to_string(),
            &[
                "address 02:00:00:00:00:02 appeared within 20ms",
                "lo (00:00:00:00:00:00)",
                "eth0 (02:00:00:00:00:01)",
            ],
        );
    });
}

#[test]
fn the_loopback_is_no_interface_of_the_hosts() {
    in_namespace(async || {
        let nobody = wanted("eth0", "00:00:00:00:00:00", &[]);
        let error = interface::update(&nobody, Duration::from_millis(1)).await.unwrap_err();
        assert!(matches!(error, NetworkError::NoLink { .. }), "{error}");
    });
}

#[test]
fn a_route_to_the_gateway_is_made_before_the_route_through_it() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/32", "fd00::2/128"])).await;
        let routes =
            ["0.0.0.0/0 via 10.9.0.1 eth0", "::/0 via fd09::1 eth0", "10.9.0.1/32 eth0", "fd09::1/128 eth0"];
        route::replace(routes.map(route).into()).unwrap();
        assert_has(&ip("route"), &["default via 10.9.0.1 dev eth0 proto static", "10.9.0.1 dev eth0"]);
        assert_has(
            &ip("-6 route"),
            &["default via fd09::1 dev eth0 proto static metric 1024", "fd09::1 dev eth0"],
        );
    });
}

#[test]
fn source_mtu_and_a_gateway_taken_on_trust_reach_the_kernel_and_come_back() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/32", "fd00::2/128"])).await;
        for (text, source) in
            [("0.0.0.0/0 via 169.254.1.1 eth0", "10.0.0.2"), ("::/0 via fd01::1 eth0", "fd00::2")]
        {
            let route = Route { source: source.parse().ok(), mtu: 1300, flags: 4, ..route(text) };
            route::replace(vec![route.clone()]).unwrap();
            assert!(route::list().unwrap().contains(&route), "{:?}", route::list());
        }
        assert_has(
            &ip("-6 route show default"),
            &["via fd01::1 dev eth0 proto static src fd00::2", "mtu 1300", "onlink"],
        );
    });
}

#[test]
fn routes_are_replaced_on_all_devices_and_the_kernels_own_stay() {
    in_namespace(async || {
        plug("eth0", FIRST);
        plug("eth1", SECOND);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24", "fd00::2/64"])).await;
        update(&wanted("eth1", SECOND, &["10.1.0.2/24"])).await;
        let old = [
            "10.50.0.0/16 via 10.0.0.1 eth0",
            "fd50::/64 via fd00::1 eth0",
            "10.60.0.0/16 via 10.1.0.1 eth1",
        ];
        route::replace(old.map(route).into()).unwrap();
        route::replace(vec![route("10.70.0.0/16 via 10.0.0.1 eth0")]).unwrap();
        let text = ip("route") + &ip("-6 route");
        let kept = ["10.0.0.0/24 dev eth0 proto kernel", "fd00::/64 dev eth0 proto kernel"];
        assert_has(&text, &kept);
        assert_has(&text, &["10.70.0.0/16 via 10.0.0.1 dev eth0"]);
        assert!(["10.50.0.0", "fd50::", "10.60.0.0"].iter().all(|gone| !text.contains(gone)), "{text}");
        route::replace(Vec::new()).unwrap();
        assert!(!ip("route").contains("static"));
    });
}

#[test]
fn several_routes_to_one_network_keep_their_order_and_can_be_replaced() {
    in_namespace(async || {
        plug("eth0", FIRST);
        plug("eth1", SECOND);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24", "fd00::2/64"])).await;
        update(&wanted("eth1", SECOND, &["10.1.0.2/24", "fd01::2/64"])).await;
        let routes = [
            "0.0.0.0/0 via 10.1.0.1 eth1",
            "0.0.0.0/0 via 10.0.0.1 eth0",
            "::/0 via fd01::1 eth1",
            "::/0 via fd00::1 eth0",
        ];
        for _ in 0..2 {
            route::replace(routes.map(route).into()).unwrap();
            let v4 = [
                "default via 10.1.0.1 dev eth1 proto static ",
                "default via 10.0.0.1 dev eth0 proto static metric 1 ",
            ];
            assert_eq!(ip("route show default").lines().collect::<Vec<_>>(), v4);
            let v6 = ip("-6 route show default");
            let v6: Vec<_> = v6.lines().map(|line| line.trim_end_matches(" pref medium")).collect();
            let expected = [
                "default via fd01::1 dev eth1 proto static metric 1024",
                "default via fd00::1 dev eth0 proto static metric 1025",
            ];
            assert_eq!(v6, expected);
        }
    });
}

#[test]
fn a_route_that_the_kernel_has_already_is_fine() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24"])).await;
        let routes = ["10.0.0.0/24 eth0", "10.0.0.0/24 eth0"].map(route);
        route::replace(routes.clone().into()).unwrap();
        route::replace(routes.into()).unwrap();
        assert_has(&ip("route"), &["10.0.0.0/24 dev eth0"]);
    });
}

#[test]
fn a_refused_route_is_named_with_the_kernels_words() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24"])).await;
        let error = route::replace(vec![route("0.0.0.0/0 via 10.9.9.9 eth0")]).unwrap_err();
        let parts = [
            "adding route 0.0.0.0/0 via 10.9.9.9 of device eth0",
            "Nexthop has invalid gateway",
            "unreachable",
        ];
        assert_has(&crate::chain(&error), &parts);
    });
}

#[test]
fn a_route_of_an_unknown_device_changes_nothing() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24"])).await;
        route::replace(vec![route("0.0.0.0/0 via 10.0.0.1 eth0")]).unwrap();
        let error = route::replace(["10.5.0.0/16 eth0", "10.6.0.0/16 eth5"].map(route).into()).unwrap_err();
        assert!(matches!(&error, NetworkError::NoDevice { name, .. } if name == "eth5"), "{error}");
        assert_has(&ip("route"), &["default via 10.0.0.1"]);
    });
}

#[test]
fn neighbours_of_both_families_are_permanent_and_replaced() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24", "fd00::2/64"])).await;
        for hardware in [FIRST, SECOND] {
            let neighbour = |address: &str| Neighbour {
                address: address.parse::<IpAddr>().unwrap(),
                device: "eth0".into(),
                hardware: hardware.parse().unwrap(),
                state: PERMANENT,
                flags: 0,
            };
            neighbour::add(&["10.0.0.1", "fd00::1"].map(neighbour)).unwrap();
        }
        for address in ["10.0.0.1", "fd00::1"] {
            let entry = format!("{address} lladdr {SECOND} PERMANENT");
            assert_has(&ip("neigh show dev eth0"), &[&entry]);
        }
    });
}

#[test]
fn everything_is_listed_with_its_addresses() {
    in_namespace(async || {
        plug("eth0", FIRST);
        update(&wanted("eth0", FIRST, &["10.0.0.2/24"])).await;
        let listed = interface::list().unwrap();
        let of = |name: &str| listed.iter().find(|interface| interface.name == name).unwrap();
        assert!(of("lo").addresses.contains(&"127.0.0.1/8".parse().unwrap()));
        assert_eq!(of("eth0").hardware.to_string(), FIRST);
        assert!(of("eth0").addresses.contains(&"10.0.0.2/24".parse().unwrap()));
    });
}
