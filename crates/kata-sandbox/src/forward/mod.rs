//! Ports of the pod's loopback, for `kubectl port-forward`.
//!
//! containerd forwards a port by connecting to `localhost` in the pod's network namespace. There the owner is; the loopback
//! of the containers is the guest's:
//!
//! ```text
//!  containerd ── 127.0.0.1:80 ──▶ owner's listener ── vsock ──▶ agent ── 127.0.0.1:80 ──▶ container
//!    in the pod's namespace         for all ports, by [`lookup`]
//! ```
//!
//! A client is connected before it is known whether anybody listens in the guest; where nobody does, its connection is closed.

mod lookup;

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::ports;
use lookup::Lookup;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::hybrid;

/// Most connections at once; further ones wait.
const MOST: usize = 128;
/// How long the guest may take to take a connection.
const PROMPT: Duration = Duration::from_secs(10);
/// After a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Forwards the ports of the loopback of the calling process's network namespace, which must be the pod's, into the guest behind
/// `hybrid`, for as long as it is polled. A host that cannot is told of once.
pub(crate) async fn serve(hybrid: PathBuf) {
    match listen() {
        Ok((listener, _lookup)) => accept(&listener, &hybrid).await,
        Err(error) => {
            tracing::warn!(%error, "ports cannot be forwarded into the pod (kubectl port-forward): needs Linux 5.9 and CAP_BPF");
        }
    }
}

fn listen() -> io::Result<(TcpListener, Lookup)> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    listener.set_nonblocking(true)?;
    let lookup = Lookup::attach(&listener)?;
    Ok((TcpListener::from_std(listener)?, lookup))
}

async fn accept(listener: &TcpListener, hybrid: &Path) {
    let places = Arc::new(Semaphore::new(MOST));
    // They end with this future.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                let hybrid = hybrid.to_owned();
                connections.spawn(async move {
                    if let Err(error) = forward(client, &hybrid).await {
                        tracing::debug!(%error, "a forwarded connection");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!(%error, "accepting a connection to be forwarded");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

async fn forward(mut client: TcpStream, hybrid: &Path) -> io::Result<()> {
    let address = client.local_addr()?;
    // Whoever connects to the listener's own address has not been led here.
    if !address.ip().is_loopback() {
        return Ok(());
    }
    let guest = hybrid::connect_within(hybrid, ports::FORWARD, PROMPT).await.map_err(io::Error::other)?;
    let mut guest = guest.stream;
    guest.write_all(format!("{}\n", address.port()).as_bytes()).await?;
    copy_bidirectional(&mut client, &mut guest).await.map(drop)
}
