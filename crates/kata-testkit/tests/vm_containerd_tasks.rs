//! `ctr task …` on a container that runs, and the events that tell of it, against both containerds.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use kata_testkit::containerd::{Containerd, Event, Events, IMAGE, Version};
use kata_testkit::host::{patience, stderr, stdout};
use kata_testkit::with_each_containerd;

with_each_containerd!(
    task_is_listed_counted_and_measured,
    exec_has_output_exit_code_terminal_and_user,
    execs_run_side_by_side,
    input_of_an_exec_ends_when_the_client_closes_it,
    unknown_command_of_an_exec_is_named_and_the_container_goes_on,
    exec_is_killed_alone_and_deleted_only_when_dead,
    kill_reaches_the_container_or_all_of_it,
    signal_can_be_handled_and_its_exit_code_is_told,
    paused_container_stands_still_until_resumed,
    events_tell_a_life_in_order,
    what_is_dead_or_unknown_is_not_found,
    large_arguments_and_output_of_an_exec_are_whole,
    container_lives_on_without_its_client_and_is_attached_to_again,
    checkpoint_is_refused_by_name,
);

/// A container that waits to be ended.
const IDLE: &str = "exec sleep 1000";

#[track_caller]
fn fails(output: &Output, words: &[&str]) {
    assert!(!output.status.success(), "{}", stdout(output));
    let text = stderr(output);
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

/// The same, and the kind of the error is as told; only 1.6's client shows it.
#[track_caller]
fn is_refused(rig: &Containerd, output: &Output, words: &[&str], kind: &str) {
    fails(output, words);
    if rig.version() == Version::V1 {
        fails(output, &[kind]);
    }
}

fn task_is_listed_counted_and_measured(rig: &mut Containerd) {
    rig.detached(&[], "box", "sleep 1000 & sleep 1000");
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    assert!(rig.ok(["container", "ls"]).contains(rig.runtime()));
    let info = rig.ok(["container", "info", "box"]);
    assert!(info.contains("\"ID\": \"box\""), "{info}");
    let processes = rig.ok(["task", "ps", "box"]).lines().count();
    assert!(processes >= 2, "a heading and the container's process at least");
    let figure_of = |metrics: &str, name: &str| {
        let row = metrics.lines().find(|line| line.starts_with(name));
        row.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
    };
    // The shell may still be about to start its child.
    let metrics = rig.host().wait_for("both processes", || {
        let metrics = rig.ok(["task", "metrics", "box"]);
        figure_of(&metrics, "pids.current").is_some_and(|count| (2..10).contains(&count)).then_some(metrics)
    });
    let figure = |name: &str| figure_of(&metrics, name);
    // Named after the hierarchy that the container's kernel has, 1 or 2.
    let memory = figure("memory.usage_in_bytes").or_else(|| figure("memory.usage"));
    assert!(memory.is_some_and(|bytes| bytes > 100_000), "{metrics}");
    fails(&rig.output(["task", "rm", "box"]), &["must be stopped"]);
    fails(&rig.output(["container", "rm", "box"]), &["box"]);
    rig.remove("box");
    assert_eq!(
        (rig.ok(["task", "ls", "-q"]), rig.ok(["container", "ls", "-q"])),
        (String::new(), String::new())
    );
}

fn exec_has_output_exit_code_terminal_and_user(rig: &mut Containerd) {
    rig.detached(&["--env", "A=b"], "box", IDLE);
    let output = rig.exec("box", "plain", "echo out; echo err >&2; echo $A; exit 5");
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str(), output.status.code()),
        ("out\nb\n", "err\n", Some(5))
    );
    let words = rig.in_container(&["--user", "7:8", "--cwd", "/tmp"], "box", "other", "id -u; id -g; pwd");
    assert_eq!(stdout(&rig.output(words)), "7\n8\n/tmp\n");
    // A name is free again when its exec was deleted.
    assert_eq!(stdout(&rig.exec("box", "plain", "echo again")), "again\n");

    let script = "for n in $(seq 1000); do test \"$(stty size 2>/dev/null)\" = \"27 93\" && break; sleep 0.05; done; stty size";
    let words = rig.in_container(&["-t"], "box", "term", "");
    let command = words[..words.len() - 1].join(" ");
    let client = format!("{} --address {}", rig.client().display(), rig.socket().display());
    let text = rig.host().on_terminal(&format!("stty rows 27 cols 93; {client} {command} '{script}'"));
    assert!(text.lines().any(|line| line.trim_end() == "27 93"), "{text}");
    rig.remove("box");
}

