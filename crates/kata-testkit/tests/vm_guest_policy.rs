//! Pods whose owner has bound a policy to their machine: the guest decides what the host may ask.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kata_testkit::host::{Host, refused, stderr, stdout};
use kata_testkit::{guest_services, initdata};

/// Allows everything but to run commands in containers.
const NO_EXEC: &str = r#"package agent_policy

default ExecProcessRequest := false

AddARPNeighborsRequest := true
CloseStdinRequest := true
CopyFileRequest := true
CreateContainerRequest := true
CreateSandboxRequest := true
DestroySandboxRequest := true
GetMetricsRequest := true
GetOOMEventRequest := true
GuestDetailsRequest := true
ListInterfacesRequest := true
ListRoutesRequest := true
OnlineCPUMemRequest := true
ReadStreamRequest := true
RemoveContainerRequest := true
RemoveRequest := true
ReseedRandomDevRequest := true
SetGuestDateTimeRequest := true
SetPolicyRequest := true
SignalProcessRequest := true
StartContainerRequest := true
StatsContainerRequest := true
TtyWinResizeRequest := true
UpdateContainerRequest := true
UpdateInterfaceRequest := true
UpdateRoutesRequest := true
WaitProcessRequest := true
WriteStreamRequest := true
"#;

/// A world whose pods boot the services image with this policy.
fn world(policy: &str) -> Option<Host> {
    let image = guest_services::image()?;
    let host = Host::new()?;
    let value = initdata::value(&host, &[("policy.rego", policy)]);
    host.configure(&format!("[hypervisor.qemu]\nimage = \"{}\"\ninitdata = \"{value}\"\n", image.display()));
    Some(host)
}

#[test]
fn a_policy_of_initdata_lets_the_container_run_and_no_command_in_it() {
    let Some(host) = world(NO_EXEC) else { return };
    let image = host.image();
    let script = "echo out; exec sleep 1000";
    let output = host.output(["run", "-d", "--name", "box", &image, "sh", "-c", script]);
    assert!(output.status.success(), "{}", stderr(&output));
    host.wait_for("its output", || stdout(&host.output(["logs", "box"])).contains("out").then_some(()));
    let output = host.output(["exec", "box", "echo", "of the command"]);
    refused(&output, &["the policy denies ExecProcessRequest", "rule agent_policy.ExecProcessRequest"]);
    assert_eq!(stdout(&output), "");
    // It is final, whatever its own rule says.
    let other = host.scratch("other.rego");
    std::fs::write(&other, format!("{NO_EXEC}\nForwardRequest := true\n")).unwrap();
    refused(&host.output(["policy", "set", "box", other.to_str().unwrap()]), &["set once"]);
    let output = host.output(["rm", "-f", "box"]);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_policy_of_initdata_that_is_none_denies_everything_and_says_why() {
    let Some(host) = world("package agent_policy\n\nCreateSandboxRequest := {\n") else { return };
    let output = host.sh(&[], "echo out");
    refused(&output, &["the policy denies", "/run/measured-cfg/policy.rego", "is not valid Rego"]);
    assert_eq!(stdout(&output), "");
}
