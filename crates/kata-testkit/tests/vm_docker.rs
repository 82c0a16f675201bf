//! Docker runs pods through containerd: run, exec, logs, stop, volumes, networks and published ports.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kata_testkit::containerd::Docker;
use kata_testkit::host::{stderr, stdout};

#[test]
fn container_has_output_exit_code_environment_and_volume() {
    let Some(docker) = Docker::new() else { return };
    let volume = docker.containerd().host().scratch("volume/file");
    let volume = volume.parent().unwrap().to_owned();
    std::fs::create_dir_all(&volume).unwrap();
    let bind = format!("{}:/volume", volume.display());
    let script = "echo out; echo err >&2; echo $A; pwd; hostname; echo kept > /volume/new; exit 3";
    let options = ["--rm", "-e", "A=b c", "-w", "/tmp", "-v", &bind, "--hostname", "named", "busybox"];
    let output = docker.run(&[&options[..], &["sh", "-c", script]].concat());
    assert_eq!(
        (stdout(&output).as_str(), stderr(&output).as_str(), output.status.code()),
        ("out\nb c\n/tmp\nnamed\n", "err\n", Some(3))
    );
    assert_eq!(std::fs::read_to_string(volume.join("new")).unwrap(), "kept\n");
    assert_eq!(docker.ok(["ps", "-aq"]), "", "--rm removes it");
}

#[test]
fn unknown_command_is_127_and_named() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&["--rm", "busybox", "no-such-command"]);
    assert_eq!(output.status.code(), Some(127), "{}", stderr(&output));
    assert!(stderr(&output).contains("no-such-command"), "{}", stderr(&output));
}

#[test]
fn container_in_the_background_is_logged_entered_stopped_and_started_again() {
    let Some(docker) = Docker::new() else { return };
    let script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let output = docker.run(&["-d", "--name", "box", "busybox", "sh", "-c", script]);
    assert!(output.status.success(), "{}", stderr(&output));
    let said = |text: &str| (docker.ok(["logs", "box"]) == text).then_some(());
    let host = docker.containerd().host();
    host.wait_for("the log", || said("up\n"));

    let entered =
        docker.output(["exec", "-e", "A=b", "-u", "7:8", "box", "sh", "-c", "echo $A; id -u; exit 4"]);
    assert_eq!((stdout(&entered).as_str(), entered.status.code()), ("b\n7\n", Some(4)));
    assert_eq!(docker.output(["exec", "box", "no-such-command"]).status.code(), Some(127));

    docker.ok(["stop", "--time", "10", "box"]);
    let state = |what: &str| docker.ok(["inspect", "--format", &format!("{{{{.State.{what}}}}}"), "box"]);
    assert_eq!((state("Status").as_str(), state("ExitCode").as_str()), ("exited\n", "5\n"));
    host.wait_for("the log", || said("up\nbye\n"));

    docker.ok(["start", "box"]);
    assert_eq!(state("Status"), "running\n");
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn stop_of_what_does_not_listen_is_bounded() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&[
        "-d",
        "--name",
        "deaf",
        "busybox",
        "sh",
        "-c",
        "trap '' TERM; echo deaf; while :; do sleep 1; done",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let deaf = || (docker.ok(["logs", "deaf"]) == "deaf\n").then_some(());
    docker.containerd().host().wait_for("the trap", deaf);
    let began = Instant::now();
    docker.ok(["stop", "--time", "1", "deaf"]);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(docker.ok(["inspect", "--format", "{{.State.ExitCode}}", "deaf"]), "137\n");
    docker.ok(["rm", "deaf"]);
}

#[test]
fn published_port_reaches_the_container_and_containers_reach_each_other() {
    let Some(docker) = Docker::new() else { return };
    let script = "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www";
    let options = ["-d", "--name", "web", "-p", "127.0.0.1:8080:80", "busybox"];
    let output = docker.run(&[&options[..], &["sh", "-c", script]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let fetch = |address: &str| {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.ends_with("\r\n\r\nserved\n").then_some(())
    };
    let host = docker.containerd().host();
    host.wait_for("the server", || docker.on_its_host(|| fetch("127.0.0.1:8080")));
    let address = docker.ok(["inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"]);
    let address = address.trim();
    docker.on_its_host(|| fetch(&format!("{address}:80"))).expect("the container answers on its own address");

    let script = format!(
        "ping -c 1 -W 5 $(ip route | awk '/^default/ {{ print $3 }}') > /dev/null && echo gateway; \
         wget -q -O - http://{address}/"
    );
    let output = docker.run(&["--rm", "busybox", "sh", "-c", &script]);
    assert_eq!(stdout(&output), "gateway\nserved\n", "{}", stderr(&output));
    docker.ok(["rm", "--force", "web"]);
}

#[test]
fn memory_limit_is_in_force_and_can_be_changed() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&["-d", "--name", "box", "--memory", "64m", "busybox", "sleep", "1000"]);
    assert!(output.status.success(), "{}", stderr(&output));
    // Of the second hierarchy, or the first.
    let files = "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let limit = || docker.ok(["exec", "box", "sh", "-c", files]).trim().parse::<u64>().unwrap() >> 20;
    assert_eq!(limit(), 64);
    docker.ok(["update", "--memory", "96m", "--memory-swap", "96m", "box"]);
    assert_eq!(limit(), 96);
    docker.ok(["rm", "--force", "box"]);
}

#[test]
fn container_without_a_network_has_only_its_loopback() {
    let Some(docker) = Docker::new() else { return };
    let output = docker.run(&["--rm", "--network", "none", "busybox", "sh", "-c", "ls /sys/class/net"]);
    let text = stdout(&output);
    assert!(text.lines().any(|name| name == "lo") && !text.contains("eth"), "{text}{}", stderr(&output));
}
