//! Connections of the host to ports of the guest's loopback: what `kubectl port-forward` reaches.
//!
//! The host writes the port's number and a line feed; from then on the bytes are the port's. Where nobody listens, the
//! connection is closed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Most connections at once.
const MOST: usize = 256;
/// How long the host may take to say a port, and a server to be reached.
const PROMPT: Duration = Duration::from_secs(10);
/// Longest line: `65535`.
const LINE_MAX: usize = 5;

/// Serves connections, so many at a time.
#[derive(Clone, Debug)]
pub struct Forwarder(Arc<Semaphore>);

impl Default for Forwarder {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST)))
    }
}

impl Forwarder {
    /// Serves one connection until both sides have ended.
    ///
    /// # Errors
    /// Too many connections, a line that is no port, a port at which nobody listens.
    pub async fn serve(&self, mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
        let full = |_| io::Error::other(format!("{MOST} connections are forwarded already"));
        let _place = self.0.try_acquire().map_err(full)?;
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let mut server = tokio::time::timeout(PROMPT, async { connect(read_port(&mut host).await?).await })
            .await
            .map_err(late)??;
        copy_bidirectional(&mut host, &mut server).await.map(drop)
    }
}

/// Byte by byte: what follows the line is the port's.
async fn read_port(host: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    let mut line = String::new();
    loop {
        match host.read_u8().await? {
            b'\n' => break,
            digit if digit.is_ascii_digit() && line.len() < LINE_MAX => line.push(char::from(digit)),
            _ => return Err(io::Error::other("the host did not say a port")),
        }
    }
    let port = line.parse().map_err(|_| io::Error::other(format!("{line:?} is no port")))?;
    if port == 0 { Err(io::Error::other("0 is no port")) } else { Ok(port) }
}

/// As `localhost` is looked up: by version 4 first.
async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(server) => Ok(server),
        Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.map_err(|_| error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn bytes_go_to_the_port_and_back_until_both_have_ended() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (near, mut far) = tokio::io::duplex(64);
        let forwarder = Forwarder::default();
        let serving = tokio::spawn(async move { forwarder.serve(near).await });
        far.write_all(format!("{port}\nhello").as_bytes()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut heard = [0; 5];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        server.write_all(b"world").await.unwrap();
        drop(server);
        let mut answer = String::new();
        far.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "world");
        drop(far);
        serving.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_at_which_nobody_listens_closes_the_connection() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap().port();
        let line = format!("{free}\n");
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(line.as_bytes()).await.unwrap();
        assert!(Forwarder::default().serve(near).await.is_err());
    }

    proptest! {
        #[test]
        fn only_a_number_and_a_line_feed_are_a_port(line in "[0-9 -]{0,7}", rest in "\\PC*") {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let said = format!("{line}\n{rest}");
            let mut input = said.as_bytes();
            let read = runtime.block_on(read_port(&mut input)).ok();
            let digits = line.len() <= LINE_MAX && line.bytes().all(|byte| byte.is_ascii_digit());
            prop_assert_eq!(read, line.parse().ok().filter(|port| digits && *port != 0));
            if read.is_some() {
                prop_assert_eq!(input, rest.as_bytes(), "what follows is the port's");
            }
        }
    }
}
