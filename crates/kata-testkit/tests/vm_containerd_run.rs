//! `ctr run` and each of its options, against both containerds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::process::Stdio;

use kata_testkit::containerd::{Containerd, Events, IMAGE, Version};
use kata_testkit::host::{stderr, stdout};
use kata_testkit::with_each_containerd;

with_each_containerd!(
    output_errors_and_exit_code_reach_the_client,
    terminal_has_the_clients_size,
    input_reaches_the_container_and_its_end_too,
    a_lot_of_output_arrives_byte_for_byte,
    directory_environment_and_mounts_are_as_asked,
    root_file_system_may_be_a_directory,
    user_is_as_asked,
    memory_beyond_the_limit_is_137_and_an_oom_event,
    default_seccomp_profile_filters,
    unknown_command_is_named_and_leaves_nothing,
    missing_mount_source_is_named_and_leaves_nothing,
);

fn output_errors_and_exit_code_reach_the_client(rig: &mut Containerd) {
    let output = rig.sh(&[], "plain", "echo out; echo err >&2; exit 3");
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str(), output.status.code()),
        ("out\n", "err\n", Some(3))
    );
    assert_eq!(rig.ok(["container", "ls", "-q"]), "", "--rm removes the container");
}

fn terminal_has_the_clients_size(rig: &mut Containerd) {
    let script = "tty; for n in $(seq 1000); do [ \"$(stty size 2>/dev/null)\" = '27 93' ] && break; sleep 0.05; done; stty size";
    let words = rig.run(&["--rm", "-t", IMAGE, "term", "sh", "-c"]).join(" ");
    let client = format!("{} --address {}", rig.client().display(), rig.socket().display());
    let quoted = script.replace('\'', "'\\''");
    let text = rig.host().on_terminal(&format!("stty rows 27 cols 93; {client} {words} '{quoted}'"));
    assert!(text.contains("/dev/"), "{text}");
    // The client sends its size after the start.
    assert!(text.lines().any(|line| line.trim_end() == "27 93"), "{text}");
}

fn input_reaches_the_container_and_its_end_too(rig: &mut Containerd) {
    let words = rig.run(&["--rm", IMAGE, "cat", "cat"]);
    let mut client = rig.ctr(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    input.write_all(b"typed\n").unwrap();
    let mut echoed = [0; 6];
    client.stdout.as_mut().unwrap().read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"typed\n");
    drop(input);
    assert!(client.wait().unwrap().success(), "`cat` ends with its input");
}

fn a_lot_of_output_arrives_byte_for_byte(rig: &mut Containerd) {
    // Both streams at once, each more than any buffer on the way holds.
    let output = rig.sh(&[], "lots", "seq 1 1000000 & seq 1000000 -1 1 >&2; wait");
    let up: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    let down: String = (1..=1_000_000).rev().map(|n| format!("{n}\n")).collect();
    assert!(output.status.success());
    // Not assert_eq: nobody wants to read this.
    assert!(output.stdout == up.as_bytes(), "{} of {} bytes", output.stdout.len(), up.len());
    assert!(output.stderr == down.as_bytes(), "{} of {} bytes", output.stderr.len(), down.len());
}

