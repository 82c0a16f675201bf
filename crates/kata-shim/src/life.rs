//! When a standalone pod is over, and when its owner may go.
//!
//! ```text
//!   until_over ──▶ until_delivered ──▶ teardown ──▶ linger ──▶ exit
//!     │               a client that is still there has the output of the container that ended, however slowly it reads
//!     first container ended       a client may still ask how it ended: until one was told and all have hung up,
//!     virtual machine ended       2 s at most; where no container was ever made, as long as one may still come
//!     client or bound ended
//!     SIGTERM, SIGINT, Destroy, Shutdown
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use kata_sandbox::{Event, ProcessId, Sandbox, SandboxError, Status};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use crate::fault::chain;
use crate::ground::{Ground, GroundError};
use crate::reins::{Answer, Reins, Request};

/// How long a pod that nobody is known to be busy with waits for its first container.
const UNUSED_BOUND: Duration = Duration::from_secs(60);
/// How long an ended pod waits for clients that want to know how it ended.
const LINGER: Duration = Duration::from_secs(if cfg!(test) {
    // What does not wait for it is told from a slow machine.
    15
} else {
    2
});

#[derive(Debug, Error)]
pub(crate) enum LifeError {
    #[error("the pod was not torn down completely")]
    Teardown(#[source] SandboxError),
    #[error("the pod's directories were not removed")]
    Clear(#[source] GroundError),
}

#[derive(Debug, Error)]
pub(crate) enum WatchError {
    #[error("cannot watch for signals")]
    Signals(#[source] io::Error),
    #[error("cannot watch the client process {pid}")]
    Client { pid: i32, source: io::Error },
}

/// Why a pod is over, and what follows.
struct End {
    cause: String,
    /// Nobody will look at what is left of it.
    remove: bool,
    /// Nobody has to be told any more: those who are connected are waited for, nobody else.
    told: bool,
    /// The container whose end this is.
    ended: Option<ProcessId>,
}

impl End {
    fn new(cause: impl Into<String>) -> Self {
        Self { cause: cause.into(), remove: false, told: false, ended: None }
    }
}

/// The life of a pod, from its launch to the exit of its owner.
pub(crate) struct Life {
    ground: Ground,
    /// Remove the directories at the end.
    rm: bool,
    sandbox: Sandbox,
    events: broadcast::Receiver<Event>,
    requests: mpsc::UnboundedReceiver<Request>,
    connections: watch::Receiver<usize>,
    watch: Watch,
    /// The container that the pod lives for.
    first: Option<String>,
    started: bool,
    /// Creations under way.
    creating: usize,
    /// When the pod is given up for want of a container.
    unused: Instant,
    told: bool,
    /// The directories are removed: what has their names now is another pod's.
    cleared: bool,
    destroyers: Vec<Answer>,
}

impl Life {
    /// The life of `sandbox`, and the reins for its services.
    pub(crate) fn new(
        sandbox: Sandbox,
        ground: Ground,
        rm: bool,
        watch: Watch,
        connections: watch::Receiver<usize>,
    ) -> (Self, Reins) {
        let (reins, requests) = Reins::new();
        let life = Self {
            ground,
            rm,
            events: sandbox.events(),
            sandbox,
            requests,
            connections,
            watch,
            first: None,
            started: false,
            creating: 0,
            unused: Instant::now() + UNUSED_BOUND,
            told: false,
            cleared: false,
            destroyers: Vec::new(),
        };
        (life, reins)
    }

    /// Lives until the pod is over and torn down, and the process may exit.
    pub(crate) async fn run(mut self) -> Result<(), LifeError> {
        let mut end = self.until_over().await;
        tracing::info!(cause = end.cause, "the pod is over");
        if let Some(process) = end.ended.take() {
            self.until_delivered(&process, &mut end).await;
        }
        self.told |= end.told;
        let mut result = self.sandbox.shutdown().await.map_err(LifeError::Teardown);
        if end.remove {
            result = result.and_then(|()| self.clear());
        }
        for answer in self.destroyers.drain(..) {
            answer.send(told(&result));
        }
        let mut result = self.linger(result).await;
        // One that never held a container has nothing to show once its client knows why.
        if self.rm || (self.first.is_none() && self.told) {
            result = result.and_then(|()| self.clear());
        } else if !self.cleared {
            self.ground.close();
        }
        result
    }

    fn clear(&mut self) -> Result<(), LifeError> {
        if !self.cleared {
            self.ground.clear().map_err(LifeError::Clear)?;
            self.cleared = true;
        }
        Ok(())
    }

    /// Waits for a client that reads slowly, as one with a pager behind it does. Whoever wants the pod's end does not wait,
    /// and without a connection nobody is there to read.
    async fn until_delivered(&mut self, process: &ProcessId, end: &mut End) {
        let sandbox = self.sandbox.clone();
        let delivered = sandbox.delivered(process);
        tokio::pin!(delivered);
        let wanted = loop {
            if *self.connections.borrow_and_update() == 0 {
                return;
            }
            tokio::select! {
                // That there is no such process any more means that its client has deleted it.
                _ = &mut delivered => return,
                Ok(()) = self.connections.changed() => {}
                Some(request) = self.requests.recv() => match request {
                    Request::CreateBegan(_) => self.creating += 1,
                    Request::CreateEnded(_) => self.creating = self.creating.saturating_sub(1),
                    Request::Told => self.told = true,
                    Request::ShutDown(answer) => {
                        answer.done();
                        break None;
                    }
                    Request::Destroy(answer) => break Some(answer),
                },
                _ = self.watch.terminate.recv() => break None,
                _ = self.watch.interrupt.recv() => break None,
            }
        };
        end.told = true;
        end.remove |= wanted.is_some();
        self.destroyers.extend(wanted);
    }

    async fn until_over(&mut self) -> End {
        let Watch { client, terminate, interrupt } = &mut self.watch;
        loop {
            // A client that is watched may take its time: its image may still be on the way.
            let idle = self.first.is_none() && self.creating == 0 && matches!(client, Client::None);
            let end = tokio::select! {
                // A client may end the moment it was told of the start: what was said before its end comes first.
                biased;
                event = self.events.recv() => match event {
                    Ok(event) => after(event, &mut self.first, &mut self.started),
                    Err(RecvError::Lagged(_)) => caught_up(&self.sandbox, &mut self.first).await,
                    Err(RecvError::Closed) => Some(End::new("the pod's task ended")),
                },
                Some(request) = self.requests.recv() => match request {
                    Request::CreateBegan(_) => { self.creating += 1; None }
                    Request::CreateEnded(_) => {
                        self.creating = self.creating.saturating_sub(1);
                        self.unused = Instant::now() + UNUSED_BOUND;
                        None
                    }
                    Request::Told => { self.told = true; None }
                    Request::ShutDown(answer) => {
                        answer.done();
                        Some(End { told: true, ..End::new("a client shut it down") })
                    }
                    Request::Destroy(answer) => {
                        self.destroyers.push(answer);
                        Some(End { remove: true, told: true, ..End::new("a client destroyed it") })
                    }
                },
                () = tokio::time::sleep_until(self.unused), if idle => {
                    let cause = format!("no container was created within {} s", UNUSED_BOUND.as_secs());
                    Some(End { remove: true, told: true, ..End::new(cause) })
                }
                () = client.gone(), if !self.started => {
                    Some(End { remove: true, told: true, ..End::new("its client ended before a container started") })
                }
                _ = terminate.recv() => Some(End { told: true, ..End::new("SIGTERM") }),
                _ = interrupt.recv() => Some(End { told: true, ..End::new("SIGINT") }),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Stays for clients that want to know how the pod ended.
    async fn linger(&mut self, mut result: Result<(), LifeError>) -> Result<(), LifeError> {
        let until = if self.first.is_some() || self.told { Instant::now() + LINGER } else { self.unused };
        while !self.told || self.creating > 0 || *self.connections.borrow_and_update() > 0 {
            tokio::select! {
                Ok(()) = self.connections.changed() => {}
                Some(request) = self.requests.recv() => match request {
                    Request::CreateBegan(_) => self.creating += 1,
                    Request::CreateEnded(_) => self.creating = self.creating.saturating_sub(1),
                    Request::Told => self.told = true,
                    Request::ShutDown(answer) => answer.done(),
                    Request::Destroy(answer) => {
                        result = result.and_then(|()| self.clear());
                        self.told = true;
                        answer.send(told(&result));
                    }
                },
                () = self.watch.client.gone(), if !self.started => {
                    self.told = true;
                    break;
                }
                () = tokio::time::sleep_until(until) => break,
            }
        }
        result
    }
}

/// What an event means for the pod's life.
fn after(event: Event, first: &mut Option<String>, started: &mut bool) -> Option<End> {
    let is_first = |process: &ProcessId, first: &Option<String>| {
        process.exec.is_none() && first.as_ref() == Some(&process.container)
    };
    match event {
        Event::Created { process: ProcessId { container, exec: None } } => {
            first.get_or_insert(container);
            None
        }
        Event::Started { process } => {
            *started |= is_first(&process, first);
            None
        }
        Event::Exited { process, exit } if is_first(&process, first) => {
            let cause = format!("{process} ended with {}", exit.code);
            Some(End { ended: Some(process), ..End::new(cause) })
        }
        Event::Stopped { fault } => {
            Some(End::new(fault.unwrap_or_else(|| "the pod was shut down".to_owned())))
        }
        _ => None,
    }
}

/// Makes up for events that were missed.
async fn caught_up(sandbox: &Sandbox, first: &mut Option<String>) -> Option<End> {
    let pod = sandbox.inspect().await;
    if first.is_none() {
        *first = pod.containers.first().map(|container| container.id.clone());
    }
    let ended = pod
        .containers
        .iter()
        .any(|container| first.as_ref() == Some(&container.id) && container.state == Status::Stopped);
    (ended || pod.state == "stopped")
        .then(|| End::new(pod.fault.unwrap_or_else(|| "its container ended".to_owned())))
}

fn told(result: &Result<(), LifeError>) -> Result<(), String> {
    result.as_ref().map_err(|error| chain(error)).copied()
}

/// What ends a pod from outside its socket.
pub(crate) struct Watch {
    client: Client,
    pub(crate) terminate: Signal,
    pub(crate) interrupt: Signal,
}

impl Watch {
    /// Watches for signals, and for the end of the process `client` that asked for the pod.
    pub(crate) fn new(client: Option<i32>) -> Result<Self, WatchError> {
        let watched = |kind| signal(kind).map_err(WatchError::Signals);
        Ok(Self {
            client: Client::watch(client)?,
            terminate: watched(SignalKind::terminate())?,
            interrupt: watched(SignalKind::interrupt())?,
        })
    }
}

/// The process that asked for the pod.
enum Client {
    /// Nobody to watch.
    None,
    Watched(AsyncFd<OwnedFd>),
    Gone,
}

impl Client {
    fn watch(pid: Option<i32>) -> Result<Self, WatchError> {
        let Some((number, pid)) = pid.and_then(|pid| Some((pid, Pid::from_raw(pid)?))) else {
            return Ok(Self::None);
        };
        let fault = |source| WatchError::Client { pid: number, source };
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => {
                // SAFETY: an OwnedFd stays the same open descriptor until it is dropped, and the AsyncFd owns it.
                let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
                Ok(Self::Watched(fd.map_err(|error| fault(error.into()))?))
            }
            Err(rustix::io::Errno::SRCH) => Ok(Self::Gone),
            Err(error) => Err(fault(error.into())),
        }
    }

    /// Comes back once the process has ended.
    async fn gone(&self) {
        match self {
            Self::None => std::future::pending().await,
            // A pidfd is readable from the end of its process on, and stays so.
            Self::Watched(fd) => drop(fd.readable().await),
            Self::Gone => {}
        }
    }
}
