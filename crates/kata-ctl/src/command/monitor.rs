//! `monitor`

use std::io::{self, Write};
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use crate::cli::MonitorArgs;
use crate::failure::Failure;
use crate::monitor;

/// Serves until it is told to end.
pub async fn run(args: &MonitorArgs) -> Outcome {
    let listener = TcpListener::bind(args.listen).await.map_err(|error| {
        Failure::text(format!("cannot listen on {}: {error}; give another --listen", args.listen))
    })?;
    let address = listener.local_addr()?;
    // Whoever started it can wait for this line.
    writeln!(io::stdout(), "listening on http://{address}/")?;
    io::stdout().flush()?;
    warn_if_open(address);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        () = monitor::serve(listener) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(0)
}

fn warn_if_open(address: SocketAddr) {
    if !address.ip().is_loopback() {
        eprintln!(
            "kata-ctl: {address} is not a loopback address: whoever reaches it sees this host's pods and their commands, and \
             nothing asks who they are"
        );
    }
}
