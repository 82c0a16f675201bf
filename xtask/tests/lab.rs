//! The lab as its users see it: streams, status, signals, the time limit, and that nothing is left however it ends.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `xtask lab run` with options and a shell script; nothing (said and counted) where the lab's Debian is not made.
fn lab(options: &[&str], script: &str) -> Option<Command> {
    let Some(file_server) = std::env::var_os("KATA_TEST_FILE_SERVER") else {
        eprintln!("skipped: KATA_TEST_FILE_SERVER is not set: run `make test`");
        return None;
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command
        .args(["lab", "run", "--file-server"])
        .arg(file_server)
        .args(options)
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::null());
    Some(command)
}

fn output(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Processes that this xtask has started and that are still there; each bears its mark.
fn left(xtask: u32) -> Vec<String> {
    let mark = format!("KATA_LAB={xtask}");
    let marked = |dir: &Path| {
        let environment = std::fs::read(dir.join("environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let name = |dir: &Path| std::fs::read_to_string(dir.join("comm")).unwrap_or_default();
    processes.filter(|dir| marked(dir)).map(|dir| format!("{} {}", dir.display(), name(&dir))).collect()
}

/// The kernel takes a moment to end a process of some hundred megabytes.
fn nothing_is_left(xtask: u32) {
    let begin = Instant::now();
    while !left(xtask).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(5), "left behind: {:?}", left(xtask));
        std::thread::sleep(Duration::from_millis(20));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("kata/lab"), "{mounts}");
}

#[test]
fn streams_and_status_are_the_commands_and_what_it_writes_to_the_root_is_gone() {
    let Some(mut command) = lab(&[], "cat; echo err >&2; touch /usr/bin/left; exit 7") else { return };
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"in\n").unwrap();
    let id = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("in\n", "err\n"));
    assert_eq!(output.status.code(), Some(7));
    nothing_is_left(id);
    for entry in std::fs::read_dir("/var/cache/kata/lab").unwrap().flatten() {
        assert!(!entry.path().join("usr/bin/left").exists());
    }
}

#[test]
fn much_output_is_whole_although_the_command_ends_at_once() {
    let Some(mut command) = lab(&[], "head -c 20000000 /dev/zero; exit 3") else { return };
    let output = output(&mut command);
    assert_eq!((output.stdout.len(), output.status.code()), (20_000_000, Some(3)));
}

#[test]
fn unknown_command_is_127_and_named() {
    let Some(mut command) = lab(&[], "exec nonesuch") else { return };
    let output = output(&mut command);
    assert_eq!(output.status.code(), Some(127));
    assert!(text(&output.stderr).contains("nonesuch"), "{}", text(&output.stderr));
}

#[test]
fn time_limit_ends_everything_with_124() {
    let Some(mut command) = lab(&["--timeout", "10"], "sleep 1000 & sleep 1000") else { return };
    let begin = Instant::now();
    let mut child = command.spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(124));
    assert!(begin.elapsed() < Duration::from_secs(15));
    nothing_is_left(child.id());
}

/// Starts a command that says when it runs, and waits for that.
fn running(command: &mut Command) -> Child {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "running\n");
    child
}

fn signalled(child: &mut Child, signal: Signal) -> ExitStatus {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    child.wait().unwrap()
}

#[test]
fn signal_reaches_the_command_which_decides() {
    let script = "trap 'exit 9' TERM; echo running; while :; do sleep 0.1; done";
    let Some(mut command) = lab(&[], script) else { return };
    let mut child = running(&mut command);
    assert_eq!(signalled(&mut child, Signal::SIGTERM).code(), Some(9));
    nothing_is_left(child.id());
}

#[test]
fn killed_lab_leaves_no_process_and_no_mount() {
    let Some(mut command) = lab(&[], "echo running; sleep 1000") else { return };
    let mut child = running(&mut command);
    // QEMU, and two file servers of two halves each.
    assert_eq!(left(child.id()).len(), 5, "{:?}", left(child.id()));
    signalled(&mut child, Signal::SIGKILL);
    nothing_is_left(child.id());
    // And at any moment before.
    for delay in [5, 50, 200, 400, 800, 1600, 3200] {
        let mut child = lab(&[], "sleep 1000").unwrap().spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        signalled(&mut child, Signal::SIGKILL);
        nothing_is_left(child.id());
    }
}
