//! A pod in figures, collected when they are asked for.
//!
//! `kata_shim_*` is this process, `kata_hypervisor_*` the VMM, `kata_vsock_*` its vsock back end, `kata_virtiofsd_*` the file
//! server with its child, `kata_deprecated_*` what the owner met of it. `kata_agent_*` and `kata_guest_*` come from the guest, and nothing else is taken from there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use kata_api::metrics::{Durations, Exposition, Families, Kind, process};
use kata_sandbox::{AGENT_CALLS, Sandbox};

/// How long this process took to answer its clients, by call.
pub(crate) static CALLS: Durations = Durations::new();

/// The figures of the pod, if there is one yet, and of its owner.
pub(crate) async fn text(pod: Option<&Sandbox>) -> String {
    let mut out = Exposition::default();
    process(&mut out, "kata_shim", "the pod's owner", &["/proc/self"]);
    let mut deprecated = Families::default();
    deprecated.read(&kata_config::deprecation::metrics(), &[], |_| true);
    deprecated.write(&mut out);
    let help = "How long the owner took to answer its clients, by call.";
    CALLS.write(&mut out, "kata_shim_rpc_durations_histogram_milliseconds", help, "action");
    let help = "How long the agent took to answer the owner, by call.";
    AGENT_CALLS.write(&mut out, "kata_shim_agent_rpc_durations_histogram_milliseconds", help, "action");
    if let Some(pod) = pod {
        machine(&mut out, pod);
        start(&mut out, pod).await;
        template(&mut out, pod).await;
        guest(&mut out, pod).await;
    }
    out.into_text()
}

fn machine(out: &mut Exposition, pod: &Sandbox) {
    let mut roles: BTreeMap<_, Vec<PathBuf>> = BTreeMap::new();
    for info in pod.host_processes() {
        let role = match info.name.as_str() {
            "vsock" => ("kata_vsock", "the machine's vsock back end"),
            "virtiofsd" => ("kata_virtiofsd", "the file server"),
            _ => ("kata_hypervisor", "the VMM"),
        };
        roles.entry(role).or_default().extend(with_children(info.pid));
    }
    for ((prefix, of), processes) in &roles {
        process(out, prefix, of, processes);
    }
}

/// A process and those that it started, as directories in /proc.
fn with_children(pid: u32) -> Vec<PathBuf> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse::<u32>().ok());
    std::iter::once(pid).chain(children).map(|pid| PathBuf::from(format!("/proc/{pid}"))).collect()
}

/// The stages of the start. One that came again, as a late interface may, counts with its first time.
async fn start(out: &mut Exposition, pod: &Sandbox) {
    let timeline = pod.inspect().await.timeline;
    let help = "How long each stage of the pod's start took.";
    let mut family = out.family("kata_shim_start_stage_milliseconds", Kind::Gauge, help);
    let mut told = BTreeSet::new();
    for stage in &timeline {
        let labels = [("layer", stage.layer.as_str()), ("stage", stage.name.as_str())];
        if told.insert(labels) {
            family.sample(&labels, Duration::from_micros(stage.duration_us).as_secs_f64() * 1000.0);
        }
    }
}

/// Whether the pod started from a template, where it was to.
async fn template(out: &mut Exposition, pod: &Sandbox) {
    if !pod.config().hypervisor.qemu.factory.enable_template {
        return;
    }
    let Some(copied) = pod.inspect().await.started_from_template() else { return };
    let help = "How the pod's machine came to run, where templates are asked for.";
    let result = if copied { "copied" } else { "booted" };
    out.family("kata_shim_template_starts", Kind::Gauge, help).sample(&[("result", result)], 1.0);
}

/// Most of a guest's text that is looked at; a guest has some 60 kB.
const GUEST_TEXT_MAX: usize = 1 << 20;

/// What the guest says of itself, if it says anything in time.
async fn guest(out: &mut Exposition, pod: &Sandbox) {
    let Ok(guest) = pod.guest() else { return };
    match guest.metrics().await {
        Ok(text) if text.len() > GUEST_TEXT_MAX => {
            tracing::warn!(bytes = text.len(), "the guest tells too much: its figures are left out");
        }
        Ok(text) => {
            let mut families = Families::default();
            let own = |name: &str| name.starts_with("kata_agent_") || name.starts_with("kata_guest_");
            families.read(&text, &[], own);
            families.write(out);
        }
        Err(error) => tracing::warn!(error = error.chain(), "the guest has no figures"),
    }
}