fn directory_environment_and_mounts_are_as_asked(rig: &mut Containerd) {
    let shared = rig.host().scratch("shared/file");
    let shared = shared.parent().unwrap();
    std::fs::create_dir_all(shared).unwrap();
    std::fs::write(shared.join("given"), "from the host\n").unwrap();
    let mount = |at: &str, how: &str| format!("type=bind,src={},dst={at},options={how}", shared.display());
    let (writable, fixed) = (mount("/rw", "rbind:rw"), mount("/ro", "rbind:ro"));
    let script = "pwd; echo $A; cat /ro/given; echo from the guest > /rw/taken; echo no > /ro/taken";
    let output = rig.sh(
        &["--cwd", "/tmp", "--env", "A=b c", "--mount", &writable, "--mount", &fixed],
        "dressed",
        script,
    );
    assert_eq!(stdout(&output), "/tmp\nb c\nfrom the host\n");
    assert!(stderr(&output).contains("Read-only file system"), "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(shared.join("taken")).unwrap(), "from the guest\n");
}

fn root_file_system_may_be_a_directory(rig: &mut Containerd) {
    let root = rig.unpacked_root();
    std::fs::write(root.join("mark"), "this one\n").unwrap();
    let root_word = root.to_str().unwrap();
    let script = "cat /mark; echo kept > /new";
    // Without an image there is no PATH.
    let output = rig.output(rig.run(&["--rm", "--rootfs", root_word, "bare", "/bin/sh", "-c", script]));
    assert_eq!(stdout(&output), "this one\n", "{}", stderr(&output));
    assert_eq!(std::fs::read_to_string(root.join("new")).unwrap(), "kept\n");
}

fn user_is_as_asked(rig: &mut Containerd) {
    if rig.version() == Version::V2 {
        assert_eq!(stdout(&rig.sh(&["--user", "7:8"], "by-flag", "id -u; id -g")), "7\n8\n");
    }
    // 1.6's client has no such flag: a specification of its own making with another user.
    let mut spec: serde_json::Value = serde_json::from_str(&rig.ok(["oci", "spec"])).unwrap();
    spec["root"]["path"] = rig.unpacked_root().to_str().unwrap().into();
    spec["process"]["args"] = serde_json::json!(["/bin/sh", "-c", "id -u; id -g; id -G"]);
    spec["process"]["terminal"] = false.into();
    // The default is the group above all others of this namespace.
    spec["linux"]["cgroupsPath"] = "/default/by-spec".into();
    spec["process"]["user"] = serde_json::json!({"uid": 7, "gid": 8, "additionalGids": [8, 9]});
    let file = rig.host().scratch("spec.json");
    std::fs::write(&file, spec.to_string()).unwrap();
    let output = rig.output(rig.run(&["--rm", "--config", file.to_str().unwrap(), "by-spec"]));
    assert_eq!(stdout(&output), "7\n8\n8 9\n", "{}", stderr(&output));
}

fn memory_beyond_the_limit_is_137_and_an_oom_event(rig: &mut Containerd) {
    let events = Events::of(rig);
    let greedy = "dd if=/dev/zero of=/dev/null bs=100M count=1";
    let output = rig.sh(&["--memory-limit", "33554432"], "greedy", greedy);
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    events.wait("/tasks/oom", "greedy");
    let exit = events.wait("/tasks/exit", "greedy");
    assert_eq!(exit.number("exit_status"), 137);
}

fn default_seccomp_profile_filters(rig: &mut Containerd) {
    let script = "grep '^Seccomp:' /proc/self/status; mount -t tmpfs none /tmp";
    let output = rig.sh(&["--seccomp", "--cap-add", "CAP_SYS_PTRACE"], "filtered", script);
    assert_eq!(stdout(&output), "Seccomp:\t2\n");
    assert!(!output.status.success(), "the profile refuses mount(2)");
    assert_eq!(stdout(&rig.sh(&[], "open", "grep '^Seccomp:' /proc/self/status")), "Seccomp:\t0\n");
}

#[track_caller]
fn is_refused(rig: &Containerd, what: &[&str], named: &str) {
    let output = rig.output(rig.run(what));
    assert!(!output.status.success());
    let text = stderr(&output);
    assert!(text.contains(named), "{named} is not in: {text}");
    assert!(!text.contains("context deadline exceeded"), "{text}");
    assert_eq!(rig.ok(["task", "ls", "-q"]), "");
    assert_eq!(rig.ok(["container", "ls", "-q"]), "");
    assert!(!rig.bundle("refused").exists());
}

fn unknown_command_is_named_and_leaves_nothing(rig: &mut Containerd) {
    is_refused(rig, &["--rm", IMAGE, "refused", "no-such-command"], "no-such-command");
    // The same name can be used at once.
    assert_eq!(stdout(&rig.sh(&[], "refused", "echo now")), "now\n");
}

fn missing_mount_source_is_named_and_leaves_nothing(rig: &mut Containerd) {
    let mount = "type=bind,src=/no/such/source,dst=/x,options=rbind:ro";
    is_refused(rig, &["--rm", "--mount", mount, IMAGE, "refused", "true"], "/no/such/source");
}
