//! Watches over the processes of one machine and finds out why it ended.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::broadcast;
use tokio::task::JoinHandle;

use super::Shared;
use super::qmp::{Event, QmpError};
use crate::life::{Life, SETTLE, kill};
use crate::process::{Child, Exit};
use crate::vm::{HypervisorError, VmExit};

/// What QEMU and the guest said about the end before it came.
#[derive(Debug, Default)]
pub(super) struct LastWords {
    /// The reason in QEMU's SHUTDOWN event.
    reason: Option<String>,
    /// The guest told of a panic.
    panicked: bool,
}

/// Keeps what matters of QEMU's events, until QEMU closes the channel.
pub(super) async fn listen(shared: Arc<Shared>, mut events: broadcast::Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::Shutdown { reason }) => shared.state().last_words.reason = Some(reason),
            Ok(Event::GuestPanicked) => shared.state().last_words.panicked = true,
            Ok(Event::Stop | Event::Resume | Event::DeviceDeleted { .. } | Event::Taken { .. }) => {}
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Waits until QEMU or the vsock back end has ended, ends the other, and publishes the reason.
pub(super) async fn supervise(shared: Arc<Shared>, qemu: Child, vsock: Child, console: JoinHandle<()>) {
    let lost = tokio::select! {
        biased;
        _ = qemu.wait() => None,
        exit = vsock.wait() => match tokio::time::timeout(SETTLE, qemu.wait()).await {
            // QEMU went first: the back end ends with its peer.
            Ok(_) => None,
            Err(_) => Some(exit),
        },
    };
    let stopping = shared.life.stopping();
    kill(&qemu);
    kill(&vsock);
    let exit = qemu.wait().await;
    let back_end_exit = vsock.wait().await;
    let listener = shared.state().listener.take();
    for reader in [Some(console), listener].into_iter().flatten() {
        // A reader that does not come to an end has nothing more to say.
        let _ = tokio::time::timeout(SETTLE, reader).await;
    }
    let verdict = match lost {
        _ if stopping => VmExit::Stopped,
        Some(exit) => {
            VmExit::BackEndLost { name: vsock.name().to_owned(), exit, output: vsock.output_tail() }
        }
        None => verdict(&shared.life, exit, &qemu.output_tail(), &shared.state().last_words),
    };
    tracing::debug!(%verdict, ?back_end_exit, "virtual machine has ended");
    shared.life.end(verdict);
}

fn verdict(life: &Life, exit: Exit, output: &str, last_words: &LastWords) -> VmExit {
    match life.verdict(exit, output, last_words.panicked) {
        // Somebody sent SIGTERM; QEMU's output names the sender.
        VmExit::Clean if last_words.reason.as_deref() == Some("host-signal") => {
            VmExit::Code(0, output.to_owned())
        }
        verdict => verdict,
    }
}

/// Why there was no greeting: the first process to have ended is rarely the whole story, what QEMU said is.
pub(super) async fn explain(
    error: QmpError,
    stopping: bool,
    program: &Path,
    qemu: &Child,
    vsock: &Child,
) -> HypervisorError {
    if stopping {
        return HypervisorError::Ended(VmExit::Stopped);
    }
    let qemu_exit = tokio::time::timeout(SETTLE, qemu.wait()).await.ok();
    let vsock_exit = if qemu_exit.is_some() {
        tokio::time::timeout(SETTLE, vsock.wait()).await.ok()
    } else {
        vsock.exit()
    };
    let said = qemu.output_tail();
    let back_end = vsock_exit.filter(|exit| match qemu_exit {
        None => true,
        Some(_) => *exit != Exit::Code(0) && said.contains("vhost"),
    });
    match (back_end, qemu_exit) {
        (Some(exit), _) => {
            HypervisorError::BackEndLost { name: vsock.name().to_owned(), exit, output: vsock.output_tail() }
        }
        (None, Some(exit)) => HypervisorError::Refused { program: program.to_owned(), exit, output: said },
        (None, None) => match error {
            QmpError::Timeout { bound, .. } => HypervisorError::Unresponsive {
                program: program.to_owned(),
                bound,
                waits_for: "the vsock or virtio-fs process to speak vhost-user, or the host is overloaded",
                output: said,
            },
            error => error.into(),
        },
    }
}
