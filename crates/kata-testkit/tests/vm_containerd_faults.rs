//! containerd, the owner or a part of a pod dies or hangs, or a client gives up: what is told, and what is left.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use kata_testkit::containerd::{Containerd, Events, IMAGE, Version, send};
use kata_testkit::driver::Driver;
use kata_testkit::host::{stderr, stdout, wait_for};
use kata_testkit::with_each_containerd;
use rustix::process::{Pid, Signal, kill_process};

with_each_containerd!(
    pod_outlives_a_killed_containerd,
    pod_outlives_a_restarted_containerd,
    exit_while_containerd_is_down_is_known_later,
    killed_owner_is_an_exit_and_leaves_nothing,
    killed_machine_is_an_exit_with_the_reason,
    killed_file_server_is_an_exit_with_the_reason,
    stopped_machine_is_an_exit_with_the_reason,
    stopped_file_server_is_an_exit_with_the_reason,
    killed_vsock_device_is_an_exit_with_the_reason,
    stopped_vsock_device_is_an_exit_with_the_reason,
    stopped_owner_is_cleaned_up_after_within_containerds_bound,
    cancelled_create_leaves_nothing,
    twenty_rounds_leave_nothing,
    five_pods_start_at_once,
);

/// How long the death of a part may go unnoticed at most.
const NOTICED: Duration = Duration::from_secs(60);
/// What containerd gives a shim that is to clean up, unless it is told otherwise.
const CONTAINERDS_BOUND: Duration = Duration::from_secs(5);

/// The standard output of a detached container, which nobody else reads any more.
fn output_of(rig: &Containerd, id: &str) -> impl Iterator<Item = u64> + use<> {
    let name = format!("{id}-stdout");
    let dirs = std::fs::read_dir(rig.fifos()).unwrap();
    let fifo: PathBuf = dirs.map(|dir| dir.unwrap().path().join(&name)).find(|path| path.exists()).unwrap();
    BufReader::new(File::open(fifo).unwrap()).lines().map(|line| line.unwrap().parse().unwrap())
}

