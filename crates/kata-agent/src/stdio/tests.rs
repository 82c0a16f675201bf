use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use super::*;
use crate::reaper::Reaper;

/// Runs `script` with the process's ends of `io`, or on a terminal, as the engine would.
fn run(reaper: &Reaper, script: &str, io: ProcessIo, terminal: Option<OwnedFd>) -> ExitReceiver {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    if let Some(terminal) = terminal {
        command.stdin(terminal.try_clone().unwrap());
        command.stdout(terminal.try_clone().unwrap());
        command.stderr(terminal);
    } else {
        command.stdin(io.stdin.map_or_else(std::process::Stdio::null, Into::into));
        command.stdout(io.stdout.map_or_else(std::process::Stdio::null, Into::into));
        command.stderr(io.stderr.map_or_else(std::process::Stdio::null, Into::into));
    }
    reaper.spawn(&mut command).unwrap().1
}

struct Host {
    streams: Streams,
    reaper: Reaper,
}

impl Host {
    fn new() -> Self {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        Self { streams: Streams::default(), reaper }
    }

    fn connect(&self, port: u32) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        self.streams.offer(port, near.into());
        far
    }

    async fn start(&self, script: &str, ports: Ports, terminal: bool) -> (Attached, ExitReceiver) {
        self.start_without(Withheld::default(), script, ports, terminal).await
    }

    async fn start_without(
        &self,
        withheld: Withheld,
        script: &str,
        ports: Ports,
        terminal: bool,
    ) -> (Attached, ExitReceiver) {
        let (io, stdio) = prepare(&self.streams, ports, withheld, terminal, 1 << 18).await.unwrap();
        let (master, slave) = terminal.then(|| crate::console::open_terminal().unwrap()).unzip();
        let exit = run(&self.reaper, script, io, slave);
        (stdio.attach(&exit, master).unwrap(), exit)
    }
}

async fn all(mut from: UnixStream) -> String {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn streams_carry_input_output_and_errors_apart() {
    let host = Host::new();
    let (mut stdin, stdout, stderr) = (host.connect(1), host.connect(2), host.connect(3));
    let ports = Ports { stdin: 1, stdout: 2, stderr: 3 };
    let (_attached, exit) = host.start("cat; echo bad >&2; exit 4", ports, false).await;
    stdin.write_all(b"hello").unwrap();
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(all(stdout).await, "hello");
    assert_eq!(all(stderr).await, "bad\n");
    assert_eq!(exit.wait().await.code(), 4);
}

#[tokio::test]
async fn close_stdin_delivers_what_was_sent_before() {
    let host = Host::new();
    let (mut stdin, stdout) = (host.connect(1), host.connect(2));
    let (attached, _exit) = host.start("cat", Ports { stdin: 1, stdout: 2, stderr: 0 }, false).await;
    stdin.write_all(b"last words").unwrap();
    attached.close_stdin().await;
    assert_eq!(all(stdout).await, "last words");
}

#[tokio::test]
async fn a_stream_that_was_not_asked_for_is_dev_null() {
    let host = Host::new();
    let stdout = host.connect(2);
    let script = "readlink /proc/self/fd/0; readlink /proc/self/fd/2 || exit 1";
    let (_attached, exit) = host.start(script, Ports { stdin: 0, stdout: 2, stderr: 0 }, false).await;
    assert_eq!(all(stdout).await, "/dev/null\n/dev/null\n");
    assert_eq!(exit.wait().await.code(), 0);
}

#[tokio::test]
async fn without_ports_requests_read_and_write() {
    let host = Host::new();
    let (attached, exit) = host.start("read x; echo got $x; echo e >&2", Ports::default(), false).await;
    attached.write_stdin(b"it\n").await.unwrap();
    assert_eq!(attached.read_stdout(64).await.unwrap(), b"got it\n");
    assert_eq!(attached.read_stderr(64).await.unwrap(), b"e\n");
    assert_eq!(exit.wait().await.code(), 0);
    assert!(matches!(attached.read_stdout(64).await, Err(StdioError::End("stdout"))));
    attached.close_stdin().await;
    assert!(matches!(attached.write_stdin(b"x").await, Err(StdioError::Absent("stdin"))));
}

#[tokio::test]
async fn a_terminal_carries_both_ways_resizes_and_ends() {
    let host = Host::new();
    let (mut stdin, stdout) = (host.connect(1), host.connect(2));
    let script = "read x; stty size; echo $x; cat >/dev/null; echo end";
    let (attached, exit) = host.start(script, Ports { stdin: 1, stdout: 2, stderr: 0 }, true).await;
    attached.resize(33, 101).unwrap();
    stdin.write_all(b"typed\n").unwrap();
    stdin.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(exit.wait().await.code(), 0);
    let output = all(stdout).await;
    assert!(output.contains("33 101\r\n"), "{output:?}");
    assert!(output.ends_with("typed\r\nend\r\n"), "{output:?}");
}

#[tokio::test]
async fn resizing_without_a_terminal_is_refused() {
    let host = Host::new();
    let (attached, _exit) = host.start("true", Ports::default(), false).await;
    assert!(matches!(attached.resize(1, 1), Err(StdioError::NoTerminal)));
}

#[tokio::test]
async fn the_last_output_of_a_process_is_not_lost() {
    let host = Host::new();
    let stdout = host.connect(2);
    let ports = Ports { stdin: 0, stdout: 2, stderr: 0 };
    let (_attached, exit) = host.start("head -c 200000 /dev/zero | tr '\\0' a", ports, false).await;
    exit.wait().await;
    assert_eq!(all(stdout).await.len(), 200_000);
}

/// More than a pipe or a terminal holds: whoever writes it waits for a reader, or has one that throws it away.
const MUCH: &str = "head -c 1000000 /dev/zero; echo secret; exit 4";

#[tokio::test]
async fn what_is_withheld_from_the_host_does_not_hold_the_process_up() {
    let host = Host::new();
    let (stdin, stdout) = (host.connect(1), host.connect(2));
    let withheld = Withheld { input: true, output: true };
    let script = format!("test -z \"$(cat)\" || exit 5; {MUCH}");
    let (_attached, exit) =
        host.start_without(withheld, &script, Ports { stdin: 1, stdout: 2, stderr: 0 }, false).await;
    assert_eq!(all(stdout).await, "");
    assert_eq!(all(stdin).await, "");
    assert_eq!(exit.wait().await.code(), 4);
}

#[tokio::test]
async fn terminal_that_is_withheld_from_the_host_is_read_and_dropped() {
    let host = Host::new();
    let stdout = host.connect(2);
    let withheld = Withheld { output: true, ..Withheld::default() };
    let (_attached, exit) =
        host.start_without(withheld, MUCH, Ports { stdin: 0, stdout: 2, stderr: 0 }, true).await;
    assert_eq!(all(stdout).await, "");
    assert_eq!(exit.wait().await.code(), 4);
}
