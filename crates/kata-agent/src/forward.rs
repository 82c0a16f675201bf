//! Ways from the host to what listens on the guest's loopback: `kubectl port-forward` ends here.
//!
//! ```text
//!  host ══ vsock 1029 ══▶ Forward { port } ── TCP ──▶ 127.0.0.1:port, else [::1]:port
//! ```
//!
//! A process in the guest may listen on either address and mean both, and clients ask for `localhost`, so the other
//! address is tried where the one that is asked for refuses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use kata_api::{Forward, Forwarded};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;

/// Ways at a time.
pub const MOST: usize = 128;
/// How long the host may take to say where it wants to go.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection to the loopback may take: a listener whose queue is full does not answer.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// Serves one connection to its end. A half that is closed stays closed alone, so a client can send all it has and still
/// read the answer.
///
/// # Errors
/// A request that is none, and what broke the connection.
pub async fn serve(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut request = [0; Forward::LENGTH];
    tokio::time::timeout(REQUEST_WITHIN, host.read_exact(&mut request)).await??;
    let Some(forward) = Forward::decode(request) else {
        host.write_all(&[Forwarded::Failed.encode()]).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("no destination: {request:?}")));
    };
    let connected = connect(forward).await;
    let answer = match &connected {
        Ok(_) => Forwarded::Connected,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Forwarded::Refused,
        Err(_) => Forwarded::Failed,
    };
    host.write_all(&[answer.encode()]).await?;
    copy_bidirectional(&mut host, &mut connected?).await.map(drop)
}

async fn connect(forward: Forward) -> io::Result<TcpStream> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let (first, second) = if forward.v6 { (v6, v4) } else { (v4, v6) };
    let dial = async |address: IpAddr| -> io::Result<TcpStream> {
        let dialled = TcpStream::connect(SocketAddr::new(address, forward.port));
        let stream = tokio::time::timeout(CONNECT_WITHIN, dialled).await??;
        // What a client sends by the byte, it wants there by the byte.
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    match dial(first).await {
        // A guest without IPv6 has no such address, and the first answer tells more.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused || forward.v6 => {
            dial(second).await.map_err(|_| error)
        }
        dialled => dialled,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::net::TcpListener;

    use super::*;

    async fn asked(request: &[u8]) -> (tokio::io::DuplexStream, u8) {
        let (mut host, guest) = duplex(1024);
        tokio::spawn(serve(guest));
        host.write_all(request).await.unwrap();
        let answer = host.read_u8().await.unwrap();
        (host, answer)
    }

    /// Answers one client with what it sent, once that is all.
    async fn echo(address: &str) -> u16 {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut text = Vec::new();
            client.read_to_end(&mut text).await.unwrap();
            client.write_all(&text).await.unwrap();
        });
        port
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_one_half_closes_before_the_other() {
        let port = echo("127.0.0.1").await;
        let (mut host, answer) = asked(&Forward { v6: false, port }.encode()).await;
        assert_eq!(answer, Forwarded::Connected.encode());
        host.write_all(b"over here").await.unwrap();
        host.shutdown().await.unwrap();
        let mut text = String::new();
        host.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "over here");
    }

    #[tokio::test]
    async fn listener_of_the_other_address_is_found() {
        let port = echo("127.0.0.1").await;
        let (_host, answer) = asked(&Forward { v6: true, port }.encode()).await;
        assert_eq!(answer, Forwarded::Connected.encode());
    }

    #[tokio::test]
    async fn port_that_nobody_listens_on_is_refused_and_the_connection_ends() {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let (mut host, answer) = asked(&Forward { v6: false, port }.encode()).await;
        assert_eq!(answer, Forwarded::Refused.encode());
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn request_that_is_none_is_answered_and_ends() {
        let (mut host, answer) = asked(b"GET ").await;
        assert_eq!(answer, Forwarded::Failed.encode());
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