/// A container that counts aloud, while containerd goes by `down` and comes back.
fn outlives(rig: &mut Containerd, down: fn(&mut Containerd)) {
    rig.detached(&[], "box", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done");
    let mut counted = output_of(rig, "box");
    let first = counted.next().unwrap();
    down(rig);
    // Said while there is no containerd.
    let mut heard: Vec<u64> = counted.by_ref().take(20).collect();
    let logged = rig.log().len();
    rig.start();
    assert_eq!(rig.status("box").as_deref(), Some("RUNNING"));
    assert_eq!(stdout(&rig.exec("box", "look", "echo alive")), "alive\n");
    if rig.has_machines() {
        let words = || rig.log().split_off(logged).contains("kata_sandbox::process_table").then_some(());
        rig.host().wait_for("a word of the owner in containerd's log", words);
    }
    heard.extend(counted.take(20));
    assert!(heard.iter().copied().eq(first + 1..=first + 40), "output is lost: {first} then {heard:?}");
    let events = Events::of(rig);
    rig.ok(["task", "kill", "--signal", "KILL", "box"]);
    assert_eq!(events.wait("/tasks/exit", "box").number("exit_status"), 137);
    rig.reap("box", 137);
}

fn pod_outlives_a_killed_containerd(rig: &mut Containerd) {
    outlives(rig, Containerd::kill);
}

fn pod_outlives_a_restarted_containerd(rig: &mut Containerd) {
    outlives(rig, Containerd::stop);
}

fn exit_while_containerd_is_down_is_known_later(rig: &mut Containerd) {
    let done = rig.host().scratch("flag/file");
    let shared = done.parent().unwrap().to_owned();
    std::fs::create_dir_all(&shared).unwrap();
    let mount = format!("type=bind,src={},dst=/flag,options=rbind:rw", shared.display());
    let script = "while [ ! -e /flag/go ]; do sleep 0.05; done; touch /flag/gone; exit 6";
    rig.detached(&["--mount", &mount], "box", script);
    rig.kill();
    std::fs::write(shared.join("go"), "").unwrap();
    rig.host().wait_for("the container's end", || shared.join("gone").exists().then_some(()));
    rig.start();
    rig.host().wait_for("the task's end", || (rig.status("box").as_deref() != Some("RUNNING")).then_some(()));
    match rig.status("box") {
        Some(_) => rig.reap("box", 6),
        // containerd 2 shuts a shim without processes down when it finds it again.
        None => {
            assert_eq!(rig.version(), Version::V2);
            rig.ok(["container", "rm", "box"]);
        }
    }
}

fn killed_owner_is_an_exit_and_leaves_nothing(rig: &mut Containerd) {
    let events = Events::of(rig);
    let id = &own_name(rig, "orphan");
    rig.detached(&[], id, "exec sleep 1000");
    let owners = rig.host().pids_of("containerd-shim");
    assert_eq!(owners.len(), 1, "{owners:?}");
    send(owners[0], Signal::KILL);
    let exit = events.wait_within(NOTICED, "/tasks/exit", |event| event.text("id") == id);
    assert_eq!(exit.number("exit_status"), 137);
    // containerd has the task deleted by a shim of its own accord, and forgets it.
    wait_for("the task to be gone", NOTICED, || rig.status(id).is_none().then_some(()));
    nothing_of_a_pod(rig);
    rig.ok(["container", "rm", id]);
    assert_eq!(stdout(&rig.sh(&[], id, "echo next")), "next\n");
}

/// A name that no other test has: pods of one name have one cgroup, and who is to remove it waits for the other's.
fn own_name(rig: &Containerd, name: &str) -> String {
    format!("{name}-{:?}", rig.version()).to_lowercase()
}

#[track_caller]
fn nothing_of_a_pod(rig: &Containerd) {
    assert_eq!(rig.leftovers(), Vec::<String>::new());
}

/// A part of the pod gets a signal: the container has exited, and containerd's log, where the owner's goes, says why.
fn part_gets(rig: &Containerd, part: &str, signal: Signal, reason: &[&str]) {
    if !rig.has_machines() {
        return;
    }
    if signal == Signal::STOP {
        // What hangs is noticed by the agent's silence.
        rig.host().configure("[agent.kata]\nhealth_timeout_ms = 20000\n");
    }
    let events = Events::of(rig);
    rig.detached(&[], "box", "exec sleep 1000");
    let parts = rig.host().pids_of(part);
    assert!(!parts.is_empty(), "no {part} runs");
    for pid in parts {
        // The end of one half of a part may be the other half's.
        let _ = kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal);
    }
    let exit = events.wait_within(NOTICED, "/tasks/exit", |event| event.text("id") == "box");
    assert_ne!(exit.number("exit_status"), 0);
    assert_eq!(rig.status("box").as_deref(), Some("STOPPED"));
    for word in reason {
        // The owner's words come through a pipe that containerd copies.
        rig.host().wait_for(&format!("`{word}` in the log"), || rig.log().contains(word).then_some(()));
    }
    let removed = rig.output(["task", "rm", "box"]);
    assert!(!stderr(&removed).contains("ctr:"), "{}", stderr(&removed));
    rig.ok(["container", "rm", "box"]);
    nothing_of_a_pod(rig);
}

fn killed_machine_is_an_exit_with_the_reason(rig: &mut Containerd) {
    let driver = Driver::under_test();
    part_gets(rig, driver.program(), Signal::KILL, &[driver.process(), "killed"]);
}

fn killed_file_server_is_an_exit_with_the_reason(rig: &mut Containerd) {
    part_gets(rig, "kata-virtiofsd", Signal::KILL, &["virtiofsd"]);
}

fn stopped_machine_is_an_exit_with_the_reason(rig: &mut Containerd) {
    let driver = Driver::under_test();
    part_gets(rig, driver.program(), Signal::STOP, &[driver.process()]);
}

fn stopped_file_server_is_an_exit_with_the_reason(rig: &mut Containerd) {
    part_gets(rig, "kata-virtiofsd", Signal::STOP, &["virtiofsd"]);
}

fn killed_vsock_device_is_an_exit_with_the_reason(rig: &mut Containerd) {
    if Driver::under_test().has_vsock_process() {
        part_gets(rig, "kata-vmm", Signal::KILL, &["vsock"]);
    }
}

fn stopped_vsock_device_is_an_exit_with_the_reason(rig: &mut Containerd) {
    if Driver::under_test().has_vsock_process() {
        part_gets(rig, "kata-vmm", Signal::STOP, &["vsock", "health_timeout_ms"]);
    }
}

