//! `run`
//!
//! ```text
//!   spawn the owner ──▶ it boots the VM ───────────────────────────┐
//!        └─▶ image: resolve, verify, unpack ─▶ writable layer, bundle ─▶ Create ─▶ Start ─▶ streams … exit code
//! ```
//!
//! Whatever fails or is interrupted before the command has started, the pod is destroyed and nothing of it stays.

use std::future::Future;
use std::time::Instant;

use kata_oci::Interrupt;

use super::timing::Stopwatch;
use super::{Outcome, exit_code};
use crate::bundle;
use crate::cli::RunArgs;
use crate::failure::{self, Failure, chain};
use crate::pod::{
    CallError, Client, CreateContainer, Owner, OwnerError, RawTerminal, Session, Signals, StreamPaths,
    Streams, Wanted,
};

mod plan;
mod root;

pub use plan::Plan;
use root::Root;

/// What a pod says of a process whose virtual machine ended under it.
const MACHINE_ENDED: u32 = 255;

/// Runs a command in a new pod. `began` is when this process did.
pub async fn run(args: RunArgs, began: Instant) -> Outcome {
    let plan = Plan::make(args)?;
    let mut signals = Signals::catch()?;
    let mut watch = Stopwatch::new(began);
    let mut owner = Owner::spawn(&plan.pod, &plan.owner)?;
    watch.owner_spawned();
    let interrupt = Interrupt::default();
    let begun = tokio::select! {
        begun = begin(&plan, &mut owner, &interrupt, &mut watch) => begun,
        signal = signals.ending() => Err(Failure::silent(exit_code(128 + signal))),
    };
    let begun = match begun {
        Ok(begun) => begun,
        Err(failure) => {
            interrupt.set();
            abandon(owner).await;
            return Err(failure);
        }
    };
    match begun.streams {
        None => {
            println!("{}", plan.pod.name);
            Ok(0)
        }
        Some(streams) => attended(&plan, owner, begun.client, streams, &mut signals, watch).await,
    }
}

/// A pod whose command runs.
struct Begun {
    client: Client,
    /// Absent where the pod keeps its output itself.
    streams: Option<Streams>,
}

async fn begin(
    plan: &Plan,
    owner: &mut Owner,
    interrupt: &Interrupt,
    watch: &mut Stopwatch,
) -> Result<Begun, Failure> {
    let serving = async { owner.serving().await.map_err(Failure::from) };
    let prepared = timed(plan.root(interrupt));
    let (client, (root, times)) = tokio::try_join!(serving, prepared)?;
    watch.stage("image", times.0, times.1);
    let start = Instant::now();
    let (container, streams) = prepare(plan, &root)?;
    watch.stage("bundle", start, Instant::now());
    let paths = streams.as_ref().map_or_else(|| StreamPaths::logs(&plan.pod), StreamPaths::of);
    let start = Instant::now();
    client.create(container, &paths).await.map_err(CallError::into_start_failure)?;
    let created = Instant::now();
    watch.stage("create (waits for the machine)", start, created);
    client.init().start().await.map_err(CallError::into_start_failure)?;
    watch.stage("start", created, Instant::now());
    Ok(Begun { client, streams })
}

async fn timed<T>(
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<(T, (Instant, Instant)), Failure> {
    let start = Instant::now();
    let done = work.await?;
    Ok((done, (start, Instant::now())))
}

/// Writes what the container is made of into the pod's directories, which the owner has made by now.
fn prepare(plan: &Plan, root: &Root) -> Result<(CreateContainer, Option<Streams>), Failure> {
    let rootfs = root.mount(&plan.pod)?;
    let stack = root.stack(&plan.pod);
    let bundle = plan.pod.bundle();
    bundle::write(&bundle, &plan.request, root.defaults(), &stack)?;
    let wanted = Wanted { stdin: plan.interactive, stderr: !plan.request.terminal };
    let streams = if plan.detach { None } else { Some(Streams::make(&plan.pod.io(), "", wanted)?) };
    Ok((CreateContainer { bundle, rootfs, terminal: plan.request.terminal }, streams))
}

async fn attended(
    plan: &Plan,
    mut owner: Owner,
    client: Client,
    streams: Streams,
    signals: &mut Signals,
    watch: Stopwatch,
) -> Outcome {
    // Asked while the pod runs for sure; told after it, so as not to mix with its output.
    let inspection = plan.timing.then(|| {
        let client = client.clone();
        tokio::spawn(async move { client.inspect().await })
    });
    let raw = plan.interactive && plan.request.terminal;
    let terminal = if raw { Some(RawTerminal::enter()?) } else { None };
    let ended = Session::attach(client.init(), streams, terminal).run(signals).await;
    let ended = match ended {
        Ok(code) => explained(code, &client).await,
        Err(error) => {
            abandon(owner).await;
            return Err(error.into());
        }
    };
    // The owner leaves when its clients have.
    drop(client);
    let told = match inspection {
        Some(inspection) => inspection.await.ok(),
        None => None,
    };
    if let Err(error) = owner.ended().await {
        eprintln!("kata-ctl: {}", chain(&error));
    }
    match told {
        Some(Ok(pod)) => eprint!("{}", watch.report(&pod)),
        Some(Err(error)) => eprintln!("kata-ctl: no timing: {}", chain(&error)),
        None => {}
    }
    ended
}

/// A command's own code, unless the machine ended under it.
async fn explained(code: u32, client: &Client) -> Outcome {
    if code == MACHINE_ENDED
        && let Ok(pod) = client.inspect().await
        && !pod.fault.is_empty()
    {
        let failure = Failure::text(format!("the pod has failed: {}", pod.fault));
        return Err(Failure { code: Some(failure::OURS), ..failure });
    }
    Ok(exit_code(code))
}

/// Takes the pod away. That it failed has been, or will be, told; here only what stays behind is.
async fn abandon(owner: Owner) {
    let abandoned: Result<(), OwnerError> = owner.abandon().await;
    if let Err(error) = abandoned {
        eprintln!("kata-ctl: {}", chain(&error));
    }
}
