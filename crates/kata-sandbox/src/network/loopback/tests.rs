use std::io::ErrorKind;

use kata_testkit::netns::Netns;
use tokio::net::UnixListener;

use super::*;

/// The machine's vsock socket, with an agent behind it that answers `answer`, and then with the port asked for.
fn agent(answer: Forwarded) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hvsock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((mut host, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut line = [0; "CONNECT 1029\n".len()];
                host.read_exact(&mut line).await.unwrap();
                assert_eq!(&line, b"CONNECT 1029\n");
                host.write_all(b"OK 7\n").await.unwrap();
                let mut request = [0; Forward::LENGTH];
                host.read_exact(&mut request).await.unwrap();
                let Forward { v6, port } = Forward::decode(request).unwrap();
                host.write_all(&[answer.encode()]).await.unwrap();
                if answer == Forwarded::Connected {
                    host.write_all(format!("{v6} {port} ").as_bytes()).await.unwrap();
                    let (mut from, mut to) = host.split();
                    tokio::io::copy(&mut from, &mut to).await.unwrap();
                }
            });
        }
    });
    (dir, path)
}

/// A namespace whose loopback is led there.
fn led(answer: Forwarded) -> Option<(Netns, tempfile::TempDir)> {
    let netns = Netns::enter()?;
    let (dir, path) = agent(answer);
    let loopback = Loopback::open().unwrap();
    // Only now, as in a namespace that plugins fill late.
    netns.run("ip link set lo up");
    tokio::spawn(async move { loopback.serve(&path, "pod").await });
    Some((netns, dir))
}

async fn ask(address: &str) -> String {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"echo").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn connection_to_any_port_of_the_loopback_is_the_guests() {
    let Some(_world) = led(Forwarded::Connected) else { return };
    assert_eq!(ask("127.0.0.1:80").await, "false 80 echo");
    assert_eq!(ask("127.0.0.1:54321").await, "false 54321 echo");
    assert_eq!(ask("[::1]:8080").await, "true 8080 echo");
}

#[tokio::test]
async fn port_that_nobody_in_the_guest_listens_on_is_a_reset() {
    let Some(_world) = led(Forwarded::Refused) else { return };
    let mut client = TcpStream::connect("127.0.0.1:80").await.unwrap();
    let error = client.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn other_addresses_of_the_namespace_are_left_alone() {
    let Some((netns, _dir)) = led(Forwarded::Connected) else { return };
    netns.veth("eth0");
    netns.run("ip addr add 10.1.0.2/24 dev eth0");
    for address in ["127.0.0.11:53", "10.1.0.2:80"] {
        let error = TcpStream::connect(address).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
    }
    let own = TcpListener::bind("127.0.0.11:53").await.unwrap();
    let (asked, accepted) = tokio::join!(TcpStream::connect("127.0.0.11:53"), own.accept());
    asked.unwrap();
    accepted.unwrap();
}

#[tokio::test]
async fn nothing_is_led_once_it_has_ended() {
    let Some(netns) = Netns::enter() else { return };
    netns.run("ip link set lo up");
    let loopback = Loopback::open().unwrap();
    drop(TcpStream::connect("127.0.0.1:80").await.unwrap());
    drop(loopback);
    let error = TcpStream::connect("127.0.0.1:80").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_their_turn() {
    let Some(_world) = led(Forwarded::Connected) else { return };
    let mut clients = Vec::new();
    for _ in 0..MOST {
        let mut client = TcpStream::connect("127.0.0.1:80").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'f');
        clients.push(client);
    }
    let mut late = TcpStream::connect("127.0.0.1:80").await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(200), late.read_u8()).await;
    assert!(early.is_err(), "{early:?}");
    clients.pop();
    assert_eq!(late.read_u8().await.unwrap(), b'f');
}