fn stopped_owner_is_cleaned_up_after_within_containerds_bound(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    let id = &own_name(rig, "hangs");
    // A machine that stands still for a moment makes one of them late; a cleanup that is too slow makes all.
    let mut took = Vec::new();
    while took.len() < 3 && took.last().is_none_or(|took| *took >= CONTAINERDS_BOUND) {
        took.push(cleanup_after_a_stopped_owner(rig, id));
    }
    assert!(
        took.last() < Some(&CONTAINERDS_BOUND),
        "containerd gives a cleanup {CONTAINERDS_BOUND:?}: {took:?}"
    );
}

/// How long `delete` takes as containerd calls it, in the bundle.
fn cleanup_after_a_stopped_owner(rig: &Containerd, id: &str) -> Duration {
    rig.detached(&[], id, "exec sleep 1000");
    let owners = rig.host().pids_of("containerd-shim");
    assert_eq!(owners.len(), 1, "{owners:?}");
    send(owners[0], Signal::STOP);
    let bundle = rig.bundle(id);
    let mut delete = std::process::Command::new(rig.host().program("containerd-shim-kata-v2"));
    rig.host().enter(&mut delete);
    delete.args(["-namespace", "default", "-address"]).arg(rig.socket());
    delete.args(["-id", id, "-bundle"]).arg(&bundle).arg("delete").current_dir(&bundle);
    let begin = std::time::Instant::now();
    let output = delete.output().unwrap();
    let took = begin.elapsed();
    assert!(output.status.success(), "{}", stderr(&output));
    wait_for("the task to be gone", NOTICED, || rig.status(id).is_none().then_some(()));
    nothing_of_a_pod(rig);
    rig.ok(["container", "rm", id]);
    took
}

fn cancelled_create_leaves_nothing(rig: &mut Containerd) {
    if !rig.has_machines() {
        return;
    }
    // A client that is slow to die may have heard the word: then there was no create to cancel.
    let cancelled = (0..3).any(|_| cancelled(rig, "half"));
    assert!(cancelled, "each of three was done before its client could be killed");
    assert_eq!(stdout(&rig.sh(&[], "half", "echo whole")), "whole\n");
}

/// Kills the client that creates a container as soon as there is a machine; false where it was done by then.
fn cancelled(rig: &Containerd, id: &str) -> bool {
    let words = rig.run(&["--rm", IMAGE, id, "echo", "no"]);
    let mut client = rig.ctr(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    rig.host()
        .wait_for("the machine", || rig.host().pids_of(Driver::under_test().program()).first().copied());
    client.kill().unwrap();
    let said = stdout(&client.wait_with_output().unwrap());
    wait_for("the task to be gone", NOTICED, || match rig.status(id).as_deref() {
        None => Some(()),
        // Nobody is left to remove what was done.
        Some("STOPPED") => {
            rig.output(["task", "rm", id]);
            None
        }
        Some(_) => None,
    });
    nothing_of_a_pod(rig);
    // With `--rm`, a client that was done has removed it.
    if rig.ok(["container", "ls", "-q"]).lines().any(|line| line == id) {
        rig.ok(["container", "rm", id]);
    }
    said.is_empty()
}

fn twenty_rounds_leave_nothing(rig: &mut Containerd) {
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", rig.pid())).unwrap().count();
    let mut settled = 0;
    for round in 0..20 {
        assert_eq!(stdout(&rig.sh(&[], "again", &format!("echo {round}"))), format!("{round}\n"));
        nothing_of_a_pod(rig);
        // The first rounds open what stays.
        if round == 2 {
            settled = descriptors();
        }
    }
    // The last round's connections may still be on their way out; a leak is one of each round.
    rig.host().wait_for(&format!("containerd to have no more than {settled} descriptors and three"), || {
        (descriptors() <= settled + 3).then_some(())
    });
}

fn five_pods_start_at_once(rig: &mut Containerd) {
    // Five guests boot on the processors of two.
    rig.host().configure("[agent.kata]\nreconnect_timeout_ms = 180000\ncreate_container_timeout = 180\n");
    let clients: Vec<_> = (0..5)
        .map(|n| {
            let (id, script) = (format!("pod{n}"), format!("echo pod {n}"));
            let words = rig.run(&["--rm", IMAGE, &id, "sh", "-c", &script]);
            rig.ctr(words).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (n, client) in clients.into_iter().enumerate() {
        assert_eq!(stdout(&client.wait_with_output().unwrap()), format!("pod {n}\n"));
    }
}
