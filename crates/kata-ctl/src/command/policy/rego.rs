//! The text of a policy.
//!
//! It reads the same in both versions of Rego. Every request of the protocol has a rule in it: what is denied is seen to be.

use std::fmt::Write as _;

use kata_policy::shapes;

use super::container::Container;
use crate::failure::Failure;

/// Rules that are the same for all pods; they read `containers`.
const CREATE: &str = include_str!("create.rego");

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
}

/// The policy of a pod with these containers; `source` is where they are from.
///
/// # Errors
/// None that are known: serialising these types cannot fail.
pub fn policy(source: &str, containers: &[Container], wishes: Wishes) -> Result<String, Failure> {
    let source: String = source.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut text = format!(
        "# Which requests of the host the guest serves. Made by kata-ctl policy generate; for {source}.\n\
         package agent_policy\n\n\
         import future.keywords.contains\nimport future.keywords.every\nimport future.keywords.if\nimport future.keywords.in\n\n\
         containers := {:#}\n\n{CREATE}\n",
        serde_json::to_value(containers)?
    );
    let mut rule = |name: &str, allowed: bool| {
        // Writing to a String never fails.
        let _ = writeln!(text, "{name} := {allowed}");
    };
    rule("ReadStreamRequest", wishes.logs);
    rule("WriteStreamRequest", wishes.exec || containers.iter().any(|container| container.stdin));
    rule("ForwardRequest", wishes.forward);
    if wishes.exec {
        rule("ExecProcessRequest", true);
    }
    for name in HARMLESS {
        rule(name, true);
    }
    for name in others() {
        rule(name, false);
    }
    if !wishes.exec {
        text.push_str(EXEC);
    }
    Ok(text)
}

/// Only what the pod itself asks to be executed.
const EXEC: &str = "
# Probes and hooks of the pod.
default ExecProcessRequest := false

ExecProcessRequest if {
\tsome container in containers
\tinput.process.Args in container.commands
}
";

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
