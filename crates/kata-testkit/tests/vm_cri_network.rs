//! Networks of CRI pods as users see them: pods reach each other, and the host's ports lead to them.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kata_testkit::cri::Cri;
use kata_testkit::with_each_cri;

with_each_cri!(pods_reach_each_other_and_ports_of_the_host_lead_to_them);

/// What a web server says, seen from the host.
fn fetch(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.rsplit_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

fn pods_reach_each_other_and_ports_of_the_host_lead_to_them(cri: &mut Cri) {
    let server = cri.pod("server").port(8080, 80).run();
    let script = "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www";
    let _web = server.container("web").sh(script).start();
    let client = cri.pod("client").run();
    let shell = client.container("shell").idle().start();
    let address = server.address();
    assert_eq!(shell.until(&format!("wget -q -O - http://{address}/")), "served\n");
    assert_ne!(address, client.address());
    let other = server.status().network.additional_ips[0].ip.clone();
    assert_eq!(shell.until(&format!("wget -q -O - 'http://[{other}]/'")), "served\n", "over version 6");
    // From the host: by the pod's address, and by the port that is mapped to it.
    for target in [format!("{address}:80"), "10.89.0.1:8080".to_owned()] {
        let on_host = || cri.containerd().on_its_host(|| fetch(&target));
        assert_eq!(cri.host().wait_for("the server", on_host), "served\n", "{target}");
    }
    // A container of the same pod has the same addresses.
    let beside = server.container("beside").idle().start();
    assert_eq!(beside.sh("wget -q -O - http://127.0.0.1/").text(), "served\n");
    server.remove();
    let gone = cri.containerd().on_its_host(|| fetch("10.89.0.1:8080"));
    assert_eq!(gone, None);
    client.remove();
}
