//! The text of a policy.
//!
//! It reads the same in both versions of Rego. Every request of the protocol has a rule in it: what is denied is seen to be.

use std::fmt::Write as _;

use kata_policy::shapes;

use super::container::Container;
use super::notes;
use crate::failure::Failure;

/// Rules that are the same for all pods; they read `containers` and `host_rootfs`.
const RULES: [&str; 3] =
    [include_str!("rego/create.rego"), include_str!("rego/storage.rego"), include_str!("rego/files.rego")];
/// Only what the pod itself asks to be executed.
const EXEC: &str = include_str!("rego/exec.rego");
/// Only what containers read that are said to.
const STDIN: &str = include_str!("rego/stdin.rego");

/// Requests that have rules of their own.
const RULED: [&str; 7] = [
    "CopyFileRequest",
    "CreateContainerRequest",
    "CreateSandboxRequest",
    "ExecProcessRequest",
    "ReadStreamRequest",
    "RemoveRequest",
    "WriteStreamRequest",
];

/// Requests that a runtime makes in the life of each pod, and that give it no more than it has.
const HARMLESS: [&str; 25] = [
    "AddARPNeighborsRequest",
    "CloseStdinRequest",
    "DestroySandboxRequest",
    "GetMetricsRequest",
    "GetOOMEventRequest",
    "GuestDetailsRequest",
    "ListInterfacesRequest",
    "ListRoutesRequest",
    "MemHotplugByProbeRequest",
    "OnlineCPUMemRequest",
    "PauseContainerRequest",
    "RemoveContainerRequest",
    "RemoveStaleVirtiofsShareMountsRequest",
    "ReseedRandomDevRequest",
    "ResumeContainerRequest",
    "SetGuestDateTimeRequest",
    "SignalProcessRequest",
    "StartContainerRequest",
    "StatsContainerRequest",
    "TtyWinResizeRequest",
    "UpdateContainerRequest",
    "UpdateInterfaceRequest",
    "UpdateRoutesRequest",
    "VolumeStatsRequest",
    "WaitProcessRequest",
];

/// What the user asked for beyond the containers.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// Every command may be executed.
    pub exec: bool,
    /// The host may read what containers write.
    pub logs: bool,
    /// The host may connect to the guest's loopback.
    pub forward: bool,
    /// Root file systems come from the host.
    pub host_rootfs: bool,
}

/// The policy of a pod with these containers; `source` is where they are from.
///
/// # Errors
/// None that are known: serialising these types cannot fail.
pub fn policy(source: &str, containers: &[Container], wishes: Wishes) -> Result<String, Failure> {
    let source = line(source);
    let notes = notes::of(containers, wishes);
    let notes: String = notes.iter().map(|note| format!("#  - {}\n", line(note))).collect();
    let mut text = format!(
        "# Which requests of the host the guest serves. Made by kata-ctl policy generate; for {source}.\n\
         #\n# It does not hold:\n{notes}\
         package agent_policy\n\n\
         import future.keywords.contains\nimport future.keywords.every\nimport future.keywords.if\nimport future.keywords.in\n\n\
         # Whether root file systems come from the host, and not from images that the guest pulls.\n\
         host_rootfs := {}\n\ncontainers := {:#}\n\n{}\n",
        wishes.host_rootfs,
        serde_json::to_value(containers)?,
        RULES.join("\n"),
    );
    let mut rule = |name: &str, allowed: bool| {
        // Writing to a String never fails.
        let _ = writeln!(text, "{name} := {allowed}");
    };
    rule("ReadStreamRequest", wishes.logs);
    rule("ForwardRequest", wishes.forward);
    if wishes.exec {
        rule("ExecProcessRequest", true);
        rule("WriteStreamRequest", true);
    }
    for name in HARMLESS {
        rule(name, true);
    }
    for name in others() {
        rule(name, false);
    }
    if !wishes.exec {
        text = [text.as_str(), EXEC, STDIN].join("\n");
    }
    Ok(text)
}

/// Text that ends no comment.
fn line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Requests that no pod needs.
fn others() -> Vec<&'static str> {
    let mut names: Vec<&str> = shapes().values().map(kata_policy::Shape::name).collect();
    names.retain(|name| !RULED.contains(name) && !HARMLESS.contains(name));
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_that_is_named_is_one_of_the_protocol() {
        let names: Vec<&str> = shapes().values().map(kata_policy::Shape::name).collect();
        for name in RULED.into_iter().chain(HARMLESS) {
            assert!(names.contains(&name), "{name}");
        }
        assert!(others().contains(&"SetPolicyRequest"), "{:?}", others());
    }
}