fn execs_run_side_by_side(rig: &mut Containerd) {
    rig.detached(&[], "box", IDLE);
    let clients: Vec<_> = (0..8)
        .map(|n| {
            let words =
                rig.in_container(&[], "box", &format!("e{n}"), &format!("sleep 0.2; echo {n}; exit {n}"));
            rig.ctr(words).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, client) in clients.into_iter().enumerate() {
        let output = client.wait_with_output().unwrap();
        assert_eq!((stdout(&output), output.status.code()), (format!("{n}\n"), i32::try_from(n).ok()));
    }
    rig.remove("box");
}

fn input_of_an_exec_ends_when_the_client_closes_it(rig: &mut Containerd) {
    rig.detached(&[], "box", IDLE);
    let words = rig.in_container(&[], "box", "copy", "cat; echo end");
    let mut client = rig.ctr(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let text = "0123456789abcdef".repeat(64 * 1024);
    // Dropped when written: the client closes what it passed on.
    let mut input = client.stdin.take().unwrap();
    let typed = text.clone();
    let typist = std::thread::spawn(move || input.write_all(typed.as_bytes()).unwrap());
    let output = client.wait_with_output().unwrap();
    typist.join().unwrap();
    assert!(stdout(&output) == text + "end\n", "{} bytes", output.stdout.len());
    rig.remove("box");
}

fn unknown_command_of_an_exec_is_named_and_the_container_goes_on(rig: &mut Containerd) {
    rig.detached(&[], "box", IDLE);
    let began = Instant::now();
    fails(&rig.output(["task", "exec", "--exec-id", "bad", "box", "no-such-command"]), &["no-such-command"]);
    assert!(began.elapsed() < patience(Duration::from_secs(5)), "{:?}", began.elapsed());
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    assert_eq!(stdout(&rig.exec("box", "bad", "echo free")), "free\n", "its name is free");
    rig.remove("box");
}

fn exec_is_killed_alone_and_deleted_only_when_dead(rig: &mut Containerd) {
    let events = Events::of(rig);
    rig.detached(&[], "box", IDLE);
    rig.ok(["task", "exec", "-d", "--exec-id", "long", "box", "sleep", "1000"]);
    let deleted = rig.output(["task", "rm", "--exec-id", "long", "box"]);
    is_refused(rig, &deleted, &["must be stopped"], "failed precondition");
    let again = rig.output(["task", "exec", "--exec-id", "long", "box", "true"]);
    is_refused(rig, &again, &["long", "exists"], "already exists");
    rig.ok(["task", "kill", "--exec-id", "long", "--signal", "KILL", "box"]);
    let exit = events.wait_within(Duration::from_secs(10), "/tasks/exit", |event| event.text("id") == "long");
    assert_eq!((exit.text("container_id"), exit.number("exit_status")), ("box", 137));
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    // The client ends with the exit code of what it deletes.
    let output = rig.output(["task", "rm", "--exec-id", "long", "box"]);
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    is_refused(rig, &rig.output(["task", "kill", "--exec-id", "long", "box"]), &["long"], "not found");
    rig.remove("box");
}

fn kill_reaches_the_container_or_all_of_it(rig: &mut Containerd) {
    let events = Events::of(rig);
    rig.detached(&[], "one", IDLE);
    rig.ok(["task", "kill", "--signal", "KILL", "one"]);
    assert_eq!(events.wait("/tasks/exit", "one").number("exit_status"), 137);
    assert_eq!(rig.status("one").as_deref(), Some("STOPPED"));
    rig.reap("one", 137);

    rig.detached(&[], "all", "sleep 1000 & sleep 1000; true");
    rig.ok(["task", "exec", "-d", "--exec-id", "side", "all", "sleep", "1000"]);
    rig.ok(["task", "kill", "--all", "--signal", "KILL", "all"]);
    for id in ["all", "side"] {
        let about = |event: &Event| event.text("id") == id;
        let exit = events.wait_within(Duration::from_secs(10), "/tasks/exit", about);
        assert_eq!(exit.number("exit_status"), 137, "{id}");
    }
    rig.remove("all");
}

fn signal_can_be_handled_and_its_exit_code_is_told(rig: &mut Containerd) {
    let words = rig.run(&[
        IMAGE,
        "trap",
        "sh",
        "-c",
        "trap 'echo bye; exit 7' TERM; echo armed; while :; do sleep 0.1; done",
    ]);
    let mut client = rig.ctr(words).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "armed");
    rig.ok(["task", "kill", "--signal", "TERM", "trap"]);
    assert_eq!(lines.next().unwrap().unwrap(), "bye");
    assert_eq!(client.wait().unwrap().code(), Some(7));
    rig.ok(["container", "rm", "trap"]);
}

fn paused_container_stands_still_until_resumed(rig: &mut Containerd) {
    let events = Events::of(rig);
    rig.detached(&[], "box", "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.02; done");
    rig.ok(["task", "pause", "box"]);
    events.wait("/tasks/paused", "box");
    assert_eq!(rig.status("box").as_deref(), Some("PAUSED"));
    rig.ok(["task", "resume", "box"]);
    events.wait("/tasks/resumed", "box");
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    // It runs: the count goes on.
    let script = "a=$(cat /count); for n in $(seq 1000); do b=$(cat /count); [ \"$a\" != \"$b\" ] && exit 0; sleep 0.05; done; exit 1";
    assert_eq!(rig.exec("box", "look", script).status.code(), Some(0));
    rig.remove("box");
}

fn events_tell_a_life_in_order(rig: &mut Containerd) {
    let events = Events::of(rig);
    rig.detached(&[], "box", IDLE);
    assert_eq!(rig.exec("box", "step", "exit 3").status.code(), Some(3));
    rig.ok(["task", "kill", "--signal", "KILL", "box"]);
    events.wait_within(Duration::from_secs(10), "/tasks/exit", |event| event.text("id") == "box");
    rig.reap("box", 137);
    events.wait_within(Duration::from_secs(10), "/containers/delete", |event| event.text("id") == "box");
    let deleted = events.wait("/tasks/delete", "box");
    assert_eq!(deleted.number("exit_status"), 137);
    assert_eq!(
        events.order("box"),
        ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"]
    );
    let created = events.wait("/tasks/create", "box");
    assert_eq!(created.text("bundle"), rig.bundle("box").to_str().unwrap());
    assert!(created.fields["rootfs"][0]["type"].is_string(), "{created:?}");
    assert!(created.fields["io"]["stdout"].as_str().unwrap().contains("box-stdout"), "{created:?}");
    let exits: Vec<_> = events.all().into_iter().filter(|event| event.topic == "/tasks/exit").collect();
    let told: Vec<_> = exits.iter().map(|exit| (exit.text("id"), exit.number("exit_status"))).collect();
    assert_eq!(told, [("step", 3), ("box", 137)]);
    assert!(exits.iter().all(|exit| !exit.fields["exited_at"].is_null()), "{exits:?}");
    // Every event about one process names the same one.
    let pid = |topic: &str| events.wait(topic, "box").number("pid");
    let pids = BTreeSet::from([
        pid("/tasks/create"),
        pid("/tasks/start"),
        exits[1].number("pid"),
        deleted.number("pid"),
    ]);
    assert!(pids.len() == 1 && !pids.contains(&0), "{pids:?}");
}

fn what_is_dead_or_unknown_is_not_found(rig: &mut Containerd) {
    let events = Events::of(rig);
    rig.detached(&[], "box", "exit 4");
    events.wait("/tasks/exit", "box");
    assert_eq!(rig.status("box").as_deref(), Some("STOPPED"));
    is_refused(rig, &rig.output(["task", "kill", "--signal", "KILL", "box"]), &[], "not found");
    fails(&rig.output(["task", "exec", "--exec-id", "late", "box", "true"]), &[]);
    is_refused(rig, &rig.output(["task", "kill", "--exec-id", "nobody", "box"]), &["nobody"], "not found");
    // Whoever asks after the exit still gets the code.
    rig.reap("box", 4);
    is_refused(rig, &rig.output(["task", "rm", "box"]), &["box"], "not found");
}

fn large_arguments_and_output_of_an_exec_are_whole(rig: &mut Containerd) {
    rig.detached(&[], "box", IDLE);
    let long = "x".repeat(100_000);
    let output = rig.exec("box", "long", &format!("printf %s {long} | wc -c"));
    assert_eq!(stdout(&output).trim(), "100000", "{}", stderr(&output));
    let words = rig.in_container(&[], "box", "much", "seq 200000");
    let all: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(stdout(&rig.output(words)) == all);
    rig.remove("box");
}

fn container_lives_on_without_its_client_and_is_attached_to_again(rig: &mut Containerd) {
    let words = rig.run(&[IMAGE, "lone", "sh", "-c", "echo up; while :; do echo line; sleep 0.01; done"]);
    let mut client = rig.ctr(words).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(first, "up\n");
    client.kill().unwrap();
    client.wait().unwrap();
    assert_eq!(rig.status("lone").as_deref(), Some("RUNNING"));
    assert_eq!(stdout(&rig.exec("lone", "look", "echo alive")), "alive\n");

    let mut client = rig.ctr(["task", "attach", "lone"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "line"));
    rig.ok(["task", "kill", "--signal", "KILL", "lone"]);
    assert_eq!(lines.find(|line| line != "line"), None, "the rest, and then the end");
    assert_eq!(client.wait().unwrap().code(), Some(137));
    rig.ok(["container", "rm", "lone"]);
}

fn checkpoint_is_refused_by_name(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    rig.detached(&[], "box", IDLE);
    is_refused(rig, &rig.output(["task", "checkpoint", "box"]), &["checkpoint"], "not implemented");
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    rig.remove("box");
}
