//! `inspect`: everything known about a pod in one document.

use std::path::Path;

use kata_api::control::{Container, Pod, Stage};
use serde_json::{Value, json};

use super::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::pod::{Client, PodDir, PodState};

/// Prints the document.
pub async fn run(args: &crate::cli::InspectArgs) -> Outcome {
    let pod = PodDir::existing(&args.pod)?;
    output::document(&describe(&pod).await?)?;
    Ok(0)
}

/// What the owner says, or where there is none what it left, with where everything is.
///
/// # Errors
/// The pod's state cannot be read.
pub async fn describe(pod: &PodDir) -> Result<Value, Failure> {
    let stored = PodState::load(&pod.run_dir)?;
    let alive = stored.as_ref().is_none_or(PodState::owner_lives);
    let mut document = match live(pod, alive).await {
        Some(document) => document,
        None => stored_text(&pod.run_dir)?,
    };
    if let Some(document) = document.as_object_mut() {
        document.insert("owner_lives".to_owned(), alive.into());
        document.insert("namespace".to_owned(), json!(pod.namespace()));
        document.insert("paths".to_owned(), paths(pod));
        document.insert("made_on_host".to_owned(), record(&pod.leak_record()).into());
    }
    Ok(document)
}

async fn live(pod: &PodDir, alive: bool) -> Option<Value> {
    if !alive {
        return None;
    }
    let client = Client::connect(pod).await.ok()?;
    // An owner under containerd that has no container yet has nothing to tell.
    let seen = client.inspect().await.ok()?;
    let mut containers = Vec::new();
    for container in &seen.containers {
        containers.push(describe_container(&client, container).await);
    }
    Some(describe_pod(&seen, &containers))
}

fn describe_pod(pod: &Pod, containers: &[Value]) -> Value {
    let stage = |stage: &Stage| json!({ "layer": stage.layer, "name": stage.name, "start_us": stage.start_us, "duration_us": stage.duration_us });
    let timeline: Vec<Value> = pod.timeline.iter().map(stage).collect();
    json!({
        "id": pod.id,
        "state": pod.state,
        "owner_pid": pod.owner_pid,
        "vmm_pid": (pod.vmm_pid > 0).then_some(pod.vmm_pid),
        "created_at_ms": pod.created_at_ms,
        "hypervisor": pod.hypervisor,
        "accelerator": pod.accelerator,
        "choice": pod.choice,
        "guest_kernel": pod.guest_kernel,
        "agent_version": pod.agent_version,
        "debug_console": pod.debug_console,
        "config": serde_json::from_str::<Value>(&pod.config).unwrap_or_default(),
        "containers": containers,
        "timeline": timeline,
        "fault": (!pod.fault.is_empty()).then_some(&pod.fault),
    })
}

async fn describe_container(client: &Client, container: &Container) -> Value {
    let stopped = container.state == "stopped";
    let bundle = client.bundle(&container.id).await.ok();
    let spec = bundle.as_ref().and_then(|bundle| {
        let text = std::fs::read(bundle.join("config.json")).ok()?;
        serde_json::from_slice::<Value>(&text).ok()
    });
    let annotations = spec.as_ref().and_then(|spec| spec.get("annotations")).cloned();
    json!({
        "id": container.id,
        "state": container.state,
        "args": container.args,
        "exit_code": stopped.then_some(container.exit_code),
        "exited_at_ms": stopped.then_some(container.exited_at_ms),
        "bundle": bundle,
        "annotations": annotations,
    })
}

/// `state.json` as it is: it has the same names.
fn stored_text(run_dir: &Path) -> Result<Value, Failure> {
    match std::fs::read(run_dir.join("state.json")) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(json!({ "state": "creating" })),
        Err(error) => Err(error.into()),
    }
}

fn paths(pod: &PodDir) -> Value {
    json!({
        "run_dir": pod.run_dir,
        "state_dir": pod.state_dir,
        "owner_log": pod.owner_log(),
        "socket": pod.socket(),
        "vsock": pod.hybrid(),
    })
}

/// What the pod has made on this host and not yet undone.
fn record(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}
