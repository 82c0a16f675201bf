//! Pods in the background: ps, exec, kill, logs, rm.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kata_testkit::driver::Driver;
use kata_testkit::host::{Host, patience, stderr, stdout};

fn detached(host: &Host, name: &str, script: &str) {
    let image = host.image();
    let output = host.output(["run", "-d", "--name", name, &image, "sh", "-c", script]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), format!("{name}\n"));
}

fn remove(host: &Host, name: &str) {
    let output = host.output(["rm", "-f", name]);
    assert!(output.status.success(), "{}", stderr(&output));
}

fn ps(host: &Host, all: bool) -> String {
    stdout(&host.output(if all { vec!["ps", "-a"] } else { vec!["ps"] }))
}

#[test]
fn detached_pod_is_listed_entered_and_removed() {
    let Some(host) = Host::new() else { return };
    detached(&host, "web", "echo serving; echo warned >&2; exec sleep 1000");
    assert!(ps(&host, false).contains("web"), "{}", ps(&host, false));
    assert!(ps(&host, false).contains("running"));

    let output = host.output(["exec", "web", "sh", "-c", "echo inside; hostname; exit 3"]);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("inside\nweb\n", Some(3)));

    let logs = host.wait_for("the log", || {
        let logs = host.output(["logs", "web"]);
        (stdout(&logs) == "serving\n").then_some(logs)
    });
    assert_eq!(stderr(&logs), "warned\n");

    let refused = host.output(["rm", "web"]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("-f"), "{}", stderr(&refused));
    remove(&host, "web");
    assert!(!ps(&host, true).contains("web"));
}

#[test]
fn exec_passes_input_environment_directory_and_user() {
    let Some(host) = Host::new() else { return };
    detached(&host, "box", "exec sleep 1000");
    let mut child = host
        .ctl([
            "exec",
            "-i",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "-u",
            "7:8",
            "box",
            "sh",
            "-c",
            "echo $A; pwd; id -u; cat",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(stdout(&output), "b\n/tmp\n7\ntyped\n");
    remove(&host, "box");
}

#[test]
fn exec_on_a_terminal_has_a_size_and_a_name() {
    let Some(host) = Host::new() else { return };
    detached(&host, "box", "exec sleep 1000");
    let exec = format!(
        "stty rows 27 cols 93; {} exec -it box sh -c 'tty; stty size; ls /dev/pts; echo own > /dev/tty'",
        host.program("kata-ctl").display()
    );
    let text = host.on_terminal(&exec);
    assert!(text.contains("/dev/pts/0\r\n27 93\r\n"), "{text}");
    assert!(text.contains("ptmx"), "{text}");
    assert!(text.contains("own\r\n"), "{text}");
    remove(&host, "box");
}

#[test]
fn exec_of_unknown_command_is_127_and_of_unknown_pod_125() {
    let Some(host) = Host::new() else { return };
    detached(&host, "box", "exec sleep 1000");
    // No bound is waited for; the quickest of three says so on any machine.
    let took = [(); 3].map(|()| {
        let begin = Instant::now();
        let output = host.output(["exec", "box", "no-such-command"]);
        assert_eq!(output.status.code(), Some(127), "{}", stderr(&output));
        begin.elapsed()
    });
    assert!(took.iter().any(|took| *took < patience(Duration::from_secs(1))), "{took:?}");
    let output = host.output(["exec", "nobody", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("nobody"), "{}", stderr(&output));
    remove(&host, "box");
}

#[test]
fn many_execs_run_side_by_side() {
    let Some(host) = Host::new() else { return };
    detached(&host, "busy", "exec sleep 1000");
    let children: Vec<_> = (0..8)
        .map(|n| {
            let script = format!("sleep 0.2; echo {n}; exit {n}");
            host.ctl(["exec", "busy", "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(stdout(&output), format!("{n}\n"));
        assert_eq!(output.status.code(), i32::try_from(n).ok());
    }
    remove(&host, "busy");
}

#[test]
fn kill_ends_the_pod_and_its_status_stays_readable() {
    let Some(host) = Host::new() else { return };
    detached(&host, "brief", "trap 'exit 9' USR1; echo armed; while :; do sleep 0.1; done");
    // Without the trap in place the signal would end the shell.
    host.wait_for("the trap", || (stdout(&host.output(["logs", "brief"])) == "armed\n").then_some(()));
    assert!(host.output(["kill", "-s", "USR1", "brief"]).status.success());
    host.wait_for("the pod's end", || ps(&host, true).contains("exited (9)").then_some(()));
    // The container has ended, and then the machine does.
    let state = host.run_dir().join("brief/state.json");
    host.wait_for("the pod to be stopped", || {
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(&state).ok()?).ok()?;
        (state["state"] == "stopped").then_some(())
    });
    assert!(!ps(&host, false).contains("brief"));
    assert!(host.pids_of(Driver::under_test().program()).is_empty(), "a stopped pod keeps no machine");
    let text = stdout(&host.output(["ps", "-a", "--json"]));
    assert!(text.contains("\"exit_code\": 9") || text.contains("\"exit_code\":9"), "{text}");
    assert!(host.output(["rm", "brief"]).status.success());
}

#[test]
fn detached_pod_with_rm_leaves_nothing_when_it_ends() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let output = host.output(["run", "-d", "--rm", &image, "sleep", "0.5"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

#[test]
fn log_can_be_followed_to_the_end() {
    let Some(host) = Host::new() else { return };
    detached(&host, "talker", "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done");
    let output = host.output(["logs", "-f", "talker"]);
    assert_eq!(stdout(&output), "1\n2\n3\n4\n5\n");
    remove(&host, "talker");
}

#[test]
fn two_pods_of_one_name_are_refused() {
    let Some(host) = Host::new() else { return };
    detached(&host, "twin", "exec sleep 1000");
    let image = host.image();
    let output = host.output(["run", "--rm", "--name", "twin", &image, "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("twin"), "{}", stderr(&output));
    assert!(host.output(["exec", "twin", "true"]).status.success(), "the first goes on");
    remove(&host, "twin");
}

#[test]
fn pods_run_side_by_side() {
    let Some(host) = Host::new() else { return };
    let children: Vec<_> = (0..3)
        .map(|n| {
            let image = host.image();
            let script = format!("echo pod {n}");
            host.ctl(["run", "--rm", &image, "sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, child) in children.into_iter().enumerate() {
        assert_eq!(stdout(&child.wait_with_output().unwrap()), format!("pod {n}\n"));
    }
}

#[test]
fn what_the_agent_logs_is_in_the_owners_log() {
    let Some(host) = Host::new() else { return };
    let image = host.image();
    let set = ["--set", "agent.kata.enable_debug=true", "--set", "runtime.log_level=debug"];
    let words =
        ["run", "-d", "--name", "chatty"].into_iter().chain(set).chain([image.as_str(), "sleep", "1000"]);
    let output = host.output(words);
    assert!(output.status.success(), "{}", stderr(&output));
    host.wait_for("the agent's log", || host.owner_log("chatty").contains(" agent: ").then_some(()));
    remove(&host, "chatty");
}
